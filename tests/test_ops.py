"""The public operations: values against the oracle, derivatives, -inf, masks and what must hold of every answer."""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np
import oracle
import pytest
from comparisons import assert_kd, same_bits
from hypothesis import assume, given, strategies as st
from strategies import (
    BFLOAT16,
    DTYPE_PAIRS,
    DTYPES,
    FORMULA_DTYPE_PAIRS,
    Problem,
    alphas,
    logit_pairs,
    logits_arrays,
    narrowed,
    problems,
    seeds,
    temperatures,
)

import kdcore
import kdcore.cpu as kdcore_cpu
from kdcore.divergences import NAMES
from kdcore.testing import bounds

INF = np.inf
FLOAT32 = [(np.dtype(np.float32), np.dtype(np.float32))]
FLOAT64 = [(np.dtype(np.float64), np.dtype(np.float64))]
VOCABULARIES = [1, 2, 3, 17, 1000, 1023, 1025, 4099, 32003]
TEMPERATURES = [0.05, 0.5, 1.0, 2.0, 4.0, 20.0, 100.0]


def pair(dtypes, B, V, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return [narrowed(rng.normal(size=(B, V)) * scale, dtype) for dtype in dtypes]


def name_of(value):
    return "-".join(dtype.name for dtype in value) if isinstance(value, tuple) else None


# --- softmax, log_softmax, logsumexp -------------------------------------------------------------------------------
# A softmax subtracts nothing, so the contract leaves G |p| of it; log-probabilities are losses (CE at T = 1).


def assert_row_operations(x, T):
    name = bounds.working_dtype(x.dtype)
    G, R = bounds.GRADIENT[name], bounds.RELATIVE_LOSS[name]

    p = kdcore.softmax(x, T)
    assert (p.dtype, p.shape) == (x.dtype, x.shape)
    exact = oracle.softmax(x, T)
    assert (bounds.gradient_error(p, exact, x.dtype) <= G * np.sqrt(np.square(exact).sum(axis=-1))).all()
    assert ((p >= 0) & (p <= 1)).all()

    log_p = kdcore.log_softmax(x, T)
    assert (log_p.dtype, log_p.shape) == (x.dtype, x.shape)
    exact = oracle.log_softmax(x, T)
    finite = np.isfinite(exact)
    assert np.isneginf(log_p[~finite].astype(np.float64)).all()
    largest = float(ml_dtypes.finfo(x.dtype).max)
    seen = np.clip(exact[finite], -largest, 0)  # what a 16-bit type cannot hold is -inf in it
    error = np.abs(np.clip(log_p[finite].astype(np.float64), -largest, 0) - seen)
    if x.dtype.itemsize <= 4:  # the working type is float32 and the result no wider, so its rounding shows
        error = np.maximum(error - bounds.half_ulp(seen, x.dtype), 0)
    assert (error <= R * np.abs(seen) + G).all()

    lse = np.asarray(kdcore.logsumexp(x, T))
    assert (lse.dtype, lse.shape) == (np.float64, x.shape[:-1])
    exact = oracle.logsumexp(x, T)
    assert bounds.within(lse, exact, R * np.abs(exact) + G).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(st.data(), temperatures)
def test_row_operations_match_the_oracle(dtype, data, T):
    assert_row_operations(data.draw(logits_arrays((dtype,))), T)


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_operations_at_fixed_sizes(dtype, V):
    for T, scale in [(0.05, 1.0), (1.0, 10.0), (100.0, 1e4)]:
        assert_row_operations(pair([dtype], 2, V, scale)[0], T)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_probabilities_are_monotone_in_the_logits_and_exactly_equal_at_ties(dtype):
    x = np.array([0.0, 1.0, 1.0, 2.0, -INF, 2.0, -3.0], dtype)
    p = kdcore.softmax(x).astype(np.float64)
    assert p[4] == 0 and p[6] > 0
    assert p[1] == p[2] and p[3] == p[5]
    assert p[6] < p[0] < p[1] < p[3]


def test_one_row_and_a_single_class():
    same_bits(kdcore.softmax(np.array([3.5])), np.array([1.0]))
    same_bits(kdcore.log_softmax(np.array([3.5])), np.array([0.0]))
    assert kdcore.logsumexp(np.array([3.5]), 2.0) == 1.75


def test_higher_temperatures_have_more_entropy_and_the_same_argmax():
    x = pair([np.dtype(np.float32)], 8, 101)[0]
    entropies = []
    for T in (1.0, 2.0, 3.0, 5.0, 10.0):
        p = kdcore.softmax(x, T)
        np.testing.assert_array_equal(p.argmax(axis=-1), x.argmax(axis=-1))
        entropies.append(-(p * np.log(p)).sum(axis=-1))
    assert (np.diff(entropies, axis=0) > 0).all()


# --- the KD loss against the oracle --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=name_of)
@given(st.data())
def test_forward_kl_matches_the_oracle(dtypes, data):
    problem = data.draw(problems((dtypes,)))
    assert_kd(*problem.arguments, **problem.options)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=name_of)
@given(st.data())
def test_reverse_kl_matches_the_oracle(dtypes, data):
    problem = data.draw(problems((dtypes,)))
    assert_kd(*problem.arguments, divergence="reverse_kl", **problem.options)


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=name_of)
def test_forward_kl_at_fixed_sizes(dtypes, V):
    B = 3
    labels = np.arange(B) % V
    for k, T in enumerate(TEMPERATURES):
        student, teacher = pair(dtypes, B, V, [0.1, 1.0, 10.0, 30.0][k % 4], seed=k)
        assert_kd(student, teacher, labels, T, [0.0, 0.3, 1.0][k % 3], reduction="none")


@pytest.mark.parametrize("dtypes", FORMULA_DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("V", [1, 2, 17, 1025, 4099])
def test_reverse_kl_at_fixed_sizes(dtypes, V):
    for k, T in enumerate(TEMPERATURES):
        student, teacher = pair(dtypes, 2, V, [0.1, 1.0, 10.0, 30.0][k % 4], seed=k)
        options = {"divergence": "reverse_kl", "reduction": "none", "scale_t2": k % 2 == 0}
        assert_kd(student, teacher, [0, V - 1], T, [0.0, 0.3][k % 2], **options)


@pytest.mark.parametrize("T", TEMPERATURES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("scale", [0.01, 3.0, 1e4])
def test_temperatures_alphas_and_scales(scale, alpha, T):
    student, teacher = pair(FLOAT32[0], 4, 1000, scale)
    assert_kd(student, teacher, [0, 1, 2, 999], T, alpha)
    assert_kd(student, teacher, [0, 1, 2, 999], T, alpha, teacher_temperature=1.7, scale_t2=False)


def test_the_rounding_of_the_logits_difference_stays_within_the_bound():
    # One logit at the top and V - 1 equal ones some ten below it: their common rounding cannot average out.
    V = 151936
    for top in (0.3, 0.7):
        for depth in (8.3, 9.1, 11.9):
            student, teacher = np.full((2, 1, V), top - depth, np.float32)
            student[0, 0] = teacher[0, 1] = top
            assert_kd(student, teacher, [0], 1.0, 0.3)
    for divergence in NAMES:  # the last depth, where it shows most
        assert_kd(student, teacher, None, 0.7, 0.0, divergence=divergence)


def test_ratio_of_two_temperatures_stays_within_the_bound():
    # Teacher and student agree at t / T_t = s / T, so all that is left of the loss is rounding.
    rng = np.random.default_rng(5)
    for T, teacher_temperature in [(3.0, 1.0), (1.0, 3.0), (7.0, 1.3), (0.3, 2.9)]:
        teacher = (rng.normal(size=(1, 151936)) * 4).astype(np.float32)
        student = (teacher.astype(np.float64) * T / teacher_temperature).astype(np.float32)
        for divergence in NAMES if T == 0.3 else NAMES[:1]:
            assert_kd(student, teacher, None, T, 0.0, teacher_temperature=teacher_temperature, divergence=divergence)


def test_gradients_can_be_written_in_another_dtype():
    student, teacher = pair(FLOAT32[0], 3, 100)
    for dtype in (np.float16, np.float64):
        out = np.empty(student.shape, dtype)
        result = assert_kd(student, teacher, [0, 1, 2], 2.0, 0.3, out=out)
        assert result.gradient is out


@given(problems())
def test_loss_gradient_and_both_agree_bit_for_bit(problem):
    both = kdcore.kd_loss_and_gradient(*problem.arguments, **problem.options)
    same_bits(kdcore.kd_loss(*problem.arguments, **problem.options), both.loss)
    same_bits(kdcore.kd_logit_gradient(*problem.arguments, **problem.options), both.gradient)
    assert both.gradient.dtype == problem.student.dtype


@given(problems(tuple(FLOAT32)))
def test_parts_add_up_to_the_loss(problem):
    alpha = problem.alpha
    result = kdcore.kd_loss_and_gradient(*problem.arguments, **problem.options)
    parts = [alpha * np.asarray(result.ce)] if alpha > 0 else []
    parts += [(1 - alpha) * np.asarray(result.kl)] if alpha < 1 else []
    np.testing.assert_allclose(result.loss, sum(parts), rtol=1e-14, atol=1e-300)


@given(logit_pairs(tuple(FLOAT32)), temperatures)
def test_kl_divergence_is_the_loss_without_its_square_of_t(logits, T):
    student, teacher = logits
    for divergence in NAMES:
        options = {"divergence": divergence, "reduction": "none"}
        actual = kdcore.kl_divergence(student, teacher, T, **options)
        same_bits(actual, kdcore.kd_loss(student, teacher, None, T, 0.0, scale_t2=False, **options))
        scaled = kdcore.kd_loss(student, teacher, None, T, 0.0, **options)
        np.testing.assert_allclose(np.asarray(actual) * T**2, scaled, rtol=1e-14, atol=0)


def test_cross_entropy_is_the_loss_at_alpha_one():
    student, teacher = pair(FLOAT32[0], 5, 17)
    labels = [0, 16, 7, 3, 3]
    for reduction in ("mean", "sum", "none"):
        same_bits(
            kdcore.cross_entropy(student, labels, ignore_index=7, reduction=reduction),
            kdcore.kd_loss(student, teacher, labels, 2.0, 1.0, ignore_index=7, reduction=reduction),
        )


# --- the gradient is the derivative of the returned loss -----------------------------------------------------------


def slope_of_the_returned_loss(s, problem, options):
    """Five-point differences of the loss that kd_loss returns, class by class."""
    step = 2e-3
    slope = np.empty(s.shape)
    for index in np.ndindex(*s.shape):
        values = []
        for k in (-2, -1, 1, 2):
            moved = s.copy()
            moved[index] += k * step
            loss = kdcore.kd_loss(moved, *problem.arguments[1:], **options)
            values.append(float(np.sum(loss)))
        slope[index] = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * step)
    return slope


def assert_derivative(problem, divergence):
    options = {**problem.options, "divergence": divergence}
    gradient = kdcore.kd_logit_gradient(*problem.arguments, **options)
    slope = slope_of_the_returned_loss(problem.student, problem, options)
    loss = np.abs(kdcore.kd_loss(*problem.arguments, **options)).max()
    # Truncation is step^4 of the fifth derivative (T^-3 of a term with T²); rounding is eps L / step.
    scale = max(1.0, options.get("denominator", 1.0) ** -1) * max(1.0, np.max(options.get("weights", 1.0)))
    tolerance = scale * 1e-8 * max(1.0, problem.temperature, problem.temperature**-4) + 1e-12 * loss
    np.testing.assert_allclose(gradient, slope, rtol=1e-8, atol=tolerance)


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale_t2": False},
        {"teacher_temperature": 0.7},
        {"teacher_temperature": 5.0, "scale_t2": False, "weights": [0.5, 0.0, 2.0]},
        {"denominator": 3.7, "weights": [0.5, 1.0, 2.0]},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_gradient_is_the_derivative_of_the_loss(options, alpha, reduction, divergence):
    if reduction != "mean":
        options = {name: value for name, value in options.items() if name != "denominator"}
    student, teacher = pair(FLOAT64[0], 3, 5, scale=2.0)
    labels = [4, 0, -100] if alpha > 0 else None
    assert_derivative(Problem(student, teacher, labels, 2.0, alpha, {**options, "reduction": reduction}), divergence)


@given(problems(tuple(FLOAT64), supports=("all", "shared"), scales=(0.1, 1.0, 3.0)), st.sampled_from([0, 1]))
def test_gradient_is_the_derivative_of_the_loss_of_any_problem(problem, which):
    assume(problem.student.shape[1] <= 17 and np.abs(problem.student.max()) < 100)  # else rounding of s + step shows
    temperature = max(problem.temperature, 0.5)  # below, the differences are coarser than the function
    problem = problem._replace(temperature=temperature)
    assume(np.isfinite(kdcore.kd_loss(*problem.arguments, **problem.options)).all())  # a label may be ruled out
    assert_derivative(problem, ["forward_kl", "reverse_kl"][which])


# --- -inf, extremes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_classes_ruled_out_by_both_are_absent(dtype):
    student, teacher = pair((dtype, dtype), 3, 17)
    keep = np.arange(17) % 3 != 1
    wide = [x.copy() for x in (student, teacher)]
    for x in wide:
        x[:, ~keep] = -INF
    labels = np.array([0, 2, 6])  # classes 0, 1 and 4 of those that stay
    whole = assert_kd(*wide, labels, 2.0, 0.3, reduction="none")
    part = kdcore.kd_loss_and_gradient(
        np.ascontiguousarray(student[:, keep]),
        np.ascontiguousarray(teacher[:, keep]),
        [0, 1, 4],
        2.0,
        0.3,
        reduction="none",
    )
    np.testing.assert_allclose(whole.loss, part.loss, rtol=1e-6)
    assert (whole.gradient[:, ~keep].astype(np.float64) == 0).all()
    np.testing.assert_allclose(
        whole.gradient[:, keep].astype(np.float64), part.gradient.astype(np.float64), rtol=1e-2, atol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_class_that_only_the_student_rules_out_makes_forward_kl_infinite(dtype):
    student, teacher = pair((dtype, dtype), 3, 9)
    student[1, 4] = -INF
    result = assert_kd(student, teacher, [0, 0, 0], 2.0, 0.3, reduction="none")
    assert result.loss[1] == INF and np.isfinite(result.loss[[0, 2]]).all()
    assert np.isfinite(result.gradient.astype(np.float64)).all()
    assert result.gradient[1, 4] < 0  # the teacher's probability pulls
    assert kdcore.kd_loss(student, teacher, [0, 0, 0], 2.0, 0.3) == INF
    assert kdcore.kd_loss(student, teacher, [0, 0, 0], 2.0, 1.0) < INF


def test_support_is_read_off_the_logits_even_where_exponentials_underflow():
    student, teacher = np.array([0.0, -INF], np.float32), np.array([0.0, -1e6], np.float32)
    assert kdcore.softmax(teacher)[1] == 0
    assert kdcore.kl_divergence(student, teacher) == INF
    assert kdcore.kl_divergence(teacher, student) == 0
    assert kdcore.kl_divergence(teacher, student, divergence="reverse_kl") == INF
    assert kdcore.kl_divergence(student, teacher, divergence="reverse_kl") == 0


def test_a_class_that_only_the_teacher_rules_out_adds_nothing():
    student, teacher = pair(FLOAT32[0], 2, 9)
    teacher[0, 3] = -INF
    result = assert_kd(student, teacher, None, 2.0, 0.0, reduction="none")
    assert np.isfinite(result.loss).all() and result.gradient[0, 3] > 0


def test_infinite_reverse_kl_has_an_infinite_loss_and_no_gradient():
    student, teacher = pair(FLOAT32[0], 3, 9)
    teacher[1, 3] = -INF
    arguments, options = (student, teacher, None, 2.0, 0.0), {"divergence": "reverse_kl"}
    result = assert_kd(*arguments, reduction="none", **options)
    assert result.loss[1] == INF
    assert np.isnan(result.gradient[1]).all() and np.isfinite(result.gradient[[0, 2]]).all()
    with pytest.raises(kdcore.UndefinedGradientError, match=r"student_logits\[1\]") as caught:
        kdcore.kd_loss_and_gradient(*arguments, validate=True, **options)
    assert isinstance(caught.value, ArithmeticError)
    # The loss alone is defined, and so is the gradient of a row where the student rules the class out too.
    assert kdcore.kd_loss(*arguments, validate=True, **options) == INF
    student[1, 3] = -INF
    assert_kd(*arguments, validate=True, **options)


def test_alpha_one_never_meets_the_teacher():
    student, teacher = pair(FLOAT32[0], 2, 9)
    teacher[:] = np.nan
    assert_kd(student, np.zeros_like(student), [0, 1], 2.0, 1.0)
    result = kdcore.kd_loss_and_gradient(student, teacher, [0, 1], 2.0, 1.0, validate=True)
    same_bits(result.gradient, kdcore.kd_logit_gradient(student, student, [0, 1], 2.0, 1.0))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_end_points_do_not_multiply_zero_by_infinity(divergence):
    student = np.array([[0.0, -INF, 1.0]])
    teacher = np.array([[0.0, 1.0, 1.0]])
    assert kdcore.kd_loss(student, student, [1], 2.0, 0.0, divergence=divergence) == 0  # CE would be +inf
    assert np.isfinite(kdcore.kd_loss(student, teacher, [0], 2.0, 1.0, divergence=divergence))
    other = (teacher, student) if divergence == "reverse_kl" else (student, teacher)
    assert kdcore.kl_divergence(*other, divergence=divergence) == INF
    assert np.isfinite(kdcore.kd_logit_gradient(*other, [0], 2.0, 1.0, divergence=divergence)).all()


def test_cross_entropy_of_a_ruled_out_label_is_infinite_with_a_finite_gradient():
    student = np.array([[0.0, -INF, 0.0]], np.float32)
    result = assert_kd(student, student, [1], 1.0, 1.0)
    assert result.loss == INF
    np.testing.assert_array_equal(result.gradient, [[0.5, -1.0, 0.5]])
    assert_kd(student, student, [1], 2.0, 0.3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_single_class_has_nothing_to_learn(dtype):
    student, teacher = np.array([[3.0], [7.0]], dtype), np.array([[-2.0], [9.0]], dtype)
    result = assert_kd(student, teacher, [0, 0], 2.0, 0.3, reduction="none")
    assert (result.loss == 0).all() and (result.gradient.astype(np.float64) == 0).all()


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("size", [1e4, 1e30, 1e38, 3e38])
@pytest.mark.parametrize("T", [0.05, 1.0, 100.0])
def test_huge_float32_logits_do_not_overflow(T, size, divergence):
    V = 2049  # more than a block, whose sum could overflow on its own
    signs = np.where(np.arange(V) % 3 == 0, 1, -1)
    x = (size * signs).astype(np.float32)
    for student, teacher in [(x, -x), (x, x), (x, np.zeros_like(x)), (np.zeros_like(x), x)]:
        assert_kd(student[None], teacher[None], [1], T, 0.3, divergence=divergence)
        if divergence == "forward_kl":
            assert_row_operations(student, T)


def test_a_difference_that_overflows_where_the_teacher_has_underflowed():
    """0 times -inf in float32, of finite logits: the divergence is that of the other classes."""
    s = np.array([[3e38, -3e38, 3e38], [-3e38, 3e38, 0.0]], np.float32)
    t = np.array([[1.0, -1e5, 0.5], [-1e5, 0.0, -2e5]], np.float32)
    exact = oracle.kd(s.astype(np.float64), t.astype(np.float64), None, 2.0, 0.0, reduction="none")
    result = kdcore.kd_loss_and_gradient(s, t, None, 2.0, 0.0, reduction="none")
    np.testing.assert_allclose(result.loss, exact.loss.astype(np.float64), rtol=1e-6)
    np.testing.assert_allclose(result.gradient, exact.gradient.astype(np.float64), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize(("T", "teacher_temperature"), [(0.05, 100.0), (100.0, 0.05), (1e-6, 1e6), (1e-20, 1e20)])
@pytest.mark.parametrize("size", [0.0, 1.0, 3e38])
def test_huge_ratios_of_temperatures_do_not_overflow(size, T, teacher_temperature):
    student = np.where(np.arange(2049) % 3 == 0, size, -size).astype(np.float32)[None]
    teacher = np.zeros_like(student)
    options = {"teacher_temperature": teacher_temperature, "scale_t2": False}
    result = kdcore.kd_loss_and_gradient(student, teacher, None, T, 0.0, **options)
    exact = oracle.kd(student, teacher, None, T, 0.0, **options)
    assert np.isfinite(result.loss)
    np.testing.assert_allclose(result.loss, float(exact.loss), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(result.gradient * T, (exact.gradient * T).astype(np.float64), atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_offsets_of_ten_thousand(offset, dtype):
    student, teacher = pair((np.dtype(dtype), np.dtype(dtype)), 4, 1000)
    assert_kd((student + dtype(offset)), teacher - dtype(offset), [0, 1, 2, 3], 2.0, 0.3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_confident_wrong_student_pays_in_full(dtype):
    student, teacher = np.zeros((2, 1, 50), dtype)
    student[0, 7], teacher[0, 3] = 800.0, 500.0
    assert_kd(student, teacher, [3], 1.0, 0.5)
    np.testing.assert_allclose(kdcore.cross_entropy(student, [3]), 800.0, rtol=1e-6)
    np.testing.assert_allclose(kdcore.kl_divergence(student, teacher), 800.0, rtol=1e-6)
    gradient = kdcore.kd_logit_gradient(student, teacher, [3], 1.0, 0.5)
    np.testing.assert_allclose(gradient[0, [3, 7]], [-1.0, 1.0], rtol=1e-6)


# --- masks, weights, denominators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("padding", [np.nan, INF, -INF])
def test_masked_rows_are_not_read(padding, alpha, divergence):
    student, teacher = pair(FLOAT32[0], 5, 9)
    labels, weights = np.array([0, -100, 2, 3, 4]), np.array([1.0, 2.0, 0.0, 0.5, 3.0])
    kept = [0, 3, 4]
    options = {"divergence": divergence}
    part = kdcore.kd_loss_and_gradient(
        student[kept], teacher[kept], labels[kept], 2.0, alpha, weights=weights[kept], **options
    )
    student[[1, 2]] = teacher[[1, 2]] = padding
    for x in (student, teacher):
        assert not np.isfinite(x[[1, 2]]).any()
    whole = kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, alpha, weights=weights, validate=True, **options)
    assert whole.loss == pytest.approx(float(part.loss), rel=1e-15)
    same_bits(whole.gradient[kept], part.gradient)
    same_bits(whole.gradient[[1, 2]], np.zeros((2, 9), np.float32))
    rows = kdcore.kd_loss(student, teacher, labels, 2.0, alpha, weights=weights, reduction="none", **options)
    assert (rows[[1, 2]] == 0).all() and (rows[kept] > 0).all()


@pytest.mark.parametrize("validate", [None, True, False])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("operation", ["kd_loss_and_gradient", "dkd_loss_and_gradient"])
def test_the_label_of_a_row_without_weight_is_not_read(operation, given, validate):
    student, teacher, weights = np.eye(2, 3), np.ones((2, 3)), [1.0, 0.0]
    run = functools.partial(getattr(kdcore, operation), student, teacher, temperature=2.0, alpha=0.3, weights=weights)
    expected = run(labels=[0, 1])
    result = run(labels=[0, 7], validate=validate, out=np.empty_like(student) if given else None)
    assert result.loss == expected.loss
    np.testing.assert_array_equal(result.gradient, expected.gradient)
    if validate is not False:
        before = student.copy()
        with pytest.raises(kdcore.LabelError, match=r"labels\[0\] is 7"):
            run(labels=[7, 0], validate=validate, out=student)
        np.testing.assert_array_equal(student, before)  # nothing was written over the logits


def test_weights_that_add_up_to_too_much_are_an_error_only_if_asked():
    student, weights = np.eye(2, 3), [1.7e308, 1.7e308]
    assert kdcore.kd_loss(student, student, None, 2.0, 0.0, weights=weights, validate=False) == 0
    with pytest.raises(kdcore.DomainError, match="weights must have a finite sum"):
        kdcore.kd_loss(student, student, None, 2.0, 0.0, weights=weights)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 10**6])
def test_any_ignore_index(ignore_index):
    student, teacher = pair(FLOAT32[0], 3, 5)
    labels = [1, ignore_index, 3]
    assert_kd(student, teacher, labels, 2.0, 0.3, ignore_index=ignore_index)
    assert_kd(student, teacher, labels, 2.0, 0.0, ignore_index=ignore_index)
    kept = [0, 2]
    expected = kdcore.kd_loss(student[kept], teacher[kept], [1, 3], 2.0, 0.3)
    actual = kdcore.kd_loss(student, teacher, labels, 2.0, 0.3, ignore_index=ignore_index)
    assert actual == pytest.approx(float(expected), rel=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_nothing_unmasked_and_no_rows_give_zero(alpha, reduction):
    student, teacher = np.full((2, 3, 7), np.nan, np.float32)
    for masking in ({"labels": [-100] * 3}, {"labels": [0] * 3, "weights": [0.0] * 3}):
        labels, weights = masking["labels"], masking.get("weights")
        result = kdcore.kd_loss_and_gradient(
            student, teacher, labels, 2.0, alpha, weights=weights, reduction=reduction, validate=True
        )
        same_bits(result.gradient, np.zeros_like(student))
        expected = np.zeros(3) if reduction == "none" else np.float64(0)
        for value in (result.loss, result.ce, result.kl):
            if value is not None:
                same_bits(value, expected)
    empty = np.empty((0, 7), np.float32)
    for labels in ([], np.empty(0, np.int64)):
        result = kdcore.kd_loss_and_gradient(empty, empty, labels, 2.0, alpha, reduction=reduction)
        same_bits(result.gradient, empty)
        same_bits(result.loss, np.zeros(0) if reduction == "none" else np.float64(0))
    same_bits(kdcore.softmax(empty), empty)
    same_bits(kdcore.logsumexp(np.empty((2, 0, 7), np.float32)), np.empty((2, 0)))


def test_reductions():
    student, teacher = pair(FLOAT64[0], 4, 9)
    labels, weights = [0, 1, -100, 3], np.array([1.0, 0.5, 9.0, 2.0])
    arguments, options = (student, teacher, labels, 2.0, 0.3), {"weights": weights}
    rows = kdcore.kd_loss_and_gradient(*arguments, reduction="none", **options)
    assert rows.loss.shape == rows.ce.shape == rows.kl.shape == (4,)
    total = kdcore.kd_loss_and_gradient(*arguments, reduction="sum", **options)
    mean = kdcore.kd_loss_and_gradient(*arguments, **options)
    per_eight = kdcore.kd_loss_and_gradient(*arguments, denominator=8, **options)
    same_bits(rows.gradient, total.gradient)
    for name in ("loss", "ce", "kl", "gradient"):
        whole = np.asarray(getattr(total, name))
        if name != "gradient":
            np.testing.assert_allclose(np.sum(getattr(rows, name)), whole, rtol=1e-15)
        np.testing.assert_allclose(np.asarray(getattr(mean, name)) * 3.5, whole, rtol=1e-14, atol=1e-16)
        np.testing.assert_allclose(np.asarray(getattr(per_eight, name)) * 8, whole, rtol=1e-14, atol=1e-16)


@given(problems(tuple(FLOAT64), supports=("all",)), st.integers(0, 4))
def test_micro_batches_with_a_denominator_add_up_to_the_batch(problem, cut):
    student, teacher, labels, T, alpha = problem.arguments
    options = {key: value for key, value in problem.options.items() if key not in ("reduction", "denominator")}
    weights = options.pop("weights", np.ones(len(student)))
    denominator = float(oracle.row_scales(len(student), labels, weights=weights, reduction="sum", **{
        key: value for key, value in options.items() if key == "ignore_index"
    }).sum())  # fmt: skip
    assume(denominator > 0)
    whole = kdcore.kd_loss_and_gradient(student, teacher, labels, T, alpha, weights=weights, **options)
    loss, gradients = 0.0, []
    for rows in (slice(None, cut), slice(cut, None)):
        part = kdcore.kd_loss_and_gradient(
            student[rows],
            teacher[rows],
            None if labels is None else labels[rows],
            T,
            alpha,
            weights=weights[rows],
            denominator=denominator,
            **options,
        )
        loss += part.loss
        gradients.append(part.gradient)
    np.testing.assert_allclose(loss, whole.loss, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose(np.concatenate(gradients), whole.gradient, rtol=1e-13, atol=1e-300)


def test_leading_dimensions_are_rows():
    student, teacher = pair(FLOAT32[0], 24, 9)
    labels, weights = np.arange(24) % 9, np.linspace(0, 2, 24)
    flat = kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3, weights=weights, reduction="none")
    shape = (2, 3, 4)
    deep = kdcore.kd_loss_and_gradient(
        student.reshape(*shape, 9),
        teacher.reshape(*shape, 9),
        labels.reshape(shape),
        2.0,
        0.3,
        weights=weights.reshape(shape).tolist(),
        reduction="none",
    )
    same_bits(deep.loss, flat.loss.reshape(shape))
    same_bits(deep.gradient, flat.gradient.reshape(*shape, 9))
    one = kdcore.kd_loss_and_gradient(student[5], teacher[5], 5, 2.0, 0.3)
    assert one.gradient.shape == (9,) and np.shape(one.loss) == ()
    same_bits(one.loss, kdcore.kd_loss(student[5:6], teacher[5:6], [5], 2.0, 0.3))


@pytest.mark.parametrize("kind", [np.int8, np.uint8, np.int32, np.uint64, np.int64, list])
def test_labels_of_any_integer_type(kind):
    student, teacher = pair(FLOAT32[0], 3, 9)
    labels = [0, 8, 4] if kind is list else np.array([0, 8, 4], kind)
    same_bits(
        kdcore.kd_loss(student, teacher, labels, 2.0, 0.3),
        kdcore.kd_loss(student, teacher, np.array([0, 8, 4]), 2.0, 0.3),
    )


# --- what holds of every answer ------------------------------------------------------------------------------------


@given(problems(tuple(FLOAT32)))
def test_gradient_rows_sum_to_zero(problem):
    for divergence in NAMES:
        options = {**problem.options, "divergence": divergence}
        result = kdcore.kd_loss_and_gradient(*problem.arguments, **options)
        masking = {k: v for k, v in options.items() if k in ("ignore_index", "weights", "reduction", "denominator")}
        scales = oracle.row_scales(len(problem.student), problem.labels, **masking)
        kind = {k: v for k, v in options.items() if k in ("divergence", "teacher_temperature", "scale_t2")}
        limit = bounds.kd_bounds(
            problem.student, problem.teacher, 0.0, temperature=problem.temperature, alpha=problem.alpha,
            scale=scales, **kind,
        ).gradient  # fmt: skip
        # Cauchy-Schwarz: a sum of V errors is no more than sqrt(V) times their 2-norm.
        sums = np.abs(result.gradient.astype(np.float64).sum(axis=-1))
        defined = ~np.isnan(np.where(scales > 0, limit, 0.0))
        assert (sums[defined] <= np.sqrt(problem.student.shape[1]) * limit[defined]).all()
        assert np.isnan(sums[~defined]).all()


@given(logit_pairs(), temperatures)
def test_divergences_are_not_negative(logits, T):
    student, teacher = logits
    for divergence in NAMES if (student.dtype, teacher.dtype) in FORMULA_DTYPE_PAIRS else ["forward_kl"]:
        value = np.asarray(kdcore.kl_divergence(student, teacher, T, divergence=divergence, reduction="none"))
        limit = bounds.loss_bound(student.dtype, 0.0, temperature=T, alpha=0.0, scale_t2=False)
        assert (value >= -limit).all()


@pytest.mark.parametrize("divergence", NAMES)
@pytest.mark.parametrize("dtype", [np.dtype(np.float32), np.dtype(np.float64), BFLOAT16], ids=str)
@pytest.mark.parametrize("T", [0.05, 1.0, 4.0, 100.0])
def test_zero_at_agreement(T, dtype, divergence):
    student = pair([dtype], 3, 1025, 10.0)[0]
    result = assert_kd(student, student.copy(), None, T, 0.0, divergence=divergence)
    limit = bounds.loss_bound(dtype, 0.0, temperature=T, alpha=0.0)
    assert abs(result.loss) <= limit
    assert np.abs(result.gradient.astype(np.float64)).max() <= T * 1e-6


@given(logit_pairs(tuple(FLOAT64), supports=("all", "shared"), scales=(0.1, 1.0, 10.0)), temperatures, alphas)
def test_adding_a_constant_to_a_row_changes_nothing(logits, T, alpha):
    student, teacher = (x - np.round(np.where(np.isfinite(x), x, -INF).max()) for x in logits)
    labels = student.argmax(axis=-1)
    before = kdcore.kd_loss_and_gradient(student, teacher, labels, T, alpha)
    shift = 2.0**10
    # Only the rounding of the addition itself may show: eps * 2^10 in a logit, over T in the loss and so T² / T in all.
    after = kdcore.kd_loss_and_gradient(student + shift, teacher - shift, labels, T, alpha)
    tolerance = 1e-12 * max(T, 1 / T) * max(1.0, float(np.abs(before.loss)))
    np.testing.assert_allclose(after.loss, before.loss, rtol=1e-11, atol=tolerance)
    np.testing.assert_allclose(after.gradient, before.gradient, rtol=1e-11, atol=tolerance)


@given(problems(), seeds)
def test_permuting_classes_permutes_the_gradient(problem, seed):
    student, teacher, labels, T, alpha = problem.arguments
    order = np.random.default_rng(seed).permutation(student.shape[1])
    options = {**problem.options, "ignore_index": -100}
    if labels is not None:
        labels = np.maximum(labels, 0)
    moved = None if labels is None else np.argsort(order)[labels]
    permuted = Problem(student[:, order], teacher[:, order], moved, T, alpha, options)
    actual = assert_kd(*permuted.arguments, **options)
    expected = kdcore.kd_loss_and_gradient(student, teacher, labels, T, alpha, **options)
    scale = float(np.nan_to_num(np.abs(expected.gradient.astype(np.float64))).max(initial=1e-30))
    rounding = {"float64": 1e-11, "float32": 1e-5, "float16": 1e-2, "bfloat16": 1e-1}[student.dtype.name]
    size = max(scale, float(np.max(options.get("weights", 1.0))) * T / min(1.0, options.get("denominator", 1.0)))
    np.testing.assert_allclose(
        actual.gradient.astype(np.float64),
        expected.gradient[:, order].astype(np.float64),
        atol=rounding * size * max(1.0, T**-2),
    )


@given(problems(), seeds)
def test_permuting_the_batch_permutes_rows_bit_for_bit(problem, seed):
    student, teacher, labels, T, alpha = problem.arguments
    order = np.random.default_rng(seed).permutation(len(student))
    options = {**problem.options, "reduction": "none"}
    options.pop("denominator", None)
    before = kdcore.kd_loss_and_gradient(student, teacher, labels, T, alpha, **options)
    if "weights" in options:
        options["weights"] = options["weights"][order]
    after = kdcore.kd_loss_and_gradient(
        student[order], teacher[order], None if labels is None else labels[order], T, alpha, **options
    )
    same_bits(after.loss, before.loss[order])
    same_bits(after.gradient, before.gradient[order])


@given(problems())
def test_alpha_end_points_have_one_term(problem):
    student, teacher, labels, T, _ = problem.arguments
    options = problem.options
    if labels is None:
        labels = np.zeros(len(student), np.int64)
    other = np.where(labels == options.get("ignore_index", -100), labels, student.shape[1] - 1)
    if options.get("ignore_index") != student.shape[1] - 1:
        first = kdcore.kd_loss_and_gradient(student, teacher, labels, T, 0.0, **options)
        second = kdcore.kd_loss_and_gradient(student, teacher, other, T, 0.0, **options)
        same_bits(first.gradient, second.gradient)
        same_bits(first.loss, second.loss)
    first = kdcore.kd_loss_and_gradient(student, teacher, labels, T, 1.0, **options)
    second = kdcore.kd_loss_and_gradient(student, np.zeros_like(teacher), labels, T, 1.0, **options)
    same_bits(first.gradient, second.gradient)
    same_bits(first.loss, second.loss)
    assert (first.kl, second.kl) == (None, None)


@given(logit_pairs(tuple(FLOAT64), supports=("all",), scales=(0.1, 1.0, 10.0)), seeds, temperatures)
def test_forward_kl_does_not_fall_along_a_ray_from_the_teacher(logits, seed, T):
    teacher = logits[1][:1]
    direction = np.random.default_rng(seed).normal(size=teacher.shape)
    losses = [kdcore.kl_divergence(teacher + step * direction, teacher, T) for step in np.linspace(0, 5, 11) * T]
    assert (np.diff(losses) >= -1e-12).all()


@given(
    logit_pairs(tuple(FLOAT64), supports=("all",), scales=(0.1, 1.0, 10.0)),
    st.floats(0.1, 3.99),
    temperatures,
    alphas,
)
def test_descent_below_a_rate_of_four_never_raises_the_loss(logits, rate, T, alpha):
    # The Hessian of the loss by the logits is at most 1/2 in norm, for every T and alpha.
    student, teacher = (x[:1] for x in logits)
    labels = teacher.argmax(axis=-1)
    before = INF
    for _ in range(5):
        result = kdcore.kd_loss_and_gradient(student, teacher, labels, T, alpha)
        assert result.loss <= before + 1e-12 * abs(before if np.isfinite(before) else 0) + 1e-12 * T**2
        before = result.loss
        student = student - rate * result.gradient


def test_large_temperatures_match_centred_logits():
    # Hinton et al. 2015, section 2: T (q - p) -> ((s - mean s) - (t - mean t)) / V as T grows.
    student, teacher = pair(FLOAT64[0], 3, 50)
    limit = ((student - student.mean(-1, keepdims=True)) - (teacher - teacher.mean(-1, keepdims=True))) / 50
    errors = []
    for T in (1e2, 1e3, 1e4):
        gradient = kdcore.kd_logit_gradient(student, teacher, None, T, 0.0, reduction="sum")
        errors.append(np.abs(gradient - limit).max())
    assert errors[0] < 1e-2 and errors[1] < errors[0] / 5 and errors[2] < errors[1] / 5
    for divergence in ("forward_kl", "reverse_kl"):
        loss = kdcore.kd_loss(student, teacher, None, 1e4, 0.0, divergence=divergence, reduction="sum")
        np.testing.assert_allclose(loss, 25 * np.square(limit).sum(), rtol=1e-2)


# --- rows that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("divergence", "dtype"),
    [(name, pair[0]) for name in NAMES for pair in FORMULA_DTYPE_PAIRS] + [("forward_kl", np.dtype(np.float16))],
    ids=str,
)
def test_without_validation_bad_rows_are_nan_and_the_others_untouched(divergence, dtype):
    student, teacher = pair((dtype, dtype), 6, 33)
    labels = np.array([0, 1, 2, 3, 4, 32])
    options = {"divergence": divergence, "reduction": "none"}
    good = kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3, **options)
    student[0, 5], teacher[2, 32], labels[4] = np.nan, INF, 33
    bad = [0, 2, 4]
    fine = [1, 3, 5]
    result = kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3, validate=False, **options)
    for name in ("loss", "ce", "kl", "gradient"):
        values = getattr(result, name)
        assert np.isnan(values[bad].astype(np.float64)).all()
        same_bits(values[fine], getattr(good, name)[fine])
    assert np.isnan(kdcore.kd_loss(student, teacher, labels, 2.0, 0.3, validate=False, divergence=divergence))


@pytest.mark.parametrize("value", [np.nan, INF, -INF])
def test_without_validation_bad_rows_of_a_softmax_are_nan(value):
    x = pair([np.dtype(np.float32)], 3, 17)[0]
    good = [operation(x) for operation in (kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp)]
    x[1] = value
    for operation, expected in zip((kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp), good, strict=True):
        result = operation(x, validate=False)
        assert np.isnan(result[1]).all()
        same_bits(result[[0, 2]], expected[[0, 2]])


def test_a_loss_alone_computes_no_gradient(monkeypatch):
    rows = []
    original = kdcore_cpu.kd_rows

    def spy(student, teacher, labels, weights, denominator, objective, gradient, *others):
        rows.append(gradient.shape[0])
        return original(student, teacher, labels, weights, denominator, objective, gradient, *others)

    monkeypatch.setattr(kdcore_cpu, "kd_rows", spy)
    s, t = np.zeros((2, 3, 5))
    kdcore.kd_loss(s, t, [0, 1, 2], 2.0, 0.5)
    kdcore.kd_loss_and_gradient(s, t, [0, 1, 2], 2.0, 0.5)
    assert rows == [0, 3]
