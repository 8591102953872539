"""Linear layers on CUDA: their buffers and their launches."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from visionkernels.ops._common import cdiv
from visionkernels.ops._inference import INTERPRET, Device, device_of, launch, rows_of
from visionkernels.ops.linear import cpu, kernels
from visionkernels.ops.linear.tiles import Tile, tile_of

ALIGNMENT = 16  # bytes, of whatever TMA reads or writes: addresses and distances of rows
MAX_INT32 = 2**31 - 1  # TMA counts rows and columns in 32 bits


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    precision: str,
    backend: str,
    tile: Tile | None = None,
) -> Tensor:
    """Launch a kernel, or PyTorch's where that is faster; ``tile`` overrules ``tile_of``."""
    rows, inner = prod(input.shape[:-1]), input.shape[-1]
    # A few hundred rows fill cuBLAS' tiles better, by more than a pass over the output takes.
    activates = activation is not None and not 256 < rows <= 1024
    # PyTorch adds a residual in a pass of its own, which costs little beside cuBLAS but for few rows and for very many.
    adds = residual is not None or scale is not None
    adds = adds and (rows >= 40_000 or (inner <= 2048 and (rows <= 512 or rows >= 16_384)))
    if backend == "auto" and not pays(input, precision, fused=activates or adds):
        return cpu.linear(input, weight, bias, activation, residual, scale, precision)
    output = input.new_empty(*input.shape[:-1], weight.shape[0])
    _launch(output, input, weight, bias, activation, residual, scale, precision, False, tile)
    return output


def gated_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    precision: str,
    backend: str,
    tile: Tile | None = None,
) -> Tensor:
    """Launch a kernel, or PyTorch's where that is faster; ``tile`` overrules ``tile_of``."""
    if backend == "auto" and not pays(input, precision, fused=True):
        return cpu.gated_linear(input, weight, bias, activation, precision)
    output = input.new_empty(*input.shape[:-1], weight.shape[0] // 2)
    _launch(output, input, weight, bias, activation, None, None, precision, True, tile)
    return output


def pays(input: Tensor, precision: str, fused: bool) -> bool:
    """Whether "auto" takes a Triton kernel.

    Of halves and tf32 where something follows the product, for it then costs no pass over the output; a product alone
    is cuBLAS's. Exact float32 and float64 are cuBLAS's too: Triton has no fast way to multiply them.
    """
    return fused and kind(input, precision) in ("half", "tf32")


def kind(input: Tensor, precision: str) -> str:
    """``kind`` as ``tile_of`` knows it."""
    if input.dtype == torch.float64:
        return "double"
    if input.dtype == torch.float32:
        return "exact" if precision == "ieee" else "tf32"
    return "half"


def _launch(
    output: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    scale: Tensor | None,
    precision: str,
    gated: bool,
    tile: Tile | None,
) -> None:
    if output.numel() == 0:
        return
    device, columns = device_of(input.device), rows_of(output)
    rows, weight = rows_of(input), rows_of(weight)
    residual = None if residual is None else rows_of(residual)
    bias, scale = (t if t is None else t.contiguous() for t in (bias, scale))
    if tile is None:
        matrices = [columns, rows, weight] if residual is None else [columns, rows, weight, residual]
        tile = tile_of(
            rows.shape[0], columns.shape[1], device,
            kind=kind(input, precision), gated=gated, tma=all(map(tma_reads, matrices)), residual=residual is not None,
        )  # fmt: skip
    (num_rows, num_columns), num_inner = columns.shape, rows.shape[1]
    block_k = _block_k(tile, rows)
    tiles = cdiv(num_rows, tile.block_m) * cdiv(num_columns, tile.block_n)
    half, rest = rows.element_size() == 2, (num_rows, num_columns, num_inner, activation, gated, precision)
    short = short_gelu(device) if half else None
    blocks = (tile.block_m, tile.block_n, block_k, tile.group_m)
    arguments: tuple[Any, ...]
    if tile.tma:
        kernel, programs = kernels._linear_tma_kernel, device.multiprocessors * tile.programs
        block = [tile.block_m, tile.block_n // tile.parts]
        arguments = (
            descriptor(columns, block), descriptor(rows, [tile.block_m, block_k]),
            descriptor(weight, [tile.block_n, block_k]), bias,
            None if residual is None else descriptor(residual, block), scale, *rest,
            short, *blocks, tile.parts, tile.flatten, tile.warp_specialize, tile.early,
        )  # fmt: skip
    else:
        kernel, programs = kernels._linear_kernel, tiles
        # The interpreter multiplies no bfloat16; products of halves are exact in float32 either way.
        factor = tl.float32 if INTERPRET and half else _TYPES[rows.dtype]
        arguments = (
            columns, rows, weight, bias, residual, scale,
            rows.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0), *rest,
            tl.float64 if rows.dtype == torch.float64 else tl.float32, factor,
            num_inner % block_k == 0, short, *blocks, tile.early, 128 // rows.element_size(),
        )  # fmt: skip
    launch(
        kernel, min(tiles, programs), arguments, rows.device,
        early=tile.early, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def short_gelu(device: Device) -> str:
    """How GELU may be approximated where half precision hides it: NVIDIA's GPUs have an instruction for tanh."""
    return "tanh" if device.capability >= (7, 5) else "exp"


def tma_reads(matrix: Tensor) -> bool:
    """Whether TMA can read and write ``matrix``, ``[M, N]`` with a contiguous last axis, where it lies."""
    size = matrix.element_size()
    aligned = matrix.data_ptr() % ALIGNMENT == 0 and matrix.stride(0) * size % ALIGNMENT == 0
    # A single column may have any stride; one of 0 TMA cannot step by; of a matrix without elements nothing is read.
    return (
        aligned
        and matrix.stride(1) == 1
        and matrix.stride(0) > 0
        and matrix.numel() > 0
        and max(matrix.shape) <= MAX_INT32
    )


_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def _block_k(tile: Tile, rows: Tensor) -> int:
    """The tile's step in elements: it is said in elements of two bytes."""
    return max(16, tile.block_k * 2 // rows.element_size())


def descriptor(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    """What TMA is told of a matrix that it reads or writes in blocks."""
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
