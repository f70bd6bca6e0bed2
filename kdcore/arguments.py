"""The arguments that operations share: what they must be, in which sentence an error says so, and what follows from
them. Letters: B rows (any leading shape), V classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np

from kdcore import rowstatus
from kdcore.checks import choice, flag, integer, number_in, positive_number
from kdcore.divergences import as_divergence
from kdcore.engines import Engine
from kdcore.errors import (
    AliasError,
    DomainError,
    DTypeError,
    KdcoreError,
    LabelError,
    NonFiniteError,
    ShapeError,
    UndefinedGradientError,
    VocabularyMismatchError,
)
from kdcore.objective import TAILS, ZERO, Objective
from kdcore.sparse import SampledRows, TopKRows

__all__ = [
    "ALL",
    "PAIR",
    "KDCall",
    "KDOutput",
    "Reduction",
    "Scaling",
    "Settings",
    "Tail",
    "as_labels",
    "as_logits",
    "as_output",
    "as_scaling",
    "as_settings",
    "as_sparse_rows",
    "as_tail",
    "as_temperature",
    "as_validate",
    "as_weights",
    "at",
    "check_gradients",
    "check_logits",
    "check_same_shape",
    "check_sparse",
    "check_sparse_rows",
    "flat",
    "kd_call",
    "reduced",
    "row_blocks",
]

Reduction = Literal["mean", "sum", "none"]
Tail = Literal["bucket", "renormalize", "zero", "uniform"]

_LOGIT_DTYPES = ("float32", "float64", "float16", "bfloat16")
#: Outside, T² or 1/T is no longer a normal float64.
_TEMPERATURE_RANGE = (1e-150, 1e150)
#: The logits that rows of :mod:`kdcore.rowstatus` may be of, in an operation with one teacher.
PAIR = {rowstatus.STUDENT: "student_logits", rowstatus.TEACHER: "teacher_logits"}


class KDOutput(NamedTuple):
    """What :func:`kdcore.kd_loss_and_gradient` returns; loss = alpha ce + (1 - alpha) kl.

    ``ce`` and ``kl`` are reduced as ``loss`` is, without alpha. ``kl`` is the chosen divergence with its T². A part
    that the objective does not have is None: ``ce`` at alpha = 0, ``kl`` at alpha = 1.
    """

    loss: Any
    gradient: Any
    ce: Any
    kl: Any


# --- scalars -------------------------------------------------------------------------------------------------------


def as_temperature(value: Any, name: str = "temperature") -> float:
    low, high = _TEMPERATURE_RANGE
    number = positive_number(value, name)
    if not low <= number <= high:
        raise DomainError(f"{name} must be between {low} and {high}, got {value!r}")
    return number


def as_validate(value: Any) -> bool | None:
    return None if value is None else flag(value, "validate")


class Scaling(NamedTuple):
    """What rows are reduced to, and what the sum of their weights is replaced by, if anything."""

    reduction: str
    denominator: float | None

    @property
    def divisor(self) -> float | None:
        """What a row is divided by; None: the sum of the weights of the rows that are not masked."""
        return self.denominator if self.reduction == "mean" else 1.0


def as_scaling(reduction: Any, denominator: Any) -> Scaling:
    reduction = choice(reduction, "reduction", ("mean", "sum", "none"))
    if denominator is not None:
        denominator = positive_number(denominator, "denominator")
        if reduction != "mean":
            raise DomainError(f'denominator={denominator} goes with reduction="mean", got reduction={reduction!r}')
    return Scaling(reduction, denominator)


@dataclass(frozen=True, eq=False, slots=True)
class Settings:
    """The scalar arguments of a KD operation; the same object for the same arguments, and hashed as that."""

    objective: Objective
    scaling: Scaling
    validate: bool | None


@lru_cache(maxsize=64, typed=True)
def _settings(
    temperature: Any, alpha: Any, divergence: Any, teacher_temperature: Any, scale_t2: Any, ignore_index: Any,
    reduction: Any, denominator: Any, validate: Any,
) -> Settings:  # fmt: skip
    temperature = as_temperature(temperature)
    if teacher_temperature is not None:
        teacher_temperature = as_temperature(teacher_temperature, "teacher_temperature")
    objective = Objective(
        divergence=as_divergence(divergence),
        temperature=temperature,
        teacher_temperature=temperature if teacher_temperature is None else teacher_temperature,
        alpha=number_in(alpha, "alpha", 0, 1),
        kd_scale=temperature * temperature if flag(scale_t2, "scale_t2") else 1.0,
        ignore_index=integer(ignore_index, "ignore_index"),
    )
    return Settings(objective, as_scaling(reduction, denominator), as_validate(validate))


def as_settings(
    *, temperature: Any, alpha: Any, divergence: Any, teacher_temperature: Any, scale_t2: Any, ignore_index: Any,
    reduction: Any, denominator: Any, validate: Any,
) -> Settings:  # fmt: skip
    """The scalar arguments of a KD operation, checked.

    The check takes longer than a small kernel, and most calls have the values of the call before: so it is remembered,
    by value and type, since 1 == 1.0 == True. An error is not.
    """
    values = (
        temperature, alpha, divergence, teacher_temperature, scale_t2, ignore_index, reduction, denominator, validate,
    )  # fmt: skip
    try:
        return _settings(*values)
    except TypeError as error:
        if isinstance(error, KdcoreError):
            raise
    return _settings.__wrapped__(*values)  # which says what is wrong with the one that has no hash


# --- arrays --------------------------------------------------------------------------------------------------------


@cache
def _name(dtype: np.dtype) -> str:
    """dtype.name, which NumPy puts together anew each time, for longer than a small kernel takes."""
    return dtype.name


def _array(engine: Engine, obj: Any, name: str) -> Any:
    try:
        return engine.as_array(obj, name)
    except KdcoreError as error:
        raise type(error)(f"{name}: {error}") from None


def flat(array: Any, name: str) -> Any:
    """All elements in one dimension, without a copy on a device; if that cannot be, an error that names the array."""
    try:
        return array.reshape(-1)
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from None


def as_logits(engine: Engine, obj: Any, name: str) -> Any:
    array = _array(engine, obj, name)
    _check_is_logits(array, name)
    return array


def _check_is_logits(array: Any, name: str) -> None:
    """Whether an array, or the layout of one, can be logits."""
    if _name(array.dtype) not in _LOGIT_DTYPES:
        raise DTypeError(f"{name} must be {', '.join(_LOGIT_DTYPES)}, got dtype {array.dtype}")
    if array.ndim == 0:
        raise ShapeError(f"{name} must have the classes as its last dimension, got a 0-d array")
    if tuple(array.shape)[-1] == 0:
        raise ShapeError(f"{name} must have at least one class, got shape {tuple(array.shape)}")


def check_same_shape(shape: tuple[int, ...], name: str, expected: tuple[int, ...], reason: str) -> None:
    if tuple(shape) != tuple(expected):
        raise ShapeError(f"{name} must have shape {tuple(expected)} like {reason}, got {tuple(shape)}")


def as_labels(engine: Engine, obj: Any, lead: tuple[int, ...]) -> Any:
    array = _array(engine, obj, "labels")
    _check_are_labels(array, lead)
    return _flat_labels(engine, array)


def _check_are_labels(array: Any, lead: tuple[int, ...]) -> None:
    if array.dtype.kind not in "iu" and not (array.size == 0 and array.dtype == np.float64):  # np.asarray([])
        raise DTypeError(f"labels must be integers, got dtype {array.dtype}")
    check_same_shape(array.shape, "labels", lead, "student_logits without its classes")


def _flat_labels(engine: Engine, array: Any) -> Any:
    if engine.on_host:
        if array.dtype == np.uint64 and array.size and array.max() > np.iinfo(np.int64).max:
            raise LabelError(f"labels must be below 2**63, got {array.max()}")
        if array.dtype != np.int64 or not array.flags.c_contiguous:
            array = np.ascontiguousarray(array, np.int64)  # one layout, one compiled kernel
    return flat(array, "labels")


def _check_label_range(
    labels: np.ndarray, weights: np.ndarray, lead: tuple[int, ...], classes: int, ignore_index: int
) -> None:
    if not labels.size or (labels.min() >= 0 and labels.max() < classes):
        return
    bad = (labels != ignore_index) & ((labels < 0) | (labels >= classes))
    if weights.size:
        bad &= weights != 0
    if bad.any():
        row = int(bad.argmax())
        raise _label_error(lead, row, int(labels[row]), classes, ignore_index)


def _label_error(lead: tuple[int, ...], row: int, label: int, classes: int, ignore_index: int) -> LabelError:
    where = at("labels", lead, row)
    return LabelError(f"{where} is {label}, neither a class in [0, {classes}) nor ignore_index={ignore_index}")


def as_weights(engine: Engine, obj: Any, lead: tuple[int, ...], divisor: float | None, check: bool = True) -> Any:
    """Weights, on the host each finite, and if ``check`` their sum and quotients by the divisor too. None: none."""
    array = None
    if obj is not None:
        array = _array(engine, obj, "weights")
        _check_are_weights(array, lead, engine.on_host)
    return _flat_weights(engine, array, lead, divisor, check)


def _check_are_weights(array: Any, lead: tuple[int, ...], on_host: bool) -> None:
    if array.dtype.kind not in "fiu" or not (on_host or array.dtype.name in ("float32", "float64")):
        raise DTypeError(f"weights must be real numbers, got dtype {array.dtype}")
    check_same_shape(array.shape, "weights", lead, "student_logits without its classes")


def _flat_weights(engine: Engine, array: Any, lead: tuple[int, ...], divisor: float | None, check: bool) -> Any:
    if array is None:
        _check_scale(engine, 1.0, divisor, check)
        return engine.nothing(np.float64)
    if not engine.on_host:
        return flat(array, "weights")
    array = np.ascontiguousarray(array, np.float64).reshape(-1)
    bad = ~((array >= 0) & (array < math.inf))
    if bad.any():
        row = int(bad.argmax())
        raise DomainError(f"{at('weights', lead, row)} is {array[row]}, not a finite number of at least 0")
    largest = float(array.max(initial=0.0))
    if check:
        with np.errstate(over="ignore"):
            total = float(array.sum())
        if not math.isfinite(total):
            raise DomainError(f"weights must have a finite sum, but they add up to {total} (the largest is {largest})")
    _check_scale(engine, largest, divisor, check)
    return array


def _check_scale(engine: Engine, largest: float, divisor: float | None, check: bool) -> None:
    if check and engine.on_host and divisor is not None and not math.isfinite(largest / divisor):
        raise DomainError(f"denominator={divisor} is so small that a weight of {largest} over it overflows")


def as_output(engine: Engine, out: Any, shape: tuple[int, ...], itself: str | None, inputs: dict[str, Any]) -> Any:
    """``out``, checked: its shape and dtype, writable, and either the input ``itself`` or disjoint from every input."""
    array = _output(engine, out)
    _check_is_output(array, shape)
    others = [None if obj is None else _array(engine, obj, name) for name, obj in inputs.items()]
    _check_apart(engine, array, itself, tuple(inputs), others)
    return array


def _output(engine: Engine, out: Any) -> Any:
    """``out`` as an array of the engine, which may be written."""
    if engine.on_host and (isinstance(out, list | tuple) or np.isscalar(out)):
        raise DTypeError(f"out must be an array, got {type(out).__name__}")
    array = _array(engine, out, "out")
    if not engine.memory.is_writable(array):
        raise AliasError("out must be writable, got a read-only array")
    return array


def _check_is_output(array: Any, shape: tuple[int, ...]) -> None:
    """Whether an array, or the layout of one, can take a result."""
    if _name(array.dtype) not in _LOGIT_DTYPES:
        raise DTypeError(f"out must be {', '.join(_LOGIT_DTYPES)}, got dtype {array.dtype}")
    check_same_shape(array.shape, "out", shape, "the result")
    if _overlaps_itself(tuple(array.shape), tuple(array.strides), array.dtype.itemsize):
        raise AliasError(f"out overlaps itself: shape {tuple(array.shape)}, strides {tuple(array.strides)}")


def _check_apart(engine: Engine, out: Any, itself: str | None, names: Sequence[str], inputs: Sequence[Any]) -> None:
    """Whether a result shares no element with an input, unless that is ``itself``, as it is. None: not given."""
    for k in engine.memory.overlapping(out, inputs):
        if not (names[k] == itself and engine.memory.same(out, inputs[k])):
            raise AliasError(
                f"out overlaps {names[k]}: it must be the logits themselves or share no element with an input"
            )


@lru_cache(maxsize=256)
def _overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether two elements may share bytes: some stride does not step over all that smaller strides reach."""
    reach = itemsize
    for stride, n in sorted((abs(stride), n) for stride, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach += stride * (n - 1)
    return False


# --- rows ----------------------------------------------------------------------------------------------------------


def at(name: str, lead: tuple[int, ...], row: int, column: int | None = None) -> str:
    """How an error calls a row, or an element of it."""
    index = [*map(int, np.unravel_index(row, lead))] if lead else []
    if column is not None:
        index.append(column)
    return f"{name}[{', '.join(map(str, index))}]" if index else name


#: All rows.
ALL = slice(None)


def row_blocks(engine: Engine, lead: tuple[int, ...], arrays: list[Any]) -> list[tuple[slice, list[Any]]]:
    """The arrays [lead, V] as views [rows, V], and which of the flattened rows they are.

    One block, unless some array's leading dimensions cannot be merged without a copy (a transposed batch).
    """
    views = engine.memory.rows_of(arrays)
    if views is not None:
        return [(ALL, views)]
    inner = math.prod(lead[1:])
    return [
        (slice(i * inner + (rows.start or 0), i * inner + (inner if rows.stop is None else rows.stop)), views)
        for i in range(lead[0])
        for rows, views in row_blocks(engine, lead[1:], [array[i] for array in arrays])
    ]


def check_logits(engine: Engine, status: Any, lead: tuple[int, ...], names: dict[int, str] = PAIR) -> None:
    """Raise for the first row of logits that a kernel could not use; ``status`` may have been read already."""
    codes = status if isinstance(status, np.ndarray) else engine.memory.to_host(status)
    if not np.count_nonzero(codes):  # rowstatus.OK is 0
        return
    unusable = np.isin(codes[:, 0] // 10 * 10, list(names)) & (codes[:, 0] != rowstatus.OK)
    if not unusable.any():
        return
    row = int(unusable.argmax())
    code, column = int(codes[row, 0]), int(codes[row, 1])
    name, condition = names[code // 10 * 10], code % 10
    if condition == rowstatus.NO_SUPPORT:
        raise NonFiniteError(f"{at(name, lead, row)} is -inf in every class: a row needs at least one finite logit")
    value = "nan" if condition == rowstatus.NAN else "+inf"
    raise NonFiniteError(f"{at(name, lead, row, column)} is {value}: logits must be finite or -inf")


def check_gradients(engine: Engine, status: Any, lead: tuple[int, ...], divergence: str) -> None:
    """Raise for the first row whose divergence is +inf, where that leaves no gradient."""
    undefined = engine.memory.to_host(status)[:, 0] == rowstatus.UNDEFINED_GRADIENT
    if undefined.any():
        where = at("student_logits", lead, int(undefined.argmax()))
        raise UndefinedGradientError(
            f"{divergence} is +inf at {where}, where the student has classes that the teacher rules out: no gradient"
        )


def reduced(engine: Engine, results: Any, reduction: str, lead: tuple[int, ...]) -> list[Any]:
    """loss, ce and kl of rows, [3, B], as the caller gets them."""
    if reduction == "none":
        return engine.hand_over_parts(results, lead)
    totals = engine.empty((3,), np.float64)
    engine.kernels.reduce_rows(results, totals, engine.where)
    return engine.hand_over_parts(totals, ())


# --- teachers without every class ----------------------------------------------------------------------------------


def as_tail(tail: Any, teacher_logits: Any) -> str:
    """The policy that a teacher's rows are worked by. Only :class:`~kdcore.TopKRows` have a choice."""
    tail = choice(tail, "tail", TAILS)
    if isinstance(teacher_logits, TopKRows) or teacher_logits is None:
        return tail
    if tail != TAILS[0]:
        kind = "samples have none" if isinstance(teacher_logits, SampledRows) else "an array of logits has none"
        raise DomainError(f"tail={tail!r} is for the tail that TopKRows leave out; {kind}: leave it at {TAILS[0]!r}")
    return TAILS[ZERO]


def check_sparse(rows: Any, settings: Settings, student_shape: tuple[int, ...]) -> None:
    """Whether rows of a sparse teacher are those of a call: its shape, vocabulary, temperature and divergence."""
    objective, kind = settings.objective, type(rows).__name__
    if objective.divergence.name != "forward_kl" or not objective.divergence.builtin:
        raise DomainError(
            f"divergence must be 'forward_kl' for a teacher of {kind}, which does not have every class, got "
            f"{objective.divergence.name!r}"
        )
    if not math.isclose(rows.temperature, objective.teacher_temperature, rel_tol=2.0**-24):  # files have it in float32
        raise DomainError(
            f"teacher_logits are {kind} at temperature={rows.temperature}, but the call reads the teacher at "
            f"{objective.teacher_temperature}: read them at that temperature, or give teacher_temperature"
        )
    if rows.vocab_size != student_shape[-1]:
        raise VocabularyMismatchError(
            f"teacher_logits have vocab_size={rows.vocab_size}, but student_logits have {student_shape[-1]} classes"
        )
    if rows.shape != student_shape[:-1]:
        raise ShapeError(
            f"teacher_logits must have the leading shape {student_shape[:-1]} of student_logits, got {rows.shape} (see "
            f"{kind}.reshape)"
        )


def as_sparse_rows(engine: Engine, rows: Any) -> tuple[Any, Any, Any, Any]:
    """indices, log_probs [B, k], tail_logmass and n_valid [B], as an engine's ``sparse_kd_rows`` takes them.

    Samples have no tail, and their weights take the place of probabilities.
    """
    found = {}
    for name, obj in rows.arrays().items():
        array = _array(engine, obj, f"teacher_logits.{name}")
        kinds, what = ("iu", "integers") if name in ("indices", "n_valid") else ("f", "floating-point numbers")
        if array.dtype.kind not in kinds and not ("f" in kinds and _name(array.dtype) == "bfloat16"):
            raise DTypeError(f"teacher_logits.{name} must be {what}, got dtype {array.dtype}")
        per_row = array.ndim == len(rows.shape)
        if engine.on_host:  # one layout, one compiled kernel
            array = np.ascontiguousarray(array, np.int64 if "i" in kinds else np.float64)
        try:
            views = [array.reshape(-1)] if per_row else engine.memory.rows_of([array])
        except ShapeError:
            views = None
        if views is None:
            raise ShapeError(f"teacher_logits.{name} must be contiguous, got strides {tuple(array.strides)}")
        found[name] = views[0]
    if isinstance(rows, SampledRows):
        return found["indices"], found["log_weights"], engine.nothing(np.float64), found["n_valid"]
    return found["indices"], found["log_probs"], found["tail_logmass"], found["n_valid"]


def check_sparse_rows(call: KDCall, rows: Any, status: np.ndarray) -> None:
    """Raise for the first row that a kernel could not use, of a sparse teacher or of the student's logits."""
    engine, lead = call.engine, call.lead
    bad = (status[:, 0] >= rowstatus.COUNT) & (status[:, 0] <= rowstatus.ROOM)
    if not bad.any():
        check_logits(engine, call.status, lead)
        return
    row = int(bad.argmax())
    code, entry = (int(number) for number in status[row])
    values = "log_weights" if isinstance(rows, SampledRows) else "log_probs"

    def value(name: str) -> tuple[str, Any]:
        """How an error calls what is wrong, and what is there."""
        array = engine.memory.to_host(_array(engine, getattr(rows, name), name))
        if array.ndim == len(lead):
            return at(f"teacher_logits.{name}", lead, row), array.reshape(-1)[row]
        return at(f"teacher_logits.{name}", lead, row, entry), array.reshape(-1, array.shape[-1])[row, entry]

    if code == rowstatus.COUNT:
        where, found = value("n_valid")
        raise DomainError(f"{where} is {found}, not a number of entries from 1 to {rows.k}")
    if code == rowstatus.CLASS:
        where, found = value("indices")
        raise DomainError(f"{where} is {found}, not a class in [0, {rows.vocab_size})")
    if code == rowstatus.DUPLICATE:
        where, found = value("indices")
        raise DomainError(f"{where} is class {found} again: a row has each class once")
    if code == rowstatus.LOG_PROB:
        where, found = value(values)
        raise NonFiniteError(f"{where} is {found}: it must be finite or -inf")
    if code == rowstatus.TAIL:
        where, found = value("tail_logmass")
        raise NonFiniteError(f"{where} is {found}: it must be finite or -inf")
    if code == rowstatus.ROOM:
        where, found = value("tail_logmass")
        raise DomainError(f"{where} is {found}, but the row has every class: it must be -inf")
    raise DomainError(
        f"the probabilities of {at('teacher_logits', lead, row)} do not add up to more than 0 and at most "
        f"{rowstatus.MOST_MASS}: {values} must be logarithms of probabilities at the temperature of the rows"
    )


# --- a KD operation ------------------------------------------------------------------------------------------------


class KDCall(NamedTuple):
    """A checked call of a KD operation: what an engine takes, and what is made of its rows."""

    engine: Engine
    objective: Objective
    reduction: str
    #: Whether rows that cannot be used raise; ``strict``: also those whose gradient is not defined.
    check: bool
    strict: bool
    student: Any
    #: The shape of the rows.
    lead: tuple[int, ...]
    #: Without teachers at alpha = 1.
    teachers: list[Any]
    labels: Any
    weights: Any
    divisor: Any
    #: None: none wanted.
    gradient: Any
    out: Any
    #: loss, ce and kl of rows, [3, B], and [B, 2] of :mod:`kdcore.rowstatus`.
    results: Any
    status: Any

    def parts(self) -> list[tuple[slice, Any, list[Any], tuple[Any, ...]]]:
        """Rows [B, V] of the student and of the teachers, and the arguments that follow them in an engine's functions.

        All rows at once, or some of them, as the slice says.
        """
        arrays, gradient = [self.student, *self.teachers], self.gradient
        if gradient is None:
            gradient = self.engine.nothing(self.student.dtype, (0, self.student.shape[-1]))
        else:
            arrays.append(gradient)
        of_rows = self.labels, self.weights, *self.results, self.status
        found = []
        for part, (s, *ts) in row_blocks(self.engine, self.lead, arrays):
            of_part = gradient if self.gradient is None else ts.pop()
            y, w, *others = of_rows if part is ALL else [array[part] for array in of_rows]
            found.append((part, s, ts, (y, w, self.divisor, self.objective, of_part, *others, self.engine.where)))
        return found

    def output(self, check_rows: Callable[[np.ndarray], None] | None = None) -> KDOutput:
        """Raise for rows that could not be used, if it is wanted, and reduce the others.

        ``check_rows(status)``: for what an operation has to say of rows of logits instead of :func:`check_logits`.
        """
        engine, alpha = self.engine, self.objective.alpha
        if self.check:
            self._raise_for_rows(check_rows)
        if self.strict and self.gradient is not None:
            check_gradients(engine, self.status, self.lead, self.objective.divergence.name)
        loss, ce, kl = reduced(engine, self.results, self.reduction, self.lead)
        gradient = self.out
        if gradient is None and self.gradient is not None:
            gradient = engine.hand_over(self.gradient)
        return KDOutput(loss, gradient, ce if alpha > 0 else None, kl if alpha < 1 else None)

    def _raise_for_rows(self, check_rows: Callable[[np.ndarray], None] | None) -> None:
        status = self.engine.memory.to_host(self.status)
        if not np.count_nonzero(status):  # rowstatus.OK is 0
            return
        codes, details = status.T
        if (codes == rowstatus.LABEL).any():
            row = int((codes == rowstatus.LABEL).argmax())
            classes = tuple(self.student.shape)[-1]
            raise _label_error(self.lead, row, int(details[row]), classes, self.objective.ignore_index)
        if (codes == rowstatus.WEIGHT).any():
            row = int((codes == rowstatus.WEIGHT).argmax())
            raise DomainError(f"{at('weights', self.lead, row)} is not a finite number of at least 0")
        if check_rows is not None:
            check_rows(status)
        else:
            check_logits(self.engine, self.status, self.lead)


def kd_call(
    engine: Engine,
    settings: Settings,
    student_logits: Any,
    teachers: Mapping[str, Any],
    labels: Any,
    weights: Any,
    out: Any,
    *,
    with_gradient: bool = True,
    labels_needed: bool = False,
    also_read: Mapping[str, Any] = MappingProxyType({}),
) -> KDCall:
    """Check the arrays of a KD operation against one another, and make what it needs.

    The teachers come by the names that errors call them; ``also_read``: what else ``out`` must not overlap.
    """
    (reduction, _), validate = settings.scaling, settings.validate
    divisor = settings.scaling.divisor
    check = engine.on_host if validate is None else validate

    student = _array(engine, student_logits, "student_logits")
    found = [None if obj is None else _array(engine, obj, name) for name, obj in teachers.items()]
    classes = None if labels is None else _array(engine, labels, "labels")
    scales = None if weights is None else _array(engine, weights, "weights")
    gradient = _output(engine, out) if with_gradient and out is not None else None
    arrays = [student, classes, scales, gradient, *found]
    if engine.on_host:
        lead = _check_arrays(settings, labels_needed, True, tuple(teachers), *arrays)
    else:
        layouts = [None if array is None else array.layout for array in arrays]
        lead = _check_layouts(settings, labels_needed, False, tuple(teachers), *layouts)
    shape, rows = tuple(student.shape), math.prod(lead)
    labels = engine.nothing(np.int64) if classes is None else _flat_labels(engine, classes)
    weights = _flat_weights(engine, scales, lead, divisor, check)

    if gradient is not None:
        read = [None if obj is None else _array(engine, obj, name) for name, obj in also_read.items()]
        names = ("student_logits", "labels", "weights", *teachers, *also_read)
        _check_apart(engine, gradient, "student_logits", names, (student, classes, scales, *found, *read))
        if check and engine.on_host:  # before anything is written
            _check_label_range(labels, weights, lead, shape[-1], settings.objective.ignore_index)
    elif with_gradient:
        gradient = engine.empty(shape, student.dtype)
    if divisor is None and classes is None and scales is None:
        divisor = float(rows)
    if divisor is not None:
        results = engine.empty((3, rows), np.float64)
        total = engine.number(divisor)
    else:
        results, total = engine.scratch_of(((3, rows), (1,)), np.float64)
        engine.kernels.weight_sum(labels, weights, settings.objective.ignore_index, rows, total, engine.where)
    status = engine.full((rows, 2), np.int64, 0) if check or engine.on_host else engine.nothing(np.int64, (0, 2))
    return KDCall(
        engine, settings.objective, reduction, check, validate is True, student, lead,
        [array for array in found if array is not None], labels, weights, total, gradient, out, results, status,
    )  # fmt: skip


def _check_arrays(
    settings: Settings,
    labels_needed: bool,
    on_host: bool,
    names: tuple[str, ...],
    student: Any,
    labels: Any,
    weights: Any,
    out: Any,
    *teachers: Any,
) -> tuple[int, ...]:
    """Check the arrays of a KD operation against one another, by their shapes, strides and dtypes; the rows' shape."""
    alpha = settings.objective.alpha
    _check_is_logits(student, "student_logits")
    shape = tuple(student.shape)  # the simulator's shapes know no negative index
    lead = shape[:-1]
    for name, teacher in zip(names, teachers, strict=True):
        if teacher is not None:
            _check_is_logits(teacher, name)
            check_same_shape(teacher.shape, name, shape, "student_logits")
        elif alpha < 1:
            raise DTypeError(f"{name} are needed unless alpha is 1, got None and alpha={alpha}")
    if labels is not None:
        _check_are_labels(labels, lead)
    elif labels_needed:
        raise LabelError("labels are needed whatever alpha: they are the target classes; got labels=None")
    elif alpha > 0:
        raise LabelError(f"labels are needed unless alpha is 0, got labels=None and alpha={alpha}")
    if weights is not None:
        _check_are_weights(weights, lead, on_host)
    if out is not None:
        _check_is_output(out, shape)
    return lead


#: The same of layouts, which are the same objects in call after call: what has been checked is not checked anew.
_check_layouts = lru_cache(maxsize=1024)(_check_arrays)
