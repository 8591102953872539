"""The kernel of layer normalisation under the interpreter, compiled for GPUs that are not here, and its launch rule."""

import re
from pathlib import Path

import pytest
import torch
from inference_tools import (
    INTERPRET,
    NOT_INTERPRETED,
    TARGETS,
    compile_launch,
    launches_of,
    run_under_the_interpreter,
    stack_of,
)

HERE = Path(__file__).parent
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16


@pytest.mark.slow
@NOT_INTERPRETED
def test_under_the_interpreter():
    run_under_the_interpreter([HERE / "test_op.py", HERE / "test_torch_integration.py"], at_least=100)


@pytest.fixture
def launch():
    pytest.importorskip("triton", reason="Triton is not installed")
    from visionkernels.ops.layer_norm import launch

    return launch


def launches(launch, rows, channels, dtype=F16, add=True, tile=None):
    x, w = torch.zeros(rows, channels, dtype=dtype), torch.zeros(channels, dtype=dtype)
    call = lambda: launch.layer_norm(x, w, w, 1e-6, "triton", tile)  # noqa: E731
    if add:
        call = lambda: launch.add_layer_norm(x, x, w, w, 1e-6, w, "triton", tile)  # noqa: E731
    return launches_of(launch.kernels, call)


@NOT_INTERPRETED
@pytest.mark.parametrize("add", [False, True], ids=["alone", "add"])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=["fp16", "bf16", "fp32", "fp64"])
@pytest.mark.parametrize("target", TARGETS)
def test_ahead_of_time(launch, target, dtype, add):
    for channels in (768, 100):
        (recorded,) = launches(launch, 4096, channels, dtype, add)
        compiled = compile_launch(recorded, target)
        assert stack_of(compiled) == 0
    if target != "gfx942" and dtype != F64:
        (recorded,) = launches(launch, 4096, 768, dtype, add)
        compiled = compile_launch(recorded, target)
        # Every access to rows, weight and bias is one of 16 bytes.
        accesses = re.findall(r"(?:ld|st)\.global[\w.:]*", compiled.asm["ptx"])
        assert accesses
        assert all(access.endswith((".v4.b32", ".v4.u32", ".v2.b64", ".v2.u64")) for access in accesses)


@NOT_INTERPRETED
@pytest.mark.parametrize("channels", [1, 192, 1280, 8192])
def test_wide_and_narrow_rows(launch, channels):
    for rows in (1, 50432):
        (recorded,) = launches(launch, rows, channels)
        assert stack_of(compile_launch(recorded, "sm_90")) == 0


@NOT_INTERPRETED
def test_launched_early(launch):
    """Programmatic dependent launch: the kernel waits before it touches memory."""
    (recorded,) = launches(launch, 197, 768, tile=launch.Tile(1, 1, 4, early=True))
    assert recorded[2]["launch_pdl"]
    ptx = compile_launch(recorded, "sm_90").asm["ptx"]
    assert ptx.index("griddepcontrol.launch_dependents") < ptx.index("griddepcontrol.wait") < ptx.index("ld.global")


@NOT_INTERPRETED
def test_another_number_of_rows_is_no_other_kernel(launch):
    """But for the few rows that are spread over more warps."""
    kinds = {repr((recorded[1][11:], recorded[2])) for n in range(600, 700) for recorded in launches(launch, n, 768)}
    assert len(kinds) == 1


@pytest.mark.skipif(INTERPRET, reason="no tile is chosen by hand there")
@pytest.mark.parametrize("rows", [1, 197, 527, 528, 50432])
@pytest.mark.parametrize("channels", [1, 100, 384, 768, 1024, 1152, 5000, 32768])
def test_a_lane_holds_no_more_than_64_values(launch, rows, channels):
    tile = launch.tile_of(rows, channels, launch.Device(132, (9, 0)))
    values = tile.rows * launch.next_power_of_2(channels) / (32 * tile.num_warps)
    assert values <= 64 or channels > 16384
    assert tile.num_warps <= 32


def test_rows_that_fit_in_no_registers_are_pytorchs(launch):
    x = torch.zeros(2, launch.MAX_CHANNELS + 1)
    assert not launch.pays(x)
    with pytest.raises(ValueError, match=r"^input must have at most 32768 channels .*got 32769; pass backend="):
        launch.layer_norm(x, None, None, 1e-5, "triton")
    assert launch.layer_norm(x, None, None, 1e-5, "auto").shape == x.shape
