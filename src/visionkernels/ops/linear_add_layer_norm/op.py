"""A linear layer with the residual add and the layer norm behind it: registered operator and public function."""

from __future__ import annotations

import torch  # noqa: F401  (the examples name it)
from torch import Tensor

from visionkernels.ops import _inference
from visionkernels.ops.layer_norm.op import check_eps
from visionkernels.ops.linear.op import PRECISIONS, check_linear
from visionkernels.ops.linear_add_layer_norm import cpu


def linear_add_layer_norm(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float = 1e-5,
    *,
    scale: Tensor | None = None,
    precision: str = "ieee",
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The end of a transformer's branch and the norm of the next, for inference.

    ``sum = residual + scale * (input @ weight.T + bias)``, and its layer norm. The sum is rounded to its dtype
    before it is normalised.

    Args:
        input: ``[..., K]``, float64, float32, float16 or bfloat16; any strides.
        weight: ``[C, K]`` in the dtype of ``input``, as in ``torch.nn.Linear``.
        bias: ``[C]`` in the dtype of ``input``, or None for 0.
        residual: ``[..., C]`` in the dtype of ``input``; any strides.
        norm_weight: ``[C]`` in the dtype of ``input``, of the layer norm; or None for 1.
        norm_bias: ``[C]`` in the dtype of ``input``, of the layer norm; or None for 0.
        eps: is added to the variance; at least 0.
        scale: ``[C]`` in the dtype of ``input``, LayerScale's factors; or None for 1.
        precision: of products of float32: ``"ieee"`` or ``"tf32"``, as in ``linear``.
        backend: ``"triton"``, ``"pytorch"``, or ``"auto"``: on a CUDA device whatever is faster. The CPU has PyTorch's
            alone.

    Returns:
        The sum and the output, each ``[..., C]``, contiguous, in the dtype of ``input``; under ``torch.autocast`` in
        its dtype, to which all tensors are cast.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: ``linear`` and ``add_layer_norm``.

    Example:
        >>> total, output = linear_add_layer_norm(
        ...     torch.tensor([[1.0, 2.0]]), torch.eye(2), None, torch.tensor([[1.0, 1.0]]), None, None
        ... )
        >>> total, output
        (tensor([[2., 3.]]), tensor([[-1.0000,  1.0000]]))
    """
    others = (residual, norm_weight, norm_bias, scale)
    input, weight, bias = check_linear("linear_add_layer_norm", input, weight, bias, others, backend)
    shape = (*input.shape[:-1], weight.shape[0])
    residual, norm_weight, norm_bias, scale = _inference.cast(_inference.autocast_dtype(input), *others)
    _inference.check_like("residual", residual, shape, "[..., C]", input, "input")
    for name, tensor in (("norm_weight", norm_weight), ("norm_bias", norm_bias), ("scale", scale)):
        if tensor is not None:
            _inference.check_like(name, tensor, shape[-1:], "[C]", input, "input")
    check_eps(eps)
    _inference.check_choice("precision", precision, PRECISIONS)
    return LINEAR_ADD_LAYER_NORM(input, weight, bias, residual, norm_weight, norm_bias, eps, scale, precision, backend)


def _fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, *options: object
) -> tuple[Tensor, Tensor]:
    shape = (*input.shape[:-1], weight.shape[0])
    return input.new_empty(shape), input.new_empty(shape)


LINEAR_ADD_LAYER_NORM = _inference.register(
    "linear_add_layer_norm(Tensor input, Tensor weight, Tensor? bias, Tensor residual, Tensor? norm_weight,"
    " Tensor? norm_bias, float eps, Tensor? scale, str precision, str backend) -> (Tensor, Tensor)",
    module="linear_add_layer_norm",
    pytorch=cpu.linear_add_layer_norm,
    fake=_fake,
)
