"""The charts of the vision transformer: time over batches, its operators' rates over sizes, where the time goes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from visionkernels.bench.charts import curve, dtypes_of, legend, plain, providers_of, rows_of
from visionkernels.bench.record import Record, Row
from visionkernels.bench.timing import Roofs
from visionkernels.bench.wording import number, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#E69F00", "#D55E00", "#CC79A7", "#000000")
_OTHER = "#BBBBBB"


def over_batches(figure: Figure, record: Record) -> None:
    """Time of a forward over the batch, and the same relative to ours; a column a model and dtype."""
    panels = _panels(record)
    figure.set_size_inches(max(6.5, 3.9 * len(panels) + 0.6), 7.4)
    grid = figure.subplots(2, len(panels), sharex="col", squeeze=False)
    for i, (title, dtype, names) in enumerate(panels):
        mine = {
            row.case: row.forward.median
            for row in rows_of(record, dtype, "forward")
            if row.provider == "visionkernels" and row.forward is not None
        }
        _curves(grid[0, i], record, dtype, names, _milliseconds)
        _curves(grid[1, i], record, dtype, names, partial(_relative, mine))
        grid[0, i].set_title(f"{title}, {dtype}", fontsize=11)
        grid[1, i].set_xlabel("batch")
    grid[0, 0].set_ylabel("milliseconds")
    grid[1, 0].set_ylabel("time relative to visionkernels = 1")
    legend(figure, list(grid.flat))


def operators(figure: Figure, record: Record) -> None:
    """What each operator reaches over its sizes, a panel an operator, beside what the device does."""
    panels = _panels(record)
    axes = _grid(figure, len(panels))
    axis_names = {case.group: case.axis for case in record.cases}
    for axis, (title, dtype, names) in zip(axes, panels, strict=True):
        counted = any(row.forward_flops for row in record.rows if row.case in names)
        figure_of: Callable[[Row], float | None] = (
            (lambda row: row.teraflops()) if counted else _gigabytes  # each row has one of the two
        )
        _curves(axis, record, dtype, names, figure_of)
        _limit(axis, record.roofs, dtype, counted)
        axis.set_title(f"{title}, {dtype}", fontsize=10)
        axis.set_xlabel(axis_names[title])
        axis.set_ylabel("TFLOP/s" if counted else "GB/s")
    legend(figure, axes)


def breakdown(figure: Figure, record: Record) -> None:
    """The share of each kind of operator in a forward, a bar a case."""
    profiled = [(row, row.breakdown) for row in record.rows if row.breakdown]
    kinds = list(dict.fromkeys(kind for _, parts in profiled for kind in parts if kind != "other"))
    colours = {kind: _COLOURS[i % len(_COLOURS)] for i, kind in enumerate(kinds)} | {"other": _OTHER}
    labels = {case.name: case.label for case in record.cases}
    figure.set_size_inches(11, 1.9 + 0.62 * len(profiled))
    axis = figure.subplots()
    for place, (_, parts) in enumerate(profiled):
        total, left = sum(parts.values()), 0.0
        for kind in (*kinds, "other"):
            share = 100 * parts.get(kind, 0.0) / total
            axis.barh(
                place, share, left=left, color=colours[kind], label=kind, edgecolor="#333333", linewidth=0.3, height=0.7
            )
            if share > 3:  # percent: the text fits
                text = f"{percent(share / 100)}\n{number(parts[kind])} ms"
                axis.text(
                    left + share / 2, place, text, ha="center", va="center", fontsize=7, color=_ink(colours[kind])
                )
            left += share
    axis.set_yticks(range(len(profiled)), [f"{labels[row.case]}\n{row.dtype}" for row, _ in profiled], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of the time that the device works in a forward, %")
    axis.grid(visible=False, axis="y")
    legend(figure, [axis])


def _ink(colour: str) -> str:
    """Black on a light colour, white on a dark one."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#000000" if 0.3 * red + 0.59 * green + 0.11 * blue > 120 else "#FFFFFF"


def _panels(record: Record) -> list[tuple[str, str, dict[str, int]]]:
    """Title, dtype, and sizes by case's name of each group that has figures."""
    panels = []
    for title, cases in record.groups.items():
        names = {case.name: case.size for case in cases if case.grouped}
        for dtype in dtypes_of(record):
            if any(row.case in names for row in rows_of(record, dtype, "forward")):
                panels.append((title, dtype, names))
    return panels


def _grid(figure: Figure, panels: int) -> list[Axes]:
    columns = min(panels, 4)
    rows = -(-panels // columns)
    figure.set_size_inches(max(6.5, 3.9 * columns + 0.6), 1.3 + 3.3 * rows)
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in grid[panels:]:
        axis.set_visible(False)
    return grid[:panels]


def _curves(
    axis: Axes, record: Record, dtype: str, sizes: dict[str, int], figure_of: Callable[[Row], float | None]
) -> None:
    rows = [row for row in rows_of(record, dtype, "forward") if row.case in sizes]
    for name in providers_of(rows):
        points = sorted((sizes[row.case], y) for row in rows if row.provider == name and (y := figure_of(row)))
        if points:
            curve(axis, name, [x for x, _ in points], [y for _, y in points])
    plain(axis.xaxis)
    plain(axis.yaxis)
    axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k" if value >= 1000 else f"{value:g}")
    axis.tick_params(axis="x", labelsize=8)


def _milliseconds(row: Row) -> float | None:
    return None if row.forward is None else row.forward.median


def _relative(mine: dict[str, float], row: Row) -> float | None:
    """The time of a row over ours of the same case."""
    return None if row.forward is None or row.case not in mine else row.forward.median / mine[row.case]


def _gigabytes(row: Row) -> float | None:
    if row.forward is None or row.forward_bytes is None:
        return None
    return row.forward_bytes / row.forward.median / 1e6


def _limit(axis: Axes, roofs: Roofs | None, dtype: str, counted: bool) -> None:
    """A line at what a large product or a copy reaches."""
    product = None if roofs is None else roofs.products(dtype)
    limit = (None if product is None else product / 1e3) if counted else roofs and roofs.gigabytes_per_second
    if limit:
        axis.axhline(limit, color="#444444", linewidth=1.2, linestyle="--")
        text = f" {'a large product' if counted else 'a copy'}, {number(limit)}"
        axis.text(axis.get_xlim()[0], limit, text, va="bottom", fontsize=7, color="#444444")
