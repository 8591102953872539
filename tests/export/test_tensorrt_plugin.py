"""The plugin with our own kernel: shapes, formats, launch and PTX, with a stand-in for tensorrt.plugin."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from visionkernels.errors import UserError
from visionkernels.export import tensorrt_plugin

pytest.importorskip("triton")


@pytest.fixture
def registered(monkeypatch):
    """What the plugin registers with a stand-in for TensorRT."""
    found = {}

    def keep(kind):
        def decorator(plugin_id):
            assert plugin_id == "visionkernels::ms_deform_attn"
            return lambda function: found.setdefault(kind, function)

        return decorator

    trtp = ModuleType("tensorrt.plugin")
    trtp.TensorDesc = type("TensorDesc", (), {})
    trtp.register, trtp.autotune, trtp.aot_impl = keep("register"), keep("autotune"), keep("aot_impl")
    trtp.from_shape_expr = lambda shape, dtype: (shape, dtype)
    trtp.AutoTuneCombination = lambda *arguments: arguments
    trtp.cdiv = lambda a, b: -(-a // b)
    trtp.KernelLaunchParams = SimpleNamespace
    trtp.SymIntExprs = lambda count: [None] * count
    trtp.SymInt32 = lambda value: ("i32", value)
    tensorrt = ModuleType("tensorrt")
    tensorrt.plugin = trtp
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", trtp)
    monkeypatch.setattr(tensorrt_plugin, "_arch", lambda: 90)
    tensorrt_plugin.register()
    return found


def tensors(dtype: str):
    def tensor(shape, dtype):
        return SimpleNamespace(shape=shape, shape_expr=shape, dtype=dtype)

    value, shapes = tensor((2, 63, 8, 32), dtype), tensor((3, 2), "DataType.INT32")
    return value, shapes, tensor((2, 7, 8, 12, 2), "DataType.FLOAT"), tensor((2, 7, 8, 12), dtype)


def test_the_output_has_queries_of_the_locations_and_the_dtype_of_the_value(registered):
    assert registered["register"](*tensors("DataType.HALF"), [3, 6, 3]) == ((2, 7, 8, 32), "DataType.HALF")
    assert "num_points" in registered["register"].__annotations__


def test_coordinates_are_float32_in_every_format(registered):
    combinations = registered["autotune"](*tensors("DataType.HALF"), [3, 6, 3], ())
    assert [layout for _, layout in combinations] == ["LINEAR"] * 2
    for types in (formats.split(", ") for formats, _ in combinations):
        assert types[1:3] == ["INT32", "FP32"]
        assert types[0] == types[3] == types[4]


@pytest.mark.parametrize("dtype", ["DataType.HALF", "DataType.FLOAT"])
def test_the_kernel_is_compiled_and_launched_over_all_rows(registered, dtype):
    name, ptx, launch, sizes = registered["aot_impl"](*tensors(dtype), [3, 6, 3], (), None)
    entry = re.search(rf"\.entry {name}\((.*?)\n\)", ptx, re.DOTALL)
    parameters = [line.split()[1] for line in entry.group(1).strip().splitlines()]
    assert parameters == [".u64"] * 4 + [".u32"] * 3 + [".u64"]
    assert sizes == [("i32", 2), ("i32", 63), ("i32", 7)]
    kernel = tensorrt_plugin.compile_kernel(8, 32, (3, 6, 3), "HALF" in dtype, 90)
    assert launch.grid_x * kernel.queries >= 2 * 7 > (launch.grid_x - 2) * kernel.queries
    assert launch.grid_y * kernel.heads == 8
    assert launch.block_x == 32 * kernel.num_warps
    assert f".reqntid {launch.block_x}" in ptx


def test_a_parameter_that_is_used_is_not_dropped():
    ptx = ".entry k(\n\t.param .u64 k_param_0,\n\t.param .u64 k_param_1\n)\n{ ld.param.b64 %rd1, [k_param_0]; }"
    assert "k_param_1" not in tensorrt_plugin.keep_parameters(ptx, "k", 1)
    assert "k_param_0" in tensorrt_plugin.keep_parameters(ptx, "k", 1)
    used = ptx.replace("[k_param_0]", "[k_param_1]")
    with pytest.raises(RuntimeError, match="uses k_param_1"):
        tensorrt_plugin.keep_parameters(used, "k", 1)


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", None)
    with pytest.raises(UserError, match=r"tensorrt.plugin is not installed here: .* 10.6 and later"):
        tensorrt_plugin.register()


NUMBERS = """
import torch
from helpers import Case, make_inputs
from visionkernels.export._triton_plugin import ms_deform_attn_kernel
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn

torch.manual_seed(0)
case = Case(num_points=(3, 1), heads=2, head_dim=4)
value, locations, weights = (tensor.detach() for tensor in make_inputs(case))
shapes, output = torch.tensor(case.shapes, dtype=torch.int32), torch.full((2, 3, 2, 4), torch.nan)
ms_deform_attn_kernel[(2 * 2, 2, 1)](
    value, shapes, locations, weights, 2, value.shape[1], 3, output,
    NUM_HEADS=2, HEAD_DIM=4, NUM_LEVELS=2, NUM_SAMPLES=4, NUM_POINTS=(3, 1), FIRST_POINT=(0, 3),
    ROWS=2, HEADS=1, BLOCK_D=4, UNROLL=2, ALIGNMENT=4,
)
truth = reference_ms_deform_attn(value, case.shapes, locations, weights, [3, 1])
torch.testing.assert_close(output.flatten(2), truth)
"""


def test_the_kernel_computes_the_operator_under_the_interpreter():
    tests = str(Path(__file__).resolve().parents[1])
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-c", NUMBERS], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
