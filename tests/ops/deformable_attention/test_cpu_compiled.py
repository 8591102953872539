"""The CPU path that Numba compiles: channels, halves, threads, forks, and what happens where it is missing."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import Case, make_inputs

pytest.importorskip("numba")

from visionkernels.ops.deformable_attention import cpu, cpu_compiled, cpu_loops, cpu_threads
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn

MODE = {"padding_mode": "zeros", "align_corners": False, "method": "bilinear"}


def call(case, inputs, grad_output=None):
    value, locations, weights = (t.detach() for t in inputs)
    shape = (*locations.shape[:3], sum(case.points))
    arguments = value, list(case.shapes), locations.reshape(*shape, 2), weights.reshape(shape), case.points
    output = cpu.forward(*arguments, **MODE)
    return [output, *(() if grad_output is None else cpu.backward(grad_output, *arguments, **MODE))]


@pytest.mark.parametrize("head_dim", [1, 3, 7, 8, 9, 15, 16, 24, 31, 32, 33, 48, 63, 64, 71, 100])
def test_every_number_of_channels(head_dim):
    """Blocks of 32, 16, 8 channels and single ones, and rows with 1 to 12 corners."""
    case = Case(shapes=((4, 6), (3, 2)), queries=21, heads=3, head_dim=head_dim, dtype=torch.float64)
    inputs = [t.detach().requires_grad_() for t in make_inputs(case)]
    grad_output = torch.randn(case.batch, case.queries, case.heads * head_dim, dtype=torch.float64)
    expected = reference_ms_deform_attn(inputs[0], case.shapes, *inputs[1:])
    gradients = torch.autograd.grad(expected, inputs, grad_output)
    for mine, other in zip(call(case, inputs, grad_output), [expected, *gradients], strict=True):
        torch.testing.assert_close(mine.reshape(other.shape), other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [1, 8, 16, 32])
def test_every_half_is_read_as_it_is(dtype, channels):
    """All 65536 of them, subnormal ones, infinities and NaNs too: one pixel of weight 1 each."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    value = bits.view(dtype).view(1, -1, 1, channels)
    pixels = value.shape[1]
    locations = torch.full((1, pixels, 1, 1, 2), 0.0)
    locations[0, :, 0, 0, 0] = torch.arange(pixels) / pixels
    inputs = cpu_compiled.Inputs(
        value, locations, torch.ones(1, pixels, 1, 1), None, [(1, pixels)], (1,),
        cpu_compiled.Mode("zeros", False, "nearest"),
    )  # fmt: skip
    found = cpu_compiled.attend(inputs)
    assert torch.equal(found.view(value.shape).nan_to_num(7.0), value.nan_to_num(7.0))
    assert torch.equal(found.view(value.shape).isnan(), value.isnan())


def test_halves_are_widened_before_where_the_processor_cannot(monkeypatch):
    case = Case(dtype=torch.float16, location_dtype=torch.float32, queries=9)
    inputs = make_inputs(case)
    expected = call(case, inputs)[0]
    monkeypatch.setattr(cpu_compiled, "_WIDENS_HALF", False)
    assert torch.equal(call(case, inputs)[0], expected)


@pytest.fixture(params=["openmp", "pool"])
def many_pieces(request, monkeypatch):
    monkeypatch.setattr(cpu_compiled, "_LEAST", 1)
    monkeypatch.setattr(cpu_compiled, "_LEAST_OF_POOL", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if request.param == "pool":
        monkeypatch.setattr(cpu_compiled, "open_mp", lambda: None)
    elif cpu_compiled.open_mp() is None:
        pytest.skip("PyTorch has no OpenMP that can be called here")


@pytest.mark.usefixtures("many_pieces")
def test_threads_change_no_bit(monkeypatch):
    case = Case(shapes=((9, 9), (4, 5)), queries=300)
    inputs, grad_output = make_inputs(case), torch.randn(case.batch, case.queries, case.heads * case.head_dim)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    expected = call(case, inputs, grad_output)
    for threads in (2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        assert all(map(torch.equal, call(case, inputs, grad_output), expected))


@pytest.mark.usefixtures("many_pieces")
def test_calls_from_many_threads():
    case = Case(queries=200)
    inputs, grad_output = make_inputs(case), torch.randn(case.batch, case.queries, case.heads * case.head_dim)
    expected = call(case, inputs, grad_output)
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: call(case, inputs, grad_output), range(40)))
    assert all(all(map(torch.equal, result, expected)) for result in results)


def _child(inputs, case, queue):
    queue.put((cpu_threads.open_mp() is None, call(case, inputs)[0].tolist()))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.usefixtures("many_pieces")
def test_a_forked_process_has_threads_of_its_own():
    case = Case(queries=50)
    inputs = make_inputs(case)
    expected = call(case, inputs)[0]  # the threads of this process are there before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_child, args=(inputs, case, queue))
    child.start()
    try:
        assert queue.get(timeout=60) == (True, expected.tolist())
    finally:
        child.kill()
        child.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_the_first_call_may_be_in_a_forked_process():
    script = """
import os, torch, visionkernels as vk
n = 4096  # enough for several threads: those of PyTorch's OpenMP are there after the first line
value, points, weights = torch.ones(1, n, 8, 32), torch.rand(1, n, 8, 1, 4, 2), torch.rand(1, n, 8, 1, 4)
if os.fork() == 0:
    vk.ms_deform_attn(value, [(64, 64)], None, points, weights)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


def test_work_is_done_once_whatever_its_size(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    for total in (0, 1, 2, 3, 5, 16, 17, 1000):
        done = [0] * total

        def work(begin, end, done=done):
            for i in range(begin, end):
                done[i] += 1

        cpu_threads.share(work, total, cost=10, least=10)
        assert done == [1] * total


def test_little_work_is_done_here(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.setattr(cpu_threads, "_pool", None)  # an error if it is called
    pieces = []
    cpu_threads.share(lambda begin, end: pieces.append((begin, end)), 9, cost=10, least=91)
    assert pieces == [(0, 9)]


def test_an_error_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)

    def work(begin, end):
        raise ValueError("piece")

    with pytest.raises(ValueError, match="piece"):
        cpu_threads.share(work, 100, cost=10, least=1)


def test_loops_compile_where_nothing_can_be_written():
    """A function that is in no file has no place for its cache either."""
    names: dict = {}
    exec("def double(x):\n    return 2 * x", names)
    assert cpu_loops._compile(names["double"])(21) == 42


WITHOUT = """
import sys, importlib.abc

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("numba", "llvmlite"):
            raise ModuleNotFoundError(name)

import torch
import visionkernels as vk
from visionkernels.ops.deformable_attention import cpu
if sys.argv[1] == "without":
    import importlib.util
    find = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "numba" else find(name, *rest)
    sys.meta_path.insert(0, Missing())
value = torch.ones(1, 6, 1, 2, requires_grad=True)
out = vk.ms_deform_attn(value, [(2, 3)], None, torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1))
out.sum().backward()
assert out.tolist() == [[[1.0, 1.0]]] and value.grad.sum() == 2
print("numba" in sys.modules)
"""


@pytest.mark.parametrize(("numba", "loaded"), [("with", "True"), ("without", "False")])
def test_numba_is_used_where_it_is_installed_and_not_missed_where_it_is_not(numba, loaded):
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", WITHOUT, numba], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.strip()) == (0, loaded), done.stderr
