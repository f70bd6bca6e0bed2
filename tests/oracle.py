"""The textbook: knowledge distillation as the papers write it, in NumPy's longdouble.

Slow, plain and on purpose independent: nothing is imported from the package under test, because shared code would
share bugs. Every function works on the last dimension; s and t are student and teacher logits, T a temperature.

Where ``longdouble`` is no wider than ``float64`` (``WIDER`` is False) the textbook is as exact as float64 allows.
Hinton, Vinyals & Dean 2015, section 2; Kullback & Leibler 1951; Lin 1991; Lee 2001; Amari 1985. A divergence is the sum
of phi(p, q) over the classes, and its gradient by the student's logits is q (phi' - sum of q phi') / T, phi' = dphi/dq.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

REAL = np.longdouble
#: Whether the oracle has more digits than the float64 results that it judges.
WIDER = np.finfo(np.longdouble).eps < np.finfo(np.float64).eps


class Answer(NamedTuple):
    """The KD loss, its gradient by the student's logits, and its two parts without alpha, reduced as the loss is."""

    loss: np.ndarray
    gradient: np.ndarray
    ce: np.ndarray
    kl: np.ndarray


def real(x):
    """The numbers of x, of whatever dtype, without rounding."""
    x = np.asarray(x)
    return (x.astype(np.float32) if x.dtype.name == "bfloat16" else x).astype(REAL)


def logsumexp(x, temperature=1.0):
    """log sum_v exp(x_v / T), with the maximum taken out."""
    z = real(x) / REAL(temperature)
    m = z.max(axis=-1, keepdims=True)
    return np.log(np.exp(z - m).sum(axis=-1)) + m[..., 0]


def log_softmax(x, temperature=1.0):
    """x / T - log sum exp(x / T); the maximum goes first, so that large offsets cost nothing."""
    z = real(x) / REAL(temperature)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def softmax(x, temperature=1.0):
    """exp(x_v / T) / sum_u exp(x_u / T)."""
    z = real(x) / REAL(temperature)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def cross_entropy(s, label):
    """-log softmax(s)[label] of one row; +inf for a label on a -inf class."""
    return -log_softmax(s)[label]


def cross_entropy_gradient(s, label):
    """softmax(s) - onehot(label) of one row."""
    gradient = softmax(s)
    gradient[label] -= 1
    return gradient


def forward_kl(s, t, temperature=1.0, teacher_temperature=None):
    """KL(p || q) = sum p (log p - log q) of one row, over the classes that the teacher's logits allow."""
    p, log_p, _, log_q, allowed_by_t, _ = _pair(s, t, temperature, teacher_temperature)
    if np.any(allowed_by_t & np.isneginf(log_q)):
        return REAL(np.inf)
    return (p[allowed_by_t] * (log_p[allowed_by_t] - log_q[allowed_by_t])).sum()


def forward_kl_gradient(s, t, temperature=1.0, teacher_temperature=None):
    """d KL(p || q) / ds = (q - p) / T of one row; finite even where the divergence is +inf."""
    p, _, q, _, _, _ = _pair(s, t, temperature, teacher_temperature)
    return (q - p) / REAL(temperature)


def reverse_kl(s, t, temperature=1.0, teacher_temperature=None):
    """KL(q || p) = sum q (log q - log p) of one row, over the classes that the student's logits allow."""
    _, log_p, q, log_q, _, allowed_by_s = _pair(s, t, temperature, teacher_temperature)
    if np.any(allowed_by_s & np.isneginf(log_p)):
        return REAL(np.inf)
    return (q[allowed_by_s] * (log_q[allowed_by_s] - log_p[allowed_by_s])).sum()


def reverse_kl_gradient(s, t, temperature=1.0, teacher_temperature=None):
    """d KL(q || p) / ds = q (log q - log p - KL) / T of one row; NaN where the divergence is +inf."""
    _, log_p, q, log_q, _, allowed_by_s = _pair(s, t, temperature, teacher_temperature)
    value = reverse_kl(s, t, temperature, teacher_temperature)
    if np.isposinf(value):
        return np.full_like(q, np.nan)
    gradient = np.zeros_like(q)
    gradient[allowed_by_s] = q[allowed_by_s] * (log_q[allowed_by_s] - log_p[allowed_by_s] - value)
    return gradient / REAL(temperature)


def _pair(s, t, temperature, teacher_temperature):
    """p, log p, q, log q, and which classes the logits (not the probabilities, which underflow) allow."""
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    p, log_p = softmax(t, teacher_temperature), log_softmax(t, teacher_temperature)
    q, log_q = softmax(s, temperature), log_softmax(s, temperature)
    return p, log_p, q, log_q, ~np.isneginf(real(t)), ~np.isneginf(real(s))


def _log_mixture(share, log_a, log_b):
    """log(share a + (1 - share) b), so that no probability underflows on the way."""
    return np.logaddexp(np.log(REAL(share)) + log_a, np.log1p(-REAL(share)) + log_b)


def _kl(log_a, log_b):
    """sum of a (log a - log b) over the classes that a allows; b allows them too."""
    allowed = log_a > -np.inf
    return (np.exp(log_a[allowed]) * (log_a[allowed] - log_b[allowed])).sum()


def _through_softmax(q, slope, temperature):
    """dD/ds = q (phi' - sum of q phi') / T, from phi' = dphi/dq where q > 0 and anything finite elsewhere."""
    return q * (slope - (q * slope).sum()) / REAL(temperature)


def jsd(s, t, temperature=1.0, teacher_temperature=None, beta=0.5):
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q."""
    _, log_p, _, log_q, _, _ = _pair(s, t, temperature, teacher_temperature)
    log_m = _log_mixture(beta, log_p, log_q)
    return REAL(beta) * _kl(log_p, log_m) + (1 - REAL(beta)) * _kl(log_q, log_m)


def jsd_gradient(s, t, temperature=1.0, teacher_temperature=None, beta=0.5):
    """phi' = (1 - beta) log(q / m)."""
    _, log_p, q, log_q, _, allowed_by_s = _pair(s, t, temperature, teacher_temperature)
    log_m = _log_mixture(beta, log_p, log_q)
    slope = np.zeros_like(q)
    slope[allowed_by_s] = (1 - REAL(beta)) * (log_q[allowed_by_s] - log_m[allowed_by_s])
    return _through_softmax(q, slope, temperature)


def skew_forward_kl(s, t, temperature=1.0, teacher_temperature=None, lam=0.1):
    """KL(p || m), m = lam p + (1 - lam) q."""
    _, log_p, _, log_q, _, _ = _pair(s, t, temperature, teacher_temperature)
    return _kl(log_p, _log_mixture(lam, log_p, log_q))


def skew_forward_kl_gradient(s, t, temperature=1.0, teacher_temperature=None, lam=0.1):
    """phi' = -(1 - lam) p / m."""
    _, log_p, q, log_q, _, allowed_by_s = _pair(s, t, temperature, teacher_temperature)
    slope = np.zeros_like(q)
    log_m = _log_mixture(lam, log_p, log_q)
    slope[allowed_by_s] = -(1 - REAL(lam)) * np.exp(log_p[allowed_by_s] - log_m[allowed_by_s])
    return _through_softmax(q, slope, temperature)


def skew_reverse_kl(s, t, temperature=1.0, teacher_temperature=None, lam=0.1):
    """KL(q || m), m = lam q + (1 - lam) p."""
    _, log_p, _, log_q, _, _ = _pair(s, t, temperature, teacher_temperature)
    return _kl(log_q, _log_mixture(lam, log_q, log_p))


def skew_reverse_kl_gradient(s, t, temperature=1.0, teacher_temperature=None, lam=0.1):
    """phi' = log(q / m) + 1 - lam q / m."""
    _, log_p, q, log_q, _, allowed_by_s = _pair(s, t, temperature, teacher_temperature)
    log_ratio = np.zeros_like(q)
    log_ratio[allowed_by_s] = log_q[allowed_by_s] - _log_mixture(lam, log_q, log_p)[allowed_by_s]
    return _through_softmax(q, log_ratio + 1 - REAL(lam) * np.exp(log_ratio), temperature)


def tvd(s, t, temperature=1.0, teacher_temperature=None):
    """Total variation: half the sum of |p - q|."""
    p, _, q, _, _, _ = _pair(s, t, temperature, teacher_temperature)
    return np.abs(p - q).sum() / 2


def tvd_gradient(s, t, temperature=1.0, teacher_temperature=None):
    """phi' = sign(q - p) / 2, by convention 0 at ties."""
    p, _, q, _, _, _ = _pair(s, t, temperature, teacher_temperature)
    return _through_softmax(q, np.sign(q - p) / 2, temperature)


def alpha(s, t, temperature=1.0, teacher_temperature=None, a=0.5):
    """(sum of p^a q^(1 - a) - 1) / (a (a - 1))."""
    a = REAL(a)
    _, log_p, _, log_q, _, _ = _pair(s, t, temperature, teacher_temperature)
    return (np.exp(a * log_p + (1 - a) * log_q).sum() - 1) / (a * (a - 1))


def alpha_gradient(s, t, temperature=1.0, teacher_temperature=None, a=0.5):
    """q phi' = -p^a q^(1 - a) / a; phi' itself may be infinite where q underflows."""
    a = REAL(a)
    _, log_p, q, log_q, _, _ = _pair(s, t, temperature, teacher_temperature)
    q_slope = -np.exp(a * log_p + (1 - a) * log_q) / a
    return (q_slope - q * q_slope.sum()) / REAL(temperature)


#: Value, gradient and the default of the parameter (None: there is none), by name.
DIVERGENCES = {
    "forward_kl": (forward_kl, forward_kl_gradient, None),
    "reverse_kl": (reverse_kl, reverse_kl_gradient, None),
    "jsd": (jsd, jsd_gradient, 0.5),
    "skew_forward_kl": (skew_forward_kl, skew_forward_kl_gradient, 0.1),
    "skew_reverse_kl": (skew_reverse_kl, skew_reverse_kl_gradient, 0.1),
    "tvd": (tvd, tvd_gradient, None),
    "alpha": (alpha, alpha_gradient, 0.5),
}


def kd_row(
    s, t, label, temperature, alpha, divergence="forward_kl", teacher_temperature=None, scale_t2=True, parameter=None
):
    """alpha CE + (1 - alpha) T² D of one row, as an Answer. A term whose factor is 0 is absent, so 0 * inf is not."""
    value, slope, default = DIVERGENCES[divergence]
    parameters = () if default is None else (default if parameter is None else parameter,)
    alpha = REAL(alpha)
    t2 = REAL(temperature) ** 2 if scale_t2 else REAL(1)
    loss, gradient, ce, kl = REAL(0), np.zeros(np.shape(s), REAL), REAL(0), REAL(0)
    if alpha > 0:
        ce = cross_entropy(s, label)
        loss = loss + alpha * ce
        gradient = gradient + alpha * cross_entropy_gradient(s, label)
    if alpha < 1:
        kl = t2 * value(s, t, temperature, teacher_temperature, *parameters)
        loss = loss + (1 - alpha) * kl
        gradient = gradient + (1 - alpha) * t2 * slope(s, t, temperature, teacher_temperature, *parameters)
    return Answer(loss, gradient, ce, kl)


def sparse_forward_kl(s, log_p, log_tail, tail, temperature=1.0):
    """(D, dD/ds) of one row against a teacher that stores the classes of ``log_p``, a dict from class to log p.

    D is the sum of p (log p - log q) over outcomes, which are sets of classes, and q of a set is the sum over it.
    """
    log_q = log_softmax(s, temperature)
    stored = np.array(list(log_p), int)
    of_p = np.array([REAL(log_p[v]) for v in log_p])
    rest = np.setdiff1d(np.arange(len(log_q)), stored)
    if tail == "renormalize":
        of_p = of_p - np.logaddexp.reduce(of_p)
    elif tail == "uniform" and len(rest):
        stored = np.concatenate([stored, rest])
        of_p = np.concatenate([of_p, np.full(len(rest), REAL(log_tail) - np.log(REAL(len(rest))))])
    value, gradient = REAL(0), np.exp(of_p).sum() * np.exp(log_q)
    allowed = of_p > -np.inf
    if np.isneginf(log_q[stored][allowed]).any():
        value = REAL(np.inf)
    else:
        value = (np.exp(of_p[allowed]) * (of_p[allowed] - log_q[stored][allowed])).sum()
    gradient[stored] -= np.exp(of_p)
    if tail == "bucket" and len(rest) and log_tail > -np.inf:
        p, of_q = np.exp(REAL(log_tail)), np.logaddexp.reduce(log_q[rest])
        value = value + (p * (REAL(log_tail) - of_q) if of_q > -np.inf else REAL(np.inf))
        gradient = gradient + p * np.exp(log_q)
        # Shares of classes that are all ruled out are those of equal logits.
        gradient[rest] -= p * (softmax(real(s)[rest], temperature) if of_q > -np.inf else 1 / REAL(len(rest)))
    return value, gradient / REAL(temperature)


def sparse_kd_row(s, log_p, log_tail, tail, label, temperature, alpha, scale_t2=True):
    """As :func:`kd_row`, of a teacher as :func:`sparse_forward_kl` takes it."""
    answer = kd_row(s, s, label, temperature, alpha)
    loss, gradient, kl = REAL(0), np.zeros(np.shape(s), REAL), REAL(0)
    if alpha > 0:
        loss, gradient = REAL(alpha) * answer.ce, REAL(alpha) * cross_entropy_gradient(s, label)
    if alpha < 1:
        t2 = REAL(temperature) ** 2 if scale_t2 else REAL(1)
        value, slope = sparse_forward_kl(s, log_p, log_tail, tail, temperature)
        kl = t2 * value
        loss, gradient = loss + (1 - REAL(alpha)) * kl, gradient + (1 - REAL(alpha)) * t2 * slope
    return Answer(loss, gradient, answer.ce, kl)


def sparse_kd(student, teacher, labels, temperature, alpha, *, tail="bucket", scale_t2=True, scales):
    """Scaled rows of the KD objective of a batch [B, V].

    ``teacher``: for each row (log p by class, log of the tail's mass).
    """
    gradient = np.zeros(np.shape(student), REAL)
    loss, ce, kl = np.zeros((3, len(student)), REAL)
    for i in np.flatnonzero(scales):
        label = None if labels is None else labels[i]
        row = sparse_kd_row(student[i], *teacher[i], tail, label, temperature, alpha, scale_t2)
        loss[i], ce[i], kl[i] = scales[i] * row.loss, scales[i] * row.ce, scales[i] * row.kl
        gradient[i] = scales[i] * row.gradient
    return Answer(loss, gradient, ce, kl)


def row_scales(rows, labels=None, *, ignore_index=-100, weights=None, reduction="mean", denominator=None):
    """What each row's loss and gradient is multiplied by: weight / denominator, 0 for a masked row."""
    scales = np.ones(rows, REAL) if weights is None else real(weights).reshape(rows).copy()
    if labels is not None:
        scales[np.asarray(labels).reshape(rows) == ignore_index] = 0
    if reduction == "mean" and scales.any():
        scales = scales / (scales.sum() if denominator is None else REAL(denominator))
    return scales


def kd(
    student,
    teacher,
    labels,
    temperature,
    alpha,
    *,
    divergence="forward_kl",
    parameter=None,
    teacher_temperature=None,
    scale_t2=True,
    ignore_index=-100,
    weights=None,
    reduction="mean",
    denominator=None,
):
    """The KD objective of a batch [..., V]: sums of the scaled rows, or the scaled rows [...] for "none".

    ``parameter`` is the divergence's own, by default as in :data:`DIVERGENCES`.
    """
    lead, classes = np.shape(student)[:-1], np.shape(student)[-1]
    s = np.reshape(student, (-1, classes))
    t = s if teacher is None else np.reshape(teacher, (-1, classes))
    rows = s.shape[0]
    y = None if labels is None else np.asarray(labels).reshape(rows)
    scales = row_scales(
        rows, y, ignore_index=ignore_index, weights=weights, reduction=reduction, denominator=denominator
    )
    gradient = np.zeros((rows, classes), REAL)
    loss, ce, kl = np.zeros((3, rows), REAL)
    for i in np.flatnonzero(scales):  # a masked row is not read
        label = None if y is None else y[i]
        row = kd_row(s[i], t[i], label, temperature, alpha, divergence, teacher_temperature, scale_t2, parameter)
        loss[i], ce[i], kl[i] = scales[i] * row.loss, scales[i] * row.ce, scales[i] * row.kl
        gradient[i] = scales[i] * row.gradient
    if reduction == "none":
        loss, ce, kl = (values.reshape(lead) for values in (loss, ce, kl))
    else:
        loss, ce, kl = loss.sum(), ce.sum(), kl.sum()
    return Answer(loss, gradient.reshape(np.shape(student)), ce, kl)
