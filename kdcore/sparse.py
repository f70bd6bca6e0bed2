"""A teacher's answers that do not have every class: the best of each row, or samples of it.

They are what :class:`kdcore.LogitStore` reads and what ``teacher_logits`` may be instead of an array of logits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["SampledRows", "TopKRows"]


@dataclass(frozen=True, eq=False)
class TopKRows:
    """The likeliest classes of each of B rows, and how much of the row is elsewhere.

    Entries of a row from ``n_valid`` on are no classes: their index is 0, their log-probability -inf.
    """

    #: int32 [B, k]: classes, each once a row, in order of decreasing log-probability.
    indices: NDArray[np.int32]
    #: float32 [B, k]: log p of these classes at ``temperature``; p is the softmax over all classes.
    log_probs: NDArray[np.float32]
    #: float32 [B]: log of the sum of p over all other classes; -inf where there is nothing.
    tail_logmass: NDArray[np.float32]
    #: int32 [B], 1 to k.
    n_valid: NDArray[np.int32]
    #: V.
    vocab_size: int
    #: What the teacher's logits were divided by.
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class SampledRows:
    """An unbiased estimate of each of B rows: classes with importance weights, 0 for all others.

    The expectation of exp(log_weights), over what might have been drawn, is p at ``temperature``. Entries of a row from
    ``n_valid`` on are none: their index is 0, their log-weight -inf.
    """

    #: int32 [B, k]: classes, each once a row.
    indices: NDArray[np.int32]
    #: float32 [B, k].
    log_weights: NDArray[np.float32]
    #: int32 [B], 1 to k.
    n_valid: NDArray[np.int32]
    #: V.
    vocab_size: int
    #: What the teacher's logits were divided by.
    temperature: float = 1.0
