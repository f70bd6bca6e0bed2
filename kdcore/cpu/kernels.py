"""Kernels of the CPU engine: serial njit loops over the rows [lo, hi) of a batch, to be run by a thread pool.

Letters: B rows, V classes. Logits and gradients [B, V] in storage form (see :mod:`kdcore.cpu.primitives`), ``work``
a tuple of rows [V] in the working type, row results [B] float64, ``status`` [B, 2] int64 (see :mod:`kdcore.rowstatus`).
"""

import math
from hashlib import blake2b
from pathlib import Path

from numba import njit

from kdcore import formulas
from kdcore.cpu.primitives import from_real
from kdcore.cpu.rows import (
    check_row,
    forward_kl_soft,
    hard_term,
    log_softmax_row,
    logsumexp_row,
    max_row,
    reverse_kl_soft,
    scale_row,
    softmax_row,
    write_gradient,
)
from kdcore.rowstatus import LABEL, STUDENT, TEACHER, UNDEFINED_GRADIENT, WEIGHT

__all__ = ["forward_kl_kernel", "log_softmax_kernel", "logsumexp_kernel", "reverse_kl_kernel", "softmax_kernel"]

_kd_loss = njit(fastmath=False)(formulas.kd_loss)


@njit
def _fill(row, value):
    for v in range(row.size):
        row[v] = from_real(value, row[v])


@njit
def _usable(x, argument, status):
    """The maximum of a row, and whether it can be used; what is wrong with it goes into ``status``."""
    m, good = max_row(x)
    if not good:
        condition, status[1] = check_row(x)
        status[0] = argument + condition
    return m, good


def _kd_rows(soft_term):
    """The loop over rows for one divergence, given by its row function."""

    @njit
    def kd_rows(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        work, lo, hi, gradient, loss, ce, kl, status,
    ):  # fmt: skip
        d_s, d_t, e_h, e_s, e_t = work[0], work[1], work[2], work[3], work[4]
        with_gradient = gradient.shape[0] > 0
        for i in range(lo, hi):
            loss[i] = ce[i] = kl[i] = 0.0
            weight = weights[i] if weights.size else 1.0
            label = labels[i] if labels.size else 0
            if weight == 0.0 or (labels.size and label == ignore_index):
                if with_gradient:
                    _fill(gradient[i], 0.0)
                continue

            m_s, m_t, good = 0.0, 0.0, True
            if not 0.0 < weight < math.inf:
                good, status[i, 0] = False, WEIGHT
            elif labels.size and not 0 <= label < student.shape[1]:
                good, status[i, 0], status[i, 1] = False, LABEL, label
            else:
                m_s, good = _usable(student[i], STUDENT, status[i])
                if good and alpha < 1.0:
                    m_t, good = _usable(teacher[i], TEACHER, status[i])
            if not good:
                loss[i] = ce[i] = kl[i] = math.nan
                if with_gradient:
                    _fill(gradient[i], math.nan)
                continue

            scale = weight / denominator[0]
            hard, soft_q, soft_p = 0.0, 0.0, 0.0
            scale_row(student[i], m_s, d_s)
            if alpha > 0.0:
                value, hard = hard_term(d_s, label, e_h)
                ce[i] = scale * value
                hard *= scale * alpha
            if alpha < 1.0:
                scale_row(teacher[i], m_t, d_t)
                value, soft_q, soft_p = soft_term(d_s, d_t, e_s, e_t, temperature, teacher_temperature)
                kl[i] = scale * kd_scale * value
                soft_q *= scale * (1.0 - alpha) * kd_scale / temperature
                soft_p *= scale * (1.0 - alpha) * kd_scale / temperature
            loss[i] = _kd_loss(ce[i], kl[i], alpha)
            if with_gradient:
                write_gradient(e_h, e_s, e_t, alpha, hard, soft_q, soft_p, gradient[i])

    return kd_rows


_forward_kl_rows = _kd_rows(forward_kl_soft)
_reverse_kl_rows = _kd_rows(reverse_kl_soft)


def _digest():
    """A hash of everything that the kernels are compiled from."""
    package = Path(__file__).parents[1]
    files = [package / name for name in ("formulas.py", "rowstatus.py")]
    return blake2b(b"".join(path.read_bytes() for path in files + sorted(package.glob("cpu/*.py")))).hexdigest()


def _outermost(sources):
    """The kernels that Python calls.

    Numba finds a compiled kernel on disk by the kernel's own file and its closure, and does not see an edit of the row
    functions and formulas that it calls. So the digest of all ``sources`` is in the closure.
    """

    @njit(nogil=True, cache=True)
    def forward_kl_kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        work, lo, hi, gradient, loss, ce, kl, status,
    ):  # fmt: skip
        """alpha CE + (1 - alpha) kd_scale KL(p || q), its parts and its gradient, finite even where KL is +inf."""
        _ = sources
        _forward_kl_rows(
            student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature,
            kd_scale, work, lo, hi, gradient, loss, ce, kl, status,
        )  # fmt: skip

    @njit(nogil=True, cache=True)
    def reverse_kl_kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        work, lo, hi, gradient, loss, ce, kl, status,
    ):  # fmt: skip
        """alpha CE + (1 - alpha) kd_scale KL(q || p), its parts and its gradient; NaN gradients where KL is +inf."""
        _ = sources
        _reverse_kl_rows(
            student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature,
            kd_scale, work, lo, hi, gradient, loss, ce, kl, status,
        )  # fmt: skip
        for i in range(lo, hi):
            if kl[i] == math.inf:
                status[i, 0] = UNDEFINED_GRADIENT
                if gradient.shape[0] > 0:
                    _fill(gradient[i], math.nan)

    @njit(nogil=True, cache=True)
    def softmax_kernel(logits, temperature, work, lo, hi, out, status):
        """Rows of softmax(x / T); a row that cannot be used becomes NaN."""
        _ = sources
        for i in range(lo, hi):
            if _usable(logits[i], STUDENT, status[i])[1]:
                softmax_row(logits[i], temperature, work, out[i])
            else:
                _fill(out[i], math.nan)

    @njit(nogil=True, cache=True)
    def log_softmax_kernel(logits, temperature, work, lo, hi, out, status):
        """Rows of log softmax(x / T); a row that cannot be used becomes NaN."""
        _ = sources
        for i in range(lo, hi):
            if _usable(logits[i], STUDENT, status[i])[1]:
                log_softmax_row(logits[i], temperature, work, out[i])
            else:
                _fill(out[i], math.nan)

    @njit(nogil=True, cache=True)
    def logsumexp_kernel(logits, temperature, work, lo, hi, out, status):
        """log sum exp(x / T) of rows, [B]; a row that cannot be used becomes NaN."""
        _ = sources
        for i in range(lo, hi):
            if _usable(logits[i], STUDENT, status[i])[1]:
                out[i] = from_real(logsumexp_row(logits[i], temperature, work), out[i])
            else:
                out[i] = from_real(math.nan, out[i])

    return forward_kl_kernel, reverse_kl_kernel, softmax_kernel, log_softmax_kernel, logsumexp_kernel


forward_kl_kernel, reverse_kl_kernel, softmax_kernel, log_softmax_kernel, logsumexp_kernel = _outermost(_digest())
