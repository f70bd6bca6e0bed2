"""What must not change a bit of an answer: threads, how rows are split, neighbours, layout; and concurrent use."""

from __future__ import annotations

import os
import textwrap
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from comparisons import same_bits
from hypothesis import given, strategies as st
from processes import in_a_process
from strategies import BFLOAT16, narrowed, problems

import kdcore
from kdcore.divergences import jsd

FLOAT32 = np.dtype(np.float32)
#: The fused one, one of two formulas, and one of two formulas with a parameter.
DIVERGENCES = ["forward_kl", "reverse_kl", jsd(0.3)]
DTYPES = [FLOAT32, np.dtype(np.float64), BFLOAT16]
B, V = 160, 1031  # more than the 2^17 elements up to which a call stays in the calling thread


def inputs(dtype=FLOAT32, rows=B, classes=V, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (narrowed(rng.normal(size=(rows, classes)) * 5, dtype) for _ in range(2))
    labels = rng.integers(classes, size=rows)
    labels[3::7] = -100
    return student, teacher, labels, rng.uniform(0, 2, rows)


def run(student, teacher, labels, weights, divergence="forward_kl", reduction="none", **options):
    return kdcore.kd_loss_and_gradient(
        student, teacher, labels, 2.0, 0.3, weights=weights, divergence=divergence, reduction=reduction, **options
    )


def same_answers(actual, expected):
    for name in ("loss", "gradient", "ce", "kl"):
        same_bits(getattr(actual, name), getattr(expected, name))
    assert np.isfinite(actual.loss).all()
    assert np.abs(np.asarray(actual.gradient, np.float64)).max() > 0


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_threads(reduction, dtype, divergence):
    arguments = inputs(dtype)
    expected = run(*arguments, divergence, reduction, threads=1)
    for threads in (2, 5):
        same_answers(run(*arguments, divergence, reduction, threads=threads), expected)
    for operation in (kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp):
        one = operation(arguments[0], 2.0, threads=1)
        for threads in (2, 5):
            same_bits(operation(arguments[0], 2.0, threads=threads), one)


def test_the_environment_variable_of_threads(monkeypatch):
    arguments = inputs()
    expected = run(*arguments, threads=1)
    monkeypatch.setenv("KDCORE_NUM_THREADS", "5")
    same_answers(run(*arguments), expected)


@given(problems(((FLOAT32, FLOAT32),)), st.integers(0, 4))
def test_rows_split_over_calls_of_any_problem(problem, cut):
    student, teacher, labels, T, alpha = problem.arguments
    options = {key: value for key, value in problem.options.items() if key not in ("reduction", "denominator")}
    weights = options.pop("weights", np.ones(len(student)))
    for divergence in DIVERGENCES:
        options["divergence"], options["reduction"] = divergence, "none"
        whole = kdcore.kd_loss_and_gradient(student, teacher, labels, T, alpha, weights=weights, **options)
        parts = [
            kdcore.kd_loss_and_gradient(
                student[rows], teacher[rows], None if labels is None else labels[rows], T, alpha,
                weights=weights[rows], **options,
            )
            for rows in (slice(None, cut), slice(cut, None))
        ]  # fmt: skip
        same_bits(np.concatenate([part.loss for part in parts]), whole.loss)
        same_bits(np.concatenate([part.gradient for part in parts]), whole.gradient)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_rows_split_over_calls(divergence):
    arguments = inputs()
    whole = run(*arguments, divergence)
    for size in (1, 7, 40):
        parts = [run(*(x[i : i + size] for x in arguments), divergence) for i in range(0, B, size)]
        for name in ("loss", "gradient", "ce", "kl"):
            same_bits(np.concatenate([getattr(part, name) for part in parts]), getattr(whole, name))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_neighbours(divergence):
    student, teacher, labels, weights = inputs()
    before = run(student, teacher, labels, weights, divergence)
    others = np.arange(B) != 10
    for fill in (0.0, 3e38, np.nan):
        student[others], teacher[others] = fill, -fill
        after = run(student, teacher, labels, weights, divergence, validate=False)
        same_bits(after.loss[10], before.loss[10])
        same_bits(after.gradient[10], before.gradient[10])


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_place(dtype, divergence):
    student, teacher, labels, weights = inputs(dtype)
    expected = run(student, teacher, labels, weights, divergence)
    separate = np.full_like(student, 7)
    result = run(student, teacher, labels, weights, divergence, out=separate)
    assert result.gradient is separate
    same_answers(result, expected)
    result = run(student, teacher, labels, weights, divergence, out=student)
    assert result.gradient is student
    same_answers(result, expected)
    for operation in (kdcore.softmax, kdcore.log_softmax):
        x = teacher.copy()
        expected = operation(x, 2.0)
        assert operation(x, 2.0, out=x) is x
        same_bits(x, expected)


def strided(x):
    """The same numbers in every second column of a wider array, whose other columns are NaN."""
    wide = np.full((*x.shape[:-1], 2 * x.shape[-1]), np.nan, x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


LAYOUTS = {
    "every second column": strided,
    "every second row": lambda x: np.repeat(x, 2, axis=0)[::2],
    "backward rows": lambda x: np.ascontiguousarray(x[::-1])[::-1],
    "backward columns": lambda x: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
    "Fortran order": np.asfortranarray,
    "broadcast rows": None,
    "unaligned": lambda x: np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape),
}


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, divergence):
    student, teacher, labels, weights = inputs(classes=2051)
    if layout == "broadcast rows":
        student[:], teacher[:] = student[0], teacher[0]
        other = [np.broadcast_to(x[0], x.shape) for x in (student, teacher)]
    else:
        other = [LAYOUTS[layout](x) for x in (student, teacher)]
    for x, y in zip(other, (student, teacher), strict=True):
        np.testing.assert_array_equal(x, y)
    assert any(x.strides != y.strides or not x.flags.aligned for x, y in zip(other, (student, teacher), strict=True))
    same_answers(run(*other, labels, weights, divergence), run(student, teacher, labels, weights, divergence))
    if layout in ("every second column", "backward columns"):  # each other layout would be compiled three times more
        for operation in (kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp):
            same_bits(operation(other[0], 2.0), operation(student, 2.0))


def test_outputs_of_any_layout():
    student, teacher, labels, weights = inputs()
    expected = run(student, teacher, labels, weights).gradient
    for out in (
        np.empty((B, 2 * V), np.float32)[:, ::2],
        np.empty((B, V), np.float32)[::-1, ::-1],
    ):
        assert run(student, teacher, labels, weights, out=out).gradient is out
        same_bits(np.ascontiguousarray(out), expected)
    x = strided(student)  # a strided array in place, whose other columns are not touched
    assert run(x, teacher, labels, weights, out=x).gradient is x
    same_bits(np.ascontiguousarray(x), expected)
    assert np.isnan(x.base[:, 1::2]).all()


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=str)
def test_read_only_inputs(divergence):
    arguments = inputs()
    expected = run(*arguments, divergence)
    before = [x.copy() for x in arguments]
    for x in arguments:
        x.flags.writeable = False
    same_answers(run(*arguments, divergence), expected)
    for x, y in zip(arguments, before, strict=True):
        same_bits(x, y)
    for operation in (kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp):
        same_bits(operation(arguments[0]), operation(before[0]))


def test_inputs_are_not_written():
    arguments = inputs()
    before = [x.copy() for x in arguments]
    run(*arguments)
    for x, y in zip(arguments, before, strict=True):
        same_bits(x, y)


@pytest.mark.parametrize("order", [(1, 0, 2, 3), (2, 1, 0, 3), (1, 2, 0, 3)])
def test_transposed_leading_dimensions(order):
    shape = (2, 3, 5)
    student, teacher, labels, weights = inputs(rows=30, classes=2051)
    deep = [x.reshape(*shape, *x.shape[1:]).transpose(order[: x.ndim + 2]) for x in (student, teacher, labels, weights)]
    packed = [np.ascontiguousarray(x) for x in deep]
    assert deep[0].strides != packed[0].strides
    same_answers(run(*deep), run(*packed))
    out = np.empty((*shape, 2051), np.float32).transpose(order)
    same_bits(np.ascontiguousarray(run(*deep, out=out).gradient), run(*packed).gradient)
    # One operand transposed, the other not: the rows must still be those of the same index.
    same_answers(run(deep[0], packed[1], labels=packed[2], weights=packed[3]), run(*packed))
    for operation in (kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp):
        same_bits(operation(deep[0]), operation(packed[0]))
    out = np.empty(shape, np.float64).transpose(order[:3])
    same_bits(np.ascontiguousarray(kdcore.logsumexp(deep[0], out=out)), kdcore.logsumexp(packed[0]))


def test_repeated_calls():
    arguments = inputs()
    expected = run(*arguments)
    for _ in range(5):
        same_answers(run(*arguments), expected)


# --- threads and processes of the caller ---------------------------------------------------------------------------


def test_eight_threads_at_once():
    problems = [inputs(seed=seed) for seed in range(8)]
    expected = [run(*arguments, threads=1) for arguments in problems]
    start = Barrier(8)

    def work(k):
        start.wait(timeout=60)
        return [run(*problems[k], threads=threads) for threads in (1, 2, 5) * 4]

    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(work, k) for k in range(8)]
        for k, future in enumerate(futures):
            for result in future.result(timeout=120):
                same_answers(result, expected[k])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_fork_after_use(tmp_path):
    output = in_a_process(
        """
        import os
        import numpy as np
        import kdcore

        s, t = np.random.default_rng(0).normal(size=(2, 64, 1031))
        expected = kdcore.kd_logit_gradient(s, t, None, 2.0, 0.0, threads=3)
        children = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                same = True
                for threads in (1, 3, 4):
                    again = kdcore.kd_logit_gradient(s, t, None, 2.0, 0.0, threads=threads)
                    same = same and again.tobytes() == expected.tobytes()
                os._exit(0 if same else 3)
            children.append(pid)
        for pid in children:
            print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        again = kdcore.kd_logit_gradient(s, t, None, 2.0, 0.0, threads=3)
        print("parent", again.tobytes() == expected.tobytes())
        """,
        tmp_path,
    )
    assert output.splitlines() == ["child 0"] * 3 + ["parent True"]


def test_first_call_while_a_module_is_imported(tmp_path):
    # An empty cache, so that the kernel is compiled while the import lock of the caller's module is held.
    (tmp_path / "user.py").write_text(
        textwrap.dedent(
            """
            import numpy as np
            import kdcore

            S, T = np.random.default_rng(0).normal(size=(2, 64, 1031)).astype(np.float32)
            LOSS = kdcore.kd_loss(S, T, None, 2.0, 0.0, threads=3)
            """
        )
    )
    output = in_a_process(
        """
        import user
        print(user.LOSS > 0, user.LOSS == user.kdcore.kd_loss(user.S, user.T, None, 2.0, 0.0, threads=1))
        """,
        tmp_path,
        NUMBA_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert output.split() == ["True", "True"]


def test_first_calls_of_two_threads(tmp_path):
    output = in_a_process(
        """
        from concurrent.futures import ThreadPoolExecutor
        from threading import Barrier

        import numpy as np
        import kdcore

        s, t = np.random.default_rng(0).normal(size=(2, 64, 1031))
        start = Barrier(2)

        def work(k):
            start.wait(timeout=60)
            return kdcore.kd_loss(s, t, None, 2.0, 0.0, threads=2)

        with ThreadPoolExecutor(2) as pool:
            losses = list(pool.map(work, range(2)))
        print(losses[0] > 0, losses[0] == losses[1])
        """,
        tmp_path,
    )
    assert output.split() == ["True", "True"]


def test_importing_kdcore_is_cheap(tmp_path):
    output = in_a_process(
        """
        import sys
        import kdcore
        assert kdcore.__version__
        dir(kdcore)
        print(*sorted(name for name in sys.modules if "." not in name or name.startswith("kdcore")))
        """,
        tmp_path,
    )
    loaded = set(output.split())
    assert "kdcore" in loaded
    assert not loaded & {"numba", "llvmlite", "h5py", "cupy", "numpy", "scipy", "hypothesis", "pytest", "ml_dtypes"}
    assert {name for name in loaded if name.startswith("kdcore.")} <= {"kdcore._version"}


def test_importing_the_tests_kit_needs_numpy_alone(tmp_path):
    output = in_a_process(
        """
        import sys
        import kdcore.testing
        from kdcore.testing import bounds
        print(bounds.GRADIENT["float32"], *sorted(sys.modules))
        """,
        tmp_path,
    )
    factor, *loaded = output.split()
    assert factor == "5e-07"
    assert "numpy" in loaded and not set(loaded) & {"numba", "h5py", "hypothesis", "pytest", "_pytest"}


def test_cpu_calls_do_not_import_cuda(tmp_path):
    output = in_a_process(
        """
        import sys
        import numpy as np
        import kdcore
        print(kdcore.kd_loss(np.zeros(3), np.ones(3), 0, 1.0, 1.0) > 0, "kdcore.cpu" in sys.modules)
        light = {"kdcore.cuda", "kdcore.cuda.presence"}  # what tells a device array from others, in Python alone
        print(*[name for name in sys.modules if name.split(".")[1:2] == ["cuda"] and name not in light])
        """,
        tmp_path,
    )
    assert output.split() == ["True", "True"]


@pytest.mark.parametrize("size", [1.0, 3e38])  # beyond float32's differences, so that rows are worked again in float64
def test_in_place_in_an_array_whose_rows_are_not_contiguous(size):
    student = np.where(np.arange(40) % 3 == 0, size, -size).astype(np.float32).reshape(2, 20)
    teacher = -student
    expected = kdcore.kd_loss_and_gradient(student, teacher, None, 2.0, 0.0, divergence="reverse_kl")
    assert np.isfinite(expected.gradient).all()
    every_second = np.full((2, 40), np.nan, np.float32)[:, ::2]
    every_second[...] = student
    result = kdcore.kd_loss_and_gradient(
        every_second, teacher, None, 2.0, 0.0, divergence="reverse_kl", out=every_second
    )
    assert result.loss == expected.loss
    np.testing.assert_array_equal(every_second, expected.gradient)
