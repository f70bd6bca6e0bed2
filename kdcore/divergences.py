"""The divergences D(p, q) between a teacher's distribution p and a student's q, for ``divergence=``.

Each is a sum over classes of phi(p, q), and its gradient by the student's logits follows from the slope phi' = dphi/dq:
dD/d(s/T) = q (phi' - sum of q phi'). So a divergence is two formulas of one class (``kdcore.formulas``), which every
engine compiles, and all are computed by one kernel; only forward KL, the default, has one of its own that is faster.

A divergence is named, ``divergence="jsd"``, or made with its parameter, ``divergence=kdcore.divergences.jsd(0.3)``.
What p and q do at 0 (logits of -inf) is said with each; a class that both rule out never adds anything.

One of your own
---------------
Write phi and q phi' for one class, r being log q - log p: with ``where``, ``log`` and ``exp`` of this module and
without branches, since one call computes several classes at once. Of logits in float32 or 16 bits p, q and r are
float32, and so are a formula's constants; a row whose sums are not finite then is worked again in float64. Here
Pearson's chi-squared divergence of p from a mean m of p and q, the sum of (p - m)² / m, with c as the share of p in m:

>>> import numpy as np, kdcore
>>> from kdcore.divergences import Divergence, where
>>> def term(p, q, r, c):
...     m = c * p + (1.0 - c) * q
...     return (p - m) * (p - m) / where(m > 0.0, m, 1.0)
>>> def slope(p, q, r, c):
...     m = c * p + (1.0 - c) * q
...     n = where(m > 0.0, m, 1.0)
...     return (1.0 - c) * q * ((m * m - p * p) / n) / n
>>> pearson = Divergence("pearson", term, slope, parameter=0.5)
>>> student, teacher = np.log([[0.5, 0.5]]), np.log([[0.25, 0.75]])
>>> print(round(float(kdcore.kl_divergence(student, teacher, divergence=pearson)), 6))
0.066667
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import FunctionType
from typing import Any

from kdcore import formulas
from kdcore.checks import choice, number_in, real_number
from kdcore.errors import DomainError, DTypeError
from kdcore.formulas import exp, log, where

__all__ = [
    "NAMES",
    "Divergence",
    "alpha",
    "as_divergence",
    "exp",
    "forward_kl",
    "jsd",
    "log",
    "reverse_kl",
    "skew_forward_kl",
    "skew_reverse_kl",
    "tvd",
    "where",
]


#: Of a smaller share p's part of a mixture would be 0 in float32 where p itself is not, and log(p / mixture) is large.
_LEAST_SHARE = 1e-20


@dataclass(frozen=True)
class Divergence:
    """D = sum of term(p, q, r, parameter) over the classes, r = log q - log p.

    Parameters
    ----------
    name : str
        What errors call it.
    term : function
        phi of one class, from (p, q, r, c). None stands for forward KL's own kernel.
    slope : function
        q dphi/dq of one class, from the same. A function of p and of the row alone that is added to phi', the same for
        all classes, changes no gradient.
    parameter : float
        c. Divergences that differ in it alone share a compiled kernel.
    """

    name: str
    term: Callable[..., Any] | None
    slope: Callable[..., Any] | None
    parameter: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise DTypeError(f"name must be a string, got {self.name!r}")
        fused = (self.name, self.term, self.slope) == ("forward_kl", None, None)
        for part, formula in (("term", self.term), ("slope", self.slope)):
            if not (fused or isinstance(formula, FunctionType)):
                raise DTypeError(f"{part} must be a Python function of (p, q, r, c), not compiled, got {formula!r}")
        parameter = real_number(self.parameter, "parameter", "a finite number")
        if not math.isfinite(parameter):
            raise DomainError(f"parameter must be a finite number, got {self.parameter!r}")
        object.__setattr__(self, "parameter", parameter)

    @property
    def builtin(self) -> bool:
        """Whether the formulas are kdcore's own under this name, so that the name tells kernels on disk apart."""
        known = _default(self.name) if self.name in _BY_NAME else None
        return known is not None and (self.term, self.slope) == (known.term, known.slope)

    def __repr__(self) -> str:
        return f"Divergence({self.name!r}, parameter={self.parameter})"


def forward_kl() -> Divergence:
    """KL(p || q) = sum of p (log p - log q) (Kullback & Leibler 1951; Hinton, Vinyals & Dean 2015): covers all of p.

    A class with p > 0 = q makes it +inf, with a finite gradient T (q - p).
    """
    return Divergence("forward_kl", None, None)


def reverse_kl() -> Divergence:
    """KL(q || p) = sum of q (log q - log p) (MiniLLM: Gu et al. 2024, arXiv:2306.08543): seeks a mode of p.

    A class with q > 0 = p makes it +inf, which leaves no gradient: the row's is NaN.
    """
    return Divergence("reverse_kl", formulas.reverse_kl_term, formulas.reverse_kl_slope)


def jsd(beta: float = 0.5) -> Divergence:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q, 0 < beta < 1 (Lin 1991; arXiv:2306.13649).

    At most log 2, and symmetric, at 1/2. Always finite. Towards beta = 0 and 1 it goes to 0: the KLs, which other
    libraries put there, are named ``forward_kl`` and ``reverse_kl``.
    """
    beta = number_in(beta, "beta", 0, 1, low_open=True, high_open=True)
    return Divergence("jsd", formulas.jsd_term, formulas.jsd_slope, beta)


def skew_forward_kl(lam: float = 0.1) -> Divergence:
    """KL(p || lam p + (1 - lam) q), 1e-20 <= lam < 1 (Lee 2001; DistiLLM: Ko et al. 2024, arXiv:2402.03898).

    Always finite, at most -log lam. Forward KL at lam = 0.
    """
    lam = number_in(lam, "lam", _LEAST_SHARE, 1, high_open=True)
    return Divergence("skew_forward_kl", formulas.skew_forward_kl_term, formulas.skew_forward_kl_slope, lam)


def skew_reverse_kl(lam: float = 0.1) -> Divergence:
    """KL(q || lam q + (1 - lam) p), 1e-20 <= lam < 1 (DistiLLM: Ko et al. 2024, arXiv:2402.03898).

    Always finite, at most -log lam. Reverse KL at lam = 0.
    """
    lam = number_in(lam, "lam", _LEAST_SHARE, 1, high_open=True)
    return Divergence("skew_reverse_kl", formulas.skew_reverse_kl_term, formulas.skew_reverse_kl_slope, lam)


def tvd() -> Divergence:
    """Total variation: half the sum of ``|p - q|`` (f-distill: Wen et al. 2023, arXiv:2307.15190).

    Between 0 and 1, and always finite. Its gradient is a subgradient where p = q, there 0 of the class.
    """
    return Divergence("tvd", formulas.tvd_term, formulas.tvd_slope)


def alpha(a: float = 0.5) -> Divergence:
    """Amari's (sum of p^a q^(1 - a) - 1) / (a (a - 1)), 0 < a < 1 (Amari 1985; Cichocki & Amari 2010).

    Always finite, at most 1 / (a (1 - a)), which is reached where no class has both p and q. It goes to forward KL as
    a goes to 1, to reverse KL as a goes to 0, and is four times 1 - sum of sqrt(p q) at 1/2.
    """
    a = number_in(a, "a", 0, 1, low_open=True, high_open=True)
    return Divergence("alpha", formulas.alpha_term, formulas.alpha_slope, a)


_BY_NAME = {make.__name__: make for make in (forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl, tvd, alpha)}

#: The names that ``divergence=`` takes.
NAMES = tuple(_BY_NAME)


def as_divergence(value: Any) -> Divergence:
    """A divergence from its name, with its default parameter; a divergence as it is."""
    if isinstance(value, Divergence):
        return value
    if callable(value):
        name = getattr(value, "__name__", "...")
        raise DTypeError(f"divergence must be a name or a Divergence, got a function: call it, {name}()")
    return _default(choice(value, "divergence", NAMES))


@cache
def _default(name: str) -> Divergence:
    return _BY_NAME[name]()
