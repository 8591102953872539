"""Whether a model still has the weights that something was made from."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

from torch import Tensor, nn


class _Known(NamedTuple):
    owner: dict[str, Tensor | None]
    name: str
    tensor: Tensor
    memory: Any  # held, so that a captured kernel reads no memory that went to something else
    address: int
    version: int | None


class Weights:
    """The buffers of a model at one time. They stay in memory as long as this does.

    Args:
        model: The model.
        copied: Names of buffers whose values were read, so that new values in the same memory matter too.
    """

    def __init__(self, model: nn.Module, copied: Collection[str]) -> None:
        self._known = [
            _Known(
                module._buffers,
                name,
                tensor,
                tensor.untyped_storage(),
                tensor.data_ptr(),
                _version(tensor) if name in copied else None,
            )
            for module in model.modules()
            for name, tensor in module._buffers.items()
            if tensor is not None
        ]

    def are_current(self) -> bool:
        """Whether none was replaced, none lies elsewhere, and what was copied has the same values."""
        return all(
            owner.get(name) is tensor
            and tensor.data_ptr() == address
            and (version is None or version == _version(tensor))
            for owner, name, tensor, _, address, version in self._known
        )

    @property
    def tensors(self) -> list[Tensor]:
        """All of them."""
        return [known.tensor for known in self._known]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
