"""What the CPU kernels need beside vectors: exponentials, logarithms, formulas bound to them."""

import math

import numpy as np
from numba import njit, types
from numba.extending import overload

from kdcore.cpu.simd import (
    Vector,
    exponent,
    fma,
    has_eighths,
    mantissa,
    maximum,
    power_of_eighths,
    power_of_two,
    where,
)
from kdcore.formulas import bound, reciprocal

__all__ = ["bind", "exp", "exp2", "exprel", "inner", "log", "raw_bits"]

_FLOAT32S, _FLOAT64S = Vector(types.float32), Vector(types.float64)

#: Functions for compiled code only. Numba's wrappers for calls from Python would take a third of the time to compile.
#: Left to itself LLVM inlines few of them, and a call hands over a dozen words for each array: a microsecond a row.
inner = njit(fastmath=False, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


_REAL_KINDS = np.dtype(np.float32).num, np.dtype(np.float64).num


def raw_bits(array):
    """A view that Numba can type: 16-bit floats as integers (see :mod:`kdcore.cpu.simd`), all else as it is."""
    if array.dtype.num in _REAL_KINDS:  # first, since a small call has no time for names
        return array
    if array.dtype == np.float16:
        return array.view(np.int16)
    if array.dtype.name == "bfloat16":
        return array.view(np.uint16)
    return array


# exp2 is 2^y of y = d * rate: 2^(n/8) 2^r with n/8 the nearest multiple of 1/8 and |r| <= 1/16, or, without the
# instruction that looks 2^(n/8) up, 2^n 2^r with |r| <= 1/2. A multiply-add that adds MAGIC rounds y to n, and leaves n
# (plus the bias of the exponent) in the low bits of the sum; a second one gives r, with one rounding, of r's size. 2^r
# is a polynomial with p(0) = 1, so that the maximum of a row has the exponential 1 exactly: for eighths a minimax fit
# of degree 3 (relative error 2.7e-8 before rounding), else in float32 one of degree 6 (2.0e-9), in float64 the Taylor
# series up to (r ln 2)^13 / 13! (4e-18). d is raised to where 2^y is 0: -127 (-1023) becomes 0 in the exponent. NaN
# goes through every step.
_MAGIC8, _LOWEST32 = np.float32(1.5 * 2.0**20), np.float32(-127)
_E1, _E2, _E3 = (np.float32(a) for a in (0.6931472143951043, 0.24025769205750994, 0.05549620605605062))
_MAGIC32 = np.float32(1.5 * 2.0**23 + 127)
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
_MAGIC64, _LOWEST64 = 1.5 * 2.0**52 + 1023, -1023.0
_B1, _B2, _B3, _B4, _B5, _B6, _B7, _B8, _B9, _B10, _B11, _B12, _B13 = (
    math.log(2.0) ** k / math.factorial(k) for k in range(1, 14)
)


@inner
def _exp2_eighths(d, rate):
    d = maximum(_LOWEST32 / rate, d)
    k = fma(d, rate, _MAGIC8)
    r = fma(d, rate, _MAGIC8 - k)
    power = power_of_eighths(k)
    return fma(power * r, fma(fma(_E3, r, _E2), r, _E1), power)


@inner
def _exp2_float32(d, rate):
    d = maximum(_LOWEST32 / rate, d)
    k = fma(d, rate, _MAGIC32)
    r = fma(d, rate, _MAGIC32 - k)
    p = fma(fma(fma(fma(fma(_A6, r, _A5), r, _A4), r, _A3), r, _A2), r, _A1)
    return fma(p, r, _ONE32) * power_of_two(k)


@inner
def _exp2_float64(d, rate):
    d = maximum(_LOWEST64 / rate, d)
    k = fma(d, rate, _MAGIC64)
    r = fma(d, rate, _MAGIC64 - k)
    p = fma(fma(fma(fma(_B13, r, _B12), r, _B11), r, _B10), r, _B9)
    p = fma(fma(fma(fma(p, r, _B8), r, _B7), r, _B6), r, _B5)
    p = fma(fma(fma(fma(p, r, _B4), r, _B3), r, _B2), r, _B1)
    return fma(p, r, 1.0) * power_of_two(k)


def exp2(d, rate):
    """2^(d * rate) of a vector d that is not positive, or barely, and a number rate of its type, from 1e-30 to 1e30.

    Exactly 1 at 0 and 0 at -inf, NaN of NaN. Relative error below 1.4e-7 in float32 and 1.5e-16 in float64; a result
    below the normal numbers may be anything between 0 and the smallest of them. For compiled code only.
    """
    raise TypeError("exp2 is for compiled code")


@overload(exp2)
def _exp2(d, rate):
    if d == _FLOAT64S:
        return lambda d, rate: _exp2_float64(d, rate)
    if d == _FLOAT32S and has_eighths():
        return lambda d, rate: _exp2_eighths(d, rate)
    return (lambda d, rate: _exp2_float32(d, rate)) if d == _FLOAT32S else None


# log(x) = n log 2 + log(1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): f, which is exact, less a smaller correction.
# In float32 log(1 + f) = f - f²/2 + f³ P(f), P a minimax fit of degree 7 (relative error 6e-9 before rounding), without
# a division, which takes as long as all of it. In float64, with u = f / (2 + f), it is 2 atanh(u) = 2 u + u R,
# R = 2 u²/3 + 2 u⁴/5 + ..., and since 2 u = f - u f this is f - (f²/2 - u (f²/2 + R)); |u| < 0.172, so the first term
# left out of R is below 2e-17. log 2 has two parts, of which n times the first is exact.
_LOG2_HIGH32, _LOG2_LOW32 = np.float32(0.693359375), np.float32(math.log(2.0) - 0.693359375)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7 = (
    np.float32(c)
    for c in (
        0.33333331725532384,
        -0.25000820632839854,
        0.20001224863828862,
        -0.16623370635273854,
        0.1420181418777257,
        -0.13160104511193613,
        0.1276113613396492,
        -0.07634153926508278,
    )
)
_HALF32 = np.float32(0.5)
_LOG2_HIGH64, _LOG2_LOW64 = 0.693145751953125, 1.4286068203094172321e-6
_D1, _D2, _D3, _D4, _D5, _D6, _D7, _D8, _D9, _D10 = (2 / (2 * k + 1) for k in range(1, 11))


@inner
def _log_float32(x):
    n, f = exponent(x), mantissa(x) - _ONE32
    square = f * f
    p = fma(fma(fma(fma(fma(fma(fma(_C7, f, _C6), f, _C5), f, _C4), f, _C3), f, _C2), f, _C1), f, _C0)
    correction = fma(f * square, p, n * _LOG2_LOW32) - _HALF32 * square
    return fma(n, _LOG2_HIGH32, f + correction)


@inner
def _log_float64(x):
    n, f = exponent(x), mantissa(x) - 1.0
    u = f / (2.0 + f)
    square = u * u
    r = fma(fma(fma(fma(_D10, square, _D9), square, _D8), square, _D7), square, _D6)
    r = square * fma(fma(fma(fma(fma(r, square, _D5), square, _D4), square, _D3), square, _D2), square, _D1)
    half = 0.5 * f * f
    return fma(n, _LOG2_HIGH64, f - (half - fma(u, half + r, n * _LOG2_LOW64)))


def log(x):
    """The natural logarithm of a vector of positive normal numbers; arbitrary elsewhere. For compiled code only."""
    raise TypeError("log is for compiled code")


@overload(log)
def _log(x):
    return {_FLOAT32S: lambda x: _log_float32(x), _FLOAT64S: lambda x: _log_float64(x)}.get(x)


def exp(x):
    """The exponential of a vector that is not positive, or barely. For compiled code only."""
    raise TypeError("exp is for compiled code")


@overload(exp)
def _exp(x):
    if not isinstance(x, Vector):
        return None
    rate = (np.float32 if x == _FLOAT32S else np.float64)(math.log2(math.e))
    return lambda x: exp2(x, rate)


# (exp(x) - 1) / x = 1 + x (1/2! + x/3! + ...), up to x^7 / 8! in float32 and x^13 / 14! in float64: what is left out is
# below 1.1e-8 and 5e-17.
_F2, _F3, _F4, _F5, _F6, _F7, _F8 = (np.float32(1 / math.factorial(k)) for k in range(2, 9))
_G2, _G3, _G4, _G5, _G6, _G7, _G8, _G9, _G10, _G11, _G12, _G13, _G14 = (1 / math.factorial(k) for k in range(2, 15))


@inner
def _exprel_float32(x):
    p = fma(fma(fma(fma(fma(fma(_F8, x, _F7), x, _F6), x, _F5), x, _F4), x, _F3), x, _F2)
    return fma(p, x, _ONE32)


@inner
def _exprel_float64(x):
    p = fma(fma(fma(fma(fma(fma(_G14, x, _G13), x, _G12), x, _G11), x, _G10), x, _G9), x, _G8)
    p = fma(fma(fma(fma(fma(fma(p, x, _G7), x, _G6), x, _G5), x, _G4), x, _G3), x, _G2)
    return fma(p, x, 1.0)


def exprel(x):
    """(exp(x) - 1) / x of a vector in [-1/2, 1/2], 1 at 0; arbitrary elsewhere. For compiled code only.

    Relative error below 1.2e-7 in float32 and 2.2e-16 in float64.
    """
    raise TypeError("exprel is for compiled code")


@overload(exprel)
def _exprel(x):
    return {_FLOAT32S: lambda x: _exprel_float32(x), _FLOAT64S: lambda x: _exprel_float64(x)}.get(x)


_reciprocal = inner(reciprocal)


def bind(formula):
    """A formula for njit code, on numbers and on vectors."""
    functions = {"where": where, "fma": fma, "log": log, "exp": exp, "exprel": exprel, "reciprocal": _reciprocal}
    return inner(bound(formula, functions))
