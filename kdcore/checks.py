"""Checks of scalar arguments, with the error sentences that every module shares."""

from __future__ import annotations

import math
import numbers
from typing import Any

from kdcore.errors import DomainError, DTypeError

__all__ = ["integer", "number_in", "positive_number", "real_number"]


def real_number(value: Any, name: str, expected: str) -> float:
    """``value`` as a float; booleans, strings and arrays are errors that say what was ``expected``."""
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


def number_in(value: Any, name: str, low: float, high: float, *, high_open: bool = False) -> float:
    """``value`` as a float in [low, high], or in [low, high)."""
    interval = f"[{low:g}, {high:g}{')' if high_open else ']'}"
    number = real_number(value, name, f"a number in {interval}")
    if not low <= number <= high or (high_open and number == high):
        raise DomainError(f"{name} must be in {interval}, got {value!r}")
    return number


def integer(value: Any, name: str, *, least: int | None = None) -> int:
    """``value`` as an int within int64, of at least ``least``."""
    expected = "an integer" if least is None else f"an integer of at least {least}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise DTypeError(f"{name} must be {expected}, got {value!r}")
    number = int(value)
    if least is not None and number < least:
        raise DomainError(f"{name} must be {expected}, got {number}")
    if not -(2**63) <= number < 2**63:
        raise DomainError(f"{name} must be {expected} within 64 bits, got {number}")
    return number
