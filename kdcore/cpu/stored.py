"""Kernels of stored rows: ids in few bits, log-probabilities at another temperature, and what a row must hold.

Letters: B rows of k entries, in order of decreasing value. Values are in storage form (see
:mod:`kdcore.cpu.primitives`).
"""

import math
from functools import cache

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from kdcore.cpu.kernels import _SOURCES
from kdcore.cpu.primitives import exp2, exprel, inner, log, raw_bits
from kdcore.cpu.rows import lanes_of
from kdcore.cpu.simd import LANES, borrowed, full, load, load_part, store, store_part, sum_lanes, to_real, where

__all__ = [
    "BAD_COUNT",
    "BAD_ID",
    "BAD_ORDER",
    "BAD_PADDING",
    "BAD_SUM",
    "BAD_TAIL",
    "BAD_TAIL_AT",
    "BAD_VALUE",
    "NO_VALUE",
    "REPEATED_ID",
    "check_dense_rows",
    "check_rows",
    "decode_rows",
    "pack_ids",
    "packed_width",
    "unpack_ids",
]

#: What :func:`check_rows` finds, beside where and two numbers.
(
    OK,
    BAD_COUNT,
    BAD_VALUE,
    NO_VALUE,
    BAD_ORDER,
    BAD_ID,
    REPEATED_ID,
    BAD_PADDING,
    BAD_TAIL,
    BAD_SUM,
    BAD_TAIL_AT,
) = range(11)

#: A rounded log-probability may exceed 0 by so much.
_ABOVE_ZERO = 1e-3
_LOG2_E = np.float32(math.log2(math.e))
#: Below, a log-mass may have become -inf in float32.
_LEAST = -3.3e38


def packed_width(k, bits):
    """Bytes of k ids of so many bits each."""
    return (k * bits + 7) // 8


@inner
def _power_sum(x, top, rate):
    """The sum of exp2((x - top) rate) over the values of a row, in float32; ``top`` is the first and largest."""
    lanes = lanes_of(rate)
    whole = x.size // lanes * lanes
    z = full(0.0, rate)
    for v in range(0, whole, lanes):
        z += exp2(load(x, v, rate) - top, rate)
    if whole < x.size:
        z += exp2(load_part(x, whole, x.size - whole, -math.inf, rate) - top, rate)
    return sum_lanes(z)


#: Up to so many bits an id lies within the four bytes that begin where it does.
_NARROW = 25


def _octet(bits):
    """``octet(packed, index, ids, at)``: the eight ids from the byte ``index`` on go to ids[at : at + 8].

    32 bytes beyond the index must be readable. The places of the ids in the bytes are constants, so that one shuffle of
    bytes, one shift and one mask find four of them.
    """
    places = [[(j * bits >> 3) - (half * 4 * bits >> 3) for j in range(half * 4, half * 4 + 4)] for half in range(2)]
    bytes_, words = ir.VectorType(ir.IntType(8), 16), ir.VectorType(ir.IntType(32), 4)

    @intrinsic
    def octet(typingctx, packed, index, ids, at):
        def generate(context, builder, signature, args):
            data, target = (
                context.make_array(kind)(context, builder, value).data
                for kind, value in ((signature.args[0], args[0]), (signature.args[2], args[2]))
            )
            for half in range(2):
                start = builder.add(args[1], ir.Constant(args[1].type, half * 4 * bits >> 3))
                address = builder.bitcast(builder.gep(data, [start], inbounds=False), bytes_.as_pointer())
                mask = ir.Constant(
                    ir.VectorType(ir.IntType(32), 16), [place + b for place in places[half] for b in range(4)]
                )
                window = builder.shuffle_vector(builder.load(address, align=1), ir.Constant(bytes_, ir.Undefined), mask)
                shifts = ir.Constant(words, [j * bits & 7 for j in range(half * 4, half * 4 + 4)])
                found = builder.and_(
                    builder.lshr(builder.bitcast(window, words), shifts), ir.Constant(words, [(1 << bits) - 1] * 4)
                )
                place = builder.add(args[3], ir.Constant(args[3].type, half * 4))
                address = builder.gep(target, [place], inbounds=False)
                builder.store(found, builder.bitcast(address, words.as_pointer()), align=4)
            return context.get_dummy_value()

        return types.void(packed, types.intp, ids, types.intp), generate

    return octet


@cache
def _unpack_kernel(bits):
    """The inverse of the pack kernel, for so many bits each; ids that are not narrow take the plain loop alone."""
    told_apart = _SOURCES, bits
    octet, width_of = _octet(min(bits, _NARROW)), 1 if bits <= _NARROW else 0

    @njit(nogil=True, cache=True)
    def unpack_kernel(packed, width, ids):
        _ = told_apart
        packed, ids = borrowed(packed), borrowed(ids)
        for i in range(ids.shape[0]):
            start, row = i * width, ids[i]
            octets = row.size // 8 * width_of
            done = 0
            while done < octets and start + done * bits + 32 <= packed.size:
                octet(packed, start + done * bits, row, done * 8)
                done += 1
            for j in range(done * 8, row.size):
                bit, window = j * bits, np.uint64(0)
                for b in range((bit + bits + 7) // 8 - bit // 8):
                    window |= np.uint64(packed[start + bit // 8 + b]) << np.uint64(8 * b)
                row[j] = (window >> np.uint64(bit & 7)) & np.uint64((1 << bits) - 1)

    return unpack_kernel


def _kernels(sources):
    """The kernels; the digest of all ``sources`` is in their closure, see :mod:`kdcore.cpu.kernels`."""

    @njit(nogil=True, cache=True)
    def pack_kernel(ids, bits, packed):
        """ids [B, k], each of so many bits, into packed [B, bytes], the lowest bit first."""
        _ = sources
        for i in range(ids.shape[0]):
            row, window, held, at = packed[i], np.uint64(0), 0, 0
            for j in range(ids.shape[1]):
                window |= np.uint64(ids[i, j]) << np.uint64(held)
                held += bits
                while held >= 8:
                    row[at] = window & np.uint64(255)
                    window >>= np.uint64(8)
                    held -= 8
                    at += 1
            if held:
                row[at] = window & np.uint64(255)

    @njit(nogil=True, cache=True)
    def decode_kernel(values, tail, inverse, sums, out):
        """out [B, k] = log p at a temperature, from log p at 1 and the tail's log-mass at that temperature.

        log p_T = log p / T - log Σ_head p^(1/T) + log(1 - tail mass): the head gets what the tail leaves, whatever the
        rounding of the values. Values are taken relative to the largest before they are divided: at a low
        temperature the difference of the quotients would have no digits left. ``sums`` is scratch of a vector's
        length, of positive numbers.
        """
        _ = sources
        values, tail, sums, out = borrowed(values), borrowed(tail), borrowed(sums), borrowed(out)
        rows, k = out.shape
        like = np.float32(0)
        lanes, inverse = lanes_of(like), np.float32(inverse)
        rate = _LOG2_E * inverse
        whole = k // lanes * lanes
        for first in range(0, rows, lanes):  # so many rows at a time, whose logarithms are one vector
            count = min(lanes, rows - first)
            for i in range(count):
                x = values[(first + i) * k : (first + i + 1) * k]
                sums[i] = _power_sum(x, np.float32(to_real(x[0])), rate)
            share = load_part(tail, first, count, -math.inf, like)
            # 1 - e^x without cancellation.
            small = where(share > np.float32(-0.5), share, np.float32(-0.5))
            kept = where(share > np.float32(-0.5), -small * exprel(small), np.float32(1) - exp2(share, _LOG2_E))
            store(sums, 0, log(load(sums, 0, like)) - log(kept))
            for i in range(count):
                x, y = values[(first + i) * k : (first + i + 1) * k], out[first + i]
                top, log_sum = np.float32(to_real(x[0])), sums[i]
                for v in range(0, whole, lanes):
                    store(y, v, (load(x, v, like) - top) * inverse - log_sum)
                if whole < k:
                    rest = load_part(x, whole, k - whole, -math.inf, like)
                    store_part(y, whole, k - whole, (rest - top) * inverse - log_sum)

    @njit(nogil=True, cache=True)
    def check_kernel(values, ids, n_valid, tail, temperatures, vocab_size, tolerance, unit, seen):
        """(code, row, entry, number, other) of the first row that is not as it must be; code 0: all are.

        tail [B, t] at the temperatures, of which the first is 1; of samples, which have no tail, [B, 0]. A row may
        miss probability 1 by ``tolerance``; values are off by at most ``unit`` of themselves. ``seen`` is scratch of a
        power of two beyond 2 k.
        """
        _ = sources
        values, ids, n_valid = borrowed(values), borrowed(ids), borrowed(n_valid)
        tail, seen = borrowed(tail), borrowed(seen)
        rows, k = ids.shape
        mask = seen.size - 1
        seen[:] = -1
        for i in range(rows):
            x, count = values[i * k : (i + 1) * k], np.int64(n_valid[i])
            if not 1 <= count <= k:
                return BAD_COUNT, i, 0, float(count), float(k)
            above = math.inf
            for j in range(count):
                value = np.float64(to_real(x[j]))
                if value == -math.inf:
                    return NO_VALUE, i, j, value, float(count)
                if not value <= _ABOVE_ZERO:
                    return BAD_VALUE, i, j, value, 0.0
                if value > above:
                    return BAD_ORDER, i, j, value, above
                above = value
                id_ = np.int64(ids[i, j])
                if not 0 <= id_ < vocab_size:
                    return BAD_ID, i, j, float(id_), float(vocab_size)
                # A table of what the row has had: the row's number tells its entries from older ones.
                key, place = (np.int64(i) << 32) | id_, (id_ * 0x9E3779B1) & mask
                while seen[place] >> 32 == i and seen[place] != -1:
                    if seen[place] == key:
                        return REPEATED_ID, i, j, float(id_), 0.0
                    place = (place + 1) & mask
                seen[place] = key
            for j in range(count, k):
                value = np.float64(to_real(x[j]))
                if value != -math.inf or ids[i, j] != 0:
                    return BAD_PADDING, i, j, value, float(ids[i, j])
            top = np.float32(to_real(x[0]))
            total = math.exp(top) * _power_sum(x, top, _LOG2_E)
            if tail.shape[1] == 0:
                if abs(total - 1.0) > tolerance:
                    return BAD_SUM, i, 0, total, 0.0
                continue
            for t in range(tail.shape[1]):
                share = np.float64(tail[i, t])
                if not share < 0.0:
                    return BAD_TAIL, i, t, share, 0.0
            mass, others = np.float64(tail[i, 0]), vocab_size - count
            if abs(total + math.exp(mass) - 1.0) > tolerance:
                return BAD_SUM, i, 0, total, math.exp(mass)
            for t in range(1, tail.shape[1]):
                share, beta = np.float64(tail[i, t]), 1.0 / temperatures[t]
                if mass == -math.inf or others == 0:
                    # Either there is no tail, or its log-mass at 1 was beyond float32.
                    if share > _LEAST * beta or (mass > -math.inf and others == 0):
                        return BAD_TAIL_AT, i, t, share, mass
                    continue
                # log Σ_tail p^(1/T), against what the mass at 1, the number of classes and the largest allow: none is
                # likelier than the head's last, and evenly spread they give the most, for T > 1 (the least below).
                head = top * beta + math.log(_power_sum(x, top, _LOG2_E * np.float32(beta)))
                found = head + share - math.log(-math.expm1(share))
                even = (1.0 - beta) * math.log(np.float64(others)) + beta * mass
                peaked = mass + (beta - 1.0) * above
                low, high = (peaked, even) if beta < 1.0 else (even, peaked)
                # The head's sum and its last value are off by the rounding of values.
                slack = 1e-2 + unit * abs(above) * (beta + abs(beta - 1.0)) + 1e-6 * abs(low)
                if not (low - slack <= found or (share == -math.inf and low < _LEAST)) or found > high + slack:
                    return BAD_TAIL_AT, i, t, share, (low if found < low else high)
        return OK, 0, 0, 0.0, 0.0

    @njit(nogil=True, cache=True)
    def check_dense_kernel(values, classes, tolerance):
        """As the kernel above, of log-probabilities of all classes; no tolerance: of numbers that must be finite."""
        _ = sources
        values = borrowed(values)
        for i in range(values.size // classes):
            total = 0.0
            for v in range(classes):
                value = np.float64(to_real(values[i * classes + v]))
                if tolerance == 0.0:
                    if not -math.inf < value < math.inf:
                        return BAD_VALUE, i, v, value, 0.0
                elif not value <= _ABOVE_ZERO:
                    return BAD_VALUE, i, v, value, 0.0
                else:
                    total += math.exp(value)
            if tolerance > 0.0 and abs(total - 1.0) > tolerance:
                return BAD_SUM, i, 0, total, 0.0
        return OK, 0, 0, 0.0, 0.0

    return pack_kernel, decode_kernel, check_kernel, check_dense_kernel


pack_kernel, decode_kernel, check_kernel, check_dense_kernel = _kernels(_SOURCES)


def _readable(array):
    view = array.view()
    view.setflags(write=False)
    return view


def pack_ids(ids, bits):
    """Rows of ids, int32 [B, k], as uint8 [B, bytes]: ``bits`` of each, the lowest first."""
    packed = np.empty((ids.shape[0], packed_width(ids.shape[1], bits)), np.uint8)
    pack_kernel(ids, bits, packed)
    return packed


def unpack_ids(packed, k, bits):
    """What :func:`pack_ids` has packed."""
    ids = np.empty((packed.shape[0], k), np.int32)
    _unpack_kernel(bits)(_readable(packed.reshape(-1)), packed.shape[1], ids)
    return ids


_ONES = np.ones(LANES[types.float32], np.float32)


def decode_rows(values, tail, temperature):
    """Stored log-probabilities [B, k] at T = 1 as float32 at ``temperature``; ``tail`` float32 [B], at ``temperature``.

    Without a tail, that is where it is -inf, the rows sum to 1.
    """
    rows, k = values.shape
    out = np.empty((rows, k), np.float32)
    if rows:
        flat = _readable(raw_bits(values.reshape(-1)))
        decode_kernel(flat, _readable(tail), 1.0 / temperature, _ONES, out)
    return out


def check_rows(values, ids, n_valid, tail, temperatures, vocab_size, tolerance, unit):
    """The first finding of :func:`check_kernel`."""
    seen = np.empty(1 << (2 * ids.shape[1]).bit_length(), np.int64)
    flat = _readable(raw_bits(values.reshape(-1)))
    return check_kernel(
        flat, _readable(ids), _readable(n_valid), _readable(tail), temperatures, vocab_size, tolerance, unit, seen
    )


def check_dense_rows(values, tolerance):
    """The first finding of :func:`check_dense_kernel`, of contiguous values [B, V]."""
    return check_dense_kernel(_readable(raw_bits(values.reshape(-1))), values.shape[1], tolerance)
