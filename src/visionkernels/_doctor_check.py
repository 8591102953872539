"""A check of every operator on small random calls, forward and all gradients, against the float64 reference."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from visionkernels._doctor_paths import OPERATORS
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
        for name in DTYPES:
            try:
                found = calls(workload, name, device)
            except Exception as problem:  # noqa: BLE001 — such as a GPU without memory
                for operator in OPERATORS:
                    started(f"{device} {operator} {workload.name} {name}")
                    yield from _all_failed(device, operator, workload, name, problem)
                continue
            for call in found:
                started(f"{device} {call.operator} {workload.name} {name}")
                yield from call.check()


def describe(problem: Exception) -> str:
    """Name an exception, with the first line of what it says."""
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:300]}"


def _all_failed(
    device: torch.device, operator: str, workload: Workload, dtype: str, problem: Exception
) -> Iterator[Check]:
    """The checks of a call that could not be made."""
    for direction in (FORWARD, BACKWARD, *([DETERMINISTIC] if _has_bins(device) else [])):
        place = (str(device), operator, direction, dtype, workload.name)
        yield Check(*place, None, limit(DTYPES[dtype]), describe(problem))


def _workloads(device: torch.device) -> tuple[Workload, ...]:
    return (DECODER, ENCODER if device.type == "cuda" else SMALL_ENCODER)


def calls(workload: Workload, dtype: str, device: torch.device) -> list[Call]:
    """A call of the plain and one of the fused attention; the same numbers each time."""
    generator = torch.Generator().manual_seed(0)
    batch, queries, levels = workload.batch, workload.queries, workload.levels
    shape = (batch, queries, 8, len(levels), 4)
    value = torch.randn(batch, workload.pixels, 8, 32, generator=generator).to(DTYPES[dtype]).to(device)
    size = torch.tensor([(w, h) for h, w in levels], dtype=torch.float32)[:, None]
    # A gradient by the location jumps on a pixel: every sample stays a quarter of one away, inside or outside.
    pixel = (torch.rand(*shape, 2, generator=generator) * (size + 2)).floor() - 1.25
    pixel += 0.5 * torch.rand(*shape, 2, generator=generator)
    locations = (pixel / size).to(device)
    logits = torch.randn(shape, generator=generator).to(device)
    references = torch.rand(batch, queries, 1, 2, generator=generator).to(device)
    weights = logits.flatten(3).softmax(-1).view(shape)
    offsets = (locations - references[:, :, :, None, None]) * size.to(device)
    grad_output = torch.randn(batch, queries, 256, generator=generator).to(value)
    plain, fused = [value, locations, weights], [value, references, offsets, logits]
    return [
        Call("ms_deform_attn", workload, dtype, plain, grad_output),
        Call("fused_ms_deform_attn", workload, dtype, fused, grad_output),
    ]


@dataclass(frozen=True)
class Call:
    """One call of one operator.

    Attributes:
        operator: Its name.
        workload: Its sizes.
        dtype: A key of ``DTYPES``, that of value; coordinates and weights are float32.
        leaves: Its tensors, value first.
        grad_output: ``[N, Lq, M * D]``, in the value's dtype.
    """

    operator: str
    workload: Workload
    dtype: str
    leaves: Sequence[Tensor]
    grad_output: Tensor

    def forward(self) -> Sequence[Tensor]:
        """The output alone, in a tuple."""
        with torch.no_grad():
            return (self._attend(*self.leaves),)

    def backward(self) -> Sequence[Tensor]:
        """The gradients of all leaves."""
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        return torch.autograd.grad(self._attend(*leaves), leaves, self.grad_output)

    def check(self) -> Iterator[Check]:
        """Compare forward, backward and, where it is another, the deterministic backward with float64."""
        device = self.grad_output.device
        try:
            with _one_thread():
                expected = self._truth()
        except Exception as problem:  # noqa: BLE001 — such as a GPU without memory
            yield from _all_failed(device, self.operator, self.workload, self.dtype, problem)
            return
        parts: list[tuple[str, Callable[[], Sequence[Tensor]], list[Tensor]]]
        parts = [(FORWARD, self.forward, expected[:1]), (BACKWARD, self.backward, expected[1:])]
        if _has_bins(device):
            parts.append((DETERMINISTIC, self._deterministic, expected[1:]))
        allowed = limit(DTYPES[self.dtype])
        for direction, run, right in parts:
            error, failed = None, None
            try:
                errors = [largest_error(mine, other) for mine, other in zip(run(), right, strict=True)]
                error = max(errors) if all(map(math.isfinite, errors)) else math.nan
            except Exception as problem:  # noqa: BLE001 — whatever an operator raises belongs into the report
                failed = describe(problem)
            if error is not None and not math.isfinite(error):
                error, failed = None, "the result holds NaN or infinity where float64 does not"
            place = (str(device), self.operator, direction, self.dtype, self.workload.name)
            yield Check(*place, error, allowed, failed)

    def _attend(self, value: Tensor, *others: Tensor) -> Tensor:
        levels, attend = list(self.workload.levels), getattr(op, self.operator)
        return attend(value, levels, *([None] if self.operator == "ms_deform_attn" else []), *others)

    def _deterministic(self) -> Sequence[Tensor]:
        with _deterministic():
            return self.backward()

    def _truth(self) -> list[Tensor]:
        """The float64 output and gradients, an image at a time: the reference keeps every corner."""
        plain = self.operator == "ms_deform_attn"
        reference: Callable[..., Tensor] = reference_ms_deform_attn if plain else reference_fused_ms_deform_attn
        images = []
        for image in range(self.workload.batch):
            part = slice(image, image + 1)
            value, *others = leaves = [leaf[part].detach().double().requires_grad_() for leaf in self.leaves]
            output = reference(value, self.workload.levels, *others)
            images.append([output.detach(), *torch.autograd.grad(output, leaves, self.grad_output[part].double())])
        return [torch.cat(results) for results in zip(*images, strict=True)]


def _has_bins(device: torch.device) -> bool:
    """Whether there is a deterministic gradient of value apart from the usual one."""
    if device.type == "cpu":  # the usual one is deterministic
        return False
    if importlib.util.find_spec("triton") is None:  # there is no gradient at all, and the other checks say so
        return False
    from visionkernels.ops.deformable_attention.plan import has_warp_instructions

    return has_warp_instructions(device)


@contextmanager
def _one_thread() -> Iterator[None]:
    """For many small operators, which several threads make slower where other programs take the cores too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _deterministic() -> Iterator[None]:
    before, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest error relative to the largest right number; NaN where a result is."""
    if found.shape != expected.shape:
        raise AssertionError(f"the result is {list(found.shape)}, expected {list(expected.shape)}")
    error, largest = (found.double() - expected).abs().max().item(), expected.abs().max().item()
    return error / largest if largest else error
