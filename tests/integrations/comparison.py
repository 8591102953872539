"""What a detector computes, outputs and every gradient, and how far two of them are apart."""

import functools
import importlib.util
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from integrations import tiny_detectors
from torch import nn

import visionkernels.integrations.transformers as table
from visionkernels.integrations.transformers import INTEGRATIONS


def parameters_of(names):
    """Return test parameters for models, skipped where the installed transformers does not have one."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                importlib.util.find_spec(f"transformers.models.{tiny_detectors.model_type(name)}") is None,
                reason="not in this version of transformers",
            ),
        )
        for name in names
    ]


CLASSES = {row.class_name for row in INTEGRATIONS}


def attention_of(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ in CLASSES]


class Call(NamedTuple):
    value: torch.Tensor
    shapes: Any
    start: torch.Tensor | None
    locations: torch.Tensor
    weights: torch.Tensor
    num_points: list[int] | None
    method: str
    out: torch.Tensor


def record_calls(monkeypatch) -> list[Call]:
    """Return a list that collects the arguments and the result of every call of the operator by an adapter."""
    recorded = []
    operator = table.ms_deform_attn

    def record(value, shapes, start, locations, weights, *, num_points=None, method="bilinear"):
        out = operator(value, shapes, start, locations, weights, num_points=num_points, method=method)
        recorded.append(Call(value, shapes, start, locations, weights, num_points, method, out))
        return out

    monkeypatch.setattr(table, "ms_deform_attn", record)
    return recorded


def stock_of(call):
    """Return what upstream's own code makes of a recorded call in fp64."""
    if call.num_points is None:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

        return MultiScaleDeformableAttention.forward(
            None, call.value.double(), None, call.shapes, None, call.locations.double(), call.weights.double(), 64
        )
    from transformers.models.rt_detr_v2.modeling_rt_detr_v2 import multi_scale_deformable_attention_v2

    method = {"bilinear": "default", "nearest": "discrete"}[call.method]
    inputs = (call.value.double(), call.shapes, call.locations.double(), call.weights.double())
    return multi_scale_deformable_attention_v2(*inputs, call.num_points, method)


def tensors_of(output: object) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_of(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_of(value)


def usable(tensor):
    """Return what counts: masked proposals are filled with 1e4, infinity or the largest number."""
    return tensor.isfinite() & (tensor.abs() < 1e3)


def run(model, inputs):
    """Return the output tensors and every parameter's gradient of a random projection of all of them."""
    outputs = list(tensors_of(model(**inputs)))
    generator = torch.Generator().manual_seed(1)
    loss = 0.0
    for out in outputs:
        loss = loss + (out * torch.randn(out.shape, generator=generator).to(out))[usable(out)].sum()
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return [out.detach() for out in outputs], grads


@functools.cache
def truth_of(name):
    """Return what the stock model computes in fp64, and the parameters whose gradient is only rounding.

    In exact arithmetic it is zero: a key's bias shifts all logits alike.
    """
    outputs, grads = run(*tiny_detectors.build(name, torch.float64))
    sizes = {key: grad.abs().max() for key, grad in grads.items() if grad is not None}
    return (outputs, grads), {key for key, size in sizes.items() if size < 1e-12 * max(sizes.values())}


def error_of(name, expected, actual):
    """Return the largest errors of outputs and gradients, relative to the largest entry of each tensor."""
    (outputs, grads), (actual_outputs, actual_grads) = expected, actual
    forward = max(relative(a, b) for a, b in zip(outputs, actual_outputs, strict=True))
    unused = {key for key, grad in grads.items() if grad is None}
    assert unused == {key for key, grad in actual_grads.items() if grad is None}
    grads = {key: grad for key, grad in grads.items() if key not in unused}
    top = max(grad.abs().max() for grad in grads.values())
    zero = truth_of(name)[1]
    backward = max(relative(g, actual_grads[key], top if key in zero else None) for key, g in grads.items())
    return forward, backward


def relative(a, b, scale=None):
    assert a.shape == b.shape
    mask = usable(a)
    if not torch.equal(mask, usable(b)):
        return float("inf")
    if not mask.any():
        return 0.0
    a, b = a[mask], b[mask]
    return ((a - b).abs().max() / (a.abs().max() if scale is None else scale)).item()
