"""The forward for NVIDIA GPUs: the lanes of a row share the work that does not depend on the channel.

A row (query, head) belongs to LANES lanes, each of which reads 16 bytes of every pixel. Where a sample lies and how
much its corners weigh is worked out once, by one of them, for LANES consecutive samples at a time; shuffles hand it to
the others. ``kernels.py`` has the equations and the kernel for everything that this one does not take: float64, nearest
sampling, other head dims and other devices.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import (
    affine_of_sample,
    levels_of,
    load_xy,
    of_sample,
    rows_of,
    shapes_fit,
)
from visionkernels.ops.deformable_attention.warp import (
    lanes_max,
    lanes_sum,
    multiply_add,
    pack,
    shuffle,
    shuffle_float,
    store_words,
)
from visionkernels.ops.deformable_attention.warp_samples import (
    axis_of_sample,
    corners_that_count,
    lane_address,
    load_corners,
)


@triton.jit
def _add_corners(acc, factors, pixels, element: tl.constexpr):
    """``acc`` + the four corners' channels, each times its factor. A corner is four words, 4 or 8 channels."""
    new = ()
    for w in tl.static_range(4):
        if element == tl.float32:
            total = acc[w]
            for corner in tl.static_range(4):
                total += factors[corner] * pixels[corner][w].to(tl.float32, bitcast=True)
            new = new + (total,)
        else:
            low = acc[2 * w]
            high = acc[2 * w + 1]
            for corner in tl.static_range(4):
                low, high = multiply_add(low, high, factors[corner], pixels[corner][w], element == tl.bfloat16)
            new = new + (low, high)
    return new


@triton.jit(do_not_specialize=["shapes", "stride_value_n", "stride_value_m", "num_images", "num_pixels", "num_queries"])
def _forward_warp_kernel(
    output_ptr,  # the tensors and sizes are those of kernels._forward_kernel
    value_ptr,
    shapes,
    point_ptr,
    weight_ptr,
    reference_ptr,
    mask_ptr,
    stride_value_n,
    stride_value_m,
    num_images,
    num_pixels,
    num_queries,
    STRIDE_VALUE_S: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    FIRST_POINT: tl.constexpr,
    REFERENCE_SIZE: tl.constexpr,
    REFERENCE_LEVELS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    XY_IN_ONE_WORD: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    THREADS: tl.constexpr,
):
    element: tl.constexpr = value_ptr.dtype.element_ty
    ITEMSIZE: tl.constexpr = element.primitive_bitwidth // 8
    LANES: tl.constexpr = HEAD_DIM * ITEMSIZE // 16  # of a pixel
    GROUP: tl.constexpr = THREADS // ROWS  # lanes of a row, which reads GROUP / LANES samples at a time
    FUSED: tl.constexpr = REFERENCE_SIZE > 0
    NO_WEIGHT: tl.constexpr = float("-inf") if FUSED else 0.0
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    member = lane % GROUP
    pid_n, offs_query, offs_head, mask_row = rows_of(
        thread // GROUP, num_images, num_queries, ROWS, HEADS, False, tl.int32
    )
    mask_store = (mask_row & (member < LANES)).to(tl.int32)
    first_query = pid_n * num_queries
    offs_row = offs_query * NUM_HEADS + offs_head
    offs_sample = offs_row * NUM_SAMPLES
    output_ptr += first_query * NUM_HEADS * HEAD_DIM
    if SHAPES_IN_MEMORY:  # noqa: SIM102  (the outer one is decided when compiling)
        # Leaving is cheaper than masks, and nothing outside the value may be touched. All bits set is NaN.
        if not shapes_fit(shapes, num_pixels, NUM_LEVELS):
            nan = member * 0 - 1
            output_address = lane_address(output_ptr, offs_row.to(tl.int64) * HEAD_DIM, member)
            store_words(output_address, mask_store, nan, nan, nan, nan)
            return
    value_address = lane_address(value_ptr + pid_n * stride_value_n, 0, member % LANES)
    point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    if HAS_MASK:
        mask_ptr += pid_n * num_pixels
    zero = tl.zeros([THREADS], tl.float32)
    total = zero
    peak = zero
    if FUSED:
        reference_ptr += first_query * (REFERENCE_LEVELS * REFERENCE_SIZE)
        peak += float("-inf")
        for first in tl.static_range(0, NUM_SAMPLES, GROUP):
            mask = mask_row & (first + member < NUM_SAMPLES)
            logit = tl.load(weight_ptr + offs_sample + first + member, mask=mask, other=NO_WEIGHT)
            peak = tl.maximum(peak, logit.to(tl.float32))
        peak = tl.where(mask_row, lanes_max(peak, lane, GROUP), 0.0)

    heights, widths, starts, levels = levels_of(shapes, NUM_LEVELS, SHAPES_IN_MEMORY)
    acc = (zero,) * (16 // ITEMSIZE)
    for first in tl.static_range(0, NUM_SAMPLES, GROUP):
        k = first + member  # the sample that this lane owns
        mask = mask_row
        if first + GROUP > NUM_SAMPLES:
            mask = mask & (k < NUM_SAMPLES)
        x, y = load_xy(point_ptr, offs_sample + k, mask, tl.float32, XY_IN_ONE_WORD)
        weight = tl.load(weight_ptr + offs_sample + k, mask=mask, other=NO_WEIGHT).to(tl.float32)
        height = of_sample(k, heights, first, GROUP, FIRST_POINT)
        width = of_sample(k, widths, first, GROUP, FIRST_POINT)
        start = of_sample(k, starts, first, GROUP, FIRST_POINT)
        num_points = of_sample(k, NUM_POINTS, first, GROUP, FIRST_POINT)
        reference_ptrs = reference_ptr
        if FUSED:
            weight = tl.exp(weight - peak)
            total += weight
            level = of_sample(k, levels, first, GROUP, FIRST_POINT)
            reference_ptrs += (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, scale_y, center_y = affine_of_sample(
            reference_ptrs, mask_row, height, width, num_points, ALIGN_CORNERS, REFERENCE_SIZE
        )
        column, weight_x0, weight_x1, both_x, any_x, _, _ = axis_of_sample(tl.fma(x, scale_x, center_x), width, BORDER)
        row, weight_y0, weight_y1, both_y, any_y, _, _ = axis_of_sample(tl.fma(y, scale_y, center_y), height, BORDER)
        offs_pixel = start + row * width + column
        flags = corners_that_count(offs_pixel, width, any_x, both_x, any_y, both_y, mask_ptr, HAS_MASK)
        # A corner that does not count adds 0, whatever the weight is.
        upper = weight * weight_y0
        lower = weight * weight_y1
        factor0 = tl.where(flags & 1 != 0, upper * weight_x0, 0.0)
        factor1 = tl.where(flags & 2 != 0, upper * weight_x1, 0.0)
        factor2 = tl.where(flags & 4 != 0, lower * weight_x0, 0.0)
        factor3 = tl.where(flags & 8 != 0, lower * weight_x1, 0.0)
        # Pixels begin at multiples of 16 bytes, so the flags fit below.
        where = (offs_pixel * STRIDE_VALUE_S + offs_head * stride_value_m) * ITEMSIZE | flags
        for j in tl.static_range(LANES):
            if first + j < NUM_SAMPLES:
                owner = lane - lane % LANES + j
                there = shuffle(where, owner)
                if GROUP > LANES:
                    width_j = shuffle(width, owner)
                else:
                    width_j = of_sample(first + j, widths, first + j, 1, FIRST_POINT)
                pixels = load_corners(there, value_address + (there & -16), width_j, STRIDE_VALUE_S, ITEMSIZE)
                factors = (
                    shuffle_float(factor0, owner),
                    shuffle_float(factor1, owner),
                    shuffle_float(factor2, owner),
                    shuffle_float(factor3, owner),
                )
                acc = _add_corners(acc, factors, pixels, element)

    scale = zero + 1
    if FUSED:
        scale = 1.0 / lanes_sum(total, lane, GROUP)
    sums = ()
    for channel in tl.static_range(16 // ITEMSIZE):
        sums = sums + (lanes_sum(acc[channel], lane, GROUP, LANES) * scale,)
    words = ()
    for word in tl.static_range(4):
        if element == tl.float32:
            words = words + (sums[word].to(tl.int32, bitcast=True),)
        else:
            words = words + (pack(sums[2 * word], sums[2 * word + 1], element == tl.bfloat16),)
    output_address = lane_address(output_ptr, offs_row * HEAD_DIM, member)
    store_words(output_address, mask_store, words[0], words[1], words[2], words[3])
