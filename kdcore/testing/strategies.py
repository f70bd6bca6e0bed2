"""Hypothesis strategies for KD problems with wild inputs: for tests of one's own.

Needs Hypothesis (``pip install kdcore[testing]``).

A problem is drawn as a few decisions (shape, scale, pattern of -inf, ...) and a seed, and is then built with NumPy:
that reaches odd vocabularies and large batches of numbers that drawing element by element would not. Hypothesis prefers
its first choices, so what must all be seen in a few dozen examples (who rules classes out, which shapes meet) follows
from the seed instead.

>>> from hypothesis import given
>>> from kdcore.testing import strategies
>>> @given(strategies.logit_pairs(), strategies.temperatures)
... def test_my_softmax_loss(logits, temperature):
...     student, teacher = logits  # [B, V] each, -inf among them
...     assert student.shape == teacher.shape
>>> test_my_softmax_loss()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kdcore.errors import MissingDependencyError
from kdcore.testing.cases import Case

try:
    from hypothesis import event, strategies as st
except ImportError as error:
    raise MissingDependencyError("kdcore.testing.strategies needs Hypothesis: pip install kdcore[testing]") from error

__all__ = [
    "DTYPES",
    "SCALES",
    "SHAPES",
    "SUPPORTS",
    "VOCABULARIES",
    "Problem",
    "alphas",
    "cases",
    "labels",
    "logit_pairs",
    "logits_arrays",
    "masks",
    "narrowed",
    "problems",
    "row",
    "rule_out",
    "seeds",
    "shares",
    "temperatures",
]

#: The dtypes that are drawn unless the caller gives others, bfloat16 (of ml_dtypes) for one.
DTYPES = (np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16))
#: 1 has nothing to distil, 2 and 3 are below a vector's width, 17 and 33 have a remainder, 1025 a second block.
VOCABULARIES = (1, 2, 3, 5, 16, 17, 33, 257, 1025)
#: Sizes of logits.
SCALES = (0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
#: Patterns of a row.
SHAPES = ("normal", "ties", "constant", "one-hot", "agree")
#: Who rules classes out by -inf: both the same ones ("shared"), one of the two, both on their own, or nobody ("all").
SUPPORTS = ("all", "all", "all", "shared", "teacher", "student", "both")

#: T from 0.05 to 100.
temperatures = st.one_of(st.sampled_from([0.05, 0.5, 1.0, 2.0, 4.0, 20.0, 100.0]), st.floats(0.05, 100.0))
#: Weights in [0, 1], both ends included.
alphas = st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0.0, 1.0, allow_subnormal=False))
#: Of generators.
seeds = st.integers(0, 2**32 - 1)
#: Parameters of divergences, of which the float32 nearest to 0.999 leaves only three digits of 1 - 0.999.
shares = st.one_of(st.sampled_from([0.1, 0.5, 0.9, 0.001, 0.999]), st.floats(0.001, 0.999))


class Problem(NamedTuple):
    """Arguments of a KD call: student, teacher [B, V], labels [B] (or None), temperature, alpha, and keywords."""

    student: Any
    teacher: Any
    labels: Any
    temperature: float
    alpha: float
    options: dict[str, Any]

    @property
    def arguments(self) -> tuple[Any, Any, Any, float, float]:
        return self.student, self.teacher, self.labels, self.temperature, self.alpha


def narrowed(x: Any, dtype: Any) -> Any:
    """x in ``dtype``, its finite numbers kept finite."""
    largest = np.finfo(np.float32).max if dtype.kind != "f" else np.finfo(dtype).max
    if dtype.kind != "f":  # bfloat16, whose largest number NumPy does not know
        largest = np.array(largest).view(np.uint32) & np.uint32(0xFFFF0000)
        largest = largest.view(np.float32)
    return np.where(np.isfinite(x), np.clip(x, -float(largest), float(largest)), x).astype(dtype)


def row(rng: np.random.Generator, shape: str, scale: float, V: int) -> Any:
    """Logits [V] of one pattern of :data:`SHAPES`."""
    x = rng.normal(size=V) * scale
    if shape == "ties":
        return np.round(rng.normal(size=V)) * scale
    if shape == "constant":
        return np.full(V, x[0])
    if shape == "one-hot":
        return np.where(np.arange(V) == rng.integers(V), scale, 0.0)
    return x


def rule_out(rng: np.random.Generator, *rows: Any) -> None:
    """-inf in the same classes of all ``rows``; at least one class stays."""
    V = rows[0].size
    gone = rng.random(V) < rng.choice([0.1, 0.5, 0.99])
    gone[rng.integers(V)] = False
    for row in rows:
        row[gone] = -np.inf


@st.composite
def logits_arrays(draw: Any, dtypes: Sequence[Any] = DTYPES) -> Any:
    """Logits [B, V] of one dtype."""
    rng = np.random.default_rng(draw(seeds))
    B, V = draw(st.integers(1, 4)), draw(st.sampled_from(VOCABULARIES))
    shape, scale = rng.choice(SHAPES), rng.choice(SCALES)
    x = np.stack([row(rng, shape, scale, V) for _ in range(B)]) + rng.choice([0.0, 0.0, 1e4, -1e4])
    if rng.random() < 0.5:
        for i in range(B):
            rule_out(rng, x[i])
    return narrowed(x, draw(st.sampled_from(dtypes)))


def _pair(rng: np.random.Generator, B: int, V: int, supports: Sequence[str], scales: Sequence[float]) -> Any:
    """Student and teacher logits [B, V] in float64, and who rules classes out."""
    kinds = [(rng.choice(SHAPES), rng.choice(scales)) for _ in range(2)]
    student, teacher = (np.stack([row(rng, shape, scale, V) for _ in range(B)]) for shape, scale in kinds)
    if kinds[1][0] == "agree":
        teacher = student + rng.choice([0.0, 1e-4, 0.1]) * rng.normal(size=teacher.shape)
    support = rng.choice(supports)
    for i in range(B):
        if support == "shared":
            rule_out(rng, student[i], teacher[i])
        if support in ("student", "both"):
            rule_out(rng, student[i])
        if support in ("teacher", "both"):
            rule_out(rng, teacher[i])
    return student, teacher, support


@st.composite
def logit_pairs(
    draw: Any,
    dtype_pairs: Sequence[tuple[Any, Any]] = tuple((dtype, dtype) for dtype in DTYPES),
    supports: Sequence[str] = SUPPORTS,
    scales: Sequence[float] = SCALES,
) -> Any:
    """Student and teacher logits [B, V]; ``supports``: who may rule classes out."""
    rng = np.random.default_rng(draw(seeds))
    B, V = draw(st.integers(1, 4)), draw(st.sampled_from(VOCABULARIES))
    student, teacher, support = _pair(rng, B, V, supports, scales)
    student += rng.choice([0.0, 0.0, 1e4, -1e4])
    teacher += rng.choice([0.0, 0.0, 1e4, -1e4])
    student_dtype, teacher_dtype = draw(st.sampled_from(dtype_pairs))
    event(f"support {support}")
    event(f"dtypes {student_dtype.name}, {teacher_dtype.name}")
    return narrowed(student, student_dtype), narrowed(teacher, teacher_dtype)


@st.composite
def labels(draw: Any, rows: int, classes: int, ignore_index: int | None = None) -> Any:
    """Labels [B] in [0, V); with ``ignore_index`` some rows, or all, have that instead."""
    rng = np.random.default_rng(draw(seeds))
    found = rng.integers(classes, size=rows)
    if ignore_index is not None:
        found[draw(masks(rows))] = ignore_index
    return found


@st.composite
def masks(draw: Any, rows: int) -> Any:
    """Which rows [B] are masked: none, some, all."""
    rng = np.random.default_rng(draw(seeds))
    return rng.random(rows) < draw(st.sampled_from([0.2, 0.0, 0.8, 1.0]))


@st.composite
def problems(
    draw: Any,
    dtype_pairs: Sequence[tuple[Any, Any]] = tuple((dtype, dtype) for dtype in DTYPES),
    supports: Sequence[str] = SUPPORTS,
    scales: Sequence[float] = SCALES,
) -> Any:
    """A whole KD call: logits, labels with masked rows, weights with zeros, reductions, denominators, temperatures."""
    student, teacher = draw(logit_pairs(dtype_pairs, supports, scales))
    rng = np.random.default_rng(draw(seeds))
    B, V = student.shape
    temperature, alpha = draw(temperatures), draw(alphas)
    options: dict[str, Any] = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(st.booleans()):
        options["teacher_temperature"] = draw(temperatures)
    if draw(st.booleans()):
        options["scale_t2"] = draw(st.booleans())
    if draw(st.booleans()):
        options["weights"] = np.where(rng.random(B) < 0.3, 0.0, rng.uniform(0.01, 10.0, B))
    if options["reduction"] == "mean" and draw(st.booleans()):
        options["denominator"] = draw(st.floats(0.5, 100.0))  # float16 gradients stay finite
    classes = None
    if alpha > 0 or draw(st.booleans()):
        classes = rng.integers(V, size=B)
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0]))
        classes[rng.random(B) < 0.2] = options["ignore_index"]
    event(f"reduction {options['reduction']}")
    return Problem(student, teacher, classes, temperature, alpha, options)


@st.composite
def cases(
    draw: Any,
    *,
    dtype: str = "float64",
    rows: tuple[int, int] = (1, 4),
    vocabularies: Sequence[int] = (2, 3, 5, 17, 65, 130),
    scales: Sequence[float] = (0.1, 1.0, 3.0, 10.0),
    temperatures: tuple[float, float] = (0.1, 100.0),
    alphas: Sequence[float] | None = None,
    supports: Sequence[str] = ("all",),
    offsets: Sequence[float] = (0.0,),
) -> Any:
    """A :class:`~kdcore.testing.Case`: the five arguments of a loss under test.

    Parameters
    ----------
    dtype : str
        Of both logits.
    rows, temperatures : pair
        The least and the largest B and T. Temperatures are drawn evenly by their logarithm.
    vocabularies, scales, offsets : sequence
        V, the size of logits, and what is added to a row of them.
    alphas : sequence, optional
        Weights of the cross-entropy; by default all of [0, 1].
    supports : sequence
        Who may rule classes out, of :data:`SUPPORTS`.
    """
    rng = np.random.default_rng(draw(seeds))
    B, V = draw(st.integers(*rows)), draw(st.sampled_from(vocabularies))
    student, teacher, _ = _pair(rng, B, V, supports, scales)
    student += rng.choice(offsets, size=(B, 1))
    teacher += rng.choice(offsets, size=(B, 1))
    low, high = np.log(temperatures)
    temperature = float(rng.choice([1.0, 2.0, np.exp(rng.uniform(low, high))]))
    if alphas is None:
        alpha = float(rng.choice([0.0, 0.5, rng.random(), 1.0], p=[0.3, 0.2, 0.4, 0.1]))
    else:
        alpha = draw(st.sampled_from(alphas))
    logits = np.dtype(dtype)
    return Case(student.astype(logits), teacher.astype(logits), rng.integers(V, size=B), temperature, alpha)
