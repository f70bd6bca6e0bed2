"""What of an argument a kernel takes; :mod:`kdcore.cuda.kernels` says what a matrix and a vector are."""

from __future__ import annotations

from functools import cache

import numpy as np

from kdcore.cuda.memory import Number
from kdcore.cuda.plans import require_bfloat16
from kdcore.cuda.primitives import tag_of
from kdcore.cuda.streams import on_device_of

__all__ = ["check_dtypes", "divisor", "like_of", "matrix", "matrix_of", "start_of", "vector", "vector_of"]


def like_of(wide):
    """A number in the working type, which is how a kernel learns it."""
    return np.float64(0) if wide else np.float32(0)


def matrix_of(access, address):
    """An array [B, V], as kernels take it; one without elements is not given."""
    return address if access.given else 0, *access.strides, tag_of(access.dtype)


def vector_of(access, address):
    """An array [B], as kernels take it; one without elements is not given."""
    return (address, access.strides[0], tag_of(access.dtype)) if access.given else (0, 0, tag_of(access.dtype))


def matrix(array):
    return matrix_of(array.layout.access, array.address)


def vector(array):
    return vector_of(array.layout.access, array.address)


def divisor(denominator):
    """(address, number): a denominator [1], as KD kernels take it."""
    return (0, denominator.value) if type(denominator) is Number else (denominator.address, 0.0)


@cache
def _is_bfloat16(dtype):
    return dtype.name == "bfloat16"


def check_dtypes(stream, *dtypes):
    """The one of the storage types that not every device can write, for the device of a stream."""
    if any(map(_is_bfloat16, dtypes)):
        with on_device_of(stream):
            require_bfloat16()


def start_of(array):
    """The address of a contiguous array; 0 if it has no elements."""
    return array.address if array.size else 0
