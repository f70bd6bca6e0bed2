"""Kernels of mergeable row states (see :mod:`kdcore.states`): of a slice, merged, finished, and back to a gradient.

A state [B, STATE_COLUMNS] is contiguous float64, given by its address, with the columns of
:class:`kdcore.states.KDState`; the other arguments are those of :mod:`kdcore.cuda.kernels`.
"""

import math
from functools import cache

import numpy as np
from numba import cuda, float64

from kdcore import formulas
from kdcore.cuda.kernels import factors_of, given, kernel_of, label_at, most_threads, row_at, weight_at, write_results
from kdcore.cuda.primitives import bind, cast, device, itemsize, load_real, load_stored, store_real, store_stored
from kdcore.cuda.rows import SCRATCH, exp2_small, fill_row, is_usable, whole_octets
from kdcore.cuda.sweeps import sweeps
from kdcore.formulas import HEADROOM

__all__ = ["STATE_COLUMNS", "finish_kernel", "gradient_kernel", "merge_kernel", "scale_kernel", "state_kernel"]

_M_S, _Z_H, _Z_S, _W, _LABEL, _M_T, _Z_T = range(7)
STATE_COLUMNS = 7

_scaled_logit = bind(formulas.scaled_logit)
_shift_factor = bind(formulas.shift_factor)
_merged_forward_kl = bind(formulas.merged_forward_kl)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)
_cross_entropy = bind(formulas.cross_entropy)
_kd_loss = bind(formulas.kd_loss)


@device
def _get(state, i, column):
    return load_stored(state + 8 * (STATE_COLUMNS * i + column), np.float64(0))


@device
def _set(state, i, column, value):
    store_stored(state + 8 * (STATE_COLUMNS * i + column), np.float64(value))


@cache
def state_kernel(parts, wide):
    """The kernel of a slice's states, for an objective with both parts; one block a row."""
    sums_of = sweeps(parts, wide).sums_of

    @kernel_of(most_threads(wide))
    def kernel(student, teacher, labels, start, ignore_index, rates, size, like, state):
        """The slice's first class is ``start`` of the vocabulary. Of a masked row, the state of no classes."""
        shared = cuda.shared.array(SCRATCH, float64)
        i = np.int64(cuda.blockIdx.x)
        first = cuda.threadIdx.x == 0
        s, t = row_at(student, i), row_at(teacher, i)
        label = label_at(labels, i) - start
        if given(labels) and label_at(labels, i) == ignore_index:
            if first:
                for column in (_M_S, _M_T, _LABEL):
                    _set(state, i, column, -math.inf)
                for column in (_Z_H, _Z_S, _Z_T, _W):
                    _set(state, i, column, 0.0)
            return
        adjacent = itemsize(s[2]) == 2 or itemsize(t[2]) == 2
        whole = whole_octets(s) and whole_octets(t)
        maxima, z_s, z_h, z_t, w = sums_of(s, t, size, rates, adjacent, whole, like, shared)
        if first:
            _set(state, i, _M_S, -math.inf if z_s == 0.0 else np.float64(maxima[0]))
            _set(state, i, _M_T, -math.inf if z_t == 0.0 else np.float64(maxima[1]))
            _set(state, i, _Z_H, z_h)
            _set(state, i, _Z_S, z_s)
            _set(state, i, _Z_T, z_t)
            _set(state, i, _W, w)
            inside = given(labels) and 0 <= label < size
            _set(state, i, _LABEL, np.float64(load_real(s[0] + label * s[1], s[2])) if inside else -math.inf)

    return kernel


@device
def _shift_of(m, top, temperature):
    """exp((m - top) / T)."""
    if m == top:
        return 1.0  # also where both are infinite
    return _shift_factor(_scaled_logit(m, top, HEADROOM), temperature)


@device
def _moment_at(state, i, top_s, top_t, temperature, teacher_temperature):
    """The sum w of a state relative to maxima that are at least its own."""
    d_s = _scaled_logit(_get(state, i, _M_S), top_s, HEADROOM)
    d_t = _scaled_logit(_get(state, i, _M_T), top_t, HEADROOM)
    factor = _shift_of(_get(state, i, _M_T), top_t, teacher_temperature)
    z_t = _get(state, i, _Z_T)
    return _merged_forward_kl(_get(state, i, _W), z_t, d_t, d_s, teacher_temperature / temperature, factor)


@device
def _merged_sum(a, b, i, m, z, top, temperature):
    first = _get(a, i, z) * _shift_of(_get(a, i, m), top, temperature)
    return first + _get(b, i, z) * _shift_of(_get(b, i, m), top, temperature)


@cuda.jit
def merge_kernel(a, b, rows, temperature, teacher_temperature, out):
    """The states of two disjoint slices together, one thread a row; the same bits for (b, a)."""
    i = np.int64(cuda.grid(1))
    if i >= rows:
        return
    top_s, top_t = max(_get(a, i, _M_S), _get(b, i, _M_S)), max(_get(a, i, _M_T), _get(b, i, _M_T))
    _set(out, i, _Z_H, _merged_sum(a, b, i, _M_S, _Z_H, top_s, 1.0))
    _set(out, i, _Z_S, _merged_sum(a, b, i, _M_S, _Z_S, top_s, temperature))
    _set(out, i, _Z_T, _merged_sum(a, b, i, _M_T, _Z_T, top_t, teacher_temperature))
    first = _moment_at(a, i, top_s, top_t, temperature, teacher_temperature)
    # Adding 0 leaves no -0.0, because of 0.0 and -0.0 the first is taken for the larger.
    _set(out, i, _W, first + _moment_at(b, i, top_s, top_t, temperature, teacher_temperature) + 0.0)
    _set(out, i, _M_S, top_s + 0.0)
    _set(out, i, _M_T, top_t + 0.0)
    _set(out, i, _LABEL, max(_get(a, i, _LABEL), _get(b, i, _LABEL)) + 0.0)


@cuda.jit
def scale_kernel(labels, weights, ignore_index, rows, denominator, out):
    """out [B] = weight / denominator of each row, 0 where it is masked or nothing is not; one thread a row."""
    i = np.int64(cuda.grid(1))
    if i >= rows:
        return
    weight = weight_at(weights, i)
    if given(labels) and label_at(labels, i) == ignore_index:
        weight = 0.0
    store_stored(out + 8 * i, weight / load_stored(denominator, np.float64(0)) if weight != 0.0 else 0.0)


@cuda.jit
def finish_kernel(state, scale, rows, alpha, kd_scale, teacher_temperature, results):
    """loss, ce and kl of whole rows, one thread a row; NaN of those that cannot be used."""
    i = np.int64(cuda.grid(1))
    if i >= rows:
        return
    ce, kl = 0.0, 0.0
    scale_i = load_stored(scale + 8 * i, np.float64(0))
    if scale_i != 0.0:
        z_h, z_s, z_t = _get(state, i, _Z_H), _get(state, i, _Z_S), _get(state, i, _Z_T)
        usable = is_usable(z_h) and (alpha == 1.0 or (is_usable(z_s) and is_usable(z_t)))
        if not usable:
            ce, kl = math.nan, math.nan
        else:
            if alpha > 0.0:
                d = _scaled_logit(_get(state, i, _LABEL), _get(state, i, _M_S), HEADROOM)
                ce = scale_i * _cross_entropy(d, z_h)
            if alpha < 1.0:
                kl = scale_i * kd_scale * _forward_kl_from_sums(_get(state, i, _W), z_t, z_s, teacher_temperature)
    write_results(results, i, _kd_loss(ce, kl, alpha), ce, kl)


@cache
def gradient_kernel(parts, wide):
    """The kernel of the gradient of a slice's logits, from the states of whole rows; one block a row."""
    soft, hard, _ = parts
    of_rows = sweeps(parts, wide)
    offsets_of, spend_row, spend_one = of_rows.offsets_of, of_rows.spend_row, of_rows.spend_one

    @kernel_of(most_threads(wide))
    def kernel(
        student, teacher, labels, start, state, scale, alpha, temperature, kd_scale, rates, size, like, gradient,
    ):  # fmt: skip
        i = np.int64(cuda.blockIdx.x)
        s, t, g = row_at(student, i), row_at(teacher, i), row_at(gradient, i)
        scale_i = load_stored(scale + 8 * i, np.float64(0))
        if scale_i == 0.0:
            fill_row(g, np.int64(0), size, 0.0)
            return
        z_h, z_s, z_t = _get(state, i, _Z_H), _get(state, i, _Z_S), _get(state, i, _Z_T)
        if not (is_usable(z_h) and (not soft or (is_usable(z_s) and is_usable(z_t)))):
            fill_row(g, np.int64(0), size, math.nan)
            return
        adjacent = itemsize(s[2]) == 2 or (soft and itemsize(t[2]) == 2)
        whole = whole_octets(s) and (not soft or whole_octets(t))
        whole = whole and whole_octets(g) and (adjacent or itemsize(g[2]) != 2)
        maxima = cast(_get(state, i, _M_S), like), cast(_get(state, i, _M_T), like)
        label = label_at(labels, i) - start
        own = hard and 0 <= label < size
        x, y = cast(0, like), cast(0, like)
        if own:
            x = cast(load_real(s[0] + label * s[1], s[2]), like)
            if soft:
                y = cast(load_real(t[0] + label * t[1], t[2]), like)
        cuda.syncthreads()  # before a gradient may take the place of the label's logit
        if not soft:
            z_s, z_t = 1.0, 1.0
        x_s, x_h, x_t = offsets_of(maxima, rates)
        of_s, of_h, of_t = exp2_small(x_s), exp2_small(x_h), exp2_small(x_t)
        hard_q, soft_q, soft_p = factors_of(scale_i, alpha, kd_scale, temperature, z_s, z_h, z_t)
        factors = cast(hard_q * of_h, like), cast(soft_q * of_s, like), cast(soft_p * of_t, like)
        softmaxes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        spend_row(s, t, g, size, maxima, rates, factors, softmaxes, adjacent, whole, like)
        if own:
            cuda.syncthreads()
            if cuda.threadIdx.x == 0:  # over what the sweep wrote
                of_label = spend_one(x, y, cast(z_h / of_h, like), maxima, rates, factors, softmaxes)
                store_real(g[0] + label * g[1], of_label, g[2])

    return kernel
