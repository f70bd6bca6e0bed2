"""Mergeable states of rows: whatever way a vocabulary is cut, the pieces give the loss and gradient of the whole."""

from __future__ import annotations

import itertools
import pickle
from functools import partial, reduce

import numpy as np
import pytest
from comparisons import assert_answer, same_bits
from hypothesis import given, strategies as st
from strategies import BFLOAT16, SCALES, SHAPES, alphas, narrowed, row, rule_out, seeds, temperatures

import kdcore
from kdcore.cuda.presence import available
from kdcore.testing import bounds

FLOAT32, FLOAT64, FLOAT16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16)
#: Student and teacher. Each pair is compiled: every dtype, one mixture.
PAIRS = [(FLOAT32, FLOAT32), (FLOAT64, FLOAT64), (FLOAT16, FLOAT16), (FLOAT32, BFLOAT16)]
names = pytest.mark.parametrize("dtypes", PAIRS, ids=lambda pair: "-".join(dtype.name for dtype in pair))

#: The kernels cut a row at multiples of 4096 themselves.
VOCABULARIES = [2, 3, 5, 17, 33, 257, 1025, 4095, 4096, 4097, 8193, 9000]
CUTS = [1, 2, 16, 4095, 4096, 4097, 8192]


def slices_of(classes, cuts):
    """The pieces of a vocabulary that is cut before these classes."""
    return [slice(lo, hi) for lo, hi in itertools.pairwise([0, *sorted(cuts), classes])]


@st.composite
def cut_problems(draw, dtypes):
    """Arguments and options of a KD call, and the pieces of its vocabulary."""
    rng = np.random.default_rng(draw(seeds))
    B, V = int(rng.integers(1, 4)), draw(st.sampled_from(VOCABULARIES))
    edges = [cut for cut in (*CUTS, V - 1) if 0 < cut < V]
    cuts = draw(st.sets(st.one_of(st.sampled_from(edges), st.integers(1, V - 1)), min_size=1, max_size=6))
    parts = slices_of(V, cuts)

    kinds = [(rng.choice(SHAPES), rng.choice(SCALES)) for _ in range(2)]
    student, teacher = (np.stack([row(rng, shape, scale, V) for _ in range(B)]) for shape, scale in kinds)
    if kinds[1][0] == "agree":
        teacher = student + rng.choice([0.0, 1e-4, 0.1]) * rng.normal(size=teacher.shape)
    for i in range(B):
        support = rng.choice(["all", "shared", "teacher", "student"])
        gone = parts[rng.integers(len(parts))] if rng.random() < 0.5 else None
        for x in {"all": [], "shared": [student, teacher], "teacher": [teacher], "student": [student]}[support]:
            if gone is None:
                rule_out(rng, x[i])
            else:
                x[i, gone] = -np.inf  # a whole slice
    student += rng.choice([0.0, 0.0, 1e4, -1e4])
    teacher += rng.choice([0.0, 0.0, 1e4, -1e4])
    student, teacher = narrowed(student, dtypes[0]), narrowed(teacher, dtypes[1])

    alpha = draw(alphas)
    options = {"reduction": str(rng.choice(["mean", "sum", "none"])), "scale_t2": bool(rng.random() < 0.7)}
    if rng.random() < 0.5:
        options["weights"] = np.where(rng.random(B) < 0.3, 0.0, rng.uniform(0.01, 10.0, B))
    if options["reduction"] == "mean" and rng.random() < 0.3:
        options["denominator"] = float(rng.uniform(0.5, 100.0))
    labels = None
    if alpha > 0 or rng.random() < 0.5:
        labels = rng.integers(V, size=B)
        options["ignore_index"] = int(rng.choice([-100, -1, 0]))
        masked = rng.random(B) < 0.2
        labels[masked] = options["ignore_index"]
        student[masked], teacher[masked] = np.nan, np.inf  # padding
    if draw(st.booleans()):
        options["teacher_temperature"] = draw(temperatures)
    return (student, teacher, labels, draw(temperatures), alpha), options, parts


def states_of(student, teacher, labels, temperature, parts, options):
    """The state of each slice."""
    of_state = {name: options[name] for name in ("teacher_temperature", "ignore_index", "threads") if name in options}
    return [
        kdcore.kd_state(student[..., part], teacher[..., part], labels, temperature, start=part.start, **of_state)
        for part in parts
    ]


def from_state(state, student, teacher, labels, alpha, parts, options):
    """The KDOutput of a merged state, its gradient put together from those of the slices."""
    options = {name: value for name, value in options.items() if name != "teacher_temperature"}
    gradients = [
        kdcore.kd_gradient_from_state(
            state, student[..., part], None if teacher is None else teacher[..., part], labels, alpha,
            start=part.start, **options,
        )
        for part in parts
    ]  # fmt: skip
    options.pop("threads", None)
    result = kdcore.kd_loss_from_state(state, labels, alpha, **options)
    assert result.gradient is None
    return result._replace(gradient=np.concatenate(gradients, axis=-1))


def in_parts(student, teacher, labels, temperature, alpha, parts, **options):
    """kd_loss_and_gradient from the states of slices."""
    state = reduce(kdcore.merge_states, states_of(student, teacher, labels, temperature, parts, options))
    return from_state(state, student, teacher, labels, alpha, parts, options)


def assert_like_the_whole(result, student, teacher, labels, temperature, alpha, **options):
    """Within the bounds of the oracle, and of kd_loss_and_gradient: each may be off by its own bound."""
    assert_answer(result, student, teacher, labels, temperature, alpha, **options)
    whole = kdcore.kd_loss_and_gradient(student, teacher, labels, temperature, alpha, **options)
    size = {"temperature": temperature, "alpha": alpha, "scale_t2": options.get("scale_t2", True)}
    read = np.ones(student.shape[:-1], bool) if labels is None else labels != options.get("ignore_index", -100)
    weights = np.where(read, options.get("weights", 1.0), 0.0)
    scale = weights
    if options.get("reduction", "mean") == "mean" and weights.any():
        scale = weights / options.get("denominator", weights.sum())
    if options.get("reduction", "mean") != "none":
        scale = scale.sum()
    for name in ("loss", "ce", "kl"):
        actual, expected = getattr(result, name), getattr(whole, name)
        assert (actual is None) == (expected is None)
        if actual is not None:
            part = {**size, "alpha": {"loss": alpha, "ce": 1.0, "kl": 0.0}[name]}
            limit = 2 * bounds.loss_bound(student.dtype, expected, scale=scale, **part)
            assert bounds.within(actual, expected, limit).all(), name
    assert result.gradient.dtype == whole.gradient.dtype == student.dtype


# --- the whole -----------------------------------------------------------------------------------------------------


@names
@given(st.data())
def test_however_the_vocabulary_is_cut(dtypes, data):
    arguments, options, parts = data.draw(cut_problems(dtypes))
    assert_like_the_whole(in_parts(*arguments, parts, **options), *arguments, **options)


@given(st.data(), seeds)
def test_merging_is_commutative_and_associative(data, seed):
    (student, teacher, labels, temperature, alpha), options, parts = data.draw(cut_problems((FLOAT32, FLOAT32)))
    states = states_of(student, teacher, labels, temperature, parts, options)
    for a, b in itertools.combinations(states, 2):
        same_bits(kdcore.merge_states(a, b).values, kdcore.merge_states(b, a).values)

    first = reduce(kdcore.merge_states, states)
    rng = np.random.default_rng(seed)
    while len(states) > 1:  # any two, in any order, until one is left
        i, j = rng.choice(len(states), 2, replace=False)
        rest = [state for k, state in enumerate(states) if k not in (i, j)]
        states = [*rest, kdcore.merge_states(states[i], states[j])]
    (other,) = states
    options = {name: value for name, value in options.items() if name != "teacher_temperature"}
    options["reduction"] = "none"
    options.pop("denominator", None)
    expected, actual = (kdcore.kd_loss_from_state(state, labels, alpha, **options).loss for state in (first, other))
    # What is merged is the same, and merging is float64.
    limit = bounds.loss_bound(
        FLOAT64, expected, temperature=temperature, alpha=alpha, scale_t2=options["scale_t2"],
        scale=options.get("weights", 1.0),
    )  # fmt: skip
    assert bounds.within(actual, expected, limit).all()


def test_merging_zeros_of_either_sign():
    # The larger of 0.0 and -0.0 is a matter of their order.
    a, b = (kdcore.kd_state(np.array([zero, -1.0]), np.array([zero, -2.0]), 0, 1.0) for zero in (0.0, -0.0))
    same_bits(kdcore.merge_states(a, b).values, kdcore.merge_states(b, a).values)


def test_a_slice_without_support_changes_nothing():
    student, teacher, labels, _ = inputs()
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    nothing = np.full((4, 3), -np.inf, np.float32)
    for neutral in (
        kdcore.kd_state(nothing, nothing, labels, 2.0, start=50),
        kdcore.kd_state(student, teacher, np.full(4, -100), 2.0),
    ):
        for merged in (kdcore.merge_states(state, neutral), kdcore.merge_states(neutral, state)):
            np.testing.assert_array_equal(merged.values, state.values)


# --- arguments -----------------------------------------------------------------------------------------------------


PARTS = slices_of(50, [1, 20, 21, 40])


def inputs(rows=4, dtype=FLOAT32):
    """Logits of 50 classes, a label in each of several slices, weights."""
    rng = np.random.default_rng(rows)
    student, teacher = (narrowed(rng.normal(size=(rows, 50)) * 4, dtype) for _ in range(2))
    return student, teacher, np.resize([0, 20, 39, 49], rows), rng.uniform(0.1, 2, rows)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0])
def test_arguments(temperature, alpha):
    student, teacher, labels, weights = inputs()
    labels[1] = 7
    for teacher_temperature, scale_t2, masked, weighted, (reduction, denominator) in itertools.product(
        (None, 1.5),
        (True, False),
        (False, True),
        (False, True),
        (("mean", None), ("mean", 3.0), ("sum", None), ("none", None)),
    ):
        options = {"scale_t2": scale_t2, "reduction": reduction, "ignore_index": 7 if masked else -100}
        if teacher_temperature is not None:
            options["teacher_temperature"] = teacher_temperature
        if weighted:
            options["weights"] = weights * [1, 1, 0, 1]
        if denominator is not None:
            options["denominator"] = denominator
        result = in_parts(student, teacher, labels, temperature, alpha, PARTS, **options)
        assert_like_the_whole(result, student, teacher, labels, temperature, alpha, **options)


def test_the_gradient_is_the_derivative_of_the_loss():
    student, teacher, labels, weights = inputs(dtype=FLOAT64)
    compute = partial(in_parts, parts=PARTS, teacher_temperature=1.5, weights=weights, scale_t2=False)
    gradient = compute(student, teacher, labels, 2.0, 0.3).gradient
    step = 1e-5
    for i, v in [(0, 0), (0, 1), (1, 20), (2, 39), (3, 40), (3, 49)]:
        losses = []
        for sign in (1, -1):
            moved = student.copy()
            moved[i, v] += sign * step
            losses.append(compute(moved, teacher, labels, 2.0, 0.3).loss)
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(gradient[i, v], abs=1e-9)
        assert abs(gradient[i, v]) > 1e-5


def test_the_label_may_lie_in_any_slice():
    student, teacher, _, _ = inputs()
    for label in (0, 1, 19, 20, 21, 39, 40, 49):
        labels = np.full(4, label)
        result = in_parts(student, teacher, labels, 2.0, 1.0, PARTS)
        assert_like_the_whole(result, student, teacher, labels, 2.0, 1.0)
        part = next(k for k, part in enumerate(PARTS) if part.start <= label < part.stop)
        for k, state in enumerate(states_of(student, teacher, labels, 2.0, PARTS, {})):
            np.testing.assert_array_equal(state.values[:, 4], student[:, label] if k == part else -np.inf)


def test_a_label_that_the_student_rules_out():
    student, teacher, labels, _ = inputs()
    student[1, 20] = -np.inf
    teacher[1, 20] = -np.inf
    result = in_parts(student, teacher, labels, 2.0, 0.3, PARTS, reduction="none")
    assert_like_the_whole(result, student, teacher, labels, 2.0, 0.3, reduction="none")
    assert np.isposinf(result.ce[1]) and np.isfinite(result.gradient).all()


def test_a_class_that_only_the_student_rules_out():
    student, teacher, labels, _ = inputs()
    student[1, 40:] = -np.inf  # a whole slice
    student[2, 1] = -np.inf
    result = in_parts(student, teacher, labels, 2.0, 0.0, PARTS, reduction="none")
    assert_like_the_whole(result, student, teacher, labels, 2.0, 0.0, reduction="none")
    np.testing.assert_array_equal(np.isposinf(result.kl), [False, True, True, False])
    assert np.isfinite(result.gradient).all()


def test_masked_rows_are_not_read():
    student, teacher, labels, weights = inputs()
    labels[2] = -100
    before = in_parts(student, teacher, labels, 2.0, 0.3, PARTS, weights=weights, reduction="none")
    student[2], teacher[2] = np.nan, np.inf
    after = in_parts(student, teacher, labels, 2.0, 0.3, PARTS, weights=weights, reduction="none")
    for name in ("loss", "gradient", "ce", "kl"):
        same_bits(getattr(after, name), getattr(before, name))
        np.testing.assert_array_equal(getattr(after, name)[2], 0.0)


def test_nothing_unmasked():
    student, teacher, _, _ = inputs()
    for options in ({}, {"denominator": 2.0}, {"weights": np.zeros(4)}):
        labels = np.full(4, 3 if "weights" in options else -100)
        result = in_parts(student, teacher, labels, 2.0, 0.3, PARTS, **options)
        assert result.loss == result.ce == result.kl == 0.0
        np.testing.assert_array_equal(result.gradient, 0.0)


def test_labels_without_cross_entropy_only_mask():
    student, teacher, labels, _ = inputs()
    labels[0] = -100
    result = in_parts(student, teacher, labels, 2.0, 0.0, PARTS)
    assert result.ce is None
    kept = in_parts(student[1:], teacher[1:], None, 2.0, 0.0, PARTS)
    assert result.loss == pytest.approx(kept.loss, rel=1e-14)
    assert in_parts(student, teacher, None, 2.0, 0.0, PARTS).ce is None


def test_the_gradient_of_cross_entropy_alone_needs_no_teacher():
    student, teacher, labels, _ = inputs()
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    expected = kdcore.kd_gradient_from_state(state, student, teacher, labels, 1.0)
    same_bits(kdcore.kd_gradient_from_state(state, student, np.full_like(teacher, np.nan), labels, 1.0), expected)
    same_bits(kdcore.kd_gradient_from_state(state, student, None, labels, 1.0), expected)
    assert kdcore.kd_loss_from_state(state, labels, 1.0).kl is None


def test_one_row():
    student, teacher, labels, weights = inputs()
    result = in_parts(student[1], teacher[1], 20, 2.0, 0.3, PARTS, weights=weights[1], reduction="sum")
    batch = in_parts(student[1:2], teacher[1:2], labels[1:2], 2.0, 0.3, PARTS, weights=weights[1:2], reduction="none")
    assert np.ndim(result.loss) == 0 and result.gradient.shape == (50,)
    same_bits(result.gradient, batch.gradient[0])
    same_bits(result.loss, batch.loss[0])
    assert np.ndim(in_parts(student[1], teacher[1], 20, 2.0, 0.3, PARTS, reduction="none").loss) == 0


@pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
def test_no_rows(lead):
    logits = np.empty((*lead, 50), np.float32)
    labels = np.empty(lead, np.int64)
    for reduction in ("mean", "sum", "none"):
        result = in_parts(logits, logits, labels, 2.0, 0.3, PARTS, reduction=reduction)
        np.testing.assert_array_equal(result.loss, np.zeros(lead) if reduction == "none" else 0.0)
        assert result.gradient.shape == logits.shape


def test_leading_dimensions():
    student, teacher, labels, weights = inputs(rows=6)
    flat = in_parts(student, teacher, labels, 2.0, 0.3, PARTS, weights=weights, reduction="none")
    deep = (x.reshape(2, 3, *x.shape[1:]) for x in (student, teacher, labels))
    result = in_parts(*deep, 2.0, 0.3, PARTS, weights=weights.reshape(2, 3), reduction="none")
    for name in ("loss", "gradient", "ce", "kl"):
        same_bits(getattr(result, name).reshape(getattr(flat, name).shape), getattr(flat, name))


def test_slices_may_differ_in_dtype():
    student, teacher, labels, _ = inputs()
    wide = student.astype(np.float64), teacher.astype(np.float64)
    whole = kdcore.kd_loss(student, teacher, labels, 2.0, 0.3)
    a = kdcore.kd_state(student[:, :20], teacher[:, :20], labels, 2.0)
    b = kdcore.kd_state(wide[0][:, 20:], wide[1][:, 20:], labels, 2.0, start=20)
    loss = kdcore.kd_loss_from_state(kdcore.merge_states(a, b), labels, 0.3).loss
    assert bounds.within(loss, whole, 2 * bounds.loss_bound(FLOAT32, whole, temperature=2.0, alpha=0.3))


@pytest.mark.parametrize(("rows", "classes"), [(4000, 50), (40, 9000)])  # more than stay in one thread
def test_threads_and_neighbours_change_no_bit(rows, classes):
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, rows, classes)).astype(np.float32)
    labels = rng.integers(classes, size=rows)
    parts = [slice(0, classes)]
    one = in_parts(student, teacher, labels, 2.0, 0.3, parts, reduction="none", threads=1)
    for threads in (2, 5):
        other = in_parts(student, teacher, labels, 2.0, 0.3, parts, reduction="none", threads=threads)
        for name in ("loss", "gradient", "ce", "kl"):
            same_bits(getattr(other, name), getattr(one, name))
    rows = slice(7, 9)
    some = in_parts(student[rows], teacher[rows], labels[rows], 2.0, 0.3, parts, reduction="none")
    same_bits(some.gradient, one.gradient[rows])
    same_bits(some.loss, one.loss[rows])


def test_a_state_can_be_sent_about():
    student, teacher, labels, _ = inputs()
    state = kdcore.kd_state(student, teacher, labels, 2.0, teacher_temperature=3.0)
    for other in (
        pickle.loads(pickle.dumps(state)),
        kdcore.KDState(np.frombuffer(state.values.tobytes()).reshape(4, 7), 2, 3.0),  # read-only
        kdcore.KDState(np.asfortranarray(state.values), 2.0, 3.0),
    ):
        assert (other.temperature, other.teacher_temperature, other.lead) == (2.0, 3.0, (4,))
        same_bits(
            kdcore.kd_gradient_from_state(other, student, teacher, labels, 0.3),
            kdcore.kd_gradient_from_state(state, student, teacher, labels, 0.3),
        )
        same_bits(kdcore.merge_states(other, other).values, kdcore.merge_states(state, state).values)


# --- layout and out= -----------------------------------------------------------------------------------------------


def test_strided_and_read_only_slices():
    student, teacher, labels, _ = inputs()
    packed = [np.ascontiguousarray(x[:, 20:40]) for x in (student, teacher)]
    expected = kdcore.kd_state(*packed, labels, 2.0, start=20)
    gradient = kdcore.kd_gradient_from_state(expected, *packed, labels, 0.3, start=20)
    spread = [np.repeat(x, 2, axis=1)[:, ::2] for x in packed]
    backward = [np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1] for x in packed]
    for x in packed:
        x.flags.writeable = False
    for s, t in (
        (student[:, 20:40], teacher[:, 20:40]),
        packed,
        spread,
        backward,
        [np.asfortranarray(x) for x in packed],
        [student[:, 20:40], packed[1]],
    ):
        before = s.copy(), t.copy()
        same_bits(kdcore.kd_state(s, t, labels, 2.0, start=20).values, expected.values)
        same_bits(kdcore.kd_gradient_from_state(expected, s, t, labels, 0.3, start=20), gradient)
        same_bits(s, before[0])
        same_bits(t, before[1])


@pytest.mark.parametrize("dtype", [FLOAT32, FLOAT16], ids=str)
def test_out(dtype):
    student, teacher, labels, _ = inputs(dtype=dtype)
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    part = slice(20, 40)
    s, t = student[:, part], teacher[:, part]
    compute = partial(kdcore.kd_gradient_from_state, state, labels=labels, alpha=0.3, start=20)
    expected = compute(s, t)
    assert expected.dtype == dtype
    gradient = np.full_like(student, 7)
    for out in (
        np.full_like(expected, 7),
        gradient[:, part],
        np.full((4, 40), 7, dtype)[::-1, ::2],
        np.full((20, 4), 7, dtype).T,
        student.copy()[:, part],
    ):
        assert compute(s, t, out=out) is out
        same_bits(np.ascontiguousarray(out), expected)
    np.testing.assert_array_equal(np.delete(gradient, np.arange(20, 40), axis=1).astype(np.float64), 7)
    if dtype == FLOAT32:
        wider = np.full_like(student, 7, np.float64)[:, part]
        compute(s, t, out=wider)
        same_bits(wider.astype(np.float32), expected)

    for itself in (np.ascontiguousarray(s), student.copy()[:, part]):  # in place, contiguous or not
        assert compute(itself, t, out=itself) is itself
        same_bits(np.ascontiguousarray(itself), expected)


def test_out_that_overlaps():
    student, teacher, labels, _ = inputs(dtype=FLOAT64)
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    s, t = student[:, 20:40], teacher[:, 20:40]
    compute = partial(kdcore.kd_gradient_from_state, state, s, t, labels, 0.3, start=20)
    before = student.copy(), teacher.copy(), state.values.copy()
    with pytest.raises(kdcore.AliasError, match="out overlaps student_logits"):
        compute(out=student[:, 21:41])
    with pytest.raises(kdcore.AliasError, match="out overlaps teacher_logits"):
        compute(out=t)
    with pytest.raises(kdcore.AliasError, match="out overlaps state"):
        kdcore.kd_gradient_from_state(state, student[:, :7], teacher[:, :7], labels, 0.3, out=state.values)
    with pytest.raises(kdcore.AliasError, match="out overlaps itself"):
        compute(out=np.lib.stride_tricks.as_strided(np.zeros(40), (4, 20), (8, 8)))
    frozen = np.zeros((4, 20))
    frozen.flags.writeable = False
    with pytest.raises(kdcore.AliasError, match="read-only"):
        compute(out=frozen)
    with pytest.raises(kdcore.ShapeError, match=r"out must have shape \(4, 20\)"):
        compute(out=np.zeros((4, 50)))
    with pytest.raises(kdcore.DTypeError, match="out must be float32"):
        compute(out=np.zeros((4, 20), int))
    for x, y in zip((student, teacher, state.values), before, strict=True):
        same_bits(x, y)
    compute(out=student[:, :20])  # another slice of the same array is disjoint


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [50, 9000])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_non_finite_logits_are_named(name, value, classes):
    rng = np.random.default_rng(0)
    logits = {key: rng.normal(size=(2, 3, classes)).astype(np.float32) for key in ("student_logits", "teacher_logits")}
    labels = np.zeros((2, 3), int)
    for column in {0, 17, classes - 1}:
        bad = {**logits, name: logits[name].copy()}
        bad[name][1, 2, column] = value
        bad[name][1, 0, 3] = -np.inf
        found = "nan" if np.isnan(value) else r"\+inf"
        with pytest.raises(kdcore.NonFiniteError, match=rf"^{name}\[1, 2, {column}\] is {found}"):
            kdcore.kd_state(**bad, labels=labels, temperature=2.0, start=100)
        # Nothing else of the slice need be finite for it to be found.
        bad[name][1, 2] = np.where(np.arange(classes) == column, value, -np.inf)
        with pytest.raises(kdcore.NonFiniteError, match=rf"^{name}\[1, 2, {column}\] is {found}"):
            kdcore.kd_state(**bad, labels=labels, temperature=2.0)
    with pytest.raises(kdcore.NonFiniteError, match=rf"^{name}\[{column}\] is {found}"):
        kdcore.kd_state(*(x[1, 2] for x in bad.values()), None, 2.0)


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits"])
def test_rows_without_any_support(name):
    student, teacher, labels, _ = inputs()
    (student if name == "student_logits" else teacher)[2] = -np.inf
    state = reduce(kdcore.merge_states, states_of(student, teacher, labels, 2.0, PARTS, {}))
    message = rf"{name}\[2\] is -inf in every class"
    with pytest.raises(kdcore.NonFiniteError, match=message):
        kdcore.kd_loss_from_state(state, labels, 0.3)
    with pytest.raises(kdcore.NonFiniteError, match=message):
        kdcore.kd_gradient_from_state(state, student, teacher, labels, 0.3)
    if name == "teacher_logits":  # which is not read
        assert np.isfinite(kdcore.kd_loss_from_state(state, labels, 1.0).loss)
        assert np.isfinite(kdcore.kd_gradient_from_state(state, student, None, labels, 1.0)).all()
    labels[2] = -100
    assert np.isfinite(kdcore.kd_loss_from_state(state, labels, 0.3).loss)


def test_states_that_do_not_belong_together():
    student, teacher, labels, _ = inputs()
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    for options in ({"temperature": 3.0}, {"temperature": 2.0, "teacher_temperature": 1.0}):
        with pytest.raises(kdcore.DomainError, match="temperatures"):
            kdcore.merge_states(state, kdcore.kd_state(student, teacher, labels, **options))
    with pytest.raises(kdcore.ShapeError, match=r"same rows, got \[4\] and \[3\]"):
        kdcore.merge_states(state, kdcore.kd_state(student[:3], teacher[:3], labels[:3], 2.0))
    with pytest.raises(kdcore.ShapeError, match=r"same rows, got \[4\] and \[2, 2\]"):
        kdcore.merge_states(state, kdcore.KDState(state.values.reshape(2, 2, 7), 2.0, 2.0))
    with pytest.raises(kdcore.ShapeError, match=r"student_logits.*\(4,\).*\(3,\)"):
        kdcore.kd_gradient_from_state(state, student[:3], teacher[:3], labels[:3], 0.3)


def test_values_that_are_no_state():
    for shape in ((), (6,), (7, 2), (2, 8)):
        with pytest.raises(kdcore.ShapeError, match=r"\[..., 7\]"):
            kdcore.KDState(np.zeros(shape), 1.0, 1.0)
    for dtype in (np.float32, np.int64, ">f8"):
        with pytest.raises(kdcore.DTypeError, match="must be float64"):
            kdcore.KDState(np.zeros((2, 7), dtype), 1.0, 1.0)
    with pytest.raises(kdcore.DomainError, match="^temperature must be"):
        kdcore.KDState(np.zeros((2, 7)), 0.0, 1.0)
    with pytest.raises(kdcore.DTypeError, match="^teacher_temperature must be"):
        kdcore.KDState(np.zeros((2, 7)), 1.0, None)


def expect(error, message, function, *arguments, **options):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_arguments_that_make_no_sense():
    student, teacher, labels, weights = inputs()
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    compute = partial(kdcore.kd_state, student, teacher, labels)
    expect(kdcore.DomainError, "^temperature must be", compute, 0.0)
    expect(kdcore.DomainError, "^teacher_temperature must be", compute, 1.0, teacher_temperature=np.inf)
    expect(kdcore.DomainError, "^start must be an integer of at least 0", compute, 1.0, start=-1)
    expect(kdcore.DTypeError, "^start must be an integer", compute, 1.0, start=0.0)
    expect(kdcore.ShapeError, "teacher_logits must have shape", kdcore.kd_state, student, teacher[:, 1:], labels, 1.0)
    expect(kdcore.ShapeError, "at least one class", kdcore.kd_state, student[:, :0], teacher[:, :0], labels, 1.0)
    expect(kdcore.ShapeError, "0-d", kdcore.kd_state, student[0, 0], teacher[0, 0], 0, 1.0)
    integers = student.astype(int)
    expect(kdcore.DTypeError, "student_logits must be float32", kdcore.kd_state, integers, teacher, labels, 1.0)
    expect(kdcore.DTypeError, "teacher_logits are needed", kdcore.kd_state, student, None, labels, 1.0)
    expect(kdcore.DTypeError, "labels must be integers", kdcore.kd_state, student, teacher, labels * 1.0, 1.0)
    expect(kdcore.ShapeError, "labels must have shape", kdcore.kd_state, student, teacher, labels[:2], 1.0)

    def gradient(state, *rest, **options):
        return kdcore.kd_gradient_from_state(state, student, teacher, *rest, **options)

    for function in (kdcore.kd_loss_from_state, gradient):
        wrong = np.array([0, 1, -7, 3])
        message = r"^labels\[2\] is -7, neither a class nor ignore_index=-100"
        expect(kdcore.LabelError, message, function, state, wrong, 0.3)
        expect(kdcore.LabelError, message, kdcore.kd_state, student, teacher, wrong, 2.0)
        expect(kdcore.LabelError, "labels are needed unless alpha is 0", function, state, None, 0.3)
        expect(kdcore.DomainError, "^alpha must be in", function, state, labels, 1.5)
        expect(kdcore.DomainError, "reduction must be one of", function, state, labels, 0.3, reduction="batchmean")
        expect(kdcore.DomainError, "goes with", function, state, labels, 0.3, reduction="sum", denominator=2.0)
        expect(kdcore.DomainError, "^denominator must be", function, state, labels, 0.3, denominator=0.0)
        expect(kdcore.DTypeError, "^scale_t2 must be", function, state, labels, 0.3, scale_t2=1)
        expect(kdcore.ShapeError, "weights must have shape", function, state, labels, 0.3, weights=weights[:1])
        expect(kdcore.DomainError, r"weights\[1\] is -1.0", function, state, labels, 0.3, weights=[1, -1, 1, 1])
    expect(kdcore.DomainError, "^start must be", gradient, state, labels, 0.3, start=-1)
    with pytest.raises(kdcore.DTypeError, match="teacher_logits are needed unless alpha is 1"):
        kdcore.kd_gradient_from_state(state, student, None, labels, 0.3)


class OnDevice:
    """What an array on a CUDA device shows of itself."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (4, 50), "typestr": "<f4", "data": (0, False), "version": 3
    }  # fmt: skip


def test_device_arrays():
    student, teacher, labels, weights = inputs()
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    calls = {
        kdcore.kd_state: {
            "student_logits": student, "teacher_logits": teacher, "labels": labels, "temperature": 2.0,
        },
        kdcore.kd_loss_from_state: {"state": state, "labels": labels, "alpha": 0.3, "weights": weights},
        kdcore.kd_gradient_from_state: {
            "state": state, "student_logits": student, "teacher_logits": teacher, "labels": labels, "alpha": 0.3,
            "weights": weights, "out": np.empty_like(student),
        },
    }  # fmt: skip
    for function, arguments in calls.items():
        function(**arguments)
        for name in arguments:  # each is named, alone
            if name not in ("state", "temperature", "alpha"):
                message = rf"arrays must be all on the host or all on a device: {name} on a device, .* not"
                expect(kdcore.DeviceMismatchError, message, function, **{**arguments, name: OnDevice()})
    with pytest.raises(kdcore.DeviceUnavailableError if available() else kdcore.DTypeError):
        kdcore.KDState(OnDevice(), 2.0, 2.0)
