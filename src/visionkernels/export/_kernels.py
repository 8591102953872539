"""Deformable attention as its Triton kernel: Inductor compiles it into a package, which then needs no Python.

A size that is open when the graph is made is not known when the kernel is chosen. So the kernel reads the levels' sizes
from memory, and a value too large for its offsets of 32 bits gives NaN, as sizes that do not fit the value do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visionkernels.export import _standard
from visionkernels.export._open_sizes import tensor_of
from visionkernels.ops._common import cdiv
from visionkernels.ops.deformable_attention import registration


def lowered() -> dict[Any, Callable[..., Any]]:
    """Every operator of this package, and its form in a package: a Triton kernel, or else PyTorch's operators."""
    return {
        **_standard.lowered(),
        registration.FORWARD: ms_deform_attn,
        registration.FORWARD_NO_GRAD: ms_deform_attn,
        registration.FUSED_FORWARD: fused_ms_deform_attn,
        registration.FUSED_FORWARD_NO_GRAD: fused_ms_deform_attn,
    }


def ms_deform_attn(*arguments: Any) -> Tensor:
    """The plain operator; arguments and result are those of its schema."""
    value, spatial_shapes, level_sizes, points, weights, num_points, padding_mode, align_corners, method = arguments
    if method == "bilinear":
        output = _kernel(
            value, spatial_shapes, level_sizes, points, weights, None, None, num_points, padding_mode, align_corners
        )
        if output is not None:
            return output
    return _standard.ms_deform_attn(*arguments)


def fused_ms_deform_attn(*arguments: Any) -> Tensor:
    """The fused operator; arguments and result are those of its schema."""
    output = _kernel(*arguments)
    return _standard.fused_ms_deform_attn(*arguments) if output is None else output


def _kernel(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_sizes: Sequence[int] | None,
    points: Tensor,
    weights: Tensor,
    reference_points: Tensor | None,
    value_mask: Tensor | None,
    num_points: Sequence[int],
    padding_mode: str,
    align_corners: bool,
) -> Tensor | None:
    """The output, or None where there is no such kernel: it takes NVIDIA GPUs from compute capability 8.0 on."""
    floats = [t for t in (value, points, weights, reference_points) if t is not None]
    if value.device.type != "cuda" or any(t.dtype == torch.float64 for t in floats):
        return None
    from visionkernels.ops.deformable_attention import plan

    batch, num_pixels, num_heads, head_dim = value.shape
    num_queries, num_points = points.shape[1], tuple(num_points)
    common = plan.common_of(
        num_heads * head_dim, num_heads, head_dim, num_points,
        None if reference_points is None else tuple(reference_points.shape), value_mask is not None, padding_mode,
        align_corners, True, True,
    )  # fmt: skip
    dense = statically_known_true(num_queries == num_pixels)
    choice = plan.warp_kernel(common, value.dtype, dense, None)
    if choice is None or not plan.has_warp_instructions(value.device) or sum(num_points) == 0:
        return None
    row = num_heads * max(2 * sum(num_points), head_dim, common.reference_levels * common.reference_size)
    too_large = (num_pixels + num_queries + 1) * row * value.dtype.itemsize // plan.MAX_INT32
    output = value.new_empty(batch, num_queries, num_heads * head_dim)
    if level_sizes is None:
        assert spatial_shapes is not None
        shapes = _plain(spatial_shapes)
    else:
        shapes = tensor_of(list(level_sizes), torch.int32, value.device)
    grid = (batch * cdiv(num_queries, choice.rows // choice.heads), num_heads // choice.heads, 1)
    arguments = (
        output, _plain(value), shapes, _plain(points), _plain(weights),
        None if reference_points is None else _plain(reference_points),
        None if value_mask is None else _plain(value_mask.to(torch.uint8)),
        num_pixels * num_heads * head_dim, head_dim, batch, num_pixels - too_large, num_queries,
        *common, *choice.constants,
    )  # fmt: skip
    return _launch(choice.kernel, choice.num_warps, grid, arguments)


def _launch(kernel: Any, num_warps: int, grid: tuple[Any, ...], arguments: tuple[Any, ...]) -> Tensor:
    """A launch as a node of the graph; it writes its first argument, which it returns.

    `torch.library.wrap_triton` would do, were the store not assembly: not seeing through that, it takes every input to
    be written, and copies them.
    """
    named = dict(zip(kernel.arg_names, arguments, strict=True))
    constants = {name: argument for name, argument in named.items() if argument is None or isinstance(argument, tuple)}
    output = kernel.arg_names[0]
    return triton_kernel_wrapper_functional(
        kernel_idx=kernel_side_table.add_kernel(_with_warps(kernel, num_warps)),
        constant_args_idx=kernel_side_table.add_constant_args(constants),
        grid=[grid],
        tma_descriptor_metadata={},
        kwargs={name: argument for name, argument in named.items() if name not in constants},
        tensors_to_clone=[output],
    )[output]


@cache
def _with_warps(kernel: Any, num_warps: int) -> Any:
    """The kernel with its number of warps, as Inductor takes it."""
    import triton

    return triton.autotune([triton.Config({}, num_warps=num_warps)], key=[])(kernel)


def _plain(tensor: Tensor) -> Tensor:
    """The tensor as the kernel reads it: contiguous, from a multiple of 16 bytes on, as memory of its own begins."""
    tensor = tensor.contiguous()
    return tensor if statically_known_true(tensor.storage_offset() == 0) else tensor.clone()
