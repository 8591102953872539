"""A linear layer, residual add and layer norm in one: against float64, on every device and backend."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from inference_tools import INTERPRET, WAYS, poison

from visionkernels.ops.linear_add_layer_norm.op import linear_add_layer_norm
from visionkernels.ops.linear_add_layer_norm.reference import reference_linear_add_layer_norm

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SHAPES = {
    "vit": ((2, 5), 96, 48),
    "odd": ((3, 7), 33, 29),
    "no axis before": ((), 32, 16),
    "one": ((1,), 1, 1),
    "no rows": ((0, 4), 8, 8),
    "no channels": ((3,), 0, 8),
    "several parts": ((70,), 768, 136),
}


def inputs(shape, dtype, device):
    """Input, weight, bias, residual, the norm's weight and bias, and scale."""
    rows, inner, channels = shape
    made = [torch.randn(*rows, inner), torch.randn(channels, inner) * max(inner, 1) ** -0.5, torch.randn(channels)]
    made += [torch.randn(*rows, channels), *(torch.randn(channels) for _ in range(3))]
    return [tensor.to(device, dtype) for tensor in made]


def check(arguments, scale, backend, **options):
    got = linear_add_layer_norm(*arguments, scale=scale, backend=backend, **options)
    check_results(got, arguments, scale)


def check_results(got, arguments, scale, eps=1e-5):
    x, weight, bias, residual, *norm = arguments
    branch = F.linear(x, weight, bias)
    total = residual + (branch if scale is None else branch * scale)
    eager = (total, F.layer_norm(total, total.shape[-1:], *norm, eps))
    wide = [t if t is None else t.double() for t in (*arguments, scale)]
    truth = reference_linear_add_layer_norm(*wide[:6], eps, wide[6])
    for name, mine, right, own in zip(("sum", "output"), got, truth, eager, strict=True):
        assert mine.is_contiguous()
        assert_accurate(name, mine, right, own)


@WAYS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(device, backend, dtype, shape):
    *arguments, scale = inputs(shape, dtype, device)
    check(arguments, scale, backend)


@WAYS
@pytest.mark.parametrize("parts", ["", "bias", "norm", "scale", "bias norm scale"])
def test_what_may_be_left_out(device, backend, parts):
    x, weight, bias, residual, norm_weight, norm_bias, scale = inputs(((2, 9), 384, 64), F16, device)
    norm = (norm_weight, norm_bias) if "norm" in parts else (None, None)
    check((x, weight, bias if "bias" in parts else None, residual, *norm), scale if "scale" in parts else None, backend)


@WAYS
@pytest.mark.parametrize("layout", ["transposed", "sliced", "rows apart", "unaligned"])
def test_strides(device, backend, layout):
    x, weight, *rest = inputs(((6, 4), 48, 48), F16, device)
    view = {
        "transposed": lambda t: t.transpose(0, 1),
        "sliced": lambda t: t[:, 1:3],
        "rows apart": lambda t: t[..., :40],
        "unaligned": lambda t: t.flatten()[1:49].view(1, 48),
    }[layout]
    x, residual = view(x), view(rest[1])
    size = x.shape[-1]
    bias, _, norm_weight, norm_bias, scale = (t[..., :size] for t in rest)
    check((x, weight[:size, :size], bias, residual, norm_weight, norm_bias), scale, backend)
    check((x, weight[:size, :size].T, bias, residual, norm_weight, norm_bias), None, backend)


@WAYS
def test_numbers_that_are_not_finite_stay_in_their_row(device, backend):
    *arguments, scale = inputs(((5,), 256, 64), F32, device)
    arguments[0][1, 3], arguments[3][3, 0] = torch.nan, torch.inf
    total, output = linear_add_layer_norm(*arguments, scale=scale, backend=backend)
    for row in range(5):
        assert bool(output[row].isnan().all()) == (row in (1, 3))
        assert bool(output[row].isfinite().all()) == (row not in (1, 3))
    assert total[1].isnan().all()
    assert total[3, 0] == torch.inf


@WAYS
def test_every_element_is_written(device, backend, monkeypatch):
    *arguments, scale = inputs(((70,), 256, 72), F16, device)
    poison(monkeypatch)
    for result in linear_add_layer_norm(*arguments, scale=scale, backend=backend):
        assert result.isfinite().all()


@WAYS
@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
def test_parts(device, backend, dtype, parts):
    """Neither rows nor columns a multiple of the tile."""
    if backend != "triton":
        pytest.skip("a kernel of its own")
    pytest.importorskip("triton", reason="Triton is not installed")
    from visionkernels.ops.linear_add_layer_norm import launch

    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no TMA")
    if INTERPRET and dtype == BF16:
        pytest.skip("the interpreter multiplies no bfloat16")
    split = launch.Split(parts, 16, 32, 32, 4, 2, early=False) if device == "cpu" else launch.Split(parts)
    *arguments, scale = inputs(((100,), 6 * split.block_k, 72), dtype, device)
    got = launch.linear_add_layer_norm(*arguments, 1e-5, scale, "ieee", "triton", split)
    check_results(got, arguments, scale)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [((197,), 3072, 768), ((197,), 768, 768), ((2, 50), 1000, 776), ((4, 197), 768, 768)])
@pytest.mark.parametrize("backend", ["auto", "triton", "pytorch"])
def test_sizes_of_models(shape, backend):
    for dtype in (F16, BF16, F32):
        *arguments, scale = inputs(shape, dtype, "cuda")
        check(arguments, scale, backend, eps=1e-5)
        check(arguments, None, backend)
