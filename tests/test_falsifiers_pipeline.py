"""The falsifiers of the system that kdcore re-implements, by their own IDs: students, teachers, kd_step, pipeline.

The pinned numbers were computed in float64 by the formulas, outside this package.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import oracle
import pytest

from kdcore import (
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
    kd_logit_gradient,
    kd_loss,
    kd_loss_and_gradient,
    kd_step,
    kd_step_per_position,
    softmax,
)
from kdcore.hdf5 import read_arrays, write_arrays


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


def test_student_sanity_vocabulary():
    assert LogitStudent(32).vocab_size == 32


def test_student_sanity_broadcast():
    student = LogitStudent(4, 0.75)
    assert student.logits_for_batch([[0], [1, 2], [3]]).tolist() == [[0.75] * 4] * 3


def test_student_sanity_wrong_width():
    student = LogitStudent(4)
    student.logits_for_batch([[0]])
    with pytest.raises(ShapeError, match=r"gradient must have the shape of the last forward \(1, 4\), got \(1, 5\)"):
        student.apply_kd_gradient(np.zeros((1, 5)))


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


def test_kd_gradient_reduces_loss():
    rng = np.random.default_rng(0)
    logits, teacher, labels = rng.normal(size=(2, 4)), rng.normal(size=(2, 4)), [1, 3]
    losses = []
    for _ in range(100):
        result = kd_loss_and_gradient(logits, teacher, labels, 4.0, 0.7)
        losses.append(float(result.loss))
        logits = logits - 0.5 * result.gradient
    assert losses[-1] < losses[0]
    assert all(later <= earlier for earlier, later in pairwise(losses))


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


# --- kd_step --------------------------------------------------------------------------------------------------------


def test_kd_step_sanity_softmax():
    p = softmax(np.array([[1.0, 0.5, -0.3, 2.0], [1e4, -1e4, 0.0, 3.0]], np.float32), 4.0)
    np.testing.assert_allclose(p.sum(axis=1), 1.0, atol=1e-6)
    assert (p >= 0).all()


def test_kd_step_sanity_gradient_of_ce():
    gradient = kd_logit_gradient(np.zeros(4, np.float32), np.zeros(4, np.float32), 2, 4.0, 1.0)
    np.testing.assert_allclose(gradient, [0.25, 0.25, -0.75, 0.25], atol=1e-6)


def test_kd_step_sanity_loss_of_ce():
    loss = kd_loss(np.zeros(4, np.float32), np.array([10, 0, 0, 0], np.float32), 2, 4.0, 1.0)
    assert float(loss) == pytest.approx(np.log(4), abs=1e-5)


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


def test_falsify_recipe_007(tmp_path):
    fast, slow = (pipeline_001(tmp_path / str(rate), rate, epochs=2).metrics for rate in (0.1, 0.001))
    assert fast["initial_loss"] == pytest.approx(slow["initial_loss"], abs=1e-9)
    assert fast["final_loss"] < slow["final_loss"]
    assert fast["final_loss"] == pytest.approx(2.6293, abs=5e-5)
    assert slow["final_loss"] == pytest.approx(4.8661, abs=5e-5)


# --- checkpoints ----------------------------------------------------------------------------------------------------


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


def test_falsify_mismatched_names(tmp_path):
    student, _, _ = trained_linear(1)
    student.save_checkpoint(tmp_path / "student.h5")
    arrays, metadata = read_arrays(tmp_path / "student.h5")
    renamed = {("kernel" if name == "weight" else name): array for name, array in arrays.items()}
    write_arrays(tmp_path / "renamed.h5", renamed, metadata)
    with pytest.raises(ValueError, match=r"renamed\.h5 is not the checkpoint of a LinearStudent: 'weight'"):
        LinearStudent.load(tmp_path / "renamed.h5")


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
