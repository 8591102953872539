"""What only a CUDA device can show: no synchronisation, graphs, streams, a second device, compiling, addresses."""

import itertools
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from helpers import Case, check_fused, check_plain, gradients, make_fused_inputs, make_inputs

import visionkernels as vk

pytestmark = pytest.mark.gpu

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CASE = Case(shapes=((12, 18), (6, 9)), queries=20, heads=8, head_dim=32, num_points=4, reference_size=4)
DETR = ((100, 134), (50, 67), (25, 34), (13, 17))


@pytest.fixture
def no_synchronisation():
    """PyTorch raises where the host would wait for the device."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


def shapes_of(case, form):
    return list(case.shapes) if form == "list" else torch.tensor(case.shapes, device="cuda")


def prepare(kind, form, case=CASE):
    """A function of the leaves, and the leaves, of one of the three ways in."""
    shapes = shapes_of(case, form)
    start = torch.tensor([0, *itertools.accumulate(h * w for h, w in case.shapes)][:-1], device="cuda")
    if kind == "plain":
        return lambda v, p, w: vk.ms_deform_attn(v, shapes, start, p, w, 64), make_inputs(case, "cuda")
    if kind == "fused":
        leaves, _ = make_fused_inputs(case, "cuda")
        mask = torch.rand(case.batch, case.pixels, device="cuda") > 0.1
        return lambda v, r, o, w: vk.fused_ms_deform_attn(v, shapes, r, o, w, value_mask=mask), leaves
    module = vk.MSDeformAttn(64, len(case.shapes), 4, 2).cuda()
    padding = torch.rand(case.batch, case.pixels, device="cuda") > 0.9
    query, references = torch.randn(2, 20, 64, device="cuda"), torch.rand(2, 20, 2, 2, device="cuda")
    pixels = torch.randn(2, case.pixels, 64, device="cuda")
    leaves = [tensor.requires_grad_() for tensor in (query, references, pixels)]
    return lambda q, r, x: module(q, r, x, shapes, start, padding), leaves


KINDS = pytest.mark.parametrize("kind", ["plain", "fused", "module"])
FORMS = pytest.mark.parametrize("form", ["list", "tensor"])


def test_the_check_for_synchronisation_finds_one(no_synchronisation):
    tensor = torch.ones(1, device="cuda")
    no_synchronisation()
    with pytest.raises(RuntimeError, match="synchroniz"):
        tensor.item()


@KINDS
@FORMS
def test_no_call_synchronises(no_synchronisation, kind, form):
    call, leaves = prepare(kind, form)
    grad_output = torch.randn_like(call(*leaves))
    no_synchronisation()
    for _ in range(2):  # the second call may take a shorter way
        torch.autograd.grad(call(*leaves), leaves, grad_output)
        with torch.no_grad():
            call(*leaves)


@KINDS
@FORMS
def test_forward_and_backward_in_a_graph(kind, form):
    """Captured once, replayed on other numbers in the same memory."""
    call, leaves = prepare(kind, form)
    grad_output = torch.randn_like(call(*leaves))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            torch.autograd.grad(call(*leaves), leaves, grad_output)
            with torch.no_grad():
                call(*leaves)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(*leaves)
        found = [output, *torch.autograd.grad(output, leaves, grad_output)]
        with torch.no_grad():
            found.append(call(*leaves))
    for _ in range(2):
        with torch.no_grad():
            for leaf in leaves:
                leaf.copy_(torch.rand_like(leaf))
            grad_output.copy_(torch.randn_like(grad_output))
        graph.replay()
        expected = gradients(call, leaves, grad_output)
        expected.append(expected[0])
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_runs_on_the_current_stream(kind):
    """What is written on a stream before the call is read by the call."""
    call, leaves = prepare(kind, "list")
    leaves = [leaf.detach() for leaf in leaves]
    for _ in range(3):
        new = torch.randn_like(leaves[0])
        expected = call(new, *leaves[1:])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            leaves[0].copy_(new)
            found = call(*leaves)
        stream.synchronize()
        torch.testing.assert_close(found, expected)


@KINDS
@FORMS
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_runs_where_the_tensors_are(kind, form):
    """Whichever device is the current one."""
    with torch.cuda.device(1):
        call, leaves = prepare(kind, form)
    grad_output = torch.randn_like(call(*leaves))
    for _ in range(2):
        results = []
        for current in (1, 0):
            with torch.cuda.device(current), torch.no_grad():
                results.append([call(*leaves)])
            with torch.cuda.device(current):
                results[-1] += gradients(call, leaves, grad_output)
        for one, other in zip(*results, strict=True):
            assert one.device == other.device == torch.device("cuda:1")
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def compiled_kernels():
    from visionkernels.ops.deformable_attention import (
        binned_kernels,
        binned_samples,
        kernels,
        warp_backward,
        warp_forward,
    )

    modules = (kernels, warp_forward, warp_backward, binned_samples, binned_kernels)
    jitted = [kernel for module in modules for name, kernel in vars(module).items() if name.endswith("_kernel")]
    return sum(len(cache[0]) for kernel in jitted for cache in kernel.device_caches.values())


@pytest.mark.parametrize("kind", ["plain", "fused"])
@FORMS
def test_another_size_of_the_problem_compiles_nothing(kind, form):
    """Batch, queries and image size: also 1 and multiples of 16, which Triton likes to treat apart.

    As many queries as pixels are a case of their own: then the call is an encoder's.
    """

    def run(batch, queries, size):
        case = Case(shapes=(size, (3, 2)), batch=batch, queries=queries, head_dim=32, reference_levels=2)
        call, leaves = prepare(kind, form, case)
        call(*leaves).sum().backward()
        with torch.no_grad():
            call(*leaves)

    before = compiled_kernels()
    run(2, 5, (7, 9))
    first = compiled_kernels()
    assert first > before
    for batch, queries, size in itertools.product((1, 3, 16), (1, 16, 33), ((1, 1), (16, 16), (1, 11), (61, 7))):
        run(batch, queries, size)
    assert compiled_kernels() == first


@pytest.mark.parametrize("deterministic", [False, True], ids=["", "deterministic"])
def test_another_number_of_images_compiles_nothing_where_they_are_taken_in_parts(monkeypatch, deterministic):
    """Parts of a mask, say, of an odd number of pixels do not begin where the whole is aligned."""
    from visionkernels.ops.deformable_attention import binned, launch

    monkeypatch.setattr(binned, "pays", lambda problem: problem.points.shape[1] > 20)
    monkeypatch.setattr(binned, "SAMPLES_PER_PASS", 1)
    monkeypatch.setattr(launch, "CACHE_BYTES", 1)

    def run(batch, queries, size):
        case = Case(shapes=(size, (3, 2)), batch=batch, queries=queries, head_dim=32, reference_levels=2, masked=True)
        inputs, mask = make_fused_inputs(case, "cuda")
        value, references, offsets, logits = inputs
        output = vk.fused_ms_deform_attn(value, case.shapes, references, offsets, logits, value_mask=mask)
        torch.autograd.grad(output.sum(), inputs)

    if deterministic:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    run(1, 5, (7, 9))
    run(1, 30, (7, 9))
    first = compiled_kernels()
    for batch, queries, size in itertools.product((1, 4), (5, 19, 33), ((7, 9), (16, 16), (61, 7))):
        run(batch, queries, size)
    assert compiled_kernels() == first


@pytest.mark.parametrize(
    "shapes",
    [((12, 18), (6, 8)), ((12, 18), (60000, 60000)), ((-12, -18), (6, 9)), ((0, 0), (0, 0)),
     ((3000, 3000), (-1, -1)), ((12, 18), (2**32 - 1, 2**32 - 1))],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_device_shapes_that_do_not_add_up_give_nan(kind, shapes):
    """The host does not read them, so it cannot raise; nothing outside the value is read or written."""
    call, leaves = prepare(kind, "tensor")
    wrong = torch.tensor(shapes, device="cuda")
    if kind == "plain":
        call = lambda v, p, w: vk.ms_deform_attn(v, wrong, None, p, w)  # noqa: E731
    else:
        call = lambda v, r, o, w: vk.fused_ms_deform_attn(v, wrong, r, o, w)  # noqa: E731
    output, *others = gradients(call, leaves, torch.ones(2, 20, 256, device="cuda"))
    torch.cuda.synchronize()
    assert output.isnan().all()
    assert not any(gradient.any() for gradient in others)


def test_device_shapes_with_strides():
    call, leaves = prepare("plain", "tensor")
    expected = call(*leaves)
    strided = torch.tensor(CASE.shapes, device="cuda").repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    torch.testing.assert_close(vk.ms_deform_attn(leaves[0], strided, None, *leaves[1:]), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_accuracy_at_the_encoder_s_shape(kind, dtype):
    case = Case(
        shapes=DETR, batch=1, queries=17821, heads=8, head_dim=32, num_points=4, dtype=dtype, location_dtype=F32
    )
    if kind == "plain":
        check_plain(vk.ms_deform_attn, case, make_inputs(case, "cuda"))
    else:
        check_fused(vk.fused_ms_deform_attn, case, *make_fused_inputs(case, "cuda"))


@contextmanager
def deterministic(warn_only=False):
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [F16, F32], ids=["float16", "float32"])
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_a_hundred_deterministic_backwards_are_the_same(kind, dtype):
    """On the encoder's shape, where the sums of atomics differ from run to run; they are close to those."""
    case = Case(shapes=DETR, batch=2, queries=17821, heads=8, head_dim=32, dtype=dtype, location_dtype=F32)
    call, leaves = prepare(kind, "list", case)
    grad_output = torch.randn_like(call(*leaves))
    usual = gradients(call, leaves, grad_output)
    with deterministic():
        first = gradients(call, leaves, grad_output)
        for _ in range(100):
            for one, other in zip(gradients(call, leaves, grad_output), first, strict=True):
                assert torch.equal(one, other)
    for one, other in zip(first, usual, strict=True):
        assert (one.double() - other.double()).norm() <= 16 * torch.finfo(dtype).eps * other.double().norm()
    if dtype == F32:  # or the comparison above could not fail
        assert any(not torch.equal(gradients(call, leaves, grad_output)[1], usual[1]) for _ in range(10))


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_deterministic_backward_of_a_few_queries(kind):
    call, leaves = prepare(kind, "tensor")
    grad_output = torch.randn_like(call(*leaves))
    usual = gradients(call, leaves, grad_output)
    with deterministic():
        for _ in range(3):
            for one, other in zip(gradients(call, leaves, grad_output), usual, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_has_no_deterministic_backward_says_so():
    case = replace(CASE, dtype=torch.float64)
    call, leaves = prepare("plain", "list", case)
    output = call(*leaves)
    with deterministic():
        assert torch.equal(output, call(*leaves))
        with pytest.raises(RuntimeError, match="float64"):
            torch.autograd.grad(call(*leaves), leaves, torch.ones_like(output))
    with deterministic(warn_only=True), pytest.warns(UserWarning, match="deterministic"):
        torch.autograd.grad(call(*leaves), leaves, torch.ones_like(output))
