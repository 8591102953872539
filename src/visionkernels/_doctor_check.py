"""A check of every operator on small random calls, forward and all gradients, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from visionkernels.bench.correctness import limit
from visionkernels.ops.deformable_attention import op
from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FORWARD, BACKWARD, DETERMINISTIC = "forward", "backward", "deterministic backward"


@dataclass(frozen=True)
class Workload:
    """Sizes of a call; eight heads of 32 channels, four points a level."""

    name: str
    batch: int
    levels: tuple[tuple[int, int], ...]
    queries: int

    @property
    def pixels(self) -> int:
        """S."""
        return sum(h * w for h, w in self.levels)


_PYRAMID = ((32, 42), (16, 21), (8, 11))
DECODER = Workload("decoder", 2, ((20, 27), (10, 14), (5, 7)), 37)
SMALL_ENCODER = Workload("encoder", 2, ((12, 16), (6, 8)), 240)
ENCODER = Workload("encoder", 7, _PYRAMID, sum(h * w for h, w in _PYRAMID))  # enough samples for binned sums


@dataclass(frozen=True)
class Check:
    """What one operator made of one call.

    Attributes:
        device: Where.
        operator: Which of the public functions.
        direction: ``FORWARD``, ``BACKWARD`` or ``DETERMINISTIC``.
        dtype: A key of ``DTYPES``, that of value; coordinates and weights are float32.
        workload: The name of its sizes.
        error: The largest error of any result, relative to the largest number of that result; None where it raised.
        allowed: The largest error of a right answer.
        failed: What was raised, or that a result is not finite.
    """

    device: str
    operator: str
    direction: str
    dtype: str
    workload: str
    error: float | None
    allowed: float
    failed: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the operator may be trusted here."""
        return self.failed is None and self.error is not None and self.error <= self.allowed


def count(device: torch.device) -> int:
    """How many calls ``check`` makes."""
    return len(_workloads(device)) * len(DTYPES) * 2


def check(device: torch.device, started: Callable[[str], None]) -> Iterator[Check]:
    """Run every operator on a device.

    Args:
        device: ``cpu`` or a CUDA device.
        started: is told of each call before it is made.

    Yields:
        The checks of each call: forward, backward, and on a GPU with binned sums the deterministic backward.
    """
    for workload in _workloads(device):
        for name, dtype in DTYPES.items():
            for operator, call, truth, leaves in _calls(workload, dtype, device):
                started(f"{device} {operator} {workload.name} {name}")
                yield from _check(device, operator, name, workload, call, truth, leaves)


def _workloads(device: torch.device) -> tuple[Workload, ...]:
    return (DECODER, ENCODER if device.type == "cuda" else SMALL_ENCODER)


Function = Callable[..., Tensor]


def _calls(
    workload: Workload, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[str, Function, Function, list[Tensor]]]:
    """Name, operator, reference and inputs of the plain and the fused attention."""
    generator = torch.Generator().manual_seed(0)
    batch, queries, levels = workload.batch, workload.queries, workload.levels
    shape = (batch, queries, 8, len(levels), 4)
    value = torch.randn(batch, workload.pixels, 8, 32, generator=generator).to(dtype).to(device)
    size = torch.tensor([(w, h) for h, w in levels], dtype=torch.float32)[:, None]
    # A gradient by the location jumps on a pixel: every sample stays a quarter of one away, inside or outside.
    pixel = (torch.rand(*shape, 2, generator=generator) * (size + 2)).floor() - 1.25
    pixel += 0.5 * torch.rand(*shape, 2, generator=generator)
    locations = (pixel / size).to(device)
    logits = torch.randn(shape, generator=generator).to(device)
    references = torch.rand(batch, queries, 1, 2, generator=generator).to(device)
    weights = logits.flatten(3).softmax(-1).view(shape)
    plain = [value, locations, weights]
    yield (
        "ms_deform_attn", lambda v, p, w: op.ms_deform_attn(v, list(levels), None, p, w),
        lambda v, p, w: reference_ms_deform_attn(v, levels, p, w), plain,
    )  # fmt: skip
    offsets = (locations - references[:, :, :, None, None]) * size.to(device)
    yield (
        "fused_ms_deform_attn", lambda *t: op.fused_ms_deform_attn(t[0], list(levels), *t[1:]),
        lambda *t: reference_fused_ms_deform_attn(t[0], levels, *t[1:]), [value, references, offsets, logits],
    )  # fmt: skip


def _check(
    device: torch.device, operator: str, name: str, workload: Workload, call: Function, truth: Function,
    leaves: Sequence[Tensor],
) -> Iterator[Check]:  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(workload.batch, workload.queries, 256, generator=generator)
    grad_output = grad_output.to(leaves[0].dtype).to(device)
    expected = _truth(truth, leaves, grad_output)

    def backward() -> Sequence[Tensor]:
        inputs = [leaf.detach().requires_grad_() for leaf in leaves]
        return torch.autograd.grad(call(*inputs), inputs, grad_output)

    def forward() -> Sequence[Tensor]:
        with torch.no_grad():
            return (call(*leaves),)

    def deterministic() -> Sequence[Tensor]:
        with _deterministic():
            return backward()

    parts = [(FORWARD, forward, expected[:1]), (BACKWARD, backward, expected[1:])]
    if _has_bins(device):
        parts.append((DETERMINISTIC, deterministic, expected[1:]))
    allowed = limit(leaves[0].dtype)
    for direction, run, right in parts:
        error, failed = None, None
        try:
            errors = [_error(mine, other) for mine, other in zip(run(), right, strict=True)]
            error = max(errors) if all(map(math.isfinite, errors)) else math.nan
        except Exception as problem:  # noqa: BLE001 — whatever an operator raises belongs into the report
            lines = str(problem).strip().splitlines() or [""]
            failed = f"{type(problem).__name__}: {lines[0][:300]}"
        if error is not None and not math.isfinite(error):
            error, failed = None, "the result holds NaN or infinity where float64 does not"
        yield Check(str(device), operator, direction, name, workload.name, error, allowed, failed)


def _has_bins(device: torch.device) -> bool:
    """Whether there is a deterministic gradient of value apart from the usual one."""
    if device.type == "cpu":  # the usual one is deterministic
        return False
    from visionkernels.ops.deformable_attention.plan import has_warp_instructions

    return has_warp_instructions(device)


@contextmanager
def _deterministic() -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _truth(truth: Function, leaves: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The float64 output and gradients, an image at a time: the reference keeps every corner."""
    images = []
    for image in range(len(grad_output)):
        part = slice(image, image + 1)
        inputs = [leaf[part].detach().double().requires_grad_() for leaf in leaves]
        output = truth(*inputs)
        images.append([output.detach(), *torch.autograd.grad(output, inputs, grad_output[part].double())])
    return [torch.cat(results) for results in zip(*images, strict=True)]


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest right number; NaN where the result holds one."""
    if found.shape != expected.shape:
        raise AssertionError(f"the result is {list(found.shape)}, expected {list(expected.shape)}")
    return ((found.double() - expected).abs().max() / expected.abs().max()).item()
