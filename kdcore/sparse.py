"""A teacher's answers that do not have every class: the best of each row, or samples of it.

They are what :class:`kdcore.LogitStore` reads, and what ``teacher_logits`` may be instead of an array of logits, see
:func:`kdcore.kd_loss_and_gradient`. Letters: B rows (any leading shape), k entries a row, V classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import integer, positive_number
from kdcore.errors import DTypeError, NonFiniteError, ShapeError

__all__ = ["SPARSE", "SampledRows", "TopKRows"]

#: Elements of logits that a constructor works on at a time, in float64.
_CHUNK = 1 << 22

_Rows = TypeVar("_Rows", bound="_SparseRows")


class _SparseRows:
    """What both kinds of rows share. A subclass says which fields have an entry for each of k, and one for each row."""

    _PER_ENTRY: tuple[str, ...] = ()
    _PER_ROW: tuple[str, ...] = ()

    indices: Any
    vocab_size: int
    temperature: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "vocab_size", integer(self.vocab_size, "vocab_size", least=1))
        object.__setattr__(self, "temperature", positive_number(self.temperature, "temperature"))
        for name in (*self._PER_ENTRY, *self._PER_ROW):
            object.__setattr__(self, name, _as_array(getattr(self, name), name, "iu" if _is_count(name) else "f"))
        shape = tuple(self.indices.shape)
        if not shape or not 1 <= shape[-1] <= self.vocab_size:
            raise ShapeError(
                f"indices must have from 1 to vocab_size={self.vocab_size} entries in the last dimension, got {shape}"
            )
        for names, expected, reason in ((self._PER_ENTRY, shape, "indices"), (self._PER_ROW, shape[:-1], "its rows")):
            for name in names:
                if tuple(getattr(self, name).shape) != expected:
                    raise ShapeError(
                        f"{name} must have shape {expected} like {reason}, got {tuple(getattr(self, name).shape)}"
                    )

    @classmethod
    def of_arrays_that_fit(cls: type[_Rows], **fields: Any) -> _Rows:
        """Rows of fields that are known to be what the constructor demands, which takes longer than to read them."""
        rows = object.__new__(cls)
        rows.__dict__.update(fields)
        return rows

    @property
    def shape(self) -> tuple[int, ...]:
        """The leading shape, [B] say: that of the student's logits without their classes."""
        return tuple(self.indices.shape)[:-1]

    @property
    def k(self) -> int:
        """The entries of a row."""
        return int(tuple(self.indices.shape)[-1])

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError(f"len() of one row: a {type(self).__name__} without a leading dimension")
        return self.shape[0]

    def __getitem__(self: _Rows, rows: Any) -> _Rows:
        """Some of the rows, by what indexes the leading dimensions of an array."""
        if not self.shape:
            raise IndexError(f"one row cannot be indexed: a {type(self).__name__} without a leading dimension")
        key = rows if isinstance(rows, tuple) else (rows,)
        if any(part is None or part is Ellipsis for part in key) or len(key) > len(self.shape):
            raise IndexError(f"rows are indexed by their {len(self.shape)} leading dimensions, got {rows!r}")
        return self.map(lambda array: array[rows])

    def __iter__(self: _Rows) -> Any:
        return (self[i] for i in range(len(self)))

    def reshape(self: _Rows, *lead: int) -> _Rows:
        """The same rows in another leading shape: [B L] as [B, L], say."""
        return self.map(lambda array: array.reshape((*lead, *tuple(array.shape)[len(self.shape) :])))

    def map(self: _Rows, function: Callable[[Any], Any]) -> _Rows:
        """Rows of ``function(array)`` for each of the arrays: ``rows.map(cupy.asarray)`` are on a device, say."""
        return replace(self, **{name: function(array) for name, array in self.arrays().items()})  # type: ignore[type-var]

    def arrays(self) -> dict[str, Any]:
        """The arrays by name."""
        return {name: getattr(self, name) for name in (*self._PER_ENTRY, *self._PER_ROW)}


def _is_count(name: str) -> bool:
    return name in ("indices", "n_valid")


def _as_array(value: Any, name: str, kinds: str) -> Any:
    """An array of NumPy from what is one, a list or a number; of a device's library as it is."""
    if isinstance(value, list | tuple | int | float | np.generic):
        value = np.asarray(value)
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        raise DTypeError(f"{name} must be an array, got {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.dtype.kind not in kinds and value.dtype.name != "bfloat16":
        what = "integers" if "i" in kinds else "floating-point numbers"
        raise DTypeError(f"{name} must be {what}, got dtype {value.dtype}")
    return value


@dataclass(frozen=True, eq=False)
class TopKRows(_SparseRows):
    """The likeliest classes of each of B rows, and how much of the row is elsewhere.

    With p = softmax(t / T) over all V classes, T the ``temperature`` of the rows. Entries of a row from ``n_valid`` on
    are none: by convention their index is 0 and their log-probability -inf, but they are not read. Arrays are NumPy's,
    or all on a CUDA device. Making one checks shapes and kinds; what is in the rows is checked by the call that reads
    them, as logits are: classes in [0, V) and each once, no NaN, probabilities that add up to no more than 1.02.

    Parameters
    ----------
    indices : int array [..., k]
        The classes, each once a row, k from 1 to V. Usually in order of decreasing probability; any order will do.
    log_probs : float array [..., k]
        log p of these classes: at most 0 but for rounding, -inf allowed.
    tail_logmass : float array [...]
        log of the sum of p over all other classes; -inf where there is nothing, so where every class is stored.
    n_valid : int array [...]
        How many entries of each row count, 1 to k.
    vocab_size : int
        V.
    temperature : float
        What the teacher's logits were divided by. A call at another temperature is refused.

    Raises
    ------
    DTypeError, ShapeError, DomainError

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> logits = np.log([[0.5, 0.1, 0.3, 0.1]])
    >>> rows = kdcore.TopKRows.from_logits(logits, 2)
    >>> rows.indices, np.exp(rows.log_probs).round(6), np.exp(rows.tail_logmass).round(6)
    (array([[0, 2]], dtype=int32), array([[0.5, 0.3]]), array([0.2]))
    >>> result = kdcore.kd_loss_and_gradient(np.zeros((1, 4)), rows, None, temperature=1.0, alpha=0.0)
    >>> result.gradient  # the two classes of the tail are one outcome, in which the student's shares are left alone
    array([[-0.25,  0.15, -0.05,  0.15]])
    """

    #: int32 [..., k]: classes, each once a row, in order of decreasing log-probability.
    indices: NDArray[np.int32]
    #: float32 [..., k]: log p of these classes at ``temperature``; p is the softmax over all classes.
    log_probs: NDArray[np.float32]
    #: float32 [...]: log of the sum of p over all other classes; -inf where there is nothing.
    tail_logmass: NDArray[np.float32]
    #: int32 [...], 1 to k.
    n_valid: NDArray[np.int32]
    #: V.
    vocab_size: int
    #: What the teacher's logits were divided by.
    temperature: float = 1.0

    _PER_ENTRY = ("indices", "log_probs")
    _PER_ROW = ("tail_logmass", "n_valid")

    @classmethod
    def from_logits(cls, teacher_logits: Any, k: int, temperature: float = 1.0) -> TopKRows:
        """The k likeliest classes of rows of logits [..., V] on the host; of ties, those that come first.

        The tail's mass is summed over the tail itself. ``log_probs`` are float64 of float64 logits, else float32.

        Examples
        --------
        >>> import numpy as np, kdcore
        >>> kdcore.TopKRows.from_logits(np.array([1.0, -np.inf, 1.0]), 3, temperature=2.0).n_valid
        array(2, dtype=int32)
        """
        logits, temperature = _logits(teacher_logits), positive_number(temperature, "temperature")
        k = _entries(k, "k", logits)
        dtype = np.float64 if logits.dtype == np.float64 else np.float32

        def top(log_p: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
            order = _best(log_p, k)
            best = np.take_along_axis(log_p, order, axis=1)
            np.put_along_axis(log_p, order, -np.inf, axis=1)
            valid = np.maximum((best > -np.inf).sum(axis=1), 1)
            indices = np.where(np.arange(k) < valid[:, None], order, 0)
            return indices.astype(np.int32), best.astype(dtype), _log_sum(log_p).astype(dtype), valid.astype(np.int32)

        indices, log_probs, tails, valid = _by_chunks(logits, temperature, top)
        return cls(indices, log_probs, tails, valid, logits.shape[-1], temperature)


@dataclass(frozen=True, eq=False)
class SampledRows(_SparseRows):
    """An unbiased estimate of each of B rows: classes with importance weights, 0 for all others.

    The expectation of exp(log_weights), over what might have been drawn, is p = softmax(t / T) at ``temperature``.
    Entries of a row from ``n_valid`` on are none, and not read. Arrays and checks are as for :class:`TopKRows`, but
    that weights need not add up to 1.

    As a teacher, a row's divergence is the sum of w (log w - log q) over its classes, w their weights. Its gradient
    T (M q - w), M the sum of w, has the dense gradient T (q - p) as its expectation, exactly, and so differences of the
    loss between students are unbiased. The loss itself is larger than the dense one by what does not depend on the
    student, the expectation of the sum of w log w less that of p log p, which weights alone cannot tell.

    Parameters
    ----------
    indices : int array [..., k]
        The classes, each once a row.
    log_weights : float array [..., k]
        The logarithms of their weights.
    n_valid : int array [...]
        How many entries of each row count, 1 to k.
    vocab_size : int
        V.
    temperature : float
        What the teacher's logits were divided by.

    References
    ----------
    Anshumann et al. 2025, "Sparse Logit Sampling: Accelerating Knowledge Distillation in LLMs", arXiv:2503.16870.

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> rows = kdcore.SampledRows.from_logits(np.log([[0.5, 0.1, 0.3, 0.1]]), 1000, seed=0)
    >>> weights = np.zeros(4)
    >>> weights[rows.indices[0, : rows.n_valid[0]]] = np.exp(rows.log_weights[0, : rows.n_valid[0]])
    >>> bool(abs(weights - [0.5, 0.1, 0.3, 0.1]).max() < 0.05)
    True
    """

    #: int32 [..., k]: classes, each once a row.
    indices: NDArray[np.int32]
    #: float32 [..., k].
    log_weights: NDArray[np.float32]
    #: int32 [...], 1 to k.
    n_valid: NDArray[np.int32]
    #: V.
    vocab_size: int
    #: What the teacher's logits were divided by.
    temperature: float = 1.0

    _PER_ENTRY = ("indices", "log_weights")
    _PER_ROW = ("n_valid",)

    @classmethod
    def from_logits(
        cls, teacher_logits: Any, draws: int, temperature: float = 1.0, *, head_k: int = 0, seed: int | None = None
    ) -> SampledRows:
        """The ``head_k`` likeliest classes with their p, and ``draws`` from all others, of logits [..., V] on the host.

        Draws are with replacement, from p over the classes outside the head; a class that is drawn n times has the
        weight n / draws times the mass of all these. Rows have k = head_k + draws entries, or V if that is less.

        Examples
        --------
        >>> import numpy as np, kdcore
        >>> rows = kdcore.SampledRows.from_logits(np.zeros((5, 100)), 3, head_k=1, seed=0)
        >>> rows.k, np.exp(rows.log_weights).sum(axis=1).round(6)
        (4, array([1., 1., 1., 1., 1.]))
        """
        logits, temperature = _logits(teacher_logits), positive_number(temperature, "temperature")
        draws, head_k = integer(draws, "draws", least=1), integer(head_k, "head_k", least=0)
        classes = logits.shape[-1]
        if head_k:
            _entries(head_k, "head_k", logits)
        k = min(head_k + draws, classes)
        dtype = np.float64 if logits.dtype == np.float64 else np.float32
        generator = np.random.default_rng(seed)

        def sample(log_p: NDArray[np.float64]) -> tuple[NDArray[Any], ...]:
            indices = np.zeros((len(log_p), k), np.int32)
            log_weights = np.full((len(log_p), k), -np.inf)
            valid = np.zeros(len(log_p), np.int32)
            for i, row in enumerate(log_p):
                head = _best(row[None], head_k)[0] if head_k else np.empty(0, np.intp)
                head = head[row[head] > -np.inf]
                best = row[head]
                row[head] = -np.inf
                tail = _log_sum(row[None])[0]
                drawn, counts = np.empty(0, np.intp), np.empty(0, np.intp)
                if tail > -np.inf:
                    support = np.flatnonzero(row > -np.inf)
                    cumulative = np.cumsum(np.exp(row[support] - tail))
                    # Without the last bound, so that no rounding leads beyond it.
                    places = np.searchsorted(cumulative[:-1], generator.random(draws) * cumulative[-1], side="right")
                    drawn, counts = np.unique(support[places], return_counts=True)
                n = valid[i] = head.size + drawn.size
                indices[i, :n] = np.concatenate([head, drawn])
                log_weights[i, :n] = np.concatenate([best, np.log(counts / draws) + tail])
            return indices, log_weights.astype(dtype), valid

        indices, log_weights, valid = _by_chunks(logits, temperature, sample)
        return cls(indices, log_weights, valid, classes, temperature)


# --- from logits ---------------------------------------------------------------------------------------------------


#: The teachers without every class, as ``isinstance`` takes them: to make a union of them takes longer than to ask.
SPARSE = (TopKRows, SampledRows)


def _logits(teacher_logits: Any) -> NDArray[Any]:
    if not isinstance(teacher_logits, np.ndarray | list | tuple):
        raise DTypeError(f"teacher_logits must be an array on the host, got {type(teacher_logits).__name__}")
    logits = np.asarray(teacher_logits)
    if logits.dtype.kind != "f" and logits.dtype.name != "bfloat16":
        raise DTypeError(f"teacher_logits must be floating-point numbers, got dtype {logits.dtype}")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"teacher_logits must have at least one class in its last dimension, got shape {logits.shape}")
    return logits


def _entries(value: Any, name: str, logits: NDArray[Any]) -> int:
    entries = integer(value, name, least=1)
    if entries > logits.shape[-1]:
        raise ShapeError(f"{name} must be at most the {logits.shape[-1]} classes of teacher_logits, got {entries}")
    return entries


def _by_chunks(
    logits: NDArray[Any], temperature: float, work: Callable[[NDArray[np.float64]], tuple[NDArray[Any], ...]]
) -> list[NDArray[Any]]:
    """What ``work(log p [rows, V])`` makes of all rows, in their leading shape."""
    lead, classes = logits.shape[:-1], logits.shape[-1]
    rows = logits.reshape(-1, classes)
    step = max(1, _CHUNK // classes)
    parts = [work(_log_softmax(rows[lo : lo + step], temperature, lo)) for lo in range(0, max(len(rows), 1), step)]
    columns = (np.concatenate(column) for column in zip(*parts, strict=True))
    return [column.reshape((*lead, *column.shape[1:])) for column in columns]


def _log_softmax(rows: NDArray[Any], temperature: float, first: int) -> NDArray[np.float64]:
    x = rows.astype(np.float64)
    bad = np.isnan(x) | (x == np.inf)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        raise NonFiniteError(
            f"row {first + row} of teacher_logits is {x[row, column]} at class {column}: logits must be finite or -inf"
        )
    top = x.max(axis=1, keepdims=True, initial=-np.inf)
    if not (top > -np.inf).all():
        row = int((top[:, 0] == -np.inf).argmax())
        raise NonFiniteError(
            f"row {first + row} of teacher_logits is -inf in every class: a row needs at least one finite logit"
        )
    # Shifted before it is divided, since the difference is exact or nearly so; by quarters, so that it cannot overflow.
    x *= 0.25
    x -= 0.25 * top
    x /= 0.25 * temperature
    x -= np.log(np.exp(x).sum(axis=1, keepdims=True))
    return x


def _log_sum(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """log of the row sums of exp(x), relative to the maximum of each."""
    top = x.max(axis=1)
    origin = np.where(top > -np.inf, top, 0.0)
    with np.errstate(divide="ignore"):
        total: NDArray[np.float64] = np.log(np.exp(x - origin[:, None]).sum(axis=1)) + origin
    return total


def _best(x: NDArray[np.float64], k: int) -> NDArray[np.intp]:
    """The places of the k largest of each row in decreasing order; of ties, those that come first."""
    rows, classes = x.shape
    if k == classes:
        return np.argsort(-x, axis=1, kind="stable")
    least = np.partition(x, classes - k, axis=1)[:, classes - k, None]
    above, ties = x > least, x == least
    needed = k - above.sum(axis=1, keepdims=True)
    chosen = above | (ties & (np.cumsum(ties, axis=1) <= needed))
    places = np.nonzero(chosen)[1].reshape(rows, k)
    order = np.argsort(-np.take_along_axis(x, places, axis=1), axis=1, kind="stable")
    return np.take_along_axis(places, order, axis=1)
