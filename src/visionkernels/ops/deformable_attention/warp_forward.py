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
    inside_corners,
    level_shape,
    load_xy,
    locate,
    rows_of,
    shapes_fit,
)
from visionkernels.ops.deformable_attention.warp import (
    lanes_max,
    lanes_sum,
    load_words,
    multiply_add,
    pack,
    shuffle,
    shuffle_float,
    store_words,
)


@triton.jit
def _lane_address(ptr, offs, member):
    """Where this lane's 16 bytes of a row or pixel begin."""
    return (ptr + offs).to(tl.int64) + member * 16


@triton.jit
def _level_of(k, per_level, first: tl.constexpr, LANES: tl.constexpr, FIRST_POINT: tl.constexpr):
    """The element of the tuple ``per_level`` for samples ``k`` = first ... first + LANES - 1."""
    chosen = k * 0 + per_level[0]
    for level in tl.static_range(1, len(FIRST_POINT)):
        if FIRST_POINT[level] <= first:
            chosen = k * 0 + per_level[level]
        else:
            if FIRST_POINT[level] < first + LANES:
                chosen = tl.where(k >= FIRST_POINT[level], per_level[level], chosen)
    return chosen


@triton.jit
def _affine(
    reference_ptr, mask_row, height, width, num_points, ALIGN_CORNERS: tl.constexpr, REFERENCE_SIZE: tl.constexpr
):
    """For both axes: pixel = stored * scale + center. ``reference_ptr`` points to each sample's reference point."""
    pixels_x = (width - 1).to(tl.float32) if ALIGN_CORNERS else width.to(tl.float32)
    pixels_y = (height - 1).to(tl.float32) if ALIGN_CORNERS else height.to(tl.float32)
    scale_x = pixels_x
    scale_y = pixels_y
    center_x = pixels_x * 0 - (0.0 if ALIGN_CORNERS else 0.5)
    center_y = center_x
    if REFERENCE_SIZE > 0:
        center_x += tl.load(reference_ptr, mask=mask_row, other=0).to(tl.float32) * pixels_x
        center_y += tl.load(reference_ptr + 1, mask=mask_row, other=0).to(tl.float32) * pixels_y
    if REFERENCE_SIZE == 2:
        scale_x = pixels_x / tl.maximum(width, 1).to(tl.float32)
        scale_y = pixels_y / tl.maximum(height, 1).to(tl.float32)
    if REFERENCE_SIZE == 4:
        half_per_point = 0.5 / tl.maximum(num_points, 1).to(tl.float32)
        scale_x = tl.load(reference_ptr + 2, mask=mask_row, other=0).to(tl.float32) * (pixels_x * half_per_point)
        scale_y = tl.load(reference_ptr + 3, mask=mask_row, other=0).to(tl.float32) * (pixels_y * half_per_point)
    return scale_x, center_x, scale_y, center_y


@triton.jit
def _corners(x, y, weight, height, width, start, mask_ptr, BORDER: tl.constexpr, HAS_MASK: tl.constexpr):
    """A sample's first pixel, which of its four corners count (one bit each), and how much each of them weighs."""
    x0, fraction_x, in_x0, in_x1, _slope_x = locate(x, width, BORDER, False)
    y0, fraction_y, in_y0, in_y1, _slope_y = locate(y, height, BORDER, False)
    column, weight_x0, weight_x1, both_x = inside_corners(x0, fraction_x, in_x0, in_x1)
    row, weight_y0, weight_y1, both_y = inside_corners(y0, fraction_y, in_y0, in_y1)
    has0 = (in_x0 | in_x1) & (in_y0 | in_y1)
    has1 = has0 & both_x
    has2 = has0 & both_y
    has3 = has1 & both_y
    offs_pixel = start + row * width + column
    if HAS_MASK:
        mask_ptrs = mask_ptr + offs_pixel
        has0 = has0 & (tl.load(mask_ptrs, mask=has0, other=0) != 0)
        has1 = has1 & (tl.load(mask_ptrs + 1, mask=has1, other=0) != 0)
        has2 = has2 & (tl.load(mask_ptrs + width, mask=has2, other=0) != 0)
        has3 = has3 & (tl.load(mask_ptrs + width + 1, mask=has3, other=0) != 0)
    flags = has0.to(tl.int32) | has1.to(tl.int32) * 2 | has2.to(tl.int32) * 4 | has3.to(tl.int32) * 8
    # A corner that does not count adds 0, whatever the weight is.
    upper = weight * weight_y0
    lower = weight * weight_y1
    f0 = tl.where(has0, upper * weight_x0, 0.0)
    f1 = tl.where(has1, upper * weight_x1, 0.0)
    f2 = tl.where(has2, lower * weight_x0, 0.0)
    f3 = tl.where(has3, lower * weight_x1, 0.0)
    return offs_pixel, flags, f0, f1, f2, f3


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
    LANES: tl.constexpr = THREADS // ROWS
    NEXT_COLUMN: tl.constexpr = STRIDE_VALUE_S * ITEMSIZE  # bytes
    NO_WEIGHT: tl.constexpr = float("-inf") if REFERENCE_SIZE > 0 else 0.0
    thread = tl.arange(0, THREADS)
    lane = thread % 32
    member = lane % LANES
    row_of_thread = thread // LANES
    pid_n, offs_query, offs_head, mask_row = rows_of(
        row_of_thread, num_images, num_queries, ROWS, HEADS, False, tl.int32
    )
    first_query = pid_n * num_queries
    offs_row = offs_query * NUM_HEADS + offs_head
    offs_sample = offs_row * NUM_SAMPLES
    output_ptr += first_query * NUM_HEADS * HEAD_DIM
    if SHAPES_IN_MEMORY:  # noqa: SIM102  (the outer one is decided when compiling)
        # Leaving is cheaper than masks, and nothing outside the value may be touched. All bits set is NaN.
        if not shapes_fit(shapes, num_pixels, NUM_LEVELS):
            nan = member * 0 - 1
            store_words(
                _lane_address(output_ptr, offs_row * HEAD_DIM, member), mask_row.to(tl.int32), nan, nan, nan, nan
            )
            return
    value_address = _lane_address(value_ptr + pid_n * stride_value_n, 0, member)
    point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    if HAS_MASK:
        mask_ptr += pid_n * num_pixels
    zero = tl.zeros([THREADS], tl.float32)
    total = zero
    peak = zero
    if REFERENCE_SIZE > 0:
        reference_ptr += first_query * (REFERENCE_LEVELS * REFERENCE_SIZE)
        peak += float("-inf")
        for first in tl.static_range(0, NUM_SAMPLES, LANES):
            mask = mask_row & (first + member < NUM_SAMPLES)
            logit = tl.load(weight_ptr + offs_sample + first + member, mask=mask, other=NO_WEIGHT)
            peak = tl.maximum(peak, logit.to(tl.float32))
        peak = tl.where(mask_row, lanes_max(peak, lane, LANES), 0.0)

    heights = ()
    widths = ()
    starts = ()
    levels = ()
    start = num_pixels * 0
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        heights = heights + (height,)
        widths = widths + (width,)
        starts = starts + (start,)
        levels = levels + (level,)
        start += height * width

    acc = (zero,) * (16 // ITEMSIZE)
    for first in tl.static_range(0, NUM_SAMPLES, LANES):
        k = first + member  # the sample that this lane works out
        mask = mask_row
        if first + LANES > NUM_SAMPLES:
            mask = mask & (k < NUM_SAMPLES)
        x, y = load_xy(point_ptr, offs_sample + k, mask, tl.float32, XY_IN_ONE_WORD)
        weight = tl.load(weight_ptr + offs_sample + k, mask=mask, other=NO_WEIGHT).to(tl.float32)
        height = _level_of(k, heights, first, LANES, FIRST_POINT)
        width = _level_of(k, widths, first, LANES, FIRST_POINT)
        reference_ptrs = reference_ptr
        if REFERENCE_SIZE > 0:
            weight = tl.exp(weight - peak)
            total += weight
            level_k = _level_of(k, levels, first, LANES, FIRST_POINT)
            offs_reference = (offs_query * REFERENCE_LEVELS + level_k % REFERENCE_LEVELS) * REFERENCE_SIZE
            reference_ptrs = reference_ptr + offs_reference
        num_points = _level_of(k, NUM_POINTS, first, LANES, FIRST_POINT)
        scale_x, center_x, scale_y, center_y = _affine(
            reference_ptrs, mask_row, height, width, num_points, ALIGN_CORNERS, REFERENCE_SIZE
        )
        offs_pixel, flags, f0, f1, f2, f3 = _corners(
            x * scale_x + center_x, y * scale_y + center_y, weight, height, width,
            _level_of(k, starts, first, LANES, FIRST_POINT), mask_ptr, BORDER, HAS_MASK,
        )  # fmt: skip
        # Pixels begin at multiples of 16 bytes, so the flags fit below.
        where = (offs_pixel * STRIDE_VALUE_S + offs_head * stride_value_m) * ITEMSIZE | flags
        for j in tl.static_range(LANES):
            if first + j < NUM_SAMPLES:
                owner = lane - member + j
                there = shuffle(where, owner)
                address = value_address + (there & -16)
                width_j = _level_of(first + j, widths, first + j, 1, FIRST_POINT)
                next_row = (width_j * NEXT_COLUMN).to(tl.int64)
                pixels = (
                    load_words(address, there & 1),
                    load_words(address + NEXT_COLUMN, there & 2),
                    load_words(address + next_row, there & 4),
                    load_words(address + next_row + NEXT_COLUMN, there & 8),
                )
                factors = (
                    shuffle_float(f0, owner),
                    shuffle_float(f1, owner),
                    shuffle_float(f2, owner),
                    shuffle_float(f3, owner),
                )
                acc = _add_corners(acc, factors, pixels, element)

    scale = zero + 1
    if REFERENCE_SIZE > 0:
        scale = 1.0 / lanes_sum(total, lane, LANES)
    words = ()
    for w in tl.static_range(4):
        if element == tl.float32:
            words = words + ((acc[w] * scale).to(tl.int32, bitcast=True),)
        else:
            words = words + (pack(acc[2 * w] * scale, acc[2 * w + 1] * scale, element == tl.bfloat16),)
    output_address = _lane_address(output_ptr, offs_row * HEAD_DIM, member)
    store_words(output_address, mask_row.to(tl.int32), words[0], words[1], words[2], words[3])
