"""What a config.json of each family says about the model's shape."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from visionkernels.errors import UserError
from visionkernels.models.kinds import CONFIG, VISION_CONFIG, check

# config.json's model_type -> family
FAMILIES = {
    "vit": "vit",
    "deit": "deit",
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2_with_registers",
    "dinov3_vit": "dinov3",
    "clip": "clip",
    "clip_vision_model": "clip",
    "siglip": "siglip",
    "siglip_vision_model": "siglip",
    "beit": "beit",
}
# The start of an architecture's name -> model_type, for a config.json without one; the longest that fits counts.
_ARCHITECTURES = {
    "ViT": "vit",
    "DeiT": "deit",
    "Dinov2": "dinov2",
    "Dinov2WithRegisters": "dinov2_with_registers",
    "DINOv3ViT": "dinov3_vit",
    "CLIP": "clip",
    "CLIPVision": "clip_vision_model",
    "Siglip": "siglip",
    "SiglipVision": "siglip_vision_model",
    "Beit": "beit",
}
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "swish": "silu",
}
# What transformers takes for keys that a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
}
_DINOV2 = {"layer_norm_eps": 1e-6, "mlp_ratio": 4}
DEFAULTS: dict[str, dict[str, Any]] = {
    "vit": _DEFAULTS,
    "deit": _DEFAULTS,
    "dinov2": _DEFAULTS | _DINOV2 | {"patch_size": 14},
    "dinov2_with_registers": _DEFAULTS | _DINOV2 | {"num_register_tokens": 4},
    "dinov3": _DEFAULTS
    | {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "layer_norm_eps": 1e-5}
    | {"rope_theta": 100.0, "num_register_tokens": 0},
    "clip": _DEFAULTS | {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5, "patch_size": 32, "projection_dim": 512},
    "siglip": _DEFAULTS | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    "beit": _DEFAULTS | {"layer_scale_init_value": 0.1},
}


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `ViTConfig`.

    Args:
        config: The parsed config.json.

    Raises:
        UserError: If the family is none that is known, the model has what this package lacks, or a value is of another
            kind than it must be.
    """
    kind = model_type(config)
    if kind not in FAMILIES:
        raise UserError(
            f"model: config.json names the model_type {kind!r}, which is none of the vision transformers known here: "
            f"{', '.join(FAMILIES)}"
        )
    vision, config = config, _without_nulls(config)
    family = FAMILIES[kind]
    if kind in ("clip", "siglip"):  # with the text half
        vision = config.get("vision_config", {})
    check("config.json", vision, VISION_CONFIG, required=DEFAULTS[family])
    values = DEFAULTS[family] | _without_nulls(vision)
    architecture = next(iter(config.get("architectures", ())), "")
    shape, labels = _shape(values), _labels(config)
    parts = _PARTS[family](values, config, architecture)
    if not labels:
        parts["classifier"] = None
    return {"family": family, **shape, **parts, "labels": labels, "problem_type": config.get("problem_type")}


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def model_type(config: Mapping[str, Any]) -> str | None:
    """What a config.json says that the model is, whether or not it is known here.

    Args:
        config: The parsed config.json.

    Returns:
        Its model_type; without one that of its architecture, or the architecture itself if no family's begins so; None
        if it names neither.

    Raises:
        UserError: If a value is of another kind than it must be.
    """
    check("config.json", config, CONFIG)
    kind: str | None = config.get("model_type")
    if kind is not None:
        return kind
    architecture: str = next(iter(config.get("architectures") or ()), "")
    starts = [start for start in _ARCHITECTURES if architecture.startswith(start)]
    return _ARCHITECTURES[max(starts, key=len)] if starts else architecture or None


def _shape(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that all families have under one name."""
    if values["num_channels"] != 3:
        raise UserError(f"model: pictures of 3 channels are read, but config.json asks for {values['num_channels']}")
    if values["hidden_act"] not in _ACTIVATIONS:
        raise UserError(
            f"model: config.json names the activation {values['hidden_act']!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    patch = _pair(values["patch_size"])
    if patch[0] != patch[1]:
        raise UserError(f"model: patches must be square, but config.json asks for {patch[0]} x {patch[1]} pixels")
    image = _pair(values["image_size"])
    if min(image) < patch[0]:
        raise UserError(f"model: config.json: image_size {image[0]} x {image[1]} is less than one patch of {patch[0]}")
    width, heads = values["hidden_size"], values["num_attention_heads"]
    if "head_dim" not in values and width % heads:
        raise UserError(
            "model: config.json: hidden_size must be a multiple of num_attention_heads, "
            f"but they are {width} and {heads}"
        )
    return {
        "hidden_size": width,
        "num_layers": values["num_hidden_layers"],
        "num_heads": heads,
        "head_dim": values.get("head_dim"),
        "patch_size": patch[0],
        "image_size": image,
        "layer_norm_eps": values["layer_norm_eps"],
    }


def _mlp(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"intermediate_size": values["intermediate_size"], "activation": _ACTIVATIONS[values["hidden_act"]]}


def _bias(values: Mapping[str, Any]) -> tuple[bool, bool, bool]:
    return (values.get("qkv_bias", True),) * 3


def _classifies(architecture: str) -> bool:
    return "ForImageClassification" in architecture


def _vit(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    classifies = _classifies(architecture)
    return _mlp(values) | {
        "qkv_bias": _bias(values),
        "pooling": None if classifies else "dense",
        "pooler_size": values.get("pooler_output_size", values["hidden_size"]),
        "classifier": "class" if classifies else None,
    }


def _deit(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    parts = _vit(values, config, architecture) | {"num_class_tokens": 2}
    return parts | ({"classifier": "distilled"} if architecture.endswith("WithTeacher") else {})


def _dinov2(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    hidden = int(values["hidden_size"] * values["mlp_ratio"])
    if hidden < 1:
        raise UserError(f"model: config.json: mlp_ratio {values['mlp_ratio']} leaves the MLP no channels")
    gated = values.get("use_swiglu_ffn", False)
    return {
        # SwiGLU has two thirds of the channels, rounded up to a multiple of 8.
        "intermediate_size": (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden,
        "activation": "silu" if gated else _ACTIVATIONS[values["hidden_act"]],
        "gated_mlp": gated,
        "qkv_bias": _bias(values),
        "position_float32": True,
        "layer_scale": True,
        "pooling": "class",
        "classifier": "class_and_mean" if _classifies(architecture) else None,
    }


def _dinov2_with_registers(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    registers = {"num_register_tokens": values["num_register_tokens"], "position_antialias": True}
    return _dinov2(values, config, architecture) | registers


def _dinov3(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    head_dim = values.get("head_dim", values["hidden_size"] // values["num_attention_heads"])
    if head_dim % 4:
        raise UserError(
            f"model: config.json: a rotary embedding needs heads of 4, 8, ... channels, but they have {head_dim}"
        )
    return _mlp(values) | {
        "gated_mlp": values.get("use_gated_mlp", False),
        "qkv_bias": (values.get("query_bias", True), values.get("key_bias", False), values.get("value_bias", True)),
        "output_bias": values.get("proj_bias", True),
        "mlp_bias": values.get("mlp_bias", True),
        "num_register_tokens": values["num_register_tokens"],
        "position": "rotary",
        "rope_theta": values["rope_theta"],
        "layer_scale": True,
        "pooling": "class",
    }


def _clip(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    projects = architecture in ("CLIPModel", "CLIPVisionModelWithProjection")
    # A model with its text half has its own projection_dim, beside its vision_config.
    size = config.get("projection_dim") or (512 if "vision_config" in config else values["projection_dim"])
    return _mlp(values) | {
        "patch_bias": False,
        "pre_norm": True,
        "final_norm": False,
        "pooling": "class_norm",
        "projection_size": size if projects else None,
        "classifier": "mean" if _classifies(architecture) else None,
    }


def _siglip(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    return _mlp(values) | {
        "num_class_tokens": 0,
        "pooling": "attention" if values.get("vision_use_head", True) else None,
        "classifier": "mean" if _classifies(architecture) else None,
    }


def _beit(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    mean = values.get("use_mean_pooling", True)
    relative = "layer" if values.get("use_relative_position_bias") else None
    if values.get("use_shared_relative_position_bias"):
        if relative:
            raise UserError("model: config.json asks for a relative position bias both in each layer and shared by all")
        relative = "shared"
    return _mlp(values) | {
        "qkv_bias": (True, False, True),
        "position": "learned" if values.get("use_absolute_position_embeddings") else None,
        "relative_position_bias": relative,
        "layer_scale": values["layer_scale_init_value"] > 0,
        "final_norm": not mean,
        "pooling": "mean_norm" if mean else "class",
        "classifier": "pooled" if _classifies(architecture) else None,
    }


_PARTS: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any], str], dict[str, Any]]] = {
    "vit": _vit,
    "deit": _deit,
    "dinov2": _dinov2,
    "dinov2_with_registers": _dinov2_with_registers,
    "dinov3": _dinov3,
    "clip": _clip,
    "siglip": _siglip,
    "beit": _beit,
}


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    names = config.get("id2label")
    if names is not None:
        return tuple(str(names[key]) for key in sorted(names, key=int))
    return tuple(f"LABEL_{i}" for i in range(config.get("num_labels", 2)))  # 2 is transformers' default


def _pair(size: Any) -> tuple[int, int]:
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return int(height), int(width)
