"""The arithmetic of the CUDA kernels in float32 at full size, typed and compiled by Numba for the host.

The same functions of octets that the kernels are made of (:mod:`kdcore.cuda.distillation`), under ``njit`` instead of
``cuda.jit``, with as many sums as a block has threads. The exponential is off by what the hardware's may be, with a
sign that depends on its bits, so that nothing rests on a better one.
"""

from pathlib import Path

from processes import in_a_process

PROGRAM = '''
import sys
from types import ModuleType

import ml_dtypes
import numpy as np
from numba import njit, types
from numba.extending import overload

import oracle
from kdcore import formulas
from kdcore.divergences import forward_kl
from kdcore.testing.bounds import gradient_error, kd_bounds, within

HARDWARE_ERROR = np.float32(2.0**-22.5)


def where(condition, x, y):
    raise TypeError


@overload(where)
def _where(condition, x, y):
    def rank(number):
        return not isinstance(number, types.Float), number.bitwidth
    if rank(x) < rank(y):
        return lambda condition, x, y: x if condition else type(x)(y)
    return lambda condition, x, y: type(y)(x) if condition else y


@njit
def fma(x, y, z):
    return type(x)(np.float64(x) * np.float64(y) + np.float64(z))


def bind(formula):
    return njit(formulas.bound(formula, {"where": where, "fma": fma}))


@njit
def cast(x, like):
    return type(like)(x)


@njit
def maximum(x, y):
    return y if y > x or x != x else x


@njit
def ex2(x):
    """2**x, off by up to HARDWARE_ERROR; exact at 0."""
    e = np.exp2(x)
    bits = np.float32(x).view(np.uint32) * np.uint32(2654435761) >> np.uint32(16)
    wrong = e + e * HARDWARE_ERROR * (np.float32(bits & np.uint32(0xFFFF)) / np.float32(32768) - np.float32(1))
    return e if x == 0 or e == 0 else np.float32(wrong)


def exp2_scaled(d, rate, tag):
    raise TypeError


@overload(exp2_scaled)
def _exp2_scaled(d, rate, tag):
    if tag == types.uint16:
        return lambda d, rate, tag: ex2(d * rate[0])

    def corrected(d, rate, tag):
        x = d * rate[0]
        e = ex2(x)
        lost = fma(d, rate[1], fma(d, rate[0], -x))
        return e if e == 0 else fma(e, lost * np.float32(0.6931471805599453), e)

    return corrected


@njit
def lowest(like):
    return np.finfo(np.float32).min


@njit
def split_rate(rate, like):
    high = np.float32(rate)
    return high, np.float32(rate - np.float64(high))


@njit
def two_sum(x, y):
    s = x + y
    z = s - x
    return s, (x - (s - z)) + (y - z)


primitives = ModuleType("kdcore.cuda.primitives")
ours = dict(
    bind=bind, cast=cast, device=njit, exp2_scaled=exp2_scaled, lowest=lowest, maximum=maximum, split_rate=split_rate,
    two_sum=two_sum, SCRATCH=(5, 32), SIMULATOR=False,
)
vars(primitives).update(ours)
primitives.__getattr__ = lambda name: njit(lambda: None)  # what moves data, which is not used here
sys.modules["kdcore.cuda.primitives"] = primitives

from kdcore.cuda.distillation import no_sums, parts_of, stages  # noqa: E402


def kernel(parts):
    rates_of, gather, settle, _, spend, spend_one = stages(parts)

    @njit
    def octet(x, a):
        return x[a], x[a + 1], x[a + 2], x[a + 3], x[a + 4], x[a + 5], x[a + 6], x[a + 7]

    @njit
    def run(s, t, label, temperature, alpha, threads, tag, gradient):
        """One row by so many threads, each with every so-many-th octet; its loss in two parts."""
        like = np.float32(0)
        tags = tag, tag
        rates = rates_of(temperature, temperature, like)
        sums = [no_sums(like) for _ in range(threads)]
        for a in range(0, s.size, 8):
            thread = a // 8 % threads
            sums[thread] = gather(sums[thread], octet(s, a), octet(t, a), rates, tags)
        m_s, m_t = sums[0][0], sums[0][5]
        for one in sums:
            m_s, m_t = max(m_s, one[0]), max(m_t, one[5])
        maxima = m_s, m_t
        z_s, z_h, z_t = 0.0, 0.0, 0.0
        for one in sums:
            a, b, c, d, e, f = settle(one, maxima, rates, tags)
            z_s, z_h, z_t = z_s + (a + np.float64(b)), z_h + (c + np.float64(d)), z_t + (e + np.float64(f))
        soft = (1.0 - alpha) * temperature
        factors = np.float32(alpha / z_h), np.float32(soft / z_s), np.float32(soft / z_t)
        softmaxes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        w, one = 0.0, np.float32(1)
        for a in range(0, s.size, 8):
            g, part = spend(octet(s, a), octet(t, a), maxima, rates, tags, factors, one, softmaxes)
            w += part
            for k in range(8):
                gradient[a + k] = g[k]
        zero = np.float32(0)
        gradient[label], _ = spend_one(
            zero, s[label], t[label], np.float32(z_h), maxima, rates, tags, factors, one, softmaxes
        )
        return w, z_s, z_h, z_t, m_s

    return run


def patterns(V, rng):
    normal = rng.normal(size=(2, V)) * 3
    yield "normal", normal[0], normal[1]
    wide = rng.normal(size=(2, V)) * 30
    yield "wide", wide[0], wide[1]
    one = np.full((2, V), -12.4375)
    one[0, 7] = one[1, 9] = 0.0
    yield "half of it far below", one[0], one[1] - 0.0625 * (np.arange(V) % 2)
    rising = np.arange(V) * (16.0 / V)
    yield "rising", rising, rising[::-1]
    yield "much the same", normal[0], normal[0] + 1e-3 * normal[1]


V, label = 262_144, 1000
rng = np.random.default_rng(0)
worst = {}
OBJECTIVES = [(0.3, 1.0), (0.3, 2.0), (0.3, 3.0), (0.0, 20.0)]  # alpha, temperature
for dtype, tag, objectives in (
    (np.dtype(np.float32), np.float32(0), OBJECTIVES), (np.dtype(ml_dtypes.bfloat16), np.uint16(0), OBJECTIVES[1::2])
):
    for alpha, temperature in objectives:
        run = kernel(parts_of(alpha, temperature))
        for name, s, t in patterns(V, rng):
            s, t = (np.ascontiguousarray(x.astype(dtype).astype(np.float32)) for x in (s, t))
            gradient = np.empty(V, np.float32)
            w, z_s, z_h, z_t, m = run(s, t, label, temperature, alpha, 1024, tag, gradient)
            kl = formulas.forward_kl_from_sums(w, z_t, z_s, temperature) * temperature**2
            ce = formulas.cross_entropy(float(np.float64(s[label]) - np.float64(m)) * formulas.HEADROOM, z_h)
            exact = oracle.kd(s[None], t[None], [label], temperature, alpha, reduction="none")
            bounds = kd_bounds(
                s[None], t[None], exact.loss, temperature=temperature, alpha=alpha, scale=np.ones(1),
                divergence=forward_kl(),
            )
            loss = np.array([formulas.kd_loss(ce, kl, alpha)])
            of_loss = float(abs(loss - exact.loss)[0] / bounds.loss[0])
            error = gradient_error(gradient[None], exact.gradient, np.dtype(np.float32))
            of_gradient = float(error[0] / bounds.gradient[0])
            print(f"{dtype.name} alpha {alpha} T {temperature} {name}: loss {of_loss:.3f}, gradient {of_gradient:.3f}")
            worst[dtype.name] = max(worst.get(dtype.name, 0), of_loss, of_gradient)
print("worst", worst)
assert set(worst) == {"float32", "bfloat16"}
assert all(0 < error <= 1 for error in worst.values()), worst
'''


def test_float32_arithmetic_at_full_size(tmp_path):
    print(in_a_process(PROGRAM, tmp_path, PYTHONPATH=str(Path(__file__).parent)))
