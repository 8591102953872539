"""Keep sizes open where a model's own code would fix them to the numbers of the example.

Six things in the models of transformers do so without need: `len(tensor)` and `torch_int(size)`, which make Python
numbers, `torch.as_tensor` and `torch.linspace`, which take numbers alone, `torch.take_along_dim`, which makes them, and
`F.interpolate`, which asks how many channels there are where a mask has its batch. For the time of a trace each has a
form that takes a symbol. `torch.isin`, `cummax` and `cummin`, which no ONNX operator is, are written out; and
`torch_compilable_check` of a tensor, an assertion that none is either, is left out: our operators check sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_SYMBOLS = (torch.SymInt, torch.SymFloat)


class Tracing(TorchFunctionMode):
    """Inside it `torch.tensor`, `torch.as_tensor`, `torch.linspace` and `torch.take_along_dim` take symbols.

    Args:
        lowered: what to call in place of an operator of this package, if it is not to become a node, or in place of a
            function of PyTorch.

    Attributes:
        calls: the operators of this package that were called.
        outputs: the names of a ViT's outputs.
    """

    def __init__(self, lowered: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._lowered = lowered
        self.calls: list[str] = []
        self.outputs: tuple[str, ...] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, or the form of it that takes symbols."""
        kwargs = kwargs or {}
        if func in self._lowered:
            ours = isinstance(func, torch._ops.OpOverload)
            if ours:
                self.calls.append(str(func))
            with self if ours else nullcontext():  # what an operator is made of may need another form, too
                return self._lowered[func](*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and args and _holds_symbol(args[0]):
            return tensor_of(args[0], kwargs.get("dtype") or torch.int64, kwargs.get("device"))
        if func is torch.linspace and _holds_symbol([*args, *kwargs.values()]):
            return _linspace(*args, **kwargs)
        if func is torch.take_along_dim:
            return _take_along_dim(*args, **kwargs)
        if func is F.scaled_dot_product_attention and self._lowered:
            # Its strides depend on the kernel; torch.onnx's form of it has others than those a view was made for.
            return func(*args, **kwargs).contiguous()
        if func is F.interpolate and isinstance(args[0].shape[1], torch.SymInt):
            return _interpolate(*args, **kwargs)
        if func is torch.isin and self._lowered:
            return _isin(*args, **kwargs)
        if func in (torch.cummax, Tensor.cummax) and self._lowered:
            return _cummax(*args, **kwargs)
        if func in (torch.cummin, Tensor.cummin) and self._lowered:
            values, index = _cummax(-args[0], *args[1:], **kwargs)
            return torch.return_types.cummin((-values, index))
        return func(*args, **kwargs)


@contextmanager
def open_names(module: nn.Module) -> Iterator[None]:
    """Put the other forms of these functions into the modeling files of transformers that `module` is made of."""
    names = {type(part).__module__ for part in module.modules()}
    with ExitStack() as stack:
        for name in sorted(names):
            if not name.startswith("transformers.models."):
                continue
            scope = vars(sys.modules[name])
            for own, replacement in (("len", _len), ("torch_int", _torch_int), ("torch_compilable_check", _check)):
                if own == "len" or own in scope:
                    stack.callback(_restore, scope, own, scope.get(own))
                    scope[own] = replacement
        yield


def _restore(scope: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        del scope[name]
    else:
        scope[name] = value


def _len(sized: Any) -> Any:
    return sized.shape[0] if isinstance(sized, Tensor) and sized.dim() else len(sized)


def _torch_int(size: Any) -> Any:
    return size if isinstance(size, torch.SymInt) else int(size)


def _check(condition: Any, message: Any, error: type[Exception] = ValueError) -> None:
    if isinstance(condition, bool) and not condition:
        raise error(message() if callable(message) else message)


def _holds_symbol(data: Any) -> bool:
    if isinstance(data, (list, tuple)):
        return any(_holds_symbol(item) for item in data)
    return isinstance(data, _SYMBOLS)


def tensor_of(data: Any, dtype: torch.dtype, device: Any) -> Tensor:
    """A tensor of numbers and symbols, made on the device and not copied to it."""
    if isinstance(data, (list, tuple)):
        return torch.stack([tensor_of(item, dtype, device) for item in data])
    return torch.full((), data, dtype=dtype, device=device)


def _linspace(start: Any, end: Any, steps: Any, *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    dtype = dtype or torch.get_default_dtype()
    count = torch.full((), steps, dtype=dtype, device=device)
    length = torch.full((), end, dtype=dtype, device=device) - start
    return torch.arange(steps, device=device).to(dtype) * (length / (count - 1).clamp(min=1)) + start


def _interpolate(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Of a mask `[1, N, H, W]`: for a GPU PyTorch asks whether there are less than four channels, which limits N."""
    images = F.interpolate(input.flatten(0, 1).unsqueeze(1), *args, **kwargs)
    return images.squeeze(1).unflatten(0, input.shape[:2])


def _take_along_dim(input: Tensor, indices: Tensor, dim: int) -> Tensor:
    tensor, index = input.movedim(dim, -1), indices.movedim(dim, -1)
    shape = torch.broadcast_shapes(tensor.shape[:-1], index.shape[:-1])
    return tensor.expand(*shape, -1).gather(-1, index.expand(*shape, -1)).movedim(-1, dim)


def _isin(elements: Any, test_elements: Any, *, invert: bool = False, **_: Any) -> Tensor:
    tests = test_elements.flatten() if isinstance(test_elements, Tensor) else test_elements
    equal = elements[..., None] == tests if isinstance(tests, Tensor) else elements == tests
    found = equal.any(-1) if isinstance(tests, Tensor) else equal
    return ~found if invert else found


def _cummax(tensor: Tensor, dim: int) -> torch.return_types.cummax:
    """Every pair of positions compared; of equal entries the last one counts."""
    moved = tensor.movedim(dim, -1)
    count = moved.shape[-1]
    position = torch.arange(count, device=tensor.device)
    seen = position <= position[:, None]  # [to, from]
    least = torch.finfo(tensor.dtype).min if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min
    pairs = moved[..., None, :].where(seen, torch.full((), least, dtype=tensor.dtype, device=tensor.device))
    values = pairs.amax(-1)
    index = ((pairs == values[..., None]) & seen).long().mul(position + 1).amax(-1) - 1
    return torch.return_types.cummax((values.movedim(-1, dim), index.movedim(-1, dim)))
