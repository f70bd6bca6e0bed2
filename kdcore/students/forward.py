"""The bond between a forward and its gradient."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import positive_number
from kdcore.errors import DTypeError, GradientOrderError, NonFiniteError, ShapeError

__all__ = ["PendingForward"]

Inputs = TypeVar("Inputs")


class PendingForward(Generic[Inputs]):
    """What the last forward saw, kept until its gradient comes.

    ``shape`` is that of the logits, ``mask`` [...] says which of their rows exist, and ``inputs`` is whatever the
    student needs to chain the gradient of those rows on.
    """

    def __init__(self, shape: tuple[int, ...], mask: NDArray[np.bool_], inputs: Inputs) -> None:
        self.shape = shape
        self.mask = mask
        self.inputs = inputs

    def rows(self, gradient: Any, denominator: float | None) -> NDArray[Any]:
        """The gradient of the existing rows [N, V], divided by ``denominator`` (by default N), in float64."""
        array = np.asarray(gradient)
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise DTypeError(f"gradient must be floating point, got dtype {array.dtype}")
        if array.shape != self.shape:
            raise ShapeError(f"gradient must have the shape of the last forward {self.shape}, got {array.shape}")
        rows = array[self.mask].astype(np.float64)
        bad = ~np.isfinite(rows)
        if bad.any():
            row, column = (int(i) for i in np.argwhere(bad)[0])
            raise NonFiniteError(f"gradient of row {row}, class {column} is {rows[row, column]}: it must be finite")
        if denominator is None:
            denominator = max(len(rows), 1)
        rows /= positive_number(denominator, "denominator")
        return rows

    @staticmethod
    def expect(pending: PendingForward[Inputs] | None) -> PendingForward[Inputs]:
        """``pending``, or the error of a gradient that has no forward."""
        if pending is None:
            raise GradientOrderError(
                "apply_kd_gradient needs a forward of its own: call logits_for_batch or logits_per_position first; "
                "each forward takes one gradient"
            )
        return pending
