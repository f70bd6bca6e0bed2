"""One shard, open for reading: everything about it that can be wrong is found here.

In three steps. Opening looks at the structure: the header, the datasets and where they lie, the commit, the offsets
of sequences. The first read of a block looks at its checksums and at every value of it, once. :meth:`Shard.verify`
looks at all blocks, and at whether the keys of sequences are those of their tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import file_path
from kdcore.cpu import stored
from kdcore.errors import ChecksumError, FileFormatError, KdcoreError, UnsafeFileError
from kdcore.hdf5 import MAX_RATIO, SafeFile, StoredArray
from kdcore.sequences import content_key
from kdcore.store.encoding import ids_of, values_of
from kdcore.store.schema import PART, SLOT_WORDS, Commit, Header, crc32_of, newest_commit, read_header

__all__ = ["Shard", "check_rows"]

_MESSAGES = {
    stored.BAD_COUNT: ("rows/n_valid", "is {0:.0f}; expected 1 to {1:.0f}"),
    stored.BAD_VALUE: ("rows/values", "entry {entry} is {0}; a log-probability is at most {1}"),
    stored.NO_VALUE: ("rows/values", "entry {entry} is {0}, but 'rows/n_valid' says that {1:.0f} entries count"),
    stored.BAD_ORDER: ("rows/values", "entry {entry} is {0}, more than the {1} before it"),
    stored.BAD_ID: ("rows/indices", "entry {entry} is the class {0:.0f} in a vocabulary of {1:.0f}"),
    stored.REPEATED_ID: ("rows/indices", "entry {entry} is the class {0:.0f}, which the row has already"),
    stored.BAD_PADDING: (
        "rows/values",
        "entry {entry}, beyond 'rows/n_valid', is {0} of class {1:.0f}; expected -inf of class 0",
    ),
    stored.BAD_TAIL: ("rows/tail_logmass", "entry {entry} is {0}; the log of less than all must be below {1}"),
    stored.BAD_TAIL_AT: (
        "rows/tail_logmass",
        "entry {entry} is {0}, which the entries at T = 1 rule out at this temperature (bound {1})",
    ),
    stored.BAD_SUM: ("rows/values", "holds {0:.6g} of the probability and the tail {1:.6g}, which do not add up to 1"),
}


def check_rows(
    header: Header,
    columns: Sequence[NDArray[Any]],
    source: Any,
    first: int,
    error: type[KdcoreError] = FileFormatError,
) -> None:
    """Raise for the first stored row that is not as it must be; ``first`` is the number of the first of them."""
    found: tuple[Any, ...]
    if header.kind in ("dense", "hidden"):
        found = stored.check_dense_rows(
            np.ascontiguousarray(columns[0]), header.tolerance if header.kind == "dense" else 0
        )
        _raise(found, source, first, error)
        return
    temperatures = np.array(header.temperatures)
    sampled = header.kind == "sampled"
    for slot in range(len(temperatures) if sampled else 1):
        counts = np.ascontiguousarray(columns[2][:, slot] if sampled else columns[3])
        tail = np.empty((len(counts), 0), np.float32) if sampled else np.ascontiguousarray(columns[2])
        found = stored.check_rows(
            values_of(columns[0], header, slot),
            ids_of(columns[1], header, slot),
            counts,
            tail,
            temperatures,
            header.vocab_size,
            header.tolerance,
            header.unit,
        )
        _raise(found, source, first, error)


def _raise(found: tuple[Any, ...], source: Any, first: int, error: type[KdcoreError]) -> None:
    code, row, entry, *numbers = found
    if code:
        dataset, words = _MESSAGES[code]
        raise error(f"{source}: {dataset!r}, row {first + row}: {words.format(*numbers, entry=entry)}")


class Shard:
    """A shard whose structure has been checked. Rows are checked by :meth:`check_blocks` before they are read.

    Parameters
    ----------
    path
        The file.
    recover : bool
        Whether an unfinished shard is read, up to its last commit.
    """

    def __init__(self, path: str | os.PathLike[str], *, recover: bool = False) -> None:
        self.path: Path = file_path(path, "path").absolute()
        self._file = SafeFile(self.path, locking=False)
        with ExitStack() as on_failure:
            on_failure.callback(self._file.close)
            self.header = read_header(self._file)
            if not recover and (not self.header.finalized or self.path.name.endswith(PART)):
                raise FileFormatError(
                    f"{self.path}: attribute 'finalized' is {self.header.finalized} and the name ends in "
                    f"{self.path.suffix!r}: an unfinished shard, which is read with recover=True alone"
                )
            self._open_arrays()
            self._open_commit()
            on_failure.pop_all()
        self._checked = bytearray(-(-self.rows // self.header.block_rows))
        self._sequences_checked = False
        if not self.compressed:  # all of it is mapped
            self._file.close()

    def _open_arrays(self) -> None:
        header, file = self.header, self._file
        self.columns = header.columns()
        inputs = file.dataset("rows/input_id", dtypes=("<u4",), ndim=1)
        self.capacity = inputs.shape[0]
        blocks = -(-self.capacity // header.block_rows)
        expected = {column.name: (column.dtype, column.shape(self.capacity)) for column in self.columns}
        expected["blocks/crc32"] = ("<u4", (blocks, len(self.columns)))
        expected["commit"] = ("<u8", (2, SLOT_WORDS))
        self.arrays: dict[str, StoredArray] = {}
        for name, (dtype, shape) in expected.items():
            array = inputs if name == "rows/input_id" else file.dataset(name, dtypes=(dtype,), ndim=len(shape))
            if array.shape != shape:
                raise FileFormatError(
                    f"{file.path}: {name!r} has the shape {array.shape}; expected {shape}, by the "
                    f"{self.capacity} rows of 'rows/input_id' and the attributes"
                )
            self.arrays[name] = array
        for name in ("seq/offsets", "seq/id"):
            self.arrays[name] = file.dataset(name, dtypes=("<u8",), ndim=1)
        sequences = self.arrays["seq/id"].shape[0]
        if self.arrays["seq/offsets"].shape != (sequences + 1,):
            raise FileFormatError(
                f"{file.path}: 'seq/offsets' has the shape {self.arrays['seq/offsets'].shape}; expected "
                f"{(sequences + 1,)} by the {sequences} of 'seq/id'"
            )
        self.compressed = any(array.mapped is None for array in self.arrays.values())
        self.offsets = {name: array.offset for name, array in self.arrays.items() if array.offset is not None}
        self._check_overlaps()

    def _check_overlaps(self) -> None:
        """Arrays share no byte, and together declare no more than filters can have made of the file."""
        places = sorted(
            (array.offset, array.offset + array.mapped.nbytes, name)
            for name, array in self.arrays.items()
            if array.offset is not None and array.mapped is not None
        )
        for (_, end, name), (start, _, other) in pairwise(places):
            if start < end:
                raise UnsafeFileError(
                    f"{self.path}: {name!r} ends at byte {end}, but {other!r} begins at byte {start}: they overlap"
                )
        total = sum(int(np.prod(array.shape)) * array.dtype.itemsize for array in self.arrays.values())
        if total > self._file.size * MAX_RATIO:
            raise UnsafeFileError(
                f"{self.path} is a file of {self._file.size} bytes, but its arrays declare {total}; "
                f"the limit is 1 in {MAX_RATIO}"
            )

    def _open_commit(self) -> None:
        self.commit: Commit = newest_commit(self.arrays["commit"].read(), self.header, self.path)
        self.rows, self.sequences = self.commit.rows, self.commit.sequences
        if self.rows > self.capacity:
            raise FileFormatError(
                f"{self.path}: 'commit' has {self.rows} rows, but 'rows/input_id' has room for {self.capacity}"
            )
        room = self.arrays["seq/id"].shape[0]
        if self.sequences > room:
            raise FileFormatError(f"{self.path}: 'commit' has {self.sequences} sequences, but 'seq/id' has {room}")
        #: Where sequences begin, and where the last one ends.
        self.starts: NDArray[np.uint64] = self.arrays["seq/offsets"].run(0, self.sequences + 1)
        ends = int(self.starts[0]), int(self.starts[-1])
        if ends != (0, self.rows):
            raise FileFormatError(
                f"{self.path}: 'seq/offsets' goes from {ends[0]} to {ends[1]}; expected 0 to "
                f"the {self.rows} rows of 'commit'"
            )
        wrong = np.flatnonzero(self.starts[1:] <= self.starts[:-1])
        if wrong.size:
            i = int(wrong[0])
            raise FileFormatError(
                f"{self.path}: 'seq/offsets' is {self.starts[i]} in row {i} and {self.starts[i + 1]} in the next; "
                "expected more"
            )

    # --- rows --------------------------------------------------------------------------------------------------------

    def run(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """Rows of a column as stored; a view of the file, where that is possible."""
        rows = self.arrays[name].run(start, stop)
        return rows if rows.flags.aligned else rows.copy()

    def gather(self, name: str, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """Rows of a column as stored."""
        return self.arrays[name].rows(numbers)

    def check_blocks(self, first: int, last: int) -> None:
        """Check the blocks ``first`` to ``last``, each of them once."""
        for block in range(first, last + 1):
            if not self._checked[block]:
                self._check_block(block)
                self._checked[block] = 1

    def check_open_block(self) -> None:
        """Check the last block, which a writer that goes on adds to."""
        if self.rows:
            block = (self.rows - 1) // self.header.block_rows
            self.check_blocks(block, block)

    def _check_block(self, block: int) -> None:
        size = self.header.block_rows
        start, stop = block * size, min((block + 1) * size, self.rows)
        if stop - start == size:
            expected = self.run("blocks/crc32", block, block + 1)[0].tolist()
        else:
            expected = list(self.commit.open_crcs)
        columns = [np.ascontiguousarray(self.run(column.name, start, stop)) for column in self.columns]
        for column, data, crc in zip(self.columns, columns, expected, strict=True):
            found = crc32_of(data)
            if found != crc:
                raise ChecksumError(
                    f"{self.path}: {column.name!r}, rows {start} to {stop - 1}: their checksum is {found:#010x}; "
                    f"expected {crc:#010x}: the file is damaged"
                )
        check_rows(self.header, columns, self.path, start)

    # --- sequences ---------------------------------------------------------------------------------------------------

    def keys(self) -> NDArray[np.uint64]:
        """The keys of the sequences, in their order."""
        keys = self.arrays["seq/id"].run(0, self.sequences)
        if not self._sequences_checked:
            for name, data, crc in (
                ("seq/offsets", self.starts, self.commit.offsets_crc),
                ("seq/id", keys, self.commit.ids_crc),
            ):
                found = crc32_of(data)
                if found != crc:
                    raise ChecksumError(
                        f"{self.path}: {name!r}: its checksum is {found:#010x}; expected {crc:#010x}: "
                        "the file is damaged"
                    )
            self._sequences_checked = True
        return keys

    def bounds(self, sequence: int) -> tuple[int, int]:
        """The first row of a sequence, and the one behind its last."""
        self.keys()
        return int(self.starts[sequence]), int(self.starts[sequence + 1])

    # --- all of it ---------------------------------------------------------------------------------------------------

    def verify(self) -> None:
        """Check every checksum, every row, and that the keys of sequences are those of their tokens."""
        keys = self.keys()
        self._checked[:] = bytes(len(self._checked))
        self.check_blocks(0, len(self._checked) - 1)
        for i, key in enumerate(keys.tolist()):
            start, stop = self.bounds(i)
            found = content_key(self.run("rows/input_id", start, stop))
            if found != key:
                raise FileFormatError(
                    f"{self.path}: 'seq/id', row {i}: the key is {key}, but that of the tokens in rows {start} to "
                    f"{stop - 1} of 'rows/input_id' is {found}"
                )
        ordered = np.sort(keys)
        twice = np.flatnonzero(ordered[1:] == ordered[:-1])
        if twice.size:
            first, second = np.flatnonzero(keys == ordered[twice[0]])[:2]
            raise FileFormatError(
                f"{self.path}: 'seq/id' has the key {ordered[twice[0]]} in row {first} and in row {second}"
            )

    def close(self) -> None:
        """Let go of the file. Views that were handed out stay readable."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
