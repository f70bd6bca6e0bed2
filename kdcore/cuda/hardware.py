"""What kernels need beyond Numba's own functions, for hardware: memory by address, single instructions, typed choices.

:mod:`kdcore.cuda.simulated` has the same names for Numba's simulator; :mod:`kdcore.cuda.primitives` has what each does,
and takes one of the two.
"""

import functools
import math

import numpy as np
from llvmlite import ir
from numba import cuda, types
from numba.cuda import libdevice

from kdcore.cuda.presence import import_compiler
from kdcore.formulas import bound

import_compiler()  # for kernels of a user's own, which nothing else comes before

try:
    from numba.cuda.extending import intrinsic, overload
except ImportError:  # an older numba-cuda, or the numba.cuda within numba
    from numba.extending import intrinsic, overload as _overload

    overload = functools.partial(_overload, target="cuda")

_I64, _I32, _I16 = (ir.IntType(bits) for bits in (64, 32, 16))


def device(function):
    """A device function that uses nothing of ``cuda``."""
    return cuda.jit(device=True)(function)


def _instruction(text, result, operands, effects, constraints):
    """Inline assembly. With ``effects`` its place among others, and in memory, is kept."""
    return ir.InlineAsm(ir.FunctionType(result, operands), text, constraints, side_effect=effects)


# --- formulas ------------------------------------------------------------------------------------------------------


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


def _of_single(instruction):
    """A function of a float32 that is one instruction."""

    @intrinsic
    def function(context, x):
        def code(context, builder, signature, arguments):
            real = ir.FloatType()
            return builder.call(_instruction(f"{instruction} $0, $1;", real, [real], False, "=f,f"), arguments)

        return types.float32(types.float32), code

    return function


_ex2, _lg2, _rcp = map(_of_single, ("ex2.approx.ftz.f32", "lg2.approx.f32", "rcp.approx.ftz.f32"))

# The divergences' formulas are worked, in float32, by the processor's approximations, which are nearer than what a sum
# of them is held to: log is off by 2^-22, absolutely between 1/2 and 2, relatively elsewhere, 1 / x by its last bit.
_LN2 = np.float32(math.log(2.0))
#: 1 / (k + 1)!, of which the first one left out is less than 2e-8 of the sum where it is used.
_F2, _F3, _F4, _F5, _F6, _F7, _F8 = (np.float32(1 / math.factorial(n)) for n in range(2, 9))


def _log(x):
    raise TypeError("log is for compiled code")


@overload(_log)
def _typed_log(x):
    return (lambda x: _lg2(x) * _LN2) if x == types.float32 else lambda x: math.log(x)


def _reciprocal(x):
    raise TypeError("reciprocal is for compiled code")


@overload(_reciprocal)
def _typed_reciprocal(x):
    return (lambda x: _rcp(x)) if x == types.float32 else lambda x: 1.0 / x


@cuda.jit(device=True)
def _short_exprel(x):
    p = cuda.fma(cuda.fma(cuda.fma(_F8, x, _F7), x, _F6), x, _F5)
    return cuda.fma(cuda.fma(cuda.fma(cuda.fma(p, x, _F4), x, _F3), x, _F2), x, np.float32(1))


def _exprel(x):
    raise TypeError("exprel is for compiled code")


@overload(_exprel)
def _typed_exprel(x):
    if x == types.float32:
        return lambda x: _short_exprel(x)
    return lambda x: math.expm1(x) / x if x != 0 else 1.0


@cuda.jit(device=True)
def _fma(x, y, z):
    # Not left to the compiler, which may round the product of any x y + z, or of none.
    return cuda.fma(x, y, z)


def bind(formula, **others):
    functions = {
        "where": _where, "fma": _fma, "log": _log, "exp": math.exp, "exprel": _exprel, "reciprocal": _reciprocal,
        **others,
    }  # fmt: skip
    return cuda.jit(device=True)(bound(formula, functions))


def product(x, y):
    raise TypeError("product is for compiled code")


@overload(product)
def _product(x, y):
    if x == types.float32:
        return lambda x, y: libdevice.fmul_rn(x, y)
    return lambda x, y: libdevice.dmul_rn(x, y)


@intrinsic
def quotient(context, a, b):
    def code(context, builder, signature, arguments):
        a, b = (builder.trunc(argument, _I32) for argument in arguments)
        return builder.zext(builder.udiv(a, b), _I64)

    return types.int64(types.int64, types.int64), code


# --- memory --------------------------------------------------------------------------------------------------------


@intrinsic
def address_of(context, array):
    def code(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        return builder.ptrtoint(array.data, _I64)

    return types.int64(array), code


#: By storage type, the type of an instruction, the register's constraint and its LLVM type.
_STORED = {
    types.float32: ("f32", "f", ir.FloatType()),
    types.float64: ("f64", "d", ir.DoubleType()),
    types.float16: ("b16", "h", _I16),
    types.uint16: ("u16", "h", _I16),
    types.int16: ("s16", "h", _I16),
    types.int32: ("s32", "r", _I32),
    types.uint32: ("u32", "r", _I32),
    types.int64: ("s64", "l", _I64),
    types.uint64: ("u64", "l", _I64),
    types.int8: ("s8", "h", _I16),
    types.uint8: ("u8", "h", _I16),
}


def _element_load(space):
    @intrinsic
    def load(context, address, tag):
        name, letter, register = _STORED[tag]
        bits = types.uint16 if tag == types.float16 else tag

        def code(context, builder, signature, arguments):
            instruction = _instruction(f"ld.{space}.{name} $0, [$1];", register, [_I64], True, f"={letter},l")
            value = builder.call(instruction, arguments[:1])
            return builder.trunc(value, ir.IntType(8)) if tag.bitwidth == 8 else value

        return bits(types.int64, tag), code

    return load


def _element_store(space):
    @intrinsic
    def store(context, address, value):
        name, letter, register = _STORED[value]

        def code(context, builder, signature, arguments):
            text, constraints = f"st.{space}.{name} [$0], $1;", f"l,{letter}"
            builder.call(_instruction(text, ir.VoidType(), [_I64, register], True, constraints), arguments)
            return context.get_dummy_value()

        return types.void(types.int64, value), code

    return store


_load, _store = _element_load("global"), _element_store("global")
_load_shared, _store_shared = _element_load("shared"), _element_store("shared")


def _vector_load(name, letter, register, number, count, space="global.L1::no_allocate"):
    registers = ", ".join(f"${k}" for k in range(count))
    text = f"ld.{space}.v{count}.{name} {{{registers}}}, [${count}];"

    @intrinsic
    def load_vector(context, address):
        signature = types.UniTuple(number, count)(types.int64)

        def code(context, builder, signature, arguments):
            struct = ir.LiteralStructType([register] * count)
            instruction = _instruction(text, struct, [_I64], True, ",".join([f"={letter}"] * count + ["l"]))
            values = builder.call(instruction, arguments)
            parts = [builder.extract_value(values, k) for k in range(count)]
            return context.make_tuple(builder, signature.return_type, parts)

        return signature, code

    return load_vector


_load_words = _vector_load("b32", "r", _I32, types.uint32, 4)
_load_shared_words = _vector_load("b32", "r", _I32, types.uint32, 4, "shared")
_load_doubles = _vector_load("f64", "d", ir.DoubleType(), types.float64, 2)


@intrinsic
def _store_words(context, address, a, b, c, d):
    def code(context, builder, signature, arguments):
        text = "st.global.cs.v4.b32 [$0], {$1, $2, $3, $4};"
        builder.call(_instruction(text, ir.VoidType(), [_I64] + [_I32] * 4, True, "l,r,r,r,r"), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, *[types.uint32] * 4), code


@intrinsic
def _store_doubles(context, address, a, b):
    def code(context, builder, signature, arguments):
        double = ir.DoubleType()
        text = "st.global.cs.v2.f64 [$0], {$1, $2};"
        builder.call(_instruction(text, ir.VoidType(), [_I64, double, double], True, "l,d,d"), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.float64, types.float64), code


@intrinsic
def shared_address_of(context, array):
    def code(context, builder, signature, arguments):
        array = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.ptrtoint(array.data, _I64)
        return builder.call(_instruction("cvta.to.shared.u64 $0, $1;", _I64, [_I64], False, "=l,l"), [pointer])

    return types.int64(array), code


@intrinsic
def _copy_async(context, to, source):
    def code(context, builder, signature, arguments):
        text = "cp.async.cg.shared.global [$0], [$1], 16;"
        builder.call(_instruction(text, ir.VoidType(), [_I64, _I64], True, "l,l,~{memory}"), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), code


@intrinsic
def wait_for_copies(context):
    def code(context, builder, signature, arguments):
        builder.call(_instruction("cp.async.wait_all;", ir.VoidType(), [], True, "~{memory}"), [])
        return context.get_dummy_value()

    return types.void(), code


@intrinsic
def _store_shared_words(context, address, a, b, c, d):
    def code(context, builder, signature, arguments):
        text = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
        builder.call(_instruction(text, ir.VoidType(), [_I64] + [_I32] * 4, True, "l,r,r,r,r"), arguments)
        return context.get_dummy_value()

    return types.void(types.int64, *[types.uint32] * 4), code


@intrinsic
def add(context, address, value):
    def code(context, builder, signature, arguments):
        text, constraints = "atom.relaxed.gpu.global.add.u32 $0, [$1], $2;", "=r,l,r,~{memory}"
        return builder.call(_instruction(text, _I32, [_I64, _I32], True, constraints), arguments)

    return types.int32(types.int64, types.int32), code


@intrinsic
def load_count(context, address):
    def code(context, builder, signature, arguments):
        text, constraints = "ld.relaxed.gpu.global.u32 $0, [$1];", "=r,l,~{memory}"
        return builder.call(_instruction(text, _I32, [_I64], True, constraints), arguments)

    return types.int32(types.int64), code


@intrinsic
def _bits_of(context, x):
    return types.int64(types.float64), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], _I64
    )


@intrinsic
def _high_half_of(context, x):
    def code(context, builder, signature, arguments):
        bits = builder.bitcast(arguments[0], _I64)
        return builder.trunc(builder.lshr(bits, ir.Constant(_I64, 32)), _I32)

    return types.int32(types.float64), code


_BLANK_HALF = np.int32(-1)
_NAN = np.int64(0x7FF8_0000_0000_0000)


@cuda.jit(device=True)
def is_blank(x):
    return _high_half_of(x) == _BLANK_HALF


@intrinsic
def _store_relaxed(context, address, a, b):
    def code(context, builder, signature, arguments):
        text = "st.relaxed.gpu.global.v2.b64 [$0], {$1, $2};"
        builder.call(_instruction(text, ir.VoidType(), [_I64] * 3, True, "l,l,l,~{memory}"), arguments)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 3), code


@cuda.jit(device=True)
def _never_blank(x):
    # Of its bits, since the compiler takes one NaN for another.
    return _NAN if is_blank(x) else _bits_of(x)


@cuda.jit(device=True)
def store_published(address, x, y):
    _store_relaxed(address, _never_blank(x), _never_blank(y))


load_published = _vector_load("f64", "d", ir.DoubleType(), types.float64, 2, "relaxed.gpu.global")


# --- storage forms -------------------------------------------------------------------------------------------------


def _bits(function_name, result, operand, register):
    @intrinsic
    def reinterpret(context, x):
        return result(operand), lambda context, builder, signature, arguments: builder.bitcast(arguments[0], register)

    reinterpret.__name__ = function_name
    return reinterpret


_float_of = _bits("float_of", types.float32, types.uint32, ir.FloatType())
_word_of = _bits("word_of", types.uint32, types.float32, _I32)


@intrinsic
def _half_of(context, word):
    """The float16 in the low half of a word, as float32."""

    def code(context, builder, signature, arguments):
        half = builder.trunc(arguments[0], _I16)
        return builder.call(_instruction("cvt.f32.f16 $0, $1;", ir.FloatType(), [_I16], False, "=f,h"), [half])

    return types.float32(types.uint32), code


def _pack(text, constraints="=r,f,f"):
    @intrinsic
    def pack(context, low, high):
        def code(context, builder, signature, arguments):
            real = ir.FloatType()
            return builder.call(_instruction(text, _I32, [real, real], False, constraints), arguments)

        return types.uint32(types.float32, types.float32), code

    return pack


# Two float32 to nearest even. The pair of bfloat16 is an instruction from compute capability 8.0.
_pack_bfloat16 = _pack("cvt.rn.bf16x2.f32 $0, $2, $1;")
_pack_float16 = _pack("{ .reg .b16 l, h; cvt.rn.f16.f32 l, $1; cvt.rn.f16.f32 h, $2; mov.b32 $0, {l, h}; }")


def to_real(x):
    raise TypeError("to_real is for compiled code")


@overload(to_real)
def _to_real(x):
    if x == types.uint16:
        return lambda x: _float_of(np.uint32(x) << np.uint32(16))
    if x == types.float16:
        return lambda x: np.float32(x)
    return lambda x: x


@cuda.jit(device=True)
def cast(x, like):
    return type(like)(x)


def load_stored(address, tag):
    raise TypeError("load_stored is for compiled code")


@overload(load_stored)
def _load_stored(address, tag):
    return lambda address, tag: _load(address, tag)


def load_real(address, tag):
    raise TypeError("load_real is for compiled code")


@overload(load_real)
def _load_real(address, tag):
    if tag == types.float16:
        return lambda address, tag: _half_of(np.uint32(_load(address, tag)))
    return lambda address, tag: to_real(_load(address, tag))


def store_stored(address, value):
    raise TypeError("store_stored is for compiled code")


@overload(store_stored)
def _store_stored(address, value):
    return lambda address, value: _store(address, value)


def to_stored(x, tag):
    raise TypeError("to_stored is for compiled code")


@overload(to_stored)
def _to_stored(x, tag):
    if tag == types.uint16:
        return lambda x, tag: np.uint16(_pack_bfloat16(np.float32(x), np.float32(0)))
    if tag == types.float16:
        return lambda x, tag: np.uint16(_pack_float16(np.float32(x), np.float32(0)))
    return lambda x, tag: type(tag)(x)


@cuda.jit(device=True)
def store_real(address, x, tag):
    _store(address, to_stored(x, tag))


def keep_stored(place, value):
    raise TypeError("keep_stored is for compiled code")


@overload(keep_stored)
def _keep_stored(place, value):
    return lambda place, value: _store_shared(place, value)


def kept_stored(place, tag):
    raise TypeError("kept_stored is for compiled code")


@overload(kept_stored)
def _kept_stored(place, tag):
    return lambda place, tag: _load_shared(place, tag)


def octet_words(address, a, b, tag):
    raise TypeError("octet_words is for compiled code")


@overload(octet_words)
def _octet_words(address, a, b, tag):
    if tag == types.float32:
        return lambda address, a, b, tag: _load_words(address + 4 * a) + _load_words(address + 4 * b)
    return lambda address, a, b, tag: _load_words(address + 2 * a)


def octet_of_words(words, tag):
    raise TypeError("octet_of_words is for compiled code")


@overload(octet_of_words)
def _octet_of_words(words, tag):
    if tag == types.float32:

        def float32(words, tag):
            a, b, c, d, e, f, g, h = words
            return (
                _float_of(a), _float_of(b), _float_of(c), _float_of(d),
                _float_of(e), _float_of(f), _float_of(g), _float_of(h),
            )  # fmt: skip

        return float32
    if tag == types.float16:

        def float16(words, tag):
            a, b, c, d = words
            k = np.uint32(16)
            return (
                _half_of(a), _half_of(a >> k), _half_of(b), _half_of(b >> k),
                _half_of(c), _half_of(c >> k), _half_of(d), _half_of(d >> k),
            )  # fmt: skip

        return float16

    def bfloat16(words, tag):
        a, b, c, d = words
        k, high = np.uint32(16), np.uint32(0xFFFF0000)
        return (
            _float_of(a << k), _float_of(a & high), _float_of(b << k), _float_of(b & high),
            _float_of(c << k), _float_of(c & high), _float_of(d << k), _float_of(d & high),
        )  # fmt: skip

    return bfloat16


def words_of_octet(x, tag):
    raise TypeError("words_of_octet is for compiled code")


@overload(words_of_octet)
def _words_of_octet(x, tag):
    if tag == types.float32:
        return lambda x, tag: (
            _word_of(np.float32(x[0])), _word_of(np.float32(x[1])), _word_of(np.float32(x[2])),
            _word_of(np.float32(x[3])), _word_of(np.float32(x[4])), _word_of(np.float32(x[5])),
            _word_of(np.float32(x[6])), _word_of(np.float32(x[7])),
        )  # fmt: skip
    pack = _pack_float16 if tag == types.float16 else _pack_bfloat16
    return lambda x, tag: (
        pack(np.float32(x[0]), np.float32(x[1])), pack(np.float32(x[2]), np.float32(x[3])),
        pack(np.float32(x[4]), np.float32(x[5])), pack(np.float32(x[6]), np.float32(x[7])),
    )  # fmt: skip


def _pairwise_maxima(text):
    @intrinsic
    def maxima(context, a, b):
        def code(context, builder, signature, arguments):
            return builder.call(_instruction(text, _I32, [_I32, _I32], False, "=r,r,r"), arguments)

        return types.uint32(types.uint32, types.uint32), code

    return maxima


_maxima_float16 = _pairwise_maxima("max.f16x2 $0, $1, $2;")
_maxima_bfloat16 = _pairwise_maxima("max.bf16x2 $0, $1, $2;")


def maxima_of_words(a, b, tag):
    raise TypeError("maxima_of_words is for compiled code")


@overload(maxima_of_words)
def _maxima_of_words(a, b, tag):
    if tag == types.float32:

        @cuda.jit(device=True)
        def larger(x, y):
            return _word_of(max(_float_of(x), _float_of(y)))

        return lambda a, b, tag: (
            larger(a[0], b[0]), larger(a[1], b[1]), larger(a[2], b[2]), larger(a[3], b[3]),
            larger(a[4], b[4]), larger(a[5], b[5]), larger(a[6], b[6]), larger(a[7], b[7]),
        )  # fmt: skip
    larger = _maxima_float16 if tag == types.float16 else _maxima_bfloat16
    return lambda a, b, tag: (larger(a[0], b[0]), larger(a[1], b[1]), larger(a[2], b[2]), larger(a[3], b[3]))


def keep_async(place, gap, address, a, b, tag):
    raise TypeError("keep_async is for compiled code")


@overload(keep_async)
def _keep_async(place, gap, address, a, b, tag):
    if tag == types.float32:

        def eight(place, gap, address, a, b, tag):
            _copy_async(place, address + 4 * a)
            _copy_async(place + gap, address + 4 * b)

        return eight
    return lambda place, gap, address, a, b, tag: _copy_async(place, address + 2 * a)


def keep_words(place, gap, words, tag):
    raise TypeError("keep_words is for compiled code")


@overload(keep_words)
def _keep_words(place, gap, words, tag):
    if tag == types.float32:

        def eight(place, gap, words, tag):
            _store_shared_words(place, words[0], words[1], words[2], words[3])
            _store_shared_words(place + gap, words[4], words[5], words[6], words[7])

        return eight
    return lambda place, gap, words, tag: _store_shared_words(place, words[0], words[1], words[2], words[3])


def kept_words(place, gap, tag):
    raise TypeError("kept_words is for compiled code")


@overload(kept_words)
def _kept_words(place, gap, tag):
    if tag == types.float32:
        return lambda place, gap, tag: _load_shared_words(place) + _load_shared_words(place + gap)
    return lambda place, gap, tag: _load_shared_words(place)


def load_octet(address, a, b, tag):
    raise TypeError("load_octet is for compiled code")


@overload(load_octet)
def _load_octet(address, a, b, tag):
    if tag == types.float64:

        def wide(address, a, b, tag):
            x, y = _load_doubles(address + 8 * a), _load_doubles(address + 8 * a + 16)
            z, w = _load_doubles(address + 8 * b), _load_doubles(address + 8 * b + 16)
            return x[0], x[1], y[0], y[1], z[0], z[1], w[0], w[1]

        return wide
    return lambda address, a, b, tag: octet_of_words(octet_words(address, a, b, tag), tag)


def store_octet(address, a, b, x, tag):
    raise TypeError("store_octet is for compiled code")


@overload(store_octet)
def _store_octet(address, a, b, x, tag):
    if tag == types.float64:

        def wide(address, a, b, x, tag):
            _store_doubles(address + 8 * a, np.float64(x[0]), np.float64(x[1]))
            _store_doubles(address + 8 * a + 16, np.float64(x[2]), np.float64(x[3]))
            _store_doubles(address + 8 * b, np.float64(x[4]), np.float64(x[5]))
            _store_doubles(address + 8 * b + 16, np.float64(x[6]), np.float64(x[7]))

        return wide
    if tag == types.float32:

        def single(address, a, b, x, tag):
            w = words_of_octet(x, tag)
            _store_words(address + 4 * a, w[0], w[1], w[2], w[3])
            _store_words(address + 4 * b, w[4], w[5], w[6], w[7])

        return single

    def half(address, a, b, x, tag):
        w = words_of_octet(x, tag)
        _store_words(address + 2 * a, w[0], w[1], w[2], w[3])

    return half


def itemsize(tag):
    raise TypeError("itemsize is for compiled code")


@overload(itemsize)
def _itemsize(tag):
    size = tag.bitwidth // 8
    return lambda tag: size


def is_single(like):
    raise TypeError("is_single is for compiled code")


@overload(is_single)
def _is_single(like):
    single = like == types.float32
    return lambda like: single


def lowest(like):
    raise TypeError("lowest is for compiled code")


@overload(lowest)
def _lowest(like):
    number = np.finfo(np.float32 if like == types.float32 else np.float64).min
    return lambda like: number


# --- arithmetic ----------------------------------------------------------------------------------------------------


def exp2(x):
    raise TypeError("exp2 is for compiled code")


@overload(exp2)
def _exp2(x):
    return (lambda x: _ex2(x)) if x == types.float32 else lambda x: math.exp2(x)


@cuda.jit(device=True)
def maximum(x, y):
    return max(x, y)


@cuda.jit(device=True)
def log(x):
    return math.log(x)
