"""The physical limit: how fast memory can be read and written, on the arrays and the threads of the engine.

A KD call reads two arrays and writes one, as STREAM's triad does; softmax reads one and writes one. The limit stores
past the caches, because an ordinary store first reads the line that it overwrites: a quarter of the triad's traffic.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from kdcore.cpu.pool import run_blocks
from kdcore.cpu.simd import fence, fma, load, store, stream

__all__ = ["FACTOR", "Limit", "aligned", "copy", "triad"]

FACTOR = 0.3
#: float32 numbers in a cache line, which is also one vector; streamed stores must be aligned to it.
_LINE = 16
_ZERO = np.float32(0)


class Limit(NamedTuple):
    """What a contender is compared with: a call, and the bytes that it moves."""

    run: Callable[[], Any]
    bytes: int


def _kernels(write: Any) -> tuple[Any, Any]:
    """c = a + FACTOR b and c = a over lines [lo, hi) of 1-D float32 arrays, stored by ``write``."""

    @njit(nogil=True)
    def triad_lines(a, b, c, lo, hi):
        for k in range(lo * _LINE, hi * _LINE, _LINE):
            write(c, k, fma(load(b, k, _ZERO), FACTOR, load(a, k, _ZERO)))
        fence()

    @njit(nogil=True)
    def copy_lines(a, b, c, lo, hi):
        for k in range(lo * _LINE, hi * _LINE, _LINE):
            write(c, k, load(a, k, _ZERO))
        fence()

    return triad_lines, copy_lines


_TRIAD, _COPY = {}, {}
_TRIAD[True], _COPY[True] = _kernels(stream)
_TRIAD[False], _COPY[False] = _kernels(store)


def aligned(shape: tuple[int, ...], dtype: Any = np.float32) -> NDArray[Any]:
    """An uninitialised array that begins with a cache line."""
    dtype = np.dtype(dtype)
    raw = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)


def triad(a: NDArray[Any], b: NDArray[Any], c: NDArray[Any], threads: int, *, bypass: bool = True) -> Limit:
    """c = a + FACTOR b, past the caches or (``bypass=False``) with ordinary stores."""
    return _limit(_TRIAD[bypass], (a, b, c), a.nbytes + b.nbytes + c.nbytes, threads)


def copy(a: NDArray[Any], c: NDArray[Any], threads: int, *, bypass: bool = True) -> Limit:
    """c = a, past the caches or with ordinary stores."""
    return _limit(_COPY[bypass], (a, a, c), a.nbytes + c.nbytes, threads)


def _limit(kernel: Any, arrays: tuple[NDArray[Any], ...], moved: int, threads: int) -> Limit:
    a, b, c = (array.reshape(-1) for array in arrays)
    assert a.size % _LINE == 0 and c.ctypes.data % 64 == 0 and {a.dtype.name, b.dtype.name, c.dtype.name} == {"float32"}

    def task(lo: int, hi: int) -> None:
        kernel(a, b, c, lo, hi)

    task(0, 0)  # compiled here, not by a thread of the pool
    return Limit(lambda: run_blocks(task, a.size // _LINE, _LINE, threads), moved)
