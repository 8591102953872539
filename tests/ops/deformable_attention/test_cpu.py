"""The CPU path: each way through it against the float64 reference, and exact where values are not finite."""

import subprocess
import sys

import pytest
import torch
from helpers import (
    Case,
    assert_accurate,
    eager_fused_ms_deform_attn,
    eager_ms_deform_attn,
    gradients,
    make_fused_inputs,
    make_inputs,
)

from visionkernels.ops.deformable_attention import cpu, cpu_passes, cpu_samples
from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

NAN, INF = float("nan"), float("inf")
MODES = {
    f"{padding}{'-align-corners' * align}": {"padding_mode": padding, "align_corners": align}
    for padding in ("zeros", "border")
    for align in (False, True)
} | {"nearest": {"method": "nearest"}}
BILINEAR = {name: mode for name, mode in MODES.items() if "method" not in mode}
LEVELS = {
    "two": Case(shapes=((4, 6), (3, 2)), queries=15),
    "ragged": Case(shapes=((5, 4), (1, 7), (3, 1), (1, 1)), num_points=(3, 0, 6, 2), queries=7, heads=3),
    "without-pixels": Case(shapes=((0, 3), (3, 2), (2, 0)), queries=9),
    "head-dim-1": Case(head_dim=1, batch=1, queries=21),
    "head-dim-2048": Case(shapes=((2, 3),), head_dim=2048, batch=1, num_points=1),
    "one-image": Case(batch=1, queries=11),
    "fewer-samples-than-pixels": Case(queries=3),
    "more-pixels-than-int16-counts": Case(shapes=((2, 3), (331, 100)), batch=1, queries=5, head_dim=1),
    "one-image-fewer-samples-than-pixels": Case(batch=1, queries=3),
}


@pytest.fixture(params=["images", "heads", "blocks", "compiled", "compiled-openmp", "compiled-pool"])
def way(request, monkeypatch):
    """The ways through the work.

    In PyTorch's operators: an image at a time, a head at a time, and in blocks of few queries. Compiled by Numba: in
    one piece, and in many by three threads, those of PyTorch's OpenMP or of a pool.
    """
    if request.param.startswith("compiled"):
        pytest.importorskip("numba")
        compiled = cpu._compiled()
        if request.param != "compiled":
            monkeypatch.setattr(compiled, "_LEAST", 1)
            monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
        if request.param == "compiled-openmp" and compiled.open_mp() is None:
            pytest.skip("PyTorch has no OpenMP that can be called here")
        if request.param == "compiled-pool":
            monkeypatch.setattr(compiled, "_LEAST_OF_POOL", 1)
            monkeypatch.setattr(compiled, "open_mp", lambda: None)
        return
    monkeypatch.setattr(cpu, "_compiled", lambda: None)
    if request.param != "images":  # a head at a time, where it has no fewer points than the levels pixels
        monkeypatch.setattr(cpu_passes, "_MIN_HEAD_POINTS", 0)
    if request.param == "blocks":
        monkeypatch.setattr(cpu_passes, "_BLOCK_POINTS", 9)


def options(case):
    return {"padding_mode": case.padding_mode, "align_corners": case.align_corners, "method": case.method}


def packed(case, tensors):
    """Without the level axis: value, points [N, Lq, M, K, 2], weights [N, Lq, M, K]."""
    value, *others, points, weights = (t.detach() for t in tensors)
    shape = (*points.shape[:3], sum(case.points))
    return value, *others, points.reshape(*shape, 2), weights.reshape(shape)


def run(case, inputs, grad_output):
    """Output and gradients of the CPU path."""
    value, locations, weights = packed(case, inputs)
    output = cpu.forward(value, list(case.shapes), locations, weights, case.points, **options(case))
    found = cpu.backward(grad_output, value, list(case.shapes), locations, weights, case.points, **options(case))
    return [output, *found]


def truth(case, inputs, grad_output):
    def attention(value, locations, weights):
        return reference_ms_deform_attn(value, case.shapes, locations, weights, case.points, **options(case))

    return gradients(attention, [t.double() for t in packed(case, inputs)], grad_output.double())


def run_fused(case, inputs, mask, grad_output):
    value, references, offsets, logits = packed(case, inputs)
    arguments = value, list(case.shapes), references, offsets, logits, mask, case.points
    mode = {"padding_mode": case.padding_mode, "align_corners": case.align_corners}
    return [cpu.fused_forward(*arguments, **mode), *cpu.fused_backward(grad_output, *arguments, **mode)]


def fused_truth(case, inputs, mask, grad_output):
    def attention(*tensors):
        value, *others = tensors
        mode = {"padding_mode": case.padding_mode, "align_corners": case.align_corners, "value_mask": mask}
        return reference_fused_ms_deform_attn(value, case.shapes, *others, case.points, **mode)

    return gradients(attention, [t.double() for t in packed(case, inputs)], grad_output.double())


def make_grad(case):
    return torch.randn(case.batch, case.queries, case.heads * case.head_dim, dtype=torch.float64)


def assert_same(got, expected, **tolerance):
    names = ("output", "value", "locations or references", "weights or offsets", "logits")
    for name, mine, other in zip(names, got, expected, strict=False):
        torch.testing.assert_close(mine, other, msg=lambda text, n=name: f"{n}: {text}", **tolerance)


def change(case, **changes):
    return Case(**{**case.__dict__, **changes})


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("case", LEVELS.values(), ids=LEVELS)
def test_matches_the_reference(case, mode):
    case = change(case, dtype=torch.float64, **mode)
    inputs, grad_output = make_inputs(case), make_grad(case)
    assert_same(run(case, inputs, grad_output), truth(case, inputs, grad_output), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_loses_no_more_than_grid_sample(mode, dtype):
    case = Case(queries=40, head_dim=8, dtype=dtype, location_dtype=torch.float32, **mode)
    inputs, grad_output = make_inputs(case), make_grad(case).to(dtype)
    own = gradients(lambda *t: eager_ms_deform_attn(*t, case), packed(case, inputs), grad_output)
    names = ("output", "value", "locations", "weights")
    results = zip(names, run(case, inputs, grad_output), truth(case, inputs, grad_output), own, strict=True)
    for result in results:
        assert_accurate(*result)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", BILINEAR.values(), ids=BILINEAR)
@pytest.mark.parametrize("box", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("reference_levels", [1, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_fused_matches_the_reference(mode, box, reference_levels, masked):
    """With NaN in the masked pixels."""
    case = Case(
        shapes=((4, 6), (3, 2), (1, 1)), num_points=(3, 1, 2), queries=13, reference_size=box,
        reference_levels=reference_levels, masked=masked, dtype=torch.float64, **mode,
    )  # fmt: skip
    inputs, mask = make_fused_inputs(case)
    grad_output = make_grad(case)
    got, expected = run_fused(case, inputs, mask, grad_output), fused_truth(case, inputs, mask, grad_output)
    assert_same(got, expected, rtol=1e-11, atol=1e-12)
    if masked:
        assert not got[1][~mask].any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_fused_loses_no_more_than_grid_sample(dtype):
    case = Case(queries=40, head_dim=8, dtype=dtype, location_dtype=torch.float32, masked=True)
    inputs, mask = make_fused_inputs(case)
    grad_output = make_grad(case).to(dtype)
    leaves = packed(case, inputs)
    own = gradients(lambda *t: eager_fused_ms_deform_attn(*t, case, mask), leaves, grad_output)
    names = ("output", "value", "references", "offsets", "logits")
    got, exact = run_fused(case, inputs, mask, grad_output), fused_truth(case, inputs, mask, grad_output)
    for result in zip(names, got, exact, own, strict=True):
        assert_accurate(*result)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", BILINEAR.values(), ids=BILINEAR)
def test_gradients_on_pixels_and_edges_are_those_of_grid_sample(mode):
    """Where the derivative jumps: on every pixel, on the edges and one pixel beyond, in exact fractions."""
    size = 5 if mode["align_corners"] else 4  # so that location * scale is exact
    case = Case(shapes=((size, size),), batch=1, heads=1, num_points=1, queries=49, dtype=torch.float64, **mode)
    pixel = torch.cartesian_prod(*[torch.arange(-1.0, 6.0, dtype=torch.float64)] * 2)
    location = pixel / (size - 1) if mode["align_corners"] else (pixel + 0.5) / size
    value, _, weights = packed(case, make_inputs(case))
    inputs, grad_output = (value, location.view(1, 49, 1, 1, 2), weights), make_grad(case)
    own = gradients(lambda *t: eager_ms_deform_attn(*t, case), inputs, grad_output)
    assert_same(run(case, inputs, grad_output), own, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("axis", [0, 1], ids=["x", "y"])
def test_locations_that_are_not_finite_contribute_nothing(mode, bad, axis):
    """Not even beside values, weights and output gradients that are NaN themselves."""
    case = Case(queries=15, **mode)
    value, locations, weights = packed(case, make_inputs(case))
    locations[..., axis] = bad
    got = run(case, (value * NAN, locations, weights * NAN), make_grad(case) * NAN)
    for name, result in zip(("output", "value", "locations", "weights"), got, strict=True):
        assert (result == 0).all(), name


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_some_locations_that_are_not_finite(mode):
    case = Case(queries=15, dtype=torch.float64, **mode)
    value, locations, weights = packed(case, make_inputs(case))
    locations[..., 0].masked_fill_(torch.rand(weights.shape) < 0.2, NAN)
    locations[..., 1].masked_fill_(torch.rand(weights.shape) < 0.2, -INF)
    inputs, grad_output = (value, locations, weights), make_grad(case)
    assert_same(run(case, inputs, grad_output), truth(case, inputs, grad_output), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("far", [1e30, -1e30, 5e9])
def test_locations_far_away(mode, far):
    case = Case(queries=5, **mode)
    value, locations, weights = packed(case, make_inputs(case))
    locations[..., 1] = far
    near = locations.clone()
    near[..., 1] = 9.0 if far > 0 else -9.0
    grad_output = make_grad(case).float()
    got, expected = (run(case, (value, place, weights), grad_output) for place in (locations, near))
    assert_same(got, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_pixels_that_are_no_corner_are_not_mixed_in(mode, bad):
    """Every pixel that no sample reads is made NaN or infinite: nothing changes."""
    case = Case(shapes=((6, 7), (3, 4)), batch=1, queries=10, heads=1, num_points=3, dtype=torch.float64, **mode)
    value, locations, weights = packed(case, make_inputs(case))
    locations[:, 1:] = locations[:, :1]  # few pixels have all the uses
    locations[:, ::2, :, 0] = -7.0
    grad_output = make_grad(case)
    expected = truth(case, (value, locations, weights), grad_output)
    used = torch.zeros_like(value, dtype=torch.bool)
    for pixel in range(case.pixels):
        poisoned = value.clone()
        poisoned[:, pixel] = NAN
        used[:, pixel] = not truth(case, (poisoned, locations, weights), grad_output)[0].isfinite().all()
    assert 5 < used[..., 0].sum() < case.pixels - 5
    got = run(case, (value.where(used, bad), locations, weights), grad_output)
    assert_same(got, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_what_is_not_finite_spreads_no_further_than_it_must(mode, bad):
    """Bad pixels, weights and output gradients make the same results NaN or infinite as in the reference."""
    case = Case(shapes=((6, 7), (3, 4)), queries=12, heads=2, dtype=torch.float64, **mode)
    value, locations, weights = packed(case, make_inputs(case))
    value[0, 5, 1], weights[1, 3, 0, 2] = bad, bad
    grad_output = make_grad(case)
    grad_output[0, 2, 3] = bad
    inputs = value, locations, weights
    got, expected = run(case, inputs, grad_output), truth(case, inputs, grad_output)
    for name, mine, other in zip(("output", "value", "locations", "weights"), got, expected, strict=True):
        assert (mine.isfinite() == other.isfinite()).all(), name
        torch.testing.assert_close(mine[mine.isfinite()], other[other.isfinite()], rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
def test_infinite_weight_half_outside():
    """Infinity times the pixels inside; the corners outside, of weight 0, do not turn it into NaN."""
    case = Case(shapes=((3, 3),), batch=1, heads=1, queries=9, num_points=1)
    value, locations, weights = packed(case, make_inputs(case))
    value, locations[..., 0], locations[..., 1], weights[0, 4] = value.abs() + 1, 0.0, 0.45, INF
    output, grad_value, *_ = run(case, (value, locations, weights), make_grad(case).float().abs() + 1)
    assert output.isinf().all(2)[0].tolist() == [query == 4 for query in range(9)]
    assert grad_value.isinf().all(3)[0, :, 0].tolist() == [pixel in (0, 3) for pixel in range(9)]
    assert not output.isnan().any()
    assert not grad_value.isnan().any()


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("box", [2, 4], ids=["points", "boxes"])
@pytest.mark.parametrize("argument", [1, 2], ids=["references", "offsets"])
def test_fused_locations_that_are_not_finite(bad, box, argument):
    case = Case(queries=6, reference_size=box, dtype=torch.float64)
    inputs, _ = make_fused_inputs(case)
    inputs = list(packed(case, inputs))
    inputs[argument][:, 1::2, ..., -1] = bad
    grad_output = make_grad(case)
    got, expected = run_fused(case, inputs, None, grad_output), fused_truth(case, inputs, None, grad_output)
    assert_same(got, expected, rtol=1e-11, atol=1e-12)


EMPTY = {
    "no-images": Case(batch=0),
    "no-queries": Case(queries=0),
    "no-points": Case(num_points=(0, 0)),
    "no-pixels": Case(shapes=((0, 3), (2, 0))),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_nothing_to_do(case):
    inputs, grad_output = packed(case, make_inputs(case)), make_grad(case)
    for tensor, result in zip((grad_output, *inputs), run(case, inputs, grad_output), strict=True):
        assert result.shape == tensor.shape
        assert (result == 0).all()
    inputs, mask = make_fused_inputs(case)
    inputs = packed(case, inputs)
    results = run_fused(case, inputs, mask, grad_output)
    for tensor, result in zip((grad_output, *inputs), results, strict=True):
        assert result.shape == tensor.shape
        assert (result == 0).all()


@pytest.mark.usefixtures("way")
def test_strided_inputs_and_contiguous_results():
    case = Case(queries=15, head_dim=6, dtype=torch.float64)
    inputs, grad_output = packed(case, make_inputs(case)), make_grad(case)
    expected = run(case, inputs, grad_output)

    def strided(tensor):
        wide = torch.full((*tensor.shape[::-1], 2), NAN, dtype=tensor.dtype)[..., 1]
        return wide.permute(*reversed(range(tensor.dim()))).copy_(tensor)

    got = run(case, [strided(t) for t in inputs], strided(grad_output))
    assert_same(got, expected, rtol=0, atol=0)
    assert all(result.is_contiguous() for result in got)


@pytest.mark.usefixtures("way")
def test_gradients_not_needed_are_none():
    case = Case(queries=15)
    value, locations, weights = packed(case, make_inputs(case))
    arguments = make_grad(case).float(), value, list(case.shapes), locations, weights, case.points
    both = cpu.backward(*arguments, **options(case))
    first = cpu.backward(*arguments, **options(case), needs_points=False)
    others = cpu.backward(*arguments, **options(case), needs_value=False)
    assert first[1:] == (None, None)
    assert others[0] is None
    assert_same((None, first[0], *others[1:]), (None, *both), rtol=0, atol=0)
    inputs, mask = make_fused_inputs(case)
    value, *inputs = packed(case, inputs)
    arguments = arguments[0], value, list(case.shapes), *inputs, mask, case.points
    mode = {"padding_mode": "zeros", "align_corners": False}
    every = cpu.fused_backward(*arguments, **mode)
    for flags, kept in (
        ({"needs_value": False}, (1, 2, 3)),
        ({"needs_reference": False}, (0, 2, 3)),
        ({"needs_points": False}, (0, 1)),
        ({"needs_points": False, "needs_reference": False}, (0,)),
    ):
        some = cpu.fused_backward(*arguments, **mode, **flags)
        for i, (mine, other) in enumerate(zip(some, every, strict=True)):
            assert (mine is not None and mine.equal(other)) if i in kept else mine is None, (flags, i)


def test_more_rows_than_int32_counts():
    """Rows of value beyond 2**31, without the memory for them."""
    shapes, heads, far = ((2, 3), (2**16, 2**15)), 3, 2**16 * 2**15
    value = torch.empty(1, device="meta").expand(1, 6 + far, heads, 1)
    locations = torch.full((1, 1, heads, 2, 2), 1.0, dtype=torch.float64)
    points = cpu_samples.Points(locations, locations[..., 0], [1, 1], torch.float32)
    mode = cpu_samples.Mode("zeros", False, "bilinear")
    work = cpu_passes._Pass(value, shapes, points, mode, exact=False)
    rows = work.samples((0, slice(0, 1), slice(0, heads)), slopes=False)[0].rows
    assert rows[0, 1, 3].tolist() == [5 * heads + 1, (6 + far - 1) * heads + 1]
    assert rows.dtype == torch.int64
    points = cpu_samples.Points(locations, locations[..., 0], [2], torch.float32)
    small = cpu_passes._Pass(value[:, :6], shapes[:1], points, mode, exact=False)
    assert small.levels.start.dtype == torch.int32


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("context", [torch.device("meta"), torch.inference_mode()], ids=["device", "inference"])
def test_surroundings_do_not_matter(context):
    """Neither a default device, nor that the first call of its sizes was in inference mode."""
    case = Case(shapes=((3, 7), (5, 2)), queries=4)
    inputs, grad_output = packed(case, make_inputs(case)), make_grad(case).float()
    fused, mask = make_fused_inputs(case)
    with context:
        first = run(case, inputs, grad_output), run_fused(case, fused, mask, grad_output)
    second = run(case, inputs, grad_output), run_fused(case, fused, mask, grad_output)
    for got, expected in zip(first, second, strict=True):
        assert_same(got, expected, rtol=0, atol=0)


@pytest.mark.usefixtures("way")
def test_backward_is_deterministic():
    case = Case(shapes=((9, 9),), queries=3000, num_points=4)
    inputs, grad_output = make_inputs(case), make_grad(case).float()
    first, second = run(case, inputs, grad_output), run(case, inputs, grad_output)
    assert all(a.equal(b) for a, b in zip(first, second, strict=True))


def test_no_warnings():
    """In a new process, because PyTorch warns of sparse tensors once."""
    program = """
import torch
from visionkernels.ops.deformable_attention import cpu
value, locations, weights = torch.ones(1, 6, 1, 2), torch.rand(1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1)
mode = dict(padding_mode="zeros", align_corners=False, method="bilinear")
cpu.backward(torch.ones(1, 1, 2), value, [(2, 3)], locations, weights, (1,), **mode)
"""
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True)
    assert "UserWarning" not in done.stderr, done.stderr
