"""Attention as a registered operator, and the public functions that check a call and make it."""

from __future__ import annotations

from collections.abc import Sequence

import torch  # noqa: F401  (the examples name it)
from torch import Tensor

from visionkernels.ops import _inference
from visionkernels.ops.attention import checks, cpu


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty(query.shape)


FORWARD = _inference.register(
    "attention(Tensor query, Tensor key, Tensor value, float scale, Tensor? bias, Tensor? cos, Tensor? sin, "
    "SymInt num_prefix_tokens, SymInt[]? window, str backend) -> Tensor",
    module="attention",
    pytorch=cpu.forward,
    fake=_forward_fake,
)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rotary: checks.Rotary | None = None,
    num_prefix_tokens: int = 0,
    window: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention of every token to every token, or to those of its window: softmax(scale * q @ k.T + bias) @ v.

    Inference only. CUDA tensors run a Triton kernel that holds no scores in memory, or PyTorch's
    ``scaled_dot_product_attention`` where that measures faster; CPU tensors run PyTorch's. Scores, softmax and sums are
    float32, float64 for float64. Under ``torch.autocast`` query, key and value are cast.

    Args:
        query: ``[B, N, H, D]`` (batch, tokens, heads, head_dim), float64, float32, float16 or bfloat16. Any strides: a
            view of a packed projection is read in place, where its last axis is contiguous.
        key: as ``query``.
        value: as ``query``.
        scale: of the scores, positive; ``D ** -0.5`` if None.
        bias: added to the scores, floating, broadcastable to ``[B, H, N, N]``; -inf hides a key, and a query that sees
            none gets 0, as in ``scaled_dot_product_attention``. With a window, broadcastable to ``[B, H, n, n]`` for
            the n tokens of a window in raster order, the same for every window.
        rotary: (cos, sin), each ``[N - num_prefix_tokens, D]``: the tokens of query and key after the prefix become
            ``x * cos + rotate_half(x) * sin`` in float32, where ``rotate_half(x)`` is ``(-x[D/2:], x[:D/2])``.
        num_prefix_tokens: tokens before those that rotary turns (class and register tokens).
        window: (grid_height, grid_width, window_height, window_width): the tokens are a grid in raster order, cut into
            windows that divide it, and attend within theirs. No prefix tokens.
        backend: ``"auto"``, ``"triton"`` or ``"pytorch"``. The Triton kernel takes float32, float16 and bfloat16 and a
            head_dim that is a multiple of 8 from 16 to 128; for others ``"auto"`` is ``"pytorch"``.

    Returns:
        ``[B, N, H, D]``, contiguous, in the dtype of ``query``. NaN in a query makes NaN of its row, in a key of every
        row of its head that sees it.

    Raises:
        TypeError: an argument is of another type or dtype than it must be.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: Dao, "FlashAttention-2" (https://arxiv.org/abs/2307.08691), algorithm 1; the rotary embedding is DINOv3's
    (https://arxiv.org/abs/2508.10104).

    Example:
        >>> value = torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 2, 16)
        >>> attention(torch.zeros(1, 4, 2, 16), torch.ones(1, 4, 2, 16), value)[0, 0, :, 0]
        tensor([1.5000, 1.5000])
    """
    query, key, value = _autocast(query), _autocast(key), _autocast(value)
    checks.check_qkv(query, key, value)
    _inference.check_backend(backend, query)
    scale = checks.check_scale(scale, query.shape[3])
    checks.check_prefix(num_prefix_tokens, query.shape[1])
    window = checks.check_window(window, num_prefix_tokens, query.shape[1])
    checks.check_bias(bias, query, window)
    cos, sin = checks.check_rotary(rotary, num_prefix_tokens, query)
    _inference.refuse_gradients(
        "attention", query, key, value, bias, cos, sin, instead="torch.nn.functional.scaled_dot_product_attention"
    )
    return FORWARD(query, key, value, scale, bias, cos, sin, num_prefix_tokens, window, backend)


def packed_attention(
    qkv: Tensor,
    num_heads: int,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    rotary: checks.Rotary | None = None,
    num_prefix_tokens: int = 0,
    window: Sequence[int] | None = None,
    backend: str = "auto",
) -> Tensor:
    """``attention`` of one packed projection, read in place.

    Args:
        qkv: ``[B, N, 3 * H * D]``: all heads of the query, then of the key, then of the value.
        num_heads: H.
        scale: as in ``attention``, and so are all that follow.
        bias: broadcastable to ``[B, H, N, N]``.
        rotary: (cos, sin), each ``[N - num_prefix_tokens, D]``.
        num_prefix_tokens: tokens that rotary leaves as they are.
        window: (grid_height, grid_width, window_height, window_width).
        backend: ``"auto"``, ``"triton"`` or ``"pytorch"``.

    Returns:
        ``[B, N, H * D]``, contiguous, in the dtype of ``qkv``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``attention``; or ``qkv`` cannot be cut into 3 times ``num_heads``.

    Source: ``attention``; the order of timm's ``qkv`` projection.

    Example:
        >>> packed_attention(torch.zeros(2, 5, 3 * 4 * 16), 4).shape
        torch.Size([2, 5, 64])
    """
    _inference.check_tensor("qkv", qkv, "[B, N, 3 * H * D]", 3)
    if isinstance(num_heads, bool) or not isinstance(num_heads, int):
        raise TypeError(f"num_heads must be an integer, got {type(num_heads).__name__}")
    if num_heads < 1:
        raise ValueError(f"num_heads must be at least 1, got {num_heads}")
    if qkv.shape[2] == 0 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"qkv must be [B, N, 3 * H * D] with a last axis divisible by 3 * num_heads = {3 * num_heads}, "
            f"got {list(qkv.shape)}"
        )
    query, key, value = qkv.unflatten(2, (3, num_heads, qkv.shape[2] // (3 * num_heads))).unbind(2)
    output = attention(
        query, key, value, scale=scale, bias=bias, rotary=rotary, num_prefix_tokens=num_prefix_tokens,
        window=window, backend=backend,
    )  # fmt: skip
    return output.flatten(2)


def _autocast(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of an active autocast; what is no tensor is refused later."""
    return _inference.cast(_inference.autocast_dtype(tensor), tensor)[0] if isinstance(tensor, Tensor) else tensor
