"""A distillation run: teacher → student → step, from a configuration to a saved student."""

from __future__ import annotations

import dataclasses
import fcntl
import filecmp
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kdcore.arguments import Tail
from kdcore.batches import Batch, BatchSource
from kdcore.callbacks import Callback, RunState
from kdcore.config import DistillConfig
from kdcore.errors import (
    CheckpointError,
    ConfigError,
    DegenerateTeacherError,
    EndOfDataError,
    KdcoreError,
    NonFiniteError,
    ShapeError,
    VocabularyMismatchError,
)
from kdcore.hdf5 import read_arrays, sync
from kdcore.ops import kd_loss, kd_loss_and_gradient, kl_divergence
from kdcore.sparse import SampledRows, TopKRows
from kdcore.steps import counted_kd_step, kd_step_per_position
from kdcore.students.base import StudentLogitsProvider
from kdcore.teachers.base import TeacherLogitsProvider, answers_for_batch, answers_per_position, rows_teacher
from kdcore.teachers.truncating import TruncatingTeacher

__all__ = ["Pipeline", "PipelineResult"]

_log = logging.getLogger("kdcore")

#: A mean held-out KL above this, twice the rounding that float32 is allowed, is a difference for certain.
_CERTAIN_KL = 1e-6
#: Up to there T² KL decides, which is what a run lowers: as T grows, KL falls as 1/T² even where logits are far apart,
#: while T² KL nears half the variance of their differences (1e-6: they differ by a thousandth). Float32 rounds it by up
#: to 5e-7 T², so it is computed in float64. That rounds by 1e-13 T², which is small up to the T below; T² KL hardly
#: changes beyond.
_DEGENERATE_LOSS = 1e-6
_WARMEST_COMPARISON = 1000.0
#: Held-out rows are evaluated in pieces of about so many logits, 8 MB in float32.
_EVALUATION_ELEMENTS = 1 << 21
_STUDENT_FILE = "student.h5"
_STATE_FILE = "state.json"
_LOCK_FILE = ".lock"


@dataclass(frozen=True)
class PipelineResult:
    """What :meth:`Pipeline.execute` returns.

    ``metrics`` holds initial_loss, final_loss and best_validation_loss on the same held-out rows; initial_ce,
    initial_kl, final_ce and final_kl, the parts of the loss (kl with its T²; None where alpha leaves a part out);
    steps, epochs, throughput (training rows a second), improvement_ratio = 1 - final_loss / initial_loss, objective,
    stop_reason, and discarded_teacher_mass where the teacher was truncated.
    """

    output_path: Path
    metrics: dict[str, Any]
    duration_seconds: float


class Pipeline:
    """Validate, train, validate on held-out rows, save; resumable bit for bit.

    Parameters
    ----------
    config : DistillConfig
    teacher : TeacherLogitsProvider
        A :class:`TeacherRowsProvider`, an :class:`HDF5Teacher` of a "topk" or "sampled" store say, is asked for its
        rows at ``config.temperature``, which it must have.
    student : StudentLogitsProvider
    batches : BatchSource
        Training rows, and the held-out rows that every validation uses. With ``config.per_position`` its labels are
        [B, L], with ``config.ignore_index`` beyond the end of a shorter row, otherwise [B].
    callbacks : sequence of Callback
    progress : bool, optional
        Whether to show a progress bar; by default if standard error is a terminal.

    Examples
    --------
    >>> import kdcore, tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     config = kdcore.DistillConfig(output_dir=directory + "/run", alpha=0.5, batch_size=4, epochs=2)
    ...     result = kdcore.Pipeline(
    ...         config,
    ...         teacher=kdcore.FixtureTeacher(8),
    ...         student=kdcore.LogitStudent(8, context=1, learning_rate=1.0),
    ...         batches=kdcore.SyntheticBatchSource(8, rows_per_epoch=400),
    ...     ).execute()
    ...     student = kdcore.LogitStudent.load(result.output_path)
    >>> result.metrics["steps"], result.metrics["final_loss"] < result.metrics["initial_loss"]
    (200, True)
    """

    def __init__(
        self,
        config: DistillConfig,
        *,
        teacher: TeacherLogitsProvider,
        student: StudentLogitsProvider,
        batches: BatchSource,
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
    ) -> None:
        for name, value, kind in (
            ("config", config, DistillConfig),
            ("teacher", teacher, TeacherLogitsProvider),
            ("student", student, StudentLogitsProvider),
            ("batches", batches, BatchSource),
        ):
            if not isinstance(value, kind):
                raise ConfigError(f"{name} must be a {kind.__name__}, got {value!r}")
        if not isinstance(callbacks, Iterable):
            raise ConfigError(f"callbacks must be a sequence of Callback, got {callbacks!r}")
        self.callbacks = list(callbacks)
        for index, callback in enumerate(self.callbacks):
            if not isinstance(callback, Callback):
                raise ConfigError(f"callbacks[{index}] must be a Callback, got {callback!r}")
        self.config = config
        self._whole_teacher = teacher
        self._compared_files = False
        self._got_rows = False  # whether the teacher's last answer was rows, and not logits
        _check_temperature(teacher, config)
        self.teacher = _fit_vocabulary(teacher, student, config)
        self.student = student
        self.batches = batches
        self.progress = sys.stderr.isatty() if progress is None else progress
        self._output = Path(config.output_dir)

    # --- the run ----------------------------------------------------------------------------------------------------

    def execute(self, *, resume: bool = False) -> PipelineResult:
        """Run to the end, or from the newest checkpoint in ``output_dir`` to the end.

        Success is reported only after the student was saved, loaded again and found to give the same logits for all
        held-out rows. At the first checkpoint of the call the loaded student is also saved, and must save the same
        arrays: what a class forgets to load, an optimiser's state say, it forgets every time. The
        student given to the pipeline is trained in place; a resumed run goes on with the one that the checkpoint
        holds, learning rate included, and ``pipeline.student`` is then that one. The teacher must be the same, bit for
        bit on held-out rows.

        The directory is locked for as long as this takes.

        Raises
        ------
        ConfigError
            ``output_dir`` holds another run, or none to resume, or is in use by a run at this moment.
        DegenerateTeacherError
            The student already agrees with its teacher.
        CheckpointError
            A checkpoint did not survive its round trip.
        """
        started = time.perf_counter()
        held_out = self.batches.held_out()
        _check_held_out(held_out, self.config)
        steps_per_epoch = self.batches.batches_per_epoch(self.config.batch_size)
        if steps_per_epoch < 1:
            raise ConfigError(f"the batch source has {steps_per_epoch} batches in a pass: there is nothing to train on")
        total_steps = self.config.epochs * steps_per_epoch
        if self.config.max_steps is not None:
            total_steps = min(total_steps, self.config.max_steps)
        if resume and not self._checkpoints():
            raise ConfigError(f"output_dir={str(self._output)!r} holds no checkpoint to resume from")
        self._output.mkdir(parents=True, exist_ok=True)
        with self._locked():
            path, metrics = self._execute(held_out, total_steps, steps_per_epoch, resume)
        return PipelineResult(path, metrics, time.perf_counter() - started)

    def _execute(
        self, held_out: Batch, total_steps: int, steps_per_epoch: int, resume: bool
    ) -> tuple[Path, dict[str, Any]]:
        checkpoints = self._checkpoints()
        if resume:
            saved = self._restore(checkpoints[-1], held_out)
        elif checkpoints or (self._output / _STUDENT_FILE).exists():
            raise ConfigError(
                f"output_dir={str(self._output)!r} already holds a run: resume it with execute(resume=True), "
                "or choose another directory"
            )
        self._compared_files = False
        with self._logging():
            state = RunState(self.student, total_steps)
            if resume:
                state.step, state.epoch = saved["step"], saved["epoch"]
                state.loss, history = saved["loss"], saved["history"]
                state.metrics = dict(history["last"])
                self._announce(total_steps)
                _log.info("resumed at step %d of %d", state.step, total_steps)
            else:
                self.batches.reset()  # a source that has given rows before would end its first pass too early
                self._announce(total_steps)
                initial = self._evaluate(held_out)
                self._check_distinct(initial, held_out)
                history = {
                    "initial": initial, "last": initial, "last_step": 0, "best": initial["loss"],
                    "rows": 0, "seconds": 0.0, "teacher": self._teacher_digest(held_out),
                }  # fmt: skip
                state.metrics = dict(initial)
            self._train(state, history, held_out, steps_per_epoch)
            if history["last_step"] != state.step:
                self._validate(state, history, held_out)
            self._checkpoint(state, history, held_out)
            path = self._publish(state.step)
            metrics = self._metrics(state, history)
            _write_text(self._output / "metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
            _log.info("saved %s; held-out loss %.6g -> %.6g", path, metrics["initial_loss"], metrics["final_loss"])
        return path, metrics

    def _train(self, state: RunState, history: dict[str, Any], held_out: Batch, steps_per_epoch: int) -> None:
        config = self.config
        bar = tqdm(
            total=state.total_steps, initial=state.step, disable=not self.progress, unit="step", desc="distilling"
        )
        with bar:
            while state.step < state.total_steps and state.stop_reason is None:
                for callback in self.callbacks:
                    callback.on_step_begin(state)
                began = time.perf_counter()
                batch = self._next_batch()
                state.loss = self._step(batch)
                state.step += 1
                history["rows"] += len(batch)
                history["seconds"] += time.perf_counter() - began
                epoch_ends = state.step % steps_per_epoch == 0
                if epoch_ends:
                    state.epoch += 1
                bar.update()
                bar.set_postfix(loss=f"{state.loss:.4g}", refresh=False)
                if state.step == 1 or state.step % config.log_every == 0:
                    _log.info("step %d of %d: loss %.6g", state.step, state.total_steps, state.loss)
                if state.step % config.validate_every == 0 if config.validate_every else epoch_ends:
                    self._validate(state, history, held_out)
                for callback in self.callbacks:
                    callback.on_step_end(state)
                if epoch_ends:
                    for callback in self.callbacks:
                        callback.on_epoch_end(state)
                if config.checkpoint_every and state.step % config.checkpoint_every == 0:
                    self._checkpoint(state, history, held_out)
        if state.stop_reason is not None:
            _log.info("stopped after step %d: %s", state.step, state.stop_reason)

    def _next_batch(self) -> Batch:
        try:
            return self.batches.next_batch(self.config.batch_size)
        except EndOfDataError:  # a source that wraps around goes on by itself
            self.batches.reset()
            return self.batches.next_batch(self.config.batch_size)

    def _step(self, batch: Batch) -> float:
        config = self.config
        keywords: dict[str, Any] = {
            "divergence": config.divergence, "ignore_index": config.ignore_index, "tail": config.tail
        }  # fmt: skip
        if config.per_position:
            logits, mask = self.student.logits_per_position(batch.input_ids)
            _check_rows(logits, batch)
            labels = _cut_labels(batch.labels, mask, config.ignore_index)
            ragged = [row[exists] for row, exists in zip(labels, mask, strict=True)]
            rows = iter([row[exists] for row, exists in zip(logits, mask, strict=True)])
            loss, gradient, counted = kd_step_per_position(
                self.teacher, batch.for_teacher, ragged, config.temperature, config.alpha, lambda _: next(rows),
                **keywords,
            )  # fmt: skip
            count = int(counted.sum())
        else:
            logits = self.student.logits_for_batch(batch.input_ids)
            _check_rows(logits, batch)
            rows = iter(logits)
            loss, gradient, count = counted_kd_step(
                self.teacher, batch.for_teacher, batch.labels, config.temperature, config.alpha, lambda _: next(rows),
                **keywords,
            )  # fmt: skip
        if not math.isfinite(loss):
            raise _infinite("training", loss)
        self.student.apply_kd_gradient(gradient, denominator=max(count, 1))
        return loss

    # --- validation -------------------------------------------------------------------------------------------------

    def _validate(self, state: RunState, history: dict[str, Any], held_out: Batch) -> None:
        metrics = self._evaluate(held_out)
        state.metrics = dict(metrics)
        history.update(last=metrics, last_step=state.step, best=min(history["best"], metrics["loss"]))
        _log.info("step %d: held-out %s", state.step, _in_figures(metrics))

    def _evaluate(self, held_out: Batch) -> dict[str, Any]:
        """Loss, CE and T² D, means over the held-out rows or positions."""
        config = self.config
        totals = {"loss": 0.0, "ce": 0.0, "kl": 0.0}
        count = 0
        for part in self._parts(held_out):
            student, teacher, labels = self._logits(part)
            count += int(np.count_nonzero(labels != config.ignore_index))
            # The gradient comes along unused: one pass with it costs less than a pass for each part of the loss.
            sums = kd_loss_and_gradient(
                student, teacher, labels, config.temperature, config.alpha,
                divergence=config.divergence, ignore_index=config.ignore_index, reduction="sum", tail=config.tail,
            )  # fmt: skip
            for name, total in totals.items():
                totals[name] = total + float(getattr(sums, name) or 0.0)
        if count == 0:
            raise ShapeError("every held-out row is masked: there is nothing to validate on")
        means = {name: total / count for name, total in totals.items()}
        if not math.isfinite(means["loss"]):  # no later loss could be compared with it
            raise _infinite("held-out", means["loss"])
        computed = {"loss": True, "ce": config.alpha > 0, "kl": config.alpha < 1}
        return {name: mean if computed[name] else None for name, mean in means.items()}

    def _parts(self, held_out: Batch) -> Iterator[Batch]:
        """The held-out rows in pieces of a few megabytes of logits."""
        row_elements = self.student.vocab_size * math.prod(held_out.labels.shape[1:])
        rows = max(self.config.batch_size, _EVALUATION_ELEMENTS // max(row_elements, 1))
        for start in range(0, len(held_out), rows):
            part = slice(start, start + rows)
            teacher_ids = None if held_out.teacher_ids is None else held_out.teacher_ids[part]
            yield Batch(held_out.input_ids[part], held_out.labels[part], teacher_ids)

    def _logits(self, batch: Batch) -> tuple[NDArray[Any], Any, NDArray[np.int64]]:
        """Student and teacher logits [N, V] and labels [N] of rows, or of positions that exist.

        Of a teacher without logits its rows [N].
        """
        teacher = None
        temperature = self.config.temperature
        if self.config.per_position:
            student, mask = self.student.logits_per_position(batch.input_ids)
            _check_rows(student, batch)
            labels = _cut_labels(batch.labels, mask, self.config.ignore_index)[mask]
            if self.config.alpha < 1:
                teacher, teacher_mask = answers_per_position(self.teacher, batch.for_teacher, temperature)
                if not np.array_equal(teacher_mask, mask):
                    raise ShapeError("teacher and student have different positions in the held-out rows")
                teacher = teacher[mask]
            student = student[mask]
        else:
            student, labels = self.student.logits_for_batch(batch.input_ids), batch.labels
            _check_rows(student, batch)
            if self.config.alpha < 1:
                teacher = answers_for_batch(self.teacher, batch.for_teacher, temperature)
        self._got_rows = isinstance(teacher, TopKRows | SampledRows)
        if self._got_rows:
            return student, teacher, labels  # kd_loss compares their shapes, and says so in its own words
        if teacher is not None and teacher.shape != student.shape:
            raise ShapeError(f"the teacher must return logits of shape {student.shape}, got {teacher.shape}")
        return student, student if teacher is None else teacher, labels

    def _check_distinct(self, initial: dict[str, Any], held_out: Batch) -> None:
        if self.config.alpha == 1 or self.config.allow_degenerate:
            return
        temperature = self.config.temperature
        if initial["kl"] > _CERTAIN_KL * temperature * temperature and not self._got_rows:
            return  # of rows D alone does not say how far it is from its least
        total, count = 0.0, 0
        for part in self._parts(held_out):
            student, teacher, labels = self._logits(part)
            keep = labels != self.config.ignore_index
            count += int(keep.sum())
            if isinstance(teacher, TopKRows | SampledRows):
                total += _above_least(student[keep], teacher[keep], temperature, self.config.tail)
                continue
            temperature = min(temperature, _WARMEST_COMPARISON)
            total += float(
                kl_divergence(
                    student[keep].astype(np.float64), teacher[keep].astype(np.float64), temperature,
                    divergence=self.config.divergence, reduction="sum",
                )
            )  # fmt: skip
        divergence = total / count
        if temperature * temperature * divergence < _DEGENERATE_LOSS:
            raise DegenerateTeacherError(
                f"teacher and student agree before the first step (mean held-out KL {divergence:.3g} nats at "
                f"T = {temperature:g}): there is nothing to distil; allow_degenerate=True runs all the same"
            )

    def _metrics(self, state: RunState, history: dict[str, Any]) -> dict[str, Any]:
        initial, final = history["initial"], history["last"]
        metrics = {
            "objective": self.config.objective(),
            "initial_loss": initial["loss"],
            "final_loss": final["loss"],
            "best_validation_loss": history["best"],
            "initial_ce": initial["ce"],
            "final_ce": final["ce"],
            "initial_kl": initial["kl"],
            "final_kl": final["kl"],
            "improvement_ratio": 1 - final["loss"] / initial["loss"] if initial["loss"] > 0 else 0.0,
            "steps": state.step,
            "epochs": state.epoch,
            "throughput": history["rows"] / history["seconds"] if history["seconds"] else 0.0,
            "stop_reason": state.stop_reason,
        }
        if isinstance(self.teacher, TruncatingTeacher):
            metrics["discarded_teacher_mass"] = self.teacher.discarded_mass
        return metrics

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def _checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(self._output.glob("checkpoints/step-[0-9]*[0-9]"))

    def _checkpoint_path(self, step: int) -> Path:
        return self._output / "checkpoints" / f"step-{step:010d}"

    def _checkpoint(self, state: RunState, history: dict[str, Any], held_out: Batch) -> None:
        """Student and run in one directory, which appears under its name only when it is complete and verified."""
        final = self._checkpoint_path(state.step)
        if final.exists():  # this step's periodic checkpoint
            return
        part = final.with_name(f"{final.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        self._save_student(part / _STUDENT_FILE, held_out)
        saved = {
            "step": state.step,
            "epoch": state.epoch,
            "loss": state.loss,
            "history": history,
            "batches": self.batches.state(),
            "truncation": self.teacher.state() if isinstance(self.teacher, TruncatingTeacher) else None,
            "config": self._fingerprint(held_out),
        }
        _write_text(part / _STATE_FILE, json.dumps(saved, indent=2))
        sync(part)
        os.replace(part, final)
        sync(final.parent)
        for old in self._checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)
        _log.info("checkpoint %s", final)
        for callback in self.callbacks:
            callback.on_checkpoint(state, final)

    def _publish(self, step: int) -> Path:
        """The last checkpoint's student, which has been verified, under its own name in the output directory."""
        path = self._output / _STUDENT_FILE
        verified = self._checkpoint_path(step) / _STUDENT_FILE
        part = path.with_name(f"{path.name}.part")
        part.unlink(missing_ok=True)
        try:
            os.link(verified, part)  # the same bytes, without writing them again
        except OSError:  # a file system without hard links
            shutil.copyfile(verified, part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        os.replace(part, path)
        sync(self._output)
        return path

    def _save_student(self, path: Path, held_out: Batch) -> None:
        """Save, load again, compare: a file that does not give the student back is no checkpoint."""
        self.student.save_checkpoint(path)
        if not path.exists():
            raise CheckpointError(f"{path}: the student's save_checkpoint wrote nothing")
        loaded = type(self.student).load(path)
        if not isinstance(loaded, StudentLogitsProvider):
            raise CheckpointError(f"{path}: the student's load returned {loaded!r}, which is no student")
        for part in self._parts(held_out):
            ours, theirs = (
                student.logits_per_position(part.input_ids)[0]
                if self.config.per_position
                else student.logits_for_batch(part.input_ids)
                for student in (self.student, loaded)
            )
            if not _equal(ours, theirs):
                raise CheckpointError(f"{path}: the student loaded from it gives other logits than the one saved")
        if not self._compared_files:  # once a run: it costs a write, and what load leaves out it always leaves out
            self._compare_files(path, loaded)
            self._compared_files = True

    def _compare_files(self, path: Path, loaded: StudentLogitsProvider) -> None:
        """What the loaded student saves is what it was loaded from: no row and no optimiser state is missing."""
        again = path.with_name(f"again-{path.name}")
        try:
            loaded.save_checkpoint(again)
            if not again.exists():
                raise CheckpointError(f"{path}: the student loaded from it saves nothing")
            if _same_content(path, again):
                return
            if not _is_container(path):
                # A format of its own: only where the same student writes the same bytes twice do others mean anything.
                self.student.save_checkpoint(again)
                if not filecmp.cmp(path, again, shallow=False):
                    _log.info("%s: no two saves are alike, so that only the logits were compared", path.name)
                    return
            raise CheckpointError(f"{path}: the student loaded from it saves other arrays than the one saved")
        finally:
            again.unlink(missing_ok=True)

    def _restore(self, checkpoint: Path, held_out: Batch) -> dict[str, Any]:
        try:
            saved: dict[str, Any] = json.loads((checkpoint / _STATE_FILE).read_text(encoding="utf-8"))
            before, now = saved["config"], self._fingerprint(held_out)
            differing = sorted(name for name, value in now.items() if before.get(name) != value)
            if differing:
                raise ConfigError(
                    f"{checkpoint} belongs to another configuration: "
                    + ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differing)
                )
            if saved["history"]["teacher"] != self._teacher_digest(held_out):
                raise ConfigError(
                    f"{checkpoint} belongs to another teacher: this one gives other logits for the held-out rows"
                )
            for name in ("step", "epoch", "loss", "history"):
                saved[name]
            self.student = type(self.student).load(checkpoint / _STUDENT_FILE)
            self.batches.restore(saved["batches"])
            if isinstance(self.teacher, TruncatingTeacher):
                self.teacher.restore(saved["truncation"])
        except (OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, KdcoreError):
                raise
            raise CheckpointError(f"{checkpoint} cannot be read: {error}") from error
        return saved

    def _fingerprint(self, held_out: Batch) -> dict[str, Any]:
        """What must not change between a run and its continuation: everything but its length and its reporting."""
        free = {
            "output_dir", "epochs", "max_steps", "validate_every", "checkpoint_every", "keep_checkpoints", "log_every",
        }  # fmt: skip
        config = {name: value for name, value in dataclasses.asdict(self.config).items() if name not in free}
        return config | {
            "student": type(self.student).__name__,
            "vocab_size": self.student.vocab_size,
            "held_out_labels": _digest(held_out.labels),
        }

    def _teacher_digest(self, held_out: Batch) -> str | None:
        """Enough to tell the teacher from another: its answers for the first held-out rows. None where it is not asked.

        The teacher that was given is asked, and not the truncated one, whose account of lost mass is the run's.
        """
        if self.config.alpha == 1:
            return None
        asked, temperature = next(self._parts(held_out)).for_teacher, self.config.temperature
        if self.config.per_position:
            answers, mask = answers_per_position(self._whole_teacher, asked, temperature)
            answers = answers[mask]
        else:
            answers = answers_for_batch(self._whole_teacher, asked, temperature)
        if isinstance(answers, TopKRows | SampledRows):
            return "".join(map(_digest, answers.arrays().values()))
        return _digest(answers)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other runs out of the output directory.

        The file stays, since another run may have opened it already; the kernel ends the lock of a killed run.
        """
        with open(self._output / _LOCK_FILE, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"output_dir={str(self._output)!r} is in use by another run") from None
            yield

    # --- reporting --------------------------------------------------------------------------------------------------

    def _announce(self, total_steps: int) -> None:
        line = f"objective: {self.config.objective()}"
        _log.info(line)
        _log.info("%d steps of %d rows", total_steps, self.config.batch_size)
        if self.progress:
            tqdm.write(line, file=sys.stderr)

    @contextmanager
    def _logging(self) -> Iterator[None]:
        """The run's own log, run.log in the output directory, beside whatever logging the program has."""
        handler = logging.FileHandler(self._output / "run.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        level = _log.level
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        try:
            yield
        finally:
            _log.setLevel(level)
            _log.removeHandler(handler)
            handler.close()


def _check_temperature(teacher: TeacherLogitsProvider, config: DistillConfig) -> None:
    """Before anything is made: a teacher of rows must have them at the temperature of the run."""
    sparse = rows_teacher(teacher)
    if sparse is None or config.alpha == 1:
        return
    temperatures = sparse.temperatures or ()
    if config.temperature not in temperatures:
        raise ConfigError(
            f"temperature={config.temperature}, but {teacher!r} has rows at {', '.join(map(str, temperatures))} alone"
        )


def _above_least(student: NDArray[Any], rows: TopKRows | SampledRows, temperature: float, tail: Tail) -> float:
    """The sum of D over rows less the least that each could be.

    With M the mass of a row's outcomes that is M log M, where the student has p / M: what M lacks to 1 by the rounding
    of what is stored, or by what the policy leaves out, makes D larger or smaller in first order.
    """
    divergence = kd_loss(
        student.astype(np.float64), rows, None, temperature, 0.0, scale_t2=False, tail=tail, reduction="sum"
    )
    if isinstance(rows, TopKRows) and tail == "renormalize":
        return float(divergence)
    log_p = rows.log_probs if isinstance(rows, TopKRows) else rows.log_weights
    there = np.arange(rows.k) < rows.n_valid[:, None]
    mass = np.where(there, np.exp(log_p, dtype=np.float64), 0.0).sum(axis=1)
    if isinstance(rows, TopKRows) and tail != "zero":
        mass += np.exp(rows.tail_logmass, dtype=np.float64)
    mass = mass[mass > 0]  # 0 log 0 = 0
    return float(divergence) - float((mass * np.log(mass)).sum())


def _fit_vocabulary(
    teacher: TeacherLogitsProvider, student: StudentLogitsProvider, config: DistillConfig
) -> TeacherLogitsProvider:
    if teacher.vocab_size == student.vocab_size:
        return teacher
    if config.vocabulary == "truncate":
        return TruncatingTeacher(teacher, student.vocab_size)
    raise VocabularyMismatchError(
        f"the teacher has {teacher.vocab_size} classes and the student {student.vocab_size}; "
        'vocabulary="truncate" cuts a wider teacher to the student\'s classes before the softmax'
    )


def _check_held_out(held_out: Batch, config: DistillConfig) -> None:
    if not len(held_out):
        raise ShapeError("the batch source holds out no rows: validation needs at least one")
    dimensions = 2 if config.per_position else 1
    if np.ndim(held_out.labels) != dimensions:
        raise ConfigError(
            f"per_position={config.per_position} needs labels with {dimensions} dimension(s), "
            f"but the batch source gives labels of shape {np.shape(held_out.labels)}"
        )


def _check_rows(logits: NDArray[Any], batch: Batch) -> None:
    if len(logits) != len(batch):
        raise ShapeError(f"the student must return logits for the {len(batch)} rows of the batch, got {len(logits)}")


def _infinite(name: str, loss: float) -> NonFiniteError:
    return NonFiniteError(
        f"the {name} loss is {loss}: a class that is asked of the student has the logit -inf, or, with reverse_kl, "
        "the teacher rules out a class that the student allows"
    )


def _cut_labels(labels: NDArray[np.int64], mask: NDArray[np.bool_], ignore_index: int) -> NDArray[np.int64]:
    """Padded labels in the shape of the student's mask; a label where there is no position is an error."""
    length = mask.shape[1]
    ends = mask.sum(axis=1)
    if not np.array_equal(mask, np.arange(length) < ends[:, None]):
        raise ShapeError("the student's mask must have its rows padded on the right")
    if labels.ndim != 2 or len(labels) != len(mask) or labels.shape[1] < length:
        raise ShapeError(f"labels must have shape {mask.shape} like input_ids, got {labels.shape}")
    beyond = (np.arange(labels.shape[1]) >= ends[:, None]) & (labels != ignore_index)
    if beyond.any():
        row, position = (int(i) for i in np.argwhere(beyond)[0])
        raise ShapeError(
            f"labels[{row}, {position}] is {labels[row, position]}, but row {row} of input_ids has {ends[row]} "
            f"positions: beyond its end stands ignore_index={ignore_index}"
        )
    return labels[:, :length]


def _equal(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


def _same_content(path: Path, other: Path) -> bool:
    """Whether two files of students are the same in their bytes or, if they are kdcore's, in arrays and metadata."""
    if filecmp.cmp(path, other, shallow=False):
        return True
    try:
        (arrays, metadata), (others, other_metadata) = read_arrays(path), read_arrays(other)
    except CheckpointError:
        return False
    return (
        metadata == other_metadata
        and arrays.keys() == others.keys()
        and all(_equal(array, others[name]) for name, array in arrays.items())
    )


def _is_container(path: Path) -> bool:
    try:
        read_arrays(path)
    except CheckpointError:
        return False
    return True


def _digest(array: Any) -> str:
    """Enough to tell one array from another."""
    values = np.ascontiguousarray(array)
    digest = hashlib.blake2b(f"{values.dtype} {values.shape}".encode(), digest_size=8)
    digest.update(values.tobytes())
    return digest.hexdigest()


def _in_figures(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in metrics.items() if value is not None)


def _write_text(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
