"""The suite of whole vision transformers: random weights, last hidden state, one call after another."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from visionkernels.bench import timing
from visionkernels.bench.breakdown import breakdown
from visionkernels.bench.measure import DTYPES, run_stages
from visionkernels.bench.providers import Candidate
from visionkernels.bench.record import Row
from visionkernels.bench.vit_cases import ModelCase
from visionkernels.bench.vit_subject import Subject, Truth

_CALLS = 3  # over which the most memory is taken: the first may capture a graph


class Bound(NamedTuple):
    """A model ready to run."""

    forward: Callable[[Tensor], Tensor]  # pixels -> [B, N, C]
    weights: int  # bytes
    same_weights: bool  # as the subject's


@dataclass(frozen=True)
class ModelProvider(Candidate):
    """A whole vision transformer.

    Attributes:
        build: ``(subject, case)`` to the model, in evaluation mode.
        profiled: Its operators are this package's and run one by one, so that a profile shows them.
    """

    build: Callable[[Subject, ModelCase], Bound]
    profiled: bool = field(default=False, kw_only=True)


def _bytes(model: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def _ours(subject: Subject, case: ModelCase, cuda_graphs: bool) -> Bound:
    from visionkernels.models import ViT

    vit = ViT.from_pretrained(
        Path(subject.directory.name), dtype=subject.dtype, device=subject.device, cuda_graphs=cuda_graphs
    )
    return Bound(lambda pixels: vit(pixels).last_hidden_state, _bytes(vit), True)


def _transformers(subject: Subject, case: ModelCase, attention: str) -> Bound:
    model = subject.model
    model.set_attn_implementation(attention)
    return Bound(lambda pixels: model(pixels).last_hidden_state, _bytes(model), True)


def _timm(subject: Subject, case: ModelCase) -> Bound:
    timm = importlib.import_module("timm")
    with torch.device(subject.device):
        model = timm.create_model(case.timm, pretrained=False, num_classes=0, img_size=case.image_size)
    model = model.to(subject.device, subject.dtype).eval()
    return Bound(model.forward_features, _bytes(model), False)


def _graphed(build: Callable[[Subject, ModelCase], Bound]) -> Callable[[Subject, ModelCase], Bound]:
    """A model in a CUDA graph of its own: the pixels are copied in, and the output is the graph's."""

    def graphed(subject: Subject, case: ModelCase) -> Bound:
        plain = build(subject, case)
        captured: list[Any] = []

        def forward(pixels: Tensor) -> Tensor:
            if not captured:
                captured.extend(_capture(plain.forward, pixels))
            graph, held, output = captured
            held.copy_(pixels)
            graph.replay()
            return output

        return plain._replace(forward=forward)

    return graphed


def _capture(forward: Callable[[Tensor], Tensor], pixels: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
    held, stream = pixels.clone(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            forward(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward(held)
    return graph, held, output


def _compiled(build: Callable[[Subject, ModelCase], Bound]) -> Callable[[Subject, ModelCase], Bound]:
    """A model under ``torch.compile``, which tunes it and puts it into a CUDA graph."""

    def compiled(subject: Subject, case: ModelCase) -> Bound:
        plain = build(subject, case)
        torch.compiler.reset()
        return plain._replace(forward=torch.compile(plain.forward, mode="max-autotune", dynamic=False))

    return compiled


_MODELING = "transformers.models.vit.modeling_vit"
_SDPA = partial(_transformers, attention="sdpa")
_FINITE = "other weights, so that its output is only seen to be finite"
_COMPILED = 'torch.compile(mode="max-autotune"), memory without that of its graphs'
_PROVIDERS = (
    ModelProvider("visionkernels", partial(_ours, cuda_graphs=True), ours=True, module=_MODELING),
    ModelProvider(
        "visionkernels-eager", partial(_ours, cuda_graphs=False), ours=True, profiled=True, module=_MODELING,
        note="without CUDA graphs",
    ),
    ModelProvider("transformers-sdpa", _SDPA, module=_MODELING, package="transformers"),
    ModelProvider(
        "transformers-eager", partial(_transformers, attention="eager"), module=_MODELING, package="transformers",
        note="attn_implementation=\"eager\", scores in memory",
    ),
    ModelProvider(
        "transformers-compile", _compiled(_SDPA), module=_MODELING, package="transformers", compiled=True,
        on_request=True, note=_COMPILED,
    ),
    ModelProvider("timm", _timm, module="timm", package="timm", note=_FINITE),
    ModelProvider(
        "timm-graph", _graphed(_timm), module="timm", package="timm", devices=("cuda",),
        note=f"in a CUDA graph; {_FINITE}",
    ),
    ModelProvider(
        "timm-compile", _compiled(_timm), module="timm", package="timm", compiled=True, on_request=True,
        note=f"{_COMPILED}; {_FINITE}",
    ),
)  # fmt: skip
PROVIDERS = {provider.name: provider for provider in _PROVIDERS}


def measure(
    provider: ModelProvider, case: ModelCase, dtype: str, subject: Subject, truth: Truth, effort: timing.Effort
) -> Row:
    """Measure a whole model; an exception becomes part of the row.

    Args:
        provider: Whose.
        case: The workload.
        dtype: A key of ``DTYPES``.
        subject: Its weights.
        truth: Of this subject and case.
        effort: How long to measure.
    """
    device = subject.device
    row = Row(case.name, provider.name, dtype, provider.ours, truth.limit, provider.note)
    row.refused = provider.refuses(case, DTYPES[dtype], device)
    if row.refused is not None:
        return row
    # A model's host part varies more from call to call than a kernel.
    effort = replace(effort, seconds=3 * effort.seconds, least=2 * effort.least)
    bound: Bound | None = None

    def forward() -> Tensor:
        assert bound is not None
        return bound.forward(truth.pixels)

    def forward_stage() -> None:
        nonlocal bound
        bound = provider.build(subject, case)
        row.weights_megabytes, row.forward_flops = bound.weights / 1e6, case.flops
        with torch.no_grad():
            if device.type == "cuda":
                row.forward_megabytes = _most_memory(forward, device, provider.compiled)
            output = forward()
            if bound.same_weights:
                row.error_forward = truth.error(output)
            elif not math.isfinite(output.double().norm().item()):
                raise FloatingPointError("the result holds NaN or infinity")
            row.forward = timing.time_latency(forward, device, effort)
            if device.type == "cuda":
                row.host_microseconds = timing.host_microseconds(forward, device, effort)

    def breakdown_stage() -> None:
        if provider.profiled and "breakdown" in case.tags:
            with torch.no_grad():
                row.breakdown = breakdown(forward, device)

    run_stages(row, device, {"forward": forward_stage, "breakdown": breakdown_stage})
    return row


def _most_memory(forward: Callable[[], Tensor], device: torch.device, compiled: bool) -> float:
    """The most that the first calls hold beyond weights and pixels, in 10^6 bytes; not of the call that compiles."""
    if compiled:
        forward()
    torch._C._cuda_clearCublasWorkspaces()  # or who comes first would pay for all

    def calls() -> None:
        for _ in range(_CALLS):
            forward()

    return timing.peak_megabytes(calls, device)
