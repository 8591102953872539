"""mmcv: its function, its module, and an installed mmcv that runs on this package's operators.

`install` works on mmcv itself: the two functions of `mmcv.ops.multi_scale_deform_attn`, and the `forward` of its
`MultiScaleDeformableAttention`. The class stays, so registries, configs, subclasses and existing models stay as they
are, and all of them run the new code. What is here also works without mmcv.
"""

import importlib
import inspect
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from visionkernels.integrations._autocast import outside_autocast
from visionkernels.integrations._mmcv_attention import MultiScaleDeformableAttention, attend
from visionkernels.integrations.table import Row
from visionkernels.ops.deformable_attention.checks import SpatialShapes
from visionkernels.ops.deformable_attention.op import ms_deform_attn

__all__ = [
    "ROWS",
    "MultiScaleDeformableAttention",
    "MultiScaleDeformableAttnFunction",
    "install",
    "multi_scale_deformable_attn_pytorch",
    "uninstall",
]

ROWS = (
    Row(
        "mmcv",
        "2.2.0 (a8073c7)",
        "MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch, MultiScaleDeformableAttention.forward",
        "from visionkernels.integrations import mmcv; mmcv.install()",
    ),
)

_UPSTREAM = "mmcv.ops.multi_scale_deform_attn"
_MARK = "_visionkernels_replaced"  # where the upstream module keeps what was replaced


class MultiScaleDeformableAttnFunction:
    """mmcv's function of that name, by its one method `apply`.

    Locations and weights keep their dtype, where mmcv casts them to that of the value.

    Source:
        `mmcv/ops/multi_scale_deform_attn.py`.
    """

    @staticmethod
    def apply(
        value: Tensor,
        value_spatial_shapes: SpatialShapes,
        value_level_start_index: Tensor | None,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int | None = None,
    ) -> Tensor:
        """Attend, with the arguments of `ms_deform_attn` in mmcv's names.

        Args:
            value: `[bs, num_keys, num_heads, head_dim]`; autocast does not change it.
            value_spatial_shapes: `[num_levels, 2]`, (h, w).
            value_level_start_index: `[num_levels]`; it follows from the shapes.
            sampling_locations: `[bs, num_queries, num_heads, num_levels, num_points, 2]`, (x, y), 0 to 1 across a
                level; outside counts as zero.
            attention_weights: `[bs, num_queries, num_heads, num_levels, num_points]`, the softmax already applied.
            im2col_step: does nothing.

        Returns:
            `[bs, num_queries, num_heads * head_dim]` in the dtype of `value`.

        Raises:
            TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

        Example:
            >>> import torch
            >>> value, locations = torch.ones(1, 6, 2, 4), torch.full((1, 5, 2, 1, 3, 2), 0.5)
            >>> weights, shapes, start = torch.rand(1, 5, 2, 1, 3), torch.tensor([[2, 3]]), torch.tensor([0])
            >>> MultiScaleDeformableAttnFunction.apply(value, shapes, start, locations, weights, 64).shape
            torch.Size([1, 5, 8])
        """
        with outside_autocast(value):
            return ms_deform_attn(
                value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights
            )


def multi_scale_deformable_attn_pytorch(
    value: Tensor, value_spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same under the name and the four arguments that mmcv uses on the CPU; here on any device.

    Args:
        value: as for `MultiScaleDeformableAttnFunction.apply`.
        value_spatial_shapes: likewise.
        sampling_locations: likewise.
        attention_weights: likewise.

    Returns:
        `[bs, num_queries, num_heads * head_dim]` in the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

    Source:
        `mmcv/ops/multi_scale_deform_attn.py`.

    Example:
        >>> import torch
        >>> value, locations = torch.ones(1, 6, 2, 4), torch.full((1, 5, 2, 1, 3, 2), 0.5)
        >>> multi_scale_deformable_attn_pytorch(value, [(2, 3)], locations, torch.rand(1, 5, 2, 1, 3)).shape
        torch.Size([1, 5, 8])
    """
    return MultiScaleDeformableAttnFunction.apply(
        value, value_spatial_shapes, None, sampling_locations, attention_weights
    )


@dataclass(frozen=True)
class _Replaced:
    """An attribute of an upstream module or class, and what stands there."""

    owner: Any
    attribute: str
    original: Any
    replacement: Any


def install() -> None:
    """Point an installed mmcv at this package's operators.

    Existing models, the registry and subclasses follow, unless they override `forward`. Code that takes a function
    out of mmcv by `from ... import` gets the new one if it is imported after this call. A second call does nothing.

    Raises:
        ModuleNotFoundError: mmcv is not installed, or without its compiled operators (mmcv-lite).
        RuntimeError: the installed mmcv's module takes other arguments than those that are known.

    Source:
        `mmcv/ops/multi_scale_deform_attn.py`.

    Example:
        >>> from visionkernels.integrations import mmcv
        >>> mmcv.install()  # doctest: +SKIP
    """
    upstream = _import_upstream()
    if _MARK in vars(upstream):
        return
    own = (MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch)
    replacements = {replacement.__name__: replacement for replacement in own}
    missing = {MultiScaleDeformableAttention.__name__, *replacements} - set(vars(upstream))
    if missing:
        raise RuntimeError(f"{_UPSTREAM} has no {', '.join(sorted(missing))}; use mmcv {ROWS[0].versions}")
    cls = upstream.MultiScaleDeformableAttention
    parameters, expected = (tuple(inspect.signature(f).parameters) for f in (cls.forward, attend))
    if parameters != expected:
        raise RuntimeError(
            f"{_UPSTREAM}.{cls.__name__}.forward takes ({', '.join(parameters)}), but its stand-in was written for "
            f"({', '.join(expected)}); use mmcv {ROWS[0].versions}"
        )
    replaced = [_Replaced(cls, "forward", cls.forward, attend)]
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "mmcv"]:
        for name, replacement in replacements.items():
            original = vars(upstream)[name]
            if vars(module).get(name) is original:  # where it is defined, and wherever mmcv exports it again
                replaced.append(_Replaced(module, name, original, replacement))
    for one in replaced:
        setattr(one.owner, one.attribute, one.replacement)
    setattr(upstream, _MARK, replaced)


def uninstall() -> None:
    """Take back what `install` replaced.

    Raises:
        RuntimeError: `install` was not called, or somebody else has replaced the same since; nothing is taken back
            then.

    Example:
        >>> from visionkernels.integrations import mmcv
        >>> mmcv.uninstall()  # doctest: +SKIP
    """
    upstream = sys.modules.get(_UPSTREAM)
    replaced = getattr(upstream, _MARK, None)
    if replaced is None:
        raise RuntimeError("mmcv runs its own operators: install() has not been called, or was taken back")
    for one in replaced:
        if vars(one.owner).get(one.attribute) is not one.replacement:
            raise RuntimeError(
                f"{one.attribute} of {one.owner.__name__} was replaced by something else after install(), "
                "so uninstall() cannot restore it; undo that replacement first"
            )
    for one in replaced:
        setattr(one.owner, one.attribute, one.original)
    delattr(upstream, _MARK)


def _import_upstream() -> ModuleType:
    try:
        return importlib.import_module(_UPSTREAM)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"install() needs mmcv with its compiled operators, but {error.name} is missing; install mmcv (not "
            "mmcv-lite), or use the function and the module of visionkernels.integrations.mmcv directly"
        ) from error
