"""The patch embedding inside PyTorch: opcheck, compile, export, autocast."""

import pytest
import torch

from visionkernels.ops.patch_embedding import op
from visionkernels.ops.patch_embedding.op import patch_embedding

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])


def make(device, channels_last, batch=2, dtype=F32):
    images = torch.randint(0, 256, (batch, 32, 48, 3) if channels_last else (batch, 3, 32, 48), dtype=torch.uint8)
    weight = torch.randn(8, 3, 16, 16, device=device, dtype=dtype) / 28
    tables = [torch.randn(shape, device=device, dtype=dtype) for shape in ((8,), (6, 8), (2, 8))]
    return images.to(device), weight, tables


def model(device, channels_last):
    """A function of the images."""
    _, weight, (bias, position, prefix) = make(device, channels_last)
    options = {"position_embedding": position, "prefix_tokens": prefix, "mean": [0.5] * 3, "std": [0.25] * 3}
    return lambda images: patch_embedding(images, weight, bias, **options, channels_last=channels_last)


@LAYOUTS
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_opcheck(device, dtype, channels_last):
    """Schema, fake and AOT dispatch."""
    images, weight, tables = make(device, channels_last, dtype=dtype)
    tolerance = {"atol": 2e-2, "rtol": 2e-2} if dtype == BF16 else {}
    for backend in ("auto", "pytorch", *(["triton"] if device.type == "cuda" else [])):
        for options in ((*tables, [0.5] * 3, [0.25] * 3), (None,) * 5):
            torch.library.opcheck(op.FORWARD, (images, weight, *options, channels_last, backend), **tolerance)


@LAYOUTS
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(device, channels_last, dynamic):
    call = model(device, channels_last)
    images = make(device, channels_last, batch=3)[0]
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    torch.testing.assert_close(compiled(images), call(images))
    torch.testing.assert_close(compiled(images[:2]), call(images[:2]))


@LAYOUTS
def test_export(device, channels_last):
    """With any batch size; the operator stays in the graph."""
    call = model(device, channels_last)

    class Model(torch.nn.Module):
        def forward(self, images):
            return call(images)

    images = make(device, channels_last, batch=3)[0]
    program = torch.export.export(Model(), (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    assert any(node.target == op.FORWARD for node in program.graph.nodes)
    other = make(device, channels_last, batch=5)[0]
    torch.testing.assert_close(program.module()(other), call(other))


def test_autocast(device):
    """The weight follows and with it the result, as of a convolution."""
    images, weight, (bias, *_) = make(device, False)
    with torch.autocast(device.type, BF16):
        got = patch_embedding(images, weight, bias)
        wide = patch_embedding(images, weight.double())
    assert got.dtype == BF16
    assert wide.dtype == torch.float64
    assert torch.equal(got, patch_embedding(images, weight.bfloat16(), bias.bfloat16()))


def test_meta_tensors():
    output = patch_embedding(
        torch.zeros(2, 3, 32, 48, device="meta"), torch.zeros(8, 3, 16, 16, device="meta", dtype=F16)
    )
    assert output.shape == (2, 6, 8)
    assert output.dtype == F16
