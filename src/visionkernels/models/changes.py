"""Whether a model is still what something was made from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from visionkernels.models.modules import forward_hooks


class _Buffer(NamedTuple):
    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    memory: Any  # held, so that a captured kernel reads no memory that went to something else
    address: int
    version: int | None


class Snapshot:
    """The modules and buffers of a model at one time. They stay in memory as long as this does.

    Args:
        model: The model.
        copied: Names of buffers whose values were read, so that new values in the same memory matter too.
        called: The modules that a forward calls, whose hooks have to be called with them.
    """

    def __init__(self, model: nn.Module, copied: Collection[str], called: Collection[nn.Module]) -> None:
        modules = list(model.modules())
        self._children = [
            (module._modules, name, child) for module in modules for name, child in module.named_children()
        ]
        self._buffers = [
            _Buffer(
                module._buffers,
                name,
                tensor,
                tensor.untyped_storage(),
                tensor.data_ptr(),
                _version(tensor) if name in copied else None,
            )
            for module in modules
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]
        self._hooks = forward_hooks(called)

    def is_current(self) -> bool:
        """Whether no module or buffer was replaced or lies elsewhere, and what was copied has the same values."""
        return all(owner.get(name) is child for owner, name, child in self._children) and all(
            owner.get(name) is tensor
            and tensor.data_ptr() == address
            and (version is None or version == _version(tensor))
            for owner, name, tensor, _, address, version in self._buffers
        )

    @property
    def hooked(self) -> bool:
        """Whether a module that is called has forward hooks at this time."""
        return any(self._hooks)

    @property
    def tensors(self) -> list[Tensor]:
        """All buffers."""
        return [buffer.tensor for buffer in self._buffers]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
