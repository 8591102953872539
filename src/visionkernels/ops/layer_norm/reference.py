"""Layer normalisation in plain PyTorch: the ground truth.

    mean = sum(x) / C      var = sum((x - mean)^2) / C      y = (x - mean) / sqrt(var + eps) * weight + bias

Source: Ba et al., "Layer Normalization" (https://arxiv.org/abs/1607.06450), equations 3 and 4.
"""

from __future__ import annotations

import torch
from torch import Tensor


def reference_layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """``layer_norm``, with statistics in float32, or float64 for float64."""
    wide = torch.promote_types(input.dtype, torch.float32)
    x = input.to(wide)
    centred = x - x.mean(-1, keepdim=True)
    output = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        output = output * weight.to(wide)
    if bias is not None:
        output = output + bias.to(wide)
    return output.to(input.dtype)


def reference_add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm``: the sum is rounded to its dtype, and what is normalised is the rounded sum."""
    wide = torch.promote_types(input.dtype, torch.float32)
    branch = input.to(wide) if scale is None else input.to(wide) * scale.to(wide)
    total = (residual.to(wide) + branch).to(input.dtype)
    return total, reference_layer_norm(total, weight, bias, eps)
