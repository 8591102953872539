"""`scripts/soak.py`: a short run, and that it finds what it looks for."""

import importlib.util
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from visionkernels import _doctor_check
from visionkernels.ops.deformable_attention import op

SCRIPT = Path(__file__).parents[1] / "scripts" / "soak.py"
CPU = torch.device("cpu")


@pytest.fixture
def soak():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(device, minutes):
    command = [sys.executable, SCRIPT, "--minutes", minutes, "--device", device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    assert f"on {device}: 0 wrong" in done.stdout
    return done.stdout


@pytest.mark.slow
def test_ten_seconds():
    assert "memory of the process" in run("cpu", "0.17")


@pytest.mark.gpu
def test_on_a_gpu():
    assert "held by PyTorch on the GPU" in run("cuda:0", "1.5")  # until every kernel was compiled once, memory grows


def test_memory_that_is_not_given_back_is_found(soak, monkeypatch, capsys):
    """As if each call kept 100 MB: what a process holds is not for a test among others to say."""
    calls = []
    monkeypatch.setattr(soak, "faults", lambda call: calls.append(call.operator) or [])
    monkeypatch.setattr(soak, "resident", lambda: 10**9 + 10**8 * len(calls))
    assert soak.main(["--minutes", "0.05", "--device", "cpu"]) == 1
    assert "GROWS" in capsys.readouterr().out


def test_a_first_call_that_takes_all_the_time_is_no_error(soak, monkeypatch, capsys):
    monkeypatch.setattr(soak, "faults", lambda call: time.sleep(0.05) or [])
    assert soak.main(["--minutes", "0.0001", "--device", "cpu"]) == 0
    assert "memory of the process" in capsys.readouterr().out


def test_a_wrong_number_is_found(soak, monkeypatch):
    attend = op.ms_deform_attn
    calls = iter(range(10**9))
    # The first two calls are compared with float64, the others with one another.
    monkeypatch.setattr(op, "ms_deform_attn", lambda *a: attend(*a) * (1.1 if next(calls) == 8 else 1))
    _, _, wrong = soak.soak(0.5, CPU, random.Random(0))
    assert len(wrong) == 1
    assert wrong[0].startswith("ms_deform_attn")
    assert "a repetition differs" in wrong[0]
    monkeypatch.setattr(op, "ms_deform_attn", lambda *a: attend(*a) * 1.1)
    _, _, wrong = soak.soak(0.5, CPU, random.Random(0))
    assert {line.split(": ")[1] for line in wrong} == {"forward", "backward"}


def test_growth(soak):
    steady = [10**9 + 10**6 * (i % 3) for i in range(300)]
    assert not soak.grows("memory of the process", steady)
    assert soak.grows("memory of the process", [held + 3 * 10**5 * i for i, held in enumerate(steady)])
    assert not soak.grows("held by PyTorch on the GPU", [512] * 30)
    assert soak.grows("held by PyTorch on the GPU", [512 * (1 + i // 20) for i in range(30)])


def test_a_bad_device_is_one_line(soak, capsys):
    with pytest.raises(SystemExit, match="2"):
        soak.main(["--device", "tpu"])
    assert "expected cpu" in capsys.readouterr().err


def test_the_sizes_are_many(soak):
    dice = random.Random(0)
    drawn = [soak.draw(dice) for _ in range(50)]
    assert len({workload.levels for workload in drawn}) == 50
    assert all(isinstance(workload, _doctor_check.Workload) for workload in drawn)
