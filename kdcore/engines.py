"""The engines: which of them a call's arrays are for, and on which threads or stream it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np

from kdcore.checks import integer
from kdcore.cuda import presence
from kdcore.cuda.presence import owns as on_device
from kdcore.errors import DeviceMismatchError, DomainError

__all__ = [
    "Engine",
    "engine_of",
    "host_engine",
    "on_device",
    "require_cuda",
    "resolve_threads",
    "to_device",
    "to_host",
    "transfer_ring",
]

#: Beyond any machine's cores: a larger number is a mistake, and would start as many threads.
_MOST_THREADS = 1024


@cache
def _modules(engine: str) -> tuple[Any, Any]:
    return import_module(f"kdcore.{engine}"), import_module(f"kdcore.{engine}.memory")


@cache
def _streams() -> Any:
    return import_module("kdcore.cuda.streams")


@cache
def _nothing(dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.empty(shape, dtype)


class Engine:
    """An engine's functions, its memory, and the value of its last parameter (threads or stream)."""

    __slots__ = ("_known", "kernels", "memory", "on_host", "where")

    def __init__(self, name: str, where: Any, known: Mapping[str, Any] = MappingProxyType({})) -> None:
        self.kernels, self.memory = _modules(name)
        self.where = where
        #: What has been found of the arrays of a call, by their names.
        self._known = known
        #: Whether its arrays are NumPy's, whose values can be looked at without waiting.
        self.on_host = name == "cpu"

    def as_array(self, obj: Any, name: str) -> Any:
        """``obj``, that of the call's arrays of this name, as one of the engine; without a copy where it is one."""
        known = self._known.get(name)
        return self.memory.as_array(obj) if known is None or known.owner is not obj else known

    def empty(self, shape: Any, dtype: Any) -> Any:
        return self.memory.empty(shape, dtype, self.where)

    def scratch(self, shape: Any, dtype: Any) -> Any:
        """As :meth:`empty`, of an array that is dropped once the work that uses it is queued."""
        return self.empty(shape, dtype) if self.on_host else self.memory.scratch(shape, dtype, self.where)

    def scratch_of(self, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[Any]:
        """Arrays of these shapes as :meth:`scratch` makes them, in one allocation where that takes time."""
        if self.on_host:
            return [self.empty(shape, dtype) for shape in shapes]
        return self.memory.scratch_of(shapes, dtype, self.where)

    def number(self, value: float) -> Any:
        """A float64 array [1] of a number that is known."""
        return self.full((1,), np.float64, value) if self.on_host else self.memory.Number(value, self.where)

    def nothing(self, dtype: Any, shape: tuple[int, ...] = (0,)) -> Any:
        """An array without elements, for an argument that is not given."""
        return _nothing(dtype, shape) if self.on_host else self.memory.nothing(dtype, shape)

    def hand_over(self, array: Any) -> Any:
        """A result as the caller gets it: NumPy's, or of the library whose array came first."""
        return array[()] if self.on_host else self.memory.hand_over(array, self.where)

    def hand_over_parts(self, array: Any, shape: tuple[int, ...]) -> list[Any]:
        """The parts of a contiguous array that its first dimension counts, in a shape, as :meth:`hand_over` does."""
        if self.on_host:
            return [part.reshape(shape)[()] for part in array]
        return self.memory.hand_over_parts(array, shape, self.where)

    def full(self, shape: Any, dtype: Any, value: Any) -> Any:
        return self.memory.full(shape, dtype, value, self.where)


@cache
def _default_threads() -> int:
    """The number of CPUs that this process may use, at the first call: asking takes longer than a small kernel."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resolve_threads(threads: int | None) -> int:
    """The number of CPU threads: ``threads``, else ``KDCORE_NUM_THREADS``, else the CPUs that the process may use."""
    if threads is not None:
        return _threads(threads, "threads")
    text = os.environ.get("KDCORE_NUM_THREADS")
    if not text:
        return _default_threads()
    if not re.fullmatch("[0-9]{1,9}", text.strip()):
        raise DomainError(f"the environment variable KDCORE_NUM_THREADS must be a positive integer, got {text[:80]!r}")
    return _threads(int(text), "the environment variable KDCORE_NUM_THREADS")


def _threads(value: Any, name: str) -> int:
    threads = integer(value, name, least=1)
    if threads > _MOST_THREADS:
        raise DomainError(f"{name} must be at most {_MOST_THREADS}, got {threads}")
    return threads


def engine_of(arrays: dict[str, Any], threads: int | None, stream: Any) -> Engine:
    """The engine of the device on which all ``arrays`` live; None entries do not count."""
    device = _on_device(arrays)
    if not device:
        if stream is not None:
            raise DomainError(f"stream={stream!r} is for device arrays; host arrays take threads")
        return _cpu(resolve_threads(threads))
    if len(device) < len(arrays):
        host = [name for name, obj in arrays.items() if obj is not None and name not in device]
        if host:
            raise DeviceMismatchError(
                f"arrays must be all on the host or all on a device: {', '.join(device)} on a device, "
                f"{', '.join(host)} not"
            )
    if threads is not None:
        raise DomainError(f"threads={threads!r} is for host arrays; device arrays take stream")
    require_cuda()
    streams = _streams()
    found = streams.described(device, stream)
    return Engine("cuda", streams.queue_of(device, stream, found), found)


def _on_device(arrays: dict[str, Any]) -> dict[str, Any]:
    return {
        name: obj
        for name, obj in arrays.items()
        if obj is not None and not isinstance(obj, np.ndarray) and on_device(obj)
    }


@cache
def _cpu(threads: int) -> Engine:
    return Engine("cpu", threads)


def host_engine(function: str, arrays: dict[str, Any], threads: int | None) -> Engine:
    """The CPU engine, for a function that has no other; an array on a device is an error."""
    device = _on_device(arrays)
    if device:
        raise DeviceMismatchError(f"{function} works on host arrays only, but on a device are {', '.join(device)}")
    return _cpu(resolve_threads(threads))


def require_cuda() -> None:
    """Raise :class:`~kdcore.errors.DeviceUnavailableError`, with the reason, unless CUDA can run here."""
    presence.require()


def to_device(array: np.ndarray, stream: Any = None) -> Any:
    """A copy of a host array on the CUDA device."""
    require_cuda()
    return import_module("kdcore.cuda.memory").to_device(array, stream).owner


def transfer_ring(held: int, stream: Any = None) -> Any:
    """A :class:`kdcore.cuda.transfers.TransferRing`: copies to the CUDA device beside the work on ``stream``."""
    require_cuda()
    return import_module("kdcore.cuda.transfers").TransferRing(held, stream)


def to_host(array: Any) -> np.ndarray:
    """A device array as a NumPy array (waits for the device); a NumPy array as it is."""
    if not on_device(array):
        return np.asarray(array)
    require_cuda()
    memory = import_module("kdcore.cuda.memory")
    return memory.to_host(memory.as_array(array))
