"""Variants of the KD objective on the CPU, built from the row functions of :mod:`kdcore.cpu.rows` and from its kernels.

Letters as in :mod:`kdcore.cpu.kernels`. A variant works a few rows at a time: they are copied, whatever their storage,
into float64 buffers of about _CHUNK elements (or of one row), which a kernel and the engine's own :func:`kd_rows` turn
into float64 gradients, and these are rounded once to the storage of the gradient. So there is one compiled kernel each,
a thread needs no more memory than a few rows, and no bit depends on what else is in the batch.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from kdcore import formulas
from kdcore.cpu.kernels import _SOURCES, _begin, _report_row
from kdcore.cpu.launch import _readable, kd_rows
from kdcore.cpu.pool import run_blocks
from kdcore.cpu.primitives import bind, inner
from kdcore.cpu.rows import (
    M_S,
    M_T,
    Z_H,
    Z_S,
    Z_T,
    block_states,
    blocks_in,
    check_row,
    exp_block,
    forward_kl_of,
    h_power,
    lanes_of,
    max_block,
    merge_states,
    row_scratch,
    write_row,
)
from kdcore.cpu.simd import load, store
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import LABEL, NO_SPREAD, OK, STUDENT, TEACHER, UNDEFINED_GRADIENT, WEIGHT

__all__ = ["dkd_rows", "mixture_rows", "standardized_rows"]

#: Elements that a thread copies at a time, unless a row is longer.
_CHUNK = 1 << 15
#: Rows of buffers are whole vectors.
_LANES = 8

_kd_loss = bind(formulas.kd_loss)
_soft_scale = bind(formulas.soft_scale)
_log_odds = bind(formulas.log_odds)
_rate = bind(formulas.rate)
_scaled_logit = bind(formulas.scaled_logit)
_sigmoid = bind(formulas.sigmoid)
_softplus = bind(formulas.softplus)
_two_way_kl = bind(formulas.two_way_kl)
_probability_difference = bind(formulas.probability_difference)
_dkd_divergence = bind(formulas.dkd_divergence)
_dkd_factors = bind(formulas.dkd_factors)
_dkd_label_gradient = bind(formulas.dkd_label_gradient)
_log_softmax = bind(formulas.log_softmax)
_log_of_sum = bind(formulas.log_of_sum)
_spread_scale = bind(formulas.spread_scale)
_standardized = bind(formulas.standardized)
_standardized_gradient = bind(formulas.standardized_gradient)


# --- rows by chunks ------------------------------------------------------------------------------------------------


def _by_chunks(task, student, gradient, buffers, threads):
    """Call ``task(part, x, *scratch)`` for slices of the rows, and round what it leaves in x to the gradient.

    x [part, V] is a float64 copy of the student's rows; scratch are ``buffers`` arrays [part, width], uninitialised but
    for -inf beyond V, where width is V in whole vectors.
    """
    rows, classes = student.shape
    width = -(-classes // _LANES) * _LANES
    step = max(1, min(rows, _CHUNK // width))

    def work(lo, hi):
        memory = np.empty((1 + buffers, step, width))
        memory[:, :, classes:] = -math.inf
        with np.errstate(all="ignore"):  # what is beyond float16 becomes infinite, and log 0 is -inf
            for start in range(lo, hi, step):
                part = slice(start, min(start + step, hi))
                x, *scratch = memory[:, : part.stop - start]
                x[:, :classes] = student[part]
                task(part, x, *scratch)
                gradient[part] = x[:, :classes]

    task(slice(0, 0), *np.empty((1 + buffers, 0, width)))  # compiles in the caller's thread
    run_blocks(work, rows, classes, threads)


def _is_read(labels, weights, ignore_index, part):
    """Whether each of the rows is read, [part]; the weights and labels need not be valid."""
    read = np.ones(part.stop - part.start, bool)
    if labels.size:
        read &= labels[part] != ignore_index
    if weights.size:
        read &= weights[part] != 0.0
    return read


# --- decoupled -----------------------------------------------------------------------------------------------------


@inner
def _probability(u):
    return _sigmoid(u, math.exp(-abs(u)))


@inner
def _minus_log(u):
    """-log of the probability of the log-odds u."""
    return _softplus(-u, math.exp(-abs(u)))


@inner
def _two_way(u_s, u_t):
    """KL of (p, 1 - p) and (q, 1 - q), and q - p, from their log-odds: q is 0 or 1 only where p is."""
    q, rest_q, p, rest_p = _probability(u_s), _probability(-u_s), _probability(u_t), _probability(-u_t)
    of_p, of_rest = _minus_log(u_s) - _minus_log(u_t), _minus_log(-u_s) - _minus_log(-u_t)
    return _two_way_kl(p, rest_p, of_p, of_rest), _probability_difference(u_s, u_t, q, p, rest_q, rest_p)


@inner
def _supported(x):
    return max_block(x) > -math.inf


@inner
def _row_log_odds(logit, m, z, temperature):
    """log-odds of a class, from the others' maximum and sum."""
    return _log_odds(_scaled_logit(logit, m, HEADROOM), temperature, math.log(z))


@inner
def _dkd_row(x, y, classes, label, hard, soft, temperature, target, nontarget, scratch):
    """CE, TCKD and NCKD of a usable row, without factors, whether there is a gradient, and that gradient into x.

    ``hard`` and ``soft`` are the gradient's factors. The buffers x and y are whole vectors.
    """
    work, pads, states = scratch
    s, t = x[:classes], y[:classes]
    s_label, t_label = s[label], t[label]
    s[label] = t[label] = -math.inf
    student_rest, teacher_rest = _supported(x), _supported(y)
    if not student_rest:  # q = 1, and among no classes there is no distribution
        s[:] = 0.0
        infinite = teacher_rest and target + nontarget > 0.0
        return 0.0, math.inf if infinite and target > 0.0 else 0.0, math.inf if infinite else 0.0, not infinite
    if not teacher_rest:  # p = 1, and of the other classes the teacher says nothing
        t[:] = s
        nontarget = 0.0

    with_hard, power, blocks = hard > 0.0, h_power(temperature, True), blocks_in(classes)
    row = states[blocks]
    for b in range(blocks):
        block_states(s, t, b, with_hard, True, power, temperature, temperature, True, work, pads, states[b])
    merge_states(states, blocks, with_hard, True, temperature, temperature)

    ce, tckd, nckd, rest, difference = 0.0, 0.0, 0.0, 0.0, 0.0
    if with_hard:
        u = _row_log_odds(s_label, row[M_S], row[Z_H], 1.0)
        ce, rest = _minus_log(u), _probability(-u)
    if target > 0.0:
        u_s = _row_log_odds(s_label, row[M_S], row[Z_S], temperature)
        u_t = _row_log_odds(t_label, row[M_T], row[Z_T], temperature) if teacher_rest else math.inf
        tckd, difference = _two_way(u_s, u_t)
        difference *= target
        if s_label == -math.inf and t_label > -math.inf:
            tckd = math.inf
    if nontarget > 0.0:
        nckd = forward_kl_of(row, temperature)
    hard_q, soft_q, soft_p = _dkd_factors(
        hard, soft, rest, difference, nontarget, row[Z_H] if with_hard else 1.0, row[Z_S], row[Z_T]
    )
    write_row(
        states, row, 0, blocks, power, hard_q, soft_q, soft_p, 0.5 if with_hard else 0.0, temperature, temperature,
        True, -1, work, False, s,
    )  # fmt: skip
    s[label] = _dkd_label_gradient(hard, soft, rest, difference)
    return ce, tckd, nckd, True


def _dkd_kernel(sources):
    @njit(nogil=True, cache=True)
    def dkd_kernel(
        x, y, classes, labels, weights, ignore_index, denominator, alpha, temperature, kd_scale, target, nontarget,
        loss, ce, kl, status,
    ):  # fmt: skip
        """alpha CE + (1 - alpha) kd_scale (target TCKD + nontarget NCKD), and its gradient into x; alpha < 1."""
        _ = sources
        scratch = row_scratch(classes, 0.0)
        for i in range(x.shape[0]):
            go = _begin(i, classes, labels, weights, ignore_index, status[i])
            s, t = x[i, :classes], y[i, :classes]
            if go == 1.0:
                if check_row(s)[0] != OK:
                    go = math.nan
                    _report_row(s, STUDENT, status[i])
                elif check_row(t)[0] != OK:
                    go = math.nan
                    _report_row(t, TEACHER, status[i])
            if go != 1.0:
                loss[i] = ce[i] = kl[i] = go
                s[:] = go
                continue
            scale = (weights[i] if weights.size else 1.0) / denominator
            c, tckd, nckd, defined = _dkd_row(
                x[i], y[i], classes, labels[i], scale * alpha, _soft_scale(scale, alpha, kd_scale, temperature),
                temperature, target, nontarget, scratch,
            )  # fmt: skip
            ce[i] = scale * c
            kl[i] = scale * kd_scale * _dkd_divergence(target, tckd, nontarget, nckd)
            loss[i] = _kd_loss(ce[i], kl[i], alpha)
            if not defined:
                status[i, 0] = UNDEFINED_GRADIENT
                s[:] = math.nan

    return dkd_kernel


_dkd = _dkd_kernel(_SOURCES)


def dkd_rows(
    student, teacher, target, nontarget, labels, weights, denominator, objective, gradient, loss, ce, kl, status,
    threads,
):  # fmt: skip
    """Decoupled KD: row losses [B] scaled by weight / denominator, and their gradient [B, V]; alpha < 1."""
    labels, weights = _readable(labels), _readable(weights)
    classes = student.shape[1]

    def task(part, x, y):
        y[:, :classes] = teacher[part]
        _dkd(
            x, y, classes, labels[part], weights[part], objective.ignore_index, denominator[0], objective.alpha,
            objective.temperature, objective.kd_scale, target, nontarget, loss[part], ce[part], kl[part], status[part],
        )  # fmt: skip

    _by_chunks(task, student, gradient, 1, threads)


# --- mixtures of teachers ------------------------------------------------------------------------------------------


@inner
def _mix_row(t, log_share, temperature, e, mixed):
    """Add a share of softmax(t / T) to the mixture, in logarithms. Returns whether the row of t can be used."""
    like = t[0]
    lanes, inverse = lanes_of(like), 1.0 / temperature
    m = max_block(t)
    if not m > -math.inf:
        return False
    z = exp_block(t, m, _rate(temperature), e, t, t.size)
    if not z > 0.0:  # NaN
        return False
    log_z = math.log(z) - log_share
    for v in range(0, t.size, lanes):
        a = _log_softmax(load(t, v, like) - m, inverse, log_z)
        store(mixed, v, _log_of_sum(a, load(mixed, v, like)))
    return True


def _mixture_kernel(sources):
    @njit(nogil=True, cache=True)
    def mixture_kernel(teacher, classes, log_shares, temperature, k, mixed, culprits):
        """Add teacher k's share to rows of log p. One that cannot be used makes its row NaN: status and k are kept."""
        _ = sources
        e = np.empty(teacher.shape[1])
        for i in range(teacher.shape[0]):
            if log_shares[i] == -math.inf or culprits[i, 0] != OK:
                continue
            if not _mix_row(teacher[i], log_shares[i], temperature, e, mixed[i]):
                _report_row(teacher[i, :classes], TEACHER, culprits[i])
                culprits[i, 2] = k
                mixed[i, :classes] = math.nan

    return mixture_kernel


_mix = _mixture_kernel(_SOURCES)


def mixture_rows(
    student, teachers, shares, culprits, labels, weights, denominator, objective, gradient, loss, ce, kl, status,
    threads,
):  # fmt: skip
    """KD from the mixture of ``teachers``: as :func:`kd_rows`; alpha < 1.

    ``shares``: K numbers, or an array [B, K] of rows, which are 0 or positive and add up to 1. ``culprits`` [B, 3],
    zero, tell of a teacher's row that cannot be used: status and teacher.
    """
    rows, classes = student.shape
    shares = np.broadcast_to(shares, (rows, len(teachers)))
    log_p = objective._replace(teacher_temperature=1.0)

    def task(part, x, y, mixed):
        mixed[:, :classes] = -math.inf
        read = _is_read(labels, weights, objective.ignore_index, part)
        for k, teacher in enumerate(teachers):
            y[:, :classes] = teacher[part]
            log_shares = np.log(np.where(read, shares[part, k], 0.0))
            _mix(y, classes, log_shares, objective.temperature, k, mixed, culprits[part])
        kd_rows(
            x[:, :classes], mixed[:, :classes], labels[part], weights[part], denominator, log_p, x[:, :classes],
            loss[part], ce[part], kl[part], status[part], 1,
        )  # fmt: skip

    _by_chunks(task, student, gradient, 2, threads)


# --- standardised logits -------------------------------------------------------------------------------------------


@inner
def _sum(x, shift, power):
    """Sum of (x - shift)^power over the finite elements of x, with its rounding errors carried along (Kahan)."""
    total, carried, count = 0.0, 0.0, 0
    for v in range(x.size):
        if x[v] > -math.inf:
            d = x[v] - shift
            d = (d * d if power == 2 else d) - carried
            new = total + d
            carried = (new - total) - d
            total = new
            count += 1
    return total, count


@inner
def _standardize_row(x, z):
    """z = (x - mean) / std over the finite logits of a usable row, -inf elsewhere. Returns 1 / std, 0 without spread.

    Numbers are scaled by a power of two, so that squares of finite logits neither overflow nor vanish; and the mean has
    two parts, of which the second is the mean of what is exact but for a rounding error of its own size.
    """
    low, high = math.inf, -math.inf
    for v in range(x.size):
        if x[v] > -math.inf:
            low, high = min(low, x[v]), max(high, x[v])
    if low == high:
        return 0.0
    scale = _spread_scale(low, high)
    for v in range(x.size):
        z[v] = x[v] * scale
    total, count = _sum(z, 0.0, 1)
    first = total / count
    second = _sum(z, first, 1)[0] / count
    for v in range(x.size):
        z[v] -= first
    std = math.sqrt(_sum(z, second, 2)[0] / count)
    for v in range(x.size):
        z[v] = _standardized(z[v], second, std)
    return scale / std


def _standardize_kernels(sources):
    @njit(nogil=True, cache=True)
    def standardize_kernel(x, classes, read, argument, z, inverse, codes):
        """Rows of z(x), and 1 / std; codes of rows that cannot be used, which become NaN."""
        _ = sources
        for i in range(x.shape[0]):
            inverse[i] = 0.0
            if not read[i] or codes[i, 0] != OK:
                continue
            row = x[i, :classes]
            if check_row(row)[0] != OK:
                _report_row(row, argument, codes[i])
            else:
                inverse[i] = _standardize_row(row, z[i, :classes])
                if inverse[i] == 0.0:
                    codes[i, 0] = argument + NO_SPREAD
            if codes[i, 0] != OK:
                z[i, :classes] = math.nan

    @njit(nogil=True, cache=True)
    def through_kernel(z, g, h, classes, inverse, alpha):
        """h = alpha h + (1 - alpha) times the gradient g by z, taken through mean and deviation."""
        _ = sources
        for i in range(z.shape[0]):
            if inverse[i] == 0.0:  # masked, or of no use: 0 or NaN already
                h[i, :classes] = g[i, :classes]
                continue
            total, total_z, count = 0.0, 0.0, 0
            for v in range(classes):
                if z[i, v] > -math.inf:
                    total += g[i, v]
                    total_z += g[i, v] * z[i, v]
                    count += 1
            mean, mean_z = total / count, total_z / count
            for v in range(classes):
                soft = mean_z * 0.0  # NaN where the gradient is not defined
                if z[i, v] > -math.inf:
                    soft = _standardized_gradient(g[i, v], mean, z[i, v], mean_z, inverse[i])
                h[i, v] = _kd_loss(h[i, v], soft, alpha)  # which is linear

    return standardize_kernel, through_kernel


_standardize, _through = _standardize_kernels(_SOURCES)


def standardized_rows(
    student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, threads
):
    """KD of standardised logits, as :func:`kd_rows`; alpha < 1. A row without spread has the condition NO_SPREAD."""
    classes = student.shape[1]
    with_hard = objective.alpha > 0.0
    soft, hard = objective._replace(alpha=0.0), objective._replace(alpha=1.0)

    def task(part, x, y, z_s, z_t):
        rows = part.stop - part.start
        read = _is_read(labels, weights, objective.ignore_index, part)
        codes = np.zeros((rows, 2), np.int64)
        inverse, unused = np.empty((2, rows))
        y[:, :classes] = teacher[part]
        _standardize(x, classes, read, STUDENT, z_s, inverse, codes)
        _standardize(y, classes, read, TEACHER, z_t, unused, codes)
        both = labels[part], weights[part], denominator
        g, h = y[:, :classes], x[:, :classes]
        kd_rows(z_s[:, :classes], z_t[:, :classes], *both, soft, g, kl[part], np.empty(rows), kl[part], status[part], 1)
        if with_hard:
            hard_status = np.zeros((rows, 2), np.int64)
            kd_rows(h, h, *both, hard, h, ce[part], ce[part], np.empty(rows), hard_status, 1)
            loss[part] = objective.alpha * ce[part] + (1.0 - objective.alpha) * kl[part]
        else:
            loss[part] = kl[part]
        bad = (codes[:, 0] != OK) & ~np.isin(status[part, 0], (LABEL, WEIGHT))
        status[part][bad] = codes[bad]
        _through(z_s, y, x, classes, inverse, objective.alpha)

    _by_chunks(task, student, gradient, 3, threads)
