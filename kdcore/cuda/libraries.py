"""The libraries whose device arrays are worked on: what an array of theirs is, and how to make another.

An array of any of them becomes a :class:`kdcore.cuda.memory.DeviceArray` here, and nowhere else: without a copy,
without waiting for any stream. Importing this module imports none of them; only those that the caller has are asked.
"""

from __future__ import annotations

import ctypes
import math
import sys
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kdcore.errors import DTypeError, MissingDependencyError

__all__ = ["Description", "Library", "bfloat16", "library_of"]

Shape = tuple[int, ...]


class Description(NamedTuple):
    """Where an array is: address and strides in bytes; if known, the device and the stream that it is made on."""

    address: Any
    shape: Shape
    strides: Shape
    dtype: np.dtype[Any]
    writable: bool
    device: int | None
    stream: int | None
    export: Any = None


@cache
def bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependencyError("bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def _contiguous(shape: Shape, itemsize: int) -> Shape:
    strides = [itemsize] * len(shape)
    for k in range(len(shape) - 2, -1, -1):
        strides[k] = strides[k + 1] * shape[k + 1]
    return tuple(strides)


class Library:
    """Numba, whose arrays those of libraries without an allocator become, too."""

    def describe(self, obj: Any, stream: int) -> Description:
        if hasattr(obj, "_ary"):  # the simulator's, in the memory of the host
            from kdcore.cuda.simulated import host_address

            array = obj._ary
            return Description(host_address(array), array.shape, array.strides, array.dtype, True, None, None)
        address = obj.device_ctypes_pointer.value or 0
        return Description(address, tuple(obj.shape), tuple(obj.strides), obj.dtype, True, None, None)

    def current_stream(self, device: int | None) -> int | None:
        """The handle of the stream that the caller is on, if the library has such a notion."""
        return None

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        """An uninitialised contiguous array."""
        from numba import cuda

        if device is None:
            return cuda.device_array(shape, dtype)
        with cuda.gpus[device]:
            return cuda.device_array(shape, dtype)

    def scratch(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        """An array that is dropped once the work that uses it is queued, not when it has ended."""
        return self.empty(shape, dtype, device, stream)

    def finish(self, stream: int) -> None:
        """Before a result is handed over: wait for the stream, if the library has no other way to."""

    def view(self, owner: Any, offset: int, shape: Shape, strides: Shape) -> Any:
        """The elements of a contiguous array ``owner`` that begin ``offset`` bytes into it."""
        from numba.cuda.cudadrv import devicearray

        if hasattr(owner, "_ary"):
            memory = owner._ary.reshape(-1).view(np.uint8)[offset:].view(owner.dtype)
            base = np.lib.stride_tricks.as_strided(memory, shape, strides)
            return devicearray.FakeCUDAArray(base, stream=owner.stream)
        data = owner.gpu_data.view(offset)
        return devicearray.DeviceNDArray(shape, strides, owner.dtype, stream=owner.stream, gpu_data=data)


class _Torch(Library):
    def describe(self, obj: Any, stream: int) -> Description:
        dtype = _torch_dtype(obj.dtype)
        itemsize = dtype.itemsize
        shape, strides = tuple(obj.shape), tuple([step * itemsize for step in obj.stride()])
        address = _reachable(obj.data_ptr(), shape, strides, dtype)
        return Description(address, shape, strides, dtype, True, obj.device.index, None)

    def current_stream(self, device: int | None) -> int | None:
        torch = sys.modules["torch"]
        if device is not None and (handle := _current_stream_of_torch()) is not None:
            return int(handle(device))
        return int(torch.cuda.current_stream(device).cuda_stream)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        torch = sys.modules["torch"]
        array = torch.empty(shape, dtype=_dtype_of_torch(dtype), device=torch.device("cuda", device))
        if stream != self.current_stream(
            device
        ):  # its memory must not be used again before that stream is done with it
            array.record_stream(torch.cuda.ExternalStream(stream, device=array.device))
        return array

    def view(self, owner: Any, offset: int, shape: Shape, strides: Shape) -> Any:
        size = owner.element_size()
        if shape == () and owner.dim() == 1:
            return owner[offset // size]  # in half the time
        return owner.as_strided(shape, [stride // size for stride in strides], offset // size)


@cache
def _current_stream_of_torch() -> Any:
    """The function that PyTorch's own compiler uses, which makes no object of the stream; None if there is none."""
    return getattr(getattr(sys.modules["torch"], "_C", None), "_cuda_getCurrentRawStream", None)


@cache
def _dtype_of_torch(dtype: np.dtype[Any]) -> Any:
    return getattr(sys.modules["torch"], dtype.name)


@cache
def _torch_dtype(dtype: Any) -> np.dtype[Any]:
    name = str(dtype).rpartition(".")[2]
    if name == "bfloat16":
        return bfloat16()
    try:
        return np.dtype(name)
    except TypeError:
        raise DTypeError(f"the dtype {dtype} is not supported") from None


class _Cupy(Library):
    def describe(self, obj: Any, stream: int) -> Description:
        dtype = bfloat16() if obj.dtype.name == "bfloat16" else obj.dtype
        address = _reachable(obj.data.ptr, obj.shape, obj.strides, dtype)
        return Description(address, obj.shape, obj.strides, dtype, True, obj.device.id, None)

    def current_stream(self, device: int | None) -> int | None:
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream) if stream else cupy.cuda.Stream.null:
            return cupy.empty(shape, dtype)

    def view(self, owner: Any, offset: int, shape: Shape, strides: Shape) -> Any:
        return sys.modules["cupy"].ndarray(shape, owner.dtype, owner.data + offset, strides)


class _Jax(Library):
    """JAX, which has no stream to be on: the stream waits for its arrays, and the host for results."""

    def describe(self, obj: Any, stream: int) -> Description:
        return _by_dlpack(obj, stream)._replace(writable=False)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        # A buffer that nobody else has yet is written, although JAX's arrays are immutable to those who have them.
        # Without jax_enable_x64 JAX has no float64, and makes something else of it: then the array is Numba's.
        array = sys.modules["jax"].numpy.zeros(shape, dtype).block_until_ready()
        return array if array.dtype == dtype else super().empty(shape, dtype, device, stream)

    def scratch(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        # JAX would give the memory away while a stream that it does not know of is still at work on it.
        return super().empty(shape, dtype, device, stream)

    def finish(self, stream: int) -> None:
        from kdcore.cuda.streams import synchronize

        synchronize(stream)

    def view(self, owner: Any, offset: int, shape: Shape, strides: Shape) -> Any:
        first = offset // owner.dtype.itemsize
        return owner.reshape(-1)[first : first + math.prod(shape)].reshape(shape)


class _Other(Library):
    """Any object with the CUDA array interface, or with DLPack; results are Numba's."""

    def describe(self, obj: Any, stream: int) -> Description:
        interface = getattr(obj, "__cuda_array_interface__", None)
        if interface is None:
            return _by_dlpack(obj, stream)
        kind = interface["typestr"]
        # The interface has no name for bfloat16: it is exported as <V2, and was once as <f2, which is float16.
        if "bfloat16" in str(getattr(obj, "dtype", "")) and kind in ("<V2", "|V2", "<f2", "<u2"):
            dtype = bfloat16()
        elif kind[1] not in "fiub" or kind[0] not in "<|=":
            raise DTypeError(f"the dtype {getattr(obj, 'dtype', kind)} is not supported")
        else:
            dtype = np.dtype(kind)
        shape = tuple(interface["shape"])
        strides = interface.get("strides")
        address, readonly = interface["data"]
        return Description(
            _reachable(address or 0, shape, strides, dtype), shape,
            _contiguous(shape, dtype.itemsize) if strides is None else tuple(strides),
            dtype, not readonly, None, interface.get("stream"),
        )  # fmt: skip


_NUMBA, _TORCH, _CUPY, _JAX, _OTHER = Library(), _Torch(), _Cupy(), _Jax(), _Other()
_BY_MODULE = {"torch": _TORCH, "cupy": _CUPY, "jax": _JAX, "jaxlib": _JAX}


@cache
def _library_of_type(kind: Any) -> Library:
    for base in kind.__mro__:
        if (library := _BY_MODULE.get(base.__module__.partition(".")[0])) is not None:
            return library
    return _OTHER


def library_of(obj: Any) -> Library:
    """The library of a device array."""
    if getattr(obj, "__cuda_ndarray__", False) is True:
        return _NUMBA
    kind: Any = type(obj)
    return _library_of_type(kind)


@cache
def _simulated() -> bool:
    from kdcore.cuda.primitives import SIMULATOR

    return SIMULATOR


def _reachable(address: int, shape: Shape, strides: Any, dtype: np.dtype[Any]) -> Any:
    """An address; in the simulator, whose device is the host, what it takes for one."""
    if not _simulated():
        return address
    from kdcore.cuda.simulated import host_address

    interface = {"shape": shape, "strides": strides, "typestr": dtype.str, "data": (address, False), "version": 3}
    if dtype.name == "bfloat16":
        interface["typestr"] = "<u2"
    return host_address(np.asarray(type("Array", (), {"__array_interface__": interface})()))


# --- DLPack --------------------------------------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h, with which a DLManagedTensor begins."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


#: Kinds of numbers, by their code in DLPack.
_CODES = {0: "i", 1: "u", 2: "f", 6: "b"}
_BFLOAT = 4


def _by_dlpack(obj: Any, stream: int) -> Description:
    # 0 is not allowed, being ambiguous: 1 is the legacy default stream.
    capsule = obj.__dlpack__(stream=stream or 1)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = ctypes.cast(pointer(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    if tensor.lanes != 1 or (tensor.code not in _CODES and (tensor.code, tensor.bits) != (_BFLOAT, 16)):
        raise DTypeError(f"the dtype {getattr(obj, 'dtype', (tensor.code, tensor.bits))} is not supported")
    dtype = bfloat16() if tensor.code == _BFLOAT else np.dtype(f"{_CODES[tensor.code]}{tensor.bits // 8}")
    shape = tuple(tensor.shape[k] for k in range(tensor.ndim))
    if tensor.strides:
        strides = tuple(tensor.strides[k] * dtype.itemsize for k in range(tensor.ndim))
    else:
        strides = _contiguous(shape, dtype.itemsize)
    address = _reachable((tensor.data or 0) + tensor.byte_offset, shape, strides, dtype)
    return Description(address, shape, strides, dtype, True, int(tensor.device_id), None, capsule)
