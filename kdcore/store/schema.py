"""What a shard holds: its header, its columns, and the commit that says how much of them is data.

A shard is an HDF5 file of the format ``kdcore.logitstore``. C is its capacity in rows, k the entries of a row, nT its
temperatures, R the rows of a block.

    rows/values         [C, k]     log-probabilities at T = 1, descending (hidden: the states themselves)
    rows/indices        [C, ...]   classes: uint16, uint32, or packed into ``index_bits`` each
    rows/tail_logmass   [C, nT]    log of what all other classes hold at each temperature, float32
    rows/n_valid        [C]        entries that count; those beyond are class 0 and -inf
    rows/input_id       [C]        the token after which the row is the answer
    seq/offsets         [C + 1]    where each sequence begins
    seq/id              [C]        kdcore.sequences.content_key of its tokens
    blocks/crc32        [C / R, columns]
    commit              [2, 64]    two slots, written in turn

Samples have ``rows/values`` and ``rows/indices`` of k entries for each temperature side by side, log-weights at that
temperature, ``rows/n_valid`` [C, nT] and no tail. A dense row is the values of all V classes.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import choice, integer, number_in, positive_number
from kdcore.errors import ChecksumError, DomainError, DTypeError, FileFormatError
from kdcore.hdf5 import Attributes, SafeFile

__all__ = [
    "FORMAT",
    "KINDS",
    "PART",
    "SLOT_WORDS",
    "VALUE_DTYPES",
    "VERSION",
    "Column",
    "Commit",
    "Header",
    "as_temperatures",
    "bits_for",
    "block_rows_for",
    "check_header",
    "crc32_of",
    "newest_commit",
    "read_header",
]

FORMAT = "kdcore.logitstore"
VERSION = (1, 0)
#: What the name of an unfinished shard ends with.
PART = ".part"

KINDS = ("topk", "dense", "sampled", "hidden")
#: As stored; bfloat16 are its bits.
VALUE_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
INDEX_ENCODINGS = ("none", "uint16", "packed", "uint32")
TAIL_SOURCES = ("none", "producer", "derived")
_ORDERS = {"topk": "descending", "sampled": "descending", "dense": "vocabulary", "hidden": "none"}
_SPACES = {"topk": "logprob", "sampled": "logweight", "dense": "logprob", "hidden": "hidden"}
_ALIGNMENT = "row t predicts token t+1"

#: n_valid is uint16, classes are int32, and no store needs more temperatures.
MAX_K, MAX_VOCABULARY, MAX_TEMPERATURES = 65_535, 1 << 31, 64
#: Outside, exponentials of the kernels are no longer accurate.
TEMPERATURES = 1e-6, 1e6
#: Of the logits of hidden states, which are made in float32.
SCALES = 1e-30, 1e30
#: A block is checked when its first row is read: so large that this is rare, and small beside what is read anyway.
_BLOCK_BYTES, _BLOCK_ROWS = 1 << 18, 1024

_SHA256 = re.compile("[0-9a-f]{64}|")


def as_temperatures(values: Iterable[float]) -> tuple[float, ...]:
    """Temperatures in ascending order behind 1, which is always among them: the values are stored at 1."""
    try:
        given = list(values)
    except TypeError:
        raise DTypeError(f"temperatures must be a sequence of numbers, got {values!r}") from None
    low, high = TEMPERATURES
    numbers = {number_in(positive_number(t, "temperatures"), "temperatures", low, high) for t in given}
    if len(numbers) != len(given):
        raise DomainError(f"temperatures must be distinct, got {given!r}")
    others = sorted(numbers - {1.0})
    if len(others) >= MAX_TEMPERATURES:
        raise DomainError(f"temperatures must be at most {MAX_TEMPERATURES}, got {len(given)}")
    return (1.0, *others)


class Column(NamedTuple):
    """A dataset of rows: its name, its dtype as stored, its width (None: one number a row)."""

    name: str
    dtype: str
    width: int | None

    def shape(self, rows: int) -> tuple[int, ...]:
        return (rows,) if self.width is None else (rows, self.width)

    @property
    def row_bytes(self) -> int:
        return np.dtype(self.dtype).itemsize * (1 if self.width is None else self.width)


@dataclass(frozen=True)
class Header:
    """The attributes of a shard, in the order in which they are written."""

    kind: str
    vocab_size: int
    #: Entries of a row (at each temperature, of samples); V of a dense row, the size of hidden states.
    k: int
    value_dtype: str
    index_encoding: str
    index_bits: int
    temperatures: tuple[float, ...]
    tail_source: str
    block_rows: int
    #: Of samples: the classes that are exact, the draws from the others, and what they were drawn with.
    head_k: int = 0
    draws: int = 0
    seed: int = 0
    #: Of hidden states: the output layer they belong to, logits = softcap tanh(scale h W' / softcap); softcap 0: none.
    head_sha256: str = ""
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    teacher: str = ""
    teacher_revision: str = ""
    tokenizer_sha256: str = ""
    corpus_sha256: str = ""
    shard_index: int = 0
    store_uuid: str = ""
    writer: str = ""
    finalized: int = field(default=0, compare=False)

    def columns(self) -> list[Column]:
        """The datasets of rows, in the order of the columns of ``blocks/crc32``."""
        slots = len(self.temperatures) if self.kind == "sampled" else 1
        columns = [Column("rows/values", VALUE_DTYPES[self.value_dtype], self.k * slots)]
        if self.kind in ("topk", "sampled"):
            if self.index_encoding == "packed":
                columns.append(Column("rows/indices", "|u1", (self.k * self.index_bits + 7) // 8 * slots))
            else:
                dtype = {"uint16": "<u2", "uint32": "<u4"}[self.index_encoding]
                columns.append(Column("rows/indices", dtype, self.k * slots))
            if self.kind == "topk":
                columns.append(Column("rows/tail_logmass", "<f4", len(self.temperatures)))
            columns.append(Column("rows/n_valid", "<u2", slots if self.kind == "sampled" else None))
        columns.append(Column("rows/input_id", "<u4", None))
        return columns

    def attributes(self) -> Attributes:
        """As they are written."""
        values: dict[str, Any] = {
            "format": FORMAT,
            "version_major": VERSION[0],
            "version_minor": VERSION[1],
            "value_space": _SPACES[self.kind],
            "order": _ORDERS[self.kind],
            "alignment": _ALIGNMENT,
            "n_columns": len(self.columns()),
        }
        return values | {f.name: getattr(self, f.name) for f in fields(self)}

    def agreed(self) -> dict[str, Any]:
        """What the shards of one store have in common."""
        own = ("shard_index", "store_uuid", "writer", "finalized", "block_rows", "index_encoding", "seed")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in own}

    @property
    def unit(self) -> float:
        """By which part of itself a value is off at most: half a unit in its last place."""
        return {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[self.value_dtype]

    @property
    def tolerance(self) -> float:
        """By how much the probabilities of a row may miss 1.

        Rounding moves log p by half a unit in its last place: of values between 8 and 16, which a flat row of any
        vocabulary has, 2^-8 in float16 and 2^-5 in bfloat16.
        """
        return {"float16": 5e-3, "bfloat16": 4e-2, "float32": 1e-4}[self.value_dtype]


def crc32_of(array: NDArray[Any], start: int = 0) -> int:
    """The CRC32 of an array's bytes, behind those that gave ``start``."""
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data, start)


def block_rows_for(columns: list[Column]) -> int:
    """The rows of a block by default."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // sum(column.row_bytes for column in columns)))


def bits_for(vocab_size: int) -> int:
    """Bits of a class."""
    return max(1, (vocab_size - 1).bit_length())


def read_header(file: SafeFile) -> Header:
    """The header of a file, every attribute checked."""
    where = f"{file.path}: attribute"

    def required(name: str, kind: type) -> Any:
        value = file.attribute("/", name, kind)
        if value is None:
            raise FileFormatError(f"{where} {name!r} is missing")
        return value

    def expect(name: str, found: Any, expected: Any) -> None:
        if found != expected:
            raise FileFormatError(f"{where} {name!r} is {found!r}; expected {expected!r}")

    if (found := file.attribute("/", "format", str)) != FORMAT:
        raise FileFormatError(f"{where} 'format' is {found!r}; expected {FORMAT!r}")
    major = required("version_major", int)
    if major != VERSION[0]:
        raise FileFormatError(f"{where} 'version_major' is {major}; this kdcore reads {VERSION[0]}")
    required("version_minor", int)
    values: dict[str, Any] = {}
    for f in fields(Header):
        if f.name == "temperatures":
            values[f.name] = file.vector_attribute("/", f.name, MAX_TEMPERATURES)
            if values[f.name] is None:
                raise FileFormatError(f"{where} {f.name!r} is missing")
        else:
            values[f.name] = required(f.name, {"int": int, "float": float}.get(str(f.type), str))
    header = Header(**values)
    try:
        check_header(header)
    except (DomainError, DTypeError) as error:
        raise FileFormatError(f"{where} {error}") from error
    expect("value_space", required("value_space", str), _SPACES[header.kind])
    expect("order", required("order", str), _ORDERS[header.kind])
    expect("alignment", required("alignment", str), _ALIGNMENT)
    expect("n_columns", required("n_columns", int), len(header.columns()))
    return header


def check_header(header: Header) -> None:
    """Raise for a header that no writer makes."""
    choice(header.kind, "kind", KINDS)
    choice(header.value_dtype, "value_dtype", VALUE_DTYPES)
    choice(header.index_encoding, "index_encoding", INDEX_ENCODINGS)
    choice(header.tail_source, "tail_source", TAIL_SOURCES)
    sparse = header.kind in ("topk", "sampled")
    for name, low, high in (
        ("vocab_size", 1, MAX_VOCABULARY),
        ("k", 1, MAX_K if sparse else MAX_VOCABULARY),
        ("block_rows", 1, 1 << 31),
        ("head_k", 0, MAX_K),
        ("draws", 0, MAX_K),
        ("shard_index", 0, 1 << 62),
        ("finalized", 0, 1),
    ):
        number_in(integer(getattr(header, name), name), name, low, high)
    for name in ("head_sha256", "tokenizer_sha256", "corpus_sha256"):
        if not _SHA256.fullmatch(getattr(header, name)):
            raise DomainError(f"{name!r} must be 64 hexadecimal digits or nothing, got {getattr(header, name)!r}")
    number_in(header.logit_scale, "logit_scale", *SCALES)
    if header.logit_softcap != 0:
        number_in(header.logit_softcap, "logit_softcap", *SCALES)
    if as_temperatures(header.temperatures) != header.temperatures:
        raise DomainError(f"'temperatures' must begin with 1 and ascend from there, got {header.temperatures}")

    def agree(name: str, expected: Any, why: str) -> None:
        if getattr(header, name) != expected:
            raise DomainError(f"{name!r} is {getattr(header, name)!r}; expected {expected!r} for {why}")

    if header.kind in ("topk", "sampled"):
        bits = bits_for(header.vocab_size)
        agree("index_bits", bits, f"a vocabulary of {header.vocab_size}")
        if header.index_encoding == "none" or (header.index_encoding == "uint16" and bits > 16):
            raise DomainError(f"'index_encoding' is {header.index_encoding!r}, which cannot hold {bits} bits")
    else:
        agree("index_encoding", "none", f"the kind {header.kind!r}")
        agree("index_bits", 0, f"the kind {header.kind!r}")
        agree("temperatures", (1.0,), f"the kind {header.kind!r}")
    if header.kind == "topk" and header.k > header.vocab_size:
        raise DomainError(f"'k' is {header.k}, more than the {header.vocab_size} classes of 'vocab_size'")
    if header.kind == "dense":
        agree("k", header.vocab_size, "dense rows")
    if header.kind == "sampled":
        width = min(header.head_k + header.draws, header.vocab_size)
        agree("k", width, f"{header.head_k} exact classes and {header.draws} draws of {header.vocab_size} classes")
        if header.draws < 1:
            raise DomainError(f"'draws' must be at least 1, got {header.draws}")
    if header.kind == "hidden" and not header.head_sha256:
        raise DomainError("'head_sha256' is missing, without which hidden states belong to nothing")
    if (header.tail_source == "none") != (header.kind != "topk"):
        raise DomainError(f"'tail_source' is {header.tail_source!r} for the kind {header.kind!r}")
    if header.tail_source == "derived":
        agree("temperatures", (1.0,), "a tail that was derived, which says nothing of others")


#: Words of a slot of ``commit``: a slot is 512 bytes, so that what a disk writes at once never holds both.
SLOT_WORDS = 64


@dataclass(frozen=True)
class Commit:
    """How much of a shard is data, and the checksums of what no full block covers."""

    counter: int
    rows: int
    sequences: int
    offsets_crc: int
    ids_crc: int
    #: Of the committed rows of the last block, if that is not full, column by column.
    open_crcs: tuple[int, ...]

    def words(self, store_uuid: str) -> NDArray[np.uint64]:
        """The slot, which ends in its own checksum; another store's would not match."""
        content = (self.counter, self.rows, self.sequences, self.offsets_crc, self.ids_crc, *self.open_crcs)
        slot = np.zeros(SLOT_WORDS, "<u8")
        slot[: len(content)] = content
        slot[-1] = crc32_of(slot[:-1], zlib.crc32(store_uuid.encode()))
        return slot

    @staticmethod
    def parse(slot: NDArray[np.uint64], columns: int, store_uuid: str) -> Commit | None:
        """The commit of a slot; None if it was never written, or not to the end."""
        numbers = slot.tolist()
        if numbers[-1] != crc32_of(slot[:-1], zlib.crc32(store_uuid.encode())) or numbers[0] == 0:
            return None
        counter, rows, sequences, offsets_crc, ids_crc = numbers[:5]
        return Commit(counter, rows, sequences, offsets_crc, ids_crc, tuple(numbers[5 : 5 + columns]))


def newest_commit(slots: NDArray[np.uint64], header: Header, path: Any) -> Commit:
    """The commit that holds. A finished shard has it in both slots, so that damage to one is seen."""
    found = [Commit.parse(slot, len(header.columns()), header.store_uuid) for slot in slots]
    valid = sorted((commit for commit in found if commit is not None), key=lambda commit: commit.counter)
    if not valid:
        raise ChecksumError(f"{path}: 'commit' has no slot whose checksum matches: the file is damaged")
    if header.finalized:
        contents = {(c.rows, c.sequences, c.offsets_crc, c.ids_crc, c.open_crcs) for c in valid}
        if len(valid) != 2 or len(contents) != 1:
            raise ChecksumError(f"{path}: the two slots of 'commit' of a finished shard differ: the file is damaged")
    return valid[-1]
