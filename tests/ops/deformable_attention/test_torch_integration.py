"""The operators inside PyTorch: derivatives, opcheck, compile, export, checkpoint, autocast, DDP, threads."""

import concurrent.futures
import tempfile

import pytest
import torch
from helpers import Case, gradients, make_fused_inputs, make_inputs
from torch import nn

import visionkernels as vk
from visionkernels.ops.deformable_attention import registration

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = ((4, 6), (3, 2))
CASE = Case(shapes=SHAPES, masked=False, reference_size=4)
KINDS = pytest.mark.parametrize("kind", ["plain", "fused"])
FORMS = pytest.mark.parametrize("form", ["list", "tensor"])


def prepare(kind, device, case=CASE, form="list"):
    """The attention as a function of its leaves, and the leaves."""
    shapes = list(case.shapes) if form == "list" else torch.tensor(case.shapes, device=device)
    options = case.fused_options
    if kind == "plain":
        return lambda v, p, w: vk.ms_deform_attn(v, shapes, None, p, w, **options), make_inputs(case, device)
    mask = torch.rand(case.batch, case.pixels, device=device) > 0.3
    call = lambda v, r, o, w: vk.fused_ms_deform_attn(v, shapes, r, o, w, value_mask=mask, **options)  # noqa: E731
    return call, make_fused_inputs(case, device)[0]


@KINDS
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_gradcheck(kind, device, padding):
    case = Case(
        shapes=((3, 4), (2, 1)), batch=2, queries=1, heads=2, head_dim=2, dtype=F64,
        padding_mode=padding, align_corners=padding == "border", reference_size=4, num_points=(2, 1),
    )  # fmt: skip
    call, leaves = prepare(kind, device, case)
    # The sums are atomic on CUDA, so two runs differ in their last bits.
    assert torch.autograd.gradcheck(call, leaves, nondet_tol=1e-10 if device.type == "cuda" else 0.0)


@FORMS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck(device, form, dtype):
    """Schema, fake, autograd registration and AOT dispatch of every operator."""
    case = Case(shapes=SHAPES, dtype=dtype, location_dtype=F32)
    shapes = torch.tensor(SHAPES, device=device) if form == "tensor" else None
    sizes = [4, 6, 3, 2] if form == "list" else None
    value, locations, weights = make_inputs(case, device)
    (_, references, offsets, logits), _ = make_fused_inputs(case, device)
    mask = torch.rand(2, 30, device=device) > 0.3
    plain = (value, shapes, sizes, locations, weights, [2, 2], "zeros", False, "bilinear")
    fused = (value, shapes, sizes, offsets, logits, references, mask, [2, 2], "border", False)
    grad_output = torch.randn(2, 3, 8, dtype=dtype, device=device)
    detached = [[t.detach() if isinstance(t, torch.Tensor) else t for t in arguments] for arguments in (plain, fused)]
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == BF16 else {}
    torch.library.opcheck(registration.FORWARD, plain, **tolerance)
    torch.library.opcheck(registration.FUSED_FORWARD, fused, **tolerance)
    torch.library.opcheck(registration.FORWARD_NO_GRAD, detached[0], **tolerance)
    torch.library.opcheck(registration.FUSED_FORWARD_NO_GRAD, detached[1], **tolerance)
    torch.library.opcheck(registration.BACKWARD, (grad_output, *detached[0], True, True), **tolerance)
    torch.library.opcheck(registration.BACKWARD, (grad_output, *detached[0], True, False), **tolerance)
    for needs in ((True, True, True), (False, True, False), (False, False, True)):
        torch.library.opcheck(registration.FUSED_BACKWARD, (grad_output, *detached[1], *needs), **tolerance)


@KINDS
@FORMS
def test_compile(kind, device, form):
    call, leaves = prepare(kind, device, form=form)
    grad_output = torch.randn(2, 3, 8, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    for one, other in zip(gradients(compiled, leaves, grad_output), gradients(call, leaves, grad_output), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@KINDS
def test_compile_with_inductor(kind, device):
    """The default compiler; a graph of nothing but the operator needs no C++ compiler on the CPU."""
    call, leaves = prepare(kind, device)
    leaves = [leaf.detach() for leaf in leaves]
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), call(*leaves))


@KINDS
@FORMS
def test_compile_with_other_sizes_compiles_twice_at_most(kind, device, form):
    """Once for the first call, once more when sizes turn out to vary."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def attend(shapes, *tensors):
        if kind == "plain":
            return vk.ms_deform_attn(tensors[0], shapes, None, *tensors[1:])
        return vk.fused_ms_deform_attn(tensors[0], shapes, *tensors[1:])

    compiled = torch.compile(attend, fullgraph=True, backend=counter)
    for batch, queries, sizes in (
        (2, 3, SHAPES), (3, 5, ((7, 5), (4, 3))), (4, 9, ((9, 3), (5, 6))), (5, 4, ((8, 7), (2, 9))),
    ):  # fmt: skip
        case = Case(shapes=sizes, batch=batch, queries=queries, reference_levels=2)
        shapes = list(sizes) if form == "list" else torch.tensor(sizes, device=device)
        leaves = make_inputs(case, device) if kind == "plain" else make_fused_inputs(case, device)[0]
        torch.testing.assert_close(compiled(shapes, *leaves), attend(shapes, *leaves))
    assert counter.frame_count <= 2


class Attend(nn.Module):
    """The call as a module, which is what is exported."""

    def __init__(self, kind, shapes=None):
        super().__init__()
        self.kind, self.shapes = kind, shapes

    def forward(self, tensors, shapes=None):
        shapes = self.shapes if shapes is None else shapes
        if self.kind == "plain":
            return vk.ms_deform_attn(tensors[0], shapes, None, *tensors[1:])
        return vk.fused_ms_deform_attn(tensors[0], shapes, *tensors[1:])


@KINDS
@FORMS
def test_export(kind, device, form):
    """Saved, loaded, and run on another number of queries."""

    def inputs(queries):
        case = Case(shapes=SHAPES, queries=queries, reference_levels=2)
        leaves = make_inputs(case, device) if kind == "plain" else make_fused_inputs(case, device)[0]
        return [leaf.detach() for leaf in leaves]

    shapes = (torch.tensor(SHAPES, device=device),) if form == "tensor" else ()
    model = Attend(kind, None if shapes else list(SHAPES))
    queries = torch.export.Dim("queries", min=2, max=1000)
    free = [{}] + [{1: queries}] * (2 if kind == "plain" else 3)
    exported = torch.export.export(
        model, (inputs(3), *shapes), dynamic_shapes=(free, {}) if shapes else (free,), strict=False
    )
    assert any("visionkernels" in str(node.target) for node in exported.graph.nodes)
    with tempfile.NamedTemporaryFile(suffix=".pt2") as file:
        torch.export.save(exported, file.name)
        loaded = torch.export.load(file.name)
    other = inputs(7)
    torch.testing.assert_close(loaded.module()(other, *shapes), model(other, *shapes))


@KINDS
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(kind, device, reentrant):
    call, leaves = prepare(kind, device)
    grad_output = torch.randn(2, 3, 8, device=device)
    again = lambda *t: torch.utils.checkpoint.checkpoint(call, *t, use_reentrant=reentrant)  # noqa: E731
    results = []
    for function in (call, again):
        copies = [leaf.detach().requires_grad_() for leaf in leaves]
        function(*copies).backward(grad_output)
        results.append([copy.grad for copy in copies])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@KINDS
def test_second_derivatives_are_refused(kind, device):
    call, leaves = prepare(kind, device)
    (gradient,) = torch.autograd.grad(call(*leaves).square().sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match=r"second derivative .* not implemented"):
        gradient.sum().backward()


@KINDS
def test_forward_mode_is_refused(kind, device):
    call, leaves = prepare(kind, device)
    leaves = [leaf.detach() for leaf in leaves]
    for index, leaf in enumerate(leaves):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(leaf, torch.ones_like(leaf))
            with pytest.raises(NotImplementedError, match="forward-mode"):
                call(*leaves[:index], dual, *leaves[index + 1 :])


@KINDS
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_autocast(kind, device, dtype, compiled):
    """The value follows the active dtype; locations keep theirs, as does every gradient."""
    case = Case(shapes=((3, 167),), reference_size=4)
    call, leaves = prepare(kind, device, case)
    expected = call(leaves[0].to(dtype), *leaves[1:])
    torch._dynamo.reset()
    function = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with torch.autocast(device.type, dtype):
        output = function(*leaves)
    assert output.dtype == dtype
    torch.testing.assert_close(output, expected, rtol=0, atol=0)
    output.float().sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [F32] * len(leaves)
    assert all(leaf.grad.ne(0).any() for leaf in leaves)


def test_autocast_leaves_float64_and_other_devices_alone(device):
    case = Case(dtype=F64)
    call, leaves = prepare("plain", device, case)
    with torch.autocast(device.type, BF16):
        assert call(*leaves).dtype == F64
    call, leaves = prepare("plain", device)
    with torch.autocast(device.type, BF16, enabled=False):
        assert call(*leaves).dtype == F32


@KINDS
def test_inference_mode_and_no_grad(kind, device):
    call, leaves = prepare(kind, device)
    expected = call(*leaves).detach()
    for _ in range(2):
        with torch.inference_mode():
            torch.testing.assert_close(call(*leaves), expected)
        with torch.no_grad():
            output = call(*leaves)
        assert not output.requires_grad
        torch.testing.assert_close(output, expected)


@KINDS
def test_meta_tensors(kind):
    _, leaves = prepare(kind, "cpu")
    shapes = list(SHAPES)
    leaves = [leaf.detach().to("meta") for leaf in leaves]
    function = vk.ms_deform_attn if kind == "plain" else vk.fused_ms_deform_attn
    output = function(leaves[0], shapes, *([None] if kind == "plain" else []), *leaves[1:])
    assert (output.shape, output.device.type) == ((2, 3, 8), "meta")


def test_threads(device):
    """Many calls at once give what one gives."""
    call, leaves = prepare("fused", device)
    grad_output = torch.randn(2, 3, 8, device=device)
    expected = gradients(call, leaves, grad_output)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: gradients(call, leaves, grad_output), range(40)):
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_distributed_data_parallel(tmp_path):
    """Two processes, half the batch each, agree with one process on the whole batch."""
    torch.multiprocessing.spawn(_train, (2, str(tmp_path)), nprocs=2)
    halves = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    model, inputs = _model_and_inputs()
    model(*inputs).square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(halves[0][name], halves[1][name], rtol=0, atol=0)
        torch.testing.assert_close(halves[0][name], parameter.grad, rtol=1e-4, atol=1e-6)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = vk.MSDeformAttn(16, 2, 2, 2)
        nn.init.normal_(self.attention.sampling_offsets.weight, std=0.1)
        nn.init.normal_(self.attention.attention_weights.weight, std=0.1)

    def forward(self, query, references, pixels):
        return self.attention(query, references, pixels, list(SHAPES))


def _model_and_inputs():
    torch.manual_seed(3)
    model = _Model()
    return model, (torch.randn(4, 3, 16), torch.rand(4, 3, 2, 2), torch.randn(4, 30, 16))


def _train(rank, world, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", world)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=world)
    model, inputs = _model_and_inputs()
    model = nn.parallel.DistributedDataParallel(model)
    model(*(tensor[rank::world] for tensor in inputs)).square().mean().backward()
    torch.save({name: p.grad for name, p in model.module.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()
