"""Vision transformers of transformers, patched: what runs, what it returns, and that it can be taken back."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from models.tiny_vits import CASES, cast, outputs, relative_error
from torch import nn
from torch._subclasses import FakeTensorMode

import visionkernels as vk
from visionkernels.integrations import _vit

NAMES = (
    "vit", "deit", "dinov2", "dinov2-swiglu", "registers", "dinov3", "dinov3-gated", "clip-full", "siglip", "beit",
    "beit-shared",
)  # fmt: skip
OPERATORS = ("attention", "layer_norm", "linear", "gated_linear")


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """The models here are small: as if the host were fast enough for them."""
    monkeypatch.setattr(_vit, "FEW_NUMBERS", 0)
    return monkeypatch


@pytest.fixture
def ran(monkeypatch):
    """How often each operator was called by what `patch` puts into a model."""
    counts = dict.fromkeys(OPERATORS, 0)

    def count(name):
        operator = getattr(_vit, name)

        def counted(*args, **kwargs):
            counts[name] += 1
            return operator(*args, **kwargs)

        return counted

    for name in OPERATORS:
        monkeypatch.setattr(_vit, name, count(name))
    return counts


def pixels(dtype=torch.float32, device="cpu"):
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device, dtype)


def build(name, dtype=torch.float32, device="cpu"):
    torch.manual_seed(0)
    return cast(CASES[name].build(), dtype).to(device)


def tensors_of(case, model, images):
    """Every tensor that a model returns, hidden states among them."""
    found = outputs(case, model, images, hidden_states=True)
    return [t for value in found.values() for t in (value if isinstance(value, tuple) else (value,))]


def state_of(model):
    return {name: (type(module), dict(module.__dict__)) for name, module in model.named_modules()}


def largest_error(case, got, wanted):
    assert len(got) == len(wanted) > 4
    return max(relative_error(a, b) for a, b in zip(got, wanted, strict=True))


# what it computes


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_returns_what_the_stock_one_does(name, device, ran):
    case, model, images = CASES[name], build(name, device=device), pixels(device=device)
    stock = tensors_of(case, model, images)
    report = vk.patch(model)
    got = tensors_of(case, model, images)
    assert largest_error(case, got, stock) <= 1e-5
    assert report.kinds["attention"] == ran["attention"] == 3
    assert report.kinds["norm"] == ran["layer_norm"]
    assert ran["linear"] + ran["gated_linear"] >= 2 * report.kinds["MLP"] >= 6
    assert not report.skipped
    assert not report.unfit


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_halves_lose_at_most_twice_what_the_stock_model_loses(name, half, device, ran):
    case = CASES[name]
    model = build(name, half, device)
    exact = cast(copy.deepcopy(model), torch.float64)
    truth = tensors_of(case, exact, pixels(half, device).double())
    stock = largest_error(case, tensors_of(case, model, pixels(half, device)), truth)
    vk.patch(model)
    got = tensors_of(case, model, pixels(half, device))
    assert {tensor.dtype for tensor in got} == {half}
    assert largest_error(case, got, truth) <= 2 * stock + torch.finfo(half).eps
    assert ran["attention"] == 3
    assert ran["layer_norm"]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, device, ran):
    case, model, images = CASES[name], build(name, device=device), pixels(device=device)
    truth = tensors_of(case, cast(copy.deepcopy(model), torch.float64), images.double())
    with torch.autocast(device.type, torch.bfloat16):
        stock = tensors_of(case, model, images)
        vk.patch(model)
        got = tensors_of(case, model, images)
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in stock]
    assert largest_error(case, got, truth) <= 2 * largest_error(case, stock, truth) + torch.finfo(torch.bfloat16).eps
    assert ran["attention"] == 3
    assert ran["linear"]
    assert not ran["layer_norm"]  # which autocast has in float32


@pytest.mark.parametrize("original", ["sdpa", "eager"])
@pytest.mark.gpu
def test_few_images_on_a_gpu_are_upstreams_but_in_a_cuda_graph(original, few, ran):
    device = torch.device("cuda")
    model, images = build("vit", torch.float16, device), pixels(torch.float16, device)
    model.set_attn_implementation(original)
    with torch.no_grad():
        stock = model(images).last_hidden_state
        vk.patch(model)
        model(images)  # nothing can be compiled while a graph is captured
        few.setattr(_vit, "FEW_NUMBERS", 2**30)
        ran.update(dict.fromkeys(ran, 0))
        got = model(images).last_hidden_state
        assert not ran["layer_norm"] + ran["linear"]
        assert ran["attention"] == (3 if original == "eager" else 0)  # upstream's eager one is slow
        if original == "eager":
            return  # transformers makes a mask for it that no graph can hold, patched or not
        assert torch.equal(got, stock)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            model(images)
    assert ran["layer_norm"]
    assert ran["linear"]
    assert ran["attention"]


@pytest.mark.parametrize(
    ("numel", "dtype", "device", "waits"),
    [
        (2**20, torch.float16, "cuda", True),
        (2**24, torch.float16, "cuda", False),
        (2**20, torch.float32, "cuda", True),
        (2**22, torch.float32, "cuda", False),
        (2**10, torch.float16, "cpu", False),
    ],
)
def test_which_inputs_wait_for_the_host(monkeypatch, numel, dtype, device, waits):
    monkeypatch.undo()
    with FakeTensorMode():
        input = torch.empty(numel, dtype=dtype, device=device)
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert _vit.waits_for_the_host(input) is (waits and not capturing)


def test_masks_and_what_is_left_to_upstream(ran):
    model = build("vit")
    module = model.get_submodule(vk.patch(model).replaced[0].name)
    query, key, value = torch.randn(3, 2, 4, 9, 16).unbind(0)
    mask = torch.rand(2, 1, 9, 9) > 0.3
    mask[:, :, 0] = True

    def sdpa(**options):
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, **options).transpose(1, 2)

    for given in (None, mask, torch.randn(1, 4, 9, 9)):
        got, weights = _vit.attention_forward(module, query, key, value, given, scaling=0.3)
        torch.testing.assert_close(got, sdpa(attn_mask=given, scale=0.3))
        assert weights is None
    assert ran["attention"] == 3
    got, _ = _vit.attention_forward(module, query, key, value, None, is_causal=True)
    torch.testing.assert_close(got, sdpa(is_causal=True))
    _vit.attention_forward(module, query, key, value, None, dropout=0.5)
    assert ran["attention"] == 3


@pytest.mark.parametrize("original", ["sdpa", "eager"])
def test_what_runs_where_gradients_are_asked_for_is_upstreams_own(original, ran):
    """To the bit, also where the model was made with another attention."""
    stock, patched = build("dinov2"), build("dinov2")
    for model in (stock, patched):
        model.set_attn_implementation(original)
    vk.patch(patched)
    for model in (stock, patched):
        model(pixels()).last_hidden_state.square().sum().backward()
    gradients = [{name: p.grad for name, p in model.named_parameters()} for model in (stock, patched)]
    assert sum(gradient is not None for gradient in gradients[0].values()) > 40
    for name, gradient in gradients[0].items():
        assert (gradient is None) == (gradients[1][name] is None)
        assert gradient is None or torch.equal(gradient, gradients[1][name])
    assert not any(ran.values())


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_eager_attention_gives_its_weights_where_they_are_asked_for(name, ran):
    case, model = CASES[name], build(name)
    model.set_attn_implementation("eager")
    vision = getattr(model, "vision_model", model)
    stock = vision(pixels(), output_attentions=True)
    vk.patch(model)
    got = vision(pixels(), output_attentions=True)
    assert len(got.attentions) == len(stock.attentions) == 3
    for ours, theirs in zip(got.attentions, stock.attentions, strict=True):
        assert relative_error(ours, theirs) <= 1e-5
    assert ran["attention"] == 0
    outputs(case, model, pixels(), hidden_states=True)
    assert ran["attention"] == 3
    vision.config.output_attentions = True
    assert len(vision(pixels()).attentions) == 3
    assert ran["attention"] == 3


@torch.no_grad()
def test_sdpa_has_no_weights_patched_or_not(ran):
    model = build("vit")
    assert model(pixels(), output_attentions=True).attentions == ()
    vk.patch(model)
    assert model(pixels(), output_attentions=True).attentions == ()
    assert ran["attention"] == 3


def test_frozen_weights_ask_for_no_gradients_but_an_input_may(ran):
    model = build("vit").requires_grad_(False)
    vk.patch(model)
    model(pixels())
    before = dict(ran)
    assert all(before[name] for name in ("attention", "layer_norm", "linear"))
    images = pixels().requires_grad_()
    model(images).last_hidden_state.sum().backward()
    assert images.grad.abs().max() > 0
    assert ran == before


@torch.no_grad()
def test_active_dropout_is_upstreams(ran):
    case = CASES["vit"]
    model = copy.deepcopy(case).build(attention_probs_dropout_prob=0.9)
    vk.patch(model)
    model.train()
    model(pixels())
    assert ran["attention"] == 0
    assert ran["linear"]
    model.eval()
    model(pixels())
    assert ran["attention"] == 3


# what keeps working


@torch.no_grad()
def test_hooks_are_called(ran):
    model = build("vit")
    report = vk.patch(model)
    seen = []
    for one in report.replaced:
        model.get_submodule(one.name).register_forward_hook(lambda module, *_, name=one.name: seen.append(name))
    model(pixels())
    assert sorted(seen) == sorted(one.name for one in report.replaced)
    linears = ran["linear"]
    name = next(one.name for one in report.replaced if one.kind == "MLP")
    model.get_submodule(name).fc1.register_forward_hook(lambda *_: seen.append("fc1"))
    seen.clear()
    model(pixels())
    assert seen.count("fc1") == 1
    assert ran["linear"] == 2 * linears - 2  # that MLP is upstream's


@torch.no_grad()
def test_layers_that_were_exchanged_are_called(ran):
    """As adapters and quantisation exchange them, before or after."""
    model = build("vit")
    report = vk.patch(model)

    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    mlp = model.get_submodule(next(one.name for one in report.replaced if one.kind == "MLP"))
    mlp.fc2.__class__ = Scaled
    got = model(pixels()).last_hidden_state
    vk.unpatch(model)
    assert relative_error(got, model(pixels()).last_hidden_state) <= 1e-6


def test_names_and_types_stay():
    model = build("vit")
    keys, shown, kinds = list(model.state_dict()), repr(model), [type(m).__name__ for m in model.modules()]
    report = vk.patch(model)
    assert list(model.state_dict()) == keys
    assert repr(model) == shown
    assert [type(m).__name__ for m in model.modules()] == kinds
    assert sum(isinstance(m, nn.LayerNorm) for m in model.modules()) == report.kinds["norm"] == 7
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", NAMES)
def test_unpatch_reverts_exactly(name):
    model = build(name)
    before = state_of(model)
    vk.patch(model)
    assert state_of(model) != before
    assert len(vk.patch(model)) == 0
    vk.unpatch(model)
    assert state_of(model) == before
    with vk.patched(model):
        assert state_of(model) != before
    assert state_of(model) == before


@torch.no_grad()
def test_models_that_share_a_config_are_patched_one_by_one(ran):
    first = build("vit")
    second = type(first)(first.config).eval()
    vk.patch(first)
    second(pixels())
    assert not any(ran.values())
    first(pixels())
    assert ran["attention"] == 3
    ran["attention"] = 0
    vk.patch(second)
    vk.unpatch(first)
    first(pixels())
    assert ran["attention"] == 0
    second(pixels())
    assert ran["attention"] == 3


@torch.no_grad()
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_patched_and_has_its_own_weights(duplicate, ran):
    model = build("vit")
    before = state_of(model)
    vk.patch(model)
    twin = duplicate(model)
    for parameter in twin.parameters():
        parameter.mul_(0.5)
    twin(pixels())
    assert ran["attention"] == 3
    got = twin(pixels()).last_hidden_state
    vk.unpatch(twin)
    ran["attention"] = 0
    assert relative_error(got, twin(pixels()).last_hidden_state) <= 1e-5
    assert ran["attention"] == 0
    assert relative_error(got, model(pixels()).last_hidden_state) > 1e-2
    vk.unpatch(model)
    assert state_of(model) == before


def test_a_pickled_model_runs_in_a_fresh_process(tmp_path):
    model = build("vit")
    vk.patch(model)
    torch.save(model, tmp_path / "model.pt")
    with torch.no_grad():
        expected = model(pixels()).last_hidden_state
    torch.save((pixels(), expected), tmp_path / "expected.pt")
    script = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "images, expected = torch.load(sys.argv[2])\n"
        "with torch.no_grad(): torch.testing.assert_close(model(images).last_hidden_state, expected)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "model.pt", tmp_path / "expected.pt"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_patched_model_is_saved_like_a_stock_one(tmp_path):
    model = build("dinov2-swiglu")
    model.save_pretrained(tmp_path / "stock")
    vk.patch(model)
    model.save_pretrained(tmp_path / "patched")
    files = {path.name: path.read_bytes() for path in (tmp_path / "stock").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "patched").iterdir()} == files
    loaded = type(model).from_pretrained(tmp_path / "patched").eval()
    with pytest.raises(ValueError, match="expected a patched model"):
        vk.unpatch(loaded)


@torch.no_grad()
def test_conversion_after_patching(ran):
    model = build("vit")
    vk.patch(model)
    assert model.double()(pixels().double()).last_hidden_state.dtype == torch.float64
    assert ran["attention"] == 3


@pytest.mark.parametrize("general", [False, True], ids=["its own", "of all"])
def test_the_precision_of_float32_is_known_to_compiled_code(general):
    """Dynamo reads neither of the process's settings by itself, one of which raises once the other was used."""
    own = torch.backends.cuda.matmul
    setting = torch.backends if general else own
    before = torch.backends.fp32_precision, own.fp32_precision
    call = torch.compile(lambda x: x + 1 if _vit._float32_precision() == "tf32" else x, fullgraph=True, backend="eager")
    try:
        own.fp32_precision = "none"
        for precision, expected in (("tf32", 1), ("ieee", 0), ("tf32", 1)):
            setting.fp32_precision = precision
            assert call(torch.zeros(())) == expected
    finally:
        torch.backends.fp32_precision, own.fp32_precision = before


def test_torch_compile(ran):
    model = build("vit")
    vk.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        got = compiled(pixels()).last_hidden_state
        assert relative_error(got, model(pixels()).last_hidden_state) <= 1e-5


# what is replaced


@torch.no_grad()
def test_the_text_half_is_left_alone(ran):
    model = build("clip-full")
    report = vk.patch(model)
    assert all("vision_model" in one.name for one in report.replaced)
    assert report.kinds == {"attention": 3, "norm": 8, "MLP": 3}
    before = dict(ran)
    model.text_model(torch.arange(9)[None])
    assert ran == before


def test_the_report_is_short():
    lines = str(vk.patch(build("vit"))).splitlines()
    assert lines[0] == "ViTModel: 13 modules replaced: 3 attentions, 7 norms, 3 MLPs"
    assert lines[1].split() == ["layers.*.attention", "ViTAttention.config,", "attention,", "3x"]
    assert lines[-1].strip().startswith("attention, norms and MLPs compute no gradients")
    assert len(lines) == 7


def test_a_backbone_beside_a_detectors_operator():
    from transformers import Dinov2Backbone, Dinov2Config
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

    config = Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32, patch_size=8)
    model = nn.ModuleDict({"backbone": Dinov2Backbone(config).eval(), "attention": MultiScaleDeformableAttention()})
    with torch.no_grad():
        stock = model["backbone"](pixels()).feature_maps[0]
        before = state_of(model)
        report = vk.patch(model)
        assert report.kinds == {"attention": 2, "norm": 5, "MLP": 2}
        assert [one.name for one in report.replaced if not one.kind] == ["attention"]
        assert relative_error(model["backbone"](pixels()).feature_maps[0], stock) <= 1e-5
    vk.unpatch(model)
    assert state_of(model) == before


def test_an_activation_that_is_not_known_is_left_alone_and_said(ran):
    model = CASES["vit"].build(hidden_act="relu")
    report = vk.patch(model)
    assert report.kinds == {"attention": 3, "norm": 7}
    assert [name for name, _ in report.unfit] == [f"layers.{i}.mlp" for i in range(3)]
    assert "left alone: its activation ReLU is not known" in str(report)
    with torch.no_grad():
        model(pixels())
    assert not ran["linear"]
    with pytest.raises(ValueError, match="is left alone, since its activation ReLU"):
        vk.patch(CASES["vit"].build(hidden_act="relu").layers[0].mlp)


def test_a_subclass_with_its_own_forward_is_left_alone():
    model = build("vit")
    norm = model.layernorm
    norm.__class__ = type("Other", (nn.LayerNorm,), {"forward": lambda self, x: x})
    report = vk.patch(model)
    assert report.skipped == ("layernorm",)
    assert type(norm).__name__ == "Other"


def test_an_upstream_that_was_written_anew_is_an_error_and_changes_nothing():
    model = build("vit")
    model.layers[2].mlp.dropout = nn.Dropout()
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"ViTMLP of transformers .* is made of .*dropout, which no adapter"):
        vk.patch(model)
    assert state_of(model) == before


def test_a_module_of_none_of_the_families_is_an_error():
    with pytest.raises(ValueError, match=r"nothing to patch in Linear.*ViT, DeiT, DINOv2.*BEiT"):
        vk.patch(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="nothing to patch in LayerNorm"):
        vk.patch(nn.LayerNorm(4))


def test_the_attention_can_be_named_by_hand(ran):
    _vit.register()
    model = build("vit")
    with torch.no_grad():
        stock = model(pixels()).last_hidden_state
        model.set_attn_implementation(_vit.NAME)
        assert relative_error(model(pixels()).last_hidden_state, stock) <= 1e-5
    assert ran["attention"] == 3
    model(pixels()).last_hidden_state.sum().backward()
    assert ran["attention"] == 3
