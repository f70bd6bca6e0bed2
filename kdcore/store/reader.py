"""The reader of stores."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kdcore.arguments import as_temperature
from kdcore.checks import as_int64, file_path, flag, integer
from kdcore.cpu.stored import decode_rows
from kdcore.errors import (
    DomainError,
    DTypeError,
    FileFormatError,
    KdcoreError,
    MisalignedRowsError,
    MissingRowError,
    NonFiniteError,
    ProvenanceError,
    ShapeError,
    VocabularyMismatchError,
)
from kdcore.hdf5 import SafeFile
from kdcore.sequences import content_key
from kdcore.sparse import SampledRows, TopKRows
from kdcore.store.encoding import as_head, float32_of, head_fingerprint, ids_of, values_of
from kdcore.store.manifest import Manifest, read_manifest
from kdcore.store.schema import FORMAT, Header
from kdcore.store.shard import Shard

__all__ = ["LogitStore", "StoredSequence", "is_store"]

#: Classes whose logits are made of hidden states at a time.
_HEAD_BLOCK = 8192

Rows = TopKRows | SampledRows | NDArray[np.float32]


class StoredSequence(NamedTuple):
    """A sequence of a store, and the teacher's answers to it: row t is about what follows token t."""

    #: uint32 [L].
    input_ids: NDArray[np.uint32]
    #: As :meth:`LogitStore.read` returns them.
    rows: Any


class LogitStore:
    """A teacher's answers on disk: a shard, or all shards of a manifest as one. B rows of a request, V classes.

    Files need not be trusted (see :class:`kdcore.hdf5.SafeFile`): opening checks their structure, and the first read
    of a block its checksum and every value. Uncompressed shards are mapped into memory: who shortens a file that is
    open ends the process that reads it (SIGBUS). The store may be shared by threads, forked and pickled (as its path;
    what is there under it later must be the same store).

    Parameters
    ----------
    path
        A shard as :class:`~kdcore.LogitStoreWriter` writes it, or a ``manifest.json`` that ties many together:
        ``kdcore store manifest DIR``.
    recover : bool
        Read an unfinished shard (``.part``) up to its last commit.
    head : array [V, d], optional
        For hidden states: the output layer they were stored for, which makes logits of them.
    vocab_size, tokenizer_sha256, corpus_sha256 : optional
        What the student was made for. A store of another is an error.

    Raises
    ------
    FileNotFoundError
    FileFormatError, UnsafeFileError, ChecksumError
        A file that is not as described, or was damaged. Messages name the file, the dataset, the row and both values.
    VocabularyMismatchError, ProvenanceError
        A store of another vocabulary, tokenizer, corpus or head; shards that do not belong together.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np, kdcore
    >>> p = np.array([[0.5, 0.25, 0.125, 0.125], [0.125, 0.75, 0.0625, 0.0625]])
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with kdcore.LogitStoreWriter(f"{folder}/t.h5", vocab_size=4, k=2, capacity=8) as writer:
    ...         writer.append([7, 9], np.log(p))
    ...     with kdcore.LogitStore(f"{folder}/t.h5", vocab_size=4) as store:
    ...         rows = store.read([1])
    >>> rows.indices, np.exp(rows.log_probs).round(3), np.exp(rows.tail_logmass).round(3)
    (array([[1, 0]], dtype=int32), array([[0.75 , 0.125]], dtype=float32), array([0.125], dtype=float32))
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        recover: bool = False,
        head: NDArray[Any] | None = None,
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
        corpus_sha256: str | None = None,
    ) -> None:
        self.path: Path = file_path(path, "path").absolute()
        self._options = {
            "recover": flag(recover, "recover"),
            "head": head,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer_sha256,
            "corpus_sha256": corpus_sha256,
        }
        self._closed = False
        self._manifest: Manifest | None = None
        self._shards: list[Shard | None]
        with open(self.path, "rb") as file:
            is_manifest = file.read(256).lstrip()[:1] == b"{"
        if is_manifest:
            if recover:
                raise DomainError("recover=True is for an unfinished shard, not for a manifest")
            self._manifest = read_manifest(self.path)
            self._shards = [None] * len(self._manifest.shards)
            counts = [(entry.rows, entry.sequences) for entry in self._manifest.shards]
            self._header = self._shard(0).header
        else:
            shard = Shard(self.path, recover=recover)
            self._shards, self._header = [shard], shard.header
            counts = [(shard.rows, shard.sequences)]
        #: Where each shard's rows and sequences begin, and where the last one's end.
        self._row_starts, self._sequence_starts = (
            np.concatenate([[0], np.cumsum(np.array(column, np.int64))]) for column in zip(*counts, strict=True)
        )
        self._head: NDArray[Any] | None = None
        self._by_key: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None
        self._check_expectations()

    def _check_expectations(self) -> None:
        header, options = self._header, self._options
        if options["vocab_size"] is not None and options["vocab_size"] != header.vocab_size:
            raise VocabularyMismatchError(
                f"{self.path}: the teacher has {header.vocab_size} classes, but {options['vocab_size']} are expected"
            )
        for name in ("tokenizer_sha256", "corpus_sha256"):
            if options[name] is not None and options[name] != getattr(header, name):
                raise ProvenanceError(
                    f"{self.path}: {name} is {getattr(header, name)!r}, but {options[name]!r} is expected"
                )
        if options["head"] is None:
            return
        if header.kind != "hidden":
            raise DomainError(f"{self.path}: head is for a store of kind 'hidden', and this is {header.kind!r}")
        head = as_head(options["head"], header.vocab_size)
        found = head_fingerprint(head)
        if found != header.head_sha256:
            raise ProvenanceError(
                f"{self.path}: the hidden states belong to a head with the fingerprint {header.head_sha256}, "
                f"but that of the given one, {head.dtype} {head.shape}, is {found}"
            )
        self._head = head

    def _shard(self, i: int) -> Shard:
        shard = self._shards[i]
        if shard is None:  # threads may both open it; one of the two stays
            assert self._manifest is not None
            shard = self._shards[i] = self._manifest.open(self._manifest.shards[i])
        return shard

    # --- what there is -----------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        """The number of rows."""
        return int(self._row_starts[-1])

    @property
    def sequences(self) -> int:
        """The number of sequences."""
        return int(self._sequence_starts[-1])

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._header.vocab_size

    @property
    def kind(self) -> str:
        """What is kept of a row: "topk", "sampled", "dense" or "hidden"."""
        return self._header.kind

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that "topk" and "sampled" rows can be read at. Of all others the only one is 1: see read."""
        return self._header.temperatures

    @property
    def header(self) -> Header:
        """The attributes of the store, or of its first shard: provenance, encoding."""
        return self._header

    @property
    def shards(self) -> tuple[Path, ...]:
        """The files, in the order of their rows."""
        if self._manifest is None:
            return (self.path,)
        return tuple(self.path.parent / entry.name for entry in self._manifest.shards)

    def __repr__(self) -> str:
        return f"LogitStore({str(self.path)!r}, kind={self.kind!r}, rows={len(self)}, sequences={self.sequences})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self._options, self._header.store_uuid, len(self))

    def close(self) -> None:
        """Let go of the files; reading afterwards is a ValueError."""
        self._closed = True
        for shard in self._shards:
            if shard is not None:
                shard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self!r} is closed")

    # --- reading -----------------------------------------------------------------------------------------------------

    def read(self, rows: Any, temperature: float = 1.0, *, input_ids: Any = None, renormalize: bool = False) -> Rows:
        """Rows by number, as teacher's answers at ``temperature`` for a KD call with that temperature.

        Parameters
        ----------
        rows : int, slice, range, or integers [B]
            Row numbers, from 0 on.
        temperature : float
            Of "topk" and "sampled" stores one of :attr:`temperatures`. "dense" and "hidden" rows are logits, of which
            the call itself makes softmax(logits / temperature): they are the same at every temperature.
        input_ids : integers [B], optional
            The tokens that the rows should be behind; others are an error. It catches a shift, and another packing.
        renormalize : bool
            Of "topk": probabilities among the stored classes alone, with nothing elsewhere; at any temperature. At
            T = 2 that is a different teacher: prefer the tail.

        Returns
        -------
        TopKRows, SampledRows, or float32 [B, V]
            "dense": log-probabilities. "hidden": logits, made by the ``head`` that was given.

        Raises
        ------
        MissingRowError
            A negative number, or one beyond the last row.
        DomainError
            A temperature that is not stored.
        MisalignedRowsError
            Rows that are behind other tokens than ``input_ids``.
        ChecksumError, FileFormatError
            What is read for the first time was damaged, or is not what a teacher says.
        """
        self._check_open()
        runs = self._runs(rows)
        found = self._decoded(runs, temperature, renormalize)
        if input_ids is not None:  # behind the check of blocks, so that damaged tokens are called damaged
            self._check_alignment(runs, input_ids)
        return found

    def sequence(self, input_ids: Any, temperature: float = 1.0, *, renormalize: bool = False) -> Rows:
        """The rows of one sequence, found by its tokens [L]: L rows, of which row t is about what follows token t.

        The tokens that are stored are compared too, so that another sequence's rows cannot be returned. Parameters and
        errors as for :meth:`read`; a sequence that is not there is a :class:`~kdcore.MissingRowError`.
        """
        self._check_open()
        return self._decoded([self._find(input_ids)], temperature, renormalize)

    def rows_of(self, input_ids: Any) -> range:
        """The numbers of the rows of a sequence, found by its tokens."""
        self._check_open()
        i, numbers = self._find(input_ids)
        start = int(self._row_starts[i])
        return range(start + numbers.start, start + numbers.stop)

    def input_ids(self, sequence: int) -> NDArray[np.uint32]:
        """The tokens of a sequence by its number, uint32 [L]."""
        self._check_open()
        number = integer(sequence, "sequence")
        if not 0 <= number < self.sequences:
            raise MissingRowError(f"{self.path} has {self.sequences} sequences, and none with the number {number}")
        i, (start, stop) = self._bounds(number)
        shard = self._shard(i)
        _check_run(shard, start, stop)
        return shard.run("rows/input_id", start, stop).copy()

    def shuffled(
        self,
        seed: int,
        *,
        temperature: float = 1.0,
        part: int = 0,
        parts: int = 1,
        prefetch: int = 8,
        renormalize: bool = False,
    ) -> Iterator[StoredSequence]:
        """All sequences once, in an order that the seed decides, read ahead by a thread.

        Parameters
        ----------
        seed : int
            The same seed gives the same order; take another for each epoch.
        temperature, renormalize
            As for :meth:`read`.
        part, parts : int
            Every process or worker gets a part of the order: those with the places part, part + parts, ...
        prefetch : int
            Sequences that are read ahead. 0: none, without a thread.
        """
        self._check_open()
        parts = integer(parts, "parts", least=1)
        part, prefetch = integer(part, "part", least=0), integer(prefetch, "prefetch", least=0)
        if part >= parts:
            raise DomainError(f"part must be below parts = {parts}, got {part}")
        self._temperature_slot(temperature, renormalize)  # errors now, not at the first sequence
        order = np.random.default_rng(integer(seed, "seed", least=0)).permutation(self.sequences)[part::parts]

        def read(number: int) -> StoredSequence:
            self._check_open()
            i, (start, stop) = self._bounds(number)
            rows = self._decoded([(i, slice(start, stop))], temperature, renormalize)
            return StoredSequence(self._shard(i).run("rows/input_id", start, stop).copy(), rows)

        return _ahead(read, order.tolist(), prefetch)

    def verify(self) -> None:
        """Read everything: checksums (SHA-256 too, of shards in a manifest), every row, the keys of all sequences.

        Raises what :meth:`read` would, for the first thing that is wrong.
        """
        self._check_open()
        for i in range(len(self._shards)):
            if self._manifest is not None:
                self._manifest.verify(self._manifest.shards[i])
            self._shard(i).verify()

    # --- where rows are ----------------------------------------------------------------------------------------------

    def _runs(self, rows: Any) -> list[tuple[int, Any]]:
        """Rows as (shard, slice or numbers within it), in the order in which they were asked for; consecutive ones."""
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1 and start < stop and len(self._shards) == 1:
                return [(0, slice(start, stop))]
            numbers = np.arange(start, stop, step, dtype=np.int64)
        else:
            array = np.asarray(rows if not isinstance(rows, range) else np.arange(rows.start, rows.stop, rows.step))
            if array.dtype == bool:
                raise DTypeError("rows must be row numbers, got booleans")
            if array.ndim > 1:
                raise ShapeError(f"rows must be row numbers [B], got shape {array.shape}")
            numbers = np.empty(0, np.int64) if array.size == 0 else as_int64(array.reshape(-1), "rows")
        outside = np.flatnonzero((numbers < 0) | (numbers >= len(self)))
        if outside.size:
            raise MissingRowError(f"{self.path} has {len(self)} rows, and none with the number {numbers[outside[0]]}")
        if numbers.size == 0:
            return [(0, slice(0, 0))]
        if len(self._shards) == 1:
            return [(0, _slice_or(numbers))]
        owners = np.searchsorted(self._row_starts, numbers, side="right") - 1
        cuts = [0, *(np.flatnonzero(np.diff(owners)) + 1).tolist(), numbers.size]
        return [(int(owners[a]), _slice_or(numbers[a:b] - self._row_starts[owners[a]])) for a, b in pairwise(cuts)]

    def _find(self, input_ids: Any) -> tuple[int, slice]:
        key = content_key(input_ids)
        if self._by_key is None:  # of all shards, so that a store of a thousand is asked once
            keys = np.concatenate([self._shard(i).keys() for i in range(len(self._shards))])
            order = np.argsort(keys, kind="stable")
            self._by_key = keys[order], order
        keys, order = self._by_key
        place = int(keys.searchsorted(np.uint64(key)))
        given = np.asarray(input_ids)
        if place == keys.size or keys[place] != key:
            raise MissingRowError(f"{self.path} has no sequence of the tokens {_shown(given)} (key {key})")
        sequence = int(order[place])
        i, (start, stop) = self._bounds(sequence)
        shard = self._shard(i)
        _check_run(shard, start, stop)
        stored = shard.run("rows/input_id", start, stop)
        if stored.tobytes() != given.astype(np.uint32, copy=False).tobytes():  # a third of array_equal's time
            raise FileFormatError(
                f"{shard.path}: 'seq/id', row {sequence - int(self._sequence_starts[i])}: the {given.size} given "
                f"tokens have the key {key}, under which rows {start} to {stop - 1} keep {_shown(stored)} instead "
                f"of {_shown(given)}: the keys collide, or the file is damaged"
            )
        return i, slice(start, stop)

    def _bounds(self, sequence: int) -> tuple[int, tuple[int, int]]:
        i = 0
        if len(self._shards) > 1:
            i = int(self._sequence_starts.searchsorted(sequence, side="right")) - 1
        return i, self._shard(i).bounds(sequence - int(self._sequence_starts[i]))

    def _check_alignment(self, runs: list[tuple[int, Any]], input_ids: Any) -> None:
        stored = np.concatenate([_column(self._shard(i), "rows/input_id", numbers) for i, numbers in runs])
        given = np.asarray(input_ids).reshape(-1)
        given = as_int64(given, "input_ids") if given.size else given
        if given.shape != stored.shape:
            raise ShapeError(f"input_ids must have one token for each of {stored.size} rows, got {given.size}")
        wrong = np.flatnonzero(stored != given)
        if wrong.size:
            at = int(wrong[0])
            raise MisalignedRowsError(
                f"{self.path}: 'rows/input_id': row {at} of those asked for is behind the token {stored[at]}, but "
                f"input_ids[{at}] is {given[at]}: the batch is shifted, or was packed otherwise"
            )

    # --- what rows say -----------------------------------------------------------------------------------------------

    def _temperature_slot(self, temperature: Any, renormalize: bool) -> tuple[float, int]:
        """The temperature, and its place among those that are stored."""
        number = as_temperature(temperature)
        if flag(renormalize, "renormalize") and self.kind != "topk":
            raise DomainError(f"renormalize=True is for a store of kind 'topk', and this is {self.kind!r}")
        if self.kind in ("dense", "hidden") or renormalize:
            return number, 0
        if number not in self.temperatures:
            derived = " (its tail was derived at 1)" if self._header.tail_source == "derived" else ""
            other = "; renormalize=True can do without a tail" if self.kind == "topk" else ""
            raise DomainError(
                f"{self.path}: temperature {number} is not stored{derived}; stored are "
                f"{', '.join(map(str, self.temperatures))}{other}"
            )
        return number, self.temperatures.index(number)

    def _decoded(self, runs: list[tuple[int, Any]], temperature: Any, renormalize: bool) -> Rows:
        number, slot = self._temperature_slot(temperature, renormalize)
        parts = []
        for i, numbers in runs:
            shard = self._shard(i)
            if isinstance(numbers, slice):
                _check_run(shard, numbers.start, numbers.stop)
            else:
                for block in np.unique(numbers // shard.header.block_rows).tolist():
                    shard.check_blocks(block, block)
            parts.append(self._part(shard, numbers, number, slot, renormalize))
        if self.kind in ("dense", "hidden"):
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        columns = parts[0] if len(parts) == 1 else [np.concatenate(column) for column in zip(*parts, strict=True)]
        if self.kind == "topk":
            indices, log_probs, tail, n_valid = columns
            return TopKRows.of_arrays_that_fit(
                indices=indices, log_probs=log_probs, tail_logmass=tail, n_valid=n_valid, vocab_size=self.vocab_size,
                temperature=number,
            )  # fmt: skip
        indices, log_weights, n_valid = columns
        return SampledRows.of_arrays_that_fit(
            indices=indices, log_weights=log_weights, n_valid=n_valid, vocab_size=self.vocab_size, temperature=number
        )

    def _part(self, shard: Shard, numbers: Any, temperature: float, slot: int, renormalize: bool) -> Any:
        header = shard.header
        values = _column(shard, "rows/values", numbers)
        if header.kind == "dense":
            return float32_of(values)
        if header.kind == "hidden":
            return self._logits(float32_of(values))
        indices, n_valid = _column(shard, "rows/indices", numbers), _column(shard, "rows/n_valid", numbers)
        if header.kind == "sampled":  # weights add up to 1, at whichever temperature they are
            n_valid = n_valid[:, slot]
            tail = np.full(len(values), -np.inf, np.float32)
            return (
                ids_of(indices, header, slot),
                decode_rows(values_of(values, header, slot), tail, 1.0),
                n_valid.astype(np.int32),
            )
        if renormalize:
            tail = np.full(len(values), -np.inf, np.float32)
        else:
            tail = np.ascontiguousarray(_column(shard, "rows/tail_logmass", numbers)[:, slot])
        return ids_of(indices, header, 0), decode_rows(values, tail, temperature), tail, n_valid.astype(np.int32)

    def _logits(self, states: NDArray[np.float32]) -> NDArray[np.float32]:
        """logits = softcap tanh(scale h W' / softcap), a block of classes at a time."""
        if self._head is None:
            raise DomainError(f"{self.path}: logits are made of hidden states by the head: give head=, [V, d]")
        scale, cap = np.float32(self._header.logit_scale), np.float32(self._header.logit_softcap)
        logits = np.empty((len(states), self.vocab_size), np.float32)
        for start in range(0, self.vocab_size, _HEAD_BLOCK):
            block = logits[:, start : start + _HEAD_BLOCK]
            with np.errstate(over="ignore", invalid="ignore"):  # overflow is looked for, or is what tanh bounds
                block[...] = states @ self._head[start : start + _HEAD_BLOCK].astype(np.float32).T
                block *= scale
                if not np.isfinite(block).all():
                    row, column = np.argwhere(~np.isfinite(block))[0].tolist()
                    raise NonFiniteError(
                        f"{self.path}: the logit of class {start + column} from hidden states [{row}] of those asked "
                        f"for is {block[row, column]}: the head and logit_scale take it beyond float32"
                    )
                if cap > 0:
                    block /= cap
                    np.tanh(block, out=block)
                    block *= cap
        return logits


def is_store(path: Any) -> bool:
    """Whether there is a store under a path: a shard by its format, or a manifest. Other files are not an error."""
    place = file_path(path, "path")
    if not place.is_file():
        return False
    with open(place, "rb") as file:
        if file.read(256).lstrip()[:1] == b"{":
            return True
    try:
        with SafeFile(place, locking=False) as shard:
            return shard.attribute("/", "format", str) == FORMAT
    except (KdcoreError, OSError):
        return False


def _reopened(path: Path, options: dict[str, Any], store_uuid: str, rows: int) -> LogitStore:
    """A store that was pickled: what is there under its path now must be the same."""
    store = LogitStore(path, **options)
    found = store.header.store_uuid, len(store)
    if found != (store_uuid, rows):
        store.close()
        raise ProvenanceError(
            f"{path} is now the store {found[0]} of {found[1]} rows; pickled was {store_uuid} of {rows}"
        )
    return store


def _slice_or(numbers: NDArray[np.int64]) -> slice | NDArray[np.int64]:
    """Consecutive ascending numbers as a slice."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first == numbers.size - 1 and (numbers.size < 3 or bool((np.diff(numbers) == 1).all())):
        return slice(first, last + 1)
    return numbers


def _check_run(shard: Shard, start: int, stop: int) -> None:
    if stop > start:
        shard.check_blocks(start // shard.header.block_rows, (stop - 1) // shard.header.block_rows)


def _column(shard: Shard, name: str, numbers: Any) -> NDArray[Any]:
    if isinstance(numbers, slice):
        return shard.run(name, numbers.start, numbers.stop)
    return shard.gather(name, numbers)


def _shown(ids: NDArray[Any]) -> str:
    first = ", ".join(map(str, ids.reshape(-1)[:8].tolist()))
    return f"[{first}, ...] ({ids.size})" if ids.size > 8 else f"[{first}]"


def _ahead(read: Callable[[int], StoredSequence], numbers: Iterable[int], prefetch: int) -> Iterator[StoredSequence]:
    """``read`` of each number, in a thread that is so many ahead; its errors are raised here."""
    if prefetch == 0:
        yield from map(read, numbers)
        return
    results: queue.Queue[Any] = queue.Queue(prefetch)
    stop = threading.Event()

    def offer(result: Any) -> bool:
        while not stop.is_set():
            try:
                results.put(result, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for number in numbers:
                if not offer(read(number)):
                    return
            offer(None)
        except BaseException as error:
            offer(error)

    thread = threading.Thread(target=work, name="kdcore-store", daemon=True)
    thread.start()
    try:
        while True:
            try:
                result = results.get(timeout=1)
            except queue.Empty:
                if thread.is_alive():
                    continue
                raise RuntimeError(
                    "the thread that reads ahead stayed behind when the process forked: call shuffled in the fork"
                ) from None
            if result is None:
                return
            if isinstance(result, BaseException):
                raise result
            yield result
    finally:
        stop.set()
        thread.join()
