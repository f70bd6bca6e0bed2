"""What callers pass as a stream, as what Numba and CuPy take; and the launch on it."""

from __future__ import annotations

import functools
import warnings
from typing import Any

from numba import cuda

from kdcore.cuda.primitives import SIMULATOR, THREADS
from kdcore.errors import DTypeError

__all__ = ["as_stream", "launch", "stream_handle"]


def stream_handle(stream: Any) -> int:
    """The CUstream of a stream of Numba, PyTorch, CuPy or ``__cuda_stream__``, or of an int; 0 (default) for None."""
    if stream is None:
        return 0
    if isinstance(stream, int) and not isinstance(stream, bool):
        return stream
    for name in ("cuda_stream", "ptr"):  # PyTorch, CuPy
        if isinstance(handle := getattr(stream, name, None), int):
            return handle
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    if hasattr(stream, "handle"):  # a Numba stream before numba-cuda had __cuda_stream__
        return int(getattr(stream.handle, "value", stream.handle) or 0)
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
    if stream is None or hasattr(stream, "auto_synchronize"):  # Numba's own, and the simulator's
        return 0 if stream is None else stream
    handle = stream_handle(stream)
    return 0 if handle == 0 or SIMULATOR else _external(handle)


def _configured(kernel: Any, blocks: int, stream: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Grid size")  # a batch is as small as it is
        return kernel[blocks, THREADS, stream]


if not SIMULATOR:  # whose kernels keep their last configuration in themselves
    _configured = functools.lru_cache(maxsize=512)(_configured)


def launch(kernel: Any, blocks: int, stream: Any, *arguments: Any) -> None:
    """Run ``kernel`` with so many blocks; CUDA takes no grid without any, so none run for 0."""
    if blocks > 0:
        _configured(kernel, blocks, as_stream(stream))(*arguments)
