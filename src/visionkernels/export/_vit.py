"""A `ViT` as a subject: a checkpoint of one of its families, or any that was made in Python."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor

from visionkernels.export._subject import Subject
from visionkernels.export._trace import outputs_of
from visionkernels.models import ViT


def of_checkpoint(model: str | Path, *, half: bool = False, open_image: bool = False) -> Subject:
    """The model of a checkpoint.

    Args:
        model: a directory or hub id.
        half: in float16; else in float32.
        open_image: as in `of_vit`.

    Raises:
        UserError: it cannot be loaded.
    """
    vit = ViT.from_pretrained(model, dtype=torch.float16 if half else torch.float32)
    return of_vit(Path(str(model)).name, vit, open_image=open_image)


def of_vit(name: str, vit: ViT, *, open_image: bool = False) -> Subject:
    """A model, with an example of the size of image that its positions belong to.

    Args:
        name: what to call it.
        vit: the model.
        open_image: the example's height and width are to stay open, so they may not be alike.
    """
    height, width = vit.image_size or vit.config.image_size
    patch = vit.config.patch_size
    if open_image:
        height, width = max(height // patch, 2) * patch, max(width // patch, 2) * patch
        width += patch if height == width else 0
    pixels = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0)).to(vit.device, vit.dtype)
    with torch.no_grad():
        outputs = tuple(outputs_of(vit(pixels)))
    sizes = {"batch": {"pixel_values": 0}, "height": {"pixel_values": 2}, "width": {"pixel_values": 3}}
    unit = {"height": patch, "width": patch}
    return Subject(name, vit, {"pixel_values": pixels}, outputs, sizes, unit, _picture(vit, pixels))


def _picture(vit: ViT, like: Tensor) -> dict[str, Tensor] | None:
    """The picture that ships with the package, in the example's size; None without Pillow, which opens it."""
    if importlib.util.find_spec("PIL") is None:
        return None
    import numpy as np

    from visionkernels._images import read_image
    from visionkernels.detection import SAMPLE_IMAGE

    height, width = like.shape[2:]
    picture = torch.from_numpy(np.array(read_image(SAMPLE_IMAGE).resize((width, height)))).permute(2, 0, 1)
    mean, std = (torch.tensor(numbers or [0.5] * 3)[:, None, None] for numbers in (vit.pixel_mean, vit.pixel_std))
    return {"pixel_values": ((picture / 255 - mean) / std)[None].to(like).contiguous()}
