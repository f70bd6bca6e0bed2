"""The CUDA engine and the CPU engine side by side, each held against the oracle."""

import ml_dtypes
import numpy as np
import oracle

import kdcore.cpu
import kdcore.cuda
from kdcore import divergences, rowstatus
from kdcore.cuda import memory
from kdcore.divergences import as_divergence
from kdcore.objective import Objective
from kdcore.testing.bounds import gradient_error, kd_bounds, loss_bound, within

F16, F32, F64, BF16 = (np.dtype(t) for t in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16))
DTYPES = [F32, F64, F16, BF16]
PAIRS = [(dtype, dtype) for dtype in DTYPES] + [(F32, BF16), (F64, F32), (F32, F64), (BF16, F16)]
VOCABULARIES = [1, 5, 33, 100]
NAMES = divergences.NAMES
NONE = np.empty(0)
INF, NAN = np.inf, np.nan


def dtype_name(value):
    return value.name if isinstance(value, np.dtype) else None


class Host:
    """The CPU engine, called as the CUDA engine is."""

    kernels, where = kdcore.cpu, 1

    @staticmethod
    def put(array):
        return array

    get = put


class Device:
    """The CUDA engine."""

    kernels, where = kdcore.cuda, None

    @staticmethod
    def put(array):
        return memory.to_device(array, None)

    @staticmethod
    def get(array):
        return memory.to_host(array)


def kd(
    engine, student, teacher, labels=None, *, weights=None, denominator=1.0, temperature=2.0, teacher_temperature=None,
    alpha=0.3, divergence="forward_kl", scale_t2=True, out=None, in_place=False, with_gradient=True,
):  # fmt: skip
    """Row results of an engine as NumPy arrays: loss, ce, kl [B], gradient [B, V], status [B, 2]."""
    B, V = student.shape
    objective = Objective(
        as_divergence(divergence), temperature, teacher_temperature or temperature, alpha,
        temperature**2 if scale_t2 else 1.0, -100,
    )  # fmt: skip
    s, t = engine.put(student.copy()), engine.put(teacher)
    y = engine.put(np.empty(0, np.int64) if labels is None else np.asarray(labels))
    w = engine.put(NONE if weights is None else np.asarray(weights, np.float64))
    if in_place:
        gradient = s
    else:
        rows = B if with_gradient else 0
        gradient = engine.put(np.full((rows, V), 7, out or student.dtype))
    loss, ce, kl = (engine.put(np.full(B, 7.0)) for _ in range(3))
    status = engine.put(np.zeros((B, 2), np.int64))
    engine.kernels.kd_rows(
        s, t, y, w, engine.put(np.array([denominator])), objective, gradient, loss, ce, kl, status, engine.where
    )
    return tuple(engine.get(array) for array in (loss, ce, kl, gradient, status))


def logits(rng, B, V, dtype, scale=3.0):
    return (rng.normal(size=(B, V)) * scale).astype(dtype)


def engines(student, teacher, divergence):
    """Those to be tried: to compile the host's kernel of each divergence for each pair of dtypes would take minutes."""
    on_host = [F32, BF16] if divergence.name == "forward_kl" else [F32]
    return (Host, Device) if student.dtype == teacher.dtype and student.dtype in on_host else (Device,)


def assert_kd(student, teacher, labels, weights=None, denominator=1.0, **options):
    """An engine is within its bounds of the oracle, row by row, and reports usable rows.

    So two engines are within the sum of their bounds of each other.
    """
    temperature, alpha = options.get("temperature", 2.0), options.get("alpha", 0.3)
    scale_t2 = options.get("scale_t2", True)
    divergence = as_divergence(options.pop("divergence", "forward_kl"))
    keywords = {key: options[key] for key in ("teacher_temperature", "scale_t2") if key in options}
    scales = oracle.row_scales(len(student), labels, weights=weights, reduction="none") / denominator
    read = np.flatnonzero(scales)
    expected = oracle.kd(
        student, teacher, labels, temperature, alpha, weights=weights, reduction="none",
        divergence=divergence.name, parameter=divergence.parameter, **keywords,
    )  # fmt: skip
    exact_loss, exact_gradient = expected.loss / denominator, expected.gradient / denominator
    bounds = kd_bounds(
        student[read],
        teacher[read],
        exact_loss[read],
        temperature=temperature,
        alpha=alpha,
        scale=scales[read],
        divergence=divergence,
        **keywords,
    )
    for engine in engines(student, teacher, divergence):
        loss, ce, kl, gradient, status = kd(
            engine, student, teacher, labels, weights=weights, denominator=denominator, divergence=divergence, **options
        )
        masked = np.delete(np.arange(len(student)), read)
        assert np.all(loss[masked] == 0)
        assert np.all(gradient[masked] == 0)
        assert within(loss[read], exact_loss[read], bounds.loss).all(), engine
        for part, exact, only in ((ce, expected.ce, 1.0), (kl, expected.kl, 0.0)):
            bound = loss_bound(
                student.dtype, exact / denominator, temperature=temperature, alpha=only, scale=scales, scale_t2=scale_t2
            )
            assert within(part, exact / denominator, bound).all(), engine
        error = gradient_error(gradient[read], exact_gradient[read], student.dtype)
        finite = np.isfinite(exact_gradient[read]).all(axis=-1)
        assert np.all(error[finite] <= bounds.gradient[finite]), engine
        assert np.isnan(gradient[read][~finite].astype(np.float64)).all()
        assert np.array_equal(status[read][finite], np.zeros((finite.sum(), 2))), engine
        assert np.all(status[read][~finite, 0] == rowstatus.UNDEFINED_GRADIENT)
