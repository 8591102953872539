"""What the warp kernels share: each lane of a row works out where some of its samples lie.

A row (query, head) belongs to GROUP neighbouring lanes. In one turn its lanes own GROUP consecutive samples, one each,
counted over all levels; what differs between levels is then a matter of the lane, or is known when compiling where all
those samples are of one level.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import locate
from visionkernels.ops.deformable_attention.warp import load_words


@triton.jit
def lane_address(ptr, offs, lane):
    """Where the 16 bytes of this lane begin."""
    return (ptr + offs).to(tl.int64) + lane * 16


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
