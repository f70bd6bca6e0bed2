"""HDF5Teacher of a store, and runs from one."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import kdcore
from kdcore.errors import DomainError, MissingRowError, ShapeError
from kdcore.runfile import pipeline_from_toml
from kdcore.store.manifest import write_manifest
from kdcore.teachers.base import answers_per_position

VOCAB = 50
SEQUENCES = [np.array([3, 1, 4]), np.array([1, 5]), np.array([9, 2, 6, 5])]


@pytest.fixture
def logits():
    rng = np.random.default_rng(0)
    rows = [(rng.normal(size=(ids.size, VOCAB)) * 2).astype(np.float32) for ids in SEQUENCES]
    return [x - np.log(np.exp(x).sum(axis=1, keepdims=True)) for x in rows]


def write(path, logits, **options):
    with kdcore.LogitStoreWriter(path, vocab_size=VOCAB, capacity=20, **options) as writer:
        for ids, rows in zip(SEQUENCES, logits, strict=True):
            writer.append(ids, rows)
    return path


def test_logits_of_a_dense_store(tmp_path, logits):
    path = write(tmp_path / "t.h5", logits, kind="dense", value_dtype="float32", teacher="it")
    everything = np.concatenate(logits)
    with kdcore.HDF5Teacher(path) as teacher:
        assert (len(teacher), teacher.vocab_size, teacher.metadata["teacher"]) == (9, VOCAB, "it")
        np.testing.assert_allclose(teacher.logits_for_batch([[8], [0], [8]]), everything[[8, 0, 8]], atol=1e-6)
        found, mask = teacher.logits_per_position([[1, 2], [3]])
        np.testing.assert_allclose(found[mask], everything[[1, 2, 3]], atol=1e-6)
        assert mask.tolist() == [[True, True], [True, False]] and not found[1, 1].any()
        with pytest.raises(MissingRowError, match="none with the number 9"):
            teacher.logits_for_batch([[9]])
        with pytest.raises(ShapeError, match="one row number"):
            teacher.logits_for_batch([[1, 2]])
        with pytest.raises(DomainError, match="of which logits are read"):
            teacher.rows_for_batch([[1]], 1.0)
    for source in (path, kdcore.LogitStore(path), write_manifest(tmp_path)):
        with kdcore.HDF5Teacher(source, address="content") as teacher:
            again = pickle.loads(pickle.dumps(teacher))
            for each in (teacher, again):
                found, mask = each.logits_per_position(SEQUENCES)
                np.testing.assert_allclose(found[mask], everything, atol=1e-6)
                np.testing.assert_allclose(each.logits_for_batch(SEQUENCES[1:]), everything[[4, 8]], atol=1e-6)
            with pytest.raises(MissingRowError, match="no sequence of the tokens"):
                teacher.logits_for_batch([[3, 1]])
        with pytest.raises(ValueError, match=r"HDF5Teacher\(.*\) is closed"):
            teacher.logits_for_batch(SEQUENCES)
    with pytest.raises(DomainError, match="not for a store"):
        kdcore.HDF5Teacher(path, "other")


@pytest.mark.parametrize("options", [{"k": 5}, {"kind": "sampled", "draws": 4, "head_k": 2}])
def test_rows_of_a_sparse_store(tmp_path, logits, options):
    path = write(tmp_path / "t.h5", logits, **options)
    store = kdcore.LogitStore(path)
    with kdcore.HDF5Teacher(path, address="content") as teacher:
        rows, mask = teacher.rows_per_position(SEQUENCES, 2.0)
        assert mask.sum() == len(rows.indices) == 9 and rows.temperature == 2.0
        np.testing.assert_array_equal(rows.indices, store.read(slice(None), 2.0).indices)
        np.testing.assert_array_equal(
            teacher.rows_for_batch(SEQUENCES, 2.0).indices, store.read([2, 4, 8], 2.0).indices
        )
        with pytest.raises(DomainError, match="rows_for_batch and rows_per_position read it"):
            teacher.logits_for_batch(SEQUENCES)
    with kdcore.HDF5Teacher(path) as teacher:
        np.testing.assert_array_equal(teacher.rows_for_batch([[7], [1]], 1.0).indices, store.read([7, 1]).indices)
    kdcore.save_teacher_logits(tmp_path / "dense.h5", logits[0])
    with kdcore.HDF5Teacher(tmp_path / "dense.h5") as teacher, pytest.raises(DomainError, match="not a store"):
        teacher.rows_for_batch([[0]], 1.0)


@pytest.mark.parametrize("tail", ["bucket", "zero"])
def test_steps_ask_a_sparse_store_for_its_rows(tmp_path, logits, tail):
    path = write(tmp_path / "t.h5", logits, k=5)
    rng = np.random.default_rng(3)
    student = [rng.normal(size=(ids.size, VOCAB)) for ids in SEQUENCES]
    labels = [ids % 7 for ids in SEQUENCES]
    rows = kdcore.LogitStore(path).read(slice(None), 2.0)
    with kdcore.HDF5Teacher(path, address="content") as teacher:
        assert teacher.temperatures == (1.0, 2.0) and isinstance(teacher, kdcore.TeacherRowsProvider)
        given = iter(student)
        loss, gradient, mask = kdcore.kd_step_per_position(
            teacher, SEQUENCES, labels, 2.0, 0.3, lambda _: next(given), tail=tail
        )
        expected = kdcore.kd_loss_and_gradient(
            np.concatenate(student), rows, np.concatenate(labels), 2.0, 0.3, tail=tail, reduction="sum"
        )
        np.testing.assert_allclose([loss], [float(expected.loss) / 9], rtol=1e-12)
        np.testing.assert_array_equal(gradient[mask], expected.gradient)
        given = iter(row[-1] for row in student)
        loss, gradient = kdcore.kd_step(
            teacher, SEQUENCES, [row[-1] for row in labels], 2.0, 0.3, lambda _: next(given), tail=tail
        )
        np.testing.assert_array_equal(gradient, expected.gradient[[2, 4, 8]])
        logits, mask = answers_per_position(teacher, [[], []], 2.0)
        assert logits.shape == mask.shape == (2, 0)
        empty = kdcore.kd_step_per_position(teacher, [[]], [[]], 2.0, 0.3, lambda _: np.zeros((0, VOCAB)), tail=tail)
        assert empty[0] == 0 and empty[1].shape == (1, 0, VOCAB)
        teacher.rows_per_position = lambda ids, temperature: (rows[:8], np.ones((3, 3), bool))
        with pytest.raises(ShapeError, match=r"a row for each of 9 positions, got the shape \(8,\)"):
            answers_per_position(teacher, SEQUENCES, 2.0)
        with pytest.raises(DomainError, match="temperature 3.0 is not stored"):
            kdcore.kd_step(teacher, SEQUENCES, [1, 2, 3], 3.0, 0.3, lambda _: np.zeros(VOCAB))


def test_a_run_from_a_store_is_that_from_the_same_logits(tmp_path):
    tokens = np.random.default_rng(1).integers(0, 16, 400)
    logits = np.random.default_rng(2).normal(size=(16, 16)).astype(np.float32)[tokens] * 3
    (tmp_path / "tokens").mkdir()
    tokens.astype("<u4").tofile(tmp_path / "tokens" / "part-0.bin")
    with kdcore.LogitStoreWriter(tmp_path / "store.h5", vocab_size=16, kind="dense", capacity=400) as writer:
        writer.append(tokens, logits)
    with kdcore.LogitStore(tmp_path / "store.h5") as store:
        kdcore.save_teacher_logits(tmp_path / "dense.h5", store.read(slice(None)))
    with kdcore.LogitStoreWriter(tmp_path / "topk.h5", vocab_size=16, k=8, capacity=400) as writer:
        writer.append(tokens, logits)
    metrics = {}
    for name in ("store", "dense", "topk"):
        (tmp_path / f"{name}.toml").write_text(
            f"""
            [distill]
            output_dir = "{tmp_path / name}-run"
            temperature = 2.0
            alpha = 0.3
            tail = "{"uniform" if name == "topk" else "bucket"}"
            batch_size = 8
            epochs = 1
            [teacher]
            kind = "hdf5"
            path = "{name}.h5"
            [student]
            kind = "logit"
            vocab_size = 16
            learning_rate = 0.5
            context = 1
            [batches]
            kind = "shards"
            directory = "tokens"
            sequence_length = 4
            """
        )
        metrics[name] = pipeline_from_toml(tmp_path / f"{name}.toml").execute().metrics
    assert metrics["store"]["final_loss"] == metrics["dense"]["final_loss"] < metrics["store"]["initial_loss"]
    # Of the tail's classes it keeps the mass, but not which is likelier: nearly the same run, and a smaller loss.
    assert metrics["topk"]["objective"].endswith("tail = uniform")
    assert 0.9 < metrics["topk"]["final_loss"] / metrics["dense"]["final_loss"] < 1
