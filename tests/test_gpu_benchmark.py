"""benchmarks/gpu.py without a device: its dry run, how it reads its results, and what it makes of failures."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from kdcore import ops

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu():
    path = list(sys.path)
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    sys.path[:] = path
    yield module
    del sys.modules[spec.name]


def run(*words, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *words],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **environment},
        check=False,
    )


# --- a run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run(gpu, tmp_path):
    done = run("--dry", "--output", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"results.json", "table.md", "log.txt"}
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["device"] is None and results["versions"]["numpy"] == np.__version__ and results["sources"]
    assert {part: found["status"] for part, found in results["parts"].items()} == {
        "tests": "needs a device", "sanitizer": "needs a device", "bandwidth": "needs a device", "parity": "done",
        "speed": "done", "variants": "needs a device", "softmax": "done", "latency": "done",
        "interop": "needs a device",
    }  # fmt: skip
    assert list(results["parts"]) == list(gpu.PARTS)
    for part in ("parity", "speed", "softmax", "latency"):
        checks = gpu.records_of(results, part, "check")
        assert len(checks) >= 2 and all(check["ok"] for check in checks)
        assert all(task["status"] == "done" for task in results["parts"][part]["tasks"].values())
    named = {(row["task"], row["name"]) for row in gpu.records_of(results, "speed", "row")}
    assert {("kdcore", "kdcore"), ("kdcore", "kdcore, in place")} <= named
    if importlib.util.find_spec("torch"):
        assert {("torch eager", "torch eager"), ("kdcore", "kdcore.torch"), ("kdcore", gpu.TRIAD)} <= named
    else:
        reasons = {record["name"]: record["reason"] for record in gpu.records_of(results, "speed", "absent")}
        assert reasons["torch eager"] == "torch is not installed"

    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert table == gpu.table(results)
    assert "| parity | done |" in table and "| [8, 512] | float32 | 2 | 0.3 |" in table
    assert gpu.table(results, short=True) in done.stdout

    again = run("--dry", "--only", "softmax", "--output", str(tmp_path / "out"))  # over its own results
    assert again.returncode == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert {part for part, found in results["parts"].items() if found["status"] != "left out"} == {"softmax"}


def test_without_a_device_it_says_so(tmp_path):
    done = run("--output", str(tmp_path / "out"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.startswith("no CUDA device: ")
    assert not (tmp_path / "out").exists()


def test_results_of_something_else_are_left_alone(tmp_path):
    (tmp_path / "results.json").write_text('{"benchmark": "kdcore"}', encoding="utf-8")
    done = run("--dry", "--output", str(tmp_path))
    assert done.returncode == 1 and "not from an earlier run" in done.stderr
    assert (tmp_path / "results.json").read_text(encoding="utf-8") == '{"benchmark": "kdcore"}'


def test_it_ends_within_nine_minutes(gpu):
    parts = sum(part.seconds + gpu._GRACE for part in gpu.PARTS.values())
    assert parts <= gpu._WHOLE_RUN + 30  # the parts that come first give way
    assert gpu._WHOLE_RUN + gpu._GRACE < 9 * 60 - 10


# --- tables --------------------------------------------------------------------------------------------------------


def row(task, name, seconds, shape=(4096, 32768), dtype="float32", arrays=3, **more):
    size = shape[0] * shape[1] * np.dtype(dtype if dtype != "bfloat16" else "float16").itemsize
    return {
        "kind": "row", "task": task, "name": name, "shape": list(shape), "dtype": dtype, "temperature": 2.0,
        "alpha": 0.3, "seconds": [1e-3 * value for value in seconds], "bytes": arrays * size, "error_over_bound": 0.25,
        "parts": 1, "late": 0, **more,
    }  # fmt: skip


def hand_made(gpu):
    parts = {part: {"status": "done"} for part in gpu.PARTS}
    # 4000 GB/s: the median of three times.
    copy = {"kind": "row", "task": "bandwidth", "name": "copy", "bytes": 8_000_000_000, "seconds": [2e-3, 1e-3, 9e-3]}
    parts["bandwidth"]["records"] = [copy]
    parts["speed"]["records"] = [
        row("kdcore", "kdcore", [0.5, 0.4, 0.6]),  # 1610612736 bytes
        row("kdcore", gpu.TRIAD, [0.4, 0.4, 0.3]),
        row("kdcore", "kdcore, in place", [0.3, 0.3, 0.7]),
        row("kdcore", "kdcore.torch", [0.8, 0.9, 1.0]),
        row("torch eager", "kdcore", [1, 2, 4]),
        row("torch eager", "torch eager", [9, 10, 40]),
        row("torch.compile", "kdcore", [1, 1, 1]),
        row("torch.compile", "torch.compile", [3, 2, 4], parts=2),
        row("kdcore", "kdcore", [1, 1, 1], shape=(2048, 50257), dtype="bfloat16"),
    ]
    parts["variants"]["records"] = [
        row("variants", "as chosen", [3, 3, 3]),
        row("variants", gpu.TRIAD, [1, 1, 1]),
        *(row("variants", f"row threads={k}", [k, k, k]) for k in (5, 2, 4, 6)),
    ]
    parts["softmax"]["records"] = [
        row("softmax", "kdcore softmax", [1, 2, 1], arrays=2),
        row("softmax", "torch softmax", [3, 2, 4], arrays=2),
    ]
    seconds = {"host_seconds": 1e-5, "call_seconds": 2e-5, "single_seconds": 3.25e-5}
    parts["latency"]["records"] = [{"kind": "row", "task": "latency", "name": "kdcore", **seconds}]
    return {
        "benchmark": "kdcore gpu", "command": "-", "date": "-", "commit": "-", "sources": "-", "versions": {},
        "device": {
            "name": "a device", "compute_capability": [9, 0], "multiprocessors": 132, "l2_bytes": 60 << 20,
            "memory_bytes": 139 << 30, "driver": "-", "cuda_runtime": "13.0",
        },
        "parts": parts,
    }  # fmt: skip


def cells(lines, **columns):
    """The rows of a table in which the columns have these values, each a dict by column."""
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, _, *body = split
    rows = [dict(zip(head, cells, strict=True)) for cells in body]
    return [found for found in rows if all(found[column] == value for column, value in columns.items())]


def test_shares_and_ratios(gpu):
    results = hand_made(gpu)
    assert gpu.copy_rate(results) == 4e12
    lines = gpu.speed_table(results)
    (wide,) = cells(lines, shape="[4096, 32768]")
    assert wide["ms"] == "0.5000" and wide["GB/s"] == "3221"
    assert wide["% of copy"] == "80.5 (85)"
    assert wide["% of triad"] == "80.0"  # of 1.25, 1 and 2, not of medians
    assert (wide["in place ms"], wide["kdcore.torch ms"]) == ("0.3000", "0.9000")
    assert (
        wide["x torch eager"] == "9.00 (8)"
    )  # of 9, 5 and 10, in its own process: neither of medians nor of the first
    assert wide["x torch.compile"] == "3.00* (2.5)" and wide["x Liger-Kernel"] == ""
    assert wide["error/bound"] == "0.25"
    (narrow,) = cells(lines, shape="[2048, 50257]", dtype="bfloat16")
    assert narrow["% of copy"] == "15.4" and narrow["% of triad"] == ""  # 617558016 bytes; nothing is aimed at
    assert any(line.startswith("\\* in parts of the batch") for line in lines)

    (softmax,) = cells(gpu.softmax_table(results))
    assert (softmax["GB/s"], softmax["% of copy"], softmax["x torch"]) == ("1074", "26.8", "3.00")
    plans = cells(gpu.variants_table(results, None))
    assert [plan["plan"] for plan in plans] == [
        "row threads=2", "as chosen", "row threads=4", "row threads=5", "row threads=6"
    ]  # fmt: skip
    assert [plan["plan"] for plan in cells(gpu.variants_table(results, 2))] == [
        "as chosen", "row threads=2", "as chosen"
    ]  # fmt: skip
    assert list(cells(gpu.latency_table(results))[0].values()) == ["kdcore", "10.0", "20.0", "32.5"]
    assert "compute capability 9.0, 132 multiprocessors, L2 60 MiB" in gpu.table(results)


def test_without_a_copy_there_are_no_shares(gpu):
    results = hand_made(gpu)
    results["parts"]["bandwidth"] = {"status": "failed"}
    (wide,) = cells(gpu.speed_table(results), shape="[4096, 32768]")
    assert wide["% of copy"] == "" and wide["GB/s"] == "3221"
    assert gpu.plot(results, None).startswith("no plot")


def test_what_is_wrong_is_shown_and_counts(gpu):
    results = hand_made(gpu)
    assert gpu.is_right(results)
    results["parts"]["variants"]["status"] = "timed out"
    assert gpu.is_right(results)  # nothing wrong was seen
    results["parts"]["parity"]["status"] = "timed out"
    assert not gpu.is_right(results)  # it must end
    results["parts"]["parity"]["status"] = "absent"
    assert gpu.is_right(results)
    wrong = {"kind": "check", "task": "kdcore", "name": "a shape", "ok": False, "detail": "3 times the bound"}
    results["parts"]["speed"]["records"].append(wrong)
    assert not gpu.is_right(results) and gpu.status_of(results["parts"]["speed"]) == "failed"
    for short in (False, True):
        assert "**wrong**, speed: a shape: 3 times the bound" in gpu.table(results, short=short)


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_plot(gpu, tmp_path):
    assert gpu.plot(hand_made(gpu), tmp_path / "speed.png") == f"written: {tmp_path / 'speed.png'}"
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0),
        ("========= ERROR SUMMARY: 1 error", 1),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)", 2),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", 0),
        ("========= Error: Device not supported", None),
    ],
)
def test_the_words_of_the_sanitizer(gpu, text, errors):
    assert gpu.sanitizer_errors(f"========= COMPUTE-SANITIZER\n{text}\n") == errors


# --- verification --------------------------------------------------------------------------------------------------


def records(gpu, part, name):
    lines = []
    task = gpu.Task(name, gpu.DRY, gpu.Host(), 60.0, lines.append)
    gpu.PARTS[part].work(task)
    return [json.loads(line) for line in lines]


def spoil_a_class(result):
    result.gradient[-1, 7] += 1e-4
    return result


def leave_an_element(result):
    result.gradient[2, 3] = np.nan
    return result


BUGS = {
    "a class of a row": spoil_a_class,
    "an element that is not written": leave_an_element,
    "all losses": lambda result: result._replace(loss=result.loss * (1 + 1e-5)),
    "the row losses": lambda result: result._replace(loss=result.loss * (1 + 1e-5)) if np.ndim(result.loss) else result,
    "the mean": lambda result: result._replace(loss=result.loss / 48) if np.ndim(result.loss) == 0 else result,
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_wrong_kernel_is_not_timed(gpu, monkeypatch, bug):
    right = ops.kd_loss_and_gradient
    wrong = SimpleNamespace(kd_loss_and_gradient=lambda *given, **more: BUGS[bug](right(*given, **more)))
    monkeypatch.setattr(gpu, "ops", wrong)
    found = records(gpu, "speed", "kdcore")
    assert not [record for record in found if record["kind"] == "row" and record["name"].startswith("kdcore, ")]
    checks = [record for record in found if record["kind"] == "check" and "kdcore.torch" not in record["name"]]
    assert len(checks) == 8 and not any(check["ok"] for check in checks)
    assert "times its bound" in checks[0]["detail"]


@pytest.mark.parametrize("bug", ["a class of a row", "the row losses"])
def test_parity_sees_a_wrong_kernel(gpu, monkeypatch, bug):
    assert all(record["ok"] for record in records(gpu, "parity", "float32"))
    right = ops.kd_loss_and_gradient

    def wrong(*given, out=None, **more):
        result = right(*given, out=out, **more)
        return result if out is not None else BUGS[bug](result)  # what stands for the device's

    monkeypatch.setattr(gpu, "ops", SimpleNamespace(kd_loss_and_gradient=wrong))
    found = {record["name"]: record["ok"] for record in records(gpu, "parity", "float32")}
    assert found["[4, 48] float32 T=2 alpha=0.3 forward_kl"] is False


def test_parity_sees_bits_that_depend_on_the_batch(gpu, monkeypatch):
    right = ops.kd_loss_and_gradient

    def wrong(student, *given, **more):
        result = right(student, *given, **more)
        return result._replace(loss=result.loss * (1 + 1e-15 * len(student)))

    monkeypatch.setattr(gpu, "ops", SimpleNamespace(kd_loss_and_gradient=wrong))
    wrong = [record["name"] for record in records(gpu, "parity", "float32") if not record["ok"]]
    assert wrong == [f"[{shape}] float32 T=2 alpha=0.3 forward_kl: the same bits in two batches"
                     for shape in ("4, 48", "3, 33")]  # fmt: skip


@pytest.mark.parametrize("operation", ["softmax", "log_softmax", "logsumexp"])
def test_errors_of_row_operations(gpu, operation):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = gpu.host_logits((4, 100), "float32", 0)
    right = getattr(ops, operation)(x)
    assert gpu.row_excess(operation, right, x) < 1 < gpu.row_excess(operation, right * (1 + 1e-5), x)
    assert gpu.row_excess(operation, right * np.nan, x) == np.inf
    narrow = x.astype(ml_dtypes.bfloat16)
    right = getattr(ops, operation)(narrow)
    assert gpu.row_excess(operation, right, narrow) < 1
    assert gpu.row_excess(operation, (right.astype(np.float64) * 1.02).astype(right.dtype), narrow) > 1


def contender(gpu, run, excess=0.5, **more):
    return gpu.Contender("it", run, lambda _: excess, 100, **more)


def raises(error):
    raise error


def test_what_fails_and_may(gpu):
    lines = []
    task = gpu.Task("test", gpu.DRY, gpu.Host(), 60.0, lines.append)
    memory = RuntimeError("CUDA out of memory. Tried to allocate")
    fails = contender(gpu, lambda: raises(ValueError("no\n  such thing")))
    peer = contender(gpu, lambda: raises(ValueError("no such thing")), may_fail=(Exception,))
    large = contender(gpu, lambda: raises(memory), may_fail=(Exception,), smaller=lambda: contender(gpu, int, parts=2))
    gpu.section(task, {"where": "here"}, [fails, peer, large, contender(gpu, int, np.nan)])
    check, absent, judged, not_a_number, timed = map(json.loads, lines)
    assert judged["ok"] and judged["excess"] == 0.5
    assert not_a_number["ok"] is False
    assert (check["ok"], check["detail"]) == (False, "ValueError: no such thing")
    assert (absent["kind"], absent["reason"]) == ("absent", "ValueError: no such thing")
    assert timed["parts"] == 2 and len(timed["seconds"]) == 3


def test_blocks_of_rows(gpu):
    a, b = np.arange(70.0).reshape(35, 2), np.ones((35, 2))
    np.testing.assert_array_equal(gpu.by_rows(lambda x, y: (x + y).sum(axis=-1), a, b), (a + b).sum(axis=-1))


# --- processes -----------------------------------------------------------------------------------------------------

_RECORD = "import os, sys, subprocess, time; f = open(sys.argv[-1], 'a', 1); print('here I am', flush=True); "


@pytest.fixture
def a_run(gpu, tmp_path):
    (tmp_path / "work").mkdir()
    a_run = gpu.Run(gpu.parse(["--output", str(tmp_path / "out")]), tmp_path / "work")
    a_run.choose_output()
    return a_run


@pytest.fixture
def processes(a_run, tmp_path):
    def follow(*scripts, seconds=30.0):
        found = a_run.results["parts"]["parity"] = {"status": "done"}
        started = [
            a_run._start([sys.executable, "-c", _RECORD + script], str(k), seconds) for k, script in enumerate(scripts)
        ]
        a_run._follow(started, found)
        written = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
        assert written["parts"]["parity"] == found
        return found

    return follow


CHECK = 'f.write(\'{"kind": "check", "name": "a", "ok": true}\\n\'); '


def test_a_crash_is_recorded(gpu, processes):
    found = processes(CHECK + 'f.write(\'{"kind": "che\'); f.flush(); os.abort()', CHECK + CHECK)
    assert [record["task"] for record in found["records"]].count("1") == 2
    assert [record["task"] for record in found["records"]].count("0") == 1  # what came before the crash
    assert found["tasks"]["0"]["status"] == "failed" and "here I am" in found["tasks"]["0"]["tail"]
    assert found["tasks"]["1"]["status"] == "done"
    assert gpu.status_of(found) == "failed"


def test_what_hangs_is_ended_with_all_that_it_started(gpu, processes, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_GRACE", 0.0)
    child = tmp_path / "child"
    began = time.monotonic()
    sleeper = f"p = subprocess.Popen(['sleep', '600']); open({str(child)!r}, 'w').write(str(p.pid)); time.sleep(600)"
    found = processes(CHECK + sleeper, seconds=3.0)
    assert time.monotonic() - began < 30
    assert found["tasks"]["0"]["status"] == "timed out" and len(found["records"]) == 1
    assert gpu.status_of(found) == "timed out"
    state = Path(f"/proc/{child.read_text()}/stat")
    deadline = time.monotonic() + 10
    while state.exists() and state.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_counts_are_added_up(processes):
    count = 'f.write(\'{"kind": "count", "name": "passed"}\\n\'); '
    assert processes(2 * count, 3 * count)["counts"] == {"passed": 5}


SAYS = "echo '========= ERROR SUMMARY: {} errors'"
SEEN = """for last; do :; done; echo '{"kind": "check", "name": "a", "ok": true}' >> $last"""


@pytest.mark.parametrize(
    ("tool", "status", "right"),
    [
        (None, "absent", True),
        ("echo Device not supported; exit 1", "absent", True),
        (f"{SEEN}; {SAYS.format(0)}", "done", True),
        (f"{SEEN}; {SAYS.format(2)}", "failed", False),
        (f"{SEEN}; exit 1", "failed", False),
        (SEEN, "failed", False),
    ],
)
def test_a_sanitizer(gpu, a_run, tmp_path, monkeypatch, tool, status, right):
    path = tmp_path / "compute-sanitizer"
    if tool is not None:
        path.write_text(f"#!/bin/sh\n{tool}\n")
        path.chmod(0o755)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: str(path) if tool is not None else None)
    monkeypatch.setattr(gpu.Path, "glob", lambda self, pattern: [])
    a_run.run("sanitizer")
    found = a_run.results["parts"]["sanitizer"]
    assert found["status"] == status, found
    assert gpu.is_right(a_run.results) is right
    assert "sanitizer" in gpu.table({**hand_made(gpu), "parts": a_run.results["parts"]})
