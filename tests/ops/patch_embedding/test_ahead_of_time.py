"""The kernel compiled for GPUs that are not here, with exactly the arguments that a launch would hand over."""

import importlib.util
import os
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from triton.backends.compiler import GPUTarget  # noqa: E402

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under the interpreter nothing can be compiled"
)

SCRIPT = Path(__file__).parents[3] / "scripts" / "kernel_budget.py"
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TARGETS = {f"sm_{number}": GPUTarget("cuda", number, 32) for number in (80, 90, 100)}
TARGETS["gfx942"] = GPUTarget("hip", "gfx942", 64)
SHARED_MEMORY = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "gfx942": 64}  # KiB that a program may have


@pytest.fixture(scope="module")
def budget():
    spec = importlib.util.spec_from_file_location("kernel_budget", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def record(budget, monkeypatch):
    """A function that gives the launch of a call: the kernel, its arguments and options."""
    from visionkernels.ops.patch_embedding import kernels, launch

    launches = []
    monkeypatch.setattr(kernels, "_patch_embedding_kernel", budget.Recorder(kernels._patch_embedding_kernel, launches))

    def call(batch=1, side=224, size=16, channels=768, dtype=F16, pixels=None, channels_last=False, tile=None):
        shape = (batch, side, side, 3) if channels_last else (batch, 3, side, side)
        images = torch.empty(shape, dtype=pixels or dtype)
        weight = torch.empty(channels, 3, size, size, dtype=dtype)
        patches = (side // size) ** 2
        tables = (torch.empty(n, dtype=dtype).view(*shape) for n, shape in (
            (channels, (-1,)), (patches * channels, (patches, -1)), (channels, (1, -1)),
        ))  # fmt: skip
        norm = [[0.5] * 3] * 2 if pixels == torch.uint8 else [None, None]
        launches.clear()
        launch.forward(images, weight, *tables, *norm, channels_last, tile)
        return launches[0]

    return call


def check(budget, recorded, target):
    """It compiles, spills nothing, and its shared memory is there."""
    kernel = budget.compile_launch(recorded, TARGETS[target])
    assert budget.measure(kernel)["stack"] == 0
    assert kernel.metadata.shared <= SHARED_MEMORY[target] * 1024
    return kernel


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("pixels", [F16, torch.uint8], ids=["float16", "uint8"])
@pytest.mark.parametrize("target", TARGETS)
def test_targets(budget, record, target, pixels, batch):
    """Every tile that is chosen."""
    check(budget, record(batch, pixels=pixels), target)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
def test_dtypes(budget, record, target, dtype):
    check(budget, record(dtype=dtype), target)
    check(budget, record(32, dtype=dtype, pixels=F32), target)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [8, 14, 16, 32])
def test_patch_sizes(budget, record, size, channels_last):
    """16 bytes a lane, or the two pixels that patches of 14 begin at; copied while the step before is computed."""
    ptx = check(budget, record(32, size=size, channels_last=channels_last), "sm_90").asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx
    assert not re.search(r"ld\.global\.(b8|b16)", ptx)


def test_dependent_launch(budget, record):
    from visionkernels.ops.patch_embedding import launch

    recorded = record(tile=launch.Tile(64, 64, 64, 4, 4, early=True))
    assert recorded[2]["launch_pdl"]
    ptx = check(budget, recorded, "sm_90").asm["ptx"]
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_another_size_is_no_other_kernel(budget, record, channels_last):
    from visionkernels.ops.patch_embedding import launch

    tile = launch.Tile(64, 64, 64, 4, 4)
    kinds = {
        repr(budget.specialise(record(batch, side, channels_last=channels_last, tile=tile)))
        for batch in (1, 2, 16, 17)
        for side in (16, 32, 224, 240)
    }
    assert len(kinds) == 1
