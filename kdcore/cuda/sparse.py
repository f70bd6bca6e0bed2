"""The KD kernel of the CUDA engine for teachers that do not have every class, one block a row.

Arguments are those of :mod:`kdcore.cuda.kernels`; the outcomes of a row, by the policy for its tail, are in
:mod:`kdcore.formulas`. **Single** classes are those that the teacher stores, and the label: each is worked by itself,
in float64. **All others** are worked by the stages of :mod:`kdcore.cuda.distillation`, as of a student alone, with the
single ones ruled out: so the tail's maximum and sums are its own, and nothing is subtracted from a sum.

What is single is told by bits in shared memory, for a **segment** of the row at a time.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float64, int32, uint32

from kdcore import formulas
from kdcore.cuda.distillation import Parts, questions, stages
from kdcore.cuda.kernels import (
    answer_unread,
    divisor_of,
    given,
    kernel_of,
    label_at,
    masked_or_bad,
    most_threads,
    report,
    report_unusable,
    row_at,
    shares_of,
    weight_at,
    write_results,
)
from kdcore.cuda.primitives import bind, cast, device, exp2, itemsize, load_real, load_stored, log, maximum, store_real
from kdcore.cuda.rows import (
    SCRATCH,
    block_maxima,
    block_sums,
    block_total,
    exp2_small,
    fill_row,
    is_usable,
    octet_of,
    octets_of,
    whole_octets,
    write_octet,
)
from kdcore.formulas import HEADROOM
from kdcore.objective import BUCKET, RENORMALIZE, UNIFORM
from kdcore.rowstatus import CLASS, COUNT, DUPLICATE, LARGEST_LOG_PROB, LOG_PROB, MASS, MOST_MASS, OK, ROOM, TAIL

__all__ = ["sparse_kd_kernel"]

#: Words of 32 bits: those of a segment of so many times 32 classes, 4 KiB.
_WORDS = 1024
#: More than any (entry, code) as one number, which is exact in float64.
_NO_ENTRY = 2.0**52
_CODES = 128.0

# What one thread tells the others.
TOP, LOG_Z, TO_Q, SOFT, HARD, Z_H, TO_SHARE, EVEN, OTHERS_Q, OTHERS_H, TAIL_TOP, LABEL_X, SHIFT = range(13)

_scaled_logit = bind(formulas.scaled_logit)
_log_softmax = bind(formulas.log_softmax)
_outcome_term = bind(formulas.outcome_term)
_rate = bind(formulas.rate)
_tail_factor = bind(formulas.tail_factor)
_tail_shares = bind(formulas.tail_shares)
_kd_gradient = bind(formulas.kd_gradient)
_cross_entropy = bind(formulas.cross_entropy)
_kd_loss = bind(formulas.kd_loss)


# --- the single classes of a row -----------------------------------------------------------------------------------


@device
def _class_at(entries, j):
    return np.int64(load_stored(entries[0] + j * entries[1], entries[2]))


@device
def _number_at(row, v):
    return np.float64(load_real(row[0] + v * row[1], row[2]))


@device
def _exponential(x, top, c):
    """exp((x - top) / T) of float64, c the rate over HEADROOM."""
    if x == -math.inf:
        return 0.0
    return np.float64(exp2(np.float64(_scaled_logit(x, top, HEADROOM) * c)))


@device
def _probability(log_p):
    return np.float64(exp2(np.float64(log_p * _rate(1.0))))


@cuda.jit(device=True)
def _check_entries(s, entries, values, n, label, size, shared):
    """(code and entry of the first bad one as a number, largest logit, largest log p, sum of p, label is stored)."""
    bad, top, top_p, mass, stored = _NO_ENTRY, -math.inf, -math.inf, 0.0, 0.0
    j = np.int64(cuda.threadIdx.x)
    while j < n:
        v, log_p, code = _class_at(entries, j), _number_at(values, j), OK
        if not log_p < math.inf:  # NaN too
            code = LOG_PROB
        elif log_p > LARGEST_LOG_PROB:
            code = MASS
        elif not 0 <= v < size:
            code = CLASS
        if code != OK:
            bad = min(bad, np.float64(j) * _CODES + code)
        else:
            top = maximum(top, _number_at(s, v))
            top_p = maximum(top_p, log_p)
            mass += _probability(log_p)
            if v == label:
                stored = 1.0
        j += cuda.blockDim.x
    negated, stored = block_maxima(-bad, stored, shared)
    top, top_p = block_maxima(top, top_p, shared)
    return -negated, top, top_p, block_total(mass, shared), stored > 0.0


@cuda.jit(device=True)
def _mark(bits, duplicate, entries, n, label, begin, count):
    """The bits of the single classes from ``begin`` on, ``count`` of them; an entry that is there again is noted."""
    cuda.syncthreads()
    w = cuda.threadIdx.x
    while w < _WORDS:
        bits[w] = np.uint32(0)
        w += cuda.blockDim.x
    cuda.syncthreads()
    j = np.int64(cuda.threadIdx.x)
    while j < n:
        v = _class_at(entries, j) - begin
        if 0 <= v < count:
            bit = np.uint32(np.uint32(1) << np.uint32(v & 31))
            if cuda.atomic.or_(bits, v >> 5, bit) & bit:
                duplicate[0] = np.int32(j)
        j += cuda.blockDim.x
    cuda.syncthreads()
    if cuda.threadIdx.x == 0 and begin <= label < begin + count:
        bits[(label - begin) >> 5] |= np.uint32(np.uint32(1) << np.uint32((label - begin) & 31))
    cuda.syncthreads()


@cuda.jit(device=True)
def _first_duplicate(entries, n, shared):
    """The first entry whose class one before it has; of two that meet in :func:`_mark`, either may come second."""
    first, j = n, np.int64(cuda.threadIdx.x)
    while j < n:
        for k in range(j):
            if _class_at(entries, k) == _class_at(entries, j):
                first = min(first, j)
        j += cuda.blockDim.x
    negated, _ = block_maxima(-np.float64(first), 0.0, shared)
    return np.int64(-negated)


@device
def _four(bits, v):
    """The bits of four classes from the v-th of a segment on, a multiple of 4."""
    return (np.int64(bits[v >> 5]) >> np.int64(v & 31)) & 15


@device
def _masked(x, of_a, of_b):
    """An octet without its single classes."""
    out = cast(-math.inf, x[0])
    return (
        out if of_a & 1 else x[0], out if of_a & 2 else x[1], out if of_a & 4 else x[2], out if of_a & 8 else x[3],
        out if of_b & 1 else x[4], out if of_b & 2 else x[5], out if of_b & 4 else x[6], out if of_b & 8 else x[7],
    )  # fmt: skip


@device
def _line_of_four(x0, x1, x2, x3, v, end, of_v, origin):
    """The sum of HEADROOM (x - origin) over four classes from v on, without single ones and those from ``end`` on."""
    line = np.float64(0)
    if v < end and of_v & 1 == 0:
        line += _scaled_logit(np.float64(x0), origin, HEADROOM)
    if v + 1 < end and of_v & 2 == 0:
        line += _scaled_logit(np.float64(x1), origin, HEADROOM)
    if v + 2 < end and of_v & 4 == 0:
        line += _scaled_logit(np.float64(x2), origin, HEADROOM)
    if v + 3 < end and of_v & 8 == 0:
        line += _scaled_logit(np.float64(x3), origin, HEADROOM)
    return line


@device
def _put_four(row, v, end, of_v, x0, x1, x2, x3):
    """Four classes from v on become x, but single ones and those from ``end`` on."""
    place, step, tag = row[0] + v * row[1], row[1], row[2]
    if v < end and of_v & 1 == 0:
        store_real(place, x0, tag)
    if v + 1 < end and of_v & 2 == 0:
        store_real(place + step, x1, tag)
    if v + 2 < end and of_v & 4 == 0:
        store_real(place + 2 * step, x2, tag)
    if v + 3 < end and of_v & 8 == 0:
        store_real(place + 3 * step, x3, tag)


@cache
def sparse_kd_kernel(hard, power, linear, wide):
    """The kernel of an objective; ``hard`` and ``power`` as in :class:`kdcore.cuda.distillation.Parts`.

    ``linear``: the policy is "uniform", which needs the sum of all logits of the tail. ``wide``: work in float64.
    """
    parts = Parts(soft=False, hard=hard, power=power)  # the student's: there is no teacher's row
    own_sum = power == 0
    large, no_good = questions(parts)

    def gathering(careful):
        of_way = stages(parts, careful)
        floors, sums_at, raise_maxima = of_way.floors, of_way.sums_at, of_way.raise_maxima
        add_octet, settle = of_way.add_octet, of_way.settle

        @device
        def add(sums, line, s, a, b, begin, size, bits, whole, rates, origin, like):
            x = octet_of(s, a, b, size, whole, like)
            of_a, of_b = _four(bits, a - begin), _four(bits, b - begin)
            if linear:
                line += _line_of_four(x[0], x[1], x[2], x[3], a, size, of_a, origin)
                line += _line_of_four(x[4], x[5], x[6], x[7], b, size, of_b, origin)
            if of_a | of_b != 0:
                x = _masked(x, of_a, of_b)
            return add_octet(raise_maxima(sums, x, x, rates), x, x, rates), line

        @cuda.jit(device=True)
        def gather(s, size, entries, n, label, bits, duplicate, rates, origin, adjacent, whole, like, shared):
            sums, line = sums_at(floors(rates, like), rates), np.float64(0)
            start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
            step = np.int64(8 * cuda.blockDim.x)
            segment = 32 * _WORDS // step * step
            begin = np.int64(0)
            while begin < size:
                _mark(bits, duplicate, entries, n, label, begin, segment)
                a, end = begin + start, min(begin + segment, size)
                if whole:
                    while a + gap + 4 <= end:
                        sums, line = add(sums, line, s, a, a + gap, begin, size, bits, True, rates, origin, like)
                        a += step
                while a < end:
                    sums, line = add(sums, line, s, a, a + gap, begin, size, bits, False, rates, origin, like)
                    a += step
                begin += segment
            maxima = block_maxima(sums[0], sums[6], shared)
            z_s, z_h, _, _ = settle(sums, maxima, rates, like)
            z_s, z_h, line, _ = block_sums(z_s, z_h, line, 0.0, shared)
            return maxima, z_s, z_h, line

        return gather

    gather_with_care = gathering(careful=True)
    if wide:
        sums_of_others = gather_with_care
    else:
        gather_quickly = gathering(careful=False)

        @device
        def sums_of_others(s, size, entries, n, label, bits, duplicate, rates, origin, adjacent, whole, like, shared):
            """(maxima, z_s, z_h, the sum of HEADROOM (x - origin)) of all classes that are not single."""
            maxima, z_s, z_h, line = gather_quickly(
                s, size, entries, n, label, bits, duplicate, rates, origin, adjacent, whole, like, shared
            )
            if no_good(maxima, z_s, z_h, 1.0, 0.0, rates):
                maxima, z_s, z_h, line = gather_with_care(
                    s, size, entries, n, label, bits, duplicate, rates, origin, adjacent, whole, like, shared
                )
            return maxima, z_s, z_h, line

    def spending(careful):
        of_way = stages(parts, careful)
        references_of, at_one, exponentials_of = of_way.references, of_way.at_one, of_way.exponential

        @device
        def spend_one(x, references, rates, factors):
            e = exponentials_of(x, references[1], rates[0])
            e_h = cast(0, x)
            if hard:
                e_h = at_one(e, x, references[0], rates[2])
            return _kd_gradient(e_h, e, cast(1, x), factors[0], factors[1], factors[2])

        @device
        def spend_octet(s, g, a, b, begin, size, bits, whole, references, rates, factors, like):
            x = octet_of(s, a, b, size, whole, like)
            y = (
                spend_one(x[0], references, rates, factors), spend_one(x[1], references, rates, factors),
                spend_one(x[2], references, rates, factors), spend_one(x[3], references, rates, factors),
                spend_one(x[4], references, rates, factors), spend_one(x[5], references, rates, factors),
                spend_one(x[6], references, rates, factors), spend_one(x[7], references, rates, factors),
            )  # fmt: skip
            of_a, of_b = _four(bits, a - begin), _four(bits, b - begin)
            if of_a | of_b == 0:
                write_octet(g, a, b, size, whole, y)
            else:
                _put_four(g, a, size, of_a, y[0], y[1], y[2], y[3])
                _put_four(g, b, size, of_b, y[4], y[5], y[6], y[7])

        @cuda.jit(device=True)
        def spend(s, g, size, entries, n, label, bits, duplicate, maxima, rates, factors, adjacent, whole, like):
            references = references_of(maxima, rates)
            start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
            step = np.int64(8 * cuda.blockDim.x)
            segment = 32 * _WORDS // step * step
            # Backwards, because the last classes were read last and are still in the cache.
            begin = (size - 1) // segment * segment
            while begin >= 0:
                _mark(bits, duplicate, entries, n, label, begin, segment)
                end = min(begin + segment, size)
                a = begin + start + (end - 1 - begin - start) // step * step
                while a >= begin and not (whole and a + gap + 4 <= end):
                    spend_octet(s, g, a, a + gap, begin, size, bits, False, references, rates, factors, like)
                    a -= step
                while a >= begin:
                    spend_octet(s, g, a, a + gap, begin, size, bits, True, references, rates, factors, like)
                    a -= step
                begin -= segment

        return spend

    spend_with_care, offsets_with_care = spending(careful=True), stages(parts, True).offsets
    if wide:
        spend_others, offsets_of = spend_with_care, offsets_with_care
    else:
        spend_quickly, offsets_quickly = spending(careful=False), stages(parts, False).offsets

        @device
        def offsets_of(maxima, rates):
            return offsets_with_care(maxima, rates) if large(maxima, rates) else offsets_quickly(maxima, rates)

        @device
        def spend_others(s, g, size, entries, n, label, bits, duplicate, maxima, rates, factors, adjacent, whole, like):
            """The gradient of all classes that are not single is written."""
            if large(maxima, rates):
                spend_with_care(
                    s, g, size, entries, n, label, bits, duplicate, maxima, rates, factors, adjacent, whole, like
                )
            else:
                spend_quickly(
                    s, g, size, entries, n, label, bits, duplicate, maxima, rates, factors, adjacent, whole, like
                )

    @device
    def exponential_at_one(e, x, top, c):
        """exp(x - top) of float64, from exp((x - top) / T) where T allows."""
        if own_sum:
            return _exponential(x, top, c)
        if power == 1:
            return e
        return e * e if power == 2 else e * e * e * e

    @cuda.jit(device=True)
    def sums_of_single(s, entries, values, n, own_x, is_own, top, top_p, c, c_h, shared):
        """(z at T, z at 1, sum of p relative to the largest) of the single classes, relative to ``top``."""
        z, z_h, mass = 0.0, 0.0, 0.0
        j = np.int64(cuda.threadIdx.x)
        while j < n:
            x = _number_at(s, _class_at(entries, j))
            e = _exponential(x, top, c)
            z += e
            z_h += exponential_at_one(e, x, top, c_h)
            mass += _probability(_number_at(values, j) - top_p)
            j += cuda.blockDim.x
        if is_own and cuda.threadIdx.x == 0:
            e = _exponential(own_x, top, c)
            z += e
            z_h += exponential_at_one(e, own_x, top, c_h)
        z, z_h, mass, _ = block_sums(z, z_h, mass, 0.0, shared)
        return z, z_h, mass

    @cuda.jit(device=True)
    def terms_of_single(s, entries, values, n, told, inverse, shared):
        """The sum of p (log p - log q) over the stored classes."""
        terms = 0.0
        j = np.int64(cuda.threadIdx.x)
        while j < n:
            log_p = _number_at(values, j)
            if log_p > -math.inf:
                log_p -= told[SHIFT]
                d = _scaled_logit(_number_at(s, _class_at(entries, j)), told[TOP], HEADROOM)
                terms += _outcome_term(_probability(log_p), log_p, _log_softmax(d, inverse, told[LOG_Z]))
            j += cuda.blockDim.x
        return block_total(terms, shared)

    @cuda.jit(device=True)
    def spend_single(s, g, entries, values, n, label, is_own, p_tail, mass, told, c, c_h):
        """The gradient of the single classes is written, over logits that nobody else reads any more."""
        j = np.int64(cuda.threadIdx.x)
        while j < n:
            v = _class_at(entries, j)
            x, p = _number_at(s, v), _probability(_number_at(values, j) - told[SHIFT])
            e = _exponential(x, told[TOP], c)
            e_h = exponential_at_one(e, x, told[TOP], c_h) if hard else 0.0
            y = _kd_gradient(e_h, e, p, told[HARD], told[SOFT] * mass * told[TO_Q], told[SOFT])
            if v == label:
                y -= told[HARD] * told[Z_H]
            store_real(g[0] + v * g[1], y, g[2])
            j += cuda.blockDim.x
        if is_own and cuda.threadIdx.x == 0:
            x = told[LABEL_X]
            e = _exponential(x, told[TOP], c)
            share = 0.0
            if told[TO_SHARE] > 0.0:
                share = told[TO_SHARE] * _exponential(x, told[TAIL_TOP], c)
            factor = _tail_factor(mass, e * told[TO_Q], p_tail, share)
            e_h = exponential_at_one(e, x, told[TOP], c_h)
            y = _kd_gradient(e_h, factor, told[EVEN], told[HARD], told[SOFT], told[SOFT])
            store_real(g[0] + label * g[1], y - told[HARD] * told[Z_H], g[2])

    @kernel_of(most_threads(wide))
    def kernel(
        student, indices, log_probs, log_tails, n_valid, entries_of_row, policy, labels, weights, ignore_index,
        denominator, alpha, temperature, kd_scale, rates, size, like, gradient, results, status,
    ):  # fmt: skip
        """student, gradient: matrices [B, size]; indices, log_probs: matrices [B, entries_of_row]; log_tails (of
        samples: not given), n_valid, labels, weights: vectors [B]; denominator: see
        :func:`kdcore.cuda.kernels.divisor_of`.

        alpha CE + (1 - alpha) kd_scale D, its parts and its gradient; rates are those of
        :func:`kdcore.cuda.distillation.rates_of`.
        """
        shared = cuda.shared.array(SCRATCH, float64)
        told = cuda.shared.array(13, float64)
        bits = cuda.shared.array(_WORDS, uint32)
        duplicate = cuda.shared.array(1, int32)
        i = np.int64(cuda.blockIdx.x)
        first = cuda.threadIdx.x == 0
        s, g = row_at(student, i), row_at(gradient, i)
        if not given(gradient):
            g = gradient[0], gradient[2], gradient[3]
        entries, values = row_at(indices, i), row_at(log_probs, i)
        weight, label = weight_at(weights, i), label_at(labels, i)
        masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
        if not hard:
            label = np.int64(-1)
        n, log_tail, p_tail, mass, top, top_p, stored = np.int64(0), -math.inf, 0.0, 0.0, -math.inf, -math.inf, False
        if not masked and code == OK:
            n = np.int64(load_stored(n_valid[0] + i * n_valid[1], n_valid[2]))
            if not 1 <= n <= entries_of_row:
                code, detail = COUNT, n
        if not masked and code == OK:
            bad, top, top_p, mass, stored = _check_entries(s, entries, values, n, label, size, shared)
            if bad < _NO_ENTRY:
                detail = np.int64(bad / _CODES)
                code = np.int64(bad - np.float64(detail) * _CODES)
        with_tail = policy in (BUCKET, UNIFORM)
        if not masked and code == OK and with_tail:
            log_tail = np.float64(load_real(log_tails[0] + i * log_tails[1], log_tails[2]))
            if not log_tail < math.inf:  # NaN too
                code = TAIL
            elif log_tail > -math.inf and n == size:
                code = ROOM
            else:
                p_tail = _probability(min(log_tail, LARGEST_LOG_PROB))
        if not masked and code == OK:
            mass += p_tail
            if not (mass > 0.0 or top_p > -math.inf) or (given(log_tails) and mass > MOST_MASS):
                code = MASS
        is_own = hard and not stored  # a label that is in the tail
        adjacent, whole = itemsize(s[2]) == 2, whole_octets(s)
        maxima, z_others, h_others, line = (cast(0, like), cast(0, like)), 0.0, 0.0, 0.0
        origin = top if abs(top) < math.inf else 0.0
        if first:
            duplicate[0] = np.int32(-1)
        if not masked and code == OK:
            maxima, z_others, h_others, line = sums_of_others(
                s, size, entries, n, label, bits, duplicate, rates, origin, adjacent, whole, like, shared
            )
            if duplicate[0] >= 0:
                code, detail = DUPLICATE, _first_duplicate(entries, n, shared)
        if masked or code != OK:
            answer_unread(i, masked, code, detail, results, status, gradient, g, np.int64(0), size)
            return

        c, c_h = _rate(temperature) / HEADROOM, _rate(1.0) / HEADROOM
        own_x = _number_at(s, label) if is_own else -math.inf
        others_top = np.float64(maxima[0]) if z_others != 0.0 else -math.inf  # NaN too is of a row with classes
        tail_top = max(others_top, own_x) if is_own else others_top
        top = max(top, tail_top)
        z_single, h_single, relative_mass = sums_of_single(
            s, entries, values, n, own_x, is_own, top, top_p, c, c_h, shared
        )
        if first:
            at_top = _exponential(others_top, top, c)
            z = z_single + (at_top * z_others if z_others != 0.0 else 0.0)
            if math.isnan(top):
                z = math.nan
            told[TOP], told[Z_H] = z, 0.0
        cuda.syncthreads()
        if not is_usable(told[TOP]):
            if first:
                write_results(results, i, math.nan, math.nan, math.nan)
            report_unusable(i, s, s, size, True, status, shared)
            if given(gradient):
                fill_row(g, np.int64(0), size, math.nan)
            return
        if policy == RENORMALIZE:
            mass = 1.0
        inverse = 1.0 / HEADROOM / temperature
        n_tail = size - n
        z_tail = 0.0
        cuda.syncthreads()
        if first:
            z = told[TOP]
            scale = weight / divisor_of(denominator)
            x_s, x_h, _ = offsets_of(maxima, rates)
            of_s, of_h = exp2_small(x_s), exp2_small(x_h)
            at_top, at_tail = _exponential(others_top, top, c), _exponential(others_top, tail_top, c)
            if z_others != 0.0:
                z_tail = at_tail * z_others
            if is_own:
                z_tail += _exponential(own_x, tail_top, c)
            hard_share, soft = shares_of(scale, alpha, kd_scale, temperature)
            hard_q, z_h = 0.0, 0.0
            if hard:
                at_one = exponential_at_one(at_top, others_top, top, c_h)
                z_h = h_single + (at_one * h_others if z_others != 0.0 else 0.0)
                hard_q = hard_share / z_h
                told[OTHERS_H] = hard_q * at_one * of_h
                told[LABEL_X] = _number_at(s, label)
            else:
                told[OTHERS_H] = 0.0
            to_share, even = _tail_shares(policy == BUCKET, p_tail, z_tail, np.float64(n_tail))
            told[TOP], told[LOG_Z], told[TO_Q], told[SOFT] = top, log(z), 1.0 / z, soft
            told[HARD], told[Z_H], told[TO_SHARE], told[EVEN] = hard_q, z_h, to_share, even
            told[OTHERS_Q] = soft * of_s * _tail_factor(mass, at_top / z, p_tail, at_tail * to_share)
            told[TAIL_TOP] = tail_top
            told[SHIFT] = top_p + log(relative_mass) if policy == RENORMALIZE else 0.0
        cuda.syncthreads()
        kl = terms_of_single(s, entries, values, n, told, inverse, shared)
        if first:
            scale = weight / divisor_of(denominator)
            if policy == BUCKET and log_tail > -math.inf:
                d = _scaled_logit(tail_top, top, HEADROOM)
                kl += _outcome_term(p_tail, log_tail, _log_softmax(d, inverse, told[LOG_Z] - log(z_tail)))
            if linear and log_tail > -math.inf:
                if is_own:
                    line += _scaled_logit(own_x, origin, HEADROOM)
                mean = line / n_tail + _scaled_logit(origin, top, HEADROOM)
                log_share = log_tail - log(np.float64(n_tail))
                kl += _outcome_term(p_tail, log_share, _log_softmax(mean, inverse, told[LOG_Z]))
            if math.isnan(kl):
                kl = math.inf  # in a row without NaN it is 0 * inf: p has underflowed where q is 0
            kl *= scale * kd_scale
            ce = 0.0
            if hard:
                ce = scale * _cross_entropy(_scaled_logit(told[LABEL_X], top, HEADROOM), told[Z_H])
            write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
            report(status, i, OK, 0)
        if given(gradient):
            factors = cast(told[OTHERS_H], like), cast(told[OTHERS_Q], like), cast(told[SOFT] * told[EVEN], like)
            whole = whole and whole_octets(g) and (adjacent or itemsize(g[2]) != 2)
            spend_others(s, g, size, entries, n, label, bits, duplicate, maxima, rates, factors, adjacent, whole, like)
            spend_single(s, g, entries, values, n, label, is_own, p_tail, mass, told, c, c_h)

    return kernel
