"""The workloads that are measured, as data, and their inputs."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionkernels.bench.vit_cases import MODELS, OPERATORS, ModelCase, OpCase


@dataclass(frozen=True)
class Case:
    """One workload of multi-scale deformable attention.

    Attributes:
        name: What ``--case`` takes.
        title: Which model it is from, for tables.
        batch: N, images.
        levels: (h, w) of each level.
        num_queries: Lq; None in an encoder, where every pixel is a query (Lq = S).
        num_heads: M.
        head_dim: D.
        num_points: P of every level, or one number for each level.
        boxes: The references are boxes (cx, cy, w, h) instead of points.
        tags: Where it is measured if no case is named: ``gpu``, ``cpu``, or ``quick`` for ``--quick``. A case with
            ``headline`` stands in the README and is measured in bf16 too; one with ``slow`` also with the peers that
            are slow to start.

    Example:
        >>> CASES["rtdetr-n1"].pixels
        8400
    """

    name: str
    title: str
    batch: int
    levels: tuple[tuple[int, int], ...]
    num_queries: int | None
    num_heads: int = 8
    head_dim: int = 32
    num_points: int | tuple[int, ...] = 4
    boxes: bool = False
    tags: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Case:
        """The case that ``dataclasses.asdict`` and JSON made these fields of."""
        tuples = {
            "levels": tuple((h, w) for h, w in fields["levels"]),
            "num_points": points if isinstance(points := fields["num_points"], int) else tuple(points),
            "tags": tuple(fields["tags"]),
        }
        return cls(**{**fields, **tuples})

    @property
    def pixels(self) -> int:
        """S, pixels of all levels."""
        return sum(h * w for h, w in self.levels)

    @property
    def queries(self) -> int:
        """Lq."""
        return self.pixels if self.num_queries is None else self.num_queries

    @property
    def points(self) -> tuple[int, ...]:
        """Points of each level."""
        if isinstance(self.num_points, int):
            return (self.num_points,) * len(self.levels)
        return self.num_points

    @property
    def ragged(self) -> bool:
        """Whether the number of points differs between the levels; points are then packed into one axis."""
        return not isinstance(self.num_points, int)

    @property
    def sizes(self) -> str:
        """The sizes but for the points, in words."""
        return f"N={self.batch}, S={self.pixels}, Lq={self.queries}, M×D={self.num_heads}×{self.head_dim}"

    @property
    def description(self) -> str:
        """The case in one line."""
        points = ", ".join(map(str, self.points)) if self.ragged else self.num_points
        return f"{self.title}: {self.sizes}, P={points}"

    @property
    def label(self) -> str:
        """The case in a line of the README."""
        return f"{self.title}, N={self.batch}, Lq={self.queries}"

    @property
    def group(self) -> str:
        """Cases of one group share a table; each of these has its own."""
        return self.name

    grouped = False


_DETR = ((100, 134), (50, 67), (25, 34), (13, 17))  # an image of 800 x 1066 at strides 8 to 64
_SMALL = ((50, 67), (25, 34), (13, 17), (7, 9))
_RTDETR = ((80, 80), (40, 40), (20, 20))
_BEVFORMER = ((116, 200), (58, 100), (29, 50), (15, 25))
_MASK2FORMER = ((32, 32), (64, 64), (128, 128))
_GPU, _EVERYWHERE = ("gpu",), ("gpu", "headline", "cpu", "quick")

_WORKLOADS = (
    Case("encoder-n4", "Deformable DETR encoder, 800×1066", 4, _DETR, None, tags=("gpu", "headline", "slow")),
    Case("encoder-n1", "Deformable DETR encoder, 800×1066", 1, _DETR, None, tags=("headline", "cpu", "slow")),
    Case("encoder-small", "Deformable DETR encoder, 400×533", 1, _SMALL, None, tags=("headline", "quick", "slow")),
    Case("decoder-n4", "Deformable DETR / DINO decoder", 4, _DETR, 900, tags=("gpu", "headline")),
    Case("decoder-n1", "Deformable DETR decoder", 1, _DETR, 300, tags=_EVERYWHERE),
    Case("rtdetr-n1", "RT-DETR decoder", 1, _RTDETR, 300, boxes=True, tags=(*_EVERYWHERE, "slow")),
    Case("rtdetr-n8", "RT-DETR decoder", 8, _RTDETR, 300, boxes=True, tags=_GPU),
    Case("rtdetr-train", "RT-DETR decoder with denoising", 8, _RTDETR, 500, boxes=True),
    Case("dfine-n1", "D-FINE decoder", 1, _RTDETR, 300, num_points=(3, 6, 3), boxes=True, tags=("gpu", "quick")),
    Case("dfine-nano-n8", "D-FINE nano decoder", 8, _RTDETR[1:], 300, 8, 16, 6, boxes=True, tags=_GPU),
    Case("rfdetr-n1", "RF-DETR decoder", 1, ((36, 36),), 300, 16, 16, 2, boxes=True, tags=_EVERYWHERE),
    Case("rfdetr-train", "RF-DETR decoder in training", 4, ((44, 44),), 3900, 16, 16, 2, boxes=True, tags=_GPU),
    Case("dino-5scale", "DINO 5-scale encoder", 1, ((200, 334), *_DETR), None, tags=_GPU),
    Case("mask2former", "Mask2Former pixel decoder", 4, _MASK2FORMER, None, tags=_GPU),
    Case("bevformer", "BEVFormer spatial cross-attention", 6, _BEVFORMER, 40000, num_points=8, tags=_GPU),
    Case("vit-adapter", "ViT-Adapter extractor", 2, ((64, 64), (32, 32), (16, 16)), 1024, 12),
    Case("heads12-dim64", "ViT-Adapter, wide heads", 2, ((64, 64), (32, 32), (16, 16)), 1024, 12, 64, tags=_GPU),
)  # fmt: skip


def _queries(count: int, batch: int, levels: tuple[tuple[int, int], ...], tag: str) -> Case:
    return Case(f"queries-{count}-n{batch}", f"{count} queries", batch, levels, count, tags=(tag,))


_QUERIES = (
    *(_queries(count, 4, _DETR, "gpu") for count in (100, 300, 1000, 3000, 10000, 17821)),
    *(_queries(count, 1, _DETR, "cpu") for count in (100, 300, 1000, 3000, 10000)),
    *(_queries(count, 1, _SMALL, "quick") for count in (50, 200, 800)),
)
_MODULES = tuple(case for case in _WORKLOADS if case.name in ("encoder-n4", "encoder-n1", "encoder-small"))

CASES = {case.name: case for case in _WORKLOADS}
AnyCase = Case | ModelCase | OpCase

SUITES: dict[str, dict[str, Any]] = {  # of each suite cases of one type
    "msda": CASES,
    "msda-module": {case.name: case for case in _MODULES},
    "msda-queries": {case.name: case for case in _QUERIES},
    "vit": MODELS,
    "vit-ops": OPERATORS,
}
CASE_TYPES: dict[str, type[AnyCase]] = {
    **dict.fromkeys(("msda", "msda-module", "msda-queries"), Case),
    "vit": ModelCase,
    "vit-ops": OpCase,
}


def default_cases(suite: str, device_type: str, quick: bool) -> list[Any]:
    """The cases of a suite that are measured when none is named.

    Args:
        suite: A key of ``SUITES``.
        device_type: ``"cuda"`` or ``"cpu"``.
        quick: Whether it is a quick run.

    Example:
        >>> [case.name for case in default_cases("msda-module", "cpu", quick=True)]
        ['encoder-small']
    """
    tag = "quick" if quick else "gpu" if device_type == "cuda" else "cpu"
    return [case for case in SUITES[suite].values() if tag in case.tags]


class Geometry(NamedTuple):
    """Where the pixels of the levels are, and where the queries look."""

    spatial_shapes: Tensor  # [L, 2] int64
    level_start_index: Tensor  # [L] int64
    reference_points: Tensor  # [N, Lq, L, 2 or 4], float32 (float64 for float64)


class Inputs(NamedTuple):
    """What the providers get, as under autocast: raw outputs of the network in the dtype, coordinates wider.

    Points are ``[..., L, P, 2]``, or ``[..., sum(num_points), 2]`` in a ragged case; logits and weights
    the same without the last axis.
    """

    geometry: Geometry
    value: Tensor  # [N, S, M, D], the dtype
    sampling_offsets: Tensor  # [N, Lq, M, L, P, 2], the dtype
    attention_logits: Tensor  # [N, Lq, M, L, P], the dtype
    sampling_locations: Tensor  # as the offsets, float32 (float64)
    attention_weights: Tensor  # as the logits, float32 (float64)


def geometry(case: Case, references: Tensor) -> Geometry:
    """The geometry of a case with these references, on their device."""
    shapes = torch.tensor(case.levels)
    start = shapes.prod(1).cumsum(0) - shapes.prod(1)
    return Geometry(shapes.to(references.device), start.to(references.device), references)


def draw(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw the inputs of a case as a trained model makes them; the same numbers on every call and device.

    A head's offsets point its own way, further for each point (the initialisation of Deformable DETR), with a
    spread of a pixel: samples lie a few pixels from the reference. References of an encoder are the pixel
    centres, of a decoder random.

    Args:
        case: The workload.
        dtype: Of the value, offsets and logits: float64, float32, float16 or bfloat16.
        device: Where the tensors are put.

    Returns:
        The inputs; none requires a gradient.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    numbers = _numbers(case)
    references = numbers.references.to(device, wide)
    value, offsets, logits = (tensor.to(device).to(dtype) for tensor in numbers[:3])
    weights = logits.to(wide).softmax(-1)
    repeats = torch.tensor(case.points, device=device)
    spread = references.repeat_interleave(repeats, 2)[:, :, None]  # [N, Lq, 1, sum P, 2 or 4]
    if case.boxes:
        scale = spread[..., 2:] * 0.5 / repeats.repeat_interleave(repeats)[:, None]
    else:
        scale = 1 / references.new_tensor([(w, h) for h, w in case.levels]).repeat_interleave(repeats, 0)
    locations = spread[..., :2] + offsets.to(wide) * scale
    if not case.ragged:
        axis = (len(case.levels), case.points[0])
        offsets, locations = offsets.unflatten(3, axis), locations.unflatten(3, axis)
        logits, weights = logits.unflatten(3, axis), weights.unflatten(3, axis)
    return Inputs(geometry(case, references), value, offsets, logits, locations, weights)


class _Numbers(NamedTuple):
    value: Tensor
    offsets: Tensor
    logits: Tensor
    references: Tensor


@lru_cache(maxsize=1)  # the dtypes of a case follow one another
def _numbers(case: Case) -> _Numbers:
    """What a case's inputs are rounded from: float32 on the CPU, points packed into one axis."""
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    references = draw_references(case, generator)
    value = torch.randn(case.batch, case.pixels, case.num_heads, case.head_dim, generator=generator)
    samples = (case.batch, case.queries, case.num_heads, sum(case.points))
    offsets = torch.randn(*samples, 2, generator=generator).add_(_directions(case.num_heads, case.points))
    return _Numbers(value, offsets, torch.randn(*samples, generator=generator), references)


def draw_references(case: Case, generator: torch.Generator) -> Tensor:
    """``[N, Lq, L, 2 or 4]``: the pixel centres in an encoder, random points or boxes in a decoder."""
    if case.num_queries is None:
        grids = [
            torch.stack(torch.meshgrid((torch.arange(w) + 0.5) / w, (torch.arange(h) + 0.5) / h, indexing="xy"), -1)
            for h, w in case.levels
        ]
        centres = torch.cat([grid.flatten(0, 1) for grid in grids]).expand(case.batch, -1, -1)
    else:
        centres = torch.rand(case.batch, case.queries, 2, generator=generator)
    if case.boxes:
        sizes = torch.rand(case.batch, case.queries, 2, generator=generator) * 0.4 + 0.05
        centres = torch.cat([centres, sizes], -1)
    return centres[:, :, None].repeat(1, 1, len(case.levels), 1)


def _directions(heads: int, points: Sequence[int]) -> Tensor:
    """``[M, sum P, 2]``: the offset that point p of head m starts from in Deformable DETR."""
    angle = torch.arange(heads) * (2 * math.pi / heads)
    direction = torch.stack([angle.cos(), angle.sin()], -1)
    direction /= direction.abs().amax(-1, keepdim=True)
    steps = torch.cat([torch.arange(1, p + 1) for p in points])
    return direction[:, None] * steps[:, None]
