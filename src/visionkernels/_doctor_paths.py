"""Which implementation each operator takes on a device, asked of the functions that decide it in a call."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from visionkernels.bench.cases import CASES, Case
from visionkernels.ops.deformable_attention import cpu, registration
from visionkernels.ops.deformable_attention.problem import Problem

OPERATORS = ("ms_deform_attn", "fused_ms_deform_attn")
WORKLOADS = {"encoder": CASES["encoder-n1"], "decoder": CASES["decoder-n1"]}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
FORWARD, VALUE, POINTS = "forward", "gradient of value", "gradients of points and weights"
DETERMINISTIC = "gradient of value, deterministic"
_CALLS = [(o, w, d) for o in OPERATORS for w in WORKLOADS for d in DTYPES]


@dataclass(frozen=True)
class Path:
    """What one part of an operator does on a device.

    Attributes:
        operator: One of ``OPERATORS``.
        part: ``FORWARD``, ``VALUE``, ``POINTS`` or ``DETERMINISTIC``.
        workload: A key of ``WORKLOADS``: a call's sizes decide too.
        dtype: A key of ``DTYPES``, that of value.
        takes: The implementation.
        why: What decides it, or what to do where there is none.
    """

    operator: str
    part: str
    workload: str
    dtype: str
    takes: str
    why: str


def paths(device: torch.device) -> list[Path]:
    """The paths of every operator, workload and dtype on a device; nothing is computed there."""
    if device.type == "cpu":
        return _everywhere(*_cpu_path())
    try:
        launch = registration._launch()
    except RuntimeError as error:  # no Triton: its message says what to do
        return _everywhere("none", str(error))
    return [path for call in _CALLS for path in _gpu_paths(launch, device, *call)]


def unknown(why: str) -> list[Path]:
    """The paths of a device on which ``paths`` raises ``why``."""
    return _everywhere("unknown", why)


def _everywhere(takes: str, why: str) -> list[Path]:
    return [Path(o, part, w, d, takes, why) for o, w, d in _CALLS for part in (FORWARD, VALUE, POINTS)]


def _cpu_path() -> tuple[str, str]:
    compiled = cpu._compiled()
    if compiled is None:
        return "PyTorch's own operators", (
            "Numba is not installed; with it compiled loops are several times faster: pip install 'visionkernels[cpu]'"
        )
    if compiled.open_mp() is None:
        return "compiled loops in a pool of threads", "Numba is installed; PyTorch has no OpenMP that can be called"
    return "compiled loops in PyTorch's threads", "Numba is installed"


def _gpu_paths(launch: ModuleType, device: torch.device, operator: str, workload: str, dtype: str) -> list[Path]:
    from visionkernels.ops.deformable_attention import plan, warp_backward, warp_forward

    problem = _problem(WORKLOADS[workload], DTYPES[dtype], device, operator == "fused_ms_deform_attn")
    inputs, warps = plan.inputs_of(problem), launch.has_warp_instructions(device)
    gpu = _gpu(device)

    def kernel(part: str, needs: Any) -> Path:
        chosen = plan.plan_of(problem, inputs, (), needs).kernel
        if chosen in (warp_forward._forward_warp_kernel, warp_backward._backward_points_kernel):
            return path(part, "warp kernel", gpu)
        reason = f"no warp kernel takes {dtype} at these sizes" if warps else gpu
        return path(part, "kernel for any GPU", reason)

    def path(part: str, takes: str, why: str) -> Path:
        return Path(operator, part, workload, dtype, takes, why)

    if launch.is_binned(problem, deterministic=True):
        ordered = path(DETERMINISTIC, "binned sums, sorted", "under torch.use_deterministic_algorithms(True)")
        why = "samples are few"
    else:
        why = f"binned sums do not take {dtype}" if warps else gpu
        ordered = path(DETERMINISTIC, "none: raises an error", why)
    if launch.is_binned(problem, deterministic=False):
        by_value = path(VALUE, "binned sums", "samples outnumber pixels")
    else:
        by_value = path(VALUE, "atomic sums", why)
    return [kernel(FORWARD, None), by_value, ordered, kernel(POINTS, plan.Needs(False, True, False))]


def _gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return str(device)
    if torch.version.hip is not None:
        return "an AMD GPU"
    major, minor = torch.cuda.get_device_capability(device)
    return f"compute capability {major}.{minor}, {'at least' if (major, minor) >= (8, 0) else 'below'} 8.0"


def _problem(case: Case, dtype: torch.dtype, device: torch.device, fused: bool) -> Problem:
    """A call of this workload, in memory that nobody reads; coordinates are wider than value, as under autocast."""
    wide = torch.promote_types(dtype, torch.float32)
    samples = (case.batch, case.queries, case.num_heads, len(case.levels), case.points[0])
    value = torch.empty(case.batch, case.pixels, case.num_heads, case.head_dim, dtype=dtype, device=device)
    references = torch.empty(case.batch, case.queries, 1, 2, dtype=wide, device=device) if fused else None
    return Problem(
        value, None, tuple(size for level in case.levels for size in level),
        torch.empty(*samples, 2, dtype=wide, device=device), torch.empty(samples, dtype=wide, device=device),
        references, None, case.points,
    )  # fmt: skip
