"""Where a token is: learned positions for any image size, rotary tables, and relative position biases."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from visionkernels.models.config import ViTConfig


@dataclass(frozen=True)
class Positions:
    """All that depends on the size of the images alone.

    Attributes:
        prefix: `[T, C]`, the prefix tokens with their positions, or None.
        patches: `[P, C]`, added to the patches, or None.
        rotary: (cos, sin), each `[P, D]`, or None.
        tables: Relative position biases of each table of the model, interpolated: `[offsets, heads]`.
        biases: The same as biases of the scores, `[1, H, N, N]`; empty where they are too large to be kept.
        index: `[N, N]`, the row of a table for each two tokens, or None.
    """

    prefix: Tensor | None = None
    patches: Tensor | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    tables: list[Tensor] = field(default_factory=list)
    biases: list[Tensor] = field(default_factory=list)
    index: Tensor | None = None

    def bias(self, table: int) -> Tensor | None:
        """The bias of the scores by a table, `[1, H, N, N]`; None in a model without one."""
        if self.biases:
            return self.biases[table]
        return None if self.index is None else expand_bias(self.tables[table], self.index)


@dataclass(frozen=True)
class Tokens:
    """The learned tokens and positions of a model.

    Attributes:
        classes: `[T, C]`, tokens that have a position, or None.
        registers: `[R, C]`, tokens that have none, or None.
        position: `[T + P, C]`, or None.
        like: A tensor of the model's dtype and device.
    """

    classes: Tensor | None
    registers: Tensor | None
    position: Tensor | None
    like: Tensor


def build(
    config: ViTConfig, tokens: Tokens, tables: list[Tensor], grid: tuple[int, int], max_bias_size: int
) -> Positions:
    """What depends on the size of the images alone.

    Args:
        config: The model's shape.
        tokens: Its learned tokens and positions.
        tables: Its relative position tables.
        grid: Rows and columns of patches.
        max_bias_size: Numbers that the relative position biases may take to be kept.
    """
    prefix, patches = tokens.classes, None
    if tokens.position is not None:
        count = config.num_class_tokens
        resample = {"float32": config.position_float32, "antialias": config.position_antialias}
        patches = interpolate(tokens.position[count:], config.grid, grid, **resample)
        prefix = None if prefix is None else prefix + tokens.position[:count]
    if prefix is not None and tokens.registers is not None:
        prefix = torch.cat([prefix, tokens.registers])
    if config.position == "rotary":
        turns = rotary(grid, config.channels_per_head, config.rope_theta, tokens.like)
        return Positions(prefix, patches, turns)
    if not tables:
        return Positions(prefix, patches)
    tables = [resize_table(table, config.grid, grid) for table in tables]
    index = relative_index(grid, tokens.like.device)
    if not _is_known(grid) or len(tables) * config.num_heads * index.numel() > max_bias_size:
        return Positions(prefix, patches, tables=tables, index=index)
    return Positions(prefix, patches, tables=tables, biases=[expand_bias(t, index) for t in tables], index=index)


def interpolate(
    position: Tensor, old: tuple[int, int], new: tuple[int, int], *, float32: bool, antialias: bool
) -> Tensor:
    """Learned positions of a grid for another grid, bicubic, as each family does it.

    Args:
        position: `[rows * columns, C]` of the old grid.
        old: Its rows and columns.
        new: Rows and columns of the new grid.
        float32: Compute in float32, whatever the dtype.
        antialias: Antialias where the new grid is coarser.

    Returns:
        `[new rows * new columns, C]` in the dtype of `position`.
    """
    if _is_known(new) and old == new:
        return position
    image = position.view(1, *old, -1).permute(0, 3, 1, 2)
    wide = image.float() if float32 else image
    resized = F.interpolate(wide, new, mode="bicubic", align_corners=False, antialias=antialias).to(position.dtype)
    return resized.permute(0, 2, 3, 1).reshape(new[0] * new[1], -1)


def rotary(grid: tuple[int, int], head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """DINOv3's rotary tables: angles by the centres of the patches, which lie from -1 to 1.

    Args:
        grid: Rows and columns of patches.
        head_dim: Channels of a head; a multiple of 4.
        theta: Base of the frequencies.
        like: A tensor of the dtype and on the device that the tables shall have.

    Returns:
        cos and sin, each `[P, head_dim]`.
    """
    device = like.device
    frequencies = 1 / theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32, device=device)
    axes = [torch.arange(0.5, size, dtype=torch.float32, device=device) / size for size in grid]
    centres = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1) * 2.0 - 1.0  # [P, (y, x)]
    angles = (2 * math.pi * centres[:, :, None] * frequencies).flatten(1).tile(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def resize_table(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """A table of relative position biases for another grid, bilinear.

    Args:
        table: `[(2 * rows - 1) * (2 * columns - 1) + 3, H]` of the old grid.
        old: Its rows and columns.
        new: Rows and columns of the new grid.

    Returns:
        The same of the new grid.
    """
    rows, columns = (2 * size - 1 for size in old)
    if _is_known(new) and old == new and rows == columns:
        return table
    # The upstream model views the offsets as (columns, rows), and so resizes a grid that is not square even to itself.
    offsets = table[:-3].reshape(1, columns, rows, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(offsets, [2 * size - 1 for size in new], mode="bilinear")
    return torch.cat([resized.permute(0, 2, 3, 1).reshape(-1, table.shape[1]), table[-3:]])


def relative_index(grid: tuple[int, int], device: torch.device) -> Tensor:
    """The row of a relative position table for each two tokens: class token, then patches in raster order.

    Args:
        grid: Rows and columns of patches.
        device: Where the result shall be.

    Returns:
        `[N, N]` of int64; the last three rows of a table are class to patch, patch to class, class to class.
    """
    rows, columns = grid
    offsets = (2 * rows - 1) * (2 * columns - 1)
    axes = torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    y, x = (torch.cat([axis.new_zeros(1), axis.flatten()]) for axis in axes)  # the class token's are not used
    y, x = y[:, None] - y + rows - 1, x[:, None] - x + columns - 1
    index = y * (2 * columns - 1) + x
    is_class = torch.arange(index.shape[0], device=device) == 0
    # A sum, in which an exported program keeps an open number; in pad and where it would fix it.
    of_class = is_class.long() + (is_class & is_class[:, None]) + offsets
    return torch.where(is_class | is_class[:, None], of_class, index)


def _is_known(grid: tuple[int, int]) -> bool:
    """Whether the numbers may be compared: of an exported program's open sizes that would fix them."""
    return not any(isinstance(size, torch.SymInt) for size in grid)


def expand_bias(table: Tensor, index: Tensor) -> Tensor:
    """A relative position table as the bias of the scores: `[1, H, N, N]`, contiguous."""
    return table[index.flatten()].view(*index.shape, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
