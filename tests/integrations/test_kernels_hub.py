"""The layer for transformers' hook of the `kernels` package, in train and eval, and where there is no such hook."""

import importlib.metadata
import inspect

import pytest
import torch

pytest.importorskip("transformers")

from integrations import tiny_detectors
from integrations.comparison import attention_of, error_of, run, truth_of

import visionkernels as vk
from visionkernels.integrations import kernels_hub


@pytest.fixture
def kernels():
    """The package, where transformers makes use of it."""
    try:
        kernels_hub.mapping()
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))
    import kernels

    with kernels.use_kernel_mapping({}):  # what a test registers goes with the context
        yield kernels


@pytest.mark.parametrize("name", ["deformable_detr", "lw_detr"])
def test_use_kernels_serves_eval_and_train(name, kernels, calls):
    model, inputs = tiny_detectors.build(name, torch.float64)
    kernels_hub.register()
    model.set_use_kernels(True)
    count = len(attention_of(model))
    assert max(error_of(name, truth_of(name)[0], run(model, inputs))) <= 1e-9
    assert len(calls) == count
    for switch in (model.train, model.eval):
        switch()
        calls.clear()
        model(**inputs)
        assert len(calls) == count
    model.set_use_kernels(False)


@pytest.mark.filterwarnings("ignore:(?s).*No kernel mapping found")  # for the model's other layers
@pytest.mark.parametrize("mode", ["INFERENCE", "TRAINING"])
@pytest.mark.parametrize("compiled", [False, True])
def test_kernelize_serves_every_mode(mode, compiled, kernels, calls):
    model, inputs = tiny_detectors.build("rt_detr")
    mode = kernels.Mode[mode] | kernels.Mode.TORCH_COMPILE if compiled else kernels.Mode[mode]
    with kernels.use_kernel_mapping(kernels_hub.mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=mode, device="cpu", use_fallback=True)
    model(**inputs)
    assert len(calls) == len(attention_of(model))


def test_patch_hides_the_hooks_forward_and_gives_it_back(kernels):
    model, _ = tiny_detectors.build("deformable_detr")
    with kernels.use_kernel_mapping(kernels_hub.mapping(), inherit_mapping=False):
        kernels.kernelize(model, mode=kernels.Mode.INFERENCE, device="cpu")
    before = [dict(module.__dict__) for module in model.modules()]
    vk.patch(model)
    vk.unpatch(model)
    assert [dict(module.__dict__) for module in model.modules()] == before


def test_transformers_own_entry_does_not_win_on_a_gpu(kernels, monkeypatch):
    from kernels.layer import globals as state
    from kernels.layer import repos
    from transformers.integrations.hub_kernels import register_kernel_mapping_transformers

    kernels_hub.register()
    register_kernel_mapping_transformers()  # as `set_use_kernels` does
    monkeypatch.setattr(repos, "_find_capability", lambda: 90)
    for device in ("cuda", "rocm"):
        chosen = state._KERNEL_MAPPING.get()[kernels_hub.LAYER_NAME][device].repos
        assert [entry.load() for entry in chosen.values()] == [kernels_hub.MultiScaleDeformableAttention]


def test_the_layer_is_as_the_hook_wants_it():
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention as Stock

    layer = kernels_hub.MultiScaleDeformableAttention
    assert "__init__" not in vars(layer)
    assert list(inspect.signature(layer.forward).parameters) == list(inspect.signature(Stock.forward).parameters)


def test_without_the_package(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ImportError, match=r"^the package kernels is not installed; install it, or use visionkernels"):
        kernels_hub.register()


def test_with_a_package_that_transformers_does_not_take(monkeypatch):
    import transformers.integrations

    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1.0")
    monkeypatch.setattr(transformers.integrations, "use_kernel_forward_from_hub", lambda name: lambda cls: cls)
    with pytest.raises(
        RuntimeError, match=r"^transformers \S+ makes no use of kernels 0\.1\.0: it takes >=\S+,<\S+ and"
    ):
        kernels_hub.mapping()
