"""Passes of the CPU path over the samples, and the four primitives on rows of value that they stand on.

* The output is ``embedding_bag``: a weighted sum of rows, one bag for a query and head.
* The gradient of value is the same sum transposed: the indices sorted by pixel, then one bag of rows of
  ``grad_output`` for a pixel. Nothing is added atomically, so it is deterministic.
* The gradients of locations and weights need ``<grad_output, pixel>`` at every index: ``sampled_addmm``.

Indices and weights are computed in blocks of queries whose temporaries stay in the L2 cache. Where samples
outnumber pixels (encoders) heads are done one at a time, each from a contiguous copy of its values, for the
cache as well.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor

from visionkernels.ops.deformable_attention.cpu_samples import (
    AnyPoints,
    Block,
    Mode,
    Samples,
    Shapes,
    corner_weights,
    point_gradients,
    sample,
    spread_levels,
)

_BLOCK_POINTS = 2**16  # about ten float32 temporaries of this many points fill an L2 cache of 2 MB
_MIN_HEAD_POINTS = 2**15  # a head with fewer points than this does not repay the calls of its own


def _all_finite(*tensors: Tensor) -> bool:
    sums = (t.sum(dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors)
    return all(math.isfinite(s.item()) for s in sums)


class _Pass:
    """One pass over all samples: unit by unit (an image, or one head of it), in blocks of queries.

    A fast pass reads, with weight 0, pixels that are no corner of any sample. That is exact unless such a
    pixel, or what it is multiplied by, is NaN or infinite, and then so is a result. An exact pass reads a row
    of zeros instead.
    """

    def __init__(self, value: Tensor, shapes: Shapes, points: AnyPoints, mode: Mode, exact: bool) -> None:
        self.value, self.shapes, self.points, self.exact = value, shapes, points, exact
        self.dtype = points.dtype
        images, self.pixels, all_heads, head_dim = value.shape
        _, self.queries, _, self.points_of_head = points.shape
        self.shape = images, self.queries, all_heads, head_dim  # of the output
        self.per_head = self.queries * self.points_of_head >= max(self.pixels, _MIN_HEAD_POINTS)
        self.heads = 1 if self.per_head else all_heads
        self.levels = spread_levels(shapes, points.num_points, self.heads, self.queries, self.dtype, mode)

    def units(self) -> Iterator[tuple[int, slice]]:
        for image in range(self.shape[0]):
            for head in range(0, self.shape[2], self.heads):
                yield image, slice(head, head + self.heads)

    def blocks(self) -> Iterator[slice]:
        step = max(1, _BLOCK_POINTS // (self.heads * self.points_of_head))
        for query in range(0, self.queries, step):
            yield slice(query, min(query + step, self.queries))

    def rows(self, tensor: Tensor, image: int, heads: slice) -> Tensor:
        """The unit's part of ``tensor`` [N, any, M, D], contiguous: [any * H, D]."""
        return tensor[image, :, heads].to(self.dtype).reshape(-1, self.shape[3]).contiguous()

    def value_rows(self, image: int, heads: slice) -> Tensor:
        """The unit's value [S * H, D], and in an exact pass the row of zeros."""
        rows = self.rows(self.value, image, heads)
        return torch.cat([rows, rows.new_zeros(1, self.shape[3])]) if self.exact else rows

    def samples(self, at: Block, *, slopes: bool) -> tuple[Samples, Tensor]:
        """Samples and attention [Q, H, K] of a block."""
        location, attention = self.points.read(at)
        samples = sample(location, self.levels, slopes=slopes, exact=self.exact)
        if samples.outside is not None:  # a sample that does not count does not, whatever its attention is
            attention = attention.masked_fill(samples.outside.all(2), 0)
        return samples, attention


def attend(value: Tensor, shapes: Shapes, points: AnyPoints, mode: Mode) -> Tensor:
    """Compute the output [N, Lq, M * D]."""
    if value.numel() * math.prod(points.shape) == 0:
        return value.new_zeros(value.shape[0], points.shape[1], value.shape[2] * value.shape[3])
    for exact in (False, True):
        work = _Pass(value, shapes, points, mode, exact)
        output = torch.empty(work.shape, dtype=value.dtype)
        for image, heads in work.units():
            rows = work.value_rows(image, heads)
            for queries in work.blocks():
                samples, attention = work.samples((image, queries, heads), slopes=False)
                weights = attention.new_empty(samples.rows.shape)
                corner_weights(attention, samples, out=weights)
                offsets = torch.arange(0, weights.numel(), weights[0, 0].numel(), dtype=samples.rows.dtype)
                sums = _bags(rows, samples.rows, offsets, weights)
                output[image, queries, heads] = sums.view(-1, work.heads, work.shape[3])
        if _all_finite(output):
            break
    return output.flatten(2)


class _Uses:
    """Every use of the rows of a unit, noted block by block, to be summed by row.

    Filed by the first corner of their sample there is a quarter of the indices to sort, but four planes of
    pixels to add up: that is for heads done one at a time, whose samples outnumber their pixels.
    """

    def __init__(self, work: _Pass) -> None:
        self.work, self.by_first = work, work.per_head and not work.exact
        levels, samples = work.levels, (work.queries, work.heads, work.points_of_head)
        corners = *samples[:2], len(levels.corner), samples[2]
        self.index = torch.empty(samples if self.by_first else corners, dtype=levels.line.dtype)
        if self.by_first:
            self.weights = torch.empty((corners[2], *samples), dtype=work.dtype)
            self.corner_weights = self.weights.permute(1, 2, 0, 3)
        else:
            self.weights = torch.empty((1, *corners), dtype=work.dtype)
            self.corner_weights = self.weights[0]

    def add(self, queries: slice, samples: Samples, attention: Tensor) -> None:
        corner_weights(attention, samples, out=self.corner_weights[queries])
        self.index[queries] = samples.rows[:, :, 0] if self.by_first else samples.rows

    def sum(self, grads: Tensor) -> Tensor:
        """The unit's gradient of value [S, H, D] from its ``grad_output`` [Lq * H, D]."""
        rows = self.work.pixels * self.work.heads
        sums = _transposed_bags(grads, self.index.flatten(), self.weights.flatten(1), rows + self.work.exact)
        total = _add_corners(sums, self.work.shapes) if self.by_first else sums[0, :rows]
        return total.view(self.work.pixels, self.work.heads, -1)


def differentiate(
    grad_output: Tensor, value: Tensor, shapes: Shapes, points: AnyPoints, mode: Mode,
    needs_value: bool, needs_points: bool,
) -> Tensor | None:  # fmt: skip
    """Return the gradient of value, and hand those of locations and attention to ``points``."""
    if value.numel() * math.prod(points.shape) == 0:
        points.start_gradients()
        return value.new_zeros(value.shape) if needs_value else None
    for exact in (False, True):
        work = _Pass(value, shapes, points, mode, exact)
        whole = len(value) == 1 and not work.per_head  # one unit: its gradient is the result, no copy
        grad_value = torch.empty(value.shape, dtype=value.dtype) if needs_value and not whole else None
        if needs_points:
            points.start_gradients()
        for image, heads in work.units():
            grads = work.rows(grad_output.reshape(work.shape), image, heads)
            rows = work.value_rows(image, heads) if needs_points else None
            uses = _Uses(work) if needs_value else None
            for queries in work.blocks():
                at = image, queries, heads
                samples, attention = work.samples(at, slopes=needs_points)
                if uses is not None:
                    uses.add(queries, samples, attention)
                if rows is not None:
                    own = grads[queries.start * work.heads : queries.stop * work.heads]
                    products = _dots(own, rows, samples.rows)
                    points.write(at, *point_gradients(products, attention, samples, work.levels))
            if uses is not None and grad_value is not None:
                grad_value[image, :, heads] = uses.sum(grads)
            elif uses is not None:
                grad_value = uses.sum(grads).unsqueeze(0).to(value.dtype)
        if _all_finite(*points.gradients, *(() if grad_value is None else (grad_value,))):
            break
    return grad_value


def _bags(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted ``rows`` [bags, D]; the indices and weights of a bag begin at its offset."""
    return torch.embedding_bag(rows, index.flatten(), offsets, False, 0, False, weights.flatten())[0]


def _transposed_bags(grads: Tensor, index: Tensor, weights: Tensor, rows: int) -> Tensor:
    """Add row ``i // (n // bags)`` of ``grads`` [bags, D], weighted, to row ``index[i]``.

    Args:
        grads: ``[bags, D]``; each bag has the same number of indices.
        index: ``[n]``, int32 or int64.
        weights: ``[planes, n]``.
        rows: how many rows there are.

    Returns:
        ``[planes, rows, D]``, one result for each plane of weights. The order of addition is fixed.
    """
    planes, length = weights.shape
    index, order = torch.sort(index, stable=True)  # int32 of this length are sorted by radix, in parallel
    bag = torch.div(order, length // len(grads), rounding_mode="trunc").to(index.dtype)
    count = torch.bincount(index, minlength=rows)
    start = (count.cumsum(0) - count).to(index.dtype)
    offsets = start + torch.arange(0, planes * length, length, dtype=index.dtype)[:, None]
    sums = _bags(grads, bag.expand(planes, -1), offsets.flatten(), weights.index_select(1, order))
    return sums.view(planes, rows, -1)


def _add_corners(sums: Tensor, shapes: Shapes) -> Tensor:
    """Move ``sums`` [C, S, D], filed by the first corner of a sample, to corner C each and add up: [S, D].

    A shift does it: first corners are never in the last line or column of a level, so nothing wraps around.
    """
    start = 0
    for h, w in shapes:
        dx, dy = int(w > 1), w * int(h > 1)
        first, *others = sums[:, start : start + h * w]
        for step, corner in zip((dx, dy, dx + dy), others, strict=False):  # nearest has no others
            first[step:] += corner[: len(corner) - step]
        start += h * w
    return sums[0]


def _dots(grads: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Inner product of a row of ``grads`` [Q * H, D] and each of its ``rows``, at ``index`` [Q, H, C, K]."""
    _silence_sparse_warning()
    each = index.numel() // len(grads)
    if len(rows) < each:  # sampled_addmm writes beyond the end where a matrix has more entries than places
        rows = torch.cat([rows, rows.new_zeros(each - len(rows), rows.shape[1])])
    crow = torch.arange(0, index.numel() + 1, each, dtype=index.dtype)
    result = _sparse_zeros(crow, index.flatten(), len(rows), rows.dtype)
    torch.sparse.sampled_addmm(result, grads, rows.T, beta=0.0, out=result)
    return result.values().view(index.shape)


def _sparse_zeros(crow: Tensor, column: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """CSR matrix; its columns are in no order and may repeat, which ``sampled_addmm`` does not mind."""
    zeros, size = torch.zeros(column.shape, dtype=dtype), (len(crow) - 1, columns)
    return torch.sparse_csr_tensor(crow, column, zeros, size, check_invariants=False)


@functools.cache
def _silence_sparse_warning() -> None:
    """The first CSR tensor of a process warns that the layout is in beta: make it with the warning off."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support", UserWarning)
        _sparse_zeros(torch.tensor([0, 1]), torch.tensor([0]), 1, torch.float32)
