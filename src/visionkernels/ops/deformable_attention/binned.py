"""Launches the binned gradient of the value; see ``binned_kernels`` for what the kernels do.

Nothing here reads device memory: numbers of bins and items are bounded by what the host knows.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionkernels.ops._common import cdiv, next_power_of_2
from visionkernels.ops.deformable_attention import binned_kernels as kernels
from visionkernels.ops.deformable_attention import binned_samples
from visionkernels.ops.deformable_attention.plan import shapes_argument
from visionkernels.ops.deformable_attention.problem import Problem

MAX_INT32 = 2**31 - 1
MAX_SAMPLES = 64  # of a row: they are unrolled
MAX_HEAD_DIM = 128  # the sums of 16 pixels stay in one warp's registers
SAMPLES_PER_PIXEL = 4  # of one head, from which sorting them pays,
MIN_SAMPLES = 2**20  # unless they are so few that launches take most of the time
# Bounds the temporary memory, unless one image has more: 20 bytes a sample; when deterministic about as much again for
# the sort, and the sums of all bins.
SAMPLES_PER_PASS = 5 * 2**20
PLAN_BLOCK = 256
PROGRAMS_OF_UNKNOWN = 16384  # that share the items, where their number is not known


class Options(NamedTuple):
    """How the work is cut."""

    threads: int = 128  # of a program that counts or scatters, a query each
    chunk: int = 256  # records of an item
    block_k: int = 32  # of them in one matrix product
    tile_warps: int = 1
    stages: int = 2
    gather: bool = False  # store the items' sums and gather them, instead of atomics
    gather_pixels: int = 32
    programs: int | None = None  # of the matrix products; None: one an item


def possible(problem: Problem) -> bool:
    """Whether ``grad_value`` can do this problem."""
    value, points = problem.value, problem.points
    batch, num_pixels, num_heads, head_dim = value.shape
    tensors = (value, points, problem.weights, problem.reference_points)
    if problem.method != "bilinear" or any(t is not None and t.dtype == torch.float64 for t in tensors):
        return False
    samples = points.shape[1] * sum(problem.num_points) * num_heads
    reach = max(
        samples * 4,
        batch * num_heads * bins_of_a_head(problem),
        points.shape[1] * num_heads * head_dim,
        num_pixels,
    )
    fits = head_dim <= MAX_HEAD_DIM and sum(problem.num_points) <= MAX_SAMPLES and reach <= MAX_INT32
    return fits and value.numel() > 0 and samples > 0


def pays(problem: Problem) -> bool:
    """Whether ``grad_value`` is expected to be faster than one atomic a corner: samples outnumber the pixels."""
    batch, num_queries, num_heads = problem.points.shape[:3]
    samples = num_queries * sum(problem.num_points)
    return samples >= SAMPLES_PER_PIXEL * problem.value.shape[1] and batch * num_heads * samples >= MIN_SAMPLES


def grad_value(
    problem: Problem,
    grad_output: Tensor,
    deterministic: bool = False,
    images_per_pass: int | None = None,
    options: Options | None = None,
) -> Tensor:
    """The gradient of the value of bilinear sampling.

    Args:
        problem: the forward's inputs, which are ``possible``; on one device.
        grad_output: ``[N, Lq, M * D]`` or ``[N, Lq, M, D]``, any strides.
        deterministic: bit-identical run to run, by a stable sort and without any atomic sum.
        images_per_pass: images whose samples are sorted at a time.
        options: how the work is cut.

    Returns:
        ``[N, S, M, D]``, contiguous, in the value's dtype.
    """
    options = options or Options()
    value, points = problem.value, problem.points
    batch = value.shape[0]
    if not (value.numel() and points.shape[1] and sum(problem.num_points)):
        return torch.zeros_like(value, memory_format=torch.contiguous_format)
    gradient = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    grad_output = grad_output.contiguous()
    samples = points.shape[1] * points.shape[2] * sum(problem.num_points)  # of an image
    images = images_per_pass or cdiv(batch, cdiv(batch, max(1, SAMPLES_PER_PASS // samples)))
    with torch.cuda.device(value.device) if value.device.type == "cuda" else nullcontext():
        for first in range(0, batch, images):
            part = slice(first, first + images)
            _pass(problem.images(part), grad_output[part], gradient[part], deterministic, options)
    return gradient


def _pass(problem: Problem, grad_output: Tensor, gradient: Tensor, deterministic: bool, options: Options) -> None:
    """All kernels over all images of ``problem``."""
    value, points = problem.value, problem.points
    device = value.device
    batch, num_pixels, num_heads, head_dim = value.shape
    num_queries = points.shape[1]
    num_bins = bins_of_a_head(problem)
    all_bins = batch * num_heads * num_bins
    samples = batch * num_queries * num_heads * sum(problem.num_points)
    partial = deterministic or options.gather
    block_d = max(16, next_power_of_2(head_dim))
    items = samples // options.chunk + min(all_bins, samples)
    shapes = shapes_argument(problem)
    in_memory = problem.spatial_shapes is not None
    mask = None if problem.value_mask is None else problem.value_mask.contiguous().view(torch.uint8)
    scalars = (batch, num_pixels, num_queries, num_bins)
    points, weights = problem.points.contiguous(), problem.weights.contiguous()
    references = None if problem.reference_points is None else problem.reference_points.contiguous()
    constants = _sampling_constants(problem, options, deterministic)
    grid: tuple[int, ...] = (batch * cdiv(num_queries, options.threads), num_heads)
    # Two cursors and the counters are filled with zeros at a time; both begin at multiples of 16 bytes.
    counters = torch.zeros(4 + (0 if deterministic else all_bins), dtype=torch.int32, device=device)
    cursor, counts = counters[:2], counters[4:]
    ranks = torch.empty(samples, dtype=torch.int32, device=device)
    binned_samples._count_kernel[grid](
        counts, ranks, shapes, points, references, *scalars, *constants, num_warps=options.threads // 32
    )
    if deterministic:
        ranks, counts = _sorted_places(ranks, all_bins)
    item_list = torch.empty(items, 8, dtype=torch.int32, device=device)
    first_items = torch.empty(2, all_bins, dtype=torch.int32, device=device) if partial else None
    kernels._plan_kernel[(cdiv(all_bins, PLAN_BLOCK),)](
        counts, cursor, item_list, first_items, shapes, all_bins, num_bins, len(problem.num_points), in_memory,
        options.chunk, PLAN_BLOCK, deterministic, partial, num_warps=4,
    )  # fmt: skip
    records = torch.empty(samples, 4, dtype=torch.int32, device=device)
    binned_samples._scatter_kernel[grid](
        records, counts, ranks, shapes, points, weights, references,
        *scalars, *constants, num_warps=options.threads // 32,
    )  # fmt: skip
    del ranks, counts  # the sums have their memory
    if partial:
        sums = torch.empty(items, 16, block_d, dtype=torch.float32, device=device)
    else:
        sums = gradient.zero_() if gradient.dtype == torch.float32 else torch.zeros_like(gradient, dtype=torch.float32)
    # The bound on the bins of shapes in device memory is four times what they commonly are.
    programs = min(items, options.programs or (PROGRAMS_OF_UNKNOWN if in_memory else items))
    kernels._tile_kernel[(programs,)](
        sums, grad_output, records, item_list, cursor, mask, num_pixels, num_queries, programs,
        num_heads, head_dim, mask is not None, block_d,
        options.block_k, options.stages, partial, num_warps=options.tile_warps,
    )  # fmt: skip
    if partial:
        grid = (batch * num_heads * cdiv(num_pixels, options.gather_pixels),)
        kernels._gather_kernel[grid](
            gradient, sums, first_items, shapes, mask, *scalars, num_heads, head_dim, len(problem.num_points),
            mask is not None, in_memory, block_d, options.gather_pixels, num_warps=1,
        )  # fmt: skip
    elif sums is not gradient:
        gradient.copy_(sums)


def _sorted_places(bins: Tensor, all_bins: int) -> tuple[Tensor, Tensor]:
    """Each sample's place among all, sorted by bin and then by itself; and where each bin begins, [all_bins + 1]."""
    ordered, order = torch.sort(bins, stable=True)
    places = torch.empty_like(bins)
    grid = (cdiv(bins.shape[0], 1024),)
    kernels._invert_kernel[grid](places, order, bins.shape[0], 1024, num_warps=4)
    edges = torch.arange(all_bins + 1, dtype=torch.int32, device=bins.device)
    return places, torch.searchsorted(ordered, edges, out_int32=True)


def _sampling_constants(problem: Problem, options: Options, deterministic: bool) -> tuple[Any, ...]:
    """The constants of the kernels that locate samples, in the order of their parameters."""
    points, references, num_points = problem.points, problem.reference_points, problem.num_points
    return (
        problem.value.shape[2],
        len(num_points),
        sum(num_points),
        num_points,
        max(num_points),
        tuple(accumulate(num_points, initial=0))[:-1],
        0 if references is None else references.shape[3],
        1 if references is None else references.shape[2],
        problem.padding_mode == "border",
        problem.align_corners,
        problem.spatial_shapes is not None,
        points.is_contiguous() and points.data_ptr() % (2 * points.element_size()) == 0,
        options.threads,
        deterministic,
    )


def bins_of_a_head(problem: Problem) -> int:
    """Bins of all levels of one head; for shapes in device memory the most that they can have.

    A level of w x h pixels has at most (w / 3 + 1)(h / 3 + 1) bins, and w + h is at most w h + 1, so there are no more
    than 4 / 9 w h + 4 / 3.
    """
    if problem.spatial_shapes is not None:
        return max(1, 4 * problem.value.shape[1] // 9 + 2 * len(problem.num_points))
    sizes = problem.level_sizes
    levels = zip(sizes[::2], sizes[1::2], strict=True)
    return max(1, sum(((h + 3) // 3) * ((w + 3) // 3) for h, w in levels if h and w))
