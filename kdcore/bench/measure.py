"""How it is timed: verified first, then in turns with the limit, so that a busy machine hits all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import kdcore
from kdcore import ops
from kdcore.bench.cases import Contender, Section, Settings
from kdcore.errors import KdcoreError

__all__ = ["VerificationError", "first_calls", "measure", "peak_memory", "summary"]


#: Threads of OpenMP, which peers use, go on spinning for some milliseconds after their last work.
_SPIN_SECONDS = 0.02


class VerificationError(KdcoreError, AssertionError):
    """What was to be timed does not agree with the textbook."""


def measure(section: Section, settings: Settings) -> dict[str, Any]:
    """Verify the contenders of a section, then time them: every repetition has each once, right after its limit."""
    absent = dict(section.absent)
    rows: dict[str, dict[str, Any]] = {}
    ready = []
    for contender in section.contenders:
        try:
            rows[contender.name] = _verified(contender)
        except Exception as error:
            if not contender.optional:
                raise
            absent[contender.name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        else:
            ready.append(contender)

    times: dict[str, list[float]] = {contender.name: [] for contender in ready}
    limits: dict[str, list[float]] = {contender.name: [] for contender in ready}
    for contender in ready:  # an uncounted round: pages, pools and caches are as later rounds find them
        _turn(contender)
    began, repetitions = time.perf_counter(), 0
    while repetitions < max(settings.least, section.least) or (
        repetitions < settings.most and time.perf_counter() - began < settings.seconds
    ):
        for contender in ready:
            bound, own = _turn(contender)
            limits[contender.name].append(bound)
            times[contender.name].append(own)
        repetitions += 1

    for contender in ready:
        row = rows[contender.name]
        row |= summary(times[contender.name], limits[contender.name], contender.bytes, contender.limit.bytes)
        if contender.reference is not None and contender.reference in times:
            row["reference"] = contender.reference
            mine, others = times[contender.name], times[contender.reference]
            row |= {"ratio_to_reference": _ratio(mine, others), "best_to_reference": min(mine) / min(others)}
    return {"title": section.title, "repetitions": repetitions, "rows": list(rows.values()), "absent": absent}


def _turn(contender: Contender) -> tuple[float, float]:
    """Seconds of the limit's call and of the contender's."""
    if contender.prepare is not None:
        contender.prepare()
    seconds = _seconds(contender.limit.run, contender.number), _seconds(contender.run, contender.number)
    if contender.optional:
        time.sleep(_SPIN_SECONDS)
        contender.limit.run()  # and ours wake up
    return seconds


def summary(times: Sequence[float], limits: Sequence[float], moved: int, limit_moved: int) -> dict[str, float]:
    """Figures of a contender's times and of its limit's, repetition by repetition.

    ``ratio_to_limit`` is the median of the ratios that are formed within a repetition; ``ratio_of_minima`` the best
    time over the limit's best. ``share_of_limit`` is the contender's bandwidth, by the least traffic it could have,
    over the limit's.
    """
    ratio = _ratio(times, limits)
    return {
        "median_seconds": statistics.median(times),
        "min_seconds": min(times),
        "max_seconds": max(times),
        "limit_median_seconds": statistics.median(limits),
        "limit_min_seconds": min(limits),
        "ratio_to_limit": ratio,
        "ratio_of_minima": min(times) / min(limits),
        "least_bytes": moved,
        "share_of_limit": moved / limit_moved / ratio,
        "limit_bytes_per_second": limit_moved / statistics.median(limits),
    }


def _ratio(times: Sequence[float], others: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def _seconds(call: Callable[[], Any], number: int) -> float:
    began = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - began) / number


def _verified(contender: Contender) -> dict[str, Any]:
    """The first call, timed apart since it may compile, and its error."""
    began = time.perf_counter()
    result = contender.run()
    first = time.perf_counter() - began
    excess = contender.verify(result)
    if not excess <= contender.allowed:
        raise VerificationError(f"{contender.name} {contender.shape} is off by {excess:.3g} times its bound")
    return {
        "name": contender.name,
        "shape": contender.shape,
        "error_over_bound": excess,
        "first_call_seconds": first,
    }


# --- first call ----------------------------------------------------------------------------------------------------

_FIRST_CALL = """
import json, time
import numpy as np
import kdcore
s, t = np.random.default_rng(0).standard_normal((2, 8, 128), np.float32)
y = np.zeros(8, np.int64)
ready = time.monotonic()
kdcore.kd_loss_and_gradient(s, t, y, 2.0, 0.3)
first = time.monotonic()
kdcore.kd_loss_and_gradient(s, t, y, 2.0, 0.3)
print(json.dumps([ready, first, time.monotonic()]))
"""


def first_calls(repetitions: int) -> list[dict[str, Any]]:
    """Seconds from the start of a process to the end of its first call, with an empty cache of kernels and a full one.

    ``imports_seconds`` (the interpreter, NumPy, and kdcore, which loads Numba only when first called) and
    ``first_call_seconds`` are its two parts. Medians of ``repetitions`` processes.
    """
    parts: dict[str, list[list[float]]] = {"cold": [], "warm": []}
    for _ in range(repetitions):
        with tempfile.TemporaryDirectory(prefix="kdcore-bench-") as cache:
            path = os.pathsep.join(filter(None, [str(Path(kdcore.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
            environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": path}
            for taken in parts.values():
                began = time.monotonic()
                run = subprocess.run(
                    [sys.executable, "-c", _FIRST_CALL], env=environment, capture_output=True, text=True, check=True
                )
                ready, first, second = json.loads(run.stdout)
                taken.append([first - began, ready - began, first - ready, second - first])
    names = ("total_seconds", "imports_seconds", "first_call_seconds", "second_call_seconds")
    return [
        {"name": name, **dict(zip(names, map(statistics.median, zip(*taken, strict=True)), strict=True))}
        for name, taken in parts.items()
    ]


# --- memory --------------------------------------------------------------------------------------------------------


def peak_memory(shape: tuple[int, int], threads: int) -> dict[str, Any]:
    """The most memory that one call with ``out=`` takes beyond its arguments.

    ``peak_bytes`` is what NumPy allocated (tracemalloc); ``resident_bytes`` how far the process's peak of resident
    memory rose, which also sees what kernels allocate but not what an allocator kept from earlier calls. None where
    the system does not tell.
    """
    student, teacher = np.random.default_rng(0).standard_normal((2, *shape), np.float32)
    gradient, labels = np.ones(shape, np.float32), np.zeros(shape[0], np.int64)  # ones: pages that exist

    def call(rows: int) -> None:
        ops.kd_loss_and_gradient(
            student[:rows], teacher[:rows], labels[:rows], 2.0, 0.3, out=gradient[:rows], threads=threads
        )

    call(1)  # compiles
    resident = _resident_growth(lambda: call(shape[0]))
    tracemalloc.start()
    try:
        call(shape[0])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    return {"shape": shape, "array_bytes": student.nbytes, "peak_bytes": peak, "resident_bytes": resident}


def _resident_growth(call: Callable[[], Any]) -> int | None:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident now
        before = _kibibytes("VmRSS")
        call()
        return 1024 * max(0, _kibibytes("VmHWM") - before)
    except (OSError, LookupError):
        return None


def _kibibytes(field: str) -> int:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[field].split()[0])
