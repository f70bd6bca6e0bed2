"""A teacher cut down to the first classes of its vocabulary."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import integer
from kdcore.errors import VocabularyMismatchError
from kdcore.ops import logsumexp
from kdcore.sparse import SampledRows, TopKRows
from kdcore.teachers.base import InputIds, TeacherLogitsProvider, rows_teacher

__all__ = ["TruncatingTeacher"]


class TruncatingTeacher:
    """The first ``vocab_size`` logits of a teacher, cut **before** the softmax, with account of what is lost.

    For a teacher whose head is padded beyond the tokenizer (152,064 against 151,936 classes, say). It is up to the
    caller that the classes that remain mean the same tokens: equal sizes do not say so.

    Parameters
    ----------
    teacher : TeacherLogitsProvider
        Its errors pass through. It must have logits: of rows without every class nothing says how much of the tail
        would remain, and they are a :class:`~kdcore.errors.VocabularyMismatchError`.
    vocab_size : int
        V, from 1 up to the teacher's own; beyond it a :class:`~kdcore.errors.VocabularyMismatchError`.

    Examples
    --------
    >>> import kdcore
    >>> teacher = kdcore.TruncatingTeacher(kdcore.FixtureTeacher(5), 3)
    >>> teacher.logits_for_batch([[1], [4]])
    array([[ 0., 10.,  0.],
           [ 0.,  0.,  0.]], dtype=float32)
    >>> print(round(teacher.discarded_mass, 4))  # nearly all of the second row's, hardly any of the first's
    0.5
    """

    def __init__(self, teacher: TeacherLogitsProvider, vocab_size: int) -> None:
        self._teacher = teacher
        self._vocab_size = integer(vocab_size, "vocab_size", least=1)
        if self._vocab_size > teacher.vocab_size:
            raise VocabularyMismatchError(
                f"a teacher with {teacher.vocab_size} classes cannot be truncated to {self._vocab_size}"
            )
        if rows_teacher(teacher) is not None:
            raise _no_logits(f"a teacher without logits, {teacher!r},")
        self._rows = 0
        self._discarded = 0.0

    @property
    def vocab_size(self) -> int:
        """V, the number of classes that remain."""
        return self._vocab_size

    @property
    def discarded_mass(self) -> float:
        """The mean probability, at T = 1, of the classes cut off, over all rows so far."""
        return self._discarded / self._rows if self._rows else 0.0

    def state(self) -> dict[str, float]:
        """The account so far; :meth:`restore` of it goes on from there."""
        return {"rows": self._rows, "discarded": self._discarded}

    def restore(self, state: dict[str, float]) -> None:
        """Go back to a :meth:`state`."""
        self._rows, self._discarded = int(state["rows"]), float(state["discarded"])

    def logits_for_batch(self, input_ids: InputIds) -> NDArray[np.float32]:
        """The first V columns of the teacher's logits, [B, V]."""
        logits = _logits(self._teacher.logits_for_batch(input_ids))
        self._account(logits)
        return logits[..., : self._vocab_size]

    def logits_per_position(self, input_ids: InputIds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """The first V columns of the teacher's logits, [B, L, V], and its mask bool [B, L]."""
        logits, mask = self._teacher.logits_per_position(input_ids)
        logits = _logits(logits)
        self._account(logits[mask])
        return logits[..., : self._vocab_size], mask

    def _account(self, logits: NDArray[Any]) -> None:
        if logits.shape[-1] == self._vocab_size or not len(logits):
            return
        lost = logits[:, self._vocab_size :]
        supported = (lost > -np.inf).any(axis=1)  # a row that is -inf in every class has no logsumexp
        share = np.exp(logsumexp(lost[supported]) - logsumexp(logits[supported]))
        self._discarded += float(share.sum())
        self._rows += len(logits)


def _logits(answer: Any) -> NDArray[Any]:
    if isinstance(answer, TopKRows | SampledRows):
        raise _no_logits(f"a teacher that returns {type(answer).__name__}")
    logits: NDArray[Any] = answer
    return logits


def _no_logits(teacher: str) -> VocabularyMismatchError:
    return VocabularyMismatchError(
        f"{teacher} cannot be truncated: how much of the mass of what is not stored lies in the classes that remain is "
        "not known. Store the rows again, from the teacher's logits of these classes"
    )
