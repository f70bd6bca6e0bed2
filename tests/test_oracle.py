"""The oracle against values worked out by hand: exact rationals and logarithms of rationals."""

from __future__ import annotations

import ast
from fractions import Fraction
from math import exp, log, sqrt
from pathlib import Path

import ml_dtypes
import numpy as np
import oracle
import pytest

#: The hand values below are float64 numbers, so they are only as good as that.
HAND = 1e-15
INF = np.inf
REAL = np.longdouble


def close(actual, expected):
    """Equal, or both finite and apart by no more than the rounding of the hand values."""
    actual = np.asarray(actual, np.longdouble)
    expected = np.asarray(expected, np.longdouble)
    assert actual.shape == expected.shape
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(actual[~finite], expected[~finite])
    error = np.abs(actual[finite] - expected[finite])
    assert (error <= HAND * np.maximum(1, np.abs(expected[finite]))).all(), (actual, expected)


def fractions(*parts):
    return [float(Fraction(part)) for part in parts]


# Logits log(w) have the probabilities w / sum w, and log(w^T) have them at temperature T.
S = np.log(np.array([1.0, 2.0, 1.0]))  # q = 1/4, 1/2, 1/4
T = np.log(np.array([1.0, 1.0, 2.0]))  # p = 1/4, 1/4, 1/2


def test_reads_nothing_of_the_package():
    tree = ast.parse(Path(oracle.__file__).read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {"__future__", "typing", "numpy"}


def test_longdouble_is_said_to_be_wider_only_where_it_is():
    one = oracle.REAL(1)
    assert (one + np.finfo(np.float64).eps / 8 != one) == oracle.WIDER


def test_softmax():
    close(oracle.softmax(S), fractions("1/4", "1/2", "1/4"))
    close(oracle.softmax(2 * S, temperature=2.0), fractions("1/4", "1/2", "1/4"))
    close(oracle.softmax(S, temperature=0.5), fractions("1/6", "2/3", "1/6"))  # weights 1, 4, 1
    close(oracle.softmax(np.array([[0.0, -INF], [7.0, 7.0]])), [[1.0, 0.0], [0.5, 0.5]])
    close(oracle.softmax(np.array([1e300, 1e300, -1e300])), [0.5, 0.5, 0.0])


def test_log_softmax():
    close(oracle.log_softmax(S), [-log(4), -log(2), -log(4)])
    close(oracle.log_softmax(np.array([0.0, -INF, 0.0])), [-log(2), -INF, -log(2)])
    close(oracle.log_softmax(np.array([0.0, 1e6])), [-1e6, 0.0])  # no cap


def test_logsumexp():
    close(oracle.logsumexp(S), log(4))
    close(oracle.logsumexp(np.full(8, 1e4)), 1e4 + log(8))
    close(oracle.logsumexp(np.full((2, 8), 3.0), temperature=2.0), [1.5 + log(8)] * 2)


def test_reads_16_bit_numbers_exactly():
    close(oracle.real(np.array([1.0078125, -INF], ml_dtypes.bfloat16)), [1.0078125, -INF])
    close(oracle.real(np.array([1.0009765625], np.float16)), [1.0009765625])


def test_cross_entropy():
    close(oracle.cross_entropy(S, 1), log(2))
    close(oracle.cross_entropy_gradient(S, 1), fractions("1/4", "-1/2", "1/4"))
    close(oracle.cross_entropy(np.array([0.0, -INF]), 1), INF)
    close(oracle.cross_entropy_gradient(np.array([0.0, -INF]), 1), [1.0, -1.0])
    close(oracle.cross_entropy(np.array([800.0, 0.0]), 1), 800.0)


def test_forward_kl():
    # 1/4 log 1 + 1/4 log(1/2) + 1/2 log 2 = 1/4 log 2
    close(oracle.forward_kl(S, T), log(2) / 4)
    close(oracle.forward_kl_gradient(S, T), fractions("0", "1/4", "-1/4"))
    close(oracle.forward_kl(3 * S, 3 * T, temperature=3.0), log(2) / 4)
    close(oracle.forward_kl_gradient(3 * S, 3 * T, temperature=3.0), fractions("0", "1/12", "-1/12"))
    close(oracle.forward_kl(3 * S, 5 * T, temperature=3.0, teacher_temperature=5.0), log(2) / 4)


def test_reverse_kl():
    # q = (1/3, 2/3), p = (1/2, 1/2): phi' = log(2/3), log(4/3); KL = 1/3 log(2/3) + 2/3 log(4/3)
    s, t = np.log(np.array([1.0, 2.0])), np.zeros(2)
    value = log(2 / 3) / 3 + 2 * log(4 / 3) / 3
    close(oracle.reverse_kl(s, t), value)
    # q_0 (log(2/3) - KL) = 1/3 * 2/3 (log(2/3) - log(4/3)) = -2/9 log 2
    close(oracle.reverse_kl_gradient(s, t), [-2 / 9 * log(2), 2 / 9 * log(2)])
    close(oracle.reverse_kl_gradient(4 * s, t, temperature=4.0), [-1 / 18 * log(2), 1 / 18 * log(2)])


# q = (1/3, 2/3), p = (1/2, 1/2). The sum over both classes; and q_0 q_1 (phi'_0 - phi'_1), where q_0 q_1 = 2/9. What
# cancels by hand is in longdouble.
TWO = {
    # m = (5/12, 7/12); p/m = 6/5, 6/7; q/m = 4/5, 8/7; phi' = log(q/m) / 2
    ("jsd", None): (log(6 / 5) / 4 + log(6 / 7) / 4 + log(4 / 5) / 6 + log(8 / 7) / 3, log(7 / 10) / 9),
    # m = 1/4 p + 3/4 q = (3/8, 5/8); phi' = 3/4 log(q/m), q/m = 8/9, 16/15
    ("jsd", 0.25): (
        log(4 / 3) / 8 + log(4 / 5) / 8 + log(8 / 9) / 4 + log(16 / 15) / 2,
        3 / 4 * 2 / 9 * log(5 / 6),
    ),
    # m = (3/8, 5/8); p/m = 4/3, 4/5; phi' = -3/4 p/m = -1, -3/5
    ("skew_forward_kl", 0.25): (log(4 / 3) / 2 + log(4 / 5) / 2, -4 / 45),
    # m = 1/10 p + 9/10 q = (7/20, 13/20); p/m = 10/7, 10/13; phi' = -9/7, -9/13
    ("skew_forward_kl", None): (log(10 / 7) / 2 + log(10 / 13) / 2, -2 / 9 * 54 / 91),
    # m = 1/4 q + 3/4 p = (11/24, 13/24); q/m = 8/11, 16/13; phi' = log(q/m) + 1 - q/m / 4
    ("skew_reverse_kl", 0.25): (
        log(8 / 11) / 3 + 2 * log(16 / 13) / 3,
        2 / 9 * (log(13 / 22) + 18 / 143),
    ),
    # m = 1/10 q + 9/10 p = (29/60, 31/60); q/m = 20/29, 40/31
    ("skew_reverse_kl", None): (
        log(20 / 29) / 3 + 2 * log(40 / 31) / 3,
        2 / 9 * (log(31 / 58) - 2 / 29 + 4 / 31),
    ),
    ("tvd", None): (1 / 6, -2 / 9),
    # phi' = -2 sqrt(p/q)
    ("alpha", None): (4 * (1 - np.sqrt(REAL(1) / 6) - np.sqrt(REAL(1) / 3)), -4 / 9 * (sqrt(3 / 2) - sqrt(3 / 4))),
    # phi' = -4 (p/q)^(1/4); 1 / (a (1 - a)) = 16/3
    ("alpha", 0.25): (
        REAL(16) / 3 * (1 - (REAL(1) / 54) ** 0.25 - (REAL(4) / 27) ** 0.25),
        -8 / 9 * ((3 / 2) ** 0.25 - (3 / 4) ** 0.25),
    ),
}


@pytest.mark.parametrize(("name", "parameter"), TWO)
def test_divergences_of_two_classes(name, parameter):
    value, slope = TWO[name, parameter]
    s, t = np.log(np.array([1.0, 2.0])), np.zeros(2)
    row = oracle.kd_row(s, t, None, 1.0, 0.0, name, parameter=parameter)
    close(row.loss, value)
    close(row.gradient, [slope, -slope])
    row = oracle.kd_row(4 * s, 3 * t, None, 4.0, 0.0, name, parameter=parameter, teacher_temperature=3.0)
    close(row.loss, 16 * value)
    close(row.gradient, [4 * slope, -4 * slope])
    batch = oracle.kd([4 * s], [t], None, 4.0, 0.0, divergence=name, parameter=parameter, scale_t2=False)
    close(batch.loss, value)
    close(batch.gradient, [[slope / 4, -slope / 4]])


def test_the_hand_values_miss_no_divergence():
    assert {name for name, _ in TWO} | {"forward_kl", "reverse_kl"} == set(oracle.DIVERGENCES)


@pytest.mark.parametrize("name", oracle.DIVERGENCES)
def test_gradients_are_the_derivatives_of_the_values(name):
    value, gradient, default = oracle.DIVERGENCES[name]
    rng = np.random.default_rng(0)
    for parameter in [None] if default is None else [default, 0.01, 0.3, 0.97]:
        options = () if parameter is None else (parameter,)
        s, t = rng.normal(size=(2, 5)).astype(oracle.REAL) * 2  # no ties near, where total variation has kinks
        s[3] = t[3] = -INF
        step = oracle.REAL(1e-4 if oracle.WIDER else 1e-3)
        slope = np.zeros(5, oracle.REAL)
        for v in range(5):
            moved = [value(s + k * step * (np.arange(5) == v), t, 2.0, 3.0, *options) for k in (-2, -1, 1, 2)]
            slope[v] = (8 * (moved[2] - moved[1]) - (moved[3] - moved[0])) / (12 * step)
        error = np.abs(slope - gradient(s, t, 2.0, 3.0, *options))
        assert error.max() <= (1e-12 if oracle.WIDER else 1e-8) * (1 + np.abs(slope).max())


def test_directions_are_not_the_same():
    s, t = np.log(np.array([1.0, 2.0])), np.zeros(2)
    close(oracle.forward_kl(s, t), log(3 / 2) / 2 + log(3 / 4) / 2)
    assert abs(oracle.forward_kl(s, t) - oracle.reverse_kl(s, t)) > 1e-3


def test_minus_infinity():
    ruled_out = np.array([0.0, -INF, 0.0])
    free = np.zeros(3)
    close(oracle.forward_kl(ruled_out, ruled_out), 0.0)
    close(oracle.reverse_kl(ruled_out, ruled_out), 0.0)
    close(oracle.reverse_kl_gradient(ruled_out, ruled_out), [0.0] * 3)
    close(oracle.forward_kl(free, ruled_out), log(3 / 2))  # the teacher's zero adds nothing
    close(oracle.forward_kl_gradient(free, ruled_out), fractions("-1/6", "1/3", "-1/6"))
    close(oracle.forward_kl(ruled_out, free), INF)
    close(oracle.forward_kl_gradient(ruled_out, free), fractions("1/6", "-1/3", "1/6"))
    close(oracle.reverse_kl(ruled_out, free), log(3 / 2))
    close(oracle.reverse_kl(free, ruled_out), INF)
    assert np.isnan(oracle.reverse_kl_gradient(free, ruled_out)).all()
    # Support is what the logits say: exp(-1e6) underflows in every float, yet the class is allowed.
    close(oracle.forward_kl(np.array([0.0, -INF]), np.array([0.0, -1e6])), INF)
    close(oracle.reverse_kl(np.array([0.0, -1e6]), np.array([0.0, -INF])), INF)


def test_minus_infinity_of_the_bounded_divergences():
    ruled_out, free = np.array([0.0, -INF, 0.0]), np.zeros(3)
    bounded = [name for name in oracle.DIVERGENCES if name not in ("forward_kl", "reverse_kl")]
    for name in bounded:
        value, gradient, _ = oracle.DIVERGENCES[name]
        close(value(ruled_out, ruled_out), 0.0)
        close(gradient(ruled_out, ruled_out), [0.0] * 3)
    # The student rules out a third of the teacher: q = (1/2, 0, 1/2), m = (5/12, 1/6, 5/12).
    close(oracle.tvd(ruled_out, free), 1 / 3)
    close(oracle.jsd(ruled_out, free), log(4 / 5) / 3 + log(2) / 6 + log(6 / 5) / 2)
    close(oracle.skew_forward_kl(ruled_out, free, lam=0.5), 2 * log(4 / 5) / 3 + log(2) / 3)
    close(oracle.skew_reverse_kl(ruled_out, free, lam=0.5), log(6 / 5))
    close(oracle.alpha(ruled_out, free), 4 * (1 - sqrt(2 / 3)))
    for name in bounded:  # symmetric in the classes that stay, and none for the one that does not
        close(oracle.DIVERGENCES[name][1](ruled_out, free), [0.0] * 3)
    # The teacher rules out a third of the student, p and q change places: phi' of that class is the larger one.
    close(oracle.tvd_gradient(free, ruled_out), fractions("-1/9", "2/9", "-1/9"))
    close(oracle.jsd_gradient(free, ruled_out), [-log(5 / 2) / 18, log(5 / 2) / 9, -log(5 / 2) / 18])  # 2 over 4/5
    close(oracle.skew_forward_kl_gradient(free, ruled_out, lam=0.5), fractions("-1/15", "2/15", "-1/15"))
    close(oracle.alpha_gradient(free, ruled_out), np.array([-1, 2, -1]) * 2 / 9 * sqrt(3 / 2))
    # No class in common.
    one, other = np.array([0.0, -INF]), np.array([-INF, 0.0])
    close(oracle.jsd(one, other, beta=0.25), log(4) / 4 + 3 * log(4 / 3) / 4)  # the entropy of beta
    close(oracle.skew_forward_kl(one, other, lam=0.25), log(4))
    close(oracle.skew_reverse_kl(one, other, lam=0.25), log(4))
    close(oracle.tvd(one, other), 1.0)
    close(oracle.alpha(one, other, a=0.25), 16 / 3)
    # Probabilities that underflow in every float are there all the same.
    deep = np.array([0.0, -1e6])
    close(oracle.alpha(deep, deep[::-1], a=1e-5), (1 - exp(-10)) / (1e-5 * (1 - 1e-5)))
    close(oracle.jsd(deep, one), 0.0)


def test_kd_row():
    close(oracle.kd_row(S, T, 1, 1.0, 1.0).loss, log(2))
    row = oracle.kd_row(S, T, 1, 1.0, 0.25)
    close(row.loss, log(2) / 4 + 0.75 * log(2) / 4)
    close(row.ce, log(2))
    close(row.kl, log(2) / 4)
    close(row.gradient, fractions("1/16", "1/16", "-1/8"))
    row = oracle.kd_row(3 * S, 3 * T, None, 3.0, 0.0)
    close(row.loss, 9 * log(2) / 4)
    close(row.gradient, fractions("0", "3/4", "-3/4"))
    row = oracle.kd_row(3 * S, 3 * T, None, 3.0, 0.0, scale_t2=False)
    close(row.loss, log(2) / 4)
    close(row.gradient, fractions("0", "1/12", "-1/12"))


def test_end_points_read_one_term():
    ruled_out, free = np.array([0.0, -INF]), np.zeros(2)
    close(oracle.kd_row(ruled_out, free, 0, 1.0, 1.0).loss, 0.0)  # the divergence is +inf
    close(oracle.kd_row(ruled_out, ruled_out, 1, 1.0, 0.0).loss, 0.0)  # the cross-entropy is +inf


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["1/3", "1/3", "1/3"]),
        ({"labels": [0, -100, 2]}, ["1/2", "0", "1/2"]),
        ({"labels": [0, 7, 2], "ignore_index": 7}, ["1/2", "0", "1/2"]),
        ({"weights": [1, 0, 3]}, ["1/4", "0", "3/4"]),
        ({"labels": [-100, 1, 2], "weights": [5, 1, 3]}, ["0", "1/4", "3/4"]),
        ({"weights": [1, 0, 3], "reduction": "sum"}, ["1", "0", "3"]),
        ({"weights": [1, 0, 3], "reduction": "none"}, ["1", "0", "3"]),
        ({"weights": [1, 0, 3], "denominator": 8}, ["1/8", "0", "3/8"]),
        ({"labels": [-100] * 3}, ["0", "0", "0"]),
        ({"weights": [0, 0, 0], "denominator": 2}, ["0", "0", "0"]),
    ],
)
def test_row_scales(options, expected):
    close(oracle.row_scales(3, **options), fractions(*expected))


def test_kd_of_a_batch():
    student = np.stack([S, np.zeros(3), np.full(3, np.nan)])
    teacher = np.stack([T, np.zeros(3), np.full(3, np.nan)])
    answer = oracle.kd(student, teacher, [1, 0, -100], 1.0, 0.25)
    first, second = log(2) / 4 + 3 / 16 * log(2), log(3) / 4
    close(answer.loss, (first + second) / 2)
    close(answer.ce, (log(2) + log(3)) / 2)
    close(answer.kl, log(2) / 8)
    close(
        answer.gradient,
        [fractions("1/32", "1/32", "-1/16"), fractions("-1/12", "1/24", "1/24"), [0.0] * 3],
    )
    close(oracle.kd(student, teacher, [1, 0, -100], 1.0, 0.25, reduction="none").loss, [first, second, 0.0])
    close(oracle.kd(student, teacher, [1, 0, -100], 1.0, 0.25, reduction="sum").loss, first + second)
    close(oracle.kd(student[:0], teacher[:0], [], 1.0, 0.25).loss, 0.0)
    one = oracle.kd(S, T, 1, 1.0, 0.25)
    close(one.loss, first)
    assert one.gradient.shape == (3,)
