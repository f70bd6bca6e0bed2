"""Row kernels of the CPU engine: njit functions on one row, for reuse in a caller's own njit code.

Letters: V classes; x, s, t rows [V] of logits in storage form (float32, float64, or the bits of 16-bit floats, see
:mod:`kdcore.cpu.primitives`); d scaled logits and e exponentials [V], contiguous, in the working type (float32 or
float64). What they compute is written in :mod:`kdcore.formulas`; here are the loops.

Every sum runs in float64 over contiguous rows of the working type, in an order that the code fixes: over lanes, which
are then added up by halves. The compiler may not choose it (the fast-math flag "reassoc"), because it chooses anew for
every specialisation, and differently for a kernel that it has just compiled and one that it loads from disk. So neither
the layout of the caller's array nor its neighbours nor the state of a cache can change a bit of the result.
"""

import math

import numpy as np
from numba import njit

from kdcore import formulas
from kdcore.cpu.primitives import exp2_scaled, fast_max, from_real, split_rate, to_real
from kdcore.rowstatus import NAN, NO_SUPPORT, OK, POSITIVE_INF

__all__ = [
    "check_row",
    "cross_entropy_row",
    "exp_row",
    "forward_kl_row",
    "forward_kl_soft",
    "hard_term",
    "hinton_gradient_row",
    "log_softmax_row",
    "logsumexp_row",
    "max_row",
    "reverse_kl_soft",
    "scale_row",
    "softmax_row",
    "two_formula_soft",
    "write_gradient",
]

_LANES = 512

_strict = njit(fastmath=False)
_scaled_logit = _strict(formulas.scaled_logit)
_rate = _strict(formulas.rate)
_log_softmax = _strict(formulas.log_softmax)
_cross_entropy = _strict(formulas.cross_entropy)
_forward_kl_term = _strict(formulas.forward_kl_term)
_forward_kl_from_sums = _strict(formulas.forward_kl_from_sums)
_divergence_gradient = _strict(formulas.divergence_gradient)
_kd_gradient = _strict(formulas.kd_gradient)


@njit(fastmath=False)
def max_row(x):
    """The maximum of a row, and whether the row can be used: no NaN, no +inf, not all -inf."""
    first = to_real(x[0])
    m = type(first)(-math.inf)
    bad = 0
    for v in range(x.size):
        value = to_real(x[v])
        m = fast_max(m, value)
        bad |= not (value < math.inf)
    return m, bad == 0 and m > -math.inf


@njit
def check_row(x):
    """What is wrong with a row, and at which class: NAN, POSITIVE_INF, NO_SUPPORT, or OK."""
    support = False
    for v in range(x.size):
        value = to_real(x[v])
        if math.isnan(value):
            return NAN, v
        if value == math.inf:
            return POSITIVE_INF, v
        support |= value > -math.inf
    return (OK if support else NO_SUPPORT), 0


@njit(fastmath=False)
def scale_row(x, m, d):
    """d = HEADROOM (x - m), shifted in the wider of the types of x and d, then in the type of d."""
    headroom = type(d[0])(formulas.HEADROOM)
    m = type(to_real(x[0]))(m)
    for v in range(x.size):
        d[v] = _scaled_logit(to_real(x[v]), m, headroom)


@njit(fastmath=False)
def _lanes(size):
    """Zeros, to which the elements of a row are added by turns: element v to lane v modulo their number."""
    return np.zeros(min(size, _LANES))


@njit(fastmath=False)
def _total(lanes):
    """The sum of the lanes, by halves; overwrites them."""
    n = lanes.size
    while n > 1:
        half = (n + 1) // 2
        for k in range(n - half):
            lanes[k] += lanes[half + k]
        n = half
    return lanes[0]


@njit(fastmath=False)
def exp_row(d, rate, e):
    """e = exp2(d rate); returns z, their sum, in float64."""
    high, low = split_rate(rate, d[0])
    lanes = _lanes(d.size)
    for start in range(0, d.size, lanes.size):
        part_d, part_e = d[start : start + lanes.size], e[start : start + lanes.size]
        for k in range(part_d.size):
            part_e[k] = exp2_scaled(part_d[k], high, low)
            lanes[k] += np.float64(part_e[k])
    return _total(lanes)


@njit(fastmath=False)
def forward_kl_soft(d_s, d_t, e_s, e_t, temperature, teacher_temperature):
    """KL(p || q), and its gradient by s/T as a combination of the exponentials that it leaves behind.

    Fills e_s and e_t. Returns (D, a, b) with dD/d(s/T) = a e_s - b e_t.
    """
    z_s = exp_row(d_s, _rate(temperature), e_s)
    z_t = exp_row(d_t, _rate(teacher_temperature), e_t)
    ratio = type(d_s[0])(teacher_temperature / temperature)
    lanes = _lanes(d_s.size)
    for start in range(0, d_s.size, lanes.size):
        part_s, part_t = d_s[start : start + lanes.size], d_t[start : start + lanes.size]
        part_e = e_t[start : start + lanes.size]
        for k in range(part_s.size):
            lanes[k] += np.float64(_forward_kl_term(part_e[k], part_t[k], part_s[k], ratio))
    return _forward_kl_from_sums(_total(lanes), z_t, z_s, teacher_temperature), 1.0 / z_s, 1.0 / z_t


@njit(fastmath=False)
def _class_of(d_s, d_t, e_s, e_t, z_s, z_t, temperature, teacher_temperature):
    """p, q, log p and log q of one class: the arguments of a divergence's two formulas."""
    log_p = _log_softmax(d_t, z_t, teacher_temperature)
    log_q = _log_softmax(d_s, z_s, temperature)
    return e_t / z_t, e_s / z_s, log_p, log_q


def two_formula_soft(term, slope):
    """The row function of any divergence, from its two formulas; same contract as :func:`forward_kl_soft`.

    The gradient is left in e_s. Needs float64 rows: log q - log p is as large as the logits are apart, and
    q (log q - log p) must not lose what a float32 gradient can show.
    """

    @njit(fastmath=False)
    def soft_term(d_s, d_t, e_s, e_t, temperature, teacher_temperature):
        z_s = exp_row(d_s, _rate(temperature), e_s)
        z_t = exp_row(d_t, _rate(teacher_temperature), e_t)
        terms, slopes = _lanes(d_s.size), _lanes(d_s.size)
        for v in range(d_s.size):
            p, q, log_p, log_q = _class_of(d_s[v], d_t[v], e_s[v], e_t[v], z_s, z_t, temperature, teacher_temperature)
            terms[v % terms.size] += term(p, q, log_p, log_q)
            slopes[v % slopes.size] += q * slope(p, q, log_p, log_q)
        total, mean = _total(terms), _total(slopes)
        for v in range(d_s.size):
            p, q, log_p, log_q = _class_of(d_s[v], d_t[v], e_s[v], e_t[v], z_s, z_t, temperature, teacher_temperature)
            e_s[v] = _divergence_gradient(q, slope(p, q, log_p, log_q), mean)
        return total, 1.0, 0.0

    return soft_term


reverse_kl_soft = two_formula_soft(_strict(formulas.reverse_kl_term), _strict(formulas.reverse_kl_slope))


@njit
def hard_term(d_s, label, e_h):
    """CE(h, label), and its gradient as exponentials that it leaves in e_h: returns (CE, a), dCE/ds = a e_h."""
    z = exp_row(d_s, _rate(1.0), e_h)
    e_h[label] -= z  # h - 1 of the label's class is (e - z) / z
    return _cross_entropy(np.float64(d_s[label]), z), 1.0 / z


@njit(fastmath=False)
def write_gradient(e_h, e_s, e_t, alpha, hard, soft_q, soft_p, out):
    """out = hard e_h + soft_q e_s - soft_p e_t, narrowed to the type of out; what alpha rules out is not read."""
    one = type(e_s[0])
    hard, soft_q, soft_p, zero = one(hard), one(soft_q), one(soft_p), one(0)
    if alpha == 0.0:
        for v in range(out.size):
            out[v] = from_real(_kd_gradient(zero, e_s[v], e_t[v], zero, soft_q, soft_p), out[v])
    elif alpha == 1.0:
        for v in range(out.size):
            out[v] = from_real(_kd_gradient(e_h[v], zero, zero, hard, zero, zero), out[v])
    else:
        for v in range(out.size):
            out[v] = from_real(_kd_gradient(e_h[v], e_s[v], e_t[v], hard, soft_q, soft_p), out[v])


# The operations one at a time, for a caller's own njit code. x, s and t must be rows that max_row calls usable.
# ``scratch`` is a tuple of two or four arrays [V] of the working type: float64, or float32 for float32 and 16-bit rows.


@njit
def logsumexp_row(x, temperature, scratch):
    """log of the sum of exp(x / T)."""
    m, _ = max_row(x)
    scale_row(x, m, scratch[0])
    return np.float64(m) / temperature + math.log(exp_row(scratch[0], _rate(temperature), scratch[1]))


@njit
def softmax_row(x, temperature, scratch, out):
    """out = softmax(x / T)."""
    m, _ = max_row(x)
    scale_row(x, m, scratch[0])
    z = exp_row(scratch[0], _rate(temperature), scratch[1])
    for v in range(out.size):
        out[v] = from_real(scratch[1][v] / z, out[v])


@njit
def log_softmax_row(x, temperature, scratch, out):
    """out = log softmax(x / T)."""
    m, _ = max_row(x)
    scale_row(x, m, scratch[0])
    z = exp_row(scratch[0], _rate(temperature), scratch[1])
    for v in range(out.size):
        out[v] = from_real(_log_softmax(np.float64(scratch[0][v]), z, temperature), out[v])


@njit
def cross_entropy_row(s, label, scratch):
    """-log softmax(s)[label]."""
    m, _ = max_row(s)
    scale_row(s, m, scratch[0])
    return hard_term(scratch[0], label, scratch[1])[0]


@njit
def forward_kl_row(s, t, temperature, scratch):
    """KL(softmax(t/T) || softmax(s/T)), without T². Four rows of scratch."""
    scale_row(s, max_row(s)[0], scratch[0])
    scale_row(t, max_row(t)[0], scratch[1])
    return forward_kl_soft(scratch[0], scratch[1], scratch[2], scratch[3], temperature, temperature)[0]


@njit
def hinton_gradient_row(s, t, temperature, scratch, out):
    """out = T (softmax(s/T) - softmax(t/T)), the gradient of T² KL by s. Four rows of scratch."""
    scale_row(s, max_row(s)[0], scratch[0])
    scale_row(t, max_row(t)[0], scratch[1])
    z_s = exp_row(scratch[0], _rate(temperature), scratch[2])
    z_t = exp_row(scratch[1], _rate(temperature), scratch[3])
    write_gradient(scratch[2], scratch[2], scratch[3], 0.0, 0.0, temperature / z_s, temperature / z_t, out)
