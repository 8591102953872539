"""The model as a module: its arguments, copies, dtypes, and what may be around it."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models.tiny_vits import CASES, relative_error, save
from torch import Tensor

from visionkernels.models import ViT, ViTConfig, ViTOutput, heads
from visionkernels.models.modules import Options
from visionkernels.models.positions import Positions

SHAPE = {
    "hidden_size": 32,
    "num_heads": 2,
    "num_layers": 2,
    "intermediate_size": 64,
    "image_size": (32, 32),
    "patch_size": 8,
}
CONFIGS = {
    "vit": ViTConfig("vit", **SHAPE, pooling="dense", classifier="class", labels=("a", "b")),
    "dinov3": ViTConfig("dinov3", **SHAPE, position="rotary", num_register_tokens=2, layer_scale=True),
    "siglip": ViTConfig("siglip", **SHAPE, num_class_tokens=0, pooling="attention"),
    "beit": ViTConfig("beit", **SHAPE, position=None, relative_position_bias="layer", pooling="mean_norm"),
}


@pytest.fixture(params=CONFIGS)
def vit(request: pytest.FixtureRequest) -> ViT:
    return ViT(CONFIGS[request.param])


def pictures(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 32))


def same(got: ViTOutput, wanted: ViTOutput, limit: float = 0.0) -> None:
    for ours, theirs in zip(got.tensors(), wanted.tensors(), strict=True):
        assert ours.dtype == theirs.dtype
        assert relative_error(ours, theirs) <= limit


@pytest.mark.parametrize(
    ("pixel_values", "error", "words"),
    [
        ([1, 2], TypeError, "pixel_values must be a tensor .* got list"),
        (torch.zeros(3, 32, 32), ValueError, r"must be \[B, 3, H, W\], got \[3, 32, 32\]"),
        (torch.zeros(1, 4, 32, 32), ValueError, r"must be \[B, 3, H, W\], got \[1, 4, 32, 32\]"),
        (torch.zeros(1, 3, 30, 32), ValueError, "multiples of the patch size 8, got 30 x 32"),
        (torch.zeros(1, 3, 32, 0), ValueError, "multiples of the patch size 8, got 32 x 0"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.int64), TypeError, "floating numbers or uint8, got torch.int64"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ValueError, "preprocessor_config.json"),
        (torch.zeros(1, 3, 32, 32, device="meta"), ValueError, "on cpu like the model, got meta"),
        (torch.zeros(1, 3, 32, 32, requires_grad=True), RuntimeError, "^ViT computes no gradients"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_pixels(pixel_values: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words) as caught:
        ViT(CONFIGS["vit"])(pixel_values)
    assert "\n" not in str(caught.value)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="backend must be one of"):
        ViT(CONFIGS["vit"], backend="cuda")
    with pytest.raises(ValueError, match="precision must be one of"):
        ViT(CONFIGS["vit"], precision="fp32")


def test_gradients_are_refused_only_where_asked_for() -> None:
    vit, pixels = ViT(CONFIGS["vit"]), pictures().requires_grad_()
    with torch.no_grad():
        vit(pixels)
    with torch.inference_mode():
        vit(pixels)
    assert not vit(pixels.detach()).last_hidden_state.requires_grad


def test_weights_are_buffers(vit: ViT) -> None:
    assert not list(vit.parameters())
    assert not vit.training
    assert {name for name, _ in vit.named_buffers()} == set(vit.state_dict())


def test_no_images(vit: ViT) -> None:
    assert vit(torch.zeros(0, 3, 32, 32)).last_hidden_state.shape[0] == 0


def test_copies(vit: ViT) -> None:
    pixels = pictures(2, 3, 48, 32)
    wanted = vit(pixels)
    same(copy.deepcopy(vit)(pixels), wanted)
    same(pickle.loads(pickle.dumps(vit))(pixels), wanted)
    other = ViT(vit.config)
    other(pixels)  # what it keeps of its old weights has to go
    other.load_state_dict(vit.state_dict())
    same(other(pixels), wanted)
    copied = copy.deepcopy(vit)
    for buffer in copied.buffers():
        buffer.zero_()
    same(vit(pixels), wanted)


def test_another_dtype(vit: ViT) -> None:
    pixels = pictures(2, 3, 48, 32)
    vit(pixels)
    vit.to(torch.float64)
    wide = vit(pixels.double())
    assert wide.last_hidden_state.dtype == torch.float64
    fresh = ViT(vit.config, dtype=torch.float64)
    fresh.load_state_dict(vit.state_dict())
    same(wide, fresh(pixels.double()))


def test_positions_are_made_once_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, made = ViT(CONFIGS["vit"]), []
    make = vit._make_positions
    monkeypatch.setattr(vit, "_make_positions", lambda grid: made.append(grid) or make(grid))
    for side in (32, 48, 32, 48):
        vit(pictures(1, 3, side, 32))
    assert made == [(4, 4), (6, 4)]
    for side in range(1, 40):
        vit(pictures(1, 3, 8 * side, 8))
    assert len(vit._positions) == 32


def test_positions_of_the_own_size_are_no_copies() -> None:
    vit = ViT(CONFIGS["vit"])
    vit(pictures())
    place: Positions = vit._positions[4, 4]
    assert place.patches.untyped_storage().data_ptr() == vit.position.untyped_storage().data_ptr()


def test_large_relative_biases_are_not_kept() -> None:
    vit = ViT(CONFIGS["beit"])
    with torch.no_grad():
        for layer in vit.layers:
            layer.relative_position_bias_table.normal_()
    pixels = pictures(1, 3, 128, 128)
    lean = vit(pixels)
    assert not vit._positions[16, 16].biases
    place = vit._positions[16, 16]
    kept = [place.bias(i) for i in range(2)]
    vit._positions[16, 16] = Positions(place.prefix, biases=kept, index=place.index)
    same(vit(pixels), lean)
    assert relative_error(kept[0], kept[1]) > 0.1


def test_made_under_inference_mode() -> None:
    with torch.inference_mode():
        vit = ViT(CONFIGS["vit"])
        vit(pictures(1, 3, 48, 48))
    vit.to(torch.float64).to(torch.float32)
    vit(pictures(1, 3, 48, 48))
    assert not any(buffer.is_inference() for buffer in vit.buffers())


@pytest.mark.parametrize("name", CONFIGS)
def test_compile(name: str, device: torch.device) -> None:
    torch._dynamo.reset()
    vit = ViT(CONFIGS[name], device=device)
    compiled = torch.compile(vit, fullgraph=True, backend="aot_eager")
    for size in ((32, 32), (48, 32)):
        pixels = pictures(2, 3, *size).to(device)
        same(compiled(pixels), vit(pixels), 1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_export(name: str, device: torch.device) -> None:
    vit = ViT(CONFIGS[name], device=device)
    pixels = pictures(2, 3, 48, 32).to(device)
    dynamic = ({0: torch.export.Dim("batch", min=2, max=64)},)
    program = torch.export.export(vit, (pixels,), dynamic_shapes=dynamic)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    more = pictures(5, 3, 48, 32).to(device)
    same(torch.export.load(file).module()(more), vit(more), 1e-6)


def test_autocast_changes_nothing(vit: ViT, device: torch.device) -> None:
    vit.to(device)
    pixels = pictures().to(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        inside = vit(pixels)
        assert torch.is_autocast_enabled(device.type)
    same(inside, vit(pixels), 1e-6)


def test_the_pooling_asks_for_the_model_s_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU no kernel of Triton's runs: the requests are looked at."""
    asked = []
    for name in ("attention", "linear"):
        operator = getattr(heads, name)

        def spy(*args: object, name: str = name, operator=operator, **options: object) -> Tensor:
            asked.append((name, options.pop("backend")))
            return operator(*args, **options)

        monkeypatch.setattr(heads, name, spy)
    options = Options(1e-6, "gelu", "ieee", "auto")
    pool = ViT(CONFIGS["siglip"]).heads.pool
    monkeypatch.setattr(type(pool.output), "linear", lambda self, x, options, **_: x)
    monkeypatch.setattr(type(pool.output), "norm", lambda self, x, options: x)
    pool(torch.randn(2, 5, 32), replace(options, backend="triton"))
    assert asked == [("linear", "triton"), ("linear", "triton"), ("attention", "triton")]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "pytorch"])
def test_float32_is_exact_whatever_the_process_has_set(backend: str) -> None:
    vit = ViT(CONFIGS["siglip"], device="cuda", backend=backend)
    pixels = pictures().cuda()
    wide = copy.deepcopy(vit).to(torch.float64)
    wide.backend = "auto"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        got = vit(pixels)
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, truth in zip(got.tensors(), wide(pixels.double()).tensors(), strict=True):
        assert relative_error(ours, truth) <= 1e-5


def test_hooks_see_every_layer(device: torch.device) -> None:
    vit = ViT(CONFIGS["vit"], device=device)
    vit(pictures().to(device))
    seen = []
    handle = vit.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    for _ in range(3):
        vit(pictures().to(device))
    assert len(seen) == 3
    handle.remove()


def test_hooks_of_all_modules_see_every_layer(device: torch.device) -> None:
    vit, seen = ViT(CONFIGS["siglip"], device=device), []
    count = lambda module, *_: seen.append(type(module).__name__)  # noqa: E731
    with (
        torch.nn.modules.module.register_module_forward_hook(count),
        torch.nn.modules.module.register_module_forward_pre_hook(count),
    ):
        vit(pictures().to(device))
    assert sorted(seen) == sorted(2 * ["ViT", "Layer", "Layer", "Heads", "AttentionPool"])
    vit(pictures().to(device))
    assert len(seen) == 10


def test_a_hook_that_will_not_be_called_says_so() -> None:
    vit = ViT(CONFIGS["vit"])
    for module in (vit.patch, vit.norm, vit.layers[0].fc1, vit.heads.pooler):
        for register in (module.register_forward_hook, module.register_forward_pre_hook):
            with pytest.warns(UserWarning, match="this hook will not be called"):
                register(lambda *_: None).remove()


def test_results_are_not_views_of_all_tokens() -> None:
    output = ViT(ViTConfig("dinov2", **SHAPE, pooling="class"))(pictures())
    assert output.pooler_output.untyped_storage().nbytes() == output.pooler_output.numel() * 4


def test_uint8_pixels(tmp_path: Path, device: torch.device) -> None:
    save(CASES["vit"], tmp_path)
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(tmp_path)
    vit = ViT.from_pretrained(tmp_path, device=device)
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(x, device=device).view(3, 1, 1) for x in ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
    same(vit(pixels), vit((pixels / 255 - mean) / std), 1e-5)


@pytest.mark.parametrize(
    ("settings", "known"),
    [
        ({}, True),
        ({"do_normalize": False}, True),
        ({"do_rescale": False}, False),
        ({"rescale_factor": 1 / 127.5}, False),
    ],
    ids=str,
)
def test_uint8_pixels_need_usual_settings(settings: dict, known: bool, tmp_path: Path) -> None:
    save(CASES["vit"], tmp_path)
    from transformers import ViTImageProcessorPil

    ViTImageProcessorPil(**settings).save_pretrained(tmp_path)
    vit = ViT.from_pretrained(tmp_path)
    assert (vit.pixel_mean is not None) == known
    if "do_normalize" in settings:
        assert vit.pixel_mean == (0.0, 0.0, 0.0)
        assert vit.pixel_std == (1.0, 1.0, 1.0)


def test_bfloat16_on_a_gpu_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from visionkernels.errors import UserError
    from visionkernels.models.files import check_support

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(UserError, match=r"Old GPU .* has no bfloat16; use torch.float16"):
        check_support(torch.bfloat16, torch.device("cuda"))
    check_support(torch.bfloat16, torch.device("cpu"))
    check_support(torch.float16, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    check_support(torch.bfloat16, torch.device("cuda"))


def test_on_the_meta_device(vit: ViT) -> None:
    vit.to("meta")
    assert vit(torch.zeros(2, 3, 48, 32, device="meta")).last_hidden_state.shape[:2] == (
        2,
        24 + vit.config.num_prefix_tokens,
    )


def test_fake_tensors_and_counters_leave_nothing_behind(vit: ViT) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    pixels = pictures(2, 3, 48, 32)
    with FlopCounterMode(display=False):
        counted = vit(pixels)
    assert not vit._positions
    with FakeTensorMode(allow_non_fake_inputs=True):
        vit(torch.zeros(2, 3, 48, 32))
    assert not vit._positions
    same(vit(pixels), counted)


@pytest.mark.slow
def test_full_size_on_the_cpu(tmp_path: Path) -> None:
    """ViT-B/16 with random weights gives what transformers gives."""
    case = CASES["vit"]
    full = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    model = save(case, tmp_path, **full, image_size=224, patch_size=16)
    vit = ViT.from_pretrained(tmp_path)
    pixels = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        wanted = model(pixels)
    got = vit(pixels)
    assert relative_error(got.last_hidden_state, wanted.last_hidden_state) <= 1e-5
    assert relative_error(got.pooler_output, wanted.pooler_output) <= 1e-5
