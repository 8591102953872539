"""What a warp can do and Triton has no word for: shuffles, 16-byte words, sums that stay in order.

A tensor of 32 elements a warp lies one element a lane: element i in thread i of the program. NVIDIA GPUs only, from
compute capability 8.0 on.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def shuffle(x, lane):
    """``x`` (int32) of another lane of the warp."""
    return tl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;", "=r,r,r", [x, lane], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def shuffle_float(x, lane):
    """``x`` (float32) of another lane of the warp."""
    return shuffle(x.to(tl.int32, bitcast=True), lane).to(tl.float32, bitcast=True)


@triton.jit
def match_any(key):
    """For each lane the lanes of the warp that have the same ``key`` (int32), one bit each."""
    return tl.inline_asm_elementwise(
        "match.any.sync.b32 $0, $1, 0xffffffff;", "=r,r", [key], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def count_bits(x):
    """How many bits of ``x`` (int32) are set."""
    return tl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def highest_bit(x):
    """The position of the highest bit of ``x`` (int32) that is set."""
    return tl.inline_asm_elementwise("bfind.u32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1)


@triton.jit
def lanes_max(x, lane, LANES: tl.constexpr):
    """Maximum over groups of ``LANES`` neighbouring lanes, a power of two."""
    for bit in tl.static_range(5):
        if (1 << bit) < LANES:
            x = tl.maximum(x, shuffle_float(x, lane ^ (1 << bit)))
    return x


@triton.jit
def lanes_sum(x, lane, LANES: tl.constexpr, STEP: tl.constexpr = 1):
    """Sum over every ``STEP``-th lane of groups of ``LANES`` neighbouring ones, both powers of two."""
    for bit in tl.static_range(5):
        if (1 << bit) >= STEP and (1 << bit) < LANES:
            x += shuffle_float(x, lane ^ (1 << bit))
    return x


@triton.jit
def load_words(address, condition):
    """Four words at ``address`` (int64, a multiple of 16), 0 where ``condition`` (int32) is 0."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
        "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }",
        "=&r,=&r,=&r,=&r,l,r", [address, condition],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@triton.jit
def store_words(address, condition, w0, w1, w2, w3):
    """Four words to ``address`` (int64, a multiple of 16) where ``condition`` (int32) is not 0."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p st.global.v4.b32 [$1], {$3, $4, $5, $6}; }",
        "=&r,l,r,r,r,r,r", [address, condition, w0, w1, w2, w3], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def pack(low, high, BFLOAT16: tl.constexpr):
    """Two float32, rounded to float16 or bfloat16, in one word."""
    if BFLOAT16:
        word = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    return word


@triton.jit
def unpack(word, BFLOAT16: tl.constexpr):
    """The two float16 or bfloat16 of a word, as float32."""
    if BFLOAT16:
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def multiply_add(low, high, factor, word, BFLOAT16: tl.constexpr):
    """``low`` and ``high`` (float32), plus ``factor`` times the two float16 or bfloat16 of a word.

    One piece of assembly, because LLVM would vectorise these over samples and run out of registers.
    """
    if BFLOAT16:
        sums = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; shl.b32 a, $5, 16; and.b32 b, $5, 0xffff0000; "
            "fma.rn.f32 $0, $4, a, $2; fma.rn.f32 $1, $4, b, $3; }",
            "=&f,=f,f,f,f,r", [low, high, factor, word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        sums = tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .f32 a, b; mov.b32 {l, h}, $5; cvt.f32.f16 a, l; cvt.f32.f16 b, h; "
            "fma.rn.f32 $0, $4, a, $2; fma.rn.f32 $1, $4, b, $3; }",
            "=&f,=f,f,f,f,r", [low, high, factor, word], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
    return sums


@triton.jit
def dot_add(dot, factor_low, factor_high, word, BFLOAT16: tl.constexpr):
    """``dot`` (float32), plus the products of two factors with the two float16 or bfloat16 of a word; see above."""
    if BFLOAT16:
        dot = tl.inline_asm_elementwise(
            "{ .reg .b32 a, b; .reg .f32 d; shl.b32 a, $4, 16; and.b32 b, $4, 0xffff0000; "
            "fma.rn.f32 d, $2, a, $1; fma.rn.f32 $0, $3, b, d; }",
            "=f,f,f,f,r", [dot, factor_low, factor_high, word], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        dot = tl.inline_asm_elementwise(
            "{ .reg .b16 l, h; .reg .f32 a, b, d; mov.b32 {l, h}, $4; cvt.f32.f16 a, l; cvt.f32.f16 b, h; "
            "fma.rn.f32 d, $2, a, $1; fma.rn.f32 $0, $3, b, d; }",
            "=f,f,f,f,r", [dot, factor_low, factor_high, word], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return dot
