"""Loops of the CPU path, compiled by Numba: multi-scale deformable attention, sample by sample.

    out[n, q, m] = sum over samples and their corners of  attention * corner weight * value[n, pixel, m]

A corner outside of its level, or of a sample with no finite position, is left out, not given the weight 0: what it
holds may be NaN. Arrays are contiguous and flat, their shapes are in the comments; every loop releases the GIL.

No helper with a branch takes an array: Numba would count references to it, atomically, for every sample.

Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3.
"""

from __future__ import annotations

import functools
import math

import numba
import numpy as np
from numba import types

from visionkernels.ops.deformable_attention.cpu_vectors import (
    dot_rows,
    flat_array,
    gather_rows,
    load,
    prefetch_row,
    scatter_rows,
    store,
    take_one,
)

_OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
_inline = numba.njit(forceinline=True, **_OPTIONS)


def _compile(function):
    """Compile at the first call, once for each dtype, and keep the code on disk."""
    try:
        return numba.njit(cache=True, **_OPTIONS)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache directory can Numba write
        return numba.njit(**_OPTIONS)(function)


@_inline
def _floor(position):
    """As an integer; ``math.floor`` would be a call."""
    whole = int(position)
    return whole - (position < type(position)(whole))


@_inline
def _position(x, y, h, w, scale_x, scale_y, mode):
    """Where in pixels a sample at location (x, y) reads: does it count, where, does that follow the location."""
    zero, one, half = type(x)(0), type(x)(1), type(x)(0.5)
    border, align_corners, nearest = mode
    width, height = type(x)(w), type(x)(h)  # integers would be compared in float64
    px, py = x * scale_x, y * scale_y
    if not (border or nearest):
        if not align_corners:
            px, py = px - half, py - half
        counts = (px >= -one) & (px < width) & (py >= -one) & (py < height) & (h * w > 0)
        return counts, px, py, counts, counts
    if h * w == 0 or not (math.isfinite(px) and math.isfinite(py)):
        return False, zero, zero, False, False
    if nearest:
        px, py = min(max(px + half, zero), width - one), min(max(py + half, zero), height - one)
        return True, type(x)(int(px)), type(x)(int(py)), False, False
    if not align_corners:
        px, py = px - half, py - half
    # Clamping stops the gradient, on the first and the last pixel as well.
    free_x, free_y = zero < px < width - one, zero < py < height - one
    return True, min(max(px, zero), width - one), min(max(py, zero), height - one), free_x, free_y


@_inline
def _corners(places, factors, count, weight, px, py, h, w, first, stride, bilinear):
    """Note the corners of a sample that lie in the level: where their rows begin, and weight times their own weight.

    Returns:
        ``count``, moved on past them; one bit for each that was noted; how far the sample is from the first corner.
    """
    one, column, line = type(px)(1), _floor(px), _floor(py)
    right, bottom = px - type(px)(column), py - type(px)(line)
    left, top = weight * (one - right), one - bottom
    here, below = first + (line * w + column) * stride, w * stride
    in_left, in_right = column >= 0, (column + 1 < w) & bilinear
    in_top, in_bottom = line >= 0, (line + 1 < h) & bilinear
    if in_left & in_right & in_top & in_bottom:
        store(places, count, here)
        store(factors, count, left * top)
        store(places, count + 1, here + stride)
        store(factors, count + 1, weight * right * top)
        store(places, count + 2, here + below)
        store(factors, count + 2, left * bottom)
        store(places, count + 3, here + below + stride)
        store(factors, count + 3, weight * right * bottom)
        return count + 4, 15, right, bottom
    # All are written, and those outside written over: a branch for each would be guessed wrong.
    store(places, count, here)
    store(factors, count, left * top)
    count += in_left & in_top
    store(places, count, here + stride)
    store(factors, count, weight * right * top)
    count += in_right & in_top
    store(places, count, here + below)
    store(factors, count, left * bottom)
    count += in_left & in_bottom
    store(places, count, here + below + stride)
    store(factors, count, weight * right * bottom)
    count += in_right & in_bottom
    noted = (in_left & in_top) + 2 * (in_right & in_top) + 4 * (in_left & in_bottom) + 8 * (in_right & in_bottom)
    return count, noted, right, bottom


@_compile
def forward(out, value, offsets, weights, references, levels, scales, steps, sizes, mode, begin, end):
    """Compute the output of the queries, of all images in a row, from ``begin`` to ``end``.

    Args:
        out: ``[N, Lq, M, D]``, written.
        value: ``[N, S, M, D]``.
        offsets: ``[N, Lq, M, K, 2]``; locations where there are no references.
        weights: ``[N, Lq, M, K]``, the attention.
        references: ``[N, Lq, 1 or L, 2 or 4]``.
        levels: ``[L, 4]`` int64: h, w, first pixel, points.
        scales: ``[L, 2]``: pixels per unit of location along x and y.
        steps: ``[L, 2]``: location per unit of offset, of the box per unit of offset where references are boxes.
        sizes: S, Lq, M, D, K, levels of the references (1 or L), their last axis (0 where there are none).
        mode: whether the padding is border, corners are aligned, the nearest pixel is read.
        begin: first query.
        end: behind the last query.
    """
    pixels, queries, heads, head_dim, points, reference_levels, box = sizes
    zero, one = weights.dtype.type(0), weights.dtype.type(1)
    stride, room = heads * head_dim, 4 * points  # for the corners of a head
    places, factors = np.empty(heads * room, np.int64), np.empty(heads * room, weights.dtype)
    ends = np.empty(heads, np.int64)
    for query in range(begin, end):
        for head in range(heads):
            store(ends, head, head * room)
        base, k = query // queries * pixels * stride, 0
        for level in range(len(levels) // 4):
            h, w = load(levels, 4 * level), load(levels, 4 * level + 1)
            first, number = load(levels, 4 * level + 2), load(levels, 4 * level + 3)
            scale_x, scale_y = load(scales, 2 * level), load(scales, 2 * level + 1)
            x, y, unit_x, unit_y = zero, zero, one, one
            if box:  # else offsets are locations
                at = (query * reference_levels + min(level, reference_levels - 1)) * box
                x, y = load(references, at), load(references, at + 1)
                unit_x, unit_y = load(steps, 2 * level), load(steps, 2 * level + 1)
                if box == 4:
                    unit_x, unit_y = unit_x * load(references, at + 2), unit_y * load(references, at + 3)
            for head in range(heads):
                row, count = (query * heads + head) * points + k, load(ends, head)
                start = base + first * stride + head * head_dim
                for point in range(row, row + number):
                    at_x, at_y = x + load(offsets, 2 * point) * unit_x, y + load(offsets, 2 * point + 1) * unit_y
                    counts, px, py, _, _ = _position(at_x, at_y, h, w, scale_x, scale_y, mode)
                    if counts:
                        before, weight = count, load(weights, point)
                        count, _, _, _ = _corners(
                            places, factors, count, weight, px, py, h, w, start, stride, not mode[2]
                        )
                        for i in range(before, count):
                            prefetch_row(value, load(places, i), head_dim)
                store(ends, head, count)
            k += number
        for head in range(heads):
            at, begun = (query * heads + head) * head_dim, head * room
            gather_rows(out, at, value, places, factors, begun, load(ends, head), head_dim)


@_compile
def backward(
    grad_value, grad_offsets, grad_weights, grad_references, grad_output, value, offsets, weights, references,
    levels, scales, steps, sizes, mode, needs, begin, end,
):  # fmt: skip
    """Compute the gradients of the heads, of all images in a row, from ``begin`` to ``end``.

    * grad_value: ``[N, S, M, D]``, added to.
    * grad_offsets: ``[N, Lq, M, K, 2]``, written.
    * grad_weights: ``[N, Lq, M, K]``, written; where there are references, what the weights are the softmax of.
    * grad_references: as the references, with an axis of M before: the part of each head, added to.
    * grad_output: ``[N, Lq, M, D]``.
    * needs: whether the gradient of value is needed, those of offsets and weights, that of the references.

    The others are as above. Heads share nothing that is written, and add up in the order of the queries.
    """
    pixels, queries, heads, head_dim, points, reference_levels, box = sizes
    zero, one, stride = weights.dtype.type(0), weights.dtype.type(1), heads * head_dim
    needs_value, needs_points, needs_references = needs
    all_queries = len(grad_output) // stride
    room, dtype = 4 * points, weights.dtype
    places, factors, dots = np.empty(room, np.int64), np.empty(room, dtype), np.empty(room, dtype)
    notes, spots = np.empty(points, np.int64), np.empty((points, 6), dtype)
    for unit in range(begin, end):
        for query in range(unit // heads * queries, (unit // heads + 1) * queries):
            row, count, k = query * heads + unit % heads, 0, 0
            base = unit // heads * pixels * stride + unit % heads * head_dim
            for level in range(len(levels) // 4):
                h, w = load(levels, 4 * level), load(levels, 4 * level + 1)
                first, number = load(levels, 4 * level + 2), load(levels, 4 * level + 3)
                scale_x, scale_y = load(scales, 2 * level), load(scales, 2 * level + 1)
                x, y, unit_x, unit_y = zero, zero, one, one
                if box:  # else offsets are locations
                    at = (query * reference_levels + min(level, reference_levels - 1)) * box
                    x, y = load(references, at), load(references, at + 1)
                    unit_x, unit_y = load(steps, 2 * level), load(steps, 2 * level + 1)
                    if box == 4:
                        unit_x, unit_y = unit_x * load(references, at + 2), unit_y * load(references, at + 3)
                for _ in range(number):
                    point = row * points + k
                    at_x, at_y = x + load(offsets, 2 * point) * unit_x, y + load(offsets, 2 * point + 1) * unit_y
                    counts, px, py, free_x, free_y = _position(at_x, at_y, h, w, scale_x, scale_y, mode)
                    store(notes, k, 0)
                    if counts:
                        before, weight = count, load(weights, point)
                        count, noted, right, bottom = _corners(
                            places, factors, count, weight, px, py, h, w, base + first * stride, stride, not mode[2]
                        )
                        for i in range(before, count):
                            prefetch_row(value, load(places, i), head_dim if needs_points else 0)
                            prefetch_row(grad_value, load(places, i), head_dim if needs_value else 0)
                        store(notes, k, noted + 16 * free_x + 32 * free_y + 64 * level)
                        store(spots, 6 * k, right)
                        store(spots, 6 * k + 1, bottom)
                        store(spots, 6 * k + 2, weight * scale_x)
                        store(spots, 6 * k + 3, weight * scale_y)
                        store(spots, 6 * k + 4, unit_x)
                        store(spots, 6 * k + 5, unit_y)
                    k += 1
            if needs_value:
                scatter_rows(grad_value, places, factors, 0, count, grad_output, row * head_dim, head_dim)
            if needs_points:
                dot_rows(dots, grad_output, row * head_dim, value, places, 0, count, head_dim)
                count, mean = 0, zero
                for k in range(points):
                    noted, point = load(notes, k), row * points + k
                    d00 = load(dots, count) if noted & 1 else zero
                    count += noted & 1
                    d01 = load(dots, count) if noted & 2 else zero
                    count += noted >> 1 & 1
                    d10 = load(dots, count) if noted & 4 else zero
                    count += noted >> 2 & 1
                    d11 = load(dots, count) if noted & 8 else zero
                    count += noted >> 3 & 1
                    right, bottom = load(spots, 6 * k), load(spots, 6 * k + 1)
                    left, top = one - right, one - bottom
                    by_x = (top * (d01 - d00) + bottom * (d11 - d10)) * load(spots, 6 * k + 2)
                    by_y = (left * (d10 - d00) + right * (d11 - d01)) * load(spots, 6 * k + 3)
                    by_weight = top * (left * d00 + right * d01) + bottom * (left * d10 + right * d11)
                    # What did not move the sample gets exactly 0, whatever it would be multiplied by.
                    by_x, by_y = by_x if noted & 16 else zero, by_y if noted & 32 else zero
                    by_weight = by_weight if noted else zero
                    mean += by_weight * load(weights, point)
                    store(grad_weights, point, by_weight)
                    store(grad_offsets, 2 * point, by_x * load(spots, 6 * k + 4) if noted & 16 else zero)
                    store(grad_offsets, 2 * point + 1, by_y * load(spots, 6 * k + 5) if noted & 32 else zero)
                    if needs_references:
                        level = min(noted >> 6, reference_levels - 1)
                        at = (((unit % heads) * all_queries + query) * reference_levels + level) * box
                        store(grad_references, at, load(grad_references, at) + by_x)
                        store(grad_references, at + 1, load(grad_references, at + 1) + by_y)
                        if box == 4 and noted & 16:
                            by_x *= load(offsets, 2 * point) * load(steps, 2 * (noted >> 6))
                            store(grad_references, at + 2, load(grad_references, at + 2) + by_x)
                        if box == 4 and noted & 32:
                            by_y *= load(offsets, 2 * point + 1) * load(steps, 2 * (noted >> 6) + 1)
                            store(grad_references, at + 3, load(grad_references, at + 3) + by_y)
                if box:
                    for point in range(row * points, (row + 1) * points):
                        by_weight = load(grad_weights, point) - mean
                        store(grad_weights, point, by_weight * load(weights, point))


# A job for threads: the next piece, pieces, total; from ARRAYS on address and length of each array; from NUMBERS on
# sizes, mode, and what is needed.
JOB, ARRAYS, NUMBERS = 64, 8, 40


@_inline
def _array(job, number, element):
    at = ARRAYS + 2 * number
    return flat_array(load(job, at), load(job, at + 1), element)


@_inline
def _truths(job, at):
    return load(job, at) != 0, load(job, at + 1) != 0, load(job, at + 2) != 0


@_inline
def _sizes(job):
    first = load(job, NUMBERS), load(job, NUMBERS + 1), load(job, NUMBERS + 2), load(job, NUMBERS + 3)
    return first + (load(job, NUMBERS + 4), load(job, NUMBERS + 5), load(job, NUMBERS + 6))  # noqa: RUF005


def _forward_pieces(f, v):
    """A C function that takes pieces of a job, at an address, until there are none: ``forward`` of these types."""
    n = np.int64(0)

    def run(address):
        job = flat_array(address, JOB, n)
        out, value, offsets, weights = _array(job, 0, f), _array(job, 1, v), _array(job, 2, f), _array(job, 3, f)
        references, levels = _array(job, 4, f), _array(job, 5, n)
        scales, steps = _array(job, 6, f), _array(job, 7, f)
        sizes, mode, pieces, total = _sizes(job), _truths(job, NUMBERS + 7), load(job, 1), load(job, 2)
        piece = take_one(job)
        while piece < pieces:
            begin, end = total * piece // pieces, total * (piece + 1) // pieces
            forward(out, value, offsets, weights, references, levels, scales, steps, sizes, mode, begin, end)
            piece = take_one(job)

    return run


def _backward_pieces(f, v):
    """As ``_forward_pieces``."""
    n = np.int64(0)

    def run(address):
        job = flat_array(address, JOB, n)
        grad_value, grad_offsets, grad_weights = _array(job, 0, f), _array(job, 1, f), _array(job, 2, f)
        grad_references, grad_output, value = _array(job, 3, f), _array(job, 4, f), _array(job, 5, v)
        offsets, weights, references = _array(job, 6, f), _array(job, 7, f), _array(job, 8, f)
        levels, scales, steps = _array(job, 9, n), _array(job, 10, f), _array(job, 11, f)
        sizes, mode, needs = _sizes(job), _truths(job, NUMBERS + 7), _truths(job, NUMBERS + 10)
        pieces, total = load(job, 1), load(job, 2)
        piece = take_one(job)
        while piece < pieces:
            begin, end = total * piece // pieces, total * (piece + 1) // pieces
            backward(
                grad_value, grad_offsets, grad_weights, grad_references, grad_output, value, offsets, weights,
                references, levels, scales, steps, sizes, mode, needs, begin, end,
            )  # fmt: skip
            piece = take_one(job)

    return run


@functools.cache
def pieces(loop, wide: np.dtype, held: np.dtype) -> int:
    """Address of the C function that does pieces of a job.

    Args:
        loop: ``forward`` or ``backward``.
        wide: NumPy's type that is computed in.
        held: NumPy's type of what holds value.
    """
    run = (_forward_pieces if loop is forward else _backward_pieces)(wide.type(0), held.type(0))
    signature, options = types.void(types.intp), {"error_model": "numpy", "fastmath": {"contract"}}
    try:
        compiled = numba.cfunc(signature, cache=True, **options)(run)
    except RuntimeError:  # as in _compile
        compiled = numba.cfunc(signature, **options)(run)
    _kept.append(compiled)
    return compiled.address


_kept: list = []  # the addresses are good as long as these live
