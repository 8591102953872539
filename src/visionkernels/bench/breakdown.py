"""Where the time of a forward goes, by kind of operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_FORWARDS = 5
_KINDS = {
    "visionkernels::layer_norm": "layer norm",
    "visionkernels::add_layer_norm": "layer norm",
    "visionkernels::attention": "attention",
    "visionkernels::patch_embedding": "patch embedding",
}
_LINEAR = {  # and what is done in the same step
    "visionkernels::linear": "",
    "visionkernels::gated_linear": "",
    "visionkernels::linear_add_layer_norm": " + norm",
}
OTHER = "other"


def breakdown(forward: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Profile a forward.

    Args:
        forward: Runs this package's operators one by one, warmed up already.
        device: Where it runs.

    Returns:
        Milliseconds of a forward that the device works (on the CPU, that PyTorch's operators take), by kind of
        operator; linear layers by their sizes; ``"other"`` is what is no operator of this package's.

    Raises:
        RuntimeError: The profiler saw nothing of the device.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiled:
        for _ in range(_FORWARDS):
            forward()
        if on_gpu:
            torch.cuda.synchronize(device)
    parts: dict[str, float] = {}
    total = 0.0
    for event in profiled.events():
        if on_gpu and event.device_type.name == "CUDA":
            total += event.time_range.elapsed_us()
        elif not on_gpu:
            total += event.self_cpu_time_total
        kind = _kind(event)
        if kind is not None:
            spent = event.device_time_total if on_gpu else event.cpu_time_total
            parts[kind] = parts.get(kind, 0.0) + spent
    if not total or not parts:
        raise RuntimeError("the profiler saw nothing of the device, or none of this package's operators")
    parts[OTHER] = max(0.0, total - sum(parts.values()))
    return {kind: round(spent / 1e3 / _FORWARDS, 6) for kind, spent in parts.items()}


def _kind(event: Any) -> str | None:
    """What kind of operator of this package's an event is; None for all else, and inside such an operator."""
    if event.cpu_parent is not None and event.cpu_parent.name == event.name:
        return None
    if event.name in _LINEAR and len(event.input_shapes) > 1 and len(event.input_shapes[1]) == 2:
        rows, columns = event.input_shapes[1]
        return f"linear {columns} → {rows}{_LINEAR[event.name]}"
    return _KINDS.get(event.name)
