"""ONNX in standard operators: runs in onnxruntime, at other sizes too, and says what cannot be had."""

import pytest
import torch
from torch import nn

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx as onnx_format

from visionkernels.errors import UserError
from visionkernels.export import _samples, _trace, check, onnx

SUBJECTS = {
    "opset 18": (_samples.ms_deform_attn, (), 18),
    "opset 16, border": (_samples.ms_deform_attn, ((3, 6, 3), "bilinear", True), 16),
    "opset 20": (_samples.ms_deform_attn, (), 20),
    "nearest": (_samples.ms_deform_attn, ((2, 3, 1), "nearest"), 18),
    "fused, mask": (_samples.fused_ms_deform_attn, ((1, 2, 3),), 18),
    "module": (_samples.msdeformattn, (), 17),
}


@pytest.mark.parametrize(("make", "arguments", "opset"), SUBJECTS.values(), ids=SUBJECTS)
def test_it_runs_with_every_size_open(tmp_path, make, arguments, opset):
    subject = make(*arguments)
    labels, path = tuple(subject.sizes), tmp_path / "model.onnx"
    report = onnx.export(
        subject.module, subject.inputs, path, opset=opset, dynamic=subject.axes(labels), outputs=subject.outputs
    )
    assert report.layers == 1
    model = onnx_format.load(path)
    onnx_format.checker.check_model(model, full_check=True)
    assert [one.version for one in model.opset_import if one.domain == ""] == [opset]
    assert not any(one.domain for one in model.graph.node)  # standard operators alone
    modes = [onnx_format.helper.get_node_attr_value(n, "mode") for n in model.graph.node if n.op_type == "GridSample"]
    nearest = subject.module.method == "nearest" if isinstance(subject.module, _samples.Attention) else False
    assert modes == [] if nearest else modes == [b"linear" if opset >= 20 else b"bilinear"] * 3
    assert report.inputs["level_0"] == ("batch", 32, "height_0", "width_0")
    declared = {
        one.name: [d.dim_param or d.dim_value for d in one.type.tensor_type.shape.dim] for one in model.graph.input
    }
    assert declared == {name: list(shape) for name, shape in report.inputs.items()}
    assert [one.name for one in model.graph.output] == ["output"]
    found = check.compare(subject, onnx.load(path), labels)
    assert len(found) == 2
    assert all(one.ok for one in found), found


def test_float16_keeps_coordinates_in_float32(tmp_path):
    subject = _samples.msdeformattn().half()
    path = tmp_path / "model.onnx"
    onnx.export(subject.module, subject.inputs, path, dynamic=subject.axes(("batch",)))
    model = onnx_format.load(path)
    assert {one.type.tensor_type.elem_type for one in model.graph.output} == {onnx_format.TensorProto.FLOAT16}
    types = {one.name: one.type.tensor_type.elem_type for one in model.graph.value_info}
    grids = [node.input[1] for node in model.graph.node if node.op_type == "GridSample"]
    assert {types[name] for name in grids} == {onnx_format.TensorProto.FLOAT}
    found = check.compare(subject, onnx.load(path), ("batch",))
    assert all(one.ok and one.allowed < 0.01 for one in found), found


def test_the_file_holds_no_path_of_this_machine(tmp_path):
    subject = _samples.ms_deform_attn()
    onnx.export(subject.module, subject.inputs, tmp_path / "model.onnx")
    content = (tmp_path / "model.onnx").read_bytes()
    assert str(tmp_path).encode() not in content
    assert __file__.rsplit("/", 2)[0].encode() not in content
    assert b"site-packages" not in content
    assert b"_samples.py" not in content


@pytest.mark.parametrize("opset", [15, 24])
def test_an_unknown_opset(tmp_path, opset):
    subject = _samples.ms_deform_attn()
    with pytest.raises(UserError, match=f"opset: expected 16 to 23, but it is {opset}"):
        onnx.export(subject.module, subject.inputs, tmp_path / "model.onnx", opset=opset)


def test_an_operator_that_onnx_does_not_have(tmp_path):
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(UserError, match=r"cannot convert it to opset 18: .*bessel_j0"):
        onnx.export(Model(), {"x": torch.rand(3)}, tmp_path / "model.onnx")


def test_a_missing_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxscript" else object())
    subject = _samples.ms_deform_attn()
    with pytest.raises(
        UserError, match=r"export needs onnxscript, not installed here: pip install 'visionkernels\[export\]'"
    ):
        onnx.export(subject.module, subject.inputs, tmp_path / "model.onnx")


def test_a_file_that_is_no_model(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(UserError, match="onnxruntime cannot load"):
        onnx.load(tmp_path / "model.onnx")


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + torch.arange(int(x.shape[0]))


@pytest.mark.parametrize(
    ("inputs", "dynamic", "message"),
    [
        ({"x": torch.rand(2, 3)}, {"y": {0: "batch"}}, "dynamic: the model has no input 'y'; its inputs are x"),
        ({"x": torch.rand(2, 3)}, {"x": {2: "width"}}, "dynamic: x has 2 axes, so axis 2 .width. is not there"),
        ({"x": torch.rand(1, 3)}, {"x": {0: "batch"}}, "has size 1 along batch; .*give a larger example"),
        ({"x": torch.rand(2, 3)}, {"x": {0: "batch"}}, "batch of x cannot stay open, the model's code fixes it .2.;"),
    ],
)
def test_a_size_that_cannot_stay_open(inputs, dynamic, message):
    with pytest.raises(UserError, match=message):
        _trace.trace(Fixed(), inputs, dynamic)


class Product(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum() + torch.arange(int(x.shape[0] * x.shape[1]))


class Limited(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._check(x.shape[0] <= 100)
        return x * 2


def test_a_size_that_something_made_of_it_fixes():
    with pytest.raises(UserError, match=r"batch of x cannot stay open, the model's code fixes it \(Eq\("):
        _trace.trace(Product(), {"x": torch.rand(2, 3)}, {"x": {0: "batch", 1: "width"}})


def test_the_limits_of_an_open_size_are_reported(tmp_path):
    report = onnx.export(Limited(), {"x": torch.rand(9)}, tmp_path / "model.onnx", dynamic={"x": {0: "length"}})
    assert report.detail.endswith(", length to 100")


def test_a_model_that_cannot_be_traced():
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum().item() > 0 else -x

    with pytest.raises(UserError, match=r"torch.export cannot trace Model: Could not guard on data-dependent"):
        _trace.trace(Model(), {"x": torch.rand(3)})
