"""The falsifiers against an implementation: :func:`falsify`, and :func:`try_one` for a single one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from kdcore.checks import integer
from kdcore.errors import DTypeError, MissingDependencyError
from kdcore.testing.calls import BrokenCallError, Calls, LossAndGradient, adapted
from kdcore.testing.cases import Case
from kdcore.testing.registry import Falsifier, Finding, as_features, selected
from kdcore.testing.report import FalsificationReport, Result
from kdcore.testing.shrinking import shrunk

__all__ = ["falsify", "try_one", "worst_finding"]

#: A counterexample whose number is this many times the limit is as good as one with any larger number.
_PLAIN = 1e4
#: Elements of logits that shrinking a counterexample may go through.
_SHRINK_ELEMENTS = 3_000_000


def falsify(
    loss_and_gradient: LossAndGradient,
    *,
    divergence: Any = "forward_kl",
    features: Iterable[str] | None = None,
    max_examples: int = 20,
    seed: int = 0,
) -> FalsificationReport:
    """Try to refute an implementation of the KD loss and its gradient.

    Each registered falsifier is a statement that a correct implementation satisfies. It is tried on hand-picked cases,
    always the same, in which known bugs show, and then on cases that Hypothesis draws; what fails is shrunk. The limits
    are those of :mod:`kdcore.testing.bounds`, so that other roundings pass; a loss below zero by rounding passes too.

    Parameters
    ----------
    loss_and_gradient : callable
        ``(student_logits [B, V], teacher_logits [B, V], labels [B], temperature, alpha)`` to ``(loss [B], gradient
        [B, V])`` on NumPy arrays, float64 or (where that is the point) float32, with loss =
        alpha · CE(softmax(s), y) + (1 - alpha) · T² · D(softmax(t/T), softmax(s/T)) of each row, and its gradient by
        the student's logits. **alpha is the weight of the hard cross-entropy**; for other conventions, scalar losses,
        and those of torch, JAX and Keras see :mod:`kdcore.testing.adapters`.
    divergence : str or Divergence
        D: a name, or one of :mod:`kdcore.divergences` with its parameter. The set of falsifiers adapts.
    features : iterable of str, optional
        What the implementation claims, of :data:`kdcore.testing.FEATURES`; by default everything there, logits of -inf
        included. ``"ignore_index"`` must be claimed by name. Falsifiers that need what is not claimed are listed as
        ``not_claimed``, and are neither passed nor failed.
    max_examples : int
        Cases that Hypothesis draws for each falsifier beyond the hand-picked ones. 0 needs no Hypothesis.
    seed : int
        Of what is drawn.

    Returns
    -------
    FalsificationReport
        ``results``, ``failed`` and ``not_claimed``, lists of :class:`~kdcore.testing.report.Result`.

    Raises
    ------
    DomainError, DTypeError
        An unknown divergence or feature, a seed or a number that is none. Whatever the implementation does is a
        finding, not an error: raising, NaN, other shapes or dtypes, spoiling its arguments.
    MissingDependencyError
        Hypothesis is not installed, and ``max_examples`` is not 0: ``pip install kdcore[testing]``.

    Examples
    --------
    A loss that forgets T²:

    >>> import numpy as np
    >>> from kdcore.testing import falsify
    >>> def log_softmax(x):
    ...     x = x - x.max(axis=-1, keepdims=True)
    ...     return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    >>> def mine(s, t, y, T, alpha):
    ...     rows, h = np.arange(len(y)), np.exp(log_softmax(s))
    ...     ce, hard = -log_softmax(s)[rows, y], h - np.eye(s.shape[1])[y]
    ...     p, log_p, log_q = np.exp(log_softmax(t / T)), log_softmax(t / T), log_softmax(s / T)
    ...     kl = (p * (log_p - log_q)).sum(axis=-1)
    ...     return alpha * ce + (1 - alpha) * kl, alpha * hard + (1 - alpha) * (np.exp(log_q) - p) / T
    >>> report = falsify(mine, features=["cross_entropy", "distillation", "temperature", "float64"], max_examples=0)
    >>> broken = [result.id for result in report.failed]
    >>> "F-KD-FORWARD-KL-006" in broken, "F-KD-GRADIENT-T" in broken, "F-KD-DERIVATIVE" in broken
    (True, True, False)
    """
    if not callable(loss_and_gradient):
        raise DTypeError(f"loss_and_gradient must be callable, got {type(loss_and_gradient).__name__}")
    max_examples = integer(max_examples, "max_examples", least=0)
    seed = integer(seed, "seed", least=0)
    tried, left = selected(divergence, features)
    claimed = as_features(features)
    start = time.perf_counter()
    results = [
        try_one(entry, loss_and_gradient, divergence=divergence, features=claimed, max_examples=max_examples, seed=seed)
        for entry in tried
    ]
    return FalsificationReport(
        name=_name(loss_and_gradient),
        divergence=divergence if isinstance(divergence, str) else repr(divergence),
        results=results,
        not_claimed=[not_claimed(entry) for entry in left],
        features=sorted(claimed),
        max_examples=max_examples,
        seed=seed,
        seconds=time.perf_counter() - start,
    )


def _name(function: Any) -> str:
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module and module != "__main__" else name


def not_claimed(entry: Falsifier) -> Result:
    """The result of a falsifier that was not tried."""
    return Result(entry.id, entry.statement, entry.reference, None)


def try_one(
    entry: Falsifier,
    loss_and_gradient: LossAndGradient,
    *,
    divergence: Any = "forward_kl",
    features: Iterable[str] | None = None,
    max_examples: int = 20,
    seed: int = 0,
) -> Result:
    """One falsifier of the registry against an implementation; arguments as of :func:`falsify`."""
    claimed = as_features(features)
    if not entry.needs <= claimed:
        return not_claimed(entry)
    calls = Calls(loss_and_gradient, divergence)
    nearest, worst, number = Finding(0.0, 0.0, "", ""), None, 0
    for case in _cases(entry, claimed, max_examples, seed):
        number += 1
        finding = worst_finding(entry, calls, case)
        if finding is None:
            continue
        if not finding.broken:
            nearest = max(nearest, finding, key=lambda found: found.excess)
        elif worst is None or min(finding.excess, _PLAIN) > min(worst[1].excess, _PLAIN):
            worst = case, finding
        if worst is not None and worst[1].excess >= _PLAIN:
            break
    named = entry.id, entry.statement, entry.reference
    if worst is None:
        return Result(*named, True, measured=nearest.measured, allowed=nearest.allowed, cases=number)
    case, finding = _smallest(entry, calls, claimed, *worst)
    snippet = f"import numpy as np; {case.code}\n{finding.code}"
    found = finding.note[:1].upper() + finding.note[1:]
    example = f"{found}.\nMeasured {finding.measured:.6g}, allowed {finding.allowed:.3g}.\n{snippet}"
    return Result(*named, False, example, finding.measured, finding.allowed, number, snippet, case)


def _cases(entry: Falsifier, claimed: frozenset[str], max_examples: int, seed: int) -> Iterator[Case]:
    """The hand-picked ones, then those that are drawn: where one of the first fails, none of the latter is needed."""
    for case in entry.cases():
        within = adapted(case, claimed)
        if within is not None:
            yield within
    if max_examples and entry.search:
        for case in _drawn(entry, max_examples, seed):
            within = adapted(case, claimed)
            if within is not None:
                yield within


def _drawn(entry: Falsifier, max_examples: int, seed: int) -> list[Case]:
    try:
        import hypothesis
    except ImportError as error:
        raise MissingDependencyError(
            "the search of kdcore.testing.falsify needs Hypothesis: pip install kdcore[testing], or max_examples=0"
        ) from error
    found: list[Case] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(entry.strategy())
    def draw(case: Case) -> None:
        found.append(case)

    draw()
    return found


def worst_finding(entry: Falsifier, calls: Calls, case: Case) -> Finding | None:
    """What a falsifier finds of one case: the number that is furthest beyond its limit; None where it says nothing."""
    worst: Finding | None = None
    try:
        with np.errstate(all="ignore"):
            for finding in entry.check(calls, case):
                if worst is None or (finding.broken, finding.excess) > (worst.broken, worst.excess):
                    worst = finding
    except BrokenCallError as broken:
        worst = Finding(np.inf, 0.0, "loss_and_gradient(s, t, y, T, a)", str(broken))
    return worst


def _smallest(
    entry: Falsifier, calls: Calls, claimed: frozenset[str], case: Case, finding: Finding
) -> tuple[Case, Finding]:
    """The counterexample shrunk, to one that is as plain and of the same kind."""
    wanted, kind, best = min(finding.excess, _PLAIN), _kind(finding), finding
    support = _support(case)

    def fails(smaller: Case) -> bool:
        nonlocal best
        if _support(smaller) != support or adapted(smaller, claimed) is not smaller:
            return False
        found = worst_finding(entry, calls, smaller)
        if found is None or not found.broken or found.excess < wanted or _kind(found) != kind:
            return False
        best = found
        return True

    budget = max(20, min(300, _SHRINK_ELEMENTS // case.student.size))
    return shrunk(case, fails, budget), best


def _support(case: Case) -> tuple[bool, ...]:
    """Who rules classes out, and which terms count: what a smaller one must share, or it would show something else."""
    s, t = case.student == -np.inf, case.teacher == -np.inf
    labels = np.clip(case.labels, 0, case.shape[1] - 1)
    hit = np.take_along_axis(s, labels[:, None], 1).any()
    logits = np.concatenate([case.student, case.teacher])
    no_row = not np.isfinite(logits).any(axis=-1).all()
    no_number = bool((np.isnan(logits) | (logits == np.inf)).any())
    ruled_out = bool((s & t).any()), bool((s & ~t).any()), bool((t & ~s).any()), bool(hit)
    terms = (case.alpha > 0, case.alpha < 1) if any(ruled_out) else ()
    return *ruled_out, no_row, no_number, *terms


def _kind(finding: Finding) -> tuple[bool, str]:
    """What a smaller counterexample must share: that a number is NaN, or that the call failed in the same way."""
    failed = finding.measured == np.inf and finding.allowed == 0
    return bool(np.isnan(finding.measured)), finding.note.split(":")[0] if failed else ""
