"""The KD kernel of several blocks a row: each logit is read from memory once, and waits in shared memory for the sums.

A row's classes are cut into as many slices as blocks work on it. A block takes a **ticket**, by which it knows its row
and slice: so the blocks of a row start one after another, and one that waits for the others of its row never waits for
one that cannot start, as long as a row's blocks fit the device together. :mod:`kdcore.cuda.plans` lets a row have half
as many blocks as there are multiprocessors, of which each holds two or more, so that this is true beside other calls.

A block keeps its slice, publishes its sums, waits until all of the row's blocks have, and writes its part of the
gradient from the sums of all, which each block merges alike. The row's first block writes its results.

What a block publishes are float64 numbers: m_s, z_s, z_h, m_t, z_t, w and the first bad class, of PUBLISHED.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float64, int32, uint32

from kdcore import formulas
from kdcore.cuda.distillation import questions, rebase_of, stages
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
    add,
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
    condition_of,
    cross_entropy_of,
    fill_row,
    first_bad_class,
    is_usable,
    octet_of,
    warp_maximum,
    warp_total,
    whole_octets,
    write_octet,
)
from kdcore.cuda.sweeps import sweeps
from kdcore.rowstatus import OK, STUDENT, TEACHER

__all__ = ["MOST_BLOCKS", "MOST_THREADS", "PUBLISHED", "group_kernel", "octets_per_thread", "resident_blocks"]

#: Blocks of a row at most.
MOST_BLOCKS = 64
PUBLISHED = 8
_WARP = 32

#: Threads of a block, and bytes of both rows that it keeps: 5 octets a thread of float32, 10 of 16-bit types.
MOST_THREADS = 128
_KEPT = 5 * MOST_THREADS * 64
_WORDS_KEPT = _KEPT // 4

_kd_loss = bind(formulas.kd_loss)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)


def octets_per_thread(threads, student_itemsize, teacher_itemsize):
    """How many octets of both rows a thread keeps, of elements of 2 or 4 bytes."""
    return _KEPT // (8 * (student_itemsize + teacher_itemsize) * threads)


def resident_blocks(shared_memory):
    """Blocks that are to share a multiprocessor with so many bytes of shared memory."""
    return min(5, shared_memory // (_KEPT + (3 << 10)))


@cache
def group_kernel(parts, threads, resident):
    """The kernel of an objective's parts with forward KL, in float32, of rows of elements of 2 or 4 bytes.

    It is for blocks of exactly so many ``threads``: what follows from it is then known to the compiler. ``resident``
    blocks are to share a multiprocessor, which limits the registers of their threads.
    """
    soft, hard, _ = parts
    large, no_good = questions(parts)
    rebase = rebase_of(parts)
    _, _, offsets_of, _, spend_one = sweeps(parts, False)
    #: Classes from one octet of a thread to its next, and bytes of shared memory between the halves of an octet.
    step, half = 8 * threads, 16 * threads

    @device
    def octets_of_slice(begin, end, adjacent):
        """(a, b - a) of a thread's first octet, how many lie before the end as a whole, and how many begin before it.

        Which classes they have is as :func:`kdcore.cuda.rows.octets_of` says.
        """
        thread = np.int64(cuda.threadIdx.x)
        start, gap = (8 * thread, np.int64(4)) if adjacent else (4 * thread, np.int64(4 * threads))
        left = end - begin - start
        inside = (left - gap - 4 + step) // step if left >= gap + 4 else np.int64(0)
        return begin + start, gap, np.int32(inside), np.int32((left + step - 1) // step if left > 0 else np.int64(0))

    @device
    def places_of(words, share, tags):
        """Where a thread keeps its octets of both rows, and how far the next ones are."""
        next_s, next_t = half * (itemsize(tags[0]) // 2), half * (itemsize(tags[1]) // 2)
        place_s = shared_address_of(words) + 16 * np.int64(cuda.threadIdx.x)
        return place_s, place_s + (share + step - 1) // step * next_s, next_s, next_t

    @cuda.jit(device=True)
    def keep_slice(s, t, octets, end, share, words, whole, like):
        """A slice of both rows is kept, with -inf beyond its end."""
        start, gap, inside, count = octets
        place_s, place_t, next_s, next_t = places_of(words, share, (s[2], t[2]))
        quick = inside if whole else np.int32(0)
        from_s, from_t = s[0] + start * itemsize(s[2]), t[0] + start * itemsize(t[2])
        for _ in range(quick):
            keep_async(place_s, half, from_s, np.int64(0), gap, s[2])
            from_s += step * itemsize(s[2])
            place_s += next_s
            if soft:
                keep_async(place_t, half, from_t, np.int64(0), gap, t[2])
                from_t += step * itemsize(t[2])
                place_t += next_t
        for k in range(quick, count):
            a = start + k * step
            keep_words(place_s, half, words_of_octet(octet_of(s, a, a + gap, end, False, like), s[2]), s[2])
            place_s += next_s
            if soft:
                keep_words(place_t, half, words_of_octet(octet_of(t, a, a + gap, end, False, like), t[2]), t[2])
                place_t += next_t
        wait_for_copies()

    @device
    def kept(place_s, place_t, tags):
        """An octet of both rows."""
        x = octet_of_words(kept_words(place_s, half, tags[0]), tags[0])
        y = x
        if soft:
            y = octet_of_words(kept_words(place_t, half, tags[1]), tags[1])
        return x, y

    def gathering(careful):
        """The function that returns a slice's maxima and sums by one of the ways."""
        no_sums, gather, settle, unit = stages(parts, careful)[:4]

        @cuda.jit(device=True)
        def sums_of(octets, share, words, rates, tags, like, shared):
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            sums = no_sums(rates, like)
            for _ in range(octets[3]):
                x, y = kept(place_s, place_t, tags)
                sums = gather(sums, x, y, rates)
                place_s += next_s
                place_t += next_t
            maxima = block_maxima(sums[0], sums[6], shared)
            z_s, z_h, z_t, w = settle(sums, maxima, rates, like)
            z_s, z_h, z_t, w = block_sums(z_s, z_h, z_t, w, shared)
            return maxima, z_s, z_h, z_t, w * unit(rates[4])

        return sums_of

    gather_quickly, gather_with_care = gathering(careful=False), gathering(careful=True)

    def spending(careful):
        """The function that writes a slice's gradient by one of the ways, but for what the label adds."""
        of_way = stages(parts, careful)
        references_of, spend = of_way.references, of_way.spend
        nothing = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

        @cuda.jit(device=True)
        def spend_slice(g, octets, end, share, words, maxima, rates, tags, factors, whole):
            references = references_of(maxima, rates)
            start, gap, inside, count = octets
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            quick = inside if whole else np.int32(0)
            to = g[0] + start * itemsize(g[2])
            for _ in range(quick):
                x, y = kept(place_s, place_t, tags)
                z = spend(x, y, references, rates, factors, nothing)
                write_octet((to, g[1], g[2]), np.int64(0), gap, end, True, z)
                to += step * itemsize(g[2])
                place_s += next_s
                place_t += next_t
            for k in range(quick, count):
                x, y = kept(place_s, place_t, tags)
                z = spend(x, y, references, rates, factors, nothing)
                write_octet(g, start + k * step, start + k * step + gap, end, False, z)
                place_s += next_s
                place_t += next_t

        return spend_slice

    spend_quickly, spend_with_care = spending(careful=False), spending(careful=True)

    @device
    def publish(place, maxima, z_s, z_h, z_t, w, bad):
        store_stored(place, np.float64(maxima[0]))
        store_stored(place + 8, z_s)
        store_stored(place + 16, z_h)
        store_stored(place + 24, np.float64(maxima[1]))
        store_stored(place + 32, z_t)
        store_stored(place + 40, w)
        store_stored(place + 48, bad)

    @cuda.jit(device=True)
    def merged(row, blocks, rates, like):
        """(maxima, z_s, z_h, z_t, w) of a row, from what its blocks have published; for one warp."""
        lane = np.int64(cuda.threadIdx.x % _WARP)
        zero = np.float64(0)
        m_s, m_t = np.float64(-math.inf), np.float64(-math.inf)
        for k in range(lane, blocks, _WARP):
            m_s = maximum(m_s, load_stored(row + 8 * PUBLISHED * k, zero))
            m_t = maximum(m_t, load_stored(row + 8 * (PUBLISHED * k + 3), zero))
        m_s, m_t = warp_maximum(m_s), warp_maximum(m_t)
        z_s, z_h, z_t, w = 0.0, 0.0, 0.0, 0.0
        for k in range(lane, blocks, _WARP):
            of_block = row + 8 * PUBLISHED * k
            of_s, of_h, of_t, of_w = rebase(
                load_stored(of_block, zero), load_stored(of_block + 8, zero), load_stored(of_block + 16, zero),
                load_stored(of_block + 24, zero), load_stored(of_block + 32, zero), load_stored(of_block + 40, zero),
                (m_s, m_t), rates, like,
            )  # fmt: skip
            z_s, z_h, z_t, w = z_s + of_s, z_h + of_h, z_t + of_t, w + of_w
        return (m_s, m_t), warp_total(z_s), warp_total(z_h), warp_total(z_t), warp_total(w)

    @device
    def first_bad_of(row, blocks, student, size):
        """Of the slices whose sums of the student, or of the teacher, are NaN, the first bad class."""
        least = np.float64(2 * size)
        for k in range(blocks):
            of_block = row + 8 * PUBLISHED * k
            if math.isnan(load_stored(of_block + (8 if student else 32), np.float64(0))):
                least = min(least, load_stored(of_block + 48, np.float64(0)))
        return np.int64(least)

    @kernel_of((threads, resident))
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, rates, size, like, gradient, results, status, blocks, share, counters, published,
    ):  # fmt: skip
        """As the row kernel, by ``blocks`` blocks a row, each with ``share`` classes, a multiple of 8.

        counters: address of int32 zeros, one of tickets and one for each row, of blocks that have published.
        published: address of float64 [B, blocks, PUBLISHED].
        """
        shared = cuda.shared.array(SCRATCH, float64)
        ticket = cuda.shared.array(2, int32)
        words = cuda.shared.array(_WORDS_KEPT, uint32, 16)
        first = cuda.threadIdx.x == 0
        if first:
            number = add(counters, np.int32(1))
            ticket[0], ticket[1] = number // blocks, number % blocks
        cuda.syncthreads()
        i, slice_ = np.int64(ticket[0]), np.int64(ticket[1])
        begin = slice_ * share
        end = min(begin + share, size)
        s, t, g = row_at(student, i), row_at(teacher, i), row_at(gradient, i)
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
        adjacent = itemsize(s[2]) == 2 or (soft and itemsize(t[2]) == 2)
        whole = whole_octets(s) and (not soft or whole_octets(t))
        octets = octets_of_slice(begin, end, adjacent)
        keep_slice(s, t, octets, end, share, words, whole, like)
        maxima, z_s, z_h, z_t, w = gather_quickly(octets, share, words, rates, tags, like, shared)
        bad = np.int64(2 * size)
        if no_good(maxima, z_s, z_t, w, rates):
            maxima, z_s, z_h, z_t, w = gather_with_care(octets, share, words, rates, tags, like, shared)
            if math.isnan(z_s):
                bad = first_bad_class(s, begin, end, shared)
            elif soft and math.isnan(z_t):
                bad = first_bad_class(t, begin, end, shared)

        row = published + 8 * PUBLISHED * blocks * i
        if first:
            publish(row + 8 * PUBLISHED * slice_, maxima, z_s, z_h, z_t, w, np.float64(bad))
            if hard:  # while the logits are still there, of which a gradient may take the place
                shared[1, 3] = load_real(s[0] + label * s[1], s[2])
                if soft:
                    shared[1, 4] = load_real(t[0] + label * t[1], t[2])
            arrived = counters + 4 * (1 + i)
            add_release(arrived, np.int32(1))
            while load_acquire(arrived) < blocks:
                cuda.nanosleep(64)
        if cuda.threadIdx.x < _WARP:
            cuda.syncwarp()
            exact, z_s, z_h, z_t, w = merged(row, blocks, rates, like)
            if first:
                maxima = cast(exact[0], like), cast(exact[1], like)
                scale = weight / load_stored(denominator, np.float64(0))
                of_s, of_h, of_t = offsets_of(maxima, rates)
                hard_q, soft_q, soft_p = factors_of(scale, alpha, kd_scale, temperature, z_s, z_h, z_t)
                shared[1, 0], shared[1, 1], shared[1, 2] = hard_q * of_h, soft_q * of_s, soft_p * of_t
                shared[1, 5], shared[1, 6], shared[1, 7] = z_h / of_h, exact[0], exact[1]
                shared[1, 8] = 1.0 if is_usable(z_s) and (not soft or is_usable(z_t)) else 0.0
        cuda.syncthreads()
        usable = shared[1, 8] == 1.0
        if first and slice_ == 0:
            if usable:
                scale = weight / load_stored(denominator, np.float64(0))
                ce, kl = 0.0, 0.0
                if hard:
                    ce = scale * cross_entropy_of(cast(shared[1, 3], like), cast(shared[1, 6], like), z_h)
                if soft:
                    kl = scale * kd_scale * _forward_kl_from_sums(w, z_t, z_s, teacher_temperature)
                write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
                report(status, i, OK, 0)
            else:
                write_results(results, i, math.nan, math.nan, math.nan)
                student_is_bad = not is_usable(z_s)
                condition, v = condition_of(first_bad_of(row, blocks, student_is_bad, size), size)
                report(status, i, (STUDENT if student_is_bad else TEACHER) + condition, v)
        if not given(gradient):
            return
        if not usable:
            fill_row(g, begin, end, math.nan)
            return
        maxima = cast(shared[1, 6], like), cast(shared[1, 7], like)
        factors = cast(shared[1, 0], like), cast(shared[1, 1], like), cast(shared[1, 2], like)
        whole = whole_octets(g) and (adjacent or itemsize(g[2]) != 2)
        if large(maxima, rates):
            spend_with_care(g, octets, end, share, words, maxima, rates, tags, factors, False)
        else:
            spend_quickly(g, octets, end, share, words, maxima, rates, tags, factors, whole)
        if hard and begin <= label < end:
            cuda.syncthreads()
            if first:  # over what the slice's gradient is
                x, y, z = cast(shared[1, 3], like), cast(shared[1, 4], like), cast(shared[1, 5], like)
                of_label = spend_one(x, y, z, maxima, rates, factors, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0))
                store_real(g[0] + label * g[1], of_label, g[2])

    return kernel
