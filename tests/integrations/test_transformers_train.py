"""Patched models of transformers under torch.compile and Trainer, and what is refused."""

import inspect

import pytest
import torch

import visionkernels as vk

pytest.importorskip("transformers")

from integrations import tiny_detectors
from integrations.comparison import attention_of, tensors_of

LAYOUTS = ["deformable_detr", "rt_detr_v2", "rt_detr_v2_discrete", "d_fine_points", "mask2former", "oneformer"]


def call_of(module, model, inputs):
    """Return the arguments that a module of the model gets."""
    seen = []
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_compile_sees_the_patch(name, calls):
    torch.compiler.reset()
    model, inputs = tiny_detectors.build(name)
    attention = attention_of(model)[0]
    args, kwargs = call_of(attention, model, inputs)
    expected = list(tensors_of(attention(*args, **kwargs)))
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    compiled(*args, **kwargs)
    for count in (1, 2):  # patched and unpatched after it was compiled: no graph is stale
        with vk.patched(attention):
            got = list(tensors_of(compiled(*args, **kwargs)))
        assert len(calls) == count  # traced
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        compiled(*args, **kwargs)
        assert len(calls) == count


@pytest.mark.parametrize("name", ["rt_detr_v2", "d_fine_points", "mask2former"])
def test_a_whole_model_compiles(name):
    torch.compiler.reset()
    model, inputs = tiny_detectors.build(name)
    with torch.no_grad():
        expected = list(tensors_of(model(**inputs)))
        vk.patch(model)
        got = list(tensors_of(torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYOUTS)
def test_compiled_gradients(name):
    torch.compiler.reset()
    model, inputs = tiny_detectors.build(name, torch.float64)
    attention = attention_of(model)[0]
    args, kwargs = call_of(attention, model, inputs)

    def gradients(function):
        attention.zero_grad()
        leaves = [tensor.detach().requires_grad_() if is_leaf(tensor) else tensor for tensor in args]
        named = {key: one.detach().requires_grad_() if is_leaf(one) else one for key, one in kwargs.items()}
        outputs = list(tensors_of(function(*leaves, **named)))
        outputs[0].square().sum().backward()
        tensors = [*leaves, *named.values(), *attention.parameters()]
        return [tensor.grad for tensor in tensors if isinstance(tensor, torch.Tensor) and tensor.grad is not None]

    expected = gradients(attention)
    vk.patch(attention)
    got = gradients(torch.compile(attention, fullgraph=True, backend="aot_eager"))
    assert len(got) == len(expected) > 1
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def is_leaf(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.is_floating_point()


def example(name, index):
    generator = torch.Generator().manual_seed(index)
    height, width = tiny_detectors.HEIGHT, tiny_detectors.WIDTH
    pixels = torch.randn(3, height, width, generator=generator)
    if name == "mask2former":
        masks = torch.zeros(2, height, width)
        masks[0, 4:40, 8:50] = 1
        masks[1, 20:60, 60:90] = 1
        return {"pixel_values": pixels, "mask_labels": masks, "class_labels": torch.tensor([index % 5, 1])}
    boxes = 0.3 + 0.4 * torch.rand(2, 4, generator=generator)
    return {"pixel_values": pixels, "labels": {"class_labels": torch.tensor([index % 5, 1]), "boxes": boxes}}


def collate(examples):
    batch = {key: [one[key] for one in examples] for key in examples[0]}
    return batch | {"pixel_values": torch.stack(batch["pixel_values"])}


def train(name, dtype, folder, patched):
    """Train for three steps and return the losses and the trained parameters."""
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    model, _ = tiny_detectors.build(name, dtype)
    if patched:
        vk.patch(model)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        optim="sgd",
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        remove_unused_columns=False,
        dataloader_num_workers=0,
    )
    examples = [example(name, index) for index in range(4)]
    trainer = Trainer(model=model, args=arguments, train_dataset=examples, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, dict(model.named_parameters())


@pytest.fixture
def default_dtype(dtype):
    """Let tensors of no given dtype, which some losses make, have the model's."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize(
    ("name", "dtype", "allowed"),
    [
        ("deformable_detr", torch.float64, 1e-9),
        ("rt_detr_v2", torch.float64, 1e-9),
        ("d_fine_points", torch.float32, 1e-3),  # its loss knows no other dtype
        ("mask2former", torch.float64, 1e-9),
    ],
)
def test_trainer(name, dtype, allowed, tmp_path, calls):
    pytest.importorskip("accelerate")
    pytest.importorskip("scipy")
    losses, weights = train(name, dtype, tmp_path, patched=False)
    assert not calls
    patched_losses, patched_weights = train(name, dtype, tmp_path, patched=True)
    assert calls
    assert len(losses) == 3
    assert patched_losses == pytest.approx(losses, rel=allowed)
    before = dict(tiny_detectors.build(name, dtype)[0].named_parameters())
    trained = [key for key in weights if not torch.equal(weights[key], before[key])]
    assert len(trained) > len(weights) // 2
    step = sum((weights[key] - before[key]).square().sum() for key in weights).sqrt()
    apart = sum((weights[key] - patched_weights[key]).square().sum() for key in weights).sqrt()
    assert apart <= allowed * step


def test_the_error_names_the_model_and_what_is_supported():
    import transformers

    config = transformers.YolosConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match=r"nothing to patch in YolosModel, .* Deformable DETR, .*ViT, .*BEiT"):
        vk.patch(transformers.YolosModel(config))


def other_forward(self, value, shapes, locations):
    return value


def other_function(value, shapes, locations):
    return value


@pytest.mark.parametrize("name", ["deformable_detr", "d_fine", "rt_detr_v2", "mask2former"])
def test_another_upstream_signature_is_refused(name, monkeypatch):
    model, _ = tiny_detectors.build(name)
    attention = attention_of(model)[0]
    if name == "deformable_detr":
        monkeypatch.setattr(type(attention), "forward", other_forward)
    elif name == "d_fine":
        attention.ms_deformable_attn_core = other_function
    else:
        scope = inspect.unwrap(type(attention).forward).__globals__
        function = {"rt_detr_v2": "multi_scale_deformable_attention_v2"}.get(name, "multi_scale_deformable_attention")
        monkeypatch.setitem(scope, function, other_function)
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"of transformers \d\S+ takes \((self, )?value, shapes, locations\), but"):
        vk.patch(model)
    assert [(type(module), dict(module.__dict__)) for module in model.modules()] == before


def test_an_unknown_method_of_sampling_is_refused():
    model, inputs = tiny_detectors.build("rt_detr_v2")
    vk.patch(model)
    attention_of(model)[0].method = "cubic"
    with pytest.raises(ValueError, match=r"method must be one of \('default', 'discrete'\), got 'cubic'"):
        model(**inputs)


def test_the_rows_are_those_that_patch_uses():
    from visionkernels.integrations.transformers import INTEGRATIONS, ROWS

    assert len(ROWS) == len(INTEGRATIONS) == 15
    assert [row.upstream for row in ROWS] == [f"transformers: {entry.title}" for entry in INTEGRATIONS]
    assert all(row.versions and row.replaces and "patch" in row.switch_on for row in ROWS)
