"""AOTInductor packages, in this process and in a fresh one; the default kind is in test_deploy.py."""

import logging
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor import decomposition, lowering

import visionkernels as vk
from visionkernels.errors import UserError
from visionkernels.export import _samples, aoti, check

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

LOAD = """
import ctypes, sys, torch
ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
if sys.argv[2]: import visionkernels
inputs = torch.load(sys.argv[1] + "/inputs.pt")
torch.save(torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2")(inputs=inputs), sys.argv[1] + "/output.pt")
"""

CAPTURE = """
import ctypes, sys, torch
ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
inputs = torch.load(sys.argv[1] + "/inputs.pt")
package = torch._inductor.aoti_load_package(sys.argv[1] + "/model.pt2", run_single_threaded=True)
package(inputs=inputs)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    output = package(inputs=inputs)
output.zero_()
graph.replay()
torch.save(output, sys.argv[1] + "/output.pt")
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
@pytest.mark.parametrize("name", ["fused_ms_deform_attn", "MSDeformAttn"])
def test_a_package_for_the_gpu_has_the_kernel_inside(tmp_path, name):
    subject, labels = _samples.SAMPLES[name]().to(torch.device("cuda")), ("batch", "queries", "height_0", "width_1")
    path = tmp_path / "model.pt2"
    report = aoti.export(subject.module, subject.inputs, path, dynamic=subject.axes(labels))
    assert "the Triton kernel in 1 of 1 layers, needs nothing but PyTorch" in report.detail
    found = check.compare(subject, aoti.load(path), labels)
    assert all(one.ok for one in found), found
    assert has_kernel(path)
    torch.save(subject.inputs, tmp_path / "inputs.pt")
    for code in (LOAD, CAPTURE):
        load = f"{code}\nassert 'visionkernels' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", load, str(tmp_path), ""], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found = torch.load(tmp_path / "output.pt")
        torch.testing.assert_close(found, subject.module(**subject.inputs), rtol=1e-5, atol=1e-5)
        (tmp_path / "output.pt").unlink()


@pytest.mark.gpu
def test_what_an_image_may_hold_in_a_package_for_the_gpu(tmp_path):
    """A value that is more than what was exported, and a little more than offsets of 32 bits reach, gives NaN."""

    class Attention(torch.nn.Module):
        def forward(self, value, shapes, locations, weights):
            return vk.ms_deform_attn(value, shapes, None, locations, weights)

    def inputs(width):
        value = torch.ones(1, 2 * width, 8, 32, dtype=torch.float16, device="cuda")
        shapes = torch.tensor([[2, width]], device="cuda")
        return {"value": value, "shapes": shapes, "locations": locations, "weights": weights}

    locations, weights = (torch.full((1, 2, 8, 1, 4, *last), 0.5, device="cuda") for last in ((2,), ()))
    path = tmp_path / "model.pt2"
    aoti.export(Attention().cuda(), inputs(8), path, dynamic={"value": {1: "pixels"}})
    package = aoti.load(path)
    limit = 2**31 // (8 * 32 * 2) // 2  # of the width
    assert torch.equal(package(inputs(limit - 1))[0], torch.full((1, 2, 256), 2.0, device="cuda").half())
    assert package(inputs(limit))[0].isnan().all()


@pytest.mark.gpu
def test_a_package_for_the_gpu_with_the_operators(tmp_path):
    subject, labels = _samples.msdeformattn().to(torch.device("cuda")).half(), ("batch", "queries")
    path = tmp_path / "model.pt2"
    aoti.export(subject.module, subject.inputs, path, dynamic=subject.axes(labels), keep_operators=True)
    found = check.compare(subject, aoti.load(path), labels)
    assert all(one.ok for one in found), found
    assert not has_kernel(path)


def has_kernel(path):
    with zipfile.ZipFile(path) as package:
        return any(b"_forward_warp_kernel" in package.read(name) for name in package.namelist())


def test_inputs_are_aligned():
    tensor = torch.arange(9.0)[1:]
    inputs = aoti.contiguous({"x": tensor})
    assert inputs["x"].data_ptr() % aoti.ALIGNMENT == 0
    assert torch.equal(inputs["x"], tensor)


def test_the_warning_about_inputs_that_are_written_is_not_shown(caplog):
    logger = logging.getLogger(triton_kernel_wrap.log.name)  # PyTorch's, which says it
    with aoti._quiet():
        logger.warning("Encountered an exception in identify_accessed_tensors, assuming every input is mutated")
        logger.warning("something else")
    logger.warning("assuming every input is mutated")
    assert caplog.messages == ["something else", "assuming every input is mutated"]


@pytest.mark.parametrize("compiled_before", [False, True])
def test_pytorch_s_grid_sampler_is_left_alone_for_the_time_of_an_export(compiled_before):
    operator = torch.ops.aten.grid_sampler_2d.default
    decomposition.fast_random_decomps.cache_clear()
    form = decomposition.decompositions[operator]
    if compiled_before:
        decomposition.select_decomp_table()
    lowering.lowerings.pop(operator, None)
    with aoti._pytorch_s_grid_sampler():
        assert operator not in decomposition.select_decomp_table()
        assert operator in lowering.lowerings
    assert decomposition.select_decomp_table()[operator] is decomposition.decompositions[operator] is form


class Difference(torch.nn.Module):
    def forward(self, a, b):
        return a - b


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A package of `a - b`, with an open size."""
    path = tmp_path_factory.mktemp("package") / "model.pt2"
    inputs = {"a": torch.rand(2, 3), "b": torch.rand(2, 3)}
    aoti.export(Difference().eval(), inputs, path, dynamic={"a": {0: "batch"}, "b": {0: "batch"}})
    return path


@pytest.fixture(scope="module")
def difference(package):
    return aoti.load(package)


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"run_single_threaded": True}], ids=["threads", "one thread"])
def test_a_package_is_loaded_as_asked(package, options, monkeypatch):
    asked, load = [], torch._inductor.aoti_load_package
    record = lambda path, **options: asked.append(options) or load(path, **options)  # noqa: E731
    monkeypatch.setattr(torch._inductor, "aoti_load_package", record)
    assert aoti.load(package, **options)({"a": torch.ones(2, 3), "b": torch.ones(2, 3)})[0].sum() == 0
    assert asked == [{"run_single_threaded": bool(options)}]


@needs_compiler
def test_inputs_go_by_name(difference):
    a, b = torch.rand(5, 3), torch.rand(5, 3)
    assert torch.equal(difference({"b": b, "a": a})[0], a - b)


@needs_compiler
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"b": None}, "inputs: b is missing; the package takes a, b"),
        ({"c": torch.rand(2, 3)}, "inputs: c is unknown; the package takes a, b"),
        ({"b": torch.rand(2, 3).double()}, "inputs: b must have the dtype torch.float32, and has torch.float64"),
        ({"b": torch.rand(2, 3, device="meta")}, "inputs: b must have the device cpu, and has meta"),
        ({"b": torch.rand(2, 4)}, "inputs: b must have the shape [any, 3], and has [2, 4]"),
        ({"b": torch.rand(6)}, "inputs: b must have the shape [any, 3], and has [6]"),
    ],
)
def test_wrong_inputs(difference, wrong, message):
    inputs = {"a": torch.rand(2, 3), "b": torch.rand(2, 3)} | wrong
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        difference({name: tensor for name, tensor in inputs.items() if tensor is not None})


@needs_compiler
def test_a_package_of_another(tmp_path):
    program = torch.export.export(Difference().eval(), (torch.rand(2), torch.rand(2)))
    torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "other.pt2"))
    with pytest.raises(UserError, match=r"was not written by visionkernels.export.aoti; load it by"):
        aoti.load(tmp_path / "other.pt2")


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
