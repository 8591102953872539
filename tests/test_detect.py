"""`visionkernels.detect`: what it returns, which images it reads, and what it says when it cannot."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import save_classifier, save_headless_rt_detr, save_rt_detr, save_yolos

import visionkernels as vk
from visionkernels._devices import find_device
from visionkernels._images import draw_boxes, read_image
from visionkernels.detection import SAMPLE_IMAGE, SHIPPED_MODEL, Detector
from visionkernels.errors import UserError
from visionkernels.synthetic import CLASSES, HELD_OUT_SEED, draw_sample, make_dataset
from visionkernels.synthetic.score import average_precision


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return save_rt_detr(tmp_path_factory.mktemp("rt_detr"))


@pytest.fixture(scope="module")
def detector(checkpoint):
    return Detector(checkpoint, device="cpu")


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))


def test_vk_detect_is_the_function():
    assert callable(vk.detect)
    assert vk.detect.__module__ == "visionkernels.detection"


def test_objects_are_sorted_and_inside_the_image(detector, picture):
    found = vk.detect(picture, detector, threshold=0.0)
    assert len(found) >= 5
    for one in found:
        assert set(one) == {"score", "label", "box"}
        assert set(one["box"]) == {"xmin", "ymin", "xmax", "ymax"}
        assert one["label"] in {"cat", "dog", "cow"}
        assert 0 <= one["score"] <= 1
        assert 0 <= one["box"]["xmin"] <= one["box"]["xmax"] <= 80
        assert 0 <= one["box"]["ymin"] <= one["box"]["ymax"] <= 48
    scores = [one["score"] for one in found]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) > 1
    assert json.loads(json.dumps(found)) == found


def test_boxes_are_those_of_the_model(detector, picture):
    """Against the model's own output, by hand: sigmoid scores, centre-size boxes in parts of the image."""
    inputs = detector.processor(images=picture, return_tensors="pt")
    with torch.inference_mode():
        outputs = detector.model(**inputs)
    scores = outputs.logits[0].sigmoid()
    query, label = divmod(int(scores.argmax()), 3)
    cx, cy, w, h = outputs.pred_boxes[0, query].tolist()
    best = vk.detect(picture, detector, threshold=0.0)[0]
    assert best["score"] == pytest.approx(scores.max().item())
    assert best["label"] == ["cat", "dog", "cow"][label]
    expected = [(cx - w / 2) * 80, (cy - h / 2) * 48, (cx + w / 2) * 80, (cy + h / 2) * 48]
    clipped = np.clip(expected, 0, [80, 48, 80, 48])
    assert list(best["box"].values()) == pytest.approx(clipped.tolist(), abs=1e-3)


def test_boxes_that_overhang_are_cut(detector, picture):
    box = torch.tensor([[-3.0, -2.0, 90.0, 50.0]])
    one = detector._objects({"boxes": box, "scores": torch.ones(1), "labels": torch.tensor([1])}, picture)[0]
    assert one == {"score": 1.0, "label": "dog", "box": {"xmin": 0, "ymin": 0, "xmax": 80, "ymax": 48}}


def test_threshold_leaves_out_what_is_below(detector, picture):
    everything = vk.detect(picture, detector, threshold=0.0)
    middle = everything[3]["score"] + 1e-7
    assert vk.detect(picture, detector, threshold=middle) == [o for o in everything if o["score"] > middle]
    assert vk.detect(picture, detector, threshold=1.0) == []


def test_every_form_of_an_image_gives_the_same(detector, picture, tmp_path):
    picture.save(tmp_path / "picture.png")
    array = np.asarray(picture)
    forms = [tmp_path / "picture.png", str(tmp_path / "picture.png"), array, torch.from_numpy(array.copy())]
    expected = vk.detect(picture, detector, threshold=0.0)
    for form in forms:
        assert vk.detect(form, detector, threshold=0.0) == expected


def test_a_path_to_the_checkpoint_gives_the_same_as_a_detector(checkpoint, detector, picture):
    expected = vk.detect(picture, detector, threshold=0.0)
    assert vk.detect(picture, str(checkpoint), threshold=0.0, device="cpu") == expected


def test_the_model_is_patched_and_agrees_with_stock(detector, picture):
    assert len(detector.report) == 2
    patched = vk.detect(picture, detector, threshold=0.0)
    vk.unpatch(detector.model)
    try:
        stock = vk.detect(picture, detector, threshold=0.0)
    finally:
        vk.patch(detector.model)
    for a, b in zip(patched, stock, strict=True):
        assert a["label"] == b["label"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert list(a["box"].values()) == pytest.approx(list(b["box"].values()), abs=1e-2)


def test_a_detector_without_deformable_attention_runs_as_it_is(tmp_path, picture):
    detector = Detector(save_yolos(tmp_path), device="cpu")
    assert detector.report is None
    assert len(vk.detect(picture, detector, threshold=0.0)) > 0


def test_details_name_device_and_times(detector, picture):
    found = detector(picture, threshold=0.0, time_twice=True)
    assert found.device.startswith("the CPU (")
    assert found.first_seconds > 0
    assert found.seconds > 0
    assert found.image.size == (80, 48)
    assert detector(picture).seconds is None


# Reading images


def test_exif_orientation_is_applied(tmp_path):
    wide = Image.new("RGB", (20, 10), "red")
    wide.putpixel((0, 0), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees to the right
    wide.save(tmp_path / "turned.png", exif=exif)
    upright = read_image(tmp_path / "turned.png")
    assert upright.size == (10, 20)
    assert upright.getpixel((9, 0)) == (0, 0, 255)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "PA"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    ramp = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode in ("I;16", "I"):
        image = Image.fromarray(ramp.astype(np.uint16) * 257)
        image = image.convert("I") if mode == "I" else image
        assert image.mode == mode
    else:
        image = Image.fromarray(ramp).convert("RGB").convert("L" if mode in ("LA", "1") else "RGB").convert(mode)
    result = read_image(image)
    assert result.mode == "RGB"
    if mode not in ("1", "P", "PA"):  # these have fewer levels of grey
        assert np.abs(np.asarray(result)[..., 0].astype(int) - ramp).max() <= 2


def test_a_16_bit_file_keeps_its_greys(tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.abs(np.asarray(read_image(tmp_path / "deep.png"))[..., 1].astype(int) - ramp // 257).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_become_white(mode):
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    if mode == "P":
        clear = Image.new("P", (4, 4), 0)
        clear.putpalette([255, 0, 0])
        clear.info["transparency"] = 0
    image = clear.convert(mode) if clear.mode != mode else clear
    assert np.asarray(read_image(image)).min() == 255


def test_damaged_and_foreign_files_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:80])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, message in {
        "none.png": "there is no file",
        "notes.txt": "no image that Pillow can read",
        "empty.png": "no image that Pillow can read",
        "half.png": "cannot be read",
        ".": "is a directory",
    }.items():
        with pytest.raises(UserError, match=message):
            read_image(tmp_path / name)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 4), np.uint8), r"\[height, width, 3\] of uint8, but it is \[4, 4\] of uint8"),
        (np.zeros((3, 4, 4), np.uint8), r"but it is \[3, 4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), "of float32"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
        (torch.zeros(4, 4, 3), "of float32"),
        (b"bytes", "but it is a bytes"),
        (None, "but it is a NoneType"),
        (Image.new("F", (2, 2)), "floating-point"),
        (Image.new("RGB", (0, 3)), "0 x 3"),
    ],
    ids=["flat", "channels-first", "float-array", "empty", "float-tensor", "bytes", "None", "F", "no-pixels"],
)
def test_what_is_no_image_is_refused(image, message, detector):
    with pytest.raises(UserError, match=message):
        vk.detect(image, detector)


# Other arguments


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_thresholds_outside_0_to_1_are_refused(threshold, detector, picture):
    with pytest.raises(UserError, match="expected a number from 0 to 1, but it is"):
        vk.detect(picture, detector, threshold=threshold)


@pytest.mark.parametrize("device", ["tpu", "mps", "meta", "cuda:99", "cpu,cuda", ""])
def test_devices_that_are_not_there_are_refused(device, picture):
    with pytest.raises(UserError, match="device: "):
        vk.detect(picture, device=device)


def test_the_default_device_is_a_gpu_if_there_is_one():
    assert find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_device_other_than_the_detector_s_is_refused(detector, picture, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with pytest.raises(UserError, match="cuda was asked for, but the given Detector is on cpu"):
        vk.detect(picture, detector, device="cuda")


def damaged(checkpoint, folder, name, content):
    shutil.copytree(checkpoint, folder)
    if content is None:
        (folder / name).unlink()
    elif isinstance(content, tuple):
        whole = (folder / name).read_bytes()
        assert content[0] in whole
        (folder / name).write_bytes(whole.replace(*content))
    else:
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "is no checkpoint: there is no config.json in it"),
        ("config.json", b"{", "is no checkpoint"),
        ("config.json", b'{"model_type": "unheard-of"}', "is no checkpoint"),
        ("config.json", (b'"num_queries": 12', b'"num_queries": "x"'), "is no checkpoint"),
        ("config.json", (b'"d_model": 32', b'"d_model": 16'), "do not fit its config.json, such as "),
        ("model.safetensors", None, "cannot be loaded"),
        ("model.safetensors", b"rubbish", "cannot be loaded"),
        ("preprocessor_config.json", None, "cannot be loaded"),
    ],
    ids=[
        "no-config",
        "broken-config",
        "unknown-model",
        "wrong-type",
        "other-sizes",
        "no-weights",
        "broken-weights",
        "no-processor",
    ],
)
def test_broken_checkpoints_are_refused(checkpoint, tmp_path, picture, name, content, message):
    folder = damaged(checkpoint, tmp_path / "model", name, content)
    with pytest.raises(UserError, match=message) as caught:
        vk.detect(picture, folder, device="cpu")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (save_classifier, "holds a vit model, which is no object detector"),
        (save_headless_rt_detr, "is no complete RTDetrForObjectDetection: [0-9]+ weights are missing"),
    ],
    ids=["classifier", "no-heads"],
)
def test_checkpoints_that_are_no_detector_are_refused(save, message, tmp_path, picture):
    with pytest.raises(UserError, match=message):
        vk.detect(picture, save(tmp_path), device="cpu")


@pytest.mark.parametrize("model", ["./no/such/folder", "/no/such/folder", "a/b/c"])
def test_a_missing_directory_is_refused_without_asking_the_hub(model, picture):
    with pytest.raises(UserError, match=f"there is no directory {model}"):
        vk.detect(picture, model, device="cpu")


def test_a_file_is_no_checkpoint(checkpoint, picture):
    with pytest.raises(UserError, match="is a file; name the checkpoint's directory"):
        vk.detect(picture, checkpoint / "config.json", device="cpu")


@pytest.mark.parametrize("package", ["transformers", "scipy"])
def test_a_missing_extra_is_named(package, picture, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))
    with pytest.raises(UserError, match=rf"needs {package}, not installed here: pip install 'visionkernels\[hf\]'"):
        vk.detect(picture, device="cpu")


# Drawing


def test_boxes_are_drawn_where_they_are():
    image = Image.new("RGB", (200, 200), "black")
    box = {"xmin": 50.0, "ymin": 60.0, "xmax": 150.0, "ymax": 160.0}
    drawn = np.asarray(draw_boxes(image, [{"score": 0.9, "label": "star", "box": box}]))
    assert (drawn[60:161, 50] != 0).any(axis=1).all()
    assert (drawn[160, 50:151] != 0).any(axis=1).all()
    assert (drawn[80:140, 70:130] == 0).all()
    assert (drawn[40:59, 50:60] != 0).any()  # the label, above
    assert np.asarray(image).max() == 0


def test_labels_stay_in_the_picture():
    image = Image.new("RGB", (120, 100), "black")
    box = {"xmin": 100.0, "ymin": 0.0, "xmax": 120.0, "ymax": 20.0}
    drawn = np.asarray(draw_boxes(image, [{"score": 0.9, "label": "rectangle", "box": box}]))
    assert (drawn[2:8, 40:90] != 0).any(axis=(1, 2)).all()  # moved to the left, and below the upper border


# The detector that ships


@pytest.fixture(scope="module")
def shipped():
    assert (SHIPPED_MODEL / "model.safetensors").is_file(), (
        f"no detector in {SHIPPED_MODEL.name}/: train the one that ships with examples/train_detector.py"
    )
    return Detector(device="cpu"), json.loads((SHIPPED_MODEL / "metrics.json").read_text())


def score_of(detector, dataset):
    found = []
    for image in dataset.images:
        objects = detector(image, threshold=0.001).objects
        boxes = np.array([list(one["box"].values()) for one in objects]).reshape(-1, 4)
        labels = np.array([CLASSES.index(one["label"]) for one in objects], np.int64)
        found.append({"boxes": boxes, "labels": labels, "scores": np.array([one["score"] for one in objects])})
    return average_precision(found, dataset)


def test_the_shipped_detector_keeps_within_its_limits(shipped):
    _, metrics = shipped
    assert (SHIPPED_MODEL / "model.safetensors").stat().st_size <= 8_000_000
    assert metrics["held_out"]["seed"] == HELD_OUT_SEED != metrics["training"]["seed"]
    assert metrics["held_out"]["images"] >= 500
    assert metrics["held_out"]["AP"] >= 0.85
    assert metrics["held_out"]["AP50"] >= 0.95
    assert f"{metrics['held_out']['AP']:.3f}" in (SHIPPED_MODEL / "README.md").read_text()


@pytest.mark.slow
def test_the_shipped_detector_still_scores_what_it_did(shipped):
    """The same images as when it was trained, on this CPU, patched and stock: within 0.01 of that score."""
    detector, metrics = shipped
    expected = metrics["held_out_first"]
    dataset = make_dataset(expected["images"], metrics["held_out"]["seed"], size=metrics["training"]["image_size"])
    patched = score_of(detector, dataset)
    vk.unpatch(detector.model)
    try:
        stock = score_of(detector, dataset)
    finally:
        vk.patch(detector.model)
    for name in ("AP", "AP50"):
        assert patched[name] == pytest.approx(expected[name], abs=0.01)
        assert stock[name] == pytest.approx(patched[name], abs=0.002)


def test_the_shipped_detector_finds_every_object_of_the_sample(shipped):
    truth = draw_sample()
    found = vk.detect(SAMPLE_IMAGE, shipped[0])
    assert sorted(one["label"] for one in found) == sorted(CLASSES)
    for label, box in zip(truth.labels, truth.boxes, strict=True):
        one = next(one for one in found if one["label"] == CLASSES[label])
        x0, y0, x1, y1 = one["box"].values()
        both = max(0, min(x1, box[2]) - max(x0, box[0])) * max(0, min(y1, box[3]) - max(y0, box[1]))
        union = (x1 - x0) * (y1 - y0) + (box[2] - box[0]) * (box[3] - box[1]) - both
        assert both / union > 0.8, one
