"""The demo's corpus and its Witten-Bell teacher: against a dictionary of counts, and by their invariants."""

from __future__ import annotations

import sysconfig
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import event, given, settings, strategies as st

from kdcore import LogitStore
from kdcore.demo.corpus import load_corpus, part_of, passages, positions, source_paths
from kdcore.demo.ngram import MAX_ORDER, WittenBellModel
from kdcore.demo.run import PASSAGE, write_store
from kdcore.errors import DomainError, DTypeError, KdcoreError, MissingSourceError, ShapeError

SENTENCES = [
    b"the cat sat on the mat, the cat sat",
    b"def f(x):\n    return x\n\n\ndef g(x):\n    return f(x)\n",
    b"",
    b"t",
    b"th",
    bytes(range(256)),
    b"\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00\xff",
    b"aaaaaaaaaaaaaaaaaaaaaaa",
]

# Few symbols, so that contexts repeat; both ends of the byte range, where a packed symbol could spill over.
texts = st.lists(
    st.one_of(
        st.lists(st.sampled_from([0, 1, 97, 254, 255]), max_size=40).map(bytes),
        st.binary(max_size=20),
    ),
    max_size=5,
)
orders = st.integers(1, MAX_ORDER)


def brute_force(data: list[bytes], context: bytes, order: int) -> list[Fraction]:
    """P(· | context) by the definition, in exact arithmetic."""
    counts: dict[bytes, Counter[int]] = defaultdict(Counter)
    for file in data:
        for end in range(len(file)):
            for length in range(min(order - 1, end) + 1):
                counts[file[end - length : end]][file[end]] += 1
    p = [Fraction(1, 256)] * 256
    for length in range(order):
        followers = counts.get(context[len(context) - length :])
        if followers:
            total, distinct = sum(followers.values()), len(followers)
            p = [(followers[c] + distinct * p[c]) / (total + distinct) for c in range(256)]
    return p


def as_contexts(contexts: list[bytes], length: int) -> np.ndarray:
    return np.frombuffer(b"".join(contexts), np.uint8).reshape(len(contexts), length)


@pytest.mark.parametrize("order", range(1, MAX_ORDER + 1))
def test_equals_the_definition_on_seen_and_unseen_contexts(order: int) -> None:
    seen = [file[i : i + order - 1] for file in SENTENCES[:2] + SENTENCES[6:] for i in range(0, len(file) - order, 3)]
    across_files = b"satdef f(x)"[: order - 1]
    partly_seen = (b"\x07\x07\x07\x07\x07" + b" ")[max(0, 7 - order) :][: order - 1].rjust(order - 1, b"\x07")
    contexts = [*seen, across_files, partly_seen, b"\xff" * (order - 1), b"\x00" * (order - 1)]
    actual = WittenBellModel.fit(SENTENCES, order).log_probs(as_contexts(contexts, order - 1))
    assert actual.shape == (len(contexts), 256)
    assert actual.dtype == np.float64
    expected = np.array([[float(p) for p in brute_force(SENTENCES, context, order)] for context in contexts])
    np.testing.assert_allclose(actual, np.log(expected), rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=texts, order=orders, tail=st.data())
def test_equals_the_definition_on_any_text(data: list[bytes], order: int, tail: st.DataObject) -> None:
    context = tail.draw(st.lists(st.sampled_from([0, 1, 97, 254, 255]), min_size=order - 1, max_size=order - 1))
    event("context seen" if any(bytes(context) in file for file in data) else "context unseen")
    actual = WittenBellModel.fit(data, order).log_probs(as_contexts([bytes(context)], order - 1))[0]
    expected = np.log([float(p) for p in brute_force(data, bytes(context), order)])
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(data=texts, order=orders, tail=st.data())
def test_every_row_is_a_distribution(data: list[bytes], order: int, tail: st.DataObject) -> None:
    rows = tail.draw(st.lists(st.binary(min_size=order - 1, max_size=order - 1), max_size=6))
    log_p = WittenBellModel.fit(data, order).log_probs(as_contexts(rows, order - 1))
    assert log_p.shape == (len(rows), 256)
    assert np.isfinite(log_p).all()
    np.testing.assert_allclose(np.exp(log_p).sum(1), 1.0, rtol=0, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(data=texts, order=orders, tail=st.data())
def test_files_are_counted_apart(data: list[bytes], order: int, tail: st.DataObject) -> None:
    """The order of files cannot matter, and empty ones cannot, if no n-gram crosses from one into the next."""
    contexts = as_contexts([file[: order - 1] for file in data if len(file) >= order - 1], order - 1)
    shuffled = tail.draw(st.permutations([*data, b"", b""]))
    expected = WittenBellModel.fit(data, order).log_probs(contexts)
    np.testing.assert_array_equal(WittenBellModel.fit(shuffled, order).log_probs(contexts), expected)


def test_no_pair_is_counted_across_a_file_boundary() -> None:
    together = np.exp(WittenBellModel.fit([b"ab"], 2).log_probs(as_contexts([b"a"], 1))[0])
    apart = np.exp(WittenBellModel.fit([b"a", b"b"], 2).log_probs(as_contexts([b"a"], 1))[0])
    unigram = np.exp(WittenBellModel.fit([b"a", b"b"], 1).log_probs(as_contexts([b""], 0))[0])
    assert together[ord("b")] > 0.5
    np.testing.assert_array_equal(apart, unigram)


def test_rows_do_not_depend_on_their_neighbours_or_repetition(monkeypatch: pytest.MonkeyPatch) -> None:
    model = WittenBellModel.fit(SENTENCES, 4)
    contexts, labels = positions(SENTENCES, 120, seed=3, order=4)
    alone = np.concatenate([model.log_probs(row[None]) for row in contexts])
    np.testing.assert_array_equal(model.log_probs(contexts), alone)
    monkeypatch.setattr("kdcore.demo.ngram._BLOCK_ROWS", 7)
    np.testing.assert_array_equal(model.log_probs(np.tile(contexts, (2, 1))), np.tile(alone, (2, 1)))
    np.testing.assert_array_equal(model.label_log_probs(contexts, labels), alone[np.arange(120), labels])


def test_only_the_newest_bytes_of_a_longer_context_are_read() -> None:
    model = WittenBellModel.fit(SENTENCES, 3)
    longer = as_contexts([b"xxth", b"e ca"], 4)
    np.testing.assert_array_equal(model.log_probs(longer), model.log_probs(longer[:, 2:]))


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_narrow_output_is_the_rounded_one(dtype: type) -> None:
    model = WittenBellModel.fit(SENTENCES, 5)
    contexts, _ = positions(SENTENCES, 50, seed=0, order=5)
    narrow = model.log_probs(contexts, dtype)
    assert narrow.dtype == dtype
    np.testing.assert_array_equal(narrow, model.log_probs(contexts).astype(dtype))


def test_no_contexts_give_no_rows() -> None:
    model = WittenBellModel.fit(SENTENCES, 5)
    assert model.log_probs(np.empty((0, 4), np.uint8)).shape == (0, 256)
    assert model.label_log_probs(np.empty((0, 4), np.uint8), np.empty(0, np.uint8)).shape == (0,)


def test_bad_arguments_are_named() -> None:
    model = WittenBellModel.fit(SENTENCES, 3)
    for order in (0, MAX_ORDER + 1):
        with pytest.raises(DomainError, match=f"order .* {order}"):
            WittenBellModel.fit(SENTENCES, order)
    with pytest.raises(DTypeError, match=r"contexts .* int64"):
        model.log_probs(np.zeros((1, 2), np.int64))
    with pytest.raises(ShapeError, match=r"contexts .* \(1, 1\)"):
        model.log_probs(np.zeros((1, 1), np.uint8))
    with pytest.raises(ShapeError, match=r"labels .* \(2,\)"):
        model.label_log_probs(np.zeros((1, 2), np.uint8), np.zeros(2, np.uint8))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small library of 200 files in packages, with things beside it that do not belong to it."""
    root = tmp_path_factory.mktemp("lib")
    for i in range(200):
        file = root / f"package{i % 7}" / f"module{i}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(f"value = {i}\n".encode() * (i % 5))
    for stray in ("site-packages/other/a.py", "package0/__pycache__/b.py", "package0/c.txt", "package0/d.pyc"):
        (root / stray).parent.mkdir(parents=True, exist_ok=True)
        (root / stray).write_bytes(b"stray")
    return root


def test_every_file_is_in_exactly_one_part(tree: Path) -> None:
    corpus = load_corpus(tree)
    paths = [*corpus.train, *corpus.tune, *corpus.held_out]
    assert len(paths) == len(set(paths)) == 200
    assert sorted(paths) == source_paths(tree)
    assert list(corpus.train) == sorted(corpus.train)
    assert corpus.train["package1/module1.py"] == b"value = 1\n"


def test_the_split_depends_on_the_path_alone(tree: Path) -> None:
    pinned = {"abc.py": "train", "json/decoder.py": "tune", "os.py": "held_out"}
    assert {path: part_of(path) for path in pinned} == pinned
    before = load_corpus(tree)
    added = tree / "added.py"
    added.write_bytes(b"new")
    try:
        after = load_corpus(tree)
    finally:
        added.unlink()
    for part in ("train", "tune", "held_out"):
        assert getattr(before, part).keys() <= getattr(after, part).keys()
        assert getattr(after, part).keys() - getattr(before, part).keys() <= {"added.py"}


def test_parts_have_their_shares() -> None:
    parts = Counter(part_of(f"package/module{i}.py") for i in range(20_000))
    assert parts["held_out"] / 20_000 == pytest.approx(0.05, abs=0.01)
    assert parts["tune"] / 20_000 == pytest.approx(0.05, abs=0.01)


def test_the_standard_library_is_found() -> None:
    paths = source_paths(Path(sysconfig.get_path("stdlib")))
    assert {"abc.py", "json/decoder.py"} <= set(paths)
    assert not any("site-packages" in path for path in paths)


def test_a_library_without_source_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "abc.pyc").write_bytes(b"compiled")
    for root in (tmp_path, tmp_path / "python311.zip"):
        with pytest.raises(MissingSourceError, match="compiled files only") as raised:
            load_corpus(root)
        assert isinstance(raised.value, KdcoreError)
        assert isinstance(raised.value, FileNotFoundError)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_all_positions_are_every_full_window_once(order: int) -> None:
    windows = [file[i : i + order] for file in SENTENCES for i in range(len(file) - order + 1)]
    contexts, labels = positions(SENTENCES, len(windows), seed=1, order=order)
    assert contexts.shape == (len(windows), order - 1)
    assert contexts.dtype == labels.dtype == np.uint8
    drawn = [bytes([*context, label]) for context, label in zip(contexts, labels, strict=True)]
    assert Counter(drawn) == Counter(windows)
    assert drawn != windows
    with pytest.raises(DomainError, match=f"{len(windows)} positions"):
        positions(SENTENCES, len(windows) + 1, seed=1, order=order)


def test_budgets_are_nested_and_seeded() -> None:
    files = [bytes(np.random.default_rng(i).integers(0, 256, 5_000, np.uint8)) for i in range(20)]
    contexts, labels = positions(files, 30_000, seed=5, order=4)
    fewer_contexts, fewer_labels = positions(files, 3_000, seed=5, order=4)
    np.testing.assert_array_equal(fewer_contexts, contexts[:3_000])
    np.testing.assert_array_equal(fewer_labels, labels[:3_000])
    other, _ = positions(files, 3_000, seed=6, order=4)
    assert (other != fewer_contexts).any()


def test_positions_are_uniform_over_the_text() -> None:
    files = [bytes([i]) * 1_000 for i in range(10)]
    _, labels = positions(files, 2_000, seed=0, order=1)
    shares = np.bincount(labels, minlength=10)
    # Hypergeometric: 200 expected in each, standard deviation 12.
    assert np.abs(shares - 200).max() < 60


def test_no_files_have_no_positions() -> None:
    contexts, labels = positions([], 0, seed=0, order=3)
    assert contexts.shape == (0, 2)
    assert labels.shape == (0,)


def test_passages_are_distinct_nested_and_lie_within_files() -> None:
    files = [bytes(np.random.default_rng(i).integers(97, 99, 300, np.uint8)) for i in range(3)]
    text = passages(files, 100, 8, seed=1, before=2)
    assert (text.shape, text.dtype) == ((100, 11), np.uint8)
    contents = [passage[2:-1].tobytes() for passage in text]
    assert len(set(contents)) == 100
    assert all(any(passage.tobytes() in file for file in files) for passage in text)
    np.testing.assert_array_equal(passages(files, 30, 8, seed=1, before=2), text[:30])
    # Of 256 contents, 100 are taken: more are drawn than are asked for, and none of those is among them.
    others = passages(files, 60, 8, seed=1, before=2, taken=text)
    assert not {passage[2:-1].tobytes() for passage in others} & set(contents)
    with pytest.raises(DomainError, match="positions with a full context"):
        passages(files, 257, 8, seed=1, before=2)


def test_the_store_has_what_the_model_says_at_every_byte_of_a_passage(tmp_path: Path) -> None:
    model = WittenBellModel.fit(SENTENCES[:2], 5)
    text = passages(SENTENCES[:2], 4, PASSAGE + 1, seed=0, before=3)
    write_store(tmp_path / "t.h5", model, text)
    with LogitStore(tmp_path / "t.h5") as store:
        for passage in text:
            rows = store.sequence(passage[3:-1])
            expected = model.log_probs(as_contexts([passage[i - 3 : i + 1].tobytes() for i in range(3, 29)], 4))
            stored = np.take_along_axis(expected, rows.indices.astype(np.int64), axis=1)
            np.testing.assert_allclose(rows.log_probs, stored, rtol=2**-10, atol=1e-4)
            tails = 1 - np.exp(stored).sum(axis=1)
            np.testing.assert_allclose(np.exp(rows.tail_logmass), tails, rtol=1e-4)
            assert tails.min() > 1e-3
