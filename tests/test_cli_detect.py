"""`visionkernels detect`: tables, JSON, pictures, and one line and exit code 2 for every mistake."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_detectors import save_classifier, save_rt_detr, save_yolos

from visionkernels import detection
from visionkernels.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    return str(save_rt_detr(tmp_path_factory.mktemp("rt_detr")))


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)).save(path)
    return str(path)


def fails_with(capsys, *argv: str) -> str:
    """Run the command; return the one line that it leaves on stderr."""
    assert main(["detect", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("visionkernels: error: ")
    assert err.count("\n") == 1
    return err


def test_the_table_shows_every_object(capsys, picture, checkpoint):
    assert main(["detect", picture, "--model", checkpoint, "--device", "cpu", "--threshold", "0"]) == 0
    out, err = capsys.readouterr()
    found = vk_detect(picture, checkpoint)
    rows = [line for line in out.splitlines() if line.count("│") >= 6]
    assert len(rows) == len(found)
    assert f"{found[0]['score']:.3f}" in rows[0]
    assert f"{found[0]['box']['xmax']:.1f}" in rows[0]
    assert "ms on the CPU (" in out
    assert "2 modules replaced" in out
    assert err == ""


def vk_detect(picture, checkpoint):
    return detection.detect(picture, checkpoint, threshold=0.0, device="cpu")


def test_json_is_all_that_stdout_holds(picture, checkpoint, tmp_path):
    """In a process of its own, so that nothing is hidden by capturing."""
    output = tmp_path / "found.png"
    command = [sys.executable, "-m", "visionkernels.cli", "detect", picture, "--model", checkpoint, "--json"]
    command += ["--threshold", "0", "--device", "cpu", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert done.stderr == ""
    assert report["objects"] == vk_detect(picture, checkpoint)
    assert (report["width"], report["height"]) == (80, 48)
    assert report["replaced_modules"] == 2
    assert report["model_class"] == "RTDetrForObjectDetection"
    assert report["output"] == str(output)
    assert report["seconds"] > 0
    assert set(report) == {
        "image", "width", "height", "model", "model_class", "replaced_modules", "device", "threshold",
        "first_seconds", "seconds", "output", "objects",
    }  # fmt: skip


def test_the_picture_has_boxes_in_it(capsys, picture, checkpoint, tmp_path):
    output = tmp_path / "found.jpg"
    argv = [
        "detect",
        picture,
        "--model",
        checkpoint,
        "--device",
        "cpu",
        "--threshold",
        "0",
        "--output",
        str(output),
    ]
    assert main(argv) == 0
    assert f"drawn into {output}" in capsys.readouterr().out
    before, after = np.asarray(Image.open(picture), int), np.asarray(Image.open(output), int)
    assert before.shape == after.shape
    assert np.abs(before - after).mean() > 10


def test_a_detector_without_deformable_attention_says_so(capsys, picture, tmp_path):
    model = str(save_yolos(tmp_path / "yolos"))
    assert main(["detect", picture, "--model", model, "--device", "cpu", "--threshold", "0"]) == 0
    assert "nothing was replaced" in capsys.readouterr().out


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["detect", "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "visionkernels detect --sample --output found.png" in out
    for option in ("--model", "--output", "--threshold", "--device", "--json", "--sample"):
        assert option in out


def test_no_image(capsys):
    assert "no image was given: name one image file, or try --sample" in fails_with(capsys)


def test_an_image_and_the_sample(capsys, picture):
    assert "both an image and --sample were given" in fails_with(capsys, picture, "--sample")


def test_mistakes_in_the_image(capsys, tmp_path, checkpoint):
    (tmp_path / "notes.txt").write_text("no image")
    assert "there is no file" in fails_with(capsys, str(tmp_path / "none.png"), "--model", checkpoint)
    assert "is no image" in fails_with(capsys, str(tmp_path / "notes.txt"), "--model", checkpoint)
    assert "is a directory" in fails_with(capsys, str(tmp_path), "--model", checkpoint)


def test_mistakes_in_the_model(capsys, picture, tmp_path):
    assert "is no checkpoint" in fails_with(capsys, picture, "--model", str(tmp_path), "--device", "cpu")
    missing = str(tmp_path / "none")
    assert f"there is no directory {missing}" in fails_with(capsys, picture, "--model", missing, "--device", "cpu")
    model = str(save_classifier(tmp_path / "vit"))
    assert "no object detector" in fails_with(capsys, picture, "--model", model, "--device", "cpu")


@pytest.mark.parametrize("threshold", ["-0.5", "1.5", "nan"])
def test_thresholds_outside_0_to_1(capsys, picture, threshold):
    assert "from 0 to 1, but it is" in fails_with(capsys, picture, f"--threshold={threshold}")


def test_mistakes_in_other_options(capsys, picture):
    assert "invalid float value: 'high'" in fails_with(capsys, picture, "--threshold", "high")
    assert "expected cpu, cuda or cuda:<index>, but it is 'tpu'" in fails_with(capsys, picture, "--device", "tpu")
    assert "unrecognized arguments: --treshold" in fails_with(capsys, picture, "--treshold", "1")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("none/found.png", "there is no directory"),
        ("found.xyz", "does not end in an image type that can be written"),
        ("found", "does not end in an image type that can be written"),
        (".", "is a directory"),
    ],
)
def test_mistakes_in_the_output(capsys, picture, tmp_path, output, message):
    """Found before a model is loaded: there is none here."""
    assert message in fails_with(capsys, picture, "--output", str(tmp_path / output), "--model", "/none")


def test_an_output_that_cannot_be_written(capsys, picture, checkpoint, tmp_path):
    locked = tmp_path / "found.png"
    locked.symlink_to("/proc/version")  # not to be written by anybody, root included
    argv = [picture, "--model", checkpoint, "--device", "cpu", "--output", str(locked)]
    assert "cannot be written" in fails_with(capsys, *argv)


@pytest.mark.parametrize(("package", "name"), [("transformers", "transformers"), ("PIL", "pillow"), ("rich", "rich")])
def test_a_missing_extra(capsys, picture, monkeypatch, package, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked: None if asked == package else found(asked))
    line = fails_with(capsys, picture, "--device", "cpu")
    assert f"needs {name}, not installed here: pip install 'visionkernels[hf]'" in line


def test_a_job_must_be_named(capsys):
    assert main([]) == 2
    assert "JOB" in capsys.readouterr().err


def test_no_traceback_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "visionkernels.cli", "detect", str(tmp_path / "none.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_the_sample(capsys, tmp_path):
    """The first command that a reader runs."""
    assert (detection.SHIPPED_MODEL / "model.safetensors").is_file(), "the shipped detector is missing"
    assert main(["detect", "--sample", "--device", "cpu", "--output", str(tmp_path / "found.png")]) == 0
    out = capsys.readouterr().out
    assert "sample.png: 8 objects" in out
