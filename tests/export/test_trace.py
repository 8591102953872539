"""torch.export of whole detectors: one node a layer, sizes open, and upstream left as it was."""

import sys

import pytest
import torch

pytest.importorskip("transformers")

from integrations import tiny_detectors

from visionkernels.export import _subject, _trace

OPEN = ("batch", "height", "width")
LAYERS = {"rt_detr": 2, "deformable_detr": 4, "rf_detr": 2, "pp_doclayout_v2": 2}


def subject_of(name):
    model, inputs = tiny_detectors.build(name)
    inputs["pixel_values"] = torch.randn(2, 3, 160, 224)
    return _subject.of_model(name, model, inputs)


@pytest.mark.parametrize("name", LAYERS)
def test_one_node_a_layer_and_every_size_open(name):
    subject = subject_of(name)
    file = sys.modules[
        f"transformers.models.{tiny_detectors.model_type(name)}.modeling_{tiny_detectors.model_type(name)}"
    ]
    before = dict(vars(file))
    traced = _trace.trace(subject.module, subject.inputs, subject.axes(OPEN))
    assert dict(vars(file)) == before
    assert traced.calls == ("visionkernels.ms_deform_attn.default",) * LAYERS[name]
    assert sum("ms_deform_attn" in str(node.target) for node in traced.program.graph.nodes) == LAYERS[name]
    inputs = {"pixel_values": torch.randn(3, 3, 192, 160)}
    with torch.no_grad():
        expected = subject.module(**inputs)
        got = traced.program.module()(inputs=inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert sorted(_trace.symbols(traced.program, subject.axes(OPEN)).values()) == sorted(OPEN)


def test_upstream_is_restored_when_tracing_fails(monkeypatch):
    subject = subject_of("rt_detr")
    file = sys.modules["transformers.models.rt_detr.modeling_rt_detr"]
    before = dict(vars(file))
    monkeypatch.setattr(subject.module.model.model.encoder, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(_trace.UserError, match="cannot trace TaskOutputs: division by zero"):
        _trace.trace(subject.module, subject.inputs)
    assert dict(vars(file)) == before
