"""What a teacher is: a vocabulary, and for a batch of token ids its logits, or rows that do not have every class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcore.errors import ShapeError
from kdcore.sparse import SampledRows, TopKRows

__all__ = ["InputIds", "TeacherLogitsProvider", "TeacherRowsProvider"]  # the functions are for steps and the pipeline

#: B rows of token ids, ragged or not: a sequence of sequences of integers, or an integer array [B, L].
InputIds = Sequence[Sequence[int]] | NDArray[Any]


@runtime_checkable
class TeacherLogitsProvider(Protocol):
    """Teacher logits by token ids. B rows, L positions (of the longest row), V classes."""

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        ...

    def logits_for_batch(self, input_ids: InputIds) -> NDArray[np.float32]:
        """Logits [B, V] of the token that follows each row."""
        ...

    def logits_per_position(self, input_ids: InputIds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits [B, L, V] of the token that follows each position, and the mask [B, L] of positions that exist."""
        ...


@runtime_checkable
class TeacherRowsProvider(TeacherLogitsProvider, Protocol):
    """A teacher that may have rows without every class, at some temperatures, instead of logits.

    :func:`kdcore.kd_step` and :class:`kdcore.Pipeline` then ask for its rows, at their own temperature, and not for its
    logits. :class:`kdcore.HDF5Teacher` is one.
    """

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """The temperatures that rows can be read at; None for a teacher of logits, which serve any."""
        ...

    def rows_for_batch(self, input_ids: InputIds, temperature: float) -> TopKRows | SampledRows:
        """The rows [B] of the token that follows each row of ``input_ids``."""
        ...

    def rows_per_position(
        self, input_ids: InputIds, temperature: float
    ) -> tuple[TopKRows | SampledRows, NDArray[np.bool_]]:
        """The rows of all positions that exist, in order, and the mask [B, L] of these."""
        ...


def rows_teacher(teacher: TeacherLogitsProvider) -> TeacherRowsProvider | None:
    """The teacher, if it is one that has rows instead of logits."""
    return teacher if isinstance(teacher, TeacherRowsProvider) and teacher.temperatures is not None else None


def answers_for_batch(teacher: TeacherLogitsProvider, input_ids: InputIds, temperature: float) -> Any:
    """What a teacher has to say of the token that follows each row: logits [B, V], or rows [B] at ``temperature``."""
    sparse = rows_teacher(teacher)
    return teacher.logits_for_batch(input_ids) if sparse is None else sparse.rows_for_batch(input_ids, temperature)


def answers_per_position(
    teacher: TeacherLogitsProvider, input_ids: InputIds, temperature: float
) -> tuple[Any, NDArray[np.bool_]]:
    """As :func:`answers_for_batch` at every position: logits [B, L, V] or rows [B, L], and the mask [B, L].

    Where no position exists stands some other position's row.
    """
    sparse = rows_teacher(teacher)
    if sparse is None:
        return teacher.logits_per_position(input_ids)
    rows, mask = sparse.rows_per_position(input_ids, temperature)
    mask = np.asarray(mask, bool)
    if rows.shape != (mask.sum(),):
        raise ShapeError(
            f"the teacher must return a row for each of {mask.sum()} positions, got the shape {rows.shape}"
        )
    return rows[np.maximum(np.cumsum(mask).reshape(mask.shape) - 1, 0)], mask
