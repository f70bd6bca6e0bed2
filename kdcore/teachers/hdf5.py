"""Teacher logits from an HDF5 file or a store, by row number or by the token ids that they follow."""

from __future__ import annotations

import os
import warnings
from contextlib import ExitStack
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import choice
from kdcore.errors import DomainError, FileFormatError, MissingRowError, ProbabilitiesWarning, ShapeError
from kdcore.hdf5 import (
    FLOATS,
    INTEGERS,
    SafeFile,
    check_logit_rows,
    narrow_logit_rows,
    preview,
    read_metadata,
    widen_logit_rows,
)
from kdcore.sequences import as_rows, content_key, pad_rows, prefixes
from kdcore.sparse import SampledRows, TopKRows
from kdcore.store.reader import LogitStore, is_store
from kdcore.teachers.base import InputIds

__all__ = ["HDF5Teacher"]

_INSPECTED_ROWS = 8


class HDF5Teacher:
    """Teacher logits from a dataset [N, V] of an HDF5 file. B rows of a batch, L positions, V classes.

    Log-probabilities serve as logits. Probabilities do not: if the first rows look like them, a
    :class:`~kdcore.errors.ProbabilitiesWarning` says so.

    Opening reads the index by content and a few rows. Each distinct row of a batch is read once, and returned as
    float32. The teacher may be shared by threads, forked and pickled (as its arguments, so that the file is opened
    again where it is unpickled).

    Parameters
    ----------
    path
        The file, as :func:`kdcore.save_teacher_logits` or any other program wrote it. It need not be trusted:
        see :class:`kdcore.hdf5.SafeFile` for what is refused. Or a :class:`~kdcore.LogitStore`, or the path of one:
        "dense" and "hidden" stores have logits, "topk" and "sampled" ones :meth:`rows_for_batch` and
        :meth:`rows_per_position`, which a step or a run calls by itself. By content, ids are then those of a whole
        sequence.
    dataset : str
        The name of the dataset, of float16, float32, float64, or of uint16 with the attribute ``dtype="bfloat16"``
        (a fixed-length string).
    address : {"row", "content"}
        What ``input_ids`` mean. "row": row numbers; a row of ``input_ids`` is ``[row]``. "content": token ids, looked
        up by :func:`kdcore.sequences.content_key` in ``keys`` uint64 [N] beside the dataset, and compared with
        ``ids`` [N, M]; of each row the first ``lengths`` [N] ids count, or all M without ``lengths``.

    Raises
    ------
    FileNotFoundError
    FileFormatError, UnsafeFileError
        A file that is not as described.
    MissingRowError
        A row or content that the file does not have.
    NonFiniteError
        A row is read that holds NaN, +inf or nothing but -inf.
    DomainError
        A float64 beyond float32; an ``address`` or name that cannot be.
    ValueError
        The teacher is closed.

    Examples
    --------
    >>> import tempfile
    >>> from kdcore.hdf5 import save_teacher_logits
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_teacher_logits(f"{folder}/t.h5", np.array([[0.0, 1.0], [2.0, 3.0]], np.float32))
    ...     with HDF5Teacher(f"{folder}/t.h5") as teacher:
    ...         teacher.logits_for_batch([[1], [0], [1]])
    array([[2., 3.],
           [0., 1.],
           [2., 3.]], dtype=float32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | LogitStore,
        dataset: str = "logits",
        address: Literal["row", "content"] = "row",
    ) -> None:
        choice(address, "address", ("row", "content"))
        self.dataset = dataset
        self.address = address
        self._closed = False
        self._store: LogitStore | None = None
        if isinstance(path, LogitStore) or is_store(path):
            if dataset != "logits":
                raise DomainError(f"dataset={dataset!r} is for other HDF5 files, not for a store")
            self._store = path if isinstance(path, LogitStore) else LogitStore(path)
            self.path = self._store.path
            self._source = str(self.path)
            self.metadata: dict[str, str | int | float | bool] = {
                "teacher": self._store.header.teacher,
                "revision": self._store.header.teacher_revision,
            }
            return
        self._file = SafeFile(path)
        self.path = self._file.path
        self._source = f"{self.path}: {dataset!r}"
        with ExitStack() as on_failure:
            on_failure.callback(self._file.close)
            self._logits = self._file.dataset(dataset, dtypes=(*FLOATS, "<u2"), ndim=2)
            if self._logits.shape[1] == 0:
                raise FileFormatError(f"{self._source} has the shape {self._logits.shape}; a vocabulary needs classes")
            tag = self._file.attribute(dataset, "dtype", str)
            if tag != ("bfloat16" if self._logits.dtype == np.uint16 else None):
                raise FileFormatError(
                    f"{self._source} has the dtype {self._logits.dtype} and the attribute dtype={tag!r}; "
                    "expected a float without that attribute, or uint16 with dtype='bfloat16'"
                )
            self.metadata = read_metadata(self._file, dataset)
            if address == "content":
                self._open_index()
            self._warn_of_probabilities()
            on_failure.pop_all()

    def _open_index(self) -> None:
        *group, _ = self.dataset.split("/")
        keys_name, ids_name, lengths_name = ("/".join([*group, name]) for name in ("keys", "ids", "lengths"))
        # Keys are hashes, which do not compress: a ratio above 4 is no index, and would be costly to read.
        keys = self._file.dataset(keys_name, dtypes=("<u8",), ndim=1, max_ratio=4)
        self._ids = self._file.dataset(ids_name, dtypes=INTEGERS, ndim=2)
        columns = {keys_name: keys, ids_name: self._ids}
        lengths = None
        if self._file.has(lengths_name):
            lengths = columns[lengths_name] = self._file.dataset(lengths_name, dtypes=INTEGERS, ndim=1)
        for name, column in columns.items():
            if column.shape[0] != len(self):
                raise FileFormatError(
                    f"{self.path}: {name!r} has {column.shape[0]} rows, but {self.dataset!r} has {len(self)}"
                )

        width = self._ids.shape[1]
        self._lengths = np.full(len(self), width) if lengths is None else lengths.read()
        wrong = np.flatnonzero((self._lengths < 0) | (self._lengths > width))
        if wrong.size:
            row = wrong[0]
            raise FileFormatError(
                f"{self.path}: {lengths_name!r} is {self._lengths[row]} in row {row}, "
                f"but {ids_name!r} has {width} columns"
            )

        unsorted = keys.read()
        self._order = np.argsort(unsorted, kind="stable")
        self._keys = unsorted[self._order]
        twice = np.flatnonzero(self._keys[1:] == self._keys[:-1])
        if twice.size:
            first, second = self._order[twice[0] : twice[0] + 2]
            raise FileFormatError(
                f"{self.path}: {keys_name!r} has the key {self._keys[twice[0]]} in row {first} and in row {second}; "
                "keys must be distinct"
            )

    def _warn_of_probabilities(self) -> None:
        rows = np.arange(min(len(self), _INSPECTED_ROWS))
        if rows.size == 0 or self.vocab_size == 1:
            return
        values = widen_logit_rows(self._logits.rows(rows))
        # Rounding to bfloat16 moves a sum of probabilities by at most 2**-9; float16 adds up to 3e-8 for each class
        # that it flushes to zero.
        tolerance = 1e-2 if self._logits.dtype.itemsize == 2 else 1e-3
        if np.all(values >= 0) and np.all(np.abs(values.sum(axis=1, dtype=np.float64) - 1) <= tolerance):
            warnings.warn(
                f"the first {rows.size} rows of {self._source} are non-negative and sum to 1, as probabilities do; "
                "a teacher's rows are read as logits. If they are probabilities, store log-probabilities: numpy.log",
                ProbabilitiesWarning,
                stacklevel=3,
            )

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        return self._logits.shape[1] if self._store is None else self._store.vocab_size

    @property
    def temperatures(self) -> tuple[float, ...] | None:
        """The temperatures that the rows of a "topk" or "sampled" store can be read at; None where there are logits."""
        if self._store is None or self._store.kind not in ("topk", "sampled"):
            return None
        return self._store.temperatures

    def __len__(self) -> int:
        """N, the number of rows in the file."""
        return self._logits.shape[0] if self._store is None else len(self._store)

    def __repr__(self) -> str:
        return f"HDF5Teacher({str(self.path)!r}, dataset={self.dataset!r}, address={self.address!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return HDF5Teacher, (self.path if self._store is None else self._store, self.dataset, self.address)

    def close(self) -> None:
        """Close the file; reading afterwards is a ValueError."""
        self._closed = True
        (self._file if self._store is None else self._store).close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def logits_for_batch(self, input_ids: InputIds) -> NDArray[np.float32]:
        """Logits float32 [B, V] by row: of row number r for ``[r]``, or of the token that follows a row of ids.

        Raises MissingRowError, NonFiniteError, DomainError, and ShapeError or DTypeError for other ``input_ids``.
        """
        rows = as_rows(input_ids)
        if self.address == "content":
            return self._logits_of(self._last_rows(rows)) if self._store is not None else self._read(self._find(rows))
        self._check_row_numbers(rows)
        return self._logits_of(self._in_range(rows)) if self._store is not None else self._read(self._in_range(rows))

    def rows_for_batch(self, input_ids: InputIds, temperature: float) -> TopKRows | SampledRows:
        """As :meth:`logits_for_batch`, of a "topk" or "sampled" store: B rows at ``temperature``."""
        rows = as_rows(input_ids)
        if self.address == "row":
            self._check_row_numbers(rows)
        return self._sparse(self._last_rows(rows) if self.address == "content" else self._in_range(rows), temperature)

    def rows_per_position(
        self, input_ids: InputIds, temperature: float
    ) -> tuple[TopKRows | SampledRows, NDArray[np.bool_]]:
        """As :meth:`logits_per_position`, of a "topk" or "sampled" store: rows of positions that exist, in order."""
        rows = as_rows(input_ids)
        return self._sparse(self._position_rows(rows), temperature), pad_rows(rows)[1]

    def _check_row_numbers(self, rows: list[NDArray[np.int64]]) -> None:
        for i, row in enumerate(rows):
            if row.size != 1:
                raise ShapeError(
                    f"input_ids[{i}] holds {row.size} integers; with address='row' it must be one row number"
                )

    def logits_per_position(self, input_ids: InputIds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits float32 [B, L, V] and the mask bool [B, L] of positions that exist; logits are 0 where none does.

        By row, each element is a row number; by content, position l takes the row of its prefix of l + 1 ids. Errors
        as for :meth:`logits_for_batch`.
        """
        rows = as_rows(input_ids)
        mask = pad_rows(rows)[1]
        logits = np.zeros((*mask.shape, self.vocab_size), np.float32)
        if self._store is not None:
            logits[mask] = self._logits_of(self._position_rows(rows))
            return logits, mask
        numbers = self._find(prefixes(rows)) if self.address == "content" else self._in_range(rows)
        logits[mask] = self._read(numbers)
        return logits, mask

    # --- of a store --------------------------------------------------------------------------------------------------

    def _position_rows(self, rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The row numbers of all positions, in order."""
        if self.address == "row":
            return self._in_range(rows)
        store = self._opened_store()
        return np.concatenate([np.empty(0, np.int64), *(np.array(store.rows_of(row)) for row in rows if row.size)])

    def _last_rows(self, rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The row numbers of what follows whole sequences."""
        store = self._opened_store()
        return np.array([store.rows_of(row)[-1] for row in rows], np.int64)

    def _logits_of(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        store = self._opened_store()
        if store.kind in ("topk", "sampled"):
            raise DomainError(
                f"{self._source} has no logits, it is a store of kind {store.kind!r}: "
                "rows_for_batch and rows_per_position read it"
            )
        distinct, inverse = np.unique(numbers, return_inverse=True)
        logits = store.read(distinct)
        assert isinstance(logits, np.ndarray)
        found: NDArray[np.float32] = logits[inverse]
        return found

    def _sparse(self, numbers: NDArray[np.int64], temperature: float) -> TopKRows | SampledRows:
        store = self._opened_store()
        if store.kind not in ("topk", "sampled"):
            raise DomainError(f"{self._source} is a store of kind {store.kind!r}, of which logits are read")
        rows = store.read(numbers, temperature)
        assert not isinstance(rows, np.ndarray)
        return rows

    def _opened_store(self) -> LogitStore:
        self._check_open()
        if self._store is None:
            raise DomainError(f"{self._source} is a dataset of logits, not a store of selected rows")
        return self._store

    # --- of a dataset ------------------------------------------------------------------------------------------------

    def _in_range(self, rows: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        numbers = np.concatenate([np.empty(0, np.int64), *rows])
        outside = numbers[(numbers < 0) | (numbers >= len(self))]
        if outside.size:
            raise MissingRowError(f"{self._source} has {len(self)} rows, and none with the number {outside[0]}")
        return numbers

    def _find(self, contents: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The row number of each content."""
        self._check_open()
        keys = np.array([content_key(ids) for ids in contents], np.uint64)
        places = np.searchsorted(self._keys, keys)
        found = places < len(self)
        found[found] = self._keys[places[found]] == keys[found]
        if not found.all():
            i = int(np.argmin(found))
            raise MissingRowError(
                f"{self._source} has no row for the ids [{preview(contents[i].tolist())}] (key {keys[i]})"
            )
        numbers = self._order[places]

        distinct, inverse = np.unique(numbers, return_inverse=True)
        stored = self._ids.rows(distinct)
        for ids, key, number, place in zip(contents, keys, numbers, inverse, strict=True):
            kept = stored[place, : self._lengths[number]]
            if not np.array_equal(kept, ids):
                raise FileFormatError(
                    f"{self._source}: the ids [{preview(ids.tolist())}] have the key {key}, "
                    f"under which row {number} keeps [{preview(kept.tolist())}]: "
                    "the keys collide, or the file is damaged"
                )
        return numbers

    def _read(self, numbers: NDArray[np.int64]) -> NDArray[np.float32]:
        self._check_open()
        distinct, inverse = np.unique(numbers, return_inverse=True)
        values = widen_logit_rows(self._logits.rows(distinct))
        check_logit_rows(values, distinct, self._source)
        if values.dtype == np.float64:
            values = narrow_logit_rows(values, np.float32, distinct, self._source)
        logits: NDArray[np.float32] = values[inverse]
        return logits

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError(f"{self!r} is closed")
