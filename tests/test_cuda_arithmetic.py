"""The arithmetic of the CUDA kernels in float32 at full size, typed and compiled by Numba for the host.

The same functions of octets that the kernels are made of (:mod:`kdcore.cuda.distillation`), quick and careful, and
those of divergences by two formulas, under ``njit`` instead of ``cuda.jit``, with as many sums as a block has threads.
The exponential is off by what the hardware's may be, with a sign that depends on its bits, so that nothing rests on a
better one.
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
from kdcore.divergences import NAMES, as_divergence
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


@njit
def scatter(x):
    """A number in [-1, 1] that depends on the bits of x."""
    bits = np.float32(x).view(np.uint32) * np.uint32(2654435761) >> np.uint32(16)
    return np.float64(bits & np.uint32(0xFFFF)) / 32768.0 - 1.0


@njit
def log(x):
    """log x, off by up to 2**-22 log 2 between 1/2 and 2, by as much of itself elsewhere."""
    exact = np.log(np.float64(x))
    wrong = 2.0**-22 * scatter(x) * (np.log(2.0) if 0.5 < x < 2.0 else exact)
    return type(x)(exact + wrong) if x > 0 else type(x)(exact)


@njit
def reciprocal(x):
    return type(x)((1.0 + 2.0**-23 * scatter(x)) / np.float64(x))


@njit
def product(x, y):
    return x * y


@njit
def exp(x):
    return type(x)(np.exp(x))


@njit
def exprel(x):
    return type(x)(np.expm1(x)) / x if x != 0 else type(x)(1)


def bind(formula, **others):
    functions = {
        "where": where, "fma": fma, "log": log, "exp": exp, "exprel": exprel, "reciprocal": reciprocal, **others
    }
    return njit(formulas.bound(formula, functions))


@njit
def cast(x, like):
    return type(like)(x)


@njit
def maximum(x, y):
    return y if y > x or x != x else x


@njit
def ex2(x):
    """2**x, off by up to HARDWARE_ERROR; exact at 0."""
    e = np.float32(np.exp2(np.float64(x)))
    wrong = e + e * HARDWARE_ERROR * np.float32(scatter(x))
    return e if x == 0 or e == 0 else np.float32(wrong)


def exp2(x):
    raise TypeError


@overload(exp2)
def _exp2(x):
    return (lambda x: ex2(x)) if x == types.float32 else lambda x: np.exp2(x)


@njit
def lowest(like):
    return np.finfo(np.float32).min


@njit
def is_single(like):
    return True


primitives = ModuleType("kdcore.cuda.primitives")
ours = dict(
    bind=bind, cast=cast, device=njit, exp2=exp2, is_single=is_single, lowest=lowest, maximum=maximum, product=product,
    SCRATCH=(7, 32), SIMULATOR=False,
)
vars(primitives).update(ours)
primitives.__getattr__ = lambda name: njit(lambda: None)  # what moves data, which is not used here
sys.modules["kdcore.cuda.primitives"] = primitives

from kdcore.cuda.distillation import parts_of, questions, rates_of, stages  # noqa: E402
from kdcore.cuda.rows import exp2_small  # noqa: E402
from kdcore.cuda.sweeps import single  # noqa: E402


@njit
def octet(x, a):
    return x[a], x[a + 1], x[a + 2], x[a + 3], x[a + 4], x[a + 5], x[a + 6], x[a + 7]


def sums_by(of_way):
    floors, sums_at, raise_maxima, add_octet, settle = of_way[:5]

    @njit
    def sums_of(s, t, rates, threads):
        """Maxima, z_s, z_h, z_t and w of a row by so many threads, each with every so-many-th octet."""
        like = np.float32(0)
        sums = [sums_at(floors(rates, like), rates) for _ in range(threads)]
        for a in range(0, s.size, 8):
            thread = a // 8 % threads
            x, y = octet(s, a), octet(t, a)
            sums[thread] = add_octet(raise_maxima(sums[thread], x, y, rates), x, y, rates)
        m_s, m_t = sums[0][0], sums[0][6]
        for one in sums:
            m_s, m_t = max(m_s, one[0]), max(m_t, one[6])
        maxima = m_s, m_t
        z_s, z_h, z_t, w = 0.0, 0.0, 0.0, 0.0
        for one in sums:
            a, b, c, d = settle(one, maxima, rates, like)
            z_s, z_h, z_t, w = z_s + a, z_h + b, z_t + c, w + d
        return maxima, z_s, z_h, z_t, w

    return sums_of


def kernel(parts, careful):
    """Forward KL."""
    of_way = stages(parts, careful)
    sums_of, unit, references_of, offsets_of = sums_by(of_way), of_way.unit, of_way.references, of_way.offsets
    spend, spend_one, no_good = of_way.spend, of_way.spend_one, questions(parts).no_good

    @njit
    def run(s, t, label, temperature, alpha, rates, threads, c, gradient):
        """The divergence of a row, z_h, the student's maximum, and whether the sums are no good."""
        maxima, z_s, z_h, z_t, w = sums_of(s, t, rates, threads)
        bad = no_good(maxima, z_s, z_h, z_t, w, rates)
        w *= unit(rates[4])
        soft = (1.0 - alpha) * temperature
        x_s, x_h, x_t = offsets_of(maxima, rates)
        of_s, of_h, of_t = exp2_small(x_s), exp2_small(x_h), exp2_small(x_t)
        factors = np.float32(alpha / z_h * of_h), np.float32(soft / z_s * of_s), np.float32(soft / z_t * of_t)
        softmaxes = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        references = references_of(maxima, rates)
        for a in range(0, s.size, 8):
            g = spend(octet(s, a), octet(t, a), references, rates, factors, softmaxes)
            for k in range(8):
                gradient[a + k] = g[k]
        above_one = np.float32(z_h / of_h)
        gradient[label] = spend_one(s[label], t[label], above_one, references, rates, factors, softmaxes)
        return kl_from_sums(w, z_t, z_s, temperature), z_h, maxima[0], bad

    return run


def kernel_by_two_formulas(parts, divergence):
    of_way = stages(
        parts, True, formulas.converted(divergence.term, single), formulas.converted(divergence.slope, single)
    )
    sums_of, references_of, weigh = sums_by(of_way), of_way.references, of_way.weigh
    spend, spend_one = of_way.spend, of_way.spend_one

    @njit
    def run(s, t, label, temperature, alpha, rates, threads, c, gradient):
        """As for forward KL; no good is a divergence that is not finite."""
        zero = np.float32(0)
        maxima, z_s, z_h, z_t, _ = sums_of(s, t, rates, threads)
        to_log = np.float32(1.0 / formulas.HEADROOM / temperature)
        softmaxes = np.float32(1.0 / z_s), np.float32(1.0 / z_t), to_log, to_log, np.float32(np.log(z_t / z_s)), c
        references = references_of(maxima, rates)
        sums = [(zero, zero, zero, zero) for _ in range(threads)]
        for a in range(0, s.size, 8):
            thread = a // 8 % threads
            x, y = octet(s, a), octet(t, a)
            sums[thread] = weigh(sums[thread], x, y, a, a + 4, s.size, True, references, rates, softmaxes)
        value, mean = 0.0, 0.0
        for one in sums:
            value += np.float64(one[0]) + np.float64(one[1])
            mean += np.float64(one[2]) + np.float64(one[3])
        soft = (1.0 - alpha) * temperature
        factors = np.float32(alpha / z_h), np.float32(soft), np.float32(soft * mean)
        for a in range(0, s.size, 8):
            g = spend(octet(s, a), octet(t, a), references, rates, factors, softmaxes)
            for k in range(8):
                gradient[a + k] = g[k]
        gradient[label] = spend_one(s[label], t[label], np.float32(z_h), references, rates, factors, softmaxes)
        return value, z_h, maxima[0], not np.isfinite(value)

    return run


kl_from_sums = njit(formulas.forward_kl_from_sums)


def patterns(V, rng, temperature):
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
    # Half of a sum lies in classes alike, so that what an exponent's rounding is off by is the same of all of them.
    alike = np.full((2, V), -np.log(V) * temperature - 1e-3)
    alike[0, 7] = alike[1, 9] = 0.0123
    yield "all alike but one", alike[0], alike[1]
    yield "alike, and the teacher flat", alike[0], 0.1 * normal[1]
    yield "all of it high up", 7777.7 + normal[0], -9999.9 + normal[1]


V, label = 262_144, 1000
rng = np.random.default_rng(0)
worst = {}
OBJECTIVES = [(0.3, 1.0), (0.3, 2.0), (0.3, 3.0), (0.0, 20.0)]  # alpha, temperature
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
CASES = [("forward_kl", F32, False, case) for case in OBJECTIVES]
CASES += [("forward_kl", F32, True, OBJECTIVES[2]), ("forward_kl", BF16, False, OBJECTIVES[1])]
CASES += [(name, F32, True, (0.0, 2.0)) for name in NAMES[1:]]
#: Of the patterns, those where errors are largest by two formulas; the oracle takes a second for each.
BY_TWO_FORMULAS = ("normal", "half of it far below", "rising", "alike, and the teacher flat")
for divergence, dtype, careful, (alpha, temperature) in CASES:
    name, divergence = divergence, as_divergence(divergence)
    parts = parts_of(alpha, temperature)
    run = kernel(parts, careful) if name == "forward_kl" else kernel_by_two_formulas(parts, divergence)
    rates = rates_of(temperature, temperature, False)
    for pattern, s, t in patterns(V, rng, temperature):
        if name != "forward_kl" and pattern not in BY_TWO_FORMULAS:
            continue
        s, t = (np.ascontiguousarray(x.astype(dtype).astype(np.float32)) for x in (s, t))
        gradient = np.empty(V, np.float32)
        c = np.float32(divergence.parameter)
        threads = 1024 if name == "forward_kl" else 256
        kl, z_h, m, no_good = run(s, t, label, temperature, alpha, rates, threads, c, gradient)
        assert not no_good, (name, pattern)
        kl *= temperature**2
        ce = formulas.cross_entropy(float(np.float64(s[label]) - np.float64(m)) * formulas.HEADROOM, z_h)
        exact = oracle.kd(s[None], t[None], [label], temperature, alpha, divergence=name, reduction="none")
        bounds = kd_bounds(
            s[None], t[None], exact.loss, temperature=temperature, alpha=alpha, scale=np.ones(1),
            divergence=divergence,
        )
        loss = np.array([formulas.kd_loss(ce, kl, alpha)])
        of_loss = float(abs(loss - exact.loss)[0] / bounds.loss[0])
        error = gradient_error(gradient[None], exact.gradient, np.dtype(np.float32))
        of_gradient = float(error[0] / bounds.gradient[0])
        way = "careful" if careful else "quick"
        title = f"{name} {dtype.name} {way} alpha {alpha} T {temperature} {pattern}"
        print(f"{title}: loss {of_loss:.3f}, gradient {of_gradient:.3f}")
        worst[name, dtype.name, way] = max(worst.get((name, dtype.name, way), 0), of_loss, of_gradient)
print("worst", worst)
assert len(worst) == 3 + len(NAMES) - 1
assert all(0 < error <= 1 for error in worst.values()), worst
'''


def test_float32_arithmetic_at_full_size(tmp_path):
    print(in_a_process(PROGRAM, tmp_path, PYTHONPATH=str(Path(__file__).parent)))
