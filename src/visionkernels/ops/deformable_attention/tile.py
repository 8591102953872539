"""The launch rule: how the kernels' work is cut. Replace it here."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import triton

LINE_BYTES = 128  # of the L1 and L2 caches
LANE_BYTES = 16  # the widest load of one lane


class Tile(NamedTuple):
    """How the rows (query, head) are cut into programs."""

    rows: int
    heads: int  # neighbouring rows that are heads of one query
    block_d: int
    num_warps: int
    unroll: int  # samples of a level that one turn of the loop handles
    images_first: bool  # neighbouring programs work on different images


@lru_cache
def choose_tile(head_dim: int, num_heads: int, itemsize: int, backward: bool) -> Tile:
    """The launch rule: every lane reads 16 bytes of a pixel, one warp holds as many rows as that makes.

    More rows or more warps a program were slower on an H200, and so was any other unrolling. Heads are grouped until
    they fill a cache line: rows of one head alone read the same part of every line, and its banks conflict.

    Args:
        head_dim: channels of a head.
        num_heads: heads of the value.
        itemsize: bytes of one channel of the value.
        backward: the direction.
    """
    block_d = triton.next_power_of_2(head_dim)
    # The backward's atomics are of float32, whatever the value: another width a lane would shuffle every tile.
    lane_itemsize = max(itemsize, 4) if backward else itemsize
    warp_elements = 32 * max(1, LANE_BYTES // lane_itemsize)
    num_warps = min(8, max(1, block_d // (2 * warp_elements)))
    rows = max(1, min(32 * num_warps, num_warps * warp_elements // block_d))
    heads = 1
    while heads < rows and num_heads % (2 * heads) == 0 and 2 * heads * head_dim * itemsize <= LINE_BYTES:
        heads *= 2
    return Tile(rows, heads, block_d, num_warps, unroll=1 if backward else 2, images_first=backward)


class WarpTile(NamedTuple):
    """How the warp kernels cut the rows."""

    rows: int
    heads: int
    num_warps: int


MAX_UNROLLED = 32  # samples of a row; the code grows with them, and so do registers and the time to compile it


@lru_cache
def choose_warp_tile(head_dim: int, num_heads: int, itemsize: int, num_samples: int, dense: bool) -> WarpTile | None:
    """The launch rule of the warp kernels: a row has a lane for every 16 bytes of a pixel, or a multiple of that.

    Args:
        head_dim: channels of a head.
        num_heads: heads of the value.
        itemsize: bytes of one channel of the value.
        num_samples: samples of a row.
        dense: every pixel is a query, as in an encoder. Elsewhere rows are few: then several samples of a row are
            read at once, by lanes of their own.

    Returns:
        The tile, or None where rows do not divide a warp or have too many samples to unroll.
    """
    row_bytes = head_dim * itemsize
    lanes = row_bytes // LANE_BYTES
    if row_bytes % LANE_BYTES or lanes not in (1, 2, 4, 8, 16, 32) or num_samples > MAX_UNROLLED:
        return None
    num_warps = 4 if dense else 1
    # Sixteen lanes a row were best on an H200, of those that have a sample of their own.
    at_once = 1 if dense else max(1, min(16, triton.next_power_of_2(num_samples)) // lanes)
    rows = 32 * num_warps // (lanes * at_once)
    heads = 1
    while heads < rows and num_heads % (2 * heads) == 0 and 2 * heads * row_bytes <= LINE_BYTES:
        heads *= 2
    return WarpTile(rows, heads, num_warps)
