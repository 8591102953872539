"""CUDA graphs of a model's forwards: captured for each batch and image size, bounded, replayed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

MAX_GRAPHS = 16
MEMORY_SHARE = 4  # the graphs may hold a quarter of the device's memory
PADDING = 1.25  # a batch runs in a graph of up to a quarter more images: that costs less than most captures

Key = tuple[Hashable, ...]


class Outputs(Protocol):
    """What a forward returns: tensors in a structure that can be mapped."""

    def map(self, function: Callable[[Tensor], Tensor]) -> Any:
        """The same with `function` of every tensor."""

    def tensors(self) -> list[Tensor]:
        """All tensors."""


Forward = Callable[[Tensor], Any]


@dataclass
class Captured:
    """A forward whose kernels can be run again.

    Attributes:
        pixels: What the kernels read.
        outputs: What they write.
        replay: Runs them.
        bytes: Memory that is held for it.
        forward: What was captured; it keeps alive what the kernels read beside the pixels.
    """

    pixels: Tensor
    outputs: Any
    replay: Callable[[], None]
    bytes: int
    forward: Forward | None = None

    def results(self, batch: int) -> Any:
        """The first outputs, in memory of their own."""
        return self.outputs.map(lambda output: output[:batch].clone())


def operators_are_traced() -> bool:
    """Whether operators are compiled, exported, counted or replaced, and not just run."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or torch._C._functorch.peek_interpreter_stack() is not None
        or _get_current_dispatch_mode() is not None
    )


class GraphPool:
    """Graphs by batch, image size, dtype and options; the least recently used go first.

    Replays are made one after another, also those of several threads and streams: the graphs share the memory of
    their intermediate results.

    Args:
        max_graphs: How many are kept.
        max_bytes: How much memory they may hold; by default a quarter of the device's.
        capture: Makes one from a forward and its static input; by default `CUDACapture`.
    """

    def __init__(
        self,
        max_graphs: int = MAX_GRAPHS,
        max_bytes: int | None = None,
        capture: Callable[[Forward, Tensor], Captured] | None = None,
    ) -> None:
        self.max_graphs, self.max_bytes = max_graphs, max_bytes
        self._given = capture
        self._capture = capture
        self._graphs: OrderedDict[Key, dict[int, Captured]] = OrderedDict()
        self._order: OrderedDict[tuple[Key, int], None] = OrderedDict()
        self._too_large: set[tuple[Key, int]] = set()
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._order)

    @staticmethod
    def applies(pixel_values: Tensor) -> bool:
        """Whether a forward of these pixels can be captured and replayed here and at this time."""
        return (
            not operators_are_traced()
            and type(pixel_values) is Tensor
            and pixel_values.is_cuda
            and pixel_values.dim() == 4
            and pixel_values.shape[0] > 0
            and not torch.cuda.is_current_stream_capturing()
        )

    def replay(self, pixel_values: Tensor, dtype: torch.dtype, options: Key, holds: Callable[[], bool]) -> Any:
        """What an earlier forward of this size would return, by a replay.

        Args:
            pixel_values: `[B, ...]`.
            dtype: As of `run`.
            options: As of `run`.
            holds: Whether the graphs are still right, asked while the kernels run; it may drop them.

        Returns:
            The outputs, in memory of their own; None without such a graph, or if they are not right.
        """
        batch = pixel_values.shape[0]
        with self._lock:
            captured = self._find(self._key(pixel_values, dtype, options), batch)
            if captured is None:
                holds()
                return None
            self._start(captured, pixel_values)
            return captured.results(batch) if holds() else None

    def run(self, forward: Forward, pixel_values: Tensor, dtype: torch.dtype, options: Key = ()) -> Any:
        """What `forward(pixel_values)` returns, by a replay.

        Args:
            forward: The forward, with outputs whose first axis is the batch.
            pixel_values: `[B, ...]`.
            dtype: Of the graph's input; the pixels are converted.
            options: What else decides the forward.

        Returns:
            The outputs, in memory of their own.
        """
        batch = pixel_values.shape[0]
        key = self._key(pixel_values, dtype, options)
        with self._lock:
            captured = self._find(key, batch) or self._add(forward, key, batch, pixel_values, dtype)
            if captured is None:
                return forward(pixel_values)
            self._start(captured, pixel_values)
            return captured.results(batch)

    def clear(self) -> None:
        """Drop all graphs."""
        with self._lock:
            if self._stream is not None:
                self._stream.synchronize()  # their memory may go to anyone now
            self._graphs.clear()
            self._order.clear()
            self._too_large.clear()
            self._capture = self._given
            self._stream = None

    @staticmethod
    def _key(pixel_values: Tensor, dtype: torch.dtype, options: Key) -> Key:
        return (pixel_values.shape[1:], dtype, pixel_values.device, *options)

    def _start(self, captured: Captured, pixel_values: Tensor) -> None:
        self._wait(pixel_values)
        batch, size = pixel_values.shape[0], captured.pixels.shape[0]
        (captured.pixels if batch == size else captured.pixels[:batch]).copy_(pixel_values)
        captured.replay()

    def _find(self, key: Key, batch: int) -> Captured | None:
        """The graph of this batch, or of the next larger one that is small enough."""
        sizes = self._graphs.get(key, {})
        size = min((size for size in sizes if batch <= size <= PADDING * batch), default=None)
        if size is None:
            return None
        self._order.move_to_end((key, size))
        return sizes[size]

    def _add(self, forward: Forward, key: Key, batch: int, like: Tensor, dtype: torch.dtype) -> Captured | None:
        """Capture a graph, and drop old ones where there are too many; None for one that is too large."""
        if (key, batch) in self._too_large:
            return None
        if self._capture is None:
            self._capture = CUDACapture(like.device)
        limit = self.max_bytes
        if limit is None:
            limit = torch.cuda.get_device_properties(like.device).total_memory // MEMORY_SHARE
        with torch.inference_mode(False), torch.no_grad():
            pixels = torch.zeros(like.shape, dtype=dtype, device=like.device)
            pixels.copy_(like)  # numbers of the usual size, should a kernel choose by them
            captured = self._capture(forward, pixels)
            captured.forward = forward
        if captured.bytes > limit:
            self._too_large.add((key, batch))
            return None
        while self._order and (len(self) >= self.max_graphs or self._bytes() + captured.bytes > limit):
            (old, size), _ = self._order.popitem(last=False)
            del self._graphs[old][size]
        self._graphs.setdefault(key, {})[batch] = captured
        self._order[key, batch] = None
        return captured

    def _bytes(self) -> int:
        return sum(captured.bytes for sizes in self._graphs.values() for captured in sizes.values())

    def _wait(self, pixel_values: Tensor) -> None:
        """Let this stream wait for the replays of another."""
        if not pixel_values.is_cuda:
            return
        number = torch._C._cuda_getCurrentRawStream(pixel_values.device.index)  # a tenth of current_stream's time
        if self._stream is not None and number == self._stream.cuda_stream:
            return
        stream = torch.cuda.current_stream(pixel_values.device)
        if self._stream is not None:
            stream.wait_stream(self._stream)
        self._stream = stream


class CUDACapture:
    """Captures forwards on one device; their intermediate results share memory.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()
            self.stream = torch.cuda.Stream(device)

    def __call__(self, forward: Forward, pixels: Tensor) -> Captured:
        """Capture `forward(pixels)`."""
        with torch.cuda.device(self.device):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                forward(pixels)  # compiles kernels, and makes what is made once
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # as the capture does: else what it gives back would hide what it takes
            before = torch.cuda.memory_reserved(self.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                outputs = forward(pixels)
            grown = max(0, torch.cuda.memory_reserved(self.device) - before)
            held = sum(_bytes(tensor) for tensor in (pixels, *outputs.tensors()))
            return Captured(pixels, outputs, graph.replay, max(grown, held))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
