"""Which kernel works a row, and by how many threads and blocks.

The **row kernel** has one block a row, which reads the row twice: first for maxima and sums, then, backwards, for the
gradient; by a divergence's two formulas three times, back and forth. That is one read of memory as long as the rows
that all multiprocessors work on at a time stay in the second level cache. The **group kernel** has one or several
blocks a row, each of which keeps its slice in shared memory, so that every logit is read once. On an H200 it was faster
by a fifth at 131,072 classes, and by a tenth at 32,768, where the cache would do (benchmarks/LOG.md). It needs room for
several blocks on a multiprocessor, which wait for each other in turn.

The choice depends on the classes, the dtypes and the device, not on the number of rows: a row's result is the same, bit
by bit, in whatever batch it comes. :func:`explain` says it in words, :func:`using` overrides it::

    with kdcore.cuda.plans.using(kernel="group"):
        kdcore.kd_loss(student, teacher, labels, 2.0, 0.3)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import NamedTuple

from kdcore.checks import choice, integer
from kdcore.cuda.direct import current_device
from kdcore.cuda.presence import require
from kdcore.cuda.primitives import SIMULATOR
from kdcore.errors import DeviceUnavailableError, DomainError, DTypeError

__all__ = ["Plan", "chosen", "explain", "plan_of", "require_bfloat16", "shared_memory", "threads_of", "using"]

_WARP = 32
#: Classes of an octet, the unit of loops over a row.
_OCTET = 8
#: What of the second level cache the rows of all multiprocessors may take.
_SHARE_OF_CACHE = 0.75
#: From so many classes on a block of the group kernel has four octets a thread to do (measured from 32,768 on); and so
#: many blocks hide what others wait for.
_GROUP_FROM = 4096
_ENOUGH_BLOCKS = 4
_ITEMSIZES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}


class Plan(NamedTuple):
    """Of a row: which kernel, how many threads a block, how many blocks; and why."""

    kernel: str
    threads: int
    blocks: int
    reason: str


class _Override(NamedTuple):
    kernel: str | None
    threads: int | None
    blocks: int | None


_AS_CHOSEN = _Override(None, None, None)
_override: ContextVar[_Override] = ContextVar("kdcore_cuda_plan", default=_AS_CHOSEN)


@contextmanager
def using(kernel: str | None = None, threads: int | None = None, blocks: int | None = None) -> Iterator[None]:
    """Within the ``with`` statement: KD calls by this kernel, "row" or, for forward KL alone, "group".

    ``threads`` a block of the kernels that work rows, a multiple of 32, and ``blocks`` a row of the group kernel,
    instead of what is chosen. What does not fit a call (another divergence, more threads than its kernel can have, too
    few blocks for its classes) is a DomainError there.
    """
    if kernel is not None:
        choice(kernel, "kernel", ("row", "group"))
    for name, value in (("threads", threads), ("blocks", blocks)):
        if value is not None:
            integer(value, name, least=1)
    if threads is not None and threads % _WARP:
        raise DomainError(f"threads must be a multiple of {_WARP}, got {threads}")
    token = _override.set(_Override(kernel, threads, blocks))
    try:
        yield
    finally:
        _override.reset(token)


def chosen() -> tuple[str | None, int | None, int | None]:
    """What :func:`using` asks for here: the kernel, the threads, the blocks."""
    return _override.get()


#: In the simulator, which is no real device.
_SIMULATED = {
    "COMPUTE_CAPABILITY_MAJOR": 9,
    "L2_CACHE_SIZE": 50 << 20,
    "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR": 228 << 10,
    "MULTIPROCESSOR_COUNT": 132,
}


@cache
def _attribute(device: int, name: str) -> int:
    from numba import cuda

    return int(getattr(cuda.gpus[device], name))


def _of_device(name: str) -> int:
    """An attribute of the current device."""
    if SIMULATOR:
        return _SIMULATED[name]
    return _attribute(current_device(), name)


def require_bfloat16() -> None:
    """Raise unless the current device converts to bfloat16."""
    if _of_device("COMPUTE_CAPABILITY_MAJOR") < 8:
        raise DeviceUnavailableError("bfloat16 on CUDA needs a device of compute capability 8.0 or more")


def shared_memory() -> int:
    """Bytes of shared memory of a multiprocessor."""
    return _of_device("MAX_SHARED_MEMORY_PER_MULTIPROCESSOR")


def threads_of(size: int, most: int) -> int:
    """Threads of a block that has a row of ``size`` classes to itself: about two octets each, within what fits."""
    chosen = _override.get().threads
    if chosen is not None:
        if chosen > most:
            raise DomainError(f"threads={chosen}, but a block of this kernel has at most {most}")
        return chosen
    if SIMULATOR:
        return 2 * _WARP
    threads = 2 * _WARP
    while threads < most and 2 * _OCTET * threads < size:
        threads *= 2
    return threads


def _group(size: int, itemsizes: tuple[int, int], reason: str) -> Plan:
    from kdcore.cuda.groups import MOST_BLOCKS, MOST_THREADS, octets_per_thread

    chosen = _override.get()
    threads = chosen.threads or (_WARP if SIMULATOR else MOST_THREADS)
    if threads > MOST_THREADS:
        raise DomainError(f"threads={threads}, but a block of the group kernel has at most {MOST_THREADS}")
    slice_ = _OCTET * octets_per_thread(threads, *itemsizes) * threads
    needed = -(-size // slice_)
    blocks = chosen.blocks or needed
    most = min(MOST_BLOCKS, _of_device("MULTIPROCESSOR_COUNT") // 2)  # which can all run, whatever else does
    if not needed <= blocks <= most:
        raise DomainError(
            f"the group kernel needs {needed} blocks of {threads} threads for {size} classes, and can have {most}: "
            f"got blocks={blocks}"
        )
    return Plan("group", threads, blocks, reason)


def plan_of(size: int, itemsizes: tuple[int, int], most_threads: int, can_group: bool) -> Plan:
    """The plan for a KD call with forward KL.

    ``itemsizes`` of student and teacher; ``most_threads`` of the row kernel; ``can_group``: whether the group kernel
    has what the call needs, float32 arithmetic.
    """
    from kdcore.cuda.groups import resident_blocks

    kernel = _override.get().kernel
    can_group = can_group and _of_device("COMPUTE_CAPABILITY_MAJOR") >= 8  # from where on copies are asynchronous
    if kernel == "group":
        if not can_group:
            raise DomainError(
                "the group kernel is for forward KL of rows that are worked in float32, on devices from 8.0"
            )
        return _group(size, itemsizes, "as was asked for")

    def by_row(reason: str) -> Plan:
        return Plan("row", threads_of(size, most_threads), 1, reason)

    if kernel == "row":
        return by_row("as was asked for")
    if not can_group:
        return by_row("the group kernel is for float32 work, from 8.0 on")
    if size < _GROUP_FROM:
        return by_row(f"there are fewer than {_GROUP_FROM} classes")
    resident = resident_blocks(shared_memory())
    at_a_time, cache = size * sum(itemsizes) * _of_device("MULTIPROCESSOR_COUNT"), _of_device("L2_CACHE_SIZE")
    if resident < _ENOUGH_BLOCKS and at_a_time <= _SHARE_OF_CACHE * cache:
        rows = f"all multiprocessors' rows, {at_a_time / 2**20:.0f} MiB at a time"
        return by_row(f"the second read comes from the cache: {rows}, of a cache of {cache / 2**20:.0f} MiB")
    try:
        return _group(size, itemsizes, f"each logit is read once, {resident} blocks share a multiprocessor")
    except DomainError:
        return by_row("there are more classes than the group kernel can keep")


def explain(size: int, dtype: str = "float32") -> str:
    """In words: how the current device works forward KL of rows of ``size`` classes of a dtype."""
    require()
    from kdcore.cuda.kernels import most_threads

    name = str(dtype).rpartition(".")[2]
    if name not in _ITEMSIZES:
        raise DTypeError(f"dtype must be one of {', '.join(_ITEMSIZES)}, got {dtype!r}")
    wide = name == "float64"
    itemsizes = (_ITEMSIZES[name],) * 2
    plan = plan_of(integer(size, "size", least=1), itemsizes, most_threads(wide), not wide)
    blocks = f"{plan.blocks} blocks" if plan.blocks > 1 else "1 block"
    return f"{plan.kernel} kernel, {blocks} of {plan.threads} threads a row: {plan.reason}"
