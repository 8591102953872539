"""A synthetic object-detection task: images of shapes with exact boxes, drawn by this package.

The shipped detector is trained and scored on it (`examples/train_detector.py`). Nothing is downloaded, and
image `index` of seed `seed` is the same on every run.
"""

from visionkernels.synthetic.dataset import Dataset, make_dataset
from visionkernels.synthetic.scene import (
    HELD_OUT_SEED,
    SAMPLE_SEED,
    TRAIN_SEED,
    Scene,
    draw_sample,
    draw_scene,
)
from visionkernels.synthetic.shapes import CLASSES

__all__ = [
    "CLASSES",
    "HELD_OUT_SEED",
    "SAMPLE_SEED",
    "TRAIN_SEED",
    "Dataset",
    "Scene",
    "draw_sample",
    "draw_scene",
    "make_dataset",
]
