"""What a launch needs beyond its tensors: which kernel, its constants and its grid.

All of it depends only on what the key of ``_plan`` holds, and is worked out once for each key.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from visionkernels.ops._common import cdiv, on_device
from visionkernels.ops.deformable_attention import kernels, sampling, warp_backward, warp_forward
from visionkernels.ops.deformable_attention.problem import Problem
from visionkernels.ops.deformable_attention.tile import LANE_BYTES, choose_tile, choose_warp_tile

MAX_INT32 = 2**31 - 1


class Inputs(NamedTuple):
    """A problem's tensors as the kernels take them."""

    value: Tensor
    points: Tensor
    weights: Tensor
    references: Tensor | None
    mask: Tensor | None
    shapes: Tensor | None


class Needs(NamedTuple):
    """Which gradients a backward launch computes; those of the points come with those of the weights."""

    value: bool
    points: bool
    reference: bool


class Plan:
    """A kernel with everything but its tensors.

    ``runner`` is the compiled kernel, bound to its grid, from the first launch on: calling it spares Triton's look-up,
    the larger part of a small call's host time.
    """

    __slots__ = ("arguments", "grid", "kernel", "options", "runner")

    def __init__(
        self, kernel: Any, arguments: tuple[Any, ...], grid: tuple[int, int, int], options: dict[str, int]
    ) -> None:
        self.kernel, self.arguments, self.grid, self.options = kernel, arguments, grid, options
        self.runner: Any = None


def inputs_of(problem: Problem) -> Inputs:
    """The problem's tensors, copied where the kernels could not read them as they lie."""
    value, references, mask = problem.value, problem.reference_points, problem.value_mask
    stride_n, stride_s, _, stride_d = value.stride()
    # The stride of a pixel is a constant of the kernel, and of a sequence-first value it holds the batch size.
    if (stride_d != 1 and value.shape[3] > 1) or (0 < stride_n < stride_s and value.shape[0] > 1):
        value = value.contiguous()
    return Inputs(
        value,
        problem.points.contiguous(),
        problem.weights.contiguous(),
        None if references is None else references.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        problem.spatial_shapes,
    )


def shapes_argument(problem: Problem) -> Tensor | tuple[int, ...]:
    """The tensor in device memory; or the sizes, in the form in which they are launch arguments."""
    if problem.spatial_shapes is not None:
        return problem.spatial_shapes.contiguous()
    return tuple([(size << sampling.SIZE_SHIFT.value) + sampling.SIZE_PAD for size in problem.level_sizes])


def plan_of(problem: Problem, inputs: Inputs, buffers: tuple[Tensor | None, ...], needs: Needs | None) -> Plan:
    """The plan of a forward launch, where ``needs`` is None, or of a backward one.

    Args:
        problem: the inputs as the operator got them.
        inputs: the same as the kernels take them.
        buffers: tensors of the launch that are neither inputs nor new.
        needs: the gradients to compute.
    """
    # The compiled kernel also depends on how addresses are aligned; fresh buffers always are.
    alignment = tuple([0 if t is None else t.data_ptr() % LANE_BYTES for t in (*inputs, *buffers)])
    value, points, references = inputs.value, inputs.points, inputs.references
    return _plan(
        value.device, value.shape, value.stride(), value.dtype, points.shape, points.dtype,
        None if references is None else references.shape,
        tuple([None if t is None else t.dtype for t in inputs[2:]]), alignment,
        problem.num_points, problem.padding_mode, problem.align_corners, problem.method, needs,
        tuple([size > MAX_INT32 >> (sampling.SIZE_SHIFT.value + 1) for size in problem.level_sizes]),
    )  # fmt: skip


def run(problem: Problem, buffers: tuple[Tensor | None, ...], needs: Needs | None) -> None:
    """Launch over all rows, on the device that holds the tensors.

    Args:
        problem: the inputs.
        buffers: the output; or, backward, the four gradients, ``grad_output``, and the output where the kernel for any
            GPU computes the gradients of the fused points.
        needs: None for the forward, or the gradients to compute.
    """
    inputs = inputs_of(problem)
    plan = plan_of(problem, inputs, buffers[4:], needs)
    arguments = (*buffers, inputs.value, shapes_argument(problem), *inputs[1:5])
    with on_device(problem.value.device):
        if plan.runner is not None:
            plan.runner(*arguments, *plan.arguments)
        else:
            compiled = plan.kernel[plan.grid](*arguments, *plan.arguments, **plan.options)
            plan.runner = compiled and compiled[plan.grid]  # Triton's interpreter compiles nothing


def has_points_kernel(problem: Problem, grad_output: Tensor, needs: Needs) -> bool:
    """Whether the gradients of points have a kernel of their own, apart from the value's."""
    plan = plan_of(problem, inputs_of(problem), (grad_output, None), needs._replace(value=False))
    return plan.kernel is warp_backward._backward_points_kernel


@lru_cache
def has_warp_instructions(device: torch.device) -> bool:
    """Whether ``warp.py`` works there."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


class Common(NamedTuple):
    """The constants that every kernel begins with, in their order."""

    stride_value_s: int
    num_heads: int
    head_dim: int
    num_levels: int
    num_samples: int
    num_points: tuple[int, ...]
    first_point: tuple[int, ...]
    reference_size: int
    reference_levels: int
    has_mask: bool
    border: bool
    align_corners: bool
    shapes_in_memory: bool
    xy_in_one_word: bool


class Choice(NamedTuple):
    """A kernel, the constants after the common ones, and how it cuts the rows."""

    kernel: Any
    constants: tuple[Any, ...]
    rows: int
    heads: int
    num_warps: int
    maxnreg: int | None = None  # registers of a thread, where ptxas chooses badly


@lru_cache(maxsize=1024)
def _plan(
    device: torch.device,
    value_shape: tuple[int, ...],
    value_stride: tuple[int, ...],
    value_dtype: torch.dtype,
    points_shape: tuple[int, ...],
    points_dtype: torch.dtype,
    reference_shape: tuple[int, ...] | None,
    other_dtypes: tuple[torch.dtype | None, ...],
    alignment: tuple[int, ...],
    num_points: tuple[int, ...],
    padding_mode: str,
    align_corners: bool,
    method: str,
    needs: Needs | None,
    wide_sizes: tuple[bool, ...],
) -> Plan:
    """Chooses the kernel. The arguments are its key, all of them."""
    batch, num_pixels, num_heads, head_dim = value_shape
    stride_n, stride_s, stride_m, _ = value_stride
    num_queries, num_samples = points_shape[1], sum(num_points)
    _, _, mask_dtype, shapes_dtype = other_dtypes
    common = common_of(
        stride_s, num_heads, head_dim, num_points, reference_shape, mask_dtype is not None, padding_mode, align_corners,
        shapes_dtype is not None, points_dtype.itemsize < 8 and alignment[1] % (2 * points_dtype.itemsize) == 0,
    )  # fmt: skip
    itemsize = value_dtype.itemsize
    double = torch.float64 in (value_dtype, points_dtype, *other_dtypes)
    step = gcd(LANE_BYTES // itemsize, stride_n, stride_s, stride_m)  # elements at whose multiples every pixel begins
    while alignment[0] % (step * itemsize):
        step //= 2
    reach = max(
        num_pixels * max(stride_s, num_heads * head_dim) + num_heads * stride_m,
        num_queries * num_heads * max(2 * num_samples, head_dim),
        num_queries * (reference_shape[2] * reference_shape[3] if reference_shape else 0),
    )
    choice = None
    if (
        has_warp_instructions(device)
        and method == "bilinear"
        and not double
        and reach * itemsize <= MAX_INT32
        and step * itemsize == LANE_BYTES
        and num_pixels > 0
        and not any(alignment[6:])
    ):
        choice = warp_kernel(common, value_dtype, num_queries == num_pixels, needs)
    if choice is None:
        pairs = value_dtype == torch.bfloat16 and not double and step % 2 == 0 and head_dim % 2 == 0
        tile = choose_tile(head_dim, num_heads, itemsize, needs is not None)
        constants = (
            method == "nearest",
            step,
            tl.float64 if double else tl.float32,
            tl.int64 if reach > MAX_INT32 else tl.int32,
            *tile[:3],
            tile.unroll,
            tile.images_first,
            *((pairs,) if needs is None else needs),
        )
        kernel = kernels._forward_kernel if needs is None else kernels._backward_kernel
        choice = Choice(kernel, constants, tile.rows, tile.heads, tile.num_warps)
    grid = (batch * cdiv(num_queries, choice.rows // choice.heads), num_heads // choice.heads, 1)
    scalars = (stride_n, stride_m, batch, num_pixels, num_queries)
    options = {"num_warps": choice.num_warps}
    if choice.maxnreg is not None:
        options["maxnreg"] = choice.maxnreg
    return Plan(choice.kernel, (*scalars, *common, *choice.constants), grid, options)


def common_of(
    stride_value_s: int,
    num_heads: int,
    head_dim: int,
    num_points: tuple[int, ...],
    reference_shape: tuple[int, ...] | None,
    has_mask: bool,
    padding_mode: str,
    align_corners: bool,
    shapes_in_memory: bool,
    xy_in_one_word: bool,
) -> Common:
    """The constants that a problem begins with."""
    levels, size = reference_shape[2:] if reference_shape else (1, 0)
    first_point = tuple(accumulate(num_points, initial=0))[:-1]
    return Common(
        stride_value_s, num_heads, head_dim, len(num_points), sum(num_points), num_points, first_point, size, levels,
        has_mask, padding_mode == "border", align_corners, shapes_in_memory, xy_in_one_word,
    )  # fmt: skip


def warp_kernel(common: Common, value_dtype: torch.dtype, dense: bool, needs: Needs | None) -> Choice | None:
    """The kernel of whole warps for this case, if there is one."""
    tile = choose_warp_tile(common.head_dim, common.num_heads, value_dtype.itemsize, common.num_samples, dense)
    if tile is None or (needs is not None and needs.value):
        return None
    constants = (tile.rows, tile.heads, 32 * tile.num_warps)
    if needs is None:
        return Choice(warp_forward._forward_warp_kernel, constants, *tile)
    # Given this limit ptxas orders the code so that it is a quarter faster on an H200, 0.24 instead of 0.31 ms.
    maxnreg = 96 if needs.reference and value_dtype.itemsize == 2 and common.num_samples <= 16 else None
    return Choice(warp_backward._backward_points_kernel, (*constants, needs.reference), *tile, maxnreg)
