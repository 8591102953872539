"""The short way of a call that came before: eager, on CUDA, with nothing recorded.

A decoder's call is one kernel of a few microseconds, so what the host does around it decides its time: checking the
arguments, PyTorch's dispatcher and Triton's look-up take several times as long as the launch itself. All of them
depend only on what a key holds, so a call whose key is known goes straight to its launch. Every other call takes
the full way through the registered operator: so do all calls that something observes (autograd, autocast,
``torch.compile``, a dispatch mode, a functorch transform, a trace).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Size, Tensor, is_autocast_enabled, is_grad_enabled
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_compiling

Key = tuple[Hashable, ...]
Launch = Callable[..., Tensor]

MAX_LAUNCHES = 1024
PAIR_TYPES = {tuple, list, Size}  # what a list of (h, w) may hold
ALIGNMENT = 16  # bytes; Triton compiles another kernel for addresses that are not multiples of it
_launches: dict[Key, Launch] = {}


def key_of(
    spatial_shapes: Any,
    level_start_index: object,
    tensors: tuple[Tensor | None, ...],
    padding_mode: str,
    align_corners: bool,
    method: str,
    num_points: Any,
) -> Key | None:
    """What determines the launch of a call, or None where the call must take the full way.

    Args:
        spatial_shapes: as the caller gave them, like everything here.
        level_start_index: has to be checked where the host can read it.
        tensors: value first; None for an argument that is not given.
        padding_mode: an option of the call.
        align_corners: an option of the call.
        method: an option of the call.
        num_points: an option of the call.
    """
    value = tensors[0]
    if (
        type(value) is not Tensor
        or not value.is_cuda
        or type(align_corners) is not bool
        or is_compiling()
        or is_autocast_enabled("cuda")
        or _len_torch_dispatch_stack()
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or not (level_start_index is None or (isinstance(level_start_index, Tensor) and level_start_index.is_cuda))
    ):
        return None
    if type(spatial_shapes) is Tensor:
        sizes: Hashable = spatial_shapes.dtype
        tensors = (*tensors, spatial_shapes)
    elif type(spatial_shapes) is list and {*map(type, spatial_shapes)} <= PAIR_TYPES:
        sizes = (*map(tuple, spatial_shapes),)
    else:
        return None
    device, records, addresses = value.get_device(), is_grad_enabled(), 0
    points = tuple(num_points) if type(num_points) is list else num_points
    key = [device, sizes, padding_mode, align_corners, method, points]
    for tensor in tensors:
        if tensor is None:
            key.append(None)
            continue
        if (
            type(tensor) is not Tensor
            or tensor.get_device() != device
            or not tensor.is_contiguous()
            or (records and tensor.requires_grad)
        ):
            return None
        addresses |= tensor.data_ptr()
        key.append(tensor.shape)
        key.append(tensor.dtype)
    return None if addresses % ALIGNMENT else tuple(key)


def recall(key: Key | None) -> Launch | None:
    """The launch of an earlier call with this key."""
    if key is None:
        return None
    try:
        return _launches.get(key)
    except TypeError:  # an option that cannot be hashed is a wrong one: the full way says which
        return None


def remember(key: Key, launch: Launch | None) -> None:
    """Keep the launch of a call that went through, unless there is none that can be repeated."""
    if launch is None:
        return
    if len(_launches) >= MAX_LAUNCHES:
        _launches.clear()
    _launches[key] = launch
