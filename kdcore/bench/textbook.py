"""The formulas as a textbook has them, in NumPy float64, row by row: what every result is verified against.

p = softmax(t / T), q = softmax(s / T), h = softmax(s). A divergence is D = sum of phi(p, q); it is written here as the
pair (D, q phi'), phi' the derivative by q, from p, q and their logarithms; a constant is left out of phi' where it has
one, which changes no gradient because probabilities sum to 1. Logits must be finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcore.testing import bounds

__all__ = ["DIVERGENCES", "Rows", "kd_rows", "log_softmax", "log_softmax_excess", "softmax_excess"]

Array = NDArray[Any]


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """log softmax(logits / T) over the last dimension, in float64."""
    x = logits.astype(np.float64) / temperature
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def _forward_kl(p: Array, q: Array, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    return (p * (log_p - log_q)).sum(-1), -p


def _reverse_kl(p: Array, q: Array, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    return (q * (log_q - log_p)).sum(-1), q * (log_q - log_p)


def _jsd(p: Array, q: Array, log_p: Array, log_q: Array, beta: float = 0.5) -> tuple[Array, Array]:
    log_m = np.log(beta * p + (1 - beta) * q)
    return (
        (beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)).sum(-1),
        (1 - beta) * q * (log_q - log_m),
    )


def _skew_forward_kl(p: Array, q: Array, log_p: Array, log_q: Array, lam: float = 0.1) -> tuple[Array, Array]:
    m = lam * p + (1 - lam) * q
    return (p * (log_p - np.log(m))).sum(-1), -(1 - lam) * p * q / m


def _skew_reverse_kl(p: Array, q: Array, log_p: Array, log_q: Array, lam: float = 0.1) -> tuple[Array, Array]:
    m = lam * q + (1 - lam) * p
    return (q * (log_q - np.log(m))).sum(-1), q * (log_q - np.log(m) + lam - lam * q / m)


def _tvd(p: Array, q: Array, log_p: Array, log_q: Array) -> tuple[Array, Array]:
    return np.abs(p - q).sum(-1) / 2, q * np.sign(q - p) / 2


def _alpha(p: Array, q: Array, log_p: Array, log_q: Array, a: float = 0.5) -> tuple[Array, Array]:
    power = np.exp(a * log_p + (1 - a) * log_q)
    return (power.sum(-1) - 1) / (a * (a - 1)), -power / a


#: By the names that kdcore gives them, with its default parameters.
DIVERGENCES: dict[str, Callable[..., tuple[Array, Array]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "jsd": _jsd,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "tvd": _tvd,
    "alpha": _alpha,
}


class Rows(NamedTuple):
    """Losses [B] and gradients [B, V] of rows, unweighted, with their bounds [B] (see :mod:`kdcore.testing.bounds`)."""

    loss: Array
    gradient: Array
    loss_bound: Array
    gradient_bound: Array

    def loss_excess(self, loss: Any) -> float:
        """The worst error of ``loss`` [B], in units of its bound."""
        return _worst(np.abs(np.asarray(loss, np.float64) - self.loss) / self.loss_bound)

    def gradient_excess(self, gradient: Any, dtype: Any, scale: float = 1.0) -> float:
        """The worst error of ``gradient`` [B, V] of rows that weigh ``scale``, in units of its bound."""
        error = bounds.gradient_error(gradient, scale * self.gradient, dtype)
        return _worst(error / (scale * self.gradient_bound))


def kd_rows(
    student: Array, teacher: Array, labels: Array, temperature: float, alpha: float, divergence: str = "forward_kl"
) -> Rows:
    """alpha CE(h, y) + (1 - alpha) T² D(p, q) of each row, and its gradient; alpha is the weight of the CE."""
    rows = np.arange(len(labels))
    loss, gradient = np.zeros(len(labels)), np.zeros(student.shape)
    p = q = h = q_slope = None
    if alpha > 0:
        log_h = log_softmax(student)
        h = np.exp(log_h)
        loss -= alpha * log_h[rows, labels]
        gradient += alpha * h
        gradient[rows, labels] -= alpha
    if alpha < 1:
        log_p, log_q = log_softmax(teacher, temperature), log_softmax(student, temperature)
        p, q = np.exp(log_p), np.exp(log_q)
        value, q_slope = DIVERGENCES[divergence](p, q, log_p, log_q)
        loss += (1 - alpha) * temperature**2 * value
        gradient += (1 - alpha) * temperature * (q_slope - q * q_slope.sum(-1, keepdims=True))
        if divergence == "forward_kl":
            q_slope = None  # q phi' = -p: kdcore.testing.bounds has it as the p of its S
    kinds: dict[str, Any] = {"temperature": temperature, "alpha": alpha}
    return Rows(
        loss,
        gradient,
        bounds.loss_bound(student.dtype, loss, **kinds),
        bounds.gradient_bound(student.dtype, p, q, h, q_slope=q_slope, **kinds),
    )


def softmax_excess(result: Array, logits: Array) -> float:
    """The worst error of a softmax, row by row in units of G |p|, G the factor of float32."""
    p = np.exp(log_softmax(logits))
    error = np.linalg.norm(result - p, axis=-1)
    return _worst(error / (bounds.GRADIENT["float32"] * np.linalg.norm(p, axis=-1)))


def log_softmax_excess(result: Array, logits: Array) -> float:
    """The worst error of a log-softmax, number by number in units of the bound of a loss."""
    expected = log_softmax(logits)
    allowed = bounds.RELATIVE_LOSS["float32"] * np.abs(expected) + bounds.GRADIENT["float32"]
    return _worst(np.abs(result - expected) / allowed)


def _worst(excess: Array) -> float:
    """The largest; infinite where some number is NaN, which no comparison with a bound would catch."""
    return float(np.where(np.isnan(excess), np.inf, excess).max())
