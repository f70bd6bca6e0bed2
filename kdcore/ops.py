"""The operations of kdcore: validation, allocation, dispatch to an engine.

This is the one place that asks where an array lives. NumPy in, NumPy out, on the CPU engine; device arrays in,
device arrays out, on the CUDA engine. Letters: B rows (any leading shape), V classes.
"""

from __future__ import annotations

import math
import os
import re
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np

from kdcore import rowstatus
from kdcore.checks import choice, flag, integer, number_in, positive_number
from kdcore.cuda import presence
from kdcore.cuda.presence import owns as on_device
from kdcore.divergences import as_divergence
from kdcore.errors import (
    AliasError,
    DeviceMismatchError,
    DomainError,
    DTypeError,
    KdcoreError,
    LabelError,
    NonFiniteError,
    ShapeError,
    UndefinedGradientError,
)
from kdcore.formulas import ACTIVATIONS
from kdcore.objective import Objective

__all__ = [
    "KDOutput",
    "cross_entropy",
    "kd_logit_gradient",
    "kd_loss",
    "kd_loss_and_gradient",
    "kl_divergence",
    "linear",
    "log_softmax",
    "logsumexp",
    "on_device",
    "require_cuda",
    "resolve_threads",
    "softmax",
    "to_device",
    "to_host",
]

Reduction = Literal["mean", "sum", "none"]

_LOGIT_DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Outside, T² or 1/T is no longer a normal float64.
_TEMPERATURE_RANGE = (1e-150, 1e150)
#: Beyond any machine's cores: a larger number is a mistake, and would start as many threads.
_MOST_THREADS = 1024


class KDOutput(NamedTuple):
    """What :func:`kd_loss_and_gradient` returns; loss = alpha ce + (1 - alpha) kl.

    ``ce`` and ``kl`` are reduced as ``loss`` is, without alpha. ``kl`` is the chosen divergence with its T². A part
    that the objective does not have is None: ``ce`` at alpha = 0, ``kl`` at alpha = 1.
    """

    loss: Any
    gradient: Any
    ce: Any
    kl: Any


# --- engines -------------------------------------------------------------------------------------------------------


@cache
def _modules(engine: str) -> tuple[Any, Any]:
    return import_module(f"kdcore.{engine}"), import_module(f"kdcore.{engine}.memory")


@cache
def _nothing(dtype: type) -> np.ndarray:
    return np.empty(0, dtype)


@cache
def _name(dtype: np.dtype) -> str:
    """dtype.name, which NumPy puts together anew each time, for longer than a small kernel takes."""
    return dtype.name


class _Engine:
    """An engine's functions, its memory, and the value of its last parameter (threads or stream)."""

    __slots__ = ("kernels", "memory", "name", "where")

    def __init__(self, name: str, where: Any) -> None:
        self.name = name
        self.kernels, self.memory = _modules(name)
        self.where = where

    def empty(self, shape: Any, dtype: Any) -> Any:
        return self.memory.empty(shape, dtype, self.where)

    def nothing(self, dtype: type) -> Any:
        """An array without elements, for an argument that is not given."""
        return _nothing(dtype) if self.name == "cpu" else self.empty((0,), dtype)

    def full(self, shape: Any, dtype: Any, value: Any) -> Any:
        return self.memory.full(shape, dtype, value, self.where)


def resolve_threads(threads: int | None) -> int:
    """The number of CPU threads: ``threads``, else ``KDCORE_NUM_THREADS``, else the CPUs that the process may use."""
    if threads is not None:
        return _threads(threads, "threads")
    text = os.environ.get("KDCORE_NUM_THREADS")
    if not text:
        from kdcore.cpu.pool import default_threads

        return default_threads()
    if not re.fullmatch("[0-9]{1,9}", text.strip()):
        raise DomainError(f"the environment variable KDCORE_NUM_THREADS must be a positive integer, got {text[:80]!r}")
    return _threads(int(text), "the environment variable KDCORE_NUM_THREADS")


def _threads(value: Any, name: str) -> int:
    threads = integer(value, name, least=1)
    if threads > _MOST_THREADS:
        raise DomainError(f"{name} must be at most {_MOST_THREADS}, got {threads}")
    return threads


def _engine(arrays: dict[str, Any], threads: int | None, stream: Any) -> _Engine:
    """The engine of the device on which all ``arrays`` live; None entries do not count."""
    device: list[str] = []
    host: list[str] = []
    for name, obj in arrays.items():
        if obj is not None:
            (device if not isinstance(obj, np.ndarray) and on_device(obj) else host).append(name)
    if device and host:
        raise DeviceMismatchError(
            f"arrays must be all on the host or all on a device: {', '.join(device)} on a device, {', '.join(host)} not"
        )
    if device:
        if threads is not None:
            raise DomainError(f"threads={threads!r} is for host arrays; device arrays take stream")
        require_cuda()
        return _Engine("cuda", stream)
    if stream is not None:
        raise DomainError(f"stream={stream!r} is for device arrays; host arrays take threads")
    return _Engine("cpu", resolve_threads(threads))


def require_cuda() -> None:
    """Raise :class:`~kdcore.errors.DeviceUnavailableError`, with the reason, unless CUDA can run here."""
    presence.require()


def to_device(array: np.ndarray, stream: Any = None) -> Any:
    """A copy of a host array on the CUDA device."""
    require_cuda()
    return import_module("kdcore.cuda.memory").to_device(array, stream)


def to_host(array: Any) -> np.ndarray:
    """A device array as a NumPy array (waits for the device); a NumPy array as it is."""
    if not on_device(array):
        return np.asarray(array)
    require_cuda()
    memory = import_module("kdcore.cuda.memory")
    return memory.to_host(memory.as_array(array))


# --- validation ----------------------------------------------------------------------------------------------------


def _temperature(value: Any, name: str = "temperature") -> float:
    low, high = _TEMPERATURE_RANGE
    number = positive_number(value, name)
    if not low <= number <= high:
        raise DomainError(f"{name} must be between {low} and {high}, got {value!r}")
    return number


def _optional_flag(value: Any, name: str) -> bool | None:
    return None if value is None else flag(value, name)


def _array(engine: _Engine, obj: Any, name: str) -> Any:
    try:
        return engine.memory.as_array(obj)
    except KdcoreError as error:
        raise type(error)(f"{name}: {error}") from None


def _logits(engine: _Engine, obj: Any, name: str) -> Any:
    array = _array(engine, obj, name)
    if _name(array.dtype) not in _LOGIT_DTYPES:
        raise DTypeError(f"{name} must be {', '.join(_LOGIT_DTYPES)}, got dtype {array.dtype}")
    if array.ndim == 0:
        raise ShapeError(f"{name} must have the classes as its last dimension, got a 0-d array")
    if tuple(array.shape)[-1] == 0:
        raise ShapeError(f"{name} must have at least one class, got shape {tuple(array.shape)}")
    return array


def _same_shape(shape: tuple[int, ...], name: str, expected: tuple[int, ...], reason: str) -> None:
    if tuple(shape) != tuple(expected):
        raise ShapeError(f"{name} must have shape {tuple(expected)} like {reason}, got {tuple(shape)}")


def _labels(engine: _Engine, obj: Any, lead: tuple[int, ...]) -> Any:
    array = _array(engine, obj, "labels")
    if array.dtype.kind not in "iu" and not (array.size == 0 and array.dtype == np.float64):  # np.asarray([])
        raise DTypeError(f"labels must be integers, got dtype {array.dtype}")
    _same_shape(array.shape, "labels", lead, "student_logits without its classes")
    if engine.name == "cpu":
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise LabelError(f"labels must be below 2**63, got {array.max()}")
        return np.ascontiguousarray(array, np.int64).reshape(-1)  # one layout, one compiled kernel
    return array.reshape(-1)


def _check_label_range(labels: np.ndarray, lead: tuple[int, ...], classes: int, ignore_index: int) -> None:
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if bad.any():
        row = int(bad.argmax())
        raise _label_error(lead, row, int(labels[row]), classes, ignore_index)


def _label_error(lead: tuple[int, ...], row: int, label: int, classes: int, ignore_index: int) -> LabelError:
    where = _at("labels", lead, row)
    return LabelError(f"{where} is {label}, neither a class in [0, {classes}) nor ignore_index={ignore_index}")


def _weights(engine: _Engine, obj: Any, lead: tuple[int, ...]) -> Any:
    array = _array(engine, obj, "weights")
    if array.dtype.kind not in "fiu" or (engine.name == "cuda" and array.dtype.name not in ("float32", "float64")):
        raise DTypeError(f"weights must be real numbers, got dtype {array.dtype}")
    _same_shape(array.shape, "weights", lead, "student_logits without its classes")
    if engine.name == "cpu":
        array = np.ascontiguousarray(array, np.float64).reshape(-1)
        bad = ~((array >= 0) & (array < math.inf))
        if bad.any():
            row = int(bad.argmax())
            raise DomainError(f"{_at('weights', lead, row)} is {array[row]}, not a finite number of at least 0")
        return array
    return array.reshape(-1)


def _check_scale(weights: np.ndarray, rows: int, denominator: float | None) -> None:
    """Raise unless sums of weights, and weights over the denominator, are finite numbers."""
    total, largest = float(rows), 1.0
    if weights.size:
        with np.errstate(over="ignore"):
            total, largest = float(weights.sum()), float(weights.max())
    scale = largest if denominator is None else largest / denominator
    if not math.isfinite(total):
        raise DomainError(f"weights must have a finite sum, but they add up to {total} (the largest is {largest})")
    if not math.isfinite(scale):
        raise DomainError(f"denominator={denominator} is so small that a weight of {largest} over it overflows")


def _output(engine: _Engine, out: Any, shape: tuple[int, ...], itself: str | None, inputs: dict[str, Any]) -> Any:
    """``out``, checked: its shape and dtype, writable, and either the input ``itself`` or disjoint from every input."""
    if isinstance(out, list | tuple) or np.isscalar(out):
        raise DTypeError(f"out must be an array, got {type(out).__name__}")
    array = _array(engine, out, "out")
    if _name(array.dtype) not in _LOGIT_DTYPES:
        raise DTypeError(f"out must be {', '.join(_LOGIT_DTYPES)}, got dtype {array.dtype}")
    _same_shape(array.shape, "out", shape, "the result")
    if not engine.memory.is_writable(out):
        raise AliasError("out must be writable, got a read-only array")
    if _overlaps_itself(array):
        raise AliasError(f"out overlaps itself: shape {tuple(array.shape)}, strides {tuple(array.strides)}")
    for name, obj in inputs.items():
        other = _array(engine, obj, name)
        if name == itself and engine.memory.same(array, other):
            continue
        if engine.memory.overlaps(array, other):
            raise AliasError(f"out overlaps {name}: it must be the logits themselves or share no element with an input")
    return array


def _overlaps_itself(array: Any) -> bool:
    """Whether two elements may share bytes: some stride does not step over all that smaller strides reach."""
    reach = array.dtype.itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


# --- rows ----------------------------------------------------------------------------------------------------------


def _at(name: str, lead: tuple[int, ...], row: int, column: int | None = None) -> str:
    index = [*map(int, np.unravel_index(row, lead))] if lead else []
    if column is not None:
        index.append(column)
    return f"{name}[{', '.join(map(str, index))}]" if index else name


def _mergeable(array: Any) -> bool:
    """Whether all dimensions but the last can be one, without a copy."""
    if isinstance(array, np.ndarray) and array.flags.c_contiguous:
        return True
    dims = [(n, stride) for n, stride in zip(tuple(array.shape)[:-1], tuple(array.strides)[:-1], strict=True) if n != 1]
    return 0 in tuple(array.shape) or all(
        outer_stride == inner_n * inner_stride for (_, outer_stride), (inner_n, inner_stride) in pairwise(dims)
    )


def _row_blocks(engine: _Engine, lead: tuple[int, ...], arrays: list[Any]) -> list[tuple[slice, list[Any]]]:
    """The arrays [lead, V] as views [rows, V], and which of the flattened rows they are.

    One block, unless some array's leading dimensions cannot be merged without a copy (a transposed batch).
    """
    if all([_mergeable(array) for array in arrays]):
        return [(slice(0, math.prod(lead)), [engine.memory.as_rows(array) for array in arrays])]
    inner = math.prod(lead[1:])
    return [
        (slice(i * inner + rows.start, i * inner + rows.stop), views)
        for i in range(lead[0])
        for rows, views in _row_blocks(engine, lead[1:], [array[i] for array in arrays])
    ]


def _check_logits(engine: _Engine, status: Any, lead: tuple[int, ...], names: dict[int, str]) -> None:
    """Raise for the first row of logits that a kernel could not use."""
    codes = engine.memory.to_host(status)
    unusable = np.isin(codes[:, 0] // 10 * 10, list(names)) & (codes[:, 0] != rowstatus.OK)
    if not unusable.any():
        return
    row = int(unusable.argmax())
    code, column = int(codes[row, 0]), int(codes[row, 1])
    name, condition = names[code // 10 * 10], code % 10
    if condition == rowstatus.NO_SUPPORT:
        raise NonFiniteError(f"{_at(name, lead, row)} is -inf in every class: a row needs at least one finite logit")
    value = "nan" if condition == rowstatus.NAN else "+inf"
    raise NonFiniteError(f"{_at(name, lead, row, column)} is {value}: logits must be finite or -inf")


def _check_rows(engine: _Engine, status: Any, lead: tuple[int, ...], classes: int, ignore_index: int) -> None:
    """Raise for the first row of a KD call that a kernel could not use, whatever the reason."""
    host = engine.memory.to_host(status)
    if not host.any():  # rowstatus.OK is 0
        return
    codes, details = host.T
    if (codes == rowstatus.LABEL).any():
        row = int((codes == rowstatus.LABEL).argmax())
        raise _label_error(lead, row, int(details[row]), classes, ignore_index)
    if (codes == rowstatus.WEIGHT).any():
        row = int((codes == rowstatus.WEIGHT).argmax())
        raise DomainError(f"{_at('weights', lead, row)} is not a finite number of at least 0")
    _check_logits(engine, status, lead, {rowstatus.STUDENT: "student_logits", rowstatus.TEACHER: "teacher_logits"})


def _check_gradients(engine: _Engine, status: Any, lead: tuple[int, ...], divergence: str) -> None:
    """Raise for the first row whose divergence is +inf, where that leaves no gradient."""
    undefined = engine.memory.to_host(status)[:, 0] == rowstatus.UNDEFINED_GRADIENT
    if undefined.any():
        where = _at("student_logits", lead, int(undefined.argmax()))
        raise UndefinedGradientError(
            f"{divergence} is +inf at {where}, where the student has classes that the teacher rules out: no gradient"
        )


# --- softmax -------------------------------------------------------------------------------------------------------


def _row_operation(
    name: str, logits: Any, temperature: Any, out: Any, per_row: bool, validate: Any, threads: int | None, stream: Any
) -> Any:
    engine = _engine({"logits": logits, "out": out}, threads, stream)
    array = _logits(engine, logits, "logits")
    temperature = _temperature(temperature)
    check = _optional_flag(validate, "validate")
    check = engine.name == "cpu" if check is None else check
    lead = tuple(array.shape)[:-1]
    shape = lead if per_row else tuple(array.shape)
    if out is None:
        result = engine.empty(shape, np.float64 if per_row else array.dtype)
    else:
        result = _output(engine, out, shape, None if per_row else "logits", {"logits": logits})
    status = engine.full((math.prod(lead) if check or engine.name == "cpu" else 0, 2), np.int64, 0)
    launch = getattr(engine.kernels, f"{name}_rows")
    target = result.reshape((*shape, 1)) if per_row else result  # the same dimensions to merge as the logits have
    for rows, (x, y) in _row_blocks(engine, lead, [array, target]):
        launch(x, temperature, y[:, 0] if per_row else y, status[rows], engine.where)
    if check:
        _check_logits(engine, status, lead, {rowstatus.STUDENT: "logits"})
    return out if out is not None else result[()] if engine.name == "cpu" else result


def softmax(
    logits: Any,
    temperature: float = 1.0,
    *,
    out: Any = None,
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """softmax(logits / T) over the last dimension.

    Parameters
    ----------
    logits : array [..., V]
        float32, float64, float16 or bfloat16, on the host or on a CUDA device. -inf rules a class out.
    temperature : float
        T, positive and finite (from 1e-150 to 1e150, so that T² is a normal number).
    out : array, optional
        Where the result goes: ``logits`` itself, or an array of its shape that shares no element with it.
    validate : bool, optional
        Whether rows with NaN or +inf, or nothing but -inf, raise; otherwise they become NaN. By default they raise
        on the host; on a device a check would have to wait for the device, so it is made only when asked for.
    threads : int, optional
        CPU threads; by default ``KDCORE_NUM_THREADS``, else all CPUs of the process. The result does not depend on it.
    stream : optional
        CUDA stream of device arrays.

    Returns
    -------
    array [..., V]
        In the dtype of ``logits`` (or of ``out``); rows sum to 1.

    Raises
    ------
    DomainError, DTypeError, ShapeError, NonFiniteError, AliasError, DeviceMismatchError

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> kdcore.softmax(np.log([1.0, 2.0, 1.0])).round(12)
    array([0.25, 0.5 , 0.25])
    """
    return _row_operation("softmax", logits, temperature, out, False, validate, threads, stream)


def log_softmax(
    logits: Any,
    temperature: float = 1.0,
    *,
    out: Any = None,
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """log softmax(logits / T) over the last dimension; parameters, result and errors as for :func:`softmax`.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> kdcore.log_softmax(np.array([0.0, -np.inf]))
    array([  0., -inf])
    """
    return _row_operation("log_softmax", logits, temperature, out, False, validate, threads, stream)


def logsumexp(
    logits: Any,
    temperature: float = 1.0,
    *,
    out: Any = None,
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """log of the sum of exp(logits / T) over the last dimension, in float64; otherwise as :func:`softmax`.

    ``out``, if given, has the shape of ``logits`` without its last dimension.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> print(round(float(kdcore.logsumexp(np.full(8, 1e4))) - 1e4, 6))  # log 8
    2.079442
    """
    return _row_operation("logsumexp", logits, temperature, out, True, validate, threads, stream)


# --- knowledge distillation ----------------------------------------------------------------------------------------


def _kd(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: Any,
    alpha: Any,
    *,
    divergence: Any,
    teacher_temperature: Any,
    scale_t2: Any,
    ignore_index: Any,
    weights: Any,
    reduction: Any,
    denominator: Any,
    with_gradient: bool,
    out: Any,
    validate: Any,
    threads: int | None,
    stream: Any,
) -> KDOutput:
    """The one way to the engines' ``kd_rows``."""
    inputs = {
        "student_logits": student_logits,
        "teacher_logits": teacher_logits,
        "labels": labels,
        "weights": weights,
        "out": out,
    }
    engine = _engine(inputs, threads, stream)

    temperature = _temperature(temperature)
    if teacher_temperature is not None:
        teacher_temperature = _temperature(teacher_temperature, "teacher_temperature")
    objective = Objective(
        divergence=as_divergence(divergence),
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        alpha=number_in(alpha, "alpha", 0, 1),
        kd_scale=temperature * temperature if flag(scale_t2, "scale_t2") else 1.0,
        ignore_index=integer(ignore_index, "ignore_index"),
    )
    reduction = choice(reduction, "reduction", ("mean", "sum", "none"))
    if denominator is not None:
        denominator = positive_number(denominator, "denominator")
        if reduction != "mean":
            raise DomainError(f'denominator={denominator} goes with reduction="mean", got reduction={reduction!r}')
    strict = _optional_flag(validate, "validate")
    check = engine.name == "cpu" if strict is None else strict

    student = _logits(engine, student_logits, "student_logits")
    *leading, classes = tuple(student.shape)  # the simulator's shapes know no negative index
    lead = tuple(leading)
    rows = math.prod(lead)
    teacher = student
    if teacher_logits is None and objective.alpha < 1:
        raise DTypeError(f"teacher_logits are needed unless alpha is 1, got None and alpha={objective.alpha}")
    if teacher_logits is not None:
        teacher = _logits(engine, teacher_logits, "teacher_logits")
        _same_shape(teacher.shape, "teacher_logits", tuple(student.shape), "student_logits")
    if labels is not None:
        labels = _labels(engine, labels, lead)
        if check and engine.name == "cpu" and labels.size and (labels.min() < 0 or labels.max() >= classes):
            _check_label_range(labels, lead, classes, objective.ignore_index)  # before anything is written
    elif objective.alpha > 0:
        raise LabelError(f"labels are needed unless alpha is 0, got labels=None and alpha={objective.alpha}")
    else:
        labels = engine.nothing(np.int64)
    weights = _weights(engine, weights, lead) if weights is not None else engine.nothing(np.float64)

    gradient = None
    if with_gradient and out is not None:
        given = {name: obj for name, obj in inputs.items() if name != "out" and obj is not None}
        gradient = _output(engine, out, tuple(student.shape), "student_logits", given)
    elif with_gradient:
        gradient = engine.empty(tuple(student.shape), student.dtype)

    if check and engine.name == "cpu":
        _check_scale(weights, rows, denominator if reduction == "mean" else 1.0)
    if reduction == "mean" and denominator is None:
        divisor = engine.empty((1,), np.float64)
        engine.kernels.weight_sum(labels, weights, objective.ignore_index, rows, divisor, engine.where)
    else:
        divisor = engine.full((1,), np.float64, 1.0 if denominator is None else denominator)
    results = engine.empty((3, rows), np.float64)
    loss, ce, kl = results[0], results[1], results[2]
    status = engine.full((rows if check or engine.name == "cpu" else 0, 2), np.int64, 0)
    no_gradient = None if with_gradient else engine.empty((0, classes), student.dtype)
    arrays = [student, teacher] + ([gradient] if with_gradient else [])
    for part, (s, t, *g) in _row_blocks(engine, lead, arrays):
        engine.kernels.kd_rows(
            s, t, labels[part], weights[part], divisor, objective, g[0] if g else no_gradient,
            loss[part], ce[part], kl[part], status[part], engine.where,
        )  # fmt: skip
    if check:
        _check_rows(engine, status, lead, classes, objective.ignore_index)
    if strict and with_gradient:
        _check_gradients(engine, status, lead, objective.divergence.name)

    if reduction == "none":
        values = [row.reshape(lead) for row in (loss, ce, kl)]
        if engine.name == "cpu" and not lead:
            values = [value[()] for value in values]
    else:
        totals = engine.empty((3,), np.float64)
        engine.kernels.reduce_rows(results, totals, engine.where)
        values = [engine.memory.element(totals, k) for k in range(3)]
    return KDOutput(
        loss=values[0],
        gradient=out if out is not None else gradient,
        ce=values[1] if objective.alpha > 0 else None,
        kl=values[2] if objective.alpha < 1 else None,
    )


def kd_loss_and_gradient(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    divergence: str = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    out: Any = None,
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> KDOutput:
    """The KD loss and its exact gradient by the student's logits, in one pass.

    With p = softmax(t/T), q = softmax(s/T), h = softmax(s), a row has

        L     = alpha CE(h, y) + (1 - alpha) T² D(p, q)
        dL/ds = alpha (h - onehot(y)) + (1 - alpha) T (q - p)        for the default D = KL(p || q)

    **alpha is the weight of the hard cross-entropy**; some libraries mean the opposite. The gradient is the
    derivative of the loss that this call returns, whatever the divergence, reduction, weights or mask.

    Parameters
    ----------
    student_logits, teacher_logits : array [..., V]
        float32, float64, float16 or bfloat16 (they may differ), both on the host or both on a CUDA device. -inf
        rules a class out: where the teacher does, the class adds nothing; where only the student does, forward KL is
        +inf with a finite gradient.
    labels : array-like of int [...], or None
        Classes in [0, V), or ``ignore_index``. None is allowed at alpha = 0.
    temperature : float
        T, positive and finite (from 1e-150 to 1e150, so that T² is a normal number). CE is always taken at T = 1.
    alpha : float
        Weight of the cross-entropy, in [0, 1]. At 1 the teacher is not read (and may be None); at 0 labels only mask.
    divergence : {"forward_kl", "reverse_kl"}
        D: KL(p || q), or KL(q || p). A row whose reverse KL is +inf (the teacher rules out a class that the student
        allows) has no gradient: it is NaN, and an error under ``validate=True``.
    teacher_temperature : float, optional
        Temperature of the teacher alone; by default T.
    scale_t2 : bool
        Whether D is multiplied by T², which keeps the gradient's size as T grows (Hinton et al. 2015, section 2).
    ignore_index : int
        Rows with this label are masked: not read, loss 0, gradient 0, not counted by the mean.
    weights : array-like [...], optional
        A weight of at least 0 a row; 0 masks the row.
    reduction : {"mean", "sum", "none"}
        sum of w L / sum of w over unmasked rows; sum of w L; w L a row. Never divided by V. Nothing unmasked gives 0.
    denominator : float, optional
        Replaces the sum of weights in the mean, so that accumulated micro-batches add up to the batch.
    out : array, optional
        Where the gradient goes: ``student_logits`` itself, or an array of its shape that shares no element with an
        input. After an error its contents are undefined.
    validate, threads, stream
        As for :func:`softmax`. ``validate=True`` also raises for undefined gradients.

    Returns
    -------
    KDOutput
        ``loss``, ``ce`` and ``kl`` in float64, ``gradient`` in the dtype of ``student_logits`` (or of ``out``),
        rounded to nearest: what is beyond the largest float16 becomes infinite.

    Raises
    ------
    DomainError, DTypeError, ShapeError, LabelError, NonFiniteError, AliasError, DeviceMismatchError,
    UndefinedGradientError

    References
    ----------
    Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> student = np.array([[2.0, 0.0, -1.0, 0.5]])
    >>> teacher = np.array([[0.3, 1.7, -0.2, 2.4]])
    >>> result = kdcore.kd_loss_and_gradient(student, teacher, [3], temperature=3.0, alpha=0.0)
    >>> print(round(float(result.loss), 7))
    1.0666924
    >>> result.gradient.round(4)
    array([[ 0.6559, -0.2579, -0.0219, -0.3761]])
    """
    return _kd(
        student_logits,
        teacher_logits,
        labels,
        temperature,
        alpha,
        divergence=divergence,
        teacher_temperature=teacher_temperature,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        with_gradient=True,
        out=out,
        validate=validate,
        threads=threads,
        stream=stream,
    )


def kd_loss(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    divergence: str = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """The loss of :func:`kd_loss_and_gradient` alone; alpha is the weight of the cross-entropy.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> print(round(float(kdcore.kd_loss(np.zeros(4), np.array([10.0, 0, 0, 0]), 2, 4.0, alpha=1.0)), 6))  # log 4
    1.386294
    """
    return _kd(
        student_logits,
        teacher_logits,
        labels,
        temperature,
        alpha,
        divergence=divergence,
        teacher_temperature=teacher_temperature,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        with_gradient=False,
        out=None,
        validate=validate,
        threads=threads,
        stream=stream,
    ).loss


def kd_logit_gradient(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    divergence: str = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    out: Any = None,
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of :func:`kd_loss_and_gradient` alone; alpha is the weight of the cross-entropy.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> kdcore.kd_logit_gradient(np.zeros(4), np.zeros(4), 2, temperature=4.0, alpha=1.0)
    array([ 0.25,  0.25, -0.75,  0.25])
    """
    return _kd(
        student_logits,
        teacher_logits,
        labels,
        temperature,
        alpha,
        divergence=divergence,
        teacher_temperature=teacher_temperature,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        with_gradient=True,
        out=out,
        validate=validate,
        threads=threads,
        stream=stream,
    ).gradient


def kl_divergence(
    student_logits: Any,
    teacher_logits: Any,
    temperature: float = 1.0,
    *,
    divergence: str = "forward_kl",
    reduction: Reduction = "mean",
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """D(softmax(teacher/T), softmax(student/T)) without the factor T²; by default KL(teacher || student).

    Student first, teacher second. Arguments, reductions and errors as for :func:`kd_loss_and_gradient`.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> print(round(float(kdcore.kl_divergence(np.zeros(2), np.log([0.25, 0.75]))), 6))
    0.130812
    """
    if teacher_logits is None:
        raise DTypeError("teacher_logits must be an array like student_logits, got None")
    return _kd(
        student_logits,
        teacher_logits,
        None,
        temperature,
        0.0,
        divergence=divergence,
        teacher_temperature=None,
        scale_t2=False,
        ignore_index=-100,
        weights=None,
        reduction=reduction,
        denominator=None,
        with_gradient=False,
        out=None,
        validate=validate,
        threads=threads,
        stream=stream,
    ).loss


def cross_entropy(
    student_logits: Any,
    labels: Any,
    *,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    validate: bool | None = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """-log softmax(student_logits)[label]; +inf for a label on a -inf class.

    Arguments, reductions and errors as for :func:`kd_loss_and_gradient`.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> print(round(float(kdcore.cross_entropy(np.array([[0.0, 30.0]]), [0])), 6))
    30.0
    """
    if labels is None:
        raise LabelError("labels must be integers, got None")
    return _kd(
        student_logits,
        None,
        labels,
        1.0,
        1.0,
        divergence="forward_kl",
        teacher_temperature=None,
        scale_t2=True,
        ignore_index=ignore_index,
        weights=None,
        reduction=reduction,
        denominator=None,
        with_gradient=False,
        out=None,
        validate=validate,
        threads=threads,
        stream=stream,
    ).loss


# --- dense layers of a teacher's forward ---------------------------------------------------------------------------


def linear(x: Any, weight: Any, bias: Any, activation: str, *, threads: int | None = None, stream: Any = None) -> Any:
    """activation(x [B, K] @ weight [M, K].T + bias [M]), in float32, where x lives."""
    choice(activation, "activation", ACTIVATIONS)
    engine = _engine({"x": x, "weight": weight, "bias": bias}, threads, stream)
    x, weight, bias = (engine.memory.as_array(array) for array in (x, weight, bias))
    _same_shape(tuple(weight.shape)[1:], "weight[1:]", tuple(x.shape)[1:], "x without its rows")
    _same_shape(bias.shape, "bias", tuple(weight.shape)[:1], "weight without its columns")
    out = engine.empty((x.shape[0], weight.shape[0]), np.float32)
    engine.kernels.linear(x, weight, bias, activation, out, engine.where)
    return out
