"""Checks of scalar arguments, with the error sentences that every module shares; and one of layouts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Sequence
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.errors import DomainError, DTypeError

__all__ = [
    "are_one",
    "as_int64",
    "choice",
    "file_path",
    "flag",
    "integer",
    "number_in",
    "positive_number",
    "real_number",
]


def real_number(value: Any, name: str, expected: str) -> float:
    """``value`` as a float; booleans, strings and arrays are errors that say what was ``expected``."""
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise DTypeError(f"{name} must be {expected}, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        raise DomainError(f"{name} must be {expected}, got an integer beyond float64") from None


def positive_number(value: Any, name: str) -> float:
    """``value`` as a positive finite float."""
    number = real_number(value, name, "a positive finite number")
    if not 0 < number < math.inf:
        raise DomainError(f"{name} must be a positive finite number, got {value!r}")
    return number


def number_in(
    value: Any, name: str, low: float, high: float, *, low_open: bool = False, high_open: bool = False
) -> float:
    """``value`` as a float in [low, high], or in the interval without an end that is open."""
    interval = f"{'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    number = real_number(value, name, f"a number in {interval}")
    if not low <= number <= high or (low_open and number == low) or (high_open and number == high):
        raise DomainError(f"{name} must be in {interval}, got {value!r}")
    return number


def integer(value: Any, name: str, *, least: int | None = None) -> int:
    """``value`` as an int within int64, of at least ``least``."""
    expected = "an integer" if least is None else f"an integer of at least {least}"
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
        raise DTypeError(f"{name} must be {expected}, got {value!r}")
    number = int(value)
    if least is not None and number < least:
        raise DomainError(f"{name} must be {expected}, got {number}")
    if not -(2**63) <= number < 2**63:
        raise DomainError(f"{name} must be {expected} within 64 bits, got {number}")
    return number


def flag(value: Any, name: str) -> bool:
    """``value`` as a bool; a string or a number is an error, whatever it means elsewhere."""
    if not isinstance(value, bool | np.bool_):
        raise DTypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(value: Any, name: str, choices: Iterable[str]) -> str:
    """``value``, which must be one of ``choices``."""
    known = tuple(choices)
    if not isinstance(value, str) or value not in known:
        raise DomainError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def file_path(value: Any, name: str) -> Path:
    """``value`` as a path."""
    if not isinstance(value, str | PathLike):
        raise DTypeError(f"{name} must be a path, got {value!r}")
    if "\0" in str(value):
        raise DomainError(f"{name} must be a path, got {value!r} with a null byte")
    return Path(value)


def as_int64(array: NDArray[Any], name: str) -> NDArray[np.int64]:
    """An integer array as int64; what does not fit is an error, not a negative number."""
    if array.dtype.kind not in "iu":
        raise DTypeError(f"{name} must be integers, got dtype {array.dtype}")
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise DomainError(f"{name} must be below 2**63, got {array.max()}")
    return array.astype(np.int64, copy=False)


def are_one(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether dimensions, none of them empty, can be one without a copy: each steps over the whole of the next."""
    dims = [(n, stride) for n, stride in zip(shape, strides, strict=True) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(dims))
