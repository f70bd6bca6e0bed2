"""Which kernel works a row, and by how many threads."""

from __future__ import annotations

from kdcore.cuda.primitives import SIMULATOR

__all__ = ["threads_of"]

_WARP = 32


def threads_of(size: int, most: int) -> int:
    """Threads of a block that has a row of ``size`` classes to itself: about two octets each, within what fits."""
    if SIMULATOR:
        return 2 * _WARP
    threads = 2 * _WARP
    while threads < most and 16 * threads < size:
        threads *= 2
    return threads
