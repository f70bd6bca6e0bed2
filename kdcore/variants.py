"""Variants of the KD objective: decoupled, of a mixture of teachers, and of standardised logits.

Each returns what :func:`kdcore.kd_loss_and_gradient` does, a :class:`kdcore.KDOutput` with the exact derivative of its
loss, and takes the same arguments in the same meaning: **alpha is the weight of the hard cross-entropy**, ``-inf``
rules a class out, labels of ``ignore_index`` and weights of 0 mask rows, which are not read. Rows are worked in float64
whatever their dtype, by both engines: the CUDA engine has not yet been measured at it on hardware.

Letters: s and t are logits of student and teacher, p = softmax(t/T), q = softmax(s/T), y the label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from kdcore import rowstatus
from kdcore.arguments import PAIR, KDCall, KDOutput, Reduction, as_settings, at, check_logits, kd_call
from kdcore.checks import real_number
from kdcore.engines import engine_of, on_device
from kdcore.errors import DomainError, DTypeError, ShapeError

__all__ = ["dkd_loss_and_gradient", "mixture_kd_loss_and_gradient", "standardized_kd_loss_and_gradient"]


# --- what the variants share ---------------------------------------------------------------------------------------


def _call(
    student_logits: Any,
    teachers: Mapping[str, Any],
    labels: Any,
    temperature: Any,
    alpha: Any,
    *,
    divergence: Any,
    scale_t2: Any,
    ignore_index: Any,
    weights: Any,
    reduction: Any,
    denominator: Any,
    out: Any,
    validate: Any,
    threads: int | None,
    stream: Any,
    labels_needed: bool = False,
    also_read: Mapping[str, Any] = MappingProxyType({}),
) -> KDCall:
    """Check everything but what a variant has alone; ``teachers`` by the names that errors call them."""
    inputs = {"student_logits": student_logits, **teachers, "labels": labels, "weights": weights, "out": out}
    engine = engine_of({**inputs, **also_read}, threads, stream)
    settings = as_settings(
        temperature=temperature, alpha=alpha, divergence=divergence, teacher_temperature=None, scale_t2=scale_t2,
        ignore_index=ignore_index, reduction=reduction, denominator=denominator, validate=validate,
    )  # fmt: skip
    return kd_call(
        engine, settings, student_logits, teachers, labels, weights, out, labels_needed=labels_needed,
        also_read=also_read,
    )  # fmt: skip


def _without_divergence(call: KDCall) -> KDOutput:
    """alpha = 1: the cross-entropy alone, in which there is no teacher."""
    for _, s, _, arguments in call.parts():
        call.engine.kernels.kd_rows(s, s, *arguments)
    return call.output()


# --- decoupled -----------------------------------------------------------------------------------------------------


def _factor(value: Any, name: str) -> float:
    expected = "a finite number of at least 0"
    number = real_number(value, name, expected)
    if not 0 <= number < math.inf:
        raise DomainError(f"{name} must be {expected}, got {value!r}")
    return number


def dkd_loss_and_gradient(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    target_weight: float = 1.0,
    nontarget_weight: float = 8.0,
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
    """Decoupled knowledge distillation, in which forward KL's two parts have weights of their own, and its gradient.

    With p = softmax(t/T), q = softmax(s/T), and p', q' the softmax over all classes but the label y, a row has

        L    = alpha CE(softmax(s), y) + (1 - alpha) T² (target_weight TCKD + nontarget_weight NCKD)
        TCKD = p_y log(p_y / q_y) + (1 - p_y) log((1 - p_y) / (1 - q_y))
        NCKD = sum over v other than y of p'_v log(p'_v / q'_v)

    and KL(p || q) = TCKD + (1 - p_y) NCKD, so that ``nontarget_weight=1 - p_y`` would be plain KD. **alpha is the
    weight of the hard cross-entropy.** The gradient of the second part is (1 - alpha) T times

        target_weight (q_y - p_y)                                                   for the label
        nontarget_weight (q'_v - p'_v) - target_weight (q_y - p_y) q'_v             for the others

    Probabilities of the label and of the rest come from log-odds, so that loss and gradient are finite and exact also
    where the student is wrong beyond what 1 - q_y can show in floating point.

    Parameters
    ----------
    student_logits, teacher_logits : array [..., V]
        float32, float64, float16 or bfloat16 (they may differ), both on the host or both on a CUDA device. Of classes
        that are ruled out, -inf:

        - a label that the student alone rules out makes TCKD +inf, another class NCKD +inf, with finite gradients;
        - where the teacher allows no class but the label, as in V = 1, NCKD is 0: of the others it says nothing;
        - where the student allows no class but the label, and the teacher does, q' does not exist: the loss is +inf
          and the row's gradient NaN, an error under ``validate=True``.
    labels : array-like of int [...]
        The target classes in [0, V), or ``ignore_index``. Needed at every alpha.
    temperature : float
        T, positive and finite. CE is always taken at T = 1.
    alpha : float
        Weight of the cross-entropy, in [0, 1]. At 1 the teacher is not read (and may be None).
    target_weight, nontarget_weight : float
        The paper's alpha and beta, finite and at least 0. A part of weight 0 is not computed. The paper takes 1 and, by
        task, 1 to 10, and adds all of it to a CE of weight 1: that is twice this loss at alpha = 0.5.
    scale_t2, ignore_index, weights, reduction, denominator, out, validate, threads, stream
        As for :func:`kdcore.kd_loss_and_gradient`.

    Returns
    -------
    KDOutput
        ``kl`` is T² (target_weight TCKD + nontarget_weight NCKD).

    Raises
    ------
    DomainError, DTypeError, ShapeError, LabelError, NonFiniteError, AliasError, DeviceMismatchError,
    UndefinedGradientError

    References
    ----------
    Zhao, Cui, Song, Qiu & Liang 2022, "Decoupled Knowledge Distillation", arXiv:2203.08679.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> student, teacher = np.array([[0.0, 1e4, 0.0]]), np.array([[1e4, 0.0, 1.0]])
    >>> result = kdcore.dkd_loss_and_gradient(student, teacher, [0], 1.0, alpha=0.0, nontarget_weight=0.0)
    >>> print(float(result.loss), result.gradient)
    10000.0 [[-1.  1.  0.]]
    """
    target, nontarget = _factor(target_weight, "target_weight"), _factor(nontarget_weight, "nontarget_weight")
    call = _call(
        student_logits,
        {"teacher_logits": teacher_logits},
        labels,
        temperature,
        alpha,
        divergence="forward_kl",
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        out=out,
        validate=validate,
        threads=threads,
        stream=stream,
        labels_needed=True,
    )
    if not math.isfinite(target * call.objective.kd_scale) or not math.isfinite(nontarget * call.objective.kd_scale):
        raise DomainError(f"target_weight={target} or nontarget_weight={nontarget} times T² overflows")

    if call.objective.alpha == 1:
        return _without_divergence(call)
    for _, s, (t,), arguments in call.parts():
        call.engine.kernels.dkd_rows(s, t, target, nontarget, *arguments)
    return call.output()


# --- mixtures of teachers ------------------------------------------------------------------------------------------


def _teachers(teachers: Any) -> dict[str, Any]:
    """The teachers by the names that errors call them."""
    if teachers is None:
        return {"teachers": None}
    iterable = isinstance(teachers, Iterable) and not isinstance(teachers, str | bytes | Mapping)
    if not iterable and not (on_device(teachers) and hasattr(teachers, "__getitem__")):  # as an array of Numba's is
        raise DTypeError(f"teachers must be a sequence of arrays, got {type(teachers).__name__}")
    if getattr(teachers, "ndim", 1) == 0:
        raise DTypeError("teachers must be a sequence of arrays, got a 0-d array")
    several = list(teachers) if iterable else [teachers[k] for k in range(len(teachers))]
    if not several:
        raise ShapeError("teachers must have at least one teacher, got an empty sequence")
    for k, teacher in enumerate(several):
        if teacher is None:
            raise DTypeError(f"teachers[{k}] must be an array like student_logits, got None")
    return {f"teachers[{k}]": teacher for k, teacher in enumerate(several)}


def _bad_share(names: tuple[int, ...], row: int, k: int, share: Any) -> DomainError:
    return DomainError(f"{at('teacher_weights', names, row, k)} is {share}, not a finite number of at least 0")


def _bad_shares(names: tuple[int, ...], row: int, total: Any) -> DomainError:
    where = at("teacher_weights", names, row)
    return DomainError(f"{where} must add up to 1 within {rowstatus.SHARE_TOLERANCE}, but its sum is {total}")


def _shares(teacher_weights: Any, call: KDCall) -> Any:
    """The weights of the teachers, as an engine's ``mixture_rows`` takes them: K numbers or an array [rows, K]."""
    engine, lead, count = call.engine, call.lead, len(call.teachers)
    if teacher_weights is None:
        return (1.0 / count,) * count
    if on_device(teacher_weights):
        return _shares_on_device(teacher_weights, call)
    if engine.on_host:
        array = engine.memory.as_array(teacher_weights)
    else:  # numbers, which are nowhere
        array = np.array([
            real_number(share, f"teacher_weights[{k}]", "a number, or teacher_weights an array on the device")
            for k, share in enumerate(teacher_weights)
        ])  # fmt: skip
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        raise DTypeError(f"teacher_weights must be real numbers, got dtype {array.dtype}")
    _check_shape_of_shares(array, lead, count)
    shared = array.shape == (count,)
    wide = np.array(array, np.float64).reshape(-1, count)
    read = np.ones(1, bool) if shared else _is_read(call)
    names: tuple[int, ...] = () if shared else lead
    bad = read[:, None] & ~((wide >= 0) & (wide < math.inf))
    if bad.any():
        row, k = (int(i) for i in np.argwhere(bad)[0])
        raise _bad_share(names, row, k, wide[row, k])
    with np.errstate(all="ignore"):  # of rows that are not read
        total = wide.sum(axis=1)
        off = read & ~(np.abs(total - 1) <= rowstatus.SHARE_TOLERANCE)
        if off.any():
            row = int(off.argmax())
            raise _bad_shares(names, row, total[row])
        wide /= total[:, None]
    return tuple(wide[0].tolist()) if shared else wide


def _check_shape_of_shares(array: Any, lead: tuple[int, ...], count: int) -> None:
    shape = tuple(array.shape)
    if shape not in ((count,), (*lead, count)):
        raise ShapeError(
            f"teacher_weights must have shape {(count,)}, one for each teacher, or {(*lead, count)}, got {shape}"
        )


def _is_read(call: KDCall) -> np.ndarray:
    """Which of the rows are not masked, on the host."""
    read = np.ones(math.prod(call.lead), bool)
    if call.labels.size:
        read &= call.labels != call.objective.ignore_index
    if call.weights.size:
        read &= call.weights != 0
    return read


def _shares_on_device(teacher_weights: Any, call: KDCall) -> Any:
    """An array [rows, K], or [1, K] of all rows. Its numbers are the kernel's to check."""
    array, count = call.engine.as_array(teacher_weights, "teacher_weights"), len(call.teachers)
    if array.dtype.name not in ("float32", "float64"):
        raise DTypeError(f"teacher_weights must be float32 or float64 on a device, got dtype {array.dtype}")
    _check_shape_of_shares(array, call.lead, count)
    views = call.engine.memory.rows_of([array])
    if views is None:
        raise ShapeError(f"teacher_weights must have rows that follow each other, got strides {array.strides}")
    return views[0]


def mixture_kd_loss_and_gradient(
    student_logits: Any,
    teachers: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    teacher_weights: Any = None,
    divergence: Any = "forward_kl",
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
    """The KD loss of a mixture of K teachers, and its exact gradient by the student's logits.

    With p = sum over k of w_k softmax(t_k/T) and q = softmax(s/T), a row has

        L = alpha CE(softmax(s), y) + (1 - alpha) T² D(p, q)

    **alpha is the weight of the hard cross-entropy.** Probabilities are mixed, not logits, and in logarithms: a class
    in which every teacher's probability underflows keeps its finite log-ratio. For forward KL the gradient is that of
    the weighted mean of the K divergences, and D is less by what does not depend on the student, the mean of
    KL(p_k || p); for other divergences both differ. The mixture is never stored for more than a few rows, or
    on a device for so many that they take 256 MiB.

    Parameters
    ----------
    student_logits : array [..., V]
        float32, float64, float16 or bfloat16, on the host or on a CUDA device. -inf rules a class out; the mixture
        rules out what all teachers do that have a weight.
    teachers : sequence of K arrays [..., V], or an array [K, ..., V]
        The teachers' logits, all of one dtype, where the student's are.
    labels, temperature, alpha
        As for :func:`kdcore.kd_loss_and_gradient`. T is that of all teachers and of the student. At alpha = 1 no
        teacher is read (and ``teachers`` may be None).
    teacher_weights : array-like [K] or [..., K], optional
        w, of at least 0, for all rows or for each; they must add up to 1 within 1e-6 and are divided by their sum. By
        default 1 / K. A teacher is not read in a row where its weight is 0. Weights of masked rows are not read. With
        logits on a device: a list or tuple of K numbers, or a float32 or float64 array on the device, whose rows follow
        one another; rows of it that are no weights become NaN, and are an error under ``validate=True``.
    divergence, scale_t2, ignore_index, weights, reduction, denominator, out, validate, threads, stream
        As for :func:`kdcore.kd_loss_and_gradient`.

    Returns
    -------
    KDOutput
        ``kl`` is T² D(p, q).

    Raises
    ------
    DomainError, DTypeError, ShapeError, LabelError, NonFiniteError, AliasError, DeviceMismatchError,
    UndefinedGradientError

    References
    ----------
    Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531 (of ensembles).

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> student = np.zeros((1, 2))
    >>> teachers = np.log([[[0.2, 0.8]], [[0.6, 0.4]]])
    >>> result = kdcore.mixture_kd_loss_and_gradient(student, teachers, [0], 1.0, 0.0, teacher_weights=[0.75, 0.25])
    >>> result.gradient.round(6)  # 1/2 less 0.75 · 0.2 + 0.25 · 0.6
    array([[ 0.2, -0.2]])
    """
    named = _teachers(teachers)
    # Numbers are not an array that has to be where the others are.
    arrays = {} if isinstance(teacher_weights, list | tuple) else {"teacher_weights": teacher_weights}
    call = _call(
        student_logits,
        named,
        labels,
        temperature,
        alpha,
        divergence=divergence,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        out=out,
        validate=validate,
        threads=threads,
        stream=stream,
        also_read=arrays,
    )
    for k, teacher in enumerate(call.teachers):
        if teacher.dtype != call.teachers[0].dtype:
            raise DTypeError(
                f"teachers must be of one dtype, got {call.teachers[0].dtype} and, in teachers[{k}], {teacher.dtype}"
            )
    if call.objective.alpha == 1:
        return _without_divergence(call)

    engine, rows = call.engine, math.prod(call.lead)
    shares = _shares(teacher_weights, call)
    culprits = engine.full((call.status.shape[0], 3), np.int64, 0)

    def check(status: np.ndarray) -> None:
        """The first bad row's error: the teacher's own status, and which it is, instead of the mixture's."""
        found = engine.memory.to_host(culprits)
        of_teacher = status[:, 0] // 10 * 10 == rowstatus.TEACHER
        status = np.where(of_teacher[:, None], found[:, :2], status)
        codes = status[:, 0]
        bad = np.isin(codes // 10 * 10, (rowstatus.STUDENT, rowstatus.TEACHER))
        bad |= np.isin(codes, (rowstatus.SHARE, rowstatus.SHARES))
        if not bad.any():
            return
        row = int(bad.argmax())
        if codes[row] in (rowstatus.SHARE, rowstatus.SHARES):
            numbers = engine.memory.to_host(shares)
            names, place = ((), 0) if len(numbers) == 1 else (call.lead, row)
            if codes[row] == rowstatus.SHARE:
                k = int(status[row, 1])
                raise _bad_share(names, place, k, numbers[place, k])
            raise _bad_shares(names, place, numbers[place].sum(dtype=np.float64))
        names_of = {rowstatus.STUDENT: "student_logits", rowstatus.TEACHER: f"teachers[{int(found[row, 2])}]"}
        check_logits(engine, status, call.lead, names_of)

    of_rows = not isinstance(shares, tuple) and shares.shape[0] == rows
    for part, s, ts, arguments in call.parts():
        engine.kernels.mixture_rows(s, ts, shares[part] if of_rows else shares, culprits[part], *arguments)
    return call.output(check)


# --- standardised logits -------------------------------------------------------------------------------------------


def standardized_kd_loss_and_gradient(
    student_logits: Any,
    teacher_logits: Any,
    labels: Any,
    temperature: float,
    alpha: float,
    *,
    divergence: Any = "forward_kl",
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
    """The KD loss of standardised logits, and its exact gradient by the student's logits, through mean and deviation.

    With z(x) = (x - mean x) / std x over the row's finite logits, a row has

        L = alpha CE(softmax(s), y) + (1 - alpha) T² D(softmax(z(t)/T), softmax(z(s)/T))

    so that the student need not match the teacher's scale. **alpha is the weight of the hard cross-entropy**, which is
    of the logits as they are. From the gradient g of D by z(s), that by s is

        (g - mean g - z mean(g z)) / std s

    It is orthogonal to s, and D does not change when s or t becomes a s + b, a > 0. ``std`` is the population's: the
    mean square is over all V classes. The paper's code divides by V - 1 instead and adds 1e-7 to the deviation, so that
    its T is as T sqrt(V / (V - 1)) here. On a device rows are standardised in three buffers of at most 256 MiB.

    Parameters
    ----------
    student_logits, teacher_logits : array [..., V]
        float32, float64, float16 or bfloat16 (they may differ), both on the host or both on a CUDA device. -inf rules a
        class out, which counts neither in mean nor in deviation and whose gradient of D is 0; where only the student
        does, forward KL is +inf with a finite gradient. Finite logits that are all the same, V = 1 among them, have no
        deviation: an error.
    labels : array-like of int [...], or None
        Classes in [0, V), or ``ignore_index``. None is allowed at alpha = 0.
    temperature : float
        T, positive and finite. The factor T² (``scale_t2``) is of this T, without the deviations.
    alpha : float
        Weight of the cross-entropy, in [0, 1]. At 1 the teacher is not read (and may be None), nothing standardised.
    divergence, scale_t2, ignore_index, weights, reduction, denominator, out, validate, threads, stream
        As for :func:`kdcore.kd_loss_and_gradient`. With ``validate=False`` a row without deviation becomes NaN.

    Returns
    -------
    KDOutput
        ``kl`` is T² D.

    Raises
    ------
    DomainError, DTypeError, ShapeError, LabelError, NonFiniteError, AliasError, DeviceMismatchError,
    UndefinedGradientError

    References
    ----------
    Sun, Ren, Li, Wang & Cao 2024, "Logit Standardization in Knowledge Distillation", arXiv:2403.01427.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> teacher = np.array([[0.3, 1.7, -0.2, 2.4]])
    >>> result = kdcore.standardized_kd_loss_and_gradient(5 * teacher - 3, teacher, None, 2.0, alpha=0.0)
    >>> print(abs(float(result.loss)) < 1e-12, np.abs(result.gradient).max() < 1e-12)
    True True
    """
    call = _call(
        student_logits,
        {"teacher_logits": teacher_logits},
        labels,
        temperature,
        alpha,
        divergence=divergence,
        scale_t2=scale_t2,
        ignore_index=ignore_index,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        out=out,
        validate=validate,
        threads=threads,
        stream=stream,
    )

    if call.objective.alpha == 1:
        return _without_divergence(call)

    def check(status: np.ndarray) -> None:
        bad = np.isin(status[:, 0] // 10 * 10, list(PAIR))
        if not bad.any():
            return
        row = int(bad.argmax())
        code = int(status[row, 0])
        if code % 10 == rowstatus.NO_SPREAD:
            where = at(PAIR[code // 10 * 10], call.lead, row)
            raise DomainError(f"{where} has no deviation to divide by: its finite logits are all the same")
        check_logits(call.engine, status, call.lead)

    for _, s, (t,), arguments in call.parts():
        call.engine.kernels.standardized_rows(s, t, *arguments)
    return call.output(check)
