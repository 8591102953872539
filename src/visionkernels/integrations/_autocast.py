"""Upstream operators that do not know autocast: their output has the value's dtype, inside an autocast region too."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from visionkernels.ops.deformable_attention import checks


def outside_autocast(value: Tensor) -> AbstractContextManager[None]:
    """Return a context in which an operator takes `value` as it is.

    Raises:
        TypeError: `value` is no floating tensor.
        ValueError: it has not four axes, or is on a device that has no implementation.
    """
    checks.check_value(value)
    kind = value.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
