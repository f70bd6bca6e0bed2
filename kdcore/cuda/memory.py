"""Memory of the CUDA engine: :class:`kdcore.cuda.arrays.DeviceArray`, made, viewed, handed over and compared.

:mod:`kdcore.cpu.memory` has the same functions for NumPy arrays. bfloat16 is the dtype of ``ml_dtypes`` here. Importing
this module imports neither numba.cuda nor ml_dtypes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import numpy as np

from kdcore.cuda.arrays import DeviceArray, Layout, contiguous, layout_of
from kdcore.cuda.libraries import Queue, library_of
from kdcore.cuda.presence import owns
from kdcore.errors import DTypeError

__all__ = [
    "Number",
    "as_array",
    "empty",
    "full",
    "hand_over",
    "hand_over_parts",
    "is_writable",
    "nothing",
    "overlapping",
    "rows_of",
    "same",
    "scratch",
    "scratch_of",
    "to_device",
    "to_host",
]


def as_array(obj: Any) -> DeviceArray:
    """``obj`` as a :class:`DeviceArray`, without a copy and without waiting for any stream."""
    if type(obj) is DeviceArray:
        return obj
    if not owns(obj):
        raise DTypeError(f"expected an array on a CUDA device, got {type(obj).__name__}")
    return library_of(obj).describe(obj, 0)


def is_writable(obj: Any) -> bool:
    """Whether a device array may be written; JAX's, for one, may not."""
    return as_array(obj).writable


def rows_of(arrays: Sequence[DeviceArray]) -> list[DeviceArray] | None:
    """Views [B, V] of arrays [..., V]; None, if the leading dimensions of one cannot be merged without a copy."""
    views = []
    for array in arrays:
        layout = array.layout
        if not layout.mergeable:
            return None
        rows = layout.rows
        views.append(array if rows is layout else array.view(array.address, rows))
    return views


def empty(shape: Any, dtype: Any, stream: Any) -> DeviceArray:
    """An uninitialised array, by the library and on the device of ``stream``."""
    queue = stream if type(stream) is Queue else _queue_of(stream)
    layout = _layout_made(shape, dtype)
    owner = queue.library.empty(layout.shape, layout.dtype, queue.device, queue.handle)
    return DeviceArray(queue.library.address(owner), layout, owner, queue.device)


def scratch(shape: Any, dtype: Any, stream: Any) -> DeviceArray:
    """As :func:`empty`, of an array that may be dropped as soon as the work that uses it is queued."""
    queue = stream if type(stream) is Queue else _queue_of(stream)
    layout = _layout_made(shape, dtype)
    owner = queue.library.scratch(layout.shape, layout.dtype, queue.device, queue.handle)
    return DeviceArray(queue.library.address(owner), layout, owner, queue.device)


def _queue_of(stream: Any) -> Queue:
    from kdcore.cuda.streams import as_queue  # which imports Numba

    return as_queue(stream)


@lru_cache(maxsize=1024)
def _layout_made(shape: Any, dtype: Any) -> Any:
    """Of a contiguous array."""
    shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
    return layout_of(shape, contiguous(shape, dtype.itemsize), dtype)


@lru_cache(maxsize=1024)
def _layouts_behind(shapes: tuple[tuple[int, ...], ...], dtype: Any) -> tuple[int, list[tuple[int, Layout]]]:
    """Elements of contiguous arrays one behind another; of each, the bytes before it, and its layout."""
    count, places = 0, []
    for shape in shapes:
        layout = _layout_made(shape, dtype)
        places.append((count * layout.dtype.itemsize, layout))
        count += layout.size
    return count, places


def scratch_of(shapes: tuple[tuple[int, ...], ...], dtype: Any, stream: Any) -> list[DeviceArray]:
    """Arrays of these shapes one behind another, as :func:`scratch` makes one."""
    count, places = _layouts_behind(shapes, dtype)
    whole = scratch((count,), dtype, stream)
    return [whole.view(whole.address + offset, layout) for offset, layout in places]


class Number:
    """A float64 array [1] of a number that the program knows: a kernel takes the number itself.

    For a kernel that takes an address, it is written to the device when that is asked for, on the stream of the call.
    """

    __slots__ = ("_array", "_stream", "value")

    def __init__(self, value: float, stream: Any) -> None:
        self.value, self._stream = value, stream
        self._array: DeviceArray | None = None

    @property
    def address(self) -> Any:
        if self._array is None:
            self._array = full((1,), np.float64, self.value, self._stream)
        return self._array.address


@lru_cache(maxsize=64)
def nothing(dtype: Any, shape: tuple[int, ...] = (0,)) -> DeviceArray:
    """An array without elements, which takes no memory."""
    return DeviceArray(0, layout_of(shape, (0,) * len(shape), np.dtype(dtype)), None)


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
    queue = stream if type(stream) is Queue else _queue_of(stream)
    queue.library.finish(queue.handle)
    start, layout = array.whole
    if array.layout is layout and array.address == start:
        return array.owner
    offset = int(array.address) - int(start)
    return library_of(array.owner).view(array.owner, offset, array.shape, array.strides)


def hand_over_parts(array: DeviceArray, shape: tuple[int, ...], stream: Any) -> list[Any]:
    """What the first dimension of a whole, contiguous array counts, each in a shape, as :func:`hand_over` does."""
    queue = stream if type(stream) is Queue else _queue_of(stream)
    queue.library.finish(queue.handle)
    return library_of(array.owner).parts(array.owner, array.layout.shape[0], shape)


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


def overlapping(array: DeviceArray, others: Sequence[DeviceArray | None]) -> list[int]:
    """Which of other arrays, by their place, have bytes within the byte range of an array. None has none."""
    layout, found = array.layout, []
    if layout.size:
        start = int(array.address)
        low, high = layout.bounds
        for k, other in enumerate(others):
            if other is not None and other.layout.size:
                apart = int(other.address) - start
                low_other, high_other = other.layout.bounds
                if low < apart + high_other and apart + low_other < high:
                    found.append(k)
    return found


def same(a: DeviceArray, b: DeviceArray) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return (a.address, a.shape, a.strides, a.dtype) == (b.address, b.shape, b.strides, b.dtype)
