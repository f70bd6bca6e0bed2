"""Arrays of parameters: how they come to be, and how they come back from a checkpoint."""

from __future__ import annotations

import math
from decimal import Decimal
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import number_in, positive_number
from kdcore.errors import CheckpointError, DomainError
from kdcore.hdf5 import read_arrays

__all__ = ["FLOAT32_MAX", "check_stored", "learning_rate_in_float32", "read_student", "zeros"]

FLOAT32_MAX = float(np.finfo(np.float32).max)
_FLOAT32_LEAST = float(np.finfo(np.float32).smallest_subnormal)


def zeros(shape: tuple[int, ...], arguments: str) -> NDArray[np.float32]:
    """float32 zeros. A shape that does not fit into memory is a :class:`DomainError` that names ``arguments``."""
    size = 4 * math.prod(shape)
    try:
        if size > np.iinfo(np.intp).max:  # beyond what NumPy can address
            raise MemoryError
        return np.zeros(shape, np.float32)
    except MemoryError:
        raise DomainError(f"{arguments} would take {Decimal(size):.3g} bytes, more than there is memory for") from None


def learning_rate_in_float32(value: Any) -> float:
    """``value`` as a positive float that is neither 0 nor infinite as a float32, the type of the parameters."""
    return number_in(positive_number(value, "learning_rate"), "learning_rate", _FLOAT32_LEAST, FLOAT32_MAX)


def read_student(path: str | PathLike[str], student: str) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Arrays and metadata (of any type, until a constructor has looked) of the checkpoint of a ``student``."""
    arrays, metadata = read_arrays(path)
    if metadata.get("student") != student:
        raise CheckpointError(f"{path}: expected the checkpoint of a {student}, found {metadata.get('student')!r}")
    return arrays, dict(metadata)


def check_stored(path: str | PathLike[str], name: str, array: NDArray[Any], shape: tuple[int, ...]) -> None:
    """The array of a checkpoint must be float32 in the ``shape`` that its metadata gives the parameter."""
    if array.shape != shape or array.dtype != np.float32:
        raise CheckpointError(f"{path}: {name} must be float32 {shape}, found {array.dtype} {array.shape}")
