"""What every result is verified against: the textbook of :mod:`kdcore.testing.textbook`, with its bounds."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcore.testing import bounds, textbook
from kdcore.testing.textbook import DIVERGENCES

__all__ = ["DIVERGENCES", "Rows", "kd_rows", "log_softmax", "log_softmax_excess", "softmax_excess"]

Array = NDArray[Any]


def log_softmax(logits: Array, temperature: float = 1.0) -> Array:
    """log softmax(logits / T) over the last dimension, in float64."""
    x = logits.astype(np.float64) / temperature
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


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
    exact = textbook.kd_rows(student, teacher, labels, temperature, alpha, divergence)
    return Rows(*exact, *exact.bounds(student, teacher, temperature, alpha, divergence))


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
