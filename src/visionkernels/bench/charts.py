"""The charts: bars per workload, time over the number of queries, a roofline, a module's time and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from visionkernels.bench.record import Record, Row
from visionkernels.bench.wording import STAGES, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

DTYPES = ("fp16", "bf16", "fp32", "fp64")

# Okabe and Ito's colours, which colour-blind readers tell apart; each provider keeps its own.
_STYLES = {
    "visionkernels": ("#0072B2", "o"),
    "visionkernels-fused": ("#56B4E9", "D"),
    "grid_sample": ("#999999", "s"),
    "torch-compile": ("#F0E442", "v"),
    "transformers": ("#000000", "x"),
    "deformable-detr": ("#D55E00", "^"),
    "msda-triton": ("#009E73", "P"),
    "mmcv": ("#E69F00", "<"),
    "dcnv4": ("#CC79A7", ">"),
    "visionkernels-eager": ("#56B4E9", "D"),
    "visionkernels-triton": ("#56B4E9", "D"),
    "transformers-sdpa": ("#000000", "x"),
    "transformers-eager": ("#999999", "s"),
    "transformers-compile": ("#F0E442", "v"),
    "timm": ("#E69F00", "<"),
    "timm-graph": ("#D55E00", "^"),
    "timm-compile": ("#CC79A7", ">"),
    "pytorch": ("#E69F00", "<"),
    "cublas": ("#999999", "s"),
    "sdpa-flash": ("#D55E00", "^"),
    "sdpa-cudnn": ("#009E73", "P"),
    "sdpa-efficient": ("#CC79A7", ">"),
}


def dtypes_of(record: Record) -> list[str]:
    """The dtypes that were measured, halves first."""
    return [dtype for dtype in DTYPES if any(row.dtype == dtype for row in record.rows)]


def rows_of(record: Record, dtype: str, stage: str) -> list[Row]:
    """The rows that have the time of a stage."""
    return [row for row in record.rows if row.dtype == dtype and getattr(row, stage) is not None]


def _time(row: Row, stage: str) -> float:
    return getattr(row, stage).median


def _colour(provider: str) -> str:
    return _STYLES.get(provider, ("#666666", "o"))[0]


def providers_of(rows: Sequence[Row]) -> list[str]:
    """Whose rows these are, in the order of the legends."""
    present = {row.provider for row in rows}
    return [name for name in _STYLES if name in present]


def legend(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all axes, above them."""
    handles: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[label] = handle
    order = [name for name in _STYLES if name in handles] + [name for name in handles if name not in _STYLES]
    figure.legend(
        [handles[name] for name in order], order, loc="outside upper center", ncols=min(5, len(order)), frameon=False
    )


def bars(figure: Figure, record: Record, dtype: str) -> None:
    """Time of each other provider over ours, one group of bars a workload."""
    rows = rows_of(record, dtype, "forward")
    rivals = [name for name in providers_of(rows) if name != "visionkernels"]
    cases = [case for case in record.cases if any(row.case == case.name for row in rows)]
    axes = figure.subplots(1, 2, sharey=True)
    position = 0.0
    ticks = []
    longest = {"forward": 1.0, "forward_backward": 1.0}
    for case in cases:
        here = [name for name in rivals if any((row.case, row.provider) == (case.name, name) for row in rows)]
        ticks.append((position + (len(here) - 1) / 2, f"{case.title}\n{case.sizes}"))
        for name in here:
            for axis, stage in zip(axes, longest, strict=True):
                found = {row.provider: row for row in rows_of(record, dtype, stage) if row.case == case.name}
                if name in found and "visionkernels" in found:
                    mine, other = (_time(found[n], stage) for n in ("visionkernels", name))
                    _bar(axis, position, other / mine, other, name)
                    longest[stage] = max(longest[stage], other / mine)
            position += 1
        position += 0.8
    figure.set_size_inches(11, 1.8 + 0.21 * position)
    for axis, stage in zip(axes, longest, strict=True):
        axis.set_xscale("log")
        axis.set_xlim(min(0.8, axis.get_xlim()[0]), longest[stage] * 2.6)
        plain(axis.xaxis, "×")
        axis.axvline(1, color=_colour("visionkernels"), linewidth=1.6, label="visionkernels")
        axis.set_title(f"{STAGES[stage]}, {dtype}", fontsize=11)
        axis.set_xlabel("time relative to visionkernels = 1; left of the line is faster")
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks([tick for tick, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes[0].set_ylim(position - 0.8, -0.8)
    legend(figure, axes)


def plain(axis: Axis, unit: str = "") -> None:
    """Plain numbers at 1, 2 and 5 of each decade of a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.set_minor_formatter(NullFormatter())


def _bar(axis: Axes, position: float, relative: float, milliseconds: float, name: str) -> None:
    axis.barh(
        position, relative - 1, left=1, height=0.86, color=_colour(name), label=name, edgecolor="#333333", linewidth=0.3
    )
    place = max(relative, 1) * 1.04
    slower: dict[str, Any] = (
        {"color": "#B00000", "fontweight": "bold"} if relative < 1 and name != "visionkernels-fused" else {}
    )
    axis.text(place, position, f"{relative:.3g}×  {number(milliseconds)} ms", va="center", fontsize=7, **slower)


def over_queries(figure: Figure, record: Record) -> None:
    """Time over the number of queries, both axes logarithmic."""
    dtypes = dtypes_of(record)
    queries = {case.name: case.queries for case in record.cases}
    figure.set_size_inches(4.6 * len(dtypes) + 0.6 if len(dtypes) > 1 else 6.5, 7.4)
    grid = figure.subplots(2, len(dtypes), sharex=True, squeeze=False)
    for line, stage in zip(grid, ("forward", "forward_backward"), strict=True):
        for axis, dtype in zip(line, dtypes, strict=True):
            rows = rows_of(record, dtype, stage)
            for name in providers_of(rows):
                mine = sorted((row for row in rows if row.provider == name), key=lambda row: queries[row.case])
                x = [queries[row.case] for row in mine]
                curve(axis, name, x, [_time(row, stage) for row in mine])
                quantiles = [[getattr(getattr(row, stage), end) for row in mine] for end in ("low", "high")]
                axis.fill_between(x, *quantiles, color=_colour(name), alpha=0.25, linewidth=0)
            axis.set_title(f"{STAGES[stage]}, {dtype}", fontsize=11)
            plain(axis.xaxis)
            plain(axis.yaxis)
        line[0].set_ylabel("milliseconds")
    case = record.cases[0]
    text = f"queries; N={case.batch}, S={case.pixels}, M×D={case.num_heads}×{case.head_dim}, P={case.num_points}"
    for axis in grid[-1]:
        axis.set_xlabel(text if len(dtypes) == 1 else text.replace("; ", "\n"))
    legend(figure, list(grid.flat))


def curve(axis: Axes, name: str, x: Sequence[float], y: Sequence[float]) -> None:
    """A provider's curve, both axes logarithmic; this package's stand out."""
    colour, marker = _STYLES[name]
    ours = name.startswith("visionkernels")
    axis.loglog(
        x, y, color=colour, marker=marker, markersize=5, label=name, linewidth=2.2 if ours else 1.3,
        zorder=3 if ours else 2, markeredgecolor="#333333", markeredgewidth=0.4,
    )  # fmt: skip


def roofline(figure: Figure, record: Record) -> None:
    """Operations a second of the forward over operations a compulsory byte."""
    assert record.roofs is not None
    dtypes = [
        dtype for dtype in dtypes_of(record) if any(row.forward_bytes for row in rows_of(record, dtype, "forward"))
    ]
    dtypes = [dtype for dtype in dtypes if dtype != "bf16" or "fp16" not in dtypes]  # lies on top of fp16
    figure.set_size_inches(5.2 * len(dtypes) if len(dtypes) > 1 else 7.5, 6.6)
    axes = figure.subplots(1, len(dtypes), sharey=True, squeeze=False)[0]
    for axis, dtype in zip(axes, dtypes, strict=True):
        points = [(row, *_intensity(row)) for row in rows_of(record, dtype, "forward") if row.forward_bytes]
        for name in providers_of([row for row, _, _ in points]):
            mine = [point for point in points if point[0].provider == name]
            colour, marker = _STYLES[name]
            edge = {} if marker == "x" else {"edgecolors": "#333333", "linewidths": 0.4}
            ours = name.startswith("visionkernels")
            axis.scatter(
                [x for _, x, _ in mine], [y for _, _, y in mine], s=46 if ours else 24, color=colour, marker=marker,
                label=name, zorder=3 if ours else 2, **edge,
            )  # fmt: skip
            if name == "visionkernels":
                _number_points(axis, record, mine)
        _roof(axis, record.roofs.gigabytes_per_second, record.roofs.gigaflops, [x for _, x, _ in points])
        axis.set_title(f"forward, {dtype}", fontsize=11)
        axis.set_xlabel("operations per compulsory byte")
        plain(axis.xaxis)
        plain(axis.yaxis)
    axes[0].set_ylabel("10⁹ operations a second")
    legend(figure, list(axes))


def _number_points(axis: Axes, record: Record, points: list[tuple[Row, float, float]]) -> None:
    """The number of each case above its point, higher where a neighbour would be in the way."""
    numbers = {case.name: i + 1 for i, case in enumerate(record.cases)}
    last, level = 0.0, 0
    for row, x, y in sorted(points, key=lambda point: point[1]):
        level = (level + 1) % 3 if x < 1.2 * last else 0
        last = x
        axis.annotate(
            str(numbers[row.case]), (x, y), xytext=(0, 7 + 9 * level), textcoords="offset points",
            ha="center", fontsize=8, zorder=4,
        )  # fmt: skip


def _intensity(row: Row) -> tuple[float, float]:
    """Operations per compulsory byte, and 10^9 operations a second."""
    assert row.forward is not None
    assert row.forward_flops is not None
    assert row.forward_bytes is not None
    return row.forward_flops / row.forward_bytes, row.forward_flops / row.forward.median / 1e6


def _roof(axis: Axes, bandwidth: float, peak: float, intensities: Sequence[float]) -> None:
    low, high = min(intensities) / 1.6, max(*intensities, peak / bandwidth) * 1.6
    ridge = peak / bandwidth
    axis.loglog(
        [low, ridge, high], [low * bandwidth, peak, peak], color="#444444", linewidth=1.4, label="measured limits"
    )
    middle = (low * ridge) ** 0.5
    axis.text(
        middle, middle * bandwidth * 1.3, f"copy, {number(bandwidth)} GB/s", fontsize=8, color="#444444", ha="right"
    )
    axis.text(
        high, peak * 1.08, f"fp32 matrix product, {number(peak / 1e3)} TFLOP/s", fontsize=8, color="#444444", ha="right"
    )


def module_bars(figure: Figure, record: Record) -> None:
    """Time and memory of a module's forward and backward."""
    rows = [row for row in record.rows if row.forward_backward is not None]
    panels: list[tuple[str, Callable[[Row], float | None]]] = [
        ("forward + backward, ms", lambda row: None if row.forward_backward is None else row.forward_backward.median),
        ("peak memory beyond the inputs, MB", lambda row: row.peak_megabytes),
    ]
    panels = [panel for panel in panels if any(panel[1](row) is not None for row in rows)]
    figure.set_size_inches(5.2 * len(panels) + 1.4, 1.9 + 0.25 * len(rows))
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    ticks, position, last = [], 0.0, None
    for row in rows:
        position += 0.7 * (last not in (None, row.dtype))
        last = row.dtype
        ticks.append((position, f"{row.provider}  {row.dtype}"))
        for axis, (_, figure_of) in zip(axes, panels, strict=True):
            value = figure_of(row)
            if value is not None:
                axis.barh(position, value, height=0.86, color=_colour(row.provider), edgecolor="#333333", linewidth=0.3)
                axis.text(value, position, f" {number(value)}", va="center", fontsize=8)
        position += 1
    for axis, (title, _) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=11)
        axis.margins(x=0.14)
        axis.grid(visible=False, axis="y")
    axes[0].set_yticks([tick for tick, _ in ticks], [text for _, text in ticks], fontsize=9)
    axes[0].set_ylim(position - 0.3, -0.7)
    case = record.cases[0]
    between = ", " if len(panels) > 1 else "\n"
    figure.suptitle(f"A whole attention module{between}{case.title}{between}{case.sizes}", fontsize=11)
