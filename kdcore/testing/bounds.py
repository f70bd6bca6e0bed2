"""The numeric contract as code: how far a loss or a gradient may be from the exact one.

A gradient q - p cancels, so its error is measured against what was subtracted, not against what is left. Per row,
with w = weight / denominator, k = T² (1 where the loss is not scaled by T²) and 2-norms over the classes::

    S           |p| + |q|                                               for forward KL
                |p| + |q| + |q phi'| + |q| |sum of q phi'|              for any other divergence sum of phi(p, q)
    gradient    |error| <= G w (alpha (|h| + 1) + (1 - alpha) k / T S)
    loss        |error| <= R |L| + G w (alpha + (1 - alpha) k)

    float32     G = 5e-7    R = 1e-6
    float64     G = 1e-13   R = 1e-12

The gradient of a divergence other than forward KL is q (phi' - sum of q phi'), so the subtracted terms are q phi' and
q sum of q phi': a result that is rounded to float32 cannot be nearer to the truth than its own rounding, which
is of the size of T q phi'. A constant that is added to phi' changes no gradient, but it would change S: phi' is the one
that is 0 where p = q, because no other keeps S as small where student and teacher agree::

    reverse_kl       log(q / p)                             (forward KL: 1 - p / q, less its 1: q phi' = -p is in S)
    jsd              (1 - beta) log(q / m)                  m = beta p + (1 - beta) q
    skew_forward_kl  (1 - lam) (1 - p / m)                  m = lam p + (1 - lam) q
    skew_reverse_kl  log(q / m) + lam (1 - q / m)           m = lam q + (1 - lam) p
    tvd              sign(q - p) / 2
    alpha            (1 - (p / q)^a) / a

The slope of total variation jumps by 1 where p = q. Classes in which p and q agree up to their rounding may come out on
either side: for tvd, with n as q in those classes and 0 elsewhere, :func:`kd_bounds` adds ``|n| + |q| sum of n`` to
G S.

Of a teacher that does not have every class (:class:`kdcore.TopKRows`), S is ``M |q| + |a|``, with M the sum of p over
the outcomes of the policy for its tail, and a what M q is compared with: p of a stored class, and in the tail
p_tail q / q_tail for "bucket", p_tail / n for "uniform", 0 for the others. See :func:`sparse_kd_bounds`.

float16 and bfloat16 logits have float32's bounds. A gradient that is written in a type with fewer digits than it was
computed in may in addition be off by half an ulp of that type, element by element: :func:`gradient_error` takes this
off before it forms the norm.

Nothing here comes from the kernels: the bounds can judge any implementation.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from kdcore.errors import DomainError

__all__ = [
    "GRADIENT",
    "RELATIVE_LOSS",
    "KDBounds",
    "gradient_bound",
    "gradient_error",
    "half_ulp",
    "kd_bounds",
    "loss_bound",
    "name_and_parameter",
    "sparse_kd_bounds",
    "subtracted",
    "within",
    "working_dtype",
]

#: Factor G of the contract, by the name of the working type.
GRADIENT = {"float32": 5e-7, "float64": 1e-13}
#: Factor R of the contract.
RELATIVE_LOSS = {"float32": 1e-6, "float64": 1e-12}

#: Significant binary digits, and the exponent of the smallest positive number, of the types that gradients come in.
_DIGITS = {"float64": (53, -1074), "float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}


class KDBounds(NamedTuple):
    """What is allowed: ``loss`` [B] for each row's loss, ``gradient`` [B] for the 2-norm of its gradient's error."""

    loss: Any
    gradient: Any


def working_dtype(dtype: Any) -> str:
    """ "float64" for a float64 student, "float32" for every other supported dtype: what its vectors are computed in."""
    name = np.dtype(dtype).name
    if name not in _DIGITS:
        raise TypeError(f"dtype must be one of {', '.join(_DIGITS)}, got {name}")
    return "float64" if name == "float64" else "float32"


def subtracted(p: Any, q: Any, q_slope: Any = None) -> Any:
    """S: the 2-norms of what is subtracted in a divergence's gradient; rows are the last dimension.

    ``q_slope`` is q phi' class by class, for every divergence but forward KL, where phi' is 0 at p = q.
    """
    q_norm = _norm(q)
    size = _norm(p) + q_norm
    if q_slope is not None:
        size = size + _norm(q_slope) + q_norm * np.abs(_wide(q_slope).sum(axis=-1))
    return size


def gradient_bound(
    dtype: Any,
    p: Any,
    q: Any,
    h: Any,
    *,
    temperature: float,
    alpha: float,
    q_slope: Any = None,
    scale_t2: bool = True,
    scale: Any = 1.0,
) -> Any:
    """The allowed 2-norm of a row's gradient error.

    Parameters
    ----------
    dtype
        Of the student's logits.
    p, q, h : array [..., V]
        softmax(t / T), softmax(s / T) and softmax(s). What alpha rules out is not read.
    q_slope : array [..., V], optional
        q phi', for every divergence but forward KL, where phi' is 0 at p = q.
    scale : array [...] or float
        w: the row's weight over the batch's denominator.
    """
    hard = alpha * (_norm(h) + 1) if alpha > 0 else 0.0
    soft = 0.0
    if alpha < 1:
        soft = (1 - alpha) * (temperature if scale_t2 else 1 / temperature) * subtracted(p, q, q_slope)
    scale = _wide(scale)
    # A masked row is exact, also where it has no gradient.
    return np.where(scale == 0, 0.0, GRADIENT[working_dtype(dtype)] * scale * (hard + soft))


def loss_bound(
    dtype: Any, loss: Any, *, temperature: float, alpha: float, scale_t2: bool = True, scale: Any = 1.0
) -> Any:
    """The allowed error of a row's loss; ``loss`` is the exact one, scaled. An infinite loss must be met exactly."""
    name = working_dtype(dtype)
    loss = _wide(loss)
    size = np.where(np.isfinite(loss), np.abs(loss), 0.0)
    absolute = alpha + (1 - alpha) * (temperature**2 if scale_t2 else 1.0)
    return RELATIVE_LOSS[name] * size + GRADIENT[name] * _wide(scale) * absolute


def kd_bounds(
    student_logits: Any,
    teacher_logits: Any,
    loss: Any,
    *,
    temperature: float,
    alpha: float,
    divergence: Any = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    scale: Any = 1.0,
) -> KDBounds:
    """Both bounds from logits [..., V], which must be usable rows, and the exact row losses [...].

    ``alpha`` is the weight of the cross-entropy, ``divergence`` a name or one of :mod:`kdcore.divergences` with its
    parameter; for one of a caller's own see :func:`gradient_bound`, which takes its q phi'. ``scale`` [...] is each
    row's weight over the denominator; a row of scale 0 gets the bound 0. A row whose divergence is +inf and leaves no
    gradient gets the gradient bound NaN.
    """
    name, parameter = name_and_parameter(divergence)
    h = p = q = q_slope = None
    jump: Any = 0.0
    if alpha > 0:
        h = np.exp(_log_softmax(student_logits, 1.0))
    dtype = np.asarray(student_logits).dtype
    if alpha < 1:
        log_q = _log_softmax(student_logits, temperature)
        log_p = _log_softmax(teacher_logits, temperature if teacher_temperature is None else teacher_temperature)
        p, q = np.exp(log_p), np.exp(log_q)
        if name != "forward_kl":
            q_slope = _q_slope(name, log_p, log_q, parameter)
        if name == "tvd":
            factor = GRADIENT[working_dtype(dtype)]
            with np.errstate(invalid="ignore"):  # -inf less -inf: no tie, since q is 0
                near = np.abs(log_q - log_p) <= factor * (1 + np.abs(log_q) + np.abs(log_p))
            of_near = np.where(near, q, 0.0)
            size = (1 - alpha) * (temperature if scale_t2 else 1 / temperature)
            jump = _wide(scale) * size * (_norm(of_near) + _norm(q) * of_near.sum(axis=-1))
    kinds = {"temperature": temperature, "alpha": alpha, "scale_t2": scale_t2, "scale": scale}
    return KDBounds(loss_bound(dtype, loss, **kinds), gradient_bound(dtype, p, q, h, q_slope=q_slope, **kinds) + jump)


def sparse_kd_bounds(
    student_logits: Any,
    rows: Any,
    loss: Any,
    *,
    temperature: float,
    alpha: float,
    tail: str = "bucket",
    scale_t2: bool = True,
    scale: Any = 1.0,
) -> KDBounds:
    """As :func:`kd_bounds`, of student logits [B, V] and B ``rows``, :class:`kdcore.TopKRows` or SampledRows."""
    student = np.asarray(student_logits)
    h = np.exp(_log_softmax(student, 1.0))
    kinds = {"temperature": temperature, "alpha": alpha, "scale_t2": scale_t2, "scale": scale}
    of_loss = loss_bound(student.dtype, loss, **kinds)
    if alpha == 1:
        return KDBounds(of_loss, gradient_bound(student.dtype, None, None, h, **kinds))
    q = np.exp(_log_softmax(student, temperature))
    compared, mass = _compared(rows, q, tail)
    return KDBounds(of_loss, gradient_bound(student.dtype, compared, mass[:, None] * q, h, **kinds))


def _compared(rows: Any, q: Any, tail: str) -> tuple[Any, Any]:
    """a [B, V] and M [B]."""
    sampled = not hasattr(rows, "log_probs")
    log_p = _wide(rows.log_weights if sampled else rows.log_probs)
    compared, mass = np.zeros(q.shape), np.zeros(len(q))
    for i, row in enumerate(compared):
        stored = np.asarray(rows.indices)[i, : int(rows.n_valid[i])]
        p = np.exp(log_p[i, : stored.size])
        rest = np.ones(row.size, bool)
        rest[stored] = False
        of_tail = 0.0
        if tail == "renormalize" and not sampled:
            p = np.exp(log_p[i, : stored.size] - np.logaddexp.reduce(log_p[i, : stored.size]))
        elif tail != "zero" and not sampled:
            of_tail = float(np.exp(_wide(rows.tail_logmass[i])))
        row[stored] = p
        if of_tail > 0:
            of_q = q[i, rest].sum()
            by_share = tail == "bucket" and of_q > 0
            row[rest] = of_tail * q[i, rest] / of_q if by_share else of_tail / rest.sum()
        mass[i] = p.sum() + of_tail
    return compared, mass


#: The parameter that a divergence has by its name alone; None: it has none.
_DEFAULTS = {
    "forward_kl": None,
    "reverse_kl": None,
    "jsd": 0.5,
    "skew_forward_kl": 0.1,
    "skew_reverse_kl": 0.1,
    "tvd": None,
    "alpha": 0.5,
}


def name_and_parameter(divergence: Any) -> tuple[str, Any]:
    """The name and the parameter (None where it has none) of a divergence that :mod:`kdcore.divergences` defines."""
    name = divergence if isinstance(divergence, str) else getattr(divergence, "name", None)
    if name not in _DEFAULTS or not getattr(divergence, "builtin", True):
        raise DomainError(
            f"divergence must be one of {', '.join(map(repr, _DEFAULTS))}, by name or with its parameter, got "
            f"{divergence!r}; for one of your own, give its q_slope to gradient_bound, and use loss_bound"
        )
    return name, _DEFAULTS[name] if isinstance(divergence, str) else divergence.parameter


def _q_slope(name: str, log_p: Any, log_q: Any, c: Any) -> Any:
    """q phi' class by class, phi' = 0 where p = q, from logarithms, which do not underflow; NaN: there is none."""
    allowed = log_q > -np.inf
    undefined: Any = name == "reverse_kl" and (allowed & (log_p == -np.inf)).any(axis=-1, keepdims=True)
    log_q = np.where(allowed, log_q, 0.0)  # without a student's class there is no slope: 0 below
    log_p = np.where(undefined, 0.0, log_p)
    q = np.where(allowed, np.exp(log_q), 0.0)
    with np.errstate(invalid="ignore"):  # 0 * inf of a class that is not allowed, which is 0 below
        if name == "reverse_kl":
            q_slope = q * (log_q - log_p)
        elif name == "jsd":
            q_slope = (1 - c) * q * (log_q - _log_mixture(c, log_p, log_q))
        elif name == "skew_forward_kl":
            q_slope = (1 - c) * q * -np.expm1(log_p - _log_mixture(c, log_p, log_q))
        elif name == "skew_reverse_kl":
            log_ratio = log_q - _log_mixture(c, log_q, log_p)
            q_slope = q * (log_ratio - c * np.expm1(log_ratio))
        elif name == "tvd":
            q_slope = q * np.sign(log_q - log_p) / 2
        else:
            q_slope = (q - np.exp(c * log_p + (1 - c) * log_q)) / c
    return np.where(undefined, np.nan, np.where(allowed, q_slope, 0.0))


def _log_mixture(share: Any, log_a: Any, log_b: Any) -> Any:
    return np.logaddexp(np.log(share) + log_a, np.log1p(-share) + log_b)


def half_ulp(values: Any, dtype: Any) -> Any:
    """Half the distance of neighbouring numbers of ``dtype`` at each of ``values``."""
    digits, smallest = _DIGITS[np.dtype(dtype).name]
    _, exponent = np.frexp(_wide(values))  # |value| in [2^(exponent - 1), 2^exponent)
    return np.ldexp(0.5, np.maximum(exponent - digits, smallest))


def gradient_error(gradient: Any, expected: Any, student_dtype: Any) -> Any:
    """The 2-norm of a row's error, less the rounding to a type narrower than the working one; NaN where either is."""
    gradient = np.asarray(gradient)
    wide, expected = _wide(gradient), _wide(expected)
    error = np.abs(wide - expected)
    if _DIGITS[gradient.dtype.name][0] < _DIGITS[working_dtype(student_dtype)][0]:
        rounding = half_ulp(np.maximum(np.abs(wide), np.abs(expected)), gradient.dtype)
        error = np.where(error <= rounding, 0.0, error - rounding)  # a NaN stays
    return _norm(error)


def within(actual: Any, expected: Any, bound: Any) -> Any:
    """Whether each number is as near as allowed. An infinity must be met exactly, and NaN is never near anything."""
    actual, expected = _wide(actual), _wide(expected)
    with np.errstate(invalid="ignore"):
        near = np.isfinite(actual) & np.isfinite(expected) & (np.abs(actual - expected) <= bound)
    return (actual == expected) | near


def _wide(values: Any) -> Any:
    """As float64 or wider; bfloat16 has no direct way to longdouble, so everything narrower goes to float64."""
    values = np.asarray(values)
    return values if values.dtype == np.longdouble else values.astype(np.float64)


def _norm(values: Any) -> Any:
    return np.sqrt(np.square(_wide(values)).sum(axis=-1))


def _log_softmax(logits: Any, temperature: float) -> Any:
    # Divided before it is shifted: the difference of finite float64 logits may overflow, that of float32 logits cannot.
    scaled = np.asarray(logits).astype(np.float64) / temperature
    scaled = scaled - scaled.max(axis=-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=-1, keepdims=True))
