"""The falsifiers of the system that kdcore re-implements, by their own IDs: students, teachers, kd_step, pipeline.

The pinned numbers were computed in float64 by the formulas, outside this package. After each falsifier the general
statement that it samples, as a property. Those of the kernel alone are in test_falsifiers_kernel.py.
"""

from __future__ import annotations

import tempfile
from itertools import pairwise

import numpy as np
import oracle
import pytest
from hypothesis import assume, given, settings, strategies as st
from strategies import alphas, seeds, temperatures

from kdcore import (
    CheckpointError,
    DistillConfig,
    FixtureTeacher,
    LinearStudent,
    LogitStudent,
    Pipeline,
    ShapeError,
    SyntheticBatchSource,
    TeacherLogitsProvider,
    TruncatingTeacher,
    VocabularyMismatchError,
    kd_loss_and_gradient,
    kd_step,
    kd_step_per_position,
)
from kdcore.hdf5 import read_arrays, write_arrays

vocabularies = st.integers(1, 300)
#: Effective rates below 4 cannot overshoot: the Hessian by the logits is at most 1/2.
rates = st.floats(0.01, 3.99)
ragged = st.lists(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 40), max_size=5), max_size=6)


def one_step(student, teacher, ids, labels, temperature=4.0, alpha=0.0):
    """A kd_step and its update; the loss before the update."""
    rows = iter(student.logits_for_batch(ids))
    loss, gradient = kd_step(teacher, ids, labels, temperature, alpha, lambda _: next(rows))
    student.apply_kd_gradient(gradient)
    return loss


# --- students -------------------------------------------------------------------------------------------------------


def test_f_distill_student_001_one_step_raises_the_teachers_token():
    student = LogitStudent(16, 0.0, 1.0)
    one_step(student, FixtureTeacher(16), [[5]], [0])
    logits = student.logits_for_batch([[5]])[0]
    assert logits.argmax() == 5
    assert logits[5] == pytest.approx(1.5427, abs=5e-5)
    np.testing.assert_allclose(np.delete(logits, 5), -0.1028, atol=5e-5)


def test_f_distill_student_002_ten_steps_decrease_the_loss():
    student = LogitStudent(16, 0.0, 0.5)
    losses = [one_step(student, FixtureTeacher(16), [[7]], [0]) for _ in range(10)]
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[0] == pytest.approx(9.4472, abs=5e-5)
    assert losses[-1] == pytest.approx(1.7662, abs=5e-5)
    assert losses[-1] / losses[0] == pytest.approx(0.187, abs=5e-4)


@given(st.integers(2, 300), st.integers(0, 299), rates, temperatures, st.floats(-3, 3), st.integers(0, 1))
def test_f_distill_student_001_of_any_token(V, token, rate, temperature, start, context):
    token %= V
    student = LogitStudent(V, start, rate, context=context)
    before = student.logits_for_batch([[token]])[0]
    one_step(student, FixtureTeacher(V), [[token]], [0], temperature)
    after = student.logits_for_batch([[token]])[0]
    assert after[token] > before[token]
    assert (np.delete(after, token) <= np.delete(before, token)).all()


@given(st.integers(1, 40), st.integers(1, 4), rates, temperatures, alphas, st.integers(0, 1), seeds)
def test_f_distill_student_002_of_any_batch(V, B, rate, temperature, alpha, context, seed):
    """From any start, for any rows and labels: the loss of the batch does not rise in ten steps."""
    rng = np.random.default_rng(seed)
    student = LogitStudent(V, 0.0, rate, context=context)
    student.logits_for_batch(np.arange(V)[:, None])
    student.apply_kd_gradient(rng.normal(size=(V, V)), denominator=rate)
    ids, labels = rng.integers(V, size=(B, 3)), rng.integers(V, size=B)
    losses = [one_step(student, FixtureTeacher(V), ids, labels, temperature, alpha) for _ in range(10)]
    # What float32 may add: the seed's 1e-5 at T = 4, and in proportion to T² and the loss.
    for earlier, later in pairwise(losses):
        assert later <= earlier + 2e-6 * earlier + 1e-6 * (1 + temperature**2)


def test_student_sanity_vocabulary():
    assert LogitStudent(32).vocab_size == 32


def test_student_sanity_broadcast():
    student = LogitStudent(4, 0.75)
    assert student.logits_for_batch([[0], [1, 2], [3]]).tolist() == [[0.75] * 4] * 3


@given(vocabularies, st.floats(-1e30, 1e30), ragged)
def test_student_sanity_of_any_vocabulary_and_rows(V, start, ids):
    """Vocabulary and broadcast: without a context every row has the same logits, whatever its tokens."""
    student = LogitStudent(V, start)
    assert student.vocab_size == V
    np.testing.assert_array_equal(student.logits_for_batch(ids), np.full((len(ids), V), start, np.float32))


def test_student_sanity_wrong_width():
    student = LogitStudent(4)
    student.logits_for_batch([[0]])
    with pytest.raises(ShapeError, match=r"gradient must have the shape of the last forward \(1, 4\), got \(1, 5\)"):
        student.apply_kd_gradient(np.zeros((1, 5)))


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 3), st.integers(0, 3))
def test_student_sanity_any_wrong_shape(V, width, B, rows):
    assume((rows, width) != (B, V))
    student = LogitStudent(V, 1.0)
    student.logits_for_batch([[0]] * B)
    with pytest.raises(ShapeError, match="gradient must have the shape of the last forward"):
        student.apply_kd_gradient(np.ones((rows, width)))
    np.testing.assert_array_equal(student.logits_for_batch([[0]]), 1.0)


def test_student_sanity_sgd():
    student = LogitStudent(4, 1.0, 0.1)
    student.logits_for_batch([[0], [1]])
    student.apply_kd_gradient(np.full((2, 4), 2.0))
    np.testing.assert_allclose(student.logits_for_batch([[0]]), 0.8, atol=1e-6)


def test_student_sanity_opposite_gradients_cancel():
    student = LogitStudent(4, 1.0, 0.1)
    student.logits_for_batch([[0], [1]])
    student.apply_kd_gradient(np.array([[3.0, -1, 2, 0], [-3.0, 1, -2, 0]]))
    np.testing.assert_allclose(student.logits_for_batch([[0]]), 1.0, atol=1e-6)


@given(st.integers(1, 20), st.integers(1, 5), st.floats(-10, 10), st.floats(1e-4, 10), seeds)
def test_student_sanity_of_any_gradient(V, B, start, rate, seed):
    """SGD by the mean over the batch; a gradient and its opposite cancel to the bit."""
    gradient = np.random.default_rng(seed).normal(size=(B, V))
    student = LogitStudent(V, start, rate)
    student.logits_for_batch([[0]] * B)
    student.apply_kd_gradient(gradient)
    moved = student.logits_for_batch([[0]])[0]
    np.testing.assert_allclose(moved, start - rate * gradient.mean(axis=0), rtol=1e-6, atol=1e-5)
    student.logits_for_batch([[0], [1]])
    student.apply_kd_gradient(np.stack([gradient[0], -gradient[0]]))
    np.testing.assert_array_equal(student.logits_for_batch([[0]])[0], moved)


# --- teachers -------------------------------------------------------------------------------------------------------


def test_f_distill_fixture_001_argmax_is_the_last_token():
    logits = FixtureTeacher(16).logits_for_batch([[1, 2, 7], [3], [9, 5]])
    assert logits.argmax(axis=1).tolist() == [7, 3, 5]
    assert logits.dtype == np.float32
    assert sorted(set(logits.ravel().tolist())) == [0.0, 10.0]
    assert (logits == 10).sum(axis=1).tolist() == [1, 1, 1]


def test_fixture_teacher_reports_its_vocabulary():
    teacher = FixtureTeacher(151_936)
    assert teacher.vocab_size == 151_936
    assert teacher.logits_for_batch([[151_935]]).shape == (1, 151_936)
    assert isinstance(teacher, TeacherLogitsProvider)


@pytest.mark.parametrize("token", [16, 10**6, -1])
def test_fixture_teacher_takes_a_token_outside_its_vocabulary_as_0(token):
    teacher = FixtureTeacher(16)
    assert teacher.logits_for_batch([[3, token]]).argmax(axis=1).tolist() == [0]
    assert teacher.logits_per_position([[3, token, 4]])[0].argmax(axis=2).tolist() == [[0, 4, 4]]


def test_fixture_teacher_empty_batch():
    assert FixtureTeacher(16).logits_for_batch([]).shape == (0, 16)


def test_fixture_teacher_empty_row_is_token_0():
    assert FixtureTeacher(16).logits_for_batch([[], [2]]).argmax(axis=1).tolist() == [0, 2]


def test_fixture_teacher_is_pure():
    teacher = FixtureTeacher(16)
    first = teacher.logits_for_batch([[1, 2], [3]])
    kept = first.copy()
    first[...] = -1.0
    np.testing.assert_array_equal(teacher.logits_for_batch([[1, 2], [3]]), kept)
    np.testing.assert_array_equal(teacher.logits_for_batch(np.array([[1, 2], [9, 3]])), kept)


def test_fixture_teacher_per_position_expects_the_next_token():
    logits, mask = FixtureTeacher(8).logits_per_position([[1, 2, 3], [5], []])
    assert mask.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    assert logits[0].argmax(axis=1).tolist() == [2, 3, 3]  # the last position has no next token, and keeps its own
    assert logits[1, 0].argmax() == 5
    assert (logits[mask] == 10).sum(axis=1).tolist() == [1, 1, 1, 1]


@given(vocabularies, ragged)
def test_f_distill_fixture_001_of_any_ids(V, ids):
    """Any vocabulary; ragged rows, empty ones, none at all; tokens outside the vocabulary: the last token, or 0."""

    def kept(token):
        return token if 0 <= token < V else 0

    teacher = FixtureTeacher(V)
    assert teacher.vocab_size == V
    logits = teacher.logits_for_batch(ids)
    assert (logits.shape, logits.dtype) == ((len(ids), V), np.float32)
    assert logits.argmax(axis=1).tolist() == [kept(row[-1]) if row else 0 for row in ids]
    assert ((logits == 10).sum(axis=1) == 1).all() and ((logits == 0).sum(axis=1) == V - 1).all()
    np.testing.assert_array_equal(teacher.logits_for_batch(ids), logits)

    positions, mask = teacher.logits_per_position(ids)
    assert mask.sum(axis=1).tolist() == [len(row) for row in ids]
    peaks = [kept(token) for row in ids for token in row[1:] + row[-1:]]
    assert positions[mask].argmax(axis=1).tolist() == peaks


# --- kd_step --------------------------------------------------------------------------------------------------------


def test_kd_step_sanity_orchestration():
    ids, labels = [[1, 2, 3], [4, 5]], [3, 5]
    loss, gradients = kd_step(FixtureTeacher(8), ids, labels, 4.0, 0.5, lambda _: np.zeros(8, np.float32))
    teacher = np.zeros((2, 8))
    teacher[0, 3] = teacher[1, 5] = 10
    expected = oracle.kd(np.zeros((2, 8)), teacher, labels, 4.0, 0.5)
    assert 0 < loss < np.inf
    assert loss == pytest.approx(float(expected.loss), rel=1e-6)
    assert gradients.shape == (2, 8)
    np.testing.assert_allclose(gradients, (2 * expected.gradient).astype(float), atol=1e-6)


def test_kd_step_sanity_empty():
    loss, gradients = kd_step(FixtureTeacher(8), [], [], 4.0, 0.5, lambda _: np.zeros(8, np.float32))
    assert (loss, gradients.shape) == (0.0, (0, 8))


def test_kd_step_sanity_widths():
    with pytest.raises(VocabularyMismatchError, match="student logits of row 0 have 8 classes, the teacher has 16"):
        kd_step(FixtureTeacher(16), [[1]], [1], 4.0, 0.5, lambda _: np.zeros(8, np.float32))


@given(st.integers(1, 40), st.integers(0, 5), st.floats(0.5, 20.0), alphas, seeds)
def test_kd_step_sanity_of_any_batch(V, B, temperature, alpha, seed):
    """Orchestration, the empty batch and the widths, for ragged rows and a student of its own for each."""
    rng = np.random.default_rng(seed)
    ids = [rng.integers(V, size=rng.integers(1, 6)).tolist() for _ in range(B)]
    labels = rng.integers(V, size=B)
    student = rng.normal(scale=3.0, size=(B, V)).astype(np.float32)
    rows = iter(student)
    loss, gradients = kd_step(FixtureTeacher(V), ids, labels, temperature, alpha, lambda _: next(rows))
    assert gradients.shape == (B, V)
    if not B:
        assert loss == 0.0
        return
    teacher = np.zeros((B, V))
    teacher[np.arange(B), [row[-1] for row in ids]] = 10
    expected = oracle.kd(student.astype(float), teacher, labels, temperature, alpha)
    assert loss == pytest.approx(float(expected.loss), rel=2e-6, abs=1e-6 * temperature**2)
    np.testing.assert_allclose(gradients, (B * expected.gradient).astype(float), atol=2e-6 * max(1, temperature))
    with pytest.raises(VocabularyMismatchError, match=f"have {V + 1} classes, the teacher has {V}"):
        kd_step(FixtureTeacher(V), ids, labels, temperature, alpha, lambda _: np.zeros(V + 1, np.float32))


# --- pipeline -------------------------------------------------------------------------------------------------------


def pipeline_001(directory, learning_rate, epochs):
    config = DistillConfig(output_dir=str(directory), temperature=4.0, alpha=0.5, batch_size=4, epochs=epochs)
    return Pipeline(
        config,
        teacher=FixtureTeacher(32),
        student=LogitStudent(32, 0.0, learning_rate),
        batches=SyntheticBatchSource(4, rows_per_epoch=1000),
    ).execute()


@pytest.mark.parametrize(("learning_rate", "final_loss"), [(0.1, 2.6039), (1e-4, 4.9606)])
def test_f_distill_pipeline_001(learning_rate, final_loss, tmp_path):
    result = pipeline_001(tmp_path / "run", learning_rate, epochs=3)
    assert result.metrics["initial_loss"] == pytest.approx(4.9776, abs=5e-5)
    assert result.metrics["final_loss"] == pytest.approx(final_loss, abs=5e-5)
    assert result.metrics["final_loss"] < result.metrics["initial_loss"]
    assert result.metrics["steps"] == 750
    assert result.metrics["improvement_ratio"] == pytest.approx(1 - final_loss / 4.9776, abs=2e-5)


@given(
    num_tokens=st.integers(2, 8),
    spare=st.integers(0, 8),
    batch_size=st.integers(1, 8),
    epochs=st.integers(1, 2),
    temperature=st.floats(0.5, 20.0),
    alpha=st.floats(0.0, 1.0),
    learning_rate=st.floats(0.01, 3.99),
    start=st.floats(-2.0, 2.0),
)
@settings(max_examples=15)  # each is a run with its checkpoint
def test_f_distill_pipeline_001_of_any_configuration(
    num_tokens, spare, batch_size, epochs, temperature, alpha, learning_rate, start
):
    """A student with a row for every token never overshoots, so whatever the batches are its held-out loss falls."""
    with tempfile.TemporaryDirectory() as directory:
        config = DistillConfig(
            output_dir=directory, temperature=temperature, alpha=alpha, batch_size=batch_size, epochs=epochs
        )
        result = Pipeline(
            config,
            teacher=FixtureTeacher(num_tokens + spare),
            student=LogitStudent(num_tokens + spare, start, learning_rate, context=1),
            batches=SyntheticBatchSource(num_tokens, rows_per_epoch=5 * num_tokens),
        ).execute()
    assert result.metrics["steps"] == epochs * -(-5 * num_tokens // batch_size)
    assert result.metrics["final_loss"] < result.metrics["initial_loss"]


def test_falsify_recipe_007(tmp_path):
    fast, slow = (pipeline_001(tmp_path / str(rate), rate, epochs=2).metrics for rate in (0.1, 0.001))
    assert fast["initial_loss"] == pytest.approx(slow["initial_loss"], abs=1e-9)
    assert fast["final_loss"] < slow["final_loss"]
    assert fast["final_loss"] == pytest.approx(2.6293, abs=5e-5)
    assert slow["final_loss"] == pytest.approx(4.8661, abs=5e-5)


# --- checkpoints ----------------------------------------------------------------------------------------------------


@st.composite
def students(draw):
    """A student of any kind and size, and a function that trains it by some steps of seeded gradients."""
    V, F = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    rate, context = draw(st.floats(1e-3, 2.0)), draw(st.integers(0, 2))
    kind = draw(st.sampled_from(["table", "tokens", "features"]))
    if kind == "table":
        student, tokens = LogitStudent(V, draw(st.floats(-2, 2)), rate, context=context), V
    else:
        student, tokens = LinearStudent(F, V, learning_rate=rate, momentum=draw(st.sampled_from([0.0, 0.5, 0.9]))), F

    def rows(rng, n):
        return rng.normal(size=(n, F)) if kind == "features" else rng.integers(tokens, size=(n, 3))

    def train(some_student, steps, seed):
        """Train, and return the logits of rows that training has not seen."""
        rng = np.random.default_rng(seed)
        for _ in range(steps):
            logits = some_student.logits_for_batch(rows(rng, 4))
            some_student.apply_kd_gradient(rng.normal(size=logits.shape))
        return some_student.logits_for_batch(rows(rng, 20))

    return student, train


def trained_linear(epochs=5):
    rng = np.random.default_rng(0)
    x, wanted = rng.normal(size=(32, 16)).astype(np.float32), rng.normal(size=(32, 16)) * 3
    student = LinearStudent(16, 16, learning_rate=0.01)
    losses = []
    for _ in range(epochs):
        result = kd_loss_and_gradient(student.logits_for_batch(x), wanted.astype(np.float32), None, 4.0, 0.0)
        losses.append(float(result.loss))
        student.apply_kd_gradient(result.gradient, denominator=1)
    return student, x, losses


def test_falsify_export_roundtrip(tmp_path):
    student, x, _ = trained_linear()
    student.save_checkpoint(tmp_path / "student.h5")
    arrays, metadata = read_arrays(tmp_path / "student.h5")
    assert arrays["weight"].shape == (16, 16)
    assert metadata == {
        "student": "LinearStudent", "n_features": 16, "vocab_size": 16, "learning_rate": 0.01, "momentum": 0.9,
    }  # fmt: skip
    logits = student.logits_for_batch(x)
    assert np.abs(logits).max() > 0.01
    # Not only that bytes changed: the file gives the logits (D10), by hand and by load.
    np.testing.assert_allclose(x @ arrays["weight"] + arrays["bias"], logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(LinearStudent.load(tmp_path / "student.h5").logits_for_batch(x), logits)


@given(students(), st.integers(0, 5), st.integers(1, 5), seeds)
def test_falsify_export_roundtrip_of_any_student(tmp_path_factory, case, steps, more, seed):
    """The file gives any trained student's logits bit for bit, and goes on as the student itself does."""
    student, train = case
    path = tmp_path_factory.getbasetemp() / "roundtrip.h5"
    before = train(student, steps, seed)
    student.save_checkpoint(path)
    loaded = type(student).load(path)
    assert before.dtype == np.float32
    np.testing.assert_array_equal(train(loaded, 0, seed + 1), train(student, 0, seed + 1))
    after = train(student, more, seed + 2)
    np.testing.assert_array_equal(train(loaded, more, seed + 2), after)
    assert not np.array_equal(after, before)


def test_falsify_mismatched_names(tmp_path):
    student, _, _ = trained_linear(1)
    student.save_checkpoint(tmp_path / "student.h5")
    arrays, metadata = read_arrays(tmp_path / "student.h5")
    renamed = {("kernel" if name == "weight" else name): array for name, array in arrays.items()}
    write_arrays(tmp_path / "renamed.h5", renamed, metadata)
    with pytest.raises(ValueError, match=r"renamed\.h5 is not the checkpoint of a LinearStudent: 'weight'"):
        LinearStudent.load(tmp_path / "renamed.h5")


@given(students(), st.data())
def test_falsify_any_mismatched_name(tmp_path_factory, case, data):
    """Whichever array has another name, or is not there: an error that names it, and no student."""
    student, _ = case
    path = tmp_path_factory.getbasetemp() / "renamed.h5"
    student.save_checkpoint(path)
    arrays, metadata = read_arrays(path)
    name = data.draw(st.sampled_from(sorted(arrays)))
    array = arrays.pop(name)
    if data.draw(st.booleans()):
        arrays[name + "_"] = array
    write_arrays(path, arrays, metadata)
    with pytest.raises(CheckpointError, match=f"is not the checkpoint of a {type(student).__name__}: '{name}'"):
        type(student).load(path)


# Sizes of 1 are among those of the round trip of any student too.
@pytest.mark.parametrize("make", [lambda: LinearStudent(1, 1), lambda: LogitStudent(1, 2.5, context=1)])
def test_falsify_tiny_tensors(make, tmp_path):
    student = make()
    student.logits_for_batch([[0]])
    student.apply_kd_gradient(np.array([[0.5]]))
    student.save_checkpoint(tmp_path / "student.h5")
    loaded = type(student).load(tmp_path / "student.h5")
    logits = student.logits_for_batch([[0]])
    assert logits[0, 0] not in (0.0, 2.5)
    np.testing.assert_array_equal(loaded.logits_for_batch([[0]]), logits)


def test_falsify_training_reduces_loss():
    _, _, losses = trained_linear(5)
    assert all(later < earlier for earlier, later in pairwise(losses))
    assert losses[-1] < losses[0] - 0.02


@given(st.integers(1, 6), st.integers(1, 8), st.integers(2, 8), st.floats(0.05, 0.95), temperatures, alphas, seeds)
def test_falsify_training_reduces_loss_of_any_batch(F, B, V, share, temperature, alpha, seed):
    """No step of plain descent below twice the inverse curvature raises the loss, whatever the batch."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(B, F)).astype(np.float32)
    wanted, labels = rng.normal(size=(B, V)).astype(np.float32) * 3, rng.integers(V, size=B)
    # The Hessian by the logits is at most 1/2, so by [W; b] at most that of (x, 1) (x, 1)^T / 2B.
    curvature = np.linalg.norm(np.c_[x, np.ones(B)], 2) ** 2 / (2 * B)
    student = LinearStudent(F, V, learning_rate=share * 2 / curvature, momentum=0.0)
    losses = []
    for _ in range(10):
        result = kd_loss_and_gradient(student.logits_for_batch(x), wanted, labels, temperature, alpha)
        losses.append(float(result.loss))
        student.apply_kd_gradient(result.gradient, denominator=1)
    for earlier, later in pairwise(losses):
        assert later <= earlier + 2e-6 * earlier + 1e-6 * (1 + temperature**2)


# --- per position ---------------------------------------------------------------------------------------------------

PERPOS_IDS = [[1, 2, 3, 4], [5, 6, 7, 8]]


def zeros(row):
    return np.zeros((len(row), 16), np.float32)


def test_ft_perpos_001_every_position_is_a_prediction():
    loss, gradients, mask = kd_step_per_position(FixtureTeacher(16), PERPOS_IDS, PERPOS_IDS, 4.0, 0.5, zeros)
    assert gradients.shape == (2, 4, 16)
    assert mask.sum() == 8
    assert (np.abs(gradients).max(axis=2) > 0.1).all()
    assert 0 < loss < np.inf


def test_ft_perpos_002_four_positions_give_more_signal_than_one():
    _, gradients, _ = kd_step_per_position(FixtureTeacher(16), PERPOS_IDS[:1], [[2, 3, 4, 4]], 4.0, 0.5, zeros)
    _, last = kd_step(FixtureTeacher(16), PERPOS_IDS[:1], [4], 4.0, 0.5, lambda _: np.zeros(16, np.float32))
    # Equal logits everywhere, so each position's gradient is as long as the last one's.
    assert np.abs(gradients).sum() == pytest.approx(4 * np.abs(last).sum(), rel=1e-5)


def test_ft_perpos_003_no_signal_where_the_student_is_the_teacher():
    teacher = FixtureTeacher(16)
    rows = iter(teacher.logits_per_position(PERPOS_IDS)[0])
    loss, gradients, _ = kd_step_per_position(teacher, PERPOS_IDS, None, 4.0, 0.0, lambda _: next(rows))
    assert loss == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(gradients, 0.0, atol=1e-6)


def test_ft_perpos_004_ragged_labels_raise_instead_of_meeting_at_the_shortest():
    with pytest.raises(ShapeError, match="labels must have 4 positions in row 0, like input_ids, got 2"):
        kd_step_per_position(FixtureTeacher(16), [[1, 2, 3, 4]], [[1, 2]], 4.0, 0.5, zeros)


def test_ft_perpos_005_the_pipeline_falls(tmp_path):
    config = DistillConfig(output_dir=str(tmp_path / "run"), batch_size=4, per_position=True)
    metrics = Pipeline(
        config,
        teacher=FixtureTeacher(8),
        student=LogitStudent(8, context=1, learning_rate=2.0),
        batches=SyntheticBatchSource(8, sequence_length=4, rows_per_epoch=80, per_position=True),
    ).execute().metrics  # fmt: skip
    assert metrics["steps"] == 20
    assert metrics["final_loss"] < 0.9 * metrics["initial_loss"]


# --- vocabularies ---------------------------------------------------------------------------------------------------


class Padded:
    """A teacher whose head is wider than its tokenizer."""

    vocab_size = 152_064

    def logits_for_batch(self, input_ids):
        rng = np.random.default_rng([row[-1] for row in input_ids])
        return rng.normal(scale=3.0, size=(len(input_ids), self.vocab_size)).astype(np.float32)

    def logits_per_position(self, input_ids):
        raise NotImplementedError


def test_ft_vocab_align_001_002_004_truncated_before_the_softmax():
    teacher = TruncatingTeacher(Padded(), 151_936)
    assert teacher.vocab_size == 151_936
    ids = [[1], [2]]
    logits, wide = teacher.logits_for_batch(ids), Padded().logits_for_batch(ids)
    assert logits.shape == (2, 151_936)
    np.testing.assert_array_equal(logits, wide[:, :151_936])
    p = np.exp(wide.astype(np.float64) - wide.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    assert teacher.discarded_mass == pytest.approx(p[:, 151_936:].sum(axis=1).mean(), rel=1e-6)
    assert teacher.discarded_mass > 1e-4


def test_ft_vocab_align_003_a_teacher_cannot_be_widened():
    with pytest.raises(VocabularyMismatchError, match="a teacher with 152064 classes cannot be truncated to 200000"):
        TruncatingTeacher(Padded(), 200_000)
    with pytest.raises(ValueError, match="vocab_size must be an integer of at least 1, got 0"):
        TruncatingTeacher(Padded(), 0)
