"""What the checks and the launches of all operators share."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor


def check_dense(name: str, tensor: Tensor) -> None:
    """Strides and sizes are those of memory: a sparse tensor has none, a nested one has others for each row."""
    # While compiling neither can be asked in the backward of somebody's autograd.Function.
    if not torch.compiler.is_compiling() and (tensor.layout != torch.strided or tensor.is_nested):
        kind = "a nested tensor" if tensor.is_nested else f"the layout {tensor.layout}"
        raise TypeError(f"{name} must be a dense tensor, got {kind}")


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient, rounded up. Triton's functions of these names take the host a few microseconds."""
    return -(-numerator // denominator)


def next_power_of_2(size: int) -> int:
    """The least power of two that is not less than ``size``, at least 1."""
    return 1 << max(size - 1, 0).bit_length()


def shown(found: object) -> str:
    """What came, in one line."""
    if isinstance(found, Tensor):
        return f"a tensor of {found.dtype}"
    text = " ".join(repr(found).split())
    return text if len(text) <= 200 else f"{text[:200]} ..."


def on_device(device: torch.device) -> Any:
    """A context in which ``device`` is current; Triton launches on the current device, wherever the tensors are."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
