"""Read pictures of every common kind, and draw boxes into them."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionkernels.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Apart in hue, and readable on most pictures.
_PALETTE = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#008080",
    "#f032e6",
    "#9a6324",
    "#808000",
    "#000075",
)


def read_image(image: Any) -> "Image.Image":
    """Turn what a caller calls an image into an upright RGB picture.

    Args:
        image: A path, a PIL image, or a NumPy array or torch tensor `[height, width, 3]` of uint8.

    Returns:
        An RGB picture: turned as its EXIF data say, transparency over white, 16-bit grey scaled to 8 bits.

    Raises:
        UserError: If there is no such file, it is no image, or the array has another shape or dtype.
    """
    from PIL import Image, ImageOps

    if isinstance(image, (str, os.PathLike)):
        return _to_rgb(_open(Path(image)), str(image))
    if isinstance(image, Image.Image):
        return _to_rgb(ImageOps.exif_transpose(image), "it")
    return _from_array(image)


def _open(path: Path) -> "Image.Image":
    """The first picture in a file, upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    if path.is_dir():
        raise UserError(f"image: {path} is a directory; name an image file in it")
    if not path.exists():
        raise UserError(f"image: there is no file {path}")
    try:
        with Image.open(path) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)  # a copy
    except UnidentifiedImageError as error:
        raise UserError(f"image: {path} is no image that Pillow can read") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        # Pillow's readers raise all of these on damaged files.
        raise UserError(f"image: {path} cannot be read: {_first_line(error)}") from error


def _to_rgb(image: "Image.Image", name: str) -> "Image.Image":
    import numpy as np
    from PIL import Image

    if 0 in image.size:
        raise UserError(f"image: expected at least one pixel, but {name} is {image.width} x {image.height}")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow itself would clip everything above 255 to white
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise UserError(f"image: expected 8 or 16 bits a pixel, but {name} has 32; convert it to 8 bits first")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError(
            f"image: expected 8 or 16 bits a pixel, but {name} holds floating-point numbers; convert it first"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _from_array(image: Any) -> "Image.Image":
    import numpy as np
    import torch
    from PIL import Image

    array = image.detach().cpu().numpy() if isinstance(image, torch.Tensor) else image
    if not isinstance(array, np.ndarray):
        raise UserError(
            f"image: expected a path, a PIL image, an array or a tensor, but it is a {type(image).__name__}"
        )
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise UserError(
            f"image: an array must be [height, width, 3] of uint8, but it is {list(array.shape)} of {array.dtype}"
        )
    return Image.fromarray(array)


def check_output(path: Path) -> None:
    """Raise a UserError unless a picture can be written to `path`."""
    from PIL import Image

    if path.is_dir():
        raise UserError(f"--output: {path} is a directory; name a file, such as {path / 'detected.png'}")
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output: there is no directory {path.parent}; make it first")
    format_name = Image.registered_extensions().get(path.suffix.lower())
    if format_name not in Image.SAVE:
        raise UserError(
            f"--output: {path.name!r} does not end in an image type that can be written, such as .png or .jpg"
        )


def write_image(image: "Image.Image", path: Path) -> None:
    """Write a picture; a UserError says why it cannot be."""
    try:
        image.save(path)
    except OSError as error:
        raise UserError(f"--output: {path} cannot be written: {_first_line(error)}") from error


def draw_boxes(image: "Image.Image", objects: Sequence[dict[str, Any]]) -> "Image.Image":
    """A copy of `image` with the boxes, labels and scores of `visionkernels.detect` drawn into it."""
    from PIL import ImageDraw, ImageFont

    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    side = min(drawn.size)
    line = max(2, round(side / 200))
    font = ImageFont.load_default(size=max(11, round(side / 36)))
    colours = {label: _PALETTE[i % len(_PALETTE)] for i, label in enumerate(sorted({o["label"] for o in objects}))}
    for found in reversed(objects):  # the surest on top
        box, colour = found["box"], colours[found["label"]]
        draw.rectangle((box["xmin"], box["ymin"], box["xmax"], box["ymax"]), outline=colour, width=line)
    for found in reversed(objects):
        box, text = found["box"], f"{found['label']} {found['score']:.2f}"
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        width, height = right - left + 2 * line, bottom - top + 2 * line
        # Above the box where there is room, inside the picture always.
        x = min(max(box["xmin"], 0), max(drawn.width - width, 0))
        y = box["ymin"] - height if box["ymin"] >= height else box["ymin"]
        draw.rectangle((x, y, x + width, y + height), fill=colours[found["label"]])
        draw.text((x + line - left, y + line - top), text, fill="white", font=font)
    return drawn


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
