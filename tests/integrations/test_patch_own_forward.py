"""Modules whose instance has a `forward` of its own: what `patch` hides and gives back, and what it leaves alone."""

import copy
import dataclasses
from types import MethodType

import pytest
from integrations.test_patch import PATCHED, ROW, STOCK, Attention, Model, X, doubled, result, state_of

import visionkernels as vk
from visionkernels import integrations


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setattr(integrations, "_TABLE", (ROW,))


def times_two(self, value, weights):
    return doubled(value, weights)


def of_a_layer(self, value, weights):
    return doubled(value, weights)


of_a_layer.__qualname__ = "Attention.forward"


def kernelize(module):
    """As `kernels.kernelize` does it: the `forward` of a class of the same name, bound to the module."""
    module.forward = MethodType(of_a_layer, module)


def test_the_forward_of_a_layer_of_kernels_is_exchanged_and_comes_back():
    model = Model()
    kernelize(model.last)
    before = state_of(model)
    assert result(model) == 2 * STOCK
    assert len(vk.patch(model)) == 2
    assert result(model) == PATCHED
    vk.unpatch(model)
    assert state_of(model) == before
    assert result(model) == 2 * STOCK
    assert len(vk.patch(model)) == 2
    assert vk.patch(model).already == ("first.1", "last")
    vk.unpatch(model)
    assert state_of(model) == before


@pytest.mark.parametrize(
    "own", [lambda module: doubled, lambda module: MethodType(times_two, module)], ids=["function", "method"]
)
def test_a_forward_that_the_user_has_set_is_left_alone(own):
    model = Model()
    model.last.forward = own(model.last)
    before = dict(model.last.__dict__)
    report = vk.patch(model)
    assert [one.name for one in report.replaced] == ["first.1"]
    assert report.skipped == ("last",)
    assert "last     left alone: its forward is overridden" in str(report)
    assert model.last.__dict__ == before
    assert model.last(X, X)[0].item() == 4
    with pytest.raises(ValueError, match="the forward of '' is overridden"):
        vk.patch(model.last)


def test_a_forward_of_another_module_is_left_alone():
    model = Model()
    model.last.forward = Attention().forward
    assert vk.patch(model).skipped == ("last",)


def test_hooks_of_accelerate_go_on_being_called():
    hooks = pytest.importorskip("accelerate.hooks")
    called = []

    class Hook(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            called.append(module)
            return args, kwargs

    model = Model()
    hooks.add_hook_to_module(model.last, Hook())
    assert vk.patch(model).skipped == ("last",)
    result(model)
    assert called == [model.last]
    vk.unpatch(model)
    hooks.remove_hook_from_module(model.last)  # leaves the stock `forward`, bound, in the instance
    before = state_of(model)
    assert len(vk.patch(model)) == 2
    assert result(model) == PATCHED
    hooks.add_hook_to_module(model.last, Hook())  # after `patch` it wraps the operator
    assert result(model) == PATCHED
    assert called == [model.last, model.last]
    hooks.remove_hook_from_module(model.last)
    vk.unpatch(model)
    assert state_of(model) == before


def test_a_held_function_is_exchanged_under_any_forward(monkeypatch):
    row = dataclasses.replace(ROW, place="attribute", name="core")
    monkeypatch.setattr(integrations, "_TABLE", (row,))
    model = Attention()
    model.core = doubled
    model.forward = lambda value, weights: model.core(value, weights)
    assert len(vk.patch(model)) == 1
    assert model(X, X)[0].item() == 101


def test_a_copy_restores_a_bound_forward_to_itself():
    model = Model()
    model.last.forward = model.last.forward  # a bound method in the instance's dict
    vk.patch(model)
    twin = copy.deepcopy(model)
    vk.unpatch(twin)
    assert twin.last.__dict__["forward"].__self__ is twin.last
