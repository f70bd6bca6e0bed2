"""Where batches come from: synthetic tokens, arrays, shards of tokens."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import as_int64, file_path, flag, integer, number_in
from kdcore.errors import ConfigError, DomainError, DTypeError, EndOfDataError, FileFormatError, ShapeError

__all__ = ["ArrayBatchSource", "Batch", "BatchSource", "ShardBatchSource", "SyntheticBatchSource"]


@dataclass(frozen=True)
class Batch:
    """B rows of input, with a label a row [B], or one a position [B, L].

    Rows of different lengths have their labels padded: L is at least the longest row's length, and beyond the end of a
    row stands the ``ignore_index`` of the run. ``labels`` may be given as any array-like of integers.

    ``teacher_ids`` is what the teacher is asked with where that is not ``input_ids``: row numbers of a file of
    logits, say.
    """

    input_ids: Any
    labels: NDArray[np.int64]
    teacher_ids: Any = None

    def __post_init__(self) -> None:
        try:
            labels = np.asarray(self.labels)
        except ValueError:  # NumPy's word for rows of different lengths
            raise ShapeError(
                "labels must have shape [B] or [B, L], got rows of different lengths: pad them with ignore_index"
            ) from None
        if labels.ndim not in (1, 2):
            raise ShapeError(f"labels must have shape [B] or [B, L], got {labels.shape}")
        if not labels.size and labels.dtype == np.float64:  # what NumPy makes of []
            labels = labels.astype(np.int64)
        object.__setattr__(self, "labels", as_int64(labels, "labels"))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def for_teacher(self) -> Any:
        """The ids to ask the teacher with."""
        return self.input_ids if self.teacher_ids is None else self.teacher_ids


@runtime_checkable
class BatchSource(Protocol):
    """Batches of a data set, in passes. A pass gives each training row once; its last batch may be smaller."""

    def next_batch(self, batch_size: int) -> Batch:
        """The next rows of the pass. After the last: :class:`EndOfDataError`, or the next pass if the source wraps."""
        ...

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many batches make a pass."""
        ...

    def reset(self) -> None:
        """Begin the next pass."""
        ...

    def held_out(self) -> Batch:
        """The rows kept for validation, always the same and never in a training batch."""
        ...

    def state(self) -> dict[str, Any]:
        """Where the source stands, in what JSON knows; :meth:`restore` of it makes every later batch the same."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a :meth:`state`."""
        ...


class _Rows:
    """The order in which a pass visits ``count`` rows, and how far it has come: shared by all sources.

    ``origin`` says, in strings and integers, what else determines the rows: a state of another origin is refused.
    """

    def __init__(self, count: int, seed: int | None, *, wrap: bool = False, origin: Mapping[str, int | str]) -> None:
        self.count = count
        self.seed = seed if seed is None else integer(seed, "seed", least=0)
        self.wrap = wrap
        self.origin = origin
        self.epoch = 0
        self.position = 0
        self._shuffled: tuple[int, NDArray[np.int64]] | None = None

    def next(self, batch_size: int) -> NDArray[np.int64]:
        batch_size = integer(batch_size, "batch_size", least=1)
        if self.position >= self.count:
            if not self.wrap:
                raise EndOfDataError(f"all {self.count} rows of the pass have been given: reset() begins the next")
            self.reset()
        taken = self._order()[self.position : self.position + batch_size]
        self.position += len(taken)
        while self.wrap and len(taken) < batch_size:
            self.reset()
            more = self._order()[: batch_size - len(taken)]
            self.position = len(more)
            taken = np.concatenate([taken, more])
        return taken

    def reset(self) -> None:
        self.epoch += 1
        self.position = 0

    def state(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def restore(self, state: Mapping[str, Any]) -> None:
        identity = self._identity()
        if not isinstance(state, Mapping) or (missing := {"epoch", "position", *identity} - set(state)):
            lacking = f" without {', '.join(sorted(missing))}" if isinstance(state, Mapping) else ""
            raise ConfigError(f"state must be the state of a batch source like this one, got {state!r}{lacking}")
        for name, own in identity.items():
            if state[name] != own:
                raise ConfigError(f"the state of a batch source with {name} {state[name]} does not fit one with {own}")
        try:
            epoch = integer(state["epoch"], "epoch", least=0)
            position = integer(state["position"], "position", least=0)
        except (DomainError, DTypeError) as error:
            raise ConfigError(f"the state of a batch source: {error}") from None
        if position > self.count:
            raise ConfigError(f"the state of a batch source: position must be at most {self.count}, got {position}")
        self.epoch, self.position = epoch, position

    def _identity(self) -> dict[str, int | str]:
        return {
            "rows": self.count,
            "seed": -1 if self.seed is None else self.seed,
            "wrap": int(self.wrap),
            **self.origin,
        }

    def _order(self) -> NDArray[np.int64]:
        if self.seed is None:
            return np.arange(self.count)
        if self._shuffled is None or self._shuffled[0] != self.epoch:
            # A function of seed and pass alone, so that a resumed run sees the same order.
            self._shuffled = self.epoch, np.random.default_rng([self.seed, self.epoch]).permutation(self.count)
        return self._shuffled[1]


class _RowSource:
    """A source over rows [0, count) for training, of which ``_batch`` makes batches."""

    _rows: _Rows

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        raise TypeError(f"{type(self).__name__} does not say how rows become a batch")

    def next_batch(self, batch_size: int) -> Batch:
        """The next rows of the pass, fewer at its end unless the source wraps."""
        return self._batch(self._rows.next(batch_size))

    def batches_per_epoch(self, batch_size: int) -> int:
        """How many batches make a pass, the last one included where it is smaller."""
        return -(-self._rows.count // integer(batch_size, "batch_size", least=1))

    def reset(self) -> None:
        """Begin the next pass, in its own order."""
        self._rows.reset()

    def state(self) -> dict[str, Any]:
        """Where the source stands, and what tells it from others."""
        return self._rows.state()

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a :meth:`state`; that of another source is a :class:`ConfigError`."""
        self._rows.restore(state)


class SyntheticBatchSource(_RowSource):
    """Learnable tokens: row i repeats token i mod ``num_tokens`` and is labelled with it.

    Parameters
    ----------
    num_tokens : int
        The number of different rows.
    sequence_length : int
        Tokens a row.
    rows_per_epoch : int
        Rows that make a pass (the rows repeat after ``num_tokens``).
    per_position : bool
        Whether every position is labelled, [B, L], or each row, [B].

    The held-out rows are the first ``num_tokens``, once each: there is nothing else to know about this data.

    Examples
    --------
    >>> import kdcore
    >>> batch = kdcore.SyntheticBatchSource(3, sequence_length=2).next_batch(4)
    >>> batch.input_ids.tolist(), batch.labels.tolist()
    ([[0, 0], [1, 1], [2, 2], [0, 0]], [0, 1, 2, 0])
    """

    def __init__(
        self, num_tokens: int, *, sequence_length: int = 1, rows_per_epoch: int = 1000, per_position: bool = False
    ) -> None:
        self._num_tokens = integer(num_tokens, "num_tokens", least=1)
        self._length = integer(sequence_length, "sequence_length", least=1)
        self._per_position = flag(per_position, "per_position")
        self._rows = _Rows(
            integer(rows_per_epoch, "rows_per_epoch", least=1),
            None,
            origin={
                "num_tokens": self._num_tokens,
                "sequence_length": self._length,
                "per_position": int(self._per_position),
            },
        )

    def held_out(self) -> Batch:
        """Each of the different rows once."""
        return self._batch(np.arange(self._num_tokens))

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        tokens = rows % self._num_tokens
        ids = np.repeat(tokens[:, None], self._length, axis=1)
        return Batch(ids, ids if self._per_position else tokens)


class ArrayBatchSource(_RowSource):
    """Rows of arrays, shuffled from a seed.

    Parameters
    ----------
    input_ids : array [N, L]
        Token ids, or float features.
    labels : int array [N] or [N, L]
    teacher_ids : int array [N, K], optional
        What the teacher is asked with instead of ``input_ids``: with a row-addressed file of logits, row numbers
        [N, 1] (or [N, L] for labels a position).
    seed : int or None
        Shuffles every pass; None keeps the order.
    held_out : Batch or float
        The validation rows: a batch of their own, or the share of rows, in (0, 1), taken from the end.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> source = kdcore.ArrayBatchSource(np.arange(10)[:, None], np.arange(10), seed=0, held_out=0.2)
    >>> len(source.next_batch(16)), source.held_out().labels.tolist()
    (8, [8, 9])
    """

    def __init__(
        self,
        input_ids: Any,
        labels: Any,
        *,
        teacher_ids: Any = None,
        seed: int | None = 0,
        held_out: Batch | float = 0.1,
    ) -> None:
        self._inputs, self._labels = np.asarray(input_ids), as_int64(np.asarray(labels), "labels")
        self._teacher_ids = None if teacher_ids is None else np.asarray(teacher_ids)
        if self._labels.ndim not in (1, 2):
            raise ShapeError(f"labels must have shape [N] or [N, L], got {self._labels.shape}")
        total = len(self._labels)
        for name, array in (("input_ids", self._inputs), ("teacher_ids", self._teacher_ids)):
            if array is not None and (array.ndim < 2 or len(array) != total):
                raise ShapeError(f"{name} must have shape [{total}, ...] like labels, got {array.shape}")
        if isinstance(held_out, Batch):
            count, self._held_out = total, held_out
        else:
            count = total - _held_out_rows(total, held_out)
            self._held_out = self._batch(np.arange(count, total))
        shapes = {"input_ids": self._inputs.shape, "labels": self._labels.shape}
        self._rows = _Rows(count, seed, origin={name: str(list(shape)) for name, shape in shapes.items()})

    def held_out(self) -> Batch:
        """The batch that was given, or the rows taken from the end."""
        return self._held_out

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        teacher_ids = None if self._teacher_ids is None else self._teacher_ids[rows]
        return Batch(self._inputs[rows], self._labels[rows], teacher_ids)


class ShardBatchSource(_RowSource):
    """Next-token windows of token shards: every ``.bin`` file of a directory, little-endian uint32, by name.

    A shard is cut into windows of L + 1 tokens (the rest of a shard that fills no window is left out): L inputs, and
    as labels the token after the window, [B], or the token after each position, [B, L].

    Parameters
    ----------
    directory : path
    sequence_length : int
        L.
    per_position : bool
        Labels a position instead of labels a row.
    teacher_rows : bool
        Ask the teacher with row numbers instead of tokens: row r of its file belongs to token r of all shards in a
        row, and predicts token r + 1.
    vocab_size : int, optional
        If given, a token that is not below it is an error.
    wrap : bool
        Go on with the next pass in the middle of a batch, instead of ending a pass with :class:`EndOfDataError`. All
        batches are then of full size, and an epoch of the pipeline, ``batches_per_epoch`` batches, is a pass rounded up
        to whole batches: it ends up to ``batch_size - 1`` rows into the next pass, and the next epoch goes on there.
    seed : int or None
        Shuffles the windows of every pass; None keeps the order.
    held_out : float
        The share of windows kept for validation, in (0, 1): the last ones.

    Examples
    --------
    >>> import numpy as np, kdcore, tempfile, pathlib
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     np.arange(10, 30, dtype="<u4").tofile(pathlib.Path(directory, "part-0.bin"))
    ...     batch = kdcore.ShardBatchSource(directory, 4, held_out=0.25).next_batch(1)
    >>> batch.input_ids.tolist(), batch.labels.tolist()
    ([[10, 11, 12, 13]], [14])
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        sequence_length: int,
        *,
        per_position: bool = False,
        teacher_rows: bool = False,
        vocab_size: int | None = None,
        wrap: bool = False,
        seed: int | None = None,
        held_out: float = 0.1,
    ) -> None:
        self._length = integer(sequence_length, "sequence_length", least=1)
        self._per_position = flag(per_position, "per_position")
        self._teacher_rows = flag(teacher_rows, "teacher_rows")
        self._vocab_size = None if vocab_size is None else integer(vocab_size, "vocab_size", least=1)
        wrap = flag(wrap, "wrap")
        root = file_path(directory, "directory")
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a directory of token shards")
        self._paths = sorted(root.glob("*.bin"))
        if not self._paths:
            raise FileNotFoundError(f"{root} has no token shards (*.bin)")
        self._tokens = [_map_tokens(path) for path in self._paths]
        first_row = 0
        windows = []
        for shard, tokens in enumerate(self._tokens):
            starts = np.arange(len(tokens) // (self._length + 1)) * (self._length + 1)
            windows.append(np.stack([np.full_like(starts, shard), starts, starts + first_row], axis=1))
            first_row += len(tokens)
        #: shard, start in the shard, start in all shards; one row a window
        self._windows = np.concatenate(windows)
        total = len(self._windows)
        if total == 0:
            raise ShapeError(f"{root}: no shard has the {self._length + 1} tokens of a window")
        self._train = total - _held_out_rows(total, held_out)
        sizes = "".join(f"{path.name}\0{len(t)}\0" for path, t in zip(self._paths, self._tokens, strict=True))
        self._rows = _Rows(
            self._train,
            seed,
            wrap=wrap,
            origin={
                "sequence_length": self._length,
                "per_position": int(self._per_position),
                "shards": hashlib.blake2b(sizes.encode(errors="surrogateescape"), digest_size=8).hexdigest(),
            },
        )

    @property
    def token_count(self) -> int:
        """The tokens of all shards together; with ``teacher_rows``, as many rows as the teacher must have."""
        return sum(len(tokens) for tokens in self._tokens)

    def held_out(self) -> Batch:
        """The last windows."""
        return self._batch(np.arange(self._train, len(self._windows)))

    def _batch(self, rows: NDArray[np.int64]) -> Batch:
        windows = self._windows[rows]
        tokens = np.stack(
            [self._tokens[shard][start : start + self._length + 1] for shard, start, _ in windows]
        ).astype(np.int64)
        if self._vocab_size is not None and tokens.max() >= self._vocab_size:
            row, column = (int(i) for i in np.argwhere(tokens >= self._vocab_size)[0])
            shard, start, _ = windows[row]
            raise DomainError(
                f"{self._paths[shard]}: token {start + column} is {tokens[row, column]}, "
                f"outside the vocabulary [0, {self._vocab_size})"
            )
        teacher_ids = windows[:, 2:] + np.arange(self._length)
        return Batch(
            tokens[:, :-1],
            tokens[:, 1:] if self._per_position else tokens[:, -1],
            None if not self._teacher_rows else teacher_ids if self._per_position else teacher_ids[:, -1:],
        )


def _held_out_rows(total: int, share: float) -> int:
    """How many of ``total`` rows a share in (0, 1) keeps: at least one, and not all."""
    share = number_in(share, "held_out", 0, 1, high_open=True)
    rows = max(math.ceil(total * share), 1)
    if share == 0 or rows >= total:
        raise ConfigError(
            f"held_out={share} of {total} rows leaves {total - rows} to train on and {rows} to validate on"
        )
    return rows


def _map_tokens(path: Path) -> NDArray[np.uint32]:
    size = path.stat().st_size
    if size % 4:
        raise FileFormatError(f"{path}: {size} bytes are not a whole number of uint32 tokens")
    return np.memmap(path, "<u4", "r") if size else np.empty(0, "<u4")
