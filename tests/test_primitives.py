"""The CPU engine's exponential and logarithm of vectors, in extended precision, on this processor and a plain one.

Run as a program, it prints what the tests assert of another processor.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit

from kdcore.cpu.primitives import exp2, exprel, log
from kdcore.cpu.simd import fma, has_eighths, load, store

LANES = {np.dtype(np.float32): 16, np.dtype(np.float64): 8}
#: The documented relative errors of exp2 and exprel, and what log's formulas allow.
EXP2 = {np.dtype(np.float32): 1.4e-7, np.dtype(np.float64): 1.5e-16}
EXPREL = {np.dtype(np.float32): 1.2e-7, np.dtype(np.float64): 2.2e-16}
LOG = {np.dtype(np.float32): 1.2e-7, np.dtype(np.float64): 2.5e-16}
RATES = [1.4426950408889634, 0.5, 3.0, 1e-15, 1e15]


def vectorised(function, dtype):
    lanes, zero = LANES[dtype], dtype.type(0)

    @njit
    def run(x, parameter, out):
        for v in range(0, x.size, lanes):
            store(out, v, function(load(x, v, zero), parameter))

    def call(x, parameter=0.0):
        out = np.full_like(x, np.nan)
        run(x, dtype.type(parameter), out)
        return out

    return call


def exponentials(dtype):
    return vectorised(njit(lambda x, rate: exp2(x, rate)), dtype)


def logarithms(dtype):
    return vectorised(njit(lambda x, _: log(x)), dtype)


def exp2_errors(dtype):
    """The largest relative error of exp2 at each rate, where the result is a normal number."""
    lowest = np.finfo(dtype).minexp
    run = exponentials(dtype)
    errors = []
    for rate in RATES:
        x = (np.linspace(lowest + 0.01, 0, 1 << 18) / rate).astype(dtype)
        exact = np.exp2(x.astype(np.longdouble) * np.longdouble(dtype.type(rate)))
        errors.append(float(np.abs(run(x, rate) / exact - 1).max()))
    return errors


@pytest.mark.parametrize("dtype", LANES, ids=str)
def test_exp2_is_as_accurate_as_documented(dtype):
    errors = exp2_errors(dtype)
    assert all(0 < error <= EXP2[dtype] for error in errors), errors


def log_error(dtype):
    """The largest relative error of log over all normal numbers, many of them near 1."""
    info = np.finfo(dtype)
    powers = np.exp2(np.linspace(info.minexp, info.maxexp - 1, 1 << 16))
    near = 1 + np.linspace(-0.01, 0.01, 1 << 16)
    x = np.concatenate([powers, near]).astype(dtype)
    exact = np.log(x.astype(np.longdouble))
    error = np.abs(logarithms(dtype)(x) - exact)
    assert not error[exact == 0].any()
    return float((error[exact != 0] / np.abs(exact[exact != 0])).max())


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("dtype", LANES, ids=str)
def test_exp2_at_the_ends(dtype, rate):
    tiny, huge = np.finfo(dtype).tiny, np.finfo(dtype).max
    lowest = np.finfo(dtype).minexp
    below = (np.linspace(lowest * 1.02, lowest, LANES[dtype]) / rate).astype(dtype)
    x = np.concatenate([np.full(LANES[dtype], value, dtype) for value in (0, -0.0, -np.inf, np.nan, -huge)] + [below])
    zero, minus_zero, infinite, nan, largest, subnormal = exponentials(dtype)(x, rate).reshape(6, -1)
    assert (zero == 1).all() and (minus_zero == 1).all()
    assert (infinite == 0).all() and (largest == 0).all() and not np.signbit(infinite).any()
    assert np.isnan(nan).all()
    # The argument of the largest of them is off by half an ulp.
    assert ((subnormal >= 0) & (subnormal <= tiny * (1 - lowest * np.finfo(dtype).eps))).all()


@pytest.mark.parametrize("dtype", LANES, ids=str)
def test_log(dtype):
    assert 0 < log_error(dtype) <= LOG[dtype]


@pytest.mark.parametrize("dtype", LANES, ids=str)
def test_exprel(dtype):
    x = np.concatenate([np.linspace(-0.5, 0.5, 1 << 16), np.geomspace(1e-30, 0.1, 1 << 10)]).astype(dtype)
    x[: LANES[dtype]] = 0
    wide = x.astype(np.longdouble)
    exact = np.where(wide == 0, 1, np.expm1(wide) / np.where(wide == 0, 1, wide))
    values = vectorised(njit(lambda x, _: exprel(x)), dtype)(x)
    assert (values[: LANES[dtype]] == 1).all()
    assert (np.abs(values / exact - 1) <= EXPREL[dtype]).all()


def test_another_processor(tmp_path):
    """Without AVX2 there is no table, and without FMA a multiply-add is a library's: the accuracy is the same."""
    environment = {
        **os.environ,
        "NUMBA_CPU_NAME": "generic",
        "NUMBA_CPU_FEATURES": "",
        "NUMBA_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["eighths"] is False
    assert told["fused"] == 2.0**-60
    for dtype in LANES:
        assert all(0 < error <= EXP2[dtype] for error in told[f"exp2 {dtype}"]), told
        assert 0 < told[f"log {dtype}"] <= LOG[dtype], told


@njit
def _multiply_add(x, y, z):
    return fma(x, y, z)


if __name__ == "__main__":
    x = 1 + 2.0**-30
    fused = _multiply_add(x, x, -(1 + 2.0**-29))  # what one rounding leaves and two do not
    told = {"eighths": has_eighths(), "fused": fused}
    for dtype in LANES:
        told |= {f"exp2 {dtype}": exp2_errors(dtype), f"log {dtype}": log_error(dtype)}
    print(json.dumps(told))
