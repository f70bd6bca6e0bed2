"""Stores: what is written is what is read, and what it says of a row is what a textbook says."""

from __future__ import annotations

import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from hypothesis import event, given, settings, strategies as st
from processes import in_a_process

import kdcore
from kdcore.cpu.stored import pack_ids, unpack_ids
from kdcore.errors import (
    CapacityError,
    ClosedShardError,
    DeviceMismatchError,
    DeviceUnavailableError,
    DiskFullError,
    DomainError,
    DTypeError,
    FileFormatError,
    MisalignedRowsError,
    MissingRowError,
    NonFiniteError,
    ProvenanceError,
    RepeatedSequenceError,
    ShapeError,
    ShardExistsError,
    VocabularyMismatchError,
)
from kdcore.sparse import SampledRows, TopKRows
from kdcore.store.encoding import encode_values

TEMPERATURES = (1.0, 2.0, 0.5)


def textbook(logits, k, temperature):
    """(classes, log p of them, log of all other p) of rows, in float64, from the definitions."""
    scaled = np.asarray(logits, np.float64) / temperature
    log_p = scaled - scaled.max(axis=1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    order = np.argsort(-np.asarray(logits, np.float64), axis=1, kind="stable")[:, :k]
    tail = log_p.copy()
    np.put_along_axis(tail, order, -np.inf, 1)
    top = tail.max(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        mass = top + np.log(np.exp(tail - top[:, None]).sum(axis=1))
    return order, np.take_along_axis(log_p, order, 1), np.where(np.isneginf(top), -np.inf, mass)


def write(path, sequences, logits, **options):
    options = {"capacity": sum(map(len, sequences))} | options
    if options.get("kind", "topk") in ("topk", "sampled"):
        options.setdefault("temperatures", TEMPERATURES)
    with kdcore.LogitStoreWriter(path, **options) as writer:
        for ids, rows in zip(sequences, logits, strict=True):
            writer.append(ids, rows)
    return kdcore.LogitStore(path)


@pytest.fixture
def teacher():
    """Five sequences of a vocabulary of 300, and logits of them."""
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 300, n) for n in (5, 1, 7, 33, 12)]
    return sequences, [(rng.normal(size=(n.size, 300)) * 3).astype(np.float32) for n in sequences]


# --- what rows say ---------------------------------------------------------------------------------------------------

#: Half a unit in the last place, as a part of the value.
HALF_UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 3e-7}


@pytest.mark.parametrize("value_dtype", HALF_UNIT)
@pytest.mark.parametrize("vocab", [300, 70_000])
def test_topk_rows_are_the_textbooks(tmp_path, value_dtype, vocab):
    rng = np.random.default_rng(1)
    logits = (rng.normal(size=(20, vocab)) * 3).astype(np.float32)
    with write(tmp_path / "t.h5", [np.arange(20)], [logits], vocab_size=vocab, k=10, value_dtype=value_dtype) as store:
        store.verify()
        assert (store.kind, store.vocab_size, len(store), store.sequences) == ("topk", vocab, 20, 1)
        assert store.temperatures == (1.0, 0.5, 2.0)
        for temperature in TEMPERATURES:
            rows = store.sequence(np.arange(20), temperature)
            classes, log_probs, tail = textbook(logits, 10, temperature)
            assert isinstance(rows, TopKRows) and rows.temperature == temperature and rows.vocab_size == vocab
            assert (rows.indices.dtype, rows.log_probs.dtype, rows.tail_logmass.dtype, rows.n_valid.dtype) == (
                np.int32, np.float32, np.float32, np.int32,
            )  # fmt: skip
            np.testing.assert_array_equal(rows.indices, classes)
            np.testing.assert_array_equal(rows.n_valid, 10)
            np.testing.assert_allclose(rows.tail_logmass, tail, rtol=3e-7, atol=3e-7)
            unit = HALF_UNIT[value_dtype]
            largest = np.abs(textbook(logits, 10, 1.0)[1]).max()
            np.testing.assert_allclose(rows.log_probs, log_probs, atol=2 * unit * largest / temperature + 2e-6, rtol=0)
            # What the rounding of the head does not change: all of it adds up to 1.
            total = np.exp(rows.log_probs.astype(np.float64)).sum(axis=1) + np.exp(rows.tail_logmass.astype(np.float64))
            np.testing.assert_allclose(total, 1, atol=1e-6)


def test_rows_add_up_to_one_at_low_temperatures(tmp_path):
    """Differences of quotients would not: those of log p = -8 at T = 1e-5 are off by 0.03."""
    temperatures = (1e-6, 1e-5, 1e-3, 0.05, 1e6)
    logits = np.random.default_rng(6).normal(size=(40, 3000)).astype(np.float32)
    logits[20:] = np.round(logits[20:])  # many classes share the largest
    with write(tmp_path / "t.h5", [range(40)], [logits], vocab_size=3000, k=9, temperatures=temperatures) as store:
        for temperature in store.temperatures:
            rows = store.read(slice(None), temperature)
            total = np.exp(rows.log_probs.astype(np.float64)).sum(axis=1) + np.exp(rows.tail_logmass.astype(np.float64))
            np.testing.assert_allclose(total, 1, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("order", ["random", "ascending", "descending", "equal"])
def test_selection_in_every_dtype_and_order(tmp_path, dtype, order):
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(6, 4500)) * 4
    logits = {"ascending": np.sort(logits), "descending": -np.sort(-logits), "equal": np.ones_like(logits)}.get(
        order, logits
    )
    logits = logits.astype(dtype)  # in 16 bits most values are there several times: the lower class comes first
    with write(tmp_path / "t.h5", [np.arange(6)], [logits], vocab_size=4500, k=40, value_dtype="float32") as store:
        for temperature in TEMPERATURES:
            rows = store.read(range(6), temperature)
            classes, log_probs, tail = textbook(logits, 40, temperature)
            np.testing.assert_array_equal(rows.indices, classes)
            np.testing.assert_allclose(rows.log_probs, log_probs, atol=3e-6)
            np.testing.assert_allclose(rows.tail_logmass, tail, atol=1e-6)


def test_tails_that_no_subtraction_would_find(tmp_path):
    logits = np.zeros((5, 2000), np.float32)
    logits[0, :3] = 40  # 1 - head is 0 in float64
    logits[1, :3], logits[1, 3:] = 0, -400  # exponentials relative to the head are 0 in float32
    logits[2, 5] = 3e38  # and here everywhere
    logits[3, 7:] = -np.inf  # seven classes, three of which are the head
    logits[4, 3:] = -np.inf  # no tail at all
    with write(tmp_path / "t.h5", [np.arange(5)], [logits], vocab_size=2000, k=3, value_dtype="float32") as store:
        for temperature in TEMPERATURES:
            rows = store.read(range(5), temperature)
            classes, _, tail = textbook(logits, 3, temperature)
            np.testing.assert_array_equal(rows.indices[:2], classes[:2])
            np.testing.assert_allclose(rows.tail_logmass[[0, 1, 3, 4]], tail[[0, 1, 3, 4]], rtol=1e-6)
            assert rows.tail_logmass[2] < -1e37 and rows.tail_logmass[4] == -np.inf
        store.verify()


def test_rows_with_fewer_classes_than_k(tmp_path):
    logits = np.full((2, 50), -np.inf, np.float32)
    logits[0, [4, 9]] = 1, 2
    logits[1] = np.arange(50)
    with write(tmp_path / "t.h5", [[1, 2]], [logits], vocab_size=50, k=50) as store:
        rows = store.sequence([1, 2], 2.0)
        assert rows.n_valid.tolist() == [2, 50]
        assert rows.indices[0].tolist() == [9, 4] + [0] * 48
        assert np.isneginf(rows.log_probs[0, 2:]).all() and np.isneginf(rows.tail_logmass).all()
        np.testing.assert_allclose(np.exp(rows.log_probs[0, :2]).sum(), 1, atol=1e-6)
        store.verify()


@given(data=st.data())
def test_any_rows_come_back(tmp_path_factory, data):
    vocab = data.draw(st.integers(1, 200), "vocab")
    k = data.draw(st.integers(1, vocab), "k")
    rows = data.draw(st.integers(1, 9), "rows")
    scale = data.draw(st.sampled_from([0.0, 0.1, 3.0, 1e4]), "scale")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    logits = (rng.normal(size=(rows, vocab)) * scale).astype(data.draw(st.sampled_from([np.float32, np.float64])))
    if data.draw(st.booleans(), "holes"):
        logits[rng.random(logits.shape) < 0.5] = -np.inf
        logits[:, rng.integers(vocab)] = 0.5
    event(f"k = V: {k == vocab}")
    path = tmp_path_factory.mktemp("any") / "t.h5"
    blocks = data.draw(st.integers(1, 4), "block_rows")
    options = {"vocab_size": vocab, "k": k, "value_dtype": "float32", "block_rows": blocks}
    with write(path, [np.arange(rows)], [logits], **options) as store:
        store.verify()
        for temperature in TEMPERATURES:
            found = store.sequence(np.arange(rows), temperature)
            classes, log_probs, tail = textbook(logits, k, temperature)
            np.testing.assert_allclose(found.tail_logmass, tail, rtol=2e-6, atol=2e-6)
            for i in range(rows):
                n = found.n_valid[i]
                assert n == min(k, np.isfinite(logits[i]).sum())
                np.testing.assert_array_equal(found.indices[i, :n], classes[i, :n])
                np.testing.assert_allclose(found.log_probs[i, :n], log_probs[i, :n], rtol=2e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_dense_rows(tmp_path, teacher, dtype):
    sequences, logits = teacher
    logits = [rows.astype(dtype) for rows in logits]
    for value_dtype, bound in (("float16", 2.0**-11), ("bfloat16", 2.0**-8), ("float32", 1e-6)):
        path = tmp_path / f"{value_dtype}.h5"
        with write(path, sequences, logits, vocab_size=300, kind="dense", value_dtype=value_dtype) as store:
            store.verify()
            for ids, rows in zip(sequences, logits, strict=True):
                found = store.sequence(ids, 2.0)
                assert found.dtype == np.float32 and found.shape == rows.shape
                expected = rows.astype(np.float64)
                expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
                np.testing.assert_allclose(found, expected, rtol=bound, atol=1e-6)
                np.testing.assert_array_equal(found, store.sequence(ids))  # logits, whatever they are divided by


@pytest.mark.parametrize("softcap", [0.0, 4.0])
def test_hidden_rows(tmp_path, softcap):
    rng = np.random.default_rng(3)
    head, states = rng.normal(size=(9000, 16)), rng.normal(size=(4, 16)).astype(np.float32)
    path = tmp_path / "h.h5"
    options = {"kind": "hidden", "head": head, "logit_scale": 0.5, "logit_softcap": softcap, "value_dtype": "float32"}
    write(path, [[1, 2, 3, 4]], [states], vocab_size=9000, **options).close()
    with kdcore.LogitStore(path, head=head) as store:
        store.verify()
        expected = 0.5 * states @ head.T
        expected = softcap * np.tanh(expected / softcap) if softcap else expected
        np.testing.assert_allclose(store.sequence([1, 2, 3, 4]), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ProvenanceError, match=r"fingerprint [0-9a-f]{64}.* is [0-9a-f]{64}"):
        kdcore.LogitStore(path, head=head * 2)
    with kdcore.LogitStore(path) as store, pytest.raises(DomainError, match="give head="):
        store.read(0)


def test_logits_of_hidden_states_are_finite(tmp_path):
    head = np.ones((5, 2), np.float32)
    write(
        tmp_path / "h.h5", [[1, 2]], [np.array([[1.0, 1.0], [8.0, 8.0]])], vocab_size=5, kind="hidden", head=head * 1e38
    )
    with kdcore.LogitStore(tmp_path / "h.h5", head=head * 1e38) as store:
        assert np.isfinite(store.read(0)).all()
        with pytest.raises(NonFiniteError, match=r"h.h5: the logit of class 0 from hidden states \[1\] .* is inf"):
            store.read([0, 1])


# --- samples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_k", [0, 3])
def test_samples_are_unbiased(tmp_path, head_k):
    """The mean over many sequences with the same row is its softmax, as far as so many draws can tell."""
    rng = np.random.default_rng(4)
    row = (rng.normal(size=40) * 1.5).astype(np.float32)
    repeats, draws = 6000, 5
    options = {"kind": "sampled", "head_k": head_k, "draws": draws, "seed": 7, "value_dtype": "float32"}
    with write(
        tmp_path / "s.h5", [np.arange(repeats)], [np.tile(row, (repeats, 1))], vocab_size=40, **options
    ) as store:
        store.verify()
        for temperature in TEMPERATURES:
            rows = store.read(slice(None), temperature)
            assert isinstance(rows, SampledRows) and rows.temperature == temperature
            p = np.exp(row.astype(np.float64) / temperature)
            p /= p.sum()
            total = np.zeros(40)
            weights = np.exp(rows.log_weights.astype(np.float64))
            np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
            np.add.at(total, rows.indices, weights)
            mean = total / repeats
            exact = np.argsort(-p)[:head_k]
            np.testing.assert_allclose(mean[exact], p[exact], rtol=1e-5)
            mass = 1 - p[exact].sum()
            spread = np.sqrt(np.maximum(p * (mass - p), 0) / (draws * repeats))
            spread[exact] = 1
            assert (np.abs(mean - p) < 5 * spread).all()
            assert np.abs(mean - p).max() > 0


def test_samples_depend_on_seed_and_sequence_alone(tmp_path, teacher):
    sequences, logits = teacher
    options = {"vocab_size": 300, "kind": "sampled", "head_k": 2, "draws": 9}
    found = []
    for name, seed, order in (("a", 1, slice(None)), ("b", 1, slice(None, None, -1)), ("c", 2, slice(None))):
        with write(tmp_path / f"{name}.h5", sequences[order], logits[order], seed=seed, **options) as store:
            found.append(store.sequence(sequences[3]))
    np.testing.assert_array_equal(found[0].indices, found[1].indices)
    np.testing.assert_array_equal(found[0].log_weights, found[1].log_weights)
    assert (found[0].indices != found[2].indices).any()
    assert (found[0].indices[0] != found[0].indices[1]).any()


def test_more_draws_than_classes(tmp_path):
    logits = np.array([[0.0, 1.0, 2.0, -np.inf, -1.0]], np.float32)
    options = {"vocab_size": 5, "kind": "sampled", "head_k": 2, "draws": 20, "value_dtype": "float32"}
    with write(tmp_path / "s.h5", [[1]], [logits], **options) as store:
        store.verify()
        rows = store.read(0, 2.0)
        assert rows.k == 5 and rows.indices[0, :2].tolist() == [2, 1]
        np.testing.assert_allclose(np.exp(rows.log_weights).sum(axis=1), 1, atol=1e-6)


# --- finding rows ----------------------------------------------------------------------------------------------------


def test_rows_by_number_and_by_content(tmp_path, teacher):
    sequences, logits = teacher
    with write(tmp_path / "t.h5", sequences, logits, vocab_size=300, k=4, block_rows=8) as store:
        everything = store.read(slice(None))
        starts = np.cumsum([0, *map(len, sequences)])
        for i, ids in enumerate(sequences):
            assert store.rows_of(ids) == range(starts[i], starts[i + 1])
            np.testing.assert_array_equal(store.input_ids(i), ids)
            np.testing.assert_array_equal(store.sequence(ids).log_probs, everything.log_probs[store.rows_of(ids)])
        numbers = np.array([57, 0, 13, 13, 2])
        for rows in (numbers, numbers.tolist(), tuple(numbers), numbers.astype(np.uint64)):
            np.testing.assert_array_equal(store.read(rows, 2.0).indices, everything.indices[numbers])
        assert store.read(3).indices.shape == (1, 4)
        assert store.read([]).indices.shape == (0, 4) and store.read(slice(5, 5)).log_probs.shape == (0, 4)
        np.testing.assert_array_equal(store.read(slice(9, 2, -3)).indices, everything.indices[9:2:-3])
        store.read(store.rows_of(sequences[2]), input_ids=sequences[2])


def test_rows_that_are_not_there(tmp_path, teacher):
    sequences, logits = teacher
    with write(tmp_path / "t.h5", sequences, logits, vocab_size=300, k=4) as store:
        for rows in (-1, 58, [0, 58], range(57, 60), np.array([2**63], np.uint64)):
            with pytest.raises((MissingRowError, DomainError), match="none with the number|below 2"):
                store.read(rows)
        with pytest.raises(DTypeError, match="booleans"):
            store.read(np.ones(58, bool))
        with pytest.raises(DTypeError, match="integers"):
            store.read([0.5])
        with pytest.raises(ShapeError, match=r"\(1, 1\)"):
            store.read([[1]])
        with pytest.raises(MissingRowError, match="no sequence of the tokens"):
            store.sequence(sequences[0][:-1])
        with pytest.raises(MissingRowError, match="5 sequences"):
            store.input_ids(5)
        shifted = np.roll(sequences[3], 1)
        with pytest.raises(MisalignedRowsError, match=r"behind the token \d+, but input_ids\[0\] is \d+"):
            store.read(store.rows_of(sequences[3]), input_ids=shifted)
        with pytest.raises(ShapeError, match="one token for each of 33 rows, got 32"):
            store.read(store.rows_of(sequences[3]), input_ids=sequences[3][1:])
        with pytest.raises(DTypeError, match="input_ids must be integers"):
            store.read(store.rows_of(sequences[3]), input_ids=sequences[3].astype(float))
        for flags in ({"renormalize": "no"}, {"renormalize": 1}):
            with pytest.raises(DTypeError, match="renormalize must be True or False"):
                store.sequence(sequences[3], **flags)
        with pytest.raises(DTypeError, match="recover must be True or False"):
            kdcore.LogitStore(store.path, recover="no")


def test_temperatures_that_are_not_there(tmp_path, teacher):
    sequences, logits = teacher
    with write(tmp_path / "t.h5", sequences, logits, vocab_size=300, k=4) as store:
        with pytest.raises(DomainError, match=r"3.0 is not stored; stored are 1.0, 0.5, 2.0; renormalize"):
            store.sequence(sequences[0], 3.0)
        with pytest.raises(DomainError, match="3.0 is not stored"):
            store.shuffled(0, temperature=3.0)
        with pytest.raises(DomainError, match="positive"):
            store.read(0, 0.0)
        rows = store.sequence(sequences[0], 3.0, renormalize=True)
        np.testing.assert_allclose(np.exp(rows.log_probs.astype(np.float64)).sum(axis=1), 1, atol=1e-6)
        assert np.isneginf(rows.tail_logmass).all() and rows.temperature == 3.0
    options = {"vocab_size": 300, "kind": "sampled", "draws": 3, "temperatures": (2.0,)}
    with write(tmp_path / "s.h5", sequences, logits, **options) as store:
        assert store.temperatures == (1.0, 2.0)
        with pytest.raises(DomainError, match="kind 'topk'"):
            store.read(0, renormalize=True)


def test_expectations_of_the_reader(tmp_path, teacher):
    sequences, logits = teacher
    path, digest = tmp_path / "t.h5", "ab" * 32
    write(path, sequences, logits, vocab_size=300, k=4, tokenizer_sha256=digest, teacher="résumé").close()
    with kdcore.LogitStore(path, vocab_size=300, tokenizer_sha256=digest, corpus_sha256="") as store:
        assert store.header.teacher == "résumé"
    with pytest.raises(VocabularyMismatchError, match="300 classes, but 299"):
        kdcore.LogitStore(path, vocab_size=299)
    with pytest.raises(ProvenanceError, match=f"tokenizer_sha256 is '{digest}', but '{'cd' * 32}'"):
        kdcore.LogitStore(path, tokenizer_sha256="cd" * 32)
    with pytest.raises(DomainError, match="kind 'hidden'"):
        kdcore.LogitStore(path, head=np.ones((300, 2)))


def test_shuffled_sequences(tmp_path, teacher):
    sequences, logits = teacher
    with write(tmp_path / "t.h5", sequences, logits, vocab_size=300, k=4) as store:
        for prefetch in (0, 1, 8):
            items = list(store.shuffled(5, temperature=2.0, prefetch=prefetch))
            assert sorted(len(item.input_ids) for item in items) == [1, 5, 7, 12, 33]
            for ids, rows in items:
                np.testing.assert_array_equal(rows.log_probs, store.sequence(ids, 2.0).log_probs)
            orders = [[tuple(item.input_ids) for item in store.shuffled(seed)] for seed in (5, 5, 6, 7, 8)]
            assert orders[0] == orders[1] == [tuple(item.input_ids) for item in items]
            assert any(order != orders[0] for order in orders[2:])
        parts = [[tuple(x.input_ids) for x in store.shuffled(5, part=i, parts=2)] for i in range(2)]
        assert [len(part) for part in parts] == [3, 2] and sorted(parts[0] + parts[1]) == sorted(orders[0])
        with pytest.raises(DomainError, match="below parts = 2"):
            store.shuffled(5, part=2, parts=2)
        before = threading.active_count()
        for _ in store.shuffled(1, prefetch=1):
            break  # the thread ends with the generator
        assert threading.active_count() == before


def test_errors_of_the_thread_that_reads_ahead(tmp_path, teacher):
    sequences, logits = teacher
    store = write(tmp_path / "t.h5", sequences, logits, vocab_size=300, k=4)
    ahead = store.shuffled(0)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        list(ahead)


# --- sharing ---------------------------------------------------------------------------------------------------------


def test_threads_and_pickles(tmp_path, teacher):
    sequences, logits = teacher
    path = tmp_path / "t.h5"
    store = write(path, sequences, logits, vocab_size=300, k=4, block_rows=2)
    expected = [store.sequence(ids).log_probs for ids in sequences]
    with kdcore.LogitStore(path) as shared, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: shared.sequence(sequences[i % 5]).log_probs, range(200)))
    assert all(np.array_equal(found[i], expected[i % 5]) for i in range(200))
    again = pickle.loads(pickle.dumps(store))
    np.testing.assert_array_equal(again.sequence(sequences[1]).log_probs, expected[1])
    data = pickle.dumps(store)
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.read(0)
    path.unlink()
    write(path, sequences, logits, vocab_size=300, k=4).close()
    with pytest.raises(ProvenanceError, match="pickled was"):
        pickle.loads(data)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(kdcore.LogitStoreWriter(tmp_path / "w.h5", vocab_size=5, capacity=3))


@pytest.mark.parametrize("archive", [False, True])
def test_forked_readers(tmp_path, archive):
    output = in_a_process(
        f"""
        import os
        import numpy as np, kdcore
        from kdcore.store.convert import repack
        rng = np.random.default_rng(0)
        logits = rng.normal(size=(600, 90)).astype(np.float32)
        with kdcore.LogitStoreWriter("t.h5", vocab_size=90, k=8, capacity=600, block_rows=16) as writer:
            for i in range(0, 600, 20):
                writer.append(np.arange(i, i + 20), logits[i : i + 20])
        path = repack("t.h5", "a.h5") if {archive} else "t.h5"
        store = kdcore.LogitStore(path)
        expected = store.read(slice(None)).log_probs
        children = []
        for child in range(4):
            pid = os.fork()
            if pid == 0:
                order = np.random.default_rng(child).permutation(30)
                rows = [(np.arange(20 * i, 20 * i + 20), expected[20 * i : 20 * i + 20]) for i in order]
                good = all(np.array_equal(store.sequence(ids).log_probs, log_probs) for ids, log_probs in rows)
                os._exit(0 if good else 1)
            children.append(pid)
        print([os.waitpid(pid, 0)[1] for pid in children])
        """,
        tmp_path,
    )
    assert output.strip() == "[0, 0, 0, 0]"


# --- writing ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_appended(tmp_path):
    good = np.zeros((2, 9), np.float32)
    with kdcore.LogitStoreWriter(tmp_path / "t.h5", vocab_size=9, k=3, capacity=5) as writer:
        writer.append([1, 2], good)
        for value, words in ((np.nan, "nan"), (np.inf, r"\+inf")):
            bad = good.copy()
            bad[1, 4] = value
            with pytest.raises(NonFiniteError, match=rf"logits\[1, 4\] is {words}"):
                writer.append([3, 4], bad)
        bad = good.copy()
        bad[0] = -np.inf
        with pytest.raises(NonFiniteError, match=r"logits\[0\] is -inf in every class"):
            writer.append([3, 4], bad)
        with pytest.raises(RepeatedSequenceError, match=r"\[1, 2\] .* is there already"):
            writer.append([1, 2], good)
        with pytest.raises(CapacityError, match="2 of 5 rows, and no room for 4"):
            writer.append([3, 4, 5, 6], np.zeros((4, 9), np.float32))
        with pytest.raises(VocabularyMismatchError, match="8 columns in a store of 9"):
            writer.append([3, 4], good[:, :8])
        for ids, rows in (([3], good), ([3, 4], good[0]), ([3, 4], good[None])):
            with pytest.raises(ShapeError, match=rf"the shape \[{len(ids)}, 9\] of {len(ids)} input_ids"):
                writer.append(ids, rows)
        with pytest.raises(ShapeError, match="at least one token"):
            writer.append([], np.zeros((0, 9), np.float32))
        for ids in ([-1, 2], [2**32, 1]):
            with pytest.raises(DomainError, match="outside"):
                writer.append(ids, good)
        with pytest.raises(DTypeError, match="integers"):
            writer.append([0.5, 1.5], good)
        for rows in (good.astype(int), good.astype(complex)):
            with pytest.raises(DTypeError, match="float32"):
                writer.append([3, 4], rows)
        big = np.zeros((2, 9), np.float32)
        big[0, 0] = 1e6
        with pytest.raises(DomainError, match=r"logits\[0\] has the value -1000000.*float16 cannot hold"):
            writer.append([3, 4], big)
        assert writer.rows == 2 and [3, 4] not in writer and [1, 2] in writer
        writer.append([3, 4], np.asfortranarray(good))
        writer.append([5], good[::2][:1])
    with pytest.raises(ClosedShardError):
        writer.append([9], good[:1])
    with kdcore.LogitStore(tmp_path / "t.h5") as store:
        assert (len(store), store.sequences) == (5, 3)
        store.verify()


def test_device_arrays_without_pytorch(tmp_path, monkeypatch):
    class OnDevice:
        @property
        def __cuda_array_interface__(self):
            return {"shape": (1, 9), "typestr": "<f4", "data": (0, True), "version": 3}

    monkeypatch.setitem(sys.modules, "torch", None)
    with kdcore.LogitStoreWriter(tmp_path / "t.h5", vocab_size=9, k=3, capacity=5) as writer:
        with pytest.raises(DeviceUnavailableError, match=r"kdcore\[torch\].*or copy them to the host"):
            writer.append([1], OnDevice())
        writer.append([1], np.zeros((1, 9), np.float32))
    writer = kdcore.LogitStoreWriter(tmp_path / "s.h5", vocab_size=9, kind="sampled", draws=3, capacity=5)
    with writer, pytest.raises(DeviceMismatchError, match="draws from logits on the host"):
        writer.append([1], OnDevice())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"kind": "best"}, DomainError, "kind must be one of"),
        ({"k": 0}, DomainError, "k must be"),
        ({"k": 10}, DomainError, "at most 9 of 9 classes, got 10"),
        ({"vocab_size": 0}, DomainError, "vocab_size"),
        ({"capacity": 0}, DomainError, "capacity"),
        ({"block_rows": 0}, DomainError, "block_rows"),
        ({"temperatures": (0.0,)}, DomainError, "temperatures"),
        ({"temperatures": (2.0, 2.0)}, DomainError, "distinct"),
        ({"temperatures": 2.0}, DTypeError, "sequence"),
        ({"value_dtype": "float64"}, DomainError, "value_dtype"),
        ({"draws": 4}, DomainError, "draws is for kind='sampled'"),
        ({"head": np.ones((9, 2))}, DomainError, "head is for kind='hidden'"),
        ({"kind": "dense", "k": 3}, DomainError, "k is for kind='topk'"),
        ({"kind": "dense", "temperatures": (1.0, 3.0)}, DomainError, "no use with kind='dense'"),
        ({"tail_source": "derived", "temperatures": (4.0,)}, DomainError, "no use with derived tails"),
        ({"threads": 0}, DomainError, "threads"),
        ({"kind": "sampled"}, DomainError, "needs draws"),
        ({"kind": "hidden"}, DomainError, "needs head"),
        ({"kind": "hidden", "head": np.ones((8, 2))}, ShapeError, r"\[9, d\]"),
        ({"kind": "hidden", "head": np.ones((9, 2), int)}, DTypeError, "floats"),
        ({"kind": "hidden", "head": np.full((9, 2), np.nan)}, NonFiniteError, r"head\[0, 0\] is nan"),
        ({"kind": "hidden", "head": np.full((9, 2), 1e300)}, NonFiniteError, r"head\[0, 0\] is 1e\+300"),
        ({"kind": "hidden", "head": np.ones((9, 2)), "logit_scale": 1e300}, DomainError, "logit_scale"),
        ({"kind": "hidden", "head": np.ones((9, 2)), "logit_softcap": 1e-60}, DomainError, "logit_softcap"),
        ({"kind": "sampled", "draws": 1, "head_k": 10}, DomainError, "head_k must be at most 9"),
        ({"tokenizer_sha256": "abc"}, DomainError, "64 lower-case"),
        ({"teacher": 3}, DTypeError, "teacher must be a string"),
        ({"teacher": "\ud800"}, DomainError, "teacher must be text"),
        ({"shard_index": -1}, DomainError, "shard_index"),
        ({"capacity": 2.5}, DTypeError, "capacity"),
        ({"capacity": 2**62}, DiskFullError, "no room on disk for the 4611686018427387904 rows"),
    ],
)
def test_arguments_of_the_writer(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        kdcore.LogitStoreWriter(tmp_path / "t.h5", **{"vocab_size": 9, "capacity": 5} | options)
    assert list(tmp_path.iterdir()) == []


def test_finite_logits_whose_log_probability_is_not(tmp_path):
    logits = np.array([[3e38, -3e38, 0]], np.float32)
    writer = kdcore.LogitStoreWriter(tmp_path / "t.h5", vocab_size=3, k=3, capacity=3, value_dtype="float32")
    with writer, pytest.raises(DomainError, match=r"logits\[0, 1\] is so far below"):
        writer.append([1], logits)
    with write(tmp_path / "u.h5", [[1]], [logits], vocab_size=3, k=2, value_dtype="float32") as store:
        assert store.read(0).log_probs.tolist() == [[0.0, np.float32(-3e38)]]
        store.verify()


def test_paths_of_the_writer(tmp_path):
    path = tmp_path / "t.h5"
    with pytest.raises(DomainError, match="without '.part'"):
        kdcore.LogitStoreWriter(tmp_path / "t.h5.part", vocab_size=9, capacity=5)
    with pytest.raises(FileNotFoundError, match="not a directory"):
        kdcore.LogitStoreWriter(tmp_path / "no" / "t.h5", vocab_size=9, capacity=5)
    kdcore.LogitStoreWriter(path, vocab_size=9, capacity=5).abandon()
    with pytest.raises(ShardExistsError, match="LogitStoreWriter.resume"):
        kdcore.LogitStoreWriter(path, vocab_size=9, capacity=5)
    kdcore.LogitStoreWriter.resume(path).close()
    with pytest.raises(ShardExistsError, match="a finished shard"):
        kdcore.LogitStoreWriter(path, vocab_size=9, capacity=5)
    with kdcore.LogitStore(path) as store:  # nothing was written, and that is a store too
        assert (len(store), store.sequences, list(store.shuffled(0))) == (0, 0, [])
        store.verify()


def test_rows_selected_elsewhere(tmp_path):
    logits = np.random.default_rng(5).normal(size=(3, 30)).astype(np.float32)
    classes, log_probs, tail = textbook(logits, 4, 1.0)
    tails = np.stack([tail, textbook(logits, 4, 2.0)[2]], axis=1).astype(np.float32)
    rows = TopKRows(classes.astype(np.int32), log_probs.astype(np.float32), tails[:, 0], np.full(3, 4, np.int32), 30)
    options = {"vocab_size": 30, "k": 4, "capacity": 9}
    with kdcore.LogitStoreWriter(tmp_path / "t.h5", **options) as writer:
        writer.append_rows([1, 2, 3], rows, tails)
        with pytest.raises(DomainError, match="entry 1 is .* rule out"):
            writer.append_rows([7, 8, 9], rows, tails[:, [0, 0]] - [0, 3])
        with pytest.raises(DomainError, match="already"):
            writer.append_rows(
                [7, 8, 9], TopKRows(rows.indices * 0, rows.log_probs, tails[:, 0], rows.n_valid, 30), tails
            )
        with pytest.raises(ShapeError, match="tails"):
            writer.append_rows([7, 8, 9], rows)
    other = write(tmp_path / "u.h5", [[1, 2, 3]], [logits], vocab_size=30, k=4, temperatures=(2.0,))
    with kdcore.LogitStore(tmp_path / "t.h5") as store, other:
        for temperature in (1.0, 2.0):
            a, b = store.sequence([1, 2, 3], temperature), other.sequence([1, 2, 3], temperature)
            np.testing.assert_array_equal(a.indices, b.indices)
            np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
            np.testing.assert_allclose(a.tail_logmass, b.tail_logmass, atol=1e-5)
    with kdcore.LogitStoreWriter(tmp_path / "d.h5", tail_source="derived", **options) as writer:
        assert writer.temperatures == (1.0,)
        with pytest.raises(DomainError, match="append_rows alone"):
            writer.append([1, 2, 3], logits)


@pytest.mark.parametrize("vocab", [50, 65_536, 65_538])
@pytest.mark.parametrize("wrong", [-1, 50, 2**16 + 3, 2**17 + 3, 2**32 + 3])
def test_classes_that_are_none_are_not_cut_to_some(tmp_path, vocab, wrong):
    rows = TopKRows.from_logits(np.random.default_rng(5).normal(size=(3, vocab)), 4)
    indices = rows.indices.astype(np.int64)
    indices[1, 2] = vocab if wrong == 50 else wrong
    bad = TopKRows(indices, rows.log_probs, rows.tail_logmass, rows.n_valid, vocab)
    with (
        kdcore.LogitStoreWriter(tmp_path / "t.h5", vocab_size=vocab, k=4, capacity=9, temperatures=()) as writer,
        pytest.raises(DomainError, match=rf"rows.indices\[1, 2\] is {indices[1, 2]}, not a class in \[0, {vocab}\)"),
    ):
        writer.append_rows([1, 2, 3], bad)


@pytest.mark.parametrize("count", [-1, 0, 5, 2**16 + 4])
def test_counts_that_are_none_are_not_cut_to_some(tmp_path, count):
    rows = TopKRows.from_logits(np.random.default_rng(5).normal(size=(3, 50)), 4)
    counts = np.array([4, 4, count])
    bad = TopKRows(rows.indices, rows.log_probs, rows.tail_logmass, counts, 50)
    with (
        kdcore.LogitStoreWriter(tmp_path / "t.h5", vocab_size=50, k=4, capacity=9, temperatures=()) as writer,
        pytest.raises(DomainError, match=rf"rows.n_valid\[2\] is {count}, not a number of entries from 1 to 4"),
    ):
        writer.append_rows([1, 2, 3], bad)


@pytest.mark.parametrize("value_dtype", HALF_UNIT)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_rows_in_every_dtype(tmp_path, value_dtype, dtype):
    rows = TopKRows.from_logits(np.random.default_rng(5).normal(size=(3, 50)), 4)
    given = TopKRows(rows.indices, rows.log_probs.astype(dtype), rows.tail_logmass.astype(dtype), rows.n_valid, 50)
    options = {"vocab_size": 50, "k": 4, "capacity": 3, "temperatures": (), "value_dtype": value_dtype}
    with kdcore.LogitStoreWriter(tmp_path / "t.h5", **options) as writer:
        if (value_dtype, dtype) == ("float32", ml_dtypes.bfloat16):
            with pytest.raises(DomainError, match="do not add up to 1"):  # more than float32 may miss it by
                writer.append_rows([1, 2, 3], given)
            return
        writer.append_rows([1, 2, 3], given)
    with kdcore.LogitStore(tmp_path / "t.h5") as store:
        store.verify()
        found = store.read(slice(None))
        np.testing.assert_array_equal(found.indices, rows.indices)
        unit = {np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7}.get(dtype, 0) + 2 * HALF_UNIT[value_dtype]
        np.testing.assert_allclose(found.log_probs, rows.log_probs, rtol=unit)


def test_bytes_of_a_row(tmp_path):
    """At most 300 bytes with 64 classes and two temperatures, whatever the vocabulary."""
    for vocab in (32_000, 65_536, 65_537, 128_000, 131_072):
        path = tmp_path / f"{vocab}.h5"
        kdcore.LogitStoreWriter(path, vocab_size=vocab, capacity=50_000).close()
        assert path.stat().st_size / 50_000 < 300


@settings(max_examples=30)
@given(
    bits=st.sampled_from([1, 7, 8, 17, 25, 26, 31]),
    k=st.integers(1, 80),
    rows=st.integers(0, 5),
    seed=st.integers(0, 2**32),
)
def test_packed_ids(bits, k, rows, seed):
    ids = np.random.default_rng(seed).integers(0, 1 << bits, (rows, k)).astype(np.int32)
    packed = pack_ids(ids, bits)
    assert packed.shape == (rows, (k * bits + 7) // 8)
    for row, data in zip(ids, packed, strict=True):  # the lowest bit of the first id is the lowest of the first byte
        assert int.from_bytes(data.tobytes(), "little") == sum(int(v) << (j * bits) for j, v in enumerate(row))
    np.testing.assert_array_equal(unpack_ids(packed, k, bits), ids)


def test_threads_do_not_change_a_bit(tmp_path):
    logits = np.random.default_rng(6).normal(size=(64, 9000)).astype(np.float32)
    found = []
    for threads in (1, 3):
        with write(
            tmp_path / f"{threads}.h5", [np.arange(64)], [logits], vocab_size=9000, k=5, threads=threads
        ) as store:
            found.append([store.read(slice(None), t) for t in TEMPERATURES])
    for a, b in zip(*found, strict=True):
        for name in ("indices", "log_probs", "tail_logmass"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


def test_a_key_that_two_sequences_share(tmp_path, teacher, monkeypatch):
    sequences, logits = teacher
    with write(tmp_path / "t.h5", sequences, logits, vocab_size=300, k=4) as store:
        key = kdcore.store.reader.content_key(sequences[0])
        monkeypatch.setattr("kdcore.store.reader.content_key", lambda ids: key)
        with pytest.raises(FileFormatError, match="the keys collide"):
            store.sequence(sequences[1])


def test_bfloat16_is_rounded_to_nearest_even():
    values = np.random.default_rng(7).normal(size=5000).astype(np.float32) * 10
    values[:4] = np.array([0x3F808000, 0x3F818000, 0xBF808001, 0xFF800000], np.uint32).view(np.float32)  # ties, -inf
    expected = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(encode_values(values, "bfloat16", "x"), expected)
    with pytest.raises(DomainError, match=r"x\[0\] has the value -3.39.*bfloat16 cannot hold"):
        encode_values(np.array([-3.3999e38], np.float32), "bfloat16", "x")
