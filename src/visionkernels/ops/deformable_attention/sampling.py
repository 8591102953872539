"""What both Triton kernels do before they touch a pixel: which rows, which levels, where each sample lies."""

from __future__ import annotations

import triton
import triton.language as tl

# Triton compiles a kernel anew for an integer of a tuple that is 1 or a multiple of 16. So that no size is either,
# size s travels as (s << SIZE_SHIFT) + SIZE_PAD.
SIZE_SHIFT = tl.constexpr(4)
SIZE_PAD = 8


@triton.jit
def shapes_fit(shapes, num_pixels, NUM_LEVELS: tl.constexpr):
    """Whether shapes in device memory add up to the value's pixels; those that the host can read it has checked."""
    fit = num_pixels >= 0
    total = num_pixels.to(tl.int64) * 0
    for level in tl.static_range(NUM_LEVELS):
        height = tl.load(shapes + 2 * level)
        width = tl.load(shapes + 2 * level + 1)
        fit = fit & (height >= 0) & (width >= 0)
        total += height.to(tl.int64) * width
    return fit & (total == num_pixels)


@triton.jit
def level_shape(shapes, level: tl.constexpr, SHAPES_IN_MEMORY: tl.constexpr):
    """(h, w) of a level, from a tensor in device memory or from the launch arguments."""
    if SHAPES_IN_MEMORY:
        # Of a negative size ``locate`` would take any pixel to be inside.
        height = tl.maximum(tl.load(shapes + 2 * level).to(tl.int32), 0)
        width = tl.maximum(tl.load(shapes + 2 * level + 1).to(tl.int32), 0)
    else:
        height = (shapes[2 * level] >> SIZE_SHIFT).to(tl.int32)
        width = (shapes[2 * level + 1] >> SIZE_SHIFT).to(tl.int32)
    return height, width


@triton.jit
def rows(
    num_images, num_queries,
    ROWS: tl.constexpr, HEADS: tl.constexpr, IMAGES_FIRST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """This program's image and, for each row [ROWS], its query, its head and whether it exists.

    Neighbouring programs take neighbouring queries of one image, which share what the caches hold; or, with
    IMAGES_FIRST, the same queries of all images, so that fewer of them add to one address at a time.
    """
    return rows_of(tl.arange(0, ROWS), num_images, num_queries, ROWS, HEADS, IMAGES_FIRST, INDEX)


@triton.jit
def rows_of(
    offs, num_images, num_queries,
    ROWS: tl.constexpr, HEADS: tl.constexpr, IMAGES_FIRST: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """``rows`` for any tensor of row numbers within the program."""
    pid = tl.program_id(0)
    if IMAGES_FIRST:
        pid_n = pid % num_images
        pid_rows = pid // num_images
    else:
        num_blocks = tl.cdiv(num_queries, ROWS // HEADS)
        pid_n = pid // num_blocks
        pid_rows = pid % num_blocks
    offs_query = pid_rows.to(INDEX) * (ROWS // HEADS) + offs // HEADS
    offs_head = tl.program_id(1) * HEADS + offs % HEADS
    return pid_n.to(tl.int64), offs_query, offs_head, offs_query < num_queries


@triton.jit
def load_xy(ptr, offs_pair, mask_row, ACC: tl.constexpr, XY_IN_ONE_WORD: tl.constexpr):
    """(x, y) [ROWS] each, of the pairs at ``offs_pair``; by one load where the address allows it.

    A row that does not exist reads NaN, and so contributes nothing; all bits set is NaN in every float type.
    """
    if XY_IN_ONE_WORD:
        element: tl.constexpr = ptr.dtype.element_ty
        bits: tl.constexpr = element.primitive_bitwidth
        pair: tl.constexpr = tl.int64 if bits == 32 else tl.int32
        half: tl.constexpr = tl.int32 if bits == 32 else tl.int16
        word = tl.load(ptr.to(tl.pointer_type(pair)) + offs_pair, mask=mask_row, other=-1)
        x = word.to(half).to(element, bitcast=True)
        y = (word >> bits).to(half).to(element, bitcast=True)
    else:
        x = tl.load(ptr + 2 * offs_pair, mask=mask_row, other=float("nan"))
        y = tl.load(ptr + 2 * offs_pair + 1, mask=mask_row, other=float("nan"))
    return x.to(ACC), y.to(ACC)


@triton.jit
def store_xy(ptr, offs_pair, x, y, mask, XY_IN_ONE_WORD: tl.constexpr):
    """The opposite of ``load_xy``, rounded to what is stored."""
    element: tl.constexpr = ptr.dtype.element_ty
    x = x.to(element)
    y = y.to(element)
    if XY_IN_ONE_WORD:
        bits: tl.constexpr = element.primitive_bitwidth
        pair: tl.constexpr = tl.int64 if bits == 32 else tl.int32
        half: tl.constexpr = tl.uint32 if bits == 32 else tl.uint16
        word = (y.to(half, bitcast=True).to(pair) << bits) | x.to(half, bitcast=True).to(pair)
        tl.store(ptr.to(tl.pointer_type(pair)) + offs_pair, word, mask=mask)
    else:
        tl.store(ptr + 2 * offs_pair, x, mask=mask)
        tl.store(ptr + 2 * offs_pair + 1, y, mask=mask)


@triton.jit
def softmax_parts(logit_ptr, offs_sample, mask_row, ACC: tl.constexpr, NUM_SAMPLES: tl.constexpr):
    """Maximum and sum of exponentials [ROWS] of each row's logits."""
    offs_k = tl.arange(0, triton.next_power_of_2(NUM_SAMPLES))
    mask = mask_row[:, None] & (offs_k < NUM_SAMPLES)[None, :]
    logits = tl.load(logit_ptr + offs_sample[:, None] + offs_k[None, :], mask=mask, other=float("-inf")).to(ACC)
    peak = tl.where(mask_row, tl.max(logits, axis=1), 0.0)
    return peak, tl.sum(tl.exp(logits - peak[:, None]), axis=1)


@triton.jit
def affine(
    reference_ptr, offs_reference, mask_row, size, axis: tl.constexpr, num_points: tl.constexpr,
    ACC: tl.constexpr, ALIGN_CORNERS: tl.constexpr, NEAREST: tl.constexpr, REFERENCE_SIZE: tl.constexpr,
):  # fmt: skip
    """For one axis of a level: pixel = stored * scale + center; and pixels per unit of a location."""
    pixels = (size - 1).to(ACC) if ALIGN_CORNERS else size.to(ACC)
    scale = pixels
    if NEAREST:
        center = pixels * 0 + 0.5
    else:
        center = pixels * 0 - (0.0 if ALIGN_CORNERS else 0.5)
    if REFERENCE_SIZE > 0:
        reference = tl.load(reference_ptr + offs_reference + axis, mask=mask_row, other=0).to(ACC)
        center = tl.fma(reference, pixels, center)
    if REFERENCE_SIZE == 2:
        scale = pixels / tl.maximum(size, 1).to(ACC)
    if REFERENCE_SIZE == 4:
        extent = tl.load(reference_ptr + offs_reference + 2 + axis, mask=mask_row, other=0).to(ACC)
        scale = extent * (pixels * (0.5 / (num_points if num_points > 0 else 1)))
    return scale, center, pixels


@triton.jit
def locate(x, size, BORDER: tl.constexpr, NEAREST: tl.constexpr):
    """Along one axis: first pixel, fraction, whether it and the next one are inside, and d clipped / d coordinate.

    A coordinate that does not count is moved to where both pixels are outside: NaN must not meet arithmetic, nor a
    huge float an integer. NaN fails every comparison, so it goes where -2 is.
    """
    last = (size - 1).to(x.dtype)
    slope = tl.full(x.shape, 1.0, x.dtype)
    if BORDER or NEAREST:
        slope = tl.where((x > 0) & (x < last), slope, 0.0)
        clipped = tl.maximum(tl.minimum(x, last), 0.0)
        x = tl.where(tl.abs(x) < float("inf"), clipped, -2.0)
    else:
        x = tl.minimum(tl.where(x > -2, x, -2.0), size.to(x.dtype))
    floor = tl.floor(x)
    first = floor.to(tl.int32)
    unsigned_size = size.to(tl.uint32)
    inside = first.to(tl.uint32, bitcast=True) < unsigned_size
    next_inside = (first + 1).to(tl.uint32, bitcast=True) < unsigned_size
    return first, x - floor, inside, next_inside, slope


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
    """``affine`` for both axes, where the level is a matter of the lane: scales and centers, x first.

    ``reference_ptr`` points to the reference point of each sample. Sums of products are written as such, here and in
    the pixel that the callers make of them: compiled into different kernels, they must not be rounded differently.
    """
    pixels_x = (width - 1).to(tl.float32) if ALIGN_CORNERS else width.to(tl.float32)
    pixels_y = (height - 1).to(tl.float32) if ALIGN_CORNERS else height.to(tl.float32)
    scale_x = pixels_x
    scale_y = pixels_y
    center_x = pixels_x * 0 - (0.0 if ALIGN_CORNERS else 0.5)
    center_y = center_x
    if REFERENCE_SIZE > 0:
        center_x = tl.fma(tl.load(reference_ptr, mask=mask_row, other=0).to(tl.float32), pixels_x, center_x)
        center_y = tl.fma(tl.load(reference_ptr + 1, mask=mask_row, other=0).to(tl.float32), pixels_y, center_y)
    if REFERENCE_SIZE == 2:
        scale_x = pixels_x / tl.maximum(width, 1).to(tl.float32)
        scale_y = pixels_y / tl.maximum(height, 1).to(tl.float32)
    if REFERENCE_SIZE == 4:
        half_per_point = 0.5 / num_points.to(tl.float32)
        scale_x = tl.load(reference_ptr + 2, mask=mask_row, other=0).to(tl.float32) * (pixels_x * half_per_point)
        scale_y = tl.load(reference_ptr + 3, mask=mask_row, other=0).to(tl.float32) * (pixels_y * half_per_point)
    return scale_x, center_x, scale_y, center_y
