"""The kernels of linear layers under the interpreter, compiled for GPUs that are not here, and the rule of tiles."""

from pathlib import Path

import pytest
import torch
from helpers import assert_accurate
from inference_tools import (
    DEVICES,
    INTERPRET,
    NOT_INTERPRETED,
    TARGETS,
    WAYS,
    compile_and_check,
    compile_launch,
    launches_of,
    run_under_the_interpreter,
    stack_of,
)

from visionkernels.ops.linear import tiles
from visionkernels.ops.linear.reference import reference_gated_linear, reference_linear
from visionkernels.ops.linear.tiles import Tile, tile_of

pytest.importorskip("triton", reason="Triton is not installed")

from visionkernels.ops.linear import launch

HERE = Path(__file__).parent
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
DTYPES = {"half": [F16, BF16], "tf32": [F32], "exact": [F32], "double": [F64]}
H200, A100, OTHER = DEVICES["sm_90"], DEVICES["sm_80"], DEVICES["gfx942"]


@pytest.mark.slow
@NOT_INTERPRETED
def test_under_the_interpreter():
    names = ("test_op.py", "test_torch_integration.py", "test_kernels.py")
    run_under_the_interpreter([HERE / name for name in names], at_least=150)


def launched(dtype, kind, gated, tile, activation="gelu", rest=True, device=H200):
    """The launch of a tile on a device, with everything that may follow the product, or nothing."""
    x, weight = torch.zeros(64, 256, dtype=dtype), torch.zeros(512 if gated else 256, 256, dtype=dtype)
    bias = torch.zeros(weight.shape[0], dtype=dtype)
    precision = "tf32" if kind == "tf32" else "ieee"
    if gated:
        call = lambda: launch.gated_linear(x, weight, bias, activation, precision, "triton", tile)  # noqa: E731
    else:
        residual, scale = (x, bias) if rest else (None, None)
        call = lambda: launch.linear(x, weight, bias, activation, residual, scale, precision, "triton", tile)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "device_of", lambda _: device)
        (recorded,) = launches_of(launch.kernels, call)
    return recorded


@NOT_INTERPRETED
@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("kind", tiles.TILES)
@pytest.mark.parametrize("target", TARGETS)
def test_ahead_of_time(target, kind, gated):
    """Every tile of the tables, for every GPU that it may run on: no register is spilled, and all of it fits."""
    for tile in tiles.TILES[kind][2 * (target == "sm_90") + gated]:
        for dtype in DTYPES[kind][: 2 if target == "sm_90" else 1]:
            compiled = compile_and_check(launched(dtype, kind, gated, tile, device=DEVICES[target]), target, tile)
            if target.startswith("sm"):  # one instruction in place of a division and an exponential
                assert ("tanh.approx.f32" in compiled.asm["ptx"]) == (kind == "half"), tile
            matrix = {"sm_80": "mma.sync", "sm_90": "mma", "sm_100": "mma"}.get(target)
            if matrix and kind in ("half", "tf32"):
                assert matrix in compiled.asm["ptx"], tile


@NOT_INTERPRETED
@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (5, 0, 8), (3, 17, 33)], ids=str)
def test_odd_sizes_ahead_of_time(sizes, gated):
    """Triton makes a constant of an argument that is 1, and then it has no methods of a tensor."""
    rows, channels, features = sizes
    x, weight = torch.zeros(rows, channels, dtype=F16), torch.zeros(features * (1 + gated), channels, dtype=F16)
    bias, residual = weight.new_zeros(weight.shape[0]), torch.zeros(rows, features, dtype=F16)
    call = lambda: launch.linear(x, weight, bias, "silu", residual, bias, "ieee", "triton")  # noqa: E731
    if gated:
        call = lambda: launch.gated_linear(x, weight, bias, "silu", "ieee", "triton")  # noqa: E731
    (recorded,) = launches_of(launch.kernels, call)
    assert stack_of(compile_launch(recorded, "sm_90")) == 0


@NOT_INTERPRETED
def test_large_tiles_are_multiplied_by_whole_warp_groups():
    """And what TMA reads, it alone reads."""
    for tile in tiles.HOPPER:
        for rest in (False, True):
            ptx = compile_launch(launched(F16, "half", False, tile, None, rest), "sm_90").asm["ptx"]
            assert ("wgmma.mma_async" in ptx) == (tile.block_m >= 64)
            assert ("cp.async.bulk.tensor" in ptx) == tile.tma
            assert ("cp.async.cg" in ptx) != tile.tma


@NOT_INTERPRETED
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_launched_early(tma):
    """Programmatic dependent launch: the kernel waits before it reads more than lines of the weight into the cache."""
    tile = Tile(64, 64, 64, 4, 3, tma=tma, early=True)
    recorded = launched(F16, "half", False, tile)
    assert recorded[2]["launch_pdl"]
    ptx = compile_launch(recorded, "sm_90").asm["ptx"]
    body = ptx[ptx.index("griddepcontrol.launch_dependents") :]
    reads = min(body.find(read) for read in ("cp.async.cg", "cp.async.bulk", "ld.global") if read in body)
    assert body.index("griddepcontrol.wait") < reads
    assert tma or body.index("prefetch.global.L2") < body.index("griddepcontrol.wait")
    assert not any(read in ptx[: ptx.index("griddepcontrol.launch")] for read in ("cp.async", "ld.global"))


@WAYS
@pytest.mark.parametrize("gated", [False, True], ids=["linear", "gated"])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["tf32", "fp16"])
def test_the_kernel_for_tma(device, backend, dtype, parts, gated):
    """Several tiles a program, and neither rows nor columns nor channels a multiple of the tile."""
    if backend != "triton":
        pytest.skip("a kernel of its own")
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("the GPU has no TMA")
    rows, channels, features = (100, 48, 72) if device == "cpu" else (5000, 776, 1032)
    tile = Tile(16, 32, 32, 4, 2, tma=True, parts=parts, group_m=2)
    if device == "cuda":
        tile = Tile(128, 128, 64, 8, 3, tma=True, parts=parts, group_m=2) if dtype == F16 else tiles.HOPPER_TF32[0]
    x, residual = torch.randn(rows, channels), torch.randn(rows, features)
    weight, bias = torch.randn(features * (1 + gated), channels) / channels**0.5, torch.randn(features * (1 + gated))
    tensors = [tensor.to(device, dtype) for tensor in (x, weight, bias, residual, bias[:features])]
    x, weight, bias, residual, scale = tensors
    wide = [tensor.double() for tensor in tensors]
    if gated:
        got = launch.gated_linear(x, weight, bias, "silu", "tf32", "triton", tile)
        truth = reference_gated_linear(*wide[:3])
    else:
        got = launch.linear(x, weight, bias, "gelu", residual, scale, "tf32", "triton", tile)
        truth = reference_linear(*wide[:3], "gelu", *wide[3:])
    if dtype == F32:
        short = [(tensor.view(torch.int32) & ~0x1FFF).view(F32) for tensor in (x, weight)]
    else:
        short = [x, weight]
    eager = reference_gated_linear(*short, bias)
    if not gated:
        eager = reference_linear(*short, bias, "gelu", residual, scale)
    assert_accurate("output", got, truth, eager)


@pytest.mark.skipif(INTERPRET, reason="no tile is chosen there")
def test_few_rows_take_small_tiles_and_many_rows_large_ones():
    for device in (H200, A100, OTHER):
        for columns in (768, 2304, 3072):
            areas = [(t := tile_of(rows, columns, device)).block_m * t.block_n for rows in (1, 197, 1576, 50432)]
            assert areas[0] < areas[-1]
            assert areas[-1] >= 128 * 128
            few = tile_of(197, columns, device)
            assert -(-197 // few.block_m) * -(-columns // few.block_n) >= 24
    assert tile_of(1, 1000, H200).block_m == 16


@pytest.mark.skipif(INTERPRET, reason="no tile is chosen there")
def test_tma_is_for_compute_capability_9_and_tensors_that_lie_for_it():
    for kind, kinds in tiles.TILES.items():
        for gated in (False, True):
            assert tile_of(50432, 768, H200, kind=kind, gated=gated).tma == (kind in ("half", "tf32"))
            assert not tile_of(50432, 768, H200, kind=kind, gated=gated, tma=False).tma
            for device in (A100, OTHER, DEVICES["sm_100"]):
                assert not tile_of(50432, 768, device, kind=kind, gated=gated).tma
        assert len(kinds) == 4
    x = torch.zeros(8, 64, dtype=F16)
    assert launch.tma_reads(x)
    assert launch.tma_reads(x[:, 8:])
    for view in (x[:, 1:], x.flatten()[4:].unfold(0, 8, 12), x[:1].expand(8, 64), x[:0], x[:, ::16]):
        assert not launch.tma_reads(view)


@NOT_INTERPRETED
def test_another_number_of_rows_is_no_other_kernel():
    """But for the tiles, of which there is a handful."""
    weight, found = torch.zeros(768, 768, dtype=F16), set()
    for rows in range(1, 4000, 37):
        x = torch.zeros(rows, 768, dtype=F16)
        call = lambda x=x: launch.linear(x, weight, None, None, None, None, "ieee", "triton")  # noqa: E731
        (recorded,) = launches_of(launch.kernels, call)
        found.add(repr((recorded[0].__name__, recorded[1][12:], recorded[2])))
    assert len(found) <= len(tiles.PORTABLE)


def test_what_auto_takes():
    half, single, double = (torch.zeros(1, dtype=dtype) for dtype in (F16, F32, F64))
    assert launch.pays(half, "ieee", fused=True)
    assert launch.pays(single, "tf32", fused=True)
    assert not launch.pays(half, "ieee", fused=False)
    assert not launch.pays(single, "ieee", fused=True)
    assert not launch.pays(double, "tf32", fused=True)
