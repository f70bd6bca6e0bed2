"""Row functions of the CUDA engine: device functions that a whole block calls for one row, for reuse in other kernels.

What they compute is written in :mod:`kdcore.formulas`; here are the loops. A kernel that writes the softmax of each row
and its log-sum-exp::

    from numba import cuda, float64
    from kdcore.cuda import rows
    from kdcore.cuda.rows import SCRATCH  # Numba takes a name for a constant, but not an attribute

    @cuda.jit
    def kernel(logits, temperature, like, out, lse):
        shared = cuda.shared.array(SCRATCH, float64)
        i = cuda.blockIdx.x
        x, y = rows.row_of(logits[i]), rows.row_of(out[i])
        m, z = rows.softmax_sums(x, logits.shape[1], temperature, like, shared)
        rows.softmax_row(x, logits.shape[1], m, z, temperature, like, y)
        if cuda.threadIdx.x == 0:
            lse[i] = rows.logsumexp_of(m, z, temperature)

    kernel[B, 128](logits, 2.0, np.float32(0), out, lse)

``examples/cuda_kernel.py`` has another that runs.

Conventions:

- A **row** is (address, stride, tag): where its first class is and how far the next one, in bytes, and a number of its
  storage type (see :mod:`kdcore.cuda.primitives`). :func:`row_of` makes one of an array.
- **Every thread of the block must call**, with the same arguments; functions that take ``shared`` leave the block
  synchronised and return the same values to every thread. ``cuda.blockDim.x`` must be a multiple of 32.
- ``shared``: a shared float64 array of shape :data:`SCRATCH`, the scratch of all reductions.
- ``like``: any float32 or float64 number; vectors are worked in its type. float64 for float64 rows.
- m is a row's maximum, in the type of ``like``; z the sum of exp((x - m) / T), in float64: NaN for a row with NaN or
  +inf, 0 for a row of -inf alone. :func:`first_bad_class` says where.
- An output row may be the input row itself: a thread reads an element before it writes it, and no other thread reads
  that element any more.

A thread reads octets (see :mod:`kdcore.cuda.primitives`), by 16 bytes where the row's address and stride allow, else
one by one: which threads have which classes depends on V alone, and so do all orders of addition. So a result is the
same, bit by bit, whatever the alignment of its row and whatever the rows beside it.
"""

import math

import numpy as np
from numba import cuda

from kdcore import formulas
from kdcore.cuda.primitives import (
    SCRATCH,
    address_of,
    bind,
    cast,
    device,
    exp2_scaled,
    itemsize,
    load_octet,
    load_real,
    log,
    lowest,
    maximum,
    split_rate,
    store_octet,
    store_real,
    to_real,
    two_sum,
)
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import NAN, NO_SUPPORT, POSITIVE_INF

__all__ = [
    "SCRATCH",
    "add_octet",
    "block_maxima",
    "block_sums",
    "block_total",
    "carry",
    "condition_of",
    "cross_entropy_of",
    "exponentials",
    "fill_row",
    "first_bad_class",
    "is_usable",
    "largest",
    "log_softmax_row",
    "logsumexp_of",
    "octet_of",
    "octets_of",
    "rate_of",
    "row_of",
    "scaled",
    "shifted",
    "softmax_row",
    "softmax_sums",
    "total",
    "warp_maximum",
    "warp_total",
    "whole_octets",
    "write_octet",
]

_WARP = 32
_ALL_LANES = 0xFFFFFFFF

_scaled_logit = bind(formulas.scaled_logit)
_rate = bind(formulas.rate)
_log_softmax = bind(formulas.log_softmax)
_cross_entropy = bind(formulas.cross_entropy)


@cuda.jit(device=True)
def row_of(array):
    """The row of a 1-D array of float32, float64, float16, or the uint16 bits of bfloat16."""
    return address_of(array), array.strides[0], array[0]


# --- reductions of a block -----------------------------------------------------------------------------------------


@cuda.jit(device=True)
def warp_maximum(x):
    """The maximum of a warp, in each of its lanes; NaN does not count."""
    offset = _WARP // 2
    while offset > 0:
        x = maximum(x, cuda.shfl_xor_sync(_ALL_LANES, x, offset))
        offset //= 2
    return x


@cuda.jit(device=True)
def warp_total(x):
    """The sum of a float64 over a warp, in each of its lanes."""
    offset = _WARP // 2
    while offset > 0:
        x += cuda.shfl_xor_sync(_ALL_LANES, x, offset)
        offset //= 2
    return x


@cuda.jit(device=True)
def block_maxima(a, b, shared):
    """The maxima of a and of b over the block, in their type; NaN does not count."""
    a, b = warp_maximum(a), warp_maximum(b)
    lane, warp = cuda.threadIdx.x % _WARP, cuda.threadIdx.x // _WARP
    if lane == 0:
        shared[0, warp] = a
        shared[1, warp] = b
    cuda.syncthreads()
    source = lane if lane < cuda.blockDim.x // _WARP else 0
    a, b = cast(shared[0, source], a), cast(shared[1, source], b)
    a, b = warp_maximum(a), warp_maximum(b)
    cuda.syncthreads()  # all have read before the next reduction writes
    return a, b


@device
def carry(sum_, low, part):
    """(sum_, low) + part, where low gathers what the additions lose."""
    sum_, lost = two_sum(sum_, part)
    return sum_, low + lost


@cuda.jit(device=True)
def _warp_sum(sum_, low):
    """Of a warp, in lane 0."""
    offset = _WARP // 2
    while offset > 0:
        other, other_low = (
            cuda.shfl_xor_sync(_ALL_LANES, sum_, offset),
            cuda.shfl_xor_sync(_ALL_LANES, low, offset),
        )
        sum_, lost = two_sum(sum_, other)
        low += other_low + lost
        offset //= 2
    return np.float64(sum_) + np.float64(low)


@cuda.jit(device=True)
def block_sums(a, a_low, b, b_low, c, c_low, shared):
    """The sums of a + a_low, b + b_low and c + c_low over the block, in float64, in an order that its size decides."""
    a_, b_, c_ = _warp_sum(a, a_low), _warp_sum(b, b_low), _warp_sum(c, c_low)
    lane, warp = cuda.threadIdx.x % _WARP, cuda.threadIdx.x // _WARP
    if lane == 0:
        shared[2, warp] = a_
        shared[3, warp] = b_
        shared[4, warp] = c_
    cuda.syncthreads()
    inside = lane < cuda.blockDim.x // _WARP
    a_ = shared[2, lane] if inside else 0.0
    b_ = shared[3, lane] if inside else 0.0
    c_ = shared[4, lane] if inside else 0.0
    a_, b_, c_ = warp_total(a_), warp_total(b_), warp_total(c_)
    cuda.syncthreads()
    return a_, b_, c_


@cuda.jit(device=True)
def block_total(x, shared):
    """The sum of a float64 over the block, infinite where one of them is: the sums of block_sums would be NaN."""
    x = warp_total(x)
    lane, warp = cuda.threadIdx.x % _WARP, cuda.threadIdx.x // _WARP
    if lane == 0:
        shared[2, warp] = x
    cuda.syncthreads()
    x = warp_total(shared[2, lane] if lane < cuda.blockDim.x // _WARP else 0.0)
    cuda.syncthreads()
    return x


# --- octets --------------------------------------------------------------------------------------------------------


@device
def whole_octets(row):
    """Whether a row can be read and written by 16 bytes."""
    return row[1] == itemsize(row[2]) and row[0] % 16 == 0


@device
def octets_of(thread, threads, adjacent):
    """(a, b - a) of a thread's first octet; its next ones are 8 ``threads`` classes further.

    Adjacent ones are for rows of 16-bit elements. Others are read by 16 bytes each, next to those of the next thread.
    """
    if adjacent:
        return np.int64(8) * thread, np.int64(4)
    return np.int64(4) * thread, np.int64(4) * threads


@device
def _element(place, v, end, tag):
    """Class v, which is at a place, or what adds nothing beyond the end."""
    if v < end:
        return load_real(place, tag)
    return cast(-math.inf, to_real(tag))


@device
def _each(x, like):
    return (
        cast(x[0], like), cast(x[1], like), cast(x[2], like), cast(x[3], like),
        cast(x[4], like), cast(x[5], like), cast(x[6], like), cast(x[7], like),
    )  # fmt: skip


@device
def octet_of(row, a, b, end, whole, like):
    """The classes from a and from b in the type of ``like``; -inf from class ``end`` on, unless ``whole``."""
    if whole:
        return _each(load_octet(row[0], a, b, row[2]), like)
    step, tag = row[1], row[2]
    p, q = row[0] + a * step, row[0] + b * step
    return _each(
        (
            _element(p, a, end, tag), _element(p + step, a + 1, end, tag),
            _element(p + 2 * step, a + 2, end, tag), _element(p + 3 * step, a + 3, end, tag),
            _element(q, b, end, tag), _element(q + step, b + 1, end, tag),
            _element(q + 2 * step, b + 2, end, tag), _element(q + 3 * step, b + 3, end, tag),
        ),
        like,
    )  # fmt: skip


@device
def _put(place, v, end, x, tag):
    if v < end:
        store_real(place, x, tag)


@device
def write_octet(row, a, b, end, whole, x):
    """The classes from a and from b become x, those from class ``end`` on are left alone, unless ``whole``."""
    if whole:
        store_octet(row[0], a, b, x, row[2])
    else:
        step, tag = row[1], row[2]
        p, q = row[0] + a * step, row[0] + b * step
        _put(p, a, end, x[0], tag)
        _put(p + step, a + 1, end, x[1], tag)
        _put(p + 2 * step, a + 2, end, x[2], tag)
        _put(p + 3 * step, a + 3, end, x[3], tag)
        _put(q, b, end, x[4], tag)
        _put(q + step, b + 1, end, x[5], tag)
        _put(q + 2 * step, b + 2, end, x[6], tag)
        _put(q + 3 * step, b + 3, end, x[7], tag)


@device
def largest(x):
    """The maximum of an octet."""
    return maximum(maximum(maximum(x[0], x[1]), maximum(x[2], x[3])), maximum(maximum(x[4], x[5]), maximum(x[6], x[7])))


@device
def total(x):
    """The sum of an octet."""
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


@device
def scaled(x, m):
    """d = HEADROOM (x - m)."""
    return _scaled_logit(x, m, cast(HEADROOM, x))


@device
def shifted(x, m):
    """d of an octet."""
    return (
        scaled(x[0], m), scaled(x[1], m), scaled(x[2], m), scaled(x[3], m),
        scaled(x[4], m), scaled(x[5], m), scaled(x[6], m), scaled(x[7], m),
    )  # fmt: skip


@device
def exponentials(d, rate, tag):
    """e of an octet."""
    return (
        exp2_scaled(d[0], rate, tag), exp2_scaled(d[1], rate, tag), exp2_scaled(d[2], rate, tag),
        exp2_scaled(d[3], rate, tag), exp2_scaled(d[4], rate, tag), exp2_scaled(d[5], rate, tag),
        exp2_scaled(d[6], rate, tag), exp2_scaled(d[7], rate, tag),
    )  # fmt: skip


@device
def rate_of(temperature, like):
    """What turns d into an exponent of 2, in two parts in the type of ``like``."""
    return split_rate(_rate(temperature) / HEADROOM, like)


@device
def add_octet(m, z, low, x, rate, tag):
    """(m, z, low) of the classes so far and of an octet x."""
    k = largest(x)
    if k > m:
        factor = exp2_scaled(scaled(m, k), rate, tag)
        z *= factor
        low *= factor
        m = k
    z, low = carry(z, low, total(exponentials(shifted(x, m), rate, tag)))
    return m, z, low


# --- one row -------------------------------------------------------------------------------------------------------


@cuda.jit(device=True)
def fill_row(row, begin, end, value):
    """The classes from begin on, before end, become value."""
    v = begin + cuda.threadIdx.x
    while v < end:
        store_real(row[0] + v * row[1], value, row[2])
        v += cuda.blockDim.x


@cuda.jit(device=True)
def first_bad_class(row, begin, end, shared):
    """Twice the first class that is NaN or +inf, and one more if it is +inf; 2 end if there is none."""
    first = 2 * end
    v = begin + cuda.threadIdx.x
    while v < end:
        value = load_real(row[0] + v * row[1], row[2])
        if not value < math.inf:
            first = min(first, 2 * v + (1 if value == math.inf else 0))
        v += cuda.blockDim.x
    negated, _ = block_maxima(-np.float64(first), 0.0, shared)
    return np.int64(-negated)


@device
def condition_of(first, end):
    """(condition, class) of :mod:`kdcore.rowstatus`, from what first_bad_class found of a row that is not usable."""
    if first < 2 * end:
        return (POSITIVE_INF if first % 2 == 1 else NAN), first // 2
    return NO_SUPPORT, np.int64(0)


@device
def is_usable(z):
    """Whether a row has a softmax, from its z."""
    return z > 0.0


@cuda.jit(device=True)
def softmax_sums(row, size, temperature, like, shared):
    """(m, z) of a row of ``size`` classes."""
    rate = rate_of(temperature, like)
    m, z, low = cast(lowest(like), like), cast(0, like), cast(0, like)
    adjacent = itemsize(row[2]) == 2
    a, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
    step = 8 * cuda.blockDim.x
    if whole_octets(row):
        while a + gap + 4 <= size:
            m, z, low = add_octet(m, z, low, octet_of(row, a, a + gap, size, True, like), rate, row[2])
            a += step
    while a < size:
        m, z, low = add_octet(m, z, low, octet_of(row, a, a + gap, size, False, like), rate, row[2])
        a += step
    m_row, _ = block_maxima(m, m, shared)
    factor = exp2_scaled(scaled(m, m_row), rate, row[2])
    zero = cast(0, like)
    z_row, _, _ = block_sums(z * factor, low * factor, zero, zero, zero, zero, shared)
    return m_row, z_row


@device
def logsumexp_of(m, z, temperature):
    """log of the sum of exp(x / T), in float64."""
    return np.float64(m) / temperature + log(z)


@device
def cross_entropy_of(x, m, z):
    """-log softmax of a class with the logit x, from the row's sums at T = 1; in float64."""
    return _cross_entropy(np.float64(scaled(x, m)), z)


@device
def _softmax_octet(x, m, factor, rate, tag):
    e = exponentials(shifted(x, m), rate, tag)
    return (
        e[0] * factor, e[1] * factor, e[2] * factor, e[3] * factor,
        e[4] * factor, e[5] * factor, e[6] * factor, e[7] * factor,
    )  # fmt: skip


@device
def _log_softmax_octet(x, m, inverse, log_z, tag):
    d = shifted(x, m)
    return (
        _log_softmax(d[0], inverse, log_z), _log_softmax(d[1], inverse, log_z),
        _log_softmax(d[2], inverse, log_z), _log_softmax(d[3], inverse, log_z),
        _log_softmax(d[4], inverse, log_z), _log_softmax(d[5], inverse, log_z),
        _log_softmax(d[6], inverse, log_z), _log_softmax(d[7], inverse, log_z),
    )  # fmt: skip


def _row_writer(octet):
    """The function that writes a row by octets, each from octet(x, m, a, b, tag)."""

    @cuda.jit(device=True)
    def write(row, size, m, first, second, like, out):
        adjacent = itemsize(row[2]) == 2
        start, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, adjacent)
        step = 8 * cuda.blockDim.x
        whole_out = whole_octets(row) and whole_octets(out) and (adjacent or itemsize(out[2]) != 2)
        # Backwards, because the last classes were read last and are still in the cache.
        a = start + (size - 1 - start) // step * step
        while a >= 0 and not (whole_out and a + gap + 4 <= size):
            x = octet_of(row, a, a + gap, size, False, like)
            write_octet(out, a, a + gap, size, False, octet(x, m, first, second, row[2]))
            a -= step
        while a >= 0:
            x = octet_of(row, a, a + gap, size, True, like)
            write_octet(out, a, a + gap, size, True, octet(x, m, first, second, row[2]))
            a -= step

    return write


_write_softmax = _row_writer(_softmax_octet)
_write_log_softmax = _row_writer(_log_softmax_octet)


@device
def softmax_row(row, size, m, z, temperature, like, out):
    """The row ``out`` becomes softmax(x / T), from the sums of x."""
    _write_softmax(row, size, m, cast(1.0 / z, like), rate_of(temperature, like), like, out)


@device
def log_softmax_row(row, size, m, z, temperature, like, out):
    """The row ``out`` becomes log softmax(x / T), from the sums of x."""
    inverse = cast(1.0 / HEADROOM / temperature, like)
    _write_log_softmax(row, size, m, inverse, cast(log(z), like), like, out)
