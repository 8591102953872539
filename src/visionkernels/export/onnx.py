"""ONNX in standard operators, for any runtime: multi-scale deformable attention as GridSample, a ViT as products."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels._checkpoint import one_line
from visionkernels.errors import UserError
from visionkernels.export import _standard, _trace

OPSETS = range(16, 24)
DEFAULT_OPSET = 18  # TensorRT takes opset 20's name of GridSample's mode, "linear", for nearest


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: The file.
        format: "onnx", "tensorrt" or "aoti".
        layers: How many calls of this package's operators are in it.
        inputs: The name of each input and its shape, open sizes by name.
        outputs: The names of the outputs.
        seconds: What it took.
        detail: What else is to be known of it, in words.
    """

    path: Path
    format: str
    layers: int
    inputs: dict[str, tuple[int | str, ...]]
    outputs: tuple[str, ...]
    seconds: float
    detail: str


def export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    dynamic: _trace.Axes | None = None,
    outputs: Sequence[str] | None = None,
) -> Exported:
    """Write a module as ONNX in standard operators.

    A detector of transformers is patched with `visionkernels.patch` first, so that one operator of this package stands
    for each attention. Coordinates and sums are float32 whatever the dtype of the model.

    Args:
        model: a module in evaluation mode, whose `forward` takes the inputs by name.
        inputs: an example of each input; a size that is to stay open is at least 2 in it, and no two of them alike.
        path: the file, by convention `.onnx`.
        opset: 16 to 23. TensorRT needs 19 or less: from opset 20 on GridSample's bilinear mode is called "linear",
            which TensorRT reads as nearest, without a word.
        dynamic: the sizes that stay open: input name, axis, and a name for the size.
        outputs: a name for each output; of a `ViT`, by default those of `ViTOutput` that its checkpoint gives.

    Returns:
        What was written.

    Raises:
        UserError: onnx or onnxscript is missing, or the model, a size or the opset cannot be had.

    Example:
        >>> from visionkernels import MSDeformAttn
        >>> model = MSDeformAttn(32, 1, 4, 2).eval()  # doctest: +SKIP
        >>> export(model, inputs, "attention.onnx", dynamic={"query": {0: "batch"}})  # doctest: +SKIP
    """
    require_onnx(opset)
    start = time.perf_counter()
    traced = _trace.trace(model, inputs, dynamic, _standard.lowered(opset))
    onnx_program = convert(traced.program, inputs, opset, outputs or traced.outputs, dynamic)
    save(onnx_program, Path(path))
    return Exported(
        Path(path), "onnx", len(traced.calls), _trace.shapes(inputs, dynamic), names_of(onnx_program),
        time.perf_counter() - start, f"opset {opset}, standard operators{_trace.limits(traced.program, dynamic)}",
    )  # fmt: skip


def run(
    path: str | Path, inputs: Mapping[str, Tensor], providers: Sequence[str] = ("CPUExecutionProvider",)
) -> list[Tensor]:
    """Run an ONNX file of standard operators once in onnxruntime.

    Args:
        path: the file.
        inputs: a tensor for each input.
        providers: onnxruntime's execution providers.

    Returns:
        The outputs, on the CPU.

    Raises:
        UserError: onnxruntime is missing, or cannot load the file.
    """
    return load(path, providers)(inputs)


def load(path: str | Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """A function from inputs to outputs that runs a file in onnxruntime; arguments as those of `run`.

    Returns:
        The function. It takes a tensor for each input, by name, of the shapes and dtypes that the file was made for,
        gives the outputs in their order, on the CPU, and raises a RuntimeError with what onnxruntime says.

    Raises:
        UserError: onnxruntime is missing, or cannot load the file.

    Example:
        >>> logits, boxes = load("detector.onnx")({"pixel_values": torch.rand(1, 3, 256, 256)})  # doctest: +SKIP
    """
    require("onnxruntime")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import (
        Fail,
        InvalidArgument,
        InvalidGraph,
        InvalidProtobuf,
        NoSuchFile,
        NotImplemented,
        RuntimeException,
    )

    try:
        session = onnxruntime.InferenceSession(str(path), providers=list(providers))
    except (Fail, InvalidArgument, InvalidGraph, InvalidProtobuf, NoSuchFile, NotImplemented) as error:
        raise UserError(f"onnx: onnxruntime cannot load {path}: {one_line(error)}") from error
    names = [one.name for one in session.get_inputs()]

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        feeds = {name: inputs[name].detach().cpu().numpy() for name in names}
        try:
            return [torch.from_numpy(array) for array in session.run(None, feeds)]
        except (Fail, InvalidArgument, NotImplemented, RuntimeException) as error:
            raise RuntimeError(f"onnxruntime cannot run {path}: {one_line(error)}") from error

    return call


def require(*packages: str) -> None:
    """Raise a UserError that says what to install, unless these packages are there."""
    import importlib.util

    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"export needs {', '.join(missing)}, not installed here: pip install 'visionkernels[export]'")


def require_onnx(opset: int) -> None:
    """Raise a UserError unless the exporter is there and knows the opset."""
    if opset not in OPSETS:
        raise UserError(f"opset: expected {OPSETS[0]} to {OPSETS[-1]}, but it is {opset}; {DEFAULT_OPSET} suits most")
    require("onnx", "onnxscript")


def convert(
    program: torch.export.ExportedProgram,
    inputs: Mapping[str, Tensor],
    opset: int,
    outputs: Sequence[str] | None,
    dynamic: _trace.Axes | None,
) -> Any:
    """An ONNX program of an exported one, its sizes and values named for people."""
    import contextlib
    import io

    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints what it does
            onnx_program = torch.onnx.export(
                program, dynamo=True, opset_version=opset, input_names=list(inputs), verbose=False, optimize=False,
                output_names=None if outputs is None else list(outputs),
            )  # fmt: skip
    except Exception as error:
        cause = error.__cause__ or error
        raise UserError(f"model: torch.onnx cannot convert it to opset {opset}: {one_line(cause)}") from error
    assert onnx_program is not None
    _simplify(onnx_program.model)
    graph = onnx_program.model.graph
    if onnx_program.model.opset_imports[""] != opset:
        raise UserError(f"opset: the model needs {onnx_program.model.opset_imports['']}, and {opset} was asked for")
    _name_sizes(onnx_program.model, _trace.symbols(program, dynamic))
    for node in graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
        node.doc_string = None
    return onnx_program


def save(onnx_program: Any, path: Path) -> None:
    """Write the file, its weights beside it where it would pass 2 GB.

    Raises:
        UserError: it cannot be written.
    """
    try:
        onnx_program.save(str(path))
    except OSError as error:
        raise UserError(f"output: {path} cannot be written: {one_line(error)}") from error


def names_of(onnx_program: Any) -> tuple[str, ...]:
    """The names of the outputs."""
    return tuple(value.name for value in onnx_program.model.graph.outputs)


def _simplify(model: Any) -> None:
    """Inline, fold constants and drop what is unused, in place.

    The exporter's own optimisation also rewrites Min and Max of one value into Clip, and where the value has another
    reader, as in the inverse sigmoid of detectors, it leaves that one without an input.
    """
    import onnx_ir.passes.common as passes
    import onnxscript.optimizer

    passes.InlinePass()(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model)
        passes.RemoveUnusedNodesPass()(model)
    passes.RemoveUnusedFunctionsPass()(model)
    passes.RemoveUnusedOpsetsPass()(model)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    passes.DeduplicateInitializersPass()(model)
    passes.CommonSubexpressionEliminationPass()(model)
    passes.OutputFixPass()(model)
    passes.NameFixPass()(model)


def _name_sizes(model: Any, names: Mapping[str, str]) -> None:
    """Put the caller's names of sizes in place of torch.export's, wherever they stand alone."""
    import onnx_ir

    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [size.value if isinstance(size, onnx_ir.SymbolicDim) else size for size in value.shape]
            value.shape = onnx_ir.Shape([names.get(size, size) for size in sizes])
