"""The textbook: knowledge distillation as the papers write it, in NumPy's longdouble.

Slow, plain and on purpose independent: nothing is imported from the package under test, because shared code would
share bugs. Every function works on the last dimension; s and t are student and teacher logits, T a temperature.

Where ``longdouble`` is no wider than ``float64`` (``WIDER`` is False) the textbook is as exact as float64 allows.
Hinton, Vinyals & Dean 2015, section 2; Kullback & Leibler 1951.
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


DIVERGENCES = {"forward_kl": (forward_kl, forward_kl_gradient), "reverse_kl": (reverse_kl, reverse_kl_gradient)}


def kd_row(s, t, label, temperature, alpha, divergence="forward_kl", teacher_temperature=None, scale_t2=True):
    """alpha CE + (1 - alpha) T² D of one row, as an Answer. A term whose factor is 0 is absent, so 0 * inf is not."""
    value, slope = DIVERGENCES[divergence]
    alpha = REAL(alpha)
    t2 = REAL(temperature) ** 2 if scale_t2 else REAL(1)
    loss, gradient, ce, kl = REAL(0), np.zeros(np.shape(s), REAL), REAL(0), REAL(0)
    if alpha > 0:
        ce = cross_entropy(s, label)
        loss = loss + alpha * ce
        gradient = gradient + alpha * cross_entropy_gradient(s, label)
    if alpha < 1:
        kl = t2 * value(s, t, temperature, teacher_temperature)
        loss = loss + (1 - alpha) * kl
        gradient = gradient + (1 - alpha) * t2 * slope(s, t, temperature, teacher_temperature)
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
    teacher_temperature=None,
    scale_t2=True,
    ignore_index=-100,
    weights=None,
    reduction="mean",
    denominator=None,
):
    """The KD objective of a batch [..., V]: sums of the scaled rows, or the scaled rows [...] for "none"."""
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
        row = kd_row(s[i], t[i], label, temperature, alpha, divergence, teacher_temperature, scale_t2)
        loss[i], ce[i], kl[i] = scales[i] * row.loss, scales[i] * row.ce, scales[i] * row.kl
        gradient[i] = scales[i] * row.gradient
    if reduction == "none":
        loss, ce, kl = (values.reshape(lead) for values in (loss, ce, kl))
    else:
        loss, ce, kl = loss.sum(), ce.sum(), kl.sum()
    return Answer(loss, gradient.reshape(np.shape(student)), ce, kl)
