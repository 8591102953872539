"""Layer normalisation inside PyTorch, and what a wrong call says."""

import re

import pytest
import torch
from inference_tools import WAYS

from visionkernels.ops import _inference
from visionkernels.ops.layer_norm import op
from visionkernels.ops.layer_norm.op import add_layer_norm, layer_norm

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
X, W = torch.ones(2, 3, 8), torch.ones(8)


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.bias = torch.nn.Parameter(torch.randn(8)), torch.nn.Parameter(torch.randn(8))

    def forward(self, x, y):
        total, output = add_layer_norm(x, y, self.weight, self.bias, scale=self.bias)
        return total, layer_norm(output, self.weight, None, 1e-6)


@WAYS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck(device, backend, dtype):
    x, y = (torch.randn(2, 5, 8, device=device, dtype=dtype) for _ in range(2))
    w = torch.randn(8, device=device, dtype=dtype)
    for view in (x, x.transpose(0, 1), x[:, :0]):
        torch.library.opcheck(op.LAYER_NORM, (view, w, None, 1e-5, backend))
    torch.library.opcheck(op.ADD_LAYER_NORM, (x, y, w, w, 1e-5, w, backend))
    torch.library.opcheck(op.ADD_LAYER_NORM, (x.transpose(0, 1), y.transpose(0, 1), None, None, 1e-5, None, backend))


def test_compile_and_export(device):
    block = Block().to(device)
    x, y = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 8, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        truth = block(x, y)
        for backend in ("aot_eager", "inductor"):
            torch.testing.assert_close(torch.compile(block, fullgraph=True, backend=backend)(x, y), truth)
        rows = torch.export.Dim("rows", min=2, max=1000)
        exported = torch.export.export(block, (x, y), dynamic_shapes=({1: rows}, {1: rows}), strict=False)
        assert sum("layer_norm" in str(node.target) for node in exported.graph.nodes) == 2
        x, y = torch.randn(2, 7, 8, device=device), torch.randn(2, 7, 8, device=device)
        torch.testing.assert_close(exported.module()(x, y), block(x, y))


def test_autocast_keeps_the_dtype_of_the_input(device):
    x, w = torch.randn(4, 8, device=device, dtype=BF16), torch.randn(8, device=device)
    with torch.autocast(device.type, BF16):
        assert layer_norm(x, w, w).dtype == BF16
        assert layer_norm(x.float(), w, w).dtype == F32
        total, _ = add_layer_norm(x, x.float(), w, w, scale=w)
    assert total.dtype == BF16


@pytest.mark.parametrize("position", range(5))
def test_gradients_are_refused(position):
    tensors = [X, X, W, W, W]
    tensors[position] = tensors[position].clone().requires_grad_()
    x, y, w, b, s = tensors
    with pytest.raises(RuntimeError, match=r"^add_layer_norm computes no gradients: call it under torch.no_grad\(\)"):
        add_layer_norm(x, y, w, b, scale=s)
    if position in (0, 2, 3):
        with pytest.raises(RuntimeError, match=r"^layer_norm computes no gradients: call it under torch.no_grad\(\)"):
            layer_norm(x, w, b)
    with torch.no_grad():
        add_layer_norm(x, y, w, b, scale=s)
    with torch.inference_mode():
        layer_norm(x, w, b)


def test_the_operator_itself_computes_no_gradients():
    output = op.LAYER_NORM(X.clone().requires_grad_(), None, None, 1e-5, "auto")
    with pytest.raises(RuntimeError, match="visionkernels::layer_norm computes no gradients"):
        output.sum().backward()


def test_forward_mode_is_refused():
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X)
        with pytest.raises(RuntimeError, match="layer_norm computes no forward-mode derivatives"), torch.no_grad():
            layer_norm(dual, None, None)


WRONG = [
    ("input", TypeError, [1.0], "input must be a tensor [..., C], got list"),
    ("input", TypeError, X.int(), "input must be float64, float32, float16 or bfloat16, got torch.int32"),
    ("input", ValueError, torch.tensor(1.0), "input must be [..., C], got []"),
    ("input", TypeError, X[0].to_sparse(), "input must be a dense tensor, got the layout torch.sparse_coo"),
    ("residual", TypeError, None, "residual must be a tensor [..., C], got NoneType"),
    ("residual", ValueError, X[:1], "residual must be [..., C] = [2, 3, 8], got [1, 3, 8]"),
    ("residual", TypeError, X.half(), "residual must be torch.float32 like input, got torch.float16; convert it"),
    ("weight", ValueError, W[:7], "weight must be [C] = [8], got [7]"),
    ("weight", TypeError, 1.0, "weight must be a tensor [C], got float"),
    ("weight", TypeError, W.double(), "weight must be torch.float32 like input, got torch.float64"),
    ("weight", ValueError, W.to("meta"), "weight must be on cpu like input, got meta"),
    ("bias", ValueError, W[None], "bias must be [C], got [1, 8]"),
    ("scale", ValueError, W[:1], "scale must be [C] = [8], got [1]"),
    ("eps", TypeError, "1e-5", "eps must be a number, got '1e-5'"),
    ("eps", ValueError, -1e-5, "eps must be a finite number of at least 0, got -1e-05"),
    ("eps", ValueError, float("nan"), "eps must be a finite number of at least 0, got nan"),
    ("backend", ValueError, "cuda", "backend must be one of 'auto', 'triton', 'pytorch', got 'cuda'"),
]


@pytest.mark.parametrize(("name", "error", "wrong", "message"), WRONG, ids=lambda value: None)
def test_a_wrong_argument_is_named(name, error, wrong, message):
    arguments = {"input": X, "residual": X, "weight": W, "bias": W, "eps": 1e-5, "scale": W, name: wrong}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        add_layer_norm(**arguments)
    if name not in ("residual", "scale"):
        del arguments["residual"], arguments["scale"]
        with pytest.raises(error, match=f"^{re.escape(message)}"):
            layer_norm(**arguments)


@pytest.mark.skipif(_inference.INTERPRET, reason="the interpreter runs on the CPU")
def test_triton_on_the_cpu_is_refused():
    with pytest.raises(ValueError, match='backend must be "auto" or "pytorch" for tensors on the CPU, got "triton"'):
        layer_norm(X, W, W, backend="triton")


def test_no_triton_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    _inference.launch_of.cache_clear()
    with pytest.raises(RuntimeError, match="layer_norm on CUDA tensors needs Triton, which is not installed; install"):
        _inference.launch_of("layer_norm")
