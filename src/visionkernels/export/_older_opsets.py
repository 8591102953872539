"""PyTorch's functions that are one ONNX operator from a later opset on, in operators of opset 16."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def written_out(opset: int) -> dict[Any, Callable[..., Any]]:
    """The functions that ONNX does not have at this opset, and a function of the same arguments for each."""
    forms: dict[Any, Callable[..., Any]] = {}
    if opset < 17:
        forms |= {F.layer_norm: layer_norm, torch.layer_norm: layer_norm}
    if opset < 18:
        forms |= {F.interpolate: interpolate, Tensor.mean: mean, torch.mean: mean}
        forms |= {Tensor.chunk: chunk, torch.chunk: chunk}
    return forms


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Tensor:
    """`torch.nn.functional.layer_norm`; LayerNormalization is of opset 17."""
    axes = tuple(range(-len(normalized_shape), 0))
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    centred = wide - mean(wide, axes, True)
    output = centred / (mean(centred.square(), axes, True) + eps).sqrt()
    output = output if weight is None else output * weight
    output = output if bias is None else output + bias
    return output.to(input.dtype)


def mean(input: Tensor, dim: int | Sequence[int], keepdim: bool = False) -> Tensor:
    """`torch.mean`; the exporter's form of ReduceMean has no way back from opset 18."""
    axes = (dim,) if isinstance(dim, int) else tuple(dim)
    return input.sum(axes, keepdim) / math.prod(input.shape[axis] for axis in axes)


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """`torch.chunk`; Split counts its outputs from opset 18 on."""
    size = -(-input.shape[dim] // chunks)
    return input.split_with_sizes([size] * (chunks - 1) + [input.shape[dim] - size * (chunks - 1)], dim)


def interpolate(input: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.interpolate`; Resize antialiases from opset 18 on."""
    if not (options["antialias"] and options["mode"] == "bicubic" and options["size"]):
        return F.interpolate(input, **options)
    height, width = options["size"]
    rows, columns = _antialias(input.shape[2], height, input), _antialias(input.shape[3], width, input)
    return rows @ input @ columns.transpose(0, 1)


def _antialias(old: int, new: int, like: Tensor) -> Tensor:
    """`[new, old]`: the share of each pixel in each new one, by Keys' cubic of a = -0.5, as Pillow has it."""
    scale = torch.full((), old, dtype=like.dtype, device=like.device) / new
    centre = (torch.arange(new, dtype=like.dtype, device=like.device) + 0.5) * scale
    pixel = torch.arange(old, dtype=like.dtype, device=like.device) + 0.5
    x = ((pixel - centre[:, None]) / scale.clamp(min=1)).abs()
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    share = near.where(x < 1, far.where(x < 2, torch.zeros_like(x)))
    return share / share.sum(1, keepdim=True)
