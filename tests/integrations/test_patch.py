"""The patching itself, on a small class of its own: what is replaced, what is put back, what is refused."""

import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import visionkernels as vk
from visionkernels import integrations
from visionkernels.integrations._patch import Integration, find_patch

X = torch.ones(2)


class Attention(nn.Module):
    def forward(self, value, weights):
        return value + weights


class Inherits(Attention):
    pass


class Overrides(Attention):
    def forward(self, value, weights):
        return 5 * super().forward(value, weights)


class Model(nn.Module):
    def __init__(self, cls=Attention):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(2, 2), cls())
        self.last = cls()

    def forward(self, x):
        return self.last(self.first[1](x, x), x)


def adapter(value, weights):
    return 100 * value + weights


def doubled(value, weights):
    return 2 * (value + weights)


ROW = Integration("Toy", __name__, "Attention", "method", "forward", adapter, "1.0")
STOCK, PATCHED = 3.0, 10101.0


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(integrations, "_TABLE", (ROW,))


def result(model):
    return model(X)[0].item()


def state_of(model):
    return {name: dict(module.__dict__) for name, module in model.named_modules()}


def test_patch_replaces_every_instance_and_reports_it():
    model = Model()
    report = vk.patch(model)
    assert result(model) == PATCHED
    assert len(report) == 2
    assert [one.name for one in report.replaced] == ["first.1", "last"]
    assert {one.class_name for one in report.replaced} == {f"{__name__}.Attention"}
    lines = str(report).splitlines()
    assert lines[0] == "Model: 2 modules replaced"
    assert lines[1:] == ["  first.1  Attention.forward", "  last     Attention.forward"]


def test_only_the_instance_is_patched():
    model, other = Model(), Model()
    forward = Attention.forward
    vk.patch(model)
    assert Attention.forward is forward
    assert result(other) == STOCK


def test_unpatch_reverts_exactly():
    model = Model()
    before, keys = state_of(model), list(model.state_dict())
    vk.patch(model)
    assert list(model.state_dict()) == keys
    assert state_of(model) != before
    assert vk.unpatch(model) is None
    assert state_of(model) == before
    assert "forward" not in model.last.__dict__
    assert result(model) == STOCK


def test_a_second_patch_changes_nothing():
    model = Model()
    before = state_of(model)
    vk.patch(model)
    report = vk.patch(model)
    assert len(report) == 0
    assert report.already == ("first.1", "last")
    assert str(report) == "Model: 0 modules replaced, 2 patched before"
    vk.unpatch(model)
    assert state_of(model) == before


def test_patched_is_a_context():
    model = Model()
    before = state_of(model)
    with vk.patched(model) as report:
        assert len(report) == 2
        assert result(model) == PATCHED
    assert state_of(model) == before


def test_patched_reverts_after_an_error():
    model = Model()
    before = state_of(model)
    with pytest.raises(KeyError), vk.patched(model):
        raise KeyError
    assert state_of(model) == before


def test_patched_keeps_what_was_patched_before():
    model = Model()
    vk.patch(model.last)
    before = state_of(model)
    with vk.patched(model) as report:
        assert [one.name for one in report.replaced] == ["first.1"]
        assert report.already == ("last",)
    assert state_of(model) == before
    assert find_patch(model.last) is not None


def test_unpatching_inside_the_context_is_no_error():
    model = Model()
    before = state_of(model)
    with vk.patched(model):
        vk.unpatch(model)
    assert state_of(model) == before


def test_a_part_and_a_wrapper():
    model = Model()
    report = vk.patch(model.last)
    assert [one.name for one in report.replaced] == [""]
    assert "(model)" in str(report)
    assert str(report).startswith("Attention: 1 module replaced\n")
    vk.unpatch(model)
    assert [one.name for one in vk.patch(nn.DataParallel(model)).replaced] == [
        "module.first.1",
        "module.last",
    ]
    assert result(model) == PATCHED


def test_a_data_parallel_replica_stays_patched():
    model = Model()
    vk.patch(model)
    replica = model.last._replicate_for_data_parallel()
    assert replica(X, X)[0].item() == 101


def test_a_shared_module_is_patched_once():
    model = Model()
    model.first[1] = model.last
    before = state_of(model)
    assert len(vk.patch(model)) == 1
    assert result(model) == PATCHED
    vk.unpatch(model)
    assert state_of(model) == before


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_patched_and_unpatched_on_its_own(duplicate):
    model = Model()
    vk.patch(model)
    twin = duplicate(model)
    assert result(twin) == PATCHED
    vk.unpatch(twin)
    assert result(twin) == STOCK
    assert "forward" not in twin.last.__dict__
    assert result(model) == PATCHED
    vk.unpatch(model)
    assert result(model) == STOCK


def test_a_subclass_counts_unless_it_overrides_the_method():
    model = Model(Inherits)
    model.last = Overrides()
    report = vk.patch(model)
    assert [one.name for one in report.replaced] == ["first.1"]
    assert report.replaced[0].class_name == f"{__name__}.Inherits"
    assert report.skipped == ("last",)
    assert "left alone" in str(report)
    assert "forward" not in model.last.__dict__


@pytest.mark.parametrize("model", [None, "model", {}, nn.Linear, torch.zeros(2)])
@pytest.mark.parametrize("call", [vk.patch, vk.unpatch, lambda model: vk.patched(model).__enter__()])
def test_no_module(call, model):
    with pytest.raises(TypeError, match=r"^model: expected a torch\.nn\.Module instance, got "):
        call(model)


def test_nothing_to_patch():
    with pytest.raises(ValueError, match=r"nothing to patch in Linear, .*; supported are the models Toy$"):
        vk.patch(nn.Linear(2, 2))


def test_nothing_but_overriding_subclasses():
    with pytest.raises(ValueError, match=r"in Model, the forward of 'first\.1', 'last' is overridden"):
        vk.patch(Model(Overrides))


def test_unpatch_of_a_model_that_was_never_patched():
    with pytest.raises(ValueError, match="expected a patched model, but no module of this Model is patched"):
        vk.unpatch(Model())


def test_a_class_of_the_same_name_from_elsewhere_is_not_touched(monkeypatch):
    monkeypatch.setattr(integrations, "_TABLE", (dataclasses.replace(ROW, module="upstream.modeling"),))
    with pytest.raises(ValueError, match="nothing to patch"):
        vk.patch(Model())


def test_an_unknown_signature_is_refused_before_anything_is_replaced(monkeypatch):
    class Other(Attention):
        def forward(self, value, weights, scale):
            return value

    row = dataclasses.replace(ROW, class_name=Other.__name__, title="Other")
    monkeypatch.setattr(integrations, "_TABLE", (row, ROW))
    model = Model()
    model.last = Other()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"takes \(self, value, weights, scale\), but its adapter"):
        vk.patch(model)
    assert state_of(model) == before


def test_a_forward_replaced_after_patch_is_not_overwritten():
    model = Model()
    vk.patch(model)
    model.last.forward = doubled
    before = state_of(model)
    with pytest.raises(RuntimeError, match="'forward' of a Attention was replaced by something else"):
        vk.unpatch(model)
    assert state_of(model) == before


def test_a_class_is_in_one_row_only():
    from visionkernels.integrations.transformers import INTEGRATIONS

    assert len({(row.module, row.class_name) for row in INTEGRATIONS}) == len(INTEGRATIONS)
