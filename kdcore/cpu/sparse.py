"""The KD kernel of the CPU engine for teachers that do not have every class, and its row functions.

Conventions are those of :mod:`kdcore.cpu.kernels` and :mod:`kdcore.cpu.rows`; the outcomes of a row, by the policy for
its tail, are in :mod:`kdcore.formulas`. Two kinds of classes are worked in two ways:

- **Single** ones are those that the teacher stores, and the label. They are few: each is worked by itself, in float64.
- **All others** are worked in blocks as in the dense kernels, as if the single ones were ruled out. So their sum is
  theirs alone, and exact whatever the student gives to the single ones: nothing is subtracted from a sum, and nothing
  underflows beside a larger class.

The single classes of a row are sorted by setting a bit of each, and a bit of each word of bits, and going through those
that are set. That takes less than sorting numbers, gives an order that does not depend on the teacher's, and finds
duplicates.
"""

import math

import numpy as np
from numba import njit

from kdcore import formulas
from kdcore.cpu.kernels import _SOURCES, BEGIN, FINISH, MERGE, STATES, WRITE, _begin, _fill, _report_row, _soft_scale
from kdcore.cpu.primitives import bind, exp2, inner
from kdcore.cpu.rows import (
    _PART,
    BLOCK,
    E_H,
    E_S,
    M_S,
    M_T,
    PAD_S,
    PAD_T,
    Z_H,
    Z_S,
    Z_T,
    D,
    _aligned_part,
    _copy_block,
    blocks_in,
    h_power,
    label_loss,
    lanes_of,
    max_block,
    measured_block,
    merged_sum,
    origin,
    padded,
    shift_of,
    to_power,
    top_of,
    usable_student,
)
from kdcore.cpu.simd import (
    borrowed,
    fence,
    full,
    load,
    prefetch,
    store,
    store_part,
    stream,
    sum_lanes,
    to_real,
    trailing_zeros,
    widen,
    with_lane,
)
from kdcore.formulas import HEADROOM
from kdcore.objective import BUCKET, RENORMALIZE, UNIFORM
from kdcore.rowstatus import (
    CLASS,
    COUNT,
    DUPLICATE,
    LARGEST_LOG_PROB,
    LOG_PROB,
    MASS,
    MOST_MASS,
    OK,
    ROOM,
    STUDENT,
    TAIL,
)

__all__ = ["SINGLE_ROWS", "sparse_kd_kernel"]

#: Rows of ``of_single`` [SINGLE_ROWS, width] in float64, in the order of the classes and in whole vectors, filled up
#: with -inf: what the teacher says of them, their logits, p, their exponentials at T and at 1, and their gradient.
LOG_P, LOGIT, P, E, H, GRADIENT = range(6)
SINGLE_ROWS = 6

# What BEGIN and FINISH tell the later phases, in the last row of ``states``: beside GO, the factors of the gradient.
GO, HARD, SOFT, SHARE, EVEN, P_TAIL, TOTAL = range(7)

#: Bits of a word, as a power of 2; a word of words is a block.
_WORD = 6
_WORDS = BLOCK >> _WORD
assert _WORDS == 1 << _WORD
#: Where sums of powers begin in the scratch for parts of sums.
_HALF = BLOCK // 2
#: What other classes must have of a block's sum at least, for exponentials relative to the maximum of all: an exponent
#: is off by its rounding, which grows with it, while what counts in the tail is the share of a class in it.
_LEAST = 2.0**-8

_scaled_logit = bind(formulas.scaled_logit)
_rate = bind(formulas.rate)
_shift_factor = bind(formulas.shift_factor)
_log_softmax = bind(formulas.log_softmax)
_outcome_term = bind(formulas.outcome_term)
_tail_factor = bind(formulas.tail_factor)
_tail_shares = bind(formulas.tail_shares)
_kd_gradient = bind(formulas.kd_gradient)
_kd_loss = bind(formulas.kd_loss)
_log = bind(formulas.log)


# --- the single classes of a row -----------------------------------------------------------------------------------


@inner
def _bit(v):
    return np.uint64(1) << np.uint64(v & 63)


@inner
def _mark(v, bits, words):
    """Set the bit of class v, and that of its word; whether it was not set."""
    word, bit = v >> _WORD, _bit(v)
    if bits[word] & bit:
        return False
    bits[word] |= bit
    words[word >> _WORD] |= _bit(word)
    return True


@inner
def sort_single(indices, log_probs, n, label, classes, bits, words, slots, single, of_single, starts):
    """The first n entries of a row and the label (-1: none) in the order of their classes; returns a code and a detail.

    ``single`` becomes the classes, ``of_single[LOG_P]`` what the teacher says of them, ``starts`` [blocks + 3] where
    those of each block begin, then the place of the label, and whether it is not stored. ``bits`` of the classes and
    ``words`` [blocks] of bits, one of each word, are 0 before and after, ``slots`` [V] is scratch.
    """
    code, blocks = OK, blocks_in(classes)
    if not 1 <= n <= indices.size:
        return COUNT, np.int64(n)
    for j in range(n):
        v = np.int64(indices[j])
        if not log_probs[j] < math.inf:  # NaN too
            code = LOG_PROB
        elif log_probs[j] > LARGEST_LOG_PROB:
            code = MASS
        elif not 0 <= v < classes:
            code = CLASS
        elif not _mark(v, bits, words):
            code = DUPLICATE
        if code != OK:
            for k in range(j):
                bits[np.int64(indices[k]) >> _WORD] = np.uint64(0)
                words[np.int64(indices[k]) >> 2 * _WORD] = np.uint64(0)
            return code, np.int64(j)
        slots[v] = j
    starts[blocks + 1], starts[blocks + 2] = -1, 0
    if label >= 0 and _mark(label, bits, words):
        slots[label] = -1
        starts[blocks + 2] = 1
    r = 0
    for b in range(blocks):
        starts[b] = r
        of_words, words[b] = words[b], np.uint64(0)
        while of_words != np.uint64(0):
            word = (b << _WORD) + trailing_zeros(of_words)
            of_words &= of_words - np.uint64(1)
            left, bits[word] = bits[word], np.uint64(0)
            while left != np.uint64(0):
                v = (word << _WORD) + trailing_zeros(left)
                left &= left - np.uint64(1)
                single[r] = v
                of_single[LOG_P, r] = log_probs[slots[v]] if slots[v] >= 0 else -math.inf
                if v == label:
                    starts[blocks + 1] = r
                r += 1
    starts[blocks] = r
    for k in range(r, padded(r, 0.0)):
        of_single[LOG_P, k] = of_single[LOGIT, k] = -math.inf
    return code, np.int64(0)


@inner
def _exponentials(x, m, rate, out):
    """out = exp2((x - m) rate), in whole vectors."""
    for v in range(0, x.size, lanes_of(0.0)):
        store(out, v, exp2(load(x, v, 0.0) - m, rate))


@inner
def _total(x, size):
    """The sum of the first ``size`` elements, which are whole vectors."""
    total = full(0.0, 0.0)
    for v in range(0, size, lanes_of(0.0)):
        total += load(x, v, 0.0)
    return sum_lanes(total)


@inner
def weigh_single(of_single, count, n_stored, classes, log_tail, policy, most):
    """P of the single classes by the policy; (what is wrong with a row's probabilities, p_tail, their sum M)."""
    log_p, p = of_single[LOG_P, : padded(count, 0.0)], of_single[P]
    top, with_tail = -math.inf, policy in (BUCKET, UNIFORM)
    _exponentials(log_p, 0.0, _rate(1.0), p)
    mass, p_tail = _total(p, log_p.size), 0.0
    for r in range(count):
        top = max(top, log_p[r])
    if with_tail:
        if not log_tail < math.inf:  # NaN too
            return TAIL, p_tail, mass
        if log_tail > -math.inf and n_stored == classes:
            return ROOM, p_tail, mass
        p_tail = math.exp(log_tail)
    if not (mass + p_tail > 0.0 or top > -math.inf) or mass + p_tail > most:
        return MASS, p_tail, mass
    if policy == RENORMALIZE:
        _exponentials(log_p, top, _rate(1.0), p)  # which may all have underflowed
        mass = _total(p, log_p.size)
        log_mass, factor = top + math.log(mass), 1.0 / mass
        for r in range(count):
            log_p[r] -= log_mass
            p[r] *= factor
        mass = _total(p, log_p.size)
    return OK, p_tail, mass + p_tail


# --- all other classes ---------------------------------------------------------------------------------------------


@inner
def exp_parts(x, m, rate, e, power, parts, ahead, position):
    """e = exp2((x - m) rate) of a block, as :func:`kdcore.cpu.rows.exp_block`, whose sums stay apart in ``parts``.

    Those of e^power, where that is above 1, follow those of e, from _HALF on.
    """
    like = x[0]
    lanes, m, rate = lanes_of(like), type(like)(m), type(like)(rate)
    for u in range(0, x.size, _PART * lanes):
        part, part_h = full(0.0, like), full(0.0, like)
        for v in range(u, min(u + _PART * lanes, x.size), lanes):
            prefetch(ahead, position + v)
            y = exp2(load(x, v, like) - m, rate)
            store(e, v, y)
            part += y
            if power > 1:
                part_h += to_power(y, power)
        store(parts, u // _PART, part)
        store(parts, _HALF + u // _PART, part_h)


@inner
def sums_without(e, single, start, power, parts):
    """The sums of e and of e^power over a block, from :func:`exp_parts`, once e is 0 in its single classes.

    Parts with such classes are added up again, from what is left.
    """
    like = e[0]
    lanes = lanes_of(like)
    for v in single:
        e[v - start] = 0.0
    for v in single:
        u = (v - start) // (_PART * lanes) * (_PART * lanes)
        part, part_h = full(0.0, like), full(0.0, like)
        for w in range(u, min(u + _PART * lanes, e.size), lanes):
            y = load(e, w, like)
            part += y
            if power > 1:
                part_h += to_power(y, power)
        store(parts, u // _PART, part)
        store(parts, _HALF + u // _PART, part_h)
    z, z_h = full(0.0, 0.0), full(0.0, 0.0)
    for u in range(0, e.size, _PART * lanes):
        z += widen(load(parts, u // _PART, like))
        z_h += widen(load(parts, _HALF + u // _PART, like))
    return sum_lanes(z), sum_lanes(z_h)


@inner
def _without(s, b, single, value, pad):
    """Block ``b`` of a row in ``pad``, with ``value`` in its single classes, and beyond its end."""
    start = b * BLOCK
    count = min(BLOCK, s.size - start)
    x, _ = _copy_block(s, start, count, pad)
    for v in single:
        pad[v - start] = value
    for v in range(count, x.size):
        pad[v] = value
    return x


@inner
def other_states(s, b, single, hard, power, temperature, linear, work, pads, state):
    """The sums of block ``b`` without its ``single`` classes, and what they are relative to, M_S.

    Its exponentials go into ``work``, 0 for single classes. M_S is the maximum of the block, unless the others are so
    far below it that they have too little of the sum to be exact; then it is theirs. ``linear``: also the sum D of
    HEADROOM (x - origin).
    """
    start, ahead, pad, parts = b * BLOCK, (b + 1) * BLOCK, pads[PAD_S], pads[PAD_T]
    x, state[M_S] = measured_block(s, b, pad)
    e, rate, power_of_sum = work[E_S, start : start + x.size], _rate(temperature), power if hard else 0
    exp_parts(x, origin(state[M_S]), rate, e, power_of_sum, parts, s, ahead)
    state[Z_S], state[Z_H] = sums_without(e, single, start, power_of_sum, parts)
    if single.size > 0 and not state[Z_S] > _LEAST:
        x = _without(s, b, single, -math.inf, pad)
        state[M_S] = max_block(x)
        exp_parts(x, origin(state[M_S]), rate, e, power_of_sum, parts, s, ahead)
        state[Z_S], state[Z_H] = sums_without(e, single, start, power_of_sum, parts)
    if hard and power == 1:
        state[Z_H] = state[Z_S]
    elif hard and power == 0:
        e_h = work[E_H, start : start + x.size]
        exp_parts(x, origin(state[M_S]), _rate(1.0), e_h, 0, parts, s, ahead)
        state[Z_H], _ = sums_without(e_h, single, start, 0, parts)
    if linear:
        o = origin(state[M_S])
        state[D] = linear_sum(_without(s, b, single, o, pad), o)


@inner
def linear_sum(x, o):
    """The sum of HEADROOM (x - o) over a block, in float64."""
    like = x[0]
    lanes, total = lanes_of(like), full(0.0, 0.0)
    for u in range(0, x.size, _PART * lanes):
        part = full(0.0, like)
        for v in range(u, min(u + _PART * lanes, x.size), lanes):
            part += load(x, v, like) - o
        total += widen(part)
    result = sum_lanes(total) * HEADROOM
    if not -math.inf < result < math.inf:  # or it only overflows in the working type
        result = 0.0
        for v in range(x.size):
            result += _scaled_logit(np.float64(x[v]), np.float64(o), HEADROOM)
    return result


@inner
def write_others(e_h, power, e, hard, soft, even, single, known, start, out, streaming):
    """out = hard e_h^power + soft e - even of a block from class ``start`` on, and what is ``known`` of single ones.

    ``power`` 0: without e_h. ``streaming``: past the caches; so a single class is put in its vector, because one
    that is written afterwards would wait for memory. The rows e must go on for a vector beyond the block.
    """
    like = e[0]
    lanes, zero, one = lanes_of(like), full(0.0, like), full(1.0, like)
    hard, soft, even = type(like)(hard), type(like)(soft), type(like)(even)
    first, streaming = _aligned_part(out, lanes, streaming)
    v, r = 0, 0
    while v < out.size:
        if v >= first:
            end = single[r] - start if r < single.size else out.size
            stop = v + (end - v) // lanes * lanes  # whole vectors without a single class
            for u in range(v, stop, lanes):
                h = to_power(load(e_h, u, like), power) if power > 0 else zero
                g = _kd_gradient(h, load(e, u, like), one, hard, soft, even)
                if streaming:
                    stream(out, u, g)
                else:
                    store(out, u, g)
            v = stop
            if v == out.size:
                break
        count = min(lanes, (first if v < first else out.size) - v)
        h = to_power(load(e_h, v, like), power) if power > 0 else zero
        g = _kd_gradient(h, load(e, v, like), one, hard, soft, even)
        while r < single.size and single[r] - start < v + count:
            g = with_lane(g, single[r] - start - v, known[r])
            r += 1
        if count < lanes:
            store_part(out, v, count, g)
        elif streaming:
            stream(out, v, g)
        else:
            store(out, v, g)
        v += count


# --- a row, from its blocks and its single classes -----------------------------------------------------------------


@inner
def merge_sparse(s, single, of_single, own, states, blocks, hard, temperature, power):
    """The row's maxima and sums into states[blocks]: M_S, Z_S, Z_H of all classes, M_T, Z_T of those not stored.

    ``own``: the place among the single classes of a label that is not stored, or -1.
    """
    row, of_blocks = states[blocks], states[:blocks].T
    logit, e, e_h = of_single[LOGIT, : padded(single.size, 0.0)], of_single[E], of_single[H]
    tail = top = top_of(of_blocks[M_S])
    for r in range(single.size):
        logit[r] = to_real(s[single[r]])
        top = max(top, logit[r])
        if r == own:
            tail = max(tail, logit[r])
    _exponentials(logit, top, _rate(temperature), e)
    row[M_S], row[Z_S] = top, merged_sum(of_blocks[Z_S], of_blocks[M_S], top, temperature) + _total(e, logit.size)
    row[M_T], row[Z_T] = tail, merged_sum(of_blocks[Z_S], of_blocks[M_S], tail, temperature)
    if own >= 0 and logit[own] != -math.inf:
        row[Z_T] += _shift_factor(_scaled_logit(logit[own], tail, HEADROOM), temperature)
    if hard:
        if power > 0:
            for v in range(0, logit.size, lanes_of(0.0)):
                store(e_h, v, to_power(load(e, v, 0.0), power))
        else:
            _exponentials(logit, top, _rate(1.0), e_h)
        row[Z_H] = merged_sum(of_blocks[Z_H], of_blocks[M_S], top, 1.0) + _total(e_h, logit.size)


@inner
def tail_mean(states, blocks, starts, logit, own, classes, top, n_tail):
    """HEADROOM times the mean of x - top over the classes that are not stored."""
    total = _scaled_logit(logit[own], top, HEADROOM) if own >= 0 else 0.0
    for b in range(blocks):
        count = min(BLOCK, classes - b * BLOCK) - (starts[b + 1] - starts[b])
        if count > 0:
            total += states[b, D] + count * _scaled_logit(origin(states[b, M_S]), top, HEADROOM)
    return total / n_tail


@inner
def finish_sparse(
    states, blocks, starts, of_single, own, classes, n_stored, log_tail, p_tail, mass, policy, scale, alpha,
    temperature, kd_scale,
):  # fmt: skip
    """(ce, kl) of a usable row, scaled; the gradient of its single classes goes into ``of_single``, and what that of
    the others needs into the last row of ``states``.
    """
    row, told, count, label = states[blocks], states[blocks + 1], starts[blocks], starts[blocks + 1]
    log_p, logit, p, e, e_h, gradient = of_single
    top, z, tail, z_tail = row[M_S], row[Z_S], row[M_T], row[Z_T]
    n_tail, log_z, inverse = classes - n_stored, math.log(z), 1.0 / HEADROOM / temperature
    terms = full(0.0, 0.0)
    for v in range(0, padded(count, 0.0), lanes_of(0.0)):
        log_q = _log_softmax(_scaled_logit(load(logit, v, 0.0), top, HEADROOM), inverse, log_z)
        terms += _outcome_term(load(p, v, 0.0), load(log_p, v, 0.0), log_q)
    kl = sum_lanes(terms)
    if policy == BUCKET and log_tail > -math.inf:
        log_q_tail = _log_softmax(_scaled_logit(tail, top, HEADROOM), inverse, log_z - _log(z_tail))
        kl += _outcome_term(p_tail, log_tail, log_q_tail)
    elif policy == UNIFORM and log_tail > -math.inf:
        mean = tail_mean(states, blocks, starts, logit, own, classes, top, n_tail)
        kl += _outcome_term(p_tail, log_tail - math.log(n_tail), _log_softmax(mean, inverse, log_z))
    if math.isnan(kl):
        kl = math.inf  # in a row without NaN it is 0 * inf: p has underflowed where q is 0

    hard = scale * alpha / row[Z_H] if alpha > 0.0 else 0.0
    soft = _soft_scale(scale, alpha, kd_scale, temperature)
    soft_q = soft * mass / z
    to_share, even = _tail_shares(policy == BUCKET, p_tail, z_tail, n_tail)
    for v in range(0, padded(count, 0.0), lanes_of(0.0)):
        h = load(e_h, v, 0.0) if alpha > 0.0 else full(0.0, 0.0)
        store(gradient, v, _kd_gradient(h, load(e, v, 0.0), load(p, v, 0.0), hard, soft_q, soft))
    ce = 0.0
    if label >= 0:
        if label == own:
            share = to_share * _shift_factor(_scaled_logit(logit[own], tail, HEADROOM), temperature)
            factor = _tail_factor(mass, e[own] / z, p_tail, share if share > 0.0 else 0.0)
            gradient[own] = _kd_gradient(e_h[own], factor, even, hard, soft, soft)
        gradient[label] -= hard * row[Z_H]
        ce = scale * label_loss(row, logit[label])
    told[HARD], told[SOFT], told[SHARE], told[EVEN] = hard, soft_q, soft * p_tail * to_share, soft * even
    return ce, scale * kd_scale * kl


def _sparse_kd_kernel(sources):
    @njit(nogil=True, cache=True)
    def sparse_kd_kernel(
        student, student_stride, classes, indices, log_probs, log_tails, n_valid, policy, labels, weights, ignore_index,
        denominator, alpha, temperature, kd_scale, work, pads, states, bits, words, slots, single, of_single, starts,
        phases, lo, hi, first, last, gradient, gradient_stride, with_gradient, streaming, loss, ce, kl, status,
    ):  # fmt: skip
        """alpha CE + (1 - alpha) kd_scale D of the rows [lo, hi), its parts and its gradient; alpha < 1.

        indices, log_probs: [B, k], n_valid: [B]; log_tails: [B], or empty for samples.
        """
        _ = sources
        student, gradient = borrowed(student), borrowed(gradient)
        labels, weights, status = borrowed(labels), borrowed(weights), borrowed(status)
        work, pads, states = borrowed(work), borrowed(pads), borrowed(states)
        indices, log_probs, of_single = borrowed(indices), borrowed(log_probs), borrowed(of_single)
        bits, words, slots = borrowed(bits), borrowed(words), borrowed(slots)
        single, starts = borrowed(single), borrowed(starts)
        blocks = blocks_in(classes)
        hard = alpha > 0.0
        most = MOST_MASS if log_tails.size else math.inf
        power = h_power(temperature, True)
        row, told = states[blocks], states[blocks + 1]
        for i in range(lo, hi):
            s = student[i * student_stride : i * student_stride + classes]
            g = gradient[i * gradient_stride : i * gradient_stride + (classes if with_gradient else 0)]
            label = labels[i] if hard else -1
            log_tail = log_tails[i] if log_tails.size else -math.inf
            if phases & BEGIN:
                told[GO] = _begin(i, classes, labels, weights, ignore_index, status[i])
                if told[GO] == 1.0:
                    code, detail = sort_single(
                        indices[i], log_probs[i], n_valid[i], label, classes, bits, words, slots, single, of_single,
                        starts,
                    )  # fmt: skip
                    if code == OK:
                        code, told[P_TAIL], told[TOTAL] = weigh_single(
                            of_single, starts[blocks], n_valid[i], classes, log_tail, policy, most
                        )
                    if code != OK:
                        status[i, 0], status[i, 1] = code, detail
                        told[GO] = math.nan
                if told[GO] != 1.0:
                    loss[i] = ce[i] = kl[i] = told[GO]
                    _fill(g, told[GO])
            if told[GO] != 1.0:
                continue
            count, own = starts[blocks], starts[blocks + 1] if starts[blocks + 2] else -1
            if phases & STATES:
                for b in range(first, last):
                    other_states(
                        s, b, single[starts[b] : starts[b + 1]], hard, power, temperature, policy == UNIFORM, work,
                        pads, states[b],
                    )  # fmt: skip
            if phases & MERGE:
                merge_sparse(s, single[:count], of_single, own, states, blocks, hard, temperature, power)
                if not usable_student(row, hard, True):
                    _report_row(s, STUDENT, status[i])
                    told[GO] = loss[i] = ce[i] = kl[i] = math.nan
                    _fill(g, math.nan)
            if phases & FINISH and told[GO] == 1.0:
                scale = (weights[i] if weights.size else 1.0) / denominator
                ce[i], kl[i] = finish_sparse(
                    states, blocks, starts, of_single, own, classes, n_valid[i], log_tail, told[P_TAIL], told[TOTAL],
                    policy, scale, alpha, temperature, kd_scale,
                )  # fmt: skip
                loss[i] = _kd_loss(ce[i], kl[i], alpha)
            if phases & WRITE and with_gradient and told[GO] == 1.0:
                e_h = work[E_S] if power > 0 else work[E_H]
                for b in range(first, last):
                    start, stop = b * BLOCK, min((b + 1) * BLOCK, classes)
                    m = states[b, M_S]
                    soft = _tail_factor(
                        told[SOFT], shift_of(m, row[M_S], temperature), told[SHARE], shift_of(m, row[M_T], temperature)
                    )
                    write_others(
                        e_h[start:], (power if power > 0 else 1) if hard else 0, work[E_S, start:],
                        told[HARD] * shift_of(m, row[M_S], 1.0), soft, told[EVEN], single[starts[b] : starts[b + 1]],
                        of_single[GRADIENT, starts[b] : starts[b + 1]], start, g[start:stop], streaming,
                    )  # fmt: skip
        if streaming:
            fence()

    return sparse_kd_kernel


sparse_kd_kernel = _sparse_kd_kernel(_SOURCES)
