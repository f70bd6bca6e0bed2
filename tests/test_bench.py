"""The benchmark: it verifies before it times, its figures are what they are said to be, and what is missing is said."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from kdcore import ops
from kdcore.bench import PARTS, cases, limit, measure, peers, report, textbook
from kdcore.cli import main
from kdcore.divergences import NAMES as DIVERGENCES

TINY = cases.Settings(
    shapes=((4, 48),),
    row=512,
    scaling_elements=1 << 10,
    memory=((4, 64),),
    starts=1,
    compiled=False,
    seconds=0.0,
    least=2,
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(cases, "QUICK", TINY)
    cases._data.cache_clear()
    yield
    cases._data.cache_clear()


def bench(folder, *only):
    return main(["bench", "--quick", "--output", str(folder), *(word for part in only for word in ("--only", part))])


def rows_of(results):
    return {row["name"]: row for section in results["sections"] for row in section["rows"]}


# --- a run ---------------------------------------------------------------------------------------------------------


def numbers(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, (*path, key))
    elif isinstance(value, list):
        for k, item in enumerate(value):
            yield from numbers(item, (*path, k))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def test_a_quick_run_writes_json_a_table_and_plots(tiny, tmp_path, capsys):
    assert bench(tmp_path / "out") == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {section["part"] for section in results["sections"]} == set(PARTS) - {"start", "memory"}
    assert results["machine"]["threads"] >= 1 and results["machine"]["cpu"]
    assert results["versions"]["numpy"] == np.__version__
    may_be_zero = {"error_over_bound", "resident_bytes"}
    for path, number in numbers(results):
        assert math.isfinite(number) and (number > 0 or (path[-1] in may_be_zero and number == 0)), path
    rows = rows_of(results)
    for name in ("kdcore T=3 alpha=0.3", "kdcore T=2 alpha=0.3, in place", "float16", "kdcore [16, 32]", *DIVERGENCES):
        assert {"median_seconds", "min_seconds", "ratio_to_limit", "share_of_limit"} <= rows[name].keys()
    assert rows["reverse_kl"]["reference"] == "forward_kl"
    assert {row["name"] for row in results["start"]} == {"cold", "warm"}

    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert all(f"| {name} |" in table for name in rows)
    assert "limit: triad, non-temporal stores" in rows and "limit: copy, ordinary stores" in rows
    assert "`kdcore bench --quick`" in table and np.__version__ in table
    for name in ("kd.png", "scaling.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")

    assert bench(tmp_path / "out", "latency") == 0  # over its own results
    assert [section["part"] for section in report_of(tmp_path / "out")["sections"]] == ["latency"]


def report_of(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def test_what_is_not_installed_is_said(tiny, tmp_path, capsys, monkeypatch):
    found = peers.find_spec
    monkeypatch.setattr(
        peers, "find_spec", lambda name: None if name in ("torch", "scipy", "ml_dtypes", "matplotlib") else found(name)
    )
    monkeypatch.setattr(report, "find_spec", peers.find_spec)
    assert bench(tmp_path, "kd", "softmax", "precision") == 0
    printed = capsys.readouterr().out
    for line in (
        "torch eager: not installed",
        "torch.compile: not installed",
        "torch.softmax: not installed",
        "scipy.special.softmax: not installed",
        "bfloat16: ml_dtypes is not installed",
        "no plots: matplotlib is not installed (pip install 'kdcore[bench]')",
    ):
        assert line in printed
    results = report_of(tmp_path)
    assert results["versions"]["torch"] is None
    assert results["sections"][0]["absent"]["torch eager"] == "not installed"
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "table.md"}


def test_a_folder_with_other_files_is_left_alone(tiny, tmp_path, capsys):
    (tmp_path / "results.json").write_text('{"mine": 1}', encoding="utf-8")
    assert bench(tmp_path, "kd") == 1
    assert "not from an earlier run" in capsys.readouterr().err
    assert report_of(tmp_path) == {"mine": 1}


def test_an_unknown_part_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--only", "everything"])
    assert "everything" in capsys.readouterr().err


# --- verification --------------------------------------------------------------------------------------------------


def spoil_gradient(result):
    result.gradient[-1, 7] += 1e-4
    return result


def spoil_one_nan(result):
    result.gradient[0, 3] = np.nan
    return result


BUGS = {
    "a class of a row": spoil_gradient,
    "nan": spoil_one_nan,
    "the row losses": lambda result: result._replace(loss=result.loss * (1 + 1e-5)) if np.ndim(result.loss) else result,
    "the mean": lambda result: result._replace(loss=result.loss / 48) if np.ndim(result.loss) == 0 else result,
}


@pytest.mark.parametrize("bug", BUGS)
@pytest.mark.parametrize("part", ["kd", "precision", "divergences", "scaling"])
def test_a_wrong_kernel_is_not_timed(tiny, tmp_path, capsys, monkeypatch, bug, part):
    right = ops.kd_loss_and_gradient
    monkeypatch.setattr(ops, "kd_loss_and_gradient", lambda *args, **kwargs: BUGS[bug](right(*args, **kwargs)))
    assert bench(tmp_path / "out", part) == 1
    assert "VerificationError" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_a_wrong_softmax_is_not_timed(tiny, tmp_path, capsys, monkeypatch, name):
    right = getattr(ops, name)

    def wrong(logits, *, out, threads):
        right(logits, out=out, threads=threads)[-1] *= 1 + 1e-5
        return out

    monkeypatch.setattr(ops, name, wrong)
    assert bench(tmp_path, "softmax") == 1
    assert f"VerificationError: kdcore {name}" in capsys.readouterr().err


def test_the_textbook_knows_every_divergence():
    assert set(textbook.DIVERGENCES) >= set(DIVERGENCES)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("divergence", textbook.DIVERGENCES)
def test_the_textbook_gradient_is_the_derivative_of_its_loss(divergence, alpha):
    student, teacher = 2 * np.random.default_rng(0).standard_normal((2, 3, 6))
    labels = np.array([0, 5, 2])

    def at(shift):
        return textbook.kd_rows(student + shift, teacher, labels, 1.7, alpha, divergence)

    gradient = at(0.0).gradient
    for v in range(6):
        step = 1e-5 * np.eye(6)[v]
        slope = (at(step).loss - at(-step).loss) / 2e-5
        np.testing.assert_allclose(gradient[:, v], slope, rtol=1e-7, atol=1e-9)


# --- figures -------------------------------------------------------------------------------------------------------


def test_summary():
    found = measure.summary([4.0, 9.0, 6.0, 10.0], [2.0, 3.0, 1.5, 2.5], moved=200, limit_moved=300)
    assert found == {
        "median_seconds": 7.5,
        "min_seconds": 4.0,
        "max_seconds": 10.0,
        "limit_median_seconds": 2.25,
        "limit_min_seconds": 1.5,
        "ratio_to_limit": 3.5,  # of 2, 3, 4, 4: not the ratio of the medians
        "ratio_of_minima": 4.0 / 1.5,
        "least_bytes": 200,
        "share_of_limit": 200 / 300 / 3.5,
        "limit_bytes_per_second": 300 / 2.25,
    }


class Clock:
    """Time that passes only in what is timed."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def takes(self, name, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds

        return call


def test_contenders_take_turns_each_after_its_limit(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=lambda _: None))
    bound = limit.Limit(clock.takes("limit", 2.0), 300)

    def contender(name, seconds, **more):
        return cases.Contender(name, clock.takes(name, seconds), lambda _: 0.5, 300, bound, (1, 1), **more)

    section = cases.Section(
        "test",
        [
            contender("a", 3.0, prepare=clock.takes("prepare", 100.0)),
            contender("b", 12.0, reference="a", number=2),
        ],
    )
    found = measure.measure(section, replace(TINY, least=3))
    a, b = found["rows"]
    assert (a["ratio_to_limit"], a["median_seconds"], a["error_over_bound"]) == (1.5, 3.0, 0.5)
    assert (b["ratio_to_limit"], b["median_seconds"]) == (6.0, 12.0)
    assert (b["ratio_to_reference"], b["best_to_reference"]) == (4.0, 4.0)
    turn = ["prepare", "limit", "a", "limit", "limit", "b", "b"]
    assert clock.calls == ["a", "b", *turn * 4]  # verified, one round that does not count, three that do
    assert found["repetitions"] == 3


@pytest.mark.parametrize("failure", ["raises", "is wrong"])
def test_a_failing_peer_is_recorded(failure):
    def run():
        if failure == "raises":
            raise RuntimeError("no compiler\n  a long trace")

    bound = limit.Limit(lambda: None, 1)
    peer = cases.Contender("peer", run, lambda _: 1e9, 1, bound, (1, 1), optional=True, allowed=100.0)
    found = measure.measure(cases.Section("test", [peer]), TINY)
    assert found["rows"] == []
    assert found["absent"]["peer"] == (
        "RuntimeError: no compiler"
        if failure == "raises"
        else "VerificationError: peer (1, 1) is off by 1e+09 times its bound"
    )


@pytest.mark.parametrize("bypass", [True, False])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (640, 256)])
def test_the_limits_do_their_work(shape, bypass):
    a, b, c = (limit.aligned(shape) for _ in range(3))
    assert c.ctypes.data % 64 == 0
    a[...], b[...] = np.random.default_rng(0).standard_normal((2, *shape))
    bound = limit.triad(a, b, c, 2, bypass=bypass)
    bound.run()
    np.testing.assert_allclose(c, a + limit.FACTOR * b, rtol=1e-6, atol=1e-6)
    assert bound.bytes == 12 * a.size
    bound = limit.copy(a, c, 2, bypass=bypass)
    bound.run()
    np.testing.assert_array_equal(c, a)
    assert bound.bytes == 8 * a.size


def test_memory_grows_with_the_row_and_not_with_the_batch():
    def peak(B, V):
        return measure.peak_memory((B, V), threads=1)["peak_bytes"]

    few, many, wide = peak(64, 4096), peak(1024, 4096), peak(64, 16384)
    assert many - few < 960 * 256  # a few numbers a row, where a gradient or a softmax would take 16 KiB
    assert wide < 64 * 16384  # a few rows of scratch, not a batch
