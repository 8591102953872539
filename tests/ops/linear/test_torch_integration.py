"""Linear layers inside PyTorch, and what a wrong call says."""

import re

import pytest
import torch
from inference_tools import WAYS

from visionkernels.ops.linear import cpu, op
from visionkernels.ops.linear.op import gated_linear, linear

F32, BF16 = torch.float32, torch.bfloat16
X, W, B, R, S = torch.ones(2, 3, 8), torch.ones(6, 8), torch.ones(6), torch.ones(2, 3, 6), torch.ones(6)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(8, 12)
        self.gated = torch.nn.Linear(12, 16)
        self.scale = torch.nn.Parameter(torch.randn(8))

    def forward(self, x):
        hidden = linear(x, self.up.weight, self.up.bias, activation="gelu")
        gated = gated_linear(hidden, self.gated.weight, self.gated.bias)
        return linear(gated, self.up.weight[:8], None, residual=x, scale=self.scale)


@WAYS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck(device, backend, dtype):
    x, w, b, r, s = (t.to(device, dtype) for t in (X, W, B, R, S))
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if dtype == BF16 else {}
    for view in (x, x.transpose(0, 1), x[:, :0]):
        torch.library.opcheck(op.LINEAR, (view, w, b, "gelu", None, None, "ieee", backend), **tolerance)
        torch.library.opcheck(op.GATED_LINEAR, (view, w, None, "silu", "ieee", backend), **tolerance)
    torch.library.opcheck(op.LINEAR, (x, w, b, None, r, s, "ieee", backend), **tolerance)
    torch.library.opcheck(op.LINEAR, (x, w, None, None, r, None, "ieee", backend), **tolerance)
    torch.library.opcheck(op.LINEAR, (x, w, None, None, None, s, "tf32", backend), **tolerance)


def test_compile_and_export(device):
    layer = Layer().to(device)
    x = torch.randn(2, 3, 8, device=device)
    torch._dynamo.reset()
    with torch.no_grad():
        truth = layer(x)
        for backend in ("aot_eager", "inductor") if device.type == "cuda" else ("aot_eager",):
            torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend=backend)(x), truth)
        rows = torch.export.Dim("rows", min=2, max=1000)
        exported = torch.export.export(layer, (x,), dynamic_shapes=({1: rows},), strict=False)
        assert sum("visionkernels" in str(node.target) for node in exported.graph.nodes) == 3
        x = torch.randn(2, 7, 8, device=device)
        torch.testing.assert_close(exported.module()(x), layer(x))


def test_autocast_gives_its_dtype(device):
    layer = Layer().to(device)
    x = torch.randn(2, 3, 8, device=device)
    with torch.no_grad(), torch.autocast(device.type, BF16):
        got = layer(x)
    assert got.dtype == BF16
    with torch.no_grad():
        torch.testing.assert_close(got, layer.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual", "scale"])
def test_gradients_are_refused(name):
    arguments = {"input": X, "weight": W, "bias": B, "residual": R, "scale": S}
    arguments[name] = arguments[name].clone().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^linear computes no gradients: call it under torch.no_grad\(\)"):
        linear(**arguments)
    with torch.no_grad():
        linear(**arguments)
    if name in ("input", "weight", "bias"):
        three = [arguments[key] for key in ("input", "weight", "bias")]
        with pytest.raises(RuntimeError, match=r"^gated_linear computes no gradients"):
            gated_linear(*three)
        with torch.inference_mode():
            gated_linear(*three)


def test_the_operator_itself_computes_no_gradients():
    output = op.LINEAR(X, W.clone().requires_grad_(), None, None, None, None, "ieee", "auto")
    with pytest.raises(RuntimeError, match="visionkernels::linear computes no gradients"):
        output.sum().backward()


WRONG = [
    ("input", TypeError, None, "input must be a tensor [..., C], got NoneType"),
    ("input", TypeError, X.to(torch.complex64), "input must be float64, float32, float16 or bfloat16, got torch.comp"),
    ("input", ValueError, torch.tensor(1.0), "input must be [..., C], got []"),
    ("input", TypeError, X[0].to_sparse(), "input must be a dense tensor, got the layout torch.sparse_coo"),
    ("weight", TypeError, "w", "weight must be a tensor [F, C], got str"),
    ("weight", ValueError, B, "weight must be [F, C], got [6]"),
    ("weight", ValueError, W[:, :7], "weight must be [F, C] = [6, 8], got [6, 7]"),
    (
        "weight",
        TypeError,
        W.half(),
        "weight must be torch.float32 like input, got torch.float16; convert it with .to()",
    ),
    ("weight", ValueError, W.to("meta"), "weight must be on cpu like input, got meta"),
    ("bias", ValueError, B[:5], "bias must be [F] = [6], got [5]"),
    ("bias", TypeError, 0.0, "bias must be a tensor [F], got float"),
    ("residual", ValueError, R[:1], "residual must be [..., F] = [2, 3, 6], got [1, 3, 6]"),
    ("residual", ValueError, R[0], "residual must be [..., F], got [3, 6]"),
    ("residual", TypeError, R.double(), "residual must be torch.float32 like input, got torch.float64"),
    ("scale", ValueError, S[:1], "scale must be [F] = [6], got [1]"),
    ("scale", TypeError, 2.0, "scale must be a tensor [F], got float"),
    (
        "activation",
        ValueError,
        "relu",
        "activation must be one of None, 'gelu', 'gelu_tanh', 'quick_gelu', 'silu', got",
    ),
    ("precision", ValueError, "high", "precision must be one of 'ieee', 'tf32', got 'high'"),
    ("backend", ValueError, None, "backend must be one of 'auto', 'triton', 'pytorch', got None"),
]


@pytest.mark.parametrize(("name", "error", "wrong", "message"), WRONG, ids=lambda value: None)
def test_a_wrong_argument_is_named(name, error, wrong, message):
    arguments = {"input": X, "weight": W, "bias": B, "residual": R, "scale": S, name: wrong}
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        linear(**arguments)
    if name not in ("residual", "scale"):
        del arguments["residual"], arguments["scale"]
        with pytest.raises(error, match="^" + re.escape(message).replace(r"\[F", r"\[(?:2\ \*\ )?F")):
            gated_linear(**arguments)


def test_an_odd_number_of_gated_rows_is_refused():
    with pytest.raises(ValueError, match=r"^weight must be \[2 \* F, C\], an even number of rows, got \[5, 8\]"):
        gated_linear(X, W[:5])


class Cuda:
    is_cuda, dtype = True, F32


def test_the_precision_of_the_process_is_put_back():
    """On a stand-in of a CUDA tensor: the setting is the host's."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            settings.fp32_precision = setting
            for precision in ("ieee", "tf32"):
                with cpu.float32_precision(Cuda, precision):
                    assert settings.fp32_precision == precision
                assert settings.fp32_precision == setting
                with pytest.raises(KeyError), cpu.float32_precision(Cuda, precision):
                    raise KeyError
                assert settings.fp32_precision == setting
    finally:
        settings.fp32_precision = before


def test_a_precision_that_is_inherited_stays_so():
    general, settings = torch.backends, torch.backends.cuda.matmul
    before = general.fp32_precision, settings.fp32_precision
    try:
        general.fp32_precision, settings.fp32_precision = "tf32", "none"
        with cpu.float32_precision(Cuda, "ieee"):
            assert settings.fp32_precision == "ieee"
        assert settings.fp32_precision == "tf32"
        general.fp32_precision = "ieee"
        assert settings.fp32_precision == "ieee"
    finally:
        general.fp32_precision, settings.fp32_precision = before
