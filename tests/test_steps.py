"""kd_step and its per-position form: who is asked what, and what comes back."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from hypothesis import given, strategies as st

from kdcore import (
    DomainError,
    DTypeError,
    FixtureTeacher,
    LabelError,
    LogitStudent,
    NonFiniteError,
    ShapeError,
    TopKRows,
    VocabularyMismatchError,
    kd_loss_and_gradient,
    kd_step,
    kd_step_per_position,
)

V = 8
IDS = [[1, 2, 3], [4, 5], [6]]
LABELS = [3, 5, 0]


class Recorder:
    """Seeded logits by row length and last token; keeps what it was asked."""

    def __init__(self, vocab_size=V, width=None, rows=None, extra_positions=0, dtype=np.float32):
        self.vocab_size = vocab_size
        self.width = vocab_size if width is None else width
        self.rows = rows
        self.extra_positions = extra_positions
        self.dtype = dtype
        self.asked = []

    def row(self, seen):
        seed = [len(seen), *map(int, seen)]
        return np.random.default_rng(seed).normal(scale=4.0, size=self.width).astype(self.dtype)

    def logits_for_batch(self, input_ids):
        self.asked.append([list(row) for row in input_ids])
        logits = np.stack([self.row(row) for row in input_ids])
        return logits if self.rows is None else logits[: self.rows]

    def logits_per_position(self, input_ids):
        self.asked.append([list(row) for row in input_ids])
        lengths = np.array([len(row) + self.extra_positions for row in input_ids])
        mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
        logits = np.full((*mask.shape, self.width), np.nan, self.dtype)  # padding is nobody's to read
        for b, row in enumerate(input_ids):
            for position in range(lengths[b]):
                logits[b, position] = self.row(row[: position + 1])
        return logits, mask


class Silent:
    """A teacher that must not be asked."""

    vocab_size = V

    def logits_for_batch(self, input_ids):
        raise AssertionError("the teacher was asked")

    logits_per_position = logits_for_batch


def student_rows(rows=3, dtype=np.float32, vocab_size=V):
    return np.random.default_rng(11).normal(scale=2.0, size=(rows, vocab_size)).astype(dtype)


def in_order(logits):
    rows = iter(logits)
    return lambda _: next(rows)


# --- kd_step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("labels", [LABELS, [3, -100, 0]])
def test_kd_step_against_the_textbook(divergence, alpha, labels):
    teacher, logits = Recorder(), student_rows()
    loss, gradients = kd_step(teacher, IDS, labels, 3.0, alpha, in_order(logits), divergence=divergence)
    expected = oracle.kd(logits, np.stack([teacher.row(row) for row in IDS]), labels, 3.0, alpha, divergence=divergence)
    count = sum(label != -100 for label in labels)
    assert type(loss) is float
    assert loss == pytest.approx(float(expected.loss), rel=1e-6)
    assert gradients.dtype == np.float32
    np.testing.assert_allclose(gradients, (expected.gradient * count).astype(float), rtol=0, atol=2e-6)
    assert np.abs(gradients[0]).max() > 0.05


def test_the_teacher_is_asked_once_and_the_student_once_a_row_in_order():
    teacher, rows, logits = Recorder(), [], student_rows()

    def compute(row_ids):
        assert len(teacher.asked) == 1
        rows.append(list(row_ids))
        return logits[len(rows) - 1]

    kd_step(teacher, IDS, LABELS, 4.0, 0.5, compute)
    assert rows == IDS
    assert teacher.asked == [IDS]


def test_gradients_are_not_divided_by_the_batch():
    teacher, logits = Recorder(), student_rows()
    loss, gradients = kd_step(teacher, IDS, LABELS, 4.0, 0.5, in_order(logits))
    singles = [
        kd_step(teacher, [row], [label], 4.0, 0.5, lambda _, i=i: logits[i])
        for i, (row, label) in enumerate(zip(IDS, LABELS, strict=True))
    ]
    np.testing.assert_array_equal(gradients, np.concatenate([gradient for _, gradient in singles]))
    assert loss == pytest.approx(sum(single for single, _ in singles) / 3, rel=1e-14)


def test_an_ignored_row_counts_nowhere():
    teacher, logits = Recorder(), student_rows()
    loss, gradients = kd_step(teacher, IDS, [3, -100, 0], 4.0, 0.5, in_order(logits))
    kept, kept_gradients = kd_step(teacher, [IDS[0], IDS[2]], [3, 0], 4.0, 0.5, in_order(logits[[0, 2]]))
    assert loss == pytest.approx(kept, rel=1e-14)
    np.testing.assert_array_equal(gradients[1], 0.0)
    np.testing.assert_array_equal(gradients[[0, 2]], kept_gradients)
    other, _ = kd_step(teacher, IDS, [3, 7, 0], 4.0, 0.5, in_order(logits), ignore_index=7)
    assert other == loss


def test_all_rows_ignored():
    loss, gradients = kd_step(Recorder(), IDS, [-100] * 3, 4.0, 0.5, in_order(student_rows()))
    assert loss == 0.0
    np.testing.assert_array_equal(gradients, np.zeros((3, V)))


def test_no_labels_at_alpha_zero():
    teacher, logits = Recorder(), student_rows()
    loss, gradients = kd_step(teacher, IDS, None, 4.0, 0.0, in_order(logits))
    labelled, same = kd_step(teacher, IDS, LABELS, 4.0, 0.0, in_order(logits))
    assert loss == labelled > 0.1
    np.testing.assert_array_equal(gradients, same)
    with pytest.raises(LabelError, match="labels are needed unless alpha is 0"):
        kd_step(teacher, IDS, None, 4.0, 0.5, in_order(logits))


def test_alpha_one_does_not_ask_the_teacher():
    logits = student_rows()
    loss, gradients = kd_step(Silent(), IDS, LABELS, 4.0, 1.0, in_order(logits))
    expected = oracle.kd(logits, None, LABELS, 4.0, 1.0)
    assert loss == pytest.approx(float(expected.loss), rel=1e-6)
    np.testing.assert_allclose(gradients, (3 * expected.gradient).astype(float), rtol=0, atol=1e-6)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        kd_step(Silent(), IDS, LABELS, 4.0, 0.999, in_order(logits))


def test_an_empty_batch_asks_nobody():
    loss, gradients = kd_step(Silent(), [], [], 4.0, 0.5, in_order([]))
    assert (loss, gradients.shape) == (0.0, (0, V))


@pytest.mark.parametrize("ids", [np.array([[1, 2], [3, 4]]), [np.array([1, 2]), (3, 4)], ((1, 2), (3, 4))])
@pytest.mark.parametrize("labels", [[2, 4], (2, 4), np.array([2, 4], np.int8)])
def test_lists_tuples_and_arrays_are_the_same(ids, labels):
    logits = student_rows(2)
    loss, gradients = kd_step(Recorder(), ids, labels, 4.0, 0.5, in_order(logits))
    plain, same = kd_step(
        Recorder(), [[1, 2], [3, 4]], [2, 4], 4.0, 0.5, in_order([list(map(float, r)) for r in logits])
    )
    assert loss == pytest.approx(plain, rel=1e-6)
    np.testing.assert_allclose(gradients, same, rtol=0, atol=1e-6)


def test_float64_students_keep_their_digits():
    logits = student_rows(dtype=np.float64)
    teacher = Recorder(dtype=np.float64)
    loss, gradients = kd_step(teacher, IDS, LABELS, 4.0, 0.5, in_order(logits))
    expected = oracle.kd(logits, np.stack([teacher.row(row) for row in IDS]), LABELS, 4.0, 0.5)
    assert gradients.dtype == np.float64
    assert loss == pytest.approx(float(expected.loss), rel=1e-12)
    np.testing.assert_allclose(gradients, (3 * expected.gradient).astype(float), rtol=0, atol=1e-12)


@pytest.mark.parametrize("labels", [[3, 5], [3, 5, 0, 1], [[3], [5], [0]], 3])
def test_d15_labels_of_another_length(labels):
    with pytest.raises(ShapeError, match="labels must have one entry for each of the 3 rows, got shape"):
        kd_step(Silent(), IDS, labels, 4.0, 0.5, in_order(student_rows()))


def test_d15_teacher_rows_are_counted():
    with pytest.raises(ShapeError, match=r"the teacher must return logits of shape \(3, 8\), got \(2, 8\)"):
        kd_step(Recorder(rows=2), IDS, LABELS, 4.0, 0.5, in_order(student_rows()))


def test_d15_teacher_width_is_its_vocabulary():
    with pytest.raises(VocabularyMismatchError, match="the teacher says vocab_size=8, but its logits have 9"):
        kd_step(Recorder(width=9), IDS, LABELS, 4.0, 0.5, in_order(student_rows()))


def test_d14_student_width_differs_from_the_teacher():
    rows = [*student_rows(2), np.zeros(7, np.float32)]
    with pytest.raises(VocabularyMismatchError, match="student logits of row 2 have 7 classes, the teacher has 8"):
        kd_step(Recorder(), IDS, LABELS, 4.0, 0.5, in_order(rows))


@pytest.mark.parametrize(
    ("row", "error", "sentence"),
    [
        (np.zeros((1, V), np.float32), ShapeError, r"row 0 must have shape \(8,\), got \(1, 8\)"),
        (np.float32(1), ShapeError, r"row 0 must have shape \(8,\), got \(\)"),
        (np.zeros(V, np.int64), DTypeError, "row 0 must be floating point, got dtype int64"),
        (None, DTypeError, "row 0 must be floating point, got dtype object"),
    ],
)
def test_student_rows_that_cannot_be(row, error, sentence):
    with pytest.raises(error, match=sentence):
        kd_step(Recorder(), [[1]], [1], 4.0, 0.5, lambda _: row)


@pytest.mark.parametrize("label", [V, -1, 10**6])
def test_d8_labels_outside_the_vocabulary(label):
    with pytest.raises(LabelError, match=rf"labels\[1\] is {label}, neither a class in \[0, 8\) nor ignore_index=-100"):
        kd_step(Recorder(), IDS, [3, label, 0], 4.0, 0.5, in_order(student_rows()))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_d7_logits_that_are_not_finite(value):
    rows = student_rows()
    rows[1, 2] = value
    with pytest.raises(NonFiniteError, match=r"student_logits\[1, 2\] is"):
        kd_step(Recorder(), IDS, LABELS, 4.0, 0.5, in_order(rows))


@pytest.mark.parametrize("form", [kd_step, kd_step_per_position])
@pytest.mark.parametrize(
    ("temperature", "alpha", "sentence"),
    [
        (0.0, 0.5, "temperature must be a positive finite number, got 0.0"),
        (np.nan, 0.5, "temperature must be a positive finite number, got nan"),
        (4.0, 1.5, r"alpha must be in \[0, 1\], got 1.5"),
        (4.0, -0.1, r"alpha must be in \[0, 1\], got -0.1"),
        (4.0, np.nan, r"alpha must be in \[0, 1\], got nan"),
    ],
)
def test_d7_scalars_are_checked_before_anything_is_asked(form, temperature, alpha, sentence):
    for ids in ([], [[1]]):
        with pytest.raises(DomainError, match=sentence):
            form(Silent(), ids, [[1]] * len(ids), temperature, alpha, in_order([]))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"divergence": "kl"}, DomainError, "divergence must be one of 'forward_kl', 'reverse_kl'.*, got 'kl'"),
        ({"ignore_index": 0.5}, DTypeError, "ignore_index must be an integer, got 0.5"),
        ({"labels": None}, LabelError, "labels are needed unless alpha is 0"),
    ],
)
@pytest.mark.parametrize(("form", "ids"), [(kd_step, []), (kd_step_per_position, []), (kd_step_per_position, [[], []])])
def test_an_empty_batch_is_checked_like_any_other(form, ids, arguments, error, sentence):
    rest = dict(arguments)
    labels = rest.pop("labels", ids)
    with pytest.raises(error, match=sentence):
        form(Silent(), ids, labels, 4.0, 0.5, in_order([]), **rest)


def test_an_unknown_divergence_is_named():
    with pytest.raises(DomainError, match="divergence must be one of 'forward_kl', 'reverse_kl'.*, got 'kl'"):
        kd_step(Recorder(), IDS, LABELS, 4.0, 0.5, in_order(student_rows()), divergence="kl")


# --- per position ---------------------------------------------------------------------------------------------------

POSITION_LABELS = [[3, 0, 7], [5, -100], [0]]


def position_rows(ids=IDS, dtype=np.float32):
    rng = np.random.default_rng(12)
    return [rng.normal(scale=2.0, size=(len(row), V)).astype(dtype) for row in ids]


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_per_position_against_the_textbook(divergence, alpha):
    teacher, rows = Recorder(), position_rows()
    loss, gradients, counted = kd_step_per_position(
        teacher, IDS, POSITION_LABELS, 3.0, alpha, in_order(rows), divergence=divergence
    )
    assert counted.tolist() == [[True, True, True], [True, False, False], [True, False, False]]
    assert gradients.shape == (3, 3, V)
    labels = [label for row in POSITION_LABELS for label in row]
    seen = [row[: end + 1] for row in IDS for end in range(len(row))]
    expected = oracle.kd(
        np.concatenate(rows), np.stack([teacher.row(row) for row in seen]), labels, 3.0, alpha, divergence=divergence
    )
    assert loss == pytest.approx(float(expected.loss), rel=1e-6)
    exists = np.array([[True, True, True], [True, True, False], [True, False, False]])
    np.testing.assert_allclose(gradients[exists], (5 * expected.gradient).astype(float), rtol=0, atol=2e-6)
    np.testing.assert_array_equal(gradients[~exists], 0.0)


@given(st.lists(st.lists(st.integers(0, V - 1), min_size=1, max_size=4), min_size=1, max_size=4))
def test_every_position_is_a_kd_step_on_its_prefix(ids):
    teacher = Recorder()
    rows = position_rows(ids)
    labels = [[(token + 1) % V for token in row] for row in ids]
    loss, gradients, counted = kd_step_per_position(teacher, ids, labels, 4.0, 0.4, in_order(rows))
    total, positions = 0.0, 0
    for b, row in enumerate(ids):
        for end in range(len(row)):
            single, gradient = kd_step(
                teacher, [row[: end + 1]], [labels[b][end]], 4.0, 0.4, lambda _, b=b, end=end: rows[b][end]
            )
            np.testing.assert_array_equal(gradients[b, end], gradient[0])
            total, positions = total + single, positions + 1
    assert counted.sum() == positions
    assert loss == pytest.approx(total / positions, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        ([[3, 0], [5, 1], [0]], "labels must have 3 positions in row 0, like input_ids, got 2"),
        ([[3, 0, 7], [5, 1, 2], [0]], "labels must have 2 positions in row 1, like input_ids, got 3"),
        ([[3, 0, 7], [5, 1], []], "labels must have 1 positions in row 2, like input_ids, got 0"),
        ([[3, 0, 7, 1], [5, 1], [0]], "labels must have 3 positions in row 0, like input_ids, got 4"),
        ([[3, 0, 7], [5, 1]], "labels must have one row for each of the 3 rows of input_ids, got 2"),
    ],
)
def test_d2_unequal_lengths_raise_and_never_truncate(labels, sentence):
    with pytest.raises(ShapeError, match=sentence):
        kd_step_per_position(Silent(), IDS, labels, 4.0, 0.5, in_order(position_rows()))


def test_d2_the_teacher_must_have_the_positions_of_the_batch():
    with pytest.raises(ShapeError, match="the teacher's mask must have 3 positions in row 0, like input_ids, got 4"):
        kd_step_per_position(Recorder(extra_positions=1), IDS, POSITION_LABELS, 4.0, 0.5, in_order(position_rows()))

    class LastOnly(Recorder):
        """The seed's fallback: the last position, shown as the only one."""

        def logits_per_position(self, input_ids):
            return self.logits_for_batch(input_ids)[:, None], np.ones((len(input_ids), 1), bool)

    with pytest.raises(ShapeError, match="the teacher's mask must have 3 positions in row 0, like input_ids, got 1"):
        kd_step_per_position(LastOnly(), IDS, POSITION_LABELS, 4.0, 0.5, in_order(position_rows()))


def test_d2_a_teacher_that_pads_on_the_left_is_refused():
    class LeftPadded(Recorder):
        def logits_per_position(self, input_ids):
            logits, mask = super().logits_per_position(input_ids)
            return logits[:, ::-1], mask[:, ::-1]

    with pytest.raises(ShapeError, match=r"the teacher's mask must have shape \(3, 3\) with rows padded on the right"):
        kd_step_per_position(LeftPadded(), IDS, POSITION_LABELS, 4.0, 0.5, in_order(position_rows()))


def test_d2_the_student_must_have_the_positions_of_its_row():
    rows = position_rows()
    rows[1] = rows[1][:1]
    with pytest.raises(ShapeError, match=r"student logits of row 1 must have shape \(2, 8\), got \(1, 8\)"):
        kd_step_per_position(Recorder(), IDS, POSITION_LABELS, 4.0, 0.5, in_order(rows))


def test_d14_d15_widths_per_position():
    with pytest.raises(VocabularyMismatchError, match="the teacher says vocab_size=8, but its logits have 7"):
        kd_step_per_position(Recorder(width=7), IDS, POSITION_LABELS, 4.0, 0.5, in_order(position_rows()))
    rows = position_rows()
    rows[0] = rows[0][:, :7]
    with pytest.raises(VocabularyMismatchError, match="student logits of row 0 have 7 classes, the teacher has 8"):
        kd_step_per_position(Recorder(), IDS, POSITION_LABELS, 4.0, 0.5, in_order(rows))


def test_per_position_rows_may_be_empty():
    ids, labels = [[], [1, 2], []], [[], [2, 3], []]
    calls = []
    rows = position_rows(ids)

    def compute(row):
        calls.append(list(row))
        return rows[len(calls) - 1]

    loss, gradients, counted = kd_step_per_position(Recorder(), ids, labels, 4.0, 0.5, compute)
    alone, same, _ = kd_step_per_position(Recorder(), [[1, 2]], [[2, 3]], 4.0, 0.5, lambda _: rows[1])
    assert calls == ids
    assert loss == alone > 0.1
    np.testing.assert_array_equal(gradients[1], same[0])
    np.testing.assert_array_equal(gradients[[0, 2]], 0.0)
    assert counted.tolist() == [[False, False], [True, True], [False, False]]


@pytest.mark.parametrize("ids", [[], [[], []]])
def test_per_position_without_positions_asks_nobody(ids):
    loss, gradients, counted = kd_step_per_position(Silent(), ids, ids, 4.0, 0.5, in_order([]))
    assert loss == 0.0
    assert gradients.shape == (len(ids), 0, V)
    assert counted.shape == (len(ids), 0)


def test_per_position_without_labels_counts_every_position():
    rows = position_rows()
    loss, gradients, counted = kd_step_per_position(Recorder(), IDS, None, 4.0, 0.0, in_order(rows))
    all_labels = [[0] * len(row) for row in IDS]
    labelled, same, _ = kd_step_per_position(Recorder(), IDS, all_labels, 4.0, 0.0, in_order(rows))
    assert counted.sum() == 6
    assert loss == labelled > 0.1
    np.testing.assert_array_equal(gradients, same)


def test_per_position_alpha_one_does_not_ask_the_teacher():
    rows = position_rows()
    loss, _, _ = kd_step_per_position(Silent(), IDS, POSITION_LABELS, 4.0, 1.0, in_order(rows))
    labels = [label for row in POSITION_LABELS for label in row]
    assert loss == pytest.approx(float(oracle.kd(np.concatenate(rows), None, labels, 4.0, 1.0).loss), rel=1e-6)


def test_per_position_with_the_providers_of_this_package():
    student = LogitStudent(V, context=1)
    ids = np.array([[1, 2, 3], [4, 5, 6]])
    logits, mask = student.logits_per_position(ids)
    loss, gradients, counted = kd_step_per_position(FixtureTeacher(V), ids, ids, 4.0, 0.5, in_order(logits))
    assert counted.all()
    teacher_rows = [np.eye(V)[token] * 10 for token in (2, 3, 3, 5, 6, 6)]
    assert loss == pytest.approx(float(oracle.kd(np.zeros((6, V)), np.stack(teacher_rows), ids.ravel(), 4.0, 0.5).loss))
    student.apply_kd_gradient(gradients)
    assert (student.logits_per_position(ids)[0] != 0).any()
    np.testing.assert_array_equal(mask, counted)


@pytest.mark.parametrize("step", [kd_step, kd_step_per_position])
def test_a_teacher_and_a_function_are_needed(step):
    with pytest.raises(DTypeError, match="teacher must be a TeacherLogitsProvider, got None"):
        step(None, [[0]], [0], 1.0, 0.5, lambda row: np.zeros(4))
    with pytest.raises(DTypeError, match="compute_student_logits must be callable, got array"):
        step(FixtureTeacher(4), [[0]], [0], 1.0, 0.5, np.zeros(4))


# --- teachers without every class ----------------------------------------------------------------------------------


class Best(Recorder):
    """The best three classes of each row at T = 2."""

    def logits_for_batch(self, input_ids):
        return TopKRows.from_logits(super().logits_for_batch(input_ids), 3, 2.0)

    def logits_per_position(self, input_ids):
        logits, mask = super().logits_per_position(input_ids)
        return TopKRows.from_logits(np.nan_to_num(logits), 3, 2.0), mask


@pytest.mark.parametrize("tail", ["bucket", "uniform"])
def test_a_teacher_of_its_best_classes(tail):
    student = np.random.default_rng(0).normal(size=(3, V))
    rows = iter(student)
    loss, gradients = kd_step(Best(), IDS, LABELS, 2.0, 0.3, lambda row: next(rows), tail=tail)
    expected = kd_loss_and_gradient(student, Best().logits_for_batch(IDS), LABELS, 2.0, 0.3, tail=tail)
    assert loss == pytest.approx(float(expected.loss), rel=1e-14)
    np.testing.assert_allclose(gradients / 3, expected.gradient, atol=1e-15)


def test_a_teacher_of_its_best_classes_per_position():
    student = np.random.default_rng(0).normal(size=(3, V))
    loss, gradients, mask = kd_step_per_position(
        Best(), IDS, None, 2.0, 0.0, lambda row: student[: len(row)], tail="zero"
    )
    teacher, exists = Best().logits_per_position(IDS)
    assert (mask == exists).all()
    expected = kd_loss_and_gradient(
        np.tile(student, (3, 1, 1)), teacher, None, 2.0, 0.0, tail="zero", weights=mask.astype(float)
    )
    assert loss == pytest.approx(float(expected.loss), rel=1e-14)
    np.testing.assert_allclose(gradients / mask.sum(), expected.gradient, atol=1e-15)


def test_rows_of_another_shape_and_policies_that_there_are_not():
    with pytest.raises(ShapeError, match=r"the teacher must return rows of shape \(3,\), got \(2,\)"):
        kd_step(Best(rows=2), IDS, LABELS, 2.0, 0.3, lambda row: np.zeros(V))
    with pytest.raises(DomainError, match="tail must be one of"):
        kd_step(Silent(), [], [], 2.0, 0.3, lambda row: np.zeros(V), tail="none")
