"""`visionkernels bench`."""

import json
import os
import sys
from dataclasses import replace

import pytest
import torch
from bench_tools import EFFORT, ROOT, TINY, a_record, a_row, altered

from visionkernels.bench import run, terminal, timing
from visionkernels.bench.cases import SUITES
from visionkernels.bench.environment import environment
from visionkernels.bench.measure import DeviceLost
from visionkernels.bench.providers import PROVIDERS
from visionkernels.bench.record import Row, load, save
from visionkernels.bench.timing import Timing
from visionkernels.bench.wording import STAGES
from visionkernels.cli import main

CPU = torch.device("cpu")
MSDA = ("msda", "msda-module", "msda-queries")
RESULT = str(next((ROOT / "benchmarks" / "results").glob("*.json")))


@pytest.fixture
def tiny(monkeypatch):
    for suite in MSDA:
        monkeypatch.setitem(SUITES[suite], "tiny", TINY)
    for effort in ("QUICK", "CPU"):
        monkeypatch.setattr(timing, effort, EFFORT)
    monkeypatch.setattr(timing, "roofs", lambda device, effort: timing.Roofs(100.0, 1000.0))


def bench(*arguments):
    return main(["bench", "--device", "cpu", *map(str, arguments)])


def test_bench_prints_and_writes_every_suite(tiny, tmp_path, capsys):
    assert bench("--case", "tiny", "--quick", "--save", tmp_path) == 0
    out = capsys.readouterr().out
    assert "tiny — Tiny encoder" in out
    assert "grid_sample" in out
    assert "deformable-detr: not measured" in out  # said, not passed over
    assert "torch-compile: not measured, compiles for too long" in out
    files = sorted(tmp_path.iterdir())
    records = [load(path) for path in files]
    assert {record.suite for record in records} == {"msda", "msda-module", "msda-queries"}
    for path, record in zip(files, records, strict=True):
        assert str(path) in out
        assert path.stem.endswith("-quick")
        assert record.quick
        assert record.complete
        assert record.roofs == timing.Roofs(100.0, 1000.0)
        assert record.environment.versions["torch"] == torch.__version__
        assert {row.provider for row in record.rows} == {
            "visionkernels", "visionkernels-fused", "grid_sample", "transformers",
        }  # fmt: skip
        assert not any(row.wrong or row.failed for row in record.rows)


def test_bench_takes_a_suite_dtypes_and_no_peers(tiny, capsys):
    assert bench("--suite", "msda", "--case", "tiny", "--dtype", "fp64", "bf16", "--against") == 0
    out = capsys.readouterr().out
    assert "fp64" in out
    assert "bf16" in out
    assert "grid_sample" not in out
    assert "suite msda-module" not in out


def test_what_is_slow_to_start_is_measured_where_asked(tiny, monkeypatch):
    options = run.Options(cases=["tiny"])
    providers = [PROVIDERS["grid_sample"], PROVIDERS["transformers"]]
    both, one = providers, providers[:1]
    assert run._with_providers(TINY, "fp32", providers, options).providers == both
    assert run._with_providers(TINY, "bf16", providers, options).providers == one
    assert run._with_providers(replace(TINY, tags=()), "fp32", providers, options).providers == one
    asked = replace(options, against=["transformers"])
    assert run._with_providers(replace(TINY, tags=()), "bf16", providers, asked).providers == both


def test_a_gpu_gets_half_precision_and_bf16_on_the_main_cases():
    jobs = run._jobs("msda", run.Options(), torch.device("cuda"))
    assert [dtype for case, dtype in jobs if case.name == "encoder-n4"] == ["fp16", "bf16", "fp32"]
    assert [dtype for case, dtype in jobs if case.name == "bevformer"] == ["fp16", "fp32"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda out: out * 1.001, "wrong result: peer, msda, tiny, fp32"),
        (lambda out: 1 / 0, "ZeroDivisionError in the"),
    ],
    ids=["wrong", "failed"],
)
def test_bench_fails_if_ours_is_wrong(change, message, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "visionkernels", altered(change, ours=True))
    assert bench("--suite", "msda", "--case", "tiny", "--against", "grid_sample", "--save", tmp_path) == 1
    assert message in capsys.readouterr().err
    assert len(load(tmp_path / next(tmp_path.iterdir())).rows) == 3  # the others were measured all the same


def test_a_suite_without_the_case_leaves_its_file_alone(tiny, tmp_path, monkeypatch):
    monkeypatch.delitem(SUITES["msda-module"], "tiny")
    assert bench("--case", "tiny", "--against", "--save", tmp_path) == 0
    assert {load(path).suite for path in tmp_path.iterdir()} == {"msda", "msda-queries"}


def test_a_failing_peer_stops_nothing(tiny, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "grid_sample", altered(lambda out: 1 / 0, name="grid_sample"))
    assert bench("--suite", "msda", "--case", "tiny", "--against", "grid_sample") == 0


def test_what_was_measured_is_kept_when_the_run_is_ended(tiny, tmp_path, monkeypatch, capsys):
    """The second dtype is interrupted."""

    def measure(provider, case, dtype, inputs, truth, effort):
        if dtype == "bf16":
            raise KeyboardInterrupt
        return a_row(dtype=dtype)

    monkeypatch.setattr(run, "measure", measure)
    arguments = ["--suite", "msda", "--case", "tiny", "--dtype", "fp32", "bf16", "--against", "--save", tmp_path]
    assert bench(*arguments) == 130
    (path,) = tmp_path.iterdir()
    record = load(path)
    assert [row.dtype for row in record.rows] == ["fp32", "fp32"]
    assert not record.complete


def lose_the_gpu(monkeypatch):
    def measure(provider, case, dtype, *_):
        row = a_row(provider.name, dtype, failed={"stage": "forward", "error": "AcceleratorError", "message": ""})
        if provider.name == "grid_sample":
            raise DeviceLost(row)
        return a_row(provider.name, dtype)

    monkeypatch.setattr(run, "measure", measure)


LOST = ["--suite", "msda", "--case", "tiny", "--against", "grid_sample", "transformers", "--save"]


def test_after_a_lost_gpu_the_rest_is_measured_in_a_fresh_process(tiny, tmp_path, monkeypatch, capsys):
    def execv(path, command):
        assert path == command[0] == sys.executable
        assert command[1:3] == ["-m", "visionkernels"]
        monkeypatch.undo()  # the fresh process, with a peer that works
        monkeypatch.setitem(SUITES["msda"], "tiny", TINY)
        raise SystemExit(main(command[3:]))

    lose_the_gpu(monkeypatch)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit) as end:
        bench(*LOST, tmp_path)
    assert end.value.code == 0
    assert "grid_sample left the GPU unusable" in capsys.readouterr().err
    record = load(next(tmp_path.iterdir()))
    assert record.complete
    assert [row.provider for row in record.rows] == [
        "visionkernels",
        "visionkernels-fused",
        "grid_sample",
        "transformers",
    ]
    assert record.rows[2].failed["error"] == "AcceleratorError"
    assert record.rows[3].failed is None


def test_a_lost_gpu_is_one_line_if_nothing_is_saved(tiny, monkeypatch, capsys):
    lose_the_gpu(monkeypatch)
    assert bench(*LOST[:-1]) == 2
    assert "with --save the rest would be measured" in capsys.readouterr().err.splitlines()[-1]


def test_resume_does_not_mix_versions(tiny, tmp_path, capsys):
    arguments = ["--suite", "msda", "--case", "tiny", "--against", "--save", tmp_path]
    assert bench(*arguments) == 0
    path = next(tmp_path.iterdir())
    before = path.read_text()
    assert bench(*arguments, "--resume") == 0
    assert load(path).rows == json_rows(before)
    path.write_text(before.replace(torch.__version__, "0.0"))
    assert bench(*arguments, "--resume") == 2
    assert "is of other versions" in capsys.readouterr().err


def json_rows(text):
    return [
        Row(**{**row, **{k: Timing(**v) for k, v in row.items() if k in STAGES and v}})
        for row in json.loads(text)["rows"]
    ]


def test_without_rich_it_runs_and_says_so_once(tiny, monkeypatch, capsys):
    monkeypatch.setattr(terminal, "HAS_RICH", False)
    assert bench("--case", "tiny", "--quick", "--against", "grid_sample") == 0
    captured = capsys.readouterr()
    assert captured.err.count("visionkernels[bench]") == 1
    assert "| fp32 | grid_sample |" in captured.out


def test_the_commit_comes_from_the_environment_outside_a_checkout(monkeypatch):
    from visionkernels.bench import environment as module

    monkeypatch.setattr(module, "_output", lambda *command: None)
    assert environment(CPU, []).commit is None
    monkeypatch.setenv("VISIONKERNELS_COMMIT", "abc123")
    assert environment(CPU, []).commit == "abc123"
    assert {"python", "torch", "triton", "transformers", "visionkernels"} <= set(environment(CPU, []).versions)


def test_list_names_cases_and_providers(capsys):
    assert main(["bench", "--list"]) == 0
    out = capsys.readouterr().out
    for part in ("suite msda-queries", "encoder-n4", "bevformer", "dcnv4", "ModuleNotFoundError", "this package"):
        assert part in out


def test_plot_draws_beside_the_file_or_elsewhere(tmp_path, capsys):
    path = save(a_record(a_row(), a_row("peer")), tmp_path)
    assert main(["bench", "--plot", str(path)]) == 0
    assert (tmp_path / "msda-nvidia-h200-bars-fp16.png").exists()
    assert main(["bench", "--plot", str(path), "--save", str(tmp_path / "elsewhere")]) == 0
    assert "elsewhere" in capsys.readouterr().out
    assert len(list((tmp_path / "elsewhere").iterdir())) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "dtype: expected some of fp64, fp32, fp16, bf16, but there is 'int8'"),
        (["--case", "nope"], "case: expected some of all, encoder-n4"),
        (["--against", "nope"], "against: expected some of grid_sample"),
        (["--against", "mmcv"], "against: mmcv cannot be measured, ModuleNotFoundError"),
        (["--against", "grid_sample", "dcnv4"], "against: dcnv4 cannot be measured, ModuleNotFoundError"),
        (
            ["--suite", "cnn"],
            "suite: expected some of msda, msda-module, msda-queries, vit, vit-ops, but there is 'cnn'",
        ),
        (["--suite", "msda-module", "--case", "rtdetr-n1"], "case: rtdetr-n1 is in none of the suites msda-module"),
        (["--suite", "vit", "--against", "mmcv"], "against: expected some of transformers-sdpa"),
        (["--device", "tpu"], "device: expected cpu"),
        (["--save", __file__], "is not a directory that can be written to"),
        (["--resume"], "resume: needs --save"),
        (["--plot", RESULT, "--save", __file__], "is not a directory that can be written to"),
        (["--plot", "nothing.json"], "nothing.json: expected a result file"),
        (["--speed"], "unrecognized arguments: --speed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_bad_argument_is_one_line_and_exit_code_2(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert not captured.out
