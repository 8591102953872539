"""`fused_ms_deform_attn` against the float64 reference on every backend: values and all four gradients."""

import pytest
import torch
from helpers import Case, check_fused, gradients, make_fused_inputs, make_inputs

import visionkernels as vk

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
REFERENCES = {  # levels of the references (0: no such axis) and size of their last axis
    f"{'N-Lq' + {0: '', 1: '-1', 2: '-L'}[levels]}-{size}": {"reference_levels": levels, "reference_size": size}
    for size in (2, 4)
    for levels in (0, 1, 2)
}
CASES = {
    "non-square-levels": Case(shapes=((3, 11), (7, 2))),
    "one-level": Case(shapes=((6, 4),), num_points=4, reference_size=4),
    "five-levels": Case(
        shapes=((7, 5), (4, 3), (2, 2), (1, 2), (1, 1)), num_points=1, reference_levels=5, reference_size=4
    ),
    "level-of-no-pixels": Case(shapes=((3, 2), (0, 4), (2, 2)), masked=True),
    "odd-queries-many-images": Case(batch=3, queries=7, masked=True),
    "heads-3": Case(shapes=((3, 2),), heads=3, head_dim=8),
    "heads-8": Case(shapes=((3, 2),), heads=8, head_dim=8, num_points=2),
    "ragged-points": Case(shapes=((5, 4), (3, 2), (2, 2)), queries=2, num_points=(3, 6, 3), reference_size=4),
    "ragged-points-float64": Case(
        shapes=((5, 4), (3, 2)), num_points=(3, 6), reference_size=4, dtype=F64, location_dtype=F64, weight_dtype=F64
    ),
    "level-without-points": Case(
        shapes=((5, 4), (3, 2), (2, 2)), num_points=(2, 0, 3), reference_size=4, reference_levels=3
    ),
    "last-level-without-points": Case(num_points=(3, 0)),
    "no-points": Case(num_points=(0, 0)),
    "no-queries": Case(queries=0),
    "no-images": Case(batch=0),
    **{f"head-dim-{d}": Case(shapes=((4, 3),), head_dim=d, masked=True) for d in (1, 30, 32)},
    "head-dim-1025": Case(shapes=((4, 3),), queries=1, head_dim=1025, num_points=1),
}
DTYPES = [(F64, F64, F64), (F32, F32, F32), (F16, F16, F16), (BF16, BF16, BF16),
          (F16, F32, F32), (BF16, F32, BF16), (F32, F64, F64), (F16, F64, F32)]  # fmt: skip


def dtype_id(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def attend(backend, case, mask=None):
    def call(value, references, offsets, logits):
        return backend.fused_ms_deform_attn(
            value, list(case.shapes), references, offsets, logits, value_mask=mask, **case.fused_options
        )

    return call


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(backend, case):
    check_fused(backend.fused_ms_deform_attn, case, *make_fused_inputs(case, backend.device))


@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
@pytest.mark.parametrize("references", REFERENCES.values(), ids=REFERENCES)
def test_forms_of_references(backend, references, masked):
    """Pixels that the mask leaves out hold NaN."""
    case = Case(shapes=((4, 6), (3, 2)), masked=masked, **references)
    check_fused(backend.fused_ms_deform_attn, case, *make_fused_inputs(case, backend.device))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("align", [False, True], ids=["", "align-corners"])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_padding(backend, padding, align, size):
    case = Case(shapes=((4, 6), (1, 3)), padding_mode=padding, align_corners=align, reference_size=size, masked=True)
    check_fused(backend.fused_ms_deform_attn, case, *make_fused_inputs(case, backend.device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_dtypes(backend, dtypes):
    case = Case(
        shapes=((4, 6),), head_dim=8, dtype=dtypes[0], location_dtype=dtypes[1], weight_dtype=dtypes[2], masked=True
    )
    check_fused(backend.fused_ms_deform_attn, case, *make_fused_inputs(case, backend.device))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_offsets_far_away_and_not_finite_beside_usual_ones(backend, padding, size):
    case = Case(queries=4, num_points=3, padding_mode=padding, reference_size=size)
    inputs, mask = make_fused_inputs(case, backend.device)
    with torch.no_grad():
        for query, odd in enumerate((torch.nan, torch.inf, 1e30, -1e30)):
            inputs[2][:, query, :, 0, 1, query % 2] = odd
            inputs[2][0, query, 0, 1, 0] = odd
    check_fused(backend.fused_ms_deform_attn, case, inputs, mask)


@pytest.mark.parametrize("which", [1, 2], ids=["references", "offsets"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("padding", ["zeros", "border"])
def test_points_that_are_not_finite_add_exactly_nothing(backend, padding, size, which):
    case = Case(shapes=((4, 6),), num_points=3, padding_mode=padding, reference_size=size)
    inputs, _ = make_fused_inputs(case, backend.device)
    with torch.no_grad():
        inputs[which][0, ..., 0] = torch.nan
        inputs[which][1, ..., 1] = torch.inf
    for result in gradients(attend(backend, case), inputs, torch.ones(2, 3, 8, device=backend.device)):
        assert result.eq(0).all()


def test_large_logits(backend):
    case = Case()
    (value, references, offsets, logits), _ = make_fused_inputs(case, backend.device)
    logits = logits.detach() * 1e4
    check_fused(backend.fused_ms_deform_attn, case, (value, references, offsets, logits), None)
    check_fused(backend.fused_ms_deform_attn, case, (value, references, offsets, logits - 1e5), None)


def test_a_masked_pixel_gets_no_gradient(backend):
    case = Case(masked=True)
    inputs, mask = make_fused_inputs(case, backend.device)
    results = gradients(attend(backend, case, mask), inputs, torch.ones(2, 3, 8, device=backend.device))
    assert results[1][~mask].eq(0).all()
    assert results[1][mask].ne(0).any()


def test_everything_masked(backend):
    case = Case(masked=True)
    inputs, mask = make_fused_inputs(case, backend.device)
    inputs[0].detach().fill_(torch.nan)
    call = attend(backend, case, torch.zeros_like(mask))
    for result in gradients(call, inputs, torch.ones(2, 3, 8, device=backend.device)):
        assert result.eq(0).all()


@pytest.mark.parametrize("wanted", range(4), ids=["value", "references", "offsets", "logits"])
def test_gradient_of_one_input_alone(backend, wanted):
    case = Case(shapes=((4, 6),), reference_size=4)
    inputs, _ = make_fused_inputs(case, backend.device)
    grad_output = torch.randn(2, 3, 8, device=backend.device)
    expected = gradients(attend(backend, case), inputs, grad_output)[1 + wanted]
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index == wanted)
    attend(backend, case)(*inputs).backward(grad_output)
    assert [tensor.grad is not None for tensor in inputs] == [index == wanted for index in range(4)]
    torch.testing.assert_close(inputs[wanted].grad, expected)


@pytest.mark.parametrize("which", range(5), ids=["value", "references", "offsets", "logits", "mask"])
def test_strided_inputs(backend, which):
    """In another order of memory, and not at the start of a word."""
    case = Case(shapes=((4, 6),), head_dim=8, num_points=1, masked=True)
    inputs, mask = make_fused_inputs(case, backend.device)
    inputs = [tensor.detach() for tensor in inputs]
    grad_output = torch.randn(2, 3, 16, device=backend.device)
    expected = gradients(attend(backend, case, mask), inputs, grad_output)
    others = [*inputs, mask]
    for move in (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), lambda t: shift(t)):
        moved = [move(tensor) if index == which else tensor for index, tensor in enumerate(others)]
        found = gradients(attend(backend, case, moved[4]), moved[:4], grad_output)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def shift(tensor):
    """The same numbers, one element further."""
    storage = torch.cat([tensor.flatten()[:1], tensor.flatten()])
    return storage[1:].view(tensor.shape)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("size", [2, 4])
def test_shapes_in_a_tensor(backend, dtype, size):
    case = Case(shapes=((4, 6), (0, 2), (3, 2)), masked=True, reference_size=size)
    shapes = torch.tensor(case.shapes, dtype=dtype, device=backend.device)
    check_fused(backend.fused_ms_deform_attn, case, *make_fused_inputs(case, backend.device), spatial_shapes=shapes)


@pytest.mark.parametrize("wrong", [((60, 60), (3, 2)), ((4, 6), (3, 1)), ((0, 0), (0, 0)), ((4, 6), (2**32 - 1,) * 2)])
@pytest.mark.parametrize("size", [2, 4])
def test_shapes_in_a_tensor_that_do_not_add_up_give_nan(backend, wrong, size):
    """The host does not read a GPU's; nothing is read by them, and nothing gets a gradient."""
    if backend.name == "cpu":
        pytest.skip("there the host reads them, and raises")
    leaves, mask = make_fused_inputs(Case(shapes=((4, 6), (3, 2)), masked=True, reference_size=size), backend.device)
    wrong = torch.tensor(wrong, device=backend.device)
    attend = lambda v, r, o, w: backend.fused_ms_deform_attn(v, wrong, r, o, w, value_mask=mask)  # noqa: E731
    output, *others = gradients(attend, leaves, torch.ones_like(attend(*leaves)))
    assert output.isnan().all()
    assert not any(gradient.any() for gradient in others)


@pytest.mark.parametrize("size", [2, 4])
def test_is_the_unfused_attention_of_softmax_and_locations(device, size):
    """x is divided by the width and y by the height: on levels that are no squares the difference shows."""
    case = Case(shapes=((3, 11), (7, 2)), reference_size=size)
    value, _, _ = make_inputs(case, device)
    references = torch.rand(2, 3, 1, size, device=device)
    offsets, logits = torch.randn(2, 3, 2, 2, 2, 2, device=device), torch.randn(2, 3, 2, 2, 2, device=device)
    if size == 2:
        locations = references[:, :, None, :, None] + offsets / torch.tensor([[[11.0, 3]], [[2, 7]]], device=device)
    else:
        boxes = references[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / 2 * boxes[..., 2:] * 0.5
    weights = logits.flatten(3).softmax(-1).view(logits.shape)
    found = vk.fused_ms_deform_attn(value, list(case.shapes), references, offsets, logits)
    expected = vk.ms_deform_attn(value, list(case.shapes), None, locations, weights)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
