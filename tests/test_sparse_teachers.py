"""Teachers that do not have every class, on the CPU: against the oracle, finite differences, and dense teachers."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import oracle
import pytest
from comparisons import assert_values, same_bits
from hypothesis import given, strategies as st
from strategies import DTYPES, alphas, logit_pairs, seeds, temperatures

import kdcore
from kdcore import SampledRows, TopKRows
from kdcore.cpu.rows import BLOCK
from kdcore.testing import bounds

TAILS = ["bucket", "renormalize", "zero", "uniform"]
INF, NAN = np.inf, np.nan


def in_the_oracle(rows):
    """Rows as the oracle takes them."""
    values = rows.log_weights if isinstance(rows, SampledRows) else rows.log_probs
    return [
        (
            dict(zip(rows.indices[i, :n].tolist(), np.asarray(values[i, :n], np.longdouble), strict=True)),
            -INF if isinstance(rows, SampledRows) else np.longdouble(rows.tail_logmass[i]),
        )
        for i, n in enumerate(rows.n_valid)
    ]


def assert_sparse(student, rows, labels, temperature, alpha, *, tail="bucket", scale_t2=True, **options):
    """kd_loss_and_gradient within the bounds of the oracle, row by row. Returns its result."""
    sampled = isinstance(rows, SampledRows)
    given_tail = {} if sampled else {"tail": tail}
    tail = "zero" if sampled else tail
    result = kdcore.kd_loss_and_gradient(
        student, rows, labels, temperature, alpha, scale_t2=scale_t2, **given_tail, **options
    )
    masks = ("ignore_index", "weights", "reduction", "denominator")
    scales = oracle.row_scales(len(student), labels, **{name: options[name] for name in masks if name in options})
    exact = oracle.sparse_kd(
        student, in_the_oracle(rows), labels, temperature, alpha, tail=tail, scale_t2=scale_t2, scales=scales
    )
    read = scales > 0

    def allowed(only, values):
        return bounds.sparse_kd_bounds(
            student[read], rows[read], values[read], temperature=temperature, alpha=only, tail=tail,
            scale_t2=scale_t2, scale=scales[read],
        )  # fmt: skip

    assert (result.ce is None, result.kl is None) == (alpha == 0, alpha == 1)
    parts = [("loss", result.loss, exact.loss, alpha)]
    parts += [("ce", result.ce, exact.ce, 1.0)] if alpha > 0 else []
    parts += [("kl", result.kl, exact.kl, 0.0)] if alpha < 1 else []
    for name, actual, values, only in parts:
        assert_values(name, actual, values, read, allowed(only, values).loss, (len(student),), options)
    np.testing.assert_array_equal(result.gradient[~read].astype(np.float64), 0.0)
    error = bounds.gradient_error(result.gradient, exact.gradient, student.dtype)[read]
    limit = allowed(alpha, exact.loss).gradient
    assert (error <= limit).all(), ("gradient", error / np.where(limit > 0, limit, 1))
    return result


@st.composite
def sparse_problems(draw, dtype):
    """Student logits, rows, labels, temperature, alpha, options: supports that differ, any order, odd counts."""
    temperature, alpha = draw(temperatures), draw(alphas)
    student, teacher = draw(logit_pairs([(dtype, np.dtype(np.float64))]))
    rng = np.random.default_rng(draw(seeds))
    B, V = student.shape
    k = draw(st.sampled_from([1, 2, 7, 64, V]))
    rows = TopKRows.from_logits(teacher, min(k, V), temperature)
    if rng.random() < 0.5:  # in any order, and in float32
        order = np.stack([np.concatenate([rng.permutation(n), np.arange(n, rows.k)]) for n in rows.n_valid])
        indices, log_probs = (np.take_along_axis(x, order, axis=1) for x in (rows.indices, rows.log_probs))
        rows = TopKRows(indices, log_probs.astype(np.float32), rows.tail_logmass, rows.n_valid, V, temperature)
    options = {"reduction": draw(st.sampled_from(["mean", "sum", "none"])), "scale_t2": draw(st.booleans())}
    if draw(st.booleans()):
        options["weights"] = np.where(rng.random(B) < 0.3, 0.0, rng.uniform(0.01, 10.0, B))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = draw(st.floats(0.5, 100.0))
    labels = None
    if alpha > 0 or draw(st.booleans()):
        labels = rng.integers(V, size=B)
        labels[rng.random(B) < 0.2] = -100
    return student, rows, labels, temperature, alpha, options


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_oracle(dtype, tail, data):
    *arguments, options = data.draw(sparse_problems(dtype))
    assert_sparse(*arguments, tail=tail, **options)


def problem(V=37, k=9, B=3, seed=0, dtype=np.float64, scale=2.0, temperature=2.0):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(2, B, V)) * scale).astype(dtype)
    return student, TopKRows.from_logits(teacher, k, temperature), rng.integers(V, size=B), teacher


@pytest.mark.parametrize("V", [BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17])
@pytest.mark.parametrize("tail", TAILS)
def test_several_blocks(V, tail):
    student, rows, labels, _ = problem(V, 64, dtype=np.float32, scale=4.0)
    labels[0] = rows.indices[0, 5]  # a label that is stored
    assert_sparse(student, rows, labels, 2.0, 0.3, tail=tail)
    assert_sparse(student, rows, labels, 3.0, 0.3, tail=tail, teacher_temperature=2.0)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
@pytest.mark.parametrize("tail", TAILS)
def test_gradient_is_the_derivative_of_the_loss(tail, alpha):
    """Central differences of the returned loss, in every class of every row."""
    student, rows, labels, _ = problem(V=11, k=4)
    rows = TopKRows(rows.indices, rows.log_probs - 0.05, rows.tail_logmass, rows.n_valid, 11, 2.0)  # M is not 1

    def loss(x):
        return kdcore.kd_loss(x, rows, labels, 2.0, alpha, tail=tail, reduction="none", weights=[1.0, 0.5, 3.0])

    gradient = kdcore.kd_logit_gradient(
        student, rows, labels, 2.0, alpha, tail=tail, reduction="none", weights=[1.0, 0.5, 3.0]
    )
    step = 1e-4
    for v in range(11):
        moved = np.zeros(11)
        moved[v] = step
        slope = (loss(student - 2 * moved) - 8 * loss(student - moved) + 8 * loss(student + moved)
                 - loss(student + 2 * moved)) / (12 * step)  # fmt: skip
        np.testing.assert_allclose(gradient[:, v], slope, rtol=0, atol=1e-9)


def test_gradient_of_samples_is_the_derivative_of_the_loss():
    student, _, labels, teacher = problem(V=11, k=4)
    rows = SampledRows.from_logits(teacher, 5, 2.0, head_k=2, seed=1)
    gradient = kdcore.kd_logit_gradient(student, rows, labels, 2.0, 0.3)
    step = 1e-5
    for v in range(11):
        moved = np.zeros((3, 11))
        moved[1, v] = step
        slope = (
            kdcore.kd_loss(student + moved, rows, labels, 2.0, 0.3)
            - kdcore.kd_loss(student - moved, rows, labels, 2.0, 0.3)
        ) / (2 * step)
        assert abs(gradient[1, v] - slope) < 1e-8


# --- what each policy is in other words ----------------------------------------------------------------------------


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
def test_every_class_stored_is_the_dense_teacher(dtype, tail, data):
    """Within the bounds of the dense call."""
    temperature, alpha = data.draw(temperatures), data.draw(alphas)
    student, teacher = data.draw(logit_pairs([(dtype, np.dtype(np.float64))]))
    labels = np.random.default_rng(data.draw(seeds)).integers(student.shape[1], size=len(student))
    rows = TopKRows.from_logits(teacher, student.shape[1], temperature)
    assert (rows.tail_logmass == -INF).all()
    exact = oracle.kd(student, teacher, labels, temperature, alpha, reduction="none")
    allowed = bounds.kd_bounds(student, teacher, exact.loss, temperature=temperature, alpha=alpha)
    result = kdcore.kd_loss_and_gradient(student, rows, labels, temperature, alpha, tail=tail, reduction="none")
    # The rows' own rounding in float64 is a few parts in 1e16 of log p.
    rounding = 1e-15 * (1 + temperature**2) * (1 + np.abs(teacher[np.isfinite(teacher)]).max() / temperature)
    assert bounds.within(result.loss, exact.loss, allowed.loss + rounding).all()
    error = bounds.gradient_error(result.gradient, exact.gradient, dtype)
    assert (error <= allowed.gradient + rounding).all()


def as_dense(rows, tail):
    """Teacher logits at temperature 1 whose softmax is what a policy makes of rows."""
    logits = np.full((*rows.shape, rows.vocab_size), -INF)
    if tail == "uniform":
        missing = rows.vocab_size - rows.n_valid
        logits[...] = (rows.tail_logmass - np.log(np.maximum(missing, 1)))[:, None]
    for i, n in enumerate(rows.n_valid):
        logits[i, rows.indices[i, :n]] = rows.log_probs[i, :n]
    return logits


@pytest.mark.parametrize("tail", ["renormalize", "uniform"])
@given(seed=seeds)
def test_policies_that_are_dense_teachers(tail, seed):
    student, rows, labels, _ = problem(V=23, k=5, seed=seed, scale=5.0)
    sparse = kdcore.kd_loss_and_gradient(student, rows, labels, 2.0, 0.3, tail=tail)
    dense = kdcore.kd_loss_and_gradient(student, as_dense(rows, tail), labels, 2.0, 0.3, teacher_temperature=1.0)
    np.testing.assert_allclose(sparse.loss, dense.loss, rtol=1e-12)
    np.testing.assert_allclose(sparse.gradient, dense.gradient, rtol=0, atol=1e-13)


@given(seed=seeds)
def test_bucket_is_a_dense_teacher_of_one_class_more(seed):
    """The tail as a class whose logit is the log-sum-exp of its classes."""
    student, rows, _, teacher = problem(V=23, k=5, seed=seed, scale=5.0)
    merged = np.zeros((2, 3, 6))
    for i, stored in enumerate(rows.indices):
        rest = np.setdiff1d(np.arange(23), stored)
        for x, to in zip((student[i], teacher[i]), merged[:, i], strict=True):
            to[:] = [*x[stored], kdcore.logsumexp(x[rest], 2.0) * 2.0]
    sparse = kdcore.kd_loss_and_gradient(student, rows, None, 2.0, 0.0)
    dense = kdcore.kd_loss_and_gradient(*merged, None, 2.0, 0.0)
    np.testing.assert_allclose(sparse.loss, dense.loss, rtol=1e-12)
    for i, stored in enumerate(rows.indices):
        rest = np.setdiff1d(np.arange(23), stored)
        np.testing.assert_allclose(sparse.gradient[i, stored], dense.gradient[i, :5], rtol=0, atol=1e-13)
        shares = kdcore.softmax(student[i, rest], 2.0)
        np.testing.assert_allclose(sparse.gradient[i, rest], dense.gradient[i, 5] * shares, rtol=0, atol=1e-13)


@given(seed=seeds)
def test_zero_is_a_part_of_renormalize(seed):
    student, rows, _, _ = problem(V=23, k=5, seed=seed)
    mass = np.exp(rows.log_probs).sum(axis=1)
    zero, renormalized = (
        kdcore.kd_loss_and_gradient(student, rows, None, 2.0, 0.0, tail=tail, reduction="none")
        for tail in ("zero", "renormalize")
    )
    np.testing.assert_allclose(zero.gradient, mass[:, None] * renormalized.gradient, rtol=0, atol=1e-14)
    np.testing.assert_allclose(zero.loss, mass * renormalized.loss + 4.0 * mass * np.log(mass), rtol=0, atol=1e-12)


@pytest.mark.parametrize("tail", TAILS)
@given(data=st.data())
def test_gradient_rows_sum_to_zero(tail, data):
    student, rows, _, temperature, _, _ = data.draw(sparse_problems(np.dtype(np.float64)))
    result = kdcore.kd_loss_and_gradient(student, rows, None, temperature, 0.0, tail=tail, reduction="none")
    assert np.isfinite(result.gradient).all()
    assert (np.abs(result.gradient.sum(axis=1)) <= 1e-12 * temperature).all()


# --- values that must hold -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("gap", [1.0, 20.0, 90.0, 300.0, 1e3, 1e5, 1e30])
def test_a_tail_far_below_the_stored_classes(gap, dtype):
    """Its mass and its shares are its own: nothing is subtracted from 1, nothing underflows, nothing is clamped."""
    rng = np.random.default_rng(0)
    student = rng.normal(size=(2, 600)).astype(dtype)
    student[0, 7] = student[1, 300] = gap
    rows = TopKRows(
        np.array([[7, 8], [300, 5]]), np.log([[0.2, 0.3], [0.6, 0.1]]), np.log([0.5, 0.3]), np.array([2, 2]), 600
    )
    for tail in TAILS:
        result = assert_sparse(student, rows, np.array([7, 9]), 1.0, 0.3, tail=tail, reduction="none")
        assert np.isfinite(result.loss).all()
    share = kdcore.softmax(np.delete(student[0].astype(np.float64), [7, 8]))
    gradient = kdcore.kd_logit_gradient(student[:1], rows[:1], None, 1.0, 0.0)[0]
    if gap > 20:
        np.testing.assert_allclose(np.delete(gradient, [7, 8]), -0.5 * share, rtol=3e-6)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_tail_that_the_student_rules_out_is_infinite(tail):
    student = np.full((1, 6), -INF)
    student[0, :2] = [1.0, 2.0]
    rows = TopKRows([[0, 1]], [[np.log(0.5), np.log(0.3)]], [np.log(0.2)], [2], 6)
    result = kdcore.kd_loss_and_gradient(student, rows, None, 1.0, 0.0, tail=tail)
    assert result.loss == INF
    q = kdcore.softmax(student)[0]
    np.testing.assert_allclose(result.gradient[0], q - [0.5, 0.3, 0.05, 0.05, 0.05, 0.05], atol=1e-15)
    assert kdcore.kd_loss(student, rows, None, 1.0, 0.0, tail="zero") < INF
    least = TopKRows([[0, 1]], [[np.log(0.5), np.log(0.5)]], [-2000.0], [2], 6)  # whose p underflows, but is not 0
    assert kdcore.kd_loss(student, least, None, 1.0, 0.0, tail=tail) == INF
    some = student.copy()
    some[0, 4] = 0.0  # one class of it is left
    expected = INF if tail == "uniform" else oracle.sparse_kd(
        some, in_the_oracle(rows), None, 1.0, 0.0, scales=np.ones(1)).loss[0]  # fmt: skip
    assert kdcore.kd_loss(some, rows, None, 1.0, 0.0, tail=tail) == pytest.approx(float(expected), rel=1e-14)


def test_a_stored_class_that_the_student_rules_out_is_infinite():
    student, rows, _, _ = problem()
    student[0, rows.indices[0, 3]] = -INF
    result = kdcore.kd_loss_and_gradient(student, rows, None, 2.0, 0.0, reduction="none")
    assert result.loss[0] == INF and np.isfinite(result.loss[1:]).all()
    assert np.isfinite(result.gradient).all()
    absent = rows.log_probs.copy()
    absent[0, 3] = -INF  # which the teacher rules out as well
    rows = TopKRows(rows.indices, absent, rows.tail_logmass, rows.n_valid, 37, 2.0)
    assert np.isfinite(kdcore.kd_loss(student, rows, None, 2.0, 0.0))
    absent[0, 3] = -1e4  # p underflows, but is not 0
    rows = TopKRows(rows.indices, absent, rows.tail_logmass, rows.n_valid, 37, 2.0)
    assert kdcore.kd_loss(student, rows, None, 2.0, 0.0) == INF


def test_a_label_on_a_class_that_is_ruled_out():
    student, rows, labels, _ = problem()
    labels[0], labels[1] = rows.indices[0, 0], np.setdiff1d(np.arange(37), rows.indices[1])[0]
    student[0, labels[0]] = student[1, labels[1]] = -INF
    assert_sparse(student, rows, labels, 2.0, 0.3, reduction="none")
    assert (kdcore.kd_loss_and_gradient(student, rows, labels, 2.0, 0.3, reduction="none").ce[:2] == INF).all()


@pytest.mark.parametrize("tail", TAILS)
def test_logits_near_the_largest_float(tail):
    student = np.array([[3e38, -3e38, 0.0, 1.0, 3e38, -3e38]], np.float32)
    rows = TopKRows([[1, 0]], [np.log([0.25, 0.5])], [np.log(0.25)], [2], 6, 2.0)
    assert_sparse(student, rows, np.array([4]), 2.0, 0.3, tail=tail)


def test_stored_probabilities_that_have_underflowed_can_be_renormalized():
    student = np.random.default_rng(0).normal(size=(1, 5))
    rows = TopKRows([[3, 1]], [[-1000.0, -1000.0 + np.log(3.0)]], [0.0], [2], 5, 2.0)
    other = TopKRows([[3, 1]], [np.log([0.25, 0.75])], [-INF], [2], 5, 2.0)
    ours, theirs = (kdcore.kd_loss_and_gradient(student, r, None, 2.0, 0.0, tail="renormalize") for r in (rows, other))
    np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-12)
    np.testing.assert_allclose(ours.gradient, theirs.gradient, atol=1e-13)


def test_rows_beyond_the_mask_are_not_read():
    student, rows, labels, _ = problem()
    expected = kdcore.kd_loss_and_gradient(student, rows, labels, 2.0, 0.3, weights=[1, 0, 1])
    indices, log_probs = rows.indices.copy(), rows.log_probs.copy()
    tails, valid = rows.tail_logmass.copy(), rows.n_valid.copy()
    indices[1], log_probs[1], tails[1], valid[1] = 99, NAN, NAN, -5
    student[1] = NAN
    indices[0, 7:], log_probs[0, 7:], valid[0] = -1, NAN, 7  # what is beyond n_valid is none
    bad = TopKRows(indices, log_probs, tails, valid, 37, 2.0)
    result = kdcore.kd_loss_and_gradient(student, bad, labels, 2.0, 0.3, weights=[1, 0, 1])
    assert (result.gradient[1] == 0).all()
    same_bits(result.gradient[2], expected.gradient[2])


def test_alpha_one_does_not_read_the_teacher():
    student, rows, labels, _ = problem()
    expected = kdcore.kd_loss_and_gradient(student, None, labels, 2.0, 1.0)
    bad = TopKRows(rows.indices + 100, rows.log_probs * NAN, rows.tail_logmass, rows.n_valid, 37, 2.0)
    result = kdcore.kd_loss_and_gradient(student, bad, labels, 2.0, 1.0)
    assert result.kl is None
    for ours, theirs in zip(result[:3], expected[:3], strict=True):
        same_bits(ours, theirs)


# --- samples -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_k", [0, 1])
def test_expectation_over_every_draw_is_the_dense_gradient(head_k):
    """All draws of 3 from 4 classes (or of those outside the head), each with its probability."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 4))
    p = kdcore.softmax(teacher, 2.0)
    head = np.argsort(-p)[:head_k]
    rest = np.setdiff1d(np.arange(4), head)
    mass = p[rest].sum()
    other = rng.normal(size=4)
    gradient, difference, total = np.zeros(4), 0.0, 0.0
    for draw in itertools.product(rest, repeat=3):
        probability = np.prod(p[list(draw)] / mass)
        drawn, counts = np.unique(draw, return_counts=True)
        indices = [*head, *drawn]
        log_weights = np.log([*p[head], *(counts / 3 * mass)])
        rows = SampledRows(indices, log_weights, len(indices), 4, 2.0)
        result = kdcore.kd_loss_and_gradient(student, rows, None, 2.0, 0.0)
        gradient += probability * result.gradient
        difference += probability * (result.loss - kdcore.kd_loss(other, rows, None, 2.0, 0.0))
        total += probability
    assert total == pytest.approx(1.0, rel=1e-14)
    dense = kdcore.kd_loss_and_gradient(student, teacher, None, 2.0, 0.0)
    np.testing.assert_allclose(gradient, dense.gradient, rtol=0, atol=1e-14)
    assert difference == pytest.approx(float(dense.loss - kdcore.kd_loss(other, teacher, None, 2.0, 0.0)), abs=1e-13)


def test_samples_of_from_logits_are_unbiased():
    """The mean of 4,000 rows of one teacher, in standard errors of what their own spread gives."""
    rng = np.random.default_rng(0)
    teacher = rng.normal(size=30) * 2
    teacher[4] = -INF
    for head_k in (0, 3):
        rows = SampledRows.from_logits(np.tile(teacher, (4000, 1)), 4, 2.0, head_k=head_k, seed=1)
        weights = np.zeros((4000, 30))
        for i, n in enumerate(rows.n_valid):
            weights[i, rows.indices[i, :n]] = np.exp(rows.log_weights[i, :n])
        p = kdcore.softmax(teacher, 2.0)
        error = weights.std(axis=0) / np.sqrt(4000)
        assert (np.abs(weights.mean(axis=0) - p) <= 5 * error + 1e-12).all()
        np.testing.assert_allclose(weights.sum(axis=1), 1.0, rtol=1e-12)
        assert (weights[:, 4] == 0).all()
        assert rows.k == 4 + head_k


@given(data=st.data())
def test_samples_against_the_oracle(data):
    student, _, labels, temperature, alpha, options = data.draw(sparse_problems(np.dtype(np.float32)))
    rng = np.random.default_rng(data.draw(seeds))
    teacher = rng.normal(size=student.shape) * 3
    rows = SampledRows.from_logits(teacher, 5, temperature, head_k=int(rng.integers(2)), seed=3)
    rows = SampledRows(rows.indices, rows.log_weights + 0.5, rows.n_valid, rows.vocab_size, temperature)
    assert_sparse(student, rows, labels, temperature, alpha, **options)


# --- bits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_bits_do_not_depend_on_how_rows_are_worked(dtype):
    V = 9 * BLOCK + 5
    rng = np.random.default_rng(0)
    student = (rng.normal(size=(6, V)) * 3).astype(dtype)
    rows = TopKRows.from_logits(rng.normal(size=(6, V)) * 3, 40, 2.0)
    labels = rng.integers(V, size=6)
    labels[2] = rows.indices[2, 0]
    options = {"temperature": 2.0, "alpha": 0.3, "reduction": "none", "tail": "uniform"}
    expected = kdcore.kd_loss_and_gradient(student, rows, labels, **options, threads=1)

    def same(result, part=slice(None)):
        for ours, theirs in zip(result, expected, strict=True):
            same_bits(ours, theirs[part])

    same(kdcore.kd_loss_and_gradient(student, rows, labels, **options, threads=3))
    for i in range(6):  # a single long row is shared among threads, block by block
        part = slice(i, i + 1)
        same(kdcore.kd_loss_and_gradient(student[part], rows[part], labels[part], **options, threads=4), part)
    order = np.array([rng.permutation(40) for _ in range(6)])
    indices, log_probs = (np.take_along_axis(x, order, axis=1) for x in (rows.indices, rows.log_probs))
    same(kdcore.kd_loss_and_gradient(
        student, TopKRows(indices, log_probs, rows.tail_logmass, rows.n_valid, V, 2.0), labels, **options))  # fmt: skip
    strided = np.empty((6, 2 * V), dtype)[:, ::2]
    strided[...] = student
    frozen = student.copy()
    frozen.flags.writeable = False
    shifted = np.empty(6 * V + 1, dtype)[1:].reshape(6, V)
    shifted[...] = student
    for other in (strided, frozen, shifted, np.asfortranarray(student)):
        same(kdcore.kd_loss_and_gradient(other, rows, labels, **options))
    in_place = student.copy()
    result = kdcore.kd_loss_and_gradient(in_place, rows, labels, **options, out=in_place)
    assert result.gradient is in_place
    same(result)


def test_leading_shapes():
    student, rows, labels, _ = problem(B=6)
    expected = kdcore.kd_loss_and_gradient(student, rows, labels, 2.0, 0.3, reduction="none")
    for lead in ((2, 3), (6, 1), (1, 2, 3)):
        result = kdcore.kd_loss_and_gradient(
            student.reshape(*lead, 37), rows.reshape(*lead), labels.reshape(lead), 2.0, 0.3, reduction="none"
        )
        assert result.loss.shape == lead
        same_bits(result.gradient.reshape(6, 37), expected.gradient)
    transposed = student.reshape(2, 3, 37).transpose(1, 0, 2)  # whose leading dimensions do not merge
    two = rows.reshape(2, 3)
    swapped = TopKRows(*(np.swapaxes(x, 0, 1) for x in two.arrays().values()), 37, 2.0)
    result = kdcore.kd_logit_gradient(transposed, swapped, labels.reshape(2, 3).T, 2.0, 0.3, reduction="none")
    same_bits(np.ascontiguousarray(result.transpose(1, 0, 2)).reshape(6, 37), expected.gradient)
    one = kdcore.kd_loss_and_gradient(student[0], rows[0], int(labels[0]), 2.0, 0.3)
    same_bits(one.gradient, expected.gradient[0])
    nothing = kdcore.kd_loss_and_gradient(student[:0], rows[:0], labels[:0], 2.0, 0.3)
    assert (nothing.loss, nothing.gradient.shape) == (0.0, (0, 37))


@pytest.mark.parametrize("out", DTYPES, ids=str)
def test_out_in_another_dtype(out):
    student, rows, labels, _ = problem(dtype=np.float32)
    expected = kdcore.kd_logit_gradient(student, rows, labels, 2.0, 0.3)
    gradient = np.empty(student.shape, out)
    assert kdcore.kd_logit_gradient(student, rows, labels, 2.0, 0.3, out=gradient) is gradient
    np.testing.assert_array_equal(gradient.astype(np.float64), expected.astype(out).astype(np.float64))


def test_scratch_is_clean_after_an_error():
    student, rows, labels, _ = problem()
    expected = kdcore.kd_logit_gradient(student, rows, labels, 2.0, 0.3, threads=1)
    indices = rows.indices.copy()
    indices[1, 8] = indices[1, 0]
    with pytest.raises(kdcore.DomainError):
        kdcore.kd_logit_gradient(
            student, TopKRows(indices, *list(rows.arrays().values())[1:], 37, 2.0), labels, 2.0, 0.3, threads=1
        )
    same_bits(kdcore.kd_logit_gradient(student, rows, labels, 2.0, 0.3, threads=1), expected)


# --- errors --------------------------------------------------------------------------------------------------------


def changed(rows, **fields):
    arrays = {name: array.copy() for name, array in rows.arrays().items()}
    for name, (place, value) in fields.items():
        arrays[name][place] = value
    return TopKRows(**arrays, vocab_size=rows.vocab_size, temperature=rows.temperature)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"n_valid": (1, 0)}, kdcore.DomainError, r"n_valid\[1\] is 0, not a number of entries from 1 to 9"),
        ({"n_valid": (1, 10)}, kdcore.DomainError, r"n_valid\[1\] is 10"),
        ({"indices": ((2, 3), 37)}, kdcore.DomainError, r"indices\[2, 3\] is 37, not a class in \[0, 37\)"),
        ({"indices": ((2, 3), -1)}, kdcore.DomainError, r"indices\[2, 3\] is -1"),
        ({"indices": ((0, slice(0, 9, 4)), 5)}, kdcore.DomainError, r"indices\[0, 4\] is class 5 again"),
        ({"log_probs": ((1, 2), NAN)}, kdcore.NonFiniteError, r"log_probs\[1, 2\] is nan"),
        ({"log_probs": ((1, 2), INF)}, kdcore.NonFiniteError, r"log_probs\[1, 2\] is inf"),
        ({"log_probs": ((1, 2), 0.5)}, kdcore.DomainError, r"probabilities of teacher_logits\[1\] do not add up"),
        ({"log_probs": ((1, 2), 1e30)}, kdcore.DomainError, r"probabilities of teacher_logits\[1\] do not add up"),
        ({"log_probs": (1, -INF), "tail_logmass": (1, -INF)}, kdcore.DomainError, "more than 0"),
        ({"tail_logmass": (2, NAN)}, kdcore.NonFiniteError, r"tail_logmass\[2\] is nan"),
        ({"tail_logmass": (2, INF)}, kdcore.NonFiniteError, r"tail_logmass\[2\] is inf"),
        ({"tail_logmass": (2, 3.0)}, kdcore.DomainError, "do not add up"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(fields, error, message):
    student, rows, labels, _ = problem()
    with pytest.raises(error, match=message):
        kdcore.kd_loss(student, changed(rows, **fields), labels, 2.0, 0.3)


def test_a_tail_beside_every_class():
    student, rows, _, _ = problem(k=37)
    with pytest.raises(kdcore.DomainError, match=r"tail_logmass\[1\] is -9.0, but the row has every class"):
        kdcore.kd_loss(student, changed(rows, tail_logmass=(1, -9.0)), None, 2.0, 0.0)
    kdcore.kd_loss(student, changed(rows, tail_logmass=(1, NAN)), None, 2.0, 0.0, tail="zero")  # which does not read it


def test_students_that_cannot_be_used():
    student, rows, labels, _ = problem()
    stored = int(rows.indices[1, 2])
    other = int(np.setdiff1d(np.arange(37), rows.indices[1])[3])
    for column in (stored, other):
        for value, name in ((NAN, "nan"), (INF, r"\+inf")):
            bad = student.copy()
            bad[1, column] = value
            with pytest.raises(kdcore.NonFiniteError, match=rf"student_logits\[1, {column}\] is {name}"):
                kdcore.kd_loss(bad, rows, labels, 2.0, 0.3)
    student[2] = -INF
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[2\] is -inf in every class"):
        kdcore.kd_loss(student, rows, labels, 2.0, 0.3)
    bad = kdcore.kd_loss_and_gradient(student, rows, labels, 2.0, 0.3, reduction="none", validate=False)
    assert np.isnan(bad.loss).tolist() == [False, False, True]
    assert np.isnan(bad.gradient[2]).all() and np.isfinite(bad.gradient[:2]).all()


def test_calls_that_do_not_fit_the_rows():
    student, rows, labels, teacher = problem()
    with pytest.raises(kdcore.DomainError, match=r"TopKRows at temperature=2\.0, but the call reads .* at 3\.0"):
        kdcore.kd_loss(student, rows, labels, 3.0, 0.3)
    with pytest.raises(kdcore.DomainError, match=r"temperature=2\.0, but .* at 4\.0"):
        kdcore.kd_loss(student, rows, labels, 2.0, 0.3, teacher_temperature=4.0)
    stored = TopKRows(*rows.arrays().values(), 37, float(np.float32(0.7)))  # what a file keeps of 0.7
    kdcore.kd_loss(student, stored, labels, 0.7, 0.3)
    with pytest.raises(kdcore.DomainError, match="divergence must be 'forward_kl' .* got 'reverse_kl'"):
        kdcore.kd_loss(student, rows, labels, 2.0, 0.3, divergence="reverse_kl")
    with pytest.raises(kdcore.VocabularyMismatchError, match="vocab_size=37, but student_logits have 36 classes"):
        kdcore.kd_loss(student[:, :36], rows, labels, 2.0, 0.3)
    with pytest.raises(kdcore.ShapeError, match=r"leading shape \(3,\) of student_logits, got \(2,\)"):
        kdcore.kd_loss(student, rows[:2], labels, 2.0, 0.3)
    with pytest.raises(kdcore.DomainError, match="tail must be one of 'bucket'.* got 'none'"):
        kdcore.kd_loss(student, rows, labels, 2.0, 0.3, tail="none")
    with pytest.raises(kdcore.DomainError, match="tail='zero' is for the tail that TopKRows leave out"):
        kdcore.kd_loss(student, teacher, labels, 2.0, 0.3, tail="zero")
    with pytest.raises(kdcore.DomainError, match="samples have none"):
        kdcore.kd_loss(student, SampledRows.from_logits(teacher, 3, 2.0), labels, 2.0, 0.3, tail="renormalize")
    with pytest.raises(kdcore.DTypeError, match="got TopKRows, which kd_loss takes"):
        kdcore.kl_divergence(student, rows, 2.0)
    with pytest.raises(kdcore.AliasError, match=r"out overlaps teacher_logits\.log_probs"):
        everything = TopKRows.from_logits(teacher, 37, 2.0)
        kdcore.kd_logit_gradient(student, everything, labels, 2.0, 0.3, out=everything.log_probs)


# --- the rows themselves -------------------------------------------------------------------------------------------


def test_rows_are_a_sequence():
    _, rows, _, teacher = problem(B=6)
    assert (len(rows), rows.shape, rows.k, rows.vocab_size, rows.temperature) == (6, (6,), 9, 37, 2.0)
    part = rows[1:4]
    assert isinstance(part, TopKRows) and (part.vocab_size, part.temperature) == (37, 2.0)
    np.testing.assert_array_equal(part.indices, rows.indices[1:4])
    np.testing.assert_array_equal(rows[[5, 0]].tail_logmass, rows.tail_logmass[[5, 0]])
    np.testing.assert_array_equal(rows[np.arange(6) == 2].n_valid, rows.n_valid[2:3])
    assert rows[2].shape == () and [len(row.indices) for row in rows] == [9] * 6
    assert rows.reshape(2, 3)[1, 2].tail_logmass == rows.tail_logmass[5]
    assert len(SampledRows.from_logits(teacher, 2)[::2]) == 3
    for bad in (None, ..., (0, 0), (slice(None), 0)):
        with pytest.raises(IndexError):
            rows[bad]
    with pytest.raises(TypeError, match="one row"):
        len(rows[0])
    with pytest.raises(IndexError):
        rows[0][0]


def test_best_classes_of_logits():
    x = np.array([[1.0, 3.0, -INF, 3.0, 2.0, 3.0]], np.float32)
    rows = TopKRows.from_logits(x, 2, 2.0)
    assert rows.indices.tolist() == [[1, 3]] and rows.indices.dtype == np.int32
    assert (rows.log_probs.dtype, rows.n_valid.tolist()) == (np.float32, [2])
    p = kdcore.softmax(x.astype(np.float64), 2.0)[0]
    np.testing.assert_allclose(np.exp(rows.log_probs[0]), p[[1, 3]], rtol=1e-6)
    np.testing.assert_allclose(np.exp(rows.tail_logmass[0]), p[[0, 2, 4, 5]].sum(), rtol=1e-6)
    rows = TopKRows.from_logits(x, 6)
    assert rows.n_valid.tolist() == [5] and rows.indices.tolist() == [[1, 3, 5, 4, 0, 0]]
    assert rows.log_probs[0, 5] == -INF and rows.tail_logmass[0] == -INF
    far = TopKRows.from_logits(np.array([[1000.0, 0.0, 0.0]]), 1)
    np.testing.assert_allclose(far.tail_logmass, [np.log(2.0) - 1000.0])  # not log(1 - 1)
    assert TopKRows.from_logits(np.zeros((0, 4)), 2).indices.shape == (0, 2)


@given(data=st.data())
def test_rows_of_logits_hold_the_softmax(data):
    _, teacher = data.draw(logit_pairs([(np.dtype(np.float32), np.dtype(np.float32))]))
    V = teacher.shape[1]
    k = data.draw(st.integers(1, V))
    rows = TopKRows.from_logits(teacher.astype(np.float64), k, 3.0)
    exact = oracle.log_softmax(teacher, 3.0)
    for i, n in enumerate(rows.n_valid):
        stored = rows.indices[i, :n]
        assert len(set(stored.tolist())) == n
        np.testing.assert_allclose(rows.log_probs[i, :n], exact[i, stored].astype(float), rtol=1e-13, atol=1e-13)
        rest = np.delete(exact[i], stored)
        assert not rest.size or rest.max() <= exact[i, stored].min()
        tail = float(np.logaddexp.reduce(rest)) if rest.size else -INF
        np.testing.assert_allclose(rows.tail_logmass[i], tail, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[0.0]], [[0.0]], [0.0], [1], 4), kdcore.DTypeError, "indices must be integers, got dtype float64"),
        (([[0]], [[0]], [0.0], [1], 4), kdcore.DTypeError, "log_probs must be floating-point numbers, got dtype int64"),
        (([[0]], [[0.0, 0.0]], [0.0], [1], 4), kdcore.ShapeError, r"log_probs must have shape \(1, 1\) like indices"),
        (([[0]], [[0.0]], [0.0, 0.0], [1], 4), kdcore.ShapeError, r"tail_logmass must have shape \(1,\) like its rows"),
        (([[0]], [[0.0]], [0.0], 1, 4), kdcore.ShapeError, r"n_valid must have shape \(1,\)"),
        (([[0, 1]], [[0.0, 0.0]], [0.0], [1], 1), kdcore.ShapeError, "from 1 to vocab_size=1 entries"),
        ((np.zeros((2, 0), int), np.zeros((2, 0)), [0.0] * 2, [1] * 2, 4), kdcore.ShapeError, "entries"),
        ((0, 0.0, 0.0, 1, 4), kdcore.ShapeError, "entries"),
        (([[0]], [[0.0]], [0.0], [1], 0), kdcore.DomainError, "vocab_size"),
        (([[0]], [[0.0]], [0.0], [1], 4, 0.0), kdcore.DomainError, "temperature"),
        (("a", [[0.0]], [0.0], [1], 4), kdcore.DTypeError, "indices must be an array, got str"),
    ],
)
def test_rows_that_cannot_be_made(arguments, error, message):
    with pytest.raises(error, match=message):
        TopKRows(*arguments)


@pytest.mark.parametrize(
    ("logits", "k", "error", "message"),
    [
        (np.zeros(3), 4, kdcore.ShapeError, "k must be at most the 3 classes of teacher_logits, got 4"),
        (np.zeros(3), 0, kdcore.DomainError, "k must be an integer of at least 1"),
        (np.zeros(3, int), 1, kdcore.DTypeError, "teacher_logits must be floating-point numbers, got dtype int64"),
        (np.float64(1.0), 1, kdcore.DTypeError, "must be an array on the host"),
        (np.zeros((2, 0)), 1, kdcore.ShapeError, "at least one class"),
        (np.array([[0.0, 1.0], [NAN, 0.0]]), 1, kdcore.NonFiniteError, "row 1 of teacher_logits is nan at class 0"),
        (np.array([[-INF, -INF]]), 1, kdcore.NonFiniteError, "row 0 of teacher_logits is -inf in every class"),
    ],
)
def test_logits_that_rows_cannot_be_made_of(logits, k, error, message):
    with pytest.raises(error, match=message):
        TopKRows.from_logits(logits, k)
    message = message.replace("k must be at most", "head_k must be at most")
    if "at least 1" not in message:
        with pytest.raises(error, match=message):
            SampledRows.from_logits(logits, 1, head_k=k)


def test_rows_of_logits_are_at_temperature_one_unless_it_is_given():
    logits = np.log([[0.5, 0.25, 0.25]])
    for rows in (kdcore.TopKRows.from_logits(logits, 2), kdcore.SampledRows.from_logits(logits, 2, seed=0)):
        assert rows.temperature == 1.0
    np.testing.assert_allclose(kdcore.TopKRows.from_logits(logits, 2).log_probs, np.log([[0.5, 0.25]]), rtol=1e-12)
