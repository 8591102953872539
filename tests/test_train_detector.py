"""examples/train_detector.py: its loss is transformers', and a resumed run goes on as if it never stopped."""

import inspect
import sys
from pathlib import Path

import pytest
import torch
from tiny_detectors import rt_detr_config
from transformers import AutoModelForObjectDetection

from visionkernels.detection import Detector
from visionkernels.synthetic import HELD_OUT_SEED, make_dataset

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--device", "cpu", "--image-size", "64", "--images", "12", "--held-out", "4", "--batch-size", "4"]
TINY += ["--steps", "3", "--warmup", "2", "--workers", "1", "--log-every", "1", "--dtype", "bfloat16"]


@pytest.fixture
def train(monkeypatch):
    """The script's `main`, given its arguments; with a model small enough for a test."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import detector_run
    import train_detector
    from transformers import RTDetrForObjectDetection

    from visionkernels.synthetic import CLASSES

    def small_model():
        config = rt_detr_config()
        config.num_denoising = 10
        config.freeze_backbone_batch_norms = False
        config.id2label, config.label2id = dict(enumerate(CLASSES)), {c: i for i, c in enumerate(CLASSES)}
        return RTDetrForObjectDetection(config)

    def run(*argv):
        monkeypatch.setattr(sys, "argv", ["train_detector.py", *map(str, argv)])
        train_detector.main()

    monkeypatch.setattr(detector_run, "build_model", small_model)
    return run


def test_the_loss_is_that_of_transformers(monkeypatch):
    """Against the images-and-layers loop, with denoising queries and an unequal number of objects."""
    from transformers import RTDetrForObjectDetection
    from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss

    monkeypatch.syspath_prepend(EXAMPLES)
    from detector_loss import detection_loss

    def theirs(logits, labels, device, pred_boxes, *args, denoising_meta_values, **kwargs):
        if "split(logits" not in inspect.getsource(RTDetrForObjectDetectionLoss):
            # 5.17 does not leave out the last layer's denoising queries.
            denoising = denoising_meta_values["dn_num_split"][0]
            logits, pred_boxes = logits[:, denoising:], pred_boxes[:, denoising:]
        kwargs["denoising_meta_values"] = denoising_meta_values
        return RTDetrForObjectDetectionLoss(logits, labels, device, pred_boxes, *args, **kwargs)

    config = rt_detr_config()
    config.num_denoising = 20
    model = RTDetrForObjectDetection(config).train()
    labels = [{"class_labels": torch.arange(n) % 3, "boxes": torch.rand(n, 4) * 0.4 + 0.2} for n in (2, 5, 1)]
    images = torch.rand(3, 3, 64, 64)
    results = []
    for loss in (theirs, detection_loss):
        model.loss_function = loss
        model.zero_grad()
        torch.manual_seed(1)
        outputs = model(images, labels=labels)
        outputs.loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        results.append((outputs.loss.item(), gradients))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5)
    assert (results[1][1] - results[0][1]).norm() < 1e-4 * results[0][1].norm()


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(train, tmp_path):
    train("--output", tmp_path / "whole", *TINY)
    train("--output", tmp_path / "parts", *TINY, "--time-budget", "0.0001")  # one step
    stopped = torch.load(tmp_path / "parts" / "checkpoint.pt")
    assert stopped["step"] == 1
    assert not (tmp_path / "parts" / "model.safetensors").exists()
    train("--output", tmp_path / "parts", *TINY, "--resume")
    whole, parts = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 3
    for part in ("model", "average"):
        for name, value in whole[part].items():
            assert torch.equal(value, parts[part][name]), name
            if value.ndim == 4 and part == "model":
                assert not torch.equal(value, stopped[part][name]), name
    for index, state in whole["optimizer"]["state"].items():
        assert torch.equal(state["exp_avg_sq"], parts["optimizer"]["state"][index]["exp_avg_sq"])


def test_other_settings_do_not_resume(train, tmp_path):
    train("--output", tmp_path, *TINY, "--time-budget", "0.0001")
    with pytest.raises(SystemExit, match="other settings"):
        train("--output", tmp_path, *TINY, "--resume", "--lr", "0.1")


def test_the_result_loads_and_the_card_tells(train, tmp_path):
    train("--output", tmp_path, *TINY)
    model = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    average = torch.load(tmp_path / "checkpoint.pt")["average"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, average[name].half().to(value)), name
    image = make_dataset(1, HELD_OUT_SEED, size=64).images[0]
    assert len(Detector(tmp_path, device="cpu")(image, threshold=0.0).objects) > 0
    card = (tmp_path / "README.md").read_text()
    assert "--steps 3 --images 12 --held-out 4 --image-size 64" in card
    assert "3 steps of 4 images" in card
    assert str(tmp_path) not in card


def test_augmented_boxes_stay_on_their_objects(monkeypatch):
    """A bright rectangle on black is where its box says, however the image was turned and recoloured."""
    monkeypatch.syspath_prepend(EXAMPLES)
    from detector_data import augment

    images = torch.zeros(64, 3, 32, 32)
    images[:, :, 4:10, 12:28] = 1.0
    boxes = torch.tensor([20 / 32, 7 / 32, 16 / 32, 6 / 32]).expand(64, 1, 4)
    moved, moved_boxes = augment(images, boxes)
    places = set()
    for image, (cx, cy, w, h) in zip(moved, (moved_boxes[:, 0] * 32).tolist(), strict=True):
        bright = (image.mean(0) > image.mean(0).min() + 0.2).nonzero()
        low, high = bright.min(0).values.tolist(), (bright.max(0).values + 1).tolist()
        box = [cy - h / 2, cx - w / 2, cy + h / 2, cx + w / 2]
        assert [*low, *high] == pytest.approx(box)
        places.add((*low, *high))
    assert len(places) == 8
