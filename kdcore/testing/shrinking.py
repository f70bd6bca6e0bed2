"""Smaller counterexamples: fewer rows and classes, rounder numbers, in an order that is always the same.

A case drawn from a seed means nothing to Hypothesis's own shrinker, and a hand-picked one was never drawn: this one
knows what a case is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from kdcore.testing.cases import Case

__all__ = ["shrunk"]

#: Calls of a check that one counterexample may take.
_BUDGET = 300


def shrunk(case: Case, fails: Callable[[Case], bool], budget: int = _BUDGET) -> Case:
    """The smallest case that still ``fails``, among those that a bounded number of tries reaches."""
    left = budget
    while True:
        for smaller in _smaller(case):
            if left <= 0:
                return case
            left -= 1
            if fails(smaller):
                case = smaller
                break
        else:
            return case


def _smaller(case: Case) -> Iterator[Case]:
    """Cases that are simpler in one respect, the greatest steps first."""
    B, V = case.shape
    yield from _fewer_rows(case, B)
    yield from _fewer_classes(case, V)
    for temperature in (1.0, 2.0, float(np.round(case.temperature)), float(np.round(case.temperature, 1))):
        if temperature > 0 and _simpler(temperature, case.temperature, (1.0, 2.0)):
            yield case.but(temperature=temperature)
    for alpha in (0.0, 1.0, 0.5, float(np.round(case.alpha, 1))):
        if _simpler(alpha, case.alpha, (0.0, 1.0, 0.5)):
            yield case.but(alpha=alpha)
    if case.labels.any():
        yield case.but(labels=np.zeros_like(case.labels))
    for name in ("teacher", "student"):
        for logits in _rounder(getattr(case, name)):
            yield case.but(**{name: logits})


def _simpler(new: float, old: float, best: tuple[float, ...]) -> bool:
    """Whether ``new`` comes before ``old``: earlier among the best, or with fewer digits."""
    rank = [best.index(x) if x in best else len(best) for x in (new, old)]
    return rank[0] < rank[1] or (rank[0] == rank[1] and len(repr(new)) < len(repr(old)))


def _fewer_rows(case: Case, B: int) -> Iterator[Case]:
    if B > 1:
        for i in (0, B - 1):
            if (case.student != case.student[i]).any() or (case.teacher != case.teacher[i]).any():
                yield case.rows(np.full(B, i))
        for i in sorted({0, B - 1, B // 2}) if B > 8 else range(B):
            yield case.rows(slice(i, i + 1))
        step = B // 2
        while step >= 1:
            for start in range(0, B, step) if B // step <= 16 else ():
                keep = np.r_[0:start, min(start + step, B) : B]
                if keep.size:
                    yield case.rows(keep)
            step //= 2


def _fewer_classes(case: Case, V: int) -> Iterator[Case]:
    step = V // 2
    while step >= 1 and V > 1:
        # Of a long row only the ends, the middle and what surrounds them: the rest is runs of equal numbers.
        starts = range(0, V, step) if V // step <= 16 else (0, 1, V // 2 - step, V // 2, V - step - 1, V - step)
        for start in starts:
            if 0 <= start < V:
                keep = np.r_[0:start, min(start + step, V) : V]
                if keep.size:
                    yield _kept(case, keep, start, start + step)
        step = step // 2 if V // step <= 16 or step > 4 else step - 1


def _kept(case: Case, keep: Any, start: int, stop: int) -> Case:
    """The case with the classes of ``keep`` alone; a label among those gone, [start, stop), becomes the first."""
    y = case.labels
    labels = np.where(y < start, y, np.where(y < stop, 0, y - (min(stop, case.shape[1]) - start)))
    return case.but(student=case.student[:, keep], teacher=case.teacher[:, keep], labels=labels)


def _rounder(logits: Any) -> Iterator[Any]:
    finite = np.isfinite(logits)
    if (finite & (logits != 0)).any():
        yield np.where(finite, np.zeros_like(logits), logits)
    for digits in (0, 1, 2):
        rounded = np.round(logits, digits)
        if not np.array_equal(rounded, logits):
            yield rounded
            break
    values = np.unique(logits[finite & (logits != 0)])
    if values.size <= 16:  # each number, wherever it stands
        for value in values:
            for simpler in _simpler_numbers(float(value)):
                yield np.where(logits == value, np.asarray(simpler, logits.dtype), logits)
    if logits.size <= 24:
        for index in zip(*np.nonzero(finite & (logits != 0)), strict=True):
            one = logits.copy()
            one[index] = 0
            yield one


def _simpler_numbers(value: float) -> Iterator[float]:
    """Numbers that are shorter or nearer to 0."""
    yield 0.0
    for digits in (0, 1):
        rounded = float(np.round(value, digits))
        if rounded not in (0.0, value):
            yield rounded
    if abs(value) > 1 and value == np.round(value):
        for smaller in (1.0, 10.0, 100.0, 1000.0):
            if smaller < abs(value):
                yield float(np.copysign(smaller, value))
