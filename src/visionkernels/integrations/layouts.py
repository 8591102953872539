"""The same attention under the arguments and layouts of other code bases: one short function each.

Each function takes the place of the upstream function of its row: import it instead, or assign it to the name in the
upstream module that calls it. Level shapes are (h, w), locations (x, y) from 0 to 1 across a level, and outside
counts as zero, everywhere. The dtype of a result is that of the value, inside an autocast region as well.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from visionkernels.integrations._autocast import outside_autocast
from visionkernels.integrations.table import Row
from visionkernels.integrations.transformers import multi_scale_deformable_attention_v2
from visionkernels.ops._common import shown
from visionkernels.ops.deformable_attention import checks
from visionkernels.ops.deformable_attention.op import fused_ms_deform_attn, ms_deform_attn

ROWS = (
    Row(
        "DCNv4, FlashDeformAttn",
        "interface of 1.0.0.post2 (4b848f7)",
        "FlashDeformAttnFunction",
        "from visionkernels.integrations.layouts import FlashDeformAttnFunction",
    ),
    Row(
        "TensorRT, MultiscaleDeformableAttnPlugin_TRT",
        "interface of plugin versions 1 and 2",
        "the plugin's inputs and its output of four axes",
        "from visionkernels.integrations.layouts import multiscale_deformable_attn_plugin",
    ),
    Row(
        "RF-DETR (rfdetr)",
        "1.4.1 and 1.11.2",
        "ms_deform_attn_core_pytorch",
        "from rfdetr.models.ops.modules import ms_deform_attn; from visionkernels.integrations import layouts; "
        "ms_deform_attn.ms_deform_attn_core_pytorch = layouts.rf_detr_core",
    ),
    Row(
        "D-FINE",
        "4a1f73a (2025-04)",
        "deformable_attention_core_func_v2",
        "from src.zoo.dfine import dfine_decoder; from visionkernels.integrations import layouts; "
        "dfine_decoder.deformable_attention_core_func_v2 = layouts.d_fine_core  # before the model is built",
    ),
    Row(
        "msda-triton",
        "0.1.1",
        "multiscale_deformable_attention, MultiscaleDeformableAttention",
        "from visionkernels import multiscale_deformable_attention, MultiscaleDeformableAttention",
    ),
)


class FlashDeformAttnFunction:
    """DCNv4's function of that name, by its one method `apply`.

    The module above it, `FlashDeformAttn`, has the constructor, the parameters and the arguments of
    `visionkernels.MSDeformAttn`, which loads its checkpoints and keeps the locations in float32.

    Source:
        `DCNv4_op/DCNv4/functions/flash_deform_attn_func.py`.
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: checks.SpatialShapes,
        value_level_start_index: Tensor | None,
        sampling_loc_attn: Tensor,
        im2col_step: int | None = None,
        K: int = 8,
    ) -> Tensor:
        """Attend; the softmax is inside, in one kernel with the sampling.

        Args:
            value: `[N, S, M, D]`.
            value_spatial_shapes: `[L, 2]`, (h, w), or a list of pairs.
            value_level_start_index: follows from the shapes and is not read.
            sampling_loc_attn: `[N, Lq, M, L * K * 3]`: for each head the locations, `[L, K, 2]`, then the logits,
                `[L, K]`, before the softmax.
            im2col_step: does nothing.
            K: points of a head on a level.

        Returns:
            `[N, Lq, M * D]` in the dtype of `value`. Gradients reach `value` and `sampling_loc_attn`.

        Raises:
            TypeError, ValueError, RuntimeError: as `fused_ms_deform_attn`.

        Example:
            >>> value = torch.arange(6.0).view(1, 6, 1, 1)  # one level of 2 x 3 pixels
            >>> packed = torch.tensor([0.5, 0.5, 0.0]).view(1, 1, 1, 3)  # x, y, logit
            >>> FlashDeformAttnFunction.apply(value, [(2, 3)], None, packed, 64, 1)
            tensor([[[2.5000]]])
        """
        checks.check_value(value)
        num_levels, _, _ = checks.check_shapes(value_spatial_shapes, value)
        if not isinstance(K, int):
            raise TypeError(f"K must be an integer, got {type(K).__name__}")
        num_samples = num_levels * K
        if not isinstance(sampling_loc_attn, Tensor) or sampling_loc_attn.dim() != 4:
            raise ValueError(
                f"sampling_loc_attn must be a tensor [N, Lq, M, L * K * 3], got {_came(sampling_loc_attn)}"
            )
        expected = (value.shape[0], sampling_loc_attn.shape[1], value.shape[2], 3 * num_samples)
        axes = f"[N, Lq, M, L * K * 3 = {num_levels} * {K} * 3]"
        checks.check_like("sampling_loc_attn", sampling_loc_attn, expected, axes, value)
        locations, logits = sampling_loc_attn.split([num_samples * 2, num_samples], -1)
        points = (num_levels, K)
        # A reference box at 0 of the size 2 K makes an offset the location: 0 + offset / K * 2 K * 0.5.
        box = sampling_loc_attn.new_zeros(1, 1, 1, 4)
        box[..., 2:] = 2 * K
        with outside_autocast(value):
            return fused_ms_deform_attn(
                value,
                value_spatial_shapes,
                box.expand(*sampling_loc_attn.shape[:2], 1, 4),
                locations.unflatten(-1, (*points, 2)),
                logits.unflatten(-1, points),
            )


def _came(found: object) -> str:
    return str(list(found.shape)) if isinstance(found, Tensor) else type(found).__name__


def multiscale_deformable_attn_plugin(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """The inputs and the output of TensorRT's `MultiscaleDeformableAttnPlugin_TRT`.

    Args:
        value: `[N, S, M, D]`.
        spatial_shapes: `[L, 2]`, (h, w), int32 as the plugin takes it, or int64.
        level_start_index: `[L]`, likewise.
        sampling_locations: `[N, Lq, M, L, P, 2]`.
        attention_weights: `[N, Lq, M, L, P]`, the softmax already applied.

    Returns:
        `[N, Lq, M, D]` in the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

    Source:
        `plugin/multiscaleDeformableAttnPlugin` of NVIDIA/TensorRT.

    Example:
        >>> value, shapes = torch.ones(1, 6, 2, 4), torch.tensor([[2, 3]], dtype=torch.int32)
        >>> locations, weights = torch.full((1, 5, 2, 1, 1, 2), 0.5), torch.ones(1, 5, 2, 1, 1)
        >>> start = torch.tensor([0], dtype=torch.int32)
        >>> multiscale_deformable_attn_plugin(value, shapes, start, locations, weights).shape
        torch.Size([1, 5, 2, 4])
    """
    with outside_autocast(value):
        output = ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    return output.unflatten(2, value.shape[2:])


def rf_detr_core(
    value: Tensor,
    value_spatial_shapes: checks.SpatialShapes,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    value_spatial_shapes_hw: Sequence[tuple[int, int]] | None = None,
) -> Tensor:
    """RF-DETR's `ms_deform_attn_core_pytorch`: pixels on the last axis of the value.

    Args:
        value: `[N, M, D, S]`.
        value_spatial_shapes: `[L, 2]`, (h, w), or a list of pairs.
        sampling_locations: `[N, Lq, M, L, P, 2]`, or `[N, Lq, M, L * P, 2]` as in its export mode.
        attention_weights: `[N, Lq, M, L * P]`, as its module passes them, or `[N, Lq, M, L, P]`; the softmax already
            applied.
        value_spatial_shapes_hw: the shapes as pairs of integers, where the caller has them on the host.

    Returns:
        `[N, Lq, M * D]` in the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

    Source:
        `rfdetr.models.ops.functions.ms_deform_attn_func`.

    Example:
        >>> value = torch.arange(6.0).view(1, 1, 1, 6)  # one level of 2 x 3 pixels
        >>> center, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1)
        >>> rf_detr_core(value, torch.tensor([[2, 3]]), center, weights)
        tensor([[[2.5000]]])
    """
    shapes = value_spatial_shapes if value_spatial_shapes_hw is None else value_spatial_shapes_hw
    if not isinstance(value, Tensor) or value.dim() != 4:
        raise ValueError(f"value must be a tensor [N, M, D, S], got {_came(value)}")
    with outside_autocast(value):
        num_levels, _, _ = checks.check_shapes(shapes, value)
        locations = _by_level("sampling_locations", sampling_locations, 5, num_levels)
        weights = _by_level("attention_weights", attention_weights, 4, num_levels)
        return ms_deform_attn(value.permute(0, 3, 1, 2), shapes, None, locations, weights)


def _by_level(name: str, tensor: Tensor, packed: int, num_levels: int) -> Tensor:
    """A tensor of `packed` axes with its fourth, `L * P`, as two; others as they are, for the operator to check."""
    if not isinstance(tensor, Tensor) or tensor.dim() != packed:
        return tensor
    points, rest = divmod(tensor.shape[3], max(num_levels, 1))
    if rest:
        raise ValueError(f"{name} must hold as many points for each of {num_levels} levels, got {list(tensor.shape)}")
    return tensor.unflatten(3, (num_levels, points))


def d_fine_core(
    value: Sequence[Tensor],
    value_spatial_shapes: Sequence[Any],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    num_points_list: Sequence[int],
    method: str = "default",
) -> Tensor:
    """D-FINE's `deformable_attention_core_func_v2`: a value for each level, and packed points.

    One difference: `"discrete"` clamps x to the width and y to the height of a level. Upstream clamps both to the
    height, which is the same on square levels.

    Args:
        value: a tensor `[N, M, D, h * w]` for each level.
        value_spatial_shapes: (h, w) of each level.
        sampling_locations: `[N, Lq, M, sum(num_points_list), 2]`.
        attention_weights: `[N, Lq, M, sum(num_points_list)]`, the softmax already applied.
        num_points_list: points of each level.
        method: `"default"` samples bilinearly, `"discrete"` takes the nearest pixel.

    Returns:
        `[N, Lq, M * D]` in the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

    Source:
        `src/zoo/dfine/utils.py` of D-FINE; DEIM has the same.

    Example:
        >>> value = [torch.arange(6.0).view(1, 1, 1, 6), torch.ones(1, 1, 1, 1)]
        >>> center, weights = torch.full((1, 1, 1, 3, 2), 0.5), torch.ones(1, 1, 1, 3)
        >>> d_fine_core(value, [(2, 3), (1, 1)], center, weights, [2, 1])
        tensor([[[6.]]])
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, Tensor) and one.dim() == 4 for one in value):
        raise ValueError(f"value must be a list of tensors [N, M, D, h * w], got {_came(value)}")
    if value:
        checks.check_shapes(value_spatial_shapes, value[0])
    sizes = [level.shape[3] for level in value]
    if not sizes or sizes != [h * w for h, w in value_spatial_shapes]:
        levels = shown(value_spatial_shapes)
        raise ValueError(f"value must hold a tensor [N, M, D, h * w] for each of {levels}, got h * w = {sizes}")
    with outside_autocast(value[0]):
        pixels = torch.cat([level.permute(0, 3, 1, 2) for level in value], 1)
        return multi_scale_deformable_attention_v2(
            pixels, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method
        )
