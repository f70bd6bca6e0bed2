"""A teacher that needs no model: it expects to see the last token again."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import integer
from kdcore.sequences import as_rows, pad_rows
from kdcore.teachers.base import InputIds

__all__ = ["FixtureTeacher"]

_PEAK = np.float32(10.0)


class FixtureTeacher:
    """Logit 10 at one token of each row or position, 0 elsewhere; for tests and examples.

    :meth:`logits_for_batch` puts the peak at the last input token, :meth:`logits_per_position` at the next one (the
    last position, which has no next, at its own). An empty row counts as token 0; a token outside the vocabulary
    too. Pure: equal inputs give equal outputs.

    Parameters
    ----------
    vocab_size : int
        V, at least 1.

    Examples
    --------
    >>> import kdcore
    >>> kdcore.FixtureTeacher(4).logits_for_batch([[3, 1], [2]])
    array([[ 0., 10.,  0.,  0.],
           [ 0.,  0., 10.,  0.]], dtype=float32)
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = integer(vocab_size, "vocab_size", least=1)

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        return self._vocab_size

    def logits_for_batch(self, input_ids: InputIds) -> NDArray[np.float32]:
        """Logits float32 [B, V] for B rows of integers; ShapeError or DTypeError for anything else."""
        rows = as_rows(input_ids)
        return self._peaks(np.array([row[-1] if row.size else 0 for row in rows], np.int64))

    def logits_per_position(self, input_ids: InputIds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits float32 [B, L, V] and the mask bool [B, L] of positions that exist; errors as for a batch."""
        rows = as_rows(input_ids)
        peaks, mask = pad_rows([np.append(row[1:], row[-1:]) for row in rows])
        return self._peaks(peaks), mask

    def _peaks(self, tokens: NDArray[np.int64]) -> NDArray[np.float32]:
        tokens = np.where((tokens >= 0) & (tokens < self._vocab_size), tokens, 0)
        logits: NDArray[Any] = np.zeros((*tokens.shape, self._vocab_size), np.float32)
        np.put_along_axis(logits, tokens[..., None], _PEAK, axis=-1)
        return logits
