"""`ms_deform_attn` against the float64 reference on every backend: values, gradients, and what a call may look like."""

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from helpers import Case, check_plain, gradients, make_inputs

import visionkernels as vk

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16

CASES = {
    "non-square-levels": Case(shapes=((3, 11), (7, 2))),
    "one-level": Case(shapes=((6, 4),), num_points=4),
    "five-levels": Case(shapes=((7, 5), (4, 3), (2, 2), (1, 2), (1, 1)), num_points=1),
    "levels-of-one-pixel": Case(shapes=((1, 1), (1, 1))),
    "levels-of-one-line": Case(shapes=((1, 7), (5, 1))),
    "level-of-no-pixels": Case(shapes=((3, 2), (0, 4), (2, 2))),
    "odd-queries-many-images": Case(batch=3, queries=7),
    "one-row": Case(batch=1, queries=1, heads=1),
    "many-rows": Case(shapes=((5, 4),), queries=65, head_dim=8, num_points=1),
    "heads-1": Case(shapes=((3, 2),), heads=1),
    "heads-3": Case(shapes=((3, 2),), heads=3, head_dim=8),
    "heads-8": Case(shapes=((3, 2),), heads=8, head_dim=8, num_points=1),
    "heads-12": Case(shapes=((3, 2),), heads=12, num_points=1),
    "one-point": Case(num_points=1),
    "many-points": Case(shapes=((5, 5),), batch=1, queries=1, heads=1, num_points=70),
    "ragged-points": Case(shapes=((5, 4), (3, 2), (2, 2)), queries=2, num_points=(3, 6, 3)),
    "level-without-points": Case(shapes=((5, 4), (3, 2), (2, 2)), num_points=(2, 0, 3)),
    "last-level-without-points": Case(num_points=(3, 0)),
    "no-points": Case(num_points=(0, 0)),
    "no-queries": Case(queries=0),
    "no-images": Case(batch=0),
    "no-pixels": Case(shapes=((0, 3), (2, 0))),
    **{f"head-dim-{d}": Case(shapes=((4, 3),), head_dim=d) for d in (1, 2, 30, 32, 64, 71)},
    **{f"head-dim-{d}": Case(shapes=((4, 3),), queries=1, head_dim=d, num_points=1) for d in (1025, 2048)},
}
MODES = {
    f"{padding}{'-align-corners' * align}": {"padding_mode": padding, "align_corners": align}
    for padding in ("zeros", "border")
    for align in (False, True)
} | {"nearest": {"method": "nearest"}}
# (value, locations, weights): the value's dtype or a wider one; autocast makes value and weights half, locations not.
DTYPES = [
    (F64, F64, F64), (F32, F32, F32), (F16, F16, F16), (BF16, BF16, BF16),
    (F16, F32, F32), (BF16, F32, F32), (F16, F32, F16), (BF16, F32, BF16), (BF16, F64, F64),
    (F32, F64, F64), (F16, F64, F64), (F32, F64, F32), (F32, F32, F64),
]  # fmt: skip


def dtype_id(dtypes):
    return "-".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_reference(backend, case):
    check_plain(backend.ms_deform_attn, case, make_inputs(case, backend.device))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("shapes", [((4, 6), (3, 2)), ((1, 1), (1, 3), (2, 1))], ids=["usual", "thin"])
def test_padding_and_method(backend, mode, shapes):
    case = Case(shapes=shapes, **mode)
    check_plain(backend.ms_deform_attn, case, make_inputs(case, backend.device))


@pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
def test_dtypes(backend, dtypes):
    if backend.name == "interpreter" and dtypes[:2] == (BF16, F64):
        pytest.skip("Triton's interpreter itself converts float64 to bfloat16 wrongly")
    case = Case(head_dim=8, dtype=dtypes[0], location_dtype=dtypes[1], weight_dtype=dtypes[2])
    check_plain(backend.ms_deform_attn, case, make_inputs(case, backend.device))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=["float16", "bfloat16"])
def test_half_values_keep_float32_coordinates(backend, dtype):
    """At 167 pixels a bfloat16 coordinate would be off by more than a pixel, a float16 one by a tenth."""
    case = Case(shapes=((3, 167),), queries=9, dtype=dtype, location_dtype=F32)
    check_plain(backend.ms_deform_attn, case, make_inputs(case, backend.device))


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_points_that_are_not_finite_add_exactly_nothing(backend, mode):
    case = Case(shapes=((4, 6),), num_points=3, **mode)
    value, locations, weights = make_inputs(case, backend.device)
    nowhere = torch.tensor([torch.nan, torch.inf, -torch.inf], device=backend.device)
    locations = locations.detach()
    locations[..., 0] = nowhere  # x of the three points
    call = lambda *t: backend.ms_deform_attn(t[0], list(case.shapes), None, *t[1:], **case.options)  # noqa: E731
    for result in gradients(call, (value, locations, weights), torch.ones(2, 3, 8, device=backend.device)):
        assert result.eq(0).all()
    locations[..., 0], locations[..., 1] = 0.4, nowhere  # and y
    for result in gradients(call, (value, locations, weights), torch.ones(2, 3, 8, device=backend.device)):
        assert result.eq(0).all()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_points_far_away_and_not_finite_beside_usual_ones(backend, mode):
    case = Case(queries=4, num_points=3, **mode)
    value, locations, weights = make_inputs(case, backend.device)
    with torch.no_grad():
        for query, odd in enumerate((torch.nan, torch.inf, 1e30, -1e30)):
            locations[:, query, :, 0, 1, query % 2] = odd
            locations[0, query, 0, 1, 0] = odd
    check_plain(backend.ms_deform_attn, case, (value, locations, weights))


def test_far_points_add_exactly_nothing_where_padding_is_zero(backend):
    case = Case()
    value, locations, weights = make_inputs(case, backend.device)
    far = torch.full_like(locations, 1e30) * torch.tensor([1.0, -1.0], device=backend.device)
    call = lambda *t: backend.ms_deform_attn(t[0], list(case.shapes), None, *t[1:])  # noqa: E731
    for result in gradients(call, (value, far, weights), torch.ones(2, 3, 8, device=backend.device)):
        assert result.eq(0).all()


def test_not_a_number_in_a_pixel_that_no_sample_reads(backend):
    """Also where the pixel comes next in memory: after a row's end, and after the level's end."""
    case = Case(shapes=((4, 4), (2, 2)), num_points=2)
    value, locations, weights = make_inputs(case, backend.device)
    with torch.no_grad():
        value[:, 4] = torch.nan  # level 0, row 1, column 0
        value[:, 16] = torch.nan  # level 1, row 0, column 0
        locations[:, :, :, 0, 0] = torch.tensor([3.75 / 4, 0.4 / 4])  # beyond the end of row 0
        locations[:, :, :, 0, 1] = torch.tensor([3.75 / 4, 3.9 / 4])  # beyond the level's last pixel
        locations[:, :, :, 1] = torch.tensor([1.75 / 2, 1.8 / 2])
    call = lambda *t: backend.ms_deform_attn(t[0], list(case.shapes), None, *t[1:])  # noqa: E731
    grad_output = torch.randn(2, 3, 8, device=backend.device)
    clean = value.detach().nan_to_num(7.0)
    for found, expected in zip(
        gradients(call, (value, locations, weights), grad_output),
        gradients(call, (clean, locations, weights), grad_output),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def strided(tensor, how):
    """The same numbers in another place or order of memory."""
    if how == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if how == "every-other":
        storage = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), torch.nan)
        storage[..., ::2] = tensor
        return storage[..., ::2]
    storage = tensor.new_full((*tensor.shape[:2], tensor[0, 0].numel() + 3), torch.nan)  # "misaligned"
    storage[..., 1:-2] = tensor.flatten(2)
    return storage[..., 1:-2].unflatten(2, tensor.shape[2:])


@pytest.mark.parametrize("how", ["transposed", "every-other", "misaligned"])
@pytest.mark.parametrize("which", ["value", "locations", "weights", "grad_output", "all"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
def test_strided_inputs(backend, which, how, dtype):
    case = Case(shapes=((4, 6),), head_dim=8, num_points=1, dtype=dtype)
    inputs = [tensor.detach() for tensor in make_inputs(case, backend.device)]
    inputs.append(torch.randn(2, 3, 16, dtype=dtype, device=backend.device))
    names = ("value", "locations", "weights", "grad_output")
    others = [strided(t, how) if which in (name, "all") else t for name, t in zip(names, inputs, strict=True)]

    def results(value, locations, weights, grad_output):
        leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
        output = backend.ms_deform_attn(leaves[0], list(case.shapes), None, *leaves[1:])
        return [output, *torch.autograd.grad(output, leaves, grad_output)]

    for found, expected in zip(results(*others), results(*inputs), strict=True):
        torch.testing.assert_close(found, expected)
        assert not found.isnan().any()


def test_expanded_inputs(backend):
    """A value shared by the images and the gradient of a sum have strides of 0."""
    case = Case()
    value, locations, weights = (tensor.detach() for tensor in make_inputs(case, backend.device))
    shared = value[:1].clone().requires_grad_()
    backend.ms_deform_attn(shared.expand(2, -1, -1, -1), list(case.shapes), None, locations, weights).sum().backward()
    copied = value[:1].repeat(2, 1, 1, 1).requires_grad_()
    backend.ms_deform_attn(copied, list(case.shapes), None, locations, weights).sum().backward()
    torch.testing.assert_close(shared.grad, copied.grad.sum(0, keepdim=True))


@pytest.mark.parametrize("wanted", range(3), ids=["value", "locations", "weights"])
def test_gradient_of_one_input_alone(backend, wanted):
    case = Case()
    inputs = make_inputs(case, backend.device)
    grad_output = torch.randn(2, 3, 8, device=backend.device)
    call = lambda *t: backend.ms_deform_attn(t[0], list(case.shapes), None, *t[1:])  # noqa: E731
    expected = gradients(call, inputs, grad_output)[1 + wanted]
    for index, tensor in enumerate(inputs):
        tensor.requires_grad_(index == wanted)
    call(*inputs).backward(grad_output)
    assert [tensor.grad is not None for tensor in inputs] == [index == wanted for index in range(3)]
    torch.testing.assert_close(inputs[wanted].grad, expected)


def test_an_image_does_not_depend_on_its_neighbours(backend):
    case = Case(batch=3, queries=5)
    inputs = make_inputs(case, backend.device)
    together = backend.ms_deform_attn(inputs[0], list(case.shapes), None, *inputs[1:])
    for image in range(3):
        value, locations, weights = (tensor[image : image + 1] for tensor in inputs)
        alone = backend.ms_deform_attn(value, list(case.shapes), None, locations, weights)
        torch.testing.assert_close(together[image : image + 1], alone)


@pytest.mark.parametrize(
    "form",
    [
        lambda shapes, device: torch.tensor(shapes, device=device),
        lambda shapes, device: torch.tensor(shapes, dtype=torch.int32, device=device),
        lambda shapes, device: torch.tensor(shapes, device=device).t().contiguous().t(),
        lambda shapes, device: tuple(shapes),
        lambda shapes, device: [list(shape) for shape in shapes],
        lambda shapes, device: [torch.Size(shape) for shape in shapes],
    ],
    ids=["int64", "int32", "strided", "tuples", "lists", "sizes"],
)
def test_forms_of_spatial_shapes(backend, form):
    case = Case(shapes=((4, 6), (0, 2), (3, 2)))
    shapes = form(case.shapes, backend.device)
    if backend.name == "interpreter" and isinstance(shapes, torch.Tensor):
        shapes = shapes.contiguous()  # as `resolve_shapes` makes it
    check_plain(backend.ms_deform_attn, case, make_inputs(case, backend.device), spatial_shapes=shapes)


def test_output_is_contiguous_and_of_the_value_s_dtype(device, dtype):
    case = Case(dtype=dtype, location_dtype=torch.promote_types(dtype, F32))
    value, locations, weights = make_inputs(case, device)
    output = vk.ms_deform_attn(value, list(case.shapes), None, locations, weights)
    assert (output.shape, output.dtype, output.device.type) == ((2, 3, 8), dtype, device.type)
    assert output.is_contiguous()


def test_cpu_shapes_for_any_device(device):
    case = Case()
    inputs = make_inputs(case, device)
    check_plain(vk.ms_deform_attn, case, inputs, spatial_shapes=torch.tensor(case.shapes))


@pytest.mark.parametrize(
    "start", [None, [0, 24], (0, 24), torch.tensor([0, 24])], ids=["None", "list", "tuple", "tensor"]
)
@pytest.mark.parametrize("step", [None, 1, 2, 64])
def test_level_start_index_and_im2col_step(device, start, step):
    """Three images are no multiple of two, nor of 64: no batch is refused."""
    case = Case(batch=3)
    value, locations, weights = make_inputs(case, device)
    expected = vk.ms_deform_attn(value, list(case.shapes), None, locations, weights)
    start = start.to(device) if isinstance(start, torch.Tensor) else start
    found = vk.ms_deform_attn(value, torch.tensor(case.shapes, device=device), start, locations, weights, step)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_nearest_has_no_gradient_to_the_locations(backend):
    case = Case(method="nearest")
    inputs = make_inputs(case, backend.device)
    call = lambda *t: backend.ms_deform_attn(t[0], list(case.shapes), None, *t[1:], method="nearest")  # noqa: E731
    _, value, locations, weights = gradients(call, inputs, torch.ones(2, 3, 8, device=backend.device))
    assert locations.eq(0).all()
    assert value.ne(0).any()
    assert weights.ne(0).any()


@st.composite
def calls(draw):
    """Any small call: sizes of 0 and 1, levels without points, both paddings, all methods."""
    levels = draw(st.integers(1, 4))
    nearest = draw(st.booleans())
    return Case(
        shapes=tuple(draw(st.tuples(st.integers(0, 6), st.integers(0, 6))) for _ in range(levels)),
        batch=draw(st.integers(0, 3)),
        queries=draw(st.integers(0, 5)),
        heads=draw(st.integers(1, 3)),
        head_dim=draw(st.integers(1, 9)),
        num_points=draw(st.one_of(st.integers(1, 3), st.tuples(*[st.integers(0, 3)] * levels))),
        padding_mode="zeros" if nearest else draw(st.sampled_from(["zeros", "border"])),
        align_corners=False if nearest else draw(st.booleans()),
        method="nearest" if nearest else "bilinear",
        dtype=draw(st.sampled_from([F64, F32, F16, BF16])),
        location_dtype=draw(st.sampled_from([F32, F64])),
    )


@hypothesis.given(calls())
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
def test_any_small_call(case):
    torch.manual_seed(0)
    check_plain(vk.ms_deform_attn, case, make_inputs(case))
