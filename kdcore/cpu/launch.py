"""Launchers of the CPU engine: storage views, scratch, threads."""

from __future__ import annotations

import numpy as np
from numba import njit, vectorize

from kdcore import formulas
from kdcore.cpu import kernels
from kdcore.cpu.pool import run_blocks
from kdcore.cpu.primitives import raw_bits
from kdcore.objective import needs_float64

__all__ = ["kd_rows", "linear", "log_softmax_rows", "logsumexp_rows", "reduce_rows", "softmax_rows", "weight_sum"]

_KD_KERNELS = {"forward_kl": kernels.forward_kl_kernel, "reverse_kl": kernels.reverse_kl_kernel}

_compiled: set[tuple[object, ...]] = set()


def _readable(array):
    """The storage view of an input, as read-only, so that a kernel is not compiled once more for read-only arrays."""
    view = raw_bits(array).view()
    view.flags.writeable = False
    return view


def _launch(kernel, before, after, rows, width, scratch_rows, wide, threads):
    """Run ``kernel(*before, work, lo, hi, *after)`` over all rows, worked in float64 if ``wide``."""
    working = np.dtype(np.float64 if wide else np.float32)

    def task(lo, hi):
        # Arrays of their own: rows of one array keep the compiler from vectorising loops over two of them.
        kernel(*before, tuple(np.empty(width, working) for _ in range(scratch_rows)), lo, hi, *after)

    arrays = (a for a in (*before, *after) if isinstance(a, np.ndarray))
    key = (kernel, working, *((a.dtype, a.flags.c_contiguous, a.flags.f_contiguous) for a in arrays))
    if key not in _compiled:
        task(0, 0)
        _compiled.add(key)
    run_blocks(task, rows, width, threads)


def softmax_rows(logits, temperature, out, status, threads):
    """out [B, V] = softmax(logits / T)."""
    wide = needs_float64(logits.dtype.name, temperature)
    arguments = (_readable(logits), temperature), (raw_bits(out), status)
    _launch(kernels.softmax_kernel, *arguments, *logits.shape, 2, wide, threads)


def log_softmax_rows(logits, temperature, out, status, threads):
    """out [B, V] = log softmax(logits / T)."""
    wide = needs_float64(logits.dtype.name, temperature)
    arguments = (_readable(logits), temperature), (raw_bits(out), status)
    _launch(kernels.log_softmax_kernel, *arguments, *logits.shape, 2, wide, threads)


def logsumexp_rows(logits, temperature, out, status, threads):
    """out [B] = log of the row sums of exp(logits / T)."""
    wide = needs_float64(logits.dtype.name, temperature)
    arguments = (_readable(logits), temperature), (raw_bits(out), status)
    _launch(kernels.logsumexp_kernel, *arguments, *logits.shape, 2, wide, threads)


def kd_rows(student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, threads):
    """Row losses [B] in float64, scaled by weight / denominator[0], and their gradient [B, V].

    Empty ``labels`` or ``weights``: none given. A gradient without rows: none wanted. At alpha = 1 the teacher is
    not read, at alpha = 0 labels only mask.
    """
    temperatures = objective.temperature, objective.teacher_temperature
    wide = needs_float64(student.dtype.name, *temperatures, objective.divergence)
    before = (
        _readable(student),
        _readable(teacher),
        _readable(labels),
        _readable(weights),
        objective.ignore_index,
        denominator,
        objective.alpha,
        *temperatures,
        objective.kd_scale,
    )
    after = (raw_bits(gradient), loss, ce, kl, status)
    _launch(_KD_KERNELS[objective.divergence], before, after, *student.shape, 5, wide, threads)


@njit(cache=True)
def _weight_sum(labels, weights, ignore_index, rows):
    total = 0.0
    for i in range(rows):
        if not labels.size or labels[i] != ignore_index:
            total += weights[i] if weights.size else 1.0
    return total


def weight_sum(labels, weights, ignore_index, rows, out, threads):
    """out[0] = sum of the weights of the rows that are not masked."""
    out[0] = _weight_sum(_readable(labels), _readable(weights), ignore_index, rows)


def reduce_rows(rows, out, threads):
    """out[...] = sum of ``rows`` [B]; ``out`` is 0-d."""
    out[...] = np.sum(rows)


_ACTIVATIONS = {name: vectorize(cache=True)(formula) for name, formula in formulas.ACTIVATIONS.items()}


def linear(x, weight, bias, activation, out, threads):
    """out [B, M] = activation(x [B, K] @ weight [M, K].T + bias [M])."""
    np.matmul(x, weight.T, out=out)
    np.add(out, bias, out=out)
    _ACTIVATIONS[activation](out, out=out)
