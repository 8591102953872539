"""Hostile calls, drawn at random: sizes, strides, dtypes and numbers that nobody expects.

Every call must give the shapes and dtypes of its docstring, leave its inputs and the memory around them as they were,
be as accurate as the rule in `helpers.py` asks wherever the float64 reference is finite, and be NaN or infinite
wherever that is. Under the interpreter the same calls run through the kernels, fewer of them.
"""

import math
import os
from dataclasses import dataclass

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import (
    Case,
    assert_accurate,
    eager_fused_ms_deform_attn,
    eager_ms_deform_attn,
    gradients,
    inherited_by_logits,
    level_sizes,
    make_fused_inputs,
    make_inputs,
)

import visionkernels as vk
from visionkernels.ops.deformable_attention import cpu
from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
NAN, INF = math.nan, math.inf
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = (F64, F32, F16) if INTERPRETING else (F64, F32, F16, BF16)  # the interpreter truncates to bfloat16
LAYOUTS = ("contiguous", "misaligned", "permuted", "every-other", "expanded")
# A sum of large numbers loses the small ones beside it, so that large is no larger than it must be to be strange.
NUMBERS = {F16: [0.0, -0.0, 6e-8, 2e-5, -9.0], F32: [0.0, -0.0, 1e-45, -1e-39, 1e10]}
NUMBERS |= {BF16: NUMBERS[F32], F64: [*NUMBERS[F32], 5e-324]}
PLACES = [NAN, INF, -INF, 0.0, 1e-45, 1e6, -1e15]
FAR = [*PLACES, 3e38]  # infinite in float32 once it is multiplied by a size


@dataclass(frozen=True)
class Call:
    """A case; and for each of its tensors where it lies, and which numbers are put where."""

    case: Case
    fused: bool
    layouts: dict
    odd: dict


@st.composite
def calls(draw, fused):
    """Any small call."""
    levels = draw(st.integers(1, 3))
    nearest = not fused and draw(st.booleans())
    dtype = draw(st.sampled_from(DTYPES))
    # A size of 0 leaves nothing to compare: it is drawn, but seldom.
    sizes = st.sampled_from([1, 2, 3, 4, 5, 6, 2, 3, 4, 5, 0])
    points = st.sampled_from([1, 2, 3, 2, 1, 3, 2, 0])
    case = Case(
        shapes=tuple(draw(st.tuples(sizes, sizes)) for _ in range(levels)),
        batch=draw(st.sampled_from([1, 2, 3, 1, 2, 3, 2, 1, 3, 0])),
        queries=draw(st.sampled_from([1, 2, 3, 4, 5, 7, 3, 5, 2, 0])),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([1, 2, 3, 4, 5, 8, 16, 32])),
        num_points=draw(st.one_of(points, st.tuples(*[points] * levels))),
        padding_mode="zeros" if nearest else draw(st.sampled_from(["zeros", "border"])),
        align_corners=False if nearest else draw(st.booleans()),
        method="nearest" if nearest else "bilinear",
        dtype=dtype,
        location_dtype=draw(st.sampled_from([F32, F64])),
        weight_dtype=draw(st.sampled_from([F32, F64])),
        reference_size=draw(st.sampled_from([2, 4])),
        reference_levels=draw(st.sampled_from([0, 1, levels])),
        masked=fused and draw(st.booleans()),
    )
    names = ("value", *(("references", "points", "logits") if fused else ("points", "weights")), "grad_output")
    where = st.integers(0, 2**20)
    place = st.tuples(st.sampled_from(PLACES if fused else FAR), where)
    number = st.tuples(st.sampled_from([*NUMBERS[dtype], NAN, INF, -INF]), where)
    lists = {name: st.lists(place if name in ("points", "references") else number, max_size=3) for name in names}
    layouts = {name: draw(st.sampled_from(LAYOUTS)) for name in names}
    return Call(case, fused, layouts, {name: draw(odd) for name, odd in lists.items()})


def put(tensor, odd):
    """Overwrite single numbers."""
    with torch.no_grad():
        for number, where in odd:
            if tensor.numel():
                tensor.view(-1)[where % tensor.numel()] = number


def laid_out(tensor, layout):
    """The same numbers elsewhere in memory, with NaN around them, and that memory."""
    if layout == "misaligned":  # one element into a storage, so that no address is a multiple of 16 bytes
        storage = tensor.new_full((tensor.numel() + 9,), NAN)
        found = storage[1 : 1 + tensor.numel()].view(tensor.shape)
    elif layout == "permuted":
        order = list(range(tensor.dim()))[::-1]
        storage = tensor.new_full([tensor.shape[axis] for axis in order], NAN)
        found = storage.permute(order)
    elif layout == "every-other":
        storage = tensor.new_full((*tensor.shape, 2), NAN)
        found = storage[..., 1]
    else:
        storage = tensor.clone(memory_format=torch.contiguous_format)
        found = storage
    found.copy_(tensor)
    return found, storage


def expand_axis(name, tensor):
    """An axis, of several numbers, that is to have the stride 0; None if there is none.

    Not that of the pixels: where all are alike, gradients of locations are nothing but what rounding leaves.
    """
    axes = [axis for axis, size in enumerate(tensor.shape) if size > 1 and (name, axis) != ("value", 1)]
    return axes[sum(tensor.shape) % len(axes)] if axes else None


def arrange(tensors, layouts):
    """The tensors where the layouts want them, and the memory that they lie in."""
    found, memory = {}, []
    for name, tensor in tensors.items():
        axis = expand_axis(name, tensor) if layouts[name] == "expanded" else None
        if axis is not None:
            memory.append(tensor.narrow(axis, 0, 1).clone())
            found[name] = memory[-1].expand(tensor.shape)
        else:
            found[name], storage = laid_out(tensor, layouts[name])
            memory.append(storage)
    return found, memory


def bytes_of(memory):
    return [tensor.contiguous().view(-1).view(torch.uint8).clone() for tensor in memory]


def nowhere(locations, case):
    """NaN for locations that the operator's own arithmetic makes infinite, as its docstring says."""
    scale = level_sizes(case) - (1 if case.align_corners else 0)
    wide = F64 if F64 in (case.dtype, case.location_dtype, case.weight_dtype) else F32
    finite = (locations.to(wide) * case.split(scale.to(wide), 0)).isfinite().all(-1, keepdim=True)
    return locations.where(finite, locations.new_full((), NAN))


def run(attention, call, device):
    """Make the call, and compare everything that comes out of it."""
    case = call.case
    torch.manual_seed(0)
    leaves, mask = make_fused_inputs(case) if call.fused else (make_inputs(case), None)
    grad_output = torch.randn(case.batch, case.queries, case.heads * case.head_dim).to(case.dtype)
    given = {name: t.detach() for name, t in zip(call.layouts, (*leaves, grad_output), strict=True)}
    for name, tensor in given.items():
        put(tensor, call.odd[name])
    if mask is not None:
        given["value"] = given["value"].masked_fill(~mask[:, :, None, None], NAN)
        mask = mask.t().contiguous().t()
    tensors, memory = arrange({name: tensor.to(device) for name, tensor in given.items()}, call.layouts)
    before = bytes_of(memory)
    *leaves, grad_output = tensors.values()
    got = gradients(attend(attention, call, mask if mask is None else mask.to(device)), leaves, grad_output)
    for one, other in zip(bytes_of(memory), before, strict=True):
        assert torch.equal(one, other), "an input, or the memory around it, has changed"
    leaves, grad_output = [tensor.cpu().contiguous() for tensor in leaves], grad_output.cpu().contiguous()
    wide = [tensor.double() for tensor in leaves]
    if not call.fused:
        wide[1] = nowhere(leaves[1], case).double()
    exact = gradients(reference(call, mask), wide, grad_output.double())
    own = gradients(eager(call, mask), leaves, grad_output)
    kernels = INTERPRETING or device.type == "cuda"
    if kernels and call.fused:
        spoil(own, leaves[3], grad_output, case)
    for name, like, *results in zip(("output", *tensors), (grad_output, *leaves), got, exact, own, strict=False):
        inherited = 0.0
        if name == "logits":
            inherited = inherited_by_logits(exact[0], case.dtype, grad_output, case.head_dim)
        compare(name, like, *results, inherited, kernels)


def attend(attention, call, mask):
    case = call.case
    if call.fused:
        return lambda v, *t: attention(v, list(case.shapes), *t, value_mask=mask, **case.fused_options)
    return lambda v, p, w: attention(v, list(case.shapes), None, p, w, **case.options)


def reference(call, mask):
    case = call.case
    if call.fused:
        return lambda v, *t: reference_fused_ms_deform_attn(v, case.shapes, *t, value_mask=mask, **case.fused_options)
    return lambda v, p, w: reference_ms_deform_attn(v, case.shapes, p, w, **case.options)


def eager(call, mask):
    if call.fused:
        return lambda *t: eager_fused_ms_deform_attn(*t, call.case, mask)
    return lambda *t: eager_ms_deform_attn(*t, call.case)


def spoil(own, logits, grad_output, case):
    """Where the kernels may be NaN even if no sample of a query and head counts.

    Where the softmax is, and in the gradient of logits where grad_output is not finite: its product with the output,
    which is 0, is taken from all samples at once.
    """
    nan = logits.flatten(3).softmax(-1).isnan().any(-1)  # [N, Lq, M]
    output, _, references, points, weights = own
    output.view(*nan.shape, case.head_dim)[nan] = points[nan] = weights[nan] = references[nan.any(2)] = NAN
    weights[~grad_output.view(*nan.shape, case.head_dim).isfinite().all(-1)] = NAN


def compare(name, like, got, truth, own, inherited, kernels):
    """By the rule where the truth is finite; elsewhere neither is the result.

    The kernels multiply by 0 where the CPU path and the reference leave out: beside inputs that are not finite they
    may be NaN where the truth is finite, if PyTorch's own code is.
    """
    assert got.shape == like.shape, f"{name}: {list(got.shape)}, expected {list(like.shape)}"
    assert got.dtype == like.dtype, f"{name}: {got.dtype}, expected {like.dtype}"
    got, finite = got.cpu(), truth.isfinite()
    if kernels:
        finite &= got.isfinite() | own.isfinite()
    differ = got.isfinite() != finite
    assert not differ.any(), f"{name}: {got[differ][:5].tolist()} where the truth is {truth[differ][:5].tolist()}"
    own = own.where(own.isfinite(), truth.to(own.dtype))  # PyTorch's own code spreads NaN further
    assert_accurate(name, got[finite], truth[finite], own[finite], inherited)


def draw(test, fused, examples):
    """Run ``test`` on so many calls, always the same."""
    phases = [hypothesis.Phase.generate, *([] if INTERPRETING else [hypothesis.Phase.shrink])]  # which takes minutes
    settings = hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, phases=phases, report_multiple_bugs=False
    )
    settings(hypothesis.given(calls(fused))(test))()


@pytest.fixture
def examples(backend):
    """How many calls to draw: the interpreter takes half a second for each."""
    return 12 if INTERPRETING else 150


def test_plain(backend, examples):
    draw(lambda call: run(backend.ms_deform_attn, call, backend.device), False, examples)


def test_fused(backend, examples):
    draw(lambda call: run(backend.fused_ms_deform_attn, call, backend.device), True, examples)


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=["float64", "float32", "float16"])
@pytest.mark.parametrize(
    ("mode", "place", "zero"),
    [("zeros", NAN, ("points", "weights")), ("border", 1e6, ("points",))],
    ids=["zeros", "border"],
)
def test_grad_output_not_finite_where_nothing_depends_on_an_input(backend, mode, place, zero, dtype):
    case = Case(shapes=((4, 6),), head_dim=32, num_points=1, padding_mode=mode, dtype=dtype, location_dtype=F32)
    leaves = [tensor.detach().to(backend.device).requires_grad_() for tensor in make_inputs(case)]
    leaves[1].data.fill_(place)
    output = backend.ms_deform_attn(leaves[0], list(case.shapes), None, *leaves[1:], **case.options)
    output.backward(torch.full_like(output, NAN))
    gradient = dict(zip(("value", "points", "weights"), (leaf.grad for leaf in leaves), strict=True))
    for name in zero:
        assert (gradient[name] == 0).all(), f"{name}: {gradient[name].unique().tolist()}"


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_without_numba(monkeypatch, fused):
    monkeypatch.setattr(cpu, "_compiled", lambda: None)
    attention = vk.fused_ms_deform_attn if fused else vk.ms_deform_attn
    draw(lambda call: run(attention, call, torch.device("cpu")), fused, 80)
