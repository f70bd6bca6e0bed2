"""The KD kernel of several blocks a row: each logit is read from memory once, and waits in shared memory for the sums.

A row's classes are cut into as many slices as blocks work on it. A block takes a **ticket**, by which it knows its row
and slice: so the blocks of a row start one after another, and one that waits for the others of its row never waits for
one that cannot start, as long as a row's blocks fit the device together. :mod:`kdcore.cuda.plans` lets a row have half
as many blocks as there are multiprocessors, of which each holds two or more, so that this is true beside other calls.

A block loads its slice, publishes maxima and sums, waits until all of the row's blocks have, merges theirs, all blocks
in the same order, and writes its part of the gradient. The last to finish adds up the moments, in the order of the
slices, and writes the row's results.

What a block publishes are float64 numbers: m_s, z_s, z_h, m_t, z_t, then w or the first bad class; with room for
PUBLISHED of them, 64 bytes.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float64, int32, uint32

from kdcore import formulas
from kdcore.cuda.distillation import no_sums, stages
from kdcore.cuda.kernels import (
    factors_of,
    given,
    kernel_of,
    label_at,
    masked_or_bad,
    report,
    row_at,
    weight_at,
    write_results,
)
from kdcore.cuda.primitives import (
    add_release,
    bind,
    cast,
    device,
    itemsize,
    keep_async,
    keep_words,
    kept_words,
    load_acquire,
    load_real,
    load_stored,
    maximum,
    octet_of_words,
    shared_address_of,
    store_real,
    store_stored,
    wait_for_copies,
    words_of_octet,
)
from kdcore.cuda.rows import (
    SCRATCH,
    block_maxima,
    block_sums,
    carry,
    condition_of,
    cross_entropy_of,
    fill_row,
    first_bad_class,
    is_usable,
    octet_of,
    octets_of,
    warp_maximum,
    warp_total,
    whole_octets,
    write_octet,
)
from kdcore.rowstatus import OK, STUDENT, TEACHER

__all__ = ["MOST_BLOCKS", "MOST_THREADS", "PUBLISHED", "group_kernel", "octets_per_thread", "resident_blocks"]

#: Blocks of a row at most.
MOST_BLOCKS = 64
PUBLISHED = 8
_WARP = 32

#: Threads of a block, and bytes of both rows that it keeps: 3 octets a thread of float32, 6 of 16-bit types.
MOST_THREADS = 224
_KEPT = 3 * MOST_THREADS * 64
_WORDS_KEPT = _KEPT // 4

_kd_loss = bind(formulas.kd_loss)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)


def octets_per_thread(threads, student_itemsize, teacher_itemsize):
    """How many octets of both rows a thread keeps, of elements of 2 or 4 bytes."""
    return _KEPT // (8 * (student_itemsize + teacher_itemsize) * threads)


@device
def _share(size, blocks):
    """Classes of a slice."""
    return (size + 8 * blocks - 1) // (8 * blocks) * 8


@device
def _whole_octets_of(count, start, step, gap, end):
    """How many of a thread's octets, from the first, lie before the end."""
    if count > 0 and start + (count - 1) * step + gap + 4 > end:
        return count - 1
    return count


def resident_blocks(shared_memory):
    """Blocks that are to share a multiprocessor with so many bytes of shared memory; of four, registers would spill."""
    return 3 if shared_memory >= 200 << 10 else 2


@cache
def group_kernel(parts, resident):
    """The kernel of an objective's parts with forward KL, in float32, of rows of elements of 2 or 4 bytes.

    ``resident`` blocks are to share a multiprocessor, which limits the registers of their threads.
    """
    soft, hard, _ = parts
    rates_of, gather, settle, _, spend, spend_one = stages(parts)

    @device
    def keep(place_s, place_t, gap_of_thread, s, t, a, b, end, whole, like):
        """An octet of both rows is kept, -inf beyond the end."""
        if whole:
            keep_async(place_s, gap_of_thread, s[0], a, b, s[2])
            if soft:
                keep_async(place_t, gap_of_thread, t[0], a, b, t[2])
        else:
            keep_words(place_s, gap_of_thread, words_of_octet(octet_of(s, a, b, end, False, like), s[2]), s[2])
            if soft:
                keep_words(place_t, gap_of_thread, words_of_octet(octet_of(t, a, b, end, False, like), t[2]), t[2])

    @device
    def kept(place_s, place_t, gap_of_thread, tags):
        """An octet of both rows."""
        x = octet_of_words(kept_words(place_s, gap_of_thread, tags[0]), tags[0])
        y = x
        if soft:
            y = octet_of_words(kept_words(place_t, gap_of_thread, tags[1]), tags[1])
        return x, y

    @device
    def places_of(words, share, step, tags):
        """Where a thread keeps its octets of both rows, how far the next ones are, and what is between two halves."""
        gap = np.int64(16) * cuda.blockDim.x
        next_s, next_t = gap * (itemsize(tags[0]) // 2), gap * (itemsize(tags[1]) // 2)
        place_s = shared_address_of(words) + 16 * cuda.threadIdx.x
        return place_s, place_s + (share + step - 1) // step * next_s, next_s, next_t, gap

    @cuda.jit(device=True)
    def sums_of(s, t, begin, end, share, words, rates, tags, adjacent, whole, like):
        """A slice is kept; a thread's sums of it."""
        start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
        start += begin
        step = np.int64(8) * cuda.blockDim.x
        place_s, place_t, next_s, next_t, half = places_of(words, share, step, tags)
        count = (end - start + step - 1) // step
        quick = _whole_octets_of(count, start, step, gap, end) if whole else 0
        for k in range(quick):
            a = start + k * step
            keep(place_s + k * next_s, place_t + k * next_t, half, s, t, a, a + gap, end, True, like)
        for k in range(quick, count):
            a = start + k * step
            keep(place_s + k * next_s, place_t + k * next_t, half, s, t, a, a + gap, end, False, like)
        wait_for_copies()
        sums = no_sums(like)
        for k in range(count):
            x, y = kept(place_s + k * next_s, place_t + k * next_t, half, tags)
            sums = gather(sums, x, y, rates, tags)
        return sums

    @cuda.jit(device=True)
    def spend_slice(g, begin, end, share, words, maxima, rates, tags, factors, ratio, adjacent, whole, like):
        """The gradient of a slice is written, but for what the label adds; a thread's (w, low)."""
        start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
        start += begin
        step = np.int64(8) * cuda.blockDim.x
        place_s, place_t, next_s, next_t, half = places_of(words, share, step, tags)
        softmaxes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        w, low = cast(0, like), cast(0, like)
        count = (end - start + step - 1) // step
        quick = _whole_octets_of(count, start, step, gap, end) if whole else 0
        for k in range(quick):
            x, y = kept(place_s + k * next_s, place_t + k * next_t, half, tags)
            z, part = spend(x, y, maxima, rates, tags, factors, ratio, softmaxes)
            if g[0] != 0:
                write_octet(g, start + k * step, start + k * step + gap, end, True, z)
            if soft:
                w, low = carry(w, low, part)
        for k in range(quick, count):
            x, y = kept(place_s + k * next_s, place_t + k * next_t, half, tags)
            z, part = spend(x, y, maxima, rates, tags, factors, ratio, softmaxes)
            if g[0] != 0:
                write_octet(g, start + k * step, start + k * step + gap, end, False, z)
            if soft:
                w, low = carry(w, low, part)
        return w, low

    @cuda.jit(device=True)
    def merged(row, blocks, maxima, rates, tags, like):
        """(maxima, z_s, z_h, z_t) of a row, from what its blocks have published: all warps of all of them alike."""
        lane = np.int64(cuda.threadIdx.x % _WARP)
        zero = np.float64(0)
        m_s, m_t = np.float64(maxima[0]), np.float64(maxima[1])
        for k in range(lane, blocks, _WARP):
            m_s = maximum(m_s, load_stored(row + 8 * PUBLISHED * k, zero))
            m_t = maximum(m_t, load_stored(row + 8 * (PUBLISHED * k + 3), zero))
        maxima = cast(warp_maximum(m_s), like), cast(warp_maximum(m_t), like)
        z_s, z_h, z_t = 0.0, 0.0, 0.0
        one, nothing = cast(1, like), cast(0, like)
        for k in range(lane, blocks, _WARP):
            of_block = row + 8 * PUBLISHED * k
            m_s, m_t = load_stored(of_block, zero), load_stored(of_block + 24, zero)
            f_s, _, f_h, _, f_t, _ = settle(
                (cast(m_s, like), one, nothing, one, nothing, cast(m_t, like), one, nothing), maxima, rates, tags
            )
            z_s += load_stored(of_block + 8, zero) * f_s
            z_h += load_stored(of_block + 16, zero) * f_h
            z_t += load_stored(of_block + 32, zero) * f_t
        return maxima, warp_total(z_s), warp_total(z_h), warp_total(z_t)

    @kernel_of((MOST_THREADS, resident))
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, size, like, gradient, results, status, blocks, counters, published,
    ):  # fmt: skip
        """As the row kernel, by ``blocks`` blocks a row.

        counters: address of int32 zeros, one ticket and two for each row: blocks that have published, that have ended.
        published: address of float64 [B, blocks, PUBLISHED].
        """
        shared = cuda.shared.array(SCRATCH, float64)
        ticket = cuda.shared.array(1, int32)
        words = cuda.shared.array(_WORDS_KEPT, uint32, 16)
        first = cuda.threadIdx.x == 0
        if first:
            ticket[0] = add_release(counters, np.int32(1))
        cuda.syncthreads()
        i, slice_ = np.int64(ticket[0]) // blocks, np.int64(ticket[0]) % blocks
        share = _share(size, blocks)
        begin = slice_ * share
        end = min(begin + share, size)
        s, t, g = row_at(student, i), row_at(teacher, i), row_at(gradient, i)
        if not given(gradient):
            g = gradient[0], gradient[2], gradient[3]
        weight, label = weight_at(weights, i), label_at(labels, i)
        masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
        if masked or code != OK:
            if first and slice_ == 0:
                value = 0.0 if masked else math.nan
                write_results(results, i, value, value, value)
                report(status, i, code, detail)
            if given(gradient):
                fill_row(g, begin, end, 0.0 if masked else math.nan)
            return

        tags = s[2], t[2]
        rates = rates_of(temperature, teacher_temperature, like)
        adjacent = itemsize(s[2]) == 2 or (soft and itemsize(t[2]) == 2)
        whole = whole_octets(s) and (not soft or whole_octets(t))
        sums = sums_of(s, t, begin, end, share, words, rates, tags, adjacent, whole, like)
        maxima = block_maxima(sums[0], sums[5], shared)
        z_s, low_s, z_h, low_h, z_t, low_t = settle(sums, maxima, rates, tags)
        own_s, own_h, own_t = block_sums(z_s, low_s, z_h, low_h, z_t, low_t, shared)

        arrived, ended = counters + 4 * (1 + 2 * i), counters + 4 * (2 + 2 * i)
        row = published + 8 * PUBLISHED * blocks * i
        place = row + 8 * PUBLISHED * slice_
        if first:
            store_stored(place, np.float64(maxima[0]))
            store_stored(place + 8, own_s)
            store_stored(place + 16, own_h)
            store_stored(place + 24, np.float64(maxima[1]))
            store_stored(place + 32, own_t)
            shared[0, 6] = weight / load_stored(denominator, np.float64(0))
            if hard:  # while the logits are still there, of which a gradient may take the place
                shared[1, 0] = load_real(s[0] + label * s[1], s[2])
                if soft:
                    shared[1, 1] = load_real(t[0] + label * t[1], t[2])
            add_release(arrived, np.int32(1))
            while load_acquire(arrived) < blocks:
                cuda.nanosleep(64)
        cuda.syncthreads()
        maxima, row_s, row_h, row_t = merged(row, blocks, maxima, rates, tags, like)
        usable = is_usable(row_s) and (not soft or is_usable(row_t))
        student_is_bad = not is_usable(row_s)
        if usable:
            if first:
                # What the row's sums are for when the sweep is over waits in shared memory: registers are few.
                shared[0, 0], shared[0, 1], shared[0, 2] = factors_of(
                    shared[0, 6], alpha, kd_scale, temperature, row_s, row_h, row_t
                )
                shared[0, 3], shared[0, 4], shared[0, 5] = row_s, row_h, row_t
            cuda.syncthreads()
            factors = cast(shared[0, 0], like), cast(shared[0, 1], like), cast(shared[0, 2], like)
            ratio = cast(teacher_temperature / temperature, like)
            whole = whole_octets(g) and (adjacent or itemsize(g[2]) != 2)
            w, low = spend_slice(
                g, begin, end, share, words, maxima, rates, tags, factors, ratio, adjacent, whole, like
            )
            nothing = cast(0, like)
            own, _, _ = block_sums(w, low, nothing, nothing, nothing, nothing, shared)
            if hard and given(gradient) and first and begin <= label < end:
                x, y, z = cast(shared[1, 0], like), cast(shared[1, 1], like), cast(shared[0, 4], like)
                softmaxes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
                of_label, _ = spend_one(nothing, x, y, z, maxima, rates, tags, factors, ratio, softmaxes)
                store_real(g[0] + label * g[1], of_label, g[2])
        else:
            own = np.float64(2 * size)
            bad = first_bad_class(s if student_is_bad else t, begin, end, shared)
            if bad < 2 * end:
                own = np.float64(bad)
            if given(gradient):
                fill_row(g, begin, end, math.nan)
        if first:
            store_stored(place + 40, own)
            if add_release(ended, np.int32(1)) == blocks - 1:
                total, least = 0.0, np.float64(2 * size)
                for k in range(blocks):
                    of_block = load_stored(row + 8 * (PUBLISHED * k + 5), np.float64(0))
                    total += of_block
                    least = min(least, of_block)
                if usable:
                    ce, kl = 0.0, 0.0
                    if hard:
                        ce = shared[0, 6] * cross_entropy_of(cast(shared[1, 0], like), maxima[0], shared[0, 4])
                    if soft:
                        kl = (
                            shared[0, 6]
                            * kd_scale
                            * _forward_kl_from_sums(total, shared[0, 5], shared[0, 3], teacher_temperature)
                        )
                    write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
                    report(status, i, OK, 0)
                else:
                    write_results(results, i, math.nan, math.nan, math.nan)
                    condition, v = condition_of(np.int64(least), size)
                    report(status, i, (STUDENT if student_is_bad else TEACHER) + condition, v)

    return kernel
