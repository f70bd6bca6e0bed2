"""The names of :mod:`kdcore.cuda.hardware` for Numba's simulator, which runs kernels as Python on NumPy scalars.

It knows neither intrinsics nor typed overloads, so functions ask for types when they run. What a device does quietly,
dividing by 0 or overflowing, must not warn: the simulator's threads run with NumPy's errors ignored (see
``tests/simulator.py``, which also teaches it warps and blocks that run at the same time).
"""

import ctypes
import functools
import math
import threading

import numpy as np

from kdcore.formulas import bound

_BFLOAT16_NAN = 0x7FC0
_atomic = threading.Lock()


def device(function):
    return function


# --- formulas ------------------------------------------------------------------------------------------------------


def _exprel(x):
    return np.where(x == 0, type(x)(1), np.expm1(x) / x)[()]


def _fma(x, y, z):
    """With one rounding: in double the precision, where the product is exact."""
    wider = np.longdouble if isinstance(x, np.float64) else np.float64
    return type(x)(wider(x) * wider(y) + wider(z))


def bind(formula, **others):
    # math.log and math.exp raise errors where a device gives an infinity or NaN.
    function = bound(formula, {"fma": _fma, "log": np.log, "exp": np.exp, "exprel": _exprel, **others})
    return functools.wraps(formula)(function)


def product(x, y):
    return x * y


def quotient(a, b):
    return a // b


# --- memory --------------------------------------------------------------------------------------------------------


class Address:
    """A place in an array, as a number that can be added to; it checks what a device would not say: bounds, alignment.

    ``memory`` has the bytes of the array, of which the first is at ``start``.
    """

    __slots__ = ("at", "memory", "start")

    def __init__(self, memory, start, at):
        self.memory, self.start, self.at = memory, start, at

    def __add__(self, offset):
        return Address(self.memory, self.start, self.at + int(offset))

    def __sub__(self, offset):
        return self + -int(offset)

    def __and__(self, bits):
        return self.at & bits

    def __int__(self):
        return self.at

    def __eq__(self, other):
        return self.at == int(other)

    def __hash__(self):
        return hash(self.at)

    def array(self, shape, strides, dtype):
        return np.ndarray(shape, dtype, self.memory, self.at - self.start, strides)

    def bytes(self, size):
        first = self.at - self.start
        if not 0 <= first <= self.memory.size - size:
            raise IndexError(f"{size} bytes at {first} of an array of {self.memory.size} bytes")
        if self.at % size:
            raise IndexError(f"{size} bytes at an address that is not a multiple of it: {self.at}")
        return self.memory[first : first + size]


def address_of(array):
    array = getattr(array, "_item", array)  # what kernels see of the simulator's arrays
    array = getattr(array, "_ary", array)
    return host_address(array)


def host_address(array):
    """The address of an array's first element. The array has to stay."""
    low = high = array.ctypes.data
    for n, stride in zip(array.shape, array.strides, strict=True):
        low, high = low + min((n - 1) * stride, 0), high + max((n - 1) * stride, 0)
    size = high - low + array.itemsize if array.size else 0
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(low))
    memory.flags.writeable = array.flags.writeable
    return Address(memory, low, array.ctypes.data)


def load_stored(address, tag):
    return address.bytes(tag.dtype.itemsize).view(tag.dtype)[0]


def store_stored(address, value):
    value = np.float64(value) if isinstance(value, float) else value
    address.bytes(value.dtype.itemsize).view(value.dtype)[0] = value


def _load_words(address):
    return tuple(address.bytes(16).view(np.uint32))


def _store_16_bytes(address, values):
    address.bytes(16)[:] = np.array(values).view(np.uint8)


def shared_address_of(array):
    return host_address(array)


def keep_async(place, gap, address, a, b, tag):
    keep_words(place, gap, octet_words(address, a, b, tag), tag)


def wait_for_copies():
    pass


def keep_words(place, gap, words, tag):
    for k in range(0, len(words), 4):
        (place + gap * (k // 4)).bytes(16)[:] = np.array(words[k : k + 4], np.uint32).view(np.uint8)


def kept_words(place, gap, tag):
    return tuple(word for k in range(1 if tag.dtype.itemsize == 2 else 2) for word in _load_words(place + gap * k))


def keep_stored(place, value):
    store_stored(place, value)


def kept_stored(place, tag):
    return load_stored(place, tag)


def add(address, value):
    with _atomic:
        count = address.bytes(4).view(np.int32)
        before = int(count[0])
        count[0] = before + value
    return before


def load_count(address):
    with _atomic:
        return int(address.bytes(4).view(np.int32)[0])


def is_blank(x):
    return np.float64(x).view(np.int64) >> 32 == -1


def store_published(address, x, y):
    values = np.array([x, y])
    values[values.view(np.int64) >> 32 == -1] = math.nan
    address.bytes(16)[:] = values.view(np.uint8)


def load_published(address):
    return tuple(address.bytes(16).view(np.float64))


# --- storage forms -------------------------------------------------------------------------------------------------


def to_real(x):
    if isinstance(x, np.uint16):
        return (np.uint32(x) << np.uint32(16)).view(np.float32)
    return np.float32(x) if isinstance(x, np.float16) else x


def to_stored(x, like):
    if not isinstance(like, np.uint16 | np.float16):
        return cast(x, like)
    single = cast(x, np.float32(0))
    if isinstance(like, np.float16):
        return cast(single, like)
    if math.isnan(single):
        return np.uint16(_BFLOAT16_NAN)
    bits = int(single.view(np.uint32))
    return np.uint16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def cast(x, like):
    return type(like)(x)


def load_real(address, tag):
    return to_real(load_stored(address, tag))


def store_real(address, x, tag):
    store_stored(address, to_stored(x, tag))


def _reals(values):
    """Stored elements as a tuple of float32 or float64."""
    if values.dtype == np.uint16:
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    elif values.dtype == np.float16:
        values = values.astype(np.float32)
    return tuple(values)


def octet_words(address, a, b, tag):
    starts = (a,) if tag.dtype.itemsize == 2 else (a, b)
    return tuple(word for start in starts for word in _load_words(address + tag.dtype.itemsize * start))


def octet_of_words(words, tag):
    return _reals(np.array(words, np.uint32).view(tag.dtype))


def words_of_octet(x, tag):
    return tuple(np.array([to_stored(value, tag) for value in x]).view(np.uint32))


def maxima_of_words(a, b, tag):
    return words_of_octet(np.fmax(octet_of_words(a, tag), octet_of_words(b, tag)), tag)


def load_octet(address, a, b, tag):
    if tag.dtype.itemsize < 8:
        return octet_of_words(octet_words(address, a, b, tag), tag)
    return tuple(x for v in (a, a + 2, b, b + 2) for x in (address + 8 * v).bytes(16).view(tag.dtype))


def store_octet(address, a, b, x, tag):
    values, size = [to_stored(value, tag) for value in x], tag.dtype.itemsize
    starts = {2: (a,), 4: (a, b), 8: (a, a + 2, b, b + 2)}[size]
    for k, start in enumerate(starts):
        count = 16 // size
        _store_16_bytes(address + size * start, values[count * k : count * (k + 1)])


def itemsize(tag):
    return tag.dtype.itemsize


def is_single(like):
    return isinstance(like, np.float32)


def lowest(like):
    return np.finfo(like.dtype).min


# --- arithmetic ----------------------------------------------------------------------------------------------------


def log(x):
    return np.log(x)


def exp2(x):
    return np.exp2(x)


maximum = np.fmax
