"""Deformable-DETR and its descendants: a module in place of the CUDA extension that they compile.

All of them import an extension, nearly all under the name `MultiScaleDeformableAttention`, and call two functions of
it from an `autograd.Function` of their own. With `install_extension` that import finds the module made here; their
function, module and test files run unchanged. TrackFormer's older extension is the same without `level_start_index`:
both forms are taken, by the number of arguments.
"""

import itertools
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from visionkernels.integrations._autocast import outside_autocast
from visionkernels.integrations.table import Row
from visionkernels.ops.deformable_attention import checks, registration
from visionkernels.ops.deformable_attention.op import ms_deform_attn

NAME = "MultiScaleDeformableAttention"

_FUNCTIONS = "ms_deform_attn_forward and ms_deform_attn_backward of the extension"
_SWITCH = "visionkernels.install_extension()"

ROWS = (
    Row("Deformable-DETR", "11169a6 (2020-12)", _FUNCTIONS, _SWITCH),
    Row("DINO", "faa8520 (2023-12)", _FUNCTIONS, _SWITCH),
    Row("DN-DETR", "ff3902a (2023-12)", _FUNCTIONS, _SWITCH),
    Row("Mask2Former", "9b0651c (2022-05)", _FUNCTIONS, _SWITCH),
    Row("OneFormer", "4962ef6 (2023-07)", _FUNCTIONS, _SWITCH),
    Row("TrackFormer", "e468bf1 (2023-09)", f"{_FUNCTIONS}, without level_start_index", _SWITCH),
    Row("Grounding DINO", "856dde2 (2024-08)", _FUNCTIONS, 'visionkernels.install_extension("groundingdino._C")'),
    Row("detrex", "e244e6c (2025-09)", _FUNCTIONS, 'visionkernels.install_extension("detrex._C")'),
)


class _Finder:
    """What `install_extension` puts into `sys.meta_path`: finds the one module, and loads it by handing it out.

    An import through it also makes the module an attribute of the package that it is in, whenever that is imported.
    """

    def __init__(self, name: str) -> None:
        self.module = ModuleType(name, f"Stands in for the compiled extension {name}: the operators of visionkernels.")
        self.module.__spec__ = ModuleSpec(name, self, origin="visionkernels")  # type: ignore[arg-type]
        vars(self.module).update(
            ms_deform_attn_forward=ms_deform_attn_forward, ms_deform_attn_backward=ms_deform_attn_backward
        )

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return self.module.__spec__ if name == self.module.__name__ else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do."""


def _installed(name: str) -> _Finder | None:
    """The finder of this module, unless something else has been imported under its name."""
    finders = (one for one in sys.meta_path if isinstance(one, _Finder) and one.module.__name__ == name)
    return next((one for one in finders if sys.modules.get(name, one.module) is one.module), None)


def install_extension(name: str = NAME, *, replace: bool = False) -> ModuleType:
    """Make `import MultiScaleDeformableAttention` find this package's operators.

    Call it before the code that imports the extension is imported, in every process (a spawned worker too). Nothing
    has to be compiled, and CPU tensors work as well. A second call does nothing.

    Args:
        name: the extension that the code base imports: `"groundingdino._C"` for Grounding DINO, `"detrex._C"` for
            detrex, the default for all others. Such a `_C` has the two functions of the attention and nothing else.
        replace: also stand in for a compiled extension of that name that is installed but not imported yet.

    Returns:
        The module that the import finds, with `ms_deform_attn_forward` and `ms_deform_attn_backward`.

    Raises:
        TypeError: `name` is no string.
        ValueError: `name` is no module name.
        RuntimeError: a compiled extension of that name is imported already, or is installed and `replace` is False;
            or the import of that name is blocked.

    Source:
        `models/ops` of Deformable-DETR.

    Example:
        >>> import torch, visionkernels as vk
        >>> extension = vk.install_extension()
        >>> import MultiScaleDeformableAttention as MSDA
        >>> value = torch.arange(6.0).view(1, 6, 1, 1)  # one level of 2 x 3 pixels
        >>> center, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        >>> shapes, start = torch.tensor([[2, 3]]), torch.tensor([0])
        >>> MSDA.ms_deform_attn_forward(value, shapes, start, center, weights, 64)
        tensor([[[2.5000]]])
        >>> vk.uninstall_extension()
    """
    if not isinstance(name, str):
        raise TypeError(f"name: expected the name of a module, such as {NAME!r}, got a {type(name).__name__}")
    parent_name, _, child = name.rpartition(".")
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"name: expected the name of a module, such as {NAME!r}, got {name!r}")
    installed = _installed(name)
    if installed is not None:
        return installed.module
    _check_is_free(name, replace)
    parent = sys.modules.get(parent_name)
    finder = _Finder(name)
    sys.meta_path.insert(0, finder)
    if not parent_name or parent is not None:  # a package that is imported later asks the finder
        sys.modules[name] = finder.module
    if parent is not None:
        setattr(parent, child, finder.module)
    return finder.module


def _check_is_free(name: str, replace: bool) -> None:
    """Raise a RuntimeError where `install_extension` would shadow something, or could not work."""
    for part in itertools.accumulate(name.split("."), "{}.{}".format):
        if part in sys.modules and sys.modules[part] is None:
            raise RuntimeError(
                f"the import of {part} is blocked: sys.modules[{part!r}] is None; delete that entry before "
                "install_extension()"
            )
    parent_name, _, child = name.rpartition(".")
    if name in sys.modules or hasattr(sys.modules.get(parent_name), child):
        origin = getattr(sys.modules.get(name), "__file__", None) or "an unknown file"
        raise RuntimeError(
            f"{name} is imported already, from {origin}, and code may hold its functions; "
            "call install_extension() at the start of the program, before anything imports it"
        )
    spec = None if replace else _find_spec(name)
    if spec is not None:
        raise RuntimeError(
            f"{name} is installed at {spec.origin}; uninstall it, or pass replace=True to use this package's instead"
        )


def uninstall_extension(name: str = NAME) -> None:
    """Take back what `install_extension` did: the import finds what it found before.

    Code that has imported the module keeps it.

    Args:
        name: as for `install_extension`.

    Raises:
        ValueError: no module of this package stands under that name.

    Example:
        >>> import sys, visionkernels as vk
        >>> extension = vk.install_extension()
        >>> vk.uninstall_extension()
        >>> "MultiScaleDeformableAttention" in sys.modules
        False
    """
    finder = _installed(name)
    if finder is None:
        raise ValueError(f"name: expected a module that install_extension() has put in place, but {name!r} is not one")
    sys.meta_path.remove(finder)
    sys.modules.pop(name, None)
    parent_name, _, child = name.rpartition(".")
    parent = sys.modules.get(parent_name)
    if parent is not None and getattr(parent, child, None) is finder.module:
        delattr(parent, child)


def ms_deform_attn_forward(*arguments: Any) -> Tensor:
    """The attention, as `ms_deform_attn_forward` of the extension computes it.

    Unlike the extension's it takes any batch size, tensors of any strides, int32 shapes, halves, and locations and
    weights of another dtype than the value.

    Args:
        *arguments: six, by position, or TrackFormer's five without `level_start_index`:

            - `value`: `[N, S, M, D]`, any dtype that `ms_deform_attn` takes; autocast does not change it.
            - `spatial_shapes`: `[L, 2]` int64 or int32, (h, w).
            - `level_start_index`: `[L]`; it follows from the shapes.
            - `sampling_loc`: `[N, Lq, M, L, P, 2]`, (x, y) in [0, 1]; outside counts as zero.
            - `attn_weight`: `[N, Lq, M, L, P]`, the softmax already applied.
            - `im2col_step`: does nothing.

    Returns:
        `[N, Lq, M * D]` in the dtype of `value`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

    Source:
        `models/ops/src/ms_deform_attn.h` of Deformable-DETR.

    Example:
        >>> value, start = torch.arange(6.0).view(1, 6, 1, 1), torch.tensor([0])
        >>> center, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        >>> ms_deform_attn_forward(value, torch.tensor([[2, 3]]), start, center, weights, 64)
        tensor([[[2.5000]]])
    """
    names = "value, spatial_shapes, level_start_index, sampling_loc, attn_weight, im2col_step"
    value, shapes, start, locations, weights, step = _arguments("ms_deform_attn_forward", names, arguments)
    with outside_autocast(value):
        return ms_deform_attn(value, shapes, start, locations, weights, step)


def ms_deform_attn_backward(*arguments: Any) -> list[Tensor]:
    """The three gradients, as `ms_deform_attn_backward` of the extension computes them.

    Args:
        *arguments: seven, by position, or TrackFormer's six without `level_start_index`: those of
            `ms_deform_attn_forward`, with `grad_output`, `[N, Lq, M * D]` in the dtype of `value`, before
            `im2col_step`.

    Returns:
        The gradients of `value`, `sampling_loc` and `attn_weight`, each in the shape and dtype of its tensor.

    Raises:
        TypeError, ValueError, RuntimeError: as `ms_deform_attn`.

    Source:
        `models/ops/src/ms_deform_attn.h` of Deformable-DETR.

    Example:
        >>> value, start = torch.arange(6.0).view(1, 6, 1, 1), torch.tensor([0])
        >>> center, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        >>> arguments = (value, torch.tensor([[2, 3]]), start, center, weights, torch.ones(1, 1, 1), 64)
        >>> grad_value, grad_sampling_loc, grad_attn_weight = ms_deform_attn_backward(*arguments)
        >>> grad_attn_weight.flatten()
        tensor([2.5000])
    """
    names = "value, spatial_shapes, level_start_index, sampling_loc, attn_weight, grad_output, im2col_step"
    value, spatial_shapes, _, locations, weights, grad_output, _ = _arguments(
        "ms_deform_attn_backward", names, arguments
    )
    if not torch.compiler.is_compiling():  # in a backward, Dynamo refuses to look at a tensor's layout
        checks.check_value(value)
    num_levels, shapes, sizes = checks.check_shapes(spatial_shapes, value)
    num_points = checks.check_num_points("sampling_loc", locations, num_levels, None)
    batch, _, num_heads, head_dim = value.shape
    samples = (batch, locations.shape[1], num_heads, *locations.shape[3:5])
    checks.check_like("sampling_loc", locations, (*samples, 2), "[N, Lq, M, L, P, 2]", value)
    checks.check_like("attn_weight", weights, samples, "[N, Lq, M, L, P]", value)
    checks.check_like("grad_output", grad_output, (*samples[:2], num_heads * head_dim), "[N, Lq, M * D]", value)
    if grad_output.dtype != value.dtype:
        raise TypeError(f"grad_output must be {value.dtype} like value, got {grad_output.dtype}")
    options = (num_points, "zeros", False, "bilinear")
    with torch.no_grad():
        return list(registration.BACKWARD(grad_output, value, shapes, sizes, locations, weights, *options, True, True))


def _arguments(function: str, names: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments in the order of `names`, with None for a `level_start_index` that is left out."""
    expected = len(names.split(","))
    if len(arguments) == expected - 1:
        return (*arguments[:2], None, *arguments[2:])
    if len(arguments) != expected:
        raise TypeError(f"{function} takes ({names}), or the same without level_start_index; got {len(arguments)}")
    return arguments


def _find_spec(name: str) -> ModuleSpec | None:
    """Find a module as `importlib.util.find_spec` does, but without importing the packages that it is in.

    Importing them would import the extension too. A directory that is no package is not an extension.
    """
    path, spec = None, None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        # Old finders have another method, which Python itself no longer asks.
        specs = (finder.find_spec(part, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is None or (count < len(parts) and spec.submodule_search_locations is None):
            return None
        path = spec.submodule_search_locations
    return spec if spec is not None and spec.loader is not None else None
