"""The first half of ``binned_kernels``: samples are counted by bin, and their records written in the order of bins.

A program works on a tile [ROWS, BLOCK_K]: the samples of all levels of a few rows (query, head), so that a thread has
several in flight. Both kernels are bound by the latency of memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import (
    affine_of_sample,
    levels_of,
    load_xy,
    locate,
    of_sample,
    shapes_fit,
)

SCALARS = ["shapes", "num_images", "num_pixels", "num_queries", "num_bins"]


@triton.jit
def level_bins(height, width):
    """Bins a row and bins of a level; a level without pixels has none."""
    bins_x = (width + 3) // 3  # of width + 1 cells
    return bins_x, tl.where((height > 0) & (width > 0), bins_x * ((height + 3) // 3), 0)


@triton.jit
def _bins_of_sample(k, heights, widths, first: tl.constexpr, GROUP: tl.constexpr, FIRST_POINT: tl.constexpr):
    """For samples ``k`` = first ... first + GROUP - 1: bins a row of their level, and bins of the levels before it."""
    per_row = ()
    before = ()
    total = 0
    for level in tl.static_range(len(FIRST_POINT)):
        bins_x, bins = level_bins(heights[level], widths[level])
        per_row = per_row + (bins_x,)
        before = before + (total,)
        total += bins
    return of_sample(k, per_row, first, GROUP, FIRST_POINT), of_sample(k, before, first, GROUP, FIRST_POINT)


@triton.jit
def _locate_in_bins(
    shapes, point_ptr, reference_ptr, offs_row, offs_k, mask, first_bin,
    NUM_HEADS: tl.constexpr, NUM_LEVELS: tl.constexpr, NUM_SAMPLES: tl.constexpr, NUM_POINTS: tl.constexpr,
    FIRST_POINT: tl.constexpr, REFERENCE_SIZE: tl.constexpr, REFERENCE_LEVELS: tl.constexpr, BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr, SHAPES_IN_MEMORY: tl.constexpr, XY_IN_ONE_WORD: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of samples [ROWS, BLOCK_K]: bin, (x, y) from the bin's first pixel, and whether the sample counts."""
    heights, widths, _starts, levels = levels_of(shapes, NUM_LEVELS, SHAPES_IN_MEMORY)
    height = of_sample(offs_k, heights, 0, BLOCK_K, FIRST_POINT)
    width = of_sample(offs_k, widths, 0, BLOCK_K, FIRST_POINT)
    level = of_sample(offs_k, levels, 0, BLOCK_K, FIRST_POINT)
    num_points = of_sample(offs_k, NUM_POINTS, 0, BLOCK_K, FIRST_POINT)
    offs_reference = ((offs_row // NUM_HEADS) * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
    reference_ptrs = reference_ptr
    if REFERENCE_SIZE > 0:
        reference_ptrs += offs_reference
    scale_x, center_x, scale_y, center_y = affine_of_sample(
        reference_ptrs, mask, height, width, num_points, ALIGN_CORNERS, REFERENCE_SIZE
    )
    x, y = load_xy(point_ptr, offs_row * NUM_SAMPLES + offs_k, mask, tl.float32, XY_IN_ONE_WORD)
    x0, fraction_x, in_x0, in_x1, _slope_x = locate(tl.fma(x, scale_x, center_x), width, BORDER, False)
    y0, fraction_y, in_y0, in_y1, _slope_y = locate(tl.fma(y, scale_y, center_y), height, BORDER, False)
    counts = mask & (in_x0 | in_x1) & (in_y0 | in_y1)
    bin_x = (x0 + 1) // 3
    bin_y = (y0 + 1) // 3
    bins_x, before = _bins_of_sample(offs_k, heights, widths, 0, BLOCK_K, FIRST_POINT)
    bins = first_bin + before + bin_y * bins_x + bin_x
    x = (x0 + 1 - 3 * bin_x).to(tl.float32) + fraction_x
    y = (y0 + 1 - 3 * bin_y).to(tl.float32) + fraction_y
    return bins, x, y, counts


@triton.jit
def _tile(num_images, num_queries, NUM_HEADS: tl.constexpr, NUM_SAMPLES: tl.constexpr, ROWS: tl.constexpr,
          BLOCK_K: tl.constexpr):  # fmt: skip
    """This program's image, its rows [ROWS, 1], samples [1, BLOCK_K], and which of them exist.

    Neighbouring programs work on different images, so that fewer of those that run at a time count in one bin.
    """
    pid = tl.program_id(0)
    offs_row = (pid // num_images) * ROWS + tl.arange(0, ROWS)[:, None]
    offs_k = tl.arange(0, BLOCK_K)[None, :]
    return pid % num_images, offs_row, offs_k, (offs_row // NUM_HEADS < num_queries) & (offs_k < NUM_SAMPLES)


@triton.jit(do_not_specialize=SCALARS)
def _count_kernel(
    count_ptr,  # [N * M * num_bins] int32, zero on entry; unused when SORTED
    rank_ptr,  # [N, Lq, M, K] int32: the rank among those of the same bin; or when SORTED the bin
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
    BLOCK_K: tl.constexpr,
    SORTED: tl.constexpr,
):
    pid_n, offs_row, offs_k, mask = _tile(num_images, num_queries, NUM_HEADS, NUM_SAMPLES, ROWS, BLOCK_K)
    image = pid_n.to(tl.int64)
    point_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES * 2)
    rank_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    if REFERENCE_SIZE > 0:
        reference_ptr += image * num_queries * (REFERENCE_LEVELS * REFERENCE_SIZE)
    mask_point = mask
    if SHAPES_IN_MEMORY:  # points that are not read are nowhere
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = mask & (offs_row // NUM_HEADS < tl.where(fit, num_queries, 0))
    first_bin = (pid_n * NUM_HEADS + offs_row % NUM_HEADS) * num_bins
    bins, _x, _y, counts = _locate_in_bins(
        shapes, point_ptr, reference_ptr, offs_row, offs_k, mask_point, first_bin,
        NUM_HEADS, NUM_LEVELS, NUM_SAMPLES, NUM_POINTS, FIRST_POINT, REFERENCE_SIZE, REFERENCE_LEVELS, BORDER,
        ALIGN_CORNERS, SHAPES_IN_MEMORY, XY_IN_ONE_WORD, BLOCK_K,
    )  # fmt: skip
    if SORTED:
        rank = tl.where(counts, bins, num_images * NUM_HEADS * num_bins)
    else:
        rank = tl.atomic_add(count_ptr + bins, 1, mask=counts, sem="relaxed")
    tl.store(rank_ptr + offs_row * NUM_SAMPLES + offs_k, rank, mask=mask)


@triton.jit(do_not_specialize=SCALARS)
def _scatter_kernel(
    record_ptr,  # [N * Lq * M * K, 4] out: query, and as bits of float32 x, y and the attention weight
    start_ptr,  # [N * M * num_bins] where records begin; unused when SORTED
    rank_ptr,  # [N, Lq, M, K] of the same bin; or when SORTED the place itself
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
    BLOCK_K: tl.constexpr,
    SORTED: tl.constexpr,
):
    pid_n, offs_row, offs_k, mask = _tile(num_images, num_queries, NUM_HEADS, NUM_SAMPLES, ROWS, BLOCK_K)
    image = pid_n.to(tl.int64)
    point_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES * 2)
    weight_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    rank_ptr += image * num_queries * (NUM_HEADS * NUM_SAMPLES)
    if REFERENCE_SIZE > 0:
        reference_ptr += image * num_queries * (REFERENCE_LEVELS * REFERENCE_SIZE)
    mask_point = mask
    if SHAPES_IN_MEMORY:
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = mask & (offs_row // NUM_HEADS < tl.where(fit, num_queries, 0))
    offs_sample = offs_row * NUM_SAMPLES + offs_k
    place = tl.load(rank_ptr + offs_sample, mask=mask, other=0)
    NO_WEIGHT: tl.constexpr = float("-inf") if REFERENCE_SIZE > 0 else 0.0
    weight = tl.load(weight_ptr + offs_sample, mask=mask, other=NO_WEIGHT).to(tl.float32)
    first_bin = (pid_n * NUM_HEADS + offs_row % NUM_HEADS) * num_bins
    bins, x, y, counts = _locate_in_bins(
        shapes, point_ptr, reference_ptr, offs_row, offs_k, mask_point, first_bin,
        NUM_HEADS, NUM_LEVELS, NUM_SAMPLES, NUM_POINTS, FIRST_POINT, REFERENCE_SIZE, REFERENCE_LEVELS, BORDER,
        ALIGN_CORNERS, SHAPES_IN_MEMORY, XY_IN_ONE_WORD, BLOCK_K,
    )  # fmt: skip
    if not SORTED:
        place += tl.load(start_ptr + bins, mask=counts, other=0)
    if REFERENCE_SIZE > 0:
        weight = tl.where(offs_row // NUM_HEADS < num_queries, weight, 0.0)  # rows that do not exist have no maximum
        weight = tl.exp(weight - tl.max(weight, axis=1)[:, None])
        weight = weight / tl.sum(weight, axis=1)[:, None]
    query = tl.broadcast_to(offs_row // NUM_HEADS, x.shape)
    # One store of 16 bytes a sample: x, y and the weight lie beside the query.
    pair = tl.join(query, y.to(tl.int32, bitcast=True))
    other = tl.join(x.to(tl.int32, bitcast=True), weight.to(tl.int32, bitcast=True))
    record = tl.reshape(tl.join(pair, other), (ROWS, BLOCK_K, 4))
    record_ptrs = record_ptr + (place.to(tl.int64) * 4)[:, :, None] + tl.arange(0, 4)[None, None, :]
    tl.store(record_ptrs, record, mask=tl.broadcast_to(counts[:, :, None], record.shape))
