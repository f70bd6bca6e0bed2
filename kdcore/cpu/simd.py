"""SIMD vectors for njit code: a fixed number of lanes, and an order of every operation that the code fixes.

A :class:`Vector` of LANES numbers adds, subtracts, multiplies, divides and compares like a number, with vectors and
with scalars, so that a formula written for numbers computes LANES of them. Comparing makes a mask for :func:`where`.
LLVM turns a vector into as many registers as the processor needs. Why not loops that the compiler vectorises: it
reorders sums only where it may choose the order ("reassoc"), and then chooses anew for every specialisation, so that
a layout, a neighbour or a cached kernel changes bits; and it cannot be told where a store may bypass the caches.

The functions are for compiled code only. Arrays are contiguous. Numba has no float16 or bfloat16 on the CPU, so in
arrays they are their bits, **float16 as int16, bfloat16 as uint16**; a vector holds float32 or float64, and loads and
stores convert, as :func:`to_real` and :func:`from_real` do for numbers.
"""

import operator

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.core.registry import cpu_target
from numba.extending import intrinsic, lower_builtin, register_model, type_callable

__all__ = [
    "LANES",
    "Mask",
    "Vector",
    "borrowed",
    "exponent",
    "fence",
    "fma",
    "from_real",
    "full",
    "has_eighths",
    "load",
    "load_part",
    "mantissa",
    "max_lanes",
    "maximum",
    "power_of_eighths",
    "power_of_two",
    "prefetch",
    "store",
    "store_part",
    "stream",
    "sum_lanes",
    "to_real",
    "trailing_zeros",
    "where",
    "widen",
    "with_lane",
]

#: Lanes of a vector, by what it holds: 64 bytes, one cache line.
LANES = {types.float32: 16, types.float64: 8}

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_REAL = {types.float32: ir.FloatType(), types.float64: ir.DoubleType()}
_STORED = {**_REAL, types.int16: _I16, types.uint16: _I16}
_BYTES = {types.float32: 4, types.float64: 8, types.int16: 2, types.uint16: 2}
#: Of a floating-point type: the integer of its size, its fraction bits, and the bits of sqrt(1/2).
_LAYOUT = {types.float32: (_I32, 23, 0x3F3504F3), types.float64: (_I64, 52, 0x3FE6A09E667F3BCD)}


class Vector(types.Type):
    """Numba's type of a vector of float32 or float64."""

    def __init__(self, element):
        self.element = element
        self.lanes = LANES[element]
        super().__init__(name=f"Vector({element} x {self.lanes})")


class Mask(types.Type):
    """Numba's type of a vector of truth values."""

    def __init__(self, lanes):
        self.lanes = lanes
        super().__init__(name=f"Mask({lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_REAL[kind.element], kind.lanes))


@register_model(Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, ir.VectorType(_I1, kind.lanes))


def _vector_among(*kinds):
    """The vector type among types of arguments, if the others are it or numbers."""
    vector = next((kind for kind in kinds if isinstance(kind, Vector)), None)
    fits = vector is not None and all(kind == vector or isinstance(kind, types.Number) for kind in kinds)
    return vector if fits else None


def _broadcast(context, builder, value, kind, vector):
    """A scalar of type ``kind`` in every lane; a vector as it is."""
    if kind == vector:
        return value
    value = context.cast(builder, value, kind, vector.element)
    undefined = ir.Constant(context.get_value_type(vector), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, vector.lanes), [0] * vector.lanes))


def _broadcast_all(context, builder, signature, args, vector):
    return [_broadcast(context, builder, *pair, vector) for pair in zip(args, signature.args, strict=True)]


def _call(builder, name, result, args):
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, [arg.type for arg in args]), name)
    return builder.call(function, args)


# --- operators -----------------------------------------------------------------------------------------------------


def _operator(function, result, emit):
    """Let a Python operator take vectors, or a vector and a number."""

    @type_callable(function)
    def typer(context):
        def resolve(x, y):
            vector = _vector_among(x, y)
            return None if vector is None else result(vector)

        return resolve

    def lower(context, builder, signature, args):
        return emit(builder, *_broadcast_all(context, builder, signature, args, _vector_among(*signature.args)))

    for kinds in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(function, *kinds)(lower)


def _arithmetic(name):
    return lambda builder, x, y: getattr(builder, name)(x, y)


def _comparison(symbol):
    return lambda builder, x, y: builder.fcmp_ordered(symbol, x, y)


for _function, _name in (
    (operator.add, "fadd"),
    (operator.iadd, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _operator(_function, lambda vector: vector, _arithmetic(_name))
for _function, _name in (
    (operator.gt, ">"),
    (operator.ge, ">="),
    (operator.lt, "<"),
    (operator.le, "<="),
    (operator.eq, "=="),
):
    _operator(_function, lambda vector: Mask(vector.lanes), _comparison(_name))


@type_callable(operator.neg)
def _type_negation(context):
    return lambda x: x if isinstance(x, Vector) else None


@lower_builtin(operator.neg, Vector)
def _lower_negation(context, builder, signature, args):
    return builder.fneg(args[0])


@intrinsic
def where(typingctx, condition, x, y):
    """``x`` where ``condition`` holds, else ``y``, lane by lane; also of numbers. Both are computed."""
    if isinstance(condition, Mask):
        result = _vector_among(x, y)
    elif isinstance(condition, types.Boolean):
        result = typingctx.unify_types(x, y)
    else:
        result = None
    if result is None:
        return None

    def generate(context, builder, signature, args):
        if isinstance(result, Vector):
            chosen = [_broadcast(context, builder, args[k], signature.args[k], result) for k in (1, 2)]
        else:
            chosen = [context.cast(builder, args[k], signature.args[k], result) for k in (1, 2)]
        return builder.select(args[0], *chosen)

    return result(condition, x, y), generate


@intrinsic
def fma(typingctx, x, y, z):
    """x * y + z with one rounding; also of numbers."""
    vector = _vector_among(x, y, z)
    number = typingctx.unify_types(x, y, z)
    if vector is None and number not in _REAL:
        return None

    def generate(context, builder, signature, args):
        if vector is None:
            args = [context.cast(builder, *pair, number) for pair in zip(args, signature.args, strict=True)]
            return _call(builder, f"llvm.fma.f{8 * _BYTES[number]}", args[0].type, args)
        args = _broadcast_all(context, builder, signature, args, vector)
        return _call(builder, f"llvm.fma.v{vector.lanes}f{8 * _BYTES[vector.element]}", args[0].type, args)

    return (vector or number)(x, y, z), generate


@intrinsic
def maximum(typingctx, x, y):
    """``x`` where it is larger, else ``y``: so ``y`` where either is NaN."""
    vector = _vector_among(x, y)
    if vector is None:
        return None

    def generate(context, builder, signature, args):
        x, y = _broadcast_all(context, builder, signature, args, vector)
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    return vector(x, y), generate


@intrinsic
def full(typingctx, value, like):
    """A vector with ``value`` in every lane, of the type of the number ``like``."""
    vector = Vector(like)
    return vector(value, like), lambda context, builder, signature, args: _broadcast(
        context, builder, args[0], signature.args[0], vector
    )


# --- lanes ---------------------------------------------------------------------------------------------------------


def _lanes(builder, value, start, count):
    undefined = ir.Constant(value.type, ir.Undefined)
    return builder.shuffle_vector(
        value, undefined, ir.Constant(ir.VectorType(_I32, count), list(range(start, start + count)))
    )


def _reduction(combine):
    def reduce(typingctx, x):
        if not isinstance(x, Vector):
            return None

        def generate(context, builder, signature, args):
            value, count = args[0], x.lanes
            while count > 1:
                count //= 2
                value = combine(builder, _lanes(builder, value, 0, count), _lanes(builder, value, count, count))
            return builder.extract_element(value, _I32(0))

        return x.element(x), generate

    return intrinsic(reduce)


#: The sum of the lanes, by halves.
sum_lanes = _reduction(lambda builder, x, y: builder.fadd(x, y))
#: The largest of lanes that are not NaN.
max_lanes = _reduction(lambda builder, x, y: builder.select(builder.fcmp_ordered(">", x, y), x, y))


@intrinsic
def with_lane(typingctx, x, lane, value):
    """A vector with ``value`` in one lane, from 0 on."""
    if not isinstance(x, Vector):
        return None

    def generate(context, builder, signature, args):
        return builder.insert_element(args[0], context.cast(builder, args[2], value, x.element), args[1])

    return x(x, types.intp, value), generate


@intrinsic
def widen(typingctx, x):
    """A float32 vector as float64, the second half of its lanes added to the first; a float64 vector as it is."""
    if x == Vector(types.float64):
        return x(x), lambda context, builder, signature, args: args[0]
    if x != Vector(types.float32):
        return None
    result = Vector(types.float64)

    def generate(context, builder, signature, args):
        halves = (_lanes(builder, args[0], start, result.lanes) for start in (0, result.lanes))
        return builder.fadd(*(builder.fpext(half, context.get_value_type(result)) for half in halves))

    return result(x), generate


# --- the bits of a number ------------------------------------------------------------------------------------------


def _bits(generate):
    """An intrinsic of one vector from what it does to the integers of the same bits."""

    def bits(typingctx, x):
        if not isinstance(x, Vector):
            return None

        def lower(context, builder, signature, args):
            integer, fraction, half_root = _LAYOUT[x.element]
            kind = ir.VectorType(integer, x.lanes)

            def constant(value):
                return ir.Constant(kind, [value] * x.lanes)

            return generate(builder, builder.bitcast(args[0], kind), args[0].type, constant, fraction, half_root)

        return x(x), lower

    return intrinsic(bits)


#: 2^n of a vector whose lowest bits hold the integer n plus the bias of the exponent, from 0 (which gives 0) upwards.
power_of_two = _bits(
    lambda builder, bits, kind, constant, fraction, _: builder.bitcast(builder.shl(bits, constant(fraction)), kind)
)

# The bits of 2^(j/8), from which the bits of j/8 are taken that come back when n is shifted into the exponent.
_EIGHTHS = [int(bits) - (j << 20) for j, bits in enumerate(np.exp2(np.arange(8) / 8).astype(np.float32).view(np.int32))]


def _features():
    """What the processor that is compiled for can do, as LLVM writes it."""
    return cpu_target.target_context.codegen().magic_tuple()[2]


def has_eighths():
    """Whether the processor that is compiled for has the instruction behind :func:`power_of_eighths`."""
    return "+avx2" in _features()


@intrinsic
def power_of_eighths(typingctx, x):
    """2^(n/8) of a float32 vector whose lowest 12 bits hold the integer n, as two's complement; 0 of n = -127 * 8."""
    if x != Vector(types.float32):
        return None

    def generate(context, builder, signature, args):
        whole = ir.VectorType(_I32, x.lanes)
        bits = builder.bitcast(args[0], whole)
        # One instruction looks the lanes of a register up, by the lowest bits of each: 3 in one of 8 lanes, 4 in one of
        # 16, for which the table is there twice.
        name, width = ("avx512.permvar.si.512", 16) if "+avx512f" in _features() else ("avx2.permd", 8)
        table = ir.Constant(ir.VectorType(_I32, width), _EIGHTHS * (width // 8))
        found = [
            _call(builder, f"llvm.x86.{name}", table.type, [table, _lanes(builder, bits, start, width)])
            for start in range(0, x.lanes, width)
        ]
        joined = found[0]
        if len(found) > 1:
            joined = builder.shuffle_vector(*found, ir.Constant(whole, list(range(x.lanes))))
        return builder.bitcast(builder.add(joined, builder.shl(bits, ir.Constant(whole, [20] * x.lanes))), args[0].type)

    return x(x), generate


def _exponent(builder, bits, kind, constant, fraction, half_root):
    return builder.sitofp(builder.ashr(builder.sub(bits, constant(half_root)), constant(fraction)), kind)


def _mantissa(builder, bits, kind, constant, fraction, half_root):
    low = builder.and_(builder.sub(bits, constant(half_root)), constant((1 << fraction) - 1))
    return builder.bitcast(builder.add(low, constant(half_root)), kind)


#: The integer n for which x / 2^n lies in [sqrt(1/2), sqrt(2)), of positive normal numbers; and that x / 2^n.
exponent = _bits(_exponent)
mantissa = _bits(_mantissa)


# --- memory --------------------------------------------------------------------------------------------------------


def _address(context, builder, kind, array, index):
    return builder.gep(context.make_array(kind)(context, builder, array).data, [index], inbounds=False)


def _shaped(kind, value):
    """The LLVM type ``kind``, or vectors of it as long as the vector ``value``."""
    return ir.VectorType(kind, value.type.count) if isinstance(value.type, ir.VectorType) else kind


def _constant(value, number):
    """An integer constant of the type of ``value``, in every lane of a vector."""
    is_vector = isinstance(value.type, ir.VectorType)
    return ir.Constant(value.type, [number] * value.type.count if is_vector else number)


def _widened(builder, value, stored, element):
    """Numbers, as they come from an array, in float32 or float64."""
    if stored == types.int16:
        value = builder.bitcast(value, _shaped(ir.HalfType(), value))
    if stored == types.uint16:
        value = builder.zext(value, _shaped(_I32, value))
        value = builder.bitcast(builder.shl(value, _constant(value, 16)), _shaped(_REAL[types.float32], value))
    target = _shaped(_REAL[element], value)
    return value if value.type == target else builder.fpext(value, target)


def _narrowed(builder, value, element, stored):
    """float32 or float64 numbers as they go to an array, rounded to nearest even."""
    if stored in _REAL:
        target = _shaped(_REAL[stored], value)
        if value.type == target:
            return value
        return builder.fpext(value, target) if stored == types.float64 else builder.fptrunc(value, target)
    if element == types.float64:  # by way of float32 on every engine, since not all have an instruction for it
        value = builder.fptrunc(value, _shaped(_REAL[types.float32], value))
    if stored == types.int16:
        return builder.bitcast(builder.fptrunc(value, _shaped(ir.HalfType(), value)), _shaped(_I16, value))
    bits = builder.bitcast(value, _shaped(_I32, value))
    odd = builder.and_(builder.lshr(bits, _constant(bits, 16)), _constant(bits, 1))
    rounded = builder.lshr(builder.add(builder.add(bits, _constant(bits, 0x7FFF)), odd), _constant(bits, 16))
    kept = builder.select(builder.fcmp_unordered("uno", value, value), _constant(bits, 0x7FC0), rounded)
    return builder.trunc(kept, _shaped(_I16, value))


@intrinsic
def borrowed(typingctx, array):
    """The same array, whose references Numba does not count: the caller keeps it alive.

    Each slice of a counted array, in each function that it is passed to, is an atomic addition to one counter, for
    which the threads would wait on one another.
    """

    def generate(context, builder, signature, args):
        view = context.make_array(array)(context, builder, args[0])
        view.meminfo = cgutils.get_null_value(view.meminfo.type)
        return view._getvalue()

    return array(array), generate


@intrinsic
def to_real(typingctx, x):
    """A stored element as float32 or float64."""
    if x not in _BYTES:
        return None
    element = x if x in _REAL else types.float32
    return element(x), lambda context, builder, signature, args: _widened(builder, args[0], x, element)


@intrinsic
def from_real(typingctx, x, like):
    """A real number in the storage type of ``like``, rounded to nearest even."""
    if x not in _REAL or like not in _BYTES:
        return None
    return like(x, like), lambda context, builder, signature, args: _narrowed(builder, args[0], x, like)


@intrinsic
def load(typingctx, array, index, like):
    """array[index : index + lanes] as a vector of the type of the number ``like``."""
    vector, stored = Vector(like), array.dtype

    def generate(context, builder, signature, args):
        source = ir.VectorType(_STORED[stored], vector.lanes)
        address = _address(context, builder, signature.args[0], args[0], args[1])
        value = builder.load(builder.bitcast(address, source.as_pointer()), align=_BYTES[stored])
        return _widened(builder, value, stored, vector.element)

    return vector(array, types.intp, like), generate


def _tail(context, builder, signature, args, kind):
    """Address of an array's element as that of a vector of ``kind``, and the mask of its first lanes; from args[:3]."""
    address = _address(context, builder, signature.args[0], args[0], args[1])
    lanes = ir.Constant(ir.VectorType(_I64, kind.count), list(range(kind.count)))
    count = _broadcast_integer(builder, args[2], kind.count)
    return builder.bitcast(address, kind.as_pointer()), builder.icmp_signed("<", lanes, count)


def _broadcast_integer(builder, value, lanes):
    undefined = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    first = builder.insert_element(undefined, value, _I32(0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, lanes), [0] * lanes))


def _suffix(kind):
    """How LLVM writes a vector type in the name of an intrinsic."""
    letter, bits = ("i", kind.element.width) if isinstance(kind.element, ir.IntType) else ("f", None)
    return f"v{kind.count}{letter}{bits or {ir.FloatType(): 32, ir.DoubleType(): 64}[kind.element]}"


@intrinsic
def load_part(typingctx, array, index, count, fill, like):
    """As ``load``, of the first ``count`` lanes alone: the others are not read, and ``fill``."""
    vector, stored = Vector(like), array.dtype

    def generate(context, builder, signature, args):
        kind = ir.VectorType(_STORED[stored], vector.lanes)
        address, mask = _tail(context, builder, signature, args, kind)
        arguments = [address, _I32(_BYTES[stored]), mask, ir.Constant(kind, None)]
        value = _widened(
            builder, _call(builder, f"llvm.masked.load.{_suffix(kind)}.p0", kind, arguments), stored, vector.element
        )
        return builder.select(mask, value, _broadcast(context, builder, args[3], fill, vector))

    return vector(array, types.intp, types.intp, fill, like), generate


@intrinsic
def store_part(typingctx, array, index, count, value):
    """As ``store``, of the first ``count`` lanes alone: nothing else is written."""
    if not isinstance(value, Vector):
        return None
    stored = array.dtype

    def generate(context, builder, signature, args):
        narrow = _narrowed(builder, args[3], value.element, stored)
        address, mask = _tail(context, builder, signature, args, narrow.type)
        arguments = [narrow, address, _I32(_BYTES[stored]), mask]
        _call(builder, f"llvm.masked.store.{_suffix(narrow.type)}.p0", ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), generate


def _storing(bypass):
    def write(typingctx, array, index, value):
        if not isinstance(value, Vector):
            return None
        stored = array.dtype

        def generate(context, builder, signature, args):
            narrow = _narrowed(builder, args[2], value.element, stored)
            address = _address(context, builder, signature.args[0], args[0], args[1])
            size = _BYTES[stored] * (value.lanes if bypass else 1)
            instruction = builder.store(narrow, builder.bitcast(address, narrow.type.as_pointer()), align=size)
            if bypass:
                instruction.set_metadata("nontemporal", builder.module.add_metadata([_I32(1)]))
            return context.get_dummy_value()

        return types.void(array, types.intp, value), generate

    return intrinsic(write)


#: ``store(array, index, vector)``: array[index : index + lanes] = vector.
store = _storing(bypass=False)
#: As ``store``, past the caches: memory is not read before it is overwritten. The address must be a multiple of the
#: vector's size in the array, and :func:`fence` must come before another thread may read.
stream = _storing(bypass=True)


@intrinsic
def prefetch(typingctx, array, index):
    """Ask for the cache line of array[index], which may lie anywhere: outside the array nothing happens."""

    def generate(context, builder, signature, args):
        address = _address(context, builder, signature.args[0], args[0], args[1])
        args = [builder.bitcast(address, _I8.as_pointer()), _I32(0), _I32(3), _I32(1)]
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), args)
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


@intrinsic
def trailing_zeros(typingctx, bits):
    """The number of the lowest bit of a uint64 that is set; 64 if none is."""
    if bits != types.uint64:
        return None
    return types.int64(bits), lambda context, builder, signature, args: builder.cttz(args[0], _I1(0))


@intrinsic
def fence(typingctx):
    """Order the stores before it, streamed ones too, before what follows."""

    def generate(context, builder, signature, args):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), generate
