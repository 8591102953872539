"""The inputs of one call, as every implementation receives them after validation."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Problem(NamedTuple):
    """Unfused: points are sampling locations, weights attention weights. Fused (references given): offsets, logits.

    Points and weights may keep their level axis or be packed; ``num_points`` says what belongs to which level.
    """

    value: Tensor  # [N, S, M, D]
    spatial_shapes: Tensor | None  # [L, 2] in device memory, or None when level_sizes says it
    level_sizes: tuple[int, ...]  # h0, w0, h1, w1, ...
    points: Tensor  # [N, Lq, M, L, P, 2] or [N, Lq, M, K, 2]
    weights: Tensor  # the same without the last axis
    reference_points: Tensor | None  # [N, Lq, 1 or L, 2 or 4]
    value_mask: Tensor | None  # [N, S] bool
    num_points: tuple[int, ...]  # of each level
    padding_mode: str = "zeros"
    align_corners: bool = False
    method: str = "bilinear"

    def images(self, part: slice) -> Problem:
        """The problem of some of the images."""
        return self._replace(
            value=self.value[part],
            points=_aligned(self.points, part),
            weights=_aligned(self.weights, part),
            reference_points=None if self.reference_points is None else _aligned(self.reference_points, part),
            value_mask=None if self.value_mask is None else _aligned(self.value_mask, part),
        )


def _aligned(tensor: Tensor, part: slice) -> Tensor:
    """A slice that begins at a multiple of 16 bytes, like the whole: Triton compiles anew for one that does not."""
    images = tensor[part]
    return images if (images.data_ptr() - tensor.data_ptr()) % 16 == 0 else images.clone()
