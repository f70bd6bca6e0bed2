"""Kernels of the CUDA engine, one block of THREADS threads a row.

Letters: B rows, V classes. Logits and gradients [B, V] in storage form (see :mod:`kdcore.cuda.primitives`), row results
[B] float64, ``status`` [B, 2] int64 (see :mod:`kdcore.rowstatus`) or without rows, when nobody asks. ``like`` is a
number in the working type. Rows are addressed in 64 bits.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float64

from kdcore import formulas
from kdcore.cuda.primitives import THREADS, bind, from_real
from kdcore.cuda.rows import (
    block_sum,
    cross_entropy_row,
    fill_row,
    forward_kl_classes,
    forward_kl_sums,
    log_softmax_row,
    logsumexp_row,
    max_row,
    softmax_row,
    two_formula_soft,
    write_gradient,
)
from kdcore.rowstatus import LABEL, OK, STUDENT, TEACHER, UNDEFINED_GRADIENT, WEIGHT

__all__ = [
    "BIAS_KERNELS",
    "fill_kernel",
    "kd_kernel",
    "log_softmax_kernel",
    "logsumexp_kernel",
    "matmul_kernel",
    "reduce_kernel",
    "softmax_kernel",
    "weight_sum_kernel",
]

_kd_loss = bind(formulas.kd_loss)


@cuda.jit(device=True)
def _report(status, i, code, detail):
    """status[i] = (code, detail), by one thread."""
    if status.shape[0] > 0 and cuda.threadIdx.x == 0:
        status[i, 0] = code
        status[i, 1] = detail


@cuda.jit(device=True)
def _usable(x, argument, status, i, shared):
    """The maximum of x [V], and whether the row can be used; what is wrong with it goes into status[i]."""
    m, condition, v = max_row(x, shared)
    if condition != OK:
        _report(status, i, argument + condition, v)
    return m, condition == OK


@cuda.jit(device=True)
def _write_row(i, loss_i, ce_i, kl_i, loss, ce, kl):
    """The results [B] of row i, by one thread."""
    if cuda.threadIdx.x == 0:
        loss[i] = loss_i
        ce[i] = ce_i
        kl[i] = kl_i


def _kd_kernel(soft_sums, soft_classes, has_gradient_at_inf):
    """The kernel of one divergence, from its two device functions and whether it has a gradient where it is +inf."""

    @cuda.jit
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, like, gradient, loss, ce, kl, status,
    ):  # fmt: skip
        """student, teacher, gradient [B, V]; labels, weights, loss, ce, kl [B]; denominator [1]; status [B, 2].

        alpha CE + (1 - alpha) kd_scale D(p, q), its parts and its gradient; c is the parameter of D.
        """
        shared = cuda.shared.array((3, THREADS), float64)
        i = cuda.blockIdx.x
        with_gradient = gradient.shape[0] > 0
        weight = np.float64(weights[i]) if weights.size > 0 else 1.0
        label = np.int64(labels[i]) if labels.size > 0 else 0
        if weight == 0.0 or (labels.size > 0 and label == ignore_index):
            _write_row(i, 0.0, 0.0, 0.0, loss, ce, kl)
            _report(status, i, OK, 0)
            if with_gradient:
                fill_row(gradient[i], 0.0)
            return

        m_s, m_t, good = 0.0, 0.0, True
        if not 0.0 < weight < math.inf:
            good = False
            _report(status, i, WEIGHT, 0)
        elif labels.size > 0 and not 0 <= label < student.shape[1]:
            good = False
            _report(status, i, LABEL, label)
        else:
            m_s, good = _usable(student[i], STUDENT, status, i, shared)
            if good and alpha < 1.0:
                m_t, good = _usable(teacher[i], TEACHER, status, i, shared)
        if not good:
            _write_row(i, math.nan, math.nan, math.nan, loss, ce, kl)
            if with_gradient:
                fill_row(gradient[i], math.nan)
            return

        scale = weight / denominator[0]
        ce_i, kl_i, hard, z_h = 0.0, 0.0, 0.0, 1.0
        value, soft_q, soft_p, z_s, z_t, undefined = 0.0, 0.0, 0.0, 1.0, 1.0, False
        if alpha > 0.0:
            value, z_h = cross_entropy_row(student[i], label, m_s, like, shared)
            ce_i = scale * value
            hard = scale * alpha / z_h
        if alpha < 1.0:
            value, soft_q, soft_p, z_s, z_t = soft_sums(
                student[i], teacher[i], m_s, m_t, temperature, teacher_temperature, c, like, shared
            )
            kl_i = scale * kd_scale * value
            soft_q *= scale * (1.0 - alpha) * kd_scale / temperature
            soft_p *= scale * (1.0 - alpha) * kd_scale / temperature
            undefined = not has_gradient_at_inf and value == math.inf
        _write_row(i, _kd_loss(ce_i, kl_i, alpha), ce_i, kl_i, loss, ce, kl)
        _report(status, i, UNDEFINED_GRADIENT if undefined else OK, 0)
        if with_gradient:
            if undefined:
                fill_row(gradient[i], math.nan)
            else:
                write_gradient(
                    student[i], teacher[i], label, m_s, m_t, alpha, hard, z_h,
                    soft_q, soft_p, z_s, z_t, temperature, teacher_temperature, c, soft_classes, like, gradient[i],
                )  # fmt: skip

    return kernel


def kd_kernel(divergence):
    """The KD kernel of a divergence (see :mod:`kdcore.divergences`), the same for any parameter."""
    return _kernel_of(divergence.term, divergence.slope)


@cache
def _kernel_of(term, slope):
    if term is None:
        # Of forward KL the gradient is finite even where the divergence is +inf.
        return _kd_kernel(forward_kl_sums, forward_kl_classes, True)
    return _kd_kernel(*two_formula_soft(bind(term), bind(slope)), False)


@cuda.jit
def softmax_kernel(logits, temperature, like, out, status):
    """out [B, V] = softmax of the rows of logits [B, V] / T; a row that cannot be used becomes NaN."""
    shared = cuda.shared.array((3, THREADS), float64)
    i = cuda.blockIdx.x
    _report(status, i, OK, 0)
    m, good = _usable(logits[i], STUDENT, status, i, shared)
    if good:
        softmax_row(logits[i], m, temperature, like, shared, out[i])
    else:
        fill_row(out[i], math.nan)


@cuda.jit
def log_softmax_kernel(logits, temperature, like, out, status):
    """out [B, V] = log softmax of the rows of logits [B, V] / T; a row that cannot be used becomes NaN."""
    shared = cuda.shared.array((3, THREADS), float64)
    i = cuda.blockIdx.x
    _report(status, i, OK, 0)
    m, good = _usable(logits[i], STUDENT, status, i, shared)
    if good:
        log_softmax_row(logits[i], m, temperature, like, shared, out[i])
    else:
        fill_row(out[i], math.nan)


@cuda.jit
def logsumexp_kernel(logits, temperature, like, out, status):
    """out [B] = log sum exp of the rows of logits [B, V] / T; NaN for a row that cannot be used."""
    shared = cuda.shared.array((3, THREADS), float64)
    i = cuda.blockIdx.x
    _report(status, i, OK, 0)
    m, good = _usable(logits[i], STUDENT, status, i, shared)
    value = logsumexp_row(logits[i], m, temperature, like, shared) if good else math.nan
    if cuda.threadIdx.x == 0:
        out[i] = from_real(value, out[i])


@cuda.jit
def weight_sum_kernel(labels, weights, ignore_index, rows, out):
    """out [1] = sum of weights [B] over the rows that labels [B] do not mask; one block. Either may be empty."""
    shared = cuda.shared.array((3, THREADS), float64)
    total = np.float64(0)
    i = cuda.threadIdx.x
    while i < rows:
        if labels.size == 0 or labels[i] != ignore_index:
            total += np.float64(weights[i]) if weights.size > 0 else 1.0
        i += cuda.blockDim.x
    total = block_sum(total, 0.0, 0.0, shared)[0]
    if cuda.threadIdx.x == 0:
        out[0] = total


@cuda.jit
def reduce_kernel(rows, out):
    """out [K] = sums of rows [K, B], in a fixed order; one block for each."""
    shared = cuda.shared.array((3, THREADS), float64)
    k = cuda.blockIdx.x
    total = np.float64(0)
    i = cuda.threadIdx.x
    while i < rows.shape[1]:
        total += rows[k, i]
        i += cuda.blockDim.x
    total = block_sum(total, 0.0, 0.0, shared)[0]
    if cuda.threadIdx.x == 0:
        out[k] = total


@cuda.jit
def fill_kernel(out, value):
    """out [N] = value."""
    i = cuda.grid(1)
    if i < out.size:
        out[i] = value


@cuda.jit
def matmul_kernel(x, weight, out):
    """out [B, M] = x [B, K] @ weight [M, K].T, one block a row. For the simulator; hardware has cuBLAS."""
    i = cuda.blockIdx.x
    m = cuda.threadIdx.x
    while m < weight.shape[0]:
        total = np.float64(0)
        for k in range(x.shape[1]):
            total += np.float64(x[i, k]) * np.float64(weight[m, k])
        out[i, m] = total
        m += cuda.blockDim.x


def _bias_kernel(activation):
    """The kernel that follows a matrix product, for one activation given as a device function."""

    @cuda.jit
    def bias_kernel(bias, out):
        """out [B, M] = activation(out + bias [M]), one block a row."""
        i = cuda.blockIdx.x
        m = cuda.threadIdx.x
        while m < out.shape[1]:
            out[i, m] = activation(out[i, m] + bias[m])
            m += cuda.blockDim.x

    return bias_kernel


#: What follows the matrix product of a linear layer, by the name of the activation.
BIAS_KERNELS = {name: _bias_kernel(bind(formula)) for name, formula in formulas.ACTIVATIONS.items()}
