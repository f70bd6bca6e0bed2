"""Every formula as plain Python, against its definition in extended precision, and at the ends of what it is for.

What the engines make of the formulas is tested through the operations; here a formula itself is at fault.
"""

import math
from fractions import Fraction
from itertools import permutations, product

import numpy as np
import pytest

from kdcore import formulas

L = np.longdouble
INF, NAN = math.inf, math.nan
#: Relative to the result, or to the terms that it is the sum of.
TOLERANCE = 16 * np.finfo(np.float64).eps
LEAST = 2.0**-124


def close(value, exact, size=None):
    """Whether a value is the exact one within rounding, relative to ``size``: the sum of the terms' absolute values."""
    if math.isinf(exact):
        return value == exact
    return abs(L(value) - exact) <= TOLERANCE * (abs(exact) if size is None else size) + np.finfo(np.float64).tiny


# --- copies of formulas ----------------------------------------------------------------------------------------------

HALF, COUNT = 0.5, 3


def test_a_copy_with_constants_of_another_type():
    eighth = 0.125

    def formula(x, y=0.75):
        return x, 0.25, HALF, eighth, COUNT, 2, None, y

    assert formulas.converted(formula, np.float32)(0.1) == formula(0.1)
    types = [type(value) for value in formulas.converted(formula, np.float32)(0.1)]
    assert types == [float, *[np.float32] * 3, int, int, type(None), float]
    assert [type(value) for value in formula(0.1)][1:4] == [float] * 3


# --- what engines replace --------------------------------------------------------------------------------------------


def test_where_fma_log_exp():
    assert formulas.where(True, 1.0, 2.0) == 1.0 and formulas.where(False, 1.0, 2.0) == 2.0
    assert formulas.fma(3.0, 5.0, 7.0) == 22.0
    assert formulas.log(math.e) == 1.0 and formulas.log(0.0) == -INF and formulas.log(0.5) == math.log(0.5)
    assert formulas.exp(-1.0) == math.exp(-1.0)


@pytest.mark.parametrize("x", [0.0, 1e-300, -1e-300, 1e-8, -0.1, 0.25, -0.5, 0.5])
def test_exprel(x):
    assert close(formulas.exprel(x), np.expm1(L(x)) / L(x) if x else L(1))


@pytest.mark.parametrize("x", [0.75, -0.75, 1e300, NAN])
def test_exprel_elsewhere_does_not_fail(x):
    assert formulas.exprel(x) == 1.0


def test_bound_replaces_what_a_formula_calls_and_leaves_it_alone():
    assert formulas.bound(formulas.exponent, {"fma": lambda x, y, z: (x, y, z)})(2.0, 3.0, 5.0) == (2.0, 3.0, -5.0)
    assert formulas.exponent(2.0, 3.0, 5.0) == 1.0
    assert formulas.bound(formulas.rate, {}).__name__ == "rate"


# --- rows ------------------------------------------------------------------------------------------------------------

LOGITS = [0.0, 1.5, -3.25, 1e4, -1e4, 1e300, -1e308]


@pytest.mark.parametrize(("x", "m"), list(product(LOGITS, LOGITS)))
def test_a_scaled_logit_is_the_difference_times_headroom(x, m):
    exact = (Fraction(x) - Fraction(m)) / 2**24
    size = float((abs(Fraction(x)) + abs(Fraction(m))) / 2**24)
    assert abs(formulas.scaled_logit(x, m, formulas.HEADROOM) - float(exact)) <= 4e-16 * size
    assert formulas.scaled_logit(-INF, m, formulas.HEADROOM) == -INF


def test_headroom_is_a_power_of_two_beyond_which_no_finite_difference_overflows():
    largest = np.finfo(np.float32).max
    assert math.frexp(formulas.HEADROOM) == (0.5, -23)
    assert np.isfinite(formulas.scaled_logit(-largest, largest, np.float32(formulas.HEADROOM)))


@pytest.mark.parametrize("temperature", [0.01, 1.0, 2.0, 3.7, 1e6])
@pytest.mark.parametrize("d", [0.0, -0.5, -20.0])
def test_a_rate_turns_a_difference_into_an_exponent_of_two(d, temperature):
    d *= temperature
    assert math.isclose(2.0 ** (d * formulas.rate(temperature)), math.exp(d / temperature), rel_tol=1e-14)
    m = 3.0
    c = formulas.rate(temperature)
    assert math.isclose(2.0 ** formulas.exponent(m + d, c, m * c), math.exp(d / temperature), rel_tol=1e-12)


@pytest.mark.parametrize("d", [0.0, -0.5, -700.0, -1e4, -INF])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_terms_of_softmax(d, temperature):
    z = 1.75
    assert close(formulas.log_softmax(d, 1 / temperature, math.log(z)), L(d) / temperature - L(math.log(z)))
    assert close(formulas.cross_entropy(d * formulas.HEADROOM, z), -(L(d) - np.log(L(z))))
    assert close(formulas.shift_factor(d * formulas.HEADROOM, temperature), L(math.exp(d / temperature)))
    exact = L(d) / temperature - L(z)
    assert close(formulas.log_odds(d * formulas.HEADROOM, temperature, z), exact)


def test_a_moment_adds_what_the_teacher_has():
    assert formulas.forward_kl_moment(0.25, 0.5, -2.0, -3.0, 1.5) == 0.25 + 0.5 * (-2.0 + 1.5 * 3.0)
    assert formulas.forward_kl_moment(0.25, 0.0, -INF, -3.0, 1.5) == 0.25
    assert formulas.forward_kl_moment(0.25, 0.0, -INF, -INF, 1.5) == 0.25
    assert formulas.forward_kl_moment(0.25, 0.5, -2.0, -INF, 1.5) == INF
    assert math.isnan(formulas.forward_kl_moment(0.25, 0.0, -2.0, -INF, 1.5))


def kl_of(s, t, temperature, teacher_temperature):
    """KL of two rows of finite logits by its definition, in extended precision."""
    log_q, log_p = L(s) / temperature, L(t) / teacher_temperature
    log_q, log_p = log_q - np.log(np.exp(log_q).sum()), log_p - np.log(np.exp(log_p).sum())
    return (np.exp(log_p) * (log_p - log_q)).sum()


def sums_of(s, t, temperature, teacher_temperature, m_s, m_t):
    """(w, z_t, z_s) of rows relative to any maxima, by the moment's formula; w scaled by HEADROOM."""
    w, ratio = 0.0, teacher_temperature / temperature
    for x, y in zip(s, t, strict=True):
        d_s = formulas.scaled_logit(x, m_s, formulas.HEADROOM)
        d_t = formulas.scaled_logit(y, m_t, formulas.HEADROOM)
        w = formulas.forward_kl_moment(w, math.exp((y - m_t) / teacher_temperature), d_t, d_s, ratio)
    z_t = sum(math.exp((y - m_t) / teacher_temperature) for y in t)
    return w, z_t, sum(math.exp((x - m_s) / temperature) for x in s)


@pytest.mark.parametrize(("temperature", "teacher_temperature"), [(1.0, 1.0), (2.0, 2.0), (2.0, 5.0), (0.5, 0.25)])
def test_kl_follows_from_sums_of_parts_that_are_merged(temperature, teacher_temperature):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 12)) * 3
    exact = kl_of(s, t, temperature, teacher_temperature)
    whole = sums_of(s, t, temperature, teacher_temperature, s.max(), t.max())
    assert math.isclose(formulas.forward_kl_from_sums(*whole, teacher_temperature), exact, rel_tol=1e-13)
    ratio, merged = teacher_temperature / temperature, np.zeros(3)
    for part in (slice(0, 5), slice(5, 12)):
        m_s, m_t = s[part].max(), t[part].max()
        w, z_t, z_s = sums_of(s[part], t[part], temperature, teacher_temperature, m_s, m_t)
        d_s = formulas.scaled_logit(m_s, s.max(), formulas.HEADROOM)
        d_t = formulas.scaled_logit(m_t, t.max(), formulas.HEADROOM)
        factor = formulas.shift_factor(d_t, teacher_temperature)
        merged += (
            formulas.merged_forward_kl(w, z_t, d_t, d_s, ratio, factor),
            z_t * factor,
            z_s * formulas.shift_factor(d_s, temperature),
        )
    assert math.isclose(formulas.forward_kl_from_sums(*merged, teacher_temperature), exact, rel_tol=1e-13)


def test_a_part_without_classes_adds_nothing():
    assert formulas.merged_forward_kl(0.0, 0.0, -INF, -INF, 1.0, 0.0) == 0.0
    assert formulas.merged_forward_kl(NAN, 0.0, -INF, -1.0, 1.0, 0.0) == 0.0
    # A student that rules out the whole part has +inf there already, whatever the maxima do.
    assert formulas.merged_forward_kl(INF, 1.0, -1.0, -INF, 1.0, 0.5) == INF
    # w is not shifted by a maximum that there is not.
    assert formulas.merged_forward_kl(0.5, 2.0, -1.0, -INF, 0.25, 0.5) == 0.5 * 0.5
    assert formulas.merged_forward_kl(0.5, 2.0, -1.0, -3.0, 0.25, 0.5) == 0.5 * (0.5 + 2.0 * (-1.0 + 0.75))


def test_a_class_that_the_student_rules_out_makes_kl_infinite():
    assert formulas.forward_kl_from_sums(NAN, 1.0, 1.0, 2.0) == INF
    assert formulas.forward_kl_from_sums(INF, 1.0, 1.0, 2.0) == INF


def test_the_gradient_of_a_class():
    assert formulas.kd_gradient(2.0, 3.0, 5.0, 7.0, 11.0, 13.0) == 7.0 * 2.0 + 11.0 * 3.0 - 13.0 * 5.0
    assert formulas.soft_scale(3.0, 0.25, 16.0, 4.0) == 3.0 * 0.75 * 16.0 / 4.0


def test_the_loss_of_a_row():
    assert formulas.kd_loss(2.0, 8.0, 0.25) == 0.25 * 2.0 + 0.75 * 8.0
    assert formulas.kd_loss(INF, 8.0, 0.0) == 8.0 and formulas.kd_loss(NAN, 8.0, 0.0) == 8.0
    assert formulas.kd_loss(2.0, INF, 1.0) == 2.0 and formulas.kd_loss(2.0, NAN, 1.0) == 2.0
    assert formulas.kd_loss(INF, 8.0, 0.5) == INF


@pytest.mark.parametrize("u", [0.0, 1e-9, 0.5, -0.5, 30.0, -30.0, 800.0, -800.0])
def test_two_outcomes(u):
    e = math.exp(-abs(u))
    assert close(formulas.sigmoid(u, e), 1 / (1 + np.exp(-L(u))))
    assert close(formulas.softplus(u, e), np.log1p(np.exp(L(u))) if u < 0 else L(u) + np.log1p(np.exp(-L(u))))


# --- decoupled, mixed, standardised ----------------------------------------------------------------------------------


def test_kl_of_two_outcomes():
    p, q = L(0.3), L(0.8)
    of_p, of_rest = np.log(p / q), np.log((1 - p) / (1 - q))
    exact = p * of_p + (1 - p) * of_rest
    assert close(formulas.two_way_kl(0.3, 0.7, float(of_p), float(of_rest)), exact)
    assert formulas.two_way_kl(1.0, 0.0, 2.0, NAN) == 2.0  # 0 log 0 = 0
    assert formulas.two_way_kl(0.0, 1.0, INF, 3.0) == 3.0


def test_a_difference_of_probabilities_is_of_what_is_exact():
    assert formulas.probability_difference(1.0, 2.0, 10.0, 20.0, 3.0, 5.0) == 2.0
    for u_s, u_t in ((1.0, -1.0), (-1.0, 1.0), (-1.0, -1.0), (0.0, 1.0), (1.0, 0.0)):
        assert formulas.probability_difference(u_s, u_t, 10.0, 20.0, 3.0, 5.0) == -10.0


def test_parts_of_decoupled_kd():
    assert formulas.dkd_divergence(2.0, 3.0, 5.0, 7.0) == 41.0
    assert formulas.dkd_divergence(0.0, INF, 5.0, 7.0) == 35.0
    assert formulas.dkd_divergence(2.0, 3.0, 0.0, INF) == 6.0


def test_the_gradient_of_decoupled_kd():
    """By finite differences of alpha CE + (1 - alpha) T² (a TCKD + b NCKD), from the definition, and with T = 2."""
    s, t, y, T, alpha, a, b, step = (
        np.array([0.3, -1.0, 0.7, 2.0]),
        np.array([1.0, 0.5, -2.0, 0.0]),
        2,
        2.0,
        0.3,
        0.5,
        3,
        1e-6,
    )
    others = np.arange(4) != y

    def soft(x, T=1.0):
        e = np.exp(L(x) / T - (L(x) / T).max())
        return e / e.sum()

    def loss(s):
        q, p, q_o, p_o = soft(s, T), soft(t, T), soft(s[others], T), soft(t[others], T)
        tckd = p[y] * np.log(p[y] / q[y]) + (1 - p[y]) * np.log((1 - p[y]) / (1 - q[y]))
        return -alpha * np.log(soft(s)[y]) + (1 - alpha) * T**2 * (a * tckd + b * (p_o * np.log(p_o / q_o)).sum())

    exact = [(loss(s + step * e) - loss(s - step * e)) / (2 * step) for e in np.eye(4)]
    difference, rest = a * float(soft(s, T)[y] - soft(t, T)[y]), float(1 - soft(s)[y])
    e_h, e_s, e_t = (np.exp((x - x[others].max()) / of) for x, of in ((s, 1.0), (s, T), (t, T)))
    sums = [float(e[others].sum()) for e in (e_h, e_s, e_t)]
    factors = formulas.dkd_factors(alpha, (1 - alpha) * T, rest, difference, b, *sums)
    gradient = [formulas.kd_gradient(*of_class, *factors) for of_class in zip(e_h, e_s, e_t, strict=True)]
    gradient[y] = formulas.dkd_label_gradient(alpha, (1 - alpha) * T, rest, difference)
    np.testing.assert_allclose(gradient, np.array(exact, float), atol=1e-9)


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (-1.0, -3.0), (-3.0, -1.0), (-2000.0, -1999.0), (-1.0, -1e4)])
def test_log_of_a_sum(a, b):
    assert close(formulas.log_of_sum(a, b), np.logaddexp(L(a), L(b)), size=1.0 + abs(a))
    assert formulas.log_of_sum(a, -INF) == formulas.log_of_sum(-INF, a) == a
    assert formulas.log_of_sum(-INF, -INF) == -INF
    assert math.isnan(formulas.log_of_sum(a, NAN))


@pytest.mark.parametrize(
    ("low", "high"), [(-1.0, 3.0), (-3e-300, 1e-300), (-1e308, 1.7e308), (0.0, 5e-324), (1e4, 1e4 + 1)]
)
def test_a_spread_is_brought_to_one(low, high):
    scale = formulas.spread_scale(low, high)
    assert math.frexp(scale)[0] == 0.5
    largest = max(abs(low), abs(high))
    assert scale * largest < 1.0
    assert scale * largest >= 0.5 or largest < 2.0**-1000


def test_standardised_logits_and_their_gradient():
    """z of a row, and the gradient of sum of c z by finite differences."""
    x, c, step = np.array([0.3, -1.0, 0.7, 2.0]), np.array([1.0, -2.0, 0.5, 3.0]), 1e-6

    def z_of(x):
        return (L(x) - L(x).mean()) / L(x).std()

    exact = [((z_of(x + step * e) - z_of(x - step * e)) * c).sum() / (2 * step) for e in np.eye(4)]
    about = 0.25
    z = np.array([formulas.standardized(v - about, x.mean() - about, x.std()) for v in x])
    np.testing.assert_allclose(z, z_of(x).astype(float), rtol=1e-14)
    means = c.mean(), (c * z).mean()
    gradient = [
        formulas.standardized_gradient(g, means[0], v, means[1], 1 / x.std()) for g, v in zip(c, z, strict=True)
    ]
    np.testing.assert_allclose(gradient, np.array(exact, float), atol=1e-9)


# --- teachers without every class ------------------------------------------------------------------------------------


def test_outcomes_of_a_teacher_without_every_class():
    assert formulas.outcome_term(0.5, -1.0, -3.0) == 1.0
    assert formulas.outcome_term(0.0, -INF, -INF) == 0.0
    assert formulas.outcome_term(0.5, -1.0, -INF) == INF
    assert math.isnan(formulas.outcome_term(0.0, -1e4, -INF))


def test_how_a_tail_shares_its_mass():
    assert formulas.tail_shares(True, 0.5, 4.0, 8) == (0.25, 0.0)
    assert formulas.tail_shares(True, 0.5, 0.25, 8) == (4.0, 0.0)
    assert formulas.tail_shares(True, 0.5, 0.0, 8) == (0.0, 0.0625)  # the student rules out the whole tail
    assert formulas.tail_shares(False, 0.5, 4.0, 8) == (0.0, 0.0625)
    assert formulas.tail_shares(False, 0.0, 4.0, 0) == (0.0, 0.0)  # no tail: n may be 0
    assert formulas.tail_factor(2.0, 3.0, 5.0, 7.0) == 2.0 * 3.0 - 5.0 * 7.0


# --- divergences -----------------------------------------------------------------------------------------------------


def test_log_ratio():
    assert formulas.log_ratio(-2.0, -3.0, 0.5, 0.25, 0.125) == -2.0 * 0.5 - -3.0 * 0.25 + 0.125
    assert formulas.log_ratio(-INF, -3.0, 0.5, 0.25, 0.125) == -INF
    assert formulas.log_ratio(-2.0, -INF, 0.5, 0.25, 0.125) == INF
    assert formulas.log_ratio(-INF, -INF, 0.5, 0.25, 0.125) == 0.125  # outside both supports, where it is not used


def plogp(x, y):
    """x log(x / y), 0 where x is 0."""
    return x * np.log(x / y) if x > 0 else L(0)


def forward_kl(p, q, c):
    return plogp(p, q) + q - p if q > 0 or p == 0 else L(INF)


def reverse_kl(p, q, c):
    return forward_kl(q, p, c)


def jsd(p, q, c):
    m = c * p + (1 - c) * q
    return c * plogp(p, m) + (1 - c) * plogp(q, m)


def skew_forward_kl(p, q, c):
    m = c * p + (1 - c) * q
    return plogp(p, m) + m - p


def skew_reverse_kl(p, q, c):
    return skew_forward_kl(q, p, c)


def tvd(p, q, c):
    return abs(p - q) / 2


def alpha(p, q, c):
    return (p**c * q ** (1 - c) - c * p - (1 - c) * q) / (c * (c - 1))


def slope(term):
    """q phi' by differences in extended precision: of second order, with one step extrapolated away."""

    def difference(p, q, c, h):
        return (term(p, q * (1 + h), c) - term(p, q * (1 - h), c)) / (2 * h)

    def of(p, q, c):
        h = L(2.0**-12)
        coarse, half, fine = (difference(p, q, c, h / 2**k) for k in range(3))
        coarse, half = (4 * half - coarse) / 3, (4 * fine - half) / 3
        return (16 * half - coarse) / 15

    return of


DEFINITIONS = {
    "forward_kl": (forward_kl, (0.5,)),
    "reverse_kl": (reverse_kl, (0.5,)),
    "jsd": (jsd, (0.1, 0.5, 0.9)),
    "skew_forward_kl": (skew_forward_kl, (0.1, 0.5, 0.9)),
    "skew_reverse_kl": (skew_reverse_kl, (0.1, 0.5, 0.9)),
    "tvd": (tvd, (0.5,)),
    "alpha": (alpha, (0.1, 0.3, 0.5, 0.6, 0.999)),
}
#: q phi', derived by hand from the definitions.
SLOPES = {
    "forward_kl": lambda p, q, c: q - p,
    "reverse_kl": lambda p, q, c: q * np.log(q / p),
    "jsd": lambda p, q, c: (1 - c) * q * np.log(q / (c * p + (1 - c) * q)),
    "skew_forward_kl": lambda p, q, c: (1 - c) * q * (1 - p / (c * p + (1 - c) * q)),
    "skew_reverse_kl": lambda p, q, c: q * (np.log(q / (c * q + (1 - c) * p)) + c * (1 - q / (c * q + (1 - c) * p))),
    "tvd": lambda p, q, c: q * np.sign(q - p) / 2,
    "alpha": lambda p, q, c: (q - p**c * q ** (1 - c)) / c,
}
CASES = [(name, c) for name, (_, parameters) in DEFINITIONS.items() for c in parameters]
PROBABILITIES = [1e-30, 1e-9, 0.01, 0.25, 0.2500001, 0.3, 0.7, 1.0]


def ratio(p, q):
    return float(np.log(L(q)) - np.log(L(p)))


@pytest.mark.parametrize(("name", "c"), CASES)
def test_terms_and_slopes_are_those_of_the_definition(name, c):
    definition, term, of = DEFINITIONS[name][0], getattr(formulas, f"{name}_term"), getattr(formulas, f"{name}_slope")
    for p, q in product(PROBABILITIES, PROBABILITIES):
        value, exact = term(p, q, ratio(p, q), c), definition(L(p), L(q), L(c))
        assert abs(value - exact) <= 1e-14 * max(p, q) * max(1, abs(ratio(p, q))), (p, q)
        if p != q:
            value, exact = of(p, q, ratio(p, q), c), SLOPES[name](L(p), L(q), L(c))
            assert abs(value - exact) <= 1e-14 * max(q, abs(exact)) * max(1, abs(ratio(p, q))), (p, q)


@pytest.mark.parametrize(("name", "c"), CASES)
def test_the_slope_is_q_times_the_derivative_of_the_definition(name, c):
    for p, q in permutations((0.01, 0.25, 0.3, 0.7, 1.0), 2):
        value = getattr(formulas, f"{name}_slope")(p, q, ratio(p, q), c)
        exact = slope(DEFINITIONS[name][0])(L(p), L(q), L(c))
        assert abs(value - exact) <= 1e-11 * max(p, q), (p, q)


@pytest.mark.parametrize(("name", "c"), CASES)
def test_agreement_has_neither_loss_nor_gradient_but_what_softmax_takes_off(name, c):
    """The slope at p = q is q phi'(1): the same share of q in every class, which the softmax's gradient takes off."""
    term, of = getattr(formulas, f"{name}_term"), getattr(formulas, f"{name}_slope")
    for p in PROBABILITIES:
        assert abs(term(p, p, 0.0, c)) <= 2.3e-16 * p
        assert math.isclose(of(p, p, 0.0, c) / p, of(0.5, 0.5, 0.0, c) / 0.5, abs_tol=1e-15)


@pytest.mark.parametrize(("name", "c"), CASES)
def test_near_agreement_nothing_cancels(name, c):
    """Near p = q a divergence is k p y² / 2: relative to that, y = log q - log p being exact, little is lost."""
    definition, term = DEFINITIONS[name][0], getattr(formulas, f"{name}_term")
    for y in (1e-3, -1e-3):
        p = 0.25
        q = float(np.exp(L(y)) * p)
        exact = definition(L(p), L(q), L(c))
        assert abs(term(p, q, ratio(p, q), c) - exact) <= 1e-15 * p


#: phi and q phi' where the teacher alone, or the student alone, rules a class out; the other has x.
ENDS = {
    "forward_kl": lambda x, c: ((x, x), (INF, -x)),
    "reverse_kl": lambda x, c: ((INF, INF), (x, 0.0)),
    "jsd": lambda x, c: ((x * (c - 1) * math.log(1 - c),) * 2, (-c * x * math.log(c), 0.0)),
    "skew_forward_kl": lambda x, c: (((1 - c) * x, (1 - c) * x), (x * (c - 1 - math.log(c)), 0.0)),
    "skew_reverse_kl": lambda x, c: ((x * (c - 1 - math.log(c)),) * 2, ((1 - c) * x, 0.0)),
    "tvd": lambda x, c: ((x / 2, x / 2), (x / 2, 0.0)),
    "alpha": lambda x, c: ((x / c, x / c), (x / (1 - c), 0.0)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "c"), CASES)
@pytest.mark.parametrize("x", [1.0, 0.25, 1e-9])
def test_where_one_alone_rules_a_class_out(name, c, x):
    term, of = getattr(formulas, f"{name}_term"), getattr(formulas, f"{name}_slope")
    teacher, student = ENDS[name](x, c)
    for (p, q, r), exact in (((0.0, x, INF), teacher), ((x, 0.0, -INF), student)):
        for value, expected in zip((term(p, q, r, c), of(p, q, r, c)), exact, strict=True):
            assert math.isclose(value, expected, rel_tol=1e-13, abs_tol=1e-16 * x), (p, q)


@pytest.mark.parametrize(("name", "c"), CASES)
@pytest.mark.parametrize(("p", "q"), [(0.0, 0.0), (0.0, 1e-3), (1e-3, 0.0), (LEAST, LEAST / 4), (LEAST / 4, LEAST)])
@pytest.mark.parametrize("r", [-800.0, -1.0, 0.0, 1.0, 800.0])
def test_underflowed_inside_the_support(name, c, p, q, r):
    """What is left is finite, and 0 where nothing is left of either."""
    for formula in (getattr(formulas, f"{name}_term"), getattr(formulas, f"{name}_slope")):
        value = formula(p, q, r, c)
        assert math.isfinite(value)
        if p == q == 0:
            assert value == 0


def test_the_slope_of_total_variation_at_a_tie_is_zero():
    assert formulas.tvd_slope(0.25, 0.25, 0.0, 0.5) == 0.0


# --- activations -----------------------------------------------------------------------------------------------------


def test_activations():
    assert set(formulas.ACTIVATIONS) == {"identity", "relu", "tanh", "gelu"}
    for x in (-3.0, -0.5, 0.0, 0.5, 3.0):
        assert formulas.identity(x) == x
        assert formulas.relu(x) == max(x, 0.0)
        assert formulas.tanh(x) == math.tanh(x)
        assert math.isclose(formulas.gelu(x), x * math.erfc(-x / math.sqrt(2)) / 2, rel_tol=1e-14)
    assert all(math.isnan(formulas.ACTIVATIONS[name](NAN)) for name in formulas.ACTIVATIONS)
