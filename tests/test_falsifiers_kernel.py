"""The falsifiers of the system that kdcore re-implements, those about the kernel, by their IDs and with their numbers.

After each the general statement that it samples, as a property. ``alpha`` is the weight of the cross-entropy.
"""

from __future__ import annotations

import inspect
from math import log

import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st
from strategies import alphas, logit_pairs, logits_arrays, temperatures

import kdcore
from kdcore.divergences import NAMES

T = 4.0
#: The divergences that differences and quadrature can follow: total variation has kinks where p = q.
SMOOTH = [name for name in NAMES if name != "tvd"]
FLOAT32 = ((np.dtype(np.float32), np.dtype(np.float32)),)
FLOAT64 = ((np.dtype(np.float64), np.dtype(np.float64)),)
#: F-KD-FORWARD-KL: the pair whose two directions differ.
S, T_LOGITS, T_KL = np.array([2.0, 0.0, -1.0, 0.5]), np.array([0.3, 1.7, -0.2, 2.4]), 3.0
FORWARD, REVERSE = 1.0666926, 1.2188851


def gradient_of_cross_entropy(s, y):
    exact = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    return exact - (np.arange(s.size) == y)


# --- F-DISTILL-KDSTEP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_F_DISTILL_KDSTEP_001_at_alpha_one_the_gradient_is_that_of_cross_entropy(dtype):  # noqa: N802
    """F-DISTILL-KDSTEP-001"""
    s, t = np.array([1.0, 0.5, -0.3, 2.0], dtype), np.array([3.0, -0.1, 0.4, 0.0], dtype)
    gradient = kdcore.kd_logit_gradient(s, t, 3, T, 1.0)
    np.testing.assert_allclose(gradient, gradient_of_cross_entropy(s.astype(float), 3), rtol=0, atol=1e-6)


@given(logit_pairs(FLOAT32, supports=("all",)), temperatures)
def test_F_DISTILL_KDSTEP_001_of_any_logits(logits, temperature):  # noqa: N802
    """F-DISTILL-KDSTEP-001, for any teacher, student and temperature."""
    s, t = (x[0] for x in logits)
    y = int(t.argmax())
    gradient = kdcore.kd_logit_gradient(s, t, y, temperature, 1.0)
    np.testing.assert_allclose(gradient, gradient_of_cross_entropy(s.astype(float), y), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_F_DISTILL_KDSTEP_002_agreement_has_no_gradient_and_no_loss(dtype):  # noqa: N802
    """F-DISTILL-KDSTEP-002"""
    s = np.array([1.0, 0.5, -0.3, 2.0, 0.1], dtype)
    result = kdcore.kd_loss_and_gradient(s, s.copy(), 3, T, 0.0)
    assert abs(result.loss) <= 1e-6
    assert np.abs(result.gradient).max() <= 1e-6


@given(logit_pairs(FLOAT64), temperatures)
def test_F_DISTILL_KDSTEP_002_of_any_logits(logits, temperature):  # noqa: N802
    """F-DISTILL-KDSTEP-002, for any logits and divergence; also up to a constant."""
    s, _ = logits
    for divergence in NAMES:
        for t in (s.copy(), s + 1.0):
            options = {"divergence": divergence, "scale_t2": False, "reduction": "none"}
            result = kdcore.kd_loss_and_gradient(s, t, None, temperature, 0.0, **options)
            assert np.abs(result.loss).max() <= 1e-9 * max(1, 1 / temperature)
            if divergence != "tvd" or np.array_equal(t, s):  # whose slope jumps where s + 1 is rounded
                assert np.abs(result.gradient).max() <= 1e-9 * max(1, temperature**-2)


def test_F_DISTILL_KDSTEP_003_the_loss_is_monotone_in_the_divergence():  # noqa: N802
    """F-DISTILL-KDSTEP-003, with its pinned values for both directions."""
    t = np.array([1.0, 2.0, 3.0, 0.5])
    assert kdcore.kd_loss(-t, t, None, T, 0.0) > kdcore.kd_loss(t, t, None, T, 0.0)
    np.testing.assert_allclose(kdcore.kd_loss(-t, t, None, T, 0.0), 1.8584, atol=5e-5)
    np.testing.assert_allclose(kdcore.kd_loss(-t, t, None, T, 0.0, divergence="reverse_kl"), 1.7794, atol=5e-5)


@given(logit_pairs(FLOAT64, supports=("all",), scales=(0.1, 1.0, 10.0)), temperatures)
def test_F_DISTILL_KDSTEP_003_along_any_ray(logits, temperature):  # noqa: N802
    """F-DISTILL-KDSTEP-003: no divergence falls as s = t + step d leaves the teacher.

    phi' grows with q / p, which grows with d along the ray, so their covariance, the derivative, is not negative.
    """
    d, t = (x[:1] for x in logits)
    for divergence in NAMES:
        options = {"divergence": divergence, "scale_t2": False}
        losses = [
            float(kdcore.kd_loss(t + step * d, t, None, temperature, 0.0, **options)) for step in np.linspace(0, 2, 9)
        ]
        assert (np.diff(losses) >= -1e-12 * np.maximum(1, np.abs(losses[1:]))).all()


# --- sanity tests of kd_step, as far as they are the kernel's ------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_kd_step_sanity_softmax_sums_to_one(dtype):
    x = np.array([1.0, 2.0, 3.0, 4.0, -1000.0], dtype)
    p = kdcore.softmax(x, T)
    assert abs(p.sum() - 1) <= 1e-6 and (p >= 0).all()


@given(logits_arrays(dtypes=(np.dtype(np.float32),)), temperatures)
def test_kd_step_sanity_softmax_of_any_logits(x, temperature):
    p = kdcore.softmax(x, temperature)
    assert (p >= 0).all()
    np.testing.assert_allclose(p.sum(axis=-1, dtype=float), 1.0, rtol=0, atol=1e-6)


def test_kd_step_sanity_cross_entropy_gradient_of_a_uniform_student():
    gradient = kdcore.kd_logit_gradient(np.zeros(4), np.zeros(4), 2, T, 1.0)
    np.testing.assert_allclose(gradient, [0.25, 0.25, -0.75, 0.25], rtol=0, atol=1e-6)


def test_kd_step_sanity_loss_of_a_uniform_student_is_log_four():
    loss = kdcore.kd_loss(np.zeros(4), np.array([10.0, 0.0, 0.0, 0.0]), 2, T, 1.0)
    assert abs(loss - log(4)) <= 1e-5


@given(logits_arrays(dtypes=(np.dtype(np.float32),)), st.floats(-100, 100), temperatures, st.data())
def test_kd_step_sanity_of_any_uniform_student(teacher, level, temperature, data):
    """Both of the above, for any teacher, label and temperature: at alpha = 1, 1/V less the label, and log V."""
    t = teacher[0]
    y = data.draw(st.integers(0, t.size - 1))
    result = kdcore.kd_loss_and_gradient(np.full_like(t, level), t, y, temperature, 1.0)
    np.testing.assert_allclose(result.gradient, 1 / t.size - (np.arange(t.size) == y), rtol=0, atol=1e-6)
    assert abs(result.loss - log(t.size)) <= 1e-5


# --- F-KD-FORWARD-KL -----------------------------------------------------------------------------------------------


def kl(divergence="forward_kl", **options):
    return kdcore.kd_loss(S, T_LOGITS, None, T_KL, 0.0, divergence=divergence, **options)


def test_F_KD_FORWARD_KL_001_forward_and_not_reverse():  # noqa: N802
    """F-KD-FORWARD-KL-001: 1.0666926 by default; 1.2188851 is the other direction."""
    assert abs(kl() - FORWARD) <= 1e-5
    assert abs(kl("reverse_kl") - REVERSE) <= 1e-5
    assert abs(kl() - kl("reverse_kl")) > 1e-3
    default = inspect.signature(kdcore.kd_loss).parameters["divergence"].default
    assert default == "forward_kl"


@given(logit_pairs(FLOAT32), temperatures)
def test_F_KD_FORWARD_KL_002_not_negative(logits, temperature):  # noqa: N802
    """F-KD-FORWARD-KL-002 (Gibbs), down to rounding."""
    loss = kdcore.kl_divergence(*logits, temperature, reduction="none")
    assert (np.asarray(loss) >= -5e-7).all()


@pytest.mark.parametrize("logits", [S, T_LOGITS], ids=["student", "teacher"])
def test_F_KD_FORWARD_KL_003_zero_at_agreement(logits):  # noqa: N802
    """F-KD-FORWARD-KL-003"""
    assert abs(kdcore.kd_loss(logits, logits.copy(), None, T_KL, 0.0)) <= 1e-5


@pytest.mark.parametrize("divergence", SMOOTH)
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_F_KD_FORWARD_KL_004_the_loss_is_the_antiderivative_of_the_gradient(alpha, divergence):  # noqa: N802
    """F-KD-FORWARD-KL-004 and FALSIFY-KD-004: the line integral of the gradient is the difference of the losses."""
    end = T_LOGITS * 2 - 1
    nodes, weights = np.polynomial.legendre.leggauss(24)
    integral = 0.0
    for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        s = S + node * (end - S)
        integral += weight * kdcore.kd_logit_gradient(s, T_LOGITS, 1, T_KL, alpha, divergence=divergence) @ (end - S)
    first, last = (kdcore.kd_loss(s, T_LOGITS, 1, T_KL, alpha, divergence=divergence) for s in (S, end))
    assert abs(last - first) > 0.1
    np.testing.assert_allclose(integral, last - first, rtol=1e-10)


def test_F_KD_FORWARD_KL_005_alpha_one_is_cross_entropy():  # noqa: N802
    """F-KD-FORWARD-KL-005"""
    loss = kdcore.kd_loss(S, T_LOGITS, 2, T_KL, 1.0)
    assert abs(loss - float(oracle.cross_entropy(S, 2))) <= 1e-5
    assert loss == kdcore.cross_entropy(S, 2)


@given(logit_pairs(FLOAT64, supports=("all", "shared")), temperatures)
def test_F_KD_FORWARD_KL_006_scaled_by_the_square_of_t(logits, temperature):  # noqa: N802
    """F-KD-FORWARD-KL-006: L = T² KL, and at logits T x it is T² times the loss at x and T = 1."""
    s, t = logits
    loss = kdcore.kd_loss(s, t, None, temperature, 0.0)
    plain = kdcore.kl_divergence(s, t, temperature)
    np.testing.assert_allclose(loss, temperature**2 * plain, rtol=1e-14)
    np.testing.assert_allclose(
        kdcore.kd_loss(s * 8, t * 8, None, 8.0, 0.0), 64 * kdcore.kl_divergence(s, t), rtol=1e-10, atol=1e-10
    )


# --- test_kd_gradient_reduces_loss ---------------------------------------------------------------------------------


def test_kd_gradient_reduces_loss():
    """100 steps at rate 0.5, T = 4, alpha = 0.7, 2 x 4."""
    t = np.array([[1.0, 2.0, 3.0, 0.5], [2.0, -1.0, 0.0, 1.0]])
    s, labels = np.zeros((2, 4)), [2, 0]
    losses = []
    for _ in range(101):
        result = kdcore.kd_loss_and_gradient(s, t, labels, T, 0.7)
        losses.append(result.loss)
        s = s - 0.5 * result.gradient
    assert (np.diff(losses) < 0).all()


@given(
    logit_pairs(FLOAT64, supports=("all", "shared"), scales=(0.1, 1.0, 10.0)), st.floats(0.1, 3.9), temperatures, alphas
)
def test_kd_gradient_reduces_loss_at_any_rate_below_four(logits, rate, temperature, alpha):
    """The Hessian by the logits is at most 1/2, so no step below 4 raises the loss."""
    s, t = (x[:1] for x in logits)
    labels = s.argmax(axis=-1)
    before = kdcore.kd_loss_and_gradient(s, t, labels, temperature, alpha)
    after = kdcore.kd_loss(s - rate * before.gradient, t, labels, temperature, alpha)
    assert after <= before.loss + 1e-11 * max(1.0, temperature**2, before.loss)


# --- defects -------------------------------------------------------------------------------------------------------


@given(
    logit_pairs(FLOAT64, supports=("all",), scales=(0.1, 1.0, 3.0)),
    st.floats(0.5, 20.0),
    alphas,
    st.sampled_from(SMOOTH),
)
def test_D3_loss_and_gradient_are_of_one_direction(logits, temperature, alpha, divergence):  # noqa: N802
    """D3: reverse KL was logged beside the gradient of forward KL, 0.077 off by finite differences."""
    s, t = (x[0] for x in logits)
    direction = np.random.default_rng(0).normal(size=s.shape)
    direction /= np.linalg.norm(direction)
    arguments, options = (t, 0, temperature, alpha), {"divergence": divergence}
    losses = [kdcore.kd_loss(s + k * 1e-3 * direction, *arguments, **options) for k in (-2, -1, 1, 2)]
    slope = (8 * (losses[2] - losses[1]) - (losses[3] - losses[0])) / 12e-3
    gradient = kdcore.kd_logit_gradient(s, *arguments, **options)
    size = max(1.0, np.abs(losses).max(), temperature)
    # Offsets of 1e4 cost the differences some ten digits of their twelve.
    coarse = 1e-3 if max(np.abs(s).max(), np.abs(t).max()) > 1e3 else 1e-9
    np.testing.assert_allclose(gradient @ direction, slope, rtol=1e-8, atol=coarse * size)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_D7_non_finite_logits_do_not_become_uniform(value):  # noqa: N802
    """D7: such a row had the finite loss log V."""
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = value
    good = np.zeros_like(x)
    for operation in (
        lambda: kdcore.softmax(x),
        lambda: kdcore.kd_loss(x, good, [0, 1, 2], T, 0.5),
        lambda: kdcore.kd_loss(good, x, [0, 1, 2], T, 0.5),
        lambda: kdcore.kd_logit_gradient(good, x, None, T, 0.0),
    ):
        with pytest.raises(kdcore.NonFiniteError, match=r"\[1, 2\]"):
            operation()
    assert np.isnan(kdcore.softmax(x, validate=False)[1]).all()


@pytest.mark.parametrize(("temperature", "alpha"), [(0.0, 0.5), (-1.0, 0.5), (np.nan, 0.5), (T, 1.0001), (T, -0.1)])
def test_D7_temperature_and_alpha_are_not_clamped(temperature, alpha):  # noqa: N802
    """D7: T was clamped to 1e-6 (NaN too), and alpha was not looked at."""
    with pytest.raises(kdcore.DomainError):
        kdcore.kd_loss(S, T_LOGITS, 0, temperature, alpha)


@pytest.mark.parametrize("label", [4, 5, -1, 2**40])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_D8_a_label_outside_the_vocabulary_is_an_error(alpha, label):  # noqa: N802
    """D8: such a label had CE 0 and the gradient alpha softmax(s)."""
    for operation in (kdcore.kd_loss, kdcore.kd_logit_gradient):
        with pytest.raises(kdcore.LabelError, match=str(label)):
            operation(S, T_LOGITS, label, T, alpha)


def test_D8_only_ignore_index_masks_and_masks_all_three():  # noqa: N802
    """D8: loss, gradient and denominator."""
    s, t = np.stack([S, S, S]), np.stack([T_LOGITS] * 3)
    masked = kdcore.kd_loss_and_gradient(s, t, [0, -100, 2], T, 0.5)
    kept = kdcore.kd_loss_and_gradient(s[:2], t[:2], [0, 2], T, 0.5)
    np.testing.assert_allclose(masked.loss, kept.loss, rtol=1e-15)
    np.testing.assert_array_equal(masked.gradient[[0, 2]], kept.gradient)
    np.testing.assert_array_equal(masked.gradient[1], 0.0)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [30.0, 100.0, 700.0, 1e4])
def test_D9_no_clamp_caps_the_loss(size, dtype):  # noqa: N802
    """D9: a cross-entropy of 30 was logged as 20.72 = -log 1e-9, beside the gradient of 30."""
    s, t = np.array([size, 0.0], dtype), np.array([0.0, size], dtype)
    np.testing.assert_allclose(kdcore.cross_entropy(s, 1), size, rtol=1e-6)
    for divergence in ("forward_kl", "reverse_kl"):
        np.testing.assert_allclose(kdcore.kl_divergence(s, t, divergence=divergence), size, rtol=1e-6)
    step = dtype(size / 10)
    lower = s - np.array([step, 0], dtype)
    fall = kdcore.kd_loss(s, t, 1, 1.0, 0.5) - kdcore.kd_loss(lower, t, 1, 1.0, 0.5)
    np.testing.assert_allclose(fall, step, rtol=1e-4)  # the gradient by s_0 is 1, and the loss follows it
    np.testing.assert_allclose(kdcore.kd_logit_gradient(s, t, 1, 1.0, 0.5), [1, -1], rtol=1e-6)
