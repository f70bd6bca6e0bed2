"""The KD loss of rows whose vocabulary lies in several places: shards of a tensor-parallel model, chunks of a file.

A row's softmaxes and its forward KL follow from a few sums over classes, relative to the largest logits. They are the
row's **state**: :func:`kd_state` of each slice of the vocabulary, :func:`merge_states` of all of them, in whatever
order and by whatever means (an all-reduce of one's own), then :func:`kd_loss_from_state`, the same everywhere, and
:func:`kd_gradient_from_state` of each slice, from the merged state. On host arrays, or on device arrays, of which
nothing is checked that would have to wait for the device: bad rows become NaN.

Rows that do not fit into memory are the same: the slices are then chunks of a file, read once for the states and once
more for the gradients. ``examples/tensor_parallel.py`` has the slices in two MPI processes.

>>> import numpy as np, kdcore
>>> rng = np.random.default_rng(0)
>>> student, teacher = rng.standard_normal((2, 3, 10))
>>> labels = np.array([1, 7, 9])
>>> slices = [(start, student[:, start : start + 5], teacher[:, start : start + 5]) for start in (0, 5)]
>>> a, b = (kdcore.kd_state(s, t, labels, temperature=2.0, start=start) for start, s, t in slices)
>>> state = kdcore.merge_states(a, b)
>>> loss = kdcore.kd_loss_from_state(state, labels, alpha=0.3).loss
>>> parts = [kdcore.kd_gradient_from_state(state, s, t, labels, alpha=0.3, start=start) for start, s, t in slices]
>>> whole = kdcore.kd_loss_and_gradient(student, teacher, labels, temperature=2.0, alpha=0.3)
>>> bool(np.isclose(loss, whole.loss)), np.allclose(np.concatenate(parts, axis=-1), whole.gradient)
(True, True)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdcore.arguments import (
    KDOutput,
    Reduction,
    Scaling,
    as_labels,
    as_logits,
    as_output,
    as_scaling,
    as_temperature,
    as_weights,
    at,
    check_logits,
    check_same_shape,
    reduced,
    row_blocks,
)
from kdcore.checks import flag, integer, number_in
from kdcore.engines import Engine, engine_of, on_device
from kdcore.errors import DomainError, DTypeError, LabelError, ShapeError

__all__ = ["KDState", "kd_gradient_from_state", "kd_loss_from_state", "kd_state", "merge_states"]

#: Numbers that a row's state is made of.
_COLUMNS = 7


@dataclass(frozen=True, eq=False)
class KDState:
    """The sums of rows, over all classes of which they are the state.

    Attributes
    ----------
    values : float64 array [..., 7]
        A row's m_s = max s, sum of exp(s - m_s), sum of exp((s - m_s) / T), 2^-24 times the sum of
        e_t (d_t - T_t/T d_s) with d = x - m, the label's logit (-inf if it is elsewhere), m_t = max t, and the sum of
        e_t = exp((t - m_t) / T_t). A plain array, to be sent about as it is.
    temperature, teacher_temperature : float
        T and T_t, which states must share to be merged.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> kdcore.kd_state(np.zeros((2, 4)), np.zeros((2, 4)), None, temperature=1.0).lead
    (2,)
    """

    values: Any
    temperature: float
    teacher_temperature: float

    def __post_init__(self) -> None:
        values = self.values if on_device(self.values) else np.asarray(self.values)
        array = values
        if not isinstance(values, np.ndarray):
            array = engine_of({"values": values}, None, None).memory.as_array(values)
        if array.dtype != np.float64:
            raise DTypeError(f"values of a state must be float64, got dtype {array.dtype}")
        if array.ndim == 0 or array.shape[-1] != _COLUMNS:
            raise ShapeError(f"values of a state must have shape [..., {_COLUMNS}], got {list(array.shape)}")
        object.__setattr__(self, "values", values)
        for name in ("temperature", "teacher_temperature"):
            object.__setattr__(self, name, as_temperature(getattr(self, name), name))

    @property
    def lead(self) -> tuple[int, ...]:
        """The shape of the rows."""
        return tuple(self.values.shape)[:-1]


def _rows(engine: Engine, state: KDState) -> Any:
    """The values [B, columns], contiguous."""
    values = engine.memory.as_array(state.values)
    if engine.on_host:
        values = np.ascontiguousarray(values)
    elif values.strides != np.empty(values.shape).strides:
        raise ShapeError(f"values of a state must be contiguous on a device, got strides {values.strides}")
    return values.reshape((math.prod(state.lead), _COLUMNS))


def _slices(engine: Engine, student_logits: Any, teacher_logits: Any, needed: bool = True) -> tuple[Any, Any]:
    student = as_logits(engine, student_logits, "student_logits")
    if teacher_logits is None:
        if needed:
            raise DTypeError("teacher_logits are needed unless alpha is 1, got None")
        return student, student
    teacher = as_logits(engine, teacher_logits, "teacher_logits")
    check_same_shape(teacher.shape, "teacher_logits", student.shape, "student_logits")
    return student, teacher


def _classes(engine: Engine, labels: Any, lead: tuple[int, ...], ignore_index: int) -> Any:
    """The labels of rows, flat; empty where there are none. How many classes there are, no slice knows."""
    if labels is None:
        return engine.nothing(np.int64)
    labels = as_labels(engine, labels, lead)
    if not engine.on_host:
        return labels
    bad = (labels < 0) & (labels != ignore_index)
    if bad.any():
        row = int(bad.argmax())
        where = at("labels", lead, row)
        raise LabelError(f"{where} is {labels[row]}, neither a class nor ignore_index={ignore_index}")
    return labels


def kd_state(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    *,
    teacher_temperature: float | None = None,
    start: int = 0,
    ignore_index: int = -100,
    threads: int | None = None,
    stream: Any = None,
) -> KDState:
    """The state of a slice of the vocabulary.

    Parameters
    ----------
    student_logits, teacher_logits : array [..., v]
        The slice's logits, both on the host or both on a CUDA device. A row may be -inf in all of them, if not in all
        slices.
    labels : array-like of int [...], or None
        Classes of the whole vocabulary, or ``ignore_index``: a row that is masked so is not read, one whose weight will
        be 0 is.
    temperature, teacher_temperature : float
        As for :func:`kdcore.kd_loss`.
    start : int
        The class of the whole vocabulary that the slice starts with.

    Raises
    ------
    NonFiniteError
        For NaN or +inf in a row that is read.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> kdcore.kd_state(np.zeros(4), np.zeros(4), 2, temperature=1.0).values
    array([0., 4., 4., 0., 0., 0., 4.])
    """
    inputs = {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels}
    engine = engine_of(inputs, threads, stream)
    temperature = as_temperature(temperature)
    other = temperature if teacher_temperature is None else as_temperature(teacher_temperature, "teacher_temperature")
    start = integer(start, "start", least=0)
    ignore_index = integer(ignore_index, "ignore_index")
    student, teacher = _slices(engine, student_logits, teacher_logits)
    lead = tuple(student.shape)[:-1]
    labels = _classes(engine, labels, lead, ignore_index)
    values = engine.empty((*lead, _COLUMNS), np.float64)
    rows = values.reshape((math.prod(lead), _COLUMNS))
    status = engine.full((rows.shape[0] if engine.on_host else 0, 2), np.int64, 0)
    for part, (s, t) in row_blocks(engine, lead, [student, teacher]):
        labels_, rows_, status_ = (a[part] if a.size else a for a in (labels, rows, status))
        engine.kernels.state_rows(s, t, labels_, start, ignore_index, temperature, other, rows_, status_, engine.where)
    if engine.on_host:
        check_logits(engine, status, lead)
    return KDState(engine.hand_over(values), temperature, other)


def merge_states(a: KDState, b: KDState, *, stream: Any = None) -> KDState:
    """The state of two disjoint slices together: commutative to the last bit, associative within the bounds.

    Raises
    ------
    DomainError, ShapeError
        If the states are of other temperatures or other rows.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> a, b = (kdcore.kd_state(np.zeros(v), np.zeros(v), None, temperature=1.0) for v in (4, 3))
    >>> kdcore.merge_states(a, b).values
    array([  0.,   7.,   7.,   0., -inf,   0.,   7.])
    """
    if (a.temperature, a.teacher_temperature) != (b.temperature, b.teacher_temperature):
        raise DomainError(
            f"states must share their temperatures, got {a.temperature}, {a.teacher_temperature}"
            f" and {b.temperature}, {b.teacher_temperature}"
        )
    if a.lead != b.lead:
        raise ShapeError(f"states must be of the same rows, got {list(a.lead)} and {list(b.lead)}")
    engine = engine_of({"a": a.values, "b": b.values}, None, stream)
    out = engine.empty((*a.lead, _COLUMNS), np.float64)
    rows = out.reshape((math.prod(a.lead), _COLUMNS))
    engine.kernels.merge_state_rows(
        _rows(engine, a), _rows(engine, b), a.temperature, a.teacher_temperature, rows, engine.where
    )
    return KDState(engine.hand_over(out), a.temperature, a.teacher_temperature)


def _scales(
    engine: Engine, state: KDState, labels: Any, alpha: float, ignore_index: int, weights: Any, scaling: Scaling
) -> tuple[Any, Any]:
    """The labels, and w / denominator of each row, 0 where it is masked."""
    if labels is None and alpha > 0:
        raise LabelError(f"labels are needed unless alpha is 0, got labels=None and alpha={alpha}")
    labels = _classes(engine, labels, state.lead, ignore_index)
    given = as_weights(engine, weights, state.lead, scaling.divisor)
    rows = math.prod(state.lead)
    if scaling.divisor is None:
        denominator = engine.scratch((1,), np.float64)
        engine.kernels.weight_sum(labels, given, ignore_index, rows, denominator, engine.where)
    else:
        denominator = engine.full((1,), np.float64, scaling.divisor)
    scale = engine.scratch((rows,), np.float64)
    engine.kernels.scale_rows(labels, given, ignore_index, denominator, scale, engine.where)
    return labels, scale


def _finished(engine: Engine, state: KDState, scale: Any, alpha: float, kd_scale: float) -> Any:
    """loss, ce and kl of rows, [3, B]; on the host, rows without support raise."""
    rows = math.prod(state.lead)
    results = engine.empty((3, rows), np.float64)
    status = engine.full((rows if engine.on_host else 0, 2), np.int64, 0)
    engine.kernels.finish_state_rows(
        _rows(engine, state), scale, alpha, kd_scale, state.teacher_temperature, results, status, engine.where
    )
    if engine.on_host:
        check_logits(engine, status, state.lead)
    return results


def kd_loss_from_state(
    state: KDState,
    labels: Any,
    alpha: float,
    *,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    stream: Any = None,
) -> KDOutput:
    """The loss of :func:`kdcore.kd_loss_and_gradient` with forward KL, from the state of whole rows; no gradient.

    ``labels`` only mask here, since the state knows the label's logit; that of a label that lay in no slice is
    -inf, so that its cross-entropy is +inf. The other arguments are those of :func:`kdcore.kd_loss`; alpha is the
    weight of the cross-entropy.

    Raises
    ------
    NonFiniteError
        For a row that is -inf in all slices, or was masked when the states were made.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> state = kdcore.kd_state(np.zeros(4), np.zeros(4), 2, temperature=1.0)
    >>> print(round(float(kdcore.kd_loss_from_state(state, 2, alpha=1.0).loss), 6))  # log 4
    1.386294
    """
    engine = engine_of({"state": state.values, "labels": labels, "weights": weights}, None, stream)
    alpha = number_in(alpha, "alpha", 0, 1)
    ignore_index = integer(ignore_index, "ignore_index")
    scaling = as_scaling(reduction, denominator)
    labels, scale = _scales(engine, state, labels, alpha, ignore_index, weights, scaling)
    kd_scale = state.temperature**2 if flag(scale_t2, "scale_t2") else 1.0
    results = _finished(engine, state, scale, alpha, kd_scale)
    values = reduced(engine, results, scaling.reduction, state.lead)
    return KDOutput(values[0], None, values[1] if alpha > 0 else None, values[2] if alpha < 1 else None)


def kd_gradient_from_state(
    state: KDState,
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    alpha: float,
    *,
    start: int = 0,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    out: Any = None,
    threads: int | None = None,
    stream: Any = None,
) -> Any:
    """The gradient of :func:`kd_loss_from_state` by the student's logits of one slice.

    Parameters
    ----------
    state : KDState
        Of whole rows: the states of all slices, merged.
    student_logits, teacher_logits : array [..., v]
        The slice. At alpha = 1 the teacher is not read, and may be None.
    start : int
        The class of the whole vocabulary that the slice starts with.

    Notes
    -----
    The other arguments are those of :func:`kdcore.kd_logit_gradient`; alpha is the weight of the cross-entropy. Errors
    are those of :func:`kd_loss_from_state` too.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> state = kdcore.kd_state(np.zeros(4), np.zeros(4), 2, temperature=1.0)
    >>> kdcore.kd_gradient_from_state(state, np.zeros(2), None, 2, alpha=1.0, start=2)  # of the last two classes
    array([-0.75,  0.25])
    """
    inputs = {"student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels, "weights": weights}
    engine = engine_of({**inputs, "out": out, "state": state.values}, threads, stream)
    alpha = number_in(alpha, "alpha", 0, 1)
    start = integer(start, "start", least=0)
    ignore_index = integer(ignore_index, "ignore_index")
    student, teacher = _slices(engine, student_logits, teacher_logits, needed=alpha < 1)
    check_same_shape(student.shape[:-1], "student_logits without its classes", state.lead, "the state")
    scaling = as_scaling(reduction, denominator)
    labels, scale = _scales(engine, state, labels, alpha, ignore_index, weights, scaling)
    kd_scale = state.temperature**2 if flag(scale_t2, "scale_t2") else 1.0
    if engine.on_host:
        _finished(engine, state, scale, alpha, kd_scale)  # whether the rows can be used
    given = {"state": state.values, **inputs}
    shape = tuple(student.shape)
    if out is None:
        gradient = engine.empty(shape, student.dtype)
    else:
        gradient = as_output(engine, out, shape, "student_logits", given)
    values = _rows(engine, state)
    for part, (s, t, g) in row_blocks(engine, state.lead, [student, teacher, gradient]):
        labels_, values_, scale_ = (a[part] if a.size else a for a in (labels, values, scale))
        engine.kernels.slice_gradient_rows(
            s, t, labels_, start, values_, scale_, alpha, state.temperature, state.teacher_temperature, kd_scale, g,
            engine.where,
        )  # fmt: skip
    return engine.hand_over(gradient) if out is None else out
