"""What stands in for parts of transformers' vision transformers: attention, MLPs and layer norms, for inference.

Each does what upstream's code does in fewer kernels, and hands over to that code where this package's operators do not
apply: where a gradient is asked for, and where a part is not the plain one (its linear layers carry hooks or are
quantised, dropout is active); and where that code is the faster one, because the host cannot launch fast enough. The
rule is documented in `visionkernels.patch`.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from visionkernels.integrations._rebind import upstream_class
from visionkernels.ops.attention.op import attention
from visionkernels.ops.layer_norm.op import layer_norm
from visionkernels.ops.linear.op import gated_linear, linear

NAME = "visionkernels"  # of the attention in transformers' AttentionInterface

# In a layer's input in half precision on a GPU, of about 80 images in a ViT-B. Up to there the host decides, which
# launches PyTorch's kernels twice as fast as Triton's: on hosts with an H200 32 images took 4 to 5 ms against 8 to 9,
# and 128 took 13 against 10 to 12.
FEW_NUMBERS = 12 * 2**20
_PLAIN = (Tensor, nn.Parameter)  # no quantised or distributed tensor
_ACTIVATIONS = {  # class of the module: name in `ops.linear`
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "SiLU": "silu",
    "SiLUActivation": "silu",
}


def register() -> None:
    """Make the attention known to transformers under `NAME`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Stand in for an attention function of transformers' `AttentionInterface`.

    Args:
        module: the attention that calls.
        query: `[B, H, N, D]`, any strides with a contiguous last axis.
        key: as `query`.
        value: as `query`.
        attention_mask: None; what is added to the scores, broadcastable to `[B, H, N, N]`; or False where a key is
            hidden.
        scaling: of the scores; `D ** -0.5` if None.
        dropout: above 0, upstream's code runs.
        is_causal: if True, upstream's code runs; by default as the module says.
        **kwargs: for upstream's code.

    Returns:
        `[B, N, H, D]`, and None: there are no weights. Where the model was made with eager attention and
        `output_attentions` is asked for, upstream's code runs and gives them.

    Source:
        `transformers.integrations.sdpa_attention.sdpa_attention_forward`.
    """
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if (
        causal
        or dropout > 0
        or wants_gradients(query, key, value, attention_mask)
        or _wants_weights(module, kwargs)
        or (waits_for_the_host(query) and _upstream_name(module) != "eager")
    ):
        options = {"scaling": scaling, "dropout": dropout, **({} if is_causal is None else {"is_causal": is_causal})}
        output: tuple[Tensor, Tensor | None] = _upstream_attention(module)(
            module, query, key, value, attention_mask, **options, **kwargs
        )
        return output
    bias = attention_mask
    if bias is not None and bias.dtype == torch.bool:
        bias = torch.zeros(bias.shape, dtype=query.dtype, device=bias.device).masked_fill_(~bias, float("-inf"))
    heads_last = (query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
    return attention(*heads_last, scale=scaling, bias=bias), None


def _upstream_attention(module: nn.Module) -> Callable[..., Any]:
    """The attention function that the module called before it was patched."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    found: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS.get_interface(_upstream_name(module), eager)
    return found


def _upstream_name(module: nn.Module) -> str:
    """The name of that function."""
    patch = module.__dict__.get("_visionkernels_patch")
    name: str = "sdpa" if patch is None else patch.hidden["config"]._attn_implementation  # None: named by hand
    return name


def _wants_weights(module: nn.Module, options: dict[str, Any]) -> bool:
    """Whether the call is to give the attention's weights, which only upstream's eager function does."""
    if _upstream_name(module) != "eager":
        return False
    if options.get("output_attentions") or torch.compiler.is_compiling():
        return bool(options.get("output_attentions"))
    from transformers.utils.output_capturing import _active_collector

    # What a model gathers while it runs: SigLIP does not tell its attentions, and a config may ask for it.
    gathered = _active_collector.get()
    return gathered is not None and "attentions" in gathered


def wants_gradients(*tensors: Tensor | None) -> bool:
    """Whether a gradient by one of the tensors may be asked for, forward-mode derivatives among them."""
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        return True
    return forward_ad._current_level >= 0


def waits_for_the_host(input: Tensor) -> bool:
    """Whether the GPU is done with a layer before the host has launched the next one, eagerly and in no CUDA graph."""
    if input.device.type != "cuda" or torch.compiler.is_compiling() or torch.cuda.is_current_stream_capturing():
        return False
    slower = 1 if input.element_size() == 2 else 8  # products of float32
    return input.numel() * slower < FEW_NUMBERS


def layer_norm_forward(self: nn.LayerNorm, input: Tensor) -> Tensor:
    """Stand in for `torch.nn.LayerNorm.forward`; under autocast, which computes norms in float32, upstream's runs."""
    weight, bias = self.weight, self.bias
    if (
        torch.is_autocast_enabled(input.device.type)
        or wants_gradients(input, weight, bias)
        or waits_for_the_host(input)
        or not (weight is None or (type(weight) in _PLAIN and weight.dtype == input.dtype))
    ):
        return _upstream(self, input)
    return layer_norm(input, weight, bias, self.eps)


def fc_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Stand in for an MLP of `fc1`, `activation_fn` (or `activation`) and `fc2`."""
    return _mlp(self, hidden_states, self.fc1, getattr(self, "activation_fn", None) or self.activation, self.fc2)


def up_down_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Stand in for an MLP of `up_proj`, `act_fn` and `down_proj`."""
    return _mlp(self, hidden_states, self.up_proj, self.act_fn, self.down_proj)


def _mlp(self: nn.Module, input: Tensor, up: nn.Module, activation: nn.Module, down: nn.Module) -> Tensor:
    name = activation_name(activation)
    if name is None or not _apply(input, up, down):
        return _upstream(self, input)
    precision = _precision(input)
    hidden = linear(input, up.weight, up.bias, activation=name, precision=precision)  # type: ignore[arg-type]
    return linear(hidden, down.weight, down.bias, precision=precision)  # type: ignore[arg-type]


def gated_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Stand in for an MLP of `gate_proj`, `up_proj`, `act_fn` and `down_proj`."""
    name = activation_name(self.act_fn)
    if name is None or not _apply(hidden_states, self.gate_proj, self.up_proj, self.down_proj):
        return _upstream(self, hidden_states)
    precision = _precision(hidden_states)
    gate = linear(hidden_states, self.gate_proj.weight, self.gate_proj.bias, activation=name, precision=precision)
    up = linear(hidden_states, self.up_proj.weight, self.up_proj.bias, precision=precision)
    return linear(gate.mul_(up), self.down_proj.weight, self.down_proj.bias, precision=precision)


def packed_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """Stand in for a SwiGLU MLP of `weights_in`, gate and up in one, and `weights_out`."""
    if not _apply(hidden_states, self.weights_in, self.weights_out):
        return _upstream(self, hidden_states)
    precision = _precision(hidden_states)
    hidden = gated_linear(hidden_states, self.weights_in.weight, self.weights_in.bias, precision=precision)
    return linear(hidden, self.weights_out.weight, self.weights_out.bias, precision=precision)


MLPS: dict[frozenset[str], Callable[..., Tensor]] = {  # names of the children: what stands in for such an MLP
    frozenset(("fc1", "activation_fn", "fc2")): fc_forward,
    frozenset(("fc1", "activation", "fc2")): fc_forward,
    frozenset(("up_proj", "act_fn", "down_proj")): up_down_forward,
    frozenset(("gate_proj", "up_proj", "act_fn", "down_proj")): gated_forward,
    frozenset(("weights_in", "weights_out")): packed_forward,
}


def activation_name(activation: nn.Module) -> str | None:
    """The name of an activation module in `ops.linear`; None for one that is not known there, or carries hooks."""
    name = _ACTIVATIONS.get(type(activation).__name__)
    if name is None or not _is_bare(activation):
        return None
    return "gelu_tanh" if getattr(activation, "approximate", "none") == "tanh" else name


def _apply(input: Tensor, *layers: nn.Module) -> bool:
    """Whether linear layers are the plain ones, no gradient is asked for, and their input is large enough."""
    if waits_for_the_host(input):
        return False
    for layer in layers:
        if type(layer) is not nn.Linear or not _is_bare(layer):
            return False
        if type(layer.weight) not in _PLAIN or wants_gradients(input, layer.weight, layer.bias):
            return False
    return True


def _is_bare(module: nn.Module) -> bool:
    """Whether nothing happens around a module's forward, and it is its class's."""
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def _precision(input: Tensor) -> str:
    """How this process has products of float32 made, for the operator."""
    if input.dtype != torch.float32 or not input.is_cuda:
        return "ieee"
    return _float32_precision()


def _float32_precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


# Dynamo cannot read the setting, but compiles anew when it has changed. This is what
# `torch.compiler.assume_constant_result` sets, which would import Dynamo for it.
_float32_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _upstream(self: nn.Module, input: Tensor) -> Tensor:
    """What upstream's code makes of it."""
    output: Tensor = upstream_class(self).forward(self, input)
    return output
