"""A linear student: logits = x W + b."""

from __future__ import annotations

from os import PathLike
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import integer, number_in, positive_number
from kdcore.errors import CheckpointError, DomainError, NonFiniteError, ShapeError
from kdcore.hdf5 import Metadata, read_arrays, write_arrays
from kdcore.sequences import as_rows, pad_rows
from kdcore.students.forward import PendingForward

__all__ = ["LinearStudent"]


class LinearStudent:
    """logits = x W + b with SGD and momentum; the logit gradient is chained to W [F, V] and b [V].

    Rows are either feature vectors or token ids. Features are floats: [B, F] for :meth:`logits_for_batch`, [B, L, F]
    or a list of [L, F] for :meth:`logits_per_position`. Token ids are integers, and x is then the one-hot vector of
    the last token (or of the token at each position), so that ``n_features`` is the number of token ids.

    An update is v = momentum v + g, parameter -= learning_rate v (the convention of PyTorch), with g the gradient
    summed over rows and divided by the denominator.

    Parameters
    ----------
    n_features : int
        F.
    vocab_size : int
        V.
    learning_rate : float
        Positive; may be changed between steps.
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
        self.weight = np.zeros((self._n_features, self._vocab_size), np.float32)
        self.bias = np.zeros(self._vocab_size, np.float32)
        self._velocity = {"weight": np.zeros_like(self.weight), "bias": np.zeros_like(self.bias)}
        self._pending: PendingForward[NDArray[Any]] | None = None

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def n_features(self) -> int:
        """F, the width of a feature vector or the number of token ids."""
        return self._n_features

    @property
    def learning_rate(self) -> float:
        return self._learning_rate

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        self._learning_rate = positive_number(value, "learning_rate")

    def logits_for_batch(self, input_ids: Any) -> NDArray[np.float32]:
        x: NDArray[Any]
        if self._are_features(input_ids):
            x = self._features(np.asarray(input_ids), "input_ids", 2)
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
        x: NDArray[Any]
        if self._are_features(input_ids):
            rows = [self._features(np.asarray(row), f"input_ids[{i}]", 2) for i, row in enumerate(input_ids)]
            _, mask = pad_rows([np.zeros(len(row), np.int64) for row in rows])
            x = np.concatenate(rows) if rows else np.empty((0, self._n_features), np.float32)
        else:
            padded, mask = pad_rows(as_rows(input_ids))
            x = self._tokens(padded[mask])
        logits = np.zeros((*mask.shape, self._vocab_size), np.float32)
        logits[mask] = self._forward(x)
        self._pending = PendingForward(logits.shape, mask, x)
        return logits, mask

    def apply_kd_gradient(self, gradient: NDArray[Any], denominator: float | None = None) -> None:
        pending = PendingForward.expect(self._pending)
        rows = pending.rows(gradient, denominator)
        self._pending = None
        if not len(rows):  # no step: momentum alone must not move the parameters
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
        arrays, found = read_arrays(path)
        metadata: dict[str, Any] = dict(found)  # of any type, until the constructor has looked
        if metadata.get("student") != "LinearStudent":
            raise CheckpointError(
                f"{path}: expected the checkpoint of a LinearStudent, found {metadata.get('student')!r}"
            )
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
            array = stored[name]
            if array.shape != target.shape or array.dtype != target.dtype:
                raise CheckpointError(
                    f"{path}: {name} must be {target.dtype} {target.shape}, found {array.dtype} {array.shape}"
                )
            target[...] = array
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
        if isinstance(input_ids, np.ndarray):
            return input_ids.dtype.kind == "f"
        return any(np.asarray(row).dtype.kind == "f" for row in input_ids if np.asarray(row).size)

    def _features(self, x: NDArray[Any], name: str, ndim: int) -> NDArray[np.float32]:
        if x.ndim != ndim or x.shape[-1] != self._n_features:
            raise ShapeError(f"{name} must be feature vectors of width {self._n_features}, got shape {x.shape}")
        if not np.isfinite(x).all():
            raise NonFiniteError(f"{name} must be finite, got {x[~np.isfinite(x)][0]}")
        return x.astype(np.float32)

    def _tokens(self, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        outside = (tokens < 0) | (tokens >= self._n_features)
        if outside.any():
            raise DomainError(f"token {tokens[outside][0]} is outside the student's tokens [0, {self._n_features})")
        return tokens
