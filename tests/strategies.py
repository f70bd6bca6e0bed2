"""The strategies of kdcore.testing with bfloat16 among the dtypes, and the pairs of dtypes that kernels are made for.

Dtypes are best given by the test, one pair at a time.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kdcore.testing import strategies
from kdcore.testing.strategies import (
    SCALES,
    SHAPES,
    SUPPORTS,
    VOCABULARIES,
    Problem,
    alphas,
    narrowed,
    row,
    rule_out,
    seeds,
    shares,
    temperatures,
)

__all__ = [
    "BFLOAT16",
    "DTYPES",
    "DTYPE_PAIRS",
    "FORMULA_DTYPE_PAIRS",
    "SCALES",
    "SHAPES",
    "SUPPORTS",
    "VOCABULARIES",
    "Problem",
    "alphas",
    "logit_pairs",
    "logits_arrays",
    "narrowed",
    "problems",
    "row",
    "rule_out",
    "seeds",
    "shares",
    "temperatures",
]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), np.dtype(np.float64), np.dtype(np.float16), BFLOAT16]
#: Student and teacher dtypes. Each pair costs a compilation, so mixtures are few: narrower teacher, wider teacher.
DTYPE_PAIRS = [(dtype, dtype) for dtype in DTYPES] + [
    (DTYPES[0], BFLOAT16),
    (DTYPES[1], DTYPES[0]),
    (DTYPES[0], DTYPES[1]),
]
#: The divergences of two formulas share a loop, so three pairs are enough for the formulas of each.
FORMULA_DTYPE_PAIRS = [(DTYPES[0], DTYPES[0]), (DTYPES[1], DTYPES[1]), (BFLOAT16, BFLOAT16)]


def logits_arrays(dtypes=tuple(DTYPES)):
    """See :func:`kdcore.testing.strategies.logits_arrays`."""
    return strategies.logits_arrays(dtypes)


def logit_pairs(dtype_pairs=tuple(DTYPE_PAIRS), supports=SUPPORTS, scales=SCALES):
    """See :func:`kdcore.testing.strategies.logit_pairs`."""
    return strategies.logit_pairs(dtype_pairs, supports, scales)


def problems(dtype_pairs=tuple(DTYPE_PAIRS), supports=SUPPORTS, scales=SCALES):
    """See :func:`kdcore.testing.strategies.problems`."""
    return strategies.problems(dtype_pairs, supports, scales)
