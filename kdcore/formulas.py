"""The algebra of knowledge distillation, one scalar formula a function.

The functions are plain Python that uses ``math`` alone. Each engine binds them with its own compiler
(``numba.njit``, ``numba.cuda.jit(device=True)``), so a formula that changes here changes everywhere. A formula may
not call another one, because a bound function cannot call an undecorated one. Exponentials come in as arguments:
each engine brings its own ``exp2``.

Notation, for one row of V classes:

    s, t        student and teacher logits
    T, T_t      temperature of the student (and of the loss), temperature of the teacher
    m           maximum of a row
    d           HEADROOM * (x - m), a scaled logit: never positive, 0 at the maximum, -inf outside the support
    e           exp2(d * rate(T)) = exp((x - m) / T), in [0, 1]
    z           sum of e over the row, in [1, V]
    p, q, h     softmax(t / T_t), softmax(s / T), softmax(s)

References: Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", section 2 (loss, T², limit
of large T); Kullback & Leibler 1951.
"""

import math

__all__ = [
    "ACTIVATIONS",
    "HEADROOM",
    "cross_entropy",
    "divergence_gradient",
    "forward_kl_from_sums",
    "forward_kl_term",
    "gelu",
    "identity",
    "kd_gradient",
    "kd_loss",
    "log_softmax",
    "rate",
    "relu",
    "reverse_kl_slope",
    "reverse_kl_term",
    "scaled_logit",
    "tanh",
]

#: Scaled logits d carry this factor. A power of two costs no accuracy, and it leaves room: no difference of finite
#: float32 logits overflows, whatever their size, nor its product with a ratio of temperatures.
HEADROOM = 2.0**-24


def scaled_logit(x, m, headroom):
    """d = HEADROOM * (x - m); ``headroom`` is HEADROOM in the type of x, ``m`` the maximum of the row."""
    return x * headroom - m * headroom


def rate(temperature):
    """What turns d into an exponent of 2: exp((x - m) / T) = exp2(d * rate)."""
    return math.log2(math.e) / HEADROOM / temperature


def log_softmax(d, z, temperature):
    """log softmax(x / T) of one class."""
    return d / HEADROOM / temperature - math.log(z)


def cross_entropy(d, z):
    """-log h of the label: ``d`` is the label's scaled logit, z the sum at T = 1. +inf where d is -inf."""
    return math.log(z) - d / HEADROOM


def forward_kl_term(e_t, d_t, d_s, ratio):
    """One class of w = sum of e_t (d_t - ratio d_s), ratio = T_t / T, from which KL(p || q) follows.

    0 log 0 = 0: a class outside the teacher's support adds nothing. Inside it, a class that the student rules out
    makes the divergence +inf. Support is read off the logits, not off exponentials that may have underflowed.
    """
    if d_t == -math.inf:
        return e_t  # the exponential of -inf: zero, in the type of the row
    if d_s == -math.inf:
        return -d_s
    return e_t * (d_t - ratio * d_s)


def forward_kl_from_sums(w, z_t, z_s, teacher_temperature):
    """KL(p || q) = sum p (log p - log q), with one logarithm for the whole row."""
    return w / HEADROOM / teacher_temperature / z_t + math.log(z_s / z_t)


def reverse_kl_term(p, q, log_p, log_q):
    """One class of KL(q || p) = sum q (log q - log p)."""
    if log_q == -math.inf:
        return 0.0
    if log_p == -math.inf:
        return math.inf
    return q * (log_q - log_p)


def reverse_kl_slope(p, q, log_p, log_q):
    """d/dq of q (log q - log p), less the constant 1, which cancels in the logit gradient."""
    if log_q == -math.inf or log_p == -math.inf:
        return 0.0  # outside the student's support q is 0; a +inf divergence has no gradient at all
    return log_q - log_p


def divergence_gradient(q, slope, mean_slope):
    """dD/d(s/T) of one class for D = sum phi(p, q): q (phi' - sum of q phi')."""
    return q * (slope - mean_slope)


def kd_gradient(e_h, e_q, e_p, hard, soft_q, soft_p):
    """One class of the logit gradient, before the label's own term: hard h + soft (q - p).

    The factors hold the normalisers: hard = alpha / z_h, soft_q = (1 - alpha) T / z_q and so on.
    """
    return hard * e_h + (soft_q * e_q - soft_p * e_p)


def kd_loss(ce, kl, alpha):
    """alpha CE + (1 - alpha) T² D of one row; kl holds its T². An end point reads one term, so 0 · inf never arises."""
    if alpha == 0.0:
        return kl
    if alpha == 1.0:
        return ce
    return alpha * ce + (1.0 - alpha) * kl


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
