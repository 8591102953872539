"""Hugging Face transformers: which classes `visionkernels.patch` replaces, and by what.

Ten model families hold their multi-scale deformable attention as a module without parameters, named
`MultiScaleDeformableAttention` and defined anew in each modeling file; class bodies and signatures are the
same in all of them. Each row is tested against the real model, patched and stock, forward and every
gradient.
"""

from collections.abc import Sequence

from torch import Tensor

from visionkernels.integrations._patch import Integration
from visionkernels.ops.deformable_attention.op import ms_deform_attn

_VERSIONS = "5.17 to 5.23"  # tested

_MODELS = {
    "deformable_detr": "Deformable DETR",
    "grounding_dino": "Grounding DINO",
    "lw_detr": "LW-DETR",
    "mm_grounding_dino": "MM Grounding DINO",
    "omdet_turbo": "OmDet-Turbo",
    "pp_doclayout_v2": "PP-DocLayoutV2",
    "pp_doclayout_v3": "PP-DocLayoutV3",
    "pp_doclayout_v4": "PP-DocLayoutV4",  # not in 5.17
    "rf_detr": "RF-DETR",
    "rt_detr": "RT-DETR",
}


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


INTEGRATIONS: tuple[Integration, ...] = tuple(
    Integration(
        title=title,
        module=f"transformers.models.{name}.modeling_{name}",
        class_name="MultiScaleDeformableAttention",
        method="forward",
        parameters=(
            "self",
            "value",
            "value_spatial_shapes",
            "value_spatial_shapes_list",
            "level_start_index",
            "sampling_locations",
            "attention_weights",
            "im2col_step",
        ),
        adapter=multi_scale_deformable_attention_forward,
        versions=_VERSIONS,
    )
    for name, title in _MODELS.items()
)
