"""One row of a result: a provider on a case at a dtype, checked first, then timed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from visionkernels.bench import correctness, timing
from visionkernels.bench.cases import Case, Inputs
from visionkernels.bench.providers import Call, Provider
from visionkernels.bench.record import Row

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_GRAPH_BELOW = 1.0  # milliseconds; launches cost a longer call nothing


def measure(
    provider: Provider,
    case: Case,
    dtype: str,
    inputs: Inputs,
    truth: correctness.Truth,
    effort: timing.Effort,
) -> Row:
    """Measure a provider of the operator.

    An exception becomes part of the row, with what was measured before it.

    Args:
        provider: Whom.
        case: The workload.
        dtype: A key of ``DTYPES``.
        inputs: What ``draw`` made of both.
        truth: Of these inputs.
        effort: How long to measure.
    """
    device = inputs.value.device
    row = Row(case.name, provider.name, dtype, provider.ours, correctness.limit(DTYPES[dtype]), provider.note)
    row.refused = provider.refuses(case, DTYPES[dtype], device)
    if row.refused is not None:
        return row

    call: Call | None = None

    def forward_stage() -> None:
        nonlocal call
        call = provider.bind(case, inputs)
        with torch.no_grad():
            output = call.forward()
            row.error_forward = truth.forward_error(output, provider.fused or provider.packed)
            _count(row, case, call, output, inputs if provider.fused else None)
        time_forward(row, call.forward, device, effort)

    def backward_stage() -> None:
        assert call is not None
        row.error_backward = truth.backward_error(call, provider.fused or provider.packed)
        # What torch.compile makes gives its buffers away in the backward, so that it runs once a forward.
        time_backward(row, call.forward, call.leaves, device, effort, alone=not provider.compiled)

    def graph_stage() -> None:
        assert call is not None
        time_graph(row, call.forward, device, effort)

    run_stages(row, device, {"forward": forward_stage, "backward": backward_stage, "CUDA graph": graph_stage})
    return row


def run_stages(row: Row, device: torch.device, stages: dict[str, Callable[[], None]]) -> None:
    """Run the stages of a row until one fails, which is written into the row.

    Raises:
        DeviceLost: If a failure left the GPU unusable.
    """
    for stage, work in stages.items():
        try:
            work()
        except Exception as error:  # noqa: BLE001 — whatever a peer raises belongs into the row
            message = str(error).strip().splitlines() or [""]
            row.failed = {"stage": stage, "error": type(error).__name__, "message": message[0][:200]}
            break
    if row.failed is not None and device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except RuntimeError as error:
            raise DeviceLost(row) from error


class DeviceLost(Exception):
    """A provider has left the GPU unusable to this process.

    Attributes:
        row: Its row.
    """

    def __init__(self, row: Row) -> None:
        super().__init__(f"{row.provider} left the GPU unusable in the {row.case} case at {row.dtype}")
        self.row = row


def time_forward(row: Row, forward: Callable[[], Tensor], device: torch.device, effort: timing.Effort) -> None:
    """Time a forward without grad, and what it costs the host and the memory."""
    with torch.no_grad():
        row.forward = timing.time_calls(forward, device, effort)
        if device.type == "cuda":
            row.host_microseconds = timing.host_microseconds(forward, device, effort)
            row.forward_megabytes = timing.peak_megabytes(forward, device)


def time_graph(row: Row, forward: Callable[[], Tensor], device: torch.device, effort: timing.Effort) -> None:
    """Time a short forward in a CUDA graph; last of all, since a call that cannot be recorded ends the row."""
    if device.type == "cuda" and row.forward is not None and row.forward.median < _GRAPH_BELOW:
        with torch.no_grad():
            row.forward_graph = timing.time_graph(forward, device, effort)


def time_backward(
    row: Row,
    forward: Callable[[], Tensor],
    leaves: tuple[Tensor, ...],
    device: torch.device,
    effort: timing.Effort,
    *,
    alone: bool = True,
) -> None:
    """Time the backward to the leaves, ``alone`` and together with the forward."""
    output = forward()  # its graph is kept until the backward alone has been timed
    gradient = torch.randn_like(output)
    if alone:
        backward = partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True)
        row.backward = timing.time_calls(backward, device, effort)
        del backward
    del output

    def both() -> object:
        return torch.autograd.grad(forward(), leaves, gradient)

    row.forward_backward = timing.time_calls(both, device, effort)
    if device.type == "cuda":
        row.peak_megabytes = timing.peak_megabytes(both, device)
        held = sum(map(_bytes, leaves))
        row.total_megabytes = row.peak_megabytes + held / 1e6


def _count(row: Row, case: Case, call: Call, output: Tensor, fused: Inputs | None) -> None:
    """Compulsory bytes and operations."""
    inputs = sum(map(_bytes, call.leaves))
    extra = 0 if fused is None else _bytes(fused.geometry.reference_points)
    outputs = _bytes(output)
    row.forward_bytes = inputs + extra + outputs
    row.backward_bytes = 2 * inputs + extra + outputs
    row.forward_flops = 8 * case.batch * case.queries * case.num_heads * sum(case.points) * case.head_dim


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
