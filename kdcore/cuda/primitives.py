"""What the CUDA kernels need from the compiler: :mod:`kdcore.cuda.hardware`, or its twin for Numba's simulator.

Where something lies in global memory is an **address**, in bytes, a 64-bit number that can be added to; what kind of
element lies there is said by a **tag**, any number of its storage type: float32, float64, float16, or uint16 for
bfloat16. bfloat16 is worked by its bits, because Numba's own needs a C++ shim for each conversion.

An **octet** is eight elements, the unit of all loops over a row: the four classes from ``a`` and the four from ``b``.
Of 16-bit elements b is a + 4, so that they are 16 bytes; of others, two or four times 16 bytes, wherever b is.

- ``device(function)``: the function as a device function, if it uses nothing of ``cuda``
- ``bind(formula)``: a formula of :mod:`kdcore.formulas` as a device function; with ``where=``, or another of the
  functions that formulas call, it calls that one
- ``address_of(array)``: of the first element of an array in a kernel
- ``load_stored(address, tag)``: a number as it is stored, of any integer or float type; ``store_stored(address, x)``
- ``load_real(address, tag)``, ``store_real(address, x, tag)``: an element as float32 or float64; what is stored is
  rounded to nearest even, 16 bits by way of float32
- ``load_octet(address, a, b, tag)``, ``store_octet(address, a, b, x, tag)``: the classes from a and from b of the row
  at an address, by 16-byte accesses to multiples of 16
- ``octet_words(address, a, b, tag)``: the same as the words of 32 bits that they are, 8 of float32, 4 of 16-bit types;
  ``octet_of_words(words, tag)``, ``words_of_octet(x, tag)``: the octet in them, and back
- ``maxima_of_words(a, b, tag)``: the larger of each two elements, or the one that is a number, in words
- ``shared_address_of(array)``: of a shared array whose alignment is 16. An octet is kept at a place there, in 16 bytes
  and, of float32, in 16 more that are ``gap`` bytes further: ``keep_words(place, gap, words, tag)``,
  ``kept_words(place, gap, tag)``, and ``keep_async(place, gap, address, a, b, tag)`` straight from the row at an
  address, which has happened after ``wait_for_copies()``, for the thread that calls it
  ``keep_stored(place, x)`` and ``kept_stored(place, tag)`` are for an element as it is stored
- ``itemsize(tag)``: the bytes of an element; ``lowest(like)``: the smallest finite number of a type
- ``to_real(x)``: a number as it is stored as float32 or float64
- ``to_stored(x, tag)``: a number as it is stored, rounded to nearest even
- ``cast(x, like)``: x in the type of like
- ``exp2(x)``: 2 to the power of x, in the type of x: of float32 the instruction, of which the relative error is 2^-22
- ``is_single(like)``: whether a number is a float32, which the compiler knows
- ``maximum(x, y)``: the larger, or the one that is a number
- ``log(x)``: of float64; -inf at 0
- ``quotient(a, b)``: of two int64 that are below 2^31 and not negative, rounded down, in a fifth of the instructions
- ``product(x, y)``: x y as it is rounded, also where something is added to it, which else may be one instruction
- ``add(address, n)``: adds to an int32 and returns what was there; ``load_count(address)``: what is there by now
- ``store_published(address, x, y)``: two float64, each for the whole device to see; ``load_published(address)``: the
  two as they are by now; ``is_blank(x)``: whether nothing has been stored over the bits of an int64 of -1, the first
  half of which no number has, and no NaN that is stored
"""

from functools import cache

import numpy as np
from numba.core import config

__all__ = [
    "BLANK",
    "SCRATCH",
    "SIMULATOR",
    "add",
    "address_of",
    "bind",
    "cast",
    "device",
    "exp2",
    "is_blank",
    "is_single",
    "itemsize",
    "keep_async",
    "keep_stored",
    "keep_words",
    "kept_stored",
    "kept_words",
    "load_count",
    "load_octet",
    "load_published",
    "load_real",
    "load_stored",
    "log",
    "lowest",
    "maxima_of_words",
    "maximum",
    "octet_of_words",
    "octet_words",
    "product",
    "quotient",
    "shared_address_of",
    "store_octet",
    "store_published",
    "store_real",
    "store_stored",
    "tag_of",
    "to_real",
    "to_stored",
    "wait_for_copies",
    "words_of_octet",
]

SIMULATOR = bool(config.ENABLE_CUDASIM)

if SIMULATOR:
    from kdcore.cuda.simulated import (
        add,
        address_of,
        bind,
        cast,
        device,
        exp2,
        is_blank,
        is_single,
        itemsize,
        keep_async,
        keep_stored,
        keep_words,
        kept_stored,
        kept_words,
        load_count,
        load_octet,
        load_published,
        load_real,
        load_stored,
        log,
        lowest,
        maxima_of_words,
        maximum,
        octet_of_words,
        octet_words,
        product,
        quotient,
        shared_address_of,
        store_octet,
        store_published,
        store_real,
        store_stored,
        to_real,
        to_stored,
        wait_for_copies,
        words_of_octet,
    )
else:
    from kdcore.cuda.hardware import (
        add,
        address_of,
        bind,
        cast,
        device,
        exp2,
        is_blank,
        is_single,
        itemsize,
        keep_async,
        keep_stored,
        keep_words,
        kept_stored,
        kept_words,
        load_count,
        load_octet,
        load_published,
        load_real,
        load_stored,
        log,
        lowest,
        maxima_of_words,
        maximum,
        octet_of_words,
        octet_words,
        product,
        quotient,
        shared_address_of,
        store_octet,
        store_published,
        store_real,
        store_stored,
        to_real,
        to_stored,
        wait_for_copies,
        words_of_octet,
    )

#: An int64 that says that nothing has been stored yet, as :func:`is_blank` finds it.
BLANK = -1
#: Shape of the shared float64 array that reductions of a block need: for each of 32 warps.
SCRATCH = (7, 32)


@cache
def tag_of(dtype):
    """The tag of elements of a NumPy dtype; remembered, since NumPy puts a dtype's name together each time."""
    return np.uint16(0) if dtype.name == "bfloat16" else dtype.type(0)
