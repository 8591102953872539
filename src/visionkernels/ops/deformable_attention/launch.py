"""Launches the kernels: which grid, which constants, which buffers.

Everything a launch needs to know is worked out on the host, without reading device memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from visionkernels.ops.deformable_attention import kernels, sampling
from visionkernels.ops.deformable_attention.problem import Problem
from visionkernels.ops.deformable_attention.tile import LANE_BYTES, choose_tile

MAX_INT32 = 2**31 - 1


def forward(problem: Problem) -> Tensor:
    """Launch the forward kernel. Returns ``[N, Lq, M * D]`` in the value's dtype."""
    value, points = problem.value, problem.points
    output = value.new_empty(points.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    if output.numel() == 0:
        return output
    if sum(problem.num_points) == 0:
        return output.zero_()
    _run(kernels._forward_kernel, (output,), problem, needs=())
    return output


def backward(
    problem: Problem,
    grad_output: Tensor,
    output: Tensor | None,
    needs_value: bool,
    needs_points: bool,
    needs_reference: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Launch the backward kernel.

    Args:
        problem: the forward's inputs.
        grad_output: ``[N, Lq, M * D]``, any strides.
        output: what the fused forward returned; None unfused.
        needs_value: compute the value's gradient.
        needs_points: compute the gradients of points and weights.
        needs_reference: compute the reference points' gradient; implies the work of ``needs_points``.

    Returns:
        The gradients of value, points, weights and reference points, contiguous and in their tensors' dtypes; None
        for those that are not needed.
    """
    if needs_value or needs_reference:
        _alert_not_deterministic()
    value, points, weights = problem.value, problem.points, problem.weights
    dtype, device = _accumulator(problem), value.device
    needs_points = needs_points or needs_reference
    grad_value = torch.zeros(value.shape, dtype=dtype, device=device) if needs_value else None
    grad_reference = None
    if needs_reference and problem.reference_points is not None:
        grad_reference = torch.zeros(problem.reference_points.shape, dtype=dtype, device=device)
    grad_points = grad_weights = None
    if needs_points:
        # The kernel has no reason to write the locations' gradient of nearest sampling: it is zero.
        allocate = torch.zeros if problem.method == "nearest" else torch.empty
        grad_points = allocate(points.shape, dtype=points.dtype, device=device)
        grad_weights = torch.empty(weights.shape, dtype=weights.dtype, device=device)
    if grad_output.numel() and sum(problem.num_points):
        gradients = (grad_value, grad_points, grad_weights, grad_reference, grad_output.contiguous(), output)
        _run(kernels._backward_kernel, gradients, problem, needs=(needs_value, needs_points, needs_reference))
    if grad_value is not None:
        grad_value = grad_value.to(value.dtype)
    if grad_reference is not None:
        grad_reference = grad_reference.to(problem.reference_points.dtype)  # type: ignore[union-attr]
    return grad_value, grad_points, grad_weights, grad_reference


class _Inputs(NamedTuple):
    """A problem's tensors as the kernels take them."""

    value: Tensor
    points: Tensor
    weights: Tensor
    references: Tensor | None
    mask: Tensor | None
    shapes: Tensor | None


class _Plan:
    """What a launch needs beyond its tensors.

    ``runner`` is the compiled kernel, bound to its grid, from the first launch on: calling it spares Triton's look-up,
    the larger part of a small call's host time.
    """

    __slots__ = ("arguments", "grid", "num_warps", "runner")

    def __init__(self, arguments: tuple[Any, ...], grid: tuple[int, int, int], num_warps: int) -> None:
        self.arguments, self.grid, self.num_warps = arguments, grid, num_warps
        self.runner: Any = None


def repeat(problem: Problem) -> Callable[..., Tensor] | None:
    """The forward launch of ``problem`` as a function of its tensors alone, or None if it does more than launch.

    Returns:
        A function of value, points, weights, reference points, mask and the caller's ``spatial_shapes``, for tensors
        that agree with those of ``problem`` in shape, strides, dtype, device and alignment; it returns the output.
    """
    value, points = problem.value, problem.points
    output_shape = (points.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    if 0 in output_shape or sum(problem.num_points) == 0:
        return None
    inputs = _inputs(problem)
    plan = _plan_of(kernels._forward_kernel, problem, inputs, (), ())
    originals = (problem.value, problem.points, problem.weights, problem.reference_points)
    copied = any(a is not b for a, b in zip(inputs[:4], originals, strict=True))
    if copied or problem.value_mask is not None or plan.runner is None:
        return None
    device, runner, arguments = value.device, plan.runner, plan.arguments
    sizes = None if inputs.shapes is not None else _shapes_argument(problem, inputs)

    def launch(
        value: Tensor, points: Tensor, weights: Tensor, references: Tensor | None, mask: None, shapes: Any
    ) -> Tensor:
        output = value.new_empty(output_shape)
        with nullcontext() if torch.cuda.current_device() == device.index else torch.cuda.device(device):
            runner(output, value, sizes or shapes, points, weights, references, mask, *arguments)
        return output

    return launch


def _inputs(problem: Problem) -> _Inputs:
    value, references, mask = problem.value, problem.reference_points, problem.value_mask
    stride_n, stride_s, _, stride_d = value.stride()
    # The stride of a pixel is a constant of the kernel, and of a sequence-first value it holds the batch size.
    if (stride_d != 1 and value.shape[3] > 1) or (0 < stride_n < stride_s and value.shape[0] > 1):
        value = value.contiguous()
    return _Inputs(
        value,
        problem.points.contiguous(),
        problem.weights.contiguous(),
        None if references is None else references.contiguous(),
        None if mask is None else mask.contiguous().view(torch.uint8),
        problem.spatial_shapes,
    )


def _shapes_argument(problem: Problem, inputs: _Inputs) -> Tensor | tuple[int, ...]:
    """The tensor in device memory; or the sizes, in the form in which they are launch arguments."""
    if inputs.shapes is not None:
        return inputs.shapes
    return tuple([(size << sampling.SIZE_SHIFT.value) + sampling.SIZE_PAD for size in problem.level_sizes])


def _plan_of(
    kernel: Any,
    problem: Problem,
    inputs: _Inputs,
    buffers: tuple[Tensor | None, ...],
    needs: tuple[bool, ...],
) -> _Plan:
    # The compiled kernel also depends on how addresses are aligned; fresh buffers always are.
    alignment = tuple([0 if t is None else t.data_ptr() % LANE_BYTES for t in (*inputs, *buffers)])
    value, points, references = inputs.value, inputs.points, inputs.references
    return _plan(
        kernel, value.device, value.shape, value.stride(), value.dtype, points.shape, points.dtype,
        None if references is None else references.shape,
        tuple([None if t is None else t.dtype for t in inputs[2:]]), alignment,
        problem.num_points, problem.padding_mode, problem.align_corners, problem.method, needs,
        max(problem.level_sizes, default=0) > MAX_INT32 >> (sampling.SIZE_SHIFT.value + 1),
    )  # fmt: skip


def _run(kernel: Any, buffers: tuple[Tensor | None, ...], problem: Problem, needs: tuple[bool, ...]) -> None:
    """Launch ``kernel`` over all rows, on the device that holds the tensors. ``needs`` is empty in the forward."""
    inputs = _inputs(problem)
    plan = _plan_of(kernel, problem, inputs, buffers[4:], needs)
    arguments = (*buffers, inputs.value, _shapes_argument(problem, inputs), *inputs[1:5])
    device = problem.value.device
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        if plan.runner is not None:
            plan.runner(*arguments, *plan.arguments)
        else:
            compiled = kernel[plan.grid](*arguments, *plan.arguments, num_warps=plan.num_warps)
            plan.runner = compiled and compiled[plan.grid]  # Triton's interpreter compiles nothing


@lru_cache(maxsize=1024)
def _plan(
    kernel: Any,
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
    needs: tuple[bool, ...],
    wide_sizes: bool,
) -> _Plan:
    """Scalars and constants of a launch, in the order of the kernel's parameters. All arguments are its key."""
    batch, num_pixels, num_heads, head_dim = value_shape
    stride_n, stride_s, stride_m, _ = value_stride
    num_queries = points_shape[1]
    _, _, mask_dtype, shapes_dtype = other_dtypes
    num_samples = sum(num_points)
    backward = bool(needs)
    itemsize = value_dtype.itemsize
    tile = choose_tile(head_dim, num_heads, itemsize, backward)
    double = torch.float64 in (value_dtype, points_dtype, *other_dtypes)
    step = gcd(LANE_BYTES // itemsize, stride_n, stride_s, stride_m)  # elements at whose multiples every pixel begins
    while alignment[0] % (step * itemsize):
        step //= 2
    reach = max(
        num_pixels * max(stride_s, num_heads * head_dim) + num_heads * stride_m,
        num_queries * num_heads * max(2 * num_samples, head_dim),
        num_queries * (reference_shape[2] * reference_shape[3] if reference_shape else 0),
    )
    arguments = (
        stride_n,
        stride_m,
        batch,
        num_pixels,
        num_queries,
        stride_s,
        num_heads,
        head_dim,
        len(num_points),
        num_samples,
        num_points,
        tuple(accumulate(num_points, initial=0))[:-1],
        reference_shape[3] if reference_shape else 0,
        reference_shape[2] if reference_shape else 1,
        mask_dtype is not None,
        padding_mode == "border",
        align_corners,
        method == "nearest",
        shapes_dtype is not None,
        points_dtype.itemsize < 8 and alignment[1] % (2 * points_dtype.itemsize) == 0,
        step,
        tl.float64 if double else tl.float32,
        tl.int64 if reach > MAX_INT32 else tl.int32,
        *tile[:3],
        tile.unroll,
        tile.images_first,
        *(needs or (value_dtype == torch.bfloat16 and not double and step % 2 == 0 and head_dim % 2 == 0,)),
    )
    grid = (batch * triton.cdiv(num_queries, tile.rows // tile.heads), num_heads // tile.heads, 1)
    return _Plan(arguments, grid, tile.num_warps)


def _accumulator(problem: Problem) -> torch.dtype:
    """The dtype of coordinates, sums and summed gradients: float64 where an input is, else float32."""
    tensors = (problem.value, problem.points, problem.weights, problem.reference_points)
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _alert_not_deterministic() -> None:
    """What PyTorch's own operators do under ``torch.use_deterministic_algorithms``."""
    if not torch.are_deterministic_algorithms_enabled():
        return
    message = (
        "the backward of ms_deform_attn on CUDA sums the value's gradient with atomics and has no deterministic "
        "implementation; call torch.use_deterministic_algorithms(False), or pass warn_only=True"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
