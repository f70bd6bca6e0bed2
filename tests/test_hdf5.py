"""The reader for files of unknown origin, and checkpoints."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as hnp

from kdcore import hdf5
from kdcore.errors import (
    CheckpointError,
    DomainError,
    DTypeError,
    FileFormatError,
    KdcoreError,
    ShapeError,
    UnsafeFileError,
)
from kdcore.hdf5 import FLOATS, INTEGERS, SafeFile, read_arrays, write_arrays
from kdcore.sequences import content_key

ROWS = np.arange(12, dtype="<f4").reshape(4, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file.h5"


def open_logits(path: Path, name: str = "logits") -> np.ndarray:
    with SafeFile(path) as file:
        return file.dataset(name, dtypes=FLOATS, ndim=2).read()


# Files that are refused: name -> (writer, error, words of the message).


def soft_link(file):
    file["real"] = ROWS
    file["logits"] = h5py.SoftLink("/real")


def soft_link_in_the_path(file):
    file["real/logits"] = ROWS
    file["group"] = h5py.SoftLink("/real")


def external_link(file):
    file["logits"] = h5py.ExternalLink("other.h5", "/logits")


def external_link_in_the_path(file):
    with h5py.File(Path(file.filename).with_name("other.h5"), "w") as other:
        other["real/logits"] = ROWS
    file["group"] = h5py.ExternalLink("other.h5", "/real")


def external_storage(file):
    secret = Path(file.filename).with_name("secret")
    secret.write_bytes(b"x" * 48)
    file.create_dataset("logits", (4, 3), "<f4", external=[(str(secret), 0, 48)])


def virtual_layout(file):
    layout = h5py.VirtualLayout((4, 3), "<f4")
    layout[:] = h5py.VirtualSource("other.h5", "logits", (4, 3))
    file.create_virtual_dataset("logits", layout)


def compact_layout(file):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.COMPACT)
    h5py.h5d.create(file.id, b"logits", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4, 3)), plist).write(
        h5py.h5s.ALL, h5py.h5s.ALL, ROWS
    )


def compound(file):
    file["logits"] = np.zeros((4, 3), [("a", "<f4"), ("b", "<f4")])


def variable_length(file):
    file.create_dataset("logits", (4, 3), h5py.vlen_dtype(np.float32))


def strings(file):
    file["logits"] = np.full((4, 3), b"text")


def opaque(file):
    file["logits"] = np.zeros((4, 3), "V2")


def references(file):
    file.create_dataset("logits", (4, 3), h5py.ref_dtype)


def enumeration(file):
    file["logits"] = np.zeros((4, 3), bool)


def committed_type(file):
    file["type"] = np.dtype("<f4")
    file.create_dataset("logits", data=ROWS, dtype=file["type"])


def named_type_alone(file):
    file["logits"] = np.dtype("<f4")


def big_endian(file):
    file["logits"] = ROWS.astype(">f4")


def unusual_float(file):
    kind = h5py.h5t.IEEE_F32LE.copy()
    kind.set_fields(31, 22, 9, 0, 22)
    kind.set_ebias(255)
    h5py.h5d.create(file.id, b"logits", kind, h5py.h5s.create_simple((4, 3))).write(h5py.h5s.ALL, h5py.h5s.ALL, ROWS)


def integers(file):
    file["logits"] = ROWS.astype("<i4")


def vector(file):
    file["logits"] = ROWS[0]


def null_dataspace(file):
    file["logits"] = h5py.Empty("<f4")


def group(file):
    file.create_group("logits")


def missing(file):
    file["teacher/scores"] = ROWS
    file["ids"] = np.arange(3)


def below_a_dataset(file):
    file["group"] = ROWS


def never_allocated(file):
    file.create_dataset("logits", (4, 3), "<f4")


def shape_bomb(file):
    file.create_dataset("logits", (1 << 20, 1 << 20), "<f4", chunks=(64, 64))[:64, :64] = 1


def missing_chunk(file):
    file.create_dataset("logits", (4, 3), "<f4", chunks=(1, 3))[:3] = ROWS[:3]


def huge_declaration(file):
    file.create_dataset("logits", (1 << 22, 1 << 20), "<f4", chunks=(64, 64))


def large_chunk(file):
    file.create_dataset("logits", (4, 3), "<f4", chunks=(1 << 13, 1 << 12), maxshape=(None, None))[:] = ROWS


def filtered(file, *codes):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk((4, 3))
    for code in codes:
        plist.set_filter(code, h5py.h5z.FLAG_OPTIONAL, (4,))
    h5py.h5d.create(file.id, b"logits", h5py.h5t.IEEE_F32LE, h5py.h5s.create_simple((4, 3)), plist).write(
        h5py.h5s.ALL, h5py.h5s.ALL, ROWS
    )


def plugin_filter(file):
    filtered(file, 32015)


def lossy_filter(file):
    file.create_dataset("logits", data=ROWS.astype("<f4"), chunks=(4, 3), scaleoffset=2)


def nested_deflate(file):
    filtered(file, 1, 1)


REFUSED = {
    soft_link: (UnsafeFileError, "'logits' is a soft link"),
    soft_link_in_the_path: (UnsafeFileError, "'group' is a soft link"),
    external_link: (UnsafeFileError, "'logits' is an external link"),
    external_link_in_the_path: (UnsafeFileError, "'group' is an external link"),
    external_storage: (UnsafeFileError, "external storage"),
    virtual_layout: (UnsafeFileError, "virtual layout"),
    compact_layout: (UnsafeFileError, "compact layout"),
    compound: (UnsafeFileError, "compound"),
    variable_length: (UnsafeFileError, "variable-length"),
    strings: (UnsafeFileError, "string"),
    opaque: (UnsafeFileError, "opaque"),
    references: (UnsafeFileError, "reference"),
    enumeration: (UnsafeFileError, "enumeration"),
    committed_type: (UnsafeFileError, "committed"),
    named_type_alone: (FileFormatError, "is a datatype, not a dataset"),
    big_endian: (FileFormatError, "big-endian float of 4 bytes"),
    unusual_float: (FileFormatError, "float of 4 bytes; expected one of '<f2', '<f4', '<f8'"),
    integers: (FileFormatError, "integer of 4 bytes"),
    vector: (FileFormatError, "shape (3,); expected 2 dimensions"),
    null_dataspace: (FileFormatError, "null"),
    group: (FileFormatError, "is a group, not a dataset"),
    missing: (FileFormatError, "has no 'logits'; the file holds 'ids', 'teacher'"),
    below_a_dataset: (FileFormatError, "'group' is not a group"),
    never_allocated: (FileFormatError, "declares 48 bytes, but 0 are stored"),
    shape_bomb: (UnsafeFileError, "declares 4398046511104 bytes but stores 16384"),
    missing_chunk: (FileFormatError, "3 of 4 chunks"),
    huge_declaration: (UnsafeFileError, "declares 17592186044416 bytes; the limit is 4398046511104"),
    large_chunk: (UnsafeFileError, "chunks of 134217728 bytes; the limit is 67108864"),
    plugin_filter: (UnsafeFileError, "filter 32015; allowed are deflate, shuffle, fletcher32, lzf"),
    lossy_filter: (UnsafeFileError, "filter 6"),
    nested_deflate: (UnsafeFileError, "filter deflate more than once"),
}


@pytest.mark.parametrize("write", REFUSED, ids=lambda write: write.__name__)
def test_refused(write, path):
    error, words = REFUSED[write]
    with h5py.File(path, "w") as file:
        write(file)
    name = "group/logits" if "path" in write.__name__ or write is below_a_dataset else "logits"
    with pytest.raises(error) as caught:
        open_logits(path, name)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_every_refused_file_is_refused_for_its_own_reason(path):
    """The file that all of them vary is accepted."""
    with h5py.File(path, "w") as file:
        file["logits"] = file["group/logits"] = ROWS
    np.testing.assert_array_equal(open_logits(path), ROWS)
    np.testing.assert_array_equal(open_logits(path, "group/logits"), ROWS)


@pytest.mark.parametrize(
    "options",
    [{}, {"shuffle": True, "compression": "gzip"}, {"compression": "lzf"}, {"fletcher32": True}, {"chunks": (3, 2)}],
    ids=str,
)
def test_read_and_rows(options, path):
    with h5py.File(path, "w", userblock_size=512) as file:
        file.create_dataset("logits", data=ROWS, **options)
    with SafeFile(path) as file:
        array = file.dataset("logits", dtypes=FLOATS, ndim=2)
        assert (array.shape, array.dtype) == ((4, 3), np.float32)
        assert (array.mapped is not None) == (not options)
        np.testing.assert_array_equal(array.read(), ROWS)
        np.testing.assert_array_equal(array.rows(np.array([0, 3])), ROWS[[0, 3]])


@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10)])
def test_arrays_of_any_dimensions_in_chunks_that_do_not_divide_them(shape, path):
    array = np.arange(np.prod(shape), dtype="<f4").reshape(shape)
    with h5py.File(path, "w") as file:
        file.create_dataset("logits", data=array, chunks=(*shape[:-1], 4))
    with SafeFile(path) as file:
        np.testing.assert_array_equal(file.dataset("logits", dtypes=FLOATS, ndim=len(shape)).read(), array)


def test_highly_compressible_data_are_no_bomb(path):
    with h5py.File(path, "w") as file:
        zeros = np.zeros((1024, 8192), "<f4")
        dataset = file.create_dataset("logits", data=zeros, chunks=(1024, 8192), compression="gzip", compression_opts=9)
        assert zeros.nbytes > 1000 * dataset.id.get_storage_size()
    assert not open_logits(path).any()


def test_ratio_can_be_tightened(path):
    with h5py.File(path, "w") as file:
        file.create_dataset("keys", data=np.zeros(4096, "<u8"), compression="gzip")
    with SafeFile(path) as file, pytest.raises(UnsafeFileError, match="'keys' declares 32768 bytes"):
        file.dataset("keys", dtypes=("<u8",), ndim=1, max_ratio=4)


def test_byte_limit(path):
    with h5py.File(path, "w") as file:
        file["logits"] = ROWS
    with (
        SafeFile(path, max_bytes=47) as file,
        pytest.raises(UnsafeFileError, match="declares 48 bytes; the limit is 47"),
    ):
        file.dataset("logits", dtypes=FLOATS)


def test_not_a_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.h5"):
        SafeFile(tmp_path / "absent.h5")
    with pytest.raises(IsADirectoryError, match="is a directory"):
        SafeFile(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UnsafeFileError, match="not a regular file"):
        SafeFile(tmp_path / "pipe")


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4 not HDF5", b"\x89HDF\r\n\x1a\n"], ids=["empty", "other", "signature"]
)
def test_not_hdf5(content, path):
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"file\.h5 cannot be read as HDF5"):
        SafeFile(path)


def test_truncated(path):
    with h5py.File(path, "w") as file:
        file["logits"] = ROWS
    whole = path.read_bytes()
    for size in range(8, len(whole), 97):
        path.write_bytes(whole[:size])
        with pytest.raises(FileFormatError, match="damaged or truncated"):
            open_logits(path)


def test_damaged_chunk_names_file_and_dataset(path):
    with h5py.File(path, "w") as file:
        dataset = file.create_dataset("logits", data=ROWS, fletcher32=True)
        offset = dataset.id.get_chunk_info(0).byte_offset
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=r"file\.h5: 'logits' cannot be read"):
        open_logits(path)


def test_closed_file(path):
    with h5py.File(path, "w") as file:
        file["logits"] = ROWS
        file.create_dataset("chunked", data=ROWS, chunks=(1, 3))
    with SafeFile(path) as file:
        mapped = file.dataset("logits", dtypes=FLOATS)
        chunked = file.dataset("chunked", dtypes=FLOATS)
    np.testing.assert_array_equal(mapped.read(), ROWS)
    with pytest.raises(ValueError, match="is closed"):
        chunked.read()
    with pytest.raises(ValueError, match="is closed"):
        file.dataset("logits", dtypes=FLOATS)


def test_attributes(path):
    with h5py.File(path, "w") as file:
        file["x"] = ROWS
        file["x"].attrs["text"] = np.bytes_("größe".encode())
        file["x"].attrs["int"] = np.int16(-3)
        file["x"].attrs["float"] = 0.5
        file.attrs["vlen"] = "text"
        file.attrs["array"] = np.arange(3)
        file.attrs["big"] = np.array(3, ">i4")
        file.attrs["latin"] = np.bytes_(b"\xe9")
    with SafeFile(path) as file:
        assert file.attribute("x", "text", str) == "größe"
        assert file.attribute("x", "int", int) == -3
        assert file.attribute("x", "float", float) == 0.5
        assert file.attribute("/", "text", str) is None
        assert file.attribute("/", "vlen", str) == "text"
        for name, kind, error, words in [
            ("big", str, FileFormatError, "expected a string"),
            ("array", int, UnsafeFileError, "not a plain scalar"),
            ("big", int, FileFormatError, "big-endian integer of 4 bytes; expected int"),
            ("vlen", float, FileFormatError, "expected float"),
            ("latin", str, FileFormatError, "codec can't decode"),
        ]:
            with pytest.raises(error, match=words):
                file.attribute("/", name, kind)
        with pytest.raises(FileFormatError, match="has no 'y'"):
            file.attribute("y", "text", str)


def test_has(path):
    with h5py.File(path, "w") as file:
        file["group/x"] = ROWS
        file["group/dangling"] = h5py.SoftLink("/nowhere")
    with SafeFile(path) as file:
        assert file.has("group/x") and file.has("group") and file.has("group/dangling")
        assert not file.has("x") and not file.has("group/x/y")


@pytest.mark.parametrize("name", ["", "/", "a//b", "/a", "a/", ".", "a/./b", "a\0b"])
def test_names(name, path):
    with pytest.raises(DomainError, match="is not the name of an array"):
        write_arrays(path, {name: ROWS}, {})
    assert not path.exists()


# Checkpoints.

names = st.lists(st.text("abcé ", min_size=1, max_size=3), min_size=1, max_size=3).map("/".join)
stored_arrays = hnp.arrays(
    st.sampled_from(INTEGERS + FLOATS), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
)
metadata = st.dictionaries(
    st.text(max_size=4), st.text(max_size=4) | st.integers() | st.floats(allow_nan=False) | st.booleans(), max_size=4
)


@given(
    arrays=st.dictionaries(names, stored_arrays, max_size=4).filter(
        lambda d: not any(b.startswith(a + "/") for a in d for b in d)
    ),
    metadata=metadata,
    fortran=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_checkpoint_round_trip(tmp_path_factory, arrays, metadata, fortran):
    path = tmp_path_factory.getbasetemp() / "round_trip.h5"
    write_arrays(path, {k: np.asarray(a, order="F") if fortran else a for k, a in arrays.items()}, metadata)
    read, kept = read_arrays(path)
    assert list(read) == list(arrays)
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
        assert read[name].flags.c_contiguous and read[name].flags.writeable
    assert kept == metadata
    assert [type(v) for v in kept.values()] == [type(v) for v in metadata.values()]


def test_checkpoint_keeps_what_json_lacks(path):
    write_arrays(path, {"nan": np.array([np.nan, -np.inf])}, {"loss": float("inf"), "text": "x" * 200_000})
    arrays, kept = read_arrays(path)
    np.testing.assert_array_equal(arrays["nan"], [np.nan, -np.inf])
    assert kept["loss"] == float("inf") and kept["text"] == "x" * 200_000


CHECKPOINT = {"weight": ROWS, "optimizer/velocity": ROWS[0] / 7, "step": np.array(3)}


def test_same_contents_same_bytes(path, tmp_path):
    def write(checkpoint, logits):
        write_arrays(checkpoint, CHECKPOINT, {"epoch": 2})
        hdf5.save_teacher_logits(logits, ROWS, dataset="teacher/logits")
        return checkpoint.read_bytes(), logits.read_bytes()

    written = write(path, tmp_path / "logits.h5")
    time.sleep(1.1)  # HDF5's times are in seconds
    assert write(tmp_path / "later.h5", tmp_path / "later logits.h5") == written


def test_any_flipped_bit_of_the_arrays_is_found(path):
    write_arrays(path, CHECKPOINT, {"epoch": 2})
    whole = path.read_bytes()
    with h5py.File(path) as file:
        places = [file[name].id.get_offset() + i for name in CHECKPOINT for i in range(file[name].nbytes)]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="does not match its checksum"):
            read_arrays(path)


@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_anywhere_never_changes_what_is_read(tmp_path_factory, where, bit):
    path = tmp_path_factory.getbasetemp() / "flipped.h5"
    write_arrays(path, CHECKPOINT, {"epoch": 2})
    damaged = bytearray(path.read_bytes())
    damaged[int(where * len(damaged))] ^= 1 << bit
    path.write_bytes(damaged)
    try:
        arrays, kept = read_arrays(path)
    except CheckpointError:
        return
    assert kept == {"epoch": 2} and list(arrays) == list(CHECKPOINT)
    for name, array in CHECKPOINT.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)


def rewritten(path, change):
    write_arrays(path, CHECKPOINT, {"epoch": 2})
    with h5py.File(path, "r+") as file:
        content = json.loads(file.attrs["content"])
        change(file, content)
        del file.attrs["content"]
        file.attrs["content"] = np.bytes_(json.dumps(content).encode())


def set_text(file, name, value):
    del file.attrs[name]
    file.attrs[name] = np.bytes_(value)


def replace(file, name, **kwargs):
    del file[name]
    file.create_dataset(name, **kwargs)


def overlap(file, content):
    replace(file, "weight", data=np.zeros(10_000, "<f4"))
    file["again"] = file["weight"]
    content["arrays"] = ["weight", "again"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f, c: c["metadata"].update(epoch=3), "does not match its checksum"),
        (lambda f, c: c["arrays"].reverse(), "does not match its checksum"),
        (lambda f, c: c.pop("checksum"), "does not match its checksum None"),
        (lambda f, c: replace(f, "weight", data=ROWS.reshape(3, 4)), "does not match its checksum"),
        (lambda f, c: replace(f, "weight", data=ROWS.view("<i4")), "does not match its checksum"),
        (lambda f, c: replace(f, "weight", data=ROWS, chunks=(4, 3)), "'weight' is chunked"),
        (lambda f, c: replace(f, "weight", data=ROWS.astype(">f4")), "big-endian"),
        (lambda f, c: f.__delitem__("weight"), "has no 'weight'"),
        (lambda f, c: overlap(f, c), "its arrays overlap into 80000"),
        (lambda f, c: c.update(arrays="weight"), "must hold a list 'arrays'"),
        (lambda f, c: c.update(arrays=["../weight", 3]), "must hold a list 'arrays'"),
        (lambda f, c: c.update(arrays=["/weight"]), "is not the name of an array"),
        (lambda f, c: c["metadata"].update(epoch=None), "must be a flat dictionary"),
        (lambda f, c: c.update(metadata=[]), "must be a flat dictionary"),
        (lambda f, c: set_text(f, "format", "kdcore.logitstore"), "format 'kdcore.logitstore'; expected"),
        (lambda f, c: f.attrs.__delitem__("format"), "format None"),
        (lambda f, c: f.attrs.__setitem__("version", 2), "version 2; this kdcore reads version 1"),
    ],
)
def test_not_a_checkpoint(change, words, path):
    rewritten(path, change)
    with pytest.raises(CheckpointError) as caught:
        read_arrays(path)
    assert words in str(caught.value) and str(path) in str(caught.value)


def test_rewriting_alone_is_harmless(path):
    rewritten(path, lambda file, content: None)
    assert read_arrays(path)[1] == {"epoch": 2}


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b"[" * 100_000, b"9" * 10_000], ids=["empty", "list", "cut", "deep", "long"]
)
def test_content_that_is_no_object(text, path):
    write_arrays(path, {}, {})
    with h5py.File(path, "r+", libver=("v108", "v108")) as file:
        del file.attrs["content"]
        file.attrs.create("content", text, dtype=h5py.string_dtype("utf-8", max(len(text), 1)))
    with pytest.raises(CheckpointError, match="is not (JSON|a JSON object)"):
        read_arrays(path)


def test_other_files_are_no_checkpoints(path):
    path.write_bytes(b"torch.save wrote this")
    with pytest.raises(CheckpointError, match="cannot be read as HDF5"):
        read_arrays(path)
    with pytest.raises(FileNotFoundError):
        read_arrays(path.with_name("absent.h5"))


@pytest.mark.parametrize(
    ("arrays", "metadata", "error", "words"),
    [
        ({"x": np.zeros(2, complex)}, {}, DTypeError, "arrays['x'] has the dtype complex128"),
        ({"x": np.zeros(2, bool)}, {}, DTypeError, "bool"),
        ({"x": np.zeros(2, ">f4")}, {}, DTypeError, ">f4"),
        ({"x": np.array(["text"])}, {}, DTypeError, "<U4"),
        ({"x": np.zeros(2), "x/y": np.zeros(2)}, {}, DomainError, "arrays has 'x/y' and also 'x'"),
        ({}, {"x": None}, DTypeError, "metadata['x'] must be a str, int, float or bool, got NoneType"),
        ({}, {3: "x"}, DTypeError, "metadata keys must be strings, got 3"),
    ],
)
def test_what_a_checkpoint_does_not_take(arrays, metadata, error, words, path):
    write_arrays(path, CHECKPOINT, {"old": True})
    with pytest.raises(error) as caught:
        write_arrays(path, arrays, metadata)
    assert words in str(caught.value)
    assert read_arrays(path)[1] == {"old": True}


@pytest.mark.parametrize("failing", ["_set_text", "sync"])
def test_failed_write_leaves_the_old_file_and_no_other(failing, path, monkeypatch):
    write_arrays(path, CHECKPOINT, {"epoch": 2})

    def fail(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(hdf5, failing, fail)
    with pytest.raises(KeyboardInterrupt):
        write_arrays(path, CHECKPOINT, {"epoch": 3})
    assert os.listdir(path.parent) == [path.name]
    assert read_arrays(path)[1] == {"epoch": 2}


def test_killed_writer_leaves_the_old_file(path, monkeypatch):
    write_arrays(path, CHECKPOINT, {"epoch": 2})
    monkeypatch.setattr(hdf5.os, "replace", lambda *names: os._exit(9))
    child = os.fork()
    if child == 0:
        write_arrays(path, CHECKPOINT, {"epoch": 3})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert read_arrays(path)[1] == {"epoch": 2}
    leftovers = [name for name in os.listdir(path.parent) if name != path.name]
    assert len(leftovers) == 1 and leftovers[0].endswith(".part")


def test_written_file_is_synced_before_it_is_named(path, monkeypatch):
    calls = []
    sync, replace_name = hdf5.sync, os.replace
    monkeypatch.setattr(hdf5, "sync", lambda p: (calls.append(p), sync(p)))
    monkeypatch.setattr(hdf5.os, "replace", lambda a, b: (calls.append("replace"), replace_name(a, b)))
    write_arrays(path, {}, {})
    assert calls[1:] == ["replace", path.parent] and calls[0].parent == path.parent


def test_writing_where_no_file_can_be(tmp_path):
    with pytest.raises(IsADirectoryError, match="no file can be written"):
        write_arrays(tmp_path, {}, {})
    with pytest.raises(FileNotFoundError, match="absent is not a directory"):
        write_arrays(tmp_path / "absent" / "x.h5", {}, {})


# Keys of content.


def test_content_key_is_what_the_contract_says():
    # BLAKE2b-8 of 01 00 00 00 ff ff ff ff, read little-endian.
    import hashlib

    digest = hashlib.blake2b(b"\1\0\0\0\xff\xff\xff\xff", digest_size=8).digest()
    assert content_key([1, 2**32 - 1]) == int.from_bytes(digest, "little")
    assert content_key(np.array([1, 2**32 - 1], np.uint64)) == content_key([1, 2**32 - 1])
    assert content_key([]) == int.from_bytes(hashlib.blake2b(b"", digest_size=8).digest(), "little")


@pytest.mark.parametrize("ids", [[-1], [0, 2**32], np.array([2**63], np.uint64), [2**70], [1, -(2**70)]], ids=str)
def test_content_key_does_not_wrap(ids):
    with pytest.raises(DomainError, match=f"token id {ids[-1]} is outside"):
        content_key(ids)


@pytest.mark.parametrize(
    ("ids", "error"),
    [([1.0], DTypeError), ([True], DTypeError), (["a"], DTypeError), ([[1]], ShapeError), (3, ShapeError)],
    ids=str,
)
def test_content_key_takes_one_row_of_integers(ids, error):
    with pytest.raises(error, match="ids must be"):
        content_key(ids)


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [(5, DTypeError, "path must be a path, got 5"), ("a\0b", DomainError, "with a null byte")],
)
def test_what_is_no_path(bad, error, words):
    for use in (SafeFile, read_arrays, hdf5.read_tensors, lambda path: write_arrays(path, {}, {})):
        with pytest.raises(error, match=words):
            use(bad)


def test_names_are_strings(path):
    with pytest.raises(DTypeError, match="the name of an array must be a string, got 5"):
        write_arrays(path, {5: ROWS}, {})
    write_arrays(path, {"x": ROWS}, {})
    with SafeFile(path) as file:
        for use in (lambda: file.has(5), lambda: file.dataset(5, dtypes=FLOATS), lambda: file.attribute(5, "a", str)):
            with pytest.raises(DTypeError, match="the name of an array must be a string, got 5"):
                use()


def test_the_module_needs_no_fork(monkeypatch):
    """Windows has none."""
    spec = importlib.util.spec_from_file_location("hdf5_without_fork", hdf5.__file__)
    monkeypatch.delattr(os, "register_at_fork")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_every_error_is_of_the_family():
    assert issubclass(CheckpointError, KdcoreError) and issubclass(UnsafeFileError, KdcoreError)


@pytest.mark.parametrize(
    ("shape", "chunk_rows", "rows"),
    [
        ((512, 1), 64, None),  # no more than 4 kB
        ((513, 1), 64, 513),
        ((10_000, 4), 100, 1024),  # what describes a chunk counts below 32 kB
        ((10_000, 4), 3000, 3000),
        ((10_000, 4), 50_000, 10_000),
        ((100_000, 4), 50_000, 32_768),  # and what is read for one row above 1 MB
        ((3, 300_000), 64, 1),
    ],
)
def test_the_layout_of_compressed_arrays(shape, chunk_rows, rows, path):
    array = np.arange(np.prod(shape), dtype="<f8").reshape(shape)
    blocks = [array[: shape[0] // 3], array[shape[0] // 3 :]]
    hdf5.write_compressed(path, {"group/array": ("<f8", shape, iter(blocks))}, {"answer": 42}, chunk_rows)
    with h5py.File(path) as file:
        made = file["group/array"]
        np.testing.assert_array_equal(made[()], array)
        assert file.attrs["answer"] == 42
        assert made.chunks == (None if rows is None else (rows, *shape[1:]))
        filters = (made.compression, made.compression_opts, made.shuffle, made.fletcher32)
        assert filters == ((None, None, False, False) if rows is None else ("gzip", 1, True, True))
    assert path.stat().st_size < array.nbytes * 0.6 + 4096  # nothing is aligned to pages
