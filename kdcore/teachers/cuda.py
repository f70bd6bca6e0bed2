"""Teacher logits on a CUDA device: of a forward that runs there, or streamed there from a teacher on the host."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore import engines
from kdcore.checks import integer
from kdcore.errors import (
    DeviceMismatchError,
    DomainError,
    DTypeError,
    EmptyForwardError,
    ShapeError,
    VocabularyMismatchError,
)
from kdcore.sequences import as_rows, pad_rows, prefixes
from kdcore.teachers.base import InputIds, TeacherLogitsProvider
from kdcore.teachers.mlp import MLPTeacher

__all__ = ["CudaTeacher", "device_batches"]

_FLOATS = ("float16", "bfloat16", "float32", "float64")

Forward = Callable[[list[NDArray[np.int64]]], Any]


class CudaTeacher:
    """Logits from a forward on a CUDA device. B rows, L positions, V classes.

    Parameters
    ----------
    source : callable, or path of a checkpoint
        A callable takes B rows of token ids (int64 arrays, of any lengths) and returns their logits as a device array
        of floats, [B, V] or, for every position of the rows padded to the longest, [B, L, V]: Numba's, or anything
        with ``__cuda_array_interface__`` (PyTorch, CuPy). A path is read as by :class:`~kdcore.MLPTeacher`.
    vocab_size : int
        V. Every result of a callable is held against it; with a path it is optional.
    activation : optional
        For a path: see :class:`~kdcore.MLPTeacher`.
    stream : optional
        For a path: the CUDA stream of its forward. A callable brings its own.

    Raises
    ------
    DeviceUnavailableError
        CUDA cannot run here; the message says why. There is no fallback to the CPU.
    EmptyForwardError
        The forward returned None, or nothing for rows that it was given.
    DeviceMismatchError
        The forward returned a host array.
    VocabularyMismatchError, ShapeError, DTypeError
        Its result has another width, another number of rows or positions, or is not of floats.

    Notes
    -----
    Results are checked by shape and dtype alone, so that :meth:`device_logits_for_batch` does not wait for the device.

    Its logits stay on the device for the loss and its gradient, as those of a teacher on the host do after
    :func:`device_batches`::

        teacher = CudaTeacher("teacher.safetensors", stream=stream)
        for batch in batches:  # with labels on the device
            logits = teacher.device_logits_for_batch(batch.input_ids)
            result = kdcore.kd_loss_and_gradient(student(batch), logits, batch.labels, 2.0, 0.1, stream=stream)

        with HDF5Teacher("teacher.h5") as teacher:
            for batch, logits in device_batches(teacher, batches, stream=stream):
                result = kdcore.kd_loss_and_gradient(student(batch), logits, batch.labels, 2.0, 0.1, stream=stream)
    """

    _forward: Forward  # of a callable

    def __init__(
        self,
        source: Forward | str | os.PathLike[str],
        vocab_size: int | None = None,
        *,
        activation: str | None = None,
        stream: Any = None,
    ) -> None:
        engines.require_cuda()
        self._mlp: MLPTeacher | None = None
        if isinstance(source, str | os.PathLike):
            self._mlp = MLPTeacher(source, vocab_size, activation=activation, device="cuda", stream=stream)
            self._vocab_size = self._mlp.vocab_size
            return
        if not callable(source):
            raise DTypeError(f"source must be a callable or a path, got {type(source).__name__}")
        if activation is not None or stream is not None:
            raise DomainError("activation and stream are for a path; a callable brings its own")
        if vocab_size is None:
            raise DomainError("vocab_size is needed with a callable: its results are checked against it")
        self._forward = source
        self._vocab_size = integer(vocab_size, "vocab_size", least=1)

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        return self._vocab_size

    def device_logits_for_batch(self, input_ids: InputIds) -> Any:
        """What the forward returns for the rows, a device array [B, V] or [B, L, V], checked but as it is."""
        if self._mlp is not None:
            return self._mlp.device_logits_for_batch(input_ids)
        return self._checked(as_rows(input_ids))

    def logits_for_batch(self, input_ids: InputIds) -> NDArray[np.float32]:
        """Logits [B, V] of the token that follows each row, on the host."""
        if self._mlp is not None:
            return self._mlp.logits_for_batch(input_ids)
        rows = as_rows(input_ids)
        logits = _on_host(self._checked(rows))
        if logits.ndim == 2:
            return logits
        last = np.array([row.size - 1 for row in rows], np.int64)
        if (last < 0).any():
            raise ShapeError(f"input_ids[{int(np.argmin(last))}] is empty, so it has no last position to take")
        return np.ascontiguousarray(logits[np.arange(len(rows)), last])

    def logits_per_position(self, input_ids: InputIds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits [B, L, V] and the mask [B, L] of positions that exist; logits are 0 where none does.

        From a forward that returns [B, V], position l takes the logits of the prefix of l + 1 ids.
        """
        if self._mlp is not None:
            return self._mlp.logits_per_position(input_ids)
        rows = as_rows(input_ids)
        mask = pad_rows(rows)[1]
        logits = np.zeros((*mask.shape, self._vocab_size), np.float32)
        if mask.any():
            computed = self._checked(rows)
            if len(computed.shape) == 3:
                logits[mask] = _on_host(computed)[mask]
            else:
                seen = prefixes(rows)
                by_prefix = _on_host(self._checked(seen))
                if by_prefix.ndim != 2:
                    raise ShapeError(
                        f"the forward returned [B, V] for {len(rows)} rows, but the shape {by_prefix.shape} for "
                        f"their {len(seen)} prefixes"
                    )
                logits[mask] = by_prefix
        return logits, mask

    def _checked(self, rows: list[NDArray[np.int64]]) -> Any:
        """The forward's result for ``rows``, with the shape and dtype that it should have, on the device."""
        result = self._forward(rows)
        if result is None:
            raise EmptyForwardError(f"the forward returned None for {len(rows)} rows")
        if not engines.on_device(result):
            raise DeviceMismatchError(
                f"the forward must return an array on a CUDA device, got {type(result).__name__} on the host"
            )
        shape = tuple(result.shape)
        if rows and 0 in shape:
            raise EmptyForwardError(f"the forward returned nothing for {len(rows)} rows: an array of shape {shape}")
        if len(shape) not in (2, 3):
            raise ShapeError(f"the forward must return [B, V] or [B, L, V], got shape {shape}")
        if shape[-1] != self._vocab_size:
            raise VocabularyMismatchError(
                f"the forward returned {shape[-1]} classes, but vocab_size is {self._vocab_size}: "
                "checkpoint and configuration drifted apart"
            )
        if shape[0] != len(rows):
            raise ShapeError(f"the forward returned {shape[0]} rows for {len(rows)}")
        longest = max((row.size for row in rows), default=0)
        if len(shape) == 3 and shape[1] != longest:
            raise ShapeError(f"the forward returned {shape[1]} positions; the longest row has {longest}")
        dtype = str(result.dtype).rpartition(".")[2]  # PyTorch says torch.float32
        if dtype not in _FLOATS:
            raise DTypeError(f"the forward must return {', '.join(_FLOATS)}, got dtype {result.dtype}")
        return result


def _on_host(array: Any) -> NDArray[np.float32]:
    """A device array as float32 on the host."""
    values = engines.to_host(array)
    with np.errstate(over="ignore"):
        narrowed: NDArray[np.float32] = values.astype(np.float32)
    lost = np.isinf(narrowed) & np.isfinite(values)
    if lost.any():
        raise DomainError(f"the forward returned {values[lost][0]}, which does not fit float32")
    return narrowed


def device_batches(
    teacher: TeacherLogitsProvider, batches: Iterable[Any], *, stream: Any = None, ahead: int = 2
) -> Generator[tuple[Any, Any], None, None]:
    """Each batch with its logits [B, V] from a teacher on the host, as an array on the current CUDA device.

    While the device works on one batch, a thread asks the teacher for the next ones, and the first of these is copied
    through pinned memory on a stream of its own. Nothing waits for the work on ``stream``, unless it is so far behind
    that its buffers are needed.

    Parameters
    ----------
    teacher : TeacherLogitsProvider
        An :class:`~kdcore.HDF5Teacher` above all. It is asked in one thread, which is not the caller's.
    batches : iterable
        ``input_ids`` as the teacher takes them, or objects with an attribute ``for_teacher`` that holds them, such as
        :class:`kdcore.Batch`. Sizes may differ. It is iterated in the caller's thread, ``ahead`` batches early.
    stream : optional
        The CUDA stream of the work on the logits: of Numba, PyTorch, CuPy, a handle, or by default the default
        stream. Work on another stream has to be ordered with this one by the caller.
    ahead : int
        How many batches the teacher is asked for early, at least 1; and how many of the arrays yielded last are valid.

    Yields
    ------
    batch, logits
        In order: the batch as it was given, and its logits as an array of Numba's, of the teacher's dtype. Work may
        be queued on it until the iterator is asked for the batch ``ahead`` after it: with ``ahead=2`` **the present
        and the previous array are valid, older ones are overwritten**. The last ones stay after the end.

    Raises
    ------
    DeviceUnavailableError
        CUDA cannot run here.
    DeviceMismatchError
        The teacher's forward runs on the device: use its ``device_logits_for_batch``.
    DomainError, DTypeError
        ``ahead`` is not a positive integer; ``stream`` is no stream (when the first batch is asked for).

    Notes
    -----
    What the teacher or ``batches`` raises is raised in place of the batch that it belongs to, after all batches before
    it, and ends the iteration. Closing the iterator, or dropping it, waits for the read and the copy under way, and
    frees thread and buffers. On the host are at most the logits of ``ahead + 1`` batches, and the pinned memory of as
    many; on the device is room for ``ahead + 1``.
    """
    ahead = integer(ahead, "ahead", least=1)
    if isinstance(teacher, CudaTeacher) or (isinstance(teacher, MLPTeacher) and teacher.device == "cuda"):
        raise DeviceMismatchError("the teacher's logits are on the device already: use its device_logits_for_batch")
    engines.require_cuda()
    return _streamed(teacher, iter(batches), stream, ahead)


def _streamed(
    teacher: TeacherLogitsProvider, batches: Iterator[Any], stream: Any, ahead: int
) -> Generator[tuple[Any, Any], None, None]:
    ring = engines.transfer_ring(ahead, stream)
    reader = ThreadPoolExecutor(1, "kdcore-teacher")
    try:
        reads = _reads(teacher, batches, reader)
        pending = deque(islice(reads, ahead + 1))
        sent = False  # whether the first of them is on its way to the device
        while pending:
            batch, read = pending.popleft()
            if not sent:
                ring.send(read.result())
            del read  # and with it the logits on the host
            logits = ring.receive()
            # The next copy goes beside the work that the caller is about to queue; for a read it does not wait.
            sent = bool(pending) and pending[0][1].done() and pending[0][1].exception() is None
            if sent:
                ring.send(pending[0][1].result())
            yield batch, logits
            pending.extend(islice(reads, 1))
    finally:
        reader.shutdown(cancel_futures=True)
        ring.close()


def _reads(
    teacher: TeacherLogitsProvider, batches: Iterator[Any], reader: Executor
) -> Iterator[tuple[Any, Future[NDArray[np.float32]]]]:
    """Each batch, when it is asked for, with its logits to come; an error of ``batches`` as that of a last batch."""
    try:
        for batch in batches:
            yield batch, reader.submit(teacher.logits_for_batch, getattr(batch, "for_teacher", batch))
    except Exception as error:
        failed: Future[NDArray[np.float32]] = Future()
        failed.set_exception(error)
        yield None, failed
