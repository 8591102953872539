"""The Triton kernel of layer normalisation, alone or of a residual sum.

    x = input, or residual + scale * input rounded to its dtype; the input may be a linear layer's, in parts of its sum
    mean = sum(x) / C      var = sum((x - mean)^2) / C      output = (x - mean) / sqrt(var + eps) * weight + bias

A row lies in registers, so that the two sums cost one read. A program takes LOOP times ROWS rows, one after another,
and reads weight and bias once.

Source: Ba et al., "Layer Normalization" (https://arxiv.org/abs/1607.06450), equations 3 and 4.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_kernel(
    output_ptr,  # [M, C]
    sum_ptr,  # [M, C], or None without a residual
    input_ptr,  # [M, C], rows anywhere; or [PARTS, M, C], contiguous, whose sum it is
    residual_ptr,  # [M, C], rows anywhere, or None
    weight_ptr,  # [C] or None
    bias_ptr,  # [C] or None
    scale_ptr,  # [C] or None
    input_bias_ptr,  # [C], added to the input; or None
    stride_input_m,
    stride_residual_m,
    num_rows,
    CHANNELS: tl.constexpr,
    EPS: tl.constexpr,
    PARTS: tl.constexpr,
    ACC: tl.constexpr,  # dtype of the statistics
    ROWS: tl.constexpr,
    LOOP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EARLY: tl.constexpr,  # launched while the kernel before still runs
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
    first = tl.program_id(0).to(tl.int64) * (ROWS * LOOP)
    for step in range(LOOP):
        row = first + step * ROWS + tl.arange(0, ROWS)
        mask = (row < num_rows)[:, None] & mask_c[None, :]  # [ROWS, BLOCK_C]
        offs = row[:, None] * CHANNELS + offs_c[None, :]
        x = tl.load(input_ptr + row[:, None] * stride_input_m + offs_c[None, :], mask=mask, other=0.0).to(ACC)
        for part in tl.static_range(1, PARTS):
            x += tl.load(input_ptr + part * num_rows.to(tl.int64) * CHANNELS + offs, mask=mask, other=0.0)
        if input_bias_ptr is not None:
            x += tl.load(input_bias_ptr + offs_c, mask=mask_c, other=0.0).to(ACC)[None, :]
        if residual_ptr is not None:
            if scale_ptr is not None:
                x *= scale
            x += tl.load(residual_ptr + row[:, None] * stride_residual_m + offs_c[None, :], mask=mask, other=0.0).to(
                ACC
            )
            rounded = x.to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + offs, rounded, mask=mask)
            x = rounded.to(ACC)
        # Less the row's first value, so that equal values are exactly 0, and a mean far from 0 costs no digits.
        x -= tl.sum(tl.where(offs_c[None, :] == 0, x, 0.0), 1, keep_dims=True)
        x = tl.where(mask_c[None, :], x, 0.0)
        mean = tl.sum(x, 1, keep_dims=True) / CHANNELS
        centred = tl.where(mask_c[None, :], x - mean, 0.0)
        variance = tl.sum(centred * centred, 1, keep_dims=True) / CHANNELS
        y = centred * (1.0 / tl.sqrt(variance + EPS))
        if weight_ptr is not None:
            y *= weight
        if bias_ptr is not None:
            y += bias
        tl.store(output_ptr + offs, y.to(output_ptr.dtype.element_ty), mask=mask)
