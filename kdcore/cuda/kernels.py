"""Kernels of the CUDA engine, one block a row; :mod:`kdcore.cuda.groups` has the one of several blocks a row.

Letters: B rows, V classes. Arrays come as addresses (see :mod:`kdcore.cuda.primitives`): a **matrix** [B, V] is
(address, bytes from row to row, bytes from class to class, tag), a **vector** [B] is (address, bytes, tag), and one
with the address 0 is not given. ``like`` is a number in the working type. Row results [B] are float64, ``status``
[B, 2] int64 (see :mod:`kdcore.rowstatus`), contiguous, given by their address alone. Rows are addressed in 64 bits.
"""

import functools
import math
from functools import cache

import numpy as np
from numba import cuda, float64

from kdcore import formulas
from kdcore.cuda.primitives import (
    BLANK,
    SIMULATOR,
    bind,
    cast,
    device,
    is_blank,
    itemsize,
    load_real,
    load_stored,
    store_real,
    store_stored,
)
from kdcore.cuda.rows import (
    SCRATCH,
    block_total,
    condition_of,
    cross_entropy_of,
    exp2_small,
    fill_row,
    first_bad_class,
    is_usable,
    log_softmax_row,
    logsumexp_of,
    octet_of,
    octets_of,
    softmax_row,
    softmax_sums,
    whole_octets,
    write_octet,
)
from kdcore.cuda.sweeps import sweeps
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import LABEL, OK, STUDENT, TEACHER, UNDEFINED_GRADIENT, WEIGHT

__all__ = [
    "ALONE",
    "BIAS_KERNELS",
    "LOOKED_AT",
    "answer_unread",
    "divisor_of",
    "fill_kernel",
    "given",
    "kd_kernel",
    "left_kernel",
    "matmul_kernel",
    "most_threads",
    "multiply_kernel",
    "reduce_kernel",
    "row_at",
    "row_kernel",
    "shares_of",
    "weight_sum_kernel",
]


def most_threads(wide):
    """The most threads of a block, and with them the registers that a thread may have: 128 of 512, 255 of 256."""
    return 256 if wide else 512  # a number of float64 is two registers


_kd_loss = bind(formulas.kd_loss)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)
_soft_scale = bind(formulas.soft_scale)


def kernel_of(threads, blocks=1):
    """``cuda.jit`` with C++'s ``__launch_bounds__(threads, blocks)``, which the simulator has not.

    Without ``blocks`` the compiler spills registers, so that more of them could share a multiprocessor.
    """
    return cuda.jit if SIMULATOR else functools.partial(cuda.jit, launch_bounds=(threads, blocks))


@device
def row_at(matrix, i):
    """Row i of a matrix."""
    return matrix[0] + i * matrix[1], matrix[2], matrix[3]


@device
def given(array):
    """Whether an array is."""
    return array[0] != 0


@device
def divisor_of(denominator):
    """What (address, number) says: the float64 at the address, or, without one, the number."""
    return load_stored(denominator[0], np.float64(0)) if given(denominator) else denominator[1]


@device
def weight_at(weights, i):
    return np.float64(load_real(weights[0] + i * weights[1], weights[2])) if given(weights) else 1.0


@device
def label_at(labels, i):
    return np.int64(load_stored(labels[0] + i * labels[1], labels[2])) if given(labels) else np.int64(0)


@device
def report(status, i, code, detail):
    """status[i] = (code, detail), if there is one; for one thread."""
    if status != 0:
        store_stored(status + 16 * i, np.int64(code))
        store_stored(status + 16 * i + 8, np.int64(detail))


@device
def write_results(results, i, loss, ce, kl):
    """The results [B] of row i; for one thread."""
    store_stored(results[0] + 8 * i, loss)
    store_stored(results[1] + 8 * i, ce)
    store_stored(results[2] + 8 * i, kl)


@device
def shares_of(scale, alpha, kd_scale, temperature):
    """(hard, soft): what of a row's scale its gradient has of cross-entropy's softmax, and of the divergence's."""
    return scale * alpha, _soft_scale(scale, alpha, kd_scale, temperature)


@device
def factors_of(scale, alpha, kd_scale, temperature, z_s, z_h, z_t):
    """(hard, soft_q, soft_p) of forward KL, in float64. By two formulas z_s = z_t = 1, and soft_p lacks their mean."""
    hard, soft = shares_of(scale, alpha, kd_scale, temperature)
    return hard / z_h, soft / z_s, soft / z_t


@device
def masked_or_bad(labels, weights, ignore_index, label, weight, size):
    """(whether a row is masked, the code of what is wrong with its label or weight, its detail)."""
    if weight == 0.0 or (given(labels) and label == ignore_index):
        return True, OK, np.int64(0)
    if not 0.0 < weight < math.inf:
        return False, WEIGHT, np.int64(0)
    if given(labels) and not 0 <= label < size:
        return False, LABEL, label
    return False, OK, np.int64(0)


@cuda.jit(device=True)
def answer_unread(i, masked, code, detail, results, status, gradient, g, begin, end):
    """The results of a row that is masked or cannot be worked, and its gradient g from class begin on, before end."""
    value = 0.0 if masked else math.nan
    if cuda.threadIdx.x == 0 and begin == 0:
        write_results(results, i, value, value, value)
        report(status, i, code, detail)
    if given(gradient):
        fill_row(g, begin, end, value)


@cuda.jit(device=True)
def report_unusable(i, s, t, size, student_is_bad, status, shared):
    """What is wrong with the logits of a row that has no softmaxes."""
    # Two calls: of two rows by one name, Numba would make one type, and read one as if it were stored like the other.
    if student_is_bad:
        first = first_bad_class(s, np.int64(0), size, shared)
    else:
        first = first_bad_class(t, np.int64(0), size, shared)
    condition, v = condition_of(first, size)
    if cuda.threadIdx.x == 0:
        report(status, i, (STUDENT if student_is_bad else TEACHER) + condition, v)


#: Rows that a block of the kernel of left rows has to look at: few are left, and then all at once.
LOOKED_AT = 32


@device
def leave(i, results):
    """Row i is left to the kernel that works in float64; for one thread."""
    store_stored(results[0] + 8 * i, np.int64(BLANK))


@device
def is_left(i, results):
    return is_blank(load_stored(results[0] + 8 * i, np.float64(0)))


# What one thread of the row kernel tells the others, in a row of the reductions' scratch that they are done with: the
# gradient's factors, the label's logits and z_h as it is for it; by two formulas, what classes go by.
_OF_H, _OF_S, _OF_T, _X, _Y, _LABEL_SUM, _TO_Q, _TO_P, _LOG_RATIO, _TO_LOG_Q, _TO_LOG_P = range(11)


@cache
def _row_work(parts, term, slope, wide):
    """What a block does with row i, for the kernels below; the other arguments are theirs."""
    soft, hard, _ = parts
    two_formulas = term is not None
    leaves = two_formulas and not wide
    sums_of, weights_of, offsets_of, spend_row, spend_one = sweeps(parts, wide, term, slope)

    @cuda.jit(device=True)
    def work(
        i, shared, student, teacher, labels, weights, ignore_index, denominator, alpha, temperature,
        teacher_temperature, kd_scale, c, rates, size, like, gradient, results, status,
    ):  # fmt: skip
        first, told = cuda.threadIdx.x == 0, shared[1]
        s, t, g = row_at(student, i), row_at(teacher, i), row_at(gradient, i)
        if not given(gradient):
            g = gradient[0], gradient[2], gradient[3]
        weight, label = weight_at(weights, i), label_at(labels, i)
        masked, code, detail = masked_or_bad(labels, weights, ignore_index, label, weight, size)
        if masked or code != OK:
            answer_unread(i, masked, code, detail, results, status, gradient, g, np.int64(0), size)
            return

        adjacent = itemsize(s[2]) == 2 or (soft and itemsize(t[2]) == 2)
        whole = whole_octets(s) and (not soft or whole_octets(t))
        maxima, row_s, row_h, row_t, w = sums_of(s, t, size, rates, adjacent, whole, like, shared)
        if not (is_usable(row_s) and (not soft or is_usable(row_t))):
            if first:
                write_results(results, i, math.nan, math.nan, math.nan)
            report_unusable(i, s, t, size, not is_usable(row_s), status, shared)
            if given(gradient):
                fill_row(g, np.int64(0), size, math.nan)
            return

        # By one thread, since on many devices float64 takes long; for the others, in shared memory.
        scale = 0.0
        if first:
            scale = weight / divisor_of(denominator)
            x_s, x_h, x_t = offsets_of(maxima, rates)
            of_s, of_h, of_t = exp2_small(x_s), exp2_small(x_h), exp2_small(x_t)
            z_s, z_t = (1.0, 1.0) if two_formulas else (row_s, row_t)
            hard_q, soft_q, soft_p = factors_of(scale, alpha, kd_scale, temperature, z_s, row_h, z_t)
            told[_OF_H], told[_OF_S], told[_OF_T] = hard_q * of_h, soft_q * of_s, soft_p * of_t
            if two_formulas:
                told[_TO_Q], told[_TO_P], told[_LOG_RATIO] = 1.0 / row_s, 1.0 / row_t, math.log(row_t / row_s)
                told[_TO_LOG_Q], told[_TO_LOG_P] = 1.0 / HEADROOM / temperature, 1.0 / HEADROOM / teacher_temperature
            if hard:  # before the barrier behind which a gradient may take the place of the logits
                told[_X] = load_real(s[0] + label * s[1], s[2])
                if soft:
                    told[_Y] = load_real(t[0] + label * t[1], t[2])
                told[_LABEL_SUM] = row_h / of_h
        cuda.syncthreads()
        factors = (cast(told[_OF_H], like), cast(told[_OF_S], like), cast(told[_OF_T], like))
        zero = cast(0, like)
        of_classes = (zero, zero, zero, zero, zero, c)
        value, undefined = np.float64(0), False
        if two_formulas:
            of_classes = (
                cast(told[_TO_Q], like), cast(told[_TO_P], like), cast(told[_TO_LOG_Q], like),
                cast(told[_TO_LOG_P], like), cast(told[_LOG_RATIO], like), c,
            )  # fmt: skip
            value, mean = weights_of(s, t, size, maxima, rates, of_classes, adjacent, whole, like, shared)
            if leaves and not (abs(value) < math.inf and abs(mean) < math.inf):
                if first:
                    leave(i, results)
                return
            if math.isnan(value):
                value = math.inf  # in a usable row NaN is 0 * inf: a class of p = 0 < q whose q has underflowed
            undefined = value == math.inf
            factors = (factors[0], factors[1], cast(told[_OF_T] * mean, like))
        if first:  # now, since what it takes would take registers from the sweep
            ce, kl = 0.0, 0.0
            if hard:
                ce = scale * cross_entropy_of(cast(told[_X], like), maxima[0], row_h)
            if soft:
                if not two_formulas:
                    value = _forward_kl_from_sums(w, row_t, row_s, teacher_temperature)
                kl = scale * kd_scale * value
            write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)
            report(status, i, UNDEFINED_GRADIENT if undefined else OK, 0)
        if given(gradient):
            if undefined:
                fill_row(g, np.int64(0), size, math.nan)
            else:
                whole = whole and whole_octets(g) and (adjacent or itemsize(g[2]) != 2)
                spend_row(s, t, g, size, maxima, rates, factors, of_classes, adjacent, whole, like)
                if hard:
                    cuda.syncthreads()
                    if first:  # over what the sweep wrote
                        x, y = cast(told[_X], like), cast(told[_Y], like)
                        z = cast(told[_LABEL_SUM], like)
                        of_label = spend_one(x, y, z, maxima, rates, factors, of_classes)
                        store_real(g[0] + label * g[1], of_label, g[2])

    return work


@cache
def kd_kernel(parts, term, slope, wide):
    """The row kernel of an objective's parts and of its divergence's formulas, None for forward KL.

    ``wide``: whether it is to work in float64. By two formulas, rows whose sums are not finite in float32 are left by
    the one that works in it, unwritten, to :func:`left_kernel`.
    """
    work = _row_work(parts, term, slope, wide)

    @kernel_of(most_threads(wide))
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, rates, size, like, gradient, results, status,
    ):  # fmt: skip
        """student, teacher, gradient: matrices [B, size]; labels, weights: vectors [B]; denominator: see divisor_of.

        alpha CE + (1 - alpha) kd_scale D(p, q), its parts and its gradient; c is the parameter of D, by two
        formulas like ``like``; rates are those of :func:`kdcore.cuda.distillation.rates_of`.
        """
        shared = cuda.shared.array(SCRATCH, float64)
        work(
            np.int64(cuda.blockIdx.x), shared, student, teacher, labels, weights, ignore_index, denominator, alpha,
            temperature, teacher_temperature, kd_scale, c, rates, size, like, gradient, results, status,
        )  # fmt: skip

    return kernel


@cache
def left_kernel(parts, term, slope):
    """The kernel of the rows that :func:`kd_kernel` has left, in float64; a block looks for them among LOOKED_AT."""
    work = _row_work(parts, term, slope, True)

    @kernel_of(most_threads(True))
    def kernel(
        student, teacher, labels, weights, ignore_index, denominator, alpha, temperature, teacher_temperature, kd_scale,
        c, rates, size, like, gradient, results, status, rows,
    ):  # fmt: skip
        shared = cuda.shared.array(SCRATCH, float64)
        start = np.int64(cuda.blockIdx.x) * LOOKED_AT
        end = min(start + LOOKED_AT, rows)
        own = start + cuda.threadIdx.x
        found = np.int32(1 if own < end and is_left(own, results) else 0)
        if cuda.syncthreads_or(found) != 0:
            for i in range(start, end):
                if is_left(i, results):
                    cuda.syncthreads()  # all have seen it, and are done with the row before
                    work(
                        i, shared, student, teacher, labels, weights, ignore_index, denominator, alpha, temperature,
                        teacher_temperature, kd_scale, c, rates, size, like, gradient, results, status,
                    )  # fmt: skip

    return kernel


# --- one row -------------------------------------------------------------------------------------------------------


@device
def _logsumexp_row(row, size, m, z, temperature, like, out):
    if cuda.threadIdx.x == 0:
        store_real(out[0], logsumexp_of(m, z, temperature), out[2])


_WRITERS = {"softmax": softmax_row, "log_softmax": log_softmax_row, "logsumexp": _logsumexp_row}


@cache
def row_kernel(name, wide):
    """The kernel of softmax, log_softmax or logsumexp; ``wide``: whether it is to work in float64."""
    write = _WRITERS[name]

    @kernel_of(most_threads(wide))
    def kernel(logits, temperature, size, like, out, width, status):
        """logits: matrix [B, size]; out: matrix [B, width]; a row that cannot be used becomes NaN."""
        shared = cuda.shared.array(SCRATCH, float64)
        i = np.int64(cuda.blockIdx.x)
        row, to = row_at(logits, i), row_at(out, i)
        m, z = softmax_sums(row, size, temperature, like, shared)
        if is_usable(z):
            if cuda.threadIdx.x == 0:
                report(status, i, OK, 0)
            write(row, size, m, z, temperature, like, to)
        else:
            report_unusable(i, row, row, size, True, status, shared)
            fill_row(to, np.int64(0), width, math.nan)

    return kernel


# --- sums over rows ------------------------------------------------------------------------------------------------


#: Threads of the kernels of one block, each of which reads four rows at a time: what they wait for is memory.
ALONE = 64 if SIMULATOR else 1024


@device
def _counted(labels, weights, ignore_index, i, rows):
    """The weight of row i; 0 where the labels mask it, and of one that there is not."""
    if i >= rows or (given(labels) and label_at(labels, i) == ignore_index):
        return 0.0
    return weight_at(weights, i)


@kernel_of(ALONE)
def weight_sum_kernel(labels, weights, ignore_index, rows, out):
    """out [1] = sum of the weights over the rows that the labels do not mask; one block. out: an address."""
    shared = cuda.shared.array(SCRATCH, float64)
    total, n = np.float64(0), np.int64(cuda.blockDim.x)
    i = np.int64(cuda.threadIdx.x)
    while i < rows:
        a = _counted(labels, weights, ignore_index, i, rows)
        b = _counted(labels, weights, ignore_index, i + n, rows)
        c = _counted(labels, weights, ignore_index, i + 2 * n, rows)
        total += (a + b) + (c + _counted(labels, weights, ignore_index, i + 3 * n, rows))
        i += 4 * n
    total = block_total(total, shared)
    if cuda.threadIdx.x == 0:
        store_stored(out, total)


@device
def _element_before(start, i, end):
    return load_stored(start + 8 * i, np.float64(0)) if i < end else 0.0


@kernel_of(ALONE)
def reduce_kernel(rows, count, out):
    """out [K] = sums of rows [K, count], in a fixed order; one block for each. Addresses of contiguous float64."""
    shared = cuda.shared.array(SCRATCH, float64)
    k = np.int64(cuda.blockIdx.x)
    total, n = np.float64(0), np.int64(cuda.blockDim.x)
    start, i = rows + 8 * k * count, np.int64(cuda.threadIdx.x)
    while i < count:
        a, b = _element_before(start, i, count), _element_before(start, i + n, count)
        total += (a + b) + (_element_before(start, i + 2 * n, count) + _element_before(start, i + 3 * n, count))
        i += 4 * n
    total = block_total(total, shared)
    if cuda.threadIdx.x == 0:
        store_stored(out + 8 * k, total)


@cuda.jit
def fill_kernel(out, count, value):
    """The ``count`` elements from the address ``out`` become value."""
    i = np.int64(cuda.grid(1))
    if i < count:
        store_stored(out + i * itemsize(value), value)


# --- one factor a row ----------------------------------------------------------------------------------------------


@cuda.jit
def multiply_kernel(rows, factors, size, share, like):
    """rows [B, size] *= factors [B], in place; where a factor is 1, its row is neither read nor written.

    A block has ``share`` classes of a row, a multiple of 8 blockDim.x, or what is left of them.
    """
    parts = (size + share - 1) // share
    block = np.int64(cuda.blockIdx.x)
    i = block // parts
    begin = (block - i * parts) * share
    end = min(begin + share, size)
    factor = cast(load_real(factors[0] + i * factors[1], factors[2]), like)
    if factor != cast(1.0, like):
        row = row_at(rows, i)
        whole = whole_octets(row)
        a, gap = octets_of(np.int64(cuda.threadIdx.x), np.int64(cuda.blockDim.x), itemsize(row[2]) == 2)
        a += begin
        while a < end:
            inside = whole and a + gap + 4 <= end
            x = octet_of(row, a, a + gap, end, inside, like)
            x = (
                x[0] * factor, x[1] * factor, x[2] * factor, x[3] * factor,
                x[4] * factor, x[5] * factor, x[6] * factor, x[7] * factor,
            )  # fmt: skip
            write_octet(row, a, a + gap, end, inside, x)
            a += 8 * cuda.blockDim.x


# --- linear layers -------------------------------------------------------------------------------------------------


@cuda.jit
def matmul_kernel(x, weight, out, inner, columns):
    """out [B, M] = x [B, K] @ weight [M, K].T, one block a row. For the simulator; hardware has cuBLAS."""
    i = np.int64(cuda.blockIdx.x)
    m = np.int64(cuda.threadIdx.x)
    x, out = row_at(x, i), row_at(out, i)
    while m < columns:
        total = np.float64(0)
        of_m = row_at(weight, m)
        for k in range(inner):
            total += np.float64(load_real(x[0] + k * x[1], x[2])) * np.float64(
                load_real(of_m[0] + k * of_m[1], of_m[2])
            )
        store_real(out[0] + m * out[1], total, out[2])
        m += cuda.blockDim.x


def _bias_kernel(activation):
    """The kernel that follows a matrix product, for one activation given as a device function."""

    @cuda.jit
    def bias_kernel(bias, out, columns):
        """out [B, columns] = activation(out + bias [columns]), one block a row."""
        i = np.int64(cuda.blockIdx.x)
        m = np.int64(cuda.threadIdx.x)
        row = row_at(out, i)
        while m < columns:
            place = row[0] + m * row[1]
            x = load_real(place, row[2]) + load_real(bias[0] + m * bias[1], bias[2])
            store_real(place, activation(x), row[2])
            m += cuda.blockDim.x

    return bias_kernel


#: What follows the matrix product of a linear layer, by the name of the activation.
BIAS_KERNELS = {name: _bias_kernel(bind(formula)) for name, formula in formulas.ACTIVATIONS.items()}
