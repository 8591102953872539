"""Other code bases' arguments and layouts, against the attention written out in PyTorch, forward and every gradient."""

import doctest
import itertools

import pytest
import torch
import torch.nn.functional as F

import visionkernels as vk
from visionkernels.integrations import layouts
from visionkernels.integrations.layouts import (
    FlashDeformAttnFunction,
    d_fine_core,
    multiscale_deformable_attn_plugin,
    rf_detr_core,
)

N, M, D, LQ = 3, 4, 6, 5
SHAPES = [(3, 7), (5, 2)]  # no level is a square
PIXELS = 31


def attention(levels, locations, weights):
    """Lists for the levels: values `[N, M, D, h, w]`, locations `[N, Lq, M, P, 2]` and weights `[N, Lq, M, P]`."""
    total = 0
    for value, points, weight in zip(levels, locations, weights, strict=True):
        grid = points.transpose(1, 2).flatten(0, 1) * 2 - 1
        sampled = F.grid_sample(value.flatten(0, 1), grid, align_corners=False)  # [N * M, D, Lq, P]
        total = total + (sampled.unflatten(0, (N, M)) * weight.transpose(1, 2)[:, :, None]).sum(-1)  # [N, M, D, Lq]
    return total.permute(0, 3, 1, 2).flatten(2)


def leaves(device, points=(3, 3), dtype=torch.float64):
    """A value for each level, locations from outside to outside and weights, all points packed."""
    levels = [torch.randn(N, M, D, h, w) for h, w in SHAPES]
    locations, weights = torch.rand(N, LQ, M, sum(points), 2) * 1.6 - 0.3, torch.randn(N, LQ, M, sum(points))
    return [t.to(device, dtype).requires_grad_() for t in (*levels, locations, weights)]


def expect(inputs, points=(3, 3), softmax=False):
    *levels, locations, weights = inputs
    weights = weights.softmax(-1) if softmax else weights
    return attention(levels, locations.split(points, 3), weights.split(points, 3))


def flattened(levels):
    """`[N, S, M, D]` of the levels `[N, M, D, h, w]`."""
    return torch.cat([level.flatten(3) for level in levels], 3).permute(0, 3, 1, 2)


def compare(found, expected, inputs, rtol=1e-9):
    grad_output = torch.randn(expected.shape).to(expected)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    got = torch.autograd.grad(found, inputs, grad_output)
    for one, other in zip(got, torch.autograd.grad(expected, inputs, grad_output), strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * other.abs().max().item())


def packed_by_dcnv4(locations, logits):
    return torch.cat([locations.flatten(3), logits], -1)


@pytest.mark.parametrize("form", ["list", "tensor"])
@pytest.mark.parametrize("points", [1, 3, 4, 8])
def test_dcnv4(device, points, form):
    inputs = leaves(device, (points, points))
    *levels, locations, logits = inputs
    shapes = torch.tensor(SHAPES, device=device) if form == "tensor" else SHAPES
    start = torch.tensor([0, 21], device=device)
    found = FlashDeformAttnFunction.apply(
        flattened(levels), shapes, start, packed_by_dcnv4(locations, logits), 2, points
    )
    compare(found, expect(inputs, (points, points), softmax=True), inputs)


def test_dcnv4_has_eight_points_unless_told(device):
    *levels, locations, logits = leaves(device, (8, 8))
    packed = packed_by_dcnv4(locations, logits)
    found = FlashDeformAttnFunction.apply(flattened(levels), SHAPES, None, packed, 64)
    torch.testing.assert_close(found, expect([*levels, locations, logits], (8, 8), softmax=True))


@pytest.mark.parametrize("points", [3, 4])
def test_dcnv4_locations_are_as_exact_as_the_dtype_that_they_come_in(device, points):
    """The locations go in as they are: nothing is multiplied by 167 pixels, or rounded, in float16."""
    value = torch.arange(167.0, device=device).view(1, 167, 1, 1)
    x = torch.rand(1, 999, 1, points, device=device) * 0.9 + 0.05
    for dtype in (torch.float32, torch.float16):
        x = x.to(dtype)
        packed = packed_by_dcnv4(torch.stack([x, torch.full_like(x, 0.5)], -1), torch.zeros_like(x))
        found = FlashDeformAttnFunction.apply(value, [(1, 167)], None, packed, 64, points)
        expected = (x.double() * 167 - 0.5).mean(-1)
        assert ((found.double() - expected) / 167).abs().max() <= 1e-6


def test_dcnv4_is_one_call_of_the_fused_operator():
    *levels, locations, logits = leaves("cpu")
    value, packed = flattened(levels).detach(), packed_by_dcnv4(locations, logits).detach()
    with torch.profiler.profile() as profile:
        FlashDeformAttnFunction.apply(value, SHAPES, None, packed, 64, 3)
    names = [event.name for event in profile.events()]
    assert [name for name in names if name.startswith("visionkernels::")] == [
        "visionkernels::fused_ms_deform_attn_no_grad"
    ]
    assert not {"aten::cat", "aten::mul", "aten::div", "aten::_softmax"} & set(before_the_operator(names))


def before_the_operator(names):
    return itertools.takewhile(lambda name: not name.startswith("visionkernels::"), names)


def test_dcnv4_s_module_is_ms_deform_attn(device):
    """`FlashDeformAttn` packs what `MSDeformAttn` computes: the same parameters give the same output."""
    module = vk.MSDeformAttn(M * D, 2, M, 3).to(device, torch.float64)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    query, pixels, references = (
        torch.randn(*shape, dtype=torch.float64, device=device)
        for shape in ((N, LQ, M * D), (N, PIXELS, M * D), (N, LQ, 2, 2))
    )
    sizes = torch.tensor([(w, h) for h, w in SHAPES], dtype=torch.float64, device=device)
    offsets = module.sampling_offsets(query).view(N, LQ, M, 2, 3, 2)
    locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    packed = packed_by_dcnv4(locations.flatten(3, 4), module.attention_weights(query).view(N, LQ, M, 6))
    value = module.value_proj(pixels).view(N, PIXELS, M, D)
    found = module.output_proj(FlashDeformAttnFunction.apply(value, SHAPES, None, packed, 64, 3))
    compare(found, module(query, references, pixels, SHAPES), list(module.parameters()))


def test_dcnv4_refuses():
    *levels, locations, logits = leaves("cpu")
    value, packed = flattened(levels), packed_by_dcnv4(locations, logits)
    with pytest.raises(
        ValueError, match=r"sampling_loc_attn must be .* = 2 \* 8 \* 3\] = \[3, 5, 4, 48\], got \[3, 5, 4, 18\]"
    ):
        FlashDeformAttnFunction.apply(value, SHAPES, None, packed, 64)
    with pytest.raises(ValueError, match=r"must be a tensor \[N, Lq, M, L \* K \* 3\], got \[3, 5, 72\]"):
        FlashDeformAttnFunction.apply(value, SHAPES, None, packed.flatten(2), 64, 3)
    with pytest.raises(ValueError, match="got None"):
        FlashDeformAttnFunction.apply(value, SHAPES, None, None, 64, 3)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_tensorrt(device, integers):
    inputs = leaves(device)
    *levels, locations, weights = inputs
    shapes, start = (torch.tensor(t, dtype=integers, device=device) for t in (SHAPES, [0, 21]))
    points = (locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3)))
    found = multiscale_deformable_attn_plugin(flattened(levels), shapes, start, *points)
    assert found.shape == (N, LQ, M, D)
    compare(found.flatten(2), expect(inputs), inputs)


@pytest.mark.parametrize("hw", [False, True], ids=["tensor", "pairs"])
@pytest.mark.parametrize(("split_locations", "split_weights"), [*itertools.product([True, False], repeat=2)])
def test_rf_detr(device, split_locations, split_weights, hw):
    """Its module splits the locations and not the weights; in export mode it splits neither."""
    inputs = leaves(device)
    *levels, locations, weights = inputs
    value = torch.cat([level.flatten(3) for level in levels], 3)
    locations = locations.unflatten(3, (2, 3)) if split_locations else locations
    weights = weights.unflatten(3, (2, 3)) if split_weights else weights
    wrong = torch.tensor(SHAPES, device=device)
    keywords = {"value_spatial_shapes_hw": SHAPES} if hw else {}
    found = rf_detr_core(value, wrong.flip(0) if hw else wrong, locations, weights, **keywords)
    compare(found, expect(inputs), inputs)


@pytest.mark.parametrize("points", [(3, 3), (2, 5), (0, 4)], ids=str)
@pytest.mark.parametrize("one_tensor", [True, False])
def test_d_fine(device, points, one_tensor):
    """Upstream splits one value; here it may also come in parts."""
    inputs = leaves(device, points)
    *levels, locations, weights = inputs
    value = [level.flatten(3) for level in levels]
    if one_tensor:
        value = flattened(levels).contiguous().permute(0, 2, 3, 1).split([h * w for h, w in SHAPES], -1)
    found = d_fine_core(value, [list(shape) for shape in SHAPES], locations, weights, list(points))
    if points[0] == 0:
        compare(found, attention(levels[1:], [locations], [weights]), inputs[1:])
    else:
        compare(found, expect(inputs, points), inputs)


def test_d_fine_discrete(device):
    """The nearest pixel, clamped to the width and to the height; and no gradient for the locations."""
    inputs = leaves(device)
    *levels, locations, weights = inputs
    total = 0
    for level, points, weight in zip(levels, locations.split(3, 3), weights.split(3, 3), strict=True):
        h, w = level.shape[3:]
        column = (points[..., 0] * w + 0.5).long().clamp(0, w - 1)
        row = (points[..., 1] * h + 0.5).long().clamp(0, h - 1)
        image = torch.arange(N, device=device)[:, None, None, None]
        head = torch.arange(M, device=device)[:, None]
        total = total + (level[image, head, :, row, column] * weight[..., None]).sum(3)
    value = [t.flatten(3) for t in levels]
    found = d_fine_core(value, SHAPES, locations, weights, [3, 3], method="discrete")
    (gradient,) = torch.autograd.grad(found.sum(), locations, retain_graph=True, allow_unused=True)
    compare(found, total.flatten(2), [*levels, weights])
    assert gradient is None  # as upstream's, so that an optimizer leaves what is behind it alone


def test_d_fine_refuses():
    *levels, locations, weights = leaves("cpu")
    value = [t.flatten(3) for t in levels]
    with pytest.raises(ValueError, match=r"method must be one of \('default', 'discrete'\), got 'nearest'"):
        d_fine_core(value, SHAPES, locations, weights, [3, 3], method="nearest")
    with pytest.raises(
        ValueError, match=r"value must hold a tensor .* \[\(5, 2\), \(3, 7\)\], got h \* w = \[21, 10\]"
    ):
        d_fine_core(value, SHAPES[::-1], locations, weights, [3, 3])


def calls(inputs):
    *levels, locations, weights = inputs
    value, points = flattened(levels), (locations.unflatten(3, (2, 3)), weights.unflatten(3, (2, 3)))
    shapes, start = torch.tensor(SHAPES), torch.tensor([0, 21])
    return {
        "dcnv4": lambda: FlashDeformAttnFunction.apply(
            value, SHAPES, None, packed_by_dcnv4(locations, weights), 64, 3
        ),
        "tensorrt": lambda: multiscale_deformable_attn_plugin(value, shapes, start, *points),
        "rf-detr": lambda: rf_detr_core(value.permute(0, 2, 3, 1), shapes, *points),
        "d-fine": lambda: d_fine_core([t.flatten(3) for t in levels], SHAPES, locations, weights, [3, 3]),
    }  # fmt: skip


@pytest.mark.parametrize("name", calls(leaves("cpu")))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_result_has_the_value_s_dtype_under_autocast_too(name, dtype):
    call = calls([t.detach() for t in leaves("cpu", dtype=dtype)])[name]
    with torch.autocast("cpu", torch.bfloat16):
        found = call()
    assert found.dtype == dtype
    torch.testing.assert_close(found, call(), rtol=0, atol=0)


@pytest.mark.parametrize("name", calls(leaves("cpu")))
def test_compiles_whole(name):
    inputs = leaves("cpu")
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: calls(t)[name](), fullgraph=True, backend="aot_eager")
    expected = calls(inputs)[name]()
    compare(compiled(inputs).flatten(2), expected.flatten(2), inputs)


@pytest.mark.parametrize(
    "subject", [FlashDeformAttnFunction.apply, multiscale_deformable_attn_plugin, rf_detr_core, d_fine_core]
)
def test_the_examples_in_the_docstrings_run(subject):
    (found,) = doctest.DocTestFinder(recurse=False).find(subject, subject.__name__, globs=vars(layouts))
    assert found.examples
    assert doctest.DocTestRunner().run(found).failed == 0
