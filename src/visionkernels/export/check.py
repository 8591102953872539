"""Run an exported artefact beside PyTorch and say how far they are apart."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionkernels._checkpoint import one_line
from visionkernels.export._subject import Subject
from visionkernels.export._trace import outputs_of
from visionkernels.models.output import ViTOutput

TOLERANCE = 1e-5  # relative to the largest entry of an output, in float32
ROUNDING = 2.0**-10  # of a float16

Run = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Comparison:
    """One output of one input.

    Attributes:
        inputs: Which input.
        output: The name of the output.
        error: The largest difference, relative to the largest entry of PyTorch's.
        allowed: What it may be.
        failure: What the runtime said where it gave no result.
    """

    inputs: str
    output: str
    error: float
    allowed: float
    failure: str = ""

    @property
    def ok(self) -> bool:
        """Whether the artefact agrees."""
        return self.error <= self.allowed  # NaN does not


def compare(subject: Subject, run: Run, labels: Sequence[str] = ()) -> list[Comparison]:
    """Compare an artefact with PyTorch on random inputs, with open sizes that it was not made with, and on a sample.

    In float32 they may differ by 1e-5 of an output's largest entry. In float16 the truth is the same model in float32,
    and the artefact may be wrong by twice what PyTorch's own float16 is, plus one rounding.

    Args:
        subject: what was exported.
        run: from inputs to the artefact's outputs.
        labels: the sizes that stayed open.
    """
    with _exact_convolutions():
        return _compare(subject, run, labels)


def _compare(subject: Subject, run: Run, labels: Sequence[str]) -> list[Comparison]:
    found = []
    wide = _in_float32(subject.module) if _is_half(subject.module) else None
    for name, inputs in subject.variants(labels).items():
        with torch.no_grad():
            expected = _outputs(subject.module(**inputs))
            truth = expected
            if wide is not None:
                truth = _outputs(wide(**{k: t.float() if t.is_floating_point() else t for k, t in inputs.items()}))
        try:
            got = run(inputs)
        except RuntimeError as error:  # of the runtime; it is part of the result
            found += [Comparison(name, output, float("inf"), TOLERANCE, one_line(error)) for output in subject.outputs]
            continue
        for output, one, stock, true in zip(subject.outputs, got, expected, truth, strict=True):
            allowed = TOLERANCE if wide is None else 2 * relative(stock, true, subject.filled_from) + ROUNDING
            found.append(Comparison(name, output, relative(one, true, subject.filled_from), allowed))
    return found


@contextmanager
def _exact_convolutions() -> Iterator[None]:
    """Have cuDNN convolve float32 exactly: by default it rounds to TF32, in the artefact and in PyTorch alike.

    By the older of PyTorch's two names for it: after a change by the newer one, torch.export reads the older and fails.
    """
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def relative(got: Tensor, truth: Tensor, filled_from: float = math.inf) -> float:
    """The largest difference relative to the largest entry, infinite where shapes, or what is not finite, differ.

    Args:
        got: What is judged.
        truth: What it should be.
        filled_from: Entries this far from 0, and infinities, are fillings: left out, if they are in the same places
            with the same signs.
    """
    if got.shape != truth.shape:
        return float("inf")
    got, truth = got.detach().cpu().double(), truth.detach().cpu().double()
    if not truth.numel():
        return 0.0
    if not torch.equal(_fillings(got, filled_from), _fillings(truth, filled_from)):
        return float("inf")
    filled = truth.abs() >= filled_from
    if filled.all():
        return 0.0
    return ((got - truth)[~filled].abs().max() / truth[~filled].abs().max().clamp(min=1e-30)).item()


def _fillings(tensor: Tensor, filled_from: float) -> Tensor:
    """Where fillings are, and their signs; NaN is like nothing."""
    return tensor.sign().where(~(tensor.abs() < filled_from), tensor.new_zeros(()))


def _outputs(found: Tensor | Sequence[Tensor] | ViTOutput) -> tuple[Tensor, ...]:
    if isinstance(found, ViTOutput):
        return tuple(outputs_of(found).values())
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _is_half(module: nn.Module) -> bool:
    return any(tensor.dtype == torch.float16 for tensor in (*module.parameters(), *module.buffers()))


def _in_float32(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).float()
