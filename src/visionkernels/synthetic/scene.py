"""One image of the synthetic task, with its objects' labels and boxes."""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from visionkernels.synthetic import textures
from visionkernels.synthetic.shapes import CLASSES, Polygon, draw_mask, draw_polygons

TRAIN_SEED, HELD_OUT_SEED, SAMPLE_SEED = 0, 1, 2
"""Seeds of the training images, of the images that a score is measured on, and of the sample image."""

MAX_OBJECTS = 10
# An object that another one covers further than this has no box that the picture shows.
MIN_VISIBLE = 0.75
_MIN_CONTRAST = 70.0
_SAMPLE_INDEX = 5  # nothing hidden, something overlapped, some clutter


@dataclass(frozen=True)
class Scene:
    """An image and what is in it.

    Attributes:
        image: `[height, width, 3]` uint8, RGB.
        labels: `[n]` int64, indices into `visionkernels.synthetic.CLASSES`.
        boxes: `[n, 4]` float32, (xmin, ymin, xmax, ymax) in pixels; pixel `i` covers `[i, i + 1)`. The
            box is that of the object's whole outline, also where another object covers a part of it.
        masks: `[n, height, width]` bool, or None: the pixels that each object covers by more than half, as
            if nothing lay on it.
    """

    image: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    masks: np.ndarray | None = None


class _Canvas:
    """The picture so far, and which object each pixel shows (0: none, k: the k-th)."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.pixels = pixels
        self.owner = np.zeros(pixels.shape[:2], np.uint8)
        self.areas = [0]
        self.visible = [0]

    def allows(self, window: tuple[slice, slice], covered: np.ndarray) -> bool:
        """Whether every object below stays visible enough under a new one that covers these pixels."""
        lost = np.bincount(self.owner[window][covered], minlength=len(self.areas))
        return all(
            self.visible[k] - lost[k] >= MIN_VISIBLE * self.areas[k] for k in range(1, len(self.areas)) if lost[k]
        )

    def add(self, window: tuple[slice, slice], alpha: np.ndarray, surface: np.ndarray) -> None:
        """Lay `surface` over the picture where `alpha` says."""
        covered = alpha > 0.5
        for k, lost in enumerate(np.bincount(self.owner[window][covered], minlength=len(self.areas))):
            self.visible[k] -= int(lost)
        self.owner[window][covered] = len(self.areas)
        self.areas.append(int(covered.sum()))
        self.visible.append(self.areas[-1])
        below = self.pixels[window]
        below += alpha[..., None] * (surface - below)


def _surface(rng: np.random.Generator, behind: np.ndarray, width: int, height: int) -> np.ndarray:
    """Two colours, both unlike what lies behind, mixed by a pattern: `[height, width, 3]` float32."""
    first = textures.colour_away_from(rng, behind, _MIN_CONTRAST)
    second = textures.colour_away_from(rng, behind, _MIN_CONTRAST) if rng.random() < 0.5 else first * 0.7 + behind * 0.3
    period = max(3.0, rng.uniform(0.06, 0.25) * max(width, height))
    mix = textures.pattern(rng, width, height, period)
    return first + mix[..., None] * (second - first)


def _outline(rng: np.random.Generator, surface: np.ndarray, polygons: list[Polygon], side: int) -> None:
    """Draw a dark or bright border of the object into `surface`, in place."""
    height, width = surface.shape[:2]
    line = Image.new("L", (width, height))
    draw = ImageDraw.Draw(line)
    thickness = max(2, round(rng.uniform(0.01, 0.025) * side))
    for polygon in polygons:
        closed = np.concatenate([polygon, polygon[:2]])
        draw.line(list((closed - 0.5).ravel()), fill=255, width=thickness, joint="curve")
    border = np.asarray(line, np.float32)[..., None] / 255
    surface += border * (np.float32(rng.choice([15.0, 240.0])) - surface)


def draw_sample() -> Scene:
    """The image that ships with the package: one object of each class, 512 x 512 pixels."""
    return draw_scene(SAMPLE_SEED, _SAMPLE_INDEX, 512, labels=tuple(range(len(CLASSES))))


def _place(rng: np.random.Generator, canvas: _Canvas, label: int) -> np.ndarray | None:
    """Draw one object at a random place; its polygons' window does not leave the picture.

    Returns:
        The box, float64 `[4]`, or None if no place was found.
    """
    height, width = canvas.pixels.shape[:2]
    side = min(width, height)
    # Sizes are uniform on a log scale, a ninth to nearly half of the image across.
    radius = 0.5 * side * np.exp(rng.uniform(np.log(0.11), np.log(0.45)))
    shape = draw_polygons(rng, label, radius, rng.uniform(0, 2 * np.pi))
    low, high = shape[0].min(axis=0), shape[0].max(axis=0)
    if (high - low >= (width - 2, height - 2)).any():
        return None
    for _ in range(20):
        shift = np.array([rng.uniform(1 - low[0], width - 1 - high[0]), rng.uniform(1 - low[1], height - 1 - high[1])])
        x0, y0 = np.floor(low + shift).astype(int)
        x1, y1 = np.ceil(high + shift).astype(int)
        window = (slice(y0, y1), slice(x0, x1))
        local = [polygon + shift - (x0, y0) for polygon in shape]
        alpha = draw_mask(local, x1 - x0, y1 - y0)
        if not canvas.allows(window, alpha > 0.5):
            continue
        surface = _surface(rng, canvas.pixels[window].mean(axis=(0, 1)), x1 - x0, y1 - y0)
        if rng.random() < 0.3:
            _outline(rng, surface, local, side)
        canvas.add(window, alpha, surface)
        return np.concatenate([low + shift, high + shift])
    return None


def _finish(rng: np.random.Generator, pixels: np.ndarray) -> np.ndarray:
    """Uneven light, blur and sensor noise; returns uint8."""
    height, width = pixels.shape[:2]
    if rng.random() < 0.3:
        pixels = pixels * (0.6 + 0.6 * textures.smooth_noise(rng, width, height, 2))[..., None]
    if rng.random() < 0.2:
        sharp = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        blurred = sharp.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.0) * min(width, height) / 256))
        pixels = np.asarray(blurred, np.float32)
    # The sum of two uniform bytes: near enough to a bell curve, and ten times as fast as one.
    grain = rng.integers(0, 256, (2, *pixels.shape), dtype=np.uint8)
    noise = grain[0].astype(np.float32) + grain[1]
    noise -= 255
    noise *= np.float32(rng.uniform(0, 12) / 104)  # 104: the sum's standard deviation
    noise += pixels
    return np.clip(noise, 0, 255, out=noise).astype(np.uint8)


def draw_scene(
    seed: int,
    index: int,
    size: int | tuple[int, int] = 256,
    *,
    labels: tuple[int, ...] | None = None,
    with_masks: bool = False,
) -> Scene:
    """Draw image `index` of the series `seed`.

    Args:
        seed: Which series, not negative: `TRAIN_SEED`, `HELD_OUT_SEED` or any other.
        index: Which image of the series, not negative.
        size: Side of the image in pixels, or (width, height); at least 64.
        labels: The objects to draw, later ones on top. By default 1 to 10 objects of random classes.
        with_masks: Whether to return each object's mask (for tests).

    Returns:
        The scene. The same arguments give the same scene (with the same NumPy and Pillow).

    Raises:
        ValueError: If the image is smaller than 64 pixels.

    Example:
        >>> scene = draw_scene(seed=0, index=3)
        >>> scene.image.shape, scene.boxes.shape[1]
        ((256, 256, 3), 4)
    """
    width, height = (size, size) if isinstance(size, int) else size
    if min(width, height) < 64:
        raise ValueError(f"size must be at least 64 pixels each way, but it is {width} x {height}")
    rng = np.random.default_rng([seed, index])
    pixels = textures.background(rng, width, height)
    textures.add_blobs(rng, pixels)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    textures.draw_clutter(rng, picture)
    canvas = _Canvas(np.asarray(picture, np.float32).copy())
    if labels is None:
        labels = tuple(rng.integers(0, len(CLASSES), rng.integers(1, MAX_OBJECTS + 1)).tolist())
    boxes, found, masks = [], [], []
    for label in labels:
        box = _place(rng, canvas, label)
        if box is None:
            continue
        boxes.append(box)
        found.append(label)
        if with_masks:
            masks.append(canvas.owner == len(canvas.areas) - 1)
    return Scene(
        image=_finish(rng, canvas.pixels),
        labels=np.array(found, np.int64),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        masks=np.stack(masks) if masks else None,
    )
