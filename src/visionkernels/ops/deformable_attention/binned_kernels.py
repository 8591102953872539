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

A weight or a gradient that is not finite may reach all pixels of its bin, not only the four that it is sampled from.
A bin's samples are in the order of their ranks; where a stable sort provides these, the result is bit-identical.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import (
    affine,
    level_shape,
    load_xy,
    locate,
    shapes_fit,
    softmax_parts,
)

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_SCALARS = ["shapes", "num_images", "num_pixels", "num_queries", "num_bins"]


@triton.jit
def _level_bins(height, width):
    """Bins a row and bins of a level; a level without pixels has none."""
    bins_x = (width + 3) // 3  # of width + 1 cells
    return bins_x, tl.where((height > 0) & (width > 0), bins_x * ((height + 3) // 3), 0)


@triton.jit
def _rows(num_images, num_queries, NUM_HEADS: tl.constexpr, ROWS: tl.constexpr):
    """This program's image and its rows (query, head) [ROWS, 1]; neighbouring programs work on different images.

    So fewer of those that run at a time count in one bin.
    """
    pid = tl.program_id(0)
    offs_row = (pid // num_images) * ROWS + tl.arange(0, ROWS)[:, None]
    return pid % num_images, offs_row, offs_row // NUM_HEADS < num_queries


@triton.jit
def _bins(
    shapes, point_ptr, reference_ptr, offs_row, mask_row, mask_point, level: tl.constexpr, first_bin,
    NUM_HEADS: tl.constexpr, NUM_SAMPLES: tl.constexpr, NUM_POINTS: tl.constexpr, FIRST_POINT: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr, REFERENCE_LEVELS: tl.constexpr, BORDER: tl.constexpr, ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr, XY_IN_ONE_WORD: tl.constexpr,
):  # fmt: skip
    """Of a level's samples [ROWS, BLOCK_P]: offset, whether it exists, bin, (x, y) in it, whether it counts."""
    height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
    offs_point = tl.arange(0, triton.next_power_of_2(NUM_POINTS[level]))[None, :]
    offs_k = offs_row * NUM_SAMPLES + (FIRST_POINT[level] + offs_point)
    mask_k = mask_row & (offs_point < NUM_POINTS[level])
    offs_reference = ((offs_row // NUM_HEADS) * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
    scale_x, center_x, _pixels_x = affine(
        reference_ptr, offs_reference, mask_row, width, 0, NUM_POINTS[level],
        tl.float32, ALIGN_CORNERS, False, REFERENCE_SIZE,
    )  # fmt: skip
    scale_y, center_y, _pixels_y = affine(
        reference_ptr, offs_reference, mask_row, height, 1, NUM_POINTS[level],
        tl.float32, ALIGN_CORNERS, False, REFERENCE_SIZE,
    )  # fmt: skip
    x, y = load_xy(point_ptr, offs_k, mask_k & mask_point, tl.float32, XY_IN_ONE_WORD)
    x0, fraction_x, in_x0, in_x1, _slope_x = locate(x * scale_x + center_x, width, BORDER, False)
    y0, fraction_y, in_y0, in_y1, _slope_y = locate(y * scale_y + center_y, height, BORDER, False)
    counts = mask_k & (in_x0 | in_x1) & (in_y0 | in_y1)
    bins_x, num_bins = _level_bins(height, width)
    bin_x = (x0 + 1) // 3
    bin_y = (y0 + 1) // 3
    x = (x0 + 1 - 3 * bin_x).to(tl.float32) + fraction_x
    y = (y0 + 1 - 3 * bin_y).to(tl.float32) + fraction_y
    return offs_k, mask_k, first_bin + bin_y * bins_x + bin_x, x, y, counts, first_bin + num_bins


@triton.jit(do_not_specialize=_SCALARS)
def _count_kernel(
    count_ptr,  # [COPIES, N * M * num_bins] int32, zero on entry; unused when SORTED
    rank_ptr,  # [N, Lq, M, K] int32: the rank among those of the same bin and copy; or when SORTED the bin
    shapes,  # [L, 2] in memory, or a tuple h0, w0, h1, ...
    point_ptr,  # [N, Lq, M, K, 2] sampling locations, or offsets when fused
    reference_ptr,  # [N, Lq, REFERENCE_LEVELS, REFERENCE_SIZE] when fused
    num_images,
    num_pixels,
    num_queries,
    num_bins,  # places for bins of one head
    NUM_HEADS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,  # K, over all levels
    NUM_POINTS: tl.constexpr,  # points of each level
    FIRST_POINT: tl.constexpr,  # and where they begin
    REFERENCE_SIZE: tl.constexpr,  # 0 unfused, 2 points, 4 boxes
    REFERENCE_LEVELS: tl.constexpr,  # 1 or L
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    XY_IN_ONE_WORD: tl.constexpr,
    ROWS: tl.constexpr,
    COPIES: tl.constexpr,  # counters of each bin: neighbouring queries fall into the same bins
    SORTED: tl.constexpr,
):
    pid_n, offs_row, mask_row = _rows(num_images, num_queries, NUM_HEADS, ROWS)
    image = pid_n.to(tl.int64)
    point_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES * 2)
    rank_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    if REFERENCE_SIZE > 0:
        reference_ptr += image * num_queries * (REFERENCE_LEVELS * REFERENCE_SIZE)
    mask_point = mask_row
    if SHAPES_IN_MEMORY:  # points that are not read are nowhere
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = offs_row // NUM_HEADS < tl.where(fit, num_queries, 0)
    all_bins = num_images * NUM_HEADS * num_bins
    first_bin = (pid_n * NUM_HEADS + offs_row % NUM_HEADS) * num_bins
    offs_copy = ((offs_row // NUM_HEADS) % COPIES) * all_bins
    for level in tl.static_range(NUM_LEVELS):
        if NUM_POINTS[level] > 0:
            offs_k, mask_k, bins, _x, _y, counts, first_bin = _bins(
                shapes, point_ptr, reference_ptr, offs_row, mask_row, mask_point, level, first_bin,
                NUM_HEADS, NUM_SAMPLES, NUM_POINTS, FIRST_POINT, REFERENCE_SIZE, REFERENCE_LEVELS,
                BORDER, ALIGN_CORNERS, SHAPES_IN_MEMORY, XY_IN_ONE_WORD,
            )  # fmt: skip
            if SORTED:
                rank = tl.where(counts, bins, all_bins)
            else:
                rank = tl.atomic_add(count_ptr + offs_copy + bins, 1, mask=counts, sem="relaxed")
            tl.store(rank_ptr + offs_k, rank, mask=mask_k)
        else:
            height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
            _bins_x, level_bins = _level_bins(height, width)
            first_bin += level_bins


@triton.jit(do_not_specialize=["shapes", "all_bins", "num_bins"])
def _plan_kernel(
    count_ptr,  # [COPIES, all_bins] in: counts; out: where each copy's records begin. When SORTED [all_bins + 1] begins
    cursor_ptr,  # [2] records and items given out so far, zero on entry
    item_ptr,  # [items, 8] out: first record, records, image * M + head, first pixel, width, which pixels exist
    first_item_ptr,  # [2, all_bins] out, when PARTIAL: a bin's first item, and its number of items
    shapes,
    all_bins,  # N * M * num_bins
    num_bins,
    NUM_LEVELS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    COPIES: tl.constexpr,
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
        count = tl.zeros([BLOCK], dtype=tl.int32)
        for copy in tl.static_range(COPIES):
            count += tl.load(count_ptr + copy * all_bins + offs, mask=mask, other=0)
        start = tl.atomic_add(cursor_ptr, tl.sum(count), sem="relaxed") + tl.cumsum(count) - count
        begin = start
        for copy in tl.static_range(COPIES):
            copy_count = tl.load(count_ptr + copy * all_bins + offs, mask=mask, other=0)
            tl.store(count_ptr + copy * all_bins + offs, begin, mask=mask)
            begin += copy_count
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
        bins_x, level_bins = _level_bins(level_height, level_width)
        here = (level_bin >= first_bin) & (level_bin < first_bin + level_bins)
        some_bins = tl.maximum(bins_x, 1)
        x = tl.where(here, (level_bin - first_bin) % some_bins * 3 - 1, x)
        y = tl.where(here, (level_bin - first_bin) // some_bins * 3 - 1, y)
        height = tl.where(here, level_height, height)
        width = tl.where(here, level_width, width)
        first_pixel = tl.where(here, pixels, first_pixel)
        first_bin += level_bins
        pixels += level_height * level_width
    return x, y, height, width, first_pixel


@triton.jit(do_not_specialize=_SCALARS)
def _scatter_kernel(
    record_ptr,  # [N * Lq * M * K, 4] out: query, and as bits of float32 x, y and the attention weight
    start_ptr,  # [COPIES, N * M * num_bins] where records begin; unused when SORTED
    rank_ptr,  # [N, Lq, M, K] of the same bin and copy; or when SORTED the place itself
    shapes,
    point_ptr,
    weight_ptr,  # [N, Lq, M, K] attention weights, or logits when fused
    reference_ptr,
    num_images,
    num_pixels,
    num_queries,
    num_bins,
    NUM_HEADS: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    FIRST_POINT: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr,
    REFERENCE_LEVELS: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    XY_IN_ONE_WORD: tl.constexpr,
    ROWS: tl.constexpr,
    COPIES: tl.constexpr,
    SORTED: tl.constexpr,
):
    pid_n, offs_row, mask_row = _rows(num_images, num_queries, NUM_HEADS, ROWS)
    image = pid_n.to(tl.int64)
    point_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES * 2)
    weight_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    rank_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    mask_point = mask_row
    if SHAPES_IN_MEMORY:
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = offs_row // NUM_HEADS < tl.where(fit, num_queries, 0)
    if REFERENCE_SIZE > 0:
        reference_ptr += image * num_queries * (REFERENCE_LEVELS * REFERENCE_SIZE)
        offs = tl.reshape(offs_row, (ROWS,))
        peak, total = softmax_parts(
            weight_ptr, offs * NUM_SAMPLES, offs // NUM_HEADS < num_queries, tl.float32, NUM_SAMPLES
        )
        peak = peak[:, None]
        total = total[:, None]
    first_bin = (pid_n * NUM_HEADS + offs_row % NUM_HEADS) * num_bins
    offs_copy = ((offs_row // NUM_HEADS) % COPIES) * (num_images * NUM_HEADS * num_bins)
    for level in tl.static_range(NUM_LEVELS):
        if NUM_POINTS[level] > 0:
            offs_k, mask_k, bins, x, y, counts, first_bin = _bins(
                shapes, point_ptr, reference_ptr, offs_row, mask_row, mask_point, level, first_bin,
                NUM_HEADS, NUM_SAMPLES, NUM_POINTS, FIRST_POINT, REFERENCE_SIZE, REFERENCE_LEVELS,
                BORDER, ALIGN_CORNERS, SHAPES_IN_MEMORY, XY_IN_ONE_WORD,
            )  # fmt: skip
            weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0).to(tl.float32)
            if REFERENCE_SIZE > 0:
                weight = tl.exp(weight - peak) / total
            place = tl.load(rank_ptr + offs_k, mask=counts, other=0)
            if not SORTED:
                place += tl.load(start_ptr + offs_copy + bins, mask=counts, other=0)
            query = tl.broadcast_to(offs_row // NUM_HEADS, x.shape)
            # One store of 16 bytes a sample: x, y and the weight lie beside the query.
            pair = tl.join(query, y.to(tl.int32, bitcast=True))
            other = tl.join(x.to(tl.int32, bitcast=True), weight.to(tl.int32, bitcast=True))
            record = tl.reshape(tl.join(pair, other), (x.shape[0], x.shape[1], 4))
            record_ptrs = record_ptr + (place.to(tl.int64) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
            tl.store(record_ptrs, record, mask=tl.broadcast_to(counts[:, :, None], record.shape))
        else:
            height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
            _bins_x, level_bins = _level_bins(height, width)
            first_bin += level_bins


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
    PRECISION: tl.constexpr,  # of products of float32
    SPLIT: tl.constexpr,  # factors of halves as a sum of two halves
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
            offs_k = first + tl.arange(0, BLOCK_K)
            mask_k = offs_k < count
            # One load of 16 bytes a record.
            offs_word = offs_k[:, None] * 4 + tl.arange(0, 4)[None, :]
            words = tl.load(records + offs_word, mask=tl.broadcast_to(mask_k[:, None], offs_word.shape), other=0)
            pair, other = tl.split(tl.reshape(words, (BLOCK_K, 2, 2)))
            query, y = tl.split(pair)
            x, weight = tl.split(other)
            grad = tl.load(
                rows + (query * (NUM_HEADS * HEAD_DIM))[:, None] + offs_d[None, :],
                mask=mask_k[:, None] & mask_d[None, :], other=0,
            )  # [BLOCK_K, BLOCK_D]  # fmt: skip
            x = x.to(tl.float32, bitcast=True)
            y = y.to(tl.float32, bitcast=True)
            weight = weight.to(tl.float32, bitcast=True)
            acc = _add_product(acc, x, y, weight, grad, column, row, PRECISION, SPLIT)
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
def _add_product(acc, x, y, weight, grad, column, row, PRECISION: tl.constexpr, SPLIT: tl.constexpr):
    """``acc`` [16, BLOCK_D] and the sums over the records; x, y and weight [BLOCK_K], grad [BLOCK_K, BLOCK_D]."""
    scale = 1.0
    if grad.dtype == tl.float16:
        # It holds neither the large nor the small weights of float32, so the largest becomes 1 to 2. A scale is kept
        # away from where its reciprocal is not normal, and those that are not finite do not decide.
        exponent = weight.to(tl.int32, bitcast=True) & 0x7F800000
        exponent = tl.max(tl.where(exponent == 0x7F800000, 0, exponent))
        exponent = tl.minimum(tl.maximum(exponent, 0x02000000), 0x7E000000)
        scale = exponent.to(tl.float32, bitcast=True)
        weight = weight * (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    factor = tl.maximum(1 - tl.abs(y[None, :] - row), 0.0) * weight[None, :]
    factor = factor * tl.maximum(1 - tl.abs(x[None, :] - column), 0.0)  # [16, BLOCK_K]
    if grad.dtype == tl.float32:
        acc = tl.dot(factor, grad, acc, input_precision=PRECISION)
    else:
        high = factor.to(grad.dtype)
        low = (factor - high.to(tl.float32)).to(grad.dtype)
        if INTERPRETED:  # it multiplies the bits of bfloat16
            high = high.to(tl.float32)
            low = low.to(tl.float32)
            grad = grad.to(tl.float32)
        if grad.dtype == tl.float16 or INTERPRETED:
            product = tl.dot(high, grad)
            if SPLIT:
                product = tl.dot(low, grad, product)
            acc += product * scale
        else:
            acc = tl.dot(high, grad, acc)
            if SPLIT:
                acc = tl.dot(low, grad, acc)
    return acc


@triton.jit(do_not_specialize=_SCALARS)
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
        level_bins_x, level_bins = _level_bins(height, width)
        here = (offs_s >= pixels) & (offs_s < pixels + height * width)
        some_width = tl.maximum(width, 1)
        x = tl.where(here, (offs_s - pixels) % some_width, x)
        y = tl.where(here, (offs_s - pixels) // some_width, y)
        bins_x = tl.where(here, level_bins_x, bins_x)
        first_level_bin = tl.where(here, first_bin, first_level_bin)
        first_bin += level_bins
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
