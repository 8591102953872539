"""How far a provider's output and gradients are from float64, on some of the queries of every image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from visionkernels.bench.cases import Case, Inputs
from visionkernels.bench.providers import Call
from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

QUERIES = 1000  # checked in the forward, first and last among them
GRADIENT_QUERIES = 100


def limit(dtype: torch.dtype) -> float:
    """The largest relative error of a right answer: one rounding of the output, or of float32 coordinates.

    Example:
        >>> limit(torch.float32)
        1e-05
    """
    return 1e-12 if dtype == torch.float64 else max(torch.finfo(dtype).eps, 1e-5)


def checked_queries(case: Case, most: int, device: torch.device) -> Tensor:
    """Indices of at most so many queries, evenly spread, first and last among them."""
    return torch.linspace(0, case.queries - 1, min(case.queries, most), device=device).long()


class Truth:
    """The float64 reference of one set of inputs, computed on first use.

    The gradients checked are those of value and of weights (or logits). That of the locations jumps where a
    sample crosses the centre of a pixel, so that one rounding can turn it.

    Args:
        case: The workload.
        inputs: What the providers get, as they are: the rounding of ``draw`` counts against nobody.
    """

    def __init__(self, case: Case, inputs: Inputs) -> None:
        self._case, self._inputs = case, inputs
        device = inputs.value.device
        self._queries = checked_queries(case, QUERIES, device)
        self._gradient_queries = checked_queries(case, GRADIENT_QUERIES, device)
        count = len(self._gradient_queries)
        generator = torch.Generator().manual_seed(0)
        width = case.num_heads * case.head_dim
        self._grad_output = torch.randn(case.batch, count, width, generator=generator).to(device, inputs.value.dtype)
        self._outputs: dict[bool, Tensor] = {}
        self._gradients: dict[bool, tuple[Tensor, ...]] = {}

    def forward_error(self, output: Tensor, fused: bool) -> float:
        """Relative error (2-norm) of an output ``[N, Lq, M * D]``."""
        return relative(output[:, self._queries], self._output(fused))

    def backward_error(self, call: Call, fused: bool) -> float:
        """Relative error of the gradients for an output gradient that is 0 but at the checked queries."""
        output = call.forward()
        grad_output = torch.zeros(output.shape, dtype=output.dtype, device=output.device)
        grad_output[:, self._gradient_queries] = self._grad_output.to(output.dtype)
        gradients = torch.autograd.grad(output, call.leaves, grad_output)
        expected_value, expected_weights = self._gradient(fused)
        grad_weights = call.unpack(gradients[-1])[:, self._gradient_queries].reshape(expected_weights.shape)
        return max(relative(gradients[0], expected_value), relative(grad_weights, expected_weights))

    def _output(self, fused: bool) -> Tensor:
        if fused not in self._outputs:
            with torch.no_grad():
                self._outputs[fused], _, _ = self._reference(fused, self._queries)
        return self._outputs[fused]

    def _gradient(self, fused: bool) -> tuple[Tensor, ...]:
        if fused not in self._gradients:
            output, *leaves = self._reference(fused, self._gradient_queries)
            self._gradients[fused] = torch.autograd.grad(output, leaves, self._grad_output.double())
        return self._gradients[fused]

    def _reference(self, fused: bool, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, levels = self._inputs, self._case.levels
        points = self._case.points if self._case.ragged else None
        value = inputs.value.double().requires_grad_()
        if not fused:
            weights = inputs.attention_weights[:, queries].double().requires_grad_()
            locations = inputs.sampling_locations[:, queries].double()
            return reference_ms_deform_attn(value, levels, locations, weights, points), value, weights
        logits = inputs.attention_logits[:, queries].double().requires_grad_()
        references, offsets = inputs.geometry.reference_points[:, queries], inputs.sampling_offsets[:, queries]
        output = reference_fused_ms_deform_attn(value, levels, references.double(), offsets.double(), logits, points)
        return output, value, logits


def relative(found: Tensor, expected: Tensor) -> float:
    """Relative error in the 2-norm.

    Raises:
        FloatingPointError: If it is NaN or infinite.
    """
    error = ((found.double() - expected).norm() / expected.norm()).item()
    if not math.isfinite(error):
        raise FloatingPointError(f"the result holds NaN or infinity where float64 does not (error {error})")
    return error
