"""The kernels compiled for GPUs that are not here, with exactly the arguments that a launch would hand over.

A kernel that stops compiling for one of them is caught, and so is one that spills registers or reads narrowly.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import Case, make_fused_inputs, make_inputs

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from visionkernels.ops.deformable_attention import kernels, launch  # noqa: E402
from visionkernels.ops.deformable_attention.problem import Problem  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter nothing can be compiled"
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {F32: "fp32", F16: "fp16", BF16: "bf16", torch.float64: "fp64",
         torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip


class Recorder:
    """Stands in for a kernel and keeps what it is launched with."""

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.arguments, self.options = arguments, options

        return launch


def compiled(monkeypatch, target, *, backward=False, fused=False, dtype=F16, head_dim=32, tensor_shapes=False):
    """The kernel of one direction as an encoder's call launches it: four levels, eight heads, float32 coordinates."""
    case = Case(
        shapes=((12, 16), (6, 8), (3, 4), (2, 2)), batch=2, queries=5, heads=8, head_dim=head_dim, num_points=4,
        dtype=dtype, location_dtype=F32, reference_levels=4, masked=fused,
    )  # fmt: skip
    if fused:
        (value, references, points, weights), mask = make_fused_inputs(case)
    else:
        (value, points, weights), references, mask = make_inputs(case), None, None
    shapes = torch.tensor(case.shapes) if tensor_shapes else None
    sizes = () if tensor_shapes else tuple(size for shape in case.shapes for size in shape)
    inputs = [None if t is None else t.detach() for t in (points, weights, references, mask)]
    problem = Problem(value.detach(), shapes, sizes, *inputs, tuple(case.points))
    name = "_backward_kernel" if backward else "_forward_kernel"
    kernel, recorder = getattr(kernels, name), Recorder()
    with monkeypatch.context() as patch:
        patch.setattr(kernels, name, recorder)
        if backward:
            output = torch.zeros(2, 5, 8 * head_dim, dtype=dtype)
            launch.backward(problem, output, output if fused else None, True, True, fused)
        else:
            launch.forward(problem)
    return triton.compile(source(kernel, recorder.arguments), target=TARGETS[target], options=recorder.options)


def source(kernel, arguments):
    """What Triton compiles for these arguments: their types, what is constant, and what is a multiple of 16."""
    signature, constants, attributes = {}, {}, {}
    for index, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or argument is None or (specialised and type(argument) is int and argument == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", argument
            continue
        if isinstance(argument, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[argument.dtype]
            multiple = argument.data_ptr() % 16 == 0
        elif isinstance(argument, tuple):
            signature[parameter.name], multiple = ("i32",) * len(argument), False
        else:
            signature[parameter.name], multiple = "i32", argument % 16 == 0
        if specialised and multiple:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def stack_bytes(kernel, tmp_path):
    """Memory that a thread spills to, or keeps arrays in."""
    if "amdgcn" in kernel.asm:
        return int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", kernel.asm["amdgcn"])[1])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    dump = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    return int(re.search(r"STACK:(\d+)", dump.stdout)[1])


def reads_widely(kernel):
    """A lane reads 16 bytes of a pixel; half of that where a warp has 64 lanes, for which a tile is as large."""
    if "amdgcn" in kernel.asm:
        return re.search(r"(global|buffer|flat)_load_dwordx[24]", kernel.asm["amdgcn"]) is not None
    return re.search(r"ld\.global[\w.:]*\.v4\.[bu]32", kernel.asm["ptx"]) is not None


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target(monkeypatch, tmp_path, target, backward, fused):
    kernel = compiled(monkeypatch, target, backward=backward, fused=fused)
    assert stack_bytes(kernel, tmp_path) == 0
    assert reads_widely(kernel) or backward  # the backward's lanes hold as many channels as an atomic adds


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_other_dtypes(monkeypatch, tmp_path, backward, dtype):
    kernel = compiled(monkeypatch, "sm_90", backward=backward, dtype=dtype)
    assert stack_bytes(kernel, tmp_path) == 0
    assert reads_widely(kernel) or backward


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_head_dim_that_is_no_power_of_two(monkeypatch, tmp_path, backward):
    """Pixels of 60 bytes begin at multiples of four only."""
    kernel = compiled(monkeypatch, "sm_90", backward=backward, head_dim=30)
    assert stack_bytes(kernel, tmp_path) == 0


def test_shapes_in_device_memory(monkeypatch, tmp_path):
    kernel = compiled(monkeypatch, "sm_90", tensor_shapes=True)
    assert stack_bytes(kernel, tmp_path) == 0
    assert reads_widely(kernel)


def test_the_gradient_of_value_is_added_by_vectors(monkeypatch):
    assert re.search(r"(atom|red)\.\w[\w.:]*\.v4\.f32", compiled(monkeypatch, "sm_90", backward=True).asm["ptx"])
