"""What `visionkernels export` does: find the model, write the artefact, check it, and say what was found."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionkernels._checkpoint import require
from visionkernels.errors import UserError
from visionkernels.export._subject import Subject
from visionkernels.export.check import Comparison
from visionkernels.export.onnx import DEFAULT_OPSET, Exported

FORMATS = {"onnx": ".onnx", "tensorrt": ".onnx", "aoti": ".pt2"}
DTYPES = ("fp32", "fp16")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Options:
    """The arguments of the command; see its help."""

    model: str | None
    format: str
    opset: int = DEFAULT_OPSET
    dynamic: tuple[str, ...] = ()
    output: Path | None = None
    dtype: str = "fp32"
    plugin_version: str = "2"
    keep_operators: bool = False
    check: bool = False
    device: str = "cpu"


def run(options: Options) -> int:
    """Export, and check if that is asked for.

    Returns:
        0, or 1 if the artefact and PyTorch differ.

    Raises:
        UserError: something that was asked for cannot be had.
    """
    require("rich")
    _check_options(options)
    be_quiet()
    with _spinner("loading the model"):
        subject = find_subject(options)
    with _spinner("exporting"):
        report = write(subject, options)
    _print_report(subject, report)
    if not options.check:
        return 0
    with _spinner("checking"):
        found = check(subject, report, options.dynamic)
    _print_check(found)
    return 0 if all(one.ok for one in found) else 1


def find_subject(options: Options) -> Subject:
    """The model that the command names: a sample of this package's own, or a checkpoint of a ViT or of a detector."""
    from visionkernels._devices import find_device
    from visionkernels.export import _samples, _subject, _vit
    from visionkernels.models import families
    from visionkernels.models.files import read_settings

    half, open_image = options.dtype == "fp16", {"height", "width"} <= set(options.dynamic)
    if options.model in _samples.SAMPLES:
        subject = _samples.SAMPLES[options.model]()
        subject = subject.half() if half else subject
    elif options.model in (None, "detector"):
        require("transformers", "PIL", "scipy", job="export")
        subject = _subject.of_checkpoint(None, half=half, open_image=open_image)
    elif families.model_type(settings := read_settings(options.model)) in families.FAMILIES:
        subject = _vit.of_checkpoint(options.model, half=half, open_image=open_image)
    else:
        require("transformers", "PIL", "scipy", job="export")
        _subject.check_known(options.model, settings.get("model_type"))
        subject = _subject.of_checkpoint(options.model, half=half, open_image=open_image)
    return subject if options.device == "cpu" else subject.to(find_device(options.device))


def write(subject: Subject, options: Options) -> Exported:
    """Write the artefact in the format that is asked for."""
    from visionkernels.export import aoti, onnx, tensorrt

    path = options.output or Path(f"{subject.name}{FORMATS[options.format]}")
    common: dict[str, Any] = {"dynamic": subject.axes(options.dynamic), "outputs": subject.outputs}
    if options.format == "aoti":
        return aoti.export(subject.module, subject.inputs, path, keep_operators=options.keep_operators, **common)
    common["opset"] = options.opset
    if options.format == "onnx":
        return onnx.export(subject.module, subject.inputs, path, **common)
    return tensorrt.export(subject.module, subject.inputs, path, plugin_version=options.plugin_version, **common)


def check(subject: Subject, report: Exported, labels: Sequence[str]) -> list[Comparison]:
    """Run the artefact beside PyTorch."""
    from visionkernels.export import aoti, onnx, tensorrt
    from visionkernels.export.check import compare

    load = {"onnx": onnx.load, "tensorrt": tensorrt.evaluate, "aoti": aoti.load}[report.format]
    return compare(subject, load(report.path), labels)


def _check_options(options: Options) -> None:
    if options.format not in FORMATS:
        raise UserError(f"--format: expected one of {', '.join(FORMATS)}, but it is {options.format!r}")
    if options.dtype not in DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(DTYPES)}, but it is {options.dtype!r}")
    if options.device.partition(":")[0] not in DEVICES:
        raise UserError(f"--device: expected cpu, cuda or cuda:<index>, but it is {options.device!r}")
    if options.device != "cpu" and options.format != "aoti":
        raise UserError("--device: an ONNX file is for every device; only --format aoti makes code for one")
    if options.keep_operators and options.format != "aoti":
        raise UserError("--keep-operators: only --format aoti can keep the operators of this package")
    if options.output is not None and not options.output.absolute().parent.is_dir():
        raise UserError(f"--output: there is no directory {options.output.parent}; make it first")


def _print_report(subject: Subject, report: Exported) -> None:
    print(f"wrote {report.path}: {subject.name} in {report.seconds:.0f} s, {report.detail}")
    print(f"  operators of visionkernels: {report.layers}")
    for name, shape in report.inputs.items():
        print(f"  input  {name} [{', '.join(map(str, shape))}]")
    for name in subject.outputs:
        print(f"  output {name}")


def _print_check(found: Sequence[Comparison]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="beside PyTorch; errors relative to the largest entry")
    for name in ("input", "output"):
        table.add_column(name)
    for name in ("error", "allowed", ""):
        table.add_column(name, justify="right")
    for one in found:
        table.add_row(one.inputs, one.output, f"{one.error:.1e}", f"{one.allowed:.1e}", "ok" if one.ok else "WRONG")
    Console(highlight=False).print(table)
    for failure in dict.fromkeys(one.failure for one in found if one.failure):
        print(failure)


def be_quiet() -> None:
    """Leave stderr to the spinner and to errors: exporters warn of what a user can do nothing about."""
    from visionkernels._detect_report import silence_transformers

    silence_transformers()
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    for module in ("torch", "onnxscript", "onnx_ir", "transformers", "copyreg"):
        warnings.filterwarnings("ignore", module=module)


@contextlib.contextmanager
def _spinner(what: str) -> Iterator[None]:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description} ..."), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(what, total=None)
        yield
