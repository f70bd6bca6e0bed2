"""Hypothesis strategies for KD problems with wild inputs.

Hypothesis prefers its first choices, so what must all be seen in a few dozen examples (who rules classes out, which
shapes meet) follows from the seed instead. Dtypes are best given by the test, one pair at a time.

A problem is drawn as a few decisions (shape, scale, pattern of -inf, ...) and a seed, and is then built with NumPy:
that reaches odd vocabularies and large batches of numbers that drawing element by element would not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from hypothesis import event, strategies as st

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
#: Student and teacher dtypes. Each pair costs a compilation, so mixtures are few: narrower teacher, wider teacher.
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (DTYPES[0], BFLOAT16),
    (DTYPES[1], DTYPES[0]),
    (DTYPES[0], DTYPES[1]),
]
#: The divergences of two formulas share a loop, so three pairs are enough for the formulas of each.
FORMULA_DTYPE_PAIRS = [(DTYPES[0], DTYPES[0]), (DTYPES[1], DTYPES[1]), (BFLOAT16, BFLOAT16)]

#: 1 has nothing to distil, 2 and 3 are below a vector's width, 17 and 33 have a remainder, 1025 a second block.
VOCABULARIES = [1, 2, 3, 5, 16, 17, 33, 257, 1025]
SCALES = [0.01, 0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4]
SHAPES = ["normal", "ties", "constant", "one-hot", "agree"]
SUPPORTS = ["all", "all", "all", "shared", "teacher", "student", "both"]

temperatures = st.one_of(st.sampled_from([0.05, 0.5, 1.0, 2.0, 4.0, 20.0, 100.0]), st.floats(0.05, 100.0))
alphas = st.one_of(st.sampled_from([0.0, 0.3, 1.0]), st.floats(0.0, 1.0, allow_subnormal=False))
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
    def arguments(self):
        return self.student, self.teacher, self.labels, self.temperature, self.alpha


def narrowed(x, dtype):
    """x in ``dtype``, its finite numbers kept finite."""
    largest = float(ml_dtypes.finfo(dtype).max) if dtype == BFLOAT16 else float(np.finfo(dtype).max)
    return np.where(np.isfinite(x), np.clip(x, -largest, largest), x).astype(dtype)


def _row(rng, shape, scale, V):
    x = rng.normal(size=V) * scale
    if shape == "ties":
        return np.round(rng.normal(size=V)) * scale
    if shape == "constant":
        return np.full(V, x[0])
    if shape == "one-hot":
        return np.where(np.arange(V) == rng.integers(V), scale, 0.0)
    return x


def _rule_out(rng, *rows):
    """-inf in the same classes of all ``rows``; at least one class stays."""
    V = rows[0].size
    gone = rng.random(V) < rng.choice([0.1, 0.5, 0.99])
    gone[rng.integers(V)] = False
    for row in rows:
        row[gone] = -np.inf


@st.composite
def logits_arrays(draw, dtypes=tuple(DTYPES)):
    """Logits [B, V] of one dtype."""
    rng = np.random.default_rng(draw(seeds))
    B, V = draw(st.integers(1, 4)), draw(st.sampled_from(VOCABULARIES))
    shape, scale = rng.choice(SHAPES), rng.choice(SCALES)
    x = np.stack([_row(rng, shape, scale, V) for _ in range(B)]) + rng.choice([0.0, 0.0, 1e4, -1e4])
    if rng.random() < 0.5:
        for i in range(B):
            _rule_out(rng, x[i])
    return narrowed(x, draw(st.sampled_from(dtypes)))


@st.composite
def logit_pairs(draw, dtype_pairs=tuple(DTYPE_PAIRS), supports=tuple(SUPPORTS), scales=tuple(SCALES)):
    """Student and teacher logits [B, V]; ``supports``: who may rule classes out."""
    rng = np.random.default_rng(draw(seeds))
    B, V = draw(st.integers(1, 4)), draw(st.sampled_from(VOCABULARIES))
    kinds = [(rng.choice(SHAPES), rng.choice(scales)) for _ in range(2)]
    student, teacher = (np.stack([_row(rng, shape, scale, V) for _ in range(B)]) for shape, scale in kinds)
    if kinds[1][0] == "agree":
        teacher = student + rng.choice([0.0, 1e-4, 0.1]) * rng.normal(size=teacher.shape)
    support = rng.choice(supports)
    for i in range(B):
        if support == "shared":
            _rule_out(rng, student[i], teacher[i])
        if support in ("student", "both"):
            _rule_out(rng, student[i])
        if support in ("teacher", "both"):
            _rule_out(rng, teacher[i])
    student += rng.choice([0.0, 0.0, 1e4, -1e4])
    teacher += rng.choice([0.0, 0.0, 1e4, -1e4])
    student_dtype, teacher_dtype = draw(st.sampled_from(dtype_pairs))
    event(f"support {support}")
    event(f"dtypes {student_dtype.name}, {teacher_dtype.name}")
    return narrowed(student, student_dtype), narrowed(teacher, teacher_dtype)


@st.composite
def problems(draw, dtype_pairs=tuple(DTYPE_PAIRS), supports=tuple(SUPPORTS), scales=tuple(SCALES)):
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
    labels = None
    if alpha > 0 or draw(st.booleans()):
        labels = rng.integers(V, size=B)
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0]))
        labels[rng.random(B) < 0.2] = options["ignore_index"]
    event(f"reduction {options['reduction']}")
    return Problem(student, teacher, labels, temperature, alpha, options)
