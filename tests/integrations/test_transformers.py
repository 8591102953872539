"""Patched and stock models of transformers agree: small random models of every family in the table."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

import visionkernels as vk
import visionkernels.integrations.transformers as table

pytest.importorskip("transformers")

from integrations import tiny_detectors
from integrations.comparison import attention_of, error_of, run, tensors_of, truth_of, usable

MODELS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            importlib.util.find_spec(f"transformers.models.{name.removesuffix('_two_stage')}") is None,
            reason="not in this version of transformers",
        ),
    )
    for name in tiny_detectors.NAMES
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small for more
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch):
    """The arguments and the result of every call of the operator by an adapter."""
    recorded = []
    operator = table.ms_deform_attn

    def record(*args):
        out = operator(*args)
        recorded.append((args, out))
        return out

    monkeypatch.setattr(table, "ms_deform_attn", record)
    return recorded


def run_patched(name, dtype):
    model, inputs = tiny_detectors.build(name, dtype)
    assert len(vk.patch(model)) == len(attention_of(model)) > 0
    return run(model, inputs), len(attention_of(model))


@pytest.mark.parametrize("name", MODELS)
def test_patched_and_stock_agree(name, calls):
    patched, count = run_patched(name, torch.float64)
    assert len(calls) == count
    assert max(error_of(name, truth_of(name)[0], patched)) <= 1e-9
    for key in ("sampling_offsets", "attention_weights", "value_proj", "output_proj"):
        gradients = [grad for k, grad in patched[1].items() if k.endswith(f"{key}.weight")]
        assert gradients
        assert all(grad.abs().max() > 1e-3 for grad in gradients), key
    for call in calls:
        check_not_vacuous(*call)


def check_not_vacuous(args, out):
    value, shapes, _, locations, weights = args
    assert isinstance(shapes, (list, tuple))  # on the host: no synchronisation on a GPU
    assert out.abs().mean() > 0.01
    assert value.abs().mean() > 0.01
    assert weights.std() > 0.05
    assert ((locations > 0) & (locations < 1)).all(-1).float().mean() > 0.2
    sizes = torch.tensor([(w, h) for h, w in shapes], dtype=locations.dtype)
    pixels = locations * sizes[:, None] - 0.5
    assert pixels.flatten(0, 2).std(0).min() > 0.1
    to_line = (pixels - pixels.round()).abs()  # the gradient is not continuous on the lines between pixels
    assert to_line.min() > 1e-9
    assert (to_line < 1e-3).float().mean() < 0.02


@pytest.mark.parametrize("name", MODELS)
def test_patched_loses_no_more_than_stock_in_fp32(name, calls):
    truth = truth_of(name)[0]
    stock = run(*tiny_detectors.build(name))
    patched, count = run_patched(name, torch.float32)
    assert len(calls) == count
    assert [out.dtype for out in patched[0]] == [out.dtype for out in stock[0]]
    for lost, allowed in zip(error_of(name, truth, patched), error_of(name, truth, stock), strict=True):
        assert allowed < 1e-3  # the same proposals were chosen
        assert lost <= max(1e-4, 2 * allowed)


def swap_x_and_y(value, shapes, start, locations, weights):
    return value, shapes, start, locations.flip(-1), weights


def drop_the_last_level(value, shapes, start, locations, weights):
    return value, shapes, start, locations, weights * (torch.arange(len(shapes)) < len(shapes) - 1)[:, None]


def transpose_the_shapes(value, shapes, start, locations, weights):
    return value, [(w, h) for h, w in shapes], start, locations, weights


def halve_the_gradient_of_the_locations(value, shapes, start, locations, weights):
    return value, shapes, start, (locations + locations.detach()) / 2, weights


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "mistake", [swap_x_and_y, drop_the_last_level, transpose_the_shapes, halve_the_gradient_of_the_locations]
)
def test_the_comparison_notices_a_wrong_adapter(name, mistake, monkeypatch):
    operator = table.ms_deform_attn
    monkeypatch.setattr(table, "ms_deform_attn", lambda *args: operator(*mistake(*args)))
    forward, backward = error_of(name, truth_of(name)[0], run_patched(name, torch.float64)[0])
    assert (forward > 1e-3) == (mistake is not halve_the_gradient_of_the_locations)
    assert backward > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_unpatch_restores_the_model(name):
    model, _ = tiny_detectors.build(name)
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    keys = list(model.state_dict())
    report = vk.patch(model)
    assert len(report) == len(attention_of(model)) > 0
    assert list(model.state_dict()) == keys
    vk.unpatch(model)
    assert {key: dict(module.__dict__) for key, module in model.named_modules()} == before
    assert all("forward" not in module.__dict__ for module in attention_of(model))


def check_against_stock(calls, relative):
    """Compare every recorded call with upstream's own code in fp64."""
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    assert calls
    for (value, shapes, start, locations, weights), out in calls:
        expected = MultiScaleDeformableAttention.forward(
            None, value.double(), None, shapes, start, locations.double(), weights.double(), 64
        )
        assert (out.double() - expected).abs().max() <= relative * expected.abs().max()


@pytest.mark.parametrize("name", ["grounding_dino", "mm_grounding_dino", "lw_detr", "rf_detr"])
def test_autocast_mixes_dtypes(name, calls):
    model, inputs = tiny_detectors.build(name)
    vk.patch(model)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = list(tensors_of(model(**inputs)))
    sum(out[usable(out)].float().sum() for out in outputs).backward()
    assert any(args[0].dtype is torch.bfloat16 and args[3].dtype is torch.float32 for args, _ in calls)
    check_against_stock(calls, 2 * torch.finfo(torch.bfloat16).eps)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["deformable_detr", "lw_detr"])
def test_half_precision_models(name, dtype, calls):
    model, inputs = tiny_detectors.build(name)
    vk.patch(model)
    model.to(dtype)
    with torch.no_grad():
        model(**inputs | {"pixel_values": inputs["pixel_values"].to(dtype)})
    assert {args[0].dtype for args, _ in calls} == {out.dtype for _, out in calls} == {dtype}
    check_against_stock(calls, 2 * torch.finfo(dtype).eps)


def test_two_models_patched_one_not(calls):
    (first, inputs), (second, _), (stock, _) = (tiny_detectors.build("deformable_detr") for _ in range(3))
    vk.patch(first)
    vk.patch(second)
    with torch.no_grad():
        for model, expected in ((stock, 0), (first, 4), (second, 4)):
            calls.clear()
            model(**inputs)
            assert len(calls) == expected


def test_a_patched_model_is_saved_like_a_stock_one(tmp_path):
    model, inputs = tiny_detectors.build("deformable_detr")
    model.save_pretrained(tmp_path / "stock")
    vk.patch(model)
    model.save_pretrained(tmp_path / "patched")
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "patched").iterdir()} == files
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    with pytest.raises(ValueError, match="expected a patched model"):
        vk.unpatch(loaded)


def test_torch_save_keeps_the_patch(tmp_path, calls):
    model, inputs = tiny_detectors.build("deformable_detr")
    vk.patch(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    with torch.no_grad():
        loaded(**inputs)
    assert len(calls) == 4
    vk.unpatch(loaded)


def test_gradient_checkpointing(calls):
    model, inputs = tiny_detectors.build("deformable_detr", torch.float64)
    vk.patch(model)
    # renamed after 5.17
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()  # checkpointing is off otherwise; there is no dropout, and the batch norms are frozen
    result = run(model, inputs)
    assert len(calls) == 8  # four in the forward, four in the backward
    assert max(error_of("deformable_detr", truth_of("deformable_detr")[0], result)) <= 1e-9


def test_compile_sees_the_patch(calls):
    model, _ = tiny_detectors.build("deformable_detr")
    attention = attention_of(model)[0]
    value, weights = torch.randn(2, 10, 2, 4), torch.rand(2, 3, 2, 2, 2)
    locations = torch.rand(2, 3, 2, 2, 2, 2)
    shapes = [(2, 3), (1, 4)]
    args = (value, torch.tensor(shapes), shapes, torch.tensor([0, 6]), locations, weights, 64)
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    expected = compiled(*args)
    for count in (1, 2):  # patched and unpatched after it was compiled: no graph is stale
        with vk.patched(attention):
            torch.testing.assert_close(compiled(*args), expected)
        assert len(calls) == count
        compiled(*args)
        assert len(calls) == count


def test_the_error_names_the_model_and_what_is_supported():
    import transformers

    config = transformers.ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(ValueError, match=r"nothing to patch in ViTModel, .* Deformable DETR, .*RT-DETR"):
        vk.patch(transformers.ViTModel(config))


def test_another_upstream_signature_is_refused(monkeypatch):
    model, _ = tiny_detectors.build("deformable_detr")
    monkeypatch.setattr(type(attention_of(model)[0]), "forward", lambda self, value, shapes, locations: value)
    with pytest.raises(RuntimeError, match=r"of transformers \d\S+ takes \(self, value, shapes, locations\)"):
        vk.patch(model)
    assert not any("forward" in module.__dict__ for module in attention_of(model))
