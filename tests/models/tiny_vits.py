"""Small models of every family in transformers, with weights that are not near zero, and what they return."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 99,
}


@dataclass(frozen=True)
class Case:
    """A model: its class, the class of its config, and what differs from `SHAPE` there."""

    model: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    interpolates: bool = False  # whether other sizes than its own have to be asked for

    def build(self, **shape: Any) -> torch.nn.Module:
        """The model, in evaluation mode."""
        settings = {**SHAPE, **shape, **self.changes}
        if self.config.startswith("Dinov2"):
            settings.pop("intermediate_size")
        if self.config in ("CLIPConfig", "SiglipConfig"):
            top = {name: settings.pop(name) for name in ("num_labels", "projection_dim") if name in settings}
            settings = {"text_config": TEXT, "vision_config": settings, **top}
        model = getattr(transformers, self.model)(getattr(transformers, self.config)(**settings))
        redraw(model)
        return model.eval()


SHAPE = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 80,
    "image_size": 32,
    "patch_size": 8,
}
LABELS = {"num_labels": 5}
CASES = {
    "vit": Case("ViTModel", "ViTConfig", {}, True),
    "vit-no-qkv-bias": Case("ViTModel", "ViTConfig", {"qkv_bias": False, "pooler_output_size": 24}, True),
    "vit-classifier": Case("ViTForImageClassification", "ViTConfig", LABELS, True),
    "vit-masked": Case("ViTForMaskedImageModeling", "ViTConfig", {"encoder_stride": 8}, True),
    "deit": Case("DeiTModel", "DeiTConfig", {}, True),
    "deit-classifier": Case("DeiTForImageClassification", "DeiTConfig", LABELS, True),
    "deit-distilled": Case("DeiTForImageClassificationWithTeacher", "DeiTConfig", LABELS, True),
    "dinov2": Case("Dinov2Model", "Dinov2Config", {"mlp_ratio": 2}),
    "dinov2-swiglu": Case("Dinov2Model", "Dinov2Config", {"use_swiglu_ffn": True}),
    "dinov2-classifier": Case("Dinov2ForImageClassification", "Dinov2Config", LABELS),
    "registers": Case("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig"),
    "registers-classifier": Case("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", LABELS),
    "dinov3": Case("DINOv3ViTModel", "DINOv3ViTConfig", {"num_register_tokens": 4}),
    "dinov3-gated": Case("DINOv3ViTModel", "DINOv3ViTConfig", {"use_gated_mlp": True, "hidden_act": "silu"}),
    "dinov3-key-bias": Case("DINOv3ViTModel", "DINOv3ViTConfig", {"key_bias": True, "proj_bias": False}),
    "clip": Case("CLIPVisionModel", "CLIPVisionConfig", {}, True),
    "clip-projection": Case("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 24}, True),
    "clip-full": Case("CLIPModel", "CLIPConfig", {"projection_dim": 24}, True),
    "clip-classifier": Case("CLIPForImageClassification", "CLIPConfig", LABELS, True),
    "siglip": Case("SiglipVisionModel", "SiglipVisionConfig", {}, True),
    "siglip-full": Case("SiglipModel", "SiglipConfig", {}, True),
    "siglip-classifier": Case("SiglipForImageClassification", "SiglipConfig", LABELS, True),
    "beit": Case("BeitModel", "BeitConfig", {"use_relative_position_bias": True}),
    "beit-shared": Case(
        "BeitModel",
        "BeitConfig",
        {
            "use_shared_relative_position_bias": True,
            "use_absolute_position_embeddings": True,
            "layer_scale_init_value": 0.0,
            "use_mean_pooling": False,
        },
    ),
    "beit-classifier": Case("BeitForImageClassification", "BeitConfig", {"use_relative_position_bias": True, **LABELS}),
    "beit-masked": Case(
        "BeitForMaskedImageModeling", "BeitConfig", {"use_relative_position_bias": True, "use_mask_token": True}
    ),
}
FAMILY_CASES = ("vit", "deit", "dinov2", "registers", "dinov3", "clip-full", "siglip", "beit")  # one of each family


def redraw(model: torch.nn.Module) -> None:
    """Weights by fan-in, scales near one, all else of order one: a fresh model computes next to nothing."""
    for name, parameter in model.named_parameters():
        noise = torch.randn_like(parameter)
        if "lambda" in name or (parameter.dim() == 1 and "norm" in name and name.endswith("weight")):
            parameter.data = 1 + 0.2 * noise
        elif parameter.dim() == 1 and name.endswith("bias"):
            parameter.data = 0.2 * noise
        elif parameter.dim() >= 2 and name.endswith("weight") and "position" not in name:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = noise


def save(case: Case, directory: Path, **shape: Any) -> torch.nn.Module:
    """Build a model and save it as transformers does."""
    model = case.build(**shape)
    model.save_pretrained(directory)
    return model


def cast(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """The model in another dtype, but for DINOv3's frequencies, which transformers loads in float32."""
    kept = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    model.to(dtype)
    for name, buffer in kept.items():
        module, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(module), attribute, buffer)
    return model


@torch.no_grad()
def outputs(case: Case, model: torch.nn.Module, pixel_values: Tensor, hidden_states: bool = False) -> dict[str, Any]:
    """What the model of transformers returns, by the names of `ViTOutput`."""
    options: dict[str, Any] = {"interpolate_pos_encoding": True} if case.interpolates else {}
    if hidden_states:
        options["output_hidden_states"] = True
    if case.model in ("CLIPModel", "SiglipModel"):
        found = model.vision_model(pixel_values, **options)
    elif case.model == "BeitForMaskedImageModeling":
        found = model.beit(pixel_values, **options)
    elif case.model == "ViTForMaskedImageModeling":
        found = model.vit(pixel_values, **options)
    elif case.model == "CLIPForImageClassification":  # passes no keywords on
        options.pop("interpolate_pos_encoding")
        found = model(pixel_values, **options)
    else:
        found = model(pixel_values, **options)
    names = ("last_hidden_state", "pooler_output", "logits", "image_embeds", "hidden_states")
    result = {name: getattr(found, name, None) for name in names}
    if case.model == "CLIPModel":
        result["image_embeds"] = model.visual_projection(found.pooler_output)
    return {name: value for name, value in result.items() if value is not None}


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    assert got.shape == wanted.shape, f"{list(got.shape)}, expected {list(wanted.shape)}"
    assert got.isfinite().all()
    return ((got.double() - wanted.double()).abs().max() / wanted.double().abs().max()).item()
