"""The CUDA engine against the oracle, and against the CPU engine, on a GPU or in Numba's simulator."""

import itertools

import numpy as np
import oracle
import pytest
from cuda_engines import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    INF,
    NAMES,
    NAN,
    NONE,
    PAIRS,
    VOCABULARIES,
    Device,
    Host,
    assert_kd,
    dtype_name,
    kd,
    logits,
)

import kdcore.cpu
import kdcore.cuda
from kdcore import divergences, rowstatus
from kdcore.cuda.presence import available, owns
from kdcore.divergences import Divergence, as_divergence, exp, log, where
from kdcore.errors import DTypeError
from kdcore.objective import Objective
from kdcore.testing.bounds import within

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if REASON is None:
    from numba import cuda, float64

    from kdcore.cuda import kernels, memory, primitives, rows
    from kdcore.cuda.arrays import layout_of
    from kdcore.cuda.distillation import parts_of
    from kdcore.cuda.rows import SCRATCH


@pytest.mark.parametrize(
    ("divergence", "alpha"), [*((name, 0.3) for name in NAMES), ("forward_kl", 0.0), ("jsd", 0.0), ("forward_kl", 1.0)]
)
@pytest.mark.parametrize(("student", "teacher"), PAIRS, ids=dtype_name)
def test_kd(student, teacher, alpha, divergence):
    V = VOCABULARIES[(PAIRS.index((student, teacher)) + NAMES.index(divergence) + int(alpha * 10)) % 4]
    rng = np.random.default_rng(V)
    s, t = logits(rng, 3, V, student), logits(rng, 3, V, teacher)
    labels = rng.integers(V, size=3)
    assert_kd(s, t, labels, np.array([1.0, 0.25, 3.0]), 4.25, alpha=alpha, divergence=divergence)


@pytest.mark.parametrize("V", [1, 2, 7, 8, 9, 63, 520])
def test_every_class_counts(V):
    rng = np.random.default_rng(V)
    s, t = logits(rng, 2, V, F32), logits(rng, 2, V, F32)
    assert_kd(s, t, np.array([V - 1, 0]), temperature=1.0)


@pytest.mark.parametrize(
    "divergence",
    [
        *(divergences.jsd(beta) for beta in (0.01, 0.9)),
        *(
            make(lam)
            for make in (divergences.skew_forward_kl, divergences.skew_reverse_kl)
            for lam in (1e-20, 0.01, 0.9)
        ),
        *(divergences.alpha(a) for a in (0.05, 0.95)),
    ],
    ids=repr,
)
def test_other_parameters(divergence):
    rng = np.random.default_rng(20)
    s, t = logits(rng, 2, 33, F32), logits(rng, 2, 33, F32)
    s[0, 3] = t[0, 4] = -INF
    assert_kd(s, t, np.array([0, 32]), divergence=divergence)


def test_divergences_share_a_kernel_where_their_formulas_are_the_same():
    def kernel(divergence):
        return kernels.kd_kernel(parts_of(0.3, 2.0), divergence.term, divergence.slope, False)

    assert kernel(divergences.jsd(0.3)) is kernel(divergences.jsd(0.5))
    assert len({id(kernel(as_divergence(name))) for name in NAMES}) == len(NAMES)


def _hellinger(p, q, r, c):
    """1 - sqrt(p q) of each class, as (p + q) / 2 - sqrt(p q), with what formulas may call."""
    both = where(p > 0.0, q, 0) > 0.0
    product = where(both, p * q, 1.0)
    return (p + q) / 2.0 - where(both, exp(log(product) / 2.0), 0)


def _hellinger_slope(p, q, r, c):
    both = where(p > 0.0, q, 0) > 0.0
    return where(both, -0.5 * q * exp(log(where(both, p, 1.0) / where(both, q, 1.0)) / 2), 0)


@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_name)
def test_a_divergence_of_a_users_own(dtype):
    """A quarter of alpha(1/2), in other words."""
    rng = np.random.default_rng(21)
    s, t = logits(rng, 3, 33, dtype), logits(rng, 3, 33, dtype)
    s[0, ::3] = t[0, ::3] = -INF
    s[1, 5] = -INF
    own = Divergence("hellinger", _hellinger, _hellinger_slope)
    loss, _, kl, gradient, status = kd(Device, s, t, alpha=0.0, divergence=own)
    expected = oracle.kd(s, t, None, 2.0, 0.0, divergence="alpha", reduction="none")
    tolerance = 1e-6 if dtype == F32 else 1e-13
    np.testing.assert_allclose(kl, (expected.kl / 4).astype(F64), atol=tolerance)
    np.testing.assert_allclose(gradient, (expected.gradient / 4).astype(F64), atol=tolerance)
    assert np.array_equal(loss, kl)
    assert not status.any()


def test_a_divergence_of_a_users_own_that_is_infinite():
    """1 / 0, log(0) and what overflows are infinities on a device, and so in the simulator, by NumPy."""

    def term(p, q, r, c):
        return (p - q) * (p - q) / p + where(p > 0.0, c, exp(1000.0 - p) - log(p) + 1.0 / c)

    s, t = np.zeros((2, 5), F32), np.zeros((2, 5), F32)
    t[1, 3] = -INF
    loss, _, _, gradient, status = kd(Device, s, t, alpha=0.0, divergence=Divergence("neyman", term, term))
    assert loss.tolist() == [0.0, INF]
    assert np.isnan(gradient).all(axis=1).tolist() == [False, True]
    assert status[:, 0].tolist() == [rowstatus.OK, rowstatus.UNDEFINED_GRADIENT]


def _squared(p, q, r, c):
    """(q - p)² where p and q are not far apart; elsewhere by constants that float32 does not have."""
    return where(r > 4.0, 1e60 * (q - p) * 1e-60, q - p) * (q - p)


def _squared_slope(p, q, r, c):
    return 2.0 * q * where(r > 4.0, 1e60 * (q - p) * 1e-60, q - p)


@pytest.mark.parametrize("size", [5, 333])
@pytest.mark.parametrize("in_place", [False, True])
def test_rows_that_float32_cannot_hold_are_worked_in_float64(in_place, size):
    rng = np.random.default_rng(26)
    s, t = logits(rng, 5, size, F32, 0.5), logits(rng, 5, size, F32, 0.5)
    s[[1, 4], 2], t[[1, 4], 2] = 9.0, -30.0
    labels, weights = np.array([0, 1, -100, 3, 4]), np.array([1.0, 2.0, 3.0, 0.0, 0.5])
    expected = oracle.softmax(s.astype(F64) / 2.0) - oracle.softmax(t.astype(F64) / 2.0)
    q = oracle.softmax(s.astype(F64) / 2.0)
    scale = np.where([True, True, False, False, True], weights, 0.0)
    slope = 2.0 * q * expected
    by_hand = 2.0 * (slope - q * slope.sum(axis=1, keepdims=True)) * scale[:, None]
    own = Divergence("squared", _squared, _squared_slope)
    options = {"alpha": 0.0, "weights": weights, "divergence": own, "in_place": in_place}
    _, _, kl, gradient, status = kd(Device, s, t, labels, **options)
    np.testing.assert_allclose(kl, 4.0 * np.square(expected).sum(axis=1) * scale, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, by_hand, atol=1e-6)
    assert np.abs(by_hand[[1, 4]]).max() > 1e-3
    assert not status.any()


def test_a_parameter_that_float32_cannot_hold():
    def term(p, q, r, c):
        return c * (q - p) * (q - p)

    def slope(p, q, r, c):
        return 2.0 * c * q * (q - p)

    s, t = logits(np.random.default_rng(27), 2, 9, F32), logits(np.random.default_rng(28), 2, 9, F32)
    with np.errstate(over="raise"):
        _, _, kl, _, status = kd(Device, s, t, alpha=0.0, divergence=Divergence("large", term, slope, 1e40))
    apart = oracle.softmax(s.astype(F64) / 2.0) - oracle.softmax(t.astype(F64) / 2.0)
    np.testing.assert_allclose(kl, 4e40 * np.square(apart).sum(axis=1).astype(F64), rtol=1e-12)
    assert not status.any()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_between_equals(name):
    """Ties of a whole row: student and teacher differ by a constant at most, and one class is always certain."""
    t = np.random.default_rng(22).integers(-5, 5, (2, 33)).astype(F32)
    t[1, ::2] = -INF
    for s, other in ((t, t), (t + F32.type(4), t), (t[:, 1:2], t[:, 3:4])):
        loss, _, _, gradient, status = kd(Device, s, other, alpha=0.0, divergence=name)
        np.testing.assert_allclose(loss, 0, atol=2.5e-7)  # log(p / m) of an m that is p but for its rounding
        np.testing.assert_allclose(gradient, 0, atol=1e-7)
        assert not status.any()


@pytest.mark.parametrize("name", NAMES)
def test_ties_of_some_classes(name):
    t = np.array([[0, 1, 2, -1, 3], [4, 4, 4, 4, 4]], F32)
    s = np.array([[0, 2, 1, 3, -1], [4, 4, 4, -INF, 4]], F32)
    assert_kd(s, t, np.array([0, 1]), divergence=name)


@pytest.mark.parametrize(("temperature", "scale"), [(0.05, 1.0), (0.5, 30.0), (20.0, 0.1), (100.0, 1e4), (1.0, 1e37)])
@pytest.mark.parametrize("dtype", [F32, F64], ids=dtype_name)
def test_kd_at_other_temperatures_and_scales(dtype, temperature, scale):
    rng = np.random.default_rng(1)
    s, t = logits(rng, 2, 33, dtype, scale), logits(rng, 2, 33, dtype, scale)
    assert_kd(s, t, np.array([0, 32]), temperature=temperature)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("temperature", "scale"), [(0.05, 30.0), (20.0, 0.1)])
def test_divergences_at_other_temperatures_and_scales(temperature, scale, name):
    rng = np.random.default_rng(23)
    s, t = logits(rng, 1, 33, F32, scale), logits(rng, 1, 33, F32, scale)
    assert_kd(s, t, np.array([0]), temperature=temperature, divergence=name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1e-3, 1.0])
def test_huge_float32_logits_do_not_overflow(temperature, name):
    x = np.where(np.arange(33) % 3 == 0, 3e38, -3e38).astype(F32)[None]
    for s, t in ((x, -x), (x, x), (np.zeros_like(x), x)):
        assert_kd(s, t, np.array([1]), temperature=temperature, divergence=name)


@pytest.mark.parametrize("name", NAMES)
def test_kd_with_another_teacher_temperature_and_without_t2(name):
    rng = np.random.default_rng(2)
    s, t = logits(rng, 2, 33, F32), logits(rng, 2, 33, F32)
    assert_kd(s, t, np.array([0, 32]), teacher_temperature=5.0, scale_t2=False, divergence=name)


@pytest.mark.parametrize("temperature", [1e-35, 1e35])
def test_temperatures_beyond_float32(temperature):
    rng = np.random.default_rng(3)
    s, t, labels = logits(rng, 1, 5, F32), logits(rng, 1, 5, F32), np.array([1])
    expected = oracle.kd(s, t, labels, temperature, 0.3, scale_t2=False, reduction="none")
    got = kd(Device, s, t, labels, temperature=temperature, scale_t2=False)
    for x, y in zip((expected.loss, expected.ce, expected.kl, expected.gradient), got[:4], strict=True):
        np.testing.assert_allclose(y, x.astype(F64), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [*((F32, name) for name in NAMES), *itertools.product([F64, F16, BF16], ["forward_kl", "reverse_kl"])],
    ids=lambda value: getattr(value, "name", value),
)
def test_classes_that_are_ruled_out(dtype, name):
    rng = np.random.default_rng(4)
    s, t = logits(rng, 5, 33, dtype), logits(rng, 5, 33, dtype)
    s[0, ::3] = t[0, ::3] = -INF  # by both: finite whatever the divergence
    s[1, 1:] = t[1, 1:] = -INF  # one class left
    t[2, 5] = -INF  # by the teacher: reverse KL is +inf
    s[3, 32] = -INF  # by the student: forward KL is +inf, with a gradient
    s[4, 7] = t[4, 8] = -INF
    labels = np.array([1, 0, 5, 0, 0])
    assert_kd(s, t, labels, divergence=name)
    loss = kd(Device, s, t, labels, divergence=name)[0]
    infinite = {"forward_kl": [3, 4], "reverse_kl": [2, 4]}
    assert np.flatnonzero(np.isposinf(loss)).tolist() == infinite.get(name, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_class_that_is_ruled_out_and_has_underflowed(name):
    """What the other row's support says counts, where a probability is as good as 0: 0 * inf is +inf here."""
    t = np.array([[0.0, 1.0, -1e5], [0.0, 1.0, -INF], [0.0, -1e5, -INF]], F32)
    s = np.array([[1.0, 0.0, -INF], [1.0, 0.0, -1e5], [0.0, -INF, -INF]], F32)
    assert_kd(s, t, np.array([0, 1, 0]), divergence=name)
    loss = kd(Device, s, t, np.array([0, 1, 0]), divergence=name)[0]
    infinite = {"forward_kl": [0, 2], "reverse_kl": [1]}
    assert np.flatnonzero(np.isposinf(loss)).tolist() == infinite.get(name, [])


@pytest.mark.parametrize("name", ["forward_kl", "jsd"])
def test_a_teacher_of_more_range_than_the_student(name):
    t = np.array([[0.0, -1e100, 1.0], [1e100, -1e100, 1e100]])
    s = np.array([[0.0, -INF, 2.0], [0.0, 1.0, 2.0]], F32)
    assert_kd(s, t, np.array([0, 1]), divergence=name)


def test_a_label_that_the_student_rules_out():
    s = np.array([[0.0, -INF, 1.0], [0.0, 2.0, 1.0]], np.float32)
    loss, ce, kl, gradient, status = kd(Device, s, np.zeros_like(s), np.array([1, 0]), alpha=1.0)
    assert loss[0] == ce[0] == INF
    assert np.isfinite(loss[1])
    assert not kl.any()
    np.testing.assert_allclose(gradient[0], np.array([0.26894142, -1.0, 0.73105858]), atol=1e-6)
    assert not status.any()


def test_masked_rows_are_not_read():
    rng = np.random.default_rng(5)
    s, t = logits(rng, 4, 9, F32), logits(rng, 4, 9, F32)
    s[1], t[1], s[2], t[2] = NAN, NAN, NAN, INF
    assert_kd(s, t, np.array([3, -100, 5, 8]), np.array([2.0, 1.0, 0.0, 1.0]), 3.0)


def test_without_labels():
    rng = np.random.default_rng(6)
    s, t = logits(rng, 2, 33, F32), logits(rng, 2, 33, F32)
    assert_kd(s, t, None, alpha=0.0)


def test_at_alpha_0_labels_only_mask():
    rng = np.random.default_rng(7)
    s, t = logits(rng, 2, 33, F32), logits(rng, 2, 33, F32)
    with_labels, without = (kd(Device, s, t, y, alpha=0.0) for y in (np.array([4, 5]), None))
    for x, y in zip(with_labels, without, strict=True):
        assert np.array_equal(x, y)


def test_at_alpha_1_the_teacher_is_not_read():
    s = logits(np.random.default_rng(8), 2, 33, F32)
    assert_kd(s, np.full_like(s, NAN), np.array([0, 32]), alpha=1.0)


@pytest.mark.parametrize(
    ("dtype", "divergence"), [(F32, "forward_kl"), (BF16, "forward_kl"), (F32, "reverse_kl")], ids=dtype_name
)
def test_rows_that_cannot_be_used(dtype, divergence):
    rng = np.random.default_rng(9)
    s, t = logits(rng, 9, 20, dtype), logits(rng, 9, 20, dtype)
    labels, weights = rng.integers(20, size=9), np.ones(9)
    s[0, 19] = NAN
    s[1, 3], s[1, 17] = INF, NAN
    s[2] = -INF
    t[3, 11], t[3, 5], t[3, 12] = INF, NAN, INF
    t[4, 2], t[4, 10] = INF, INF
    t[5] = -INF
    labels[6], weights[7] = 20, NAN
    host, device = (kd(e, s, t, labels, weights=weights, divergence=divergence) for e in (Host, Device))
    loss, ce, kl, gradient, status = device
    assert np.isnan(np.stack([loss, ce, kl])[:, :8]).all()
    assert np.isnan(gradient[:8].astype(np.float64)).all()
    assert np.isfinite(loss[8])
    assert np.isfinite(gradient[8].astype(np.float64)).all()
    assert np.array_equal(status, host[4])
    assert status.tolist() == [
        [rowstatus.STUDENT + rowstatus.NAN, 19],
        [rowstatus.STUDENT + rowstatus.POSITIVE_INF, 3],
        [rowstatus.STUDENT + rowstatus.NO_SUPPORT, 0],
        [rowstatus.TEACHER + rowstatus.NAN, 5],
        [rowstatus.TEACHER + rowstatus.POSITIVE_INF, 2],
        [rowstatus.TEACHER + rowstatus.NO_SUPPORT, 0],
        [rowstatus.LABEL, 20],
        [rowstatus.WEIGHT, 0],
        [rowstatus.OK, 0],
    ]


@pytest.mark.parametrize(
    ("dtype", "divergence", "alpha"),
    [
        *itertools.product([F32, F64, F16, BF16], ["forward_kl", "reverse_kl"], [0.3]),
        *((F32, name, 0.0) for name in NAMES),
        (F32, "forward_kl", 1.0),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_gradient_in_place(dtype, divergence, alpha):
    rng = np.random.default_rng(10)
    s, t = logits(rng, 3, 33, dtype), logits(rng, 3, 33, dtype)
    s[2, 4] = NAN
    t[1, 5] = -INF
    labels = np.array([0, 32, 1])
    apart, in_place = (
        kd(Device, s, t, labels, divergence=divergence, alpha=alpha, in_place=in_place) for in_place in (False, True)
    )
    for x, y in zip(apart, in_place, strict=True):
        assert x.tobytes() == y.tobytes()


def test_a_gradient_of_another_dtype_and_none():
    rng = np.random.default_rng(11)
    s, t = logits(rng, 2, 33, BF16), logits(rng, 2, 33, BF16)
    labels = np.array([0, 32])
    wide = kd(Device, s, t, labels, out=F64)
    narrow = kd(Device, s, t, labels)
    assert wide[3].dtype == F64
    assert np.array_equal(wide[3].astype(np.float32).astype(BF16), narrow[3])
    none = kd(Device, s, t, labels, with_gradient=False)
    assert none[3].shape == (0, 33)
    for x, y, z in zip(wide[:3], narrow[:3], none[:3], strict=True):
        assert np.array_equal(x, y)
        assert np.array_equal(x, z)


def test_results_do_not_depend_on_strides_or_on_other_rows():
    rng = np.random.default_rng(12)
    s, t = logits(rng, 6, 66, F32), logits(rng, 6, 66, F32)
    expected = kd(Device, np.ascontiguousarray(s[::2, ::2]), np.ascontiguousarray(t[::2, ::2]), np.array([0, 32, 1]))
    alone = kd(Device, np.ascontiguousarray(s[2:3, ::2]), np.ascontiguousarray(t[2:3, ::2]), np.array([32]))
    for x, y in zip(expected, alone, strict=True):
        assert np.array_equal(x[1:2], y)

    d_s, d_t, out = (memory.to_device(x, None) for x in (s, t, np.zeros_like(s)))
    loss, ce, kl = (memory.empty((3,), np.float64, None) for _ in range(3))
    kdcore.cuda.kd_rows(
        d_s[::2, ::2], d_t[::2, ::2], memory.to_device(np.array([0, 32, 1]), None), memory.to_device(NONE, None),
        memory.full((1,), np.float64, 1.0, None), Objective(as_divergence("forward_kl"), 2.0, 2.0, 0.3, 4.0, -100),
        out[::2, ::2], loss, ce, kl, memory.to_device(np.empty((0, 2), np.int64), None), None,
    )  # fmt: skip
    assert np.array_equal(memory.to_host(loss), expected[0])
    got = memory.to_host(out)
    assert np.array_equal(got[::2, ::2], expected[3])
    got[::2, ::2] = 0
    assert not got.any()


def row_operation(engine, name, x, temperature, out_dtype=None):
    shape = x.shape[:1] if name == "logsumexp" else x.shape
    out = engine.put(np.full(shape, 7, out_dtype or (np.float64 if name == "logsumexp" else x.dtype)))
    status = engine.put(np.zeros((len(x), 2), np.int64))
    getattr(engine.kernels, f"{name}_rows")(engine.put(x), temperature, out, status, engine.where)
    return engine.get(out), engine.get(status)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
def test_softmax_and_its_relatives(name, dtype):
    rng = np.random.default_rng(13)
    for V, temperature in zip(VOCABULARIES, (1.0, 0.05, 3.0, 100.0), strict=True):
        x = logits(rng, 2, V, dtype)
        if V > 1:
            x[0, 1] = -INF
        expected = getattr(oracle, name)(x, temperature)
        tolerance = {F64: 1e-13, F32: 5e-7, F16: 2**-11, BF16: 2**-8}[dtype]
        for engine in (Host, Device):
            got, status = row_operation(engine, name, x, temperature)
            assert not status.any()
            with np.errstate(invalid="ignore"):
                assert within(got, expected, tolerance * (1 + np.abs(np.where(np.isinf(expected), 0, expected)))).all()


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_of_rows_that_cannot_be_used(name):
    x = np.zeros((4, 10), np.float32)
    x[0, 9], x[1, 2], x[2] = NAN, INF, -INF
    host, device = (row_operation(engine, name, x, 2.0) for engine in (Host, Device))
    assert np.array_equal(np.isnan(device[0].reshape(4, -1)).all(axis=1), [True, True, True, False])
    assert np.isfinite(device[0][3]).all()
    assert np.array_equal(device[1], host[1])


def test_softmax_in_place():
    x = logits(np.random.default_rng(14), 2, 33, F32)
    for name in ("softmax", "log_softmax"):
        array = memory.to_device(x.copy(), None)
        getattr(kdcore.cuda, f"{name}_rows")(
            array, 2.0, array, memory.to_device(np.empty((0, 2), np.int64), None), None
        )
        assert np.array_equal(memory.to_host(array), row_operation(Device, name, x, 2.0)[0])


@pytest.mark.parametrize("rows_", [0, 1, 5, 1000])
def test_sums(rows_):
    rng = np.random.default_rng(15)
    labels, weights = rng.integers(-1, 3, rows_), rng.random(rows_)
    for y, w in itertools.product((np.empty(0, np.int64), labels), (NONE, weights)):
        results = []
        for engine in (Host, Device):
            out = engine.put(np.full(1, 7.0))
            engine.kernels.weight_sum(engine.put(y), engine.put(w), -1, rows_, out, engine.where)
            results.append(engine.get(out)[0])
        np.testing.assert_allclose(results[1], results[0], rtol=1e-14)
    rows = np.stack([weights, 2 * weights, weights**2])
    totals = memory.empty((3,), np.float64, None)
    kdcore.cuda.reduce_rows(memory.to_device(rows, None), totals, None)
    np.testing.assert_allclose(memory.to_host(totals), rows.sum(axis=1), rtol=1e-14)
    second = totals[1]
    assert second.shape == ()
    np.testing.assert_allclose(memory.to_host(second), rows[1].sum(), rtol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("V", [1, 13, 64, 2600])  # the last is two blocks' in the simulator
def test_rows_times_a_factor_each(V, dtype):
    """To the last bit, NumPy's product rounded once; what a factor of 1 multiplies is left alone."""
    wide = np.float64 if dtype == F64 else np.float32
    rows = np.random.default_rng(16).normal(size=(4, V)).astype(dtype)
    # A signalling NaN, which any product makes a quiet one.
    signalling = {2: 0x7C01, 4: 0x7F800001, 8: 0x7FF0000000000001}[dtype.itemsize]
    rows.view(f"u{dtype.itemsize}")[0, V // 2] = 0x7F81 if dtype == BF16 else signalling
    factors = np.array([1.0, 0.3, 1.0, -65536.0])
    for kind in (np.float64, np.float32):
        with np.errstate(over="ignore", invalid="ignore"):
            expected = (rows.astype(wide) * factors.astype(kind).astype(wide)[:, None]).astype(dtype)
        for engine in (Host, Device):
            x = engine.put(rows.copy())
            engine.kernels.multiply_rows(x, engine.put(factors.astype(kind)), engine.where)
            result = engine.get(x)
            assert result[1:].tobytes() == expected[1:].tobytes()
            assert result[0].tobytes() == rows[0].tobytes()
        # Not aligned, and with gaps; and one factor for all rows, as an array with a step of nothing.
        host = np.full((4, 2 * V + 3), 7, dtype)
        host[:, 3::2] = rows
        x = memory.to_device(host, None)
        view = x[:, 3::2]
        one = memory.to_device(np.full(1, 0.3, kind), None)
        kdcore.cuda.multiply_rows(view, one.view(one.address, layout_of((4,), (0,), one.dtype)), None)
        with np.errstate(invalid="ignore"):
            host[:, 3::2] = (rows.astype(wide) * wide(kind(0.3))).astype(dtype)
        result = memory.to_host(x)
        assert result[1:].tobytes() == host[1:].tobytes()
        assert np.isnan(result[0, 3::2][V // 2]) and (result[0, 4::2] == 7).all()
    kdcore.cuda.multiply_rows(memory.empty((0, V), dtype, None), memory.empty((0,), np.float32, None), None)


@pytest.mark.parametrize("activation", ["identity", "relu", "tanh", "gelu"])
@pytest.mark.parametrize("B", [0, 1, 3])
def test_linear(activation, B):
    if not primitives.SIMULATOR:
        pytest.importorskip("cupy")
    rng = np.random.default_rng(16)
    x, weight, bias = (rng.normal(size=shape).astype(np.float32) for shape in ((B, 5), (11, 5), (11,)))
    results = []
    for engine in (Host, Device):
        out = engine.put(np.full((B, 11), 7, np.float32))
        engine.kernels.linear(*(engine.put(a) for a in (x, weight, bias)), activation, out, engine.where)
        results.append(engine.get(out))
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("whole", [True, False])
def test_16_bit_conversions_round_as_numpy_does(whole):
    """By 16 bytes, and one by one."""
    special = np.array(
        [0.0, -0.0, INF, -INF, NAN, 3.4e38, 65504, 65519, 65520, 1e-8, 6e-8, 1e-40, 1.00390625, 1.01171875, 1, 2]
    )
    values = np.concatenate(
        [special, np.random.default_rng(17).normal(size=200) * 10.0 ** np.arange(-10, 10).repeat(10)]
    )
    values = values.astype(np.float32)

    @cuda.jit
    def convert(x, out, size):
        a = 8 * cuda.threadIdx.x
        while a < size:
            octet = rows.octet_of(x, a, a + 4, size, whole, np.float32(0))
            rows.write_octet(out, a, a + 4, size, whole, octet)
            a += 8 * cuda.blockDim.x

    def row(array):
        return array.address, array.dtype.itemsize, primitives.tag_of(array.dtype)

    for dtype in (F16, BF16):
        with np.errstate(over="ignore"):
            expected = values.astype(dtype)
        given = memory.to_device(values, None)
        narrow, wide = memory.empty(values.shape, dtype, None), memory.empty(values.shape, np.float32, None)
        convert[1, 32](row(given), row(narrow), values.size)
        convert[1, 32](row(narrow), row(wide), values.size)
        np.testing.assert_array_equal(memory.to_host(narrow).astype(np.float32), expected.astype(np.float32))
        np.testing.assert_array_equal(memory.to_host(wide), expected.astype(np.float32))


@pytest.mark.parametrize("threads", [32, 96])
def test_row_functions_in_another_kernel(threads):
    @cuda.jit
    def one_row(s, out, like, results):
        """s [V]; out [2, V]; results [2]."""
        shared = cuda.shared.array(SCRATCH, float64)
        x, size = rows.row_of(s), s.size
        m, z = rows.softmax_sums(x, size, 2.0, like, shared)
        rows.softmax_row(x, size, m, z, 2.0, like, rows.row_of(out[0]))
        rows.log_softmax_row(x, size, m, z, 2.0, like, rows.row_of(out[1]))
        m_1, z_1 = rows.softmax_sums(x, size, 1.0, like, shared)
        if cuda.threadIdx.x == 0:
            results[0] = rows.logsumexp_of(m, z, 2.0)
            results[1] = rows.cross_entropy_of(s[7], m_1, z_1)

    s = logits(np.random.default_rng(18), 1, 70, F32)[0]
    out, results = cuda.device_array((2, 70), np.float32), cuda.device_array(2, np.float64)
    one_row[1, threads](cuda.to_device(s), out, np.float32(0), results)
    expected = oracle.logsumexp(s, 2.0), oracle.cross_entropy(s, 7)
    np.testing.assert_allclose(results.copy_to_host(), np.array(expected, np.float64), rtol=1e-6)
    np.testing.assert_allclose(out.copy_to_host()[0], oracle.softmax(s, 2.0).astype(F64), atol=5e-7)
    np.testing.assert_allclose(out.copy_to_host()[1], oracle.log_softmax(s, 2.0).astype(F64), rtol=1e-6)


def test_no_rows():
    empty = np.empty((0, 5), np.float32)
    for array in kd(Device, empty, empty, np.empty(0, np.int64)):
        assert array.size == 0


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*DTYPES, np.dtype(np.int64), np.dtype(np.int32)], ids=dtype_name)
def test_arrays_keep_their_dtype_and_values(dtype):
    x = np.arange(6).reshape(2, 3).astype(dtype)
    array = memory.to_device(x, None)
    assert owns(array.owner)
    assert memory.as_array(array.owner).dtype == dtype
    assert array.shape == (2, 3)
    back = memory.to_host(array)
    assert back.dtype == dtype
    assert np.array_equal(back, x)
    assert memory.empty((4, 2), dtype, None).dtype == dtype


def test_full():
    for dtype, shape in itertools.product((np.float32, np.float64, np.int64), ((), (1,), (3, 5), (0, 2))):
        got = memory.to_host(memory.full(shape, dtype, 3, None))
        assert got.dtype == dtype
        assert got.shape == shape
        assert np.all(got == 3)


def test_as_array_refuses_host_arrays():
    with pytest.raises(DTypeError, match="CUDA device, got ndarray"):
        memory.as_array(np.zeros(3))


def test_as_rows():
    x = np.arange(48.0).reshape(2, 3, 8)
    array = memory.to_device(x, None)
    for view, expected in [
        (array, x.reshape(6, 8)),
        (array[0], x[0]),
        (array[0, 1], x[0, 1].reshape(1, 8)),
        (array[:, :, ::2], x[:, :, ::2].reshape(6, 4)),
        (array[:, 1:2], x[:, 1:2].reshape(2, 8)),
    ]:
        (merged,) = memory.rows_of([view])
        assert tuple(merged.shape) == expected.shape
        out = memory.empty(expected.shape, np.float64, None)
        kdcore.cuda.softmax_rows(merged, 1.0, out, memory.to_device(np.empty((0, 2), np.int64), None), None)
        np.testing.assert_allclose(memory.to_host(out), oracle.softmax(expected).astype(F64), atol=1e-13)
    assert tuple(memory.rows_of([memory.to_device(np.zeros((0, 3, 8)), None)])[0].shape) == (0, 8)


def test_overlaps_and_same():
    array = memory.to_device(np.zeros((4, 6)), None)
    other = memory.to_device(np.zeros((4, 6)), None)
    assert memory.same(array, array[:])
    assert not memory.same(array, other)
    assert not memory.same(array, array[:2])
    assert not memory.same(array, array[::2, ::2])
    nothing = memory.empty((0,), np.float64, None)
    assert memory.overlapping(array[:2], [None, array[2:], other, nothing, array[1:], array]) == [4, 5]
    assert memory.overlapping(nothing, [array, nothing]) == []


def test_a_stream():
    x = logits(np.random.default_rng(19), 2, 33, F32)
    stream = cuda.stream()
    array, out = memory.to_device(x, stream), memory.empty(x.shape, np.float32, stream)
    kdcore.cuda.softmax_rows(array, 2.0, out, memory.full((2, 2), np.int64, 0, stream), stream)
    assert np.array_equal(memory.to_host(out), row_operation(Device, "softmax", x, 2.0)[0])


def test_what_is_no_stream():
    x = memory.to_device(np.zeros((1, 3)), None)
    with pytest.raises(DTypeError, match="stream must be None"):
        kdcore.cuda.softmax_rows(x, 1.0, x, memory.full((1, 2), np.int64, 0, None), "fast")
