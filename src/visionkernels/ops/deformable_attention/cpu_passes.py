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
        points_of_all = self.queries * self.points_of_head
        self.dense = points_of_all >= self.pixels
        self.per_head = self.dense and points_of_all >= _MIN_HEAD_POINTS
        self.heads = 1 if self.per_head else all_heads
        # int32 halves the bytes of every index. The offsets of embedding_bag count up to four indices a point.
        largest = 4 * self.heads * max(self.pixels + 1, points_of_all)
        integer = torch.int32 if largest < 2**31 else torch.int64
        self.levels = spread_levels(
            tuple((h, w) for h, w in shapes), tuple(points.num_points), self.heads, self.dtype, integer, mode
        )

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
        result = value.new_empty(*work.shape[:2], work.shape[2] * work.shape[3])
        output = result.view(work.shape)  # a view of what is returned, which must be no view itself
        for image, heads in work.units():
            rows = work.value_rows(image, heads)
            for queries in work.blocks():
                samples, attention = work.samples((image, queries, heads), slopes=False)
                weights = attention.new_empty(samples.rows.shape)
                corner_weights(attention, samples, out=weights)
                offsets = torch.arange(
                    0, weights.numel(), weights[0, 0].numel(), dtype=samples.rows.dtype, device="cpu"
                )
                sums = _bags(rows, samples.rows, offsets, weights)
                output[image, queries, heads] = sums.view(-1, work.heads, work.shape[3])
        if _all_finite(result):
            break
    return result


class _Uses:
    """Every use of the pixels of a unit, noted block by block, to be summed by pixel and head. Heads come first.

    Filed by the first corner of their sample there is a quarter of the uses to sort, but four planes of pixels
    to add up: that is for samples that outnumber the pixels.
    """

    def __init__(self, work: _Pass) -> None:
        self.work, self.by_first = work, work.dense and not work.exact
        levels, samples = work.levels, (work.heads, work.queries, work.points_of_head)
        corners = *samples[:2], len(levels.corner), samples[2]
        # A radix sort of int16 takes half the passes of int32.
        integer = torch.int16 if work.pixels < 2**15 else levels.line.dtype
        self.pixels = work.value.new_empty(samples if self.by_first else corners, dtype=integer)
        if self.by_first:
            self.weights = work.value.new_empty((corners[2], *samples), dtype=work.dtype)
            self.corner_weights = self.weights.permute(2, 1, 0, 3)  # [Lq, H, C, K]
        else:
            self.weights = work.value.new_empty((1, *corners), dtype=work.dtype)
            self.corner_weights = self.weights[0].transpose(0, 1)

    def add(self, queries: slice, samples: Samples, attention: Tensor) -> None:
        corner_weights(attention, samples, out=self.corner_weights[queries])
        rows = samples.rows[:, :, 0] if self.by_first else samples.rows
        pixels = self.pixels[:, queries].transpose(0, 1)
        torch.div(rows, self.work.heads, rounding_mode="trunc", out=pixels)

    def sum(self, grads: Tensor) -> Tensor:
        """The unit's gradient of value [S, H, D] from its ``grad_output`` [Lq * H, D]."""
        work = self.work
        grads = grads.view(work.queries, work.heads, -1).transpose(0, 1).flatten(0, 1)
        pixels, weights = self.pixels.flatten(1), self.weights.flatten(1)
        sums = _transposed_bags(grads, pixels, weights, work.pixels + work.exact, work.levels.line.dtype)
        total = _add_corners(sums, work.shapes, work.heads) if self.by_first else sums[0]
        return total.view(-1, work.heads, work.shape[3])[: work.pixels]


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
        whole = len(value) == 1 and not work.dense  # one unit, whose sums are the result: no copy
        grad_value = value.new_empty(value.shape) if needs_value and not whole else None
        # Of the gradient of value it is cheaper to check the factors.
        finite = not needs_value or _all_finite(grad_output)
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
            if uses is not None:
                finite = finite and _all_finite(uses.weights)
            if uses is not None and grad_value is not None:
                grad_value[image, :, heads] = uses.sum(grads)
            elif uses is not None:
                grad_value = uses.sum(grads).unsqueeze(0).to(value.dtype)
        if finite and _all_finite(*points.gradients):
            break
    return grad_value


def _bags(rows: Tensor, index: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    """Sums of weighted ``rows`` [bags, D]; the indices and weights of a bag begin at its offset."""
    return torch.embedding_bag(rows, index.flatten(), offsets, False, 0, False, weights.flatten())[0]


def _transposed_bags(grads: Tensor, pixels: Tensor, weights: Tensor, num_pixels: int, integer: torch.dtype) -> Tensor:
    """Add up rows of ``grads``, weighted, by pixel and head.

    Args:
        grads: ``[H * Lq, D]``.
        pixels: ``[H, n]``, equally many for each row of ``grads``, in its order.
        weights: ``[planes, H * n]``.
        num_pixels: S.
        integer: int32, or int64 where there are more indices than that can count.

    Returns:
        ``[planes, S * H, D]``, one result for each plane of weights. The order of addition is fixed.
    """
    heads, (planes, length) = len(pixels), weights.shape
    order = torch.sort(pixels.flatten(), stable=True)[1]  # heads came first: within a pixel they are in order
    bag = torch.div(order.to(integer), length // len(grads), rounding_mode="trunc")
    rows = pixels.to(integer) * heads + torch.arange(heads, dtype=integer, device="cpu")[:, None]
    count = torch.bincount(rows.flatten(), minlength=num_pixels * heads).to(integer)
    start = count.cumsum(0, dtype=integer).sub_(count)
    offsets = start + torch.arange(0, planes * length, length, dtype=integer, device="cpu")[:, None]
    sums = _bags(grads, bag.expand(planes, -1), offsets.flatten(), weights.index_select(1, order))
    return sums.view(planes, num_pixels * heads, -1)


def _add_corners(sums: Tensor, shapes: Shapes, heads: int) -> Tensor:
    """Move ``sums`` [C, S * H, D], filed by the first corner of a sample, to corner C each and add up.

    A shift does it: first corners are never in the last line or column of a level, so nothing wraps around.
    """
    start = 0
    for h, w in shapes:
        dx, dy = heads * (w > 1), heads * w * (h > 1)
        first, *others = sums[:, start : start + h * w * heads]
        for step, corner in zip((dx, dy, dx + dy), others, strict=False):  # nearest has no others
            first[step:] += corner[: len(corner) - step]
        start += h * w * heads
    return sums[0]


def _dots(grads: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """Inner product of a row of ``grads`` [Q * H, D] and each of its ``rows``, at ``index`` [Q, H, C, K]."""
    _silence_sparse_warning()
    each = index.numel() // len(grads)
    if len(rows) < each:  # sampled_addmm writes beyond the end where a matrix has more entries than places
        rows = torch.cat([rows, rows.new_zeros(each - len(rows), rows.shape[1])])
    crow = torch.arange(0, index.numel() + 1, each, dtype=index.dtype, device="cpu")
    result = _sparse_zeros(crow, index.flatten(), len(rows), rows.dtype)
    torch.sparse.sampled_addmm(result, grads, rows.T, beta=0.0, out=result)
    return result.values().view(index.shape)


def _sparse_zeros(crow: Tensor, column: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """CSR matrix; its columns are in no order and may repeat, which ``sampled_addmm`` does not mind."""
    zeros, size = column.new_zeros(column.shape, dtype=dtype), (len(crow) - 1, columns)
    return torch.sparse_csr_tensor(crow, column, zeros, size, device=column.device, check_invariants=False)


@functools.cache
def _silence_sparse_warning() -> None:
    """The first CSR tensor of a process warns that the layout is in beta, and that it is not checked."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)", UserWarning)
        crow = torch.arange(2, device="cpu")
        _sparse_zeros(crow, crow[:1], 1, torch.float32)
