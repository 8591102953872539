"""Loops of the CPU path, compiled by Numba: multi-scale deformable attention, sample by sample.

    out[n, q, m] = sum over samples and their corners of  attention * corner weight * value[n, pixel, m]

A corner outside of its level, or of a sample with no finite position, is left out, not given the weight 0: what it
holds may be NaN. Arrays are contiguous and flat, their shapes are in the comments; every loop releases the GIL.

No helper with a branch takes an array: Numba would count references to it, atomically, for every sample.

Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from visionkernels.ops.deformable_attention.cpu_vectors import add_row, dot_rows, gather_rows, prefetch_row


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
def _corners(corners, weights, count, factor, px, py, h, w, first, stride, bilinear):
    """Note the corners of a sample that lie in the level: where their rows begin, and factor times their weight.

    All four are written, and ``count``, which is returned, moves on past those that lie inside: no branches, which
    would be guessed wrong at the edges.
    """
    one, column, line = type(px)(1), _floor(px), _floor(py)
    right, bottom = px - type(px)(column), py - type(px)(line)
    left, top = one - right, one - bottom
    here = first + (line * w + column) * stride
    in_left, in_right = column >= 0, (column + 1 < w) & bilinear
    in_top, in_bottom = line >= 0, (line + 1 < h) & bilinear
    corners[count], weights[count] = here, factor * (left * top)
    count += in_left & in_top
    corners[count], weights[count] = here + stride, factor * (right * top)
    count += in_right & in_top
    corners[count], weights[count] = here + w * stride, factor * (left * bottom)
    count += in_left & in_bottom
    corners[count], weights[count] = here + (w + 1) * stride, factor * (right * bottom)
    return count + (in_right & in_bottom)


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
    stride, point = heads * head_dim, begin * heads * points
    room = 4 * points * heads + 1
    corners, factors, ends = np.empty(room, np.int64), np.empty(room, weights.dtype), np.empty(heads, np.int64)
    for query in range(begin, end):
        count = 0
        for head in range(heads):
            base = query // queries * pixels * stride + head * head_dim
            for level in range(len(levels)):
                h, w, first, number = levels[level, 0], levels[level, 1], levels[level, 2], levels[level, 3]
                x, y, unit_x, unit_y = zero, zero, one, one
                if box:  # else offsets are locations
                    at = (query * reference_levels + min(level, reference_levels - 1)) * box
                    x, y, unit_x, unit_y = references[at], references[at + 1], steps[level, 0], steps[level, 1]
                    if box == 4:
                        unit_x, unit_y = unit_x * references[at + 2], unit_y * references[at + 3]
                for _ in range(number):
                    at_x, at_y, weight = (
                        x + offsets[2 * point] * unit_x,
                        y + offsets[2 * point + 1] * unit_y,
                        weights[point],
                    )
                    point += 1
                    counts, px, py, _, _ = _position(at_x, at_y, h, w, scales[level, 0], scales[level, 1], mode)
                    if counts:
                        before = count
                        count = _corners(
                            corners, factors, count, weight, px, py, h, w, base + first * stride, stride, not mode[2]
                        )
                        for i in range(before, count):
                            prefetch_row(value, corners[i], head_dim)
            ends[head] = count
        count = 0
        for head in range(heads):
            gather_rows(out, (query * heads + head) * head_dim, value, corners, factors, count, ends[head], head_dim)
            count = ends[head]


@_compile
def backward(
    grad_value, grad_offsets, grad_weights, grad_references, grad_output, value, offsets, weights, references,
    levels, scales, steps, sizes, mode, needs, begin, end,
):  # fmt: skip
    """Compute the gradients of the heads, of all images in a row, from ``begin`` to ``end``.

    * grad_value: ``[N, S, M, D]``, added to.
    * grad_offsets: ``[N, Lq, M, K, 2]``, written.
    * grad_weights: ``[N, Lq, M, K]``, written.
    * grad_references: as the references, with an axis of M before: the part of each head, added to.
    * grad_output: ``[N, Lq, M, D]``.
    * needs: whether the gradient of value is needed, those of offsets and weights, that of the references.

    The others are as above. Heads share nothing that is written, and add up in the order of the queries.
    """
    pixels, queries, heads, head_dim, points, reference_levels, box = sizes
    needs_value, needs_points, needs_references = needs
    zero, one, stride = weights.dtype.type(0), weights.dtype.type(1), heads * head_dim
    all_queries = len(grad_output) // stride
    nearest = mode[2]
    for unit in range(begin, end):
        image, head = unit // heads, unit % heads
        base = image * pixels * stride + head * head_dim
        for query in range(image * queries, (image + 1) * queries):
            row = query * heads + head
            grads, point = row * head_dim, row * points
            for level in range(len(levels)):
                h, w, first, number = levels[level, 0], levels[level, 1], levels[level, 2], levels[level, 3]
                x, y, unit_x, unit_y = zero, zero, one, one
                if box:  # else offsets are locations
                    at = (query * reference_levels + min(level, reference_levels - 1)) * box
                    x, y, unit_x, unit_y = references[at], references[at + 1], steps[level, 0], steps[level, 1]
                    if box == 4:
                        unit_x, unit_y = unit_x * references[at + 2], unit_y * references[at + 3]
                sum_x, sum_y, sum_w, sum_h = zero, zero, zero, zero
                for _ in range(number):
                    offset_x, offset_y, weight = offsets[2 * point], offsets[2 * point + 1], weights[point]
                    counts, px, py, free_x, free_y = _position(
                        x + offset_x * unit_x, y + offset_y * unit_y, h, w, scales[level, 0], scales[level, 1], mode
                    )
                    by_x, by_y, by_weight = zero, zero, zero
                    if counts:
                        column, line = _floor(px), _floor(py)
                        right, bottom = px - type(px)(column), py - type(py)(line)
                        for corner in range(1 if nearest else 4):
                            dx, dy = corner & 1, corner >> 1
                            if line + dy < 0 or line + dy >= h or column + dx < 0 or column + dx >= w:
                                continue
                            along_x, along_y = right if dx else one - right, bottom if dy else one - bottom
                            place = base + (first + (line + dy) * w + column + dx) * stride
                            if needs_points:
                                dot = dot_rows(grad_output, grads, value, place, head_dim)
                                by_weight += along_x * along_y * dot
                                by_x += along_y * dot if dx else -along_y * dot
                                by_y += along_x * dot if dy else -along_x * dot
                            if needs_value:
                                add_row(grad_value, place, weight * along_x * along_y, grad_output, grads, head_dim)
                    if needs_points:
                        by_x = by_x * weight * scales[level, 0] if free_x else zero
                        by_y = by_y * weight * scales[level, 1] if free_y else zero
                        grad_offsets[2 * point] = by_x * unit_x if free_x else zero
                        grad_offsets[2 * point + 1] = by_y * unit_y if free_y else zero
                        grad_weights[point] = by_weight
                        sum_x, sum_y = sum_x + by_x, sum_y + by_y
                        if box == 4:
                            if free_x:
                                sum_w += by_x * offset_x * steps[level, 0]
                            if free_y:
                                sum_h += by_y * offset_y * steps[level, 1]
                    point += 1
                if needs_references:
                    at = (head * all_queries + query) * reference_levels + (level if reference_levels > 1 else 0)
                    grad_references[at * box] += sum_x
                    grad_references[at * box + 1] += sum_y
                    if box == 4:
                        grad_references[at * box + 2] += sum_w
                        grad_references[at * box + 3] += sum_h
