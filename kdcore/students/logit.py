"""The lightweight student: its parameters are the logits themselves."""

from __future__ import annotations

from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import integer, number_in
from kdcore.errors import CheckpointError, DomainError
from kdcore.hdf5 import Metadata, write_arrays
from kdcore.sequences import as_rows, last_tokens, pad_rows
from kdcore.students.forward import PendingForward
from kdcore.students.parameters import FLOAT32_MAX, check_stored, learning_rate_in_float32, read_student, zeros

__all__ = ["LogitStudent"]

#: With more, the table of even two tokens could not be addressed; and V**context stays quick to compute.
_MAX_CONTEXT = 60


class LogitStudent:
    """Logit-space SGD: one row of V logits for every context of n tokens.

    With ``context=0`` there is a single row, broadcast over the batch. With ``context=n`` the row is chosen by the
    last n tokens, which makes the student an (n+1)-gram table; tokens before the start of a row count as token 0. An
    update is ``row -= learning_rate * sum of gradients / denominator``, for the rows of the batch alone. In logit
    space the KD loss falls with every update for an effective rate below 4 (its Hessian is at most 1/2).

    Parameters
    ----------
    vocab_size : int
        V. The table holds V**context rows of V float32 logits; one beyond memory is a DomainError.
    initial_value : float
        Every logit at the start; finite in float32.
    learning_rate : float
        Positive, in float32; may be changed between steps through the attribute of that name.
    context : int
        n, the number of tokens that choose the row.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> student = kdcore.LogitStudent(4, initial_value=1.0, learning_rate=0.1)
    >>> logits = student.logits_for_batch([[0], [3]])
    >>> student.apply_kd_gradient(np.full((2, 4), 2.0))
    >>> student.logits_for_batch([[1]])
    array([[0.8, 0.8, 0.8, 0.8]], dtype=float32)
    """

    def __init__(
        self, vocab_size: int, initial_value: float = 0.0, learning_rate: float = 0.1, *, context: int = 0
    ) -> None:
        self._vocab_size = integer(vocab_size, "vocab_size", least=1)
        self._context = integer(context, "context", least=0)
        self.learning_rate = learning_rate
        initial_value = number_in(initial_value, "initial_value", -FLOAT32_MAX, FLOAT32_MAX)
        if self._context > _MAX_CONTEXT:
            raise DomainError(f"context must be at most {_MAX_CONTEXT}, got {self._context}")
        self._table = zeros(
            (self._vocab_size**self._context, self._vocab_size),
            f"vocab_size={self._vocab_size} and context={self._context}",
        )
        if initial_value != 0:
            self._table += np.float32(initial_value)
        self._pending: PendingForward[NDArray[np.int64]] | None = None

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        return self._vocab_size

    @property
    def context(self) -> int:
        """n, the number of tokens that choose a row."""
        return self._context

    @property
    def learning_rate(self) -> float:
        """The rate of the next update; a :class:`DomainError` unless positive and finite in float32."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = learning_rate_in_float32(value)

    def logits_for_batch(self, input_ids: Any) -> NDArray[np.float32]:
        """Logits float32 [B, V] of the token that follows each of B rows of integers, ragged or not.

        Raises ShapeError and DTypeError for other rows, DomainError for a token outside [0, V) among the last n.
        """
        tokens = last_tokens(input_ids, self._context)
        index = self._row_index(tokens)
        logits = self._table[index]
        self._pending = PendingForward(logits.shape, np.ones(len(index), bool), index)
        return logits

    def logits_per_position(self, input_ids: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits float32 [B, L, V] and the mask bool [B, L] of positions that exist; the other logits mean nothing.

        Errors as for :meth:`logits_for_batch`.
        """
        padded, mask = pad_rows(as_rows(input_ids))
        history = np.pad(padded, ((0, 0), (max(self._context - 1, 0), 0)))
        length = padded.shape[1]
        tokens = np.empty((*padded.shape, self._context), np.int64)
        for k in range(self._context):
            tokens[..., k] = history[:, k : k + length]
        index = self._row_index(tokens)
        logits = self._table[index]
        self._pending = PendingForward(logits.shape, mask, index[mask])
        return logits, mask

    def apply_kd_gradient(self, gradient: NDArray[Any], denominator: float | None = None) -> None:
        """Update by dL/dlogits, floats in the shape of the last forward, over ``denominator`` (by default its rows).

        Raises GradientOrderError, ShapeError, DTypeError, NonFiniteError and DomainError (denominator); the student
        is then as it was.
        """
        pending = PendingForward.expect(self._pending)
        rows = pending.rows(gradient, denominator)
        self._pending = None
        if not len(rows):
            return
        # Rows of the same context are added up before the table is touched, so that each counts.
        order = np.argsort(pending.inputs, kind="stable")
        contexts, starts = np.unique(pending.inputs[order], return_index=True)
        total = np.add.reduceat(rows[order], starts, axis=0)
        self._table[contexts] -= (self._learning_rate * total).astype(np.float32)

    def save_checkpoint(self, path: str | PathLike[str]) -> None:
        """Write table, context and rate to an HDF5 file, which appears whole or not at all."""
        metadata: Metadata = {
            "student": "LogitStudent",
            "vocab_size": self._vocab_size,
            "context": self._context,
            "learning_rate": self._learning_rate,
        }
        write_arrays(path, {"table": self._table}, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The student that :meth:`save_checkpoint` wrote; a :class:`CheckpointError` if ``path`` is no such file."""
        arrays, metadata = read_student(path, "LogitStudent")
        try:
            student = cls(metadata["vocab_size"], 0.0, metadata["learning_rate"], context=metadata["context"])
            table = arrays["table"]
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not the checkpoint of a LogitStudent: {error}") from error
        check_stored(path, "table", table, student._table.shape)
        student._table = table
        return student

    def _row_index(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        """The table row of contexts [..., n]."""
        outside = (tokens < 0) | (tokens >= self._vocab_size)
        if outside.any():
            raise DomainError(f"token {tokens[outside][0]} is outside the student's vocabulary [0, {self._vocab_size})")
        index = np.zeros(tokens.shape[:-1], np.int64)
        for k in range(self._context):
            index = index * self._vocab_size + tokens[..., k]
        return index
