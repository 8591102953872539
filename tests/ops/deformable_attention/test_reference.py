"""The ground truth itself: against `grid_sample`, against a loop over four corners, and by its derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import Case, eager_fused_ms_deform_attn, eager_ms_deform_attn, make_fused_inputs, make_inputs

from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

F64 = torch.float64
MODES = [(padding, align) for padding in ("zeros", "border") for align in (False, True)]


def by_hand(value, shapes, locations, weights):
    """One number after the other, as in equation 3 of the paper."""
    batch, queries, heads, _, points, _ = locations.shape
    output = torch.zeros(batch, queries, heads, value.shape[3], dtype=F64)
    for n, q, m in torch.cartesian_prod(*map(torch.arange, (batch, queries, heads))).tolist():
        start = 0
        for level, (h, w) in enumerate(shapes):
            for p in range(points):
                x, y = (locations[n, q, m, level, p] * torch.tensor([w, h])).sub(0.5).tolist()
                for row in (math.floor(y), math.floor(y) + 1):
                    for column in (math.floor(x), math.floor(x) + 1):
                        if 0 <= row < h and 0 <= column < w:
                            factor = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[n, q, m, level, p]
                            output[n, q, m] += factor * value[n, start + row * w + column, m]
            start += h * w
    return output.flatten(2)


def test_equation_three_by_hand():
    case = Case(shapes=((3, 5), (2, 1)), dtype=F64)
    value, locations, weights = make_inputs(case)
    expected = by_hand(value.detach(), case.shapes, locations.detach(), weights.detach())
    torch.testing.assert_close(reference_ms_deform_attn(value, case.shapes, locations, weights), expected)


@pytest.mark.parametrize(("padding", "align"), MODES)
@pytest.mark.parametrize("shapes", [((3, 5), (2, 4)), ((1, 1), (1, 3), (4, 1))], ids=["usual", "thin"])
def test_grid_sample(shapes, padding, align):
    case = Case(shapes=shapes, padding_mode=padding, align_corners=align, dtype=F64)
    inputs = make_inputs(case)
    grad_output = torch.randn(2, 3, 8, dtype=F64)
    found = reference_ms_deform_attn(inputs[0], case.shapes, *inputs[1:], padding_mode=padding, align_corners=align)
    expected = eager_ms_deform_attn(*inputs, case)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad_output), torch.autograd.grad(expected, inputs, grad_output), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("padding", "align"), MODES)
def test_on_pixels_and_exactly_where_clipping_begins(backend, padding, align):
    """On pixels and exactly where clipping begins `grid_sample` has one of the one-sided gradients: the same here.

    Sizes are powers of two, so that coordinates are exact. Left out is the pixel -1 itself, where `grid_sample`
    reads a pixel with weight 0 and hands its gradient to the location, and Deformable-DETR's kernel does not.
    """
    h, w = (4, 8) if not align else (5, 9)
    pixels = [(x, y) for x in (-0.5, 0.0, 1.0, w - 2.0, w - 1.0, w - 0.5) for y in (-0.5, 0.0, 2.0, h - 1.0, h - 0.25)]
    pixels = torch.tensor(pixels, dtype=torch.float32, device=backend.device)
    sizes = torch.tensor([w, h], dtype=torch.float32, device=backend.device)
    locations = pixels / (sizes - 1) if align else (pixels + 0.5) / sizes
    locations = locations[None, :, None, None, None].requires_grad_()
    value = torch.randn(1, h * w, 1, 3, device=backend.device, requires_grad=True)
    weights = torch.ones(locations.shape[:-1], device=backend.device)
    options = {"padding_mode": padding, "align_corners": align}
    image = value.view(1, h, w, 3).permute(0, 3, 1, 2)
    sampled = F.grid_sample(image, 2 * locations[:, :, 0, 0] - 1, "bilinear", **options)
    expected = sampled[0, :, :, 0].T[None]
    grad_output = torch.randn(expected.shape, device=backend.device)
    expected = [expected, *torch.autograd.grad(expected, (value, locations), grad_output)]
    for found in (
        reference_ms_deform_attn(value, [(h, w)], locations, weights, **options),
        backend.ms_deform_attn(value, [(h, w)], None, locations, weights, **options),
    ):
        for one, other in zip(
            [found, *torch.autograd.grad(found, (value, locations), grad_output)], expected, strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("levels", [0, 1, 2])
@pytest.mark.parametrize("num_points", [2, (3, 1)], ids=["P", "ragged"])
def test_fused_is_the_module_s_arithmetic(size, levels, num_points):
    case = Case(dtype=F64, reference_size=size, reference_levels=levels, num_points=num_points, masked=True)
    inputs, mask = make_fused_inputs(case)
    grad_output = torch.randn(2, 3, 8, dtype=F64)
    found = reference_fused_ms_deform_attn(inputs[0], case.shapes, *inputs[1:], value_mask=mask, **case.fused_options)
    expected = eager_fused_ms_deform_attn(*inputs, case, mask)
    torch.testing.assert_close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found, inputs, grad_output), torch.autograd.grad(expected, inputs, grad_output), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_discrete_sampling_of_rt_detr_v2():
    """trunc(location * size + 0.5), clamped: left of the level as on its first pixel."""
    value = torch.arange(12.0).view(1, 12, 1, 1)
    places = [(-3.0, 0), (-0.1, 0), (0.12, 0), (0.13, 1), (0.6, 2), (0.99, 3), (7.0, 3)]  # x and its column of four
    for x, column in places:
        locations, weights = torch.tensor([x, 0.1]).view(1, 1, 1, 1, 1, 2), torch.ones(1, 1, 1, 1, 1)
        found = reference_ms_deform_attn(value, [(3, 4)], locations, weights, method="nearest")
        assert found.item() == column, x


def test_any_number_of_derivatives():
    case = Case(shapes=((3, 4),), batch=1, queries=2, heads=1, head_dim=2, dtype=F64)
    inputs = tuple(make_inputs(case))
    call = lambda *t: reference_ms_deform_attn(t[0], case.shapes, *t[1:])  # noqa: E731
    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


def test_empty_calls():
    for case in (Case(queries=0), Case(batch=0), Case(num_points=(0, 0)), Case(shapes=((0, 2), (3, 0)))):
        inputs = make_inputs(case)
        output = reference_ms_deform_attn(inputs[0], case.shapes, *inputs[1:], num_points=case.points)
        assert output.shape == (case.batch, case.queries, 8)
        assert output.eq(0).all()
