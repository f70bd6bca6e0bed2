"""A linear student: logits = x W + b."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import integer, number_in
from kdcore.errors import CheckpointError, DomainError, ShapeError
from kdcore.hdf5 import Metadata, write_arrays
from kdcore.sequences import as_rows, as_vectors, pad_rows
from kdcore.students.forward import PendingForward
from kdcore.students.parameters import check_stored, learning_rate_in_float32, read_student, zeros

__all__ = ["LinearStudent"]


class LinearStudent:
    """logits = x W + b with SGD and momentum; the logit gradient is chained to W [F, V] and b [V].

    Rows are either feature vectors or token ids. Features are floats: [B, F] for :meth:`logits_for_batch`, [B, L, F]
    or a list of [L, F] for :meth:`logits_per_position`. Token ids are integers, and x is then the one-hot vector of
    the last token (or of the token at each position), so that ``n_features`` is the number of token ids.

    An update is v = momentum v + g, parameter -= learning_rate v (the convention of PyTorch), with g the gradient
    summed over rows and divided by the denominator. A gradient of zeros (of a batch that is wholly masked, say) is an
    update like any other: the parameters go on by what momentum is left. A forward without rows is none.

    Parameters
    ----------
    n_features : int
        F.
    vocab_size : int
        V.
    learning_rate : float
        Positive, in float32; may be changed between steps.
    momentum : float
        In [0, 1).

    Examples
    --------
    >>> import numpy as np, kdcore
    >>> student = kdcore.LinearStudent(n_features=2, vocab_size=3, learning_rate=1.0, momentum=0.0)
    >>> x = np.array([[1.0, 2.0]])
    >>> logits = student.logits_for_batch(x)
    >>> student.apply_kd_gradient(np.array([[-0.1, 0.1, 0.0]]))
    >>> print(student.logits_for_batch(x).round(3))
    [[ 0.6 -0.6  0. ]]
    """

    def __init__(self, n_features: int, vocab_size: int, *, learning_rate: float = 0.1, momentum: float = 0.9) -> None:
        self._n_features = integer(n_features, "n_features", least=1)
        self._vocab_size = integer(vocab_size, "vocab_size", least=1)
        self.learning_rate = learning_rate
        self._momentum = number_in(momentum, "momentum", 0, 1, high_open=True)
        shapes = {"weight": (self._n_features, self._vocab_size), "bias": (self._vocab_size,)}
        arguments = f"n_features={self._n_features} and vocab_size={self._vocab_size}"
        self.weight, self.bias = (zeros(shape, arguments) for shape in shapes.values())
        self._velocity = {name: zeros(shape, arguments) for name, shape in shapes.items()}
        self._pending: PendingForward[NDArray[Any]] | None = None

    @property
    def vocab_size(self) -> int:
        """V, the width of every logit row."""
        return self._vocab_size

    @property
    def n_features(self) -> int:
        """F, the width of a feature vector or the number of token ids."""
        return self._n_features

    @property
    def learning_rate(self) -> float:
        """The rate of the next update; a :class:`DomainError` unless positive and finite in float32."""
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = learning_rate_in_float32(value)

    def logits_for_batch(self, input_ids: Any) -> NDArray[np.float32]:
        """Logits float32 [B, V] for features [B, F], or for the last token of each of B rows, ragged or not.

        Raises ShapeError (widths; an empty row), DTypeError, NonFiniteError (features) and DomainError (tokens).
        """
        x: NDArray[Any]
        if self._are_features(input_ids):
            x = as_vectors(input_ids, self._n_features)
        else:
            rows = as_rows(input_ids)
            for i, row in enumerate(rows):
                if not row.size:
                    raise ShapeError(f"input_ids[{i}] is empty: a row needs a last token")
            x = self._tokens(np.array([row[-1] for row in rows], np.int64))
        logits = self._forward(x)
        self._pending = PendingForward(logits.shape, np.ones(len(x), bool), x)
        return logits

    def logits_per_position(self, input_ids: Any) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits float32 [B, L, V] and the mask bool [B, L] of positions that exist; logits are 0 where none does.

        For features [B, L, F] or a list of [L, F], or for B rows of tokens. Errors as for :meth:`logits_for_batch`.
        """
        x: NDArray[Any]
        if self._are_features(input_ids):
            rows = [as_vectors(row, self._n_features, f"input_ids[{i}]") for i, row in enumerate(input_ids)]
            _, mask = pad_rows([np.zeros(len(row), np.int64) for row in rows])
            x = np.concatenate([np.empty((0, self._n_features), np.float32), *rows])
        else:
            padded, mask = pad_rows(as_rows(input_ids))
            x = self._tokens(padded[mask])
        logits = np.zeros((*mask.shape, self._vocab_size), np.float32)
        logits[mask] = self._forward(x)
        self._pending = PendingForward(logits.shape, mask, x)
        return logits, mask

    def apply_kd_gradient(self, gradient: NDArray[Any], denominator: float | None = None) -> None:
        """Update by dL/dlogits, floats in the shape of the last forward, over ``denominator`` (by default its rows).

        Raises GradientOrderError, ShapeError, DTypeError, NonFiniteError and DomainError (denominator); the student
        is then as it was.
        """
        pending = PendingForward.expect(self._pending)
        rows = pending.rows(gradient, denominator)
        self._pending = None
        if not len(rows):  # nothing was asked, so there is no step, not even one by momentum
            return
        x = pending.inputs
        if x.ndim == 2:
            weight_gradient = x.T.astype(np.float64) @ rows
        else:
            weight_gradient = np.zeros(self.weight.shape)
            np.add.at(weight_gradient, x, rows)
        self._step("weight", self.weight, weight_gradient)
        self._step("bias", self.bias, rows.sum(axis=0))

    def save_checkpoint(self, path: str | PathLike[str]) -> None:
        """Write parameters, velocities and rates to an HDF5 file, which appears whole or not at all."""
        arrays = {"weight": self.weight, "bias": self.bias}
        arrays |= {f"velocity/{name}": velocity for name, velocity in self._velocity.items()}
        metadata: Metadata = {
            "student": "LinearStudent",
            "n_features": self._n_features,
            "vocab_size": self._vocab_size,
            "learning_rate": self._learning_rate,
            "momentum": self._momentum,
        }
        write_arrays(path, arrays, metadata)

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Self:
        """The student that :meth:`save_checkpoint` wrote; a :class:`CheckpointError` if ``path`` is no such file."""
        arrays, metadata = read_student(path, "LinearStudent")
        try:
            student = cls(
                metadata["n_features"],
                metadata["vocab_size"],
                learning_rate=metadata["learning_rate"],
                momentum=metadata["momentum"],
            )
            stored = {name: arrays[name] for name in ("weight", "bias", "velocity/weight", "velocity/bias")}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is not the checkpoint of a LinearStudent: {error}") from error
        for name, target in (
            ("weight", student.weight),
            ("bias", student.bias),
            ("velocity/weight", student._velocity["weight"]),
            ("velocity/bias", student._velocity["bias"]),
        ):
            check_stored(path, name, stored[name], target.shape)
            target[...] = stored[name]
        return student

    def _forward(self, x: NDArray[Any]) -> NDArray[np.float32]:
        """Logits [N, V] of features [N, F] or token ids [N]."""
        return (x @ self.weight if x.ndim == 2 else self.weight[x]) + self.bias

    def _step(self, name: str, parameter: NDArray[np.float32], gradient: NDArray[np.float64]) -> None:
        velocity = self._velocity[name]
        velocity[...] = self._momentum * velocity + gradient
        parameter -= np.float32(self._learning_rate) * velocity

    @staticmethod
    def _are_features(input_ids: Any) -> bool:
        """Whether there is any float among the rows. What is not even rows is left to :func:`as_rows` to refuse."""
        if isinstance(input_ids, np.ndarray):
            return input_ids.dtype.kind == "f"
        if not isinstance(input_ids, Iterable) or isinstance(input_ids, str | bytes):
            return False
        return any(_kind(row) == "f" for row in input_ids)

    def _tokens(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        outside = (tokens < 0) | (tokens >= self._n_features)
        if outside.any():
            raise DomainError(f"token {tokens[outside][0]} is outside the student's tokens [0, {self._n_features})")
        return tokens


def _kind(row: Any) -> str:
    """The kind of a row's dtype; an empty row has none, and one of several lengths neither."""
    try:
        array = np.asarray(row)
    except ValueError:
        return ""
    return array.dtype.kind if array.size else ""
