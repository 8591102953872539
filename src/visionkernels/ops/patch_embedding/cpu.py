"""The patch embedding by PyTorch's own kernels: all of the CPU path, and the backend "pytorch" on CUDA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.ops.linear.cpu import float32_precision
from visionkernels.ops.patch_embedding.reference import normalise


def forward(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    position_embedding: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """A product, then position and prefix. Arguments and result as the operator's."""
    if bias is not None:
        bias = bias.to(weight.dtype)
    if pixel_values.dtype == torch.uint8 or mean is not None or std is not None:
        wide = torch.promote_types(weight.dtype, torch.float32)
        pixels = normalise(pixel_values, mean, std, channels_last, wide)
    else:
        pixels = pixel_values.permute(0, 3, 1, 2) if channels_last else pixel_values
    batch, _, height, width = pixels.shape
    size = weight.shape[2]
    num_patches = (height // size) * (width // size)
    # A convolution whose windows do not overlap: as a product it is faster on GPUs, and exact in float32.
    pixels = pixels.to(weight.dtype)[:, :, : height // size * size, : width // size * size]
    pixels = pixels.unflatten(3, (width // size, size)).unflatten(2, (height // size, size))  # [B, 3, h, p, w, p]
    rows = pixels.permute(0, 2, 4, 1, 3, 5).reshape(batch, num_patches, weight[0].numel())
    with float32_precision(rows, "ieee"):
        patches = F.linear(rows, weight.flatten(1), bias)
    if position_embedding is not None:
        patches = patches + position_embedding
    if prefix_tokens is not None:
        patches = torch.cat((prefix_tokens.expand(batch, -1, -1), patches), 1)
    return patches.to(weight.dtype).contiguous()
