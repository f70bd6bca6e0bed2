"""Variants of the KD objective on CUDA (see :mod:`kdcore.variants`): kernels, one block a row, and their launchers.

Arguments are those of :mod:`kdcore.cuda.kernels`. All is worked in float64, whatever it is stored in, and class by
class: eight of them at a time would take all registers. A thread has some hundreds of them, too few for its sums to
need more than float64. **Decoupled KD** is one kernel. **Mixtures and standardised logits** become rows of float64 in
scratch memory, for the engine's own :func:`kdcore.cuda.launch.kd_rows`: as many rows at a time as fit into buffers of
_CHUNK elements. No bit depends on how many these are.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from numba import cuda, float64

from kdcore import formulas
from kdcore.cuda.distillation import Parts, parts_of, stages
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
from kdcore.cuda.launch import kd_rows
from kdcore.cuda.memory import scratch
from kdcore.cuda.parameters import check_dtypes, divisor, matrix, start_of, vector
from kdcore.cuda.plans import threads_of
from kdcore.cuda.primitives import bind, device, exp2, load_real, load_stored, log, maximum, store_real, store_stored
from kdcore.cuda.rows import (
    SCRATCH,
    block_maxima,
    block_sums,
    block_total,
    condition_of,
    cross_entropy_of,
    fill_row,
    first_bad_class,
    is_usable,
    rate_of,
    scaled,
    softmax_sums,
    way_of,
)
from kdcore.cuda.streams import launch
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import (
    NO_SPREAD,
    OK,
    SHARE,
    SHARE_TOLERANCE,
    SHARES,
    STUDENT,
    TEACHER,
    UNDEFINED_GRADIENT,
)

__all__ = [
    "dkd_kernel",
    "dkd_rows",
    "mixture_kernel",
    "mixture_rows",
    "standardize_kernel",
    "standardized_kernel",
    "standardized_rows",
]

#: Elements of a buffer, 256 MiB, unless a row is longer: of 131,072 classes, 256 rows, which occupy a large device.
_CHUNK = 1 << 25

#: ``like`` of the row functions.
_WIDE = np.float64(0)

_kd_loss = bind(formulas.kd_loss)
_kd_gradient = bind(formulas.kd_gradient)
_forward_kl_moment = bind(formulas.forward_kl_moment)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)
_log_softmax = bind(formulas.log_softmax)
_log_odds = bind(formulas.log_odds)
_sigmoid = bind(formulas.sigmoid)
_softplus = bind(formulas.softplus)
_two_way_kl = bind(formulas.two_way_kl)
_probability_difference = bind(formulas.probability_difference)
_dkd_divergence = bind(formulas.dkd_divergence)
_dkd_factors = bind(formulas.dkd_factors)
_dkd_label_gradient = bind(formulas.dkd_label_gradient)
_log_of_sum = bind(formulas.log_of_sum)
_spread_scale = bind(formulas.spread_scale)
_standardized = bind(formulas.standardized)
_standardized_gradient = bind(formulas.standardized_gradient)

#: The exponent of 2 of a logit that is relative to a maximum and scaled.
_exponent = way_of(careful=True).exponent


@device
def _number_at(row, v):
    return np.float64(load_real(row[0] + v * row[1], row[2]))


def _chunks(rows, size):
    """(the rows of a buffer, slices of so many rows)."""
    step = max(1, min(rows, _CHUNK // size))
    return step, [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


# --- decoupled -----------------------------------------------------------------------------------------------------

# What one thread tells the others.
_HARD, _SOFT_Q, _SOFT_P, _OF_LABEL, _UNDEFINED = range(5)


@device
def _probability(u):
    return _sigmoid(u, math.exp(-abs(u)))


@device
def _minus_log(u):
    """-log of the probability of the log-odds u."""
    return _softplus(-u, math.exp(-abs(u)))


@device
def _two_way(u_s, u_t):
    """KL of (p, 1 - p) and (q, 1 - q), and q - p, from their log-odds: q is 0 or 1 only where p is."""
    q, rest_q, p, rest_p = _probability(u_s), _probability(-u_s), _probability(u_t), _probability(-u_t)
    of_p, of_rest = _minus_log(u_s) - _minus_log(u_t), _minus_log(-u_s) - _minus_log(-u_t)
    return _two_way_kl(p, rest_p, of_p, of_rest), _probability_difference(u_s, u_t, q, p, rest_q, rest_p)


@device
def _row_log_odds(logit, m, z, temperature):
    """log-odds of a class, from the others' maximum and sum."""
    return _log_odds(scaled(logit, m), temperature, log(z))


@cuda.jit(device=True)
def _maxima_of_others(s, t, label, size, shared):
    """(the largest logits of both rows but for the label's, how many are NaN or +inf, the label's among them)."""
    m_s, m_t, bad_s, bad_t = -math.inf, -math.inf, 0.0, 0.0
    v = np.int64(cuda.threadIdx.x)
    while v < size:
        x, y = _number_at(s, v), _number_at(t, v)
        if not x < math.inf:
            bad_s += 1.0
        if not y < math.inf:
            bad_t += 1.0
        if v != label:
            m_s, m_t = maximum(m_s, x), maximum(m_t, y)
        v += cuda.blockDim.x
    m_s, m_t = block_maxima(m_s, m_t, shared)
    bad_s, bad_t, _, _ = block_sums(bad_s, bad_t, 0.0, 0.0, shared)
    return m_s, m_t, bad_s, bad_t


@cache
def dkd_kernel(hard, power):
    """The kernel of decoupled KD; ``hard`` and ``power`` as in :class:`kdcore.cuda.distillation.Parts`."""
    at_one = stages(Parts(soft=True, hard=hard, power=power), True).at_one

    @cuda.jit(device=True)
    def sums_of_others(s, t, label, size, m_s, m_t, rate, rate_at_one, shared):
        """(z_s, z_h, z_t, w) of all classes but the label, relative to their maxima; w is scaled by HEADROOM."""
        z_s, z_h, z_t, w = np.float64(0), np.float64(0), np.float64(0), np.float64(0)
        v = np.int64(cuda.threadIdx.x)
        while v < size:
            if v != label:
                x = _number_at(s, v)
                d_s, d_t = scaled(x, m_s), scaled(_number_at(t, v), m_t)
                e_s, e_t = exp2(_exponent(d_s, rate)), exp2(_exponent(d_t, rate))
                z_s += e_s
                z_t += e_t
                w = _forward_kl_moment(w, e_t, d_t, d_s, 1.0)
                if hard:
                    z_h += at_one(e_s, x, m_s, rate_at_one)
            v += cuda.blockDim.x
        return block_sums(z_s, z_h, z_t, w, shared)

    @kernel_of(most_threads(True))
    def kernel(
        student, teacher, target, nontarget, labels, weights, ignore_index, denominator, alpha, temperature, kd_scale,
        size, gradient, results, status,
    ):  # fmt: skip
        """alpha CE + (1 - alpha) kd_scale (target TCKD + nontarget NCKD), its parts and its gradient; alpha < 1.

        student, teacher, gradient: matrices [B, size]; labels, weights: vectors [B]; denominator: see divisor_of.
        """
        shared = cuda.shared.array(SCRATCH, float64)
        told = cuda.shared.array(5, float64)
        i = np.int64(cuda.blockIdx.x)
        first = cuda.threadIdx.x == 0
        s, t, g = row_at(student, i), row_at(teacher, i), row_at(gradient, i)
        weight, label = weight_at(weights, i), label_at(labels, i)
        masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
        if masked or code != OK:
            answer_unread(i, masked, code, detail, results, status, gradient, g, np.int64(0), size)
            return

        m_s, m_t, bad_s, bad_t = _maxima_of_others(s, t, label, size, shared)
        s_label, t_label = _number_at(s, label), _number_at(t, label)
        student_rest, teacher_rest = m_s > -math.inf, m_t > -math.inf
        student_is_bad = bad_s > 0.0 or not (student_rest or s_label > -math.inf)
        if student_is_bad or bad_t > 0.0 or not (teacher_rest or t_label > -math.inf):
            if first:
                write_results(results, i, math.nan, math.nan, math.nan)
            report_unusable(i, s, t, size, student_is_bad, status, shared)
            fill_row(g, np.int64(0), size, math.nan)
            return

        # Among no classes there is no distribution; then exponentials are 0, relative to anything, and so are factors.
        m_s, m_t = m_s if student_rest else 0.0, m_t if teacher_rest else 0.0
        rate, rate_at_one = rate_of(temperature, _WIDE), rate_of(1.0, _WIDE)
        z_s, z_h, z_t, w = sums_of_others(s, t, label, size, m_s, m_t, rate, rate_at_one, shared)
        if first:
            scale = weight / divisor_of(denominator)
            hard_share, soft = shares_of(scale, alpha, kd_scale, temperature)
            ce, tckd, nckd, rest, difference, of_others, undefined = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, False
            if not student_rest:  # q = 1
                undefined = teacher_rest and target + nontarget > 0.0
                if undefined:
                    tckd, nckd = math.inf, math.inf
            else:
                if hard:
                    u = _row_log_odds(s_label, m_s, z_h, 1.0)
                    ce, rest = _minus_log(u), _probability(-u)
                if target > 0.0:
                    u_s = _row_log_odds(s_label, m_s, z_s, temperature)
                    u_t = _row_log_odds(t_label, m_t, z_t, temperature) if teacher_rest else math.inf
                    tckd, difference = _two_way(u_s, u_t)
                    difference *= target
                    if s_label == -math.inf and t_label > -math.inf:
                        tckd = math.inf
                if nontarget > 0.0 and teacher_rest:  # else p = 1, and of the others the teacher says nothing
                    of_others = nontarget
                    nckd = _forward_kl_from_sums(w, z_t, z_s, temperature)
            told[_HARD], told[_SOFT_Q], told[_SOFT_P] = _dkd_factors(
                hard_share, soft, rest, difference, of_others, z_h if hard and student_rest else 1.0,
                z_s if student_rest else 1.0, z_t if teacher_rest else 1.0,
            )  # fmt: skip
            told[_OF_LABEL] = _dkd_label_gradient(hard_share, soft, rest, difference)
            told[_UNDEFINED] = 1.0 if undefined else 0.0
            ce *= scale
            kl = scale * kd_scale * _dkd_divergence(target, tckd, nontarget, nckd)
            write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
            report(status, i, UNDEFINED_GRADIENT if undefined else OK, 0)
        cuda.syncthreads()
        if told[_UNDEFINED] != 0.0:
            fill_row(g, np.int64(0), size, math.nan)
            return
        v = np.int64(cuda.threadIdx.x)
        while v < size:
            y = told[_OF_LABEL]
            if v != label:
                x = _number_at(s, v)
                e_s, e_h = exp2(_exponent(scaled(x, m_s), rate)), np.float64(0)
                if hard:
                    e_h = at_one(e_s, x, m_s, rate_at_one)
                e_t = exp2(_exponent(scaled(_number_at(t, v), m_t), rate))
                y = _kd_gradient(e_h, e_s, e_t, told[_HARD], told[_SOFT_Q], told[_SOFT_P])
            store_real(g[0] + v * g[1], y, g[2])
            v += cuda.blockDim.x

    return kernel


def dkd_rows(
    student, teacher, target, nontarget, labels, weights, denominator, objective, gradient, loss, ce, kl, status,
    stream,
):  # fmt: skip
    """Decoupled KD: row losses [B] scaled by weight / denominator, and their gradient [B, V]; alpha < 1."""
    rows, size = student.shape
    check_dtypes(stream, student.dtype, teacher.dtype, gradient.dtype)
    temperature = objective.temperature
    parts = parts_of(objective.alpha, temperature)
    arguments = (
        matrix(student), matrix(teacher), float(target), float(nontarget), vector(labels), vector(weights),
        int(objective.ignore_index), divisor(denominator), float(objective.alpha), float(temperature),
        float(objective.kd_scale), size, matrix(gradient), (loss.address, ce.address, kl.address),
        start_of(status),
    )  # fmt: skip
    threads = threads_of(size, most_threads(True))
    launch(dkd_kernel(parts.hard, parts.power), rows, threads, stream, *arguments)


# --- mixtures of teachers ------------------------------------------------------------------------------------------


@device
def _share_of(shares, k, count):
    """(the share of teacher k, of a row's ``count``, over their sum; the code of what is wrong, its detail)."""
    total, code, detail = 0.0, OK, np.int64(0)
    for j in range(count):
        share = _number_at(shares, j)
        if not 0.0 <= share < math.inf and code == OK:
            code, detail = SHARE, np.int64(j)
        total += share
    if code == OK and not abs(total - 1.0) <= SHARE_TOLERANCE:
        code = SHARES
    return _number_at(shares, k) / total, code, detail


@device
def _blame(culprits, i, code, detail, k):
    """culprits[i] = (code, detail, k), if there are any; for one thread."""
    if culprits != 0:
        store_stored(culprits + 24 * i, np.int64(code))
        store_stored(culprits + 24 * i + 8, np.int64(detail))
        store_stored(culprits + 24 * i + 16, np.int64(k))


@kernel_of(most_threads(True))
def mixture_kernel(teacher, k, count, shares, share, labels, weights, ignore_index, temperature, size, mixed, culprits):
    """The share of teacher k, of ``count``, is added to rows of log p; by the first of them, k = 0, they are begun.

    teacher, mixed: matrices [B, size], the latter of float64; shares: matrix [B, count], not given where ``share`` is
    that of all rows; culprits: address of int64 [B, 3]. A row that cannot be used becomes NaN, and stays so.
    """
    shared = cuda.shared.array(SCRATCH, float64)
    i = np.int64(cuda.blockIdx.x)
    first = cuda.threadIdx.x == 0
    t, out = row_at(teacher, i), row_at(mixed, i)
    weight, label = weight_at(weights, i), label_at(labels, i)
    masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
    if masked or code != OK:
        return
    if k > 0 and culprits != 0 and load_stored(culprits + 24 * i, np.int64(0)) != OK:
        return
    if given(shares):
        share, code, detail = _share_of(row_at(shares, i), k, count)
        if code != OK:
            if first and k == 0:
                _blame(culprits, i, code, detail, 0)
            fill_row(out, np.int64(0), size, math.nan)
            return
    if share == 0.0:
        if k == 0:
            fill_row(out, np.int64(0), size, -math.inf)
        return
    m, z = softmax_sums(t, size, temperature, _WIDE, shared)
    if not is_usable(z):
        condition, v = condition_of(first_bad_class(t, np.int64(0), size, shared), size)
        if first:
            _blame(culprits, i, TEACHER + condition, v, k)
        fill_row(out, np.int64(0), size, math.nan)
        return
    inverse, log_z = 1.0 / HEADROOM / temperature, log(z) - log(np.float64(share))
    v = np.int64(cuda.threadIdx.x)
    while v < size:
        log_p = _log_softmax(scaled(_number_at(t, v), m), inverse, log_z)
        if k > 0:
            log_p = _log_of_sum(log_p, _number_at(out, v))
        store_real(out[0] + v * out[1], log_p, out[2])
        v += cuda.blockDim.x


def mixture_rows(
    student, teachers, shares, culprits, labels, weights, denominator, objective, gradient, loss, ce, kl, status,
    stream,
):  # fmt: skip
    """KD from the mixture of ``teachers``: as :func:`kd_rows`; alpha < 1.

    ``shares``: K numbers, which are 0 or positive and add up to 1, or an array [B, K] of rows, or [1, K] of all rows:
    those are checked here, and divided by their sum. ``culprits`` [B, 3], zero, or [0, 3]: they tell of shares or of a
    teacher's row that cannot be used: status and teacher.
    """
    rows, size = student.shape
    check_dtypes(stream, *(teacher.dtype for teacher in teachers))
    log_p = objective._replace(teacher_temperature=1.0)
    step, chunks = _chunks(rows, size)
    mixed = scratch((step, size), np.float64, stream)
    threads = threads_of(size, most_threads(True))
    for part in chunks:
        count = part.stop - part.start
        if isinstance(shares, tuple):
            numbers, of_rows = shares, (0, 0, 0, _WIDE)
        elif shares.shape[0] == 1:
            address, _, to_next, tag = matrix(shares)
            numbers, of_rows = (0.0,) * len(teachers), (address, 0, to_next, tag)
        else:
            numbers, of_rows = (0.0,) * len(teachers), matrix(shares[part])
        for k, teacher in enumerate(teachers):
            arguments = (
                matrix(teacher[part]), k, len(teachers), of_rows, float(numbers[k]), vector(labels[part]),
                vector(weights[part]), int(objective.ignore_index), float(objective.temperature), size,
                matrix(mixed), start_of(culprits[part]),
            )  # fmt: skip
            launch(mixture_kernel, count, threads, stream, *arguments)
        kd_rows(
            student[part], mixed[:count], labels[part], weights[part], denominator, log_p, gradient[part], loss[part],
            ce[part], kl[part], status[part], stream,
        )  # fmt: skip


# --- standardised logits -------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def _sum(row, size, scale, shift, power, shared):
    """Sum of (scale x - shift)^power over the finite classes."""
    total = np.float64(0)
    v = np.int64(cuda.threadIdx.x)
    while v < size:
        x = _number_at(row, v)
        if x > -math.inf:
            d = x * scale - shift
            total += d * d if power == 2 else d
        v += cuda.blockDim.x
    return block_total(total, shared)


@cuda.jit(device=True)
def _range_of(row, size, shared):
    """(the least and the largest finite logit, how many there are, how many are NaN or +inf)."""
    low, high, count, bad = math.inf, -math.inf, 0.0, 0.0
    v = np.int64(cuda.threadIdx.x)
    while v < size:
        x = _number_at(row, v)
        if not x < math.inf:
            bad += 1.0
        elif x > -math.inf:
            low, high = min(low, x), max(high, x)
            count += 1.0
        v += cuda.blockDim.x
    negated, high = block_maxima(-low, high, shared)
    count, bad, _, _ = block_sums(count, bad, 0.0, 0.0, shared)
    return -negated, high, count, bad


@kernel_of(most_threads(True))
def standardize_kernel(logits, argument, labels, weights, ignore_index, size, z, inverse, codes):
    """z = (x - mean) / std over the finite logits, -inf elsewhere, and 1 / std.

    logits, z: matrices [B, size], the latter of float64; inverse, codes: addresses of float64 [B] and of int64 [B, 2].
    ``argument``: whose they are, STUDENT, which comes first, or TEACHER, whose 1 / std nobody needs. A row that cannot
    be used becomes NaN, and has its code; of one that is not to be read nothing is written.

    Numbers are scaled by a power of two, so that squares of finite logits neither overflow nor vanish; and the mean has
    two parts, of which the second is the mean of what is exact but for a rounding error of its own size.
    """
    shared = cuda.shared.array(SCRATCH, float64)
    i = np.int64(cuda.blockIdx.x)
    first = cuda.threadIdx.x == 0
    row, out = row_at(logits, i), row_at(z, i)
    weight, label = weight_at(weights, i), label_at(labels, i)
    masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
    if masked or code != OK:
        return
    if argument == TEACHER and load_stored(codes + 16 * i, np.int64(0)) != OK:
        return
    low, high, count, bad = _range_of(row, size, shared)
    if bad > 0.0 or count == 0.0:
        condition, detail = condition_of(first_bad_class(row, np.int64(0), size, shared), size)
        code = argument + condition
    elif low == high:
        code = argument + NO_SPREAD
    if first and (argument == STUDENT or code != OK):
        report(codes, i, code, detail)
    if code != OK:
        fill_row(out, np.int64(0), size, math.nan)
        return
    scale = _spread_scale(low, high)
    about = _sum(row, size, scale, 0.0, 1, shared) / count
    mean = _sum(row, size, scale, about, 1, shared) / count
    std = math.sqrt(_sum(row, size, scale, about + mean, 2, shared) / count)
    v = np.int64(cuda.threadIdx.x)
    while v < size:
        store_real(out[0] + v * out[1], _standardized(_number_at(row, v) * scale - about, mean, std), out[2])
        v += cuda.blockDim.x
    if first and argument == STUDENT:
        store_stored(inverse + 8 * i, scale / std)


@cache
def standardized_kernel(hard):
    """The kernel that takes a gradient by z back to the logits, and adds their cross-entropy's if ``hard``."""

    @kernel_of(most_threads(True))
    def kernel(
        student, labels, weights, ignore_index, denominator, alpha, size, z, by_z, inverse, codes, gradient, results,
        status,
    ):  # fmt: skip
        """student, z, by_z, gradient: matrices [B, size]; the rest is that of :func:`standardize_kernel`.

        Of the results, kl has been computed. Rows that cannot be used are reported by their codes.
        """
        shared = cuda.shared.array(SCRATCH, float64)
        i = np.int64(cuda.blockIdx.x)
        first = cuda.threadIdx.x == 0
        s, of_z, of_g, g = row_at(student, i), row_at(z, i), row_at(by_z, i), row_at(gradient, i)
        weight, label = weight_at(weights, i), label_at(labels, i)
        masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
        if masked or code != OK:
            answer_unread(i, masked, code, detail, results, status, gradient, g, np.int64(0), size)
            return

        scale, m, z_h, ce = weight / divisor_of(denominator), np.float64(0), np.float64(1), 0.0
        if hard:
            s_label = _number_at(s, label)  # before the barriers behind which a gradient may take its place
            m, z_h = softmax_sums(s, size, 1.0, _WIDE, shared)
            ce = scale * cross_entropy_of(s_label, m, z_h) if is_usable(z_h) else math.nan
        code = load_stored(codes + 16 * i, np.int64(0))
        if first:
            kl = load_stored(results[2] + 8 * i, np.float64(0))
            write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
            if code != OK:
                report(status, i, code, load_stored(codes + 16 * i + 8, np.int64(0)))
        if code != OK:
            fill_row(g, np.int64(0), size, math.nan)
            return

        total, total_z, count = np.float64(0), np.float64(0), np.float64(0)
        v = np.int64(cuda.threadIdx.x)
        while v < size:
            if _number_at(of_z, v) > -math.inf:
                total += _number_at(of_g, v)
                total_z += _number_at(of_g, v) * _number_at(of_z, v)
                count += 1.0
            v += cuda.blockDim.x
        total, total_z, count, _ = block_sums(total, total_z, count, 0.0, shared)
        mean, mean_z = total / count, total_z / count
        of_std, rate = load_stored(inverse + 8 * i, np.float64(0)), rate_of(1.0, _WIDE)
        v = np.int64(cuda.threadIdx.x)
        while v < size:
            h, soft = np.float64(0), mean_z * 0.0  # NaN where the gradient is not defined
            if hard:
                e = exp2(_exponent(scaled(_number_at(s, v), m), rate))
                h = _kd_gradient(e - z_h if v == label else e, 0.0, 0.0, scale / z_h, 0.0, 0.0)  # without a divergence
            if _number_at(of_z, v) > -math.inf:
                soft = _standardized_gradient(_number_at(of_g, v), mean, _number_at(of_z, v), mean_z, of_std)
            store_real(g[0] + v * g[1], _kd_loss(h, soft, alpha), g[2])  # which is linear
            v += cuda.blockDim.x

    return kernel


def standardized_rows(
    student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, stream
):
    """KD of standardised logits, as :func:`kd_rows`; alpha < 1. A row without spread has the condition NO_SPREAD."""
    rows, size = student.shape
    check_dtypes(stream, student.dtype, teacher.dtype, gradient.dtype)
    soft = objective._replace(alpha=0.0)
    step, chunks = _chunks(rows, size)
    z_s, z_t, by_z = (scratch((step, size), np.float64, stream) for _ in range(3))
    inverse, codes = scratch((step,), np.float64, stream), scratch((step, 2), np.int64, stream)
    finish, threads = standardized_kernel(objective.alpha > 0.0), threads_of(size, most_threads(True))
    ignore_index = int(objective.ignore_index)
    for part in chunks:
        count = part.stop - part.start
        of_rows = labels[part], weights[part]
        vectors = *map(vector, of_rows), ignore_index
        for logits, argument, z in ((student, STUDENT, z_s), (teacher, TEACHER, z_t)):
            arguments = matrix(logits[part]), argument, *vectors, size, matrix(z), inverse.address, codes.address
            launch(standardize_kernel, count, threads, stream, *arguments)
        kd_rows(
            z_s[:count], z_t[:count], *of_rows, denominator, soft, by_z[:count], kl[part], ce[part], kl[part],
            status[part], stream,
        )  # fmt: skip
        launch(
            finish, count, threads, stream, matrix(student[part]), *vectors, divisor(denominator),
            float(objective.alpha), size, matrix(z_s), matrix(by_z), inverse.address, codes.address,
            matrix(gradient[part]), (loss[part].address, ce[part].address, kl[part].address), start_of(status[part]),
        )  # fmt: skip
