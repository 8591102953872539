"""Exchange one function that a class's `forward` looks up in its module, for single instances of the class.

Some upstream attentions call the operator by a name of their module. Setting that name would change every model
of the process, and an instance's own `forward` would be a bound method, which `torch.nn.DataParallel` hands to
its replicas bound to the original. So the instance's class becomes a subclass of the same name, as in PyTorch's
parametrizations and FSDP, and the subclass's `forward` is upstream's: its source compiled once more with the
operator's name as the variable of an enclosing function. All other names are looked up in upstream's module at
each call, so nothing is copied, and a later change there is seen. To `torch.compile` it is a method with a closure,
like any other.
"""

import __future__

import functools
import inspect
import threading
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_UPSTREAM = "_visionkernels_upstream"  # in a subclass made here: the class that it stands in for
_LOCK = threading.Lock()  # `functools.cache` may call its function once for each thread


def rebind(function: Callable[..., Any], name: str, replacement: Callable[..., Any]) -> FunctionType:
    """Return a Python function that calls `replacement` where `function` calls the global `name`.

    Args:
        function: a method defined in a class body.
        name: a name that it looks up in its module.
        replacement: what that name stands for in the new function.

    Raises:
        RuntimeError: `function` does not look `name` up, or its source cannot be read or is not what runs.
    """
    if not isinstance(function, FunctionType) or name not in function.__code__.co_names or function.__closure__:
        raise RuntimeError(f"it does not look {name} up in its module, or is wrapped by a decorator")
    if _parts_of(_compile(function, "_")(None)) != _parts_of(function):
        raise RuntimeError("its source has changed since it was imported")
    rebound: FunctionType = _compile(function, name)(replacement)
    for attribute in ("__defaults__", "__kwdefaults__", "__qualname__", "__module__"):
        setattr(rebound, attribute, getattr(function, attribute))
    return rebound


def _parts_of(function: FunctionType) -> tuple[Any, ...]:
    """Return what two compilations of one source have in common; the instructions may differ with the scope."""
    code = function.__code__
    return code.co_names, code.co_varnames, [value for value in code.co_consts if not isinstance(value, CodeType)]


def _compile(function: FunctionType, name: str) -> Callable[..., FunctionType]:
    """Compile a method's source as the body of a function of the variable `name`, and return that function."""
    try:
        lines, first = inspect.getsourcelines(function)
    except OSError as error:
        raise RuntimeError(f"its source cannot be read: {error}") from error
    indent = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    # The method is indented, so it is the body of a function as it stands; the empty lines keep its line numbers.
    source = [*["\n"] * (first - 2), f"def bind({name}):\n", *lines, f"\n{indent}return {function.__name__}\n"]
    flags = function.__code__.co_flags & __future__.annotations.compiler_flag  # of upstream's module
    scope: dict[str, Any] = {}
    exec(
        compile("".join(source), function.__code__.co_filename, "exec", flags, dont_inherit=True),
        function.__globals__,
        scope,
    )
    bind: Callable[..., FunctionType] = scope["bind"]
    return bind


def rebound_class(cls: type, name: str, replacement: Callable[..., Any]) -> type:
    """Return the subclass of `cls` whose `forward` calls `replacement` for `name`; one for equal arguments.

    If `name` is "forward", `replacement` is all of its `forward`, called with the module.

    Raises:
        RuntimeError: as for `rebind`.
    """
    with _LOCK:
        return _make_class(cls, cls.forward, name, replacement)  # type: ignore[attr-defined]


@functools.cache
def _make_class(cls: Any, forward: Callable[..., Any], name: str, replacement: Callable[..., Any]) -> type:
    def reduce_ex(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        # The subclass has no importable name: pickle and copy make it anew.
        _, _, *state = cls.__reduce_ex__(self, protocol)
        return (_new, (cls, name, replacement), *state)

    body = {
        "forward": replacement if name == "forward" else rebind(forward, name, replacement),
        "__reduce_ex__": reduce_ex,
        _UPSTREAM: cls,
    }
    named = {key: getattr(cls, key) for key in ("__module__", "__qualname__", "__doc__")}
    return type(cls.__name__, (cls,), body | named)


def upstream_class(module: nn.Module) -> Any:
    """Return the class that a module of a class made by `rebound_class` was of before."""
    return vars(type(module))[_UPSTREAM]


def is_rebound(module: nn.Module) -> bool:
    """Whether the module is of a class that `rebound_class` made, and its `forward` is that class's."""
    cls: Any = type(module)
    own = module.__dict__.get("forward", cls.forward)  # accelerate's hooks leave the class's, bound, when they come off
    return _UPSTREAM in vars(cls) and getattr(own, "__func__", own) is cls.forward


def _new(cls: type, name: str, replacement: Callable[..., Any]) -> nn.Module:
    return object.__new__(rebound_class(cls, name, replacement))
