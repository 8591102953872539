"""An installed mmcv, for which a package of the same structure stands in.

It has the names, signatures and re-exports of mmcv 2.2.0, and nothing compiled.
"""

import copy
import functools
import sys
import types

import pytest
import torch
from integrations.mmcv_semantics import SHAPES, C, L, M, P, call, compare, inputs, leaves, redrawn, sample, semantics

from visionkernels.integrations import _mmcv_attention, mmcv


def renamed(function):
    """mmcv's decorator for the older argument, which hides the signature as `functools.wraps` does."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "residual" in kwargs:
            kwargs["identity"] = kwargs.pop("residual")
        return function(*args, **kwargs)

    return wrapper


STAND_IN = "mmcv.ops.multi_scale_deform_attn"


@pytest.fixture
def upstream(monkeypatch):
    """A package with the structure of mmcv, in `sys.modules`. Its functions say that they were called."""
    module = types.ModuleType(STAND_IN)
    calls = []

    class MultiScaleDeformableAttnFunction:
        @staticmethod
        def apply(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, step):
            calls.append("apply")
            return sample(value, value_spatial_shapes, sampling_locations, attention_weights)

    def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        calls.append("pytorch")
        return sample(value, value_spatial_shapes, sampling_locations, attention_weights)

    class MultiScaleDeformableAttention(mmcv.MultiScaleDeformableAttention):  # for its constructor only
        @renamed
        def forward(
            self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
            reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs,
        ):  # fmt: skip
            calls.append("forward")
            query, value, identity, query_pos = (t.transpose(0, 1) for t in (query, value, identity, query_pos))
            output = semantics(self, query, value, identity, query_pos, key_padding_mask, reference_points)
            return output.transpose(0, 1)

    class Function(MultiScaleDeformableAttention):
        """A user's subclass, which looks the function up in mmcv's module when it is called."""

        def forward(self, *tensors):
            return module.multi_scale_deformable_attn_pytorch(*tensors)

    names = (MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch, MultiScaleDeformableAttention)
    vars(module).update({one.__name__: one for one in names})
    vars(module).update(calls=calls, registry={"MultiScaleDeformableAttention": names[2]}, Function=Function)
    package, operators = types.ModuleType("mmcv"), types.ModuleType("mmcv.ops")
    package.__path__ = operators.__path__ = []
    package.ops, operators.multi_scale_deform_attn = operators, module
    operators.MultiScaleDeformableAttention = names[2]
    operators.multi_scale_deformable_attn_pytorch = names[1]
    for one in (package, operators, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


def state_of(upstream):
    owners = [upstream, sys.modules["mmcv.ops"], upstream.MultiScaleDeformableAttention]
    return [dict(vars(owner)) for owner in owners]


def test_an_installed_mmcv_runs_the_operators_and_is_reverted_exactly(upstream):
    module = redrawn(upstream.registry["MultiScaleDeformableAttention"](C, M, L, P, dropout=0.0).double())
    given, before = inputs(), state_of(upstream)
    expected = call(module, given, SHAPES, False)
    assert upstream.calls == ["forward"]

    mmcv.install()
    mmcv.install()  # a second call does nothing
    parameters = [*module.parameters()]
    compare(call(module, given, SHAPES, False), expected, parameters)
    copied = copy.deepcopy(module)
    torch.testing.assert_close(call(copied, given, SHAPES, False), expected)
    later = upstream.registry["MultiScaleDeformableAttention"](C, M, L, P, dropout=0.0).double()
    later.load_state_dict(module.state_dict())
    torch.testing.assert_close(call(later, given, SHAPES, False), expected)
    assert upstream.calls == ["forward"]
    assert isinstance(module, sys.modules["mmcv.ops"].MultiScaleDeformableAttention)

    mmcv.uninstall()
    assert state_of(upstream) == before
    torch.testing.assert_close(call(copied, given, SHAPES, False), expected)
    assert upstream.calls == ["forward", "forward"]


def test_functions_that_are_looked_up_in_mmcv_are_the_operators(upstream):
    value, locations, weights = tensors = leaves("cpu")
    expected = sample(value, SHAPES, locations, weights)
    subclass = upstream.Function(C, M, L, P)
    mmcv.install()
    shapes, start = torch.tensor(SHAPES), torch.tensor([0, 21])
    compare(subclass(value, shapes, locations, weights), expected, tensors)
    found = upstream.MultiScaleDeformableAttnFunction.apply(value, shapes, start, locations, weights, 64)
    torch.testing.assert_close(found, expected)
    from mmcv.ops import multi_scale_deformable_attn_pytorch  # a name that mmcv exports a second time

    assert multi_scale_deformable_attn_pytorch is mmcv.multi_scale_deformable_attn_pytorch
    mmcv.uninstall()
    assert upstream.calls == []
    upstream.multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    assert upstream.calls == ["pytorch"]


def test_another_signature_is_refused_and_nothing_is_replaced(upstream):
    cls = upstream.MultiScaleDeformableAttention
    cls.forward = lambda self, query, value: query
    before = state_of(upstream)
    with pytest.raises(RuntimeError, match=r"forward takes \(self, query, value\), but its stand-in was written for"):
        mmcv.install()
    assert state_of(upstream) == before
    del upstream.multi_scale_deformable_attn_pytorch
    with pytest.raises(RuntimeError, match="has no multi_scale_deformable_attn_pytorch; use mmcv"):
        mmcv.install()


def test_uninstall_never_overwrites_what_somebody_else_has_put_there(upstream, monkeypatch):
    with pytest.raises(RuntimeError, match=r"install\(\) has not been called"):
        mmcv.uninstall()
    mmcv.install()
    monkeypatch.setattr(upstream, "multi_scale_deformable_attn_pytorch", sample)
    with pytest.raises(
        RuntimeError, match=r"multi_scale_deformable_attn_pytorch of mmcv.* was replaced by something else"
    ):
        mmcv.uninstall()
    assert upstream.MultiScaleDeformableAttention.forward is _mmcv_attention.attend  # nothing was taken back
    monkeypatch.undo()


def test_without_mmcv_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ModuleNotFoundError, match=r"but mmcv.* is missing; install mmcv \(not mmcv-lite\)"):
        mmcv.install()
    with pytest.raises(RuntimeError, match=r"install\(\) has not been called"):
        mmcv.uninstall()
