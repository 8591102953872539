"""Layer normalisation: its registered operators, and the public functions that check a call and make it."""

from __future__ import annotations

import torch  # noqa: F401  (the examples name it)
from torch import Tensor

from visionkernels.ops import _inference
from visionkernels.ops._common import shown
from visionkernels.ops.layer_norm import cpu


def layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5, *, backend: str = "auto"
) -> Tensor:
    """Layer normalisation over the last axis, for inference: ``(x - mean) / sqrt(variance + eps) * weight + bias``.

    Mean and variance are float32 (float64 for float64), the variance that of the centred values. A row
    with a NaN or an infinity is NaN, as in PyTorch.

    Args:
        input: ``[..., C]``, float64, float32, float16 or bfloat16; any strides.
        weight: ``[C]`` in the dtype of ``input``, or None for 1.
        bias: ``[C]`` in the dtype of ``input``, or None for 0.
        eps: is added to the variance; at least 0.
        backend: ``"triton"``, ``"pytorch"``, or ``"auto"``: on a CUDA device the faster of the two. The CPU has
            PyTorch's alone.

    Returns:
        ``[..., C]``, contiguous, in the dtype of ``input``. Under ``torch.autocast`` too, to which weight and bias are
        cast.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: Ba et al., "Layer Normalization" (https://arxiv.org/abs/1607.06450); ``torch.nn.functional.layer_norm``.

    Example:
        >>> layer_norm(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), None, None)
        tensor([[-1.3416, -0.4472,  0.4472,  1.3416]])
    """
    _inference.check_tensor("input", input, "[..., C]")
    _inference.check_backend(backend, input)
    _inference.refuse_gradients("layer_norm", input, weight, bias, instead="torch.nn.functional.layer_norm")
    if _inference.autocast_dtype(input) is not None:
        weight, bias = _inference.cast(input.dtype, weight, bias)
    _check_affine(input, weight, bias, eps)
    return LAYER_NORM(input, weight, bias, eps, backend)


def add_layer_norm(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Residual add and layer normalisation in one pass: ``sum = residual + scale * input``, and its norm.

    The sum is rounded to its dtype before it is normalised, so that the two results are those of the two steps.

    Args:
        input: ``[..., C]``, float64, float32, float16 or bfloat16; any strides: the output of a branch.
        residual: ``[..., C]``, of the shape and dtype of ``input``; any strides.
        weight: ``[C]`` in the dtype of ``input``, or None for 1.
        bias: ``[C]`` in the dtype of ``input``, or None for 0.
        eps: is added to the variance; at least 0.
        scale: ``[C]`` in the dtype of ``input``, LayerScale's factors of the branch; or None for 1.
        backend: as in ``layer_norm``.

    Returns:
        The sum and the output, each ``[..., C]``, contiguous, in the dtype of ``input``. Under ``torch.autocast`` too,
        to which the other tensors are cast.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: ``layer_norm``; LayerScale of Touvron et al., "Going deeper with Image Transformers"
    (https://arxiv.org/abs/2103.17239), section 2.

    Example:
        >>> total, output = add_layer_norm(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]), None, None)
        >>> total, output
        (tensor([1., 3.]), tensor([-1.0000,  1.0000]))
    """
    _inference.check_tensor("input", input, "[..., C]")
    _inference.check_backend(backend, input)
    _inference.refuse_gradients(
        "add_layer_norm", input, residual, weight, bias, scale, instead="torch.nn.functional.layer_norm"
    )
    if _inference.autocast_dtype(input) is not None:
        residual, weight, bias, scale = _inference.cast(input.dtype, residual, weight, bias, scale)
    _inference.check_like("residual", residual, input.shape, "[..., C]", input, "input")
    _check_affine(input, weight, bias, eps)
    if scale is not None:
        _inference.check_like("scale", scale, input.shape[-1:], "[C]", input, "input")
    return ADD_LAYER_NORM(input, residual, weight, bias, eps, scale, backend)


def _check_affine(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            _inference.check_like(name, tensor, input.shape[-1:], "[C]", input, "input")
    check_eps(eps)


def check_eps(eps: float) -> None:
    """A finite number of at least 0."""
    if not isinstance(eps, (int, float)) or isinstance(eps, bool):
        raise TypeError(f"eps must be a number, got {shown(eps)}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")


def _layer_norm_fake(input: Tensor, *_: object) -> Tensor:
    return input.new_empty(input.shape)


def _add_layer_norm_fake(input: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return input.new_empty(input.shape), input.new_empty(input.shape)


LAYER_NORM = _inference.register(
    "layer_norm(Tensor input, Tensor? weight, Tensor? bias, float eps, str backend) -> Tensor",
    module="layer_norm",
    pytorch=cpu.layer_norm,
    fake=_layer_norm_fake,
)
ADD_LAYER_NORM = _inference.register(
    "add_layer_norm(Tensor input, Tensor residual, Tensor? weight, Tensor? bias, float eps, Tensor? scale, str backend)"
    " -> (Tensor, Tensor)",
    module="layer_norm",
    pytorch=cpu.add_layer_norm,
    fake=_add_layer_norm_fake,
)
