"""Calls at the same time: in threads, on streams, in forked and spawned processes, and on two GPUs."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import threading

import pytest
import torch
from helpers import Case, gradients, make_fused_inputs, make_inputs
from torch import nn

import visionkernels as vk
from visionkernels.ops.deformable_attention import cpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = ((4, 6), (3, 2))
CASES = [  # each takes another way: encoder and decoder, halves and floats, few and many channels, ragged points
    Case(shapes=((9, 11), (5, 4)), queries=119, heads=8, head_dim=32),
    Case(shapes=SHAPES, batch=1, queries=7, heads=8, head_dim=32, dtype=F16, location_dtype=F32, num_points=4),
    Case(shapes=SHAPES, queries=33, heads=3, head_dim=5, padding_mode="border"),
    Case(shapes=SHAPES, queries=20, heads=2, head_dim=64, dtype=BF16, location_dtype=F32, num_points=(3, 6)),
]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def make_call(number, device):
    """A function of nothing that makes one call, forward and backward, and returns all results."""
    case = CASES[number % len(CASES)]
    torch.manual_seed(number)
    shapes = list(case.shapes)
    grad_output = torch.randn(case.batch, case.queries, case.heads * case.head_dim, dtype=case.dtype).to(device)
    if number % 2:
        leaves, _ = make_fused_inputs(case, device)
        return lambda: gradients(
            lambda v, *t: vk.fused_ms_deform_attn(v, shapes, *t, **case.fused_options), leaves, grad_output
        )
    leaves = make_inputs(case, device)
    return lambda: gradients(lambda v, *t: vk.ms_deform_attn(v, shapes, None, *t, **case.options), leaves, grad_output)


def assert_same(found, expected):
    """To the bit on the CPU; atomic sums on a GPU come in any order."""
    for one, other in zip(found, expected, strict=True):
        if one.device.type == "cpu" and other.device.type == "cpu":
            assert torch.equal(one, other)
        else:
            tolerance = 1e-5 if one.dtype == F32 else 1e-2
            torch.testing.assert_close(one.cpu(), other.cpu(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=["compiled", "operators"])
def way(request, monkeypatch):
    """Both CPU paths."""
    if request.param == "operators":
        monkeypatch.setattr(cpu, "_compiled", lambda: None)
    else:
        pytest.importorskip("numba")


def in_threads(calls, rounds, around=contextlib.nullcontext):
    """Every call in a thread of its own, all of them beginning together, again and again."""
    barrier = threading.Barrier(len(calls))

    def work(call):
        with around():
            results = []
            for _ in range(rounds):
                barrier.wait(60)
                results.append(call())
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()
        return results

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(work, calls))


@pytest.mark.usefixtures("way")
def test_threads_with_calls_of_their_own():
    calls = [make_call(number, "cpu") for number in range(8)]
    expected = [call() for call in calls]
    for results, right in zip(in_threads(calls, rounds=5), expected, strict=True):
        for found in results:
            assert_same(found, right)


@pytest.mark.gpu
@pytest.mark.parametrize("streams", [False, True], ids=["one-stream", "streams"])
def test_threads_with_calls_of_their_own_on_a_gpu(streams):
    """The first calls compile, so they too come from all threads at once."""
    calls = [make_call(number, "cuda") for number in range(8)]
    torch.cuda.synchronize()
    around = (lambda: torch.cuda.stream(torch.cuda.Stream())) if streams else contextlib.nullcontext
    found = in_threads(calls, rounds=10, around=around)
    torch.cuda.synchronize()
    for results, call in zip(found, calls, strict=True):
        right = call()
        for result in results:
            assert_same(result, right)


@pytest.mark.gpu
def test_streams_of_one_thread():
    """Calls that overlap on the device, with a buffer of their own each."""
    calls = [make_call(number, "cuda") for number in range(8)]
    expected = [call() for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in calls]
    for _ in range(5):
        found = []
        for call, stream in zip(calls, streams, strict=True):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(1_000_000)
                found.append(call())
        torch.cuda.synchronize()
        for result, right in zip(found, expected, strict=True):
            assert_same(result, right)


def compute(queue, numbers, device):
    """What a process does: results as lists, which need no shared memory that ends with it.

    A forked process has one thread, as those of PyTorch's DataLoader: with more, PyTorch's own operators wait forever
    for threads that the fork did not take along.
    """
    torch.set_num_threads(1)
    results = [make_call(number, device)() for number in numbers]
    queue.put([[tensor.double().cpu().tolist() for tensor in result] for result in results])


def results_of(method, numbers, device):
    """The results of a child process, begun by ``method``."""
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=compute, args=(queue, numbers, device))
    child.start()
    try:
        return queue.get(timeout=90)
    finally:
        child.join(10)
        child.kill()


def assert_close_lists(found, expected):
    """The child has another number of threads, so that last bits may differ."""
    for results, right in zip(found, expected, strict=True):
        for one, other in zip(results, right, strict=True):
            error = torch.tensor(one, dtype=torch.float64).view(other.shape) - other.double().cpu()
            assert error.norm() <= max(1e-5, torch.finfo(other.dtype).eps) * other.double().norm()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("way")
def test_a_forked_process_after_the_parent_has_called():
    """Forward and backward, in a child whose parent has threads that the fork does not take along."""
    numbers = range(4)
    expected = [make_call(number, "cpu")() for number in numbers]
    assert_close_lists(results_of("fork", numbers, "cpu"), expected)
    again = [make_call(number, "cpu")() for number in numbers]  # the parent goes on
    for one, other in zip(again, expected, strict=True):
        assert_same(one, other)


@pytest.mark.slow
def test_a_spawned_process(device):
    numbers = range(4)
    expected = [make_call(number, device)() for number in numbers]
    assert_close_lists(results_of("spawn", numbers, str(device)), expected)


class Model(nn.Module):
    """Attention with what it needs to have a gradient for every parameter."""

    def __init__(self):
        super().__init__()
        self.attention = vk.MSDeformAttn(32, 2, 4, 2)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.1)
        nn.init.normal_(self.attention.attention_weights.weight, std=0.1)

    def forward(self, query, references, pixels):
        return self.attention(query, references, pixels, list(SHAPES))


def model_and_inputs(device):
    torch.manual_seed(3)
    inputs = torch.randn(6, 5, 32), torch.rand(6, 5, 2, 2), torch.randn(6, 30, 32)
    return Model().to(device), [tensor.to(device) for tensor in inputs]


def gradients_of_one_device(device):
    model, inputs = model_and_inputs(device)
    model(*inputs).square().mean().backward()
    return {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.ne(0).any(), name
        torch.testing.assert_close(found[name].cpu(), gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@two_gpus
def test_data_parallel():
    """One thread a GPU, in one process."""
    model, inputs = model_and_inputs("cuda:0")
    nn.DataParallel(model, [0, 1])(*inputs).square().mean().backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert_same_gradients(found, gradients_of_one_device("cuda:0"))


@pytest.mark.gpu
@two_gpus
def test_distributed_data_parallel_on_two_gpus(tmp_path):
    torch.multiprocessing.spawn(train, (2, str(tmp_path)), nprocs=2)
    expected = gradients_of_one_device("cuda:0")
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"{rank}.pt"), expected)


def train(rank, world, folder):
    """A process of two; the current device stays cuda:0, as in scripts that forget to set it."""
    store = torch.distributed.FileStore(f"{folder}/store", world)
    device = torch.device("cuda", rank)
    torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=world, device_id=device)
    model, inputs = model_and_inputs(device)
    model = nn.parallel.DistributedDataParallel(model, [rank])
    model(*(tensor[rank::world] for tensor in inputs)).square().mean().backward()
    torch.save({name: p.grad.cpu() for name, p in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_second_gpu_while_the_first_is_current(number):
    """And both at once, each in a thread."""
    calls = [make_call(number, device) for device in ("cuda:1", "cuda:0")]
    assert torch.cuda.current_device() == 0
    second, first = (call() for call in calls)
    assert all(tensor.device == torch.device("cuda:1") for tensor in second)
    assert_same([tensor.to("cuda:0") for tensor in second], first)
    for results in in_threads(calls, rounds=5):
        for found in results:
            assert_same([tensor.to("cuda:0") for tensor in found], first)
