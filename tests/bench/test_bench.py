"""The benchmark: its inputs, its clock, its verdicts, its files and its command."""

import io
import json
import math
import sys
import types
from dataclasses import replace

import pytest
import torch

from visionkernels.bench import correctness, run, timing
from visionkernels.bench.cases import CASES, Case, draw
from visionkernels.bench.environment import environment
from visionkernels.bench.providers import PROVIDERS, Call, Provider, grid_sample_attention
from visionkernels.bench.record import Record, Row, load, markdown_tables, remarks, rich_tables, save
from visionkernels.cli import main
from visionkernels.errors import UserError
from visionkernels.ops.deformable_attention.reference import reference_ms_deform_attn

CPU = torch.device("cpu")
TINY = Case("tiny", "Tiny encoder", 2, ((5, 7), (3, 2)), None, 2, 4, 2)
RAGGED = Case("ragged", "Ragged decoder", 1, ((5, 7), (3, 2)), 9, 2, 4, (3, 1), boxes=True)
EFFORT = timing.Effort(seconds=0.0, least=2, most=2, host_calls=0)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(CASES, "tiny", TINY)
    monkeypatch.setattr(timing, "QUICK", EFFORT)
    monkeypatch.setattr(timing, "FULL", EFFORT)


def provider_like_grid_sample(change, **options):
    """A peer whose output is `change` of the right one."""

    def bind(case, inputs):
        call = PROVIDERS["grid_sample"].bind(case, inputs)
        return Call(lambda: change(call.forward()), call.value, call.points, call.weights)

    return Provider("peer", bind, **options)


def measure(provider, case=TINY, dtype="fp32"):
    inputs = draw(case, run.DTYPES[dtype], CPU)
    return run.measure(provider, case, dtype, inputs, correctness.Truth(case, inputs), EFFORT)


def a_record(*rows, device_type="cpu"):
    conditions = replace(environment(CPU, []), device_type=device_type, device="NVIDIA H200")
    return Record("msda", False, conditions, [TINY, RAGGED], {"gone": "ImportError: no"}, list(rows))


def a_row(provider="visionkernels", dtype="fp16", **fields):
    time = timing.Timing(0.1841, 0.18, 0.19, 7)
    figures = {"forward": time, "backward": replace(time, median=1.4812), "error_forward": 2.1e-4}
    return Row("tiny", provider, dtype, provider.startswith("vision"), 1e-3, **{**figures, **fields})


# cases


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_case_fits_together(case):
    assert CASES[case.name] is case
    assert len(case.points) == len(case.levels)
    assert case.queries == (case.pixels if case.num_queries is None else case.num_queries)


def test_the_cases_of_deformable_detr_have_its_sizes():
    assert CASES["encoder-n4"].pixels == CASES["encoder-n4"].queries == 17821
    assert (CASES["decoder-n4"].batch, CASES["decoder-n4"].queries) == (4, 900)


def test_inputs_are_the_same_each_time_and_close_to_the_references():
    one, two = (draw(TINY, torch.float32, CPU) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    sizes = torch.tensor([(w, h) for h, w in TINY.levels])[:, None]
    pixels = (one.sampling_locations - one.reference_points[:, :, None, :, None]) * sizes
    torch.testing.assert_close(pixels, one.sampling_offsets, atol=1e-5, rtol=1e-5)
    assert 1 < pixels.abs().mean() < 4
    torch.testing.assert_close(one.attention_weights.sum((3, 4)), torch.ones(2, 41, 2))


def test_references_of_an_encoder_are_the_pixel_centres():
    inputs = draw(TINY, torch.float32, CPU)
    assert inputs.reference_points[0, 8, 0].tolist() == pytest.approx([1.5 / 7, 1.5 / 5])  # row 1, column 1
    assert inputs.reference_points[0, -1, 1].tolist() == pytest.approx([1.5 / 2, 2.5 / 3])


def test_half_inputs_keep_wide_coordinates():
    inputs = draw(TINY, torch.float16, CPU)
    assert inputs.value.dtype == inputs.sampling_offsets.dtype == torch.float16
    assert inputs.sampling_locations.dtype == inputs.reference_points.dtype == torch.float32


# timing


class Clock:
    """Each call of `work` takes the next of `steps` seconds; looking at the clock takes none."""

    def __init__(self, *steps):
        self.now, self.steps = 100.0, list(steps)

    def work(self):
        self.now += self.steps.pop(0)

    def __call__(self):
        return self.now


def test_time_calls_leaves_out_the_first_call_and_takes_the_median():
    clock = Clock(50.0, 0.004, 0.002, 0.003, 0.001, 0.005)
    result = timing.time_calls(clock.work, CPU, timing.Effort(0.0, 5, 5, 0), clock)
    assert result == timing.Timing(median=3.0, low=1.8, high=4.2, repetitions=5)


def test_time_calls_uses_the_time_given():
    clock = Clock(*[0.1] * 100)
    assert timing.time_calls(clock.work, CPU, timing.Effort(0.95, 3, 1000, 0), clock).repetitions == 10


def test_host_time_is_that_of_one_call(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    clock = Clock(*[3e-6] * 40, *[5e-6] * 20)
    effort = timing.Effort(1.0, 1, 1, host_calls=60)
    assert timing.host_microseconds(clock.work, torch.device("cuda"), effort, clock) == pytest.approx(3)


def test_events_are_read_after_the_gpu_has_caught_up(monkeypatch):
    """A GPU that takes 2 ms a call, and 50 ms for the first."""
    clock, waited = Clock(0.05, *[0.002] * 200), []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.time, self.at = clock(), len(waited)

        def elapsed_time(self, end):
            assert len(waited) > end.at
            return 1e3 * (end.time - self.time)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: None)
    effort = timing.Effort(0.04, 3, 100, 0)
    found = timing.time_calls(clock.work, torch.device("cuda"), effort, clock)
    assert found == timing.Timing(2.0, 2.0, 2.0, 20)


def test_the_extension_of_deformable_detr_is_called_as_its_function_calls_it(monkeypatch):
    def forward(value, shapes, start, locations, weights, step):
        assert step == TINY.batch
        assert start.tolist() == [0, 35]
        return reference_ms_deform_attn(value, shapes.tolist(), locations, weights)

    def backward(value, shapes, start, locations, weights, grad_output, step):
        inputs = [t.detach().requires_grad_() for t in (value, locations, weights)]
        with torch.enable_grad():
            output = forward(inputs[0], shapes, start, *inputs[1:], step)
        return torch.autograd.grad(output, inputs, grad_output)

    module = types.ModuleType("MultiScaleDeformableAttention")
    module.ms_deform_attn_forward, module.ms_deform_attn_backward = forward, backward
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = measure(replace(PROVIDERS["deformable-detr"], devices=("cpu",)))
    assert row.failed is None
    assert not row.wrong


@pytest.mark.gpu
def test_a_gpu_is_timed_by_what_it_does():
    device = torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    small = timing.time_calls(lambda: a + 1, device, timing.QUICK)
    large = timing.time_calls(lambda: a @ a, device, timing.QUICK)
    assert 0 < small.low <= small.median <= small.high < large.median
    assert timing.peak_megabytes(lambda: a + 1, device) == pytest.approx(67.1, rel=0.1)
    assert 1 < timing.host_microseconds(lambda: a + 1, device, timing.QUICK) < 1000


# correctness


@pytest.mark.parametrize("case", [TINY, RAGGED], ids=lambda case: case.name)
@pytest.mark.parametrize("name", ["visionkernels", "visionkernels-fused", "grid_sample"])
def test_a_right_provider_is_within_the_limit(name, case):
    row = measure(PROVIDERS[name], case)
    assert row.failed is row.refused is None
    assert not row.wrong
    assert row.error_forward < 1e-5
    assert row.error_backward < 1e-5
    assert row.forward.median > 0
    assert row.backward.median > 0
    assert row.forward_backward.median > 0


@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_output_is_flagged(ours):
    row = measure(provider_like_grid_sample(lambda out: out * 1.001, ours=ours))
    assert row.error_forward == pytest.approx(1e-3, rel=1e-2)
    assert row.wrong
    assert "(!)" in markdown_tables(a_record(row))


def test_a_fault_in_the_last_image_alone_is_flagged():
    row = measure(provider_like_grid_sample(lambda out: out * torch.tensor([1.0, 0.9]).view(2, 1, 1)))
    assert row.error_forward > 1e-2
    assert row.wrong


@pytest.mark.parametrize("leaf", ["value", "weights"])
def test_a_wrong_gradient_is_flagged(leaf):
    def bind(case, inputs):
        call = PROVIDERS["visionkernels"].bind(case, inputs)
        getattr(call, leaf).register_hook(lambda gradient: gradient * 1.01)
        return call

    row = measure(Provider("peer", bind))
    assert row.error_forward < 1e-5
    assert row.error_backward == pytest.approx(1e-2, rel=1e-2)
    assert row.wrong


def test_an_exception_in_a_peer_is_shown_and_in_ours_raised():
    def broken(out):
        raise RuntimeError("no kernel\nand more")

    row = measure(provider_like_grid_sample(broken))
    assert row.failed == {"stage": "forward", "error": "RuntimeError", "message": "no kernel"}
    assert "RuntimeError" in markdown_tables(a_record(row))
    with pytest.raises(RuntimeError, match="no kernel"):
        measure(provider_like_grid_sample(broken, ours=True))


def test_an_exception_in_the_backward_leaves_the_forward():
    row = measure(provider_like_grid_sample(lambda out: out.detach()))
    assert row.forward is not None
    assert row.backward is None
    assert row.failed["stage"] == "backward"
    assert any("backward failed, RuntimeError" in line for line in remarks(a_record(row)))


def test_nan_is_a_failure():
    row = measure(provider_like_grid_sample(lambda out: out * math.nan))
    assert row.failed["error"] == "FloatingPointError"


def test_grid_sample_is_the_reference():
    inputs = draw(TINY, torch.float64, CPU)
    points, weights = inputs.sampling_locations, inputs.attention_weights
    expected = reference_ms_deform_attn(inputs.value, TINY.levels, points, weights)
    found = grid_sample_attention(inputs.value, TINY.levels, TINY.points, points.flatten(3, 4), weights.flatten(3, 4))
    torch.testing.assert_close(found, expected)


def test_what_a_provider_cannot_do_is_said():
    peer = Provider("peer", PROVIDERS["grid_sample"].bind, dtypes=(torch.float32,), devices=("cuda",))
    assert peer.refuses(TINY, torch.float32, CPU) == "runs on cuda only"
    assert peer.refuses(TINY, torch.float16, torch.device("cuda")) == "no float16"
    assert peer.refuses(RAGGED, torch.float32, torch.device("cuda")) == "one number of points for all levels"
    assert measure(peer).refused == "runs on cuda only"
    absent = replace(peer, package="no_such_package")
    assert absent.missing() == "ModuleNotFoundError: No module named 'no_such_package'"


# records


def test_a_record_survives_its_file(tmp_path):
    record = a_record(measure(PROVIDERS["grid_sample"]), measure(PROVIDERS["deformable-detr"]))
    path = save(record, tmp_path / "new" / "folder")
    assert path.name == "msda-nvidia-h200.json"
    assert load(path) == record


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}'])
def test_a_file_that_is_no_record_is_an_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: expected "):
        load(tmp_path / "x.json")


def test_markdown_has_a_table_a_case_and_columns_by_dtype():
    rows = [
        a_row(host_microseconds=18.44),
        a_row(dtype="fp32"),
        a_row("peer", forward=None, backward=None, error_forward=None, refused="no float16"),
        a_row("peer", "fp32", error_forward=0.2),
    ]
    text = markdown_tables(a_record(*rows, device_type="cuda"))
    lines = text.splitlines()
    assert lines[0] == "**Tiny encoder: N=2, S=41, Lq=41, M×D=2×4, P=2**"
    head = "fp16 forward / backward | error | host µs | fp32 forward / backward | error | host µs |"
    assert lines[2] == "|  | " + head
    assert lines[4] == "| visionkernels | 0.184 / 1.48 | 2.1e-04 | 18.4 | 0.184 / 1.48 | 2.1e-04 | - |"
    assert lines[5] == "| peer | – | – | – | 0.184 / 1.48 | 2.0e-01 (!) | - |"
    assert len({line.count("|") for line in lines[2:6]}) == 1
    assert "NVIDIA H200" in text
    assert torch.__version__ in text
    assert "- gone: not measured, ImportError: no" in lines


def test_terminal_tables_are_at_most_100_columns():
    from rich.console import Console

    rows = [
        a_row("visionkernels-fused", host_microseconds=12345.0, peak_megabytes=12345.0),
        a_row("peer", failed={"stage": "backward", "error": "OutOfMemoryError", "message": ""}, backward=None),
    ]
    console = Console(width=300, record=True, file=io.StringIO())
    for table in rich_tables(a_record(*rows, device_type="cuda")):
        console.print(table)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "0.184" in text
    assert "OutOfMemoryError" in text
    assert "visionkernels-fused" in text


# the command


def test_bench_prints_and_writes(tiny, tmp_path, capsys):
    assert main(["bench", "--case", "tiny", "--quick", "--device", "cpu", "--save", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "tiny — Tiny encoder" in out
    assert "grid_sample" in out
    assert "deformable-detr: not measured" in out  # said, not passed over
    (path,) = tmp_path.iterdir()
    data = json.loads(path.read_text())
    assert data["schema"] == 1
    assert data["quick"] is True
    assert data["environment"]["versions"]["torch"] == torch.__version__
    assert {row["provider"] for row in data["rows"]} == {
        "visionkernels",
        "visionkernels-fused",
        "grid_sample",
    }
    assert markdown_tables(load(path)).startswith("**Tiny encoder")


def test_bench_takes_dtypes_and_no_peers(tiny, capsys):
    assert main(["bench", "--case", "tiny", "--dtype", "fp64", "bf16", "--against", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "fp64" in out
    assert "bf16" in out
    assert "grid_sample" not in out


def test_bench_fails_and_writes_nothing_if_ours_is_wrong(tiny, tmp_path, capsys, monkeypatch):
    wrong = provider_like_grid_sample(lambda out: out * 1.001, ours=True)
    monkeypatch.setitem(PROVIDERS, "visionkernels", wrong)
    arguments = ["bench", "--case", "tiny", "--device", "cpu", "--save", str(tmp_path)]
    assert main(arguments) == 1
    assert "wrong results: peer, tiny, fp32" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "dtype: expected some of fp64, fp32, fp16, bf16, but there is 'int8'"),
        (["--case", "nope"], "case: expected some of all, encoder-n4"),
        (["--against", "nope"], "against: expected some of grid_sample"),
        (
            ["--against", "deformable-detr"],
            "against: deformable-detr cannot be imported, ModuleNotFoundError",
        ),
        (["--suite", "vit"], "suite: expected one of msda, but it is 'vit'"),
        (["--device", "tpu"], "device: expected cpu"),
        (["--save", __file__], "is not a directory that can be written to"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_bad_argument_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
