"""The operators as TensorRT's plugin `MultiscaleDeformableAttnPlugin_TRT`, one node a layer.

The plugin's interface, as its README and its checks say it: inputs value `[N, S, M, D]`, spatial_shapes `[L, 2]` and
level_start_index `[L]` in int32, sampling_locations `[N, Lq, M, L, P, 2]`, attention_weights `[N, Lq, M, L, P]`; output
`[N, Lq, M, D]`; value, locations, weights and output all float32 or all float16; no attributes of its own. It samples
bilinearly, with zeros outside.

It takes one number of points for all levels. Where they are unlike, a level is listed several times, each with the
greatest common divisor of the points: `[3, 6, 3]` are the levels 0, 1, 1, 2 with three points each.

Source: `plugin/multiscaleDeformableAttnPlugin/README.md` of NVIDIA/TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from visionkernels.errors import UserError
from visionkernels.export._standard import level_shapes, of_attention, packed, unfuse

OP_TYPE = "MultiscaleDeformableAttnPlugin_TRT"
DOMAIN = "trt.plugins"  # TensorRT's parser looks at the name alone
VERSIONS = ("1", "2")  # IPluginV2DynamicExt, deprecated since 10.11; IPluginV3
OWN = "visionkernels"  # in place of a version: the plugin of tensorrt_plugin.py
OWN_OP_TYPE = "ms_deform_attn"
_DTYPES = (torch.float32, torch.float16)


def lowered(version: str) -> dict[Any, Callable[..., Any]]:
    """Every operator of this package, and its form with the plugin.

    Args:
        version: of the plugin, or OWN.
    """

    def plain(
        value: Tensor, spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, points: Tensor,
        weights: Tensor, num_points: Sequence[int], padding_mode: str, align_corners: bool, method: str,
    ) -> Tensor:  # fmt: skip
        _check_options(padding_mode, align_corners, method)
        shapes = level_shapes(spatial_shapes, level_sizes)
        return _node(value, shapes, *packed(points, weights), list(num_points), version)

    def fused(
        value: Tensor, spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, points: Tensor,
        weights: Tensor, reference_points: Tensor, value_mask: Tensor | None, num_points: Sequence[int],
        padding_mode: str, align_corners: bool,
    ) -> Tensor:  # fmt: skip
        _check_options(padding_mode, align_corners, "bilinear")
        shapes = level_shapes(spatial_shapes, level_sizes)
        value, locations, weights = unfuse(value, shapes, points, weights, reference_points, value_mask, num_points)
        return _node(value, shapes, locations, weights, list(num_points), version)

    return of_attention(plain, fused)


def listed_levels(num_points: Sequence[int]) -> tuple[list[int], int]:
    """The levels as the plugin is told them, and the points of each: a level once for every share of its points.

    Example:
        >>> listed_levels([3, 6, 3])
        ([0, 1, 1, 2], 3)
    """
    points = math.gcd(*num_points)
    return [level for level, count in enumerate(num_points) for _ in range(count // points)], points


def _check_options(padding_mode: str, align_corners: bool, method: str) -> None:
    asked = [name for name, yes in ((f"padding_mode={padding_mode!r}", padding_mode != "zeros"),
                                    ("align_corners=True", align_corners), (f"method={method!r}", method != "bilinear"))
             if yes]  # fmt: skip
    if asked:
        raise UserError(
            f"model: {OP_TYPE} samples bilinearly with zeros outside, and the model asks for {', '.join(asked)}; "
            "export it with --format onnx, whose standard operators TensorRT reads as well"
        )


def _node(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, num_points: list[int],
    version: str,
) -> Tensor:  # fmt: skip
    if value.dtype not in _DTYPES:
        raise UserError(
            f"model: {OP_TYPE} takes float32 and float16, and the value is {value.dtype}; convert the model"
        )
    if sum(num_points) == 0:
        raise UserError(f"model: {OP_TYPE} takes at least one point, and num_points is {num_points}")
    if version == OWN:
        return _own_node(value, shapes, locations, weights, num_points)
    levels, points = listed_levels(num_points)
    starts = list(accumulate((h * w for h, w in shapes), initial=0))
    sizes = torch.stack([_integer(side) for level in levels for side in shapes[level]]).view(len(levels), 2)
    start = torch.stack([_integer(starts[level]) for level in levels])
    batch, num_queries, num_heads = weights.shape[:3]
    output = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OP_TYPE}",
        (
            value,
            sizes,
            start,
            locations.to(value.dtype).reshape(batch, num_queries, num_heads, len(levels), points, 2),
            weights.to(value.dtype).reshape(batch, num_queries, num_heads, len(levels), points),
        ),
        {"plugin_version": version, "plugin_namespace": ""},
        dtype=value.dtype,
        shape=(batch, num_queries, num_heads, value.shape[3]),
        version=1,
    )
    return output.flatten(2)


def _own_node(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, num_points: list[int]
) -> Tensor:
    sizes = torch.stack([_integer(side) for shape in shapes for side in shape]).view(len(shapes), 2)
    output = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{OWN_OP_TYPE}",
        (value, sizes, locations.to(torch.float32), weights.to(value.dtype)),
        {"plugin_version": "1", "plugin_namespace": OWN, "num_points": num_points},
        dtype=value.dtype,
        shape=(*weights.shape[:3], value.shape[3]),
        version=1,
    )
    return output.flatten(2)


def _integer(size: int) -> Tensor:
    return torch.full((), size, dtype=torch.int32)
