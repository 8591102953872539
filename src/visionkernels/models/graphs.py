"""CUDA graphs of a model's forwards: captured for each batch and image size, bounded, replayed."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MAX_GRAPHS = 16
MEMORY_SHARE = 4  # the graphs may hold a quarter of the device's memory
PADDING = 1.25  # a batch runs in a graph of up to a quarter more images: that costs less than most captures

Key = tuple[Hashable, ...]
GraphKey = tuple[Key, int]  # what decides a forward, and the batch


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


class Call(NamedTuple):
    """Where a call of one shape runs.

    Attributes:
        key: Of its graph in the pool.
        captured: The graph.
        pixels: What the call fills of the graph's input.
    """

    key: GraphKey
    captured: Captured
    pixels: Tensor

    def results(self) -> Any:
        """The call's part of the outputs, in memory of their own."""
        batch = self.pixels.shape[0]
        return self.captured.outputs.map(lambda output: output[:batch].clone())


def operators_are_traced() -> bool:
    """Whether operators are compiled, exported, counted or replaced, and not just run."""
    return (
        torch.compiler.is_compiling()
        or torch._C._is_tracing()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
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
        self._graphs: OrderedDict[GraphKey, Captured] = OrderedDict()  # the least recently used first
        self._calls: dict[Key, Call] = {}
        self._too_large: set[GraphKey] = set()
        self._lock = threading.RLock()
        self._stream: torch.cuda.Stream | None = None

    def __len__(self) -> int:
        return len(self._graphs)

    @staticmethod
    def applies(pixel_values: Tensor) -> bool:
        """Whether a forward of these pixels can be captured and replayed here and at this time."""
        return (
            type(pixel_values) is Tensor
            and pixel_values.is_cuda
            and not operators_are_traced()
            and not torch.cuda.is_current_stream_capturing()
        )

    def replay(self, pixel_values: Tensor, options: Key, holds: Callable[[], bool]) -> Any:
        """What an earlier `run` with pixels of this shape and dtype would return, by a replay.

        A GPU with nothing to do waits for whatever is done here before the launch; so little is.

        Args:
            pixel_values: `[B, ...]`.
            options: As of `run`.
            holds: Whether the graphs are still right, asked while the kernels run; it may drop them.

        Returns:
            The outputs, in memory of their own; None without such a call, or if they are not right.
        """
        with self._lock:
            call = self._calls.get(_call_key(pixel_values, options))
            if call is None:
                holds()
                return None
            self._start(call, pixel_values)
            return call.results() if holds() else None

    def run(self, forward: Forward, pixel_values: Tensor, dtype: torch.dtype, options: Key = ()) -> Any:
        """What `forward(pixel_values)` returns, by a replay.

        Args:
            forward: The forward, with outputs whose first axis is the batch.
            pixel_values: `[B, ...]`.
            dtype: Of the graph's input; the pixels are converted. As long as `holds` is true in `replay`, pixels of one
                dtype and the same options come with the same one.
            options: What else decides the forward.

        Returns:
            The outputs, in memory of their own.
        """
        batch = pixel_values.shape[0]
        if batch == 0:
            return forward(pixel_values)
        kind = (pixel_values.shape[1:], dtype, pixel_values.device, options)
        with self._lock:
            key = self._find(kind, batch) or self._add(forward, (kind, batch), pixel_values, dtype)
            if key is None:
                return forward(pixel_values)
            captured = self._graphs[key]
            call = Call(key, captured, captured.pixels[:batch])
            self._calls[_call_key(pixel_values, options)] = call
            self._start(call, pixel_values)
            return call.results()

    def clear(self) -> None:
        """Drop all graphs."""
        with self._lock:
            if self._stream is not None:
                self._stream.synchronize()  # their memory may go to anyone now
            self._graphs.clear()
            self._calls.clear()
            self._too_large.clear()
            self._capture = self._given
            self._stream = None

    def _start(self, call: Call, pixel_values: Tensor) -> None:
        self._wait(pixel_values)
        call.pixels.copy_(pixel_values)
        call.captured.replay()
        self._graphs.move_to_end(call.key)

    def _find(self, kind: Key, batch: int) -> GraphKey | None:
        """The key of this batch's graph, or of the next larger one that is small enough."""
        sizes = [size for other, size in self._graphs if other == kind and batch <= size <= PADDING * batch]
        return (kind, min(sizes)) if sizes else None

    def _add(self, forward: Forward, key: GraphKey, like: Tensor, dtype: torch.dtype) -> GraphKey | None:
        """Capture a graph, and drop old ones where there are too many; None for one that is too large."""
        if key in self._too_large:
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
            self._too_large.add(key)
            return None
        while self._graphs and (len(self) >= self.max_graphs or self._bytes() + captured.bytes > limit):
            old = next(iter(self._graphs))
            self._calls = {name: call for name, call in self._calls.items() if call.key != old}
            del self._graphs[old]
        self._graphs[key] = captured
        return key

    def _bytes(self) -> int:
        return sum(captured.bytes for captured in self._graphs.values())

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


def _call_key(pixel_values: Tensor, options: Key) -> Key:
    return (pixel_values.shape, pixel_values.dtype, pixel_values.device, options)


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
