"""Students: the parameter gradient is the derivative of the loss, every row counts, a checkpoint is the student."""

from __future__ import annotations

import re

import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st

from kdcore import (
    CheckpointError,
    DomainError,
    DTypeError,
    GradientOrderError,
    LinearStudent,
    LogitStudent,
    NonFiniteError,
    ShapeError,
    StudentLogitsProvider,
    TeacherLogitsProvider,
    kd_step,
    kd_step_per_position,
)
from kdcore.hdf5 import read_arrays, write_arrays

V, F = 6, 4
TEMPERATURE, ALPHA = 2.5, 0.35

#: Rows of different lengths, with a token that ends two of them and a pair that occurs in three.
RAGGED = [[1, 2, 3], [5, 2, 3], [0], [4, 1, 2, 3, 2]]
RAGGED_LABELS = [[2, 3, 0], [1, -100, 5], [4], [1, 2, 3, 2, 2]]
LABELS = [0, 5, -100, 2]


class TableTeacher:
    """Seeded logits by the last token and the position, so that neither rows nor positions are alike."""

    vocab_size = V

    def __init__(self, seed=0):
        self.table = np.random.default_rng(seed).normal(scale=3.0, size=(8, V, V)).astype(np.float32)

    def logits_for_batch(self, input_ids):
        return np.stack([self.table[len(row) - 1, row[-1]] for row in input_ids])

    def logits_per_position(self, input_ids):
        lengths = np.array([len(row) for row in input_ids])
        mask = np.arange(lengths.max()) < lengths[:, None]
        logits = np.zeros((*mask.shape, V), np.float32)
        for b, row in enumerate(input_ids):
            for position, token in enumerate(row):
                logits[b, position] = self.table[position, token]
        return logits, mask


class FeatureTeacher(TableTeacher):
    """The same for rows of features, by their position in the batch alone."""

    def logits_for_batch(self, input_ids):
        return np.stack([self.table[0, b] for b in range(len(input_ids))])


# --- what the parameters are, written out by hand -------------------------------------------------------------------


def logit_parameters(student):
    return {"table": np.stack([student.logits_for_batch([context])[0] for context in contexts_of(student)])}


def contexts_of(student):
    return [list(c) for c in np.ndindex(*[V] * student.context)] if student.context else [[0]]


def linear_parameters(student):
    return {"weight": student.weight.copy(), "bias": student.bias.copy()}


def context_row(student, seen):
    """The table row for what has been seen: a number in base V of the last n tokens, 0 before the start."""
    padded = [0] * student.context + list(seen)
    row = 0
    for token in padded[len(padded) - student.context :]:
        row = row * V + token
    return row


def logit_forward(student, parameters, seen):
    return parameters["table"][context_row(student, seen)]


def linear_forward(_, parameters, seen):
    x = np.eye(F)[seen[-1]] if isinstance(seen[-1], int | np.integer) else np.asarray(seen, np.float64)
    return x @ parameters["weight"] + parameters["bias"]


def mean_loss(forward, student, parameters, teacher_rows, seen_rows, labels):
    """The objective of float64 parameters, by the textbook."""
    logits = np.stack([forward(student, parameters, seen) for seen in seen_rows])
    return float(oracle.kd(logits, np.stack(teacher_rows), np.array(labels), TEMPERATURE, ALPHA).loss)


def finite_differences(loss, parameters):
    gradients = {}
    h = 1e-6
    for name, value in parameters.items():
        gradients[name] = np.zeros(value.shape)
        for index in np.ndindex(*value.shape):
            sides = []
            for sign in (1, -1):
                moved = {key: array.astype(np.float64) for key, array in parameters.items()}
                moved[name][index] += sign * h
                sides.append(loss(moved))
            gradients[name][index] = (sides[0] - sides[1]) / (2 * h)
    return gradients


def randomise(student, seed=3):
    """Give a student parameters that are not all alike, through gradients of their own."""
    rng = np.random.default_rng(seed)
    if isinstance(student, LinearStudent):
        student.weight[...] = rng.normal(size=student.weight.shape)
        student.bias[...] = rng.normal(size=student.bias.shape)
        return student
    contexts = contexts_of(student)
    student.logits_for_batch(contexts)
    student.apply_kd_gradient(rng.normal(size=(len(contexts), V)) / student.learning_rate, denominator=1.0)
    return student


def tokens_below(limit, rows):
    return [[min(token, limit - 1) for token in row] for row in rows]


def cases():
    for context in (0, 1, 2):
        yield pytest.param(
            lambda lr, context=context: LogitStudent(V, 0.0, lr, context=context),
            logit_parameters,
            logit_forward,
            RAGGED,
            id=f"logit-context-{context}",
        )
    yield pytest.param(
        lambda lr: LinearStudent(F, V, learning_rate=lr, momentum=0.0),
        linear_parameters,
        linear_forward,
        tokens_below(F, RAGGED),
        id="linear-tokens",
    )


# The smallest rate whose update is still far above float32 rounding of the parameters (of order 1).
EPSILON = 2.0**-6


@pytest.mark.parametrize(("make", "parameters_of", "forward", "rows"), list(cases()))
def test_d1_step_is_the_derivative_of_the_returned_loss(make, parameters_of, forward, rows):
    student = randomise(make(EPSILON))
    teacher = TableTeacher()
    before = parameters_of(student)
    logits = iter(student.logits_for_batch(rows))
    loss, gradient = kd_step(teacher, rows, LABELS, TEMPERATURE, ALPHA, lambda _: next(logits))
    student.apply_kd_gradient(gradient, denominator=3)  # one of four rows is ignored

    def objective(parameters):
        return mean_loss(forward, student, parameters, teacher.logits_for_batch(rows), rows, LABELS)

    assert loss == pytest.approx(objective(before), rel=2e-6)
    expected = finite_differences(objective, before)
    after = parameters_of(student)
    for name, slope in expected.items():
        assert np.abs(slope).max() > 0.01
        np.testing.assert_allclose((before[name] - after[name]) / EPSILON, slope, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("make", "parameters_of", "forward", "rows"), list(cases()))
def test_d1_per_position_step_is_the_derivative_of_the_returned_loss(make, parameters_of, forward, rows):
    student = randomise(make(EPSILON))
    teacher = TableTeacher()
    before = parameters_of(student)
    logits, mask = student.logits_per_position(rows)
    assert mask.tolist() == [[position < len(row) for position in range(5)] for row in rows]
    per_row = iter([row[exists] for row, exists in zip(logits, mask, strict=True)])
    loss, gradient, counted = kd_step_per_position(
        teacher, rows, RAGGED_LABELS, TEMPERATURE, ALPHA, lambda _: next(per_row)
    )
    assert counted.sum() == sum(map(len, rows)) - 1
    student.apply_kd_gradient(gradient, denominator=int(counted.sum()))

    seen = [row[: end + 1] for row in rows for end in range(len(row))]
    labels = [label for row in RAGGED_LABELS for label in row]
    teacher_rows = [teacher.table[end, row[end]] for row in rows for end in range(len(row))]

    def objective(parameters):
        return mean_loss(forward, student, parameters, teacher_rows, seen, labels)

    assert loss == pytest.approx(objective(before), rel=2e-6)
    expected = finite_differences(objective, before)
    after = parameters_of(student)
    for name, slope in expected.items():
        assert np.abs(slope).max() > 0.01
        np.testing.assert_allclose((before[name] - after[name]) / EPSILON, slope, rtol=0, atol=3e-5)


def test_d1_features_step_is_the_derivative_of_the_returned_loss():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, F))
    student = randomise(LinearStudent(F, V, learning_rate=EPSILON, momentum=0.0))
    teacher = FeatureTeacher()
    before = linear_parameters(student)
    logits = iter(student.logits_for_batch(x))
    loss, gradient = kd_step(teacher, x, LABELS, TEMPERATURE, ALPHA, lambda _: next(logits))
    student.apply_kd_gradient(gradient, denominator=3)

    def objective(parameters):
        return mean_loss(linear_forward, student, parameters, teacher.logits_for_batch(x), list(x), LABELS)

    assert loss == pytest.approx(objective(before), rel=2e-6)
    expected = finite_differences(objective, before)
    for name, slope in expected.items():
        moved = (before[name] - linear_parameters(student)[name]) / EPSILON
        np.testing.assert_allclose(moved, slope, rtol=0, atol=3e-5)


def test_features_per_position_equal_the_batch_form_on_the_flattened_rows():
    rng = np.random.default_rng(6)
    rows = [rng.normal(size=(length, F)) for length in (3, 0, 2)]
    flat = np.concatenate(rows)
    ragged, plain = (randomise(LinearStudent(F, V, learning_rate=0.5)) for _ in range(2))
    logits, mask = ragged.logits_per_position(rows)
    assert logits.shape == (3, 3, V)
    assert mask.tolist() == [[True, True, True], [False, False, False], [True, True, False]]
    np.testing.assert_array_equal(logits[~mask], 0.0)
    np.testing.assert_array_equal(logits[mask], plain.logits_for_batch(flat))

    gradient = rng.normal(size=logits.shape)
    ragged.apply_kd_gradient(gradient)
    plain.apply_kd_gradient(gradient[mask])
    assert np.abs(ragged.weight - randomise(LinearStudent(F, V)).weight).max() > 0.01
    np.testing.assert_array_equal(ragged.weight, plain.weight)
    np.testing.assert_array_equal(ragged.bias, plain.bias)


def test_padding_of_the_gradient_is_not_read():
    students = [LogitStudent(V, 0.0, 0.5, context=1) for _ in range(2)]
    gradient = np.random.default_rng(0).normal(size=(2, 3, V))
    for student, padding in zip(students, (0.0, np.nan), strict=True):
        student.logits_per_position([[1, 2, 3], [4]])
        gradient[1, 1:] = padding
        student.apply_kd_gradient(gradient)
    everything = [[token] for token in range(V)]
    first, second = (student.logits_for_batch(everything) for student in students)
    assert np.abs(first[1:5]).min() > 0
    np.testing.assert_array_equal(first, second)


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [1, 2, 3])
def test_table_rows_are_chosen_by_the_last_tokens(context, tmp_path):
    student = LogitStudent(3, 0.0, 1.0, context=context)
    rng = np.random.default_rng(context)
    every = [list(c) for c in np.ndindex(*[3] * context)]
    wanted = rng.normal(size=(len(every), 3)).astype(np.float32)
    student.logits_for_batch(every)
    student.apply_kd_gradient(-wanted, denominator=1.0)
    for row in ([2], [2, 1], [1, 2, 0], [0, 1, 2, 2, 1]):
        padded = [0] * context + row
        expected = wanted[every.index(padded[-context:])]
        np.testing.assert_array_equal(student.logits_for_batch([row])[0], expected)
        positions, mask = student.logits_per_position([row])
        assert mask.all()
        for end in range(len(row)):
            padded = [0] * context + row[: end + 1]
            np.testing.assert_array_equal(positions[0, end], wanted[every.index(padded[-context:])])
    student.save_checkpoint(tmp_path / "student.h5")
    np.testing.assert_array_equal(read_arrays(tmp_path / "student.h5")[0]["table"], wanted)  # in the order of contexts


def test_contexts_that_repeat_in_a_batch_all_count():
    student = LogitStudent(4, 1.0, 0.1, context=1)
    student.logits_for_batch([[2], [0, 2], [3], [1, 1, 2]])
    gradient = np.array([[1.0, 0, 0, 0], [0, 2.0, 0, 0], [0, 0, 0, 5.0], [3.0, 0, 0, 0]])
    student.apply_kd_gradient(gradient)
    table = student.logits_for_batch([[0], [1], [2], [3]])
    np.testing.assert_allclose(table[2], [1 - 0.1 * 4 / 4, 1 - 0.1 * 2 / 4, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(table[3], [1, 1, 1, 1 - 0.1 * 5 / 4], rtol=1e-6)
    np.testing.assert_array_equal(table[:2], 1.0)  # rows that the batch does not name stay as they are, bit for bit


@given(
    st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=6),
    st.integers(0, 2),
    st.integers(0, 2**32 - 1),
)
def test_table_update_against_plain_loops(rows, context, seed):
    student = LogitStudent(3, 0.25, 0.5, context=context)
    gradient = np.random.default_rng(seed).normal(size=(len(rows), 3))
    student.logits_for_batch(rows)
    student.apply_kd_gradient(gradient, denominator=2.0)
    total = np.zeros((3**context, 3))
    for row, g in zip(rows, gradient, strict=True):
        padded = [0] * context + row
        number = 0
        for token in padded[len(padded) - context :]:
            number = 3 * number + token
        total[number] += g
    every = [list(c) for c in np.ndindex(*[3] * context)] if context else [[]]
    np.testing.assert_allclose(student.logits_for_batch(every), 0.25 - 0.5 * total / 2.0, rtol=0, atol=1e-6)


def test_gradients_are_summed_in_float64():
    student = LogitStudent(1, 0.0, 1.0)
    student.logits_for_batch([[0]] * 3)
    student.apply_kd_gradient(np.array([[1e8], [1.0], [-1e8]], np.float32), denominator=1.0)
    assert student.logits_for_batch([[0]]).tolist() == [[-1.0]]


# --- the optimiser --------------------------------------------------------------------------------------------------


def test_momentum_is_pytorchs():
    student = LinearStudent(1, 1, learning_rate=0.1, momentum=0.5)
    bias = []
    for g in (1.0, 2.0, 0.0):
        student.logits_for_batch([[0]])
        student.apply_kd_gradient(np.array([[g]]))
        bias.append(float(student.bias[0]))
    # v = 1, 2.5, 1.25; the rate multiplies v, and is not inside it
    np.testing.assert_allclose(bias, [-0.1, -0.35, -0.475], rtol=1e-6)
    student.learning_rate = 1.0
    student.logits_for_batch([[0]])
    student.apply_kd_gradient(np.array([[0.0]]))
    np.testing.assert_allclose(student.bias, [-0.475 - 0.625], rtol=1e-6)
    np.testing.assert_array_equal(student.weight[:, 0], student.bias)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_a_wholly_masked_batch_moves_by_momentum_alone(momentum):
    """Its gradient is zero, and PyTorch's SGD goes on by momentum * velocity then."""
    student = LinearStudent(F, V, learning_rate=0.25, momentum=momentum)
    student.logits_for_batch([[1]])
    student.apply_kd_gradient(np.arange(V, dtype=float)[None])
    before = student.bias.copy()
    rows = iter(student.logits_for_batch([[1], [2]]))
    loss, gradient = kd_step(TableTeacher(), [[1], [2]], [-100, -100], TEMPERATURE, ALPHA, lambda _: next(rows))
    assert loss == 0
    assert not gradient.any()
    student.apply_kd_gradient(gradient)
    np.testing.assert_allclose(student.bias - before, -0.25 * momentum * np.arange(V), rtol=1e-6)


def test_an_empty_batch_moves_nothing():
    student = LinearStudent(2, 3, learning_rate=0.1, momentum=0.9)
    student.logits_for_batch([[0]])
    student.apply_kd_gradient(np.array([[1.0, 2.0, 3.0]]))
    before = linear_parameters(student)
    assert student.logits_for_batch([]).shape == (0, 3)
    student.apply_kd_gradient(np.empty((0, 3)))
    np.testing.assert_array_equal(student.bias, before["bias"])
    np.testing.assert_array_equal(student.weight, before["weight"])
    with pytest.raises(GradientOrderError):  # the empty forward's gradient is spent all the same
        student.apply_kd_gradient(np.empty((0, 3)))

    table = LogitStudent(3, 2.0, 0.1, context=1)
    assert table.logits_for_batch([]).shape == (0, 3)
    table.apply_kd_gradient(np.empty((0, 3)))
    np.testing.assert_array_equal(table.logits_for_batch([[0], [1], [2]]), 2.0)


def students():
    return [
        pytest.param(lambda: LogitStudent(V, 0.5, 0.1, context=1), id="logit"),
        pytest.param(lambda: LinearStudent(F, V, learning_rate=0.1, momentum=0.9), id="linear"),
    ]


@pytest.mark.parametrize("make", students())
def test_the_default_denominator_is_the_number_of_rows_or_positions(make):
    rng = np.random.default_rng(1)
    rows = [[1, 2, 3], [2], [3, 3]]
    for form, count in (("logits_for_batch", 3), ("logits_per_position", 6)):
        default, given_count, split = (make() for _ in range(3))
        shape = np.shape(
            getattr(default, form)(rows)[0] if form == "logits_per_position" else default.logits_for_batch(rows)
        )
        gradient = rng.normal(size=shape)
        default.apply_kd_gradient(gradient)
        getattr(given_count, form)(rows)
        given_count.apply_kd_gradient(gradient, denominator=count)
        getattr(split, form)(rows)
        split.apply_kd_gradient(gradient, denominator=2 * count)
        every = [[token] for token in range(F)]
        start, once, same, half = (s.logits_for_batch(every) for s in (make(), default, given_count, split))
        np.testing.assert_array_equal(once, same)
        np.testing.assert_allclose(once - start, 2 * (half - start), rtol=1e-4, atol=1e-6)
        assert np.abs(once - start).max() > 1e-3


@pytest.mark.parametrize("denominator", [0, -1.0, np.nan, np.inf, True, "3"])
@pytest.mark.parametrize("make", students())
def test_denominators_that_cannot_be(make, denominator):
    student = make()
    student.logits_for_batch([[1]])
    with pytest.raises((DomainError, DTypeError), match=r"^denominator must be a positive finite number, got"):
        student.apply_kd_gradient(np.ones((1, V)), denominator=denominator)


# --- a gradient belongs to its own forward --------------------------------------------------------------------------


@pytest.mark.parametrize("make", students())
def test_gradient_order(make):
    student = make()
    with pytest.raises(GradientOrderError, match="needs a forward of its own"):
        student.apply_kd_gradient(np.ones((1, V)))
    student.logits_for_batch([[1]])
    student.apply_kd_gradient(np.ones((1, V)))
    once = student.logits_for_batch([[1]]).copy()
    student.apply_kd_gradient(np.zeros((1, V)), denominator=1e30)
    with pytest.raises(GradientOrderError):
        student.apply_kd_gradient(np.ones((1, V)))
    if isinstance(student, LogitStudent):  # no momentum: the refused gradient left no trace
        np.testing.assert_array_equal(student.logits_for_batch([[1]]), once)


@pytest.mark.parametrize("make", students())
def test_a_gradient_in_another_shape_is_refused_and_the_forward_stays(make):
    student, other = make(), make()
    for s in (student, other):
        s.logits_for_batch([[1], [2]])
    for shape in [(1, V), (3, V), (2, V + 1), (2, 1, V), (2 * V,), ()]:
        with pytest.raises(ShapeError, match=r"gradient must have the shape of the last forward \(2, 6\)"):
            student.apply_kd_gradient(np.ones(shape))
    student.apply_kd_gradient(np.ones((2, V)))
    other.apply_kd_gradient(np.ones((2, V)))
    np.testing.assert_array_equal(student.logits_for_batch([[1], [2]]), other.logits_for_batch([[1], [2]]))


@pytest.mark.parametrize("make", students())
def test_a_later_forward_takes_the_gradient(make):
    student = make()
    start = student.logits_for_batch([[0], [1], [2], [3]])
    student.logits_for_batch([[1]])
    student.logits_for_batch([[2]])
    student.apply_kd_gradient(np.full((1, V), 3.0))
    moved = np.abs(student.logits_for_batch([[0], [1], [2], [3]]) - start).max(axis=1)
    assert moved[2] == moved.max() > 0.1
    if isinstance(student, LogitStudent):
        assert moved.tolist()[:2] == [0.0, 0.0]
    else:  # the bias moves every row, the weight its own alone
        assert moved[1] == pytest.approx(moved[2] / 2)


@pytest.mark.parametrize("make", students())
def test_a_forward_per_position_does_not_take_a_gradient_per_row(make):
    student = make()
    student.logits_for_batch([[1, 2]])
    student.logits_per_position([[1, 2]])
    with pytest.raises(ShapeError):
        student.apply_kd_gradient(np.ones((1, V)))


@pytest.mark.parametrize("make", students())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradients_that_are_not_finite_change_nothing(make, bad):
    student = make()
    start = student.logits_for_batch([[1], [2]])
    gradient = np.ones((2, V), np.float32)
    gradient[1, 4] = bad
    with pytest.raises(NonFiniteError, match=r"gradient of row 1, class 4 is -?(nan|inf): it must be finite"):
        student.apply_kd_gradient(gradient)
    np.testing.assert_array_equal(student.logits_for_batch([[1], [2]]), start)


@pytest.mark.parametrize("make", students())
def test_integer_gradients_are_refused(make):
    student = make()
    student.logits_for_batch([[1]])
    with pytest.raises(DTypeError, match="gradient must be floating point, got dtype int64"):
        student.apply_kd_gradient(np.ones((1, V), np.int64))


@pytest.mark.parametrize("make", students())
def test_logits_are_the_callers_own(make):
    student = make()
    logits = student.logits_for_batch([[1]])
    kept = logits.copy()
    logits += 100.0
    np.testing.assert_array_equal(student.logits_for_batch([[1]]), kept)
    positions, _ = student.logits_per_position([[1]])
    positions += 100.0
    np.testing.assert_array_equal(student.logits_for_batch([[1]]), kept)


# --- what is no input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("token", [-1, V, 10**9])
def test_tokens_outside_the_vocabulary(token):
    student = LogitStudent(V, context=2)
    sentence = rf"token {token} is outside the student's vocabulary \[0, {V}\)"
    for form in (student.logits_for_batch, student.logits_per_position):
        with pytest.raises(DomainError, match=sentence):
            form([[1, 2], [token, 1]])
    linear = LinearStudent(F, V)
    for form in (linear.logits_for_batch, linear.logits_per_position):
        with pytest.raises(DomainError, match=rf"token {token} is outside the student's tokens \[0, {F}\)"):
            form([[0], [token]])


def test_a_linear_student_has_so_many_tokens_and_no_more():
    student = LinearStudent(n_features=F, vocab_size=V)
    assert student.logits_for_batch([[F - 1]]).shape == (1, V)
    with pytest.raises(DomainError, match=rf"token {F} is outside"):
        student.logits_for_batch([[F]])


def test_what_students_begin_with():
    linear, table = LinearStudent(n_features=F, vocab_size=V), LogitStudent(V, context=1)
    assert (linear.learning_rate, table.learning_rate) == (0.1, 0.1)
    assert not linear.logits_for_batch([[0]]).any() and not table.logits_for_batch([[0]]).any()
    assert table.logits_for_batch(np.zeros((0, 1), np.int64)).shape == (0, V)


def test_a_student_without_context_reads_no_token():
    student = LogitStudent(V, 0.5)
    assert student.logits_for_batch([[10**9], []]).tolist() == [[0.5] * V] * 2


def test_features_that_cannot_be():
    student = LinearStudent(F, V)
    with pytest.raises(ShapeError, match=r"must be feature vectors \[rows, 4\]; got shape \(2, 5\)"):
        student.logits_for_batch(np.ones((2, F + 1)))
    with pytest.raises(ShapeError, match=r"must be feature vectors \[rows, 4\]; got rows of different widths"):
        student.logits_for_batch([[1.0] * F, [1.0]])
    with pytest.raises(ShapeError, match=r"input_ids\[1\] must be feature vectors \[rows, 4\]"):
        student.logits_per_position([np.ones((2, F)), np.ones((2, F - 1))])
    with pytest.raises(ShapeError, match="input_ids must be a sequence of rows of token ids, got float"):
        student.logits_for_batch(5.0)
    for value in (np.nan, 1e300):  # 1e300 is finite until it is a float32
        sentence = rf"\[0, 1\] is {re.escape(str(value))}: features must be finite in float32"
        with pytest.raises(NonFiniteError, match=sentence):
            student.logits_for_batch(np.array([[0.0, value, 0.0, 0.0]]))
        with pytest.raises(NonFiniteError, match=r"input_ids\[1\]" + sentence):
            student.logits_per_position([np.ones((2, F)), np.array([[0.0, value, 0.0, 0.0]])])
    with pytest.raises(ShapeError, match=r"input_ids\[1\] is empty: a row needs a last token"):
        student.logits_for_batch([[1], []])


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: LogitStudent(0), "vocab_size must be an integer of at least 1, got 0"),
        (lambda: LogitStudent(V, np.inf), r"initial_value must be in \[-3.40282e\+38, 3.40282e\+38\], got inf"),
        (lambda: LogitStudent(V, np.nan), r"initial_value must be in \[-3.40282e\+38, 3.40282e\+38\], got nan"),
        (lambda: LogitStudent(V, 1e39), r"initial_value must be in .* got 1e\+39"),
        (lambda: LogitStudent(V, "0"), "initial_value must be a number in .* got '0'"),
        (lambda: LogitStudent(256, context=10), r"vocab_size=256 and context=10 would take 1.24e\+27 bytes"),
        (lambda: LogitStudent(50_000, context=3), r"vocab_size=50000 and context=3 would take 2.50e\+19 bytes"),
        (lambda: LogitStudent(2**62, context=60), r"context=60 would take 1.25e\+1139 bytes"),
        (lambda: LogitStudent(2**60), f"vocab_size={2**60} and context=0 would take 4.61e[+]18 bytes"),
        (lambda: LogitStudent(2, context=10**18), f"context must be at most 60, got {10**18}"),
        (lambda: LinearStudent(10**12, 10**9), "n_features=10+ and vocab_size=10+ would take 4.00e[+]21 bytes"),
        (
            lambda: LogitStudent(V, learning_rate=1e39),
            r"learning_rate must be in \[1.*e-45, 3.40282e\+38\], got 1e\+39",
        ),
        (lambda: LinearStudent(F, V, learning_rate=1e-50), r"learning_rate must be in .* got 1e-50"),
        (lambda: LogitStudent(V, 0.0, 0.0), "learning_rate must be a positive finite number, got 0.0"),
        (lambda: LogitStudent(V, context=-1), "context must be an integer of at least 0, got -1"),
        (lambda: LinearStudent(0, V), "n_features must be an integer of at least 1, got 0"),
        (lambda: LinearStudent(F, 1.5), "vocab_size must be an integer of at least 1, got 1.5"),
        (lambda: LinearStudent(F, V, learning_rate=np.nan), "learning_rate must be a positive finite number, got nan"),
        (lambda: LinearStudent(F, V, momentum=1.0), r"momentum must be in \[0, 1\), got 1.0"),
        (lambda: LinearStudent(F, V, momentum=-0.1), r"momentum must be in \[0, 1\), got -0.1"),
    ],
)
def test_arguments_that_cannot_be(make, sentence):
    with pytest.raises((DomainError, DTypeError), match=sentence):
        make()


@pytest.mark.parametrize("make", students())
def test_learning_rate_can_change_but_not_to_nonsense(make):
    student = make()
    with pytest.raises(DomainError, match="learning_rate must be a positive finite number, got -1"):
        student.learning_rate = -1
    assert student.learning_rate == 0.1


def test_a_table_that_memory_does_not_hold(monkeypatch):
    def no_memory(*_):
        raise MemoryError

    monkeypatch.setattr("kdcore.students.parameters.np.zeros", no_memory)
    with pytest.raises(DomainError, match="vocab_size=6 and context=1 would take 144 bytes, more than there is memory"):
        LogitStudent(V, context=1)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def train(student, steps, seed):
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        rows = [[int(token)] for token in rng.integers(F, size=3)]
        student.logits_for_batch(rows)
        student.apply_kd_gradient(rng.normal(size=(3, V)))


@pytest.mark.parametrize("make", students())
def test_a_checkpoint_gives_the_logits_and_goes_on_training_bit_for_bit(make, tmp_path):
    student = make()
    train(student, 5, seed=0)
    student.learning_rate = 0.037  # the rate of the moment, not the one of the start
    student.save_checkpoint(tmp_path / "student.h5")
    loaded = type(student).load(tmp_path / "student.h5")
    every = [[token] for token in range(F)]
    saved_logits = student.logits_for_batch(every)
    assert np.abs(saved_logits - make().logits_for_batch(every)).max() > 0.01
    np.testing.assert_array_equal(loaded.logits_for_batch(every), saved_logits)
    assert loaded.learning_rate == 0.037

    train(student, 5, seed=1)
    train(loaded, 5, seed=1)
    assert np.abs(student.logits_for_batch(every) - saved_logits).max() > 0.001
    np.testing.assert_array_equal(loaded.logits_for_batch(every), student.logits_for_batch(every))


def test_momentum_survives_a_checkpoint(tmp_path):
    student = LinearStudent(F, V, learning_rate=0.1, momentum=0.9)
    train(student, 3, seed=0)
    student.save_checkpoint(tmp_path / "s.h5")
    loaded = LinearStudent.load(tmp_path / "s.h5")
    before = loaded.bias.copy()
    loaded.logits_for_batch([[0]])
    loaded.apply_kd_gradient(np.zeros((1, V)))  # moves by momentum alone
    assert np.abs(loaded.bias - before).max() > 0.001


@pytest.mark.parametrize("make", students())
def test_a_gradient_does_not_survive_its_checkpoint(make, tmp_path):
    student = make()
    student.logits_for_batch([[1]])
    student.save_checkpoint(tmp_path / "s.h5")
    with pytest.raises(GradientOrderError):
        type(student).load(tmp_path / "s.h5").apply_kd_gradient(np.ones((1, V)))
    student.apply_kd_gradient(np.ones((1, V)))  # saving has not cost the student its own


def test_the_checkpoint_of_another_class(tmp_path):
    LogitStudent(V).save_checkpoint(tmp_path / "logit.h5")
    LinearStudent(F, V).save_checkpoint(tmp_path / "linear.h5")
    with pytest.raises(
        CheckpointError, match=r"linear\.h5: expected the checkpoint of a LogitStudent, found 'LinearStudent'"
    ):
        LogitStudent.load(tmp_path / "linear.h5")
    with pytest.raises(
        CheckpointError, match=r"logit\.h5: expected the checkpoint of a LinearStudent, found 'LogitStudent'"
    ):
        LinearStudent.load(tmp_path / "logit.h5")
    with pytest.raises(FileNotFoundError):
        LogitStudent.load(tmp_path / "none.h5")


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [(5, DTypeError, "path must be a path, got 5"), ("a\0b", DomainError, "with a null byte")],
)
@pytest.mark.parametrize("make", students())
def test_what_is_no_path(make, bad, error, words):
    student = make()
    for use in (student.save_checkpoint, type(student).load):
        with pytest.raises(error, match=words):
            use(bad)


def altered(path, arrays=None, metadata=None, without=()):
    """The checkpoint at ``path``, valid as a file, but with other content."""
    old_arrays, old_metadata = read_arrays(path)
    arrays = {name: array for name, array in {**old_arrays, **(arrays or {})}.items() if name not in without}
    metadata = {name: value for name, value in {**old_metadata, **(metadata or {})}.items() if name not in without}
    write_arrays(path, arrays, metadata)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {"arrays": {"table": np.zeros((2, V), np.float32)}},
            r"table must be float32 \(6, 6\), found float32 \(2, 6\)",
        ),
        ({"arrays": {"table": np.zeros((V, V))}}, r"table must be float32 \(6, 6\), found float64 \(6, 6\)"),
        ({"without": ("table",)}, "is not the checkpoint of a LogitStudent: 'table'"),
        ({"without": ("learning_rate",)}, "is not the checkpoint of a LogitStudent: 'learning_rate'"),
        ({"metadata": {"vocab_size": "6"}}, "is not the checkpoint of a LogitStudent: vocab_size must be"),
        ({"metadata": {"learning_rate": -1.0}}, "is not the checkpoint of a LogitStudent: learning_rate must be"),
        ({"metadata": {"context": 40}}, "is not the checkpoint of a LogitStudent: vocab_size=6 and context=40 would"),
    ],
)
def test_logit_checkpoints_that_cannot_be(change, sentence, tmp_path):
    path = tmp_path / "s.h5"
    LogitStudent(V, context=1).save_checkpoint(path)
    altered(path, **change)
    with pytest.raises(CheckpointError, match=sentence):
        LogitStudent.load(path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"arrays": {"bias": np.zeros(V + 1, np.float32)}}, r"bias must be float32 \(6,\), found float32 \(7,\)"),
        ({"without": ("velocity/weight",)}, "is not the checkpoint of a LinearStudent: 'velocity/weight'"),
        ({"without": ("momentum",)}, "is not the checkpoint of a LinearStudent: 'momentum'"),
        ({"metadata": {"momentum": 2.0}}, "is not the checkpoint of a LinearStudent: momentum must be"),
        ({"metadata": {"n_features": 2**62}}, "is not the checkpoint of a LinearStudent: n_features=.* would take"),
    ],
)
def test_linear_checkpoints_that_cannot_be(change, sentence, tmp_path):
    path = tmp_path / "s.h5"
    LinearStudent(F, V).save_checkpoint(path)
    altered(path, **change)
    with pytest.raises(CheckpointError, match=sentence):
        LinearStudent.load(path)


# --- protocols ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", students())
def test_students_are_student_providers(make):
    student = make()
    assert isinstance(student, StudentLogitsProvider)
    assert student.vocab_size == V
    assert student.logits_for_batch([[1], [2, 3]]).dtype == np.float32
    logits, mask = student.logits_per_position([[1], [2, 3]])
    assert (logits.dtype, logits.shape, mask.dtype, mask.shape) == (np.float32, (2, 2, V), np.bool_, (2, 2))


def test_what_lacks_a_method_is_no_provider():
    class Frozen:
        vocab_size = V

        def logits_for_batch(self, input_ids):
            return np.zeros((len(input_ids), V), np.float32)

        def logits_per_position(self, input_ids):
            return np.zeros((len(input_ids), 1, V), np.float32), np.ones((len(input_ids), 1), bool)

    assert isinstance(Frozen(), TeacherLogitsProvider)
    assert not isinstance(Frozen(), StudentLogitsProvider)
    assert not isinstance(object(), TeacherLogitsProvider)
