"""The parts of a vision transformer: their weights as buffers, and the order of the operators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from visionkernels.models.config import ViTConfig
from visionkernels.models.positions import Positions
from visionkernels.ops.attention.op import packed_attention
from visionkernels.ops.layer_norm.op import layer_norm
from visionkernels.ops.linear.op import gated_linear, linear
from visionkernels.ops.linear_add_layer_norm.op import linear_add_layer_norm

_NOT_CALLED = (
    "this hook will not be called: the module holds weights that operators read, and is not called itself; those that "
    "are: the ViT, each of its layers, heads, and heads.pool"
)


@dataclass(frozen=True)
class Options:
    """What every operator of a forward is told.

    Attributes:
        eps: Of the layer norms.
        activation: Of the MLPs.
        precision: Of float32 products.
        backend: One of `ops._inference.BACKENDS`.
    """

    eps: float
    activation: str
    precision: str
    backend: str


class Affine(nn.Module):
    """A weight and perhaps a bias, for an operator that may do more than they say; so it has no `forward`.

    The weights are buffers, not parameters, because nothing here is trained: an optimizer or a gradient that
    expects parameters finds none. A hook warns that it will not be called.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, *shape: int, bias: bool = True) -> None:
        super().__init__()
        rows = shape[0]
        if len(shape) == 1:
            self.register_buffer("weight", torch.ones(rows))
        else:
            self.register_buffer("weight", torch.randn(shape) * math.prod(shape[1:]) ** -0.5)
        self.register_buffer("bias", torch.zeros(rows) if bias else None)

    def register_forward_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        """As `torch.nn.Module.register_forward_hook`, and warn."""
        warnings.warn(_NOT_CALLED, stacklevel=2)
        return super().register_forward_hook(*args, **options)

    def register_forward_pre_hook(self, *args: Any, **options: Any) -> RemovableHandle:
        """As `torch.nn.Module.register_forward_pre_hook`, and warn."""
        warnings.warn(_NOT_CALLED, stacklevel=2)
        return super().register_forward_pre_hook(*args, **options)

    def norm(self, x: Tensor, options: Options) -> Tensor:
        """Layer norm with this weight."""
        return layer_norm(x, self.weight, self.bias, options.eps, backend=options.backend)

    def linear(self, x: Tensor, options: Options, **epilogue: str | Tensor | None) -> Tensor:
        """Linear layer with this weight; `epilogue` as the operator takes it."""
        return linear(x, self.weight, self.bias, precision=options.precision, backend=options.backend, **epilogue)  # type: ignore[arg-type]

    def linear_add_norm(
        self, x: Tensor, residual: Tensor, scale: Tensor | None, norm: Affine, options: Options
    ) -> tuple[Tensor, Tensor]:
        """Linear layer with this weight, its residual sum, and that normed by `norm`."""
        return linear_add_layer_norm(
            x,
            self.weight,
            self.bias,
            residual,
            norm.weight,
            norm.bias,
            options.eps,
            scale=scale,
            precision=options.precision,
            backend=options.backend,
        )

    def gated(self, x: Tensor, options: Options) -> Tensor:
        """Gated linear layer with this weight."""
        return gated_linear(
            x,
            self.weight,
            self.bias,
            activation=options.activation,
            precision=options.precision,
            backend=options.backend,
        )


def forward_hooks(modules: Iterable[nn.Module]) -> list[Mapping[int, Any]]:
    """Where PyTorch keeps the forward hooks of some modules, and those of all modules.

    The objects stay the same while hooks come and go, so that the list can be kept and `any` of it asked for each
    forward. A hook is called where the module is: of a ViT's modules the layers, the heads and SigLIP's pooling are.

    Args:
        modules: The modules.

    Returns:
        A mapping for each place; where there are no hooks it is empty.
    """
    own = (hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks))
    return [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks, *own]


class Layer(nn.Module):
    """A layer of the encoder: norm, attention, norm, MLP, with a residual around each pair.

    Args:
        config: The model's shape.
    """

    scale1: Tensor | None
    scale2: Tensor | None
    relative_position_bias_table: Tensor | None

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        channels, hidden = config.hidden_size, config.intermediate_size
        inner = config.num_heads * config.channels_per_head
        self.num_heads, self.num_prefix_tokens = config.num_heads, config.num_prefix_tokens
        self.gated_mlp = config.gated_mlp
        self.norm1 = Affine(channels)
        self.qkv = Affine(3 * inner, channels, bias=any(config.qkv_bias))
        self.output = Affine(channels, inner, bias=config.output_bias)
        self.register_buffer("scale1", torch.ones(channels) if config.layer_scale else None)
        self.norm2 = Affine(channels)
        self.fc1 = Affine(hidden * (2 if config.gated_mlp else 1), channels, bias=config.mlp_bias)
        self.fc2 = Affine(channels, hidden, bias=config.mlp_bias)
        self.register_buffer("scale2", torch.ones(channels) if config.layer_scale else None)
        table = relative_position_bias_table(config) if config.relative_position_bias == "layer" else None
        self.register_buffer("relative_position_bias_table", table)

    def forward(
        self, x: Tensor, options: Options, bias: Tensor | None = None, rotary: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Apply the layer.

        Args:
            x: `[B, N, C]`.
            options: Of the operators.
            bias: Added to the attention's scores, `[1, H, N, N]`.
            rotary: (cos, sin), each `[P, D]`.

        Returns:
            `[B, N, C]`.
        """
        return self.step(x, self.norm1.norm(x, options), None, options, bias, rotary)[0]

    def step(
        self,
        x: Tensor,
        normed: Tensor,
        following: Affine | None,
        options: Options,
        bias: Tensor | None = None,
        rotary: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Apply the layer but for its first norm, and the norm that follows it.

        Args:
            x: `[B, N, C]`.
            normed: What `norm1` makes of it.
            following: The next layer's first norm, or the encoder's last; None for none.
            options: Of the operators.
            bias: As in `forward`.
            rotary: As in `forward`.

        Returns:
            `[B, N, C]`, and the same normed; without a norm that follows, the same again.
        """
        # What is large gets no name here, so that its memory is free once it was read.
        x, normed = self.output.linear_add_norm(
            self._attend(normed, options, bias, rotary), x, self.scale1, self.norm2, options
        )
        if following is None:
            x = self.fc2.linear(self._hidden(normed, options), options, residual=x, scale=self.scale2)
            return x, x
        return self.fc2.linear_add_norm(self._hidden(normed, options), x, self.scale2, following, options)

    def _attend(
        self, normed: Tensor, options: Options, bias: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        return packed_attention(
            self.qkv.linear(normed, options),
            self.num_heads,
            bias=bias,
            rotary=rotary,
            # Only a rotary embedding tells the prefix from the patches.
            num_prefix_tokens=0 if rotary is None else self.num_prefix_tokens,
            backend=options.backend,
        )

    def _hidden(self, normed: Tensor, options: Options) -> Tensor:
        if self.gated_mlp:
            return self.fc1.gated(normed, options)
        return self.fc1.linear(normed, options, activation=options.activation)


class Layers(nn.ModuleList):
    """The layers of the encoder.

    Args:
        config: The model's shape.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__(Layer(config) for _ in range(config.num_layers))
        self.biases_differ = config.relative_position_bias == "layer"

    @property
    def hooked(self) -> bool:
        """Whether a layer has forward hooks, or all modules have."""
        return any(forward_hooks(self))

    def encode(
        self, x: Tensor, last_norm: Affine | None, place: Positions, options: Options, output_hidden_states: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """Apply the layers.

        Args:
            x: `[B, N, C]`.
            last_norm: The norm behind the last layer, if the model has one.
            place: Rotary tables and biases.
            options: Of the operators.
            output_hidden_states: Return what is between the layers too.

        Returns:
            The last hidden state, normed where there is a norm for it, and what is between the layers.
        """
        layers = cast("list[Layer]", list(self))
        states = [x]
        # A hook sees, and may change, what goes into a layer and comes out; else a layer also gets and makes norms.
        alone = self.hooked or not layers
        normed = x if alone else layers[0].norm1.norm(x, options)
        for i, layer in enumerate(layers):
            bias = place.bias(i if self.biases_differ else 0)
            if alone:
                x = layer(x, options, bias, place.rotary)
            else:
                following = layers[i + 1].norm1 if i + 1 < len(layers) else last_norm
                x, normed = layer.step(x, normed, following, options, bias, place.rotary)
            if output_hidden_states:
                states.append(x)
        if alone:
            normed = x if last_norm is None else last_norm.norm(x, options)
        return normed, tuple(states) if output_hidden_states else None


def relative_position_bias_table(config: ViTConfig) -> Tensor:
    """A table of zeros: a row for every offset of two patches, and three for those with the class token."""
    rows, columns = config.grid
    return torch.zeros((2 * rows - 1) * (2 * columns - 1) + 3, config.num_heads)
