"""The CPU engine among threads and processes, with calls that are large enough to use its pool; and its scratch."""

from __future__ import annotations

import os
import random
import textwrap
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier

import numpy as np
import pytest
from comparisons import same_bits
from processes import in_a_process

import kdcore
import kdcore.states
from kdcore.cpu import launch, memory, pool

ROWS, CLASSES = 200, 1031


def batch(rows=ROWS, classes=CLASSES, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    student, teacher = (rng.normal(size=(2, rows, classes)) * 5).astype(dtype)
    labels = rng.integers(classes, size=rows)
    labels[3::7] = -100
    return student, teacher, labels


def kd(student, teacher, labels, **options):
    return kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3, **{"reduction": "none", **options})


def bits(result):
    """What a call returned, as bytes."""
    if isinstance(result, tuple | list):
        return [bits(part) for part in result]
    if isinstance(result, kdcore.KDState):
        return bits(result.values)
    return None if result is None else np.ascontiguousarray(result).tobytes()


def pool_threads():
    return sum(thread.name.startswith("kdcore") for thread in threading.enumerate())


def shut_down():
    for executor in pool._pools.values():
        executor.shutdown()
    pool._pools.clear()


@pytest.fixture
def fresh_pool():
    """No thread of the engine is left of earlier calls, so that those of a call can be counted."""
    shut_down()
    assert pool_threads() == 0
    yield
    shut_down()


# --- the number of threads -----------------------------------------------------------------------------------------


def test_the_argument_and_the_environment_variable(fresh_pool, monkeypatch):
    arguments = batch()
    expected = bits(kd(*arguments, threads=1))
    assert pool_threads() == 0
    assert bits(kd(*arguments, threads=3)) == expected
    assert set(pool._pools) == {2}  # and the caller's
    monkeypatch.setenv("KDCORE_NUM_THREADS", "5")
    assert bits(kd(*arguments)) == expected
    assert set(pool._pools) == {2, 4}
    assert bits(kd(*arguments, threads=1)) == expected  # the argument goes first
    monkeypatch.setenv("KDCORE_NUM_THREADS", "1")
    assert bits(kd(*arguments, threads=3)) == expected
    assert set(pool._pools) == {2, 4}
    assert 0 < pool_threads() <= 2 + 4  # they are started as there is work for them


@pytest.mark.parametrize(
    ("rows", "classes", "counts"),
    [(1, 262_144, (2, 3)), (3, 100_000, (2, 5)), (3, 200_003, (2, 5)), (2, 262_145, (3,))],
)
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_long_rows(fresh_pool, divergence, rows, classes, counts):
    """Few long rows are shared among threads block by block."""
    student, teacher, _ = batch(rows, classes)
    student[0, 8192:12_288] = teacher[0, 8192:12_288] = -np.inf  # a whole block
    labels = np.array([classes - 1, 4096, 0])[:rows]
    calls = [partial(kd, student, teacher, labels, divergence=divergence)]
    if divergence == "forward_kl":
        calls += [partial(f, student, 2.0) for f in (kdcore.softmax, kdcore.log_softmax, kdcore.logsumexp)]
    expected = [bits(call(threads=1)) for call in calls]
    assert np.isfinite(calls[0](threads=1).loss).all()
    assert pool_threads() == 0
    for threads in counts:
        assert [bits(call(threads=threads)) for call in calls] == expected
    if classes > 131_072:
        assert pool_threads() > 0


# --- threads of the caller -----------------------------------------------------------------------------------------


def mixed_calls():
    """Calls of many kinds, each with a parameter ``threads``: in one thread and in many, short rows and long."""
    student, teacher, labels = batch()
    wide = batch(150, 1500, np.float64, 1)
    small = batch(3, 17, seed=2)
    long = batch(2, 150_000, seed=3)
    strided = np.repeat(student, 2, axis=1)[:, ::2]
    state = kdcore.kd_state(student, teacher, labels, 2.0)
    return [
        partial(kd, student, teacher, labels),
        partial(kd, student, teacher, labels, reduction="mean"),
        partial(kd, *small),
        partial(kd, *wide),
        partial(kd, *long),
        partial(kd, strided, teacher, labels),
        partial(kd, student, teacher, labels, divergence="reverse_kl"),
        partial(kdcore.softmax, student, 3.0),
        partial(kdcore.softmax, small[0]),
        partial(kdcore.log_softmax, long[0]),
        partial(kdcore.logsumexp, wide[0], 0.5),
        partial(kdcore.cross_entropy, student, labels, reduction="none"),
        partial(kdcore.kd_state, student, teacher, labels, 2.0),
        partial(kdcore.kd_gradient_from_state, state, student, teacher, labels, 0.3),
    ]


def test_mixed_calls_of_twelve_threads():
    calls = mixed_calls()
    expected = [bits(call(threads=1)) for call in calls]
    assert len(set(map(str, expected))) == len(calls) - 1  # strided or not, the answer is the same
    start = Barrier(12)

    def work(k):
        order = random.Random(k).sample(range(len(calls)), len(calls))
        start.wait(timeout=60)
        return [n for n in order if bits(calls[n](threads=random.Random(n).choice([1, 2, 3, 5]))) != expected[n]]

    with ThreadPoolExecutor(12) as callers:
        futures = [callers.submit(work, k) for k in range(12)]
        assert [future.result(timeout=120) for future in futures] == [[]] * 12


def test_calls_into_one_array():
    # Twelve threads write the rows of one gradient, which no two of them share.
    arguments = batch(12 * 140)
    expected = kd(*arguments, threads=1)
    gradient = np.empty_like(arguments[0])
    start = Barrier(12)

    def work(k):
        rows = slice(140 * k, 140 * (k + 1))
        start.wait(timeout=60)
        return kd(*(x[rows] for x in arguments), out=gradient[rows], threads=2).loss

    with ThreadPoolExecutor(12) as callers:
        losses = [future.result(timeout=120) for future in [callers.submit(work, k) for k in range(12)]]
    same_bits(np.concatenate(losses), expected.loss)
    same_bits(gradient, expected.gradient)


def test_an_error_among_calls_of_other_threads():
    good, bad = batch(), batch(seed=1)
    bad[0][150, 7] = np.nan
    bad[2][150] = 0
    expected = bits(kd(*good, threads=1))

    def work(k):
        if k % 2:
            with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[150, 7\]"):
                kd(*bad, threads=3)
            return expected
        return bits(kd(*good, threads=3))

    with ThreadPoolExecutor(12) as callers:
        futures = [callers.submit(work, k) for k in range(24)]
        assert all(future.result(timeout=120) == expected for future in futures)


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_children_forked_while_other_threads_call(tmp_path):
    """Also after calls of the parent, whose pool's threads are not the child's."""
    output = in_a_process(
        """
        import os
        import threading
        import warnings

        import numpy as np
        import kdcore

        s, t = np.random.default_rng(0).normal(size=(2, 200, 1031)).astype(np.float32)

        def gradient(threads):
            return kdcore.kd_logit_gradient(s, t, None, 2.0, 0.0, threads=threads).tobytes()

        def fork():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 and later warn of what is tested here
                pid = os.fork()
            if pid == 0:
                os._exit(0 if all(gradient(threads) == expected for threads in (1, 3, 4)) else 3)
            return pid

        expected = gradient(1)
        assert gradient(3) == expected
        assert any(thread.name.startswith("kdcore") for thread in threading.enumerate())
        pids = [fork()]  # while the pool waits

        done = threading.Event()
        counts = [0, 0, 0]
        wrong = []

        def call(k):
            while not done.is_set():
                if gradient(k + 1) != expected:
                    wrong.append(k)
                counts[k] += 1

        callers = [threading.Thread(target=call, args=(k,)) for k in range(3)]
        for thread in callers:
            thread.start()
        while min(counts) < 2:
            done.wait(0.001)
        before = list(counts)
        pids += [fork() for _ in range(12)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        while any(now - then < 2 for now, then in zip(counts, before)):
            done.wait(0.001)
        done.set()
        for thread in callers:
            thread.join()
        print(*codes, wrong)
        """,
        tmp_path,
    )
    assert output.split() == ["0"] * 13 + ["[]"]


def test_first_call_in_a_module_that_a_module_imports(tmp_path):
    """Kernels are compiled in the caller's thread: one of the pool would wait for imports, and these for it."""
    (tmp_path / "outer.py").write_text("import inner\nLOSSES = inner.LOSSES\n")
    (tmp_path / "inner.py").write_text(
        textwrap.dedent(
            """
            import threading
            import numpy as np
            import kdcore
            from numba.core import event

            class Compilers(event.Listener):
                names = set()

                def on_start(self, _):
                    self.names.add(threading.current_thread().name)

                def on_end(self, _):
                    pass

            event.register("numba:compile", Compilers())
            S, T = np.random.default_rng(0).normal(size=(2, 200, 1031)).astype(np.float32)
            LABELS = np.arange(200)
            LOSSES = [kdcore.kd_loss(S, T, LABELS, 2.0, 0.3, threads=3)]
            assert any(thread.name.startswith("kdcore") for thread in threading.enumerate())
            STATE = kdcore.kd_state(S, T, LABELS, 2.0, threads=3)
            LOSSES.append(kdcore.kd_loss_from_state(STATE, LABELS, 0.3).loss)
            """
        )
    )
    output = in_a_process(
        """
        import numpy as np
        import outer, inner, kdcore
        whole = kdcore.kd_loss(inner.S, inner.T, inner.LABELS, 2.0, 0.3, threads=1)
        print(*inner.Compilers.names)
        print(outer.LOSSES[0] == whole, np.isclose(outer.LOSSES[1], whole))
        """,
        tmp_path,
        NUMBA_CACHE_DIR=str(tmp_path / "cache"),
    )
    assert output.split() == ["MainThread", "True", "True"]


# --- scratch -------------------------------------------------------------------------------------------------------


LAYOUTS = {
    "contiguous": lambda x: x,
    "slices of rows": lambda x: np.concatenate([x, x], axis=1)[:, : x.shape[1]],
    "every second column": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scratch_does_not_grow_with_the_batch(layout):
    student, teacher, labels = batch(2048, 4096)
    size = student.nbytes
    student, teacher, out = (LAYOUTS[layout](x) for x in (student, teacher, np.empty_like(student)))
    calls = [
        lambda: kd(student, teacher, labels, out=out, threads=2),
        lambda: kd(student, teacher, labels, out=student, threads=2),
        lambda: kdcore.kd_loss(student, teacher, labels, 2.0, 0.3, threads=2),
        lambda: kdcore.softmax(teacher, out=out, threads=2),
        lambda: kdcore.log_softmax(teacher, out=out, threads=2),
        lambda: kdcore.logsumexp(teacher, threads=2),
    ]
    if layout == "contiguous":
        state = kdcore.kd_state(student, teacher, labels, 2.0)
        calls += [
            lambda: kdcore.kd_state(student, teacher, labels, 2.0, threads=2),
            lambda: kdcore.kd_gradient_from_state(state, student, teacher, labels, 0.3, out=out, threads=2),
        ]
    for call in calls:
        call()  # compiles
        tracemalloc.start()
        call()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < size / 8, (call, peak)


class Filled:
    """NumPy, but for ``empty``, which fills its arrays of floats with a number."""

    def __init__(self, fill):
        self.fill = fill

    def __getattr__(self, name):
        return getattr(np, name)

    def empty(self, shape, dtype=float):
        array = np.empty(shape, dtype)
        if np.issubdtype(array.dtype, np.inexact):
            array[...] = self.fill
        return array


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_stores_past_the_caches_are_the_same_bits(dtype, monkeypatch):
    def results():
        for classes in (1, 15, 16, 37, 100, 4097, 9001):
            student, teacher, _ = batch(3, classes + 1, dtype)
            student, teacher = student[:, 1:], teacher[:, 1:]  # so that few rows start where a vector of them may
            for label in {0, classes // 3, classes // 2, classes - 2, classes - 1} - {-1}:
                labels = np.full(3, label)
                for options in ({}, {"alpha": 1.0}, {"divergence": "reverse_kl"}):
                    given = {"temperature": 2.0, "alpha": 0.3, "threads": 1, **options}
                    out = np.full((3, classes + 4), 7, student.dtype)
                    kdcore.kd_loss_and_gradient(student, teacher, labels, out=out[:, 2:-2], **given)
                    assert (out[:, :2] == 7).all() and (out[:, -2:] == 7).all()
                    yield out[:, 2:-2]
            yield from (f(student, threads=1) for f in (kdcore.softmax, kdcore.log_softmax))

    expected = [bits(result) for result in results()]
    monkeypatch.setattr(launch, "_STREAMED", 0)
    monkeypatch.setattr(launch, "_STREAMED_ROW", 0)
    assert [bits(result) for result in results()] == expected


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_what_scratch_held_before_does_not_matter(dtype, monkeypatch):
    def results():
        found = []
        for classes in (1, 5, 17, 1031, 4097, 9000):
            student, teacher, labels = batch(5, classes, dtype)
            student[1, : classes // 2] = teacher[1, : classes // 2] = -np.inf
            weights = np.array([1.0, 0.5, 2.0, 0.0, 1.0])
            strided = np.repeat(student, 2, axis=1)[:, ::2]
            for temperature in (1.0, 2.0, 3.0):  # the student's exponentials at T = 1 come from these by powers, or not
                for alpha in (0.0, 0.3, 1.0):
                    arguments = student, teacher, labels, temperature, alpha
                    for divergence in ("forward_kl", "reverse_kl"):
                        found.append(
                            kdcore.kd_loss_and_gradient(*arguments, divergence=divergence, weights=weights, threads=1)
                        )
                    found.append(kdcore.kd_loss_and_gradient(strided, *arguments[1:], reduction="none", threads=1))
                state = kdcore.kd_state(student, teacher, labels, temperature, threads=1)
                found += [state, kdcore.merge_states(state, state)]
                for alpha in (0.0, 0.3, 1.0):
                    options = {"reduction": "none", "weights": weights}
                    found.append(kdcore.kd_loss_from_state(state, labels, alpha, **options))
                    found.append(
                        kdcore.kd_gradient_from_state(state, student, teacher, labels, alpha, threads=1, **options)
                    )
                found += [f(student, temperature, threads=1) for f in (kdcore.softmax, kdcore.log_softmax)]
                found.append(kdcore.logsumexp(student, temperature, threads=1))
        student, teacher, labels = batch(2, 150_000, dtype)
        found.append(kd(student, teacher, labels, threads=3))  # block by block
        found.append(kdcore.log_softmax(student, threads=3))
        return bits(found)

    expected = results()
    for fill in (np.nan, np.inf, 1e30):
        with monkeypatch.context() as patch:
            for module in (launch, memory, kdcore.states):
                patch.setattr(module, "np", Filled(fill))
            patch.setattr(launch, "_kept", launch._Kept())
            patch.setattr(pool, "_pools", {})  # whose threads keep scratch, too
            assert np.isnan(launch.np.empty(3)).all() == np.isnan(fill)
            actual = results()
        assert [k for k, (a, b) in enumerate(zip(actual, expected, strict=True)) if a != b] == []
