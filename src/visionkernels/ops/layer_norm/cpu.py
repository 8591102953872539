"""Layer normalisation by PyTorch's own kernels: the CPU path, and ``backend="pytorch"`` on CUDA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``[..., C]``, contiguous; PyTorch's kernels have statistics in float32 for halves too."""
    # Under autocast PyTorch's is float32 on CUDA.
    return F.layer_norm(input, input.shape[-1:], weight, bias, eps).to(input.dtype).contiguous()


def add_layer_norm(
    input: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sum and the output, both contiguous; addcmul rounds once, as the sum of two tensors does."""
    total = torch.add(residual, input) if scale is None else torch.addcmul(residual, input, scale)
    total = total.contiguous()
    return total, layer_norm(total, weight, bias, eps)
