#!/usr/bin/env python3
"""What a call on device arrays takes the program, without a device: microseconds of a call beyond the driver's.

    python benchmarks/host_time.py [--calls N] [--only WORD ...] [--profile]

The driver is a stand-in that does nothing and says that all went well; what its functions take themselves is measured
and subtracted. The arrays are stand-ins, too, of the library's own objects where those need no device: tensors of
PyTorch, on the CPU, that say they are on CUDA; Numba's arrays, with memory that there is not; objects with the
attributes that CuPy's have; objects with the CUDA array interface and nothing else. So the numbers are of kdcore's own
Python, and of such allocations and views as a library makes without a device: PyTorch's are real, on the CPU.
benchmarks/gpu.py has the whole, on a device (its part ``latency``).
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import itertools
import pstats
import statistics
import struct
import sys
import time
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from numba import cuda
from numba.cuda.cudadrv import devicearray

import kdcore
from kdcore.cuda import direct, libraries, plans, presence, streams
from kdcore.cuda.arrays import contiguous

__all__ = ["CASES", "LIBRARIES", "Driver", "measured", "stand_ins"]

STREAM = 77
#: An H200's.
ATTRIBUTES = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "L2_CACHE_SIZE": 60 << 20,
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 228 << 10,
    "MULTIPROCESSOR_COUNT": 132,
}
#: Addresses of arrays, far from each other.
_addresses = itertools.count(1 << 40, 1 << 32)
_contexts = itertools.count(10)


class Driver:
    """What is used of ``cuda.bindings.driver`` once kernels have been compiled: it counts, and does nothing."""

    CUkernel, CUfunction = type("CUkernel", (), {}), type("CUfunction", (), {})

    def __init__(self) -> None:
        self.calls: dict[str, int] = {}
        #: One that there has not been: what was prepared for another driver is not for this one.
        self.context = next(_contexts)
        #: Whether calls are counted; not while they are timed.
        self.counting = False

    def _count(self, name: str) -> None:
        if self.counting:
            self.calls[name] = self.calls.get(name, 0) + 1

    def cuCtxGetCurrent(self) -> tuple[int, int]:  # noqa: N802 (CUDA's names)
        self._count("cuCtxGetCurrent")
        return 0, self.context

    def cuCtxGetDevice(self) -> tuple[int, int]:  # noqa: N802
        self._count("cuCtxGetDevice")
        return 0, 0

    def cuLaunchKernel(self, *parameters: Any) -> tuple[int]:  # noqa: N802
        self._count("cuLaunchKernel")
        return (0,)

    def cuMemsetD32Async(self, *parameters: Any) -> tuple[int]:  # noqa: N802
        self._count("cuMemsetD32Async")
        return (0,)

    def cuFuncGetParamInfo(self, sizes: list[int], k: int) -> tuple[int, int, int]:  # noqa: N802
        return (0, 0, sizes[k]) if k < len(sizes) else (1, 0, 0)

    def seconds(self, repeats: int = 20_000) -> float:
        """What those of the calls counted take that are made here: a stand-in is slower than nothing."""
        arguments = {"cuLaunchKernel": (None, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0), "cuMemsetD32Async": (0, 0, 0, 0)}
        total = 0.0
        for name, count in self.calls.items():
            function, given = getattr(self, name), arguments.get(name, ())
            began = time.perf_counter()
            for _ in range(repeats):
                function(*given)
            total += (time.perf_counter() - began) / repeats * count
        return total


def _function_of(driver: Driver) -> Callable[..., Any]:
    """In the place of :func:`kdcore.cuda.direct.function_of`: a kernel whose parameters are as the driver expects."""

    def function_of(kernel: Any, arguments: tuple[Any, ...], slots: direct.Slots | None = None) -> direct.Function:
        values = direct.flat(arguments)
        codes = "".join(direct._code(type(value)) for value in values)
        return direct.Function(driver, [struct.calcsize(code) for code in codes], codes, None, slots, values)

    return function_of


# --- arrays --------------------------------------------------------------------------------------------------------


def _torch() -> tuple[Any, dict[str, Any]]:
    import torch

    class Tensor(torch.Tensor):  # type: ignore[misc]
        """On the CPU, and says that it is on CUDA. What is made of it is PyTorch's own."""

        __module__ = "torch"
        __torch_function__ = torch._C._disabled_torch_function_impl
        is_cuda = True
        device = torch.device("cuda", 0)

    module = ModuleType("torch")
    module.__dict__.update(
        {str(dtype).rpartition(".")[2]: dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)},
        device=torch.device,
        empty=lambda shape, dtype, device: torch.empty(shape, dtype=dtype),
        cuda=SimpleNamespace(current_stream=lambda device: SimpleNamespace(cuda_stream=STREAM)),
        _C=SimpleNamespace(_cuda_getCurrentRawStream=lambda device: STREAM),
    )

    def array(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.zeros(shape, dtype=getattr(torch, dtype)).as_subclass(Tensor)

    return array, {"torch": module}


class Cupy:
    """CuPy's array."""

    __module__ = "cupy"
    __slots__ = ("__cuda_array_interface__", "data", "device", "dtype", "shape", "strides")

    def __init__(self, shape: tuple[int, ...], dtype: Any, data: Any = None, strides: Any = None) -> None:
        self.dtype, self.shape, self.__cuda_array_interface__ = np.dtype(dtype), shape, {}
        self.strides = contiguous(shape, self.dtype.itemsize) if strides is None else strides
        self.data = Memory(next(_addresses)) if data is None else data
        self.device = SimpleNamespace(id=0)


def _cupy() -> tuple[Any, dict[str, Any]]:
    module = ModuleType("cupy")
    null = mock.MagicMock()
    module.__dict__.update(
        empty=Cupy, ndarray=Cupy,
        cuda=SimpleNamespace(
            get_current_stream=lambda device: SimpleNamespace(ptr=STREAM), Device=lambda device: _HERE,
            ExternalStream=lambda handle: _HERE, Stream=SimpleNamespace(null=null),
        ),
    )  # fmt: skip
    return Cupy, {"cupy": module}


class _Here:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


_HERE = _Here()


class Memory:
    """Memory of Numba's and CuPy's, by its address."""

    __slots__ = ("device_ctypes_pointer", "ptr")

    def __init__(self, address: int) -> None:
        self.ptr = address
        self.device_ctypes_pointer = SimpleNamespace(value=address)

    def view(self, offset: int) -> Memory:
        return Memory(self.ptr + offset)

    __add__ = view


def _numba_array(shape: Any, dtype: Any) -> Any:
    shape = (shape,) if isinstance(shape, int) else shape
    strides = contiguous(shape, np.dtype(dtype).itemsize)
    return devicearray.DeviceNDArray(shape, strides, dtype, gpu_data=Memory(next(_addresses)))


class Interface:
    """An array with the CUDA array interface, and nothing else."""

    __slots__ = ("__cuda_array_interface__",)

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (next(_addresses), False), "shape": shape, "strides": None, "typestr": np.dtype(dtype).str,
            "version": 3, "stream": None,
        }  # fmt: skip


LIBRARIES: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    "torch": _torch,
    "CuPy": _cupy,
    "Numba": lambda: (_numba_array, {}),
    "interface": lambda: (Interface, {}),
}


@contextmanager
def stand_ins(library: str) -> Iterator[tuple[Driver, Any]]:
    """The driver that does nothing in the place of the real one, and how to make an array of a library."""
    array, modules = LIBRARIES[library]()
    driver = Driver()

    def configured(kernel: Any, *configuration: Any) -> Any:
        return lambda *arguments: None

    patches = [
        mock.patch.dict(sys.modules, modules),
        mock.patch.object(presence, "available", lambda: None),
        mock.patch.object(direct, "bindings", lambda: driver),
        mock.patch.object(direct, "primary_context", lambda device: driver.context),
        mock.patch.object(direct, "function_of", _function_of(driver)),
        mock.patch.object(plans, "_attribute", lambda device, name: ATTRIBUTES[name]),
        mock.patch.object(streams, "_configured", configured),
        mock.patch.object(streams, "_external", lambda handle: _HERE),
        mock.patch.object(streams, "_functions", {}),
        mock.patch.object(cuda, "device_array", _numba_array),
        mock.patch.object(cuda, "gpus", {0: _HERE}),
    ]
    # What is remembered of a module that is no longer there then.
    forgotten = (
        libraries._dtype_of_torch, libraries._torch_dtype, libraries._layout_of_torch,
        libraries._current_stream_of_torch, libraries._device_of_torch,
    )  # fmt: skip
    for known in forgotten:
        known.cache_clear()
    for patch in patches:
        patch.start()
    try:
        yield driver, array
    finally:
        for patch in reversed(patches):
            patch.stop()
        for known in forgotten:
            known.cache_clear()


# --- what is measured ----------------------------------------------------------------------------------------------


#: Kernel, classes, reduction.
CASES = [
    ("row", 128, "none"),
    ("row", 128, "mean"),
    ("group", 32768, "none"),
    ("group", 32768, "mean"),
]
_ROWS = 8
#: The calls of a case come in so many turns, and the turn with the least median counts: others use the machine, too.
_TURNS = 10


def call_of(array: Any, size: int, reduction: str) -> Callable[[], Any]:
    student, teacher, out = (array((_ROWS, size), "float32") for _ in range(3))
    labels = array((_ROWS,), "int64")

    def call() -> Any:
        return kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3, out=out, reduction=reduction)

    return call


def of_arrays(array: Any, kernel: str, size: int, reduction: str) -> float:
    """Microseconds of what a call asks of the library: to describe four arrays, to allocate, and to view results."""
    given = [array((_ROWS, size), "float32") for _ in range(3)] + [array((_ROWS,), "int64")]
    library, double = libraries.library_of(given[0]), np.dtype(np.float64)
    shapes: list[tuple[int, ...]] = [(3, _ROWS)] if reduction == "none" else [(3 * _ROWS + 1,), (3,)]
    shape = (_ROWS,) if reduction == "none" else ()
    if kernel == "group":
        shapes.insert(0, (4096,))

    def call() -> None:
        for obj in given:
            library.describe(obj, 0)
        for of in shapes:
            owner = library.empty(of, double, 0, STREAM)
            library.address(owner)
        library.parts(owner, 3, shape)

    return 1e6 * min(timeit.repeat(call, number=100, repeat=50)) / 100


def measured(driver: Driver, call: Callable[[], Any], calls: int) -> dict[str, float]:
    """Microseconds of a call, of the driver's functions in it, and how often each of these is called."""
    for _ in range(20):
        call()
    driver.calls.clear()
    driver.counting = True
    call()
    driver.counting = False
    clock = time.perf_counter
    medians = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(_TURNS):
            taken = []
            for _ in range(calls // _TURNS):
                began = clock()
                call()
                taken.append(clock() - began)
            medians.append(statistics.median(taken))
    finally:
        if collecting:
            gc.enable()
    of_driver = driver.seconds()
    return {
        "microseconds": 1e6 * (min(medians) - of_driver),
        "driver": 1e6 * of_driver,
        **{name: float(count) for name, count in driver.calls.items()},
    }


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--calls", type=int, default=3000, help="calls of a case")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases with these words in their names")
    parser.add_argument("--profile", action="store_true", help="print the functions that take the time, too")
    options = parser.parse_args(words)
    print("| arrays | kernel | reduction | us a call, without the driver | of these the arrays' library | launches |")
    print("| --- | --- | --- | --- | --- | --- |")
    for library in LIBRARIES:
        for kernel, size, reduction in CASES:
            name = f"{library} {kernel} {reduction}"
            if not all(word in name.split() for word in options.only):
                continue
            try:
                context = stand_ins(library)
                with context as (driver, array), plans.using(kernel=kernel):
                    call = call_of(array, size, reduction)
                    found = measured(driver, call, options.calls)
                    theirs, launches = of_arrays(array, kernel, size, reduction), found["cuLaunchKernel"]
                    times = f"{found['microseconds']:.1f}", f"{theirs:.1f}"
                    cells = library, kernel, reduction, *times, f"{launches:.0f}"
                    print(f"| {' | '.join(cells)} |", flush=True)
                    if options.profile:
                        profiler = cProfile.Profile()
                        profiler.enable()
                        for _ in range(options.calls):
                            call()
                        profiler.disable()
                        pstats.Stats(profiler).sort_stats("tottime").print_stats(40)
            except ImportError as error:
                print(f"| {library} | {kernel} | {reduction} | {error} | | |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
