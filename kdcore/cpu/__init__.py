"""The CPU engine. :mod:`kdcore.arguments` has checked its NumPy arrays; nothing is validated or copied here.

The functions below have twins of the same names and signatures in :mod:`kdcore.cuda`, but for the last parameter:
here ``threads``, there ``stream``. Row functions for reuse are in :mod:`kdcore.cpu.rows`.
"""

from kdcore.cpu.launch import (
    finish_state_rows,
    kd_rows,
    linear,
    log_softmax_rows,
    logsumexp_rows,
    merge_state_rows,
    multiply_rows,
    reduce_rows,
    scale_rows,
    slice_gradient_rows,
    softmax_rows,
    sparse_kd_rows,
    state_rows,
    weight_sum,
)
from kdcore.cpu.variants import dkd_rows, mixture_rows, standardized_rows

__all__ = [
    "dkd_rows",
    "finish_state_rows",
    "kd_rows",
    "linear",
    "log_softmax_rows",
    "logsumexp_rows",
    "merge_state_rows",
    "mixture_rows",
    "multiply_rows",
    "reduce_rows",
    "scale_rows",
    "slice_gradient_rows",
    "softmax_rows",
    "sparse_kd_rows",
    "standardized_rows",
    "state_rows",
    "weight_sum",
]
