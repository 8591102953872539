"""How long a call takes, how much memory, and what the device could do: the only timing code."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

import torch
from torch import Tensor

Clock = Callable[[], float]

_BATCH = 10  # calls queued behind one pause; more would fill the launch queue at 100 kernels a call
_CYCLES_PER_SECOND = 2e9  # of a GPU, about; a slower clock makes a longer pause, which does no harm
_LONGEST_PAUSE = 0.05  # seconds
_HOST_CALLS = 20  # launched in a row before the GPU is waited for
_GRAPH_CALLS = 20  # recorded into one CUDA graph
_FLUSH_BYTES = 256 * 2**20  # several times the L2 cache of any GPU
_COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}  # far beyond the caches
_MATMUL_SIZE = {"cuda": 4096, "cpu": 1024}
_HALF_MATMUL_SIZE = 8192


@dataclass(frozen=True)
class Effort:
    """How long to measure.

    Attributes:
        seconds: Time given to one measurement, warm-up apart.
        least: Repetitions made even if they take longer.
        most: Repetitions after which the rest of the time is saved.
        host_calls: Calls whose host time is taken.
    """

    seconds: float
    least: int
    most: int
    host_calls: int


GPU = Effort(seconds=0.1, least=5, most=1000, host_calls=200)
CPU = Effort(seconds=0.5, least=7, most=1000, host_calls=0)
QUICK = Effort(seconds=0.05, least=3, most=100, host_calls=100)


@dataclass(frozen=True)
class Timing:
    """The time of one call.

    Attributes:
        median: Milliseconds.
        low: A fifth of the repetitions were faster than this, in milliseconds.
        high: A fifth were slower than this.
        repetitions: How many calls were timed.
    """

    median: float
    low: float
    high: float
    repetitions: int


def summarize(seconds: list[float]) -> Timing:
    """Median and 20/80 quantiles of repeated measurements.

    Args:
        seconds: One time a call, in seconds.

    Example:
        >>> summarize([0.001, 0.002, 0.003])
        Timing(median=2.0, low=1.4, high=2.6, repetitions=3)
    """
    times = torch.tensor(seconds, dtype=torch.float64) * 1e3
    low, middle, high = times.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return Timing(round(middle, 6), round(low, 6), round(high, 6), len(seconds))


def time_calls(
    call: Callable[[], object], device: torch.device, effort: Effort, clock: Clock = time.perf_counter
) -> Timing:
    """Time a call: on a GPU what it keeps the device busy, on the CPU what it takes.

    On a GPU the L2 cache is emptied before each call, on the CPU the caches are as warm as they get.

    Args:
        call: Makes one call; nothing in it should wait for the device.
        device: Where it runs.
        effort: How long to measure.
        clock: Seconds, for the CPU.
    """
    if device.type == "cuda":
        return _time_cuda(call, device, effort, clock)
    start = clock()
    call()
    first = clock() - start
    while clock() - start < min(effort.seconds / 2, 10 * first):  # caches, allocator, the threads that wake up
        call()
    times: list[float] = []
    begin = clock()
    while len(times) < effort.least or (clock() - begin < effort.seconds and len(times) < effort.most):
        start = clock()
        call()
        times.append(clock() - start)
    return summarize(times)


def time_latency(
    call: Callable[[], object], device: torch.device, effort: Effort, clock: Clock = time.perf_counter
) -> Timing:
    """Time a call on an idle device, the host's part with it: what somebody waits for who makes one call.

    Args:
        call: Makes one call, warmed up already.
        device: Where it runs.
        effort: How long to measure.
        clock: Seconds.
    """
    if device.type != "cuda":
        return time_calls(call, device, effort, clock)
    times: list[float] = []
    begin = clock()
    while clock() - begin < effort.seconds / 4:  # brings the clocks of the GPU up
        call()
        torch.cuda.synchronize(device)
    begin = clock()
    while len(times) < effort.least or (clock() - begin < effort.seconds and len(times) < effort.most):
        first, last = _event_pair()
        first.record()
        call()
        last.record()
        torch.cuda.synchronize(device)
        times.append(first.elapsed_time(last) / 1e3)
    return summarize(times)


def _time_cuda(call: Callable[[], object], device: torch.device, effort: Effort, clock: Clock) -> Timing:
    flush = _flush_buffer(device).zero_
    call()  # compiles and tunes
    torch.cuda.synchronize(device)
    start = clock()
    for _ in range(3):
        flush()
        call()
    host = (clock() - start) / 3
    torch.cuda.synchronize(device)
    whole = (clock() - start) / 3
    for _ in range(min(effort.most, int(effort.seconds / 4 / whole))):  # brings the clocks of the GPU up
        call()
    repetitions = max(effort.least, min(effort.most, int(effort.seconds / whole)))
    times: list[float] = []
    while len(times) < repetitions:
        # The GPU waits until the host has queued every call, so that no event waits for the host.
        pause = min(_LONGEST_PAUSE, 1e-4 + 2 * _BATCH * host)
        events = [_event_pair() for _ in range(min(_BATCH, repetitions - len(times)))]
        torch.cuda.synchronize(device)
        torch.cuda._sleep(int(pause * _CYCLES_PER_SECOND))
        for begin, end in events:
            flush()
            begin.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        times += [begin.elapsed_time(end) / 1e3 for begin, end in events]
    return summarize(times)


@lru_cache(maxsize=1)
def _flush_buffer(device: torch.device) -> Tensor:
    """What is written between two calls, so that the second finds nothing of the first in the L2 cache."""
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)


def _event_pair() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def time_graph(call: Callable[[], object], device: torch.device, effort: Effort) -> Timing:
    """Time a call replayed from a CUDA graph, one right after the other: no host, and an L2 cache as warm as it gets.

    Args:
        call: Makes one call, warmed up already; run it under ``torch.no_grad()``.
        device: A GPU.
        effort: How long to measure.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    try:
        with torch.cuda.graph(graph):
            for _ in range(_GRAPH_CALLS):
                call()
    finally:
        torch.cuda.set_stream(stream)  # a call that cannot be recorded leaves PyTorch on the stream of the graph
    times: list[float] = []
    spent = 0.0
    while len(times) < effort.least or (spent < effort.seconds / 2 and len(times) < effort.most):
        begin, end = _event_pair()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize(device)
        spent += begin.elapsed_time(end) / 1e3
        times.append(begin.elapsed_time(end) / 1e3 / _GRAPH_CALLS)
    return summarize(times[1:])  # the first replay uploads the graph


def host_microseconds(
    call: Callable[[], object], device: torch.device, effort: Effort, clock: Clock = time.perf_counter
) -> float:
    """What a call costs the host until it returns, with an idle GPU and nothing to wait for.

    Args:
        call: Makes one call, warmed up already; run it under ``torch.no_grad()`` for the time without grad.
        device: A GPU.
        effort: How many calls; fewer if the GPU needs far longer for them than the time given.
        clock: Seconds.

    Returns:
        The median over batches of calls, microseconds a call.
    """
    batches: list[float] = []
    begin = clock()
    while len(batches) * _HOST_CALLS < effort.host_calls:
        if batches and clock() - begin > effort.seconds:
            break
        torch.cuda.synchronize(device)
        start = clock()
        for _ in range(_HOST_CALLS):
            call()
        batches.append((clock() - start) / _HOST_CALLS)
    torch.cuda.synchronize(device)
    return median(batches) * 1e6


def peak_megabytes(call: Callable[[], object], device: torch.device) -> float:
    """Most GPU memory that a call holds at once beyond what was allocated before it, in 10^6 bytes."""
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


@dataclass(frozen=True)
class Roofs:
    """What the device reaches on plain work, measured in the same run.

    Attributes:
        gigabytes_per_second: Of a copy beyond the caches, bytes read and written.
        gigaflops: Of a float32 matrix product without TF32.
        half_gigaflops: Of a float16 matrix product; None where it was not measured.
    """

    gigabytes_per_second: float
    gigaflops: float
    half_gigaflops: float | None = None

    def products(self, dtype: str) -> float | None:
        """The rate of a matrix product, 10^9 operations a second; None where it was not measured."""
        return {"fp32": self.gigaflops, "fp16": self.half_gigaflops, "bf16": self.half_gigaflops}.get(dtype)


def roofs(device: torch.device, effort: Effort) -> Roofs:
    """Measure the roofs of a device."""
    source = torch.zeros(_COPY_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = time_calls(lambda: target.copy_(source), device, effort).median
    size = _MATMUL_SIZE[device.type]
    matrix = torch.randn(size, size, device=device)
    product = time_calls(lambda: matrix @ matrix, device, effort).median
    half = None
    if device.type == "cuda":  # few processors multiply halves
        matrix = torch.randn(_HALF_MATMUL_SIZE, _HALF_MATMUL_SIZE, device=device, dtype=torch.float16)
        half = round(2 * _HALF_MATMUL_SIZE**3 / time_calls(lambda: matrix @ matrix, device, effort).median / 1e6, 3)
    return Roofs(round(2 * source.numel() / copy / 1e6, 3), round(2 * size**3 / product / 1e6, 3), half)
