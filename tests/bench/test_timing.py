"""The clock."""

import contextlib

import pytest
import torch
from bench_tools import CPU

from visionkernels.bench import timing

CUDA = torch.device("cuda")


class Clock:
    """Each call of `work` takes the next of `steps` seconds; looking at the clock takes none."""

    def __init__(self, *steps):
        self.now, self.steps = 100.0, list(steps)

    def work(self):
        self.now += self.steps.pop(0)

    def __call__(self):
        return self.now


class Gpu:
    """Events that read the clock, and a flush that takes a millisecond of it."""

    def __init__(self, monkeypatch, clock):
        self.clock, self.waited, self.flushed = clock, [], 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.time, self.at = clock(), len(gpu.waited)

            def elapsed_time(self, end):
                assert len(gpu.waited) > end.at  # the GPU has caught up
                return 1e3 * (end.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.waited.append)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
        monkeypatch.setattr(timing, "_flush_buffer", lambda device: self)

    def zero_(self):
        self.flushed += 1
        self.clock.now += 0.001


def test_time_calls_leaves_out_the_first_call_and_takes_the_median():
    clock = Clock(50.0, 0.004, 0.002, 0.003, 0.001, 0.005)
    result = timing.time_calls(clock.work, CPU, timing.Effort(0.0, 5, 5, 0), clock)
    assert result == timing.Timing(median=3.0, low=1.8, high=4.2, repetitions=5)


def test_time_calls_uses_the_time_given():
    clock = Clock(*[0.1] * 100)
    assert timing.time_calls(clock.work, CPU, timing.Effort(0.95, 3, 1000, 0), clock).repetitions == 10


def test_a_gpu_call_is_timed_without_the_flush_before_it(monkeypatch):
    """A GPU that takes 2 ms a call, and 50 ms for the first."""
    clock = Clock(0.05, *[0.002] * 200)
    gpu = Gpu(monkeypatch, clock)
    found = timing.time_calls(clock.work, CUDA, timing.Effort(0.04, 3, 100, 0), clock)
    assert found == timing.Timing(2.0, 2.0, 2.0, 13)  # 40 ms of 3 ms each, flush and call
    assert gpu.flushed == 13 + 3


def test_host_time_is_that_of_one_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = Clock(*[3e-6] * 40, *[5e-6] * 20)
    effort = timing.Effort(1.0, 1, 1, host_calls=60)
    assert timing.host_microseconds(clock.work, CUDA, effort, clock) == pytest.approx(3)


def test_the_roofs_of_a_cpu_are_those_of_a_copy_and_a_product(monkeypatch):
    monkeypatch.setitem(timing._COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(timing._MATMUL_SIZE, "cpu", 100)
    monkeypatch.setattr(timing, "time_calls", lambda call, device, effort: timing.Timing(0.5, 0.5, 0.5, 1))
    roofs = timing.roofs(CPU, timing.QUICK)
    assert roofs == timing.Roofs(round(2 * 2**20 / 5e-4 / 1e9, 3), 4.0)


@pytest.mark.gpu
def test_a_gpu_is_timed_by_what_it_does():
    a = torch.randn(4096, 4096, device=CUDA)
    small = timing.time_calls(lambda: a + 1, CUDA, timing.QUICK)
    large = timing.time_calls(lambda: a @ a, CUDA, timing.QUICK)
    assert 0 < small.low <= small.median <= small.high < large.median
    assert timing.peak_megabytes(lambda: a + 1, CUDA) == pytest.approx(67.1, rel=0.1)
    assert 1 < timing.host_microseconds(lambda: a + 1, CUDA, timing.QUICK) < 1000
    assert timing.time_graph(lambda: a @ a, CUDA, timing.QUICK).median == pytest.approx(large.median, rel=0.3)


@pytest.mark.gpu
def test_the_flush_leaves_no_input_in_the_cache():
    a = torch.randn(2**20, device=CUDA)  # 4 MB: read from the L2 cache in the graph, from memory otherwise
    graph = timing.time_graph(lambda: a.sum(), CUDA, timing.QUICK)
    assert graph.median < timing.time_calls(lambda: a.sum(), CUDA, timing.QUICK).median


def test_a_call_that_no_graph_can_record_leaves_the_stream_as_it_was(monkeypatch):
    streams = ["stream of the caller"]

    class Graph:
        def __init__(self, graph):
            pass

        def __enter__(self):
            streams.append("stream of the graph")

        def __exit__(self, *args):
            raise RuntimeError("the capture was invalidated")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(RuntimeError, match="invalidated"):
        timing.time_graph(lambda: None, CUDA, timing.QUICK)
    assert streams[-1] == "stream of the caller"


def test_a_graph_is_timed_by_the_call(monkeypatch):
    """A GPU whose call takes 1 ms, and 30 ms more the first time that the graph runs."""
    clock = Clock()
    Gpu(monkeypatch, clock)
    steps, recorded = [0.03], []

    class CUDAGraph:
        def replay(self):
            clock.now += 0.001 * len(recorded) + (steps.pop() if steps else 0)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", CUDAGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    found = timing.time_graph(lambda: recorded.append(1), CUDA, timing.Effort(0.2, 3, 100, 0))
    assert found == timing.Timing(1.0, 1.0, 1.0, 3)
