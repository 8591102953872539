"""Attention by PyTorch's own kernels: all of the CPU path, and the backend "pytorch" on CUDA.

``scaled_dot_product_attention`` picks flash, cuDNN or memory-efficient attention on CUDA and a blocked kernel on the
CPU. It knows neither rotary embedding nor windows, so those are PyTorch operators around it. Products of float32 are
exact, whatever the process has set, as in the Triton kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from visionkernels.ops.attention.reference import join_windows, rotate, split_windows
from visionkernels.ops.linear.cpu import float32_precision


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
) -> Tensor:
    """Attention of ``[B, N, H, D]``; arguments as the operator's. Returns ``[B, N, H, D]``, contiguous."""
    if query.numel() == 0:
        return query.new_empty(query.shape)
    batch = query.shape[0]
    if cos is not None and sin is not None:
        query, key = rotate(query, cos, sin, num_prefix_tokens), rotate(key, cos, sin, num_prefix_tokens)
    if window is not None:
        query, key, value = (split_windows(tensor, window) for tensor in (query, key, value))
    if bias is not None:
        if window is not None and bias.dim() == 4 and bias.shape[0] > 1:
            bias = bias.repeat_interleave(query.shape[0] // batch, 0)
        bias = bias.to(query.dtype)
        # Broadcast here: the kernels that take a bias want its last two axes whole.
        bias = bias.expand(query.shape[0], query.shape[2], query.shape[1], query.shape[1])
    query, key, value = (tensor.transpose(1, 2) for tensor in (query, key, value))
    with float32_precision(query, "ieee"):
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale).transpose(1, 2)
    return (output if window is None else join_windows(output, window)).contiguous()
