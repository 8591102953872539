"""mmcv's and detrex's names, against their semantics written out here; and an installed mmcv, for which a package with
the same structure stands in: the names, signatures and re-exports of mmcv 2.2.0, and nothing compiled.
"""

import copy
import doctest
import functools
import inspect
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from visionkernels.integrations import _mmcv_attention, detrex, mmcv

SHAPES = [(3, 7), (5, 2)]  # no level is a square
PIXELS = 31
N, LQ, M, L, P, C = 3, 5, 4, 2, 3, 24


def sample(value, shapes, locations, weights):
    """The attention with `grid_sample`: value `[N, S, M, D]`, locations `[N, Lq, M, L, P, 2]`."""
    total, start = 0, 0
    for level, (h, w) in enumerate(shapes):
        h, w = int(h), int(w)
        image = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(-1, value.shape[3], h, w)
        grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1) * 2 - 1
        sampled = F.grid_sample(image, grid.to(image), align_corners=False).unflatten(0, (value.shape[0], -1))
        total = total + (sampled * weights[:, :, :, level].transpose(1, 2)[:, :, None]).sum(-1)
        start += h * w
    return total.permute(0, 3, 1, 2).flatten(2)


def semantics(module, query, value=None, identity=None, query_pos=None, mask=None, references=None):
    """What a call means, batch first: from query, value and parameters to the output before dropout and identity."""
    value = query if value is None else value
    identity = query if identity is None else identity
    query = query if query_pos is None else query + query_pos
    pixels = module.value_proj(value)
    if mask is not None:
        pixels = pixels.masked_fill(mask[..., None], 0.0)
    pixels = pixels.view(*pixels.shape[:2], M, -1)
    offsets = module.sampling_offsets(query).view(*query.shape[:2], M, L, P, 2)
    weights = module.attention_weights(query).view(*query.shape[:2], M, L * P).softmax(-1).unflatten(-1, (L, P))
    if references.shape[-1] == 2:
        sizes = torch.tensor([(w, h) for h, w in SHAPES]).to(query)
        locations = references[:, :, None, :, None] + offsets / sizes[:, None]
    else:
        boxes = references[:, :, None, :, None]
        locations = boxes[..., :2] + offsets / P * boxes[..., 2:] * 0.5
    return module.output_proj(sample(pixels, SHAPES, locations, weights)) + identity


def redrawn(module):
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(device="cpu", size=2):
    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64).to(device)

    references = torch.rand(N, LQ, L, size, dtype=torch.float64).to(device)
    mask = torch.rand(N, PIXELS).to(device) > 0.7
    return {
        "query": draw(N, LQ, C), "value": draw(N, PIXELS, C), "identity": draw(N, LQ, C), "query_pos": draw(N, LQ, C),
        "mask": mask, "references": references,
    }  # fmt: skip


def call(module, given, shapes, batch_first, **more):
    """Call a module with what `inputs` made, in the module's order of axes; the output is batch first again."""
    turned = {name: given[name] for name in ("query", "value", "identity", "query_pos") if name in given}
    if not batch_first:
        turned = {name: tensor.transpose(0, 1) for name, tensor in turned.items()}
    start = torch.tensor([0, 21], device=given["query"].device)
    output = module(
        **turned, key=None, key_padding_mask=given.get("mask"), reference_points=given["references"],
        spatial_shapes=shapes, level_start_index=start, **more,
    )  # fmt: skip
    return output if batch_first else output.transpose(0, 1)


def compare(found, expected, parameters):
    grad_output = torch.randn(expected.shape).to(expected)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    got = torch.autograd.grad(found, parameters, grad_output, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad(expected, parameters, grad_output), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * other.abs().max().item())


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


def leaves(device):
    value = torch.randn(N, PIXELS, M, 6, dtype=torch.float64)
    locations = torch.rand(N, LQ, M, L, P, 2, dtype=torch.float64) * 1.6 - 0.3
    weights = torch.rand(N, LQ, M, L, P, dtype=torch.float64)
    return [tensor.to(device).requires_grad_() for tensor in (value, locations, weights)]


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


def renamed(function):
    """mmcv's decorator for the older argument, which hides the signature as `functools.wraps` does."""

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if "residual" in kwargs:
            kwargs["identity"] = kwargs.pop("residual")
        return function(*args, **kwargs)

    return wrapper


STAND_IN = "mmcv.ops.multi_scale_deform_attn"


@pytest.fixture
def upstream(monkeypatch):
    """A package with the structure of mmcv, in `sys.modules`. Its functions say that they were called."""
    module = types.ModuleType(STAND_IN)
    calls = []

    class MultiScaleDeformableAttnFunction:
        @staticmethod
        def apply(value, value_spatial_shapes, value_level_start_index, sampling_locations, attention_weights, step):
            calls.append("apply")
            return sample(value, value_spatial_shapes, sampling_locations, attention_weights)

    def multi_scale_deformable_attn_pytorch(value, value_spatial_shapes, sampling_locations, attention_weights):
        calls.append("pytorch")
        return sample(value, value_spatial_shapes, sampling_locations, attention_weights)

    class MultiScaleDeformableAttention(mmcv.MultiScaleDeformableAttention):  # for its constructor only
        @renamed
        def forward(
            self, query, key=None, value=None, identity=None, query_pos=None, key_padding_mask=None,
            reference_points=None, spatial_shapes=None, level_start_index=None, **kwargs,
        ):  # fmt: skip
            calls.append("forward")
            query, value, identity, query_pos = (t.transpose(0, 1) for t in (query, value, identity, query_pos))
            output = semantics(self, query, value, identity, query_pos, key_padding_mask, reference_points)
            return output.transpose(0, 1)

    class Function(MultiScaleDeformableAttention):
        """A user's subclass, which looks the function up in mmcv's module when it is called."""

        def forward(self, *tensors):
            return module.multi_scale_deformable_attn_pytorch(*tensors)

    names = (MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch, MultiScaleDeformableAttention)
    vars(module).update({one.__name__: one for one in names})
    vars(module).update(calls=calls, registry={"MultiScaleDeformableAttention": names[2]}, Function=Function)
    package, operators = types.ModuleType("mmcv"), types.ModuleType("mmcv.ops")
    package.__path__ = operators.__path__ = []
    package.ops, operators.multi_scale_deform_attn = operators, module
    operators.MultiScaleDeformableAttention = names[2]
    operators.multi_scale_deformable_attn_pytorch = names[1]
    for one in (package, operators, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    return module


def state_of(upstream):
    owners = [upstream, sys.modules["mmcv.ops"], upstream.MultiScaleDeformableAttention]
    return [dict(vars(owner)) for owner in owners]


def test_an_installed_mmcv_runs_the_operators_and_is_reverted_exactly(upstream):
    module = redrawn(upstream.registry["MultiScaleDeformableAttention"](C, M, L, P, dropout=0.0).double())
    given, before = inputs(), state_of(upstream)
    expected = call(module, given, SHAPES, False)
    assert upstream.calls == ["forward"]

    mmcv.install()
    mmcv.install()  # a second call does nothing
    parameters = [*module.parameters()]
    compare(call(module, given, SHAPES, False), expected, parameters)
    copied = copy.deepcopy(module)
    torch.testing.assert_close(call(copied, given, SHAPES, False), expected)
    later = upstream.registry["MultiScaleDeformableAttention"](C, M, L, P, dropout=0.0).double()
    later.load_state_dict(module.state_dict())
    torch.testing.assert_close(call(later, given, SHAPES, False), expected)
    assert upstream.calls == ["forward"]
    assert isinstance(module, sys.modules["mmcv.ops"].MultiScaleDeformableAttention)

    mmcv.uninstall()
    assert state_of(upstream) == before
    torch.testing.assert_close(call(copied, given, SHAPES, False), expected)
    assert upstream.calls == ["forward", "forward"]


def test_functions_that_are_looked_up_in_mmcv_are_the_operators(upstream):
    value, locations, weights = tensors = leaves("cpu")
    expected = sample(value, SHAPES, locations, weights)
    subclass = upstream.Function(C, M, L, P)
    mmcv.install()
    shapes, start = torch.tensor(SHAPES), torch.tensor([0, 21])
    compare(subclass(value, shapes, locations, weights), expected, tensors)
    found = upstream.MultiScaleDeformableAttnFunction.apply(value, shapes, start, locations, weights, 64)
    torch.testing.assert_close(found, expected)
    from mmcv.ops import multi_scale_deformable_attn_pytorch  # a name that mmcv exports a second time

    assert multi_scale_deformable_attn_pytorch is mmcv.multi_scale_deformable_attn_pytorch
    mmcv.uninstall()
    assert upstream.calls == []
    upstream.multi_scale_deformable_attn_pytorch(value, SHAPES, locations, weights)
    assert upstream.calls == ["pytorch"]


def test_another_signature_is_refused_and_nothing_is_replaced(upstream):
    cls = upstream.MultiScaleDeformableAttention
    cls.forward = lambda self, query, value: query
    before = state_of(upstream)
    with pytest.raises(RuntimeError, match=r"forward takes \(self, query, value\), but its stand-in was written for"):
        mmcv.install()
    assert state_of(upstream) == before
    del upstream.multi_scale_deformable_attn_pytorch
    with pytest.raises(RuntimeError, match="has no multi_scale_deformable_attn_pytorch; use mmcv"):
        mmcv.install()


def test_uninstall_never_overwrites_what_somebody_else_has_put_there(upstream, monkeypatch):
    with pytest.raises(RuntimeError, match=r"install\(\) has not been called"):
        mmcv.uninstall()
    mmcv.install()
    monkeypatch.setattr(upstream, "multi_scale_deformable_attn_pytorch", sample)
    with pytest.raises(
        RuntimeError, match=r"multi_scale_deformable_attn_pytorch of mmcv.* was replaced by something else"
    ):
        mmcv.uninstall()
    assert upstream.MultiScaleDeformableAttention.forward is _mmcv_attention.attend  # nothing was taken back
    monkeypatch.undo()


def test_without_mmcv_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "mmcv", None)
    with pytest.raises(ModuleNotFoundError, match=r"but mmcv.* is missing; install mmcv \(not mmcv-lite\)"):
        mmcv.install()
    with pytest.raises(RuntimeError, match=r"install\(\) has not been called"):
        mmcv.uninstall()
