"""What a vision transformer takes as pictures; everything else is refused in one sentence."""

from __future__ import annotations

import torch
from torch import Tensor

from visionkernels.models.config import ViTConfig


def check_pixels(pixel_values: Tensor, config: ViTConfig, device: torch.device, normalises: bool) -> None:
    """Refuse what the model cannot take.

    Args:
        pixel_values: What came in place of `[B, 3, H, W]`.
        config: The model's shape.
        device: Where the model is.
        normalises: Whether it knows the mean and deviation by which uint8 pictures are normalised.

    Raises:
        TypeError: It is no tensor, or of a dtype that is not supported.
        ValueError: It is of a wrong shape or on another device, or uint8 and the model cannot normalise.
    """
    if not isinstance(pixel_values, Tensor):
        raise TypeError(f"pixel_values must be a tensor [B, 3, H, W], got {type(pixel_values).__name__}")
    if pixel_values.dim() != 4 or pixel_values.shape[1] != 3:
        raise ValueError(f"pixel_values must be [B, 3, H, W], got {list(pixel_values.shape)}")
    if pixel_values.device != device:
        raise ValueError(
            f"pixel_values must be on {device} like the model, got {pixel_values.device}; move one with .to()"
        )
    check_size(pixel_values.shape[2], pixel_values.shape[3], config, "pixel_values")
    if pixel_values.dtype == torch.uint8 and not normalises:
        raise ValueError(
            "pixel_values must be floating numbers: uint8 pictures are normalised by the mean and deviation of a "
            "preprocessor_config.json, and this model lacks one; set pixel_mean and pixel_std"
        )
    if pixel_values.dtype != torch.uint8 and not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values must be floating numbers or uint8, got {pixel_values.dtype}")


def fits(height: int, width: int, config: ViTConfig) -> bool:
    """Whether the patch divides both sides, or the size is the checkpoint's own: upstream leaves out its rest."""
    whole = bool(height and width) and not height % config.patch_size and not width % config.patch_size
    return whole or (height, width) == config.image_size


def check_size(height: int, width: int, config: ViTConfig, name: str) -> None:
    """Refuse a size that does not fit.

    Args:
        height: Of the pictures.
        width: Of the pictures.
        config: The model's shape.
        name: The argument's name.
    """
    if not fits(height, width, config):
        raise ValueError(
            f"{name} must have a height and a width that are multiples of the patch size {config.patch_size}, "
            f"got {height} x {width}"
        )
