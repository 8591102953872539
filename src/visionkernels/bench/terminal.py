"""The tables and the progress in the terminal, with rich; without it, plain lines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from visionkernels.bench.markdown import full_tables
from visionkernels.bench.record import Record, Row
from visionkernels.bench.wording import (
    WRONG,
    caption,
    error,
    method,
    milliseconds,
    number,
    remarks,
    share_of_product_alone,
    stage_time,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDTH = 100
HAS_RICH = importlib.util.find_spec("rich") is not None
NEEDS_EXTRA = "progress bar and tables need rich, plots matplotlib: pip install 'visionkernels[bench]'"


def rich_tables(record: Record) -> Iterable[Table]:
    """A table for each case, at most 100 columns wide; columns without a figure are left out."""
    from rich import box
    from rich.table import Table

    cells = {id(row): _cells(record, row) for row in record.rows}
    titles = [title for title in _TITLES if any(cells[id(row)][title] != "-" for row in record.rows)]
    for group, cases in record.groups.items():
        sizes = {case.name: case.size for case in cases if case.grouped}
        names = [case.name for case in cases]
        rows = [row for row in record.rows if row.case in names and not (sizes and row.refused)]
        if not rows:
            continue
        title = group if sizes else f"{cases[0].name} — {cases[0].description}"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        if sizes:
            table.add_column(cases[0].axis, justify="right")
            rows.sort(key=lambda row: sizes[row.case])
        table.add_column("dtype")
        table.add_column("provider")
        for title in titles:
            table.add_column(title, justify="right")
        last = None
        for row in rows:
            here = (sizes.get(row.case), row.dtype)
            if last not in (None, here):
                table.add_section()
            first = [*([str(here[0])] if sizes else []), row.dtype]
            table.add_row(
                *([""] * len(first) if last == here else first), row.provider,
                *(cells[id(row)][title] for title in titles), style="bold" if row.ours else None,
            )  # fmt: skip
            last = here
        yield table


_TITLES = (
    "fwd",
    "graph",
    "bwd",
    "both",
    "host µs",
    "MB",
    "total MB",
    "weights",
    "copy",
    "TF/s",
    "alone",
    "error",
    "of grad",
)


def _cells(record: Record, row: Row) -> dict[str, str]:
    share, alone = row.share(record.roofs, "forward"), share_of_product_alone(record, row)
    return {
        "fwd": _time(row, "forward"),
        "graph": milliseconds(row.forward_graph),
        "bwd": _time(row, "backward"),
        "both": milliseconds(row.forward_backward),
        "host µs": number(row.host_microseconds),
        "MB": number(row.forward_megabytes if record.counts_products else row.peak_megabytes),
        "total MB": number(row.total_megabytes) if row.forward_bytes is None else "-",  # a module holds parameters
        "weights": number(row.weights_megabytes),
        "copy": "-" if share is None else f"{100 * share:.0f}%",
        "TF/s": number(row.teraflops()) if record.counts_products else "-",
        "alone": "-" if alone is None else f"{100 * alone:.0f}%",
        "error": error(row, row.error_forward).replace(f" {WRONG}", "!"),
        "of grad": error(row, row.error_backward).replace(f" {WRONG}", "!"),
    }


def _time(row: Row, stage: str) -> str:
    failed = row.failed is not None and row.failed["stage"] == stage and getattr(row, stage) is None
    return "failed" if failed else milliseconds(getattr(row, stage))  # the remarks have the reason


def print_tables(record: Record) -> None:
    """Print the tables of a suite."""
    if not HAS_RICH:
        print(full_tables(record))
        return
    console = _console()
    console.rule(f"suite {record.suite}", align="left", characters="─")
    for table in rich_tables(record):
        console.print(table)


def print_end(records: Sequence[Record]) -> None:
    """Print what the tables of a run cannot show, and its conditions."""
    lines = [line for record in records for line in remarks(record)]
    for record in records:
        text = f"{method(record)}; copy: share of that bandwidth that the forward reaches"
        if record.counts_products:
            text += "; alone: speed where the matrix product alone is 100%; MB: memory of a forward beyond the weights"
        lines.append(text)
    for line in dict.fromkeys([*lines, caption(records[0])]):
        if HAS_RICH:
            _console().print(line.replace(WRONG, "!"), markup=False)
        else:
            print(line)


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


class Reporter(Protocol):
    """Is told what is measured."""

    def start(self, what: str) -> None:
        """A measurement begins."""

    def done(self, row: Row) -> None:
        """A measurement has ended."""


@contextmanager
def progress(total: int) -> Iterator[Reporter]:
    """Show on stderr how far a run is: a bar in a terminal, otherwise a line for each row.

    Args:
        total: Rows to come.
    """
    if not (HAS_RICH and sys.stderr.isatty()):
        yield _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:<44}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)

        class Bar:
            def start(self, what: str) -> None:
                bar.update(task, description=what)

            def done(self, row: Row) -> None:
                bar.advance(task)

        yield Bar()


class _Lines:
    """A log that is cut off still says much."""

    def start(self, what: str) -> None:
        pass

    def done(self, row: Row) -> None:
        if row.refused is None:
            both = stage_time(row, "forward_backward")
            times = f"forward {stage_time(row, 'forward')}" + ("" if both == "-" else f", with backward {both}")
            print(f"{row.case} {row.dtype} {row.provider}: {times} ms", file=sys.stderr, flush=True)
