"""Both modules: upstream's parameters, initialisation, arithmetic and errors."""

import math

import pytest
import torch
from helpers import Case, eager_ms_deform_attn
from torch import nn

import visionkernels as vk

SHAPES = [(3, 7), (5, 2)]  # no level is a square
PIXELS = 31


def redrawn(module):
    """Default initialisation has weights of zero: with it hardly anything would be compared."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[-1]))
    return module


def msda(value, locations, weights, padding_mode="zeros", align_corners=False):
    case = Case(shapes=tuple(SHAPES), num_points=3, padding_mode=padding_mode, align_corners=align_corners)
    return eager_ms_deform_attn(value, locations, weights, case)


def upstream_forward(module, query, references, pixels, padding):
    """The lines of Deformable-DETR's ``MSDeformAttn.forward``."""
    value = module.value_proj(pixels)
    if padding is not None:
        value = value.masked_fill(padding[..., None], 0.0)
    n, lq, _ = query.shape
    value = value.view(n, PIXELS, 4, 4)
    offsets = module.sampling_offsets(query).view(n, lq, 4, 2, 3, 2)
    weights = module.attention_weights(query).view(n, lq, 4, 6).softmax(-1).view(n, lq, 4, 2, 3)
    if references.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=query.dtype, device=query.device)
        locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    else:
        boxes = references[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / 3 * boxes[..., 2:] * 0.5
    return module.output_proj(msda(value, locations, weights))


def compare(module, found, expected):
    """Outputs and the gradient of every parameter."""
    parameters = list(module.parameters())
    grad_output = torch.randn_like(found)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    for (name, _), one, other in zip(
        module.named_parameters(),
        torch.autograd.grad(found, parameters, grad_output),
        torch.autograd.grad(expected, parameters, grad_output),
        strict=True,
    ):
        assert other.abs().max() > 1e-3, name
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("form", ["list", "tensor"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_ms_deform_attn_is_upstream_s(device, size, padded, form):
    module = redrawn(vk.MSDeformAttn(16, 2, 4, 3)).to(device)
    query, pixels = torch.randn(3, 5, 16, device=device), torch.randn(3, PIXELS, 16, device=device)
    references = torch.rand(3, 5, 2, size, device=device)
    padding = torch.rand(3, PIXELS, device=device) > 0.7 if padded else None
    shapes = torch.tensor(SHAPES, device=device) if form == "tensor" else SHAPES
    start = torch.tensor([0, 21], device=device)
    found = module(query, references, pixels, shapes, start, padding)
    compare(module, found, upstream_forward(module, query, references, pixels, padding))


def test_ms_deform_attn_has_upstream_s_names_and_sizes():
    module = vk.MSDeformAttn()
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "sampling_offsets.weight": (256, 256),
        "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256),
        "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256),
        "value_proj.bias": (256,),
        "output_proj.weight": (256, 256),
        "output_proj.bias": (256,),
    }


def test_ms_deform_attn_has_upstream_s_initialisation():
    """Head 0 of 4 looks right, head 1 down, and so on; point p at p + 1 pixels."""
    module = vk.MSDeformAttn(d_model=64, n_levels=2, n_heads=4, n_points=3)
    directions = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
    bias = directions[:, None, None] * torch.tensor([1.0, 2, 3])[:, None]
    found = module.sampling_offsets.bias.view(4, 2, 3, 2)
    torch.testing.assert_close(found, bias.expand(4, 2, 3, 2), rtol=0, atol=1e-6)
    assert module.sampling_offsets.weight.eq(0).all()
    assert module.attention_weights.weight.eq(0).all()
    assert module.attention_weights.bias.eq(0).all()
    for projection in (module.value_proj, module.output_proj):
        assert projection.bias.eq(0).all()
        assert 0.9 < projection.weight.abs().max() / math.sqrt(6 / 128) <= 1  # xavier: uniform within +- this


def test_directions_reach_the_edge_of_a_square():
    """With eight heads the diagonal ones are (1, 1), not (0.7, 0.7)."""
    bias = vk.MSDeformAttn(d_model=64, n_levels=1, n_heads=8, n_points=1).sampling_offsets.bias.view(8, 2)
    torch.testing.assert_close(bias[1], torch.ones(2), rtol=0, atol=1e-6)


def test_ms_deform_attn_refuses():
    with pytest.raises(ValueError, match="d_model must be divisible by n_heads, got d_model=10 and n_heads=4"):
        vk.MSDeformAttn(10, 1, 4, 1)
    module = vk.MSDeformAttn(16, 2, 4, 3)
    with pytest.raises(ValueError, match="last axis of reference_points must be 2 or 4, got 3"):
        module(torch.randn(1, 5, 16), torch.rand(1, 5, 2, 3), torch.randn(1, PIXELS, 16), SHAPES)
    with pytest.raises(ValueError, match="spatial_shapes"):
        module(torch.randn(1, 5, 16), torch.rand(1, 5, 2, 2), torch.randn(1, PIXELS - 1, 16), SHAPES)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize(("padding_mode", "align_corners"), [("zeros", False), ("border", True)])
def test_multiscale_deformable_attention(device, padding_mode, align_corners, size):
    """msda-triton's arithmetic, but for x divided by the width and y by the height."""
    module = redrawn(vk.MultiscaleDeformableAttention(12, 16, 2, 4, 3, padding_mode, align_corners)).to(device)
    img, queries = torch.randn(3, PIXELS, 12, device=device), torch.randn(3, 5, 12, device=device)
    references = torch.rand(3, 5, size, device=device)
    value = module.img_input_proj(img).view(3, PIXELS, 4, 4)
    parts = module.query_input_proj(queries).view(3, 5, 4, 2, 3, 3)
    weights = parts[..., 2].flatten(3).softmax(-1).view(3, 5, 4, 2, 3)
    spread = references[:, :, None, None, None]
    if size == 2:
        sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=torch.float32, device=device)
        locations = spread + parts[..., :2] / sizes[:, None]
    else:
        locations = spread[..., :2] + parts[..., :2] / 3 * spread[..., 2:] * 0.5
    expected = module.query_output_proj(msda(value, locations, weights, padding_mode, align_corners))
    compare(module, module(img, SHAPES, queries, references), expected)


def test_multiscale_deformable_attention_has_upstream_s_names_and_sizes():
    module = vk.MultiscaleDeformableAttention(12, 16, 2, 4, 3, "border", False)
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "img_input_proj.weight": (16, 12),
        "img_input_proj.bias": (16,),
        "query_input_proj.weight": (72, 12),
        "query_input_proj.bias": (72,),
        "query_output_proj.weight": (12, 16),
        "query_output_proj.bias": (12,),
    }


def test_multiscale_deformable_attention_refuses():
    with pytest.raises(ValueError, match="hidden_dim must be divisible by num_heads, got hidden_dim=10"):
        vk.MultiscaleDeformableAttention(12, 10, 1, 4, 1, "zeros", False)
    module = vk.MultiscaleDeformableAttention(12, 16, 2, 4, 3, "border", False)
    with pytest.raises(ValueError, match="reference_points must be"):
        module(torch.randn(1, PIXELS, 12), SHAPES, torch.randn(1, 5, 12), torch.rand(1, 5, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_under_autocast(device, dtype):
    """Projections run in the half, and what they return is what the fused attention gets: offsets too."""
    module = redrawn(vk.MSDeformAttn(16, 2, 4, 3)).to(device)
    query, pixels = torch.randn(3, 5, 16, device=device), torch.randn(3, PIXELS, 16, device=device)
    references = torch.rand(3, 5, 2, 2, device=device)
    expected = module(query, references, pixels, SHAPES)
    with torch.autocast(device.type, dtype):
        found = module(query, references, pixels, SHAPES)
    assert found.dtype == dtype
    found.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
    eps = torch.finfo(dtype).eps
    assert (found.float() - expected).abs().mean() <= 16 * eps * expected.abs().mean()


def test_compiles_whole(device):
    module = redrawn(vk.MSDeformAttn(16, 2, 4, 3)).to(device)
    query, pixels = torch.randn(3, 5, 16, device=device), torch.randn(3, PIXELS, 16, device=device)
    references, padding = torch.rand(3, 5, 2, 2, device=device), torch.rand(3, PIXELS, device=device) > 0.7
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    arguments = (query, references, pixels, SHAPES, None, padding)
    compare(module, compiled(*arguments), module(*arguments))
