"""What a call of attention must look like; every message names the argument, what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visionkernels.ops._common import shown
from visionkernels.ops._inference import check_like, check_tensor

Rotary = tuple[Tensor, Tensor]
AXES = "[B, N, H, D] (batch, tokens, heads, head_dim)"


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Three tensors ``[B, N, H, D]`` of one shape, dtype and device."""
    check_tensor("query", query, AXES, 4)
    if query.shape[3] == 0:
        raise ValueError(f"query must have a head_dim of at least 1, got {list(query.shape)}")
    check_like("key", key, query.shape, AXES, query, "query")
    check_like("value", value, query.shape, AXES, query, "query")


def check_table(name: str, table: Tensor, axes: str, dims: int | None, query: Tensor) -> None:
    """A tensor on the query's device, of any floating dtype."""
    check_tensor(name, table, axes, dims)
    if table.device != query.device:
        raise ValueError(f"{name} must be on {query.device} like query, got {table.device}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The scale of the scores, a positive number."""
    if scale is None:
        return head_dim**-0.5
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale must be a number or None, got {type(scale).__name__}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}; fold the sign into query")
    return float(scale)


def check_prefix(num_prefix_tokens: int, num_tokens: int) -> None:
    """A number of tokens."""
    if isinstance(num_prefix_tokens, bool) or not isinstance(num_prefix_tokens, (int, torch.SymInt)):
        raise TypeError(f"num_prefix_tokens must be an integer, got {type(num_prefix_tokens).__name__}")
    if num_prefix_tokens < 0 or num_prefix_tokens > num_tokens:
        raise ValueError(f"num_prefix_tokens must be from 0 to the {num_tokens} tokens, got {num_prefix_tokens}")


def check_rotary(rotary: Rotary | None, num_prefix_tokens: int, query: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(cos, sin), each ``[N - num_prefix_tokens, D]``."""
    if rotary is None:
        return None, None
    if not isinstance(rotary, (tuple, list)) or len(rotary) != 2:
        raise TypeError(f"rotary must be a pair (cos, sin) or None, got {type(rotary).__name__}")
    expected = (query.shape[1] - num_prefix_tokens, query.shape[3])
    if query.shape[3] % 2:
        raise ValueError(f"rotary needs an even head_dim, got query {list(query.shape)}")
    for name, table in zip(("rotary[0] (cos)", "rotary[1] (sin)"), rotary, strict=True):
        check_table(name, table, "[N - num_prefix_tokens, D]", 2, query)
        if tuple(table.shape) != expected:
            raise ValueError(f"{name} must be [N - num_prefix_tokens, D] = {list(expected)}, got {list(table.shape)}")
    return rotary[0], rotary[1]


def check_window(window: Sequence[int] | None, num_prefix_tokens: int, num_tokens: int) -> list[int] | None:
    """(grid_height, grid_width, window_height, window_width), the grid divisible by the window."""
    if window is None:
        return None
    if (
        not isinstance(window, (tuple, list))
        or len(window) != 4
        or not all(isinstance(size, (int, torch.SymInt)) and not isinstance(size, bool) for size in window)
    ):
        raise TypeError(
            "window must be four integers (grid_height, grid_width, window_height, window_width) or None, "
            f"got {shown(window)}"
        )
    if num_prefix_tokens != 0:
        raise ValueError(f"window allows no prefix tokens, got num_prefix_tokens = {num_prefix_tokens}")
    grid_height, grid_width, height, width = window
    if min(window) < 1:
        raise ValueError(f"window must hold sizes of at least 1, got {list(window)}")
    if grid_height * grid_width != num_tokens:
        raise ValueError(f"window must have grid_height * grid_width = N = {num_tokens} tokens, got {list(window)}")
    if grid_height % height or grid_width % width:
        raise ValueError(
            f"window must divide the grid: {grid_height} by {height} and {grid_width} by {width} without remainder; "
            "pad the grid"
        )
    return list(window)


def check_bias(bias: Tensor | None, query: Tensor, window: Sequence[int] | None) -> None:
    """Floating, broadcastable to ``[B, H, N, N]``, or to the tokens of a window."""
    if bias is None:
        return
    if isinstance(bias, Tensor) and bias.dtype == torch.bool:
        raise TypeError("bias must be floating, got a bool mask; use -inf where a key is hidden and 0 elsewhere")
    batch, tokens, heads, _ = query.shape
    axes, tokens = ("[B, H, N, N]", tokens) if window is None else ("[B, H, n, n] of a window", window[2] * window[3])
    check_table("bias", bias, f"broadcastable to {axes}", None, query)
    expected = (batch, heads, tokens, tokens)
    fits = bias.dim() <= 4 and all(bias.shape[axis] in (1, expected[axis]) for axis in range(-bias.dim(), 0))
    if not fits:
        raise ValueError(f"bias must be broadcastable to {axes} = {list(expected)}, got {list(bias.shape)}")
