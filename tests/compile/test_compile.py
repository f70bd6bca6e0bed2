"""Every CUDA kernel compiles to PTX, with real typing, for each combination of dtypes; needs NVVM but no GPU.

The simulator checks no types, so this is what stands between a type error and a user's GPU. Run by itself, without
``NUMBA_ENABLE_CUDASIM``, where ``numba-cuda[cu13]`` is installed: ``pytest tests/compile``.
"""

import itertools
import types

import pytest
from numba import cuda
from numba.core import types as nb
from numba.cuda import dispatcher

from kdcore import divergences
from kdcore.cuda import kernels, primitives, rows
from kdcore.divergences import Divergence, as_divergence, exp, log, where

CAPABILITIES = [(8, 0), (9, 0)]
STORED = {"float16": nb.float16, "bfloat16": nb.uint16, "float32": nb.float32, "float64": nb.float64}
PAIRS = list(itertools.product(STORED, STORED))


def matrix(dtype, layout="C"):
    return nb.Array(dtype, 2, layout)


def vector(dtype, layout="C"):
    return nb.Array(dtype, 1, layout)


@pytest.fixture(params=CAPABILITIES, ids="sm_{0[0]}{0[1]}".format)
def ptx(request, monkeypatch):
    """A function that compiles a kernel and returns its PTX."""
    device = types.SimpleNamespace(compute_capability=request.param)
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: device)  # device functions ask for it

    def compile_kernel(kernel, *signature):
        text, result = cuda.compile_ptx(kernel.py_func, signature, cc=request.param)
        assert result == nb.void
        assert f".target sm_{request.param[0]}{request.param[1]}" in text
        assert ".entry" in text
        return text

    return compile_kernel


def kd_signature(student, teacher, gradient, like, layout="C", labels=nb.int64, weights=nb.float64):
    row = vector(nb.float64)
    return (
        matrix(student, layout), matrix(teacher, layout), vector(labels), vector(weights), nb.int64, row,
        nb.float64, nb.float64, nb.float64, nb.float64, nb.float64, like,
        matrix(gradient), row, row, row, matrix(nb.int64),
    )  # fmt: skip


def working_types(stored, other=None):
    """float64 also for a narrower type, because extreme temperatures need it: tried where both rows have one type."""
    if "float64" in (stored, other):
        return [nb.float64]
    return [nb.float32, nb.float64] if other in (None, stored) else [nb.float32]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_forward_kl(ptx, student, teacher):
    kernel = kernels.kd_kernel(divergences.forward_kl())
    for like in working_types(student, teacher):
        ptx(kernel, *kd_signature(STORED[student], STORED[teacher], STORED[student], like))


def _term(p, q, r, c):
    return where(r > 0.0, where(p > 0, 1, q), c) * log(p + 1) + exp(-q)


def _slope(p, q, r, c):
    return where(p == q, 0, q * r / c)


#: All that go by their two formulas, and one with what a user may write: integers, a constant of another type.
TWO_FORMULAS = [as_divergence(name) for name in divergences.NAMES if name != "forward_kl"]
TWO_FORMULAS.append(Divergence("own", _term, _slope))


@pytest.mark.parametrize("divergence", TWO_FORMULAS, ids=lambda divergence: divergence.name)
@pytest.mark.parametrize(
    ("student", "teacher"), [*((stored, stored) for stored in STORED), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_two_formulas(ptx, divergence, student, teacher):
    kernel = kernels.kd_kernel(divergence)
    ptx(kernel, *kd_signature(STORED[student], STORED[teacher], STORED[student], nb.float64))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl"])
def test_kd_strided_with_other_labels_weights_and_gradient(ptx, name):
    kernel = kernels.kd_kernel(as_divergence(name))
    like = nb.float32 if name == "forward_kl" else nb.float64
    ptx(kernel, *kd_signature(nb.float32, nb.float16, nb.float64, like, "A", nb.int32, nb.float32))
    ptx(kernel, *kd_signature(nb.uint16, nb.uint16, nb.float32, like, "A", nb.uint8, nb.float32))


def test_sweeps_of_forward_kl_stay_in_float32(ptx):
    """A constant of a formula, which is float64, would widen them."""

    @cuda.jit
    def moments(e_t, d_t, d_s, out):
        v = cuda.threadIdx.x
        out[v] = rows._forward_kl_moment(out[v], e_t[v], d_t[v], d_s[v], e_t[0])

    text = ptx(moments, *[vector(nb.float32)] * 4)
    assert "fma" in text
    assert "f64" not in text


@pytest.mark.parametrize("name", ["softmax_kernel", "log_softmax_kernel"])
@pytest.mark.parametrize(("stored", "out"), PAIRS)
def test_softmax(ptx, name, stored, out):
    for like in working_types(stored, other=out):
        ptx(getattr(kernels, name), matrix(STORED[stored]), nb.float64, like, matrix(STORED[out]), matrix(nb.int64))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("out", STORED)
def test_logsumexp(ptx, stored, out):
    for like in working_types(stored, other=out):
        ptx(
            kernels.logsumexp_kernel,
            matrix(STORED[stored]), nb.float64, like, vector(STORED[out], "A"), matrix(nb.int64),
        )  # fmt: skip


def test_sums(ptx):
    for labels, weights in itertools.product([nb.int64, nb.int32], [nb.float64, nb.float32]):
        ptx(kernels.weight_sum_kernel, vector(labels), vector(weights), nb.int64, nb.int64, vector(nb.float64))
    ptx(kernels.reduce_kernel, matrix(nb.float64), vector(nb.float64))


@pytest.mark.parametrize("name", kernels.BIAS_KERNELS)
def test_linear(ptx, name):
    ptx(kernels.BIAS_KERNELS[name], vector(nb.float32), matrix(nb.float32))


def test_fill(ptx):
    for dtype in (nb.float32, nb.float64, nb.int64):
        ptx(kernels.fill_kernel, vector(dtype), dtype)


def test_no_kernel_is_left_out():
    tested = {"softmax_kernel", "log_softmax_kernel", "logsumexp_kernel", "weight_sum_kernel", "reduce_kernel"}
    assert set(kernels.__all__) == tested | {"kd_kernel", "BIAS_KERNELS", "fill_kernel", "matmul_kernel"}


# Row functions in a kernel of a user's own, by themselves.


THREADS = primitives.THREADS


@cuda.jit
def _one_at_a_time(s, t, like, out, results):
    shared = cuda.shared.array((3, THREADS), nb.float64)
    m_s, _, _ = rows.max_row(s, shared)
    m_t, _, _ = rows.max_row(t, shared)
    results[0] = rows.logsumexp_row(s, m_s, 2.0, like, shared)
    results[1] = rows.cross_entropy_row(s, 0, m_s, like, shared)[0]
    results[2] = rows.forward_kl_row(s, t, m_s, m_t, 2.0, like, shared)
    rows.softmax_row(s, m_s, 2.0, like, shared, out)
    rows.log_softmax_row(s, m_s, 2.0, like, shared, out)
    rows.hinton_gradient_row(s, t, m_s, m_t, 2.0, like, shared, out)


@pytest.mark.parametrize("stored", STORED)
def test_row_functions(ptx, stored):
    for like in working_types(stored):
        row = vector(STORED[stored])
        ptx(_one_at_a_time, row, row, like, row, vector(nb.float64))


def test_float32_sweeps_use_the_hardware_exponential(ptx):
    text = ptx(kernels.softmax_kernel, matrix(nb.float32), nb.float64, nb.float32, matrix(nb.float32), matrix(nb.int64))
    assert "ex2.approx" in text
    assert "bar.sync" in text
