"""Attention in plain PyTorch, every score in memory: the ground truth.

    out[b, n, h] = sum over m of  softmax over m(scale * q[b, n, h] . k[b, m, h] + bias[b, h, n, m])  v[b, m, h]

Rotary embedding turns each pair (x[i], x[i + D/2]) of a query and of a key by the angle of its token before that; with
a window, n and m run over the tokens of one window at a time.

Source: Vaswani et al., "Attention Is All You Need" (https://arxiv.org/abs/1706.03762), equation 1; Su et al.,
"RoFormer" (https://arxiv.org/abs/2104.09864), in the rotate-half form of DINOv3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    num_prefix_tokens: int = 0,
    window: Sequence[int] | None = None,
) -> Tensor:
    """Compute attention with all scores in memory, in float32, or in float64 where an input is float64.

    Args:
        query: ``[B, N, H, D]``.
        key: ``[B, N, H, D]``.
        value: ``[B, N, H, D]``.
        scale: of the scores; ``D ** -0.5`` if None.
        bias: added to the scores, broadcastable to ``[B, H, N, N]``, or with a window to ``[B, H, n, n]`` for the n
            tokens of each.
        rotary: (cos, sin), each ``[N - num_prefix_tokens, D]``.
        num_prefix_tokens: tokens before those that rotary turns.
        window: (grid_height, grid_width, window_height, window_width).

    Returns:
        ``[B, N, H, D]`` in the dtype of ``query``; 0 where every score of a row is -inf.

    Example:
        >>> value = torch.arange(4.0).view(1, 4, 1, 1)
        >>> reference_attention(torch.zeros(1, 4, 1, 1), torch.ones(1, 4, 1, 1), value).flatten()
        tensor([1.5000, 1.5000, 1.5000, 1.5000])
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    output_dtype = query.dtype
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    if rotary is not None:
        query, key = rotate(query, *rotary, num_prefix_tokens), rotate(key, *rotary, num_prefix_tokens)
    if window is not None:
        query, key, value = (split_windows(tensor, window) for tensor in (query, key, value))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key) * scale
    if bias is not None:
        if window is not None and bias.dim() == 4 and bias.shape[0] > 1:
            bias = bias.repeat_interleave(_count(window), 0)
        scores = scores + bias.to(wide)
    weights = scores.softmax(-1).masked_fill((scores == -torch.inf).all(-1, keepdim=True), 0)
    output = torch.einsum("bhnm,bmhd->bnhd", weights, value)
    if window is not None:
        output = join_windows(output, window)
    return output.to(output_dtype)


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor, num_prefix_tokens: int) -> Tensor:
    """``x * cos + rotate_half(x) * sin`` for the tokens after the prefix of ``[B, N, H, D]``, in float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    prefix, x = tensor[:, :num_prefix_tokens], tensor[:, num_prefix_tokens:].to(wide)
    left, right = x.chunk(2, -1)
    turned = x * cos.to(wide)[:, None] + torch.cat((-right, left), -1) * sin.to(wide)[:, None]
    return torch.cat((prefix, turned.to(tensor.dtype)), 1)


def split_windows(tensor: Tensor, window: Sequence[int]) -> Tensor:
    """Tokens of a grid in raster order ``[B, N, H, D]``, window by window: ``[B * windows, n, H, D]``."""
    grid_height, grid_width, height, width = window
    batch, _, heads, head_dim = tensor.shape
    rows, columns = grid_height // height, grid_width // width
    tiles = tensor.reshape(batch, rows, height, columns, width, heads, head_dim).transpose(2, 3)
    return tiles.reshape(batch * rows * columns, height * width, heads, head_dim)


def join_windows(tensor: Tensor, window: Sequence[int]) -> Tensor:
    """The inverse of ``split_windows``."""
    grid_height, grid_width, height, width = window
    _, _, heads, head_dim = tensor.shape
    rows, columns = grid_height // height, grid_width // width
    batch = tensor.shape[0] // (rows * columns)
    tiles = tensor.reshape(batch, rows, columns, height, width, heads, head_dim).transpose(2, 3)
    return tiles.reshape(batch, grid_height * grid_width, heads, head_dim)


def _count(window: Sequence[int]) -> int:
    grid_height, grid_width, height, width = window
    return (grid_height // height) * (grid_width // width)
