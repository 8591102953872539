"""Engines of TensorRT: built from an ONNX graph, loaded and run on PyTorch's stream.

Written against TensorRT's documented Python API, 10.11 and later, and not run here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from visionkernels._checkpoint import one_line
from visionkernels.errors import UserError

Shape = Sequence[int]


def build(
    onnx_path: str | Path,
    engine_path: str | Path,
    *,
    profile: Mapping[str, tuple[Shape, Shape, Shape]] | None = None,
    timing_cache: str | Path | None = None,
    workspace_bytes: int | None = None,
) -> Path:
    """Build an engine for the GPU of this machine.

    Layers take the dtypes of the graph (a strongly typed network): for float16, export a float16 model.

    Args:
        onnx_path: a file that `export` wrote, or one of standard operators.
        engine_path: the engine to write.
        profile: of each input with open sizes, the smallest, the usual and the largest shape.
        timing_cache: a file that keeps what was measured for the next build; made if it is not there.
        workspace_bytes: the most memory that a layer may use beside its tensors.

    Returns:
        `engine_path`.

    Raises:
        UserError: TensorRT is missing or too old, or cannot parse or build the graph; with its first message.

    Source: TensorRT's Python API, `IBuilder`, `OnnxParser`, `IOptimizationProfile`, `ITimingCache`.

    Example:
        >>> shapes = [(1, 3, 256, 256), (1, 3, 256, 256), (8, 3, 256, 256)]
        >>> build("detector.onnx", "detector.engine", profile={"pixel_values": shapes})  # doctest: +SKIP
    """
    trt = _tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx_path)):
        cause = parser.get_error(0).desc() if parser.num_errors else "no message"
        raise UserError(f"onnx_path: TensorRT {trt.__version__} cannot parse {onnx_path}: {cause}")
    config = builder.create_builder_config()
    if workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    _add_profile(builder, config, network, profile or {})
    cache = _open_cache(config, timing_cache)
    serialized = builder.build_serialized_network(network, config)
    if serialized is None:
        raise UserError(
            f"onnx_path: TensorRT {trt.__version__} cannot build an engine of {onnx_path}; its log says why"
        )
    Path(engine_path).write_bytes(bytes(serialized))
    if cache is not None and timing_cache is not None:
        Path(timing_cache).write_bytes(bytes(cache.serialize()))
    return Path(engine_path)


def load(engine_path: str | Path) -> Engine:
    """Load an engine on the current GPU.

    Args:
        engine_path: a file that `build` wrote.

    Returns:
        The engine, to be called with the inputs, as `run` does.

    Raises:
        UserError: TensorRT is missing, or the engine is of another version or GPU.

    Source: TensorRT's Python API, `IRuntime`.

    Example:
        >>> engine = load("detector.engine")  # doctest: +SKIP
    """
    trt = _tensorrt()
    logger = trt.Logger(trt.Logger.WARNING)
    trt.init_libnvinfer_plugins(logger, "")
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(engine_path).read_bytes())
    if engine is None:
        raise UserError(
            f"engine_path: TensorRT {trt.__version__} cannot load {engine_path}; build it again on this machine"
        )
    return Engine(trt, engine)


def run(engine: Engine | str | Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Run an engine once, on PyTorch's current stream.

    Args:
        engine: of `load`, or a file of `build`.
        inputs: a CUDA tensor for each input.

    Returns:
        The outputs by name, on the same device; no copy and no synchronisation is made.

    Raises:
        UserError: an input is missing, or has a dtype, device or shape that the engine does not take.

    Source: TensorRT's Python API, `IExecutionContext`.

    Example:
        >>> run("detector.engine", {"pixel_values": torch.rand(1, 3, 256, 256).cuda()})["logits"]  # doctest: +SKIP
    """
    return (engine if isinstance(engine, Engine) else load(engine))(inputs)


class Engine:
    """A loaded engine with one execution context; calling it runs it. Not for several threads at a time.

    Args:
        trt: the module `tensorrt`.
        engine: an `ICudaEngine`.
    """

    def __init__(self, trt: ModuleType, engine: Any) -> None:
        self._engine = engine
        self._context = engine.create_execution_context()
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        is_input = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(name for name in names if is_input[name])
        self.outputs = tuple(name for name in names if not is_input[name])
        known = {"FLOAT": torch.float32, "HALF": torch.float16, "INT32": torch.int32, "INT64": torch.int64,
                 "BOOL": torch.bool, "BF16": torch.bfloat16}  # fmt: skip
        self._dtypes = {name: known[engine.get_tensor_dtype(name).name] for name in names}

    def __call__(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run once; see `run`."""
        held = {}  # until the launch is queued on the stream that also frees them
        for name in self.inputs:
            if name not in inputs:
                raise UserError(f"inputs: {name} is missing; the engine takes {', '.join(self.inputs)}")
            held[name] = self._checked(name, inputs[name])
            if not self._context.set_input_shape(name, tuple(held[name].shape)):
                raise UserError(f"inputs: {name} of shape {list(held[name].shape)} is outside the engine's profile")
            self._context.set_tensor_address(name, held[name].data_ptr())
        device = next(iter(held.values())).device
        found = {}
        for name in self.outputs:
            shape = tuple(self._context.get_tensor_shape(name))
            found[name] = torch.empty(shape, dtype=self._dtypes[name], device=device)
            self._context.set_tensor_address(name, found[name].data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(device).cuda_stream):
            raise RuntimeError("TensorRT could not launch the engine; its log says why")
        return found

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_cuda:
            raise UserError(f"inputs: {name} must be on a GPU, and it is on {tensor.device}")
        if tensor.dtype != self._dtypes[name]:
            raise UserError(f"inputs: {name} must be {self._dtypes[name]}, and it is {tensor.dtype}")
        return tensor.contiguous()


def _tensorrt() -> ModuleType:
    try:
        import tensorrt
    except ImportError as error:
        raise UserError(
            "TensorRT is not installed here: `pip install tensorrt` on a machine with an NVIDIA GPU brings it; "
            f"the ONNX file can be written without it ({one_line(error)})"
        ) from error
    missing = [name for name in ("Builder", "OnnxParser", "Runtime") if not hasattr(tensorrt, name)]
    if missing:
        raise UserError(
            f"TensorRT {tensorrt.__version__} has no {', '.join(missing)}: install the full package `tensorrt`"
        )
    if int(tensorrt.__version__.split(".")[0]) < 10:
        raise UserError(f"TensorRT {tensorrt.__version__} is too old: install 10.11 or later")
    return tensorrt


def _network_flags(trt: ModuleType) -> int:
    """Strongly typed, so that dtypes are those of the graph; later versions know nothing else and have no flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _add_profile(builder: Any, config: Any, network: Any, shapes: Mapping[str, tuple[Shape, Shape, Shape]]) -> None:
    inputs = {network.get_input(i).name: tuple(network.get_input(i).shape) for i in range(network.num_inputs)}
    unknown = sorted(set(shapes) - set(inputs))
    if unknown:
        raise UserError(f"profile: the graph has no input {unknown[0]!r}; its inputs are {', '.join(inputs)}")
    profile = builder.create_optimization_profile()
    opened = False
    for name, declared in inputs.items():
        if -1 not in declared:
            continue
        if name not in shapes:
            raise UserError(
                f"profile: {name} has open sizes {list(declared)}; give its (smallest, usual, largest) shape"
            )
        profile.set_shape(name, *(tuple(shape) for shape in shapes[name]))
        opened = True
    if opened:
        config.add_optimization_profile(profile)


def _open_cache(config: Any, path: str | Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(Path(path).read_bytes() if Path(path).exists() else b"")
    config.set_timing_cache(cache, False)
    return cache
