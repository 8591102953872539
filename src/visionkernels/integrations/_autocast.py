"""Upstream operators that do not know autocast: their output has the value's dtype, inside an autocast region too."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def outside_autocast(value: Tensor) -> AbstractContextManager[None]:
    """Return a context in which an operator takes `value` as it is."""
    kind = value.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
