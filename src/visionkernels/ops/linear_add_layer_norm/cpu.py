"""A linear layer, residual add and layer norm by PyTorch's kernels: the CPU path, and ``backend="pytorch"`` on CUDA."""

from __future__ import annotations

from torch import Tensor

from visionkernels.ops.layer_norm import cpu as layer_norm
from visionkernels.ops.linear import cpu as linear


def linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor]:
    """The sum and the output, both contiguous."""
    total = linear.linear(input, weight, bias, None, residual, scale, precision)
    return total, layer_norm.layer_norm(total, norm_weight, norm_bias, eps)
