"""The KD kernel of several blocks a row: each logit is read from memory once, and waits in shared memory for the sums.

A row's classes are cut into as many slices as blocks work on it. A block takes a **ticket**, by which it knows its row
and slice: so the blocks of a row start one after another, and one that waits for the others of its row never waits for
one that cannot start, as long as a row's blocks fit the device together. :mod:`kdcore.cuda.plans` lets a row have half
as many blocks as there are multiprocessors, of which each holds two or more, so that this is true beside other calls:
the blocks of a launch all start before those of the next of the same priority do.

A block keeps its slice, publishes its sums, waits until all of the row's blocks have, and writes its part of the
gradient from the sums of all, which each block merges alike. The row's first block writes its results.

What a block publishes is a **record** of PUBLISHED float64: m_s, z_s, z_h, m_t, z_t, w, what
:func:`kdcore.cuda.rows.first_bad_class` found where a sum is NaN, and the label's logit where it is in the slice. All
are blank before, which no number is (:func:`kdcore.cuda.primitives.is_blank`): each says by itself that it is there, so
no order of writing and reading is to be waited for. Many blocks that look at many records again and again would take
bandwidth from the rows, so they count who has published, too, and look when all have; they rely on the records alone.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float64, int64, uint32

from kdcore import formulas
from kdcore.cuda.distillation import questions, rebase_of, stages
from kdcore.cuda.kernels import (
    answer_unread,
    divisor_of,
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
    BLANK,
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
    load_count,
    load_published,
    load_stored,
    maxima_of_words,
    maximum,
    octet_of_words,
    quotient,
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
    "MOST_BLOCKS",
    "MOST_THREADS",
    "PUBLISHED",
    "group_kernel",
    "octets_per_thread",
    "resident_blocks",
    "share_of",
]

#: Blocks of a row at most: two for each lane of the warp that merges them.
MOST_BLOCKS = 64
PUBLISHED = 8
#: More blocks wait for a count. On an H200 reading records while waiting was faster than a count with 4 and 8 blocks a
#: row, the same within 2 % with 16 and 19, and 5 and 10 % slower with 32 and 38 (benchmarks/LOG.md).
_FEW_BLOCKS = 8
_RECORD = 8 * PUBLISHED
_WARP = 32
_ALL_LANES = 0xFFFFFFFF

#: What a block's shared memory has of its row. Integers: the row, the slice, whether it is masked, what is wrong, its
#: detail, the label.
_ROW, _SLICE, _MASKED, _CODE, _DETAIL, _LABEL, _INTEGERS = range(7)
#: Numbers: z_s, z_t, z_h and w; the factors of the gradient's parts, in that order, of which w has none; what z_h is
#: divided by for the label; the maxima; the label's logits; weight / denominator, and what of it goes to cross-entropy
#: and to the divergence.
_Z_S, _Z_T, _Z_H, _W, _OF_S, _OF_T, _OF_H, _OF_NONE, _BELOW, _M_S, _M_T, _X, _Y, _SCALE, _HARD, _SOFT = range(16)
_NUMBERS = 16

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
    of_rows = sweeps(parts, False)
    offsets_of, spend_one = of_rows.offsets_of, of_rows.spend_one
    #: Classes from one octet of a thread to its next, and bytes of shared memory between the halves of an octet.
    step, half = 8 * threads, 16 * threads
    nothing = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)

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

    @device
    def is_in_line(row, adjacent):
        """Whether a row that cannot be read by 16 bytes lies in memory as a slice of it does in shared memory."""
        return row[1] == itemsize(row[2]) and (itemsize(row[2]) == 2 or not adjacent)

    @cuda.jit(device=True)
    def keep_in_line(row, begin, end, place):
        """A slice is kept from a place on, element by element: neighbours by neighbouring threads."""
        tag, width = row[2], itemsize(row[2])
        source, n, count = row[0] + begin * width, np.int64(cuda.threadIdx.x), end - begin
        while n + 7 * threads < count:
            x = source + n * width
            a, b = load_stored(x, tag), load_stored(x + threads * width, tag)
            c, d = load_stored(x + 2 * threads * width, tag), load_stored(x + 3 * threads * width, tag)
            e, f = load_stored(x + 4 * threads * width, tag), load_stored(x + 5 * threads * width, tag)
            g, h = load_stored(x + 6 * threads * width, tag), load_stored(x + 7 * threads * width, tag)
            y = place + n * width
            keep_stored(y, a)
            keep_stored(y + threads * width, b)
            keep_stored(y + 2 * threads * width, c)
            keep_stored(y + 3 * threads * width, d)
            keep_stored(y + 4 * threads * width, e)
            keep_stored(y + 5 * threads * width, f)
            keep_stored(y + 6 * threads * width, g)
            keep_stored(y + 7 * threads * width, h)
            n += 8 * threads
        while n < count:
            keep_stored(place + n * width, load_stored(source + n * width, tag))
            n += threads
        while n < (count + step - 1) // step * step:
            keep_stored(place + n * width, to_stored(-math.inf, tag))
            n += threads

    @cuda.jit(device=True)
    def write_in_line(row, begin, end, place):
        """A slice is written from what is kept from a place on, as :func:`keep_in_line` reads it."""
        tag, width = row[2], itemsize(row[2])
        to, n, count = row[0] + begin * width, np.int64(cuda.threadIdx.x), end - begin
        while n + 3 * threads < count:
            x = place + n * width
            a, b = kept_stored(x, tag), kept_stored(x + threads * width, tag)
            c, d = kept_stored(x + 2 * threads * width, tag), kept_stored(x + 3 * threads * width, tag)
            y = to + n * width
            store_stored(y, a)
            store_stored(y + threads * width, b)
            store_stored(y + 2 * threads * width, c)
            store_stored(y + 3 * threads * width, d)
            n += 4 * threads
        while n < count:
            store_stored(to + n * width, kept_stored(place + n * width, tag))
            n += threads

    @cuda.jit(device=True)
    def keep_row(row, octets, begin, end, place, next_place, adjacent, like):
        """A slice of a row is kept, with -inf beyond its end; see :func:`keep_slice`."""
        start, gap, inside, count = octets
        whole = whole_octets(row)
        if not whole and is_in_line(row, adjacent):
            keep_in_line(row, begin, end, place - 16 * np.int64(cuda.threadIdx.x))
            return
        quick, source = inside if whole else np.int32(0), row[0] + start * itemsize(row[2])
        for _ in range(quick):
            keep_async(place, half, source, np.int64(0), gap, row[2])
            source += step * itemsize(row[2])
            place += next_place
        for k in range(quick, count):
            a = start + k * step
            keep_words(place, half, words_of_octet(octet_of(row, a, a + gap, end, False, like), row[2]), row[2])
            place += next_place

    @device
    def keep_slice(s, t, octets, begin, end, share, words, adjacent, like):
        """A slice of both rows is kept, for this thread after ``wait_for_copies``; for others, if this returns True,
        after a barrier."""
        place_s, place_t, next_s, next_t = places_of(words, share, (s[2], t[2]))
        keep_row(s, octets, begin, end, place_s, next_s, adjacent, like)
        if soft:
            keep_row(t, octets, begin, end, place_t, next_t, adjacent, like)
        return not (whole_octets(s) and (not soft or whole_octets(t)))

    @device
    def kept_class(o, place, next_place, adjacent, tag):
        """A slice's class o, of a row whose first thread keeps its octets from a place on."""
        width = itemsize(tag)
        if width == 2 or not adjacent:
            place += o * width
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
    def tops_of(octets, share, words, tags, like):
        """The maxima of a thread's octets, which are kept; -inf if there are none."""
        place_s, place_t, next_s, next_t = places_of(words, share, tags)
        none = cast(-math.inf, like)
        low = none, none, none, none, none, none, none, none
        top_s, top_t = words_of_octet(low, tags[0]), words_of_octet(low, tags[1])
        for _ in range(octets[3]):
            top_s = maxima_of_words(top_s, kept_words(place_s, half, tags[0]), tags[0])
            place_s += next_s
            if soft:
                top_t = maxima_of_words(top_t, kept_words(place_t, half, tags[1]), tags[1])
                place_t += next_t
        return largest(octet_of_words(top_s, tags[0])), largest(octet_of_words(top_t, tags[1]))

    def gathering(careful):
        """The function that returns a slice's maxima and sums by one of the ways."""
        of_way = stages(parts, careful)
        sums_at, add_octet, settle, unit = of_way.sums_at, of_way.add_octet, of_way.settle, of_way.unit
        floors = of_way.floors

        @cuda.jit(device=True)
        def sums_of(tops, octets, share, words, rates, tags, like, shared):
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            # A thread's maxima come first, so that no sum is to be rescaled, but wait for no other thread's.
            low_s, low_t = floors(rates, like)
            sums = sums_at((maximum(tops[0], low_s), maximum(tops[1], low_t)), rates)
            for _ in range(octets[3]):
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
        def spend_slice(g, octets, begin, end, share, words, maxima, rates, tags, factors, adjacent):
            references = references_of(maxima, rates)
            start, gap, inside, count = octets
            place_s, place_t, next_s, next_t = places_of(words, share, tags)
            whole = whole_octets(g) and (adjacent or itemsize(g[2]) != 2)
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
                return
            quick = inside if whole and not careful else np.int32(0)
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

    @cuda.jit(device=True)
    def begin_row(labels, weights, ignore_index, size, rows, blocks, tickets, integers, numbers):
        """Takes a ticket, and looks up what the block is to know of its row before it reads it; for one warp."""
        # Blocks mostly start about in their order: of the rows around that, labels and weights are read, by a lane
        # each, while the ticket is on its way.
        lane, _ = lane_and_warp()
        likely = quotient(np.int64(cuda.blockIdx.x), blocks) + lane - _WARP // 2
        number = np.int64(add(tickets, np.int32(1))) - BLANK if lane == 0 else np.int64(0)
        there = min(max(likely, np.int64(0)), rows - 1)
        weight, label = weight_at(weights, there), label_at(labels, there)
        number = cuda.shfl_sync(_ALL_LANES, number, 0)
        i = quotient(number, blocks)
        known = likely == i
        if cuda.ballot_sync(_ALL_LANES, known) == 0:
            weight, label, known = weight_at(weights, i), label_at(labels, i), lane == 0
        if known:
            masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
            integers[_ROW], integers[_SLICE], integers[_MASKED] = i, number - i * blocks, 1 if masked else 0
            integers[_CODE], integers[_DETAIL], integers[_LABEL] = code, detail, label
            numbers[_SCALE] = weight

    @kernel_of(threads, resident)
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, rates, size, like, gradient, results, status, rows, blocks, share, counts, published,
    ):  # fmt: skip
        """As the row kernel, by ``blocks`` blocks a row, each with ``share`` classes, a multiple of 8.

        counts: address of int64 [rows + 1], of blocks that have published, and of tickets; only their first halves are
        used. published: address of float64 [rows, blocks, PUBLISHED]. All have the bits of BLANK.
        """
        shared = cuda.shared.array(SCRATCH, float64)
        numbers = cuda.shared.array(_NUMBERS, float64)
        integers = cuda.shared.array(_INTEGERS, int64)
        words = cuda.shared.array(_WORDS_KEPT, uint32, 16)
        first = cuda.threadIdx.x == 0
        if cuda.threadIdx.x < _WARP:
            begin_row(labels, weights, ignore_index, size, rows, blocks, counts + 8 * rows, integers, numbers)
        cuda.syncthreads()
        i, slice_ = integers[_ROW], integers[_SLICE]
        begin = slice_ * share
        end = min(begin + share, size)
        s, t = row_at(student, i), row_at(teacher, i)
        if integers[_MASKED] == 1 or integers[_CODE] != OK:
            masked = integers[_MASKED] == 1
            code, detail, g = integers[_CODE], integers[_DETAIL], row_at(gradient, i)
            answer_unread(i, masked, code, detail, results, status, gradient, g, begin, end)
            return

        tags = s[2], t[2]
        adjacent = itemsize(s[2]) == 2 or (soft and itemsize(t[2]) == 2)
        octets = octets_of_slice(begin, end, adjacent)
        by_others = keep_slice(s, t, octets, begin, end, share, words, adjacent, like)
        if first:  # while the copies are under way
            scale = numbers[_SCALE] / divisor_of(denominator)
            numbers[_SCALE] = scale
            numbers[_HARD], numbers[_SOFT] = shares_of(scale, alpha, kd_scale, temperature)
        wait_for_copies()
        if by_others:
            cuda.syncthreads()
        tops = tops_of(octets, share, words, tags, like)
        maxima, z_s, z_h, z_t, w = gather_quickly(tops, octets, share, words, rates, tags, like, shared)
        bad = np.int64(2 * size)
        if no_good(maxima, z_s, z_h, z_t, w, rates):
            maxima, z_s, z_h, z_t, w = gather_with_care(tops, octets, share, words, rates, tags, like, shared)
            if math.isnan(z_s):
                bad = first_bad_class(s, begin, end, shared)
            elif soft and math.isnan(z_t):
                bad = first_bad_class(t, begin, end, shared)

        i, slice_, label = integers[_ROW], integers[_SLICE], integers[_LABEL]  # again, so as not to take registers
        row, has_label = published + _RECORD * blocks * i, hard and begin <= label < end
        g = row_at(gradient, i)
        if cuda.threadIdx.x < _WARP:
            if first:
                x = 0.0
                if has_label:
                    # Whoever kept them has waited for copies, and met this thread at a barrier.
                    place_s, place_t, next_s, next_t = places_of(words, share, tags)
                    x = np.float64(kept_class(label - begin, place_s, next_s, adjacent, tags[0]))
                    numbers[_X] = x
                    if soft:
                        numbers[_Y] = np.float64(kept_class(label - begin, place_t, next_t, adjacent, tags[1]))
                publish(row + _RECORD * slice_, maxima, z_s, z_h, z_t, w, np.float64(bad), x)
                if blocks > _FEW_BLOCKS:
                    count = counts + 8 * i
                    here = add(count, np.int32(1)) + 1
                    while here - BLANK < blocks:
                        cuda.nanosleep(32)
                        here = load_count(count)
            cuda.syncwarp()
            maxima, own = merged(row, blocks, rates, like)
            lane, _ = lane_and_warp()
            x_s, x_h, x_t = offsets_of(maxima, rates)
            below = exp2_small(x_s if lane < 8 else (x_t if lane < 16 else x_h))
            if lane & 7 == 0:
                numbers[_Z_S + (lane >> 3)] = own
                numbers[_OF_S + (lane >> 3)] = (numbers[_SOFT] if lane < 16 else numbers[_HARD]) / own * below
            if lane == 16:
                numbers[_BELOW], numbers[_M_S], numbers[_M_T] = below, maxima[0], maxima[1]
        cuda.syncthreads()
        usable = is_usable(numbers[_Z_S]) and (not soft or is_usable(numbers[_Z_T]))
        maxima = cast(numbers[_M_S], like), cast(numbers[_M_T], like)
        if given(gradient) and not usable:
            fill_row(g, begin, end, math.nan)
        if given(gradient) and usable:
            factors = cast(numbers[_OF_H], like), cast(numbers[_OF_S], like), cast(numbers[_OF_T], like)
            if large(maxima, rates):
                spend_with_care(g, octets, begin, end, share, words, maxima, rates, tags, factors, adjacent)
            else:
                spend_quickly(g, octets, begin, end, share, words, maxima, rates, tags, factors, adjacent)
            if has_label:
                cuda.syncthreads()
                if first:  # over what the slice's gradient is
                    above = cast(numbers[_Z_H] / numbers[_BELOW], like)
                    x, y = cast(numbers[_X], like), cast(numbers[_Y], like)
                    of_label = spend_one(x, y, above, maxima, rates, factors, nothing)
                    store_real(g[0] + label * g[1], of_label, g[2])
        if first and slice_ == 0:
            if usable:
                ce, kl, scale = 0.0, 0.0, numbers[_SCALE]
                if hard:
                    x = cast(load_published(row + _RECORD * (label // share) + 48)[1], like)
                    ce = scale * cross_entropy_of(x, maxima[0], numbers[_Z_H])
                if soft:
                    divergence = _forward_kl_from_sums(numbers[_W], numbers[_Z_T], numbers[_Z_S], teacher_temperature)
                    kl = scale * kd_scale * divergence
                write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
                report(status, i, OK, 0)
            else:
                write_results(results, i, math.nan, math.nan, math.nan)
                student_is_bad = not is_usable(numbers[_Z_S])
                condition, v = condition_of(first_bad_of(row, blocks, student_is_bad, size), size)
                report(status, i, (STUDENT if student_is_bad else TEACHER) + condition, v)

    return kernel
