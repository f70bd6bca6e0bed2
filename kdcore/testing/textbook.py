"""Knowledge distillation as the papers write it, in NumPy's longdouble: what falsifiers compare values with.

Slow and plain, and apart from the kernels: nothing is imported from :mod:`kdcore.formulas` or from an engine, because
shared code would share bugs. Rows are the first dimension, classes the second; s and t are the student's and the
teacher's logits, in which -inf rules a class out; p = softmax(t / T), q = softmax(s / T), h = softmax(s).

A divergence is the sum of phi(p, q) over the classes, and its gradient by the student's logits is
q (phi' - sum of q phi') / T, phi' = dphi/dq. It is written here as the pair (D, q phi'), from log p and log q, which do
not underflow.

References: Hinton, Vinyals & Dean 2015, section 2, arXiv:1503.02531; Lin 1991; Lee 2001; Amari 1985.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from kdcore.testing.bounds import KDBounds, kd_bounds, name_and_parameter

__all__ = ["DIVERGENCES", "REAL", "Exact", "kd_rows", "log_softmax"]

#: The type that everything is computed in: wider than float64 on most machines.
REAL = np.longdouble

Array = Any


class Exact(NamedTuple):
    """Losses [B] and gradients [B, V] of rows, unweighted. A row without a gradient (reverse KL of +inf) has NaN."""

    loss: Array
    gradient: Array

    def bounds(self, student: Array, teacher: Array, temperature: float, alpha: float, divergence: Any) -> KDBounds:
        """How far a result may be from this, see :mod:`kdcore.testing.bounds`."""
        loss = self.loss.astype(np.float64)
        return kd_bounds(student, teacher, loss, temperature=temperature, alpha=alpha, divergence=divergence)


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """log softmax(logits / T) over the last dimension. The maximum goes first, so that large offsets cost nothing."""
    z = np.asarray(logits).astype(REAL) / REAL(temperature)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


def _kl(log_a: Array, log_b: Array) -> Array:
    """sum of a (log a - log b) over the classes that a allows: +inf where b does not allow one of them."""
    allowed = log_a > -np.inf
    outside = (allowed & (log_b == -np.inf)).any(axis=-1)
    both = allowed & (log_b > -np.inf)
    a, b = np.where(both, log_a, -np.inf), np.where(both, log_b, 0)
    return np.where(outside, np.inf, (np.exp(a) * (np.where(both, log_a, 0) - b)).sum(axis=-1))


def _log_mixture(share: float, log_a: Array, log_b: Array) -> Array:
    return np.logaddexp(np.log(REAL(share)) + log_a, np.log1p(-REAL(share)) + log_b)


def _times(q: Array, slope: Array) -> Array:
    """q phi', which is 0 of a class that the student rules out, whatever phi' is there."""
    return np.where(q > 0, q * np.where(q > 0, slope, 0), 0)


def _forward_kl(log_p: Array, log_q: Array, _: Any) -> tuple[Array, Array]:
    return _kl(log_p, log_q), -np.exp(log_p)


def _reverse_kl(log_p: Array, log_q: Array, _: Any) -> tuple[Array, Array]:
    value = _kl(log_q, log_p)
    q_slope = _times(np.exp(log_q), log_q - log_p)
    return value, np.where((value == np.inf)[..., None], np.nan, q_slope)


def _jsd(log_p: Array, log_q: Array, beta: float) -> tuple[Array, Array]:
    log_m = _log_mixture(beta, log_p, log_q)
    value = REAL(beta) * _kl(log_p, log_m) + (1 - REAL(beta)) * _kl(log_q, log_m)
    return value, _times(np.exp(log_q), (1 - REAL(beta)) * (log_q - log_m))


def _skew_forward_kl(log_p: Array, log_q: Array, lam: float) -> tuple[Array, Array]:
    log_m = _log_mixture(lam, log_p, log_q)
    return _kl(log_p, log_m), _times(np.exp(log_q), -(1 - REAL(lam)) * np.exp(log_p - log_m))


def _skew_reverse_kl(log_p: Array, log_q: Array, lam: float) -> tuple[Array, Array]:
    log_ratio = log_q - _log_mixture(lam, log_q, log_p)
    return _kl(log_q, log_q - log_ratio), _times(np.exp(log_q), log_ratio + 1 - REAL(lam) * np.exp(log_ratio))


def _tvd(log_p: Array, log_q: Array, _: Any) -> tuple[Array, Array]:
    p, q = np.exp(log_p), np.exp(log_q)
    return np.abs(p - q).sum(axis=-1) / 2, q * np.sign(q - p) / 2


def _alpha(log_p: Array, log_q: Array, a: float) -> tuple[Array, Array]:
    power = np.exp(REAL(a) * log_p + (1 - REAL(a)) * log_q)
    return (power.sum(axis=-1) - 1) / (REAL(a) * (REAL(a) - 1)), -power / REAL(a)


#: (D, q phi') from (log p, log q, parameter), by the names of :mod:`kdcore.divergences`.
DIVERGENCES: dict[str, Callable[[Array, Array, Any], tuple[Array, Array]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "alpha": _alpha,
}


def kd_rows(
    student: Array, teacher: Array, labels: Array, temperature: float, alpha: float, divergence: Any = "forward_kl"
) -> Exact:
    """alpha CE(h, y) + (1 - alpha) T² D(p, q) of each row, and its gradient; alpha is the weight of the CE.

    Parameters
    ----------
    student, teacher : array [B, V]
        Logits of any real dtype. -inf rules a class out; no row may be all -inf, hold NaN or +inf.
    labels : array [B] of int
        In [0, V); not read at alpha = 0.
    divergence
        A name, or one of :mod:`kdcore.divergences` with its parameter.

    A term whose factor is 0 is absent, so that 0 times infinity does not arise.

    >>> import numpy as np
    >>> exact = kd_rows(np.array([[2.0, 0.0, -1.0, 0.5]]), np.array([[0.3, 1.7, -0.2, 2.4]]), [0], 3.0, 0.0)
    >>> [round(float(x), 4) for x in (exact.loss[0], exact.gradient[0, 0])]
    [1.0667, 0.6559]
    """
    name, parameter = name_and_parameter(divergence)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore", under="ignore"):
        rows = np.arange(len(student))
        T, weight = REAL(temperature), REAL(alpha)
        loss, gradient = np.zeros(len(rows), REAL), np.zeros(np.shape(student), REAL)
        if alpha > 0:
            log_h = log_softmax(student)
            loss = loss - weight * log_h[rows, labels]
            gradient = gradient + weight * np.exp(log_h)
            gradient[rows, labels] -= weight
        if alpha < 1:
            log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
            value, q_slope = DIVERGENCES[name](log_p, log_q, parameter)
            loss = loss + (1 - weight) * T**2 * value
            sums = q_slope.sum(axis=-1, keepdims=True)
            gradient = gradient + (1 - weight) * T * (q_slope - np.exp(log_q) * sums)
    return Exact(loss, gradient)
