"""Replace one method of module instances by an operator of this package, and take it back exactly.

What is replaced is data: an `Integration` is one row, naming an upstream class and the adapter that stands
in for one of its methods. Nothing here knows an upstream project, and none is imported: classes are
recognised by the module and the name they were defined under.

A patched module carries two entries in its instance `__dict__` and nothing else: the adapter, under the
name of the method that it hides, and the `Patch` that takes it back. Both are ordinary attributes, so
`copy.deepcopy`, `pickle` and `torch.nn.DataParallel` carry the patch over to the copy, and a copy is
reverted on its own.
"""

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_MARK = "_visionkernels_patch"  # where a patched module keeps its Patch


@dataclass(frozen=True)
class Integration:
    """One upstream class and what replaces one of its methods.

    Args:
        title: the upstream model's name, for people.
        module: the module that defines the class.
        class_name: the class. Subclasses that do not override `method` count as well.
        method: the method that the adapter replaces.
        parameters: the upstream method's parameter names, `self` first, that the adapter was written for;
            another signature is refused.
        adapter: a module-level function taking those parameters without `self`.
        versions: the upstream versions it is tested with.
    """

    title: str
    module: str
    class_name: str
    method: str
    parameters: tuple[str, ...]
    adapter: Callable[..., Any]
    versions: str

    def find_class(self, module: nn.Module) -> type | None:
        """Return the class of this row among the module's class and its bases, or None."""
        for cls in type(module).__mro__:
            if cls.__module__ == self.module and cls.__name__ == self.class_name:
                return cls
        return None


@dataclass
class Patch:
    """An attribute set on one module instance, and what it hid.

    Args:
        attribute: name of the attribute, here a method's.
        replacement: the new value. A plain function: it is called without the module, so that copies and
            replicas of the module need no rebinding.
        hidden: the instance's own value before, under `attribute`; empty when there was none.
    """

    attribute: str
    replacement: Callable[..., Any]
    hidden: dict[str, Any] = field(default_factory=dict)

    def apply(self, module: nn.Module) -> None:
        """Set the attribute on `module` and remember what it hid."""
        state = module.__dict__
        self.hidden = {self.attribute: state[self.attribute]} if self.attribute in state else {}
        state[self.attribute] = self.replacement
        state[_MARK] = self

    def revert(self, module: nn.Module) -> None:
        """Put `module` back to what it was before `apply`."""
        state = module.__dict__
        del state[_MARK]
        if self.hidden:
            state.update(self.hidden)
        else:
            del state[self.attribute]

    def is_intact(self, module: nn.Module) -> bool:
        """Whether nobody has replaced the attribute since."""
        return module.__dict__.get(self.attribute) is self.replacement


@dataclass(frozen=True)
class Replaced:
    """One module that was replaced.

    Args:
        name: the module's qualified name in the model; empty for the model itself.
        class_name: the module's class, with the module that defines it.
        method: the replaced method.
    """

    name: str
    class_name: str
    method: str


@dataclass(frozen=True)
class PatchReport:
    """What a call of `patch` did; `len()` counts the modules that it replaced, `str()` is a short table.

    Args:
        model: name of the model's class.
        replaced: the modules replaced by this call.
        already: qualified names of the modules that an earlier call had replaced.
        skipped: qualified names of the modules left alone, because their class overrides the method that
            would be replaced.
    """

    model: str
    replaced: tuple[Replaced, ...]
    already: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.replaced)

    def __str__(self) -> str:
        head = f"{self.model}: {len(self)} module{'' if len(self) == 1 else 's'} replaced"
        head += f", {len(self.already)} patched before" if self.already else ""
        rows = [(one.name, f"{one.class_name.rpartition('.')[2]}.{one.method}") for one in self.replaced]
        rows += [(name, "left alone: its class overrides the method") for name in self.skipped]
        width = max((len(name or "(model)") for name, _ in rows), default=0)
        return "\n".join([head, *(f"  {name or '(model)':<{width}}  {what}" for name, what in rows)])


def find_patch(module: nn.Module) -> Patch | None:
    """Return the patch that a module carries, or None."""
    patch: Patch | None = module.__dict__.get(_MARK)
    return patch


def apply_patches(model: nn.Module, table: Iterable[Integration]) -> tuple[PatchReport, list[nn.Module]]:
    """Replace the method of every module of `model` that a row of `table` names.

    Everything is checked before anything is replaced, so that an error leaves the model as it was.

    Args:
        model: a module; its submodules at any depth are searched, and itself.
        table: the rows.

    Returns:
        The report, and the modules that this call replaced, in the report's order.

    Raises:
        TypeError: `model` is no module.
        ValueError: nothing in it is in the table.
        RuntimeError: an upstream method's parameters are not those that the adapter was written for.
    """
    check_is_module(model)
    rows = tuple(table)
    found: list[tuple[nn.Module, Integration]] = []
    replaced, already, skipped = [], [], []
    for name, module in model.named_modules():
        row, cls = next(((row, cls) for row in rows if (cls := row.find_class(module))), (None, None))
        if row is None or cls is None:
            continue
        if find_patch(module) is not None:
            already.append(name)
        elif getattr(type(module), row.method) is not getattr(cls, row.method):
            skipped.append(name)
        else:
            _check_signature(cls, row)
            found.append((module, row))
            kind = type(module)
            replaced.append(Replaced(name, f"{kind.__module__}.{kind.__qualname__}", row.method))
    if not found and not already:
        raise ValueError(_nothing_found(model, rows, skipped))
    for module, row in found:
        Patch(row.method, row.adapter).apply(module)
    report = PatchReport(type(model).__name__, tuple(replaced), tuple(already), tuple(skipped))
    return report, [module for module, _ in found]


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


def _check_signature(cls: type, row: Integration) -> None:
    parameters = tuple(inspect.signature(getattr(cls, row.method)).parameters)
    if parameters != row.parameters:
        root = row.module.partition(".")[0]
        version = getattr(sys.modules.get(root), "__version__", "(unknown version)")
        raise RuntimeError(
            f"model: {row.module}.{row.class_name}.{row.method} of {root} {version} takes "
            f"({', '.join(parameters)}), but its adapter was written for ({', '.join(row.parameters)}); "
            f"use {root} {row.versions}"
        )


def _nothing_found(model: nn.Module, rows: tuple[Integration, ...], skipped: list[str]) -> str:
    if skipped:
        cause = f"the class of {', '.join(repr(name) for name in skipped)} overrides the method to be replaced"
    else:
        cause = "it holds no module of a supported class"
    titles = ", ".join(dict.fromkeys(row.title for row in rows))
    return f"model: nothing to patch in {type(model).__name__}, {cause}; supported are the models {titles}"
