"""The tolerance rule refuses wrong answers: a rule that passes everything would hide every fault."""

import pytest
import torch
from helpers import Case, assert_accurate, check_fused, check_plain, make_fused_inputs, make_inputs, make_locations

from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

F64, F32, F16 = torch.float64, torch.float32, torch.float16
TRUTH = torch.tensor([1.0, -2.0, 3.0], dtype=F64)


def reference(value, shapes, start, locations, weights, **options):
    return reference_ms_deform_attn(value, shapes, locations, weights, **options)


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=["float64", "float32", "float16"])
def test_a_rounding_passes_and_more_does_not(dtype):
    eps = torch.finfo(dtype).eps
    assert_accurate("x", TRUTH.to(dtype), TRUTH, TRUTH.to(dtype))
    assert_accurate("x", (TRUTH * (1 + eps / 2)).to(dtype), TRUTH, TRUTH.to(dtype))
    with pytest.raises(AssertionError, match="x: error"):
        assert_accurate("x", (TRUTH * (1 + 30 * eps)).to(dtype), TRUTH, TRUTH.to(dtype))


def test_twice_what_pytorch_loses_passes_and_thrice_does_not():
    eager = (TRUTH + 0.01).float()
    assert_accurate("x", (TRUTH + 0.0199).float(), TRUTH, eager)
    with pytest.raises(AssertionError, match=r"PyTorch loses 0\.01"):
        assert_accurate("x", (TRUTH + 0.03).float(), TRUTH, eager)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TRUTH.float().where(TRUTH != 3, torch.nan), "1 of 3 values are not finite"),
        (TRUTH.float().where(TRUTH != 3, torch.inf), "1 of 3 values are not finite"),
        (TRUTH.float()[:2], "shape"),
        (TRUTH.half(), "expected torch.float32"),
        (torch.zeros(3), "error 3"),
    ],
    ids=["nan", "inf", "shape", "dtype", "zeros"],
)
def test_other_wrong_answers(wrong, message):
    with pytest.raises(AssertionError, match=message):
        assert_accurate("x", wrong, TRUTH, TRUTH.float())


def swapped_axes(value, shapes, start, locations, weights, **options):
    return reference(value, shapes, start, locations.flip(-1), weights, **options)


def swapped_sizes(value, shapes, start, locations, weights, **options):
    return reference(value, [(w, h) for h, w in shapes], start, locations, weights, **options)


def half_coordinates(value, shapes, start, locations, weights, **options):
    return reference(value, shapes, start, locations.half().to(locations), weights, **options)


def no_gradient_to_weights(value, shapes, start, locations, weights, **options):
    return reference(value, shapes, start, locations, weights.detach(), **options)


def twice_the_gradient_to_value(value, shapes, start, locations, weights, **options):
    return reference(2 * value - value.detach(), shapes, start, locations, weights, **options)


def neighbour_s_image(value, shapes, start, locations, weights, **options):
    return reference(value.roll(1, 0), shapes, start, locations, weights, **options)


def other_padding(value, shapes, start, locations, weights, **options):
    return reference(value, shapes, start, locations, weights, **{**options, "padding_mode": "border"})


WRONG = [
    swapped_axes, swapped_sizes, half_coordinates, no_gradient_to_weights,
    twice_the_gradient_to_value, neighbour_s_image, other_padding,
]  # fmt: skip


def test_the_reference_passes_its_own_check():
    case = Case(queries=8)
    check_plain(reference, case, make_inputs(case))


@pytest.mark.parametrize("wrong", WRONG, ids=lambda function: function.__name__)
def test_a_wrong_attention_fails(wrong):
    case = Case(queries=8)
    with pytest.raises(AssertionError, match="error"):
        check_plain(wrong, case, make_inputs(case))


def test_a_wrong_fused_attention_fails():
    case = Case(shapes=((3, 11), (7, 2)), masked=True)

    def right(value, shapes, references, offsets, logits, **options):
        return reference_fused_ms_deform_attn(value, shapes, references, offsets, logits, **options)

    def height_first(value, shapes, references, offsets, logits, **options):
        sizes = torch.tensor(shapes, dtype=offsets.dtype)
        return right(value, shapes, references, offsets * sizes.flip(1)[:, None] / sizes[:, None], logits, **options)

    def unmasked(value, shapes, references, offsets, logits, *, value_mask, **options):
        return right(value, shapes, references, offsets, logits, **options)

    check_fused(right, case, *make_fused_inputs(case))
    for wrong in (height_first, unmasked):
        with pytest.raises(AssertionError):
            check_fused(wrong, case, *make_fused_inputs(case))


def test_locations_lie_between_pixels_inside_and_outside():
    case = Case(shapes=((5, 9),), queries=200)
    pixel = make_locations(case) * torch.tensor([9, 5]) - 0.5
    fraction = pixel - pixel.floor()
    assert fraction.min() >= 0.249
    assert fraction.max() <= 0.751
    for low, high in ((-2, -1), (-1, 0), (0, 4), (4, 5)):  # of y: outside, at the edge, inside, at the other edge
        assert ((pixel[..., 1] > low) & (pixel[..., 1] < high)).any()
