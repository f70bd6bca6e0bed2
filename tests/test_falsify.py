"""The falsifiers as a product: right implementations pass, each planted bug is shown, whatever the seed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from functools import cache

import numpy as np
import oracle
import pytest
from hypothesis import given, settings, strategies as st
from implementations import BUGS, BUGS_OF, RIGHT, RIGHT_OF, Divergence, Right, alpha_divergence, jsd, right

import kdcore
from kdcore import divergences
from kdcore.cli import main
from kdcore.testing import FEATURES, FIXTURES, OPTIONAL, adapters, case, falsify, selected, textbook, try_one
from kdcore.testing.bounds import within
from kdcore.testing.calls import Calls
from kdcore.testing.registry import REGISTRY, falsifier
from kdcore.testing.runner import _drawn, worst_finding
from kdcore.testing.strategies import SUPPORTS, cases

SMALL = [name for name in FEATURES if name not in ("large_vocabulary", "large_logits", "float32")]


@cache
def failed_by(name):
    return frozenset(failed(BUGS[name]))


EVERYTHING = {entry.id for entry in selected("forward_kl")[0]}


def failed(function, **options):
    return {result.id: result for result in falsify(function, max_examples=0, **options).failed}


# --- right implementations ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RIGHT)
def test_right_implementations_pass(name):
    report = falsify(RIGHT[name], max_examples=0)
    assert report.passed, report.text(passed=False)
    assert len(report.results) == 48
    assert all(result.passed is True and result.counterexample is None for result in report.results)
    assert {result.id for result in report.not_claimed} == {"F-KD-IGNORE", "F-KD-IGNORE-UNREAD"}


@pytest.mark.parametrize("divergence", RIGHT_OF)
def test_right_implementations_of_every_divergence_pass(divergence):
    report = falsify(RIGHT_OF[divergence], divergence=divergence, max_examples=2)
    assert report.passed, report.text(passed=False)
    assert len(report.results) >= 43


@pytest.mark.parametrize(
    ("divergence", "function"),
    [(divergences.jsd(0.2), Divergence(jsd, 0.2)), (divergences.alpha(0.9), Divergence(alpha_divergence, 0.9))],
    ids=["jsd", "alpha"],
)
def test_right_implementations_with_a_parameter_pass(divergence, function):
    report = falsify(function, divergence=divergence, max_examples=0)
    assert report.passed, report.text(passed=False)
    assert first_counterexample(function, divergence.name) is not None  # whose default parameter is another


#: More of them by night, where there is time.
SEEDS = range(1, 21) if os.environ.get("KDCORE_HYPOTHESIS_PROFILE") == "nightly" else range(1, 6)


@cache
def drawn(seed):
    """What the search of each falsifier draws; the exact answers are shared among the implementations."""
    return [(entry, found) for entry in selected("forward_kl")[0] if entry.search for found in _drawn(entry, 2, seed)]


@pytest.mark.parametrize("name", RIGHT)
def test_right_implementations_pass_under_any_seed(name):
    calls, number = Calls(RIGHT[name], "forward_kl"), 0
    for seed in SEEDS:
        for entry, found in drawn(seed):
            finding = worst_finding(entry, calls, found)
            assert finding is None or not finding.broken, (seed, entry.id, finding, found.code)
            number += 1
    assert number > len(SEEDS) * 2 * 30


def test_a_loss_below_zero_by_rounding_passes():
    lowest = []

    def slightly_below(*arguments):
        loss, gradient = right(*arguments)
        loss = loss - np.finfo(loss.dtype).eps
        lowest.append(loss.min())
        return loss, gradient

    assert falsify(slightly_below, max_examples=0).passed
    assert -1e-6 < min(lowest) < 0


# --- planted bugs ---------------------------------------------------------------------------------------------------


def first_counterexample(function, divergence="forward_kl"):
    """Of hand-picked cases alone, so that no seed has a say."""
    for entry in selected(divergence)[0]:
        result = try_one(entry, function, divergence=divergence, max_examples=0)
        if not result.passed:
            return result
    return None


def shown(snippet, function):
    """What the two lines give."""
    first, second = snippet.splitlines()
    scope = {"loss_and_gradient": function}
    exec(first, scope)
    return eval(second, scope)


#: Of whose results the second line takes a part that is not there.
UNPACKED = ("nothing", "loss alone")


def same(a, b):
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(same, a, b))
    if type(a) is not type(b) or a is None:
        return a is b
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and np.array_equal(a, b, equal_nan=True)


@pytest.mark.parametrize("name", BUGS)
def test_each_planted_bug_is_falsified_with_a_counterexample_that_shows_it(name):
    result = first_counterexample(BUGS[name])
    assert result is not None
    assert not result.measured <= result.allowed
    assert result.snippet in result.counterexample
    assert len(result.counterexample) < 1500
    with np.errstate(all="ignore"):
        try:
            found = shown(result.snippet, BUGS[name])
        except Exception as error:
            assert f"It raised {type(error).__name__}" in result.counterexample or name in UNPACKED
            return
        try:
            expected = shown(result.snippet, right)
        except IndexError:
            assert "-100" in result.snippet  # which the right one refuses
        else:
            assert not same(found, expected)


def test_a_call_that_fails_in_one_way_is_told_once():
    report = falsify(lambda s, t, y, T, a: (1.0, s, 2), features=["float64", "distillation"], max_examples=0)
    assert len(report.failed) > 5
    text = report.text(passed=False)
    assert text.count("It must return (loss, gradient), got tuple of 3") == 1
    assert text.count("As F-KD-FORM: it must return (loss, gradient), got tuple of 3") == len(report.failed) - 1
    assert report._repr_html_().count("As F-KD-FORM") == len(report.failed) - 1
    assert all("loss_and_gradient(s, t, y, T, a)" in result.counterexample for result in report.failed)


def test_there_are_enough_bugs():
    assert len(BUGS) > 120 and len(RIGHT) >= 8


@pytest.mark.parametrize("name", BUGS_OF)
def test_each_planted_bug_of_another_divergence_is_falsified(name):
    divergence, function = BUGS_OF[name]
    assert first_counterexample(function, divergence) is not None


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("name", ["NoTSquaredInTheLoss", "probabilities of at least 1e-10"])
def test_seeds_agree(name, seed):
    report = falsify(BUGS[name], seed=seed, max_examples=2)
    hand_picked = failed_by(name)
    assert hand_picked and hand_picked <= {result.id for result in report.failed}


@pytest.mark.parametrize(
    ("name", "by", "not_by"),
    [
        # A gradient and a loss that are wrong alike are consistent, and the other way round.
        ("ReverseLossForwardGradient", {"F-KD-DERIVATIVE", "F-KD-FORWARD-KL-004"}, {"F-KD-GRADIENT-64", "F-KD-FORM"}),
        ("ReverseKL", {"F-KD-FORWARD-KL-001"}, {"F-KD-DERIVATIVE", "F-KD-FORWARD-KL-003", "F-KD-LARGE-T"}),
        ("NoTSquared", {"F-KD-FORWARD-KL-006", "F-KD-GRADIENT-T", "F-KD-LARGE-T"}, {"F-KD-DERIVATIVE"}),
        ("NoTSquaredInTheLoss", {"F-KD-FORWARD-KL-006", "F-KD-DERIVATIVE"}, {"F-KD-GRADIENT-T", "F-KD-GRADIENT-64"}),
        ("alpha weighs the divergence", {"F-KD-FORWARD-KL-005"}, {"F-KD-DERIVATIVE", "F-KD-ALPHA-LINEAR"}),
        ("gradient of the mean", {"F-KD-ROWS", "F-KD-SPLIT"}, {"F-KD-LOSS-64", "F-KD-ROW-SUM"}),
        ("WrongAxis", {"F-KD-ROWS"}, {"F-KD-FORM"}),
        ("labels off by one", {"F-KD-FORWARD-KL-005"}, {"F-KD-ALPHA-0", "F-KD-DERIVATIVE"}),
        ("float32 gradients in float16", {"F-KD-GRADIENT-32"}, {"F-KD-LOSS-32", "F-KD-GRADIENT-64"}),
        ("float32 losses in float16", {"F-KD-LOSS-32"}, {"F-KD-GRADIENT-32", "F-KD-LOSS-64"}),
        ("NegatedGradient", {"F-KD-DESCENT", "F-DISTILL-STUDENT-001"}, {"F-KD-LOSS-64"}),
        ("NoEntropyOfTheTeacher", {"F-KD-FORWARD-KL-003"}, {"F-KD-DERIVATIVE"}),
        ("student shifted in place", {"F-KD-PURE", "F-KD-PURE-INF"}, EVERYTHING - {"F-KD-PURE", "F-KD-PURE-INF"}),
        ("gradient in shared scratch memory", {"F-KD-REPEATABLE"}, EVERYTHING - {"F-KD-REPEATABLE"}),
        ("teacher cached by identity", {"F-KD-REPEATABLE"}, EVERYTHING - {"F-KD-REPEATABLE"}),
        ("KL over the top 1000", {"F-KD-LARGE-V"}, {"F-KD-LOSS-64", "F-KD-LARGE-LOGITS"}),
        ("loss of at most 700.0", {"F-KD-CONFIDENT", "F-KD-LARGE-LOGITS"}, {"F-KD-LOSS-64"}),
        ("infinite losses become large", {"F-KD-SUPPORT-STUDENT", "F-KD-SUPPORT-LABEL"}, {"F-KD-SUPPORT-SHARED"}),
        ("zero times infinity", {"F-KD-SUPPORT-ALPHA"}, {"F-KD-SUPPORT-STUDENT"}),
        ("NaN of one class", {"F-KD-SINGLE-CLASS"}, {"F-KD-LOSS-64", "F-KD-FORM"}),
        ("rows after the 1024th are zero", {"F-KD-MANY-ROWS", "F-KD-ROWS"}, {"F-KD-LOSS-64"}),
        ("masked in the loss, not in the gradient", {"F-KD-MASK-CONSISTENT"}, {"F-KD-DERIVATIVE", "F-KD-FORM"}),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(name, by, not_by):
    for identity in by | not_by:
        assert try_one(REGISTRY[identity], BUGS[name], max_examples=0).passed is (identity in not_by), identity


def test_a_counterexample_keeps_the_term_that_its_statement_is_about():
    """The shrinker prefers alpha = 0, where no label counts: a NaN of the divergence alone would do for it."""

    def without_where(s, t, y, T, alpha):  # as frameworks have it: -inf less -inf is NaN
        loss, gradient = right(s, t, y, T, alpha)
        shared = ((s == -np.inf) & (t == -np.inf)).any(axis=-1)
        return np.where(shared, np.nan, loss), gradient

    case = try_one(REGISTRY["F-KD-SUPPORT-LABEL"], without_where, max_examples=0).case
    assert case.alpha > 0 and case.student[0, case.labels[0]] == -np.inf
    assert try_one(REGISTRY["F-KD-SUPPORT-SHARED"], without_where, max_examples=0).case.alpha == 0
    for identity in ("F-KD-SUPPORT-TEACHER", "F-KD-SUPPORT-STUDENT", "F-KD-SUPPORT-EACH"):
        assert try_one(REGISTRY[identity], without_where, max_examples=0).passed


def test_every_falsifier_but_for_masks_refutes_some_bug():
    """None is there that cannot fail: each refutes one of a few implementations."""
    entries, _ = selected("forward_kl", [*FEATURES, *OPTIONAL])
    everything_wrong = (
        BUGS["noise"],
        BUGS["student shifted in place"],
        lambda s, t, y, T, a: (np.full(len(s), -1.0), np.full(s.shape, np.arange(s.shape[1]), float)),
        lambda s, t, y, T, a: (np.nan_to_num(np.abs(t).sum(axis=-1)).astype(s.dtype), np.nan_to_num(s) + len(s)),
        BUGS["masked in the loss, not in the gradient"],
        BUGS["UniformWhereNotFinite"],
        lambda s, t, y, T, a: (np.full(len(s), np.nan), np.full(s.shape, np.nan)),
        BUGS["ReverseLossForwardGradient"],
        BUGS["NegatedGradient"],
        right,
    )
    for entry in entries:
        features = [*FEATURES, *OPTIONAL]
        assert any(
            not try_one(entry, function, features=features, max_examples=0).passed for function in everything_wrong
        ), entry.id


def test_counterexamples_are_small_and_round():
    result = failed(BUGS["NoTSquared"])["F-KD-FORWARD-KL-001"]
    assert result.case.shape == (1, 2) and result.case.temperature == 2.0
    assert set(np.abs(np.r_[result.case.student, result.case.teacher]).ravel()) <= {0.0, 1.0}
    assert "T² KL(p || q) is" in result.counterexample
    reverse = failed(BUGS["ReverseKL"])["F-KD-FORWARD-KL-001"]
    assert "it is the other direction" in reverse.counterexample
    wide = failed(BUGS["classes after the last whole chunk of 65536"])["F-KD-LARGE-V"]
    assert wide.case.shape == (1, 65537) and "np.repeat" in wide.snippet and len(wide.snippet) < 400


# --- whatever an implementation does --------------------------------------------------------------------------------


def exits(*_):
    sys.exit(3)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda *_: 1 // 0, "It raised ZeroDivisionError: integer division or modulo by zero."),
        (exits, "It raised SystemExit: 3."),
        (lambda s, *_: None, r"It must return (loss, gradient), got NoneType."),
        (lambda s, *_: (s.sum(axis=-1), s, s), r"It must return (loss, gradient), got tuple of 3."),
        (lambda s, *_: (0.5, s), "The loss must have the shape (1,), got (); for the mean over a batch see"),
        (lambda s, *_: (s.sum(axis=-1), s.sum(axis=-1)), "The gradient must have the shape (1, 4), got (1,)."),
        (lambda s, *_: (s.sum(axis=-1), s.astype(int)), "The gradient must be of a float dtype, got int64."),
        (lambda s, *_: (s.sum(axis=-1), s.astype(np.float32)), "The gradient of float64 logits is float32."),
        (lambda s, *_: (s.sum(axis=-1), object()), "The gradient must be of a float dtype, got object."),
        (lambda s, *_: (s.sum(axis=-1) * np.nan, s), "The loss has 1 NaN."),
    ],
)
def test_misbehaviour_is_a_finding(function, words):
    result = try_one(REGISTRY["F-KD-FORM"], function, max_examples=0)
    assert not result.passed
    assert words in result.counterexample
    assert result.measured > 0 == result.allowed
    json.loads(falsify(function, features=SMALL, max_examples=0).to_json())


def test_warnings_of_the_implementation_are_its_own():
    def warns(*arguments):
        import warnings

        warnings.warn("slow", RuntimeWarning, stacklevel=1)
        return right(*arguments)

    assert try_one(REGISTRY["F-KD-FORM"], warns).passed


def test_one_may_interrupt():
    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        falsify(interrupted)


# --- claims ---------------------------------------------------------------------------------------------------------


def without_cross_entropy(s, t, y, T, alpha):
    assert alpha == 0
    return right(s, t, y, T, alpha)


def without_temperature(s, t, y, T, alpha):
    assert T == 1
    return right(s, t, y, T, alpha)


def in_float32(s, t, y, T, alpha):
    assert s.dtype == t.dtype == np.float32
    return right(s, t, y, T, alpha)


def in_float64(s, t, y, T, alpha):
    assert s.dtype == t.dtype == np.float64
    return right(s, t, y, T, alpha)


def hard_alone(s, t, y, T, alpha):
    assert alpha == 1
    return right(s, t, y, T, alpha)


def finite_alone(s, t, y, T, alpha):
    assert np.isfinite(s).all() and np.isfinite(t).all()
    return right(s, t, y, T, alpha)


def narrow(s, t, y, T, alpha):
    assert s.shape[1] <= 300
    return right(s, t, y, T, alpha)


def wide_enough(s, t, y, T, alpha):
    assert s.shape[1] > 1
    return right(s, t, y, T, alpha)


def few_rows(s, t, y, T, alpha):
    assert len(s) <= 256
    return right(s, t, y, T, alpha)


def bounded(s, t, y, T, alpha):
    assert np.abs(np.r_[s, t])[np.isfinite(np.r_[s, t])].max() < 2000
    return right(s, t, y, T, alpha)


@pytest.mark.parametrize(
    ("function", "feature"),
    [
        (without_cross_entropy, "cross_entropy"),
        (hard_alone, "distillation"),
        (without_temperature, "temperature"),
        (in_float32, "float64"),
        (in_float64, "float32"),
        (finite_alone, "neg_inf"),
        (bounded, "large_logits"),
        (narrow, "large_vocabulary"),
        (wide_enough, "single_class"),
        (few_rows, "large_batch"),
    ],
)
def test_what_is_not_claimed_is_not_held_against_anybody(function, feature):
    claimed = [name for name in FEATURES if name != feature]
    report = falsify(function, features=claimed, max_examples=1)
    assert report.passed, report.text(passed=False)
    assert report.not_claimed
    for result in report.not_claimed:
        assert result.passed is None and result.measured is None
        assert feature in REGISTRY[result.id].needs or REGISTRY[result.id].needs & set(OPTIONAL)
    assert not {result.id for result in report.results} & {result.id for result in report.not_claimed}
    assert f"{report.not_claimed[0].id:<24} not claimed" in str(report)
    assert first_counterexample(function) is not None  # where it is claimed, it is


def test_masks_count_when_they_are_claimed():
    def masked(s, t, y, T, alpha):
        keep = (y != -100) & (y != -7)
        s, t = (np.where(keep[:, None], x, x.dtype.type(0)) for x in (s, t))
        loss, gradient = right(s, t, np.where(keep, y, 0), T, alpha)
        return loss * keep, gradient * keep[:, None]

    def read(s, t, y, T, alpha):
        keep = y != -100
        loss, gradient = right(s, t, np.where(keep, y, 0), T, alpha)
        return loss * keep, gradient * keep[:, None]

    claimed = [*FEATURES, "ignore_index"]
    assert falsify(masked, features=claimed, max_examples=5).passed
    assert falsify(masked, max_examples=0).passed
    assert set(failed(read, features=claimed)) == {"F-KD-IGNORE-UNREAD"}
    assert {"F-KD-IGNORE", "F-KD-IGNORE-UNREAD"} <= set(failed(right, features=claimed))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"divergence": "hellinger"}, "divergence must be one of 'forward_kl'"),
        ({"features": ["gpu"]}, "features must be one of 'cross_entropy'.*'ignore_index', got 'gpu'"),
        ({"features": ["neg_inf", "cross_entropy"]}, "features must have float64 or float32"),
        ({"features": "float64"}, "features must have cross_entropy or distillation"),
        ({"max_examples": -1}, "max_examples must be"),
        ({"seed": 0.5}, "seed must be"),
    ],
)
def test_wrong_questions_are_errors(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        falsify(right, **options)


def test_what_is_not_callable_is_an_error():
    with pytest.raises(kdcore.DTypeError, match="loss_and_gradient must be callable, got int"):
        falsify(7)


# --- the report -----------------------------------------------------------------------------------------------------


def test_report():
    report = falsify(BUGS["NoTSquared"], max_examples=1, seed=5, features=SMALL)
    text, html, data = str(report), report._repr_html_(), json.loads(report.to_json())
    assert report.summary() in text and "falsified by" in report.summary()
    for result in report.failed:
        assert result.id in text and result.statement in text and result.snippet.splitlines()[1] in text
        assert result.id in html
    assert "KL(p || q) of the teacher&#x27;s p" in html and "<script" not in html
    assert "\033[" not in text and "\033[31m" in report.text(color=True)
    assert data["failed"] == [result.id for result in report.failed]
    assert data["passed"] is False and data["seed"] == 5 and data["features"] == sorted(SMALL)
    assert len(data["results"]) == len(report.results)
    assert {entry["passed"] for entry in data["not_claimed"]} == {None}
    listed = report.text(passed=False)
    assert "✓" in text and "✓" not in listed and "✗" in listed


def test_json_has_no_numbers_that_json_does_not_have():
    report = falsify(lambda s, *_: (np.full(len(s), np.nan), np.full(s.shape, np.inf)), features=SMALL, max_examples=0)
    measured = {entry["measured"] for entry in json.loads(report.to_json(), parse_constant=pytest.fail)["results"]}
    assert "nan" in measured and "inf" in measured


# --- the registry, the textbook, the cases --------------------------------------------------------------------------


def test_registry():
    for identity, entry in REGISTRY.items():
        assert entry.id == identity and identity.startswith("F-")
        assert entry.statement.endswith(".") and entry.reference
        assert set(entry.fixtures) <= set(FIXTURES) and entry.fixtures
        assert entry.check.__module__ == "kdcore.testing.falsifiers"
    for wanted in ("F-DISTILL-KDSTEP-001", "F-DISTILL-STUDENT-002", *(f"F-KD-FORWARD-KL-00{n}" for n in range(1, 7))):
        assert wanted in REGISTRY
    with pytest.raises(kdcore.DomainError, match="'F-KD-FORM' is registered already"):
        falsifier("F-KD-FORM", "Again.", reference="", fixtures=())(lambda calls, found: iter(()))
    with pytest.raises(kdcore.DomainError, match="needs must be features, got gpu"):
        falsifier("F-NEW", "New.", reference="", fixtures=(), needs=("gpu",))(lambda calls, found: iter(()))
    assert "F-NEW" not in REGISTRY


@given(cases(supports=SUPPORTS, scales=(0.1, 3.0, 100.0, 1e4)), st.sampled_from(divergences.NAMES))
@settings(max_examples=300)
def test_the_shipped_textbook_agrees_with_the_oracle(found, divergence):
    arguments = found.student, found.teacher, found.labels, found.temperature, found.alpha
    expected = oracle.kd(*arguments, divergence=divergence, reduction="none")
    exact, judged = textbook.kd_rows(*arguments, divergence), found.judged(divergence)
    assert within(exact.loss, expected.loss, 1e-3 * judged.loss).all()
    np.testing.assert_array_equal(np.isnan(exact.gradient), np.isnan(expected.gradient))
    error = np.sqrt(np.square(exact.gradient - expected.gradient).sum(axis=-1))
    assert (np.isnan(error) | (error <= 1e-3 * judged.gradient)).all()


def test_hand_picked_cases_are_usable_and_print_as_they_are():
    for name, fixture in FIXTURES.items():
        for found in fixture():
            B, V = found.shape
            assert found.teacher.shape == (B, V) and found.labels.shape == (B,)
            assert ((found.labels >= 0) & (found.labels < V)).all()
            if name != "not finite":
                assert np.isfinite(found.student).any(axis=-1).all() and np.isfinite(found.teacher).any(axis=-1).all()
            scope = {"np": np}
            exec(found.code, scope)
            for letter, array in zip("sty", found.arguments, strict=False):
                assert scope[letter].dtype == array.dtype
                np.testing.assert_array_equal(scope[letter], array)
            assert (scope["T"], scope["a"]) == (found.temperature, found.alpha)


def test_bounds_are_the_contracts_for_small_logits():
    """What is added to them is nothing where logits are small and few."""
    small = case([0.1, -0.2], [0.3, 0.1], 0, 1.0, 0.3)
    judged = small.judged("forward_kl")
    contract = judged.exact.bounds(small.student, small.teacher, 1.0, 0.3, "forward_kl")
    assert (contract.loss <= judged.loss).all() and (judged.loss <= 1.02 * contract.loss + 5e-16).all()
    assert (judged.gradient <= 1.02 * contract.gradient).all()


def test_errors_beyond_the_bounds_are_found():
    def beyond(part):
        def function(s, t, y, T, alpha):
            loss, gradient = right(s, t, y, T, alpha)
            found = case(s, t, y, T, alpha, s.dtype).judged("forward_kl")
            with np.errstate(invalid="ignore"):
                if part == "loss":
                    return loss + (1.5 * found.loss).astype(s.dtype), gradient
                size = (1.5 * found.gradient / np.sqrt(2))[:, None] * (np.arange(s.shape[1]) < 2)
                return loss, gradient + size.astype(s.dtype)

        return function

    assert {"F-KD-LOSS-64", "F-KD-LOSS-32"} <= set(failed(beyond("loss"), features=[*SMALL, "float32"]))
    assert {"F-KD-GRADIENT-64", "F-KD-GRADIENT-32"} <= set(failed(beyond("gradient"), features=[*SMALL, "float32"]))


# --- kdcore's own engines -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", divergences.NAMES)
def test_the_cpu_engine(divergence):
    """Masks included: kdcore claims everything."""
    report = falsify(
        adapters.kdcore_loss(divergence), divergence=divergence, features=[*FEATURES, *OPTIONAL], max_examples=5
    )
    assert report.passed, report.text(passed=False)
    assert not report.not_claimed
    assert report.name == "kdcore.kd_loss_and_gradient"


@pytest.mark.gpu
@pytest.mark.parametrize("divergence", ["forward_kl", "jsd"])
def test_the_cuda_engine(divergence):
    """A few of the hand-picked cases of each falsifier: in the simulator a launch takes as long as a thousand here."""
    from kdcore.engines import to_device, to_host

    calls = Calls(adapters.kdcore_loss(divergence, to_device=to_device, to_host=to_host), divergence)
    tried = 0
    for entry in selected(divergence, [*FEATURES, *OPTIONAL])[0]:
        small = [found for found in entry.cases() if found.student.size <= 12]
        for found in small[:: max(1, len(small) // 2)][:2]:
            finding = worst_finding(entry, calls, found)
            assert finding is None or not finding.broken, (entry.id, finding, found.code)
            tried += 1
    assert tried > 60


# --- adapters -------------------------------------------------------------------------------------------------------


def mean_of(function):
    def scalar(s, t, y, T, alpha):
        loss, gradient = function(s, t, y, T, alpha)
        return loss.mean(), gradient / len(loss)

    return scalar


ACCURACY = ("F-KD-FORM", "F-KD-LOSS-64", "F-KD-GRADIENT-64", "F-KD-ROWS")


def refuted(function, features=None):
    """Which of a few falsifiers refute it."""
    return [
        name for name in ACCURACY if not try_one(REGISTRY[name], function, features=features, max_examples=0).passed
    ]


def test_scalar_losses():
    assert not refuted(adapters.scalar_loss(mean_of(right)))

    def total(s, t, y, T, alpha):
        loss, gradient = right(s, t, y, T, alpha)
        return loss.sum(), gradient

    assert not refuted(adapters.scalar_loss(total, reduction="sum"))
    assert refuted(adapters.scalar_loss(total))  # which is no mean

    def of_elements(s, t, y, T, alpha):
        loss, gradient = right(s, t, y, T, alpha)
        return loss.mean() / s.shape[1], gradient / s.size

    assert not refuted(adapters.scalar_loss(of_elements, reduction="mean_of_elements"))

    def of_valid(s, t, y, T, alpha):
        keep = y != -100
        loss, gradient = right(s, t, np.where(keep, y, 0), T, alpha)
        return (loss * keep).sum() / max(keep.sum(), 1), gradient * keep[:, None] / max(keep.sum(), 1)

    for reduction in ("mean", "mean_of_valid"):
        found = try_one(
            REGISTRY["F-KD-MASK-CONSISTENT"], adapters.scalar_loss(of_valid, reduction=reduction), max_examples=0
        )
        assert found.passed
    assert not try_one(
        REGISTRY["F-KD-IGNORE"], adapters.scalar_loss(of_valid), features=[*FEATURES, *OPTIONAL], max_examples=0
    ).passed  # refused: a mean over rows does not say
    assert try_one(
        REGISTRY["F-KD-IGNORE"],
        adapters.scalar_loss(of_valid, reduction="mean_of_valid"),
        features=[*FEATURES, *OPTIONAL],
        max_examples=0,
    ).passed

    def squares(s, t, y, T, alpha):  # of single rows right, of a batch not
        loss, gradient = right(s, t, y, T, alpha)
        return np.sqrt(np.square(loss).mean()), gradient / len(loss)

    assert "F-KD-ROWS" in refuted(adapters.scalar_loss(squares))
    assert "F-KD-FORM" in refuted(adapters.scalar_loss(right))
    with pytest.raises(
        kdcore.DomainError, match="reduction must be one of 'mean', 'sum', 'mean_of_elements', 'mean_of_valid'"
    ):
        adapters.scalar_loss(right, reduction="none")


def test_conventions():
    def theirs(t, s, y, T, kd_weight):
        """Teacher first, alpha weighs the distillation, no T²."""
        d, slope = right(s, t, y, T, 0.0)
        ce, hard = right(s, t, y, T, 1.0)
        if kd_weight == 0:
            return ce, hard
        if kd_weight == 1:
            return d / T**2, slope / T**2
        return kd_weight * d / T**2 + (1 - kd_weight) * ce, kd_weight * slope / T**2 + (1 - kd_weight) * hard

    mapped = adapters.conventions(theirs, alpha="distillation", scale_t2=False, teacher_first=True)
    report = falsify(mapped, max_examples=5)
    assert report.passed, report.text(passed=False)
    assert report.name.endswith("theirs")
    assert failed(theirs, features=SMALL)
    with pytest.raises(kdcore.DomainError, match="alpha must be one of"):
        adapters.conventions(theirs, alpha="kd")


def test_torch_losses():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    functional = torch.nn.functional
    torch.set_num_threads(1)  # many small operations, for which threads wait for each other

    def theirs(s, t, y, T, alpha):
        soft = functional.kl_div(
            functional.log_softmax(s / T, dim=-1), functional.log_softmax(t / T, dim=-1),
            log_target=True, reduction="none",
        ).sum(dim=-1)  # fmt: skip
        return alpha * functional.cross_entropy(s, y, reduction="none") + (1 - alpha) * T * T * soft

    finite = [name for name in FEATURES if name not in ("neg_inf", "large_batch")]
    report = falsify(adapters.torch_loss(theirs), max_examples=0, features=finite)
    assert report.passed, report.text(passed=False)
    shared = REGISTRY["F-KD-SUPPORT-SHARED"]
    assert not try_one(shared, adapters.torch_loss(theirs), max_examples=0).passed  # whose NaN is known

    def batchmean(s, t, y, T, alpha):
        return theirs(s, t, y, T, alpha).mean()

    def of_elements(s, t, y, T, alpha):
        """reduction="mean" of kl_div divides by B V."""
        return theirs(s, t, y, T, alpha).mean() / s.shape[1]

    assert not refuted(adapters.torch_loss(batchmean, reduction="mean"), finite)
    assert not refuted(adapters.torch_loss(of_elements, reduction="mean_of_elements"), finite)
    assert "F-KD-LOSS-64" in refuted(adapters.torch_loss(of_elements, reduction="mean"), finite)


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax", None)
    result = try_one(REGISTRY["F-KD-FORM"], adapters.jax_loss(right), max_examples=0)
    assert "MissingDependencyError: this adapter of kdcore.testing needs the package jax" in result.counterexample


# --- without Hypothesis, without pytest -----------------------------------------------------------------------------


def python(code, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, **options
    )


def test_hypothesis_and_pytest_are_imported_only_when_used():
    done = python("""
        import sys
        import kdcore.testing, kdcore.testing.plugin
        assert "numpy" not in sys.modules, "kdcore.testing.plugin is loaded in every run of pytest"
        from kdcore.testing import falsify
        falsify(lambda s, t, y, T, a: None, max_examples=0)
        heavy = {"hypothesis", "pytest", "numba", "torch", "h5py"} & set(sys.modules)
        assert not heavy, heavy
    """)
    assert done.returncode == 0, done.stderr


def test_without_hypothesis_there_is_a_clear_error():
    done = python("""
        import sys
        sys.modules["hypothesis"] = None
        from kdcore.testing import falsify
        falsify(lambda s, t, y, T, a: None, max_examples=0)
        for load in (lambda: falsify(lambda s, t, y, T, a: None), lambda: __import__("kdcore.testing.strategies")):
            try:
                load()
            except ImportError as error:
                assert "pip install kdcore[testing]" in str(error), error
            else:
                raise SystemExit("no error")
    """)
    assert done.returncode == 0, done.stderr


# --- under pytest ---------------------------------------------------------------------------------------------------

MODULE = """
import numpy as np

def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

def mine(s, t, y, T, alpha):
    log_p, log_q, log_h = log_softmax(t / T), log_softmax(s / T), log_softmax(s)
    rows = np.arange(len(y))
    hard = np.exp(log_h) - (np.arange(s.shape[1]) == y[:, None])
    kl = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)
    loss = -alpha * log_h[rows, y] + (1 - alpha) * T * T * kl
    return loss, alpha * hard + (1 - alpha) * T * (np.exp(log_q) - np.exp(log_p))

"""
TESTS = """
import pytest

FEATURES = ["cross_entropy", "distillation", "temperature", "float64"]

@pytest.mark.kdcore(features=FEATURES, max_examples=2)
def test_mine(kdcore_falsifier):
    kdcore_falsifier(mine)

@pytest.mark.kdcore(features=FEATURES, max_examples=0)
def test_reversed(kdcore_falsifier):
    kdcore_falsifier(lambda s, t, y, T, alpha: mine(t, s, y, T, alpha))

def test_other():
    assert True
"""


def pytest_run(folder, *options):
    (folder / "test_mine.py").write_text(MODULE + TESTS, encoding="utf-8")
    (folder / "pytest.ini").write_text(
        "[pytest]\naddopts = --strict-markers\nfilterwarnings = error\n", encoding="utf-8"
    )
    return alone("-q", "-rfs", "--no-header", *options, str(folder))


def alone(*arguments):
    """pytest with this plugin and no other, whether or not kdcore is installed."""
    command = [sys.executable, "-m", "pytest", "-p", "kdcore.testing.plugin", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_plugin(tmp_path):
    done = pytest_run(tmp_path)
    entries, left = selected("forward_kl", ["cross_entropy", "distillation", "temperature", "float64"])
    text = done.stdout
    assert done.returncode == 1, text + done.stderr
    assert f"{2 * len(left)} skipped" in text
    assert "FAILED" in text and "test_reversed[F-KD-FORWARD-KL-001]" in text
    assert "test_mine[" not in text.split("short test summary")[1].replace("SKIPPED", "")
    assert "import numpy as np; s, t, y, T, a = " in text  # the counterexample
    assert "not claimed" in text
    passed = int(text.split(" passed")[0].split(",")[-1])
    assert len(entries) + 1 <= passed < 2 * len(entries) + 1


def test_plugin_is_idle_unless_asked(tmp_path):
    done = pytest_run(tmp_path, "-k", "other")
    assert done.returncode == 0 and "1 passed" in done.stdout
    (tmp_path / "test_mine.py").write_text("import sys\ndef test_idle(): assert 'numpy' not in sys.modules\n")
    done = alone("-q", str(tmp_path / "test_mine.py"))
    assert done.returncode == 0, done.stdout


# --- on the command line --------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "their_losses.py").write_text(MODULE + "\nnumber = 7\nreversed_ = lambda s, t, *r: mine(t, s, *r)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "their_losses", raising=False)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    return "their_losses"


CLAIMED = "--features=cross_entropy,distillation,temperature,float64"


def test_command(module, capsys):
    assert main(["falsify", f"{module}:mine", CLAIMED, "--max-examples", "1", "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "their_losses.mine (forward_kl): not falsified by any of" in out and "\033[" not in out
    assert main(["falsify", f"{module}:reversed_", CLAIMED, "--max-examples", "0", "--failures"]) == 1
    out = capsys.readouterr().out
    assert "✗ F-KD-FORWARD-KL-001" in out and "✓" not in out
    assert (
        main(["falsify", f"{module}:mine", "--divergence", "reverse_kl", CLAIMED, "--max-examples", "0", "--json"]) == 1
    )
    data = json.loads(capsys.readouterr().out)
    assert data["divergence"] == "reverse_kl" and "F-KD-LOSS-64" in data["failed"]
    assert main(["falsify", f"{module}:mine", "--features=-neg_inf", "--max-examples", "0", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert set(data["features"]) == set(FEATURES) - {"neg_inf"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["no_such_module:f"], "no_such_module cannot be imported: ModuleNotFoundError"),
        (["their_losses"], "MODULE:FUNCTION must be like package.module:function, got 'their_losses'"),
        (["their_losses:nothing"], "their_losses:nothing: module 'their_losses' has no attribute 'nothing'"),
        (["their_losses:number"], "their_losses:number must be a function, got int"),
        (["their_losses:mine", "--divergence", "l2"], "divergence must be one of"),
        (["their_losses:mine", "--features", "speed"], "features must be one of"),
        (["their_losses:mine", "--features=-speed"], "no feature is called speed"),
        (["their_losses:mine", "--adapter", "mxnet"], "--adapter must be one of"),
        (["their_losses:mine", "--seed", "-1"], "seed must be"),
    ],
)
def test_a_wrong_command_is_2(module, capsys, arguments, words):
    assert main(["falsify", *arguments]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and not captured.out


def test_right_is_right():
    """The implementation that bugs are planted in, against the oracle."""
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 5))
    expected = oracle.kd(s, t, [0, 1, 4], 1.7, 0.3, reduction="none")
    loss, gradient = Right()(s, t, np.array([0, 1, 4]), 1.7, 0.3)
    np.testing.assert_allclose(loss, expected.loss.astype(float), rtol=1e-13)
    np.testing.assert_allclose(gradient, expected.gradient.astype(float), rtol=1e-12)
