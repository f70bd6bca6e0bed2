"""What a run of the falsifiers found, as text, HTML and JSON."""

from __future__ import annotations

import html
import json
import math
from dataclasses import dataclass
from typing import Any

from kdcore._version import __version__
from kdcore.testing.cases import Case

__all__ = ["FalsificationReport", "Result"]

_RED, _GREEN, _DIM, _BOLD, _PLAIN = "\033[31m", "\033[32m", "\033[2m", "\033[1m", "\033[0m"


@dataclass(frozen=True)
class Result:
    """What one falsifier found.

    Attributes
    ----------
    id, statement, reference : str
        As registered.
    passed : bool or None
        None: not claimed, and so not tried.
    counterexample : str or None
        Where it failed: what was found in a sentence, measured and allowed, and two lines of Python that show it, given
        the implementation as ``loss_and_gradient``.
    measured, allowed : float or None
        Of the counterexample, or of the case that came nearest to one. An implementation that raised, or returned
        something else than a loss and a gradient, has measured = inf.
    cases : int
        How many were tried.
    snippet : str or None
        The two lines alone.
    case : Case or None
        The arguments of the counterexample.
    """

    id: str
    statement: str
    reference: str
    passed: bool | None
    counterexample: str | None = None
    measured: float | None = None
    allowed: float | None = None
    cases: int = 0
    snippet: str | None = None
    case: Case | None = None

    def __str__(self) -> str:
        if self.passed is None:
            return f"{self.id} is not claimed: {self.statement}"
        if self.passed:
            return f"{self.id} passed {self.cases} cases: {self.statement}"
        return f"{self.id} is falsified: {self.statement}\n{self.counterexample}"

    def as_dict(self) -> dict[str, Any]:
        """The result in JSON's types; infinities and NaN as strings."""
        names = ("id", "statement", "reference", "passed", "counterexample", "snippet", "cases")
        numbers = {name: _json_number(getattr(self, name)) for name in ("measured", "allowed")}
        return {name: getattr(self, name) for name in names} | numbers


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


@dataclass(frozen=True)
class FalsificationReport:
    """What :func:`kdcore.testing.falsify` found; prints itself in a terminal and in a notebook.

    Attributes
    ----------
    name : str
        Of the implementation.
    divergence : str
        Which it was held to.
    results : list of Result
        Of the falsifiers that were tried, in the registry's order.
    not_claimed : list of Result
        Of those that were not, because they need a feature that was not claimed.
    features : list of str
        What was claimed.
    """

    name: str
    divergence: str
    results: list[Result]
    not_claimed: list[Result]
    features: list[str]
    max_examples: int
    seed: int
    seconds: float

    @property
    def failed(self) -> list[Result]:
        """The results that did not pass: empty for an implementation that no falsifier refuted."""
        return [result for result in self.results if not result.passed]

    @property
    def passed(self) -> bool:
        """Whether no falsifier refuted it."""
        return not self.failed

    def summary(self) -> str:
        """One line."""
        number, failed = len(self.results), len(self.failed)
        verdict = f"falsified by {failed} of {number}" if failed else f"not falsified by any of {number}"
        left = f", {len(self.not_claimed)} not claimed" if self.not_claimed else ""
        cases = sum(result.cases for result in self.results)
        return f"{self.name} ({self.divergence}): {verdict} falsifiers{left}; {cases:,} cases, {self.seconds:.1f} s"

    def text(self, *, color: bool = False, passed: bool = True) -> str:
        """The report for a terminal; without ``passed`` only what failed is listed."""

        def painted(paint: str, words: str) -> str:
            return f"{paint}{words}{_PLAIN}" if color else words

        lines = [painted(_BOLD, self.summary())]
        for result, example in self._told():
            lines += ["", f"{painted(_RED, '✗')} {painted(_BOLD, result.id)}  {result.statement}"]
            lines += [f"    {line}" for line in example.splitlines()]
        if passed:
            lines.append("")
            for result in self.results:
                if result.passed:
                    lines.append(f"{painted(_GREEN, '✓')} {result.id:<24} {_margin(result)}")
            for result in self.not_claimed:
                lines.append(painted(_DIM, f"- {result.id:<24} not claimed"))
        return "\n".join(lines)

    def _told(self) -> list[tuple[Result, str]]:
        """What failed, with its counterexample; a call that failed as another did is told once."""
        told: dict[str, str] = {}
        found = []
        for result in self.failed:
            example = result.counterexample or ""
            if result.measured == math.inf and result.allowed == 0:
                note = example.partition("\n")[0]
                first = told.setdefault(note, result.id)
                if first != result.id:
                    example = f"As {first}: {note[:1].lower()}{note[1:]}"
            found.append((result, example))
        return found

    def __str__(self) -> str:
        return self.text()

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """The report for a notebook."""

        def row(mark: str, style: str, result: Result, words: str, example: str = "") -> str:
            if example:
                example = f"<pre style='white-space:pre-wrap;margin:4px 0'>{html.escape(example)}</pre>"
            return (
                f"<tr><td style='{style}'>{mark}</td><td style='text-align:left;white-space:nowrap'>"
                f"<code>{html.escape(result.id)}</code></td>"
                f"<td style='text-align:left'>{html.escape(result.statement)}{example}</td>"
                f"<td style='text-align:left'>{html.escape(words)}</td></tr>"
            )

        rows = [row("✗", "color:#c00", result, "falsified", example) for result, example in self._told()]
        rows += [row("✓", "color:#080", result, _margin(result)) for result in self.results if result.passed]
        rows += [row("–", "color:#888", result, "not claimed") for result in self.not_claimed]
        head = "<tr><th></th><th>falsifier</th><th>statement</th><th></th></tr>"
        return f"<p><b>{html.escape(self.summary())}</b></p><table>{head}{''.join(rows)}</table>"

    def to_json(self, indent: int | None = 2) -> str:
        """The report as JSON text."""
        return json.dumps(self.as_dict(), indent=indent, ensure_ascii=False, allow_nan=False)

    def as_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return {
            "kdcore": __version__,
            "name": self.name,
            "divergence": self.divergence,
            "passed": self.passed,
            "failed": [result.id for result in self.failed],
            "results": [result.as_dict() for result in self.results],
            "not_claimed": [result.as_dict() for result in self.not_claimed],
            "features": self.features,
            "max_examples": self.max_examples,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
        }


def _margin(result: Result) -> str:
    if not result.measured or not result.allowed or result.measured <= 0:
        return f"{result.cases} cases"
    return f"{result.cases} cases, at most {result.measured / result.allowed:.2g} of what is allowed"
