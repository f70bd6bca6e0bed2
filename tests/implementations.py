"""Implementations of the KD loss to be judged: right ones that round differently, and right but for one planted bug.

All are (student [B, V], teacher [B, V], labels [B], T, alpha) -> (loss [B], gradient [B, V]), alpha the weight of the
cross-entropy. The bugs are of kinds that libraries have had, each in the few lines that differ from :class:`Right`.
"""

from __future__ import annotations

import numpy as np

__all__ = ["BUGS", "RIGHT", "Right"]

INF = np.inf


def log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def weighted(p, log_ratio):
    """sum of p log_ratio, 0 of a class with p = 0."""
    return np.where(p > 0, p * log_ratio, 0).sum(axis=-1)


class Right:
    """The textbook's formulas, in the dtype of the logits. Subclasses put something else in the place of a part."""

    def __call__(self, s, t, y, T, alpha):
        with np.errstate(all="ignore"):
            loss, gradient = np.zeros(len(s), s.dtype), np.zeros(s.shape, s.dtype)
            if alpha > 0:
                ce, slope = self.hard(s, y)
                loss, gradient = loss + alpha * ce, gradient + alpha * slope
            if alpha < 1:
                d, slope = self.soft(s, t, T)
                loss, gradient = loss + (1 - alpha) * d, gradient + (1 - alpha) * slope
            return loss.astype(s.dtype), gradient.astype(s.dtype)

    def log_softmax(self, x):
        return log_softmax(x)

    def hard(self, s, y):
        log_h, rows = self.log_softmax(s), np.arange(len(s))
        slope = np.exp(log_h)
        slope[rows, y] -= 1
        return -log_h[rows, y], slope

    def soft(self, s, t, T):
        log_p, log_q = self.log_softmax(t / T), self.log_softmax(s / T)
        return T * T * self.divergence(log_p, log_q), T * (np.exp(log_q) - np.exp(log_p))

    def divergence(self, log_p, log_q):
        return weighted(np.exp(log_p), log_p - log_q)


# --- right ----------------------------------------------------------------------------------------------------------


class ShiftedAfterwards(Right):
    """log p = z - logsumexp(z), whose rounding grows with the logits."""

    def log_softmax(self, x):
        m = x.max(axis=-1, keepdims=True)
        return x - (m + np.log(np.exp(x - m).sum(axis=-1, keepdims=True)))


class InFloat64(Right):
    def __call__(self, s, t, y, T, alpha):
        loss, gradient = super().__call__(s.astype(float), t.astype(float), y, T, alpha)
        return loss, gradient.astype(s.dtype)


class InLongDouble(Right):
    def __call__(self, s, t, y, T, alpha):
        return super().__call__(s.astype(np.longdouble), t.astype(np.longdouble), y, np.longdouble(T), alpha)


class FromProbabilities(Right):
    """KL as cross-entropy less entropy: cancels, so that it comes out below zero at agreement."""

    def divergence(self, log_p, log_q):
        return weighted(np.exp(log_p), log_p) - weighted(np.exp(log_p), log_q)


class BaseTwo(Right):
    def log_softmax(self, x):
        x = (x - x.max(axis=-1, keepdims=True)) * x.dtype.type(np.log2(np.e))
        return (x - np.log2(np.exp2(x).sum(axis=-1, keepdims=True))) * x.dtype.type(np.log(2))


class Chunked(Right):
    """Vocabulary in chunks of 100, merged by their maxima; the last chunk may be shorter."""

    def log_softmax(self, x):
        parts = [x[:, i : i + 100] for i in range(0, x.shape[1], 100)]
        m = np.stack([part.max(axis=-1) for part in parts]).max(axis=0)
        total = sum(np.exp(part - m[:, None]).sum(axis=-1) for part in parts)
        return x - m[:, None] - np.log(total)[:, None]


class RowByRow(Right):
    def __call__(self, s, t, y, T, alpha):
        rows = [
            super(RowByRow, self).__call__(s[i : i + 1], t[i : i + 1], y[i : i + 1], T, alpha) for i in range(len(s))
        ]
        return np.concatenate([row[0] for row in rows]), np.concatenate([row[1] for row in rows])


class FusedTerms(Right):
    """KL = log Z_s - log Z_t + sum of p (t - s) / T, as the fused kernels have it."""

    def soft(self, s, t, T):
        shared = np.isneginf(s) & np.isneginf(t)
        s_, t_ = np.where(shared, 0, s), np.where(shared, 0, t)
        p, q = np.exp(log_softmax(t / T)), np.exp(log_softmax(s / T))
        m = s.max(axis=-1, keepdims=True)
        u = t.max(axis=-1, keepdims=True)
        z_s = np.log(np.exp((s - m) / T).sum(axis=-1))
        z_t = np.log(np.exp((t - u) / T).sum(axis=-1))
        return T * T * (z_s - z_t + weighted(p, ((t_ - u) - (s_ - m)) / T)), T * (q - p)


class Unshifted(Right):
    """KL from log-sum-exps and logits as they are: constants cancel only at the end."""

    def soft(self, s, t, T):
        def lse(x):
            m = x.max(axis=-1, keepdims=True)
            return m[:, 0] + np.log(np.exp(x - m).sum(axis=-1))

        z_s, z_t = lse(s / T), lse(t / T)
        p, q = np.exp(log_softmax(t / T)), np.exp(log_softmax(s / T))
        gap = np.where(p > 0, t / T - s / T, 0)
        return T * T * (weighted(p, gap) - z_t + z_s), T * (q - p)


class InLanes(Right):
    """Sums one after another, in 16 lanes, as vector units add."""

    @staticmethod
    def total(x):
        padded = np.zeros((*x.shape[:-1], -(-x.shape[-1] // 16) * 16), x.dtype)
        padded[..., : x.shape[-1]] = x
        return np.cumsum(padded.reshape(*x.shape[:-1], -1, 16), axis=-2, dtype=x.dtype)[..., -1, :].sum(axis=-1)

    def log_softmax(self, x):
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(self.total(np.exp(x)))[..., None]

    def divergence(self, log_p, log_q):
        p = np.exp(log_p)
        return self.total(np.where(p > 0, p * (log_p - log_q), 0))


class OneAfterAnother(Right):
    """Sums in one lane: equal numbers are all rounded the same way, so that the error grows with V, not its root."""

    def log_softmax(self, x):
        x = x - x.max(axis=-1, keepdims=True)
        return x - np.log(np.cumsum(np.exp(x), axis=-1, dtype=x.dtype)[:, -1:])

    def divergence(self, log_p, log_q):
        p = np.exp(log_p)
        return np.cumsum(np.where(p > 0, p * (log_p - log_q), 0), axis=-1, dtype=p.dtype)[:, -1]


class ByLogAddExp(Right):
    """A log-sum-exp that is rounded after each class, with the size of the logits themselves."""

    def log_softmax(self, x):
        return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


RIGHT = {
    make.__name__: make()
    for make in (
        Right, ShiftedAfterwards, InFloat64, InLongDouble, FromProbabilities, BaseTwo, Chunked, RowByRow, FusedTerms,
        InLanes, OneAfterAnother, ByLogAddExp,
        Unshifted,
    )
}  # fmt: skip


# --- with one bug ---------------------------------------------------------------------------------------------------

BUGS = {}


def planted(make):
    BUGS[make.__name__] = make()
    return make


def patched(name, function):
    """A bug that is what :class:`Right` does with something done before or after."""
    BUGS[name] = function


right = Right()


def outcome(name, loss=lambda x, *_: x, gradient=lambda x, *_: x):
    """A bug in what is returned."""

    def call(s, t, y, T, alpha):
        with np.errstate(all="ignore"):
            found = right(s, t, y, T, alpha)
            arguments = (s, t, y, T, alpha)
            return loss(found[0], *arguments), gradient(found[1], *arguments)

    patched(name, call)


# direction, temperature, alpha

patched("student and teacher swapped", lambda s, t, y, T, a: right(t, s, y, T, a))


@planted
class ReverseLossForwardGradient(Right):
    def divergence(self, log_p, log_q):
        return weighted(np.exp(log_q), log_q - log_p)


@planted
class ReverseKL(Right):
    def soft(self, s, t, T):
        log_p, log_q = log_softmax(t / T), log_softmax(s / T)
        q, r = np.exp(log_q), log_q - log_p
        d = weighted(q, r)
        return T * T * d, T * np.where(q > 0, q * (r - d[:, None]), 0)


@planted
class NoTSquared(Right):
    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        return d / (T * T), slope / (T * T)


@planted
class NoTSquaredInTheLoss(Right):
    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        return d / (T * T), slope


@planted
class TSquaredInTheGradient(Right):
    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        return d, slope * T


@planted
class TimesT(Right):
    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        return d / T, slope / T


@planted
class TeacherNotTempered(Right):
    def soft(self, s, t, T):
        log_p, log_q = log_softmax(t), log_softmax(s / T)
        return T * T * self.divergence(log_p, log_q), T * (np.exp(log_q) - np.exp(log_p))


@planted
class StudentNotTempered(Right):
    def soft(self, s, t, T):
        log_p, log_q = log_softmax(t / T), log_softmax(s)
        return T * T * self.divergence(log_p, log_q), T * T * (np.exp(log_q) - np.exp(log_p))


patched("hard loss at T too", lambda s, t, y, T, a: _hard_at_t(s, t, y, T, a))


def _hard_at_t(s, t, y, T, a):
    soft, hard = right(s, t, y, T, 0.0), right(s / T, t, y, T, 1.0)
    return a * hard[0] + (1 - a) * soft[0], a * hard[1] / T + (1 - a) * soft[1]


patched("alpha weighs the divergence", lambda s, t, y, T, a: right(s, t, y, T, 1 - a))
patched("alpha in float32", lambda s, t, y, T, a: right(s, t, y, T, float(np.float32(a))))
patched("alpha in percent", lambda s, t, y, T, a: right(s, t, y, T, int(100 * a) / 100))
patched("T as an integer", lambda s, t, y, T, a: right(s, t, y, max(int(T), 1), a))
patched("T in float32", lambda s, t, y, T, a: right(s, t, y, float(np.float32(T)), a))
patched("T at least 0.1", lambda s, t, y, T, a: right(s, t, y, max(T, 0.1), a))
patched("T at most 10", lambda s, t, y, T, a: right(s, t, y, min(T, 10.0), a))
outcome("gradient not scaled by alpha", gradient=lambda g, s, t, y, T, a: right(s, t, y, T, 0.0)[1] if a < 1 else g)
outcome(
    "soft gradient not scaled",
    gradient=lambda g, s, t, y, T, a: a * right(s, t, y, T, 1.0)[1] + right(s, t, y, T, 0.0)[1],
)
outcome("loss without alpha", loss=lambda x, s, t, y, T, a: right(s, t, y, T, 1.0)[0] + right(s, t, y, T, 0.0)[0])
patched("alpha one falls back to a half", lambda s, t, y, T, a: right(s, t, y, T, 0.5 if a == 1 else a))
patched("alpha zero is taken as not given", lambda s, t, y, T, a: right(s, t, y, T, a or 0.5))

# reductions

outcome("gradient of the mean", gradient=lambda g, s, *_: g / len(s))
outcome("loss of the mean", loss=lambda x, *_: np.full_like(x, x.mean()))
outcome("mean over classes", loss=lambda x, s, *_: x / s.shape[1], gradient=lambda g, s, *_: g / s.shape[1])
outcome("only the first row", gradient=lambda g, s, *_: g * (np.arange(len(s)) == 0)[:, None])
outcome("only the last row", gradient=lambda g, s, *_: g * (np.arange(len(s)) == len(s) - 1)[:, None])
outcome("rows after the 1024th are zero", loss=lambda x, s, *_: x * (np.arange(len(s)) < 1024))
outcome(
    "rows of the last block of 32",
    gradient=lambda g, s, *_: g * (np.arange(len(s)) < max(len(s) // 32 * 32, 1))[:, None],
)


@planted
class WrongAxis(Right):
    def log_softmax(self, x):
        return log_softmax(x.T).T


@planted
class BatchMaximum(Right):
    """The maximum of the whole batch: rows far below it underflow."""

    def log_softmax(self, x):
        x = x - x.max()
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


outcome("sum of squares of a batch", gradient=lambda g, *_: g / max(1.0, float(np.linalg.norm(g))))

# clamps


def clamped(eps):
    class Clamped(Right):
        def log_softmax(self, x):
            return np.log(np.maximum(np.exp(log_softmax(x)), x.dtype.type(eps)))

    return Clamped()


for eps in (1e-7, 1e-9, 1e-10, 1e-12, 1e-30, 1e-300):
    BUGS[f"probabilities of at least {eps}"] = clamped(eps)


def added(eps):
    class Added(Right):
        def log_softmax(self, x):
            return np.log(np.exp(log_softmax(x)) + x.dtype.type(eps))

    return Added()


for eps in (1e-8, 1e-10, 1e-12, 1e-30):
    BUGS[f"log(p + {eps})"] = added(eps)


@planted
class LogOfTheRatioPlusEps(Right):
    def divergence(self, log_p, log_q):
        p, q = np.exp(log_p), np.exp(log_q)
        return (p * np.log((p + 1e-10) / (q + 1e-10))).sum(axis=-1)


for limit in (30.0, 50.0, 100.0, 1000.0):
    patched(
        f"logits within {limit}", lambda s, t, y, T, a, c=limit: right(np.clip(s, -c, c), np.clip(t, -c, c), y, T, a)
    )
for limit in (20.0, 88.0, 100.0, 700.0):
    outcome(f"loss of at most {limit}", loss=lambda x, *_, c=limit: np.minimum(x, c))
for limit in (1.0, 10.0, 100.0, 1000.0):
    outcome(f"gradient within {limit}", gradient=lambda g, *_, c=limit: np.clip(g, -c, c))
outcome(
    "gradient of norm at most 1", gradient=lambda g, *_: g / np.maximum(1, np.linalg.norm(g, axis=-1, keepdims=True))
)
outcome("loss not below zero, or NaN", loss=lambda x, *_: np.where(x > 1e-6, x, 0))
outcome("infinite losses become large", loss=lambda x, *_: np.nan_to_num(x))
outcome("infinite losses become zero", loss=lambda x, *_: np.where(np.isfinite(x), x, 0))
outcome("infinite losses become a hundred", loss=lambda x, *_: np.where(np.isfinite(x), x, 100.0))

# -inf


@planted
class NaNOfSharedClasses(Right):
    def divergence(self, log_p, log_q):
        return (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)


@planted
class UniformWhereNotFinite(Right):
    def log_softmax(self, x):
        found = log_softmax(x)
        return np.where(np.isfinite(found).all(axis=-1, keepdims=True), found, -np.log(x.shape[-1]))


patched(
    "-inf becomes -1e9, then 0",
    lambda s, t, y, T, a: right(np.nan_to_num(s, neginf=0.0), np.nan_to_num(t, neginf=0.0), y, T, a),
)
patched(
    "-inf becomes -100",
    lambda s, t, y, T, a: right(np.nan_to_num(s, neginf=-100.0), np.nan_to_num(t, neginf=-100.0), y, T, a),
)
patched(
    "-inf becomes -1e4",
    lambda s, t, y, T, a: right(np.nan_to_num(s, neginf=-1e4), np.nan_to_num(t, neginf=-1e4), y, T, a),
)


@planted
class SupportViolationIgnored(Right):
    """Columns that the student rules out are left out, instead of making the loss infinite."""

    def divergence(self, log_p, log_q):
        return np.where(np.isfinite(log_q), weighted_terms(np.exp(log_p), log_p - log_q), 0).sum(axis=-1)


def weighted_terms(p, log_ratio):
    return np.where(p > 0, p * log_ratio, 0)


outcome(
    "NaN gradient of an infinite loss",
    gradient=lambda g, s, t, y, T, a: np.where(np.isfinite(right(s, t, y, T, a)[0])[:, None], g, np.nan),
)
outcome(
    "zero gradient of an infinite loss",
    gradient=lambda g, s, t, y, T, a: np.where(np.isfinite(right(s, t, y, T, a)[0])[:, None], g, 0),
)


def _zero_times_infinity(s, t, y, T, a):
    hard, soft = right(s, t, y, T, 1.0), right(s, t, y, T, 0.0)
    with np.errstate(all="ignore"):
        return a * hard[0] + (1 - a) * soft[0], a * hard[1] + (1 - a) * soft[1]


patched("zero times infinity", _zero_times_infinity)

# overflow, precision


@planted
class NoMaximum(Right):
    def log_softmax(self, x):
        return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


@planted
class LogOfSoftmax(Right):
    def log_softmax(self, x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return np.log(e / e.sum(axis=-1, keepdims=True))


patched("teacher in float16", lambda s, t, y, T, a: right(s, t.astype(np.float16).astype(s.dtype), y, T, a))
patched(
    "float32 inside",
    lambda s, t, y, T, a: [x.astype(s.dtype) for x in right(s.astype(np.float32), t.astype(np.float32), y, T, a)],
)
outcome("gradient in float16", gradient=lambda g, *_: g.astype(np.float16).astype(g.dtype))
outcome(
    "gradient in bfloat16",
    gradient=lambda g, *_: (
        ((g.astype(np.float32).view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32).astype(g.dtype)
    ),
)
outcome(
    "float32 gradients in float16",
    gradient=lambda g, *_: g.astype(np.float16).astype(g.dtype) if g.dtype == np.float32 else g,
)
outcome(
    "float32 losses in float16", loss=lambda x, *_: x.astype(np.float16).astype(x.dtype) if x.dtype == np.float32 else x
)
outcome("loss in float32", loss=lambda x, *_: x.astype(np.float32).astype(x.dtype))
outcome("loss of four decimals", loss=lambda x, *_: np.round(x, 4))


@planted
class RunningSum(Right):
    """A sum in the order of the classes, in float32."""

    def log_softmax(self, x):
        x = x - x.max(axis=-1, keepdims=True)
        total = np.cumsum(np.exp(x).astype(np.float32), axis=-1, dtype=np.float32)[..., -1:]
        return x - np.log(total).astype(x.dtype)


for least in (0.01, 1e-6):
    patched(f"T of at least {least}", lambda s, t, y, T, a, least=least: right(s, t, y, max(T, least), a))
outcome("gradients within 5000", gradient=lambda g, *_: np.clip(g, -5000, 5000))
patched(
    "-1e4 where the teacher has -inf",
    lambda s, t, y, T, a: right(
        s, np.where((t == -INF) & (t > -INF).any(axis=-1, keepdims=True), t.dtype.type(-1e4), t), y, T, a
    ),
)

# classes and chunks


def maximum_of_the_last(width):
    class MaximumOfTheLast(Right):
        """Shifted by the maximum of the last chunk, which another may exceed by more than exp can take."""

        def log_softmax(self, x):
            m = x[:, (x.shape[-1] - 1) // width * width :].max(axis=-1, keepdims=True)
            x = x - np.where(np.isfinite(m), m, 0)
            return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))

    return MaximumOfTheLast()


for width in (64, 4096, 65536):
    BUGS[f"maximum of the last chunk of {width}"] = maximum_of_the_last(width)

outcome(
    "float32 gradients off by 1e-4 in large vocabularies",
    gradient=lambda g, s, *_: g * np.float32(1.0001) if s.dtype == np.float32 and s.shape[1] > 30_000 else g,
)

for width in (12, 128, 512):
    outcome(f"{width} classes", gradient=lambda g, *_, width=width: g * (0.5 if g.shape[1] == width else 1))
for rows in (8, 32, 100):
    outcome(f"{rows} rows", gradient=lambda g, *_, rows=rows: g * (0.5 if len(g) == rows else 1))


def tail_dropped(width):
    class TailDropped(Right):
        def log_softmax(self, x):
            whole = x.shape[-1] // width * width
            return log_softmax(np.where(np.arange(x.shape[-1]) < whole, x, -INF)) if whole else log_softmax(x)

        def hard(self, s, y):
            return right.hard(s, y)

    return TailDropped()


for width in (4, 8, 32, 128, 1024, 4096, 65536):
    BUGS[f"classes after the last whole chunk of {width}"] = tail_dropped(width)


def top(k):
    class Top(Right):
        """KL over the teacher's k likeliest classes."""

        def divergence(self, log_p, log_q):
            kept = np.argsort(-log_p, axis=-1, kind="stable")[:, :k]
            p = np.take_along_axis(log_p, kept, -1)
            return weighted(np.exp(p), p - np.take_along_axis(log_q, kept, -1))

    return Top()


for k in (10, 50, 100, 1000):
    BUGS[f"KL over the top {k}"] = top(k)


@planted
class FirstOfTies(Right):
    """The teacher's argmax instead of the teacher where it is tied."""

    def soft(self, s, t, T):
        tied = (t == t.max(axis=-1, keepdims=True)).sum(axis=-1) > 1
        best = np.where(np.arange(t.shape[1]) == t.argmax(axis=-1)[:, None], t.max() + 50, 0)
        return super().soft(s, np.where(tied[:, None], best, t), T)


@planted
class ClassZeroIsPadding(Right):
    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        slope[:, 0] = 0
        return d, slope


patched("labels off by one", lambda s, t, y, T, a: right(s, t, (y + 1) % s.shape[1], T, a))
patched("labels from one", lambda s, t, y, T, a: right(s, t, np.maximum(y - 1, 0), T, a))
patched("labels in 16 bits", lambda s, t, y, T, a: right(s, t, y.astype(np.uint16).astype(int), T, a))
outcome("gradient of the next label", gradient=lambda g, s, t, y, T, a: right(s, t, (y + 1) % s.shape[1], T, a)[1])


@planted
class Smoothed(Right):
    def hard(self, s, y):
        ce, slope = super().hard(s, y)
        log_h = log_softmax(s)
        return 0.9 * ce - 0.1 * log_h.mean(axis=-1), slope * 0.9 + 0.1 * (np.exp(log_h) - 1 / s.shape[1])


@planted
class NoEntropyOfTheTeacher(Right):
    """Cross-entropy with the teacher, called KL."""

    def divergence(self, log_p, log_q):
        return -weighted(np.exp(log_p), log_q)


@planted
class NegatedGradient(Right):
    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        return d, -slope


@planted
class TeachersGradientToo(Right):
    """Of a teacher that is not detached, as where it shares the student's logits."""

    def soft(self, s, t, T):
        d, slope = super().soft(s, t, T)
        log_p, log_q = log_softmax(t / T), log_softmax(s / T)
        p, r = np.exp(log_p), log_p - log_q
        return d, slope + T * np.where(p > 0, p * (r - self.divergence(log_p, log_q)[:, None]), 0)


@planted
class MeanSquares(Right):
    """Squares of logits, the limit of large T, at every T."""

    def soft(self, s, t, T):
        c = np.where(np.isfinite(s - t), s - t, 0)
        c = c - c.mean(axis=-1, keepdims=True)
        return (c * c).sum(axis=-1) / (2 * s.shape[1]), c / s.shape[1]


outcome("absolute value of the loss's tail", loss=lambda x, *_: np.where(x > 15, 15 + np.log1p(x - 15), x))

# what a call does


def _in_place(s, t, y, T, a):
    found = right(s, t, y, T, a)
    s -= s.max(axis=-1, keepdims=True)
    return found


patched("student shifted in place", _in_place)


def _in_place_at_one(s, t, y, T, a):
    found = right(s, t, y, T, a)
    if T == 1:
        t -= t.max(axis=-1, keepdims=True)
    return found


patched("teacher shifted in place at T = 1", _in_place_at_one)


def _labels_in_place(s, t, y, T, a):
    found = right(s, t, y, T, a)
    y[y == 2] = 0
    return found


patched("labels changed in place", _labels_in_place)


def _into_the_student(s, t, y, T, a):
    loss, gradient = right(s, t, y, T, a)
    s[...] = gradient
    return loss, s


patched("gradient into the student's memory", _into_the_student)


class ByShape:
    """A teacher's distribution kept by shape."""

    def __init__(self):
        self.kept = {}

    def __call__(self, s, t, y, T, a):
        return right(s, self.kept.setdefault((t.shape, t.dtype, T), t.copy()), y, T, a)


class ByIdentity:
    """A teacher's array kept by its identity, whatever is written into it."""

    def __init__(self):
        self.key, self.kept = None, None

    def __call__(self, s, t, y, T, a):
        if self.key is not t:
            self.key, self.kept = t, t.copy()
        return right(s, self.kept, y, T, a)


class Scratch:
    """One gradient array for all calls of a shape."""

    def __init__(self):
        self.kept = {}

    def __call__(self, s, t, y, T, a):
        loss, gradient = right(s, t, y, T, a)
        out = self.kept.setdefault((s.shape, s.dtype), np.empty_like(s))
        out[...] = gradient
        return loss, out


class Noisy:
    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, s, t, y, T, a):
        loss, gradient = right(s, t, y, T, a)
        return loss * (1 + 1e-6 * self.rng.normal(size=loss.shape)).astype(s.dtype), gradient


BUGS["teacher cached by shape"] = ByShape()
BUGS["teacher cached by identity"] = ByIdentity()
BUGS["gradient in shared scratch memory"] = Scratch()
BUGS["noise"] = Noisy()

# what a call returns

outcome("scalar loss", loss=lambda x, *_: x.mean())
outcome("loss as a column", loss=lambda x, *_: x[:, None])
outcome("gradient flat", gradient=lambda g, *_: g.ravel())
outcome("gradient turned", gradient=lambda g, *_: g.T.copy())
outcome("integers", gradient=lambda g, *_: np.round(g).astype(int))
outcome("NaN of one class", gradient=lambda g, s, *_: np.where(s.shape[1] == 1, np.nan, g))
patched("nothing", lambda s, t, y, T, a: None)
patched("loss alone", lambda s, t, y, T, a: right(s, t, y, T, a)[0])
patched("raises above T = 50", lambda s, t, y, T, a: right(s, t, y, T, a) if T <= 50 else 1 // 0)


def _square_batches(s, t, y, T, a):
    loss, gradient = right(s, t, y, T, a)
    return loss, gradient.T.copy() if s.shape[0] == s.shape[1] else gradient


patched("square batches turned", _square_batches)


def _masked_loss(s, t, y, T, a):
    keep = y != -100
    loss, gradient = right(s, t, np.where(keep, y, 0), T, a)
    return loss * keep, gradient


patched("masked in the loss, not in the gradient", _masked_loss)


# --- other divergences ----------------------------------------------------------------------------------------------


def ratio_of(log_a, log_b):
    return np.where(np.isneginf(log_a), 0, log_a - log_b)


class Divergence(Right):
    """Any divergence, from D and q phi', with m = share p + (1 - share) q where it has one."""

    def __init__(self, value_and_slope, share=0.5):
        self.value_and_slope, self.share = value_and_slope, share

    def soft(self, s, t, T):
        log_p, log_q = log_softmax(t / T), log_softmax(s / T)
        d, q_slope = self.value_and_slope(log_p, log_q, self.share)
        return T * T * d, T * (q_slope - np.exp(log_q) * q_slope.sum(axis=-1, keepdims=True))


def reverse_kl(log_p, log_q, _):
    q = np.exp(log_q)
    terms = weighted_terms(q, log_q - log_p)
    return terms.sum(axis=-1), terms


def jsd(log_p, log_q, beta):
    p, q = np.exp(log_p), np.exp(log_q)
    log_m = np.log(beta * p + (1 - beta) * q)
    d = beta * weighted(p, log_p - log_m) + (1 - beta) * weighted(q, log_q - log_m)
    return d, (1 - beta) * weighted_terms(q, log_q - log_m)


def skew_forward_kl(log_p, log_q, lam):
    p, q = np.exp(log_p), np.exp(log_q)
    m = lam * p + (1 - lam) * q
    return weighted(p, log_p - np.log(m)), -(1 - lam) * np.where(m > 0, p * q / np.where(m > 0, m, 1), 0)


def skew_reverse_kl(log_p, log_q, lam):
    p, q = np.exp(log_p), np.exp(log_q)
    m = lam * q + (1 - lam) * p
    ratio = np.where(m > 0, q / np.where(m > 0, m, 1), 0)
    return weighted(q, log_q - np.log(m)), weighted_terms(q, log_q - np.log(m) + 1 - lam * ratio)


def tvd(log_p, log_q, _):
    p, q = np.exp(log_p), np.exp(log_q)
    return np.abs(p - q).sum(axis=-1) / 2, q * np.sign(q - p) / 2


def alpha_divergence(log_p, log_q, a):
    power = np.exp(a * log_p + (1 - a) * log_q)
    return (power.sum(axis=-1) - 1) / (a * (a - 1)), -power / a


RIGHT_OF = {
    "forward_kl": Right(),
    "reverse_kl": Divergence(reverse_kl),
    "jsd": Divergence(jsd),
    "skew_forward_kl": Divergence(skew_forward_kl, 0.1),
    "skew_reverse_kl": Divergence(skew_reverse_kl, 0.1),
    "tvd": Divergence(tvd),
    "alpha": Divergence(alpha_divergence),
}


def halved(part):
    def wrong(log_p, log_q, c):
        d, slope = jsd(log_p, log_q, c)
        return (d / 2, slope) if part == "loss" else (d, slope / 2)

    return Divergence(wrong)


#: Bugs of the others: (divergence, implementation).
BUGS_OF = {
    "reverse KL is forward": ("reverse_kl", RIGHT_OF["forward_kl"]),
    "reverse KL's gradient without its mean": (
        "reverse_kl",
        type(
            "Uncentred",
            (Divergence,),
            {
                "soft": lambda self, s, t, T: (
                    T * T * reverse_kl(log_softmax(t / T), log_softmax(s / T), 0)[0],
                    T * reverse_kl(log_softmax(t / T), log_softmax(s / T), 0)[1],
                )
            },
        )(reverse_kl),
    ),
    "JSD in bits": ("jsd", Divergence(lambda p, q, c: tuple(x / np.log(2) for x in jsd(p, q, c)))),
    "JSD's square root": (
        "jsd",
        Divergence(lambda p, q, c: (np.sqrt(np.maximum(jsd(p, q, c)[0], 0)), jsd(p, q, c)[1])),
    ),
    "JSD halved": ("jsd", halved("loss")),
    "JSD's gradient halved": ("jsd", halved("gradient")),
    "JSD with the mean in log space": (
        "jsd",
        Divergence(
            lambda p, q, c: (
                0.5 * weighted(np.exp(p), (p - q) / 2) + 0.5 * weighted(np.exp(q), (q - p) / 2),
                jsd(p, q, c)[1],
            )
        ),
    ),
    "JSD is symmetric KL": (
        "jsd",
        Divergence(
            lambda p, q, c: (0.5 * weighted(np.exp(p), p - q) + 0.5 * weighted(np.exp(q), q - p), jsd(p, q, c)[1])
        ),
    ),
    "skew forward, shares swapped": ("skew_forward_kl", Divergence(skew_forward_kl, 0.9)),
    "skew reverse, shares swapped": ("skew_reverse_kl", Divergence(skew_reverse_kl, 0.9)),
    "skew forward is skew reverse": ("skew_forward_kl", Divergence(skew_reverse_kl, 0.1)),
    "TVD not halved": ("tvd", Divergence(lambda p, q, c: tuple(2 * x for x in tvd(p, q, c)))),
    "TVD is the largest difference": (
        "tvd",
        Divergence(lambda p, q, c: (np.abs(np.exp(p) - np.exp(q)).max(axis=-1), tvd(p, q, c)[1])),
    ),
    "alpha is Bhattacharyya's": (
        "alpha",
        Divergence(lambda p, q, c: (-np.log(np.exp((p + q) / 2).sum(axis=-1)), alpha_divergence(p, q, c)[1])),
    ),
    "alpha without its factor": (
        "alpha",
        Divergence(lambda p, q, c: (1 - np.exp((p + q) / 2).sum(axis=-1), alpha_divergence(p, q, c)[1] / 4)),
    ),
}
