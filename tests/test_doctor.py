"""`visionkernels doctor`: what it says of a machine, and that it finds what is wrong."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from visionkernels import _doctor_check, _doctor_paths, _doctor_report, doctor
from visionkernels.cli import main
from visionkernels.ops.deformable_attention import cpu, cpu_passes, op, registration

CPU = torch.device("cpu")
ALL = [(o, d, w, t) for o in _doctor_paths.OPERATORS for d in ("forward", "backward") for w in ("decoder", "encoder")
       for t in ("fp32", "fp16", "bf16")]  # fmt: skip


@pytest.fixture(autouse=True)
def without_gpus(request, monkeypatch):
    """The GPU tests look at GPUs; the others say the same on every machine."""
    if not request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def two_calls(monkeypatch):
    """The self-check on one workload and one dtype: its code, in a tenth of the time."""
    monkeypatch.setattr(_doctor_check, "_workloads", lambda device: (_doctor_check.DECODER,))
    monkeypatch.setattr(_doctor_check, "DTYPES", {"fp32": torch.float32})


def test_a_healthy_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    found = json.loads(captured.out)
    assert set(found) == {"ok", "versions", "commit", "devices", "no_gpu", "checks"}
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert {"python", "triton", "transformers", "numba", "visionkernels"} <= set(found["versions"])
    (device,) = found["devices"]
    assert (device["device"], device["compute_capability"]) == ("cpu", None)
    checks = {(c["operator"], c["direction"], c["workload"], c["dtype"]): c for c in found["checks"]}
    assert sorted(checks) == sorted(ALL)
    for check in checks.values():
        assert check["ok"]
        assert 0 < check["error"] <= check["allowed"]


def test_what_it_prints(two_calls, capsys):
    threads = torch.get_num_threads()
    assert main(["doctor"]) == 0
    assert torch.get_num_threads() == threads
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out
    assert "every operator, forward and backward:" in out
    assert "All 4 checks against float64 went well." in out
    assert "fused backward" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("operator", "direction", "break_it"),
    [
        ("ms_deform_attn", "forward", lambda f: lambda *a, **k: f(*a, **k) * (1 + 1e-4)),
        ("fused_ms_deform_attn", "forward", lambda f: lambda *a, **k: f(*a, **k) * (1 + 1e-4)),
    ],
)
def test_an_operator_that_is_slightly_wrong(two_calls, monkeypatch, capsys, operator, direction, break_it):
    monkeypatch.setattr(op, operator, break_it(getattr(op, operator)))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"wrong: cpu, {operator}, {direction}, decoder, fp32: an error of 0.0001" in out
    assert f"wrong: cpu, {operator}, backward" in out
    assert "2 of 4 checks against float64 failed" in out


@pytest.mark.parametrize("gradient", [0, 1, 2, 3], ids=["value", "references", "offsets", "logits"])
def test_a_wrong_gradient(two_calls, monkeypatch, capsys, gradient):
    backward = cpu.fused_backward

    def wrong(*args, **kwargs):
        gradients = list(backward(*args, **kwargs))
        gradients[gradient].flatten()[7] += 0.01 * gradients[gradient].abs().max()
        return tuple(gradients)

    monkeypatch.setattr(cpu, "fused_backward", wrong)
    assert main(["doctor", "--json"]) == 1
    failed = [c for c in json.loads(capsys.readouterr().out)["checks"] if not c["ok"]]
    assert [(c["operator"], c["direction"]) for c in failed] == [("fused_ms_deform_attn", "backward")]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda *a, **k: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda value, *rest: value.new_full((2, 37, 256), torch.nan), "the result holds NaN"),
        (lambda value, *rest: value.new_zeros(2, 37, 255), "AssertionError: the result is [2, 37, 255]"),
    ],
    ids=["raises", "nan", "shape"],
)
def test_an_operator_that_fails(two_calls, monkeypatch, capsys, broken, message):
    monkeypatch.setattr(op, "ms_deform_attn", broken)
    assert main(["doctor"]) == 1
    assert message in " ".join(capsys.readouterr().out.split())


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB\nand more")


@pytest.mark.parametrize("where", ["calls", "reference_ms_deform_attn"])
def test_a_device_without_memory_for_the_check(two_calls, monkeypatch, capsys, where):
    monkeypatch.setattr(_doctor_check, where, out_of_memory)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    failed = 4 if where == "calls" else 2
    assert f"{failed} of 4 checks against float64 failed" in captured.out
    assert "decoder, fp32: OutOfMemoryError: CUDA out of memory." in " ".join(captured.out.split())
    assert captured.err == ""


def test_one_dtype_without_memory(monkeypatch, capsys):
    """The table has a row for every direction of every operator, in each dtype."""
    monkeypatch.setattr(_doctor_check, "_workloads", lambda device: (_doctor_check.DECODER,))
    monkeypatch.setattr(_doctor_check, "_has_bins", lambda device: True)
    calls = _doctor_check.calls
    monkeypatch.setattr(
        _doctor_check, "calls", lambda w, name, d: (out_of_memory if name == "fp32" else calls)(w, name, d)
    )
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "6 of 18 checks against float64 failed" in out
    assert "fused deterministic backward" in out


def test_a_device_that_cannot_say_its_paths(two_calls, monkeypatch, capsys):
    monkeypatch.setattr(_doctor_paths, "paths", out_of_memory)
    assert main(["doctor"]) == 0  # the numbers are right
    out = " ".join(capsys.readouterr().out.split())
    assert "forward and backward: unknown (OutOfMemoryError: CUDA out of memory. Tried to allocate 2 MiB)" in out


@pytest.mark.gpu
def test_a_full_gpu():
    """In a process of its own: this one may hold memory that PyTorch would hand out again."""
    script = "import sys, torch; torch.cuda.set_per_process_memory_fraction(1e-9)\n"
    script += "from visionkernels.cli import main; sys.exit(main(['doctor']))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stderr
    out = " ".join(done.stdout.split())
    assert "unknown (OutOfMemoryError: CUDA out of memory." in out
    assert "wrong: cuda:0, ms_deform_attn, forward, decoder, fp32: OutOfMemoryError: CUDA out of memory." in out


def test_one_wrong_number_of_many_is_found():
    right = torch.randn(100_000, dtype=torch.float64)
    wrong = right.clone()
    wrong[777] += 0.1
    assert _doctor_check.largest_error(wrong, right) > 1e-2


def test_without_numba_it_says_what_to_install(two_calls, monkeypatch, capsys):
    monkeypatch.setattr(cpu, "_compiled", lambda: None)
    used = []
    monkeypatch.setattr(cpu, "attend", lambda *a: used.append(a) or cpu_passes.attend(*a))
    assert main(["doctor"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "PyTorch's own operators (Numba is not installed" in out
    assert "pip install 'visionkernels[cpu]'" in out
    assert used  # as it says


def test_what_is_not_installed_is_said(two_calls, monkeypatch, capsys):
    from visionkernels.bench import environment

    version = environment._version
    monkeypatch.setattr(environment, "_version", lambda name: None if name == "triton" else version(name))
    assert main(["doctor"]) == 0
    assert "not installed: triton\n" in capsys.readouterr().out


def test_neither_rich_nor_another_extra_is_needed(two_calls, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "rich" else find(name, *rest))
    for name in ("rich", "matplotlib", "transformers", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["doctor"]) == 0
    captured = capsys.readouterr()
    assert "2/2 cpu fused_ms_deform_attn decoder fp32" in captured.err
    assert "\r" not in captured.out


def test_a_bar_in_a_terminal(two_calls, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with _doctor_report.progress(3, quiet=False) as started:
        for step in "abc":
            started(step)
    assert main(["doctor", "--json"]) == 0
    json.loads(capsys.readouterr().out)


def test_a_gpu_without_triton(monkeypatch):
    registration._launch.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "visionkernels.ops.deformable_attention.plan", raising=False)
    found = _doctor_paths.paths(torch.device("cuda", 0))
    registration._launch.cache_clear()
    assert {path.takes for path in found} == {"none"}
    assert "install it with `pip install triton`" in found[0].why
    assert not _doctor_check._has_bins(torch.device("cuda", 0))  # which would ask Triton


@pytest.mark.parametrize("warps", [False, True], ids=["any-gpu", "warps"])
def test_the_paths_of_a_gpu(monkeypatch, warps):
    """Asked of the functions that plan a launch; those need no GPU."""
    pytest.importorskip("triton")
    from visionkernels.ops.deformable_attention import launch, plan

    for module in (launch, plan):
        monkeypatch.setattr(module, "has_warp_instructions", lambda device: warps)
    monkeypatch.setattr(plan, "_plan", plan._plan.__wrapped__)  # what it keeps is of other kernels
    found = {}
    for operator in _doctor_paths.OPERATORS:
        for workload in ("encoder", "decoder"):
            for dtype in ("fp32", "fp64"):
                rows = _doctor_paths._gpu_paths(launch, CPU, operator, workload, dtype)
                found[workload, dtype] = [row.takes for row in rows]
    usual = ["kernel for any GPU", "atomic sums", "none: raises an error", "kernel for any GPU"]
    binned = ["warp kernel", "binned sums", "binned sums, sorted", "warp kernel"]
    assert found["encoder", "fp64"] == found["decoder", "fp64"] == usual
    assert found["encoder", "fp32"] == (binned if warps else usual)
    assert found["decoder", "fp32"] == ([binned[0], "atomic sums", *binned[2:]] if warps else usual)


def test_paths_that_differ_are_told_apart():
    paths = [
        _doctor_paths.Path(o, "forward", w, d, "slow" if d == "fp64" else "fast", "so")
        for o in _doctor_paths.OPERATORS for w in ("encoder", "decoder") for d in ("fp32", "fp64")
    ]  # fmt: skip
    assert _doctor_report._grouped(paths) == {"forward, fp32": ("fast", "so"), "forward, fp64": ("slow", "so")}
    assert list(_doctor_report._grouped(paths[1::2])) == ["every operator, forward and backward"]


def test_a_build_for_gpus_that_sees_none(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "its driver is too old for CUDA 13.0" in doctor._no_gpu()
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm 7.0" in doctor._no_gpu()


@pytest.mark.gpu
def test_on_gpus():
    report = doctor.examine(quiet=True)
    assert [device.device for device in report.devices] == [
        "cpu",
        *(f"cuda:{i}" for i in range(torch.cuda.device_count())),
    ]
    assert report.no_gpu is None
    assert not [check for check in report.checks if not check.ok]
    assert all(len(line) <= 80 for line in _doctor_report.lines(report))


KERNELS = {
    ("forward", "warp kernel"): "_forward_warp_kernel",
    ("forward", "kernel for any GPU"): "_forward_kernel",
    (_doctor_paths.VALUE, "binned sums"): "_tile_kernel",
    (_doctor_paths.VALUE, "atomic sums"): "_backward_kernel",
    (_doctor_paths.POINTS, "warp kernel"): "_backward_points_kernel",
    (_doctor_paths.POINTS, "kernel for any GPU"): "_backward_kernel",
}


@pytest.mark.gpu
@pytest.mark.parametrize("workload", ["encoder", "decoder"])
def test_the_paths_are_those_that_a_call_takes(workload):
    """The names of the kernels that a profiler sees."""
    case = _doctor_paths.WORKLOADS[workload]
    device = torch.device("cuda", 0)
    names = {}
    for dtype in ("fp16", "fp64"):
        problem = _doctor_paths._problem(case, _doctor_paths.DTYPES[dtype], device, fused=False)
        leaves = [tensor.uniform_().requires_grad_() for tensor in (problem.value, problem.points, problem.weights)]
        call = lambda leaves=leaves: op.ms_deform_attn(leaves[0], list(case.levels), None, *leaves[1:])  # noqa: E731
        call().sum().backward()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            call().sum().backward()
            torch.cuda.synchronize()
        names[dtype] = {event.name for event in seen.events()}
    for path in _doctor_paths.paths(device):
        if (path.operator, path.workload) != ("ms_deform_attn", workload) or path.dtype not in names:
            continue
        launched = names[path.dtype]
        if kernel := KERNELS.get((path.part, path.takes)):
            assert any(kernel in name for name in launched), (path, launched)
