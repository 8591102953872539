"""The kernel compiled for GPUs that are not here, with exactly the arguments that a launch would hand over."""

import re

import pytest
import torch
from inference_tools import DEVICES, NOT_INTERPRETED, TARGETS, budget, compile_and_check, launches_of

pytest.importorskip("triton", reason="Triton is not installed")

pytestmark = NOT_INTERPRETED

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.fixture
def record(monkeypatch):
    """A function that gives the launch of a call: the kernel, its arguments and options."""
    from visionkernels.ops.patch_embedding import kernels, launch

    def record(
        batch=1, side=224, size=16, channels=768, dtype=F16, pixels=None, channels_last=False, tile=None, target="sm_80"
    ):  # fmt: skip
        monkeypatch.setattr(launch, "device_of", lambda device: DEVICES[target])
        shape = (batch, side, side, 3) if channels_last else (batch, 3, side, side)
        images = torch.empty(shape, dtype=pixels or dtype)
        weight = torch.empty(channels, 3, size, size, dtype=dtype)
        patches = (side // size) ** 2
        tables = [torch.empty(n, dtype=dtype).view(*shape) for n, shape in (
            (channels, (-1,)), (patches * channels, (patches, -1)), (channels, (1, -1)),
        )]  # fmt: skip
        norm = [[0.5] * 3] * 2 if pixels == torch.uint8 else [None, None]
        call = lambda: launch.forward(images, weight, *tables, *norm, channels_last, tile)  # noqa: E731
        (recorded,) = launches_of(kernels, call)
        return recorded

    return record


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize("pixels", [F16, torch.uint8], ids=["float16", "uint8"])
@pytest.mark.parametrize("target", TARGETS)
def test_targets(record, target, pixels, batch):
    """Every tile that is chosen."""
    compile_and_check(record(batch, pixels=pixels, target=target), target)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
def test_dtypes(record, target, dtype):
    compile_and_check(record(dtype=dtype, target=target), target)
    compile_and_check(record(32, dtype=dtype, pixels=F32, target=target), target)


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [8, 14, 16, 32])
def test_patch_sizes(record, size, channels_last):
    """16 bytes a lane, or the two pixels that patches of 14 begin at; copied while the step before is computed."""
    ptx = compile_and_check(record(32, size=size, channels_last=channels_last, target="sm_90"), "sm_90").asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async" in ptx
    assert not re.search(r"ld\.global\.(b8|b16)", ptx)


def test_dependent_launch(record):
    from visionkernels.ops.patch_embedding import launch

    recorded = record(tile=launch.Tile(64, 64, 64, 4, 4, early=True))
    assert recorded[2]["launch_pdl"]
    ptx = compile_and_check(recorded, "sm_90").asm["ptx"]
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
def test_another_size_is_no_other_kernel(record, channels_last):
    from visionkernels.ops.patch_embedding import launch

    tile = launch.Tile(64, 64, 64, 4, 4)
    kinds = {
        repr(budget().specialise(record(batch, side, channels_last=channels_last, tile=tile)))
        for batch in (1, 2, 16, 17)
        for side in (16, 32, 224, 240)
    }
    assert len(kinds) == 1
