"""Launches by the driver's own function, of kernels that Numba has compiled and launched once.

Numba types, converts and boxes each argument of each launch: for the fifty numbers that a kernel of rows takes, that is
more time than the kernel needs for a small batch. Here the types of the arguments are looked up, and the numbers are
written, by one ``struct``, to where the driver reads them.

This needs what :func:`bindings` looks for, once. Where it is not, in Numba's simulator for one, all launches are
Numba's. An error of the driver is raised, as Numba raises it.
"""

from __future__ import annotations

import ctypes
import struct
from functools import cache
from typing import Any

import numpy as np

__all__ = ["Function", "bindings", "current_context", "current_device", "flat", "function_of", "primary_context"]

#: What ``struct`` calls numbers, by their kind and bytes.
_CODES = {
    "i1": "b", "i2": "h", "i4": "i", "i8": "q",
    "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
    "f2": "e", "f4": "f", "f8": "d",
}  # fmt: skip

#: The first CUDA that says of a kernel how large its parameters are.
_FIRST_VERSION = 12040


@cache
def bindings() -> Any:
    """``cuda.bindings.driver``, or None where launches are left to Numba: this is decided once, at the first launch.

    None in the simulator, beside a Numba that does not use these bindings, and with drivers before CUDA 12.4.
    """
    from kdcore.cuda.primitives import SIMULATOR

    if SIMULATOR:
        return None
    try:
        from cuda.bindings import driver
        from numba.cuda.cudadrv.driver import binding
    except ImportError:
        return None
    if binding is not driver or not hasattr(driver, "cuFuncGetParamInfo"):
        return None
    error, version = driver.cuDriverGetVersion()
    return None if error or version < _FIRST_VERSION else driver


def _check(error: Any, name: str) -> None:
    """Raise what Numba raises for an error of the driver, unless that is CUDA_SUCCESS, which is 0."""
    if error:
        from numba.cuda.cudadrv.driver import CudaAPIError

        raise CudaAPIError(error, f"Call to {name} results in {error.name}")


def current_context() -> int:
    """The address of the calling thread's CUDA context; 0 if it has none, or if launches are Numba's."""
    driver = bindings()
    if driver is None:
        return 0
    error, context = driver.cuCtxGetCurrent()
    return 0 if error else int(context)


@cache
def primary_context(device: int) -> int:
    """The address of the context that Numba, and every other library, uses on a device."""
    from numba import cuda

    with cuda.gpus[device]:  # what Numba has of it is an object of another type in each version
        return current_context()


def current_device() -> int:
    """The number of the device of the calling thread's context, which is made if there is none."""
    driver = bindings()
    if driver is not None:
        error, device = driver.cuCtxGetDevice()
        if not error:
            return int(device)
    from numba import cuda

    return int(cuda.get_current_device().id)


def flat(arguments: tuple[Any, ...]) -> list[Any]:
    """The numbers of a kernel's arguments, which are numbers and tuples of numbers: its parameters, in their order."""
    values: list[Any] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            values += argument
        else:
            values.append(argument)
    return values


def _code(kind: Any) -> str:
    """What ``struct`` calls the numbers of a type; Numba makes int64 and float64 of Python's."""
    if kind in (int, float):
        return "q" if kind is int else "d"
    code = _CODES.get(np.dtype(kind).str[1:])
    if code is None:
        raise TypeError(f"the arguments of a kernel are numbers and tuples of numbers, got {kind.__name__}")
    return code


class _Parameters:
    """Memory for the parameters of one launch, and where each of them is, as the driver wants to know it."""

    __slots__ = ("address", "memory", "places")

    def __init__(self, size: int, offsets: list[int]) -> None:
        self.memory = ctypes.create_string_buffer(size)
        start = ctypes.addressof(self.memory)
        self.places = (ctypes.c_void_p * len(offsets))(*[start + offset for offset in offsets])
        self.address = ctypes.addressof(self.places)


class Function:
    """A compiled kernel in a context, to be launched with parameters of given types."""

    __slots__ = ("_compiled", "_driver", "_free", "_handle", "_offsets", "_pack", "_size")

    def __init__(self, driver: Any, handle: Any, codes: str, compiled: Any) -> None:
        self._driver, self._handle = driver, handle
        #: Numba's, which keeps the code loaded.
        self._compiled = compiled
        layout = struct.Struct(f"@{codes}")
        self._pack, self._size = layout.pack_into, layout.size
        # The code of the last parameter ends the offset of each, alignment included.
        ends = [struct.calcsize(f"@{codes[: k + 1]}") for k in range(len(codes))]
        sizes = [struct.calcsize(code) for code in codes]
        self._offsets = [end - size for end, size in zip(ends, sizes, strict=True)]
        self._require(sizes)
        #: What is not in use: a launch takes one and puts it back, so that no two threads write to the same.
        self._free: list[_Parameters] = []

    def _require(self, sizes: list[int]) -> None:
        """Raise unless the driver will read as many bytes of each parameter as are written."""
        found = []
        for k in range(len(sizes) + 1):
            error, _, size = self._driver.cuFuncGetParamInfo(self._handle, k)
            if error and k == len(sizes):  # there are no more
                break
            _check(error, "cuFuncGetParamInfo")
            found.append(int(size))
        if found != sizes:
            raise RuntimeError(f"a kernel has parameters of {found} bytes or more, but would be given {sizes}")

    def launch(self, blocks: int, threads: int, stream: int, values: list[Any]) -> bool:
        """Run on the stream of that handle; the parameters have been copied when this returns.

        False, and nothing is run, with an integer that is none of its type: then it is Numba that says what it is.
        """
        try:
            parameters = self._free.pop()
        except IndexError:
            parameters = _Parameters(self._size, self._offsets)
        try:
            self._pack(parameters.memory, 0, *values)
        except struct.error:
            return False
        (error,) = self._driver.cuLaunchKernel(
            self._handle, blocks, 1, 1, threads, 1, 1, 0, stream, parameters.address, 0
        )
        self._free.append(parameters)
        _check(error, "cuLaunchKernel")
        return True


def function_of(kernel: Any, arguments: tuple[Any, ...]) -> Function | None:
    """What Numba has launched, of a kernel with these arguments, in the current context.

    None if only Numba can launch it: with exceptions of a debug build, blocks that wait for the whole grid, or code
    that depends on the grid.
    """
    driver = bindings()
    compiled = kernel.overloads.get(tuple(map(kernel.typeof_pyval, arguments)))
    if driver is None or compiled is None or compiled.debug or compiled.cooperative or compiled.extensions:
        return None
    if getattr(compiled, "launch_config_sensitive", False):
        return None
    handle = compiled.library.get_cufunc().handle
    if isinstance(handle, driver.CUkernel):
        error, handle = driver.cuKernelGetFunction(handle)
        _check(error, "cuKernelGetFunction")
    if not isinstance(handle, driver.CUfunction):
        return None
    return Function(driver, handle, "".join(_code(type(value)) for value in flat(arguments)), compiled)
