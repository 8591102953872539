"""AOTInductor: a `.pt2` package of compiled code, for Python and for C++ without Python.

A package holds the code for one kind of device, and needs nothing of this package where it runs. For an NVIDIA GPU it
has the Triton kernel of deformable attention in it, compiled; other operators, and all on a CPU, are PyTorch's. With
`keep_operators` it calls this package's operators, which the process that loads it must have registered by
`import visionkernels`.
"""

from __future__ import annotations

import ctypes
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionkernels._checkpoint import one_line
from visionkernels.errors import UserError
from visionkernels.export import _kernels, _trace
from visionkernels.export.onnx import Exported


def export(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    path: str | Path,
    *,
    dynamic: _trace.Axes | None = None,
    outputs: Sequence[str] | None = None,
    keep_operators: bool = False,
) -> Exported:
    """Compile a module into a package, for the device that its inputs are on.

    On a CPU this needs a C++ compiler. A package takes contiguous tensors, and does not notice others: whoever runs it
    without `load` sees to that.

    Args:
        model: a module in evaluation mode, whose `forward` takes the inputs by name.
        inputs: an example of each input; a size that is to stay open is at least 2 in it, and no two of them alike.
        path: the file; it must end in `.pt2`.
        dynamic: the sizes that stay open: input name, axis, and a name for the size.
        outputs: a name for each output, for the report: a package returns them in their order; of a `ViT`, by default
            those of `ViTOutput` that its checkpoint gives.
        keep_operators: call this package's operators instead: whoever loads it must `import visionkernels` first. A C++
            program cannot.

    Returns:
        What was written.

    Raises:
        UserError: the path or a size cannot be had, or the model cannot be compiled.

    Example:
        >>> export(model, inputs, "detector.pt2", dynamic={"pixel_values": {0: "batch"}})  # doctest: +SKIP
    """
    if Path(path).suffix != ".pt2":
        raise UserError(f"output: an AOTInductor package must end in .pt2, and it is {path}")
    start = time.perf_counter()
    inputs = contiguous(inputs)
    traced = _trace.trace(model, inputs, dynamic, None if keep_operators else _kernels.lowered())
    try:
        with _quiet():
            torch._inductor.aoti_compile_and_package(traced.program, package_path=str(Path(path).absolute()))
    except Exception as error:
        raise UserError(f"model: AOTInductor cannot compile it: {one_line(error)}") from error
    device = next(iter(inputs.values())).device.type
    detail = "import visionkernels before loading it" if keep_operators else "needs nothing but PyTorch"
    return Exported(
        Path(path), "aoti", len(traced.calls), _trace.shapes(inputs, dynamic), tuple(outputs or traced.outputs or ()),
        time.perf_counter() - start, f"{device} code, {detail}{_trace.limits(traced.program, dynamic)}",
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without PyTorch's warning, a page long, that it cannot see which inputs a kernel writes: that is known here."""
    logger = logging.getLogger("torch._higher_order_ops.triton_kernel_wrap")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def contiguous(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as a package wants them: it reads memory in the example's order, without a look at the strides."""
    return {name: tensor.contiguous() for name, tensor in inputs.items()}


def load(path: str | Path) -> Any:
    """A function from inputs to a list of outputs that runs a package in this process.

    Args:
        path: a file that `export` wrote.

    Returns:
        The function. It takes a tensor for each input, by name, of the shapes and dtypes that the package was made for
        and on its device, and gives the outputs in their order.

    Raises:
        UserError: the file is no package for this machine.

    Source: `torch._inductor.aoti_load_package`.

    Example:
        >>> logits, boxes = load("detector.pt2")({"pixel_values": torch.rand(1, 3, 256, 256)})  # doctest: +SKIP
    """
    if sys.platform == "linux":
        # PyTorch's libraries bring parts of an older C++ library along. A package that is linked with those in place of
        # the system's crashes in `std::regex`; what is loaded like this comes first.
        ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
    try:
        package = torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError) as error:
        raise UserError(f"package: {path} cannot be loaded: {one_line(error)}") from error

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        found = package(inputs=contiguous(inputs))
        return [found] if isinstance(found, Tensor) else list(found)

    return call
