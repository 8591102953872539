"""Attention against float64, on every backend, by the tolerance rule of `helpers.py`."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate

from visionkernels.ops.attention import cpu
from visionkernels.ops.attention.op import attention, packed_attention
from visionkernels.ops.attention.reference import join_windows, reference_attention, rotate, split_windows

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
HALVES = pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["float32", "float16", "bfloat16"])


def make(batch, tokens, heads, head_dim, dtype=F32):
    """Query, key and value as views of a packed projection, scores of a few units."""
    packed = torch.randn(batch, tokens, 3 * heads * head_dim, dtype=F64)
    packed.view(batch, tokens, 3, -1)[:, :, 0] *= 2
    return packed.to(dtype).view(batch, tokens, 3, heads, head_dim).unbind(2)


def to(device, options):
    """Options with their tensors on ``device``."""
    move = lambda x: x.to(device) if isinstance(x, torch.Tensor) else x  # noqa: E731
    return {k: tuple(map(move, v)) if k == "rotary" else move(v) for k, v in options.items()}


def wide(options):
    double = lambda x: x.double() if isinstance(x, torch.Tensor) else x  # noqa: E731
    return {k: tuple(map(double, v)) if k == "rotary" else double(v) for k, v in options.items()}


def eager(query, key, value, scale=None, bias=None, rotary=None, num_prefix_tokens=0, window=None):
    """The lines of a model: rotary and windows in PyTorch, scores, softmax and product at the dtype."""
    batch = query.shape[0]
    if rotary is not None:
        query, key = (rotate(x, *rotary, num_prefix_tokens) for x in (query, key))
    if window is not None:
        query, key, value = (split_windows(x, window) for x in (query, key, value))
        if bias is not None and bias.dim() == 4:
            bias = bias.expand(batch, *bias.shape[1:]).repeat_interleave(query.shape[0] // batch, 0)
    scores = query.transpose(1, 2) @ key.permute(0, 2, 3, 1) * (query.shape[3] ** -0.5 if scale is None else scale)
    if bias is not None:
        scores = (scores + bias).to(query.dtype)
    output = (scores.softmax(-1) @ value.transpose(1, 2)).transpose(1, 2)
    return output if window is None else join_windows(output, window)


def check(backend, inputs, **options):
    """The operator is accurate on these inputs."""
    got = attention(*(x.to(backend.device) for x in inputs), **to(backend.device, options), backend=backend.backend)
    assert got.is_contiguous()
    truth = reference_attention(*(x.double() for x in inputs), **wide(options))
    assert_accurate("output", got.cpu(), truth, eager(*inputs, **options))


@pytest.mark.parametrize("tokens", [1, 17, 50, 197, 257])
def test_tokens(backend, tokens):
    check(backend, make(2, tokens, 2, 64))


@pytest.mark.parametrize("head_dim", [16, 24, 32, 64, 72, 80, 128])
@pytest.mark.parametrize("rotary", [False, True], ids=["plain", "rotary"])
def test_head_dims(backend, head_dim, rotary):
    options = {"rotary": tables(46, head_dim), "num_prefix_tokens": 4} if rotary else {}
    check(backend, make(2, 50, 2, head_dim), **options)


@HALVES
@pytest.mark.parametrize("head_dim", [32, 64, 80])
def test_dtypes(backend, dtype, head_dim):
    check(backend, make(2, 50, 3, head_dim, dtype))


def test_float64(backend):
    inputs = make(2, 17, 2, 16, F64)
    if backend.backend == "triton":
        with pytest.raises(TypeError, match=r'query must be float32, .* for backend="triton", got torch.float64'):
            check(backend, inputs)
    else:
        check(backend, inputs, rotary=tables(17, 16, F64))


@pytest.mark.parametrize("head_dim", [8, 20, 136])
def test_a_head_dim_that_the_kernel_does_not_have(backend, head_dim):
    inputs = make(1, 5, 2, head_dim)
    if backend.backend == "triton":
        with pytest.raises(ValueError, match=f"query must have a head_dim that is a multiple of 8.*got {head_dim}"):
            check(backend, inputs)
    else:
        check(backend, inputs)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)], ids=str)
def test_nothing_to_do(backend, shape):
    inputs = torch.zeros(3, *shape, device=backend.device)
    assert attention(*inputs, backend=backend.backend).shape == shape
    window = (1, shape[1], 1, shape[1]) if shape[1] else None
    assert attention(*inputs, window=window, backend=backend.backend).shape == shape


@pytest.mark.parametrize("form", ["heads first", "transposed", "every other", "shifted", "expanded"])
def test_strides(backend, form):
    if form == "heads first":
        inputs = [torch.randn(2, 3, 21, 32).transpose(1, 2) for _ in range(3)]
    elif form == "transposed":
        inputs = [torch.randn(2, 21, 32, 3).transpose(2, 3) for _ in range(3)]
    elif form == "every other":
        inputs = [torch.randn(2, 42, 6, 64)[:, ::2, ::2, ::2] for _ in range(3)]
    elif form == "shifted":  # no row starts at a multiple of 16 bytes
        inputs = [torch.randn(2, 21, 3, 33)[..., 1:] for _ in range(3)]
    else:
        inputs = [torch.randn(1, 21, 1, 32).expand(2, 21, 3, 32) for _ in range(3)]
    check(backend, inputs)


@pytest.mark.parametrize("scale", [0.02, 1, 3.5])
def test_scale(backend, scale):
    check(backend, make(1, 21, 2, 32), scale=scale)


BIASES = {
    "full": (2, 3, 21, 21), "heads": (3, 21, 21), "keys": (21,), "queries": (2, 1, 21, 1), "one": (1,),
    "images": (2, 1, 1, 21),
}  # fmt: skip


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_bias(backend, shape):
    check(backend, make(2, 21, 3, 32), bias=2 * torch.randn(shape))


@HALVES
def test_bias_dtypes(backend, dtype):
    check(backend, make(2, 70, 3, 32, dtype), bias=torch.randn(1, 3, 70, 70).to(dtype))


def test_a_transposed_bias(backend):
    check(backend, make(2, 21, 3, 32), bias=torch.randn(2, 3, 21, 21).transpose(2, 3))


def test_bias_as_a_mask(backend):
    """-inf hides a key; a query that sees none is 0, as in scaled_dot_product_attention on the CPU."""
    query, key, value = make(2, 70, 2, 32)
    bias = torch.zeros(70, 70)
    bias[0], bias[1, :66], bias[2, 1:], bias[3, 32:64] = (-torch.inf,) * 4
    key[:, 69], bias[5:, 69] = 1000, -torch.inf
    inputs = (query, key, value)
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=bias).transpose(1, 2)
    moved = (x.to(backend.device) for x in inputs)
    got = attention(*moved, bias=bias.to(backend.device), backend=backend.backend).cpu()
    assert (got[:, 0] == 0).all()
    truth = reference_attention(*(x.double() for x in inputs), bias=bias.double())
    assert_accurate("output", got, truth, expected)


def tables(tokens, head_dim, dtype=F32):
    """Cosines and sines of angles that differ in every channel, so that no half stands in for the other."""
    angles = torch.rand(tokens, head_dim, dtype=F64) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


@HALVES
@pytest.mark.parametrize("prefix", [0, 1, 5, 40])
def test_rotary(backend, dtype, prefix):
    check(backend, make(2, 40, 2, 32, dtype), rotary=tables(40 - prefix, 32), num_prefix_tokens=prefix)


def test_rotary_tables_in_half_precision(backend):
    check(backend, make(2, 40, 2, 64, F16), rotary=tables(39, 64, F16), num_prefix_tokens=1)


WINDOWS = {
    "one": (4, 6, 4, 6),
    "several": (4, 6, 2, 3),
    "rows": (4, 6, 1, 6),
    "tall": (8, 3, 4, 1),
    "single": (4, 6, 1, 1),
}


@pytest.mark.parametrize("window", WINDOWS.values(), ids=WINDOWS)
def test_windows(backend, window):
    check(backend, make(2, 24, 2, 32), window=window)


def test_large_windows(backend):
    """More tokens than a step has keys."""
    check(backend, make(1, 288, 2, 32), window=(12, 24, 12, 12))


@pytest.mark.parametrize("shape", [(6, 6), (2, 6, 6), (2, 2, 6, 6), (2, 1, 1, 6)], ids=str)
def test_windows_with_bias(backend, shape):
    check(backend, make(2, 24, 2, 32), window=(4, 6, 2, 3), bias=torch.randn(shape))


def test_windows_with_rotary(backend):
    check(backend, make(2, 24, 2, 32), window=(4, 6, 2, 3), rotary=tables(24, 32), bias=torch.randn(2, 6, 6))


@HALVES
def test_huge_scores(backend, dtype):
    """Scores of 1e5: their exponentials overflow, the softmax does not."""
    query, key, value = make(1, 70, 2, 32, dtype)
    got = attention(
        *((x * s).to(backend.device) for x, s in ((query, 300), (key, 300), (value, 1))), backend=backend.backend
    )
    truth = reference_attention((query * 300).double(), (key * 300).double(), value.double())
    assert_accurate("output", got.cpu(), truth, reference_attention(query * 300, key * 300, value))


def test_scores_far_below_zero(backend):
    """No block of keys may take the first peak for 0."""
    if backend.backend == "pytorch" and backend.device == "cuda":
        pytest.skip("PyTorch's kernel loses twice of what its separate operators do")
    query, key, value = make(1, 197, 2, 32)
    query, key = query.abs() * 100, -key.abs() * 100
    check(backend, (query, key, value))


def test_nan_stays_in_its_row(backend):
    query, key, value = (x.clone() for x in make(2, 70, 2, 32))
    query[0, 3, 1, 5] = torch.nan
    value[1, 66, 0, 7] = torch.nan
    got = attention(*(x.to(backend.device) for x in (query, key, value)), backend=backend.backend).isnan().cpu()
    expected = torch.zeros_like(got)
    expected[0, 3, 1] = True
    expected[1, :, 0, 7] = True
    assert torch.equal(got, expected)
    query, key, value = (x.clone() for x in make(1, 70, 2, 32))
    key[0, 69, 1, 0] = torch.nan
    got = attention(*(x.to(backend.device) for x in (query, key, value)), backend=backend.backend).isnan().cpu()
    assert got[:, :, 1].all()
    assert not got[:, :, 0].any()


@pytest.mark.parametrize("options", [{}, {"window": (3, 4, 3, 2)}, {"rotary": True}], ids=["plain", "window", "rotary"])
def test_packed(backend, options):
    if "rotary" in options:
        options = {"rotary": tables(11, 16), "num_prefix_tokens": 1, "bias": torch.randn(4, 1, 12), "scale": 0.3}
    qkv = torch.randn(2, 12, 3 * 4 * 16)
    got = packed_attention(qkv.to(backend.device), 4, **to(backend.device, options), backend=backend.backend)
    inputs = qkv.view(2, 12, 3, 4, 16).unbind(2)
    assert got.shape == (2, 12, 64)
    assert_accurate(
        "output",
        got.cpu().view(2, 12, 4, 16),
        reference_attention(*(x.double() for x in inputs), **wide(options)),
        eager(*inputs, **options),
    )


@pytest.mark.parametrize("tokens", [7, 16, 64, 65, 70, 90])
def test_tiles(backend, tokens):
    """Either way to walk the keys gives the same."""
    if backend.name not in ("triton", "interpreter"):
        pytest.skip("PyTorch's kernels have no tiles")
    from visionkernels.ops.attention import launch

    inputs = [x.to(backend.device) for x in make(1, tokens, 2, 80)]
    tile = launch.Tile(32, 32, 4, 2)
    plain, other = (launch.forward(*inputs, 0.1, tile=t) for t in (tile, tile._replace(peel=True)))
    torch.testing.assert_close(plain, other, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("early", [False, True])
def test_in_a_cuda_graph(early):
    """Replayed on other numbers; with dependent launches a kernel starts while the one before still writes."""
    from visionkernels.ops.attention import launch

    tile = launch.choose_tile(197, 24, 64, 2, False, True)._replace(early=early)
    qkv = torch.randn(2, 197, 3, 12, 64, device="cuda", dtype=F16)

    def chain(x):
        for _ in range(4):
            out = launch.forward(*x.unbind(2), 0.125, tile=tile)
            x = out[:, :, None].expand(-1, -1, 3, -1, -1)
        return out

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        chain(qkv)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            output = chain(qkv)
    torch.cuda.synchronize()
    for _ in range(5):
        qkv.copy_(torch.randn_like(qkv))
        expected = chain(qkv)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output, expected)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    qkv = torch.zeros(2, 200_000, 3, 64, 64, dtype=F16, device="cuda")
    qkv[1, -1, 2] = 1
    window = (400, 500, 1, 4)
    output = attention(*qkv.unbind(2), window=window, backend="triton")
    assert (output[1, -4:] == 0.25).all()
    assert output[1, :-4].abs().max() == 0


def test_float32_is_exact_in_pytorchs_kernels(monkeypatch):
    """On the CPU: the setting of the process is overruled while they run, and only then."""
    asked, inside = [], []
    attend = F.scaled_dot_product_attention

    @contextmanager
    def precision(tensor, name):
        asked.append((tensor.dtype, name))
        yield
        asked.append("out")

    def spy(*args, **options):
        inside.append(len(asked))
        return attend(*args, **options)

    monkeypatch.setattr(cpu, "float32_precision", precision)
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attention(*make(1, 5, 2, 16), backend="pytorch")
    assert asked == [(F32, "ieee"), "out"]
    assert inside == [1]


@pytest.mark.gpu
@pytest.mark.parametrize("allowed", ["highest", "high"])
@pytest.mark.parametrize("head_dim", [12, 64])
def test_exact_float32_whatever_the_process_has_set(allowed, head_dim):
    inputs = [x.cuda() for x in make(2, 197, 3, head_dim)]
    truth = reference_attention(*(x.double() for x in inputs))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        for backend in ("pytorch", "auto"):
            assert (attention(*inputs, backend=backend) - truth).abs().max() < 1e-5
        assert torch.get_float32_matmul_precision() == allowed
    finally:
        torch.set_float32_matmul_precision(before)
