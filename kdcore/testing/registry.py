"""The registry: each falsifier one function with an ID, a sentence, a reference, hand-picked cases and a strategy.

A falsifier looks at one case at a time and yields findings, numbers that were measured beside what is allowed. All that
is allowed follows from :meth:`kdcore.testing.Case.judged`, for relations by the triangle inequality: what two
results may each be off adds up, and what two exact results differ by (because the arguments were rounded, because a
difference quotient is none) is not held against anybody. So whoever computes both numbers within the contract passes,
whatever the case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from kdcore.checks import choice
from kdcore.errors import DomainError
from kdcore.testing.bounds import name_and_parameter
from kdcore.testing.cases import FIXTURES, Case

__all__ = ["FEATURES", "OPTIONAL", "REGISTRY", "Falsifier", "Finding", "as_features", "falsifier", "selected"]

#: Capabilities of an implementation. All of them are claimed unless the caller says otherwise.
FEATURES = {
    "cross_entropy": "alpha above 0, and labels; without it every case has alpha = 0",
    "distillation": "alpha below 1, and the teacher; without it every case has alpha = 1",
    "temperature": "temperatures other than 1; without it every case has T = 1",
    "float64": "float64 logits, with its accuracy; without it every case is in float32",
    "float32": "float32 logits, with its accuracy",
    "neg_inf": "logits of -inf, which rule classes out",
    "large_logits": "logits of up to 1e4",
    "large_vocabulary": "thousands of classes, to 151,936",
    "large_batch": "batches of more than 256 rows, to 1,025",
    "single_class": "V = 1, where there is nothing to learn",
}
#: Capabilities beyond the five arguments, which count only when they are claimed by name.
OPTIONAL = {"ignore_index": "labels of -100 mask their row: loss and gradient are 0, and its logits are not read"}


class Finding(NamedTuple):
    """A number and its limit.

    ``code`` is the Python expression that shows it, of ``loss_and_gradient``, ``s, t, y, T, a`` and ``np``; ``note``
    says in words what was found.
    """

    measured: float
    allowed: float
    code: str
    note: str

    @property
    def excess(self) -> float:
        """How many times the limit the number is; infinite for NaN."""
        if math.isnan(self.measured) or math.isnan(self.allowed):
            return math.inf
        if self.measured <= 0:
            return 0.0
        return self.measured / self.allowed if self.allowed > 0 else math.inf

    @property
    def broken(self) -> bool:
        return not self.measured <= self.allowed


Check = Callable[[Any, Case], Iterator[Finding]]


@dataclass(frozen=True)
class Falsifier:
    """One registered statement and the function that tries to refute it.

    Attributes
    ----------
    id, statement, reference : str
        What it is called, what it says in a sentence, where that is from.
    check : function
        (``Calls`` of the implementation, case) -> findings.
    fixtures : tuple of str
        Names of ``kdcore.testing.FIXTURES``: what is tried first, always.
    search : dict
        Keywords of :func:`kdcore.testing.strategies.cases`: what is drawn beyond.
    needs : frozenset of str
        Without one of these features it is reported as not claimed.
    divergences : tuple of str
        Those that it holds for; empty: all.
    dtype : str
        Of the logits.
    """

    id: str
    statement: str
    reference: str
    check: Check
    fixtures: tuple[str, ...]
    search: dict[str, Any]
    needs: frozenset[str]
    divergences: tuple[str, ...]
    dtype: str

    def cases(self) -> Iterator[Case]:
        """The hand-picked cases."""
        for name in self.fixtures:
            yield from FIXTURES[name]()

    def strategy(self) -> Any:
        """The Hypothesis strategy of its search, of :class:`~kdcore.testing.Case`."""
        from kdcore.testing import strategies

        return strategies.cases(dtype=self.dtype, **self.search)


#: Every falsifier, by its ID, in the order in which a report has them.
REGISTRY: dict[str, Falsifier] = {}


def falsifier(
    id: str,
    statement: str,
    *,
    reference: str,
    fixtures: Iterable[str],
    search: dict[str, Any] | None = None,
    needs: Iterable[str] = (),
    divergences: Iterable[str] = (),
    dtype: str = "float64",
) -> Callable[[Check], Check]:
    """Register the decorated check. The same ID twice is an error."""

    def register(check: Check) -> Check:
        if id in REGISTRY:
            raise DomainError(f"a falsifier of the ID {id!r} is registered already")
        wanted = frozenset(needs)
        unknown = wanted - FEATURES.keys() - OPTIONAL.keys()
        if unknown:
            raise DomainError(f"needs must be features, got {', '.join(sorted(unknown))}")
        REGISTRY[id] = Falsifier(
            id, statement, reference, check, tuple(fixtures), dict(search or {}), wanted, tuple(divergences), dtype
        )
        return check

    return register


def selected(divergence: Any, features: Iterable[str] | None = None) -> tuple[list[Falsifier], list[Falsifier]]:
    """The falsifiers of a divergence: those to be tried, and those of features that are not claimed.

    Raises :class:`~kdcore.errors.DomainError` for an unknown divergence or feature.
    """
    import kdcore.testing.falsifiers  # noqa: F401  fills the registry

    name, _ = name_and_parameter(divergence)
    claimed = as_features(features)
    tried: list[Falsifier] = []
    left: list[Falsifier] = []
    for entry in REGISTRY.values():
        if not entry.divergences or name in entry.divergences:
            (tried if entry.needs <= claimed else left).append(entry)
    return tried, left


def as_features(features: Iterable[str] | None) -> frozenset[str]:
    """Names of features; None: all but the optional ones."""
    if features is None:
        return frozenset(FEATURES)
    if isinstance(features, str):
        features = (features,)
    known = (*FEATURES, *OPTIONAL)
    claimed = frozenset(choice(name, "features", known) for name in features)
    if not claimed & {"float64", "float32"}:
        raise DomainError(f"features must have float64 or float32, or nothing can be tried, got {sorted(claimed)}")
    if not claimed & {"cross_entropy", "distillation"}:
        raise DomainError(f"features must have cross_entropy or distillation, got {sorted(claimed)}")
    return claimed
