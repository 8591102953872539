"""Every family gives what transformers gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_accurate
from models.tiny_vits import CASES, FAMILY_CASES, Case, cast, outputs, relative_error, save
from torch import Tensor

from visionkernels.models import ViT

HALVES = [torch.float16, torch.bfloat16]


def check_equal(case: Case, model: torch.nn.Module, vit: ViT, pixel_values: Tensor, limit: float = 1e-5) -> None:
    wanted = outputs(case, model, pixel_values, hidden_states=True)
    with torch.no_grad():
        got = vit(pixel_values, output_hidden_states=True)
    assert len(wanted) >= 2, f"transformers returned {list(wanted)}"
    states = wanted.pop("hidden_states")
    assert len(got.hidden_states) == len(states) == vit.config.num_layers + 1
    for i, (ours, theirs) in enumerate(zip(got.hidden_states, states, strict=True)):
        assert relative_error(ours, theirs) <= limit, f"hidden state {i}"
    for name, value in wanted.items():
        assert relative_error(getattr(got, name), value) <= limit, name


@pytest.mark.parametrize("name", CASES)
def test_outputs(name: str, tmp_path: Path, device: torch.device) -> None:
    case = CASES[name]
    model = save(case, tmp_path).to(device)
    vit = ViT.from_pretrained(tmp_path, device=device)
    check_equal(case, model, vit, torch.randn(3, 3, 32, 32, device=device))


@pytest.mark.parametrize("size", [(64, 64), (16, 16), (24, 56), (64, 16), (8, 8)], ids=str)
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_other_image_sizes(name: str, size: tuple[int, int], tmp_path: Path, device: torch.device) -> None:
    case = CASES[name]
    model = save(case, tmp_path).to(device)
    vit = ViT.from_pretrained(tmp_path, device=device)
    for _ in range(2):  # the second call finds the positions
        check_equal(case, model, vit, torch.randn(2, 3, *size, device=device))


SHAPES = [
    {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 1},
    {"num_hidden_layers": 5, "hidden_size": 96, "num_attention_heads": 6},
    {"patch_size": 4, "image_size": 20},
    {"patch_size": 14, "image_size": 28},
    {"patch_size": 8, "image_size": 34},  # as SigLIP has 384 and 14: what remains is left out
    {"layer_norm_eps": 1e-3},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_shapes(name: str, shape: dict, tmp_path: Path) -> None:
    case = CASES[name]
    model = save(case, tmp_path, **shape)
    side = shape.get("image_size", 32)
    check_equal(case, model, ViT.from_pretrained(tmp_path), torch.randn(1, 3, side, side))


@pytest.mark.parametrize("size", [(32, 48), (48, 48), (32, 64)], ids=str)
def test_relative_positions_of_a_rectangle(size: tuple[int, int], tmp_path: Path) -> None:
    case = CASES["beit"]
    model = save(case, tmp_path, image_size=[32, 48])
    check_equal(case, model, ViT.from_pretrained(tmp_path), torch.randn(2, 3, *size))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "quick_gelu", "silu"])
def test_activations(activation: str, tmp_path: Path) -> None:
    case = CASES["vit"]
    model = save(case, tmp_path, hidden_act=activation)
    check_equal(case, model, ViT.from_pretrained(tmp_path), torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("size", [(32, 32), (24, 56)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", [*FAMILY_CASES, "dinov2-swiglu", "deit-distilled", "beit-shared", "siglip-classifier"])
def test_half_precision(
    name: str, dtype: torch.dtype, size: tuple[int, int], tmp_path: Path, device: torch.device
) -> None:
    case = CASES[name]
    model = cast(save(case, tmp_path).to(device), dtype)
    vit = ViT.from_pretrained(tmp_path, dtype=dtype, device=device)
    pixel_values = torch.randn(4, 3, *size, device=device).to(dtype)
    theirs = outputs(case, model, pixel_values)
    truth = outputs(case, cast(model, torch.float64), pixel_values.double())
    with torch.no_grad():
        got = vit(pixel_values)
    for key in theirs:
        assert_accurate(key, getattr(got, key), truth[key], theirs[key])


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_float64(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = cast(save(case, tmp_path), torch.float64)
    vit = ViT.from_pretrained(tmp_path, dtype=torch.float64)
    check_equal(case, model, vit, torch.randn(2, 3, 24, 40, dtype=torch.float64), limit=1e-12)
