"""Blocks of rows on a thread pool.

Not Numba's ``parallel=True``: with its OpenMP layer a forked child that calls a kernel is killed, with its workqueue
layer concurrent calls from two Python threads abort the process. Serial ``nogil`` kernels on an ordinary pool have
neither problem. Results do not depend on how rows are dealt out, because a row is one thread's work.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

__all__ = ["in_one_thread", "run_blocks"]

#: Up to this many elements the hand-over to other threads costs more than they save.
_SERIAL_ELEMENTS = 1 << 17
#: More parts than threads, so that a thread that is late or slow leaves more of them to the others; but smaller ones
#: than this are not worth a hand-over.
_PARTS_PER_THREAD = 8
_PART_ELEMENTS = 1 << 16

_lock = Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _after_fork() -> None:
    """A child has the parent's pools but none of their threads, and perhaps a lock that nobody will release."""
    global _lock
    _lock = Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="kdcore")
        return _pools[threads]


def in_one_thread(rows: int, width: int, threads: int) -> bool:
    """Whether :func:`run_blocks` leaves all rows to the caller's thread."""
    return threads == 1 or rows == 1 or rows * width <= _SERIAL_ELEMENTS


def run_blocks(task: Callable[[int, int], None], rows: int, width: int, threads: int) -> None:
    """Call ``task(lo, hi)`` for consecutive blocks that cover ``range(rows)``; rows of ``width`` elements.

    Threads take the next block as they are done with the last, the caller's among them. It does not wait for a thread
    that has not begun when nothing is left. ``task`` must already be compiled: a kernel first called from a pool thread
    while the caller's module is still being imported waits for the import lock, which the caller holds.
    """
    if in_one_thread(rows, width, threads):
        task(0, rows)
        return
    step = -(-rows // min(threads * _PARTS_PER_THREAD, max(threads, rows * width // _PART_ELEMENTS)))
    left = deque((lo, min(lo + step, rows)) for lo in range(0, rows, step))

    def work() -> None:
        while True:
            try:
                lo, hi = left.popleft()
            except IndexError:
                return
            task(lo, hi)

    futures = [_pool(threads - 1).submit(work) for _ in range(min(threads, len(left)) - 1)]
    try:
        work()
    finally:
        for future in futures:
            if not future.cancel():
                future.result()
