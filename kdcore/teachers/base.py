"""What a teacher is: a vocabulary and the logits for a batch of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["InputIds", "TeacherLogitsProvider"]

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
