"""Kernels without a device: the types of their arguments, and the compiler and assembler that a launch would use."""

import math
import re
import types
from typing import NamedTuple
from unittest import mock

from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.core import types as nb
from numba.cuda import dispatcher

from kdcore.cuda import direct, launch, plans, streams, variants
from kdcore.cuda.groups import resident_blocks

__all__ = [
    "RESIDENT",
    "STORED",
    "Built",
    "Launched",
    "build",
    "dkd_signature",
    "group_signature",
    "kd_signature",
    "left_signature",
    "label_of",
    "matrix",
    "mixture_signature",
    "most_registers",
    "most_threads",
    "rates",
    "record_launches",
    "row_signature",
    "sparse_signature",
    "standardize_signature",
    "standardized_signature",
    "vector",
]

STORED = {"float16": nb.float16, "bfloat16": nb.uint16, "float32": nb.float32, "float64": nb.float64}
#: The address of a denominator, or the number itself.
DIVISOR = nb.Tuple((nb.int64, nb.float64))
#: The type of ``like``, by whether a kernel works in float64.
_LIKE = {False: nb.float32, True: nb.float64}


#: Blocks of the group kernel that are to share a multiprocessor, by what shared memory it has.
RESIDENT = {
    capability: resident_blocks(kilobytes << 10)
    for capability, kilobytes in {(8, 0): 164, (9, 0): 228, (10, 0): 228, (12, 0): 100}.items()
}


class Launched(NamedTuple):
    """What a launcher launches; ``again(kernel, queue)`` makes a function that does so, of another kernel."""

    kernel: object
    blocks: int
    threads: int
    arguments: tuple
    again: object


def record_launches(monkeypatch, make):
    """The list of what launchers launch from now on, on a device that nobody has; make(dtype, *shape): an array."""
    found = []

    def record(kernel, blocks, threads, stream, *arguments):
        def again(ours, queue):
            return lambda: streams.launch(ours, blocks, threads, queue, *arguments)

        found.append(Launched(kernel, blocks, threads, arguments, again))

    def record_prepared(prepared, blocks, stream, *values):
        def again(ours, queue):
            other = streams.Prepared(ours, prepared.threads, prepared.arguments, prepared.codes)
            return lambda: streams.launch_prepared(other, blocks, queue, *values)

        arguments = direct.filled(prepared.arguments, values)
        found.append(Launched(prepared.kernel, blocks, prepared.threads, arguments, again))

    for module in (launch, variants):
        monkeypatch.setattr(module, "launch", record)
        monkeypatch.setattr(module, "scratch", lambda shape, dtype, stream: make(dtype, *shape))
    monkeypatch.setattr(launch, "launch_prepared", record_prepared)
    monkeypatch.setattr(launch, "set_words", lambda *of: True)
    monkeypatch.setattr(launch, "current_context", lambda: 0)
    monkeypatch.setattr(launch, "on_device_of", lambda stream: streams._HERE)
    monkeypatch.setattr(plans, "_of_device", plans._SIMULATED.__getitem__)
    return found


def matrix(tag):
    return nb.Tuple((nb.int64, nb.int64, nb.int64, tag))


def vector(tag):
    return nb.Tuple((nb.int64, nb.int64, tag))


def rates(like):
    return nb.Tuple((*(like,) * 4, nb.float64, nb.float64, *(like,) * 3))


def kd_signature(
    student, teacher, gradient, wide=False, labels=nb.int64, weights=nb.float64, two_formulas=False
):  # fmt: skip
    """Of ``kernels.kd_kernel``; the first three are names of dtypes."""
    parameter = nb.float32 if two_formulas and not wide else nb.float64
    return (
        matrix(STORED[student]), matrix(STORED[teacher]), vector(labels), vector(weights), nb.int64, DIVISOR,
        nb.float64, nb.float64, nb.float64, nb.float64, parameter, rates(_LIKE[wide]), nb.int64,
        _LIKE[wide], matrix(STORED[gradient]),
        nb.UniTuple(nb.int64, 3), nb.int64,
    )  # fmt: skip


def group_signature(student, teacher, gradient, labels=nb.int64, weights=nb.float64):
    """Of ``groups.group_kernel``."""
    return *kd_signature(student, teacher, gradient, False, labels, weights), *(nb.int64,) * 5


def left_signature(student, teacher, gradient, labels=nb.int64, weights=nb.float64):
    """Of ``kernels.left_kernel``."""
    return *kd_signature(student, teacher, gradient, True, labels, weights), nb.int64


def row_signature(stored, out, wide=False):
    """Of ``kernels.row_kernel``, for names of dtypes."""
    return matrix(STORED[stored]), nb.float64, nb.int64, _LIKE[wide], matrix(STORED[out]), nb.int64, nb.int64


def sparse_signature(
    student, gradient, wide=False, indices=nb.int32, log_probs=nb.float32, labels=nb.int64, weights=nb.float64
):
    """Of ``sparse.sparse_kd_kernel``; the first two are names of dtypes."""
    return (
        matrix(STORED[student]), matrix(indices), matrix(log_probs), vector(log_probs), vector(indices), nb.int64,
        nb.int64, vector(labels), vector(weights), nb.int64, DIVISOR, nb.float64, nb.float64, nb.float64,
        rates(_LIKE[wide]), nb.int64, _LIKE[wide], matrix(STORED[gradient]), nb.UniTuple(nb.int64, 3), nb.int64,
    )  # fmt: skip


def dkd_signature(student, teacher, gradient, labels=nb.int64, weights=nb.float64):
    """Of ``variants.dkd_kernel``; the first three are names of dtypes."""
    return (
        matrix(STORED[student]), matrix(STORED[teacher]), nb.float64, nb.float64, vector(labels), vector(weights),
        nb.int64, DIVISOR, nb.float64, nb.float64, nb.float64, nb.int64, matrix(STORED[gradient]),
        nb.UniTuple(nb.int64, 3), nb.int64,
    )  # fmt: skip


def mixture_signature(teacher, shares=nb.float64, labels=nb.int64, weights=nb.float64):
    """Of ``variants.mixture_kernel``; the first is a name of a dtype."""
    return (
        matrix(STORED[teacher]), nb.int64, nb.int64, matrix(shares), nb.float64, vector(labels), vector(weights),
        nb.int64, nb.float64, nb.int64, matrix(nb.float64), nb.int64,
    )  # fmt: skip


def standardize_signature(logits, labels=nb.int64, weights=nb.float64):
    """Of ``variants.standardize_kernel``; the first is a name of a dtype."""
    return (
        matrix(STORED[logits]), nb.int64, vector(labels), vector(weights), nb.int64, nb.int64, matrix(nb.float64),
        nb.int64, nb.int64,
    )  # fmt: skip


def standardized_signature(student, gradient, labels=nb.int64, weights=nb.float64):
    """Of ``variants.standardized_kernel``; the first two are names of dtypes."""
    return (
        matrix(STORED[student]), vector(labels), vector(weights), nb.int64, DIVISOR, nb.float64, nb.int64,
        *(matrix(nb.float64),) * 2, nb.int64, nb.int64, matrix(STORED[gradient]), nb.UniTuple(nb.int64, 3), nb.int64,
    )  # fmt: skip


def label_of(capability):
    return "sm_{}{}".format(*capability)


def _bounds(kernel):
    """(threads at most, blocks of a multiprocessor at least) that a kernel is declared for; None where it is not."""
    bounds = kernel.targetoptions.get("launch_bounds")
    return (bounds, 1) if isinstance(bounds, int) else bounds


def most_threads(kernel):
    """The most threads of a block."""
    return _bounds(kernel)[0]


def most_registers(kernel):
    """What of a multiprocessor's registers a thread may have."""
    return 65536 // math.prod(_bounds(kernel))


class Built(NamedTuple):
    """A kernel's machine code, and what it takes of a processor: registers, bytes of stack, bytes spilled."""

    code: bytes
    registers: int
    stack: int
    spilled: int


_REGISTERS = re.compile(r"Used (\d+) registers")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


def build(kernel, signature, capability):
    """A kernel for a compute capability, through LTO-IR and nvJitLink, as Numba builds it for a launch."""
    device = types.SimpleNamespace(compute_capability=capability)
    with mock.patch.object(dispatcher, "get_current_device", lambda: device):  # device functions ask for it
        code, result = cuda.compile(
            kernel.py_func, signature, device=False, abi="numba", output="ltoir", cc=capability,
            launch_bounds=kernel.targetoptions.get("launch_bounds"),
        )  # fmt: skip
    assert result == nb.void
    options = LinkerOptions(arch=label_of(capability), link_time_optimization=True, ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ltoir(code), options=options)
    cubin = bytes(linker.link("cubin").code)
    log = linker.get_info_log()
    (registers,) = _REGISTERS.findall(log)
    ((stack, *spilled),) = _STACK.findall(log)
    return Built(cubin, int(registers), int(stack), sum(map(int, spilled)))
