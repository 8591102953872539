"""Export every model in every format, compare it with PyTorch, and write the table docs/export.md.

    python scripts/export_table.py                  fill what is missing in docs/export.json, and write the table
    python scripts/export_table.py --again rt_detr  measure these models anew
    python scripts/export_table.py --check          measure nothing; fail unless docs/export.md is what the results say

The models are small ones of transformers with random weights, made by the test suite. A whole run takes an hour.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests")]

LIMIT = 600  # seconds that a cell may take
JSON, TABLE = ROOT / "docs" / "export.json", ROOT / "docs" / "export.md"
TIMES = ROOT / "docs" / "export-timing.json"  # of scripts/export_timing.py, on a GPU

# column: format of the command, sizes that stay open
COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "ONNX": ("onnx", ("batch",)),
    "ONNX, open image size": ("onnx", ("batch", "height", "width")),
    "ONNX for TensorRT": ("tensorrt", ("batch",)),
    "AOTInductor": ("aoti", ("batch",)),
}
OPERATORS = {
    "`ms_deform_attn`": "ms_deform_attn()",
    "`ms_deform_attn`, points `[3, 6, 3]`": "ms_deform_attn((3, 6, 3))",
    "`ms_deform_attn`, nearest": "ms_deform_attn((2, 3, 1), 'nearest')",
    "`fused_ms_deform_attn`, boxes and mask": "fused_ms_deform_attn()",
    "`MSDeformAttn`": "msdeformattn()",
}
DETECTORS = {
    "Deformable DETR": "deformable_detr",
    "Deformable DETR, two stages": "deformable_detr_two_stage",
    "RT-DETR": "rt_detr",
    "RT-DETRv2": "rt_detr_v2",
    "RT-DETRv2, discrete": "rt_detr_v2_discrete",
    "D-FINE": "d_fine",
    "D-FINE, points `[3, 6, 3]`": "d_fine_points",
    "Grounding DINO": "grounding_dino",
    "RF-DETR": "rf_detr",
    "Mask2Former": "mask2former",
    "LW-DETR": "lw_detr",
    "DEIMv2": "deimv2",
    "MM Grounding DINO": "mm_grounding_dino",
    "PP-DocLayoutV2": "pp_doclayout_v2",
    "PP-DocLayoutV3": "pp_doclayout_v3",
    "PP-DocLayoutV4": "pp_doclayout_v4",
    "OmDet-Turbo": "omdet_turbo",
    "OneFormer": "oneformer",
}
VITS = {
    "ViT": "vit",
    "DeiT": "deit",
    "DINOv2": "dinov2",
    "DINOv2 with registers": "registers",
    "DINOv3": "dinov3",
    "CLIP": "clip-full",
    "SigLIP": "siglip",
    "BEiT": "beit",
}
MODELS = DETECTORS | VITS  # row: what the test suite calls it
SHIPPED = "the detector that ships"


def build(row: str, labels: tuple[str, ...]) -> Any:
    """The subject of a row."""
    import torch

    from visionkernels.export import _samples, _subject

    torch.manual_seed(0)
    if row in OPERATORS:
        return eval(f"samples.{OPERATORS[row]}", {"samples": _samples})
    if row == SHIPPED:
        return _subject.of_checkpoint(None, open_image="height" in labels)
    if row in VITS:
        from models import tiny_vits

        from visionkernels.export import _vit

        with tempfile.TemporaryDirectory() as folder:
            tiny_vits.save(tiny_vits.CASES[VITS[row]], Path(folder))
            return _vit.of_checkpoint(folder, open_image="height" in labels)
    from integrations import tiny_detectors

    model, inputs = tiny_detectors.build(DETECTORS[row])
    if "height" in labels:  # no two sizes alike, and no level of one pixel
        inputs["pixel_values"] = torch.randn(2, 3, 160, 224)
    return _subject.of_model(row, model, inputs)


def measure(row: str, column: str) -> dict[str, Any]:
    """One cell: the largest error, or the reason why there is none."""
    from visionkernels._checkpoint import one_line
    from visionkernels.errors import UserError
    from visionkernels.export import command

    kind, labels = COLUMNS[column]
    start = time.perf_counter()
    try:
        subject = build(row, labels)
        if row in OPERATORS:
            labels = tuple(label for label in subject.sizes if "height" in labels or label in ("batch", "queries"))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{command.FORMATS[kind]}"
            options = command.Options(row, kind, dynamic=labels, output=path)
            found = command.check(subject, command.write(subject, options), labels)
    except (UserError, RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:  # a reason, too
        return {"ok": False, "reason": f"{'' if isinstance(error, UserError) else 'running it: '}{one_line(error)}"}
    wrong = [one for one in found if not one.ok]
    result: dict[str, Any] = {
        "ok": not wrong,
        "error": max((one.error for one in found if not one.failure), default=0.0),
    }
    if wrong:
        result["reason"] = (
            wrong[0].failure or f"{wrong[0].output} is wrong by {wrong[0].error:.1e} on {wrong[0].inputs}"
        )
    return result | {"seconds": round(time.perf_counter() - start)}


def measure_within_limit(row: str, column: str) -> dict[str, Any]:
    """One cell, in a process of its own, which is ended with all that it has started after `LIMIT` seconds."""
    command = [sys.executable, __file__, "--cell", row, column]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            printed, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return {"ok": False, "reason": f"took more than {LIMIT // 60} minutes on two cores"}
    if process.returncode:
        raise RuntimeError(f"{row} | {column}: the process ended with {process.returncode}")
    return json.loads(printed.splitlines()[-1])


def table(results: dict[str, Any]) -> str:
    """The page."""
    versions, cells = results["versions"], results["cells"]
    names = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# What can be exported",
        "",
        "Written by `python scripts/export_table.py`; [deploy.md](deploy.md) says how to export. A cell is green when",
        "the artefact agrees with PyTorch to 1e-5 of an output's largest entry, on random inputs of the sizes it was",
        "made with and of others, and holds the largest error. The models are small and random; batch is",
        "open everywhere, queries too where they are an input. ONNX ran in onnxruntime; ONNX for TensorRT is checked",
        "against the plugin's documented rules and ran in onnx's reference evaluator, **not in TensorRT**; of a vision",
        "transformer it is standard operators, and ran in onnxruntime. AOTInductor ran on the CPU. A cell had",
        f"{LIMIT // 60} minutes on two cores. Versions: {names}.",
        "",
        "| model | " + " | ".join(COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    reasons: list[str] = []
    for row in (*OPERATORS, *MODELS, SHIPPED):
        shown = []
        for column in COLUMNS:
            cell = cells.get(f"{row} | {column}")
            if cell is None:
                shown.append("not measured")
            elif cell["ok"]:
                shown.append(f"🟢 {cell['error']:.0e}")
            else:
                if cell["reason"] not in reasons:
                    reasons.append(cell["reason"])
                shown.append(f"🔴 {reasons.index(cell['reason']) + 1}")
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    lines += ["", *(f"{number}. {reason}" for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join([*lines, *times(json.loads(TIMES.read_text()))]).rstrip() + "\n"


def times(found: dict[str, Any]) -> list[str]:
    """The section about the time of AOTInductor packages."""
    environment = found["environment"]
    names = ", ".join(f"{name} {environment['versions'][name]}" for name in ("torch", "triton", "transformers"))
    ways = {"eager": "eager", "compile": "`torch.compile`", "package": "package", "kept": "package, operators kept"}
    lines = [
        "## Time on a GPU",
        "",
        f"Milliseconds of a call on one {environment['device']}, the time on the host included;",
        f"{names}; {environment['date'][:10]}.",
        "In brackets how far the first output is from eager PyTorch's, of its largest entry, where it is not equal.",
        "Measured by `python scripts/export_timing.py`.",
        "`vk.ViT` replays a CUDA graph of its own, and its package holds PyTorch's operators; all else runs this",
        "package's kernels. Convolutions do not use TF32.",
        "",
        "| | " + " | ".join(ways.values()) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    for row, cells in found["rows"].items():
        shown = [_time(cells[way]) for way in ways]
        lines.append(f"| {row} | " + " | ".join(shown) + " |")
    return lines


def _time(cell: dict[str, Any]) -> str:
    if "reason" in cell:
        return "failed: [why](export-timing.json)"
    return f"{cell['milliseconds']:.3g}" + (f" ({cell['error']:.0e})" if cell["error"] else "")


def fill(again: list[str], only: Callable[[str, str], bool]) -> None:
    """Measure what is missing, and write both files after each cell."""
    import onnx
    import onnxruntime
    import torch
    import transformers

    results = json.loads(JSON.read_text()) if JSON.exists() else {"cells": {}}
    results["versions"] = {
        "torch": torch.__version__.split("+")[0],
        "transformers": transformers.__version__,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
    }
    for row in (*OPERATORS, SHIPPED, *MODELS):
        for column in COLUMNS:
            key = f"{row} | {column}"
            if not only(row, column) or (key in results["cells"] and MODELS.get(row, row) not in again):
                continue
            cell = measure_within_limit(row, column)
            print(key, cell, flush=True)
            if JSON.exists():  # another run may have written since
                results["cells"] = json.loads(JSON.read_text())["cells"]
            results["cells"][key] = cell
            JSON.write_text(json.dumps(results, indent=1) + "\n")
            TABLE.write_text(table(results))


def main() -> int:
    """Run the script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="measure nothing, compare the table with the results")
    parser.add_argument("--again", metavar="MODEL", nargs="+", default=[], help="measure these models anew")
    parser.add_argument("--row", metavar="MODEL", nargs="+", help="only these models")
    parser.add_argument("--column", metavar="NAME", nargs="+", help="only these formats")
    parser.add_argument("--cell", metavar=("MODEL", "NAME"), nargs=2, help="print one cell, and write nothing")
    args = parser.parse_args()
    if args.cell:
        from visionkernels.export.command import be_quiet

        warnings.simplefilter("ignore")
        be_quiet()
        print(json.dumps(measure(*args.cell)))
        return 0
    if args.check:
        if TABLE.read_text() != table(json.loads(JSON.read_text())):
            print(
                "docs/export.md is not what docs/export.json says: run python scripts/export_table.py", file=sys.stderr
            )
            return 1
        return 0
    columns, rows = args.column or COLUMNS, args.row or [*OPERATORS, *MODELS.values(), SHIPPED]
    fill(args.again, lambda row, column: column in columns and MODELS.get(row, row) in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
