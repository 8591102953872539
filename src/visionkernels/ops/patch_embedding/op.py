"""The patch embedding as a registered operator, and the public function that checks a call and makes it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from visionkernels.ops import _inference
from visionkernels.ops._common import check_dense, shown
from visionkernels.ops.patch_embedding import cpu


def _forward_fake(
    pixel_values: Tensor, weight: Tensor, bias: Tensor | None, position_embedding: Tensor | None,
    prefix_tokens: Tensor | None, mean: Sequence[float] | None, std: Sequence[float] | None, channels_last: bool,
    backend: str,
) -> Tensor:  # fmt: skip
    height, width = pixel_values.shape[1:3] if channels_last else pixel_values.shape[2:]
    size = weight.shape[2]
    prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    tokens = prefix + (height // size) * (width // size)
    return weight.new_empty(pixel_values.shape[0], tokens, weight.shape[0])


FORWARD = _inference.register(
    "patch_embedding(Tensor pixel_values, Tensor weight, Tensor? bias, Tensor? position_embedding, "
    "Tensor? prefix_tokens, float[]? mean, float[]? std, bool channels_last, str backend) -> Tensor",
    module="patch_embedding",
    pytorch=cpu.forward,
    fake=_forward_fake,
)


def patch_embedding(
    pixel_values: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    position_embedding: Tensor | None = None,
    prefix_tokens: Tensor | None = None,
    mean: Sequence[float] | Tensor | None = None,
    std: Sequence[float] | Tensor | None = None,
    channels_last: bool = False,
    backend: str = "auto",
) -> Tensor:
    """An image's patches as tokens: normalisation, projection, position and prefix tokens in one kernel.

    Inference only. CUDA tensors run a Triton kernel that gathers the patches from the image as it multiplies, or
    PyTorch's convolution where that measures faster; CPU tensors run PyTorch's. Sums are float32, float64 for float64;
    normalised pixels are rounded to the dtype of ``weight``.

    Args:
        pixel_values: ``[B, 3, H, W]``, or ``[B, H, W, 3]`` with ``channels_last``; floating, or uint8 from 0 to 255.
            H and W are multiples of the patch size p. Any strides but that of the last axis, which is contiguous.
        weight: ``[C, 3, p, p]``, float64, float32, float16 or bfloat16: a convolution's.
        bias: ``[C]``, or None.
        position_embedding: ``[P, C]``, added to the P = (H / p) * (W / p) patches, which are in raster order.
        prefix_tokens: ``[T, C]``, written before the patches of each image, their position already added.
        mean: three numbers, one a channel (or a CPU tensor ``[3]``), subtracted from the pixels; from uint8 pixels
            after they are divided by 255.
        std: three positive numbers, what the pixels are divided by after that.
        channels_last: whether the channels are the last axis of ``pixel_values``.
        backend: ``"auto"``, ``"triton"`` or ``"pytorch"``. The Triton kernel takes a weight of float32, float16 or
            bfloat16; for float64 ``"auto"`` is ``"pytorch"``.

    Returns:
        ``[B, T + P, C]``, contiguous, in the dtype of ``weight``.

    Raises:
        TypeError: an argument is of another type or dtype than it must be.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: gradients are asked for, or Triton is and is not installed.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (https://arxiv.org/abs/2010.11929), equation 1.

    Example:
        >>> image = torch.full((1, 3, 32, 48), 255, dtype=torch.uint8)
        >>> weight = torch.full((8, 3, 16, 16), 1 / 768)
        >>> tokens = patch_embedding(image, weight, prefix_tokens=torch.zeros(1, 8), mean=[0.5] * 3, std=[0.5] * 3)
        >>> tokens.shape, tokens[0, :2, 0].round()
        (torch.Size([1, 7, 8]), tensor([0., 1.]))
    """
    num_patches = _check_images(pixel_values, weight, channels_last)
    _inference.check_backend(backend, weight)
    channels = weight.shape[0]
    _check_table("bias", bias, "[C]", (channels,), weight)
    _check_table("position_embedding", position_embedding, "[P, C]", (num_patches, channels), weight)
    _check_table("prefix_tokens", prefix_tokens, "[T, C]", (None, channels), weight)
    mean, std = _numbers("mean", mean), _numbers("std", std)
    if std is not None and min(std) <= 0:
        raise ValueError(f"std must be positive, got {std}")
    _inference.refuse_gradients(
        "patch_embedding", pixel_values, weight, bias, position_embedding, prefix_tokens,
        instead="torch.nn.functional.conv2d",
    )  # fmt: skip
    weight, bias = _inference.cast(_inference.autocast_dtype(weight), weight, bias)
    return FORWARD(pixel_values, weight, bias, position_embedding, prefix_tokens, mean, std, channels_last, backend)


def _check_table(name: str, table: Tensor | None, axes: str, shape: tuple[int | None, ...], weight: Tensor) -> None:
    """A tensor of this shape (None: any size) on the weight's device, of any floating dtype."""
    if table is None:
        return
    _inference.check_tensor(name, table, axes, len(shape))
    if table.device != weight.device:
        raise ValueError(f"{name} must be on {weight.device} like weight, got {table.device}")
    if not all(wanted in (None, size) for size, wanted in zip(table.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {axes} = [{wanted}], got {list(table.shape)}")


def _check_images(pixel_values: Tensor, weight: Tensor, channels_last: bool) -> int:
    """Images and weight fit together. Returns the number of patches."""
    if not isinstance(channels_last, bool):
        raise TypeError(f"channels_last must be True or False, got {type(channels_last).__name__}")
    _inference.check_tensor("weight", weight, "[C, 3, p, p]", 4)
    if weight.shape[1] != 3 or weight.shape[2] != weight.shape[3] or 0 in weight.shape:
        raise ValueError(f"weight must be [C, 3, p, p] with square patches, got {list(weight.shape)}")
    axes = "[B, H, W, 3]" if channels_last else "[B, 3, H, W]"
    if isinstance(pixel_values, Tensor) and pixel_values.dtype == torch.uint8:
        check_dense("pixel_values", pixel_values)
    elif isinstance(pixel_values, Tensor) and not pixel_values.is_floating_point():
        raise TypeError(f"pixel_values must be floating or uint8, got {pixel_values.dtype}")
    else:
        _inference.check_tensor("pixel_values", pixel_values, axes)
    if pixel_values.device != weight.device:
        raise ValueError(f"pixel_values must be on {weight.device} like weight, got {pixel_values.device}")
    if pixel_values.dim() != 4 or pixel_values.shape[3 if channels_last else 1] != 3:
        raise ValueError(f"pixel_values must be {axes} of three channels, got {list(pixel_values.shape)}")
    height, width = pixel_values.shape[1:3] if channels_last else pixel_values.shape[2:]
    size = weight.shape[2]
    if height % size or width % size:
        raise ValueError(
            f"pixel_values must have a height and a width divisible by the patch size {size}, got {height} x {width}; "
            "resize or pad the images"
        )
    return (height // size) * (width // size)


def _numbers(name: str, numbers: Sequence[float] | Tensor | None) -> list[float] | None:
    """Three finite numbers, on the host: to read them from a device would stall it at every call."""
    if numbers is None:
        return None
    if isinstance(numbers, Tensor):
        if numbers.device.type != "cpu":
            raise ValueError(
                f"{name} must be three numbers or a CPU tensor, got one on {numbers.device}; use .tolist()"
            )
        numbers = numbers.tolist()
    if not isinstance(numbers, (list, tuple)) or not all(
        isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers
    ):
        raise TypeError(f"{name} must be three numbers or None, got {shown(numbers)}")
    if len(numbers) != 3 or not all(-math.inf < number < math.inf for number in numbers):
        raise ValueError(f"{name} must be three finite numbers, one a channel, got {list(numbers)}")
    return [float(number) for number in numbers]
