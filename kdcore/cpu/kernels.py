"""Kernels of the CPU engine: serial njit loops over the rows [lo, hi) of a batch, to be run by a thread pool.

Letters: B rows, V classes, K teachers. Logits and gradients are flat arrays in storage form (see
:mod:`kdcore.cpu.primitives`), row i from element i * stride on. ``work`` [rows, width] is scratch of the working type,
``states`` [blocks + 2, columns] of float64: the sums of each block, of the row, and the row's factors. Row results [B]
float64, ``status`` [B, 2] int64 (see :mod:`kdcore.rowstatus`).

A kernel goes through a row in **phases**. Those on blocks may be given to several threads, block by block, with a call
of the kernel for each phase in turn: so a single long row uses all threads. Otherwise one call does them all.
"""

import math
from functools import cache
from hashlib import blake2b
from pathlib import Path

from numba import njit

from kdcore import formulas
from kdcore.cpu.primitives import bind, inner
from kdcore.cpu.rows import (
    BLOCK,
    E_S,
    E_T,
    M_S,
    M_T,
    PAD_S,
    PAD_T,
    SLOPE,
    Z_H,
    Z_S,
    Z_T,
    D,
    block_of,
    block_states,
    blocks_in,
    check_row,
    forward_kl_of,
    h_power,
    label_loss,
    merge_softmax,
    merge_states,
    origin,
    shift_of,
    softmax_states,
    two_formula_terms,
    usable_student,
    usable_teacher,
    write_log_softmax,
    write_row,
    write_softmax,
)
from kdcore.cpu.simd import borrowed, fence, from_real, to_real
from kdcore.rowstatus import LABEL, STUDENT, TEACHER, TOO_WIDE, UNDEFINED_GRADIENT, WEIGHT

__all__ = [
    "ALL_PHASES",
    "FORWARD_KL_PHASES",
    "KD_PHASES",
    "SOFTMAX_PHASES",
    "kd_kernel",
    "log_softmax_kernel",
    "logsumexp_kernel",
    "softmax_kernel",
]

BEGIN, STATES, MERGE, TERMS, FINISH, WRITE = (1 << k for k in range(6))
ALL_PHASES = BEGIN | STATES | MERGE | TERMS | FINISH | WRITE
#: The phases in their order, and whether they go block by block.
KD_PHASES = ((BEGIN, False), (STATES, True), (MERGE, False), (TERMS, True), (FINISH, False), (WRITE, True))
FORWARD_KL_PHASES = ((BEGIN, False), (STATES, True), (MERGE | FINISH, False), (WRITE, True))
SOFTMAX_PHASES = ((STATES, True), (MERGE, False), (WRITE, True))

# What BEGIN and MERGE tell the later phases, in the last row of ``states``.
GO, HARD, SOFT_Q, SOFT_P = range(4)

_kd_loss = bind(formulas.kd_loss)
_soft_scale = bind(formulas.soft_scale)


@inner
def _fill(row, value):
    for v in range(row.size):
        row[v] = from_real(value, row[v])


@inner
def _report_row(x, argument, status):
    """What is wrong with a row that cannot be used goes into ``status``."""
    condition, status[1] = check_row(x)
    status[0] = argument + condition


# --- knowledge distillation ----------------------------------------------------------------------------------------


@inner
def _begin(i, classes, labels, weights, ignore_index, status):
    """1 for a row to be worked, 0 for a masked one, NaN for one whose weight or label cannot be used."""
    weight = weights[i] if weights.size else 1.0
    label = labels[i] if labels.size else 0
    if weight == 0.0 or (labels.size and label == ignore_index):
        return 0.0
    if not 0.0 < weight < math.inf:
        status[0] = WEIGHT
        return math.nan
    if labels.size and not 0 <= label < classes:
        status[0], status[1] = LABEL, label
        return math.nan
    return 1.0


def _digest():
    """A hash of everything that the kernels are compiled from."""
    package = Path(__file__).parents[1]
    files = [package / name for name in ("formulas.py", "objective.py", "rowstatus.py")]
    return blake2b(b"".join(path.read_bytes() for path in files + sorted(package.glob("cpu/*.py")))).hexdigest()


_SOURCES = _digest()

#: Stands for the sweep over terms of a divergence (:func:`kdcore.cpu.rows.two_formula_terms`) in a kernel; None, as
#: here: the kernel is forward KL's.
_terms_block = None


def _kd_kernel(terms_block, *key, cache=True):
    """The kernel of one divergence, given by its sweep over terms; None: forward KL, fused.

    Numba finds a compiled kernel on disk by the kernel's own file and closure. It sees neither an edit of the row
    functions and formulas that it calls, nor what a global name stands for. So the digest of all sources and a ``key``
    that tells the divergences apart are in the closure, and the sweep is a global of a copy of the function.
    """
    told_apart = _SOURCES, *key

    def kd_kernel(
        student, student_stride, teacher, teacher_stride, classes, labels, weights, ignore_index, denominator, alpha,
        temperature, teacher_temperature, kd_scale, c, work, pads, states, phases, lo, hi, first, last,
        gradient, gradient_stride, with_gradient, streaming, loss, ce, kl, status,
    ):  # fmt: skip
        """alpha CE + (1 - alpha) kd_scale D(p, q) of the rows [lo, hi), its parts and its gradient."""
        _ = told_apart
        fused = _terms_block is None
        student, teacher, gradient = borrowed(student), borrowed(teacher), borrowed(gradient)
        labels, weights, status = borrowed(labels), borrowed(weights), borrowed(status)
        work, pads, states = borrowed(work), borrowed(pads), borrowed(states)
        blocks = blocks_in(classes)
        hard, soft = alpha > 0.0, alpha < 1.0
        power = h_power(temperature, soft)
        row, told = states[blocks], states[blocks + 1]
        inverse_s, inverse_t = 1.0 / temperature, 1.0 / teacher_temperature
        for i in range(lo, hi):
            s = student[i * student_stride : i * student_stride + classes]
            t = teacher[i * teacher_stride : i * teacher_stride + classes]
            g = gradient[i * gradient_stride : i * gradient_stride + (classes if with_gradient else 0)]
            if phases & BEGIN:
                told[GO] = _begin(i, classes, labels, weights, ignore_index, status[i])
                if told[GO] != 1.0:
                    loss[i] = ce[i] = kl[i] = told[GO]
                    _fill(g, told[GO])
            if phases & STATES and told[GO] == 1.0:
                for b in range(first, last):
                    block_states(
                        s, t, b, hard, soft, power, temperature, teacher_temperature, fused, work, pads, states[b]
                    )
            if phases & MERGE and told[GO] == 1.0:
                merge_states(states, blocks, hard, soft, temperature, teacher_temperature)
                good = usable_student(row, hard, soft)
                if not good:
                    _report_row(s, STUDENT, status[i])
                elif not usable_teacher(row, soft):
                    good = False
                    _report_row(t, TEACHER, status[i])
                if not good:
                    told[GO] = loss[i] = ce[i] = kl[i] = math.nan
                    _fill(g, math.nan)
            if not fused and phases & TERMS and soft and told[GO] == 1.0:
                for b in range(first, last):
                    x, y = block_of(s, b, pads[PAD_S]), block_of(t, b, pads[PAD_T])
                    start, stop = b * BLOCK, b * BLOCK + x.size
                    m_s, m_t = states[b, M_S], states[b, M_T]
                    o_s, o_t = origin(m_s), origin(m_t)
                    constant = (row[M_T] - o_t) * inverse_t - (row[M_S] - o_s) * inverse_s
                    states[b, D], states[b, SLOPE] = _terms_block(
                        x, y, work[E_S, start:stop], work[E_T, start:stop], o_s, o_t,
                        shift_of(m_s, row[M_S], temperature) / row[Z_S],
                        shift_of(m_t, row[M_T], teacher_temperature) / row[Z_T],
                        inverse_s, inverse_t, constant + math.log(row[Z_T] / row[Z_S]), c,
                    )  # fmt: skip
            if phases & FINISH and told[GO] == 1.0:
                scale = (weights[i] if weights.size else 1.0) / denominator
                label = labels[i] if labels.size else 0
                loss[i] = ce[i] = kl[i] = 0.0
                told[HARD] = told[SOFT_Q] = told[SOFT_P] = 0.0
                if hard:
                    told[HARD] = scale * alpha / row[Z_H]
                    ce[i] = scale * label_loss(row, to_real(s[label]))
                if soft:
                    size = _soft_scale(scale, alpha, kd_scale, temperature)
                    if fused:
                        row[D] = forward_kl_of(row, teacher_temperature)
                        told[SOFT_Q], told[SOFT_P] = size / row[Z_S], size / row[Z_T]
                    else:
                        row[D], row[SLOPE] = 0.0, 0.0
                        for b in range(blocks):
                            row[D] += states[b, D]
                            row[SLOPE] += states[b, SLOPE]
                        # In a row without NaN, a NaN is 0 · inf: a class of p = 0 < q whose q has underflowed.
                        row[D] = row[D] if row[D] == row[D] else math.inf
                        told[SOFT_Q], told[SOFT_P] = size, size * row[SLOPE] / row[Z_S]
                        if row[D] == math.inf:
                            told[GO] = math.nan
                            status[i, 0] = TOO_WIDE if work.itemsize == 4 else UNDEFINED_GRADIENT
                            if status[i, 0] == UNDEFINED_GRADIENT:
                                _fill(g, math.nan)
                    kl[i] = scale * kd_scale * row[D]
                loss[i] = _kd_loss(ce[i], kl[i], alpha)
            if phases & WRITE and with_gradient and told[GO] == 1.0:
                write_row(
                    states, row, first, last, power, told[HARD], told[SOFT_Q], told[SOFT_P], alpha, temperature,
                    teacher_temperature, fused, labels[i] if hard else -1, work, streaming, g,
                )  # fmt: skip
        if streaming:
            fence()

    return njit(nogil=True, cache=cache, fastmath=False)(formulas.bound(kd_kernel, {"_terms_block": terms_block}))


def kd_kernel(divergence):
    """The kernel of a divergence (see :mod:`kdcore.divergences`), compiled on its first call; any parameter."""
    return _kernel_of(divergence.name, divergence.term, divergence.slope, divergence.builtin)


@cache
def _kernel_of(name, term, slope, builtin):
    if term is None:
        return _kd_kernel(None, name)
    # A user's formulas may change between two runs without a trace in their names: those are not kept on disk.
    return _kd_kernel(two_formula_terms(bind(term), bind(slope)), name, cache=builtin)


def _softmax_kernel(log):
    """The kernel of softmax, or of its logarithm."""
    told_apart = _SOURCES, log

    @njit(nogil=True, cache=True)
    def softmax_kernel(
        logits, stride, classes, temperature, work, pads, states, phases, lo, hi, first, last, out, out_stride,
        streaming, status,
    ):  # fmt: skip
        """Rows of softmax(x / T) or log softmax(x / T); a row that cannot be used becomes NaN."""
        _ = told_apart
        logits, out, status = borrowed(logits), borrowed(out), borrowed(status)
        work, pads, states = borrowed(work), borrowed(pads), borrowed(states)
        for i in range(lo, hi):
            x = logits[i * stride : i * stride + classes]
            y = out[i * out_stride : i * out_stride + classes]
            if phases & STATES:
                softmax_states(x, temperature, not log, work, pads, states, first, last)
            if phases & MERGE:
                states[-1, GO] = merge_softmax(states, blocks_in(classes), temperature)
                if not states[-1, GO]:
                    _report_row(x, STUDENT, status[i])
                    _fill(y, math.nan)
            if phases & WRITE and states[-1, GO]:
                if log:
                    write_log_softmax(x, temperature, work, pads, states, first, last, y, streaming)
                else:
                    write_softmax(temperature, work, states, first, last, y, streaming)
        if streaming:
            fence()

    return softmax_kernel


def _logsumexp_kernel(sources):
    @njit(nogil=True, cache=True)
    def logsumexp_kernel(
        logits, stride, classes, temperature, work, pads, states, phases, lo, hi, first, last, out, out_stride,
        streaming, status,
    ):  # fmt: skip
        """log sum exp(x / T) of rows, [B]; a row that cannot be used becomes NaN."""
        _ = sources
        logits, status = borrowed(logits), borrowed(status)
        work, pads, states = borrowed(work), borrowed(pads), borrowed(states)
        blocks = blocks_in(classes)
        for i in range(lo, hi):
            x = logits[i * stride : i * stride + classes]
            if phases & STATES:
                softmax_states(x, temperature, False, work, pads, states, first, last)
            if phases & MERGE:
                value = math.nan
                if merge_softmax(states, blocks, temperature):
                    value = states[blocks, M_S] / temperature + math.log(states[blocks, Z_S])
                else:
                    _report_row(x, STUDENT, status[i])
                out[i] = from_real(value, out[i])

    return logsumexp_kernel


softmax_kernel, log_softmax_kernel = _softmax_kernel(log=False), _softmax_kernel(log=True)
logsumexp_kernel = _logsumexp_kernel(_SOURCES)
