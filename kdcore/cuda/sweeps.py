"""The stages of a KD row (see :mod:`kdcore.cuda.distillation`) over rows in memory, by a whole block."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from kdcore.cuda.distillation import no_sums, stages
from kdcore.cuda.primitives import cast, device
from kdcore.cuda.rows import block_maxima, block_sums, block_total, carry, octet_of, octets_of, write_octet

__all__ = ["Sweeps", "sweeps"]


class Sweeps(NamedTuple):
    """Of rows s and t of ``size`` classes; ``adjacent`` as for :func:`kdcore.cuda.rows.octets_of`.

    ``whole``: whether all rows that a sweep reads and writes can be by 16 bytes. The other arguments are those of the
    stages.
    """

    sums_of: Any
    weights_of: Any
    spend_row: Any


@cache
def sweeps(parts: Any, term: Any = None, slope: Any = None) -> Sweeps:
    """The sweeps of an objective's parts, with forward KL or a divergence by its two formulas."""
    soft = parts.soft
    two_formulas = term is not None
    _, gather, settle, weigh, spend, _ = stages(parts, term, slope)

    @cuda.jit(device=True)
    def thread_sums(s, t, size, rates, tags, adjacent, whole, like):
        """A thread's sums."""
        sums = no_sums(like)
        a, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
        step = 8 * cuda.blockDim.x
        if whole:
            while a + gap + 4 <= size:
                x = octet_of(s, a, a + gap, size, True, like)
                y = x
                if soft:
                    y = octet_of(t, a, a + gap, size, True, like)
                sums = gather(sums, x, y, rates, tags)
                a += step
        while a < size:
            x = octet_of(s, a, a + gap, size, False, like)
            y = x
            if soft:
                y = octet_of(t, a, a + gap, size, False, like)
            sums = gather(sums, x, y, rates, tags)
            a += step
        return sums

    @device
    def sums_of(s, t, size, rates, tags, adjacent, whole, like, shared):
        """(maxima, z_s, z_h, z_t) of the rows; z_s or z_t is NaN or 0 where they cannot be used."""
        sums = thread_sums(s, t, size, rates, tags, adjacent, whole, like)
        maxima = block_maxima(sums[0], sums[5], shared)
        z_s, low_s, z_h, low_h, z_t, low_t = settle(sums, maxima, rates, tags)
        z_s, z_h, z_t = block_sums(z_s, low_s, z_h, low_h, z_t, low_t, shared)
        return maxima, z_s, z_h, z_t

    @cuda.jit(device=True)
    def weights_of(s, t, size, maxima, rates, tags, softmaxes, adjacent, whole, like, shared):
        """(value, mean): the sums of terms and of slopes."""
        value, mean = np.float64(0), np.float64(0)
        a, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
        step = 8 * cuda.blockDim.x
        while a < size:
            inside = whole and a + gap + 4 <= size
            x = octet_of(s, a, a + gap, size, inside, like)
            y = octet_of(t, a, a + gap, size, inside, like)
            value, mean = weigh(value, mean, x, y, a, a + gap, size, maxima, rates, tags, softmaxes)
            a += step
        return block_total(value, shared), block_total(mean, shared)

    @device
    def spend_octet(w, low, s, t, g, a, b, size, maxima, rates, tags, factors, ratio, softmaxes, whole, like):
        """The gradient of an octet is written; (w, low) and its part of the moment."""
        x = octet_of(s, a, b, size, whole, like)
        y = x
        if soft:
            y = octet_of(t, a, b, size, whole, like)
        z, part = spend(x, y, maxima, rates, tags, factors, ratio, softmaxes)
        if g[0] != 0:
            write_octet(g, a, b, size, whole, z)
        if soft and not two_formulas:
            w, low = carry(w, low, part)
        return w, low

    @cuda.jit(device=True)
    def spend_row(s, t, g, size, maxima, rates, tags, factors, ratio, softmaxes, adjacent, whole, like, shared):
        """The gradient is written, if g has an address, but for what the label adds; w is forward KL's moment."""
        w, low = cast(0, like), cast(0, like)
        start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
        step = 8 * cuda.blockDim.x
        # Backwards, because the last classes were read last and are still in the cache.
        a = start + (size - 1 - start) // step * step
        while a >= 0 and not (whole and a + gap + 4 <= size):
            w, low = spend_octet(
                w, low, s, t, g, a, a + gap, size, maxima, rates, tags, factors, ratio, softmaxes, False, like
            )
            a -= step
        while a >= 0:
            w, low = spend_octet(
                w, low, s, t, g, a, a + gap, size, maxima, rates, tags, factors, ratio, softmaxes, True, like
            )
            a -= step
        zero = cast(0, like)
        w_row, _, _ = block_sums(w, low, zero, zero, zero, zero, shared)
        return w_row

    return Sweeps(sums_of, weights_of, spend_row)
