"""Linear layers: their registered operators, and the public functions that check a call and make it."""

from __future__ import annotations

import torch  # noqa: F401  (the examples name it)
from torch import Tensor

from visionkernels.ops import _inference
from visionkernels.ops.linear import cpu

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "silu")
PRECISIONS = ("ieee", "tf32")


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
    scale: Tensor | None = None,
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """A linear layer with all that may follow it, for inference: ``residual + scale * act(input @ weight.T + bias)``.

    Sums are float32 (float64 for float64), and the Triton kernels round once, when the result is written.

    Args:
        input: ``[..., C]``, float64, float32, float16 or bfloat16; any strides.
        weight: ``[F, C]`` in the dtype of ``input``, as in ``torch.nn.Linear``.
        bias: ``[F]`` in the dtype of ``input``, or None for 0.
        activation: None, ``"gelu"`` (by erf; of halves the Triton kernel's is off by 5e-5 and, where it takes the GPU's
            instruction for tanh, ``2 ** -12 * abs(x)``), ``"gelu_tanh"``, ``"quick_gelu"``
            (``x * sigmoid(1.702 * x)``) or ``"silu"``.
        residual: ``[..., F]`` in the dtype of ``input``, any strides, or None for 0.
        scale: ``[F]`` in the dtype of ``input``, LayerScale's factors, or None for 1.
        precision: of products of float32: ``"ieee"``, or ``"tf32"``, which rounds the factors to 10 bits on GPUs that
            do so. It decides nothing on the CPU and for other dtypes.
        backend: ``"triton"``, ``"pytorch"``, or ``"auto"``: on a CUDA device the faster of the two. The CPU has
            PyTorch's alone.

    Returns:
        ``[..., F]``, contiguous, in the dtype of ``input``; under ``torch.autocast`` in its dtype, to which all tensors
        are cast.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: ``torch.nn.functional.linear``; Hendrycks and Gimpel, "Gaussian Error Linear Units"
    (https://arxiv.org/abs/1606.08415); LayerScale of Touvron et al., "Going deeper with Image Transformers"
    (https://arxiv.org/abs/2103.17239), section 2.

    Example:
        >>> tokens, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> linear(tokens, weight, torch.ones(3), residual=torch.full((1, 3), 10.0))
        tensor([[12., 13., 14.]])
    """
    input, weight, bias = check_linear("linear", input, weight, bias, (residual, scale), backend)
    shape = (*input.shape[:-1], weight.shape[0])
    residual, scale = _inference.cast(_inference.autocast_dtype(input), residual, scale)
    if residual is not None:
        _inference.check_like("residual", residual, shape, "[..., F]", input, "input")
    if scale is not None:
        _inference.check_like("scale", scale, shape[-1:], "[F]", input, "input")
    _inference.check_choice("activation", activation, ACTIVATIONS)
    _inference.check_choice("precision", precision, PRECISIONS)
    return LINEAR(input, weight, bias, activation, residual, scale, precision, backend)


def gated_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "silu",
    precision: str = "ieee",
    backend: str = "auto",
) -> Tensor:
    """Two linear layers, one of which gates the other, for inference: ``act(gate) * up``; SwiGLU for ``"silu"``.

    Sums are float32 (float64 for float64), and the Triton kernel rounds once, when the result is written.

    Args:
        input: ``[..., C]``, float64, float32, float16 or bfloat16; any strides.
        weight: ``[2 * F, C]`` in the dtype of ``input``: F rows of the gate, then F rows of what it multiplies.
        bias: ``[2 * F]`` in the dtype of ``input``, or None for 0.
        activation: ``"silu"``, ``"gelu"``, ``"gelu_tanh"``, ``"quick_gelu"``, or None, as in ``linear``.
        precision: as in ``linear``.
        backend: as in ``linear``.

    Returns:
        ``[..., F]``, contiguous, in the dtype of ``input``; under ``torch.autocast`` in its dtype, to which all tensors
        are cast.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: Shazeer, "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202), equation 6.

    Example:
        >>> gated_linear(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        tensor([[1.4621]])
    """
    input, weight, bias = check_linear("gated_linear", input, weight, bias, (), backend)
    if weight.shape[0] % 2:
        raise ValueError(f"weight must be [2 * F, C], an even number of rows, got {list(weight.shape)}")
    _inference.check_choice("activation", activation, ACTIVATIONS)
    _inference.check_choice("precision", precision, PRECISIONS)
    return GATED_LINEAR(input, weight, bias, activation, precision, backend)


def check_linear(
    name: str, input: Tensor, weight: Tensor, bias: Tensor | None, others: tuple[Tensor | None, ...], backend: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Input, weight and bias as they go into the operator; ``others`` are its other tensors."""
    _inference.check_tensor("input", input, "[..., C]")
    _inference.check_backend(backend, input)
    _inference.refuse_gradients(name, input, weight, bias, *others, instead="torch.nn.functional.linear")
    input, weight, bias = _inference.cast(_inference.autocast_dtype(input), input, weight, bias)
    rows = "[2 * F, C]" if name == "gated_linear" else "[F, C]"
    _inference.check_tensor("weight", weight, rows, 2)
    _inference.check_like("weight", weight, (weight.shape[0], input.shape[-1]), rows, input, "input")
    if bias is not None:
        _inference.check_like("bias", bias, weight.shape[:1], rows.replace(", C", ""), input, "input")
    return input, weight, bias


def _linear_fake(input: Tensor, weight: Tensor, *_: object) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0])


def _gated_linear_fake(input: Tensor, weight: Tensor, *_: object) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[0] // 2)


LINEAR = _inference.register(
    "linear(Tensor input, Tensor weight, Tensor? bias, str? activation, Tensor? residual, Tensor? scale,"
    " str precision, str backend) -> Tensor",
    module="linear",
    pytorch=cpu.linear,
    fake=_linear_fake,
)
GATED_LINEAR = _inference.register(
    "gated_linear(Tensor input, Tensor weight, Tensor? bias, str? activation, str precision, str backend) -> Tensor",
    module="linear",
    pytorch=cpu.gated_linear,
    fake=_gated_linear_fake,
)
