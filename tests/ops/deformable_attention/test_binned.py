"""The binned gradient of the value against the float64 reference; under Triton's interpreter, or on a GPU."""

from dataclasses import replace

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

from visionkernels.ops.deformable_attention.problem import Problem
from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
USUAL = Case(shapes=((9, 13), (5, 7), (3, 4), (1, 1)), queries=17, num_points=4, head_dim=8, location_dtype=F32)
CASES = {
    "usual": USUAL,
    "levels-of-one-line": Case(shapes=((1, 7), (5, 1), (2, 1)), queries=9),
    "level-of-no-pixels": Case(shapes=((3, 2), (0, 4), (2, 2))),
    "ragged-points": Case(shapes=((5, 4), (3, 2), (2, 2), (2, 3)), queries=5, heads=3, num_points=(3, 0, 6, 1)),
    "many-images": Case(batch=5, queries=7),
    "a-full-bin": Case(shapes=((2, 2),), batch=1, queries=90, heads=1, num_points=5),
    "align-corners": Case(align_corners=True, queries=9),
    "border": Case(padding_mode="border", queries=9),
    "border-align-corners": Case(shapes=((1, 1), (1, 3), (2, 1)), padding_mode="border", align_corners=True),
    "float16": Case(shapes=USUAL.shapes, queries=17, head_dim=16, dtype=F16),
    "float16-values": Case(shapes=USUAL.shapes, queries=17, head_dim=32, dtype=F16, location_dtype=F32),
    "bfloat16": Case(shapes=USUAL.shapes, queries=17, head_dim=32, dtype=BF16, location_dtype=F32),
    "head-dim-30": Case(head_dim=30),
    "head-dim-71": Case(shapes=((4, 3),), head_dim=71),
    "no-queries": Case(queries=0),
    "no-images": Case(batch=0),
    "no-points": Case(num_points=(0, 0)),
    "no-pixels": Case(shapes=((0, 3), (2, 0))),
}
FUSED_CASES = {
    "points": Case(shapes=((9, 13), (5, 7)), queries=9, masked=True),
    "points-of-every-level": Case(queries=9, reference_levels=2),
    "boxes": Case(queries=9, reference_size=4),
    "boxes-of-every-level": Case(
        queries=9, heads=3, reference_size=4, reference_levels=2, dtype=F16, location_dtype=F32
    ),
    "boxes-ragged": Case(queries=9, reference_size=4, num_points=(3, 6), masked=True, dtype=BF16, weight_dtype=F32),
}


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def place(request, backend):
    """The device; the CPU is that of the interpreter."""
    wanted = {"cpu": "interpreter"}.get(request.param, request.param)
    if backend.name != wanted or (wanted == "interpreter" and not backend.emulates):
        pytest.skip("another backend")
    return backend.device


def small(**changes):
    """Options by which small inputs fill several items of a bin, and several products of an item."""
    from visionkernels.ops.deformable_attention.binned import Options

    return Options(threads=32, chunk=64, block_k=32, gather_pixels=8)._replace(**changes)


def problem_of(case, value, points, weights, references=None, mask=None, in_memory=False):
    """The operator's inputs as its backward receives them."""
    if references is not None and references.dim() == 3:
        references = references[:, :, None]
    shapes = torch.tensor(case.shapes, device=value.device) if in_memory else None
    sizes = () if in_memory else tuple(size for shape in case.shapes for size in shape)
    return Problem(
        value.detach(), shapes, sizes, points.detach(), weights.detach(),
        None if references is None else references.detach(), mask, tuple(case.points),
        case.padding_mode, case.align_corners,
    )  # fmt: skip


def check(case, inputs, mask=None, in_memory=False, problem=None, **options):
    from visionkernels.ops.deformable_attention.binned import grad_value

    value, points, weights = inputs[0], inputs[-2], inputs[-1]
    references = inputs[1] if len(inputs) == 4 else None
    grad_output = torch.randn(*points.shape[:2], value.shape[2] * value.shape[3]).to(value)
    problem = problem or problem_of(case, value, points, weights, references, mask, in_memory)
    shapes = list(case.shapes)
    if references is None:
        truth = lambda *t: reference_ms_deform_attn(t[0], shapes, *t[1:], **case.options)  # noqa: E731
        eager = lambda *t: eager_ms_deform_attn(*t, case)  # noqa: E731
    else:
        more = {**case.fused_options, "value_mask": mask}
        truth = lambda *t: reference_fused_ms_deform_attn(t[0], shapes, *t[1:], **more)  # noqa: E731
        eager = lambda *t: eager_fused_ms_deform_attn(*t, case, mask)  # noqa: E731
    _, exact, *_ = gradients(truth, [t.detach().double() for t in inputs], grad_output.double())
    _, own, *_ = gradients(eager, inputs, grad_output)
    got = grad_value(problem, grad_output, **options)
    assert got.is_contiguous()
    assert_accurate("gradient of value", got, exact, own)
    return got


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(place, case, deterministic):
    check(case, make_inputs(case, place), deterministic=deterministic, options=small())


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("case", FUSED_CASES.values(), ids=FUSED_CASES)
def test_fused(place, case, deterministic):
    inputs, mask = make_fused_inputs(case, place)
    check(case, inputs, mask, deterministic=deterministic, options=small())


@pytest.mark.parametrize(
    "changes",
    [{"gather": True}, {"programs": 3}, {"stages": 2}, {"chunk": 256, "block_k": 64}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_options(place, changes, dtype):
    case = Case(shapes=((9, 13), (2, 2)), queries=33, dtype=dtype, location_dtype=F32)
    check(case, make_inputs(case, place), options=small(**changes))


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_shapes_in_device_memory(place, deterministic):
    case = Case(shapes=((5, 9), (0, 3), (1, 7), (2, 2)), queries=9)
    check(case, make_inputs(case, place), in_memory=True, deterministic=deterministic, options=small())


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
def test_shapes_in_device_memory_that_do_not_fit_give_zeros(place, deterministic):
    from visionkernels.ops.deformable_attention.binned import grad_value

    case = Case(queries=9)
    problem = problem_of(case, *make_inputs(case, place), in_memory=True)
    problem.spatial_shapes[0, 0] += 1
    grad_output = torch.randn(2, 9, 8, device=place)
    assert not grad_value(problem, grad_output, deterministic, options=small()).any()


def test_images_in_several_passes(place):
    case = Case(batch=5, queries=7, masked=True)
    inputs, mask = make_fused_inputs(case, place)
    check(case, inputs, mask, images_per_pass=2, options=small())


@pytest.mark.parametrize("deterministic", [False, True], ids=["atomics", "deterministic"])
@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
def test_points_that_are_not_finite_add_exactly_nothing(place, padding_mode, deterministic):
    case = Case(shapes=((5, 7),), queries=9, num_points=5, padding_mode=padding_mode)
    value, locations, weights = make_inputs(case, place)
    locations = locations.detach()
    locations[..., :3, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=place)
    locations[:, ::2, :, :, 3, 1] = 1e30
    weights = weights.detach()
    weights[..., :3] = torch.nan
    finite = weights.where(weights.isfinite(), 0)
    problem = problem_of(case, value, locations, weights)
    check(case, [value, locations, finite], problem=problem, deterministic=deterministic, options=small())


def test_weights_beyond_float16(place):
    """Their products with a small or large gradient are ordinary numbers."""
    case = Case(shapes=((5, 7),), queries=9, dtype=F16, location_dtype=F32)
    from visionkernels.ops.deformable_attention.binned import grad_value

    value, locations, weights = (t.detach() for t in make_inputs(case, place))
    grad_output = torch.randn(2, 9, 8, device=place)
    for scale in (2.0**-17, 2.0**20):
        problem = problem_of(case, value, locations, weights * scale)
        small_or_large = (grad_output / scale / 128).half() if scale < 1 else (grad_output / 256).half()
        got = grad_value(problem, small_or_large, options=small())
        double = [t.double() for t in (value, locations, weights * scale)]
        truth = lambda *t: reference_ms_deform_attn(t[0], list(case.shapes), *t[1:])  # noqa: E731
        _, exact, *_ = gradients(truth, double, small_or_large.double())
        assert (got.double() - exact).norm() <= 1e-3 * exact.norm()


def test_deterministic_sums_do_not_depend_on_the_order_of_programs(place):
    from visionkernels.ops.deformable_attention.binned import grad_value

    problem = problem_of(USUAL, *make_inputs(USUAL, place))
    grad_output = torch.randn(2, 17, 16, device=place)
    first = grad_value(problem, grad_output, True, options=small())
    for options in (small(programs=3), small(threads=64), small(gather_pixels=32)):
        assert torch.equal(grad_value(problem, grad_output, True, options=options), first)


def test_a_gradient_that_is_not_finite_reaches_its_four_pixels_only(place):
    """As everywhere else: a product of matrices would spread it over the bin."""
    from visionkernels.ops.deformable_attention.binned import grad_value

    case = Case(shapes=((9, 9),), batch=1, queries=40, heads=1, num_points=1, head_dim=8)
    value, locations, weights = (t.detach() for t in make_inputs(case, place))
    grad_output = torch.randn(1, 40, 8, device=place)
    locations[0, 7] = torch.tensor([5.25, 3.0], device=place) / 9  # columns 4 and 5 of rows 2 and 3
    expected = grad_value(problem_of(case, value, locations, weights), grad_output, options=small())
    grad_output[0, 7, 3] = torch.nan
    grad_output[0, 7, 5] = torch.inf
    got = grad_value(problem_of(case, value, locations, weights), grad_output, options=small()).view(9, 9, 8)
    broken = torch.zeros(9, 9, 8, dtype=torch.bool, device=place)
    broken[2:4, 4:6, 3] = broken[2:4, 4:6, 5] = True
    assert torch.equal(~got.isfinite(), broken)
    torch.testing.assert_close(got[~broken], expected.view(9, 9, 8)[~broken])


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_a_whole_backward(kind):
    """All gradients, the value's binned, an image at a time; against the backward that adds by atomics."""
    from visionkernels.ops.deformable_attention import binned, launch

    case = replace(USUAL, queries=400, head_dim=32, masked=kind == "fused")
    references, mask = None, None
    if kind == "plain":
        value, points, weights = make_inputs(case, "cuda")
    else:
        (value, references, points, weights), mask = make_fused_inputs(case, "cuda")
    for in_memory in (False, True):
        problem = problem_of(case, value, points, weights, references, mask, in_memory)
        output = launch.forward(problem)
        arguments = (torch.randn_like(output), True, True, kind == "fused")
        expected = launch.backward(problem, *arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(binned, "pays", lambda problem: True)
            patch.setattr(binned, "SAMPLES_PER_PASS", 1)  # an image at a time
            for one, other in zip(launch.backward(problem, *arguments), expected, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_what_is_possible_and_what_pays():
    pytest.importorskip("triton", reason="Triton is not installed")
    from visionkernels.ops.deformable_attention.binned import MIN_SAMPLES, pays, possible

    many = Case(shapes=((3, 3),), queries=30)
    assert possible(problem_of(many, *make_inputs(many)))
    assert not possible(problem_of(many, *make_inputs(many))._replace(method="nearest"))
    for case in (replace(many, dtype=torch.float64), replace(many, head_dim=256), replace(many, queries=0)):
        assert not possible(problem_of(case, *make_inputs(case)))
    assert not pays(problem_of(many, *make_inputs(many)))
    enough = replace(many, batch=1, queries=1 + MIN_SAMPLES // (many.heads * 4), num_points=4)
    assert pays(problem_of(enough, *make_inputs(enough)))
    image = replace(enough, shapes=((2 * enough.queries, 1),))
    assert not pays(problem_of(image, *make_inputs(image)))
