"""A teacher whose forward runs on a CUDA device: a caller's own function, or a checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable
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
from kdcore.teachers.base import InputIds
from kdcore.teachers.mlp import MLPTeacher

__all__ = ["CudaTeacher"]

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

    Results are checked by shape and dtype alone, so that :meth:`device_logits_for_batch` does not wait for the device.
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
