"""Hugging Face transformers: which classes `visionkernels.patch` replaces, and by what.

Fifteen models have multi-scale deformable attention, in three layouts; within one, code and signatures are the same
in all of them. Ten hold it as a module without parameters, `MultiScaleDeformableAttention`, defined anew in each
modeling file. Three call a function with the points of all levels packed, two a function with an axis for the levels.
Each row is tested against the real model, patched and stock, forward and every gradient.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from visionkernels.integrations._patch import Integration, Place
from visionkernels.integrations.table import Row
from visionkernels.ops._common import shown
from visionkernels.ops.deformable_attention.checks import SpatialShapes
from visionkernels.ops.deformable_attention.op import ms_deform_attn

_VERSIONS = "5.17 to 5.23"  # tested
_METHODS = {"default": "bilinear", "discrete": "nearest"}  # transformers' name of a method: this package's


def multi_scale_deformable_attention_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_spatial_shapes_list: Sequence[tuple[int, int]] | None,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Stand in for `MultiScaleDeformableAttention.forward` of transformers.

    The list of the shapes goes to the operator where there is one: it is already on the host, and nothing
    has to be read back from a GPU.

    Args:
        value: `[N, S, M, D]`, the levels one after the other.
        value_spatial_shapes: `[L, 2]` int64, (h, w).
        value_spatial_shapes_list: the same as pairs of integers, or None.
        level_start_index: `[L]` int64.
        sampling_locations: `[N, Lq, M, L, P, 2]`, (x, y) in [0, 1]; outside counts as zero.
        attention_weights: `[N, Lq, M, L, P]`, the softmax already applied.
        im2col_step: does nothing.

    Returns:
        `[N, Lq, M * D]`.

    Source:
        `transformers.models.deformable_detr.modeling_deformable_detr.MultiScaleDeformableAttention`.
    """
    shapes = value_spatial_shapes if value_spatial_shapes_list is None else value_spatial_shapes_list
    return ms_deform_attn(value, shapes, level_start_index, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value: Tensor,
    value_spatial_shapes: SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """Stand in for `multi_scale_deformable_attention_v2` of transformers.

    Args:
        value: `[N, S, M, D]`, the levels one after the other.
        value_spatial_shapes: (h, w) of each level, a list of pairs or a tensor `[L, 2]`.
        sampling_locations: `[N, Lq, M, sum(num_points_list), 2]`, (x, y) in [0, 1].
        attention_weights: `[N, Lq, M, sum(num_points_list)]`, the softmax already applied.
        num_points_list: points of each level.
        method: "default", bilinear, outside counts as zero; or "discrete", the pixel a location lies in,
            clamped to the level, with no gradient to the locations.

    Returns:
        `[N, Lq, M * D]`.

    Raises:
        ValueError: `method` is neither.

    Source:
        `transformers.models.rt_detr_v2.modeling_rt_detr_v2.multi_scale_deformable_attention_v2`.
    """
    if method not in (*_METHODS,):
        raise ValueError(f"method must be one of {(*_METHODS,)}, got {shown(method)}")
    if method == "discrete":
        # Upstream's rounding leaves parameters behind the locations without a gradient, not with 0.
        sampling_locations = sampling_locations.detach()
    return ms_deform_attn(
        value, value_spatial_shapes, None, sampling_locations, attention_weights,
        num_points=num_points_list, method=_METHODS[method],
    )  # fmt: skip


def multi_scale_deformable_attention(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Stand in for `multi_scale_deformable_attention` of transformers.

    Args:
        value: `[N, S, M, D]`, the levels one after the other.
        value_spatial_shapes: (h, w) of each level, a list of pairs or a tensor `[L, 2]`.
        sampling_locations: `[N, Lq, M, L, P, 2]`, (x, y) in [0, 1]; outside counts as zero.
        attention_weights: `[N, Lq, M, L, P]`, the softmax already applied.

    Returns:
        `[N, Lq, M * D]`.

    Source:
        `transformers.models.mask2former.modeling_mask2former.multi_scale_deformable_attention`.
    """
    return ms_deform_attn(value, value_spatial_shapes, None, sampling_locations, attention_weights)


_Layout = tuple[Place, str, Callable[..., Tensor]]
_STATELESS: _Layout = ("method", "forward", multi_scale_deformable_attention_forward)
_HELD: _Layout = ("attribute", "ms_deformable_attn_core", multi_scale_deformable_attention_v2)
_PACKED: _Layout = ("global", "multi_scale_deformable_attention_v2", multi_scale_deformable_attention_v2)
_BY_LEVEL: _Layout = ("global", "multi_scale_deformable_attention", multi_scale_deformable_attention)

_SHARED = "MultiScaleDeformableAttention"  # the name in every modeling file
_OWN = "MultiscaleDeformableAttention"  # the end of a name of the model's own

_MODELS: tuple[tuple[str, str, str, _Layout, str], ...] = (
    ("deformable_detr", "Deformable DETR", _SHARED, _STATELESS, _VERSIONS),
    ("grounding_dino", "Grounding DINO", _SHARED, _STATELESS, _VERSIONS),
    ("lw_detr", "LW-DETR", _SHARED, _STATELESS, _VERSIONS),
    ("mm_grounding_dino", "MM Grounding DINO", _SHARED, _STATELESS, _VERSIONS),
    ("omdet_turbo", "OmDet-Turbo", _SHARED, _STATELESS, _VERSIONS),
    ("pp_doclayout_v2", "PP-DocLayoutV2", _SHARED, _STATELESS, _VERSIONS),
    ("pp_doclayout_v3", "PP-DocLayoutV3", _SHARED, _STATELESS, _VERSIONS),
    ("pp_doclayout_v4", "PP-DocLayoutV4", _SHARED, _STATELESS, "5.23"),  # not in 5.17
    ("rf_detr", "RF-DETR", _SHARED, _STATELESS, _VERSIONS),
    ("rt_detr", "RT-DETR", _SHARED, _STATELESS, _VERSIONS),
    ("d_fine", "D-FINE", f"DFine{_OWN}", _HELD, _VERSIONS),
    ("deimv2", "DEIMv2", f"Deimv2{_OWN}", _HELD, _VERSIONS),
    ("rt_detr_v2", "RT-DETRv2", f"RTDetrV2{_OWN}", _PACKED, _VERSIONS),
    ("mask2former", "Mask2Former", f"Mask2FormerPixelDecoderEncoder{_OWN}", _BY_LEVEL, _VERSIONS),
    ("oneformer", "OneFormer", f"OneFormerPixelDecoderEncoder{_OWN}", _BY_LEVEL, _VERSIONS),
)

INTEGRATIONS: tuple[Integration, ...] = tuple(
    Integration(title, f"transformers.models.{name}.modeling_{name}", class_name, *layout, versions)
    for name, title, class_name, layout, versions in _MODELS
)

ROWS: tuple[Row, ...] = tuple(
    Row(f"transformers: {row.title}", row.versions, row.describe(), "visionkernels.patch(model)")
    for row in INTEGRATIONS
)
