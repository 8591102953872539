"""What the operators of the ViT share: they are for inference, so each is registered without a derivative."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from math import prod
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from visionkernels.ops._common import check_dense, on_device, shown

BACKENDS = ("auto", "triton", "pytorch")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton reads it once too, when it is imported

# What computes each operator by PyTorch's kernels, from all of its arguments but `backend`.
PYTORCH_FORMS: dict[Any, Callable[..., Any]] = {}

_library = torch.library.Library("visionkernels", "FRAGMENT")


def register(schema: str, *, module: str, pytorch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator without a derivative in the namespace ``visionkernels``.

    Args:
        schema: name, arguments and results, as ``torch.library`` writes them; the last argument is ``str backend``.
        module: its package under ``visionkernels.ops``, whose module ``launch`` has a function of the operator's name
            and arguments.
        pytorch: computes it by PyTorch's kernels, from all arguments but ``backend``.
        fake: empty results of the right shapes, dtypes and (contiguous) strides.

    Returns:
        The operator's overload, to be called.
    """
    name = schema.partition("(")[0]

    def on_cpu(*arguments: Any) -> Any:
        *inputs, backend = arguments
        return by_kernels(*arguments) if backend == "triton" else pytorch(*inputs)  # under Triton's interpreter

    def on_cuda(*arguments: Any) -> Any:
        *inputs, backend = arguments
        return pytorch(*inputs) if backend == "pytorch" else by_kernels(*arguments)

    def by_kernels(*arguments: Any) -> Any:
        return getattr(launch_of(module), name)(*arguments)

    def no_backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f"visionkernels::{name} computes no gradients: call it under torch.no_grad()")

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, on_cuda, "CUDA")
    torch.library.register_fake(f"visionkernels::{name}", fake, lib=_library)
    torch.library.register_autograd(f"visionkernels::{name}", no_backward, lib=_library)
    overload = getattr(torch.ops.visionkernels, name).default
    PYTORCH_FORMS[overload] = pytorch
    return overload


@cache
def launch_of(op: str) -> ModuleType:
    """The module ``launch`` of ``visionkernels.ops.<op>``, which imports Triton.

    Raises:
        RuntimeError: Triton is not installed.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeError(
            f"{op} on CUDA tensors needs Triton, which is not installed; install it with `pip install triton`, "
            'pass backend="pytorch", or move the tensors to the CPU'
        ) from error
    return import_module(f"visionkernels.ops.{op}.launch")


def refuse_gradients(name: str, *arguments: object, instead: str = "torch.nn.functional") -> None:
    """Raise where autograd would want a derivative of ``name``, by one of its tensors.

    Args:
        name: the public function that is called.
        arguments: those of it that may be tensors.
        instead: what computes the same with gradients.
    """
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise RuntimeError(
            f"{name} computes no gradients: call it under torch.no_grad() or torch.inference_mode(), "
            f"or use {instead} to train"
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(f"{name} computes no forward-mode derivatives: use {instead} for them")


def check_choice(name: str, choice: object, choices: Sequence[object]) -> None:
    """An option that has to be one of a few."""
    if choice not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {shown(choice)}")


def check_backend(backend: str, tensor: Tensor) -> None:
    """``backend`` is one of ``BACKENDS`` that runs where the tensor is."""
    check_choice("backend", backend, BACKENDS)
    if backend == "triton" and tensor.device.type == "cpu" and not INTERPRET:
        raise ValueError(
            'backend must be "auto" or "pytorch" for tensors on the CPU, got "triton", which runs on CUDA devices; '
            "move the tensors to one"
        )


def check_tensor(name: str, tensor: Tensor, axes: str, dims: int | None = None) -> None:
    """A dense floating tensor on a device that has an implementation.

    Args:
        name: the argument's name.
        tensor: what came.
        axes: the expected shape in words, such as ``"[..., C]"``.
        dims: the expected number of axes; None: any but 0.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor {axes}, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    check_dense(name, tensor)
    if tensor.dim() != dims if dims is not None else tensor.dim() == 0:
        raise ValueError(f"{name} must be {axes}, got {list(tensor.shape)}")
    if tensor.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"{name} must be on a CUDA (or ROCm) device or on the CPU, got {tensor.device}")


def check_like(name: str, tensor: Tensor, shape: Sequence[int], axes: str, like: Tensor, like_name: str) -> None:
    """A tensor of exactly this shape, in the dtype and on the device of another argument.

    Args:
        name: the argument's name.
        tensor: what came.
        shape: what its shape must be.
        axes: the same in words, such as ``"[C]"``.
        like: the argument whose dtype and device it must have.
        like_name: that argument's name.
    """
    if (
        isinstance(tensor, Tensor)
        and tensor.dtype == like.dtype
        and tensor.device == like.device
        and tuple(tensor.shape) == tuple(shape)
    ):
        check_dense(name, tensor)
        return
    check_tensor(name, tensor, axes, len(shape))
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {tensor.device}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must be {like.dtype} like {like_name}, got {tensor.dtype}; convert it with .to()")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must be {axes} = {list(shape)}, got {list(tensor.shape)}")


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` asks for where the tensor is, or None; float64 is left alone, as in PyTorch."""
    kind = tensor.device.type
    if kind == "meta" or tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def cast(dtype: torch.dtype | None, *tensors: Any) -> list[Any]:
    """The tensors in ``dtype``; None stays None, and a dtype of None leaves all as they are."""
    if dtype is None:
        return list(tensors)
    return [
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def rows_of(tensor: Tensor) -> Tensor:
    """``[..., C]`` as ``[M, C]`` with a contiguous last axis and rows anywhere; copied only where no view is one."""
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        tensor = tensor.contiguous()
    if tensor.dim() == 2:
        return tensor
    return tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])


def launch(
    kernel: Any,
    programs: int,
    arguments: Sequence[Any],
    device: torch.device,
    *,
    early: bool = False,
    **options: int,
) -> None:
    """Launch a Triton kernel.

    A launch that differs from an earlier one in addresses alone goes straight to the compiled kernel: Triton's own
    look-up takes the host several times as long.

    Args:
        kernel: the kernel.
        programs: how many programs run.
        arguments: all of its arguments, constexprs too, in their order.
        device: where its tensors are.
        early: begin while the kernel before still runs (programmatic dependent launch); the kernel waits for it.
        options: ``num_warps`` and so on.
    """
    if early:
        options["launch_pdl"] = True
    grid = (programs, 1, 1)
    compiled_for = [a if type(a) in _PLAIN else _what_is_compiled(a) for a in arguments]
    key = (kernel, programs, device, *options.items(), *compiled_for)
    runner = _runners.get(key)
    with on_device(device):
        if runner is not None:
            runner(*arguments)
            return
        _check_bfloat16(kernel, arguments, device)
        compiled = kernel[grid](*arguments, **options)
        if compiled is not None:  # the interpreter compiles nothing
            if len(_runners) >= MAX_RUNNERS:
                _runners.clear()
            _runners[key] = compiled[grid]


MAX_RUNNERS = 4096
_runners: dict[tuple[Any, ...], Callable[..., None]] = {}
_PLAIN = (int, bool, str, float, type(None))  # what is compiled for them is told by their value


def _check_bfloat16(kernel: Any, arguments: Sequence[Any], device: torch.device) -> None:
    """Raise where a GPU has no bfloat16: there Triton's compiler fails, or makes slow kernels, by its version."""
    capability = device_of(device).capability
    if (0, 0) < capability < (8, 0) and any(isinstance(a, Tensor) and a.dtype == torch.bfloat16 for a in arguments):
        name = kernel.__name__.strip("_").removesuffix("_kernel")
        raise TypeError(
            f"{name} takes no bfloat16 on {device}, which has compute capability {capability[0]}.{capability[1]} and "
            'needs 8.0; convert the tensors to float16 or float32, or pass backend="pytorch"'
        )


def _what_is_compiled(argument: Any) -> Any:
    """What Triton compiles a kernel for: of a tensor its dtype and alignment, of a descriptor its dtype and block."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16
    block = getattr(argument, "block_shape", None)
    return argument if block is None else (argument.base.dtype, *block)


class Device(NamedTuple):
    """What a launch rule asks of a device."""

    multiprocessors: int
    capability: tuple[int, int]  # of NVIDIA's GPUs; (0, 0) of others

    @property
    def is_hopper(self) -> bool:
        """Whether it is an NVIDIA GPU of compute capability 9.x, with TMA and products of whole warp groups."""
        return self.capability[0] == 9

    @property
    def launches_early(self) -> bool:
        """Whether a kernel may be launched while the one before still runs (programmatic dependent launch)."""
        return self.capability >= (9, 0)


@cache
def device_of(device: torch.device) -> Device:
    """``Device`` of a CUDA or ROCm device; of the CPU, for Triton's interpreter, a small one of none."""
    if device.type != "cuda":
        return Device(2, (0, 0))
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    return Device(multiprocessors, (0, 0) if torch.version.hip else torch.cuda.get_device_capability(device))
