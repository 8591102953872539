"""The suites of vision transformers and of their operators: who is right, wrong or failed, and what is shown."""

import io
import math
import sys
import types
from dataclasses import replace

import pytest
import torch
from bench_tools import CPU, EFFORT, a_record
from torch import nn

from visionkernels.bench import breakdown, plots, run, timing, vit_models, vit_operators, vit_subject
from visionkernels.bench.cases import SUITES, default_cases
from visionkernels.bench.markdown import full_tables, summary
from visionkernels.bench.measure import DTYPES
from visionkernels.bench.record import Row, load, save
from visionkernels.bench.terminal import rich_tables
from visionkernels.bench.timing import Roofs, Timing
from visionkernels.bench.vit_cases import MODELS, ModelCase, OpCase
from visionkernels.bench.wording import duels, remarks, share_of_product_alone
from visionkernels.cli import main

VIT = ModelCase("tiny-n3", "Tiny ViT", 3, "vit", "vit_tiny", 32, 8, 24, 2, 3, ("slow", "breakdown", "headline"))
DINO = replace(VIT, name="dino-n2", title="Tiny DINOv2", batch=2, family="dinov2")
OPS = (
    OpCase("norm", "layer norm", "layer_norm", "rows", 7, in_features=24),
    OpCase("plain", "linear", "linear", "rows", 7, in_features=24, out_features=40),
    OpCase("gelu", "linear, GELU", "linear", "rows", 7, in_features=24, out_features=40, activation="gelu"),
    OpCase("residual", "linear + residual", "linear", "rows", 600, in_features=24, out_features=40, residual=True),
    OpCase("attention", "attention", "attention", "tokens", 9, 3, in_features=24, num_heads=3),
    OpCase("patch", "patch embedding", "patch_embedding", "images", 3, 3, out_features=16),
)


def measure(provider, case=VIT, dtype="fp32"):
    subject = vit_subject.subject_of(case, DTYPES[dtype], CPU)
    return vit_models.measure(provider, case, dtype, subject, vit_subject.Truth(case, subject), EFFORT)


def measure_op(provider, case, dtype="fp32"):
    inputs = vit_operators.draw(case, DTYPES[dtype], CPU)
    return vit_operators.measure(provider, case, dtype, inputs, vit_operators.Truth(case, inputs), EFFORT)


def altered(change, base="transformers-sdpa", **options):
    """A provider as a peer whose output is `change` of the right one."""
    right = vit_models.PROVIDERS[base]

    def build(subject, case):
        bound = right.build(subject, case)
        return bound._replace(forward=lambda pixels: change(bound.forward(pixels)))

    return replace(right, **{"name": "peer", "build": build, "ours": False, **options})


# whole models


@pytest.mark.parametrize("case", [VIT, DINO], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("name", ["visionkernels", "visionkernels-eager", "transformers-sdpa", "transformers-eager"])
def test_models_of_the_same_weights_agree(name, dtype, case):
    row = measure(vit_models.PROVIDERS[name], case, dtype)
    assert row.failed is row.refused is None
    if (name, dtype) == ("transformers-eager", "fp64"):
        return  # the softmax of some of its models is float32
    assert not row.wrong
    assert row.error_forward < {"fp32": 1e-5, "bf16": 5e-2, "fp64": 1e-12}[dtype]
    assert row.forward.median > 0
    assert row.forward_flops == case.flops
    model = vit_subject.subject_of(case, DTYPES[dtype], CPU).model
    held = sum(p.numel() for p in model.parameters() if p is not getattr(model.embeddings, "mask_token", None))
    assert row.weights_megabytes == pytest.approx(held * DTYPES[dtype].itemsize / 1e6, rel=0.01)


def test_the_weights_are_not_those_of_a_fresh_model():
    output = measure(vit_models.PROVIDERS["transformers-sdpa"])
    assert output.error_forward < 1e-5
    subject = vit_subject.subject_of(VIT, torch.float32, CPU)
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        states = subject.model(pixels, output_hidden_states=True).hidden_states
    assert (states[-1] - states[0]).norm() > 0.5 * states[0].norm()  # the layers do something
    assert (states[-1][0] - states[-1][1]).norm() > 0.1 * states[-1][0].norm()  # and see the picture


@pytest.mark.parametrize("ours", [True, False])
def test_a_wrong_model_is_flagged(ours):
    assert measure(altered(lambda out: out * 1.001, ours=ours)).wrong
    assert measure(altered(lambda out: out * torch.tensor([1.0, 1.0, 0.9]).view(3, 1, 1))).wrong  # the last image


def test_what_a_peer_raises_and_nan_are_failures():
    assert measure(altered(lambda out: 1 / 0)).failed["error"] == "ZeroDivisionError"
    assert measure(altered(lambda out: out * math.nan)).failed["error"] == "FloatingPointError"


class FakeTimm(nn.Module):
    def __init__(self, scale=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), scale))

    def forward_features(self, pixels):
        return pixels.flatten(2) * self.weight


def fake_timm(monkeypatch, scale=1.0):
    asked = []

    def create_model(name, **options):
        asked.append((name, options))
        return FakeTimm(scale)

    monkeypatch.setitem(sys.modules, "timm", types.SimpleNamespace(create_model=create_model))
    return asked


def test_timm_is_asked_for_the_shape_and_only_seen_to_be_finite(monkeypatch):
    asked = fake_timm(monkeypatch)
    provider = vit_models.PROVIDERS["timm"]
    row = measure(provider)
    assert asked == [("vit_tiny", {"pretrained": False, "num_classes": 0, "img_size": 32})]
    assert row.failed is row.error_forward is None
    assert not row.wrong
    fake_timm(monkeypatch, math.inf)
    assert measure(provider).failed["error"] == "FloatingPointError"


def test_a_graph_is_captured_once_and_replayed(monkeypatch):
    replays = []

    def capture(forward, pixels):
        held = pixels.clone()
        output = forward(held)

        def replay():
            replays.append(held.clone())
            output.copy_(forward(held))

        return types.SimpleNamespace(replay=replay), held, output

    fake_timm(monkeypatch)
    monkeypatch.setattr(vit_models, "_capture", capture)
    with torch.no_grad():
        bound = vit_models.PROVIDERS["timm-graph"].build(vit_subject.subject_of(VIT, torch.float32, CPU), VIT)
        for pixels in torch.randn(2, 1, 3, 4, 4):
            torch.testing.assert_close(bound.forward(pixels), pixels.flatten(2))
            assert torch.equal(replays[-1], pixels)
    assert len(replays) == 2
    assert measure(vit_models.PROVIDERS["timm-graph"]).refused == "runs on cuda only"


@pytest.mark.parametrize("name", ["timm-compile", "transformers-compile"])
def test_compiled_means_max_autotune(name, monkeypatch):
    fake_timm(monkeypatch)
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: seen.append(options) or function)
    assert measure(vit_models.PROVIDERS[name]).failed is None
    assert seen == [{"mode": "max-autotune", "dynamic": False}]


def test_the_batches_of_a_model_share_it():
    one = vit_subject.subject_of(VIT, torch.float32, CPU)
    assert vit_subject.subject_of(replace(VIT, name="other", batch=7, tags=()), torch.float32, CPU) is one
    assert vit_subject.subject_of(VIT, torch.float64, CPU) is not one


# where the time goes


def test_the_breakdown_names_every_kind_and_sums_up():
    row = measure(vit_models.PROVIDERS["visionkernels-eager"])
    assert list(row.breakdown)[-1] == breakdown.OTHER
    assert set(row.breakdown) == {
        "patch embedding", "layer norm", "attention", "linear 24 → 72", "linear 24 → 24 + norm", "linear 24 → 96",
        "linear 96 → 24 + norm", "other",
    }  # fmt: skip
    assert all(spent > 0 for kind, spent in row.breakdown.items() if kind != "other")
    assert measure(vit_models.PROVIDERS["visionkernels"]).breakdown is None  # a graph's operators are not seen
    assert measure(vit_models.PROVIDERS["visionkernels-eager"], replace(VIT, tags=())).breakdown is None


def test_the_breakdown_of_a_gpu_counts_kernels(monkeypatch):
    """Events as the profiler gives them on a GPU, of five forwards."""

    def event(name, kind="CPU", spent=0, shapes=(), parent=None):
        return types.SimpleNamespace(
            name=name, device_type=types.SimpleNamespace(name=kind), device_time_total=spent, input_shapes=shapes,
            cpu_parent=parent, time_range=types.SimpleNamespace(elapsed_us=lambda: spent),
        )  # fmt: skip

    outer = event("visionkernels::linear", spent=3000, shapes=[[7, 4], [8, 4], [8]])
    events = [
        outer, event("visionkernels::linear", spent=3000, shapes=[[7, 4], [8, 4], [8]], parent=outer),
        event("visionkernels::layer_norm", spent=1000), event("aten::copy_", spent=500),
        event("_linear_kernel", "CUDA", 3000), event("_layer_norm_kernel", "CUDA", 1000), event("Memcpy", "CUDA", 500),
    ]  # fmt: skip

    class Profile:
        def __init__(self, **options):
            assert options["record_shapes"]

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def events(self):
            return events

    monkeypatch.setattr(breakdown, "profile", Profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    found = breakdown.breakdown(lambda: None, torch.device("cuda"))
    assert found == {"linear 4 → 8": 0.6, "layer norm": 0.2, "other": 0.1}
    del events[4:]
    with pytest.raises(RuntimeError, match="saw nothing of the device"):
        breakdown.breakdown(lambda: None, torch.device("cuda"))


# operators


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_operators_are_right(case, dtype):
    for provider in vit_operators.PROVIDERS.values():
        if provider.takes(case) and "cpu" in provider.devices:
            row = measure_op(provider, case, dtype)
            assert row.failed is None, provider.name
            assert not row.wrong, provider.name
            assert 0 < row.error_forward < (1e-5 if dtype == "fp32" else 1e-2)
            assert row.forward_flops == case.flops


@pytest.mark.parametrize("case", OPS, ids=lambda case: case.name)
def test_a_wrong_operator_is_flagged(case):
    right = vit_operators.PROVIDERS["visionkernels"]
    last = -1  # the fault is in the last row or image alone

    def build(case):
        operator = right.build(case)

        def wrong(*inputs):
            output = operator(*inputs).clone()
            output[last] *= 1.1
            return output

        return wrong

    assert measure_op(replace(right, build=build), case).wrong


def test_bytes_are_each_input_and_the_output_once():
    row = measure_op(vit_operators.PROVIDERS["pytorch"], OPS[0])
    assert row.forward_bytes == 4 * (2 * 7 * 24 + 2 * 24)
    row = measure_op(vit_operators.PROVIDERS["pytorch"], OPS[3])
    assert row.forward_bytes == 4 * (600 * 24 + 2 * 600 * 40 + 40 * 24 + 40)
    row.forward = Timing(0.1, 0.1, 0.1, 3)
    assert row.share(Roofs(10.0, 100.0), "forward") == pytest.approx(row.forward_bytes / 1e-4 / 1e10)
    assert row.share(Roofs(10.0, 100.0), "forward_backward") is None
    assert row.teraflops() == pytest.approx(row.forward_flops / 1e-4 / 1e12)
    assert row.share_of_products(Roofs(10.0, 100.0)) == pytest.approx(row.forward_flops / 1e-4 / 1e11)
    assert replace(row, dtype="fp16").share_of_products(Roofs(10.0, 100.0)) is None
    assert replace(row, dtype="bf16").share_of_products(Roofs(10.0, 100.0, 50.0)) == pytest.approx(
        row.forward_flops / 1e-4 / 5e10
    )


def test_who_computes_a_part_alone_is_a_measure_and_no_rival():
    alone = replace(vit_operators.PROVIDERS["cublas"], devices=("cpu",))
    row = measure_op(alone, OPS[2])
    assert row.partial
    assert row.error_forward is None
    rows = [op_row("visionkernels", 0.2), op_row("pytorch", 0.3), op_row("cublas", 0.1, partial=True)]
    record = op_record(*rows)
    assert [duel.rival.provider for duel in duels(record)] == ["pytorch"]
    assert share_of_product_alone(record, rows[0]) == pytest.approx(0.5)
    assert share_of_product_alone(record, rows[2]) is None


# what is planned


def test_what_compiles_for_minutes_is_measured_where_it_is_asked_for():
    options = run.Options()
    chosen, absent = run._pick_providers(options, "vit")
    assert "minutes" in absent["timm-compile"]
    asked = [vit_models.PROVIDERS["timm-compile"]]
    assert run._with_providers(VIT, "fp16", asked, options).providers == asked
    assert run._with_providers(replace(VIT, tags=()), "fp16", asked, options).providers == []
    named = run.Options(cases=[VIT.name])
    assert run._with_providers(replace(VIT, tags=()), "fp16", asked, named).providers == asked
    assert not {"timm-compile", "transformers-compile"} & {provider.name for provider in chosen}


def test_a_gpu_gets_half_precision_and_every_size():
    for suite in ("vit", "vit-ops"):
        jobs = run._jobs(suite, run.Options(), torch.device("cuda"))
        assert {dtype for _, dtype in jobs} == {"fp16"}
        assert {dtype for _, dtype in run._jobs(suite, run.Options(), CPU)} == {"fp32"}
    batches = {}
    for case in default_cases("vit", "cuda", quick=False):
        batches.setdefault(case.title, []).append(case.batch)
    assert batches == {"ViT-B/16": [1, 8, 32, 128, 256], "ViT-L/16": [1, 32, 128], "DINOv2-B/14": [1, 32, 128]}
    assert [case.name for case in MODELS.values() if "breakdown" in case.tags] == ["vit-b-n1", "vit-b-n128"]


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SUITES["vit"], VIT.name, VIT)
    for case in OPS:
        monkeypatch.setitem(SUITES["vit-ops"], case.name, case)
    monkeypatch.setattr(timing, "QUICK", EFFORT)
    monkeypatch.setattr(timing, "roofs", lambda device, effort: Roofs(100.0, 1000.0))


def test_bench_runs_both_suites(tiny, tmp_path, capsys):
    names = [VIT.name, *(case.name for case in OPS)]
    arguments = ["bench", "--device", "cpu", "--quick", "--suite", "vit", "vit-ops", "--case", *names]
    assert main([*arguments, "--against", "transformers-sdpa", "pytorch", "sdpa-flash", "--save", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "Tiny ViT, 32×32" in out
    assert "linear + residual" in out
    records = {record.suite: record for record in map(load, tmp_path.iterdir())}
    assert [row.provider for row in records["vit"].rows] == [
        "visionkernels", "visionkernels-eager", "transformers-sdpa",
    ]  # fmt: skip
    assert records["vit"].cases == [VIT]
    assert records["vit-ops"].cases == list(OPS)
    assert records["vit"].environment.versions["transformers"]
    assert not any(row.failed or row.wrong for record in records.values() for row in record.rows)


def test_without_transformers_the_models_are_not_measured_and_it_says_why(monkeypatch):
    for name in ("transformers", vit_models.PROVIDERS["visionkernels"].module):
        monkeypatch.setitem(sys.modules, name, None)
    chosen, absent = run._pick_providers(run.Options(), "vit")
    assert "ModuleNotFoundError" in absent["visionkernels"]
    assert "visionkernels" not in {provider.name for provider in chosen}


# tables and charts


def op_row(provider, milliseconds, case="gelu", **fields):
    time = Timing(milliseconds, milliseconds, milliseconds, 5)
    figures = {"forward": time, "forward_flops": 10**9, "forward_bytes": 10**6, "error_forward": 1e-4, **fields}
    return Row(case, provider, "fp16", provider.startswith("vision"), 1e-3, **figures)


def model_row(provider, milliseconds, case=VIT.name, **fields):
    memory = {"weights_megabytes": 172.2, "forward_megabytes": 12.3, "forward_bytes": None}
    return op_row(provider, milliseconds, case, **{**memory, **fields})


def op_record(*rows):
    record = a_record(*rows, suite="vit-ops")
    record.cases, record.roofs = list(OPS), Roofs(100.0, 1000.0, 20000.0)
    return record


def model_record(*rows):
    record = a_record(*rows, suite="vit")
    record.cases, record.roofs = [VIT, replace(VIT, name="tiny-n9", batch=9)], Roofs(100.0, 1000.0, 20000.0)
    return record


PARTS = {"attention": 0.3, "linear 24 → 72": 0.6, "other": 0.1}
ROWS = [
    model_row("visionkernels", 0.2), model_row("visionkernels-eager", 1.0, breakdown=PARTS),
    model_row("timm-graph", 0.1), model_row("visionkernels", 0.5, "tiny-n9"), model_row("timm-graph", 0.9, "tiny-n9"),
]  # fmt: skip


def test_the_summary_of_models_sets_us_beside_the_fastest_other():
    lines = summary(model_record(*ROWS)).splitlines()
    titles = ["workload", "dtype", "forward, ms", "fastest other", "", "TFLOP/s", "of a large product"]
    assert [cell.strip() for cell in lines[0].split("|")[1:8]] == titles
    start = "| Tiny ViT, 32², batch 3 | fp16 | 0.2 | 0.1 (timm-graph) | **0.5×, slower** | 5 | 25 % | 172 | 12.3 |"
    assert lines[2] == start
    assert lines[3].startswith("| Tiny ViT, 32², batch 9 | fp16 | 0.5 | 0.9 (timm-graph) | 1.8× |")
    assert "Faster than every other in 1 of 2 comparisons of this run." in lines


def test_the_tables_of_models_hold_every_batch_and_the_breakdown():
    lines = full_tables(model_record(*ROWS)).splitlines()
    assert lines[0] == "**Tiny ViT, 32×32**"
    assert lines[2].startswith("| batch | dtype | provider | forward |")
    assert [line.split("|")[1].strip() for line in lines[4:9]] == ["3", "3", "3", "9", "9"]
    assert "| linear 24 → 72 | 0.6 (60 %) |" in lines
    assert any("a large float16 product at 20 TFLOP/s" in line for line in lines)
    assert any("on an idle device" in line for line in lines)


def test_the_tables_of_operators_share_one_a_curve():
    rows = [
        op_row("visionkernels", 0.2),
        op_row("cublas", 0.1, partial=True),
        op_row("visionkernels", 0.2, "norm", forward_flops=None),
    ]
    lines = full_tables(op_record(*rows)).splitlines()
    assert "**linear, GELU**" in lines
    row = next(line for line in lines if line.startswith("| 7 | fp16 | visionkernels |") and "50 %" in line)
    assert "| 5 | 25 % | 50 % |" in row  # TFLOP/s, of a large product, of the product alone


def test_terminal_tables_of_both_are_at_most_100_columns():
    from rich.console import Console

    console = Console(width=300, record=True, file=io.StringIO())
    full = {"host_microseconds": 12345.0, "forward_graph": Timing(0.0123, 0.01, 0.01, 3)}
    for record in (model_record(*ROWS), op_record(op_row("visionkernels-triton", 0.2, **full), op_row("cublas", 0.1))):
        for table in rich_tables(record):
            console.print(table)
    text = console.export_text()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    for part in ("batch", "Tiny ViT, 32×32", "172", "TF/s", "visionkernels-triton"):
        assert part in text


def test_records_of_both_survive_their_files(tmp_path):
    for record in (model_record(*ROWS), op_record(op_row("visionkernels", 0.2))):
        assert load(save(record, tmp_path)) == record


def test_charts_are_drawn_and_the_same_each_time(tmp_path):
    import matplotlib as mpl

    many = [op_row(name, 0.1 + i, case.name) for i, case in enumerate(OPS) for name in ("visionkernels", "pytorch")]
    for row in many:
        row.forward_flops = None if row.case == "norm" else 10**9
    for record, names in ((model_record(*ROWS), ["batches", "breakdown"]), (op_record(*many), ["operators"])):
        assert plots.names(record) == names
        with mpl.rc_context({"svg.fonttype": "none"}):
            first, second = ([*plots.draw_record(record, tmp_path / name)] for name in "ab")
        assert len(first) == 2 * len(names)
        for one, two in zip(first, second, strict=True):
            assert one.read_bytes() == two.read_bytes()
    text = (tmp_path / "a" / "vit-nvidia-h200-breakdown.svg").read_text()
    for part in ("linear 24 → 72", "60 %", "0.6 ms", "Tiny ViT, 32², batch 3"):
        assert part in text
    assert plots.names(model_record(ROWS[0])) == ["batches"]
    text = (tmp_path / "a" / "vit-ops-nvidia-h200-operators.svg").read_text()
    for part in ("a copy, 100", "a large product, 20", "GB/s", "TFLOP/s", "patch embedding"):
        assert part in text


def test_remarks_say_what_timm_is_and_what_was_refused():
    lines = remarks(model_record(model_row("timm", 0.2, note=vit_models.PROVIDERS["timm"].note)))
    assert any("only seen to be finite" in line for line in lines)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["visionkernels", "visionkernels-eager", "transformers-sdpa", "transformers-eager"])
def test_models_on_a_gpu(name):
    device = torch.device("cuda")
    subject = vit_subject.subject_of(VIT, torch.float16, device)
    row = vit_models.measure(vit_models.PROVIDERS[name], VIT, "fp16", subject, vit_subject.Truth(VIT, subject), EFFORT)
    assert row.failed is None
    assert not row.wrong
    assert row.forward_megabytes > 0
    if name == "visionkernels-eager":
        assert sum(row.breakdown.values()) > 0
        assert row.breakdown["other"] < 0.5 * sum(row.breakdown.values())


@pytest.mark.gpu
@pytest.mark.parametrize("case", OPS[1:4], ids=lambda case: case.name)
def test_operators_on_a_gpu(case):
    inputs = vit_operators.draw(case, torch.float16, torch.device("cuda"))
    truth = vit_operators.Truth(case, inputs)
    for provider in vit_operators.PROVIDERS.values():
        if provider.takes(case):
            row = vit_operators.measure(provider, case, "fp16", inputs, truth, EFFORT)
            assert row.failed is None, provider.name
            assert not row.wrong, provider.name
