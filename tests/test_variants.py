"""Decoupled KD, mixtures of teachers and standardised logits, against textbooks of their own in longdouble."""

from __future__ import annotations

import math
from functools import partial

import ml_dtypes
import numpy as np
import oracle
import pytest
from comparisons import same_bits

import kdcore
from kdcore.testing import bounds

dkd = kdcore.dkd_loss_and_gradient
mixture = kdcore.mixture_kd_loss_and_gradient
standardized = kdcore.standardized_kd_loss_and_gradient

INF = np.inf
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
REAL = np.longdouble
DIVERGENCES = list(oracle.DIVERGENCES)


def mixture_of_one(s, t, *arguments, **options):
    return mixture(s, [t], *arguments, **options)


def mixture_of_three(s, t, *arguments, **options):
    """The teacher, twice, and one that differs."""
    other = (0.5 * np.asarray(t).astype(float) + np.cos(np.arange(t.shape[-1]))).astype(t.dtype)
    return mixture(s, [t, other, t], *arguments, teacher_weights=[0.5, 0.2, 0.3], **options)


VARIANTS = [dkd, mixture_of_three, standardized]
variants = pytest.mark.parametrize("variant", VARIANTS, ids=["dkd", "mixture", "standardized"])


def problem(B, V, seed=0, scale=3.0, dtype=np.float64, teacher_dtype=None):
    rng = np.random.default_rng(seed)
    s, t = rng.normal(size=(2, B, V)) * scale
    return s.astype(dtype), t.astype(teacher_dtype or dtype), rng.integers(V, size=B)


# --- the textbooks, of one row -------------------------------------------------------------------------------------


def norm(x):
    return np.sqrt(np.square(x).sum())


def logsumexp(x):
    m = x.max() if x.size else -INF
    return m if np.isneginf(m) else m + np.log(np.exp(x - m).sum())


def kl_of(log_p, log_q):
    """sum of p (log p - log q) over what p allows."""
    allowed = log_p > -INF
    return (np.exp(log_p[allowed]) * (log_p[allowed] - log_q[allowed])).sum()


def dkd_row(s, t, y, T, alpha, target=1.0, nontarget=8.0, scale_t2=True):
    """Loss, gradient, CE, T² D, and the sizes that the bounds of the gradient and of T² D are in.

    Gradients are from TCKD = const - p_y s_y / T - (1 - p_y) logsumexp of the others + logsumexp of all, and NCKD =
    const - sum of p' s / T + logsumexp of the others.
    """
    s, t, T = oracle.real(s), oracle.real(t), REAL(T)
    others, onehot = np.arange(s.size) != y, np.arange(s.size) == y
    log_q, log_p = oracle.log_softmax(s, T), oracle.log_softmax(t, T)
    two_p = np.array([log_p[y], logsumexp(log_p[others])])
    two_q = np.array([log_q[y], logsumexp(log_q[others])])
    tckd = kl_of(two_p, two_q)
    q_others, p_others = np.zeros_like(s), np.zeros_like(s)
    nckd, slope = REAL(0), np.zeros_like(s)
    if np.isneginf(two_q[1]):
        assert np.isneginf(two_p[1])
    else:
        q_others[others] = oracle.softmax(s[others], T)
        slope = (np.exp(log_q) - np.exp(two_p[0]) * onehot - np.exp(two_p[1]) * q_others) * REAL(target)
        if not np.isneginf(two_p[1]):
            p_others[others] = oracle.softmax(t[others], T)
            nckd = kl_of(oracle.log_softmax(t[others], T), oracle.log_softmax(s[others], T))
            slope = slope + REAL(nontarget) * (q_others - p_others)
    k = T**2 if scale_t2 else REAL(1)
    kl = k * sum((w * x for w, x in ((REAL(target), tckd), (REAL(nontarget), nckd)) if w), REAL(0))
    h = oracle.softmax(s)
    ce = oracle.cross_entropy(s, y)
    loss = sum((w * x for w, x in ((REAL(alpha), ce), (1 - REAL(alpha), kl)) if w), REAL(0))
    gradient = alpha * (h - onehot) + (1 - REAL(alpha)) * k / T * slope
    size = nontarget * (norm(p_others) + norm(q_others)) + target * (1 + norm(q_others)) * (
        np.exp(log_q[y]) + np.exp(log_p[y])
    )
    allowed = alpha * (norm(h) + 1) + (1 - alpha) * k / T * size, k * (target + nontarget)
    return loss, gradient, ce, kl, allowed


def mixed_logs(teachers, shares, T):
    """log of the sum of w softmax(t / T)."""
    log_p = np.full(np.shape(teachers[0]), -INF, REAL)
    for t, w in zip(teachers, shares, strict=True):
        if w:
            log_p = np.logaddexp(log_p, np.log(REAL(w)) + oracle.log_softmax(t, T))
    return log_p


def standard(x):
    """z and the deviation; -inf stays."""
    x = oracle.real(x)
    finite = x > -INF
    std = np.sqrt(np.square(x[finite] - x[finite].mean()).mean())
    return (x - x[finite].mean()) / std, std


def standardized_row(s, t, y, T, alpha, divergence="forward_kl"):
    z, std = standard(s)
    z_t, _ = standard(t)
    soft = oracle.kd_row(z, z_t, None, T, 0.0, divergence)
    f = z > -INF
    n = f.sum()
    jacobian = (np.eye(n) - np.ones((n, n)) / n - np.outer(z[f], z[f]) / n) / std
    gradient = np.zeros(s.shape, REAL)
    gradient[f] = jacobian @ soft.gradient[f]
    gradient *= 1 - REAL(alpha)
    ce, loss = REAL(0), (1 - REAL(alpha)) * soft.loss
    if alpha:
        hard = oracle.kd_row(s, t, y, T, 1.0)
        ce, loss, gradient = hard.loss, loss + alpha * hard.loss, gradient + alpha * hard.gradient
    spread = 1 + max(np.abs(z[f]).max(), np.abs(z_t[z_t > -INF]).max()) / T
    kinds = {"temperature": T, "scale": 1.0, "divergence": divergence}
    allowed = bounds.kd_bounds(z.astype(float), z_t.astype(float), soft.loss, alpha=0.0, **kinds).gradient / std
    h = oracle.softmax(s)
    gradient_size = (1 - alpha) * allowed / bounds.GRADIENT["float64"] * spread + alpha * (norm(h) + 1)
    return loss, gradient, ce, soft.loss, (gradient_size, T * T * spread)


def assert_rows(result, s, rows, alpha):
    """A result with reduction="none" against rows of a textbook."""
    name = bounds.working_dtype(s.dtype)
    exact = [np.array([row[k] for row in rows]) for k in range(4)]
    sizes = np.array([row[4] for row in rows], REAL).T
    error = bounds.gradient_error(result.gradient, exact[1], s.dtype)
    limit = bounds.GRADIENT[name] * sizes[0]
    assert (error <= limit).all(), ("gradient", error / limit)
    for what, values, size in (
        ("loss", exact[0], alpha + (1 - alpha) * sizes[1]),
        ("ce", exact[2], 1.0),
        ("kl", exact[3], sizes[1]),
    ):
        actual = getattr(result, what)
        if actual is not None:
            tolerance = bounds.RELATIVE_LOSS[name] * np.where(np.isfinite(values), np.abs(values), 0)
            limit = tolerance + bounds.GRADIENT[name] * size
            assert bounds.within(actual, values, limit).all(), (what, actual, values)


def assert_derivative(call, s, t, y, step=1e-5, tolerance=2e-8):
    """The gradient of the returned loss by finite differences, at finite logits."""

    def loss(x):
        return call(x, t, y, 1.7, 0.3).loss

    gradient = call(s, t, y, 1.7, 0.3).gradient
    for index in zip(*np.nonzero(np.isfinite(s)), strict=True):
        up, down = s.copy(), s.copy()
        up[index] += step
        down[index] -= step
        slope = (loss(up) - loss(down)) / (2 * step)
        assert abs(slope - gradient[index]) < tolerance * (1 + abs(gradient).max()), index


# --- decoupled -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [2, 3, 17, 257, 4099])
def test_dkd_is_the_textbooks(dtype, V):
    for seed, (T, alpha, scale) in enumerate([(1.0, 0.0, 1.0), (4.0, 0.3, 10.0), (2.0, 0.9, 30.0), (0.7, 0.5, 0.1)]):
        s, t, y = problem(3, V, seed, scale, dtype, DTYPES[seed])
        factors = {"target": 1.0, "nontarget": 8.0} if seed % 2 else {"target": 0.5, "nontarget": 2.0}
        result = dkd(
            s, t, y, T, alpha, target_weight=factors["target"], nontarget_weight=factors["nontarget"], reduction="none"
        )
        assert_rows(result, s, [dkd_row(*row, T, alpha, **factors) for row in zip(s, t, y, strict=True)], alpha)
        assert result.gradient.dtype == dtype


def test_dkd_without_t2():
    s, t, y = problem(3, 9)
    result = dkd(s, t, y, 3.0, 0.2, scale_t2=False, reduction="none")
    assert_rows(result, s, [dkd_row(*row, 3.0, 0.2, scale_t2=False) for row in zip(s, t, y, strict=True)], 0.2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gap", [30.0, 200.0, 1e4])
def test_dkd_of_a_student_that_is_confidently_wrong_or_right(dtype, gap):
    for T in (1.0, 4.0, 0.3):
        for sign_s in (1, -1):
            for sign_t in (1, -1):
                s, t, _ = problem(2, 5, dtype=dtype, scale=1.0)
                s[:, 0], t[:, 0] = sign_s * gap, sign_t * gap
                s[1], t[1] = -s[1], -t[1]
                result = dkd(s, t, [0, 0], T, 0.4, reduction="none")
                assert np.isfinite(result.loss).all()
                assert np.isfinite(result.gradient.astype(float)).all()
                assert_rows(result, s, [dkd_row(s[i], t[i], 0, T, 0.4) for i in range(2)], 0.4)


def test_dkd_knows_how_sure_both_are():
    """q_y - p_y of log-odds 50 and 60, where both are 1 in float64, and of -50 and -60."""
    for sign, exact in ((1, math.exp(-60) - math.exp(-50)), (-1, math.exp(-50) - math.exp(-60))):
        s, t = np.array([sign * 50.0, 0.0]), np.array([sign * 60.0, 0.0])
        result = dkd(s, t, 0, 1.0, 0.0, nontarget_weight=0.0)
        np.testing.assert_allclose(result.gradient, [exact, -exact], rtol=1e-13)
        kl = math.log1p(math.exp(-50)) - math.log1p(math.exp(-60)) - 10 * math.exp(-60)
        np.testing.assert_allclose(result.loss, kl, rtol=1e-12)


def test_dkd_with_its_weights_by_row_is_plain_kd():
    s, t, y = problem(6, 33, scale=2.0)
    s[1, [4, 7]] = t[1, [4, 7]] = -INF
    y[1] = 3
    t[2, 5] = -INF
    y[2] = 6
    for T, alpha in ((1.0, 0.0), (3.0, 0.25)):
        for i in range(6):
            rest = float(1 - oracle.softmax(t[i], T)[y[i]])
            parts = dkd(s[i], t[i], y[i], T, alpha, nontarget_weight=rest)
            whole = kdcore.kd_loss_and_gradient(s[i], t[i], y[i], T, alpha)
            for a, b in zip(parts, whole, strict=True):
                if b is not None:
                    np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)


def test_dkd_of_one_class_is_zero():
    result = dkd(np.ones((2, 1)), np.zeros((2, 1)), [0, 0], 2.0, 0.5, reduction="none")
    assert result.loss.tolist() == result.ce.tolist() == result.kl.tolist() == [0.0, 0.0]
    assert result.gradient.tolist() == [[0.0], [0.0]]


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
    ]
    s, t = (np.array(rows) for rows in zip(*cases, strict=True))
    for alpha in (0.0, 0.3):
        result = dkd(s, t, np.zeros(len(cases), int), 2.0, alpha, reduction="none", validate=True)
        assert_rows(result, s, [dkd_row(s[i], t[i], 0, 2.0, alpha) for i in range(len(cases))], alpha)
        assert np.isposinf(result.loss).tolist() == [False, True, alpha > 0, False, True, False, False, False, True]
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


def test_a_part_of_weight_zero_is_not_computed():
    s, t = np.array([-INF, 1.0, -0.5]), np.array([1.0, 0.0, 3.0])  # TCKD is +inf
    assert math.isfinite(dkd(s, t, 0, 2.0, 0.0, target_weight=0.0).loss)
    assert dkd(s, t, 0, 2.0, 0.0, nontarget_weight=0.0).loss == INF
    assert math.isfinite(dkd(s, t, 1, 2.0, 0.0, nontarget_weight=0.0).loss)  # NCKD is +inf
    assert dkd(s, t, 1, 2.0, 0.0, target_weight=0.0).loss == INF


@pytest.mark.parametrize("name", ["target_weight", "nontarget_weight"])
@pytest.mark.parametrize(
    ("value", "error"),
    [(-1.0, kdcore.DomainError), (INF, kdcore.DomainError), (math.nan, kdcore.DomainError), ("1", kdcore.DTypeError)],
)
def test_errors_of_dkd_weights(name, value, error):
    s, t, y = problem(2, 3)
    with pytest.raises(error, match=name):
        dkd(s, t, y, 1.0, 0.5, **{name: value})


def test_dkd_needs_labels_whatever_alpha():
    s, t, _ = problem(2, 3)
    for alpha in (0.0, 1.0):
        with pytest.raises(kdcore.LabelError, match="target classes"):
            dkd(s, t, None, 1.0, alpha)


# --- mixtures of teachers ------------------------------------------------------------------------------------------


def assert_mixture(s, teachers, shares, y, T, alpha, call=mixture, **kind):
    result = call(s, teachers, y, T, alpha, teacher_weights=shares, reduction="none", **kind)
    shares = np.broadcast_to(shares, (len(s), len(teachers)))
    for i in range(len(s)):
        log_p = mixed_logs([t[i] for t in teachers], shares[i], T)
        with np.errstate(invalid="ignore"):  # -inf less -inf, of classes without meaning
            exact = oracle.kd_row(s[i], log_p, y[i], T, alpha, teacher_temperature=1.0, **kind)
        kinds = {"temperature": T, "alpha": alpha, "teacher_temperature": 1.0, **kind}
        limit = bounds.kd_bounds(s[i], log_p, exact.loss, **kinds)
        assert bounds.within(result.loss[i], exact.loss, limit.loss), (result.loss[i], exact.loss)
        if np.isnan(exact.gradient).any():
            assert np.isnan(result.gradient[i]).all()
        else:
            error = bounds.gradient_error(result.gradient[i], exact.gradient, s.dtype)
            assert error <= limit.gradient, error / limit.gradient
    return result


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_mixture_is_the_textbooks(divergence):
    cases = [(5, 1.0, 0.0, 1), (33, 3.0, 0.4, 3), (4099, 2.0, 0.1, 2), (1, 2.0, 0.5, 2)]
    for seed, (V, T, alpha, K) in enumerate(cases):
        s, _, y = problem(3, V, seed)
        teachers = [problem(3, V, 10 + k, 2.0 + 3 * k)[1] for k in range(K)]
        shares = np.random.default_rng(seed).dirichlet(np.ones(K), 3)
        assert_mixture(s, teachers, shares, y, T, alpha, divergence=divergence)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_mixture_in_every_dtype(dtype):
    for seed, teacher_dtype in enumerate(DTYPES):
        s, _, y = problem(3, 37, seed, dtype=dtype)
        teachers = [problem(3, 37, 10 + k, teacher_dtype=teacher_dtype)[1] for k in range(3)]
        assert_mixture(s, teachers, [0.5, 0.3, 0.2], y, 2.0, 0.3)
        assert_mixture(s, teachers, [0.5, 0.3, 0.2], y, 2.0, 0.3, divergence="jsd")


def test_a_wild_mixture():
    s, _, y = problem(4, 9, scale=1e4)
    teachers = [problem(4, 9, 1 + k, 1e4)[1] for k in range(3)]
    teachers[0][0, 2:5] = teachers[1][0, 4:] = -INF
    teachers[2][1, 1:] = -INF
    for t in teachers:
        t[2, 3] = -INF  # all of them: p = 0
        t[3] += 1e4
    s[2, 3] = -INF
    shares = np.array([[0.5, 0.5, 0.0], [0.2, 0.2, 0.6], [1 / 3, 1 / 3, 1 / 3], [0.0, 1e-300, 1.0]])
    for T in (0.05, 1.0, 20.0):
        for divergence in DIVERGENCES:
            assert_mixture(s, teachers, shares, y, T, 0.3, divergence=divergence)


def test_a_class_that_all_teachers_nearly_rule_out_keeps_its_log_ratio():
    s = np.array([0.0, -1.0])
    teachers = [np.array([0.0, -2000.0]), np.array([0.0, -1500.0])]  # exp underflows
    loss = mixture(s, teachers, None, 1.0, 0.0, divergence="reverse_kl").loss
    q = oracle.softmax(s)
    exact = (q * np.log(q)).sum() - q[1] * (np.log(REAL(0.5)) - 1500)
    assert abs(loss - exact) < 1e-12 * exact
    teachers = [t + np.array([0.0, -INF]) for t in teachers]
    assert mixture(s, teachers, None, 1.0, 0.0, divergence="reverse_kl").loss == INF


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_mixture_of_one_is_plain_kd(divergence):
    for dtype in [np.float64] + [np.float32] * (divergence == "forward_kl"):  # one more kernel to compile is enough
        s, t, y = problem(5, 100, dtype=dtype)
        one = mixture_of_one(s, t, y, 3.0, 0.3, divergence=divergence, reduction="none")
        whole = kdcore.kd_loss_and_gradient(s, t, y, 3.0, 0.3, divergence=divergence, reduction="none")
        limit = bounds.kd_bounds(s, t, whole.loss, temperature=3.0, alpha=0.3, divergence=divergence)
        assert (np.abs(one.loss - whole.loss) <= 2 * limit.loss).all()
        assert (norm_of_rows(one.gradient.astype(float) - whole.gradient) <= 2 * limit.gradient).all()


def norm_of_rows(x):
    return np.sqrt(np.square(x).sum(axis=-1))


def assert_near(a, b, tolerance=1e-13):
    for x, y in zip(a, b, strict=True):
        if y is not None:
            np.testing.assert_allclose(x, y, rtol=1e-12, atol=tolerance)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_properties_of_mixtures(divergence):
    s, t, y = problem(4, 21)
    teachers = [t] + [problem(4, 21, 5 + k)[1] for k in range(2)]
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 4)
    kind = {"divergence": divergence}
    whole = mixture(s, teachers, y, 2.0, 0.2, teacher_weights=shares, **kind)
    # The order of the teachers does not matter, nor an offset of one's logits.
    order = [2, 0, 1]
    moved = mixture(s, [teachers[k] for k in order], y, 2.0, 0.2, teacher_weights=shares[:, order], **kind)
    assert_near(moved, whole)
    assert_near(mixture(s, [teachers[0] + 64.0, *teachers[1:]], y, 2.0, 0.2, teacher_weights=shares, **kind), whole)
    # Equal teachers are one, and so is one with all the weight, whatever the others hold.
    one = mixture_of_one(s, t, y, 2.0, 0.2, **kind)
    assert_near(mixture(s, [t, t, t], y, 2.0, 0.2, **kind), one)
    nothing = np.full_like(t, np.nan)
    alone = mixture(s, [nothing, t, nothing], y, 2.0, 0.2, teacher_weights=[0, 1, 0], **kind)
    for a, b in zip(alone, one, strict=True):
        same_bits(a, b)
    # Sums are divided by, in float64.
    assert_near(mixture(s, teachers, y, 2.0, 0.2, teacher_weights=shares * (1 + 5e-7), **kind), whole)
    assert_near(
        mixture(s, teachers, y, 2.0, 0.2, **kind),
        mixture(s, np.stack(teachers), y, 2.0, 0.2, teacher_weights=[1 / 3] * 3, **kind),
    )


def test_forward_kl_of_a_mixture_has_the_mean_gradient():
    s, t, y = problem(3, 8)
    other = problem(3, 8, 1)[1]
    parts = [kdcore.kd_logit_gradient(s, x, y, 3.0, 0.0) for x in (t, other)]
    whole = mixture(s, [t, other], y, 3.0, 0.0, teacher_weights=[0.25, 0.75])
    np.testing.assert_allclose(whole.gradient, 0.25 * parts[0] + 0.75 * parts[1], atol=1e-14)


def test_masked_rows_of_a_mixture_are_not_read():
    s, t, y = problem(3, 8)
    other, shares = problem(3, 8, 1)[1], np.full((3, 2), 0.5)
    s[1] = t[1] = other[1] = np.nan
    shares[1] = np.nan
    y[1] = -100
    result = mixture(s, [t, other], y, 3.0, 0.2, teacher_weights=shares)
    keep = [0, 2]
    assert_near(result[:1], mixture(s[keep], [t[keep], other[keep]], y[keep], 3.0, 0.2)[:1])
    assert not result.gradient[1].any()


def test_errors_of_mixtures():
    s, t, y = problem(3, 5)

    def call(teachers, alpha=0.5, **options):
        return mixture(s, teachers, y, 1.0, alpha, **options)

    for teachers, error, message in [
        (None, kdcore.DTypeError, "teachers are needed"),
        ([], kdcore.ShapeError, "at least one"),
        (3, kdcore.DTypeError, "sequence"),
        ("ab", kdcore.DTypeError, "sequence"),
        (np.array(1.0), kdcore.DTypeError, "0-d"),
        ([t, None], kdcore.DTypeError, r"teachers\[1\]"),
        (t, kdcore.ShapeError, r"teachers\[0\] must have shape \(3, 5\)"),
        ([t, t[:, :4]], kdcore.ShapeError, r"teachers\[1\]"),
        ([t, t.astype(np.float32)], kdcore.DTypeError, r"one dtype.*teachers\[1\]"),
        ([t, t.astype(int)], kdcore.DTypeError, r"teachers\[1\]"),
    ]:
        with pytest.raises(error, match=message):
            call(teachers)
    for shares, error, message in [
        ([0.5, 0.4], kdcore.DomainError, "add up to 1"),
        ([0.5, 0.5 + 3e-6], kdcore.DomainError, "add up to 1"),
        ([1.5, -0.5], kdcore.DomainError, r"teacher_weights\[1\] is -0.5"),
        ([np.nan, 1.0], kdcore.DomainError, r"teacher_weights\[0\] is nan"),
        ([INF, 1.0], kdcore.DomainError, r"teacher_weights\[0\]"),
        ([1.0], kdcore.ShapeError, "teacher_weights"),
        ([[0.5, 0.5]], kdcore.ShapeError, r"\(3, 2\)"),
        ([[0.5, 0.5], [1, 0], [0.2, 0.2]], kdcore.DomainError, r"teacher_weights\[2\]"),
        (["a", "b"], kdcore.DTypeError, "teacher_weights"),
    ]:
        with pytest.raises(error, match=message):
            call([t, t], teacher_weights=shares)
    for value, words in [(np.nan, r"teachers\[1\]\[2, 3\] is nan"), (INF, r"teachers\[1\]\[2, 3\] is \+inf")]:
        bad = t.copy()
        bad[2, 3] = value
        with pytest.raises(kdcore.NonFiniteError, match=words):
            call([t, bad])
        result = call([t, bad], validate=False, reduction="none")
        assert np.isnan(result.loss).tolist() == [False, False, True] == np.isnan(result.gradient).all(axis=1).tolist()
    bad[2] = -INF
    with pytest.raises(kdcore.NonFiniteError, match=r"teachers\[0\]\[2\] is -inf in every class"):
        call([bad, t])
    s[1, 0] = np.nan  # the first bad row is named
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[1, 0\]"):
        call([bad, t])


def test_a_reverse_kl_that_leaves_no_gradient():
    s, t = np.zeros((1, 3)), np.array([[0.0, -INF, 1.0]])
    result = mixture(s, [t, t], None, 1.0, 0.0, divergence="reverse_kl")
    assert result.loss == INF and np.isnan(result.gradient).all()
    with pytest.raises(kdcore.UndefinedGradientError, match="reverse_kl"):
        mixture(s, [t, t], None, 1.0, 0.0, divergence="reverse_kl", validate=True)


# --- standardised logits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_standardised_kd_is_the_textbooks(divergence):
    for seed, (V, T, alpha, scale) in enumerate([(2, 1.0, 0.0, 1.0), (33, 3.0, 0.4, 30.0), (300, 0.7, 0.1, 1e-3)]):
        s, t, y = problem(3, V, seed, scale)
        s[1] += 1e3
        result = standardized(s, t, y, T, alpha, divergence=divergence, reduction="none")
        assert_rows(
            result, s, [standardized_row(*row, T, alpha, divergence) for row in zip(s, t, y, strict=True)], alpha
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_standardised_kd_in_every_dtype(dtype):
    for seed, teacher_dtype in enumerate(DTYPES):
        s, t, y = problem(3, 37, seed, dtype=dtype, teacher_dtype=teacher_dtype)
        result = standardized(s, t, y, 2.0, 0.3, reduction="none")
        assert_rows(result, s, [standardized_row(*row, 2.0, 0.3) for row in zip(s, t, y, strict=True)], 0.3)
        assert result.gradient.dtype == dtype


@pytest.mark.parametrize("size", [1e-300, 1e-30, 1e4, 1e100, 1e306])
def test_standardised_logits_of_any_size(size):
    s, t, y = problem(2, 9)
    small, large = standardized(s, t, y, 2.0, 0.0), standardized(s, t * size, y, 2.0, 0.0)
    assert_near(large, small)
    scaled = standardized(s * size, t, y, 2.0, 0.0)
    assert_near([scaled.loss, scaled.gradient * size], small[:2])


def test_standardised_kd_does_not_see_scale_and_offset():
    s, t, y = problem(4, 50)
    whole = standardized(s, t, y, 2.0, 0.3)
    assert_near(standardized(s, 7.0 * t - 30.0, y, 2.0, 0.3), whole)
    moved = standardized(0.25 * s + 3.0, t, y, 2.0, 0.0)
    soft = standardized(s, t, y, 2.0, 0.0)
    assert_near([moved.loss, moved.kl, moved.gradient * 0.25], [soft.loss, whole.kl, soft.gradient])
    assert np.abs(soft.gradient.sum(axis=1)).max() < 1e-15
    assert np.abs((soft.gradient * s).sum(axis=1)).max() < 1e-14
    for row, z in zip(s, t, strict=True):  # the temperature of the teacher times its deviation
        same = kdcore.kl_divergence((row - row.mean()) / row.std(), (z - z.mean()) / z.std(), 2.0)
        np.testing.assert_allclose(standardized(row, z, None, 2.0, 0.0, scale_t2=False).loss, same, rtol=1e-12)


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
    assert hard.gradient[2, 5] == -0.4
    undefined = standardized(s[0], t[1], 0, 2.0, 0.4, divergence="reverse_kl")
    assert undefined.loss == INF and np.isnan(undefined.gradient).all()


def test_a_row_without_deviation_is_an_error():
    s, t, _ = problem(3, 4)
    y = np.zeros(3, int)
    flat = t.copy()
    flat[1] = 0.1
    one = t.copy()
    one[2, 1:] = -INF
    for bad, row in ((flat, 1), (one, 2)):
        with pytest.raises(kdcore.DomainError, match=rf"teacher_logits\[{row}\] has no deviation"):
            standardized(s, bad, y, 1.0, 0.5)
        with pytest.raises(kdcore.DomainError, match=rf"student_logits\[{row}\] has no deviation"):
            standardized(bad, t, y, 1.0, 0.5)
        result = standardized(bad, t, y, 1.0, 0.5, validate=False, reduction="none")
        assert np.flatnonzero(np.isnan(result.loss)).tolist() == [row]
        assert np.flatnonzero(np.isnan(result.gradient).all(axis=1)).tolist() == [row]
        y_masked = np.where(np.arange(3) == row, -100, y)
        assert math.isfinite(standardized(bad, bad, y_masked, 1.0, 0.5).loss)
        assert math.isfinite(standardized(bad, bad, y, 1.0, 1.0).loss)
    with pytest.raises(kdcore.DomainError, match="student_logits has no deviation"):
        standardized(np.ones(1), np.ones(1), 0, 1.0, 0.5)


# --- all of them ---------------------------------------------------------------------------------------------------


@variants
def test_the_gradient_is_the_derivative_of_the_returned_loss(variant):
    s, t, y = problem(3, 6, scale=2.0)
    s[2, 3] = t[2, 3] = -INF
    y[2] = 1
    kinds = [{}] if variant is dkd else [{"divergence": name} for name in DIVERGENCES if name != "tvd"]
    for kind in kinds:
        assert_derivative(partial(variant, reduction="sum", **kind), s, t, y)
        assert_derivative(partial(variant, weights=[0.5, 0.0, 2.0], denominator=1.7, **kind), s, t, y)


@variants
def test_constants_added_to_rows_change_nothing(variant):
    s, t, y = problem(3, 12)
    a = variant(s, t, y, 2.0, 0.3)
    b = variant(s + 128.0, t, y, 2.0, 0.3)
    assert_near(b, a)
    assert_near(variant(s, t - 32.0, y, 2.0, 0.3), a)


@variants
def test_reductions_weights_and_masks(variant):
    s, t, y = problem(5, 7)
    rows = [variant(s[i], t[i], y[i], 2.0, 0.3) for i in range(5)]
    weights = np.array([1.0, 0.0, 2.0, 0.5, 3.0])
    masked = y.copy()
    masked[2] = -1
    bad_s, bad_t = s.copy(), t.copy()
    bad_s[1:3], bad_t[1:3] = np.nan, INF  # not read
    w = np.where(masked == -1, 0, weights)
    for options, denominator in (
        ({}, w.sum()),
        ({"reduction": "sum"}, 1.0),
        ({"denominator": 4.0}, 4.0),
        ({"reduction": "none"}, 1.0),
    ):
        result = variant(bad_s, bad_t, masked, 2.0, 0.3, weights=weights, ignore_index=-1, **options)
        for name in ("loss", "ce", "kl"):
            values = [w[i] / denominator * getattr(rows[i], name) for i in range(5)]
            actual = getattr(result, name)
            np.testing.assert_allclose(actual, values if options == {"reduction": "none"} else sum(values), rtol=1e-13)
        expected = np.stack([w[i] / denominator * rows[i].gradient for i in range(5)])
        np.testing.assert_allclose(result.gradient, expected, rtol=1e-13, atol=1e-16)
        assert not result.gradient[1:3].any()
    nothing = variant(s, t, np.full(5, -100), 2.0, 0.3)
    assert nothing.loss == nothing.ce == nothing.kl == 0.0 and not nothing.gradient.any()
    empty = variant(s[:0], t[:0], y[:0], 2.0, 0.3)
    assert empty.loss == 0.0 and empty.gradient.shape == (0, 7)


@variants
def test_the_ends_of_alpha(variant):
    s, t, y = problem(3, 6)
    t[1, 2] = np.nan
    hard = variant(s, t, y, 2.0, 1.0)
    plain = kdcore.kd_loss_and_gradient(s, None, y, 2.0, 1.0)
    assert hard.kl is None
    same_bits(hard.loss, plain.loss)
    same_bits(hard.gradient, plain.gradient)
    t[1, 2] = 0.0
    s[0, y[0]] = t[0, y[0]] = -INF  # CE is +inf, and at alpha = 0 not there
    soft = variant(s, t, y, 2.0, 0.0)
    assert soft.ce is None and soft.loss == soft.kl and math.isfinite(soft.loss)


def test_no_teacher_at_alpha_one():
    s, _, y = problem(3, 6)
    for call in (dkd, mixture, standardized):
        assert call(s, None, y, 2.0, 1.0).kl is None
        with pytest.raises(kdcore.DTypeError, match="needed unless alpha is 1"):
            call(s, None, y, 2.0, 0.5)


@variants
def test_where_the_gradient_goes_and_how_inputs_lie(variant):
    for dtype in (np.dtype(np.float32), BFLOAT16):
        s, t, y = problem(6, 19, dtype=dtype)
        whole = variant(s, t, y, 2.0, 0.3)

        def check(result, gradient=None, whole=whole):
            same_bits(result.loss, whole.loss)
            same_bits(np.ascontiguousarray(result.gradient if gradient is None else gradient), whole.gradient)

        frozen = [x.copy() for x in (s, t, y)]
        for x in frozen:
            x.flags.writeable = False
        check(variant(*frozen, 2.0, 0.3))
        wide = np.zeros((2, 6, 38), dtype)
        wide[0, :, ::2], wide[1, :, ::2] = s, t
        check(variant(wide[0, :, ::2], wide[1, :, ::2], y, 2.0, 0.3))
        check(variant(np.asfortranarray(s), np.asfortranarray(t), y, 2.0, 0.3))
        cube = variant(s.reshape(2, 3, 19), t.reshape(2, 3, 19), y.reshape(2, 3), 2.0, 0.3)
        same_bits(cube.gradient.reshape(6, 19), whole.gradient)
        turned = [x.reshape(2, 3, 19).transpose(1, 0, 2) for x in (s, t)]  # rows that cannot be merged
        swapped = variant(*turned, y.reshape(2, 3).T, 2.0, 0.3, reduction="none")
        back = variant(s, t, y, 2.0, 0.3, reduction="none")
        same_bits(np.ascontiguousarray(swapped.loss.T).reshape(6), back.loss)
        same_bits(np.ascontiguousarray(swapped.gradient.transpose(1, 0, 2)).reshape(6, 19), back.gradient)
        out = np.empty((6, 38), dtype)[:, ::2]
        result = variant(s, t, y, 2.0, 0.3, out=out)
        assert result.gradient is out
        check(result)
        wider = variant(s, t, y, 2.0, 0.3, out=np.empty((6, 19)))
        same_bits(wider.gradient.astype(dtype), whole.gradient)
        place = s.copy()
        check(variant(place, t, y, 2.0, 0.3, out=place), place)
        same_bits(variant(s[2], t[2], y[2], 2.0, 0.3, reduction="sum").gradient, back.gradient[2])


@variants
def test_no_bit_depends_on_threads_or_on_the_rest_of_the_batch(variant):
    s, t, y = problem(67, 4099, dtype=np.float32)  # 275,000 elements, chunks of 7 rows
    one = variant(s, t, y, 2.0, 0.3, threads=1, reduction="none")
    for threads in (2, 5):
        several = variant(s, t, y, 2.0, 0.3, threads=threads, reduction="none")
        for a, b in zip(several, one, strict=True):
            same_bits(a, b)
    part = variant(s[31:40], t[31:40], y[31:40], 2.0, 0.3, reduction="none")
    for a, b in zip(part, one, strict=True):
        same_bits(a, b[31:40])


@variants
def test_gradients_beyond_float16_are_infinite(variant):
    s, t, y = problem(1, 4, dtype=np.float16)
    result = variant(s, t, y, 2.0, 0.3, weights=[1e9], reduction="sum")
    assert np.isinf(result.gradient).any() and math.isfinite(result.loss)


class OnDevice:
    __cuda_array_interface__ = {"shape": (2, 3), "typestr": "<f8", "data": (0, False), "version": 3}  # noqa: RUF012


@variants
def test_errors(variant):
    s, t, y = problem(2, 3)
    good = {"student_logits": s, "teacher_logits": t, "labels": y, "temperature": 2.0, "alpha": 0.5}

    def call(**changes):
        arguments = {**good, **changes}
        first = [arguments.pop(name) for name in good]
        return variant(*first, **arguments)

    call()
    nan, up, none = s.copy(), s.copy(), s.copy()
    nan[1, 2], up[0, 1], none[1] = np.nan, INF, -INF
    for changes, error, message in [
        ({"temperature": 0.0}, kdcore.DomainError, "temperature"),
        ({"alpha": 1.5}, kdcore.DomainError, "alpha"),
        ({"labels": [0, 3]}, kdcore.LabelError, r"labels\[1\] is 3"),
        ({"labels": [0.0, 1.0]}, kdcore.DTypeError, "labels"),
        ({"labels": [0]}, kdcore.ShapeError, "labels"),
        ({"labels": None}, kdcore.LabelError, "labels"),
        ({"weights": [1.0, -1.0]}, kdcore.DomainError, r"weights\[1\]"),
        ({"reduction": "max"}, kdcore.DomainError, "reduction"),
        ({"denominator": 0.0}, kdcore.DomainError, "denominator"),
        ({"denominator": 1.0, "reduction": "sum"}, kdcore.DomainError, "denominator"),
        ({"denominator": 1e-300, "weights": [1e300, 1.0]}, kdcore.DomainError, "denominator"),
        ({"student_logits": s.astype(int)}, kdcore.DTypeError, "student_logits"),
        ({"student_logits": s[:, :2]}, kdcore.ShapeError, "teacher"),
        ({"student_logits": nan}, kdcore.NonFiniteError, r"student_logits\[1, 2\] is nan"),
        ({"student_logits": up}, kdcore.NonFiniteError, r"student_logits\[0, 1\] is \+inf"),
        ({"student_logits": none}, kdcore.NonFiniteError, r"student_logits\[1\] is -inf"),
        ({"student_logits": nan, "labels": [0, 9]}, kdcore.LabelError, r"labels\[1\] is 9"),
        ({"teacher_logits": nan}, kdcore.NonFiniteError, r"teacher.*\[1, [02]\] is nan"),
        ({"out": np.empty((2, 2))}, kdcore.ShapeError, "out"),
        ({"out": np.empty((2, 3), int)}, kdcore.DTypeError, "out"),
        ({"out": np.broadcast_to(0.0, (2, 3))}, kdcore.AliasError, "out"),
        ({"threads": 0}, kdcore.DomainError, "threads"),
        ({"validate": 1}, kdcore.DTypeError, "validate"),
        ({"scale_t2": 1}, kdcore.DTypeError, "scale_t2"),
        ({"student_logits": OnDevice()}, kdcore.DeviceMismatchError, "student_logits on a device, teacher"),
        ({"labels": OnDevice()}, kdcore.DeviceMismatchError, "labels on a device, student_logits, teacher"),
        ({"stream": 1}, kdcore.DomainError, "stream=1 is for device arrays"),
    ]:
        with pytest.raises(error, match=message):
            call(**changes)
    with pytest.raises(kdcore.AliasError, match="out overlaps"):
        call(out=s[::-1])
    result = call(student_logits=nan, validate=False, reduction="none")
    assert np.isnan(result.loss).tolist() == [False, True] == np.isnan(result.gradient).all(axis=1).tolist()
    result = call(labels=[0, 9], validate=False, reduction="none")
    assert np.isnan(result.loss).tolist() == [False, True] == np.isnan(result.gradient).all(axis=1).tolist()


def test_teachers_that_are_the_output_or_on_a_device():
    s, t, y = problem(2, 3)
    with pytest.raises(kdcore.AliasError, match=r"teachers\[1\]"):
        mixture(s, [t, s], y, 1.0, 0.5, out=s)
    with pytest.raises(kdcore.AliasError, match="teacher_logits"):
        dkd(s, t, y, 1.0, 0.5, out=t)
    with pytest.raises(kdcore.DeviceMismatchError, match=r"teachers\[0\]"):
        mixture(s, [OnDevice()], y, 1.0, 0.5)
    with pytest.raises(kdcore.DeviceMismatchError, match="teacher_weights"):
        mixture(s, [t], y, 1.0, 0.5, teacher_weights=OnDevice())
