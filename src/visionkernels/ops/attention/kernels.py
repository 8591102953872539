"""The Triton kernel of attention without a causal mask.

A program owns BLOCK_M queries of one head and walks its keys in blocks, with the online softmax of flash attention: for
scores s = scale * q . k + bias, in powers of two,

    m' = max(m, max s)    p = 2^(s - m')    l' = l 2^(m - m') + sum p    acc' = acc 2^(m - m') + p v    out = acc / l

Source: Dao, "FlashAttention-2" (https://arxiv.org/abs/2307.08691), algorithm 1.

A head is read in two parts, its first SPLIT channels and the rest: the halves that rotary embedding turns against each
other, or a power of two and what is left of a head dim like 80, which would otherwise be padded to 128. A tensor core
adds up the parts' products in one accumulator. With SPLIT = HEAD_DIM there is no second part.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _place(offs_token, first_row, first_column, grid_width, window_width, WINDOW: tl.constexpr):
    """Where tokens of a window are in the raster order of their grid."""
    if WINDOW:
        row = first_row + offs_token // window_width
        return row * grid_width + first_column + offs_token % window_width
    return offs_token


@triton.jit
def _load_part(ptr, offs_row, mask_row, other, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr):
    """Channels FIRST to LAST of some rows, [rows, BLOCK]."""
    offs_d = tl.arange(0, BLOCK)
    ptrs = ptr + offs_row[:, None] + (FIRST + offs_d)[None, :]
    mask = mask_row[:, None]
    if BLOCK > LAST - FIRST:
        mask = mask & (offs_d < LAST - FIRST)[None, :]
    return tl.load(ptrs, mask=mask, other=other)


@triton.jit
def _turn(
    low, high, cos_ptr, sin_ptr, offs_token, mask_token, num_prefix_tokens,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotary embedding, x * cos + rotate_half(x) * sin in float32; the prefix tokens have the angle 0."""
    offs_table = (offs_token - num_prefix_tokens) * HEAD_DIM
    mask = mask_token & (offs_token >= num_prefix_tokens)
    cos_low = _load_part(cos_ptr, offs_table, mask, 1.0, 0, SPLIT, BLOCK).to(tl.float32)
    cos_high = _load_part(cos_ptr, offs_table, mask, 1.0, SPLIT, HEAD_DIM, BLOCK).to(tl.float32)
    sin_low = _load_part(sin_ptr, offs_table, mask, 0.0, 0, SPLIT, BLOCK).to(tl.float32)
    sin_high = _load_part(sin_ptr, offs_table, mask, 0.0, SPLIT, HEAD_DIM, BLOCK).to(tl.float32)
    x, y = low.to(tl.float32), high.to(tl.float32)
    return (x * cos_low - y * sin_low).to(low.dtype), (y * cos_high + x * sin_high).to(high.dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:  # Triton's interpreter cannot multiply bfloat16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _score(
    query_low, query_high, key_ptr, cos_ptr, sin_ptr, stride_key_n, start, num_tokens, num_prefix_tokens,
    first_row, first_column, grid_width, window_width,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_ROTARY: tl.constexpr, WINDOW: tl.constexpr, ALIGNMENT: tl.constexpr,
    INDEX: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Products of the queries with the keys from ``start`` on, [BLOCK_M, BLOCK_N]; MASKED: some may not be there."""
    offs_token = start + tl.arange(0, BLOCK_N)
    mask_token = offs_token < (num_tokens if MASKED else start + BLOCK_N)
    offs_place = _place(offs_token, first_row, first_column, grid_width, window_width, WINDOW)
    offs_key = tl.multiple_of(offs_place.to(INDEX) * stride_key_n, ALIGNMENT)
    key_low = _load_part(key_ptr, offs_key, mask_token, 0.0, 0, SPLIT, BLOCK_LOW)
    if SPLIT < HEAD_DIM:
        key_high = _load_part(key_ptr, offs_key, mask_token, 0.0, SPLIT, HEAD_DIM, BLOCK_HIGH)
        if HAS_ROTARY:
            key_low, key_high = _turn(
                key_low, key_high, cos_ptr, sin_ptr, offs_place, mask_token, num_prefix_tokens,
                HEAD_DIM, SPLIT, BLOCK_LOW,
            )  # fmt: skip
    scores = tl.zeros([query_low.shape[0], BLOCK_N], dtype=tl.float32)
    scores = _dot(query_low, tl.trans(key_low), scores, PRECISION, UPCAST)
    if SPLIT < HEAD_DIM:
        scores = _dot(query_high, tl.trans(key_high), scores, PRECISION, UPCAST)
    return scores


@triton.jit
def _add(
    scores, peak, total, acc_low, acc_high,  # the rows so far: [BLOCK_M] twice, [BLOCK_M, part] twice
    value_ptr, bias_ptrs, stride_value_n, scale, start, num_tokens,
    first_row, first_column, grid_width, window_width, mask_query,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_HIGH: tl.constexpr,
    BLOCK_N: tl.constexpr, STRIDE_BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    WINDOW: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add the values from ``start`` on, weighted by their scores, to the sums."""
    offs_token = start + tl.arange(0, BLOCK_N)
    mask_token = offs_token < (num_tokens if MASKED else start + BLOCK_N)
    offs_place = _place(offs_token, first_row, first_column, grid_width, window_width, WINDOW)
    if HAS_BIAS:
        LOG2_E: tl.constexpr = 1.4426950408889634
        bias_tile = bias_ptrs[:, None] + (offs_token * STRIDE_BIAS_N)[None, :]
        bias = tl.load(bias_tile, mask=mask_query[:, None] & mask_token[None, :], other=0.0).to(tl.float32)
        scores = scores * scale + bias * LOG2_E
        factor = 1.0
    else:
        factor = scale
    if MASKED:
        scores = tl.where(mask_token[None, :], scores, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(scores, axis=1) * factor)
    # Where every key so far is hidden by -inf there is no peak yet, and -inf - -inf would be NaN.
    known = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    weights = tl.exp2(scores * factor - known[:, None])
    kept = tl.exp2(peak - known)
    total = total * kept + tl.sum(weights, axis=1)
    offs_value = tl.multiple_of(offs_place.to(INDEX) * stride_value_n, ALIGNMENT)
    value_low = _load_part(value_ptr, offs_value, mask_token, 0.0, 0, SPLIT, BLOCK_LOW)
    weights = weights.to(value_low.dtype)
    acc_low = _dot(weights, value_low, acc_low * kept[:, None], PRECISION, UPCAST)
    if SPLIT < HEAD_DIM:
        value_high = _load_part(value_ptr, offs_value, mask_token, 0.0, SPLIT, HEAD_DIM, BLOCK_HIGH)
        acc_high = _dot(weights, value_high, acc_high * kept[:, None], PRECISION, UPCAST)
    return new_peak, total, acc_low, acc_high


@triton.jit
def _attend(
    query_ptr, key_ptr, value_ptr, bias_ptr, cos_ptr, sin_ptr, output_ptr,  # of one head of one image
    stride_query_n, stride_key_n, stride_value_n, stride_bias_m, scale,
    num_heads, num_tokens, num_prefix_tokens, first_query, first_token, first_row, first_column, grid_width,
    window_width,
    HEAD_DIM: tl.constexpr, SPLIT: tl.constexpr, BLOCK_LOW: tl.constexpr, BLOCK_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STRIDE_BIAS_N: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_ROTARY: tl.constexpr, WINDOW: tl.constexpr, ALIGNMENT: tl.constexpr, INDEX: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr, PEEL: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of a head, from ``first_query`` on, against all its keys."""
    offs_query = first_query + tl.arange(0, BLOCK_M)
    mask_query = offs_query < num_tokens
    offs_place = _place(offs_query, first_row, first_column, grid_width, window_width, WINDOW)
    bias_ptrs = offs_query
    if HAS_BIAS:
        bias_ptrs = bias_ptr + offs_query.to(tl.int64) * stride_bias_m
    offs_row = tl.multiple_of(offs_place.to(INDEX) * stride_query_n, ALIGNMENT)
    query_low = _load_part(query_ptr, offs_row, mask_query, 0.0, 0, SPLIT, BLOCK_LOW)
    query_high = query_low
    acc_low = tl.zeros([BLOCK_M, BLOCK_LOW], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    acc_high = peak
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    if SPLIT < HEAD_DIM:
        query_high = _load_part(query_ptr, offs_row, mask_query, 0.0, SPLIT, HEAD_DIM, BLOCK_HIGH)
        acc_high = tl.zeros([BLOCK_M, BLOCK_HIGH], dtype=tl.float32)
        if HAS_ROTARY:
            query_low, query_high = _turn(
                query_low, query_high, cos_ptr, sin_ptr, offs_place, mask_query, num_prefix_tokens,
                HEAD_DIM, SPLIT, BLOCK_LOW,
            )  # fmt: skip
    last = (num_tokens - 1) // BLOCK_N * BLOCK_N
    for start in tl.range(0, last if PEEL else num_tokens, BLOCK_N):
        scores = _score(
            query_low, query_high, key_ptr, cos_ptr, sin_ptr, stride_key_n, start, num_tokens, num_prefix_tokens,
            first_row, first_column, grid_width, window_width, HEAD_DIM, SPLIT, BLOCK_LOW, BLOCK_HIGH, BLOCK_N,
            HAS_ROTARY, WINDOW, ALIGNMENT, INDEX, PRECISION, UPCAST, not PEEL,
        )  # fmt: skip
        peak, total, acc_low, acc_high = _add(
            scores, peak, total, acc_low, acc_high, value_ptr, bias_ptrs, stride_value_n, scale, start, num_tokens,
            first_row, first_column, grid_width, window_width, mask_query, HEAD_DIM, SPLIT, BLOCK_LOW, BLOCK_HIGH,
            BLOCK_N, STRIDE_BIAS_N, HAS_BIAS, WINDOW, ALIGNMENT, INDEX, PRECISION, UPCAST, not PEEL,
        )  # fmt: skip
    if PEEL:
        scores = _score(
            query_low, query_high, key_ptr, cos_ptr, sin_ptr, stride_key_n, last, num_tokens, num_prefix_tokens,
            first_row, first_column, grid_width, window_width, HEAD_DIM, SPLIT, BLOCK_LOW, BLOCK_HIGH, BLOCK_N,
            HAS_ROTARY, WINDOW, ALIGNMENT, INDEX, PRECISION, UPCAST, True,
        )  # fmt: skip
        peak, total, acc_low, acc_high = _add(
            scores, peak, total, acc_low, acc_high, value_ptr, bias_ptrs, stride_value_n, scale, last, num_tokens,
            first_row, first_column, grid_width, window_width, mask_query, HEAD_DIM, SPLIT, BLOCK_LOW, BLOCK_HIGH,
            BLOCK_N, STRIDE_BIAS_N, HAS_BIAS, WINDOW, ALIGNMENT, INDEX, PRECISION, UPCAST, True,
        )  # fmt: skip

    # A row that sees no key adds up to 0, and is 0; NaN is none of these.
    factor = 1 / tl.where(total == 0, 1.0, total)
    offs_out = (first_token + offs_place) * num_heads
    out_ptrs = output_ptr + (offs_out * HEAD_DIM)[:, None]
    offs_low = tl.arange(0, BLOCK_LOW)
    mask_low = mask_query[:, None] & (offs_low < SPLIT)[None, :]
    tl.store(out_ptrs + offs_low[None, :], (acc_low * factor[:, None]).to(output_ptr.dtype.element_ty), mask=mask_low)
    if SPLIT < HEAD_DIM:
        offs_high = tl.arange(0, BLOCK_HIGH)
        mask_high = mask_query[:, None] & (offs_high < HEAD_DIM - SPLIT)[None, :]
        tile = (acc_high * factor[:, None]).to(output_ptr.dtype.element_ty)
        tl.store(out_ptrs + (SPLIT + offs_high)[None, :], tile, mask=mask_high)


@triton.jit(
    do_not_specialize=[
        "stride_query_b", "stride_query_n", "stride_query_h", "stride_key_b", "stride_key_n", "stride_key_h",
        "stride_value_b", "stride_value_n", "stride_value_h", "stride_bias_b", "stride_bias_h", "stride_bias_m",
        "num_heads", "num_tokens", "num_prefix_tokens", "grid_height", "grid_width", "window_height", "window_width",
    ]
)  # fmt: skip
def _attention_kernel(
    query_ptr,  # [B, N, H, D], any strides but the last
    key_ptr,  # [B, N, H, D]
    value_ptr,  # [B, N, H, D]
    bias_ptr,  # [B, H, n, n] when HAS_BIAS, of any strides, 0 where it is broadcast
    cos_ptr,  # [N - num_prefix_tokens, D] when HAS_ROTARY
    sin_ptr,  # [N - num_prefix_tokens, D]
    output_ptr,  # [B, N, H, D]
    stride_query_b,
    stride_query_n,
    stride_query_h,
    stride_key_b,
    stride_key_n,
    stride_key_h,
    stride_value_b,
    stride_value_n,
    stride_value_h,
    stride_bias_b,
    stride_bias_h,
    stride_bias_m,
    scale,  # times log2(e)
    num_heads,
    num_tokens,  # n, those that attend to each other: of a window, or all
    num_prefix_tokens,
    grid_height,  # without windows: the tokens of an image, and 1 from here on
    grid_width,
    window_height,
    window_width,
    HEAD_DIM: tl.constexpr,
    SPLIT: tl.constexpr,  # channels in the first part
    BLOCK_LOW: tl.constexpr,  # the first part, padded to a power of two
    BLOCK_HIGH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIDE_BIAS_N: tl.constexpr,  # 1, or 0
    HAS_BIAS: tl.constexpr,
    HAS_ROTARY: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # every row of a head starts at a multiple of this many elements
    INDEX: tl.constexpr,  # dtype of offsets within an image
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    PEEL: tl.constexpr,  # the last keys have a step of their own, and only that one masks
    EARLY: tl.constexpr,  # launched while the kernel before still runs
):
    num_blocks = tl.cdiv(num_tokens, BLOCK_M)
    pid = tl.program_id(0)
    pid_m = pid % num_blocks  # neighbours read the same keys
    pid_h = (pid // num_blocks) % num_heads
    pid_image = pid // num_blocks // num_heads
    first_row = 0
    first_column = 0
    if WINDOW:
        across = grid_width // window_width
        windows = across * (grid_height // window_height)
        first_row = (pid_image % windows) // across * window_height
        first_column = (pid_image % windows) % across * window_width
        pid_image = pid_image // windows
    pid_b = pid_image.to(tl.int64)
    first_token = pid_b * grid_height * grid_width
    output_ptr += pid_h * HEAD_DIM
    if HAS_BIAS:
        bias_ptr += pid_b * stride_bias_b + pid_h.to(tl.int64) * stride_bias_h
    query_ptr += tl.multiple_of(pid_b * stride_query_b + pid_h.to(tl.int64) * stride_query_h, ALIGNMENT)
    key_ptr += tl.multiple_of(pid_b * stride_key_b + pid_h.to(tl.int64) * stride_key_h, ALIGNMENT)
    value_ptr += tl.multiple_of(pid_b * stride_value_b + pid_h.to(tl.int64) * stride_value_h, ALIGNMENT)
    first_query = pid_m * BLOCK_M
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()  # they wait as well, until this kernel has ended
    _attend(
        query_ptr, key_ptr, value_ptr, bias_ptr, cos_ptr, sin_ptr, output_ptr,
        stride_query_n, stride_key_n, stride_value_n, stride_bias_m, scale, num_heads, num_tokens,
        num_prefix_tokens, first_query, first_token, first_row, first_column, grid_width, window_width,
        HEAD_DIM, SPLIT, BLOCK_LOW, BLOCK_HIGH, BLOCK_M, BLOCK_N, STRIDE_BIAS_N, HAS_BIAS, HAS_ROTARY,
        WINDOW, ALIGNMENT, INDEX, PRECISION, UPCAST, PEEL,
    )  # fmt: skip
