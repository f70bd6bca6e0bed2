"""Files that are not what a writer wrote: each is refused, by an error that names the file and what is wrong."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

import kdcore
from kdcore.errors import ChecksumError, FileFormatError, KdcoreError, UnsafeFileError
from kdcore.sequences import content_key
from kdcore.store.convert import repack
from kdcore.store.schema import Commit, crc32_of

VOCAB, K, BLOCK = 90, 4, 4
SEQUENCES = [np.array([3, 1, 4, 1, 5]), np.array([9, 2, 6]), np.array([5, 3])]
CAPACITY = 12


def write_good(path: Path, **options) -> Path:
    rng = np.random.default_rng(0)
    options = {"vocab_size": VOCAB, "k": K, "capacity": CAPACITY, "block_rows": BLOCK} | options
    with kdcore.LogitStoreWriter(path, **options) as writer:
        for ids in SEQUENCES:
            writer.append(ids, (rng.normal(size=(ids.size, options["vocab_size"])) * 2).astype(np.float32))
    return path


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    paths = {
        "plain": write_good(folder / "plain.h5"),
        "packed": write_good(folder / "packed.h5", vocab_size=70_000),
        "archive": repack(write_good(folder / "to-repack.h5"), folder / "archive.h5"),
        "sampled": write_good(folder / "sampled.h5", kind="sampled", k=None, head_k=2, draws=3),
        "dense": write_good(folder / "dense.h5", kind="dense", k=None),
    }
    for path in paths.values():
        with kdcore.LogitStore(path) as store:
            store.verify()
    return paths


def edit(path: Path, name: str, where, value) -> None:
    with h5py.File(path, "r+") as file:
        data = file[name][()]
        data[where] = value
        file[name][...] = data


def attribute(path: Path, name: str, value, **kind) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs.create(name, value, **kind)


def text(path: Path, name: str, value: str) -> None:
    attribute(path, name, value.encode(), dtype=h5py.string_dtype("utf-8", max(len(value), 1)))


def reseal(path: Path, **changes) -> None:
    """Checksums that match what is there now, so that a reader must look at the values."""
    with h5py.File(path, "r+") as file:
        names = ["rows/values", "rows/indices", "rows/tail_logmass", "rows/n_valid", "rows/input_id"]
        names = [name for name in names if name in file]
        slots, uuid = file["commit"][()], file.attrs["store_uuid"].decode()
        old = Commit.parse(max(slots, key=lambda slot: slot[0]), len(names), uuid)
        rows = changes.get("rows", old.rows)
        block = int(file.attrs["block_rows"])
        crcs = file["blocks/crc32"][()]
        open_crcs = [0] * len(names)
        for start in range(0, min(rows, len(file["rows/input_id"])), block):
            found = [crc32_of(file[name][start : min(start + block, rows)]) for name in names]
            if start + block <= rows:
                crcs[start // block] = found
            else:
                open_crcs = found
        file["blocks/crc32"][...] = crcs
        sequences = changes.get("sequences", old.sequences)
        values = {
            "rows": rows,
            "sequences": sequences,
            "offsets_crc": crc32_of(file["seq/offsets"][: sequences + 1]),
            "ids_crc": crc32_of(file["seq/id"][:sequences]),
            "open_crcs": tuple(open_crcs),
        } | changes
        file["commit"][...] = [Commit(counter=n, **values).words(uuid) for n in (8, 9)]


def swap(path: Path, name: str, **create) -> None:
    """Another dataset in the place of one, with the same data unless ``create`` has its own."""
    with h5py.File(path, "r+") as file:
        data = file[name][()]
        del file[name]
        file.create_dataset(name, **({"data": data} | create))


# name -> (function of a copy of a good shard, error, words). Those in VALUES are seen when rows are read.


def truncated(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 700)


def half(path):
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path):
    path.write_bytes(b"")


def not_hdf5(path):
    path.write_bytes(b"not HDF5 " * 1000)


def soft_link(path):
    with h5py.File(path, "r+") as file:
        file.move("rows/values", "elsewhere")
        file["rows/values"] = h5py.SoftLink("/elsewhere")


def soft_link_to_the_group(path):
    with h5py.File(path, "r+") as file:
        file.move("rows", "elsewhere")
        file["rows"] = h5py.SoftLink("/elsewhere")


def external_link(path):
    other = path.with_name("other.h5")
    with h5py.File(path, "r+") as file, h5py.File(other, "w") as target:
        target["values"] = file["rows/values"][()]
        del file["rows/values"]
        file["rows/values"] = h5py.ExternalLink("other.h5", "/values")


def external_link_to_the_group(path):
    shutil.copy(path, path.with_name("other.h5"))
    with h5py.File(path, "r+") as file:
        del file["seq"]
        file["seq"] = h5py.ExternalLink("other.h5", "/seq")


def external_storage(path):
    secret = path.with_name("secret")
    secret.write_bytes(bytes(CAPACITY * K * 2))
    with h5py.File(path, "r+") as file:
        del file["rows/values"]
        file.create_dataset("rows/values", (CAPACITY, K), "<f2", external=[(str(secret), 0, CAPACITY * K * 2)])


def virtual(path):
    layout = h5py.VirtualLayout((CAPACITY,), "<u4")
    layout[:] = h5py.VirtualSource("other.h5", "ids", (CAPACITY,))
    with h5py.File(path, "r+") as file:
        del file["rows/input_id"]
        file.create_virtual_dataset("rows/input_id", layout)


def compact(path):
    with h5py.File(path, "r+") as file:
        data = file["seq/id"][()]
        del file["seq/id"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_layout(h5py.h5d.COMPACT)
        space = h5py.h5s.create_simple(data.shape)
        h5py.h5d.create(file["seq"].id, b"id", h5py.h5t.STD_U64LE, space, plist).write(space, space, data)


def shape_bomb(path):
    with h5py.File(path, "r+") as file:
        del file["rows/values"]
        file.create_dataset("rows/values", (1 << 40, K), "<f2", chunks=(1 << 10, K))


def big_chunks(path):
    with h5py.File(path, "r+") as file:
        del file["rows/values"]
        file.create_dataset("rows/values", (1 << 24, K), "<f2", chunks=(1 << 24, K))


def unknown_filter(path):
    with h5py.File(path, "r+") as file:
        del file["rows/values"]
        plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plist.set_chunk((CAPACITY, K))
        plist.set_filter(305, h5py.h5z.FLAG_OPTIONAL, (1,))
        space = h5py.h5s.create_simple((CAPACITY, K))
        h5py.h5d.create(file["rows"].id, b"values", h5py.h5t.IEEE_F16LE, space, plist)


def too_many_rows(path):
    reseal(path, rows=CAPACITY + 1)


def fewer_rows_than_offsets(path):
    reseal(path, rows=9)


def too_many_sequences(path):
    reseal(path, sequences=CAPACITY + 1)


def no_slots(path):
    edit(path, "commit", slice(None), 0)


def one_slot_flipped(path):
    edit(path, "commit", (0, 1), 3)


def slots_of_another_store(path):
    uuid = "0" * 32
    with h5py.File(path, "r+") as file:
        file["commit"][...] = [Commit(n, 10, 3, 0, 0, (0,) * 5).words(uuid) for n in (1, 2)]


def offsets_from_one(path):
    edit(path, "seq/offsets", 0, 1)


def offsets_descend(path):
    edit(path, "seq/offsets", 1, 9)


def offsets_end_early(path):
    edit(path, "seq/offsets", 3, 9)


def offsets_twice(path):
    edit(path, "seq/offsets", 1, 0)


OPENING = {
    "truncated": (truncated, FileFormatError, "damaged or truncated|ends at byte"),
    "half": (half, FileFormatError, "damaged or truncated"),
    "empty": (empty, FileFormatError, "damaged or truncated"),
    "not HDF5": (not_hdf5, FileFormatError, "damaged or truncated"),
    "format": (
        lambda p: text(p, "format", "other"),
        FileFormatError,
        "'format' is 'other'; expected 'kdcore.logitstore'",
    ),
    "no format": (lambda p: attribute(p, "format", None), FileFormatError, "'format' is None"),
    "major": (
        lambda p: attribute(p, "version_major", 2, dtype="<i8"),
        FileFormatError,
        "'version_major' is 2; .* reads 1",
    ),
    "no minor": (lambda p: attribute(p, "version_minor", None), FileFormatError, "'version_minor' is missing"),
    "kind": (lambda p: text(p, "kind", "best"), FileFormatError, "kind must be one of .*'best'"),
    "kind of dense": (lambda p: text(p, "kind", "dense"), FileFormatError, "expected 'none' for the kind 'dense'"),
    "value dtype": (lambda p: text(p, "value_dtype", "int4"), FileFormatError, "value_dtype must be one of"),
    "other value dtype": (
        lambda p: text(p, "value_dtype", "float32"),
        FileFormatError,
        "'rows/values' has the type float of 2",
    ),
    "value space": (
        lambda p: text(p, "value_space", "logit"),
        FileFormatError,
        "'value_space' is 'logit'; expected 'logprob'",
    ),
    "order": (lambda p: text(p, "order", "ascending"), FileFormatError, "'order' is 'ascending'"),
    "alignment": (lambda p: text(p, "alignment", "row t predicts token t"), FileFormatError, "'alignment' is"),
    "encoding": (
        lambda p: text(p, "index_encoding", "packed"),
        FileFormatError,
        "'rows/indices' has the type integer of 2",
    ),
    "encoding unknown": (
        lambda p: text(p, "index_encoding", "delta"),
        FileFormatError,
        "index_encoding must be one of",
    ),
    "bits": (lambda p: attribute(p, "index_bits", 5, dtype="<i8"), FileFormatError, "'index_bits' is 5; expected 7"),
    "k": (
        lambda p: attribute(p, "k", 5, dtype="<i8"),
        FileFormatError,
        r"'rows/values' has the shape \(12, 4\); expected \(12, 5\)",
    ),
    "k beyond V": (lambda p: attribute(p, "k", 91, dtype="<i8"), FileFormatError, "'k' is 91, more than the 90"),
    "k zero": (lambda p: attribute(p, "k", 0, dtype="<i8"), FileFormatError, "k must be in"),
    "k beyond uint16": (
        lambda p: attribute(p, "k", 65_536, dtype="<i8"),
        FileFormatError,
        r"k must be in \[1, 65535\]",
    ),
    "k as text": (lambda p: text(p, "k", "4"), FileFormatError, "'k' .*expected int"),
    "k as float": (lambda p: attribute(p, "k", 4.0, dtype="<f8"), FileFormatError, "expected int"),
    "k as array": (lambda p: attribute(p, "k", [4, 4], dtype="<i8"), UnsafeFileError, "not a plain scalar"),
    "no vocabulary": (lambda p: attribute(p, "vocab_size", None), FileFormatError, "'vocab_size' is missing"),
    "vocabulary zero": (lambda p: attribute(p, "vocab_size", 0, dtype="<i8"), FileFormatError, "vocab_size must be in"),
    "vocabulary huge": (
        lambda p: attribute(p, "vocab_size", 1 << 40, dtype="<i8"),
        FileFormatError,
        "vocab_size must be in",
    ),
    "temperatures": (lambda p: attribute(p, "temperatures", [2.0, 1.0]), FileFormatError, "must begin with 1"),
    "temperature nan": (lambda p: attribute(p, "temperatures", [1.0, np.nan]), FileFormatError, "temperatures must be"),
    "temperatures scalar": (lambda p: attribute(p, "temperatures", 1.0), FileFormatError, "expected a vector"),
    "temperatures many": (lambda p: attribute(p, "temperatures", np.arange(1.0, 99.0)), FileFormatError, "at most 64"),
    "temperatures text": (lambda p: text(p, "temperatures", "1 2"), FileFormatError, "expected float64"),
    "one temperature more": (
        lambda p: attribute(p, "temperatures", [1.0, 2.0, 3.0]),
        FileFormatError,
        r"expected \(12, 3\)",
    ),
    "derived at two": (lambda p: text(p, "tail_source", "derived"), FileFormatError, "a tail that was derived"),
    "tail source": (lambda p: text(p, "tail_source", "guess"), FileFormatError, "tail_source must be one of"),
    "block rows": (
        lambda p: attribute(p, "block_rows", 3, dtype="<i8"),
        FileFormatError,
        r"'blocks/crc32' has the shape \(3, 5\)",
    ),
    "block rows zero": (lambda p: attribute(p, "block_rows", 0, dtype="<i8"), FileFormatError, "block_rows must be in"),
    "columns": (lambda p: attribute(p, "n_columns", 4, dtype="<i8"), FileFormatError, "'n_columns' is 4; expected 5"),
    "sha": (lambda p: text(p, "tokenizer_sha256", "x" * 64), FileFormatError, "64 hexadecimal digits"),
    "not finished": (
        lambda p: attribute(p, "finalized", 0, dtype="<i8"),
        FileFormatError,
        "'finalized' is 0 .*recover=True",
    ),
    "no dataset": (lambda p: swap_away(p, "rows/tail_logmass"), FileFormatError, "has no 'rows/tail_logmass'"),
    "no group": (lambda p: swap_away(p, "seq"), FileFormatError, "has no 'seq/offsets'"),
    "group for dataset": (
        lambda p: (swap_away(p, "commit"), make_group(p, "commit")),
        FileFormatError,
        "is a group, not a dataset",
    ),
    "soft link": (soft_link, UnsafeFileError, "'rows/values' is a soft link"),
    "soft link above": (soft_link_to_the_group, UnsafeFileError, "'rows' is a soft link"),
    "external link": (external_link, UnsafeFileError, "'rows/values' is an external link"),
    "external link above": (external_link_to_the_group, UnsafeFileError, "'seq' is an external link"),
    "external storage": (external_storage, UnsafeFileError, "external storage"),
    "virtual": (virtual, UnsafeFileError, "virtual layout"),
    "compact": (compact, UnsafeFileError, "compact layout"),
    "shape bomb": (shape_bomb, UnsafeFileError, "declares .* bytes"),
    "big chunks": (big_chunks, UnsafeFileError, "chunks of .* bytes"),
    "unknown filter": (unknown_filter, UnsafeFileError, "filter 305"),
    "rank": (
        lambda p: swap(p, "rows/n_valid", data=np.ones((CAPACITY, 1), "<u2")),
        FileFormatError,
        "expected 1 dimension",
    ),
    "fewer rows": (
        lambda p: swap(p, "rows/n_valid", data=np.ones(CAPACITY - 1, "<u2")),
        FileFormatError,
        r"\(11,\); expected \(12,\)",
    ),
    "big-endian": (lambda p: swap(p, "rows/input_id", data=np.zeros(CAPACITY, ">u4")), FileFormatError, "big-endian"),
    "signed": (
        lambda p: swap(p, "rows/input_id", data=np.zeros(CAPACITY, "<i4")),
        FileFormatError,
        "'rows/input_id' has the type",
    ),
    "compound": (
        lambda p: swap(p, "rows/input_id", data=np.zeros(CAPACITY, [("a", "<u4")])),
        UnsafeFileError,
        "compound",
    ),
    "variable length": (
        lambda p: swap(p, "rows/input_id", data=None, shape=(CAPACITY,), dtype=h5py.vlen_dtype(np.uint32)),
        UnsafeFileError,
        "variable-length",
    ),
    "strings": (lambda p: swap(p, "rows/input_id", data=np.full(CAPACITY, b"text")), UnsafeFileError, "string"),
    "opaque": (lambda p: swap(p, "rows/values", data=np.zeros((CAPACITY, K), "V2")), UnsafeFileError, "opaque"),
    "scalar": (lambda p: swap(p, "rows/input_id", data=np.uint32(3)), FileFormatError, "expected 1 dimension"),
    "null": (lambda p: swap(p, "rows/input_id", data=h5py.Empty("<u4")), FileFormatError, "null"),
    "never written": (
        lambda p: swap(p, "rows/input_id", data=None, shape=(CAPACITY,), dtype="<u4"),
        FileFormatError,
        "never written",
    ),
    "offsets short": (
        lambda p: swap(p, "seq/offsets", data=np.zeros(CAPACITY, "<u8")),
        FileFormatError,
        r"expected \(13,\)",
    ),
    "same bytes twice": (lambda p: one_place_for_two(p), UnsafeFileError, "they overlap"),
    "too many rows": (too_many_rows, FileFormatError, "'commit' has 13 rows, but 'rows/input_id' has room for 12"),
    "too many sequences": (too_many_sequences, FileFormatError, "'commit' has 13 sequences"),
    "fewer rows than offsets": (fewer_rows_than_offsets, FileFormatError, "from 0 to 10; expected 0 to the 9 rows"),
    "no slots": (no_slots, ChecksumError, "no slot whose checksum matches"),
    "one slot": (one_slot_flipped, ChecksumError, "two slots"),
    "slots of another": (slots_of_another_store, ChecksumError, "no slot"),
    "offsets from one": (offsets_from_one, FileFormatError, "from 1 to 10"),
    "offsets descend": (offsets_descend, FileFormatError, "'seq/offsets' is 9 in row 1 and 8 in the next"),
    "offsets end early": (offsets_end_early, FileFormatError, "from 0 to 9; expected 0 to the 10"),
    "offsets twice": (offsets_twice, FileFormatError, "'seq/offsets' is 0 in row 0 and 0 in the next"),
}


def swap_away(path, name):
    with h5py.File(path, "r+") as file:
        del file[name]


def make_group(path, name):
    with h5py.File(path, "r+") as file:
        file.create_group(name)


def one_place_for_two(path):
    """Two columns of one shape and dtype are the same bytes, under two names."""
    with h5py.File(path, "r+") as file:
        del file.attrs["temperatures"]
        file.attrs["temperatures"] = np.array([1.0, 2.0, 3.0, 4.0])
        del file["rows/tail_logmass"]
        file.create_dataset("rows/tail_logmass", data=np.zeros((CAPACITY, K), "<f4"))
        del file["rows/values"], file.attrs["value_dtype"]
        file["rows/values"] = file["rows/tail_logmass"]
    with h5py.File(path, "r+") as file:
        file.attrs.create("value_dtype", b"float32", dtype=h5py.string_dtype("utf-8", 7))


@pytest.mark.parametrize("name", OPENING)
def test_files_that_are_not_opened(good, tmp_path, name):
    damage, error, words = OPENING[name]
    path = Path(shutil.copy(good["plain"], tmp_path / "bad.h5"))
    damage(path)
    with pytest.raises(error, match=re.escape(str(path)) + ".*" + f"({words})") as caught:
        kdcore.LogitStore(path)
    assert isinstance(caught.value, KdcoreError)


def values(name, where, value):
    def damage(path):
        edit(path, name, where, value)
        reseal(path)

    return damage


def swap_tails(path):
    with h5py.File(path, "r+") as file:
        file["rows/tail_logmass"][...] = file["rows/tail_logmass"][()][:, ::-1]
    reseal(path)


def renormalised(path):
    with h5py.File(path, "r+") as file:
        log_p = file["rows/values"][()].astype(np.float64)
        log_p[:10] -= np.log(np.exp(log_p[:10]).sum(axis=1, keepdims=True))
        file["rows/values"][...] = log_p
    reseal(path)


def raw_logits(path):
    with h5py.File(path, "r+") as file:
        file["rows/values"][:10] = file["rows/values"][:10] - np.float16(3)
    reseal(path)


VALUES = {
    "nan": (values("rows/values", (6, 1), np.nan), "'rows/values', row 6: entry 1 is nan"),
    "inf": (values("rows/values", (6, 0), np.inf), "'rows/values', row 6: entry 0 is inf; .* at most 0"),
    "positive": (values("rows/values", (6, 0), 0.5), "'rows/values', row 6: entry 0 is 0.5; .* at most 0"),
    "-inf that counts": (
        values("rows/values", (9, 3), -np.inf),
        "row 9: entry 3 is -inf, but 'rows/n_valid' says that 4",
    ),
    "order": (values("rows/values", (2, 2), -9.0), "row 2: entry 3 is .*, more than the -9.0 before it"),
    "class": (
        values("rows/indices", (5, 2), 90),
        "'rows/indices', row 5: entry 2 is the class 90 in a vocabulary of 90",
    ),
    "class far": (values("rows/indices", (5, 2), 65_535), "entry 2 is the class 65535"),
    "class twice": (lambda p: twice(p), "'rows/indices', row 4: entry 3 is the class .* has already"),
    "no classes": (values("rows/n_valid", 7, 0), "'rows/n_valid', row 7: is 0; expected 1 to 4"),
    "many classes": (values("rows/n_valid", 7, 5), "'rows/n_valid', row 7: is 5; expected 1 to 4"),
    "fewer classes": (values("rows/n_valid", 7, 2), "row 7: entry 2, beyond 'rows/n_valid'"),
    "tail nan": (values("rows/tail_logmass", (1, 1), np.nan), "'rows/tail_logmass', row 1: entry 1 is nan"),
    "tail positive": (values("rows/tail_logmass", (1, 0), 0.25), "row 1: entry 0 is 0.25"),
    "tail of all": (values("rows/tail_logmass", (1, 1), 0.0), "row 1: entry 1 is 0"),
    "no tail": (values("rows/tail_logmass", (1, 1), -np.inf), "row 1: entry 1 is -inf, which .* rule out"),
    "tail too small": (values("rows/tail_logmass", (1, 0), -9.0), "row 1: holds .* do not add up to 1"),
    "tails swapped": (swap_tails, "row \\d+: holds .* do not add up to 1"),
    "tail at 2 too large": (
        values("rows/tail_logmass", (3, 1), -1e-9),
        "row 3: entry 1 is -1e-09|row 3: entry 1 is -9.99",
    ),
    "tail at 2 too small": (values("rows/tail_logmass", (3, 1), -30.0), "row 3: entry 1 is -30.0"),
    "renormalised": (renormalised, "row \\d+: holds .* do not add up to 1"),
    "raw logits": (raw_logits, "row \\d+: holds .* do not add up to 1"),
}


def twice(path):
    with h5py.File(path, "r+") as file:
        ids = file["rows/indices"][()]
        ids[4, 3] = ids[4, 0]
        file["rows/indices"][...] = ids
    reseal(path)


@pytest.mark.parametrize("name", VALUES)
def test_rows_that_are_not_read(good, tmp_path, name):
    damage, words = VALUES[name]
    path = Path(shutil.copy(good["plain"], tmp_path / "bad.h5"))
    damage(path)
    with kdcore.LogitStore(path) as store:
        for read in (lambda: store.read(slice(None)), store.verify, lambda: list(store.shuffled(0))):
            with pytest.raises(FileFormatError, match=re.escape(str(path)) + ".*(" + words + ")") as caught:
                read()
            assert not isinstance(caught.value, ChecksumError)


@pytest.mark.parametrize("row", range(10))
@pytest.mark.parametrize("name", ["rows/values", "rows/indices", "rows/tail_logmass", "rows/n_valid", "rows/input_id"])
def test_a_flipped_bit_of_a_row(good, tmp_path, name, row):
    path = Path(shutil.copy(good["plain"], tmp_path / "bad.h5"))
    with h5py.File(path, "r+") as file:
        data = np.ascontiguousarray(file[name][()])
        data.reshape(CAPACITY, -1).view(np.uint8)[row, 1] ^= 4
        file[name][...] = data
    with kdcore.LogitStore(path) as store:
        others = [r for r in range(10) if r // BLOCK != row // BLOCK]
        store.read(others)
        lo = row // BLOCK * BLOCK
        with pytest.raises(ChecksumError, match=rf"'{name}', rows {lo} to {min(lo + 3, 9)}: .*0x\w+; expected 0x\w+"):
            store.read(row)


@settings(max_examples=300)
@given(data=st.data())
@pytest.mark.parametrize("form", ["plain", "packed", "archive", "sampled", "dense"])
def test_any_flipped_bit_is_seen_or_changes_nothing(good, tmp_path_factory, form, data):
    """Whatever bit flips: an error, or the same rows. Never other rows."""
    original = good[form].read_bytes()
    position = data.draw(st.integers(0, len(original) - 1), "position")
    damaged = bytearray(original)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7), "bit")
    path = tmp_path_factory.mktemp("flip") / "t.h5"
    path.write_bytes(damaged)
    with kdcore.LogitStore(good[form]) as store:
        expected = [store.sequence(ids, 1.0) for ids in SEQUENCES]
    try:
        with kdcore.LogitStore(path) as store:
            store.verify()
            found = [store.sequence(ids, 1.0) for ids in SEQUENCES]
    except (KdcoreError, OSError):
        return
    for a, b in zip(expected, found, strict=True):
        if form == "dense":
            np.testing.assert_array_equal(a, b)
            continue
        for name in ("indices", "n_valid", "log_weights" if form == "sampled" else "log_probs"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_keys_that_are_not_those_of_the_tokens(good, tmp_path):
    path = Path(shutil.copy(good["plain"], tmp_path / "bad.h5"))
    edit(path, "seq/id", 1, content_key([1, 2, 3]))
    with kdcore.LogitStore(path) as store, pytest.raises(ChecksumError, match="'seq/id'"):
        store.sequence(SEQUENCES[1])
    reseal(path)
    with kdcore.LogitStore(path) as store:
        with pytest.raises(FileFormatError, match=r"rows 5 to 7 keep \[9, 2, 6\] instead of \[1, 2, 3\]"):
            store.sequence([1, 2, 3])
        with pytest.raises(
            FileFormatError, match=r"'seq/id', row 1: the key is \d+, but that of the tokens in rows 5 to 7"
        ):
            store.verify()


def test_a_sequence_that_is_there_twice(tmp_path):
    path = tmp_path / "t.h5"
    with kdcore.LogitStoreWriter(path, vocab_size=5, k=2, capacity=4) as writer:
        writer.append([1, 2], np.zeros((2, 5), np.float32))
        writer._keys.clear()
        writer.append([1, 2], np.zeros((2, 5), np.float32))
    with kdcore.LogitStore(path) as store, pytest.raises(FileFormatError, match="in row 0 and in row 1"):
        store.verify()


def test_later_minor_versions_are_read(good, tmp_path):
    path = Path(shutil.copy(good["plain"], tmp_path / "new.h5"))
    attribute(path, "version_minor", 7, dtype="<i8")
    with h5py.File(path, "r+") as file:
        file.attrs["of a later version"] = 3
        file["rows/of a later version"] = np.zeros(3)
    with kdcore.LogitStore(path) as store:
        store.verify()


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        kdcore.LogitStore(tmp_path / "none.h5")
    with pytest.raises(IsADirectoryError):
        kdcore.LogitStore(tmp_path)
    kdcore.save_teacher_logits(tmp_path / "dense.h5", np.zeros((3, 4), np.float32))
    with pytest.raises(FileFormatError, match="'format' is None; expected 'kdcore.logitstore'"):
        kdcore.LogitStore(tmp_path / "dense.h5")


def test_a_file_that_is_replaced_while_it_is_open(good, tmp_path):
    path = Path(shutil.copy(good["plain"], tmp_path / "t.h5"))
    with kdcore.LogitStore(path) as store:
        expected = store.read(slice(None)).log_probs
        other = write_good(tmp_path / "other.h5", k=3)
        other.replace(path)
        np.testing.assert_array_equal(store.read(slice(None)).log_probs, expected)  # what was opened is what is read
