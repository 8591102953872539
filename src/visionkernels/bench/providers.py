"""Who is measured: this package's operator, PyTorch, and peers where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.bench.cases import Case, Inputs

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A provider bound to one set of inputs, which are in the dtypes that it takes.

    The three leaves require gradients; ``points`` are locations or offsets, ``weights`` attention weights or
    logits.
    """

    forward: Callable[[], Tensor]  # -> [N, Lq, M * D]
    value: Tensor
    points: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Provider:
    """An implementation that can be measured.

    Attributes:
        name: What ``--against`` takes.
        bind: Makes the call for a case and its inputs.
        ours: This package's: it must be right, and an exception in it is not caught.
        fused: It starts from references, offsets and logits instead of locations and weights.
        package: What must be importable.
        dtypes: Value dtypes that it takes.
        devices: Device types that it runs on.
        ragged: It takes a different number of points on each level.
        note: Said beside its figures.
    """

    name: str
    bind: Callable[[Case, Inputs], Call]
    ours: bool = False
    fused: bool = False
    package: str | None = None
    dtypes: tuple[torch.dtype, ...] = _FLOATS
    devices: tuple[str, ...] = ("cpu", "cuda")
    ragged: bool = False
    note: str = ""

    def missing(self) -> str | None:
        """Why its package cannot be imported, in one line; None if it can."""
        if self.package is None:
            return None
        try:
            importlib.import_module(self.package)
        except ImportError as error:  # of the package, of something it needs, or a library that does not load
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        return None

    def refuses(self, case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run this, in one line; None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"no {str(dtype).removeprefix('torch.')}"
        if case.ragged and not self.ragged:
            return "one number of points for all levels"
        return None


def _leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_()


def _ours(case: Case, inputs: Inputs) -> Call:
    from visionkernels.ops.deformable_attention.op import ms_deform_attn

    value, points, weights = map(_leaf, (inputs.value, inputs.sampling_locations, inputs.attention_weights))
    shapes, start = inputs.spatial_shapes, inputs.level_start_index
    ragged = case.points if case.ragged else None
    return Call(
        lambda: ms_deform_attn(value, shapes, start, points, weights, num_points=ragged),
        value,
        points,
        weights,
    )


def _ours_fused(case: Case, inputs: Inputs) -> Call:
    from visionkernels.ops.deformable_attention.op import fused_ms_deform_attn

    value, points, weights = map(_leaf, (inputs.value, inputs.sampling_offsets, inputs.attention_logits))
    shapes, references = inputs.spatial_shapes, inputs.reference_points
    ragged = case.points if case.ragged else None
    return Call(
        lambda: fused_ms_deform_attn(value, shapes, references, points, weights, num_points=ragged),
        value,
        points,
        weights,
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


def _grid_sample(case: Case, inputs: Inputs) -> Call:
    dtype = inputs.value.dtype
    value = _leaf(inputs.value)
    points, weights = inputs.sampling_locations, inputs.attention_weights
    if not case.ragged:
        points, weights = points.flatten(3, 4), weights.flatten(3, 4)
    points, weights = _leaf(points, dtype), _leaf(weights, dtype)
    return Call(
        lambda: grid_sample_attention(value, case.levels, case.points, points, weights),
        value,
        points,
        weights,
    )


def _deformable_detr(case: Case, inputs: Inputs) -> Call:
    extension = importlib.import_module("MultiScaleDeformableAttention")
    value, points, weights = map(_leaf, (inputs.value, inputs.sampling_locations, inputs.attention_weights))
    shapes, start, step = inputs.spatial_shapes, inputs.level_start_index, min(case.batch, 64)

    class Function(torch.autograd.Function):  # the extension brings a forward and a backward, autograd is its user's
        @staticmethod
        def forward(ctx: Any, value: Tensor, points: Tensor, weights: Tensor) -> Tensor:
            ctx.save_for_backward(value, points, weights)
            return extension.ms_deform_attn_forward(value, shapes, start, points, weights, step)

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
            value, points, weights = ctx.saved_tensors
            gradient = gradients[0].contiguous()
            return tuple(extension.ms_deform_attn_backward(value, shapes, start, points, weights, gradient, step))

    return Call(lambda: Function.apply(value, points, weights), value, points, weights)


def _msda_triton(case: Case, inputs: Inputs) -> Call:
    # Its public function answers every exception of this one with grid_sample: its kernel is measured.
    attention = importlib.import_module("msda_triton.frontend").triton_multiscale_deformable_attention
    dtype, shapes = inputs.value.dtype, inputs.spatial_shapes
    value, points = _leaf(inputs.value), _leaf(inputs.sampling_locations, dtype)
    weights = _leaf(inputs.attention_weights, dtype)
    return Call(lambda: attention(value, shapes, points, weights, "zeros", False).flatten(2), value, points, weights)


_NARROW = "locations and weights in the dtype of value"
PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider("visionkernels", _ours, ours=True, ragged=True),
        Provider(
            "visionkernels-fused", _ours_fused, ours=True, fused=True, ragged=True,
            note="with softmax and sampling locations",
        ),
        Provider("grid_sample", _grid_sample, ragged=True, note=_NARROW),
        Provider(
            "deformable-detr", _deformable_detr, package="MultiScaleDeformableAttention",
            dtypes=_FLOATS[:2], devices=("cuda",),
        ),
        Provider(
            "msda-triton", _msda_triton, package="msda_triton",
            dtypes=_FLOATS[:3], devices=("cuda",), note=_NARROW,
        ),
    )
}  # fmt: skip
