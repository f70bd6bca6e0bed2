"""Launchers of the CPU engine: storage views, scratch, threads."""

from __future__ import annotations

import threading

import numpy as np
from numba import vectorize

from kdcore import formulas
from kdcore.cpu import kernels, states
from kdcore.cpu.pool import in_one_thread, run_blocks
from kdcore.cpu.primitives import raw_bits
from kdcore.cpu.rows import BLOCK, COLUMNS, WORK_ROWS
from kdcore.cpu.sparse import SINGLE_ROWS, sparse_kd_kernel
from kdcore.objective import TAILS, needs_float64
from kdcore.rowstatus import TOO_WIDE

__all__ = [
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

#: Rows of this many blocks are shared among threads, where there are too few rows to go round.
_LONG = 8
#: Results of this many bytes will not stay in a cache until they are read: they go past it, if their rows have so many
#: bytes that it pays.
_STREAMED, _STREAMED_ROW = 1 << 23, 1 << 13
#: Scratch for rows of this many classes, 12 MiB in float32, is not kept.
_KEPT = 1 << 20
#: Elements that are copied at a time, of arrays whose rows are not contiguous.
_COPIED = 1 << 16

_compiled: set[tuple[object, ...]] = set()


def _readable(array):
    """A view as read-only, so that no kernel is compiled once more for read-only arrays."""
    view = array.view()
    view.setflags(write=False)
    return view


class _Rows:
    """An array [B, V] as a flat one and the distance between its rows; ``flat`` is None if rows are not contiguous."""

    __slots__ = ("array", "flat", "stride", "writable")

    def __init__(self, array, writable=False):
        self.array, self.writable = array, writable
        rows, width = array.shape
        if array.flags.c_contiguous:
            flat, self.stride = array.reshape(-1), width
        else:
            (row, column), size = array.strides, array.itemsize
            self.stride, rest = divmod(row, size)
            if not (column == size or width == 1) or rest or self.stride < width:
                self.flat = None
                return
            flat = np.lib.stride_tricks.as_strided(array, ((rows - 1) * self.stride + width,), (size,))
        flat = raw_bits(flat)
        self.flat = flat if writable else _readable(flat)

    def part(self, lo, hi):
        """Some of the rows, contiguous; of results too, since in place a row that is not written keeps its logits."""
        return _Rows(np.array(self.array[lo:hi], order="C"), self.writable)


class _Scratch:
    """``work``, ``pads`` and ``states`` of the kernels, for rows of up to ``width`` classes."""

    __slots__ = ("_single", "pads", "states", "width", "work")

    def __init__(self, width, wide):
        dtype, lanes = (np.float64, 8) if wide else (np.float32, 16)
        self.width = width
        self.states = np.empty((-(-width // BLOCK) + 2, COLUMNS))
        self.work = _aligned(WORK_ROWS, -(-width // lanes) * lanes + lanes, dtype, lanes)
        self.pads = np.empty((2, BLOCK), dtype)
        self._single = None

    @property
    def single(self):
        """Scratch of :mod:`kdcore.cpu.sparse`: bits, words, slots, single, of_single, starts."""
        if self._single is None:
            width, blocks = self.width, -(-self.width // BLOCK)
            self._single = (
                np.zeros(-(-width // 64), np.uint64), np.zeros(blocks, np.uint64), np.empty(width, np.int32),
                np.empty(width, np.int64), np.empty((SINGLE_ROWS, width + 8)), np.empty(blocks + 3, np.int64),
            )  # fmt: skip
        return self._single


def _aligned(rows, width, dtype, lanes):
    """An uninitialised array whose rows start with a cache line; ``width`` is a multiple of the lanes of one."""
    flat = np.empty(rows * width + lanes, dtype)
    start = -(flat.ctypes.data // flat.itemsize) % lanes
    return flat[start : start + rows * width].reshape(rows, width)


class _Kept(threading.local):
    """The scratch of a thread, which small calls have no time to allocate, and whose pages are new each time."""

    def __init__(self):
        self.of = {}


_kept = _Kept()


def _scratch(width, wide):
    """Scratch of the thread that asks, of which the largest so far is kept from call to call."""
    scratch = _kept.of.get(wide)
    if scratch is None or scratch.width < width:
        scratch = _Scratch(max(width, BLOCK), wide)
        if width <= _KEPT:
            _kept.of[wide] = scratch
    return scratch


def _launch(key, invoke, phases, arrays, shape, wide, threads):
    """Work all rows with ``invoke(arrays, part, scratch, pads, phases, lo, hi, first, last)``; ``pads`` of the thread.

    ``part`` says of which of the rows the arrays are, if not of all: then they are copies. ``key``: what the kernel is
    specialised for, beside the types of the arrays.
    """
    rows, width = shape
    if rows == 0:
        return
    blocks = -(-width // BLOCK)
    direct = all([array.flat is not None for array in arrays])
    shared = direct and rows < threads and blocks >= _LONG
    serial = not shared and in_one_thread(rows, width, threads)
    if direct and serial:  # first, and with nothing made that it does not need: a small call has no time for it
        scratch = _scratch(width, wide)
        invoke(arrays, None, scratch, scratch.pads, kernels.ALL_PHASES, 0, rows, 0, blocks)
        return

    def work_rows(lo, hi):
        scratch = _scratch(width, wide)
        if direct:
            invoke(arrays, None, scratch, scratch.pads, kernels.ALL_PHASES, lo, hi, 0, blocks)
            return
        step = max(1, _COPIED // width)
        for start in range(lo, hi, step):
            stop = min(start + step, hi)
            copies = [array.part(start, stop) for array in arrays]
            invoke(copies, slice(start, stop), scratch, scratch.pads, kernels.ALL_PHASES, 0, stop - start, 0, blocks)
            for array, copy in zip(arrays, copies, strict=True):
                if array.writable:
                    array.array[start:stop] = copy.array

    if serial:
        work_rows(0, rows)
        return
    _compile_once(key, invoke, arrays, wide)
    if not shared:
        run_blocks(work_rows, rows, width, threads)
        return
    scratch = _scratch(width, wide)
    for i in range(rows):
        for phase, on_blocks in phases:

            def work_blocks(first, last, phase=phase, i=i):
                invoke(arrays, None, scratch, _scratch(BLOCK, wide).pads, phase, i, i + 1, first, last)

            if on_blocks:
                run_blocks(work_blocks, blocks, BLOCK, threads)
            else:
                work_blocks(0, blocks)


def _compile_once(key, invoke, arrays, wide):
    """Compile in the caller's thread, by a call without rows: in a pool's it may wait for the caller's import."""
    key = (*key, wide, *[array.array.dtype.num for array in arrays])
    if key not in _compiled:
        scratch = _Scratch(1, wide)
        invoke([array.part(0, 0) for array in arrays], slice(0, 0), scratch, scratch.pads, 0, 0, 0, 0, 0)
        _compiled.add(key)


def _to_memory(out):
    """Whether a result [B, V] is to be stored past the caches."""
    return out.nbytes >= _STREAMED and out.nbytes >= _STREAMED_ROW * out.shape[0]


def _softmax_launch(kernel, logits, temperature, out, status, threads):
    wide = needs_float64((logits.dtype,), temperature)
    classes = logits.shape[1]
    per_row = out.ndim == 1
    streaming = _to_memory(out)

    def invoke(arrays, part, scratch, pads, phases, lo, hi, first, last):
        x, y = arrays[0], raw_bits(out if part is None else out[part]) if per_row else arrays[1].flat
        kernel(
            x.flat, x.stride, classes, temperature, scratch.work, pads, scratch.states, phases, lo, hi, first, last,
            y, 0 if per_row else arrays[1].stride, streaming, status if part is None else status[part],
        )  # fmt: skip

    arrays = [_Rows(logits)] if per_row else [_Rows(logits), _Rows(out, writable=True)]
    _launch((kernel, out.dtype), invoke, kernels.SOFTMAX_PHASES, arrays, logits.shape, wide, threads)


def softmax_rows(logits, temperature, out, status, threads):
    """out [B, V] = softmax(logits / T)."""
    _softmax_launch(kernels.softmax_kernel, logits, temperature, out, status, threads)


def log_softmax_rows(logits, temperature, out, status, threads):
    """out [B, V] = log softmax(logits / T)."""
    _softmax_launch(kernels.log_softmax_kernel, logits, temperature, out, status, threads)


def logsumexp_rows(logits, temperature, out, status, threads):
    """out [B] = log of the row sums of exp(logits / T)."""
    _softmax_launch(kernels.logsumexp_kernel, logits, temperature, out, status, threads)


def kd_rows(student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, threads):
    """Row losses [B] in float64, scaled by weight / denominator, and their gradient [B, V].

    Empty ``labels`` or ``weights``: none given. A gradient without rows: none wanted. At alpha = 1 the teacher is
    not read, at alpha = 0 labels only mask.
    """
    temperatures = objective.temperature, objective.teacher_temperature
    wide = needs_float64((student.dtype, teacher.dtype), *temperatures)
    arrays = student, teacher, labels, weights, gradient, loss, ce, kl, status
    _kd_launch(*arrays, denominator[0], objective, wide, threads)
    if wide or objective.divergence.term is None:
        return
    for i in np.flatnonzero(status[:, 0] == TOO_WIDE):
        status[i] = 0
        _kd_launch(*(array[i : i + 1] for array in arrays), denominator[0], objective, True, threads)


def _kd_launch(
    student, teacher, labels, weights, gradient, loss, ce, kl, status, denominator, objective, wide, threads
):
    divergence, temperature, teacher_temperature, alpha, kd_scale, ignore_index = objective
    classes = student.shape[1]
    kernel = kernels.kd_kernel(divergence)
    with_gradient = gradient.shape[0] > 0
    streaming = _to_memory(gradient)
    labels, weights = _readable(labels), _readable(weights)

    def invoke(arrays, part, scratch, pads, phases, lo, hi, first, last):
        s, t = arrays[:2]
        g, stride = (arrays[2].flat, arrays[2].stride) if with_gradient else (raw_bits(gradient.reshape(-1)), 0)
        rows = labels, weights, loss, ce, kl, status
        if part is not None:
            rows = tuple(array[part] if array.size else array for array in rows)
        kernel(
            s.flat, s.stride, t.flat, t.stride, classes, rows[0], rows[1], ignore_index, denominator, alpha,
            temperature, teacher_temperature, kd_scale, divergence.parameter, scratch.work, pads, scratch.states,
            phases, lo, hi, first, last, g, stride, with_gradient, streaming, *rows[2:],
        )  # fmt: skip

    arrays = [_Rows(student), _Rows(teacher)] + ([_Rows(gradient, writable=True)] if with_gradient else [])
    phases = kernels.FORWARD_KL_PHASES if divergence.term is None else kernels.KD_PHASES
    _launch((kernel, gradient.dtype), invoke, phases, arrays, student.shape, wide, threads)


def sparse_kd_rows(
    student, indices, log_probs, tail_logmass, n_valid, tail, labels, weights, denominator, objective, gradient, loss,
    ce, kl, status, threads,
):  # fmt: skip
    """As :func:`kd_rows`, of a teacher that has some classes of each row; forward KL, and alpha below 1.

    ``indices`` int32 and ``log_probs`` float64 [B, k], of which the first ``n_valid`` int32 [B] of a row count;
    ``tail_logmass`` float64 [B], empty for samples. ``tail`` is the policy, one of :data:`kdcore.objective.TAILS`.
    """
    _, temperature, _, alpha, kd_scale, ignore_index = objective
    classes = student.shape[1]
    wide = needs_float64((student.dtype,), temperature)
    with_gradient = gradient.shape[0] > 0
    streaming = _to_memory(gradient)
    teacher = tuple(_readable(array) for array in (indices, log_probs, tail_logmass, n_valid))
    of_rows = *teacher, _readable(labels), _readable(weights), loss, ce, kl, status

    def invoke(arrays, part, scratch, pads, phases, lo, hi, first, last):
        s = arrays[0]
        g, stride = (arrays[1].flat, arrays[1].stride) if with_gradient else (raw_bits(gradient.reshape(-1)), 0)
        rows = of_rows
        if part is not None:
            rows = tuple(array[part] if array.size else array for array in rows)
        sparse_kd_kernel(
            s.flat, s.stride, classes, *rows[:4], TAILS.index(tail), rows[4], rows[5], ignore_index, denominator[0],
            alpha, temperature, kd_scale, scratch.work, pads, scratch.states, *scratch.single, phases, lo, hi, first,
            last, g, stride, with_gradient, streaming, *rows[6:],
        )  # fmt: skip

    arrays = [_Rows(student)] + ([_Rows(gradient, writable=True)] if with_gradient else [])
    key = sparse_kd_kernel, gradient.dtype
    _launch(key, invoke, kernels.FORWARD_KL_PHASES, arrays, student.shape, wide, threads)


def _flat_rows(array, writable=False):
    """An array [..., V] as flat rows; a copy, if its rows are not contiguous or its leading dimensions do not merge."""
    rows = _Rows(array.reshape(-1, array.shape[-1]), writable)
    return rows if rows.flat is not None else _Rows(np.ascontiguousarray(rows.array), writable)


def state_rows(student, teacher, labels, start, ignore_index, temperature, teacher_temperature, state, status, threads):
    """state [B, STATE_COLUMNS] of slices [..., V], whose first class is ``start``."""
    wide = needs_float64((student.dtype, teacher.dtype), temperature, teacher_temperature)
    classes, labels = student.shape[-1], _readable(labels)
    s, t = _flat_rows(student), _flat_rows(teacher)

    def task(lo, hi):
        scratch = _scratch(classes, wide)
        states.state_kernel(
            s.flat, s.stride, t.flat, t.stride, classes, labels, start, ignore_index, temperature, teacher_temperature,
            scratch.work, scratch.pads, scratch.states, lo, hi, state, status,
        )  # fmt: skip

    task(0, 0)  # compiles in the caller's thread
    run_blocks(task, state.shape[0], classes, threads)


def merge_state_rows(a, b, temperature, teacher_temperature, out, threads):
    """out [B, STATE_COLUMNS] = the states of the slices of a and of b together."""
    states.merge_kernel(_readable(a), _readable(b), temperature, teacher_temperature, out)
    # No -0.0 is left, because of 0.0 and -0.0 the first is taken for the larger.
    out += 0.0


def scale_rows(labels, weights, ignore_index, denominator, out, threads):
    """out [B] = weight / denominator[0] of each row, 0 where it is masked."""
    out[...] = weights if weights.size else 1.0
    if labels.size:
        out[labels == ignore_index] = 0.0
    if denominator[0] > 0:
        out /= denominator[0]


def finish_state_rows(state, scale, alpha, kd_scale, teacher_temperature, results, status, threads):
    """results [3, B] = loss, ce and kl of whole rows, scaled; NaN of those that cannot be used."""
    loss, ce, kl = results
    states.finish_kernel(_readable(state), scale, alpha > 0, alpha < 1, teacher_temperature, ce, kl, status)
    with np.errstate(over="ignore"):
        kl *= kd_scale
        loss[...] = kl if alpha == 0 else ce if alpha == 1 else alpha * ce + (1 - alpha) * kl


def slice_gradient_rows(
    student, teacher, labels, start, state, scale, alpha, temperature, teacher_temperature, kd_scale, gradient, threads
):
    """gradient [..., V] of slices, from the states [B, STATE_COLUMNS] of whole rows and their scales [B]."""
    wide = needs_float64((student.dtype, teacher.dtype), temperature, teacher_temperature)
    classes, labels = student.shape[-1], _readable(labels)
    s, t, g = _flat_rows(student), _flat_rows(teacher), _flat_rows(gradient, writable=True)

    def task(lo, hi):
        scratch = _scratch(classes, wide)
        states.slice_gradient_kernel(
            s.flat, s.stride, t.flat, t.stride, classes, labels, start, _readable(state), scale, alpha, temperature,
            teacher_temperature, kd_scale, scratch.work, scratch.pads, scratch.states, lo, hi, g.flat, g.stride,
        )  # fmt: skip

    task(0, 0)
    run_blocks(task, state.shape[0], classes, threads)
    if not np.shares_memory(g.array, gradient):
        gradient[...] = g.array.reshape(gradient.shape)


def weight_sum(labels, weights, ignore_index, rows, out, threads):
    """out[0] = sum of the weights of the rows that are not masked."""
    read = labels != ignore_index
    if weights.size:
        with np.errstate(over="ignore"):
            out[0] = np.add.reduce(weights[read] if labels.size else weights)
    else:
        out[0] = np.count_nonzero(read) if labels.size else rows


def reduce_rows(rows, out, threads):
    """out [K] = sums of ``rows`` [K, B]."""
    np.add.reduce(rows, 1, None, out)


def multiply_rows(rows, factors, threads):
    """rows [B, V] *= factors [B], in place, rounded once; a row whose factor is 1 is neither read nor written."""
    dtype = np.float64 if rows.dtype == np.float64 else np.float32
    with np.errstate(over="ignore", invalid="ignore"):
        for i in np.flatnonzero(factors.astype(dtype, copy=False) != 1.0):
            np.multiply(rows[i], factors[i], out=rows[i], dtype=dtype, casting="unsafe")


_ACTIVATIONS = {name: vectorize(cache=True)(formula) for name, formula in formulas.ACTIVATIONS.items()}


def linear(x, weight, bias, activation, out, threads):
    """out [B, M] = activation(x [B, K] @ weight [M, K].T + bias [M])."""
    np.matmul(x, weight.T, out=out)
    np.add(out, bias, out=out)
    _ACTIVATIONS[activation](out, out=out)
