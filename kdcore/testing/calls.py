"""Calls of an implementation under test, which may do anything: what it does wrong becomes a sentence, not a crash."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from kdcore.testing.cases import Case
from kdcore.testing.textbook import REAL

__all__ = ["Answer", "BrokenCallError", "Calls", "adapted"]

LossAndGradient = Callable[[Any, Any, Any, float, float], Any]


class BrokenCallError(Exception):
    """The implementation raised, or what it returned is no loss [B] and gradient [B, V]; the message says what."""

    def __init__(self, what: str, kind: str) -> None:
        super().__init__(what)
        #: The same for the same defect on another case.
        self.kind = kind


class Answer(NamedTuple):
    """Loss [B] and gradient [B, V], wider than they were returned."""

    loss: Any
    gradient: Any


class Calls:
    """The implementation as falsifiers see it: fresh arrays in, checked and widened arrays out."""

    def __init__(self, function: LossAndGradient, divergence: Any) -> None:
        self.function = function
        self.divergence = divergence

    def raw(self, *arguments: Any) -> tuple[Any, Any]:
        """What a call of these very arrays returns, as arrays; no copy."""
        try:
            with warnings.catch_warnings(), np.errstate(all="ignore"):
                warnings.simplefilter("ignore")
                result = self.function(*arguments)
        except (Exception, SystemExit) as error:  # whatever the code under test raises is a finding
            name = type(error).__name__
            text = " ".join(str(error).split())
            raise BrokenCallError(f"it raised {name}: {text[:300]}" if text else f"it raised {name}", name) from error
        return self._arrays(result, arguments[0])

    @staticmethod
    def _arrays(result: Any, student: Any) -> tuple[Any, Any]:
        try:
            loss, gradient = result
        except (TypeError, ValueError):
            got = f"{type(result).__name__}{f' of {len(result)}' if isinstance(result, tuple | list) else ''}"
            raise BrokenCallError(f"it must return (loss, gradient), got {got}", "result") from None
        found = []
        for name, value, shape in (("loss", loss, student.shape[:1]), ("gradient", gradient, student.shape)):
            try:
                array = np.asarray(value)
            except Exception as error:
                raise BrokenCallError(f"the {name} is no array: {error}", "result") from error
            if array.dtype.kind != "f":
                raise BrokenCallError(f"the {name} must be of a float dtype, got {array.dtype}", f"{name} dtype")
            if array.shape != shape:
                hint = "; for the mean over a batch see kdcore.testing.adapters" if array.ndim == 0 else ""
                raise BrokenCallError(
                    f"the {name} must have the shape {shape}, got {array.shape}{hint}", f"{name} shape"
                )
            if array.dtype.itemsize < student.dtype.itemsize:
                raise BrokenCallError(f"the {name} of {student.dtype} logits is {array.dtype}", f"{name} dtype")
            found.append(array)
        return found[0], found[1]

    def __call__(self, case: Case) -> Answer:
        loss, gradient = self.raw(*case.arguments)
        return Answer(loss.astype(REAL), gradient.astype(REAL))


def adapted(case: Case, features: Iterable[str]) -> Case | None:
    """A case within what is claimed: without temperatures T = 1, without a cross-entropy alpha = 0, and so on.

    None where there is none: for a case of a size, or of a dtype, that is not claimed.
    """
    (B, V), single = case.shape, case.student.dtype == np.float32
    if (
        (B > _LARGE_BATCH and "large_batch" not in features)
        or (V == 1 and "single_class" not in features)
        or (V > _LARGE_VOCABULARY and "large_vocabulary" not in features)
        or (single and "float32" not in features)
        or ("large_logits" not in features and _magnitude(case) > _LARGE_LOGITS)
    ):
        return None
    changes: dict[str, Any] = {}
    if "temperature" not in features and case.temperature != 1:
        changes["temperature"] = 1.0
    if "cross_entropy" not in features and case.alpha != 0:
        changes["alpha"] = 0.0
    if "distillation" not in features and case.alpha != 1:
        changes["alpha"] = 1.0
    if "float64" not in features and not single:
        changes["student"], changes["teacher"] = case.student.astype(np.float32), case.teacher.astype(np.float32)
    return case.but(**changes) if changes else case


#: Beyond these a feature is needed. Shifts by a thousand are no large logits: softmax does not see them.
_LARGE_BATCH, _LARGE_VOCABULARY, _LARGE_LOGITS = 256, 300, 100.0


def _magnitude(case: Case) -> float:
    logits = np.concatenate([case.student, case.teacher])
    return float(np.abs(logits[np.isfinite(logits)]).max(initial=0.0))
