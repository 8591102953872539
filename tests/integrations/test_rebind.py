"""Exchanging a function that `forward` looks up in its module, on a small class of its own."""

import copy
import dataclasses
import inspect
import pickle
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from integrations import test_patch
from torch import nn

import visionkernels as vk
from visionkernels import integrations
from visionkernels.integrations import _rebind
from visionkernels.integrations._patch import Integration
from visionkernels.integrations._rebind import rebind


def operator(value, weights):
    return value + weights


def helper(value):
    return value


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, value, *, offset=0.0):
        """Docstrings and defaults stay."""
        value = helper(value)  # looked up at each call
        if value.ndim > 5:
            raise ValueError("too many axes")
        return operator(value, self.scale) + offset


class Inherits(Attention):
    pass


class Overrides(Attention):
    def forward(self, value):
        return operator(value, self.scale)


class Decorated(nn.Module):
    @torch.no_grad()
    def forward(self, value):
        return operator(value, value)


class WithSuper(nn.Module):
    def forward(self, value):
        return operator(value, len(super().__repr__()))


def adapter(value, weights):
    return 100 * value + weights


ROW = Integration("Toy", __name__, "Attention", "global", "operator", adapter, "1.0")
X = torch.ones(2)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(integrations, "_TABLE", (ROW, test_patch.ROW))


def result(model):
    return model(X)[0].item()


def test_the_function_is_exchanged_for_one_instance():
    model, other = Attention(), Attention()
    forward, before = Attention.forward, dict(model.__dict__)
    assert str(vk.patch(model)).splitlines()[1].split() == ["(model)", "Attention.forward:", "operator"]
    assert result(model) == 101
    assert result(other) == 2
    assert isinstance(model, Attention)
    assert repr(model) == repr(other)
    for attribute in ("__module__", "__name__", "__qualname__", "__doc__"):
        assert getattr(type(model), attribute) == getattr(Attention, attribute)
    vk.unpatch(model)
    assert type(model) is Attention
    assert model.__dict__ == before
    assert result(model) == 2
    assert Attention.forward is forward
    assert operator(1, 1) == 2


def test_a_second_patch_changes_nothing():
    model = Attention()
    vk.patch(model)
    kind = type(model)
    assert vk.patch(model).already == ("",)
    assert type(model) is kind
    other = Attention()
    vk.patch(other)
    assert type(other) is kind  # one class, so that a compiled graph serves both


def test_threads_that_patch_at_once_make_one_class(monkeypatch):
    def slowly(*arguments):
        time.sleep(0.05)
        return rebind(*arguments)

    monkeypatch.setattr(_rebind, "rebind", slowly)
    _rebind._make_class.cache_clear()
    models = [Attention() for _ in range(4)]
    with ThreadPoolExecutor(len(models)) as pool:
        reports = list(pool.map(vk.patch, models))
    assert [len(report) for report in reports] == [1] * len(models)
    assert len({type(model) for model in models}) == 1


def test_other_names_are_looked_up_at_each_call(monkeypatch):
    model = Attention()
    vk.patch(model)
    monkeypatch.setitem(globals(), "helper", lambda value: 2 * value)
    assert result(model) == 201


def test_signature_and_source_are_upstreams():
    rebound = rebind(Attention.forward, "operator", adapter)
    assert rebound.__kwdefaults__ == {"offset": 0.0}
    assert rebound.__doc__ == Attention.forward.__doc__
    assert rebound.__qualname__ == Attention.forward.__qualname__
    assert rebound.__globals__ is globals()
    assert rebound.__code__.co_firstlineno == Attention.forward.__code__.co_firstlineno
    model = Attention()
    vk.patch(model)
    with pytest.raises(ValueError, match="too many axes") as caught:
        model(torch.ones(1, 1, 1, 1, 1, 1))
    assert traceback.extract_tb(caught.tb)[-1].line == 'raise ValueError("too many axes")'


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_self(duplicate):
    model = Attention()
    vk.patch(model)
    twin = duplicate(model)
    twin.scale = nn.Parameter(torch.zeros(1))
    assert type(twin) is type(model)
    assert (result(twin), result(model)) == (100, 101)
    vk.unpatch(twin)
    assert type(twin) is Attention
    assert (result(twin), result(model)) == (1, 101)


def test_a_subclass_counts_unless_it_overrides_forward():
    model = nn.ModuleList([Inherits(), Overrides()])
    report = vk.patch(model)
    assert [one.name for one in report.replaced] == ["0"]
    assert report.skipped == ("1",)
    assert isinstance(model[0], Inherits)
    assert result(model[0]) == 101
    assert result(model[1]) == 2
    vk.unpatch(model)
    assert type(model[0]) is Inherits


def test_a_forward_of_the_instances_own_is_left_alone():
    model = nn.ModuleList([Attention(), Attention()])
    model[0].forward = helper
    report = vk.patch(model)
    assert report.skipped == ("0",)
    assert model[0](3) == 3
    assert result(model[1]) == 101
    with pytest.raises(ValueError, match="the forward of '' is overridden"):
        vk.patch(model[0])


@pytest.mark.parametrize("change", ["class", "forward"])
def test_what_was_replaced_after_patch_is_not_overwritten(change):
    model = Attention()
    vk.patch(model)
    if change == "class":
        model.__class__ = type("Sharded", (type(model),), {})
    else:
        model.forward = helper
    with pytest.raises(RuntimeError, match="was replaced by something else after patch"):
        vk.unpatch(model)


def test_what_a_hook_leaves_when_it_comes_off_is_no_obstacle():
    """As accelerate's: it keeps the bound `forward`, and puts that into the instance in the end."""
    model = Attention()
    before = dict(model.__dict__)
    vk.patch(model)
    forward = model.forward
    model.forward = lambda *args: forward(*args)
    with pytest.raises(RuntimeError, match="was replaced by something else after patch"):
        vk.unpatch(model)
    model.forward = forward
    vk.unpatch(model)
    assert model.__dict__ == before
    assert type(model) is Attention
    assert result(model) == 2


@pytest.mark.parametrize("cls", [Decorated, WithSuper])
def test_a_forward_that_cannot_be_compiled_once_more_is_refused(cls, monkeypatch):
    monkeypatch.setattr(integrations, "_TABLE", (dataclasses.replace(ROW, class_name=cls.__name__),))
    model = cls()
    before = dict(model.__dict__)
    with pytest.raises(RuntimeError, match=r"cannot be exchanged in forward: it does not look operator up|has no"):
        vk.patch(model)
    assert type(model) is cls
    assert model.__dict__ == before


def test_a_forward_without_source_is_refused(monkeypatch):
    scope = {"nn": nn, "operator": operator, "__name__": __name__}
    exec("class Attention(nn.Module):\n    def forward(self, value):\n        return operator(value, 1)", scope)
    with pytest.raises(RuntimeError, match=r"cannot be exchanged in forward: its source cannot be read"):
        vk.patch(scope["Attention"]())


def test_a_source_that_is_not_what_runs_is_refused(monkeypatch):
    lines, first = inspect.getsourcelines(Attention.forward)
    changed = [line.replace("offset\n", "2 * offset\n") for line in lines]
    assert changed != lines
    monkeypatch.setattr(inspect, "getsourcelines", lambda function: (changed, first))
    with pytest.raises(RuntimeError, match="its source has changed since it was imported"):
        rebind(Attention.forward, "operator", adapter)


def test_an_error_leaves_the_whole_model_as_it_was(monkeypatch):
    monkeypatch.setattr(
        integrations, "_TABLE", (ROW, dataclasses.replace(ROW, class_name="Decorated", title="Decorated"))
    )
    model = nn.ModuleList([Attention(), Decorated()])
    with pytest.raises(RuntimeError):
        vk.patch(model)
    assert type(model[0]) is Attention
