"""What a KD kernel does with the octets of one row, the student's x and the teacher's y, in three stages.

1. **gather**: maxima and sums of exponentials, carried along as a thread's *sums*
   (m_s, z_s, low_s, z_h, low_h, m_t, z_t, low_t); low is what the additions of z have lost. z_s and z_t are at the
   temperatures, z_h is the student's at 1. To add up those of several threads, **settle** makes them relative to the
   maxima of all.
2. **weigh**: for a divergence that goes by its two formulas, the sums of its terms and of its slopes. They need the
   whole row's softmaxes. Forward KL has no such stage.
3. **spend**: the gradient; for forward KL with the moment from which its value follows.

:func:`stages` makes the functions. A kernel brings the octets, from memory or from registers, and the reductions.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from kdcore import formulas
from kdcore.cuda.primitives import bind, cast, device, exp2_scaled, lowest
from kdcore.cuda.rows import carry, exponentials, largest, rate_of, scaled, shifted, total

__all__ = ["Parts", "Stages", "no_sums", "parts_of", "stages"]

_log_ratio = bind(formulas.log_ratio)
_forward_kl_moment = bind(formulas.forward_kl_moment)
_kd_gradient = bind(formulas.kd_gradient)


class Parts(NamedTuple):
    """Which terms a KD objective has, and how the student's exponentials at T = 1 follow from those at T."""

    soft: bool
    hard: bool
    #: e_h = e_s ** power. 0: by an exponential of its own.
    power: int


def parts_of(alpha: float, temperature: float) -> Parts:
    """The parts of an objective. Without a divergence, the temperature of the student's sums is 1."""
    if alpha == 1.0:
        return Parts(soft=False, hard=True, power=1)
    if alpha == 0.0:
        return Parts(soft=True, hard=False, power=1)
    return Parts(soft=True, hard=True, power=int(temperature) if temperature in (1.0, 2.0, 4.0) else 0)


class Stages(NamedTuple):
    """Device functions of one row's octets; see :func:`stages`."""

    rates: Any
    gather: Any
    settle: Any
    weigh: Any
    spend: Any
    spend_one: Any


@device
def no_sums(like):
    """The sums of no classes."""
    m, zero = cast(lowest(like), like), cast(0, like)
    return m, zero, zero, zero, zero, m, zero, zero


@cache
def stages(parts: Parts, term: Any = None, slope: Any = None) -> Stages:
    """The stages of a divergence: of forward KL, or of one by the two formulas ``term`` and ``slope``.

    What they share: ``rates`` = what turns d into an exponent of 2, (student, teacher, student at 1); ``tags`` =
    (student, teacher); ``maxima`` = (m_s, m_t) of the row; ``factors`` = (hard, soft_q, soft_p) of
    :func:`kdcore.formulas.kd_gradient`; ``ratio`` = teacher_temperature / temperature. By two formulas a class goes
    by more, ``softmaxes`` = (1 / z_s, 1 / z_t, 1 / (HEADROOM T), 1 / (HEADROOM T_t), log(z_t / z_s), c).
    """
    soft, hard, power = parts
    own_sum = hard and power != 1  # at T = 1, the student's sums at T are those at 1
    two_formulas = term is not None
    if two_formulas:
        term, slope = bind(term), bind(slope)

    @device
    def rates(temperature, teacher_temperature, like):
        return rate_of(temperature, like), rate_of(teacher_temperature, like), rate_of(1.0, like)

    if power == 0:

        @device
        def at_one(e, d, rates, tags):
            """The student's exponential at T = 1."""
            return exp2_scaled(d, rates[2], tags[0])

    elif power == 1:

        @device
        def at_one(e, d, rates, tags):
            return e

    elif power == 2:

        @device
        def at_one(e, d, rates, tags):
            return e * e

    else:

        @device
        def at_one(e, d, rates, tags):
            square = e * e
            return square * square

    @device
    def gather(sums, x, y, rates, tags):
        m_s, z_s, low_s, z_h, low_h, m_t, z_t, low_t = sums
        k = largest(x)
        if k > m_s:
            d_k = scaled(m_s, k)
            f = exp2_scaled(d_k, rates[0], tags[0])
            z_s *= f
            low_s *= f
            if own_sum:
                f_h = at_one(f, d_k, rates, tags)
                z_h *= f_h
                low_h *= f_h
            m_s = k
        d = shifted(x, m_s)
        e = exponentials(d, rates[0], tags[0])
        z_s, low_s = carry(z_s, low_s, total(e))
        if own_sum:
            h = (
                at_one(e[0], d[0], rates, tags), at_one(e[1], d[1], rates, tags), at_one(e[2], d[2], rates, tags),
                at_one(e[3], d[3], rates, tags), at_one(e[4], d[4], rates, tags), at_one(e[5], d[5], rates, tags),
                at_one(e[6], d[6], rates, tags), at_one(e[7], d[7], rates, tags),
            )  # fmt: skip
            z_h, low_h = carry(z_h, low_h, total(h))
        if soft:
            k_t = largest(y)
            if k_t > m_t:
                f_t = exp2_scaled(scaled(m_t, k_t), rates[1], tags[1])
                z_t *= f_t
                low_t *= f_t
                m_t = k_t
            z_t, low_t = carry(z_t, low_t, total(exponentials(shifted(y, m_t), rates[1], tags[1])))
        return m_s, z_s, low_s, z_h, low_h, m_t, z_t, low_t

    @device
    def settle(sums, maxima, rates, tags):
        """(z_s, low_s, z_h, low_h, z_t, low_t) of a thread's sums, relative to the maxima of other threads, too."""
        m_s, z_s, low_s, z_h, low_h, m_t, z_t, low_t = sums
        d = scaled(m_s, maxima[0])
        f_s = exp2_scaled(d, rates[0], tags[0])
        f_h, f_t = f_s, f_s
        if own_sum:
            f_h = at_one(f_s, d, rates, tags)
        else:
            z_h, low_h = z_s, low_s
        if soft:
            f_t = exp2_scaled(scaled(m_t, maxima[1]), rates[1], tags[1])
        else:
            z_t, low_t = z_s, low_s
        return z_s * f_s, low_s * f_s, z_h * f_h, low_h * f_h, z_t * f_t, low_t * f_t

    @device
    def weigh_class(x, y, inside, maxima, rates, tags, softmaxes):
        """(phi, q phi') of one class; 0 where it is not one."""
        d_s, d_t = scaled(x, maxima[0]), scaled(y, maxima[1])
        p = exp2_scaled(d_t, rates[1], tags[1]) * softmaxes[1]
        q = exp2_scaled(d_s, rates[0], tags[0]) * softmaxes[0]
        r = _log_ratio(d_s, d_t, softmaxes[2], softmaxes[3], softmaxes[4])
        if inside:
            return np.float64(term(p, q, r, softmaxes[5])), np.float64(slope(p, q, r, softmaxes[5]))
        return 0.0, 0.0

    @device
    def weigh(value, mean, x, y, a, b, end, maxima, rates, tags, softmaxes):
        """(value, mean) and the terms and slopes of an octet; the class ``end`` and those after it do not count."""
        p0, q0 = weigh_class(x[0], y[0], a < end, maxima, rates, tags, softmaxes)
        p1, q1 = weigh_class(x[1], y[1], a + 1 < end, maxima, rates, tags, softmaxes)
        p2, q2 = weigh_class(x[2], y[2], a + 2 < end, maxima, rates, tags, softmaxes)
        p3, q3 = weigh_class(x[3], y[3], a + 3 < end, maxima, rates, tags, softmaxes)
        p4, q4 = weigh_class(x[4], y[4], b < end, maxima, rates, tags, softmaxes)
        p5, q5 = weigh_class(x[5], y[5], b + 1 < end, maxima, rates, tags, softmaxes)
        p6, q6 = weigh_class(x[6], y[6], b + 2 < end, maxima, rates, tags, softmaxes)
        p7, q7 = weigh_class(x[7], y[7], b + 3 < end, maxima, rates, tags, softmaxes)
        value += ((p0 + p1) + (p2 + p3)) + ((p4 + p5) + (p6 + p7))
        mean += ((q0 + q1) + (q2 + q3)) + ((q4 + q5) + (q6 + q7))
        return value, mean

    @device
    def spend_class(w, x, y, above_one, maxima, rates, tags, factors, ratio, softmaxes):
        """(gradient, w) of one class: w and its part of forward KL's moment; ``above_one`` = z_h if it is the label."""
        d_s = scaled(x, maxima[0])
        e_s = exp2_scaled(d_s, rates[0], tags[0])
        zero = cast(0, x)
        e_h, g_q, g_p = zero, zero, zero
        if hard:
            e_h = at_one(e_s, d_s, rates, tags) - above_one
        if soft:
            d_t = scaled(y, maxima[1])
            e_t = exp2_scaled(d_t, rates[1], tags[1])
            if two_formulas:
                q = e_s * softmaxes[0]
                r = _log_ratio(d_s, d_t, softmaxes[2], softmaxes[3], softmaxes[4])
                g_q, g_p = slope(e_t * softmaxes[1], q, r, softmaxes[5]), q
            else:
                g_q, g_p = e_s, e_t
                w = _forward_kl_moment(w, e_t, d_t, d_s, ratio)
        return _kd_gradient(e_h, g_q, g_p, factors[0], factors[1], factors[2]), w

    @device
    def spend(x, y, maxima, rates, tags, factors, ratio, softmaxes):
        """(gradient, part of w) of an octet, without what the label adds."""
        zero = cast(0, x[0])
        g0, w = spend_class(zero, x[0], y[0], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g1, w = spend_class(w, x[1], y[1], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g2, w = spend_class(w, x[2], y[2], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g3, w = spend_class(w, x[3], y[3], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g4, w = spend_class(w, x[4], y[4], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g5, w = spend_class(w, x[5], y[5], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g6, w = spend_class(w, x[6], y[6], zero, maxima, rates, tags, factors, ratio, softmaxes)
        g7, w = spend_class(w, x[7], y[7], zero, maxima, rates, tags, factors, ratio, softmaxes)
        return (g0, g1, g2, g3, g4, g5, g6, g7), w

    return Stages(rates, gather, settle, weigh, spend, spend_class)
