"""What callers pass as a stream, as what Numba and CuPy take; and the launch on it."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

from numba import cuda

from kdcore.cuda import direct
from kdcore.cuda.libraries import Library, library_of
from kdcore.cuda.memory import DeviceArray, describe
from kdcore.cuda.primitives import SIMULATOR
from kdcore.errors import DeviceMismatchError, DTypeError

__all__ = [
    "Queue",
    "as_queue",
    "as_stream",
    "described",
    "launch",
    "on_device_of",
    "queue_of",
    "stream_handle",
    "synchronize",
]

_NUMBA = Library()


class Queue(NamedTuple):
    """Where a call is worked: on a stream of a device. ``library`` allocates its results."""

    handle: int
    device: int | None
    library: Library
    #: A Numba stream, or 0, which is Numba's default stream.
    stream: Any


def stream_handle(stream: Any) -> int:
    """The CUstream of a stream of Numba, PyTorch, CuPy or ``__cuda_stream__``, or of an int; 0 (default) for None."""
    if stream is None:
        return 0
    if isinstance(stream, Queue):
        return stream.handle
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    for name in ("cuda_stream", "ptr"):  # PyTorch, CuPy
        if isinstance(handle := getattr(stream, name, None), int):
            return handle
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "handle"):  # a Numba stream before numba-cuda had __cuda_stream__
        return int(getattr(stream.handle, "value", stream.handle) or 0)
    if SIMULATOR and hasattr(stream, "auto_synchronize"):
        return 0
    raise DTypeError(
        "stream must be None, an integer, a stream of Numba, PyTorch or CuPy, or have __cuda_stream__, "
        f"got {type(stream).__name__}"
    )


@functools.cache
def _external(handle: int) -> Any:
    """Numba's object for a stream; the same each time, because launch configurations are cached by its identity."""
    return cuda.external_stream(handle)


def as_stream(stream: Any) -> Any:
    """The stream to launch on: a Numba stream, or 0, which is Numba's default stream."""
    if isinstance(stream, Queue):
        return stream.stream
    if stream is None or hasattr(stream, "auto_synchronize"):  # Numba's own, and the simulator's
        return 0 if stream is None else stream
    handle = stream_handle(stream)
    return 0 if handle == 0 or SIMULATOR else _external(handle)


def synchronize(handle: int) -> None:
    """Wait for what is on a stream."""
    (as_stream(handle) or cuda.default_stream()).synchronize()


def as_queue(stream: Any) -> Queue:
    """The queue of a stream alone, on the current device; a queue as it is."""
    if isinstance(stream, Queue):
        return stream
    return Queue(stream_handle(stream), None, _NUMBA, as_stream(stream))


def described(arrays: dict[str, Any], stream: Any) -> dict[str, DeviceArray]:
    """What is known of device arrays, by name, that a call is to use on a stream."""
    handle = stream_handle(stream)
    return {name: describe(obj, handle) for name, obj in arrays.items() if obj is not None}


def queue_of(arrays: dict[str, Any], stream: Any, found: dict[str, DeviceArray] | None = None) -> Queue:
    """The queue of a call with these device arrays, by name, the first being the one whose library counts.

    Without a ``stream``, it is the one that the library's user is on, else the one that an array was made on. ``found``
    is what :func:`described` says of the arrays, if that is known.
    """
    if found is None:
        found = described(arrays, stream)
    devices = {name: array.device for name, array in found.items() if array.device is not None}
    if len(set(devices.values())) > 1:
        places = ", ".join(f"{name} on device {device}" for name, device in devices.items())
        raise DeviceMismatchError(f"arrays must be on one device: {places}")
    device = next(iter(devices.values()), None)
    library = library_of(next(iter(arrays.values())))
    if stream is None:
        handle = library.current_stream(device)
        if handle is None:
            handle = next((array.stream for array in found.values() if array.stream is not None), 0)
        return Queue(handle, device, library, as_stream(handle))
    return Queue(stream_handle(stream), device, library, as_stream(stream))


#: Nothing to do: it can be entered any number of times.
_HERE = nullcontext()


def on_device_of(stream: Any) -> Any:
    """A context in which the device of a queue is the current one."""
    device = as_queue(stream).device
    if device is None or (direct.bindings() is not None and direct.current_context() == direct.primary_context(device)):
        return _HERE
    return cuda.gpus[device]


def _configured(kernel: Any, blocks: int, threads: int, stream: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Grid size")  # a batch is as small as it is; in bold, at times
        return kernel[blocks, threads, stream]


if not SIMULATOR:  # whose kernels keep their last configuration in themselves
    _configured = functools.lru_cache(maxsize=512)(_configured)

#: What has been launched, by context, kernel and types of parameters; None: what only Numba can launch.
_functions: dict[Any, direct.Function | None] = {}
#: Far more than a program has: it is only that memory does not grow for ever.
_MOST_FUNCTIONS = 4096


def launch(kernel: Any, blocks: int, threads: int, stream: Any, *arguments: Any) -> None:
    """Run ``kernel`` with so many blocks; CUDA takes no grid without any, so none run for 0.

    The arguments are numbers and tuples of numbers, the tuples of a kernel as long each time.
    """
    if blocks <= 0:
        return
    queue = as_queue(stream)
    values = direct.flat(arguments)
    context = direct.current_context()
    if context and (queue.device is None or context == direct.primary_context(queue.device)):
        function = _functions.get((context, kernel, *map(type, values)))
        if function is not None and function.launch(blocks, threads, queue.handle, values):
            return
    with on_device_of(queue):
        _configured(kernel, blocks, threads, queue.stream)(*arguments)
        if direct.bindings() is not None:
            key = direct.current_context(), kernel, *map(type, values)  # there may have been no context before
            if key not in _functions:
                if len(_functions) >= _MOST_FUNCTIONS:
                    _functions.clear()
                _functions[key] = direct.function_of(kernel, arguments)
