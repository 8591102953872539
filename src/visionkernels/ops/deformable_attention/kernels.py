"""Triton kernels of multi-scale deformable attention, one a direction.

With w[k] the attention weight, (x, y) the pixel coordinates of sample k in its level, x0 = floor(x), a = x - x0 (and so
for y), and v00 .. v11 the four pixels around it (v10 is one row down; a pixel outside the level counts as 0):

    sample[k] = (1-a)(1-b) v00 + a(1-b) v01 + (1-a)b v10 + ab v11          out = sum_k w[k] sample[k]
    d out/d w[k] = sample[k]      d sample/d x = (1-b)(v01 - v00) + b(v11 - v10)      d sample/d y likewise

Unfused, x = location_x * w - 0.5 (align_corners: location_x * (w - 1)). Fused, location = reference + offset / (w, h),
or reference_xy + offset / P * reference_wh / 2, and w = softmax(logits). Either way a coordinate is an affine function
of what is stored, x = stored_x * scale_x + center_x, and one kernel a direction serves both. The softmax is never
stored: with g[k] = grad_out . sample[k], d loss/d logit[k] = w[k] (g[k] - grad_out . out).

Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3.

A program owns ROWS rows; a row is one (query, head), and HEADS consecutive heads of a query are neighbours, because
together they fill the 128-byte line that one read of a pixel brings.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import (
    affine,
    level_shape,
    load_xy,
    locate,
    rows,
    shapes_fit,
    softmax_parts,
    store_xy,
)


@triton.jit(do_not_specialize=["shapes", "stride_value_n", "stride_value_m", "num_images", "num_pixels", "num_queries"])
def _forward_kernel(
    output_ptr,  # [N, Lq, M, D]
    value_ptr,  # [N, S, M, D], any strides but the last
    shapes,  # [L, 2] in memory, or a tuple h0, w0, h1, ...
    point_ptr,  # [N, Lq, M, K, 2] sampling locations, or offsets when fused
    weight_ptr,  # [N, Lq, M, K] attention weights, or logits when fused
    reference_ptr,  # [N, Lq, REFERENCE_LEVELS, REFERENCE_SIZE] when fused
    mask_ptr,  # [N, S] when HAS_MASK
    stride_value_n,
    stride_value_m,
    num_images,
    num_pixels,
    num_queries,
    STRIDE_VALUE_S: tl.constexpr,  # M * D, or what a view makes of it; never the image's size
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,  # K, over all levels
    NUM_POINTS: tl.constexpr,  # points of each level
    FIRST_POINT: tl.constexpr,  # and where they begin
    REFERENCE_SIZE: tl.constexpr,  # 0 unfused, 2 points, 4 boxes
    REFERENCE_LEVELS: tl.constexpr,  # 1 or L
    HAS_MASK: tl.constexpr,
    BORDER: tl.constexpr,
    ALIGN_CORNERS: tl.constexpr,
    SHAPES_IN_MEMORY: tl.constexpr,
    XY_IN_ONE_WORD: tl.constexpr,
    NEAREST: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # every pixel of value starts at a multiple of this many elements
    ACC: tl.constexpr,  # dtype of coordinates and sums
    INDEX: tl.constexpr,  # dtype of offsets within an image
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    IMAGES_FIRST: tl.constexpr,
    PAIRS: tl.constexpr,  # read two bfloat16 as one word
):
    pid_n, offs_query, offs_head, mask_row = rows(num_images, num_queries, ROWS, HEADS, IMAGES_FIRST, INDEX)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    first_query = pid_n * num_queries
    offs_row = offs_query * NUM_HEADS + offs_head  # [ROWS]
    offs_sample = offs_row * NUM_SAMPLES
    output_ptr += first_query * NUM_HEADS * HEAD_DIM
    output_ptrs = output_ptr + (offs_row * HEAD_DIM)[:, None] + offs_d[None, :]  # [ROWS, BLOCK_D]
    mask_tile = mask_row[:, None] & mask_d[None, :]
    if SHAPES_IN_MEMORY:  # noqa: SIM102  (the outer one is decided when compiling)
        # Leaving is cheaper than masks, and nothing outside the value may be touched.
        if not shapes_fit(shapes, num_pixels, NUM_LEVELS):
            tl.store(output_ptrs, tl.full([ROWS, BLOCK_D], float("nan"), output_ptr.dtype.element_ty), mask=mask_tile)
            return
    point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    # Pixels are read in units of one channel, or of two where bfloat16 allows it.
    UNIT: tl.constexpr = 2 if PAIRS else 1
    UNIT_ALIGNMENT: tl.constexpr = ALIGNMENT // UNIT
    STRIDE_UNIT_S: tl.constexpr = STRIDE_VALUE_S // UNIT
    offs_unit = tl.arange(0, BLOCK_D // UNIT)
    mask_unit = offs_unit < HEAD_DIM // UNIT
    if PAIRS:
        value_ptr = value_ptr.to(tl.pointer_type(tl.int32))
    value_ptr += tl.multiple_of(pid_n * (stride_value_n // UNIT), UNIT_ALIGNMENT)
    if HAS_MASK:
        mask_ptr += pid_n * num_pixels
    if REFERENCE_SIZE > 0:
        reference_ptr += first_query * (REFERENCE_LEVELS * REFERENCE_SIZE)
        peak, total = softmax_parts(weight_ptr, offs_sample, mask_row, ACC, NUM_SAMPLES)

    acc = tl.zeros([ROWS, BLOCK_D // UNIT], dtype=ACC)
    acc_high = acc  # with PAIRS the odd channels
    start = pid_n * 0
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        offs_reference = (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, _pixels_x = affine(
            reference_ptr, offs_reference, mask_row, width, 0, NUM_POINTS[level],
            ACC, ALIGN_CORNERS, NEAREST, REFERENCE_SIZE,
        )  # fmt: skip
        scale_y, center_y, _pixels_y = affine(
            reference_ptr, offs_reference, mask_row, height, 1, NUM_POINTS[level],
            ACC, ALIGN_CORNERS, NEAREST, REFERENCE_SIZE,
        )  # fmt: skip
        level_ptr = value_ptr + tl.multiple_of(start * STRIDE_UNIT_S, UNIT_ALIGNMENT)
        next_row = tl.multiple_of(width.to(INDEX) * STRIDE_UNIT_S, UNIT_ALIGNMENT)
        for point in tl.range(0, NUM_POINTS[level], loop_unroll_factor=UNROLL):
            offs_k = offs_sample + (FIRST_POINT[level] + point)
            x, y = load_xy(point_ptr, offs_k, mask_row, ACC, XY_IN_ONE_WORD)
            weight = tl.load(weight_ptr + offs_k, mask=mask_row, other=0).to(ACC)
            if REFERENCE_SIZE > 0:
                weight = tl.exp(weight - peak)
            x0, fraction_x, in_x0, in_x1, _slope_x = locate(x * scale_x + center_x, width, BORDER, NEAREST)
            y0, fraction_y, in_y0, in_y1, _slope_y = locate(y * scale_y + center_y, height, BORDER, NEAREST)
            offs_pixel = y0.to(INDEX) * width + x0
            offs_value = offs_pixel * STRIDE_UNIT_S + offs_head * (stride_value_m // UNIT)
            offs_value = tl.multiple_of(offs_value, UNIT_ALIGNMENT)
            pixel_ptrs = level_ptr + offs_value[:, None] + offs_unit[None, :]  # the upper left corner
            # A sample that is nowhere inside adds 0, whatever its weight is.
            weight = tl.where((in_x0 | in_x1) & (in_y0 | in_y1), weight, 0.0)
            for corner in tl.static_range(1 if NEAREST else 4):
                inside = (in_x1 if corner % 2 else in_x0) & (in_y1 if corner // 2 else in_y0)
                if HAS_MASK:
                    offs_mask = start + offs_pixel + (corner // 2) * width + corner % 2
                    inside = inside & (tl.load(mask_ptr + offs_mask, mask=inside, other=0) != 0)
                corner_ptrs = pixel_ptrs + next_row if corner // 2 else pixel_ptrs
                pixel = tl.load(
                    corner_ptrs + (corner % 2) * STRIDE_UNIT_S, mask=inside[:, None] & mask_unit[None, :], other=0
                )
                factor = weight
                if not NEAREST:
                    factor *= fraction_y if corner // 2 else 1 - fraction_y
                    factor *= fraction_x if corner % 2 else 1 - fraction_x
                if PAIRS:  # a bfloat16 is the upper half of a float32
                    acc += factor[:, None] * (pixel << 16).to(ACC, bitcast=True)
                    acc_high += factor[:, None] * (pixel & -65536).to(ACC, bitcast=True)
                else:
                    acc += factor[:, None] * pixel.to(ACC)
        start += height.to(tl.int64) * width

    if PAIRS:
        acc = tl.reshape(tl.join(acc, acc_high), (ROWS, BLOCK_D))
    if REFERENCE_SIZE > 0:
        acc = acc / total[:, None]
    tl.store(
        output_ptrs,
        acc.to(output_ptr.dtype.element_ty),
        mask=mask_tile,
    )


@triton.jit(do_not_specialize=["shapes", "stride_value_n", "stride_value_m", "num_images", "num_pixels", "num_queries"])
def _backward_kernel(
    grad_value_ptr,  # [N, S, M, D] of dtype ACC, zero on entry
    grad_point_ptr,  # [N, Lq, M, K, 2]
    grad_weight_ptr,  # [N, Lq, M, K]
    grad_reference_ptr,  # [N, Lq, M, REFERENCE_LEVELS, REFERENCE_SIZE] of dtype ACC: each head's part
    grad_output_ptr,  # [N, Lq, M, D]
    output_ptr,  # [N, Lq, M, D] of the forward, for the points' gradients when fused
    value_ptr,  # as in the forward, from here on
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
    STRIDE_VALUE_S: tl.constexpr,  # M * D, or what a view makes of it; never the image's size
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
    NEAREST: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ACC: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    IMAGES_FIRST: tl.constexpr,
    NEEDS_VALUE: tl.constexpr,
    NEEDS_POINTS: tl.constexpr,
    NEEDS_REFERENCE: tl.constexpr,
):
    pid_n, offs_query, offs_head, mask_row = rows(num_images, num_queries, ROWS, HEADS, IMAGES_FIRST, INDEX)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    mask_tile = mask_row[:, None] & mask_d[None, :]
    mask_point = mask_row
    if SHAPES_IN_MEMORY:  # points that are not read are nowhere, so nothing outside the value is touched
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_point = offs_query < tl.where(fit, num_queries, 0)
    first_query = pid_n * num_queries
    offs_row = offs_query * NUM_HEADS + offs_head  # [ROWS]
    offs_sample = offs_row * NUM_SAMPLES
    point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    value_ptr += tl.multiple_of(pid_n * stride_value_n, ALIGNMENT)
    if NEEDS_VALUE:
        grad_value_ptr += pid_n * num_pixels * NUM_HEADS * HEAD_DIM
    if NEEDS_POINTS:
        grad_point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
        grad_weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    if HAS_MASK:
        mask_ptr += pid_n * num_pixels
    offs_tile = first_query * NUM_HEADS * HEAD_DIM + (offs_row * HEAD_DIM)[:, None] + offs_d[None, :]
    grad_output = tl.load(grad_output_ptr + offs_tile, mask=mask_tile, other=0).to(ACC)  # [ROWS, BLOCK_D]
    if REFERENCE_SIZE > 0:
        reference_ptr += first_query * (REFERENCE_LEVELS * REFERENCE_SIZE)
        peak, total = softmax_parts(weight_ptr, offs_sample, mask_row, ACC, NUM_SAMPLES)
        if NEEDS_POINTS:
            # Where shapes do not fit the output is NaN, and gradients are 0.
            mask_output = mask_point[:, None] & mask_d[None, :]
            output = tl.load(output_ptr + offs_tile, mask=mask_output, other=0).to(ACC)
            grad_dot_output = tl.sum(grad_output * output, axis=1)  # [ROWS]

    total_x = tl.zeros([ROWS], dtype=ACC)
    total_y = total_x
    total_w = total_x
    total_h = total_x
    start = pid_n * 0
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        offs_reference = (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, pixels_x = affine(
            reference_ptr, offs_reference, mask_row, width, 0, NUM_POINTS[level],
            ACC, ALIGN_CORNERS, NEAREST, REFERENCE_SIZE,
        )  # fmt: skip
        scale_y, center_y, pixels_y = affine(
            reference_ptr, offs_reference, mask_row, height, 1, NUM_POINTS[level],
            ACC, ALIGN_CORNERS, NEAREST, REFERENCE_SIZE,
        )  # fmt: skip
        level_ptr = value_ptr + tl.multiple_of(start * STRIDE_VALUE_S, ALIGNMENT)
        next_row = tl.multiple_of(width.to(INDEX) * STRIDE_VALUE_S, ALIGNMENT)
        if NEEDS_VALUE:
            grad_level_ptr = grad_value_ptr + start * NUM_HEADS * HEAD_DIM
            grad_next_row = width.to(INDEX) * (NUM_HEADS * HEAD_DIM)
        sum_x = tl.zeros([ROWS], dtype=ACC)
        sum_y = tl.zeros([ROWS], dtype=ACC)
        sum_w = tl.zeros([ROWS], dtype=ACC)
        sum_h = tl.zeros([ROWS], dtype=ACC)
        for point in tl.range(0, NUM_POINTS[level], loop_unroll_factor=UNROLL):
            offs_k = offs_sample + (FIRST_POINT[level] + point)
            x, y = load_xy(point_ptr, offs_k, mask_point, ACC, XY_IN_ONE_WORD)
            weight = tl.load(weight_ptr + offs_k, mask=mask_row, other=0).to(ACC)
            if REFERENCE_SIZE > 0:
                weight = tl.exp(weight - peak) / total
            x0, fraction_x, in_x0, in_x1, slope_x = locate(x * scale_x + center_x, width, BORDER, NEAREST)
            y0, fraction_y, in_y0, in_y1, slope_y = locate(y * scale_y + center_y, height, BORDER, NEAREST)
            offs_pixel = y0.to(INDEX) * width + x0
            offs_value = tl.multiple_of(offs_pixel * STRIDE_VALUE_S + offs_head * stride_value_m, ALIGNMENT)
            pixel_ptrs = level_ptr + offs_value[:, None] + offs_d[None, :]  # [ROWS, BLOCK_D], the upper left corner
            if NEEDS_VALUE:
                offs_grad = (offs_pixel * NUM_HEADS + offs_head) * HEAD_DIM
                grad_ptrs = grad_level_ptr + offs_grad[:, None] + offs_d[None, :]
            grad_weight = tl.zeros([ROWS], dtype=ACC)
            grad_x = tl.zeros([ROWS], dtype=ACC)
            grad_y = tl.zeros([ROWS], dtype=ACC)
            for corner in tl.static_range(1 if NEAREST else 4):
                inside = (in_x1 if corner % 2 else in_x0) & (in_y1 if corner // 2 else in_y0)
                if HAS_MASK:
                    offs_mask = start + offs_pixel + (corner // 2) * width + corner % 2
                    inside = inside & (tl.load(mask_ptr + offs_mask, mask=inside, other=0) != 0)
                mask_pixel = inside[:, None] & mask_d[None, :]
                weight_x = tl.full(weight.shape, 1.0, ACC)
                weight_y = weight_x
                if not NEAREST:
                    weight_x = fraction_x if corner % 2 else 1 - fraction_x
                    weight_y = fraction_y if corner // 2 else 1 - fraction_y
                if NEEDS_POINTS:
                    corner_ptrs = pixel_ptrs + next_row if corner // 2 else pixel_ptrs
                    pixel = tl.load(corner_ptrs + (corner % 2) * STRIDE_VALUE_S, mask=mask_pixel, other=0).to(ACC)
                    dot = tl.sum(grad_output * pixel, axis=1)  # [ROWS]; 0 where the corner is outside
                    grad_weight += dot * (weight_x * weight_y)
                    grad_x += dot * (weight_y if corner % 2 else -weight_y)
                    grad_y += dot * (weight_x if corner // 2 else -weight_x)
                if NEEDS_VALUE:
                    corner_ptrs = grad_ptrs + grad_next_row if corner // 2 else grad_ptrs
                    tl.atomic_add(
                        corner_ptrs + (corner % 2) * NUM_HEADS * HEAD_DIM,
                        (weight * (weight_x * weight_y))[:, None] * grad_output,
                        mask=mask_pixel,
                        sem="relaxed",
                    )
            if NEEDS_POINTS:
                counts = (in_x0 | in_x1) & (in_y0 | in_y1)
                # Chosen, not multiplied by 0: grad_output may be NaN.
                grad_weight = tl.where(counts, grad_weight, 0.0)
                grad_x = tl.where(counts & (slope_x != 0), grad_x * weight * slope_x, 0.0)
                grad_y = tl.where(counts & (slope_y != 0), grad_y * weight * slope_y, 0.0)
                if REFERENCE_SIZE > 0:
                    grad_weight = weight * (grad_weight - grad_dot_output)
                if NEEDS_REFERENCE:
                    sum_x += grad_x
                    sum_y += grad_y
                    sum_w += tl.where(counts, grad_x * x, 0.0)
                    sum_h += tl.where(counts, grad_y * y, 0.0)
                tl.store(grad_weight_ptr + offs_k, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask_row)
                if not NEAREST:
                    scaled_x = tl.where(counts, grad_x * scale_x, 0.0)
                    scaled_y = tl.where(counts, grad_y * scale_y, 0.0)
                    store_xy(grad_point_ptr, offs_k, scaled_x, scaled_y, mask_row, False)
        if NEEDS_REFERENCE:
            total_x += sum_x * pixels_x
            total_y += sum_y * pixels_y
            if REFERENCE_SIZE == 4:
                # Not by a number of its own name: it would be a float32, in float64 too.
                total_w += sum_w * (pixels_x * (0.5 / (NUM_POINTS[level] if NUM_POINTS[level] > 0 else 1)))
                total_h += sum_h * (pixels_y * (0.5 / (NUM_POINTS[level] if NUM_POINTS[level] > 0 else 1)))
            if REFERENCE_LEVELS > 1 or level == NUM_LEVELS - 1:
                offs_part = (first_query * NUM_HEADS + offs_row) * REFERENCE_LEVELS + level % REFERENCE_LEVELS
                part_ptrs = grad_reference_ptr + offs_part * REFERENCE_SIZE
                tl.store(part_ptrs, total_x, mask=mask_row)
                tl.store(part_ptrs + 1, total_y, mask=mask_row)
                if REFERENCE_SIZE == 4:
                    tl.store(part_ptrs + 2, total_w, mask=mask_row)
                    tl.store(part_ptrs + 3, total_h, mask=mask_row)
                total_x = tl.zeros([ROWS], dtype=ACC)
                total_y = total_x
                total_w = total_x
                total_h = total_x
        start += height.to(tl.int64) * width
