"""Rows of logits that lie on a device, selected there by PyTorch: what comes to the host is what is stored."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.errors import DeviceUnavailableError, DTypeError, NonFiniteError

__all__ = ["as_tensor", "host_copy", "log_softmax_tensor", "select_tensor"]

#: Elements that are worked at a time, 256 MiB in float32, so that a long sequence takes no more memory than that.
_ELEMENTS = 1 << 26


def as_tensor(array: Any) -> Any:
    """A device array of any library as a PyTorch tensor, without a copy."""
    try:
        import torch
    except ImportError:
        raise DeviceUnavailableError(
            "logits on a device are selected there by PyTorch, which is not installed: pip install 'kdcore[torch]', "
            "or copy them to the host"
        ) from None
    tensor = array.detach() if isinstance(array, torch.Tensor) else _adopted(torch, array)
    if tensor.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        raise DTypeError(f"logits must be float32, float64, float16 or bfloat16, got {tensor.dtype}")
    return tensor


def _adopted(torch: Any, array: Any) -> Any:
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array)
    return torch.as_tensor(array, device="cuda")  # by the CUDA array interface


def host_copy(tensor: Any) -> NDArray[Any]:
    """A tensor as a NumPy array of float32 or float64."""
    import torch

    wide = tensor if tensor.dtype == torch.float64 else tensor.float()
    array: NDArray[Any] = wide.cpu().numpy()
    return array


def _blocks(tensor: Any) -> Any:
    """(first row, rows relative to their maximum in float32 or float64) of usable logits [L, V], some at a time."""
    import torch

    step = max(1, _ELEMENTS // tensor.shape[1])
    for start in range(0, tensor.shape[0], step):
        block = tensor[start : start + step]
        block = block if block.dtype == torch.float64 else block.float()
        top = block.amax(dim=1, keepdim=True)  # NaN where there is one
        if not bool(torch.isfinite(top).all()):
            row = int(torch.isfinite(top[:, 0]).logical_not().nonzero()[0, 0])
            if float(top[row]) == -np.inf:
                raise NonFiniteError(f"logits[{start + row}] is -inf in every class: a row needs a finite logit")
            bad = torch.isnan(block[row]) | (block[row] == np.inf)
            column = int(bad.nonzero()[0, 0])
            value = float(block[row, column])
            raise NonFiniteError(f"logits[{start + row}, {column}] is {value}: logits must be finite or -inf")
        yield start, block - top


def log_softmax_tensor(tensor: Any) -> NDArray[np.float32]:
    """log softmax of rows [L, V], on the host."""
    parts = [(block - block.logsumexp(dim=1, keepdim=True)).float().cpu().numpy() for _, block in _blocks(tensor)]
    return np.concatenate(parts)


def select_tensor(
    tensor: Any, k: int, temperatures: tuple[float, ...]
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
    """``(log_probs, indices, n_valid, tail)`` of rows [L, V], as :func:`kdcore.cpu.selection.select_rows` has them.

    Of classes that share the k-th place, PyTorch chooses which are kept; those that are kept are in the same order.
    """
    import torch
    from torch.nn.functional import logsigmoid

    parts: list[tuple[NDArray[Any], ...]] = []
    for _, block in _blocks(tensor):
        values, indices = block.topk(k, dim=1)
        # Among equals the lower class first.
        indices, order = indices.sort(dim=1)
        values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
        indices = indices.gather(1, order)
        counts = values > -np.inf
        rest = block.scatter(1, indices, -np.inf)
        tails = []
        for temperature in temperatures:
            head = (values / temperature).logsumexp(dim=1)
            tail = (rest / temperature).logsumexp(dim=1)
            tails.append(logsigmoid(tail - head))  # log of the tail's share of both, from the tail itself
            if temperature == 1.0:
                whole = torch.logaddexp(head, tail)
        log_probs = values - whole[:, None]
        indices = torch.where(counts, indices, 0)
        parts.append(
            (
                log_probs.float().cpu().numpy(),
                indices.int().cpu().numpy(),
                counts.sum(dim=1).int().cpu().numpy(),
                torch.stack(tails, dim=1).float().cpu().numpy(),
            )
        )
    log_probs, indices, n_valid, tail = (np.concatenate(column) for column in zip(*parts, strict=True))
    return log_probs, indices, n_valid, tail
