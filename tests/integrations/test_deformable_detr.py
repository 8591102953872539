"""The module in place of Deformable-DETR's extension: what it computes and what it refuses."""

import doctest
import functools

import pytest
import torch
from helpers import Case, eager_ms_deform_attn, make_inputs
from torch.autograd.function import once_differentiable

from visionkernels.integrations import deformable_detr
from visionkernels.integrations.deformable_detr import install_extension, uninstall_extension

CASE = Case(shapes=((3, 7), (5, 2)), batch=3, queries=5, heads=4, head_dim=6, num_points=3, dtype=torch.float64)
STEP = 2  # divides no batch of 3: the compiled extension refuses that
LARGE = Case(**{**vars(CASE), "dtype": torch.float32})


@pytest.fixture
def extension():
    yield install_extension()
    uninstall_extension()


def make_function(start_too=True, forward_of=lambda f: f, backward_of=lambda f: f):
    """A function like those of the descendants, from the documented interface; `start_too`: not TrackFormer's."""
    import MultiScaleDeformableAttention as MSDA

    class Attention(torch.autograd.Function):
        @staticmethod
        @forward_of
        def forward(ctx, value, shapes, start, locations, weights):
            shared = (shapes, start) if start_too else (shapes,)
            ctx.save_for_backward(value, *shared, locations, weights)
            return MSDA.ms_deform_attn_forward(value, *shared, locations, weights, STEP)

        @staticmethod
        @backward_of
        @once_differentiable
        def backward(ctx, grad_output):
            grad_value, grad_locations, grad_weights = MSDA.ms_deform_attn_backward(
                *ctx.saved_tensors, grad_output, STEP
            )
            return grad_value, None, None, grad_locations, grad_weights

    return Attention.apply


def geometry(device, dtype=torch.int64):
    shapes = torch.tensor(CASE.shapes, dtype=dtype, device=device)
    return shapes, torch.tensor([0, 21], dtype=dtype, device=device)


def assert_same(found, expected, inputs, rtol=1e-10):
    """Outputs, and the three gradients of a random projection."""
    grad_output = torch.randn(expected.shape).to(expected)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol)
    for one, other, tensor in zip(
        torch.autograd.grad(found, inputs, grad_output),
        torch.autograd.grad(expected, inputs, grad_output),
        inputs,
        strict=True,
    ):
        assert one.dtype == tensor.dtype
        assert other.abs().max() > 0.1
        wide = max(rtol, torch.finfo(one.dtype).eps)  # a half is rounded once more
        torch.testing.assert_close(one, other, rtol=wide, atol=wide * other.abs().max().item())


@pytest.mark.parametrize("start_too", [True, False], ids=["usual", "trackformer"])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32], ids=["int64", "int32"])
def test_a_function_over_the_extension(extension, device, start_too, integers):
    inputs = make_inputs(CASE, device)
    value, locations, weights = inputs
    found = make_function(start_too)(value, *geometry(device, integers), locations, weights)
    assert found.shape == (3, 5, 24)
    assert_same(found, eager_ms_deform_attn(*inputs, CASE), inputs)


def test_gradcheck_through_a_function(extension, device):
    case = Case(**{**vars(CASE), "batch": 1, "queries": 2, "heads": 2})
    value, locations, weights = make_inputs(case, device)
    apply, nondeterministic = make_function(), 1e-10 if device.type == "cuda" else 0.0
    assert torch.autograd.gradcheck(apply, (value, *geometry(device), locations, weights), nondet_tol=nondeterministic)


def test_what_comes_back_has_the_forms_of_the_compiled_extension(extension, device):
    value, locations, weights = make_inputs(LARGE, device)
    arguments = (value, *geometry(device), locations, weights)
    output = extension.ms_deform_attn_forward(*arguments, 64)
    found = extension.ms_deform_attn_backward(*arguments, torch.ones_like(output), 64)
    assert isinstance(found, list)
    assert [tuple(t.shape) for t in found] == [tuple(t.shape) for t in (value, locations, weights)]
    assert {t.dtype for t in (output, *found)} == {torch.float32}
    assert not any(t.requires_grad for t in found)


def test_gradients_that_come_in_strided(extension, device):
    """That of `output.sum()` has strides of zero, a transposed one others."""
    inputs = make_inputs(CASE, device)
    apply = make_function()
    found = torch.autograd.grad(apply(inputs[0], *geometry(device), *inputs[1:]).sum(), inputs)
    expected = torch.autograd.grad(eager_ms_deform_attn(*inputs, CASE).sum(), inputs)
    torch.testing.assert_close(found, expected)
    grad_output = torch.randn(24, 5, 3, dtype=torch.float64, device=device).permute(2, 1, 0)
    found = torch.autograd.grad(apply(inputs[0], *geometry(device), *inputs[1:]), inputs, grad_output)
    expected = torch.autograd.grad(eager_ms_deform_attn(*inputs, CASE), inputs, grad_output)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kept", [True, False], ids=["float32", "half"])
def test_autocast_does_not_change_the_value(extension, device, kept):
    """As for the compiled extension the value's dtype decides, with and without `custom_fwd(cast_inputs=float32)`."""
    value, locations, weights = make_inputs(LARGE, device)
    value = value.detach().to(torch.float32 if kept else torch.bfloat16).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        output = make_function()(value, *geometry(device), locations, weights)
    assert output.dtype == value.dtype
    grads = torch.autograd.grad(output.float().sum(), (value, locations, weights))
    assert [grad.dtype for grad in grads] == [value.dtype, torch.float32, torch.float32]
    if kept:
        assert_same(
            make_function()(value, *geometry(device), locations, weights),
            eager_ms_deform_attn(value, locations, weights, LARGE),
            (value, locations, weights),
            rtol=1e-5,
        )


def test_under_custom_fwd(extension, device):
    """The decorators that some descendants put around their function's two methods."""
    value, locations, weights = make_inputs(LARGE, device)
    value = value.detach().to(torch.bfloat16).requires_grad_()
    kind = {"device_type": device.type}
    forward_of = functools.partial(torch.amp.custom_fwd, **kind, cast_inputs=torch.float32)
    apply = make_function(forward_of=forward_of, backward_of=functools.partial(torch.amp.custom_bwd, **kind))
    with torch.autocast(device.type, torch.bfloat16):
        found = apply(value, *geometry(device), locations, weights)
    assert found.dtype == torch.float32
    inputs = (value, locations, weights)
    assert_same(found, eager_ms_deform_attn(value.float(), locations, weights, LARGE), inputs, rtol=1e-5)


def test_compiles_whole(extension, device):
    """A compiled extension is a hole in the graph; this one is not."""
    inputs = make_inputs(CASE, device)
    apply = make_function()
    torch._dynamo.reset()
    compiled = torch.compile(lambda v, s, t, p, w: apply(v, s, t, p, w), fullgraph=True, backend="aot_eager")
    found = compiled(inputs[0], *geometry(device), *inputs[1:])
    assert_same(found, eager_ms_deform_attn(*inputs, CASE), inputs)


def test_bad_arguments(extension):
    value, locations, weights = (t.detach() for t in make_inputs(CASE))
    shapes, start = geometry("cpu")
    output = extension.ms_deform_attn_forward(value, shapes, start, locations, weights, 64)
    with pytest.raises(TypeError, match=r"ms_deform_attn_forward takes \(value, .*\), or the same without .*; got 3"):
        extension.ms_deform_attn_forward(value, locations, weights)
    with pytest.raises(TypeError, match=r"ms_deform_attn_backward takes .*; got 5"):
        extension.ms_deform_attn_backward(value, shapes, start, locations, weights)
    with pytest.raises(ValueError, match="level_start_index must be the first pixel of each level"):
        extension.ms_deform_attn_forward(value, shapes, start + 1, locations, weights, 64)
    good = {"value": value, "sampling_loc": locations, "attn_weight": weights, "grad_output": output}

    def backward(**changes):
        given = {**good, **changes}
        return extension.ms_deform_attn_backward(
            given["value"], shapes, start, given["sampling_loc"], given["attn_weight"], given["grad_output"], 64
        )

    for name in good:
        wrong = good[name][..., :1] if name != "value" else value[0]
        with pytest.raises(ValueError, match=name):
            backward(**{name: wrong})
        with pytest.raises(TypeError, match=name):
            backward(**{name: good[name].long()})
        with pytest.raises(TypeError, match=f"{name} must be a tensor"):
            backward(**{name: None})
    with pytest.raises(TypeError, match=r"grad_output must be torch.float64 like value, got torch.float32"):
        backward(grad_output=output.float())


def test_the_examples_in_the_docstrings_run():
    functions = (deformable_detr.ms_deform_attn_forward, deformable_detr.ms_deform_attn_backward)
    for function in functions:
        (found,) = doctest.DocTestFinder(recurse=False).find(function, globs={**vars(deformable_detr), "torch": torch})
        assert found.examples
        assert doctest.DocTestRunner().run(found).failed == 0
