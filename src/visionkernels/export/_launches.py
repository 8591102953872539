"""Deformable attention as a launch of its Triton kernel: Inductor compiles that into a package, which needs no Python.

A size that is open when the graph is made is not known when the kernel is chosen. So the kernel reads the levels' sizes
from memory; and where an open size grows until the kernel's offsets of 32 bits do not reach, the output is NaN, as it
is of sizes that do not fit the value.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_functional
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import statically_known_true

from visionkernels.export import _standard
from visionkernels.export._open_sizes import tensor_of
from visionkernels.ops._common import cdiv
from visionkernels.ops.deformable_attention.problem import Problem


def lowered() -> dict[Any, Callable[..., Any]]:
    """Every operator of this package, and its form in a package: a launch of its kernel, or PyTorch's operators."""
    return _standard.lowered() | _standard.of_attention(ms_deform_attn, fused_ms_deform_attn)


def count(program: ExportedProgram) -> int:
    """How many launches a program holds."""
    return sum(node.target is triton_kernel_wrapper_functional for node in program.graph.nodes)


def ms_deform_attn(*arguments: Any) -> Tensor:
    """The plain operator; arguments and result are those of its schema."""
    output = _launched(problem_of(*arguments[:5], None, None, *arguments[5:]))
    return _standard.ms_deform_attn(*arguments) if output is None else output


def fused_ms_deform_attn(*arguments: Any) -> Tensor:
    """The fused operator; arguments and result are those of its schema."""
    output = _launched(problem_of(*arguments))
    return _standard.fused_ms_deform_attn(*arguments) if output is None else output


def problem_of(value: Tensor, spatial_shapes: Tensor | None, level_sizes: Any, *others: Any) -> Problem:
    """The arguments of the fused operator's schema. Shapes are not read, as they are in a call: they may be symbols."""
    return Problem(value, spatial_shapes, tuple(level_sizes or ()), *others)


def _launched(problem: Problem) -> Tensor | None:
    """The output; or None for what this kernel does not take: older GPUs, float64, heads of an unusual size."""
    value, points, references, mask = problem.value, problem.points, problem.reference_points, problem.value_mask
    tensors = (value, points, problem.weights, references)
    is_double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    if value.device.type != "cuda" or is_double or problem.method != "bilinear":
        return None
    from visionkernels.ops.deformable_attention import plan, tile

    batch, num_pixels, num_heads, head_dim = value.shape
    num_queries = points.shape[1]
    value, points = value.contiguous(), points.contiguous()
    common = plan.common_of(
        num_heads * head_dim, num_heads, head_dim, tuple(problem.num_points),
        None if references is None else tuple(references.shape), mask is not None, problem.padding_mode,
        problem.align_corners, True, _begins_at_multiple(points, 2 * points.dtype.itemsize),
    )  # fmt: skip
    if common.num_samples == 0:
        return value.new_zeros(batch, num_queries, num_heads * head_dim)
    choice = plan.warp_kernel(common, value.dtype, statically_known_true(num_queries == num_pixels), None)
    per_query = num_heads * max(2 * common.num_samples, head_dim, common.reference_levels * common.reference_size)
    too_large = _beyond_32_bits((num_pixels + 1) * num_heads * head_dim * value.dtype.itemsize)
    too_large += _beyond_32_bits(num_queries * per_query * value.dtype.itemsize)
    if (
        choice is None
        or not plan.has_warp_instructions(value.device)
        or not _begins_at_multiple(value, tile.LANE_BYTES)
        or statically_known_true(num_pixels <= 1)  # Inductor makes a 1 a constant, which this kernel does not take
        or _of_the_example(too_large) > 0
    ):
        return None
    if problem.spatial_shapes is not None:
        shapes = problem.spatial_shapes.to(value.device).contiguous()
    else:
        shapes = tensor_of(problem.level_sizes, torch.int32, value.device)
    arguments = (
        value.new_empty(batch, num_queries, num_heads * head_dim), value, shapes, points,
        problem.weights.contiguous(), None if references is None else references.contiguous(),
        None if mask is None else mask.contiguous().to(torch.uint8),
        num_pixels * num_heads * head_dim, head_dim, batch, num_pixels - too_large, num_queries,
        *common, *choice.constants,
    )  # fmt: skip
    grid = (batch * cdiv(num_queries, choice.rows // choice.heads), num_heads // choice.heads, 1)
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


def _begins_at_multiple(tensor: Tensor, size: int) -> bool:
    """Whether a tensor begins at a multiple of so many bytes of its memory. Inductor would drop a copy that does."""
    return statically_known_true(tensor.storage_offset() * tensor.dtype.itemsize % size == 0)


def _beyond_32_bits(size: Any) -> Any:
    """0 for a number or symbol that fits, more for one that does not; `max` would fix a symbol."""
    return size // 2**31


def _of_the_example(size: Any) -> int:
    """The number that a symbol stands for in the example, 0 where there is none."""
    return size if isinstance(size, int) else size.node.hint or 0
