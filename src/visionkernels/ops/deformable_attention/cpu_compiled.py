"""The CPU path where Numba is installed: tensors in, ``cpu_loops`` over them in threads, tensors out."""

from __future__ import annotations

import functools
import platform
from typing import Any, NamedTuple

import llvmlite.binding
import numpy as np
import torch
from torch import Tensor

from visionkernels.ops.deformable_attention import cpu_loops
from visionkernels.ops.deformable_attention.cpu_samples import Mode, Shapes
from visionkernels.ops.deformable_attention.cpu_threads import divide, open_mp, share

_LEAST = 2**17  # products of a thread, that of PyTorch's OpenMP
_LEAST_OF_POOL = 2**20  # of one that sleeps
# Without the instruction LLVM calls a function that is not there.
_WIDENS_HALF = platform.machine().lower() not in ("x86_64", "amd64", "i686", "x86") or bool(
    llvmlite.binding.get_host_cpu_features().get("f16c")
)
_BITS = {torch.bfloat16: np.uint16, torch.float16: np.int16}


class Inputs(NamedTuple):
    """Tensors of a call; without references offsets are locations, and weights are after the softmax always."""

    value: Tensor  # [N, S, M, D]
    offsets: Tensor  # [N, Lq, M, K, 2]
    weights: Tensor  # [N, Lq, M, K]
    references: Tensor | None  # [N, Lq, 1 or L, 2 or 4]
    shapes: Shapes
    num_points: tuple[int, ...]
    mode: Mode


class _Loops:
    """The arguments of ``cpu_loops`` for a call."""

    def __init__(self, inputs: Inputs) -> None:
        value, offsets, weights, references, shapes, num_points, mode = inputs
        floats = [t.dtype for t in inputs[:4] if isinstance(t, Tensor)]
        self.dtype = torch.float64 if torch.float64 in floats else torch.float32
        images, pixels, heads, head_dim = value.shape
        queries, points = weights.shape[1], weights.shape[3]
        self.queries, self.units = images * queries, images * heads
        self.cost = 4 * points * head_dim  # products of a query and head
        box = 0 if references is None else references.shape[3]
        reference_levels = 0 if references is None else references.shape[2]
        self.arguments = (
            self._value(value),
            self.array(offsets),
            self.array(weights),
            self.array(weights.new_empty(0) if references is None else references),
            *_levels(tuple((h, w) for h, w in shapes), num_points, mode, box == 4, self.dtype),
            (pixels, queries, heads, head_dim, points, reference_levels, box),
            (mode.padding_mode == "border", mode.align_corners, mode.method == "nearest"),
        )

    def run(self, loop: Any, written: tuple[np.ndarray, ...], total: int, cost: int, *needs: bool) -> None:
        """Run a loop of ``cpu_loops`` from 0 to ``total``, each of which is ``cost`` products, in threads."""
        arguments = *written, *self.arguments, *((needs,) if needs else ())
        parallel = open_mp()
        if parallel is None:
            share(lambda begin, end: loop(*arguments, begin, end), total, cost, _LEAST_OF_POOL)
            return
        threads, pieces = divide(total, cost, _LEAST)
        if threads == 1:
            loop(*arguments, 0, total)
            return
        arrays = [a for a in arguments if isinstance(a, np.ndarray)]
        places = [number for a in arrays for number in (a.__array_interface__["data"][0], a.size)]
        job = np.zeros(cpu_loops.JOB, np.int64)
        job[1], job[2] = pieces, total
        job[cpu_loops.ARRAYS : cpu_loops.ARRAYS + len(places)] = places
        numbers = [number for a in arguments if isinstance(a, tuple) for number in a]
        job[cpu_loops.NUMBERS : cpu_loops.NUMBERS + len(numbers)] = numbers
        held = self.arguments[0].dtype
        function = cpu_loops.pieces(loop, written[0].dtype, held)
        parallel(function, job.ctypes.data, threads, 0)

    def array(self, tensor: Tensor) -> np.ndarray:
        """The tensor, flat and in the type that is computed in; not a copy where it is both."""
        return tensor.detach().to(self.dtype).contiguous().numpy().reshape(-1)

    def _value(self, value: Tensor) -> np.ndarray:
        bits = _BITS.get(value.dtype)
        if bits is None or self.dtype == torch.float64 or (value.dtype == torch.float16 and not _WIDENS_HALF):
            return self.array(value)
        return value.detach().contiguous().view(torch.int16).numpy().reshape(-1).view(bits)


@functools.lru_cache(maxsize=64)
def _levels(
    shapes: tuple[tuple[int, int], ...], num_points: tuple[int, ...], mode: Mode, boxes: bool, dtype: torch.dtype
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``levels``, ``scales`` and ``steps`` of ``cpu_loops.forward``."""
    areas = [h * w for h, w in shapes]
    shorter = 1 if mode.align_corners and mode.method == "bilinear" else 0
    levels = [(h, w, sum(areas[:i]), num_points[i]) for i, (h, w) in enumerate(shapes)]
    scales = [(w - shorter, h - shorter) for h, w in shapes]
    # Levels without pixels or points are not read.
    steps = [(0.5 / max(p, 1),) * 2 if boxes else (1 / max(w, 1), 1 / max(h, 1)) for h, w, _, p in levels]
    wide = np.float64 if dtype == torch.float64 else np.float32
    return np.array(levels, np.int64).ravel(), np.array(scales, wide).ravel(), np.array(steps, wide).ravel()


def attend(inputs: Inputs) -> Tensor:
    """Compute the output [N, Lq, M * D]."""
    value, weights = inputs.value, inputs.weights
    shape = value.shape[0], weights.shape[1], value.shape[2] * value.shape[3]
    if value.numel() * weights.numel() == 0:
        return value.new_zeros(shape)
    loops = _Loops(inputs)
    output = value.new_empty(shape, dtype=loops.dtype)
    loops.run(cpu_loops.forward, (loops.array(output),), loops.queries, loops.cost * value.shape[2])
    return output.to(value.dtype)


def differentiate(
    grad_output: Tensor, inputs: Inputs, needs_value: bool, needs_points: bool, needs_references: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Compute the gradients of value, offsets, weights and references, None where not needed.

    Where there are references, the third is that of the logits. The first is in the dtype of value, the others are in
    the one that is computed in. That of the references needs those of the points.
    """
    value, offsets, weights, references = inputs[:4]
    loops = _Loops(inputs)

    def zeros(tensor: Tensor, needed: bool, *before: int) -> Tensor:
        return value.new_zeros((*before, *tensor.shape) if needed else (0,), dtype=loops.dtype)

    grad_value = zeros(value, needs_value)
    grad_offsets, grad_weights = zeros(offsets, needs_points), zeros(weights, needs_points)
    parts = zeros(weights if references is None else references, needs_references, value.shape[2])
    if value.numel() * weights.numel() != 0:
        written = (*map(loops.array, (grad_value, grad_offsets, grad_weights, parts, grad_output)),)
        cost = 3 * loops.cost * weights.shape[1]
        loops.run(cpu_loops.backward, written, loops.units, cost, needs_value, needs_points, needs_references)
    by_value = grad_value.to(value.dtype) if needs_value else None
    by_points = (grad_offsets, grad_weights) if needs_points else (None, None)
    return by_value, *by_points, parts.sum(0) if needs_references else None


def attention(logits: Tensor, *others: Tensor) -> Tensor:
    """The softmax over the points of a head, in the type that is computed in for these tensors."""
    wide = torch.float64 in (t.dtype for t in (logits, *others))
    return logits.softmax(-1, dtype=torch.float64 if wide else torch.float32)
