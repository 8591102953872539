"""What the tests of the ViT's operators share: where an operator runs, and its kernels compiled with no GPU."""

import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from visionkernels.ops._inference import Device

ROOT = Path(__file__).parents[1]
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"

# An operator's test runs for each device and backend; under Triton's interpreter, for the kernels on CPU tensors.
_WAYS = [pytest.param("cpu", "triton", id="interpreter")] if INTERPRET else [
    pytest.param("cpu", "auto", id="cpu"),
    *(pytest.param("cuda", name, marks=pytest.mark.gpu, id=f"cuda-{name}") for name in ("triton", "pytorch", "auto")),
]  # fmt: skip
WAYS = pytest.mark.parametrize(("device", "backend"), _WAYS)

NOT_INTERPRETED = pytest.mark.skipif(INTERPRET, reason="under the interpreter nothing can be compiled")
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}

DEVICES = {
    "sm_80": Device(108, (8, 0)),
    "sm_90": Device(132, (9, 0)),
    "sm_100": Device(148, (10, 0)),
    "gfx942": Device(304, (0, 0)),
}
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


@dataclass(frozen=True)
class Way:
    """A device, and the backend to ask for there."""

    name: str
    device: str
    backend: str


_NAMED = {
    "cpu": ("cpu", "auto"),
    "interpreter": ("cpu", "triton"),
    **{name: ("cuda", name) for name in ("triton", "pytorch", "auto")},
}


@pytest.fixture(
    params=["interpreter"]
    if INTERPRET
    else ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "pytorch", "auto"))]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Each way to run an operator; memory that it leaves unwritten holds NaN. For the conftest.py of its tests."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(torch.nan))
    return Way(request.param, *_NAMED[request.param])


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the memory of new results hold NaN."""
    allocate = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor, "new_empty", lambda *sizes, **options: allocate(*sizes, **options).fill_(torch.nan)
    )


def run_under_the_interpreter(files: Sequence[Path], at_least: int) -> None:
    """Run test files in a process where Triton interprets its kernels, and count the tests that passed."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-q", "--no-header"]
    done = subprocess.run(
        [*command, "--color=no", "--tb=short", "--maxfail=20", *map(str, files)],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-20000:]}\n{done.stderr[-4000:]}"
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= at_least, f"only {passed[1]} tests ran under the interpreter"


@cache
def budget() -> ModuleType:
    """``scripts/kernel_budget.py``."""
    spec = importlib.util.spec_from_file_location("kernel_budget", ROOT / "scripts" / "kernel_budget.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launches_of(kernels: ModuleType, call: Callable[[], Any]) -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The kernels of a module that ``call`` launches, with their arguments and options; none of them runs."""
    recorder, launches = budget().Recorder, []
    with pytest.MonkeyPatch.context() as patch:
        for name, value in list(vars(kernels).items()):
            if name.endswith("_kernel"):
                patch.setattr(kernels, name, recorder(value, launches))
        call()
    return launches


def compile_launch(recorded: tuple[Any, tuple[Any, ...], dict[str, Any]], target: str) -> Any:
    """The kernel as Triton compiles it for these arguments."""
    from triton.backends.compiler import GPUTarget

    return budget().compile_launch(recorded, GPUTarget(*TARGETS[target]))


def compile_and_check(recorded: tuple[Any, tuple[Any, ...], dict[str, Any]], target: str, what: object = None) -> Any:
    """The same; it spills nothing, and the GPU has the shared memory that it takes. ``what`` goes into a failure."""
    compiled = compile_launch(recorded, target)
    assert stack_of(compiled) == 0, what
    assert compiled.metadata.shared <= SHARED_MEMORY[target], what
    return compiled


def stack_of(compiled: Any) -> int:
    """Bytes of registers that a thread spills."""
    return budget().measure(compiled)["stack"]
