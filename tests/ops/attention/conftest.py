"""What runs an operator here: the CPU path, each backend on CUDA, or the kernel under Triton's interpreter."""

import os
from dataclasses import dataclass

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
WAYS = {"cpu": ("cpu", "auto"), "triton": ("cuda", "triton"), "pytorch": ("cuda", "pytorch"), "auto": ("cuda", "auto")}


@dataclass(frozen=True)
class Way:
    """A device, and the backend to ask for there."""

    name: str
    device: str
    backend: str


@pytest.fixture(
    params=["interpreter"]
    if INTERPRETING
    else ["cpu", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("triton", "pytorch", "auto"))]
)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Way:
    """Each way to run the operator; memory that it leaves unwritten holds NaN."""
    allocate = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: allocate(*args, **kwargs).fill_(torch.nan))
    device, name = WAYS.get(request.param, ("cpu", "triton"))
    return Way(request.param, device, name)
