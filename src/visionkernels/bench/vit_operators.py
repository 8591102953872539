"""The suite of the vision transformer's operators, each beside what PyTorch has for the same."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from visionkernels.bench import timing
from visionkernels.bench.correctness import limit, relative
from visionkernels.bench.measure import DTYPES, run_stages, time_forward, time_graph
from visionkernels.bench.providers import Candidate
from visionkernels.bench.record import Row
from visionkernels.bench.vit_cases import OpCase

Operator = Callable[..., Tensor]

_EPS = 1e-6
_CHECKED = {"layer_norm": 512, "linear": 512, "attention": 2, "patch_embedding": 2}  # of the first axis


class Inputs(NamedTuple):
    """What an operator gets; no provider takes anything else."""

    batched: tuple[Tensor, ...]  # with rows or images as the first axis
    shared: tuple[Tensor, ...]  # weights


def draw(case: OpCase, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Draw the inputs of a case, as large as they are in a model; the same numbers on every call on a device.

    Args:
        case: The workload.
        dtype: Of all tensors.
        device: Where they are put.

    Returns:
        Of a layer norm ``[M, C]`` and weight and bias ``[C]``; of a linear layer ``[M, C]``, the residual ``[M, F]`` if
        there is one, ``[F, C]`` and ``[F]``; of attention ``[B, N, 3 * C]``; of a patch embedding the images
        ``[B, 3, 224, 224]``, ``[C, 3, 16, 16]``, ``[C]``, the positions ``[196, C]`` and the first token ``[1, C]``.
    """
    generator = torch.Generator(device).manual_seed(zlib.crc32(case.name.encode()))

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    rows, width, out = case.rows, case.in_features, case.out_features
    if case.op == "layer_norm":
        return Inputs((normal(rows, width),), (1 + normal(width, scale=0.1), normal(width, scale=0.1)))
    if case.op == "linear":
        residual = (normal(rows, out),) if case.residual else ()
        return Inputs((normal(rows, width), *residual), (normal(out, width, scale=width**-0.5), normal(out, scale=0.1)))
    if case.op == "attention":
        return Inputs((normal(case.batch, rows, 3 * width),), ())
    weights = (normal(out, 3, 16, 16, scale=768**-0.5), normal(out, scale=0.1), normal(196, out), normal(1, out))
    return Inputs((normal(rows, 3, 224, 224),), weights)


def ours(case: OpCase, backend: str) -> Operator:
    """This package's operator."""
    from visionkernels.ops.attention.op import packed_attention
    from visionkernels.ops.layer_norm.op import layer_norm
    from visionkernels.ops.linear.op import linear
    from visionkernels.ops.patch_embedding.op import patch_embedding

    if case.op == "layer_norm":
        return lambda x, weight, bias: layer_norm(x, weight, bias, _EPS, backend=backend)
    if case.op == "attention":
        return lambda qkv: packed_attention(qkv, case.num_heads, backend=backend)
    if case.op == "patch_embedding":
        return lambda images, weight, bias, positions, first: patch_embedding(
            images, weight, bias, position_embedding=positions, prefix_tokens=first, backend=backend
        )
    if case.residual:
        return lambda x, residual, weight, bias: linear(x, weight, bias, residual=residual, backend=backend)
    return lambda x, weight, bias: linear(x, weight, bias, activation=case.activation, backend=backend)


def pytorch(case: OpCase) -> Operator:
    """PyTorch's functions one after another, as models call them."""
    if case.op == "layer_norm":
        return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias, _EPS)
    if case.op == "patch_embedding":
        return _convolution
    if case.residual:
        return lambda x, residual, weight, bias: residual + F.linear(x, weight, bias)
    if case.activation == "gelu":
        return lambda x, weight, bias: F.gelu(F.linear(x, weight, bias))
    return F.linear


def _convolution(images: Tensor, weight: Tensor, bias: Tensor, positions: Tensor, first: Tensor) -> Tensor:
    patches = F.conv2d(images, weight, bias, stride=weight.shape[2]).flatten(2).transpose(1, 2)
    return torch.cat([first.expand(len(images), -1, -1), patches + positions], 1)


def product(case: OpCase) -> Operator:
    """The matrix product and its bias alone."""
    return lambda *inputs: F.linear(inputs[0], *inputs[-2:])


def sdpa(case: OpCase, backend: SDPBackend) -> Operator:
    """``scaled_dot_product_attention`` by one of its kernels, on views of the packed projection."""

    def attention(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unflatten(2, (3, case.num_heads, -1)).permute(2, 0, 3, 1, 4)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    return attention


@dataclass(frozen=True)
class OpProvider(Candidate):
    """An implementation of some of the operators.

    Attributes:
        build: The case to the function of its inputs.
        ops: Which operators; all if empty.
        partial: It computes a part of the case alone.
    """

    build: Callable[[OpCase], Operator]
    ops: tuple[str, ...] = field(default=(), kw_only=True)
    partial: bool = field(default=False, kw_only=True)

    def takes(self, case: OpCase) -> bool:
        """Whether it is an implementation of this operator."""
        return not self.ops or case.op in self.ops


def _sdpa(name: str, backend: SDPBackend, *devices: str) -> OpProvider:
    return OpProvider(f"sdpa-{name}", partial(sdpa, backend=backend), ops=("attention",), devices=devices)


_PROVIDERS = (
    OpProvider("visionkernels", partial(ours, backend="auto"), ours=True),
    OpProvider(
        "visionkernels-triton", partial(ours, backend="triton"), ours=True, devices=("cuda",), note='backend="triton"'
    ),
    OpProvider(
        "pytorch", pytorch, ops=("layer_norm", "linear", "patch_embedding"), note="its functions one after another"
    ),
    OpProvider(
        "cublas", product, ops=("linear",), devices=("cuda",), partial=True,
        note="the product and its bias alone, without what follows: a measure, no rival",
    ),
    _sdpa("flash", SDPBackend.FLASH_ATTENTION, "cpu", "cuda"),
    _sdpa("cudnn", SDPBackend.CUDNN_ATTENTION, "cuda"),
    _sdpa("efficient", SDPBackend.EFFICIENT_ATTENTION, "cuda"),
)  # fmt: skip
PROVIDERS = {provider.name: provider for provider in _PROVIDERS}


class Truth:
    """The output in float64 for some of the rows or images, first and last among them.

    Args:
        case: The workload.
        inputs: What the providers get.
    """

    def __init__(self, case: OpCase, inputs: Inputs) -> None:
        first = inputs.batched[0]
        self._index = torch.linspace(0, len(first) - 1, min(len(first), _CHECKED[case.op]), device=first.device).long()
        some = [tensor[self._index] for tensor in inputs.batched]
        plain = sdpa(case, SDPBackend.MATH) if case.op == "attention" else pytorch(case)
        with torch.no_grad():
            self._expected = plain(*(tensor.double() for tensor in (*some, *inputs.shared)))
            loss = relative(plain(*some, *inputs.shared), self._expected)
        self.limit = 2 * loss + limit(first.dtype)

    def error(self, output: Tensor) -> float:
        """Relative error of an output.

        Raises:
            FloatingPointError: If it is NaN or infinite.
        """
        return relative(output[self._index], self._expected)


def measure(provider: OpProvider, case: OpCase, dtype: str, inputs: Inputs, truth: Truth, effort: timing.Effort) -> Row:
    """Measure an operator; an exception becomes part of the row.

    Args:
        provider: Whose.
        case: The workload.
        dtype: A key of ``DTYPES``.
        inputs: What ``draw`` made of both.
        truth: Of these inputs.
        effort: How long to measure.
    """
    tensors = (*inputs.batched, *inputs.shared)
    device = tensors[0].device
    row = Row(case.name, provider.name, dtype, provider.ours, truth.limit, provider.note, partial=provider.partial)
    row.refused = provider.refuses(case, DTYPES[dtype], device)
    if row.refused is not None:
        return row
    operator = provider.build(case)

    def forward() -> Tensor:
        return operator(*tensors)

    def forward_stage() -> None:
        with torch.no_grad():
            output = forward()
            if not provider.partial:
                row.error_forward = truth.error(output)
            row.forward_bytes, row.forward_flops = _bytes((*tensors, output)), case.flops
        time_forward(row, forward, device, effort)

    def graph_stage() -> None:
        time_graph(row, forward, device, effort)

    run_stages(row, device, {"forward": forward_stage, "CUDA graph": graph_stage})
    return row


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
