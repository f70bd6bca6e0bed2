"""Batch sources: which rows come when, which never come, and that a source can be put back where it was."""

from __future__ import annotations

import tracemalloc
from itertools import chain, pairwise

import numpy as np
import pytest
from hypothesis import given, strategies as st

from kdcore import (
    ArrayBatchSource,
    Batch,
    BatchSource,
    ConfigError,
    DomainError,
    DTypeError,
    EndOfDataError,
    FileFormatError,
    FixtureTeacher,
    LogitStudent,
    ShapeError,
    ShardBatchSource,
    SyntheticBatchSource,
    kd_step,
)


def write_shards(directory, *shards):
    directory.mkdir(exist_ok=True)
    for number, tokens in enumerate(shards):
        np.asarray(tokens, "<u4").tofile(directory / f"part-{number:03d}.bin")
    return directory


def take_pass(source, batch_size):
    """All batches of a pass of a source that does not wrap."""
    batches = []
    while True:
        try:
            batches.append(source.next_batch(batch_size))
        except EndOfDataError:
            return batches


def rows_of(batch):
    return [(tuple(ids), int(np.ravel(label)[-1])) for ids, label in zip(batch.input_ids, batch.labels, strict=True)]


def same(a, b):
    np.testing.assert_array_equal(a.input_ids, b.input_ids)
    np.testing.assert_array_equal(a.labels, b.labels)
    assert (a.teacher_ids is None) == (b.teacher_ids is None)
    if a.teacher_ids is not None:
        np.testing.assert_array_equal(a.teacher_ids, b.teacher_ids)


# --- batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [[1, 2], (1, 2), np.array([1, 2], np.int8), np.array([1, 2], np.uint64)])
def test_labels_of_a_batch_become_an_int64_array(labels):
    batch = Batch([[1], [2, 3]], labels)
    assert isinstance(batch.labels, np.ndarray)
    assert (batch.labels.dtype, batch.labels.tolist(), len(batch)) == (np.int64, [1, 2], 2)
    assert Batch([[1, 2]], [[3, -100]]).labels.shape == (1, 2)
    assert Batch([], []).labels.dtype == np.int64


@pytest.mark.parametrize(
    ("labels", "error", "sentence"),
    [
        ([0.5, 1.0], DTypeError, "labels must be integers, got dtype float64"),
        ([True, False], DTypeError, "labels must be integers, got dtype bool"),
        ("12", ShapeError, r"labels must have shape \[B\] or \[B, L\], got \(\)"),
        (None, ShapeError, r"labels must have shape \[B\] or \[B, L\], got \(\)"),
        (np.zeros((2, 1, 1), int), ShapeError, r"labels must have shape \[B\] or \[B, L\], got \(2, 1, 1\)"),
        ([[1, 2], [3]], ShapeError, "got rows of different lengths: pad them with ignore_index"),
        ([2**63], DomainError, r"labels must be below 2\*\*63, got 9223372036854775808"),
    ],
)
def test_labels_that_no_batch_can_have(labels, error, sentence):
    with pytest.raises(error, match=sentence):
        Batch([[1], [2]], labels)


# --- shards ---------------------------------------------------------------------------------------------------------


def test_f_distill_shard_batch_001(tmp_path):
    source = ShardBatchSource(write_shards(tmp_path / "s", np.arange(4096)), 16)
    batch = source.next_batch(4)
    assert batch.input_ids.shape == (4, 16)
    assert batch.labels.tolist() == [16, 33, 50, 67]
    assert batch.input_ids[1].tolist() == list(range(17, 33))
    assert len(source.held_out()) == 24  # a tenth of 4096 // 17 windows


def test_f_distill_shard_batch_002_wraps(tmp_path):
    source = ShardBatchSource(write_shards(tmp_path / "s", np.arange(128)), 16, wrap=True)
    batches = [source.next_batch(4) for _ in range(5)]
    assert [len(batch) for batch in batches] == [4] * 5
    # 7 windows, the last held out: 20 rows are three passes of six, and two
    starts = [int(ids[0]) for batch in batches for ids in batch.input_ids]
    assert starts == ([0, 17, 34, 51, 68, 85] * 4)[:20]


def test_next_token_pin(tmp_path):
    source = ShardBatchSource(write_shards(tmp_path / "s", range(10, 30)), 4, held_out=0.25)
    batch = source.next_batch(1)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13]]
    assert batch.labels.tolist() == [14]


def test_labels_per_position_are_the_next_tokens(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50, size=60)
    source = ShardBatchSource(write_shards(tmp_path / "s", tokens), 5, per_position=True)
    batch = source.next_batch(3)
    for row, (ids, labels) in enumerate(zip(batch.input_ids, batch.labels, strict=True)):
        assert ids.tolist() == tokens[6 * row : 6 * row + 5].tolist()
        assert labels.tolist() == tokens[6 * row + 1 : 6 * row + 6].tolist()


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    length=st.integers(1, 6),
    share=st.floats(0.05, 0.9),
    seed=st.none() | st.integers(0, 5),
    batch_size=st.integers(1, 9),
    wrap=st.booleans(),
)
def test_windows_stay_in_their_shard_and_held_out_rows_out_of_training(
    tmp_path_factory, lengths, length, share, seed, batch_size, wrap
):
    # Token = 1000 * shard + place, so that a window says where it is from.
    shards = [1000 * (number + 1) + np.arange(size) for number, size in enumerate(lengths)]
    directory = write_shards(tmp_path_factory.mktemp("shards"), *shards)
    windows = sum(size // (length + 1) for size in lengths)
    arguments = {"wrap": wrap, "seed": seed, "held_out": share}
    if windows == 0:
        with pytest.raises(ShapeError, match="no shard has the"):
            ShardBatchSource(directory, length, **arguments)
        return
    held = max(int(np.ceil(windows * share)), 1)
    if held >= windows:
        with pytest.raises(ConfigError, match="held_out="):
            ShardBatchSource(directory, length, **arguments)
        return
    source = ShardBatchSource(directory, length, **arguments)
    held_out = rows_of(source.held_out())
    count = source.batches_per_epoch(batch_size)
    assert count == -(-(windows - held) // batch_size)
    trained = [row for _ in range(count) for row in rows_of(source.next_batch(batch_size))]

    for ids, label in held_out + trained:
        assert all(b == a + 1 for a, b in pairwise((*ids, label)))  # consecutive tokens of one shard
        assert ids[0] % 1000 % (length + 1) == 0  # windows neither overlap nor skip
    assert len(held_out) == held
    assert not set(held_out) & set(trained)
    assert len(set(trained)) == windows - held  # a pass gives every training row ...
    if not wrap:
        assert len(trained) == windows - held  # ... once
    assert max(trained) < min(held_out)  # the last windows are held out, whatever the order of training


@pytest.mark.parametrize("seed", [None, 7])
def test_the_next_pass_is_reshuffled_but_holds_the_same_rows(tmp_path, seed):
    directory = write_shards(tmp_path / "s", np.arange(400))
    source = ShardBatchSource(directory, 4, seed=seed)
    first = [rows_of(batch) for batch in take_pass(source, 8)]
    with pytest.raises(EndOfDataError, match=r"all 72 rows of the pass have been given: reset\(\) begins the next"):
        source.next_batch(8)
    source.reset()
    second = [rows_of(batch) for batch in take_pass(source, 8)]
    assert len(first) == len(second) == source.batches_per_epoch(8) == 9
    assert sorted(chain.from_iterable(first)) == sorted(chain.from_iterable(second))
    assert (first == second) == (seed is None)
    again = ShardBatchSource(directory, 4, seed=seed)
    assert [rows_of(batch) for batch in take_pass(again, 8)] == first


@pytest.mark.parametrize("per_position", [False, True])
def test_teacher_rows_number_the_tokens_of_all_shards(tmp_path, per_position):
    rng = np.random.default_rng(1)
    shards = [rng.integers(0, 10**6, size=size) for size in (23, 3, 41)]  # with leftovers, and one without a window
    everything = np.concatenate(shards)
    source = ShardBatchSource(
        write_shards(tmp_path / "s", *shards), 4, per_position=per_position, teacher_rows=True, seed=3
    )
    for batch in [*take_pass(source, 3), source.held_out()]:
        rows = batch.for_teacher
        assert rows.shape == (len(batch), 4 if per_position else 1)
        np.testing.assert_array_equal(everything[rows], batch.input_ids if per_position else batch.input_ids[:, -1:])
        np.testing.assert_array_equal(everything[rows + 1].squeeze(), batch.labels.squeeze())


def test_without_teacher_rows_the_teacher_gets_the_tokens(tmp_path):
    batch = ShardBatchSource(write_shards(tmp_path / "s", range(40)), 3).next_batch(2)
    assert batch.teacher_ids is None
    assert batch.for_teacher is batch.input_ids


def test_tokens_outside_the_vocabulary_are_named(tmp_path):
    tokens = np.arange(40) % 10
    tokens[13] = 10
    directory = write_shards(tmp_path / "s", np.zeros(20), tokens)
    source = ShardBatchSource(directory, 4, vocab_size=10)
    with pytest.raises(DomainError, match=r"part-001\.bin: token 13 is 10, outside the vocabulary \[0, 10\)"):
        take_pass(source, 4)
    assert len(take_pass(ShardBatchSource(directory, 4, vocab_size=11), 4)) == 3


def test_the_label_of_a_window_is_checked_too(tmp_path):
    tokens = np.zeros(40, int)
    tokens[4] = 99
    source = ShardBatchSource(write_shards(tmp_path / "s", tokens), 4, vocab_size=10)
    with pytest.raises(DomainError, match="token 4 is 99"):
        source.next_batch(1)


def test_uint32_is_not_read_as_signed(tmp_path):
    tokens = np.full(20, 2**32 - 1)
    batch = ShardBatchSource(write_shards(tmp_path / "s", tokens), 3).next_batch(1)
    assert batch.input_ids.dtype == np.int64
    assert batch.labels.tolist() == [2**32 - 1]


def test_bytes_are_little_endian(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x01\x02\x00\x00" * 20)
    assert ShardBatchSource(tmp_path, 3).next_batch(1).labels.tolist() == [0x0201]


@pytest.mark.parametrize("size", [1, 3, 81])
def test_a_file_of_odd_size(tmp_path, size):
    write_shards(tmp_path, np.arange(40))
    (tmp_path / "zz.bin").write_bytes(b"\0" * size)
    with pytest.raises(FileFormatError, match=rf"zz\.bin: {size} bytes are not a whole number of uint32 tokens"):
        ShardBatchSource(tmp_path, 4)


def test_directories_that_hold_no_windows(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no token shards \(\*\.bin\)"):
        ShardBatchSource(tmp_path, 4)
    with pytest.raises(FileNotFoundError, match="none is not a directory of token shards"):
        ShardBatchSource(tmp_path / "none", 4)
    write_shards(tmp_path, [], np.arange(4))  # an empty file, and one a token short of a window
    with pytest.raises(ShapeError, match="no shard has the 5 tokens of a window"):
        ShardBatchSource(tmp_path, 4)


def test_an_empty_shard_among_others_is_no_error(tmp_path):
    source = ShardBatchSource(write_shards(tmp_path, [], np.arange(20), []), 4)
    assert source.next_batch(2).labels.tolist() == [4, 9]


def test_other_files_are_left_alone_and_shards_come_by_name(tmp_path):
    for name, first in (("b.bin", 100), ("a.bin", 0), ("c.txt", 500)):
        np.arange(first, first + 10, dtype="<u4").tofile(tmp_path / name)
    source = ShardBatchSource(tmp_path, 4, held_out=0.25)
    assert [batch.labels.tolist() for batch in take_pass(source, 2)] == [[4, 9], [104]]
    assert source.held_out().labels.tolist() == [109]


def test_big_shards_are_mapped_and_not_read(tmp_path):
    tokens = 2**30  # 4 GiB, of which a sparse file stores nothing
    with open(tmp_path / "big.bin", "wb") as file:
        file.truncate(4 * tokens)
        file.seek(4 * (2**20 + 1) * 3)
        np.array([7, 8, 9], "<u4").tofile(file)
    tracemalloc.start()
    try:
        source = ShardBatchSource(tmp_path, 2**20, seed=0)
        source.restore({**source.state(), "position": 900})
        assert source.next_batch(1).input_ids.shape == (1, 2**20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 64 << 20
    first = ShardBatchSource(tmp_path, 2**20)
    first.restore({**first.state(), "position": 3})
    assert first.next_batch(1).input_ids[0, :3].tolist() == [7, 8, 9]


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, np.nan])
def test_shares_that_cannot_be_held_out(tmp_path, share):
    write_shards(tmp_path, np.arange(100))
    with pytest.raises((ConfigError, DomainError), match="held_out"):
        ShardBatchSource(tmp_path, 4, held_out=share)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"sequence_length": 0}, "sequence_length must be an integer of at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1, got 0"),
        ({"seed": -1}, "seed must be an integer of at least 0, got -1"),
        ({"seed": 1.5}, "seed must be an integer of at least 0, got 1.5"),
        ({"wrap": "no"}, "wrap must be True or False, got 'no'"),
        ({"per_position": 1}, "per_position must be True or False, got 1"),
        ({"teacher_rows": None}, "teacher_rows must be True or False, got None"),
        ({"directory": 3}, "directory must be a path, got 3"),
    ],
)
def test_shard_arguments_that_cannot_be(tmp_path, arguments, sentence):
    write_shards(tmp_path, np.arange(100))
    with pytest.raises((DomainError, DTypeError), match=sentence):
        ShardBatchSource(**{"directory": tmp_path, "sequence_length": 4, **arguments})


def test_a_wrapping_pass_is_rounded_up_to_whole_batches(tmp_path):
    source = ShardBatchSource(write_shards(tmp_path / "s", np.arange(60)), 4, wrap=True)  # 10 windows to train on
    passes = [[source.next_batch(4) for _ in range(source.batches_per_epoch(4))] for _ in range(2)]
    starts = [[int(ids[0]) // 5 for batch in batches for ids in batch.input_ids] for batches in passes]
    assert starts == [[*range(10), 0, 1], [*range(2, 10), *range(4)]]


# --- synthetic ------------------------------------------------------------------------------------------------------


def test_d12_synthetic_rows_say_their_label():
    source = SyntheticBatchSource(4, sequence_length=3, rows_per_epoch=10)
    batches = take_pass(source, 4)
    assert [len(batch) for batch in batches] == [4, 4, 2]
    labels = np.concatenate([batch.labels for batch in batches])
    ids = np.concatenate([batch.input_ids for batch in batches])
    assert labels.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    np.testing.assert_array_equal(ids, np.repeat(labels[:, None], 3, axis=1))
    assert source.held_out().labels.tolist() == [0, 1, 2, 3]


def test_d12_a_student_that_reads_its_input_learns_the_synthetic_rows_to_the_floor():
    source = SyntheticBatchSource(8, sequence_length=2)
    student = LogitStudent(8, context=1, learning_rate=8.0)
    losses = []
    for _ in range(100):
        batch = source.next_batch(8)
        rows = iter(student.logits_for_batch(batch.input_ids))
        loss, gradient = kd_step(FixtureTeacher(8), batch.input_ids, batch.labels, 1.0, 0.5, lambda _, r=rows: next(r))
        student.apply_kd_gradient(gradient)
        losses.append(loss)
    assert losses[0] == pytest.approx(np.log(8), abs=0.01)  # ln 8 of CE, and nearly that of KL
    assert losses[-1] < 0.01  # the same labels under equal inputs would stop at ln 8
    np.testing.assert_array_equal(student.logits_for_batch(batch.input_ids).argmax(axis=1), batch.labels)


def test_synthetic_per_position():
    batch = SyntheticBatchSource(3, sequence_length=2, per_position=True).next_batch(4)
    assert batch.labels.tolist() == [[0, 0], [1, 1], [2, 2], [0, 0]]
    np.testing.assert_array_equal(batch.input_ids, batch.labels)


@pytest.mark.parametrize("name", ["num_tokens", "sequence_length", "rows_per_epoch"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True])
def test_synthetic_arguments_that_cannot_be(name, value):
    with pytest.raises((DomainError, DTypeError), match=f"{name} must be an integer of at least 1, got {value}"):
        SyntheticBatchSource(**{"num_tokens": 4, name: value})
    with pytest.raises(DTypeError, match="per_position must be True or False, got 'yes'"):
        SyntheticBatchSource(4, per_position="yes")


# --- arrays ---------------------------------------------------------------------------------------------------------


@given(
    total=st.integers(2, 30),
    share=st.floats(0.01, 0.99),
    seed=st.none() | st.integers(0, 3),
    batch_size=st.integers(1, 8),
)
def test_array_rows_stay_together_and_held_out_rows_out_of_training(total, share, seed, batch_size):
    held = max(int(np.ceil(total * share)), 1)
    arrays = np.arange(total)[:, None] * [1, 10], np.arange(total) * 100, np.arange(total)[:, None] * 1000
    if held >= total:
        with pytest.raises(ConfigError, match="to train on"):
            ArrayBatchSource(arrays[0], arrays[1], seed=seed, held_out=share)
        return
    source = ArrayBatchSource(arrays[0], arrays[1], teacher_ids=arrays[2], seed=seed, held_out=share)
    batches = take_pass(source, batch_size)
    assert len(batches) == source.batches_per_epoch(batch_size)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    rows = np.concatenate([batch.input_ids[:, 0] for batch in batches])
    assert sorted(rows) == list(range(total - held))
    assert source.held_out().input_ids[:, 0].tolist() == list(range(total - held, total))
    for batch in [*batches, source.held_out()]:
        np.testing.assert_array_equal(batch.input_ids[:, 1], 10 * batch.input_ids[:, 0])
        np.testing.assert_array_equal(batch.labels, 100 * batch.input_ids[:, 0])
        np.testing.assert_array_equal(batch.for_teacher, 1000 * batch.input_ids[:, :1])


def test_array_source_shuffles_by_seed_and_pass():
    def order(seed, passes):
        source = ArrayBatchSource(np.arange(40)[:, None], np.arange(40), seed=seed)
        result = []
        for _ in range(passes):
            result.append(np.concatenate([batch.labels for batch in take_pass(source, 7)]).tolist())
            source.reset()
        return result

    assert order(None, 2) == [list(range(36))] * 2
    assert order(1, 2) == order(1, 2)
    assert order(1, 2)[0] != order(1, 2)[1]
    assert order(1, 1) != order(2, 1)


def test_features_keep_their_dtype():
    source = ArrayBatchSource(np.ones((4, 2), np.float32), [0, 1, 0, 1], held_out=0.25)
    batch = source.next_batch(2)
    assert (batch.input_ids.dtype, batch.labels.dtype) == (np.float32, np.int64)


def test_a_batch_of_its_own_is_held_out():
    held_out = Batch(np.array([[7]]), np.array([7]))
    source = ArrayBatchSource(np.arange(4)[:, None], np.arange(4), held_out=held_out)
    assert source.held_out() is held_out
    assert sorted(label for batch in take_pass(source, 3) for label in batch.labels) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"labels": np.zeros(4)}, DTypeError, "labels must be integers, got dtype float64"),
        ({"labels": np.zeros((4, 1, 1), int)}, ShapeError, r"labels must have shape \[N\] or \[N, L\]"),
        ({"labels": np.int64(3)}, ShapeError, r"labels must have shape \[N\] or \[N, L\], got \(\)"),
        ({"labels": np.zeros(3, int)}, ShapeError, r"input_ids must have shape \[3, ...\] like labels, got \(4, 1\)"),
        ({"input_ids": np.zeros(4, int)}, ShapeError, "input_ids must have shape"),
        ({"teacher_ids": np.zeros((3, 1), int)}, ShapeError, r"teacher_ids must have shape \[4, ...\] like labels"),
        ({"held_out": 0.9}, ConfigError, "held_out=0.9 of 4 rows leaves 0 to train on and 4 to validate on"),
    ],
)
def test_arrays_that_cannot_be(arguments, error, sentence):
    with pytest.raises(error, match=sentence):
        ArrayBatchSource(**{"input_ids": np.zeros((4, 1), int), "labels": np.zeros(4, int), **arguments})


# --- all sources ----------------------------------------------------------------------------------------------------


@pytest.fixture(params=["synthetic", "arrays", "shards", "shards-wrap"])
def make_source(request, tmp_path):
    rng = np.random.default_rng(0)
    write_shards(tmp_path / "shards", rng.integers(0, 50, size=90), rng.integers(0, 50, size=70))
    ids, labels = rng.integers(0, 50, size=(23, 2)), rng.integers(0, 50, size=23)
    return {
        "synthetic": lambda: SyntheticBatchSource(5, rows_per_epoch=23),
        "arrays": lambda: ArrayBatchSource(ids, labels, teacher_ids=ids, seed=1),
        "shards": lambda: ShardBatchSource(tmp_path / "shards", 4, teacher_rows=True, seed=1),
        "shards-wrap": lambda: ShardBatchSource(tmp_path / "shards", 4, wrap=True, seed=1),
    }[request.param]


def draw(source, count):
    """``count`` batches of 4, through as many passes as it takes."""
    batches = []
    while len(batches) < count:
        try:
            batches.append(source.next_batch(4))
        except EndOfDataError:
            source.reset()
    return batches


@pytest.mark.parametrize("before", [0, 1, 5, 6, 7, 13])
def test_a_restored_source_gives_the_same_batches(make_source, before):
    source = make_source()
    assert (source.state()["epoch"], source.state()["position"]) == (0, 0)
    draw(source, before)
    state = source.state()
    expected = draw(source, 15)
    assert source.state() != state

    fresh = make_source()
    fresh.restore(state)
    assert fresh.state() == state
    for ours, theirs in zip(expected, draw(fresh, 15), strict=True):
        same(ours, theirs)
    source.restore(state)
    for ours, theirs in zip(expected, draw(source, 15), strict=True):
        same(ours, theirs)


def test_sources_are_sources_and_hold_out_the_same_rows_for_ever(make_source):
    source = make_source()
    assert isinstance(source, BatchSource)
    held_out = source.held_out()
    draw(source, 9)
    same(source.held_out(), held_out)
    same(make_source().held_out(), held_out)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True, None])
def test_batch_sizes_that_cannot_be(make_source, batch_size):
    source = make_source()
    for method in (source.next_batch, source.batches_per_epoch):
        with pytest.raises((DomainError, DTypeError), match="batch_size must be an integer of at least 1, got"):
            method(batch_size)


def test_a_state_of_another_data_set_or_order_is_refused():
    def source(rows, seed):
        return ArrayBatchSource(np.zeros((rows, 1), int), np.zeros(rows, int), seed=seed, held_out=0.5)

    state = source(10, 1).state()
    with pytest.raises(ConfigError, match="a batch source with rows 5 does not fit one with 6"):
        source(12, 1).restore(state)
    with pytest.raises(ConfigError, match="a batch source with seed 1 does not fit one with 2"):
        source(10, 2).restore(state)
    with pytest.raises(ConfigError, match="got {} without epoch, input_ids, labels, position, rows, seed, wrap"):
        source(10, 1).restore({})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position": 6}, "position must be at most 5, got 6"),
        ({"position": -1}, "position must be an integer of at least 0, got -1"),
        ({"position": 1.5}, "position must be an integer of at least 0, got 1.5"),
        ({"epoch": None}, "epoch must be an integer of at least 0, got None"),
        ({"epoch": -2}, "epoch must be an integer of at least 0, got -2"),
    ],
)
def test_a_state_that_no_source_had_is_refused_and_changes_nothing(change, sentence):
    source = ArrayBatchSource(np.zeros((10, 1), int), np.zeros(10, int), seed=1, held_out=0.5)
    source.next_batch(2)
    before = source.state()
    with pytest.raises(ConfigError, match=f"the state of a batch source: {sentence}"):
        source.restore(before | change)
    for state in (None, [], 3):
        with pytest.raises(ConfigError, match="state must be the state of a batch source like this one, got"):
            source.restore(state)
    for name in before:
        with pytest.raises(ConfigError, match=f"without {name}"):
            source.restore({key: value for key, value in before.items() if key != name})
    assert source.state() == before


def test_a_state_knows_what_determined_the_rows(tmp_path):
    write_shards(tmp_path / "a", np.arange(60), np.arange(40))
    write_shards(tmp_path / "b", np.arange(40), np.arange(60))  # as many windows, at other places

    def shards(name="a", length=4, **arguments):
        return ShardBatchSource(tmp_path / name, length, **arguments)

    def synthetic(tokens=4, **arguments):
        return SyntheticBatchSource(tokens, rows_per_epoch=20, **arguments)

    def arrays(*shape, labels=(20,)):
        return ArrayBatchSource(np.zeros(shape, int), np.zeros(labels, int))

    for source, others in (
        (shards(), {"shards": shards("b"), "wrap": shards(wrap=True), "per_position": shards(per_position=True)}),
        (
            synthetic(),
            {
                "num_tokens": synthetic(5),
                "sequence_length": synthetic(sequence_length=2),
                "per_position": synthetic(per_position=True),
            },
        ),
        (arrays(20, 2), {"input_ids": arrays(20, 3), "labels": arrays(20, 2, labels=(20, 2))}),
    ):
        source.restore(source.state())
        for name, other in others.items():
            with pytest.raises(ConfigError, match=f"the state of a batch source with {name} .* does not fit one with"):
                other.restore(source.state())
    short = shards(held_out=0.2)
    long = ShardBatchSource(write_shards(tmp_path / "c", np.arange(80), np.arange(20)), 3, held_out=9 / 25)
    assert short.batches_per_epoch(1) == long.batches_per_epoch(1)
    with pytest.raises(ConfigError, match="with sequence_length 4 does not fit one with 3"):
        long.restore(short.state())


def test_a_batch_larger_than_the_pass(tmp_path):
    directory = write_shards(tmp_path / "s", np.arange(105))  # 21 windows, 3 held out
    ends = ShardBatchSource(directory, 4, seed=1).next_batch(50)
    assert sorted(ends.labels) == list(range(4, 90, 5))
    wraps = ShardBatchSource(directory, 4, seed=1, wrap=True).next_batch(50)
    assert len(wraps) == 50
    assert sorted(wraps.labels[:18]) == sorted(wraps.labels[18:36]) == sorted(ends.labels)
    assert len(set(wraps.labels[36:])) == 14
