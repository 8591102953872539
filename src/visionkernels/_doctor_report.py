"""The doctor's report in the terminal. Nothing here needs an extra: where something is missing it must still speak."""

from __future__ import annotations

import importlib.util
import math
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from visionkernels import _doctor_check, _doctor_paths
from visionkernels._doctor_check import Check
from visionkernels._doctor_paths import Path

if TYPE_CHECKING:
    from visionkernels.doctor import Device, Report

WIDTH = 80
_SHORT = {"ms_deform_attn": "plain", "fused_ms_deform_attn": "fused"}


def lines(report: Report) -> list[str]:
    """The report, in lines of at most 80 columns."""
    first = report.devices[0].environment
    versions = [f"{name} {version}" for name, version in first.versions.items() if version is not None]
    missing = [name for name, version in first.versions.items() if version is None]
    found = [*_wrapped("installed:", ", ".join(versions))]
    if missing:
        found += _wrapped("not installed:", ", ".join(missing))
    for device in report.devices:
        found += ["", *_device(device), *_table([c for c in report.checks if c.device == device.device])]
    if report.no_gpu is not None:
        found += ["", *_wrapped("no GPU:", report.no_gpu)]
    return [*found, "", *_verdict(report)]


def _wrapped(title: str, text: str, indent: str = "") -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, f"{indent}{title} ", f"{indent}  ", break_on_hyphens=False)
    return wrapper.wrap(text)


def _device(device: Device) -> list[str]:
    facts = [device.environment.device]
    if device.capability is None:
        facts.append(f"{device.environment.threads} threads")
    else:
        facts += [f"compute capability {device.capability}", f"driver {device.environment.driver or 'unknown'}"]
    found = _wrapped(f"{device.device}:", ", ".join(facts))
    for title, group in _grouped(device.paths).items():
        takes, why = group
        found += _wrapped(f"{title}:", f"{takes} ({why})", "  ")
    return found


def _grouped(paths: Sequence[Path]) -> dict[str, tuple[str, str]]:
    """The paths by what they take and why, under the parts, dtypes, workloads and operators that they hold for."""
    groups: dict[tuple[str, str, str], list[Path]] = {}
    for path in paths:
        groups.setdefault((path.part, path.takes, path.why), []).append(path)
    if len({(takes, why) for _, takes, why in groups}) == 1:
        _, takes, why = next(iter(groups))
        return {"every operator, forward and backward": (takes, why)}
    found = {}
    parts = list(dict.fromkeys(path.part for path in paths))
    for (part, takes, why), group in sorted(groups.items(), key=lambda item: parts.index(item[0][0])):
        of_part = [path for path in paths if path.part == part]
        limits = []
        for field in ("operator", "workload", "dtype"):
            here = list(dict.fromkeys(getattr(path, field) for path in group))
            if set(here) != {getattr(path, field) for path in of_part}:
                limits.append(", ".join(here))
        found[", ".join([part, *limits])] = (takes, why)
    return found


def _table(checks: Sequence[Check]) -> list[str]:
    """Operators and directions by dtypes: the worst error of all workloads beside the allowed one."""
    names = list(dict.fromkeys(check.dtype for check in checks))
    rows = [["largest error / allowed", *names]]
    for operator in _doctor_paths.OPERATORS:
        for direction in (_doctor_check.FORWARD, _doctor_check.BACKWARD, _doctor_check.DETERMINISTIC):
            here = [c for c in checks if (c.operator, c.direction) == (operator, direction)]
            if here:
                cells = [_cell([c for c in here if c.dtype == name]) for name in names]
                rows.append([f"{_SHORT[operator]} {direction}", *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _cell(checks: Sequence[Check]) -> str:
    worst = max(checks, key=lambda check: math.inf if check.error is None else check.error / check.allowed)
    error = "failed" if worst.error is None else f"{worst.error:.0e}"
    return f"{error} / {worst.allowed:.0e}{'' if worst.ok else ' !'}"


def _verdict(report: Report) -> list[str]:
    wrong = [check for check in report.checks if not check.ok]
    if not wrong:
        return [f"All {len(report.checks)} checks against float64 went well."]
    found = []
    for check in wrong:
        what = check.failed or f"an error of {check.error:.2g}, where {check.allowed:.2g} is allowed"
        where = f"{check.device}, {check.operator}, {check.direction}, {check.workload}, {check.dtype}"
        found += _wrapped("wrong:", f"{where}: {what}")
    return [*found, f"{len(wrong)} of {len(report.checks)} checks against float64 failed: do not use what is wrong."]


@contextmanager
def progress(total: int, quiet: bool) -> Iterator[Callable[[str], None]]:
    """Show on stderr, where it is a terminal, how far the work is: a bar if rich is installed, else a line.

    Args:
        total: Steps to come.
        quiet: Show nothing.

    Yields:
        What is to be told of each step when it begins.
    """
    if quiet or not sys.stderr.isatty():
        yield lambda what: None
        return
    if importlib.util.find_spec("rich") is None:
        step = iter(range(1, total + 1))
        yield lambda what: print(f"\r{next(step)}/{total} {what:<60}", end="", file=sys.stderr, flush=True)
        print(f"\r{'':<70}\r", end="", file=sys.stderr, flush=True)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:<44}"), BarColumn(20), MofNCompleteColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total, completed=-1)
        yield lambda what: bar.update(task, description=what, advance=1)
