"""From a module to an exported program: this package's operators are nodes in it, one a layer, or are lowered."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from visionkernels._checkpoint import one_line
from visionkernels.errors import UserError
from visionkernels.export._open_sizes import Tracing, open_names
from visionkernels.models.output import ViTOutput

Axes = Mapping[str, Mapping[int, str]]  # input name: {axis: the name of its size}
Lowered = Mapping[Any, Callable[..., Any]]  # operator: a function of the same arguments


class Trace(NamedTuple):
    """A program, the calls of this package's operators that it was made of, and the names of a ViT's outputs."""

    program: ExportedProgram
    calls: tuple[str, ...]
    outputs: tuple[str, ...] | None = None


def trace(
    module: nn.Module, inputs: Mapping[str, Tensor], dynamic: Axes | None = None, lowered: Lowered | None = None
) -> Trace:
    """Export a module.

    Args:
        module: in evaluation mode; its `forward` takes the inputs by name.
        inputs: an example of each. An axis that is to stay open has a size of at least 2 in it.
        dynamic: the axes that stay open, and what to call them.
        lowered: the form in which an operator enters the program; one that is not named becomes a node.

    Returns:
        The program, and which operators it holds.

    Raises:
        UserError: an axis cannot stay open, or the module cannot be exported.
    """
    dynamic = dynamic or {}
    _check_axes(inputs, dynamic)
    labels = [label for axes in dynamic.values() for label in axes.values()]
    # One symbol for a size that several inputs share; for one alone `torch.export` finds the range by itself.
    dims = {label: Dim(label) if labels.count(label) > 1 else Dim.AUTO for label in labels}
    shapes = {
        name: {
            axis: dims[dynamic[name][axis]] if axis in dynamic.get(name, {}) else Dim.STATIC for axis in range(t.dim())
        }
        for name, t in inputs.items()
    }
    traced = _Traced(module, lowered or {})
    with torch.no_grad(), open_names(module):
        try:
            program = torch.export.export(
                traced, (), {"inputs": dict(inputs)}, dynamic_shapes={"inputs": shapes}, strict=False
            )
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"model: torch.export cannot trace {type(module).__name__}: {one_line(error)}") from error
    _check_open(program, dynamic)
    return Trace(program, tuple(traced.tracing.calls) or tuple(operators(program)), traced.tracing.outputs)


def symbols(program: ExportedProgram, dynamic: Axes | None) -> dict[str, str]:
    """What `torch.export` calls each open size, and the name that was given to it."""
    found = {}
    for name, axes in (dynamic or {}).items():
        shape = _shape_of(program, name)
        found.update({str(shape[axis]): label for axis, label in axes.items()})
    return found


def limits(program: ExportedProgram, dynamic: Axes | None) -> str:
    """Where the model's code limits an open size, in words: ", height from 33", or nothing.

    A limit of tens of thousands, as some kernels of PyTorch have it, is not worth a word.
    """
    found = {}
    for name, axes in (dynamic or {}).items():
        for axis, label in axes.items():
            bounds = program.range_constraints.get(_shape_of(program, name)[axis].node.expr)
            if bounds is not None:
                least = f" from {bounds.lower}" if bounds.lower > 2 else ""
                most = f" to {bounds.upper}" if bounds.upper.is_Integer and bounds.upper < 2**15 else ""
                found[label] = f", {label}{least}{most}" if least or most else ""
    return "".join(found.values())


def operators(program: ExportedProgram) -> list[str]:
    """The operators of this package in a program, in its order."""
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name for name in names if name.startswith("visionkernels.")]


def shapes(inputs: Mapping[str, Tensor], dynamic: Axes | None) -> dict[str, tuple[int | str, ...]]:
    """The shape of each input, with the names of the open sizes."""
    dynamic = dynamic or {}
    return {name: tuple(dynamic.get(name, {}).get(i, n) for i, n in enumerate(t.shape)) for name, t in inputs.items()}


def outputs_of(found: ViTOutput) -> dict[str, Tensor]:
    """What a ViT's checkpoint gives, by name."""
    return {one.name: getattr(found, one.name) for one in fields(found) if getattr(found, one.name) is not None}


class _Traced(nn.Module):
    """The module under the mode that keeps sizes open; its inputs come as one mapping, a ViT's outputs as a tuple."""

    def __init__(self, module: nn.Module, lowered: Lowered) -> None:
        super().__init__()
        self.module = module
        self.tracing = Tracing(lowered)

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        self.tracing.calls.clear()
        with self.tracing:
            found = self.module(**inputs)
        if isinstance(found, ViTOutput):
            named = outputs_of(found)
            self.tracing.outputs = tuple(named)  # not on the module: torch.export puts that back as it was
            return tuple(named.values())
        return found


def _check_axes(inputs: Mapping[str, Tensor], dynamic: Axes) -> None:
    for name, axes in dynamic.items():
        if name not in inputs:
            raise UserError(f"dynamic: the model has no input {name!r}; its inputs are {', '.join(inputs)}")
        for axis, label in axes.items():
            if not 0 <= axis < inputs[name].dim():
                raise UserError(f"dynamic: {name} has {inputs[name].dim()} axes, so axis {axis} ({label}) is not there")
            if inputs[name].shape[axis] < 2:
                raise UserError(
                    f"dynamic: the example of {name} has size {inputs[name].shape[axis]} along {label}; "
                    "torch.export keeps only sizes of 2 and more open, so give a larger example"
                )


def _shape_of(program: ExportedProgram, name: str) -> Sequence[Any]:
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in (name, f"inputs_{name}"):
            return node.meta["val"].shape
    raise UserError(f"dynamic: the model does not use its input {name!r}, so leave it out")


def _check_open(program: ExportedProgram, dynamic: Axes) -> None:
    """No open size may be fixed: neither itself nor by what the model's code asked of something made of it."""
    found = [
        (name, label, _shape_of(program, name)[axis]) for name, axes in dynamic.items() for axis, label in axes.items()
    ]
    found = [(name, label, int(size) if _is_number(size) else size) for name, label, size in found]
    hints = {size.node.expr: size.node.hint for _, _, size in found if not isinstance(size, int)}
    for name, label, size in found:
        fixed = size if isinstance(size, int) else _fixed_by(size, hints)
        if fixed is not None:
            raise UserError(
                f"dynamic: {label} of {name} cannot stay open, the model's code fixes it ({fixed}); "
                f"leave {label} out of --dynamic"
            )


def _is_number(size: int | torch.SymInt) -> bool:
    return isinstance(size, int) or size.node.expr.is_number


def _fixed_by(size: torch.SymInt, hints: Mapping[Any, int]) -> str | None:
    """The condition, if any, that something made of a size is one number: it does not hold of twice the size."""
    doubled = {**hints, size.node.expr: 2 * hints[size.node.expr]}
    for guard in size.node.shape_env.guards:
        if guard.expr.func.__name__ == "Equality" and guard.expr.rhs.is_number and guard.expr.subs(doubled) == False:  # noqa: E712
            return str(guard.expr)
    return None
