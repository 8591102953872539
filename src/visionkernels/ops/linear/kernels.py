"""Triton kernels of linear layers with their epilogues.

    output[m, n] = residual[m, n] + scale[n] * act(sum_k input[m, k] * weight[n, k] + bias[n])
    gated: output[m, n] = act(sum_k input[m, k] * weight[n, k] + bias[n])
                          * (sum_k input[m, k] * weight[n + N, k] + bias[n + N])

Two kernels compute it: one reads by pointers and runs everywhere, one reads and writes by the tensor memory accelerator
(TMA) of NVIDIA's GPUs from compute capability 9.0 on and gives each program several tiles.

Sources: the tiles' order is that of Triton's tutorial on matrix multiplication; Hendrycks and Gimpel, "Gaussian Error
Linear Units" (https://arxiv.org/abs/1606.08415); Shazeer, "GLU Variants" (https://arxiv.org/abs/2002.05202).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _tanh(x, SHORT: tl.constexpr):
    if SHORT == "tanh":  # one instruction, its error a 2^11th of the result
        y = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        y = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))
    return y


@triton.jit
def _erf_short(x, SHORT: tl.constexpr):
    """erf(x / sqrt(2)) as the tanh of an odd polynomial, in two thirds of the instructions of the exact one.

    Fitted so that GELU by an exact tanh is 5e-5 off at most, and its tail, down to -4.5, 0.4 percent at most.
    """
    square = x * x
    p = square * 3.343291152215274e-07 - 9.346616652872027e-06
    p = p * square - 0.00030902477947975724
    p = p * square + 0.03705655067047899
    return _tanh(x * (p * square + 0.7973181695348003), SHORT)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    if ACTIVATION == "gelu":
        half = 0.5 * x
        x = half + half * (tl.erf(x * 0.7071067811865476) if SHORT is None else _erf_short(x, SHORT))
    elif ACTIVATION == "gelu_tanh":
        if SHORT is not None:
            half = 0.5 * x
            x = half + half * _tanh(x * (0.7978845608028654 + 0.035677408136300125 * x * x), SHORT)
        else:  # 0.5 + 0.5 tanh(y) = sigmoid(2 y)
            x /= 1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif ACTIVATION == "quick_gelu":
        x /= 1.0 + tl.exp(-1.702 * x)
    elif ACTIVATION == "silu":
        x /= 1.0 + tl.exp(-x)
    return x


@triton.jit
def _columns(acc, bias_ptr, scale_ptr, offs_n, mask_n, ACTIVATION: tl.constexpr, SHORT: tl.constexpr):
    """What the columns add to a tile of sums: bias, activation and scale."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
    acc = _activate(acc, ACTIVATION, SHORT)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0).to(acc.dtype)[None, :]
    return acc


@triton.jit
def _tile(tile, num_rows, num_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile: GROUP_M tiles below each other, then their neighbours, to share the L2 cache."""
    tiles_m, tiles_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_columns, BLOCK_N)
    first = tile // (GROUP_M * tiles_n) * GROUP_M
    group = tl.minimum(tiles_m - first, GROUP_M)
    within = tile % (GROUP_M * tiles_n)
    return (first + within % group) * BLOCK_M, within // group * BLOCK_N


@triton.jit
def _prefetch(weight_ptr, offs_n, stride_weight_n, num_inner, LINE: tl.constexpr):
    """Bring rows of the weight into the L2 cache; LINE elements are the 128 bytes of a line."""
    LINES: tl.constexpr = 8
    for k in range(0, num_inner, LINES * LINE):
        offs_k = tl.minimum(k + tl.arange(0, LINES) * LINE, num_inner - 1)
        ptrs = weight_ptr + offs_n.to(tl.int64)[:, None] * stride_weight_n + offs_k[None, :]
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [ptrs], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    output_ptr,  # [M, N]
    input_ptr,  # [M, K], rows anywhere
    weight_ptr,  # [N, K], rows anywhere; [2 N, K] when GATED
    bias_ptr,  # [N] or [2 N], or None
    residual_ptr,  # [M, N], rows anywhere, or None
    scale_ptr,  # [N] or None
    stride_input_m,
    stride_weight_n,
    stride_residual_m,
    num_rows,
    num_columns,
    num_inner,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of float32
    ACC: tl.constexpr,  # dtype of the sums
    FACTOR: tl.constexpr,  # dtype that factors are multiplied in
    EVEN_K: tl.constexpr,  # K is a multiple of BLOCK_K
    SHORT: tl.constexpr,  # how GELU may be approximated: "tanh", "exp" or None
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    EARLY: tl.constexpr,  # launched while the kernel before still runs
    LINE: tl.constexpr,  # elements in 128 bytes of the weight
):
    first_m, first_n = _tile(tl.program_id(0), num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < num_columns
    # What lies beyond the last row or column is computed from the last one, and not stored.
    row, column = tl.minimum(offs_m, num_rows - 1).to(tl.int64), tl.minimum(offs_n, num_columns - 1)
    if EARLY:
        gdc_launch_dependents()
        if first_m == 0:
            _prefetch(weight_ptr, column, stride_weight_n, num_inner, LINE)
        gdc_wait()  # whatever the kernel before writes, and the memory that it still reads
    input_ptrs = input_ptr + row[:, None] * stride_input_m + offs_k[None, :]  # [BLOCK_M, BLOCK_K]
    weight_ptrs = weight_ptr + column.to(tl.int64)[None, :] * stride_weight_n + offs_k[:, None]  # [BLOCK_K, BLOCK_N]
    up_ptrs = weight_ptr + (num_columns + column.to(tl.int64))[None, :] * stride_weight_n + offs_k[:, None]
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    acc_up = acc
    for k in range(0, num_inner, BLOCK_K):
        if EVEN_K:
            a, b = tl.load(input_ptrs), tl.load(weight_ptrs)
        else:
            mask_k = offs_k < num_inner - k
            a = tl.load(input_ptrs, mask=mask_k[None, :], other=0.0)
            b = tl.load(weight_ptrs, mask=mask_k[:, None], other=0.0)
        acc = tl.dot(a.to(FACTOR), b.to(FACTOR), acc, input_precision=PRECISION, out_dtype=ACC)
        if GATED:
            if EVEN_K:
                up = tl.load(up_ptrs)
            else:
                up = tl.load(up_ptrs, mask=mask_k[:, None], other=0.0)
            acc_up = tl.dot(a.to(FACTOR), up.to(FACTOR), acc_up, input_precision=PRECISION, out_dtype=ACC)
            up_ptrs += BLOCK_K
        input_ptrs += BLOCK_K
        weight_ptrs += BLOCK_K
    acc = _columns(acc, bias_ptr, scale_ptr, offs_n, mask_n, ACTIVATION, SHORT)
    if GATED:
        acc *= _columns(acc_up, bias_ptr, None, num_columns + offs_n, mask_n, None, None)
    mask = (offs_m < num_rows)[:, None] & mask_n[None, :]
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + row[:, None] * stride_residual_m + offs_n[None, :]
        acc += tl.load(residual_ptrs, mask=mask, other=0.0).to(ACC)
    output_ptrs = output_ptr + row[:, None] * num_columns + offs_n[None, :]
    tl.store(output_ptrs, acc.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _linear_tma_kernel(
    output_desc,  # [M, N] in blocks [BLOCK_M, BLOCK_N / PARTS]
    input_desc,  # [M, K] in blocks [BLOCK_M, BLOCK_K]
    weight_desc,  # [N, K], or [2 N, K] when GATED, in blocks [BLOCK_N, BLOCK_K]
    bias_ptr,  # [N] or [2 N], or None
    residual_desc,  # [M, N] in blocks as output, or None
    scale_ptr,  # [N] or None
    num_rows,
    num_columns,
    num_inner,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PRECISION: tl.constexpr,
    SHORT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PARTS: tl.constexpr,  # 1, 2 or 4: in which a tile is finished, for the shared memory that each takes
    FLATTEN: tl.constexpr,  # the next tile's reads begin before this one's results are written
    WARP_SPECIALIZE: tl.constexpr,  # some warps read, others multiply
    EARLY: tl.constexpr,  # launched while the kernel before still runs
):
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    num_tiles = tl.cdiv(num_rows, BLOCK_M) * tl.cdiv(num_columns, BLOCK_N)
    for tile in tl.range(
        tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN, warp_specialize=WARP_SPECIALIZE
    ):
        first_m, first_n = _tile(tile, num_rows, num_columns, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc_up = acc
        for k in range(0, num_inner, BLOCK_K):
            a = input_desc.load([first_m, k])
            b = weight_desc.load([first_n, k])
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
            if GATED:
                up = weight_desc.load([num_columns + first_n, k])
                acc_up = tl.dot(a, up.T, acc_up, input_precision=PRECISION)
        PART_N: tl.constexpr = BLOCK_N // PARTS
        for part in tl.static_range(PARTS):
            offs_n = first_n + part * PART_N + tl.arange(0, PART_N)
            mask_n = offs_n < num_columns
            sums = _columns(_part(acc, part, PARTS), bias_ptr, scale_ptr, offs_n, mask_n, ACTIVATION, SHORT)
            if GATED:
                sums *= _columns(_part(acc_up, part, PARTS), bias_ptr, None, num_columns + offs_n, mask_n, None, None)
            if residual_desc is not None:
                sums += residual_desc.load([first_m, first_n + part * PART_N]).to(tl.float32)
            output_desc.store([first_m, first_n + part * PART_N], sums.to(output_desc.dtype))


@triton.jit(do_not_specialize=["num_rows"])
def _linear_parts_kernel(
    parts_ptr,  # [PARTS, M, N] of float32: the products, summed over a part of K each
    input_desc,  # [M, K] in blocks [BLOCK_M, BLOCK_K]
    weight_desc,  # [N, K] in blocks [BLOCK_N, BLOCK_K]
    num_rows,
    num_columns,
    num_inner,  # with several PARTS a multiple of PARTS * BLOCK_K
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,  # launched while the kernel before still runs
):
    pid_part = tl.program_id(0) % PARTS
    first_m, first_n = _tile(tl.program_id(0) // PARTS, num_rows, num_columns, BLOCK_M, BLOCK_N, 8)
    length = num_inner // PARTS
    first_k = pid_part * length
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, length, BLOCK_K):
        acc = tl.dot(input_desc.load([first_m, first_k + k]), weight_desc.load([first_n, first_k + k]).T, acc)
    offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
    mask = (offs_m < num_rows)[:, None] & (offs_n < num_columns)[None, :]
    row = pid_part.to(tl.int64) * num_rows + offs_m
    tl.store(parts_ptr + row[:, None] * num_columns + offs_n[None, :], acc, mask=mask)


@triton.jit
def _part(acc, part: tl.constexpr, PARTS: tl.constexpr):
    """One of PARTS neighbouring blocks of columns."""
    if PARTS > 1:
        ROWS: tl.constexpr = acc.shape[0]
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)).split()
        if part < PARTS // 2:
            acc = _part(left, part, PARTS // 2)
        else:
            acc = _part(right, part - PARTS // 2, PARTS // 2)
    return acc
