"""The libraries whose device arrays are worked on: what an array of theirs is, and how to make another.

An array of any of them becomes a :class:`kdcore.cuda.arrays.DeviceArray` here, and nowhere else: without a copy,
without waiting for any stream. Importing this module imports none of them; only those that the caller has are asked.
"""

from __future__ import annotations

import ctypes
import math
import sys
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from kdcore.cuda.arrays import DeviceArray, Layout, contiguous, layout_of
from kdcore.errors import DTypeError, MissingDependencyError

__all__ = ["NUMBA", "Library", "Queue", "bfloat16", "library_of"]

Shape = tuple[int, ...]


@cache
def bfloat16() -> np.dtype[Any]:
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependencyError("bfloat16 arrays need the package ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


class Library:
    """Numba, whose arrays those of libraries without an allocator become, too."""

    def describe(self, obj: Any, stream: int) -> DeviceArray:
        """What is known of an array that is to be used on the stream of that handle."""
        if hasattr(obj, "_ary"):  # the simulator's, in the memory of the host
            array = obj._ary
            return DeviceArray(self.address(obj), layout_of(array.shape, array.strides, array.dtype), obj)
        return DeviceArray(self.address(obj), layout_of(obj.shape, obj.strides, obj.dtype), obj)

    def address(self, obj: Any) -> Any:
        """Where an array is that :meth:`empty` or :meth:`scratch` of this library has made."""
        if hasattr(obj, "_ary"):
            from kdcore.cuda.simulated import host_address

            return host_address(obj._ary)
        return obj.device_ctypes_pointer.value or 0

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

    def parts(self, owner: Any, count: int, shape: Shape) -> list[Any]:
        """The ``count`` parts of a contiguous array that its first dimension counts, each in a shape."""
        itemsize = owner.dtype.itemsize
        strides, size = contiguous(shape, itemsize), itemsize * math.prod(shape)
        return [self.view(owner, k * size, shape, strides) for k in range(count)]


class _Torch(Library):
    def describe(self, obj: Any, stream: int) -> DeviceArray:
        layout, address = _layout_of_torch(obj.shape, obj.stride(), obj.dtype), obj.data_ptr()
        return DeviceArray(_reachable(address, layout) if _simulated() else address, layout, obj, obj.device.index)

    def address(self, obj: Any) -> Any:
        return self.describe(obj, 0).address if _simulated() else obj.data_ptr()

    def current_stream(self, device: int | None) -> int | None:
        torch = sys.modules["torch"]
        if device is not None and (handle := _current_stream_of_torch()) is not None:
            return int(handle(device))
        return int(torch.cuda.current_stream(device).cuda_stream)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        torch = sys.modules["torch"]
        array = torch.empty(shape, dtype=_dtype_of_torch(dtype), device=_device_of_torch(device))
        if stream != self.current_stream(
            device
        ):  # its memory must not be used again before that stream is done with it
            array.record_stream(torch.cuda.ExternalStream(stream, device=array.device))
        return array

    def view(self, owner: Any, offset: int, shape: Shape, strides: Shape) -> Any:
        size = owner.element_size()
        return owner.as_strided(shape, [stride // size for stride in strides], offset // size)

    def parts(self, owner: Any, count: int, shape: Shape) -> list[Any]:
        parts = [owner[k] for k in range(count)]  # in half the time of as_strided
        return parts if len(shape) == owner.dim() - 1 else [part.view(shape) for part in parts]


@cache
def _current_stream_of_torch() -> Any:
    """The function that PyTorch's own compiler uses, which makes no object of the stream; None if there is none."""
    return getattr(getattr(sys.modules["torch"], "_C", None), "_cuda_getCurrentRawStream", None)


@cache
def _dtype_of_torch(dtype: np.dtype[Any]) -> Any:
    return getattr(sys.modules["torch"], dtype.name)


@cache
def _device_of_torch(device: int | None) -> Any:
    return sys.modules["torch"].device("cuda", device)


@lru_cache(maxsize=1024)
def _layout_of_torch(shape: Shape, steps: Shape, dtype: Any) -> Layout:
    """Of a tensor, whose strides count elements."""
    ours = _torch_dtype(dtype)
    return layout_of(tuple(shape), tuple([step * ours.itemsize for step in steps]), ours)


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
    def describe(self, obj: Any, stream: int) -> DeviceArray:
        layout, address = layout_of(obj.shape, obj.strides, _ours(obj.dtype)), obj.data.ptr
        return DeviceArray(_reachable(address, layout) if _simulated() else address, layout, obj, obj.device.id)

    def address(self, obj: Any) -> Any:
        return self.describe(obj, 0).address if _simulated() else obj.data.ptr

    def current_stream(self, device: int | None) -> int | None:
        return int(sys.modules["cupy"].cuda.get_current_stream(device).ptr)

    def empty(self, shape: Shape, dtype: np.dtype[Any], device: int | None, stream: int) -> Any:
        cupy = sys.modules["cupy"]
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(stream) if stream else cupy.cuda.Stream.null:
            return cupy.empty(shape, dtype)

    def view(self, owner: Any, offset: int, shape: Shape, strides: Shape) -> Any:
        return sys.modules["cupy"].ndarray(shape, owner.dtype, owner.data + offset, strides)


@cache
def _ours(dtype: Any) -> np.dtype[Any]:
    """The dtype of an array of CuPy's; NumPy puts a dtype's name together anew each time."""
    return bfloat16() if dtype.name == "bfloat16" else dtype


class _Jax(Library):
    """JAX, which has no stream to be on: the stream waits for its arrays, and the host for results."""

    def describe(self, obj: Any, stream: int) -> DeviceArray:
        return _by_dlpack(obj, stream, writable=False)

    def address(self, obj: Any) -> Any:
        return super().address(obj) if library_of(obj) is NUMBA else _by_dlpack(obj, 0).address

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

    def describe(self, obj: Any, stream: int) -> DeviceArray:
        interface = getattr(obj, "__cuda_array_interface__", None)
        if interface is None:
            return _by_dlpack(obj, stream)
        kind, strides = interface["typestr"], interface.get("strides")
        # The interface has no name for bfloat16: it is exported as <V2, and was once as <f2, which is float16.
        is_bfloat16 = kind in _MAYBE_BFLOAT16 and "bfloat16" in str(getattr(obj, "dtype", ""))
        try:
            layout = _layout_of_interface(
                tuple(interface["shape"]), None if strides is None else tuple(strides), kind, is_bfloat16
            )
        except DTypeError:
            raise DTypeError(f"the dtype {getattr(obj, 'dtype', kind)} is not supported") from None
        address, readonly = interface["data"]
        address = _reachable(address or 0, layout)
        return DeviceArray(address, layout, obj, None, interface.get("stream"), not readonly)


_MAYBE_BFLOAT16 = ("<V2", "|V2", "<f2", "<u2")


@lru_cache(maxsize=1024)
def _layout_of_interface(shape: Shape, strides: Shape | None, kind: str, is_bfloat16: bool) -> Layout:
    if not is_bfloat16 and (kind[1] not in "fiub" or kind[0] not in "<|="):
        raise DTypeError(kind)
    dtype = bfloat16() if is_bfloat16 else np.dtype(kind)
    return layout_of(shape, contiguous(shape, dtype.itemsize) if strides is None else strides, dtype)


class Queue(NamedTuple):
    """Where a call is worked: on a stream of a device. ``library`` allocates its results."""

    handle: int
    device: int | None
    library: Library
    #: What the caller has given, or the handle: :func:`kdcore.cuda.streams.as_stream` has what Numba takes.
    stream: Any
    #: The CUDA context of the thread, if it is the device's, so that it is asked for once a call; 0: not known.
    context: int = 0


NUMBA, _TORCH, _CUPY, _JAX, _OTHER = Library(), _Torch(), _Cupy(), _Jax(), _Other()
_BY_MODULE = {"torch": _TORCH, "cupy": _CUPY, "jax": _JAX, "jaxlib": _JAX}


@cache
def _library_of_type(kind: Any) -> Library:
    if getattr(kind, "__cuda_ndarray__", False) is True:
        return NUMBA
    for base in kind.__mro__:
        if (library := _BY_MODULE.get(base.__module__.partition(".")[0])) is not None:
            return library
    return _OTHER


def library_of(obj: Any) -> Library:
    """The library of a device array."""
    kind: Any = type(obj)
    return _library_of_type(kind)


@cache
def _simulated() -> bool:
    from kdcore.cuda.primitives import SIMULATOR

    return SIMULATOR


def _reachable(address: int, layout: Layout) -> Any:
    """What the simulator, whose device is the host, takes for an address; elsewhere the address."""
    if not _simulated():
        return address
    from kdcore.cuda.simulated import host_address

    shape, strides, dtype = layout.shape, layout.strides, layout.dtype
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


def _by_dlpack(obj: Any, stream: int, writable: bool = True) -> DeviceArray:
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
        strides = contiguous(shape, dtype.itemsize)
    layout = layout_of(shape, strides, dtype)
    address = _reachable((tensor.data or 0) + tensor.byte_offset, layout)
    return DeviceArray(address, layout, obj, int(tensor.device_id), None, writable, capsule)
