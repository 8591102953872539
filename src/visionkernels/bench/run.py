"""Measures what was asked for: every provider on every case, right first, then timed, in one run."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from visionkernels._devices import find_device
from visionkernels.bench import correctness, modules, terminal, timing, vit_models, vit_operators, vit_subject
from visionkernels.bench.cases import SUITES, AnyCase, default_cases, draw
from visionkernels.bench.environment import environment
from visionkernels.bench.measure import DTYPES, DeviceLost, measure
from visionkernels.bench.providers import PROVIDERS, Candidate
from visionkernels.bench.record import Record, Row, check_directory, load, save
from visionkernels.errors import UserError

_SLOW_DTYPES = ("fp16", "fp32")  # of the peers that are slow to start
_MSDA = ("msda", "msda-module", "msda-queries")
_PROVIDERS: dict[str, dict[str, Any]] = {  # of each suite candidates of one type
    **dict.fromkeys(_MSDA, PROVIDERS),
    "vit": vit_models.PROVIDERS,
    "vit-ops": vit_operators.PROVIDERS,
}


@dataclass(frozen=True)
class Options:
    """What to measure; None stands for the default.

    Attributes:
        suites: Names of suites: by default all.
        dtypes: Names of dtypes: by default fp16, bf16 and fp32 on a GPU, of the ViT fp16 alone, fp32 on the CPU.
        against: Names of peers: by default those that can be imported.
        cases: Names of cases, or ``all``: by default the usual ones of the device, with ``quick`` the small ones.
        quick: Measure for a shorter time.
        save: Directory for the result files.
        device: ``cpu``, ``cuda`` or ``cuda:<index>``: by default a GPU if there is one.
        resume: Go on with the result files in ``save``.
    """

    suites: Sequence[str] | None = None
    dtypes: Sequence[str] | None = None
    against: Sequence[str] | None = None
    cases: Sequence[str] | None = None
    quick: bool = False
    save: Path | None = None
    device: str | None = None
    resume: bool = False

    def arguments(self) -> list[str]:
        """The command line that says the same."""
        lists = {"suite": self.suites, "dtype": self.dtypes, "against": self.against, "case": self.cases}
        words = [word for name, values in lists.items() if values is not None for word in (f"--{name}", *values)]
        single = {"save": self.save, "device": self.device}
        words += [word for name, value in single.items() if value is not None for word in (f"--{name}", str(value))]
        return ["bench", *words, *(f"--{name}" for name in ("quick", "resume") if getattr(self, name))]


@dataclass(frozen=True)
class Job:
    """What a row is made of."""

    case: Any  # of AnyCase
    dtype: str
    providers: Sequence[Any]  # of those of the case's suite


def run(options: Options) -> int:
    """Measure, print the tables, and write a result file for each suite if asked to, after every case anew.

    Returns:
        The exit code: 1 if an answer of this package's is beyond the limit of error or an exception.

    Raises:
        UserError: If an option cannot be used, or a peer left the GPU unusable and nothing is saved.
    """
    suites = _pick("suite", options.suites or list(SUITES), SUITES)
    device = find_device(options.device)
    jobs = {suite: found for suite in suites if (found := _jobs(suite, options, device))}
    measured = {case.name for of_suite in jobs.values() for case, _ in of_suite}
    for name in options.cases or ():
        if name not in measured and name != "all":
            raise UserError(f"case: {name} is in none of the suites {', '.join(suites)}")
    picked = {suite: _pick_providers(options, suite) for suite in suites}
    _check_against(options, suites)
    if options.save is not None:
        check_directory(options.save)
    elif options.resume:
        raise UserError("resume: needs --save, the directory of the files to go on with")
    if not terminal.HAS_RICH:
        print(f"visionkernels: {terminal.NEEDS_EXTRA}", file=sys.stderr)
    effort = timing.QUICK if options.quick else timing.GPU if device.type == "cuda" else timing.CPU
    packages = {provider.package: None for suite in jobs for provider in picked[suite][0] if provider.package}
    conditions = environment(device, [*packages])
    records, files = [], []
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        roofs = timing.roofs(device, effort)
        for suite in jobs:
            providers, absent = picked[suite]
            planned = [_with_providers(case, dtype, providers, options) for case, dtype in jobs[suite]]
            cases = list(dict.fromkeys(job.case for job in planned))
            record = Record(suite, options.quick, conditions, cases, absent, roofs=roofs, flushed=device.type == "cuda")
            if options.resume:
                _resume(record, options.save)
            try:
                _run_suite(record, planned, device, effort, options.save)
            except DeviceLost as error:
                _start_anew(error, options)
            files += [] if options.save is None else [str(options.save / f"{record.stem}.json")]
            terminal.print_tables(record)
            records.append(record)
    terminal.print_end(records)
    if options.save is not None:
        print(f"written: {' '.join(files)}")
        print(f"their plots: visionkernels bench --plot {' '.join(files)}")
    return max(map(_verdict, records))


def _run_suite(
    record: Record, jobs: Sequence[Job], device: torch.device, effort: timing.Effort, directory: Path | None
) -> None:
    with terminal.progress(sum(len(job.providers) for job in jobs)) as reporter:
        for job in jobs:
            done = {row.provider for row in record.rows if (row.case, row.dtype) == (job.case.name, job.dtype)}
            rest = replace(job, providers=[provider for provider in job.providers if provider.name not in done])
            if not rest.providers:
                continue
            try:
                for row in _rows(record.suite, rest, device, effort, reporter):
                    record.rows.append(row)
            except DeviceLost as error:
                record.rows.append(error.row)
                raise
            finally:
                _save(record, directory)
            if device.type == "cuda":
                torch.cuda.empty_cache()  # what one case leaves cached is not to be missing in the next
    record.complete = True
    _save(record, directory)


def _resume(record: Record, directory: Path | None) -> None:
    """Take over the rows of an earlier run.

    Raises:
        UserError: If that run measured something else.
    """
    path = None if directory is None else directory / f"{record.stem}.json"
    if path is None or not path.exists():
        return
    earlier = load(path)
    now, then = record.environment, earlier.environment
    if (now.versions, now.commit) != (then.versions, then.commit):
        raise UserError(f"resume: {path} is of other versions or another commit; leave out --resume to measure anew")
    record.rows = earlier.rows


def _start_anew(error: DeviceLost, options: Options) -> NoReturn:
    """Measure the rest in a fresh process, since a lost GPU stays lost to this one.

    Raises:
        UserError: If the rows measured so far are in no file.
    """
    if options.save is None:
        raise UserError(
            f"{error}; with --save the rest would be measured, or name the others with --against"
        ) from error
    print(f"visionkernels: {error}: going on in a fresh process", file=sys.stderr, flush=True)
    sys.stdout.flush()
    command = [sys.executable, "-m", "visionkernels", *replace(options, resume=True).arguments()]
    os.execv(sys.executable, command)


def _save(record: Record, directory: Path | None) -> Path | None:
    return None if directory is None else save(record, directory)


def _rows(
    suite: str, job: Job, device: torch.device, effort: timing.Effort, reporter: terminal.Reporter
) -> Iterator[Row]:
    where = f"{job.case.name} {job.dtype}"
    reporter.start(f"{where} float64")
    measure_one = _prepare(suite, job.case, job.dtype, device)
    for provider in job.providers:
        reporter.start(f"{where} {provider.name}")
        row = measure_one(provider, effort)
        yield row
        reporter.done(row)


def _prepare(suite: str, case: Any, dtype: str, device: torch.device) -> Callable[[Any, timing.Effort], Row]:
    """The inputs of a case and what is right for them: a function that measures a provider on these."""
    if suite == "vit":
        subject = vit_subject.subject_of(case, DTYPES[dtype], device)
        right = vit_subject.Truth(case, subject)
        return lambda provider, effort: vit_models.measure(provider, case, dtype, subject, right, effort)
    if suite == "vit-ops":
        tensors = vit_operators.draw(case, DTYPES[dtype], device)
        exact = vit_operators.Truth(case, tensors)
        return lambda provider, effort: vit_operators.measure(provider, case, dtype, tensors, exact, effort)
    if suite == "msda-module":
        module = modules.ModuleInputs(case, DTYPES[dtype], device)
        module_truth = modules.ModuleTruth(case, module)
        return lambda provider, effort: modules.measure(provider, case, dtype, module, module_truth, effort)
    inputs = draw(case, DTYPES[dtype], device)
    truth = correctness.Truth(case, inputs)
    return lambda provider, effort: measure(provider, case, dtype, inputs, truth, effort)


def _verdict(record: Record) -> int:
    """1 if this package gave a wrong answer or none, said on stderr."""
    wrong = [row for row in record.rows if row.ours and (row.wrong or row.failed is not None)]
    for row in wrong:
        what = "wrong result" if row.failed is None else f"{row.failed['error']} in the {row.failed['stage']}"
        print(f"visionkernels: {what}: {row.provider}, {record.suite}, {row.case}, {row.dtype}", file=sys.stderr)
    return 1 if wrong else 0


def _pick(option: str, names: Sequence[str], known: Sequence[str] | dict) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"{option}: expected some of {', '.join(known)}, but there is {unknown[0]!r}")
    return list(dict.fromkeys(names))


def _jobs(suite: str, options: Options, device: torch.device) -> list[tuple[AnyCase, str]]:
    """The cases and dtypes of a suite, the dtypes of a case one after another."""
    known = {name: case for cases in SUITES.values() for name, case in cases.items()}
    if options.cases:
        names = _pick("case", options.cases, ["all", *known])
        cases = [case for name, case in SUITES[suite].items() if name in names or "all" in names]
    else:
        cases = default_cases(suite, device.type, options.quick)
    if options.dtypes:
        dtypes = _pick("dtype", options.dtypes, DTYPES)
        return [(case, dtype) for case in cases for dtype in dtypes]
    if device.type == "cpu":
        return [(case, "fp32") for case in cases]
    if suite not in _MSDA:
        return [(case, "fp16") for case in cases]
    return [(case, t) for case in cases for t in ("fp16", "bf16", "fp32") if t != "bf16" or "headline" in case.tags]


def _with_providers(case: AnyCase, dtype: str, providers: Sequence[Candidate], options: Options) -> Job:
    asked = options.against is not None
    slow = asked or ("slow" in case.tags and dtype in _SLOW_DTYPES)
    named = "slow" in case.tags or case.name in (options.cases or ())
    return Job(case, dtype, [
        provider for provider in providers
        if provider.takes(case) and (slow or not provider.slow_start) and (named or not provider.on_request)
    ])  # fmt: skip


def _check_against(options: Options, suites: Sequence[str]) -> None:
    """Every peer that is named is one of a suite."""
    known = {name: None for suite in suites for name, provider in _PROVIDERS[suite].items() if not provider.ours}
    _pick("against", options.against or (), known)


def _pick_providers(options: Options, suite: str) -> tuple[list[Candidate], dict[str, str]]:
    """This package's providers and the peers; and the peers that are not measured, with the reason."""
    found = _PROVIDERS[suite]
    peers = [name for name, provider in found.items() if not provider.ours]
    names = peers if options.against is None else [name for name in peers if name in options.against]
    missing: dict[str, str] = {}
    for name in names:
        if options.against is None and found[name].on_request:
            missing[name] = "compiles for minutes: only where --against names it"
        elif options.quick and options.against is None and found[name].compiled:
            missing[name] = "compiles for too long for a quick run unless --against names it"
        elif (reason := found[name].missing()) is not None:
            missing[name] = reason
            if options.against is not None:
                raise UserError(f"against: {name} cannot be measured, {reason}")
    ours = [name for name, provider in found.items() if provider.ours]
    missing |= {name: reason for name in ours if (reason := found[name].missing()) is not None}
    return [found[name] for name in (*ours, *names) if name not in missing], missing


def listing() -> str:
    """The suites with their cases, and the providers, for ``--list``."""
    lines = []
    for suite, cases in SUITES.items():
        lines += [f"suite {suite}:", *(f"  {case.name:<22} {case.description}" for case in cases.values()), ""]
    for title, providers in (("msda", PROVIDERS), ("vit", vit_models.PROVIDERS), ("vit-ops", vit_operators.PROVIDERS)):
        lines.append(f"providers of {title}:")
        for provider in providers.values():
            state = "this package" if provider.ours else provider.missing() or "can be imported"
            lines.append(f"  {provider.name:<22} {state}")
        lines.append("")
    return "\n".join(lines).rstrip()
