"""The operations of kdcore. A call is checked (:mod:`kdcore.arguments`), its arrays say on which engine it runs
(:mod:`kdcore.engines`), and what that returns is handed back.

NumPy in, NumPy out, on the CPU engine; device arrays in, device arrays out, on the CUDA engine. Letters: B rows (any
leading shape), V classes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kdcore import rowstatus
from kdcore.arguments import (
    KDOutput,
    Reduction,
    Tail,
    as_logits,
    as_output,
    as_settings,
    as_sparse_rows,
    as_tail,
    as_temperature,
    as_validate,
    check_logits,
    check_same_shape,
    check_sparse,
    check_sparse_rows,
    flat,
    kd_call,
    row_blocks,
)
from kdcore.checks import choice
from kdcore.divergences import Divergence
from kdcore.engines import engine_of
from kdcore.errors import DTypeError, LabelError
from kdcore.formulas import ACTIVATIONS
from kdcore.sparse import SPARSE

__all__ = [
    "cross_entropy",
    "kd_logit_gradient",
    "kd_loss",
    "kd_loss_and_gradient",
    "kl_divergence",
    "linear",
    "log_softmax",
    "logsumexp",
    "multiply_rows",
    "softmax",
]


# --- softmax -------------------------------------------------------------------------------------------------------


def _row_operation(
    name: str, logits: Any, temperature: Any, out: Any, per_row: bool, validate: Any, threads: int | None, stream: Any
) -> Any:
    engine = engine_of({"logits": logits, "out": out}, threads, stream)
    array = as_logits(engine, logits, "logits")
    temperature = as_temperature(temperature)
    check = as_validate(validate)
    check = engine.on_host if check is None else check
    lead = tuple(array.shape)[:-1]
    shape = lead if per_row else tuple(array.shape)
    if out is None:
        result = engine.empty(shape, np.float64 if per_row else array.dtype)
    else:
        result = as_output(engine, out, shape, None if per_row else "logits", {"logits": logits})
    status = engine.full((math.prod(lead) if check or engine.on_host else 0, 2), np.int64, 0)
    launch = getattr(engine.kernels, f"{name}_rows")
    target = result.reshape((*shape, 1)) if per_row else result  # the same dimensions to merge as the logits have
    for rows, (x, y) in row_blocks(engine, lead, [array, target]):
        launch(x, temperature, y[:, 0] if per_row else y, status[rows], engine.where)
    if check:
        check_logits(engine, status, lead, {rowstatus.STUDENT: "logits"})
    return engine.hand_over(result) if out is None else out


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
    tail: Any,
    with_gradient: bool,
    out: Any,
    validate: Any,
    threads: int | None,
    stream: Any,
) -> KDOutput:
    """The one way to the engines' ``kd_rows`` and ``sparse_kd_rows``."""
    teachers, sparse = {"teacher_logits": teacher_logits}, {}
    inputs = {
        "student_logits": student_logits, "teacher_logits": teacher_logits, "labels": labels, "weights": weights,
        "out": out,
    }  # fmt: skip
    if isinstance(teacher_logits, SPARSE):
        teachers, sparse = {}, {f"teacher_logits.{name}": array for name, array in teacher_logits.arrays().items()}
        del inputs["teacher_logits"]
        inputs |= sparse
    engine = engine_of(inputs, threads, stream)
    settings = as_settings(
        temperature=temperature, alpha=alpha, divergence=divergence, teacher_temperature=teacher_temperature,
        scale_t2=scale_t2, ignore_index=ignore_index, reduction=reduction, denominator=denominator, validate=validate,
    )  # fmt: skip
    tail = as_tail(tail, teacher_logits)
    if sparse:
        check_sparse(teacher_logits, settings, tuple(as_logits(engine, student_logits, "student_logits").shape))
    call = kd_call(
        engine, settings, student_logits, teachers, labels, weights, out, with_gradient=with_gradient, also_read=sparse
    )
    if sparse and settings.objective.alpha < 1:
        rows = as_sparse_rows(engine, teacher_logits)
        for part, s, _, arguments in call.parts():
            engine.kernels.sparse_kd_rows(s, *(array[part] for array in rows), tail, *arguments)
        return call.output(lambda status: check_sparse_rows(call, teacher_logits, status))
    for _, s, ts, arguments in call.parts():
        engine.kernels.kd_rows(s, ts[0] if ts else s, *arguments)
    return call.output()


def kd_loss_and_gradient(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    divergence: str | Divergence = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    tail: Tail = "bucket",
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
        +inf with a finite gradient. The teacher may also be :class:`kdcore.TopKRows` or :class:`kdcore.SampledRows`,
        in the leading shape of the student's rows, read at the teacher's temperature, with forward KL alone.
    labels : array-like of int [...], or None
        Classes in [0, V), or ``ignore_index``. None is allowed at alpha = 0.
    temperature : float
        T, positive and finite (from 1e-150 to 1e150, so that T² is a normal number). CE is always taken at T = 1.
    alpha : float
        Weight of the cross-entropy, in [0, 1]. At 1 the teacher is not read (and may be None); at 0 labels only mask.
    divergence : str or Divergence
        D: "forward_kl" is KL(p || q); or "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd", "alpha", one
        of :mod:`kdcore.divergences` with a parameter, or your own. A row whose reverse KL is +inf (the teacher rules
        out a class that the student allows) has no gradient: it is NaN, and an error under ``validate=True``.
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
    tail : {"bucket", "renormalize", "zero", "uniform"}
        What becomes of the classes that TopKRows leave out. D is a sum of p (log p - log q) over outcomes, where q is
        always the softmax over all V classes, and M the sum of the outcomes' p (1 but for the rounding of what is
        stored). Its gradient, with T², is T times

        - "bucket": the stored classes, and the tail as one more: its p is the stored mass, its q the sum of q over the
          classes that are not stored, added up over these. M q - p for a stored class, (M - p_tail / q_tail) q for
          another: how the student's tail is shared out is left to the student.
        - "renormalize": the stored classes, with p divided by their sum. q - p, and q for another class, which is
          pushed down: the student is taught that nothing else is possible. (Others divide q by its sum over the stored
          classes, too. Then the rest is left alone, even if it has all of q.)
        - "zero": the stored classes as they are, p not divided: M < 1. M q - p, and M q for another class.
        - "uniform": all classes, those of the tail with an equal part of its mass. M q - p.

        Where the student rules the whole tail out, "bucket" and "uniform" are +inf, and their gradients the same.
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
    UndefinedGradientError, VocabularyMismatchError

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
    >>> rows = kdcore.TopKRows.from_logits(teacher, k=2, temperature=3.0)
    >>> kdcore.kd_logit_gradient(student, rows, [3], temperature=3.0, alpha=0.0).round(4)  # exact where it is stored
    array([[ 0.4635, -0.2579,  0.1705, -0.3761]])
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
        tail=tail,
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
    divergence: str | Divergence = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    tail: Tail = "bucket",
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
        tail=tail,
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
    divergence: str | Divergence = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: Any = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    tail: Tail = "bucket",
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
        tail=tail,
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
    divergence: str | Divergence = "forward_kl",
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
    if teacher_logits is None or isinstance(teacher_logits, SPARSE):
        kind = "None" if teacher_logits is None else f"{type(teacher_logits).__name__}, which kd_loss takes"
        raise DTypeError(f"teacher_logits must be an array like student_logits, got {kind}")
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
        tail="bucket",
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
        tail="bucket",
        with_gradient=False,
        out=None,
        validate=validate,
        threads=threads,
        stream=stream,
    ).loss


# --- a loss's backward ---------------------------------------------------------------------------------------------


def multiply_rows(rows: Any, factors: Any, *, stream: Any = None) -> None:
    """rows [..., V] *= factors [...], in place; a row whose factor is 1 is neither read nor written.

    What a gradient is multiplied by, is mostly 1, and on a device only the device knows it: nothing waits for it. The
    product is that of float32, of float64 for float64 rows, and rounded once.
    """
    engine = engine_of({"rows": rows, "factors": factors}, None, stream)
    array = as_logits(engine, rows, "rows")
    lead = tuple(array.shape)[:-1]
    array = as_output(engine, rows, tuple(array.shape), None, {"factors": factors})
    scales = engine.as_array(factors, "factors")
    if scales.dtype.kind != "f":
        raise DTypeError(f"factors must be floating-point numbers, got dtype {scales.dtype}")
    check_same_shape(scales.shape, "factors", lead, "rows without their classes")
    scales = flat(scales, "factors")
    for part, (x,) in row_blocks(engine, lead, [array]):
        engine.kernels.multiply_rows(x, scales[part], engine.where)


# --- dense layers of a teacher's forward ---------------------------------------------------------------------------


def linear(x: Any, weight: Any, bias: Any, activation: str, *, threads: int | None = None, stream: Any = None) -> Any:
    """activation(x [B, K] @ weight [M, K].T + bias [M]), in float32, where x lives."""
    choice(activation, "activation", ACTIVATIONS)
    engine = engine_of({"x": x, "weight": weight, "bias": bias}, threads, stream)
    x, weight, bias = (engine.memory.as_array(array) for array in (x, weight, bias))
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        if array.dtype != np.float32:
            raise DTypeError(f"{name} must be float32, got dtype {array.dtype}")
    check_same_shape(tuple(weight.shape)[1:], "weight[1:]", tuple(x.shape)[1:], "x without its rows")
    check_same_shape(bias.shape, "bias", tuple(weight.shape)[:1], "weight without its columns")
    out = engine.empty((x.shape[0], weight.shape[0]), np.float32)
    engine.kernels.linear(x, weight, bias, activation, out, engine.where)
    return engine.hand_over(out)
