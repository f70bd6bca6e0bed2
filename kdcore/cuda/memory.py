"""Arrays of the CUDA engine: Numba device arrays. :mod:`kdcore.cpu.memory` has the same functions for NumPy arrays.

bfloat16 is the dtype of ``ml_dtypes`` here. Importing this module imports neither numba.cuda nor ml_dtypes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kdcore.cuda.presence import detached, require
from kdcore.errors import DeviceUnavailableError, DTypeError, MissingDependencyError

__all__ = ["as_array", "as_rows", "element", "empty", "full", "is_writable", "overlaps", "same", "to_device", "to_host"]


def _bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependencyError("bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def as_array(obj: Any) -> Any:
    """``obj`` as a Numba device array with a true dtype, without a copy and without waiting for any stream.

    The CUDA array interface has no name for bfloat16. PyTorch exports it as ``<V2`` (once as ``<f2``, which would be
    read as float16), so the object's own dtype decides.
    """
    require()
    if getattr(obj, "__cuda_ndarray__", False) is True:
        return obj
    from numba import cuda

    obj = detached(obj)
    interface = getattr(obj, "__cuda_array_interface__", None)
    if interface is None:
        raise DTypeError(f"expected an array on a CUDA device, got {type(obj).__name__}")
    if not hasattr(cuda, "from_cuda_array_interface"):
        raise DeviceUnavailableError("the CUDA simulator cannot read the memory of a device")
    interface = {**interface, "stream": None}
    dtype = None
    if "bfloat16" in str(getattr(obj, "dtype", "")) and interface["typestr"] in ("<V2", "|V2", "<f2", "<u2"):
        dtype = _bfloat16()
        interface["typestr"] = "<u2"
    elif interface["typestr"][1] == "V":
        raise DTypeError(f"the dtype {getattr(obj, 'dtype', interface['typestr'])} is not supported")
    array = cuda.from_cuda_array_interface(interface, owner=obj, sync=False)
    return array if dtype is None else array.view(dtype)


def is_writable(obj: Any) -> bool:
    """Whether a device array may be written; JAX, for one, exports its arrays as read-only."""
    interface = getattr(detached(obj), "__cuda_array_interface__", None)
    return interface is None or not interface["data"][1]


def _view(array: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    """The memory of ``array`` in another shape."""
    from numba.cuda.cudadrv import devicearray

    if hasattr(devicearray, "FakeCUDAArray"):
        base = np.lib.stride_tricks.as_strided(array._ary, shape, strides)
        return devicearray.FakeCUDAArray(base, stream=array.stream)
    return devicearray.DeviceNDArray(shape, strides, array.dtype, stream=array.stream, gpu_data=array.gpu_data)


def as_rows(array: Any) -> Any:
    """A view [B, V] of an array [..., V] whose leading dimensions merge; Numba reshapes contiguous arrays alone."""
    *lead, width = tuple(array.shape)
    *strides, last = tuple(array.strides)
    step = next((stride for n, stride in zip(lead[::-1], strides[::-1], strict=True) if n != 1), width * last)
    return _view(array, (math.prod(lead), width), (step, last))


def element(array: Any, k: int) -> Any:
    """A 0-d view of element ``k`` of a contiguous array [K]."""
    return _view(array[k : k + 1], (), ())


def empty(shape: Any, dtype: Any, stream: Any) -> Any:
    """An uninitialised device array."""
    from numba import cuda

    from kdcore.cuda.streams import as_stream

    return cuda.device_array(shape, dtype, stream=as_stream(stream))


def full(shape: Any, dtype: Any, value: Any, stream: Any) -> Any:
    """A device array filled with ``value`` by a kernel on ``stream``. Not for bfloat16."""
    from kdcore.cuda.kernels import fill_kernel
    from kdcore.cuda.primitives import THREADS
    from kdcore.cuda.streams import launch

    array = empty(shape, dtype, stream)
    if array.size:
        flat = _view(array, (array.size,), (array.dtype.itemsize,))
        launch(fill_kernel, -(-array.size // THREADS), stream, flat, array.dtype.type(value))
    return array


def to_device(array: Any, stream: Any) -> Any:
    """A copy of a NumPy array on the device."""
    from numba import cuda

    from kdcore.cuda.streams import as_stream

    return cuda.to_device(np.ascontiguousarray(array).reshape(np.shape(array)), stream=as_stream(stream))


def to_host(array: Any) -> np.ndarray:
    """A NumPy copy of a device array. Waits for all work on the device, whatever stream it is on."""
    from numba import cuda

    cuda.synchronize()
    return array.copy_to_host()


def _bounds(array: Any) -> tuple[int, int]:
    """The first byte of an array and the one after its last."""
    address = array.ctypes.data if hasattr(array, "_ary") else array.device_ctypes_pointer.value or 0
    low = high = address
    for extent, stride in zip(tuple(array.shape), tuple(array.strides), strict=True):
        reach = (extent - 1) * stride
        low, high = low + min(reach, 0), high + max(reach, 0)
    return low, high + array.dtype.itemsize


def overlaps(a: Any, b: Any) -> bool:
    """Whether the byte ranges of two arrays intersect."""
    if not a.size or not b.size:
        return False
    (low_a, high_a), (low_b, high_b) = _bounds(a), _bounds(b)
    return low_a < high_b and low_b < high_a


def same(a: Any, b: Any) -> bool:
    """Whether two arrays are the same elements in the same order."""
    return (_bounds(a), tuple(a.shape), tuple(a.strides), a.dtype) == (
        _bounds(b),
        tuple(b.shape),
        tuple(b.strides),
        b.dtype,
    )
