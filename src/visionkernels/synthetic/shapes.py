"""The classes of the synthetic task as polygons, and their antialiased masks."""

from collections.abc import Callable

import numpy as np

LINES = 8  # a mask's rows are averaged over so many lines

Polygon = np.ndarray  # [n, 2] of (x, y)


def _circle(radius: float = 1.0) -> Polygon:
    # 72 corners: the polygon's extent is within 0.1% of the circle's.
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _ellipse(rng: np.random.Generator) -> list[Polygon]:
    return [_circle() * (1.0, rng.uniform(0.6, 1.0))]


def _rectangle(rng: np.random.Generator) -> list[Polygon]:
    return [np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * (1.0, rng.uniform(0.45, 1.0))]


def _triangle(rng: np.random.Generator) -> list[Polygon]:
    apex = rng.uniform(-0.5, 0.5)
    return [np.array([(apex, -1.0), (1.0, 0.8), (-1.0, 0.8)]) * (1.0, rng.uniform(0.75, 1.0))]


def _star(rng: np.random.Generator) -> list[Polygon]:
    angle = np.arange(10) * (np.pi / 5) - np.pi / 2
    radius = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    return [np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)]


def _cross(rng: np.random.Generator) -> list[Polygon]:
    a, b = rng.uniform(0.24, 0.36), rng.uniform(0.8, 1.0)
    corners = [
        (-a, -b),
        (a, -b),
        (a, -a),
        (1, -a),
        (1, a),
        (a, a),
        (a, b),
        (-a, b),
        (-a, a),
        (-1, a),
        (-1, -a),
        (-a, -a),
    ]
    return [np.array(corners)]


def _ring(rng: np.random.Generator) -> list[Polygon]:
    aspect = (1.0, rng.uniform(0.75, 1.0))
    return [_circle() * aspect, _circle(rng.uniform(0.5, 0.72)) * aspect]


def _heart(rng: np.random.Generator) -> list[Polygon]:
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) - 2.5
    return [np.stack([x, y], axis=1) / 16 * (1.0, rng.uniform(0.85, 1.1))]


def _arrow(rng: np.random.Generator) -> list[Polygon]:
    shaft, head, neck = rng.uniform(0.16, 0.26), rng.uniform(0.5, 0.7), rng.uniform(-0.05, 0.25)
    return [np.array([(-1, -shaft), (neck, -shaft), (neck, -head), (1, 0), (neck, head), (neck, shaft), (-1, shaft)])]


_SHAPES: dict[str, Callable[[np.random.Generator], list[Polygon]]] = {
    "ellipse": _ellipse,
    "rectangle": _rectangle,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "ring": _ring,
    "heart": _heart,
    "arrow": _arrow,
}

CLASSES: tuple[str, ...] = tuple(_SHAPES)
"""Class names; a label is an index into them."""


def draw_polygons(rng: np.random.Generator, label: int, radius: float, angle: float) -> list[Polygon]:
    """One object around the origin: its outline, and for a ring also the outline of its hole.

    Args:
        rng: Draws the free proportions of the class.
        label: Index into `CLASSES`.
        radius: Half the object's larger side before rotation, in pixels.
        angle: Rotation in radians.

    Returns:
        Polygons `[n, 2]` of (x, y) in pixels, float64; the first is the outline.
    """
    c, s = np.cos(angle), np.sin(angle)
    turn = radius * np.array([(c, s), (-s, c)])
    return [polygon @ turn for polygon in _SHAPES[CLASSES[label]](rng)]


def draw_mask(polygons: list[Polygon], width: int, height: int) -> np.ndarray:
    """How much of each pixel the object covers, exact along x and averaged over eight lines a pixel along y.

    (Pillow's polygons come out up to a third of a pixel too large, which a tight box would not fit.)

    Args:
        polygons: As from `draw_polygons`, moved to their place; pixel `i` covers `[i, i + 1)`.
        width: Width of the mask in pixels; the outline must not leave it.
        height: Height of the mask in pixels.

    Returns:
        `[height, width]` float32 in [0, 1].
    """
    coverage = np.abs(_signed_coverage(polygons[0], width, height))
    for hole in polygons[1:]:
        coverage -= np.abs(_signed_coverage(hole, width, height))
    return coverage.clip(0, 1).astype(np.float32)


def _signed_coverage(polygon: Polygon, width: int, height: int) -> np.ndarray:
    x0, y0 = polygon[:, 0], polygon[:, 1]
    x1, y1 = np.roll(x0, -1), np.roll(y0, -1)
    lines = (np.arange(height * LINES) + 0.5) / LINES
    row, edge = np.nonzero((y0 <= lines[:, None]) != (y1 <= lines[:, None]))
    x = x0[edge] + (lines[row] - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
    # An edge covers all that is right of it, added or taken away: a step at x, split between two pixels.
    sign = np.where(y1[edge] > y0[edge], 1.0, -1.0)
    column = np.floor(x).astype(np.int64)
    part = sign * (column + 1 - x)
    at = row * (width + 2) + column
    size = height * LINES * (width + 2)
    steps = np.bincount(at, part, size) + np.bincount(at + 1, sign - part, size)
    spans = steps.reshape(height, LINES, width + 2).mean(axis=1).cumsum(axis=1)
    return spans[:, :width]
