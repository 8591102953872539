"""The suite of whole modules: projections, softmax and sampling locations around the operator, forward and backward."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from visionkernels.bench.cases import Case, draw_references, geometry
from visionkernels.bench.correctness import GRADIENT_QUERIES, QUERIES, checked_queries, limit, relative
from visionkernels.bench.measure import DTYPES, run_stages, time_backward, time_forward
from visionkernels.bench.providers import Attention, Provider, pack
from visionkernels.bench.record import Row
from visionkernels.bench.timing import Effort
from visionkernels.nn import MSDeformAttn
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn

_COMPARED = ("value_proj", "attention_weights", "output_proj")  # not the offsets: see Truth in correctness.py


class ModuleInputs:
    """Weights and inputs of a case, the same numbers for every provider and dtype but for their rounding.

    Attributes:
        module: Parameters; its own forward is this package's.
        query: ``[N, Lq, C]``.
        features: ``[N, S, C]``.
        geometry: Shapes and references, float32 (float64 for float64).
    """

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
        width = case.num_heads * case.head_dim
        module = MSDeformAttn(width, len(case.levels), case.num_heads, case.points[0])
        with torch.no_grad():  # offsets with a spread of a pixel and logits of 1, as in cases.draw
            for name, parameter in module.named_parameters():
                if name.endswith("weight"):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) / width**0.5)
        self.module = module.to(device, dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.geometry = geometry(case, draw_references(case, generator).to(device, wide))
        self.query = torch.randn(case.batch, case.queries, width, generator=generator).to(device, dtype)
        self.features = torch.randn(case.batch, case.pixels, width, generator=generator).to(device, dtype)

    def leaves(self) -> tuple[Tensor, ...]:
        """What gradients are taken to: query, features and every parameter."""
        return (self.query.requires_grad_(), self.features.requires_grad_(), *self.module.parameters())


def upstream_module(
    module: MSDeformAttn, attention: Attention, query: Tensor, references: Tensor, features: Tensor, sizes: Tensor
) -> Tensor:
    """Deformable-DETR's module in PyTorch around an operator of value, locations and logits.

    Args:
        module: Its parameters.
        attention: ``(value, locations, logits)`` to ``[N, Lq, C]``.
        query: ``[N, Lq, C]``.
        references: ``[N, Lq, L, 2]``.
        features: ``[N, S, C]``.
        sizes: (w, h) of each level, ``[L, 2]``.

    Returns:
        ``[N, Lq, C]``.

    Source: ``MSDeformAttn.forward`` of Deformable-DETR.
    """
    samples = (module.n_heads, module.n_levels, module.n_points)
    value = module.value_proj(features).unflatten(2, (module.n_heads, -1))
    offsets = module.sampling_offsets(query).unflatten(2, (*samples, 2))
    logits = module.attention_weights(query).unflatten(2, samples)
    locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    return module.output_proj(attention(value, locations, logits))


def _adapt(provider: Provider, attention: Attention, dtype: torch.dtype) -> Attention:
    """From what ``upstream_module`` hands over to what the provider takes."""
    if provider.packed:
        return lambda value, locations, logits: attention(value, pack(locations, logits))
    if dtype in provider.dtypes:
        narrow = dtype if provider.narrow else None
        return lambda value, locations, logits: attention(
            value, locations.to(narrow or locations.dtype), _softmax(logits)
        )
    return lambda value, locations, logits: attention(
        value.float().contiguous(), locations.contiguous(), _softmax(logits).float()
    ).to(dtype)


def _softmax(logits: Tensor) -> Tensor:
    return logits.flatten(3).softmax(-1).view(logits.shape)


def bind(provider: Provider, case: Case, inputs: ModuleInputs) -> Callable[[], Tensor]:
    """The forward of the module on a provider's operator."""
    module, references, shapes = inputs.module, inputs.geometry.reference_points, inputs.geometry.spatial_shapes
    query, features = inputs.query, inputs.features
    if provider.fused:
        return lambda: module(query, references, features, shapes)
    sizes = shapes.flip(1).to(query.dtype)
    attention = _adapt(provider, provider.build(case, inputs.geometry), query.dtype)
    forward = provider.compile(
        lambda query, references, features: upstream_module(module, attention, query, references, features, sizes)
    )
    return lambda: forward(query, references, features)


class ModuleTruth:
    """The module in float64 on some of the queries, and how far PyTorch at the dtype is from it.

    Args:
        case: The workload.
        inputs: What the providers get.
    """

    def __init__(self, case: Case, inputs: ModuleInputs) -> None:
        self._case, self._inputs, self._device = case, inputs, inputs.query.device
        self._queries = checked_queries(case, QUERIES, self._device)
        self._gradient_queries = checked_queries(case, GRADIENT_QUERIES, self._device)
        generator = torch.Generator().manual_seed(0)
        shape = (case.batch, len(self._gradient_queries), inputs.query.shape[2])
        self._grad_output = torch.randn(shape, generator=generator).to(self._device, inputs.query.dtype)
        self._output, self._gradients = self._reference(torch.float64)
        output, gradients = self._reference(inputs.query.dtype)
        loss = max(relative(output, self._output), self._compare(gradients))
        self.limit = 2 * loss + limit(inputs.query.dtype)

    def forward_error(self, output: Tensor) -> float:
        """Relative error of an output ``[N, Lq, C]``."""
        return relative(output[:, self._queries], self._output)

    def backward_error(self, forward: Callable[[], Tensor]) -> float:
        """The largest relative error of the gradients compared, for one output gradient on the checked queries."""
        output = forward()
        grad_output = torch.zeros_like(output)
        grad_output[:, self._gradient_queries] = self._grad_output
        return self._compare(
            torch.autograd.grad(output, _compared(self._inputs.module, self._inputs.features), grad_output)
        )

    def _compare(self, gradients: Sequence[Tensor]) -> float:
        return max(relative(found, expected) for found, expected in zip(gradients, self._gradients, strict=True))

    def _reference(self, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        module = copy.deepcopy(self._inputs.module).to(dtype)
        features = self._inputs.features.detach().to(dtype).requires_grad_()
        with torch.no_grad():
            output = self._part(module, features, self._queries)
        part = self._part(module, features, self._gradient_queries)
        return output, torch.autograd.grad(part, _compared(module, features), self._grad_output.to(dtype))

    def _part(self, module: MSDeformAttn, features: Tensor, queries: Tensor) -> Tensor:
        levels, geometry = self._case.levels, self._inputs.geometry
        query = self._inputs.query.detach()[:, queries].to(features.dtype)
        references = geometry.reference_points[:, queries]
        sizes = geometry.spatial_shapes.flip(1).to(features.dtype)
        return upstream_module(
            module,
            lambda value, locations, logits: reference_ms_deform_attn(value, levels, locations, _softmax(logits)),
            query, references.to(torch.promote_types(references.dtype, features.dtype)), features, sizes,
        )  # fmt: skip


def _compared(module: MSDeformAttn, features: Tensor) -> list[Tensor]:
    return [features, *(parameter for name in _COMPARED for parameter in getattr(module, name).parameters())]


def measure(
    provider: Provider, case: Case, dtype: str, inputs: ModuleInputs, truth: ModuleTruth, effort: Effort
) -> Row:
    """Measure the module on a provider's operator; an exception becomes part of the row.

    A provider without the dtype gets float32, as in training under autocast.
    """
    device, wanted = inputs.query.device, DTYPES[dtype]
    widened = wanted not in provider.dtypes and not provider.packed
    row = Row(case.name, provider.name, dtype, provider.ours, truth.limit, provider.note, widened)
    row.refused = provider.refuses(case, torch.float32 if widened else wanted, device)
    if row.refused is not None:
        return row
    forward: Callable[[], Tensor] | None = None

    def forward_stage() -> None:
        nonlocal forward
        inputs.leaves()
        forward = bind(provider, case, inputs)
        with torch.no_grad():
            row.error_forward = truth.forward_error(forward())
        time_forward(row, forward, device, effort)

    def backward_stage() -> None:
        assert forward is not None
        row.error_backward = truth.backward_error(forward)
        time_backward(row, forward, inputs.leaves(), device, effort, alone=False)

    run_stages(row, device, {"forward": forward_stage, "backward": backward_stage})
    return row
