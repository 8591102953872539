"""Multi-scale deformable attention with its projections, under the two upstream names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels.ops.deformable_attention.checks import SpatialShapes, check_options
from visionkernels.ops.deformable_attention.op import fused_ms_deform_attn


def initialise(attention: Any, num_heads: int, num_levels: int, num_points: int) -> None:
    """Deformable-DETR's initial parameters, which its descendants share.

    Head m looks in direction 2 pi m / M, point p at p + 1 pixels along it; all weights are equal.

    Args:
        attention: a module with the four projections ``sampling_offsets``, ``attention_weights``, ``value_proj`` and
            ``output_proj``.
        num_heads: attention heads.
        num_levels: feature levels.
        num_points: sampling points of a head on a level.
    """
    angles = torch.arange(num_heads, dtype=torch.float32) * (2.0 * math.pi / num_heads)
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, num_points + 1, dtype=torch.float32)
    bias = directions[:, None, None, :] * steps[:, None]  # [M, 1, P, 2]
    with torch.no_grad():
        attention.sampling_offsets.bias.copy_(bias.expand(-1, num_levels, -1, -1).flatten())
    nn.init.zeros_(attention.sampling_offsets.weight)
    nn.init.zeros_(attention.attention_weights.weight)
    nn.init.zeros_(attention.attention_weights.bias)
    for projection in (attention.value_proj, attention.output_proj):
        nn.init.xavier_uniform_(projection.weight)
        nn.init.zeros_(projection.bias)


class MSDeformAttn(nn.Module):
    """Deformable-DETR's multi-scale deformable attention, on the fused operator.

    Parameters, initialisation, state-dict names and the sense of the mask are upstream's, so the attention weights of
    a Deformable-DETR checkpoint load with ``strict=True``.

    Args:
        d_model: channels of query, input and output.
        n_levels: feature levels.
        n_heads: attention heads; must divide ``d_model``.
        n_points: sampling points of a head on a level.

    Raises:
        ValueError: ``d_model`` is not divisible by ``n_heads``.

    Source: ``models/ops/modules/ms_deform_attn.py`` of Deformable-DETR.

    Example:
        >>> attention = MSDeformAttn(d_model=32, n_levels=1, n_heads=4, n_points=2)
        >>> query, pixels = torch.randn(1, 5, 32), torch.randn(1, 6, 32)
        >>> attention(query, torch.rand(1, 5, 1, 2), pixels, [(2, 3)]).shape
        torch.Size([1, 5, 32])
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8, n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads != 0:
            raise ValueError(f"d_model must be divisible by n_heads, got d_model={d_model} and n_heads={n_heads}")
        self.d_model = d_model
        self.n_levels = n_levels
        self.n_heads = n_heads
        self.n_points = n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self._reset_parameters()

    def _reset_parameters(self) -> None:
        """Upstream's name of it: models built around the module call it."""
        initialise(self, self.n_heads, self.n_levels, self.n_points)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        input_flatten: Tensor,
        input_spatial_shapes: SpatialShapes,
        input_level_start_index: Tensor | None = None,
        input_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``query`` to the feature pyramid.

        Args:
            query: ``[N, Lq, d_model]``.
            reference_points: ``[N, Lq, n_levels, 2]`` (x, y) or ``[N, Lq, n_levels, 4]`` (cx, cy, w, h), 0 to 1 across
                the padded image; a level axis of 1 serves all levels.
            input_flatten: ``[N, S, d_model]``, the levels one after another, row-major.
            input_spatial_shapes: (h, w) of each level, an integer tensor ``[n_levels, 2]`` or a list of pairs.
            input_level_start_index: accepted for compatibility; it follows from the shapes.
            input_padding_mask: bool ``[N, S]``, **True = padding**; padded pixels are read as 0.

        Returns:
            ``[N, Lq, d_model]``.

        Raises:
            ValueError: the last axis of ``reference_points`` is neither 2 nor 4, or shapes do not fit together.
            TypeError: ``input_padding_mask`` is not bool.
        """
        if query.dim() != 3:
            raise ValueError(f"query must be [N, Lq, d_model], got {list(query.shape)}")
        if input_flatten.dim() != 3:
            raise ValueError(f"input_flatten must be [N, S, d_model], got {list(input_flatten.shape)}")
        if len(input_spatial_shapes) != self.n_levels:
            raise ValueError(
                f"input_spatial_shapes must hold n_levels = {self.n_levels} levels, got {len(input_spatial_shapes)}"
            )
        if input_padding_mask is not None and input_padding_mask.dtype != torch.bool:
            raise TypeError(f"input_padding_mask must be bool, True where padded, got {input_padding_mask.dtype}")
        if reference_points.shape[-1] not in (2, 4):
            raise ValueError(f"the last axis of reference_points must be 2 or 4, got {reference_points.shape[-1]}")
        value = self.value_proj(input_flatten).unflatten(2, (self.n_heads, -1))
        samples = (self.n_heads, self.n_levels, self.n_points)
        output = fused_ms_deform_attn(
            value,
            input_spatial_shapes,
            reference_points,
            self.sampling_offsets(query).unflatten(2, (*samples, 2)),
            self.attention_weights(query).unflatten(2, samples),
            value_mask=None if input_padding_mask is None else ~input_padding_mask,
        )
        return self.output_proj(output)

    def extra_repr(self) -> str:
        """The four numbers of the constructor."""
        return f"d_model={self.d_model}, n_levels={self.n_levels}, n_heads={self.n_heads}, n_points={self.n_points}"


class MultiscaleDeformableAttention(nn.Module):
    """The module of the package msda-triton, with its parameter names, on the fused operator.

    One difference: offsets are divided by (w, h) of the level, so that they are pixels along x and y. Upstream divides
    them by (h, w), which is the same on square levels and wrong on all others: a checkpoint trained there on
    non-square levels has learnt offsets stretched by w/h.

    Args:
        emb_dim: channels of image, queries and output.
        hidden_dim: channels of the attention; divisible by ``num_heads``.
        num_levels: feature levels.
        num_heads: attention heads.
        num_points: sampling points of a head on a level.
        padding_mode: ``"zeros"`` or ``"border"``, as in ``grid_sample``.
        align_corners: as in ``grid_sample``.

    Raises:
        ValueError: ``hidden_dim`` is not divisible by ``num_heads``.

    Source: ``msda_triton.MultiscaleDeformableAttention``.

    Example:
        >>> attention = MultiscaleDeformableAttention(32, 16, 1, 4, 2, "border", False)
        >>> attention(torch.randn(1, 6, 32), [(2, 3)], torch.randn(1, 5, 32), torch.rand(1, 5, 2)).shape
        torch.Size([1, 5, 32])
    """

    def __init__(
        self,
        emb_dim: int,
        hidden_dim: int,
        num_levels: int,
        num_heads: int,
        num_points: int,
        padding_mode: str,
        align_corners: bool,
    ) -> None:
        super().__init__()
        if hidden_dim % num_heads != 0:
            raise ValueError(
                f"hidden_dim must be divisible by num_heads, got hidden_dim={hidden_dim} and num_heads={num_heads}"
            )
        check_options(padding_mode, align_corners)
        self.hidden_dim = hidden_dim
        self.num_levels = num_levels
        self.num_heads = num_heads
        self.num_points = num_points
        self.padding_mode = padding_mode
        self.align_corners = align_corners
        self.img_input_proj = nn.Linear(emb_dim, hidden_dim)
        # For each head, level and point: offset x, offset y, logit.
        self.query_input_proj = nn.Linear(emb_dim, num_heads * num_levels * num_points * 3)
        self.query_output_proj = nn.Linear(hidden_dim, emb_dim)

    def forward(self, img: Tensor, img_shapes: SpatialShapes, queries: Tensor, reference_points: Tensor) -> Tensor:
        """Attend from ``queries`` to the feature pyramid.

        Args:
            img: ``[B, I, emb_dim]``, the levels one after another, row-major.
            img_shapes: (h, w) of each level, an integer tensor ``[num_levels, 2]`` or a list of pairs.
            queries: ``[B, N, emb_dim]``.
            reference_points: ``[B, N, 2]`` (x, y) or ``[B, N, 4]`` (cx, cy, w, h), 0 to 1 across the image.

        Returns:
            ``[B, N, emb_dim]``.

        Raises:
            ValueError: the last axis of ``reference_points`` is neither 2 nor 4, or shapes do not fit together.
        """
        value = self.img_input_proj(img).unflatten(2, (self.num_heads, -1))
        points = self.query_input_proj(queries).unflatten(2, (self.num_heads, self.num_levels, self.num_points, 3))
        output = fused_ms_deform_attn(
            value, img_shapes, reference_points, points[..., :2], points[..., 2],
            padding_mode=self.padding_mode, align_corners=self.align_corners,
        )  # fmt: skip
        return self.query_output_proj(output)
