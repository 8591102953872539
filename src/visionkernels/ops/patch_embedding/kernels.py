"""The Triton kernel of the patch embedding: a matrix product that gathers its rows from the image.

A row of the output is a token: the prefix tokens of an image, then its patches in raster order. The row of a patch is
its pixels in the order of memory, (channel, y, x) or (y, x, channel), and the weight comes in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _of_channel(channel, first, second, third):
    return tl.where(channel == 0, first, tl.where(channel == 1, second, third))


@triton.jit(
    do_not_specialize=[
        "stride_pixel_b", "stride_pixel_c", "stride_pixel_h", "num_rows", "num_tokens", "num_prefix", "columns",
    ]
)  # fmt: skip
def _patch_embedding_kernel(
    pixel_ptr,  # [B, 3, H, W], or [B, H, W, 3] when CHANNELS_LAST
    weight_ptr,  # [C, K], K in the order of the pixels
    bias_ptr,  # [C], or None
    position_ptr,  # [P, C], or None
    prefix_ptr,  # [T, C], or None
    output_ptr,  # [B, T + P, C]
    stride_pixel_b,
    stride_pixel_c,
    stride_pixel_h,
    num_rows,  # B * (T + P)
    num_tokens,  # T + P
    num_prefix,  # T
    columns,  # patches side by side
    scale_0,  # of each channel: normalised pixel = pixel * scale + shift
    scale_1,
    scale_2,
    shift_0,
    shift_1,
    shift_2,
    CHANNELS: tl.constexpr,  # C
    PATCH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    NORMALISE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_POSITION: tl.constexpr,
    HAS_PREFIX: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # a patch's rows of pixels start at a multiple of this many
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # Triton's interpreter cannot multiply bfloat16
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,  # launched while the kernel before still runs
):
    SIZE: tl.constexpr = 3 * PATCH * PATCH  # K
    RUN: tl.constexpr = 3 * PATCH if CHANNELS_LAST else PATCH  # of pixels that are neighbours in memory
    blocks_c: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_r = (pid // blocks_c).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # neighbours read the same patches
    offs_c = (pid % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_r = offs_r < num_rows
    mask_c = offs_c < CHANNELS
    token = (offs_r % num_tokens).to(tl.int32)
    patch = token - num_prefix
    mask_patch = mask_r & (patch >= 0)
    offs_row = (offs_r // num_tokens) * stride_pixel_b + (patch // columns).to(tl.int64) * PATCH * stride_pixel_h
    offs_row = tl.multiple_of(offs_row + patch % columns * RUN, ALIGNMENT)
    if EARLY:
        gdc_wait()

    acc = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
    for start in tl.range(0, SIZE, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < SIZE
        if CHANNELS_LAST:
            offs_run = offs_k // RUN * stride_pixel_h
        else:
            offs_run = offs_k // (PATCH * PATCH) * stride_pixel_c + offs_k % (PATCH * PATCH) // PATCH * stride_pixel_h
        offs_pixel = tl.max_contiguous(tl.multiple_of(offs_run + offs_k % RUN, ALIGNMENT), ALIGNMENT)
        mask_pixel = mask_patch[:, None]
        mask_weight = mask_c[:, None]
        if SIZE % BLOCK_K:
            mask_pixel = mask_pixel & mask_k[None, :]
            mask_weight = mask_weight & mask_k[None, :]
        pixels = tl.load(pixel_ptr + offs_row[:, None] + offs_pixel[None, :], mask=mask_pixel, other=0)
        weight = tl.load(weight_ptr + (offs_c * SIZE)[:, None] + offs_k[None, :], mask=mask_weight, other=0.0)
        if NORMALISE:
            channel = offs_k % 3 if CHANNELS_LAST else offs_k // (PATCH * PATCH)
            scale = _of_channel(channel, scale_0, scale_1, scale_2)
            shift = _of_channel(channel, shift_0, shift_1, shift_2)
            pixels = pixels.to(tl.float32) * scale[None, :] + shift[None, :]
        pixels = pixels.to(weight.dtype)
        if UPCAST:
            pixels, weight = pixels.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(pixels, tl.trans(weight), acc, input_precision=PRECISION)
    if EARLY:
        gdc_launch_dependents()

    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)[None, :]
    if HAS_POSITION:
        position_ptrs = position_ptr + (patch.to(tl.int64) * CHANNELS)[:, None] + offs_c[None, :]
        acc += tl.load(position_ptrs, mask=mask_patch[:, None] & mask_c[None, :], other=0.0).to(tl.float32)
    if HAS_PREFIX:
        is_prefix = patch < 0
        prefix_ptrs = prefix_ptr + (token * CHANNELS)[:, None] + offs_c[None, :]
        prefix = tl.load(prefix_ptrs, mask=(mask_r & is_prefix)[:, None] & mask_c[None, :], other=0.0)
        acc = tl.where(is_prefix[:, None], prefix.to(tl.float32), acc)
    out_ptrs = output_ptr + (offs_r * CHANNELS)[:, None] + offs_c[None, :]
    tl.store(out_ptrs, acc.to(output_ptr.dtype.element_ty), mask=mask_r[:, None] & mask_c[None, :])
