"""Linear layers with their epilogues in plain PyTorch: the ground truth.

    linear: residual + scale * act(x W^T + b)        gated_linear: act(x G^T + b_G) * (x U^T + b_U), W = [G; U]

Sources of the activations: Hendrycks and Gimpel, "Gaussian Error Linear Units" (https://arxiv.org/abs/1606.08415), for
gelu, its tanh form and quick_gelu, section 2; Shazeer, "GLU Variants Improve Transformer"
(https://arxiv.org/abs/2002.05202), for the gated form.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def gelu(x: Tensor) -> Tensor:
    """``x * P(X <= x)`` for X normally distributed."""
    return x * 0.5 * (1 + torch.erf(x * math.sqrt(0.5)))


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of ``gelu`` by tanh."""
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Tensor) -> Tensor:
    """The approximation of ``gelu`` by a sigmoid; CLIP's."""
    return x * torch.sigmoid(1.702 * x)


def silu(x: Tensor) -> Tensor:
    """``x * sigmoid(x)``."""
    return x * torch.sigmoid(x)


ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda x: x,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
    "quick_gelu": quick_gelu,
    "silu": silu,
}


def reference_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """``linear``, computed in float32, or float64 for float64, and rounded once."""
    wide = torch.promote_types(input.dtype, torch.float32)
    output = input.to(wide) @ weight.to(wide).T
    if bias is not None:
        output = output + bias.to(wide)
    output = ACTIVATIONS[activation](output)
    if scale is not None:
        output = output * scale.to(wide)
    if residual is not None:
        output = output + residual.to(wide)
    return output.to(input.dtype)


def reference_gated_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "silu"
) -> Tensor:
    """``gated_linear``, computed in float32, or float64 for float64, and rounded once."""
    wide = torch.promote_types(input.dtype, torch.float32)
    gate, up = reference_linear(input.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).chunk(2, -1)
    return (ACTIVATIONS[activation](gate) * up).to(input.dtype)
