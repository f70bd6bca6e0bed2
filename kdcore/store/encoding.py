"""Between the numbers of rows and the columns that a shard stores."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.cpu.stored import pack_ids, unpack_ids
from kdcore.errors import DomainError, DTypeError, NonFiniteError, ShapeError
from kdcore.hdf5 import widen_logit_rows
from kdcore.store.schema import Header

__all__ = ["as_head", "encode_ids", "encode_values", "float32_of", "head_fingerprint", "ids_of", "values_of"]

#: Rows of an output layer that are looked at a time.
_ROWS = 8192


def encode_values(values: NDArray[np.float32], value_dtype: str, name: str) -> NDArray[Any]:
    """float32 [B, ...] as stored. A finite value that would become infinite is an error, in terms of ``name``."""
    if value_dtype == "float32":
        return values
    if value_dtype == "bfloat16":  # the upper half, rounded to nearest even
        bits = values.view(np.uint32)
        stored = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
        infinite = (stored & 0x7FFF) == 0x7F80
    else:
        with np.errstate(over="ignore"):
            stored = values.astype(np.float16)
        infinite = np.isinf(stored)
    lost = np.argwhere(infinite & np.isfinite(values))
    if lost.size:
        at = tuple(lost[0])
        raise DomainError(
            f"{name}[{at[0]}] has the value {values[at]}, which {value_dtype} cannot hold: "
            "value_dtype='float32' (or 'bfloat16') can"
        )
    return stored


def float32_of(stored: NDArray[Any]) -> NDArray[np.float32]:
    """Stored values as float32."""
    return widen_logit_rows(stored).astype(np.float32, copy=False)


def encode_ids(ids: NDArray[np.int32], header: Header) -> NDArray[Any]:
    """Classes int32 [B, k] as stored."""
    if header.index_encoding == "packed":
        return pack_ids(ids, header.index_bits)
    return ids.astype(np.uint16 if header.index_encoding == "uint16" else np.uint32)


def ids_of(stored: NDArray[Any], header: Header, slot: int) -> NDArray[np.int32]:
    """Classes int32 [B, k] of the temperature in place ``slot`` (0 where there is one column for all)."""
    if header.index_encoding == "packed":
        width = (header.k * header.index_bits + 7) // 8
        part = stored[:, slot * width : (slot + 1) * width]
        return unpack_ids(np.ascontiguousarray(part), header.k, header.index_bits)
    part = stored[:, slot * header.k : (slot + 1) * header.k]
    if part.dtype == np.uint32 and part.size and part.max() >= 1 << 31:
        # Beyond int32: an id that no vocabulary has, and that the check of rows will name.
        return np.where(part >= 1 << 31, -1, part).astype(np.int32)
    return part.astype(np.int32)


def values_of(stored: NDArray[Any], header: Header, slot: int) -> NDArray[Any]:
    """Contiguous stored values [B, k] of the temperature in place ``slot``."""
    return np.ascontiguousarray(stored[:, slot * header.k : (slot + 1) * header.k])


def head_fingerprint(head: NDArray[Any]) -> str:
    """SHA-256 of an output layer [V, d]: its dtype, its shape, its bytes."""
    array = np.ascontiguousarray(head)
    digest = hashlib.sha256(f"{array.dtype.name} {array.shape}".encode())
    digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def as_head(head: Any, vocab_size: int) -> NDArray[Any]:
    """An output layer [V, d] of floats."""
    if head is None:
        raise DomainError("kind='hidden' needs head, the output layer [V, d] that makes logits of hidden states")
    array = np.asarray(head)
    if array.dtype.name not in ("float16", "float32", "float64", "bfloat16"):
        raise DTypeError(f"head must be floats, got dtype {array.dtype}")
    if array.ndim != 2 or array.shape[0] != vocab_size or array.shape[1] == 0:
        raise ShapeError(f"head must have the shape [{vocab_size}, d], got {array.shape}")
    for start in range(0, vocab_size, _ROWS):
        with np.errstate(over="ignore"):
            bad = np.argwhere(~np.isfinite(array[start : start + _ROWS].astype(np.float32)))
        if bad.size:
            row, column = start + bad[0, 0], bad[0, 1]
            raise NonFiniteError(f"head[{row}, {column}] is {array[row, column]}: it must be finite in float32")
    return array
