"""What the tests of other implementations state, as facts about this one.

Deformable-DETR's `models/ops/test.py` and mmcv's `test_ms_deformable_attn.py`: small inputs, head dims that are no
powers of two, and very large ones. The Hugging Face kernel's tests: points a tenth of a pixel beside the lines where
the derivative jumps, points outside, and levels that are not square. msda-triton: heads apart in the output.
"""

import pytest
import torch
from helpers import Case, check_plain, eager_ms_deform_attn, gradients, level_sizes, make_inputs

import visionkernels as vk

F64, F32, F16 = torch.float64, torch.float32, torch.float16

DEFORMABLE_DETR = ((6, 4), (3, 2))
MMCV = ((3, 2), (2, 1))
HEAD_DIMS = [(DEFORMABLE_DETR, d) for d in (2, 30, 32, 64, 71, 1025, 2048, 3096)]
HEAD_DIMS += [(MMCV, d) for d in (4, 30, 32, 64, 71, 1025)]
SMALL = [one for one in HEAD_DIMS if one[1] <= 71]  # for which `gradcheck` can go through every element
LARGE = [one for one in HEAD_DIMS if one[1] > 71]


def name_of(shapes, head_dim):
    return f"{'mmcv' if shapes is MMCV else 'deformable-detr'}-{head_dim}"


def peer_case(shapes, head_dim, dtype=F64, **more):
    """N, M = 1, 2 and Lq, L, P = 2, 2, 2 in both files."""
    return Case(shapes=shapes, batch=1, queries=2, heads=2, head_dim=head_dim, num_points=2, dtype=dtype, **more)


def draw(case, device):
    """Both files' inputs: values up to 0.01, locations inside, weights that add up to 1 for a head."""
    value = torch.rand(1, case.pixels, 2, case.head_dim, dtype=F64) * 0.01
    locations, weights = torch.rand(1, 2, 2, 2, 2, 2, dtype=F64), torch.rand(1, 2, 2, 2, 2, dtype=F64) + 1e-5
    weights = weights / weights.sum((-1, -2), keepdim=True)
    dtypes = (case.dtype, case.location_dtype or case.dtype, case.location_dtype or case.dtype)
    tensors = zip((value, locations, weights), dtypes, strict=True)
    return [t.to(device, dtype).requires_grad_() for t, dtype in tensors]


def arguments(case, device):
    """The shapes and the start as both files pass them: tensors on the device."""
    shapes = torch.tensor(case.shapes, device=device)
    return shapes, torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("shapes", "head_dim"), HEAD_DIMS, ids=[name_of(*one) for one in HEAD_DIMS])
def test_every_head_dim_gives_what_pytorch_gives(device, shapes, head_dim, dtype):
    case = peer_case(shapes, head_dim, dtype)
    check_plain(vk.ms_deform_attn, case, draw(case, device), spatial_shapes=torch.tensor(shapes, device=device))


def peer_call(case, device):
    return lambda v, p, w: vk.ms_deform_attn(v, *arguments(case, device), p, w, 2)


# Between two lines the output is bilinear, so central differences are exact, and the limits can be tight.


@pytest.mark.parametrize(("shapes", "head_dim"), SMALL, ids=[name_of(*one) for one in SMALL])
def test_head_dims_pass_gradcheck(device, shapes, head_dim):
    case = peer_case(shapes, head_dim)
    nondeterministic = 1e-10 if device.type == "cuda" else 0.0
    assert torch.autograd.gradcheck(
        peer_call(case, device), draw(case, device), atol=1e-8, rtol=1e-6, nondet_tol=nondeterministic
    )


@pytest.mark.parametrize(("shapes", "head_dim"), LARGE, ids=[name_of(*one) for one in LARGE])
@pytest.mark.parametrize("which", [0, 1, 2], ids=["value", "locations", "weights"])
def test_large_head_dims_have_the_gradient_of_central_differences(device, shapes, head_dim, which):
    """Along random directions: every element would take minutes, and so would a failure of gradcheck's fast mode."""
    case, eps = peer_case(shapes, head_dim), 1e-6
    call, inputs = peer_call(case, device), draw(case, device)
    grad_output = torch.randn(1, 2, 2 * head_dim, dtype=F64, device=device)
    gradient = torch.autograd.grad(call(*inputs), inputs[which], grad_output)[0]
    with torch.no_grad():
        for _ in range(4):
            direction = torch.randn_like(inputs[which])
            ends = ([t + sign * direction if i == which else t for i, t in enumerate(inputs)] for sign in (eps, -eps))
            high, low = (call(*end) for end in ends)
            slope = ((high - low) * grad_output).sum() / (2 * eps)
            torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("dtype", "absolute", "relative"), [(F32, 1e-9, 1e-6), (F16, 1e-5, 1e-2)], ids=["float32", "float16"]
)
def test_forward_within_mmcv_s_limits(device, dtype, absolute, relative):
    case = peer_case(DEFORMABLE_DETR, 2, dtype, location_dtype=F32)
    inputs = [t.detach() for t in draw(case, device)]
    truth = eager_ms_deform_attn(*(t.double() for t in inputs), case)
    found = vk.ms_deform_attn(inputs[0], *arguments(case, device), *inputs[1:], 2)
    error = (found.double() - truth).abs()
    assert error.max() < absolute
    assert (error / truth.abs()).max() < relative


# What follows are the Hugging Face kernel's cases. A pixel coordinate of k is the centre of column k.

NON_SQUARE = [(5, 9), (7, 3), (1, 6), (4, 1)]


def located(x, y, h, w, device, dtype):
    """Locations `[1, Lq, 1, 1, 1, 2]` of pixel coordinates."""
    points = torch.stack([(x + 0.5) / w, (y + 0.5) / h], -1)
    return points.view(1, -1, 1, 1, 1, 2).to(device, dtype)


def beside_the_lines(size, inside):
    """Coordinates a tenth of a pixel before and behind every line; `inside`: between the first and the last one."""
    lines = torch.arange(size if inside else size + 2, dtype=F64) - (0 if inside else 1)
    beside = torch.cat([lines - 0.1, lines + 0.1])
    return beside[(beside > 0) & (beside < size - 1)] if inside else beside


@pytest.mark.parametrize("dtype", [F64, F32, F16], ids=["float64", "float32", "float16"])
@pytest.mark.parametrize("shapes", [((5, 9), (7, 3)), ((1, 6), (4, 1))], ids=["usual", "thin"])
def test_beside_the_lines_everything_is_what_pytorch_gives(device, shapes, dtype):
    case = Case(shapes=shapes, queries=40, heads=2, head_dim=8, num_points=3, dtype=dtype, location_dtype=F32)
    sizes = level_sizes(case)  # (w, h)
    shape = (case.batch, case.queries, case.heads, 6, 2)
    line = (torch.rand(shape, dtype=F64) * (sizes + 2)).floor() - 1  # -1 and w are outside
    pixel = line + torch.where(torch.rand(shape) < 0.5, -0.1, 0.1)
    locations = case.split((pixel + 0.5) / sizes)
    value = torch.randn(case.batch, case.pixels, 2, 8)
    weights = torch.rand(locations.shape[:-1])
    wide = F64 if dtype == F64 else F32
    inputs = [value.to(device, dtype), locations.to(device, wide), weights.to(device, wide)]
    check_plain(vk.ms_deform_attn, case, inputs)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("h", "w"), [(5, 9), (7, 3)], ids=str)
def test_a_ramp_is_read_exactly_and_its_slope_is_the_gradient(device, h, w, dtype):
    """2 a column and -3 a row: the gradient of x is 2 w and that of y -3 h, on both sides of a line."""
    column, row = torch.arange(w, dtype=F64), torch.arange(h, dtype=F64)
    ramp = (2 * column - 3 * row[:, None] + 5).view(1, h * w, 1, 1).to(device, dtype)
    y, x = torch.meshgrid(beside_the_lines(h, True), beside_the_lines(w, True), indexing="ij")
    locations = located(x.flatten(), y.flatten(), h, w, device, dtype)
    weights = torch.ones(locations.shape[:-1]).to(locations)
    found, _, slope, read = gradients(
        lambda v, p, a: vk.ms_deform_attn(v, [(h, w)], None, p, a), (ramp, locations, weights),
        torch.ones(1, x.numel(), 1).to(locations),
    )  # fmt: skip
    expected = (2 * x - 3 * y + 5).to(found).view(1, -1, 1)
    tolerance = {"rtol": 0, "atol": 100 * torch.finfo(dtype).eps}
    torch.testing.assert_close(found, expected, **tolerance)
    torch.testing.assert_close(read.view(1, -1, 1), expected, **tolerance)
    slopes = torch.tensor([2.0 * w, -3.0 * h]).to(slope).expand_as(slope)
    torch.testing.assert_close(slope, slopes, rtol=0, atol=100 * slopes.abs().max().item() * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize("vertical", [False, True], ids=["x", "y"])
def test_the_gradient_jumps_at_a_line(device, vertical, dtype):
    """Before column k it is v[k] - v[k - 1], behind it v[k + 1] - v[k]; outside v is 0."""
    size = 7
    h, w = (size, 1) if vertical else (1, size)
    values = torch.randn(size, dtype=F64)
    padded = torch.nn.functional.pad(values, (1, 1))
    steps = padded.diff() * size  # left of column 0, ..., right of the last one
    expected = torch.cat([steps[:-1], steps[1:]])
    line = torch.arange(size, dtype=F64)
    along, across = torch.cat([line - 0.1, line + 0.1]), torch.zeros(2 * size, dtype=F64)
    locations = located(*((across, along) if vertical else (along, across)), h, w, device, dtype)
    weights = torch.ones(locations.shape[:-1]).to(locations)
    _, _, slope, _ = gradients(
        lambda v, p, a: vk.ms_deform_attn(v, [(h, w)], None, p, a),
        (values.view(1, size, 1, 1).to(device, dtype), locations, weights),
        torch.ones(1, 2 * size, 1).to(locations),
    )
    found = slope[..., 1 if vertical else 0].flatten().cpu().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
@pytest.mark.parametrize(("h", "w"), NON_SQUARE, ids=str)
def test_a_point_a_tenth_of_a_pixel_inside_the_border_sees_a_tenth(device, h, w, dtype):
    """At -0.9 and w - 0.1 only the outermost column is near; at -1.1 and w + 0.1 nothing is, exactly."""
    x = torch.tensor([-1.1, -0.9, w - 0.1, w + 0.1], dtype=F64)
    y = torch.tensor([-1.1, -0.9, h - 0.1, h + 0.1], dtype=F64)
    seen_x, seen_y = torch.tensor([0, 0.1, 0.1, 0], dtype=F64), torch.tensor([0, 0.1, 0.1, 0], dtype=F64)
    corner = torch.tensor([0, 0, 1, 1])  # which end of the level
    values = torch.rand(h, w, dtype=F64) + 1
    ends = values[corner * (h - 1)][:, corner * (w - 1)]  # [y, x]
    expected = (seen_y[:, None] * seen_x * ends).flatten()
    points = torch.meshgrid(y, x, indexing="ij")
    locations = located(points[1].flatten(), points[0].flatten(), h, w, device, dtype)
    weights = torch.ones(locations.shape[:-1]).to(locations)
    found, *grads = gradients(
        lambda v, p, a: vk.ms_deform_attn(v, [(h, w)], None, p, a),
        (values.view(1, h * w, 1, 1).to(device, dtype), locations, weights),
        torch.ones(1, 16, 1).to(locations),
    )
    found = found.flatten().cpu().double()
    torch.testing.assert_close(found, expected, rtol=0, atol=100 * torch.finfo(dtype).eps)
    outside = expected == 0
    assert outside.sum() == 12
    assert found[outside].eq(0).all()
    for gradient in grads[1:]:
        assert gradient.flatten(0, 4)[outside].eq(0).all()
        assert gradient.flatten(0, 4)[~outside].ne(0).all()
    torch.testing.assert_close(grads[0].sum().item(), 4 * 0.01, rtol=0, atol=1e3 * torch.finfo(dtype).eps)


def test_four_axes_as_msda_triton(device):
    case = Case(padding_mode="border", align_corners=True)
    img, points, weights = make_inputs(case, device)
    found = vk.multiscale_deformable_attention(
        img, torch.tensor(case.shapes, device=device), points, weights, "border", True
    )
    expected = vk.ms_deform_attn(
        img, list(case.shapes), None, points, weights, padding_mode="border", align_corners=True
    )
    assert found.shape == (2, 3, 2, 4)
    torch.testing.assert_close(found.flatten(2), expected, rtol=0, atol=1e-6)
