"""Host arrays on their way to a device: pinned buffers, and a stream for the copies, beside the one of the work."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import cuda

from kdcore.cuda.primitives import SIMULATOR
from kdcore.cuda.streams import as_stream
from kdcore.errors import DeviceUnavailableError

__all__ = ["TransferRing"]


def _event() -> Any:
    return cuda.event() if SIMULATOR else cuda.event(timing=False)


def _copy_stream() -> Any:
    """A stream that does not wait for the default stream, nor that for it, as for Numba's own streams they do."""
    if SIMULATOR:
        return cuda.stream()
    from cuda.bindings import driver

    cuda.current_context()  # makes it the thread's
    error, handle = driver.cuStreamCreate(driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise DeviceUnavailableError(f"no CUDA stream can be created: {error.name}")
    return cuda.external_stream(int(handle))


def _destroy(stream: Any) -> None:
    if not SIMULATOR:
        from cuda.bindings import driver

        driver.cuStreamDestroy(int(stream))


class _Buffer:
    """Memory on both sides, and the event after the copy from the one to the other."""

    __slots__ = ("array", "copied", "device", "host", "size")

    def __init__(self) -> None:
        self.size = 0
        self.host: Any = None
        self.device: Any = None
        self.array: Any = None  # the view that the receiver gets
        self.copied = _event()

    def reserve(self, size: int) -> None:
        # Arrays that somebody still has of the old memory keep it alive.
        if size > self.size:
            self.host = self.device = None
            self.host, self.device = cuda.pinned_array(size, np.uint8), cuda.device_array(size, np.uint8)
            self.size = size


class TransferRing:
    """Copies of host arrays on the current device, in the order in which they were sent.

    :meth:`send` starts a copy on a stream of the ring's own, :meth:`receive` makes the ``stream`` of the consumer's
    work wait for it, by an event. The host waits in one case: for the copy that was made from a pinned buffer the
    turn before, when the buffer is to be filled again. There are ``held + 1`` buffers on either side, which grow when
    an array is larger than all before it. Not for several threads at a time.

    Parameters
    ----------
    held : int
        How many of the arrays received last stay as they are: an array is overwritten once the work that was queued
        on ``stream`` before the ``held``-th :meth:`receive` after its own has finished.
    stream
        Where the work is queued that reads the arrays.
    """

    def __init__(self, held: int, stream: Any = None) -> None:
        self._buffers = [_Buffer() for _ in range(held + 1)]
        self._work, self._copies = as_stream(stream), _copy_stream()
        self._consumed = _event()
        self._sent = self._received = 0

    def send(self, array: np.ndarray) -> None:
        """Start the copy of an array, which may be changed afterwards. Only one may be under way."""
        if self._sent > self._received:
            raise RuntimeError("an array was sent that has not been received")
        buffer = self._buffers[self._sent % len(self._buffers)]
        self._sent += 1
        if not array.size:
            buffer.array = cuda.device_array(array.shape, array.dtype)
            return
        buffer.copied.synchronize()
        buffer.reserve(array.nbytes)
        host = buffer.host[: array.nbytes]
        np.copyto(host.view(array.dtype).reshape(array.shape), array)
        self._consumed.wait(self._copies)
        device = buffer.device[: array.nbytes]
        device.copy_to_device(host, stream=self._copies)
        buffer.copied.record(self._copies)
        buffer.array = device.view(array.dtype).reshape(array.shape)

    def receive(self) -> Any:
        """The array under way, as Numba's device array, for work that is queued on ``stream`` from now on."""
        if self._sent == self._received:
            raise RuntimeError("no array was sent")
        # What has been queued until now includes all work on the array whose turn to be overwritten is next.
        self._consumed.record(self._work)
        buffer = self._buffers[self._received % len(self._buffers)]
        self._received += 1
        buffer.copied.wait(self._work)
        array, buffer.array = buffer.array, None
        return array

    def close(self) -> None:
        """Wait for the copies and free the buffers, but for arrays that somebody still has."""
        if self._copies is not None:
            self._copies.synchronize()
            _destroy(self._copies)
            self._copies = None
            self._buffers.clear()
