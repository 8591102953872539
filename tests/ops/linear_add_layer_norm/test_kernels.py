"""The kernel that multiplies in parts: interpreted, compiled for GPUs that are not here, and when it is taken."""

import re
from pathlib import Path

import pytest
import torch
from inference_tools import (
    DEVICES,
    INTERPRET,
    NOT_INTERPRETED,
    TARGETS,
    compile_and_check,
    compile_launch,
    launches_of,
    run_under_the_interpreter,
    stack_of,
)

pytest.importorskip("triton", reason="Triton is not installed")

from visionkernels.ops.linear_add_layer_norm import launch
from visionkernels.ops.linear_add_layer_norm.launch import Split, split_of

HERE = Path(__file__).parent
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
H200, A100 = DEVICES["sm_90"], DEVICES["sm_80"]


@pytest.mark.slow
@NOT_INTERPRETED
def test_under_the_interpreter():
    names = ("test_op.py", "test_torch_integration.py")
    run_under_the_interpreter([HERE / name for name in names], at_least=40)


@NOT_INTERPRETED
def test_parts_that_do_not_fit():
    x = torch.zeros(4, 200, dtype=F16)
    with pytest.raises(ValueError, match="200 channels are not 2 times a multiple of 128"):
        launch.linear_add_layer_norm(x, x, None, x[:, :4], None, None, 1e-5, None, "ieee", "triton", Split(2))


@NOT_INTERPRETED
@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
def test_ahead_of_time(early):
    """Both kernels, for the one kind of GPU that they are launched on: nothing spilled, and read by TMA alone."""
    x, residual = torch.zeros(197, 3072, dtype=F16), torch.zeros(197, 768, dtype=F16)
    split = Split(2, early=early)
    call = lambda: launch._multiply(x, torch.zeros(768, 3072, dtype=F16), split)  # noqa: E731
    (recorded,) = launches_of(launch.kernels, call)
    ptx = compile_and_check(recorded, "sm_90").asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" in ptx
    if early:
        assert ptx.index("griddepcontrol.wait") < ptx.index("cp.async.bulk.tensor")
    parts, bias = torch.zeros(2, 197, 768), torch.zeros(768, dtype=F16)
    norm = launch.norm_launch
    call = lambda: norm.add_parts_layer_norm(parts, bias, residual, bias, bias, 1e-6, bias)  # noqa: E731
    (recorded,) = launches_of(norm.kernels, call)
    for target in TARGETS:
        compiled = compile_launch(recorded, target)
        assert stack_of(compiled) == 0
    reads = re.findall(r"ld\.global[\w.:]*", compile_launch(recorded, "sm_90").asm["ptx"])
    assert all(".v" in read for read in reads)


@pytest.mark.skipif(INTERPRET, reason="no split is chosen there")
def test_few_rows_are_split():
    assert split_of(197, 768, 3072, H200).parts == 2
    assert split_of(50, 768, 3072, H200).parts == 4
    assert split_of(197, 768, 1000, H200).parts == 1
    assert split_of(197, 768, 3072, A100) is None
    assert split_of(1576, 768, 3072, H200) is None
    assert split_of(0, 768, 3072, H200) is None
