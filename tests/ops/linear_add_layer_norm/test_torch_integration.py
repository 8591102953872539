"""The operator inside PyTorch, and what a wrong call says."""

import re

import pytest
import torch
from inference_tools import WAYS

from visionkernels.ops.linear_add_layer_norm import op
from visionkernels.ops.linear_add_layer_norm.op import linear_add_layer_norm

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
X, W, B, R = torch.ones(2, 3, 8), torch.ones(6, 8), torch.ones(6), torch.ones(2, 3, 6)
RIGHT = {
    "input": X, "weight": W, "bias": B, "residual": R, "norm_weight": B, "norm_bias": B, "eps": 1e-5, "scale": B,
    "precision": "ieee", "backend": "auto",
}  # fmt: skip


class End(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = torch.nn.Linear(8, 6), torch.nn.LayerNorm(6)

    def forward(self, x, residual):
        linear, norm = self.linear, self.norm
        return linear_add_layer_norm(x, linear.weight, linear.bias, residual, norm.weight, norm.bias, norm.eps)


@WAYS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck(device, backend, dtype):
    x, w, b, r = (torch.randn_like(t).to(device, dtype) for t in (X, W, B, R))
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == BF16 else {}
    for arguments in ((b, b, b), (None, None, None)):
        bias, norm_weight, scale = arguments
        call = (x, w, bias, r, norm_weight, norm_weight, 1e-5, scale, "ieee", backend)
        torch.library.opcheck(op.LINEAR_ADD_LAYER_NORM, call, **tolerance)


def test_compile_and_export(device):
    end = End().to(device)
    x, residual = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 6, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        truth = end(x, residual)
        torch.testing.assert_close(torch.compile(end, fullgraph=True, backend="aot_eager")(x, residual), truth)
        rows = torch.export.Dim("rows", min=2, max=1000)
        exported = torch.export.export(end, (x, residual), dynamic_shapes=({1: rows}, {1: rows}), strict=False)
        assert sum("visionkernels" in str(node.target) for node in exported.graph.nodes) == 1
        x, residual = torch.randn(2, 7, 8, device=device), torch.randn(2, 7, 6, device=device)
        torch.testing.assert_close(exported.module()(x, residual), end(x, residual))


def test_autocast_gives_its_dtype(device):
    end = End().to(device)
    x, residual = torch.randn(2, 3, 8, device=device), torch.randn(2, 3, 6, device=device)
    with torch.no_grad(), torch.autocast(device.type, BF16):
        total, output = end(x, residual)
    assert total.dtype == output.dtype == BF16


def test_gradients_are_refused():
    with pytest.raises(RuntimeError, match=r"linear_add_layer_norm computes no gradients: call it under torch.no_grad"):
        End()(X, R)


WRONG = {
    "input": [
        (3, "input must be a tensor"),
        (X.long(), "input must be float64"),
        (X[..., :5], r"weight must be \[F, C]"),
    ],
    "weight": [
        (None, "weight must be a tensor"),
        (W[0], "weight must be"),
        (W.double(), "weight must be torch.float32"),
    ],
    "bias": [(1.0, "bias must be a tensor"), (B[:3], r"bias must be \[F] = \[6]")],
    "residual": [(None, "residual must be a tensor"), (R[:1], r"residual must be \[..., C] = \[2, 3, 6]")],
    "norm_weight": [(2, "norm_weight must be a tensor"), (B[:2], r"norm_weight must be \[C] = \[6]")],
    "norm_bias": [("x", "norm_bias must be a tensor"), (B.half(), "norm_bias must be torch.float32")],
    "eps": [("small", "eps must be a number"), (-1.0, "eps must be a finite number of at least 0")],
    "scale": [(0.5, "scale must be a tensor"), (B[:2], r"scale must be \[C] = \[6]")],
    "precision": [("half", "precision must be one of 'ieee', 'tf32'")],
    "backend": [("cuda", "backend must be one of"), ("triton", 'backend must be "auto" or "pytorch"')],
}


@pytest.mark.parametrize(("name", "wrong", "message"), [(n, *case) for n, cases in WRONG.items() for case in cases])
def test_a_wrong_argument_is_named(name, wrong, message):
    with pytest.raises((TypeError, ValueError), match=message) as raised:
        linear_add_layer_norm(**(RIGHT | {name: wrong}))
    assert "\n" not in str(raised.value)
    assert re.match(r"[a-z_]+ must be", str(raised.value))
