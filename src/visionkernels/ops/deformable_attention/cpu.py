"""Multi-scale deformable attention on the CPU: the bodies of the registered ops.

Inputs are validated by the caller, and nothing here is recorded by autograd. There are two implementations, with the
same results. Where Numba is installed (``pip install 'visionkernels[cpu]'``) ``cpu_compiled`` runs loops that it
compiles, ``cpu_loops``. Where it is not, PyTorch's own operators do the work, several times slower: ``cpu_samples``
finds what to read and how to weigh it, ``cpu_passes`` reads it.

Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from types import ModuleType

from torch import Tensor

from visionkernels.ops.deformable_attention.cpu_passes import attend, differentiate
from visionkernels.ops.deformable_attention.cpu_samples import FusedPoints, Mode, Points, Shapes

PROCESS = os.getpid()  # that imported this package; ``cpu_threads`` recognises a fork of it by another number


@cache
def _compiled() -> ModuleType | None:
    """``cpu_compiled``, or None where Numba is not installed; imported at the first call, which takes a second."""
    if importlib.util.find_spec("numba") is None:
        return None
    from visionkernels.ops.deformable_attention import cpu_compiled

    return cpu_compiled


def forward(
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    *,
    padding_mode: str,
    align_corners: bool,
    method: str,
) -> Tensor:
    """Compute multi-scale deformable attention.

    Args:
        value: ``[N, S, M, D]``, float64, float32, float16 or bfloat16.
        spatial_shapes: (h, w) of each level.
        sampling_locations: ``[N, Lq, M, K, 2]``, (x, y) in units of the level; ``K = sum(num_points)``. One
            that is NaN or infinite contributes 0.
        attention_weights: ``[N, Lq, M, K]``.
        num_points: points of each level.
        padding_mode: ``"zeros"`` or ``"border"``, as in ``grid_sample``.
        align_corners: as in ``grid_sample``.
        method: ``"bilinear"`` or ``"nearest"``.

    Returns:
        ``[N, Lq, M * D]`` in the dtype of ``value``; computed in float32, in float64 where an input is.

    Example:
        >>> import torch
        >>> value, weights = torch.ones(1, 6, 1, 2), torch.ones(1, 1, 1, 1)
        >>> mode = dict(padding_mode="zeros", align_corners=False, method="bilinear")
        >>> forward(value, [(2, 3)], torch.full((1, 1, 1, 1, 2), 0.5), weights, (1,), **mode)
        tensor([[[1., 1.]]])
    """
    mode = Mode(padding_mode, align_corners, method)
    if (compiled := _compiled()) is not None:
        return compiled.attend(
            compiled.Inputs(value, sampling_locations, attention_weights, None, spatial_shapes, tuple(num_points), mode)
        )
    points = Points(sampling_locations, attention_weights, num_points, value.dtype)
    return attend(value, spatial_shapes, points, mode)


def backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Shapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int],
    *,
    padding_mode: str,
    align_corners: bool,
    method: str,
    needs_value: bool = True,
    needs_points: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of ``forward``, whose arguments these are, from ``grad_output`` [N, Lq, M * D].

    Returns:
        Gradients of value, locations and weights in their shapes and dtypes; None where not needed.
    """
    mode = Mode(padding_mode, align_corners, method)
    if (compiled := _compiled()) is not None:
        inputs = compiled.Inputs(
            value, sampling_locations, attention_weights, None, spatial_shapes, tuple(num_points), mode
        )
        grad_value, *others, _ = compiled.differentiate(grad_output, inputs, needs_value, needs_points)
        return grad_value, *_cast(others, sampling_locations, attention_weights)
    points = Points(sampling_locations, attention_weights, num_points, value.dtype)
    grad_value = differentiate(grad_output, value, spatial_shapes, points, mode, needs_value, needs_points)
    return grad_value, *(points.gradients if needs_points else (None, None))


def fused_forward(
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    value_mask: Tensor | None,
    num_points: Sequence[int],
    *,
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    """Compute ``forward`` from references, offsets and logits.

    Args:
        value: ``[N, S, M, D]``.
        spatial_shapes: (h, w) of each level.
        reference_points: ``[N, Lq, L or 1, 2 or 4]``, (x, y) or (cx, cy, w, h). The location of a point is
            ``ref_xy + offset / (w, h)`` of the level, or ``ref_xy + offset / num_points * ref_wh * 0.5``.
        sampling_offsets: ``[N, Lq, M, K, 2]``.
        attention_logits: ``[N, Lq, M, K]``; the weights are their softmax over K.
        value_mask: ``[N, S]`` bool, or None; a pixel with False counts as 0.
        num_points: points of each level.
        padding_mode: ``"zeros"`` or ``"border"``.
        align_corners: as in ``grid_sample``.

    Returns:
        ``[N, Lq, M * D]`` in the dtype of ``value``.
    """
    mode = Mode(padding_mode, align_corners, "bilinear")
    masked = _masked(value, value_mask)
    if (compiled := _compiled()) is not None:
        weights = compiled.attention(attention_logits, value, reference_points, sampling_offsets)
        return compiled.attend(
            compiled.Inputs(
                masked, sampling_offsets, weights, reference_points, spatial_shapes, tuple(num_points), mode
            )
        )
    points = FusedPoints(reference_points, sampling_offsets, attention_logits, spatial_shapes, num_points, value.dtype)
    return attend(masked, spatial_shapes, points, mode)


def fused_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Shapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    value_mask: Tensor | None,
    num_points: Sequence[int],
    *,
    padding_mode: str,
    align_corners: bool,
    needs_value: bool = True,
    needs_reference: bool = True,
    needs_points: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of ``fused_forward``, whose arguments these are, from ``grad_output``.

    Returns:
        Gradients of value, references, offsets and logits in their shapes and dtypes; None where not needed.
    """
    mode = Mode(padding_mode, align_corners, "bilinear")
    masked, needs_either = _masked(value, value_mask), needs_reference or needs_points
    if (compiled := _compiled()) is not None:
        weights = compiled.attention(attention_logits, value, reference_points, sampling_offsets)
        inputs = masked, sampling_offsets, weights, reference_points, spatial_shapes, tuple(num_points), mode
        needs = needs_value, needs_either, needs_reference
        grad_value, *points, reference = compiled.differentiate(grad_output, compiled.Inputs(*inputs), *needs)
    else:
        given = FusedPoints(
            reference_points, sampling_offsets, attention_logits, spatial_shapes, num_points, value.dtype
        )
        grad_value = differentiate(grad_output, masked, spatial_shapes, given, mode, needs_value, needs_either)
        reference, *points = given.gradients if needs_either else (None, None, None)
    if grad_value is not None:
        grad_value = _masked(grad_value, value_mask)
    (reference,) = _cast([reference if needs_reference else None], reference_points)
    return grad_value, reference, *_cast(points if needs_points else (None, None), sampling_offsets, attention_logits)


def _cast(gradients: Sequence[Tensor | None], *tensors: Tensor) -> list[Tensor | None]:
    """The gradients in the dtypes of their tensors."""
    return [None if g is None else g.to(t.dtype) for g, t in zip(gradients, tensors, strict=True)]


def _masked(value: Tensor, mask: Tensor | None) -> Tensor:
    return value if mask is None or bool(mask.all()) else value.masked_fill(~mask[:, :, None, None], 0)
