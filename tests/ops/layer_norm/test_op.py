"""Layer normalisation against float64, on every device and backend."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from inference_tools import WAYS, poison

from visionkernels.ops.layer_norm.op import add_layer_norm, layer_norm
from visionkernels.ops.layer_norm.reference import reference_add_layer_norm, reference_layer_norm

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = {
    "no axis before": (48,), "vit": (2, 5, 192), "even": (3, 64), "odd": (7, 33), "one channel": (4, 1),
    "one": (1, 1), "no rows": (0, 16), "no channels": (3, 0), "four axes": (2, 1, 3, 100), "several rows": (65, 20),
    "wide": (3, 1280), "wider": (2, 5000),
}  # fmt: skip


def inputs(shape, dtype, device, count=2):
    """`count` tensors of the shape, then weight, bias and scale; nothing of zero mean."""
    made = [torch.randn(shape, device=device, dtype=F64) + 1 for _ in range(count)]
    made += [torch.randn(shape[-1:], device=device, dtype=F64) for _ in range(3)]
    return [tensor.to(dtype) for tensor in made]


def check(x, weight, bias, eps, backend):
    got = layer_norm(x, weight, bias, eps, backend=backend)
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    eager = F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    assert got.is_contiguous()
    assert_accurate("output", got, reference_layer_norm(*wide, eps), eager)
    return got


@WAYS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(device, backend, dtype, shape):
    x, _, weight, bias, _ = inputs(shape, dtype, device)
    check(x, weight, bias, 1e-5, backend)


@WAYS
@pytest.mark.parametrize("given", ["neither", "weight", "bias"])
def test_without_weight_or_bias(device, backend, dtype, given):
    x, _, weight, bias, _ = inputs((5, 40), dtype, device)
    check(x, weight if given == "weight" else None, bias if given == "bias" else None, 1e-12, backend)


@WAYS
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("shape", [(2, 5, 96), (7, 33), (65, 20), (0, 8)], ids=str)
def test_add(device, backend, dtype, shape, scaled):
    x, residual, weight, bias, scale = inputs(shape, dtype, device)
    scale = scale if scaled else None
    total, output = add_layer_norm(x, residual, weight, bias, 1e-6, scale=scale, backend=backend)
    wide = [t if t is None else t.double() for t in (x, residual, weight, bias, scale)]
    exact, _ = reference_add_layer_norm(*wide[:4], 1e-6, wide[4])
    assert_accurate("sum", total, exact, residual + (x if scale is None else x * scale))
    # What is normalised is the sum as it is stored: so the pair is that of the two steps.
    truth = reference_layer_norm(total.double(), weight.double(), bias.double(), 1e-6)
    assert_accurate("output", output, truth, F.layer_norm(total, shape[-1:], weight, bias, 1e-6))
    assert torch.equal(output, layer_norm(total, weight, bias, 1e-6, backend=backend))
    assert total.is_contiguous()
    assert output.is_contiguous()


@WAYS
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "rows apart", "channels apart", "unaligned"])
def test_strides(device, backend, layout):
    x, residual, weight, bias, _ = inputs((6, 4, 48), F16, device)
    view = {
        "transposed": lambda t: t.transpose(0, 1),
        "sliced": lambda t: t[:, 1:3],
        "expanded": lambda t: t[:1].expand(6, 4, 48),
        "rows apart": lambda t: t[..., :40],
        "channels apart": lambda t: t[..., ::2],
        "unaligned": lambda t: t.flatten()[1:49].view(1, 48),
    }[layout]
    x, residual = view(x), view(residual)
    weight, bias = weight[: x.shape[-1]], bias[: x.shape[-1]]
    check(x, weight, bias, 1e-5, backend)
    total, output = add_layer_norm(x, residual, weight, bias, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(output, layer_norm(total, weight, bias, backend=backend))


@WAYS
def test_weights_anywhere(device, backend):
    x, _, weight, bias, _ = inputs((5, 24), F32, device)
    spread = torch.stack([weight, bias], 1)
    check(x, spread[:, 0], spread[:, 1], 1e-5, backend)


@WAYS
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_a_mean_far_larger_than_the_deviation(device, backend, dtype):
    """The mean of the squares less the square of the mean would have no digit left."""
    x = 1000 + torch.randn(5, 96, dtype=F64, device=device).mul_(4)
    check(x.to(dtype), None, None, 1e-5, backend)


@WAYS
def test_values_near_the_largest_half(device, backend):
    """Their squares and sums are no halves."""
    x = (
        torch.rand(4, 200, dtype=F64, device=device)
        .add_(0.5)
        .mul_(43000)
        .mul_(torch.randn(4, 200, device=device).sign())
    )
    check(x.to(F16), None, None, 1e-5, backend)
    half = x.div(2).to(F16)
    total, output = add_layer_norm(half, half.roll(1, 1), None, None, backend=backend)
    assert output.isfinite().all()
    assert torch.equal(total, half + half.roll(1, 1))


@WAYS
def test_equal_values_are_zero(device, backend, dtype):
    x = torch.full((3, 50), 7.0, dtype=dtype, device=device)
    assert torch.equal(layer_norm(x, None, None, backend=backend), torch.zeros_like(x))


@WAYS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_a_row_that_is_not_finite_is_nan_and_no_other(device, backend, bad):
    x, _, weight, bias, _ = inputs((5, 40), F32, device)
    x[2, 7] = bad
    got = layer_norm(x, weight, bias, backend=backend)
    assert got[2].isnan().all()
    assert got[[0, 1, 3, 4]].isfinite().all()


@WAYS
def test_every_element_is_written(device, backend, monkeypatch):
    x, residual, weight, bias, _ = inputs((9, 33), F32, device)
    poison(monkeypatch)
    total, output = add_layer_norm(x, residual, weight, bias, backend=backend)
    for written in (layer_norm(x, weight, bias, backend=backend), total, output):
        assert written.isfinite().all()


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB of device memory")
    rows = 2**31 // 1024 + 3
    x = torch.empty(rows, 1024, dtype=F16, device="cuda")
    x[-3:] = torch.randn(3, 1024, device="cuda")
    got = layer_norm(x, None, None, backend="triton")
    torch.testing.assert_close(got[-3:], layer_norm(x[-3:].clone(), None, None, backend="triton"))
