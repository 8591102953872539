"""Loops of the CPU path, compiled by Numba: multi-scale deformable attention, sample by sample.

    out[n, q, m] = sum over samples and their corners of  attention * corner weight * value[n, pixel, m]

A corner outside of its level, or of a sample with no finite position, is left out, not given the weight 0: what it holds
may be NaN. Arrays are contiguous and flat, their shapes are in the comments; every loop releases the GIL.

Rows of channels are read as vectors, in LLVM's own terms: the compiler cannot prove that rows do not overlap, and would
leave such loops scalar. Halves are widened in registers: uint16 holds bfloat16, int16 holds float16.

Everything compiled is in this file: Numba's cache of compiled code is renewed when the file itself changes.

Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3.
"""

from __future__ import annotations

import math

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I32 = ir.IntType(32)
_SUM = ("contract", "nsz", "reassoc")  # any order; never nnan or ninf: NaN and infinity are data


def _compiled(function):
    """Compile at the first call, once for each dtype, and keep the code on disk."""
    options = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither beside this file nor in the user's cache directory can Numba write
        return numba.njit(**options)(function)


# Vectors of `width` channels


def _wide(context, array):
    """The type that is computed in, and its bytes."""
    return context.get_data_type(array.dtype), array.dtype.bitwidth // 8


def _at(builder, data, index, width):
    vector = ir.VectorType(data.type.pointee, width)
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


def _load(builder, dtype, data, index, width, wide):
    loaded = builder.load(_at(builder, data, index, width), align=dtype.bitwidth // 8)
    if dtype == types.uint16:
        bits = builder.zext(loaded, ir.VectorType(_I32, width))
        bits = builder.shl(bits, ir.Constant(bits.type, [16] * width))
        return builder.bitcast(bits, ir.VectorType(wide, width))
    if dtype == types.int16:
        half = builder.bitcast(loaded, ir.VectorType(ir.HalfType(), width))
        return builder.fpext(half, ir.VectorType(wide, width))
    return loaded


def _spread(builder, scalar, width):
    vector = ir.VectorType(scalar.type, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _data(context, builder, signature, arguments):
    """Arguments with arrays as pointers to their data."""
    return [
        context.make_array(kind)(context, builder, argument).data if isinstance(kind, types.Array) else argument
        for kind, argument in zip(signature.args, arguments, strict=True)
    ]


def _make_gather(width):
    @intrinsic
    def gather(typing, out, at, value, base, offsets, factors, count):
        """Store the sum over i < count of ``factors[i] * value[base + offsets[i]]`` at ``out[at]``."""

        def generate(context, builder, signature, arguments):
            out, at, value, base, offsets, factors, count = _data(context, builder, signature, arguments)
            wide, size = _wide(context, signature.args[0])
            total = cgutils.alloca_once_value(builder, ir.Constant(ir.VectorType(wide, width), [0.0] * width))

            def add(i, so_far):
                place = builder.add(base, builder.load(builder.gep(offsets, [i])))
                row = _load(builder, signature.args[2].dtype, value, place, width, wide)
                factor = _spread(builder, builder.load(builder.gep(factors, [i])), width)
                product = builder.fmul(row, factor, flags=_SUM)
                return product if so_far is None else builder.fadd(so_far, product, flags=_SUM)

            zero, one, four, multiple = (ir.Constant(count.type, n) for n in (0, 1, 4, -4))
            fours = builder.and_(count, multiple)
            with cgutils.for_range_slice(builder, zero, fours, four) as (i, _):
                part = None  # a sum of its own: the next four need not wait for it
                for step in range(4):
                    part = add(builder.add(i, ir.Constant(i.type, step)), part)
                builder.store(builder.fadd(builder.load(total), part, flags=("contract",)), total)
            with cgutils.for_range_slice(builder, fours, count, one) as (i, _):
                builder.store(add(i, builder.load(total)), total)
            builder.store(builder.load(total), _at(builder, out, at, width), align=size)
            return context.get_dummy_value()

        return types.void(out, types.intp, value, types.intp, offsets, factors, types.intp), generate

    return gather


def _make_dot(width):
    @intrinsic
    def dot(typing, grads, at, value, place):
        """Inner product of ``grads[at]`` and ``value[place]``."""

        def generate(context, builder, signature, arguments):
            grads, at, value, place = _data(context, builder, signature, arguments)
            wide, size = _wide(context, signature.args[0])
            left = _load(builder, signature.args[0].dtype, grads, at, width, wide)
            right = _load(builder, signature.args[2].dtype, value, place, width, wide)
            reduce = ir.FunctionType(wide, [wide, left.type])
            name = f"llvm.vector.reduce.fadd.v{width}f{8 * size}"
            reduce = cgutils.get_or_insert_function(builder.module, reduce, name)
            product = builder.fmul(left, right, flags=_SUM)
            return builder.call(reduce, [ir.Constant(wide, 0.0), product], fastmath=_SUM)

        return grads.dtype(grads, types.intp, value, types.intp), generate

    return dot


def _make_add(width):
    @intrinsic
    def add(typing, sums, place, factor, grads, at):
        """Add ``factor * grads[at]`` to ``sums[place]``."""

        def generate(context, builder, signature, arguments):
            sums, place, factor, grads, at = _data(context, builder, signature, arguments)
            wide, size = _wide(context, signature.args[0])
            dtype = signature.args[0].dtype
            product = _load(builder, dtype, grads, at, width, wide)
            product = builder.fmul(product, _spread(builder, factor, width), flags=_SUM)
            total = builder.fadd(_load(builder, dtype, sums, place, width, wide), product, flags=_SUM)
            builder.store(total, _at(builder, sums, place, width), align=size)
            return context.get_dummy_value()

        return types.void(sums, types.intp, sums.dtype, grads, types.intp), generate

    return add


_gather32, _gather8, _gather1 = (_make_gather(width) for width in (32, 8, 1))
_dot32, _dot8, _dot1 = (_make_dot(width) for width in (32, 8, 1))
_add32, _add8, _add1 = (_make_add(width) for width in (32, 8, 1))


@_compiled
def _gather_row(out, at, value, base, offsets, factors, count, channels):
    done = 0
    while done + 32 <= channels:
        _gather32(out, at + done, value, base + done, offsets, factors, count)
        done += 32
    while done + 8 <= channels:
        _gather8(out, at + done, value, base + done, offsets, factors, count)
        done += 8
    while done < channels:
        _gather1(out, at + done, value, base + done, offsets, factors, count)
        done += 1


@_compiled
def _dot_row(grads, at, value, place, channels):
    total, done = grads.dtype.type(0), 0
    while done + 32 <= channels:
        total += _dot32(grads, at + done, value, place + done)
        done += 32
    while done + 8 <= channels:
        total += _dot8(grads, at + done, value, place + done)
        done += 8
    while done < channels:
        total += _dot1(grads, at + done, value, place + done)
        done += 1
    return total


@_compiled
def _add_row(sums, place, factor, grads, at, channels):
    done = 0
    while done + 32 <= channels:
        _add32(sums, place + done, factor, grads, at + done)
        done += 32
    while done + 8 <= channels:
        _add8(sums, place + done, factor, grads, at + done)
        done += 8
    while done < channels:
        _add1(sums, place + done, factor, grads, at + done)
        done += 1


# Samples


@_compiled
def _place(x, y, h, w, scale_x, scale_y, mode):
    """Place a sample at location (x, y): whether it counts, its first corner, how far it is beyond, what moves it.

    Returns:
        Whether it counts; column and line of the first corner, which may be -1; the distance from it along x and y,
        0 to 1; whether the position follows the location along x and along y.
    """
    zero, half = type(x)(0), type(x)(0.5)
    border, align_corners, nearest = mode
    px, py = x * scale_x, y * scale_y
    if h == 0 or w == 0 or not (math.isfinite(px) and math.isfinite(py)):
        return False, 0, 0, zero, zero, False, False
    if nearest:
        column = int(min(max(px + half, zero), type(x)(w - 1)))
        line = int(min(max(py + half, zero), type(x)(h - 1)))
        return True, column, line, zero, zero, False, False
    if not align_corners:
        px, py = px - half, py - half
    free_x, free_y = True, True
    if border:  # clamping stops the gradient, on the first and the last pixel as well
        last_x, last_y = type(x)(w - 1), type(x)(h - 1)
        free_x, free_y = zero < px < last_x, zero < py < last_y
        px, py = min(max(px, zero), last_x), min(max(py, zero), last_y)
    elif not (px >= -1 and px < w and py >= -1 and py < h):
        return False, 0, 0, zero, zero, False, False
    column, line = math.floor(px), math.floor(py)
    return True, column, line, px - type(x)(column), py - type(x)(line), free_x, free_y


@_compiled
def _origin(references, steps, query, level, sizes):
    """Location at offset 0, and how far an offset of 1 moves it, along x and y."""
    _, _, _, _, _, reference_levels, box = sizes
    if box == 0:  # offsets are locations
        return steps.dtype.type(0), steps.dtype.type(0), steps.dtype.type(1), steps.dtype.type(1)
    at = (query * reference_levels + (level if reference_levels > 1 else 0)) * box
    unit_x, unit_y = steps[level, 0], steps[level, 1]
    if box == 4:
        unit_x, unit_y = unit_x * references[at + 2], unit_y * references[at + 3]
    return references[at], references[at + 1], unit_x, unit_y


@_compiled
def forward(out, value, offsets, weights, references, levels, scales, steps, sizes, mode, begin, end):
    """Compute the output of the rows (image, query, head) from ``begin`` to ``end``.

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
        begin: first row.
        end: behind the last row.
    """
    pixels, queries, heads, head_dim, points, _, _ = sizes
    nearest = mode[2]
    one, point = weights.dtype.type(1), begin * points
    places, factors = np.empty(4 * points, np.int64), np.empty(4 * points, weights.dtype)
    for row in range(begin, end):
        query, count = row // heads, 0
        base = (query // queries * pixels * heads + row % heads) * head_dim
        for level in range(len(levels)):
            h, w, first, number = levels[level]
            x, y, unit_x, unit_y = _origin(references, steps, query, level, sizes)
            for _ in range(number):
                at_x, at_y, weight = x + offsets[2 * point] * unit_x, y + offsets[2 * point + 1] * unit_y, weights[point]
                point += 1
                counts, column, line, beyond_x, beyond_y, _, _ = _place(
                    at_x, at_y, h, w, scales[level, 0], scales[level, 1], mode
                )
                if not counts:
                    continue
                for dy in range(1 if nearest else 2):
                    if line + dy < 0 or line + dy >= h:
                        continue
                    weight_y = weight * (beyond_y if dy else one - beyond_y)
                    for dx in range(1 if nearest else 2):
                        if column + dx < 0 or column + dx >= w:
                            continue
                        places[count] = (first + (line + dy) * w + column + dx) * heads * head_dim
                        factors[count] = weight_y * (beyond_x if dx else one - beyond_x)
                        count += 1
        _gather_row(out, row * head_dim, value, base, places, factors, count, head_dim)


@_compiled
def backward(
    grad_value, grad_offsets, grad_weights, grad_references, grad_output, value, offsets, weights, references,
    levels, scales, steps, sizes, mode, needs, begin, end,
):  # fmt: skip
    """Compute the gradients of the heads (image, head) from ``begin`` to ``end``; the other arguments are as above.

    Args:
        grad_value: ``[N, S, M, D]``, added to.
        grad_offsets: ``[N, Lq, M, K, 2]``, written.
        grad_weights: ``[N, Lq, M, K]``, written.
        grad_references: as the references, with an axis of M before: the part of each head, added to.
        grad_output: ``[N, Lq, M, D]``.
        needs: whether the gradient of value is needed, those of offsets and weights, that of the references.
    """
    pixels, queries, heads, head_dim, points, reference_levels, box = sizes
    needs_value, needs_points, needs_references = needs
    nearest, zero, one = mode[2], weights.dtype.type(0), weights.dtype.type(1)
    all_queries = len(grad_output) // (heads * head_dim)
    for unit in range(begin, end):
        image, head = unit // heads, unit % heads
        base = (image * pixels * heads + head) * head_dim
        for query in range(image * queries, (image + 1) * queries):
            row = query * heads + head
            grads, point = row * head_dim, row * points
            for level in range(len(levels)):
                h, w, first, number = levels[level]
                x, y, unit_x, unit_y = _origin(references, steps, query, level, sizes)
                sum_x, sum_y, sum_w, sum_h = zero, zero, zero, zero
                for _ in range(number):
                    offset_x, offset_y, weight = offsets[2 * point], offsets[2 * point + 1], weights[point]
                    counts, column, line, beyond_x, beyond_y, free_x, free_y = _place(
                        x + offset_x * unit_x, y + offset_y * unit_y, h, w, scales[level, 0], scales[level, 1], mode
                    )
                    by_x, by_y, by_weight = zero, zero, zero
                    if counts:
                        for dy in range(1 if nearest else 2):
                            if line + dy < 0 or line + dy >= h:
                                continue
                            weight_y = beyond_y if dy else one - beyond_y
                            for dx in range(1 if nearest else 2):
                                if column + dx < 0 or column + dx >= w:
                                    continue
                                weight_x = beyond_x if dx else one - beyond_x
                                place = base + (first + (line + dy) * w + column + dx) * heads * head_dim
                                if needs_points:
                                    dot = _dot_row(grad_output, grads, value, place, head_dim)
                                    by_weight += weight_x * weight_y * dot
                                    by_x += weight_y * dot if dx else -weight_y * dot
                                    by_y += weight_x * dot if dy else -weight_x * dot
                                if needs_value:
                                    factor = weight * weight_x * weight_y
                                    _add_row(grad_value, place, factor, grad_output, grads, head_dim)
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
