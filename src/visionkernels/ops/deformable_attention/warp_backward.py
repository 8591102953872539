"""The gradients of points, weights and reference points for NVIDIA GPUs, cut as ``warp_forward`` cuts the forward.

All of them are made of the dot products of grad_output with a sample's four pixels. Each of the LANES lanes that read a
pixel has its part of them. While these are summed over the lanes, the samples are dealt out: at the end each lane holds
the four products of the sample that it owns, and knows its coordinates already.
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
    store_xy,
)
from visionkernels.ops.deformable_attention.warp import (
    dot_add,
    lanes_max,
    lanes_sum,
    load_words,
    shuffle,
    shuffle_float,
    unpack,
)
from visionkernels.ops.deformable_attention.warp_samples import (
    axis_of_sample,
    corners_that_count,
    lane_address,
    load_corners,
)


@triton.jit
def _channels(words, element: tl.constexpr):
    """The channels in four words as float32."""
    channels = ()
    for word in tl.static_range(4):
        if element == tl.float32:
            channels = channels + (words[word].to(tl.float32, bitcast=True),)
        else:
            low, high = unpack(words[word], element == tl.bfloat16)
            channels = channels + (low, high)
    return channels


@triton.jit
def _partial_dot(grad, words, element: tl.constexpr):
    """This lane's part of grad_output . pixel."""
    dot = grad[0] * 0
    for word in tl.static_range(4):
        if element == tl.float32:
            dot += grad[word] * words[word].to(tl.float32, bitcast=True)
        else:
            dot = dot_add(dot, grad[2 * word], grad[2 * word + 1], words[word], element == tl.bfloat16)
    return dot


@triton.jit
def _deal(dots, lane, HALF: tl.constexpr):
    """Of two halves of ``dots``, the one that this lane keeps, plus the same of the lane ``HALF`` further."""
    upper = lane & HALF != 0
    dealt = ()
    for i in tl.static_range(len(dots) // 2):
        keep = tl.where(upper, dots[len(dots) // 2 + i], dots[i])
        give = tl.where(upper, dots[i], dots[len(dots) // 2 + i])
        dealt = dealt + (keep + shuffle_float(give, lane ^ HALF),)
    return dealt


@triton.jit
def _sample_dots(
    j: tl.constexpr, first: tl.constexpr, grad, where, width, widths, value_address, lane,
    STRIDE_VALUE_S: tl.constexpr, NUM_SAMPLES: tl.constexpr, FIRST_POINT: tl.constexpr,
    LANES: tl.constexpr, GROUP: tl.constexpr, element: tl.constexpr,
):  # fmt: skip
    """This lane's parts of the four dot products of the j-th sample that its pixel's lanes read in this turn."""
    if first + j < NUM_SAMPLES:
        owner = lane - lane % LANES + j
        there = shuffle(where, owner)
        if GROUP > LANES:
            width_j = shuffle(width, owner)
        else:
            width_j = of_sample(first + j, widths, first + j, 1, FIRST_POINT)
        address = value_address + (there & -16)
        pixels = load_corners(there, address, width_j, STRIDE_VALUE_S, element.primitive_bitwidth // 8)
        dots = (
            _partial_dot(grad, pixels[0], element),
            _partial_dot(grad, pixels[1], element),
            _partial_dot(grad, pixels[2], element),
            _partial_dot(grad, pixels[3], element),
        )
    else:
        zero = grad[0] * 0
        dots = (zero, zero, zero, zero)
    return dots


@triton.jit
def _add_to_level(
    sums, parts, level, first: tl.constexpr, GROUP: tl.constexpr,
    FIRST_POINT: tl.constexpr, NUM_POINTS: tl.constexpr, REFERENCE_LEVELS: tl.constexpr,
):  # fmt: skip
    """``sums`` (a part after the other, for every level that has a reference) plus the samples' ``parts``."""
    added = ()
    for reference_level in tl.static_range(REFERENCE_LEVELS):
        for i in tl.static_range(len(parts)):
            total = sums[reference_level * len(parts) + i]
            if REFERENCE_LEVELS == 1:
                total += parts[i]
            else:
                if FIRST_POINT[reference_level] < first + GROUP:  # noqa: SIM102  (decided when compiling)
                    if FIRST_POINT[reference_level] + NUM_POINTS[reference_level] > first:
                        total += tl.where(level == reference_level, parts[i], 0.0)
            added = added + (total,)
    return added


@triton.jit(do_not_specialize=["shapes", "stride_value_n", "stride_value_m", "num_images", "num_pixels", "num_queries"])
def _backward_points_kernel(
    _grad_value_ptr,  # the tensors and sizes are those of kernels._backward_kernel; this one and _output_ptr are None
    grad_point_ptr,
    grad_weight_ptr,
    grad_reference_ptr,
    grad_output_ptr,
    _output_ptr,
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
    NEEDS_REFERENCE: tl.constexpr,
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
    mask_fit = mask_row
    if SHAPES_IN_MEMORY:  # points that are not read are nowhere, so nothing outside the value is touched
        fit = shapes_fit(shapes, num_pixels, NUM_LEVELS)
        mask_fit = offs_query < tl.where(fit, num_queries, 0)
    first_query = pid_n * num_queries
    offs_row = offs_query * NUM_HEADS + offs_head
    offs_sample = offs_row * NUM_SAMPLES
    value_address = lane_address(value_ptr + pid_n * stride_value_n, 0, member % LANES)
    point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    grad_point_ptr += first_query * NUM_HEADS * (NUM_SAMPLES * 2)
    grad_weight_ptr += first_query * NUM_HEADS * NUM_SAMPLES
    grad_output_ptr += first_query * NUM_HEADS * HEAD_DIM
    grad_address = lane_address(grad_output_ptr, offs_row * HEAD_DIM, member % LANES)
    grad = _channels(load_words(grad_address, mask_row.to(tl.int32)), element)
    if HAS_MASK:
        mask_ptr += pid_n * num_pixels
    zero = tl.zeros([THREADS], tl.float32)
    if FUSED:
        reference_ptr += first_query * (REFERENCE_LEVELS * REFERENCE_SIZE)
        peak = zero + float("-inf")
        total = zero
        for first in tl.static_range(0, NUM_SAMPLES, GROUP):
            mask = mask_row & (first + member < NUM_SAMPLES)
            logit = tl.load(weight_ptr + offs_sample + first + member, mask=mask, other=NO_WEIGHT)
            peak = tl.maximum(peak, logit.to(tl.float32))
        peak = tl.where(mask_row, lanes_max(peak, lane, GROUP), 0.0)
        for first in tl.static_range(0, NUM_SAMPLES, GROUP):
            mask = mask_row & (first + member < NUM_SAMPLES)
            logit = tl.load(weight_ptr + offs_sample + first + member, mask=mask, other=NO_WEIGHT)
            total += tl.exp(logit.to(tl.float32) - peak)
        inverse_total = 1.0 / lanes_sum(total, lane, GROUP)

    heights, widths, starts, levels = levels_of(shapes, NUM_LEVELS, SHAPES_IN_MEMORY)
    sums = (zero,) * (REFERENCE_LEVELS * REFERENCE_SIZE)
    weights = ()  # of the samples that this lane owns, when fused, and the gradients of these weights
    grad_weights = ()
    mean = zero
    for first in tl.static_range(0, NUM_SAMPLES, GROUP):
        k = first + member  # the sample that this lane owns
        mask = mask_row
        if first + GROUP > NUM_SAMPLES:
            mask = mask & (k < NUM_SAMPLES)
        x, y = load_xy(point_ptr, offs_sample + k, mask & mask_fit, tl.float32, XY_IN_ONE_WORD)
        weight = tl.load(weight_ptr + offs_sample + k, mask=mask, other=NO_WEIGHT).to(tl.float32)
        height = of_sample(k, heights, first, GROUP, FIRST_POINT)
        width = of_sample(k, widths, first, GROUP, FIRST_POINT)
        start = of_sample(k, starts, first, GROUP, FIRST_POINT)
        level = of_sample(k, levels, first, GROUP, FIRST_POINT)
        num_points = of_sample(k, NUM_POINTS, first, GROUP, FIRST_POINT)
        reference_ptrs = reference_ptr
        if FUSED:
            weight = tl.exp(weight - peak) * inverse_total
            reference_ptrs += (offs_query * REFERENCE_LEVELS + level % REFERENCE_LEVELS) * REFERENCE_SIZE
        scale_x, center_x, scale_y, center_y = affine_of_sample(
            reference_ptrs, mask_row, height, width, num_points, ALIGN_CORNERS, REFERENCE_SIZE
        )
        column, weight_x0, weight_x1, both_x, any_x, slope_x0, slope_x1 = axis_of_sample(
            tl.fma(x, scale_x, center_x), width, BORDER
        )
        row, weight_y0, weight_y1, both_y, any_y, slope_y0, slope_y1 = axis_of_sample(
            tl.fma(y, scale_y, center_y), height, BORDER
        )
        offs_pixel = start + row * width + column
        flags = corners_that_count(offs_pixel, width, any_x, both_x, any_y, both_y, mask_ptr, HAS_MASK)
        where = (offs_pixel * STRIDE_VALUE_S + offs_head * stride_value_m) * ITEMSIZE | flags
        dots = ()
        for j in tl.static_range((LANES + 1) // 2):  # two samples at a time, so that few sums wait
            pair = _sample_dots(
                j, first, grad, where, width, widths, value_address, lane,
                STRIDE_VALUE_S, NUM_SAMPLES, FIRST_POINT, LANES, GROUP, element,
            )  # fmt: skip
            if LANES > 1:
                pair += _sample_dots(
                    j + LANES // 2, first, grad, where, width, widths, value_address, lane,
                    STRIDE_VALUE_S, NUM_SAMPLES, FIRST_POINT, LANES, GROUP, element,
                )  # fmt: skip
                pair = _deal(pair, lane, LANES // 2)
            dots = dots + pair
        for bit in tl.static_range(3, -1, -1):
            if (2 << bit) < LANES:
                dots = _deal(dots, lane, 1 << bit)
        dot0, dot1, dot2, dot3 = dots
        counts = any_x & any_y  # elsewhere a coordinate, and so a weight, may be anything; so may grad_output
        upper = weight_x0 * dot0 + weight_x1 * dot1
        lower = weight_x0 * dot2 + weight_x1 * dot3
        grad_weight = tl.where(counts, weight_y0 * upper + weight_y1 * lower, 0.0)
        grad_x = weight_y0 * (slope_x0 * dot0 + slope_x1 * dot1) + weight_y1 * (slope_x0 * dot2 + slope_x1 * dot3)
        grad_x = tl.where(counts & (slope_x1 != 0), grad_x * weight, 0.0)
        grad_y = tl.where(counts & (slope_y1 != 0), (slope_y0 * upper + slope_y1 * lower) * weight, 0.0)
        if FUSED:
            weights = weights + (weight,)
            grad_weights = grad_weights + (grad_weight,)
            mean += weight * grad_weight
        else:
            tl.store(grad_weight_ptr + offs_sample + k, grad_weight.to(grad_weight_ptr.dtype.element_ty), mask=mask)
        scaled_x = tl.where(counts, grad_x * scale_x, 0.0)
        scaled_y = tl.where(counts, grad_y * scale_y, 0.0)
        store_xy(grad_point_ptr, offs_sample + k, scaled_x, scaled_y, mask, XY_IN_ONE_WORD)
        if NEEDS_REFERENCE:
            pixels_x = (width - 1).to(tl.float32) if ALIGN_CORNERS else width.to(tl.float32)
            pixels_y = (height - 1).to(tl.float32) if ALIGN_CORNERS else height.to(tl.float32)
            grad_x *= pixels_x
            grad_y *= pixels_y
            parts = (grad_x, grad_y)
            if REFERENCE_SIZE == 4:
                half_per_point = 0.5 / num_points.to(tl.float32)
                parts = parts + (
                    tl.where(counts, grad_x * x * half_per_point, 0.0),
                    tl.where(counts, grad_y * y * half_per_point, 0.0),
                )
            sums = _add_to_level(sums, parts, level, first, GROUP, FIRST_POINT, NUM_POINTS, REFERENCE_LEVELS)

    if FUSED:  # the gradient of the softmax
        mean = lanes_sum(mean, lane, GROUP)
        for i in tl.static_range(len(weights)):
            k = i * GROUP + member
            grad_logit = weights[i] * (grad_weights[i] - mean)
            grad_logit = grad_logit.to(grad_weight_ptr.dtype.element_ty)
            tl.store(grad_weight_ptr + offs_sample + k, grad_logit, mask=mask_row & (k < NUM_SAMPLES))
    if NEEDS_REFERENCE:
        offs_pair = (first_query * NUM_HEADS + offs_row) * (REFERENCE_LEVELS * REFERENCE_SIZE // 2)
        for pair in tl.static_range(REFERENCE_LEVELS * REFERENCE_SIZE // 2):
            x = lanes_sum(sums[2 * pair], lane, GROUP)
            y = lanes_sum(sums[2 * pair + 1], lane, GROUP)
            store_xy(grad_reference_ptr, offs_pair + pair, x, y, mask_row & (member == 0), True)
