"""What a patched model of transformers goes through: precisions, copies, checkpoints, training, and back."""

import copy
import functools
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import visionkernels as vk

pytest.importorskip("transformers")

from integrations import tiny_detectors
from integrations.comparison import attention_of, error_of, parameters_of, run, stock_of, tensors_of, truth_of, usable

MODELS = parameters_of(tiny_detectors.NAMES)
LAYOUTS = ["deformable_detr", "rt_detr_v2", "d_fine_points", "mask2former", "oneformer"]  # one of each
OUTER = LAYOUTS[1:]  # what is patched is the attention with its weights


def state_of(model):
    """Return every module's class and entries."""
    return {key: (type(module), dict(module.__dict__)) for key, module in model.named_modules()}


def globals_of(model):
    """Return the names of the modeling file, the classes' entries among them."""
    scope = vars(sys.modules[type(model).__module__])
    classes = {name: dict(vars(entry)) for name, entry in scope.items() if isinstance(entry, type)}
    return dict(scope), classes


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_the_model(name):
    model, _ = tiny_detectors.build(name)
    before, keys, text = state_of(model), list(model.state_dict()), repr(model)
    upstream = globals_of(model)
    report = vk.patch(model)
    assert len(report) == len(attention_of(model)) > 0
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert state_of(model) != before
    vk.unpatch(model)
    assert state_of(model) == before
    assert globals_of(model) == upstream


@pytest.mark.parametrize("name", LAYOUTS)
def test_two_models_patched_one_not(name, calls):
    (first, inputs), (second, _), (stock, _) = (tiny_detectors.build(name) for _ in range(3))
    vk.patch(first)
    vk.patch(second)
    with torch.no_grad():
        for model, expected in ((stock, 0), (first, len(attention_of(first))), (second, len(attention_of(first)))):
            calls.clear()
            model(**inputs)
            assert len(calls) == expected
        vk.unpatch(first)
        for model, expected in ((first, 0), (second, len(attention_of(first)))):
            calls.clear()
            model(**inputs)
            assert len(calls) == expected


def check_against_stock(calls, relative):
    assert calls
    for call in calls:
        expected = stock_of(call)
        assert (call.out.double() - expected).abs().max() <= relative * expected.abs().max()


MIXED = {"grounding_dino", "mm_grounding_dino", "lw_detr", "rf_detr", "d_fine", "deimv2"}  # locations stay in float32


@pytest.mark.parametrize("name", MODELS)
def test_autocast(name, calls):
    model, inputs = tiny_detectors.build(name)
    vk.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = list(tensors_of(model(**inputs)))
    sum(out[usable(out)].float().sum() for out in outputs).backward()
    assert {call.value.dtype for call in calls} == {call.out.dtype for call in calls} == {torch.bfloat16}
    mixed = tiny_detectors.model_type(name) in MIXED
    assert any(call.locations.dtype is torch.float32 for call in calls) == mixed
    check_against_stock(calls, 2 * torch.finfo(torch.bfloat16).eps)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def cast(inputs, dtype):
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in inputs.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*LAYOUTS, "lw_detr", "d_fine_discrete"])
def test_half_precision_models(name, dtype, calls):
    model, inputs = tiny_detectors.build(name)
    vk.patch(model)
    model.half() if dtype is torch.float16 else model.to(dtype)
    with torch.no_grad():
        model(**cast(inputs, dtype))
    assert {call.value.dtype for call in calls} == {call.out.dtype for call in calls} == {dtype}
    check_against_stock(calls, 2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_patched_model_is_saved_like_a_stock_one(name, tmp_path):
    model, inputs = tiny_detectors.build(name)
    model.save_pretrained(tmp_path / "stock")
    vk.patch(model)
    model.save_pretrained(tmp_path / "patched")
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "patched").iterdir()} == files
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    with torch.no_grad():
        for got, expected in zip(tensors_of(loaded(**inputs)), tensors_of(model(**inputs)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected a patched model"):
        vk.unpatch(loaded)


def attention_parents_of(model):
    """Return the modules that make the attention weights."""
    return [module for module in model.modules() if isinstance(getattr(module, "attention_weights", None), nn.Linear)]


def flatten(attention):
    """Make all attention weights alike."""
    attention.attention_weights.weight.zero_()
    attention.attention_weights.bias.zero_()


def through_a_file(model, path):
    torch.save(model, path)
    return torch.load(path, weights_only=False)


DUPLICATES = {
    "deepcopy": lambda model, path: copy.deepcopy(model),
    "pickle": lambda model, path: pickle.loads(pickle.dumps(model)),
    "pickle0": lambda model, path: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": through_a_file,
}


@pytest.mark.parametrize("duplicate", DUPLICATES.values(), ids=list(DUPLICATES))
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_copy_is_patched_and_unpatched_on_its_own(name, duplicate, tmp_path, calls):
    model, inputs = tiny_detectors.build(name)
    stock = state_of(model)
    vk.patch(model)
    try:
        twin = duplicate(model, tmp_path / "model.pt")
    except AttributeError:
        vk.unpatch(model)
        with pytest.raises(AttributeError, match="output_capturing_hook"):
            duplicate(model, tmp_path / "model.pt")
        pytest.skip("upstream's backbone cannot be pickled: it holds a local function")
    with torch.no_grad():
        for module in attention_parents_of(twin):
            flatten(module)  # so that a method bound to the original is seen
        twin(**inputs)
        assert len(calls) == len(attention_of(model))
        assert all(call.weights.std() < 1e-6 for call in calls)
        vk.unpatch(twin)
        calls.clear()
        twin(**inputs)
        assert not calls
        assert [type(module) for module in twin.modules()] == [cls for cls, _ in stock.values()]
        assert [set(module.__dict__) for module in twin.modules()] == [set(entries) for _, entries in stock.values()]
        model(**inputs)
        assert len(calls) == len(attention_of(model))
    vk.unpatch(model)
    assert state_of(model) == stock


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_attention_is_pickled_with_its_patch(name):
    model, _ = tiny_detectors.build(name)
    report = vk.patch(model)
    module = model.get_submodule(report.replaced[0].name)
    twin = pickle.loads(pickle.dumps(module))
    assert type(twin) is type(module)
    assert twin.state_dict().keys() == module.state_dict().keys()
    vk.unpatch(model)
    vk.unpatch(twin)
    assert type(twin) is type(module)
    assert twin.__dict__.keys() == module.__dict__.keys()


@pytest.mark.parametrize("name", OUTER)
def test_a_data_parallel_replica_uses_its_own_weights(name, calls):
    model, inputs = tiny_detectors.build(name)
    outer = model.get_submodule(vk.patch(model).replaced[0].name)
    seen = []
    handle = outer.register_forward_pre_hook(lambda module, *call: seen.append(call), with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
        handle.remove()
        replica = outer._replicate_for_data_parallel()
        for key, child in outer.named_children():
            replica._modules[key] = copy.deepcopy(child)
        flatten(replica)
        calls.clear()
        args, kwargs = seen[0]
        replica(*args, **kwargs)
        assert len(calls) == 1
        assert calls[0].weights.std() < 1e-6


@pytest.mark.parametrize("name", LAYOUTS)
def test_attentions_are_still_recorded(name):
    (stock, inputs), (patched, _) = tiny_detectors.build(name), tiny_detectors.build(name)
    vk.patch(patched)
    with torch.no_grad():
        expected = list(tensors_of(stock(**inputs, output_attentions=True)))
        got = list(tensors_of(patched(**inputs, output_attentions=True)))
    assert [tensor.shape for tensor in got] == [tensor.shape for tensor in expected]


def test_upstreams_gradient_checkpointing(calls):
    model, inputs = tiny_detectors.build("deformable_detr", torch.float64)  # few of the models support it
    vk.patch(model)
    # renamed after 5.17
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()  # checkpointing is off otherwise; there is no dropout, and the batch norms are frozen
    result = run(model, inputs)
    assert len(calls) == 8  # four in the forward, four in the backward
    assert max(error_of("deformable_detr", truth_of("deformable_detr")[0], result)) <= 1e-9


@pytest.mark.parametrize("name", OUTER)
def test_gradient_checkpointing(name, calls):
    model, inputs = tiny_detectors.build(name, torch.float64)
    vk.patch(model)
    for attention in attention_parents_of(model):
        layer = next(module for module in model.modules() if attention in module.children())
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    result = run(model, inputs)
    assert len(calls) == 2 * len(attention_of(model))
    assert max(error_of(name, truth_of(name)[0], result)) <= 1e-9
