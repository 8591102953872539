"""A linear layer, residual add and layer norm in plain PyTorch: the ground truth."""

from __future__ import annotations

from torch import Tensor

from visionkernels.ops.layer_norm.reference import reference_layer_norm
from visionkernels.ops.linear.reference import reference_linear


def reference_linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``linear_add_layer_norm``: the sum is rounded to its dtype, and what is normalised is the rounded sum."""
    total = reference_linear(input, weight, bias, None, residual, scale)
    return total, reference_layer_norm(total, norm_weight, norm_bias, eps)
