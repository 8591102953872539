"""Deformable attention as a Triton kernel in a graph: what is launched, and that Inductor has all of its text.

The graph is made of tensors that say they are on a GPU and hold nothing, so all of this runs without one.
"""

import importlib.util
import os
import re

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

pytest.importorskip("triton", reason="Triton is not installed")

from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from visionkernels.export import _kernels, _samples, _trace
from visionkernels.ops.deformable_attention import plan

OPEN = ("batch", "queries", "height_0", "width_1")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter a kernel has no text to compile"
)


@pytest.fixture
def launches(monkeypatch):
    """A function that traces a subject as if on a GPU: the launches in its graph, and the graph's operators."""

    def trace(subject, labels=OPEN, warps=True):
        monkeypatch.setattr(plan, "has_warp_instructions", lambda device: warps)
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            inputs = {name: _on_gpu(tensor) for name, tensor in subject.inputs.items()}
            for part in subject.module.modules():
                for name, parameter in part._parameters.items():
                    part._parameters[name] = torch.nn.Parameter(_on_gpu(parameter), requires_grad=False)
        traced = _trace.trace(subject.module, inputs, subject.axes(labels), _kernels.lowered())
        nodes = [node for node in traced.program.graph.nodes if node.op == "call_function"]
        found = [node.kwargs for node in nodes if "triton_kernel_wrapper_functional" in str(node.target)]
        return found, {str(node.target) for node in nodes}

    return trace


def _on_gpu(tensor):
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")


@pytest.mark.parametrize("make", [_samples.ms_deform_attn, _samples.msdeformattn], ids=["plain", "fused"])
def test_one_launch_that_writes_its_output_alone(launches, make):
    (launch,), operators = launches(make())
    assert launch["tensors_to_clone"] == ["output_ptr"]
    assert not {name for name in operators if "grid_sampler" in name or "visionkernels" in name}
    batch, queries = launch["kwargs"]["num_images"], launch["kwargs"]["num_queries"]
    grid = launch["grid"][0][0]
    assert {batch, queries} <= _origins(grid), "the grid grows with the open sizes"
    assert launch["kwargs"]["SHAPES_IN_MEMORY"]


def _origins(node):
    """All nodes that a node is made of."""
    found = {node}
    for other in node.all_input_nodes:
        found |= _origins(other)
    return found


@pytest.mark.parametrize(
    ("make", "warps"),
    [(lambda: _samples.ms_deform_attn((2, 3, 1), "nearest"), True), (_samples.ms_deform_attn, False)],
    ids=["nearest", "an older GPU"],
)
def test_what_the_kernel_does_not_take_is_left_to_operators_of_pytorch(launches, monkeypatch, make, warps):
    def lowered(value, shapes, sizes, points, *others):
        return value.new_zeros(points.shape[0], points.shape[1], value.shape[2] * value.shape[3])

    monkeypatch.setattr(_kernels._standard, "ms_deform_attn", lowered)
    found, operators = launches(make(), labels=("batch",), warps=warps)
    assert not found
    assert "aten.new_zeros.default" in operators


@pytest.mark.parametrize("first", [0, 1])
def test_a_view_that_begins_anywhere_is_copied(launches, first):
    subject = _samples.ms_deform_attn()
    subject.inputs["locations"] = torch.stack([subject.inputs["locations"]] * 2)
    forward = subject.module.forward
    subject.module.forward = lambda locations, **others: forward(locations=locations.select(0, first), **others)
    (launch,), _ = launches(subject, labels=())
    assert ("clone" in str(launch["kwargs"]["point_ptr"].target)) == bool(first)


@pytest.mark.parametrize("make", [_samples.ms_deform_attn, _samples.msdeformattn], ids=["plain", "fused"])
def test_the_text_that_inductor_takes_is_the_whole_kernel(launches, make, tmp_path):
    """Inductor collects a kernel's helpers by their names, so no two that differ may share one."""
    wrapper = pytest.importorskip("torch._inductor.codegen.wrapper")
    (launch,), _ = launches(make())
    kernel = kernel_side_table.get_kernel(launch["kernel_idx"]).fn
    constants = kernel_side_table.get_constant_args(launch["constant_args_idx"])
    text = wrapper.user_defined_triton_kernel_transitive_closure_source_code(kernel)
    (tmp_path / "alone.py").write_text(f"import triton\nimport triton.language as tl\n\n@triton.jit\n{text}")
    spec = importlib.util.spec_from_file_location("alone", tmp_path / "alone.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = {**launch["kwargs"], **constants}
    assert _ptx(getattr(module, kernel.__name__), arguments) == _ptx(kernel, arguments)


def _ptx(kernel, arguments):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.int32: "*i32", torch.uint8: "*u8"}
    signature, constants = {}, {}
    for parameter in kernel.params:
        argument = arguments[parameter.name]
        if isinstance(argument, torch.fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
            signature[parameter.name] = types[argument.meta["val"].dtype]
        elif parameter.is_constexpr or argument is None:
            signature[parameter.name], constants[parameter.name] = "constexpr", argument
        else:
            signature[parameter.name] = "i32"
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1}).asm["ptx"]
    instructions = ptx[ptx.index(".visible .entry") : ptx.index("\n}")]
    return re.sub(r"(?m)^\s*(\.loc.*|//.*|\$L__tmp\d+:)$\n?", "", instructions)
