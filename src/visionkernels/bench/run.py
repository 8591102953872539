"""Measures what was asked for: every provider on every case, right first, then timed, in one run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from visionkernels.bench import correctness, timing
from visionkernels.bench.cases import CASES, Case, Inputs, draw
from visionkernels.bench.environment import environment
from visionkernels.bench.providers import PROVIDERS, Provider
from visionkernels.bench.record import Record, Row, caption, remarks, rich_tables, save
from visionkernels.detection import find_device
from visionkernels.errors import UserError

SUITES = ("msda",)
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What to measure; None stands for the default.

    Attributes:
        suite: Name of the suite.
        dtypes: Names of dtypes: by default fp16, bf16 and fp32 on a GPU, fp32 on the CPU.
        against: Names of peers: by default those that can be imported.
        cases: Names of cases, or ``all``: by default the usual ones, with ``quick`` the small ones.
        quick: Measure for a shorter time.
        save: Directory for the result file.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``: by default a GPU if there is one.
    """

    suite: str = "msda"
    dtypes: Sequence[str] | None = None
    against: Sequence[str] | None = None
    cases: Sequence[str] | None = None
    quick: bool = False
    save: Path | None = None
    device: str | None = None


def run(options: Options) -> int:
    """Measure, print the tables, and write the result file if asked to.

    Returns:
        The exit code: 1 if an answer of this package's is beyond the limit of error; nothing is written then.

    Raises:
        UserError: If an option cannot be used.
    """
    if importlib.util.find_spec("rich") is None:
        raise UserError("bench needs rich, not installed here: pip install 'visionkernels[bench]'")
    if options.suite not in SUITES:
        raise UserError(f"suite: expected one of {', '.join(SUITES)}, but it is {options.suite!r}")
    device = find_device(options.device)
    default = ["fp32"] if device.type == "cpu" else ["fp16", "bf16", "fp32"]
    dtypes = _pick("dtype", options.dtypes or default, DTYPES)
    cases = _pick_cases(options)
    providers, absent = _pick_providers(options.against)
    if options.save is not None:
        _check_directory(options.save)
    record = Record(
        options.suite,
        options.quick,
        environment(device, _packages(providers)),
        cases,
        absent,
    )
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for row in _rows(cases, dtypes, providers, device, timing.QUICK if options.quick else timing.FULL):
            record.rows.append(row)
    _print(record)
    wrong = [f"{row.provider}, {row.case}, {row.dtype}" for row in record.rows if row.ours and row.wrong]
    if wrong:
        print(f"visionkernels: wrong results: {'; '.join(wrong)}", file=sys.stderr)
        return 1
    if options.save is not None:
        print(f"written to {save(record, options.save)}")
    return 0


def measure(
    provider: Provider,
    case: Case,
    dtype: str,
    inputs: Inputs,
    truth: correctness.Truth,
    effort: timing.Effort,
) -> Row:
    """One row. An exception in a peer becomes part of the row, in this package's operator it is raised."""
    device = inputs.value.device
    row = Row(case.name, provider.name, dtype, provider.ours, correctness.limit(DTYPES[dtype]), provider.note)
    row.refused = provider.refuses(case, DTYPES[dtype], device)
    if row.refused is not None:
        return row
    stage = "forward"
    try:
        _measure_forward(row, provider, case, inputs, truth, effort)
        stage = "backward"
        _measure_backward(row, provider, case, inputs, truth, effort)
    except Exception as error:
        if provider.ours:
            raise
        message = str(error).strip().splitlines() or [""]
        row.failed = {"stage": stage, "error": type(error).__name__, "message": message[0][:200]}
    return row


def _measure_forward(
    row: Row, provider: Provider, case: Case, inputs: Inputs, truth: correctness.Truth, effort: timing.Effort
) -> None:
    call, device = provider.bind(case, inputs), inputs.value.device
    with torch.no_grad():
        row.error_forward = truth.forward_error(call.forward(), provider.fused)
        row.forward = timing.time_calls(call.forward, device, effort)
        if device.type == "cuda":
            row.host_microseconds = timing.host_microseconds(call.forward, device, effort)
            row.forward_megabytes = timing.peak_megabytes(call.forward, device)


def _measure_backward(
    row: Row, provider: Provider, case: Case, inputs: Inputs, truth: correctness.Truth, effort: timing.Effort
) -> None:
    call, device = provider.bind(case, inputs), inputs.value.device
    row.error_backward = truth.backward_error(call, provider.fused)
    leaves = (call.value, call.points, call.weights)
    output = call.forward()  # its graph is kept until the backward alone has been timed
    gradient = torch.randn_like(output)
    backward = partial(torch.autograd.grad, output, leaves, gradient, retain_graph=True)
    row.backward = timing.time_calls(backward, device, effort)
    del output, backward

    def both() -> object:
        return torch.autograd.grad(call.forward(), leaves, gradient)

    row.forward_backward = timing.time_calls(both, device, effort)
    if device.type == "cuda":
        row.peak_megabytes = timing.peak_megabytes(both, device)


def _rows(
    cases: Sequence[Case], dtypes: Sequence[str], providers: Sequence[Provider], device: torch.device,
    effort: timing.Effort,
) -> Iterator[Row]:  # fmt: skip
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<42}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases) * len(dtypes) * len(providers))
        for case in cases:
            for dtype in dtypes:
                progress.update(task, description=f"{case.name} {dtype} inputs")
                inputs = draw(case, DTYPES[dtype], device)
                truth = correctness.Truth(case, inputs)
                for provider in providers:
                    progress.update(task, description=f"{case.name} {dtype} {provider.name}")
                    row = measure(provider, case, dtype, inputs, truth, effort)
                    if not console.is_terminal and row.forward is not None:  # a log that is cut off still says much
                        print(
                            f"{case.name} {dtype} {provider.name}: forward {row.forward.median:.4g} ms",
                            file=sys.stderr,
                        )
                    yield row
                    progress.advance(task)
                del inputs, truth
                if device.type == "cuda":
                    torch.cuda.empty_cache()  # what one case leaves cached is not to be missing in the next


def _print(record: Record) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, 100) if console.is_terminal else 100
    for table in rich_tables(record):
        console.print(table)
    for line in (*remarks(record), caption(record)):
        console.print(line, markup=False)


def _pick(option: str, names: Sequence[str], known: Sequence[str] | dict[str, torch.dtype]) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{option}: expected some of {', '.join(known)}, but there is {unknown[0]!r}")
    return list(dict.fromkeys(names))


def _pick_cases(options: Options) -> list[Case]:
    if options.cases:
        names = _pick("case", options.cases, ["all", *CASES])
        return list(CASES.values()) if "all" in names else [CASES[name] for name in names]
    return [case for case in CASES.values() if (case.quick if options.quick else case.standard)]


def _pick_providers(against: Sequence[str] | None) -> tuple[list[Provider], dict[str, str]]:
    """This package's providers and the peers; and the peers that cannot be imported, with the reason."""
    peers = [name for name, provider in PROVIDERS.items() if not provider.ours]
    names = peers if against is None else _pick("against", against, peers)
    missing = {name: reason for name in names if (reason := PROVIDERS[name].missing()) is not None}
    if against is not None and missing:
        name, reason = next(iter(missing.items()))
        raise UserError(f"against: {name} cannot be imported, {reason}")
    ours = [provider for provider in PROVIDERS.values() if provider.ours]
    return ours + [PROVIDERS[name] for name in names if name not in missing], missing


def _packages(providers: Sequence[Provider]) -> list[str]:
    return [provider.package for provider in providers if provider.package is not None]


def _check_directory(directory: Path) -> None:
    place = directory
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"save: {directory} cannot be written: {place} is not a directory that can be written to")
