"""What the operator tests share: the one tolerance rule, and inputs whose gradients exist.

The rule: against the float64 reference, a result may be wrong by twice what PyTorch's own code loses at that dtype,
plus one rounding of the result and a few of the float32 (float64) sums. PyTorch's own code is `eager_ms_deform_attn`:
`grid_sample` level by level. Halves are sampled in float32, as under autocast; samples and sums are halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.ops.deformable_attention.reference import (
    reference_fused_ms_deform_attn,
    reference_ms_deform_attn,
)

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


@dataclasses.dataclass(frozen=True)
class Case:
    """One call, without its tensors. ``num_points`` as a number: the same for every level, and not packed."""

    shapes: tuple[tuple[int, int], ...] = ((4, 6), (3, 2))
    batch: int = 2
    queries: int = 3
    heads: int = 2
    head_dim: int = 4
    num_points: int | tuple[int, ...] = 2
    padding_mode: str = "zeros"
    align_corners: bool = False
    method: str = "bilinear"
    dtype: torch.dtype = torch.float32
    location_dtype: torch.dtype | None = None  # None: as the value
    weight_dtype: torch.dtype | None = None
    reference_size: int = 2
    reference_levels: int = 1  # 0: references without a level axis
    masked: bool = False

    @property
    def points(self) -> list[int]:
        """Points of each level."""
        return [self.num_points] * len(self.shapes) if isinstance(self.num_points, int) else list(self.num_points)

    @property
    def pixels(self) -> int:
        """S."""
        return sum(h * w for h, w in self.shapes)

    @property
    def options(self) -> dict:
        """Keywords of the unfused call."""
        packed = None if isinstance(self.num_points, int) else list(self.num_points)
        return {
            "padding_mode": self.padding_mode,
            "align_corners": self.align_corners,
            "num_points": packed,
            "method": self.method,
        }

    @property
    def fused_options(self) -> dict:
        """Keywords of the fused call, without the mask."""
        return {name: option for name, option in self.options.items() if name != "method"}

    def split(self, packed: Tensor, axis: int = 3) -> Tensor:
        """Give the points, packed along ``axis``, their level axis back where the case has one."""
        if isinstance(self.num_points, int):
            return packed.unflatten(axis, (len(self.shapes), self.num_points))
        return packed


def make_inputs(case: Case, device: torch.device | str = "cpu") -> list[Tensor]:
    """Leaves value, locations and weights."""
    locations = make_locations(case)
    weights = torch.rand(locations.shape[:-1], dtype=torch.float64).mul_(2).sub_(0.5)
    value = torch.randn(case.batch, case.pixels, case.heads, case.head_dim, dtype=torch.float64)
    return [
        _leaf(value, case.dtype, device),
        _leaf(case.split(locations), case.location_dtype or case.dtype, device),
        _leaf(case.split(weights), case.weight_dtype or case.location_dtype or case.dtype, device),
    ]


def make_fused_inputs(case: Case, device: torch.device | str = "cpu") -> tuple[list[Tensor], Tensor | None]:
    """Leaves value, references, offsets and logits; and the mask, False where the value holds NaN."""
    value, _, _ = make_inputs(case, "cpu")
    levels = max(case.reference_levels, 1)
    references = torch.rand(case.batch, case.queries, levels, case.reference_size, dtype=torch.float64)
    references[..., 2:] = references[..., 2:] * 0.5 + 0.25
    spread = spread_references(references, case.points)
    packed = make_locations(case)
    if case.reference_size == 2:
        offsets = (packed - spread) * level_sizes(case)
    else:
        offsets = (packed - spread[..., :2]) / (0.5 * spread[..., 2:]) * _points_of_sample(case)
    logits = torch.randn(packed.shape[:-1], dtype=torch.float64) * 2
    mask = None
    if case.masked:
        mask = torch.rand(case.batch, case.pixels) > 0.3
        value = value.detach().masked_fill(~mask[:, :, None, None], torch.nan)
        mask = mask.to(device)
    dtype = case.location_dtype or case.dtype
    leaves = [
        _leaf(value, case.dtype, device),
        _leaf(references if case.reference_levels else references[:, :, 0], dtype, device),
        _leaf(case.split(offsets), dtype, device),
        _leaf(case.split(logits), case.weight_dtype or dtype, device),
    ]
    return leaves, mask


def make_locations(case: Case) -> Tensor:
    """Packed float64 locations, inside and outside, away from the steps of their own gradient.

    Between two pixels the derivative by the location is constant and on a pixel it jumps: there two correct programs
    may differ, so no coordinate lies within a quarter of a pixel of one. For nearest the same holds of its rounding.
    """
    shape = (case.batch, case.queries, case.heads, sum(case.points), 2)
    sizes = level_sizes(case)
    scale = sizes - 1 if case.align_corners else sizes
    shift = 0.0 if case.align_corners else -0.5
    cell = (torch.rand(shape, dtype=torch.float64) * (sizes + 2)).floor() - 1.5  # from outside to outside
    pixel = cell.floor() + 0.25 + 0.5 * torch.rand(shape, dtype=torch.float64)
    return (pixel - shift) / scale.clamp(min=1)


def level_sizes(case: Case) -> Tensor:
    """(w, h) of the level of every sample, [K, 2]."""
    sizes = torch.tensor([(w, h) for h, w in case.shapes], dtype=torch.float64).reshape(-1, 2)
    return sizes.repeat_interleave(torch.tensor(case.points), 0).clamp(min=1)


def _points_of_sample(case: Case) -> Tensor:
    points = torch.tensor(case.points)
    return points.repeat_interleave(points)[:, None]


def spread_references(references: Tensor, points: Sequence[int]) -> Tensor:
    """References ``[N, Lq, 1 or L, R]`` for every sample: ``[N, Lq, 1, K, R]``."""
    references = references.expand(-1, -1, len(points), -1)
    return references.repeat_interleave(torch.tensor(points, device=references.device), 2)[:, :, None]


def _leaf(tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    return tensor.detach().to(dtype).to(device, copy=True).requires_grad_()


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
        locations = spread[..., :2] + offsets / _points_of_sample(case).to(offsets) * spread[..., 2:] * 0.5
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
