"""Threads of the CPU path: as many as PyTorch uses, each taking the next piece of the work when it is done with one.

Numba's own threading layers are not used: one of them must not meet a fork, another not a second OpenMP.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_PIECES = 4  # pieces of a thread: what one of them is late for, the others do


def share(work: Callable[[int, int], None], total: int, cost: int, least: int) -> None:
    """Do the work from 0 to ``total``, in pieces that may run at the same time.

    Args:
        work: does a piece, from its begin to its end; releases the GIL.
        total: how much there is.
        cost: of one of the ``total``, in any unit.
        least: a piece that costs less than this is not worth another thread.
    """
    threads = min(torch.get_num_threads(), total, total * cost // least)
    if threads <= 1:
        work(0, total)
        return
    pieces = min(total, threads * _PIECES, total * cost // least)
    begins = iter(range(pieces))  # shared: the GIL makes taking the next one atomic

    def drain() -> None:
        for piece in begins:
            work(total * piece // pieces, total * (piece + 1) // pieces)

    pool = _pool(os.getpid(), torch.get_num_threads() - 1)
    helpers = [pool.submit(drain) for _ in range(threads - 1)]
    drain()
    for helper in helpers:
        if not helper.cancel():  # one that has not begun is not needed any more
            helper.result()


@functools.lru_cache(maxsize=2)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """The threads of a process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(threads, thread_name_prefix="visionkernels")
