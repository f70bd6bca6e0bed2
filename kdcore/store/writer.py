"""The writer of a shard.

HDF5 makes the file, with all its arrays at their full size, and is not asked again until the shard is finished: rows go
to where the arrays lie. So a writer that is killed leaves HDF5's own structures whole, and the last commit says what of
the arrays is data.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import os
import re
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdcore import rowstatus
from kdcore._version import __version__
from kdcore.arguments import as_logits, check_logits
from kdcore.checks import choice, file_path, integer, number_in, positive_number
from kdcore.cpu.selection import draw_rows, select_rows
from kdcore.engines import Engine, host_engine, on_device, resolve_threads
from kdcore.errors import (
    CapacityError,
    ClosedShardError,
    DeviceMismatchError,
    DiskFullError,
    DomainError,
    DTypeError,
    FileFormatError,
    NonFiniteError,
    RepeatedSequenceError,
    ShapeError,
    ShardBusyError,
    ShardExistsError,
    VocabularyMismatchError,
)
from kdcore.hdf5 import create_preallocated, set_integer, sync
from kdcore.ops import log_softmax
from kdcore.sequences import content_key
from kdcore.sparse import TopKRows
from kdcore.store.device import as_tensor, host_copy, log_softmax_tensor, select_tensor
from kdcore.store.encoding import as_head, encode_ids, encode_values, head_fingerprint
from kdcore.store.schema import (
    KINDS,
    MAX_K,
    MAX_VOCABULARY,
    PART,
    SCALES,
    VALUE_DTYPES,
    Commit,
    Header,
    as_temperatures,
    bits_for,
    block_rows_for,
    check_header,
    crc32_of,
)
from kdcore.store.shard import Shard, check_rows

__all__ = ["LogitStoreWriter"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: By default: those of most recipes.
_TEMPERATURES = (1.0, 2.0)
_FIRST_OFFSET_CRC = zlib.crc32(bytes(8))


class LogitStoreWriter:
    """Writes one shard of a :class:`~kdcore.LogitStore`: a teacher's answers to sequences. L tokens, V classes.

    Rows go to ``path`` with ``.part`` behind its name, which is renamed when the shard is finished: by :meth:`close`,
    or by leaving the ``with`` block without an error. What is committed survives a crash at any moment, and
    :meth:`resume` goes on behind it. One writer makes one shard; many writers make many.

    Parameters
    ----------
    path
        The shard, such as ``"teacher-00007.h5"``. Its directory must exist, and it must not.
    vocab_size : int
        V.
    kind : {"topk", "dense", "sampled", "hidden"}
        What is kept of a row. "topk": log-probabilities of the ``k`` likeliest classes, and for each temperature the
        log of what all others hold. "sampled": ``head_k`` likeliest classes exactly, and ``draws`` draws with
        replacement from the others, at each temperature; its expectation is the softmax (head_k = 0: Random Sampling
        KD, Anshumann et al. 2025). "dense": log-probabilities of all classes. "hidden": hidden states, from which
        ``head`` makes the logits.
    k : int, optional
        Of "topk": 64 by default, at most V.
    temperatures : sequence of float
        At which "topk" and "sampled" can be read. 1 is always among them. "dense" and "hidden" rows can be used at any.
    capacity : int
        Rows that the shard can hold; a row is 250 to 320 bytes with k = 64. The disk space is reserved at once.
    block_rows : int, optional
        Rows that share a checksum, and are checked when the first of them is read; by default about 256 KiB.
    value_dtype : {"float16", "bfloat16", "float32"}
        Of log-probabilities and hidden states. In float16 a log-probability is off by at most 2^-11 of itself.
    head_k, draws, seed : int
        Of "sampled" alone, which needs ``draws``. What is drawn depends on the seed and the sequence alone.
    head : array [V, d], logit_scale, logit_softcap : float
        Of "hidden" alone, which needs ``head``: logits = softcap · tanh(scale · h · headᵀ / softcap), or without
        softcap (0) scale · h · headᵀ. Of the head a fingerprint is kept.
    teacher, teacher_revision, tokenizer_sha256, corpus_sha256 : str
        Where the rows come from. Readers can demand them; shards of one store must agree in them.
    shard_index : int
        The place of the shard among those of a store.
    tail_source : {"producer", "derived"}
        Of "topk": "derived" where tails are 1 minus the head because the teacher did not say them, for
        :meth:`append_rows`. Nothing can be derived at other temperatures than 1, so there are none.
    threads : int, optional
        As for :func:`kdcore.kd_loss`.

    Raises
    ------
    ShardExistsError, ShardBusyError, DiskFullError
        The shard is there, finished or begun; another writer has it; there is no room for the capacity.
    DomainError, DTypeError
        An argument that cannot be, or that the kind does not take.

    Examples
    --------
    >>> import tempfile
    >>> import numpy as np, kdcore
    >>> logits = np.random.default_rng(0).normal(size=(3, 1000)).astype(np.float32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with kdcore.LogitStoreWriter(f"{folder}/t.h5", vocab_size=1000, k=4, capacity=100) as writer:
    ...         writer.append([5, 6, 7], logits)
    ...     with kdcore.LogitStore(f"{folder}/t.h5") as store:
    ...         rows = store.sequence([5, 6, 7], temperature=2.0)
    >>> bool((rows.indices == np.argsort(-logits, axis=1)[:, :4]).all()), rows.temperature
    (True, 2.0)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        vocab_size: int,
        kind: str = "topk",
        k: int | None = None,
        temperatures: Iterable[float] = _TEMPERATURES,
        capacity: int,
        block_rows: int | None = None,
        value_dtype: str = "float16",
        head_k: int = 0,
        draws: int | None = None,
        seed: int = 0,
        head: NDArray[Any] | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float = 0.0,
        teacher: str = "",
        teacher_revision: str = "",
        tokenizer_sha256: str = "",
        corpus_sha256: str = "",
        shard_index: int = 0,
        tail_source: str = "producer",
        threads: int | None = None,
    ) -> None:
        choice(tail_source, "tail_source", ("producer", "derived"))
        choice(kind, "kind", KINDS)
        choice(value_dtype, "value_dtype", VALUE_DTYPES)
        vocab_size = int(number_in(integer(vocab_size, "vocab_size"), "vocab_size", 1, MAX_VOCABULARY))
        capacity = integer(capacity, "capacity", least=1)
        _refuse_foreign(
            kind,
            topk={"k": k, "tail_source": None if tail_source == "producer" else tail_source},
            sampled={"head_k": head_k or None, "draws": draws, "seed": seed or None},
            hidden={
                "head": head,
                "logit_scale": None if logit_scale == 1 else logit_scale,
                "logit_softcap": logit_softcap or None,
            },
        )
        fingerprint = ""
        if kind == "topk":
            width = min(64, vocab_size) if k is None else integer(k, "k", least=1)
            if width > min(vocab_size, MAX_K):
                raise DomainError(f"k must be at most {min(vocab_size, MAX_K)} of {vocab_size} classes, got {width}")
        elif kind == "sampled":
            if draws is None:
                raise DomainError("kind='sampled' needs draws, the number of draws from each row")
            head_k = int(number_in(integer(head_k, "head_k"), "head_k", 0, MAX_K))
            draws = int(number_in(integer(draws, "draws"), "draws", 1, MAX_K))
            if head_k > vocab_size:
                raise DomainError(f"head_k must be at most {vocab_size} of {vocab_size} classes, got {head_k}")
            if head_k + draws > MAX_K:
                raise DomainError(f"head_k + draws must be at most {MAX_K}, got {head_k + draws}")
            width = min(head_k + draws, vocab_size)  # more distinct classes there are not
        elif kind == "dense":
            width = vocab_size
        else:
            head = as_head(head, vocab_size)
            width, fingerprint = head.shape[1], head_fingerprint(head)
        sparse = kind in ("topk", "sampled")
        stored_at = as_temperatures(temperatures)
        if not sparse or tail_source == "derived":
            if stored_at not in ((1.0,), as_temperatures(_TEMPERATURES)):
                kept = f"kind={kind!r}" if not sparse else "derived tails"
                raise DomainError(f"temperatures={stored_at} are of no use with {kept}, which are stored at 1 alone")
            stored_at = (1.0,)
        bits = bits_for(vocab_size) if sparse else 0
        header = Header(
            kind=kind,
            vocab_size=vocab_size,
            k=width,
            value_dtype=value_dtype,
            index_encoding=("uint16" if bits <= 16 else "packed") if sparse else "none",
            index_bits=bits,
            temperatures=stored_at,
            tail_source=tail_source if kind == "topk" else "none",
            block_rows=1,
            head_k=head_k,
            draws=draws or 0,
            seed=integer(seed, "seed"),
            head_sha256=fingerprint,
            logit_scale=positive_number(logit_scale, "logit_scale"),
            logit_softcap=number_in(logit_softcap, "logit_softcap", 0, SCALES[1]),
            shard_index=integer(shard_index, "shard_index", least=0),
            store_uuid=uuid.uuid4().hex,
            writer=f"kdcore {__version__}",
            teacher=_text(teacher, "teacher"),
            teacher_revision=_text(teacher_revision, "teacher_revision"),
            tokenizer_sha256=_sha256(tokenizer_sha256, "tokenizer_sha256"),
            corpus_sha256=_sha256(corpus_sha256, "corpus_sha256"),
        )
        self._create(path, header, capacity, block_rows, threads)

    def _create(
        self,
        path: str | os.PathLike[str],
        header: Header,
        capacity: int,
        block_rows: int | None,
        threads: int | None,
    ) -> None:
        """Make the file of a header whose blocks are to be chosen yet, and take it."""
        columns = header.columns()
        rows = block_rows_for(columns) if block_rows is None else integer(block_rows, "block_rows", least=1)
        header = replace(header, block_rows=rows)
        check_header(header)
        self._start(path, threads)
        self._refuse_present()
        arrays = {column.name: (column.dtype, column.shape(capacity)) for column in columns}
        arrays["seq/offsets"] = ("<u8", (capacity + 1,))
        arrays["seq/id"] = ("<u8", (capacity,))
        arrays["blocks/crc32"] = ("<u4", (-(-capacity // rows), len(columns)))
        arrays["commit"] = ("<u8", (2, 64))
        # Whoever has locked this file may make the part of it. What a writer leaves that is killed here is overwritten.
        new = self._part.with_name(self._part.name + ".new")
        with _room(self._part, capacity), contextlib.ExitStack() as on_failure:
            self._fd = os.open(new, os.O_RDWR | os.O_CREAT, 0o666)
            on_failure.callback(self._release)
            self._lock(new)
            on_failure.callback(os.unlink, new)
            self._refuse_present()
            # Asked for before HDF5 makes the file, since some of its versions do not survive that there is no room; and
            # again afterwards, since HDF5 begins by emptying the file.
            self._reserve(sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in arrays.values()))
            offsets = create_preallocated(new, arrays, header.attributes())
            self._reserve(os.fstat(self._fd).st_size)
            self._adopt(header, capacity, offsets)
            self._write("seq/offsets", 0, np.zeros(1, "<u8"))
            self._write_commit()
            os.rename(new, self._part)
            on_failure.pop_all()
        sync(self._part.parent)

    def _refuse_present(self) -> None:
        if self.path.exists():
            raise ShardExistsError(f"{self.path} is there already, a finished shard")
        if self._part.exists():
            raise ShardExistsError(
                f"{self._part} is there already, a shard that was begun: LogitStoreWriter.resume goes on with it"
            )

    def _start(self, path: str | os.PathLike[str], threads: int | None) -> None:
        self.path = file_path(path, "path").absolute()
        if self.path.name.endswith(PART):
            raise DomainError(f"path must be that of the finished shard, without {PART!r}, got {str(path)!r}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"{self.path.parent} is not a directory, so {self.path.name} cannot be written there"
            )
        self._part = self.path.with_name(self.path.name + PART)
        self._threads = None if threads is None else resolve_threads(threads)
        self._pid = os.getpid()
        self._fd = -1

    def _adopt(self, header: Header, capacity: int, offsets: dict[str, int]) -> None:
        """The state of a writer of an empty shard."""
        self._header, self._offsets = header, offsets
        self._columns = header.columns()
        self.capacity = capacity
        self._keys: set[int] = set()
        self._rows = 0
        self._new_offsets: list[int] = []
        self._new_ids: list[int] = []
        self._full_blocks: dict[int, list[int]] = {}
        self._commit = Commit(0, 0, 0, _FIRST_OFFSET_CRC, 0, (0,) * len(self._columns))
        self._open_crcs = list(self._commit.open_crcs)

    @classmethod
    def resume(cls, path: str | os.PathLike[str], *, threads: int | None = None) -> Self:
        """Go on with a shard behind its last commit, or get the closed writer of one that is finished.

        ``path`` is the path of the finished shard. Settings come from the file. What was committed is checked as far as
        it can still change: the last block, and the sequences.

        Raises
        ------
        FileNotFoundError
            There is neither the shard nor a part of it.
        ShardBusyError
            Another writer has it.
        ChecksumError, FileFormatError
            The file was damaged.
        """
        self = cls.__new__(cls)
        self._start(path, threads)
        with contextlib.suppress(FileNotFoundError):
            self._fd = os.open(self._part, os.O_RDWR)
        if self.closed:
            if not self.path.exists():
                raise FileNotFoundError(f"there is neither {self.path} nor {self._part}")
            with Shard(self.path) as shard:
                self._continue(shard)
            return self
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._release)
            self._lock(self._part)
            with Shard(self._part, recover=True) as shard:
                if shard.compressed:
                    raise FileFormatError(f"{self._part} has compressed arrays, to which nothing can be appended")
                room = shard.arrays["seq/id"].shape[0]
                if room != shard.capacity:  # beyond its end lie other arrays
                    raise FileFormatError(
                        f"{self._part}: 'seq/id' has room for {room} sequences; expected {shard.capacity}, by the "
                        "rows of 'rows/input_id'"
                    )
                if shard.commit.counter >= 1 << 63:
                    raise FileFormatError(
                        f"{self._part}: 'commit' has the counter {shard.commit.counter}, which no writer reaches"
                    )
                shard.check_open_block()
                self._continue(shard)
            if self._header.finalized:  # killed between the last commit and the rename
                self._rename()
            on_failure.pop_all()
        return self

    def _continue(self, shard: Shard) -> None:
        self._adopt(shard.header, shard.capacity, shard.offsets)
        self._commit = shard.commit
        self._rows = shard.commit.rows
        self._open_crcs = list(shard.commit.open_crcs)
        self._keys = set(shard.keys().tolist())

    # --- the state ---------------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """V."""
        return self._header.vocab_size

    @property
    def kind(self) -> str:
        """What is kept of a row."""
        return self._header.kind

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures that rows can be read at, 1 first."""
        return self._header.temperatures

    @property
    def rows(self) -> int:
        """Rows that were appended, committed or not."""
        return self._rows

    @property
    def committed_rows(self) -> int:
        """Rows that a crash cannot take away."""
        return self._commit.rows

    @property
    def committed_sequences(self) -> int:
        """Sequences that a crash cannot take away: where a resumed producer goes on."""
        return self._commit.sequences

    @property
    def closed(self) -> bool:
        """Whether nothing more can be appended."""
        return self._fd < 0

    def __contains__(self, input_ids: Any) -> bool:
        """Whether a sequence is there, committed or not."""
        return content_key(input_ids) in self._keys

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"{self._rows} of {self.capacity} rows"
        return f"LogitStoreWriter({str(self.path)!r}, kind={self.kind!r}, {state})"

    # --- writing -----------------------------------------------------------------------------------------------------

    def append(self, input_ids: Any, logits: Any) -> None:
        """Add one sequence: token ids [L] and logits [L, V], of which row t predicts token t + 1. Nothing or all of it.

        Logits are float32, float64, float16 or bfloat16 (of "hidden": hidden states [L, d]), on the host, or on a
        device: then PyTorch selects the classes there (extra ``torch``; not of "sampled"), and only what is stored is
        copied. They are read once; what a row had beyond what is kept is gone.

        Raises
        ------
        NonFiniteError
            NaN, +inf, or a row of nothing but -inf.
        CapacityError
            The shard has no room for L rows: finish it and begin another.
        RepeatedSequenceError
            The sequence is there already.
        VocabularyMismatchError, ShapeError, DTypeError, DomainError
            Rows of another width; shapes that disagree; a value that ``value_dtype`` cannot hold.
        DeviceMismatchError, DeviceUnavailableError
            Logits on a device for a "sampled" store, or without PyTorch. Rows that were selected by other means go to
            :meth:`append_rows`.
        DiskFullError, ClosedShardError
        """
        ids, key = self._admit(input_ids)
        if self._header.tail_source == "derived":
            raise DomainError("a store with derived tails takes append_rows alone: of logits the tail is known")
        if on_device(logits):
            self._put(ids, key, self._from_device(logits, ids.size))
            return
        engine = host_engine("LogitStoreWriter.append", {}, self._threads)
        rows = as_logits(engine, logits, "logits")
        self._check_shape(rows.shape, ids.size)
        self._put(ids, key, self._encoded(np.ascontiguousarray(rows), ids.size, key, engine))

    def append_rows(self, input_ids: Any, rows: TopKRows, tails: NDArray[np.float32] | None = None) -> None:
        """Add one sequence whose rows were selected elsewhere: by a device, or by another program.

        ``rows`` are at temperature 1, for a "topk" store; ``tails`` float32 [L, nT] has the log of what all other
        classes hold at each of :attr:`temperatures`, and may be left out where that is 1 alone. The rows are held to
        what a reader holds them to. Errors as for :meth:`append`.
        """
        if self.kind != "topk":
            raise DomainError(f"rows can be appended to a store of kind 'topk', not {self.kind!r}")
        ids, key = self._admit(input_ids)
        if rows.temperature != 1.0 or rows.vocab_size != self.vocab_size:
            raise DomainError(
                f"rows must be at temperature 1 and of {self.vocab_size} classes, "
                f"got temperature {rows.temperature} and {rows.vocab_size} classes"
            )
        tail = rows.tail_logmass[:, None] if tails is None else np.asarray(tails, np.float32)
        for name, array, shape in (
            ("rows.indices", rows.indices, (ids.size, self._header.k)),
            ("rows.log_probs", rows.log_probs, (ids.size, self._header.k)),
            ("rows.n_valid", rows.n_valid, (ids.size,)),
            ("tails", tail, (ids.size, len(self.temperatures))),
        ):
            if array.shape != shape:
                raise ShapeError(f"{name} must have the shape {shape}, got {array.shape}")
        self._check_counts(rows)
        with np.errstate(over="ignore"):  # to -inf, which is an error below
            log_probs = np.asarray(rows.log_probs).astype(np.float32)
        columns = self._topk_columns(log_probs, rows.indices, rows.n_valid, tail)
        check_rows(self._header, columns, "rows", 0, DomainError)
        self._put(ids, key, columns)

    def _check_counts(self, rows: TopKRows) -> None:
        """Integers are stored in fewer bits, which would make others of those that do not fit."""
        for name, array, low, high, words in (
            ("indices", rows.indices, 0, self.vocab_size - 1, f"a class in [0, {self.vocab_size})"),
            ("n_valid", rows.n_valid, 1, self._header.k, f"a number of entries from 1 to {self._header.k}"),
        ):
            bad = np.argwhere((array < low) | (array > high))
            if bad.size:
                place = tuple(bad[0].tolist())
                raise DomainError(f"rows.{name}[{', '.join(map(str, place))}] is {array[place]}, not {words}")

    def _admit(self, input_ids: Any) -> tuple[NDArray[np.uint32], int]:
        """A sequence that may be appended, and its key."""
        self._check_open()
        key = content_key(input_ids)
        ids = np.asarray(input_ids).astype("<u4")
        if ids.size == 0:
            raise ShapeError("input_ids must hold at least one token, got none")
        if key in self._keys:
            raise RepeatedSequenceError(
                f"{self.path}: the sequence of {ids.size} tokens [{', '.join(map(str, ids[:8]))}"
                f"{', ...' if ids.size > 8 else ''}] (key {key}) is there already"
            )
        if self._rows + ids.size > self.capacity:
            raise CapacityError(
                f"{self.path} has {self._rows} of {self.capacity} rows, and no room for {ids.size} more"
            )
        return ids, key

    def _check_shape(self, shape: tuple[int, ...], length: int) -> None:
        header = self._header
        width = header.k if header.kind == "hidden" else header.vocab_size
        if len(shape) != 2 or shape[0] != length:
            raise ShapeError(f"logits must have the shape [{length}, {width}] of {length} input_ids, got {shape}")
        if shape[1] != width:
            what = "hidden states of" if header.kind == "hidden" else "logits of"
            raise VocabularyMismatchError(
                f"{what} {shape[1]} columns in a store of {width}: "
                "of a teacher whose head is padded beyond the tokenizer, give the columns of the tokenizer"
            )

    def _encoded(self, logits: NDArray[Any], length: int, key: int, engine: Engine) -> list[NDArray[Any]]:
        """The columns of a sequence but for the last, ``rows/input_id``."""
        header, threads = self._header, engine.where
        temperatures = np.array(header.temperatures)
        names = {rowstatus.TEACHER: "logits"}
        if header.kind == "topk":
            log_probs, indices, n_valid, tail, _, status = select_rows(logits, header.k, temperatures, threads)
            check_logits(engine, status, (length,), names)
            return self._topk_columns(log_probs, indices, n_valid, tail)
        if header.kind == "sampled":
            seeds = _row_seeds(header.seed, key, length)
            log_weights, indices, n_valid, status = draw_rows(
                logits, header.head_k, header.draws, temperatures, seeds, threads
            )
            check_logits(engine, status, (length,), names)
            log_weights, indices = log_weights[:, :, : header.k], indices[:, :, : header.k]
            flat = log_weights.reshape(length, -1)
            encoded = [encode_ids(indices[:, t], header) for t in range(len(temperatures))]
            values = encode_values(flat, header.value_dtype, "logits")
            return [values, np.concatenate(encoded, axis=1), n_valid.astype("<u2")]
        if header.kind == "dense":
            values = np.empty(logits.shape, np.float32)  # whatever the logits are
            log_softmax(logits, out=values, threads=threads, validate=True)
            return [encode_values(values, header.value_dtype, "logits")]
        return self._hidden_columns(logits)

    def _from_device(self, logits: Any, length: int) -> list[NDArray[Any]]:
        """As :meth:`_encoded`, of logits on a device."""
        header = self._header
        if header.kind == "sampled":
            raise DeviceMismatchError(
                "a store of kind 'sampled' draws from logits on the host, and these are on a device"
            )
        tensor = as_tensor(logits)
        self._check_shape(tuple(tensor.shape), length)
        if header.kind == "topk":
            return self._topk_columns(*select_tensor(tensor, header.k, header.temperatures))
        if header.kind == "dense":
            return [encode_values(log_softmax_tensor(tensor), header.value_dtype, "logits")]
        return self._hidden_columns(host_copy(tensor))

    def _hidden_columns(self, given: NDArray[Any]) -> list[NDArray[Any]]:
        with np.errstate(over="ignore"):
            states = given.astype(np.float32)
        bad = np.argwhere(~np.isfinite(states))
        if bad.size:
            row, column = bad[0]
            raise NonFiniteError(
                f"logits[{row}, {column}] is {given[row, column]}: hidden states must be finite in float32"
            )
        return [encode_values(states, self._header.value_dtype, "logits")]

    def _topk_columns(
        self,
        log_probs: NDArray[np.float32],
        indices: NDArray[np.int32],
        n_valid: NDArray[np.int32],
        tail: NDArray[np.float32],
    ) -> list[NDArray[Any]]:
        lost = np.argwhere(np.isneginf(log_probs) & (np.arange(self._header.k) < n_valid[:, None]))
        if lost.size:
            row, entry = lost[0]
            raise DomainError(
                f"logits[{row}, {indices[row, entry]}] is so far below the largest of its row that its log-probability "
                "is -inf in float32: a class without support has the logit -inf"
            )
        values = encode_values(log_probs, self._header.value_dtype, "logits")
        return [values, encode_ids(indices, self._header), tail.astype("<f4", copy=False), n_valid.astype("<u2")]

    def _put(self, ids: NDArray[np.uint32], key: int, columns: list[NDArray[Any]]) -> None:
        """Write the columns behind the last row. They count when all of them are there."""
        columns = [*columns, ids]
        for column, data in zip(self._columns, columns, strict=True):
            self._write(column.name, self._rows, data)
        block_rows, start = self._header.block_rows, self._rows
        crcs, full = list(self._open_crcs), {}  # not the writer's own, which an interrupt would leave half done
        while start < self._rows + ids.size:
            block = start // block_rows
            stop = min((block + 1) * block_rows, self._rows + ids.size)
            for c, data in enumerate(columns):
                part = data[start - self._rows : stop - self._rows]
                crcs[c] = crc32_of(part, crcs[c])
            if stop == (block + 1) * block_rows:
                full[block], crcs = crcs, [0] * len(columns)
            start = stop
        self._open_crcs = crcs
        self._full_blocks |= full
        self._rows += ids.size
        self._keys.add(key)
        self._new_offsets.append(self._rows)
        self._new_ids.append(key)

    def _write(self, name: str, row: int, data: NDArray[Any]) -> None:
        """Write rows of an array to where they lie in the file."""
        flat = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        at = self._offsets[name] + row * (flat.nbytes // len(data))
        with _room(self._part, self.capacity):
            while flat.nbytes:
                done = os.pwrite(self._fd, flat, at)
                flat, at = flat[done:], at + done

    def commit(self) -> None:
        """Put what was appended on disk, so that no crash takes it away. Costs two waits for the disk."""
        self._check_open()
        if self._rows == self._commit.rows:
            return
        for block, crcs in self._full_blocks.items():
            self._write("blocks/crc32", block, np.array([crcs], "<u4"))
        last, new = self._commit, len(self._new_ids)
        offsets, ids = np.array(self._new_offsets, "<u8"), np.array(self._new_ids, "<u8")
        self._write("seq/offsets", last.sequences + 1, offsets)
        self._write("seq/id", last.sequences, ids)
        self._commit = Commit(
            last.counter,
            self._rows,
            last.sequences + new,
            crc32_of(offsets, last.offsets_crc),
            crc32_of(ids, last.ids_crc),
            tuple(self._open_crcs),
        )
        try:
            self._write_commit()
        except BaseException:
            self._commit = last
            raise
        self._full_blocks.clear()
        self._new_offsets.clear()
        self._new_ids.clear()

    def _write_commit(self) -> None:
        """What was written goes to disk, and then the commit, into the older slot."""
        commit = replace(self._commit, counter=self._commit.counter + 1)
        with _room(self._part, self.capacity):
            os.fsync(self._fd)
            self._write("commit", commit.counter % 2, commit.words(self._header.store_uuid)[None])
            os.fsync(self._fd)
        self._commit = commit

    def close(self) -> None:
        """Commit, and finish the shard: it gets its name, and takes no more rows. A second call does nothing."""
        if self.closed:
            return
        self.commit()
        self._write_commit()  # into the other slot too: then damage to either is seen
        set_integer(self._part, "finalized", 1)
        os.fsync(self._fd)
        self._rename()

    def abandon(self) -> None:
        """Let go of the shard without finishing it: what was committed stays in its ``.part``."""
        if not self.closed:
            self._release()

    def _rename(self) -> None:
        if self.path.exists():
            raise ShardExistsError(f"{self.path} is there already, so that {self._part} cannot take its name")
        os.rename(self._part, self.path)
        self._release()
        sync(self.path.parent)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0 and self._pid == os.getpid():
            self._release()

    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("a LogitStoreWriter cannot be pickled: one process writes one shard")

    # --- the file ----------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedShardError(f"{self.path} is finished, or its writer is closed: nothing can be appended")
        if self._pid != os.getpid():
            raise ShardBusyError(f"{self.path} belongs to the writer of process {self._pid}, not to its fork")

    def _lock(self, path: Path) -> None:
        """Take the file that is open, which must still be the one under ``path``."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardBusyError(f"{path} is being written by another writer") from None
        mine = os.fstat(self._fd)
        try:
            there = os.stat(path)
        except FileNotFoundError:
            there = None
        if there is None or (mine.st_dev, mine.st_ino) != (there.st_dev, there.st_ino):
            raise ShardBusyError(f"{path} was finished or replaced by another writer")

    def _reserve(self, size: int) -> None:
        """Have the disk set so many bytes aside: HDF5 alone would leave a hole, and the disk might be full later."""
        if size >= 1 << 63:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, 0, size)

    def _release(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)


def _refuse_foreign(kind: str, **options: dict[str, Any]) -> None:
    """Raise for an option of another kind, which would be ignored."""
    for owner, values in options.items():
        for name, value in values.items():
            if owner != kind and value is not None:
                raise DomainError(f"{name} is for kind={owner!r}, not for {kind!r}")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DTypeError(f"{name} must be a string, got {value!r}")
    if "\0" in value:
        raise DomainError(f"{name} must not have a null character, got {value!r}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DomainError(f"{name} must be text, got {value!r}, which has half of a surrogate pair") from None
    return value


def _sha256(value: Any, name: str) -> str:
    if not re.fullmatch("([0-9a-f]{64})?", _text(value, name)):
        raise DomainError(f"{name} must be 64 lower-case hexadecimal digits, got {value!r}")
    return str(value)


def _row_seeds(seed: int, key: int, rows: int) -> NDArray[np.uint64]:
    """What the draws of each row begin with: nothing but the seed, the sequence and the place in it."""
    start = np.uint64((seed * 0x9E3779B97F4A7C15 ^ key) & (1 << 64) - 1)
    with np.errstate(over="ignore"):
        return start + np.arange(rows, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)


@contextmanager
def _room(path: Path, capacity: int) -> Iterator[None]:
    """What the system, or HDF5, says of a full disk, as a :class:`DiskFullError`."""
    try:
        yield
    except DiskFullError:
        raise
    except (OSError, RuntimeError) as error:
        code = error.errno if isinstance(error, OSError) else None
        if code is None and (found := re.search(r"errno = (\d+)", str(error))):  # HDF5 says it in words alone
            code = int(found[1])
        if code not in _NO_ROOM:
            raise
        raise DiskFullError(
            code, f"{path} has no room on disk for the {capacity} rows of its capacity: {os.strerror(code)}"
        ) from error
