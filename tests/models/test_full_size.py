"""Every family at its usual size, with random weights, beside transformers on the same GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_accurate
from models.tiny_vits import CASES, FAMILY_CASES, cast, outputs, relative_error, save

from visionkernels.models import ViT

BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "image_size": 224,
    "patch_size": 16,
}

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_float32(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = save(case, tmp_path, **BASE).cuda()
    vit = ViT.from_pretrained(tmp_path, device="cuda")
    pixels = torch.randn(2, 3, 224, 224, device="cuda")
    wanted, got = outputs(case, model, pixels), vit(pixels)
    for key, value in wanted.items():
        assert relative_error(getattr(got, key), value) <= 1e-5, key


@pytest.mark.parametrize("backend", ["auto", "triton", "pytorch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILY_CASES)
def test_half_precision(name: str, dtype: torch.dtype, backend: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = cast(save(case, tmp_path, **BASE).cuda(), dtype)
    vit = ViT.from_pretrained(tmp_path, dtype=dtype, device="cuda", backend=backend)
    pixels = torch.randn(2, 3, 224, 224, device="cuda").to(dtype)
    theirs = outputs(case, model, pixels)
    truth = outputs(case, cast(model, torch.float64), pixels.double())
    got = vit(pixels)
    for key in theirs:
        assert_accurate(key, getattr(got, key), truth[key], theirs[key])
