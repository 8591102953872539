"""The operators in standard operators compute what the kernels compute; nothing is exported here."""

import dataclasses

import pytest
import torch
from helpers import Case, check_fused, check_plain, make_fused_inputs, make_inputs

import visionkernels as vk
from visionkernels.errors import UserError
from visionkernels.export import _standard
from visionkernels.export._open_sizes import Tracing

CASES = {
    "two levels": Case(),
    "one level, one point": Case(shapes=((5, 3),), num_points=1),
    "points unlike": Case(num_points=(1, 3)),
    "no points on a level": Case(num_points=(2, 0)),
    "border": Case(padding_mode="border"),
    "align corners": Case(align_corners=True),
    "align corners, border": Case(align_corners=True, padding_mode="border"),
    "one pixel": Case(shapes=((1, 1), (1, 4)), align_corners=True),
    "an empty level": Case(shapes=((0, 3), (3, 2))),
    "nearest": Case(method="nearest"),
    "nearest, points unlike": Case(method="nearest", num_points=(3, 1)),
    "float16": Case(dtype=torch.float16),
    "bfloat16, locations in float32": Case(dtype=torch.bfloat16, location_dtype=torch.float32),
    "float64": Case(dtype=torch.float64),
}
FUSED = {
    "points": Case(),
    "a point for each level": Case(reference_levels=2),
    "boxes": Case(reference_size=4, num_points=(3, 1)),
    "boxes for each level, mask": Case(reference_size=4, reference_levels=2, masked=True),
    "no level axis": Case(reference_levels=0, masked=True),
    "border, float16": Case(padding_mode="border", dtype=torch.float16),
}


def lowered(function):
    """The public function, its operators replaced as in an export."""

    def call(*arguments, **options):
        with Tracing(_standard.lowered()) as tracing:
            output = function(*arguments, **options)
        assert len(tracing.calls) == 1
        return output

    return call


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_plain_operator(case):
    inputs = make_inputs(case)
    if case.method == "nearest":  # no gradient to the locations, and the lowered form is not asked for any
        inputs[1] = inputs[1].detach()
    check_plain(lowered(vk.ms_deform_attn), case, inputs)


@pytest.mark.parametrize("case", FUSED.values(), ids=FUSED)
def test_the_fused_operator(case):
    check_fused(lowered(vk.fused_ms_deform_attn), case, *make_fused_inputs(case))


@pytest.mark.parametrize("case", [Case(), Case(padding_mode="border"), Case(method="nearest")], ids=lambda c: c.method)
def test_a_location_that_is_not_finite_adds_nothing(case):
    value, locations, weights = (tensor.detach() for tensor in make_inputs(case))
    for index, bad in enumerate((torch.nan, torch.inf, -torch.inf, 3e38, 1e9)):
        locations.flatten(0, 4)[index * 3, index % 2] = bad
    options = case.options
    expected = vk.ms_deform_attn(value, case.shapes, None, locations, weights, **options)
    got = lowered(vk.ms_deform_attn)(value, case.shapes, None, locations, weights, **options)
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_half_up_at_the_middle_between_two_pixels():
    """GridSample's nearest mode would round half to even."""
    value = torch.arange(4.0).view(1, 4, 1, 1)
    locations = torch.tensor([0.125, 0.375, 0.625, 0.875]).view(1, 4, 1, 1, 1, 1).expand(-1, -1, -1, -1, -1, 2)
    got = lowered(vk.ms_deform_attn)(value, [(1, 4)], None, locations, torch.ones(1, 4, 1, 1, 1), method="nearest")
    assert got.flatten().tolist() == [1, 2, 3, 3]


def test_shapes_in_a_tensor_are_refused():
    inputs = (tensor.detach() for tensor in make_inputs(dataclasses.replace(Case(), batch=1)))
    value, locations, weights = inputs
    with pytest.raises(UserError, match=r"spatial_shapes as a tensor.*pass a list of"):
        lowered(vk.ms_deform_attn)(value, torch.tensor(Case().shapes), None, locations, weights)


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("tensor", [torch.tensor([[3, 1, 3], [2, 5, 4]]), torch.tensor([[0.5, -1.0], [0.5, 2.0]])])
def test_what_onnx_does_not_have_is_written_out(tensor, dim):
    tests = tensor.flatten()[1:3]
    with Tracing(_standard.lowered()):
        got = [torch.cummax(tensor, dim=dim), tensor.cummin(dim), (torch.isin(tensor, tests),)]
    expected = [torch.cummax(tensor, dim), torch.cummin(tensor, dim), (torch.isin(tensor, tests),)]
    for ours, theirs in zip(got, expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("shape", "index", "dim"), [((2, 5, 4), (2, 3, 1), 1), ((3, 4), (1, 6), -1), ((1, 4), (5, 4), 0)]
)
def test_take_along_dim_broadcasts(shape, index, dim):
    tensor, index = torch.randn(shape), torch.randint(0, shape[dim], index)
    with Tracing({}):
        got = torch.take_along_dim(tensor, index, dim=dim)
    assert torch.equal(got, torch.take_along_dim(tensor, index, dim=dim))
