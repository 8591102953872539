"""The patch embedding in plain PyTorch: the ground truth.

    out[b, T + n] = sum over channels and pixels of patch n of  weight * normalised pixel  + bias + position[n]

and ``out[b, :T]`` are the prefix tokens. Patches do not overlap, so the convolution is a matrix product.

Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929), equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def reference_patch_embedding(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    position_embedding: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    channels_last: bool = False,
) -> Tensor:
    """Cut the image into patches and multiply, in float32, or in float64 where the weight is float64.

    Args:
        pixel_values: ``[B, 3, H, W]``, or ``[B, H, W, 3]`` with ``channels_last``; float or uint8.
        weight: ``[C, 3, p, p]``.
        bias: ``[C]``.
        position_embedding: ``[P, C]``, added to the P patches in raster order.
        prefix_tokens: ``[T, C]``, written before the patches as they are.
        mean: of each channel, subtracted from the pixels (uint8: from the pixels over 255).
        std: of each channel, what they are divided by after that.
        channels_last: whether the last axis of ``pixel_values`` is the channels.

    Returns:
        ``[B, T + P, C]`` in the dtype of ``weight``.

    Example:
        >>> pixels = torch.arange(12.0).view(1, 3, 2, 2)
        >>> reference_patch_embedding(pixels, torch.ones(1, 3, 2, 2)).flatten()
        tensor([66.])
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    pixels = normalise(pixel_values, mean, std, channels_last, wide)
    batch, channels, height, width = pixels.shape
    size = weight.shape[2]
    rows, columns = height // size, width // size
    patches = pixels.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    output = patches.reshape(batch, rows * columns, channels * size * size) @ weight.to(wide).flatten(1).T
    if bias is not None:
        output = output + bias.to(wide)
    if position_embedding is not None:
        output = output + position_embedding.to(wide)
    if prefix_tokens is not None:
        output = torch.cat((prefix_tokens.to(wide).expand(batch, -1, -1), output), 1)
    return output.to(weight.dtype)


def normalise(
    pixel_values: Tensor,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """``(x - mean) / std``, uint8 over 255 first, as ``[B, 3, H, W]`` of ``dtype``, at least float32."""
    pixels = pixel_values.to(dtype)
    if channels_last:
        pixels = pixels.permute(0, 3, 1, 2)
    if pixel_values.dtype == torch.uint8:
        pixels = pixels / 255
    if mean is not None:
        pixels = pixels - pixels.new_tensor(mean)[:, None, None]
    if std is not None:
        pixels = pixels / pixels.new_tensor(std)[:, None, None]
    return pixels
