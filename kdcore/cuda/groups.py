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
from numba import cuda, float64, int64, uint32

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
    fill_row,
    first_bad_class,
    is_usable,
    largest,
    octet_of,
    warp_maximum,
    warp_total,
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

#: What a block's shared memory has of a row: numbers.
_WEIGHT, _SCALE, _X, _Y, _HARD, _SOFT_Q, _SOFT_P, _ABOVE, _M_S, _M_T, _Z_S, _Z_H, _Z_T, _W, _LABEL_OF, _NUMBERS = range(
    16
)
#: And integers: the label, whether the row is to be worked, what is wrong, its detail; and of all rows, so that they
#: take no registers, the slice, its first class, the one after its last, and the groups.
_LABEL, _STATE, _CODE, _DETAIL, _SLICE, _BEGIN, _END, _GROUPS, _INTEGERS = range(9)
_WORKED, _MASKED, _BAD = range(3)

#: Threads of a block, and bytes of both rows that it keeps: 4 octets a thread of float32, 8 of 16-bit types.
MOST_THREADS = 128
_KEPT = 4 * MOST_THREADS * 64
_WORDS_KEPT = _KEPT // 4

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
    def octets_of_slice(integers, adjacent):
        """(a, b - a) of a thread's first octet, how many lie before the end as a whole, and how many begin before it.

        Which classes they have is as :func:`kdcore.cuda.rows.octets_of` says.
        """
        begin, end, thread = integers[_BEGIN], integers[_END], np.int64(cuda.threadIdx.x)
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
    def keep_row(row, octets, begin, end, done, place, next_place, adjacent, like):
        """A slice of a row is kept, with -inf beyond its end; see :func:`keep_slice`."""
        start, gap, inside, count = octets
        whole = whole_octets(row)
        if not whole and is_in_line(row, adjacent):
            keep_in_line(row, begin, end, place - 16 * np.int64(cuda.threadIdx.x))
            return
        quick, source = inside if whole else np.int32(0), row[0] + (start + done * step) * itemsize(row[2])
        place += done * next_place
        for _ in range(done, quick):
            keep_async(place, half, source, np.int64(0), gap, row[2])
            source += step * itemsize(row[2])
            place += next_place
        for k in range(quick, count):
            a = start + k * step
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
    def keep_slice(student, teacher, i, integers, done, share, words, adjacent, like):
        """A slice of row i of both is kept, of which so many octets of this thread have been already.

        For this thread that is so after ``wait_for_copies``; for others, unless the rows are whole, after a barrier.
        """
        s, t = row_at(student, i), row_at(teacher, i)
        begin, end, octets = integers[_BEGIN], integers[_END], octets_of_slice(integers, adjacent)
        place_s, place_t, next_s, next_t = places_of(words, share, (s[2], t[2]))
        keep_row(s, octets, begin, end, done, place_s, next_s, adjacent, like)
        if soft:
            keep_row(t, octets, begin, end, done, place_t, next_t, adjacent, like)

    @device
    def kept_class(o, place, next_place, adjacent, tag):
        """A slice's class o, of a row whose first thread keeps its octets from a place on."""
        size = itemsize(tag)
        if size == 2 or not adjacent:
            place += o * size
        else:
            place += o // step * next_place + o % 8 // 4 * half + o % step // 8 * 16 + o % 4 * 4
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
    def tops_of(integers, share, words, tags, adjacent, like):
        """The maxima of a thread's octets, which are kept; -inf if there are none."""
        place_s, place_t, next_s, next_t = places_of(words, share, tags)
        none = cast(-math.inf, like)
        low = none, none, none, none, none, none, none, none
        top_s, top_t = words_of_octet(low, tags[0]), words_of_octet(low, tags[1])
        for _ in range(octets_of_slice(integers, adjacent)[3]):
            top_s = maxima_of_words(top_s, kept_words(place_s, half, tags[0]), tags[0])
            place_s += next_s
            if soft:
                top_t = maxima_of_words(top_t, kept_words(place_t, half, tags[1]), tags[1])
                place_t += next_t
        return largest(octet_of_words(top_s, tags[0])), largest(octet_of_words(top_t, tags[1]))

    def gathering(careful):
        """The function that returns a slice's maxima and sums by one of the ways."""
        floors, sums_at, _, add_octet, settle, unit = stages(parts, careful)[:6]

        @cuda.jit(device=True)
        def sums_of(tops, integers, share, words, rates, tags, adjacent, like, shared):
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            # A thread's maxima come first, so that no sum is to be rescaled, but wait for no other thread's.
            low_s, low_t = floors(rates, like)
            sums = sums_at((maximum(tops[0], low_s), maximum(tops[1], low_t)), rates)
            for _ in range(octets_of_slice(integers, adjacent)[3]):
                x, y = kept(place_s, place_t, tags)
                sums = add_octet(sums, x, y, rates)
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

        @cuda.jit(device=True)
        def spend_slice(g, integers, share, words, maxima, rates, tags, factors, adjacent, ahead, s, t):
            """``ahead``: octets that are spent are replaced by those of the rows s and t. Returns how many were."""
            references = references_of(maxima, rates)
            begin, end = integers[_BEGIN], integers[_END]
            start, gap, inside, count = octets_of_slice(integers, adjacent)
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
            to = g[0] + start * itemsize(g[2])
            from_s, from_t = s[0] + start * itemsize(tags[0]), t[0] + start * itemsize(tags[1])
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
                write_octet(g, start + k * step, start + k * step + gap, end, False, z)
                place_s += next_s
                place_t += next_t
            return quick if ahead else np.int32(0)

        return spend_slice

    spend_quickly, spend_with_care = spending(careful=False), spending(careful=True)

    @device
    def publish(place, maxima, z_s, z_h, z_t, w, bad, x):
        store_published(place, np.float64(maxima[0]), z_s)
        store_published(place + 16, z_h, np.float64(maxima[1]))
        store_published(place + 32, z_t, w)
        store_published(place + 48, bad, x)

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
        """(maxima, z_s, z_h, z_t, w) of a row, once all of its blocks have published; for one warp."""
        lane = np.int64(cuda.threadIdx.x % _WARP)
        while True:
            m_s, z_s, z_h, m_t, z_t, w, there = published_by(row, lane, blocks)
            n_s, y_s, y_h, n_t, y_t, v, there_too = published_by(row, lane + _WARP, blocks)
            if there and there_too:
                break
            cuda.nanosleep(20)
        cuda.syncwarp()
        maxima = warp_maximum(maximum(m_s, n_s)), warp_maximum(maximum(m_t, n_t))
        z_s, z_h, z_t, w = rebase(m_s, z_s, z_h, m_t, z_t, w, maxima, rates, like)
        if blocks > _WARP:
            y_s, y_h, y_t, v = rebase(n_s, y_s, y_h, n_t, y_t, v, maxima, rates, like)
            z_s, z_h, z_t, w = z_s + y_s, z_h + y_h, z_t + y_t, w + v
        return maxima, warp_total(z_s), warp_total(z_h), warp_total(z_t), warp_total(w)

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

    @device
    def look_up(i, labels, weights, ignore_index, label, weight, size, integers, numbers):
        """What the block is to know of row i before it works it; by one thread."""
        masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
        integers[_LABEL], integers[_CODE], integers[_DETAIL] = label, code, detail
        integers[_STATE] = _MASKED if masked else (_WORKED if code == OK else _BAD)
        numbers[_WEIGHT] = weight

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
        numbers = cuda.shared.array(_NUMBERS, float64)
        integers = cuda.shared.array(_INTEGERS, int64)
        words = cuda.shared.array(_WORDS_KEPT, uint32, 16)
        first = cuda.threadIdx.x == 0
        tags = student[3], teacher[3]
        adjacent = itemsize(tags[0]) == 2 or (soft and itemsize(tags[1]) == 2)
        if first:
            ticket = np.int64(add(tickets, np.int32(1))) - BLANK
            i = ticket // blocks
            slice_ = ticket - i * blocks
            integers[_SLICE], integers[_BEGIN], integers[_END] = slice_, slice_ * share, min((slice_ + 1) * share, size)
            integers[_GROUPS] = np.int64(cuda.gridDim.x) // blocks
            look_up(
                i, labels, weights, ignore_index, label_at(labels, i), weight_at(weights, i), size, integers, numbers
            )  # fmt: skip
            shared[0, 0] = i
        cuda.syncthreads()
        i = np.int64(shared[0, 0])
        if integers[_STATE] == _WORKED:
            keep_slice(student, teacher, i, integers, np.int32(0), share, words, adjacent, like)
        while i < rows:
            ahead, done = False, np.int32(0)
            if integers[_STATE] != _WORKED:
                of_all = 0.0 if integers[_STATE] == _MASKED else math.nan
                if first and integers[_SLICE] == 0:
                    write_results(results, i, of_all, of_all, of_all)
                    report(status, i, integers[_CODE], integers[_DETAIL])
                if given(gradient):
                    fill_row(row_at(gradient, i), integers[_BEGIN], integers[_END], of_all)
                cuda.syncthreads()
                following = i + integers[_GROUPS]
                if first and following < rows:
                    weight, label = weight_at(weights, following), label_at(labels, following)
                    look_up(following, labels, weights, ignore_index, label, weight, size, integers, numbers)
                cuda.syncthreads()
            else:
                wait_for_copies()
                if not are_whole(row_at(student, i), row_at(teacher, i)):
                    cuda.syncthreads()
                tops = tops_of(integers, share, words, tags, adjacent, like)
                maxima, z_s, z_h, z_t, w = gather_quickly(
                    tops, integers, share, words, rates, tags, adjacent, like, shared
                )  # fmt: skip
                bad = np.int64(2 * size)
                if no_good(maxima, z_s, z_h, z_t, w, rates):
                    maxima, z_s, z_h, z_t, w = gather_with_care(
                        tops, integers, share, words, rates, tags, adjacent, like, shared
                    )  # fmt: skip
                    if math.isnan(z_s):
                        bad = first_bad_class(row_at(student, i), integers[_BEGIN], integers[_END], shared)
                    elif soft and math.isnan(z_t):
                        bad = first_bad_class(row_at(teacher, i), integers[_BEGIN], integers[_END], shared)

                has_label = hard and integers[_BEGIN] <= integers[_LABEL] < integers[_END]
                if cuda.threadIdx.x < _WARP:
                    following, label = i + integers[_GROUPS], integers[_LABEL]
                    row, next_weight, next_label = published + _RECORD * blocks * i, 0.0, np.int64(0)
                    if first:
                        x = 0.0
                        if has_label:
                            # Others may have kept them: all have waited for their copies, and met in a reduction.
                            place_s, place_t, next_s, next_t = places_of(words, share, tags)
                            o = label - integers[_BEGIN]
                            x = np.float64(kept_class(o, place_s, next_s, adjacent, tags[0]))
                            numbers[_X] = x
                            if soft:
                                numbers[_Y] = np.float64(kept_class(o, place_t, next_t, adjacent, tags[1]))
                        publish(row + _RECORD * integers[_SLICE], maxima, z_s, z_h, z_t, w, np.float64(bad), x)
                        if following < rows:
                            next_weight, next_label = weight_at(weights, following), label_at(labels, following)
                    cuda.syncwarp()
                    exact, z_s, z_h, z_t, w = merged(row, blocks, rates, like)
                    if first:
                        maxima = cast(exact[0], like), cast(exact[1], like)
                        scale = numbers[_WEIGHT] / load_stored(denominator, np.float64(0))
                        of_s, of_h, of_t = offsets_of(maxima, rates)
                        hard_q, soft_q, soft_p = factors_of(scale, alpha, kd_scale, temperature, z_s, z_h, z_t)
                        numbers[_HARD], numbers[_SOFT_Q], numbers[_SOFT_P] = hard_q * of_h, soft_q * of_s, soft_p * of_t
                        numbers[_SCALE], numbers[_ABOVE], numbers[_M_S], numbers[_M_T] = scale, z_h / of_h, *exact
                        numbers[_Z_S], numbers[_Z_H], numbers[_Z_T], numbers[_W] = z_s, z_h, z_t, w
                        numbers[_LABEL_OF] = np.float64(label)
                        if following < rows:
                            look_up(
                                following, labels, weights, ignore_index, next_label, next_weight, size, integers,
                                numbers,
                            )  # fmt: skip
                cuda.syncthreads()
                if given(gradient):
                    if is_usable(numbers[_Z_S]) and (not soft or is_usable(numbers[_Z_T])):
                        following = i + integers[_GROUPS]
                        next_s, next_t = row_at(student, following), row_at(teacher, following)
                        ahead = following < rows and integers[_STATE] == _WORKED and are_whole(next_s, next_t)
                        ahead = ahead and are_whole(row_at(student, i), row_at(teacher, i))
                        ahead = ahead and is_written_whole(row_at(gradient, i), adjacent)
                        maxima = cast(numbers[_M_S], like), cast(numbers[_M_T], like)
                        factors = cast(numbers[_HARD], like), cast(numbers[_SOFT_Q], like), cast(numbers[_SOFT_P], like)
                        if large(maxima, rates):
                            spend_with_care(
                                row_at(gradient, i), integers, share, words, maxima, rates, tags, factors, adjacent,
                                False, next_s, next_t,
                            )  # fmt: skip
                        else:
                            done = spend_quickly(
                                row_at(gradient, i), integers, share, words, maxima, rates, tags, factors, adjacent,
                                ahead, next_s, next_t,
                            )  # fmt: skip
                        if has_label:
                            cuda.syncthreads()
                            if first:  # over what the slice's gradient is
                                x, y, z = cast(numbers[_X], like), cast(numbers[_Y], like), cast(numbers[_ABOVE], like)
                                maxima = cast(numbers[_M_S], like), cast(numbers[_M_T], like)
                                factors = (
                                    cast(numbers[_HARD], like), cast(numbers[_SOFT_Q], like),
                                    cast(numbers[_SOFT_P], like),
                                )  # fmt: skip
                                g, label = row_at(gradient, i), np.int64(numbers[_LABEL_OF])
                                of_label = spend_one(x, y, z, maxima, rates, factors, nothing)
                                store_real(g[0] + label * g[1], of_label, g[2])
                    else:
                        fill_row(row_at(gradient, i), integers[_BEGIN], integers[_END], math.nan)
                if first and integers[_SLICE] == 0:
                    row = published + _RECORD * blocks * i
                    if is_usable(numbers[_Z_S]) and (not soft or is_usable(numbers[_Z_T])):
                        ce, kl = 0.0, 0.0
                        if hard:
                            x = load_published(row + _RECORD * (np.int64(numbers[_LABEL_OF]) // share) + 48)[1]
                            ce = cross_entropy_of(cast(x, like), cast(numbers[_M_S], like), numbers[_Z_H])
                            ce = numbers[_SCALE] * ce
                        if soft:
                            kl = _forward_kl_from_sums(numbers[_W], numbers[_Z_T], numbers[_Z_S], teacher_temperature)
                            kl = numbers[_SCALE] * kd_scale * kl
                        write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
                        report(status, i, OK, 0)
                    else:
                        write_results(results, i, math.nan, math.nan, math.nan)
                        student_is_bad = not is_usable(numbers[_Z_S])
                        condition, v = condition_of(first_bad_of(row, blocks, student_is_bad, size), size)
                        report(status, i, (STUDENT if student_is_bad else TEACHER) + condition, v)
            i += integers[_GROUPS]
            if i < rows and integers[_STATE] == _WORKED:
                if not ahead:
                    cuda.syncthreads()  # others may still read what is to be replaced
                keep_slice(student, teacher, i, integers, done, share, words, adjacent, like)

    return kernel
