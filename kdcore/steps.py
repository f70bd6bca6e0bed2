"""One distillation step: teacher and student logits in, mean loss and logit gradients out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.arguments import Tail, as_tail
from kdcore.checks import number_in, positive_number
from kdcore.errors import DTypeError, ShapeError, VocabularyMismatchError
from kdcore.ops import kd_loss_and_gradient
from kdcore.sequences import as_rows, pad_rows
from kdcore.sparse import SampledRows, TopKRows
from kdcore.teachers.base import InputIds, TeacherLogitsProvider, answers_for_batch, answers_per_position

__all__ = ["kd_step", "kd_step_per_position"]  # counted_kd_step is for the pipeline


def kd_step(
    teacher: TeacherLogitsProvider,
    input_ids: InputIds,
    labels: Any,
    temperature: float,
    alpha: float,
    compute_student_logits: Callable[[Any], Any],
    *,
    divergence: str = "forward_kl",
    ignore_index: int = -100,
    tail: Tail = "bucket",
) -> tuple[float, NDArray[Any]]:
    """The mean KD loss over rows, and the gradient of each row's loss by its student logits.

    The loss of a row is alpha CE + (1 - alpha) T² KL(teacher || student): **alpha is the weight of CE**.

    Parameters
    ----------
    teacher : TeacherLogitsProvider
        Asked once, for the whole batch; not at alpha = 1, where no teacher is read. It may return
        :class:`kdcore.TopKRows` or :class:`kdcore.SampledRows`, of the shape that its logits would have; a
        :class:`kdcore.TeacherRowsProvider` is asked for them at ``temperature``.
    input_ids : B rows of token ids
        Ragged or an array [B, L].
    labels : array-like of int [B]
        Rows labelled ``ignore_index`` are masked. None is allowed at alpha = 0.
    temperature, alpha, divergence, ignore_index, tail
        As for :func:`kdcore.kd_loss_and_gradient`.
    compute_student_logits : callable
        ``compute_student_logits(row_ids) -> [V]``, called once a row, in order.

    Returns
    -------
    loss : float
        Mean over unmasked rows; 0.0 for an empty batch.
    gradients : array [B, V]
        Not divided by B; 0 for masked rows.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> loss, gradients = kdcore.kd_step(
    ...     kdcore.FixtureTeacher(8), [[1, 2, 3], [4, 5]], [3, 5], 4.0, 0.5, lambda row_ids: np.zeros(8)
    ... )
    >>> print(round(loss, 4), gradients.shape)
    6.7449 (2, 8)
    """
    loss, gradient, _ = counted_kd_step(
        teacher,
        input_ids,
        labels,
        temperature,
        alpha,
        compute_student_logits,
        divergence=divergence,
        ignore_index=ignore_index,
        tail=tail,
    )
    return loss, gradient


def counted_kd_step(
    teacher: TeacherLogitsProvider,
    input_ids: InputIds,
    labels: Any,
    temperature: float,
    alpha: float,
    compute_student_logits: Callable[[Any], Any],
    *,
    divergence: str,
    ignore_index: int,
    tail: Tail = "bucket",
) -> tuple[float, NDArray[Any], int]:
    """:func:`kd_step`, and as a third the number of rows in its mean: those that are not masked."""
    _check_arguments(teacher, temperature, alpha, compute_student_logits, tail)
    rows = list(input_ids)
    vocab_size = teacher.vocab_size
    if labels is not None and np.shape(labels) != (len(rows),):
        raise ShapeError(f"labels must have one entry for each of the {len(rows)} rows, got shape {np.shape(labels)}")
    if not rows:
        return 0.0, _no_gradient((0, vocab_size), labels, temperature, alpha, divergence, ignore_index), 0
    teacher_logits = None
    if alpha < 1:
        teacher_logits = answers_for_batch(teacher, input_ids, temperature)
        teacher_logits = _teacher_logits(teacher_logits, (len(rows), vocab_size))
    student_rows = [_student_logits(compute_student_logits(row), i, (vocab_size,)) for i, row in enumerate(rows)]
    result = kd_loss_and_gradient(
        np.stack(student_rows),
        teacher_logits,
        labels,
        temperature,
        alpha,
        divergence=divergence,
        ignore_index=ignore_index,
        reduction="sum",
        tail=tail,
    )
    count = len(rows) if labels is None else int(np.count_nonzero(np.asarray(labels) != ignore_index))
    return float(result.loss) / max(count, 1), result.gradient, count


def kd_step_per_position(
    teacher: TeacherLogitsProvider,
    input_ids: InputIds,
    labels: Any,
    temperature: float,
    alpha: float,
    compute_student_logits: Callable[[Any], Any],
    *,
    divergence: str = "forward_kl",
    ignore_index: int = -100,
    tail: Tail = "bucket",
) -> tuple[float, NDArray[Any], NDArray[np.bool_]]:
    """:func:`kd_step` with a prediction at every position of every row.

    ``labels`` are as ragged as ``input_ids`` (one a position; those equal to ``ignore_index`` are masked), and
    ``compute_student_logits(row_ids) -> [len(row_ids), V]`` is called once a row. Teacher, student and labels must
    agree on the number of positions of each row.

    Returns
    -------
    loss : float
        Mean over unmasked positions.
    gradients : array [B, L, V]
        Not divided by the number of positions; 0 where a position is masked or is padding.
    mask : bool array [B, L]
        Positions that count: they exist and are not ignored.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> teacher = kdcore.FixtureTeacher(8)
    >>> loss, gradients, mask = kdcore.kd_step_per_position(
    ...     teacher, [[1, 2, 3], [4]], [[2, 3, -100], [4]], 4.0, 0.5, lambda row_ids: np.zeros((len(row_ids), 8))
    ... )
    >>> print(round(loss, 4), gradients.shape, mask.sum())
    6.7449 (2, 3, 8) 3
    """
    _check_arguments(teacher, temperature, alpha, compute_student_logits, tail)
    ids = as_rows(input_ids)
    vocab_size = teacher.vocab_size
    _, mask = pad_rows(ids)
    count = len(ids)
    targets, target_mask = None, mask
    if labels is not None:
        targets, target_mask = pad_rows(as_rows(labels, "labels"), fill=ignore_index)
        if len(targets) != count:
            raise ShapeError(f"labels must have one row for each of the {count} rows of input_ids, got {len(targets)}")
        _same_lengths(target_mask, mask, "labels")
        mask = mask & (targets != ignore_index)
    if not target_mask.size:
        shape = (*mask.shape, vocab_size)
        return 0.0, _no_gradient(shape, labels, temperature, alpha, divergence, ignore_index), mask

    teacher_logits = None
    if alpha < 1:
        teacher_logits, teacher_mask = answers_per_position(teacher, input_ids, temperature)
        _same_lengths(np.asarray(teacher_mask, bool), target_mask, "the teacher's mask")
        teacher_logits = _teacher_logits(teacher_logits, (*mask.shape, vocab_size))
    student_rows = [
        _student_logits(compute_student_logits(row), i, (len(ids[i]), vocab_size))
        for i, row in enumerate(list(input_ids))
    ]
    student_logits = np.zeros((*mask.shape, vocab_size), np.result_type(*student_rows))
    student_logits[target_mask] = np.concatenate(student_rows)
    result = kd_loss_and_gradient(
        student_logits,
        teacher_logits,
        targets,
        temperature,
        alpha,
        divergence=divergence,
        ignore_index=ignore_index,
        weights=mask.astype(np.float64),
        reduction="sum",
        tail=tail,
    )
    return float(result.loss) / max(int(mask.sum()), 1), result.gradient, mask


def _check_arguments(teacher: Any, temperature: Any, alpha: Any, compute_student_logits: Any, tail: Any) -> None:
    """Before anything is asked of the teacher; kd_loss_and_gradient looks again at the numbers, once it has logits."""
    if not isinstance(teacher, TeacherLogitsProvider):
        raise DTypeError(f"teacher must be a TeacherLogitsProvider, got {teacher!r}")
    if not callable(compute_student_logits):
        raise DTypeError(f"compute_student_logits must be callable, got {compute_student_logits!r}")
    positive_number(temperature, "temperature")
    number_in(alpha, "alpha", 0, 1)
    as_tail(tail, None)


def _no_gradient(
    shape: tuple[int, ...], labels: Any, temperature: float, alpha: float, divergence: str, ignore_index: int
) -> NDArray[Any]:
    """The gradient of no rows, from arguments that are checked as those of any other batch."""
    logits = np.empty(shape, np.float32)
    targets = None if labels is None else np.empty(shape[:-1], np.int64)
    gradient: NDArray[Any] = kd_loss_and_gradient(
        logits, logits, targets, temperature, alpha, divergence=divergence, ignore_index=ignore_index, reduction="sum"
    ).gradient
    return gradient


def _teacher_logits(logits: Any, shape: tuple[int, ...]) -> Any:
    """An array of logits, or rows without every class, of which kd_loss_and_gradient checks the rest."""
    if isinstance(logits, TopKRows | SampledRows):
        if logits.shape != shape[:-1]:
            raise ShapeError(f"the teacher must return rows of shape {shape[:-1]}, got {logits.shape}")
        return logits
    array = np.asarray(logits)
    if array.shape[:-1] != shape[:-1]:
        raise ShapeError(f"the teacher must return logits of shape {shape}, got {array.shape}")
    if array.shape != shape:
        raise VocabularyMismatchError(f"the teacher says vocab_size={shape[-1]}, but its logits have {array.shape[-1]}")
    return array


def _student_logits(logits: Any, row: int, shape: tuple[int, ...]) -> NDArray[Any]:
    array = np.asarray(logits)
    if array.dtype.kind not in "f" and array.dtype.name != "bfloat16":
        raise DTypeError(f"student logits of row {row} must be floating point, got dtype {array.dtype}")
    if array.shape[:-1] != shape[:-1] or array.ndim != len(shape):
        raise ShapeError(f"student logits of row {row} must have shape {shape}, got {array.shape}")
    if array.shape != shape:
        raise VocabularyMismatchError(
            f"student logits of row {row} have {array.shape[-1]} classes, the teacher has {shape[-1]}"
        )
    return array


def _same_lengths(mask: NDArray[np.bool_], expected: NDArray[np.bool_], name: str) -> None:
    if mask.shape == expected.shape and (mask == expected).all():
        return
    if mask.ndim != 2 or len(mask) != len(expected):
        raise ShapeError(f"{name} must have {len(expected)} rows of positions, got shape {mask.shape}")
    lengths, wanted = mask.sum(axis=1), expected.sum(axis=1)
    if (lengths == wanted).all():
        raise ShapeError(f"{name} must have shape {expected.shape} with rows padded on the right, got {mask.shape}")
    row = int((lengths != wanted).argmax())
    raise ShapeError(f"{name} must have {wanted[row]} positions in row {row}, like input_ids, got {lengths[row]}")
