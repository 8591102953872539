"""Multi-scale deformable attention as registered operators.

Four operators in the namespace ``visionkernels``, one a direction for the plain and for the fused attention, each with
a CPU and a CUDA implementation, a fake, and autograd attached. The device decides which implementation runs. The names
of their arguments are those of ``Problem``. The two forward operators stand a second time without autograd, under names
that end in ``_no_grad``: what PyTorch puts around an operator to record it costs more host time than a small launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from visionkernels.ops.deformable_attention import checks, cpu
from visionkernels.ops.deformable_attention.problem import Problem

_OPTIONS = "int[] num_points, str padding_mode, bool align_corners"
_PLAIN = f"Tensor value, Tensor? spatial_shapes, SymInt[]? level_sizes, Tensor points, Tensor weights, {_OPTIONS}"
_FUSED = (
    "Tensor value, Tensor? spatial_shapes, SymInt[]? level_sizes, Tensor points, Tensor weights, "
    f"Tensor reference_points, Tensor? value_mask, {_OPTIONS}"
)
_library = torch.library.Library("visionkernels", "DEF")
for _schema in (
    f"ms_deform_attn({_PLAIN}, str method) -> Tensor",
    f"ms_deform_attn_no_grad({_PLAIN}, str method) -> Tensor",
    f"ms_deform_attn_backward(Tensor grad_output, {_PLAIN}, str method, bool needs_value, bool needs_points)"
    " -> (Tensor, Tensor, Tensor)",
    f"fused_ms_deform_attn({_FUSED}) -> Tensor",
    f"fused_ms_deform_attn_no_grad({_FUSED}) -> Tensor",
    f"fused_ms_deform_attn_backward(Tensor grad_output, {_FUSED}, bool needs_value, bool needs_points,"
    " bool needs_reference) -> (Tensor, Tensor, Tensor, Tensor)",
):
    _library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))

# The overloads are captured once: looking them up in torch.ops costs microseconds a call.
FORWARD = torch.ops.visionkernels.ms_deform_attn.default
FORWARD_NO_GRAD = torch.ops.visionkernels.ms_deform_attn_no_grad.default
BACKWARD = torch.ops.visionkernels.ms_deform_attn_backward.default
FUSED_FORWARD = torch.ops.visionkernels.fused_ms_deform_attn.default
FUSED_FORWARD_NO_GRAD = torch.ops.visionkernels.fused_ms_deform_attn_no_grad.default
FUSED_BACKWARD = torch.ops.visionkernels.fused_ms_deform_attn_backward.default


@cache
def _launch() -> ModuleType:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            "multi-scale deformable attention on CUDA tensors needs Triton, which is not installed; "
            "install it with `pip install triton`, or move the tensors to the CPU"
        ) from error
    from visionkernels.ops.deformable_attention import launch

    return launch


def repeat(*arguments: Any) -> Any:
    """The CUDA launch that a call with the fused operator's arguments makes; see ``launch.repeat``."""
    return _launch().repeat(_problem(*arguments))


def _problem(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_sizes: Sequence[int] | None,
    points: Tensor,
    weights: Tensor,
    reference_points: Tensor | None,
    value_mask: Tensor | None,
    num_points: Sequence[int],
    *options: Any,
) -> Problem:
    shapes, sizes = checks.resolve_shapes(spatial_shapes, level_sizes, value)
    return Problem(value, shapes, sizes, points, weights, reference_points, value_mask, tuple(num_points), *options)


def _forward_cuda(
    value: Tensor, spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, points: Tensor, weights: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    return _launch().forward(_problem(value, spatial_shapes, level_sizes, points, weights, None, None, *options))


def _backward_cuda(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs_value, needs_points = arguments
    problem = _problem(*inputs[:5], None, None, *inputs[5:])
    gradients = _launch().backward(problem, grad_output, needs_value, needs_points, False)
    return _present(gradients[:3], problem.value)


def _fused_forward_cuda(*arguments: Any) -> Tensor:
    return _launch().forward(_problem(*arguments))


def _fused_backward_cuda(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs_value, needs_points, needs_reference = arguments
    problem = _problem(*inputs)
    value, points, weights, reference = _launch().backward(
        problem, grad_output, needs_value, needs_points, needs_reference
    )
    if not needs_points:  # the references' gradient is made of theirs
        points = weights = None
    return _present((value, points, weights, reference), problem.value)


def _forward_cpu(
    value: Tensor, spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, points: Tensor, weights: Tensor,
    *options: Any,
) -> Tensor:  # fmt: skip
    problem = _problem(value, spatial_shapes, level_sizes, points, weights, None, None, *options)
    shapes, points, weights = _packed(problem)
    return cpu.forward(
        value, shapes, points, weights, problem.num_points,
        padding_mode=problem.padding_mode, align_corners=problem.align_corners, method=problem.method,
    )  # fmt: skip


def _backward_cpu(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs_value, needs_points = arguments
    problem = _problem(*inputs[:5], None, None, *inputs[5:])
    shapes, points, weights = _packed(problem)
    gradients = cpu.backward(
        grad_output, problem.value, shapes, points, weights, problem.num_points,
        padding_mode=problem.padding_mode, align_corners=problem.align_corners, method=problem.method,
        needs_value=needs_value, needs_points=needs_points,
    )  # fmt: skip
    return _present(_unpacked(gradients, problem), problem.value)


def _fused_forward_cpu(*arguments: Any) -> Tensor:
    problem = _problem(*arguments)
    assert problem.reference_points is not None
    shapes, points, weights = _packed(problem)
    return cpu.fused_forward(
        problem.value, shapes, problem.reference_points, points, weights, problem.value_mask, problem.num_points,
        padding_mode=problem.padding_mode, align_corners=problem.align_corners,
    )  # fmt: skip


def _fused_backward_cpu(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *inputs, needs_value, needs_points, needs_reference = arguments
    problem = _problem(*inputs)
    assert problem.reference_points is not None
    shapes, points, weights = _packed(problem)
    grad_value, grad_reference, grad_points, grad_weights = cpu.fused_backward(
        grad_output, problem.value, shapes, problem.reference_points, points, weights, problem.value_mask,
        problem.num_points, padding_mode=problem.padding_mode, align_corners=problem.align_corners,
        needs_value=needs_value, needs_reference=needs_reference, needs_points=needs_points,
    )  # fmt: skip
    gradients = _unpacked((grad_value, grad_points, grad_weights), problem)
    return _present((*gradients, grad_reference), problem.value)


def _packed(problem: Problem) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Level shapes as pairs, points ``[N, Lq, M, K, 2]`` and weights ``[N, Lq, M, K]``."""
    sizes = problem.level_sizes
    points, weights = problem.points, problem.weights
    if points.dim() == 6:
        points, weights = points.flatten(3, 4), weights.flatten(3, 4)
    return list(zip(sizes[::2], sizes[1::2], strict=True)), points, weights


def _unpacked(gradients: tuple[Tensor | None, ...], problem: Problem) -> tuple[Tensor | None, ...]:
    grad_value, grad_points, grad_weights = gradients
    if grad_points is not None and grad_weights is not None:
        grad_points, grad_weights = grad_points.view(problem.points.shape), grad_weights.view(problem.weights.shape)
    return grad_value, grad_points, grad_weights


def _present(gradients: tuple[Tensor | None, ...], value: Tensor) -> tuple[Tensor, ...]:
    """An operator returns tensors: an empty one stands for a gradient that was not asked for."""
    return tuple(value.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _forward_fake(value: Tensor, spatial_shapes: Any, level_sizes: Any, points: Tensor, *_: Any) -> Tensor:
    return value.new_empty(points.shape[0], points.shape[1], value.shape[2] * value.shape[3])


def _backward_fake(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    value, _, _, points, weights = arguments[:5]
    needs_value, needs_points = arguments[-2:]
    wanted = (value if needs_value else None, points if needs_points else None, weights if needs_points else None)
    return tuple(value.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted)


def _fused_backward_fake(grad_output: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    needs_value, needs_points, needs_reference = arguments[-3:]
    value, reference = arguments[0], arguments[5]
    gradients = _backward_fake(grad_output, *arguments[:5], needs_value, needs_points)
    return (*gradients, reference.new_empty(reference.shape) if needs_reference else value.new_empty(0))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, spatial_shapes, ctx.level_sizes, points, weights, *ctx.options = inputs
    ctx.save_for_backward(value, spatial_shapes, points, weights)


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, spatial_shapes, points, weights = ctx.saved_tensors
    needs_value, needs_points = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:5])
    grad_value, grad_points, grad_weights = BACKWARD(
        grad_output, value, spatial_shapes, ctx.level_sizes, points, weights, *ctx.options, needs_value, needs_points
    )
    gradients = (grad_value, None, None, grad_points, grad_weights) + (None,) * len(ctx.options)
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _fused_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, spatial_shapes, ctx.level_sizes, points, weights, references, value_mask, *ctx.options = inputs
    ctx.save_for_backward(value, spatial_shapes, points, weights, references, value_mask)


def _fused_backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, spatial_shapes, points, weights, references, value_mask = ctx.saved_tensors
    needs_value, needs_points, needs_reference = (
        ctx.needs_input_grad[0],
        any(ctx.needs_input_grad[3:5]),
        ctx.needs_input_grad[5],
    )
    grad_value, grad_points, grad_weights, grad_references = FUSED_BACKWARD(
        grad_output, value, spatial_shapes, ctx.level_sizes, points, weights, references, value_mask,
        *ctx.options, needs_value, needs_points, needs_reference,
    )  # fmt: skip
    gradients = (grad_value, None, None, grad_points, grad_weights, grad_references) + (None,) * (1 + len(ctx.options))
    return tuple(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=True))


def _no_double_backward(ctx: Any, *gradients: Tensor) -> None:
    raise NotImplementedError(
        "the second derivative of multi-scale deformable attention is not implemented; "
        "visionkernels.ops.deformable_attention.reference computes it in plain PyTorch"
    )


for _name, _cpu, _cuda, _fake in (
    ("ms_deform_attn", _forward_cpu, _forward_cuda, _forward_fake),
    ("ms_deform_attn_no_grad", _forward_cpu, _forward_cuda, _forward_fake),
    ("ms_deform_attn_backward", _backward_cpu, _backward_cuda, _backward_fake),
    ("fused_ms_deform_attn", _fused_forward_cpu, _fused_forward_cuda, _forward_fake),
    ("fused_ms_deform_attn_no_grad", _fused_forward_cpu, _fused_forward_cuda, _forward_fake),
    ("fused_ms_deform_attn_backward", _fused_backward_cpu, _fused_backward_cuda, _fused_backward_fake),
):
    _library.impl(_name, _cpu, "CPU")
    _library.impl(_name, _cuda, "CUDA")
    torch.library.register_fake(f"visionkernels::{_name}", _fake, lib=_library)
torch.library.register_autograd("visionkernels::ms_deform_attn", _backward, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "visionkernels::fused_ms_deform_attn", _fused_backward, setup_context=_fused_save, lib=_library
)
for _name in ("ms_deform_attn_backward", "fused_ms_deform_attn_backward"):
    torch.library.register_autograd(f"visionkernels::{_name}", _no_double_backward, lib=_library)
