"""What `would_patch` says of a checkpoint, and what it refuses in one sentence."""

import importlib.util
import json

import pytest
import torch

import visionkernels as vk

pytest.importorskip("transformers")

import tiny_detectors as checkpoints
from integrations import tiny_detectors
from integrations.comparison import parameters_of

from visionkernels.errors import UserError
from visionkernels.integrations import preview
from visionkernels.integrations.preview import would_patch


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Neither the network nor weights are needed."""

    def fail(*args, **kwargs):
        raise AssertionError("weights were read")

    import socket

    monkeypatch.setattr(socket.socket, "connect", fail)
    monkeypatch.setattr(torch, "load", fail)


@pytest.mark.parametrize("name", parameters_of([n for n in tiny_detectors.NAMES if n == tiny_detectors.model_type(n)]))
def test_the_report_is_that_of_patch(name, tmp_path):
    model, _ = tiny_detectors.build(name)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert would_patch(tmp_path) == vk.patch(model)


def test_a_checkpoint_is_left_as_it_is(tmp_path):
    folder = checkpoints.save_rt_detr(tmp_path / "model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = would_patch(str(folder))
    assert str(report).startswith("RTDetrForObjectDetection: 2 modules replaced")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_no_weight_is_made(tmp_path, monkeypatch):
    devices = set()

    def record(model):
        devices.update(tensor.device.type for tensor in model.parameters())
        return vk.patch(model)

    monkeypatch.setattr(preview, "patch", record)
    would_patch(checkpoints.save_rt_detr(tmp_path))
    assert devices == {"meta"}


def change_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def refuse(folder, match):
    with pytest.raises(UserError, match=match) as caught:
        would_patch(folder)
    assert "\n" not in str(caught.value)


def test_no_architecture_is_the_model_without_a_head(tmp_path):
    folder = checkpoints.save_rt_detr(tmp_path)
    change_config(folder, architectures=None)
    assert would_patch(folder).model == "RTDetrModel"


def test_what_is_refused(tmp_path):
    refuse(tmp_path / "missing", "there is no directory")
    refuse(tmp_path, "there is no config.json in it")
    folder = checkpoints.save_rt_detr(tmp_path / "model")
    refuse(folder / "config.json", "is a file; name the checkpoint's directory")
    change_config(folder, architectures=["NoSuchDetector"])
    refuse(folder, r"is a NoSuchDetector, a class that transformers \S+ does not have")
    change_config(folder, architectures=["RTDetrConfig"])
    refuse(folder, "is a RTDetrConfig, a class that")
    change_config(folder, architectures=["RTDetrForObjectDetection"], d_model="wide")
    refuse(folder, "is no checkpoint|cannot build")
    change_config(folder, model_type="no_such_model")
    refuse(folder, "no_such_model")
    refuse(checkpoints.save_yolos(tmp_path / "yolos"), "nothing to patch in YolosForObjectDetection")


def test_a_vision_transformer(tmp_path):
    report = would_patch(checkpoints.save_classifier(tmp_path))
    assert set(report.kinds) == {"attention", "norm", "MLP"}


def test_an_operator_that_is_not_known_is_one_line(tmp_path, monkeypatch):
    def unknown(model):
        raise RuntimeError("model: upstream calls it in another way")

    monkeypatch.setattr(preview, "patch", unknown)
    with pytest.raises(UserError, match="upstream calls it in another way"):
        would_patch(checkpoints.save_rt_detr(tmp_path))


def test_without_transformers_it_says_what_to_install(tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "transformers" else find(name, *rest)
    )
    with pytest.raises(UserError, match=r"^integrations --model needs transformers, .* 'visionkernels\[hf\]'"):
        would_patch(tmp_path)
