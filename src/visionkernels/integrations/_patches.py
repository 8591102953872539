"""What a patch leaves on a module instance, and how it is taken back.

A patched module carries a patch in its instance `__dict__` that takes it back, and either the adapter, under the
name that it hides, or another class. All are ordinary parts of an object, so `copy.deepcopy`, `pickle` and
`torch.nn.DataParallel` carry the patch over to the copy, and a copy is reverted on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from visionkernels.integrations._rebind import is_rebound, rebound_class

_MARK = "_visionkernels_patch"  # where a patched module keeps its patch


@dataclass
class AttributePatch:
    """An attribute set on one module instance, and what it hid.

    Args:
        attribute: name of the attribute.
        replacement: the new value. If a function, a plain one: it is called without the module, so that copies and
            replicas of the module need no rebinding.
        hidden: the instance's own value before, under `attribute`; empty when there was none.
    """

    attribute: str
    replacement: Any
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


@dataclass
class ClassPatch:
    """A module instance moved to a class whose `forward` calls something else, and its class before.

    Args:
        name: the function that `forward` looked up, or "forward" where all of it is exchanged.
        replacement: what it calls instead; or the whole `forward`, called with the module.
        original: the instance's class before.
    """

    name: str
    replacement: Callable[..., Any]
    original: type
    attribute: str = "forward"

    def apply(self, module: nn.Module) -> None:
        """Move `module` to the other class."""
        module.__class__ = rebound_class(self.original, self.name, self.replacement)
        module.__dict__[_MARK] = self

    def revert(self, module: nn.Module) -> None:
        """Move `module` back."""
        module.__class__ = self.original
        del module.__dict__[_MARK]
        module.__dict__.pop("forward", None)  # of the class that it leaves

    def is_intact(self, module: nn.Module) -> bool:
        """Whether nobody has replaced the class or its `forward` since."""
        return is_rebound(module)


Patch = AttributePatch | ClassPatch


def find_patch(module: nn.Module) -> Patch | None:
    """Return the patch that a module carries, or None."""
    patch: Patch | None = module.__dict__.get(_MARK)
    return patch
