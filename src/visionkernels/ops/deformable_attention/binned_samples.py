"""The first half of ``binned_kernels``: samples are counted by bin, and their records written in the order of bins.

A lane owns a query of one head, and takes its samples one after the other: so the lanes of a warp hold the same sample
of neighbouring queries at a time, and these are often of one bin. Their atomics become one, and their records lie side
by side. Sums of products are written as such: both kernels must find the same bin, so neither may be rounded otherwise.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import affine, level_shape, load_xy, locate, shapes_fit
from visionkernels.ops.deformable_attention.warp import count_bits, highest_bit, match_any, shuffle, store_words

SCALARS = ["shapes", "num_images", "num_pixels", "num_queries", "num_bins"]


@triton.jit
def level_bins(height, width):
    """Bins a row and bins of a level; a level without pixels has none."""
    bins_x = (width + 3) // 3  # of width + 1 cells
    return bins_x, tl.where((height > 0) & (width > 0), bins_x * ((height + 3) // 3), 0)


@triton.jit
def _queries(num_images, num_queries, NUM_HEADS: tl.constexpr, THREADS: tl.constexpr):
    """This program's image, head and queries [THREADS]; neighbouring programs work on different images."""
    pid = tl.program_id(0)
    offs_query = pid // num_images * THREADS + tl.arange(0, THREADS)
    return pid % num_images, tl.program_id(1), offs_query, offs_query < num_queries


@triton.jit
def _bin_of(x, y, height, width, bins_x, BORDER: tl.constexpr):
    """Within the level: the bin of pixel coordinates, (x, y) from its first pixel, and whether the sample counts."""
    x0, fraction_x, in_x0, in_x1, _slope_x = locate(x, width, BORDER, False)
    y0, fraction_y, in_y0, in_y1, _slope_y = locate(y, height, BORDER, False)
    bin_x = (x0 + 1) // 3
    bin_y = (y0 + 1) // 3
    x = (x0 + 1 - 3 * bin_x).to(tl.float32) + fraction_x
    y = (y0 + 1 - 3 * bin_y).to(tl.float32) + fraction_y
    return bin_y * bins_x + bin_x, x, y, (in_x0 | in_x1) & (in_y0 | in_y1)


@triton.jit
def _load_points(point_ptr, offs_sample, mask, NUM_SAMPLES: tl.constexpr, XY_IN_ONE_WORD: tl.constexpr):
    """Stored x and y of a row's samples, at once: they share lines, which the cache does not keep until the last."""
    xs = ()
    ys = ()
    for k in tl.static_range(NUM_SAMPLES):
        x, y = load_xy(point_ptr, offs_sample + k, mask, tl.float32, XY_IN_ONE_WORD)
        xs = xs + (x,)
        ys = ys + (y,)
    return xs, ys


@triton.jit
def _count(count_ptr, offs_bin, counts, lane):
    """Each sample's rank in its bin: one atomic for all lanes of a warp that have the same bin."""
    peers = match_any(tl.where(counts, offs_bin, -1))
    leader = highest_bit(peers)
    leads = counts & (lane == leader)
    base = tl.atomic_add(count_ptr + offs_bin, count_bits(peers), mask=leads, sem="relaxed")
    return shuffle(base, leader) + count_bits(peers & ((1 << lane) - 1))


@triton.jit(do_not_specialize=SCALARS)
def _count_kernel(
    count_ptr,  # [N, M, num_bins] int32, zero on entry; unused when SORTED
    rank_ptr,  # [N, M, K, Lq] int32: the rank among those of the same bin; or when SORTED the bin
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
    MAX_POINTS: tl.constexpr,  # the most of these
    FIRST_POINT: tl.constexpr,  # and where they begin
    REFERENCE_SIZE: tl.constexpr,  # 0 unfused, 2 points, 4 boxes
    REFERENCE_LEVELS: tl.constexpr,  # 1 or L
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    XY_IN_ONE_WORD: tl.constexpr,
    THREADS: tl.constexpr,
    SORTED: tl.constexpr,
):
    lane = tl.arange(0, THREADS) % 32
    pid_n, head, offs_query, mask = _queries(num_images, num_queries, NUM_HEADS, THREADS)
    image = pid_n.to(tl.int64)
    point_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES * 2)
    rank_ptr += (image * NUM_HEADS + head) * num_queries * NUM_SAMPLES
    if REFERENCE_SIZE > 0:
        reference_ptr += image * num_queries * (REFERENCE_LEVELS * REFERENCE_SIZE)
    mask_point = mask
    if SHAPES_IN_MEMORY:  # points that are not read are nowhere
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = offs_query < tl.where(fit, num_queries, 0)
    offs_sample = (offs_query * NUM_HEADS + head) * NUM_SAMPLES
    xs, ys = _load_points(point_ptr, offs_sample, mask_point, NUM_SAMPLES, XY_IN_ONE_WORD)
    first_bin = (pid_n * NUM_HEADS + head) * num_bins
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        bins_x, bins = level_bins(height, width)
        offs_reference = (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, _pixels_x = affine(
            reference_ptr, offs_reference, mask, width, 0, NUM_POINTS[level],
            tl.float32, ALIGN_CORNERS, False, REFERENCE_SIZE,
        )  # fmt: skip
        scale_y, center_y, _pixels_y = affine(
            reference_ptr, offs_reference, mask, height, 1, NUM_POINTS[level],
            tl.float32, ALIGN_CORNERS, False, REFERENCE_SIZE,
        )  # fmt: skip
        for point in tl.static_range(MAX_POINTS):
            if point < NUM_POINTS[level]:
                x = tl.fma(xs[FIRST_POINT[level] + point], scale_x, center_x)
                y = tl.fma(ys[FIRST_POINT[level] + point], scale_y, center_y)
                offs_bin, _x, _y, counts = _bin_of(x, y, height, width, bins_x, BORDER)
                counts = counts & mask
                if SORTED:
                    rank = tl.where(counts, first_bin + offs_bin, num_images * NUM_HEADS * num_bins)
                else:
                    rank = _count(count_ptr + first_bin, offs_bin, counts, lane)
                tl.store(rank_ptr + (FIRST_POINT[level] + point) * num_queries + offs_query, rank, mask=mask)
        first_bin += bins


@triton.jit(do_not_specialize=SCALARS)
def _scatter_kernel(
    record_ptr,  # [N * M * K * Lq, 4] out: query, and as bits of float32 x, y and the attention weight
    start_ptr,  # [N, M, num_bins] where records begin; unused when SORTED
    rank_ptr,  # [N, M, K, Lq] of the same bin; or when SORTED the place itself
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
    MAX_POINTS: tl.constexpr,
    FIRST_POINT: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr,
    REFERENCE_LEVELS: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    XY_IN_ONE_WORD: tl.constexpr,
    THREADS: tl.constexpr,
    SORTED: tl.constexpr,
):
    pid_n, head, offs_query, mask = _queries(num_images, num_queries, NUM_HEADS, THREADS)
    image = pid_n.to(tl.int64)
    point_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES * 2)
    weight_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    rank_ptr += (image * NUM_HEADS + head) * num_queries * NUM_SAMPLES
    mask_point = mask
    if SHAPES_IN_MEMORY:
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = offs_query < tl.where(fit, num_queries, 0)
    offs_sample = (offs_query * NUM_HEADS + head) * NUM_SAMPLES
    xs, ys = _load_points(point_ptr, offs_sample, mask_point, NUM_SAMPLES, XY_IN_ONE_WORD)
    weights = ()
    places = ()
    for k in tl.static_range(NUM_SAMPLES):
        weights = weights + (tl.load(weight_ptr + offs_sample + k, mask=mask, other=0).to(tl.float32),)
        places = places + (tl.load(rank_ptr + k * num_queries + offs_query, mask=mask, other=0),)
    if REFERENCE_SIZE > 0:
        reference_ptr += image * num_queries * (REFERENCE_LEVELS * REFERENCE_SIZE)
        peak = weights[0]
        for k in tl.static_range(1, NUM_SAMPLES):
            peak = tl.maximum(peak, weights[k])
        exponentials = ()
        total = tl.zeros([THREADS], tl.float32)
        for k in tl.static_range(NUM_SAMPLES):
            exponentials = exponentials + (tl.exp(weights[k] - peak),)
            total += exponentials[k]
        weights = exponentials
        inverse_total = 1 / total
    first_bin = (pid_n * NUM_HEADS + head) * num_bins
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        bins_x, bins = level_bins(height, width)
        offs_reference = (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, _pixels_x = affine(
            reference_ptr, offs_reference, mask, width, 0, NUM_POINTS[level],
            tl.float32, ALIGN_CORNERS, False, REFERENCE_SIZE,
        )  # fmt: skip
        scale_y, center_y, _pixels_y = affine(
            reference_ptr, offs_reference, mask, height, 1, NUM_POINTS[level],
            tl.float32, ALIGN_CORNERS, False, REFERENCE_SIZE,
        )  # fmt: skip
        for point in tl.static_range(MAX_POINTS):
            if point < NUM_POINTS[level]:
                x = tl.fma(xs[FIRST_POINT[level] + point], scale_x, center_x)
                y = tl.fma(ys[FIRST_POINT[level] + point], scale_y, center_y)
                offs_bin, x, y, counts = _bin_of(x, y, height, width, bins_x, BORDER)
                counts = counts & mask
                place = places[FIRST_POINT[level] + point]
                if not SORTED:
                    place += tl.load(start_ptr + first_bin + offs_bin, mask=counts, other=0)
                record = record_ptr.to(tl.int64) + place.to(tl.int64) * 16
                x = x.to(tl.int32, bitcast=True)
                y = y.to(tl.int32, bitcast=True)
                weight = weights[FIRST_POINT[level] + point]
                if REFERENCE_SIZE > 0:
                    weight = weight * inverse_total
                store_words(record, counts.to(tl.int32), offs_query, x, y, weight.to(tl.int32, bitcast=True))
        first_bin += bins
