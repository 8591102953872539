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
    from visionkernels.ops.attention import kernels, launch

    def record(
        batch=1, tokens=197, heads=12, head_dim=64, dtype=F16, form="plain", tile=None, hopper=True, packed=True,
        prefix=1,
    ):  # fmt: skip
        monkeypatch.setattr(launch, "device_of", lambda device: DEVICES["sm_90" if hopper else "sm_80"])
        qkv = torch.zeros(batch, tokens, 3, heads, head_dim, dtype=dtype).unbind(2)
        if not packed:
            qkv = [x.contiguous() for x in qkv]
        bias = torch.zeros(heads, tokens, tokens, dtype=dtype) if form == "bias" else None
        rotary = (torch.zeros(tokens - prefix, head_dim),) * 2 if form == "rotary" else (None, None)
        window = (1, tokens, 1, tokens) if form == "window" else None
        prefixed = prefix if form == "rotary" else 0
        call = lambda: launch.forward(*qkv, 0.125, bias, *rotary, prefixed, window, tile)  # noqa: E731
        (recorded,) = launches_of(kernels, call)
        return recorded

    return record


@pytest.mark.parametrize("form", ["plain", "bias", "rotary", "window"])
@pytest.mark.parametrize("target", TARGETS)
def test_targets(record, target, form):
    compile_and_check(record(form=form, hopper=target == "sm_90"), target)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", TARGETS)
def test_dtypes(record, target, dtype):
    compile_and_check(record(dtype=dtype, hopper=target == "sm_90"), target)


@pytest.mark.parametrize("form", ["plain", "rotary"])
@pytest.mark.parametrize("dtype", [F32, F16], ids=["float32", "float16"])
@pytest.mark.parametrize("head_dim", [16, 24, 80, 128])
def test_head_dims(record, head_dim, dtype, form):
    compile_and_check(record(head_dim=head_dim, dtype=dtype, form=form), "sm_90")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize(
    "shape", [(1, 1370, 64), (32, 1370, 64), (128, 197, 64), (32, 257, 80), (4, 1025, 128)], ids=str
)
def test_large_sizes(record, shape, target):
    batch, tokens, head_dim = shape
    compile_and_check(record(batch, tokens, head_dim=head_dim, hopper=target == "sm_90"), target)


@pytest.mark.parametrize("tokens", [197, 1370])
def test_reads_are_wide_and_ahead(record, tokens):
    """16 bytes a lane, copied while the step before is computed; products by whole warp groups."""
    kernel = compile_and_check(record(128, tokens), "sm_90")
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    assert (
        re.search(r"cp\.async\.cg\.shared\.global .*, 0x10", kernel.asm["ptx"]) or "cp.async.bulk" in kernel.asm["ptx"]
    )
    assert not re.search(r"ld\.global\.b16", kernel.asm["ptx"])


def test_dependent_launch(record):
    from visionkernels.ops.attention import launch

    recorded = record(tile=launch.Tile(64, 32, 4, 3, early=True))
    assert recorded[2]["launch_pdl"]
    ptx = compile_and_check(recorded, "sm_90").asm["ptx"]
    assert ptx.index("griddepcontrol.wait") < ptx.index("griddepcontrol.launch_dependents")


@pytest.mark.parametrize("form", ["plain", "bias", "rotary", "window"])
def test_another_size_is_no_other_kernel(record, form):
    """Nor are another batch, another number of heads or tensors that are not packed."""
    from visionkernels.ops.attention import launch

    tile = launch.Tile(64, 32, 4, 3)
    kinds = {
        repr(budget().specialise(record(batch, tokens, heads, form=form, tile=tile, packed=packed)))
        for batch in (1, 2, 16)
        for tokens in (2, 16, 17, 197)
        for heads in (1, 3, 16)
        for packed in (True, False)
    }
    assert len(kinds) == 1
