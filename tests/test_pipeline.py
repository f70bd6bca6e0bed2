"""Pipeline.execute: what it refuses, what it reports, what it leaves on disk, and how it goes on after a crash."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest

from kdcore import (
    ArrayBatchSource,
    Batch,
    Callback,
    CheckpointError,
    ConfigError,
    DegenerateTeacherError,
    DistillConfig,
    DomainError,
    FixtureTeacher,
    HDF5Teacher,
    LinearStudent,
    LogitStoreWriter,
    LogitStudent,
    NonFiniteError,
    Pipeline,
    ShapeError,
    ShardBatchSource,
    SyntheticBatchSource,
    TopKRows,
    TruncatingTeacher,
    VocabularyMismatchError,
    save_teacher_logits,
)
from kdcore.hdf5 import read_arrays

V = 8


class Bigram:
    """Seeded logits by the last token."""

    def __init__(self, vocab_size=V, seed=0, scale=2.0):
        self.table = np.random.default_rng(seed).normal(scale=scale, size=(V, vocab_size)).astype(np.float32)

    @property
    def vocab_size(self):
        return self.table.shape[1]

    def logits_for_batch(self, input_ids):
        return self.table[[row[-1] for row in input_ids]]

    def logits_per_position(self, input_ids):
        return self.table[np.asarray(input_ids)], np.ones(np.shape(input_ids), bool)


class Silent(Bigram):
    def logits_for_batch(self, input_ids):
        raise AssertionError("the teacher was asked")

    logits_per_position = logits_for_batch


def arrays(rows=50, length=2, seed=0, per_position=False, shuffle=3, held_out=0.2):
    """Rows of which a fifth is held out; labels by a rule with exceptions."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(V, size=(rows, length))
    labels = np.where(rng.random(ids.shape) < 0.7, (ids + 1) % V, rng.integers(V, size=ids.shape))
    labels = labels if per_position else labels[:, -1]
    return ArrayBatchSource(ids, labels, seed=shuffle, held_out=held_out)


def pipeline(directory, *, teacher=None, student=None, batches=None, callbacks=(), progress=None, **config):
    values = {"alpha": 0.5, "temperature": 2.0, "batch_size": 4, "epochs": 2} | config
    return Pipeline(
        DistillConfig(output_dir=str(directory), **values),
        teacher=Bigram() if teacher is None else teacher,
        student=LogitStudent(V, context=1, learning_rate=1.0) if student is None else student,
        batches=arrays() if batches is None else batches,
        callbacks=callbacks,
        progress=progress,
    )


def momentum_student():
    return LinearStudent(V, V, learning_rate=0.3, momentum=0.9)


def lasting(metrics):
    """Metrics without the clock's."""
    return {name: value for name, value in metrics.items() if name != "throughput"}


def same_student(path, other):
    """The files hold the same parameters and optimiser state, bit for bit."""
    (ours, our_metadata), (theirs, their_metadata) = read_arrays(path), read_arrays(other)
    assert our_metadata == their_metadata
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name])
    assert any(np.abs(array).max() > 0.01 for array in ours.values())


def names(directory):
    return sorted(path.name for path in Path(directory).iterdir() if path.name != ".lock")


class Journal(Callback):
    def __init__(self):
        self.events = []

    def on_step_begin(self, state):
        self.events.append(("begin", state.step))

    def on_step_end(self, state):
        self.events.append(("end", state.step))

    def on_epoch_end(self, state):
        self.events.append(("epoch", state.epoch))

    def on_checkpoint(self, state, path):
        self.events.append(("checkpoint", path.name))

    def of(self, kind):
        return [value for name, value in self.events if name == kind]


class StopAt(Callback):
    """Stops the run from one hook, the ``count``-th time that it is called."""

    def __init__(self, hook, count):
        self.left = count
        setattr(self, hook, self.stop)

    def stop(self, state, *_):
        self.left -= 1
        if self.left == 0:
            state.stop("enough")


class CrashAt(Callback):
    """An error in the middle of a run."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, state):
        if state.step == self.step:
            raise InterruptedError(f"crashed at step {state.step}")


# --- what a run reports ---------------------------------------------------------------------------------------------


def held_out_answer(student, batch, teacher, *, temperature=2.0, alpha=0.5, divergence="forward_kl"):
    return oracle.kd(
        student.logits_for_batch(batch.input_ids),
        teacher.logits_for_batch(batch.input_ids),
        batch.labels,
        temperature,
        alpha,
        divergence=divergence,
    )


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_d16_metrics_are_of_the_same_held_out_rows(divergence, alpha, tmp_path):
    batches = arrays()
    run = pipeline(tmp_path / "run", batches=batches, alpha=alpha, divergence=divergence)
    result = run.execute()
    metrics = result.metrics
    untrained = LogitStudent(V, context=1)
    for when, student in (("initial", untrained), ("final", LogitStudent.load(result.output_path))):
        answer = held_out_answer(student, batches.held_out(), Bigram(), alpha=alpha, divergence=divergence)
        assert metrics[f"{when}_loss"] == pytest.approx(float(answer.loss), rel=1e-6)
        for part, value, present in (("ce", answer.ce, alpha > 0), ("kl", answer.kl, alpha < 1)):
            expected = pytest.approx(float(value), rel=1e-6) if present else None
            assert metrics[f"{when}_{part}"] == expected
    assert metrics["final_loss"] < 0.9 * metrics["initial_loss"]
    assert metrics["best_validation_loss"] <= metrics["final_loss"]
    assert metrics["improvement_ratio"] == pytest.approx(1 - metrics["final_loss"] / metrics["initial_loss"])
    assert (metrics["steps"], metrics["epochs"], metrics["stop_reason"]) == (20, 2, None)
    assert metrics["objective"] == run.config.objective()
    assert metrics["throughput"] > 0
    assert result.output_path == tmp_path / "run" / "student.h5"
    assert result.duration_seconds > 0


def test_d16_best_is_of_validations_and_not_of_training(tmp_path):
    class Losses(Callback):
        def __init__(self):
            self.training, self.validation = [], []

        def on_step_end(self, state):
            self.training.append(state.loss)
            self.validation.append(state.metrics["loss"])

    losses = Losses()
    # A rate that is far too large: later validations are worse than earlier ones.
    student = LogitStudent(V, context=1, learning_rate=30.0)
    run = pipeline(tmp_path / "run", student=student, callbacks=[losses], validate_every=1, alpha=1.0)
    metrics = run.execute().metrics
    assert metrics["best_validation_loss"] == min(metrics["initial_loss"], *losses.validation)
    assert metrics["best_validation_loss"] < metrics["final_loss"]
    assert metrics["best_validation_loss"] > min(losses.training)
    assert metrics["final_loss"] == losses.validation[-1]


def test_d16_a_pass_is_a_pass_over_the_data(tmp_path):
    journal = Journal()
    metrics = pipeline(tmp_path / "run", batches=arrays(rows=23), callbacks=[journal], epochs=3).execute().metrics
    assert metrics["steps"] == 3 * 5  # 18 rows to train on, in fours
    assert journal.of("epoch") == [1, 2, 3]


def test_d16_the_held_out_batch_is_asked_for_once(tmp_path):
    class Moody(SyntheticBatchSource):
        asked = 0

        def held_out(self):
            self.asked += 1
            return super().held_out() if self.asked == 1 else self.next_batch(1)

    source = Moody(4, rows_per_epoch=12)
    pipeline(tmp_path / "run", batches=source, validate_every=1).execute()
    assert source.asked == 1


def test_d16_per_position_runs_are_bracketed_per_position(tmp_path):
    batches = arrays(per_position=True)
    result = pipeline(tmp_path / "run", batches=batches, per_position=True).execute()
    held_out = batches.held_out()
    for name, student in (("initial", LogitStudent(V, context=1)), ("final", LogitStudent.load(result.output_path))):
        answer = oracle.kd(
            student.logits_per_position(held_out.input_ids)[0].reshape(-1, V),
            Bigram().table[held_out.input_ids].reshape(-1, V),
            held_out.labels.ravel(),
            2.0,
            0.5,
        )
        assert result.metrics[f"{name}_loss"] == pytest.approx(float(answer.loss), rel=1e-6)
    assert result.metrics["final_loss"] < result.metrics["initial_loss"]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_d4_a_step_is_kd_step_with_alpha_as_the_weight_of_ce(alpha, tmp_path):
    result = pipeline(tmp_path / "run", max_steps=1, alpha=alpha).execute()
    source = arrays()
    source.reset()  # a run begins with a pass of its own
    batch = source.next_batch(4)
    tokens = batch.input_ids[:, -1]
    answer = oracle.kd(np.zeros((4, V)), Bigram().table[tokens], batch.labels, 2.0, alpha)
    table = np.zeros((V, V))
    np.add.at(table, tokens, -answer.gradient.astype(float))
    loaded = LogitStudent.load(result.output_path).logits_for_batch([[token] for token in range(V)])
    np.testing.assert_allclose(loaded, table, rtol=0, atol=1e-6)


def test_ignored_rows_count_neither_in_training_nor_in_validation(tmp_path):
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(V, size=(40, 1)), rng.integers(V, size=40)
    labels[::3] = -1
    batches = ArrayBatchSource(ids, labels, seed=None, held_out=0.25)
    result = pipeline(tmp_path / "run", batches=batches, ignore_index=-1, max_steps=1).execute()
    held_out = batches.held_out()
    kept = held_out.labels != -1
    assert 0 < kept.sum() < len(kept)
    answer = oracle.kd(
        np.zeros((kept.sum(), V)), Bigram().table[held_out.input_ids[kept, 0]], held_out.labels[kept], 2.0, 0.5
    )
    assert result.metrics["initial_loss"] == pytest.approx(float(answer.loss), rel=1e-6)
    table = np.zeros((V, V))  # the first batch: rows 0 and 3 are ignored, so the gradient is a mean over two
    answer = oracle.kd(np.zeros((2, V)), Bigram().table[ids[1:3, 0]], labels[1:3], 2.0, 0.5)
    np.add.at(table, ids[1:3, 0], -answer.gradient.astype(float))
    loaded = LogitStudent.load(result.output_path).logits_for_batch([[token] for token in range(V)])
    np.testing.assert_allclose(loaded, table, rtol=0, atol=1e-6)


def test_labels_may_come_as_lists(tmp_path):
    class Lists(ArrayBatchSource):
        def next_batch(self, batch_size):
            batch = super().next_batch(batch_size)
            return Batch(batch.input_ids.tolist(), batch.labels.tolist())

    rng = np.random.default_rng(0)
    ids, labels = rng.integers(V, size=(40, 1)), rng.integers(V, size=40)
    labels[::3] = -100
    results = [
        pipeline(tmp_path / source.__name__, batches=source(ids, labels, seed=1)).execute()
        for source in (Lists, ArrayBatchSource)
    ]
    same_student(*(result.output_path for result in results))


class RaggedSource(SyntheticBatchSource):
    """Rows of one to four tokens, two of them a batch; every second of the longer rows has a masked position."""

    rows = [[1, 2, 3], [4], [5, 6], [7, 1, 2, 3]]  # noqa: RUF012
    labels = [[2, 3, 4], [5], [6, -100], [1, 2, 3, 4]]  # noqa: RUF012

    def __init__(self, padding=-100, width=4):
        super().__init__(2, rows_per_epoch=4)
        self.padding, self.width = padding, width

    def batch(self, rows):
        padded = np.full((len(rows), self.width), self.padding)
        for i, row in enumerate(rows):
            padded[i, : len(self.labels[row])] = self.labels[row]
        return Batch([self.rows[row] for row in rows], padded)

    def next_batch(self, batch_size):
        return self.batch(super().next_batch(batch_size).input_ids[:, 0] + [0, 2])

    def held_out(self):
        return self.batch([3, 1, 2])


class RaggedTeacher(Bigram):
    def logits_per_position(self, input_ids):
        lengths = np.array([len(row) for row in input_ids])
        mask = np.arange(lengths.max()) < lengths[:, None]
        logits = np.full((*mask.shape, V), np.nan, np.float32)
        logits[mask] = self.table[np.concatenate(input_ids)]
        return logits, mask


@pytest.mark.parametrize("elements", [1 << 21, 1], ids=["in one piece", "in pieces"])
def test_ragged_rows_have_padded_labels(elements, tmp_path, monkeypatch):
    monkeypatch.setattr("kdcore.pipeline._EVALUATION_ELEMENTS", elements)
    run = pipeline(
        tmp_path / "run", teacher=RaggedTeacher(), batches=RaggedSource(), per_position=True, batch_size=2, max_steps=1
    )
    result = run.execute()
    source = RaggedSource()

    def answer(rows):
        tokens = np.concatenate([source.rows[row] for row in rows])
        labels = np.concatenate([source.labels[row] for row in rows])
        kept = labels != -100
        return tokens[kept], oracle.kd(np.zeros((kept.sum(), V)), Bigram().table[tokens[kept]], labels[kept], 2.0, 0.5)

    _, held_out = answer([3, 1, 2])
    assert result.metrics["initial_loss"] == pytest.approx(float(held_out.loss), rel=1e-6)
    tokens, step = answer([0, 3])
    table = np.zeros((V, V))
    np.add.at(table, tokens, -step.gradient.astype(float))
    loaded = LogitStudent.load(result.output_path).logits_for_batch([[token] for token in range(V)])
    np.testing.assert_allclose(loaded, table, rtol=0, atol=1e-6)
    assert np.abs(table).max() > 0.05


def test_d2_labels_beyond_the_end_of_a_row_are_refused(tmp_path):
    def run(name, batches):
        return pipeline(
            tmp_path / name, teacher=RaggedTeacher(), batches=batches, per_position=True, batch_size=2
        ).execute()

    sentence = r"labels\[1, 1\] is 0, but row 1 of input_ids has 1 positions: beyond its end stands ignore_index=-100"
    with pytest.raises(ShapeError, match=sentence):
        run("validation", RaggedSource(padding=0))

    class BadTraining(RaggedSource):
        def next_batch(self, batch_size):
            batch = super().next_batch(batch_size)
            batch.labels[0, 3] = 5
            return batch

    with pytest.raises(ShapeError, match=r"labels\[0, 3\] is 5, but row 0 of input_ids has 3 positions"):
        run("training", BadTraining())

    class LeftPadded(LogitStudent):
        def logits_per_position(self, input_ids):
            logits, mask = super().logits_per_position(input_ids)
            return logits[:, ::-1], mask[:, ::-1]

    with pytest.raises(ShapeError, match="the student's mask must have its rows padded on the right"):
        pipeline(
            tmp_path / "left", student=LeftPadded(V, context=1), teacher=RaggedTeacher(), batches=RaggedSource(),
            per_position=True,
        ).execute()  # fmt: skip


def test_alpha_one_does_not_ask_the_teacher(tmp_path):
    for name, per_position in (("row", False), ("position", True)):
        run = pipeline(
            tmp_path / name,
            teacher=Silent(),
            alpha=1.0,
            per_position=per_position,
            batches=arrays(per_position=per_position),
        )
        metrics = run.execute().metrics
        assert metrics["final_loss"] < metrics["initial_loss"]
        assert (metrics["initial_kl"], metrics["final_kl"]) == (None, None)
    with pytest.raises(AssertionError, match="the teacher was asked"):
        pipeline(tmp_path / "other", teacher=Silent(), alpha=0.9).execute()


def test_directions_are_different_runs(tmp_path):
    paths = [
        pipeline(tmp_path / name, divergence=name, alpha=0.0).execute().output_path
        for name in ("forward_kl", "reverse_kl")
    ]
    forward, reverse = (LogitStudent.load(path).logits_for_batch([[token] for token in range(V)]) for path in paths)
    assert np.abs(forward - reverse).max() > 0.01


def test_per_position_with_the_fixture_teacher(tmp_path):
    batches = SyntheticBatchSource(V, sequence_length=3, rows_per_epoch=80, per_position=True)
    run = pipeline(tmp_path / "run", teacher=FixtureTeacher(V), batches=batches, per_position=True)
    metrics = run.execute().metrics
    assert metrics["final_loss"] < 0.8 * metrics["initial_loss"]


# --- the log, and what a terminal shows -----------------------------------------------------------------------------


def test_the_log_states_the_objective_and_the_validations(tmp_path):
    run = pipeline(tmp_path / "run", alpha=0.3, temperature=4.0, log_every=5)
    metrics = run.execute().metrics
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert log.count("objective: 0.30 · CE + 0.70 · T² · KL(teacher ‖ student), T = 4\n") == 1
    assert "20 steps of 4 rows" in log
    assert re.findall(r"step (\d+) of 20: loss", log) == ["1", "5", "10", "15", "20"]
    assert re.findall(r"step (\d+): held-out loss", log) == ["10", "20"]
    assert f"held-out loss {metrics['initial_loss']:.6g} -> {metrics['final_loss']:.6g}" in log


def test_logging_is_left_as_it_was(tmp_path):
    logger = logging.getLogger("kdcore")
    before = list(logger.handlers), logger.level
    pipeline(tmp_path / "run", max_steps=2).execute()
    with pytest.raises(InterruptedError):
        pipeline(tmp_path / "crash", callbacks=[CrashAt(1)]).execute()
    assert (logger.handlers, logger.level) == before


def test_metrics_file_holds_the_metrics(tmp_path):
    result = pipeline(tmp_path / "run").execute()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8")) == result.metrics


@pytest.mark.parametrize("progress", [True, False, None])
def test_progress_goes_to_standard_error(progress, tmp_path, capsys):
    pipeline(tmp_path / "run", progress=progress).execute()
    out, err = capsys.readouterr()
    assert out == ""
    if progress:
        assert "objective: 0.50 · CE + 0.50 · T² · KL(teacher ‖ student), T = 2" in err
        assert "20/20" in err
    else:  # standard error is no terminal here
        assert err == ""


# --- callbacks ------------------------------------------------------------------------------------------------------


def test_ft_observ_001_004_hooks_once_and_in_order(tmp_path):
    journal = Journal()
    pipeline(tmp_path / "run", batches=arrays(rows=15), callbacks=[journal], checkpoint_every=2).execute()
    step = lambda n: [("begin", n - 1), ("end", n)]  # noqa: E731
    assert journal.events == [
        *step(1), *step(2), ("checkpoint", "step-0000000002"), *step(3), ("epoch", 1),
        *step(4), ("checkpoint", "step-0000000004"), *step(5), *step(6), ("epoch", 2),
        ("checkpoint", "step-0000000006"),
    ]  # fmt: skip


def test_ft_observ_001_a_pass_of_1000_rows_is_250_steps_of_4(tmp_path):
    journal = Journal()
    pipeline(tmp_path / "run", batches=SyntheticBatchSource(4), epochs=1, callbacks=[journal]).execute()
    assert journal.of("end") == list(range(1, 251))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_hooks_see_the_last_validation(every, tmp_path):
    seen = []

    class Look(Callback):
        def on_step_end(self, state):
            seen.append(dict(state.metrics))

        def on_epoch_end(self, state):
            assert state.metrics == seen[-1]
            at_epochs.append(held_out_answer(state.student, held_out, Bigram()).loss)

        def on_checkpoint(self, state, path):
            assert state.metrics["loss"] == pytest.approx(
                float(held_out_answer(state.student, held_out, Bigram()).loss)
            )
            checkpoints.append(state.step)

    at_epochs, checkpoints = [], []
    batches = arrays(rows=15)
    held_out = batches.held_out()
    run = pipeline(tmp_path / "run", batches=batches, callbacks=[Look()], validate_every=every)
    metrics = run.execute().metrics
    changes = [
        i + 1 for i, (a, b) in enumerate(pairwise([{"loss": metrics["initial_loss"]}, *seen])) if a["loss"] != b["loss"]
    ]
    assert changes == [step for step in range(1, 7) if step % every == 0]
    assert checkpoints == [6]
    assert len(at_epochs) == 2


def test_without_validate_every_each_pass_ends_with_its_validation(tmp_path):
    batches = arrays(rows=15)
    held_out, losses = batches.held_out(), []

    class Look(Callback):
        def on_epoch_end(self, state):
            losses.append((state.metrics["loss"], float(held_out_answer(state.student, held_out, Bigram()).loss)))

    pipeline(tmp_path / "run", batches=batches, callbacks=[Look()], epochs=3).execute()
    assert len(losses) == 3  # the last pass included
    for reported, actual in losses:
        assert reported == pytest.approx(actual, rel=1e-6)


@pytest.mark.parametrize(
    ("hook", "count", "steps"),
    [("on_step_begin", 3, 3), ("on_step_end", 3, 3), ("on_epoch_end", 1, 10), ("on_checkpoint", 2, 8)],
)
def test_ft_observ_stop_ends_the_run_within_a_step(hook, count, steps, tmp_path):
    journal = Journal()
    run = pipeline(tmp_path / "run", callbacks=[StopAt(hook, count), journal], checkpoint_every=4)
    result = run.execute()
    assert journal.of("end") == list(range(1, steps + 1))
    assert (result.metrics["steps"], result.metrics["stop_reason"]) == (steps, "enough")
    assert journal.of("checkpoint")[-1] == f"step-{steps:010d}"
    assert f"stopped after step {steps}: enough" in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    loaded = LogitStudent.load(result.output_path)
    answer = held_out_answer(loaded, arrays().held_out(), Bigram())
    assert result.metrics["final_loss"] == pytest.approx(float(answer.loss), rel=1e-6)


def test_d17_a_hook_may_look_through_the_student_without_harm(tmp_path):
    class Curious(Callback):
        def look(self, state, *_):
            state.student.logits_for_batch([[1], [2], [3]])

        on_step_begin = on_step_end = on_epoch_end = on_checkpoint = look

    plain = pipeline(tmp_path / "plain", checkpoint_every=3, validate_every=2).execute()
    looked = pipeline(tmp_path / "looked", checkpoint_every=5, validate_every=1, callbacks=[Curious()]).execute()
    same_student(plain.output_path, looked.output_path)
    assert plain.metrics["final_loss"] == looked.metrics["final_loss"]


def test_d1_every_gradient_is_applied_to_its_own_forward(tmp_path):
    class Watched(LogitStudent):
        def logits_for_batch(self, input_ids):
            if self is student:  # and not its copy, loaded from a checkpoint
                forwards.append(np.array(input_ids))
            return super().logits_for_batch(input_ids)

        def apply_kd_gradient(self, gradient, denominator=None):
            applied.append(forwards[-1])
            super().apply_kd_gradient(gradient, denominator)

    forwards, applied = [], []
    student = Watched(V, context=1)
    run = pipeline(tmp_path / "run", student=student, validate_every=1, checkpoint_every=1)
    run.execute()
    source = arrays()
    source.reset()
    for ids in applied[:10]:
        np.testing.assert_array_equal(ids, source.next_batch(4).input_ids)
    assert len(applied) == 20


# --- how long -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 9, 10, 11, 20])
def test_ft_smoke_max_steps_is_exact(steps, tmp_path):
    journal = Journal()
    metrics = pipeline(tmp_path / "run", callbacks=[journal], max_steps=steps).execute().metrics
    assert metrics["steps"] == steps
    assert journal.of("end") == list(range(1, steps + 1))
    assert metrics["epochs"] == steps // 10


def test_ft_smoke_max_steps_does_not_lengthen_a_run(tmp_path):
    assert pipeline(tmp_path / "run", max_steps=1000).execute().metrics["steps"] == 20


def test_ft_smoke_004_zero_steps_are_an_error(tmp_path):
    with pytest.raises(ConfigError, match="max_steps must be an integer of at least 1, got 0"):
        pipeline(tmp_path / "run", max_steps=0)

    class Nothing(SyntheticBatchSource):
        def batches_per_epoch(self, batch_size):
            return 0

    with pytest.raises(ConfigError, match="the batch source has 0 batches in a pass: there is nothing to train on"):
        pipeline(tmp_path / "run", batches=Nothing(4)).execute()
    assert not (tmp_path / "run").exists()


def test_a_source_that_has_been_used_starts_a_pass_of_its_own(tmp_path):
    source = SyntheticBatchSource(V, rows_per_epoch=20)
    source.next_batch(4)  # a look at the data
    assert pipeline(tmp_path / "a", batches=source, epochs=2, max_steps=7).execute().metrics["steps"] == 7
    result = pipeline(tmp_path / "b", batches=source, epochs=2).execute()
    fresh = pipeline(tmp_path / "c", batches=SyntheticBatchSource(V, rows_per_epoch=20), epochs=2).execute()
    assert lasting(result.metrics) == lasting(fresh.metrics)


# --- guards ---------------------------------------------------------------------------------------------------------


def test_d6_nothing_stands_in_for_a_teacher_student_or_source(tmp_path):
    config = DistillConfig(output_dir=str(tmp_path / "run"))
    parts = {"teacher": Bigram(), "student": LogitStudent(V), "batches": arrays()}
    for missing in parts:
        rest = {name: part for name, part in parts.items() if name != missing}
        with pytest.raises(TypeError, match=missing):
            Pipeline(config, **rest)
        with pytest.raises(ConfigError, match=f"{missing} must be a .*, got None"):
            Pipeline(config, **{**rest, missing: None})
    with pytest.raises(ConfigError, match="config must be a DistillConfig, got {}"):
        Pipeline({}, **parts)
    with pytest.raises(ConfigError, match="student must be a StudentLogitsProvider"):
        Pipeline(config, **{**parts, "student": Bigram()})  # a teacher learns nothing


def test_callbacks_are_callbacks(tmp_path):
    with pytest.raises(ConfigError, match=r"callbacks\[1\] must be a Callback, got <built-in function print>"):
        pipeline(tmp_path / "run", callbacks=[Journal(), print])
    with pytest.raises(ConfigError, match=r"callbacks\[0\] must be a Callback, got <class"):
        pipeline(tmp_path / "run", callbacks=[Journal])
    with pytest.raises(ConfigError, match="callbacks must be a sequence of Callback, got <"):
        pipeline(tmp_path / "run", callbacks=Journal())


class OneRun(Callback):
    """Tries a second run in the directory of the first."""

    def __init__(self, directory):
        self.directory = directory
        self.errors = []

    def on_step_end(self, state):
        for resume in (False, True):
            try:
                pipeline(self.directory).execute(resume=resume)
            except ConfigError as error:
                self.errors.append(str(error))


def test_two_runs_at_once_are_refused(tmp_path):
    second = OneRun(tmp_path / "run")
    result = pipeline(tmp_path / "run", callbacks=[second], checkpoint_every=1, max_steps=3).execute()
    assert len(second.errors) == 6
    assert "holds no checkpoint to resume from" in second.errors.pop(1)
    assert all(re.search("output_dir='.*run' is in use by another run", error) for error in second.errors)
    alone = pipeline(tmp_path / "alone", checkpoint_every=1, max_steps=3).execute()
    same_student(result.output_path, alone.output_path)
    assert pipeline(tmp_path / "run", max_steps=4).execute(resume=True).metrics["steps"] == 4  # the lock is gone


def test_a_crashed_run_leaves_no_lock(tmp_path):
    with pytest.raises(InterruptedError):
        pipeline(tmp_path / "run", callbacks=[CrashAt(3)], checkpoint_every=2).execute()
    assert pipeline(tmp_path / "run").execute(resume=True).metrics["steps"] == 20


class Table(Bigram):
    def __init__(self, table):
        self.table = np.asarray(table, np.float32)


def table_student(table):
    student = LogitStudent(V, context=1, learning_rate=1.0)
    student.logits_for_batch([[token] for token in range(V)])
    student.apply_kd_gradient(-np.asarray(table), denominator=1)
    return student


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 30.0, 1000.0, 1e5, 1e9])
def test_d13_agreement_does_not_depend_on_the_temperature(divergence, temperature, tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(V, V))

    def run(name, teacher, student):
        return pipeline(
            tmp_path / name, teacher=Table(teacher), student=table_student(student), divergence=divergence,
            temperature=temperature, max_steps=1, alpha=0.0,
        ).execute()  # fmt: skip

    assert run("apart", noise, np.zeros((V, V))).metrics["steps"] == 1
    # Gaps of 9 T and 6 T: probabilities of 1e-4 and 2e-3, whose T² KL is below any bound if T is small.
    assert run("cold", 9 * temperature * np.eye(V), 6 * temperature * np.eye(V)).metrics["steps"] == 1
    rounded = {f"rounded-{i}": noise + 1e-6 * rng.normal(size=(V, V)) for i in range(8)}
    for name, other in {"same": noise, **rounded}.items():
        with pytest.raises(DegenerateTeacherError, match="teacher and student agree before the first step"):
            run(name, noise, other)


def test_d13_a_student_that_agrees_with_its_teacher_is_refused(tmp_path):
    first = pipeline(tmp_path / "first", student=momentum_student()).execute()
    run = pipeline(
        tmp_path / "run", teacher=LinearStudent.load(first.output_path), student=LinearStudent.load(first.output_path)
    )
    sentence = r"teacher and student agree before the first step \(mean held-out KL 0 nats at T = 2\): there is nothing"
    with pytest.raises(DegenerateTeacherError, match=sentence):
        run.execute()
    assert names(tmp_path / "run") == ["run.log"]  # nothing that looks like a result


def test_d13_the_guard_gives_way_on_request_and_without_a_teacher(tmp_path):
    same = LogitStudent(V, 1.5)
    for name, values in (("asked", {"allow_degenerate": True}), ("ce", {"alpha": 1.0})):
        metrics = pipeline(tmp_path / name, teacher=same, max_steps=2, **values).execute().metrics
        assert metrics["steps"] == 2
    # A student that is nearly its teacher, but not quite, has something to learn.
    almost = LogitStudent(V, context=1)
    almost.logits_for_batch([[token] for token in range(V)])
    almost.apply_kd_gradient(-0.05 * np.random.default_rng(0).normal(size=(V, V)), denominator=0.1)
    assert pipeline(tmp_path / "near", teacher=almost, max_steps=1).execute().metrics["steps"] == 1


@pytest.mark.parametrize("classes", [V - 1, V + 2])
def test_d14_vocabularies_that_differ_are_an_error(classes, tmp_path):
    with pytest.raises(VocabularyMismatchError, match=f"the teacher has {classes} classes and the student 8"):
        pipeline(tmp_path / "run", teacher=Bigram(classes))


def test_d14_truncation_is_before_the_softmax_and_the_lost_mass_is_reported(tmp_path):
    wide, batches = Bigram(V + 3), arrays()
    run = pipeline(tmp_path / "run", teacher=wide, batches=batches, vocabulary="truncate", max_steps=1, alpha=0.0)
    metrics = run.execute().metrics
    held_out = batches.held_out()
    tokens = held_out.input_ids[:, -1]
    answer = oracle.kd(np.zeros((len(tokens), V)), wide.table[tokens, :V], held_out.labels, 2.0, 0.0)
    assert metrics["initial_loss"] == pytest.approx(float(answer.loss), rel=1e-6)

    # Every row the teacher was asked for: both validations and the batch of the one step.
    source = arrays()
    source.reset()
    asked = np.concatenate([tokens, tokens, source.next_batch(4).input_ids[:, -1]])
    lost = oracle.softmax(wide.table[asked])[:, V:].sum(axis=1)
    assert metrics["discarded_teacher_mass"] == pytest.approx(float(lost.mean()), rel=1e-5)
    assert metrics["discarded_teacher_mass"] > 0.05


def test_d14_truncation_per_position_leaves_padding_out_of_the_account():
    class Ragged(Bigram):
        def logits_per_position(self, input_ids):
            lengths = np.array([len(row) for row in input_ids])
            mask = np.arange(lengths.max()) < lengths[:, None]
            logits = np.full((*mask.shape, self.vocab_size), np.nan, np.float32)
            logits[mask] = self.table[np.concatenate(input_ids)]
            return logits, mask

    teacher = TruncatingTeacher(Ragged(V + 3), V)
    assert teacher.discarded_mass == 0.0
    logits, mask = teacher.logits_per_position([[1, 2], [3]])
    assert logits.shape == (2, 2, V)
    assert mask.tolist() == [[True, True], [True, False]]
    expected = oracle.softmax(Bigram(V + 3).table[[1, 2, 3]])[:, V:].sum(axis=1).mean()
    assert teacher.discarded_mass == pytest.approx(float(expected), rel=1e-6)


def test_a_cut_tail_that_the_teacher_rules_out_costs_nothing():
    class Padded(Bigram):
        def logits_for_batch(self, input_ids):
            logits = super().logits_for_batch(input_ids).copy()
            logits[:, V:] = -np.inf
            return logits

    teacher = TruncatingTeacher(Padded(V + 3), V)
    teacher.logits_for_batch([[1], [2]])
    assert teacher.discarded_mass == 0.0


def test_d14_nothing_is_cut_from_a_teacher_of_equal_size():
    teacher = TruncatingTeacher(Bigram(), V)
    np.testing.assert_array_equal(teacher.logits_for_batch([[1], [2]]), Bigram().table[[1, 2]])
    assert teacher.discarded_mass == 0.0


def test_d14_a_teacher_of_equal_size_is_not_wrapped(tmp_path):
    teacher = Bigram()
    run = pipeline(tmp_path / "run", teacher=teacher, vocabulary="truncate", max_steps=1)
    assert run.teacher is teacher
    assert "discarded_teacher_mass" not in run.execute().metrics


@pytest.mark.parametrize("method", ["logits_for_batch", "logits_per_position"])
@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("which", ["teacher", "student"])
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: np.concatenate([x, x[:1]])], ids=["less", "more"])
def test_d15_rows_are_counted_on_both_sides(method, alpha, which, change, tmp_path):
    class WrongTeacher(Bigram):
        pass

    class WrongStudent(LogitStudent):
        pass

    def wrong(self, input_ids):
        result = getattr(super(type(self), self), method)(input_ids)
        return change(result) if method == "logits_for_batch" else tuple(change(part) for part in result)

    setattr({"teacher": WrongTeacher, "student": WrongStudent}[which], method, wrong)
    per_position = method == "logits_per_position"
    parts = {"teacher": WrongTeacher()} if which == "teacher" else {"student": WrongStudent(V, context=1)}
    with pytest.raises(ShapeError, match=r"must return logits|positions in the held-out rows"):
        pipeline(
            tmp_path / "run", alpha=alpha, per_position=per_position, batches=arrays(per_position=per_position), **parts
        ).execute()


@pytest.mark.parametrize("per_position", [False, True])
def test_d15_a_student_that_goes_wrong_after_the_first_validation(per_position, tmp_path):
    class Tiring(LogitStudent):
        forwards = 0

        def tired(self, answer):
            self.forwards += 1
            return np.concatenate([answer, answer]) if self.forwards == 4 else answer  # the first step's forward

        def logits_for_batch(self, input_ids):
            return self.tired(super().logits_for_batch(input_ids))

        def logits_per_position(self, input_ids):
            logits, mask = super().logits_per_position(input_ids)
            return self.tired(logits), mask

    with pytest.raises(ShapeError, match="the student must return logits for the 4 rows of the batch, got 8"):
        pipeline(
            tmp_path / "run", student=Tiring(V, context=1), per_position=per_position,
            batches=arrays(per_position=per_position),
        ).execute()  # fmt: skip


def test_held_out_rows_are_worked_in_pieces(tmp_path, monkeypatch):
    class Counting(Bigram):
        asked = ()

        def logits_for_batch(self, input_ids):
            self.asked = (*self.asked, len(input_ids))
            return super().logits_for_batch(input_ids)

    def asked(elements):
        monkeypatch.setattr("kdcore.pipeline._EVALUATION_ELEMENTS", elements)
        teacher = Counting()
        pipeline(tmp_path / str(elements), teacher=teacher, max_steps=1, allow_degenerate=True).execute()
        return teacher.asked

    # The held-out rows, of them the first piece by which the teacher is known, a batch, the held-out rows again.
    assert asked(1 << 20) == (10, 10, 4, 10)
    assert asked(6 * V) == (6, 4, 6, 4, 6, 4)
    assert asked(V) == (4, 4, 2, 4, 4, 4, 4, 2)  # no fewer than a batch


def test_what_a_student_gives_for_padding_may_be_nan(tmp_path):
    class Padded(LogitStudent):
        def logits_per_position(self, input_ids):
            logits, mask = super().logits_per_position(input_ids)
            return np.where(mask[..., None], logits, np.float32(np.nan)), mask

    run = pipeline(
        tmp_path / "run", teacher=RaggedTeacher(), student=Padded(V, context=1), batches=RaggedSource(),
        per_position=True, batch_size=2, max_steps=1,
    )  # fmt: skip
    assert np.isfinite(run.execute().metrics["final_loss"])


def test_labels_must_have_the_form_of_the_run(tmp_path):
    with pytest.raises(ConfigError, match=r"per_position=True needs labels with 2 dimension\(s\)"):
        pipeline(tmp_path / "run", per_position=True).execute()
    with pytest.raises(ConfigError, match=r"per_position=False needs labels with 1 dimension\(s\)"):
        pipeline(tmp_path / "run", batches=arrays(per_position=True)).execute()
    assert not (tmp_path / "run").exists()


def test_d2_labels_of_other_positions_are_refused(tmp_path):
    held_out = Batch(np.zeros((2, 3), int), np.zeros((2, 2), int))
    with pytest.raises(ShapeError, match=r"labels must have shape \(2, 3\) like input_ids, got \(2, 2\)"):
        pipeline(tmp_path / "run", batches=arrays(per_position=True, held_out=held_out), per_position=True).execute()


@pytest.mark.parametrize(
    ("held_out", "sentence"),
    [
        (Batch(np.zeros((0, 1), int), np.zeros(0, int)), "the batch source holds out no rows"),
        (Batch(np.zeros((2, 1), int), np.full(2, -100)), "every held-out row is masked"),
    ],
)
def test_validation_needs_rows(held_out, sentence, tmp_path):
    with pytest.raises(ShapeError, match=sentence):
        pipeline(tmp_path / "run", batches=arrays(held_out=held_out)).execute()


def test_d7_losses_that_are_not_finite_end_the_run(tmp_path):
    class RulesOut(Bigram):
        def logits_for_batch(self, input_ids):
            logits = super().logits_for_batch(input_ids).copy()
            logits[:, 0] = -np.inf
            return logits

    with pytest.raises(NonFiniteError, match="the held-out loss is inf: .* with reverse_kl, the teacher rules out"):
        pipeline(tmp_path / "a", teacher=RulesOut(), divergence="reverse_kl").execute()
    assert (
        pipeline(tmp_path / "b", teacher=RulesOut(), max_steps=2).execute().metrics["steps"] == 2
    )  # forward KL is finite

    class Nan(Bigram):
        def logits_for_batch(self, input_ids):
            return super().logits_for_batch(input_ids) * np.float32(np.nan)

    with pytest.raises(NonFiniteError, match=r"teacher_logits\[0, 0\] is nan"):
        pipeline(tmp_path / "c", teacher=Nan()).execute()


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints_hold_the_student_of_their_step(tmp_path):
    class Keep(Callback):
        def on_checkpoint(self, state, path):
            every = [[token] for token in range(V)]
            kept[state.step] = path
            np.testing.assert_array_equal(
                LinearStudent.load(path / "student.h5").logits_for_batch(every), state.student.logits_for_batch(every)
            )

    kept = {}
    run = pipeline(
        tmp_path / "run", student=momentum_student(), callbacks=[Keep()], checkpoint_every=6, keep_checkpoints=10
    )
    result = run.execute()
    assert sorted(kept) == [6, 12, 18, 20]
    assert names(tmp_path / "run") == ["checkpoints", "metrics.json", "run.log", "student.h5"]
    assert names(tmp_path / "run" / "checkpoints") == [f"step-{step:010d}" for step in (6, 12, 18, 20)]
    same_student(result.output_path, kept[20] / "student.h5")
    with pytest.raises(AssertionError):
        same_student(result.output_path, kept[18] / "student.h5")


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_checkpoints_stay(keep, tmp_path):
    pipeline(tmp_path / "run", checkpoint_every=2, keep_checkpoints=keep).execute()
    assert names(tmp_path / "run" / "checkpoints") == [f"step-{step:010d}" for step in (16, 18, 20)[-keep:]]


def broken(name, **methods):
    return type(name, (LogitStudent,), methods)(V, context=1, learning_rate=1.0)


def test_d5_a_student_that_saves_nothing_is_no_success(tmp_path):
    student = broken("Forgetful", save_checkpoint=lambda self, path: None)
    with pytest.raises(CheckpointError, match="the student's save_checkpoint wrote nothing"):
        pipeline(tmp_path / "run", student=student).execute()
    assert not (tmp_path / "run" / "student.h5").exists()
    assert not [name for name in names(tmp_path / "run" / "checkpoints") if not name.endswith(".part")]


@pytest.mark.parametrize(
    ("load", "sentence"),
    [
        (classmethod(lambda cls, path: LogitStudent(V, context=1)), "gives other logits than the one saved"),
        (classmethod(lambda cls, path: LogitStudent(V + 1, context=1)), "gives other logits than the one saved"),
        (classmethod(lambda cls, path: None), "load returned None, which is no student"),
    ],
)
@pytest.mark.parametrize("per_position", [False, True])
def test_d5_d10_a_checkpoint_that_is_not_the_student_is_no_success(load, sentence, per_position, tmp_path):
    with pytest.raises(CheckpointError, match=sentence):
        pipeline(
            tmp_path / "run", student=broken("Other", load=load), per_position=per_position,
            batches=arrays(per_position=per_position),
        ).execute()  # fmt: skip
    assert not (tmp_path / "run" / "student.h5").exists()
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert not [name for name in names(tmp_path / "run" / "checkpoints") if not name.endswith(".part")]


def test_d5_every_held_out_row_is_compared(tmp_path, monkeypatch):
    class Ends(LogitStudent):
        """Loads all of its table but the row of token 7."""

        @classmethod
        def load(cls, path):
            student = super().load(path)
            student._table[7] = 0.0
            student.save_checkpoint = lambda again: Path(again).write_bytes(Path(path).read_bytes())
            return student

    monkeypatch.setattr("kdcore.pipeline._EVALUATION_ELEMENTS", 1)
    held_out = Batch(np.arange(V)[:, None], np.arange(V))  # in two pieces, of which the second has token 7
    student = Ends(V, context=1, learning_rate=1.0)
    with pytest.raises(CheckpointError, match="the student loaded from it gives other logits than the one saved"):
        pipeline(tmp_path / "run", student=student, batches=arrays(held_out=held_out)).execute()


def forgets(cls, path):
    student = super(cls, cls).load(path)
    student._velocity["bias"][...] = 0.0
    return student


def own_format(stamp, complete=False):
    """Methods of a student that saves in a format of its own, in which ``stamp`` bytes differ from save to save.

    Unless it is ``complete``, a loaded student has no velocity.
    """

    def save(self, path):
        arrays = [self.weight, self.bias, self._velocity["weight"], self._velocity["bias"]]
        Path(path).write_bytes(b"own" + os.urandom(stamp) + b"".join(array.tobytes() for array in arrays))

    def load(cls, path):
        student = cls(V, V, learning_rate=0.3)
        values = np.frombuffer(Path(path).read_bytes()[3 + stamp :], np.float32)
        student.weight[...], student.bias[...] = values[: V * V].reshape(V, V), values[V * V : V * V + V]
        if complete:
            velocity = values[V * V + V :]
            student._velocity = {"weight": velocity[: V * V].reshape(V, V).copy(), "bias": velocity[V * V :].copy()}
        return student

    return {"save_checkpoint": save, "load": classmethod(load)}


@pytest.mark.parametrize("methods", [{"load": classmethod(forgets)}, own_format(stamp=0)], ids=["hdf5", "own format"])
def test_d5_an_optimiser_that_is_not_loaded_is_no_success(methods, tmp_path):
    student = type("Forgetful", (LinearStudent,), methods)(V, V, learning_rate=0.3)
    with pytest.raises(CheckpointError, match="the student loaded from it saves other arrays than the one saved"):
        pipeline(tmp_path / "run", student=student).execute()
    assert not (tmp_path / "run" / "student.h5").exists()


def test_d5_a_loaded_student_that_cannot_save_is_no_success(tmp_path):
    def load(cls, path):
        student = super(cls, cls).load(path)
        student.save_checkpoint = lambda path: None
        return student

    with pytest.raises(CheckpointError, match="the student loaded from it saves nothing"):
        pipeline(tmp_path / "run", student=broken("Once", load=classmethod(load))).execute()


def test_d5_a_format_of_its_own_is_compared_byte_by_byte(tmp_path):
    student = type("Own", (LinearStudent,), own_format(stamp=0, complete=True))(V, V, learning_rate=0.3)
    assert pipeline(tmp_path / "run", student=student).execute().metrics["steps"] == 20
    assert "no two saves" not in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")


def test_d5_files_that_never_repeat_are_compared_by_their_logits_and_the_log_says_so(tmp_path):
    student = type("Stamped", (LinearStudent,), own_format(stamp=8))(V, V, learning_rate=0.3)
    pipeline(tmp_path / "run", student=student, checkpoint_every=10).execute()
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert log.count("student.h5: no two saves are alike, so that only the logits were compared") == 1
    assert names(tmp_path / "run" / "checkpoints" / "step-0000000020") == ["state.json", "student.h5"]


def test_d5_a_container_with_other_bytes_and_the_same_arrays_is_the_same(tmp_path):
    class Padded(LogitStudent):
        def save_checkpoint(self, path):
            super().save_checkpoint(path)
            with open(path, "ab") as file:
                file.write(os.urandom(8))

    result = pipeline(tmp_path / "run", student=Padded(V, context=1, learning_rate=1.0)).execute()
    assert "no two saves" not in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert result.metrics["steps"] == 20


def test_d5_a_failed_save_stops_the_run_and_leaves_no_half_checkpoint(tmp_path):
    class Full(LogitStudent):
        saves = 0

        def save_checkpoint(self, path):
            Full.saves += Path(path).name == "student.h5"
            if Full.saves == 3:
                Path(path).write_bytes(b"half")
                raise OSError(28, "No space left on device")
            super().save_checkpoint(path)

    def run(name):
        return pipeline(tmp_path / name, student=Full(V, context=1, learning_rate=1.0), checkpoint_every=4)

    journal = Journal()
    first = run("run")
    first.callbacks.append(journal)
    with pytest.raises(OSError, match="No space left"):
        first.execute()
    assert journal.of("end")[-1] == 12
    finished = [name for name in names(tmp_path / "run" / "checkpoints") if not name.endswith(".part")]
    assert finished == ["step-0000000004", "step-0000000008"]
    assert not (tmp_path / "run" / "student.h5").exists()

    resumed, straight = run("run").execute(resume=True), run("straight").execute()
    same_student(resumed.output_path, straight.output_path)
    assert lasting(resumed.metrics) == lasting(straight.metrics)
    assert names(tmp_path / "run" / "checkpoints") == names(tmp_path / "straight" / "checkpoints")


# --- resume ---------------------------------------------------------------------------------------------------------


def build(directory, callbacks=(), teacher=None, student=None):
    """The run that is killed, resumed and repeated: momentum, shuffling, two forms of validation, checkpoints."""
    return pipeline(
        directory,
        teacher=teacher,
        student=momentum_student() if student is None else student,
        callbacks=callbacks,
        checkpoint_every=7,
        validate_every=3,
        epochs=3,
    )


class KilledTeacher(Bigram):
    """Ends its process while step 18 waits for its logits."""

    calls = 0

    def logits_for_batch(self, input_ids):
        self.calls += len(input_ids) == 4  # a training batch: the held-out rows are asked for in one piece
        if self.calls == 18:
            signal.raise_signal(signal.SIGKILL)
        return super().logits_for_batch(input_ids)


class KilledStudent(LinearStudent):
    """Ends its process in the middle of its third checkpoint."""

    saves = 0

    def save_checkpoint(self, path):
        type(self).saves += Path(path).name == "student.h5"
        super().save_checkpoint(path)
        if type(self).saves == 3:
            signal.raise_signal(signal.SIGKILL)


def killed_run(directory, by):
    if by == "teacher":
        build(directory, teacher=KilledTeacher()).execute()
    else:
        student = KilledStudent(V, V, learning_rate=0.3, momentum=0.9)
        # The checkpoints of this class are those of its parent, which resumes them.
        student.__class__.__name__ = "LinearStudent"
        build(directory, student=student).execute()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return build(tmp_path_factory.mktemp("straight") / "run").execute()


@pytest.mark.parametrize("by", ["teacher", "student"])
def test_a_killed_run_goes_on_bit_for_bit(by, tmp_path, uninterrupted):
    call = "import sys; sys.path.insert(0, sys.argv[1]); import test_pipeline; test_pipeline.killed_run(*sys.argv[2:])"
    command = [sys.executable, "-c", call, str(Path(__file__).parent), str(tmp_path / "run"), by]
    child = subprocess.run(command, capture_output=True, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr.decode()
    found = names(tmp_path / "run" / "checkpoints")
    assert found == ["step-0000000007", "step-0000000014"] + (["step-0000000021.part"] if by == "student" else [])
    assert names(tmp_path / "run") == ["checkpoints", "run.log"]

    resumed = build(tmp_path / "run").execute(resume=True)
    same_student(resumed.output_path, uninterrupted.output_path)
    assert lasting(resumed.metrics) == lasting(uninterrupted.metrics)
    every = [[token] for token in range(V)]
    ours, theirs = (LinearStudent.load(r.output_path).logits_for_batch(every) for r in (resumed, uninterrupted))
    np.testing.assert_array_equal(ours, theirs)
    log = (tmp_path / "run" / "run.log").read_text(encoding="utf-8")
    assert "resumed at step 14 of 30" in log
    assert log.count("objective: ") == 2


@pytest.mark.parametrize("crash", [7, 8, 10, 20, 21, 29, 30])
def test_a_crash_at_any_step_can_be_resumed(crash, tmp_path, uninterrupted):
    with pytest.raises(InterruptedError):
        build(tmp_path / "run", [CrashAt(crash)]).execute()
    if crash == 7:  # the hook comes before the first checkpoint: there is nothing to go on from
        with pytest.raises(ConfigError, match="holds no checkpoint to resume from"):
            build(tmp_path / "run").execute(resume=True)
        resumed = build(tmp_path / "run").execute()
    else:
        resumed = build(tmp_path / "run").execute(resume=True)
    same_student(resumed.output_path, uninterrupted.output_path)
    assert lasting(resumed.metrics) == lasting(uninterrupted.metrics)


def test_a_resumed_run_tells_its_callbacks_what_the_first_would_have(tmp_path):
    class States(Journal):
        def on_step_begin(self, state):
            self.events.append(("state", (state.step, state.epoch, state.loss, dict(state.metrics))))

    straight, before, after = States(), States(), States()
    build(tmp_path / "straight", [straight]).execute()
    with pytest.raises(InterruptedError):
        build(tmp_path / "run", [before, CrashAt(15)]).execute()
    resumed = build(tmp_path / "run", [after])
    resumed.execute(resume=True)
    assert before.of("state") == straight.of("state")[:15]
    assert after.of("state") == straight.of("state")[14:]
    assert after.of("epoch") == [2, 3]


def test_a_run_can_be_made_longer(tmp_path):
    def run(name, epochs, **arguments):
        made = pipeline(tmp_path / name, student=momentum_student(), epochs=epochs)
        return made.execute(**arguments)

    short = run("run", 1)
    assert short.metrics["steps"] == 10
    longer, straight = run("run", 3, resume=True), run("straight", 3)
    same_student(longer.output_path, straight.output_path)
    assert lasting(longer.metrics) == lasting(straight.metrics)
    assert json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["steps"] == 30


def test_resuming_a_finished_run_does_nothing_and_says_the_same(tmp_path):
    first = build(tmp_path / "run").execute()
    journal = Journal()
    again = build(tmp_path / "run", [journal]).execute(resume=True)
    assert journal.events == []
    assert lasting(again.metrics) == lasting(first.metrics)
    assert again.output_path == first.output_path


def test_a_stopped_run_can_be_resumed(tmp_path, uninterrupted):
    stopped = build(tmp_path / "run", [StopAt("on_step_end", 12)]).execute()  # a step with a validation
    assert stopped.metrics["stop_reason"] == "enough"
    resumed = build(tmp_path / "run").execute(resume=True)
    same_student(resumed.output_path, uninterrupted.output_path)
    assert lasting(resumed.metrics) == lasting(uninterrupted.metrics)


def test_the_resumed_student_is_the_pipelines(tmp_path):
    with pytest.raises(InterruptedError):
        build(tmp_path / "run", [CrashAt(15)]).execute()
    resumed = build(tmp_path / "run")
    result = resumed.execute(resume=True)
    every = [[token] for token in range(V)]
    np.testing.assert_array_equal(
        resumed.student.logits_for_batch(every), LinearStudent.load(result.output_path).logits_for_batch(every)
    )


def test_the_account_of_truncation_is_resumed(tmp_path):
    def run(name, callbacks=()):
        return pipeline(
            tmp_path / name, teacher=Bigram(V + 3), vocabulary="truncate", checkpoint_every=4, callbacks=callbacks
        )

    straight = run("straight").execute()
    with pytest.raises(InterruptedError):
        run("run", [CrashAt(11)]).execute()
    assert lasting(run("run").execute(resume=True).metrics) == lasting(straight.metrics)


def test_a_run_does_not_write_over_another(tmp_path):
    first = pipeline(tmp_path / "run").execute()
    content = first.output_path.read_bytes()
    with pytest.raises(
        ConfigError, match=r"output_dir='.*run' already holds a run: resume it with execute\(resume=True\)"
    ):
        pipeline(tmp_path / "run", student=LogitStudent(V)).execute()
    assert first.output_path.read_bytes() == content
    with pytest.raises(ConfigError, match=r"output_dir='.*none' holds no checkpoint to resume from"):
        pipeline(tmp_path / "none").execute(resume=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"alpha": 0.25}, "alpha was 0.5 and is 0.25"),
        ({"temperature": 3.0}, "temperature was 2.0 and is 3.0"),
        ({"batch_size": 5}, "batch_size was 4 and is 5"),
        ({"divergence": "reverse_kl"}, "divergence was 'forward_kl' and is 'reverse_kl'"),
        ({"tail": "zero"}, "tail was 'bucket' and is 'zero'"),
        ({"student": momentum_student()}, "student was 'LogitStudent' and is 'LinearStudent'"),
        ({"batches": arrays(seed=9)}, "held_out_labels was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"),
    ],
)
def test_a_resumed_run_is_the_same_run(change, sentence, tmp_path):
    pipeline(tmp_path / "run", max_steps=3).execute()
    with pytest.raises(ConfigError, match=f"belongs to another configuration: {sentence}"):
        pipeline(tmp_path / "run", **change).execute(resume=True)


@pytest.mark.parametrize("per_position", [False, True])
def test_a_resumed_run_has_the_same_teacher(per_position, tmp_path):
    def run(teacher, **arguments):
        batches = arrays(per_position=per_position)
        made = pipeline(tmp_path / "run", teacher=teacher, batches=batches, per_position=per_position, **arguments)
        return made.execute(resume="epochs" in arguments)

    run(Bigram(), max_steps=3)
    with pytest.raises(
        ConfigError, match="belongs to another teacher: this one gives other logits for the held-out rows"
    ):
        run(Bigram(seed=1), epochs=2)
    assert run(Bigram(), epochs=2).metrics["steps"] == 20


def test_a_resumed_run_has_the_same_teacher_where_it_is_truncated(tmp_path):
    def run(teacher, **arguments):
        return pipeline(tmp_path / "run", teacher=teacher, vocabulary="truncate", **arguments)

    run(Bigram(V + 3), max_steps=3).execute()
    other = Bigram(V + 3)
    other.table[:, V:] += 1  # a class that is cut off
    with pytest.raises(ConfigError, match="belongs to another teacher"):
        run(other).execute(resume=True)


def test_a_resumed_run_without_a_teacher_does_not_ask_it(tmp_path):
    pipeline(tmp_path / "run", teacher=Bigram(), alpha=1.0, max_steps=3).execute()
    resumed = pipeline(tmp_path / "run", teacher=Silent(), alpha=1.0).execute(resume=True)
    assert resumed.metrics["steps"] == 20


def test_a_resumed_run_has_the_same_order_of_rows(tmp_path):
    pipeline(tmp_path / "run", max_steps=3).execute()
    with pytest.raises(ConfigError, match="a batch source with seed 3 does not fit one with 4"):
        pipeline(tmp_path / "run", batches=arrays(shuffle=4)).execute(resume=True)


def damage(path, how):
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-40])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "list":
        path.write_text("[]", encoding="utf-8")
    elif how == "fields":
        path.write_text('{"config": {}}', encoding="utf-8")
    elif how == "other bytes":
        path.write_bytes(b"\xff\xfe\x00")


@pytest.mark.parametrize(
    ("name", "how"),
    [("student.h5", how) for how in ("missing", "cut", "empty")]
    + [("state.json", how) for how in ("missing", "cut", "empty", "list", "fields", "other bytes")],
)
def test_damaged_checkpoints_are_named(name, how, tmp_path):
    pipeline(tmp_path / "run", max_steps=3).execute()
    damage(tmp_path / "run" / "checkpoints" / "step-0000000003" / name, how)
    with pytest.raises((CheckpointError, ConfigError), match="step-0000000003"):
        pipeline(tmp_path / "run").execute(resume=True)


# --- teachers from files --------------------------------------------------------------------------------------------


def shards(directory):
    directory.mkdir()
    rng = np.random.default_rng(4)
    parts = [rng.integers(V, size=size).astype("<u4") for size in (95, 40)]
    for number, tokens in enumerate(parts):
        tokens.tofile(directory / f"{number}.bin")
    return np.concatenate(parts)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("address", ["row", "content"])
def test_a_run_with_stored_logits_is_the_run_with_their_teacher(address, per_position, tmp_path):
    tokens = shards(tmp_path / "shards")
    teacher, path = Bigram(), tmp_path / "teacher.h5"
    arguments = {"per_position": per_position, "vocab_size": V, "seed": 2}
    if address == "row":
        save_teacher_logits(path, teacher.table[tokens])
        batches = ShardBatchSource(tmp_path / "shards", 3, teacher_rows=True, **arguments)
    else:
        contents = [list(c) for n in (1, 2, 3) for c in np.ndindex(*[V] * n)]
        save_teacher_logits(path, teacher.logits_for_batch(contents), contents)
        batches = ShardBatchSource(tmp_path / "shards", 3, **arguments)
    with HDF5Teacher(path, address=address) as stored:
        from_file = pipeline(tmp_path / "file", teacher=stored, batches=batches, per_position=per_position).execute()
    direct = pipeline(
        tmp_path / "direct",
        teacher=teacher,
        batches=ShardBatchSource(tmp_path / "shards", 3, **arguments),
        per_position=per_position,
    ).execute()
    same_student(from_file.output_path, direct.output_path)
    assert lasting(from_file.metrics) == lasting(direct.metrics)
    assert direct.metrics["final_kl"] < 0.9 * direct.metrics["initial_kl"]


def test_float16_logits_distil_nearly_as_well(tmp_path):
    tokens = shards(tmp_path / "shards")
    save_teacher_logits(tmp_path / "teacher.h5", Bigram().table[tokens], dtype=np.float16)

    def source(**arguments):
        return ShardBatchSource(tmp_path / "shards", 3, seed=2, **arguments)

    with HDF5Teacher(tmp_path / "teacher.h5") as stored:
        half = pipeline(tmp_path / "half", teacher=stored, batches=source(teacher_rows=True)).execute().metrics
    full = pipeline(tmp_path / "full", batches=source()).execute().metrics
    assert half["final_loss"] == pytest.approx(full["final_loss"], rel=1e-3)
    assert half["final_loss"] != full["final_loss"]


def test_stored_logits_that_are_too_few_end_the_run_with_their_row(tmp_path):
    tokens = shards(tmp_path / "shards")
    save_teacher_logits(tmp_path / "teacher.h5", Bigram().table[tokens[:50]])
    batches = ShardBatchSource(tmp_path / "shards", 3, teacher_rows=True)
    with (
        HDF5Teacher(tmp_path / "teacher.h5") as stored,
        pytest.raises(KeyError, match="has 50 rows, and none with the number"),
    ):
        pipeline(tmp_path / "run", teacher=stored, batches=batches).execute()
    assert not (tmp_path / "run" / "student.h5").exists()


# --- teachers whose rows do not have every class --------------------------------------------------------------------


def stored(path, table=None, *, sequences=None, **options):
    """A store of a bigram teacher's answers: by default one sequence of all tokens, so that row r is about token r."""
    table = Bigram().table if table is None else table
    options = {"k": 3, "value_dtype": "float32"} | options
    with LogitStoreWriter(path, vocab_size=table.shape[1], capacity=400, **options) as writer:
        for sequence in [np.arange(V)] if sequences is None else sequences:
            writer.append(sequence, np.asarray(table)[sequence])
    return path


def numbered(*, per_position=False):
    """:func:`arrays`, whose rows ask the teacher with the numbers of their tokens' rows."""
    ids = np.random.default_rng(0).integers(V, size=(50, 2))
    labels = arrays(per_position=per_position, shuffle=None, held_out=0.02)
    labels = np.concatenate([labels.held_out().labels, labels.next_batch(49).labels])
    teacher_ids = ids if per_position else ids[:, -1:]
    return ArrayBatchSource(ids, labels, teacher_ids=teacher_ids, seed=3, held_out=0.2)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero", "uniform"])
@pytest.mark.parametrize("per_position", [False, True])
def test_losses_of_a_run_from_the_likeliest_classes_are_the_oracles(per_position, tail, tmp_path):
    batches, path = numbered(per_position=per_position), stored(tmp_path / "t.h5")
    result = pipeline(
        tmp_path / "run", teacher=HDF5Teacher(path), batches=batches, per_position=per_position, tail=tail
    ).execute()
    logits = Bigram().table.astype(np.float64) / 2.0
    log_p = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    best = np.argsort(-log_p, axis=1)[:, :3]
    rest = np.delete(log_p[0], best[0])
    assert np.exp(rest).sum() > 0.02  # there is a tail
    teacher = [
        (dict(zip(best[i].tolist(), row[best[i]], strict=True)), np.logaddexp.reduce(np.delete(row, best[i])))
        for i, row in enumerate(log_p)
    ]
    held_out = batches.held_out()
    tokens = held_out.input_ids.ravel() if per_position else held_out.input_ids[:, -1]
    for when, student in (("initial", LogitStudent(V, context=1)), ("final", LogitStudent.load(result.output_path))):
        logits, labels = student.logits_for_batch(tokens[:, None]), held_out.labels.ravel()
        exact = oracle.sparse_kd(
            logits, [teacher[token] for token in tokens], labels, 2.0, 0.5, tail=tail,
            scales=oracle.row_scales(len(labels), labels),
        )  # fmt: skip
        assert result.metrics[f"{when}_loss"] == pytest.approx(float(exact.loss.sum()), rel=1e-5)
    assert result.metrics["final_loss"] < 0.95 * result.metrics["initial_loss"]


@pytest.mark.parametrize("per_position", [False, True])
def test_a_run_from_rows_with_every_class_is_that_of_the_teacher(per_position, tmp_path):
    """Found by content: of windows, which a shuffle cannot misalign."""
    tokens = shards(tmp_path / "shards")
    windows = {
        tuple(w): None
        for shard in (tokens[:95], tokens[95:])
        for w in shard[: len(shard) // 4 * 4].reshape(-1, 4)[:, :3]
    }
    path = stored(tmp_path / "t.h5", k=V, sequences=[np.array(window) for window in windows])
    runs = [
        pipeline(
            tmp_path / name, teacher=teacher, per_position=per_position,
            batches=ShardBatchSource(tmp_path / "shards", 3, seed=2, per_position=per_position),
        ).execute()
        for name, teacher in (("store", HDF5Teacher(path, address="content")), ("direct", Bigram()))
    ]  # fmt: skip
    tables = [LogitStudent.load(run.output_path).logits_for_batch([[token] for token in range(V)]) for run in runs]
    np.testing.assert_allclose(*tables, atol=1e-5)
    assert np.abs(tables[0]).max() > 0.1
    assert runs[0].metrics["final_loss"] == pytest.approx(runs[1].metrics["final_loss"], rel=1e-6)


@pytest.mark.parametrize("options", [{}, {"kind": "sampled", "k": None, "draws": 4, "head_k": 1}])
def test_a_run_from_a_store_goes_on_bit_for_bit_and_knows_its_store(options, tmp_path):
    def run(name, store="t.h5", resume=False, **arguments):
        made = pipeline(
            tmp_path / name, teacher=HDF5Teacher(tmp_path / store), batches=numbered(), checkpoint_every=1, **arguments
        )
        return made.execute(resume=resume)

    stored(tmp_path / "t.h5", **options)
    stored(tmp_path / "other.h5", Bigram(seed=1).table, **options)
    whole = run("whole")
    with pytest.raises(InterruptedError):
        run("cut", callbacks=[CrashAt(13)])
    with pytest.raises(ConfigError, match="belongs to another teacher"):
        run("cut", "other.h5", resume=True)
    resumed = run("cut", resume=True)
    same_student(whole.output_path, resumed.output_path)
    assert lasting(whole.metrics) == lasting(resumed.metrics)


def test_a_temperature_that_is_not_stored_is_found_before_the_run(tmp_path):
    teacher = HDF5Teacher(stored(tmp_path / "t.h5", temperatures=(1.0, 4.0)))
    with pytest.raises(ConfigError, match=r"temperature=2\.0, but HDF5Teacher.* has rows at 1\.0, 4\.0 alone"):
        pipeline(tmp_path / "run", teacher=teacher, batches=numbered())
    assert not (tmp_path / "run").exists()
    assert pipeline(tmp_path / "ce", teacher=teacher, batches=numbered(), alpha=1.0).execute().metrics["steps"] == 20
    dense = HDF5Teacher(stored(tmp_path / "dense.h5", kind="dense", k=None))
    assert pipeline(tmp_path / "dense", teacher=dense, batches=numbered(), temperature=3.0).execute().metrics["steps"]


def test_a_tail_without_an_effect_is_refused_before_the_first_step(tmp_path):
    samples = HDF5Teacher(stored(tmp_path / "t.h5", kind="sampled", k=None, draws=4))
    for teacher, kind in ((samples, "samples have none"), (Bigram(), "an array of logits has none")):
        journal = Journal()
        run = pipeline(tmp_path / "run", teacher=teacher, batches=numbered(), tail="zero", callbacks=[journal])
        with pytest.raises(DomainError, match=kind):
            run.execute()
        assert journal.events == []
    with pytest.raises(ConfigError, match="tail='zero' has no effect at alpha=1, where no teacher is read"):
        pipeline(tmp_path / "run", tail="zero", alpha=1.0)
    rows = HDF5Teacher(stored(tmp_path / "rows.h5"))
    with pytest.raises(DomainError, match="divergence must be 'forward_kl'"):
        pipeline(tmp_path / "run", teacher=rows, batches=numbered(), divergence="jsd").execute()


class RowsOfTable(Table):
    """A teacher that returns rows where others return logits: at one temperature, and with 1.001 times their mass."""

    def __init__(self, table, k=3):
        super().__init__(table)
        self.k = k

    def logits_for_batch(self, input_ids):
        rows = TopKRows.from_logits(super().logits_for_batch(input_ids), self.k, 2.0)
        return rows.map(lambda array: array + np.float32(1e-3) if array.dtype.kind == "f" else array)


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero", "uniform"])
def test_d13_agreement_with_rows_is_that_with_what_their_tail_policy_makes_of_them(tail, tmp_path):
    """A student is refused where the gradient is 0: not where the loss is, which the policy "zero" moves below 0."""
    p = np.exp(np.random.default_rng(0).normal(size=(V, V)) / 2)
    p /= p.sum(axis=1, keepdims=True)
    least = np.sort(p, axis=1)[:, V - 3, None]
    head = np.where(p >= least, p, 0)
    if tail == "uniform":
        agreed = np.where(head > 0, p, (1 - head.sum(axis=1, keepdims=True)) / (V - 3))
    elif tail == "bucket":  # the tail's mass in any shares
        shares = np.where(head > 0, 0, np.random.default_rng(1).random((V, V)))
        agreed = head + shares / shares.sum(axis=1, keepdims=True) * (1 - head.sum(axis=1, keepdims=True))
    else:  # all of the student's mass on the stored classes, as far as float32 goes
        agreed = np.where(head > 0, head / head.sum(axis=1, keepdims=True), 1e-12)

    def run(name, student):
        return pipeline(
            tmp_path / name, teacher=RowsOfTable(2 * np.log(p)), student=table_student(student), tail=tail, alpha=0.0,
            max_steps=1,
        ).execute()  # fmt: skip

    with pytest.raises(DegenerateTeacherError, match="teacher and student agree before the first step"):
        run("agreed", 2 * np.log(agreed))
    assert run("apart", np.zeros((V, V))).metrics["steps"] == 1
    assert run("nearly", 2 * np.log(agreed) + 0.02 * np.eye(V)).metrics["steps"] == 1


def test_d14_rows_without_every_class_cannot_be_cut(tmp_path):
    wide = Bigram(V + 2).table
    for name, teacher in (
        ("store", HDF5Teacher(stored(tmp_path / "t.h5", wide, k=3))),
        ("rows", RowsOfTable(wide)),
    ):
        with pytest.raises(VocabularyMismatchError, match="cannot be truncated: how much of the mass"):
            pipeline(tmp_path / name, teacher=teacher, batches=numbered(), vocabulary="truncate").execute()
