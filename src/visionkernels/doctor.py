"""`visionkernels doctor`: what is installed, which way every operator goes here, and whether its numbers are right."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from visionkernels import _doctor_check, _doctor_paths
from visionkernels._doctor_check import Check
from visionkernels._doctor_paths import Path
from visionkernels._doctor_report import progress
from visionkernels.bench.environment import environment
from visionkernels.bench.record import Environment

_PACKAGES = ("numba", "numpy", "scipy", "pillow", "safetensors", "rich", "matplotlib")  # beside torch and so on


@dataclass(frozen=True)
class Device:
    """A place where the operators run.

    Attributes:
        device: As PyTorch calls it.
        environment: Its name and driver, and the versions.
        capability: CUDA compute capability, such as ``"9.0"``; None on the CPU.
        paths: Which way each operator goes there.
    """

    device: str
    environment: Environment
    capability: str | None
    paths: list[Path]


@dataclass(frozen=True)
class Report:
    """What the doctor found.

    Attributes:
        devices: The CPU, then every GPU.
        no_gpu: Why there is none; None where there is one.
        checks: The self-check on every device.
    """

    devices: list[Device]
    no_gpu: str | None
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether every check went well."""
        return all(check.ok for check in self.checks)


def examine(*, quiet: bool = False) -> Report:
    """Look at every device, and check every operator on it against float64.

    Args:
        quiet: Show no progress on stderr.

    Returns:
        What was found. Whatever an operator raises is in it, not raised.

    Example:
        >>> report = examine(quiet=True)
        >>> report.devices[0].device
        'cpu'
    """
    places = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    devices = [_look_at(place) for place in places]
    with progress(sum(map(_doctor_check.count, places)), quiet) as started:
        checks = [check for place in places for check in _doctor_check.check(place, started)]
    return Report(devices, _no_gpu(), checks)


def as_json(report: Report) -> dict[str, Any]:
    """The report as JSON's types."""
    return {
        "ok": report.ok,
        "versions": report.devices[0].environment.versions,
        "commit": report.devices[0].environment.commit,
        "devices": [
            {
                "device": device.device,
                "name": device.environment.device,
                "driver": device.environment.driver,
                "compute_capability": device.capability,
                "threads": device.environment.threads if device.capability is None else None,
                "paths": [asdict(path) for path in device.paths],
            }
            for device in report.devices
        ],
        "no_gpu": report.no_gpu,
        "checks": [{**asdict(check), "ok": check.ok} for check in report.checks],
    }


def _look_at(device: torch.device) -> Device:
    capability = None
    if device.type == "cuda":
        capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    try:
        paths = _doctor_paths.paths(device)
    except Exception as problem:  # noqa: BLE001 — such as a GPU without memory; what it says belongs into the report
        paths = _doctor_paths.unknown(_doctor_check.describe(problem))
    return Device(str(device), environment(device, _PACKAGES), capability, paths)


def _no_gpu() -> str | None:
    if torch.cuda.device_count():
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this PyTorch, {torch.__version__}, is built for the CPU only; pytorch.org has builds for GPUs"
    built = f"CUDA {torch.version.cuda}" if torch.version.hip is None else f"ROCm {torch.version.hip}"
    return f"PyTorch sees none: there is no GPU, or its driver is too old for {built}; `nvidia-smi` says which"
