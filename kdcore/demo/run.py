"""The demo: a byte n-gram model of the standard library's source teaches a table of two-byte contexts.

Everything goes the way of a real run. The teacher reads passages of text, each a sequence of bytes as a language
model's are of tokens, and what it says at every position goes into a LogitStore: the 32 likeliest bytes and the mass of
all others, about 150 bytes a row where 256 in float16 would take 512. The students train through Pipeline at every
position, and HDF5Teacher finds the teacher's rows by the content of the passages. What is reported is measured on files
that neither teacher, students nor learning rates have seen.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from kdcore.batches import ArrayBatchSource, Batch
from kdcore.callbacks import Callback, RunState
from kdcore.config import DistillConfig
from kdcore.demo.corpus import Corpus, load_corpus, passages, positions
from kdcore.demo.ngram import WittenBellModel
from kdcore.errors import ConfigError, MissingDependencyError
from kdcore.ops import cross_entropy
from kdcore.pipeline import Pipeline
from kdcore.store.reader import LogitStore
from kdcore.store.writer import LogitStoreWriter
from kdcore.students.base import StudentLogitsProvider
from kdcore.students.logit import LogitStudent
from kdcore.teachers.hdf5 import HDF5Teacher

__all__ = ["evaluate_checkpoint", "run_demo"]

BYTES = 256
ORDER = 5
STUDENT_CONTEXT = 2
SEED = 0
HELD_OUT_POSITIONS = 50_000
TUNE_POSITIONS = 10_000
#: Positions of a passage that are learned from. It has a byte more, its first, where a student does not see two yet.
PASSAGE = 25
BATCH_PASSAGES = 10
#: Positions of a step.
BATCH = BATCH_PASSAGES * PASSAGE
#: Classes that are stored of each row.
K = 32

#: Data budget in positions, and the passes over it: small budgets need several.
BUDGETS = {3_000: 12, 30_000: 4, 200_000: 1}
#: Learning rates are chosen on runs over at most so many positions.
TUNE_BUDGET = 30_000
#: Candidates, as the rate of a context that fills its batch; a step divides by the batch, so this times BATCH.
RATES = (0.5, 1.0, 2.0)
#: A context table scored at T = 1 gains nothing from tempering, so the distilled student learns at T = 1.
STUDENTS = {"hard": 1.0, "distilled": 0.0}

_REPORT = "demo.json"
_BLOCK_PASSAGES = 256
#: Everything that the demo leaves in its directory.
_RESULTS = re.compile(r"demo\.json|demo\.png|teacher\.h5(\..*)?|(hard|distilled)-\d+(-rate-[\d.]+)?")


class _LinearDecay(Callback):
    """The learning rate falls to 0 over the run: the commonest contexts come often enough to overshoot otherwise."""

    def __init__(self, learning_rate: float, bar: tqdm[Any]) -> None:
        self.learning_rate = learning_rate
        self.bar = bar

    def on_step_begin(self, state: RunState) -> None:
        assert isinstance(state.student, LogitStudent)
        state.student.learning_rate = self.learning_rate * (1 - state.step / state.total_steps)

    def on_step_end(self, state: RunState) -> None:
        self.bar.update()


def run_demo(output_dir: str | Path, *, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the demo into ``output_dir``, which it owns; returns the report that it also writes there as JSON.

    The report has bits per byte on held-out positions: of the uniform distribution, the teacher, and for every data
    budget the student trained on hard labels and the distilled one.
    """
    if find_spec("matplotlib") is None:
        raise MissingDependencyError("the demo draws its curves with matplotlib: pip install 'kdcore[demo]'")
    started = time.perf_counter()
    output = _own(Path(output_dir))

    say("teacher: fitting a Witten-Bell byte model of order 5 on the standard library's source")
    corpus = load_corpus()
    teacher_model = WittenBellModel.fit(list(corpus.train.values()), ORDER)
    text = _passages(corpus.train, max(BUDGETS))
    tune_text = _passages(corpus.tune, TUNE_POSITIONS, taken=text)
    held_contexts, held_labels = _held_out(corpus)
    teacher_bits = -float(teacher_model.label_log_probs(held_contexts, held_labels).mean()) / math.log(2)

    path = output / "teacher.h5"
    say(f"teacher: writing what it says of {len(text) + len(tune_text):,} passages to {path}")
    write_store(path, teacher_model, np.concatenate([text, tune_text]))
    del teacher_model  # from here on the teacher is the store

    input_ids, labels = _lessons(text)
    tune = Batch(*_lessons(tune_text))
    curves: list[dict[str, Any]] = []
    with (
        LogitStore(path, vocab_size=BYTES) as store,
        HDF5Teacher(store, address="content") as teacher,
        tqdm(total=_total_steps(), unit="step", disable=not sys.stderr.isatty()) as bar,
    ):
        stored = {"kind": store.kind, "k": store.header.k, "rows": len(store), "bytes": path.stat().st_size}
        for budget, epochs in BUDGETS.items():
            row: dict[str, Any] = {"positions": budget, "steps": -(-budget // BATCH) * epochs}
            for name, alpha in STUDENTS.items():

                def train(
                    folder: Path, rate: float, size: int, alpha: float = alpha, epochs: int = epochs
                ) -> LogitStudent:
                    chosen = slice(size // PASSAGE)
                    source = ArrayBatchSource(input_ids[chosen], labels[chosen], seed=SEED, held_out=tune)
                    learning_rate = rate * BATCH
                    student = LogitStudent(BYTES, 0.0, learning_rate, context=STUDENT_CONTEXT)
                    config = DistillConfig(
                        output_dir=str(folder),
                        temperature=1.0,
                        alpha=alpha,
                        batch_size=BATCH_PASSAGES,
                        per_position=True,
                        epochs=epochs,
                        validate_every=epochs * size,  # beyond the last step: once at each end of the run is enough
                    )
                    decay = _LinearDecay(learning_rate, bar)
                    pipeline = Pipeline(
                        config, teacher=teacher, student=student, batches=source, callbacks=[decay], progress=False
                    )
                    pipeline.execute()
                    return student

                rate, student = _best_rate(train, output / f"{name}-{budget}", min(budget, TUNE_BUDGET), tune)
                if budget > TUNE_BUDGET:
                    shutil.rmtree(output / f"{name}-{budget}")
                    student = train(output / f"{name}-{budget}", rate, budget)
                row[name] = {
                    "bits_per_byte": _bits(student, held_contexts, held_labels),
                    "learning_rate": rate * BATCH,
                    "checkpoint": f"{name}-{budget}/student.h5",
                }
            curves.append(row)
            hard, distilled = (row[name]["bits_per_byte"] for name in STUDENTS)
            with tqdm.external_write_mode():
                say(f"{budget:>8,} positions: hard labels {hard:.3f}, distilled {distilled:.3f} bits a byte")

    report = {
        "demo": "kdcore",
        "status": "complete",
        "uniform_bits_per_byte": math.log2(BYTES),
        "teacher_bits_per_byte": teacher_bits,
        "teacher": {"model": "interpolated Witten-Bell byte n-gram", "order": ORDER, "files": len(corpus.train)},
        "store": stored,
        "held_out": {"files": len(corpus.held_out), "positions": HELD_OUT_POSITIONS},
        "budgets": curves,
        "seconds": time.perf_counter() - started,
    }
    (output / _REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    _plot(report, output / "demo.png")
    say(_table(report))
    say(f"written: {output / _REPORT}, {output / 'demo.png'} ({report['seconds']:.0f} s)")
    last = output / curves[-1]["distilled"]["checkpoint"]
    say(f"evaluate the saved student again: kdcore demo --evaluate {last}")
    return report


def evaluate_checkpoint(path: str | Path) -> float:
    """Held-out bits per byte of a student that the demo saved."""
    student = LogitStudent.load(path)
    return _bits(student, *_held_out(load_corpus()))


def write_store(path: Path, model: WittenBellModel, text: NDArray[np.uint8]) -> None:
    """A store of what the model says at every byte of passages, as :func:`kdcore.demo.corpus.passages` returns them.

    The model reads the ``model.order - 2`` bytes before a passage too, so that it has as many bytes at the first as at
    all others.
    """
    with LogitStoreWriter(
        path, vocab_size=BYTES, k=K, temperatures=(1.0,), capacity=len(text) * (PASSAGE + 1),
        teacher="Witten-Bell byte model of the standard library's source",
    ) as writer:  # fmt: skip
        for start in range(0, len(text), _BLOCK_PASSAGES):
            block = text[start : start + _BLOCK_PASSAGES]
            contexts = np.lib.stride_tricks.sliding_window_view(block[:, :-1], model.order - 1, axis=1)
            log_probs = model.log_probs(contexts.reshape(-1, model.order - 1), np.float32)
            for passage, rows in zip(block, log_probs.reshape(*contexts.shape[:2], BYTES), strict=True):
                writer.append(passage[model.order - 2 : -1], rows)


def _passages(files: dict[str, bytes], count: int, taken: NDArray[np.uint8] | None = None) -> NDArray[np.uint8]:
    """Passages with ``count`` positions to learn from."""
    return passages(list(files.values()), count // PASSAGE, PASSAGE + 1, SEED, before=ORDER - 2, taken=taken)


def _lessons(text: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Passages [N, L] and the labels of their positions [N, L], the first of which does not count."""
    labels = text[:, ORDER - 1 :].astype(np.int64)
    labels[:, 0] = DistillConfig.ignore_index
    return np.ascontiguousarray(text[:, ORDER - 2 : -1]), labels


def _held_out(corpus: Corpus) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return positions(list(corpus.held_out.values()), HELD_OUT_POSITIONS, SEED, ORDER)


def _bits(student: StudentLogitsProvider, contexts: NDArray[np.uint8], labels: NDArray[Any]) -> float:
    total = 0.0
    for start in range(0, len(labels), 8192):
        part = slice(start, start + 8192)
        total += float(cross_entropy(student.logits_for_batch(contexts[part]), labels[part], reduction="sum"))
    return total / len(labels) / math.log(2)


def _best_rate(
    train: Callable[[Path, float, int], LogitStudent], folder: Path, size: int, tune: Batch
) -> tuple[float, LogitStudent]:
    """The rate whose student predicts the tuning positions best, and that student.

    Where ``size`` is the whole budget this student is the result, and its run stays in ``folder``.
    """
    tune_contexts = np.lib.stride_tricks.sliding_window_view(tune.input_ids, STUDENT_CONTEXT, axis=1)
    tune_contexts, tune_labels = tune_contexts.reshape(-1, STUDENT_CONTEXT), tune.labels[:, 1:].ravel()
    best: tuple[float, float, LogitStudent] | None = None
    for rate in RATES:
        trial = folder.with_name(f"{folder.name}-rate-{rate}")
        student = train(trial, rate, size)
        bits = _bits(student, tune_contexts, tune_labels)
        if best is None or bits < best[0]:
            best = bits, rate, student
            shutil.rmtree(folder, ignore_errors=True)
            trial.rename(folder)
        else:
            shutil.rmtree(trial)
    assert best is not None
    return best[1], best[2]


def _total_steps() -> int:
    steps = 0
    for budget, epochs in BUDGETS.items():
        tuning = len(RATES) * -(-min(budget, TUNE_BUDGET) // BATCH) * epochs
        full = -(-budget // BATCH) * epochs if budget > TUNE_BUDGET else 0
        steps += len(STUDENTS) * (tuning + full)
    return steps


def _own(output: Path) -> Path:
    """An empty ``output``, from which an earlier demo is removed; whatever else is there is an error."""
    if output.exists():
        strangers = [] if output.is_dir() else [output]
        if output.is_dir() and any(output.iterdir()):
            strangers = sorted(path for path in output.iterdir() if not _RESULTS.fullmatch(path.name))
            if not strangers and _report_of(output).get("demo") != "kdcore":
                strangers = [output / _REPORT]
        if strangers:
            raise ConfigError(f"{strangers[0]} is not from an earlier demo: choose another output directory")
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / _REPORT).write_text('{"demo": "kdcore", "status": "running"}\n', encoding="utf-8")
    return output


def _report_of(output: Path) -> dict[str, Any]:
    try:
        report = json.loads((output / _REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return report if isinstance(report, dict) else {}


def _table(report: dict[str, Any]) -> str:
    lines = [
        "",
        "held-out bits per byte",
        f"{'positions':>10} {'uniform':>8} {'hard':>7} {'distilled':>10} {'teacher':>8}",
    ]
    for row in report["budgets"]:
        hard, distilled = (row[name]["bits_per_byte"] for name in STUDENTS)
        lines.append(
            f"{row['positions']:>10,} {report['uniform_bits_per_byte']:>8.2f} {hard:>7.3f} {distilled:>10.3f} "
            f"{report['teacher_bits_per_byte']:>8.3f}"
        )
    return "\n".join([*lines, ""])


def _plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    budgets: Sequence[int] = [row["positions"] for row in report["budgets"]]
    for name, label, color in (("hard", "hard labels", "tab:gray"), ("distilled", "distilled", "tab:blue")):
        bits = [row[name]["bits_per_byte"] for row in report["budgets"]]
        axes.plot(budgets, bits, "o-", color=color, label=label)
        for x, y in zip(budgets, bits, strict=True):
            offset = (0, 8) if name == "hard" else (0, -14)
            axes.annotate(f"{y:.2f}", (x, y), xytext=offset, textcoords="offset points", ha="center", color=color)
    teacher = report["teacher_bits_per_byte"]
    axes.axhline(teacher, color="tab:orange", linestyle="--", label=f"teacher ({teacher:.2f})")
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{budget:,}" for budget in budgets])
    axes.minorticks_off()
    axes.margins(x=0.1, y=0.15)
    axes.set_xlabel("training positions")
    axes.set_ylabel("held-out bits per byte")
    axes.set_title("A two-byte table learns Python source: labels against a teacher")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=144)
