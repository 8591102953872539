"""A linear layer, residual add and layer norm on CUDA: which kernels, and their launches."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from visionkernels.ops._common import cdiv
from visionkernels.ops._inference import Device, device_of, launch, rows_of
from visionkernels.ops.layer_norm import launch as norm_launch
from visionkernels.ops.linear import kernels
from visionkernels.ops.linear import launch as linear_launch


class Split(NamedTuple):
    """How few rows are multiplied: K in parts, for programs of their own."""

    parts: int
    block_m: int = 64
    block_n: int = 64
    block_k: int = 128
    num_warps: int = 4
    num_stages: int = 4
    early: bool = True  # launched while the kernel before still runs


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
    backend: str,
    split: Split | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernels; ``split`` overrules ``split_of``.

    Few rows do not keep the GPU busy, so the sum over K is split too, and the layer norm, which reads all of a row
    anyway, adds up the parts. Many rows are cuBLAS's, and the layer norm adds the residual; with ``backend="triton"``
    the linear layer does.
    """
    rows, weight = rows_of(input), rows_of(weight)
    splits = linear_launch.kind(input, precision) == "half" and norm_launch.pays(residual)
    if split is None and splits and all(map(linear_launch.tma_reads, (rows, weight))):
        split = split_of(rows.shape[0], weight.shape[0], rows.shape[1], device_of(input.device))
    if split is not None and residual.numel():
        parts = _multiply(rows, weight, split)
        return norm_launch.add_parts_layer_norm(parts, bias, residual, norm_weight, norm_bias, eps, scale)
    if backend == "triton":
        total = linear_launch.linear(input, weight, bias, None, residual, scale, precision, backend)
        return total, norm_launch.layer_norm(total, norm_weight, norm_bias, eps, backend)
    branch = linear_launch.linear(input, weight, bias, None, None, None, precision, backend)
    return norm_launch.add_layer_norm(branch, residual, norm_weight, norm_bias, eps, scale, backend)


@lru_cache(4096)
def split_of(num_rows: int, num_columns: int, num_inner: int, device: Device) -> Split | None:
    """In how many parts few rows are multiplied, so that most multiprocessors have one; None for many rows."""
    if not device.is_hopper:
        return None
    tiles = cdiv(num_rows, 64) * cdiv(num_columns, 64)
    if not 0 < tiles <= device.multiprocessors:
        return None
    step = Split(1).block_k
    fitting = [p for p in (1, 2, 3, 4) if tiles * p <= device.multiprocessors and num_inner % (p * step) == 0]
    return Split(max(fitting, default=1))


def _multiply(rows: Tensor, weight: Tensor, split: Split) -> Tensor:
    """``[parts, M, N]`` in float32: the products, summed over a part of K each."""
    (num_rows, num_inner), num_columns = rows.shape, weight.shape[0]
    if split.parts > 1 and num_inner % (split.parts * split.block_k):
        raise ValueError(f"{num_inner} channels are not {split.parts} times a multiple of {split.block_k}")
    parts = rows.new_empty(split.parts, num_rows, num_columns, dtype=torch.float32)
    tiles = cdiv(num_rows, split.block_m) * cdiv(num_columns, split.block_n)
    arguments = (
        parts, linear_launch.descriptor(rows, [split.block_m, split.block_k]),
        linear_launch.descriptor(weight, [split.block_n, split.block_k]),
        num_rows, num_columns, num_inner, split.parts, split.block_m, split.block_n, split.block_k, split.early,
    )  # fmt: skip
    launch(
        kernels._linear_parts_kernel, tiles * split.parts, arguments, rows.device,
        early=split.early, num_warps=split.num_warps, num_stages=split.num_stages,
    )  # fmt: skip
    return parts
