"""What the tests of the benchmark share: tiny cases, providers that are wrong on purpose, a made-up record."""

from dataclasses import replace
from pathlib import Path

import torch

from visionkernels.bench import correctness, modules, timing
from visionkernels.bench.cases import Case, draw
from visionkernels.bench.environment import environment
from visionkernels.bench.measure import DTYPES
from visionkernels.bench.measure import measure as measure_row
from visionkernels.bench.providers import PROVIDERS
from visionkernels.bench.record import Record, Row
from visionkernels.bench.timing import Roofs, Timing

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = Case("tiny", "Tiny encoder", 2, ((5, 7), (3, 2)), None, 2, 4, 2, tags=("headline", "slow"))
RAGGED = Case("ragged", "Ragged decoder", 1, ((5, 7), (3, 2)), 9, 2, 4, (3, 1), boxes=True)
EFFORT = timing.Effort(seconds=0.0, least=2, most=2, host_calls=1)


def altered(change, base="grid_sample", **options):
    """A provider as a peer whose output is `change` of the right one."""
    right = replace(PROVIDERS[base], ours=False)

    def build(case, geometry):
        attention = right.build(case, geometry)
        return lambda *inputs: change(attention(*inputs))

    return replace(right, **{"name": "peer", "build": build, **options})


def measure(provider, case=TINY, dtype="fp32"):
    inputs = draw(case, DTYPES[dtype], CPU)
    return measure_row(provider, case, dtype, inputs, correctness.Truth(case, inputs), EFFORT)


def measure_module(provider, dtype="fp32"):
    inputs = modules.ModuleInputs(TINY, DTYPES[dtype], CPU)
    return modules.measure(provider, TINY, dtype, inputs, modules.ModuleTruth(TINY, inputs), EFFORT)


def a_row(provider="visionkernels", dtype="fp16", milliseconds=0.1841, **fields):
    time = Timing(milliseconds, milliseconds * 0.98, milliseconds * 1.1, 7)
    figures = {
        "forward": time,
        "backward": replace(time, median=1.4812),
        "forward_backward": replace(time, median=10 * milliseconds),
        "error_forward": 2.1e-4,
        "forward_bytes": 10**6,
        "backward_bytes": 2 * 10**6,
        "forward_flops": 10**7,
    }
    return Row("tiny", provider, dtype, provider.startswith("vision"), 1e-3, **{**figures, **fields})


def a_record(*rows, suite="msda", device_type="cuda"):
    conditions = replace(environment(CPU, []), device_type=device_type, device="NVIDIA H200", driver="580.1")
    gone = {"gone": "ImportError: no"}
    roofs = Roofs(gigabytes_per_second=100.0, gigaflops=1000.0)
    return Record(suite, False, conditions, [TINY, RAGGED], gone, list(rows), roofs, flushed=True, complete=True)
