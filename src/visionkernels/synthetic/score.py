"""COCO average precision of a detector on the synthetic task."""

import contextlib
import io
from collections.abc import Mapping, Sequence

import numpy as np

from visionkernels.synthetic.dataset import Dataset
from visionkernels.synthetic.shapes import CLASSES


def average_precision(predictions: Sequence[Mapping[str, np.ndarray]], dataset: Dataset) -> dict[str, float]:
    """Score boxes with pycocotools, as COCO does.

    Args:
        predictions: One mapping for each image of `dataset`: `scores` `[k]`, `labels` `[k]` integer
            and `boxes` `[k, 4]` (xmin, ymin, xmax, ymax) in pixels. COCO counts the best 100 of an image.
        dataset: The images' true objects.

    Returns:
        `AP` (mean over IoU 0.50 to 0.95), `AP50`, `AP75`, and `AP/<class>` for each class, in [0, 1].

    Raises:
        ValueError: If the numbers of predictions and images differ.
        ImportError: If pycocotools is not installed.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    if len(predictions) != len(dataset):
        raise ValueError(
            f"predictions must be one for each of the {len(dataset)} images, but they are {len(predictions)}"
        )
    truth: list[dict] = []
    results: list[dict] = []
    for image, (boxes, labels, found) in enumerate(zip(dataset.boxes, dataset.labels, predictions, strict=True)):
        for box, label in zip(boxes[labels >= 0].tolist(), labels[labels >= 0].tolist(), strict=True):
            truth.append(_annotation(image, label, box) | {"id": len(truth) + 1, "iscrowd": 0})
        rows = zip(found["boxes"].tolist(), found["labels"].tolist(), found["scores"].tolist(), strict=True)
        results += [_annotation(image, label, box) | {"score": score} for box, label, score in rows]
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = {
            "info": {},
            "images": [{"id": image} for image in range(len(dataset))],
            "categories": [{"id": label, "name": name} for label, name in enumerate(CLASSES)],
            "annotations": truth,
        }
        coco.createIndex()
        # loadRes refuses an empty list; an empty result set scores 0 all the same.
        detections = coco.loadRes(results) if results else COCO()
        evaluation = COCOeval(coco, detections, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    score = {name: float(value) for name, value in zip(("AP", "AP50", "AP75"), evaluation.stats, strict=False)}
    precision = evaluation.eval["precision"][:, :, :, 0, -1]  # [IoU, recall, class], all sizes, 100 detections
    for label, name in enumerate(CLASSES):
        known = precision[:, :, label][precision[:, :, label] > -1]  # -1: no such object among the images
        score[f"AP/{name}"] = float(known.mean()) if known.size else float("nan")
    return score


def _annotation(image: int, label: int, box: list[float]) -> dict:
    xmin, ymin, xmax, ymax = box
    width, height = xmax - xmin, ymax - ymin
    return {
        "image_id": image,
        "category_id": label,
        "bbox": [xmin, ymin, width, height],
        "area": width * height,
    }
