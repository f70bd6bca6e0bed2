"""The falsifiers, in the order in which a report has them.

Each is a generator of findings for one case. ``s, t, y, T, a`` in the code that a finding shows are the case's
arguments, alpha the weight of the cross-entropy. "Specification" in a reference is that of the system which kdcore
re-implements; its pinned numbers are among the hand-picked cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from kdcore.testing.bounds import name_and_parameter
from kdcore.testing.calls import Answer, BrokenCallError, Calls
from kdcore.testing.cases import Case, Judgement
from kdcore.testing.registry import Finding, falsifier
from kdcore.testing.textbook import REAL, kd_rows, log_softmax

_CALL = "loss_and_gradient(s, t, y, T, a)"
_HINTON = "Hinton, Vinyals & Dean 2015, section 2, arXiv:1503.02531"
_SPECIFICATION = "specification"
_SMALL_SCALES = (0.1, 1.0, 3.0)


# --- numbers beside numbers -----------------------------------------------------------------------------------------


def _off(actual: Any, expected: Any) -> Any:
    """Distances; 0 of two equal infinities, NaN where a NaN is."""
    with np.errstate(invalid="ignore"):
        return np.where(actual == expected, 0, np.abs(actual - expected))


def _worst(measured: Any, allowed: Any) -> int:
    with np.errstate(invalid="ignore", divide="ignore"):
        excess = np.where(measured == 0, 0, measured / allowed)
    return int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))


def _finding(measured: Any, allowed: Any, code: str, note: Any) -> Iterator[Finding]:
    """The worst of some rows; ``note`` says of a row's index what was found there. Nothing of no rows."""
    measured, allowed = (
        np.atleast_1d(measured),
        np.broadcast_to(np.atleast_1d(allowed), np.shape(np.atleast_1d(measured))),
    )
    if measured.size:
        i = _worst(measured, allowed)
        yield Finding(float(measured[i]), float(allowed[i]), code, note(i) if callable(note) else note)


def _losses(actual: Any, expected: Any, allowed: Any, code: str, words: str = "the exact one is") -> Iterator[Finding]:
    yield from _finding(
        _off(actual, expected),
        allowed,
        code,
        lambda i: f"the loss of row {i} is {_text(actual[i])}; {words} {_text(expected[i])}",
    )


def _gradients(
    actual: Any, expected: Any, allowed: Any, code: str, words: str = "the exact one is"
) -> Iterator[Finding]:
    """Rows of gradients by the 2-norm of what they differ by; rows without an exact gradient are left out."""
    rows = np.flatnonzero(~np.isnan(expected).any(axis=-1))
    error = np.sqrt(np.square(_off(actual[rows], expected[rows])).sum(axis=-1))

    def note(i: int) -> str:
        row = rows[i]
        v = _worst(_off(actual[row], expected[row]), 1.0)
        return f"the gradient of row {row} is {_text(actual[row, v])} in class {v}; {words} {_text(expected[row, v])}"

    yield from _finding(error, np.broadcast_to(allowed, len(expected))[rows], code, note)


def _divergence_name(calls: Calls) -> str:
    return name_and_parameter(calls.divergence)[0]


def _text(value: Any) -> str:
    return f"{float(value):.10g}"


def _stacked(case: Case, students: Any) -> Case:
    """A batch of all the students [n, B, V], each beside the case's teacher and labels."""
    n, (B, V) = len(students), case.shape
    return case.but(
        student=np.ascontiguousarray(students, dtype=case.student.dtype).reshape(n * B, V),
        teacher=np.tile(case.teacher, (n, 1)),
        labels=np.tile(case.labels, n),
    )


def _finite(case: Case) -> bool:
    return bool(np.isfinite(case.student).all() and np.isfinite(case.teacher).all())


def _against_the_textbook(part: str) -> Any:
    """A check of the loss or of the gradient alone: errors of one hide nothing about the other."""

    def check(calls: Calls, case: Case) -> Iterator[Finding]:
        answer, judged = calls(case), case.judged(calls.divergence)
        if part == "loss":
            yield from _losses(answer.loss, judged.exact.loss, judged.loss, f"{_CALL}[0]")
        else:
            yield from _gradients(answer.gradient, judged.exact.gradient, judged.gradient, f"{_CALL}[1]")

    return check


def _both(calls: Calls, case: Case) -> Iterator[Finding]:
    """Loss and gradient from one call."""
    answer, judged = calls(case), case.judged(calls.divergence)
    yield from _losses(answer.loss, judged.exact.loss, judged.loss, f"{_CALL}[0]")
    yield from _gradients(answer.gradient, judged.exact.gradient, judged.gradient, f"{_CALL}[1]")


def _same(
    one: Answer, other: Answer, judged_one: Judgement, judged_other: Judgement, code: str, words: str
) -> Iterator[Finding]:
    """Two answers that must agree, up to what each may be off and what the exact ones differ by (by rounding alone)."""
    a, b = judged_one.exact, judged_other.exact
    yield from _losses(
        one.loss, other.loss, judged_one.loss + judged_other.loss + _off(a.loss, b.loss), f"{code}[0]", words
    )
    defined = ~np.isnan(a.gradient).any(axis=-1) & ~np.isnan(b.gradient).any(axis=-1)
    apart = np.sqrt(np.square(np.where(defined[:, None], _off(a.gradient, b.gradient), 0)).sum(axis=-1))
    yield from _gradients(
        one.gradient,
        np.where(defined[:, None], other.gradient, np.nan) if not defined.all() else other.gradient,
        judged_one.gradient + judged_other.gradient + apart,
        f"{code}[1]",
        words,
    )


# --- what an implementation is --------------------------------------------------------------------------------------


@falsifier(
    "F-KD-FORM",
    "A call returns a loss [B] and a gradient [B, V] of a float dtype no narrower than the student's, without NaN.",
    reference="the signature of kdcore.testing.falsify",
    fixtures=("ordinary",),
)
def form(calls: Calls, case: Case) -> Iterator[Finding]:
    answer = calls(case)
    for name, array, index in (("loss", answer.loss, 0), ("gradient", answer.gradient, 1)):
        number = int(np.isnan(array).sum())
        yield Finding(number, 0, f"{_CALL}[{index}]", f"the {name} has {number} NaN")


@falsifier(
    "F-KD-NOT-FINITE",
    "A row that holds NaN or +inf, or nothing but -inf, is refused, or has NaN in its loss or gradient.",
    reference="the specification's D7: such rows became uniform, with the finite loss log V",
    fixtures=("not finite",),
    needs=("neg_inf", "cross_entropy", "distillation"),
)
def not_finite(calls: Calls, case: Case) -> Iterator[Finding]:
    row = case.shape[0] - 1
    # Where a divergence masks p = 0, a teacher's NaN may be masked with it, and forward KL's gradient alone shows it.
    seen = [case.student[row], case.teacher[row]][: 2 if _divergence_name(calls) == "forward_kl" else 1]
    if not any(np.isnan(x).any() or (x == np.inf).any() or not np.isfinite(x).any() for x in seen):
        return
    try:
        loss, gradient = calls(case)
    except BrokenCallError:
        return
    silent = not (np.isnan(loss[row]) or np.isnan(gradient[row]).any())
    yield Finding(float(silent), 0.0, _CALL, f"row {row} is no row of logits, and has the loss {_text(loss[row])}")


@falsifier(
    "F-KD-PURE",
    "A call changes none of its arguments.",
    reference="a loss that works in place spoils the logits that the backward pass, or the next loss, still needs",
    fixtures=("ordinary", "ordinary, float32", "rows", "large", "single class"),
)
def pure(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _changes(calls, case)


@falsifier(
    "F-KD-PURE-INF",
    "A call changes none of its arguments, -inf included.",
    reference="implementations that replace -inf in place",
    fixtures=("shared -inf", "teacher -inf", "student -inf", "label -inf"),
    needs=("neg_inf",),
)
def pure_with_inf(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _changes(calls, case)


def _changes(calls: Calls, case: Case) -> Iterator[Finding]:
    given = case.arguments
    calls.raw(*given)
    for letter, name, array, kept in zip(
        "sty", ("student_logits", "teacher_logits", "labels"), given, case.arguments[:3], strict=False
    ):
        number = int((array != kept).sum())
        code = f"(lambda {letter}: ({_CALL}, {letter})[1])({letter}.copy())"
        yield Finding(number, 0, code, f"{number} elements of {name} were changed")


@falsifier(
    "F-KD-REPEATABLE",
    "A call depends on its arguments alone: not on the calls before it, nor do later calls change what it returned.",
    reference="caches by identity or shape, results in scratch memory that the next call reuses, noise",
    fixtures=("mild",),
)
def repeatable(calls: Calls, case: Case) -> Iterator[Finding]:
    judged = case.judged(calls.divergence)
    turned = case.but(student=case.student[:, ::-1].copy(), teacher=case.teacher[:, ::-1].copy())
    s, t, y, T, a = case.arguments
    loss, gradient = calls.raw(s, t, y, T, a)
    first = Answer(loss.astype(REAL), gradient.astype(REAL))
    fresh = calls(turned)
    later = Answer(loss.astype(REAL), gradient.astype(REAL))
    words = "before another call it was"
    code = f"(lambda r: (loss_and_gradient(s[:, ::-1].copy(), t[:, ::-1].copy(), y, T, a), r)[1])({_CALL})"
    yield from _losses(later.loss, first.loss, 0.0, f"{code}[0]", words)
    yield from _gradients(later.gradient, first.gradient, 0.0, f"{code}[1]", words)
    yield from _same(calls(case), first, judged, judged, _CALL, "in an earlier call of the same arguments it was")
    # The same arrays, with new contents.
    calls.raw(s, t, y, T, a)
    s[...], t[...] = turned.student, turned.teacher
    loss, gradient = calls.raw(s, t, y, T, a)
    turn = "s.__setitem__(..., s[:, ::-1].copy()), t.__setitem__(..., t[:, ::-1].copy())"
    code = f"({_CALL}, {turn}, {_CALL})[3]"
    again, of_turned = Answer(loss.astype(REAL), gradient.astype(REAL)), turned.judged(calls.divergence)
    words = "in arrays that had other contents in the call before, in fresh arrays it is"
    yield from _same(again, fresh, of_turned, of_turned, code, words)


# --- the specification's --------------------------------------------------------------------------------------------


@falsifier(
    "F-DISTILL-KDSTEP-001",
    "At alpha = 1 the gradient is that of the cross-entropy: softmax(s) less one at the label.",
    reference=_SPECIFICATION,
    fixtures=("ordinary",),
    search={"alphas": (1.0,)},
    needs=("cross_entropy",),
)
def gradient_at_alpha_one(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case.but(alpha=1.0)
    expected = np.exp(log_softmax(case.student)) - (np.arange(case.shape[1]) == case.labels[:, None])
    allowed = case.judged(calls.divergence).gradient
    code = "loss_and_gradient(s, t, y, T, 1.0)[1]"
    yield from _gradients(calls(case).gradient, expected, allowed, code, "that of the cross-entropy is")


@falsifier(
    "F-DISTILL-KDSTEP-002",
    "Where student and teacher agree, also up to a constant, there is no gradient (alpha = 0).",
    reference=_SPECIFICATION,
    fixtures=("ordinary",),
    search={"alphas": (0.0,)},
    needs=("distillation",),
)
def no_gradient_at_agreement(calls: Calls, case: Case) -> Iterator[Finding]:
    for shift in (0.0, 1.0):
        agreed = _agreed(case, shift)
        judged = agreed.judged(calls.divergence)
        # Of a constant that rounds, total variation has a slope.
        allowed = judged.gradient + np.sqrt(np.square(judged.exact.gradient).sum(axis=-1))
        code = f"loss_and_gradient(s, s + {shift}, y, T, 0.0)[1]"
        answer = calls(agreed)
        yield from _gradients(answer.gradient, np.zeros_like(answer.gradient), allowed, code, "it should be")


def _agreed(case: Case, shift: float) -> Case:
    return case.but(teacher=case.student + case.student.dtype.type(shift), alpha=0.0)


@falsifier(
    "F-DISTILL-KDSTEP-003",
    "A student that has the teacher's logits with the opposite sign loses more than one that agrees (alpha = 0).",
    reference=_SPECIFICATION,
    fixtures=("mild",),
    search={"alphas": (0.0,), "scales": _SMALL_SCALES},
    needs=("distillation",),
)
def opposite_loses_more(calls: Calls, case: Case) -> Iterator[Finding]:
    agreed, opposite = (case.but(student=sign * case.teacher, alpha=0.0) for sign in (1, -1))
    one, other = agreed.judged(calls.divergence), opposite.judged(calls.divergence)
    told = other.exact.loss - one.exact.loss > 10 * (one.loss + other.loss)  # not a teacher that knows nothing
    here, there = calls(agreed).loss, calls(opposite).loss
    code = "[loss_and_gradient(x, t, y, T, 0.0)[0] for x in (t, -t)]"
    yield from _finding(
        np.where(told, here - there, 0),
        0.0,
        code,
        lambda i: f"row {i} loses {_text(here[i])} where it agrees, {_text(there[i])} with the opposite sign",
    )


@falsifier(
    "F-DISTILL-STUDENT-001",
    "A step of rate 1 from the uniform student raises the logit of the teacher's most likely class (alpha = 0).",
    reference=_SPECIFICATION,
    fixtures=("tokens", "mild"),
    search={"alphas": (0.0,), "scales": _SMALL_SCALES},
    needs=("distillation",),
)
def step_raises_the_teachers_class(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case.but(student=np.zeros_like(case.student), alpha=0.0)
    judged, rows = case.judged(calls.divergence), np.arange(case.shape[0])
    top = case.teacher.argmax(axis=-1)
    exact, found = judged.exact.gradient[rows, top], calls(case).gradient[rows, top]
    told = exact < -10 * judged.gradient
    yield from _finding(
        np.where(told, found, -1),
        0.0,
        "loss_and_gradient(np.zeros_like(s), t, y, T, 0.0)[1]",
        lambda i: f"in row {i} the gradient of class {top[i]} is {_text(found[i])}: a step lowers it, or leaves it",
    )


@falsifier(
    "F-DISTILL-STUDENT-002",
    "Ten steps of rate 0.5 from the uniform student take the loss below 0.9 of its start, each lower (alpha = 0).",
    reference=_SPECIFICATION,
    fixtures=("tokens",),
    needs=("distillation", "temperature"),
    divergences=("forward_kl", "reverse_kl"),
)
def ten_steps(calls: Calls, case: Case) -> Iterator[Finding]:
    case, losses, allowed = case.but(student=np.zeros_like(case.student), alpha=0.0), [], []
    if not _learns(calls, case):
        return
    for _ in range(10):
        answer = calls(case)
        losses.append(float(answer.loss[0]))
        allowed.append(float(case.judged(calls.divergence).loss[0]))
        if not np.isfinite(answer.gradient).all():
            yield Finding(np.nan, 0.0, f"{_CALL}[1]", "the gradient is not finite")
            return
        case = case.but(student=(case.student - 0.5 * answer.gradient).astype(case.student.dtype))
    code = (
        "[s := np.zeros_like(s)] and [(loss_and_gradient(s, t, y, T, 0.0)[0], "
        "s := s - 0.5 * loss_and_gradient(s, t, y, T, 0.0)[1])[0] for _ in range(10)]"
    )
    yield Finding(max(np.diff(losses)), max(allowed), code, f"the losses are {', '.join(map(_text, losses))}")
    yield Finding(losses[-1] - 0.9 * losses[0], 0.0, code, f"the losses go from {losses[0]:.6g} to {losses[-1]:.6g}")


def _learns(calls: Calls, case: Case) -> bool:
    """Whether the exact losses of the first row do what is asked, with room: not of a teacher that knows nothing."""
    losses = []
    for _ in range(10):
        exact = case.judged(calls.divergence).exact
        losses.append(float(exact.loss[0]))
        case = case.but(student=(case.student - 0.5 * exact.gradient).astype(case.student.dtype))
    return losses[0] > 0.1 and losses[-1] < 0.8 * losses[0] and bool((np.diff(losses) < 0).all())


@falsifier(
    "F-KD-FORWARD-KL-001",
    "The loss is the forward KL(p || q) of the teacher's p and the student's q, not the reverse (alpha = 0).",
    reference=f"{_SPECIFICATION}; {_HINTON}",
    fixtures=("ordinary",),
    search={"alphas": (0.0,)},
    needs=("distillation",),
    divergences=("forward_kl",),
)
def forward_and_not_reverse(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case.but(alpha=0.0)
    judged, answer = case.judged(calls.divergence), calls(case)
    reverse = kd_rows(case.student, case.teacher, case.labels, case.temperature, 0.0, "reverse_kl").loss
    expected = judged.exact.loss

    def note(i: int) -> str:
        words = f"the loss of row {i} is {_text(answer.loss[i])}, T² KL(p || q) is {_text(expected[i])}"
        close = _off(answer.loss[i], reverse[i]) <= 1e-3 * _off(reverse[i], expected[i])
        return f"{words}; it is the other direction, T² KL(q || p)" if close else words

    yield from _finding(_off(answer.loss, expected), judged.loss, "loss_and_gradient(s, t, y, T, 0.0)[0]", note)


@falsifier(
    "F-KD-FORWARD-KL-002",
    "A divergence is not negative (Gibbs), but for rounding (alpha = 0).",
    reference=f"{_SPECIFICATION}; FALSIFY-KD-001",
    fixtures=("ordinary", "tiny", "large"),
    search={"alphas": (0.0,)},
    needs=("distillation", "large_logits"),
)
def gibbs(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case.but(alpha=0.0)
    loss = calls(case).loss
    yield from _finding(
        -loss,
        case.judged(calls.divergence).loss,
        "loss_and_gradient(s, t, y, T, 0.0)[0]",
        lambda i: f"the loss of row {i} is {_text(loss[i])}, below zero",
    )


@falsifier(
    "F-KD-FORWARD-KL-003",
    "Where student and teacher agree, also up to a constant, the loss is zero (alpha = 0).",
    reference=_SPECIFICATION,
    fixtures=("ordinary",),
    search={"alphas": (0.0,)},
    needs=("distillation",),
)
def no_loss_at_agreement(calls: Calls, case: Case) -> Iterator[Finding]:
    for shift in (0.0, 1.0):
        agreed = _agreed(case, shift)
        judged = agreed.judged(calls.divergence)
        allowed = judged.loss + np.abs(judged.exact.loss)
        code = f"loss_and_gradient(s, s + {shift}, y, T, 0.0)[0]"
        loss = calls(agreed).loss
        yield from _losses(loss, np.zeros_like(loss), allowed, code, "it should be")


@falsifier(
    "F-KD-FORWARD-KL-004",
    "The loss is an antiderivative of the gradient: along the line from the student to the teacher its integral is "
    "what the loss changes by.",
    reference=_SPECIFICATION,
    fixtures=("mild",),
    search={"scales": _SMALL_SCALES, "temperatures": (0.5, 20.0)},
)
def antiderivative(calls: Calls, case: Case) -> Iterator[Finding]:
    B, V = case.shape
    nodes, weights = np.polynomial.legendre.leggauss(10)
    steps = np.r_[0.0, (nodes + 1) / 2, 1.0]
    way = (case.teacher - case.student).astype(REAL)
    line = _stacked(case, case.student + steps[:, None, None] * (case.teacher - case.student))
    judged, answer = line.judged(calls.divergence), calls(line)

    def rise(loss: Any) -> Any:
        return loss.reshape(-1, B)[-1] - loss.reshape(-1, B)[0]

    def integral(gradient: Any) -> Any:
        slopes = (gradient.reshape(-1, B, V)[1:-1] * way).sum(axis=-1)
        return (weights[:, None] / 2 * slopes).sum(axis=0)

    of_losses = judged.loss.reshape(-1, B)
    allowed = of_losses[0] + of_losses[-1] + 10 * np.abs(rise(judged.exact.loss) - integral(judged.exact.gradient))
    of_gradients = (weights[:, None] / 2 * judged.gradient.reshape(-1, B)[1:-1]).sum(axis=0)
    allowed = allowed + np.sqrt(np.square(way).sum(axis=-1)) * of_gradients
    rises, integrals = rise(answer.loss), integral(answer.gradient)
    code = (
        "(lambda f, x, w: (f(1)[0] - f(0)[0], sum(v * (f(u)[1] * (t - s)).sum(-1) for u, v in zip((x + 1) / 2, w / 2)))"
        ")"
        "(lambda u: loss_and_gradient(s + u * (t - s), t, y, T, a), *np.polynomial.legendre.leggauss(10))"
    )
    yield from _finding(
        _off(rises, integrals),
        allowed,
        code,
        lambda i: (
            f"the loss of row {i} changes by {_text(rises[i])} along the line, and the integral of its gradient is "
            f"{_text(integrals[i])}"
        ),
    )


@falsifier(
    "F-KD-FORWARD-KL-005",
    "At alpha = 1 the loss is the cross-entropy at temperature 1, whatever teacher and T.",
    reference=f"{_SPECIFICATION}; FALSIFY-KD-003",
    fixtures=("ordinary", "tokens"),
    search={"alphas": (1.0,)},
    needs=("cross_entropy",),
)
def loss_at_alpha_one(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case.but(alpha=1.0)
    judged = case.judged(calls.divergence)
    expected = -log_softmax(case.student)[np.arange(case.shape[0]), case.labels]
    code = "loss_and_gradient(s, t, y, T, 1.0)[0]"
    yield from _losses(calls(case).loss, expected, judged.loss, code, "the cross-entropy is")
    other = case.but(teacher=-case.teacher[:, ::-1].copy())
    one, two = calls(case), calls(other)
    code = "loss_and_gradient(s, -t[:, ::-1].copy(), y, T, 1.0)"
    yield from _same(two, one, other.judged(calls.divergence), judged, code, "with another teacher it was")


@falsifier(
    "F-KD-FORWARD-KL-006",
    "The loss is scaled by T²: of T s and T t at T it is T² times that of s and t at 1 (alpha = 0).",
    reference=f"{_SPECIFICATION}; {_HINTON}",
    fixtures=("mild",),
    search={"alphas": (0.0,), "scales": _SMALL_SCALES},
    needs=("temperature", "distillation"),
)
def loss_is_scaled_by_t_squared(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _scaled(calls, case, 0)


@falsifier(
    "F-KD-GRADIENT-T",
    "The gradient is scaled by T: of T s and T t at T it is T times that of s and t at 1 (alpha = 0).",
    reference=_HINTON,
    fixtures=("mild",),
    search={"alphas": (0.0,), "scales": _SMALL_SCALES},
    needs=("temperature", "distillation"),
)
def gradient_is_scaled_by_t(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _scaled(calls, case, 1)


def _scaled(calls: Calls, case: Case, part: int) -> Iterator[Finding]:
    plain = case.but(temperature=1.0, alpha=0.0)
    one = plain.judged(calls.divergence)
    for T in (0.25, 2.0, 4.0, 16.0):  # powers of two, by which nothing is rounded
        dtype = case.student.dtype.type
        hot = plain.but(student=case.student * dtype(T), teacher=case.teacher * dtype(T), temperature=T)
        power = T ** (2 - part)
        words = f"{power:g} times that of s and t at T = 1 is"
        code = f"loss_and_gradient({T} * s, {T} * t, y, {T}, 0.0)[{part}]"
        here, there = calls(hot), calls(plain)
        judged = hot.judged(calls.divergence)
        if part == 0:
            yield from _losses(here.loss, power * there.loss, judged.loss + power * one.loss, code, words)
        else:
            allowed = judged.gradient + power * one.gradient
            yield from _gradients(here.gradient, power * there.gradient, allowed, code, words)


# --- properties -----------------------------------------------------------------------------------------------------


@falsifier(
    "F-KD-DERIVATIVE",
    "The gradient is the derivative of the loss by the student's logits.",
    reference="FALSIFY-KD-004; central differences of fourth order, their truncation taken from the textbook",
    fixtures=("ordinary",),
    search={"scales": (0.1, 1.0, 3.0, 10.0)},
)
def derivative(calls: Calls, case: Case) -> Iterator[Finding]:
    if not _finite(case):
        return
    (B, V), single = case.shape, case.student.dtype == np.float32
    directions = np.eye(V) if V <= 3 else np.round(np.cos(np.outer(np.arange(1, 4), np.arange(V) + 1.0)), 2)
    h = float(2.0 ** np.floor(np.log2(min(1.0, case.temperature) * (0.1 if single else 0.01))))
    offsets = np.array([-2, -1, 1, 2]) * h
    weights = np.array([1, -8, 8, -1], REAL) / (12 * REAL(h))
    near = _stacked(case, (case.student + offsets[:, None, None, None] * directions[:, None, :]).reshape(-1, B, V))
    judged, here = near.judged(calls.divergence), case.judged(calls.divergence)
    answer, moved = calls(case), calls(near)

    def quotients(loss: Any) -> Any:
        return np.tensordot(weights, loss.reshape(4, -1, B), 1)  # [directions, B]

    def slopes(gradient: Any) -> Any:
        return (gradient * directions[:, None, :]).sum(axis=-1)

    # Of the loss at hand too, which may be far from the exact one and still have this gradient.
    roundoff = np.finfo(case.student.dtype).eps
    rounding = np.tensordot(np.abs(weights), (judged.loss + 8 * roundoff * np.abs(moved.loss)).reshape(4, -1, B), 1)
    coarse = (moved.loss.reshape(4, -1, B)[2] - moved.loss.reshape(4, -1, B)[1]) / (2 * REAL(h))
    truncation = np.abs(quotients(judged.exact.loss) - slopes(here.exact.gradient))
    if _divergence_name(calls) == "tvd":
        truncation = np.where(_kinks(case, 3 * h * np.abs(directions).max()), np.inf, truncation)
    size = np.sqrt(np.square(directions).sum(axis=-1))[:, None]
    found, expected = slopes(answer.gradient), quotients(moved.loss)
    own = size * np.sqrt(np.square(answer.gradient).sum(axis=-1)) * 8 * roundoff + 0.01 * np.abs(expected - coarse)
    allowed = rounding + 10 * truncation + size * here.gradient + np.where(np.isfinite(own), own, 0)

    def note(i: int) -> str:
        k, row = divmod(i, B)
        return (
            f"the loss of row {row} changes by {_text(expected[k, row])} per unit along a direction, by the gradient "
            f"it is {_text(found[k, row])}"
        )

    k = _worst(_off(found, expected).ravel(), allowed.ravel()) // B
    along = directions[k].tolist() if V <= 40 else None
    vector = f"np.array({along})" if along else f"np.round(np.cos({k + 1} * np.arange(1, {V + 1})), 2)"
    code = (
        "(lambda L, d, h: ((8 * (L(h * d) - L(-h * d)) - L(2 * h * d) + L(-2 * h * d)) / (12 * h), "
        f"({_CALL}[1] * d).sum(-1)))(lambda x: loss_and_gradient(s + x, t, y, T, a)[0], "
        f"{vector}, {h})"
    )
    yield from _finding(_off(found, expected).ravel(), allowed.ravel(), code, note)


def _kinks(case: Case, step: float) -> Any:
    """Whether p and q of a row [B] come near each other in some class, where total variation has no derivative."""
    log_p, log_q = (log_softmax(x, case.temperature) for x in (case.teacher, case.student))
    return (np.abs(log_p - log_q) <= 2 * step / case.temperature).any(axis=-1)


@falsifier(
    "F-KD-ALPHA-0",
    "At alpha = 0 the labels change nothing.",
    reference="FALSIFY-KD-003",
    fixtures=("ordinary",),
    search={"alphas": (0.0,)},
    needs=("cross_entropy", "distillation"),
)
def alpha_zero(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case.but(alpha=0.0)
    other = case.but(labels=(case.labels + 1) % case.shape[1])
    judged = case.judged(calls.divergence)
    code = f"loss_and_gradient(s, t, (y + 1) % {case.shape[1]}, T, 0.0)"
    yield from _same(calls(other), calls(case), judged, judged, code, "with the case's labels it is")
    yield from _losses(calls(case).loss, judged.exact.loss, judged.loss, "loss_and_gradient(s, t, y, T, 0.0)[0]")


@falsifier(
    "F-KD-ALPHA-LINEAR",
    "Loss and gradient are alpha times those at alpha = 1 plus (1 - alpha) times those at alpha = 0.",
    reference="alpha weights the cross-entropy, of loss and gradient alike",
    fixtures=("ordinary",),
    search={"alphas": (0.001, 0.3, 0.9)},
    needs=("cross_entropy", "distillation"),
)
def alpha_is_linear(calls: Calls, case: Case) -> Iterator[Finding]:
    if case.alpha in (0.0, 1.0):
        case = case.but(alpha=0.3)
    ends = [(weight, case.but(alpha=end)) for weight, end in ((case.alpha, 1.0), (1 - REAL(case.alpha), 0.0))]
    answers = [(weight, calls(end), end.judged(calls.divergence)) for weight, end in ends]
    here, judged = calls(case), case.judged(calls.divergence)
    words = "mixed from both ends it would be"
    roundoff = 8 * np.finfo(case.student.dtype).eps
    loss = sum(weight * answer.loss for weight, answer, _ in answers)
    own = sum(roundoff * weight * np.abs(answer.loss) for weight, answer, _ in answers)
    allowed = judged.loss + sum(float(weight) * end.loss for weight, _, end in answers) + own
    yield from _losses(here.loss, loss, allowed, f"loss_and_gradient(s, t, y, T, {case.alpha})[0]", words)
    gradient = sum(weight * answer.gradient for weight, answer, _ in answers)
    own = sum(roundoff * weight * np.sqrt(np.square(x.gradient).sum(axis=-1)) for weight, x, _ in answers)
    allowed = judged.gradient + sum(float(weight) * end.gradient for weight, _, end in answers) + own
    yield from _gradients(here.gradient, gradient, allowed, f"loss_and_gradient(s, t, y, T, {case.alpha})[1]", words)


@falsifier(
    "F-KD-SHIFT-STUDENT",
    "A constant added to a row of the student's logits changes nothing.",
    reference="softmax does not see it",
    fixtures=("ordinary",),
    search={"supports": ("all",)},
)
def shift_of_the_student(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _shifted(calls, case, "student")


@falsifier(
    "F-KD-SHIFT-TEACHER",
    "A constant added to a row of the teacher's logits changes nothing.",
    reference="softmax does not see it",
    fixtures=("ordinary",),
    search={"supports": ("all",)},
    needs=("distillation",),
)
def shift_of_the_teacher(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _shifted(calls, case, "teacher")


def _shifted(calls: Calls, case: Case, name: str) -> Iterator[Finding]:
    logits, answer, judged = getattr(case, name), calls(case), case.judged(calls.divergence)
    for shift in (1.0, -64.0, 1024.0):
        moved = case.but(**{name: logits + logits.dtype.type(shift)})
        arguments = f"s + {shift}, t" if name == "student" else f"s, t + {shift}"
        code = f"loss_and_gradient({arguments}, y, T, a)"
        yield from _same(calls(moved), answer, moved.judged(calls.divergence), judged, code, "before the shift it was")


@falsifier(
    "F-KD-ROWS",
    "A row's loss and gradient do not depend on the rows beside it, nor on its place among them.",
    reference="reductions that leak into rows, statistics over the wrong axis",
    fixtures=("ordinary", "rows"),
    search={"rows": (2, 6)},
)
def rows_are_independent(calls: Calls, case: Case) -> Iterator[Finding]:
    B, answer, judged = case.shape[0], calls(case), case.judged(calls.divergence)
    if B == 1:
        return
    for i in sorted({0, 1, B // 2, B - 1}):
        alone = case.rows(slice(i, i + 1))
        code = f"[x[{i}] for x in {_CALL}]"
        there, of_row = _part(answer, judged, slice(i, i + 1))
        yield from _same(there, calls(alone), of_row, alone.judged(calls.divergence), code, "alone it would be")
    turned = case.rows(slice(None, None, -1))
    there, of_rows = _part(answer, judged, slice(None, None, -1))
    code = "loss_and_gradient(s[::-1].copy(), t[::-1].copy(), y[::-1].copy(), T, a)"
    yield from _same(calls(turned), there, turned.judged(calls.divergence), of_rows, code, "in the other order it was")


def _part(answer: Answer, judged: Judgement, index: Any) -> tuple[Answer, Judgement]:
    exact = type(judged.exact)(judged.exact.loss[index], judged.exact.gradient[index])
    return Answer(answer.loss[index], answer.gradient[index]), Judgement(
        exact, judged.loss[index], judged.gradient[index]
    )


@falsifier(
    "F-KD-SPLIT",
    "A batch in two parts gives what it gives whole.",
    reference="gradient accumulation: losses that depend on the micro-batch",
    fixtures=("ordinary", "rows"),
    search={"rows": (2, 6)},
)
def batches_may_be_split(calls: Calls, case: Case) -> Iterator[Finding]:
    B, answer, judged = case.shape[0], calls(case), case.judged(calls.divergence)
    cut = (B + 1) // 3
    if not cut:
        return
    for index, text in ((slice(None, cut), f":{cut}"), (slice(cut, None), f"{cut}:")):
        part = case.rows(index)
        there, of_rows = _part(answer, judged, index)
        code = f"loss_and_gradient(s[{text}], t[{text}], y[{text}], T, a)"
        yield from _same(
            calls(part),
            there,
            part.judged(calls.divergence),
            of_rows,
            code,
            f"in rows {text}, in the whole batch it is",
        )


@falsifier(
    "F-KD-PERMUTATION",
    "Classes in another order (logits and labels alike) give the same loss, and the gradient in that order.",
    reference="no class is special, not the first, the last, or one in the last chunk",
    fixtures=("ordinary",),
    search={"vocabularies": (2, 3, 5, 17, 33)},
)
def classes_may_be_permuted(calls: Calls, case: Case) -> Iterator[Finding]:
    V, answer, judged = case.shape[1], calls(case), case.judged(calls.divergence)
    for order, text, label in (
        (np.arange(V)[::-1], "[:, ::-1].copy()", f"{V - 1} - y"),
        (np.roll(np.arange(V), 1), f"[:, np.roll(np.arange({V}), 1)]", f"(y + 1) % {V}"),
    ):
        place = np.argsort(order)
        moved = case.but(
            student=case.student[:, order].copy(), teacher=case.teacher[:, order].copy(), labels=place[case.labels]
        )
        exact = type(judged.exact)(judged.exact.loss, judged.exact.gradient[:, order])
        code = f"loss_and_gradient(s{text}, t{text}, {label}, T, a)"
        yield from _same(
            calls(moved),
            Answer(answer.loss, answer.gradient[:, order]),
            moved.judged(calls.divergence),
            Judgement(exact, judged.loss, judged.gradient),
            code,
            "in the case's order it was",
        )


@falsifier(
    "F-KD-RAYS",
    "Along a ray from the teacher, s = t + step d, the loss does not fall (alpha = 0).",
    reference="phi' grows with q / p, which grows along d; generalises F-DISTILL-KDSTEP-003",
    fixtures=("mild",),
    search={"alphas": (0.0,), "scales": _SMALL_SCALES},
    needs=("distillation",),
)
def rays(calls: Calls, case: Case) -> Iterator[Finding]:
    case, B = case.but(alpha=0.0), case.shape[0]
    steps = np.array([0.0, 0.1, 0.25, 0.5, 1.0, 1.5, 2.0])
    line = _stacked(case, case.teacher + steps[:, None, None] * (case.student - case.teacher))
    loss, allowed = (x.reshape(-1, B) for x in (calls(line).loss, line.judged(calls.divergence).loss))
    falls, limit = loss[:-1] - loss[1:], allowed[:-1] + allowed[1:]
    k, row = divmod(_worst(np.maximum(falls, 0).ravel(), limit.ravel()), B)
    words = (
        f"row {row} loses {_text(loss[k, row])} at step {steps[k]:g} from the teacher, {_text(loss[k + 1, row])} at "
        f"step {steps[k + 1]:g}"
    )
    code = f"[loss_and_gradient(t + u * (s - t), t, y, T, 0.0)[0] for u in ({steps[k]}, {steps[k + 1]})]"
    yield Finding(float(falls[k, row]), float(limit[k, row]), code, words)


@falsifier(
    "F-KD-DESCENT",
    "A step of descent on the logits of any rate below 4 never raises the loss.",
    reference="the Hessian by the logits is at most 1/2; generalises F-DISTILL-STUDENT-002",
    fixtures=("ordinary",),
    search={"scales": (0.1, 1.0, 10.0)},
    divergences=("forward_kl",),
)
def descent(calls: Calls, case: Case) -> Iterator[Finding]:
    answer, judged = calls(case), case.judged(calls.divergence)
    for rate in (0.5, 3.9):
        with np.errstate(all="ignore"):
            student = (case.student - rate * answer.gradient).astype(case.student.dtype)
        code = f"[loss_and_gradient(s - {rate} * u * {_CALL}[1], t, y, T, a)[0] for u in (0, 1)]"
        if not np.isfinite(student).all():
            yield Finding(np.nan, 0.0, f"{_CALL}[1]", "the gradient is not finite")
            return
        lower = case.but(student=student)
        after = calls(lower).loss
        yield from _finding(
            after - answer.loss,
            judged.loss + lower.judged(calls.divergence).loss,
            code,
            lambda i, rate=rate, after=after: (
                f"a step of rate {rate} takes the loss of row {i} from {_text(answer.loss[i])} up to {_text(after[i])}"
            ),
        )


@falsifier(
    "F-KD-ROW-SUM",
    "Each row of the gradient sums to zero.",
    reference="no loss of a softmax changes with a constant",
    fixtures=("ordinary", "rows"),
)
def gradient_rows_sum_to_zero(calls: Calls, case: Case) -> Iterator[Finding]:
    sums = calls(case).gradient.sum(axis=-1)
    allowed = np.sqrt(case.shape[1]) * case.judged(calls.divergence).gradient
    yield from _finding(
        np.abs(sums), allowed, f"{_CALL}[1].sum(axis=-1)", lambda i: f"the gradient of row {i} sums to {_text(sums[i])}"
    )


@falsifier(
    "F-KD-LARGE-T",
    "As T grows the loss tends to |c|²/(2V) and the gradient to c/V, c = s - t with the mean taken off (alpha = 0).",
    reference=f"{_HINTON}, equation 4; FALSIFY-KD-002",
    fixtures=("mild",),
    search={"alphas": (0.0,), "scales": _SMALL_SCALES},
    needs=("temperature", "distillation"),
    divergences=("forward_kl", "reverse_kl"),
)
def large_temperature(calls: Calls, case: Case) -> Iterator[Finding]:
    for T in (1000.0, 10000.0):
        hot = case.but(temperature=T, alpha=0.0)
        answer, judged = calls(hot), hot.judged(calls.divergence)
        apart = case.student.astype(REAL) - case.teacher
        c = apart - apart.mean(axis=-1, keepdims=True)
        loss, gradient = np.square(c).sum(axis=-1) / (2 * case.shape[1]), c / case.shape[1]
        # Relative terms of the next order, of the size of the logits over T, are not held against the implementation.
        rest = 8 * (np.abs(case.student).max() + np.abs(case.teacher).max()) / T
        allowed, code = judged.loss + rest * loss, f"loss_and_gradient(s, t, y, {T}, 0.0)[0]"
        yield from _losses(answer.loss, loss, allowed, code, "its limit as T grows is")
        allowed = judged.gradient + rest * np.sqrt(np.square(gradient).sum(axis=-1))
        code = f"loss_and_gradient(s, t, y, {T}, 0.0)[1]"
        yield from _gradients(answer.gradient, gradient, allowed, code, "its limit as T grows is")


# --- classes that are ruled out -------------------------------------------------------------------------------------


@falsifier(
    "F-KD-SUPPORT-SHARED",
    "Classes that student and teacher both rule out (-inf) have no gradient, and the rest is as if they did not exist.",
    reference="0 log 0 = 0",
    fixtures=("shared -inf",),
    search={"supports": ("shared",)},
    needs=("neg_inf",),
)
def shared_classes(calls: Calls, case: Case) -> Iterator[Finding]:
    answer, judged = calls(case), case.judged(calls.divergence)
    ruled_out = (case.student == -np.inf) & (case.teacher == -np.inf)
    for i in range(case.shape[0]):
        keep = ~ruled_out[i]
        if keep.sum() < 2 or (ruled_out[i, case.labels[i]] and case.alpha > 0):
            continue
        place = int(keep[: case.labels[i]].sum()) if keep[case.labels[i]] else 0
        small = case.but(
            student=case.student[i : i + 1, keep], teacher=case.teacher[i : i + 1, keep], labels=np.array([place])
        )
        there, of_row = _part(answer, judged, slice(i, i + 1))
        inside = Answer(there.loss, there.gradient[:, keep])
        of_inside = Judgement(
            type(of_row.exact)(of_row.exact.loss, of_row.exact.gradient[:, keep]), of_row.loss, of_row.gradient
        )
        words = "without the classes that both rule out it is"
        yield from _same(inside, calls(small), of_inside, small.judged(calls.divergence), _CALL, words)
        outside = there.gradient[0, ~keep]
        yield from _finding(
            np.abs(outside), 0.0, f"{_CALL}[1]", f"row {i} has a gradient in a class that both rule out"
        )


falsifier(
    "F-KD-SUPPORT-TEACHER",
    "Classes that the teacher alone rules out have their exact values, +inf where the divergence is, never NaN.",
    reference="p = 0 adds nothing to KL(p || q)",
    fixtures=("teacher -inf",),
    search={"supports": ("teacher",)},
    needs=("neg_inf", "distillation"),
)(_both)

falsifier(
    "F-KD-SUPPORT-STUDENT",
    "Classes that the student alone rules out have their exact values, +inf where the divergence is, never NaN.",
    reference="p > 0 = q makes KL(p || q) +inf, with the finite gradient T (q - p)",
    fixtures=("student -inf",),
    search={"supports": ("student",)},
    needs=("neg_inf", "distillation"),
)(_both)

falsifier(
    "F-KD-SUPPORT-EACH",
    "Where each rules out a class that the other allows, values are exact, +inf where the divergence is, never NaN.",
    reference="KL(p || q) is +inf by one class, and 0 by the other",
    fixtures=("each -inf",),
    needs=("neg_inf", "distillation"),
)(_both)

falsifier(
    "F-KD-SUPPORT-LABEL",
    "The cross-entropy of a label that the student rules out is +inf, its gradient softmax(s) less one at the label.",
    reference="CE = -log 0; a clamp would make a finite loss of it",
    fixtures=("label -inf",),
    search={"supports": ("shared", "both"), "alphas": (0.3, 1.0)},
    needs=("neg_inf", "cross_entropy"),
)(_both)

falsifier(
    "F-KD-SUPPORT-ALPHA",
    "A term whose factor is 0 is absent, though it is infinite: 0 times infinity does not arise.",
    reference="the divergence at alpha = 1, the cross-entropy at alpha = 0",
    fixtures=("absent terms",),
    needs=("neg_inf", "cross_entropy", "distillation"),
)(_both)


# --- sizes ----------------------------------------------------------------------------------------------------------


falsifier(
    "F-KD-CONFIDENT",
    "The loss of a student that is sure of a wrong class is as large as it is, 30 or 10,000: nothing caps it.",
    reference="clamps: -log 1e-9 = 20.7, -log 1e-10 = 23.0, -log of float32's least = 87, of float64's 708",
    fixtures=("confident",),
    needs=("large_logits",),
)(_both)

falsifier(
    "F-KD-LARGE-LOGITS",
    "Logits of up to 1e4 neither overflow nor are cut, and large gradients stay as large as they are.",
    reference="softmax without its maximum, or with that of a chunk, taken out; clipped logits; clipped gradients",
    fixtures=("large", "large and wide"),
    search={"scales": (100.0, 1e3, 1e4), "offsets": (0.0, 1e4, -1e4)},
    needs=("large_logits",),
)(_both)

falsifier(
    "F-KD-LARGE-V",
    "Every class counts, in vocabularies of any size.",
    reference="chunks and their remainders, top-k without the tail, 16-bit indices",
    fixtures=("wide",),
    needs=("large_vocabulary",),
)(_both)

falsifier(
    "F-KD-MANY-ROWS",
    "Every row counts, in batches of any size.",
    reference="blocks of rows and their remainders",
    fixtures=("rows",),
    needs=("large_batch",),
)(_both)

falsifier(
    "F-KD-SINGLE-CLASS",
    "With one class there is nothing to learn: loss and gradient are zero.",
    reference="softmax of one number is 1",
    fixtures=("single class",),
    needs=("single_class",),
)(_both)


# --- accuracy -------------------------------------------------------------------------------------------------------

_BOUNDS = "kdcore.testing.bounds"


def _accuracy(part: str, dtype: str, **options: Any) -> None:
    falsifier(
        f"F-KD-{part.upper()}-{dtype[-2:]}",
        f"The {part} of {dtype} logits is the textbook's, within {dtype}'s bounds.",
        needs=(dtype,),
        dtype=dtype,
        **options,
    )(_against_the_textbook(part))


for _part_of in ("loss", "gradient"):
    _accuracy(
        _part_of,
        "float64",
        reference=f"{_BOUNDS}; temperatures that are clamped from below",
        fixtures=("ordinary", "tiny", "cold"),
        search={"scales": (0.01, 0.1, 1.0, 3.0, 10.0, 30.0)},
    )
for _part_of in ("loss", "gradient"):
    _accuracy(
        _part_of,
        "float32",
        reference=f"{_BOUNDS}; gradients in 16 bits beside an exact loss",
        fixtures=("ordinary, float32",),
        search={"scales": (0.1, 1.0, 3.0, 10.0)},
    )

falsifier(
    "F-KD-LARGE-LOGITS-32",
    "float32 logits of up to 1e4 neither overflow nor are cut.",
    reference="exp(89) overflows in float32",
    fixtures=("large, float32",),
    needs=("float32", "large_logits"),
    dtype="float32",
)(_both)

falsifier(
    "F-KD-LARGE-V-32",
    "Every class counts, in vocabularies of any size, in float32.",
    reference="running sums in float32 or float16",
    fixtures=("wide, float32",),
    needs=("float32", "large_vocabulary"),
    dtype="float32",
)(_both)

falsifier(
    "F-KD-SUPPORT-32",
    "-inf has the same exact values in float32.",
    reference="-inf replaced by a large number, which float32 or float16 does not have",
    fixtures=("-inf, float32",),
    needs=("float32", "neg_inf"),
    dtype="float32",
)(_both)


# --- masks ----------------------------------------------------------------------------------------------------------


@falsifier(
    "F-KD-MASK-CONSISTENT",
    "A row labelled -100 is masked in loss and gradient alike, or in neither, or refused (0 < alpha < 1).",
    reference="ignored rows whose gradient was kept, or the reverse",
    fixtures=("ordinary",),
    search={"alphas": (0.3,), "rows": (2, 4)},
    needs=("cross_entropy", "distillation"),
)
def masks_are_consistent(calls: Calls, case: Case) -> Iterator[Finding]:
    case = case if 0 < case.alpha < 1 else case.but(alpha=0.3)
    masked = case.but(labels=np.r_[-100, case.labels[1:]])
    try:
        answer = calls(masked)
    except BrokenCallError:
        return
    soft = case.but(alpha=0.0).judged(calls.divergence)
    if not soft.exact.loss[0] > 10 * soft.loss[0]:
        return  # nothing to mask
    loss, gradient = abs(float(answer.loss[0])), float(np.abs(answer.gradient[0]).max())
    code = f"loss_and_gradient(s, t, {_masked_labels(masked)}, T, {masked.alpha})"
    if loss == 0:
        yield Finding(
            gradient, 0.0, f"{code}[1]", f"row 0 is masked, its loss is 0, but its gradient is {gradient:.4g}"
        )
    elif gradient == 0:
        yield Finding(loss, 0.0, f"{code}[0]", f"row 0 is masked, its gradient is 0, but its loss is {loss:.10g}")
    if loss == 0 or gradient == 0:
        yield from _other_rows(calls, case, answer, code)


def _masked_labels(masked: Case) -> str:
    return f"np.array({masked.labels.tolist()})"


def _other_rows(calls: Calls, case: Case, answer: Answer, code: str) -> Iterator[Finding]:
    """The rows but the first, as if that were not there."""
    if case.shape[0] > 1:
        rest, judged = _part(answer, case.judged(calls.divergence), slice(1, None))
        words = "after the masked row, the exact one is"
        yield from _losses(rest.loss, judged.exact.loss, judged.loss, f"{code}[0][1:]", words)
        yield from _gradients(rest.gradient, judged.exact.gradient, judged.gradient, f"{code}[1][1:]", words)


@falsifier(
    "F-KD-IGNORE",
    "A row labelled -100 has loss 0 and gradient 0, at every alpha, and changes no other row.",
    reference="the specification's D8; torch's ignore_index",
    fixtures=("ordinary",),
    search={"rows": (1, 4)},
    needs=("ignore_index", "cross_entropy"),
)
def ignored_rows(calls: Calls, case: Case) -> Iterator[Finding]:
    yield from _ignored(calls, case, case.but(labels=np.r_[-100, case.labels[1:]]), "s, t")


@falsifier(
    "F-KD-IGNORE-UNREAD",
    "The logits of a row labelled -100 are not read: NaN in padding changes nothing.",
    reference="0 times NaN",
    fixtures=("mild",),
    search={"rows": (1, 4)},
    needs=("ignore_index", "cross_entropy"),
)
def ignored_rows_are_not_read(calls: Calls, case: Case) -> Iterator[Finding]:
    masked = case.but(labels=np.r_[-100, case.labels[1:]], student=case.student.copy(), teacher=case.teacher.copy())
    masked.student[0] = masked.teacher[0] = np.nan
    first = "np.where(np.arange(len(y))[:, None] == 0, np.nan, {})"
    yield from _ignored(calls, case, masked, f"{first.format('s')}, {first.format('t')}")


def _ignored(calls: Calls, case: Case, masked: Case, logits: str) -> Iterator[Finding]:
    answer = calls(masked)
    code = f"loss_and_gradient({logits}, {_masked_labels(masked)}, T, a)"
    loss, gradient = abs(float(answer.loss[0])), float(np.abs(answer.gradient[0]).max())
    yield Finding(loss, 0.0, f"{code}[0]", f"row 0 is masked, and its loss is {loss:.10g}")
    yield Finding(gradient, 0.0, f"{code}[1]", f"row 0 is masked, and its gradient is {gradient:.4g}")
    yield from _other_rows(calls, case, answer, code)
