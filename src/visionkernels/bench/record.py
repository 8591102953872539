"""What a run leaves: the schema of the result files, and their tables for the terminal and the README."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from visionkernels.bench.cases import Case
from visionkernels.bench.timing import Timing
from visionkernels.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA = 1
WRONG = "(!)"


@dataclass(frozen=True)
class Environment:
    """What the figures depend on besides the code that is measured.

    Attributes:
        device: Name of the GPU, or of the processor.
        device_type: ``"cuda"`` or ``"cpu"``.
        driver: Version of the GPU's driver.
        threads: Of PyTorch on the CPU.
        versions: Of python, torch, triton, visionkernels and the peers; None where there is no version.
        commit: Of visionkernels, with ``+`` where the tree had changes; None outside a checkout.
        date: Of the run, UTC.
    """

    device: str
    device_type: str
    driver: str | None
    threads: int
    versions: dict[str, str | None]
    commit: str | None
    date: str


@dataclass
class Row:
    """One provider on one case at one dtype. A figure that was not taken is None.

    Attributes:
        case: Name of the case.
        provider: Name of the provider.
        dtype: Of value: fp64, fp32, fp16 or bf16.
        ours: Whether the provider is this package.
        limit: Largest relative error of a right answer.
        note: What to know about the provider.
        refused: Why the provider cannot run this case.
        failed: The exception that ended the row: ``stage`` (forward or backward), ``error`` and ``message``.
        error_forward: Relative error of the output against float64.
        error_backward: The larger relative error of the gradients of value and weights.
        forward: Without grad.
        backward: The backward alone, to value, locations and weights.
        forward_backward: Both together.
        host_microseconds: What a call without grad costs the host.
        forward_megabytes: Memory that a call without grad takes on top of its inputs.
        peak_megabytes: The same for forward and backward.
    """

    case: str
    provider: str
    dtype: str
    ours: bool
    limit: float
    note: str = ""
    refused: str | None = None
    failed: dict[str, str] | None = None
    error_forward: float | None = None
    error_backward: float | None = None
    forward: Timing | None = None
    backward: Timing | None = None
    forward_backward: Timing | None = None
    host_microseconds: float | None = None
    forward_megabytes: float | None = None
    peak_megabytes: float | None = None

    @property
    def wrong(self) -> bool:
        """Whether an error is beyond the limit."""
        return any(e is not None and not e <= self.limit for e in (self.error_forward, self.error_backward))


@dataclass
class Record:
    """One run: its conditions, its cases as data, and a row for each provider, case and dtype.

    Attributes:
        suite: Which suite.
        quick: Whether it was a quick run, whose figures are rough.
        environment: What the figures depend on.
        cases: The cases measured.
        absent: Providers that could not be imported, and why.
        rows: The results.
        schema: Version of this layout.
    """

    suite: str
    quick: bool
    environment: Environment
    cases: list[Case]
    absent: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    schema: int = SCHEMA

    @property
    def file_name(self) -> str:
        """``<suite>-<device>.json``."""
        device = re.sub(r"\((r|tm)\)", " ", self.environment.device.lower())
        return f"{self.suite}-{re.sub('[^a-z0-9]+', '-', device).strip('-')}.json"


def save(record: Record, directory: Path) -> Path:
    """Write a record as JSON into a directory, which is made if need be; returns the file."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / record.file_name
    path.write_text(json.dumps(asdict(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n")
    return path


def load(path: str | Path) -> Record:
    """Read a record.

    Raises:
        UserError: If the file is no record of this schema.
    """
    try:
        data = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a result file of `visionkernels bench`: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: expected schema {SCHEMA} of `visionkernels bench`, got {schema}")
    rows = [Row(**{**row, **{k: Timing(**row[k]) for k in _TIMINGS if row[k] is not None}}) for row in data["rows"]]
    cases = [Case.from_json(case) for case in data["cases"]]
    return Record(**{**data, "environment": Environment(**data["environment"]), "cases": cases, "rows": rows})


_TIMINGS = ("forward", "backward", "forward_backward")


def caption(record: Record) -> str:
    """The conditions of a run in one line."""
    e = record.environment
    device = (
        f"{e.device}, driver {e.driver}"
        if e.device_type == "cuda"
        else f"{e.device}, {e.threads} thread{'s' if e.threads > 1 else ''}"
    )
    versions = ", ".join(f"{name} {version}" for name, version in e.versions.items() if version is not None)
    commit = "" if e.commit is None else f", commit {e.commit[:10]}{'+' if e.commit.endswith('+') else ''}"
    return f"{device}; {versions}{commit}; {e.date[:10]}{'; a quick, rough run' if record.quick else ''}"


def describe(case: Case) -> str:
    """A case in one line."""
    points = ", ".join(map(str, case.points)) if case.ragged else case.num_points
    return (
        f"{case.title}: N={case.batch}, S={case.pixels}, Lq={case.queries}, "
        f"M×D={case.num_heads}×{case.head_dim}, P={points}"
    )


def rich_tables(record: Record) -> Iterable[Table]:
    """A table for each case, at most 100 columns wide."""
    from rich import box
    from rich.table import Table

    on_gpu = record.environment.device_type == "cuda"
    titles = ["forward", "backward", "both", *(["host µs", "MB"] if on_gpu else []), "error", "of grad"]
    for case in record.cases:
        table = Table(title=f"{case.name} — {describe(case)}", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.caption = "milliseconds, medians"
        table.add_column("dtype")
        table.add_column("provider")
        for title in titles:
            table.add_column(title, justify="right")
        last = None
        for row in (row for row in record.rows if row.case == case.name):
            if row.refused is not None:
                cells = ["-"] * len(titles)
            else:
                times = [_time(row, row.forward, "forward"), _time(row, row.backward, "backward")]
                gpu = [_number(row.host_microseconds), _number(row.peak_megabytes)] if on_gpu else []
                errors = [_error(row, row.error_forward), _error(row, row.error_backward)]
                cells = [*times, _milliseconds(row.forward_backward), *gpu, *errors]
            if last not in (None, row.dtype):
                table.add_section()
            table.add_row(
                "" if last == row.dtype else row.dtype, row.provider, *cells,
                style="bold" if row.ours else None,
            )  # fmt: skip
            last = row.dtype
        yield table


def remarks(record: Record) -> list[str]:
    """What the tables cannot show: who is absent, refused or failed, and why."""
    lines = [f"{name}: not measured, {reason}" for name, reason in record.absent.items()]
    for row in record.rows:
        if row.refused is not None:
            lines.append(f"{row.provider}, {row.dtype}: {row.refused}")
        if row.failed is not None:
            failed = f"{row.failed['stage']} failed, {row.failed['error']}: {row.failed['message']}"
            lines.append(f"{row.provider}, {row.case}, {row.dtype}: {failed}")
    lines += [f"{row.provider}: {row.note}" for row in record.rows if row.note and row.refused is None]
    if any(row.wrong for row in record.rows):
        lines.append(f"{WRONG} the error is beyond that of a right answer at this dtype")
    return list(dict.fromkeys(lines))


def markdown_tables(record: Record) -> str:
    """The tables of a record for the README: one a case, a row for each provider, columns by dtype."""
    host = ["host µs"] if record.environment.device_type == "cuda" else []
    parts = []
    for case in record.cases:
        rows = [row for row in record.rows if row.case == case.name]
        if not rows:
            continue
        dtypes, providers = (list(dict.fromkeys(getattr(r, name) for r in rows)) for name in ("dtype", "provider"))
        head = ["", *(f"{dtype} forward / backward | error{' | '.join(['', *host])}" for dtype in dtypes)]
        columns = 1 + len(dtypes) * (2 + len(host))
        lines = [f"**{describe(case)}**", "", _markdown_row(head), "|---" + "|---:" * (columns - 1) + "|"]
        for provider in providers:
            found = {row.dtype: row for row in rows if row.provider == provider}
            if any(row.refused is None for row in found.values()):
                cells = [_markdown_cells(found.get(dtype), bool(host)) for dtype in dtypes]
                lines.append(_markdown_row([provider, *(cell for part in cells for cell in part)]))
        parts.append("\n".join(lines))
    notes = "".join(f"\n- {line}" for line in remarks(record))
    end = f"Milliseconds, medians; errors against float64, relative. {caption(record)}."
    return "\n\n".join([*parts, end + ("\n" + notes if notes else "")])


def _markdown_row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _markdown_cells(row: Row | None, host: bool) -> list[str]:
    if row is None or row.refused is not None:
        return ["–"] * (3 if host else 2)
    times = f"{_time(row, row.forward, 'forward')} / {_time(row, row.backward, 'backward')}"
    return [times, _error(row, row.error_forward), *([_number(row.host_microseconds)] if host else [])]


def _time(row: Row, timing: Timing | None, stage: str) -> str:
    if row.failed is not None and row.failed["stage"] == stage:
        return row.failed["error"]
    return _milliseconds(timing)


def _milliseconds(timing: Timing | None) -> str:
    return _number(None if timing is None else timing.median)


def _error(row: Row, error: float | None) -> str:
    if error is None:
        return "-"
    return f"{error:.1e}" if error <= row.limit else f"{error:.1e} {WRONG}"


def _number(number: float | None) -> str:
    """Three digits, without an exponent."""
    if number is None:
        return "-"
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"
