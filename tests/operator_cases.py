"""Calls of the operator as data, and inputs whose gradients exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, without its tensors. ``num_points`` as a number: the same for every level, and not packed."""

    shapes: tuple[tuple[int, int], ...] = ((4, 6), (3, 2))
    batch: int = 2
    queries: int = 3
    heads: int = 2
    head_dim: int = 4
    num_points: int | tuple[int, ...] = 2
    padding_mode: str = "zeros"
    align_corners: bool = False
    method: str = "bilinear"
    dtype: torch.dtype = torch.float32
    location_dtype: torch.dtype | None = None  # None: as the value
    weight_dtype: torch.dtype | None = None
    reference_size: int = 2
    reference_levels: int = 1  # 0: references without a level axis
    masked: bool = False

    @property
    def points(self) -> list[int]:
        """Points of each level."""
        return [self.num_points] * len(self.shapes) if isinstance(self.num_points, int) else list(self.num_points)

    @property
    def pixels(self) -> int:
        """S."""
        return sum(h * w for h, w in self.shapes)

    @property
    def options(self) -> dict:
        """Keywords of the unfused call."""
        packed = None if isinstance(self.num_points, int) else list(self.num_points)
        return {
            "padding_mode": self.padding_mode,
            "align_corners": self.align_corners,
            "num_points": packed,
            "method": self.method,
        }

    @property
    def fused_options(self) -> dict:
        """Keywords of the fused call, without the mask."""
        return {name: option for name, option in self.options.items() if name != "method"}

    def split(self, packed: Tensor, axis: int = 3) -> Tensor:
        """Give the points, packed along ``axis``, their level axis back where the case has one."""
        if isinstance(self.num_points, int):
            return packed.unflatten(axis, (len(self.shapes), self.num_points))
        return packed


def make_inputs(case: Case, device: torch.device | str = "cpu") -> list[Tensor]:
    """Leaves value, locations and weights."""
    locations = make_locations(case)
    weights = torch.rand(locations.shape[:-1], dtype=torch.float64).mul_(2).sub_(0.5)
    value = torch.randn(case.batch, case.pixels, case.heads, case.head_dim, dtype=torch.float64)
    return [
        _leaf(value, case.dtype, device),
        _leaf(case.split(locations), case.location_dtype or case.dtype, device),
        _leaf(case.split(weights), case.weight_dtype or case.location_dtype or case.dtype, device),
    ]


def make_fused_inputs(case: Case, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """Leaves value, references, offsets and logits; and the mask, False where the value holds NaN."""
    value, _, _ = make_inputs(case, "cpu")
    levels = max(case.reference_levels, 1)
    references = torch.rand(case.batch, case.queries, levels, case.reference_size, dtype=torch.float64)
    references[..., 2:] = references[..., 2:] * 0.5 + 0.25
    spread = spread_references(references, case.points)
    packed = make_locations(case)
    if case.reference_size == 2:
        offsets = (packed - spread) * level_sizes(case)
    else:
        offsets = (packed - spread[..., :2]) / (0.5 * spread[..., 2:]) * points_of_sample(case)
    logits = torch.randn(packed.shape[:-1], dtype=torch.float64) * 2
    mask = None
    if case.masked:
        mask = torch.rand(case.batch, case.pixels) > 0.3
        value = value.detach().masked_fill(~mask[:, :, None, None], torch.nan)
        mask = mask.to(device)
    dtype = case.location_dtype or case.dtype
    leaves = [
        _leaf(value, case.dtype, device),
        _leaf(references if case.reference_levels else references[:, :, 0], dtype, device),
        _leaf(case.split(offsets), dtype, device),
        _leaf(case.split(logits), case.weight_dtype or dtype, device),
    ]
    return leaves, mask


def make_locations(case: Case) -> Tensor:
    """Packed float64 locations, inside and outside, away from the steps of their own gradient.

    Between two pixels the derivative by the location is constant and on a pixel it jumps: there two correct programs
    may differ, so no coordinate lies within a quarter of a pixel of one. For nearest the same holds of its rounding.
    """
    shape = (case.batch, case.queries, case.heads, sum(case.points), 2)
    sizes = level_sizes(case)
    scale = sizes - 1 if case.align_corners else sizes
    shift = 0.0 if case.align_corners else -0.5
    cell = (torch.rand(shape, dtype=torch.float64) * (sizes + 2)).floor() - 1.5  # from outside to outside
    pixel = cell.floor() + 0.25 + 0.5 * torch.rand(shape, dtype=torch.float64)
    return (pixel - shift) / scale.clamp(min=1)


def level_sizes(case: Case) -> Tensor:
    """(w, h) of the level of every sample, [K, 2]."""
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64).reshape(-1, 2)
    return sizes.repeat_interleave(torch.tensor(case.points), 0).clamp(min=1)


def points_of_sample(case: Case) -> Tensor:
    points = torch.tensor(case.points)
    return points.repeat_interleave(points)[:, None]


def spread_references(references: Tensor, points: Sequence[int]) -> Tensor:
    """References ``[N, Lq, 1 or L, R]`` for every sample: ``[N, Lq, 1, K, R]``."""
    references = references.expand(-1, -1, len(points), -1)
    return references.repeat_interleave(torch.tensor(points, device=references.device), 2)[:, :, None]


def _leaf(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return tensor.detach().to(dtype).to(device, copy=True).requires_grad_()
