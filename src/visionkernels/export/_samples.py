"""The operators and modules of this package as subjects, under the names that the command knows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import visionkernels as vk
from visionkernels.export._subject import Subject
from visionkernels.export._vit import of_vit
from visionkernels.models import ViTConfig

_LEVELS = ((12, 20), (6, 10), (3, 5))  # (h, w)
_BATCH, _QUERIES, _HEADS, _HEAD_DIM, _POINTS = 2, 7, 4, 8, 3


def flatten(levels: tuple[Tensor, ...]) -> tuple[Tensor, list[tuple[int, int]]]:
    """Feature maps `[N, C, h, w]` as pixels `[N, S, C]`, and (h, w) of each."""
    shapes = [(level.shape[2], level.shape[3]) for level in levels]
    return torch.cat([level.flatten(2).transpose(1, 2) for level in levels], 1), shapes


class Attention(nn.Module):
    """The plain operator on feature maps."""

    def __init__(
        self, num_points: tuple[int, ...] | None = None, method: str = "bilinear", border: bool = False
    ) -> None:
        super().__init__()
        self.num_points, self.method = num_points, method
        self.padding_mode = "border" if border else "zeros"

    def forward(self, level_0: Tensor, level_1: Tensor, level_2: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """Feature maps `[N, M * D, h, w]`, and locations and weights as the operator takes them."""
        pixels, shapes = flatten((level_0, level_1, level_2))
        return vk.ms_deform_attn(
            pixels.unflatten(2, (_HEADS, _HEAD_DIM)), shapes, None, locations, weights,
            num_points=self.num_points, method=self.method, padding_mode=self.padding_mode,
        )  # fmt: skip


class FusedAttention(nn.Module):
    """The fused operator on feature maps, with a mask."""

    def __init__(self, num_points: tuple[int, ...] | None = None) -> None:
        super().__init__()
        self.num_points = num_points

    def forward(
        self, level_0: Tensor, level_1: Tensor, level_2: Tensor, references: Tensor, offsets: Tensor, logits: Tensor,
        threshold: Tensor,
    ) -> Tensor:  # fmt: skip
        """Feature maps `[N, M * D, h, w]`; a pixel counts whose first channel is above the threshold `[N, 1]`."""
        pixels, shapes = flatten((level_0, level_1, level_2))
        return vk.fused_ms_deform_attn(
            pixels.unflatten(2, (_HEADS, _HEAD_DIM)), shapes, references, offsets, logits,
            value_mask=pixels[:, :, 0] > threshold, num_points=self.num_points,
        )  # fmt: skip


class Module(nn.Module):
    """`MSDeformAttn` on feature maps."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = vk.MSDeformAttn(_HEADS * _HEAD_DIM, len(_LEVELS), _HEADS, _POINTS)

    def forward(self, level_0: Tensor, level_1: Tensor, level_2: Tensor, query: Tensor, references: Tensor) -> Tensor:
        """Feature maps `[N, C, h, w]`, queries `[N, Lq, C]`, boxes `[N, Lq, 1, 4]`."""
        pixels, shapes = flatten((level_0, level_1, level_2))
        return self.attention(query, references.sigmoid(), pixels, shapes)


def _levels() -> dict[str, Tensor]:
    return {f"level_{i}": torch.randn(_BATCH, _HEADS * _HEAD_DIM, h, w) for i, (h, w) in enumerate(_LEVELS)}


def _subject(name: str, module: nn.Module, others: dict[str, Tensor]) -> Subject:
    inputs = _levels() | others
    sizes: dict[str, dict[str, int]] = {"batch": dict.fromkeys(inputs, 0)}
    sizes["queries"] = {key: 1 for key in others if key != "threshold"}
    sizes |= {f"{side}_{i}": {f"level_{i}": axis} for i in range(3) for side, axis in (("height", 2), ("width", 3))}
    return Subject(name, module.eval(), inputs, ("output",), sizes)


def ms_deform_attn(
    num_points: tuple[int, ...] | None = None, method: str = "bilinear", border: bool = False
) -> Subject:
    """The plain operator."""
    samples = (len(_LEVELS), _POINTS) if num_points is None else (sum(num_points),)
    locations = torch.rand(_BATCH, _QUERIES, _HEADS, *samples, 2)
    weights = torch.rand(_BATCH, _QUERIES, _HEADS, *samples)
    module = Attention(num_points, method, border)
    return _subject("ms_deform_attn", module, {"locations": locations, "weights": weights})


def fused_ms_deform_attn(num_points: tuple[int, ...] | None = None) -> Subject:
    """The fused operator, with a mask."""
    samples = (len(_LEVELS), _POINTS) if num_points is None else (sum(num_points),)
    others = {
        "references": torch.rand(_BATCH, _QUERIES, 1, 4),
        "offsets": torch.randn(_BATCH, _QUERIES, _HEADS, *samples, 2),
        "logits": torch.randn(_BATCH, _QUERIES, _HEADS, *samples),
        "threshold": torch.full((_BATCH, 1), -0.5),
    }
    return _subject("fused_ms_deform_attn", FusedAttention(num_points), others)


def msdeformattn() -> Subject:
    """The module."""
    module = Module()
    for parameter in module.parameters():  # as initialised, all weights are equal
        nn.init.normal_(parameter, std=0.3)
    query = torch.randn(_BATCH, _QUERIES, _HEADS * _HEAD_DIM)
    return _subject("MSDeformAttn", module, {"query": query, "references": torch.randn(_BATCH, _QUERIES, 1, 4)})


def vit() -> Subject:
    """A small ViT with every weight drawn: a norm's bias and a scale of 0 and 1 would hide what is left out."""
    config = ViTConfig(
        "vit", hidden_size=64, num_heads=4, num_layers=2, intermediate_size=128, image_size=(64, 64), pooling="dense"
    )
    model = vk.ViT(config)
    for name, weight in model.named_buffers():
        if weight.dim() == 1:
            weight.copy_(0.2 * torch.randn(weight.shape) + ("norm" in name and name.endswith("weight")))
    return of_vit("ViT", model, open_image=True)


SAMPLES: dict[str, Callable[[], Subject]] = {
    "ms_deform_attn": ms_deform_attn,
    "fused_ms_deform_attn": fused_ms_deform_attn,
    "MSDeformAttn": msdeformattn,
    "ViT": vit,
}
