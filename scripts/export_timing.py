"""Time AOTInductor packages on this machine's GPU, beside the same module run eagerly and by torch.compile.

    python scripts/export_timing.py docs/export-timing.json        a few minutes; then scripts/export_table.py
    python scripts/export_timing.py /tmp/quick.json --quick        small modules, on the CPU too

Every package is made in a process of its own, several at a time.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

WAYS = ("compile", "package", "kept")  # that are made; `kept`: the package calls this package's operators


def subjects(quick: bool) -> dict[str, Any]:
    """Functions that make what is timed, by name; each takes the device."""
    import torch
    from torch import Tensor, nn

    import visionkernels as vk
    from visionkernels.export import _samples, _subject
    from visionkernels.export._vit import of_vit
    from visionkernels.models import ViTConfig

    levels = ((25, 34), (13, 17)) if quick else ((100, 134), (50, 67), (25, 34), (13, 17))

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = vk.MSDeformAttn(256, len(levels), 8, 4)

        def forward(self, references: Tensor, **maps: Tensor) -> Tensor:
            pixels, shapes = _samples.flatten(tuple(maps[f"level_{i}"] for i in range(len(levels))))
            return self.attention(pixels, references, pixels, shapes)

    def encoder() -> Any:
        inputs = {f"level_{i}": torch.randn(4, 256, h, w) for i, (h, w) in enumerate(levels)}
        inputs["references"] = torch.rand(4, sum(h * w for h, w in levels), len(levels), 2)
        return _subject.Subject("encoder", Encoder().eval(), inputs, ("output",), {}).half()

    def detector() -> Any:
        return _subject.of_checkpoint(None)

    def vit() -> Any:
        layers = {"num_layers": 2, "hidden_size": 192, "num_heads": 3, "intermediate_size": 768} if quick else {}
        model = vk.ViT(ViTConfig("vit", **layers))
        subject = of_vit("vit", model)
        subject.inputs["pixel_values"] = torch.randn(8, 3, 224, 224)
        return subject.half()

    return {
        "attention of a Deformable DETR encoder, 800×1066, batch 4, fp16": encoder,
        "the detector that ships, batch 1, fp32": detector,
        "ViT-B/16, batch 8, fp16": vit,
    }


def make(name: str, quick: bool, device: str) -> Any:
    """Module and inputs of a row, on the device."""
    import torch

    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # its rounding puts a detector's queries in another order
    subject = subjects(quick)[name]().to(torch.device(device))
    return subject.module, subject.inputs


def build(task: tuple[str, str, bool, str, str]) -> tuple[str, str, str, float]:
    """Make a package, or fill the cache of torch.compile; what went wrong, or nothing, and the seconds."""
    name, way, quick, device, path = task
    import torch

    from visionkernels._checkpoint import one_line
    from visionkernels.errors import UserError
    from visionkernels.export import aoti, command

    command.be_quiet()
    start = time.perf_counter()
    try:
        module, inputs = make(name, quick, device)
        with torch.inference_mode():
            if way == "compile":
                torch.compile(module)(**inputs)
            else:
                aoti.export(module, inputs, path, keep_operators=way == "kept")
    except (UserError, RuntimeError) as error:  # a reason, too
        return name, way, one_line(error), 0.0
    return name, way, "", time.perf_counter() - start


def measure(name: str, paths: dict[str, str], quick: bool, device: str) -> dict[str, Any]:
    """Of each way the milliseconds of a call and how far its output is from eager PyTorch's, or why there are none."""
    import torch

    from visionkernels._checkpoint import one_line
    from visionkernels.bench import timing
    from visionkernels.errors import UserError

    effort = timing.QUICK if quick else timing.GPU if device == "cuda" else timing.CPU
    module, inputs = make(name, quick, device)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        truth = _first(module(**inputs)).double()
        for way, path in paths.items():
            try:
                call = _caller(way, path, module, inputs)
                error = ((_first(call()).double() - truth).abs().max() / truth.abs().max()).item()
                call()
                milliseconds = timing.time_latency(call, torch.device(device), effort).median
                found[way] = {"milliseconds": milliseconds, "error": float(f"{error:.2g}")}
            except (UserError, RuntimeError) as problem:
                found[way] = {"reason": one_line(problem)}
    return found


def _caller(way: str, path: str, module: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    """A function that makes one call."""
    import torch

    from visionkernels.export import aoti

    if way == "eager":
        return lambda: module(**inputs)
    if way == "compile":
        compiled = torch.compile(module)
        return lambda: compiled(**inputs)
    package = aoti.load(path)
    return lambda: package(inputs)


def _first(output: Any) -> Any:
    """The first tensor of what a module or a package returns."""
    from torch.utils import _pytree

    return _pytree.tree_leaves(output)[0]


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small modules")
    parser.add_argument("output", type=Path, help="the JSON file to write: milliseconds, and errors beside eager")
    options = parser.parse_args()
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # there are several processes
    import torch

    from visionkernels.bench.environment import environment

    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        tasks = [
            (name, way, options.quick, device, f"{folder}/{i}-{way}.pt2")
            for i, name in enumerate(subjects(options.quick))
            for way in WAYS
        ]
        reasons: dict[str, dict[str, str]] = {}
        workers = min(len(tasks), os.cpu_count() or 1)
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, spawn, max_tasks_per_child=1) as pool:
            for done in as_completed([pool.submit(build, task) for task in tasks]):
                name, way, reason, seconds = done.result()
                print(f"{name}: {way} {reason or f'made in {seconds:.0f} s'}", file=sys.stderr, flush=True)
                if reason:
                    reasons.setdefault(name, {})[way] = reason
        rows = {}
        for name in subjects(options.quick):
            failed = reasons.get(name, {})
            paths = {"eager": ""} | {t[1]: t[4] for t in tasks if t[0] == name and t[1] not in failed}
            rows[name] = measure(name, paths, options.quick, device)
            rows[name] |= {way: {"reason": reason} for way, reason in failed.items()}
            print(name, {way: cell.get("milliseconds") for way, cell in rows[name].items()}, flush=True)
    facts = asdict(environment(torch.device(device), ()))
    options.output.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
