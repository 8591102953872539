"""Many images of the synthetic task at once, drawn by several processes."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat

import numpy as np

from visionkernels.synthetic.scene import MAX_OBJECTS, draw_scene

_CHUNK = 128


@dataclass(frozen=True)
class Dataset:
    """Images of one size with their objects, padded to the same number of objects.

    Attributes:
        images: `[n, size, size, 3]` uint8, RGB.
        boxes: `[n, MAX_OBJECTS, 4]` float32, (xmin, ymin, xmax, ymax) in pixels; 0 where there is no
            object.
        labels: `[n, MAX_OBJECTS]` int64; -1 where there is no object. Objects come first, padding last.
    """

    images: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def first(self, count: int) -> "Dataset":
        """The first `count` images."""
        return Dataset(self.images[:count], self.boxes[:count], self.labels[:count])


def _draw_chunk(seed: int, start: int, stop: int, size: int) -> Dataset:
    n = stop - start
    images = np.empty((n, size, size, 3), np.uint8)
    boxes = np.zeros((n, MAX_OBJECTS, 4), np.float32)
    labels = np.full((n, MAX_OBJECTS), -1, np.int64)
    for i in range(n):
        scene = draw_scene(seed, start + i, size)
        images[i] = scene.image
        boxes[i, : len(scene.labels)] = scene.boxes
        labels[i, : len(scene.labels)] = scene.labels
    return Dataset(images, boxes, labels)


def make_dataset(
    count: int,
    seed: int,
    *,
    size: int = 256,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Dataset:
    """Draw the first `count` images of the series `seed`.

    Args:
        count: Number of images, at least 1.
        seed: Which series.
        size: Side of the images in pixels.
        workers: Processes that draw; 1 draws in this one. They are forked, so call this before anything uses
            a GPU.
        progress: Called with the number of images drawn since the last call.

    Returns:
        The images in order, the same for any number of workers.

    Raises:
        ValueError: If `count` or `workers` is less than 1.

    Example:
        >>> make_dataset(2, seed=0).images.shape
        (2, 256, 256, 3)
    """
    if count < 1 or workers < 1:
        raise ValueError(f"count and workers must be at least 1, but they are {count} and {workers}")
    images = np.empty((count, size, size, 3), np.uint8)
    boxes = np.empty((count, MAX_OBJECTS, 4), np.float32)
    labels = np.empty((count, MAX_OBJECTS), np.int64)
    starts = range(0, count, _CHUNK)
    stops = [min(start + _CHUNK, count) for start in starts]

    def keep(start: int, chunk: Dataset) -> None:
        part = slice(start, start + len(chunk))
        images[part], boxes[part], labels[part] = chunk.images, chunk.boxes, chunk.labels
        if progress is not None:
            progress(len(chunk))

    if workers == 1:
        for start, stop in zip(starts, stops, strict=True):
            keep(start, _draw_chunk(seed, start, stop, size))
        return Dataset(images, boxes, labels)
    # Forked workers start at once; spawned ones would each import the caller's script, torch included.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        chunks = pool.map(_draw_chunk, repeat(seed), starts, stops, repeat(size))
        for start, chunk in zip(starts, chunks, strict=True):
            keep(start, chunk)
    return Dataset(images, boxes, labels)
