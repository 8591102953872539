"""The synthetic detection task: repeatable, with boxes that fit."""

import numpy as np
import pytest
from PIL import Image

from visionkernels.detection import SAMPLE_IMAGE
from visionkernels.synthetic import (
    CLASSES,
    HELD_OUT_SEED,
    TRAIN_SEED,
    Scene,
    draw_sample,
    draw_scene,
    make_dataset,
)
from visionkernels.synthetic.scene import MAX_OBJECTS, MIN_VISIBLE
from visionkernels.synthetic.score import average_precision
from visionkernels.synthetic.shapes import draw_mask, draw_polygons


def scenes(count: int, **options) -> list[Scene]:
    return [draw_scene(TRAIN_SEED, index, **options) for index in range(count)]


def test_the_same_seed_and_index_give_the_same_scene():
    one, again = draw_scene(3, 7), draw_scene(3, 7)
    assert (one.image == again.image).all()
    assert (one.boxes == again.boxes).all()
    assert (one.labels == again.labels).all()


@pytest.mark.parametrize("other", [(3, 8), (4, 7), (7, 3)], ids=["index", "seed", "swapped"])
def test_another_seed_or_index_gives_another_scene(other):
    assert (draw_scene(3, 7).image != draw_scene(*other).image).mean() > 0.5


@pytest.mark.parametrize("size", [128, 256, (320, 200)], ids=str)
def test_boxes_fit_the_objects(size):
    """No pixel that is more than half covered sticks out by more than half; round sides reach the box."""
    checked = 0
    for scene in scenes(20, size=size, with_masks=True):
        height, width, _ = scene.image.shape
        assert (scene.boxes >= 0).all()
        assert (scene.boxes <= [width, height, width, height]).all()
        if not len(scene.labels):
            continue
        for mask, box, label in zip(scene.masks, scene.boxes, scene.labels, strict=True):
            ys, xs = np.nonzero(mask)
            drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
            assert (drawn[:2] >= box[:2] - 0.51).all()
            assert (drawn[2:] <= box[2:] + 0.51).all()
            if CLASSES[label] in ("ellipse", "rectangle", "ring", "heart"):
                assert np.abs(drawn - box).max() < 2.5  # corners sharper than a pixel are cut off
            checked += 1
    assert checked > 50


@pytest.mark.parametrize("label", range(len(CLASSES)), ids=CLASSES)
def test_masks_cover_the_polygons(label):
    """Finely drawn, the mask touches the outline's box on all four sides: exact where sharp tips end."""
    rng = np.random.default_rng(label)
    for angle in (0.0, 0.4, 2.0):
        shape = draw_polygons(rng, label, 200.0, angle)
        low, high = shape[0].min(axis=0), shape[0].max(axis=0)
        width, height = np.ceil(high - low).astype(int) + 20
        mask = draw_mask([polygon - low + 10 for polygon in shape], width, height)
        assert mask.min() == 0
        assert mask.max() == pytest.approx(1)
        ys, xs = np.nonzero(mask > 0)
        drawn = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        expected = np.concatenate([low, high]) - np.tile(low, 2) + 10
        assert np.abs(drawn - expected).max() <= 1


def test_a_mask_has_the_polygon_s_area():
    square = np.array([(3.25, 4.0), (13.75, 4.0), (13.75, 9.5), (3.25, 9.5)])
    hole = np.array([(5.0, 5.0), (7.0, 5.0), (7.0, 8.0), (5.0, 8.0)])
    mask = draw_mask([square], 20, 20)
    assert mask.sum() == pytest.approx(10.5 * 5.5)
    assert mask[3].sum() == 0
    assert mask[4, 3] == pytest.approx(0.75)
    assert mask[9, 13] == pytest.approx(0.75 * 0.5)
    assert draw_mask([square[::-1], hole], 20, 20).sum() == pytest.approx(10.5 * 5.5 - 6)


def test_objects_stay_visible():
    for scene in scenes(30, with_masks=True):
        if not len(scene.labels):
            continue
        for k, mask in enumerate(scene.masks):
            hidden = mask & scene.masks[k + 1 :].any(axis=0)
            assert hidden.sum() <= (1 - MIN_VISIBLE) * mask.sum() + 1e-9


def test_the_task_is_varied():
    found = scenes(200, size=64)
    labels = np.concatenate([scene.labels for scene in found])
    counts = [len(scene.labels) for scene in found]
    sizes = np.concatenate([(scene.boxes[:, 2:] - scene.boxes[:, :2]).max(axis=1) for scene in found])
    assert len(CLASSES) >= 5
    assert set(labels) == set(range(len(CLASSES)))
    assert min(counts) >= 1
    assert max(counts) == MAX_OBJECTS
    assert sizes.max() > 3 * sizes.min()
    assert np.mean([scene.masks is None for scene in found]) == 1


def test_labels_can_be_chosen():
    assert draw_scene(5, 1, labels=(2, 2, 0)).labels.tolist() == [2, 2, 0]


def test_too_small_an_image_is_refused():
    with pytest.raises(ValueError, match="at least 64 pixels each way, but it is 63 x 100"):
        draw_scene(0, 0, (63, 100))


def test_a_dataset_holds_the_scenes_in_order_for_any_number_of_workers():
    count = 130  # more than one chunk
    alone, shared = make_dataset(count, 9, size=64), make_dataset(count, 9, size=64, workers=2)
    for name in ("images", "boxes", "labels"):
        assert (getattr(alone, name) == getattr(shared, name)).all()
    scene = draw_scene(9, 129, 64)
    n = len(scene.labels)
    assert (shared.images[129] == scene.image).all()
    assert (shared.boxes[129, :n] == scene.boxes).all()
    assert shared.labels[129].tolist() == scene.labels.tolist() + [-1] * (MAX_OBJECTS - n)


def test_a_dataset_reports_its_progress():
    steps = []
    make_dataset(130, 9, size=64, progress=steps.append)
    assert sum(steps) == 130
    assert len(steps) > 1


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="at least 1, but they are 0 and 1"):
        make_dataset(0, 1)


def test_the_shipped_sample_is_the_drawn_one():
    scene = draw_sample()
    assert scene.labels.tolist() == list(range(len(CLASSES)))
    shipped = np.asarray(Image.open(SAMPLE_IMAGE).convert("RGB"), np.float32)
    # Not pixel by pixel: another Pillow may round otherwise.
    assert np.abs(shipped - scene.image).mean() < 0.5


def perfect(dataset) -> list[dict[str, np.ndarray]]:
    rows = zip(dataset.boxes, dataset.labels, strict=True)
    return [
        {"scores": np.ones((labels >= 0).sum()), "labels": labels[labels >= 0], "boxes": boxes[labels >= 0]}
        for boxes, labels in rows
    ]


def test_average_precision_tells_right_from_wrong():
    dataset = make_dataset(30, HELD_OUT_SEED, size=64)
    score = average_precision(perfect(dataset), dataset)
    assert score["AP"] == pytest.approx(1.0)
    assert score["AP/star"] == pytest.approx(1.0)
    shifted = [one | {"boxes": one["boxes"] + 2.0} for one in perfect(dataset)]
    assert 0 < average_precision(shifted, dataset)["AP"] < 0.8
    wrong = [one | {"labels": (one["labels"] + 1) % len(CLASSES)} for one in perfect(dataset)]
    assert average_precision(wrong, dataset)["AP50"] < 0.2
    nothing = [{name: value[:0] for name, value in one.items()} for one in perfect(dataset)]
    assert average_precision(nothing, dataset)["AP"] == 0.0
    with pytest.raises(ValueError, match="one for each of the 30 images, but they are 29"):
        average_precision(nothing[1:], dataset)
