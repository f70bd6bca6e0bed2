"""Ragged rows of token ids, in the one form that teachers, students and steps share."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import as_int64
from kdcore.errors import DomainError, DTypeError, NonFiniteError, ShapeError

__all__ = ["as_rows", "as_vectors", "content_key", "last_tokens", "pad_rows", "prefixes"]


def as_rows(input_ids: Any, name: str = "input_ids") -> list[NDArray[np.int64]]:
    """``input_ids`` as a list of B one-dimensional int64 arrays.

    Takes an integer array [B, L] or any sequence of sequences of integers (rows may differ in length and be empty).
    Raises :class:`DTypeError` for floats, :class:`ShapeError` for anything that is not two levels deep and
    :class:`DomainError` for an id that int64 does not hold.
    """
    if isinstance(input_ids, np.ndarray):
        if input_ids.ndim != 2:
            raise ShapeError(f"{name} must have two dimensions [rows, tokens], got shape {input_ids.shape}")
        return list(as_int64(input_ids.copy(), name))
    if not isinstance(input_ids, Iterable) or isinstance(input_ids, str | bytes):
        raise ShapeError(f"{name} must be a sequence of rows of token ids, got {type(input_ids).__name__}")
    rows = []
    for i, row in enumerate(input_ids):
        try:
            array = np.array(row)
        except ValueError:  # what NumPy says of elements that differ in length
            raise ShapeError(f"{name}[{i}] must be one row of token ids, got sequences of different lengths") from None
        if array.ndim != 1:
            raise ShapeError(f"{name}[{i}] must be one row of token ids, got shape {array.shape}")
        rows.append(as_int64(array, f"{name}[{i}]") if array.size else np.empty(0, np.int64))
    return rows


def as_vectors(values: Any, width: int, name: str = "input_ids", because: str = "") -> NDArray[np.float32]:
    """Feature vectors as float32 [N, ``width``]; no rows at all are N = 0.

    Raises :class:`ShapeError` (which ends in ``because``), :class:`DTypeError` for what is not numbers and
    :class:`NonFiniteError` for NaN, infinities and numbers beyond float32.
    """
    expected = f"{name} must be feature vectors [rows, {width}]{because}"
    try:
        array = np.asarray(values)
    except ValueError:  # what NumPy says of rows that differ in length
        raise ShapeError(f"{expected}; got rows of different widths") from None
    if array.size == 0 and array.ndim == 1:
        array = array.reshape(0, width)
    if array.dtype.kind not in "fiu":
        raise DTypeError(f"{name} must hold numbers, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[1] != width:
        raise ShapeError(f"{expected}; got shape {array.shape}")
    with np.errstate(over="ignore"):
        vectors = np.ascontiguousarray(array, np.float32)
    bad = np.argwhere(~np.isfinite(vectors))
    if bad.size:
        row, column = (int(i) for i in bad[0])
        raise NonFiniteError(f"{name}[{row}, {column}] is {array[row, column]}: features must be finite in float32")
    return vectors


def pad_rows(rows: list[NDArray[np.int64]], fill: int = 0) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Rows as one array [B, L], right-padded with ``fill``, and the mask [B, L] of what is not padding."""
    lengths = np.array([row.size for row in rows], np.int64)
    mask = np.arange(lengths.max(initial=0)) < lengths[:, None]
    padded = np.full(mask.shape, fill, np.int64)
    padded[mask] = np.concatenate(rows) if rows else np.empty(0, np.int64)
    return padded, mask


def last_tokens(input_ids: Any, n: int) -> NDArray[np.int64]:
    """The last ``n`` ids of each row, [B, n]; what a shorter row lacks before its first token counts as id 0."""
    if isinstance(input_ids, np.ndarray) and input_ids.ndim == 2:
        rows = [as_int64(input_ids, "input_ids")]  # one block, without a Python object a row
    else:
        rows = [row[None] for row in as_rows(input_ids)]
    last = np.zeros((sum(len(row) for row in rows), n), np.int64)
    for start, row in zip(np.cumsum([0, *map(len, rows)]), rows, strict=False):
        width = min(n, row.shape[1])
        last[start : start + len(row), n - width :] = row[:, row.shape[1] - width :]
    return last


def prefixes(rows: list[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    """Every non-empty prefix of every row, in order: what has been seen at each position."""
    return [row[: end + 1] for row in rows for end in range(row.size)]


def content_key(ids: Any) -> int:
    """The 64-bit key of a row of token ids: BLAKE2b of the ids as little-endian uint32, read little-endian.

    Raises :class:`DomainError` for an id outside [0, 2**32), which would otherwise share the key of another.
    """
    values = np.asarray(ids)
    if values.ndim != 1:
        raise ShapeError(f"ids must be one row of token ids, got shape {values.shape}")
    beyond_64_bits = values.dtype.kind == "O" and all(isinstance(value, int) for value in values)
    if values.size and values.dtype.kind not in "iu" and not beyond_64_bits:
        raise DTypeError(f"ids must be integers, got dtype {values.dtype}")
    if values.dtype != np.uint32:  # all of which are ids
        outside = values[(values < 0) | (values >= 1 << 32)]
        if outside.size:
            raise DomainError(f"the token id {outside[0]} is outside [0, 2**32)")
    data = values.astype("<u4", copy=False).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
