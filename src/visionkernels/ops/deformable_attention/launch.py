"""The operator on CUDA: its buffers and its launches, worked out on the host without reading device memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from visionkernels.ops._common import on_device
from visionkernels.ops.deformable_attention import binned
from visionkernels.ops.deformable_attention.plan import (
    Needs,
    has_points_kernel,
    has_warp_instructions,
    inputs_of,
    plan_of,
    run,
    shapes_argument,
)
from visionkernels.ops.deformable_attention.problem import Problem

CACHE_BYTES = 40 * 2**20  # of an L2 cache of 50 MB, an H200's

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # as ``backward`` returns them


def forward(problem: Problem) -> Tensor:
    """Launch the forward kernel. Returns ``[N, Lq, M * D]`` in the value's dtype."""
    value, points = problem.value, problem.points
    output = value.new_empty(points.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    if output.numel() == 0:
        return output
    if sum(problem.num_points) == 0:
        return output.zero_()
    run(problem, (output,), None)
    return output


def backward(
    problem: Problem,
    grad_output: Tensor,
    needs_value: bool,
    needs_points: bool,
    needs_reference: bool,
) -> Gradients:
    """Launch the backward kernels.

    Args:
        problem: the forward's inputs.
        grad_output: ``[N, Lq, M * D]``, any strides.
        needs_value: compute the value's gradient.
        needs_points: compute the gradients of points and weights.
        needs_reference: compute the reference points' gradient; implies the work of ``needs_points``.

    Returns:
        The gradients of value, points, weights and reference points, contiguous and in their tensors' dtypes; None
        for those that are not needed.
    """
    needs = Needs(needs_value, needs_points or needs_reference, needs_reference)
    if grad_output.numel() == 0 or sum(problem.num_points) == 0:
        points, weights = _new(problem.points, needs.points), _new(problem.weights, needs.points)
        return _new(problem.value, needs.value), points, weights, _new(problem.reference_points, needs.reference)
    grad_output = grad_output.contiguous()
    deterministic = torch.are_deterministic_algorithms_enabled()
    binned_value = needs.value and is_binned(problem, deterministic)
    if needs.value and deterministic and not binned_value and problem.value.numel():
        _alert_not_deterministic()
    if needs.value and needs.points and not (binned_value or has_points_kernel(problem, grad_output, needs)):
        return _launch_backward(problem, grad_output, needs)
    grad_value = None
    if binned_value:  # before the others are allocated: the memory that it takes meanwhile is free for them again
        grad_value = binned.grad_value(problem, grad_output, deterministic)
    elif needs.value:
        grad_value = _atomic_grad_value(problem, grad_output)
    if not needs.points:
        return grad_value, None, None, None
    return grad_value, *_launch_backward(problem, grad_output, needs._replace(value=False))[1:]


def _new(tensor: Tensor | None, needed: bool, allocate: Callable[..., Tensor] = torch.zeros) -> Tensor | None:
    """A contiguous gradient of ``tensor``, if it is needed."""
    if tensor is None or not needed:
        return None
    return allocate(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def is_binned(problem: Problem, deterministic: bool) -> bool:
    """Whether the value's gradient is: where samples outnumber pixels, or where its sums must have an order."""
    possible = has_warp_instructions(problem.value.device) and binned.possible(problem)
    return possible and (deterministic or binned.pays(problem))


def _launch_backward(problem: Problem, grad_output: Tensor, needs: Needs) -> Gradients:
    """The gradients in one launch."""
    value, points, references = problem.value, problem.points, problem.reference_points
    dtype, device = _accumulator(problem), value.device
    # The kernel has no reason to write the locations' gradient of nearest sampling: it is zero.
    grad_points = _new(points, needs.points, torch.zeros if problem.method == "nearest" else torch.empty)
    grad_weights = _new(problem.weights, needs.points, torch.empty)
    grad_value = torch.zeros(value.shape, dtype=dtype, device=device) if needs.value else None
    grad_references = output = None
    if needs.reference and references is not None:  # a part for each head: atomics would add in no order
        grad_references = torch.empty((*points.shape[:3], *references.shape[2:]), dtype=dtype, device=device)
    if references is not None and needs.points and not has_points_kernel(problem, grad_output, needs):
        # This kernel finds the softmax's gradient with it. To keep the one of the forward would cost its memory.
        output = forward(problem)
    run(problem, (grad_value, grad_points, grad_weights, grad_references, grad_output, output), needs)
    if grad_value is not None:
        grad_value = grad_value.to(value.dtype)
    if grad_references is not None and references is not None:
        grad_references = grad_references.sum(2).to(references.dtype)
    return grad_value, grad_points, grad_weights, grad_references


def _atomic_grad_value(problem: Problem, grad_output: Tensor) -> Tensor:
    """The value's gradient alone, as many images at a time as the sums of which stay in the L2 cache."""
    value, dtype = problem.value, _accumulator(problem)
    gradient = torch.empty(value.shape, dtype=value.dtype, device=value.device)
    images = max(1, CACHE_BYTES // max(1, value[0].numel() * dtype.itemsize))
    for first in range(0, value.shape[0], images):
        part = slice(first, first + images)
        sums = gradient[part].zero_() if value.dtype == dtype else torch.zeros_like(gradient[part], dtype=dtype)
        run(problem.images(part), (sums, None, None, None, grad_output[part], None), Needs(True, False, False))
        if value.dtype != dtype:
            gradient[part] = sums
    return gradient


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
    inputs = inputs_of(problem)
    plan = plan_of(problem, inputs, (), None)
    originals = (problem.value, problem.points, problem.weights, problem.reference_points)
    copied = any(a is not b for a, b in zip(inputs[:4], originals, strict=True))
    if copied or problem.value_mask is not None or plan.runner is None:
        return None
    device, runner, arguments = value.device, plan.runner, plan.arguments
    sizes = None if inputs.shapes is not None else shapes_argument(problem)

    def launch(
        value: Tensor, points: Tensor, weights: Tensor, references: Tensor | None, mask: None, shapes: Any
    ) -> Tensor:
        output = value.new_empty(output_shape)
        with on_device(device):
            runner(output, value, sizes or shapes, points, weights, references, mask, *arguments)
        return output

    return launch


def _accumulator(problem: Problem) -> torch.dtype:
    """The dtype of coordinates, sums and summed gradients: float64 where an input is, else float32."""
    tensors = (problem.value, problem.points, problem.weights, problem.reference_points)
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def _alert_not_deterministic() -> None:
    """What PyTorch's own operators do under ``torch.use_deterministic_algorithms``."""
    message = (
        "the backward of ms_deform_attn on CUDA has no deterministic implementation for float64, nearest sampling, "
        "heads of more than 128 channels, queries of more than 64 samples, images of more than 2**31 numbers, or GPUs "
        "that are not NVIDIA's of compute capability 8.0 on; call torch.use_deterministic_algorithms(False), or pass "
        "warn_only=True"
    )
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        raise RuntimeError(message)
    warnings.warn(message, stacklevel=2)
