"""The machine and the versions of a run."""

from __future__ import annotations

import datetime
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import torch

import visionkernels
from visionkernels.bench.record import Environment


def environment(device: torch.device, packages: Sequence[str]) -> Environment:
    """Read what the figures of a run depend on.

    Args:
        device: Where it runs.
        packages: Of the peers that are measured.
    """
    versions: dict[str, str | None] = {
        "visionkernels": visionkernels.__version__,
        "python": platform.python_version(),
    }
    versions |= {name: _version(name) for name in dict.fromkeys(("torch", "triton", "transformers", *packages))}
    on_gpu = device.type == "cuda"
    return Environment(
        device=torch.cuda.get_device_name(device) if on_gpu else _processor(),
        device_type=device.type,
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        threads=torch.get_num_threads(),
        versions=versions,
        commit=_commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


def _version(package: str) -> str | None:
    if package == "torch":
        return torch.__version__  # says which CUDA it is built for, unlike its metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """From VISIONKERNELS_COMMIT, where the files travelled without their history, or from git."""
    if told := os.environ.get("VISIONKERNELS_COMMIT"):
        return told
    here = Path(__file__)
    git = ("git", "-C", str(here.parent))
    if _output(*git, "ls-files", here.name) is None:  # not from a checkout, or from somebody else's
        return None
    commit = _output(*git, "rev-parse", "HEAD")
    changed = _output(*git, "status", "--porcelain", "--untracked-files=no", "--", str(here.parents[1]))
    return commit if commit is None or changed is None else commit + "+"


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it is missing, fails or prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None
