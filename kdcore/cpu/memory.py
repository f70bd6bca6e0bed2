"""Arrays of the CPU engine. :mod:`kdcore.cuda.memory` has the same functions for device arrays."""

from __future__ import annotations

import math

import numpy as np

from kdcore.checks import are_one
from kdcore.errors import DTypeError, ShapeError

__all__ = ["as_array", "empty", "full", "is_writable", "overlapping", "rows_of", "same", "to_host"]


def as_array(obj):
    """``obj`` as a NumPy array, without a copy where it is one."""
    if type(obj) is np.ndarray:
        return _native(obj)
    if isinstance(obj, np.ma.MaskedArray):
        raise DTypeError("masked arrays are not supported, since their mask would be lost: use weights or -inf")
    try:
        array = np.asarray(obj)
    except ValueError as error:
        raise ShapeError(f"expected an array, got a ragged {type(obj).__name__}: {error}") from error
    except TypeError as error:
        raise DTypeError(f"expected an array, got {type(obj).__name__}: {error}") from error
    return _native(array)


def _native(array):
    if not array.dtype.isnative:
        raise DTypeError(f"arrays must be in native byte order, got dtype {array.dtype.str}")
    return array


def rows_of(arrays):
    """Views [B, V] of arrays [..., V]; None, if the leading dimensions of one cannot be merged without a copy."""
    if not all([_mergeable(array) for array in arrays]):
        return None
    return [
        array if array.ndim == 2 else array.reshape((math.prod(array.shape[:-1]), array.shape[-1])) for array in arrays
    ]


def _mergeable(array):
    if array.ndim <= 2 or array.flags.c_contiguous:
        return True
    return array.size == 0 or are_one(array.shape[:-1], array.strides[:-1])


def is_writable(obj):
    """Whether an array may be written."""
    return as_array(obj).flags.writeable


def empty(shape, dtype, threads):
    """An uninitialised array."""
    return np.empty(shape, dtype)


def full(shape, dtype, value, threads):
    """An array filled with ``value``."""
    if value == 0:
        return np.zeros(shape, dtype)
    array = np.empty(shape, dtype)
    array[...] = value  # a third of the time of np.full
    return array


def to_host(array):
    """The array itself: it is on the host."""
    return array


def same(a, b):
    """Whether two arrays are the same elements in the same order."""
    return (a.ctypes.data, a.shape, a.strides, a.dtype) == (b.ctypes.data, b.shape, b.strides, b.dtype)


def overlapping(array, others):
    """Which of other arrays, by their place, share an element with an array. None shares none."""
    return [k for k, other in enumerate(others) if other is not None and np.shares_memory(array, other)]
