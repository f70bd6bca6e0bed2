"""The scalars of a KD objective, as an operation hands them to an engine."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from kdcore.divergences import Divergence

__all__ = ["BUCKET", "RENORMALIZE", "TAILS", "UNIFORM", "ZERO", "Objective", "needs_float64"]

#: Policies for the tail of a teacher without every class (see :mod:`kdcore.formulas`), and their numbers in kernels.
TAILS = ("bucket", "renormalize", "zero", "uniform")
BUCKET, RENORMALIZE, ZERO, UNIFORM = range(4)


class Objective(NamedTuple):
    """alpha CE(softmax(s), y) + (1 - alpha) kd_scale D(softmax(t / teacher_temperature), softmax(s / temperature))."""

    divergence: Divergence
    temperature: float
    teacher_temperature: float
    alpha: float
    kd_scale: float
    ignore_index: int


#: Temperatures outside make rates or gradients overflow in float32, larger ratios the terms of forward KL.
_FLOAT32_TEMPERATURES = (1e-20, 1e20)
_FLOAT32_RATIO = 4096.0


@lru_cache(maxsize=64)
def needs_float64(dtypes: tuple[np.dtype, ...], temperature: float, teacher_temperature: float = 1.0) -> bool:
    """Whether rows of these dtypes are worked in float64: where one is float64, and at temperatures far from 1."""
    low, high = _FLOAT32_TEMPERATURES
    return (
        np.float64 in dtypes
        or not (low < temperature < high and low < teacher_temperature < high)
        or teacher_temperature > _FLOAT32_RATIO * temperature
    )
