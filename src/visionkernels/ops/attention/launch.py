"""Attention on CUDA: the tiles that its kernel is launched with, worked out from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from visionkernels.ops._common import cdiv
from visionkernels.ops._inference import INTERPRET, device_of, launch
from visionkernels.ops.attention import cpu, kernels

MAX_INT32 = 2**31 - 1
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """What one launch is compiled with."""

    block_m: int  # queries of a program
    block_n: int  # keys of a step
    num_warps: int
    num_stages: int
    peel: bool = False  # mask only in the last step, which then waits for its keys
    early: bool = False  # begin while the kernel before still runs


def has_kernel(query: Tensor) -> bool:
    """Whether the Triton kernel takes this dtype and head dim."""
    head_dim = query.shape[3]
    return query.dtype in DTYPES and 16 <= head_dim <= 128 and head_dim % 8 == 0


def pays(query: Tensor, key: Tensor, value: Tensor, scale: float, *options: Any) -> bool:
    """Whether the kernel is what "auto" takes: where there is one, but for large calls that cuDNN knows too.

    There cuDNN is a few percent faster on an H200; on smaller calls it is slower, and PyTorch copies around it.
    """
    if not has_kernel(query):
        return False
    batch, tokens, heads, head_dim = query.shape
    plain = query.element_size() == 2 and head_dim == 64 and not any(option is not None for option in options[:3])
    return not (
        plain and options[4] is None and device_of(query.device).is_hopper and _is_cudnn_s(tokens, batch * heads)
    )


def _is_cudnn_s(tokens: int, groups: int) -> bool:
    """Whether cuDNN is faster on compute capability 9.0, as measured: whole blocks of tokens, and long rows."""
    if tokens >= 1024:
        return tokens * groups >= 16_000
    whole = tokens > 64 and tokens % 64 == 0
    return tokens * groups >= (60_000 if whole or tokens > 512 else 200_000)


def choose_tile(num_tokens: int, groups: int, head_dim: int, itemsize: int, busy: bool, hopper: bool) -> Tile:
    """The tile of a launch.

    Args:
        num_tokens: tokens that attend to each other.
        groups: images times windows times heads.
        head_dim: D.
        itemsize: bytes of a number.
        busy: the kernel turns its keys, or looks for them in windows, which takes registers.
        hopper: an NVIDIA GPU of compute capability 9.0.

    Returns:
        Queries and keys of a step, warps and stages.
    """
    if itemsize == 4:  # without tensor cores; what turns the keys, or reads ahead in long heads, takes registers
        if busy or head_dim > 64:
            return Tile(32, 32 if busy else 16, 8, 1)
        return Tile(64 if num_tokens > 64 else 32, 32, 8, 2)
    block_m = 64
    if groups * cdiv(num_tokens, 64) < 132:  # fewer programs than processors: smaller ones use more of these
        block_m = 32 if num_tokens > 16 else 16
    if busy or head_dim > 64:
        return Tile(block_m, 32, 4, 3)
    if num_tokens > 512:  # long rows: masks only where they end
        return Tile(64, 64, 4, 3, peel=True) if hopper else Tile(128, 64, 8, 3, peel=True)
    if hopper and num_tokens > 32:  # small steps: fewer keys beyond the last one are computed
        few = groups * cdiv(num_tokens, 64) <= 1024
        return Tile(64, 32, 4, 5, early=True) if few else Tile(64, 32, 4, 3)
    return Tile(block_m, 64 if num_tokens > 32 else 32, 4, 3)


def attention(*arguments: Any) -> Tensor:
    """Launch the kernel, or PyTorch's where that is faster; arguments as the operator's."""
    *inputs, backend = arguments
    if backend == "auto" and not pays(*inputs):
        return cpu.forward(*inputs)
    return forward(*inputs)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    num_prefix_tokens: int = 0,
    window: Sequence[int] | None = None,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; arguments as the operator's, and a tile to launch with instead of the chosen one.

    Returns:
        ``[B, N, H, D]``, contiguous.

    Raises:
        TypeError: a dtype that the kernel does not have.
        ValueError: a head dim that it does not have.
    """
    batch, tokens, heads, head_dim = query.shape
    if query.dtype not in DTYPES:
        raise TypeError(f'query must be float32, float16 or bfloat16 for backend="triton", got {query.dtype}')
    if not has_kernel(query):
        raise ValueError(
            f'query must have a head_dim that is a multiple of 8 from 16 to 128 for backend="triton", got {head_dim}; '
            'pass backend="pytorch"'
        )
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if output.numel() == 0:
        return output
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    strides = [stride for t in (query, key, value) for stride in t.stride()[:3]]
    grid = (tokens, 1, tokens, 1) if window is None else tuple(window)
    attending = grid[2] * grid[3]
    groups = batch * (tokens // attending) * heads
    bias_strides: tuple[int, ...] = (0, 0, 0, 0)
    if bias is not None:
        bias = bias.expand(batch, heads, attending, attending)
        if bias.stride(3) not in (0, 1):
            bias = bias.contiguous()
        bias_strides = bias.stride()
    if cos is not None and sin is not None:
        cos, sin = cos.contiguous(), sin.contiguous()
    if tile is None:
        hopper, busy = device_of(query.device).is_hopper, cos is not None or window is not None
        tile = choose_tile(attending, groups, head_dim, query.element_size(), busy, hopper)
    split = _split(head_dim, cos is not None)
    reach = (tokens - 1) * max(abs(stride) for stride in strides[1::3]) + head_dim
    arguments = (
        query, key, value, bias, cos, sin, output, *strides, *bias_strides[:3],
        scale * math.log2(math.e), heads, attending, num_prefix_tokens, *grid,
        head_dim, split, _padded(split), _padded(head_dim - split), tile.block_m, tile.block_n,
        bias_strides[3], bias is not None, cos is not None, window is not None,
        math.gcd(16, *strides), tl.int32 if reach <= MAX_INT32 else tl.int64,
        "ieee", INTERPRET and query.dtype == torch.bfloat16, tile.peel, tile.early,
    )  # fmt: skip
    launch(
        kernels._attention_kernel, cdiv(attending, tile.block_m) * groups, arguments, query.device,
        early=tile.early, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return output


def _split(head_dim: int, rotary: bool) -> int:
    """Channels in the first of two parts: half of them for rotary, else the largest power of two if that saves any."""
    if rotary:
        return head_dim // 2
    power = 1 << (head_dim.bit_length() - 1)
    return power if power + _padded(head_dim - power) < _padded(head_dim) else head_dim


def _padded(size: int) -> int:
    """The next power of two that a tensor core takes."""
    return max(16, 1 << (size - 1).bit_length()) if size > 0 else 16
