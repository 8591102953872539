"""Threads of the CPU path: as many as PyTorch uses, each taking the next piece of the work when it is done with one.

Where PyTorch's OpenMP can be called (Linux) its own threads do the work: they wait awake, so work of 50 microseconds is
worth sharing, and they are no more than there are. Elsewhere, and after a fork, which OpenMP's threads do not survive,
a pool does it; waking it up takes 50 microseconds. Numba's own threading layers would bring a second OpenMP.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from visionkernels.ops.deformable_attention.cpu import PROCESS

_PIECES = 4  # pieces of a thread: what one of them is late for, the others do


def divide(total: int, cost: int, least: int) -> tuple[int, int]:
    """How many threads, and how many pieces; see ``share``."""
    most = min(total, total * cost // least)
    threads = max(1, min(torch.get_num_threads(), most))
    return threads, max(1, min(most, threads * _PIECES))


@functools.cache
def _open_mp() -> Callable[..., None] | None:
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    function = getattr(ctypes.CDLL(str(library)), "GOMP_parallel", None) if library.exists() else None
    if function is not None:
        function.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        function.restype = None
    return function


def open_mp() -> Callable[[int, int, int, int], None] | None:
    """PyTorch's OpenMP: takes a C function, its argument, how many threads are to call it, and 0; None without."""
    return _open_mp() if os.getpid() == PROCESS else None


def share(work: Callable[[int, int], None], total: int, cost: int, least: int) -> None:
    """Do the work from 0 to ``total``, in pieces that may run at the same time.

    Args:
        work: does a piece, from its begin to its end; releases the GIL.
        total: how much there is.
        cost: of one of the ``total``, in any unit.
        least: a piece that costs less than this is not worth another thread.
    """
    threads, pieces = divide(total, cost, least)
    if threads == 1:
        work(0, total)
        return
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
