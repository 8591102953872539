"""PyTorch's functions that are one ONNX operator from a later opset on, in operators of opset 16; and the mean."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def written_out(opset: int) -> dict[Any, Callable[..., Any]]:
    """The functions that ONNX does not have at this opset, and the mean: a function of the same arguments for each."""
    forms: dict[Any, Callable[..., Any]] = {}
    if opset < 17:
        forms |= {F.layer_norm: layer_norm, torch.layer_norm: layer_norm}
    if opset < 18:
        forms |= {F.interpolate: interpolate, Tensor.chunk: chunk, torch.chunk: chunk}
    means = _with_names_of_numpy(mean if opset < 18 else wide_mean)
    return forms | {Tensor.mean: means, torch.mean: means}


def _with_names_of_numpy(form: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """PyTorch's reductions take NumPy's names of their arguments as well."""
    names = {"axis": "dim", "keepdims": "keepdim"}

    @functools.wraps(form)
    def call(*arguments: Any, **options: Any) -> Tensor:
        return form(*arguments, **{names.get(name, name): value for name, value in options.items()})

    return call


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


def mean(
    input: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.mean`; the exporter's form of ReduceMean has no way back from opset 18."""
    dtype = dtype or input.dtype
    sizes = tuple(input.shape) or (1,)  # a scalar has an axis here, as it has for PyTorch
    axes = (dim,) if isinstance(dim, int) else tuple(dim or range(input.dim()))
    wide = input.to(torch.promote_types(dtype, torch.float32))  # the sum may be beyond a dtype that holds the mean
    total = wide.sum(axes, keepdim)
    return (total / math.prod(sizes[axis] for axis in axes)).to(dtype)


def wide_mean(input: Tensor, *arguments: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """`torch.mean`, its sum in float32: a runtime may add up a ReduceMean of float16 in float16, past its largest."""
    dtype = dtype or input.dtype
    return torch.mean(input.to(torch.promote_types(dtype, torch.float32)), *arguments, **options).to(dtype)


def chunk(input: Tensor, chunks: int, dim: int = 0) -> tuple[Tensor, ...]:
    """`torch.chunk`; Split counts its outputs from opset 18 on."""
    length = input.shape[dim]
    size = -(-length // chunks)
    if isinstance(length, int) and size:
        chunks = -(-length // size)  # fewer, where so many of this size are more than there is
    return input.split_with_sizes([size] * (chunks - 1) + [length - size * (chunks - 1)], dim)


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
