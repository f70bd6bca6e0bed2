"""Row functions of the CUDA engine: device functions that a whole block calls for one row, for reuse in other kernels.

Letters: V classes; x, s, t rows [V] of logits in storage form (float16, float32, float64, or bfloat16 as uint16, see
:mod:`kdcore.cuda.primitives`); d shifted logits scaled by HEADROOM, e exponentials, z their sum. What they compute is
written in :mod:`kdcore.formulas`; here are the loops.

Conventions:

- **Every thread of the block must call**, with the same arguments; each function leaves the block synchronised, and
  returns the same values to every thread. ``cuda.blockDim.x`` must be a power of two.
- ``shared``: a shared array [3, threads] of float64, the scratch of all reductions.
- ``like``: any float32 or float64 number; vectors are worked in its type. float64 for float64 rows.
- A row is read in sweeps and exponentials are computed anew in each, so there is no scratch in global memory.
- An ``out`` row may be the input row itself: a thread reads an element before it writes it, and no other thread
  reads that element any more.

A thread adds up at most 64 elements in the type of ``like`` before the sum goes on in float64. Nothing in the order of
additions depends on other rows, so results are reproducible bit by bit.
"""

import math

import numpy as np
from numba import cuda

from kdcore import formulas
from kdcore.cuda.primitives import bind, cast, exp2_scaled, from_real, split_rate, to_real
from kdcore.formulas import HEADROOM
from kdcore.rowstatus import NAN, NO_SUPPORT, OK, POSITIVE_INF

__all__ = [
    "block_max",
    "block_sum",
    "cross_entropy_row",
    "exp_sum",
    "fill_row",
    "forward_kl_classes",
    "forward_kl_row",
    "forward_kl_sums",
    "hinton_gradient_row",
    "log_softmax_row",
    "logsumexp_row",
    "max_row",
    "scaled_element",
    "softmax_row",
    "two_formula_soft",
    "write_gradient",
]

_PART = 64

_scaled_logit = bind(formulas.scaled_logit)
_rate = bind(formulas.rate)
_log_softmax = bind(formulas.log_softmax)
_log_ratio = bind(formulas.log_ratio)
_cross_entropy = bind(formulas.cross_entropy)
_forward_kl_moment = bind(formulas.forward_kl_moment)
_forward_kl_from_sums = bind(formulas.forward_kl_from_sums)
_kd_gradient = bind(formulas.kd_gradient)


@cuda.jit(device=True)
def block_sum(a, b, c, shared):
    """The sums of a, b and c over the block, in float64 and in an order that only the block's size decides."""
    thread = cuda.threadIdx.x
    shared[0, thread] = a
    shared[1, thread] = b
    shared[2, thread] = c
    cuda.syncthreads()
    half = cuda.blockDim.x // 2
    while half > 0:
        if thread < half:
            shared[0, thread] += shared[0, thread + half]
            shared[1, thread] += shared[1, thread + half]
            shared[2, thread] += shared[2, thread + half]
        cuda.syncthreads()
        half //= 2
    a, b, c = shared[0, 0], shared[1, 0], shared[2, 0]
    cuda.syncthreads()  # all have read before the next reduction writes
    return a, b, c


@cuda.jit(device=True)
def block_max(a, b, shared):
    """The maxima of a and of b, numbers that are not NaN, over the block."""
    thread = cuda.threadIdx.x
    shared[0, thread] = a
    shared[1, thread] = b
    cuda.syncthreads()
    half = cuda.blockDim.x // 2
    while half > 0:
        if thread < half:
            shared[0, thread] = max(shared[0, thread], shared[0, thread + half])
            shared[1, thread] = max(shared[1, thread], shared[1, thread + half])
        cuda.syncthreads()
        half //= 2
    a, b = shared[0, 0], shared[1, 0]
    cuda.syncthreads()
    return a, b


@cuda.jit(device=True)
def fill_row(row, value):
    """row [V] = value."""
    v = cuda.threadIdx.x
    while v < row.size:
        row[v] = from_real(value, row[v])
        v += cuda.blockDim.x


@cuda.jit(device=True)
def max_row(x, shared):
    """(maximum of x [V] in float64, condition, class): OK, or what is wrong first, at which class."""
    m = cast(-math.inf, to_real(x[0]))
    # The earliest bad class v of the block and its kind in one number, 2 v for NaN and 2 v + 1 for +inf.
    first = 2 * x.size
    v = cuda.threadIdx.x
    while v < x.size:
        value = to_real(x[v])
        if value < math.inf:
            m = max(m, value)
        else:
            first = min(first, 2 * v + (1 if value == math.inf else 0))
        v += cuda.blockDim.x
    maximum, negated = block_max(np.float64(m), -np.float64(first), shared)
    first = np.int64(-negated)
    if first < 2 * x.size:
        return maximum, (POSITIVE_INF if first % 2 else NAN), first // 2
    if maximum == -math.inf:
        return maximum, NO_SUPPORT, 0
    return maximum, OK, 0


@cuda.jit(device=True)
def scaled_element(x, v, m, like):
    """d = HEADROOM (x[v] - m), shifted in the wider of the two types and then in the type of ``like``."""
    value = to_real(x[v])
    return cast(_scaled_logit(value, cast(m, value), cast(HEADROOM, like)), like)


@cuda.jit(device=True)
def _split_rate(temperature, like):
    """What turns d into an exponent of 2, in two parts in the type of ``like``."""
    return split_rate(_rate(temperature) / HEADROOM, like)


@cuda.jit(device=True)
def _inverse(temperature):
    """What turns d into (x - m) / T, in float64."""
    return 1.0 / HEADROOM / temperature


@cuda.jit(device=True)
def exp_sum(x, m, temperature, like, shared):
    """z, the sum of exp((x - m) / T) over x [V]."""
    high, low = _split_rate(temperature, like)
    z = np.float64(0)
    start = cuda.threadIdx.x
    while start < x.size:
        part = cast(0, like)
        end = min(x.size, start + _PART * cuda.blockDim.x)
        v = start
        while v < end:
            part += exp2_scaled(scaled_element(x, v, m, like), high, low)
            v += cuda.blockDim.x
        z += np.float64(part)
        start += _PART * cuda.blockDim.x
    return block_sum(z, 0.0, 0.0, shared)[0]


# The soft term of a divergence is two functions. The first sweeps both rows and returns
#
#     (D, a, b, z_s, z_t):   D, and with a and b its gradient,   dD/d(s/T) = a g_q - b g_p
#
# and the second computes (g_q, g_p) of one class, from that class's d and e. What it needs of the row it is given:
# factor = 1 / z and inverse = 1 / (HEADROOM T) of student and teacher, constant = log(z_t / z_s). c is the parameter.


@cuda.jit(device=True)
def forward_kl_sums(s, t, m_s, m_t, temperature, teacher_temperature, c, like, shared):
    """KL(p || q) of rows s and t [V], with g_q = e_s and g_p = e_t."""
    high_s, low_s = _split_rate(temperature, like)
    high_t, low_t = _split_rate(teacher_temperature, like)
    ratio = cast(teacher_temperature / temperature, like)
    z_s, z_t, w = np.float64(0), np.float64(0), np.float64(0)
    start = cuda.threadIdx.x
    while start < s.size:
        part_s, part_t, part_w = cast(0, like), cast(0, like), cast(0, like)
        end = min(s.size, start + _PART * cuda.blockDim.x)
        v = start
        while v < end:
            d_s, d_t = scaled_element(s, v, m_s, like), scaled_element(t, v, m_t, like)
            e_t = exp2_scaled(d_t, high_t, low_t)
            part_s += exp2_scaled(d_s, high_s, low_s)
            part_t += e_t
            part_w = _forward_kl_moment(part_w, e_t, d_t, d_s, ratio)
            v += cuda.blockDim.x
        z_s += np.float64(part_s)
        z_t += np.float64(part_t)
        w += np.float64(part_w)
        start += _PART * cuda.blockDim.x
    z_s, z_t, w = block_sum(z_s, z_t, w, shared)
    return _forward_kl_from_sums(w, z_t, z_s, teacher_temperature), 1.0 / z_s, 1.0 / z_t, z_s, z_t


@cuda.jit(device=True)
def forward_kl_classes(d_s, d_t, e_s, e_t, factor_s, factor_t, inverse_s, inverse_t, constant, c):
    """(g_q, g_p) of one class of forward KL, whose gradient is already a combination of exponentials."""
    return e_s, e_t


def two_formula_soft(term, slope):
    """The two functions of any divergence, from its two formulas as device functions: g_q = q phi', g_p = q.

    ``like`` must be float64: log q - log p is as large as the logits are apart, and q (log q - log p) must not lose
    what a float32 gradient can show.
    """

    @cuda.jit(device=True)
    def sums(s, t, m_s, m_t, temperature, teacher_temperature, c, like, shared):
        high_s, low_s = _split_rate(temperature, like)
        high_t, low_t = _split_rate(teacher_temperature, like)
        inverse_s, inverse_t = _inverse(temperature), _inverse(teacher_temperature)
        z_s = exp_sum(s, m_s, temperature, like, shared)
        z_t = exp_sum(t, m_t, teacher_temperature, like, shared)
        factor_s, factor_t, constant = 1.0 / z_s, 1.0 / z_t, math.log(z_t / z_s)
        total, mean = np.float64(0), np.float64(0)
        v = cuda.threadIdx.x
        while v < s.size:
            d_s, d_t = scaled_element(s, v, m_s, like), scaled_element(t, v, m_t, like)
            p, q = exp2_scaled(d_t, high_t, low_t) * factor_t, exp2_scaled(d_s, high_s, low_s) * factor_s
            r = _log_ratio(d_s, d_t, inverse_s, inverse_t, constant)
            total += term(p, q, r, c)
            mean += slope(p, q, r, c)
            v += cuda.blockDim.x
        total, mean, _ = block_sum(total, mean, 0.0, shared)
        if math.isnan(total):
            total = math.inf  # in a usable row NaN is 0 * inf: a class of p = 0 < q whose q has underflowed
        return total, 1.0, mean, z_s, z_t

    @cuda.jit(device=True)
    def classes(d_s, d_t, e_s, e_t, factor_s, factor_t, inverse_s, inverse_t, constant, c):
        q = e_s * factor_s
        return slope(e_t * factor_t, q, _log_ratio(d_s, d_t, inverse_s, inverse_t, constant), c), q

    return sums, classes


@cuda.jit(device=True)
def write_gradient(
    s, t, label, m_s, m_t, alpha, hard, z_h, soft_q, soft_p, z_s, z_t, temperature, teacher_temperature, c,
    soft_classes, like, out,
):  # fmt: skip
    """out [V] = hard (e_h - onehot(label) z_h) + soft_q g_q - soft_p g_p; what alpha rules out is not read.

    ``soft_classes`` is the second function of a divergence, c its parameter.
    """
    high_h, low_h = _split_rate(1.0, like)
    high_s, low_s = _split_rate(temperature, like)
    high_t, low_t = _split_rate(teacher_temperature, like)
    inverse_s, inverse_t = _inverse(temperature), _inverse(teacher_temperature)
    factor_s, factor_t, constant = 1.0 / z_s, 1.0 / z_t, math.log(z_t / z_s)
    hard, soft_q, soft_p = cast(hard, like), cast(soft_q, like), cast(soft_p, like)
    v = cuda.threadIdx.x
    while v < out.size:
        d_s = scaled_element(s, v, m_s, like)
        e_h, g_q, g_p = cast(0, like), cast(0, like), cast(0, like)
        if alpha > 0.0:
            e_h = exp2_scaled(d_s, high_h, low_h)
            if v == label:
                e_h = cast(np.float64(e_h) - z_h, like)
        if alpha < 1.0:
            d_t = scaled_element(t, v, m_t, like)
            e_s = exp2_scaled(d_s, high_s, low_s)
            e_t = exp2_scaled(d_t, high_t, low_t)
            g_q, g_p = soft_classes(d_s, d_t, e_s, e_t, factor_s, factor_t, inverse_s, inverse_t, constant, c)
        out[v] = from_real(_kd_gradient(e_h, g_q, g_p, hard, soft_q, soft_p), out[v])
        v += cuda.blockDim.x


# The operations one at a time, for other kernels. The rows must be OK, and the m their maxima, as max_row returns them.


@cuda.jit(device=True)
def logsumexp_row(x, m, temperature, like, shared):
    """log of the sum of exp(x / T) over x [V], in float64."""
    return m / temperature + math.log(exp_sum(x, m, temperature, like, shared))


@cuda.jit(device=True)
def softmax_row(x, m, temperature, like, shared, out):
    """out [V] = softmax(x / T)."""
    z = cast(exp_sum(x, m, temperature, like, shared), like)
    high, low = _split_rate(temperature, like)
    v = cuda.threadIdx.x
    while v < x.size:
        out[v] = from_real(exp2_scaled(scaled_element(x, v, m, like), high, low) / z, out[v])
        v += cuda.blockDim.x


@cuda.jit(device=True)
def log_softmax_row(x, m, temperature, like, shared, out):
    """out [V] = log softmax(x / T)."""
    log_z = math.log(exp_sum(x, m, temperature, like, shared))
    inverse = _inverse(temperature)
    v = cuda.threadIdx.x
    while v < x.size:
        out[v] = from_real(_log_softmax(np.float64(scaled_element(x, v, m, like)), inverse, log_z), out[v])
        v += cuda.blockDim.x


@cuda.jit(device=True)
def cross_entropy_row(s, label, m, like, shared):
    """(-log softmax(s)[label], z at T = 1) of a row s [V]."""
    z = exp_sum(s, m, 1.0, like, shared)
    loss = _cross_entropy(np.float64(scaled_element(s, label, m, like)), z)
    cuda.syncthreads()  # all have read the label's logit before a gradient overwrites it in place
    return loss, z


@cuda.jit(device=True)
def forward_kl_row(s, t, m_s, m_t, temperature, like, shared):
    """KL(softmax(t/T) || softmax(s/T)) of rows s and t [V], without T²."""
    return forward_kl_sums(s, t, m_s, m_t, temperature, temperature, 0.0, like, shared)[0]


@cuda.jit(device=True)
def hinton_gradient_row(s, t, m_s, m_t, temperature, like, shared, out):
    """out [V] = T (softmax(s/T) - softmax(t/T)), the gradient of T² KL by s."""
    z_s = exp_sum(s, m_s, temperature, like, shared)
    z_t = exp_sum(t, m_t, temperature, like, shared)
    write_gradient(
        s, t, 0, m_s, m_t, 0.0, 0.0, 1.0, temperature / z_s, temperature / z_t, z_s, z_t, temperature, temperature, 0.0,
        forward_kl_classes, like, out,
    )  # fmt: skip
