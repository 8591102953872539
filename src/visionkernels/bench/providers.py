"""Who is measured: this package's operator, PyTorch, and peers where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionkernels.bench import peers
from visionkernels.bench.cases import Case, Geometry, Inputs

Attention = Callable[..., Tensor]  # (value, points, weights) or (value, packed) -> [N, Lq, M * D]

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class Call(NamedTuple):
    """A provider bound to one set of inputs, which are in the dtypes that it takes.

    The leaves require gradients: value; locations or offsets; weights or logits. Or value, and the last two
    packed into one.
    """

    forward: Callable[[], Tensor]  # -> [N, Lq, M * D]
    leaves: tuple[Tensor, ...]
    unpack: Callable[[Tensor], Tensor]  # the gradient of the last leaf -> that of weights or logits


@dataclass(frozen=True)
class Candidate:
    """What all implementations that can be measured have.

    Attributes:
        name: What ``--against`` takes.
        ours: This package's: it must be right.
        compiled: It goes through ``torch.compile``.
        slow_start: Starting takes seconds a case: unless asked for, measured on the cases with ``slow`` alone.
        on_request: Starting takes minutes: measured on the cases with ``slow``, or that are named, if asked for.
        module: What must be importable, and hold nothing of this package's.
        package: The distribution whose version is recorded.
        dtypes: Dtypes that it takes.
        devices: Device types that it runs on.
        note: Said beside its figures.
    """

    name: str
    ours: bool = field(default=False, kw_only=True)
    compiled: bool = field(default=False, kw_only=True)
    slow_start: bool = field(default=False, kw_only=True)
    on_request: bool = field(default=False, kw_only=True)
    module: str | None = field(default=None, kw_only=True)
    package: str | None = field(default=None, kw_only=True)
    dtypes: tuple[torch.dtype, ...] = field(default=_FLOATS, kw_only=True)
    devices: tuple[str, ...] = field(default=("cpu", "cuda"), kw_only=True)
    note: str = field(default="", kw_only=True)

    def missing(self) -> str | None:
        """Why its module cannot be measured, in one line; None if it can."""
        if self.module is None:
            return None
        try:
            module = importlib.import_module(self.module)
        except (
            ImportError,
            OSError,
            RuntimeError,
            AssertionError,
        ) as error:  # also: a library for another torch, no GPU
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0]}"
        members = list(vars(module).values())  # a module that loads its parts when they are looked at grows
        if any(str(getattr(member, "__module__", "")).startswith("visionkernels.") for member in members):
            return f"{self.module} runs this package's own operators since it was installed over; take that back first"
        return None

    def takes(self, case: Any) -> bool:
        """Whether it is an implementation of this case at all."""
        return True

    def refuses(self, case: Any, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run this, in one line; None if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        if dtype not in self.dtypes:
            return f"no {str(dtype).removeprefix('torch.')}"
        return None


@dataclass(frozen=True)
class Provider(Candidate):
    """An implementation of multi-scale deformable attention.

    Attributes:
        build: ``(case, geometry)`` to the function of value, points and weights, all of which are differentiable.
        fused: It starts from references, offsets and logits instead of locations and weights.
        packed: It starts from locations and logits in one tensor ``[N, Lq, M, L * P * 3]``.
        narrow: It takes locations and weights in the dtype of value only.
        ragged: It takes a different number of points on each level.
    """

    build: Callable[[Case, Geometry], Attention]
    fused: bool = field(default=False, kw_only=True)
    packed: bool = field(default=False, kw_only=True)
    narrow: bool = field(default=False, kw_only=True)
    ragged: bool = field(default=False, kw_only=True)

    def refuses(self, case: Case, dtype: torch.dtype, device: torch.device) -> str | None:
        """Why it cannot run this, in one line; None if it can."""
        reason = super().refuses(case, dtype, device)
        return "one number of points for all levels" if reason is None and case.ragged and not self.ragged else reason

    def compile(self, function: Attention) -> Attention:
        """The function, compiled if this provider compiles."""
        if not self.compiled:
            return function
        torch.compiler.reset()  # after eight shapes of a function PyTorch would run the next one eagerly
        return torch.compile(function, dynamic=False, fullgraph=True)

    def bind(self, case: Case, inputs: Inputs) -> Call:
        """Bind it to inputs, in copies that require gradients."""
        attention = self.compile(self.build(case, inputs.geometry))
        narrow = inputs.value.dtype if self.narrow else None
        value = _leaf(inputs.value)
        points = inputs.sampling_offsets if self.fused else inputs.sampling_locations
        weights = inputs.attention_logits if self.fused or self.packed else inputs.attention_weights
        if self.packed:
            packed = _leaf(pack(points, weights), narrow)
            count = packed.shape[-1] // 3
            return Call(lambda: attention(value, packed), (value, packed), lambda gradient: gradient[..., 2 * count :])
        points, weights = _leaf(points, narrow), _leaf(weights, narrow)
        return Call(lambda: attention(value, points, weights), (value, points, weights), lambda gradient: gradient)


def pack(locations: Tensor, logits: Tensor) -> Tensor:
    """Locations ``[N, Lq, M, L, P, 2]`` and logits as DCNv4 takes them: all locations of a head, then all logits."""
    return torch.cat([locations.flatten(3).to(logits.dtype), logits.flatten(3)], -1)


def _leaf(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_()


_NARROW = "locations and weights in the dtype of value"
_PROVIDERS = (
    Provider("visionkernels", peers.ours, ours=True, ragged=True),
    Provider(
        "visionkernels-fused", peers.ours_fused, ours=True, fused=True, ragged=True,
        note="with softmax and sampling locations",
    ),
    Provider("grid_sample", peers.grid_sample, narrow=True, ragged=True, note=_NARROW),
    Provider(
        "torch-compile", peers.grid_sample, narrow=True, ragged=True, compiled=True, slow_start=True,
        note=f"grid_sample under torch.compile, {_NARROW}",
    ),
    Provider(
        "transformers", peers.transformers, narrow=True, ragged=True, slow_start=True,
        module="transformers.models.rt_detr_v2.modeling_rt_detr_v2", package="transformers", note=_NARROW,
    ),
    Provider(
        "deformable-detr", peers.deformable_detr, module="MultiScaleDeformableAttention",
        package="MultiScaleDeformableAttention", dtypes=_FLOATS[:2], devices=("cuda",),
    ),
    Provider(
        "msda-triton", peers.msda_triton, narrow=True, module="msda_triton.frontend", package="msda_triton",
        dtypes=_FLOATS[:3], devices=("cuda",), note=_NARROW,
    ),
    Provider(
        "mmcv", peers.mmcv, narrow=True, module="mmcv.ops.multi_scale_deform_attn", package="mmcv",
        dtypes=_FLOATS[:3], devices=("cuda",), note=_NARROW,
    ),
    Provider(
        "dcnv4", peers.dcnv4, narrow=True, packed=True, module="DCNv4.functions", package="DCNv4",
        dtypes=_FLOATS[1:], devices=("cuda",), note=f"with softmax, {_NARROW}",
    ),
)  # fmt: skip
PROVIDERS = {provider.name: provider for provider in _PROVIDERS}
