"""AOTInductor: a `.pt2` package of compiled code, for Python and for C++ without Python.

A package holds the code for one kind of device, and needs nothing of this package where it runs. For an NVIDIA GPU it
has the Triton kernel of deformable attention in it, compiled, where `_launches` finds one for the case; all other
operators are PyTorch's. With `keep_operators` it calls this package's operators, which the process that loads it must
have registered by `import visionkernels`.
"""

from __future__ import annotations

import ctypes
import json
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
from visionkernels.export import _launches, _trace
from visionkernels.export.onnx import Exported

ALIGNMENT = 64  # bytes; so PyTorch's allocators begin a tensor
INPUTS = "visionkernels.inputs"  # under it a package's metadata describe its inputs; null is an open size


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
        keep_operators: call this package's operators in place of holding code for them, so that all of them run as they
            do in eager calls; whoever loads it must `import visionkernels` first. A C++ program cannot.

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
    traced = _trace.trace(model, inputs, dynamic, None if keep_operators else _launches.lowered())
    metadata = {INPUTS: json.dumps({name: _described(t, (dynamic or {}).get(name, {})) for name, t in inputs.items()})}
    try:
        with _quiet(), _pytorch_s_grid_sampler():
            torch._inductor.aoti_compile_and_package(
                traced.program,
                package_path=str(Path(path).absolute()),
                inductor_configs={"aot_inductor.metadata": metadata},
            )
    except Exception as error:
        raise UserError(f"model: AOTInductor cannot compile it: {one_line(error)}") from error
    device = next(iter(inputs.values())).device.type
    detail = f"{device} code, {_in_words(traced, keep_operators)}{_trace.limits(traced.program, dynamic)}"
    return Exported(
        Path(path), "aoti", len(traced.calls), _trace.shapes(inputs, dynamic), tuple(outputs or traced.outputs or ()),
        time.perf_counter() - start, detail,
    )  # fmt: skip


@contextmanager
def _quiet() -> Iterator[None]:
    """Without two warnings of PyTorch.

    The first, a page long, is that it cannot see which inputs a kernel writes: `_launches` says it. The second is that
    a package calls `grid_sampler_2d` through PyTorch's dispatcher.
    """

    def is_news(record: logging.LogRecord) -> bool:
        known = ("assuming every input is mutated", "grid_sampler_2d.default is missing a c-shim")
        return not any(text in record.getMessage() for text in known)

    loggers = [logging.getLogger(name) for name in ("torch._dynamo", "torch._inductor.ir")]
    for logger in loggers:
        logger.addFilter(is_news)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_news)


@contextmanager
def _pytorch_s_grid_sampler() -> Iterator[None]:
    """Without Inductor's form of it, which reads pixel by pixel: on a CPU PyTorch's own is ten times faster."""
    from torch._inductor.decomposition import decompositions, fast_random_decomps
    from torch._inductor.lowering import make_fallback

    operator = torch.ops.aten.grid_sampler_2d.default
    tables = (decompositions, fast_random_decomps())  # Inductor keeps a copy
    forms = [table.pop(operator, None) for table in tables]
    try:
        make_fallback(operator, warn=False)  # left to itself Inductor refuses to, where the variable CI is set
        yield
    finally:
        for table, form in zip(tables, forms, strict=True):
            if form is not None:
                table[operator] = form


def contiguous(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inputs as a package reads them: it does not look at strides, and may read 16 bytes at once."""
    found = {name: tensor.contiguous() for name, tensor in inputs.items()}
    return {name: tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor for name, tensor in found.items()}


def _described(tensor: Tensor, axes: Mapping[int, str]) -> dict[str, Any]:
    """What a package's metadata say of an input."""
    shape = [None if axis in axes else size for axis, size in enumerate(tensor.shape)]
    return {"dtype": str(tensor.dtype), "device": tensor.device.type, "shape": shape}


def _in_words(traced: _trace.Trace, keep_operators: bool) -> str:
    """What is in a package, and what it needs."""
    if keep_operators:
        return "import visionkernels before loading it"
    launches, layers = _launches.count(traced.program), sum("ms_deform_attn" in call for call in traced.calls)
    kernels = f"the Triton kernel in {launches} of {layers} layers, " if launches else ""
    return f"{kernels}needs nothing but PyTorch"


def load(path: str | Path, *, run_single_threaded: bool = False) -> Any:
    """A function from inputs to a list of outputs that runs a package in this process.

    Args:
        path: a file that `export` wrote.
        run_single_threaded: leave out what lets several threads call the function at a time, which a CUDA graph cannot
            capture.

    Returns:
        The function. It takes a tensor for each input, by name, of the shapes and dtypes that the package was made for
        and on its kind of device, and gives the outputs in their order.

    Raises:
        UserError: the file is no package of `export`, or not for this machine; and from the function: an input is
            missing, unknown, or of another dtype, device or shape.

    Source: `torch._inductor.aoti_load_package`.

    Example:
        >>> logits, boxes = load("detector.pt2")({"pixel_values": torch.rand(1, 3, 256, 256)})  # doctest: +SKIP
    """
    try:
        if sys.platform == "linux":
            # PyTorch's libraries export parts of an older C++ library, and a package that is bound to them crashes in
            # `std::regex`. Names are looked for first in what was loaded globally.
            ctypes.CDLL("libstdc++.so.6", mode=ctypes.RTLD_GLOBAL)
        package = torch._inductor.aoti_load_package(str(path), run_single_threaded=run_single_threaded)
    except (RuntimeError, OSError) as error:
        raise UserError(f"package: {path} cannot be loaded: {one_line(error)}") from error
    known = json.loads(package.get_metadata().get(INPUTS, "null"))
    if known is None:
        raise UserError(
            f"package: {path} was not written by visionkernels.export.aoti; "
            "load it by torch._inductor.aoti_load_package"
        )

    def call(inputs: Mapping[str, Tensor]) -> list[Tensor]:
        _check(inputs, known)
        found = package(inputs=contiguous({name: inputs[name] for name in known}))  # they are taken in this order
        return [found] if isinstance(found, Tensor) else list(found)

    return call


def _check(inputs: Mapping[str, Tensor], known: Mapping[str, Any]) -> None:
    """That these are the inputs of a package, which looks at none of it."""
    for name in (*known, *inputs):
        if name not in inputs or name not in known:
            fault = "is missing" if name in known else "is unknown"
            raise UserError(f"inputs: {name} {fault}; the package takes {', '.join(known)}")
        found, expected = _described(inputs[name], {}), known[name]
        for what in ("dtype", "device"):
            if found[what] != expected[what]:
                raise UserError(f"inputs: {name} must have the {what} {expected[what]}, and has {found[what]}")
        sizes = expected["shape"]
        if len(sizes) != len(found["shape"]) or any(
            size not in (None, there) for size, there in zip(sizes, found["shape"], strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in sizes)
            raise UserError(f"inputs: {name} must have the shape [{wanted}], and has {found['shape']}")
