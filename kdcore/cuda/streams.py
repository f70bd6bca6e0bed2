"""What callers pass as a stream, as what Numba and CuPy take; and the launch on it."""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext
from typing import Any

from numba import cuda

from kdcore.cuda import direct
from kdcore.cuda.arrays import DeviceArray
from kdcore.cuda.libraries import NUMBA, Queue, library_of
from kdcore.cuda.primitives import SIMULATOR
from kdcore.errors import DeviceMismatchError, DTypeError, KdcoreError

__all__ = [
    "Prepared",
    "Queue",
    "as_queue",
    "as_stream",
    "described",
    "launch",
    "launch_prepared",
    "on_device_of",
    "queue_of",
    "stream_handle",
    "synchronize",
]


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
        stream = stream.stream
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
    return Queue(stream_handle(stream), None, NUMBA, stream)


def described(arrays: dict[str, Any], stream: Any) -> dict[str, DeviceArray]:
    """What is known of device arrays, by name, that a call is to use on a stream."""
    handle, found = stream_handle(stream), {}
    for name, obj in arrays.items():
        if obj is not None:
            try:
                found[name] = obj if type(obj) is DeviceArray else library_of(obj).describe(obj, handle)
            except KdcoreError as error:
                raise type(error)(f"{name}: {error}") from None
    return found


def queue_of(arrays: dict[str, Any], stream: Any, found: dict[str, DeviceArray] | None = None) -> Queue:
    """The queue of a call with these device arrays, by name, the first being the one whose library counts.

    Without a ``stream``, it is the one that the library's user is on, else the one that an array was made on. ``found``
    is what :func:`described` says of the arrays, if that is known.
    """
    if found is None:
        found = described(arrays, stream)
    device = None
    for array in found.values():
        if array.device is not None and array.device != device:
            if device is not None:
                places = ", ".join(
                    f"{name} on device {of.device}" for name, of in found.items() if of.device is not None
                )
                raise DeviceMismatchError(f"arrays must be on one device: {places}")
            device = array.device
    library = library_of(next(iter(arrays.values())))
    if stream is None:
        handle = library.current_stream(device)
        if handle is None:
            handle = next((array.stream for array in found.values() if array.stream is not None), 0)
        stream = handle
    else:
        handle = stream_handle(stream)
    return Queue(handle, device, library, stream, _context_of(device))


def _context_of(device: int | None) -> int:
    """The calling thread's context, if it is the one of the device; else 0."""
    context = direct.current_context()
    return context if context and (device is None or context == direct.primary_context(device)) else 0


#: Nothing to do: it can be entered any number of times.
_HERE = nullcontext()


def on_device_of(stream: Any) -> Any:
    """A context in which the device of a queue is the current one."""
    queue = as_queue(stream)
    if queue.device is None or queue.context or _context_of(queue.device):
        return _HERE
    return cuda.gpus[queue.device]


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
    context = queue.context or _context_of(queue.device)
    if context:
        _launch(context, kernel, blocks, threads, queue, arguments)
    else:
        with on_device_of(queue):
            _launch(direct.current_context(), kernel, blocks, threads, queue, arguments)


def _launch(context: int, kernel: Any, blocks: int, threads: int, queue: Queue, arguments: tuple[Any, ...]) -> None:
    """The same in the context of the device, which is current; 0, if there is none yet."""
    values = direct.flat(arguments)
    types = tuple(map(type, values))
    function = _functions.get((context, kernel, *types))
    if function is not None and function.launch(blocks, threads, queue.handle, values):
        return
    _configured(kernel, blocks, threads, as_stream(queue))(*arguments)
    if direct.bindings() is not None:
        key = direct.current_context(), kernel, *types
        if key not in _functions:
            if len(_functions) >= _MOST_FUNCTIONS:
                _functions.clear()
            _functions[key] = direct.function_of(kernel, arguments)


class Prepared:
    """A launch of which all is known but the blocks, the stream and the numbers in the slots of its arguments.

    To type, to flatten and to write the fifty numbers of a KD kernel takes longer than the rest of a call; most of them
    are the same in each. ``codes``: the types of the slots, as ``struct`` calls them.
    """

    __slots__ = ("arguments", "codes", "functions", "kernel", "threads")

    def __init__(self, kernel: Any, threads: int, arguments: tuple[Any, ...], codes: str) -> None:
        self.kernel, self.threads, self.arguments, self.codes = kernel, threads, arguments, codes
        #: By context; None: what only Numba can launch.
        self.functions: dict[int, direct.Function | None] = {}


def launch_prepared(prepared: Prepared, blocks: int, stream: Any, *values: Any) -> None:
    """As :func:`launch`, with ``values`` in the slots."""
    if blocks <= 0:
        return
    queue = as_queue(stream)
    context = queue.context or _context_of(queue.device)
    if context:
        _launch_prepared(context, prepared, blocks, queue, values)
    else:
        with on_device_of(queue):
            _launch_prepared(direct.current_context(), prepared, blocks, queue, values)


def _launch_prepared(context: int, prepared: Prepared, blocks: int, queue: Queue, values: tuple[Any, ...]) -> None:
    """The same in the context of the device, which is current; 0, if there is none yet."""
    function = prepared.functions.get(context)
    if function is not None and function.launch(blocks, prepared.threads, queue.handle, values):
        return
    arguments = direct.filled(prepared.arguments, values)
    _configured(prepared.kernel, blocks, prepared.threads, as_stream(queue))(*arguments)
    if direct.bindings() is not None:
        context = direct.current_context()
        if context not in prepared.functions:
            slots = direct.slots_of(prepared.arguments, prepared.codes)
            prepared.functions[context] = direct.function_of(prepared.kernel, arguments, slots)
