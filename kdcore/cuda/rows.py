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
- What turns logits into exponents of 2 has two ways, :class:`Way`. The **quick** one, for rows in float32, is one
  multiply-add, x c - r with r = m c as it is rounded: an offset which all classes share, and which their sum is freed
  from in the end. It is no good where m c is large (:func:`is_large`), or where differences of logits overflow; the
  maximum of some of a row's classes is no less than :func:`floor_of`, so that it is not large either. The **careful**
  one, for those rows and for float64, scales x - m so that nothing overflows, and multiplies by c then.
- An output row may be the input row itself: a thread reads an element before it writes it, and no other thread reads
  that element any more.

A thread reads octets (see :mod:`kdcore.cuda.primitives`), by 16 bytes where the row's address and stride allow, else
one by one: which threads have which classes depends on V alone, and so do all orders of addition. So a result is the
same, bit by bit, whatever the alignment of its row and whatever the rows beside it.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import cuda

from kdcore import formulas
from kdcore.cuda.primitives import (
    SCRATCH,
    address_of,
    bind,
    cast,
    device,
    exp2,
    is_single,
    itemsize,
    load_octet,
    load_real,
    log,
    lowest,
    maximum,
    product,
    store_octet,
    store_real,
    to_real,
)
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import NAN, NO_SUPPORT, POSITIVE_INF

__all__ = [
    "SCRATCH",
    "Way",
    "block_maxima",
    "block_sums",
    "block_total",
    "carry",
    "condition_of",
    "cross_entropy_of",
    "exp2_small",
    "factor_of",
    "fill_row",
    "first_bad_class",
    "floor_of",
    "is_large",
    "is_usable",
    "lane_and_warp",
    "largest",
    "log_softmax_row",
    "logsumexp_of",
    "octet_of",
    "octets_of",
    "rate_of",
    "row_of",
    "scaled",
    "softmax_row",
    "softmax_sums",
    "total",
    "warp_maximum",
    "warp_total",
    "warp_totals",
    "way_of",
    "whole_octets",
    "write_octet",
]

_WARP = 32
_ALL_LANES = 0xFFFFFFFF

_LN2 = math.log(2.0)
#: Beyond, the rounding of m c is more of an exponent than the quick way bears: 1 / 16.
_LARGE = 2.0**20

_exponent = bind(formulas.exponent)
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
def lane_and_warp():
    """Which of its warp's threads this one is, and which warp that is. By bits: quotients that round down are long."""
    return cuda.threadIdx.x & 31, cuda.threadIdx.x >> 5


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
    lane, warp = lane_and_warp()
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
    """(sum_, low) + part, where low is what the additions have lost, to be added with the next part (Kahan)."""
    part += low
    grown = sum_ + part
    return grown, part - (grown - sum_)


@cuda.jit(device=True)
def warp_totals(a, b, c, d):
    """The sums of four float64 over a warp, by 6 shuffles, not 20: of a in lanes 0 to 7, then of c, of b and of d."""
    lane, _ = lane_and_warp()
    upper = lane >= 16
    a, b = (b, a) if upper else (a, b)  # a lane keeps a or b, and gives the other to one that keeps that
    c, d = (d, c) if upper else (c, d)
    a += cuda.shfl_xor_sync(_ALL_LANES, b, 16)
    c += cuda.shfl_xor_sync(_ALL_LANES, d, 16)
    a, c = (c, a) if lane & 8 != 0 else (a, c)
    a += cuda.shfl_xor_sync(_ALL_LANES, c, 8)
    a += cuda.shfl_xor_sync(_ALL_LANES, a, 4)
    a += cuda.shfl_xor_sync(_ALL_LANES, a, 2)
    return a + cuda.shfl_xor_sync(_ALL_LANES, a, 1)


@cuda.jit(device=True)
def block_sums(a, b, c, d, shared):
    """The sums of four float64 over the block, in an order that its size decides."""
    # Rows 2 to 5 of the scratch are those of the warps, row 6 is that of the block: so the next call may write the
    # former before all have read the latter.
    lane, warp = lane_and_warp()
    own = warp_totals(a, b, c, d)
    if lane & 7 == 0:
        shared[2 + (lane >> 3), warp] = own
    cuda.syncthreads()
    if warp == 0:
        inside = lane < cuda.blockDim.x // _WARP
        a, c = shared[2, lane] if inside else 0.0, shared[3, lane] if inside else 0.0
        b, d = shared[4, lane] if inside else 0.0, shared[5, lane] if inside else 0.0
        own = warp_totals(a, b, c, d)
        if lane & 7 == 0:
            shared[6, lane >> 3] = own
    cuda.syncthreads()
    return shared[6, 0], shared[6, 2], shared[6, 1], shared[6, 3]


@cuda.jit(device=True)
def block_total(x, shared):
    """The sum of a float64 over the block."""
    x = warp_total(x)
    lane, warp = lane_and_warp()
    if lane == 0:
        shared[0, warp] = x
    cuda.syncthreads()
    x = warp_total(shared[0, lane] if lane < cuda.blockDim.x // _WARP else 0.0)
    cuda.syncthreads()
    return x


# --- octets --------------------------------------------------------------------------------------------------------


@device
def whole_octets(row):
    """Whether a row can be read and written by 16 bytes."""
    return row[1] == itemsize(row[2]) and row[0] & 15 == 0


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
def rate_of(temperature, like):
    """c, what turns x - m into an exponent of 2, in the type of ``like``."""
    return cast(_rate(temperature), like)


@device
def is_large(m, c):
    """Whether a maximum is too large for the quick way."""
    return not abs(m * c) <= _LARGE


def floor_of(rate):
    """What maxima of the quick way begin with: just so low that a row of which it is the maximum needs care."""
    return -2.0 * _LARGE / rate


@device
def factor_of(exponent, like):
    """2 to the power of a float64, with an exponential in the type of ``like``, but without the rounding to it."""
    rounded = cast(exponent, like)
    if rounded == -math.inf:
        return 0.0
    return np.float64(exp2(rounded)) * (1.0 + _LN2 * (exponent - np.float64(rounded)))


@device
def exp2_small(x):
    """2 to the power of a float64 of at most 1 / 4, by its series: what is left out is less than 1e-15."""
    x *= _LN2
    e = 1.0 + x * (1.0 / 10)
    e = 1.0 + x * (1.0 / 9) * e
    e = 1.0 + x * (1.0 / 8) * e
    e = 1.0 + x * (1.0 / 7) * e
    e = 1.0 + x * (1.0 / 6) * e
    e = 1.0 + x * (1.0 / 5) * e
    e = 1.0 + x * (1.0 / 4) * e
    e = 1.0 + x * (1.0 / 3) * e
    e = 1.0 + x * (1.0 / 2) * e
    return 1.0 + x * e


class Way(NamedTuple):
    """Device functions by which logits become exponents of 2; d is what of a logit is relative to r.

    floor(quick, like)  what a maximum begins with: in the quick way :func:`floor_of` the rate
    place(m, c)         r
    shift(x, r, c)      d
    moved(r, to)        what d changes by when r becomes ``to``
    offset(r, m, c)     the same when r becomes what it would be without rounding, in float64
    exponent(d, c)      the exponent of 2
    ratio(ratio)        the student's d is multiplied by that to be like the teacher's
    unit(unit)          a d of the teacher in logits that are scaled by HEADROOM: HEADROOM / c, or 1
    """

    floor: Any
    place: Any
    shift: Any
    moved: Any
    offset: Any
    exponent: Any
    ratio: Any
    unit: Any


@device
def _quick_floor(quick, like):
    return quick


@device
def _quick_place(m, c):
    return product(m, c)  # differences of two are of both as they are rounded


@device
def _quick_shift(x, r, c):
    return _exponent(x, c, r)


@device
def _quick_moved(r, to):
    return r - to


@device
def _quick_offset(r, m, c):
    return np.float64(r) - np.float64(m) * np.float64(c)


@device
def _quick_exponent(d, c):
    return d


@device
def _quick_ratio(ratio):
    return cast(1, ratio)


@device
def _quick_unit(unit):
    return unit


@device
def _careful_floor(quick, like):
    return cast(lowest(like), like)


@device
def _careful_place(m, c):
    return m


@device
def _careful_shift(x, r, c):
    return scaled(x, r)


@device
def _careful_offset(r, m, c):
    return np.float64(scaled(r, m))


@device
def _careful_exponent(d, c):
    return d * (c * cast(1.0 / HEADROOM, c))


@device
def _careful_ratio(ratio):
    return ratio


@device
def _careful_unit(unit):
    return 1.0


@cache
def way_of(careful: bool) -> Way:
    """The quick way, or the careful one."""
    if careful:
        return Way(
            _careful_floor, _careful_place, _careful_shift, scaled, _careful_offset, _careful_exponent, _careful_ratio,
            _careful_unit,
        )  # fmt: skip
    return Way(
        _quick_floor, _quick_place, _quick_shift, _quick_moved, _quick_offset, _quick_exponent, _quick_ratio,
        _quick_unit,
    )  # fmt: skip


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


def _sums_of_a_row(careful):
    """The function that is :func:`softmax_sums` in one of the ways, and the one of an octet's exponentials."""
    floor, place, shift, moved, offset, exponent, _, _ = way_of(careful)

    @device
    def exponentials(x, r, c):
        return (
            exp2(exponent(shift(x[0], r, c), c)), exp2(exponent(shift(x[1], r, c), c)),
            exp2(exponent(shift(x[2], r, c), c)), exp2(exponent(shift(x[3], r, c), c)),
            exp2(exponent(shift(x[4], r, c), c)), exp2(exponent(shift(x[5], r, c), c)),
            exp2(exponent(shift(x[6], r, c), c)), exp2(exponent(shift(x[7], r, c), c)),
        )  # fmt: skip

    @device
    def add_octet(m, r, z, low, x, c):
        """(m, r, z, low) of the classes so far and of an octet x."""
        k = largest(x)
        if k > m:
            to = place(k, c)
            factor = exp2(exponent(moved(r, to), c))
            m, r = k, to
            z *= factor
            low *= factor
        z, low = carry(z, low, total(exponentials(x, r, c)))
        return m, r, z, low

    @cuda.jit(device=True)
    def sums(row, size, c, like, shared):
        m, z, low = floor(cast(_floor_of(c), like), like), cast(0, like), cast(0, like)
        r = place(m, c)
        a, gap = octets_of(cuda.threadIdx.x, cuda.blockDim.x, itemsize(row[2]) == 2)
        step = 8 * cuda.blockDim.x
        if whole_octets(row):
            while a + gap + 4 <= size:
                m, r, z, low = add_octet(m, r, z, low, octet_of(row, a, a + gap, size, True, like), c)
                a += step
        while a < size:
            m, r, z, low = add_octet(m, r, z, low, octet_of(row, a, a + gap, size, False, like), c)
            a += step
        m_row, _ = block_maxima(m, m, shared)
        factor = factor_of(exponent(offset(r, m_row, c), np.float64(c)), like)
        z_row, _, _, _ = block_sums((np.float64(z) + np.float64(low)) * factor, 0.0, 0.0, 0.0, shared)
        return m_row, z_row

    return sums, exponentials


_floor_of = device(floor_of)
_quick_sums, _quick_exponentials = _sums_of_a_row(careful=False)
_careful_sums, _careful_exponentials = _sums_of_a_row(careful=True)


@cuda.jit(device=True)
def softmax_sums(row, size, temperature, like, shared):
    """(m, z) of a row of ``size`` classes."""
    c = rate_of(temperature, like)
    if is_single(like):
        m, z = _quick_sums(row, size, c, like, shared)
        if is_usable(z) and not is_large(m, c):
            return m, z
    return _careful_sums(row, size, c, like, shared)


@device
def logsumexp_of(m, z, temperature):
    """log of the sum of exp(x / T), in float64."""
    return np.float64(m) / temperature + log(z)


@device
def cross_entropy_of(x, m, z):
    """-log softmax of a class with the logit x, from the row's sums at T = 1; in float64."""
    return _cross_entropy(np.float64(scaled(x, m)), z)


@device
def _times(e, factor):
    return (
        e[0] * factor, e[1] * factor, e[2] * factor, e[3] * factor,
        e[4] * factor, e[5] * factor, e[6] * factor, e[7] * factor,
    )  # fmt: skip


@device
def _quick_softmax_octet(x, r, factor, c):
    return _times(_quick_exponentials(x, r, c), factor)


@device
def _careful_softmax_octet(x, r, factor, c):
    return _times(_careful_exponentials(x, r, c), factor)


@device
def _log_softmax_octet(x, m, inverse, log_z):
    return (
        _log_softmax(scaled(x[0], m), inverse, log_z), _log_softmax(scaled(x[1], m), inverse, log_z),
        _log_softmax(scaled(x[2], m), inverse, log_z), _log_softmax(scaled(x[3], m), inverse, log_z),
        _log_softmax(scaled(x[4], m), inverse, log_z), _log_softmax(scaled(x[5], m), inverse, log_z),
        _log_softmax(scaled(x[6], m), inverse, log_z), _log_softmax(scaled(x[7], m), inverse, log_z),
    )  # fmt: skip


def _row_writer(octet):
    """The function that writes a row by octets, each from octet(x, m, first, second)."""

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
            write_octet(out, a, a + gap, size, False, octet(x, m, first, second))
            a -= step
        while a >= 0:
            x = octet_of(row, a, a + gap, size, True, like)
            write_octet(out, a, a + gap, size, True, octet(x, m, first, second))
            a -= step

    return write


_write_softmax_quickly = _row_writer(_quick_softmax_octet)
_write_softmax_carefully = _row_writer(_careful_softmax_octet)
_write_log_softmax = _row_writer(_log_softmax_octet)


@device
def softmax_row(row, size, m, z, temperature, like, out):
    """The row ``out`` becomes softmax(x / T), from the sums of x."""
    c, factor = rate_of(temperature, like), cast(1.0 / z, like)
    if is_single(like) and not is_large(m, c):
        r = _quick_place(m, c)
        factor *= exp2(cast(_quick_offset(r, m, c), like))
        _write_softmax_quickly(row, size, r, factor, c, like, out)
    else:
        _write_softmax_carefully(row, size, m, factor, c, like, out)


@device
def log_softmax_row(row, size, m, z, temperature, like, out):
    """The row ``out`` becomes log softmax(x / T), from the sums of x."""
    inverse = cast(1.0 / HEADROOM / temperature, like)
    _write_log_softmax(row, size, m, inverse, cast(log(z), like), like, out)
