"""The CUDA engine. :mod:`kdcore.arguments` has checked its device arrays; nothing is validated or copied here.

The functions have twins of the same names and signatures in :mod:`kdcore.cpu`, but for the last parameter: there
``threads``, here ``stream``. Nothing synchronises: work is queued on ``stream``, and bad rows are reported in
``status``. Device functions for reuse are in :mod:`kdcore.cuda.rows`.

Importing this package needs neither a GPU nor numba-cuda; its functions need a GPU, or Numba's simulator
(``NUMBA_ENABLE_CUDASIM=1``). :func:`kdcore.cuda.presence.available` says which is missing.
"""

from functools import cache
from importlib import import_module
from typing import Any

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


#: Those that the module of the others does not have.
_VARIANTS = frozenset({"dkd_rows", "mixture_rows", "standardized_rows"})


@cache
def _launchers(of_variants: bool) -> Any:
    # On first use, because numba.cuda takes a quarter of a second to import and can fail to.
    return import_module("kdcore.cuda.variants") if of_variants else import_module("kdcore.cuda.launch")


def __getattr__(name: str) -> Any:
    if name in __all__:
        # Where the next one finds it at once.
        return globals().setdefault(name, getattr(_launchers(name in _VARIANTS), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
