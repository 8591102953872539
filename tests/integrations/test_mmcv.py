"""mmcv's and detrex's names, against their semantics written out."""

import doctest
import inspect
import math

import pytest
import torch
from integrations.mmcv_semantics import (
    LQ,
    PIXELS,
    SHAPES,
    C,
    L,
    M,
    N,
    P,
    call,
    compare,
    inputs,
    leaves,
    redrawn,
    sample,
    semantics,
)

from visionkernels.integrations import _mmcv_attention, detrex, mmcv


def build(kind, **more):
    cls = detrex.MultiScaleDeformableAttention if kind == "detrex" else mmcv.MultiScaleDeformableAttention
    return redrawn(cls(C, M, L, P, **{"dropout": 0.0, **more}).double())


@pytest.mark.parametrize("kind", ["mmcv", "detrex"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["batch-second", "batch-first"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("form", ["list", "tensor"])
def test_the_module(device, kind, batch_first, size, form):
    module, given = build(kind, batch_first=batch_first).to(device), inputs(device, size)
    shapes = torch.tensor(SHAPES, device=device) if form == "tensor" else SHAPES
    compare(call(module, given, shapes, batch_first), semantics(module, **given), [*module.parameters()])


@pytest.mark.parametrize("left_out", ["identity", "query_pos", "mask"])
def test_what_may_be_left_out(left_out):
    module, given = build("mmcv"), inputs()
    del given[left_out]
    compare(call(module, given, SHAPES, False), semantics(module, **given), [*module.parameters()])


def test_without_a_value_the_query_is_the_pixels_and_without_identity_it_is_added():
    """As in an encoder; the position is added to neither."""
    module, given = build("mmcv"), inputs()
    given = {"query": given["value"], "references": torch.rand(N, PIXELS, L, 2).double()}
    given["query_pos"] = torch.randn_like(given["query"])
    compare(call(module, given, SHAPES, False), semantics(module, **given), [*module.parameters()])


def test_residual_is_the_older_name_of_identity():
    module, given = build("mmcv"), inputs()
    residual = given.pop("identity")
    found = call(module, given, SHAPES, False, residual=residual.transpose(0, 1))
    compare(found, semantics(module, **given, identity=residual), [*module.parameters()])


@pytest.mark.parametrize("ratio", [0.5, 2.0])
def test_value_proj_ratio(ratio):
    module, given = build("mmcv", value_proj_ratio=ratio), inputs()
    assert module.value_proj.out_features == C * ratio
    compare(call(module, given, SHAPES, False), semantics(module, **given), [*module.parameters()])


def test_dropout_comes_before_the_identity_and_only_in_training():
    module, given = build("mmcv", dropout=0.5), inputs()
    plain = semantics(module, **given) - given["identity"]
    dropped = call(module, given, SHAPES, False) - given["identity"]
    kept = dropped.abs() > 1e-12
    assert 0.3 < kept.double().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])
    torch.testing.assert_close(call(module.eval(), given, SHAPES, False) - given["identity"], plain)


@pytest.mark.parametrize("cls", [mmcv.MultiScaleDeformableAttention, detrex.MultiScaleDeformableAttention])
def test_names_sizes_and_initialisation(cls):
    module = cls()
    assert {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()} == {
        "sampling_offsets.weight": (256, 256), "sampling_offsets.bias": (256,),
        "attention_weights.weight": (128, 256), "attention_weights.bias": (128,),
        "value_proj.weight": (256, 256), "value_proj.bias": (256,),
        "output_proj.weight": (256, 256), "output_proj.bias": (256,),
    }  # fmt: skip
    assert (module.dropout.p, module.batch_first, module.im2col_step) == (0.1, False, 64)
    directions = torch.tensor([[1.0, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]])
    bias = directions[:, None, None] * torch.tensor([1.0, 2, 3, 4])[:, None]
    torch.testing.assert_close(
        module.sampling_offsets.bias.view(8, 4, 4, 2), bias.expand(8, 4, 4, 2), rtol=0, atol=3e-6
    )
    for tensor in (module.sampling_offsets.weight, *module.attention_weights.parameters()):
        assert tensor.eq(0).all()
    for projection in (module.value_proj, module.output_proj):
        assert projection.bias.eq(0).all()
        assert 0.9 < projection.weight.abs().max() / math.sqrt(6 / 512) <= 1  # xavier: uniform within +- this


def test_the_constructors_are_upstream_s():
    names = (
        "embed_dims num_heads num_levels num_points im2col_step dropout batch_first norm_cfg init_cfg value_proj_ratio"
    )
    assert [*inspect.signature(mmcv.MultiScaleDeformableAttention).parameters] == names.split()
    names = "embed_dim num_heads num_levels num_points img2col_step dropout batch_first"
    assert [*inspect.signature(detrex.MultiScaleDeformableAttention).parameters] == names.split()
    assert detrex.MultiScaleDeformableAttention(48, 4, 2, 1, 32, 0.0, True).embed_dim == 48


def test_what_the_modules_refuse():
    with pytest.raises(
        ValueError, match="embed_dims must be divisible by num_heads, got embed_dims=256 and num_heads=7"
    ):
        mmcv.MultiScaleDeformableAttention(num_heads=7)
    with pytest.raises(ValueError, match="embed_dim must be divisible by num_heads, got embed_dim=256 and num_heads=7"):
        detrex.MultiScaleDeformableAttention(num_heads=7)
    module, given = build("mmcv"), inputs()
    with pytest.raises(TypeError, match=r"key_padding_mask must be bool, True where padded, got torch.uint8"):
        call(module, {**given, "mask": given["mask"].byte()}, SHAPES, False)
    with pytest.raises(TypeError, match="reference_points and spatial_shapes must be given, got None"):
        call(module, {**given, "references": None}, SHAPES, False)
    with pytest.raises(ValueError, match=r"query must have three axes, got \[5, 24\]"):
        call(module, {**given, "query": given["query"][0]}, SHAPES, True)
    with pytest.raises(ValueError, match=r"value must have three axes, got \[31, 24\]"):
        call(module, {**given, "value": given["value"][0]}, SHAPES, True)
    with pytest.raises(ValueError, match="spatial_shapes"):
        call(module, given, SHAPES[:1], False)


@pytest.mark.parametrize("kind", ["mmcv", "detrex"])
@pytest.mark.parametrize("name", ["query", "value", "identity", "residual", "query_pos", "key_padding_mask"])
@pytest.mark.parametrize("wrong", [[1.0, 2.0], 3, "tensor"], ids=["list", "number", "string"])
def test_an_argument_that_is_no_tensor(kind, name, wrong):
    given = inputs()
    arguments = {"query": given["query"], "value": given["value"], name: wrong}
    with pytest.raises(TypeError, match=f"^{name.replace('residual', 'identity')} must be a tensor, got "):
        build(kind, batch_first=True)(**arguments, reference_points=given["references"], spatial_shapes=SHAPES)


def test_the_modules_compile_whole(device):
    module, given = build("mmcv").to(device), inputs(device)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compare(call(compiled, given, SHAPES, False), semantics(module, **given), [*module.parameters()])


@pytest.mark.parametrize("name", ["function", "pytorch"])
def test_the_functions(device, name):
    value, locations, weights = tensors = leaves(device)
    shapes, start = torch.tensor(SHAPES, device=device), torch.tensor([0, 21], device=device)
    if name == "function":
        found = mmcv.MultiScaleDeformableAttnFunction.apply(value, shapes, start, locations, weights, 64)
    else:
        found = mmcv.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    assert found.shape == (N, LQ, M * 6)
    compare(found, sample(value, SHAPES, locations, weights), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_functions_keep_the_value_s_dtype_under_autocast(device, dtype):
    value, locations, weights = (t.detach().float() for t in leaves(device))
    value = value.to(dtype)
    expected = mmcv.multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    with torch.autocast(device.type, torch.bfloat16):
        found = mmcv.MultiScaleDeformableAttnFunction.apply(value, SHAPES, None, locations, weights, 64)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("module", [mmcv, detrex, _mmcv_attention])
def test_the_examples_in_the_docstrings_run(module):
    results = doctest.testmod(module)
    assert (results.failed, results.attempted > 0) == (0, True)
