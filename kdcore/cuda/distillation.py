"""What a KD kernel does with the octets of one row, the student's x and the teacher's y, in three stages.

1. **gather**: maxima, sums of exponentials, and the moment from which forward KL follows, carried along as a thread's
   *sums* (m_s, r_s, z_s, low_s, z_h, low_h, m_t, r_t, z_t, low_t, w, low_w); low is what is still to be added. z_s and
   z_t are at the temperatures, z_h is the student's at 1, r is what exponents are relative to. To add up those of
   several threads, **settle** makes them relative to the maxima of all; **rebase** does so with those of slices.
2. **weigh**: for a divergence that goes by its two formulas, the sums of its terms and of its slopes. They need the
   whole row's softmaxes. Forward KL has no such stage.
3. **spend**: the gradient.

They come in both ways of :mod:`kdcore.cuda.rows`, quick and careful; :func:`questions` has when care is needed. By two
formulas there is the careful one alone: where student and teacher agree but for a constant, so do p and q.
:func:`stages` makes the functions. A kernel brings the octets, from memory or from shared memory, and the reductions.
"""

import math
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from kdcore import formulas
from kdcore.cuda.primitives import bind, cast, device, exp2, lowest, maximum, product
from kdcore.cuda.rows import carry, factor_of, floor_of, is_large, largest, total, way_of
from kdcore.formulas import HEADROOM

__all__ = ["Parts", "Questions", "Stages", "parts_of", "questions", "rates_of", "rebase_of", "stages"]

_log_ratio = bind(formulas.log_ratio)
_scaled_logit = bind(formulas.scaled_logit)
_forward_kl_moment = bind(formulas.forward_kl_moment)


@device
def _as_if_inside(condition, x, y):
    return y


#: Without its guard, where nothing is outside the support: NaN shows what was.
_unguarded_moment = bind(formulas.forward_kl_moment, where=_as_if_inside)
_merged_forward_kl = bind(formulas.merged_forward_kl)
_kd_gradient = bind(formulas.kd_gradient)


class Parts(NamedTuple):
    """Which terms a KD objective has, and how the student's exponentials at T = 1 follow from those at T."""

    soft: bool
    hard: bool
    #: e_h = e_s ** power. 0: by an exponential of its own.
    power: int


@lru_cache(maxsize=256)
def parts_of(alpha: float, temperature: float) -> Parts:
    """The parts of an objective. Without a divergence, the temperature of the student's sums is 1."""
    if alpha == 1.0:
        return Parts(soft=False, hard=True, power=1)
    if alpha == 0.0:
        return Parts(soft=True, hard=False, power=1)
    return Parts(soft=True, hard=True, power=int(temperature) if temperature in (1.0, 2.0, 4.0) else 0)


@lru_cache(maxsize=256)
def rates_of(temperature: float, teacher_temperature: float, wide: bool) -> tuple[Any, ...]:
    """What turns a logit into an exponent of 2, and what follows from it; kernels call it ``rates``.

    0, 1, 2: the rate log2(e) / T of the student, of the teacher, and of the student at T = 1; 3: T_t / T. In float64,
    of the rates as they are after rounding, 4: HEADROOM / rates[1]; 5: rates[0] / rates[1]. Then what maxima begin
    with, :func:`kdcore.cuda.rows.floor_of`, 6: the student's rate, 7: the teacher's, 8: the student's larger one.
    """
    like = np.float64 if wide else np.float32
    student, teacher, at_one = (like(formulas.rate(of)) for of in (temperature, teacher_temperature, 1.0))
    unit, ratio = HEADROOM / np.float64(teacher), np.float64(student) / np.float64(teacher)
    floors = (like(floor_of(float(of))) for of in (student, teacher, max(student, at_one)))
    return student, teacher, at_one, like(teacher_temperature / temperature), unit, ratio, *floors


class Questions(NamedTuple):
    """What is asked of a row's maxima and sums: whether their exponents, or their sums, are beyond the quick way."""

    large: Any
    no_good: Any


class Stages(NamedTuple):
    """Device functions of one row's octets; see :func:`stages`."""

    floors: Any
    sums_at: Any
    raise_maxima: Any
    add_octet: Any
    settle: Any
    unit: Any
    references: Any
    offsets: Any
    weigh: Any
    spend: Any
    spend_one: Any
    exponential: Any
    at_one: Any


@cache
def questions(parts: Parts) -> Questions:
    soft, hard, power = parts

    @device
    def large(maxima, rates):
        if is_large(maxima[0], rates[0]) or (hard and power == 0 and is_large(maxima[0], rates[2])):
            return True
        return soft and is_large(maxima[1], rates[1])

    @device
    def no_good(maxima, z_s, z_h, z_t, w, rates):
        # A w that is not finite may be a difference that overflows, and the logits are finite all the same.
        if not (0.0 < z_s < math.inf and (not hard or 0.0 < z_h < math.inf)):
            return True
        if soft and not (0.0 < z_t < math.inf and abs(w) < math.inf):
            return True
        return large(maxima, rates)

    return Questions(large, no_good)


@cache
def rebase_of(parts: Parts) -> Any:
    """The function that makes a slice's sums relative to other maxima."""
    _, hard, power = parts
    own_sum = hard and power != 1

    @device
    def rebase(m_s, z_s, z_h, m_t, z_t, w, maxima, rates, like):
        """(z_s, z_h, z_t, w), in float64, of a slice's sums that are relative to m_s and m_t."""
        d_s, d_t = _scaled_logit(m_s, maxima[0], HEADROOM), _scaled_logit(m_t, maxima[1], HEADROOM)
        f_s = factor_of(d_s * (np.float64(rates[0]) / HEADROOM), like)
        f_t = factor_of(d_t * (np.float64(rates[1]) / HEADROOM), like)
        f_h = f_s
        if own_sum:
            f_h = factor_of(d_s * (np.float64(rates[2]) / HEADROOM), like)
        w = _merged_forward_kl(w, z_t, d_t, d_s, rates[5], f_t)
        return z_s * f_s, z_h * f_h, z_t * f_t, w

    return rebase


@cache
def stages(parts: Parts, careful: bool, term: Any = None, slope: Any = None) -> Stages:
    """The stages of a divergence: of forward KL, or of one by the two formulas ``term`` and ``slope``, with care only.

    What they share: ``rates`` of :func:`rates_of`; ``maxima`` = (m_s, m_t) of the row; ``references`` = (m_s, r_s,
    r_t); ``factors`` = (hard, soft_q, soft_p) of :func:`kdcore.formulas.kd_gradient`. By two formulas a class goes by
    more, ``softmaxes`` = (1 / z_s, 1 / z_t, 1 / (HEADROOM T), 1 / (HEADROOM T_t), log(z_t / z_s), c). The sums of terms
    and of slopes are each in two parts.
    """
    soft, hard, power = parts
    own_sum = hard and power != 1  # at T = 1, the student's sums at T are those at 1
    two_formulas = term is not None
    if two_formulas:
        term, slope = bind(term), bind(slope)
    floor, place, shift, moved, offset, exponent, ratio_of, unit = way_of(careful)

    @device
    def shifts(x, r, c):
        return (
            shift(x[0], r, c), shift(x[1], r, c), shift(x[2], r, c), shift(x[3], r, c),
            shift(x[4], r, c), shift(x[5], r, c), shift(x[6], r, c), shift(x[7], r, c),
        )  # fmt: skip

    @device
    def exponentials(d, c):
        return (
            exp2(exponent(d[0], c)), exp2(exponent(d[1], c)), exp2(exponent(d[2], c)), exp2(exponent(d[3], c)),
            exp2(exponent(d[4], c)), exp2(exponent(d[5], c)), exp2(exponent(d[6], c)), exp2(exponent(d[7], c)),
        )  # fmt: skip

    @device
    def exponential(x, r, c):
        """The exponential of a logit at T, relative to r."""
        return exp2(exponent(shift(x, r, c), c))

    if power == 0:

        @device
        def at_one(e, x, m, c):
            """The student's exponential at T = 1, from the one at T or from the logit."""
            return exp2(exponent(shift(x, place(m, c), c), c))

        @device
        def factor_at_one(f, moved_at_one, c, like):
            """What the sum at T = 1 is multiplied by when the one at T is by f, or its reference is moved."""
            return factor_of(np.float64(exponent(moved_at_one, c)), like)

    elif power == 1:

        @device
        def at_one(e, x, m, c):
            return e

        @device
        def factor_at_one(f, moved_at_one, c, like):
            return f

    elif power == 2:

        @device
        def at_one(e, x, m, c):
            return e * e

        @device
        def factor_at_one(f, moved_at_one, c, like):
            return f * f

    else:

        @device
        def at_one(e, x, m, c):
            square = e * e
            return square * square

        @device
        def factor_at_one(f, moved_at_one, c, like):
            square = f * f
            return square * square

    @device
    def floors(rates, like):
        """What maxima begin with."""
        of_student = rates[8] if hard and power == 0 else rates[6]
        return floor(of_student, like), floor(rates[7], like)

    @device
    def inside_one(d, y):
        # Of a finite logit, d may have overflowed: then 0 times an infinity is to show that care is needed.
        return d if y == -math.inf else maximum(d, cast(lowest(d), d))

    @device
    def inside(d, y):
        """d of an octet y, -inf outside the support alone."""
        return (
            inside_one(d[0], y[0]), inside_one(d[1], y[1]), inside_one(d[2], y[2]), inside_one(d[3], y[3]),
            inside_one(d[4], y[4]), inside_one(d[5], y[5]), inside_one(d[6], y[6]), inside_one(d[7], y[7]),
        )  # fmt: skip

    def of_an_octet(moment):
        """The function that adds up a moment's eight terms."""

        @device
        def add(e_t, d_t, d, ratio):
            w = moment(cast(0, ratio), e_t[0], d_t[0], d[0], ratio)
            w = moment(w, e_t[1], d_t[1], d[1], ratio)
            w = moment(w, e_t[2], d_t[2], d[2], ratio)
            w = moment(w, e_t[3], d_t[3], d[3], ratio)
            w = moment(w, e_t[4], d_t[4], d[4], ratio)
            w = moment(w, e_t[5], d_t[5], d[5], ratio)
            w = moment(w, e_t[6], d_t[6], d[6], ratio)
            return moment(w, e_t[7], d_t[7], d[7], ratio)

        return add

    guarded_moment, unguarded_moment = of_an_octet(_forward_kl_moment), of_an_octet(_unguarded_moment)

    @device
    def sums_at(maxima, rates):
        """The sums of no classes, relative to maxima."""
        m_s, m_t = maxima
        zero = cast(0, m_s)
        return m_s, place(m_s, rates[0]), zero, zero, zero, zero, m_t, place(m_t, rates[1]), zero, zero, zero, zero

    @device
    def raise_maxima(sums, x, y, rates):
        """The sums relative to maxima that are at least those of an octet."""
        top_s, top_t = maximum(sums[0], largest(x)), sums[6]
        if soft:
            top_t = maximum(sums[6], largest(y))
        if not (top_s > sums[0] or top_t > sums[6]):
            return sums
        m_s, r_s, z_s, low_s, z_h, low_h, _, r_t, z_t, low_t, w, low_w = sums
        to_s, to_t = place(top_s, rates[0]), place(top_t, rates[1])
        d_s, d_t = moved(r_s, to_s), moved(r_t, to_t)
        f_s = exp2(exponent(d_s, rates[0]))
        z_s *= f_s
        low_s *= f_s
        if own_sum:
            d_h = moved(place(m_s, rates[2]), place(top_s, rates[2]))
            # Without float64, which factor_at_one has for what happens once a row.
            f_h = exp2(exponent(d_h, rates[2])) if power == 0 else cast(factor_at_one(f_s, d_h, rates[2], f_s), f_s)
            z_h *= f_h
            low_h *= f_h
        if soft:
            f_t = exp2(exponent(d_t, rates[1]))
            if not two_formulas:
                w = _merged_forward_kl(w, z_t, d_t, d_s, ratio_of(rates[3]), f_t)
                low_w *= f_t
            z_t *= f_t
            low_t *= f_t
        return top_s, to_s, z_s, low_s, z_h, low_h, top_t, to_t, z_t, low_t, w, low_w

    @device
    def add_octet(sums, x, y, rates):
        """The sums of the classes so far and of an octet, of which no class is above the maxima."""
        m_s, r_s, z_s, low_s, z_h, low_h, m_t, r_t, z_t, low_t, w, low_w = sums
        d = shifts(x, r_s, rates[0])
        e = exponentials(d, rates[0])
        z_s, low_s = carry(z_s, low_s, total(e))
        if own_sum:
            c = rates[2]
            h = (
                at_one(e[0], x[0], m_s, c), at_one(e[1], x[1], m_s, c), at_one(e[2], x[2], m_s, c),
                at_one(e[3], x[3], m_s, c), at_one(e[4], x[4], m_s, c), at_one(e[5], x[5], m_s, c),
                at_one(e[6], x[6], m_s, c), at_one(e[7], x[7], m_s, c),
            )  # fmt: skip
            z_h, low_h = carry(z_h, low_h, total(h))
        if soft:
            d_t = shifts(y, r_t, rates[1])
            e_t = exponentials(d_t, rates[1])
            z_t, low_t = carry(z_t, low_t, total(e_t))
            if not two_formulas:
                ratio = ratio_of(rates[3])
                part = unguarded_moment(e_t, d_t, d, ratio)
                if not abs(part) < math.inf:
                    part = guarded_moment(e_t, inside(d_t, y), d, ratio)
                w, low_w = carry(w, low_w, part)
        return m_s, r_s, z_s, low_s, z_h, low_h, m_t, r_t, z_t, low_t, w, low_w

    @device
    def settle(sums, maxima, rates, like):
        """(z_s, z_h, z_t, w) of a thread in float64, relative to the maxima of others, too, without r's rounding."""
        m_s, r_s, z_s, low_s, z_h, low_h, _, r_t, z_t, low_t, w, low_w = sums
        d_s = offset(r_s, maxima[0], rates[0])
        f_s = factor_of(exponent(d_s, np.float64(rates[0])), like)
        z_s = (np.float64(z_s) + np.float64(low_s)) * f_s
        of_h, of_t, of_w = z_s, z_s, 0.0  # of a part that there is not, what can be divided by
        if own_sum:
            d_h = offset(place(m_s, rates[2]), maxima[0], rates[2])
            f_h = factor_at_one(f_s, d_h, np.float64(rates[2]), like)
            of_h = (np.float64(z_h) + np.float64(low_h)) * f_h
        if soft:
            d_t = offset(r_t, maxima[1], rates[1])
            f_t = factor_of(exponent(d_t, np.float64(rates[1])), like)
            of_t = np.float64(z_t) + np.float64(low_t)
            if not two_formulas:
                ratio = ratio_of(np.float64(rates[3]))
                of_w = _merged_forward_kl(np.float64(w) + np.float64(low_w), of_t, d_t, d_s, ratio, f_t)
            of_t *= f_t
        return z_s, of_h, of_t, of_w

    @device
    def references(maxima, rates):
        return maxima[0], place(maxima[0], rates[0]), place(maxima[1], rates[1])

    @device
    def offsets(maxima, rates):
        """Of e_s, e_h, e_t: the exponents, at most 1 / 4, that make them in :func:`spend` relative to the maxima."""
        if careful:
            return 0.0, 0.0, 0.0
        _, r_s, r_t = references(maxima, rates)
        of_s = offset(r_s, maxima[0], rates[0])
        of_h = of_s * power
        if power == 0:
            of_h = offset(place(maxima[0], rates[2]), maxima[0], rates[2])
        return of_s, of_h, offset(r_t, maxima[1], rates[1])

    @device
    def weigh_class(x, y, inside, references, rates, softmaxes):
        """(phi, q phi') of one class; 0 where it is not one."""
        d_s, d_t = shift(x, references[1], rates[0]), shift(y, references[2], rates[1])
        p = product(exp2(exponent(d_t, rates[1])), softmaxes[1])
        q = product(exp2(exponent(d_s, rates[0])), softmaxes[0])
        r = _log_ratio(d_s, d_t, softmaxes[2], softmaxes[3], softmaxes[4])
        if inside:
            return cast(term(p, q, r, softmaxes[5]), x), cast(slope(p, q, r, softmaxes[5]), x)
        return cast(0, x), cast(0, x)

    @device
    def weigh(sums, x, y, a, b, end, whole, references, rates, softmaxes):
        """The sums with the terms and slopes of an octet; the class ``end`` and those after it do not count."""
        value, low_value, mean, low_mean = sums
        p0, q0 = weigh_class(x[0], y[0], whole or a < end, references, rates, softmaxes)
        p1, q1 = weigh_class(x[1], y[1], whole or a + 1 < end, references, rates, softmaxes)
        p2, q2 = weigh_class(x[2], y[2], whole or a + 2 < end, references, rates, softmaxes)
        p3, q3 = weigh_class(x[3], y[3], whole or a + 3 < end, references, rates, softmaxes)
        p4, q4 = weigh_class(x[4], y[4], whole or b < end, references, rates, softmaxes)
        p5, q5 = weigh_class(x[5], y[5], whole or b + 1 < end, references, rates, softmaxes)
        p6, q6 = weigh_class(x[6], y[6], whole or b + 2 < end, references, rates, softmaxes)
        p7, q7 = weigh_class(x[7], y[7], whole or b + 3 < end, references, rates, softmaxes)
        value, low_value = carry(value, low_value, total((p0, p1, p2, p3, p4, p5, p6, p7)))
        mean, low_mean = carry(mean, low_mean, total((q0, q1, q2, q3, q4, q5, q6, q7)))
        return value, low_value, mean, low_mean

    @device
    def spend_one(x, y, above_one, references, rates, factors, softmaxes):
        """The gradient of one class; ``above_one`` = z_h, as exponentials are here, if it is the label, else 0."""
        m_s, r_s, r_t = references
        d_s = shift(x, r_s, rates[0])
        e_s = exp2(exponent(d_s, rates[0]))
        zero = cast(0, x)
        e_h, g_q, g_p = zero, zero, zero
        if hard:
            e_h = at_one(e_s, x, m_s, rates[2]) - above_one
        if soft:
            d_t = shift(y, r_t, rates[1])
            e_t = exp2(exponent(d_t, rates[1]))
            if two_formulas:
                p, q = product(e_t, softmaxes[1]), product(e_s, softmaxes[0])
                r = _log_ratio(d_s, d_t, softmaxes[2], softmaxes[3], softmaxes[4])
                g_q, g_p = cast(slope(p, q, r, softmaxes[5]), x), q
            else:
                g_q, g_p = e_s, e_t
        return _kd_gradient(e_h, g_q, g_p, factors[0], factors[1], factors[2])

    @device
    def spend(x, y, references, rates, factors, softmaxes):
        """The gradient of an octet, without what the label adds."""
        zero = cast(0, x[0])
        return (
            spend_one(x[0], y[0], zero, references, rates, factors, softmaxes),
            spend_one(x[1], y[1], zero, references, rates, factors, softmaxes),
            spend_one(x[2], y[2], zero, references, rates, factors, softmaxes),
            spend_one(x[3], y[3], zero, references, rates, factors, softmaxes),
            spend_one(x[4], y[4], zero, references, rates, factors, softmaxes),
            spend_one(x[5], y[5], zero, references, rates, factors, softmaxes),
            spend_one(x[6], y[6], zero, references, rates, factors, softmaxes),
            spend_one(x[7], y[7], zero, references, rates, factors, softmaxes),
        )

    return Stages(
        floors, sums_at, raise_maxima, add_octet, settle, unit, references, offsets, weigh, spend, spend_one,
        exponential, at_one,
    )  # fmt: skip
