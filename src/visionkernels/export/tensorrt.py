"""TensorRT: an ONNX graph with its plugin for multi-scale deformable attention, and engines from such a graph.

A model without such attention, such as a `ViT`, is standard operators alone. `export` needs no TensorRT; the plugin is
in the library that comes with it. `build`, `load` and `run` need TensorRT 10.11 or later.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels.errors import UserError
from visionkernels.export import _plugin, _plugin_rules, _standard, _trace, tensorrt_plugin
from visionkernels.export._engine import Engine, build, load, run
from visionkernels.export.onnx import DEFAULT_OPSET, Exported, convert, names_of, require_onnx, save
from visionkernels.export.onnx import load as load_in_onnxruntime

__all__ = ["Engine", "build", "evaluate", "export", "load", "run"]

MAX_OPSET = 19  # from 20 on GridSample's mode has a name that TensorRT takes for nearest


def export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    opset: int = DEFAULT_OPSET,
    plugin_version: str = "2",
    dynamic: _trace.Axes | None = None,
    outputs: Sequence[str] | None = None,
) -> Exported:
    """Write a module as ONNX with one `MultiscaleDeformableAttnPlugin_TRT` node for each deformable attention.

    The plugin computes in the dtype of the model: in float16 its coordinates are float16 too, an error of up to 0.03
    pixels on a level 128 wide. Where the numbers of points differ between levels, a level is listed several times.

    Args:
        model: a module in evaluation mode, in float32 or float16, whose `forward` takes the inputs by name.
        inputs: an example of each input; a size that is to stay open is at least 2 in it, and no two of them alike.
        path: the file, by convention `.onnx`.
        opset: 16 to 19.
        plugin_version: "2" for TensorRT 10.11 and later, "1" for those before; "visionkernels" for this package's own
            kernel, with float32 coordinates: whoever builds the engine calls `tensorrt_plugin.register()` first.
        dynamic: the sizes that stay open: input name, axis, and a name for the size.
        outputs: a name for each output; of a `ViT`, by default those of `ViTOutput` that its checkpoint gives.

    Returns:
        What was written.

    Raises:
        UserError: the model has no call of an operator, or one that the plugin cannot compute; or as in `onnx.export`.

    Source: `plugin/multiscaleDeformableAttnPlugin/README.md` of NVIDIA/TensorRT.

    Example:
        >>> export(model, inputs, "detector.onnx", dynamic={"pixel_values": {0: "batch"}})  # doctest: +SKIP
    """
    require_onnx(opset)
    if opset > MAX_OPSET:
        raise UserError(
            f"opset: TensorRT takes opset {opset}'s name of GridSample's mode for nearest; use {MAX_OPSET} or less"
        )
    if plugin_version not in (*_plugin.VERSIONS, _plugin.OWN):
        expected = (*_plugin.VERSIONS, _plugin.OWN)
        raise UserError(f"plugin_version: expected one of {expected}, but it is {plugin_version!r}")
    start = time.perf_counter()
    traced = _trace.trace(model, inputs, dynamic, _standard.lowered(opset) | _plugin.lowered(plugin_version))
    if not traced.calls:
        raise UserError("model: it calls no operator of this package; use the format onnx")
    onnx_program = convert(traced.program, inputs, opset, outputs or traced.outputs, dynamic)
    broken = _plugin_rules.violations(onnx_program.model_proto)
    if broken:
        raise UserError(f"model: the graph breaks a rule of the plugin: {broken[0]}")
    save(onnx_program, Path(path))
    detail = f"opset {opset}, {_plugin_in_words(traced.calls, plugin_version)}"
    return Exported(
        Path(path), "tensorrt", len(traced.calls), _trace.shapes(inputs, dynamic), names_of(onnx_program),
        time.perf_counter() - start, f"{detail}{_trace.limits(traced.program, dynamic)}",
    )  # fmt: skip


def _plugin_in_words(calls: Sequence[str], plugin_version: str) -> str:
    if not any("ms_deform_attn" in call for call in calls):
        return "standard operators, no plugin is needed"
    return (
        tensorrt_plugin.PLUGIN_ID if plugin_version == _plugin.OWN else f"version {plugin_version} of {_plugin.OP_TYPE}"
    )


def evaluate(path: str | Path) -> Any:
    """A function from inputs to outputs that runs the graph without TensorRT, for a comparison; with a plugin slowly.

    Args:
        path: a file that `export` wrote.

    Returns:
        The function. It takes a tensor for each input, by name, and gives the outputs in their order, on the CPU.

    Example:
        >>> logits, boxes = evaluate("detector.onnx")({"pixel_values": torch.rand(1, 3, 256, 256)})  # doctest: +SKIP
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(path))
    if not any(node.domain for node in model.graph.node):
        return load_in_onnxruntime(path)
    evaluator = ReferenceEvaluator(model, new_ops=_plugin_rules.reference_operators())

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        feeds = {name: inputs[name].detach().cpu().numpy() for name in evaluator.input_names}
        return [torch.from_numpy(array) for array in evaluator.run(None, feeds)]

    return call
