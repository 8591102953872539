"""How each implementation is called: from a case and its geometry to a function of value, points and weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.bench.cases import Case, Geometry


def ours(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """This package's operator."""
    from visionkernels.ops.deformable_attention.op import ms_deform_attn

    shapes, start, ragged = geometry.spatial_shapes, geometry.level_start_index, case.points if case.ragged else None
    return lambda value, points, weights: ms_deform_attn(value, shapes, start, points, weights, num_points=ragged)


def ours_fused(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """This package's operator with softmax and locations; ``points`` are offsets, ``weights`` logits."""
    from visionkernels.ops.deformable_attention.op import fused_ms_deform_attn

    shapes, references, ragged = (
        geometry.spatial_shapes,
        geometry.reference_points,
        case.points if case.ragged else None,
    )
    return lambda value, points, weights: fused_ms_deform_attn(
        value, shapes, references, points, weights, num_points=ragged
    )


def grid_sample_attention(
    value: Tensor,
    levels: tuple[tuple[int, int], ...],
    num_points: tuple[int, ...],
    locations: Tensor,
    weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention with one ``grid_sample`` a level, as models run it without a kernel.

    Args:
        value: ``[N, S, M, D]``.
        levels: (h, w) of each level.
        num_points: Points of each level.
        locations: ``[N, Lq, M, sum(num_points), 2]`` in the dtype of ``value``, as ``grid_sample`` asks.
        weights: ``[N, Lq, M, sum(num_points)]``.

    Returns:
        ``[N, Lq, M * D]``.

    Source: the approach of ``ms_deform_attn_core_pytorch`` in Deformable-DETR.
    """
    batch, _, heads, head_dim = value.shape
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1).split(num_points, 2)  # [N*M, Lq, P, 2] each
    maps = value.split([h * w for h, w in levels], 1)
    samples = []
    for (h, w), level, grid in zip(levels, maps, grids, strict=True):
        image = level.flatten(2).transpose(1, 2).reshape(batch * heads, head_dim, h, w)
        samples.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)  # [N*M, 1, Lq, sum P]
    output = (torch.cat(samples, -1) * weights).sum(-1)  # [N*M, D, Lq]
    return output.view(batch, heads * head_dim, -1).transpose(1, 2).contiguous()


def grid_sample(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """PyTorch without a kernel."""
    levels, num_points, ragged = case.levels, case.points, case.ragged

    def attention(value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        if not ragged:
            points, weights = points.flatten(3, 4), weights.flatten(3, 4)
        return grid_sample_attention(value, levels, num_points, points, weights)

    return attention


def transformers(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """What transformers runs: the module of Deformable DETR, for ragged points the function of RT-DETRv2 and D-FINE."""
    models, levels, start = "transformers.models", list(case.levels), geometry.level_start_index
    if case.ragged:
        function = importlib.import_module(f"{models}.rt_detr_v2.modeling_rt_detr_v2")
        attention = function.multi_scale_deformable_attention_v2
        num_points = list(case.points)
        return lambda value, points, weights: attention(value, levels, points, weights, num_points)
    modeling = importlib.import_module(f"{models}.deformable_detr.modeling_deformable_detr")
    module, shapes = modeling.MultiScaleDeformableAttention(), geometry.spatial_shapes
    return lambda value, points, weights: module(value, shapes, levels, start, points, weights, 64)


def deformable_detr(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """The CUDA extension of Deformable-DETR, which brings a forward and a backward; autograd is its user's."""
    extension = importlib.import_module("MultiScaleDeformableAttention")
    shapes, start, step = geometry.spatial_shapes, geometry.level_start_index, min(case.batch, 64)

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
            ctx.save_for_backward(value, points, weights)
            return extension.ms_deform_attn_forward(value, shapes, start, points, weights, step)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            value, points, weights = ctx.saved_tensors
            gradient = gradients[0].contiguous()
            return tuple(extension.ms_deform_attn_backward(value, shapes, start, points, weights, gradient, step))

    return Function.apply


def msda_triton(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """The kernel of msda-triton: its public function would answer every exception with grid_sample."""
    attention = importlib.import_module("msda_triton.frontend").triton_multiscale_deformable_attention
    shapes = geometry.spatial_shapes
    return lambda value, points, weights: attention(value, shapes, points, weights, "zeros", False).flatten(2)


def mmcv(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """The operator of mmcv, which casts locations and weights to the dtype of value.

    Source: ``MultiScaleDeformableAttnFunction`` in ``mmcv/ops/multi_scale_deform_attn.py``.
    """
    function = importlib.import_module("mmcv.ops.multi_scale_deform_attn").MultiScaleDeformableAttnFunction
    shapes, start, step = geometry.spatial_shapes, geometry.level_start_index, min(case.batch, 64)
    return lambda value, points, weights: function.apply(value, shapes, start, points, weights, step)


def dcnv4(case: Case, geometry: Geometry) -> Callable[..., Tensor]:
    """FlashDeformAttn of DCNv4, of value and one tensor of locations and logits.

    Source: ``FlashDeformAttnFunction`` in ``DCNv4_op/DCNv4/functions/flash_deform_attn_func.py``.
    """
    function = importlib.import_module("DCNv4.functions").FlashDeformAttnFunction
    shapes, start = geometry.spatial_shapes, geometry.level_start_index
    points = case.points[0]
    return lambda value, packed: function.apply(value, shapes, start, packed, min(case.batch, 64), points)
