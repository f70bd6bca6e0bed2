"""Launchers of the CUDA engine: what of an array a kernel takes, grids, streams."""

from __future__ import annotations

from functools import cache

import numpy as np

from kdcore.cuda import kernels, sparse, states
from kdcore.cuda.distillation import parts_of, rates_of
from kdcore.cuda.groups import PUBLISHED, group_kernel, resident_blocks, share_of
from kdcore.cuda.memory import full
from kdcore.cuda.plans import plan_of, require_bfloat16, shared_memory, threads_of
from kdcore.cuda.primitives import BLANK, SIMULATOR, tag_of
from kdcore.cuda.streams import as_queue, launch, on_device_of
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


def _like(wide):
    """A number in the working type, which is how a kernel learns it."""
    return np.float64(0) if wide else np.float32(0)


def _matrix(array):
    """An array [B, V], as kernels take it; one without elements is not given."""
    address = array.address if array.size else 0
    return address, *array.strides, tag_of(array.dtype)


def _vector(array):
    """An array [B], as kernels take it; one without elements is not given."""
    return (array.address, array.strides[0], tag_of(array.dtype)) if array.size else (0, 0, tag_of(array.dtype))


@cache
def _is_bfloat16(dtype):
    return dtype.name == "bfloat16"


def _check_dtypes(*dtypes):
    """The one of the storage types that not every device can write."""
    for dtype in dtypes:
        if _is_bfloat16(dtype):
            require_bfloat16()


def _start(array):
    """The address of a contiguous array; 0 if it has no elements."""
    return array.address if array.size else 0


def _row_operation(name, logits, temperature, out, status, stream):
    rows, size = logits.shape
    _check_dtypes(logits.dtype, out.dtype)
    wide = needs_float64((logits.dtype,), temperature)
    arguments = _matrix(logits), float(temperature), size, _like(wide), _matrix(out), out.shape[1], _start(status)
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
    rows, size = student.shape
    _check_dtypes(student.dtype, teacher.dtype, gradient.dtype)
    divergence = objective.divergence
    parts = parts_of(objective.alpha, objective.temperature)
    temperatures = (objective.temperature, objective.teacher_temperature) if parts.soft else (1.0, 1.0)
    term, slope = (divergence.term, divergence.slope) if parts.soft else (None, None)
    two_formulas = term is not None
    dtypes = (student.dtype, teacher.dtype) if parts.soft else (student.dtype,)
    wide = needs_float64(dtypes, *temperatures)

    def arguments_of(wide):
        return (
            _matrix(student),
            _matrix(teacher if parts.soft else student),
            _vector(labels),
            _vector(weights),
            int(objective.ignore_index),
            denominator.address,
            float(objective.alpha),
            *map(float, temperatures),
            float(objective.kd_scale),
            np.float32(divergence.parameter) if two_formulas and not wide else np.float64(divergence.parameter),
            rates_of(*temperatures, wide),
            size,
            _like(wide),
            _matrix(gradient),
            (loss.address, ce.address, kl.address),
            _start(status),
        )

    itemsizes = student.dtype.itemsize, (teacher if parts.soft else student).dtype.itemsize
    with on_device_of(stream):
        _launch_kd(rows, size, itemsizes, parts, term, slope, wide, arguments_of(wide), stream)
        if two_formulas and not wide:  # of the rows that this has left
            threads = threads_of(size, kernels.most_threads(True))
            launch(kernels.kd_kernel(parts, term, slope, True, left=True), rows, threads, stream, *arguments_of(True))


def _launch_kd(rows, size, itemsizes, parts, term, slope, wide, arguments, stream):
    """A KD call by the kernel that is chosen for the current device."""
    two_formulas = term is not None
    plan = plan_of(size, itemsizes, kernels.most_threads(wide, two_formulas), not wide and not two_formulas)
    if plan.kernel == "group":
        # One array, so that one launch fills it: the records and, behind them, the counts.
        published = rows * plan.blocks * PUBLISHED
        blank = full((published + rows + 1,), np.int64, BLANK, stream)
        share = share_of(size, plan.blocks, plan.threads, *itemsizes)
        arguments = *arguments, rows, plan.blocks, share, blank.address + 8 * published, blank.address
        kernel = group_kernel(parts, plan.threads, resident_blocks(shared_memory()))
        launch(kernel, rows * plan.blocks, plan.threads, stream, *arguments)
    else:
        launch(kernels.kd_kernel(parts, term, slope, wide), rows, plan.threads, stream, *arguments)


def sparse_kd_rows(
    student, indices, log_probs, tail_logmass, n_valid, tail, labels, weights, denominator, objective, gradient, loss,
    ce, kl, status, stream,
):  # fmt: skip
    """As :func:`kd_rows`, of a teacher that has some classes of each row; forward KL, and alpha below 1.

    ``indices`` and ``log_probs`` [B, k], of which the first ``n_valid`` [B] of a row count; ``tail_logmass`` [B], empty
    for samples. ``tail`` is the policy, one of :data:`kdcore.objective.TAILS`.
    """
    rows, size = student.shape
    _check_dtypes(student.dtype, log_probs.dtype, tail_logmass.dtype, gradient.dtype)
    temperature, policy = objective.temperature, TAILS.index(tail)
    parts = parts_of(objective.alpha, temperature)
    wide = needs_float64((student.dtype,), temperature)
    arguments = (
        _matrix(student), _matrix(indices), _matrix(log_probs), _vector(tail_logmass), _vector(n_valid),
        indices.shape[1], policy, _vector(labels), _vector(weights), int(objective.ignore_index), denominator.address,
        float(objective.alpha), float(temperature), float(objective.kd_scale), rates_of(temperature, temperature, wide),
        size, _like(wide), _matrix(gradient), (loss.address, ce.address, kl.address), _start(status),
    )  # fmt: skip
    kernel = sparse.sparse_kd_kernel(parts.hard, parts.power, policy == UNIFORM, wide)
    launch(kernel, rows, threads_of(size, kernels.most_threads(wide)), stream, *arguments)


def state_rows(student, teacher, labels, start, ignore_index, temperature, teacher_temperature, state, status, stream):
    """state [B, STATE_COLUMNS] of slices [B, V], whose first class is ``start``; rows with NaN become NaN."""
    rows, size = student.shape
    _check_dtypes(student.dtype, teacher.dtype)
    parts = parts_of(0.5, temperature)
    wide = needs_float64((student.dtype, teacher.dtype), temperature, teacher_temperature)
    arguments = (
        _matrix(student), _matrix(teacher), _vector(labels), int(start), int(ignore_index),
        rates_of(temperature, teacher_temperature, wide), size, _like(wide), _start(state),
    )  # fmt: skip
    threads = threads_of(size, kernels.most_threads(wide))
    launch(states.state_kernel(parts, wide), rows, threads, stream, *arguments)


def merge_state_rows(a, b, temperature, teacher_temperature, out, stream):
    """out [B, STATE_COLUMNS] = the states of the slices of a and of b together."""
    rows = a.shape[0]
    arguments = _start(a), _start(b), rows, float(temperature), float(teacher_temperature), _start(out)
    launch(states.merge_kernel, -(-rows // _FEW), _FEW, stream, *arguments)


def scale_rows(labels, weights, ignore_index, denominator, out, stream):
    """out [B] = weight / denominator[0] of each row, 0 where it is masked."""
    rows = out.shape[0]
    arguments = _vector(labels), _vector(weights), int(ignore_index), rows, denominator.address, _start(out)
    launch(states.scale_kernel, -(-rows // _FEW), _FEW, stream, *arguments)


def finish_state_rows(state, scale, alpha, kd_scale, teacher_temperature, results, status, stream):
    """results [3, B] = loss, ce and kl of whole rows, scaled; NaN of those that cannot be used."""
    rows = state.shape[0]
    scalars = rows, float(alpha), float(kd_scale), float(teacher_temperature)
    arguments = _start(state), _start(scale), *scalars, tuple(_start(results[k]) for k in range(3))
    launch(states.finish_kernel, -(-rows // _FEW), _FEW, stream, *arguments)


def slice_gradient_rows(
    student, teacher, labels, start, state, scale, alpha, temperature, teacher_temperature, kd_scale, gradient, stream
):
    """gradient [B, V] of slices, from the states [B, STATE_COLUMNS] of whole rows and their scales [B]."""
    rows, size = student.shape
    _check_dtypes(student.dtype, teacher.dtype, gradient.dtype)
    parts = parts_of(alpha, temperature)
    temperatures = (temperature, teacher_temperature) if parts.soft else (1.0, 1.0)
    wide = needs_float64((student.dtype, teacher.dtype), *temperatures)
    arguments = (
        _matrix(student), _matrix(teacher), _vector(labels), int(start), _start(state), _start(scale), float(alpha),
        float(temperatures[0]), float(kd_scale), rates_of(*temperatures, wide), size, _like(wide), _matrix(gradient),
    )  # fmt: skip
    threads = threads_of(size, kernels.most_threads(wide))
    launch(states.gradient_kernel(parts, wide), rows, threads, stream, *arguments)


def weight_sum(labels, weights, ignore_index, rows, out, stream):
    """out[0] = sum of the weights of the rows that are not masked."""
    arguments = _vector(labels), _vector(weights), int(ignore_index), int(rows), out.address
    launch(kernels.weight_sum_kernel, 1, _FEW, stream, *arguments)


def reduce_rows(rows, out, stream):
    """out [K] = sums of ``rows`` [K, B]."""
    launch(kernels.reduce_kernel, rows.shape[0], _FEW, stream, _start(rows), rows.shape[1], out.address)


def fill(out, value, stream):
    """All elements of a contiguous array become ``value``."""
    launch(kernels.fill_kernel, -(-out.size // _FEW), _FEW, stream, _start(out), out.size, out.dtype.type(value))


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
        arguments = _matrix(x), _matrix(weight), _matrix(out), x.shape[1], columns
        launch(kernels.matmul_kernel, rows, _FEW, stream, *arguments)
    elif rows > 0:
        _matmul(x, weight, out, stream)
    launch(kernels.BIAS_KERNELS[activation], rows, _FEW, stream, _vector(bias), _matrix(out), columns)
