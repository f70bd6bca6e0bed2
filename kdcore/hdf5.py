"""HDF5 files: an allow-list reader for files of unknown origin, checkpoints, and files of teacher logits.

No other module of kdcore opens HDF5. HDF5 lets a file name other files (external links, external storage, virtual
datasets), load code (filter plugins) and declare far more than it holds, all by default, so :class:`SafeFile` hands out
nothing but local, fully stored, plainly typed arrays. It does not guard against bugs of the HDF5 parser itself.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import secrets
import stat
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

import h5py
import numpy as np
from numpy.typing import DTypeLike, NDArray

from kdcore.checks import file_path, integer
from kdcore.errors import (
    CheckpointError,
    DomainError,
    DTypeError,
    FileFormatError,
    KdcoreError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
    UnsafeFileError,
)
from kdcore.sequences import as_rows, content_key, pad_rows

__all__ = [
    "Metadata",
    "SafeFile",
    "StoredArray",
    "read_arrays",
    "read_tensors",
    "save_teacher_logits",
    "sync",
    "write_arrays",
]

Metadata = Mapping[str, str | int | float | bool]
_Scalar = TypeVar("_Scalar", str, int, float)

INTEGERS = ("|i1", "|u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8")
FLOATS = ("<f2", "<f4", "<f8")

MAX_BYTES = 1 << 42
MAX_CHUNK_BYTES = 64 << 20
#: Deflate copies at most 258 bytes with at least two bits, so no honest chunk exceeds 1032 : 1 (zeros reach 1029),
#: and LZF stays below 90 : 1. Whatever declares more was not written by the filters that are allowed here.
MAX_RATIO = 1032

_FILTERS = {
    h5py.h5z.FILTER_DEFLATE: "deflate",
    h5py.h5z.FILTER_SHUFFLE: "shuffle",
    h5py.h5z.FILTER_FLETCHER32: "fletcher32",
    h5py.h5z.FILTER_LZF: "lzf",
}
_LAYOUTS = {h5py.h5d.COMPACT: "compact", h5py.h5d.VIRTUAL: "virtual"}
_LINKS = {h5py.h5l.TYPE_SOFT: "a soft link", h5py.h5l.TYPE_EXTERNAL: "an external link"}
_TYPE_CLASSES = {
    h5py.h5t.INTEGER: "integer",
    h5py.h5t.FLOAT: "float",
    h5py.h5t.TIME: "time",
    h5py.h5t.STRING: "string",
    h5py.h5t.BITFIELD: "bitfield",
    h5py.h5t.OPAQUE: "opaque",
    h5py.h5t.COMPOUND: "compound",
    h5py.h5t.REFERENCE: "reference",
    h5py.h5t.ENUM: "enumeration",
    h5py.h5t.VLEN: "variable-length",
    h5py.h5t.ARRAY: "array",
}

# HDF5 serialises its calls anyway. Holding this lock across a fork keeps the library's state whole in the child.
_LOCK = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_LOCK.acquire, after_in_parent=_LOCK.release, after_in_child=_LOCK.release)


@contextmanager
def _damage_named(where: str) -> Iterator[None]:
    """What HDF5 says of a damaged file, as a :class:`FileFormatError`; errors of the operating system pass."""
    try:
        yield
    except KdcoreError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise FileFormatError(f"{where} cannot be read as HDF5, it is damaged or truncated: {error}") from error


def _parts(name: str) -> list[str]:
    """The components of the path of an object in a file."""
    if not isinstance(name, str):
        raise DTypeError(f"the name of an array must be a string, got {name!r}")
    parts = name.split("/")
    if not all(parts) or "." in parts or "\0" in name:
        raise DomainError(f"{name!r} is not the name of an array: it must be like 'logits' or 'optimizer/velocity'")
    return parts


def preview(values: Collection[Any], limit: int = 20) -> str:
    """The first of some values, and how many there are."""
    shown = ", ".join(repr(value) for value in itertools.islice(values, limit))
    return f"{shown}, ... ({len(values)} in all)" if len(values) > limit else shown or "nothing"


def _type_words(stored: Any) -> str:
    words = f"{_TYPE_CLASSES.get(stored.get_class(), 'unknown')} of {stored.get_size()} bytes"
    if stored.get_class() in (h5py.h5t.INTEGER, h5py.h5t.FLOAT) and stored.get_order() == h5py.h5t.ORDER_BE:
        return f"big-endian {words}"
    return words


def _matching(stored: Any, dtypes: Iterable[str]) -> np.dtype[Any] | None:
    """The dtype that equals the stored type in every bit; a float with other exponent bits equals none."""
    return next((np.dtype(d) for d in dtypes if stored.equal(_hdf5_type(d))), None)


@cache
def _hdf5_type(dtype: str) -> Any:
    return h5py.h5t.py_create(np.dtype(dtype))


class SafeFile:
    """A read-only HDF5 file of unknown origin, of which only plain arrays and scalars are handed out.

    Threads may share it, and forked processes too: a child reopens the file, and refuses one that changed meanwhile.

    Parameters
    ----------
    path
        The file.
    max_bytes : int
        The most that one array may declare; 4 TiB by default.
    locking : bool
        Whether HDF5 locks the file, so that it is an error while another process writes it. Without: for files whose
        writer never takes back what it has written, and file systems that have no locks.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        As ``open`` does.
    UnsafeFileError
        Features outside the allow-list. Messages name the file, the object and the offending value.
    FileFormatError
        Everything else that is not as expected.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int = MAX_BYTES, locking: bool = True) -> None:
        self.path = file_path(path, "path").absolute()
        self.max_bytes = max_bytes
        self._locking = {} if locking else {"locking": False}
        self._mapping: mmap.mmap | None = None
        self._open()

    def _open(self) -> None:
        mode = os.stat(self.path).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(f"{self.path} is a directory, not an HDF5 file")
        if not stat.S_ISREG(mode):
            raise UnsafeFileError(f"{self.path} is not a regular file")
        with _damage_named(str(self.path)):
            # A chunk that does not fit the cache is decompressed again for each of its rows.
            self._file = h5py.File(self.path, "r", rdcc_nbytes=MAX_CHUNK_BYTES, **self._locking)
        self._pid = os.getpid()
        status = os.fstat(self.descriptor)
        self.size = status.st_size
        self._identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @property
    def descriptor(self) -> int:
        """The file descriptor that HDF5 reads from."""
        return int(self._file.id.get_vfd_handle())

    def mapping(self) -> mmap.mmap:
        """All of the file in memory: one mapping for all arrays, since each may hold a descriptor."""
        if self._mapping is None:
            untracked: dict[str, Any] = {"trackfd": False} if sys.version_info >= (3, 13) else {}
            self._mapping = mmap.mmap(self.descriptor, self.size, access=mmap.ACCESS_READ, **untracked)
        return self._mapping

    @contextmanager
    def _reading(self, where: str) -> Iterator[Any]:
        """The file, locked for this thread and open in this process."""
        with _LOCK:
            if not self._file:
                raise ValueError(f"{self.path} is closed")
            if self._pid != os.getpid():
                identity = self._identity
                self._file.close()  # else HDF5 would find the file open and share the parent's descriptor
                self._open()
                if self._identity != identity:
                    self._file.close()
                    raise FileFormatError(f"{self.path} was replaced or changed after it was opened")
            with _damage_named(where):
                yield self._file

    def close(self) -> None:
        """Close the file. Arrays that are mapped stay readable."""
        with _LOCK:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _object(self, name: str) -> Any:
        """The object under ``name``. Each component is checked: the last link says nothing of those before it."""
        found = self._file
        walked = ""
        for part in _parts(name):
            if not isinstance(found, h5py.Group):
                raise FileFormatError(f"{self.path}: {walked!r} is not a group, so there is no {name!r}")
            links = found.id.links
            if not links.exists(part.encode()):
                inside = f"{walked!r}" if walked else "the file"
                raise FileFormatError(f"{self.path} has no {name!r}; {inside} holds {preview(list(found))}")
            walked = f"{walked}/{part}" if walked else part
            kind = links.get_info(part.encode()).type
            if kind != h5py.h5l.TYPE_HARD:
                words = _LINKS.get(kind, f"a link of type {kind}")
                raise UnsafeFileError(f"{self.path}: {walked!r} is {words}; only objects of the file itself are read")
            found = found[part]
        return found

    def dataset(
        self, name: str, *, dtypes: Collection[str], ndim: int | None = None, max_ratio: float = MAX_RATIO
    ) -> StoredArray:
        """The array under ``name``, after every check that does not read it.

        Parameters
        ----------
        name : str
            Such as ``"teacher/logits"``.
        dtypes : collection of str
            Those that are expected, as NumPy type strings such as ``"<f4"``.
        ndim : int, optional
            The expected rank.
        max_ratio : float
            The most that the declared bytes may exceed the stored ones.
        """
        where = f"{self.path}: {name!r}"
        with self._reading(where):
            dataset = self._object(name)
            if not isinstance(dataset, h5py.Dataset):
                raise FileFormatError(f"{where} is a {type(dataset).__name__.lower()}, not a dataset")
            return StoredArray(self, name, *self._checked(where, dataset, dtypes, ndim, max_ratio))

    def _checked(
        self, where: str, dataset: Any, dtypes: Collection[str], ndim: int | None, max_ratio: float
    ) -> tuple[tuple[int, ...], np.dtype[Any], int | None]:
        stored = dataset.id.get_type()
        if stored.committed():
            raise UnsafeFileError(f"{where} has a committed (named) datatype; only plain numbers are read")
        if stored.get_class() not in (h5py.h5t.INTEGER, h5py.h5t.FLOAT):
            raise UnsafeFileError(f"{where} has the type {_type_words(stored)}; only plain numbers are read")
        dtype = _matching(stored, dtypes)
        if dtype is None:
            raise FileFormatError(f"{where} has the type {_type_words(stored)}; expected one of {preview(dtypes)}")
        shape = dataset.shape
        if shape is None:
            raise FileFormatError(f"{where} has an empty (null) dataspace, not an array")
        if ndim is not None and len(shape) != ndim:
            raise FileFormatError(f"{where} has the shape {shape}; expected {ndim} dimension{'s' * (ndim != 1)}")

        plist = dataset.id.get_create_plist()
        layout = plist.get_layout()
        if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.CHUNKED):
            raise UnsafeFileError(
                f"{where} has a {_LAYOUTS.get(layout, layout)} layout; expected contiguous or chunked"
            )
        if plist.get_external_count():
            raise UnsafeFileError(f"{where} keeps its data in other files (external storage)")
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        for code in filters:
            if code not in _FILTERS:
                raise UnsafeFileError(f"{where} uses filter {code}; allowed are {', '.join(_FILTERS.values())}")
            if filters.count(code) > 1:
                raise UnsafeFileError(f"{where} applies the filter {_FILTERS[code]} more than once")

        declared = math.prod(shape) * dtype.itemsize
        held = dataset.id.get_storage_size()
        if declared > self.max_bytes:
            raise UnsafeFileError(f"{where} declares {declared} bytes; the limit is {self.max_bytes}")
        if held > self.size:
            raise FileFormatError(f"{where} claims {held} stored bytes in a file of {self.size}")

        if layout == h5py.h5d.CONTIGUOUS:
            offset = dataset.id.get_offset()
            if declared and (offset is None or held != declared):
                raise FileFormatError(f"{where} declares {declared} bytes, but {held} are stored: it was never written")
            if declared and offset + declared > self.size:
                raise FileFormatError(f"{where} ends at byte {offset + declared} of a file of {self.size}")
            return shape, dtype, offset if declared else None

        chunk = math.prod(dataset.chunks) * dtype.itemsize
        if chunk > MAX_CHUNK_BYTES:
            raise UnsafeFileError(f"{where} has chunks of {chunk} bytes; the limit is {MAX_CHUNK_BYTES}")
        if declared > held * max_ratio:
            raise UnsafeFileError(f"{where} declares {declared} bytes but stores {held}; the limit is 1 in {max_ratio}")
        chunks = math.prod(-(-extent // step) for extent, step in zip(shape, dataset.chunks, strict=True))
        written = dataset.id.get_num_chunks()
        if written != chunks:
            raise FileFormatError(f"{where} holds {written} of {chunks} chunks: the rest was never written")
        return shape, dtype, None

    def names(self) -> list[str]:
        """The names of the objects at the root of the file."""
        with self._reading(f"{self.path}: '/'") as file:
            return list(file)

    def has(self, name: str) -> bool:
        """Whether there is anything under ``name``."""
        *group, last = _parts(name)
        with self._reading(f"{self.path}: {name!r}"):
            parent = self._object("/".join(group)) if group else self._file
            return isinstance(parent, h5py.Group) and bool(parent.id.links.exists(last.encode()))

    def _attribute(self, owner: str, name: str) -> tuple[Any, Any]:
        """The object ``owner``, and its attribute, which is None where there is none."""
        holder = self._file if owner == "/" else self._object(owner)
        exists = h5py.h5a.exists(holder.id, name.encode())
        return holder, (h5py.h5a.open(holder.id, name.encode()) if exists else None)

    def attribute(self, owner: str, name: str, kind: type[_Scalar]) -> _Scalar | None:
        """The attribute ``name`` of the object ``owner`` ("/" is the file), or None where there is none.

        ``kind`` is str (UTF-8, of fixed or variable length), int or float (little-endian). Arrays and all other types
        are refused.
        """
        where = f"{self.path}: attribute {name!r} of {owner!r}"
        with self._reading(where):
            holder, attribute = self._attribute(owner, name)
            if attribute is None:
                return None
            stored = attribute.get_type()
            size = stored.get_size()
            if stored.committed() or attribute.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
                raise UnsafeFileError(f"{where} is not a plain scalar")
            if size > self.size:
                raise FileFormatError(f"{where} claims {size} bytes in a file of {self.size}")
            if kind is str:
                if stored.get_class() != h5py.h5t.STRING:
                    raise FileFormatError(f"{where} has the type {_type_words(stored)}; expected a string")
                if stored.is_variable_str():  # what h5py writes for str
                    return kind(holder.attrs[name])
                text = np.empty((), f"S{size}")
                attribute.read(text, mtype=stored)
                return kind(text.item().decode("utf-8"))
            dtype = _matching(stored, INTEGERS if kind is int else FLOATS)
            if dtype is None:
                raise FileFormatError(f"{where} has the type {_type_words(stored)}; expected {kind.__name__}")
            number = np.empty((), dtype)
            attribute.read(number)
            return kind(number.item())

    def vector_attribute(self, owner: str, name: str, most: int) -> tuple[float, ...] | None:
        """The attribute ``name`` of ``owner``, a vector of at most so many float64, or None where there is none."""
        where = f"{self.path}: attribute {name!r} of {owner!r}"
        with self._reading(where):
            _, attribute = self._attribute(owner, name)
            if attribute is None:
                return None
            stored = attribute.get_type()
            if stored.committed() or _matching(stored, ("<f8",)) is None:
                raise FileFormatError(f"{where} has the type {_type_words(stored)}; expected float64")
            shape = attribute.shape
            if shape is None or len(shape) != 1 or shape[0] > most:
                raise FileFormatError(f"{where} has the shape {shape}; expected a vector of at most {most} numbers")
            numbers = np.empty(shape, "<f8")
            attribute.read(numbers)
            return tuple(numbers.tolist())


class StoredArray:
    """An array of a :class:`SafeFile`: ``shape``, ``dtype``, and reads whose failures are typed.

    Contiguous data are mapped into memory, from the descriptor that was checked; chunked data are read through HDF5.
    """

    def __init__(
        self, file: SafeFile, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], offset: int | None
    ) -> None:
        self.file = file
        self.name = name
        self.shape = shape
        self.dtype = dtype
        #: Where a contiguous array begins in the file; None for others, and for those without elements.
        self.offset = offset
        self.mapped: NDArray[Any] | None = None
        if math.prod(shape) == 0:
            self.mapped = np.empty(shape, dtype)
        elif offset is not None:
            self.mapped = np.frombuffer(file.mapping(), dtype, math.prod(shape), offset).reshape(shape)

    def read(self) -> NDArray[Any]:
        """A copy of the whole array."""
        if self.mapped is not None:
            return self.mapped.copy()
        with self.file._reading(f"{self.file.path}: {self.name!r}") as file:
            array: NDArray[Any] = file[self.name][()]
            return array

    def run(self, start: int, stop: int) -> NDArray[Any]:
        """The rows from ``start`` up to ``stop``: a view, or of chunked data a copy."""
        if self.mapped is not None:
            return self.mapped[start:stop]
        with self.file._reading(f"{self.file.path}: {self.name!r}") as file:
            rows: NDArray[Any] = file[self.name][start:stop]
            return rows

    def rows(self, numbers: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of the rows ``numbers``. Ascending numbers decompress each chunk once.

        Chunked data are read row by row: one index array would cost HDF5 34 ns an element.
        """
        if self.mapped is not None:
            return self.mapped[numbers]
        rows = np.empty((numbers.size, *self.shape[1:]), self.dtype)
        with self.file._reading(f"{self.file.path}: {self.name!r}") as file:
            dataset = file[self.name]
            for i, number in enumerate(numbers.tolist()):
                rows[i] = dataset[number]
        return rows


def sync(path: Path) -> None:
    """Make what a file, or a directory, holds last: a rename is in the directory, which has its own place on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _timeless(kind: Any) -> Any:
    """What an object is made with that does not note when; h5py 3.11 makes its groups otherwise."""
    creation = h5py.h5p.create(kind)
    creation.set_obj_track_times(False)
    return creation


def _make_groups(file: Any, name: str) -> None:
    """The groups that a dataset of this name lies in."""
    parts = _parts(name)
    for end in range(1, len(parts)):
        if (group := "/".join(parts[:end])) not in file:
            h5py.h5g.create(file.id, group.encode("utf-8"), gcpl=_timeless(h5py.h5p.GROUP_CREATE))


def _create(path: Path, *, aligned: bool = True, over_locked: bool = False) -> Any:
    """A new file with nothing in it; the same contents later make the same bytes, whatever the version of h5py.

    ``aligned``: arrays begin at pages, so that they can be mapped, and read past the page cache. ``over_locked``: in
    the place of a file that the caller has locked, without HDF5's own lock.
    """
    creation, access = _timeless(h5py.h5p.FILE_CREATE), h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # Format 1.8 has checksums on its metadata, and no open-for-write flag that a killed writer would leave behind.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_V18)
    if aligned:
        access.set_alignment(4096, 4096)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    if over_locked:
        access.set_file_locking(False, True)
    flags = h5py.h5f.ACC_TRUNC if over_locked else h5py.h5f.ACC_EXCL
    return h5py.h5f.create(os.fsencode(path), flags, fcpl=creation, fapl=access)


@contextmanager
def _replacing(path: str | os.PathLike[str], *, aligned: bool = True) -> Iterator[Any]:
    """A new HDF5 file that takes the place of ``path`` when the block ends, and vanishes when it fails.

    The file is on disk before its name is, so that after a crash ``path`` is the old file or the new one.
    """
    final = file_path(path, "path").absolute()
    if final.is_dir():
        raise IsADirectoryError(f"{final} is a directory, so no file can be written there")
    if not final.parent.is_dir():
        raise FileNotFoundError(f"{final.parent} is not a directory, so {final.name} cannot be written there")
    temporary = final.with_name(f".{final.name}.{secrets.token_hex(4)}.part")
    try:
        with h5py.File(_create(temporary, aligned=aligned)) as file:
            yield file
        sync(temporary)
        os.replace(temporary, final)
        sync(final.parent)
    finally:
        temporary.unlink(missing_ok=True)


Attributes = Mapping[str, str | int | float | tuple[float, ...]]


def _set_attributes(owner: Any, attributes: Attributes) -> None:
    for name, value in attributes.items():
        if isinstance(value, str):
            _set_text(owner, name, value)
        else:
            owner.attrs.create(name, value, dtype="<i8" if isinstance(value, int) else "<f8")


def create_preallocated(
    path: Path, arrays: Mapping[str, tuple[str, tuple[int, ...]]], attributes: Attributes
) -> dict[str, int]:
    """A new file of contiguous arrays, by name (dtype, shape), none empty. Returns where each begins in the file.

    Nothing is written to the arrays, and HDF5 need not be asked again to do so: who knows where they begin writes to
    the file itself. Format 1.8 has checksums on the metadata, and no mark of a writer that was killed. The file
    is there already, locked by the caller, and is emptied; its bytes are reserved by nobody yet.
    """
    with h5py.File(_create(path, over_locked=True)) as file:
        _set_attributes(file, attributes)
        offsets = {}
        for name, (dtype, shape) in arrays.items():
            _make_groups(file, name)
            layout = _timeless(h5py.h5p.DATASET_CREATE)
            layout.set_layout(h5py.h5d.CONTIGUOUS)
            layout.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
            layout.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            made = h5py.h5d.create(
                file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape), layout
            )
            offsets[name] = int(made.get_offset())
    return offsets


def set_integer(path: Path, name: str, value: int) -> None:
    """Overwrite an integer attribute of a file in its place, without HDF5's lock: the caller has one of its own."""
    with h5py.File(path, "r+", locking=False) as file:
        file.attrs.modify(name, np.int64(value))


#: Bounds of the chunks of compressed arrays: below, what describes them counts; above, too much is read for a row.
_SMALL_CHUNK, _LARGE_CHUNK = 1 << 15, 1 << 20


def write_compressed(
    path: str | os.PathLike[str],
    arrays: Mapping[str, tuple[str, tuple[int, ...], Iterable[NDArray[Any]]]],
    attributes: Attributes,
    chunk_rows: int,
) -> None:
    """A new file of compressed arrays, by name (dtype, shape, blocks of rows), in chunks of about so many rows.

    Byte-shuffled, deflated and checked by fletcher32, which every HDF5 library reads.
    """
    with _replacing(path, aligned=False) as file:
        _set_attributes(file, attributes)
        for name, (dtype, shape, blocks) in arrays.items():
            _make_groups(file, name)
            layout: dict[str, Any] = {}
            row_bytes = math.prod(shape[1:]) * np.dtype(dtype).itemsize
            if shape[0] * row_bytes > 4096:  # less would not pay for an index of chunks
                rows = max(1, min(max(chunk_rows, _SMALL_CHUNK // row_bytes), shape[0], _LARGE_CHUNK // row_bytes))
                layout = {
                    "chunks": (rows, *shape[1:]),
                    "compression": "gzip",
                    "compression_opts": 1,
                    "shuffle": True,
                    "fletcher32": True,
                }
            made = file.create_dataset(name, shape, dtype, **layout)
            done = 0
            for block in blocks:
                made[done : done + len(block)] = block
                done += len(block)


def _set_text(owner: Any, name: str, text: str) -> None:
    data = text.encode("utf-8")
    owner.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", max(len(data), 1)))


def _metadata_text(metadata: Metadata) -> str:
    """Metadata as JSON (with Python's NaN and Infinity: a loss may be infinite)."""
    for key, value in metadata.items():
        if not isinstance(key, str):
            raise DTypeError(f"metadata keys must be strings, got {key!r}")
        if not isinstance(value, str | int | float):
            raise DTypeError(f"metadata[{key!r}] must be a str, int, float or bool, got {type(value).__name__}")
    return json.dumps(dict(metadata))


def _parsed(text: str, where: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{where} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise FileFormatError(f"{where} is not a JSON object")
    return parsed


def _flat(metadata: Any, where: str) -> dict[str, str | int | float | bool]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str | int | float) for value in metadata.values()):
        raise FileFormatError(f"{where} must be a flat dictionary of strings, numbers and booleans")
    return metadata


def read_metadata(file: SafeFile, dataset: str) -> dict[str, str | int | float | bool]:
    """The metadata that :func:`save_teacher_logits` wrote beside a dataset; empty where there are none."""
    where = f"{file.path}: attribute 'metadata' of {dataset!r}"
    return _flat(_parsed(file.attribute(dataset, "metadata", str) or "{}", where), where)


CHECKPOINT_FORMAT = "kdcore.checkpoint"
CHECKPOINT_VERSION = 1


def _checksum(arrays: Mapping[str, NDArray[Any]], metadata: Metadata) -> str:
    header = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    digest = hashlib.sha256(json.dumps([header, dict(metadata)]).encode())  # in hardware, unlike BLAKE2b
    for array in arrays.values():
        digest.update(array.reshape(-1).data)
    return digest.hexdigest()


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, NDArray[Any]], metadata: Metadata) -> None:
    """Write a checkpoint: named arrays and a flat dictionary, in one file that appears whole or not at all.

    A file that was at ``path`` is replaced, or left as it was if writing fails. The file carries a SHA-256 checksum of
    the names, types, shapes, values and metadata.

    Parameters
    ----------
    path
        The file.
    arrays : mapping of str to array
        Of any shape, by names such as ``"weight"`` or ``"optimizer/velocity"``; little-endian integers of 8 to 64
        bits or floats of 16, 32 or 64.
    metadata : mapping
        Strings, integers, floats and booleans, by strings.

    Raises
    ------
    DTypeError
        Other types.
    DomainError
        A name that is empty or lies inside another array's.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_arrays(f"{folder}/student.h5", {"weight": np.arange(3.0)}, {"step": 7})
    ...     read_arrays(f"{folder}/student.h5")
    ({'weight': array([0., 1., 2.])}, {'step': 7})
    """
    plain = {}
    for name, array in arrays.items():
        parts = _parts(name)
        for end in range(1, len(parts)):
            if (parent := "/".join(parts[:end])) in arrays:
                raise DomainError(
                    f"arrays has {name!r} and also {parent!r}, which cannot be an array and a group at once"
                )
        plain[name] = np.asarray(array, order="C")
        if plain[name].dtype.str not in INTEGERS + FLOATS:
            raise DTypeError(
                f"arrays[{name!r}] has the dtype {plain[name].dtype}; expected one of {preview(INTEGERS + FLOATS)}"
            )
    kept = json.loads(_metadata_text(metadata))
    content = {"arrays": list(plain), "metadata": kept, "checksum": _checksum(plain, kept)}
    with _replacing(path) as file:
        _set_text(file, "format", CHECKPOINT_FORMAT)
        file.attrs.create("version", CHECKPOINT_VERSION, dtype="<i8")
        _set_text(file, "content", json.dumps(content))
        for name, array in plain.items():
            _make_groups(file, name)
            file.create_dataset(name, data=array)


def read_arrays(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str | int | float | bool]]:
    """Read what :func:`write_arrays` wrote: ``(arrays, metadata)``, in the order in which they were written.

    The content is not trusted. A file that is not such a checkpoint, is damaged in any bit of its content, or uses a
    feature outside the allow-list of :class:`SafeFile`, raises :class:`~kdcore.errors.CheckpointError`; a missing one
    :class:`FileNotFoundError`.
    """
    with _reading_checkpoint(path) as file:
        return _read_checkpoint(file)


@contextmanager
def _reading_checkpoint(path: str | os.PathLike[str]) -> Iterator[SafeFile]:
    """The file at ``path``; whatever is wrong with its content is a :class:`CheckpointError`."""
    path = file_path(path, "path")
    try:
        with SafeFile(path) as file:
            yield file
    except (FileFormatError, UnsafeFileError, DomainError) as error:
        raise CheckpointError(f"{path} is not a checkpoint that can be read: {error}") from error


def _read_checkpoint(file: SafeFile) -> tuple[dict[str, NDArray[Any]], dict[str, str | int | float | bool]]:
    where = f"{file.path}: attribute 'content'"
    if (found := file.attribute("/", "format", str)) != CHECKPOINT_FORMAT:
        raise FileFormatError(f"{file.path} has the format {found!r}; expected {CHECKPOINT_FORMAT!r}")
    if (version := file.attribute("/", "version", int)) != CHECKPOINT_VERSION:
        raise FileFormatError(f"{file.path} has the version {version}; this kdcore reads version {CHECKPOINT_VERSION}")
    content = _parsed(file.attribute("/", "content", str) or "", where)
    names, metadata, checksum = (content.get(key) for key in ("arrays", "metadata", "checksum"))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise FileFormatError(f"{where} must hold a list 'arrays' of names")
    metadata = _flat(metadata, f"{where}, 'metadata',")

    stored = {name: file.dataset(name, dtypes=INTEGERS + FLOATS) for name in names}
    unmapped = [name for name, array in stored.items() if array.mapped is None]
    if unmapped:
        raise FileFormatError(f"{file.path}: {unmapped[0]!r} is chunked; checkpoints are written contiguous")
    total = sum(array.mapped.nbytes for array in stored.values() if array.mapped is not None)
    if total > file.size:
        raise UnsafeFileError(f"{file.path} is a file of {file.size} bytes, but its arrays overlap into {total}")
    arrays = {name: array.read() for name, array in stored.items()}
    if _checksum(arrays, metadata) != checksum:
        raise FileFormatError(f"{file.path} does not match its checksum {checksum!r}: it was changed or damaged")
    return arrays, metadata


def read_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], dict[str, str | int | float | bool]]:
    """The float arrays at the root of an HDF5 file by anyone's hand, and its text attribute ``activation``, if any.

    A file that :func:`write_arrays` wrote is read as such, checksum and all. Errors as for :func:`read_arrays`.
    """
    with _reading_checkpoint(path) as file:
        if file.attribute("/", "format", str) == CHECKPOINT_FORMAT:
            return _read_checkpoint(file)
        arrays = {name: file.dataset(name, dtypes=FLOATS).read() for name in file.names()}
        activation = file.attribute("/", "activation", str)
    return arrays, {} if activation is None else {"activation": activation}


def widen_logit_rows(stored: NDArray[Any]) -> NDArray[Any]:
    """Rows of any stored dtype as float32, or as the float64 that they are."""
    if stored.dtype == np.uint16:  # bfloat16 is the upper half of a float32
        return (stored.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # what NumPy says of a signalling NaN is said by check_logit_rows, with the row
        return stored.astype(np.promote_types(stored.dtype, np.float32), copy=False)


def check_logit_rows(rows: NDArray[Any], numbers: NDArray[np.int64], source: str) -> None:
    """Refuse NaN, +inf and rows that are -inf throughout. The largest element of a row tells: it must be finite."""
    peaks = rows.max(axis=1)
    bad = np.flatnonzero(~np.isfinite(peaks))
    if bad.size:
        row, number = rows[bad[0]], numbers[bad[0]]
        if np.isneginf(peaks[bad[0]]):
            raise NonFiniteError(f"{source}: row {number} is -inf in every column; at least one must be finite")
        column = int(np.argmax(np.isnan(row) | (row == np.inf)))
        raise NonFiniteError(f"{source}: row {number}, column {column} is {row[column]}; logits must be finite or -inf")


def narrow_logit_rows(rows: NDArray[Any], dtype: DTypeLike, numbers: NDArray[np.int64], source: str) -> NDArray[Any]:
    """``rows`` in a narrower float dtype. A finite value that would become infinite is a :class:`DomainError`."""
    with np.errstate(over="ignore"):
        narrowed = rows.astype(dtype)
    lost = np.argwhere(np.isinf(narrowed) & np.isfinite(rows))
    if lost.size:
        row, column = lost[0]
        raise DomainError(
            f"{source}: row {numbers[row]}, column {column} is {rows[row, column]}, "
            f"which does not fit {narrowed.dtype} and would become {narrowed[row, column]}"
        )
    return narrowed


def _logits_dtype(dtype: DTypeLike, argument: str) -> np.dtype[Any]:
    if isinstance(dtype, str) and dtype == "bfloat16":
        try:
            import ml_dtypes
        except ImportError as error:
            raise MissingDependencyError("dtype='bfloat16' needs the package ml_dtypes") from error
        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    try:
        asked = np.dtype(dtype)
    except TypeError:
        raise DTypeError(f"{argument} must be float16, float32, float64 or bfloat16, got {dtype!r}") from None
    if asked.str not in FLOATS and asked.name != "bfloat16":
        raise DTypeError(f"{argument} must be float16, float32, float64 or bfloat16, got {asked}")
    return asked


def _content_arrays(input_ids: Any) -> dict[str, NDArray[Any]]:
    """The index by content: ``keys`` [N], ``ids`` [N, L] and ``lengths`` [N]."""
    rows = as_rows(input_ids)
    first: dict[int, int] = {}
    for i, row in enumerate(rows):
        j = first.setdefault(content_key(row), i)
        if j != i:
            same = "hold the same ids" if np.array_equal(rows[j], row) else "differ, but share the 64-bit key of"
            raise DomainError(
                f"input_ids[{j}] and input_ids[{i}] {same} {preview(row.tolist())}; contents must be distinct"
            )
    return {
        "keys": np.fromiter(first, np.uint64, len(rows)),
        "ids": pad_rows(rows)[0].astype(np.uint32),
        "lengths": np.array([row.size for row in rows], np.uint32),
    }


def save_teacher_logits(
    path: str | os.PathLike[str],
    logits: NDArray[Any] | Iterable[NDArray[Any]],
    input_ids: Any = None,
    *,
    n_rows: int | None = None,
    vocab_size: int | None = None,
    dataset: str = "logits",
    dtype: DTypeLike | None = None,
    compression: Literal["gzip", "lzf"] | None = None,
    metadata: Metadata | None = None,
) -> None:
    """Write a file of teacher logits that :class:`~kdcore.HDF5Teacher` reads. N rows, V classes.

    Parameters
    ----------
    path
        The file, which appears whole or not at all.
    logits : array [N, V], or iterable of arrays [b, V]
        Blocks hold the rows in order, so that not all need to be held at once. float16, float32, float64 or bfloat16.
        Log-probabilities are logits too (a row may be shifted by any constant), and are the better choice in 16 bits:
        the likely classes are near 0, where rounding is finest.
    input_ids : N rows of token ids in [0, 2**32), optional
        Distinct, ragged or not, for ``address="content"``. Stored beside the dataset as ``keys`` uint64 [N], ``ids``
        uint32 [N, L], right-padded with 0, and ``lengths`` uint32 [N].
    n_rows, vocab_size : int, optional
        N (by default the number of rows of input_ids) and V; required with an iterable.
    dataset : str
        The name in the file; ``"teacher/logits"`` makes a group.
    dtype : optional
        As stored; by default that of the array; required with an iterable. bfloat16 is stored as uint16 with the
        attribute ``dtype="bfloat16"``.
    compression : {"gzip", "lzf"}, optional
        Dense logits hardly compress, and uncompressed files are read fastest, so None by default.
    metadata : mapping, optional
        Strings and numbers about the teacher, which the reader offers as ``metadata``.

    Raises
    ------
    NonFiniteError
        NaN, +inf or a row of nothing but -inf. Errors of values name the row.
    DomainError
        A finite value that does not fit ``dtype``; contents that repeat.
    ShapeError, DTypeError

    Examples
    --------
    >>> import tempfile
    >>> from kdcore.teachers.hdf5 import HDF5Teacher
    >>> log_p = np.log(np.array([[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]], np.float32))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_teacher_logits(f"{folder}/teacher.h5", log_p, [[3, 1], [4]], dtype=np.float16)
    ...     with HDF5Teacher(f"{folder}/teacher.h5", address="content") as teacher:
    ...         teacher.logits_for_batch([[4], [3, 1]]).round(2)
    array([[-2.08, -0.29, -2.08],
           [-0.69, -1.39, -1.39]], dtype=float32)
    """
    content = {} if input_ids is None else _content_arrays(input_ids)
    if content:
        n_rows = _agreed("n_rows", n_rows, content["keys"].size, "rows of input_ids")
    blocks: Iterable[NDArray[Any]]
    if isinstance(logits, np.ndarray):
        if logits.ndim != 2:
            raise ShapeError(f"logits must have two dimensions [rows, classes], got shape {logits.shape}")
        n_rows = _agreed("n_rows", n_rows, logits.shape[0], "rows of logits")
        vocab_size = _agreed("vocab_size", vocab_size, logits.shape[1], "columns of logits")
        dtype = logits.dtype if dtype is None else dtype
        step = max(1, (1 << 24) // max(1, vocab_size * logits.itemsize))
        blocks = (logits[i : i + step] for i in range(0, n_rows, step))
    else:
        blocks = logits
        if n_rows is None or vocab_size is None or dtype is None:
            raise ShapeError("an iterable of blocks needs n_rows (or input_ids), vocab_size and dtype")
        n_rows, vocab_size = integer(n_rows, "n_rows"), integer(vocab_size, "vocab_size")
    if n_rows < 0 or vocab_size < 1:
        raise ShapeError(f"logits must have the shape [N >= 0, V >= 1], got [{n_rows}, {vocab_size}]")

    stored = _logits_dtype(dtype, "dtype")
    is_bfloat16 = stored.name == "bfloat16"
    *group, last = _parts(dataset)
    if last in content:
        raise DomainError(f"dataset {dataset!r} would collide with the index by content; choose another name")
    if compression not in (None, "gzip", "lzf"):
        raise DomainError(f"compression must be None, 'gzip' or 'lzf', got {compression!r}")
    layout: dict[str, Any] = {}
    if compression and n_rows:
        rows = max(1, (1 << 16) // (vocab_size * stored.itemsize))
        layout = {
            "chunks": (min(rows, n_rows), min(vocab_size, MAX_CHUNK_BYTES // stored.itemsize)),
            "compression": compression,
            "shuffle": True,
            "fletcher32": True,
        }
    text = None if metadata is None else _metadata_text(metadata)

    with _replacing(path) as file:
        _make_groups(file, dataset)
        for name, array in content.items():
            file.create_dataset("/".join([*group, name]), data=array)
        target = file.create_dataset(dataset, (n_rows, vocab_size), "<u2" if is_bfloat16 else stored, **layout)
        if is_bfloat16:
            _set_text(target, "dtype", "bfloat16")
        if text is not None:
            _set_text(target, "metadata", text)
        done = 0
        for block in blocks:
            block = np.asarray(block)
            if block.ndim != 2 or block.shape[1] != vocab_size:
                raise ShapeError(
                    f"logits from row {done} on have the shape {block.shape}; expected [rows, {vocab_size}]"
                )
            if done + len(block) > n_rows:
                raise ShapeError(f"logits have more than the {n_rows} rows that were announced")
            _logits_dtype(block.dtype, "the dtype of logits")
            numbers = np.arange(done, done + len(block))
            wide = widen_logit_rows(block)
            check_logit_rows(wide, numbers, "logits")
            narrowed = narrow_logit_rows(wide, stored, numbers, "logits")
            target[done : done + len(block)] = narrowed.view(np.uint16) if is_bfloat16 else narrowed
            done += len(block)
        if done != n_rows:
            raise ShapeError(f"logits have {done} rows; expected {n_rows}")


def _agreed(argument: str, given: int | None, actual: int, source: str) -> int:
    if given is not None and integer(given, argument) != actual:
        raise ShapeError(f"{argument} is {given}, but there are {actual} {source}")
    return actual
