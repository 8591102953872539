"""What a call must look like; every message names the argument, what was expected and what came.

Shapes, dtypes and devices are checked here, when a call is made or traced. Whether the levels add up to ``S`` needs
their values: it is checked in ``resolve_shapes``, which runs inside the operator, where they can be read for free.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from visionkernels.ops._common import check_dense, shown

PADDING_MODES = ("zeros", "border")
METHODS = ("bilinear", "nearest")
MAX_SIZE = 2**31 - 1  # of a level, in pixels a side
SpatialShapes = Tensor | Sequence[tuple[int, int]]


def check_value(value: Tensor) -> None:
    """``value``: floating ``[N, S, M, D]`` on a device that has an implementation."""
    if not isinstance(value, Tensor):
        raise TypeError(f"value must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point() or value.element_size() < 2:
        raise TypeError(f"value must be float64, float32, float16 or bfloat16, got {value.dtype}")
    check_dense("value", value)
    if value.dim() != 4:
        raise ValueError(f"value must be [N, S, M, D] (batch, pixels, heads, head_dim), got {list(value.shape)}")
    if value.device.type not in ("cuda", "cpu", "meta"):
        raise ValueError(f"value must be on a CUDA (or ROCm) device or on the CPU, got {value.device}")


def check_like(name: str, tensor: Tensor, expected: tuple[int, ...], axes: str, value: Tensor) -> None:
    """A floating tensor of exactly the shape ``expected`` on the value's device."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    check_dense(name, tensor)
    if tensor.device != value.device:
        raise ValueError(f"{name} must be on {value.device} like value, got {tensor.device}")
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name} must be {axes} = {list(expected)}, got {list(tensor.shape)}")


def check_mask(value_mask: Tensor, value: Tensor) -> None:
    """``value_mask``: bool ``[N, S]`` on the value's device."""
    if not isinstance(value_mask, Tensor) or value_mask.dtype != torch.bool:
        came = value_mask.dtype if isinstance(value_mask, Tensor) else type(value_mask).__name__
        raise TypeError(f"value_mask must be a bool tensor, True where a pixel counts, got {came}")
    check_dense("value_mask", value_mask)
    if value_mask.device != value.device:
        raise ValueError(f"value_mask must be on {value.device} like value, got {value_mask.device}")
    if tuple(value_mask.shape) != tuple(value.shape[:2]):
        raise ValueError(f"value_mask must be [N, S] = {list(value.shape[:2])}, got {list(value_mask.shape)}")


def check_options(padding_mode: str, align_corners: bool, method: str = "bilinear") -> None:
    """The three options that say how to sample."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {PADDING_MODES}, got {shown(padding_mode)}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {shown(method)}")
    if not isinstance(align_corners, bool):
        raise TypeError(f"align_corners must be True or False, got {shown(align_corners)}")
    if method == "nearest" and (align_corners or padding_mode != "zeros"):
        raise ValueError(
            "method='nearest' always clamps to the level and takes padding_mode='zeros' and align_corners=False, "
            f"got padding_mode={padding_mode!r}, align_corners={align_corners}"
        )


def check_shapes(spatial_shapes: SpatialShapes, value: Tensor) -> tuple[int, Tensor | None, list[int] | None]:
    """Bring the two forms of ``spatial_shapes`` to one.

    Returns:
        The number of levels, and either the tensor ``[L, 2]`` or the sizes h0, w0, h1, w1, ... of a sequence.
    """
    if isinstance(spatial_shapes, Tensor):
        if spatial_shapes.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"spatial_shapes must be an int64 or int32 tensor, got {spatial_shapes.dtype}")
        check_dense("spatial_shapes", spatial_shapes)
        if spatial_shapes.dim() != 2 or spatial_shapes.shape[1] != 2:
            raise ValueError(f"spatial_shapes must be [L, 2] with (h, w) rows, got {list(spatial_shapes.shape)}")
        if spatial_shapes.device.type not in ("cpu", "cuda") and spatial_shapes.device != value.device:
            raise ValueError(f"spatial_shapes must be on the CPU or on {value.device}, got {spatial_shapes.device}")
        if spatial_shapes.device != value.device and spatial_shapes.is_cuda and value.is_cuda:
            spatial_shapes = spatial_shapes.to(value.device)
        return spatial_shapes.shape[0], spatial_shapes, None
    sizes: list[int] = []
    try:
        for height, width in spatial_shapes:
            sizes += (height, width)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"spatial_shapes must be a tensor [L, 2] or a list of (h, w) pairs, got {shown(spatial_shapes)}"
        ) from error
    if not all(isinstance(size, (int, torch.SymInt)) for size in sizes):
        raise TypeError(f"spatial_shapes must hold integers, got {shown(spatial_shapes)}")
    if any(isinstance(size, int) and abs(size) > MAX_SIZE for size in sizes):
        raise ValueError(f"spatial_shapes must hold sizes of at most {MAX_SIZE}, got {shown(spatial_shapes)}")
    return len(sizes) // 2, None, sizes


def check_num_points(name: str, points: Tensor, num_levels: int, num_points: Sequence[int] | None) -> list[int]:
    """The points of each level: from the shape ``[..., L, P, 2]``, or as given for packed ``[..., K, 2]``.

    ``name`` is the argument that ``points`` came as.
    """
    if not isinstance(points, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(points).__name__}")
    check_dense(name, points)
    if num_points is not None and not (
        isinstance(num_points, (list, tuple)) and all(isinstance(n, (int, torch.SymInt)) for n in num_points)
    ):
        raise TypeError(f"num_points must be a list with the points of each level, got {shown(num_points)}")
    if points.dim() == 6:
        if points.shape[3] != num_levels:
            raise ValueError(
                f"{name} must be [N, Lq, M, L, P, 2] with L = {num_levels} levels as in spatial_shapes, "
                f"got {list(points.shape)}"
            )
        found = [points.shape[4]] * num_levels
        if num_points is not None and list(num_points) != found:
            raise ValueError(f"num_points must be {found} or None for {name} {list(points.shape)}, got {num_points}")
        return found
    if points.dim() != 5:
        raise ValueError(
            f"{name} must be [N, Lq, M, L, P, 2], or packed [N, Lq, M, sum(num_points), 2], got {list(points.shape)}"
        )
    if num_points is None:
        raise ValueError(f"num_points must list the points of each level when {name} is packed, got None")
    if len(num_points) != num_levels or sum(num_points) != points.shape[3] or any(n < 0 for n in num_points):
        raise ValueError(
            f"num_points must be {num_levels} numbers, one a level, that add up to the {points.shape[3]} points of "
            f"{name}, got {list(num_points)}"
        )
    return list(num_points)


def resolve_shapes(
    spatial_shapes: Tensor | None, level_sizes: Sequence[int] | None, value: Tensor
) -> tuple[Tensor | None, tuple[int, ...]]:
    """Read the level sizes where that costs no synchronisation, and check that they add up to ``S``.

    Returns:
        The tensor in device memory and no sizes; or no tensor and h0, w0, h1, w1, ...
    """
    if spatial_shapes is not None:
        if spatial_shapes.is_cuda and value.is_cuda:
            return spatial_shapes.contiguous(), ()
        level_sizes = spatial_shapes.flatten().tolist()
    sizes = tuple(level_sizes or ())
    total = sum(h * w for h, w in zip(sizes[::2], sizes[1::2], strict=True))
    if total != value.shape[1] or any(size < 0 for size in sizes):
        shapes = list(zip(sizes[::2], sizes[1::2], strict=True))
        raise ValueError(
            f"spatial_shapes must be sizes (h, w) with sum(h * w) = S = {value.shape[1]} pixels of value, "
            f"got {shapes}, which make {total}"
        )
    return None, sizes


def check_level_start(level_start_index: Tensor | Sequence[int] | None, sizes: Sequence[int]) -> None:
    """``level_start_index`` is derivable, so it must say what the sizes say, where it can be read."""
    if level_start_index is None:
        return
    if isinstance(level_start_index, Tensor):
        if level_start_index.device.type != "cpu":
            return
        if level_start_index.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"level_start_index must be an int64 or int32 tensor, got {level_start_index.dtype}")
        check_dense("level_start_index", level_start_index)
        level_start_index = level_start_index.flatten().tolist()
    if not isinstance(level_start_index, (list, tuple)):
        raise TypeError(f"level_start_index must be a tensor [L], a list or None, got {shown(level_start_index)}")
    starts = [0]
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        starts.append(starts[-1] + height * width)
    if list(level_start_index) != starts[:-1]:
        raise ValueError(
            f"level_start_index must be the first pixel of each level, {starts[:-1]} for these spatial_shapes, "
            f"got {list(level_start_index)}; pass None to have it derived"
        )
