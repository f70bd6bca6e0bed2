"""What a student is: a provider of logits that learns from their gradient and can be saved."""

from __future__ import annotations

from os import PathLike
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["StudentLogitsProvider"]


@runtime_checkable
class StudentLogitsProvider(Protocol):
    """A student. Inputs are token ids (ragged rows or [B, L]); B rows, L positions, V classes."""

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        ...

    def logits_for_batch(self, input_ids: Any) -> NDArray[np.floating[Any]]:
        """Logits [B, V] of the token that follows each row."""
        ...

    def logits_per_position(self, input_ids: Any) -> tuple[NDArray[np.floating[Any]], NDArray[np.bool_]]:
        """Logits [B, L, V] of the token that follows each position, and the mask [B, L] of positions that exist."""
        ...

    def apply_kd_gradient(self, gradient: NDArray[np.floating[Any]], denominator: float | None = None) -> None:
        """One optimiser step with dL/dlogits of the last forward, summed over rows and divided by ``denominator``.

        The default denominator is the number of rows of the last forward, or of its unmasked positions. A gradient
        belongs to its own forward: applying one twice or without a forward is a
        :class:`~kdcore.errors.GradientOrderError`, one in another shape a :class:`~kdcore.errors.ShapeError`.
        """
        ...

    def save_checkpoint(self, path: str | PathLike[str]) -> None:
        """Write everything that :meth:`load` needs to go on training, atomically."""
        ...

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The student that :meth:`save_checkpoint` wrote, optimiser included."""
        ...
