"""ViTs leave PyTorch: every family in ONNX at many sizes and opsets, AOTInductor, and what TensorRT gets."""

import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

import onnx as onnx_format
from models import tiny_vits
from onnx.reference import ReferenceEvaluator

from visionkernels.export import _older_opsets, _samples, _standard, _trace, _vit, aoti, check, onnx, tensorrt
from visionkernels.export._open_sizes import Tracing
from visionkernels.models import ViT, ViTConfig

OPEN = ("batch", "height", "width")
OPSETS = {
    "vit-classifier": 18,
    "deit-distilled": 20,
    "dinov2-swiglu": 17,
    "registers-classifier": 16,
    "dinov3": 16,
    "clip-projection": 23,
    "siglip": 18,
    "beit": 18,
}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

LOAD = """
import sys, torch
inputs = torch.load(sys.argv[1] + "/inputs.pt")
torch.save(torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")(inputs=inputs), sys.argv[1] + "/output.pt")
assert "visionkernels" not in sys.modules
"""


def subject_of(name, folder, layers=1, **options):
    tiny_vits.save(tiny_vits.CASES[name], folder, num_hidden_layers=layers)
    return _vit.of_checkpoint(folder, **options)


@pytest.mark.parametrize(("name", "opset"), OPSETS.items(), ids=OPSETS)
def test_onnx_with_every_size_open(tmp_path, name, opset):
    subject = subject_of(name, tmp_path, 2 if name == "vit-classifier" else 1, open_image=True)
    path = tmp_path / "model.onnx"
    report = onnx.export(subject.module, subject.inputs, path, opset=opset, dynamic=subject.axes(OPEN))
    model = onnx_format.load(path)
    onnx_format.checker.check_model(model, full_check=True)
    assert [one.version for one in model.opset_import if one.domain == ""] == [opset]
    assert not any(node.domain for node in model.graph.node)
    assert report.inputs == {"pixel_values": ("batch", 3, "height", "width")}
    output = subject.module(subject.inputs["pixel_values"])
    fields = ("last_hidden_state", "pooler_output", "logits", "image_embeds")
    assert report.outputs == subject.outputs == tuple(one for one in fields if getattr(output, one) is not None)
    assert report.layers > 4
    run = onnx.load(path)
    found = check.compare(subject, run, OPEN)
    assert len({one.inputs for one in found}) == 3
    assert all(one.ok for one in found), found
    for size in (16, 40), (72, 24):  # fewer and more patches than the checkpoint's 4 x 4
        pixels = torch.randn(3, 3, *size)
        expected = _trace.outputs_of(subject.module(pixels)).values()
        assert all(check.relative(*pair) <= 1e-5 for pair in zip(run({"pixel_values": pixels}), expected, strict=True))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_for_tensorrt_it_is_standard_operators(tmp_path, half):
    subject = subject_of("vit", tmp_path, half=half)
    path = tmp_path / "model.onnx"
    report = tensorrt.export(subject.module, subject.inputs, path, dynamic=subject.axes(("batch",)))
    assert "standard operators, no plugin is needed" in report.detail
    model = onnx_format.load(path)
    assert not any(node.domain for node in model.graph.node)
    wanted = onnx_format.TensorProto.FLOAT16 if half else onnx_format.TensorProto.FLOAT
    assert {one.type.tensor_type.elem_type for one in model.graph.output} == {wanted}
    found = check.compare(subject, tensorrt.evaluate(path), ("batch",))
    assert all(one.ok and 1e-6 < one.allowed < 0.01 for one in found), found
    assert all((one.allowed > 1e-4) is half for one in found)


def test_pictures_of_integers(tmp_path):
    subject = _samples.vit()
    subject.module.pixel_mean, subject.module.pixel_std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    onnx.export(subject.module, {"pixel_values": pixels}, tmp_path / "model.onnx")
    (got, _) = onnx.run(tmp_path / "model.onnx", {"pixel_values": pixels})
    assert check.relative(got, subject.module(pixels).last_hidden_state) <= 1e-5


@pytest.mark.parametrize("name", ["vit", "dinov3", "beit"])
def test_an_exported_program_has_one_node_an_operator(tmp_path, name):
    subject = subject_of(name, tmp_path, 2, open_image=True)
    traced = _trace.trace(subject.module, subject.inputs, subject.axes(OPEN))
    kinds = [str(node.target).split(".")[1] for node in traced.program.graph.nodes if "visionk" in str(node.target)]
    assert len(traced.calls) == len(kinds)
    assert (kinds.count("attention"), kinds.count("patch_embedding"), kinds.count("layer_norm")) == (
        2,
        1,
        1 + (name == "beit"),
    )
    assert kinds.count("linear_add_layer_norm") == 4 - (name == "beit")  # BEiT's last norm is its pooler's
    pixels = torch.randn(1, 3, 72, 88)
    got = traced.program.module()(inputs={"pixel_values": pixels})
    assert all(map(torch.equal, got, _trace.outputs_of(subject.module(pixels)).values()))


@needs_compiler
@pytest.mark.slow
def test_a_package_needs_nothing_of_this_one(tmp_path):
    subject = subject_of("dinov3", tmp_path)
    path = tmp_path / "model.pt2"
    report = aoti.export(subject.module, subject.inputs, path, dynamic=subject.axes(("batch",)))
    assert (report.outputs, report.format) == (("last_hidden_state", "pooler_output"), "aoti")
    found = check.compare(subject, aoti.load(path), ("batch",))
    assert len(found) == 6
    assert all(one.ok for one in found), found
    inputs = {"pixel_values": torch.randn(3, 3, 32, 32)}
    torch.save(inputs, tmp_path / "inputs.pt")
    done = subprocess.run([sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = subject.module(**inputs).last_hidden_state
    assert check.relative(torch.load(tmp_path / "output.pt")[0], expected) <= 1e-5


@needs_compiler
@pytest.mark.slow
def test_a_package_with_the_operators(tmp_path):
    subject = subject_of("vit", tmp_path)
    path = tmp_path / "model.pt2"
    aoti.export(subject.module, subject.inputs, path, dynamic=subject.axes(("batch",)), keep_operators=True)
    found = check.compare(subject, aoti.load(path), ("batch",))
    assert all(one.ok for one in found), found


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [False, True], ids=["lowered", "operators kept"])
def test_a_package_for_the_gpu(tmp_path, keep):
    subject = subject_of("dinov3", tmp_path, half=True, open_image=True).to(torch.device("cuda"))
    path = tmp_path / "model.pt2"
    report = aoti.export(subject.module, subject.inputs, path, dynamic=subject.axes(OPEN), keep_operators=keep)
    assert report.detail.startswith("cuda code")
    found = check.compare(subject, aoti.load(path), OPEN)
    assert all(one.ok for one in found), found


def test_a_package_gets_contiguous_inputs():
    """It reads memory without a look at the strides."""
    turned = torch.rand(1, 4, 5, 3).permute(0, 3, 1, 2)
    inputs = aoti.contiguous({"pixel_values": turned})
    assert inputs["pixel_values"].is_contiguous()
    assert torch.equal(inputs["pixel_values"], turned)
    assert _samples.vit().sample["pixel_values"].is_contiguous()


def test_inputs_are_made_where_the_example_is(monkeypatch):
    arange, devices = torch.arange, []

    def spy(*arguments, device=None, **options):
        devices.append(torch.device(device or "cpu").type)
        return arange(*arguments, device=device, **options)

    subject = _samples.vit()
    monkeypatch.setattr(torch, "arange", spy)  # of the index that resizes; a GPU takes none from the CPU, meta does
    subject.inputs["pixel_values"] = subject.inputs["pixel_values"].to("meta", torch.float16)
    for inputs in list(subject.variants(OPEN).values())[:2]:
        assert inputs["pixel_values"].is_meta
        assert inputs["pixel_values"].dtype == torch.float16
    assert devices == ["meta"] * 3


def test_half_and_to_take_the_sample_along():
    subject = _samples.vit().half().to(torch.device("meta"))
    tensors = [subject.inputs["pixel_values"], subject.sample["pixel_values"], subject.module.patch.weight]
    assert all(tensor.is_meta and tensor.dtype == torch.float16 for tensor in tensors)


def test_a_wrong_vit_is_found():
    subject = _samples.vit()

    def run(inputs):
        return [tensor * (1 + 1e-4) for tensor in _trace.outputs_of(subject.module(**inputs)).values()]

    assert not any(one.ok for one in check.compare(subject, run))


@pytest.mark.parametrize("size", [(7, 9), (3, 4), (12, 5), (1, 2)])
def test_antialiased_interpolation_written_out(size):
    image = torch.randn(2, 3, 7, 9, dtype=torch.float64)
    expected = F.interpolate(image, size, mode="bicubic", antialias=True)
    options = {"size": size, "mode": "bicubic", "antialias": True}
    torch.testing.assert_close(_older_opsets.interpolate(image, **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_functions_written_out(dtype):
    x, weight, bias = torch.randn(2, 5, 8).to(dtype) + 3, torch.randn(8).to(dtype), torch.randn(8).to(dtype)
    for affine in (weight, bias), (None, None):
        got = _older_opsets.layer_norm(x, (8,), *affine, 1e-5)
        torch.testing.assert_close(got, F.layer_norm(x, (8,), *affine, 1e-5))
    for chunks, dim in (2, 2), (2, 1), (3, -1), (4, 1), (9, 0):
        got, expected = _older_opsets.chunk(x, chunks, dim), x.chunk(chunks, dim)
        assert len(got) == len(expected)
        assert all(map(torch.equal, got, expected))
    assert [len(one) for one in _older_opsets.chunk(x[0, 0, :0], 3)] == [0, 0, 0]


MEANS = {
    "of all": lambda x: x.mean(),
    "of no axis named": lambda x: torch.mean(x, None, True),
    "of an empty list": lambda x: x.mean([]),
    "axis 0": lambda x: x.mean(0),
    "last, kept": lambda x: x.mean(-1, keepdim=True),
    "two": lambda x: torch.mean(x, dim=(0, 2)),
    "to float64": lambda x: x.mean(dtype=torch.float64),
    "to float16": lambda x: x.mean((1,), True, dtype=torch.float16),
    "of integers": lambda x: (10 * x).long().mean(1, dtype=torch.float32),
    "NumPy's names": lambda x: torch.mean(x, axis=1, keepdims=True),
    "of a scalar": lambda x: x[0, 0, 0].mean(-1) + x[0, 0, 0].mean(),
}


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("call", MEANS.values(), ids=MEANS)
def test_every_call_of_mean(call, opset):
    x = torch.randn(2, 5, 8)
    with Tracing(_standard.lowered(opset)):
        got = call(x)
    torch.testing.assert_close(got, call(x))


@pytest.mark.parametrize("opset", [17, 18])
def test_a_mean_of_float16_is_summed_in_float32(tmp_path, opset):
    """By the letter of ONNX, which onnxruntime on the CPU does not follow: it adds up in float32 anyway."""
    shape = {"hidden_size": 8, "num_heads": 2, "num_layers": 1, "intermediate_size": 8, "patch_size": 2}
    config = ViTConfig("siglip", **shape, image_size=(64, 64), classifier="mean", labels=("a", "b"), final_norm=False)
    vit = ViT(config, dtype=torch.float16)
    with torch.no_grad():
        for tensor in (*vit.parameters(), *vit.buffers()):
            tensor.normal_(std=0.02)
        vit.patch.bias.fill_(100)  # 1024 patches: the sum is beyond float16, the mean is not
    pixels = torch.randn(1, 3, 64, 64).half()
    onnx.export(vit, {"pixel_values": pixels}, tmp_path / "model.onnx", opset=opset)
    run = ReferenceEvaluator(onnx_format.load(tmp_path / "model.onnx")).run
    *_, logits = run(None, {"pixel_values": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), vit(pixels).logits, rtol=1e-2, atol=1e-2)
