"""What a vision transformer is made of, read from a checkpoint's config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from visionkernels.errors import UserError

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


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a vision transformer, and which parts it has.

    Attributes:
        family: One of the values of `FAMILIES`.
        hidden_size: Channels of a token.
        num_layers: Layers of the encoder.
        num_heads: Heads of the attention.
        head_dim: Channels of a head; None for `hidden_size / num_heads`.
        intermediate_size: Channels inside the MLP; for a gated MLP, of each of its two halves.
        patch_size: Side of a patch in pixels.
        image_size: (height, width) that the position embedding belongs to; other sizes interpolate it.
        layer_norm_eps: Of every layer norm.
        activation: Of the MLP: `"gelu"`, `"gelu_tanh"`, `"quick_gelu"` or `"silu"`.
        gated_mlp: Whether the MLP is `act(gate) * up`.
        qkv_bias: Whether query, key and value have a bias.
        output_bias: Whether the attention's output projection has one.
        mlp_bias: Whether the MLP has them.
        patch_bias: Whether the patch embedding has one.
        num_class_tokens: Learned tokens before the patches that have a position: class and distillation token.
        num_register_tokens: Learned tokens after those, without a position.
        position: `"learned"`, `"rotary"`, or None.
        position_float32: Whether a learned position is interpolated in float32 whatever the weights' dtype.
        position_antialias: Whether that interpolation is antialiased.
        rope_theta: Base of the rotary frequencies.
        relative_position_bias: `"layer"` for one table a layer, `"shared"` for one in all, or None.
        layer_scale: Whether the branches are scaled by channel.
        pre_norm: Whether a norm stands before the first layer.
        final_norm: Whether one stands after the last.
        pooling: How `pooler_output` is made: `"dense"`, `"class"`, `"class_norm"`, `"mean_norm"`, `"attention"`, or None.
        pooler_size: Channels of a dense pooler; None for `hidden_size`.
        classifier: What a classifier sees: `"class"`, `"class_and_mean"`, `"distilled"`, `"mean"`, `"pooled"`, or None
            without a classifier.
        projection_size: Channels of `image_embeds`, or None.
        labels: Names of the classes.
    """

    family: str
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    head_dim: int | None = None
    intermediate_size: int = 3072
    patch_size: int = 16
    image_size: tuple[int, int] = (224, 224)
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    gated_mlp: bool = False
    qkv_bias: tuple[bool, bool, bool] = (True, True, True)
    output_bias: bool = True
    mlp_bias: bool = True
    patch_bias: bool = True
    num_class_tokens: int = 1
    num_register_tokens: int = 0
    position: str | None = "learned"
    position_float32: bool = False
    position_antialias: bool = False
    rope_theta: float = 100.0
    relative_position_bias: str | None = None
    layer_scale: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    pooling: str | None = None
    pooler_size: int | None = None
    classifier: str | None = None
    projection_size: int | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"config: hidden_size must be a multiple of num_heads, but they are {self.hidden_size} and {self.num_heads}"
            )

    @property
    def channels_per_head(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches."""
        return self.num_class_tokens + self.num_register_tokens

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a picture of `image_size`: (rows, columns)."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ViTConfig:
        """Read what a config.json of transformers holds.

        Args:
            config: The parsed config.json, of a vision model or of a CLIP or SigLIP model with its text half.

        Returns:
            The shape of the vision model, with every part that the named architecture has.

        Raises:
            UserError: If the family is none that is known, or the model has what this package lacks.

        Example:
            >>> ViTConfig.from_dict({"model_type": "vit", "patch_size": 32}).grid
            (7, 7)
        """
        kind = _model_type(config)
        family = FAMILIES[kind]
        vision = config
        if kind in ("clip", "siglip"):
            vision = config.get("vision_config") or {}
        values = DEFAULTS[family] | {name: value for name, value in vision.items() if value is not None}
        architecture = next(iter(config.get("architectures") or ()), "")
        parts, labels = _PARTS[family](values, config, architecture), _labels(config)
        if not labels:
            parts["classifier"] = None
        return cls(family, **_shape(values), **parts, labels=labels)


def _model_type(config: Mapping[str, Any]) -> str:
    kind = config.get("model_type")
    if kind is None:
        architecture = next(iter(config.get("architectures") or ()), "")
        starts = [start for start in _ARCHITECTURES if architecture.startswith(start)]
        kind = _ARCHITECTURES[max(starts, key=len)] if starts else architecture or None
    if kind not in FAMILIES:
        raise UserError(
            f"model: config.json names the model_type {kind!r}, which is none of the vision transformers known here: "
            f"{', '.join(FAMILIES)}"
        )
    return kind


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
    return {
        "hidden_size": values["hidden_size"],
        "num_layers": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "head_dim": values.get("head_dim"),
        "patch_size": patch[0],
        "image_size": _pair(values["image_size"]),
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
        "pooler_size": values.get("pooler_output_size"),
        "classifier": "class" if classifies else None,
    }


def _deit(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    parts = _vit(values, config, architecture) | {"num_class_tokens": 2}
    return parts | ({"classifier": "distilled"} if architecture.endswith("WithTeacher") else {})


def _dinov2(values: Mapping[str, Any], config: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    hidden = int(values["hidden_size"] * values["mlp_ratio"])
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
