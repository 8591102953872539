"""Attention inside PyTorch: opcheck, compile, export, autocast."""

import pytest
import torch

from visionkernels.ops.attention import op
from visionkernels.ops.attention.op import attention, packed_attention

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def tables(device, tokens=11, head_dim=16):
    angles = torch.rand(tokens, head_dim, device=device)
    return angles.cos(), angles.sin()


def calls(device):
    """Calls of each form with their packed tensor."""
    rotary = tables(device)
    bias = torch.randn(4, 12, 12, device=device)
    return {
        "plain": lambda qkv: packed_attention(qkv, 4),
        "bias": lambda qkv: packed_attention(qkv, 4, bias=bias, scale=0.3),
        "rotary": lambda qkv: packed_attention(qkv, 4, rotary=rotary, num_prefix_tokens=1),
        "window": lambda qkv: packed_attention(qkv, 4, window=(3, 4, 3, 2)),
    }


FORMS = pytest.mark.parametrize("form", ["plain", "bias", "rotary", "window"])


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck(device, dtype):
    """Schema, fake and AOT dispatch."""
    qkv = torch.randn(2, 12, 3, 4, 16, device=device, dtype=dtype).unbind(2)
    cos, sin = tables(device)
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == BF16 else {}
    for backend in ("auto", "pytorch", *(["triton"] if device.type == "cuda" else [])):
        torch.library.opcheck(op.FORWARD, (*qkv, 0.25, None, None, None, 0, None, backend), **tolerance)
        bias = torch.randn(4, 6, 6, device=device)
        torch.library.opcheck(op.FORWARD, (*qkv, 0.25, bias, None, None, 0, [3, 4, 3, 2], backend), **tolerance)
        torch.library.opcheck(op.FORWARD, (*qkv, 0.25, None, cos, sin, 1, None, backend), **tolerance)


@FORMS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(device, form, dynamic):
    call = calls(device)[form]
    qkv = torch.randn(2, 12, 192, device=device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        torch.testing.assert_close(compiled(qkv), call(qkv))
        torch.testing.assert_close(compiled(qkv[:1]), call(qkv[:1]))


@FORMS
def test_export(device, form):
    """With any batch size; the operator stays in the graph."""
    call = calls(device)[form]

    class Model(torch.nn.Module):
        def forward(self, qkv):
            return call(qkv)

    qkv = torch.randn(3, 12, 192, device=device)
    with torch.no_grad():
        program = torch.export.export(Model(), (qkv,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
        assert any(node.target == op.FORWARD for node in program.graph.nodes)
        other = torch.randn(5, 12, 192, device=device)
        torch.testing.assert_close(program.module()(other), call(other))


def test_autocast(device):
    """Query, key and value follow, of whatever dtype they are; float64 is left alone."""
    qkv = torch.randn(2, 12, 192, device=device)
    query, key, value = qkv.view(2, 12, 3, 4, 16).unbind(2)
    with torch.autocast(device.type, BF16):
        got = attention(query, key.half(), value)
        wide = packed_attention(qkv.double(), 4)
    assert got.dtype == BF16
    assert wide.dtype == torch.float64
    expected = attention(query.bfloat16(), key.half().bfloat16(), value.bfloat16())
    assert torch.equal(got, expected)


def test_meta_tensors():
    query = torch.zeros(2, 5, 4, 16, device="meta", dtype=F16)
    output = attention(query, query, query)
    assert output.shape == query.shape
    assert output.dtype == F16


@pytest.mark.gpu
def test_the_second_gpu():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    qkv = torch.randn(2, 12, 192, device="cuda:1")
    torch.testing.assert_close(packed_attention(qkv, 4, backend="triton").cpu(), packed_attention(qkv.cpu(), 4))
