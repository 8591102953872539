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
from torch._inductor.codegen import wrapper

from visionkernels.export import _launches, _samples, _trace
from visionkernels.export._subject import Subject
from visionkernels.ops.deformable_attention import plan

OPEN = ("batch", "queries", "height_0", "width_1")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter a kernel has no text to compile"
)


@pytest.fixture
def launches(monkeypatch):
    """A function that traces a subject as if on a GPU: the launches in its graph, and the graph's operators."""

    def trace(subject, labels=OPEN):
        monkeypatch.setattr(plan, "has_warp_instructions", lambda device: True)
        with FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
            inputs = {name: _on_gpu(tensor) for name, tensor in subject.inputs.items()}
            for part in subject.module.modules():
                for name, parameter in part._parameters.items():
                    part._parameters[name] = torch.nn.Parameter(_on_gpu(parameter), requires_grad=False)
        traced = _trace.trace(subject.module, inputs, subject.axes(labels), _launches.lowered())
        trace.limits = _trace.limits(traced.program, subject.axes(labels))
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


def test_the_batch_of_masks_that_are_resized_stays_open(launches):
    """Detectors resize masks `[1, N, H, W]`, and for a GPU PyTorch asks whether these are less than four channels."""

    class Resize(torch.nn.Module):
        def forward(self, masks):
            return torch.nn.functional.interpolate(masks.unsqueeze(0), size=(4, 4)).squeeze(0)

    subject = Subject("masks", Resize(), {"masks": torch.rand(2, 8, 8)}, ("output",), {"batch": {"masks": 0}})
    launches(subject, labels=("batch",))
    assert launches.limits == ""


def test_an_open_size_that_is_too_large_gives_nan(launches):
    """To the kernel the sizes then do not fit the value, which it answers with NaN."""
    (launch,), _ = launches(_samples.ms_deform_attn(), labels=("queries",))
    pixels, queries = (launch["kwargs"][name].meta["val"].node.expr for name in ("num_pixels", "num_queries"))
    limit = 2**31 // (4 * 2 * 9 * 4)  # heads, coordinates, samples, bytes
    true = 12 * 20 + 6 * 10 + 3 * 5
    assert [pixels.subs(queries, count) for count in (2, limit, limit + 1)] == [true, true, true - 1]


CASES = {  # what is not as in a usual call
    "float32": {},
    "float16": {"dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    "points in float16": {"points_dtype": torch.float16},
    "sizes in a tensor": {"shapes": torch.tensor([[4, 5], [2, 3]])},
    "sizes in a tensor of int32": {"shapes": torch.tensor([[4, 5], [2, 3]], dtype=torch.int32)},
    "any strides": {"strides": (1, 2, 52, 416)},
    "a level without points": {"num_points": (0, 3)},
    "as many queries as pixels": {"num_queries": 26},
    "a whole image further on": {"offset": 26 * 4 * 8},
    "a reference point": {"references": (1, 2)},
    "a box a level": {"references": (2, 4)},
    "a mask": {"references": (1, 2), "mask": True},
    "everything with the batch in the middle": {"references": (1, 2), "mask": True, "batch_second": True},
    "float64": {"dtype": torch.float64, "launched": False},
    "locations in float64": {"points_dtype": torch.float64, "launched": False},
    "heads of 24 bytes": {"head_dim": 6, "launched": False},
    "too many samples": {"num_points": (16, 17), "launched": False},
    "one pixel": {"sizes": (1, 1), "num_points": (3,), "launched": False},
    "no pixel": {"sizes": (0, 1), "num_points": (3,), "launched": False},
    "a value that begins anywhere": {"offset": 3, "launched": False},
    "an older GPU": {"warps": False, "launched": False},
    "a value of 2 GiB": {"sizes": (4096, 4096), "num_points": (3,), "launched": False},
    "an output of 2 GiB": {"num_queries": 2**31 // (4 * 8 * 4), "launched": False},
    "boxes of 2 GiB": {
        "references": (2, 4),
        "num_points": (0, 1),
        "head_dim": 4,
        "num_queries": 2**31 // (4 * 8 * 4),
        "launched": False,
    },
    "almost": {"num_queries": 2**31 // (4 * 8 * 4) - 1},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_is_launched(monkeypatch, case):
    recorded = []
    monkeypatch.setattr(_launches, "_launch", lambda *launch: recorded.append(launch) or launch[-1][0])
    monkeypatch.setattr(plan, "has_warp_instructions", lambda device: case.get("warps", True))
    monkeypatch.setattr(torch.Tensor, "contiguous", _contiguous)
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = _arguments(**{name: what for name, what in case.items() if name not in ("launched", "warps")})
        output = _launches._launched(_launches.problem_of(*arguments))
    assert (output is not None) == case.get("launched", True) == bool(recorded)
    if not recorded:
        return
    (kernel, _, grid, launch), value, points = recorded[0], arguments[0], arguments[3]
    assert output.shape == (*points.shape[:2], value.shape[2] * value.shape[3])
    assert grid[0] >= value.shape[0]
    for name, tensor in zip(kernel.arg_names, launch, strict=True):
        if isinstance(tensor, torch.Tensor):
            assert tensor.is_contiguous(), name
            assert tensor.device == value.device, name
    named = dict(zip(kernel.arg_names, launch, strict=True))
    assert (named["mask_ptr"] is not None) == case.get("mask", False) == named["HAS_MASK"]
    assert (named["REFERENCE_LEVELS"], named["REFERENCE_SIZE"]) == case.get("references", (1, 0))
    assert not named["HAS_MASK"] or named["mask_ptr"].dtype == torch.uint8
    assert named["num_pixels"] == value.shape[1]


def _contiguous(tensor):
    """That of PyTorch asks for the GPU."""
    return tensor if tensor.is_contiguous() else tensor.clone(memory_format=torch.contiguous_format)


def _arguments(
    sizes=(4, 5, 2, 3), num_points=(1, 2), head_dim=8, num_queries=7, dtype=torch.float32, points_dtype=torch.float32,
    shapes=None, strides=None, offset=0, references=None, mask=False, batch_second=False,
):  # fmt: skip
    """Those of the fused operator, on a GPU that is not there."""
    pixels = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    shape = (2, pixels, 4, head_dim)
    strides = strides or (pixels * 4 * head_dim, 4 * head_dim, head_dim, 1)
    memory = torch.empty(2 * pixels * 4 * head_dim + offset, dtype=dtype, device="cuda")
    value = torch.as_strided(memory, shape, strides, offset)

    def empty(*shape, dtype=points_dtype):
        if batch_second:
            return torch.empty(shape[0], 2, *shape[1:], dtype=dtype, device="cuda").transpose(0, 1)
        return torch.empty(2, *shape, dtype=dtype, device="cuda")

    points, weights = empty(num_queries, 4, sum(num_points), 2), empty(num_queries, 4, sum(num_points))
    reference_points = None if references is None else empty(num_queries, *references)
    value_mask = empty(pixels, dtype=torch.bool) if mask else None
    sizes = None if shapes is not None else sizes
    return value, shapes, sizes, points, weights, reference_points, value_mask, num_points, "zeros", False


@pytest.mark.parametrize(("first", "at_once"), [(0, True), (2, True), (1, False)])
def test_coordinates_that_begin_anywhere_are_read_one_by_one(monkeypatch, first, at_once):
    recorded = []
    monkeypatch.setattr(_launches, "_launch", lambda *launch: recorded.append(launch))
    monkeypatch.setattr(plan, "has_warp_instructions", lambda device: True)
    with FakeTensorMode():
        arguments = list(_arguments())
        points = arguments[3]
        arguments[3] = torch.empty(points.numel() + first, device="cuda").as_strided(
            points.shape, points.stride(), first
        )
        _launches._launched(_launches.problem_of(*arguments))
    kernel, _, _, launch = recorded[0]
    assert dict(zip(kernel.arg_names, launch, strict=True))["XY_IN_ONE_WORD"] == at_once


def test_without_samples_the_output_is_zero():
    with FakeTensorMode(allow_non_fake_inputs=True):
        arguments = _arguments(num_points=(0, 0), shapes=torch.tensor([[4, 5], [2, 3]]))
        assert _launches._launched(_launches.problem_of(*arguments)).shape == (2, 7, 32)


def test_nearest_sampling_is_left_to_operators_of_pytorch(launches, monkeypatch):
    def lowered(value, shapes, sizes, points, *others):
        return value.new_zeros(points.shape[0], points.shape[1], value.shape[2] * value.shape[3])

    monkeypatch.setattr(_launches._standard, "ms_deform_attn", lowered)
    found, operators = launches(_samples.ms_deform_attn((2, 3, 1), "nearest"), labels=("batch",))
    assert not found
    assert "aten.new_zeros.default" in operators


@pytest.mark.parametrize("make", [_samples.ms_deform_attn, _samples.msdeformattn], ids=["plain", "fused"])
def test_the_text_that_inductor_takes_is_the_whole_kernel(launches, make, tmp_path):
    """Inductor collects a kernel's helpers by their names, so no two that differ may share one."""
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
