"""Decoupled, mixed and standardised KD on device arrays, on a GPU or in Numba's simulator, by the host's textbooks.

Textbooks and what is allowed are those of :mod:`test_variants`; the CPU engine is a second witness.
"""

import math
from functools import partial

import numpy as np
import oracle
import pytest
from comparisons import same_bits
from hypothesis import given, settings, strategies as st
from test_variants import (
    BFLOAT16,
    DIVERGENCES,
    DTYPES,
    INF,
    assert_mixture,
    assert_near,
    assert_rows,
    dkd_row,
    problem,
    standardized_row,
)

import kdcore
from kdcore.cuda.presence import available
from kdcore.engines import to_device
from kdcore.testing import bounds

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if REASON is None:
    from numba import cuda

    from kdcore.cuda import memory, plans, variants as engine

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
NAN = np.nan


def put(array):
    """On the device, unless it is there, or numbers, or nothing."""
    return to_device(array) if isinstance(array, np.ndarray) else array


def get(array):
    return array.copy_to_host() if hasattr(array, "copy_to_host") else array


def on_device(function):
    """A call with arrays of the host, worked on the device."""

    def call(student, teacher, labels, *arguments, **options):
        teacher = list(map(put, teacher)) if isinstance(teacher, list) else put(teacher)
        labels = None if labels is None else put(np.asarray(labels))
        if "weights" in options:
            options["weights"] = np.asarray(options["weights"], np.float64)
        options = {name: put(value) for name, value in options.items()}
        with plans.using(threads=32 if tuple(student.shape)[-1] < 50 else None):  # the simulator takes its time
            result = function(put(student), teacher, labels, *arguments, **options)
        return type(result)(*map(get, result))

    call.__name__ = function.__name__
    return call


dkd = on_device(kdcore.dkd_loss_and_gradient)
mixture = on_device(kdcore.mixture_kd_loss_and_gradient)
standardized = on_device(kdcore.standardized_kd_loss_and_gradient)


def teachers_of(t):
    """The teacher, twice, and one that differs."""
    other = (0.5 * np.asarray(t).astype(float) + np.cos(np.arange(t.shape[-1]))).astype(t.dtype)
    return [t, other, t]


def mixture_of_three(s, t, *arguments, **options):
    return mixture(s, teachers_of(t), *arguments, teacher_weights=[0.5, 0.2, 0.3], **options)


def host_mixture_of_three(s, t, *arguments, **options):
    teachers = teachers_of(t)
    return kdcore.mixture_kd_loss_and_gradient(s, teachers, *arguments, teacher_weights=[0.5, 0.2, 0.3], **options)


HOST = {
    dkd: kdcore.dkd_loss_and_gradient,
    mixture_of_three: host_mixture_of_three,
    standardized: kdcore.standardized_kd_loss_and_gradient,
}
variants = pytest.mark.parametrize("variant", list(HOST), ids=["dkd", "mixture", "standardized"])


# --- decoupled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [2, 5, 137])
def test_dkd_is_the_textbooks(dtype, V):
    for seed, (T, alpha, scale) in enumerate([(1.0, 0.0, 1.0), (4.0, 0.3, 10.0), (2.0, 0.9, 30.0), (0.7, 0.5, 0.1)]):
        s, t, y = problem(2, V, seed, scale, dtype, DTYPES[seed])
        factors = {"target": 1.0, "nontarget": 8.0} if seed % 2 else {"target": 3.0, "nontarget": 0.5}
        result = dkd(
            s, t, y, T, alpha, target_weight=factors["target"], nontarget_weight=factors["nontarget"],
            reduction="none", scale_t2=seed != 3, validate=True,
        )  # fmt: skip
        rows = [dkd_row(*row, T, alpha, **factors, scale_t2=seed != 3) for row in zip(s, t, y, strict=True)]
        assert_rows(result, s, rows, alpha)
        assert result.gradient.dtype == dtype


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_dkd_of_a_student_that_is_confidently_wrong_or_right(dtype):
    signs = np.array([(a, b) for a in (1, -1) for b in (1, -1)])
    for gap in (30.0, 200.0, 1e4):
        for T in (1.0, 0.3):
            s, t, _ = problem(4, 5, dtype=dtype, scale=1.0)
            s[:, 0], t[:, 0] = signs.T * gap
            result = dkd(s, t, [0] * 4, T, 0.4, reduction="none")
            assert np.isfinite(result.loss).all() and np.isfinite(result.gradient).all()
            assert_rows(result, s, [dkd_row(s[i], t[i], 0, T, 0.4) for i in range(4)], 0.4)


def test_dkd_knows_how_sure_both_are():
    """q_y - p_y of log-odds 50 and 60, where both are 1 in float64, and of -50 and -60."""
    s, t = np.array([[50.0, 0.0], [-50.0, 0.0]]), np.array([[60.0, 0.0], [-60.0, 0.0]])
    result = dkd(s, t, [0, 0], 1.0, 0.0, nontarget_weight=0.0, reduction="none")
    exact = np.array([math.exp(-60) - math.exp(-50), math.exp(-50) - math.exp(-60)])
    np.testing.assert_allclose(result.gradient, np.stack([exact, -exact], axis=1), rtol=1e-13)
    kl = math.log1p(math.exp(-50)) - math.log1p(math.exp(-60)) - 10 * math.exp(-60)
    np.testing.assert_allclose(result.loss, kl, rtol=1e-12)


def test_dkd_where_classes_are_ruled_out():
    full, teacher = [0.5, 1.0, -0.5, 2.0], [1.0, 0.0, 3.0, -1.0]
    cases = [
        (full, [-INF, 0.0, 3.0, -1.0]),  # label, by the teacher: p_y = 0
        ([-INF, 1.0, -0.5, 2.0], teacher),  # label, by the student: +inf
        ([-INF, 1.0, -0.5, 2.0], [-INF, 0.0, 3.0, -1.0]),
        (full, [1.0, -INF, 3.0, -1.0]),
        ([0.5, 1.0, -INF, 2.0], teacher),  # NCKD is +inf
        ([0.5, 1.0, -INF, 2.0], [1.0, 0.0, -INF, -1.0]),
        (full, [1.0, -INF, -INF, -INF]),  # the teacher has nothing but the label: NCKD is 0
        ([0.5, -INF, -INF, -INF], [1.0, -INF, -INF, -INF]),
        ([0.5, -INF, 1.0, -INF], [1.0, -INF, -INF, -1.0]),
        ([0.5, 1.0, -INF, 2.0], [1.0, 0.0, -4e3, -1.0]),  # and where p' has underflowed to 0
        ([-INF, 1.0, -0.5, 2.0], [-4e3, 0.0, 3.0, -1.0]),  # or p_y
    ]
    s, t = (np.array(rows) for rows in zip(*cases, strict=True))
    for alpha in (0.0, 0.3):
        result = dkd(s, t, np.zeros(len(cases), int), 2.0, alpha, reduction="none", validate=True)
        assert_rows(result, s, [dkd_row(s[i], t[i], 0, 2.0, alpha) for i in range(len(cases))], alpha)
        infinite = [False, True, alpha > 0, False, True, False, False, False, True, True, True]
        assert np.isposinf(result.loss).tolist() == infinite
        assert np.abs(result.gradient.sum(axis=1)).max() < 1e-12


def test_dkd_of_a_student_that_rules_out_all_but_the_label():
    s, t = np.array([0.5, -INF, -INF]), np.array([1.0, -INF, 0.0])
    for factors in ({}, {"target_weight": 0.0}, {"nontarget_weight": 0.0}):
        result = dkd(s, t, 0, 2.0, 0.5, **factors)
        assert result.loss == INF and np.isnan(result.gradient).all() and result.ce == 0.0
        with pytest.raises(kdcore.UndefinedGradientError, match="student_logits"):
            dkd(s, t, 0, 2.0, 0.5, validate=True, **factors)
    nothing = dkd(s, t, 0, 2.0, 0.5, target_weight=0, nontarget_weight=0, validate=True)
    assert nothing.loss == 0.0 and nothing.gradient.tolist() == [0.0, 0.0, 0.0]
    one = dkd(np.ones((2, 1)), np.zeros((2, 1)), [0, 0], 2.0, 0.5, reduction="none", validate=True)
    assert one.loss.tolist() == one.ce.tolist() == one.kl.tolist() == [0.0, 0.0]
    assert one.gradient.tolist() == [[0.0], [0.0]]


def test_a_part_of_weight_zero_is_not_computed():
    s, t = np.array([[-INF, 1.0, -0.5]] * 2), np.array([[1.0, 0.0, 3.0]] * 2)  # TCKD of the first, NCKD of the second
    for factor, finite in (("target_weight", [True, False]), ("nontarget_weight", [False, True])):
        loss = dkd(s, t, [0, 1], 2.0, 0.0, reduction="none", **{factor: 0.0}).loss
        assert np.isfinite(loss).tolist() == finite and not np.isnan(loss).any()


# --- mixtures of teachers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_mixture_is_the_textbooks(divergence):
    for seed, (V, T, alpha, K) in enumerate([(5, 1.0, 0.0, 1), (70, 3.0, 0.4, 3), (1, 2.0, 0.5, 2)]):
        s, _, y = problem(2, V, seed)
        teachers = [problem(2, V, 10 + k, 2.0 + 3 * k)[1] for k in range(K)]
        shares = np.random.default_rng(seed).dirichlet(np.ones(K), 2)
        assert_mixture(s, teachers, shares, y, T, alpha, call=mixture, divergence=divergence)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixture_in_every_dtype(dtype):
    for seed, teacher_dtype in enumerate(DTYPES):
        s, _, y = problem(2, 37, seed, dtype=dtype)
        teachers = [problem(2, 37, 10 + k, teacher_dtype=teacher_dtype)[1] for k in range(2)]
        kind = {"divergence": "jsd"} if seed == 1 else {}
        assert_mixture(s, teachers, [0.7, 0.3], y, 2.0, 0.3, call=mixture, **kind)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "alpha"])
def test_a_wild_mixture(divergence):
    s, _, y = problem(4, 9, scale=1e4)
    teachers = [problem(4, 9, 1 + k, 1e4)[1] for k in range(3)]
    teachers[0][0, 2:5] = teachers[1][0, 4:] = -INF
    teachers[2][1, 1:] = -INF
    for t in teachers:
        t[2, 3] = -INF  # all of them: p = 0
        t[3] += 1e4
    s[2, 3] = -INF
    shares = np.array([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3], [0.0, 1e-300, 1.0]])
    for T in (0.05, 20.0):
        assert_mixture(s, teachers, shares, y, T, 0.3, call=mixture, divergence=divergence)


def test_a_class_that_all_teachers_nearly_rule_out_keeps_its_log_ratio():
    s = np.array([0.0, -1.0])
    teachers = [np.array([0.0, -2000.0]), np.array([0.0, -1500.0])]  # exp underflows
    loss = mixture(s, teachers, None, 1.0, 0.0, divergence="reverse_kl").loss
    q = oracle.softmax(s)
    exact = (q * np.log(q)).sum() - q[1] * (np.log(np.longdouble(0.5)) - 1500)
    assert abs(loss - exact) < 1e-12 * exact


def test_how_shares_are_given():
    """Numbers, or an array on the device of all rows or for each; a teacher without a share is not read."""
    s, t, y = problem(2, 6)
    teachers = teachers_of(t)
    whole = kdcore.mixture_kd_loss_and_gradient(s, teachers, y, 2.0, 0.2, teacher_weights=[0.5, 0.2, 0.3])
    stacked = np.stack(teachers)
    for shares in ([0.5, 0.2, 0.3], (0.5, 0.2, 0.3), np.array([0.5, 0.2, 0.3]), np.array([[0.5, 0.2, 0.3]] * 2)):
        assert_near(mixture(s, teachers, y, 2.0, 0.2, teacher_weights=shares, validate=True), whole)
        assert_near(mixture(s, stacked, y, 2.0, 0.2, teacher_weights=shares), whole)
    # Sums are divided by.
    shares = np.array([[0.5, 0.2, 0.3]] * 2) * (1 + 5e-7)
    assert_near(mixture(s, teachers, y, 2.0, 0.2, teacher_weights=shares), whole)
    shares = np.array([0.5, 0.2, 0.3], np.float32)
    near = mixture(s, teachers, y, 2.0, 0.2, teacher_weights=shares)
    np.testing.assert_allclose(near.gradient, whole.gradient, atol=1e-7)
    equal = kdcore.mixture_kd_loss_and_gradient(s, teachers, y, 2.0, 0.2)
    assert_near(mixture(s, teachers, y, 2.0, 0.2), equal)
    nothing = np.full_like(t, NAN)
    one = mixture(s, [t], y, 2.0, 0.2)
    for shares in ([0, 1, 0], np.array([0.0, 1.0, 0.0])):
        alone = mixture(s, [nothing, t, nothing], y, 2.0, 0.2, teacher_weights=shares, validate=True)
        for a, b in zip(alone, one, strict=True):
            same_bits(a, b)


def test_shares_that_cannot_be_used():
    s, t, y = problem(3, 5)
    lead = s.reshape(3, 1, 5), [t.reshape(3, 1, 5)] * 2, y.reshape(3, 1)

    def call(shares, **options):
        return mixture(*lead, 1.0, 0.5, teacher_weights=shares, **options)

    for row, words in [
        ([1.5, -0.5], r"teacher_weights\[1, 0, 1\] is -0.5, not a finite"),
        ([NAN, 1.0], r"teacher_weights\[1, 0, 0\] is nan"),
        ([0.0, INF], r"teacher_weights\[1, 0, 1\] is inf"),
        ([0.5, 0.4], r"teacher_weights\[1, 0\] must add up to 1 within 1e-06, but its sum is 0.9"),
        ([0.5, 0.5 + 3e-6], r"teacher_weights\[1, 0\] must add up to 1"),
    ]:
        shares = np.array([[0.5, 0.5], row, [0.5, 0.5]])
        with pytest.raises(kdcore.DomainError, match=words):
            call(shares.reshape(3, 1, 2), validate=True)
        result = call(shares.reshape(3, 1, 2), reduction="none")
        assert np.isnan(result.loss[:, 0]).tolist() == [False, True, False]
        assert np.isnan(result.gradient[:, 0]).all(axis=1).tolist() == [False, True, False]
        with pytest.raises(kdcore.DomainError, match=words.replace("1, 0, ", "").replace(r"\[1, 0\]", "")):
            call(np.array(row), validate=True)
        assert np.isnan(call(np.array(row), reduction="none").loss).all()
        with pytest.raises(kdcore.DomainError, match=words.replace("1, 0, ", "").replace(r"\[1, 0\]", "")):
            call(row)  # numbers are checked at once
        masked = np.array([[1.0], [0.0], [1.0]])
        assert np.isfinite(call(shares.reshape(3, 1, 2), weights=masked, validate=True).loss)
    for shares, error, words in [
        ([1.0], kdcore.ShapeError, r"teacher_weights must have shape \(2,\)"),
        (np.ones(3), kdcore.ShapeError, r"\(3, 1, 2\), got \(3,\)"),
        (np.array([1, 0]), kdcore.DTypeError, "teacher_weights must be float32 or float64 on a device, got dtype int"),
        ([[0.5, 0.5]] * 3, kdcore.DTypeError, r"teacher_weights\[0\] must be a number, or .* an array on the device"),
    ]:
        with pytest.raises(error, match=words):
            call(shares)
    logits, four = put(np.zeros((2, 2, 3), F32)), put(np.zeros((2, 2), np.int64))
    with pytest.raises(kdcore.ShapeError, match=r"teacher_weights must have rows that follow .* \(64, 16, 8\)"):
        kdcore.mixture_kd_loss_and_gradient(
            logits, [logits] * 2, four, 1.0, 0.5, teacher_weights=put(np.full((4, 4, 2), 0.5))[:2, :2]
        )
    strided = put(np.array([[0.5, 0.5, NAN]] * 3))[:, :2]
    assert_near(mixture(s, [t] * 2, y, 1.0, 0.5, teacher_weights=strided), mixture(s, [t], y, 1.0, 0.5))
    with pytest.raises(kdcore.DeviceMismatchError, match="teacher_weights not"):
        kdcore.mixture_kd_loss_and_gradient(*(put(s), [put(t)], put(y)), 1.0, 0.5, teacher_weights=np.ones(1))


def test_teachers_that_cannot_be_used():
    s, t, y = problem(3, 5)
    for value, words in [(NAN, r"teachers\[1\]\[2, 3\] is nan"), (INF, r"teachers\[1\]\[2, 3\] is \+inf")]:
        bad = t.copy()
        bad[2, 3] = value
        for teachers, k in (([t, bad], 1), ([t, bad, bad], 1), ([bad, bad], 0)):  # the first of several is named
            with pytest.raises(kdcore.NonFiniteError, match=words.replace("1", str(k))):
                mixture(s, teachers, y, 1.0, 0.5, validate=True)
            result = mixture(s, teachers, y, 1.0, 0.5, reduction="none")
            assert np.isnan(result.loss).tolist() == [False, False, True]
            assert np.isnan(result.gradient).all(axis=1).tolist() == [False, False, True]
    bad[2] = -INF
    with pytest.raises(kdcore.NonFiniteError, match=r"teachers\[0\]\[2\] is -inf in every class"):
        mixture(s, [bad, t], y, 1.0, 0.5, validate=True)
    s[1, 0] = NAN  # the first bad row is named
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[1, 0\]"):
        mixture(s, [bad, t], y, 1.0, 0.5, validate=True)


def test_a_reverse_kl_that_leaves_no_gradient():
    s, t = np.zeros((1, 3)), np.array([[0.0, -INF, 1.0]])
    for call in (partial(mixture, s, [t, t]), partial(standardized, np.array([[0.0, 1.0, 3.0]]), t)):
        result = call(None, 1.0, 0.0, divergence="reverse_kl")
        assert result.loss == INF and np.isnan(result.gradient).all()
        with pytest.raises(kdcore.UndefinedGradientError, match="reverse_kl"):
            call(None, 1.0, 0.0, divergence="reverse_kl", validate=True)
    t = np.array([[0.0, -INF, 1.0, 0.5]])
    hard = standardized(np.array([[0.0, 1.0, 3.0, -INF]]), t, [0], 1.0, 0.5, divergence="reverse_kl")
    assert hard.loss == INF and np.isnan(hard.gradient).all() and np.isfinite(hard.ce)


# --- standardised logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_standardised_kd_is_the_textbooks(divergence):
    for seed, (V, T, alpha, scale) in enumerate([(2, 1.0, 0.0, 1.0), (33, 3.0, 0.4, 30.0), (140, 0.7, 0.1, 1e-3)]):
        s, t, y = problem(2, V, seed, scale)
        s[1] += 1e3
        result = standardized(s, t, y, T, alpha, divergence=divergence, reduction="none", validate=True)
        rows = [standardized_row(*row, T, alpha, divergence) for row in zip(s, t, y, strict=True)]
        assert_rows(result, s, rows, alpha)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standardised_kd_in_every_dtype(dtype):
    for seed, teacher_dtype in enumerate(DTYPES):
        s, t, y = problem(2, 37, seed, dtype=dtype, teacher_dtype=teacher_dtype)
        result = standardized(s, t, y, 2.0, 0.3, reduction="none")
        assert_rows(result, s, [standardized_row(*row, 2.0, 0.3) for row in zip(s, t, y, strict=True)], 0.3)
        assert result.gradient.dtype == dtype


def test_standardised_logits_of_any_size():
    s, t, y = problem(1, 9)
    small = standardized(s, t, y, 2.0, 0.0)
    for size in (1e-300, 1e100, 1e306):
        assert_near(standardized(s, t * size, y, 2.0, 0.0), small)
        scaled = standardized(s * size, t, y, 2.0, 0.0)
        assert_near([scaled.loss, scaled.gradient * size], small[:2])


def test_standardised_kd_where_classes_are_ruled_out():
    s, t, y = problem(4, 9)
    s[0, [2, 3]] = t[0, [2, 3]] = -INF
    t[1, [1, 4]] = -INF  # p = 0
    s[2, 5] = -INF  # forward KL is +inf
    s[3, 2:], t[3, 2:] = -INF, -INF
    y[:] = 0
    for alpha in (0.0, 0.4):
        result = standardized(s, t, y, 2.0, alpha, reduction="none", validate=True)
        assert_rows(result, s, [standardized_row(s[i], t[i], 0, 2.0, alpha) for i in range(4)], alpha)
        assert np.isposinf(result.loss).tolist() == [False, False, True, False]
        assert not result.gradient[np.isneginf(s)].any()
    y[2] = 5  # the label itself: CE has its gradient
    hard = standardized(s, t, y, 2.0, 0.4, reduction="none")
    assert hard.ce[2] == INF and abs(hard.gradient[2, 5] + 0.4) < 1e-15


def test_a_row_without_deviation_is_an_error():
    s, t, _ = problem(3, 4)
    y = np.zeros(3, int)
    flat = t.copy()
    flat[1] = 0.1
    one = t.copy()
    one[2, 1:] = -INF
    for bad, row in ((flat, 1), (one, 2)):
        with pytest.raises(kdcore.DomainError, match=rf"teacher_logits\[{row}\] has no deviation"):
            standardized(s, bad, y, 1.0, 0.5, validate=True)
        with pytest.raises(kdcore.DomainError, match=rf"student_logits\[{row}\] has no deviation"):
            standardized(bad, t, y, 1.0, 0.5, validate=True)
        for pair in ((bad, t), (s, bad)):
            result = standardized(*pair, y, 1.0, 0.5, reduction="none")
            assert np.flatnonzero(np.isnan(result.loss)).tolist() == [row]
            assert np.flatnonzero(np.isnan(result.gradient).all(axis=1)).tolist() == [row]
        y_masked = np.where(np.arange(3) == row, -100, y)
        assert math.isfinite(standardized(bad, bad, y_masked, 1.0, 0.5, validate=True).loss)
        assert math.isfinite(standardized(bad, bad, y, 1.0, 1.0, validate=True).loss)


# --- all of them ---------------------------------------------------------------------------------------------------


@variants
def test_the_gradient_is_the_derivative_of_the_returned_loss(variant):
    """By finite differences; the class that is moved differs from row to row, so that a batch is enough."""
    s, t, y = problem(1, 4, scale=2.0)
    s, t, y, step = np.repeat(s, 8, axis=0), np.repeat(t, 8, axis=0), np.repeat(y, 8), 1e-5
    moved = s + np.concatenate([np.eye(4), -np.eye(4)]) * step
    for kind in [{}] if variant is dkd else [{}, {"divergence": "jsd"}]:
        up, down = variant(moved, t, y, 1.7, 0.3, reduction="none", **kind).loss.reshape(2, 4)
        gradient = variant(s[:1], t[:1], y[:1], 1.7, 0.3, **kind).gradient[0]
        assert np.abs((up - down) / (2 * step) - gradient).max() < 2e-8 * (1 + np.abs(gradient).max())


@st.composite
def wild(draw):
    """A batch of 2 rows: logits of a size each, classes ruled out of either or of both, and a temperature."""
    V, sizes = draw(st.integers(2, 12)), st.sampled_from([1e-3, 1.0, 30.0, 1e4])
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    s, t = (rng.normal(size=(2, V)) * draw(sizes) for _ in range(2))
    for x in (s, t):
        x[rng.random((2, V)) < draw(st.sampled_from([0.0, 0.0, 0.3]))] = -INF
        x[:, 0], x[:, 1] = rng.normal(size=(2, 2))  # a row keeps support, and a deviation
    T, alpha = draw(st.sampled_from([0.3, 1.0, 2.0, 3.0, 4.0])), draw(st.sampled_from([0.0, 0.3]))
    return s, t, rng.integers(V, size=2), T, alpha


@variants
@settings(max_examples=10)
@given(problem=wild())
def test_both_engines_agree(variant, problem):
    s, t, y, T, alpha = problem
    host = HOST[variant](s, t, y, T, alpha, reduction="none")
    device = variant(s, t, y, T, alpha, reduction="none", validate=True)
    spread = 1.0
    if variant is standardized:
        z = [(x - x[x > -INF].mean()) / x[x > -INF].std() for x in (*s, *t)]
        spread = 1 + max(np.abs(row[row > -INF]).max() for row in z) / T
        spread /= min(row[row > -INF].std() for row in s)
    for name in ("loss", "ce", "kl"):
        a, b = getattr(host, name), getattr(device, name)
        if a is not None:
            size = bounds.RELATIVE_LOSS["float64"] * np.where(np.isfinite(a), np.abs(a), 0)
            assert bounds.within(b, a, 2 * (size + bounds.GRADIENT["float64"] * 9 * (1 + T * T) * (1 + spread))).all()
    np.testing.assert_array_equal(np.isnan(device.gradient), np.isnan(host.gradient))
    limit = 2 * bounds.GRADIENT["float64"] * 20 * (1 + T) * (1 + spread)
    assert np.nanmax(np.abs(device.gradient - host.gradient), initial=0.0) <= limit


@variants
def test_reductions_weights_and_masks(variant):
    s, t, y = problem(5, 7)
    weights = np.array([1.0, 0.0, 2.0, 0.5, 3.0])
    masked = y.copy()
    masked[2] = -1
    bad_s, bad_t = s.copy(), t.copy()
    bad_s[1:3], bad_t[1:3] = NAN, INF  # not read
    for options in ({}, {"reduction": "sum"}, {"denominator": 4.0}, {"reduction": "none"}):
        options |= {"weights": weights, "ignore_index": -1}
        host = HOST[variant](bad_s, bad_t, masked, 2.0, 0.3, **options)
        result = variant(bad_s, bad_t, masked, 2.0, 0.3, validate=True, **options)
        assert_near(result, host)
        assert not result.gradient[1:3].any()
    nothing = variant(s, t, np.full(5, -100), 2.0, 0.3)
    assert nothing.loss == nothing.ce == nothing.kl == 0.0 and not nothing.gradient.any()
    empty = variant(s[:0], t[:0], y[:0], 2.0, 0.3)
    assert empty.loss == 0.0 and empty.gradient.shape == (0, 7)


@variants
def test_the_ends_of_alpha(variant):
    s, t, y = problem(3, 6)
    t[1, 2] = NAN
    hard = variant(s, t, y, 2.0, 1.0)
    with plans.using(threads=32):
        plain = kdcore.kd_loss_and_gradient(put(s), None, put(y), 2.0, 1.0)
    assert hard.kl is None
    same_bits(hard.loss, get(plain.loss))
    same_bits(hard.gradient, get(plain.gradient))
    t[1, 2] = 0.0
    s[0, y[0]] = t[0, y[0]] = -INF  # CE is +inf, and at alpha = 0 not there
    soft = variant(s, t, y, 2.0, 0.0)
    assert soft.ce is None and soft.loss == soft.kl and math.isfinite(soft.loss)


@variants
@pytest.mark.parametrize("dtype", [F32, BFLOAT16], ids=str)
def test_where_the_gradient_goes_and_how_inputs_lie(variant, dtype):
    s, t, y = problem(4, 20, dtype=dtype)
    whole = variant(s, t, y, 2.0, 0.3, reduction="none")

    def call(s, t, y=y, **options):
        """Of arrays that are on the device."""
        function, teachers = variant, t
        if variant is mixture_of_three:
            function = partial(mixture, teacher_weights=[0.5, 0.2, 0.3])
            teachers = [t, put(teachers_of(problem(4, 20, dtype=dtype)[1])[1]), t] if t.ndim == 2 else t
        return function(s, teachers, y, 2.0, 0.3, reduction="none", **options)

    def check(result, gradient=None):
        same_bits(result.loss.reshape(4), whole.loss)
        same_bits(
            np.ascontiguousarray(result.gradient if gradient is None else gradient).reshape(4, 20), whole.gradient
        )

    place = put(s)
    result = call(place, put(t), out=place)
    check(result, get(place))
    wide = np.zeros((2, 4, 40), dtype)
    wide[0, :, ::2], wide[1, :, ::2] = s, t
    wide = put(wide)
    check(call(wide[0, :, ::2], wide[1, :, ::2]))
    shifted = put(np.concatenate([np.zeros(1, dtype), s.reshape(-1)]))[1:].reshape(s.shape)  # rows that are not aligned
    check(call(shifted, put(t)))
    out = put(np.zeros((4, 40), dtype))[:, ::2]
    check(call(put(s), put(t), out=out))
    wider = call(put(s), put(t), out=put(np.empty((4, 20))))
    assert wider.gradient.dtype == np.float64
    same_bits(wider.gradient.astype(dtype), whole.gradient)


@variants
def test_leading_shapes(variant):
    s, t, y = problem(4, 11)
    whole = variant(s, t, y, 2.0, 0.3, reduction="none")
    cube = variant(s.reshape(2, 2, 11), t.reshape(2, 2, 11), y.reshape(2, 2), 2.0, 0.3, reduction="none")
    same_bits(cube.loss, whole.loss.reshape(2, 2))
    same_bits(cube.gradient, whole.gradient.reshape(2, 2, 11))
    one = variant(s[2], t[2], y[2], 2.0, 0.3)
    same_bits(one.loss, whole.loss[2])
    same_bits(one.gradient, whole.gradient[2])

    def turned(x):  # rows that cannot be merged
        return put(x.reshape(2, 2, 11)).transpose((1, 0, 2))

    function, teacher, shares = variant, turned(t), {}
    if variant is mixture_of_three:
        function, teacher = mixture, list(map(turned, teachers_of(t)))
        shares = {"teacher_weights": np.random.default_rng(0).dirichlet(np.ones(3), (2, 2))}
    back = function(turned(s), teacher, y.reshape(2, 2).T.copy(), 2.0, 0.3, reduction="none", **shares)
    if shares:
        flat = shares["teacher_weights"].transpose(1, 0, 2).reshape(4, 3)
        whole = mixture(s, teachers_of(t), y, 2.0, 0.3, reduction="none", teacher_weights=flat)
    same_bits(back.loss, whole.loss.reshape(2, 2).T.copy())


@variants
def test_no_bit_depends_on_how_many_rows_there_are(variant, monkeypatch):
    s, t, y = problem(5, 13, dtype=F32)
    t[1, 2] = NAN
    function = partial(variant, s, t)
    if variant is mixture_of_three:
        shares = np.random.default_rng(0).dirichlet(np.ones(3), 5)
        function = partial(mixture, s, teachers_of(t), teacher_weights=shares)
    whole = function(y, 2.0, 0.3, reduction="none")
    assert np.isnan(whole.loss).tolist() == [False, True, False, False, False]
    buffers, scratch = [], engine.scratch
    monkeypatch.setattr(engine, "scratch", lambda shape, *of: buffers.append(shape) or scratch(shape, *of))
    monkeypatch.setattr(engine, "_CHUNK", 30)  # two rows at a time
    for a, b in zip(function(y, 2.0, 0.3, reduction="none"), whole, strict=True):
        same_bits(a, b)
    assert {dkd: 0, mixture_of_three: 1, standardized: 3}[variant] == buffers.count((2, 13))
    assert max((math.prod(shape) for shape in buffers), default=0) <= 30
    with pytest.raises(kdcore.NonFiniteError, match=r"teacher.*\[1, 2\] is nan"):
        function(y, 2.0, 0.3, validate=True)
    if variant is not mixture_of_three:
        part = variant(s[2:4], t[2:4], y[2:4], 2.0, 0.3, reduction="none")
        for a, b in zip(part, whole, strict=True):
            same_bits(a, b[2:4])


@variants
def test_rows_that_cannot_be_used(variant):
    """They are NaN, no other is, and under validate=True the first of them is an error that names it."""
    s, t, _ = problem(8, 5, scale=1.0)
    y = np.full(8, 2)
    values = {1: NAN, 2: INF, 3: NAN, 4: INF, 5: -INF}
    for who in ("student_logits", "teacher"):
        bad = [s.copy(), t.copy()]
        for row, value in values.items():  # of the label, of another class, and a row without support
            bad[who == "teacher"][row, 2 if row < 3 else 0 if row < 5 else slice(None)] = value
        result = variant(*bad, y, 2.0, 0.3, reduction="none")
        assert np.isnan(result.loss).tolist() == [row in values for row in range(8)]
        assert np.isnan(result.gradient).all(axis=1).tolist() == [row in values for row in range(8)]
        assert not np.isnan(result.gradient[[0, 6, 7]]).any()
        for row, words in [
            (1, r"\[0, 2\] is nan"), (2, r"\[0, 2\] is \+inf"), (3, r"\[0, 0\] is nan"), (4, r"\[0, 0\] is \+inf"),
            (5, r"\[0\] is -inf in every class"),
        ]:  # fmt: skip
            with pytest.raises(kdcore.NonFiniteError, match=rf"^{who}\S*{words}"):
                variant(bad[0][row : row + 2], bad[1][row : row + 2], y[:2], 2.0, 0.3, validate=True)
    labels, weights = np.array([2, 9, -3, 2, 2, 2, 2, 2]), np.array([1.0, 1.0, 1.0, -1.0, NAN, INF, 1.0, 1.0])
    result = variant(s, t, labels, 2.0, 0.3, reduction="none", weights=weights)
    for part in (*result, result.gradient.sum(axis=1)):
        if part is not result.gradient:
            assert np.isnan(part).tolist() == [False, True, True, True, True, True, False, False]
    for row, error, words in [
        (1, kdcore.LabelError, r"labels\[0\] is 9"),
        (2, kdcore.LabelError, r"labels\[0\] is -3"),
        (3, kdcore.DomainError, r"^weights\[0\] is not a finite number"),
    ]:
        with pytest.raises(error, match=words):
            variant(s[:1], t[:1], labels[row : row + 1], 2.0, 0.3, validate=True, weights=weights[row : row + 1])


@variants
def test_nothing_waits_for_the_device_unless_asked(variant, monkeypatch):
    def wait(*arguments):
        raise RuntimeError("waits")

    s, t, y = problem(2, 4)
    monkeypatch.setattr(cuda, "synchronize", wait)
    monkeypatch.setattr(memory, "to_host", wait)
    assert np.isfinite(variant(s, t, y, 2.0, 0.3).loss)
    with pytest.raises(RuntimeError, match="waits"):
        variant(s, t, y, 2.0, 0.3, validate=True)


@variants
def test_bfloat16_needs_a_device_that_converts_to_it(variant, monkeypatch):
    s, t, y = problem(2, 4, dtype=F32)
    monkeypatch.setattr(plans, "_of_device", lambda name: 7)
    variant(s, t, y, 2.0, 0.3)
    for pair in ((s.astype(BFLOAT16), t), (s, t.astype(BFLOAT16))):
        with pytest.raises(kdcore.DeviceUnavailableError, match="bfloat16"):
            variant(*pair, y, 2.0, 0.3)


@variants
def test_mixes_and_streams(variant):
    s, t, y = problem(2, 4)
    expected = HOST[variant](s, t, y, 2.0, 0.3)
    stream = cuda.stream()
    assert_near(variant(s, t, y, 2.0, 0.3, stream=stream), expected)
    function = {
        dkd: kdcore.dkd_loss_and_gradient,
        mixture_of_three: lambda s, t, *rest, **options: kdcore.mixture_kd_loss_and_gradient(s, [t], *rest, **options),
        standardized: kdcore.standardized_kd_loss_and_gradient,
    }[variant]
    for arrays, words in [
        ((put(s), t, put(y)), r"student_logits, labels on a device, teacher\S* not"),
        ((put(s), put(t), y), "labels not"),
        ((s, put(t), y), r"teacher\S* on a device, student_logits, labels not"),
    ]:
        with pytest.raises(kdcore.DeviceMismatchError, match=words):
            function(*arrays, 2.0, 0.3)
    with pytest.raises(kdcore.DeviceMismatchError, match="weights not"):
        function(put(s), put(t), put(y), 2.0, 0.3, weights=np.ones(2))
    with pytest.raises(kdcore.DomainError, match="threads=2 is for host arrays"):
        function(put(s), put(t), put(y), 2.0, 0.3, threads=2)
    teacher = put(t)
    with pytest.raises(kdcore.AliasError, match="out overlaps teacher"):
        function(put(s), teacher, put(y), 2.0, 0.3, out=teacher)


def test_teachers_in_one_array_of_the_wrong_kind():
    s, t, y = (put(x) for x in problem(2, 4))
    for teachers, error, words in [
        (put(np.zeros((2, 3, 4))), kdcore.ShapeError, r"teachers\[0\] must have shape \(2, 4\)"),
        (put(np.zeros((0, 2, 4))), kdcore.ShapeError, "at least one"),
        (put(np.array(1.0)), kdcore.DTypeError, "0-d"),
        ([t, put(np.zeros((2, 4), np.float32))], kdcore.DTypeError, r"one dtype.*teachers\[1\]"),
    ]:
        with pytest.raises(error, match=words):
            kdcore.mixture_kd_loss_and_gradient(s, teachers, y, 1.0, 0.5)
    with pytest.raises(kdcore.DeviceMismatchError, match=r"teachers\[0\], teachers\[1\] on a device, student_logits"):
        kdcore.mixture_kd_loss_and_gradient(np.zeros((2, 4)), put(np.zeros((2, 2, 4))), None, 1.0, 0.0)
