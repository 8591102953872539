"""Which kernel computes a linear layer, and in tiles of which size: plain data and one rule.

The rule: a multiprocessor computes its share of the tiles one after another, each in a time that is its area divided by
the tile's rate; the tile with the least time is taken. So a few rows get small tiles, which keep all multiprocessors
busy, and many rows large ones, which read each factor less often.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from visionkernels.ops._inference import Device


class Tile(NamedTuple):
    """The constants of a launch; what they do is said in kernels.py."""

    block_m: int
    block_n: int
    block_k: int  # of 2-byte elements; half as many of 4 bytes
    num_warps: int
    num_stages: int
    rate: float = 1.0  # of the multiply-adds of a multiprocessor, relative to the best tile
    tma: bool = False
    group_m: int = 8
    parts: int = 1
    flatten: bool = True
    warp_specialize: bool = False
    programs: int = 1  # of a multiprocessor at once, for the persistent kernel
    early: bool = False


# NVIDIA's GPUs of compute capability 9.0, halves and tf32.
HOPPER = (
    # The fewest reads a multiply-add; the next tile's reads begin before this one is finished.
    Tile(128, 256, 64, 8, 3, rate=0.9, tma=True, parts=2, group_m=16),
    # Three programs a multiprocessor: others multiply while one finishes its tile, if it waits for no residual.
    Tile(128, 128, 64, 4, 2, rate=1.0, tma=True, parts=4, programs=3, early=True),
    # For a few hundred rows: every multiprocessor has a tile, and launches overlap.
    Tile(128, 64, 64, 8, 5, rate=0.7, tma=True, flatten=False, early=True),
    Tile(64, 64, 128, 4, 4, rate=0.55, tma=True, flatten=False, early=True),
    Tile(128, 64, 64, 4, 4, rate=0.6),
    Tile(64, 64, 64, 4, 4, rate=0.5),
    Tile(64, 32, 128, 4, 4, rate=0.4),
    Tile(16, 64, 128, 4, 4, rate=0.25, early=True),  # for a few rows, such as the pooled token of each image
)
# Of 4-byte elements a part of a tile takes twice the shared memory.
HOPPER_TF32 = (
    Tile(128, 128, 64, 8, 3, rate=1.0, tma=True, parts=4),
    Tile(128, 64, 64, 8, 3, rate=0.7),
    *HOPPER[5:],
)
# Other GPUs with matrix instructions: what fits in the shared memory of all of them.
PORTABLE = (
    Tile(128, 128, 32, 8, 3, rate=1.0),
    Tile(128, 64, 32, 4, 3, rate=0.8),
    Tile(64, 64, 32, 4, 4, rate=0.6),
    Tile(64, 32, 64, 4, 3, rate=0.4),
    Tile(16, 64, 64, 4, 3, rate=0.25),
)
# Two sums a tile, so half as many columns for the registers.
GATED_HOPPER = (
    Tile(128, 128, 64, 8, 3, rate=1.0, tma=True, parts=2),
    Tile(128, 64, 64, 4, 3, rate=0.7),
    Tile(64, 64, 64, 4, 3, rate=0.55),
    Tile(64, 32, 64, 4, 3, rate=0.4),
    Tile(16, 32, 64, 4, 3, rate=0.25),
)
GATED_PORTABLE = (
    Tile(128, 64, 32, 8, 3, rate=1.0),
    Tile(64, 64, 32, 4, 3, rate=0.7),
    Tile(64, 32, 32, 4, 3, rate=0.5),
    Tile(16, 32, 32, 4, 3, rate=0.25),
)
# Multiply-adds without matrix instructions: exact float32, and float64.
EXACT = (Tile(64, 64, 32, 4, 3, rate=1.0), Tile(32, 32, 32, 4, 3, rate=0.6))
DOUBLE = (Tile(32, 32, 64, 4, 2),)

# Of each kind: elsewhere, gated elsewhere, on compute capability 9.0, gated there.
TILES = {
    "half": (PORTABLE, GATED_PORTABLE, HOPPER, GATED_HOPPER),
    "tf32": (PORTABLE, GATED_PORTABLE, HOPPER_TF32, GATED_HOPPER),
    "exact": (EXACT,) * 4,
    "double": (DOUBLE,) * 4,
}


@lru_cache(4096)
def tile_of(
    num_rows: int,
    num_columns: int,
    device: Device,
    *,
    kind: str = "half",
    gated: bool = False,
    tma: bool = True,
    residual: bool = False,
) -> Tile:
    """The tile for a call.

    Args:
        num_rows: of input and output.
        num_columns: of the output.
        device: where it runs.
        kind: of the products: ``"half"``, ``"tf32"``, ``"exact"`` for float32, or ``"double"``.
        gated: whether a tile has two sums.
        tma: whether the tensors lie so that TMA can read and write them.
        residual: whether one is added.
    """
    tiles = TILES[kind][2 * device.is_hopper + gated]

    def time(tile: Tile) -> float:
        count = -(-num_rows // tile.block_m) * -(-num_columns // tile.block_n)
        return -(-count // device.multiprocessors) * tile.block_m * tile.block_n / tile.rate

    fitting = [tile for tile in tiles if (tma or not tile.tma) and not (residual and tile.programs > 1)]
    return min(fitting, key=time)
