"""Cases: the five arguments of a loss under test, what is exact for them, and hand-picked ones that show known bugs.

Hand-picked cases make a verdict independent of luck: what has broken some library is among them, so that a search only
adds what nobody thought of. Every number in them is short, because they are printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcore.testing.bounds import GRADIENT, loss_bound, name_and_parameter, working_dtype
from kdcore.testing.textbook import Exact, kd_rows

__all__ = ["FIXTURES", "Case", "Judgement", "case"]

#: Unit roundoff of the types that logits come in here.
_ROUNDOFF = {"float32": 2.0**-24, "float64": 2.0**-53}


class Judgement(NamedTuple):
    """What is exact for a case, and how far a result may be from it: ``loss`` [B] and ``gradient`` [B], its 2-norm."""

    exact: Exact
    loss: Any
    gradient: Any


@dataclass(frozen=True, eq=False)
class Case:
    """The arguments of one call: student, teacher [B, V], labels [B], temperature, alpha (the weight of the CE)."""

    student: Any
    teacher: Any
    labels: Any
    temperature: float
    alpha: float
    _known: dict[Any, Judgement] = field(default_factory=dict, repr=False)

    def but(self, **changes: Any) -> Case:
        """This case with other arguments."""
        return replace(self, **changes, _known={})

    @property
    def arguments(self) -> tuple[Any, Any, Any, float, float]:
        """Fresh arrays, which the callee may spoil."""
        return self.student.copy(), self.teacher.copy(), self.labels.copy(), self.temperature, self.alpha

    @property
    def shape(self) -> tuple[int, int]:
        return self.student.shape

    def rows(self, index: Any) -> Case:
        return self.but(student=self.student[index], teacher=self.teacher[index], labels=self.labels[index])

    def judged(self, divergence: Any) -> Judgement:
        """The exact answer, and the allowed errors.

        Those are the bounds of :mod:`kdcore.testing.bounds`, widened by what it costs to round the scaled logits a
        few times, and the log-probabilities once, in the logits' own type, and sums of n numbers 4 sqrt(n) + n times,
        n as the classes that are not lost beside the largest: an implementation may divide by T before it takes the
        maximum out, may pass through a log-softmax, and may add one number after another, in chunks or in the lanes of
        a vector. Equal numbers, added one after another, are all rounded the same way, so that nothing below n
        roundings would do; nor below n / 4 of the logits' own size where ``numpy.logaddexp`` adds them up. That is
        little for a few small logits, and for logits of 1e4 it is what their last digit stands for.
        """
        key = repr(divergence)
        if key not in self._known:
            self._known[key] = self._judge(divergence)
        return self._known[key]

    def _judge(self, divergence: Any) -> Judgement:
        exact = kd_rows(self.student, self.teacher, self.labels, self.temperature, self.alpha, divergence)
        with np.errstate(all="ignore"):
            limits = exact.bounds(self.student, self.teacher, self.temperature, self.alpha, divergence)
        name = working_dtype(self.student.dtype)
        largest = _largest(self.student) + (_largest(self.teacher) if self.alpha < 1 else 0)
        n = self._added(_ROUNDOFF[name])
        digits = (4 + n / 4) * largest * max(1.0, 1 / self.temperature) + 2 * np.log(self.shape[1]) + 4 * np.sqrt(n) + n
        wider = 1 + _ROUNDOFF[name] / GRADIENT[name] * digits
        absolute = loss_bound(self.student.dtype, 0.0, temperature=self.temperature, alpha=self.alpha)
        size = np.where(np.isfinite(exact.loss), np.abs(exact.loss), 0).astype(np.float64)
        loss = limits.loss + (wider - 1) * (absolute + GRADIENT[name] * size)
        loss = loss + 4 * _ROUNDOFF[name]  # where T² is small: sums of probabilities are rounded near 1
        kind, a = name_and_parameter(divergence)
        if kind == "alpha" and self.alpha < 1:  # a sum near 1, less 1, over a (1 - a)
            loss = loss + absolute * wider / (a * (1 - a))
        return Judgement(exact, loss, limits.gradient * wider)

    def _added(self, roundoff: float) -> NDArray[np.int64]:
        """How many classes of each row [B] count in a sum; the others are together less than it is rounded by."""
        least = np.log(roundoff / self.shape[1])
        hottest = max(self.temperature, 1.0 if self.alpha > 0 else 0.0)
        counted = np.zeros(self.shape, bool)
        with np.errstate(invalid="ignore", over="ignore"):
            for logits, T in ((self.student, hottest), (self.teacher, self.temperature))[: 1 + (self.alpha < 1)]:
                counted |= logits - logits.max(axis=-1, keepdims=True) > least * T
        return counted.sum(axis=-1)

    @property
    def code(self) -> str:
        """The line that makes the arguments: ``s, t, y, T, a = ...``."""
        numbers = f"{float(self.temperature)!r}, {float(self.alpha)!r}"
        labels = f"np.array({self.labels.tolist()})" if self.labels.size <= 40 else _runs(self.labels)
        return f"s, t, y, T, a = {_code(self.student)}, {_code(self.teacher)}, {labels}, {numbers}"


def _largest(logits: Any) -> Any:
    """The largest finite magnitude of each row [B]."""
    return np.where(np.isfinite(logits), np.abs(logits), 0).max(axis=-1).astype(np.float64)


def _number(value: Any) -> str:
    if np.isnan(value):
        return "np.nan"
    return repr(float(value)) if np.isfinite(value) else ("np.inf" if value > 0 else "-np.inf")


def _runs(row: Any) -> str:
    """A long row as runs of equal numbers."""
    starts = np.flatnonzero(np.r_[True, (row[1:] != row[:-1]) & ~(np.isnan(row[1:]) & np.isnan(row[:-1]))])
    values = ", ".join(_number(value) if row.dtype.kind == "f" else str(value) for value in row[starts])
    return f"np.repeat([{values}], {np.diff(np.r_[starts, row.size]).tolist()})"


def _code(array: Any) -> str:
    """An expression for logits [B, V] that gives them bit for bit."""
    B, V = array.shape
    if B > 8 and (array == array[:1]).all():
        return f"np.repeat({_code(array[:1])}, {B}, axis=0)"
    if V > 40:
        body = "np.stack([" + ", ".join(map(_runs, array)) + "])"
        return body if array.dtype == np.float64 else f"{body}.astype(np.{array.dtype.name})"
    rows = ", ".join("[" + ", ".join(map(_number, row)) + "]" for row in array)
    return f"np.array([{rows}]{'' if array.dtype == np.float64 else f', np.{array.dtype.name}'})"


def case(student: Any, teacher: Any, labels: Any, temperature: float, alpha: float, dtype: Any = np.float64) -> Case:
    """A case from anything that makes arrays; one row may be given without its brackets."""
    s, t = (np.array(np.atleast_2d(x), dtype=dtype) for x in (student, teacher))
    return Case(s, t, np.atleast_1d(np.array(labels, np.int64)), float(temperature), float(alpha))


# --- hand-picked ----------------------------------------------------------------------------------------------------

#: Temperatures: a clamp from below, fractions that are no integers, none, and large ones.
_TEMPERATURES = (0.05, 0.5, 0.9, 1.0, 1.7, 2.0, 3.0, 4.0, 7.3, 20.0, 100.0)
#: Weights of the CE: both ends and their neighbours, and numbers that float32 does not have.
_ALPHAS = (0.0, 0.5, 1.0, 0.1, 0.7, 0.999, 0.001)
#: Widths around those of vectors, warps and blocks, powers of two, and vocabularies of language models.
_WIDTHS = (
    5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 31, 32, 33, 51, 63, 64, 65, 100, 101, 127, 128, 129, 255, 256, 257, 500, 512,
    513, 1000, 1023, 1024, 1025, 2047, 2048, 2049, 4095, 4096, 4097, 8193, 16385, 32000, 32769, 50257, 65535, 65536,
    65537, 131073, 151936,
)  # fmt: skip
_INF = np.inf


def _numbers(seed: int, B: int, V: int, scale: float, digits: int = 2) -> Any:
    """Normal numbers with few digits; which ones does not matter, but that they are the same ones always does."""
    return np.round(np.random.Generator(np.random.PCG64(seed)).normal(size=(B, V)) * scale, digits)


def _labels(seed: int, B: int, V: int) -> Any:
    return np.random.Generator(np.random.PCG64(seed)).integers(V, size=B)


def _generic(dtype: Any = np.float64, scale: float = 1.0) -> list[Case]:
    """Ordinary logits: every temperature with every alpha, few rows and many, square batches, first and last labels."""
    shapes = ((1, 4), (2, 3), (3, 3), (1, 2), (5, 2), (3, 4), (2, 9), (4, 17), (17, 4))
    found = [
        case([2, 0, -1, 0.5], [0.3, 1.7, -0.2, 2.4], 2, 3.0, 0.0, dtype),
        case([1, 0.5, -0.3, 2], [3, -0.1, 0.4, 0], 3, 4.0, 1.0, dtype),
        case([1, 0.5, -0.3, 2], [3, -0.1, 0.4, 0], 3, 4.0, 0.5, dtype),
        case([-1, -2, -3, -0.5], [1, 2, 3, 0.5], 0, 4.0, 0.0, dtype),
    ]
    number = 0
    for i, temperature in enumerate(_TEMPERATURES):
        for j, alpha in enumerate(_ALPHAS):
            if (i + j) % 2 and alpha not in (0.0, 0.5):  # half of the grid, and all of the two that show most
                continue
            number += 1
            B, V = shapes[number % len(shapes)]
            size = scale * (0.5, 1.0, 3.0)[number % 3]
            s, t = (_numbers(2 * number + k, B, V, size) for k in (0, 1))
            labels = _labels(number, B, V)
            labels[0] = (0, V - 1)[number % 2]
            found.append(case(s, t, labels, temperature, alpha, dtype))
    return found


def _special(dtype: Any = np.float64) -> list[Case]:
    """Ties, constant rows, sorted rows, agreement up to a little, rows unlike their neighbours, tiny logits."""
    ties = [[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    return [
        case(ties, [[0, 1, 1, 0, 0], [2, 2, 2, 0, 0]], [2, 4], 2.0, 0.3, dtype),
        case([[0] * 5, [3] * 5], [[0, 1, 2, 3, 4], [-1] * 5], [0, 1], 1.0, 0.3, dtype),
        case([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], 5, 1.7, 0.0, dtype),
        case([5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0.01], 0, 2.0, 0.0, dtype),
        case([1, 2, 3], [1, 2, 3], 0, 2.0, 0.5, dtype),
        case([[9, 0, 0], [0, 0, 0], [0, 0, -9]], [[0, 9, 0], [0, 0, 0], [0, 1, 2]], [1, 0, 2], 2.0, 0.5, dtype),
        case([0.01, -0.02, 0.03], [0.02, 0.01, -0.01], 1, 1.0, 0.3, dtype),
        case([[-3, -4], [3, 4], [-3, 4], [3, -4]], [[-1, -2], [-2, -1], [0, 0], [5, 1]], [0, 1, 1, 0], 1.5, 0.2, dtype),
        case([4, -4, 1], [-4, 4, 0.5], 0, 1.0, 0.0, dtype),
        case([1, 2, 3], [1, 2, 3.000001], 0, 1.0, 0.0, dtype),
        case([1, -2, 3], [2, 1, 0], 1, 2.0, 1e-6, dtype),
        case([1, -2, 3], [2, 1, 0], 1, 2.0, 1 - 1e-6, dtype),
    ]


def _rows(dtype: Any = np.float64) -> list[Case]:
    """Batches around the sizes of blocks, in which every row is different."""
    found = []
    for B in (7, 8, 10, 16, 32, 33, 64, 65, 100, 128, 129, 257, 1025):
        rows = np.arange(B)
        s = np.stack([rows % 7, rows % 5, rows % 3], axis=1)
        t = np.stack([rows % 4, rows % 9, rows % 2], axis=1)
        found.append(case(s, t, rows % 3, 2.0, 0.3, dtype))
    return found


def _wide(widths: Iterable[int] = _WIDTHS, dtype: Any = np.float64) -> list[Case]:
    """Large vocabularies in which both ends matter, and so does what lies between."""
    found = []
    for n, V in enumerate(widths):
        s, t = np.zeros((2, 1, V))
        high = np.log(V)
        s[0, 0], s[0, 1], s[0, -1], s[0, -2] = 1.0, -1.0, np.round(high - 1), 2.0
        t[0, 0], t[0, 1], t[0, -1], t[0, -2] = np.round(high - 2), 1.0, np.round(high - 1.5), -1.0
        s[0, V // 2 :] -= 0.25
        found.append(case(s, t, V - 1 if n % 2 else V // 2, (1.0, 2.0, 4.0)[n % 3], (0.0, 0.3)[n % 2], dtype))
    return found


def _confident(dtype: Any = np.float64) -> list[Case]:
    """Students that are sure of a wrong class: no clamp of a probability or of a logit may cap the loss."""
    found = []
    for size in (15.0, 22.0, 25.0, 30.0, 40.0, 60.0, 90.0, 110.0, 400.0, 760.0, 1e4):
        for alpha in (0.0, 1.0, 0.3):
            found.append(case([size, 0], [0, size], 1, 1.0, alpha, dtype))
        found.append(case([[2 * size, 0, 1], [0, 1, 2]], [[1, 2 * size, 0], [2, 1, 0]], [1, 0], 2.0, 0.0, dtype))
        found.append(case([0, 0, -size], [0, 0, 0], 2, 1.0, 0.5, dtype))
        found.append(case([0, size], [0, 0], 0, 20.0, 0.0, dtype))
    return found


def _large(dtype: Any = np.float64) -> list[Case]:
    """Logits of hundreds and thousands: nothing overflows, nothing is cut, and large gradients stay large."""
    found = []
    for size in (89.0, 120.0, 710.0, 1e3, 1e4):
        found += [
            case([size, size - 1, size - 3], [size - 2, size, size - 1], 1, 1.0, 0.3, dtype),
            case([-size, 1 - size, -3 - size], [1 - size, -size, -size], 1, 2.0, 0.3, dtype),
            case([size, 0, -size], [size - 1, size, -size], 0, 4.0, 0.3, dtype),
            case([[size, 0], [1, 2]], [[0, -size], [2, 0]], [1, 1], 1.0, 0.5, dtype),
            case([size, 0, 1], [0, size, 1], 2, 100.0, 0.0, dtype),
            case([0, 3, size / 2], [size, 0, 0], 1, 1000.0, 0.1, dtype),
            case([size, -size], [-size, size], 0, size / 4, 0.0, dtype),
            case([size, -size], [-size, size], 0, size * 2, 0.0, dtype),
        ]
    return found


def _large_and_wide(dtype: Any = np.float64) -> list[Case]:
    """Logits of a thousand in large vocabularies, which overflow without the row's own maximum taken out."""
    found = []
    for n, V in enumerate((65, 513, 4097, 131073)):
        s, t = np.zeros((2, 3, V))
        for row, place in enumerate((0, V // 2, V - 1)):
            s[row, place], t[row, place] = 1000.0, 998.0
        s[:, 1], t[:, 1] = 999.0, 1000.0
        found.append(case(s, t, [V - 1, 0, 1], (1.0, 0.5)[n % 2], 0.3, dtype))
    return found


def _wide_and_sure(dtype: Any = np.float64) -> list[Case]:
    """Large vocabularies of which a few classes count, here and there: their sums are hardly rounded, in any order."""
    found = []
    for n, V in enumerate((1024, 4097, 32001, 65537, 151936)):
        T = (1.0, 2.0)[n % 2]
        s, t = np.full((2, 1, V), -35 * T)
        places = [0, 1, V // 3, V // 2, V - 2, V - 1]
        s[0, places], t[0, places] = [1, -1, 0.5, 2, 0, 1.5], [0, 2, 1, -1, 1.5, 0.5]
        found.append(case(s, t, V - 1, T, (0.0, 0.3)[n % 2], dtype))
    return found


def _cold(dtype: Any = np.float64) -> list[Case]:
    """Temperatures near 0, which a clamp of T at 0.01 or 1e-6 would raise."""
    return [
        case([[1, 2, 3], [2, 2, 0]], [[3, 1, 0], [0, 1, 1]], [0, 1], temperature, alpha, dtype)
        for temperature in (0.02, 0.001, 1e-4, 1e-7)
        for alpha in (0.0, 0.3)
    ]


def _shared(dtype: Any = np.float64) -> list[Case]:
    return [
        case([1, -_INF, 0.5], [0, -_INF, 2], 0, 2.0, 0.0, dtype),
        case([1, -_INF, 0.5], [0, -_INF, 2], 2, 2.0, 0.3, dtype),
        case([-_INF, 1, 0.5, -_INF], [-_INF, 0, 2, -_INF], 1, 1.0, 0.5, dtype),
        case([[1, -_INF, 0], [1, 2, 0]], [[0, -_INF, 2], [0, 1, 2]], [0, 1], 3.0, 0.5, dtype),
        case([-_INF, 3, -_INF], [-_INF, -1, -_INF], 1, 2.0, 0.5, dtype),
        case([-_INF, 2, 1], [-_INF, 2, 1], 2, 4.0, 0.0, dtype),
    ]


def _teacher_rules_out(dtype: Any = np.float64) -> list[Case]:
    return [
        case([1, 2, 0.5], [0, -_INF, 2], 0, 2.0, 0.0, dtype),
        case([1, 2, 0.5], [-_INF, 1, -_INF], 1, 1.0, 0.3, dtype),
        case([[1, 2, 0], [1, 2, 0]], [[0, 1, -_INF], [0, 1, 2]], [2, 1], 4.0, 0.5, dtype),
        # -1e4 or -65504 in the place of -inf is no small number at such temperatures. alpha = 0, since another
        # convention's weights of the two terms, 1 to T², leave few digits to the smaller one.
        case([1, 2, 0.5], [0, -_INF, 2], 0, 2000.0, 0.0, dtype),
        case([1, 2, 0.5], [0, -_INF, 2], 0, 10000.0, 0.0, dtype),
    ]


def _student_rules_out(dtype: Any = np.float64) -> list[Case]:
    return [
        case([1, -_INF, 0.5], [0, 1, 2], 0, 2.0, 0.0, dtype),
        case([1, -_INF, -_INF], [0, 1, 2], 0, 1.0, 0.3, dtype),
        case([[1, -_INF, 0], [1, 2, 0]], [[0, 1, 0.5], [0, 1, 2]], [2, 1], 4.0, 0.5, dtype),
    ]


def _each_rules_out(dtype: Any = np.float64) -> list[Case]:
    return [
        case([-_INF, 0, 1], [0, -_INF, 1], 2, 2.0, 0.0, dtype),
        case([1, -_INF, 0.5], [-_INF, 1, 2], 2, 1.0, 0.3, dtype),
    ]


def _label_ruled_out(dtype: Any = np.float64) -> list[Case]:
    return [
        case([1, -_INF, 0.5], [0, -_INF, 2], 1, 2.0, 0.5, dtype),
        case([1, -_INF, 0.5], [0, 1, 2], 1, 2.0, 1.0, dtype),
        case([[-_INF, 1, 0], [2, 1, 0]], [[-_INF, 0, 1], [0, 0, 0]], [0, 0], 1.0, 0.3, dtype),
    ]


def _absent_terms(dtype: Any = np.float64) -> list[Case]:
    """An infinite term whose factor is 0: CE at alpha = 0, the divergence at alpha = 1."""
    return [
        case([1, -_INF, 0.5], [0, 1, 2], 0, 2.0, 1.0, dtype),
        case([1, -_INF, 0.5], [0, -_INF, 2], 1, 2.0, 0.0, dtype),
        case([1, 2, 0.5], [0, -_INF, 2], 1, 2.0, 1.0, dtype),
    ]


def _not_finite() -> list[Case]:
    """Rows that are no logits, beside good ones."""
    bad = ([np.nan, 0, 1], [0, _INF, 1], [-_INF, -_INF, -_INF])
    good, other = [1, 2, 0.5], [0, 1, 2]
    found = [case([good, row], [other, other], [0, 1], 2.0, 0.5) for row in bad]
    return found + [case([good, good], [other, row], [0, 1], 2.0, 0.5) for row in bad]


def _single(dtype: Any = np.float64) -> list[Case]:
    return [
        case([[1], [2]], [[3], [-4]], [0, 0], 2.0, alpha, dtype) for alpha in (0.0, 0.3, 1.0)
    ] + [case([[0]], [[1e4]], [0], 0.5, 0.5, dtype)]  # fmt: skip


def _tokens(dtype: Any = np.float64) -> list[Case]:
    """The specification's fixture: a uniform student, a teacher with 10 at one token."""
    return [
        case(np.zeros(V), 10.0 * (np.arange(V) == token), token, 4.0, 0.0, dtype)
        for V, token in ((16, 5), (16, 7), (4, 0), (32, 31))
    ]


def _mild() -> list[Case]:
    """Logits within 3, temperatures from 0.5 to 20: what a limit or a line integral can follow."""
    return [found for found in _generic() if 0.5 <= found.temperature <= 20]


#: Hand-picked cases by what they are picked for; each is made once.
FIXTURES: dict[str, Callable[[], tuple[Case, ...]]] = {
    name: cache(lambda make=make: tuple(make()))
    for name, make in {
        "ordinary": lambda: _generic() + _special(),
        "mild": _mild,
        "tiny": lambda: _generic(scale=0.05) + _special()[6:7],
        "rows": _rows,
        "wide": _wide,
        "confident": _confident,
        "large": _large,
        "large and wide": _large_and_wide,
        "cold": _cold,
        "single class": _single,
        "tokens": _tokens,
        "shared -inf": _shared,
        "teacher -inf": _teacher_rules_out,
        "student -inf": _student_rules_out,
        "each -inf": _each_rules_out,
        "label -inf": _label_ruled_out,
        "absent terms": _absent_terms,
        "not finite": _not_finite,
        "ordinary, float32": lambda: _generic(np.float32) + _special(np.float32) + _rows(np.float32)[:4],
        "wide, float32": lambda: _wide((*_WIDTHS[::3], 131073), np.float32) + _wide_and_sure(np.float32),
        "large, float32": lambda: _large(np.float32) + _confident(np.float32),
        "-inf, float32": lambda: (
            _shared(np.float32) + _teacher_rules_out(np.float32) + _student_rules_out(np.float32)
            + _each_rules_out(np.float32) + _label_ruled_out(np.float32)
        ),
    }.items()
}  # fmt: skip
