"""The plain operator's kernel for any caller that passes pointers: inputs, sizes, output, in this order.

That is how TensorRT launches a compiled kernel. The levels' sizes are read from device memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from visionkernels.ops.deformable_attention.kernels import _forward_kernel


@triton.jit
def ms_deform_attn_kernel(
    value_ptr,  # [N, S, M, D], contiguous
    shapes_ptr,  # [L, 2] int32
    point_ptr,  # [N, Lq, M, K, 2]
    weight_ptr,  # [N, Lq, M, K]
    num_images,
    num_pixels,
    num_queries,
    output_ptr,  # [N, Lq, M, D]
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NUM_LEVELS: tl.constexpr,
    NUM_SAMPLES: tl.constexpr,
    NUM_POINTS: tl.constexpr,
    FIRST_POINT: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    ALIGNMENT: tl.constexpr,
):
    _forward_kernel(
        output_ptr, value_ptr, shapes_ptr, point_ptr, weight_ptr, None, None,
        num_pixels.to(tl.int64) * (NUM_HEADS * HEAD_DIM), HEAD_DIM, num_images, num_pixels, num_queries,
        NUM_HEADS * HEAD_DIM, NUM_HEADS, HEAD_DIM, NUM_LEVELS, NUM_SAMPLES, NUM_POINTS, FIRST_POINT,
        0, 1, False, False, False, True, False, False, ALIGNMENT, tl.float32, tl.int64,
        ROWS, HEADS, BLOCK_D, UNROLL, False, False,
    )  # fmt: skip
