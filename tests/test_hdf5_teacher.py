"""HDF5Teacher, and the writer of its files."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from kdcore.errors import (
    DomainError,
    DTypeError,
    FileFormatError,
    MissingRowError,
    NonFiniteError,
    ProbabilitiesWarning,
    ShapeError,
    UnsafeFileError,
)
from kdcore.hdf5 import save_teacher_logits
from kdcore.sequences import content_key
from kdcore.teachers.base import TeacherLogitsProvider
from kdcore.teachers.hdf5 import HDF5Teacher

DTYPES = [np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
COMPRESSIONS = [None, "gzip", "lzf"]
IDS = [[3, 1, 4], [1], [5, 9], [], [2**32 - 1, 0], [0]]
ROW_NUMBERS = [[i] for i in range(len(IDS))]


def some_logits(n: int = len(IDS), v: int = 7, seed: int = 0) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(0, 10, (n, v)).astype(np.float32)
    logits[0, 1] = -np.inf
    return logits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "teacher.h5"


# What is written is what is read.


@pytest.mark.parametrize("address", ["row", "content"])
@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("dataset", ["logits", "teacher/large/scores"])
def test_round_trip(dtype, compression, address, dataset, path):
    logits = some_logits()
    save_teacher_logits(path, logits, IDS, dtype=dtype, compression=compression, dataset=dataset)
    with HDF5Teacher(path, dataset, address) as teacher:
        assert isinstance(teacher, TeacherLogitsProvider)
        assert (len(teacher), teacher.vocab_size, teacher.address) == (6, 7, address)
        read = teacher.logits_for_batch(IDS if address == "content" else ROW_NUMBERS)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, logits.astype(dtype).astype(np.float32))


def test_large_arrays_begin_at_pages(path):
    save_teacher_logits(path, np.zeros((1000, 7), np.float32))
    with h5py.File(path) as file:
        assert file["logits"].id.get_offset() % 4096 == 0


def test_dtype_is_kept_by_default(path):
    for dtype in DTYPES:
        save_teacher_logits(path, some_logits().astype(dtype))
        with h5py.File(path) as file:
            assert file["logits"].dtype == (np.uint16 if dtype is ml_dtypes.bfloat16 else dtype)
            assert file["logits"].chunks is None
            assert file["logits"].id.get_offset() % 8 == 0


def test_bfloat16_by_name_is_bit_for_bit(path):
    bits = np.arange(2**16, dtype=np.uint16)
    values = bits[(bits & 0x7F80) != 0x7F80].view(ml_dtypes.bfloat16).reshape(-1, 255)
    save_teacher_logits(path, values.astype(np.float32), dtype="bfloat16")
    with HDF5Teacher(path) as teacher:
        read = teacher.logits_for_batch([[i] for i in range(len(values))])
    assert read.tobytes() == values.astype(np.float32).tobytes()


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_blocks_are_the_rows_of_one_array(compression, path):
    logits = some_logits(50, 5)
    blocks = iter([logits[:17], logits[17:17], logits[17:18], logits[18:]])
    save_teacher_logits(path, blocks, n_rows=50, vocab_size=5, dtype=np.float32, compression=compression)
    with HDF5Teacher(path) as teacher:
        np.testing.assert_array_equal(teacher.logits_for_batch([[i] for i in range(50)]), logits)


def test_many_chunks(path):
    logits = some_logits(300, 1000)
    save_teacher_logits(path, logits, compression="gzip")
    with h5py.File(path) as file:
        assert file["logits"].id.get_num_chunks() > 10
        assert file["logits"].chunks == (16, 1000)  # of 64 kB
    with HDF5Teacher(path) as teacher:
        order = np.random.default_rng(1).integers(0, 300, 500)
        np.testing.assert_array_equal(teacher.logits_for_batch(order[:, None]), logits[order])


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_file_without_rows(compression, path):
    save_teacher_logits(path, np.empty((0, 4), np.float32), [], compression=compression)
    for address in ("row", "content"):
        with HDF5Teacher(path, address=address) as teacher:
            assert len(teacher) == 0
            assert teacher.logits_for_batch([]).shape == (0, 4)
            with pytest.raises(MissingRowError):
                teacher.logits_for_batch([[0]])


def test_metadata(path):
    save_teacher_logits(path, some_logits(), metadata={"teacher": "größe", "step": 3})
    with HDF5Teacher(path) as teacher:
        assert teacher.metadata == {"teacher": "größe", "step": 3}
    save_teacher_logits(path, some_logits())
    with HDF5Teacher(path) as teacher:
        assert teacher.metadata == {}


def test_files_of_other_programs(path):
    logits = some_logits(3)
    with h5py.File(path, "w") as file:
        file["logits"] = logits
        file["ids"] = np.array([[1, 2], [3, 4], [5, 6]], np.int64)
        file["keys"] = np.array([content_key(row) for row in file["ids"][()]], np.uint64)
    with HDF5Teacher(path, address="content") as teacher:
        np.testing.assert_array_equal(teacher.logits_for_batch([[5, 6], [1, 2]]), logits[[2, 0]])
        with pytest.raises(MissingRowError):
            teacher.logits_for_batch([[5]])


contents = st.lists(
    st.lists(st.integers(0, 3) | st.integers(0, 2**32 - 1), max_size=4), min_size=1, max_size=12, unique_by=tuple
)


@given(contents=contents, compression=st.sampled_from(COMPRESSIONS), data=st.data())
@settings(max_examples=60, deadline=None)
def test_content_cannot_misalign(tmp_path_factory, contents, compression, data):
    """However a batch is ordered and repeated, each row gets the logits that were written for its ids."""
    path = tmp_path_factory.getbasetemp() / "align.h5"
    logits = np.arange(len(contents), dtype=np.float32)[:, None] * [1, -1, 2]
    save_teacher_logits(path, logits.astype(np.float32), contents, compression=compression)
    picks = data.draw(st.lists(st.integers(0, len(contents) - 1), max_size=20))
    with HDF5Teacher(path, address="content") as teacher:
        read = teacher.logits_for_batch([contents[i] for i in picks])
    np.testing.assert_array_equal(read[:, 0], np.array(picks, np.float32))
    np.testing.assert_array_equal(read, logits[picks].astype(np.float32))


# Positions.


@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_ragged_prefixes(compression, path):
    rows = [[7, 8, 9], [], [7], [5, 8]]
    stored = [[7], [7, 8], [7, 8, 9], [5], [5, 8], [8]]
    logits = some_logits(6, 4)
    save_teacher_logits(path, logits, stored, compression=compression)
    with HDF5Teacher(path, address="content") as teacher:
        read, mask = teacher.logits_per_position(rows)
        with pytest.raises(MissingRowError, match=r"no row for the ids \[9\]"):
            teacher.logits_per_position([[7], [9, 8]])
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0]])
    assert mask.dtype == bool and read.dtype == np.float32 and read.shape == (4, 3, 4)
    np.testing.assert_array_equal(read[mask], logits[[0, 1, 2, 0, 3, 4]])
    assert not read[~mask].any()


def test_positions_by_row(path):
    logits = some_logits(6, 4)
    save_teacher_logits(path, logits)
    with HDF5Teacher(path) as teacher:
        read, mask = teacher.logits_per_position([[5, 0], [2]])
        np.testing.assert_array_equal(mask, [[True, True], [True, False]])
        np.testing.assert_array_equal(read[mask], logits[[5, 0, 2]])
        read, mask = teacher.logits_per_position([])
        assert read.shape == (0, 0, 4) and mask.shape == (0, 0)


# What is asked for and is not there.


@pytest.mark.parametrize("row", [6, -1, 2**40])
def test_missing_row(row, path):
    save_teacher_logits(path, some_logits())
    with HDF5Teacher(path) as teacher:
        for read in (teacher.logits_for_batch, teacher.logits_per_position):
            with pytest.raises(MissingRowError, match=rf"teacher\.h5.* has 6 rows, and none with the number {row}$"):
                read([[0], [row]])


@pytest.mark.parametrize("row", [[], [0, 1]])
def test_address_row_takes_one_number(row, path):
    save_teacher_logits(path, some_logits())
    with HDF5Teacher(path) as teacher, pytest.raises(ShapeError, match=rf"input_ids\[1\] holds {len(row)} integers"):
        teacher.logits_for_batch([[0], row])


def test_missing_content(path):
    save_teacher_logits(path, some_logits(), IDS)
    with HDF5Teacher(path, address="content") as teacher:
        with pytest.raises(MissingRowError, match=rf"no row for the ids \[3, 1\] \(key {content_key([3, 1])}\)"):
            teacher.logits_for_batch([[3, 1, 4], [3, 1]])
        with pytest.raises(MissingRowError, match=r"18, 19, \.\.\. \(99 in all\)"):
            teacher.logits_for_batch([list(range(99))])
        with pytest.raises(DomainError, match="token id -1 is outside"):
            teacher.logits_for_batch([[-1]])
        with pytest.raises(DomainError, match="token id 4294967297 is outside"):  # would wrap to [1], which is there
            teacher.logits_for_batch([[2**32 + 1]])
        with pytest.raises(DTypeError, match="integers"):
            teacher.logits_for_batch([[3.0, 1.0, 4.0]])


def test_address_typo(path):
    save_teacher_logits(path, some_logits())
    with pytest.raises(DomainError, match="address must be one of 'row', 'content', got 'rows'"):
        HDF5Teacher(path, address="rows")


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [(5, DTypeError, "path must be a path, got 5"), ("a\0b", DomainError, "got 'a\\x00b' with a null byte")],
)
def test_what_is_no_path(bad, error, words):
    for use in (HDF5Teacher, lambda path: save_teacher_logits(path, some_logits())):
        with pytest.raises(error) as caught:
            use(bad)
        assert words in str(caught.value)


def test_what_is_no_name_of_a_dataset(path):
    save_teacher_logits(path, some_logits())
    for use in (lambda: HDF5Teacher(path, 5), lambda: save_teacher_logits(path, some_logits(), dataset=5)):
        with pytest.raises(DTypeError, match="the name of an array must be a string, got 5"):
            use()


def test_missing_file_and_dataset(path):
    with pytest.raises(FileNotFoundError, match=r"teacher\.h5"):
        HDF5Teacher(path)
    save_teacher_logits(path, some_logits(), dataset="scores")
    with pytest.raises(FileFormatError, match="has no 'logits'; the file holds 'scores'"):
        HDF5Teacher(path)
    with pytest.raises(FileFormatError, match="has no 'keys'; the file holds 'scores'"):
        HDF5Teacher(path, "scores", "content")


# Files that are damaged or hostile.


def edit(path: Path, name: str, change) -> None:
    with h5py.File(path, "r+") as file:
        values = change(file[name][()])
        del file[name]
        file[name] = values


def put(index, value):
    def change(values):
        values[index] = value
        return values

    return change


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("keys", lambda k: k[:-1], "'keys' has 5 rows, but 'logits' has 6"),
        ("ids", lambda i: i[:-1], "'ids' has 5 rows, but 'logits' has 6"),
        ("lengths", lambda n: n[:-1], "'lengths' has 5 rows, but 'logits' has 6"),
        ("logits", lambda x: x[:-1], "has 6 rows, but 'logits' has 5"),
        ("lengths", put(2, 4), "'lengths' is 4 in row 2, but 'ids' has 3 columns"),
        ("lengths", lambda n: -n.astype(np.int64), "'lengths' is -3 in row 0"),
        ("keys", lambda k: k[[0, 1, 2, 3, 1, 5]], r"in row 1 and in row 4; keys must be distinct"),
        ("keys", lambda k: k.astype(np.int64), "'keys' has the type integer of 8 bytes; expected one of '<u8'"),
        ("ids", lambda i: i.astype(np.float32), "'ids' has the type float of 4 bytes"),
        ("ids", lambda i: i[0], "'ids' has the shape (3,); expected 2 dimensions"),
    ],
)
def test_index_that_cannot_be(name, change, words, path):
    save_teacher_logits(path, some_logits(), IDS)
    edit(path, name, change)
    with pytest.raises(FileFormatError) as caught:
        HDF5Teacher(path, address="content")
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_wrong_key_is_found_on_its_hit(path):
    save_teacher_logits(path, some_logits(), IDS)
    edit(path, "keys", put(1, content_key([42])))
    with HDF5Teacher(path, address="content") as teacher:
        assert teacher.logits_for_batch([[5, 9]]).shape == (1, 7)
        with pytest.raises(FileFormatError, match=r"ids \[42\] have the key \d+, under which row 1 keeps \[1\]"):
            teacher.logits_for_batch([[5, 9], [42]])


@pytest.mark.parametrize(("name", "place"), [("ids", (0, 2)), ("lengths", 0)])
def test_changed_ids_are_found_on_their_hit(name, place, path):
    save_teacher_logits(path, some_logits(), IDS)
    edit(path, name, put(place, 2))
    with (
        HDF5Teacher(path, address="content") as teacher,
        pytest.raises(FileFormatError, match=r"\[3, 1, 4\] have the key"),
    ):
        teacher.logits_for_batch([[3, 1, 4]])


def test_keys_that_compress_are_no_keys(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("logits", data=np.zeros((4096, 1), np.float32))
        file.create_dataset("ids", data=np.zeros((4096, 1), np.uint32))
        file.create_dataset("keys", data=np.zeros(4096, np.uint64), compression="gzip")
    with pytest.raises(UnsafeFileError, match="'keys' declares 32768 bytes but stores"):
        HDF5Teacher(path, address="content")


def test_links_beside_the_logits_are_refused(path):
    save_teacher_logits(path, some_logits(), IDS)
    with h5py.File(path, "r+") as file:
        del file["lengths"]
        file["lengths"] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(UnsafeFileError, match="'lengths' is an external link"):
        HDF5Teacher(path, address="content")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.zeros((3, 4), np.int32), "integer of 4 bytes"),
        (np.zeros((3, 4), np.uint16), "dtype uint16 and the attribute dtype=None"),
        (np.zeros((3, 0), np.float32), "shape (3, 0); a vocabulary needs classes"),
        (np.zeros((3, 4, 1), np.float32), "shape (3, 4, 1); expected 2 dimensions"),
    ],
)
def test_logits_that_cannot_be(values, words, path):
    with h5py.File(path, "w") as file:
        file["logits"] = values
    with pytest.raises(FileFormatError) as caught:
        HDF5Teacher(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(("dtype", "tag"), [(np.uint16, "float16"), (np.float16, "bfloat16")])
def test_wrong_tag(dtype, tag, path):
    with h5py.File(path, "w") as file:
        file["logits"] = np.zeros((3, 4), dtype)
        file["logits"].attrs["dtype"] = np.bytes_(tag)
    with pytest.raises(FileFormatError, match=f"dtype={tag!r}"):
        HDF5Teacher(path)


@pytest.mark.parametrize("chunks", [None, (1, 4)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.uint16])
@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([0, np.nan, 1, np.inf], "row 2, column 1 is nan"),
        ([0, 3, 1, np.inf], "row 2, column 3 is inf"),
        ([-np.inf] * 4, "row 2 is -inf in every column"),
    ],
)
def test_rows_that_are_no_logits(row, words, dtype, chunks, path):
    values = np.zeros((4, 4), np.float32)
    values[2] = row
    values[3, 0] = -np.inf
    with h5py.File(path, "w") as file:
        stored = (values.view(np.uint32) >> 16).astype(dtype) if dtype is np.uint16 else values.astype(dtype)
        dataset = file.create_dataset("logits", data=stored, chunks=chunks)
        if dtype is np.uint16:
            dataset.attrs["dtype"] = np.bytes_("bfloat16")
    with HDF5Teacher(path) as teacher:
        np.testing.assert_array_equal(teacher.logits_for_batch([[3], [0]]), values[[3, 0]])
        with pytest.raises(NonFiniteError) as caught:
            teacher.logits_for_batch([[0], [2]])
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize(
    "bits", [np.uint16(0x7C01), np.uint32(0x7F800001), np.uint64(0x7FF0000000000001)], ids=["f2", "f4", "f8"]
)
def test_signalling_nan(bits, path):
    with h5py.File(path, "w") as file:
        file["logits"] = np.array([[0, 0], [0, bits]], bits.dtype).view(f"f{bits.itemsize}")
    with HDF5Teacher(path) as teacher, pytest.raises(NonFiniteError, match="row 1, column 1 is nan"):
        teacher.logits_for_batch([[1]])
    with pytest.raises(NonFiniteError, match="row 0, column 0 is nan"):
        save_teacher_logits(path, np.full((1, 1), bits).view(f"f{bits.itemsize}"), dtype=np.float16)


@pytest.mark.parametrize("value", [1e300, -1e300])
def test_float64_beyond_float32(value, path):
    save_teacher_logits(path, np.array([[0.0, 1e-300], [1.0, value]]))
    with HDF5Teacher(path) as teacher:
        np.testing.assert_array_equal(teacher.logits_for_batch([[0]]), [[0, 0]])
        with pytest.raises(DomainError, match=r"row 1, column 1 is -?1e\+300, which does not fit float32"):
            teacher.logits_for_batch([[0], [1]])


# Probabilities.


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("v", [2, 100, 32_000])
def test_probabilities_are_told(dtype, v, path):
    logits = np.random.default_rng(0).normal(0, 3, (5, v))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    save_teacher_logits(path, p.astype(dtype))
    with pytest.warns(ProbabilitiesWarning, match=r"first 5 rows .*teacher\.h5.* numpy\.log") as caught:
        HDF5Teacher(path).close()
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_teacher_logits(path, np.log(p).astype(dtype))
        HDF5Teacher(path).close()
        save_teacher_logits(path, np.concatenate([p, p[:1] * 1.1]).astype(dtype))  # one row is none
        HDF5Teacher(path).close()


@given(st.integers(0, 2**32 - 1), st.integers(2, 50), st.sampled_from([0.01, 0.1, 1, 10]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_logits_are_not_called_probabilities(tmp_path_factory, seed, v, scale, positive):
    path = tmp_path_factory.getbasetemp() / "logits.h5"
    logits = np.random.default_rng(seed).normal(0, scale, (8, v))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_teacher_logits(path, np.abs(logits) if positive else logits, dtype=np.float32)
        HDF5Teacher(path).close()


def test_one_class_is_not_a_probability(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_teacher_logits(path, np.ones((3, 1), np.float32))
        HDF5Teacher(path).close()


# Processes, threads, and the life of a teacher.


@pytest.mark.parametrize("compression", COMPRESSIONS)
@pytest.mark.parametrize("address", ["row", "content"])
def test_pickle(address, compression, path, monkeypatch):
    save_teacher_logits(path, some_logits(), IDS, compression=compression)
    monkeypatch.chdir(path.parent)
    with HDF5Teacher(path.name, address=address) as teacher:
        monkeypatch.chdir("/")
        state = pickle.dumps(teacher)
        assert len(state) < 1000
        with pickle.loads(state) as copy:
            assert repr(copy) == repr(teacher) == f"HDF5Teacher({str(path)!r}, dataset='logits', address={address!r})"
            batch = IDS if address == "content" else ROW_NUMBERS
            np.testing.assert_array_equal(copy.logits_for_batch(batch), some_logits())


def read_often(teacher, numbers, seed):
    expected = some_logits(64, 50)
    for row in np.random.default_rng(seed).permutation(np.repeat(numbers, 5)):
        if not np.array_equal(teacher.logits_for_batch([[int(row)]]), expected[[row]]):
            raise AssertionError(f"row {row} differs")
    return os.getpid()


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_forks_and_their_parent_read_at_once(compression, path):
    save_teacher_logits(path, some_logits(64, 50), compression=compression)
    with HDF5Teacher(path) as teacher:
        read_often(teacher, range(8), 0)
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=read_often, args=(teacher, range(64), seed)) for seed in range(3)]
        for child in children:
            child.start()
        read_often(teacher, range(64), 9)
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0, 0]
        read_often(teacher, range(64), 10)


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_threads(compression, path):
    save_teacher_logits(path, some_logits(64, 50), compression=compression)
    with HDF5Teacher(path) as teacher, ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda seed: read_often(teacher, range(64), seed), range(8))) == {os.getpid()}


def test_fork_refuses_a_file_that_was_replaced(path):
    save_teacher_logits(path, some_logits(), compression="gzip")
    with HDF5Teacher(path) as teacher:
        save_teacher_logits(path, some_logits(seed=1), compression="gzip")
        np.testing.assert_array_equal(teacher.logits_for_batch([[0]]), some_logits()[:1])
        child = os.fork()
        if child == 0:
            try:
                teacher.logits_for_batch([[0]])
            except FileFormatError as error:
                os._exit(7 if "was replaced or changed" in str(error) else 8)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("compression", [None, "gzip"])
def test_closed(compression, path):
    save_teacher_logits(path, some_logits(), IDS, compression=compression)
    for address, batch in (("row", [[0]]), ("content", [[1]])):
        with HDF5Teacher(path, address=address) as teacher:
            kept = teacher.logits_for_batch(batch)
        assert np.isfinite(kept).any()
        with pytest.raises(ValueError, match=r"HDF5Teacher\(.*\) is closed"):
            teacher.logits_for_batch(batch)
        teacher.close()


def test_each_distinct_row_is_read_once(path, monkeypatch):
    save_teacher_logits(path, some_logits(), compression="gzip")
    with HDF5Teacher(path) as teacher:
        asked = []
        rows = teacher._logits.rows
        monkeypatch.setattr(teacher._logits, "rows", lambda numbers: (asked.append(numbers.tolist()), rows(numbers))[1])
        read = teacher.logits_for_batch([[4], [1], [4], [4], [1]])
    assert asked == [[1, 4]]
    np.testing.assert_array_equal(read, some_logits()[[4, 1, 4, 4, 1]])


def test_failed_opening_closes_the_file(path):
    save_teacher_logits(path, some_logits(), dataset="scores")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileFormatError) as caught:
        HDF5Teacher(path)
    assert caught.value.__traceback__ is not None  # it keeps the half-made teacher alive
    assert len(os.listdir("/proc/self/fd")) == before


# What the writer refuses. A failed write leaves the old file, and no other.


def blocks_that_fail():
    yield some_logits(2)
    raise OSError(5, "the teacher's disk is gone")


SHAPE = {"n_rows": 3, "vocab_size": 7, "dtype": np.float32}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        (
            [np.array([[0, 1], [2, 70000]], np.float32)],
            {"dtype": np.float16},
            DomainError,
            "row 1, column 1 is 70000.0, which does not fit float16 and would become inf",
        ),
        ([np.array([[0, -7e4]])], {"dtype": "float16"}, DomainError, "row 0, column 1 is -70000.0"),
        ([np.array([[0, 3.4e38]], np.float32)], {"dtype": "bfloat16"}, DomainError, "does not fit bfloat16"),
        ([np.array([[0, 1], [np.nan, 0]])], {}, NonFiniteError, "row 1, column 0 is nan"),
        ([np.array([[0, 1], [1, np.inf]], np.float16)], {}, NonFiniteError, "row 1, column 1 is inf"),
        ([np.full((2, 2), -np.inf, ml_dtypes.bfloat16)], {}, NonFiniteError, "row 0 is -inf in every column"),
        ([iter([some_logits(2), np.full((1, 7), np.nan)])], SHAPE, NonFiniteError, "row 2, column 0 is nan"),
        ([iter([some_logits(2)])], SHAPE, ShapeError, "logits have 2 rows; expected 3"),
        ([iter([some_logits(2), some_logits(2)])], SHAPE, ShapeError, "more than the 3 rows"),
        ([iter([some_logits(3, 6)])], SHAPE, ShapeError, "shape (3, 6); expected [rows, 7]"),
        ([iter([np.zeros((3, 7), int)])], SHAPE, DTypeError, "the dtype of logits must be float16"),
        ([blocks_that_fail()], SHAPE, OSError, "the teacher's disk is gone"),
        ([iter([some_logits(3)])], {}, ShapeError, "needs n_rows (or input_ids), vocab_size and dtype"),
        ([iter([some_logits(3)])], SHAPE | {"n_rows": None}, ShapeError, "needs n_rows (or input_ids), vocab_size"),
        ([iter([some_logits(3)])], SHAPE | {"vocab_size": None}, ShapeError, "needs n_rows (or input_ids), vocab_size"),
        ([iter([some_logits(3)])], SHAPE | {"dtype": None}, ShapeError, "needs n_rows (or input_ids), vocab_size and"),
        ([np.zeros((2, 3), int)], {}, DTypeError, "must be float16, float32, float64 or bfloat16, got int64"),
        ([np.zeros((2, 3))], {"dtype": np.int8}, DTypeError, "got int8"),
        (
            [np.zeros((2, 3))],
            {"dtype": "float17"},
            DTypeError,
            "dtype must be float16, float32, float64 or bfloat16, got",
        ),
        ([np.zeros((2, 3))], {"n_rows": "2"}, DTypeError, "n_rows must be an integer, got '2'"),
        ([iter([some_logits(3)])], SHAPE | {"vocab_size": 7.0}, DTypeError, "vocab_size must be an integer, got 7.0"),
        ([np.zeros(3)], {}, ShapeError, "two dimensions [rows, classes], got shape (3,)"),
        ([np.zeros((2, 0))], {}, ShapeError, "got [2, 0]"),
        ([np.zeros((2, 3))], {"n_rows": 3}, ShapeError, "n_rows is 3, but there are 2 rows of logits"),
        ([np.zeros((2, 3))], {"vocab_size": 4}, ShapeError, "vocab_size is 4, but there are 3 columns"),
        ([np.zeros((2, 3)), [[1]]], {}, ShapeError, "n_rows is 1, but there are 2 rows of logits"),
        (
            [np.zeros((3, 3)), [[1, 2], [3], [1, 2]]],
            {},
            DomainError,
            "input_ids[0] and input_ids[2] hold the same ids 1, 2",
        ),
        ([np.zeros((1, 3)), [[-4]]], {}, DomainError, "token id -4 is outside"),
        ([np.zeros((1, 3)), [[1]]], {"dataset": "a/keys"}, DomainError, "would collide with the index"),
        ([np.zeros((1, 3))], {"dataset": "/logits"}, DomainError, "is not the name of an array"),
        ([np.zeros((1, 3))], {"compression": "zip"}, DomainError, "None, 'gzip' or 'lzf', got 'zip'"),
        ([np.zeros((1, 3))], {"metadata": {"x": [1]}}, DTypeError, "metadata['x'] must be"),
    ],
)
def test_what_is_not_written(arguments, options, error, words, path):
    save_teacher_logits(path, some_logits())
    with pytest.raises(error) as caught:
        save_teacher_logits(path, *arguments, **options)
    assert words in str(caught.value)
    assert os.listdir(path.parent) == [path.name]
    with HDF5Teacher(path) as teacher:
        np.testing.assert_array_equal(teacher.logits_for_batch(ROW_NUMBERS), some_logits())


def test_sharing_a_key_is_told_apart_from_repeating(path, monkeypatch):
    monkeypatch.setattr("kdcore.hdf5.content_key", lambda ids: 5)
    with pytest.raises(DomainError, match=r"input_ids\[0\] and input_ids\[1\] differ, but share the 64-bit key"):
        save_teacher_logits(path, np.zeros((2, 3)), [[1], [2]])


def test_wide_rows_are_split_into_chunks_that_can_be_read(path, monkeypatch):
    monkeypatch.setattr("kdcore.hdf5.MAX_CHUNK_BYTES", 8192)
    logits = some_logits(3, 10_000)
    save_teacher_logits(path, logits, compression="lzf")
    with HDF5Teacher(path) as teacher:
        np.testing.assert_array_equal(teacher.logits_for_batch([[2], [0]]), logits[[2, 0]])


def test_bfloat16_attribute_as_h5py_writes_it(tmp_path):
    path = tmp_path / "teacher.h5"
    with h5py.File(path, "w") as file:
        file["logits"] = np.array([[0x3F80, 0xC000]], np.uint16)  # 1 and -2
        file["logits"].attrs["dtype"] = "bfloat16"
    assert HDF5Teacher(path).logits_for_batch([[0]]).tolist() == [[1.0, -2.0]]
