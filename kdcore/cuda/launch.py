"""Launchers of the CUDA engine: storage views, streams, grids."""

from __future__ import annotations

import numpy as np

from kdcore.cuda import kernels
from kdcore.cuda.primitives import SIMULATOR, raw_bits
from kdcore.cuda.streams import launch, stream_handle
from kdcore.errors import MissingDependencyError
from kdcore.objective import needs_float64

__all__ = ["kd_rows", "linear", "log_softmax_rows", "logsumexp_rows", "reduce_rows", "softmax_rows", "weight_sum"]


def _like(wide):
    """A number in the working type, which is how a kernel learns it."""
    return np.float64(0) if wide else np.float32(0)


def softmax_rows(logits, temperature, out, status, stream):
    """out [B, V] = softmax(logits / T)."""
    like = _like(needs_float64((logits.dtype,), temperature))
    arguments = raw_bits(logits), float(temperature), like, raw_bits(out), status
    launch(kernels.softmax_kernel, logits.shape[0], stream, *arguments)


def log_softmax_rows(logits, temperature, out, status, stream):
    """out [B, V] = log softmax(logits / T)."""
    like = _like(needs_float64((logits.dtype,), temperature))
    arguments = raw_bits(logits), float(temperature), like, raw_bits(out), status
    launch(kernels.log_softmax_kernel, logits.shape[0], stream, *arguments)


def logsumexp_rows(logits, temperature, out, status, stream):
    """out [B] = log of the row sums of exp(logits / T)."""
    like = _like(needs_float64((logits.dtype,), temperature))
    arguments = raw_bits(logits), float(temperature), like, raw_bits(out), status
    launch(kernels.logsumexp_kernel, logits.shape[0], stream, *arguments)


def kd_rows(student, teacher, labels, weights, denominator, objective, gradient, loss, ce, kl, status, stream):
    """Row losses [B] in float64, scaled by weight / denominator[0], and their gradient [B, V].

    Empty ``labels`` or ``weights``: none given. A gradient or status without rows: none wanted. At alpha = 1 the
    teacher is not read, at alpha = 0 labels only mask.
    """
    divergence = objective.divergence
    temperatures = objective.temperature, objective.teacher_temperature
    # Divergences that go by their two formulas need float64: see kdcore.cuda.rows.two_formula_soft.
    wide = divergence.term is not None or needs_float64((student.dtype, teacher.dtype), *temperatures)
    arguments = (
        raw_bits(student),
        raw_bits(teacher),
        labels,
        weights,
        objective.ignore_index,
        denominator,
        float(objective.alpha),
        *map(float, temperatures),
        float(objective.kd_scale),
        np.float64(divergence.parameter),  # NumPy's, so that a formula may divide by 0 in the simulator too
        _like(wide),
        raw_bits(gradient),
        loss,
        ce,
        kl,
        status,
    )
    launch(kernels.kd_kernel(divergence), student.shape[0], stream, *arguments)


def weight_sum(labels, weights, ignore_index, rows, out, stream):
    """out[0] = sum of the weights of the rows that are not masked."""
    launch(kernels.weight_sum_kernel, 1, stream, labels, weights, ignore_index, rows, out)


def reduce_rows(rows, out, stream):
    """out [K] = sums of ``rows`` [K, B]."""
    launch(kernels.reduce_kernel, rows.shape[0], stream, rows, out)


class _Unsynchronised:
    """A device array as CuPy sees it: without the stream that CuPy would otherwise wait for on the host."""

    def __init__(self, array):
        self.array = array
        self.__cuda_array_interface__ = {**array.__cuda_array_interface__, "stream": None}


def _matmul(x, weight, out, stream):
    """out [B, M] = x [B, K] @ weight [M, K].T, by cuBLAS."""
    try:
        import cupy
    except ImportError as error:
        raise MissingDependencyError(
            "matrix products on CUDA need the package CuPy: pip install kdcore[cuda]"
        ) from error
    with cupy.cuda.ExternalStream(stream_handle(stream)):
        x, weight, out = (cupy.asarray(_Unsynchronised(array)) for array in (x, weight, out))
        cupy.matmul(x, weight.T, out=out)


def linear(x, weight, bias, activation, out, stream):
    """out [B, M] = activation(x [B, K] @ weight [M, K].T + bias [M])."""
    rows = x.shape[0]
    if SIMULATOR:
        launch(kernels.matmul_kernel, rows, stream, x, weight, out)
    elif rows > 0:
        _matmul(x, weight, out, stream)
    launch(kernels.BIAS_KERNELS[activation], rows, stream, bias, out)
