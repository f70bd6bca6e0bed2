"""Teachers that do not have every class, on a GPU or in Numba's simulator: against the oracle and the host."""

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings
from test_sparse_teachers import in_the_oracle, sparse_problems

import kdcore
from kdcore import SampledRows, TopKRows
from kdcore.cuda.presence import available
from kdcore.engines import to_device
from kdcore.testing import bounds

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if REASON is None:
    from numba import cuda

    from kdcore.cuda import sparse

TAILS = ["bucket", "renormalize", "zero", "uniform"]
DTYPES = [np.dtype(dtype) for dtype in (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)]
INF, NAN = np.inf, np.nan


def on_device(rows):
    """Rows whose arrays are on the device."""
    return type(rows)(*map(to_device, rows.arrays().values()), rows.vocab_size, rows.temperature)


def call(student, rows, labels, temperature, alpha, **options):
    """A call on the device, as NumPy arrays."""
    if "weights" in options:
        options["weights"] = to_device(options["weights"])
    labels = None if labels is None else to_device(np.asarray(labels))
    result = kdcore.kd_loss_and_gradient(to_device(student), on_device(rows), labels, temperature, alpha, **options)
    return type(result)(*(None if part is None else part.copy_to_host() for part in result))


def assert_sparse(student, rows, labels, temperature, alpha, *, tail="bucket", weights=None):
    """Row by row within the bounds of the oracle, for rows that are scaled by their weights alone."""
    sampled = isinstance(rows, SampledRows)
    options = {} if sampled else {"tail": tail}
    options |= {} if weights is None else {"weights": weights}
    tail = "zero" if sampled else tail
    result = call(student, rows, labels, temperature, alpha, reduction="none", **options)
    scales = oracle.row_scales(len(student), labels, weights=weights, reduction="none")
    exact = oracle.sparse_kd(
        student, in_the_oracle(rows), labels, temperature, alpha, tail=tail, scales=scales
    )  # fmt: skip
    read = scales > 0
    allowed = bounds.sparse_kd_bounds(
        student[read], rows[read], exact.loss[read], temperature=temperature, alpha=alpha, tail=tail, scale=scales[read]
    )
    assert (result.loss[~read] == 0).all() and (result.gradient[~read] == 0).all()
    assert bounds.within(result.loss[read], exact.loss[read], allowed.loss).all(), (result.loss, exact.loss)
    error = bounds.gradient_error(result.gradient, exact.gradient, student.dtype)[read]
    assert (error <= allowed.gradient).all(), error / allowed.gradient
    for part, values, only in ((result.ce, exact.ce, 1.0), (result.kl, exact.kl, 0.0)):
        if part is not None:
            limit = bounds.loss_bound(student.dtype, values, temperature=temperature, alpha=only, scale=scales)
            assert bounds.within(part, values, limit).all()
    return result


def problem(V=37, k=9, B=3, dtype=np.float64, temperature=2.0):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, B, V)) * 3
    labels = rng.integers(V, size=B)
    rows = TopKRows.from_logits(teacher, k, temperature)
    labels[0] = rows.indices[0, 2]
    return student.astype(dtype), rows, labels, teacher


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_oracle(dtype, tail):
    for temperature, alpha in ((2.0, 0.3), (3.0, 0.5), (1.0, 0.7), (4.0, 0.3), (0.5, 0.0)):
        student, rows, labels, _ = problem(dtype=dtype, temperature=temperature)
        assert_sparse(student, rows, labels, temperature, alpha, tail=tail, weights=np.array([0.5, 0.0, 2.0]))


@pytest.mark.parametrize("tail", TAILS)
@settings(max_examples=10)
@given(problem=sparse_problems(DTYPES[0]))
def test_wild_rows(tail, problem):
    student, rows, labels, temperature, alpha, _ = problem
    assume(student.shape[1] <= 257)  # the simulator takes its time
    assert_sparse(student, rows, labels, temperature, alpha, tail=tail)


@pytest.mark.parametrize("tail", TAILS)
def test_several_segments(monkeypatch, tail):
    """A row of which the bits of single classes do not fit at once."""
    monkeypatch.setattr(sparse, "_WORDS", 16)
    for dtype in (np.float32, np.float16):
        student, rows, labels, _ = problem(V=1291, k=40, B=2, dtype=dtype)
        assert_sparse(student, rows, labels, 2.0, 0.3, tail=tail)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_class_stored_is_the_dense_teacher(dtype, tail):
    student, rows, labels, teacher = problem(k=37, dtype=dtype)
    result = assert_sparse(student, rows, labels, 2.0, 0.3, tail=tail)
    dense = kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3, reduction="none")
    np.testing.assert_allclose(result.loss, dense.loss, rtol=1e-12 if dtype == np.float64 else 1e-6)
    np.testing.assert_allclose(result.gradient, dense.gradient, atol=1e-12 if dtype == np.float64 else 1e-6)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_a_tail_far_below_the_stored_classes(tail, dtype):
    for gap in (20.0, 90.0, 1e3, 1e30):
        student, rows, labels, _ = problem(dtype=dtype, temperature=1.0)
        student[0, rows.indices[0, 0]] = student[1, rows.indices[1, 3]] = gap
        assert np.isfinite(assert_sparse(student, rows, labels, 1.0, 0.3, tail=tail).loss).all()


@pytest.mark.parametrize("tail", TAILS)
def test_ruled_out_classes(tail):
    student, rows, labels, _ = problem()
    rest = np.setdiff1d(np.arange(37), rows.indices[0])
    student[0, rest[3]] = student[1, rows.indices[1, 4]] = -INF
    rest = np.setdiff1d(np.arange(37), rows.indices[2])
    student[2, rest] = -INF
    labels[2] = rest[0]
    result = assert_sparse(student, rows, labels, 2.0, 0.3, tail=tail)
    assert np.isfinite(result.gradient).all()
    assert (result.loss == INF).tolist() == [tail == "uniform", True, True]
    assert np.isinf(call(student, rows, labels, 2.0, 0.0, tail=tail, reduction="none").loss[2]) == (
        tail in ("bucket", "uniform")
    )


@pytest.mark.parametrize("tail", TAILS)
def test_logits_that_need_care(tail):
    """Whose exponents the quick way would round to nothing; and where only those of single classes are large."""
    student, rows, labels, _ = problem(dtype=np.float32)
    assert_sparse(np.round(student * 4) + np.float32(1e7), rows, labels, 2.0, 0.3, tail=tail)
    assert_sparse(np.round(student) * np.float32(2**16) + np.float32(1e12), rows, labels, 2.0, 0.3, tail=tail)
    student[0, rows.indices[0]] += np.float32(3e6)
    assert_sparse(student, rows, labels, 2.0, 0.3, tail=tail)


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_tail_that_has_underflowed_is_not_0(tail):
    student = np.full((1, 6), -INF)
    student[0, :2] = [1.0, 2.0]
    rows = TopKRows([[0, 1]], [np.log([0.5, 0.5])], [-2000.0], [2], 6)
    result = call(student, rows, None, 1.0, 0.0, tail=tail)
    assert result.loss == INF and np.isfinite(result.gradient).all()


def test_logits_near_the_largest_float():
    student = np.array([[3e38, -3e38, 0.0, 1.0, 3e38, -3e38]], np.float32)
    rows = TopKRows([[1, 0]], [np.log([0.25, 0.5])], [np.log(0.25)], [2], 6, 2.0)
    for tail in TAILS:
        assert_sparse(student, rows, np.array([4]), 2.0, 0.3, tail=tail)


def test_samples():
    student, _, labels, teacher = problem(dtype=np.float32)
    rows = SampledRows.from_logits(teacher, 6, 2.0, head_k=2, seed=0)
    rows = SampledRows(rows.indices, rows.log_weights + 0.7, rows.n_valid, 37, 2.0)  # which need not add up to 1
    assert_sparse(student, rows, labels, 2.0, 0.3)


def test_samples_of_the_largest_weight():
    student = np.random.default_rng(1).normal(size=(1, 5))
    assert_sparse(student, SampledRows([[3, 1]], [[64.0, 63.0]], [2], 5, 2.0), None, 2.0, 0.0)


def test_stored_probabilities_that_have_underflowed_can_be_renormalized():
    student = np.random.default_rng(0).normal(size=(1, 5))
    rows = TopKRows([[3, 1]], [[-1000.0, -1000.0 + np.log(3.0)]], [0.0], [2], 5, 2.0)
    assert_sparse(student, rows, None, 2.0, 0.0, tail="renormalize")


@pytest.mark.parametrize(
    ("indices", "values"), [(np.int64, np.float64), (np.uint16, np.float16), (np.uint32, ml_dtypes.bfloat16)]
)
def test_rows_in_other_dtypes(indices, values):
    student, rows, labels, _ = problem()
    arrays = [array.astype(values if array.dtype.kind == "f" else indices) for array in rows.arrays().values()]
    assert_sparse(student, TopKRows(*arrays, 37, 2.0), labels, 2.0, 0.3)


def test_bits_do_not_depend_on_how_rows_are_worked():
    student, rows, labels, _ = problem(B=4, dtype=np.float32)
    options = {"temperature": 2.0, "alpha": 0.3, "reduction": "none"}
    expected = call(student, rows, labels, **options)
    for i in range(4):
        part = slice(i, i + 1)
        result = call(student[part], rows[part], labels[part], **options)
        for ours, theirs in zip(result, expected, strict=True):
            assert ours.tobytes() == theirs[part].tobytes()
    s = to_device(student)
    assert kdcore.kd_logit_gradient(s, on_device(rows), to_device(labels), **options, out=s) is s
    assert s.copy_to_host().tobytes() == expected.gradient.tobytes()
    shifted = cuda.device_array(student.size + 1, np.float32)[1:].reshape(student.shape)
    shifted.copy_to_device(student)
    result = kdcore.kd_logit_gradient(shifted, on_device(rows), to_device(labels), **options)
    assert result.copy_to_host().tobytes() == expected.gradient.tobytes()


def test_reductions_and_leading_shapes():
    student, rows, labels, _ = problem(B=6)
    expected = kdcore.kd_loss_and_gradient(student, rows, labels, 2.0, 0.3)
    result = kdcore.kd_loss_and_gradient(
        to_device(student.reshape(2, 3, 37)), on_device(rows.reshape(2, 3)), to_device(labels.reshape(2, 3)), 2.0, 0.3
    )
    np.testing.assert_allclose(result.loss.copy_to_host(), expected.loss, rtol=1e-12)
    np.testing.assert_allclose(result.gradient.copy_to_host().reshape(6, 37), expected.gradient, atol=1e-14)
    one = kdcore.kd_loss(to_device(student[0]), on_device(rows[0]), to_device(labels[0]), 2.0, 0.3)
    np.testing.assert_allclose(one.copy_to_host(), kdcore.kd_loss(student[0], rows[0], labels[0], 2.0, 0.3), rtol=1e-12)


def test_alpha_one_does_not_read_the_teacher():
    student, rows, labels, _ = problem()
    bad = TopKRows(rows.indices + 100, rows.log_probs * NAN, rows.tail_logmass, rows.n_valid, 37, 2.0)
    result = call(student, bad, labels, 2.0, 1.0)
    np.testing.assert_allclose(result.loss, kdcore.cross_entropy(student, labels), rtol=1e-12)
    assert result.kl is None


@pytest.mark.parametrize(
    ("name", "place", "value", "tail", "message"),
    [
        ("n_valid", 1, 0, "zero", r"n_valid\[1\] is 0"),
        ("n_valid", 1, 10, "zero", r"n_valid\[1\] is 10"),
        ("indices", (2, 3), 37, "zero", r"indices\[2, 3\] is 37, not a class"),
        ("indices", (2, 3), -1, "zero", r"indices\[2, 3\] is -1, not a class"),
        ("indices", (0, slice(0, 9, 4)), 5, "zero", r"indices\[0, 4\] is class 5 again"),
        ("log_probs", (1, 2), NAN, "zero", r"log_probs\[1, 2\] is nan"),
        ("log_probs", (1, 2), INF, "zero", r"log_probs\[1, 2\] is inf"),
        ("log_probs", (1, 2), 0.5, "zero", r"teacher_logits\[1\] do not add up"),
        ("log_probs", (1, 2), 1e30, "zero", r"teacher_logits\[1\] do not add up"),
        ("log_probs", 1, -INF, "zero", "more than 0"),
        ("tail_logmass", 2, NAN, "bucket", r"tail_logmass\[2\] is nan"),
        ("tail_logmass", 2, INF, "uniform", r"tail_logmass\[2\] is inf"),
        ("tail_logmass", 2, 300.0, "bucket", "do not add up"),
    ],
)
def test_rows_that_cannot_be_used(name, place, value, tail, message):
    student, rows, labels, _ = problem()
    arrays = {key: array.copy() for key, array in rows.arrays().items()}
    arrays[name][place] = value
    bad = TopKRows(**arrays, vocab_size=37, temperature=2.0)
    with pytest.raises((kdcore.DomainError, kdcore.NonFiniteError), match=message):
        call(student, bad, labels, 2.0, 0.3, tail=tail, validate=True)
    result = call(student, bad, labels, 2.0, 0.3, tail=tail, reduction="none")
    row = place[0] if isinstance(place, tuple) else place
    assert np.argwhere(np.isnan(result.loss)).tolist() == [[row]]
    assert np.isnan(result.gradient).any(axis=1).nonzero()[0].tolist() == [row]
    weights = np.arange(3) != row  # a masked row is not read
    assert np.isfinite(call(student, bad, labels, 2.0, 0.3, tail=tail, weights=weights.astype(float)).loss)


def test_a_tail_beside_every_class():
    student, rows, labels, _ = problem(k=37)
    tails = rows.tail_logmass.copy()
    tails[1] = -9.0
    bad = TopKRows(rows.indices, rows.log_probs, tails, rows.n_valid, 37, 2.0)
    with pytest.raises(kdcore.DomainError, match=r"tail_logmass\[1\] is -9.0, but the row has every class"):
        call(student, bad, labels, 2.0, 0.3, validate=True)


def test_students_that_cannot_be_used():
    student, rows, labels, _ = problem()
    other = int(np.setdiff1d(np.arange(37), rows.indices[1])[3])
    for column in (int(rows.indices[1, 2]), other):
        for value, name in ((NAN, "nan"), (INF, r"\+inf")):
            bad = student.copy()
            bad[1, column] = value
            with pytest.raises(kdcore.NonFiniteError, match=rf"student_logits\[1, {column}\] is {name}"):
                call(bad, rows, labels, 2.0, 0.3, validate=True)
    student[2] = -INF
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[2\] is -inf in every class"):
        call(student, rows, labels, 2.0, 0.3, validate=True)


def test_a_mix_of_host_and_device_is_an_error():
    student, rows, labels, _ = problem()
    s, y = to_device(student), to_device(labels)
    with pytest.raises(kdcore.DeviceMismatchError, match=r"teacher_logits\.indices, .*teacher_logits\.n_valid not"):
        kdcore.kd_loss(s, rows, y, 2.0, 0.3)
    with pytest.raises(kdcore.DeviceMismatchError, match="student_logits, labels not"):
        kdcore.kd_loss(student, on_device(rows), labels, 2.0, 0.3)
    arrays = [to_device(array) for array in rows.arrays().values()]
    mixed = TopKRows(arrays[0], rows.log_probs, *arrays[2:], 37, 2.0)
    with pytest.raises(kdcore.DeviceMismatchError, match=r"teacher_logits\.log_probs not"):
        kdcore.kd_loss(s, mixed, y, 2.0, 0.3)
    integers = TopKRows(arrays[0], to_device(rows.indices.astype(np.int64)), *arrays[2:], 37, 2.0)
    with pytest.raises(kdcore.DTypeError, match="log_probs must be floating-point numbers, got dtype int64"):
        kdcore.kd_loss(s, integers, y, 2.0, 0.3)
