"""The plots of result files, as PNG and SVG."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from visionkernels.bench import charts, vit_charts
from visionkernels.bench.record import Record, check_directory, load
from visionkernels.bench.wording import caption
from visionkernels.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True,
    "axes.grid": True, "grid.color": "#e3e3e3", "grid.linewidth": 0.6,
    "svg.hashsalt": "visionkernels",
}  # fmt: skip


def draw_files(files: Sequence[Path], directory: Path | None) -> Iterator[Path]:
    """Draw the plots of result files as PNG and SVG.

    Args:
        files: Written by ``visionkernels bench --save``.
        directory: Where to; by default beside each file.

    Yields:
        Each file written.

    Raises:
        UserError: If matplotlib is missing, or a file is no result file.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("plot: needs matplotlib, not installed here: pip install 'visionkernels[bench]'")
    records = [(path, load(path)) for path in files]
    for place in {directory or path.parent for path in files}:
        check_directory(place)
    for path, record in records:
        yield from draw_record(record, directory or path.parent)


def draw_record(record: Record, directory: Path) -> Iterator[Path]:
    """Draw the plots of a record into a directory, which is made if need be.

    Yields:
        Each file written: ``<suite>-<device>-<plot>.png`` and ``.svg``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(_STYLE):
        for name in names(record):
            figure = Figure(layout="constrained")
            _PLOTS[record.suite][name].draw(figure, record)
            width = int(figure.get_size_inches()[0] * 15)
            notes = [_key(record)] if name == "roofline" else []
            text = "\n".join(line for note in [*notes, caption(record)] for line in textwrap.wrap(note, width))
            figure.supxlabel(text, fontsize=8, color="#555555", x=0.01, ha="left")
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):  # the same bytes each time
                path = directory / f"{record.stem}-{name}.{kind}"
                figure.savefig(path, dpi=150, metadata=metadata)
                yield path


def names(record: Record) -> list[str]:
    """The plots that a record has the figures for."""
    return [name for name, plot in _PLOTS[record.suite].items() if plot.wanted(record)]


class _Plot(NamedTuple):
    wanted: Callable[[Record], bool]
    draw: Callable[[Figure, Record], None]


def _key(record: Record) -> str:
    return "Numbers: " + ", ".join(f"{i + 1}\u00a0{case.name}" for i, case in enumerate(record.cases))


def _has_rivals(dtype: str, record: Record) -> bool:
    timed = {row.provider for row in record.rows if row.dtype == dtype and row.forward is not None}
    return "visionkernels" in timed and len(timed) > 1


def _has(stage: str) -> Callable[[Record], bool]:
    return lambda record: any(getattr(row, stage) is not None for row in record.rows)


_PLOTS: dict[str, dict[str, _Plot]] = {
    "msda": {
        **{
            f"bars-{dtype}": _Plot(partial(_has_rivals, dtype), partial(charts.bars, dtype=dtype))
            for dtype in charts.DTYPES
        },
        "roofline": _Plot(lambda record: record.roofs is not None and _has("forward_bytes")(record), charts.roofline),
    },
    "msda-module": {"bars": _Plot(_has("forward_backward"), charts.module_bars)},
    "msda-queries": {"queries": _Plot(_has("forward"), charts.over_queries)},
    "vit": {
        "batches": _Plot(_has("forward"), vit_charts.over_batches),
        "breakdown": _Plot(_has("breakdown"), vit_charts.breakdown),
    },
    "vit-ops": {"operators": _Plot(_has("forward"), vit_charts.operators)},
}
