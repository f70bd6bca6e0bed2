"""Arrays of the CUDA engine: :class:`DeviceArray`. :mod:`kdcore.cpu.memory` has the same functions for NumPy arrays.

bfloat16 is the dtype of ``ml_dtypes`` here. Importing this module imports neither numba.cuda nor ml_dtypes.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from kdcore.cuda.libraries import Description, library_of
from kdcore.cuda.presence import owns
from kdcore.errors import DTypeError, ShapeError

__all__ = [
    "DeviceArray",
    "as_array",
    "as_rows",
    "empty",
    "full",
    "hand_over",
    "is_writable",
    "nothing",
    "overlaps",
    "same",
    "scratch",
    "to_device",
    "to_host",
]


class DeviceArray:
    """What the engine knows of an array on a device: where it is, its shape and its dtype; and whose it is.

    ``address`` and ``strides`` are in bytes, ``owner`` is the array of the caller or of the caller's library.
    """

    __slots__ = ("address", "device", "dtype", "export", "owner", "shape", "stream", "strides", "whole", "writable")

    def __init__(self, description: Description, owner: Any) -> None:
        self.address, self.shape, self.strides, self.dtype, self.writable, self.device, self.stream, self.export = (
            description  # the export, if there is one, keeps the memory as long as it is
        )
        self.owner = owner
        #: Where the owner is, of which this may be a view.
        self.whole = description[:3]

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """For libraries that are to work on it on a stream that they are told; bfloat16 as its bits."""
        kind = "<u2" if self.dtype.name == "bfloat16" else self.dtype.str
        place = {"data": (self.address, not self.writable), "shape": self.shape, "strides": self.strides}
        return {**place, "typestr": kind, "version": 3}

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def _view(self, address: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> DeviceArray:
        view = DeviceArray.__new__(DeviceArray)
        view.address, view.shape, view.strides, view.dtype = address, shape, strides, self.dtype
        view.writable, view.device, view.stream, view.export = self.writable, self.device, self.stream, self.export
        view.owner, view.whole = self.owner, self.whole
        return view

    def __getitem__(self, key: Any) -> DeviceArray:
        """A view, by integers and slices of the first dimensions."""
        if type(key) is int and 0 <= key < self.shape[0]:  # what each call does some times
            return self._view(self.address + key * self.strides[0], self.shape[1:], self.strides[1:])
        offset, shape, strides = 0, [], []
        keys = key if isinstance(key, tuple) else (key,)
        for k, n, stride in zip(keys, self.shape, self.strides, strict=False):
            if isinstance(k, slice):
                places = range(n)[k]
                shape.append(len(places))
                strides.append(stride * places.step)
                offset += stride * places.start if places else 0
            else:
                offset += stride * range(n)[k]
        rest = len(keys)
        return self._view(self.address + offset, (*shape, *self.shape[rest:]), (*strides, *self.strides[rest:]))

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view in another shape, of dimensions that can be merged without a copy."""
        wanted = shape[0] if len(shape) == 1 and isinstance(shape[0], tuple) else shape
        if wanted == (-1,):
            if len(self.shape) == 1:
                return self
            wanted = (self.size,)
        step = _common_step(self)
        if step is None:
            raise ShapeError(f"expected contiguous elements, got shape {self.shape} with strides {self.strides}")
        strides = [step] * len(wanted)
        for k in range(len(wanted) - 2, -1, -1):
            strides[k] = strides[k + 1] * wanted[k + 1]
        return self._view(self.address, tuple(wanted), tuple(strides))


def _common_step(array: DeviceArray) -> int | None:
    """The distance of an array's elements, if it is the same everywhere."""
    dims = [(n, stride) for n, stride in zip(array.shape, array.strides, strict=True) if n != 1]
    if array.size == 0 or not dims:
        return int(array.dtype.itemsize)
    for (_, outer), (n, inner) in pairwise(dims):
        if outer != n * inner:
            return None
    return dims[-1][1]


def as_array(obj: Any) -> DeviceArray:
    """``obj`` as a :class:`DeviceArray`, without a copy and without waiting for any stream."""
    return describe(obj, 0)


def describe(obj: Any, stream: int) -> DeviceArray:
    """As :func:`as_array`, of an array that is to be used on the stream of that handle."""
    if type(obj) is DeviceArray:
        return obj
    if not owns(obj):
        raise DTypeError(f"expected an array on a CUDA device, got {type(obj).__name__}")
    library = library_of(obj)
    return DeviceArray(library.describe(obj, stream), obj)


def is_writable(obj: Any) -> bool:
    """Whether a device array may be written; JAX's, for one, may not."""
    return as_array(obj).writable


def as_rows(array: DeviceArray) -> DeviceArray:
    """A view [B, V] of an array [..., V] whose leading dimensions merge."""
    if len(array.shape) == 2 and array.shape[0] != 1:
        return array
    *lead, width = array.shape
    *strides, last = array.strides
    step = next((stride for n, stride in zip(lead[::-1], strides[::-1], strict=True) if n != 1), width * last)
    return array._view(array.address, (math.prod(lead), width), (step, last))


def empty(shape: Any, dtype: Any, stream: Any) -> DeviceArray:
    """An uninitialised array, by the library and on the device of ``stream``."""
    return _made("empty", shape, dtype, stream)


def scratch(shape: Any, dtype: Any, stream: Any) -> DeviceArray:
    """As :func:`empty`, of an array that may be dropped as soon as the work that uses it is queued."""
    return _made("scratch", shape, dtype, stream)


@cache
def _streams() -> Any:
    """The module, which imports this one, and Numba."""
    from kdcore.cuda import streams

    return streams


def _made(how: str, shape: Any, dtype: Any, stream: Any) -> DeviceArray:
    queue = _streams().as_queue(stream)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    owner = getattr(queue.library, how)(shape, np.dtype(dtype), queue.device, queue.handle)
    return DeviceArray(library_of(owner).describe(owner, queue.handle), owner)


@lru_cache(maxsize=64)
def nothing(dtype: Any, shape: tuple[int, ...] = (0,)) -> DeviceArray:
    """An array without elements, which takes no memory."""
    dtype = np.dtype(dtype)
    return DeviceArray(Description(0, shape, (0,) * len(shape), dtype, True, None, None), None)


def full(shape: Any, dtype: Any, value: Any, stream: Any) -> DeviceArray:
    """A scratch array filled with ``value`` by a kernel on ``stream``. Not for bfloat16."""
    from kdcore.cuda.launch import fill

    if 0 in shape:
        return nothing(dtype, shape)
    array = scratch(shape, dtype, stream)
    fill(array, value, stream)
    return array


def to_device(array: Any, stream: Any) -> DeviceArray:
    """A copy of a NumPy array on the device, one of Numba's."""
    from numba import cuda

    from kdcore.cuda.streams import as_stream

    contiguous = np.ascontiguousarray(array).reshape(np.shape(array))
    # Numba copies from a buffer, which an array of ml_dtypes' bfloat16 cannot be exported as.
    bits = contiguous.view(np.uint16) if contiguous.dtype.name == "bfloat16" else contiguous
    return as_array(cuda.to_device(bits, stream=as_stream(stream)).view(contiguous.dtype))


def hand_over(array: DeviceArray, stream: Any) -> Any:
    """A result as an array of the library that it was allocated by."""
    queue = _streams().as_queue(stream)
    queue.library.finish(queue.handle)
    if (array.address, array.shape, array.strides) == array.whole:
        return array.owner
    offset = int(array.address) - int(array.whole[0])
    return library_of(array.owner).view(array.owner, offset, array.shape, array.strides)


def to_host(array: Any) -> np.ndarray:
    """A NumPy copy of a device array. Waits for all work on the device, whatever stream it is on."""
    from numba import cuda

    from kdcore.cuda.primitives import SIMULATOR

    array = as_array(array)
    with nullcontext() if array.device is None else cuda.gpus[array.device]:
        cuda.synchronize()
        if not array.size:
            return np.empty(array.shape, array.dtype)
        if SIMULATOR:
            return array.address.array(array.shape, array.strides, array.dtype).copy()
        view = cuda.from_cuda_array_interface(array.__cuda_array_interface__, owner=array, sync=False)
        return view.copy_to_host().view(array.dtype)


@lru_cache(maxsize=256)
def _bounds(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> tuple[int, int]:
    """The first byte of an array and the one after its last, from the address of its first element."""
    low, high = 0, itemsize
    for extent, stride in zip(shape, strides, strict=True):
        reach = (extent - 1) * stride
        if reach < 0:
            low += reach
        else:
            high += reach
    return low, high


def overlaps(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether the byte ranges of two arrays intersect."""
    if 0 in a.shape or 0 in b.shape:
        return False
    low_a, high_a = _bounds(a.shape, a.strides, a.dtype.itemsize)
    low_b, high_b = _bounds(b.shape, b.strides, b.dtype.itemsize)
    apart = int(b.address) - int(a.address)
    return low_a < apart + high_b and apart + low_b < high_a


def same(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return (a.address, a.shape, a.strides, a.dtype) == (b.address, b.shape, b.strides, b.dtype)
