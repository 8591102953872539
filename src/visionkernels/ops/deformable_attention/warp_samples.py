"""What the warp kernels share: each lane of a row works out where some of its samples lie.

A row (query, head) belongs to GROUP neighbouring lanes. In one turn its lanes own GROUP consecutive samples, one each,
counted over all levels; what differs between levels is then a matter of the lane, or is known when compiling where all
those samples are of one level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import level_shape, locate
from visionkernels.ops.deformable_attention.warp import load_words


@triton.jit
def lane_address(ptr, offs, lane):
    """Where the 16 bytes of this lane begin."""
    return (ptr + offs).to(tl.int64) + lane * 16


@triton.jit
def levels_of(shapes, NUM_LEVELS: tl.constexpr, SHAPES_IN_MEMORY: tl.constexpr):
    """Height, width, first pixel and number of every level, a tuple each."""
    heights = ()
    widths = ()
    starts = ()
    levels = ()
    start = 0
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        heights = heights + (height,)
        widths = widths + (width,)
        starts = starts + (start,)
        levels = levels + (level,)
        start += height * width
    return heights, widths, starts, levels


@triton.jit
def of_sample(k, per_level, first: tl.constexpr, GROUP: tl.constexpr, FIRST_POINT: tl.constexpr):
    """What the tuple ``per_level`` holds for samples ``k`` = first ... first + GROUP - 1."""
    chosen = k * 0 + per_level[0]
    for level in tl.static_range(1, len(FIRST_POINT)):
        if FIRST_POINT[level] <= first:
            chosen = k * 0 + per_level[level]
        else:
            if FIRST_POINT[level] < first + GROUP:
                chosen = tl.where(k >= FIRST_POINT[level], per_level[level], chosen)
    return chosen


@triton.jit
def affine_of_sample(
    reference_ptr, mask_row, height, width, num_points, ALIGN_CORNERS: tl.constexpr, REFERENCE_SIZE: tl.constexpr
):
    """``sampling.affine`` for both axes, where the level is a matter of the lane: scales and centers, x first.

    ``reference_ptr`` points to the reference point of each sample.
    """
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
        half_per_point = 0.5 / num_points.to(tl.float32)
        scale_x = tl.load(reference_ptr + 2, mask=mask_row, other=0).to(tl.float32) * (pixels_x * half_per_point)
        scale_y = tl.load(reference_ptr + 3, mask=mask_row, other=0).to(tl.float32) * (pixels_y * half_per_point)
    return scale_x, center_x, scale_y, center_y


@triton.jit
def axis_of_sample(x, size, BORDER: tl.constexpr):
    """Along one axis, the first pixel inside and how much it and the next one count.

    Where only the pixel after the coordinate is inside, it stands first.

    Returns:
        Its number, its weight and the next one's weight; whether there is a next one and whether any is inside; and
        the derivatives of the two weights with respect to the coordinate.
    """
    first, fraction, inside, next_inside, slope = locate(x, size, BORDER, False)
    weight = tl.where(inside, 1 - fraction, fraction)
    slope_first = tl.where(inside, -slope, slope)
    return tl.maximum(first, 0), weight, fraction, inside & next_inside, inside | next_inside, slope_first, slope


@triton.jit
def corners_that_count(offs_pixel, width, any_x, both_x, any_y, both_y, mask_ptr, HAS_MASK: tl.constexpr):
    """Which of a sample's four pixels count, one bit each: they are inside, and not masked."""
    has0 = any_x & any_y
    has1 = has0 & both_x
    has2 = has0 & both_y
    has3 = has1 & both_y
    if HAS_MASK:
        mask_ptrs = mask_ptr + offs_pixel
        has0 = has0 & (tl.load(mask_ptrs, mask=has0, other=0) != 0)
        has1 = has1 & (tl.load(mask_ptrs + 1, mask=has1, other=0) != 0)
        has2 = has2 & (tl.load(mask_ptrs + width, mask=has2, other=0) != 0)
        has3 = has3 & (tl.load(mask_ptrs + width + 1, mask=has3, other=0) != 0)
    return has0.to(tl.int32) | has1.to(tl.int32) * 2 | has2.to(tl.int32) * 4 | has3.to(tl.int32) * 8


@triton.jit
def load_corners(there, address, width, STRIDE_VALUE_S: tl.constexpr, ITEMSIZE: tl.constexpr):
    """This lane's words of the four pixels from ``address`` on; bits 0 to 3 of ``there`` say which of them count."""
    next_row = (width * (STRIDE_VALUE_S * ITEMSIZE)).to(tl.int64)
    return (
        load_words(address, there & 1),
        load_words(address + STRIDE_VALUE_S * ITEMSIZE, there & 2),
        load_words(address + next_row, there & 4),
        load_words(address + next_row + STRIDE_VALUE_S * ITEMSIZE, there & 8),
    )
