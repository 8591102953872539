"""The patch embedding on CUDA: the tiles that its kernel is launched with, worked out from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionkernels.ops._common import cdiv
from visionkernels.ops._inference import INTERPRET, device_of, launch
from visionkernels.ops.patch_embedding import cpu, kernels

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Tile(NamedTuple):
    """What one launch is compiled with."""

    block_r: int  # tokens of a program
    block_c: int  # channels of a program
    block_k: int  # pixels of a step
    num_warps: int
    num_stages: int
    early: bool = False  # begin while the kernel before still runs


def pays(pixel_values: Tensor, weight: Tensor, *_: Any) -> bool:
    """Whether the kernel is what "auto" takes: where there is one."""
    return weight.dtype in DTYPES and pixel_values.dtype != torch.float64


def choose_tile(num_rows: int, channels: int, itemsize: int, pixel_itemsize: int, hopper: bool = False) -> Tile:
    """The tile of a launch, from tokens of the batch, channels, the bytes of a weight and of a pixel, and the GPU."""
    if itemsize == 4:  # without tensor cores: products of small tiles are all that fits in registers
        return Tile(64, 64, 16, 4, 2)
    if num_rows * channels <= 64 * 64 * 132:  # small tiles, so that more processors have one
        return Tile(64, 64, 64, 4, 4, early=True) if hopper else Tile(32, 64, 64, 4, 4)
    if num_rows * channels <= 128 * 128 * 132:
        return Tile(64, 64, 64, 4, 4)
    if hopper and pixel_itemsize < 4:  # few rows of many channels: what gathers pixels reads whole lines of them
        return Tile(64, 128, 64, 8, 4)
    # Pixels wait in shared memory in their own dtype: float32 ones would take all that an MI300 has.
    return Tile(128, 128, 64 if pixel_itemsize < 4 else 32, 8, 3)


def patch_embedding(*arguments: Any) -> Tensor:
    """Launch the kernel, or PyTorch's where there is none; arguments as the operator's."""
    *inputs, backend = arguments
    if backend == "auto" and not pays(*inputs):
        return cpu.forward(*inputs)
    return forward(*inputs)


def forward(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position_embedding: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Launch the kernel; arguments as the operator's, and a tile to launch with instead of the chosen one.

    Returns:
        ``[B, T + P, C]``, contiguous.

    Raises:
        TypeError: a dtype that the kernel does not have.
    """
    for name, tensor in (("weight", weight), ("pixel_values", pixel_values)):
        if tensor.dtype == torch.float64:
            raise TypeError(f'{name} must be float32, float16 or bfloat16 for backend="triton", got {tensor.dtype}')
    batch, height, width = pixel_values.shape[0], *pixel_values.shape[1 + (not channels_last) :][:2]
    channels, _, size, _ = weight.shape
    num_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    num_tokens = num_prefix + (height // size) * (width // size)
    output = torch.empty((batch, num_tokens, channels), dtype=weight.dtype, device=weight.device)
    if output.numel() == 0:
        return output
    pixels, strides = _in_runs(pixel_values, channels_last)
    # In the order of the pixels: for channels last a copy, unless the weight's memory format is that too.
    weight = (weight.permute(0, 2, 3, 1) if channels_last else weight).contiguous()
    bias, position_embedding, prefix_tokens = (
        None if tensor is None else tensor.contiguous() for tensor in (bias, position_embedding, prefix_tokens)
    )
    scale, shift = _affine(pixels.dtype == torch.uint8, mean, std)
    if tile is None:
        hopper = device_of(weight.device).launches_early
        tile = choose_tile(batch * num_tokens, channels, weight.element_size(), pixels.element_size(), hopper)
    programs = cdiv(batch * num_tokens, tile.block_r) * cdiv(channels, tile.block_c)
    run = 3 * size if channels_last else size
    arguments = (
        pixels, weight, bias, position_embedding, prefix_tokens, output, *strides,
        batch * num_tokens, num_tokens, num_prefix, max(1, width // size), *scale, *shift,
        channels, size, channels_last, pixels.dtype == torch.uint8 or mean is not None or std is not None,
        bias is not None, position_embedding is not None, prefix_tokens is not None,
        math.gcd(16, run, *strides), "ieee", INTERPRET and weight.dtype == torch.bfloat16,
        tile.block_r, tile.block_c, tile.block_k, tile.early,
    )  # fmt: skip
    launch(
        kernels._patch_embedding_kernel, programs, arguments, weight.device,
        early=tile.early, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return output


def _in_runs(pixels: Tensor, channels_last: bool) -> tuple[Tensor, tuple[int, int, int]]:
    """Pixels whose rows are whole in memory, and the strides of image, channel and row."""
    if pixels.stride()[2:] != (3, 1) if channels_last else pixels.stride(3) != 1:
        pixels = pixels.contiguous()
    strides = pixels.stride()
    return pixels, (strides[0], 0, strides[1]) if channels_last else (strides[0], strides[1], strides[2])


def _affine(
    is_bytes: bool, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[list[float], list[float]]:
    """Scale and shift of each channel, ``(x * scale + shift)`` being ``(x / 255 - mean) / std``."""
    full = 255.0 if is_bytes else 1.0
    means, deviations = mean or (0.0,) * 3, std or (1.0,) * 3
    return [1 / (full * deviation) for deviation in deviations], [
        -m / d for m, d in zip(means, deviations, strict=True)
    ]
