"""Ragged rows of ids, against the same in plain Python."""

from __future__ import annotations

import hashlib
import re

import numpy as np
import pytest
from hypothesis import example, given, strategies as st

from kdcore import DomainError, DTypeError, NonFiniteError, ShapeError
from kdcore.sequences import as_rows, as_vectors, content_key, last_tokens, pad_rows, prefixes

ragged = st.lists(st.lists(st.integers(0, 1000), max_size=6), max_size=6)


@given(ragged, st.integers(-200, 200))
@example([], 0)
@example([[]], 7)
def test_pad_rows(rows, fill):
    width = max(map(len, rows), default=0)
    padded, mask = pad_rows(as_rows(rows), fill)
    assert (padded.shape, padded.dtype) == ((len(rows), width), np.int64)
    assert (mask.shape, mask.dtype) == ((len(rows), width), np.bool_)
    assert padded.tolist() == [row + [fill] * (width - len(row)) for row in rows]
    assert mask.tolist() == [[True] * len(row) + [False] * (width - len(row)) for row in rows]


@given(ragged, st.integers(0, 8))
@example([], 3)
@example([[], [5]], 2)
def test_last_tokens(rows, n):
    expected = [([0] * n + row)[len(row) :] for row in rows]
    last = last_tokens(rows, n)
    assert (last.shape, last.dtype) == ((len(rows), n), np.int64)
    assert last.tolist() == expected


@given(st.integers(0, 5), st.integers(0, 5), st.integers(0, 7), st.sampled_from([np.int64, np.uint8, np.int16]))
def test_last_tokens_of_an_array_are_those_of_its_rows(B, L, n, dtype):
    ids = np.random.default_rng(B + 10 * L).integers(0, 100, size=(B, L)).astype(dtype)
    from_array, from_rows = last_tokens(ids, n), last_tokens(list(ids), n)
    assert from_array.dtype == np.int64
    assert from_array.shape == (B, n)
    assert from_array.tolist() == from_rows.tolist() == [([0] * n + row)[L:] for row in ids.tolist()]


@given(ragged)
def test_prefixes(rows):
    assert [p.tolist() for p in prefixes(as_rows(rows))] == [r[: e + 1] for r in rows for e in range(len(r))]


@given(ragged)
def test_as_rows_takes_lists_tuples_and_arrays(rows):
    for form in (rows, tuple(map(tuple, rows)), [np.array(row, np.uint16) for row in rows]):
        result = as_rows(form)
        assert [row.tolist() for row in result] == rows
        assert {row.dtype for row in result} <= {np.dtype(np.int64)}


def test_as_rows_does_not_share_memory():
    ids = np.array([[1, 2], [3, 4]])
    for form in (ids, list(ids)):
        rows = as_rows(form)
        rows[0][0] = 99
    assert ids.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("ids", "error", "sentence"),
    [
        (np.zeros(3, int), ShapeError, r"input_ids must have two dimensions \[rows, tokens\], got shape \(3,\)"),
        (np.zeros((1, 2, 3), int), ShapeError, "input_ids must have two dimensions"),
        (np.zeros((2, 3)), DTypeError, "input_ids must be integers, got dtype float64"),
        (np.zeros((2, 3), bool), DTypeError, "input_ids must be integers, got dtype bool"),
        ([[1], [1.5]], DTypeError, r"input_ids\[1\] must be integers, got dtype float64"),
        ([[2**64]], DTypeError, r"input_ids\[0\] must be integers, got dtype object"),
        ([[[1], [1, 2]]], ShapeError, r"input_ids\[0\] must be one row of token ids, got sequences of different"),
        ([1, 2], ShapeError, r"input_ids\[0\] must be one row of token ids, got shape \(\)"),
        ([[[1]]], ShapeError, r"input_ids\[0\] must be one row of token ids, got shape \(1, 1\)"),
        ("12", ShapeError, "input_ids must be a sequence of rows of token ids, got str"),
        (b"12", ShapeError, "input_ids must be a sequence of rows of token ids, got bytes"),
        (3, ShapeError, "input_ids must be a sequence of rows of token ids, got int"),
    ],
)
def test_as_rows_refuses(ids, error, sentence):
    with pytest.raises(error, match=sentence):
        as_rows(ids)


def test_as_rows_names_its_argument():
    with pytest.raises(DTypeError, match="^labels must be integers"):
        as_rows(np.zeros((1, 1)), "labels")


@pytest.mark.parametrize("id_", [2**63, 2**64 - 100])  # as int64 the second would be -100, which masks a label
def test_ids_beyond_int64_do_not_wrap(id_):
    ids = np.array([[1, 2], [3, id_]], np.uint64)
    with pytest.raises(DomainError, match=rf"input_ids must be below 2\*\*63, got {id_}"):
        as_rows(ids)
    with pytest.raises(DomainError, match=rf"input_ids must be below 2\*\*63, got {id_}"):
        last_tokens(ids, 1)
    for form in (list(ids), [[1], [id_]]):
        with pytest.raises(DomainError, match=rf"labels\[1\] must be below 2\*\*63, got {id_}"):
            as_rows(form, "labels")
    assert as_rows(np.array([[2**63 - 1]], np.uint64))[0].tolist() == [2**63 - 1]


# --- feature vectors ------------------------------------------------------------------------------------------------


@given(st.integers(0, 3), st.integers(1, 4), st.sampled_from([np.float16, np.float32, np.float64, np.int32, np.uint8]))
def test_as_vectors(n, width, dtype):
    values = np.random.default_rng(n).integers(0, 100, size=(n, width)).astype(dtype)
    for form in (values, values.tolist(), np.asfortranarray(values)):
        vectors = as_vectors(form, width)
        assert (vectors.dtype, vectors.shape, vectors.flags.c_contiguous) == (np.float32, (n, width), True)
        np.testing.assert_array_equal(vectors, values)


@pytest.mark.parametrize("value", [1e300, -1e300, 3.5e38, np.inf, -np.inf, np.nan])
def test_as_vectors_are_finite_in_float32(value):
    values = np.ones((2, 3))
    values[1, 2] = value
    with pytest.raises(NonFiniteError, match=re.escape(f"x[1, 2] is {value}: features must be finite in float32")):
        as_vectors(values, 3, "x")


@pytest.mark.parametrize(
    ("values", "error", "sentence"),
    [
        ([[1.0, 2.0]], ShapeError, r"x must be feature vectors \[rows, 3\], as said; got shape \(1, 2\)"),
        ([1.0, 2.0, 3.0], ShapeError, r"got shape \(3,\)"),
        ([[1.0, 2.0, 3.0], [1.0]], ShapeError, r"\[rows, 3\], as said; got rows of different widths"),
        ([["a", "b", "c"]], DTypeError, "x must hold numbers, got dtype <U1"),
        ([[None] * 3], DTypeError, "x must hold numbers, got dtype object"),
        (5.0, ShapeError, r"got shape \(\)"),
    ],
)
def test_as_vectors_refuses(values, error, sentence):
    with pytest.raises(error, match=sentence):
        as_vectors(values, 3, "x", ", as said")


# --- keys of content ------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2**32 - 1), max_size=8))
def test_content_key_is_blake2b_of_little_endian_uint32(ids):
    data = b"".join(token.to_bytes(4, "little") for token in ids)
    expected = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
    assert content_key(ids) == expected
    assert content_key(np.array(ids, np.uint32)) == expected
    assert content_key(np.array(ids, ">i8")) == expected


@pytest.mark.parametrize("token", [-1, 2**32, 2**63, 2**64])
def test_content_key_refuses_ids_that_would_wrap(token):
    with pytest.raises(DomainError, match=rf"the token id {token} is outside \[0, 2\*\*32\)"):
        content_key([token])


def test_content_key_refuses_what_is_no_row():
    with pytest.raises(ShapeError, match="ids must be one row of token ids"):
        content_key([[1]])
    with pytest.raises(DTypeError, match="ids must be integers, got dtype float64"):
        content_key([1.0])
