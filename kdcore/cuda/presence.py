"""Whether CUDA can run here, and whether an object lives on a device. Imports numba.cuda only to look for a device."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from kdcore.errors import DeviceUnavailableError

__all__ = ["available", "devices", "import_compiler", "owns", "require"]


#: What DLPack calls memory of a CUDA device, and such that host and device share.
_DLPACK_CUDA = (2, 13)


def owns(obj: Any) -> bool:
    """Whether ``obj`` is a device array: Numba's (the simulator's too), or of CUDA's array interface or DLPack."""
    # PyTorch says it at once, where the interface takes its time and refuses a tensor that requires a gradient. Numba
    # marks its own arrays; the simulator's have no interface.
    if isinstance(is_cuda := getattr(obj, "is_cuda", None), bool):
        return is_cuda
    if getattr(obj, "__cuda_ndarray__", False) is True or hasattr(obj, "__cuda_array_interface__"):
        return True
    device = getattr(obj, "__dlpack_device__", None)
    return device is not None and device()[0] in _DLPACK_CUDA


def import_compiler() -> None:
    """Import what a first compilation would, with ``numpy.row_stack`` where NumPy has none, and leave NumPy as it was.

    NumPy 2.5 removed it, and numba-cuda, up to 0.30.4 at least, registers what it is in kernels without asking whether
    it is there: in ``numba.cuda.np.arrayobj``, which the first compilation imports, and which fails there. It is the
    only such name. (Before 0.25 there is another, which NumPy 2.4 removed; but such a numba-cuda cannot be imported
    beside a Numba that knows NumPy 2.4.)
    """
    import numpy as np
    from numba import cuda

    if hasattr(np, "row_stack") or getattr(cuda, "implementation", "Built-in") != "NVIDIA":
        return

    def row_stack(arrays: Any) -> Any:  # not vstack itself, which has a registration of its own
        return np.vstack(arrays)

    names = vars(np)
    names["row_stack"] = row_stack
    try:
        import_module("numba.cuda.np.arrayobj")
    finally:
        names.pop("row_stack", None)  # another thread, doing the same, may have been here


@functools.cache
def available() -> str | None:
    """None if the CUDA engine can run in this process, on a GPU or in Numba's simulator; else why it cannot."""
    try:
        from numba import cuda
        from numba.core import config

        if getattr(cuda, "implementation", "Built-in") != "NVIDIA":
            return "the package numba-cuda is not installed (pip install kdcore[cuda])"
        if not config.ENABLE_CUDASIM:
            import_compiler()
    except (ImportError, AttributeError) as error:  # the latter where numba-cuda asks for what NumPy or Numba removed
        return f"numba.cuda cannot be imported: {error}"
    if config.ENABLE_CUDASIM:
        from numba.cuda.simulator import kernel

        if not hasattr(kernel.FakeCUDAModule, "shfl_xor_sync"):
            return "Numba's CUDA simulator has no warps; the tests of kdcore teach it some, in tests/simulator.py"
        return None
    if cuda.is_available():
        return None
    return f"no CUDA device can be used: {' '.join(str(cuda.cuda_error()).split())}"


def require() -> None:
    """Raise :class:`~kdcore.errors.DeviceUnavailableError`, with the reason, unless the CUDA engine can run."""
    reason = available()
    if reason is not None:
        raise DeviceUnavailableError(reason)


def devices() -> list[str]:
    """The devices that the CUDA engine can use, by number, name and compute capability; none where it cannot run."""
    if available() is not None:
        return []
    from numba import cuda

    found = []
    for number, device in enumerate(cuda.gpus):
        major, minor = device.compute_capability
        found.append(f"{number}: {getattr(device, 'name', 'simulator')} (compute capability {major}.{minor})")
    return found
