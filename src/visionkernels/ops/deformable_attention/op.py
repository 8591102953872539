"""The public functions of multi-scale deformable attention: they check a call and make it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from visionkernels.ops._common import check_dense
from visionkernels.ops.deformable_attention import checks, fast_path, registration


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: checks.SpatialShapes,
    level_start_index: Tensor | Sequence[int] | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int | None = None,
    *,
    padding_mode: str = "zeros",
    align_corners: bool = False,
    num_points: Sequence[int] | None = None,
    method: str = "bilinear",
) -> Tensor:
    """Multi-scale deformable attention: weighted samples of a feature pyramid at given locations.

    The first six arguments are those of ``MSDeformAttnFunction.apply`` of Deformable-DETR. CUDA tensors run a Triton
    kernel, CPU tensors the CPU path; both have gradients for ``value``, ``sampling_locations`` and
    ``attention_weights``. Coordinates and sums are float32, or float64 where an input is float64, whatever the dtype
    of ``value``; under ``torch.autocast`` only ``value`` is cast.

    Args:
        value: ``[N, S, M, D]`` (batch, pixels, heads, head_dim), float64, float32, float16 or bfloat16: the flattened
            feature pyramid, levels one after another, each row-major.
        spatial_shapes: (h, w) of each level: an int64 or int32 tensor ``[L, 2]`` on any device, or a list of pairs.
            ``S = sum(h * w)``. On a CUDA device the tensor is never read by the host: where it does not add up to
            ``S`` the output is NaN instead of an error, and the gradients are 0.
        level_start_index: first pixel of each level, or None. It follows from ``spatial_shapes``: checked where it is
            on the CPU, not read otherwise.
        sampling_locations: ``[N, Lq, M, L, P, 2]``, or packed ``[N, Lq, M, sum(num_points), 2]``; (x, y), 0 to 1
            across a level. Any float is legal: outside, padding applies; a location that is NaN or infinite, or so
            large that its pixel coordinate is, adds exactly 0 to the output and to every gradient.
        attention_weights: ``[N, Lq, M, L, P]``, or packed ``[N, Lq, M, sum(num_points)]``; softmax is already applied.
        im2col_step: accepted for compatibility; any batch size works.
        padding_mode: ``"zeros"`` or ``"border"``, as in ``torch.nn.functional.grid_sample``.
        align_corners: as in ``grid_sample``.
        num_points: points of each level, for packed locations (D-FINE's ``[3, 6, 3]``).
        method: ``"bilinear"``, or ``"nearest"``: RT-DETRv2's "discrete", index = trunc(location * size + 0.5) clamped
            to the level, with no gradient to the locations.

    Returns:
        ``[N, Lq, M * D]`` in the dtype of ``value``.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: CUDA tensors and no Triton. In the backward on CUDA under
            ``torch.use_deterministic_algorithms(True)``: float64, nearest sampling, more than 128 channels a head, more
            than 64 samples a query, or a GPU that is not NVIDIA's of compute capability 8.0 on.

    Source: Zhu et al., "Deformable DETR" (https://arxiv.org/abs/2010.04159), equation 3; ``ms_deform_attn_func.py``.

    Example:
        >>> value = torch.arange(6.0).view(1, 6, 1, 1)  # one level of 2 x 3 pixels
        >>> center, weights = torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
        >>> ms_deform_attn(value, [(2, 3)], None, center, weights)
        tensor([[[2.5000]]])
    """
    tensors = (value, sampling_locations, attention_weights, None, None)
    key = fast_path.key_of(spatial_shapes, level_start_index, tensors, padding_mode, align_corners, method, num_points)
    launch = fast_path.recall(key)
    if launch is not None:
        return launch(*tensors, spatial_shapes)
    checks.check_value(value)
    checks.check_options(padding_mode, align_corners, method)
    num_levels, shapes, sizes = checks.check_shapes(spatial_shapes, value)
    points = checks.check_num_points("sampling_locations", sampling_locations, num_levels, num_points)
    batch, _, num_heads, _ = value.shape
    expected = (batch, sampling_locations.shape[1], num_heads, *sampling_locations.shape[3:-1])
    axes = "[N, Lq, M, L, P" if len(expected) == 5 else "[N, Lq, M, sum(num_points)"
    checks.check_like("sampling_locations", sampling_locations, (*expected, 2), f"{axes}, 2]", value)
    checks.check_like("attention_weights", attention_weights, expected, f"{axes}]", value)
    if level_start_index is not None and not torch.compiler.is_compiling():
        _check_level_start(level_start_index, shapes, sizes)
    _refuse_forward_mode(value, sampling_locations, attention_weights)
    records = _records(value, sampling_locations, attention_weights)
    operator = registration.FORWARD if records else registration.FORWARD_NO_GRAD
    inputs = (_autocast(value), shapes, sizes, sampling_locations, attention_weights)
    output = operator(*inputs, points, padding_mode, align_corners, method)
    if key is not None:
        launch = registration.repeat(*inputs, None, None, points, padding_mode, align_corners, method)
        fast_path.remember(key, launch)
    return output


def fused_ms_deform_attn(
    value: Tensor,
    spatial_shapes: checks.SpatialShapes,
    reference_points: Tensor,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    *,
    value_mask: Tensor | None = None,
    num_points: Sequence[int] | None = None,
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """Softmax, sampling locations, padding mask and multi-scale deformable attention in one kernel a direction.

    The same as ``ms_deform_attn`` on ``softmax(attention_logits)`` over all points of a head and on locations
    ``reference + offset / (w, h)`` for reference points, ``reference_xy + offset / P_l * reference_wh * 0.5`` for
    reference boxes, without either of them in memory.

    Args:
        value: ``[N, S, M, D]``, as in ``ms_deform_attn``.
        spatial_shapes: (h, w) of each level, as in ``ms_deform_attn``.
        reference_points: ``[N, Lq, L or 1, 2 or 4]``, or ``[N, Lq, 2 or 4]`` for all levels alike; (x, y) or
            (cx, cy, w, h), 0 to 1 across the image.
        sampling_offsets: ``[N, Lq, M, L, P, 2]``, or packed ``[N, Lq, M, sum(num_points), 2]``; (x, y), in pixels of
            the level for points, in halves of the box times P for boxes.
        attention_logits: ``[N, Lq, M, L, P]``, or packed ``[N, Lq, M, sum(num_points)]``; before the softmax.
        value_mask: bool ``[N, S]``, True where a pixel counts; a pixel that does not is read as 0, whatever it holds.
        num_points: points of each level, for packed offsets.
        padding_mode: ``"zeros"`` or ``"border"``, as in ``grid_sample``.
        align_corners: as in ``grid_sample``.

    Returns:
        ``[N, Lq, M * D]`` in the dtype of ``value``. Gradients reach value, references, offsets and logits.

    Raises:
        TypeError: an argument is no tensor, or of a dtype that is not supported.
        ValueError: shapes, devices or options do not fit together; the message names the argument.
        RuntimeError: as in ``ms_deform_attn``.

    Source: ``MSDeformAttn.forward`` of Deformable-DETR; ``num_points`` as in D-FINE.

    Example:
        >>> value = torch.arange(6.0).view(1, 6, 1, 1)  # one level of 2 x 3 pixels
        >>> reference, offset = torch.full((1, 1, 2), 0.5), torch.tensor([1.0, 0.0]).view(1, 1, 1, 1, 1, 2)
        >>> fused_ms_deform_attn(value, [(2, 3)], reference, offset, torch.zeros(1, 1, 1, 1, 1))
        tensor([[[3.5000]]])
    """
    tensors = (value, sampling_offsets, attention_logits, reference_points, value_mask)
    key = fast_path.key_of(spatial_shapes, None, tensors, padding_mode, align_corners, "fused", num_points)
    launch = fast_path.recall(key)
    if launch is not None:
        return launch(*tensors, spatial_shapes)
    checks.check_value(value)
    checks.check_options(padding_mode, align_corners)
    num_levels, shapes, sizes = checks.check_shapes(spatial_shapes, value)
    points = checks.check_num_points("sampling_offsets", sampling_offsets, num_levels, num_points)
    batch, _, num_heads, _ = value.shape
    num_queries = sampling_offsets.shape[1]
    expected = (batch, num_queries, num_heads, *sampling_offsets.shape[3:-1])
    axes = "[N, Lq, M, L, P" if len(expected) == 5 else "[N, Lq, M, sum(num_points)"
    checks.check_like("sampling_offsets", sampling_offsets, (*expected, 2), f"{axes}, 2]", value)
    checks.check_like("attention_logits", attention_logits, expected, f"{axes}]", value)
    if isinstance(reference_points, Tensor):
        check_dense("reference_points", reference_points)
        if reference_points.dim() == 3:
            reference_points = reference_points[:, :, None]
    if (
        not isinstance(reference_points, Tensor)
        or reference_points.dim() != 4
        or reference_points.shape[3] not in (2, 4)
    ):
        came = list(reference_points.shape) if isinstance(reference_points, Tensor) else type(reference_points).__name__
        raise ValueError(f"reference_points must be [N, Lq, L or 1, 2 or 4] or [N, Lq, 2 or 4], got {came}")
    levels = reference_points.shape[2] if reference_points.shape[2] == 1 else num_levels
    expected = (batch, num_queries, levels, reference_points.shape[3])
    checks.check_like("reference_points", reference_points, expected, "[N, Lq, L or 1, 2 or 4]", value)
    if value_mask is not None:
        checks.check_mask(value_mask, value)
    _refuse_forward_mode(value, reference_points, sampling_offsets, attention_logits)
    records = _records(value, reference_points, sampling_offsets, attention_logits)
    operator = registration.FUSED_FORWARD if records else registration.FUSED_FORWARD_NO_GRAD
    inputs = (_autocast(value), shapes, sizes, sampling_offsets, attention_logits, reference_points, value_mask)
    output = operator(*inputs, points, padding_mode, align_corners)
    if key is not None:
        fast_path.remember(key, registration.repeat(*inputs, points, padding_mode, align_corners))
    return output


def multiscale_deformable_attention(
    img: Tensor,
    img_shapes: checks.SpatialShapes,
    sampling_points: Tensor,
    attention_weights: Tensor,
    padding_mode: str = "zeros",
    align_corners: bool = False,
) -> Tensor:
    """``ms_deform_attn`` with the arguments and the four axes of the package msda-triton.

    Args:
        img: ``[B, I, H, C]`` (batch, pixels, heads, channels), the flattened feature pyramid.
        img_shapes: (h, w) of each level, a tensor ``[L, 2]`` or a list of pairs.
        sampling_points: ``[B, N, H, L, P, 2]``, (x, y), 0 to 1 across a level.
        attention_weights: ``[B, N, H, L, P]``.
        padding_mode: ``"zeros"`` or ``"border"``.
        align_corners: as in ``grid_sample``.

    Returns:
        ``[B, N, H, C]`` in the dtype of ``img``.

    Raises:
        TypeError, ValueError, RuntimeError: as ``ms_deform_attn``, where ``img`` is called value, ``img_shapes``
            spatial_shapes and ``sampling_points`` sampling_locations.

    Source: ``msda_triton.multiscale_deformable_attention``.

    Example:
        >>> img, points = torch.ones(1, 6, 2, 4), torch.rand(1, 3, 2, 1, 4, 2)
        >>> multiscale_deformable_attention(img, [(2, 3)], points, torch.rand(1, 3, 2, 1, 4)).shape
        torch.Size([1, 3, 2, 4])
    """
    output = ms_deform_attn(
        img, img_shapes, None, sampling_points, attention_weights,
        padding_mode=padding_mode, align_corners=align_corners,
    )  # fmt: skip
    return output.unflatten(2, (img.shape[2], img.shape[3]))


def _check_level_start(start: Tensor | Sequence[int], shapes: Tensor | None, sizes: list[int] | None) -> None:
    if shapes is not None and shapes.device.type == "cpu":
        sizes = shapes.flatten().tolist()
    if sizes is not None:
        checks.check_level_start(start, sizes)


def _records(*tensors: Tensor) -> bool:
    """Whether the call must go through the operator that autograd records; a traced call always does."""
    if torch.compiler.is_compiling():
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _autocast(value: Tensor) -> Tensor:
    """Follow the active autocast dtype; like PyTorch's own operators, leave float64 alone."""
    kind = value.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and value.dtype != torch.float64:
        return value.to(torch.get_autocast_dtype(kind))
    return value


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """A registered operator has no forward-mode derivative and would drop the tangents without a word."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("forward-mode derivatives of multi-scale deformable attention are not implemented")
