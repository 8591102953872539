"""Multi-scale deformable attention in plain PyTorch: the ground truth, differentiable any number of times.

    out[n, q, m] = sum over levels l and points p of  weight[n, q, m, l, p] * bilinear(value[n, level l, m], location)

Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3; the sampling is that of
``torch.nn.functional.grid_sample``. Nothing here is fast: every corner is gathered and kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LevelShapes = Sequence[tuple[int, int]]


def reference_ms_deform_attn(
    value: Tensor,
    spatial_shapes: LevelShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points: Sequence[int] | None = None,
    *,
    padding_mode: str = "zeros",
    align_corners: bool = False,
    method: str = "bilinear",
) -> Tensor:
    """Compute multi-scale deformable attention with gathers, level by level.

    Args:
        value: ``[N, S, M, D]``, the flattened feature pyramid, levels one after another, row-major.
        spatial_shapes: (h, w) of each level; ``S = sum(h * w)``.
        sampling_locations: ``[N, Lq, M, L, P, 2]`` or packed ``[N, Lq, M, sum(num_points), 2]``, (x, y) in units of
            the level's size. Any float is legal; a location whose pixel coordinate is not finite contributes 0.
        attention_weights: the same shape without the last axis.
        num_points: points of each level, for packed locations; otherwise taken from the shape.
        padding_mode: ``"zeros"`` or ``"border"``, as in ``grid_sample``.
        align_corners: as in ``grid_sample``.
        method: ``"bilinear"``, or ``"nearest"`` for RT-DETRv2's discrete sampling.

    Returns:
        ``[N, Lq, M * D]`` in the dtype of ``value``; sums are taken in float32, in float64 where an input is float64.

    Example:
        >>> value, weights = torch.ones(1, 6, 1, 2), torch.ones(1, 1, 1, 1, 1)
        >>> reference_ms_deform_attn(value, [(2, 3)], torch.full((1, 1, 1, 1, 1, 2), 0.5), weights)
        tensor([[[1., 1.]]])
    """
    if num_points is None:
        num_points = [sampling_locations.shape[4]] * len(spatial_shapes)
    batch, num_queries, num_heads = sampling_locations.shape[:3]
    inputs = (value.dtype, sampling_locations.dtype, attention_weights.dtype)
    dtype = torch.float64 if torch.float64 in inputs else torch.float32
    packed = batch, num_queries, num_heads, sum(num_points)
    locations = sampling_locations.reshape(*packed, 2).to(dtype)
    weights = attention_weights.reshape(packed).to(dtype)
    levels = value.to(dtype).split([h * w for h, w in spatial_shapes], dim=1)
    output = value.new_zeros(batch, num_queries, num_heads, value.shape[3], dtype=dtype)
    points = zip(locations.split(list(num_points), 3), weights.split(list(num_points), 3), strict=True)
    for level, (h, w), (location, weight) in zip(levels, spatial_shapes, points, strict=True):
        if h * w == 0:
            continue
        size = location.new_tensor([w, h])
        if method == "nearest":
            output = output + _sample_nearest(level, h, w, location * size, weight)
        else:
            pixel = location * (size - 1) if align_corners else location * size - 0.5
            output = output + _sample_bilinear(level, h, w, pixel, weight, padding_mode == "border")
    return output.flatten(2).to(value.dtype)


def reference_fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: LevelShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    num_points: Sequence[int] | None = None,
    *,
    value_mask: Tensor | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """Softmax, sampling locations and mask as Deformable-DETR's module computes them, then the attention.

    Args:
        value: ``[N, S, M, D]``.
        spatial_shapes: (h, w) of each level.
        reference_points: ``[N, Lq, L or 1, 2 or 4]`` or ``[N, Lq, 2 or 4]``; (x, y) or (cx, cy, w, h) in [0, 1].
        sampling_offsets: ``[N, Lq, M, L, P, 2]`` or packed ``[N, Lq, M, sum(num_points), 2]``; (x, y) in pixels of
            the level, or in fractions of the reference box.
        attention_logits: the same shape without the last axis.
        num_points: points of each level, for packed offsets.
        value_mask: ``[N, S]`` bool, True where a pixel counts.
        padding_mode: ``"zeros"`` or ``"border"``.
        align_corners: as in ``grid_sample``.

    Returns:
        ``[N, Lq, M * D]`` in the dtype of ``value``.

    Source: ``MSDeformAttn.forward`` of Deformable-DETR.
    """
    num_levels = len(spatial_shapes)
    if num_points is None:
        num_points = [sampling_offsets.shape[4]] * num_levels
    batch, num_queries, num_heads = sampling_offsets.shape[:3]
    inputs = (value, reference_points, sampling_offsets, attention_logits)
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in inputs) else torch.float32
    packed = batch, num_queries, num_heads, sum(num_points)
    offsets = sampling_offsets.reshape(*packed, 2).to(dtype)
    weights = attention_logits.reshape(packed).to(dtype).softmax(-1)
    references = reference_points.to(dtype)
    if references.dim() == 3:
        references = references[:, :, None]
    references = references.expand(-1, -1, num_levels, -1)
    repeats = torch.tensor(list(num_points), device=value.device)
    references = references.repeat_interleave(repeats, 2)[:, :, None]  # [N, Lq, 1, K, 2 or 4]
    sizes = offsets.new_tensor([(max(w, 1), max(h, 1)) for h, w in spatial_shapes]).repeat_interleave(repeats, 0)
    points = repeats.repeat_interleave(repeats)[:, None]

    def locate(references: Tensor, offsets: Tensor) -> Tensor:
        if references.shape[-1] == 2:
            return references + offsets / sizes
        return references[..., :2] + offsets / points * references[..., 2:] * 0.5

    # Where a location is not finite its terms are replaced first: in the backward, 0 * NaN would reach the references.
    finite = locate(references, offsets).detach().isfinite().all(-1, keepdim=True)
    locations = locate(references.where(finite, sizes.new_zeros(())), offsets.where(finite, sizes.new_zeros(())))
    locations = locations.where(finite, sizes.new_full((), torch.nan))
    if value_mask is not None:
        value = value.masked_fill(~value_mask[:, :, None, None], 0)
    return reference_ms_deform_attn(
        value.to(dtype), spatial_shapes, locations, weights, num_points,
        padding_mode=padding_mode, align_corners=align_corners,
    ).to(value.dtype)  # fmt: skip


def _sample_bilinear(level: Tensor, h: int, w: int, pixel: Tensor, weight: Tensor, border: bool) -> Tensor:
    """Weighted bilinear samples of one level ``[N, h*w, M, D]`` at ``pixel`` ``[N, Lq, M, P, 2]``, summed over P."""
    x, y = pixel.unbind(-1)
    if border:
        counts = x.isfinite() & y.isfinite()
        x, y = _clip(x, w - 1), _clip(y, h - 1)
    else:
        counts = (x >= -1) & (x < w) & (y >= -1) & (y < h)
    # A coordinate that does not count is replaced before it can meet arithmetic: NaN * 0 is NaN.
    x, y = x.where(counts, x.new_zeros(())), y.where(counts, y.new_zeros(()))
    x0, y0 = x.detach().floor(), y.detach().floor()
    weight_x, weight_y = (1 - (x - x0), x - x0), (1 - (y - y0), y - y0)
    output = level.new_zeros(())
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = x0.long() + dx, y0.long() + dy
            inside = counts & (column >= 0) & (column < w) & (row >= 0) & (row < h)
            factor = (weight * weight_x[dx] * weight_y[dy]).where(inside, x.new_zeros(()))
            index = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
            output = output + _weighted_sum(level, index, factor, inside)
    return output


def _sample_nearest(level: Tensor, h: int, w: int, scaled: Tensor, weight: Tensor) -> Tensor:
    """Weighted nearest samples at ``scaled`` = location * size; the index carries no gradient."""
    counts = scaled.isfinite().all(-1)
    scaled = scaled.detach().where(counts[..., None], scaled.new_zeros(()))
    column = (scaled[..., 0] + 0.5).clamp(0, w - 1).long()
    row = (scaled[..., 1] + 0.5).clamp(0, h - 1).long()
    return _weighted_sum(level, row * w + column, weight.where(counts, weight.new_zeros(())), counts)


def _clip(x: Tensor, last: int) -> Tensor:
    """Clamp to [0, last]; as in ``grid_sample`` the gradient is 0 at both ends, the ends included."""
    x = x.where(x > 0, x.new_zeros(()))
    return x.where(x < last, x.new_full((), last))


def _weighted_sum(level: Tensor, index: Tensor, factor: Tensor, inside: Tensor) -> Tensor:
    """Sum over points of ``factor`` times the pixels at ``index``, both ``[N, Lq, M, P]``."""
    batch, num_queries, num_heads, points = index.shape
    flat = index.permute(0, 1, 3, 2).reshape(batch, num_queries * points, num_heads, 1)
    pixels = level.gather(1, flat.expand(-1, -1, -1, level.shape[3]))
    pixels = pixels.view(batch, num_queries, points, num_heads, level.shape[3]).transpose(2, 3)
    pixels = pixels.where(inside[..., None], pixels.new_zeros(()))
    return (factor[..., None] * pixels).sum(3)
