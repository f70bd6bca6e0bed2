"""Launchers of the CUDA engine: which kernel, with what parameters, in what grid."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from kdcore.cuda import kernels, sparse, states
from kdcore.cuda.direct import Slot, current_context, set_words
from kdcore.cuda.distillation import parts_of, rates_of
from kdcore.cuda.groups import PUBLISHED, group_kernel, resident_blocks, share_of
from kdcore.cuda.memory import scratch
from kdcore.cuda.parameters import check_dtypes, divisor, like_of, matrix, matrix_of, start_of, vector, vector_of
from kdcore.cuda.plans import chosen, plan_of, shared_memory, threads_of
from kdcore.cuda.primitives import BLANK, SIMULATOR
from kdcore.cuda.streams import Prepared, as_queue, launch, launch_prepared, on_device_of
from kdcore.cuda.sweeps import single
from kdcore.errors import MissingDependencyError
from kdcore.objective import TAILS, UNIFORM, needs_float64

__all__ = [
    "fill",
    "finish_state_rows",
    "kd_rows",
    "linear",
    "log_softmax_rows",
    "logsumexp_rows",
    "merge_state_rows",
    "multiply_rows",
    "reduce_rows",
    "scale_rows",
    "slice_gradient_rows",
    "softmax_rows",
    "sparse_kd_rows",
    "state_rows",
    "weight_sum",
]

#: Threads of the kernels that are not of rows.
_FEW = 64 if SIMULATOR else 256


def _row_operation(name, logits, temperature, out, status, stream):
    rows, size = logits.shape
    check_dtypes(stream, logits.dtype, out.dtype)
    wide = needs_float64((logits.dtype,), temperature)
    arguments = matrix(logits), float(temperature), size, like_of(wide), matrix(out), out.shape[1], start_of(status)
    threads = threads_of(size, kernels.most_threads(wide))
    launch(kernels.row_kernel(name, wide), rows, threads, stream, *arguments)


def softmax_rows(logits, temperature, out, status, stream):
    """out [B, V] = softmax(logits / T)."""
    _row_operation("softmax", logits, temperature, out, status, stream)


def log_softmax_rows(logits, temperature, out, status, stream):
    """out [B, V] = log softmax(logits / T)."""
    _row_operation("log_softmax", logits, temperature, out, status, stream)


def logsumexp_rows(logits, temperature, out, status, stream):
    """out [B] = log of the row sums of exp(logits / T)."""
    _row_operation("logsumexp", logits, temperature, out.reshape((out.size, 1)), status, stream)


def kd_rows(student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, stream):
    """Row losses [B] in float64, scaled by weight / denominator[0], and their gradient [B, V].

    Empty ``labels`` or ``weights``: none given. A gradient or status without rows: none wanted. At alpha = 1 the
    teacher is not read, at alpha = 0 labels only mask.
    """
    queue = as_queue(stream)
    arguments = student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, queue
    if queue.context:
        _kd_rows(queue.context, *arguments)
    else:
        with on_device_of(queue):
            _kd_rows(current_context(), *arguments)


def _kd_rows(context, student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, queue):
    """The same in a context, the device's; 0, if it is not known."""
    rows, size = student.layout.shape
    divergence = objective.divergence
    parts = parts_of(objective.alpha, objective.temperature)
    temperatures = (float(objective.temperature), float(objective.teacher_temperature)) if parts.soft else (1.0, 1.0)
    wide = needs_float64((student.dtype, teacher.dtype) if parts.soft else (student.dtype,), *temperatures)
    prepare = _kd_launch if context else _kd_launch.__wrapped__  # in a context, a device has its attributes
    launches, published = prepare(
        context, chosen(), size, student.layout.access, teacher.layout.access, labels.layout.access,
        weights.layout.access, gradient.layout.access, status.size > 0, divergence.term, divergence.slope,
        parts, wide, objective.ignore_index,
    )  # fmt: skip
    records = counts = 0
    if published:
        # One array, so that it is filled at once: the records and, behind them, the counts.
        count = rows * published
        blank = scratch((count + rows + 1,), np.int64, queue)
        if not set_words(blank.address, BLANK & 0xFFFFFFFF, 2 * blank.size, queue.handle):
            fill(blank, BLANK, queue)
        records, counts = blank.address, blank.address + 8 * count
    numbers = float(objective.alpha), *temperatures, float(objective.kd_scale)
    for of_kernel in launches:
        launch_prepared(
            of_kernel.prepared, -(-rows // of_kernel.of_rows) * of_kernel.blocks, queue, student.address,
            teacher.address, labels.address, weights.address, *divisor(denominator), gradient.address, loss.address,
            ce.address, kl.address, status.address, rows, counts, records, *numbers,
            of_kernel.as_parameter(divergence.parameter), *rates_of(*temperatures, of_kernel.wide),
        )  # fmt: skip


class _KDLaunch(NamedTuple):
    """A launch that is prepared but for addresses, rows and the objective's numbers; of so many blocks for ``of_rows``.

    What kd_rows brings: 14 addresses and counts (one is the denominator's number), 4 numbers, the parameter, 9 rates.
    """

    prepared: Prepared
    blocks: int
    of_rows: int
    #: Whether it works in float64.
    wide: bool
    as_parameter: Callable[[float], Any]


@lru_cache(maxsize=1024)
def _kd_launch(
    context, override, size, student, teacher, labels, weights, gradient, with_status, term, slope, parts, wide,
    ignore_index,
):  # fmt: skip
    """The launches of a KD call in a context, and how many int64 a row's records take.

    Of arrays there is what :attr:`kdcore.cuda.arrays.Layout.access` says.
    """
    check_dtypes(None, student.dtype, teacher.dtype, gradient.dtype)
    if not parts.soft:
        term, slope, teacher = None, None, student
    two_formulas = term is not None
    s, t, y, w, address, number, g, loss, ce, kl, status, rows, counts, records, *numbers = map(Slot, range(28))
    alpha, temperature, teacher_temperature, kd_scale, c, *rates = numbers

    def prepared(kernel, threads, blocks, of_rows, wide, *others):
        as_parameter = single if two_formulas and not wide else np.float64
        codes = "qqqqqdqqqqqqqq" + "dddd" + ("f" if as_parameter is single else "d")
        codes += "d" * 9 if wide else "ffffddfff"
        arguments = (
            matrix_of(student, s),
            matrix_of(teacher, t if parts.soft else s),
            vector_of(labels, y),
            vector_of(weights, w),
            int(ignore_index),
            (address, number),
            alpha,
            temperature,
            teacher_temperature,
            kd_scale,
            c,
            tuple(rates),
            size,
            like_of(wide),
            matrix_of(gradient, g),
            (loss, ce, kl),
            status if with_status else 0,
            *others,
        )
        return _KDLaunch(Prepared(kernel, threads, arguments, codes), blocks, of_rows, wide, as_parameter)

    itemsizes = student.dtype.itemsize, teacher.dtype.itemsize if parts.soft else 0  # of what is read
    plan = plan_of(size, itemsizes, kernels.most_threads(wide), not wide and not two_formulas)
    if plan.kernel == "group":
        share = share_of(size, plan.blocks, plan.threads, *itemsizes)
        kernel = group_kernel(parts, plan.threads, resident_blocks(shared_memory()))
        others = rows, plan.blocks, share, counts, records
        return [prepared(kernel, plan.threads, plan.blocks, 1, wide, *others)], plan.blocks * PUBLISHED
    launches = [prepared(kernels.kd_kernel(parts, term, slope, wide), plan.threads, 1, 1, wide)]
    if two_formulas and not wide:
        kernel, threads = kernels.left_kernel(parts, term, slope), min(plan.threads, kernels.most_threads(True))
        launches.append(prepared(kernel, threads, 1, kernels.LOOKED_AT, True, rows))
    return launches, 0


def sparse_kd_rows(
    student, indices, log_probs, tail_logmass, n_valid, tail, labels, weights, denominator, objective, gradient, loss,
    ce, kl, status, stream,
):  # fmt: skip
    """As :func:`kd_rows`, of a teacher that has some classes of each row; forward KL, and alpha below 1.

    ``indices`` and ``log_probs`` [B, k], of which the first ``n_valid`` [B] of a row count; ``tail_logmass`` [B], empty
    for samples. ``tail`` is the policy, one of :data:`kdcore.objective.TAILS`.
    """
    rows, size = student.shape
    check_dtypes(stream, student.dtype, log_probs.dtype, tail_logmass.dtype, gradient.dtype)
    temperature, policy = objective.temperature, TAILS.index(tail)
    parts = parts_of(objective.alpha, temperature)
    wide = needs_float64((student.dtype,), temperature)
    arguments = (
        matrix(student), matrix(indices), matrix(log_probs), vector(tail_logmass), vector(n_valid),
        indices.shape[1], policy, vector(labels), vector(weights), int(objective.ignore_index), divisor(denominator),
        float(objective.alpha), float(temperature), float(objective.kd_scale), rates_of(temperature, temperature, wide),
        size, like_of(wide), matrix(gradient), (loss.address, ce.address, kl.address), start_of(status),
    )  # fmt: skip
    kernel = sparse.sparse_kd_kernel(parts.hard, parts.power, policy == UNIFORM, wide)
    launch(kernel, rows, threads_of(size, kernels.most_threads(wide)), stream, *arguments)


def state_rows(student, teacher, labels, start, ignore_index, temperature, teacher_temperature, state, status, stream):
    """state [B, STATE_COLUMNS] of slices [B, V], whose first class is ``start``; rows with NaN become NaN."""
    rows, size = student.shape
    check_dtypes(stream, student.dtype, teacher.dtype)
    parts = parts_of(0.5, temperature)
    wide = needs_float64((student.dtype, teacher.dtype), temperature, teacher_temperature)
    arguments = (
        matrix(student), matrix(teacher), vector(labels), int(start), int(ignore_index),
        rates_of(temperature, teacher_temperature, wide), size, like_of(wide), start_of(state),
    )  # fmt: skip
    threads = threads_of(size, kernels.most_threads(wide))
    launch(states.state_kernel(parts, wide), rows, threads, stream, *arguments)


def merge_state_rows(a, b, temperature, teacher_temperature, out, stream):
    """out [B, STATE_COLUMNS] = the states of the slices of a and of b together."""
    rows = a.shape[0]
    arguments = start_of(a), start_of(b), rows, float(temperature), float(teacher_temperature), start_of(out)
    launch(states.merge_kernel, -(-rows // _FEW), _FEW, stream, *arguments)


def scale_rows(labels, weights, ignore_index, denominator, out, stream):
    """out [B] = weight / denominator[0] of each row, 0 where it is masked."""
    rows = out.shape[0]
    arguments = vector(labels), vector(weights), int(ignore_index), rows, denominator.address, start_of(out)
    launch(states.scale_kernel, -(-rows // _FEW), _FEW, stream, *arguments)


def finish_state_rows(state, scale, alpha, kd_scale, teacher_temperature, results, status, stream):
    """results [3, B] = loss, ce and kl of whole rows, scaled; NaN of those that cannot be used."""
    rows = state.shape[0]
    scalars = rows, float(alpha), float(kd_scale), float(teacher_temperature)
    arguments = start_of(state), start_of(scale), *scalars, tuple(start_of(results[k]) for k in range(3))
    launch(states.finish_kernel, -(-rows // _FEW), _FEW, stream, *arguments)


def slice_gradient_rows(
    student, teacher, labels, start, state, scale, alpha, temperature, teacher_temperature, kd_scale, gradient, stream
):
    """gradient [B, V] of slices, from the states [B, STATE_COLUMNS] of whole rows and their scales [B]."""
    rows, size = student.shape
    check_dtypes(stream, student.dtype, teacher.dtype, gradient.dtype)
    parts = parts_of(alpha, temperature)
    temperatures = (temperature, teacher_temperature) if parts.soft else (1.0, 1.0)
    wide = needs_float64((student.dtype, teacher.dtype), *temperatures)
    arguments = (
        matrix(student), matrix(teacher), vector(labels), int(start), start_of(state), start_of(scale), float(alpha),
        float(temperatures[0]), float(kd_scale), rates_of(*temperatures, wide), size, like_of(wide), matrix(gradient),
    )  # fmt: skip
    threads = threads_of(size, kernels.most_threads(wide))
    launch(states.gradient_kernel(parts, wide), rows, threads, stream, *arguments)


def weight_sum(labels, weights, ignore_index, rows, out, stream):
    """out[0] = sum of the weights of the rows that are not masked."""
    prepared = _weight_sum_launch(labels.layout.access, weights.layout.access)
    launch_prepared(prepared, 1, stream, labels.address, weights.address, int(ignore_index), int(rows), out.address)


@lru_cache(maxsize=256)
def _weight_sum_launch(labels, weights):
    y, w, ignore_index, rows, out = map(Slot, range(5))
    arguments = vector_of(labels, y), vector_of(weights, w), ignore_index, rows, out
    return Prepared(kernels.weight_sum_kernel, kernels.ALONE, arguments, "qqqqq")


def reduce_rows(rows, out, stream):
    """out [K] = sums of ``rows`` [K, B]."""
    count, size = rows.layout.shape
    launch_prepared(_REDUCE, count, stream, rows.address if size else 0, size, out.address)


_REDUCE = Prepared(kernels.reduce_kernel, kernels.ALONE, (Slot(0), Slot(1), Slot(2)), "qqq")


def multiply_rows(rows, factors, stream):
    """rows [B, V] *= factors [B], in place, rounded once; a row whose factor is 1 is neither read nor written."""
    count, size = rows.layout.shape
    check_dtypes(stream, rows.dtype)
    prepared, share = _multiply_launch(rows.layout.access, factors.layout.access)
    launch_prepared(prepared, count * -(-size // share), stream, rows.address, factors.address, size)


@lru_cache(maxsize=256)
def _multiply_launch(rows, factors):
    address, of_factors, size = map(Slot, range(3))
    share = 32 * _FEW
    wide = rows.dtype == np.float64
    arguments = matrix_of(rows, address), vector_of(factors, of_factors), size, share, like_of(wide)
    return Prepared(kernels.multiply_kernel, _FEW, arguments, "qqq"), share


def fill(out, value, stream):
    """All elements of a contiguous array become ``value``."""
    launch(kernels.fill_kernel, -(-out.size // _FEW), _FEW, stream, start_of(out), out.size, out.dtype.type(value))


def _matmul(x, weight, out, stream):
    """out [B, M] = x [B, K] @ weight [M, K].T, by cuBLAS."""
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            "matrix products on CUDA need the package CuPy: pip install kdcore[cuda]"
        ) from error
    queue = as_queue(stream)
    with cupy.cuda.Device(queue.device), cupy.cuda.ExternalStream(queue.handle):
        x, weight, out = (cupy.asarray(array) for array in (x, weight, out))
        cupy.matmul(x, weight.T, out=out)


def linear(x, weight, bias, activation, out, stream):
    """out [B, M] = activation(x [B, K] @ weight [M, K].T + bias [M])."""
    rows, columns = out.shape
    if SIMULATOR:
        arguments = matrix(x), matrix(weight), matrix(out), x.shape[1], columns
        launch(kernels.matmul_kernel, rows, _FEW, stream, *arguments)
    elif rows > 0:
        _matmul(x, weight, out, stream)
    launch(kernels.BIAS_KERNELS[activation], rows, _FEW, stream, vector(bias), matrix(out), columns)
