"""The demo's teacher: an interpolated Witten-Bell n-gram model of bytes.

With count(h, c) the number of times that byte c follows the context h, count(h) = Σ_c count(h, c), T(h) the number of
distinct bytes that follow h, and h' the context h without its oldest byte::

    P(c | h) = (count(h, c) + T(h) · P(c | h')) / (count(h) + T(h))         P(c | h) = P(c | h')  where count(h) = 0

down to the empty context, below which P(c) = 1/256. Every byte has a positive probability after every context.

References: I. H. Witten and T. C. Bell, "The zero-frequency problem", IEEE Transactions on Information Theory 37(4),
1991 (method C); S. F. Chen and J. Goodman, "An empirical study of smoothing techniques for language modeling",
Computer Speech and Language 13(4), 1999, §2.5 (the interpolated form).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from kdcore.errors import DomainError, DTypeError, ShapeError

__all__ = ["MAX_ORDER", "WittenBellModel"]

# A symbol is 0 past the end of a file and byte + 1 within it: nine bits, of which seven symbols fit into 64 bits.
_BITS = 9
_MASK = np.uint64((1 << _BITS) - 1)
MAX_ORDER = 64 // _BITS

_VOCAB = 256
_BLOCK_ROWS = 8192


@dataclass(frozen=True)
class _Level:
    """What follows the contexts of one length: H distinct contexts, E distinct (context, byte) pairs."""

    contexts: NDArray[np.uint64]  # [H], packed, ascending
    starts: NDArray[np.int64]  # [H + 1], where the pairs of each context begin
    followers: NDArray[np.uint8]  # [E]
    weights: NDArray[np.float64]  # [E], count(h, c) / (count(h) + T(h))
    backoff: NDArray[np.float64]  # [H], T(h) / (count(h) + T(h))

    @classmethod
    def from_grams(cls, grams: NDArray[np.uint64], counts: NDArray[np.int64]) -> _Level:
        """From the distinct n-grams [E], packed and ascending, and how often each occurs [E]."""
        packed = grams >> np.uint64(_BITS)
        starts = _run_starts(packed)
        distinct = np.diff(starts, append=grams.size)
        totals = np.add.reduceat(counts, starts) + distinct if grams.size else distinct
        return cls(
            contexts=packed[starts],
            starts=np.append(starts, grams.size),
            followers=((grams & _MASK) - np.uint64(1)).astype(np.uint8),
            weights=counts / np.repeat(totals, distinct),
            backoff=distinct / totals,
        )

    def interpolate(self, packed: NDArray[np.uint64], p: NDArray[np.float64]) -> None:
        """Turn P(· | h') into P(· | h) in place; ``packed`` [R] are the contexts h, ``p`` is [R, 256]."""
        found = np.searchsorted(self.contexts, packed)
        found[found == self.contexts.size] = 0
        rows = np.flatnonzero(self.contexts[found] == packed) if self.contexts.size else np.empty(0, np.int64)
        context = found[rows]
        scale = np.ones(packed.size)
        scale[rows] = self.backoff[context]
        p *= scale[:, None]
        sizes = self.starts[context + 1] - self.starts[context]
        ends = np.cumsum(sizes)
        pairs = np.arange(sizes.sum()) + np.repeat(self.starts[context] - (ends - sizes), sizes)
        # The bytes that follow one context are distinct, so no element is added to twice.
        p[np.repeat(rows, sizes), self.followers[pairs]] += self.weights[pairs]


class WittenBellModel:
    """An interpolated Witten-Bell model of bytes; ``order`` - 1 preceding bytes are its context.

    Example::

        model = WittenBellModel.fit([b"import os", b"import sys"], order=3)
        model.log_probs(np.frombuffer(b"im", np.uint8)[None])  # [1, 256], the largest at ord("p")
    """

    def __init__(self, levels: Sequence[_Level]) -> None:
        self._levels = tuple(levels)

    @property
    def order(self) -> int:
        """Length of the longest n-gram that is counted."""
        return len(self._levels)

    @classmethod
    def fit(cls, data: Sequence[bytes], order: int = 5) -> WittenBellModel:
        """Count the n-grams of every length up to ``order`` (1 to 7) within each file of ``data``.

        No n-gram crosses from one file into the next, and each length is counted exactly: a k-gram counts wherever
        all its k bytes lie within a file, at the file's end too. While it sorts, it holds 10 bytes of memory for
        each byte of text.
        """
        if not 1 <= order <= MAX_ORDER:
            raise DomainError(f"order must lie between 1 and {MAX_ORDER}, got {order}")
        grams, counts = _distinct(_packed_grams(data, order))
        levels = []
        for k in range(order, 0, -1):
            # One that runs past the end of its file ends in symbol 0. Its beginning still counts at shorter lengths.
            inside = (grams & _MASK) != 0
            levels.append(_Level.from_grams(grams[inside], counts[inside]))
            # The array is sorted by leading bytes, so shorter leading n-grams are sorted too: no second sort.
            if k > 1:
                grams, counts = _distinct(grams >> np.uint64(_BITS), counts)
        return cls(levels[::-1])

    def log_probs(self, contexts: Any, dtype: DTypeLike = np.float64) -> NDArray[Any]:
        """Natural log-probabilities [N, 256] of the next byte; ``contexts`` is uint8 [N, L], oldest byte first.

        L is at least ``order`` - 1; older bytes than that are ignored. Every value is finite and the exponentials of
        a row sum to 1 within the rounding of ``dtype``; the arithmetic is float64 whatever ``dtype`` is.
        """
        contexts = self._checked(contexts)
        result = np.empty((contexts.shape[0], _VOCAB), dtype)
        for rows, which, p in self._blocks(contexts):
            # Logarithms of the distinct contexts only; in the output a context may stand many times.
            result[rows] = np.log(p, out=p).astype(result.dtype)[which]
        return result

    def label_log_probs(self, contexts: Any, labels: Any) -> NDArray[np.float64]:
        """Natural log-probability [N] of ``labels`` [N] after ``contexts``, without an array [N, 256]."""
        contexts = self._checked(contexts)
        labels = np.asarray(labels)
        if labels.shape != contexts.shape[:1]:
            raise ShapeError(f"labels must have shape {contexts.shape[:1]}, one for each context, got {labels.shape}")
        result = np.empty(labels.size)
        for rows, which, p in self._blocks(contexts):
            result[rows] = np.log(p[which, labels[rows]])
        return result

    def _checked(self, contexts: Any) -> NDArray[np.uint8]:
        contexts = np.asarray(contexts)
        if contexts.dtype != np.uint8:
            raise DTypeError(f"contexts must be uint8, got dtype {contexts.dtype}")
        if contexts.ndim != 2 or contexts.shape[1] < self.order - 1:
            raise ShapeError(f"contexts must have shape [N, {self.order - 1} or more], got {contexts.shape}")
        return contexts[:, contexts.shape[1] - (self.order - 1) :]

    def _blocks(
        self, contexts: NDArray[np.uint8]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]]:
        """Yield (rows of ``contexts``, the row of p for each, p [R, 256]), each distinct context once.

        Contexts are sorted by their newest byte first: those that share h' are neighbours, and P(· | h') is computed
        once for all of them in a block.
        """
        newest_first = np.zeros(contexts.shape[0], np.uint64)
        for column in range(self.order - 2, -1, -1):
            newest_first = (newest_first << np.uint64(8)) | contexts[:, column]
        by_context = np.argsort(newest_first, kind="stable")
        keys = newest_first[by_context]
        first = _run_starts(keys)
        bounds = np.append(first, keys.size)
        for begin in range(0, first.size, _BLOCK_ROWS):
            end = min(begin + _BLOCK_ROWS, first.size)
            rows = by_context[bounds[begin] : bounds[end]]
            which = np.repeat(np.arange(end - begin), np.diff(bounds[begin : end + 1]))
            yield rows, which, self._probabilities(keys[first[begin:end]])

    def _probabilities(self, newest_first: NDArray[np.uint64]) -> NDArray[np.float64]:
        """P [R, 256] of the distinct contexts [R], packed a byte each with the newest byte highest, ascending."""
        longest = self.order - 1
        p = np.full((1, _VOCAB), 1 / _VOCAB)
        shorter = np.zeros(newest_first.size, np.int64)  # each context's row in p
        for length, level in enumerate(self._levels):
            suffix = newest_first >> np.uint64(8 * (longest - length))
            starts = _run_starts(suffix)
            p = p[shorter[starts]]
            packed = np.zeros(starts.size, np.uint64)
            for byte in range(length):  # newest byte last, as the n-grams are packed
                symbol = (suffix[starts] >> np.uint64(8 * byte)) & np.uint64(255)
                packed = (packed << np.uint64(_BITS)) | (symbol + np.uint64(1))
            level.interpolate(packed, p)
            shorter = np.repeat(np.arange(starts.size), np.diff(starts, append=suffix.size))
        return p


def _packed_grams(data: Sequence[bytes], order: int) -> NDArray[np.uint64]:
    """The n-gram that starts at each byte of each file, packed with its first symbol highest, sorted."""
    gap = order - 1
    symbols = np.zeros(sum(len(file) + gap for file in data), np.uint16)
    begin = 0
    for file in data:
        np.add(np.frombuffer(file, np.uint8), 1, out=symbols[begin : begin + len(file)], dtype=np.uint16)
        begin += len(file) + gap
    grams = np.zeros(max(symbols.size - gap, 0), np.uint64)
    for i in range(order):
        grams <<= np.uint64(_BITS)
        grams |= symbols[i : i + grams.size]
    grams.sort()
    # Those that start between two files have symbol 0 first, so they come first. No context would ever find them.
    return grams[np.searchsorted(grams, np.uint64(1 << _BITS * gap)) :]


def _distinct(
    grams: NDArray[np.uint64], counts: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Sorted n-grams without repetition, and the sum of ``counts`` (by default 1 each) of each."""
    starts = _run_starts(grams)
    if counts is None:
        return grams[starts], np.diff(starts, append=grams.size)
    return grams[starts], np.add.reduceat(counts, starts) if grams.size else counts


def _run_starts(values: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where each run of equal neighbours begins."""
    changed = np.ones(values.size, bool)
    np.not_equal(values[1:], values[:-1], out=changed[1:])
    return np.flatnonzero(changed)
