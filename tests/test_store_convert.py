"""Stores of many shards, other forms of a store, what other programs wrote, and the commands."""

from __future__ import annotations

import json
import os
import re
import shutil

import h5py
import numpy as np
import pytest
from test_store import textbook

import kdcore
from kdcore.cli import main
from kdcore.errors import (
    ChecksumError,
    DomainError,
    FileFormatError,
    KdcoreError,
    MissingDependencyError,
    MissingRowError,
    NonFiniteError,
    ProvenanceError,
    ShardExistsError,
    UnsafeFileError,
)
from kdcore.store.convert import import_axolotl, import_dense, import_distillkit, repack
from kdcore.store.manifest import write_manifest

VOCAB, K = 120, 6


def logits_of(ids):
    rng = np.random.default_rng([int(ids[0]), len(ids)])
    return (rng.normal(size=(len(ids), VOCAB)) * 2).astype(np.float32)


def shard(path, index, count=3, **options):
    options = {"vocab_size": VOCAB, "k": K, "capacity": 100, "block_rows": 4} | options
    with kdcore.LogitStoreWriter(path, shard_index=index, **options) as writer:
        for i in range(count):
            ids = np.arange(1000 * index + 10 * i, 1000 * index + 10 * i + 2 + i)
            writer.append(ids, logits_of(ids))
    return path


@pytest.fixture
def folder(tmp_path):
    """Three shards, whose names are not in the order of their rows."""
    for index, name in enumerate(["c.h5", "a.h5", "b.h5"]):
        shard(tmp_path / name, index, 3 + index)
    return tmp_path


# --- manifests -------------------------------------------------------------------------------------------------------


def test_many_shards_are_one_store(folder):
    with kdcore.LogitStore(write_manifest(folder), vocab_size=VOCAB) as store:
        parts = [kdcore.LogitStore(folder / name) for name in ("c.h5", "a.h5", "b.h5")]
        assert [path.name for path in store.shards] == ["c.h5", "a.h5", "b.h5"]
        assert (len(store), store.sequences) == (sum(map(len, parts)), 12)
        everything = np.concatenate([part.read(slice(None), 2.0).log_probs for part in parts])
        np.testing.assert_array_equal(store.read(slice(None), 2.0).log_probs, everything)
        rows = np.random.default_rng(0).integers(0, len(store), 200)
        np.testing.assert_array_equal(store.read(rows, 2.0).log_probs, everything[rows])
        assert len(list(store.shuffled(0))) == 12
        for number in range(12):
            ids = store.input_ids(number)
            best = np.argsort(-logits_of(ids), axis=1)[:, :K]
            np.testing.assert_array_equal(store.sequence(ids).indices, best)
            np.testing.assert_array_equal(store.read(store.rows_of(ids), input_ids=ids).indices, best)
        with pytest.raises(MissingRowError):
            store.sequence([1, 2, 3])
        store.verify()


def test_a_shard_takes_one_descriptor(folder):
    """A store of hundreds of shards stays below the usual limit of 1024."""
    write_manifest(folder)
    before = len(os.listdir("/proc/self/fd"))
    with kdcore.LogitStore(folder / "manifest.json") as store:
        store.read(slice(None))
        assert len(os.listdir("/proc/self/fd")) - before <= 3


def edited(folder, **changes):
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    for key, value in changes.items():
        place, _, name = key.partition("_")
        (content["shards"][int(place[1:])] if place[0] == "s" else content)[name] = value
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"s1_row_start": 8}, ProvenanceError, r"shard 1 \(a.h5\) begins at row 8, .* end at 9: they overlap"),
        ({"s1_row_start": 10}, ProvenanceError, "they leave a gap"),
        ({"s2_shard_index": 1}, ProvenanceError, "has the shard_index 1"),
        ({"s1_name": "c.h5"}, ProvenanceError, "both 'c.h5'"),
        ({"s1_name": "../c.h5"}, UnsafeFileError, "a file beside it"),
        ({"s1_name": "/etc/passwd"}, UnsafeFileError, "a file beside it"),
        ({"s1_name": "z" * 300}, UnsafeFileError, "a file beside it"),
        ({"s1_name": "\ud800.h5"}, UnsafeFileError, "a file beside it"),
        ({"s1_name": "z.h5"}, FileNotFoundError, "z.h5 is missing"),
        ({"s1_bytes": 5}, ChecksumError, "has 5: it was changed"),
        ({"s1_rows": -1}, FileFormatError, "'rows' of shard 1 must be a count"),
        ({"s1_rows": True}, FileFormatError, "must be a count"),
        ({"s1_sha256": 5}, FileFormatError, "must be a string"),
        ({"s1_extra": 5}, FileFormatError, "must be an object of"),
        ({"m_format": "other"}, FileFormatError, "its format is not"),
        ({"m_version": 2}, FileFormatError, "has the version 2"),
        ({"m_shards": []}, FileFormatError, "not empty"),
        ({"m_header": 3}, FileFormatError, "an object 'header'"),
        ({"s0_store_uuid": "0" * 32}, ProvenanceError, "another shard"),
        ({"s0_sequences": 2}, ProvenanceError, "sequences is 3, but .* has 2"),
    ],
)  # fmt: skip
def test_manifests_that_do_not_hold(folder, changes, error, words):
    write_manifest(folder)
    path = edited(folder, **changes)
    with pytest.raises(error, match=words):
        kdcore.LogitStore(path)


def test_manifests_that_are_none(folder):
    path = folder / "manifest.json"
    for text in ("{", '{"format": 3}', "{" * 5000):
        path.write_text(text)
        with pytest.raises(FileFormatError, match="is not a manifest"):
            kdcore.LogitStore(path)
    write_manifest(folder)
    with pytest.raises(DomainError, match="an unfinished shard, not for a manifest"):
        kdcore.LogitStore(path, recover=True)


def test_shards_that_do_not_belong_together(folder):
    for name, options, error, words in (
        ("d.h5", {"index": 2}, ProvenanceError, "both have the shard_index 2"),
        ("d.h5", {"index": 4}, MissingRowError, "no shard with the shard_index 3, but one with 4"),
        ("d.h5", {"index": 3, "vocab_size": VOCAB, "k": 5}, ProvenanceError, "'k' is 5, but 6"),
        ("d.h5", {"index": 3, "teacher": "another"}, ProvenanceError, "'teacher' is 'another'"),
        ("d.h5", {"index": 3, "corpus_sha256": "ab" * 32}, ProvenanceError, "'corpus_sha256'"),
        ("d.h5", {"index": 3, "temperatures": (1.0,)}, ProvenanceError, "'temperatures'"),
    ):
        path = shard(folder / name, **options)
        with pytest.raises(error, match=words):
            write_manifest(folder)
        path.unlink()
    kdcore.LogitStoreWriter(folder / "d.h5", vocab_size=VOCAB, capacity=3).abandon()
    with pytest.raises(FileFormatError, match=r"d.h5.part is unfinished"):
        write_manifest(folder)
    (folder / "d.h5.part").unlink()
    shutil.copy(folder / "a.h5", folder / "e.h5")
    with pytest.raises(ProvenanceError):
        write_manifest(folder)
    with pytest.raises(MissingRowError, match="no shards"):
        write_manifest(folder / "..", [])


def test_a_shard_that_changed_after_its_manifest(folder):
    path = write_manifest(folder)
    data = bytearray((folder / "b.h5").read_bytes())
    with kdcore.LogitStore(folder / "b.h5") as store:
        place = store._shards[0].offsets["rows/values"] + 99 * K * 2
    data[place] ^= 1  # in room that no row has taken: no other check sees it
    (folder / "b.h5").write_bytes(data)
    with kdcore.LogitStore(path) as store:
        store.read(slice(None))
        with pytest.raises(ChecksumError, match="the SHA-256 is"):
            store.verify()


# --- the archive form ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [
    {}, {"vocab_size": 70_000}, {"kind": "sampled", "k": None, "head_k": 2, "draws": 3},
    {"kind": "sampled", "k": None, "vocab_size": 70_000, "draws": 3}, {"kind": "dense", "k": None},
])  # fmt: skip
def test_the_archive_form_says_the_same(tmp_path, options):
    options = {"vocab_size": VOCAB, "k": K, "capacity": 2000, "block_rows": 7} | options
    rng = np.random.default_rng(1)
    with kdcore.LogitStoreWriter(tmp_path / "t.h5", **options) as writer:
        for i in range(3):
            rows = rng.normal(size=(400 + i, options["vocab_size"])).astype(np.float32)
            writer.append(np.arange(i, i + len(rows)), rows)
    target = repack(tmp_path / "t.h5", tmp_path / "a.h5")
    with kdcore.LogitStore(tmp_path / "t.h5") as plain, kdcore.LogitStore(target) as archive:
        archive.verify()
        for temperature in plain.temperatures:
            for a, b in (
                (plain.read(slice(None), temperature), archive.read(slice(None), temperature)),
                (plain.read([9, 800, 7], temperature), archive.read([9, 800, 7], temperature)),
                (plain.sequence(np.arange(1, 402), temperature), archive.sequence(np.arange(1, 402), temperature)),
            ):
                if options.get("kind") == "dense":
                    np.testing.assert_array_equal(a, b)
                    continue
                for name in vars(a):
                    np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    with h5py.File(target) as file:  # every reader of HDF5 can
        assert file["rows/values"].compression == "gzip" and file["rows/values"].shape[0] == 1203
    with pytest.raises(DomainError, match="another file"):
        repack(tmp_path / "t.h5", tmp_path / "t.h5")


def test_bytes_of_an_archived_row(tmp_path):
    """At most 180 of a language model's rows; see benchmarks/store.py."""
    rng = np.random.default_rng(2)
    vocab, rows = 32_000, 4096
    prior = -1.35 * np.log(np.arange(1, vocab + 1, dtype=np.float32) + 2.7)
    with kdcore.LogitStoreWriter(tmp_path / "t.h5", vocab_size=vocab, capacity=rows) as writer:
        for _ in range(8):
            logits = prior + rng.standard_normal((512, vocab), np.float32) * 2
            likely = (vocab * rng.random((512, 6)) ** 4).astype(int)
            logits[np.arange(512)[:, None], likely] += rng.normal(8, 3, (512, 6)).astype(np.float32)
            writer.append((vocab * rng.random(512) ** 3).astype(np.uint32), logits)
    assert repack(tmp_path / "t.h5", tmp_path / "a.h5").stat().st_size / rows < 180


def test_an_archive_replaces_nothing(tmp_path):
    path, other = shard(tmp_path / "t.h5", 0), shard(tmp_path / "u.h5", 1)
    before = other.read_bytes()
    with pytest.raises(ShardExistsError, match="u.h5 is there already"):
        repack(path, other)
    assert other.read_bytes() == before
    with pytest.raises(DomainError, match="without '.part'"):
        repack(path, tmp_path / "v.h5.part")


def test_an_archive_of_a_damaged_shard_is_not_written(tmp_path):
    path = shard(tmp_path / "t.h5", 0)
    with h5py.File(path, "r+") as file:
        file["rows/values"][3, 0] -= 1
    with pytest.raises(ChecksumError, match="'rows/values', rows 0 to 3"):
        repack(path, tmp_path / "a.h5")
    assert not (tmp_path / "a.h5").exists()


# --- dense files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["sequences", "rows", "one", "bfloat16", "chunked"])
def test_dense_files(tmp_path, layout):
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(3, 5, VOCAB)).astype(np.float32)
    ids = rng.integers(0, VOCAB, (3, 5))
    options = {}
    with h5py.File(tmp_path / "dense.h5", "w") as file:
        if layout in ("rows", "one"):
            file["logits"], file["input_ids"] = logits.reshape(15, -1), ids.reshape(15)
            if layout == "rows":
                file["cuts"] = [0, 5, 10, 15]
                options["offsets"] = "cuts"
        elif layout == "bfloat16":
            data = file.create_dataset("logits", data=(logits.view(np.uint32) >> 16).astype("<u2"))
            data.attrs["dtype"] = "bfloat16"
            file["input_ids"] = ids
            logits = (logits.view(np.uint32) >> 16 << 16).view(np.float32)
        else:
            file.create_dataset("logits", data=logits, compression="gzip" if layout == "chunked" else None)
            file["input_ids"] = ids
    target = import_dense(tmp_path / "dense.h5", tmp_path / "t.h5", k=K, teacher="by hand", **options)
    with kdcore.LogitStore(target) as store:
        store.verify()
        sequences = [ids.reshape(15)] if layout == "one" else list(ids)
        assert store.sequences == len(sequences) and store.header.teacher == "by hand"
        for sequence, rows in zip(sequences, logits.reshape(len(sequences), -1, VOCAB), strict=True):
            found = store.sequence(sequence, 2.0)
            classes, _, tail = textbook(rows, K, 2.0)
            np.testing.assert_array_equal(found.indices, classes)
            np.testing.assert_allclose(found.tail_logmass, tail, atol=1e-5)


def test_dense_files_that_are_not(tmp_path):
    path = tmp_path / "dense.h5"
    logits = np.zeros((2, 3, VOCAB), np.float32)
    logits[1, 1, 7] = np.nan
    with h5py.File(path, "w") as file:
        file["logits"], file["input_ids"], file["flat"] = logits, np.arange(6).reshape(2, 3), np.zeros((4, VOCAB))
        file["wrong"], file["tokens"], file["cuts"] = np.arange(5), np.arange(4), [0, 3, 3, 4]
        file["outside"] = h5py.ExternalLink("other.h5", "/logits")
    for options, error, words in (
        ({}, NonFiniteError, r"logits\[1, 7\] is nan"),
        ({"tokens": "wrong"}, FileFormatError, r"'wrong' has the shape \(5,\); expected \(2, 3\)"),
        ({"dataset": "input_ids"}, KdcoreError, "'input_ids' has the type"),
        ({"dataset": "outside"}, UnsafeFileError, "external link"),
        ({"dataset": "none"}, FileFormatError, "has no 'none'"),
        ({"offsets": "cuts"}, DomainError, r"for logits \[rows, V\]"),
        (
            {"dataset": "flat", "tokens": "tokens", "offsets": "cuts"},
            FileFormatError,
            "must ascend from 0 to the 4 rows",
        ),
    ):
        with pytest.raises(error, match=words):
            import_dense(path, tmp_path / "t.h5", k=K, **options)
        # What has failed can be run again: nothing is left of it.
        assert not (tmp_path / "t.h5").exists() and not (tmp_path / "t.h5.part").exists()


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet():
    pytest.importorskip("pyarrow", reason="pyarrow is not installed (pip install kdcore[parquet])")
    from pyarrow import Table, parquet

    return lambda path, columns: parquet.write_table(Table.from_pydict(columns), path)


def answers(count, rng):
    """Log-probabilities [count, K] in order and their classes, of rows with a tail."""
    logits = rng.normal(size=(count, VOCAB)) * 2
    classes, log_probs, _ = textbook(logits, K, 1.0)
    return classes, log_probs


def bits(values, width):
    """Rows of integers as bytes, the highest bit first."""
    stream = (np.asarray(values)[..., None] >> np.arange(width - 1, -1, -1)) & 1
    return np.packbits(stream.reshape(len(values), -1).astype(np.uint8), axis=1)


@pytest.mark.parametrize("delta", [False, True])
def test_distillkit(tmp_path, parquet, delta):
    """Three exact values, a fit of two terms for the other three, and what it leaves in 8 bits."""
    rng = np.random.default_rng(4)
    columns = {"input_ids": [], "compressed_logprobs": [], "bytepacked_indices": []}
    expected = []
    for length in (5, 2):
        tokens = rng.integers(0, VOCAB, length + 1)
        classes, log_probs = answers(length, rng)
        coded = np.diff(log_probs, axis=1, prepend=0) if delta else log_probs
        exact = coded[:, :3].astype("<f4")
        coefficients = np.stack([coded[:, 3], np.full(length, -0.125)], axis=1).astype("<f4")
        fitted = coefficients[:, :1] + coefficients[:, 1:] * np.sqrt(np.arange(3))
        scale = (np.abs(coded[:, 3:] - fitted).max(axis=1, keepdims=True) / 127).astype("<f4")
        levels = np.round((coded[:, 3:] - fitted) / scale).astype(int)
        parts = [exact.view(np.uint8), coefficients.view(np.uint8), scale.view(np.uint8), bits(levels + 128, 8)]
        columns["input_ids"].append(tokens.tolist())
        columns["compressed_logprobs"].append(np.concatenate(parts, axis=1).tolist())
        columns["bytepacked_indices"].append(bits(classes, 7).tolist())
        expected.append((tokens[:-1], classes, log_probs))
    (tmp_path / "data").mkdir()
    parquet(tmp_path / "data" / "data_0.parquet", columns)
    config = {
        "d": VOCAB, "k": K, "exact_k": 3, "exact_dtype": "float32", "polynomial_terms": [0, "sqrt"],
        "term_dtype": "float32", "delta_encoding": delta, "error_diffusion": False, "normalize_t": False,
        "residual_bins": [{"scale_dtype": "float32", "element_bits": 8, "num_elements": 3}],
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    target = import_distillkit(tmp_path / "data", tmp_path / "t.h5", tmp_path / "config.json", value_dtype="float32")
    with kdcore.LogitStore(target) as store:
        store.verify()
        assert (store.header.tail_source, store.temperatures, store.sequences) == ("derived", (1.0,), 2)
        with pytest.raises(DomainError, match=r"2.0 is not stored \(its tail was derived at 1\)"):
            store.read(0, 2.0)
        for tokens, classes, log_probs in expected:
            rows = store.sequence(tokens)
            np.testing.assert_array_equal(rows.indices, classes)
            np.testing.assert_allclose(rows.log_probs, log_probs, atol=0.03)
            np.testing.assert_allclose(np.exp(rows.tail_logmass), 1 - np.exp(log_probs).sum(axis=1), atol=0.01)
    for change, words in (
        ({"k": 7}, "bytes"),
        ({"exact_k": 9}, "not one that is known"),
        ({"d": "many"}, "DistillKit's"),
        ({"d": 0}, "not one that is known"),
        ({"d": 1 << 40}, "not one that is known"),
    ):
        with pytest.raises(FileFormatError, match=words):
            import_distillkit(tmp_path / "data", tmp_path / "u.h5", config | change)
    good, parts = columns["compressed_logprobs"][1], ([256], [-1], [0.5], [None])
    for part in parts:
        columns["compressed_logprobs"][1] = [[*row[:-1], *part] for row in good]
        parquet(tmp_path / "data" / "data_0.parquet", columns)
        with pytest.raises(FileFormatError, match="'compressed_logprobs' must be"):
            import_distillkit(tmp_path / "data", tmp_path / "u.h5", config)
    columns["compressed_logprobs"][1] = np.zeros((2, len(columns["compressed_logprobs"][1][0])), int).tolist()
    parquet(tmp_path / "data" / "data_0.parquet", columns)
    with pytest.raises(FileFormatError, match=r"row 0 holds 6.0000 of the probability") as caught:
        import_distillkit(tmp_path / "data", tmp_path / "v.h5", config)
    assert "row 1" in caught.value.__notes__[0]


@pytest.mark.parametrize("layout", ["pairs", "columns"])
def test_axolotl(tmp_path, parquet, layout):
    rng = np.random.default_rng(5)
    tokens = rng.integers(0, VOCAB, 6)
    classes, log_probs = answers(5, rng)
    entries = [[], *log_probs.tolist()]  # of the first token nothing can be said
    ids = [[], *classes.tolist()]
    if layout == "pairs":
        pairs = [
            [{"token": f"token_id:{c}", "logprob": v} for c, v in zip(*row, strict=True)]
            for row in zip(ids, entries, strict=True)
        ]
        columns = {"input_ids": [tokens.tolist()], "logprobs": [pairs]}
    else:
        columns = {"input_ids": [tokens.tolist()], "target_token_ids": [ids], "target_logprobs": [entries]}
    parquet(tmp_path / "a.parquet", columns)
    options = {"vocab_size": VOCAB, "k": 4, "value_dtype": "float32"}
    with kdcore.LogitStore(import_axolotl(tmp_path / "a.parquet", tmp_path / "t.h5", **options)) as store:
        store.verify()
        rows = store.sequence(tokens[:-1])
        np.testing.assert_array_equal(rows.indices, classes[:, :4])
        np.testing.assert_allclose(rows.log_probs, log_probs[:, :4], atol=1e-5)
        np.testing.assert_allclose(np.exp(rows.tail_logmass), 1 - np.exp(log_probs[:, :4]).sum(axis=1), atol=1e-5)
        assert store.header.tail_source == "derived"


def test_axolotl_with_prompts_that_were_not_asked_for(tmp_path, parquet):
    rng = np.random.default_rng(6)
    classes, log_probs = answers(3, rng)
    whole = {"ids": [[], *classes.tolist()], "logs": [[], *log_probs.tolist()]}
    gap = {"ids": [[], [0, 1], *classes[1:].tolist()], "logs": [[], [-np.inf, -np.inf], *log_probs[1:].tolist()]}
    columns = {
        "input_ids": [[1, 2, 3, 4], [5, 6, 7, 8]],
        "target_token_ids": [whole["ids"], gap["ids"]],
        "logprobs": [whole["logs"], gap["logs"]],
    }
    parquet(tmp_path / "a.parquet", columns)
    with pytest.raises(FileFormatError, match=r"a.parquet, row 1: token 1 has no entries: use skip_incomplete"):
        import_axolotl(tmp_path / "a.parquet", tmp_path / "t.h5", vocab_size=VOCAB)
    target = import_axolotl(tmp_path / "a.parquet", tmp_path / "t.h5", vocab_size=VOCAB, skip_incomplete=True)
    with kdcore.LogitStore(target) as store:
        assert store.sequences == 1
        np.testing.assert_array_equal(store.sequence([1, 2, 3]).n_valid, K)


@pytest.mark.parametrize(
    ("columns", "error", "words"),
    [
        ({"target_token_ids": [[[4, 2**32 + 5]] * 3]}, DomainError, r"rows.indices\[0, 1\] is 4294967301, not a class"),
        ({"target_token_ids": [[[-1, 5]] * 3]}, DomainError, r"rows.indices\[0, 0\] is -1, not a class"),
        ({"target_token_ids": [[[4.7, 5.2]] * 3]}, FileFormatError, "ids of entry 0 must be integers, .* float64"),
        ({"target_token_ids": [[[4, None]] * 3]}, FileFormatError, "row 0: ids of entry 0 must be integers"),
        ({"input_ids": [[1.5, 2.0, 3.0]]}, FileFormatError, "row 0: 'input_ids' must be integers, .* float64"),
        ({"input_ids": ["abc"]}, FileFormatError, "row 0: 'input_ids' must be integers"),
        ({"target_logprobs": [[["a", "b"]] * 3]}, FileFormatError, "log-probabilities of entry 0 must be numbers"),
        ({"target_logprobs": [[[-1.0, None]] * 3]}, NonFiniteError, "row 0, entry 1 is nan"),
    ],
)  # fmt: skip
def test_axolotl_columns_that_are_not(tmp_path, parquet, columns, error, words):
    good = {"input_ids": [[1, 2, 3]], "target_token_ids": [[[4, 5]] * 3], "target_logprobs": [[[-1.0, -2.0]] * 3]}
    parquet(tmp_path / "a.parquet", good | columns)
    for skip in (False, True):
        with pytest.raises(error, match=words):
            import_axolotl(tmp_path / "a.parquet", tmp_path / f"{skip}.h5", vocab_size=VOCAB, skip_incomplete=skip)


def test_entries_of_axolotl_that_are_not(tmp_path, parquet):
    for entry, words in (
        ({"token": "token_id:" + "9" * 30, "logprob": -1.0}, "ids of entry 0 must be integers"),
        ({"token": "token_id:4"}, "entry 0 is nan"),
        ({"logprob": -1.0}, "must be like"),
    ):
        parquet(tmp_path / "a.parquet", {"input_ids": [[1, 2, 3]], "logprobs": [[[entry]] * 3]})
        with pytest.raises((FileFormatError, NonFiniteError), match=words):
            import_axolotl(tmp_path / "a.parquet", tmp_path / "t.h5", vocab_size=VOCAB)
        (tmp_path / "t.h5.part").unlink(missing_ok=True)
    with pytest.raises(DomainError, match="k must be an integer of at least 1, got -1"):
        import_axolotl(tmp_path / "a.parquet", tmp_path / "t.h5", vocab_size=VOCAB, k=-1)


def test_parquet_needs_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(MissingDependencyError, match=r"kdcore\[parquet\]"):
        import_axolotl(tmp_path / "a.parquet", tmp_path / "t.h5", vocab_size=5)


# --- commands --------------------------------------------------------------------------------------------------------


def test_commands(folder, capsys):
    def said(*arguments, code=0):
        assert main(["store", *map(str, arguments)]) == code
        output = capsys.readouterr()
        return output.err if code else output.out

    assert "written: " in said("manifest", folder)
    for path in (folder / "a.h5", folder / "manifest.json"):
        table = said("inspect", path)
        assert re.search(r"^kind +topk$", table, re.M) and re.search(r"^bytes a row +\d+\.\d$", table, re.M)
        masses = [float(x) for x in re.findall(r"^tail mass at [12] +(0\.\d+)", table, re.M)]
        assert len(masses) == 2 and 0 < masses[0] < masses[1] < 1
        assert "all as they were written" in said("verify", path)
    assert "plot: " in said("inspect", folder / "a.h5", "--plot", folder / "tails.png")
    assert (folder / "tails.png").read_bytes()[:4] == b"\x89PNG"
    assert re.search(r"written: .*, \d+% of [\d,]+ bytes", said("repack", folder / "a.h5", folder / "archive.h5"))
    assert "all as they were written" in said("verify", folder / "archive.h5")
    with h5py.File(folder / "dense.hdf5", "w") as file:
        file["logits"], file["input_ids"] = np.zeros((2, 3, 9), np.float32), np.arange(6).reshape(2, 3)
    assert "written: " in said(
        "import", folder / "dense.hdf5", folder / "d.h5", "--format", "dense", "--k", 3, "--temperature", 4
    )
    with kdcore.LogitStore(folder / "d.h5") as store:
        assert (store.temperatures, store.header.k, len(store)) == ((1.0, 4.0), 3, 6)
    assert "ChecksumError" in said("verify", damaged(folder / "c.h5"), code=1)
    for arguments, words in (
        (["--format", "axolotl"], "needs --vocab-size"),
        (["--format", "distillkit"], "needs --config"),
        (["--format", "dense", "--config", "x"], "--config is for --format distillkit"),
        (["--format", "dense", "--vocab-size", "5"], "--vocab-size is not for"),
    ):
        assert words in said("import", folder / "dense.hdf5", folder / "e.h5", *arguments, code=1)
    assert "recover=True" in said("verify", unfinished(folder / "u.h5"), code=1)
    assert "all as they were written" in said("verify", folder / "u.h5.part", "--recover")


def damaged(path):
    with h5py.File(path, "r+") as file:
        file["rows/tail_logmass"][0, 0] -= 0.001
    return path


def unfinished(path):
    writer = kdcore.LogitStoreWriter(path, vocab_size=9, capacity=5)
    writer.append([1], np.zeros((1, 9), np.float32))
    writer.commit()
    writer.abandon()
    return path.with_name("u.h5.part")


def test_inspecting_other_kinds(tmp_path, capsys):
    shard(tmp_path / "s.h5", 0, kind="sampled", k=None, head_k=1, draws=2, seed=5)
    assert main(["store", "inspect", str(tmp_path / "s.h5")]) == 0
    assert "1 exact, 2 draws, seed 5" in capsys.readouterr().out
    assert main(["store", "inspect", str(tmp_path / "s.h5"), "--plot", str(tmp_path / "p.png")]) == 1
    assert "kind 'topk'" in capsys.readouterr().err
