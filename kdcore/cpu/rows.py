"""Row functions of the CPU engine: njit functions on a row or a block of it, for reuse in a caller's own njit code.

Letters: V classes; x, s, t rows [V] of logits in storage form (float32, float64, or the bits of 16-bit floats, see
:mod:`kdcore.cpu.simd`); e exponentials in the working type (float32 or float64), z their sum. What is computed
is written in :mod:`kdcore.formulas`, for numbers; here it is applied to the vectors of :mod:`kdcore.cpu.simd`.

A row is cut into **blocks** of BLOCK classes, always at the same places. A block has maxima and sums of its own, its
exponentials are relative to its own maximum, and the blocks are merged in their order. So a row needs to be read from
memory once, a long row can be shared among threads, and no bit depends on how. Blocks are worked in whole vectors of
the working type: a block of other storage, and the last of a row, is first copied into a buffer and padded with -inf.

Sums are in float64 but for the first few vectors: at most _PART are added up lane by lane in the working type.
"""

import math

import numpy as np
from numba import njit
from numba.extending import overload

from kdcore import formulas
from kdcore.cpu.primitives import bind, exp2, inner
from kdcore.cpu.simd import (
    LANES,
    from_real,
    full,
    load,
    load_part,
    max_lanes,
    maximum,
    prefetch,
    store,
    store_part,
    stream,
    sum_lanes,
    to_real,
    widen,
)
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import NAN, NO_SUPPORT, OK, POSITIVE_INF

__all__ = [
    "BLOCK",
    "block_of",
    "blocks_in",
    "check_row",
    "cross_entropy_row",
    "exp_block",
    "forward_kl_row",
    "hinton_gradient_row",
    "log_softmax_row",
    "logsumexp_row",
    "max_block",
    "measured_block",
    "padded",
    "row_scratch",
    "softmax_row",
    "write_block",
]

#: Classes of a block: 16 KiB of float32, so that the blocks of student and teacher stay in the nearest caches.
BLOCK = 4096
_PART = 8

#: Rows of ``work`` [WORK_ROWS, width]: exponentials, in the working type. They go on for a vector beyond the row.
E_S, E_T, E_H = range(3)
WORK_ROWS = 3
#: Rows of ``pads`` [2, BLOCK], the buffers of :func:`block_of` and :func:`measured_block`, of one thread.
PAD_S, PAD_T = range(2)

#: Columns of ``states`` [blocks + 2, COLUMNS] in float64: the maxima and sums of each block, then of the row. For D see
#: :func:`merge_states`. The last row is the caller's.
M_S, Z_H, Z_S, D, SLOPE, M_T, Z_T = range(7)
COLUMNS = 7

_scaled_logit = bind(formulas.scaled_logit)
_rate = bind(formulas.rate)
_log_softmax = bind(formulas.log_softmax)
_log_ratio = bind(formulas.log_ratio)
_cross_entropy = bind(formulas.cross_entropy)
_forward_kl_moment = bind(formulas.forward_kl_moment)
_merged_forward_kl = bind(formulas.merged_forward_kl)
_shift_factor = bind(formulas.shift_factor)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)
_kd_gradient = bind(formulas.kd_gradient)


# --- cutting a row -------------------------------------------------------------------------------------------------


@inner
def check_row(x):
    """What is wrong with a row, and at which class: NAN, POSITIVE_INF, NO_SUPPORT, or OK."""
    support = False
    for v in range(x.size):
        value = to_real(x[v])
        if math.isnan(value):
            return NAN, v
        if value == math.inf:
            return POSITIVE_INF, v
        support |= value > -math.inf
    return (OK if support else NO_SUPPORT), 0


def lanes_of(like):
    """The number of lanes of a vector of the type of ``like``. For compiled code only."""
    raise TypeError("lanes_of is for compiled code")


@overload(lanes_of)
def _lanes_of(like):
    lanes = LANES[like]
    return lambda like: lanes


@inner
def blocks_in(classes):
    """The number of blocks of a row."""
    return (classes + BLOCK - 1) // BLOCK


@inner
def padded(size, like):
    """``size`` rounded up to whole vectors."""
    lanes = lanes_of(like)
    return (size + lanes - 1) // lanes * lanes


@inner
def _copy_block(x, start, count, buffer):
    """x[start : start + count] in ``buffer``, filled up with -inf to whole vectors, and its maximum."""
    like = buffer[0]
    lanes = lanes_of(like)
    whole = count // lanes * lanes
    top = full(-math.inf, like)
    for v in range(0, whole, lanes):
        y = load(x, start + v, like)
        store(buffer, v, y)
        top = maximum(y, top)
    if whole < count:
        y = load_part(x, start + whole, count - whole, -math.inf, like)
        store(buffer, whole, y)
        top = maximum(y, top)
    return buffer[: padded(count, like)], max_lanes(top)


def block_of(x, b, buffer):
    """Block ``b`` of a row in whole vectors of the type of ``buffer`` [BLOCK]: a view, or a copy in it that -inf fills.

    For compiled code only.
    """
    raise TypeError("block_of is for compiled code")


@overload(block_of)
def _block_of(x, b, buffer):
    if x.dtype != buffer.dtype:
        return lambda x, b, buffer: _copy_block(x, b * BLOCK, min(BLOCK, x.size - b * BLOCK), buffer)[0]

    def view(x, b, buffer):
        start, count = b * BLOCK, min(BLOCK, x.size - b * BLOCK)
        if count % lanes_of(buffer[0]) == 0:
            return x[start : start + count]
        return _copy_block(x, start, count, buffer)[0]

    return view


def measured_block(x, b, buffer):
    """:func:`block_of` and the block's maximum, in which NaN do not count: they show in the sums.

    For compiled code only.
    """
    raise TypeError("measured_block is for compiled code")


@overload(measured_block)
def _measured_block(x, b, buffer):
    if x.dtype != buffer.dtype:  # converted once, and measured on the way
        return lambda x, b, buffer: _copy_block(x, b * BLOCK, min(BLOCK, x.size - b * BLOCK), buffer)

    def measure(x, b, buffer):
        y = block_of(x, b, buffer)
        return y, max_block(y)

    return measure


# --- a block -------------------------------------------------------------------------------------------------------


@inner
def max_block(x):
    """The maximum of a block, whose NaN do not count."""
    lanes = lanes_of(x[0])
    first = full(-math.inf, x[0])
    second = first
    for v in range(0, x.size - lanes, 2 * lanes):
        first = maximum(load(x, v, x[0]), first)
        second = maximum(load(x, v + lanes, x[0]), second)
    return max_lanes(maximum(maximum(first, second), load(x, x.size - lanes, x[0])))


@inner
def origin(m):
    """What exponentials of a block with the maximum m are relative to: m, and 0 in a block without support."""
    return m if m > -math.inf else type(m)(0)


@inner
def exp_block(x, m, rate, e, ahead, position):
    """e = exp2((x - m) rate) of a block; returns the sum z. Prefetches as much of ``ahead`` from ``position`` on."""
    like = x[0]
    lanes, m, rate = lanes_of(like), type(like)(m), type(like)(rate)
    z = full(0.0, 0.0)
    for u in range(0, x.size, _PART * lanes):
        part = full(0.0, like)
        for v in range(u, min(u + _PART * lanes, x.size), lanes):
            prefetch(ahead, position + v)
            y = exp2(load(x, v, like) - m, rate)
            store(e, v, y)
            part += y
        z += widen(part)
    return sum_lanes(z)


@inner
def power_sum(e, power):
    """The sum of e to the power 1, 2 or 4 over a block."""
    like = e[0]
    lanes = lanes_of(like)
    z = full(0.0, 0.0)
    for u in range(0, e.size, _PART * lanes):
        part = full(0.0, like)
        for v in range(u, min(u + _PART * lanes, e.size), lanes):
            part += to_power(load(e, v, like), power)
        z += widen(part)
    return sum_lanes(z)


@inner
def to_power(e, power):
    if power > 1:
        e = e * e
        if power > 2:
            e = e * e
    return e


@inner
def moment_block(t, s, m_t, m_s, rate, ratio, e, ahead, position):
    """The teacher's :func:`exp_block`, and the sum w of forward KL scaled by HEADROOM, of blocks t and s."""
    like = t[0]
    lanes, rate, ratio = lanes_of(like), type(like)(rate), type(like)(ratio)
    z, w = full(0.0, 0.0), full(0.0, 0.0)
    for u in range(0, t.size, _PART * lanes):
        part_z, part_w = full(0.0, like), full(0.0, like)
        for v in range(u, min(u + _PART * lanes, t.size), lanes):
            prefetch(ahead, position + v)
            d_t, d_s = load(t, v, like) - m_t, load(s, v, like) - m_s
            y = exp2(d_t, rate)
            store(e, v, y)
            part_z += y
            part_w = _forward_kl_moment(part_w, y, d_t, d_s, ratio)
        z += widen(part_z)
        w += widen(part_w)
    total = sum_lanes(w) * HEADROOM
    if not -math.inf < total < math.inf:
        total = _careful_moment(t, s, m_t, m_s, ratio, e)
    return sum_lanes(z), total


@inner
def _careful_moment(t, s, m_t, m_s, ratio, e):
    """The sum w of :func:`moment_block`, where it is not finite or only overflows in the working type."""
    w = 0.0
    for v in range(t.size):
        d_t = _scaled_logit(np.float64(t[v]), np.float64(m_t), HEADROOM)
        d_s = _scaled_logit(np.float64(s[v]), np.float64(m_s), HEADROOM)
        w = _forward_kl_moment(w, np.float64(e[v]), d_t, d_s, np.float64(ratio))
    return w


@inner
def write_block(e_h, power, e_q, e_p, hard, soft_q, soft_p, with_soft, out, streaming, kept):
    """out = hard e_h^power + soft_q e_q - soft_p e_p of a block, in the storage type of out.

    ``power`` 0: without e_h; ``with_soft`` False: without e_q and e_p. ``streaming``: past the caches, but for the
    vector with the element ``kept``, if there is one, which is about to be written again: that would wait for memory.
    The rows e must go on for a vector beyond the block.
    """
    like = e_q[0]
    lanes, zero = lanes_of(like), full(0.0, like)
    hard, soft_q, soft_p = type(like)(hard), type(like)(soft_q), type(like)(soft_p)
    first, streaming = _aligned_part(out, lanes, streaming)
    last = first + (out.size - first) // lanes * lanes
    a = b = last
    if first <= kept < last:
        a = first + (kept - first) // lanes * lanes
        b = a + lanes
    for start, stop in ((0, first), (first, a), (a, b), (b, last), (last, out.size)):
        whole, past = stop - start >= lanes, streaming and start != a
        for v in range(start, stop, lanes):
            h, q, p = zero, zero, zero
            if power > 0:
                h = to_power(load(e_h, v, like), power)
            if with_soft:
                q, p = load(e_q, v, like), load(e_p, v, like)
            g = _kd_gradient(h, q, p, hard, soft_q, soft_p)
            if not whole:
                store_part(out, v, stop - start, g)
            elif past:
                stream(out, v, g)
            else:
                store(out, v, g)


@inner
def _aligned_part(out, lanes, streaming):
    """Where the aligned vectors of ``out`` start, if they are to be streamed; and whether they can be."""
    address = out.ctypes.data
    if not streaming or address % out.itemsize != 0:
        return 0, False
    return min(out.size, -(address // out.itemsize) % lanes), True


@inner
def log_softmax_block(x, m, inverse_temperature, log_z, out, streaming):
    """out = (x - m) / T - log z of a block, in the storage type of out, which may be where x is."""
    like = x[0]
    lanes, m, log_z = lanes_of(like), type(like)(m), type(like)(log_z)
    # Scaled, since here it shows if x - m overflows.
    headroom, inverse_temperature = type(like)(HEADROOM), type(like)(inverse_temperature / HEADROOM)
    first, streaming = _aligned_part(out, lanes, streaming)
    last = first + (out.size - first) // lanes * lanes
    if first > 0:
        d = _scaled_logit(load_part(x, 0, first, -math.inf, like), m, headroom)
        y = _log_softmax(d, inverse_temperature, log_z)
        store_part(out, 0, first, y)
    for v in range(first, last, lanes):
        y = _log_softmax(_scaled_logit(load(x, v, like), m, headroom), inverse_temperature, log_z)
        if streaming:
            stream(out, v, y)
        else:
            store(out, v, y)
    if last < out.size:
        d = _scaled_logit(load_part(x, last, out.size - last, -math.inf, like), m, headroom)
        y = _log_softmax(d, inverse_temperature, log_z)
        store_part(out, last, out.size - last, y)


# --- a row, merged from blocks -------------------------------------------------------------------------------------


@inner
def shift_of(m, top, temperature):
    """exp((m - top) / T): the factor from sums relative to a block's maximum to sums relative to the row's."""
    if m == top:
        return 1.0  # also where both are infinite
    return _shift_factor(_scaled_logit(np.float64(m), np.float64(top), HEADROOM), temperature)


@inner
def top_of(maxima):
    """The largest of the maxima of blocks."""
    top = -math.inf
    for m in maxima:
        top = max(top, m)
    return top


@inner
def merged_sum(sums, maxima, top, temperature):
    """The sum over a row from the sums of its blocks, in their order; NaN where one is."""
    total = 0.0
    for b in range(sums.size):
        total += shift_of(maxima[b], top, temperature) * sums[b]
    return total


@inner
def softmax_states(x, temperature, keep, work, pads, states, first, last):
    """Maxima and sums of the blocks [first, last); ``keep``: their exponentials stay in work[E_S]."""
    for b in range(first, last):
        y, states[b, M_S] = measured_block(x, b, pads[PAD_S])
        start = b * BLOCK if keep else 0
        states[b, Z_S] = exp_block(
            y, origin(states[b, M_S]), _rate(temperature), work[E_S, start : start + y.size], x, (b + 1) * BLOCK
        )


@inner
def merge_softmax(states, blocks, temperature):
    """The row's maximum and sum into states[blocks]. Returns whether the row can be used."""
    row, of_blocks = states[blocks], states[:blocks].T
    row[M_S] = top_of(of_blocks[M_S])
    row[Z_S] = merged_sum(of_blocks[Z_S], of_blocks[M_S], row[M_S], temperature)
    return row[M_S] > -math.inf and row[Z_S] > 0.0  # not NaN


@inner
def write_softmax(temperature, work, states, first, last, out, streaming):
    """Softmax of the blocks [first, last) of a row into out [V]."""
    row = states[blocks_in(out.size)]
    for b in range(first, last):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, out.size)
        scale = shift_of(states[b, M_S], row[M_S], temperature) / row[Z_S]
        e = work[E_S, start:]
        write_block(e, 1, e, e, scale, 0.0, 0.0, False, out[start:stop], streaming, -1)


@inner
def write_log_softmax(x, temperature, work, pads, states, first, last, out, streaming):
    """Log-softmax of the blocks [first, last) of a row into out [V], which may be x."""
    row = states[blocks_in(out.size)]
    log_z = math.log(row[Z_S])
    for b in range(first, last):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, out.size)
        o = origin(states[b, M_S])
        y = block_of(x, b, pads[PAD_S])
        log_softmax_block(y, o, 1.0 / temperature, log_z + (row[M_S] - o) / temperature, out[start:stop], streaming)


@inner
def h_power(temperature, soft):
    """The power that takes the student's exponentials at T to those at 1: 1, 2, 4, or 0, for none that is exact."""
    if soft and temperature in (1.0, 2.0, 4.0):
        return int(temperature)
    return 0


@inner
def block_states(s, t, b, hard, soft, power, temperature, teacher_temperature, fused, work, pads, state):
    """The maxima and sums of block ``b``; its exponentials go into ``work``."""
    start, ahead = b * BLOCK, (b + 1) * BLOCK
    x, m_s = measured_block(s, b, pads[PAD_S])
    o_s = origin(m_s)
    state[M_S] = m_s
    if soft:
        y, m_t = measured_block(t, b, pads[PAD_T])
        o_t = origin(m_t)
        e_s, e_t = work[E_S, start : start + x.size], work[E_T, start : start + x.size]
        state[M_T] = m_t
        state[Z_S] = exp_block(x, o_s, _rate(temperature), e_s, s, ahead)
        if fused:
            ratio = teacher_temperature / temperature
            state[Z_T], state[D] = moment_block(y, x, o_t, o_s, _rate(teacher_temperature), ratio, e_t, t, ahead)
        else:
            state[Z_T] = exp_block(y, o_t, _rate(teacher_temperature), e_t, t, ahead)
    if hard and power > 0:
        state[Z_H] = state[Z_S] if power == 1 else power_sum(work[E_S, start : start + x.size], power)
    elif hard:
        state[Z_H] = exp_block(x, o_s, _rate(1.0), work[E_H, start : start + x.size], s, ahead)


@inner
def merge_states(states, blocks, hard, soft, temperature, teacher_temperature):
    """The maxima and sums of the row into states[blocks], from those of its blocks in their order; D is still w."""
    if blocks == 1:
        for column in range(COLUMNS):  # which takes seconds less to compile than an assignment of rows
            states[1, column] = states[0, column]
        return
    row, of_blocks = states[blocks], states[:blocks].T
    row[M_S] = top_of(of_blocks[M_S])
    if hard:
        row[Z_H] = merged_sum(of_blocks[Z_H], of_blocks[M_S], row[M_S], 1.0)
    if soft:
        row[Z_S] = merged_sum(of_blocks[Z_S], of_blocks[M_S], row[M_S], temperature)
        row[M_T] = top_of(of_blocks[M_T])
        row[Z_T] = merged_sum(of_blocks[Z_T], of_blocks[M_T], row[M_T], teacher_temperature)
        row[D] = 0.0
        for b in range(blocks):
            row[D] += moment_at(states[b], row[M_S], row[M_T], temperature, teacher_temperature)


@inner
def moment_at(state, top_s, top_t, temperature, teacher_temperature):
    """The sum w of a state (a block's, say) relative to maxima that are at least its own."""
    d_s = _scaled_logit(state[M_S], top_s, HEADROOM)
    d_t = _scaled_logit(state[M_T], top_t, HEADROOM)
    factor = shift_of(state[M_T], top_t, teacher_temperature)
    return _merged_forward_kl(state[D], state[Z_T], d_t, d_s, teacher_temperature / temperature, factor)


@inner
def usable_student(row, hard, soft):
    """Whether a student's row can be used, from its state: some support, and no NaN, which would be in a sum."""
    return row[M_S] > -math.inf and (not hard or row[Z_H] > 0.0) and (not soft or row[Z_S] > 0.0)


@inner
def usable_teacher(row, soft):
    """Whether a teacher's row can be used."""
    return not soft or (row[M_T] > -math.inf and row[Z_T] > 0.0)


@inner
def label_loss(row, logit):
    """CE of a label with this logit, from the state of its row."""
    return _cross_entropy(_scaled_logit(np.float64(logit), row[M_S], HEADROOM), row[Z_H])


@inner
def forward_kl_of(row, teacher_temperature):
    """KL(p || q) from the state of a row, where D is w."""
    return _forward_kl_from_sums(row[D], row[Z_T], row[Z_S], teacher_temperature)


@inner
def write_row(
    states, row, first, last, power, hard, soft_q, soft_p, alpha, temperature, teacher_temperature, fused, label, work,
    streaming, out,
):  # fmt: skip
    """The gradient of the blocks [first, last) into out [V].

    hard h + soft_q q - soft_p p for forward KL, hard h + soft_q (q phi') - soft_p q for other divergences, with the
    factors for exponentials relative to the maxima in ``row``, less hard's one of the label, if 0 <= label < V.
    """
    with_hard, with_soft = alpha > 0.0, alpha < 1.0
    e_h = work[E_S] if power > 0 else work[E_H]
    e_q, e_p = (work[E_S], work[E_T]) if fused else (work[E_T], work[E_S])
    for b in range(first, last):
        start, stop = b * BLOCK, min((b + 1) * BLOCK, out.size)
        h, q, p = 0.0, 0.0, 0.0
        if with_hard:
            h = hard * shift_of(states[b, M_S], row[M_S], 1.0)
        if with_soft:
            factor_s = shift_of(states[b, M_S], row[M_S], temperature)
            if fused:
                q, p = soft_q * factor_s, soft_p * shift_of(states[b, M_T], row[M_T], teacher_temperature)
            else:
                q, p = soft_q, soft_p * factor_s
        write_block(
            e_h[start:], (power if power > 0 else 1) if with_hard else 0, e_q[start:], e_p[start:], h, q, p, with_soft,
            out[start:stop], streaming, label - start,
        )  # fmt: skip
        if with_hard and start <= label < stop:  # in float64, since h - 1 cancels
            e = to_power(np.float64(e_h[label]), power)
            soft_part = (np.float64(e_q[label]), np.float64(e_p[label])) if with_soft else (0.0, 0.0)
            g = _kd_gradient(e, soft_part[0], soft_part[1], h, q, p) - hard * row[Z_H]
            out[label] = from_real(g, out[label])


def two_formula_terms(term, slope):
    """The sweep that sums the two formulas of a divergence over a block, of which it leaves q phi' in ``work``."""

    @inner
    def terms_block(x, y, e_s, e_t, o_s, o_t, factor_s, factor_t, inverse_s, inverse_t, constant, c):
        """Returns the sums of phi and q phi'; q phi' goes into e_t. ``constant``: log z_t - log z_s at the origins."""
        like = x[0]
        lanes = lanes_of(like)
        # c stays in float64: what a formula makes of it, 1 - c say, is rounded once, as a vector.
        factor_s, factor_t = type(like)(factor_s), type(like)(factor_t)
        inverse_s, inverse_t, constant = type(like)(inverse_s), type(like)(inverse_t), type(like)(constant)
        terms, slopes = full(0.0, 0.0), full(0.0, 0.0)
        for v in range(0, x.size, lanes):
            p, q = load(e_t, v, like) * factor_t, load(e_s, v, like) * factor_s
            r = _log_ratio(load(x, v, like) - o_s, load(y, v, like) - o_t, inverse_s, inverse_t, constant)
            weighted = slope(p, q, r, c)
            terms += widen(term(p, q, r, c))
            slopes += widen(weighted)
            store(e_t, v, weighted)
        return sum_lanes(terms), sum_lanes(slopes)

    return terms_block


# --- one row at a time, for a caller's own njit code ----------------------------------------------------------------
#
# x, s and t must be usable rows (no NaN, no +inf, not all -inf), and temperatures between 1e-20 and 1e20 in float32.


@njit
def row_scratch(classes, like):
    """Scratch for rows of ``classes``, worked in the type of ``like``: float64 for float64 rows, else float32."""
    work = np.empty((WORK_ROWS, padded(classes, like) + lanes_of(like)), type(like))
    return work, np.empty((2, BLOCK), type(like)), np.empty((blocks_in(classes) + 2, COLUMNS))


@njit
def logsumexp_row(x, temperature, scratch):
    """log of the sum of exp(x / T)."""
    work, pads, states = scratch
    blocks = blocks_in(x.size)
    softmax_states(x, temperature, False, work, pads, states, 0, blocks)
    merge_softmax(states, blocks, temperature)
    return states[blocks, M_S] / temperature + math.log(states[blocks, Z_S])


@njit
def softmax_row(x, temperature, scratch, out):
    """out = softmax(x / T)."""
    work, pads, states = scratch
    blocks = blocks_in(x.size)
    softmax_states(x, temperature, True, work, pads, states, 0, blocks)
    merge_softmax(states, blocks, temperature)
    write_softmax(temperature, work, states, 0, blocks, out, False)


@njit
def log_softmax_row(x, temperature, scratch, out):
    """out = log softmax(x / T)."""
    work, pads, states = scratch
    blocks = blocks_in(x.size)
    softmax_states(x, temperature, False, work, pads, states, 0, blocks)
    merge_softmax(states, blocks, temperature)
    write_log_softmax(x, temperature, work, pads, states, 0, blocks, out, False)


@njit
def cross_entropy_row(s, label, scratch):
    """-log softmax(s)[label]."""
    work, pads, states = scratch
    blocks = blocks_in(s.size)
    softmax_states(s, 1.0, False, work, pads, states, 0, blocks)
    merge_softmax(states, blocks, 1.0)
    row = states[blocks]
    return _cross_entropy(_scaled_logit(np.float64(to_real(s[label])), row[M_S], HEADROOM), row[Z_S])


@njit
def forward_kl_row(s, t, temperature, scratch):
    """KL(softmax(t/T) || softmax(s/T)), without T²."""
    work, pads, states = scratch
    blocks = blocks_in(s.size)
    for b in range(blocks):
        block_states(s, t, b, False, True, 0, temperature, temperature, True, work, pads, states[b])
    merge_states(states, blocks, False, True, temperature, temperature)
    return forward_kl_of(states[blocks], temperature)


@njit
def hinton_gradient_row(s, t, temperature, scratch, out):
    """out = T (softmax(s/T) - softmax(t/T)), the gradient of T² KL by s."""
    forward_kl_row(s, t, temperature, scratch)
    work, _, states = scratch
    blocks = blocks_in(s.size)
    row = states[blocks]
    q, p = temperature / row[Z_S], temperature / row[Z_T]
    write_row(states, row, 0, blocks, 0, 0.0, q, p, 0.0, temperature, temperature, True, -1, work, False, out)
