"""Kernels of truncated rows: the k likeliest classes, what the others hold at each temperature, and draws from them.

Letters: B rows, V classes, k of them kept, n draws. Logits are flat arrays in storage form (see
:mod:`kdcore.cpu.primitives`), row i from element i * stride on.

**Selection.** The k-th largest of the maxima of short stretches bounds the k-th largest element from below, since each
of k stretches has an element at least as large. Few elements reach the bound, and they alone are ranked. So the row is
read from memory once, for the maxima; for the sums it comes from the cache.

**The tail** is summed over itself, never as 1 minus the head: exponentials are relative to the smallest class of
the head, so that no tail is too small for them. Where even those underflow, :func:`_careful_tail` starts from the
tail's own largest class.
"""

import math

import numpy as np
from numba import njit

from kdcore.cpu.kernels import _SOURCES
from kdcore.cpu.pool import run_blocks
from kdcore.cpu.primitives import exp2, inner, raw_bits
from kdcore.cpu.rows import check_row, lanes_of
from kdcore.cpu.simd import (
    borrowed,
    full,
    load,
    load_part,
    max_lanes,
    maximum,
    sum_lanes,
    to_real,
    where,
    widen,
)
from kdcore.rowstatus import TEACHER

__all__ = ["draw_kernel", "draw_rows", "select_kernel", "select_rows"]

#: Classes that share a maximum: two vectors of float32.
STRETCH = 32
#: Classes whose sums at all temperatures are formed while they are in the nearest cache.
_BLOCK = 4096
_PART = 8
#: Sums below are formed again with care: what has underflowed might show in them.
_LEAST_SUM = 2.0**-60
#: Gaps of Shell's sort, by Ciura.
_GAPS = (1750, 701, 301, 132, 57, 23, 10, 4, 1)


@inner
def _stretch_maxima(x, maxima):
    """The maximum of each stretch of a row, whose NaN do not count; returns that of all."""
    like = maxima[0]
    lanes = lanes_of(like)
    top = full(-math.inf, like)
    for j in range(x.size // STRETCH):
        y = load(x, j * STRETCH, like)
        for v in range(j * STRETCH + lanes, (j + 1) * STRETCH, lanes):
            y = maximum(load(x, v, like), y)
        # A NaN in the first vector would hide what it is compared with.
        y = maximum(y, full(-math.inf, like))
        top = maximum(y, top)
        maxima[j] = max_lanes(y)
    best = max_lanes(top)
    if x.size % STRETCH:
        last = type(like)(-math.inf)
        for v in range(x.size // STRETCH * STRETCH, x.size):
            value = type(like)(to_real(x[v]))
            last = max(last, value)
        maxima[x.size // STRETCH] = last
        best = max(best, last)
    return best


@inner
def _kth_largest(a, k):
    """The k-th largest (from 1 on) of numbers, which are put in another order."""
    lo, hi, target = 0, a.size - 1, k - 1
    while lo < hi:
        pivot = a[(lo + hi) // 2]
        i, j = lo, hi
        while i <= j:
            while a[i] > pivot:
                i += 1
            while a[j] < pivot:
                j -= 1
            if i <= j:
                a[i], a[j] = a[j], a[i]
                i += 1
                j -= 1
        if target <= j:
            hi = j
        elif target >= i:
            lo = i
        else:
            break
    return a[target]


@inner
def _before(a, i, b, j):
    """The order of classes: by decreasing logit, the lower class first among equals."""
    return a > b or (a == b and i < j)


@inner
def _rank(values, places, n, k):
    """The first k of n candidates, in their order, are brought to the front."""
    lo, hi = 0, n - 1
    while lo < hi and k < n:
        middle = (lo + hi) // 2
        pivot, place = values[middle], places[middle]
        i, j = lo, hi
        while i <= j:
            while _before(values[i], places[i], pivot, place):
                i += 1
            while _before(pivot, place, values[j], places[j]):
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                places[i], places[j] = places[j], places[i]
                i += 1
                j -= 1
        if k - 1 <= j:
            hi = j
        elif k - 1 >= i:
            lo = i
        else:
            break
    for gap in _GAPS:
        for i in range(gap, k):
            value, place = values[i], places[i]
            j = i
            while j >= gap and _before(value, place, values[j - gap], places[j - gap]):
                values[j], places[j] = values[j - gap], places[j - gap]
                j -= gap
            values[j], places[j] = value, place


@inner
def _candidates(x, maxima, bound, values, places):
    """The finite classes that reach ``bound``, in index order, and how many they are."""
    n = 0
    for j in range((x.size + STRETCH - 1) // STRETCH):
        if maxima[j] >= bound and maxima[j] > -math.inf:
            for v in range(j * STRETCH, min((j + 1) * STRETCH, x.size)):
                value = to_real(x[v])
                if value >= bound and value > -math.inf:
                    values[n], places[n] = value, v
                    n += 1
    return n


@inner
def _tail_block(x, start, stop, least, base, rate, like):
    """The sum of exp2((x - base) rate) over those of [start, stop) whose logits are below ``least``; NaN count."""
    lanes, rate = lanes_of(like), type(like)(rate)
    z = full(0.0, 0.0)
    whole = start + (stop - start) // lanes * lanes
    for u in range(start, whole, _PART * lanes):
        part = full(0.0, like)
        for v in range(u, min(u + _PART * lanes, whole), lanes):
            y = load(x, v, like)
            part += exp2(where(y >= least, -math.inf, y) - base, rate)
        z += widen(part)
    if whole < stop:
        y = load_part(x, whole, stop - whole, -math.inf, like)
        z += widen(exp2(where(y >= least, -math.inf, y) - base, rate))
    return sum_lanes(z)


@inner
def _in_tail(value, v, least, last):
    """Whether a class is not of the head, whose smallest logit is ``least``, ``last`` the last class with it."""
    return -math.inf < value < least or (value == least and v > last)


@inner
def _careful_tail(x, least, last, temperatures, sums):
    """Sums over the tail in float64, relative to its largest class, which is returned; -inf without a tail."""
    top = -math.inf
    for v in range(x.size):
        value = np.float64(to_real(x[v]))
        if _in_tail(value, v, least, last) and value > top:
            top = value
    for t in range(temperatures.size):
        sums[t] = 0.0
    if top == -math.inf:
        return top
    for v in range(x.size):
        value = np.float64(to_real(x[v]))
        if _in_tail(value, v, least, last):
            for t in range(temperatures.size):
                sums[t] += math.exp((value - top) / temperatures[t])
    return top


@inner
def _log_share(a, b):
    """log(e^a / (e^a + e^b)) of finite a and b or -inf, precise near 0 as well."""
    if a == -math.inf:
        return -math.inf
    if b == -math.inf:
        return 0.0
    d = a - b
    return d - math.log1p(math.exp(d)) if d < 0.0 else -math.log1p(math.exp(-d))


@inner
def _select_row(x, k, temperatures, maxima, ranks, values, places, sums):
    """(count, top, least, last, base, usable): the head in the front of values and places, the tail's sums.

    ``least`` is the smallest logit of the head (+inf without one), ``last`` the last class of the head that has it. The
    sums over the tail are relative to ``base``.
    """
    like = maxima[0]
    top = np.float64(_stretch_maxima(x, maxima))
    if not -math.inf < top < math.inf:
        return 0, top, math.inf, -1, top, False
    stretches = (x.size + STRETCH - 1) // STRETCH
    count, least, last, ties = 0, math.inf, -1, 0
    if k > 0:
        bound = type(like)(-math.inf)
        if stretches >= k:
            ranks[:stretches] = maxima[:stretches]
            bound = _kth_largest(ranks[:stretches], k)
        found = _candidates(x, maxima, bound, values, places)
        count = min(k, found)
        _rank(values, places, found, count)
        if count == k:
            least, last = np.float64(values[count - 1]), places[count - 1]
            for j in range(count, found):
                ties += values[j] == values[count - 1]
        else:
            least = -math.inf
    base = least if -math.inf < least < math.inf else top
    for t in range(temperatures.size):
        sums[t] = 0.0
    small, broken = False, False
    for start in range(0, x.size, _BLOCK):
        for t in range(temperatures.size):
            stop = min(start + _BLOCK, x.size)
            sums[t] += _tail_block(
                x, start, stop, type(like)(least), type(like)(base), math.log2(math.e) / temperatures[t], like
            )
    for t in range(temperatures.size):
        broken |= math.isnan(sums[t])
        sums[t] += ties
        small |= sums[t] < _LEAST_SUM
    if small and not broken:
        base = _careful_tail(x, least, last, temperatures, sums)
    return count, top, least, last, base, not broken


def _kernels(sources):
    """The kernels; the digest of all ``sources`` is in their closure, see :mod:`kdcore.cpu.kernels`."""

    @njit(nogil=True, cache=True)
    def select_kernel(
        logits, stride, classes, k, temperatures, work, places, sums, lo, hi, log_probs, indices, n_valid, tail, lse,
        status,
    ):  # fmt: skip
        """The k likeliest classes of rows, in order: log_probs [B, k] at T = 1, indices [B, k], n_valid [B].

        tail [B, t]: log of what all other classes hold at each of the temperatures, of which the first is 1;
        lse [B]: log-sum-exp of the logits at T = 1. Of a row that cannot be used only ``status`` is written.
        """
        _ = sources
        logits, status, work, places, sums = (
            borrowed(logits), borrowed(status), borrowed(work), borrowed(places), borrowed(sums),
        )  # fmt: skip
        log_probs, indices, n_valid, tail = borrowed(log_probs), borrowed(indices), borrowed(n_valid), borrowed(tail)
        values, maxima, ranks = work[0], work[1], work[2]
        for i in range(lo, hi):
            x = logits[i * stride : i * stride + classes]
            count, top, _least, _last, base, usable = _select_row(
                x, k, temperatures, maxima, ranks, values, places, sums
            )
            if not usable:
                condition, status[i, 1] = check_row(x)
                status[i, 0] = TEACHER + condition
                continue
            n_valid[i] = count
            for t in range(temperatures.size):
                inverse = 1.0 / temperatures[t]
                head = 0.0
                for j in range(count):
                    head += math.exp((np.float64(values[j]) - top) * inverse)
                # Both relative to the largest class.
                in_head = math.log(head) if count else -math.inf
                in_tail = (base - top) * inverse + math.log(sums[t]) if sums[t] > 0.0 else -math.inf
                tail[i, t] = _log_share(in_tail, in_head)
                if t == 0:
                    whole = max(in_head, in_tail) + math.log1p(math.exp(-abs(in_head - in_tail)))
                    lse[i] = top + whole
                    for j in range(count):
                        log_probs[i, j] = (np.float64(values[j]) - top) - whole
                        indices[i, j] = places[j]
            for j in range(count, k):
                log_probs[i, j], indices[i, j] = -math.inf, 0

    @njit(nogil=True, cache=True)
    def draw_kernel(
        logits, stride, classes, head_k, draws, temperatures, seeds, work, places, sums, targets, lo, hi, log_weights,
        indices, n_valid, status,
    ):  # fmt: skip
        """The head_k likeliest classes of rows exactly, and ``draws`` draws, with replacement, from the others.

        log_weights (descending) and indices [B, t, head_k + draws], n_valid [B, t], for each of the temperatures.
        seeds [B] of uint64. Of a row that cannot be used only ``status`` is written.
        """
        _ = sources
        logits, status, work, places, sums = (
            borrowed(logits), borrowed(status), borrowed(work), borrowed(places), borrowed(sums),
        )  # fmt: skip
        log_weights, indices, n_valid = borrowed(log_weights), borrowed(indices), borrowed(n_valid)
        values, maxima, ranks = work[0], work[1], work[2]
        for i in range(lo, hi):
            x = logits[i * stride : i * stride + classes]
            count, top, least, last, base, usable = _select_row(
                x, head_k, temperatures, maxima, ranks, values, places, sums
            )
            if not usable:
                condition, status[i, 1] = check_row(x)
                status[i, 0] = TEACHER + condition
                continue
            for t in range(temperatures.size):
                inverse = 1.0 / temperatures[t]
                weights, classes_of = log_weights[i, t], indices[i, t]
                head = 0.0
                for j in range(count):
                    head += math.exp((np.float64(values[j]) - top) * inverse)
                in_head = math.log(head) if count else -math.inf
                in_tail = (base - top) * inverse + math.log(sums[t]) if sums[t] > 0.0 else -math.inf
                share = _log_share(in_head, in_tail)
                for j in range(count):
                    weights[j] = (np.float64(values[j]) - top) * inverse - in_head + share
                    classes_of[j] = places[j]
                n = count
                if in_tail > -math.inf:
                    _fill_targets(targets, seeds[i], t)
                    n = _draw(
                        x, least, last, base, inverse, sums[t], targets, _log_share(in_tail, in_head), n, weights,
                        classes_of,
                    )  # fmt: skip
                n_valid[i, t] = n
                _rank(weights, classes_of, n, n)
                for j in range(n, weights.size):
                    weights[j], classes_of[j] = -math.inf, 0

    return select_kernel, draw_kernel


@inner
def _mixed(z):
    """Steele, Lea & Flood 2014, SplitMix64: a permutation of 64-bit integers that leaves no pattern."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@inner
def _fill_targets(targets, seed, stream):
    """Uniform numbers of [0, 1), ascending."""
    state = _mixed(seed + np.uint64(0x9E3779B97F4A7C15) * np.uint64(stream + 1))
    for j in range(targets.size):
        state += np.uint64(0x9E3779B97F4A7C15)
        targets[j] = np.float64(_mixed(state) >> np.uint64(11)) * 2.0**-53
    for gap in _GAPS:
        for i in range(gap, targets.size):
            target, j = targets[i], i
            while j >= gap and targets[j - gap] > target:
                targets[j] = targets[j - gap]
                j -= gap
            targets[j] = target


@inner
def _draw(x, least, last, base, inverse, total, targets, log_share, n, weights, classes):
    """Appends the classes of the tail on which the ``targets`` fall, with what each of them stands for."""
    passed, drawn, latest, hits = 0.0, 0, -1, 0
    for v in range(x.size):
        value = np.float64(to_real(x[v]))
        if _in_tail(value, v, least, last):
            weight = math.exp((value - base) * inverse)
            if weight > 0.0:
                passed += weight
                latest = v
                hits = 0
                while drawn < targets.size and targets[drawn] * total < passed:
                    drawn += 1
                    hits += 1
                if hits:
                    weights[n] = log_share + math.log(hits / targets.size)
                    classes[n] = v
                    n += 1
        if drawn == targets.size:
            return n
    # What rounding of the sums leaves over is the last class's.
    left = targets.size - drawn
    if hits:
        weights[n - 1] = log_share + math.log((hits + left) / targets.size)
        return n
    weights[n] = log_share + math.log(left / targets.size)
    classes[n] = latest
    return n + 1


select_kernel, draw_kernel = _kernels(_SOURCES)


def _flat(logits):
    """Contiguous rows [B, V] in storage form and read-only, so that no kernel is compiled once more for those."""
    flat = raw_bits(logits.reshape(-1)).view()
    flat.setflags(write=False)
    return flat


class _Scratch:
    """What the kernels need for rows of ``width`` classes, of one thread."""

    __slots__ = ("places", "sums", "work")

    def __init__(self, logits, temperatures):
        width = logits.shape[1]
        self.work = np.empty((3, width), np.float64 if logits.dtype == np.float64 else np.float32)
        self.places = np.empty(width, np.int32)
        self.sums = np.empty(temperatures.size)


def select_rows(logits, k, temperatures, threads):
    """``(log_probs, indices, n_valid, tail, lse, status)`` of contiguous logits [B, V], by :func:`select_kernel`."""
    rows, width = logits.shape
    log_probs, indices = np.empty((rows, k), np.float32), np.empty((rows, k), np.int32)
    n_valid, tail = np.empty(rows, np.int32), np.empty((rows, temperatures.size), np.float32)
    lse, status = np.empty(rows), np.zeros((rows, 2), np.int64)
    flat = _flat(logits)

    def work(lo, hi):
        scratch = _Scratch(logits, temperatures)
        select_kernel(
            flat, width, width, k, temperatures, scratch.work, scratch.places, scratch.sums, lo, hi, log_probs, indices,
            n_valid, tail, lse, status,
        )  # fmt: skip

    _compiled_first(work, (logits.dtype, "select"))
    run_blocks(work, rows, width, threads)
    return log_probs, indices, n_valid, tail, lse, status


def draw_rows(logits, head_k, draws, temperatures, seeds, threads):
    """``(log_weights, indices, n_valid, status)`` of contiguous logits [B, V], by :func:`draw_kernel`."""
    rows, width = logits.shape
    shape = rows, temperatures.size, head_k + draws
    log_weights, indices = np.empty(shape, np.float32), np.empty(shape, np.int32)
    n_valid, status = np.empty(shape[:2], np.int32), np.zeros((rows, 2), np.int64)
    flat = _flat(logits)

    def work(lo, hi):
        scratch = _Scratch(logits, temperatures)
        draw_kernel(
            flat, width, width, head_k, draws, temperatures, seeds, scratch.work, scratch.places, scratch.sums,
            np.empty(draws), lo, hi, log_weights, indices, n_valid, status,
        )  # fmt: skip

    _compiled_first(work, (logits.dtype, "draw"))
    run_blocks(work, rows, width, threads)
    return log_weights, indices, n_valid, status


_compiled: set[tuple[object, ...]] = set()


def _compiled_first(work, key):
    """Compile in the caller's thread (see :func:`kdcore.cpu.pool.run_blocks`), by a call for no rows."""
    if key not in _compiled:
        work(0, 0)
        _compiled.add(key)
