"""The recipes of docs/deploy.md, run as printed; and what they wrote finds the same objects as PyTorch."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import visionkernels as vk
from visionkernels.detection import SAMPLE_IMAGE, Detector
from visionkernels.errors import UserError
from visionkernels.export import aoti, onnx

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"^```(sh|python)\n(.*?)^```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL | re.MULTILINE)
ONNX, ONNX_RUN, TENSORRT, TENSORRT_RUN, AOTI, AOTI_RUN, CPP, VIT, VIT_RUN = (text for _, text in BLOCKS)

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the recipes are run: a picture, the examples, and this interpreter first on the path."""
    folder = tmp_path_factory.mktemp("deploy")
    shutil.copy(SAMPLE_IMAGE, folder / "photo.png")
    (folder / "examples").symlink_to(ROOT / "examples")
    tools = folder / "bin"
    tools.mkdir()
    for name, arguments in (("python", ""), ("visionkernels", "-m visionkernels ")):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {arguments}"$@"\n')
        (tools / name).chmod(0o755)
    return folder


def shell(folder: Path, commands: str) -> str:
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "CI": "1"}  # Inductor asserts more where CI is set
    done = subprocess.run(["sh", "-ec", commands], cwd=folder, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def onnx_file(folder) -> Path:
    assert "sample picture" in shell(folder, ONNX)
    return folder / "detector.onnx"


@pytest.fixture(scope="module")
def package(folder) -> Path:
    assert "sample picture" in shell(folder, AOTI)
    return folder / "detector.pt2"


@pytest.mark.slow
def test_the_recipe_for_onnxruntime_prints_the_objects(folder, onnx_file):
    printed = shell(folder, f"python - <<'END'\n{ONNX_RUN}END\n").splitlines()
    found = Detector(device="cpu")(SAMPLE_IMAGE).objects
    assert len(printed) == len(found) > 3
    rows = [[float(number) for number in line.split()] for line in printed]
    for one in found:
        box = np.array(list(one["box"].values()))
        # Clipped to the picture there, and the processor there resizes with other rounding.
        nearest = min(rows, key=lambda row: abs(np.array(row[2:]).clip(0) - box).max())
        assert abs(np.array(nearest[2:]).clip(0) - box).max() < 3
        assert abs(nearest[1] - one["score"]) < 0.05


@pytest.mark.slow
def test_the_recipe_for_tensorrt_exports_and_says_that_tensorrt_is_missing(folder, monkeypatch):
    assert "sample picture" in shell(folder, TENSORRT)
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(UserError, match="TensorRT is not installed here: `pip install tensorrt`"):
        exec(compile(TENSORRT_RUN, "docs/deploy.md", "exec"), {})


@pytest.mark.slow
@needs_compiler
def test_the_recipe_for_aotinductor_runs_in_a_fresh_process(folder, package):
    with zipfile.ZipFile(package) as files:
        calls = [files.read(name) for name in files.namelist() if name.endswith(".json")]  # to PyTorch's dispatcher
        assert any(b"grid_sampler_2d" in text for text in calls), "Inductor's form of it is slow"
    code = AOTI_RUN + "import sys\nassert 'visionkernels' not in sys.modules\nprint(*logits.shape, *boxes.shape)\n"
    assert shell(folder, f"python - <<'END'\n{code}END\n") == "3 60 8 3 60 4\n"


@pytest.mark.slow
@needs_compiler
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_the_recipe_for_cpp_gives_what_pytorch_gives(folder, package):
    assert "image.f32.out1 [1, 60, 4]" in shell(folder, CPP)
    image = torch.from_numpy(np.fromfile(folder / "image.f32", np.float32)).view(1, 3, 256, 256)
    with torch.no_grad():
        expected = Detector(device="cpu").model(pixel_values=image)
    for index, name in enumerate(("logits", "pred_boxes")):
        got = torch.from_numpy(np.fromfile(folder / f"image.f32.out{index}", np.float32)).view(expected[name].shape)
        assert (got - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max()


class Head(torch.nn.Module):
    """Patches, and one deformable attention over them; no convolution, which on a GPU may round to TF32."""

    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Linear(3 * 16 * 16, 64)
        self.attention = vk.MSDeformAttn(64, 1, 8, 4)
        self.references = torch.nn.Parameter(torch.rand(1, 5, 1, 2))

    def forward(self, pixel_values):
        patches = torch.nn.functional.pixel_unshuffle(pixel_values, 16)
        pixels, sizes = self.patches(patches.flatten(2).transpose(1, 2)), [tuple(patches.shape[2:])]
        return self.attention(pixels[:, :5], self.references.expand(len(pixels), -1, -1, -1), pixels, sizes)


@pytest.mark.gpu
@pytest.mark.skipif(shutil.which("cmake") is None, reason="needs CMake")
def test_the_cpp_program_on_a_gpu(folder):
    model = Head().eval().cuda()
    torch.nn.init.normal_(model.attention.sampling_offsets.weight, std=0.3)
    image = torch.rand(2, 3, 96, 64, device="cuda")
    report = aoti.export(model, {"pixel_values": image}, folder / "head.pt2")
    assert "the Triton kernel in 1 of 1 layers" in report.detail
    image.cpu().numpy().tofile(folder / "head.f32")
    build = "\n".join(line for line in CPP.splitlines() if line.startswith("cmake"))
    assert "[2, 5, 64]" in shell(folder, f"{build}\nbuild/run_pt2 head.pt2 head.f32 2 3 96 64 cuda")
    found = torch.from_numpy(np.fromfile(folder / "head.f32.out0", np.float32)).view(2, 5, 64)
    with torch.no_grad():
        torch.testing.assert_close(found, model(image).cpu(), rtol=1e-5, atol=1e-5)


def test_the_recipe_for_a_vit_runs(folder):
    assert "sample picture" in shell(folder, VIT)
    assert shell(folder, f"python - <<'END'\n{VIT_RUN}END\n") == "(5, 43, 64) (5, 64)\n"


def iou(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Of the boxes `[K, 4]`, pair by pair."""
    size = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    common = size.prod(1)
    return common / ((a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - common)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("runtime", ["onnxruntime", "AOTInductor"])
def test_the_boxes_are_those_of_pytorch(runtime, onnx_file, package):
    detector = Detector(device="cpu")
    picture = Image.open(SAMPLE_IMAGE).convert("RGB")
    run = onnx.load(onnx_file) if runtime == "onnxruntime" else aoti.load(package)
    for turned in (picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
        pixels = detector.processor(images=turned, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            outputs = detector.model(pixel_values=pixels)
        size = [(picture.height, picture.width)]
        stock = detector.processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=size)[0]
        outputs.logits, outputs.pred_boxes = run({"pixel_values": pixels})
        found = detector.processor.post_process_object_detection(outputs, threshold=0.3, target_sizes=size)[0]
        assert len(stock["labels"]) > 3
        assert torch.equal(found["labels"], stock["labels"])
        assert iou(found["boxes"], stock["boxes"]).min() >= 0.999
        assert (found["scores"] - stock["scores"]).abs().max() < 1e-4
