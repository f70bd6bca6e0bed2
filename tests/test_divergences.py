"""The divergences beside forward KL: against the oracle, their parameters, and what is known of them."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import numpy as np
import oracle
import pytest
from comparisons import assert_kd, same_bits
from hypothesis import given, strategies as st
from strategies import (
    BFLOAT16,
    FORMULA_DTYPE_PAIRS,
    logit_pairs,
    narrowed,
    problems,
    shares,
    temperatures,
)

import kdcore
from kdcore import divergences, formulas
from kdcore.divergences import (
    NAMES,
    Divergence,
    alpha,
    forward_kl,
    jsd,
    reverse_kl,
    skew_forward_kl,
    skew_reverse_kl,
    tvd,
    where,
)
from kdcore.testing import bounds

INF, NAN = np.inf, np.nan
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
#: What a name stands for, and two others of each that has a parameter.
SAMPLES = {
    "forward_kl": ["forward_kl"],
    "reverse_kl": ["reverse_kl"],
    "jsd": ["jsd", jsd(0.1), jsd(0.9)],
    "skew_forward_kl": ["skew_forward_kl", skew_forward_kl(0.01), skew_forward_kl(0.7)],
    "skew_reverse_kl": ["skew_reverse_kl", skew_reverse_kl(0.01), skew_reverse_kl(0.7)],
    "tvd": ["tvd"],
    "alpha": ["alpha", alpha(0.1), alpha(0.9)],
}
WITH_PARAMETER = {"jsd": "beta", "skew_forward_kl": "lam", "skew_reverse_kl": "lam", "alpha": "a"}
#: Those that are finite for all logits, whose tests are here; the others are the cases of tests/test_ops.py too.
FINITE = ["jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha"]


def name_of(value):
    return "-".join(dtype.name for dtype in value) if isinstance(value, tuple) else None


def made(name, parameter):
    """The divergence of this name, with the parameter if it has one."""
    return getattr(divergences, name)(*([parameter] if name in WITH_PARAMETER else []))


def pair(dtypes, B, V, scale=3.0, seed=0):
    rng = np.random.default_rng(seed)
    return [narrowed(rng.normal(size=(B, V)) * scale, dtype) for dtype in dtypes]


def rows(divergence, student, teacher, T=1.0):
    return np.asarray(kdcore.kl_divergence(student, teacher, T, divergence=divergence, reduction="none"))


def largest(name, c):
    """What a finite divergence is where no class has both p and q."""
    if name == "tvd":
        return 1.0
    if name == "alpha":
        return 1 / (c * (1 - c))
    return -math.log(c) if name != "jsd" else -c * math.log(c) - (1 - c) * math.log1p(-c)


def slack(student, value=0.0):
    """The error that a divergence without T² may have."""
    return bounds.loss_bound(student.dtype, value, temperature=1.0, alpha=0.0)


# --- against the oracle --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", FORMULA_DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("name", FINITE)
@given(st.data())
def test_any_problem_matches_the_oracle(name, dtypes, data):
    problem = data.draw(problems((dtypes,)))
    assert_kd(*problem.arguments, divergence=made(name, data.draw(shares)), **problem.options)


@pytest.mark.parametrize("dtypes", FORMULA_DTYPE_PAIRS, ids=name_of)
@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("V", [1, 2, 17, 1025, 4099])
def test_fixed_sizes_match_the_oracle(V, name, dtypes):
    for k, T in enumerate([0.5, 1.0, 2.0, 3.0, 4.0, 20.0]):
        student, teacher = pair(dtypes, 2, V, [0.1, 1.0, 10.0, 30.0][k % 4], seed=k)
        for divergence in SAMPLES[name]:
            options = {"divergence": divergence, "reduction": "none", "scale_t2": k % 2 == 0}
            assert_kd(student, teacher, [0, V - 1], T, [0.0, 0.3][k % 2], **options)
            assert_kd(student, teacher, None, T, 0.0, teacher_temperature=1.7, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("V", "scale", "T"), [(32000, 1.0, 0.5), (32000, 30.0, 2.0), (151936, 10.0, 4.0)])
def test_long_rows_match_the_oracle(V, scale, T, name):
    student, teacher = pair((F32, F32), 1, V, scale)
    for divergence in SAMPLES[name]:
        assert_kd(student, teacher, [7], T, 0.1, divergence=divergence)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [F32, F64, BFLOAT16], ids=str)
def test_probabilities_that_underflow(dtype, name):
    # Logits whose exponentials are normal numbers and whose probabilities are not, for either, both and none.
    V = 2049
    depths = np.array([0.0, 80.0, 86.0, 87.0, 88.0, 92.0, 103.0, 700.0, 735.0, 745.0, 800.0])
    student, teacher = np.zeros((2, 1, V))
    student[0, : depths.size**2] = -np.repeat(depths, depths.size)
    teacher[0, : depths.size**2] = -np.tile(depths, depths.size)
    for divergence in SAMPLES[name]:
        for one, other in ((student, teacher), (student, np.zeros_like(student)), (student, student.copy())):
            assert_kd(one.astype(dtype), other.astype(dtype), [3], 1.0, 0.1, divergence=divergence)


@pytest.mark.parametrize("name", list(WITH_PARAMETER))
@pytest.mark.parametrize("parameter", [1e-4, 0.001, 0.02, 0.98, 0.999, 1 - 1e-4])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_parameters_near_their_ends(dtype, parameter, name):
    # Near agreement what is divided by a (1 - a) cancels; log-ratios of thousands show the rounding of 1 - a.
    rng = np.random.default_rng(2)
    student = (rng.normal(size=(3, 257)) * [[1.0], [30.0], [3000.0]]).astype(dtype)
    for teacher in (
        student + dtype.type(0.01) * student[::-1] / 30,
        student[:, ::-1].copy(),
        student * dtype.type(0.5),
    ):
        for T in (1.0, 2.5):
            options = {"divergence": made(name, parameter), "reduction": "none"}
            assert_kd(student, teacher, None, T, 0.0, **options)
            assert_kd(student, teacher, None, T, 0.0, teacher_temperature=1.7, **options)


def test_names_have_the_default_parameters():
    student, teacher = pair((F32, F32), 3, 17)
    for name in NAMES:
        assert kdcore.kl_divergence(student, teacher, divergence=name) == kdcore.kl_divergence(
            student, teacher, divergence=getattr(divergences, name)()
        )
    assert (jsd().parameter, skew_forward_kl().parameter, skew_reverse_kl().parameter) == (0.5, 0.1, 0.1)
    assert alpha().parameter == 0.5
    assert set(NAMES) == set(oracle.DIVERGENCES) == set(SAMPLES)


def test_each_parameter_counts():
    # Kernels are shared among parameters, which are arguments: the second call must not see the first one's.
    student, teacher = pair((F32, F32), 3, 17)
    for name, keyword in WITH_PARAMETER.items():
        make = getattr(divergences, name)
        values = [kdcore.kl_divergence(student, teacher, divergence=make(**{keyword: c})) for c in (0.2, 0.6, 0.2)]
        assert values[0] == values[2] != values[1]


# --- the gradient is the derivative of the returned loss -----------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_derivatives_of_the_returned_loss(name):
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 3, 5)) * 2
    student[:, 1] = teacher[:, 1] = -INF
    keep = [0, 2, 3, 4]
    for divergence in SAMPLES[name]:
        for T, options in ((2.0, {}), (0.7, {"teacher_temperature": 1.3, "weights": [0.5, 1.0, 2.0]})):
            options = {"divergence": divergence, "reduction": "sum", **options}
            log_p = oracle.log_softmax(teacher, options.get("teacher_temperature", T))
            apart = np.abs(log_p[:, keep] - oracle.log_softmax(student, T)[:, keep]).min()
            assert apart > 1e-2  # no kink of total variation within reach of the differences
            result = kdcore.kd_loss_and_gradient(student, teacher, [0, 2, 3], T, 0.2, **options)
            step, slope = 1e-3, np.zeros_like(student)
            for i, v in np.ndindex(*student.shape):
                values = []
                for k in (-2, -1, 1, 2):
                    moved = student.copy()
                    moved[i, v] += k * step
                    values.append(kdcore.kd_loss(moved, teacher, [0, 2, 3], T, 0.2, **options))
                slope[i, v] = (8 * (values[2] - values[1]) - (values[3] - values[0])) / (12 * step)
            np.testing.assert_allclose(result.gradient, slope, rtol=0, atol=2e-10)
            assert np.abs(slope).max() > 1e-2


# --- inequalities --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@given(st.data(), temperatures, shares)
def test_inequalities(dtype, data, T, c):
    student, teacher = data.draw(logit_pairs(((dtype, dtype),)))
    values = {name: rows(made(name, c), student, teacher, T) for name in NAMES}
    half = rows("jsd", student, teacher, T)
    for name, value in values.items():
        assert (value >= -slack(student)).all(), name
        assert np.isfinite(value).all() or name not in FINITE
    assert (half <= math.log(2) + slack(student, math.log(2))).all()
    for name in FINITE:
        most = largest(name, c)
        assert (values[name] <= most + slack(student, most)).all(), name
    for name in ("forward_kl", "reverse_kl"):
        finite = np.where(np.isinf(values[name]), 0, values[name])
        # Pinsker: TVD² <= KL / 2; and mixing lessens: KL(p || m) <= (1 - lam) KL(p || q) by convexity
        least = 2 * np.maximum(values["tvd"] - slack(student, 1.0), 0) ** 2
        assert (values[name] >= least - slack(student, finite)).all()
        skewed = values[f"skew_{name}"]
        assert (skewed <= (1 - c) * values[name] + slack(student, finite) + slack(student, skewed)).all()


@given(logit_pairs(((F64, F64),)), temperatures, shares)
def test_exchanging_student_and_teacher(logits, T, c):
    student, teacher = logits
    for one, other in [
        (tvd(), tvd()),
        (jsd(), jsd()),
        (alpha(), alpha()),
        (jsd(c), jsd(1 - c)),
        (alpha(c), alpha(1 - c)),
        (skew_forward_kl(c), skew_reverse_kl(c)),
        (forward_kl(), reverse_kl()),
    ]:
        first, second = rows(one, student, teacher, T), rows(other, teacher, student, T)
        assert bounds.within(first, second, 2 * slack(student, second)).all(), one


@pytest.mark.parametrize("dtype", [F32, F64, BFLOAT16], ids=str)
def test_all_are_zero_up_to_a_constant(dtype):
    rng = np.random.default_rng(0)
    student = (rng.integers(-16, 17, size=(40, 33)) / 8).astype(dtype)  # such that the sum is exact
    teacher = (student.astype(np.float64) + rng.integers(-4, 5, size=(40, 1))).astype(dtype)
    for name in NAMES:
        for divergence in SAMPLES[name]:
            result = assert_kd(student, teacher, None, 2.5, 0.0, divergence=divergence)
            assert abs(result.loss) <= bounds.loss_bound(dtype, 0.0, temperature=2.5, alpha=0.0)
            assert np.abs(result.gradient.astype(np.float64)).max() <= 2.5e-6
            if name == "tvd":  # ties are exact, and there the subgradient is 0
                assert result.loss == 0 and (result.gradient.astype(np.float64) == 0).all()


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_total_variation_at_a_tie_of_one_class(dtype):
    # At this temperature exponentials are powers of 2, so that p = (8, 1, 4) / 13 and q = (8, 4, 1) / 13 tie exactly.
    student, teacher, T = np.array([[0, -1, -3]], dtype), np.array([[0, -3, -1]], dtype), math.log2(math.e)
    result = kdcore.kd_loss_and_gradient(student, teacher, None, T, 0.0, divergence="tvd")
    tolerance = {"rtol": 1e-6 if dtype == F32 else 1e-13}
    np.testing.assert_allclose(result.loss, T * T * 3 / 13, **tolerance)
    q, slope = np.array([8, 4, 1]) / 13, np.array([0, 0.5, -0.5])  # the sum of q phi' is 3/26
    np.testing.assert_allclose(result.gradient, [T * q * (slope - 3 / 26)], **tolerance)
    limit = bounds.kd_bounds(student, teacher, result.loss, temperature=T, alpha=0.0, divergence="tvd").gradient
    assert T * 8 / 13 < limit[0] < 2 * T  # which allows that rounding breaks the tie


def test_bounds_know_what_is_subtracted():
    # One T, one row, alpha 0 and p = q in no class: the bound is G T S, with q phi' from the papers' own words.
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.7, 0.1])
    c, T = 0.3, 2.0
    m, n = c * p + (1 - c) * q, c * q + (1 - c) * p
    slopes = {
        "reverse_kl": np.log(q / p),
        "jsd": (1 - c) * np.log(q / m),
        "skew_forward_kl": (1 - c) * (1 - p / m),
        "skew_reverse_kl": np.log(q / n) + c * (1 - q / n),
        "tvd": np.sign(q - p) / 2,
        "alpha": (1 - (p / q) ** c) / c,
    }
    norm = np.linalg.norm
    for name in NAMES:
        S = norm(p) + norm(q)
        if name != "forward_kl":
            S += norm(q * slopes[name]) + norm(q) * abs((q * slopes[name]).sum())
        limit = bounds.kd_bounds(T * np.log(q), T * np.log(p), 1.0, temperature=T, alpha=0.0, divergence=made(name, c))
        np.testing.assert_allclose(limit.gradient, 1e-13 * T * S, rtol=1e-12)
        same = bounds.kd_bounds(q, p, 1.0, temperature=T, alpha=0.2, divergence=name, scale=3.0)
        default = bounds.kd_bounds(
            q, p, 1.0, temperature=T, alpha=0.2, divergence=getattr(divergences, name)(), scale=3.0
        )
        assert same == default
    with pytest.raises(ValueError, match="'forward_kl', 'reverse_kl', 'jsd'"):
        bounds.kd_bounds(q, p, 1.0, temperature=T, alpha=0.0, divergence="kl")


# --- limits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_limits_of_the_parameters(dtype):
    student, teacher = pair((dtype, dtype), 4, 33, scale=1.5)
    arguments, none = (student, teacher, None, 2.0, 0.0), {"reduction": "none"}
    forward, reverse = (kdcore.kd_loss_and_gradient(*arguments, divergence=kl, **none) for kl in NAMES[:2])
    for make, limit, factor in [
        (lambda e: alpha(1 - e), forward, lambda e: 1.0),
        (alpha, reverse, lambda e: 1.0),
        (skew_forward_kl, forward, lambda e: 1.0),
        (skew_reverse_kl, reverse, lambda e: 1.0),
        (jsd, forward, lambda e: 1 / e),
        (lambda e: jsd(1 - e), reverse, lambda e: 1 / e),
    ]:
        errors = []
        for e in (1e-1, 1e-2, 1e-3) if dtype == F32 else (1e-2, 1e-4, 1e-6):
            result = kdcore.kd_loss_and_gradient(*arguments, divergence=make(e), **none)
            errors.append(np.abs(factor(e) * result.loss - limit.loss).max())
            if dtype == F64:
                assert np.abs(factor(e) * result.gradient - limit.gradient).max() < 300 * e
        assert errors[0] > 2 * errors[1] > 4 * errors[2]
        assert errors[2] < (0.1 if dtype == F32 else 1e-4)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_skew_divergences_with_the_smallest_share(dtype):
    """Where p and q have no class in common they are -log lam, whatever p and q are."""
    student, teacher = np.array([[0.0, 300.0], [-INF, 0.0]], dtype), np.array([[300.0, 0.0], [0.0, -INF]], dtype)
    for make in (skew_forward_kl, skew_reverse_kl):
        loss = kdcore.kl_divergence(student, teacher, divergence=make(1e-20), reduction="none")
        np.testing.assert_allclose(loss, -np.log(1e-20), rtol=1e-6)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
@pytest.mark.parametrize("tiny", [1e-30, 1e-38, 1e-310, 5e-324])
def test_alpha_with_a_parameter_that_is_nothing(dtype, tiny):
    student, teacher = pair((dtype, dtype), 4, 33, scale=1.5)
    arguments, options = (student, teacher, None, 2.0, 0.0), {"temperature": 2.0, "alpha": 0.0}
    limit = oracle.kd(*arguments, divergence="reverse_kl", reduction="none")
    result = kdcore.kd_loss_and_gradient(*arguments, divergence=alpha(tiny), reduction="none")
    allowed = bounds.kd_bounds(student, teacher, limit.loss, divergence="reverse_kl", **options)
    assert bounds.within(result.loss, limit.loss, allowed.loss).all()
    assert (bounds.gradient_error(result.gradient, limit.gradient, dtype) <= allowed.gradient).all()
    agreement = kdcore.kd_loss_and_gradient(student, student, None, 2.0, 0.0, divergence=alpha(tiny))
    assert agreement.loss == 0 and not agreement.gradient.any()


# --- -inf ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [F32, F64, BFLOAT16], ids=str)
def test_classes_that_both_rule_out_add_nothing(dtype, name):
    student, teacher = pair((dtype, dtype), 3, 17)
    keep = np.arange(17) % 3 != 1
    wide = [x.copy() for x in (student, teacher)]
    for x in wide:
        x[:, ~keep] = -INF
    narrow = [np.ascontiguousarray(x[:, keep]) for x in (student, teacher)]
    for divergence in SAMPLES[name]:
        whole = assert_kd(*wide, None, 2.0, 0.0, divergence=divergence, reduction="none")
        part = kdcore.kd_loss_and_gradient(*narrow, None, 2.0, 0.0, divergence=divergence, reduction="none")
        np.testing.assert_allclose(whole.loss, part.loss, rtol=1e-6)
        same_bits(whole.gradient[:, ~keep], np.zeros((3, (~keep).sum()), dtype))


@pytest.mark.parametrize("name", FINITE)
@pytest.mark.parametrize("dtype", [F32, F64, BFLOAT16], ids=str)
def test_classes_that_one_rules_out_leave_all_finite(dtype, name):
    student, teacher = pair((dtype, dtype), 4, 17)
    student[0, 3] = teacher[1, 5] = student[2, 3] = teacher[2, 5] = -INF
    student[3, :9], teacher[3, 9:] = -INF, -INF
    for divergence in SAMPLES[name]:
        result = assert_kd(student, teacher, None, 2.0, 0.0, divergence=divergence, reduction="none", validate=True)
        assert np.isfinite(result.loss).all() and np.isfinite(result.gradient.astype(np.float64)).all()
        assert (result.gradient.astype(np.float64)[[0, 2], 3] == 0).all()  # no logit to move
        most = largest(name, divergences.as_divergence(divergence).parameter)
        np.testing.assert_allclose(result.loss[3], 4 * most, rtol=1e-6)  # without a class in common


@pytest.mark.parametrize("name", NAMES)
def test_only_reverse_kl_may_have_no_gradient(name):
    student, teacher = pair((F32, F32), 3, 9)
    teacher[1, 3] = student[2, 4] = -INF
    arguments = (student, teacher, None, 2.0, 0.0)
    for divergence in SAMPLES[name]:
        options = {"divergence": divergence, "validate": True}
        if name == "reverse_kl":
            with pytest.raises(kdcore.UndefinedGradientError, match=r"student_logits\[1\]"):
                kdcore.kd_logit_gradient(*arguments, **options)
            assert kdcore.kd_loss(*arguments, **options) == INF
        else:
            assert np.isfinite(kdcore.kd_logit_gradient(*arguments, **options)).all()
            loss = kdcore.kd_loss(*arguments, **options)
            assert loss == INF if name == "forward_kl" else np.isfinite(loss)


# --- one of a caller's own -----------------------------------------------------------------------------------------


def test_forward_kl_from_two_formulas_agrees_with_the_fused_kernel():
    mine = Divergence("mine", formulas.forward_kl_term, formulas.forward_kl_slope)
    for V, scale, T in [(2, 1.0, 1.0), (17, 30.0, 0.5), (1025, 3.0, 3.0), (4099, 10.0, 20.0)]:
        student, teacher = pair((F32, F32), 3, V, scale)
        labels, options = [0, 1, 1], {"reduction": "none"}
        own = kdcore.kd_loss_and_gradient(student, teacher, labels, T, 0.2, divergence=mine, **options)
        fused = kdcore.kd_loss_and_gradient(student, teacher, labels, T, 0.2, **options)
        p, q, h = (oracle.softmax(x, x_T).astype(np.float64) for x, x_T in ((teacher, T), (student, T), (student, 1.0)))
        kinds = {"temperature": T, "alpha": 0.2}
        assert bounds.within(own.loss, fused.loss, 2 * bounds.loss_bound(F32, fused.loss, **kinds)).all()
        limit = bounds.gradient_bound(F32, p, q, h, q_slope=q - p, **kinds)
        limit = limit + bounds.gradient_bound(F32, p, q, h, **kinds)
        assert (np.linalg.norm(own.gradient.astype(np.float64) - fused.gradient, axis=-1) <= limit).all()
    # A kernel on disk is found by the name, which must then say what the formulas are.
    for name in ("mine", "jsd", "forward_kl"):
        assert not Divergence(name, formulas.reverse_kl_term, formulas.reverse_kl_slope).builtin
    assert all(divergences.as_divergence(divergence).builtin for name in NAMES for divergence in SAMPLES[name])
    with pytest.raises(ValueError, match="gradient_bound"):
        bounds.kd_bounds(student, teacher, 0.0, temperature=1.0, alpha=0.0, divergence=mine)


def test_a_divergence_of_the_callers_own():
    # c (q - p)² / q: phi' = c (1 - p² / q²).
    def term(p, q, r, c):
        return c * ((q - p) * (q - p) / where(q > 0.0, q, 1.0))

    def slope(p, q, r, c):
        return c * (q - p * p / where(q > 0.0, q, 1.0))

    mine = Divergence("neyman", term, slope, 3)
    student, teacher = pair((F64, F64), 3, 17)
    p, q = oracle.softmax(teacher, 2.0), oracle.softmax(student, 2.0)
    q_slope = 3 * (q - p * p / q)
    exact = 3 * ((q - p) ** 2 / q).sum(-1)
    result = kdcore.kd_loss_and_gradient(student, teacher, None, 2.0, 0.0, divergence=mine, reduction="none")
    kinds = {"temperature": 2.0, "alpha": 0.0}
    assert bounds.within(result.loss, 4 * exact, bounds.loss_bound(F64, 4 * exact, **kinds)).all()
    error = (result.gradient - 2 * (q_slope - q * q_slope.sum(-1, keepdims=True))).astype(np.float64)
    assert (np.linalg.norm(error, axis=-1) <= bounds.gradient_bound(F64, p, q, None, q_slope=q_slope, **kinds)).all()
    assert repr(mine) == "Divergence('neyman', parameter=3.0)"


# --- bad arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "keyword"), WITH_PARAMETER.items())
def test_parameters_lie_inside_the_unit_interval(name, keyword):
    make = getattr(divergences, name)
    interval = r"\[1e-20, 1\)" if keyword == "lam" else r"\(0, 1\)"
    for value in (0, 1, 0.0, 1.0, -0.1, 1.5, NAN, INF, -INF, *((9e-21, 1e-38) if keyword == "lam" else ())):
        with pytest.raises(kdcore.DomainError, match=rf"{keyword} must be in {interval}, got {value}") as caught:
            make(value)
        assert isinstance(caught.value, ValueError)
    for value in ("x", "0.5", None, True, [0.5], 0.5j, np.array([0.5])):
        with pytest.raises(kdcore.DTypeError, match=rf"{keyword} must be a number in {interval}") as caught:
            make(value)
        assert isinstance(caught.value, TypeError)
    for value in (np.float32(0.25), np.float64(0.25), np.float16(0.25), Fraction(1, 4)):
        assert make(value) == make(**{keyword: 0.25})
        assert type(make(value).parameter) is float


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "tvd"])
def test_the_others_have_no_parameter(name):
    with pytest.raises(TypeError):
        getattr(divergences, name)(0.5)


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        (jsd, "DTypeError", r"divergence must be a name or a Divergence, got a function: call it, jsd\(\)"),
        (functools.partial(jsd, 0.5), "DTypeError", "divergence must be a name or a Divergence, got a function"),
        ("js", "DomainError", "divergence must be one of 'forward_kl', 'reverse_kl', 'jsd', .*, got 'js'"),
        ("jsd(0.3)", "DomainError", r"got 'jsd\(0.3\)'"),
        (("jsd", 0.3), "DomainError", "divergence must be one of"),
        (None, "DomainError", "got None"),
        (0.5, "DomainError", "got 0.5"),
    ],
)
def test_what_is_no_divergence(value, error, sentence):
    x = np.zeros((2, 3))
    for call in (
        lambda: kdcore.kl_divergence(x, x, divergence=value),
        lambda: kdcore.kd_loss(x, x, None, 1.0, 0.0, divergence=value),
        lambda: kdcore.kd_logit_gradient(x, x, [0, 1], 1.0, 1.0, divergence=value),  # also where it is not needed
    ):
        with pytest.raises(getattr(kdcore, error), match=sentence):
            call()


def test_what_makes_no_divergence():
    term, slope = formulas.tvd_term, formulas.tvd_slope
    for arguments, error, sentence in [
        ((3, term, slope), "DTypeError", "name must be a string, got 3"),
        (("mine", None, None), "DTypeError", "term must be a Python function"),
        (("mine", term, None), "DTypeError", "slope must be a Python function"),
        (("forward_kl", term, None), "DTypeError", "slope must be a Python function"),
        (("mine", functools.partial(term, c=1), slope), "DTypeError", "term must be a Python function"),
        (("mine", term, slope, "x"), "DTypeError", "parameter must be a finite number, got 'x'"),
        (("mine", term, slope, True), "DTypeError", "parameter must be a finite number, got True"),
        (("mine", term, slope, NAN), "DomainError", "parameter must be a finite number, got nan"),
    ]:
        with pytest.raises(getattr(kdcore, error), match=sentence):
            Divergence(*arguments)


# --- a peer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_agreement_with_torch(dtype):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    T = 2.0
    student, teacher = pair((dtype, dtype), 4, 1025)

    def kl(log_a, log_b):  # KL(a || b) of rows
        return functional.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    def mixture(log_a, log_b, share):
        return torch.logaddexp(log_a + math.log(share), log_b + math.log1p(-share))

    def of_jsd(log_p, log_q, beta):
        log_m = mixture(log_p, log_q, beta)
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    for divergence, peer in [
        ("forward_kl", kl),
        ("reverse_kl", lambda log_p, log_q: kl(log_q, log_p)),
        ("jsd", lambda log_p, log_q: of_jsd(log_p, log_q, 0.5)),
        (jsd(0.2), lambda log_p, log_q: of_jsd(log_p, log_q, 0.2)),
        (skew_forward_kl(0.3), lambda log_p, log_q: kl(log_p, mixture(log_p, log_q, 0.3))),
        (skew_reverse_kl(0.3), lambda log_p, log_q: kl(log_q, mixture(log_q, log_p, 0.3))),
        ("tvd", lambda log_p, log_q: (log_p.exp() - log_q.exp()).abs().sum(-1) / 2),
        (alpha(0.3), lambda log_p, log_q: (1 - (0.3 * log_p + 0.7 * log_q).exp().sum(-1)) / 0.21),
    ]:
        s = torch.from_numpy(student.copy()).requires_grad_()
        log_p, log_q = (functional.log_softmax(x / T, dim=-1) for x in (torch.from_numpy(teacher), s))
        loss = T * T * peer(log_p, log_q)
        loss.sum().backward()
        result = kdcore.kd_loss_and_gradient(student, teacher, None, T, 0.0, divergence=divergence, reduction="none")
        tolerance = 2e-5 if dtype == F32 else 1e-12
        np.testing.assert_allclose(result.loss, loss.detach().numpy(), rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(result.gradient, s.grad.numpy(), rtol=0, atol=tolerance)
        assert np.abs(result.gradient).max() > 100 * tolerance
