"""Layer normalisation on CUDA: its buffers and its launch."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from visionkernels.ops._common import cdiv, next_power_of_2
from visionkernels.ops._inference import Device, device_of, launch, rows_of
from visionkernels.ops.layer_norm import cpu, kernels

MAX_CHANNELS = 32768  # a row lies in the registers of 32 warps


class Tile(NamedTuple):
    """What a program takes: LOOP times ROWS rows."""

    rows: int
    loop: int
    num_warps: int
    early: bool = False


def tile_of(num_rows: int, channels: int, device: Device) -> Tile:
    """The tile for a call.

    A warp owns a row of up to 1024 channels, for a sum within a warp needs no shared memory; a row shorter than 512
    brings its neighbours, so that each lane reads 16 bytes at least. Few rows are spread over more warps, for latency,
    and begin while the kernel before ends; of many, a warp takes two at once, for more reads under way.
    """
    block = next_power_of_2(channels)
    early = device.launches_early and num_rows <= 4096
    if block > 1024:
        return Tile(1, 1, min(block // 512, 32), early)
    if num_rows < 4 * device.multiprocessors:
        return Tile(1, 1, max(1, block // 256), early)
    if num_rows <= 4096:
        return Tile(max(1, 512 // block), 1, 1, early)
    return Tile(max(1, 512 // block) * 2, 1, 1 if num_rows <= 16384 else 2)


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str, tile: Tile | None = None
) -> Tensor:
    """Launch the kernel, or PyTorch's where that is the faster one; ``tile`` overrules ``tile_of``."""
    if backend == "auto" and not pays(input):
        return cpu.layer_norm(input, weight, bias, eps)
    output = input.new_empty(input.shape)
    _launch(output, None, input, None, weight, bias, None, eps, tile)
    return output


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    backend: str,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Launch the kernel, or PyTorch's where that is the faster; ``tile`` overrules ``tile_of``."""
    if backend == "auto" and not pays(input):
        return cpu.add_layer_norm(input, residual, weight, bias, eps, scale)
    total, output = input.new_empty(input.shape), input.new_empty(input.shape)
    _launch(output, total, input, residual, weight, bias, scale, eps, tile)
    return total, output


def add_parts_layer_norm(
    parts: Tensor,
    input_bias: Tensor | None,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """``add_layer_norm`` where the input is ``parts.sum(0) + input_bias``, ``[parts, M, C]`` in float32."""
    total, output = residual.new_empty(residual.shape), residual.new_empty(residual.shape)
    _launch(output, total, parts[0], residual, weight, bias, scale, eps, tile, input_bias, parts.shape[0])
    return total, output


def pays(input: Tensor) -> bool:
    """Whether "auto" takes the Triton kernel: wherever a row fits in registers."""
    return input.shape[-1] <= MAX_CHANNELS


def _launch(
    output: Tensor,
    total: Tensor | None,
    input: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    tile: Tile | None,
    input_bias: Tensor | None = None,
    parts: int = 1,
) -> None:
    channels = input.shape[-1]
    if channels > MAX_CHANNELS:
        raise ValueError(
            f"input must have at most {MAX_CHANNELS} channels for the Triton kernel of layer_norm, got {channels}; "
            'pass backend="pytorch"'
        )
    if output.numel() == 0:
        return
    rows = rows_of(input)
    residual_rows = None if residual is None else rows_of(residual)
    weight, bias, scale, input_bias = (t if t is None else t.contiguous() for t in (weight, bias, scale, input_bias))
    tile = tile or tile_of(rows.shape[0], channels, device_of(input.device))
    arguments = (
        output, total, rows, residual_rows, weight, bias, scale, input_bias,
        rows.stride(0), 0 if residual_rows is None else residual_rows.stride(0), rows.shape[0],
        channels, eps, parts, tl.float64 if input.dtype == torch.float64 else tl.float32,
        tile.rows, tile.loop, next_power_of_2(channels), tile.early,
    )  # fmt: skip
    launch(
        kernels._layer_norm_kernel, cdiv(rows.shape[0], tile.rows * tile.loop), arguments, input.device,
        early=tile.early, num_warps=tile.num_warps,
    )  # fmt: skip
