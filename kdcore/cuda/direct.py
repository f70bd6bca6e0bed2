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
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Function",
    "Slot",
    "Slots",
    "bindings",
    "current_context",
    "current_device",
    "filled",
    "flat",
    "function_of",
    "primary_context",
    "set_words",
    "slots_of",
]

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


class Slot(int):
    """Stands in a kernel's arguments for the number that each launch brings in this place of a list."""


def slots_of(arguments: tuple[Any, ...], codes: str) -> Slots:
    """What varies in arguments of which some are slots, for numbers of the types ``codes`` in these."""
    values = flat(arguments)
    return Slots(codes, [int(value) if type(value) is Slot else None for value in values])


class Slots(NamedTuple):
    """Of the numbers that a launch brings: their types, and for each parameter which of them it is; None: none."""

    codes: str
    of: list[int | None]


def filled(arguments: tuple[Any, ...], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with numbers in the place of slots."""
    return tuple([
        filled(argument, values) if isinstance(argument, tuple)
        else values[argument] if type(argument) is Slot
        else argument
        for argument in arguments
    ])  # fmt: skip


class _Fields:
    """Numbers of given types in memory: how they are written, and how far from the start each of them is."""

    __slots__ = ("offsets", "pack", "size")

    def __init__(self, codes: str) -> None:
        layout = struct.Struct(f"@{codes}")
        self.pack, self.size = layout.pack_into, layout.size
        # The code of the last one ends the offset of each, alignment included.
        ends = [struct.calcsize(f"@{codes[: k + 1]}") for k in range(len(codes))]
        self.offsets = [end - struct.calcsize(code) for end, code in zip(ends, codes, strict=True)]


class _Parameters:
    """Memory for what varies of a launch's parameters, and where each of all is, as the driver wants to know it."""

    __slots__ = ("address", "memory", "places")

    def __init__(self, size: int, places: list[tuple[bool, int]]) -> None:
        """places: of each parameter, whether it is in this memory, and its offset there, else its address."""
        self.memory = ctypes.create_string_buffer(size)
        start = ctypes.addressof(self.memory)
        self.places = (ctypes.c_void_p * len(places))(*[start + at if here else at for here, at in places])
        self.address = ctypes.addressof(self.places)


class Function:
    """A compiled kernel in a context, to be launched with parameters of given types.

    With ``slots`` a launch brings those numbers alone; the other parameters are as in ``values``, once and for all.
    """

    __slots__ = ("_compiled", "_constants", "_driver", "_free", "_handle", "_pack", "_places", "_size")

    def __init__(
        self, driver: Any, handle: Any, codes: str, compiled: Any, slots: Slots | None = None, values: Any = ()
    ) -> None:
        self._driver, self._handle = driver, handle
        #: Numba's, which keeps the code loaded.
        self._compiled = compiled
        sizes = [struct.calcsize(code) for code in codes]
        self._require(sizes)
        of: list[int | None] = list(range(len(codes)))
        varying, fixed = _Fields(codes), _Fields("")
        self._constants = ctypes.create_string_buffer(8)
        if slots is not None:
            of, varying = slots.of, _Fields(slots.codes)
            if any(slot is not None and slots.codes[slot] != code for slot, code in zip(of, codes, strict=True)):
                raise TypeError(f"parameters of the types {codes} cannot be numbers of the types {slots.codes}")
            rest = [k for k, slot in enumerate(of) if slot is None]
            fixed = _Fields("".join(codes[k] for k in rest))
            self._constants = ctypes.create_string_buffer(max(1, fixed.size))
            fixed.pack(self._constants, 0, *[values[k] for k in rest])
        self._pack, self._size = varying.pack, varying.size
        start, rest_at = ctypes.addressof(self._constants), iter(fixed.offsets)
        #: Of each parameter, whether it is in the memory of a launch, and its offset there; else its address.
        self._places = [
            (False, start + next(rest_at)) if slot is None else (True, varying.offsets[slot]) for slot in of
        ]
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

    def launch(self, blocks: int, threads: int, stream: int, values: Sequence[Any]) -> bool:
        """Run on the stream of that handle; the parameters have been copied when this returns.

        False, and nothing is run, with an integer that is none of its type: then it is Numba that says what it is.
        """
        try:
            parameters = self._free.pop()
        except IndexError:
            parameters = _Parameters(self._size, self._places)
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


def function_of(kernel: Any, arguments: tuple[Any, ...], slots: Slots | None = None) -> Function | None:
    """What Numba has launched, of a kernel with these arguments, in the current context.

    With ``slots`` the arguments that are none are kept for all launches. None if only Numba can launch it: with
    exceptions of a debug build, blocks that wait for the whole grid, or code that depends on the grid.
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
    values = flat(arguments)
    return Function(driver, handle, "".join(_code(type(value)) for value in values), compiled, slots, values)


def set_words(address: int, word: int, count: int, stream: int) -> bool:
    """``count`` words of 32 bits from an address become ``word``, on the stream of that handle.

    False, and nothing is done, where this is left to a kernel.
    """
    driver = bindings()
    if driver is None:
        return False
    (error,) = driver.cuMemsetD32Async(address, word, count, stream)
    _check(error, "cuMemsetD32Async")
    return True
