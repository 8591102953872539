"""ONNX with TensorRT's plugin: the graph, its rules, and its numbers, without TensorRT."""

import copy
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import Case, assert_accurate, eager_ms_deform_attn, make_inputs
from torch import nn

pytest.importorskip("onnxscript")

import onnx as onnx_format

from visionkernels.errors import UserError
from visionkernels.export import _engine, _plugin, _plugin_rules, _samples, check, tensorrt
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn

SUBJECTS = {
    "plain": (_samples.ms_deform_attn, (), 3),
    "points unlike": (_samples.ms_deform_attn, ((3, 6, 3),), 4),
    "fused, mask": (_samples.fused_ms_deform_attn, ((2, 4, 2),), 4),
    "module": (_samples.msdeformattn, (), 3),
}


def nodes_of(model):
    return [node for node in model.graph.node if node.op_type == _plugin.OP_TYPE]


@pytest.mark.parametrize(("make", "arguments", "levels"), SUBJECTS.values(), ids=SUBJECTS)
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_one_node_that_keeps_the_rules_and_computes_the_same(tmp_path, make, arguments, levels, half):
    subject = make(*arguments)
    subject = subject.half() if half else subject
    labels, path = tuple(subject.sizes), tmp_path / "model.onnx"
    report = tensorrt.export(
        subject.module, subject.inputs, path, dynamic=subject.axes(labels), outputs=subject.outputs,
        plugin_version="1" if half else "2",
    )  # fmt: skip
    model = onnx_format.load(path)
    onnx_format.checker.check_model(model)
    (node,) = nodes_of(model)
    assert report.layers == 1
    assert _plugin_rules.violations(model) == []
    attributes = {one.name: onnx_format.helper.get_attribute_value(one) for one in node.attribute}
    assert attributes == {"plugin_version": b"1" if half else b"2", "plugin_namespace": b""}
    shapes = {one.name: one.type.tensor_type.shape.dim for one in model.graph.value_info}
    assert shapes[node.input[3]][3].dim_value == levels
    found = check.compare(subject, tensorrt.evaluate(path), labels)
    # The plugin's coordinates are float16 too, and that is its loss, not the graph's.
    allowed = 0.05 if half else 1e-5
    assert len(found) == 2
    assert all(one.error <= allowed for one in found), found


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
def test_our_own_plugin_has_coordinates_in_float32(tmp_path, half):
    subject = _samples.fused_ms_deform_attn((2, 4, 3))
    subject = subject.half() if half else subject
    path = tmp_path / "model.onnx"
    tensorrt.export(
        subject.module, subject.inputs, path, plugin_version="visionkernels", dynamic=subject.axes(("batch",))
    )
    model = onnx_format.load(path)
    (node,) = [node for node in model.graph.node if node.op_type == "ms_deform_attn"]
    attributes = {one.name: onnx_format.helper.get_attribute_value(one) for one in node.attribute}
    assert attributes == {"plugin_version": b"1", "plugin_namespace": b"visionkernels", "num_points": [2, 4, 3]}
    with torch.no_grad():
        expected = subject.module(**subject.inputs)
    (got,) = tensorrt.evaluate(path)(subject.inputs)
    assert check.relative(got, expected) <= (check.ROUNDING if half else 1e-6)


@pytest.mark.parametrize(
    ("points", "levels", "each"),
    [([4, 4], [0, 1], 4), ([3, 6, 3], [0, 1, 1, 2], 3), ([2, 3], [0, 0, 1, 1, 1], 1), ([2, 0, 4], [0, 2, 2], 2)],
)
def test_a_level_is_listed_once_for_every_share_of_its_points(points, levels, each):
    assert _plugin.listed_levels(points) == (levels, each)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_plugin_written_from_its_description_is_the_operator(dtype):
    case = Case(shapes=((4, 6), (3, 2), (1, 1)), dtype=dtype)
    value, locations, weights = (tensor.detach() for tensor in make_inputs(case))
    start = np.array([0, 24, 30], np.int32)
    inputs = (value.numpy(), np.array(case.shapes, np.int32), start, locations.numpy(), weights.numpy())
    truth = reference_ms_deform_attn(value.double(), case.shapes, locations.double(), weights.double())
    got = torch.from_numpy(_plugin_rules.plugin_numpy(*inputs)).flatten(2)
    assert_accurate("plugin_numpy", got, truth, eager_ms_deform_attn(value, locations, weights, case))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    subject = _samples.ms_deform_attn()
    path = tmp_path_factory.mktemp("rules") / "model.onnx"
    tensorrt.export(subject.module, subject.inputs, path)
    return onnx_format.load(path)


def set_dtype(index, dtype):
    def change(model):
        name = nodes_of(model)[0].input[index]
        for one in (*model.graph.value_info, *model.graph.input):
            if one.name == name:
                one.type.tensor_type.elem_type = dtype
        for one in model.graph.initializer:
            if one.name == name:
                one.data_type = dtype

    return change


def set_size(index, axis, size):
    def change(model):
        node = nodes_of(model)[0]
        name = node.output[0] if index == "output" else node.input[index]
        for one in (*model.graph.value_info, *model.graph.input):
            if one.name == name:
                dims = one.type.tensor_type.shape.dim
                if size is None:
                    del dims[axis]
                else:
                    dims[axis].dim_value = size
        for one in model.graph.initializer:
            if one.name == name:
                one.dims[axis] = size

    return change


def set_attribute(name, value):
    def change(model):
        attributes = nodes_of(model)[0].attribute
        for one in list(attributes):
            if one.name == name:
                attributes.remove(one)
        attributes.append(onnx_format.helper.make_attribute(name, value))

    return change


def add_function(model):
    function = onnx_format.helper.make_function("other", _plugin.OP_TYPE, [], [], [], [])
    model.functions.append(function)


BROKEN = {
    "spatial_shapes and level_start_index are int32": set_dtype(1, onnx_format.TensorProto.INT64),
    "value is float32 or float16": set_dtype(0, onnx_format.TensorProto.BFLOAT16),
    "locations, weights and output have the dtype of the value": set_dtype(3, onnx_format.TensorProto.FLOAT16),
    "five inputs": lambda model: nodes_of(model)[0].input.append("level_0"),
    "locations are [N, Lq, M, L, P, 2]": set_size(3, 5, 3),
    "weights are [N, Lq, M, L, P]": set_size(4, 4, None),
    "one M": set_size(3, 2, 5),
    "one L": set_size(4, 3, 2),
    "one P": set_size(4, 4, 5),
    "one Lq": set_size(4, 1, 5),
    "the output is [N, Lq, M, D]": set_size("output", 3, 7),
    "plugin_version is 1 or 2": set_attribute("plugin_version", "3"),
    "no attributes of its own": set_attribute("im2col_step", "64"),
    "a function of the model is called": add_function,
}


@pytest.mark.parametrize("rule", BROKEN)
def test_a_broken_rule_is_found(model, rule):
    assert _plugin_rules.violations(model) == []
    broken = copy.deepcopy(model)
    BROKEN[rule](broken)
    found = _plugin_rules.violations(broken)
    assert any(rule in one for one in found), found


@pytest.mark.parametrize(
    ("subject", "message"),
    [
        (
            lambda: _samples.ms_deform_attn((1, 2, 1), "nearest"),
            "asks for method='nearest'; export it with --format onnx",
        ),
        (lambda: _samples.ms_deform_attn(border=True), "asks for padding_mode='border'"),
        (lambda: _samples.ms_deform_attn((0, 0, 0)), "at least one point, and num_points is .0, 0, 0."),
    ],
)
def test_what_the_plugin_cannot_compute_is_refused(tmp_path, subject, message):
    subject = subject()
    with pytest.raises(UserError, match=message):
        tensorrt.export(subject.module, subject.inputs, tmp_path / "model.onnx")


def test_other_dtypes_and_models_and_options_are_refused(tmp_path):
    subject, path = _samples.ms_deform_attn(), tmp_path / "model.onnx"
    double = {name: tensor.double() for name, tensor in subject.inputs.items()}
    with pytest.raises(UserError, match=r"takes float32 and float16, and the value is torch.float64"):
        tensorrt.export(subject.module, double, path)
    with pytest.raises(UserError, match=r"opset: .*for nearest; use 19 or less"):
        tensorrt.export(subject.module, subject.inputs, path, opset=20)
    with pytest.raises(UserError, match=r"plugin_version: expected one of .*, but it is '3'"):
        tensorrt.export(subject.module, subject.inputs, path, plugin_version="3")
    with pytest.raises(UserError, match="calls no operator of this package"):
        tensorrt.export(nn.Identity(), {"input": torch.rand(2)}, path)


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for call in (
        lambda: tensorrt.build("model.onnx", tmp_path / "e"),
        lambda: tensorrt.load("e"),
        lambda: tensorrt.run("e", {}),
    ):
        with pytest.raises(UserError, match="TensorRT is not installed here: `pip install tensorrt`"):
            call()


@pytest.mark.parametrize(
    ("version", "has", "message"),
    [("10.13", (), "has no Builder, OnnxParser, Runtime"), ("8.6.1", ("Builder", "OnnxParser", "Runtime"), "too old")],
)
def test_a_part_of_tensorrt_or_an_old_one_is_not_enough(monkeypatch, version, has, message):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__=version, **dict.fromkeys(has)))
    with pytest.raises(UserError, match=message):
        tensorrt.load("engine")


class Recorder:
    """Stands in for TensorRT's builder, network, configuration and profile: keeps the calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*arguments):
            self.calls.append((name, *arguments))
            return self

        return call


def test_profiles_of_open_sizes():
    recorder = Recorder()
    network = SimpleNamespace(
        num_inputs=2,
        get_input=lambda index: [SimpleNamespace(name="a", shape=(-1, 3)), SimpleNamespace(name="b", shape=(2, 2))][
            index
        ],
    )
    _engine._add_profile(recorder, recorder, network, {"a": ([1, 3], [2, 3], [8, 3])})
    assert recorder.calls == [
        ("create_optimization_profile",),
        ("set_shape", "a", (1, 3), (2, 3), (8, 3)),
        ("add_optimization_profile", recorder),
    ]
    with pytest.raises(UserError, match=r"profile: a has open sizes \[-1, 3\]; give its"):
        _engine._add_profile(recorder, recorder, network, {})
    with pytest.raises(UserError, match="profile: the graph has no input 'c'; its inputs are a, b"):
        _engine._add_profile(recorder, recorder, network, {"c": ([1], [1], [1])})
