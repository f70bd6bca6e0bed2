#!/usr/bin/env python3
"""The CUDA engine on a device: is it right, and how fast is it.

    python3 benchmarks/gpu.py [--output DIR] [--only PART ...] [--quick]
    python3 benchmarks/gpu.py --dry        # without a device: what needs none, at tiny sizes, on the CPU

Runs from a plain checkout within nine minutes; PyTorch makes the arrays and the events. Parts run one after another,
each in processes of its own with a time limit: one that crashes or hangs is recorded, and the next goes on. Results are
written as they come, to DIR/results.json, in the end to DIR/table.md; what the processes print is in DIR/log.txt.
benchmarks/README.md says what the columns mean. The exit code is 1 if something is not right.

The file in four: places (a device, or the host), what is timed and how, the parts, the run that starts them.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import gc
import hashlib
import io
import json
import math
import os
import platform
import pstats
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402 (kdcore is found by the line above)

from kdcore import ops, variants  # noqa: E402
from kdcore._version import __version__  # noqa: E402
from kdcore.bench import textbook  # noqa: E402
from kdcore.errors import DomainError, KdcoreError  # noqa: E402
from kdcore.testing import bounds  # noqa: E402

BENCHMARK = "kdcore gpu"
#: Statuses of a part.
DONE, FAILED, TIMED_OUT, ABSENT = "done", "failed", "timed out", "absent"
NEEDS_A_DEVICE, LEFT_OUT = "needs a device", "left out"

Shape = tuple[int, int]

#: Of the least traffic over the time, as a share of the copy's bandwidth.
SHARE_TARGETS = {
    ((4096, 32768), "float32"): 0.85,
    ((4096, 32768), "bfloat16"): 0.85,
    ((4096, 131072), "float32"): 0.80,
    ((8192, 151936), "float32"): 0.80,
    ((4096, 131072), "bfloat16"): 0.70,
    ((8192, 151936), "bfloat16"): 0.70,
}
#: A peer's time over kdcore's.
PEER_TARGETS = {"torch eager": 8.0, "torch.compile": 2.5, "Liger-Kernel": 6.0}
COPY, TRIAD = "copy", "limit: torch.add(s, t, alpha=0.3)"


class Objective(NamedTuple):
    temperature: float
    alpha: float

    def __str__(self) -> str:
        return f"T={self.temperature:g} alpha={self.alpha:g}"


MAIN = Objective(2.0, 0.3)


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. A section repeats for ``seconds``, but at least ``least`` times and at most ``most``."""

    speed: tuple[Shape, ...]
    objectives: tuple[Objective, ...]
    variants: tuple[Shape, ...]
    softmax: tuple[Shape, ...]
    parity: tuple[Shape, ...]
    divergences: tuple[Shape, ...]
    temperatures: tuple[float, ...]
    dtypes: tuple[str, ...]
    copy_bytes: int
    calls: int
    seconds: float
    least: int
    most: int


FULL = Settings(
    speed=((4096, 32768), (4096, 131072), (8192, 151936), (2048, 50257)),
    objectives=(MAIN, Objective(2.0, 0.0), Objective(1.0, 0.3)),
    variants=((4096, 131072), (8192, 151936), (4096, 32768), (2048, 50257)),
    softmax=((4096, 32768), (4096, 131072)),
    parity=((64, 151936), (256, 32768), (16, 262144), (64, 50257)),
    divergences=((64, 32768), (16, 50257)),
    temperatures=(2.0, 1.0, 3.0),
    dtypes=("float32", "bfloat16"),
    copy_bytes=4 << 30,
    calls=2000,
    seconds=0.6,
    least=20,
    most=60,
)
QUICK = Settings(
    speed=((4096, 32768), (2048, 50257)),
    objectives=(MAIN,),
    variants=((4096, 131072),),
    softmax=((4096, 32768),),
    parity=((64, 50257),),
    divergences=((16, 50257),),
    temperatures=(2.0,),
    dtypes=("float32", "bfloat16"),
    copy_bytes=2 << 30,
    calls=500,
    seconds=0.1,
    least=5,
    most=20,
)
DRY = Settings(
    speed=((8, 512), (5, 333)),
    objectives=(MAIN, Objective(2.0, 0.0)),
    variants=(),
    softmax=((8, 512),),
    parity=((4, 48), (3, 33)),
    divergences=(),
    temperatures=(2.0,),
    dtypes=("float32",),
    copy_bytes=0,
    calls=20,
    seconds=0.0,
    least=3,
    most=3,
)


# --- places --------------------------------------------------------------------------------------------------------


def planned(**plan: Any) -> Any:
    """The context in which kdcore works by a plan; without one, as it chooses."""
    return import_module("kdcore.cuda.plans").using(**plan) if plan else contextlib.nullcontext()


def numpy_dtype(name: str) -> np.dtype[Any]:
    return np.dtype(import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


def labels_of(shape: Shape, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, shape[1], shape[0])


def host_logits(shape: Shape, dtype: str, seed: int) -> np.ndarray:
    return (4 * np.random.default_rng(seed).standard_normal(shape, np.float32)).astype(numpy_dtype(dtype))


class Host:
    """NumPy arrays and the CPU engine: where the script runs without a device."""

    on_device = False

    @cached_property
    def torch(self) -> Any:
        """PyTorch, whose import takes longer than all else here; None where it is not installed."""
        return import_module("torch") if find_spec("torch") else None

    def logits(self, shape: Shape, dtype: str, seed: int) -> Any:
        return host_logits(shape, dtype, seed)

    def put(self, array: np.ndarray) -> Any:
        return array.copy()

    def get(self, array: Any) -> np.ndarray:
        return np.array(array.detach().numpy() if hasattr(array, "detach") else array)

    def empty_like(self, array: Any) -> Any:
        return np.empty_like(array)

    def tensor(self, array: Any) -> Any:
        """The same memory as a tensor of PyTorch."""
        return self.torch.from_numpy(array)

    def copy(self, to: Any, source: Any) -> None:
        np.copyto(to, source)

    def poison(self, array: Any) -> None:
        array.fill(np.nan)

    def is_finite(self, array: Any) -> bool:
        return bool(np.isfinite(array).all())

    def synchronize(self) -> None:
        pass

    def release(self) -> None:
        pass

    def room(self) -> float:
        """Bytes that arrays may take."""
        return math.inf

    def turn(self, contenders: list[Contender]) -> list[tuple[float, bool]]:
        """Seconds of one call each, and whether the place never waited for the program."""
        taken = []
        for contender in contenders:
            if contender.prepare is not None:
                contender.prepare()
            began = time.perf_counter()
            contender.run()
            taken.append((time.perf_counter() - began, True))
        return taken


class Card:
    """PyTorch's tensors on a CUDA device, timed by its events."""

    on_device = True
    #: Flushes before a call at most, which is how far the program may be behind.
    _MOST_FLUSHES = 64

    def __init__(self) -> None:
        self.torch: Any = import_module("torch")
        self.device = self.torch.device("cuda", 0)
        cache = getattr(self.torch.cuda.get_device_properties(self.device), "L2_cache_size", 0) or 64 << 20
        self._other = self.torch.ones(max(4 * cache, 256 << 20) // 4, device=self.device)
        self._flushes: Counter[str] = Counter()

    def logits(self, shape: Shape, dtype: str, seed: int) -> Any:
        generator = self.torch.Generator(self.device).manual_seed(seed)
        kind = getattr(self.torch, dtype)
        return self.torch.randn(shape, generator=generator, device=self.device, dtype=kind).mul_(4)

    def put(self, array: np.ndarray) -> Any:
        if array.dtype.name == "bfloat16":
            bits = self.torch.from_numpy(array.view(np.int16))
            return bits.to(self.device).view(self.torch.bfloat16)
        return self.torch.from_numpy(array).to(self.device)

    def get(self, array: Any) -> np.ndarray:
        array = array.detach().cpu()
        if array.dtype == self.torch.bfloat16:
            return array.view(self.torch.int16).numpy().view(numpy_dtype("bfloat16"))
        return array.numpy()

    def empty_like(self, array: Any) -> Any:
        return self.torch.empty_like(array)

    def tensor(self, array: Any) -> Any:
        return array

    def copy(self, to: Any, source: Any) -> None:
        to.copy_(source)

    def poison(self, array: Any) -> None:
        array.fill_(math.nan)

    def is_finite(self, array: Any) -> bool:
        return all(bool(self.torch.isfinite(part).all()) for part in array.split(512))

    def synchronize(self) -> None:
        self.torch.cuda.synchronize()

    def release(self) -> None:
        gc.collect()
        self.torch.cuda.empty_cache()

    def room(self) -> float:
        return 0.85 * self.torch.cuda.mem_get_info()[0]

    def turn(self, contenders: list[Contender]) -> list[tuple[float, bool]]:
        """Before a call, a large array of no use is read until the cache has nothing else, and until the program, which
        goes on meanwhile, has queued the whole call: so what lies between the events is the device's time alone."""
        found = []
        for contender in contenders:
            if contender.prepare is not None:
                contender.prepare()
            start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(max(4, self._flushes[contender.name])):
                self._other.sum()
            start.record()
            began = time.perf_counter()
            contender.run()
            end.record()
            found.append((contender.name, start, end, not start.query(), time.perf_counter() - began))
        self.synchronize()
        taken = []
        for name, start, end, ahead, queued in found:
            seconds = start.elapsed_time(end) / 1e3
            if not ahead and seconds < 10 * queued:
                self._flushes[name] = min(self._MOST_FLUSHES, 2 * max(4, self._flushes[name]))
            taken.append((seconds, ahead))
        return taken


# --- what is timed, and how ----------------------------------------------------------------------------------------


class VerificationError(AssertionError):
    """A result is not what the textbook says."""


class LeftOutError(Exception):
    """Why something is not measured."""


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    ``verify`` takes what ``run`` returned and gives the worst error in units of its bound, of which ``allowed`` are.
    ``prepare`` runs, untimed, before each call. ``bytes`` is the least traffic. An error of ``may_fail`` is no failure
    of kdcore's; out of memory, ``smaller`` makes one that needs less, by so many ``parts`` of the batch.
    """

    name: str
    run: Callable[[], Any]
    verify: Callable[[Any], float]
    bytes: int
    prepare: Callable[[], Any] | None = None
    may_fail: tuple[type[Exception], ...] = ()
    allowed: float = 1.0
    parts: int = 1
    smaller: Callable[[], Contender] | None = None


class Task:
    """What a process of a part knows: where it runs, until when, and where its results go."""

    def __init__(self, name: str, settings: Settings, place: Any, seconds: float, write: Callable[[str], Any]) -> None:
        self.name, self.settings, self.place = name, settings, place
        self._end, self._write = time.monotonic() + seconds, write

    def left(self) -> float:
        return self._end - time.monotonic()

    def emit(self, kind: str, **fields: Any) -> None:
        self._write(json.dumps({"kind": kind, **fields}, allow_nan=False) + "\n")

    def check(self, name: str, right: bool, detail: str = "", **fields: Any) -> None:
        self.emit("check", name=name, ok=bool(right), detail=detail, **fields)

    def judge(self, name: str, excess: float) -> None:
        """A check that an error, in units of its bound, is at most 1."""
        right = excess <= 1.0
        self.check(name, right, "" if right else f"{excess:.3g} times the bound", excess=excess if right else None)

    def note(self, name: str, text: str) -> None:
        self.emit("note", name=name, text=text)

    def absent(self, name: str, reason: str) -> None:
        self.emit("absent", name=name, reason=reason)


def first_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def is_out_of_memory(error: BaseException) -> bool:
    return type(error).__name__ == "OutOfMemoryError" or "out of memory" in str(error).lower()


def section(task: Task, where: dict[str, Any], contenders: Iterable[Contender]) -> None:
    """Verify contenders, then time them in turns; a row each."""
    place, settings = task.place, task.settings
    title = " ".join(str(value) for value in where.values())
    ready, rows = [], []
    for contender in contenders:
        verified = _verified(task, contender, title)
        if verified is not None:
            ready.append(verified[0])
            rows.append(verified[1])
    times: list[list[float]] = [[] for _ in ready]
    waited = [0] * len(ready)
    if ready:
        place.turn(ready)  # uncounted: memory and caches are as later turns find them
    began = time.monotonic()
    while ready and (
        len(times[0]) < settings.least
        or (len(times[0]) < settings.most and time.monotonic() - began < settings.seconds)
    ):
        for k, (seconds, ahead) in enumerate(place.turn(ready)):
            times[k].append(seconds)
            waited[k] += not ahead
    for contender, row, seconds, late in zip(ready, rows, times, waited, strict=True):
        fields = {"bytes": contender.bytes, "parts": contender.parts, "late": late, "seconds": seconds, **row}
        task.emit("row", **where, name=contender.name, **fields)


def _verified(task: Task, contender: Contender, title: str) -> tuple[Contender, dict[str, Any]] | None:
    """A contender whose result is right, with its error and the seconds of its first call; None if there is none."""
    while True:
        began = time.perf_counter()
        try:
            result = contender.run()
            task.place.synchronize()
            first = time.perf_counter() - began
            excess = contender.verify(result)
            if not excess <= contender.allowed:
                raise VerificationError(f"off by {excess:.3g} times its bound")
        except Exception as error:
            reason, smaller = first_line(error), contender.smaller if is_out_of_memory(error) else None
            expected = isinstance(error, contender.may_fail)
        else:
            if Exception not in contender.may_fail:
                task.judge(f"{title}: {contender.name}", excess)
            return contender, {"error_over_bound": excess, "first_call_seconds": first}
        task.place.release()  # behind the except clause, whose traceback keeps arrays
        if smaller is None:
            break
        contender = smaller()
    if expected:
        task.absent(f"{title}: {contender.name}", reason)
    else:
        task.check(f"{title}: {contender.name}", False, reason)
    return None


class Data:
    """Logits, labels, a place for the gradient, and the rows that are verified, which the host has too."""

    def __init__(self, place: Any, shape: Shape, dtype: str) -> None:
        self.place, self.shape, self.dtype = place, shape, numpy_dtype(dtype)
        need = 4 * shape[0] * shape[1] * self.dtype.itemsize
        if need > place.room():
            raise LeftOutError(f"four arrays of {need / 4e9:.1f} GB do not fit into 85 % of the free memory")
        self.student, self.teacher = (place.logits(shape, dtype, seed) for seed in (1, 2))
        labels = labels_of(shape, 3)
        self.labels, self.out = place.put(labels), place.empty_like(self.student)
        B = shape[0]
        self.rows = sorted({0, 1, B // 3, B // 2, B - 1})
        self._of_rows = *(place.get(x[self.rows]) for x in (self.student, self.teacher)), labels[self.rows]
        self._expected: dict[Objective, textbook.Rows] = {}

    @property
    def bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def expected(self, objective: Objective) -> textbook.Rows:
        if objective not in self._expected:
            self._expected[objective] = textbook.kd_rows(*self._of_rows, *objective)
        return self._expected[objective]


def kdcore_contender(
    data: Data, objective: Objective, name: str = "kdcore", *, in_place: bool = False, **plan: Any
) -> Contender:
    """kdcore's loss and gradient; it is verified by its mean, by its row losses, and by rows of both gradients."""
    place = data.place
    student = out = place.empty_like(data.student) if in_place else data.student
    prepare = partial(place.copy, student, data.student) if in_place else None
    if not in_place:
        out = data.out

    def call(reduction: Any = "mean") -> Any:
        with planned(**plan):
            return ops.kd_loss_and_gradient(
                student, data.teacher, data.labels, *objective, reduction=reduction, out=out
            )

    def verify(_: Any) -> float:
        expected, rows, B = data.expected(objective), data.rows, data.shape[0]
        place.poison(out)  # what is not written shows
        if prepare is not None:
            prepare()
        mean = call()
        if not place.is_finite(out):
            return math.inf
        worst = [expected.gradient_excess(place.get(out[rows]), data.dtype, scale=1 / B)]
        if prepare is not None:
            prepare()
        each = call("none")
        losses = place.get(each.loss)
        worst += [expected.loss_excess(losses[rows]), expected.gradient_excess(place.get(out[rows]), data.dtype)]
        # Two float64 sums of the same losses differ by their order alone.
        worst.append(float(abs(float(mean.loss) - losses.mean()) / (1e-9 * np.abs(losses).mean())))
        return math.inf if any(map(math.isnan, worst)) else max(worst)

    if prepare is not None:
        prepare()
    moved = 2 if objective.alpha == 1 else 3
    may_fail = (DomainError,) if plan else ()  # not every plan can have every call
    return Contender(name, call, verify, moved * data.bytes, prepare=prepare, may_fail=may_fail)


def autograd_contender(data: Data, objective: Objective) -> Contender:
    """kdcore.torch, with the backward pass that scales the gradient."""
    place = data.place
    criterion = import_module("kdcore.torch").KDLoss(*objective)
    s, t, y = map(place.tensor, (data.student, data.teacher, data.labels))

    def call() -> list[Any]:
        x = s.detach().requires_grad_()
        return list(place.torch.autograd.grad(criterion(x, t, y), x))

    return Contender("kdcore.torch", call, partial(_peer_excess, data, objective), 3 * data.bytes)


def triad_contender(data: Data) -> Contender:
    """What a KD call must read and write, and nothing else."""
    torch = data.place.torch
    s, t, out = map(data.place.tensor, (data.student, data.teacher, data.out))

    def verify(_: Any) -> float:
        rows = data.rows
        exact = s[rows].double() + 0.3 * t[rows].double()
        return float(((out[rows].double() - exact).abs() / (2**-7 * (s[rows].abs() + t[rows].abs()).double())).max())

    return Contender(TRIAD, lambda: torch.add(s, t, alpha=0.3, out=out), verify, 3 * data.bytes, may_fail=(Exception,))


def _peer_excess(data: Data, objective: Objective, parts: list[Any]) -> float:
    """Of a gradient in parts, one below the other."""
    picked, first = [], 0
    for part in parts:
        mine = [row - first for row in data.rows if first <= row < first + len(part)]
        if mine:
            picked.append(data.place.get(part[mine]))
        first += len(part)
    return data.expected(objective).gradient_excess(np.concatenate(picked), data.dtype, scale=1 / data.shape[0])


def torch_objective(torch: Any, objective: Objective, kl: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """The KD loss as users of PyTorch write it, in float32 whatever the logits; ``kl`` of two log-softmaxes."""
    functional = torch.nn.functional
    temperature, alpha = objective

    def loss_of(s: Any, t: Any, y: Any) -> Any:
        s, t = s.float(), t.float()
        loss = alpha * functional.cross_entropy(s, y) if alpha > 0 else 0.0
        if alpha < 1:
            if temperature != 1:
                x, z = s / temperature, t / temperature
            else:
                x, z = s, t
            soft = kl(functional.log_softmax(x, dim=-1), functional.log_softmax(z, dim=-1))
            loss = loss + (1 - alpha) * temperature**2 * soft
        return loss

    return loss_of


def peer_contender(data: Data, objective: Objective, name: str, loss_of: Callable[..., Any], parts: int) -> Contender:
    """Loss and gradient by autograd, a part of the rows after another where all at once need too much memory."""
    torch = data.place.torch
    s, t, y = map(data.place.tensor, (data.student, data.teacher, data.labels))
    B = len(y)

    def call() -> list[Any]:
        gradients = []
        for a, b, c in zip(*(x.split(-(-B // parts)) for x in (s, t, y)), strict=True):
            x = a.detach().requires_grad_()
            loss = loss_of(x, b, c)
            gradients += torch.autograd.grad(loss if parts == 1 else loss * (len(c) / B), x)
        return gradients

    return Contender(
        name,
        call,
        partial(_peer_excess, data, objective),
        3 * data.bytes,
        may_fail=(Exception,),
        allowed=1000.0,  # a peer promises no bounds, but must compute the same
        parts=parts,
        smaller=partial(peer_contender, data, objective, name, loss_of, 2 * parts) if parts < min(B, 32) else None,
    )


# --- the parts -----------------------------------------------------------------------------------------------------


def part_tests(task: Task) -> None:
    """The tests that are marked gpu, every n-th of them; a check for each that fails."""
    import pytest

    k, n = map(int, task.name.split(" of "))
    n *= 4 if task.settings is QUICK else 1

    class Report:
        @pytest.hookimpl(trylast=True)
        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            items[:] = items[k - 1 :: n]

        def pytest_collectreport(self, report: Any) -> None:
            if report.failed:
                task.check(report.nodeid, False, str(report.longrepr)[-2000:])

        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or not report.passed:
                task.emit("count", name=report.outcome)
            if report.failed:
                task.check(report.nodeid, False, report.longreprtext[-2000:])

    os.chdir(ROOT)
    # A package that a later one has made old is no failure of a kernel.
    options = ["-m", "gpu", "-q", "--tb=short", "-p", "no:cacheprovider", "-W", "default::DeprecationWarning"]
    code = pytest.main(["tests", *options], plugins=[Report()])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        task.check("pytest", False, f"ended with {code!r}")


def numba_array(array: np.ndarray) -> Any:
    """A copy on the device, one of Numba's, which takes arrays of bfloat16 by their bits alone."""
    from numba import cuda

    if array.dtype.name == "bfloat16":
        return cuda.to_device(array.view(np.uint16)).view(array.dtype)
    return cuda.to_device(array)


def part_small(task: Task) -> None:
    """Every kernel at sizes that a sanitizer bears: odd V, each dtype, in place, -inf, NaN, masked; without PyTorch."""
    from kdcore.engines import to_host

    def try_kd(shape: Shape, dtype: str, divergence: str = "forward_kl", **plan: Any) -> None:
        name = " ".join([str(list(shape)), dtype, divergence, *map(str, plan.values())])
        V = shape[1]
        student, teacher = (host_logits(shape, dtype, seed) for seed in (1, 2))
        labels = labels_of(shape, 3)
        labels[1], labels[3] = -100, 0
        expected = textbook.kd_rows(student[[0, 4]], teacher[[0, 4]], labels[[0, 4]], *MAIN, divergence)
        student[2, V // 2] = np.nan
        student[3, V - 1] = teacher[3, V - 1] = -np.inf
        s = numba_array(student)
        given = s, numba_array(teacher), numba_array(labels)
        for where in ("new", "in place"):
            with planned(**plan):
                result = ops.kd_loss_and_gradient(
                    *given, *MAIN, divergence=divergence, reduction="none", out=s if where == "in place" else None
                )
            loss, gradient = to_host(result.loss), to_host(result.gradient).astype(np.float64)
            worst = max(
                expected.loss_excess(loss[[0, 4]]),
                expected.gradient_excess(to_host(result.gradient)[[0, 4]], student.dtype),
            )
            right = (
                loss[1] == 0 and not gradient[1].any()
                and math.isnan(loss[2]) and bool(np.isnan(gradient[2]).all())
                and bool(np.isfinite(gradient[3]).all()) and gradient[3, V - 1] == 0 and math.isfinite(loss[3])
            )  # fmt: skip
            task.judge(f"{name}, {where}", worst)
            task.check(f"{name}, {where}: masked, NaN and -inf", right, f"losses {loss.tolist()}")

    def try_row(shape: Shape, dtype: str, operation: str) -> None:
        x = host_logits(shape, dtype, 4)
        result = to_host(getattr(ops, operation)(numba_array(x)))
        task.judge(f"{list(shape)} {dtype} {operation}", row_excess(operation, result, x))

    def try_left() -> None:
        """A row whose divergence float32 does not find finite is worked again in float64: here it is infinite."""
        student, teacher = (host_logits((40, 1003), "float32", seed) for seed in (5, 6))
        teacher[33, 7] = -np.inf
        result = ops.kd_loss_and_gradient(
            numba_array(student), numba_array(teacher), None, 2.0, 0.0, divergence="reverse_kl", reduction="none"
        )
        infinite, undefined = np.isposinf(to_host(result.loss)), np.isnan(to_host(result.gradient))
        right = infinite.nonzero()[0].tolist() == [33] and undefined.all(axis=1).nonzero()[0].tolist() == [33]
        task.check("reverse_kl that is infinite in one row", right and undefined.any(axis=1).sum() == 1)

    def try_variant(name: str) -> None:
        call = getattr(variants, f"{name}_loss_and_gradient")
        student, teacher, other = (host_logits((5, 1003), "float32", seed) for seed in (7, 8, 9))
        labels = labels_of((5, 1003), 3)

        def of(put: Callable[[np.ndarray], Any]) -> list[np.ndarray]:
            second = [put(teacher), put(other)] if name == "mixture_kd" else put(teacher)
            result = call(put(student), second, put(labels), *MAIN, reduction="none")
            return [to_host(result.loss), to_host(result.gradient)]

        near = [np.allclose(*pair, rtol=1e-6, atol=1e-7) for pair in zip(of(numba_array), of(np.copy), strict=True)]
        task.check(f"{name}, as on the host", all(near))

    def try_multiply(dtype: str) -> None:
        rows = host_logits((3, 9001), dtype, 10)
        factors = np.array([1.0, -0.5, 1.0], np.float32)
        array = numba_array(rows)
        ops.multiply_rows(array, numba_array(factors))
        exact = (rows.astype(np.float32) * factors[:, None]).astype(rows.dtype)
        task.check(f"{dtype} rows times factors", same_bits([to_host(array)], [exact]))

    def guarded(call: Callable[..., None], *arguments: Any, **options: Any) -> None:
        try:
            call(*arguments, **options)
        except Exception as error:
            task.check(f"{call.__name__} {arguments} {options}", False, first_line(error))

    for dtype in ("float32", "bfloat16", "float16"):
        for shape in ((5, 131), (5, 4099), (5, 16384)):
            guarded(try_kd, shape, dtype, kernel="row")
        for shape in ((5, 4099), (5, 20011), (5, 32768)):
            guarded(try_kd, shape, dtype, kernel="group")
    for operation in ROW_OPERATIONS:
        guarded(try_row, (4, 4099), "float32", operation)
    guarded(try_row, (4, 4099), "bfloat16", "softmax")
    for divergence in ("jsd", "alpha"):
        guarded(try_kd, (5, 4099), "float32", divergence)
    guarded(try_kd, (5, 4099), "bfloat16", "reverse_kl")
    guarded(try_left)
    for name in ("dkd", "mixture_kd", "standardized_kd"):
        guarded(try_variant, name)
    for dtype in ("float32", "bfloat16"):
        guarded(try_multiply, dtype)


def part_bandwidth(task: Task) -> None:
    """A copy on the device, and a triad."""
    place, torch = task.place, task.place.torch
    count = int(min(task.settings.copy_bytes, place.room() // 3)) // 4
    a, b, c = (torch.rand(count, device=place.device) for _ in range(3))
    some = slice(None, None, max(1, count // 1000))

    def excess(exact: Callable[[], Any]) -> Callable[[Any], float]:
        return lambda _: float((c[some] - exact()).abs().max() / 1e-6)

    contenders = [
        Contender(COPY, lambda: c.copy_(b), excess(lambda: b[some]), 8 * count),
        Contender("triad", partial(torch.add, a, b, alpha=0.5, out=c), excess(lambda: a[some] + 0.5 * b[some]),
                  12 * count),
    ]  # fmt: skip
    section(task, {"section": f"{4 * count / 1e9:.2f} GB an array, float32"}, contenders)


def by_rows(function: Callable[..., Any], *arrays: Any) -> np.ndarray:
    """``function`` of blocks of rows, on several threads; it returns a number a row."""
    B, workers = len(arrays[0]), max(1, (os.cpu_count() or 1) // 3)
    edges = np.linspace(0, B, min(B, 2 * workers) + 1).astype(int)
    blocks = [slice(a, b) for a, b in pairwise(edges)]
    with ThreadPoolExecutor(workers) as pool:
        return np.concatenate(list(pool.map(lambda block: function(*(x[block] for x in arrays)), blocks)))


def part_parity(task: Task) -> None:
    """Two engines at full size, each within its bounds of the truth: so within their sum of one another."""
    settings = task.settings
    two_formulas = task.name == "divergences"
    dtype = "float32" if two_formulas else task.name
    cases = [
        (shape, T, name)
        for shape in (settings.divergences if two_formulas else settings.parity)
        for T, name in ([(2.0, "reverse_kl"), (2.0, "jsd")] if two_formulas else
                        [(T, "forward_kl") for T in settings.temperatures])
    ]  # fmt: skip
    last = 0.0
    for shape, T, divergence in cases:
        title = f"{list(shape)} {dtype} {Objective(T, MAIN.alpha)} {divergence}"
        if task.left() < 1.5 * last:
            task.note(title, "left out: the time was up")
            continue
        began = time.monotonic()
        try:
            _parity(task, title, shape, dtype, Objective(T, MAIN.alpha), divergence)
        except Exception as error:
            task.check(title, False, first_line(error))
        last = time.monotonic() - began


def _parity(task: Task, title: str, shape: Shape, dtype: str, objective: Objective, divergence: str) -> None:
    place, half = task.place, shape[0] // 2
    student, teacher = (host_logits(shape, dtype, seed) for seed in (1, 2))
    labels = labels_of(shape, 3)

    def host_engine(s: Any, t: Any, y: Any) -> Any:
        """In float32, so that of 16-bit logits one result is rounded, not two."""
        out = np.empty(s.shape, np.float32)
        return ops.kd_loss_and_gradient(s, t, y, *objective, divergence=divergence, reduction="none", out=out)

    reference = host_engine(student, teacher, labels)

    def bounds_of(s: Any, t: Any, loss: Any) -> np.ndarray:
        found = bounds.kd_bounds(
            s, t, loss, temperature=objective.temperature, alpha=objective.alpha, divergence=divergence
        )
        return np.stack(found, axis=-1)

    loss_bound, gradient_bound = by_rows(bounds_of, student, teacher, reference.loss).T
    if place.on_device:
        both, exact = 2.0, reference
    else:  # the CPU engine alone, against the textbook
        both, exact = 1.0, textbook.kd_rows(student, teacher, labels, *objective, divergence)
    s, t, y = map(place.put, (student, teacher, labels))

    def device_engine(rows: slice = slice(None), **plan: Any) -> tuple[np.ndarray, np.ndarray]:
        with planned(**plan):
            found = ops.kd_loss_and_gradient(s[rows], t[rows], y[rows], *objective, divergence=divergence,
                                             reduction="none")  # fmt: skip
        return place.get(found.loss), place.get(found.gradient)

    for kernel in (None, "row", "group") if place.on_device else (None,):
        name = title if kernel is None else f"{title}, {kernel} kernel"
        plan: dict[str, Any] = {} if kernel is None else {"kernel": kernel}
        try:
            loss, gradient = device_engine(**plan)
        except DomainError as refusal:  # a kernel that cannot have this call
            if kernel is None:
                raise
            task.note(name, str(refusal))
            continue
        apart = by_rows(lambda a, b: bounds.gradient_error(a, b, student.dtype), gradient, exact.gradient)
        excess = np.maximum(np.abs(loss - exact.loss) / (both * loss_bound), apart / (both * gradient_bound))
        task.judge(name, math.inf if np.isnan(excess).any() else float(excess.max()))
        again = device_engine(**plan)
        task.check(f"{name}: the same bits again", same_bits((loss, gradient), again))
        parts = device_engine(slice(0, half), **plan), device_engine(slice(half, None), **plan)
        task.check(
            f"{name}: the same bits in two batches",
            same_bits((loss, gradient), [np.concatenate(pair) for pair in zip(*parts, strict=True)]),
        )


def same_bits(these: Iterable[np.ndarray], those: Iterable[np.ndarray]) -> bool:
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        for a, b in zip(these, those, strict=True)
    )


def part_speed(task: Task) -> None:
    """Loss and gradient: kdcore's ways to call it, or kdcore and one peer."""
    peer = None if task.name == "kdcore" else make_peer(task, task.name)
    if task.name != "kdcore" and peer is None:
        return

    def contenders(data: Data, objective: Objective) -> Iterator[Contender]:
        yield kdcore_contender(data, objective)
        if peer is not None:
            yield peer_contender(data, objective, task.name, peer(objective), 1)
            return
        yield kdcore_contender(data, objective, "kdcore, in place", in_place=True)
        if task.place.torch is not None:
            yield triad_contender(data)
            yield autograd_contender(data, objective)

    sections(task, task.settings.speed, task.settings.objectives, contenders)


def sections(
    task: Task, shapes: Iterable[Shape], objectives: Iterable[Objective], contenders: Callable[..., Iterator[Contender]]
) -> None:
    """A section for each objective, shape and dtype, as long as there is time for one as long as the last."""
    last = 0.0
    for objective in objectives:
        for shape in shapes:
            for dtype in task.settings.dtypes:
                where = {"shape": list(shape), "dtype": dtype, **objective._asdict()}
                title = f"{list(shape)} {dtype} {objective}"
                if task.left() < 1.5 * last:
                    task.note(title, "left out: the time was up")
                    continue
                began = time.monotonic()
                data: Data | None = None
                try:
                    data = Data(task.place, shape, dtype)
                    section(task, where, contenders(data, objective))
                except LeftOutError as reason:
                    task.note(title, f"left out: {reason}")
                except Exception as error:
                    task.check(title, False, first_line(error))
                data = None
                task.place.release()
                last = time.monotonic() - began


def make_peer(task: Task, name: str) -> Callable[[Objective], Callable[..., Any]] | None:
    """From an objective to a peer's loss; None if there is no such peer here."""
    if not task.place.on_device and name != "torch eager":
        task.absent(name, "left out of a dry run")
        return None
    torch = task.place.torch
    if torch is None:
        task.absent(name, "torch is not installed")
        return None

    def kl(log_q: Any, log_p: Any) -> Any:
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    if name == "torch eager":
        return lambda objective: torch_objective(torch, objective, kl)
    if name == "torch.compile":

        def compiled(objective: Objective) -> Callable[..., Any]:
            torch.compiler.reset()  # each shape is a program of its own, of which PyTorch keeps few
            return torch.compile(torch_objective(torch, objective, kl), dynamic=False)

        return compiled
    if find_spec("liger_kernel") is None:
        task.absent(name, "not installed")
        return None
    liger_kl = import_module("liger_kernel.transformers").LigerKLDIVLoss(reduction="batchmean", log_target=True)
    return lambda objective: torch_objective(torch, objective, liger_kl)


def part_variants(task: Task) -> None:
    """Which kernel, how many threads and blocks; the first is what kdcore chooses."""

    def contenders(data: Data, objective: Objective) -> Iterator[Contender]:
        V, dtype = data.shape[1], data.dtype.name
        explain = import_module("kdcore.cuda.plans").explain
        task.note(f"{list(data.shape)} {dtype}", explain(V, dtype))
        yield kdcore_contender(data, objective, "as chosen")
        yield triad_contender(data)
        options: list[dict[str, Any]] = [{"kernel": "row", "threads": threads} for threads in (128, 256, 512)]
        options += [{"kernel": "group"}, *({"kernel": "group", "threads": threads} for threads in (64, 96))]
        with contextlib.suppress(DomainError), planned(kernel="group"):
            needed = int(re.findall(r"(\d+) blocks?", explain(V, dtype))[0])
            options += [{"kernel": "group", "blocks": blocks} for blocks in (needed + 1, 2 * needed)]
        for plan in options:
            name = " ".join(f"{value}" if key == "kernel" else f"{key}={value}" for key, value in plan.items())
            yield kdcore_contender(data, objective, name, **plan)

    sections(task, task.settings.variants, [MAIN], contenders)


ROW_OPERATIONS = ("softmax", "log_softmax", "logsumexp")


def row_excess(operation: str, result: np.ndarray, x: np.ndarray) -> float:
    """The worst error of an operation's result, in units of its bound, less the rounding of 16-bit results."""
    log_p = textbook.log_softmax(x)
    relative, absolute = bounds.RELATIVE_LOSS["float32"], bounds.GRADIENT["float32"]
    if operation == "softmax":
        error = bounds.gradient_error(result, np.exp(log_p), x.dtype) / np.linalg.norm(np.exp(log_p), axis=-1)
        excess = error / absolute
    else:
        exact = x[..., 0].astype(np.float64) - log_p[..., 0] if operation == "logsumexp" else log_p
        error = np.abs(result.astype(np.float64) - exact)
        if result.dtype.itemsize == 2:
            error = error - np.minimum(error, bounds.half_ulp(np.maximum(np.abs(exact), error), result.dtype))
        excess = error / (relative * np.abs(exact) + absolute)
    return math.inf if np.isnan(excess).any() else float(excess.max())


def part_softmax(task: Task) -> None:
    """softmax, log_softmax and logsumexp, kdcore's and PyTorch's."""
    place = task.place

    def contenders(data: Data, _: Objective) -> Iterator[Contender]:
        x, out, rows = data.student, data.out, data.rows
        some = place.get(x[rows])
        for operation in ROW_OPERATIONS:
            whole = operation != "logsumexp"
            run = partial(getattr(ops, operation), x, **({"out": out} if whole else {}))
            verify = partial(_row_operation_excess, place, operation, rows, some)
            yield Contender(f"kdcore {operation}", run, verify, (2 if whole else 1) * data.bytes)
            if place.torch is not None:
                run = partial(getattr(place.torch, operation), place.tensor(x), dim=-1)
                yield Contender(f"torch {operation}", run, verify, (2 if whole else 1) * data.bytes,
                                may_fail=(Exception,), allowed=1e6)  # fmt: skip  # a bfloat16 result may be its own

    sections(task, task.settings.softmax, [Objective(1.0, 0.0)], contenders)


def _row_operation_excess(place: Any, operation: str, rows: list[int], x: np.ndarray, result: Any) -> float:
    picked = result[rows]
    found = place.get(picked) if place.on_device else np.asarray(picked)
    return row_excess(operation, found, x)


def part_latency(task: Task) -> None:
    """What a small call takes the program, and until its result is there."""
    place, shape, calls = task.place, (8, 128), task.settings.calls
    data = Data(place, shape, "float32")
    expected = data.expected(MAIN)
    contenders = [
        kdcore_contender(data, MAIN),
        Contender(
            "kdcore, loss alone",
            partial(ops.kd_loss, data.student, data.teacher, data.labels, *MAIN, reduction="none"),
            lambda loss: expected.loss_excess(place.get(loss)[data.rows]),
            2 * data.bytes,
        ),
    ]
    peer = make_peer(task, "torch eager")
    if peer is not None:
        contenders.append(autograd_contender(data, MAIN))
        contenders.append(peer_contender(data, MAIN, "torch eager", peer(MAIN), 1))
    for contender in contenders:
        if _verified(task, contender, f"{list(shape)} float32") is None:
            continue
        for _ in range(calls // 10):
            contender.run()
        place.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            contender.run()
        queued = time.perf_counter() - began
        place.synchronize()
        done = time.perf_counter() - began
        single = []
        for _ in range(max(3, calls // 10)):
            began = time.perf_counter()
            contender.run()
            place.synchronize()
            single.append(time.perf_counter() - began)
        task.emit("row", name=contender.name, host_seconds=queued / calls, call_seconds=done / calls,
                  single_seconds=statistics.median(single))  # fmt: skip
    task.note("kdcore, where the program's time goes", profile(contenders[0].run, calls))


def profile(call: Callable[[], Any], calls: int) -> str:
    """The functions in which a call spends most of the program's own time."""
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(calls):
        call()
    profiler.disable()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(18)
    lines = [line.replace(f"{ROOT}{os.sep}", "").rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(line for line in lines if line)[:4000]


def part_interop(task: Task) -> None:
    """The same call with the arrays of each library, on its streams: the same bits, and its own arrays back."""
    {"arrays": _interop_arrays, "jax": _interop_jax}[task.name](task)


_INTEROP_SHAPE = (8, 1031)


def _interop_host(dtype: str) -> tuple[Any, Any, Any]:
    student, teacher = (host_logits(_INTEROP_SHAPE, dtype, seed) for seed in (1, 2))
    return student, teacher, labels_of(_INTEROP_SHAPE, 3)


def _interop_call(s: Any, t: Any, y: Any, **options: Any) -> Any:
    return ops.kd_loss_and_gradient(s, t, y, *MAIN, reduction="none", **options)


def _on_host(result: Any) -> tuple[np.ndarray, np.ndarray]:
    from kdcore.engines import to_host

    return to_host(result.loss), to_host(result.gradient)


def _try_library(task: Task, name: str, dtype: str, put: Callable[[np.ndarray], Any], reference: Any) -> Any:
    """Its arrays, if the library has the dtype, once they are seen to give the same bits."""
    try:
        given = [put(array) for array in _interop_host(dtype)]
    except Exception as error:
        task.note(f"{name} {dtype}", f"no such arrays: {first_line(error)}")
        return None
    title = f"{name} arrays of {dtype}"
    try:
        result = _interop_call(*given)
        own = type(result.gradient) is type(given[0]) and type(result.loss) is type(given[0])
        task.check(f"{title} come back", own, f"{type(result.gradient)}, {type(result.loss)}")
        loss_dtype, dtypes = str(result.loss.dtype), (str(result.gradient.dtype), str(given[0].dtype))
        task.check(f"{title}: dtypes", dtypes[0] == dtypes[1] and "float64" in loss_dtype, f"{dtypes}, {loss_dtype}")
        if reference is not None:
            task.check(f"{title}: the same bits", same_bits(_on_host(result), reference))
    except Exception as error:
        task.check(title, False, first_line(error))
        return None
    return given


def _interop_arrays(task: Task) -> None:
    torch = task.place.torch
    cupy = import_module("cupy") if find_spec("cupy") else None
    for dtype in ("float32", "bfloat16", "float16"):
        host = _interop_host(dtype)
        reference = None
        try:
            reference = _on_host(_interop_call(*map(numba_array, host)))
            expected = textbook.kd_rows(*host, *MAIN)
            excess = max(expected.loss_excess(reference[0]), expected.gradient_excess(reference[1], host[0].dtype))
            task.judge(f"Numba arrays of {dtype}", excess)
        except Exception as error:
            task.check(f"Numba arrays of {dtype}", False, first_line(error))
        tensors = _try_library(task, "torch", dtype, task.place.put, reference)
        if cupy is None:
            task.absent("CuPy", "not installed")
        else:
            arrays = _try_library(task, "CuPy", dtype, cupy.asarray, reference)
            if arrays is not None and reference is not None:
                _try_streams(task, f"CuPy arrays of {dtype}", arrays, cupy.cuda.Stream(non_blocking=True), reference)
        if tensors is not None and reference is not None:
            _try_streams(task, f"torch arrays of {dtype}", tensors, torch.cuda.Stream(), reference)
            _try_autograd(task, dtype, tensors, reference)
    _try_graph(task)


def _try_streams(task: Task, title: str, given: list[Any], stream: Any, reference: Any) -> None:
    """On a stream of the caller's choice, named in the call or the library's current one."""
    torch = task.place.torch
    torch.cuda.synchronize()
    context = torch.cuda.stream(stream) if isinstance(stream, torch.cuda.Stream) else stream
    try:
        found = _interop_call(*given, stream=stream)
        stream.synchronize()
        task.check(f"{title}, stream=", same_bits(_on_host(found), reference))
        with context:
            found = _interop_call(*given)
        stream.synchronize()
        task.check(f"{title}, on a stream", same_bits(_on_host(found), reference))
    except Exception as error:
        task.check(f"{title}, streams", False, first_line(error))


def _try_autograd(task: Task, dtype: str, given: list[Any], reference: Any) -> None:
    title = f"kdcore.torch, {dtype}"
    try:
        s, t, y = given
        x = s.detach().requires_grad_()
        loss = import_module("kdcore.torch").KDLoss(*MAIN, reduction="none")(x, t, y)
        loss.sum().backward()
        gradient = task.place.get(x.grad)
        # A float16 gradient is rounded once, from float32, here and there alike.
        task.check(f"{title}: the same bits", gradient.tobytes() == reference[1].tobytes())
        task.check(f"{title}: losses", bool((task.place.get(loss) == reference[0].astype(np.float32)).all()))
    except Exception as error:
        task.check(title, False, first_line(error))


def _try_graph(task: Task) -> None:
    """A call captured in a CUDA graph of PyTorch's. It may fail: nothing promises it."""
    torch = task.place.torch
    try:
        data = Data(task.place, (8, 128), "float32")
        call = partial(ops.kd_loss_and_gradient, data.student, data.teacher, data.labels, *MAIN, out=data.out)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        expected = data.out.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        data.out.zero_()
        graph.replay()
        torch.cuda.synchronize()
        right = torch.equal(data.out, expected)
        began = time.perf_counter()
        for _ in range(1000):
            graph.replay()
        torch.cuda.synchronize()
        taken = 1e3 * (time.perf_counter() - began)
        task.note("CUDA graph", f"captured, replays {'give the same bits' if right else 'DIFFER'}, {taken:.1f} us each")
    except Exception as error:
        task.note("CUDA graph", f"not captured: {first_line(error)}")


def _interop_jax(task: Task) -> None:
    if find_spec("jax") is None:
        task.absent("JAX", "not installed")
        return
    jax = import_module("jax")
    try:
        jax.devices("gpu")
    except RuntimeError as error:  # JAX for the CPU alone
        task.absent("JAX", first_line(error))
        return
    for wide in (True, False):  # without 64-bit types, as JAX begins, last: what goes wrong there spoils nothing
        jax.config.update("jax_enable_x64", wide)
        for dtype in ("float32", "bfloat16"):
            host = _interop_host(dtype)
            reference = _on_host(_interop_call(*map(numba_array, host)))
            title = f"JAX arrays of {dtype}, {'with' if wide else 'without'} 64-bit types"
            try:
                given = [jax.numpy.asarray(array) for array in host]
                result = _interop_call(*given)
                loss, gradient = np.asarray(result.loss), np.asarray(result.gradient)
                own = all(isinstance(array, jax.Array) for array in (result.loss, result.gradient))
                task.check(f"{title} come back", own, f"{type(result.gradient)}, {type(result.loss)}")
                right = gradient.tobytes() == reference[1].tobytes()
                right = right and bool((loss == reference[0].astype(loss.dtype)).all())
                task.check(f"{title}: the same bits", right, f"losses {loss.tolist()}, not {reference[0].tolist()}")
            except Exception as error:
                task.check(title, False, first_line(error))


def device_facts() -> dict[str, Any]:
    """The device as its driver describes it; raises where there is none."""
    from kdcore.cuda import presence

    presence.require()
    from numba import cuda

    device = cuda.get_current_device()

    def ask(question: Callable[[], Any]) -> Any:
        try:
            return question()
        except Exception:
            return None

    def driver() -> str:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]

    name = device.name
    return {
        "name": name.decode() if isinstance(name, bytes) else str(name),
        "compute_capability": list(device.compute_capability),
        "multiprocessors": ask(lambda: int(device.MULTIPROCESSOR_COUNT)),
        "l2_bytes": ask(lambda: int(device.L2_CACHE_SIZE)),
        "memory_bytes": ask(lambda: int(cuda.current_context().get_memory_info()[1])),
        "driver": ask(driver),
        "cuda_driver": ask(lambda: ".".join(map(str, cuda.cudadrv.driver.driver.get_version()))),
        "cuda_runtime": ask(lambda: ".".join(map(str, cuda.runtime.get_version()))),
        "cuda_torch": ask(lambda: import_module("torch").version.cuda),
    }


# --- the run -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """``tasks``: processes by name with their seconds, one after another, or ``together``. A part of which the results
    must be right is a failure when it does not end, too."""

    work: Callable[[Task], None]
    tasks: dict[str, float]
    together: bool = False
    must_end: bool = False
    dry: tuple[str, ...] = ()

    @property
    def seconds(self) -> float:
        return max(self.tasks.values()) if self.together else sum(self.tasks.values())


#: Processes that share the tests.
_SHARDS = max(1, min(12, (os.cpu_count() or 1) - 2))

PARTS = {
    "tests": Part(part_tests, {f"{k + 1} of {_SHARDS}": 180.0 for k in range(_SHARDS)}, together=True, must_end=True),
    "sanitizer": Part(part_small, dict.fromkeys(("memcheck", "racecheck", "synccheck"), 50.0), together=True,
                      must_end=True),
    "bandwidth": Part(part_bandwidth, {"bandwidth": 15.0}),
    "parity": Part(part_parity, dict.fromkeys(("float32", "bfloat16", "float16", "divergences"), 45.0), together=True,
                   must_end=True, dry=("float32",)),
    "speed": Part(part_speed, {"kdcore": 40.0, "torch eager": 20.0, "torch.compile": 50.0, "Liger-Kernel": 5.0},
                  dry=("kdcore", "torch eager", "torch.compile", "Liger-Kernel")),
    "variants": Part(part_variants, {"variants": 25.0}),
    "softmax": Part(part_softmax, {"softmax": 15.0}, dry=("softmax",)),
    "latency": Part(part_latency, {"latency": 15.0}, dry=("latency",)),
    "interop": Part(part_interop, {"arrays": 20.0, "jax": 20.0}, together=True, must_end=True),
}  # fmt: skip
#: What a part's processes need to end by themselves, and to be ended, after their time.
_GRACE = 3.0
#: Seconds of a whole run, the device's description and the plot included.
_WHOLE_RUN = 515.0

_PACKAGES = (
    "numpy", "numba", "numba-cuda", "llvmlite", "ml_dtypes", "h5py", "torch", "triton", "liger-kernel", "cupy",
    "cupy-cuda13x", "cupy-cuda12x", "jax", "jaxlib", "cuda-bindings", "cuda-core", "nvidia-cuda-nvcc", "nvidia-nvvm",
    "nvidia-nvjitlink", "pytest", "hypothesis", "matplotlib",
)  # fmt: skip


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version(), "kdcore": __version__}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def commit_of() -> str | None:
    """The commit of the checkout, with a plus if it was changed; None if it is no checkout of git's."""

    def git(*arguments: str) -> str:
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def digest_of_sources() -> str:
    """Tells one kdcore from another where there is no commit."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((ROOT / "kdcore").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


@dataclass
class _Process:
    """A process of a part, and what it has recorded so far."""

    name: str
    process: subprocess.Popen[bytes]
    records: Path
    log: Path
    end: float
    began: float = field(default_factory=time.monotonic)
    read: int = 0

    def new_records(self) -> list[dict[str, Any]]:
        """What has come since the last time, up to the last whole line."""
        if not self.records.exists():
            return []
        with self.records.open("rb") as file:
            file.seek(self.read)
            text = file.read()
        text = text[: text.rfind(b"\n") + 1]
        self.read += len(text)
        return [json.loads(line) for line in text.splitlines()]

    def end_it(self) -> None:
        """The process and all that it has started, which are a group of their own."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)

    def tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]


class Run:
    """Starts the processes of the parts, collects what they record, and writes it."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + _WHOLE_RUN
        self.output: Path | None = None
        self._started = 0
        self.chosen = [part for part in PARTS if part in options.only] if options.only else list(PARTS)
        self.results: dict[str, Any] = {
            "benchmark": BENCHMARK,
            "command": " ".join(["python3 benchmarks/gpu.py", *options.words]),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": options.commit or commit_of(),
            "sources": digest_of_sources(),
            "host": {"system": f"{platform.system()} {platform.machine()}", "cpus": os.cpu_count()},
            "device": None,
            "versions": versions(),
            "parts": {part: {"status": LEFT_OUT} for part in PARTS},
        }

    # --- processes ---

    def _start(self, words: list[str], name: str, seconds: float) -> _Process:
        self._started += 1
        records, log = (self.folder / f"{self._started}.{kind}" for kind in ("jsonl", "log"))
        environment = {key: value for key, value in os.environ.items() if key != "NUMBA_ENABLE_CUDASIM"}
        environment |= {
            "NUMBA_CUDA_LOW_OCCUPANCY_WARNINGS": "0",
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
            "TRITON_CACHE_DIR": str(self.folder / "triton"),
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*words, "--records", str(records)],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=ROOT,
                process_group=0,
            )  # fmt: skip
        return _Process(name, process, records, log, time.monotonic() + seconds + _GRACE)

    def _words(self, part: str, name: str, seconds: float) -> list[str]:
        words = [sys.executable, str(Path(__file__).resolve()), "--task", f"{part}:{name}", "--seconds", f"{seconds:g}"]
        return words + ["--quick"] * self.options.quick + ["--dry"] * self.options.dry

    def _follow(self, processes: list[_Process], found: dict[str, Any]) -> list[_Process]:
        """Until all have ended, or were ended: what they record goes into ``found``, and so into the results."""
        running = list(processes)
        try:
            while running:
                time.sleep(0.05)
                for one in list(running):
                    code = one.process.poll()
                    late = code is None and time.monotonic() > one.end
                    if code is not None or late:
                        one.end_it()  # and what it has left behind
                        running.remove(one)
                    self._absorb(one, found)
                    if code is not None or late:
                        found.setdefault("tasks", {})[one.name] = self._outcome(one, code, late)
                        self.write()
        finally:
            for one in running:
                one.end_it()
        return processes

    def _absorb(self, one: _Process, found: dict[str, Any]) -> None:
        new = one.new_records()
        for record in new:
            record["task"] = one.name
            if record["kind"] == "count":
                counts = found.setdefault("counts", {})
                counts[record["name"]] = counts.get(record["name"], 0) + 1
            else:
                found.setdefault("records", []).append(record)
        if new:
            self.write()

    def _outcome(self, one: _Process, code: int | None, late: bool) -> dict[str, Any]:
        outcome: dict[str, Any] = {
            "status": TIMED_OUT if late else DONE if code == 0 else FAILED,
            "seconds": round(time.monotonic() - one.began, 1),
        }
        if outcome["status"] != DONE:
            outcome |= {"returncode": code, "tail": one.tail()}
        if self.output is not None:
            with (self.output / "log.txt").open("a", encoding="utf-8") as file:
                text = one.log.read_text(encoding="utf-8", errors="replace")
                file.write(f"===== {one.name}: {outcome['status']}, {outcome['seconds']} s\n{text[-200_000:]}\n")
        return outcome

    # --- results ---

    def write(self) -> None:
        if self.output is not None:
            text = json.dumps(self.results, indent=1, allow_nan=False) + "\n"
            write_atomically(self.output / "results.json", text)

    def describe_device(self) -> str | None:
        """Ask a process of its own for the device; the reason, if there is none."""
        found: dict[str, Any] = {}
        self._follow([self._start(self._words("device", "device", 60), "device", 60)], found)
        described = [record["device"] for record in found.get("records", []) if record["kind"] == "device"]
        if not described:
            return found["tasks"]["device"].get("tail", "").strip().rpartition("\n")[2] or "the device does not answer"
        self.results["device"] = described[0]
        return None

    def choose_output(self) -> None:
        device = self.results["device"]
        slug = re.sub(r"[^a-z0-9]+", "-", device["name"].lower()).strip("-") if device else "no-device"
        output = self.options.output or ROOT / "benchmarks" / "results" / f"{self.results['date'][:10]}-{slug}"
        found = output / "results.json"
        if found.exists():
            try:
                mine = json.loads(found.read_text(encoding="utf-8"))["benchmark"] == BENCHMARK
            except (ValueError, LookupError, TypeError):
                mine = False
            if not mine:
                sys.exit(f"{found} is not from an earlier run: choose another output directory")
        output.mkdir(parents=True, exist_ok=True)
        (output / "log.txt").write_text("", encoding="utf-8")
        self.output = output

    def run(self, part: str) -> None:
        spec = PARTS[part]
        found: dict[str, Any] = {"status": DONE}
        self.results["parts"][part] = found
        if self.options.dry and not spec.dry:
            found["status"] = NEEDS_A_DEVICE
            self.write()
            return
        began = time.monotonic()
        later = sum(PARTS[other].seconds + _GRACE for other in self.chosen[self.chosen.index(part) + 1 :])
        tasks = {name: spec.tasks[name] for name in spec.dry} if self.options.dry else spec.tasks
        end = max(self.deadline - later, began + 5.0)
        try:
            if part == "sanitizer":
                commands = self._sanitizers(found)
                started = [self._start(words, name, end - began) for name, words in commands.items()]
                self._read_sanitizers(self._follow(started, found), found)
            elif spec.together:
                seconds = end - began
                started = [self._start(self._words(part, name, seconds), name, seconds) for name in tasks]
                self._follow(started, found)
            else:
                waiting = dict(tasks)
                for name in tasks:
                    del waiting[name]
                    seconds = max(end - time.monotonic() - sum(waiting.values()), 5.0)
                    self._follow([self._start(self._words(part, name, seconds), name, seconds)], found)
        except Exception as error:
            found |= {"status": FAILED, "reason": first_line(error)}
        found["seconds"] = round(time.monotonic() - began, 1)
        if found["status"] != ABSENT:
            found["status"] = max(found["status"], status_of(found), key=[DONE, ABSENT, TIMED_OUT, FAILED].index)
        if part == "tests" and not found.get("counts", {}).get("passed"):
            found |= {"status": FAILED, "reason": "no test has passed"}
        self.write()

    def _sanitizers(self, found: dict[str, Any]) -> dict[str, list[str]]:
        """The commands of compute-sanitizer, if it is here."""
        beside = sorted(map(str, Path("/usr/local").glob("cuda*/bin/compute-sanitizer")))
        tool = shutil.which("compute-sanitizer") or next(reversed(beside), None)
        if tool is None:
            found |= {
                "status": ABSENT,
                "reason": "compute-sanitizer is neither on the PATH nor in /usr/local/cuda*/bin",
            }
            return {}
        options = ["--print-limit", "20", "--report-api-errors", "no"]
        program = [sys.executable, str(Path(__file__).resolve()), "--only", "small"]
        return {name: [tool, "--tool", name, *options, *program] for name in PARTS["sanitizer"].tasks}

    def _read_sanitizers(self, processes: list[_Process], found: dict[str, Any]) -> None:
        """What the tools have counted, from their last lines."""
        for one in processes:
            text = one.log.read_text(encoding="utf-8", errors="replace")
            outcome, counted = found["tasks"][one.name], sanitizer_errors(text)
            if counted is not None:
                name, detail = f"compute-sanitizer --tool {one.name}", f"{counted} errors"
                if counted:
                    detail = "\n".join(line for line in text.splitlines() if line.startswith("="))[-6000:]
                check = {"kind": "check", "name": name, "ok": counted == 0, "detail": detail, "task": one.name}
                found.setdefault("records", []).append(check)
            elif not any(record["task"] == one.name for record in found.get("records", [])):
                outcome |= {"status": ABSENT, "tail": text[-3000:]}  # it runs no program here
            elif outcome["status"] == DONE:
                outcome |= {"status": FAILED, "tail": text[-3000:]}


def sanitizer_errors(text: str) -> int | None:
    """How many errors compute-sanitizer counted; None if it did not get to its summary."""
    summary = re.search(r"ERROR SUMMARY: (\d+) error", text)
    if summary is None:
        summary = re.search(r"RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) error", text)
    return int(summary[1]) if summary else None


def status_of(found: dict[str, Any]) -> str:
    """Of a part, by its checks and its processes."""
    if any(record["kind"] == "check" and not record["ok"] for record in found.get("records", [])):
        return FAILED
    statuses = {outcome["status"] for outcome in found.get("tasks", {}).values()}
    for status in (FAILED, TIMED_OUT):
        if status in statuses:
            return status
    return ABSENT if statuses == {ABSENT} else DONE


def is_right(results: dict[str, Any]) -> bool:
    """Whether no check has failed, and every part that must end has."""
    for name, found in results["parts"].items():
        if PARTS[name].must_end and found["status"] in (FAILED, TIMED_OUT):
            return False
        if any(record["kind"] == "check" and not record["ok"] for record in found.get("records", [])):
            return False
    return True


# --- tables --------------------------------------------------------------------------------------------------------

METHOD = """\
Everything that is timed was verified first; error/bound is the worst error in units of `kdcore.testing.bounds`. Times
are medians, by CUDA events, in turns, with a cache that holds something else. GB/s counts the least traffic: both
logits read once, the gradient written once. "% of copy" is that over the bandwidth of the device's own copy, "% of
triad" over that of `torch.add` on the same arrays. A peer's column is its time over kdcore's, in its own process, in
turns with kdcore. In parentheses: what was aimed at.
"""


def grid(head: list[str], body: list[list[str]]) -> list[str]:
    if not body:
        return []
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [*(f"| {' | '.join(cells)} |" for cells in (head, rule, *body)), ""]


def records_of(results: dict[str, Any], part: str, kind: str) -> list[dict[str, Any]]:
    return [record for record in results["parts"][part].get("records", []) if record["kind"] == kind]


def copy_rate(results: dict[str, Any]) -> float | None:
    """Bytes read and written in a second by the device's copy."""
    for row in records_of(results, "bandwidth", "row"):
        if row["name"] == COPY:
            return row["bytes"] / statistics.median(row["seconds"])
    return None


def rate_of(row: dict[str, Any]) -> float:
    return row["bytes"] / statistics.median(row["seconds"])


def milliseconds(row: dict[str, Any] | None) -> str:
    return f"{1e3 * statistics.median(row['seconds']):#.4g}".rstrip(".") if row else ""


def percent(part: float, whole: float | None, target: float | None = None) -> str:
    if whole is None:
        return ""
    return f"{100 * part / whole:.1f}" + (f" ({100 * target:.0f})" if target else "")


def ratio(these: dict[str, Any], those: dict[str, Any]) -> float:
    """The median over turns of one row's time over another's, which took turns with it."""
    return statistics.median(a / b for a, b in zip(these["seconds"], those["seconds"], strict=True))


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row["shape"]), row["dtype"], row["temperature"], row["alpha"]


def speed_table(results: dict[str, Any]) -> list[str]:
    rows: dict[tuple[Any, ...], dict[tuple[str, str], dict[str, Any]]] = {}
    for row in records_of(results, "speed", "row"):
        rows.setdefault(_case(row), {})[row["task"], row["name"]] = row
    copied = copy_rate(results)
    body = []
    for (shape, dtype, temperature, alpha), named in rows.items():
        own = named.get(("kdcore", "kdcore"))
        cells = [str(list(shape)), dtype, f"{temperature:g}", f"{alpha:g}", milliseconds(own)]
        if own:
            triad = named.get(("kdcore", TRIAD))
            cells += [
                f"{rate_of(own) / 1e9:.0f}",
                percent(rate_of(own), copied, SHARE_TARGETS.get((shape, dtype))),
                percent(own["bytes"] / triad["bytes"] / ratio(own, triad), 1.0) if triad else "",
            ]
        else:
            cells += [""] * 3
        cells += [milliseconds(named.get(("kdcore", name))) for name in ("kdcore, in place", "kdcore.torch")]
        for peer, target in PEER_TARGETS.items():
            its, mine = named.get((peer, peer)), named.get((peer, "kdcore"))
            marker = "*" if its and its["parts"] > 1 else ""
            cells.append(f"{ratio(its, mine):.2f}{marker} ({target:g})" if its and mine else "")
        cells.append(f"{own['error_over_bound']:.2f}" if own else "")
        body.append(cells)
    head = ["shape", "dtype", "T", "alpha", "ms", "GB/s", "% of copy", "% of triad", "in place ms", "kdcore.torch ms"]
    lines = grid([*head, *(f"x {peer}" for peer in PEER_TARGETS), "error/bound"], body)
    if any("*" in cell for cells in body for cell in cells):
        lines += ["\\* in parts of the batch, since all of it needs more memory than there is", ""]
    late = [row for row in records_of(results, "speed", "row") if row["late"] > len(row["seconds"]) / 2
            and row["name"].startswith("kdcore")]  # fmt: skip
    if late and results["device"]:
        lines += [f"In {len(late)} of kdcore's rows the device may have waited for the program.", ""]
    return lines


def variants_table(results: dict[str, Any], most: int | None) -> list[str]:
    rows: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in records_of(results, "variants", "row"):
        rows.setdefault(_case(row), []).append(row)
    copied = copy_rate(results)
    body = []
    for (shape, dtype, *_), of_case in rows.items():
        ranked = sorted(
            (row for row in of_case if row["name"] != TRIAD), key=lambda row: statistics.median(row["seconds"])
        )
        for row in ranked if most is None else [row for row in ranked if row["name"] == "as chosen"] + ranked[:most]:
            body.append([str(list(shape)), dtype, row["name"], milliseconds(row), f"{rate_of(row) / 1e9:.0f}",
                         percent(rate_of(row), copied)])  # fmt: skip
    return grid(["shape", "dtype", "plan", "ms", "GB/s", "% of copy"], body)


def softmax_table(results: dict[str, Any]) -> list[str]:
    rows = records_of(results, "softmax", "row")
    copied = copy_rate(results)
    body = []
    for row in rows:
        twin = [other for other in rows if other["name"] == row["name"].replace("kdcore", "torch")
                and _case(other) == _case(row)]  # fmt: skip
        if row["name"].startswith("kdcore"):
            body.append([str(row["shape"]), row["dtype"], row["name"], milliseconds(row), f"{rate_of(row) / 1e9:.0f}",
                         percent(rate_of(row), copied), f"{ratio(twin[0], row):.2f}" if twin else "",
                         f"{row['error_over_bound']:.2f}"])  # fmt: skip
    return grid(["shape", "dtype", "", "ms", "GB/s", "% of copy", "x torch", "error/bound"], body)


def latency_table(results: dict[str, Any]) -> list[str]:
    body = [
        [row["name"], *(f"{1e6 * row[f'{name}_seconds']:.1f}" for name in ("host", "call", "single"))]
        for row in records_of(results, "latency", "row")
    ]
    return grid(["[8, 128] float32", "program us", "us a call", "us alone, with its result"], body)


def table(results: dict[str, Any], *, short: bool = False) -> str:
    """The results as Markdown; ``short``: without what fills pages."""
    device, known = results["device"], {name: text for name, text in results["versions"].items() if text}
    described = "no device: what follows ran on the CPU, at sizes that say nothing of speed"
    if device:
        parts = [
            device["name"],
            f"compute capability {'.'.join(map(str, device['compute_capability']))}",
            f"{device['multiprocessors']} multiprocessors",
            f"L2 {(device['l2_bytes'] or 0) / 2**20:.0f} MiB",
            f"memory {(device['memory_bytes'] or 0) / 2**30:.0f} GiB",
            f"driver {device['driver']}",
            f"CUDA {device['cuda_runtime']}",
        ]
        described = ", ".join(parts)
    commit = results["commit"] or "not known"
    lines = [
        f"`{results['command']}`, {results['date']}, commit {commit}, sources {results['sources']}",
        "",
        f"{described}; {', '.join(f'{name} {text}' for name, text in known.items())}",
        "",
    ]
    lines += [] if short else [METHOD]
    lines += grid(["part", "status", "seconds", "checks", ""], [_summary(results, part) for part in PARTS])
    for part in PARTS:
        wrong = [record for record in records_of(results, part, "check") if not record["ok"]]
        for record in wrong[:6] if short else wrong:
            detail = record["detail"].strip()
            lines += [f"**wrong**, {part}: {record['name']}: {detail[-400 if short else -2000 :]}", ""]
        for name, outcome in results["parts"][part].get("tasks", {}).items():
            if outcome["status"] != DONE:
                tail = outcome.get("tail", "").strip()[-500 if short else -3000 :]
                lines += [f"**{outcome['status']}**, {part}, {name}:", "", "```", tail, "```", ""]
    bandwidth = [f"{row['name']} {rate_of(row) / 1e9:.0f} GB/s" for row in records_of(results, "bandwidth", "row")]
    for title, body in (
        ("bandwidth", [", ".join(bandwidth), ""] if bandwidth else []),
        ("loss and gradient", speed_table(results)),
        ("plans", variants_table(results, 3 if short else None)),
        ("softmax", softmax_table(results)),
        ("latency", latency_table(results)),
    ):
        lines += [f"### {title}", "", *body] if body else []
    notes = [
        f"- {part}, {record['name']}: {record.get('text') or record.get('reason')}"
        for part in PARTS
        for record in results["parts"][part].get("records", [])
        if record["kind"] in ("note", "absent") and "\n" not in record.get("text", "")
    ]
    if notes:
        lines += ["### notes", "", *(notes[:15] if short else notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def _summary(results: dict[str, Any], part: str) -> list[str]:
    found = results["parts"][part]
    checks = records_of(results, part, "check")
    excesses = [record["excess"] for record in checks if record.get("excess") is not None]
    said = [found["reason"]] if "reason" in found else []
    said += [f"{count} {name}" for name, count in found.get("counts", {}).items()]
    said += [f"worst error/bound {max(excesses):.2f}"] if excesses else []
    right = sum(record["ok"] for record in checks)
    of_checks = f"{right} of {len(checks)}" if checks else ""
    return [part, found["status"], f"{found.get('seconds', '')}", of_checks, ", ".join(said)]


def plot(results: dict[str, Any], path: Path) -> str:
    """Shares of the copy's bandwidth as bars; returns what there is to say of it."""
    rows = [row for row in records_of(results, "speed", "row") if (row["task"], row["name"]) == ("kdcore", "kdcore")]
    copied = copy_rate(results)
    if not rows or copied is None:
        return "no plot: it needs the parts bandwidth and speed"
    if find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed"
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.3 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = [f"{row['shape']} {row['dtype']} T={row['temperature']:g} alpha={row['alpha']:g}" for row in rows]
    bars = axes.barh(names[::-1], [100 * rate_of(row) / copied for row in rows][::-1], color="tab:blue")
    axes.bar_label(bars, fmt=" %.0f", fontsize=8)
    for k, row in enumerate(rows[::-1]):
        target = SHARE_TARGETS.get((tuple(row["shape"]), row["dtype"]))
        if target:
            axes.plot([100 * target] * 2, [k - 0.4, k + 0.4], "k--", linewidth=1)
    axes.set_xlabel("% of the bandwidth of the device's copy; dashed: aimed at")
    axes.set_title(f"KD loss and gradient, {results['device']['name'] if results['device'] else 'no device'}")
    axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=144)
    return f"written: {path}"


# --- command line --------------------------------------------------------------------------------------------------


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time kdcore's CUDA engine on the device of this machine.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: benchmarks/results/<date>-<device>")
    parser.add_argument("--only", nargs="+", action="extend", default=[], metavar="PART", choices=[*PARTS, "small"],
                        help=", ".join(PARTS))  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a few sizes, few repetitions, a quarter of the tests")
    parser.add_argument("--dry", action="store_true", help="on the CPU, what needs no device, at tiny sizes")
    parser.add_argument("--commit", help="what to record as the commit, where git cannot tell")
    for name in ("--task", "--records", "--seconds"):  # a process of a run
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.words = words
    return options


def main(words: list[str]) -> int:
    options = parse(words)
    if options.task or "small" in options.only:
        return work(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it has started is ended, too
    with tempfile.TemporaryDirectory(prefix="kdcore-gpu-", ignore_cleanup_errors=True) as folder:
        run = Run(options, Path(folder))
        if not options.dry:
            reason = run.describe_device()
            if reason is not None:
                print(f"no CUDA device: {reason}\n--dry does what needs none", file=sys.stderr)
                return 2
        run.choose_output()
        assert run.output is not None
        run.write()
        try:
            for part in run.chosen:
                print(f"{part} ...", flush=True)
                run.run(part)
                found = run.results["parts"][part]
                print(f"{part}: {found['status']} ({found.get('seconds', 0)} s)", flush=True)
        finally:  # also of a run that is interrupted
            write_atomically(run.output / "table.md", table(run.results))
        try:
            said = plot(run.results, run.output / "speed.png")
        except Exception as error:
            said = f"no plot: {first_line(error)}"
        print(said)
        print(f"written: {run.output / 'results.json'}, {run.output / 'table.md'}, {run.output / 'log.txt'}\n")
        print(table(run.results, short=True))
        right = is_right(run.results)
        print(", ".join(f"{part}: {run.results['parts'][part]['status']}" for part in run.chosen))
        print("nothing that was checked is wrong" if right else "WRONG: see above")
        return 0 if right else 1


def work(options: argparse.Namespace) -> int:
    """A process of a run, or ``--only small`` by itself."""
    part, _, name = (options.task or "small:small").partition(":")
    settings = DRY if options.dry else QUICK if options.quick else FULL
    with (
        open(options.records, "a", encoding="utf-8") if options.records else contextlib.nullcontext(sys.stdout) as file
    ):

        def write(line: str) -> None:
            file.write(line)
            file.flush()

        task = Task(name, settings, None, float(options.seconds or 300), write)
        if part == "device":
            try:
                task.emit("device", device=device_facts())
            except KdcoreError as error:
                print(error)
                return 1
            return 0
        if part not in ("small", "tests"):
            task.place = Host() if options.dry else Card()
        (part_small if part == "small" else PARTS[part].work)(task)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
