"""The gradients of points, weights and reference points for NVIDIA GPUs, where a channel has 16 bits.

With g the row's grad_output and v a pixel, all three are made of the dot products g . v, four a sample. The tensor
cores compute them, m16n8k16: eight rows (query, head) at a time, four samples of a level each.

Four lanes with the same ``lane // 4`` read one pixel, 16 bytes each, and that is operand A without a move: the four
words of lane ``member`` are PTX's a0 .. a3, so words 0 and 2 lie in row ``group`` of A, words 1 and 3 in row 8 + group.
Operand B holds g of four rows of the program, once its words 0 and 2, once its words 1 and 3, in columns 2 r and
2 r + 1. Then g . v is c0 + c3 of the lane whose column it is, and of the four rows in B that lane needs one: the row of
the pixel that its group has read. So each lane owns a row and one of four samples, works out where the sample lies, and
finds the dot products of its corners in its own registers; only the pixels' addresses are shuffled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.sampling import (
    affine,
    inside_corners,
    level_shape,
    load_xy,
    locate,
    rows_of,
    shapes_fit,
    store_xy,
)
from visionkernels.ops.deformable_attention.warp import (
    lanes_max,
    lanes_sum,
    load_words,
    mma,
    shuffle,
    shuffle_float,
    unpack,
)


@triton.jit
def _row_sum(x, lane):
    """Sum over the four owners of a row: those that differ in bit 4 and, within a row's turns, in the last bit."""
    x += shuffle_float(x, lane ^ 16)
    group = lane // 4
    member = lane % 4
    turn = (member - group) & 3
    partner = (group & 4) + ((member - (turn ^ 1)) & 3)
    return x + shuffle_float(x, partner * 4 + member)


@triton.jit
def _operand_b(grad_output_ptr, group, member, num_images, num_queries, NUM_HEADS: tl.constexpr,
               HEAD_DIM: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """grad_output as operand B: rows 0 - 3, then rows 4 - 7 of the program, two words for every 16 bytes of a lane."""
    operand = ()
    for half in tl.static_range(2):
        pid_n, query, head, exists = rows_of(half * 4 + group // 2, num_images, num_queries, 8, HEADS, False, tl.int32)
        offs = (pid_n * num_queries + query) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
        address = (grad_output_ptr + offs).to(tl.int64) + member * 16
        for chunk in tl.static_range(HEAD_DIM // 32):
            words = load_words(address + 64 * chunk, exists.to(tl.int32))
            for word in tl.static_range(0, 4, 2):
                operand = operand + (tl.where(group % 2 == 0, words[word], words[word + 1]),)
    return operand


@triton.jit
def _grad_dot_output(grad_output_ptr, output_ptr, group, member, lane, num_images, num_queries,
                     NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """grad_output . output of row ``group``."""
    BFLOAT16: tl.constexpr = output_ptr.dtype.element_ty == tl.bfloat16
    pid_n, query, head, exists = rows_of(group, num_images, num_queries, 8, HEADS, False, tl.int32)
    offs = (pid_n * num_queries + query) * (NUM_HEADS * HEAD_DIM) + head * HEAD_DIM
    grad_address = (grad_output_ptr + offs).to(tl.int64) + member * 16
    output_address = (output_ptr + offs).to(tl.int64) + member * 16
    dot = tl.zeros([32], tl.float32)
    for chunk in tl.static_range(HEAD_DIM // 32):
        grad = load_words(grad_address + 64 * chunk, exists.to(tl.int32))
        words = load_words(output_address + 64 * chunk, exists.to(tl.int32))
        for word in tl.static_range(4):
            grad_low, grad_high = unpack(grad[word], BFLOAT16)
            low, high = unpack(words[word], BFLOAT16)
            dot += grad_low * low + grad_high * high
    return lanes_sum(dot, lane, 4)


@triton.jit
def _softmax_of_group(logit_ptr, group, member, lane, num_images, num_queries, NUM_HEADS: tl.constexpr,
                      NUM_SAMPLES: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """Maximum of the logits of row ``group``, and one over the sum of their exponentials."""
    _pid_n, query, head, exists = rows_of(group, num_images, num_queries, 8, HEADS, False, tl.int32)
    logit_ptrs = logit_ptr + (query * NUM_HEADS + head) * NUM_SAMPLES + member
    peak = tl.full([32], float("-inf"), tl.float32)
    total = tl.zeros([32], tl.float32)
    for first in tl.static_range(0, NUM_SAMPLES, 4):
        mask = exists & (first + member < NUM_SAMPLES)
        peak = tl.maximum(peak, tl.load(logit_ptrs + first, mask=mask, other=float("-inf")).to(tl.float32))
    peak = tl.where(exists, lanes_max(peak, lane, 4), 0.0)
    for first in tl.static_range(0, NUM_SAMPLES, 4):
        mask = exists & (first + member < NUM_SAMPLES)
        logit = tl.load(logit_ptrs + first, mask=mask, other=float("-inf")).to(tl.float32)
        total += tl.exp(logit - peak)
    return peak, 1.0 / lanes_sum(total, lane, 4)


@triton.jit
def _corner_dots(where, value_address, next_row, operand, lane, turn, NEXT_COLUMN: tl.constexpr,
                 CHUNKS: tl.constexpr, BFLOAT16: tl.constexpr):  # fmt: skip
    """For the four corners of this lane's sample: grad_output . pixel."""
    group = lane // 4
    zero = tl.zeros([32], tl.float32)
    always = tl.full([32], 1, tl.int32)
    dot0 = zero
    dot1 = zero
    dot2 = zero
    dot3 = zero
    for rotation in tl.static_range(4):  # each group reads the pixels of its four lanes
        there = shuffle(where, group * 4 + ((group + rotation) & 3))
        address = value_address + (there & -16)
        step_x = ((there & 1) * NEXT_COLUMN).to(tl.int64)
        step_y = (((there >> 1) & 1) * next_row).to(tl.int64)
        dots = ()
        for corner in tl.static_range(4):
            corner_address = address + step_y if corner // 2 else address
            if corner % 2:
                corner_address += step_x
            c0 = zero
            c1 = zero
            c2 = zero
            c3 = zero
            for chunk in tl.static_range(CHUNKS):
                a = load_words(corner_address + 64 * chunk, always)
                b0 = operand[(rotation // 2 * CHUNKS + chunk) * 2]
                b1 = operand[(rotation // 2 * CHUNKS + chunk) * 2 + 1]
                c0, c1, c2, c3 = mma(a[0], a[1], a[2], a[3], b0, b1, c0, c1, c2, c3, BFLOAT16)
            dots = dots + (c0 + c3,)
        mine = turn == rotation
        dot0 = tl.where(mine, dots[0], dot0)
        dot1 = tl.where(mine, dots[1], dot1)
        dot2 = tl.where(mine, dots[2], dot2)
        dot3 = tl.where(mine, dots[3], dot3)
    return dot0, dot1, dot2, dot3


@triton.jit(do_not_specialize=["shapes", "stride_value_n", "stride_value_m", "num_images", "num_pixels", "num_queries"])
def _backward_points_kernel(
    _grad_value_ptr,  # the tensors and sizes are those of kernels._backward_kernel; the first one is None
    grad_point_ptr,
    grad_weight_ptr,
    grad_reference_ptr,
    grad_output_ptr,
    output_ptr,
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
    MAX_POINTS: tl.constexpr,  # of a level
    HEADS: tl.constexpr,
    NEEDS_REFERENCE: tl.constexpr,
):
    ACC: tl.constexpr = tl.float32
    BFLOAT16: tl.constexpr = value_ptr.dtype.element_ty == tl.bfloat16
    NEXT_COLUMN: tl.constexpr = STRIDE_VALUE_S * 2  # bytes
    lane = tl.arange(0, 32)
    group = lane // 4
    member = lane % 4
    turn = (member - group) & 3  # the rotation in which this lane's column of B meets the pixels of its row
    my_row = turn // 2 * 4 + member
    my_sample = turn % 2 * 2 + group // 4
    pid_n, offs_query, offs_head, mask_row = rows_of(my_row, num_images, num_queries, 8, HEADS, False, tl.int32)
    mask_fit = mask_row
    if SHAPES_IN_MEMORY:  # points that are not read are nowhere
        mask_fit = mask_row & shapes_fit(shapes, num_pixels, NUM_LEVELS)
    first_query = pid_n * num_queries
    offs_row = offs_query * NUM_HEADS + offs_head
    offs_sample = offs_row * NUM_SAMPLES
    point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    grad_point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    grad_weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    value_address = (value_ptr + pid_n * stride_value_n).to(tl.int64) + member * 16
    operand = _operand_b(grad_output_ptr, group, member, num_images, num_queries, NUM_HEADS, HEAD_DIM, HEADS)
    if HAS_MASK:
        mask_ptr += pid_n * num_pixels
    if REFERENCE_SIZE > 0:
        reference_ptr += first_query * (REFERENCE_LEVELS * REFERENCE_SIZE)
        dot_output = _grad_dot_output(
            grad_output_ptr, output_ptr, group, member, lane, num_images, num_queries, NUM_HEADS, HEAD_DIM, HEADS
        )
        peak, inverse_total = _softmax_of_group(
            weight_ptr, group, member, lane, num_images, num_queries, NUM_HEADS, NUM_SAMPLES, HEADS
        )
        dot_output = shuffle_float(dot_output, my_row * 4)
        peak = shuffle_float(peak, my_row * 4)
        inverse_total = shuffle_float(inverse_total, my_row * 4)

    start = pid_n * 0
    for level in tl.static_range(NUM_LEVELS):
        height, width = level_shape(shapes, level, SHAPES_IN_MEMORY)
        offs_reference = (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, pixels_x = affine(
            reference_ptr, offs_reference, mask_row, width, 0, NUM_POINTS[level],
            ACC, ALIGN_CORNERS, False, REFERENCE_SIZE,
        )  # fmt: skip
        scale_y, center_y, pixels_y = affine(
            reference_ptr, offs_reference, mask_row, height, 1, NUM_POINTS[level],
            ACC, ALIGN_CORNERS, False, REFERENCE_SIZE,
        )  # fmt: skip
        # Every address that is read lies in the value: a corner that is outside reads another one, and so does a
        # sample of a level that has no pixel.
        level_address = value_address + tl.minimum(start, num_pixels - 1) * NEXT_COLUMN
        last_row = tl.maximum(height - 1, 0)
        last_column = tl.maximum(width - 1, 0)
        sum_x = tl.zeros([32], ACC)
        sum_y = sum_x
        sum_w = sum_x
        sum_h = sum_x
        for first in tl.static_range(0, MAX_POINTS, 4):
            if first < NUM_POINTS[level]:
                exists = first + my_sample < NUM_POINTS[level]
                offs_k = offs_sample + (FIRST_POINT[level] + first + my_sample)
                x, y = load_xy(point_ptr, offs_k, mask_fit & exists, ACC, XY_IN_ONE_WORD)
                weight = tl.load(weight_ptr + offs_k, mask=mask_row & exists, other=0).to(ACC)
                if REFERENCE_SIZE > 0:
                    weight = tl.exp(weight - peak) * inverse_total
                x0, fraction_x, in_x0, in_x1, slope_x = locate(x * scale_x + center_x, width, BORDER, False)
                y0, fraction_y, in_y0, in_y1, slope_y = locate(y * scale_y + center_y, height, BORDER, False)
                column, weight_x0, weight_x1, both_x = inside_corners(x0, fraction_x, in_x0, in_x1)
                row, weight_y0, weight_y1, both_y = inside_corners(y0, fraction_y, in_y0, in_y1)
                has0 = (in_x0 | in_x1) & (in_y0 | in_y1)
                has1 = has0 & both_x
                has2 = has0 & both_y
                has3 = has1 & both_y
                counts = has0
                offs_pixel = tl.minimum(row, last_row) * width + tl.minimum(column, last_column)
                if HAS_MASK:
                    mask_ptrs = mask_ptr + start + offs_pixel
                    has0 = has0 & (tl.load(mask_ptrs, mask=has0, other=0) != 0)
                    has1 = has1 & (tl.load(mask_ptrs + 1, mask=has1, other=0) != 0)
                    has2 = has2 & (tl.load(mask_ptrs + width, mask=has2, other=0) != 0)
                    has3 = has3 & (tl.load(mask_ptrs + width + 1, mask=has3, other=0) != 0)
                steps = both_x.to(tl.int32) | both_y.to(tl.int32) * 2
                where = (offs_pixel * STRIDE_VALUE_S + offs_head * stride_value_m) * 2 | steps
                dot0, dot1, dot2, dot3 = _corner_dots(
                    where,
                    level_address,
                    width * NEXT_COLUMN,
                    operand,
                    lane,
                    turn,
                    NEXT_COLUMN,
                    HEAD_DIM // 32,
                    BFLOAT16,
                )
                dot0 = tl.where(has0, dot0, 0.0)
                dot1 = tl.where(has1, dot1, 0.0)
                dot2 = tl.where(has2, dot2, 0.0)
                dot3 = tl.where(has3, dot3, 0.0)
                upper = weight_x0 * dot0 + weight_x1 * dot1
                lower = weight_x0 * dot2 + weight_x1 * dot3
                # Where only the next pixel is inside, it stands first: then the slope has the other sign.
                sign_x = tl.where(in_x0, -1.0, 1.0)
                sign_y = tl.where(in_y0, -1.0, 1.0)
                grad_weight = weight_y0 * upper + weight_y1 * lower
                grad_x = weight_y0 * (sign_x * dot0 + dot1) + weight_y1 * (sign_x * dot2 + dot3)
                grad_y = sign_y * upper + lower
                grad_x = tl.where(counts, grad_x * weight * slope_x, 0.0)
                grad_y = tl.where(counts, grad_y * weight * slope_y, 0.0)
                grad_weight = tl.where(counts, grad_weight, 0.0)
                if REFERENCE_SIZE > 0:
                    grad_weight = weight * (grad_weight - dot_output)
                if NEEDS_REFERENCE:
                    sum_x += grad_x
                    sum_y += grad_y
                    sum_w += tl.where(counts, grad_x * x, 0.0)
                    sum_h += tl.where(counts, grad_y * y, 0.0)
                mask = mask_row & exists
                tl.store(grad_weight_ptr + offs_k, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)
                scaled_x = tl.where(counts, grad_x * scale_x, 0.0)
                scaled_y = tl.where(counts, grad_y * scale_y, 0.0)
                store_xy(grad_point_ptr, offs_k, scaled_x, scaled_y, mask, XY_IN_ONE_WORD)
        if NEEDS_REFERENCE:
            offs_part = ((first_query + offs_query) * NUM_HEADS + offs_head) * NUM_LEVELS + level
            part_ptrs = grad_reference_ptr + offs_part * REFERENCE_SIZE
            mask = mask_row & (my_sample == 0)
            tl.store(part_ptrs, _row_sum(sum_x, lane) * pixels_x, mask=mask)
            tl.store(part_ptrs + 1, _row_sum(sum_y, lane) * pixels_y, mask=mask)
            if REFERENCE_SIZE == 4:
                half_per_point = 0.5 / (NUM_POINTS[level] if NUM_POINTS[level] > 0 else 1)
                tl.store(part_ptrs + 2, _row_sum(sum_w, lane) * (pixels_x * half_per_point), mask=mask)
                tl.store(part_ptrs + 3, _row_sum(sum_h, lane) * (pixels_y * half_per_point), mask=mask)
        start += height.to(tl.int64) * width
