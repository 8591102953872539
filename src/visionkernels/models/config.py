"""What a vision transformer is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from visionkernels.errors import UserError
from visionkernels.models import families
from visionkernels.models.kinds import SIZE, check_value, plain


@dataclass(frozen=True)
class ViTConfig:
    """The shape of a vision transformer, and which parts it has.

    Attributes:
        family: One of the values of `families.FAMILIES`.
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
        pooling: How `pooler_output` is made: `"dense"`, `"class"`, `"class_norm"`, `"mean_norm"`, `"attention"`, or
            None.
        pooler_size: Channels of a dense pooler; None for `hidden_size`.
        classifier: What a classifier sees: `"class"`, `"class_and_mean"`, `"distilled"`, `"mean"`, `"pooled"`, or None
            without a classifier.
        projection_size: Channels of `image_embeds`, or None.
        labels: Names of the classes.
        problem_type: What the classifier was trained for, one of `kinds.PROBLEM_TYPES`; None if that is not said.
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
    problem_type: str | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            object.__setattr__(self, one.name, plain(getattr(self, one.name)))
        for name in ("hidden_size", "num_heads", "intermediate_size", "patch_size"):
            check_value(f"config: {name}", getattr(self, name), SIZE)
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                "config: hidden_size must be a multiple of num_heads, "
                f"but they are {self.hidden_size} and {self.num_heads}"
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
        return cls(**families.read(config))
