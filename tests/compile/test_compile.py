"""Every CUDA kernel compiles and assembles, with real typing, for the types that it can get; needs no device.

The simulator checks no types, and inline assembly is text until an assembler reads it: this is what stands between a
mistake there and a user's GPU. Run by itself, without ``NUMBA_ENABLE_CUDASIM``, where ``numba-cuda[cu13]`` is
installed: ``pytest tests/compile``.

Each type occurs with each other one, not in all combinations; kernels are built for the capabilities in turn.
"""

import itertools
import re
import textwrap
from collections import Counter

import ml_dtypes
import numpy as np
import pytest
from building import (
    RESIDENT,
    STORED,
    build,
    dkd_signature,
    group_signature,
    kd_signature,
    left_signature,
    matrix,
    mixture_signature,
    most_registers,
    most_threads,
    rates,
    record_launches,
    row_signature,
    sparse_signature,
    standardize_signature,
    standardized_signature,
    vector,
)
from numba import cuda, typeof
from numba.core import types as nb
from sass import functions_of, width_of

from kdcore import divergences
from kdcore.cuda import groups, kernels, launch, plans, rows, sparse, states, variants
from kdcore.cuda.arrays import DeviceArray, layout_of
from kdcore.cuda.distillation import Parts, parts_of
from kdcore.divergences import Divergence, as_divergence, exp, log, where
from kdcore.objective import TAILS, Objective

SCRATCH = rows.SCRATCH  # a shape must be a constant, which an attribute of a module is not
CAPABILITIES = [(8, 0), (9, 0)]
PAIRS = list(itertools.product(STORED, STORED))
ROW_OPERATIONS = ["softmax", "log_softmax", "logsumexp"]
LABELS = [nb.int64, nb.int32, nb.uint8, nb.int8, nb.uint16, nb.int16, nb.uint32, nb.uint64]
WEIGHTS = [nb.float64, nb.float32]
#: What :func:`parts_of` gives, and an objective each for it.
OBJECTIVES = {
    "soft": (0.0, 2.0),
    "hard": (1.0, 2.0),
    "both, power 0": (0.3, 3.0),
    "both, power 1": (0.3, 1.0),
    "both, power 2": (0.3, 2.0),
    "both, power 4": (0.3, 4.0),
}
PARTS = {name: parts_of(*of) for name, of in OBJECTIVES.items()}


def turn(choices, n):
    return list(choices)[n % len(choices)]


def in_turn(cases):
    """Cases for ``parametrize``, each with its capability."""
    return [pytest.param(*case, turn(CAPABILITIES, n), id="-".join(map(str, case))) for n, case in enumerate(cases)]


def test_objectives_have_all_parts():
    both = {Parts(True, True, power) for power in (0, 1, 2, 4)}
    assert set(PARTS.values()) == both | {Parts(True, False, 1), Parts(False, True, 1)}


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_forward_kl(student, teacher):
    n = PAIRS.index((student, teacher))
    wide = "float64" in (student, teacher)
    kernel = kernels.kd_kernel(turn(PARTS.values(), n), None, None, wide)
    signature = kd_signature(student, teacher, student, wide, turn(LABELS, n), turn(WEIGHTS, n // 2))
    for capability in CAPABILITIES[n % 2 :] if wide else CAPABILITIES:  # in float64 the assembler takes long
        build(kernel, signature, capability)


@pytest.mark.parametrize(
    ("parts", "student", "gradient", "wide", "capability"),
    in_turn(
        (parts, *types)
        for parts in PARTS
        # float64 for narrower logits is for extreme temperatures.
        for types in [("bfloat16", "float32", False), ("float32", "float64", False), ("float32", "bfloat16", True)]
    ),
)
def test_parts(parts, student, gradient, wide, capability):
    """All of an objective's, with a gradient of another type than the student's logits."""
    build(kernels.kd_kernel(PARTS[parts], None, None, wide), kd_signature(student, student, gradient, wide), capability)


def _term(p, q, r, c):
    return where(r > 0.0, where(p > 0, 1, q), c) * log(p + 1) + exp(-q)


def _slope(p, q, r, c):
    return where(p == q, 0, q * r / c)


#: All that go by their two formulas, and one with what a user may write: integers, a constant of another type.
TWO_FORMULAS = {name: as_divergence(name) for name in divergences.NAMES if name != "forward_kl"}
TWO_FORMULAS["own"] = Divergence("own", _term, _slope)
#: Of student, teacher and gradient: each for one of the divergences, which test_resources.py builds with float32.
STORAGES = [
    *((stored,) * 3 for stored in STORED),
    ("float32", "bfloat16", "float32"),
    ("bfloat16", "float32", "float16"),
    ("float64", "float16", "float32"),
]


@pytest.mark.parametrize(
    ("divergence", "parts", "student", "teacher", "gradient", "capability"),
    in_turn(
        (divergence, turn([parts for parts in PARTS if parts != "hard"], n), *storage)
        for n, (divergence, storage) in enumerate(
            zip([*TWO_FORMULAS, "own"], [*STORAGES, ("float32", "float32", "float32")], strict=True)
        )
    ),
)
def test_two_formulas(divergence, parts, student, teacher, gradient, capability):
    """In float32, and the rows that are left in float64."""
    formulas = TWO_FORMULAS[divergence].term, TWO_FORMULAS[divergence].slope
    wide = "float64" in (student, teacher)
    signature = kd_signature(student, teacher, gradient, wide, two_formulas=True)
    build(kernels.kd_kernel(PARTS[parts], *formulas, wide), signature, capability)
    if not wide:
        build(kernels.left_kernel(PARTS[parts], *formulas), left_signature(student, teacher, gradient), capability)


@pytest.mark.parametrize(
    ("student", "teacher", "capability"),
    in_turn((student, teacher) for student, teacher in PAIRS if "float64" not in (student, teacher)),
)
def test_groups(student, teacher, capability):
    parts = turn(PARTS.values(), PAIRS.index((student, teacher)))
    signature = group_signature(student, teacher, student)
    build(groups.group_kernel(parts, groups.MOST_THREADS, RESIDENT[capability]), signature, capability)


@pytest.mark.parametrize(
    ("name", "stored", "out", "wide", "capability"),
    in_turn(
        [
            *((turn(ROW_OPERATIONS, n), *pair, "float64" in pair) for n, pair in enumerate(PAIRS)),
            *((name, stored, stored, True) for name, stored in zip(ROW_OPERATIONS, STORED, strict=False)),
        ]
    ),
)
def test_rows(name, stored, out, wide, capability):
    build(kernels.row_kernel(name, wide), row_signature(stored, out, wide), capability)


@cuda.jit
def _report(student, teacher, size, student_is_bad, status):
    shared = cuda.shared.array(SCRATCH, nb.float64)
    i = np.int64(cuda.blockIdx.x)
    s, t = kernels.row_at(student, i), kernels.row_at(teacher, i)
    kernels.report_unusable(i, s, t, size, student_is_bad, status, shared)


@pytest.mark.parametrize("pair", [("float32", "bfloat16"), ("float16", "float64")], ids="-".join)
def test_a_bad_row_is_read_as_it_is_stored(pair):
    """Each of both, of which Numba could make one type."""
    signature = *(matrix(STORED[stored]) for stored in pair), nb.int64, nb.boolean, nb.int64
    functions = functions_of(build(_report, signature, (9, 0)).code)
    loads = {
        opcode for function in functions.values() for block in function.blocks.values() for opcode in block
        if opcode.startswith("LDG")
    }  # fmt: skip
    widths = {16 if "U16" in opcode else width_of(opcode, "LDG") for opcode in loads}
    assert widths == {8 * np.dtype(np.uint16 if stored == "bfloat16" else stored).itemsize for stored in pair}


#: What is stored of a teacher: types of classes, and of their log-probabilities.
SPARSE = [(nb.int32, nb.float32), (nb.int64, nb.float64), (nb.uint16, nb.float16), (nb.uint32, nb.uint16)]


@pytest.mark.parametrize(
    ("student", "gradient", "wide", "parts", "linear", "capability"),
    in_turn(
        (*of, turn([parts for parts in PARTS if PARTS[parts].soft], n), n % 3 == 0)
        for n, of in enumerate(
            [(stored, stored, stored == "float64") for stored in STORED]
            + [("float32", "bfloat16", False), ("bfloat16", "float64", False), ("float32", "float32", True)]
        )
    ),
)
def test_sparse_teachers(student, gradient, wide, parts, linear, capability):
    """For each part of an objective, and for the policy that needs the tail's logits: without spilled registers."""
    n = list(STORED).index(student)
    signature = sparse_signature(student, gradient, wide, *SPARSE[n], turn(LABELS, n), turn(WEIGHTS, n // 2))
    kernel = sparse.sparse_kd_kernel(PARTS[parts].hard, PARTS[parts].power, linear, wide)
    built = build(kernel, signature, capability)
    assert (built.stack, built.spilled) == (0, 0)


#: Kernels of the variants and types of their arguments, by name: each type of storage, of labels and of weights.
VARIANTS = {
    **{
        f"dkd, {parts}, {student}": (
            variants.dkd_kernel(PARTS[parts].hard, PARTS[parts].power),
            dkd_signature(student, turn(STORED, n + 1), turn(STORED, n // 2), turn(LABELS, n), turn(WEIGHTS, n)),
        )
        for n, (parts, student) in enumerate(
            itertools.product([parts for parts in PARTS if PARTS[parts].soft], ["float32", "bfloat16"])
        )
    },
    "dkd, both, float16": (variants.dkd_kernel(True, 0), dkd_signature("float16", "float64", "float16")),
    "dkd, both, float64": (variants.dkd_kernel(True, 0), dkd_signature("float64", "float64", "float64")),
    **{
        f"mixture, {stored}": (
            variants.mixture_kernel,
            mixture_signature(stored, turn(WEIGHTS, n), turn(LABELS, 3 * n), turn(WEIGHTS, n // 2)),
        )
        for n, stored in enumerate(STORED)
    },
    **{
        f"standardize, {stored}": (
            variants.standardize_kernel, standardize_signature(stored, turn(LABELS, n + 1), turn(WEIGHTS, n))
        )
        for n, stored in enumerate(STORED)
    },
    **{
        f"standardized, {hard}, {stored}": (
            variants.standardized_kernel(hard),
            standardized_signature(stored, turn(STORED, n + hard), turn(LABELS, n + 4), turn(WEIGHTS, n)),
        )
        for n, stored in enumerate(STORED)
        for hard in (False, True)
    },
}  # fmt: skip


#: Those that are built for each generation of devices; the others for one of them in turn.
MAIN_VARIANTS = {
    "dkd, both, power 0, float32",
    "mixture, bfloat16",
    "standardize, bfloat16",
    "standardized, True, float32",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name):
    """Without spilled registers, and without memory of a thread's own."""
    kernel, signature = VARIANTS[name]
    for capability in RESIDENT if name in MAIN_VARIANTS else [turn(RESIDENT, list(VARIANTS).index(name))]:
        built = build(kernel, signature, capability)
        assert (built.stack, built.spilled) == (0, 0)
        assert built.registers <= most_registers(kernel)
        functions = functions_of(built.code).values()
        opcodes = {opcode for function in functions for block in function.blocks.values() for opcode in block}
        assert opcodes
        assert not [opcode for opcode in opcodes if width_of(opcode, "LDL", "STL")]


def test_each_variant_has_a_main_kernel():
    assert set(VARIANTS) >= MAIN_VARIANTS


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_sums(capability):
    address = nb.int64
    for n, labels in enumerate(LABELS):
        signature = vector(labels), vector(turn(WEIGHTS, n)), nb.int64, nb.int64, address
        build(kernels.weight_sum_kernel, signature, capability)
    build(kernels.reduce_kernel, (address, nb.int64, address), capability)


@pytest.mark.parametrize(("stored", "factors"), PAIRS)
def test_products(stored, factors):
    wide = stored == "float64"
    signature = matrix(STORED[stored]), vector(STORED[factors]), nb.int64, nb.int64, nb.float64 if wide else nb.float32
    built = build(kernels.multiply_kernel, signature, turn(CAPABILITIES, PAIRS.index((stored, factors))))
    assert (built.stack, built.spilled) == (0, 0)
    opcodes = {code for of in functions_of(built.code).values() for block in of.blocks.values() for code in block}
    assert any(code.startswith("FMUL") or wide for code in opcodes)
    assert wide or not any(code.startswith("DMUL") for code in opcodes)


@pytest.mark.parametrize("value", [nb.float64, nb.float32, nb.int64, nb.int32], ids=str)
def test_fill(value):
    build(kernels.fill_kernel, (nb.int64, nb.int64, value), (9, 0))


@pytest.mark.parametrize(("activation", "stored"), list(zip(kernels.BIAS_KERNELS, STORED, strict=True)))
def test_linear(activation, stored):
    of_layer = matrix(STORED[stored])
    build(kernels.BIAS_KERNELS[activation], (vector(STORED[stored]), of_layer, nb.int64), (8, 0))
    build(kernels.matmul_kernel, (of_layer, of_layer, of_layer, nb.int64, nb.int64), (8, 0))


@pytest.mark.parametrize(
    ("parts", "stored", "wide", "capability"),
    in_turn((parts, *of) for parts in PARTS for of in [("float32", False), ("bfloat16", False), ("float64", True)]),
)
def test_states(parts, stored, wide, capability):
    like = nb.float64 if wide else nb.float32
    logits, address, real = matrix(STORED[stored]), nb.int64, nb.float64
    labels = vector(nb.int64), nb.int64
    if PARTS[parts].soft and PARTS[parts].hard:
        signature = logits, logits, *labels, nb.int64, rates(like), nb.int64, like, address
        build(states.state_kernel(PARTS[parts], wide), signature, capability)
    signature = logits, logits, *labels, address, address, *(real,) * 3, rates(like), nb.int64, like, logits
    build(states.gradient_kernel(PARTS[parts], wide), signature, capability)


def test_sums_of_states():
    address, count, real = nb.int64, nb.int64, nb.float64
    build(states.merge_kernel, (address, address, count, real, real, address), (8, 0))
    build(states.scale_kernel, (vector(nb.int64), vector(nb.float32), nb.int64, count, address, address), (8, 0))
    build(states.finish_kernel, (address, address, count, real, real, real, nb.UniTuple(address, 3)), (8, 0))


def test_the_quick_way_is_rounded_as_it_is_written():
    """The assembler makes one instruction of x y + z where it can: of two origins it would round one alone."""
    _, place, shift, moved, *_ = rows.way_of(careful=False)

    @cuda.jit(launch_bounds=32)
    def kernel(m, n, x, c, out):
        out[0] = moved(place(m, c), place(n, c))
        out[1] = shift(x, place(m, c), c)

    built = build(kernel, (nb.float32, nb.float32, nb.float32, nb.float32, nb.float32[::1]), (9, 0))
    (function,) = functions_of(built.code).values()
    found = Counter(
        opcode for block in function.blocks.values() for opcode in block if opcode[:2] in ("FM", "FF", "FA")
    )
    assert found == {"FMUL": 2, "FADD": 1, "FFMA": 1}


def test_no_kernel_is_left_out():
    tested = {
        "BIAS_KERNELS",
        "fill_kernel",
        "kd_kernel",
        "left_kernel",
        "matmul_kernel",
        "multiply_kernel",
        "reduce_kernel",
    }
    tested |= {"row_kernel", "weight_sum_kernel"}
    assert {name for name in kernels.__all__ if "kernel" in name.lower()} == tested
    assert {name for name in groups.__all__ if "kernel" in name.lower()} == {"group_kernel"}
    assert sparse.__all__ == ["sparse_kd_kernel"]
    of_variants = {"dkd_kernel", "mixture_kernel", "standardize_kernel", "standardized_kernel"}
    assert {name for name in variants.__all__ if "kernel" in name} == of_variants
    of_states = {"finish_kernel", "gradient_kernel", "merge_kernel", "scale_kernel", "state_kernel"}
    assert {name for name in states.__all__ if "kernel" in name.lower()} == of_states


# --- kernels of a user's own, which are given arrays -----------------------------------------------------------------


def documented_kernel():
    """The kernel in the docstring of :mod:`kdcore.cuda.rows`."""
    code = re.search(r"::\n\n(    from .*?)\n\n    kernel\[", rows.__doc__, re.DOTALL)[1]
    names = {}
    exec(textwrap.dedent(code), names)
    return names["kernel"]


@cuda.jit
def _own(student, teacher, like, out, results):
    shared = cuda.shared.array(SCRATCH, nb.float64)
    i = cuda.blockIdx.x
    size = student.shape[1]
    s, t, to = rows.row_of(student[i]), rows.row_of(teacher[i]), rows.row_of(out[i])
    m, z = rows.softmax_sums(s, size, 2.0, like, shared)
    m_t, z_t = rows.softmax_sums(t, size, 2.0, like, shared)
    if rows.is_usable(z) and rows.is_usable(z_t):
        rows.log_softmax_row(s, size, m, z, 2.0, like, to)
        results[i, 0] = rows.cross_entropy_of(m_t, m, z)
        results[i, 1] = rows.logsumexp_of(m_t, z_t, 2.0)
    else:
        condition, v = rows.condition_of(rows.first_bad_class(s, 0, size, shared), size)
        results[i, 0], results[i, 1] = condition, v
        rows.fill_row(to, 0, size, 0.0)


@pytest.mark.parametrize(
    ("stored", "like", "layout"),
    [
        ("float16", "float32", "C"),
        ("bfloat16", "float64", "A"),
        ("float32", "float32", "A"),
        ("float32", "float64", "C"),
        ("float64", "float64", "A"),
    ],
)
def test_a_kernel_of_row_functions(stored, like, layout):
    logits, like = nb.Array(STORED[stored], 2, layout), STORED[like]
    results = nb.Array(nb.float64, 2, "C")
    build(documented_kernel(), (logits, nb.float64, like, logits, nb.Array(nb.float64, 1, "C")), (9, 0))
    build(_own, (logits, logits, like, nb.Array(like, 2, "C"), results), (8, 0))


# --- what launchers pass ---------------------------------------------------------------------------------------------


def device_array(dtype, *shape):
    dtype = np.dtype(getattr(ml_dtypes, str(dtype), dtype))
    strides = np.empty(shape, dtype).strides
    return DeviceArray(next(_ADDRESSES), layout_of(tuple(shape), tuple(strides), dtype), None, 0)


_ADDRESSES = itertools.count(4096, 1 << 32)


@pytest.fixture
def launched(monkeypatch):
    """What is launched on a device that nobody has."""
    return record_launches(monkeypatch, device_array)


def what(launched):
    """(kernel, threads, the types of the arguments) of the last launch."""
    last = launched.pop()
    return last.kernel, last.threads, tuple(map(typeof, last.arguments))


def launch_kd(student, teacher, size, divergence, alpha, temperature):
    of_rows = [device_array("float64", 2)] * 3
    launch.kd_rows(
        device_array(student, 2, size), device_array(teacher, 2, size), device_array("int32", 2),
        device_array("float32", 0), device_array("float64", 1), Objective(divergence, temperature, 1.5, alpha, 4.0, -1),
        device_array(student, 2, size), *of_rows, device_array("int64", 2, 2), None,
    )  # fmt: skip


@pytest.mark.parametrize("size", [1, 1000, 30000])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("student", STORED)
def test_kd_is_launched_as_it_is_built(launched, student, parts, size):
    for name, teacher in (("forward_kl", "float32"), ("jsd", "bfloat16")):
        divergence = as_divergence(name)
        with plans.using(kernel="row"):
            launch_kd(student, teacher, size, divergence, *OBJECTIVES[parts])
        soft, wide = parts != "hard", student == "float64"
        teacher = teacher if soft else student
        two_formulas = soft and name != "forward_kl"
        formulas = (divergence.term, divergence.slope) if two_formulas else (None, None)
        if two_formulas and not wide:
            kernel, threads, arguments = what(launched)
            assert kernel is kernels.left_kernel(PARTS[parts], *formulas)
            assert arguments == left_signature(student, teacher, student, nb.int32, nb.float32)
            assert 0 < threads <= most_threads(kernel)
        kernel, threads, arguments = what(launched)
        assert kernel is kernels.kd_kernel(PARTS[parts], *formulas, wide)
        assert arguments == kd_signature(student, teacher, student, wide, nb.int32, nb.float32, two_formulas)
        assert 0 < threads <= most_threads(kernel)
        assert not launched


@pytest.mark.parametrize("size", [4096, 300_000])
@pytest.mark.parametrize("parts", PARTS)
def test_groups_are_launched_as_they_are_built(launched, parts, size):
    launch_kd("float16", "bfloat16", size, divergences.forward_kl(), *OBJECTIVES[parts])
    kernel, threads, arguments = what(launched)
    assert kernel is groups.group_kernel(PARTS[parts], threads, RESIDENT[9, 0])
    teacher = "bfloat16" if parts != "hard" else "float16"
    assert arguments == group_signature("float16", teacher, "float16", nb.int32, nb.float32)
    assert 0 < threads <= most_threads(kernel)


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("parts", [parts for parts in PARTS if PARTS[parts].soft])
@pytest.mark.parametrize("student", STORED)
def test_sparse_teachers_are_launched_as_they_are_built(launched, student, parts, tail):
    alpha, temperature = OBJECTIVES[parts]
    of_rows = [device_array("float64", 2)] * 3
    launch.sparse_kd_rows(
        device_array(student, 2, 30000), device_array("int32", 2, 64), device_array("float16", 2, 64),
        device_array("float16", 0 if tail == "zero" else 2), device_array("int32", 2), tail, device_array("int32", 2),
        device_array("float32", 0), device_array("float64", 1),
        Objective(divergences.forward_kl(), temperature, temperature, alpha, 4.0, -1), device_array(student, 2, 30000),
        *of_rows, device_array("int64", 2, 2), None,
    )  # fmt: skip
    kernel, threads, arguments = what(launched)
    wide = student == "float64"
    assert kernel is sparse.sparse_kd_kernel(PARTS[parts].hard, PARTS[parts].power, tail == "uniform", wide)
    assert arguments == sparse_signature(student, student, wide, nb.int32, nb.float16, nb.int32, nb.float32)
    assert 0 < threads <= most_threads(kernel)


@pytest.mark.parametrize("size", [1, 1000, 30000])
@pytest.mark.parametrize("parts", [parts for parts in PARTS if PARTS[parts].soft])
def test_variants_are_launched_as_they_are_built(launched, monkeypatch, parts, size):
    """Chunks of rows included, of which the last has one."""
    monkeypatch.setattr(variants, "_CHUNK", 2 * size)
    alpha, temperature = OBJECTIVES[parts]
    hard, rows = PARTS[parts].hard, 3
    student, teacher = device_array("bfloat16", rows, size), device_array("float16", rows, size)
    rest = (
        device_array("int32", rows), device_array("float32", 0), device_array("float64", 1),
        Objective(divergences.forward_kl(), temperature, temperature, alpha, 4.0, -1),
        device_array("float32", rows, size), *[device_array("float64", rows)] * 3, device_array("int64", 0, 2), None,
    )  # fmt: skip
    kinds = nb.int32, nb.float32

    variants.dkd_rows(student, teacher, 1, 8, *rest)
    kernel, threads, arguments = what(launched)
    assert kernel is variants.dkd_kernel(hard, PARTS[parts].power)
    assert arguments == dkd_signature("bfloat16", "float16", "float32", *kinds)
    assert 0 < threads <= most_threads(kernel) and not launched

    def check(expected):
        assert len(launched) == 2 * len(expected)
        for of, types in reversed(2 * expected):
            kernel, threads, arguments = what(launched)
            assert kernel is of
            assert arguments == types
            assert 0 < threads <= most_threads(kernel)

    kd = kernels.kd_kernel(PARTS[parts], None, None, True)
    for shares, stored in [
        ((0.5, 0.5), "float64"),
        (device_array("float32", 1, 2), "float32"),
        (device_array("float64", rows, 2), "float64"),
    ]:
        variants.mixture_rows(student, [teacher] * 2, shares, device_array("int64", 0, 3), *rest)
        mix = variants.mixture_kernel, mixture_signature("float16", STORED[stored], *kinds)
        check([mix, mix, (kd, kd_signature("bfloat16", "float64", "float32", True, *kinds))])

    variants.standardized_rows(student, teacher, *rest)
    soft = kernels.kd_kernel(PARTS["soft"], None, None, True)
    check([
        *((variants.standardize_kernel, standardize_signature(of, *kinds)) for of in ("bfloat16", "float16")),
        (soft, kd_signature("float64", "float64", "float64", True, *kinds)),
        (variants.standardized_kernel(hard), standardized_signature("bfloat16", "float32", *kinds)),
    ])  # fmt: skip


@pytest.mark.parametrize("size", [1, 1000, 30000])
@pytest.mark.parametrize(("stored", "out"), PAIRS)
@pytest.mark.parametrize("name", ROW_OPERATIONS)
def test_row_operations_are_launched_as_they_are_built(launched, name, stored, out, size):
    to = device_array(out, 2) if name == "logsumexp" else device_array(out, 2, size)
    getattr(launch, f"{name}_rows")(device_array(stored, 2, size), 2.0, to, device_array("int64", 0, 2), None)
    kernel, threads, arguments = what(launched)
    wide = stored == "float64"
    assert kernel is kernels.row_kernel(name, wide)
    assert arguments == row_signature(stored, out, wide)
    assert 0 < threads <= most_threads(kernel)
