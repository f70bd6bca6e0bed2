"""The stages of a KD row (see :mod:`kdcore.cuda.distillation`) over rows in memory, by a whole block."""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from kdcore.cuda.distillation import questions, stages
from kdcore.cuda.primitives import cast, device, load_real, store_real
from kdcore.cuda.rows import block_maxima, block_sums, octet_of, octets_of, write_octet
from kdcore.formulas import converted

__all__ = ["Sweeps", "single", "sweeps"]


def single(constant):
    """A formula's constant in float32; what is beyond it is an infinity there."""
    with np.errstate(over="ignore"):
        return np.float32(constant)


class Sweeps(NamedTuple):
    """Of rows s and t of ``size`` classes; ``adjacent`` as for :func:`kdcore.cuda.rows.octets_of`.

    ``whole``: whether all rows that a sweep reads and writes can be by 16 bytes. The other arguments are those of the
    stages. Rows that are to be worked in float32 are so quickly at first, then, where that is no good, with care; by
    two formulas with care alone.
    """

    sums_of: Any
    weights_of: Any
    offsets_of: Any
    spend_row: Any
    spend_one: Any


@cache
def sweeps(parts: Any, wide: bool, term: Any = None, slope: Any = None) -> Sweeps:
    """The sweeps of an objective's parts, with forward KL or a divergence by its two formulas.

    ``wide``: whether the rows are to be worked in float64.
    """
    soft = parts.soft
    two_formulas = term is not None
    if two_formulas and not wide:
        term, slope = converted(term, single), converted(slope, single)
    one_way = wide or two_formulas
    large, no_good = questions(parts)

    def gathering(careful):
        """The function that returns a row's maxima and sums by one of the ways."""
        of_way = stages(parts, careful, term, slope)
        sums_at, raise_maxima, add_octet, settle = of_way.sums_at, of_way.raise_maxima, of_way.add_octet, of_way.settle
        floors, unit = of_way.floors, of_way.unit
        by_16_bytes = one_way or not careful  # rows that need care are few

        @cuda.jit(device=True)
        def thread_sums(s, t, size, rates, adjacent, whole, like):
            sums = sums_at(floors(rates, like), rates)
            a, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
            step = 8 * cuda.blockDim.x
            if by_16_bytes and whole:
                while a + gap + 4 <= size:
                    x = octet_of(s, a, a + gap, size, True, like)
                    y = x
                    if soft:
                        y = octet_of(t, a, a + gap, size, True, like)
                    sums = add_octet(raise_maxima(sums, x, y, rates), x, y, rates)
                    a += step
            while a < size:
                x = octet_of(s, a, a + gap, size, False, like)
                y = x
                if soft:
                    y = octet_of(t, a, a + gap, size, False, like)
                sums = add_octet(raise_maxima(sums, x, y, rates), x, y, rates)
                a += step
            return sums

        @device
        def sums_of(s, t, size, rates, adjacent, whole, like, shared):
            """(maxima, z_s, z_h, z_t, w) of the rows; z_s or z_t is NaN or 0 where they cannot be used."""
            sums = thread_sums(s, t, size, rates, adjacent, whole, like)
            maxima = block_maxima(sums[0], sums[6], shared)
            z_s, z_h, z_t, w = settle(sums, maxima, rates, like)
            z_s, z_h, z_t, w = block_sums(z_s, z_h, z_t, w, shared)
            return maxima, z_s, z_h, z_t, w * unit(rates[4])

        return sums_of

    def weighing():
        """The function that returns the sums of a row's terms and of its slopes."""
        of_way = stages(parts, True, term, slope)
        references_of, weigh = of_way.references, of_way.weigh

        @cuda.jit(device=True)
        def thread_sums(s, t, size, maxima, rates, softmaxes, adjacent, whole, like):
            zero = cast(0, like)
            sums = zero, zero, zero, zero
            references = references_of(maxima, rates)
            start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
            step = 8 * cuda.blockDim.x
            # Backwards, because the last classes were read last and are still in the cache.
            a = start + (size - 1 - start) // step * step
            while a >= 0 and not (whole and a + gap + 4 <= size):
                x = octet_of(s, a, a + gap, size, False, like)
                y = octet_of(t, a, a + gap, size, False, like)
                sums = weigh(sums, x, y, a, a + gap, size, False, references, rates, softmaxes)
                a -= step
            while a >= 0:
                x = octet_of(s, a, a + gap, size, True, like)
                y = octet_of(t, a, a + gap, size, True, like)
                sums = weigh(sums, x, y, a, a + gap, size, True, references, rates, softmaxes)
                a -= step
            return sums

        @device
        def weights_of(s, t, size, maxima, rates, softmaxes, adjacent, whole, like, shared):
            """(value, mean): the sums of terms and of slopes."""
            value, low_value, mean, low_mean = thread_sums(s, t, size, maxima, rates, softmaxes, adjacent, whole, like)
            value = np.float64(value) + np.float64(low_value)
            mean = np.float64(mean) + np.float64(low_mean)
            value, mean, _, _ = block_sums(value, mean, 0.0, 0.0, shared)
            return value, mean

        return weights_of

    def spending(careful):
        """The function that writes a row's gradient by one of the ways."""
        of_way = stages(parts, careful, term, slope)
        references_of, spend, spend_one = of_way.references, of_way.spend, of_way.spend_one
        by_16_bytes = one_way or not careful

        @device
        def spend_octet(s, t, g, a, b, size, references, rates, factors, softmaxes, whole, like):
            x = octet_of(s, a, b, size, whole, like)
            y = x
            if soft:
                y = octet_of(t, a, b, size, whole, like)
            write_octet(g, a, b, size, whole, spend(x, y, references, rates, factors, softmaxes))

        if two_formulas:

            @cuda.jit(device=True)
            def spend_row(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like):
                references = references_of(maxima, rates)
                a, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
                step = 8 * cuda.blockDim.x
                # Forwards, because the first classes were weighed last.
                while whole and a + gap + 4 <= size:
                    spend_octet(s, t, g, a, a + gap, size, references, rates, factors, softmaxes, True, like)
                    a += step
                while a < size:
                    spend_octet(s, t, g, a, a + gap, size, references, rates, factors, softmaxes, False, like)
                    a += step

        elif by_16_bytes:

            @cuda.jit(device=True)
            def spend_row(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like):
                references = references_of(maxima, rates)
                start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
                step = 8 * cuda.blockDim.x
                # Backwards, because the last classes were read last and are still in the cache.
                a = start + (size - 1 - start) // step * step
                while a >= 0 and not (whole and a + gap + 4 <= size):
                    spend_octet(s, t, g, a, a + gap, size, references, rates, factors, softmaxes, False, like)
                    a -= step
                while a >= 0:
                    spend_octet(s, t, g, a, a + gap, size, references, rates, factors, softmaxes, True, like)
                    a -= step

        else:

            @cuda.jit(device=True)
            def spend_row(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like):
                references = references_of(maxima, rates)
                v = np.int64(cuda.threadIdx.x)
                while v < size:  # one by one, which takes few registers
                    x = cast(load_real(s[0] + v * s[1], s[2]), like)
                    y = x
                    if soft:
                        y = cast(load_real(t[0] + v * t[1], t[2]), like)
                    z = spend_one(x, y, cast(0, like), references, rates, factors, softmaxes)
                    store_real(g[0] + v * g[1], z, g[2])
                    v += cuda.blockDim.x

        return spend_row

    if one_way:
        of_way = stages(parts, True, term, slope)
        references_of, spend_one_class = of_way.references, of_way.spend_one

        @device
        def spend_one_with_care(x, y, above_one, maxima, rates, factors, softmaxes):
            return spend_one_class(x, y, above_one, references_of(maxima, rates), rates, factors, softmaxes)

        weights_of = weighing() if two_formulas else None
        return Sweeps(gathering(True), weights_of, of_way.offsets, spending(True), spend_one_with_care)

    quickly, with_care = gathering(careful=False), gathering(careful=True)
    spend_quickly, spend_with_care = spending(careful=False), spending(careful=True)
    quick, careful = stages(parts, False), stages(parts, True)
    offsets_quickly, references_quickly, spend_one_quickly = quick.offsets, quick.references, quick.spend_one
    offsets_with_care, references_with_care = careful.offsets, careful.references
    spend_one_with_care = careful.spend_one

    @device
    def sums_of(s, t, size, rates, adjacent, whole, like, shared):
        """As :func:`gathering` has it, by the way that the row needs."""
        maxima, z_s, z_h, z_t, w = quickly(s, t, size, rates, adjacent, whole, like, shared)
        if no_good(maxima, z_s, z_h, z_t, w, rates):
            maxima, z_s, z_h, z_t, w = with_care(s, t, size, rates, adjacent, whole, like, shared)
        return maxima, z_s, z_h, z_t, w

    @device
    def offsets_of(maxima, rates):
        """Of e_s, e_h, e_t: the exponents that make them relative to the maxima; see the stages."""
        return offsets_with_care(maxima, rates) if large(maxima, rates) else offsets_quickly(maxima, rates)

    @device
    def spend_row(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like):
        """The gradient is written, but for what the label adds."""
        if large(maxima, rates):
            spend_with_care(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like)
        else:
            spend_quickly(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like)

    @device
    def spend_one(x, y, above_one, maxima, rates, factors, softmaxes):
        """The gradient of one class; ``above_one`` = z_h over its offset, if it is the label."""
        if large(maxima, rates):
            references = references_with_care(maxima, rates)
            return spend_one_with_care(x, y, above_one, references, rates, factors, softmaxes)
        references = references_quickly(maxima, rates)
        return spend_one_quickly(x, y, above_one, references, rates, factors, softmaxes)

    return Sweeps(sums_of, None, offsets_of, spend_row, spend_one)
