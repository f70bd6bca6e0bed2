"""What the CPU kernels need from the compiler: conversions of 16-bit floats, a vectorising maximum, exp2.

Numba has no float16 or bfloat16 on the CPU, so these travel as their bits: **float16 as int16, bfloat16 as uint16**.
"""

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

__all__ = ["exp2_scaled", "fast_max", "from_real", "raw_bits", "split_rate", "to_real"]

_F16, _F32, _F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def raw_bits(array):
    """A view that Numba can type: 16-bit floats as the integers described above, everything else as it is."""
    if array.dtype == np.float16:
        return array.view(np.int16)
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16)
    return array


def _unary(result, argument, generate):
    """An intrinsic of one argument from an LLVM instruction."""

    @intrinsic
    def instruction(typingctx, x):
        if x != argument:
            return None
        return result(argument), lambda context, builder, signature, args: generate(builder, args[0])

    return instruction


_float16_to_float32 = _unary(types.float32, types.int16, lambda b, x: b.fpext(b.bitcast(x, _F16), _F32))
_float32_to_float16 = _unary(types.int16, types.float32, lambda b, x: b.bitcast(b.fptrunc(x, _F16), _I16))
_bfloat16_to_float32 = _unary(
    types.float32, types.uint16, lambda b, x: b.bitcast(b.shl(b.zext(x, _I32), ir.Constant(_I32, 16)), _F32)
)
_float32_bits = _unary(types.int32, types.float32, lambda b, x: b.bitcast(x, _I32))
_float32_from_bits = _unary(types.float32, types.int32, lambda b, x: b.bitcast(x, _F32))
_float64_bits = _unary(types.int64, types.float64, lambda b, x: b.bitcast(x, _I64))
_float64_from_bits = _unary(types.float64, types.int64, lambda b, x: b.bitcast(x, _F64))


@intrinsic
def _fma(typingctx, x, y, z):
    """x * y + z with one rounding."""
    if x not in (types.float32, types.float64) or x != y or x != z:
        return None
    return x(x, x, x), lambda context, builder, signature, args: builder.fma(*args)


@intrinsic
def fast_max(typingctx, x, y):
    """The maximum of two numbers that are not NaN.

    ``max(x, y)`` and ``y if y > x else x`` leave a loop scalar; llvm.maxnum with these flags becomes a vector
    reduction. NaN must be looked for apart: under nnan a NaN yields an arbitrary maximum.
    """
    if x not in (types.float32, types.float64) or x != y:
        return None

    def generate(context, builder, signature, args):
        kind = args[0].type
        name = "llvm.maxnum.f32" if kind == _F32 else "llvm.maxnum.f64"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind, kind]), name)
        return builder.call(function, args, fastmath=("nnan", "nsz", "reassoc"))

    return x(x, x), generate


def to_real(x):
    """A stored element as float32 or float64. For compiled code only."""
    raise TypeError("to_real is for compiled code")


@overload(to_real)
def _to_real(x):
    if isinstance(x, types.Float):
        return lambda x: x
    if x == types.int16:
        return lambda x: _float16_to_float32(x)
    if x == types.uint16:
        return lambda x: _bfloat16_to_float32(x)
    return None


@njit(fastmath=False)
def _float32_to_bfloat16(x):
    """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.uint32(_float32_bits(x))
    if math.isnan(x):
        return np.uint16(0x7FC0)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


def from_real(x, like):
    """A real number in the storage type of ``like``, rounded to nearest even. For compiled code only."""
    raise TypeError("from_real is for compiled code")


@overload(from_real)
def _from_real(x, like):
    if isinstance(like, types.Float):
        return lambda x, like: type(like)(x)
    if like == types.int16:
        return lambda x, like: _float32_to_float16(np.float32(x))
    if like == types.uint16:
        return lambda x, like: _float32_to_bfloat16(np.float32(x))
    return None


# exp2(x) = 2^n 2^r with n the nearest integer and |r| <= 1/2. Adding MAGIC = 1.5 * 2^23 (2^52) leaves n in the low
# bits of the sum. 2^r is a polynomial with p(0) = 1, so that the maximum of a row has the exponential 1 exactly:
# in float32 a minimax fit of degree 6 (relative error 2.0e-9 before rounding), in float64 the Taylor series up to
# (r ln 2)^13 / 13! (4e-18). Below the smallest normal number the result is 0.
_MAGIC32, _LOWEST32 = np.float32(1.5 * 2.0**23), np.float32(1.5 * 2.0**23 - 125)
_A1, _A2, _A3, _A4, _A5, _A6 = (
    np.float32(a)
    for a in (
        0.6931472028552111,
        0.24022647913615597,
        0.05550332470783638,
        0.009618437358245586,
        0.001339887455708344,
        0.00015353362059308817,
    )
)
_ONE32 = np.float32(1)
_MAGIC64, _LOWEST64 = 1.5 * 2.0**52, 1.5 * 2.0**52 - 1021
_B1, _B2, _B3, _B4, _B5, _B6, _B7, _B8, _B9, _B10, _B11, _B12, _B13 = (
    math.log(2.0) ** k / math.factorial(k) for k in range(1, 14)
)


@njit(fastmath=False)
def _exp2_float32(d, high, low):
    k = _fma(d, high, _MAGIC32)
    # r = d * (high + low) - n without rounding the product, whose size would cost accuracy.
    r = _fma(d, low, _fma(d, high, -(k - _MAGIC32)))
    p = _fma(_fma(_fma(_fma(_fma(_A6, r, _A5), r, _A4), r, _A3), r, _A2), r, _A1)
    p = _fma(p, r, _ONE32)
    e = _float32_from_bits(np.int32(_float32_bits(p) + (_float32_bits(k) << np.int32(23))))
    return e if k >= _LOWEST32 else np.float32(0)


@njit(fastmath=False)
def _exp2_float64(d, high, low):
    k = _fma(d, high, _MAGIC64)
    r = _fma(d, low, _fma(d, high, -(k - _MAGIC64)))
    p = _fma(_fma(_fma(_fma(_B13, r, _B12), r, _B11), r, _B10), r, _B9)
    p = _fma(_fma(_fma(_fma(p, r, _B8), r, _B7), r, _B6), r, _B5)
    p = _fma(_fma(_fma(_fma(_fma(p, r, _B4), r, _B3), r, _B2), r, _B1), r, 1.0)
    e = _float64_from_bits(_float64_bits(p) + (_float64_bits(k) << 52))
    return e if k >= _LOWEST64 else 0.0


def exp2_scaled(d, high, low):
    """exp2(d * (high + low)) for a product that is not positive; exactly 0 at -inf. For compiled code only.

    Relative error below 1.3e-7 in float32 and 3e-16 in float64; results below the normal numbers are 0.
    """
    raise TypeError("exp2_scaled is for compiled code")


@overload(exp2_scaled)
def _exp2_scaled(d, high, low):
    if d == types.float32:
        return lambda d, high, low: _exp2_float32(d, high, low)
    if d == types.float64:
        return lambda d, high, low: _exp2_float64(d, high, low)
    return None


def split_rate(rate, like):
    """``rate`` as high + low in the type of ``like``, so that its rounding does not show. For compiled code only."""
    raise TypeError("split_rate is for compiled code")


@overload(split_rate)
def _split_rate(rate, like):
    if not isinstance(like, types.Float):
        return None

    def split(rate, like):
        high = type(like)(rate)
        return high, type(like)(rate - high)

    return split
