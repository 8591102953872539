"""What a run leaves: the schema of the result files."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from visionkernels.bench.cases import CASE_TYPES
from visionkernels.bench.timing import Roofs, Timing
from visionkernels.errors import UserError

SCHEMA = 2


@dataclass(frozen=True)
class Environment:
    """What the figures depend on besides the code that is measured.

    Attributes:
        device: Name of the GPU, or of the processor.
        device_type: ``"cuda"`` or ``"cpu"``.
        driver: Version of the GPU's driver.
        threads: Of PyTorch on the CPU.
        versions: Of python, torch, triton, transformers, visionkernels and the peers; None where there is none.
        commit: Of visionkernels, with ``+`` where the tree had changes; None if it is not known.
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
        widened: Whether the provider lacks the dtype, so that a module runs its operator in float32.
        refused: Why the provider cannot run this case.
        failed: The exception that ended the row: ``stage``, ``error`` and ``message``.
        error_forward: Relative error of the output against float64.
        error_backward: The largest relative error of the gradients that are compared.
        forward: Without grad.
        forward_graph: The same, replayed from a CUDA graph call after call.
        backward: The backward alone, to every input.
        forward_backward: Both together.
        forward_bytes: What a forward cannot but read and write: each input and the output once.
        backward_bytes: The same of a backward: the inputs, the output's gradient and the inputs' gradients.
        forward_flops: Multiplications and additions of the interpolation, 8 * N * Lq * M * sum(P) * D, or of the
            matrix products.
        host_microseconds: What a call without grad costs the host.
        forward_megabytes: Memory that a call without grad takes on top of its inputs.
        peak_megabytes: The same for forward and backward.
        total_megabytes: The same with the inputs, and the parameters of a module.
        weights_megabytes: Weights of a whole model.
        partial: Whether the provider computes a part of the case alone, to compare with; it is no rival.
        breakdown: Of one forward of a whole model: the milliseconds of the device by kind of operator.
    """

    case: str
    provider: str
    dtype: str
    ours: bool
    limit: float
    note: str = ""
    widened: bool = False
    refused: str | None = None
    failed: dict[str, str] | None = None
    error_forward: float | None = None
    error_backward: float | None = None
    forward: Timing | None = None
    forward_graph: Timing | None = None
    backward: Timing | None = None
    forward_backward: Timing | None = None
    forward_bytes: int | None = None
    backward_bytes: int | None = None
    forward_flops: int | None = None
    host_microseconds: float | None = None
    forward_megabytes: float | None = None
    peak_megabytes: float | None = None
    total_megabytes: float | None = None
    weights_megabytes: float | None = None
    partial: bool = False
    breakdown: dict[str, float] | None = None

    @property
    def wrong(self) -> bool:
        """Whether an error is beyond the limit."""
        return any(e is not None and not e <= self.limit for e in (self.error_forward, self.error_backward))

    def share(self, roofs: Roofs | None, stage: str) -> float | None:
        """Compulsory bytes over the time of a stage, as a part of the device's copy bandwidth.

        Args:
            roofs: Of the run.
            stage: ``"forward"``, ``"backward"`` or ``"forward_backward"``.
        """
        timing: Timing | None = getattr(self, stage)
        needed = ("forward", "backward") if stage == "forward_backward" else (stage,)
        counts = [getattr(self, f"{part}_bytes") for part in needed]
        if timing is None or roofs is None or None in counts:
            return None
        return sum(counts) / (timing.median * 1e6) / roofs.gigabytes_per_second

    def teraflops(self) -> float | None:
        """10^12 operations a second of the forward."""
        if self.forward is None or self.forward_flops is None:
            return None
        return self.forward_flops / self.forward.median / 1e9

    def share_of_products(self, roofs: Roofs | None) -> float | None:
        """``teraflops`` as a part of the rate of a large matrix product at the dtype; None where it is not known."""
        rate = self.teraflops()
        peak = None if roofs is None else roofs.products(self.dtype)
        return None if rate is None or peak is None else 1e3 * rate / peak


@dataclass
class Record:
    """One run of a suite: its conditions, its cases as data, and a row for each provider, case and dtype.

    Attributes:
        suite: Which suite.
        quick: Whether it was a quick run, whose figures are rough.
        environment: What the figures depend on.
        cases: The cases measured.
        absent: Providers that were not measured, and why.
        rows: The results.
        roofs: What the device reaches on plain work.
        flushed: Whether the L2 cache was emptied before each call that was timed.
        complete: Whether the run came to its end.
        schema: Version of this layout.
    """

    suite: str
    quick: bool
    environment: Environment
    cases: list[Any]  # of AnyCase, one type a suite
    absent: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    roofs: Roofs | None = None
    flushed: bool = False
    complete: bool = False
    schema: int = SCHEMA

    @property
    def counts_products(self) -> bool:
        """Whether ``forward_flops`` are those of matrix products."""
        return self.suite in ("vit", "vit-ops")

    @property
    def groups(self) -> dict[str, list[Any]]:
        """The cases by what shares a table."""
        groups: dict[str, list[Any]] = {}
        for case in self.cases:
            groups.setdefault(case.group, []).append(case)
        return groups

    @property
    def stem(self) -> str:
        """``<suite>-<device>``, of the files of this run; a quick run takes no other's place."""
        device = re.sub(r"\((r|tm)\)", " ", self.environment.device.lower())
        return f"{self.suite}-{re.sub('[^a-z0-9]+', '-', device).strip('-')}{'-quick' if self.quick else ''}"


def check_directory(directory: Path) -> None:
    """See, before the measuring, whether files can be written into a directory.

    Raises:
        UserError: If they cannot.
    """
    place = directory
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UserError(f"save: {directory} cannot be written: {place} is not a directory that can be written to")


def save(record: Record, directory: Path) -> Path:
    """Write a record as JSON into a directory, which is made if need be; returns the file.

    The file is replaced in one step, so that a run that is killed leaves what it had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{record.stem}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(asdict(record), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, path)
    return path


def load(path: str | Path) -> Record:
    """Read a record.

    Raises:
        UserError: If the file is no record of this schema.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected a result file of `visionkernels bench`: {error}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        raise UserError(f"{path}: expected schema {SCHEMA} of `visionkernels bench`, got {schema}; measure again")
    rows = [Row(**{**row, **{k: Timing(**row[k]) for k in _TIMINGS if row[k] is not None}}) for row in data["rows"]]
    kind = CASE_TYPES.get(data["suite"])
    if kind is None:
        raise UserError(f"{path}: expected one of the suites {', '.join(CASE_TYPES)}, got {data['suite']}")
    cases = [kind.from_json(case) for case in data["cases"]]
    roofs = None if data["roofs"] is None else Roofs(**data["roofs"])
    environment = Environment(**data["environment"])
    return Record(**{**data, "environment": environment, "cases": cases, "rows": rows, "roofs": roofs})


_TIMINGS = ("forward", "forward_graph", "backward", "forward_backward")
