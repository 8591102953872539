"""Linear layers by PyTorch's own kernels: the CPU path, and ``backend="pytorch"`` on CUDA."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.ops._inference import rows_of

COLUMNS = 768  # of a block


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    precision: str,
) -> Tensor:
    """``[..., F]``, contiguous, in as few kernels as PyTorch has for it."""
    with float32_precision(input, precision):
        if bias is None and activation is None and scale is None and residual is not None:
            rows = rows_of(residual)
            return torch.addmm(rows, rows_of(input), weight.t()).view(residual.shape)
        if activation == "gelu_tanh" and bias is not None and _has_epilogue(input):
            output = torch._addmm_activation(bias, rows_of(input), weight.t(), use_gelu=True)
            output = output.view(*input.shape[:-1], weight.shape[0])
        else:
            output = activate(_product(input, weight, bias), activation)
    if residual is not None:
        output = output.add_(residual) if scale is None else torch.addcmul(residual, output, scale)
    elif scale is not None:
        output = output.mul_(scale)
    return output.contiguous()


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``; a wide one of the tokens of one image in blocks of columns, in which MKL is 13 % faster.

    Measured with 197 and 257 rows on two threads; from 394 rows on it is slower.
    """
    if bias is None or not _is_one_image(input) or weight.shape[0] < 2 * COLUMNS:
        return F.linear(input, weight, bias)
    rows, output = rows_of(input), input.new_empty(*input.shape[:-1], weight.shape[0])
    blocks = output.view(-1, weight.shape[0]).split(COLUMNS, 1)
    for block, its_weight, its_bias in zip(blocks, weight.split(COLUMNS), bias.split(COLUMNS), strict=True):
        torch.addmm(its_bias, rows, its_weight.t(), out=block)
    return output


def _is_one_image(input: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and input.device.type == "cpu"
        and input.dtype == torch.float32
        and 128 <= input.numel() // max(input.shape[-1], 1) <= 320
        and torch.get_num_threads() <= 4
    )


def gated_linear(input: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, precision: str) -> Tensor:
    """``[..., F]``, contiguous."""
    with float32_precision(input, precision):
        gate, up = F.linear(input, weight, bias).chunk(2, -1)
    return (activate(gate, activation) * up).contiguous()


def activate(x: Tensor, activation: str | None) -> Tensor:
    """One of ``reference.ACTIVATIONS``, in place: to take as much memory once more costs more than to compute it."""
    if activation == "gelu":
        return torch.ops.aten.gelu_(x)
    if activation == "gelu_tanh":
        return torch.ops.aten.gelu_(x, approximate="tanh")
    if activation == "quick_gelu":
        return x.mul_(torch.sigmoid(1.702 * x))
    return x if activation is None else F.silu(x, inplace=True)


def _has_epilogue(input: Tensor) -> bool:
    """Whether cuBLASLt has bias and gelu by tanh, which is the gelu of ``_addmm_activation``, in its epilogue.

    An exported program gets the two steps, which other runtimes know.
    """
    return not torch.compiler.is_compiling() and input.is_cuda and input.dtype != torch.float64 and input.numel() > 0


@contextmanager
def float32_precision(input: Tensor, precision: str) -> Iterator[None]:
    """Have cuBLAS multiply float32 as ``precision`` says, whatever the process has set.

    The setting is the process's: other threads that come here wait, and a product of theirs elsewhere may see it.
    """
    if not (input.is_cuda and input.dtype == torch.float32):
        yield
        return
    settings = torch.backends.cuda.matmul
    with _SETTING:
        before = settings.fp32_precision
        if before == precision:
            yield
            return
        settings.fp32_precision = precision
        try:
            yield
        finally:
            settings.fp32_precision = "none"  # then it is torch.backends.fp32_precision, which it may have been
            if settings.fp32_precision != before:
                settings.fp32_precision = before


_SETTING = threading.RLock()
