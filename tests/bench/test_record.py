"""Result files and what is made of them: tables, plots, the generated documents."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench_tools import ROOT, a_record, a_row, measure

from visionkernels.bench import plots
from visionkernels.bench.markdown import full_tables, summary, verdict
from visionkernels.bench.providers import PROVIDERS
from visionkernels.bench.record import load, save
from visionkernels.bench.terminal import rich_tables
from visionkernels.bench.timing import Timing
from visionkernels.bench.wording import duels
from visionkernels.errors import UserError


def test_a_record_survives_its_file(tmp_path):
    graph = Timing(0.1, 0.1, 0.1, 3)
    record = a_record(measure(PROVIDERS["grid_sample"]), measure(PROVIDERS["mmcv"]), a_row(forward_graph=graph))
    path = save(record, tmp_path / "new" / "folder")
    assert [file.name for file in path.parent.iterdir()] == ["msda-nvidia-h200.json"]
    assert load(path) == record


@pytest.mark.parametrize("text", ["", "[]", '{"schema": 0}'])
def test_a_file_that_is_no_record_is_an_error(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=r"x\.json: expected "):
        load(tmp_path / "x.json")


# tables


def test_the_summary_sets_us_beside_the_fastest_other():
    rows = [
        a_row(milliseconds=0.2),
        a_row("visionkernels-fused", milliseconds=0.01),
        a_row("slow", milliseconds=5.0),
        a_row("fast", milliseconds=0.5, error_forward=0.2),
        a_row(dtype="fp32", milliseconds=0.2),
        a_row("refused", dtype="fp32", forward=None, forward_backward=None, refused="no float32"),
    ]
    lines = summary(a_record(*rows)).splitlines()
    assert lines[2] == "| Tiny encoder, N=2, Lq=41 | fp16 | 0.2 | 0.5 (fast) (!) | 2.5× | 2 | 5 (fast) (!) | 2.5× |"
    assert lines[3] == "|  | fp32 | 0.2 | - |  | 2 | - |  |"
    assert "Faster than every other in 2 of 2 comparisons of this run." in lines


def test_a_loss_stands_out():
    record = a_record(a_row(milliseconds=0.2), a_row("peer", milliseconds=0.15))
    assert "**0.75×, slower**" in summary(record)
    text = verdict(record)
    assert "Faster than every other in 0 of 2 comparisons" in text
    assert "- slower: Tiny encoder (N=2, S=41, Lq=41, M×D=2×4), fp16, forward: 0.2 ms against 0.15 (peer)" in text


def test_a_case_that_is_no_headline_is_counted_and_named_when_lost():
    rows = [a_row(milliseconds=0.2), a_row("peer", milliseconds=0.15)]
    for row in rows:
        row.case = "ragged"
    assert "- slower: Ragged decoder" in summary(a_record(*rows))
    assert len(duels(a_record(*rows))) == 2


def test_the_summary_of_a_module_compares_time_and_memory():
    rows = [
        a_row("visionkernels-fused", peak_megabytes=100.0, total_megabytes=150.0),
        a_row(
            "deformable-detr",
            milliseconds=0.5523,
            widened=True,
            error_forward=0.1,
            peak_megabytes=250.0,
            total_megabytes=300.0,
        ),
    ]
    lines = summary(a_record(*rows, suite="msda-module")).splitlines()
    assert lines[0] == "Tiny encoder: N=2, S=41, Lq=41, M×D=2×4, P=2"
    assert lines[4] == "| visionkernels-fused | fp16 | 0.184 | 1.84 |  | 100 |  | 150 |"
    assert lines[5] == "| deformable-detr, in float32 (!) | fp16 | 0.552 | 5.52 | 3× | 250 | 2.5× | 300 |"


def test_the_full_table_has_every_figure_with_its_quantiles():
    rows = [a_row(host_microseconds=18.44), a_row("peer", error_forward=0.2)]
    text = full_tables(a_record(*rows))
    lines = text.splitlines()
    assert lines[0] == "**Tiny encoder: N=2, S=41, Lq=41, M×D=2×4, P=2**"
    assert "| fp16 | visionkernels | 0.184 (0.18–0.203) |" in text
    assert "| 18.4 | 5 % | 2 % | 2.1e-04 |" in lines[4]
    assert "2.0e-01 (!)" in lines[5]
    assert len({line.count("|") for line in lines[2:6]}) == 1
    assert "the L2 cache emptied before each call" in text
    assert "copies run at 100 GB/s" in text
    assert "NVIDIA H200, driver 580.1; visionkernels 0.1.0" in text
    assert torch.__version__ in text
    assert "- gone: not measured, ImportError: no" in lines
    resumed = full_tables(a_record(*rows, a_row("gone")))
    assert "- gone: not measured in the other cases, ImportError: no" in resumed.splitlines()
    refused = full_tables(a_record(*rows, a_row("gone", forward=None, refused="not here")))
    assert "- gone: not measured, ImportError: no" in refused.splitlines()


def test_terminal_tables_are_at_most_100_columns():
    from rich.console import Console

    rows = [
        a_row(
            "visionkernels-fused", host_microseconds=12345.0, peak_megabytes=12345.0, error_forward=0.1,
            error_backward=0.1, forward_graph=Timing(0.0123, 0.01, 0.01, 3),
        ),
        a_row("peer", failed={"stage": "backward", "error": "OutOfMemoryError", "message": ""}, backward=None),
    ]  # fmt: skip
    console = Console(width=300, record=True, file=io.StringIO())
    for table in rich_tables(a_record(*rows)):
        console.print(table)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    for part in ("0.184", "failed", "1.0e-01!", "visionkernels-fused", "0.0123", "12345", "5%"):
        assert part in text


# plots

ROWS = [a_row(), a_row("peer", milliseconds=0.1), a_row("grid_sample", milliseconds=4.0)]


@pytest.mark.parametrize(
    ("suite", "expected"),
    [("msda", ["bars-fp16", "roofline"]), ("msda-module", ["bars"]), ("msda-queries", ["queries"])],
)
def test_plots_are_drawn_and_the_same_each_time(suite, expected, tmp_path):
    record = a_record(*ROWS, suite=suite)
    assert plots.names(record) == expected
    first, second = ([*plots.draw_record(record, tmp_path / name)] for name in "ab")
    assert [path.name for path in first] == [
        f"{suite}-nvidia-h200-{name}.{kind}" for name in expected for kind in ("png", "svg")
    ]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()
        assert one.stat().st_size > 5000


def test_plots_say_what_they_show(tmp_path):
    import matplotlib as mpl

    with mpl.rc_context({"svg.fonttype": "none"}):
        paths = [*plots.draw_record(a_record(*ROWS), tmp_path)]
    bars = next(path for path in paths if path.name.endswith("bars-fp16.svg")).read_text()
    for part in ("Tiny encoder", "grid_sample", "4 ms", "NVIDIA H200", torch.__version__):
        assert part in bars
    roofline = next(path for path in paths if path.name.endswith("roofline.svg")).read_text()
    assert "copy, 100 GB/s" in roofline
    assert "1 TFLOP/s" in roofline


def test_a_record_without_figures_has_no_plots():
    assert plots.names(a_record()) == []


def test_plots_need_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"plot: needs matplotlib.*visionkernels\[bench\]"):
        list(plots.draw_files([tmp_path / "x.json"], None))


# the generated documents


@pytest.fixture
def root(tmp_path):
    markers = "before\n<!-- performance:begin -->\n<!-- performance:end -->\nafter\n"
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        (tmp_path / name).write_text(markers)
    save(a_record(*ROWS), tmp_path / "benchmarks" / "results")
    return tmp_path


def generate(root, *options):
    script = ROOT / "scripts" / "readme_tables.py"
    done = subprocess.run([sys.executable, script, "--root", root, *options], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_documents_are_generated_and_checked(root):
    assert generate(root, "--check")[0] == 1
    assert generate(root) == (0, "")
    assert generate(root, "--check") == (0, "")
    readme, docs = (root / "README.md").read_text(), (root / "docs" / "benchmarks.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert "### NVIDIA H200" in readme
    assert "slower" in readme
    for line in docs.splitlines():
        if line.startswith("!["):
            assert (root / "docs" / line.split("(")[1].rstrip(")")).exists()
    assert docs.count("![") == 2
    (root / "README.md").write_text(readme.replace("0.184", "0.001"))
    code, message = generate(root, "--check")
    assert code == 1
    assert "README.md" in message


def test_a_missing_picture_is_noticed(root):
    generate(root)
    next(root.glob("docs/benchmarks/*.png")).unlink()
    code, message = generate(root, "--check")
    assert code == 1
    assert ".png" in message


def test_the_committed_results_load():
    files = sorted(Path(ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for path in files:
        assert load(path).stem == path.stem
