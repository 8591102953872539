"""Triton kernels of the value's gradient, sorted by place: matrix products instead of an atomic a corner and channel.

The base cell of a sample is (floor(x), floor(y)); cells run from -1 to size - 1. A bin is 3 x 3 cells of one level of
one head of one image, so its samples touch the 4 x 4 pixels that begin at its first cell, and nothing else. With (x, y)
counted from the first of these pixels, and hat(t) = max(0, 1 - |t|), a bilinear weight is a product of two hats:

    grad[pixel (i, j)] = sum over samples s of the bin of  w[s] hat(x[s] - i) hat(y[s] - j) grad_out[query of s]

which is a product of a matrix [16, samples] with the gathered rows [samples, D].

1. `_count_kernel` counts the samples of every bin, and each sample keeps its rank among them.
2. `_plan_kernel` gives every bin its place in memory, and cuts the bins into items of at most CHUNK samples.
3. `_scatter_kernel` writes every sample's record (query, x, y, weight) to its place.
4. `_tile_kernel` multiplies, an item a program, and adds the 16 sums to the gradient; or, with PARTIAL, stores them.
5. `_gather_kernel`, with PARTIAL, sums for each pixel the items of the at most four bins that touch it, in their order.

A bin's samples are in the order of their ranks; where a stable sort provides these, the result is bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.binned_samples import SCALARS, level_bins
from visionkernels.ops.deformable_attention.sampling import level_shape, shapes_fit

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit(do_not_specialize=["shapes", "all_bins", "num_bins"])
def _plan_kernel(
    count_ptr,  # [all_bins] in: counts; out: where their records begin. When SORTED [all_bins + 1] begins
    cursor_ptr,  # [2] records and items given out so far, zero on entry
    item_ptr,  # [items, 8] out: first record, records, image * M + head, first pixel, width, which pixels exist
    first_item_ptr,  # [2, all_bins] out, when PARTIAL: a bin's first item, and its number of items
    shapes,
    all_bins,  # N * M * num_bins
    num_bins,
    NUM_LEVELS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SORTED: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < all_bins
    if SORTED:
        start = tl.load(count_ptr + offs, mask=mask, other=0)
        count = tl.load(count_ptr + offs + 1, mask=mask, other=0) - start
    else:
        count = tl.load(count_ptr + offs, mask=mask, other=0)
        start = tl.atomic_add(cursor_ptr, tl.sum(count), sem="relaxed") + tl.cumsum(count) - count
        tl.store(count_ptr + offs, start, mask=mask)
    items = (count + (CHUNK - 1)) // CHUNK
    first_item = tl.atomic_add(cursor_ptr + 1, tl.sum(items), sem="relaxed") + tl.cumsum(items) - items
    if PARTIAL:
        tl.store(first_item_ptr + offs, first_item, mask=mask)
        tl.store(first_item_ptr + all_bins + offs, items, mask=mask)
    x, y, height, width, first_pixel = _corner_of(shapes, offs % num_bins, NUM_LEVELS, SHAPES_IN_MEMORY)
    exist_x = tl.zeros([BLOCK], dtype=tl.int32)
    exist = exist_x
    for corner in tl.static_range(4):
        exist_x |= tl.where((x + corner >= 0) & (x + corner < width), 1 << corner, 0)
    for corner in tl.static_range(4):
        exist |= tl.where((y + corner >= 0) & (y + corner < height), exist_x << (4 * corner), 0)
    for item in range(tl.max(items)):
        item_ptrs = item_ptr + (first_item + item) * 8
        mask_item = item < items
        tl.store(item_ptrs, start + item * CHUNK, mask=mask_item)
        tl.store(item_ptrs + 1, tl.minimum(count - item * CHUNK, CHUNK), mask=mask_item)
        tl.store(item_ptrs + 2, offs // num_bins, mask=mask_item)
        tl.store(item_ptrs + 3, first_pixel + y * width + x, mask=mask_item)
        tl.store(item_ptrs + 4, width, mask=mask_item)
        tl.store(item_ptrs + 5, exist, mask=mask_item)


@triton.jit
def _corner_of(shapes, level_bin, NUM_LEVELS: tl.constexpr, SHAPES_IN_MEMORY: tl.constexpr):
    """Where a head's bin lies: its first pixel (x, y), which may be -1, and its level's size and start."""
    x = level_bin * 0
    y = x
    height = x
    width = x
    first_pixel = x
    first_bin = 0
    pixels = 0
    for level in tl.static_range(NUM_LEVELS):
        level_height, level_width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        bins_x, bins_here = level_bins(level_height, level_width)
        here = (level_bin >= first_bin) & (level_bin < first_bin + bins_here)
        some_bins = tl.maximum(bins_x, 1)
        x = tl.where(here, (level_bin - first_bin) % some_bins * 3 - 1, x)
        y = tl.where(here, (level_bin - first_bin) // some_bins * 3 - 1, y)
        height = tl.where(here, level_height, height)
        width = tl.where(here, level_width, width)
        first_pixel = tl.where(here, pixels, first_pixel)
        first_bin += bins_here
        pixels += level_height * level_width
    return x, y, height, width, first_pixel


@triton.jit(do_not_specialize=["count"])
def _invert_kernel(place_ptr, order_ptr, count, BLOCK: tl.constexpr):
    """place[order[i]] = i, of int32 and int64."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < count
    tl.store(place_ptr + tl.load(order_ptr + offs, mask=mask, other=0), offs, mask=mask)


@triton.jit(do_not_specialize=["num_queries", "num_pixels", "num_programs"])
def _tile_kernel(
    grad_value_ptr,  # [N, S, M, D] float32, zero on entry; when PARTIAL [items, 16, BLOCK_D] float32
    grad_output_ptr,  # [N, Lq, M, D]
    record_ptr,  # [samples, 4]
    item_ptr,  # [items, 8]
    cursor_ptr,  # [2] the second is the number of items
    mask_ptr,  # [N, S] when HAS_MASK
    num_pixels,
    num_queries,
    num_programs,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PARTIAL: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    offs_pixel = tl.arange(0, 16)
    pixel_x = offs_pixel % 4
    pixel_y = offs_pixel // 4
    column = pixel_x.to(tl.float32)[:, None]
    row = pixel_y.to(tl.float32)[:, None]
    for item in range(tl.program_id(0), tl.load(cursor_ptr + 1), num_programs):
        item_ptrs = item_ptr + item * 8
        start = tl.load(item_ptrs)
        count = tl.load(item_ptrs + 1)
        image_head = tl.load(item_ptrs + 2)
        image = (image_head // NUM_HEADS).to(tl.int64)
        head = image_head % NUM_HEADS
        records = record_ptr + start.to(tl.int64) * 4
        rows = grad_output_ptr + (image * num_queries * NUM_HEADS + head) * HEAD_DIM
        acc = tl.zeros([16, BLOCK_D], dtype=tl.float32)
        for first in tl.range(0, count, BLOCK_K, num_stages=STAGES):
            query, x, y, weight, mask_k = _load_records(records, first, count, BLOCK_K)
            grad_ptrs = rows + (query * (NUM_HEADS * HEAD_DIM))[:, None] + offs_d[None, :]  # [BLOCK_K, BLOCK_D]
            grad = tl.load(grad_ptrs, mask=mask_k[:, None] & mask_d[None, :], other=0)
            acc = _add_product(acc, x, y, weight, grad, column, row)
        if tl.sum(acc * 0) != 0:  # NaN, where a sum is not finite
            acc = _add_one_by_one(
                tl.zeros([16, BLOCK_D], dtype=tl.float32), records, rows, count, offs_d, mask_d, column, row,
                NUM_HEADS * HEAD_DIM,
            )  # fmt: skip
        if PARTIAL:
            partial_ptrs = grad_value_ptr + (image * 0 + item) * (16 * BLOCK_D)
            tl.store(partial_ptrs + offs_pixel[:, None] * BLOCK_D + offs_d[None, :], acc)
        else:
            width = tl.load(item_ptrs + 4)
            offs_s = image * num_pixels + (tl.load(item_ptrs + 3) + pixel_y * width + pixel_x)
            inside = (tl.load(item_ptrs + 5) >> offs_pixel) & 1 != 0
            if HAS_MASK:
                inside = inside & (tl.load(mask_ptr + offs_s, mask=inside, other=0) != 0)
            offs_grad = (offs_s * NUM_HEADS + head) * HEAD_DIM
            grad_ptrs = grad_value_ptr + offs_grad[:, None] + offs_d[None, :]
            tl.atomic_add(grad_ptrs, acc, mask=inside[:, None] & mask_d[None, :], sem="relaxed")


@triton.jit
def _load_records(records, first, count, BLOCK_K: tl.constexpr):
    """Queries, x, y and weights [BLOCK_K] of a bin's records from ``first`` on; behind the last one they are 0."""
    offs_k = first + tl.arange(0, BLOCK_K)
    offs_word = offs_k[:, None] * 4 + tl.arange(0, 4)[None, :]  # one load of 16 bytes a record
    mask = tl.broadcast_to((offs_k < count)[:, None], offs_word.shape)
    words = tl.load(records + offs_word, mask=mask, other=0)
    pair, other = tl.split(tl.reshape(words, (BLOCK_K, 2, 2)))
    query, y = tl.split(pair)
    x, weight = tl.split(other)
    weight = weight.to(tl.float32, bitcast=True)
    return query, x.to(tl.float32, bitcast=True), y.to(tl.float32, bitcast=True), weight, offs_k < count


@triton.jit
def _factors(x, y, weight, column, row):
    """The matrix [16, BLOCK_K]: how much of each record's gradient each pixel gets."""
    factor = tl.maximum(1 - tl.abs(y[None, :] - row), 0.0) * weight[None, :]
    return factor * tl.maximum(1 - tl.abs(x[None, :] - column), 0.0)


@triton.jit
def _add_product(acc, x, y, weight, grad, column, row):
    """``acc`` [16, BLOCK_D] and the sums over the records; x, y and weight [BLOCK_K], grad [BLOCK_K, BLOCK_D]."""
    if grad.dtype == tl.float32:
        # TF32 has eleven bits: what is beyond them makes two more products; that of both rests does not count.
        factor = _factors(x, y, weight, column, row)
        factor_high = (factor.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        grad_high = (grad.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        acc = tl.dot(factor - factor_high, grad_high, acc, input_precision="tf32")
        acc = tl.dot(factor_high, grad - grad_high, acc, input_precision="tf32")
        acc = tl.dot(factor_high, grad_high, acc, input_precision="tf32")
    elif grad.dtype == tl.bfloat16:
        factor = _factors(x, y, weight, column, row).to(tl.bfloat16)
        if INTERPRETED:  # it multiplies the bits of bfloat16
            acc = tl.dot(factor.to(tl.float32), grad.to(tl.float32), acc)
        else:
            acc = tl.dot(factor, grad, acc)
    else:
        # float16 holds neither the large nor the small weights of float32, so the largest becomes 1 to 2. A scale is
        # kept away from where its reciprocal is not normal, and those that are not finite do not decide.
        exponent = weight.to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.max(tl.where(exponent == 0x7F800000, 0, exponent))
        exponent = tl.minimum(tl.maximum(exponent, 0x02000000), 0x7E000000)
        weight = weight * (0x7F000000 - exponent).to(tl.float32, bitcast=True)
        factor = _factors(x, y, weight, column, row).to(tl.float16)
        acc += tl.dot(factor, grad) * exponent.to(tl.float32, bitcast=True)
    return acc


@triton.jit
def _add_one_by_one(acc, records, rows, count, offs_d, mask_d, column, row, STRIDE_QUERY: tl.constexpr):
    """The same sums, where a product would spread what is not finite: a record adds to its four pixels only."""
    for index in range(count):
        query = tl.load(records + index * 4)
        x = tl.load(records + index * 4 + 1).to(tl.float32, bitcast=True)
        y = tl.load(records + index * 4 + 2).to(tl.float32, bitcast=True)
        weight = tl.load(records + index * 4 + 3).to(tl.float32, bitcast=True)
        grad = tl.load(rows + query * STRIDE_QUERY + offs_d, mask=mask_d, other=0).to(tl.float32)
        hat = tl.maximum(1 - tl.abs(x - column), 0.0) * tl.maximum(1 - tl.abs(y - row), 0.0)
        acc += tl.where(hat > 0, hat * weight * grad[None, :], 0.0)
    return acc


@triton.jit(do_not_specialize=SCALARS)
def _gather_kernel(
    grad_value_ptr,  # [N, S, M, D] out, of any dtype
    partial_ptr,  # [items, 16, BLOCK_D] float32
    first_item_ptr,  # [2, N * M * num_bins]
    shapes,
    mask_ptr,  # [N, S] when HAS_MASK
    num_images,
    num_pixels,
    num_queries,
    num_bins,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PIXELS: tl.constexpr,
):
    image_head = tl.program_id(0) % (num_images * NUM_HEADS)
    image = (image_head // NUM_HEADS).to(tl.int64)
    offs_s = tl.program_id(0) // (num_images * NUM_HEADS) * PIXELS + tl.arange(0, PIXELS)
    mask_s = offs_s < num_pixels
    offs_d = tl.arange(0, BLOCK_D)
    counts = mask_s
    if SHAPES_IN_MEMORY:
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        counts = offs_s < tl.where(fit, num_pixels, 0)
    if HAS_MASK:
        counts = counts & (tl.load(mask_ptr + image * num_pixels + offs_s, mask=mask_s, other=0) != 0)
    first_level_bin = offs_s * 0
    bins_x = first_level_bin + 1
    x = first_level_bin
    y = first_level_bin
    first_bin = image_head * num_bins
    pixels = num_bins * 0
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        level_bins_x, bins_here = level_bins(height, width)
        here = (offs_s >= pixels) & (offs_s < pixels + height * width)
        some_width = tl.maximum(width, 1)
        x = tl.where(here, (offs_s - pixels) % some_width, x)
        y = tl.where(here, (offs_s - pixels) // some_width, y)
        bins_x = tl.where(here, level_bins_x, bins_x)
        first_level_bin = tl.where(here, first_bin, first_level_bin)
        first_bin += bins_here
        pixels += height * width
    acc = tl.zeros([PIXELS, BLOCK_D], dtype=tl.float32)
    for corner in tl.static_range(4):
        # Samples of the cells on either side of a pixel touch it, which are of two bins at every third pixel.
        bin_x = (x + 1 - corner % 2) // 3
        bin_y = (y + 1 - corner // 2) // 3
        here = counts
        if corner % 2:
            here = here & ((x + 1) // 3 != bin_x)
        if corner // 2:
            here = here & ((y + 1) // 3 != bin_y)
        offs_bin = first_level_bin + bin_y * bins_x + bin_x
        first_item = tl.load(first_item_ptr + offs_bin, mask=here, other=0)
        all_bins = num_images * NUM_HEADS * num_bins
        items = tl.load(first_item_ptr + all_bins + offs_bin, mask=here, other=0)
        offs_pixel = (y + 1 - 3 * bin_y) * 4 + (x + 1 - 3 * bin_x)
        for item in range(tl.max(items)):
            offs = ((first_item + item).to(tl.int64) * 16 + offs_pixel) * BLOCK_D
            mask = (item < items)[:, None] & (offs_d < BLOCK_D)[None, :]
            acc += tl.load(partial_ptr + offs[:, None] + offs_d[None, :], mask=mask, other=0)
    offs_grad = ((image * num_pixels + offs_s) * NUM_HEADS + image_head % NUM_HEADS) * HEAD_DIM
    grad_ptrs = grad_value_ptr + offs_grad[:, None] + offs_d[None, :]
    mask_out = mask_s[:, None] & (offs_d < HEAD_DIM)[None, :]
    tl.store(grad_ptrs, acc.to(grad_value_ptr.dtype.element_ty), mask=mask_out)
