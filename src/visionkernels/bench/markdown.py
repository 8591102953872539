"""The tables of the README and of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

from visionkernels.bench.record import Record, Row
from visionkernels.bench.timing import Timing
from visionkernels.bench.wording import (
    STAGES,
    WRONG,
    Duel,
    caption,
    duels,
    error,
    method,
    number,
    percent,
    ratio,
    remarks,
    share_of_product_alone,
    stage_time,
)


def summary(record: Record) -> str:
    """The few lines of a record for the README: its headline cases, then the count of wins and every loss."""
    if record.suite == "msda-module":
        tables = [
            f"{case.description}\n\n{_module_table(rows)}"
            for case in record.cases
            if (rows := [row for row in record.rows if row.case == case.name and row.refused is None])
        ]
    else:
        tables = [_duel_table(record)]
    return "\n\n".join([*tables, verdict(record)])


def verdict(record: Record) -> str:
    """In how many measurements this package is the fastest, and each one in which it is not."""
    found = duels(record)
    if not found:
        return "No other implementation was measured in this run."
    lost = [duel for duel in found if duel.ratio < 1]
    text = f"Faster than every other in {len(found) - len(lost)} of {len(found)} comparisons of this run"
    if not lost:
        return text + "."
    titles = {case.name: case for case in record.cases}
    losses = "".join(
        f"\n- slower: {titles[duel.case].title} ({titles[duel.case].sizes}), {duel.dtype}, {STAGES[duel.stage]}: "
        f"{_time(duel.ours, duel.stage)} ms against {_rival(duel)}"
        for duel in lost
    )
    return f"{text}.\n{losses}"


def _duel_table(record: Record) -> str:
    cases = [case for case in record.cases if "headline" in case.tags] or record.cases
    stages = [stage for stage in ("forward", "forward_backward") if any(getattr(row, stage) for row in record.rows)]
    titles = ["workload", "dtype"]
    for stage in stages:
        titles += [f"{STAGES[stage]}, ms", "fastest other", ""]
    more = _MODEL_FIGURES if record.suite == "vit" else ()
    titles += [title for title, _ in more]
    found = {(duel.case, duel.dtype, duel.stage): duel for duel in duels(record)}
    lines = []
    for case in cases:
        title = case.label
        for row in record.rows:
            if (row.case, row.provider) != (case.name, "visionkernels"):
                continue
            cells = []
            for stage in stages:
                duel = found.get((case.name, row.dtype, stage))
                cells += [
                    _time(row, stage),
                    "-" if duel is None else _rival(duel),
                    "" if duel is None else ratio(duel.ratio),
                ]
            lines.append([title, row.dtype, *cells, *(cell(record, row) for _, cell in more)])
            title = ""
    return _table(titles, lines, left=2)


_Figure = tuple[str, Callable[[Record, Row], str]]
_PRODUCTS: tuple[_Figure, ...] = (
    ("TFLOP/s", lambda record, row: number(row.teraflops())),
    ("of a large product", lambda record, row: percent(row.share_of_products(record.roofs))),
)
_MODEL_FIGURES: tuple[_Figure, ...] = (
    *_PRODUCTS,
    ("weights, MB", lambda record, row: number(row.weights_megabytes)),
    ("memory beyond, MB", lambda record, row: number(row.forward_megabytes)),
)


def _module_table(rows: Sequence[Row]) -> str:
    titles = [
        "module on",
        "dtype",
        "forward, ms",
        "forward + backward, ms",
        "",
        "peak memory, MB",
        "",
        "with inputs, MB",
    ]
    lines = []
    for row in rows:
        mine = next((r for r in rows if _same(r, row) and r.provider == "visionkernels-fused"), None)
        times = [_factor(row, mine, lambda r: None if r.forward_backward is None else r.forward_backward.median)]
        memory = [_factor(row, mine, lambda r: r.peak_megabytes)]
        lines.append([
            _named(row), row.dtype, _time(row, "forward"), stage_time(row, "forward_backward"), *times,
            number(row.peak_megabytes), *memory, number(row.total_megabytes),
        ])  # fmt: skip
    return _table(titles, lines, left=2)


def _named(row: Row) -> str:
    """The provider, and what to know about its figures."""
    return f"{row.provider}{', in float32' if row.widened else ''}{f' {WRONG}' if row.wrong else ''}"


def _same(one: Row, other: Row) -> bool:
    return (one.case, one.dtype) == (other.case, other.dtype)


def _factor(row: Row, mine: Row | None, figure: Callable[[Row], float | None]) -> str:
    """A figure of a row over that of our fused module."""
    if mine is None or row is mine:
        return ""
    one, other = figure(row), figure(mine)
    return "" if one is None or not other else f"{one / other:.3g}×"


def _rival(duel: Duel) -> str:
    mark = f" {WRONG}" if duel.rival.wrong else ""
    return f"{_time(duel.rival, duel.stage)} ({duel.rival.provider}){mark}"


def full_tables(record: Record) -> str:
    """All figures of a record: one table a group of cases, then how they were taken and what the tables cannot show."""
    parts = []
    for title, cases in record.groups.items():
        sizes = {case.name: case.size for case in cases if case.grouped}
        names = [case.name for case in cases]
        rows = [row for row in record.rows if row.case in names and row.refused is None]
        if rows:
            head = ["dtype", "provider"] if not sizes else [cases[0].axis, "dtype", "provider"]
            parts.append(f"**{title if sizes else cases[0].description}**\n\n{_case_table(record, rows, head, sizes)}")
    parts += [_breakdown_table(record)] if any(row.breakdown for row in record.rows) else []
    notes = "".join(f"\n- {line}" for line in remarks(record))
    end = f"Figures: {method(record)}; in brackets the 20 % and 80 % quantiles. {caption(record)}."
    return "\n\n".join([*parts, end + ("\n" + notes if notes else "")])


def _case_table(record: Record, rows: Sequence[Row], head: Sequence[str], sizes: dict[str, int]) -> str:
    """The figures of one case, or of those that have a size."""
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("forward", lambda row: _spread(row, "forward")),
        ("in a CUDA graph", lambda row: _time(row, "forward_graph")),
        ("backward", lambda row: _spread(row, "backward")),
        ("forward + backward", lambda row: _spread(row, "forward_backward")),
        ("host µs", lambda row: number(row.host_microseconds)),
        ("weights MB", lambda row: number(row.weights_megabytes)),
        ("forward MB", lambda row: number(row.forward_megabytes)),
        ("peak MB", lambda row: number(row.peak_megabytes)),
        ("with inputs MB", lambda row: number(row.total_megabytes)),
        ("of copy bandwidth, forward", lambda row: percent(row.share(record.roofs, "forward"))),
        ("both", lambda row: percent(row.share(record.roofs, "forward_backward"))),
        ("error", lambda row: error(row, row.error_forward)),
        ("of gradients", lambda row: error(row, row.error_backward)),
    ]
    if record.counts_products:
        columns += [(title, partial(cell, record)) for title, cell in _PRODUCTS]
        columns.append(("of the product alone", lambda row: percent(share_of_product_alone(record, row))))
    used = [(title, cell) for title, cell in columns if any(cell(row) != "-" for row in rows)]
    rows = sorted(rows, key=lambda row: sizes[row.case]) if sizes else rows
    lines = [
        [*([str(sizes[row.case])] if sizes else []), row.dtype, row.provider, *(cell(row) for _, cell in used)]
        for row in rows
    ]
    return _table([*head, *(title for title, _ in used)], lines, left=len(head))


def _breakdown_table(record: Record) -> str:
    """Where the time of a forward goes: a column a case that was profiled."""
    profiled = [(row, row.breakdown) for row in record.rows if row.breakdown]
    labels = {case.name: case.label for case in record.cases}
    kinds = dict.fromkeys(kind for _, parts in profiled for kind in parts)
    lines = [
        [
            kind,
            *(
                f"{number(parts.get(kind))} ({percent(parts.get(kind, 0.0) / sum(parts.values()))})"
                for _, parts in profiled
            ),
        ]
        for kind in kinds
    ]
    titles = ["kind of operator", *(f"{labels[row.case]}, {row.dtype}" for row, _ in profiled)]
    return (
        f"**Where the time goes: milliseconds of the device, operators one by one**\n\n{_table(titles, lines, left=1)}"
    )


def _time(row: Row, stage: str) -> str:
    timing: Timing | None = getattr(row, stage)
    return number(None if timing is None else timing.median)


def _spread(row: Row, stage: str) -> str:
    timing: Timing | None = getattr(row, stage)
    return (
        stage_time(row, stage)
        if timing is None
        else f"{number(timing.median)} ({number(timing.low)}–{number(timing.high)})"
    )


def _table(titles: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    rule = "|" + "---|" * left + "---:|" * (len(titles) - left)
    return "\n".join([_line(titles), rule, *map(_line, lines)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
