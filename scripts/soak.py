"""Call the operators for minutes: every number right, and no more memory at the end than after the first calls.

    python scripts/soak.py --minutes 5
    python scripts/soak.py --minutes 1440 --device cuda:1

Every call has other sizes. Its first results are compared with float64, those of twenty repetitions with the first.
Ends with exit code 1 if a number is wrong or memory grows: that of the process, and on a GPU what PyTorch holds there.
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from visionkernels._devices import find_device
from visionkernels._doctor_check import DTYPES, Call, Workload, calls, largest_error
from visionkernels.bench.correctness import limit
from visionkernels.errors import UserError

REPETITIONS = 20
WARM_UP = 0.25  # of the time: compiling, and what allocators and caches come to hold
GROWTH = 0.02  # of the process's memory, from the first to the last third of the time after that,
SLACK = 16 * 2**20  # and as many bytes: allocators never hold quite the same


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="how long (default %(default)s)")
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--seed", type=int, default=0, help="of the sizes (default %(default)s)")
    options = parser.parse_args(argv)
    try:
        device = find_device(options.device)
    except UserError as error:
        parser.error(str(error))
    count, memory, wrong = soak(60 * options.minutes, device, random.Random(options.seed))
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    kinds = [name for name, held in memory.items() if grows(name, held)]
    for name, held in memory.items():
        first, last = ends(held)
        print(f"{name}: {first / 2**20:.1f} MiB, at the end {last / 2**20:.1f}{' GROWS' if name in kinds else ''}")
    print(f"{count} calls, forward and backward, on {device}: {len(wrong)} wrong")
    return 1 if wrong or kinds else 0


def soak(seconds: float, device: torch.device, dice: random.Random) -> tuple[int, dict[str, list[int]], list[str]]:
    """Call until the time is over.

    Returns:
        The number of calls, the memory held after each of them, and what was wrong.
    """
    count, wrong = 0, []
    memory: dict[str, list[int]] = {"memory of the process": []}
    start = time.monotonic()
    while time.monotonic() - start < seconds:
        for call in calls(draw(dice), dice.choice(list(DTYPES)), device):
            wrong += faults(call)
            count += 1 + REPETITIONS
        del call
        if time.monotonic() - start > WARM_UP * seconds:  # so that there is a figure even where one call takes all
            memory["memory of the process"].append(resident())
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                memory.setdefault("held by PyTorch on the GPU", []).append(torch.cuda.memory_allocated(device))
        show(
            min(1.0, (time.monotonic() - start) / seconds),
            f"{count} calls, {len(wrong)} wrong, {resident() / 2**20:.0f} MiB",
        )
    show(None, "")
    return count, memory, wrong


def draw(dice: random.Random) -> Workload:
    """Any sizes, from one pixel and query on."""
    levels = tuple((dice.randint(1, 30), dice.randint(1, 30)) for _ in range(dice.choice((1, 3, 4))))
    return Workload(f"levels {levels}", dice.randint(1, 4), levels, dice.choice((1, 7, 60, 200)))


def faults(call: Call) -> Iterator[str]:
    """What is wrong with a call and its repetitions."""
    what = f"{call.operator}, {call.dtype}, N = {call.workload.batch}, Lq = {call.workload.queries}, "
    what += call.workload.name
    for check in call.check():
        if not check.ok:
            yield f"{what}: {check.direction}: {check.failed or f'error {check.error:.2g} of {check.allowed:.2g}'}"
    first, allowed = both(call), limit(DTYPES[call.dtype])
    for _ in range(REPETITIONS):
        errors = [largest_error(one, other.double()) for one, other in zip(both(call), first, strict=True)]
        if not all(error <= allowed for error in errors):
            yield f"{what}: a repetition differs by {errors}"


def both(call: Call) -> list[Tensor]:
    """Output and gradients."""
    return [*call.forward(), *call.backward()]


def resident() -> int:
    """Bytes of memory that this process occupies; where the system does not say, the most that it has occupied."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ends(held: Sequence[int]) -> tuple[float, float]:
    """What was held in the first and in the last third of the time after the warm-up."""
    third = max(1, len(held) // 3)
    return median(held[:third]), median(held[-third:])


def grows(name: str, held: Sequence[int]) -> bool:
    """Whether there is more at the end; what PyTorch holds on a GPU is the same after every call, to the byte."""
    first, last = ends(held)
    return last > first if "GPU" in name else last > first * (1 + GROWTH) + SLACK


def show(share: float | None, text: str) -> None:
    """A bar on stderr, in a terminal."""
    if sys.stderr.isatty():
        bar = "" if share is None else f"{'#' * int(30 * share):<30} {100 * share:3.0f}% {text}"
        print(f"\r{bar:<78}{chr(13) if share is None else ''}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
