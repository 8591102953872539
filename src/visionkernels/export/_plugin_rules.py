"""What TensorRT's plugin asks of its node, as a table, and the node executed without TensorRT."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from visionkernels.export._plugin import DOMAIN, OP_TYPE, OWN_OP_TYPE, VERSIONS

if TYPE_CHECKING:
    import numpy as np

_FLOAT, _INT32, _FLOAT16 = 1, 6, 10  # of onnx.TensorProto.DataType

INPUTS = ("value", "spatial_shapes", "level_start_index", "sampling_locations", "attention_weights")
Size = int | str | None  # a number, the name of a size, or unknown


@dataclass(frozen=True)
class Tensor:
    """An input or output of a node, as the graph declares it."""

    dtype: int
    shape: tuple[Size, ...]


@dataclass(frozen=True)
class Rule:
    """One rule of the plugin.

    Args:
        text: the rule.
        source: where it is documented, in `plugin/multiscaleDeformableAttnPlugin` of NVIDIA/TensorRT.
        holds: whether it holds of the inputs, the output and the attributes.
    """

    text: str
    source: str
    holds: Callable[[list[Tensor], Tensor, dict[str, str]], bool]


def _same(*sizes: Size) -> bool:
    """No two known numbers among the sizes differ."""
    return len({size for size in sizes if isinstance(size, int)}) <= 1


_README, _FORMAT, _SHAPES = "README.md", "supportsFormatCombination", "configurePlugin"

RULES: tuple[Rule, ...] = (
    Rule("five inputs", _README, lambda i, o, a: len(i) == 5),
    Rule("spatial_shapes and level_start_index are int32", _FORMAT, lambda i, o, a: i[1].dtype == i[2].dtype == _INT32),
    Rule("value is float32 or float16", _FORMAT, lambda i, o, a: i[0].dtype in (_FLOAT, _FLOAT16)),
    Rule(
        "locations, weights and output have the dtype of the value", _FORMAT,
        lambda i, o, a: i[0].dtype == i[3].dtype == i[4].dtype == o.dtype,
    ),
    Rule("value is [N, S, M, D]", _SHAPES, lambda i, o, a: len(i[0].shape) == 4),
    Rule("spatial_shapes is [L, 2]", _SHAPES, lambda i, o, a: len(i[1].shape) == 2 and i[1].shape[1] == 2),
    Rule("level_start_index is [L]", _SHAPES, lambda i, o, a: len(i[2].shape) == 1),
    Rule("locations are [N, Lq, M, L, P, 2]", _SHAPES, lambda i, o, a: len(i[3].shape) == 6 and i[3].shape[5] == 2),
    Rule("weights are [N, Lq, M, L, P]", _SHAPES, lambda i, o, a: len(i[4].shape) == 5),
    Rule("one M", _SHAPES, lambda i, o, a: _same(i[0].shape[2], i[3].shape[2], i[4].shape[2])),
    Rule("one L", _SHAPES, lambda i, o, a: _same(i[1].shape[0], i[2].shape[0], i[3].shape[3], i[4].shape[3])),
    Rule("one P", _SHAPES, lambda i, o, a: _same(i[3].shape[4], i[4].shape[4])),
    Rule("one Lq", _SHAPES, lambda i, o, a: _same(i[3].shape[1], i[4].shape[1])),
    Rule(
        "the output is [N, Lq, M, D]", _README,
        lambda i, o, a: len(o.shape) == 4
        and _same(o.shape[0], i[0].shape[0]) and _same(o.shape[1], i[3].shape[1])
        and _same(o.shape[2], i[0].shape[2]) and _same(o.shape[3], i[0].shape[3]),
    ),
    Rule("plugin_version is 1 or 2", "getPluginVersion", lambda i, o, a: a.get("plugin_version") in VERSIONS),
    Rule("no attributes of its own", _README, lambda i, o, a: set(a) <= {"plugin_version", "plugin_namespace"}),
)  # fmt: skip


def violations(model: Any) -> list[str]:
    """The rule that each node of the plugin breaks first, and its source; empty where all hold.

    Args:
        model: an `onnx.ModelProto` with the shapes of its values.
    """
    import onnx

    graph = model.graph
    infos = [*graph.value_info, *graph.input, *graph.output]
    declared = {one.name: Tensor(one.type.tensor_type.elem_type, _shape(one.type.tensor_type.shape)) for one in infos}
    declared |= {one.name: Tensor(one.data_type, tuple(one.dims)) for one in graph.initializer}
    found = []
    if any(function.name == OP_TYPE for function in model.functions):
        found.append(f"a function of the model is called {OP_TYPE}, which TensorRT's parser would take instead")
    for node in graph.node:
        if node.op_type != OP_TYPE:
            continue
        unknown = [name for name in (*node.input, *node.output) if name not in declared]
        if unknown:
            found.append(f"{node.name}: dtype and shape of {', '.join(unknown)} are not declared")
            continue
        attributes = {one.name: onnx.helper.get_attribute_value(one).decode() for one in node.attribute}
        inputs, output = [declared[name] for name in node.input], declared[node.output[0]]
        # The first alone: a rule may rely on those before it.
        broken = next((rule for rule in RULES if not rule.holds(inputs, output, attributes)), None)
        if broken is not None:
            found.append(f"{node.name}: {broken.text} ({broken.source})")
    return found


def _shape(shape: Any) -> tuple[Size, ...]:
    return tuple(one.dim_value if one.HasField("dim_value") else one.dim_param or None for one in shape.dim)


def plugin_numpy(
    value: np.ndarray, shapes: np.ndarray, start: np.ndarray, locations: np.ndarray, weights: np.ndarray
) -> np.ndarray:
    """What the plugin computes, written from its README: bilinear samples, zeros outside, in float64.

    Args:
        value: `[N, S, M, D]`.
        shapes: `[L, 2]`, (h, w).
        start: `[L]`, the first pixel of each level; levels may overlap.
        locations: `[N, Lq, M, L, P, 2]`.
        weights: `[N, Lq, M, L, P]`.

    Returns:
        `[N, Lq, M, D]` in the dtype of the value.
    """
    import numpy as np

    wide = np.float64
    batch, num_queries, num_heads, num_levels, _, _ = locations.shape
    output = np.zeros((batch, num_queries, num_heads, value.shape[3]), wide)
    image = np.arange(batch)[:, None, None, None]
    head = np.arange(num_heads)[None, None, :, None]
    for level in range(num_levels):
        h, w = (int(size) for size in shapes[level])
        x = locations[:, :, :, level, :, 0].astype(wide) * w - 0.5  # [N, Lq, M, P]
        y = locations[:, :, :, level, :, 1].astype(wide) * h - 0.5
        x0, y0 = np.floor(x), np.floor(y)
        for dy in (0, 1):
            for dx in (0, 1):
                column, row = x0 + dx, y0 + dy
                inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
                factor = np.where(inside, (1 - abs(x - column)) * (1 - abs(y - row)), 0.0)
                index = int(start[level]) + np.where(inside, row * w + column, 0).astype(np.int64)
                pixels = value[image, index, head].astype(wide)  # [N, Lq, M, P, D]
                output += (pixels * (factor * weights[:, :, :, level].astype(wide))[..., None]).sum(3)
    return output.astype(value.dtype)


def reference_operators() -> list[Any]:
    """Operators for `onnx.reference.ReferenceEvaluator(model, new_ops=...)`: both plugins' nodes, and GatherElements.

    onnx's own GatherElements ends at 64 rows.
    """
    import numpy as np
    from onnx.reference.op_run import OpRun

    def run_plugin(self: Any, *inputs: Any, plugin_version: Any = None, plugin_namespace: Any = None) -> tuple[Any]:
        value, shapes, start, locations, weights = inputs
        if not (shapes.dtype == start.dtype == "int32" and value.dtype == locations.dtype == weights.dtype):
            raise TypeError(f"{OP_TYPE}: {[str(one.dtype) for one in inputs]} are not the dtypes that it takes")
        if plugin_version not in VERSIONS:
            raise ValueError(f"{OP_TYPE}: there is no version {plugin_version!r}")
        return (plugin_numpy(value, shapes, start, locations, weights),)

    def run_own(self: Any, *inputs: Any, num_points: Any = None, **_: Any) -> tuple[Any]:
        value, shapes, locations, weights = inputs
        if not (shapes.dtype == "int32" and locations.dtype == "float32" and value.dtype == weights.dtype):
            raise TypeError(f"{OWN_OP_TYPE}: {[str(one.dtype) for one in inputs]} are not the dtypes that it takes")
        starts = np.concatenate([[0], shapes.prod(1).cumsum()])
        output, first = np.zeros(()), 0
        for level, points in enumerate(num_points):
            part = slice(first, first + points)
            one = (shapes[[level]], starts[[level]], locations[:, :, :, None, part], weights[:, :, :, None, part])
            output, first = output + plugin_numpy(value.astype(np.float64), *one), first + points
        return (np.asarray(output, value.dtype),)

    def run_gather(self: Any, data: Any, indices: Any, axis: int | None = None) -> tuple[Any]:
        return (np.take_along_axis(data, indices, axis or 0),)

    return [
        type(OP_TYPE, (OpRun,), {"op_domain": DOMAIN, "_run": run_plugin}),
        type(OWN_OP_TYPE, (OpRun,), {"op_domain": DOMAIN, "_run": run_own}),
        type("GatherElements", (OpRun,), {"op_domain": "", "_run": run_gather}),
    ]
