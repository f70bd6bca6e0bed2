"""Other libraries that compute the same, when they are installed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["kd_peers", "softmax_peers", "version_of"]

Peers = tuple[dict[str, Callable[[], Any]], dict[str, str]]


def version_of(package: str) -> str | None:
    """The version of a package that can be imported, else None."""
    try:
        return version(package) if find_spec(package) is not None else None
    except PackageNotFoundError:
        return None


def _torch(threads: int) -> Any:
    torch = import_module("torch")
    torch.set_num_threads(threads)
    return torch


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """A folder that lasts as long as the process."""
    return tempfile.TemporaryDirectory(prefix="kdcore-bench-", ignore_cleanup_errors=True)


def kd_peers(
    student: NDArray[Any],
    teacher: NDArray[Any],
    labels: NDArray[np.int64],
    temperature: float,
    alpha: float,
    *,
    threads: int,
    compiled: bool,
) -> Peers:
    """Calls that return (loss, gradient) of the KD loss, by name with version; and why others are absent.

    alpha is the weight of the cross-entropy. The gradient is new memory at every call, as autograd has it.
    """
    if version_of("torch") is None:
        return {}, {"torch eager": "not installed", "torch.compile": "not installed"}
    torch = _torch(threads)
    functional = torch.nn.functional
    s, t, y = (torch.from_numpy(array) for array in (student, teacher, labels))

    def loss_of(s: Any, t: Any, y: Any) -> Any:
        hard = functional.cross_entropy(s, y)
        log_q, log_p = (functional.log_softmax(x / temperature, dim=-1) for x in (s, t))
        soft = functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
        return alpha * hard + (1 - alpha) * temperature**2 * soft

    def with_gradient(loss_of: Callable[..., Any]) -> Callable[[], Any]:
        def call() -> tuple[float, NDArray[Any]]:
            x = s.detach().requires_grad_()
            loss = loss_of(x, t, y)
            loss.backward()
            return loss.item(), x.grad.numpy()

        return call

    found = {f"torch {torch.__version__} eager": with_gradient(loss_of)}
    if not compiled:
        return found, {"torch.compile": "left out of a quick run"}
    # A folder of its own, so that the first call compiles, whatever earlier runs left in torch's cache.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = _folder().name
    found[f"torch {torch.__version__} compile"] = with_gradient(torch.compile(loss_of, dynamic=False))
    return found, {}


def softmax_peers(name: str, logits: NDArray[Any], out: NDArray[Any], *, threads: int) -> Peers:
    """The same for softmax or log_softmax (``name``); the calls return the result."""
    found: dict[str, Callable[[], Any]] = {}
    absent = {}
    if version_of("torch") is None:
        absent[f"torch.{name}"] = "not installed"
    else:
        torch = _torch(threads)
        x, y = torch.from_numpy(logits), torch.from_numpy(out)
        found[f"torch {torch.__version__} {name}, out="] = lambda: getattr(torch, name)(x, dim=-1, out=y).numpy()
        found[f"torch {torch.__version__} {name}"] = lambda: getattr(torch, name)(x, dim=-1).numpy()
    if version_of("scipy") is None:
        absent[f"scipy.special.{name}"] = "not installed"
    else:
        function = getattr(import_module("scipy.special"), name)
        found[f"SciPy {version('scipy')} {name}"] = lambda: function(logits, axis=-1)
    return found, absent
