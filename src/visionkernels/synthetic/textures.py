"""Colours, surfaces and clutter of the synthetic images."""

import numpy as np
from PIL import Image, ImageDraw


def smooth_noise(rng: np.random.Generator, width: int, height: int, cells: int) -> np.ndarray:
    """Noise in [0, 1] whose grain is about `1 / cells` of the image, `[height, width]` float32."""
    grid = rng.integers(0, 256, (cells, cells), dtype=np.uint8)
    return np.asarray(Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC), np.float32) / 255


def pattern(rng: np.random.Generator, width: int, height: int, period: float) -> np.ndarray:
    """A random surface: flat, gradient, stripes, checks or noise.

    Args:
        rng: Source of every choice.
        width: Width in pixels.
        height: Height in pixels.
        period: Width of a stripe or check, in pixels.

    Returns:
        `[height, width]` float32 in [0, 1]: the mixing ratio of two colours.
    """
    kind = rng.integers(6)
    if kind == 0:
        return np.zeros((height, width), np.float32)
    if kind == 1:
        return smooth_noise(rng, width, height, int(rng.integers(3, 9)))
    angle = rng.uniform(0, 2 * np.pi)
    x = (np.arange(width, dtype=np.float32) - width / 2)[None, :]
    y = (np.arange(height, dtype=np.float32) - height / 2)[:, None]
    along = np.float32(np.cos(angle)) * x + np.float32(np.sin(angle)) * y
    if kind == 2:
        return np.clip(along / max(width, height) + 0.5, 0, 1)
    phase = along * np.float32(np.pi / period) + np.float32(rng.uniform(0, np.pi))
    if kind in (3, 4):
        # A steep sine: stripes with soft, so not aliased, borders.
        return np.clip(np.sin(phase) * 2 + 0.5, 0, 1)
    across = np.float32(-np.sin(angle)) * x + np.float32(np.cos(angle)) * y
    return np.clip(np.sin(phase) * np.sin(across * np.float32(np.pi / period)) * 3 + 0.5, 0, 1)


def colour(rng: np.random.Generator) -> np.ndarray:
    """An RGB colour, float32 in [0, 255]."""
    return rng.uniform(0, 255, 3).astype(np.float32)


def colour_away_from(rng: np.random.Generator, other: np.ndarray, distance: float) -> np.ndarray:
    """A colour at least `distance` from `other`; the distance is Euclidean, in [0, 220]."""
    while True:
        found = colour(rng)
        if np.linalg.norm(found - other) >= distance:
            return found


def background(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Two colours, not far apart, mixed by one or two patterns: `[height, width, 3]` float32."""
    first = colour(rng)
    second = np.clip(first + rng.normal(0, 35, 3), 0, 255).astype(np.float32)
    mix = pattern(rng, width, height, rng.uniform(0.02, 0.12) * width)
    if rng.random() < 0.5:
        mix = 0.5 * (mix + smooth_noise(rng, width, height, int(rng.integers(2, 24))))
    return first + mix[..., None] * (second - first)


def draw_clutter(rng: np.random.Generator, image: Image.Image) -> None:
    """Draw what is no object: lines, open arcs, specks and soft patches, none of which encloses an area.

    Args:
        rng: Source of every choice.
        image: RGB picture, drawn into.
    """
    draw = ImageDraw.Draw(image)
    side = min(image.size)
    for _ in range(rng.integers(0, 10)):
        fill = tuple(int(v) for v in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        line = int(rng.integers(1, max(2, side // 80) + 1))
        kind = rng.integers(3)
        if kind == 0:
            angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.8) * side
            draw.line((x, y, x + length * np.cos(angle), y + length * np.sin(angle)), fill, line)
        elif kind == 1:
            radius, start = rng.uniform(0.05, 0.3) * side, rng.uniform(0, 360)
            box = (x - radius, y - radius, x + radius, y + radius)
            draw.arc(box, start, start + rng.uniform(40, 150), fill, line)
        else:
            for dx, dy in rng.normal(0, 0.06 * side, (int(rng.integers(3, 12)), 2)):
                speck = rng.uniform(0.003, 0.01) * side
                draw.ellipse((x + dx - speck, y + dy - speck, x + dx + speck, y + dy + speck), fill)


def add_blobs(rng: np.random.Generator, canvas: np.ndarray) -> None:
    """Add soft patches without an edge to `canvas`, `[height, width, 3]` float32, in place."""
    height, width = canvas.shape[:2]
    for _ in range(rng.integers(0, 4)):
        sigma = rng.uniform(0.03, 0.12) * min(width, height)
        cx, cy = rng.uniform(0, width), rng.uniform(0, height)
        gx = np.exp(-0.5 * ((np.arange(width, dtype=np.float32) - np.float32(cx)) / np.float32(sigma)) ** 2)
        gy = np.exp(-0.5 * ((np.arange(height, dtype=np.float32) - np.float32(cy)) / np.float32(sigma)) ** 2)
        canvas += (gy[:, None] * gx)[..., None] * rng.normal(0, 45, 3).astype(np.float32)
