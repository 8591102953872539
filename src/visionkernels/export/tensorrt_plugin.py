"""This package's own kernel as a TensorRT plugin: coordinates in float32 also where the value is float16.

A plugin of TensorRT's Python API (`tensorrt.plugin`, 10.6 and later). TensorRT gets the Triton kernel as PTX, compiled
ahead of time, so that an engine runs without Python. Inputs: value `[N, S, M, D]`, spatial_shapes `[L, 2]` int32,
sampling_locations `[N, Lq, M, K, 2]` float32, attention_weights `[N, Lq, M, K]` in the dtype of the value; attribute
`num_points`, the points of each level, K in sum. Output `[N, Lq, M, D]`.

Source: the documentation of `tensorrt.plugin`: `register`, `autotune`, `aot_impl`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

from visionkernels.errors import UserError

PLUGIN_ID = "visionkernels::ms_deform_attn"
# value, spatial_shapes, locations, weights; output. One dtype for value, weights and output, float32 coordinates.
FORMATS = ("FP32, INT32, FP32, FP32, FP32", "FP16, INT32, FP32, FP16, FP16")
NUM_PARAMETERS = 8  # four inputs, three sizes, one output


class Kernel(NamedTuple):
    """A compiled kernel, as `aot_impl` returns it, and the cut of its grid."""

    name: str
    ptx: str
    num_warps: int
    shared: int
    queries: int  # of a program
    heads: int


def register() -> None:
    """Make the plugin known to TensorRT in this process: before an ONNX file that names it is parsed.

    Raises:
        UserError: `tensorrt.plugin` is not there.
    """
    try:
        import tensorrt.plugin as trtp
    except ImportError as error:
        raise UserError(
            "tensorrt.plugin is not installed here: it comes with TensorRT 10.6 and later, `pip install tensorrt`"
        ) from error
    import numpy as np
    import numpy.typing as npt

    def describe(
        value: Any, spatial_shapes: Any, sampling_locations: Any, attention_weights: Any, num_points: Any
    ) -> Any:
        return trtp.from_shape_expr(output_shape(value.shape_expr, sampling_locations.shape_expr), dtype=value.dtype)

    def autotune(
        value: Any, spatial_shapes: Any, sampling_locations: Any, attention_weights: Any, num_points: Any, outputs: Any
    ) -> list[Any]:
        return [trtp.AutoTuneCombination(formats, "LINEAR") for formats in FORMATS]

    def implement(
        value: Any, spatial_shapes: Any, sampling_locations: Any, attention_weights: Any, num_points: Any,
        outputs: Any, tactic: Any,
    ) -> tuple[str, str, Any, Any]:  # fmt: skip
        half = "HALF" in str(value.dtype)
        kernel = compile_kernel(int(value.shape[2]), int(value.shape[3]), tuple(map(int, num_points)), half, _arch())
        batch, pixels, heads = value.shape_expr[0], value.shape_expr[1], int(value.shape[2])
        queries = sampling_locations.shape_expr[1]
        launch = trtp.KernelLaunchParams()
        launch.grid_x = batch * trtp.cdiv(queries, kernel.queries)
        launch.grid_y = heads // kernel.heads
        launch.block_x = 32 * kernel.num_warps
        launch.shared_mem = kernel.shared
        sizes = trtp.SymIntExprs(3)
        for index, size in enumerate((batch, pixels, queries)):
            sizes[index] = trtp.SymInt32(size)
        return kernel.name, kernel.ptx, launch, sizes

    tensor = trtp.TensorDesc
    # TensorRT reads these; as text, which this file's annotations are, it would not.
    describe.__annotations__ = {
        "value": tensor, "spatial_shapes": tensor, "sampling_locations": tensor, "attention_weights": tensor,
        "num_points": npt.NDArray[np.int32], "return": tensor,
    }  # fmt: skip
    autotune.__annotations__ = {}
    implement.__annotations__ = {}
    trtp.register(PLUGIN_ID)(describe)
    trtp.autotune(PLUGIN_ID)(autotune)
    trtp.aot_impl(PLUGIN_ID)(implement)


def output_shape(value: Sequence[Any], locations: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """`[N, Lq, M, D]` of the shapes of value and locations, numbers or TensorRT's expressions."""
    return value[0], locations[1], value[2], value[3]


@cache
def compile_kernel(num_heads: int, head_dim: int, num_points: tuple[int, ...], half: bool, arch: int) -> Kernel:
    """Compile the kernel for a GPU that need not be here.

    Args:
        num_heads: M.
        head_dim: D.
        num_points: of each level.
        half: the value is float16, else float32.
        arch: the compute capability without its point, 90 for an H200.

    Returns:
        The kernel; its parameters are those that TensorRT passes.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from visionkernels.export._triton_plugin import ms_deform_attn_kernel
    from visionkernels.ops.deformable_attention.tile import LANE_BYTES, choose_tile

    itemsize, dtype = (2, "*fp16") if half else (4, "*fp32")
    tile = choose_tile(head_dim, num_heads, itemsize, False)
    alignment = LANE_BYTES // itemsize
    while head_dim % alignment:
        alignment //= 2
    constants = {
        "NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "NUM_LEVELS": len(num_points), "NUM_SAMPLES": sum(num_points),
        "NUM_POINTS": num_points, "FIRST_POINT": tuple(accumulate(num_points, initial=0))[:-1], "ROWS": tile.rows,
        "HEADS": tile.heads, "BLOCK_D": tile.block_d, "UNROLL": tile.unroll, "ALIGNMENT": alignment,
    }  # fmt: skip
    pointers = {"value_ptr": dtype, "shapes_ptr": "*i32", "point_ptr": "*fp32", "weight_ptr": dtype}
    sizes = dict.fromkeys(("num_images", "num_pixels", "num_queries"), "i32")
    signature = pointers | sizes | {"output_ptr": dtype} | dict.fromkeys(constants, "constexpr")
    aligned = {(index,): [["tt.divisibility", 16]] for index in (0, 1, 2, 3, 7)}  # TensorRT's buffers are
    source = ASTSource(ms_deform_attn_kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": tile.num_warps})
    metadata = compiled.metadata
    ptx = keep_parameters(compiled.asm["ptx"], metadata.name, NUM_PARAMETERS)
    return Kernel(metadata.name, ptx, tile.num_warps, metadata.shared, tile.rows // tile.heads, tile.heads)


def keep_parameters(ptx: str, name: str, count: int) -> str:
    """The PTX without the parameters that Triton adds after the kernel's own; TensorRT does not pass them.

    Raises:
        RuntimeError: the kernel uses one of them.
    """
    found = re.search(rf"\.entry {name}\((.*?)\n\)", ptx, re.DOTALL)
    if found is None:
        raise RuntimeError(f"the PTX holds no entry {name}")
    parameters = found.group(1).strip().split(",\n")
    for parameter in parameters[count:]:
        added = parameter.split()[-1]
        if len(re.findall(rf"\b{added}\b", ptx)) > 1:
            raise RuntimeError(f"the kernel {name} uses {added}, which Triton adds and TensorRT does not pass")
    kept = ",\n".join(parameters[:count])
    return ptx[: found.start(1)] + "\n\t" + kept.strip() + ptx[found.end(1) :]


def _arch() -> int:
    import torch

    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor
