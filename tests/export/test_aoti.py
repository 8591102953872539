"""AOTInductor packages, in this process and in a fresh one; the default kind is in test_deploy.py."""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import torch

import visionkernels as vk
from visionkernels.errors import UserError
from visionkernels.export import _samples, aoti, check

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

LOAD = """
import sys, torch
if sys.argv[2]: import visionkernels
inputs = torch.load(sys.argv[1] + "/inputs.pt")
torch.save(torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")(inputs=inputs), sys.argv[1] + "/output.pt")
"""


@needs_compiler
def test_a_package_with_the_operators_needs_one_import(tmp_path):
    subject = _samples.ms_deform_attn((3, 6, 3))
    labels = ("batch", "queries", "height_0", "width_1")
    report = aoti.export(
        subject.module, subject.inputs, tmp_path / "model.pt2", dynamic=subject.axes(labels), keep_operators=True
    )
    assert (report.layers, report.format) == (1, "aoti")
    assert "import visionkernels" in report.detail
    found = check.compare(subject, aoti.load(tmp_path / "model.pt2"), labels)
    assert len(found) == 2
    assert all(one.ok for one in found), found
    inputs = subject.variants(labels).popitem()[1]
    torch.save(inputs, tmp_path / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), ""], capture_output=True, text=True)
    assert done.returncode != 0
    assert "visionkernels" in done.stderr
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path), "import"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "output.pt"), subject.module(**inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [False, True], ids=["lowered", "operators kept"])
@pytest.mark.parametrize("make", [_samples.ms_deform_attn, _samples.msdeformattn], ids=["op", "module"])
def test_on_the_gpu(tmp_path, make, keep):
    subject = make()
    inputs = {name: tensor.cuda() for name, tensor in subject.inputs.items()}
    subject = dataclasses.replace(subject, module=subject.module.cuda(), inputs=inputs)
    labels = ("batch", "queries")
    path = tmp_path / "model.pt2"
    aoti.export(subject.module, subject.inputs, path, dynamic=subject.axes(labels), keep_operators=keep)
    found = check.compare(subject, aoti.load(path), labels)
    assert all(one.ok for one in found), found


def test_a_package_must_end_in_pt2(tmp_path):
    subject = _samples.ms_deform_attn()
    with pytest.raises(UserError, match=r"must end in .pt2, and it is .*model.so"):
        aoti.export(subject.module, subject.inputs, tmp_path / "model.so")


def test_a_file_that_is_no_package(tmp_path):
    (tmp_path / "model.pt2").write_bytes(b"no package")
    with pytest.raises(UserError, match="cannot be loaded"):
        aoti.load(tmp_path / "model.pt2")


def test_the_formats_are_modules_of_the_public_name():
    assert vk.export.aoti is aoti
    assert vk.export.__all__ == ["aoti", "onnx", "tensorrt"]
