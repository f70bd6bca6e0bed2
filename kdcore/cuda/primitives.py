"""What the CUDA kernels need from the compiler, in two bodies: for hardware, and for Numba's simulator.

The simulator runs kernels as Python, on NumPy scalars. It knows neither libdevice nor typed overloads.

bfloat16 is stored as its bits in uint16, because Numba's own bfloat16 needs a C++ shim for each conversion; float16
is Numba's and the hardware's.
"""

import functools
import math

import numpy as np
from numba import cuda, types
from numba.core import config

from kdcore.formulas import bound, fma

__all__ = ["SIMULATOR", "THREADS", "bind", "cast", "exp2_scaled", "from_real", "raw_bits", "split_rate", "to_real"]

SIMULATOR = bool(config.ENABLE_CUDASIM)

#: Threads of a block, a power of two. Each is a Python thread in the simulator, and a barrier polls them all.
THREADS = 8 if SIMULATOR else 256

_BFLOAT16_NAN = 0x7FC0
_LN2 = math.log(2.0)


def raw_bits(array):
    """A view that Numba can type: bfloat16 as uint16, everything else as it is."""
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


if SIMULATOR:

    def _exprel(x):
        return np.where(x == 0, type(x)(1), np.expm1(x) / x)[()]

    def bind(formula):
        """A formula as a device function."""
        # math.log and math.exp raise errors where a device gives an infinity or NaN.
        function = bound(formula, {"log": np.log, "exp": np.exp, "exprel": _exprel})

        @functools.wraps(formula)
        def device_function(*arguments):
            # Both sides of a ``where`` are computed, and -inf - -inf or 0 * inf is usual in the one that is not taken.
            # NumPy keeps by thread what it warns of, and the threads of a block are new ones: so each call says it.
            with np.errstate(all="ignore"):
                return function(*arguments)

        return device_function

    def cast(x, like):
        """``x`` in the type of ``like``; what does not fit becomes infinite, as on hardware."""
        with np.errstate(over="ignore"):
            return type(like)(x)

    def to_real(x):
        """A stored element as float32 or float64."""
        if isinstance(x, np.uint16):
            return (np.uint32(x) << np.uint32(16)).view(np.float32)
        return np.float32(x) if isinstance(x, np.float16) else x

    def from_real(x, like):
        """A real number in the storage type of ``like``, rounded to nearest even; 16 bits by way of float32."""
        if not isinstance(like, np.uint16 | np.float16):
            return cast(x, like)
        single = cast(x, np.float32(0))
        if isinstance(like, np.float16):
            return cast(single, like)
        if math.isnan(single):
            return np.uint16(_BFLOAT16_NAN)
        bits = int(single.view(np.uint32))
        return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)

    def exp2_scaled(d, high, low):
        """exp2(d * (high + low)) for d <= 0, in the type of d."""
        with np.errstate(over="ignore", under="ignore"):
            return type(d)(np.exp2(np.float64(d) * (np.float64(high) + np.float64(low))))

else:
    from numba.cuda import libdevice

    try:
        from numba.cuda.extending import overload
    except ImportError:  # an older numba-cuda, or the numba.cuda within numba
        from numba.extending import overload as _overload

        overload = functools.partial(_overload, target="cuda")

    def _where(condition, x, y):
        """``x`` where the condition holds, else ``y``, in the working type. For compiled code only."""
        raise TypeError("where is for compiled code")

    @overload(_where)
    def _select(condition, x, y):
        # Of two types one is that of a constant: an integer, or float64, which must not widen a float32 sweep.
        if _constant_rank(x) < _constant_rank(y):
            return lambda condition, x, y: x if condition else type(x)(y)
        return lambda condition, x, y: type(y)(x) if condition else y

    def _constant_rank(number):
        """A number type's place among the types of what a formula works with; the last are those of constants."""
        return (not isinstance(number, types.Float), number.bitwidth)

    @cuda.jit(device=True)
    def _exprel(x):
        """(exp(x) - 1) / x, 1 at 0."""
        return math.expm1(x) / x if x != 0 else type(x)(1)

    _fma = cuda.jit(device=True)(fma)  # the compiler makes one instruction of it

    def bind(formula):
        """A formula as a device function."""
        functions = {"where": _where, "fma": _fma, "log": math.log, "exp": math.exp, "exprel": _exprel}
        return cuda.jit(device=True)(bound(formula, functions))

    @cuda.jit(device=True)
    def cast(x, like):
        """``x`` in the type of ``like``."""
        return type(like)(x)

    def to_real(x):
        """A stored element as float32 or float64. For compiled code only."""
        raise TypeError("to_real is for compiled code")

    @overload(to_real)
    def _to_real(x):
        if x == types.uint16:
            return lambda x: libdevice.int_as_float(np.int32(np.int32(x) << np.int32(16)))
        if x == types.float16:
            return lambda x: np.float32(x)
        return lambda x: x

    @cuda.jit(device=True)
    def _float32_to_bfloat16(x):
        """Bits of the nearest bfloat16, ties to even; NaN stays NaN."""
        bits = np.uint32(libdevice.float_as_int(x))
        if math.isnan(x):
            return np.uint16(_BFLOAT16_NAN)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def from_real(x, like):
        """A real number in the storage type of ``like``, rounded to nearest even. For compiled code only."""
        raise TypeError("from_real is for compiled code")

    @overload(from_real)
    def _from_real(x, like):
        if like == types.uint16:
            return lambda x, like: _float32_to_bfloat16(np.float32(x))
        if like == types.float16:
            return lambda x, like: np.float16(np.float32(x))
        return lambda x, like: type(like)(x)

    @cuda.jit(device=True)
    def exp2_scaled(d, high, low):
        """exp2(d * (high + low)) for d <= 0, in the type of d; exactly 1 at d = 0.

        ``math.exp2`` is the instruction ex2.approx in float32. The product d * high rounds by up to |d * high| / 2**24,
        which would be the largest error by far; what it loses comes back as the first-order factor 1 + ln 2 * lost.
        """
        x = d * high
        e = math.exp2(x)
        if e == type(d)(0):
            return e  # here x may be -inf, and what was lost is not a number
        lost = cuda.fma(d, low, cuda.fma(d, high, -x))
        return cuda.fma(e, lost * type(d)(_LN2), e)


@cuda.jit(device=True)
def split_rate(rate, like):
    """A float64 rate as high + low in the type of ``like``."""
    high = type(like)(rate)
    return high, type(like)(rate - np.float64(high))
