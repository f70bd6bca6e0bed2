"""What is timed: sections of contenders, each with its verification, the limit it is held to, and its least traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib import import_module
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcore import ops
from kdcore.arguments import KDOutput
from kdcore.bench import limit, peers, textbook
from kdcore.divergences import NAMES as DIVERGENCES

__all__ = ["FULL", "QUICK", "Contender", "Section", "Settings", "plan"]


@dataclass(frozen=True)
class Settings:
    """Sizes of a run. Repetitions of a section go on for ``seconds``, but are at least ``least``, at most ``most``."""

    shapes: tuple[tuple[int, int], ...]
    row: int
    scaling_elements: int
    memory: tuple[tuple[int, int], ...]
    starts: int
    compiled: bool
    seconds: float
    least: int
    most: int = 2000


FULL = Settings(
    shapes=((1024, 32000), (256, 151936)),
    row=262144,
    scaling_elements=1 << 25,
    memory=((64, 8192), (1024, 8192), (16384, 8192), (64, 131072), (1024, 131072)),
    starts=3,
    compiled=True,
    seconds=4.0,
    least=9,
)
QUICK = Settings(
    shapes=((64, 4096),),
    row=65536,
    scaling_elements=1 << 17,
    memory=((16, 2048), (256, 2048), (16, 32768)),
    starts=1,
    compiled=False,
    seconds=0.2,
    least=3,
)

_TEMPERATURES = (1, 2, 3, 4)
_ALPHAS = (0, 0.3, 1)
_LATENCY_SHAPE = (8, 128)
_SCALING_V = (32, 256, 2048, 16384, 131072, 262144)
_SCALING_B = (1, 16, 128, 1024, 8192, 65536)
#: Small calls are timed several at once: up to so many elements, and so many calls.
_TIMED_ELEMENTS, _TIMED_CALLS = 1 << 20, 16


@dataclass(frozen=True)
class Contender:
    """One thing to time.

    ``verify`` takes what ``run`` returned and gives the worst error in units of its bound, of which ``allowed`` are
    (a peer need not keep kdcore's bounds, but must compute the same). ``prepare`` runs, untimed, before each call.
    ``bytes`` is the least traffic: each input read once, the result written once. ``number`` calls are timed at once.
    """

    name: str
    run: Callable[[], Any]
    verify: Callable[[Any], float]
    bytes: int
    limit: limit.Limit
    shape: tuple[int, int]
    reference: str | None = None
    prepare: Callable[[], Any] | None = None
    number: int = 1
    optional: bool = False
    allowed: float = 1.0


@dataclass(frozen=True)
class Section:
    """Contenders that take turns, at least ``least`` times. ``absent`` says why some are missing."""

    title: str
    contenders: list[Contender]
    absent: dict[str, str] = field(default_factory=dict)
    least: int = 0


class _Data(NamedTuple):
    student: NDArray[Any]
    teacher: NDArray[Any]
    gradient: NDArray[Any]
    labels: NDArray[np.int64]


def plan(settings: Settings, only: frozenset[str], threads: int) -> Iterator[tuple[str, Callable[[], Section]]]:
    """The parts and their sections, which take their memory only when built."""
    for part, shapes, build in (
        ("kd", settings.shapes, _kd),
        ("precision", settings.shapes, _precision),
        ("divergences", settings.shapes, _divergences),
        ("softmax", settings.shapes, _softmax),
        ("latency", [_LATENCY_SHAPE], _latency),
        ("row", [(1, settings.row)], _row),
    ):
        if part in only:
            yield from ((part, partial(build, shape, settings, threads)) for shape in shapes)
    if "scaling" in only:
        yield "scaling", partial(_scaling, settings, threads)


def _kd(shape: tuple[int, int], settings: Settings, threads: int) -> Section:
    data = _data(shape)
    triad = limit.triad(*data[:3], threads)
    make = partial(_kd_contender, data, triad, threads)
    base = "kdcore T=2 alpha=0.3"
    contenders = [*_triads(data, threads)]
    contenders += [make(f"kdcore T={T} alpha={a}", temperature=T, alpha=a) for T, a in product(_TEMPERATURES, _ALPHAS)]
    contenders += [make(f"{base}, {where}", where=where, reference=base) for where in ("in place", "no out=")]
    found, absent = peers.kd_peers(
        data.student, data.teacher, data.labels, 2.0, 0.3, threads=threads, compiled=settings.compiled
    )
    for name, run in found.items():
        contenders.append(_peer(name, run, partial(_verify_kd_peer, data), triad, shape, base))
    return Section(f"loss and gradient, float32 {_text(shape)}", contenders, absent)


def _precision(shape: tuple[int, int], settings: Settings, threads: int) -> Section:
    data = _data(shape)
    triad = limit.triad(*data[:3], threads)
    contenders = [_kd_contender(data, triad, threads, "float32")]
    absent: dict[str, str] = {}
    for name in ("float16", "bfloat16"):
        if name == "bfloat16" and peers.version_of("ml_dtypes") is None:
            absent[name] = "ml_dtypes is not installed"
            continue
        dtype = np.dtype(np.float16 if name == "float16" else import_module("ml_dtypes").bfloat16)
        s, t, g = (_as(array, dtype) for array in data[:3])
        narrow = _Data(s, t, g, data.labels)
        contenders.append(_kd_contender(narrow, triad, threads, name, reference="float32"))
    return Section(f"16-bit floats, T=2 alpha=0.3 {_text(shape)}", contenders, absent)


def _divergences(shape: tuple[int, int], settings: Settings, threads: int) -> Section:
    data = _data(shape)
    triad = limit.triad(*data[:3], threads)
    contenders = [
        _kd_contender(data, triad, threads, name, divergence=name, reference="forward_kl") for name in DIVERGENCES
    ]
    return Section(f"divergences, float32, T=2 alpha=0.3 {_text(shape)}", contenders)


def _softmax(shape: tuple[int, int], settings: Settings, threads: int) -> Section:
    data = _data(shape)
    x, out = data.student, data.gradient
    rows = _some_rows(data)
    contenders = []
    absent: dict[str, str] = {}
    for streamed in (True, False):
        one = limit.copy(x, out, threads, bypass=streamed)
        if streamed:
            bound = one
        name = f"limit: copy, {'non-temporal' if streamed else 'ordinary'} stores"
        contenders.append(
            Contender(name, one.run, lambda _: 0.0 if np.array_equal(out[rows], x[rows]) else np.inf, one.bytes, bound,
                      shape, number=_number(shape))
        )  # fmt: skip
    for name in ("softmax", "log_softmax"):

        def excess(result: Any, name: str = name) -> float:
            worst = textbook.softmax_excess if name == "softmax" else textbook.log_softmax_excess
            return worst(result[rows], x[rows])

        def run(name: str = name) -> Any:
            return getattr(ops, name)(x, out=out, threads=threads)

        contenders.append(Contender(f"kdcore {name}", run, excess, bound.bytes, bound, shape, number=_number(shape)))
        found, missing = peers.softmax_peers(name, x, out, threads=threads)
        absent |= missing
        contenders += [_peer(label, call, excess, bound, shape, f"kdcore {name}") for label, call in found.items()]
    return Section(f"softmax, float32 {_text(shape)}", contenders, absent)


def _latency(shape: tuple[int, int], settings: Settings, threads: int) -> Section:
    data = _data(shape)
    triad = limit.triad(*data[:3], threads)
    base = "kdcore"
    contenders = [_kd_contender(data, triad, threads, base, number=1)]
    found, absent = peers.kd_peers(data.student, data.teacher, data.labels, 2.0, 0.3, threads=threads, compiled=False)
    for name, run in found.items():
        contenders.append(_peer(name, run, partial(_verify_kd_peer, data), triad, shape, base))
    absent.pop("torch.compile", None)
    return Section(f"one small call, float32, T=2 alpha=0.3 {_text(shape)}", contenders, absent, least=200)


def _row(shape: tuple[int, int], settings: Settings, threads: int) -> Section:
    data = _data(shape)
    triad = limit.triad(*data[:3], threads)
    names = {n: f"{n} thread{'s' if n > 1 else ''}" for n in sorted({1, threads})}
    contenders = [_kd_contender(data, triad, n, name, reference=names[1]) for n, name in names.items()]
    return Section(f"one row, float32, T=2 alpha=0.3 {_text(shape)}", contenders)


def _scaling(settings: Settings, threads: int) -> Section:
    buffers = _data((1, settings.scaling_elements))
    contenders = []
    for V, B in product(_SCALING_V, _SCALING_B):
        size = B * V
        if size > settings.scaling_elements:
            continue
        s, t, g = (array.reshape(-1)[:size].reshape(B, V) for array in buffers[:3])
        data = _Data(s, t, g, np.random.default_rng(B).integers(0, V, B))
        triad = limit.triad(*data[:3], threads)
        contenders.append(_kd_contender(data, triad, threads, f"kdcore {_text((B, V))}"))
    return Section("cost over B and V, float32, T=2 alpha=0.3", contenders)


# --- contenders ----------------------------------------------------------------------------------------------------


def _kd_contender(
    data: _Data,
    bound: limit.Limit,
    threads: int,
    name: str,
    *,
    temperature: float = 2,
    alpha: float = 0.3,
    divergence: str = "forward_kl",
    where: str = "out=",
    reference: str | None = None,
    number: int | None = None,
) -> Contender:
    """kdcore's loss and gradient. It is verified on rows of the timed call, and of one that returns row losses."""
    student, out = data.student, data.gradient if where == "out=" else None
    restore = None
    if where == "in place":
        student = out = _as(data.student, data.student.dtype)
        restore = partial(np.copyto, student, data.student)

    def call(reduction: Any = "mean") -> KDOutput:
        return ops.kd_loss_and_gradient(
            student, data.teacher, data.labels, temperature, alpha, divergence=divergence, reduction=reduction,
            out=out, threads=threads,
        )  # fmt: skip

    def verify(result: KDOutput) -> float:
        rows = _some_rows(data)
        expected = _textbook(data, temperature, alpha, divergence)
        dtype = data.student.dtype
        worst = [expected.gradient_excess(result.gradient[rows], dtype, scale=1 / len(data.labels))]
        if restore is not None:
            restore()
        each = call("none")
        worst += [expected.loss_excess(each.loss[rows]), expected.gradient_excess(each.gradient[rows], dtype)]
        # Two float64 sums of the same row losses differ by their order alone.
        worst.append(float(abs(result.loss - each.loss.mean()) / (1e-9 * np.abs(each.loss).mean())))
        return max(worst)

    reads = data.student.nbytes + (data.teacher.nbytes if alpha < 1 else 0)
    return Contender(
        name,
        call,
        verify,
        reads + data.gradient.nbytes,
        bound,
        data.student.shape,
        reference=reference,
        prepare=restore,
        number=1 if restore is not None else number or _number(data.student.shape),
    )


def _triads(data: _Data, threads: int) -> Iterator[Contender]:
    """The limit itself, whose ratio to the limit shows the noise; and what it is with ordinary stores."""
    a, b, c = data[:3]
    rows = _some_rows(data)

    def verify(_: Any) -> float:
        return float((np.abs(c[rows] - (a[rows] + np.float32(limit.FACTOR) * b[rows])) / 1e-5).max())

    bound = limit.triad(a, b, c, threads)
    for streamed in (True, False):
        one = limit.triad(a, b, c, threads, bypass=streamed)
        name = f"limit: triad, {'non-temporal' if streamed else 'ordinary'} stores"
        yield Contender(name, one.run, verify, one.bytes, bound, a.shape, number=_number(a.shape))


def _peer(
    name: str,
    run: Callable[[], Any],
    verify: Callable[[Any], float],
    bound: limit.Limit,
    shape: tuple[int, int],
    reference: str,
) -> Contender:
    return Contender(name, run, verify, bound.bytes, bound, shape, reference=reference, optional=True, allowed=1000.0)


def _verify_kd_peer(data: _Data, result: tuple[float, NDArray[Any]]) -> float:
    """By its gradient alone: its loss is one number of all rows."""
    expected = _textbook(data, 2.0, 0.3)
    return expected.gradient_excess(result[1][_some_rows(data)], data.student.dtype, scale=1 / len(data.labels))


# --- data ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)  # sections of one shape share their arrays, and follow one another
def _data(shape: tuple[int, int]) -> _Data:
    generator = np.random.default_rng(0)
    student, teacher, gradient = (limit.aligned(shape) for _ in range(3))
    for array in (student, teacher):
        generator.standard_normal(shape, np.float32, array)
        array *= 4
    gradient.fill(0)  # its pages exist before they are timed
    return _Data(student, teacher, gradient, generator.integers(0, shape[1], shape[0]))


def _as(array: NDArray[Any], dtype: np.dtype[Any]) -> NDArray[Any]:
    copy = limit.aligned(array.shape, dtype)
    np.copyto(copy, array, casting="unsafe")
    return copy


def _some_rows(data: _Data) -> list[int]:
    rows = len(data.labels)
    return sorted({0, rows // 2, rows - 1})


def _textbook(data: _Data, temperature: float, alpha: float, divergence: str = "forward_kl") -> textbook.Rows:
    rows = _some_rows(data)
    return textbook.kd_rows(data.student[rows], data.teacher[rows], data.labels[rows], temperature, alpha, divergence)


def _number(shape: tuple[int, int]) -> int:
    return min(max(1, _TIMED_ELEMENTS // (shape[0] * shape[1])), _TIMED_CALLS)


def _text(shape: tuple[int, int]) -> str:
    return f"[{shape[0]}, {shape[1]}]"
