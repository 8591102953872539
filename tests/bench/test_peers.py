"""How the peers are called, and what is no peer."""

import importlib
import sys
import types
from dataclasses import replace

import pytest
import torch
from bench_tools import TINY, measure, measure_module

import visionkernels as vk
from visionkernels.bench.providers import PROVIDERS
from visionkernels.integrations import mmcv
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn


def fake(monkeypatch, name, **members):
    module = types.ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    for i, _ in enumerate(name.split(".")):  # the packages that hold it too
        monkeypatch.setitem(sys.modules, ".".join(name.split(".")[: i + 1]), types.ModuleType("package"))
    monkeypatch.setitem(sys.modules, name, module)


def on_cpu(name):
    return replace(PROVIDERS[name], devices=("cpu",))


def test_an_extension_that_is_this_package_is_no_peer():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("MultiScaleDeformableAttention")
    extension = vk.install_extension()
    try:
        reason = PROVIDERS["deformable-detr"].missing()
    finally:
        vk.uninstall_extension()
    assert (
        reason
        == f"{extension.__name__} runs this package's own operators since it was installed over; take that back first"
    )


def test_an_mmcv_that_runs_this_package_is_no_peer(monkeypatch):
    name = "mmcv.ops.multi_scale_deform_attn"
    fake(monkeypatch, name, MultiScaleDeformableAttnFunction=type("Function", (), {}))
    assert PROVIDERS["mmcv"].missing() is None
    fake(monkeypatch, name, MultiScaleDeformableAttnFunction=mmcv.MultiScaleDeformableAttnFunction)
    assert PROVIDERS["mmcv"].missing().startswith(f"{name} runs this package's own operators")


def test_the_extension_of_deformable_detr(monkeypatch):
    def forward(value, shapes, start, locations, weights, step):
        assert step == TINY.batch
        assert start.tolist() == [0, 35]
        return reference_ms_deform_attn(value, shapes.tolist(), locations, weights)

    def backward(value, shapes, start, locations, weights, grad_output, step):
        inputs = [t.detach().requires_grad_() for t in (value, locations, weights)]
        with torch.enable_grad():
            output = forward(inputs[0], shapes, start, *inputs[1:], step)
        return torch.autograd.grad(output, inputs, grad_output)

    fake(monkeypatch, "MultiScaleDeformableAttention", ms_deform_attn_forward=forward, ms_deform_attn_backward=backward)
    for row in (measure(on_cpu("deformable-detr")), measure_module(on_cpu("deformable-detr"), "bf16")):
        assert row.failed is None
        assert not row.wrong


def test_mmcv(monkeypatch):
    class Function:
        @staticmethod
        def apply(value, shapes, start, locations, weights, step):
            assert value.dtype == locations.dtype == weights.dtype
            assert (start.tolist(), step) == ([0, 35], TINY.batch)
            return reference_ms_deform_attn(value, shapes.tolist(), locations, weights)

    fake(monkeypatch, "mmcv.ops.multi_scale_deform_attn", MultiScaleDeformableAttnFunction=Function)
    for row in (measure(on_cpu("mmcv")), measure_module(on_cpu("mmcv"))):
        assert row.failed is None
        assert not row.wrong


def test_dcnv4_gets_locations_and_logits_in_one_tensor(monkeypatch):
    class Function:
        @staticmethod
        def apply(value, shapes, start, packed, step, points):
            levels = len(shapes)
            assert packed.shape[3] == 3 * levels * points
            locations, logits = packed.split([2 * levels * points, levels * points], 3)
            weights = logits.softmax(-1).unflatten(3, (levels, points))
            locations = locations.unflatten(3, (levels, points, 2))
            return reference_ms_deform_attn(value, shapes.tolist(), locations, weights)

    fake(monkeypatch, "DCNv4.functions", FlashDeformAttnFunction=Function)
    for row in (measure(on_cpu("dcnv4")), measure_module(on_cpu("dcnv4"))):
        assert row.failed is None
        assert not row.wrong


def test_msda_triton_returns_heads_apart(monkeypatch):
    def attention(value, shapes, locations, weights, padding_mode, align_corners):
        assert (padding_mode, align_corners) == ("zeros", False)
        output = reference_ms_deform_attn(value, shapes.tolist(), locations, weights)
        return output.unflatten(2, value.shape[2:])

    fake(monkeypatch, "msda_triton.frontend", triton_multiscale_deformable_attention=attention)
    row = measure(on_cpu("msda-triton"))
    assert row.failed is None
    assert not row.wrong


def test_compiled_means_torch_compile_of_one_shape_without_breaks(monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    assert not measure(PROVIDERS["torch-compile"]).wrong
    assert not measure_module(PROVIDERS["torch-compile"]).wrong
    assert seen == [{"dynamic": False, "fullgraph": True}] * 2


def test_a_compiler_that_is_missing_is_a_note(monkeypatch):
    def refuse(function, **options):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    assert measure(PROVIDERS["torch-compile"]).failed["message"] == "no C++ compiler"


@pytest.mark.slow
def test_torch_compile_is_right():
    row = measure(PROVIDERS["torch-compile"])
    assert row.failed is None
    assert not row.wrong
    assert row.forward_backward.median > 0
