"""The words and numbers that the terminal, the markdown and the plots share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from visionkernels.bench.record import Record, Row
from visionkernels.bench.timing import Timing

WRONG = "(!)"
STAGES = {"forward": "forward", "backward": "backward", "forward_backward": "forward + backward"}


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
    rough = "; a quick, rough run" if record.quick else ""
    return f"{device}; {versions}{commit}; {e.date[:10]}{rough}{'' if record.complete else '; not run to its end'}"


def method(record: Record) -> str:
    """How the figures were taken, in one line."""
    cache = ", the L2 cache emptied before each call" if record.flushed else ", caches warm"
    if record.suite == "vit":
        cache = " of a call on an idle device, the host's part with it"
    copy = f"; copies run at {number(record.roofs.gigabytes_per_second)} GB/s" if record.roofs else ""
    half = None if record.roofs is None else record.roofs.half_gigaflops
    if half is not None and record.counts_products:
        copy += f", a large float16 product at {number(half / 1e3)} TFLOP/s"
    return f"milliseconds, medians{cache}; errors relative to float64{copy}"


def remarks(record: Record) -> list[str]:
    """What the tables cannot show: who is absent, refused or failed, and why."""
    measured = {row.provider for row in record.rows if row.forward is not None}  # in some cases, by a resumed run
    lines = [
        f"{name}: not measured{' in the other cases' if name in measured else ''}, {reason}"
        for name, reason in record.absent.items()
    ]
    for row in record.rows:
        if row.refused is not None:
            lines.append(f"{row.provider}, {row.dtype}: {row.refused}")
        if row.failed is not None:
            failed = f"{row.failed['stage']} failed, {row.failed['error']}: {row.failed['message']}"
            lines.append(f"{row.provider}, {row.case}, {row.dtype}: {failed}")
    lines += [f"{row.provider}: {row.note}" for row in record.rows if row.note and row.refused is None]
    lines += [f"{row.provider}, {row.dtype}: its operator in float32" for row in record.rows if row.widened]
    if any(row.wrong for row in record.rows):
        lines.append(f"{WRONG} the error is beyond that of a right answer at this dtype")
    return list(dict.fromkeys(lines))


def number(value: float | None) -> str:
    """Three digits, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(share: float | None) -> str:
    """A share as a percentage."""
    return "-" if share is None else f"{100 * share:.0f} %"


def milliseconds(timing: Timing | None) -> str:
    """The median."""
    return number(None if timing is None else timing.median)


def stage_time(row: Row, stage: str) -> str:
    """The median of a stage, or the exception that ended it."""
    timing: Timing | None = getattr(row, stage)
    if timing is None and row.failed is not None and row.failed["stage"] == stage:
        return row.failed["error"]
    return milliseconds(timing)


def error(row: Row, value: float | None) -> str:
    """A relative error, marked if it is beyond the limit."""
    if value is None:
        return "-"
    return f"{value:.1e}" if value <= row.limit else f"{value:.1e} {WRONG}"


@dataclass(frozen=True)
class Duel:
    """This package beside the fastest other on one case, dtype and stage.

    Attributes:
        case: Name of the case.
        dtype: Of value.
        stage: A key of ``STAGES``.
        ours: Row of this package's.
        rival: Row of the fastest other; one whose answers are wrong counts too.
    """

    case: str
    dtype: str
    stage: str
    ours: Row
    rival: Row

    @property
    def ratio(self) -> float:
        """Time of the rival over ours: below 1, the rival is faster."""
        return getattr(self.rival, self.stage).median / getattr(self.ours, self.stage).median


def duels(record: Record, stages: Iterable[str] = ("forward", "forward_backward")) -> list[Duel]:
    """Every measurement in which somebody else was measured too."""
    ours = "visionkernels-fused" if record.suite == "msda-module" else "visionkernels"
    found = []
    for stage in stages:
        timed = [row for row in record.rows if getattr(row, stage) is not None]
        for mine in (row for row in timed if row.provider == ours):
            same = [r for r in timed if (r.case, r.dtype) == (mine.case, mine.dtype)]
            rivals = [r for r in same if not r.ours and not r.partial]
            if rivals:
                best = min(rivals, key=lambda row: getattr(row, stage).median)
                found.append(Duel(mine.case, mine.dtype, stage, mine, best))
    return found


def ratio(value: float) -> str:
    """How many times as fast; a loss stands out."""
    return f"{value:.3g}×" if value >= 1 else f"**{value:.3g}×, slower**"


def share_of_product_alone(record: Record, row: Row) -> float | None:
    """How fast a row is where the product alone, without what follows, is 1; None where that was not measured."""
    alone = [r for r in record.rows if r.partial and (r.case, r.dtype) == (row.case, row.dtype) and r.forward]
    if not alone or row.partial or row.forward is None or alone[0].forward is None:
        return None
    return alone[0].forward.median / row.forward.median
