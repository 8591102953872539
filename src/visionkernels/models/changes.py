"""Whether a model is still what something was made from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn

from visionkernels.models.modules import forward_hooks


class _Buffer(NamedTuple):
    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor | None
    memory: Any  # held, so that a captured kernel reads no memory that went to something else
    address: int
    version: int | None


class Snapshot:
    """The modules and buffers of a model at one time. They stay in memory as long as this does.

    What PyTorch does not count is not seen either: new values in the same memory by way of `.data`. Memory that
    `untyped_storage().resize_` takes from a buffer is not held.

    Args:
        model: The model.
        copied: Names of buffers whose values were read, so that new values in the same memory matter too.
        called: The modules that a forward calls, whose hooks have to be called with them.
    """

    def __init__(self, model: nn.Module, copied: Collection[str], called: Collection[nn.Module]) -> None:
        modules = list(model.modules())
        self._children = [(module._modules, dict(module._modules)) for module in modules]
        self._counts = [(module._buffers, len(module._buffers)) for module in modules]
        self._buffers = [
            _Buffer(
                module._buffers,
                name,
                tensor,
                None if tensor is None else tensor.untyped_storage(),
                0 if tensor is None else tensor.data_ptr(),
                None if tensor is None or name not in copied else _version(tensor),
            )
            for module in modules
            for name, tensor in module._buffers.items()
        ]
        self._hooks = forward_hooks(called)

    def is_current(self) -> bool:
        """Whether nothing was added, replaced or moved, and what was copied has the same values."""
        return (
            all(owner == children for owner, children in self._children)
            and all(len(owner) == count for owner, count in self._counts)
            and all(
                owner.get(name) is tensor
                and (tensor is None or tensor.data_ptr() == address)
                and (tensor is None or version is None or version == _version(tensor))
                for owner, name, tensor, _, address, version in self._buffers
            )
        )

    @property
    def hooked(self) -> bool:
        """Whether a module that is called has forward hooks at this time."""
        return any(self._hooks)

    @property
    def tensors(self) -> list[Tensor]:
        """All buffers."""
        return [buffer.tensor for buffer in self._buffers if buffer.tensor is not None]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
