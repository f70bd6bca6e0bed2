"""The KD kernel of several blocks a row: each logit is read from memory once, and waits in shared memory for the sums.

A row's classes are cut into as many slices as blocks work on it, a **group** of blocks. A block works the same slice of
one row after another: it keeps the slice, publishes its sums, waits until all of the group have published theirs, and
writes its part of the gradient from the sums of all, which each block merges alike; while it writes, the same slice of
the group's next row takes the place of what it has written the gradient of. The group's first block writes results.

At first a block takes a **ticket**, which says what group it is in: so the blocks of a group start one after another,
and one that waits for the others never waits for one that cannot start, as long as a group's blocks fit the device
together. :mod:`kdcore.cuda.plans` lets a group have half as many blocks as there are multiprocessors, of which each
holds two or more, so that this is true beside other calls.

What a block publishes of a row is a **record** of PUBLISHED float64: m_s, z_s, z_h, m_t, z_t, w, what
:func:`kdcore.cuda.rows.first_bad_class` found where a sum is NaN, and the label's logit where it is in the slice. All
are blank before, which no number is (:func:`kdcore.cuda.primitives.is_blank`), and each says by itself that it is
there: so there is no order of writing or reading to keep, and nothing to wait for but the numbers.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float32, float64, int64, uint32

from kdcore import formulas
from kdcore.cuda.distillation import questions, rebase_of, stages
from kdcore.cuda.kernels import (
    given,
    kernel_of,
    label_at,
    masked_or_bad,
    report,
    row_at,
    shares_of,
    weight_at,
    write_results,
)
from kdcore.cuda.primitives import (
    add,
    bind,
    cast,
    device,
    is_blank,
    itemsize,
    keep_async,
    keep_stored,
    keep_words,
    kept_stored,
    kept_words,
    load_published,
    load_stored,
    maxima_of_words,
    maximum,
    octet_of_words,
    shared_address_of,
    store_published,
    store_real,
    store_stored,
    to_real,
    to_stored,
    wait_for_copies,
    words_of_octet,
)
from kdcore.cuda.rows import (
    SCRATCH,
    block_maxima,
    block_sums,
    condition_of,
    cross_entropy_of,
    exp2_small,
    fill_row,
    first_bad_class,
    is_usable,
    lane_and_warp,
    largest,
    octet_of,
    warp_maximum,
    warp_totals,
    whole_octets,
    write_octet,
)
from kdcore.cuda.sweeps import sweeps
from kdcore.rowstatus import OK, STUDENT, TEACHER

__all__ = [
    "BLANK",
    "MOST_BLOCKS",
    "MOST_THREADS",
    "PUBLISHED",
    "group_kernel",
    "octets_per_thread",
    "resident_blocks",
    "share_of",
]

#: Blocks of a group at most: two for each lane of the warp that merges them.
MOST_BLOCKS = 64
PUBLISHED = 8
#: What records are filled with, as int64, and tickets count from.
BLANK = -1
_RECORD = 8 * PUBLISHED
_WARP = 32

#: What a block's shared memory has of a row, for two rows in turn: integers, the label, whether the row is to be
#: worked, what is wrong, its detail, whether it can be read and written by 16 bytes, and replaced while it is spent.
_LABEL, _STATE, _CODE, _DETAIL, _WHOLE, _AHEAD, _INTEGERS = range(7)
_WORKED, _MASKED, _BAD = range(3)
#: And numbers: weight / denominator, what of it goes to cross-entropy and to the divergence; and, of the first of the
#: two alone, the denominator.
_SCALE, _HARD, _SOFT, _TOTAL, _SCALES = range(5)
#: For one row: z_s, z_t, z_h and w; what each is divided by for the gradient's factors, and what z_h is divided by for
#: the label; the maxima; the label's logits.
_Z_S, _Z_T, _Z_H, _W, _OF_S, _OF_T, _OF_H, _OF_W, _BELOW, _M_S, _M_T, _X, _Y, _NUMBERS = range(14)
#: For all rows: the slice, its first class, its classes, the groups; and whether a row is to be gathered again.
_SLICE, _BEGIN, _COUNT, _GROUPS, _AGAIN, _CONSTANTS = range(6)

#: Threads of a block, and bytes of both rows that it keeps: 4 octets a thread of float32, 8 of 16-bit types.
MOST_THREADS = 128
_KEPT = 4 * MOST_THREADS * 64
_WORDS_KEPT = _KEPT // 4
# Shapes of shared arrays, which Numba takes as constants alone.
_TOPS, _ABOUT, _SCALES_OF = (2, MOST_THREADS // _WARP), (2, _INTEGERS), (2, _SCALES)

_kd_loss = bind(formulas.kd_loss)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)


def octets_per_thread(threads, student_itemsize, teacher_itemsize):
    """How many octets of both rows a thread keeps, of elements of 2 or 4 bytes."""
    return _KEPT // (8 * (student_itemsize + teacher_itemsize) * threads)


def share_of(size, blocks, threads, student_itemsize, teacher_itemsize):
    """Classes of a slice: of 16-bit rows any multiple of 8, of others such that only a row's last slice has a rest."""
    unit = 8 if 2 in (student_itemsize, teacher_itemsize) else 8 * threads
    return -(-size // (unit * blocks)) * unit


def resident_blocks(shared_memory):
    """Blocks that are to share a multiprocessor with so many bytes of shared memory: of more, registers would spill."""
    return min(6, shared_memory // (_KEPT + (3 << 10)))


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
    nothing = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

    @device
    def octets_of_slice(constants, adjacent):
        """(a, b - a) of a thread's first octet in a slice, how many lie in it as a whole, and how many begin in it.

        Which classes they have is as :func:`kdcore.cuda.rows.octets_of` says.
        """
        thread = np.int32(cuda.threadIdx.x)
        start, gap = (np.int32(8 * thread), np.int32(4)) if adjacent else (np.int32(4 * thread), np.int32(4 * threads))
        left = np.int32(np.int32(constants[_COUNT]) - start)
        inside = np.int32((left - gap - 4 + step) // step) if left >= gap + 4 else np.int32(0)
        return start, gap, inside, np.int32((left + step - 1) // step) if left > 0 else np.int32(0)

    @device
    def places_of(words, share, tags):
        """Where a thread keeps its octets of both rows, and how far the next ones are."""
        next_s, next_t = half * (itemsize(tags[0]) // 2), half * (itemsize(tags[1]) // 2)
        place_s = shared_address_of(words) + 16 * np.int64(cuda.threadIdx.x)
        return place_s, place_s + (share + step - 1) // step * next_s, next_s, next_t

    @device
    def is_in_line(row, adjacent):
        """Whether a row that cannot be read by 16 bytes lies in memory as a slice of it does in shared memory."""
        return row[1] == itemsize(row[2]) and (itemsize(row[2]) == 2 or not adjacent)

    @cuda.jit(device=True)
    def keep_in_line(row, begin, end, place):
        """A slice is kept from a place on, element by element: neighbours by neighbouring threads."""
        tag, size = row[2], itemsize(row[2])
        source, n, count = row[0] + begin * size, np.int64(cuda.threadIdx.x), end - begin
        while n + 7 * threads < count:
            x = source + n * size
            a, b = load_stored(x, tag), load_stored(x + threads * size, tag)
            c, d = load_stored(x + 2 * threads * size, tag), load_stored(x + 3 * threads * size, tag)
            e, f = load_stored(x + 4 * threads * size, tag), load_stored(x + 5 * threads * size, tag)
            g, h = load_stored(x + 6 * threads * size, tag), load_stored(x + 7 * threads * size, tag)
            y = place + n * size
            keep_stored(y, a)
            keep_stored(y + threads * size, b)
            keep_stored(y + 2 * threads * size, c)
            keep_stored(y + 3 * threads * size, d)
            keep_stored(y + 4 * threads * size, e)
            keep_stored(y + 5 * threads * size, f)
            keep_stored(y + 6 * threads * size, g)
            keep_stored(y + 7 * threads * size, h)
            n += 8 * threads
        while n < count:
            keep_stored(place + n * size, load_stored(source + n * size, tag))
            n += threads
        while n < (count + step - 1) // step * step:
            keep_stored(place + n * size, to_stored(-math.inf, tag))
            n += threads

    @cuda.jit(device=True)
    def write_in_line(row, begin, end, place):
        """A slice is written from what is kept from a place on, as :func:`keep_in_line` reads it."""
        tag, size = row[2], itemsize(row[2])
        to, n, count = row[0] + begin * size, np.int64(cuda.threadIdx.x), end - begin
        while n + 3 * threads < count:
            x = place + n * size
            a, b = kept_stored(x, tag), kept_stored(x + threads * size, tag)
            c, d = kept_stored(x + 2 * threads * size, tag), kept_stored(x + 3 * threads * size, tag)
            y = to + n * size
            store_stored(y, a)
            store_stored(y + threads * size, b)
            store_stored(y + 2 * threads * size, c)
            store_stored(y + 3 * threads * size, d)
            n += 4 * threads
        while n < count:
            store_stored(to + n * size, kept_stored(place + n * size, tag))
            n += threads

    @cuda.jit(device=True)
    def keep_row(row, constants, done, place, next_place, adjacent, like):
        """A slice of a row is kept, with -inf beyond its end; see :func:`keep_slice`."""
        start, gap, inside, count = octets_of_slice(constants, adjacent)
        begin, whole = constants[_BEGIN], whole_octets(row)
        end = begin + constants[_COUNT]
        if not whole and is_in_line(row, adjacent):
            keep_in_line(row, begin, end, place - 16 * np.int64(cuda.threadIdx.x))
            return
        quick, source = inside if whole else np.int32(0), row[0] + (begin + start + done * step) * itemsize(row[2])
        place += done * next_place
        for _ in range(done, quick):
            keep_async(place, half, source, np.int64(0), gap, row[2])
            source += step * itemsize(row[2])
            place += next_place
        for k in range(quick, count):
            a = begin + start + k * step
            keep_words(place, half, words_of_octet(octet_of(row, a, a + gap, end, False, like), row[2]), row[2])
            place += next_place

    @device
    def are_whole(s, t):
        """Whether both rows can be read by 16 bytes, so that a thread keeps what it works, and no more."""
        return whole_octets(s) and (not soft or whole_octets(t))

    @device
    def is_written_whole(g, adjacent):
        """Whether a gradient can be written by 16 bytes."""
        return whole_octets(g) and (adjacent or itemsize(g[2]) != 2)

    @device
    def keep_slice(s, t, constants, done, share, words, adjacent, like):
        """A slice of both rows is kept, of which so many octets of this thread have been already.

        For this thread that is so after ``wait_for_copies``; for others, unless the rows are whole, after a barrier.
        """
        place_s, place_t, next_s, next_t = places_of(words, share, (s[2], t[2]))
        keep_row(s, constants, done, place_s, next_s, adjacent, like)
        if soft:
            keep_row(t, constants, done, place_t, next_t, adjacent, like)

    @device
    def kept_class(o, place, next_place, adjacent, tag):
        """A slice's class o, of a row whose first thread keeps its octets from a place on."""
        size = itemsize(tag)
        if size == 2 or not adjacent:
            place += o * size
        else:
            place += o // step * next_place + (o & 4) // 4 * half + o % step // 8 * 16 + (o & 3) * 4
        return to_real(kept_stored(place, tag))

    @device
    def kept(place_s, place_t, tags):
        """An octet of both rows."""
        x = octet_of_words(kept_words(place_s, half, tags[0]), tags[0])
        y = x
        if soft:
            y = octet_of_words(kept_words(place_t, half, tags[1]), tags[1])
        return x, y

    @cuda.jit(device=True)
    def tops_of(constants, share, words, tags, adjacent, like):
        """The maxima of a thread's octets, which are kept; -inf if there are none."""
        place_s, place_t, next_s, next_t = places_of(words, share, tags)
        none = cast(-math.inf, like)
        low = none, none, none, none, none, none, none, none
        top_s, top_t = words_of_octet(low, tags[0]), words_of_octet(low, tags[1])
        for _ in range(octets_of_slice(constants, adjacent)[3]):
            top_s = maxima_of_words(top_s, kept_words(place_s, half, tags[0]), tags[0])
            place_s += next_s
            if soft:
                top_t = maxima_of_words(top_t, kept_words(place_t, half, tags[1]), tags[1])
                place_t += next_t
        return largest(octet_of_words(top_s, tags[0])), largest(octet_of_words(top_t, tags[1]))

    quick, with_care = stages(parts, False), stages(parts, True)

    def gathering(careful):
        """The function that returns a thread's sums, relative to maxima, by one of the ways."""
        of_way = with_care if careful else quick
        sums_at, add_octet = of_way.sums_at, of_way.add_octet

        @cuda.jit(device=True)
        def gather(maxima, constants, share, words, rates, tags, adjacent):
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            sums = sums_at(maxima, rates)
            for _ in range(octets_of_slice(constants, adjacent)[3]):
                x, y = kept(place_s, place_t, tags)
                sums = add_octet(sums, x, y, rates)
                place_s += next_s
                place_t += next_t
            return sums

        return gather

    gather_quickly, gather_carefully = gathering(careful=False), gathering(careful=True)

    @cuda.jit(device=True)
    def write_tops(top_s, top_t, tops):
        """A warp's maxima, for :func:`slice_maxima` after a barrier; ``tops`` is float32 [2, warps]."""
        top_s, top_t = warp_maximum(top_s), warp_maximum(top_t)
        lane, warp = lane_and_warp()
        if lane == 0:
            tops[0, warp], tops[1, warp] = top_s, top_t

    @device
    def slice_maxima(tops, rates, like):
        """What the sums of a slice that is gathered quickly are relative to."""
        top_s, top_t = quick.floors(rates, like)
        for k in range(threads // _WARP):
            top_s, top_t = maximum(top_s, tops[0, k]), maximum(top_t, tops[1, k])
        return top_s, top_t

    @cuda.jit(device=True)
    def sum_up(sums, shared):
        """A warp's sums, of threads that have the same maxima, for :func:`summed_up` after a barrier."""
        _, _, z_s, low_s, z_h, low_h, _, _, z_t, low_t, w, low_w = sums
        own = warp_totals(
            np.float64(z_s) + np.float64(low_s), np.float64(z_h) + np.float64(low_h),
            np.float64(z_t) + np.float64(low_t), np.float64(w) + np.float64(low_w),
        )  # fmt: skip
        lane, warp = lane_and_warp()
        if lane & 7 == 0:
            shared[2 + (lane >> 3), warp] = own

    @cuda.jit(device=True)
    def summed_up(maxima, rates, like, shared):
        """(z_s, z_h, z_t, w) of a slice that has been gathered quickly, relative to its maxima."""
        z_s, z_t, z_h, w = shared[2, 0], shared[3, 0], shared[4, 0], shared[5, 0]
        for k in range(1, threads // _WARP):
            z_s, z_t, z_h, w = z_s + shared[2, k], z_t + shared[3, k], z_h + shared[4, k], w + shared[5, k]
        m_s, r_s, _, _, _, _, m_t, r_t, _, _, _, _ = quick.sums_at(maxima, rates)
        sums = m_s, r_s, z_s, 0.0, z_h, 0.0, m_t, r_t, z_t, 0.0, w, 0.0
        z_s, z_h, z_t, w = quick.settle(sums, maxima, rates, like)
        return z_s, z_h, z_t, w * quick.unit(rates[4])

    @cuda.jit(device=True)
    def gathered_with_care(tops, constants, share, words, rates, tags, adjacent, like, shared):
        """(maxima, z_s, z_h, z_t, w) of a slice, from the maxima of a thread."""
        low_s, low_t = with_care.floors(rates, like)
        own = maximum(tops[0], low_s), maximum(tops[1], low_t)
        sums = gather_carefully(own, constants, share, words, rates, tags, adjacent)
        maxima = block_maxima(sums[0], sums[6], shared)
        z_s, z_h, z_t, w = with_care.settle(sums, maxima, rates, like)
        z_s, z_h, z_t, w = block_sums(z_s, z_h, z_t, w, shared)
        return maxima, z_s, z_h, z_t, w * with_care.unit(rates[4])

    def spending(careful):
        """The function that writes a slice's gradient by one of the ways, but for what the label adds."""
        of_way = with_care if careful else quick
        references_of, spend = of_way.references, of_way.spend

        @cuda.jit(device=True)
        def spend_slice(g, constants, share, words, maxima, rates, tags, factors, adjacent, ahead, s, t):
            """``ahead``: octets that are spent are replaced by those of the rows s and t. Returns how many were."""
            references = references_of(maxima, rates)
            start, gap, inside, count = octets_of_slice(constants, adjacent)
            begin = constants[_BEGIN]
            end = begin + constants[_COUNT]
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            whole = is_written_whole(g, adjacent)
            if itemsize(g[2]) == itemsize(tags[0]) and not whole and is_in_line(g, adjacent):
                # Where the student's logits are kept, the gradient is, for threads to write neighbours of each other.
                for _ in range(count):
                    x, y = kept(place_s, place_t, tags)
                    z = spend(x, y, references, rates, factors, nothing)
                    keep_words(place_s, half, words_of_octet(z, g[2]), g[2])
                    place_s += next_s
                    place_t += next_t
                cuda.syncthreads()
                write_in_line(g, begin, end, shared_address_of(words))
                return np.int32(0)
            quick = inside if whole and not careful else np.int32(0)
            to = g[0] + (begin + start) * itemsize(g[2])
            from_s, from_t = s[0] + (begin + start) * itemsize(tags[0]), t[0] + (begin + start) * itemsize(tags[1])
            for _ in range(quick):
                x, y = kept(place_s, place_t, tags)
                z = spend(x, y, references, rates, factors, nothing)
                write_octet((to, g[1], g[2]), np.int64(0), gap, end, True, z)
                if ahead:
                    keep_async(place_s, half, from_s, np.int64(0), gap, tags[0])
                    from_s += step * itemsize(tags[0])
                    if soft:
                        keep_async(place_t, half, from_t, np.int64(0), gap, tags[1])
                        from_t += step * itemsize(tags[1])
                to += step * itemsize(g[2])
                place_s += next_s
                place_t += next_t
            for k in range(quick, count):
                x, y = kept(place_s, place_t, tags)
                z = spend(x, y, references, rates, factors, nothing)
                a = begin + start + k * step
                write_octet(g, a, a + gap, end, False, z)
                place_s += next_s
                place_t += next_t
            return quick if ahead else np.int32(0)

        return spend_slice

    spend_quickly, spend_carefully = spending(careful=False), spending(careful=True)

    @device
    def publish(place, maxima, z_s, z_h, z_t, w, bad, x):
        store_published(place, np.float64(maxima[0]), z_s)
        store_published(place + 16, z_h, np.float64(maxima[1]))
        store_published(place + 32, z_t, w)
        store_published(place + 48, bad, x)

    @device
    def look_up(about, scales, weight, label, found, total, alpha, kd_scale, temperature):
        """What a block is to know of a row before it works it; by one thread."""
        masked, code, detail = found
        about[_LABEL], about[_CODE], about[_DETAIL] = label, code, detail
        about[_STATE] = _MASKED if masked else (_WORKED if code == OK else _BAD)
        scale = weight / total
        scales[_SCALE] = scale
        scales[_HARD], scales[_SOFT] = shares_of(scale, alpha, kd_scale, temperature)

    @device
    def published_by(row, k, blocks):
        """(m_s, z_s, z_h, m_t, z_t, w) of a row's block, and whether it has published; of one that there is not, what
        changes nothing."""
        if k >= blocks:
            return -math.inf, 0.0, 0.0, -math.inf, 0.0, 0.0, True
        place = row + _RECORD * k
        m_s, z_s = load_published(place)
        z_h, m_t = load_published(place + 16)
        z_t, w = load_published(place + 32)
        bad, x = load_published(place + 48)
        blank = is_blank(m_s) or is_blank(z_s) or is_blank(z_h) or is_blank(m_t) or is_blank(z_t) or is_blank(w)
        return m_s, z_s, z_h, m_t, z_t, w, not (blank or is_blank(bad) or is_blank(x))

    @cuda.jit(device=True)
    def merged(row, blocks, rates, like):
        """(maxima, sum) of a row, once all of its blocks have published; for one warp, of which lanes 0 to 7 get z_s,
        and then, eight each, z_t, z_h and w."""
        lane, _ = lane_and_warp()
        while True:
            m_s, z_s, z_h, m_t, z_t, w, there = published_by(row, lane, blocks)
            n_s, y_s, y_h, n_t, y_t, v, there_too = published_by(row, lane + _WARP, blocks)
            if there and there_too:
                break
            cuda.nanosleep(20)
        cuda.syncwarp()
        top_s, top_t = cast(maximum(m_s, n_s), like), cast(maximum(m_t, n_t), like)
        maxima = warp_maximum(top_s), warp_maximum(top_t)
        z_s, z_h, z_t, w = rebase(m_s, z_s, z_h, m_t, z_t, w, maxima, rates, like)
        if blocks > _WARP:
            y_s, y_h, y_t, v = rebase(n_s, y_s, y_h, n_t, y_t, v, maxima, rates, like)
            z_s, z_h, z_t, w = z_s + y_s, z_h + y_h, z_t + y_t, w + v
        return maxima, warp_totals(z_s, z_h, z_t, w)

    @device
    def first_bad_of(row, blocks, student, size):
        """Of the slices whose sums of the student, or of the teacher, are NaN, the first bad class."""
        least = np.float64(2 * size)
        for k in range(blocks):
            of_block = row + _RECORD * k
            z_s, z_t = load_published(of_block)[1], load_published(of_block + 32)[0]
            if math.isnan(z_s if student else z_t):
                least = min(least, load_published(of_block + 48)[0])
        return np.int64(least)

    @kernel_of(threads, resident)
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, rates, size, like, gradient, results, status, rows, blocks, share, tickets, published,
    ):  # fmt: skip
        """As the row kernel, by groups of ``blocks`` blocks, each with ``share`` classes of a row, a multiple of 8.

        tickets: address of an int32 that is BLANK. published: address of float64 [rows, blocks, PUBLISHED], all of its
        bits those of BLANK.
        """
        shared = cuda.shared.array(SCRATCH, float64)
        tops = cuda.shared.array(_TOPS, float32)
        about = cuda.shared.array(_ABOUT, int64)
        scales = cuda.shared.array(_SCALES_OF, float64)
        numbers = cuda.shared.array(_NUMBERS, float64)
        constants = cuda.shared.array(_CONSTANTS, int64)
        words = cuda.shared.array(_WORDS_KEPT, uint32, 16)
        first = cuda.threadIdx.x == 0
        tags = student[3], teacher[3]
        adjacent = itemsize(tags[0]) == 2 or (soft and itemsize(tags[1]) == 2)
        # What does not change from row to row is in shared memory, so that it takes no registers.
        if first:
            ticket = np.int64(add(tickets, np.int32(1))) - BLANK
            i = ticket // blocks
            slice_ = ticket - i * blocks
            constants[_SLICE], constants[_BEGIN], constants[_GROUPS] = slice_, slice_ * share, cuda.gridDim.x // blocks
            constants[_COUNT] = min((slice_ + 1) * share, size) - slice_ * share
            scales[0, _TOTAL] = load_stored(denominator, np.float64(0))
            shared[6, 0] = i
            weight, label = weight_at(weights, i), label_at(labels, i)
            look_up(
                about[0], scales[0], weight, label, masked_or_bad(labels, weights, ignore_index, label, weight, size),
                scales[0, _TOTAL], alpha, kd_scale, temperature,
            )  # fmt: skip
            about[0, _WHOLE] = are_whole(row_at(student, i), row_at(teacher, i))
        cuda.syncthreads()
        i, turn = np.int64(shared[6, 0]), 0
        if about[0, _STATE] == _WORKED:
            keep_slice(
                row_at(student, i), row_at(teacher, i), constants, np.int32(0), share, words, adjacent, like
            )  # fmt: skip
        while i < rows:
            following = i + constants[_GROUPS]
            ahead, done = False, np.int32(0)
            if about[turn, _STATE] != _WORKED:
                of_all = 0.0 if about[turn, _STATE] == _MASKED else math.nan
                cuda.syncthreads()  # others may still read of the last row what is to become that of the next
                if first:
                    if constants[_SLICE] == 0:
                        write_results(results, i, of_all, of_all, of_all)
                        report(status, i, about[turn, _CODE], about[turn, _DETAIL])
                    if following < rows:
                        weight, label = weight_at(weights, following), label_at(labels, following)
                        look_up(
                            about[1 - turn], scales[1 - turn], weight, label,
                            masked_or_bad(labels, weights, ignore_index, label, weight, size),
                            scales[0, _TOTAL], alpha, kd_scale, temperature,
                        )  # fmt: skip
                        about[1 - turn, _WHOLE] = are_whole(row_at(student, following), row_at(teacher, following))
                if given(gradient):
                    fill_row(
                        row_at(gradient, i), constants[_BEGIN], constants[_BEGIN] + constants[_COUNT], of_all
                    )  # fmt: skip
                cuda.syncthreads()
            else:
                wait_for_copies()
                if about[turn, _WHOLE] == 0:
                    cuda.syncthreads()
                top_s, top_t = tops_of(constants, share, words, tags, adjacent, like)
                write_tops(top_s, top_t, tops)
                cuda.syncthreads()
                maxima = slice_maxima(tops, rates, like)
                sum_up(gather_quickly(maxima, constants, share, words, rates, tags, adjacent), shared)
                cuda.syncthreads()
                z_s, z_h, z_t, w, bad, care = 0.0, 0.0, 0.0, 0.0, np.float64(2 * size), False
                while True:
                    if cuda.threadIdx.x < _WARP:
                        if not care:
                            maxima = slice_maxima(tops, rates, like)
                            z_s, z_h, z_t, w = summed_up(maxima, rates, like, shared)
                        again = not care and no_good(maxima, z_s, z_h, z_t, w, rates)
                        if first:
                            constants[_AGAIN] = again
                        if not again:
                            row = published + _RECORD * blocks * i
                            if first:
                                x, o = 0.0, about[turn, _LABEL] - constants[_BEGIN]
                                if hard and 0 <= o < constants[_COUNT]:
                                    # Whoever kept them has waited for copies, and met this thread at a barrier.
                                    place_s, place_t, next_s, next_t = places_of(words, share, tags)
                                    x = np.float64(kept_class(o, place_s, next_s, adjacent, tags[0]))
                                    numbers[_X] = x
                                    if soft:
                                        numbers[_Y] = np.float64(kept_class(o, place_t, next_t, adjacent, tags[1]))
                                publish(row + _RECORD * constants[_SLICE], maxima, z_s, z_h, z_t, w, bad, x)
                                # Until the others have published, there is time for the next row.
                                about[turn, _AHEAD] = 0
                                if following < rows:
                                    weight, label = weight_at(weights, following), label_at(labels, following)
                                    look_up(
                                        about[1 - turn], scales[1 - turn], weight, label,
                                        masked_or_bad(labels, weights, ignore_index, label, weight, size),
                                        scales[0, _TOTAL], alpha, kd_scale, temperature,
                                    )  # fmt: skip
                                    whole = are_whole(row_at(student, following), row_at(teacher, following))
                                    about[1 - turn, _WHOLE] = whole
                                    if whole and about[turn, _WHOLE] == 1 and about[1 - turn, _STATE] == _WORKED:
                                        about[turn, _AHEAD] = is_written_whole(row_at(gradient, i), adjacent)
                            cuda.syncwarp()
                            maxima, own = merged(row, blocks, rates, like)
                            lane, _ = lane_and_warp()
                            x_s, x_h, x_t = offsets_of(maxima, rates)
                            offset = x_s if lane < 8 else (x_t if lane < 16 else x_h)
                            share_of_row = scales[turn, _SOFT] if lane < 16 else scales[turn, _HARD]
                            below = exp2_small(offset)
                            if lane & 7 == 0:
                                numbers[_Z_S + (lane >> 3)] = own
                                numbers[_OF_S + (lane >> 3)] = share_of_row / own * below
                            if lane == 16:
                                numbers[_BELOW], numbers[_M_S], numbers[_M_T] = below, maxima[0], maxima[1]
                    cuda.syncthreads()
                    if constants[_AGAIN] == 0:
                        break
                    begin, care = constants[_BEGIN], True
                    maxima, z_s, z_h, z_t, w = gathered_with_care(
                        tops_of(constants, share, words, tags, adjacent, like),
                        constants, share, words, rates, tags, adjacent, like, shared,
                    )  # fmt: skip
                    if math.isnan(z_s):
                        bad = np.float64(
                            first_bad_class(row_at(student, i), begin, begin + constants[_COUNT], shared)
                        )  # fmt: skip
                    elif soft and math.isnan(z_t):
                        bad = np.float64(
                            first_bad_class(row_at(teacher, i), begin, begin + constants[_COUNT], shared)
                        )  # fmt: skip

                maxima = cast(numbers[_M_S], like), cast(numbers[_M_T], like)
                factors = cast(numbers[_OF_H], like), cast(numbers[_OF_S], like), cast(numbers[_OF_T], like)
                usable = is_usable(numbers[_Z_S]) and (not soft or is_usable(numbers[_Z_T]))
                g = row_at(gradient, i)
                if given(gradient) and not usable:
                    fill_row(g, constants[_BEGIN], constants[_BEGIN] + constants[_COUNT], math.nan)
                if given(gradient) and usable:
                    s, t = row_at(student, following), row_at(teacher, following)
                    if large(maxima, rates):
                        spend_carefully(
                            g, constants, share, words, maxima, rates, tags, factors, adjacent, False, s, t
                        )  # fmt: skip
                    else:
                        ahead = about[turn, _AHEAD] == 1
                        done = spend_quickly(
                            g, constants, share, words, maxima, rates, tags, factors, adjacent, ahead, s, t
                        )  # fmt: skip
                    label = about[turn, _LABEL]
                    if hard and 0 <= label - constants[_BEGIN] < constants[_COUNT]:
                        cuda.syncthreads()
                        if first:  # over what the slice's gradient is
                            above = cast(numbers[_Z_H] / numbers[_BELOW], like)
                            x, y = cast(numbers[_X], like), cast(numbers[_Y], like)
                            store_real(
                                g[0] + label * g[1], spend_one(x, y, above, maxima, rates, factors, nothing), g[2]
                            )  # fmt: skip
                if first and constants[_SLICE] == 0:
                    row = published + _RECORD * blocks * i
                    if usable:
                        ce, kl, scale = 0.0, 0.0, scales[turn, _SCALE]
                        if hard:
                            x = load_published(row + _RECORD * (about[turn, _LABEL] // share) + 48)[1]
                            ce = scale * cross_entropy_of(cast(x, like), maxima[0], numbers[_Z_H])
                        if soft:
                            divergence = _forward_kl_from_sums(
                                numbers[_W], numbers[_Z_T], numbers[_Z_S], teacher_temperature
                            )  # fmt: skip
                            kl = scale * kd_scale * divergence
                        write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
                        report(status, i, OK, 0)
                    else:
                        write_results(results, i, math.nan, math.nan, math.nan)
                        student_is_bad = not is_usable(numbers[_Z_S])
                        condition, v = condition_of(first_bad_of(row, blocks, student_is_bad, size), size)
                        report(status, i, (STUDENT if student_is_bad else TEACHER) + condition, v)
            i, turn = following, 1 - turn
            if i < rows and about[turn, _STATE] == _WORKED:
                if not ahead:
                    cuda.syncthreads()  # others may still read what is to be replaced
                keep_slice(row_at(student, i), row_at(teacher, i), constants, done, share, words, adjacent, like)

    return kernel
