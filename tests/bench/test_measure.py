"""Verdicts: who is right, wrong, refused or failed."""

import math
from dataclasses import replace

import pytest
import torch
from bench_tools import CPU, RAGGED, TINY, a_record, a_row, altered, measure, measure_module

from visionkernels.bench.cases import draw
from visionkernels.bench.markdown import full_tables
from visionkernels.bench.measure import DeviceLost, run_stages
from visionkernels.bench.peers import grid_sample_attention
from visionkernels.bench.providers import PROVIDERS
from visionkernels.bench.timing import Roofs
from visionkernels.bench.wording import remarks
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn

# right


@pytest.mark.parametrize("case", [TINY, RAGGED], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["visionkernels", "visionkernels-fused", "grid_sample", "transformers"])
def test_a_right_provider_is_within_the_limit(name, case):
    row = measure(PROVIDERS[name], case)
    assert row.failed is row.refused is None
    assert not row.wrong
    assert row.error_forward < 1e-5
    assert row.error_backward < 1e-5
    assert row.forward.median > 0
    assert row.backward.median > 0
    assert row.forward_backward.median > 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["visionkernels", "visionkernels-fused", "grid_sample", "transformers"])
def test_a_right_module_is_within_the_limit(name, dtype):
    row = measure_module(PROVIDERS[name], dtype)
    assert row.failed is row.refused is None
    assert row.error_forward is not None
    assert row.error_backward is not None
    assert not row.wrong or (dtype == "bf16" and PROVIDERS[name].narrow)
    assert row.forward_backward.median > 0


def test_grid_sample_is_the_reference():
    inputs = draw(TINY, torch.float64, CPU)
    points, weights = inputs.sampling_locations, inputs.attention_weights
    expected = reference_ms_deform_attn(inputs.value, TINY.levels, points, weights)
    found = grid_sample_attention(inputs.value, TINY.levels, TINY.points, points.flatten(3, 4), weights.flatten(3, 4))
    torch.testing.assert_close(found, expected)


def test_compulsory_bytes_are_each_input_and_output_once():
    row = measure(PROVIDERS["visionkernels"], dtype="bf16")
    elements = 2 * 41 * 2 * 4  # of value, and of the output
    samples = 2 * 41 * 2 * 2 * 2
    assert row.forward_bytes == 2 * 2 * elements + samples * (2 + 1) * 4
    assert row.backward_bytes == row.forward_bytes + 2 * elements + samples * (2 + 1) * 4
    assert row.forward_flops == 8 * samples * 4
    fused = measure(PROVIDERS["visionkernels-fused"], dtype="bf16")
    assert fused.forward_bytes == 2 * 2 * elements + samples * (2 + 1) * 2 + 2 * 41 * 2 * 2 * 4


def test_the_share_of_the_copy_bandwidth():
    row = a_row(milliseconds=0.1)  # 10^6 bytes in 10^-4 s: 10 GB/s
    assert row.share(Roofs(100.0, 1.0), "forward") == pytest.approx(0.1)
    assert row.share(Roofs(100.0, 1.0), "forward_backward") == pytest.approx(0.03)
    assert row.share(None, "forward") is None


# wrong


@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_output_is_flagged(ours):
    row = measure(altered(lambda out: out * 1.001, ours=ours))
    assert row.error_forward == pytest.approx(1e-3, rel=1e-2)
    assert row.wrong
    assert "(!)" in full_tables(a_record(row))


def test_a_fault_in_the_last_image_alone_is_flagged():
    row = measure(altered(lambda out: out * torch.tensor([1.0, 0.9]).view(2, 1, 1)))
    assert row.error_forward > 1e-2
    assert row.wrong


@pytest.mark.parametrize("leaf", [0, 2], ids=["value", "weights"])
def test_a_wrong_gradient_is_flagged(leaf):
    def build(case, geometry):
        right = PROVIDERS["visionkernels"].build(case, geometry)

        def attention(*inputs):
            changed = list(inputs)
            if inputs[leaf].requires_grad:
                changed[leaf] = inputs[leaf] * 1.01 - inputs[leaf].detach() * 0.01
            return right(*changed)

        return attention

    row = measure(replace(PROVIDERS["visionkernels"], name="peer", build=build))
    assert row.error_forward < 1e-5
    assert row.error_backward == pytest.approx(1e-2, rel=1e-2)
    assert row.wrong


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_wrong_module_is_flagged(dtype):
    row = measure_module(altered(lambda out: out * 1.1, base="visionkernels"), dtype)
    assert row.error_forward > 0.05
    assert row.wrong


# failed, refused, absent


def test_an_exception_is_shown():
    def broken(out):
        raise RuntimeError("no kernel\nand more")

    row = measure(altered(broken))
    assert row.failed == {"stage": "forward", "error": "RuntimeError", "message": "no kernel"}
    assert row.forward is None
    assert "RuntimeError" in full_tables(a_record(row))
    assert measure_module(altered(broken)).failed == row.failed


def test_an_exception_in_the_backward_leaves_the_forward():
    row = measure(altered(lambda out: out.detach()))
    assert row.forward is not None
    assert row.backward is None
    assert row.failed["stage"] == "backward"
    assert any("backward failed, RuntimeError" in line for line in remarks(a_record(row)))


def test_nan_is_a_failure():
    assert measure(altered(lambda out: out * math.nan)).failed["error"] == "FloatingPointError"


def test_a_lost_gpu_ends_the_run(monkeypatch):
    def lost(*_):
        raise RuntimeError("illegal address")

    row = a_row("peer", forward=None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    run_stages(row, torch.device("cuda"), {"forward": lost})
    assert row.failed["message"] == "illegal address"
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(DeviceLost, match="peer left the GPU unusable"):
        run_stages(row, torch.device("cuda"), {"forward": lost})


def test_what_a_provider_cannot_do_is_said():
    peer = altered(lambda out: out, dtypes=(torch.float32,), devices=("cuda",), ragged=False)
    assert peer.refuses(TINY, torch.float32, CPU) == "runs on cuda only"
    assert peer.refuses(TINY, torch.float16, torch.device("cuda")) == "no float16"
    assert peer.refuses(RAGGED, torch.float32, torch.device("cuda")) == "one number of points for all levels"
    assert measure(peer).refused == measure_module(peer).refused == "runs on cuda only"
    absent = replace(peer, module="no_such_package")
    assert absent.missing() == "ModuleNotFoundError: No module named 'no_such_package'"


def test_a_module_on_an_operator_without_the_dtype_runs_it_in_float32():
    seen = []
    peer = altered(lambda out: seen.append(out.dtype) or out, dtypes=(torch.float32,), narrow=False)
    row = measure_module(peer, "bf16")
    assert row.failed is None
    assert set(seen) == {torch.float32}
    assert "peer, bf16: its operator in float32" in remarks(a_record(row))
    assert not row.wrong
