"""Registers, stack and instructions of the operator's kernels, compiled ahead of time for an H200's architecture.

    python scripts/kernel_budget.py            prints them beside the committed table
    python scripts/kernel_budget.py --update   writes the table; say in a row's note why it moved

A test compares them, so that a change which makes a kernel longer is seen where there is no GPU. What a kernel is
compiled with is recorded from the launchers: the call of an encoder with four levels, eight heads of 32 channels, four
points and float32 coordinates.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from visionkernels.ops.deformable_attention import (
    binned,
    binned_kernels,
    binned_samples,
    kernels,
    launch,
    plan,
    warp_backward,
    warp_forward,
)
from visionkernels.ops.deformable_attention.problem import Problem

TABLE = Path(__file__).parents[1] / "benchmarks" / "kernel_budget.json"
MODULES = (kernels, warp_forward, warp_backward, binned_samples, binned_kernels)
SHAPES = ((12, 16), (6, 8), (3, 4), (2, 2))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
         torch.int64: "i64", torch.int32: "i32", torch.uint8: "u8"}  # fmt: skip
H200 = GPUTarget("cuda", 90, 32)


class Recorder:
    """Stands in for a kernel and notes what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple[Any, ...], dict[str, int]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Any:
        return lambda *arguments, **options: self.launches.append((self.kernel, arguments, options))


@contextmanager
def recording(warps: bool = True) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, int]]]]:
    """The launches that are made inside, on CPU tensors; of the kernels for NVIDIA GPUs, or of those for any."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, int]]] = []
    kept = [(module, name, value) for module in MODULES for name, value in vars(module).items()]
    patches = [(m, name, Recorder(value, launches)) for m, name, value in kept if name.endswith("_kernel")]
    patches += [(module, "has_warp_instructions", lambda device: warps) for module in (plan, launch)]
    patches += [(plan, "_plan", plan._plan.__wrapped__)]
    originals = [(module, name, getattr(module, name)) for module, name, _ in patches]
    for module, name, value in patches:
        setattr(module, name, value)
    try:
        yield launches
    finally:
        for module, name, value in originals:
            setattr(module, name, value)


def problem_of(
    dtype: torch.dtype,
    fused: bool = False,
    head_dim: int = 32,
    tensor_shapes: bool = False,
    queries: int | None = None,
    batch: int = 2,
    heads: int = 8,
) -> Problem:
    """An encoder's call, where nothing else is said; fused with a mask and a reference point for each level."""
    pixels = sum(h * w for h, w in SHAPES)
    queries = queries or pixels
    references = torch.rand(batch, queries, 4, 2) if fused else None
    mask = torch.ones(batch, pixels, dtype=torch.bool) if fused else None
    sizes = () if tensor_shapes else tuple(size for shape in SHAPES for size in shape)
    shapes = torch.tensor(SHAPES) if tensor_shapes else None
    value = torch.zeros(batch, pixels, heads, head_dim, dtype=dtype)
    points, weights = torch.zeros(batch, queries, heads, 4, 4, 2), torch.zeros(batch, queries, heads, 4, 4)
    return Problem(value, shapes, sizes, points, weights, references, mask, (4,) * 4)


def launches_of(problem: Problem, way: str, warps: bool = True) -> list[tuple[Any, tuple[Any, ...], dict[str, int]]]:
    """What one way of the operator launches: forward, backward, points, value, binned or deterministic."""
    fused = problem.reference_points is not None
    batch, queries = problem.points.shape[:2]
    output = torch.zeros(batch, queries, problem.value.shape[2] * problem.value.shape[3], dtype=problem.value.dtype)
    with recording(warps) as launches:
        if way == "forward":
            launch.forward(problem)
        elif way in ("binned", "deterministic"):
            binned.grad_value(problem, output, way == "deterministic")
        else:
            needs = (way in ("backward", "value"), way in ("backward", "points"), way != "value" and fused)
            launch.backward(problem, output, *needs)
    return launches


def specialise(recorded: tuple[Any, tuple[Any, ...], dict[str, int]]) -> tuple[dict[str, Any], ...]:
    """What Triton compiles a kernel for: types of its arguments, what is constant, what is a multiple of 16."""
    kernel, arguments, _ = recorded
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[Any, Any] = {}
    for index, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or argument is None or (specialised and type(argument) is int and argument == 1):
            signature[parameter.name], constants[parameter.name] = "constexpr", argument
            continue
        if isinstance(argument, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[argument.dtype]
            multiple = argument.data_ptr() % 16 == 0
        elif isinstance(argument, TensorDescriptor):  # of TMA
            kind = f"{TYPES[argument.base.dtype]}{list(argument.block_shape)}"
            signature[parameter.name], multiple = f"tensordesc<{kind}>", False
        elif isinstance(argument, float):
            signature[parameter.name], multiple = "fp32", False
        elif isinstance(argument, tuple):
            signature[parameter.name], multiple = ("i32",) * len(argument), False
        else:
            signature[parameter.name], multiple = "i32", argument % 16 == 0
        if specialised and multiple:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def compile_launch(recorded: tuple[Any, tuple[Any, ...], dict[str, int]], target: GPUTarget = H200) -> Any:
    """The kernel as Triton compiles it for these arguments."""
    kernel, _, options = recorded
    signature, constants, attributes = specialise(recorded)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def measure(compiled: Any) -> dict[str, int]:
    """Registers and bytes of stack of a thread, and instructions; of AMD's the stack alone."""
    if "amdgcn" in compiled.asm:
        return {"stack": int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])[1])}  # type: ignore[index]
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        texts = [
            subprocess.run([tool, option, cubin.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        ]
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", texts[0]).groups()  # type: ignore[union-attr]
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", texts[1], re.MULTILINE))
    return {"registers": int(registers), "stack": int(stack), "instructions": instructions}


def rows(*dtypes: str) -> Iterator[tuple[str, tuple[Any, tuple[Any, ...], dict[str, int]]]]:
    """Every row's name, and the launch that it is of; of all dtypes, or of these."""
    for dtype_name in dtypes or DTYPES:
        for fused in (False, True):
            problem = problem_of(DTYPES[dtype_name], fused)
            for way in ("forward", "points", "value", "binned"):
                for recorded in launches_of(problem, way):
                    name = recorded[0].__name__.strip("_").removesuffix("_kernel")
                    yield f"{name} {dtype_name} {'fused' if fused else 'plain'}", recorded


def main() -> int:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help=f"write {TABLE.name}")
    update = parser.parse_args().update
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": None, "rows": {}}
    measured = {name: measure(compile_launch(recorded)) for name, recorded in rows()}
    for name, now in measured.items():
        before = table["rows"].get(name, {})
        told = ", ".join(f"{key} {value} ({before.get(key, '-')})" for key, value in now.items())
        print(f"{name:30} {told}")
    if update:
        notes = {name: row.get("note", "") for name, row in table["rows"].items()}
        lines = {name: {**now, "note": notes.get(name, "")} for name, now in measured.items()}
        text = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in lines.items())
        TABLE.write_text(f'{{\n  "triton": "{triton.__version__}",\n  "rows": {{\n{text}\n  }}\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
