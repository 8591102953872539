"""Where the samples of the CPU path read and what they weigh; the gradients by location and weight.

A sample reads the 2 x 2 pixels around it. Along x, let ``px`` be its position in pixels and ``c = floor(px)``
moved so that ``c`` and ``c + 1`` both lie inside the level. With the tent ``hat(d) = max(0, 1 - |d|)`` the
columns ``c`` and ``c + 1`` weigh ``hat(px - c)`` and ``hat(px - c - 1)``: the usual bilinear weights, beyond
the edges too and with no mask, because there the tent is 0 in every column of the level. Along y likewise.

Everything is a whole-tensor operation over a block of Q queries, H heads and the K points of all levels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Shapes = Sequence[tuple[int, int]]
Block = tuple[int, slice, slice]  # image, queries, heads: indexes [N, Lq, M, ...]


class Mode(NamedTuple):
    """How to sample; the names are those of ``forward``."""

    padding_mode: str
    align_corners: bool
    method: str


class Levels(NamedTuple):
    """Constants of the levels, spread over the H heads of a unit and their K points; axis 0 is (x, y)."""

    heads: int  # H: the row of a pixel and head is pixel * H + head
    border: bool
    scale: Tensor  # [2, 1, H, K] pixels per unit of location
    shift: float  # position in pixels = location * scale + shift
    end: Tensor  # [2, 1, H, K] the last pixel
    last: Tensor  # [2, 1, H, K] the last pixel that can be the first corner of a sample
    apart: Tensor  # [2, 2, 1, H, K] from the first corner to either: 0; 1, or infinity where a level has one pixel
    line: Tensor  # [H, K] rows from one line of pixels to the next
    start: Tensor  # [H, K] row of the level's first pixel
    corner: list[Tensor]  # C of [H, K]: rows from the first corner to each, y major; C is 4, or 1 for nearest
    spare: int  # a row of zeros after the pixels, there in exact passes


class Samples(NamedTuple):
    """Samples of a block. A is the number of corners along an axis: 2, or 1 for nearest."""

    rows: Tensor  # [Q, H, C, K] rows of value to read
    weights: Tensor  # [A, 2, Q, H, K] of the corner along x, along y
    slopes: Tensor | None  # the same of the derivative of the weight by the position in pixels; None for nearest
    outside: Tensor | None  # [Q, H, C, K] bool: not a corner of the sample; None in fast passes


@functools.lru_cache(maxsize=64)  # it takes a tenth of a decoder's call, and models repeat their sizes
def spread_levels(
    shapes: tuple[tuple[int, int], ...],
    num_points: tuple[int, ...],
    heads: int,
    dtype: torch.dtype,
    integer: torch.dtype,
    mode: Mode,
) -> Levels:
    """Compute the constants for units of ``heads`` heads, in ``dtype`` and, where they count rows, ``integer``."""
    areas = [h * w for h, w in shapes]
    starts = [sum(areas[:level]) for level in range(len(areas))]
    # A level without pixels reads row 0 with all its locations at NaN: nothing, and that in an exact pass.
    levels = [(w, h, s) if h * w else (0, 0, 0) for (h, w), s in zip(shapes, starts, strict=True)]
    points = [level for level, p in zip(levels, num_points, strict=True) for _ in range(p)]
    bilinear = mode.method == "bilinear"
    shorter = 1 if bilinear and mode.align_corners else 0
    sizes = [[w for w, _, _ in points], [h for _, h, _ in points]]
    per_axis = [
        [[n - shorter if n else math.nan for n in axis] for axis in sizes],
        [[max(n - 1, 0) for n in axis] for axis in sizes],
        [[max(n - 2 if bilinear else n - 1, 0) for n in axis] for axis in sizes],
        [[0 for n in axis] for axis in sizes],
        [[1 if n > 1 else math.inf for n in axis] for axis in sizes],
    ]
    steps = [(heads * (w > 1), heads * w * (h > 1)) for w, h, _ in points]
    corners = [(0, dx, dy, dx + dy) if bilinear else (0,) for dx, dy in steps]
    rows = [(heads * w, heads * s, *corner) for (w, _, s), corner in zip(points, corners, strict=True)]
    constants = torch.tensor(per_axis, dtype=dtype, device="cpu")[:, :, None, None]
    scale, end, last, *apart = constants.expand(-1, -1, 1, heads, -1).contiguous()
    per_head = torch.tensor(rows, dtype=integer, device="cpu").T[:, None]
    line, start, *corner = per_head.expand(-1, heads, -1).contiguous()
    return Levels(
        heads=heads,
        border=bilinear and mode.padding_mode == "border",
        scale=scale,
        shift=0.5 if not bilinear else 0.0 if mode.align_corners else -0.5,
        end=end,
        last=last,
        apart=torch.stack(apart),
        line=line,
        start=start + torch.arange(heads, dtype=integer, device="cpu")[:, None],
        corner=corner,
        spare=sum(areas) * heads,
    )


def sample(location: Tensor, levels: Levels, *, slopes: bool, exact: bool) -> Samples:
    """Find the corners of the samples at ``location`` [2, Q, H, K], which is overwritten."""
    bilinear = len(levels.corner) == 4
    position = location.mul_(levels.scale).add_(levels.shift)
    counts = None
    if levels.border or not bilinear:  # x * 0 is NaN where x is not finite; comparisons are many times slower
        counts = (position[0] * 0).add_(position[1] * 0).add_(1).nan_to_num_(nan=0.0)
    position.nan_to_num_(nan=-2.0)  # a place outside of the level; infinity becomes a finite one
    zero = position.new_zeros(())
    if levels.border:
        torch.clamp(position, min=zero, max=levels.end, out=position)
    first = torch.clamp(position, min=zero, max=levels.last).floor_()
    column, row = first.to(levels.line.dtype)
    row.mul_(levels.line).add_(levels.start).add_(column, alpha=levels.heads)
    index = row.new_empty((*row.shape[:2], len(levels.corner), row.shape[2]))
    for c, step in enumerate(levels.corner):
        torch.add(row, step, out=index[:, :, c])
    if bilinear:
        weights, steps, outside = _tents(position, first, counts, levels, slopes=slopes, exact=exact)
    else:
        assert counts is not None
        weights, steps = counts.expand(1, 2, -1, -1, -1), None
        outside = (counts == 0).unsqueeze(2) if exact else None
    if outside is not None:
        index.masked_fill_(outside, levels.spare)
    return Samples(index, weights, steps, outside)


def _tents(
    position: Tensor, first: Tensor, counts: Tensor | None, levels: Levels, *, slopes: bool, exact: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weights, slopes and outside of ``Samples``; positions and first corners are [2, Q, H, K]."""
    distance = position - first
    weights = _hat(distance - levels.apart)
    if counts is not None:
        weights[:, 1] *= counts
    if not (slopes or exact):
        return weights, None, None
    # The derivative from the right, from the cell that the sample is in: 1 in cell -1, -1 in cell 0, else 0.
    cell = distance.floor_() - levels.apart
    steps = _hat(cell + 1).sub_(_hat(cell))
    outside = None
    if exact:
        inside = torch.stack([(y[1] != 0) & (x[0] != 0) for y in steps for x in steps], 2)
        outside = ~inside if counts is None else ~inside | (counts == 0).unsqueeze(2)
    if levels.border:  # clamping stops the gradient, on the first and the last pixel as well
        assert counts is not None
        steps *= torch.sign(position).mul_(torch.sign(levels.end - position)).mul_(counts)
    return weights, steps, outside


def _hat(distance: Tensor) -> Tensor:
    return (1 - distance.abs()).relu_()


def corner_weights(attention: Tensor, samples: Samples, out: Tensor) -> None:
    """Write attention [Q, H, K] times the weight of every corner to ``out`` [Q, H, C, K]."""
    for i, y in enumerate(samples.weights):
        along_y = attention * y[1]
        for j, x in enumerate(samples.weights):
            torch.mul(along_y, x[0], out=out[:, :, len(samples.weights) * i + j])
    if samples.outside is not None:
        out.masked_fill_(samples.outside, 0)


def point_gradients(dots: Tensor, attention: Tensor, samples: Samples, levels: Levels) -> tuple[Tensor, Tensor]:
    """Gradients of locations [2, Q, H, K] and attention [Q, H, K] from <grad_output, corner> [Q, H, C, K]."""
    if samples.outside is not None:
        dots = dots.masked_fill(samples.outside, 0)
    if samples.slopes is None:
        return attention.new_zeros((2, *attention.shape)), dots[:, :, 0] * samples.weights[0, 0]
    (x0, y0), (x1, y1) = samples.weights
    (dx0, dy0), (dx1, dy1) = samples.slopes
    d00, d01, d10, d11 = dots.unbind(2)
    location = torch.empty_like(samples.slopes[0])
    top, bottom = (dx0 * d00).addcmul_(dx1, d01), (dx0 * d10).addcmul_(dx1, d11)
    torch.mul(y0, top, out=location[0]).addcmul_(y1, bottom)
    top, bottom = (x0 * d00).addcmul_(x1, d01), (x0 * d10).addcmul_(x1, d11)
    torch.mul(dy0, top, out=location[1]).addcmul_(dy1, bottom)
    location.mul_(attention).mul_(levels.scale)
    if samples.outside is not None:  # no slope, no gradient: whatever the slopes were multiplied by
        location.masked_fill_((samples.slopes[0] == 0) & (samples.slopes[1] == 0), 0)
    return location, (y0 * top).addcmul_(y1, bottom)


class Points:
    """Sampling locations [N, Lq, M, K, 2] and attention weights [N, Lq, M, K] as they are given."""

    def __init__(self, locations: Tensor, weights: Tensor, num_points: Sequence[int], value_dtype: torch.dtype) -> None:
        self.locations, self.weights = locations, weights
        self.dtype = _widest(value_dtype, locations.dtype, weights.dtype)
        self.shape, self.num_points = weights.shape, list(num_points)
        self.gradients: tuple[Tensor, ...] = ()

    def start_gradients(self) -> None:
        """Make room for the gradients of locations and weights."""
        self.gradients = tuple(t.new_zeros(t.shape) for t in (self.locations, self.weights))

    def read(self, at: Block) -> tuple[Tensor, Tensor]:
        """Locations [2, Q, H, K], in a new tensor, and attention [Q, H, K]."""
        return _axis_first(self.locations[at], self.dtype), self.weights[at].to(self.dtype)

    def write(self, at: Block, location: Tensor, attention: Tensor) -> None:
        """Take the gradients of what ``read`` returns."""
        grad_locations, grad_weights = self.gradients
        grad_locations[at] = location.movedim(0, -1)
        grad_weights[at] = attention


class FusedPoints:
    """Sampling locations from references [N, Lq, L or 1, 2 or 4] and offsets, attention from logits."""

    def __init__(
        self, references: Tensor, offsets: Tensor, logits: Tensor,
        shapes: Shapes, num_points: Sequence[int], value_dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.references, self.offsets, self.logits = references, offsets, logits
        self.dtype = _widest(value_dtype, references.dtype, offsets.dtype, logits.dtype)
        self.shape, self.num_points = logits.shape, list(num_points)
        self.gradients: tuple[Tensor, ...] = ()
        counts = torch.tensor(self.num_points, dtype=torch.int64, device="cpu")
        self.level = torch.repeat_interleave(counts)
        if references.shape[3] == 2:
            sizes = torch.tensor([(w, h) for h, w in shapes], dtype=self.dtype, device="cpu")
            step = 1 / sizes.view(-1, 2)  # also where there are no levels
        else:
            step = 0.5 / counts.to(self.dtype)[:, None]
        self.step = step[self.level].T[:, None, None]  # [2 or 1, 1, 1, K]

    def start_gradients(self) -> None:
        """Make room for the gradients of references (sums: in the wide dtype), offsets and logits."""
        self.gradients = (
            self.references.new_zeros(self.references.shape, dtype=self.dtype),
            self.offsets.new_zeros(self.offsets.shape),
            self.logits.new_zeros(self.logits.shape),
        )

    def _origin_and_unit(self, at: Block) -> tuple[Tensor, Tensor]:
        """Location at offset 0 [2, Q, 1, K or 1], and how far an offset of 1 moves it."""
        references = self.references[at[:2]].to(self.dtype).permute(2, 0, 1).unsqueeze(2)
        if references.shape[3] > 1:
            references = references.index_select(3, self.level)
        return references[:2], self.step if len(references) == 2 else self.step * references[2:]

    def read(self, at: Block) -> tuple[Tensor, Tensor]:
        """As ``Points.read``."""
        origin, unit = self._origin_and_unit(at)
        location = _axis_first(self.offsets[at], self.dtype).mul_(unit).add_(origin)
        return location, self.logits[at].to(self.dtype).softmax(-1)

    def write(self, at: Block, location: Tensor, attention: Tensor) -> None:
        """As ``Points.write``. What is not finite made ``location`` 0 and must not meet it: 0 * inf = NaN."""
        grad_references, grad_offsets, grad_logits = self.gradients
        unit = self._origin_and_unit(at)[1].nan_to_num(0.0, 0.0, 0.0)
        grad_offsets[at] = (location * unit).movedim(0, -1)
        weights = self.logits[at].to(self.dtype).softmax(-1)
        attention = attention * weights
        grad_logits[at] = attention - weights * attention.sum(-1, keepdim=True)
        if self.references.shape[3] == 4:
            offset = _axis_first(self.offsets[at], self.dtype).nan_to_num_(0.0, 0.0, 0.0)
            location = torch.cat([location, location * offset * self.step])
        per_point = location.sum(2)  # [2 or 4, Q, K]
        points = self.num_points if self.references.shape[2] > 1 else [self.shape[3]]
        per_level = torch.stack([p.sum(2) for p in per_point.split(points, 2)], 2)
        grad_references[at[:2]] += per_level.permute(1, 2, 0)


AnyPoints = Points | FusedPoints


def _widest(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _axis_first(points: Tensor, dtype: torch.dtype) -> Tensor:
    return points.new_empty((2, *points.shape[:3]), dtype=dtype).copy_(points.movedim(-1, 0))
