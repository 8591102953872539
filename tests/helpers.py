"""What the operator tests share: the one tolerance rule, and the calls and inputs of `operator_cases`.

The rule: against the float64 reference, a result may be wrong by twice what PyTorch's own code loses at that dtype,
plus one rounding of the result and a few of the float32 (float64) sums. PyTorch's own code is `eager_ms_deform_attn`:
`grid_sample` level by level. Halves are sampled in float32, as under autocast; samples and sums are halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from operator_cases import (
    Case,
    level_sizes,
    make_fused_inputs,
    make_inputs,
    make_locations,
    points_of_sample,
    spread_references,
)
from torch import Tensor

from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

__all__ = [
    "Case", "assert_accurate", "check_fused", "check_plain", "eager_fused_ms_deform_attn", "eager_ms_deform_attn",
    "gradients", "inherited_by_logits", "level_sizes", "make_fused_inputs", "make_inputs", "make_locations",
    "spread_references",
]  # fmt: skip

ROUNDINGS = 16  # of coordinates, weights and sums, in units of the largest result


def assert_accurate(name: str, got: Tensor, truth: Tensor, eager: Tensor, inherited: float = 0.0) -> None:
    """Check ``got`` by the rule; ``inherited`` is an error that it has from what it is computed from."""
    assert truth.dtype == torch.float64, f"{name}: the truth is {truth.dtype}"
    assert got.shape == truth.shape, f"{name}: shape {list(got.shape)}, expected {list(truth.shape)}"
    assert got.dtype == eager.dtype, f"{name}: {got.dtype}, expected {eager.dtype}"
    assert truth.isfinite().all(), f"{name}: the truth is not finite"
    assert eager.isfinite().all(), f"{name}: PyTorch's own result is not finite"
    if not got.numel():
        return
    assert got.isfinite().all(), f"{name}: {(~got.isfinite()).sum()} of {got.numel()} values are not finite"
    error = (got.double() - truth).abs().max().item()
    lost = (eager.double() - truth).abs().max().item()
    largest = truth.abs().max().item()
    wide = torch.promote_types(got.dtype, torch.float32)  # what coordinates and sums are computed in
    limit = 2 * lost + largest * (torch.finfo(got.dtype).eps + ROUNDINGS * torch.finfo(wide).eps) + inherited
    assert error <= limit, f"{name}: error {error:.3g}, allowed {limit:.3g} (PyTorch loses {lost:.3g} of {largest:.3g})"


def eager_ms_deform_attn(value: Tensor, locations: Tensor, weights: Tensor, case: Case) -> Tensor:
    """``grid_sample`` level by level: what PyTorch's own code gives, and loses, at the value's dtype.

    Locations that are not finite count 0 here too, by a weight of 0, and far ones come nearer.
    """
    batch, _, heads, head_dim = value.shape
    queries = locations.shape[1]
    wide = torch.promote_types(value.dtype, torch.float32)
    locations = locations.reshape(batch, queries, heads, sum(case.points), 2)
    counts = locations.isfinite().all(-1)
    locations = locations.where(counts[..., None], locations.new_zeros(())).clamp(-9, 9).to(wide)
    weights = weights.reshape(counts.shape).where(counts, weights.new_zeros(())).to(value.dtype)
    starts = accumulate((h * w for h, w in case.shapes), initial=0)
    samples = []
    for start, (h, w), points in zip(starts, case.shapes, locations.split(case.points, 3), strict=False):
        level = value[:, start : start + h * w].to(wide)
        if h * w == 0:
            samples.append(value.new_zeros(batch, queries, heads, points.shape[3], head_dim))
        elif case.method == "nearest":
            samples.append(_nearest(level, h, w, points))
        else:
            image = level.permute(0, 2, 3, 1).reshape(batch * heads, head_dim, h, w)
            grid = 2 * points.transpose(1, 2).flatten(0, 1) - 1  # [N * M, Lq, P, 2]
            sampled = F.grid_sample(image, grid, "bilinear", case.padding_mode, case.align_corners)
            samples.append(sampled.unflatten(0, (batch, heads)).permute(0, 3, 1, 4, 2))  # [N, Lq, M, P, D]
    sampled = torch.cat(samples, 3).to(value.dtype)
    return (sampled * weights[..., None]).sum(3).flatten(2)


def _nearest(level: Tensor, h: int, w: int, points: Tensor) -> Tensor:
    """RT-DETRv2's "discrete" samples, pixel by pixel: index = trunc(location * size + 0.5), clamped to the level."""
    column = (points[..., 0] * w + 0.5).trunc().clamp(0, w - 1).long()
    row = (points[..., 1] * h + 0.5).trunc().clamp(0, h - 1).long()
    image = torch.arange(level.shape[0], device=level.device)[:, None, None, None]
    head = torch.arange(level.shape[2], device=level.device)[:, None]
    return level[image, row * w + column, head]


def eager_fused_ms_deform_attn(
    value: Tensor, references: Tensor, offsets: Tensor, logits: Tensor, case: Case, mask: Tensor | None
) -> Tensor:
    """The lines of Deformable-DETR's module, then `eager_ms_deform_attn`."""
    packed = *offsets.shape[:3], sum(case.points)
    offsets, logits = offsets.reshape(*packed, 2), logits.reshape(packed)
    counts = offsets.isfinite().all(-1, keepdim=True)
    offsets = offsets.where(counts, offsets.new_zeros(()))  # 0 * NaN would reach the references
    spread = spread_references(references if references.dim() == 4 else references[:, :, None], case.points)
    if case.reference_size == 2:
        locations = spread + offsets / level_sizes(case).to(offsets)
    else:
        locations = spread[..., :2] + offsets / points_of_sample(case).to(offsets) * spread[..., 2:] * 0.5
    locations = locations.where(counts, locations.new_full((), torch.nan))
    if mask is not None:
        value = value.masked_fill(~mask[:, :, None, None], 0)
    return eager_ms_deform_attn(value, locations, logits.softmax(-1), case)


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad_output: Tensor) -> list[Tensor]:
    """The output of ``function(*inputs)`` and the gradient of each input; 0 where none arrives."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*leaves)
    if not output.requires_grad:  # nothing was sampled
        return [output, *map(torch.zeros_like, leaves)]
    found = torch.autograd.grad(output, leaves, grad_output.to(output.dtype), allow_unused=True)
    return [output.detach(), *(torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True))]


def check_plain(attention: Callable[..., Tensor], case: Case, inputs: Sequence[Tensor], **changes: object) -> None:
    """``attention`` is accurate on these inputs, forward and backward."""
    value, locations, _ = inputs
    grad_output = torch.randn(*locations.shape[:2], value.shape[2] * value.shape[3]).to(value)
    shapes = changes.get("spatial_shapes", list(case.shapes))
    options = case.options

    def call(v: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return attention(v, shapes, None, p, w, **options)

    def truth(v: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return reference_ms_deform_attn(v, case.shapes, p, w, **options)

    def eager(v: Tensor, p: Tensor, w: Tensor) -> Tensor:
        return eager_ms_deform_attn(v, p, w, case)

    _compare(("value", "locations", "weights"), call, truth, eager, inputs, grad_output)


def check_fused(
    attention: Callable[..., Tensor], case: Case, inputs: Sequence[Tensor], mask: Tensor | None, **changes: object
) -> None:
    """The fused ``attention`` is accurate on these inputs, forward and backward."""
    value, _, offsets, _ = inputs
    grad_output = torch.randn(*offsets.shape[:2], value.shape[2] * value.shape[3]).to(value)
    shapes = changes.get("spatial_shapes", list(case.shapes))
    options = {**case.fused_options, "value_mask": mask}

    def call(v: Tensor, r: Tensor, o: Tensor, w: Tensor) -> Tensor:
        return attention(v, shapes, r, o, w, **options)

    def truth(v: Tensor, r: Tensor, o: Tensor, w: Tensor) -> Tensor:
        return reference_fused_ms_deform_attn(v, case.shapes, r, o, w, **options)

    def eager(v: Tensor, r: Tensor, o: Tensor, w: Tensor) -> Tensor:
        return eager_fused_ms_deform_attn(v, r, o, w, case, mask)

    _compare(("value", "references", "offsets", "logits"), call, truth, eager, inputs, grad_output)


def _compare(
    names: Sequence[str], call: Callable, truth: Callable, eager: Callable, inputs: Sequence[Tensor], grad: Tensor
) -> None:
    """The outputs of the three functions, and their gradients, by the rule."""
    got = gradients(call, inputs, grad)
    exact = gradients(truth, [tensor.detach().double() for tensor in inputs], grad.double())
    own = gradients(eager, inputs, grad)
    for name, *results in zip(("output", *(f"gradient of {n}" for n in names)), got, exact, own, strict=True):
        inherited = 0.0
        if name == "gradient of logits":
            inherited = inherited_by_logits(exact[0], got[0].dtype, grad, inputs[0].shape[3])
        assert_accurate(name, *results, inherited)


def inherited_by_logits(output: Tensor, dtype: torch.dtype, grad_output: Tensor, head_dim: int) -> float:
    """The error that the gradient of logits has from ``output``, the exact one, which is stored in ``dtype``.

    The gradient of a softmax is w (g - sum(w g)), and sum(w g) is grad_output . output, taken from the output as it is
    stored: the result inherits what that rounding makes of the term, which may cancel.
    """
    if not output.numel():
        return 0.0
    dots = torch.stack([output, output.to(dtype).double() - output]) * grad_output.double()
    dots = dots.unflatten(3, (-1, head_dim)).sum(4).nan_to_num(0.0, 0.0, 0.0)  # where NaN, so is the gradient
    dot, rounding = dots.abs().amax((1, 2, 3)).tolist()
    wide = torch.promote_types(dtype, torch.float32)
    return 2 * rounding + dot * ROUNDINGS * torch.finfo(wide).eps
