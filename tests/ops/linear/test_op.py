"""Linear layers against float64, on every device and backend."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from inference_tools import WAYS, poison

from visionkernels.ops.linear import cpu
from visionkernels.ops.linear.op import ACTIVATIONS, gated_linear, linear
from visionkernels.ops.linear.reference import reference_gated_linear, reference_linear

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# Axes before the channels, C, F.
SHAPES = {
    "no axis before": ((), 32, 16),
    "vit": ((2, 5), 48, 96),
    "odd": ((3, 7), 33, 29),
    "long": ((5,), 150, 16),
    "one": ((1,), 1, 1),
    "no rows": ((0, 4), 8, 8),
    "no features": ((3,), 8, 0),
    "no channels": ((3,), 0, 8),
    "several tiles": ((2, 70), 24, 140),
    "four axes": ((2, 1, 3), 16, 24),
}
PARTS = pytest.mark.parametrize("parts", ["", "bias", "residual", "scale", "bias residual", "bias residual scale"])


def inputs(shape, dtype, device, gated=False):
    """Input, weight, bias, residual and scale; the products are of size 1."""
    rows, channels, features = shape
    outputs = features * (2 if gated else 1)
    made = [
        torch.randn(*rows, channels),
        torch.randn(outputs, channels) * max(channels, 1) ** -0.5,
        torch.randn(outputs),
        torch.randn(*rows, features),
        torch.randn(features),
    ]
    return [tensor.to(device, dtype) for tensor in made]


def eager(x, weight, bias=None, activation=None, residual=None, scale=None):
    """What PyTorch's operators give one after another, each rounding its result."""
    y = cpu.activate(F.linear(x, weight, bias), activation)
    y = y if scale is None else y * scale
    return y if residual is None else residual + y


def check(arguments, activation, residual, scale, backend):
    got = linear(*arguments, activation=activation, residual=residual, scale=scale, backend=backend)
    wide = [t if t is None else t.double() for t in (*arguments, residual, scale)]
    truth = reference_linear(*wide[:3], activation, *wide[3:])
    assert got.is_contiguous()
    assert_accurate("output", got, truth, eager(*arguments, activation, residual, scale))
    return got


@WAYS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(device, backend, dtype, shape):
    x, weight, bias, residual, scale = inputs(shape, dtype, device)
    check((x, weight, bias), "gelu", residual, scale, backend)


@WAYS
@pytest.mark.parametrize("mean", [-4, -3, -2, -1, 0, 2])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("half", [F16, BF16], ids=str)
def test_rows_in_the_tail_of_gelu(device, backend, half, activation, mean):
    """By the norm of all results, which are small where the whole row is in the tail, and not by the largest of 4."""
    x, weight = torch.randn(64, 48), torch.randn(64, 48) * 0.3 * 48**-0.5
    x, weight, bias = (tensor.to(device, half) for tensor in (x, weight, torch.full((64,), float(mean))))
    truth = reference_linear(x.double(), weight.double(), bias.double(), activation)

    def error(got):
        return ((got.double() - truth).norm() / truth.norm()).item()

    allowed = 2 * error(eager(x, weight, bias, activation))
    assert error(linear(x, weight, bias, activation=activation, backend=backend)) <= allowed


@WAYS
@PARTS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_epilogues(device, backend, activation, parts):
    for dtype in (F32, F16):
        x, weight, *rest = inputs(((19,), 40, 24), dtype, device)
        bias, residual, scale = (
            tensor if name in parts.split() else None
            for name, tensor in zip(("bias", "residual", "scale"), rest, strict=True)
        )
        check((x, weight, bias), activation, residual, scale, backend)


@WAYS
@pytest.mark.parametrize("shape", [((3,), 0, 8), ((3,), 8, 0), ((0,), 8, 8)], ids=str)
def test_nothing_but_a_residual(device, backend, shape):
    x, weight, _, residual, _ = inputs(shape, F32, device)
    check((x, weight, None), None, residual, None, backend)


@WAYS
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gated_shapes(device, backend, dtype, shape):
    x, weight, bias, _, _ = inputs(shape, dtype, device, gated=True)
    check_gated(x, weight, bias, "silu", backend)


@WAYS
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_gated_activations(device, backend, activation, biased):
    x, weight, bias, _, _ = inputs(((19,), 40, 24), F16, device, gated=True)
    check_gated(x, weight, bias if biased else None, activation, backend)


def check_gated(x, weight, bias, activation, backend):
    got = gated_linear(x, weight, bias, activation=activation, backend=backend)
    truth = reference_gated_linear(x.double(), weight.double(), None if bias is None else bias.double(), activation)
    gate, up = F.linear(x, weight, bias).chunk(2, -1)
    assert got.is_contiguous()
    assert_accurate("output", got, truth, cpu.activate(gate, activation) * up)


@WAYS
@pytest.mark.parametrize("layout", ["transposed", "sliced", "expanded", "rows apart", "channels apart", "unaligned"])
def test_strides(device, backend, layout):
    x, weight, bias, residual, _ = inputs(((6, 4), 48, 48), F16, device)
    view = {
        "transposed": lambda t: t.transpose(0, 1),
        "sliced": lambda t: t[:, 1:3],
        "expanded": lambda t: t[:1, :1].expand(6, 4, 48),
        "rows apart": lambda t: t[..., :40],
        "channels apart": lambda t: t[..., ::2],
        "unaligned": lambda t: t.flatten()[1:49].view(1, 48),
    }[layout]
    x, residual = view(x), view(residual)
    weight, bias = weight[: x.shape[-1], : x.shape[-1]], bias[: x.shape[-1]]
    check((x, weight, bias), "gelu", residual, None, backend)
    check((x, weight.T, bias), None, residual, None, backend)
    check((x, weight, None), None, residual, None, backend)


@WAYS
def test_views_of_a_packed_projection(device, backend):
    """Query, key or value of each token, as rows of another distance."""
    packed, weight, _, residual, _ = inputs(((5,), 96, 32), F16, device)
    _, query, _ = packed.chunk(3, -1)
    check((query, weight[:, :32], None), None, residual, None, backend)


@WAYS
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_numbers_that_are_not_finite(device, backend, activation):
    """NaN and infinities go where PyTorch's own operators send them, and into no other row."""
    x, weight, bias, residual, _ = inputs(((6,), 24, 40), F32, device)
    x[1, 3], x[2, 5], x[3, 7], x[4, :2] = torch.nan, torch.inf, 3e38, torch.tensor([torch.inf, -torch.inf])
    residual[5, 0], residual[5, 1] = torch.inf, torch.nan
    got = linear(x, weight, bias, activation=activation, residual=residual, backend=backend)
    truth = reference_linear(x, weight, bias, activation, residual)
    own = eager(x, weight, bias, activation, residual)
    kinds = [[kind(t) for kind in (torch.isnan, torch.isposinf, torch.isneginf)] for t in (got, truth, own)]
    # PyTorch's gelu of an infinity is NaN on some processors: there nothing is certain.
    certain = torch.stack([a == b for a, b in zip(*kinds[1:], strict=True)]).all(0)
    assert certain.float().mean() > 0.6
    assert all(torch.equal(a & certain, b & certain) for a, b in zip(*kinds[:2], strict=True))
    assert got[0].isfinite().all()


@WAYS
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "quick_gelu", "silu"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])
def test_the_whole_range_of_an_activation(device, backend, activation, dtype):
    """Of an identity's products, whatever a half can hold: -0 where it must be, and no overflow on the way."""
    x = torch.cat([torch.linspace(-12, 12, 300), torch.tensor([-60000.0, -300.0, 300.0, 60000.0])]).to(device, dtype)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    got = linear(x[:, None], one, activation=activation, backend=backend)
    truth = reference_linear(x[:, None].double(), one.double(), activation=activation)
    assert_accurate("small", got[:-4], truth[:-4], cpu.activate(x[:-4, None], activation))
    torch.testing.assert_close(got[-4:], truth[-4:].to(dtype))


@WAYS
def test_every_element_is_written(device, backend, monkeypatch):
    x, weight, bias, _, _ = inputs(((70,), 33, 66), F32, device)
    poison(monkeypatch)
    assert linear(x, weight, bias, backend=backend).isfinite().all()
    assert gated_linear(x, weight, bias, backend=backend).isfinite().all()


@WAYS
def test_tf32(device, backend):
    """Against PyTorch's product of factors that have 10 bits left of their fraction."""
    x, weight, bias, residual, _ = inputs(((50,), 96, 64), F32, device)
    got = linear(x, weight, bias, activation="gelu", residual=residual, precision="tf32", backend=backend)
    short = [(tensor.view(torch.int32) & ~0x1FFF).view(F32) for tensor in (x, weight)]
    truth = reference_linear(x.double(), weight.double(), bias.double(), "gelu", residual.double())
    assert_accurate("output", got, truth, eager(*short, bias, "gelu", residual))
    gated = gated_linear(x, weight, bias, precision="tf32", backend=backend)
    gate, up = F.linear(*short, bias).chunk(2, -1)
    truth = reference_gated_linear(x.double(), weight.double(), bias.double())
    assert_accurate("gated", gated, truth, F.silu(gate) * up)


@pytest.mark.gpu
@pytest.mark.parametrize("allowed", ["highest", "high"])
def test_exact_float32_whatever_the_process_has_set(allowed):
    x, weight, bias, _, _ = inputs(((300,), 512, 256), F32, "cuda")
    truth = reference_linear(x.double(), weight.double(), bias.double())
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        for backend in ("pytorch", "triton"):
            exact = linear(x, weight, bias, backend=backend)
            short = linear(x, weight, bias, backend=backend, precision="tf32")
            assert (exact - truth).abs().max() < 1e-5
            assert 1e-4 < (short - truth).abs().max() < 1e-2
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [197, 1576, 6304])
def test_layers_of_a_vit(rows):
    """Every kernel that the rule picks there, in a graph that is replayed."""
    for dtype in (F16, BF16):
        for channels, features, activation in ((768, 2304, None), (768, 3072, "gelu"), (3072, 768, None)):
            x, weight, bias, residual, scale = inputs(((rows,), channels, features), dtype, "cuda")
            for parts in ((None, None), (residual, None), (residual, scale)):
                check((x, weight, bias), activation, *parts, "triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = linear(x, weight, bias, residual=residual, backend="triton")
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(output, linear(x, weight, bias, residual=residual, backend="triton"))


@pytest.mark.gpu
def test_more_elements_than_32_bits_count():
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB of device memory")
    rows = 2**31 // 1024 + 3
    x = torch.empty(rows, 1024, dtype=F16, device="cuda")
    x[-3:] = torch.randn(3, 1024, device="cuda")
    weight = torch.randn(16, 1024, dtype=F16, device="cuda")
    for weights in (weight, weight.T.contiguous().T):
        got = linear(x, weights, backend="triton")
        torch.testing.assert_close(got[-3:], linear(x[-3:].clone(), weights, backend="pytorch"), rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize(("rows", "features"), [(197, 1536), (197, 2304), (128, 1600), (320, 3072), (321, 1536)])
@pytest.mark.parametrize("axes", [(), (1,)], ids=["matrix", "image"])
def test_wide_layers_of_one_image_on_the_cpu(monkeypatch, axes, rows, features):
    """Their columns come in blocks, of which the last may be narrow."""
    blocks, addmm = [], torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *args, **options: blocks.append(1) or addmm(*args, **options))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, weight, bias, *_ = inputs(((*axes, rows), 40, features), F32, "cpu")
    check((x.transpose(-1, -2).contiguous().transpose(-1, -2), weight, bias), "gelu", None, None, "auto")
    assert len(blocks) == (-(-features // 768) if rows <= 320 else 0)
