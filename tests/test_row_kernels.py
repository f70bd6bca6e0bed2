"""The row functions of kdcore.cpu.rows as a user composes them: inside their own njit code, against the oracle."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st
from numba import njit
from strategies import logit_pairs

from kdcore.cpu.rows import (
    cross_entropy_row,
    forward_kl_row,
    hinton_gradient_row,
    log_softmax_row,
    logsumexp_row,
    row_scratch,
    softmax_row,
)
from kdcore.testing import bounds

DTYPES = [np.dtype(np.float32), np.dtype(np.float64)]
VOCABULARIES = [1, 2, 17, 1000, 1025, 4099]


@njit
def everything(s, t, labels, T, scratch, p, log_p, gradient, losses):
    """What a user's kernel may do with a batch: every row function, one after the other, in one loop."""
    for i in range(s.shape[0]):
        softmax_row(s[i], T, scratch, p[i])
        log_softmax_row(s[i], T, scratch, log_p[i])
        losses[i, 0] = logsumexp_row(s[i], T, scratch)
        losses[i, 1] = cross_entropy_row(s[i], labels[i], scratch)
        losses[i, 2] = forward_kl_row(s[i], t[i], T, scratch)
        hinton_gradient_row(s[i], t[i], T, scratch, gradient[i])


def assert_everything(s, t, T):
    B, V = s.shape
    labels = np.arange(B) % V
    working = np.dtype(bounds.working_dtype(s.dtype))
    p, log_p, gradient = (np.full((B, V), np.nan, s.dtype) for _ in range(3))
    losses = np.full((B, 3), np.nan)
    everything(s, t, labels, T, row_scratch(V, working.type(0)), p, log_p, gradient, losses)

    G, R = bounds.GRADIENT[working.name], bounds.RELATIVE_LOSS[working.name]
    exact = oracle.softmax(s, T)
    assert (bounds.gradient_error(p, exact, s.dtype) <= G * np.sqrt(np.square(exact).sum(axis=-1))).all()
    exact = oracle.log_softmax(s, T)
    size = np.abs(np.where(np.isfinite(exact), exact, 0))
    assert bounds.within(log_p, exact, R * size + G).all()
    exact = oracle.logsumexp(s, T)
    assert bounds.within(losses[:, 0], exact, R * np.abs(exact) + G).all()
    for column, alpha in ((1, 1.0), (2, 0.0)):
        options = {"temperature": T, "alpha": alpha, "scale_t2": False}
        exact = oracle.kd(s, t, labels, T, alpha, scale_t2=False, reduction="none").loss
        assert bounds.within(losses[:, column], exact, bounds.loss_bound(s.dtype, exact, **options)).all()
    exact = oracle.kd(s, t, None, T, 0.0, reduction="none")
    limit = bounds.kd_bounds(s, t, exact.loss, temperature=T, alpha=0.0).gradient
    assert (bounds.gradient_error(gradient, exact.gradient, s.dtype) <= limit).all()


# ``everything`` takes seconds to compile in each process and for each dtype, so few tests share it.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_functions_at_fixed_sizes(dtype):
    for V in VOCABULARIES:
        rng = np.random.default_rng(V)
        for T, scale in [(0.05, 0.1), (1.0, 10.0), (2.0, 3.0), (100.0, 1e4)]:
            s, t = (rng.normal(size=(2, 3, V)) * scale).astype(dtype)
            assert_everything(s, t, T)


@given(logit_pairs(((DTYPES[0], DTYPES[0]),)), st.sampled_from([0.05, 1.0, 4.0, 100.0]))
def test_row_functions_of_wild_rows(logits, T):
    assert_everything(*logits, T)


@njit
def teacher_of_two(a, b, weight, s, T, scratch, mixture, gradient):
    """A loss of the user's own: the student follows the mean of two teachers."""
    total = 0.0
    for i in range(s.shape[0]):
        softmax_row(a[i], T, scratch, mixture[0])
        softmax_row(b[i], T, scratch, mixture[1])
        for v in range(s.shape[1]):
            mixture[2, v] = T * np.log(weight * mixture[0, v] + (1 - weight) * mixture[1, v])
        total += T * T * forward_kl_row(s[i], mixture[2], T, scratch)
        hinton_gradient_row(s[i], mixture[2], T, scratch, gradient[i])
    return total


def test_an_ensemble_written_by_a_user():
    a, b, s = np.random.default_rng(3).normal(size=(3, 4, 50)) * 3
    gradient, T, weight = np.empty_like(s), 2.0, 0.3
    total = teacher_of_two(a, b, weight, s, T, row_scratch(50, 0.0), np.empty((3, 50)), gradient)
    p = weight * oracle.softmax(a, T) + (1 - weight) * oracle.softmax(b, T)
    log_q = oracle.log_softmax(s, T)
    np.testing.assert_allclose(total, float(T**2 * (p * (np.log(p) - log_q)).sum()), rtol=1e-12)
    np.testing.assert_allclose(gradient, (T * (np.exp(log_q) - p)).astype(float), atol=1e-13)


def test_infinite_losses_come_out_of_a_users_kernel():
    s, t = np.array([[[0.0, -np.inf, 1.0]], [[0.0, 1.0, -np.inf]]], np.float32)
    losses, p, log_p, gradient = np.empty((1, 3)), np.empty_like(s), np.empty_like(s), np.empty_like(s)
    everything(s, t, np.array([1]), 2.0, row_scratch(3, np.float32(0)), p, log_p, gradient, losses)
    np.testing.assert_array_equal(losses[0, 1:], [np.inf, np.inf])
    exact = oracle.kd(s, t, None, 2.0, 0.0).gradient.astype(float)
    np.testing.assert_allclose(gradient, exact, atol=1e-6)
