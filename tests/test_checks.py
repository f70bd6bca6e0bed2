"""Checks of scalar arguments: what passes, what each error says, at both sides of each boundary."""

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from kdcore import checks
from kdcore.errors import DomainError, DTypeError


def refused(error, sentence, function, *arguments, **options):
    with pytest.raises(error, match=f"^{re.escape(sentence)}$"):
        function(*arguments, **options)


@pytest.mark.parametrize("value", [1, 2.5, np.float32(0.5), np.int8(3), Fraction(1, 4), -math.inf])
def test_real_numbers(value):
    found = checks.real_number(value, "x", "a number")
    assert type(found) is float and found == value


@pytest.mark.parametrize("value", [True, np.bool_(False), "1", None, 1j, np.ones(1)])
def test_what_is_no_real_number(value):
    refused(DTypeError, f"x must be a number, got {value!r}", checks.real_number, value, "x", "a number")


def test_integers_beyond_float64():
    refused(
        DomainError, "x must be a number, got an integer beyond float64", checks.real_number, 10**400, "x", "a number"
    )


def test_positive_numbers():
    assert checks.positive_number(5e-324, "x") == 5e-324 and checks.positive_number(1e308, "x") == 1e308
    for value in (0, 0.0, -1, math.inf, -math.inf, math.nan):
        refused(DomainError, f"x must be a positive finite number, got {value!r}", checks.positive_number, value, "x")


def test_numbers_in_an_interval():
    ends = [({}, "[1, 2]"), ({"low_open": True}, "(1, 2]"), ({"high_open": True}, "[1, 2)")]
    for options, interval in ends:
        for value in (1, 1.5, 2):
            is_out = (value == 1 and "low_open" in options) or (value == 2 and "high_open" in options)
            if is_out:
                refused(
                    DomainError, f"x must be in {interval}, got {value}", checks.number_in, value, "x", 1, 2, **options
                )
            else:
                assert checks.number_in(value, "x", 1, 2, **options) == value
        for value in (0.999, 2.001, math.nan, math.inf):
            refused(DomainError, f"x must be in {interval}, got {value}", checks.number_in, value, "x", 1, 2, **options)
        refused(DTypeError, f"x must be a number in {interval}, got '1'", checks.number_in, "1", "x", 1, 2, **options)


def test_integers():
    for value in (-(2**63), -1, 0, 2**63 - 1, np.uint8(7)):
        found = checks.integer(value, "x")
        assert type(found) is int and found == value
    for value in (-(2**63) - 1, 2**63, np.uint64(2**63)):
        refused(DomainError, f"x must be an integer within 64 bits, got {value}", checks.integer, value, "x")
    for value in (1.0, True, np.bool_(True), "1", None):
        refused(DTypeError, f"x must be an integer, got {value!r}", checks.integer, value, "x")
    assert checks.integer(3, "x", least=3) == 3
    refused(DomainError, "x must be an integer of at least 3, got 2", checks.integer, 2, "x", least=3)
    refused(DTypeError, "x must be an integer of at least 3, got 3.0", checks.integer, 3.0, "x", least=3)


def test_flags():
    for value in (True, False, np.bool_(True), np.bool_(False)):
        assert checks.flag(value, "x") is bool(value)
    for value in (1, 0, "true", None):
        refused(DTypeError, f"x must be True or False, got {value!r}", checks.flag, value, "x")


def test_choices():
    assert checks.choice("b", "x", (name for name in "ab")) == "b"
    for value in ("c", "", None, ["a"]):
        refused(DomainError, f"x must be one of 'a', 'b', got {value!r}", checks.choice, value, "x", ("a", "b"))


def test_paths():
    assert checks.file_path("a/b", "x") == checks.file_path(Path("a/b"), "x") == Path("a/b")
    for value in (None, 3, b"a"):
        refused(DTypeError, f"x must be a path, got {value!r}", checks.file_path, value, "x")
    refused(DomainError, "x must be a path, got 'a\\x00b' with a null byte", checks.file_path, "a\0b", "x")


def test_arrays_of_integers():
    for dtype in (np.int8, np.uint16, np.int64, np.uint64):
        found = checks.as_int64(np.array([0, 5], dtype), "x")
        assert found.dtype == np.int64 and found.tolist() == [0, 5]
    kept = np.array([1, 2])
    assert checks.as_int64(kept, "x") is kept
    assert checks.as_int64(np.array([2**63 - 1], np.uint64), "x").tolist() == [2**63 - 1]
    assert checks.as_int64(np.empty((0, 3), np.uint64), "x").shape == (0, 3)
    refused(DomainError, f"x must be below 2**63, got {2**63}", checks.as_int64, np.array([0, 2**63], np.uint64), "x")
    for dtype in (float, bool, object):
        refused(
            DTypeError, f"x must be integers, got dtype {np.dtype(dtype)}", checks.as_int64, np.zeros(1, dtype), "x"
        )
