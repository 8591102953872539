"""Put an operator of this package in the place of upstream's on module instances, and take it back exactly.

What is replaced is data: an `Integration` is one row, naming an upstream class, where its instances get the
operator from, and the adapter that stands in for it there. Nothing here knows an upstream project, and none is
imported: classes are recognised by the module and the name they were defined under.
"""

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal, Protocol

from torch import nn

from visionkernels.integrations._patches import AttributePatch, ClassPatch, Patch, find_patch
from visionkernels.integrations._rebind import rebound_class
from visionkernels.integrations._report import PatchReport, Replaced

Place = Literal["method", "attribute", "global"]


@dataclass(frozen=True)
class Integration:
    """One upstream class, and what its instances call in place of upstream's operator.

    Args:
        title: the upstream model's name, for people.
        module: the module that defines the class.
        class_name: the class. Subclasses that do not override `forward` count as well.
        place: where an instance gets the operator from: "method", its own `forward` without `self`; "attribute",
            a function that its `__init__` stored; "global", a function of the module, which `forward` looks up.
        name: the name of that method, attribute or function.
        adapter: a module-level function with the same parameter names, `self` left out; where upstream's are
            others, nothing is replaced.
        versions: the upstream versions it is tested with.
    """

    title: str
    module: str
    class_name: str
    place: Place
    name: str
    adapter: Callable[..., Any]
    versions: str

    def find_class(self, module: nn.Module, around: Sequence[nn.Module] = ()) -> type | None:
        """Return the class of this row among the module's class and its bases, or None; `around` does not matter."""
        return is_class(module, self.module, self.class_name)

    def overrides_forward(self, module: nn.Module, cls: type) -> bool:
        """Whether the module's `forward` is not that of the class."""
        if type(module).forward is not cls.forward:  # type: ignore[attr-defined]
            return True
        own = module.__dict__.get("forward")
        if own is None or self.place == "attribute":  # that is exchanged under any `forward`
            return False
        # A user's own, or a hook of accelerate, does more than call the operator: it is kept.
        return self.place == "global" or not _is_method_of_layer(own, module, self.class_name)

    def refuses(self, module: nn.Module) -> str | None:
        """Return why a module is left alone, or None; none is."""
        return None

    def replaced(self, name: str, module: nn.Module) -> Replaced:
        """Return what the report says of a module."""
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        return Replaced(name, kind, "forward", self.name) if self.place == "global" else Replaced(name, kind, self.name)

    def find_operator(self, module: nn.Module) -> Callable[..., Any] | None:
        """Return what the adapter stands in for on this module, or None where upstream has no such thing."""
        if self.place == "global":
            scope = getattr(type(module).forward, "__globals__", {})
            return scope.get(self.name)
        return getattr(type(module) if self.place == "method" else module, self.name, None)

    def make_patch(self, module: nn.Module) -> "Patch":
        """Check that upstream is what the row says, and return the patch for this module."""
        operator = self.find_operator(module)
        if operator is None:
            raise RuntimeError(not_as_written(self, f"has no {self.name}"))
        parameters = tuple(inspect.signature(operator).parameters)
        expected = tuple(inspect.signature(self.adapter).parameters)
        if self.place == "method":
            expected = ("self", *expected)
        if parameters != expected:
            written_for = f"but its adapter was written for ({', '.join(expected)})"
            raise RuntimeError(not_as_written(self, f"takes ({', '.join(parameters)}), {written_for}"))
        if self.place != "global":
            return AttributePatch(self.name, self.adapter)
        try:
            rebound_class(type(module), self.name, self.adapter)
        except RuntimeError as error:
            raise RuntimeError(not_as_written(self, f"cannot be exchanged in forward: {error}")) from error
        return ClassPatch(self.name, self.adapter, type(module))

    def describe(self) -> str:
        """Return what is replaced, as upstream calls it."""
        return f"{self.class_name}.forward: {self.name}" if self.place == "global" else f"{self.class_name}.{self.name}"


class PatchRow(Protocol):
    """What patching asks of a row of a table; `Integration` says what each returns."""

    @property
    def title(self) -> str: ...
    @property
    def module(self) -> str: ...
    @property
    def versions(self) -> str: ...
    def find_class(self, module: nn.Module, around: Sequence[nn.Module] = ()) -> type | None: ...
    def overrides_forward(self, module: nn.Module, cls: type) -> bool: ...
    def refuses(self, module: nn.Module) -> str | None: ...
    def make_patch(self, module: nn.Module) -> Patch: ...
    def replaced(self, name: str, module: nn.Module) -> Replaced: ...
    def describe(self) -> str: ...


def apply_patches(model: nn.Module, table: Iterable[PatchRow]) -> tuple[PatchReport, list[nn.Module]]:
    """Replace the operator of every module of `model` that a row of `table` names.

    Everything is checked before anything is replaced, so that an error leaves the model as it was.

    Args:
        model: a module; its submodules at any depth are searched, and itself.
        table: the rows.

    Returns:
        The report, and the modules that this call replaced, in the report's order.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in it is in the table.
        RuntimeError: upstream calls the operator in another way than the row says.
    """
    check_is_module(model)
    rows = tuple(table)
    found: list[tuple[nn.Module, Patch]] = []
    replaced, already, skipped, unfit = [], [], [], []
    for name, module, around in _with_surroundings(model):
        row, cls = next(((row, cls) for row in rows if (cls := row.find_class(module, around))), (None, None))
        if row is None or cls is None:
            continue
        if find_patch(module) is not None:
            already.append(name)
        elif row.overrides_forward(module, cls):
            skipped.append(name)
        elif (reason := row.refuses(module)) is not None:
            unfit.append((name, reason))
        else:
            found.append((module, row.make_patch(module)))
            replaced.append(row.replaced(name, module))
    if not found and not already:
        raise ValueError(_nothing_found(model, rows, skipped, unfit))
    for module, patch in found:
        patch.apply(module)
    report = PatchReport(type(model).__name__, tuple(replaced), tuple(already), tuple(skipped), tuple(unfit))
    return report, [module for module, _ in found]


def _with_surroundings(model: nn.Module) -> Iterator[tuple[str, nn.Module, list[nn.Module]]]:
    """Yield every module with its name and the modules that hold it, nearest first."""
    named = dict(model.named_modules())
    for name, module in named.items():
        around = []
        rest = name
        while rest:
            rest = rest.rpartition(".")[0]
            around.append(named[rest])
        yield name, module, around


def revert_patches(modules: Iterable[nn.Module]) -> int:
    """Revert the modules that carry a patch, and return how many did.

    Everything is checked before anything is reverted.

    Raises:
        RuntimeError: somebody else has replaced a patched method since.
    """
    patches = [(module, patch) for module in modules if (patch := find_patch(module)) is not None]
    for module, patch in patches:
        if not patch.is_intact(module):
            raise RuntimeError(
                f"model: {patch.attribute!r} of a {type(module).__name__} was replaced by something else "
                "after patch(), so unpatch() cannot restore it; undo that replacement first"
            )
    for module, patch in patches:
        patch.revert(module)
    return len(patches)


def check_is_module(model: object) -> None:
    """Raise a TypeError unless `model` is a module."""
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"model: expected a torch.nn.Module instance, got {got}; pass the model itself")


def _is_method_of_layer(own: Any, module: nn.Module, class_name: str) -> bool:
    """Whether `own` is the `forward` of a class of that name, bound to `module`, as `kernels.kernelize` sets it.

    A hook of accelerate leaves the like behind when it comes off.
    """
    name = getattr(getattr(own, "__func__", None), "__qualname__", None)
    return isinstance(own, MethodType) and own.__self__ is module and name == f"{class_name}.forward"


def is_class(module: nn.Module, defined_in: str, name: str) -> type | None:
    """Return the class of this name and defining module among the module's class and its bases, or None."""
    for cls in type(module).__mro__:
        if cls.__module__ == defined_in and cls.__name__ == name:
            return cls
    return None


def not_as_written(row: PatchRow, what: str) -> str:
    """Return the message that upstream is not what a row says."""
    root = row.module.partition(".")[0]
    version = getattr(sys.modules.get(root), "__version__", "(unknown version)")
    return f"model: {row.module}.{row.describe()} of {root} {version} {what}; use {root} {row.versions}"


def _nothing_found(
    model: nn.Module, rows: tuple[PatchRow, ...], skipped: list[str], unfit: list[tuple[str, str]]
) -> str:
    if unfit:
        cause = f"{unfit[0][0]!r} is left alone, since {unfit[0][1]}"
    elif skipped:
        cause = f"the forward of {', '.join(repr(name) for name in skipped)} is overridden"
    else:
        cause = "it holds no module of a supported class"
    titles = ", ".join(dict.fromkeys(row.title for row in rows))
    return f"model: nothing to patch in {type(model).__name__}, {cause}; supported are the models {titles}"
