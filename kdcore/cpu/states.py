"""Kernels of mergeable row states: of a slice of the vocabulary, merged, finished, and back to the slice's gradient.

Letters: B rows, V classes of a slice. ``state`` [B, STATE_COLUMNS] of float64 holds, row by row, the columns of
``states`` (see :mod:`kdcore.cpu.rows`), and the label's logit.
"""

import math

from numba import njit

from kdcore.cpu.kernels import _SOURCES, _fill, _report_row, _soft_scale
from kdcore.cpu.rows import (
    COLUMNS,
    M_S,
    M_T,
    SLOPE,
    Z_H,
    Z_S,
    Z_T,
    D,
    block_states,
    blocks_in,
    forward_kl_of,
    h_power,
    label_loss,
    merge_states,
    moment_at,
    shift_of,
    usable_student,
    usable_teacher,
    write_row,
)
from kdcore.cpu.simd import borrowed, fence, to_real
from kdcore.rowstatus import NO_SUPPORT, OK, STUDENT, TEACHER

__all__ = ["STATE_COLUMNS", "finish_kernel", "merge_kernel", "slice_gradient_kernel", "state_kernel"]

STATE_COLUMNS = COLUMNS
#: The label's logit, in the column of :data:`kdcore.cpu.rows.COLUMNS` that forward KL leaves free.
LABEL_LOGIT = SLOPE


def _kernels(sources):
    """The kernels; the digest of all ``sources`` is in their closure, see :mod:`kdcore.cpu.kernels`."""

    @njit(nogil=True, cache=True)
    def state_kernel(
        student, student_stride, teacher, teacher_stride, classes, labels, start, ignore_index, temperature,
        teacher_temperature, work, pads, states, lo, hi, state, status,
    ):  # fmt: skip
        """The states of a slice, whose first class is ``start`` of the vocabulary; of a masked row, the neutral one."""
        _ = sources
        student, teacher, status = borrowed(student), borrowed(teacher), borrowed(status)
        work, pads, states, state = borrowed(work), borrowed(pads), borrowed(states), borrowed(state)
        blocks = blocks_in(classes)
        power = h_power(temperature, True)
        row = states[blocks]
        for i in range(lo, hi):
            state[i] = 0.0
            state[i, M_S] = state[i, M_T] = state[i, LABEL_LOGIT] = -math.inf
            label = labels[i] if labels.size else -1
            if labels.size and label == ignore_index:
                continue
            s = student[i * student_stride : i * student_stride + classes]
            t = teacher[i * teacher_stride : i * teacher_stride + classes]
            for b in range(blocks):
                block_states(s, t, b, True, True, power, temperature, teacher_temperature, True, work, pads, states[b])
            merge_states(states, blocks, True, True, temperature, teacher_temperature)
            if not (row[Z_H] >= 0.0 and row[Z_S] >= 0.0):  # NaN
                _report_row(s, STUDENT, status[i])
            elif not row[Z_T] >= 0.0:
                _report_row(t, TEACHER, status[i])
            for column in (M_S, Z_H, Z_S, D, M_T, Z_T):
                state[i, column] = row[column]
            if start <= label < start + classes:
                state[i, LABEL_LOGIT] = to_real(s[label - start])

    @njit(nogil=True, cache=True)
    def merge_kernel(a, b, temperature, teacher_temperature, out):
        """The states of two disjoint slices together; the same bits for (b, a)."""
        _ = sources
        for i in range(a.shape[0]):
            top_s, top_t = max(a[i, M_S], b[i, M_S]), max(a[i, M_T], b[i, M_T])
            for column, m, top, rate in (
                (Z_H, M_S, top_s, 1.0),
                (Z_S, M_S, top_s, temperature),
                (Z_T, M_T, top_t, teacher_temperature),
            ):
                first = a[i, column] * shift_of(a[i, m], top, rate)
                out[i, column] = first + b[i, column] * shift_of(b[i, m], top, rate)
            first = moment_at(a[i], top_s, top_t, temperature, teacher_temperature)
            out[i, D] = first + moment_at(b[i], top_s, top_t, temperature, teacher_temperature)
            out[i, M_S], out[i, M_T] = top_s, top_t
            out[i, LABEL_LOGIT] = max(a[i, LABEL_LOGIT], b[i, LABEL_LOGIT])

    @njit(nogil=True, cache=True)
    def finish_kernel(state, scale, hard, soft, teacher_temperature, ce, kl, status):
        """ce and kl of whole rows, without T²; rows of scale 0 are masked."""
        _ = sources
        for i in range(state.shape[0]):
            ce[i] = kl[i] = 0.0
            if scale[i] == 0.0:
                continue
            if not usable_student(state[i], hard, soft):
                status[i, 0] = STUDENT + NO_SUPPORT
            elif not usable_teacher(state[i], soft):
                status[i, 0] = TEACHER + NO_SUPPORT
            if status[i, 0] != OK:
                ce[i] = kl[i] = math.nan
                continue
            if hard:
                ce[i] = scale[i] * label_loss(state[i], state[i, LABEL_LOGIT])
            if soft:
                kl[i] = scale[i] * forward_kl_of(state[i], teacher_temperature)

    @njit(nogil=True, cache=True)
    def slice_gradient_kernel(
        student, student_stride, teacher, teacher_stride, classes, labels, start, state, scale, alpha, temperature,
        teacher_temperature, kd_scale, work, pads, states, lo, hi, gradient, gradient_stride,
    ):  # fmt: skip
        """The gradient of a slice's logits, from the states of whole rows."""
        _ = sources
        student, teacher, gradient = borrowed(student), borrowed(teacher), borrowed(gradient)
        work, pads, states, state = borrowed(work), borrowed(pads), borrowed(states), borrowed(state)
        blocks = blocks_in(classes)
        hard, soft = alpha > 0.0, alpha < 1.0
        power = h_power(temperature, soft)
        for i in range(lo, hi):
            g = gradient[i * gradient_stride : i * gradient_stride + classes]
            if scale[i] == 0.0:
                _fill(g, 0.0)
                continue
            s = student[i * student_stride : i * student_stride + classes]
            t = teacher[i * teacher_stride : i * teacher_stride + classes]
            for b in range(blocks):
                block_states(s, t, b, hard, soft, power, temperature, teacher_temperature, True, work, pads, states[b])
            row = state[i]
            size = _soft_scale(scale[i], alpha, kd_scale, temperature)
            write_row(
                states, row, 0, blocks, power, scale[i] * alpha / row[Z_H] if hard else 0.0,
                size / row[Z_S] if soft else 0.0, size / row[Z_T] if soft else 0.0, alpha, temperature,
                teacher_temperature, True, labels[i] - start if hard else -1, work, False, g,
            )  # fmt: skip
        fence()

    return state_kernel, merge_kernel, finish_kernel, slice_gradient_kernel


state_kernel, merge_kernel, finish_kernel, slice_gradient_kernel = _kernels(_SOURCES)
