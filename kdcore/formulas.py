"""The algebra of knowledge distillation, one scalar formula a function.

The functions are plain Python that uses ``math`` alone. Each engine compiles them with its own compiler, so a formula
that changes here changes everywhere. A formula may call no other one, because a compiled function cannot call one that
is not; it may call :func:`where`, :func:`fma`, :func:`log`, :func:`exp`, :func:`exprel` and :func:`reciprocal`, for
which :func:`bound` puts an engine's own. It has no branches but ``where``, so that a vector of numbers can take the
place of a number. Exponentials of logits come in as arguments.

Notation, for one row of V classes:

    s, t        student and teacher logits
    T, T_t      temperature of the student (and of the loss), temperature of the teacher
    m           maximum of a row, or of a part of it
    d           x - m, a shifted logit: never positive, -inf outside the support. Where it must not overflow it is
                scaled by HEADROOM
    e           exp((x - m) / T), in [0, 1]
    z           sum of e over the row
    p, q, h     softmax(t / T_t), softmax(s / T), softmax(s)

References: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (loss, T², limit
of large T); Kullback & Leibler 1951. The divergences have theirs in :mod:`kdcore.divergences`.
"""

import math

__all__ = [
    "ACTIVATIONS",
    "HEADROOM",
    "alpha_slope",
    "alpha_term",
    "bound",
    "converted",
    "cross_entropy",
    "dkd_divergence",
    "dkd_factors",
    "dkd_label_gradient",
    "exp",
    "exponent",
    "exprel",
    "fma",
    "forward_kl_from_sums",
    "forward_kl_moment",
    "forward_kl_slope",
    "forward_kl_term",
    "gelu",
    "identity",
    "jsd_slope",
    "jsd_term",
    "kd_gradient",
    "kd_loss",
    "log",
    "log_odds",
    "log_of_sum",
    "log_ratio",
    "log_softmax",
    "merged_forward_kl",
    "outcome_term",
    "probability_difference",
    "rate",
    "reciprocal",
    "relu",
    "reverse_kl_slope",
    "reverse_kl_term",
    "scaled_logit",
    "shift_factor",
    "sigmoid",
    "skew_forward_kl_slope",
    "skew_forward_kl_term",
    "skew_reverse_kl_slope",
    "skew_reverse_kl_term",
    "soft_scale",
    "softplus",
    "spread_scale",
    "standardized",
    "standardized_gradient",
    "tail_factor",
    "tail_shares",
    "tanh",
    "tvd_slope",
    "tvd_term",
    "two_way_kl",
    "where",
]

#: A scaled logit HEADROOM * (x - m) cannot overflow, whatever the size of finite logits. A power of two costs no
#: accuracy.
HEADROOM = 2.0**-24

#: Probabilities below are 0 for the divergences: their reciprocals would overflow in float32, and no sum shows them.
_LEAST = 2.0**-124


def where(condition, x, y):
    """``x`` where the condition holds, else ``y``; both have been computed."""
    return x if condition else y


def fma(x, y, z):
    """x y + z, with one rounding where the engine has an instruction for it."""
    return x * y + z


def log(x):
    """The natural logarithm of a positive number; what it gives elsewhere must not be used."""
    return math.log(x) if x > 0 else -math.inf


def exp(x):
    """The exponential of a number that is not positive, or barely."""
    return math.exp(x)


def exprel(x):
    """(exp(x) - 1) / x for |x| <= 1/2, 1 at 0, without cancellation; what it gives elsewhere must not be used."""
    if not 0 < abs(x) <= 0.5:
        return 1.0
    return math.expm1(x) / x


def reciprocal(x):
    """1 / x of a positive number, as near as one rounding more would leave it."""
    return 1.0 / x


def bound(formula, functions):
    """A copy of a formula that finds ``functions``, a dict, by the names of the functions above."""
    names = {**formula.__globals__, **functions}
    return type(formula)(formula.__code__, names, formula.__name__, formula.__defaults__, formula.__closure__)


def converted(formula, kind):
    """A copy of a formula whose constants are what ``kind`` makes of them: literals, globals and closure, if float.

    A literal is a float64 to a compiler, which would make float64 of all that a formula does with float32.
    """

    def convert(value):
        return kind(value) if type(value) is float else value

    function = type(formula)
    code = formula.__code__.replace(co_consts=tuple(map(convert, formula.__code__.co_consts)))
    names = {name: convert(value) for name, value in formula.__globals__.items()}
    cells = formula.__closure__ and tuple(type(cell)(convert(cell.cell_contents)) for cell in formula.__closure__)
    return function(code, names, formula.__name__, formula.__defaults__, cells)


# --- rows ----------------------------------------------------------------------------------------------------------


def scaled_logit(x, m, headroom):
    """HEADROOM * (x - m); ``headroom`` is HEADROOM in the type of x."""
    return x * headroom - m * headroom


def rate(temperature):
    """What turns d into an exponent of 2: exp((x - m) / T) = exp2(d * rate)."""
    return math.log2(math.e) / temperature


def exponent(x, c, r):
    """The exponent of 2 of exp((x - m) / T) in one step; c is its rate, r is m c as it is rounded for a whole row."""
    return fma(x, c, -r)


def log_softmax(d, inverse_temperature, log_z):
    """log softmax(x / T) of one class."""
    return d * inverse_temperature - log_z


def cross_entropy(d, z):
    """-log h of the label: ``d`` is the label's logit scaled by HEADROOM, z the sum at T = 1. +inf where d is -inf."""
    return math.log(z) - d / HEADROOM


def forward_kl_moment(w, e_t, d_t, d_s, ratio):
    """One class more in w = sum of e_t (d_t - ratio d_s), ratio = T_t / T, from which KL(p || q) follows.

    0 log 0 = 0: a class outside the teacher's support adds nothing. Inside it, a class that the student rules out
    makes the divergence +inf: the term is +inf, or NaN where e_t has underflowed to 0.
    """
    return fma(e_t, where(d_t == -math.inf, 0.0, fma(-ratio, d_s, d_t)), w)


def shift_factor(d, temperature):
    """What a sum of exponentials is multiplied by when the maximum that it is relative to rises by -d, d scaled."""
    return math.exp(d / HEADROOM / temperature)


def merged_forward_kl(w, z_t, d_t, d_s, ratio, factor):
    """w of a part of a row, scaled by HEADROOM, after the maxima have risen by -d_t and -d_s, scaled alike."""
    return where(z_t > 0.0, factor * (w + z_t * where(d_s == -math.inf, 0.0, d_t - ratio * d_s)), 0.0)


def forward_kl_from_sums(w, z_t, z_s, teacher_temperature):
    """KL(p || q) = sum p (log p - log q), with one logarithm for the whole row; w is scaled by HEADROOM.

    In a row without NaN, w is NaN where a class of the teacher's support, ruled out by the student, has underflowed.
    """
    kl = w / HEADROOM / teacher_temperature / z_t + math.log(z_s / z_t)
    return math.inf if math.isnan(kl) else kl


def kd_gradient(e_h, e_q, e_p, hard, soft_q, soft_p):
    """One class of the logit gradient, before the label's own term: hard h + soft (q - p).

    The factors hold the normalisers: hard = alpha / z_h, soft_q = (1 - alpha) T / z_q and so on. For a divergence that
    is the sum of phi(p, q), q phi' stands for e_q and q for e_p, with soft_p = soft_q times the sum of q phi'.
    """
    return fma(hard, e_h, soft_q * e_q - soft_p * e_p)


def soft_scale(scale, alpha, kd_scale, temperature):
    """What of a row's scale, weight over denominator, goes to q - p in its gradient: (1 - alpha) T² / T."""
    return scale * (1.0 - alpha) * kd_scale / temperature


def kd_loss(ce, kl, alpha):
    """alpha CE + (1 - alpha) T² D of one row; kl holds its T². An end point reads one term, so 0 · inf never arises."""
    if alpha == 0.0:
        return kl
    if alpha == 1.0:
        return ce
    return alpha * ce + (1.0 - alpha) * kl


def log_odds(d, temperature, log_z):
    """log(q / (1 - q)) of a class from the sum z of the others: d its logit less their maximum, scaled by HEADROOM."""
    return d / HEADROOM / temperature - log_z


def sigmoid(u, e):
    """The probability whose log-odds are u, where e = exp(-|u|)."""
    return where(u > 0.0, 1.0, e) / (1.0 + e)


def softplus(u, e):
    """log(1 + exp(u)), where e = exp(-|u|): log q = -softplus(-u) and log(1 - q) = -softplus(u) of the log-odds u."""
    return where(u > 0.0, u, 0.0) + math.log1p(e)


# --- decoupled KD --------------------------------------------------------------------------------------------------
#
# The label is one outcome, with log-odds u_s and u_t, and all other classes are the other: among these there are q' and
# p', softmaxes whose sums z_s and z_t (z_h at T = 1) are relative to the others' maxima. With e = exp((x - m) / T) of a
# class, 1 - h the student's probability of the others at T = 1, and factors hard and soft, the gradient is
#
#     hard (1 - h) e_h / z_h + soft ((nontarget - target (q - p)) e_s / z_s - nontarget e_t / z_t)     of another class
#     soft target (q - p) - hard (1 - h)                                                               of the label


def two_way_kl(p, rest, of_p, of_rest):
    """KL of (p, 1 - p) and (q, 1 - q): ``of_p`` is log p - log q, ``of_rest`` the same of the rest. 0 log 0 = 0."""
    kl = 0.0
    if p > 0.0:
        kl += p * of_p
    if rest > 0.0:
        kl += rest * of_rest
    return kl


def probability_difference(u_s, u_t, q, p, rest_q, rest_p):
    """q - p from what both are and from what is left of 1: where both are more than one half, the latter are exact."""
    return rest_p - rest_q if u_s > 0.0 and u_t > 0.0 else q - p


def dkd_divergence(target, tckd, nontarget, nckd):
    """target TCKD + nontarget NCKD; a part of weight 0 may be infinite."""
    return (target * tckd if target > 0.0 else 0.0) + (nontarget * nckd if nontarget > 0.0 else 0.0)


def dkd_factors(hard, soft, rest, difference, nontarget, z_h, z_s, z_t):
    """(hard, soft_q, soft_p) of :func:`kd_gradient` for the others: ``rest`` = 1 - h, difference = target (q - p)."""
    return hard * rest / z_h, soft * (nontarget - difference) / z_s, soft * nontarget / z_t


def dkd_label_gradient(hard, soft, rest, difference):
    """The gradient of the label's class, with the arguments of :func:`dkd_factors`."""
    return soft * difference - hard * rest


# --- mixtures of teachers ------------------------------------------------------------------------------------------


def log_of_sum(a, b):
    """log(exp(a) + exp(b)), -inf where both are."""
    larger, smaller = where(a > b, a, b), where(a > b, b, a)
    apart = where(larger == -math.inf, 0.0, smaller - larger)
    return larger + log(exp(apart) + 1.0)


# --- standardised logits -------------------------------------------------------------------------------------------


def spread_scale(low, high):
    """A power of two by which the largest of finite logits is about 1: so their squares neither overflow nor vanish."""
    return math.ldexp(1.0, -max(math.frexp(max(abs(low), abs(high)))[1], -1000))


def standardized(d, mean, deviation):
    """z of a logit: what it has beyond a number near the row's mean, less the mean of that, over the deviation."""
    return (d - mean) / deviation


def standardized_gradient(g, mean, z, mean_z, inverse):
    """One class of the gradient by x, from g, that by z = (x - mean x) / std x; means are of g and g z, 1 / std x."""
    return (g - mean - z * mean_z) * inverse


# --- teachers without every class ----------------------------------------------------------------------------------
#
# Of a row the teacher stores some classes I, each with its log p, and the log of what all others have together, p_tail.
# The divergence is a sum over **outcomes** of p (log p - log q), with q = softmax(s / T) over all classes. What the
# outcomes are is the policy for the tail. With M = the sum of the outcomes' p, which is 1 but for the rounding of what
# is stored (and less for "zero"), the derivative by the student's logits, times T², is T times
#
#     bucket        the classes in I, and all others as one: p_tail, q_tail = sum of q outside I
#                       M q_v - p_v in I, (M - p_tail / q_tail) q_v outside
#     renormalize   the classes in I, with p / (sum of p in I)
#                       q_v - p_v in I, q_v outside
#     zero          the classes in I as they are
#                       M q_v - p_v in I, M q_v outside
#     uniform       all classes, each of the n outside I with p_tail / n
#                       M q_v - p_v in I, M q_v - p_tail / n outside
#
# Samples are as "zero", with their weights for p. Where the student rules out the whole tail, q_v / q_tail is 1 / n,
# the limit of equal logits that fall together.


def outcome_term(p, log_p, log_q):
    """p (log p - log q) of one outcome, or of several that share p equally: log p of one, the mean of their log q.

    0 log 0 = 0. +inf where q alone rules the outcome out, or NaN where p has underflowed to 0.
    """
    return where(log_p == -math.inf, 0.0, p * (log_p - log_q))


def tail_shares(is_bucket, p_tail, z_tail, n_tail):
    """(1 / z_tail, p_tail / n) as the tail's classes share p_tail in the gradient: one of them, the other is 0.

    By their own softmax in a bucket, unless the student rules out all of them; else equally, and in all other policies,
    of which those without a tail have p_tail = 0.
    """
    if is_bucket and z_tail > 0.0:
        return 1.0 / z_tail, 0.0
    return 0.0, (p_tail / n_tail if p_tail > 0.0 else 0.0)


def tail_factor(mass, to_q, p_tail, to_share):
    """M q - p_tail q / q_tail of a class of the tail, over its e: q = e to_q, q / q_tail = e to_share."""
    return mass * to_q - p_tail * to_share


# --- divergences ---------------------------------------------------------------------------------------------------
#
# A divergence D = sum of phi(p, q) is two formulas of one class: its term phi, and its slope q phi', phi' = dphi/dq
# (with the factor q, because phi' alone may be infinite where q is 0). Both take (p, q, r, c): r = log q - log p, which
# is known better than its parts, and c the divergence's parameter. r is -inf or +inf where q or p alone rules the class
# out, and finite where both do; p and q may have underflowed to 0 inside the support. A phi may differ from the
# textbook's by a multiple of q - p, whose sum is 0: chosen so that no phi is negative, it adds up without cancellation.


def log_ratio(d_s, d_t, inverse_s, inverse_t, constant):
    """r = log q - log p, where the constant is log z_t - log z_s: both inside the support of p or of q."""
    log_q, log_p = d_s * inverse_s, d_t * inverse_t
    return where(log_q == log_p, 0.0, log_q - log_p) + constant  # so that -inf less -inf is 0


def forward_kl_term(p, q, r, c):
    """KL(p || q): -p r + q - p."""
    return where(r == math.inf, q, (q - p) - p * r)


def forward_kl_slope(p, q, r, c):
    """q phi' of KL(p || q)."""
    return q - p


def reverse_kl_term(p, q, r, c):
    """KL(q || p): q r + p - q."""
    return where(r == -math.inf, p, q * r + (p - q))


def reverse_kl_slope(p, q, r, c):
    """q phi' of KL(q || p)."""
    return where(r == -math.inf, 0.0, q * r)


def jsd_term(p, q, r, c):
    """c KL(p || m) + (1 - c) KL(q || m), m = c p + (1 - c) q.

    One logarithm, that of the larger one over m; the other is less by |r|.
    """
    m = c * p + (1.0 - c) * q
    larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))
    of_p, of_q = where(r > 0.0, larger - r, larger), where(r < 0.0, larger + r, larger)
    return where(p > 0.0, c * p * of_p, 0.0) + where(q > 0.0, (1.0 - c) * q * of_q, 0.0)


def jsd_slope(p, q, r, c):
    """q phi' of the Jensen-Shannon divergence."""
    m = c * p + (1.0 - c) * q
    larger = log(where(p > q, p, where(m > _LEAST, q, 1.0)) * reciprocal(where(m > _LEAST, m, 1.0)))
    return where(q > 0.0, (1.0 - c) * q * where(r < 0.0, larger + r, larger), 0.0)


def skew_forward_kl_term(p, q, r, c):
    """KL(p || m), m = c p + (1 - c) q: p log(p / m) + m - p."""
    m = c * p + (1.0 - c) * q
    o = where(m > _LEAST, m, 1.0)
    n = reciprocal(o)
    return p * log(where(p > 0.0, p, o) * n) + (m - p)


def skew_forward_kl_slope(p, q, r, c):
    """q phi' of KL(p || m)."""
    m = c * p + (1.0 - c) * q
    n = reciprocal(where(m > _LEAST, m, 1.0))
    return (1.0 - c) * q * ((m - p) * n)


def skew_reverse_kl_term(p, q, r, c):
    """KL(q || m), m = c q + (1 - c) p: q log(q / m) + m - q."""
    m = c * q + (1.0 - c) * p
    o = where(m > _LEAST, m, 1.0)
    n = reciprocal(o)
    return q * log(where(q > 0.0, q, o) * n) + (m - q)


def skew_reverse_kl_slope(p, q, r, c):
    """q phi' of KL(q || m)."""
    m = c * q + (1.0 - c) * p
    o = where(m > _LEAST, m, 1.0)
    n = reciprocal(o)
    return q * (log(where(q > 0.0, q, o) * n) + c * ((m - q) * n))


def tvd_term(p, q, r, c):
    """Total variation: |p - q| / 2."""
    return 0.5 * where(p > q, p - q, q - p)


def tvd_slope(p, q, r, c):
    """q phi' of the total variation, with the subgradient 0 at ties."""
    return where(q > p, 0.5 * q, where(q < p, -0.5 * q, 0.0 * q))


def alpha_term(p, q, r, c):
    """Amari's divergence: (p^c q^(1 - c) - c p - (1 - c) q) / (c (c - 1)).

    With y = log q - log p and g = (p^c q^(1 - c) - q) / c this is (p - q - g) / (1 - c), without a small divisor for
    c <= 1/2; beyond, p and q change places. Near agreement g = -y q (exp(-c y) - 1) / (-c y): nothing cancels, and c is
    not divided by.
    """
    high = c > 0.5
    k, y = where(high, 1.0 - c, c), where(high, 0.0 - r, r)
    a, b = where(high, p, q), where(high, q, p)
    z = (0.0 - k) * y
    close = z * z < 0.25
    near = a * (0.0 - y) * exprel(z)
    apart = where(y > 0.0, a, b) * exp(where(y > 0.0, z, (1.0 - k) * y)) - a
    return ((b - a) - where(close, near, apart * reciprocal(k))) * reciprocal(1.0 - k)


def alpha_slope(p, q, r, c):
    """q phi' of Amari's divergence: (q - p^c q^(1 - c)) / c, near agreement as in its term."""
    z = (0.0 - c) * r
    close = z * z < 0.25
    near = q * r * exprel(z)
    apart = q - where(r > 0.0, q, p) * exp(where(r > 0.0, z, (1.0 - c) * r))
    return where(close, near, apart * reciprocal(c))


# --- activations ---------------------------------------------------------------------------------------------------


def identity(x):
    """The activation of an output layer."""
    return x


def relu(x):
    """max(x, 0); NaN stays NaN."""
    return x * 0 if x < 0 else x


def tanh(x):
    """Hyperbolic tangent."""
    return math.tanh(x)


def gelu(x):
    """x Φ(x) with the exact normal distribution function (Hendrycks & Gimpel 2016)."""
    return 0.5 * x * (1.0 + math.erf(x * math.sqrt(0.5)))


#: The activations of linear layers, by name.
ACTIVATIONS = {"identity": identity, "relu": relu, "tanh": tanh, "gelu": gelu}
