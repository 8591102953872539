"""The operators written in PyTorch's own, as other runtimes know them.

Deformable attention is GridSample, a product and a sum a level; an operator of the ViT is what it is on the CPU. What
is exported is what the kernels compute: coordinates and sums in float32 whatever the dtype of the value, and a
location that is not finite adds 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.errors import UserError
from visionkernels.export import _older_opsets
from visionkernels.ops import _inference
from visionkernels.ops.deformable_attention import registration


def lowered(opset: int | None = None) -> dict[Any, Callable[..., Any]]:
    """Every operator of this package that an exported program can hold, and its form in standard operators.

    Args:
        opset: of ONNX, whose functions of a later one are written out; None for no ONNX.
    """
    return {
        **of_attention(ms_deform_attn, fused_ms_deform_attn),
        **{operator: _without_backend(form) for operator, form in _inference.PYTORCH_FORMS.items()},
        **({} if opset is None else _older_opsets.written_out(opset)),
    }


def of_attention(plain: Callable[..., Any], fused: Callable[..., Any]) -> dict[Any, Callable[..., Any]]:
    """The operators of deformable attention, and which of two forms each has."""
    return {
        registration.FORWARD: plain,
        registration.FORWARD_NO_GRAD: plain,
        registration.FUSED_FORWARD: fused,
        registration.FUSED_FORWARD_NO_GRAD: fused,
    }


def _without_backend(form: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments: form(*arguments[:-1])


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_sizes: Sequence[int] | None,
    points: Tensor,
    weights: Tensor,
    num_points: Sequence[int],
    padding_mode: str,
    align_corners: bool,
    method: str,
) -> Tensor:
    """The plain operator; arguments and result are those of its schema."""
    shapes = level_shapes(spatial_shapes, level_sizes)
    points, weights = packed(points, weights)
    batch, _, num_heads, head_dim = value.shape
    num_queries = points.shape[1]
    dtype = wide_dtype(value, points, weights)
    points, weights = points.to(dtype), weights.to(dtype)
    starts = list(accumulate((h * w for h, w in shapes), initial=0))
    parts = zip(shapes, starts, points.split(list(num_points), 3), weights.split(list(num_points), 3), strict=False)
    output = None
    for (h, w), start, point, weight in parts:
        if point.shape[3] == 0 or (isinstance(h, int) and isinstance(w, int) and h * w == 0):
            continue
        level = value[:, start : start + h * w].to(dtype)
        finite, point = _finite(point, h, w)
        weight = weight.where(finite, weight.new_zeros(())).transpose(1, 2)  # [N, M, Lq, P]
        if method == "nearest":
            sampled = _nearest(level, h, w, point)
        else:
            image = _fold_heads(level).transpose(1, 2).unflatten(2, (h, w))  # [N * M, D, h, w]
            grid = 2 * _fold_heads(point.clamp(-2, 3)) - 1  # [N * M, Lq, P, 2]
            sampled = F.grid_sample(image, grid, "bilinear", padding_mode, align_corners)  # [N * M, D, Lq, P]
        term = (sampled.unflatten(0, (batch, num_heads)) * weight[:, :, None]).sum(-1)  # [N, M, D, Lq]
        output = term if output is None else output + term
    if output is None:
        return value.new_zeros(batch, num_queries, num_heads * head_dim)
    return output.permute(0, 3, 1, 2).contiguous().flatten(2).to(value.dtype)


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor | None,
    level_sizes: Sequence[int] | None,
    points: Tensor,
    weights: Tensor,
    reference_points: Tensor,
    value_mask: Tensor | None,
    num_points: Sequence[int],
    padding_mode: str,
    align_corners: bool,
) -> Tensor:
    """The fused operator; arguments and result are those of its schema."""
    value, locations, weights = unfuse(
        value, level_shapes(spatial_shapes, level_sizes), points, weights, reference_points, value_mask, num_points
    )
    return ms_deform_attn(
        value, spatial_shapes, level_sizes, locations, weights, num_points, padding_mode, align_corners, "bilinear"
    )


def unfuse(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    offsets: Tensor,
    logits: Tensor,
    references: Tensor,
    value_mask: Tensor | None,
    num_points: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, locations ``[N, Lq, M, K, 2]`` and attention weights ``[N, Lq, M, K]``, in float32 unless in float64."""
    offsets, logits = packed(offsets, logits)
    dtype = wide_dtype(value, offsets, logits, references)
    offsets, references, weights = offsets.to(dtype), references.to(dtype), logits.to(dtype).softmax(-1)
    locations = []
    for level, ((h, w), offset) in enumerate(zip(shapes, offsets.split(list(num_points), 3), strict=True)):
        reference = references[:, :, level if references.shape[2] > 1 else 0, None, None]  # [N, Lq, 1, 1, 2 or 4]
        if reference.shape[-1] == 2:
            size = torch.stack([torch.full((), w, dtype=dtype), torch.full((), h, dtype=dtype)]).to(value.device)
            locations.append(reference + offset / size)
        else:
            half = 0.5 / max(num_points[level], 1)
            locations.append(reference[..., :2] + offset * reference[..., 2:] * half)
    if value_mask is not None:
        value = value.masked_fill(~value_mask[:, :, None, None], 0)
    return value, torch.cat(locations, 3), weights


def level_shapes(spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None) -> list[tuple[int, int]]:
    """(h, w) of each level, integers or symbols.

    Raises:
        UserError: the shapes are a tensor.
    """
    if level_sizes is None:
        raise UserError(
            "model: it passes spatial_shapes as a tensor, whose values are not known when a graph is made; "
            "pass a list of (h, w) pairs, which may come from the shapes of the feature maps"
        )
    return list(zip(level_sizes[::2], level_sizes[1::2], strict=True))


def packed(points: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[N, Lq, M, K, 2]`` and weights ``[N, Lq, M, K]``."""
    return (points.flatten(3, 4), weights.flatten(3, 4)) if points.dim() == 6 else (points, weights)


def wide_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of coordinates and sums."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _finite(point: Tensor, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Which locations have a finite pixel coordinate, and the locations, 0 where it is not."""
    largest = torch.finfo(point.dtype).max
    x, y = point.unbind(-1)
    finite = ((x * w).abs() <= largest) & ((y * h).abs() <= largest)  # false for NaN as well
    return finite, point.where(finite[..., None], point.new_zeros(()))


def _fold_heads(tensor: Tensor) -> Tensor:
    """``[N, L, M, ...]`` as ``[N * M, L, ...]``.

    The two axes are folded where they are innermost: PyTorch compares the strides of axes that it folds, and elsewhere
    these hold the length, which may be open.
    """
    inner = tensor.movedim((0, 2), (-2, -1)).contiguous()
    return inner.flatten(-2).movedim(-1, 0)


def _nearest(level: Tensor, h: int, w: int, point: Tensor) -> Tensor:
    """The pixel of each location, ``[N * M, D, Lq, P]``: GridSample rounds half to even, the operator half up."""
    batch, _, num_heads, head_dim = level.shape
    num_queries, points = point.shape[1], point.shape[3]
    x, y = _fold_heads(point).unbind(-1)  # [N * M, Lq, P]
    column = (x * w + 0.5).clamp(min=0).minimum(torch.full((), w - 1, dtype=x.dtype, device=x.device)).long()
    row = (y * h + 0.5).clamp(min=0).minimum(torch.full((), h - 1, dtype=x.dtype, device=x.device)).long()
    index = (row * w + column).reshape(batch * num_heads, 1, num_queries * points)
    image = _fold_heads(level).transpose(1, 2)  # [N * M, D, h * w]
    return image.gather(2, index.expand(-1, head_dim, -1)).unflatten(2, (num_queries, points))
