"""Losses of other shapes and conventions as :func:`kdcore.testing.falsify` takes them.

Each adapter returns ``loss_and_gradient(student, teacher, labels, temperature, alpha) -> (loss [B], gradient [B, V])``.
They compose, from the inside out: ``conventions(torch_loss(mine, reduction="mean"), alpha="distillation")``. A
convention is mapped before it is judged, never called a bug. torch, JAX and Keras are imported when a loss is called.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from kdcore.checks import choice, flag
from kdcore.errors import MissingDependencyError
from kdcore.testing.calls import LossAndGradient

__all__ = ["ADAPTERS", "conventions", "jax_loss", "kdcore_loss", "keras_loss", "scalar_loss", "torch_loss"]

_REDUCTIONS = ("none", "mean", "sum", "mean_of_elements", "mean_of_valid")


def _needed(name: str) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"this adapter of kdcore.testing needs the package {name}") from error


def scalar_loss(function: Callable[..., Any], *, reduction: str = "mean") -> LossAndGradient:
    """A loss that returns one number for a batch, with its gradient.

    Parameters
    ----------
    function : callable
        ``(student, teacher, labels, temperature, alpha) -> (loss, gradient [B, V])``.
    reduction : str
        What the number is: "mean" over the rows, "sum", "mean_of_elements", which is divided by B V, or
        "mean_of_valid", over the rows that are not labelled -100, which the other means refuse.

    A row's loss is that of a batch of this row alone. What the whole batch has beyond the sum of its rows is added to
    each, unless it is rounding, so that a loss that is not the mean of its rows shows.

    >>> import numpy as np
    >>> def batch_mean(s, t, y, T, alpha):
    ...     return (s ** 2).mean(), 2 * s / s.size
    >>> loss, gradient = scalar_loss(batch_mean, reduction="mean_of_elements")(np.ones((2, 3)), None, [0, 0], 1.0, 0.0)
    >>> loss.tolist(), gradient[0].tolist()
    ([3.0, 3.0], [2.0, 2.0, 2.0])
    """
    choice(reduction, "reduction", _REDUCTIONS[1:])

    def loss_and_gradient(s: Any, t: Any, y: Any, temperature: float, alpha: float) -> tuple[Any, Any]:
        B, V = s.shape
        valid = int((np.asarray(y) != -100).sum())
        if valid < B and reduction in ("mean", "mean_of_elements"):
            raise ValueError(f'reduction="{reduction}" does not say what a row labelled -100 counts')
        whole, gradient = function(s, t, y, temperature, alpha)
        elements = V if reduction == "mean_of_elements" else 1
        factor = elements * {"sum": 1, "mean_of_valid": valid}.get(reduction, B)
        whole, gradient = factor * np.asarray(whole), factor * np.asarray(gradient)
        if whole.ndim:
            raise ValueError(f"the loss must be one number, got the shape {whole.shape}")
        if B == 1:
            return whole[None], gradient
        loss = np.empty(B, whole.dtype)
        for i in range(B):
            rows = slice(i, i + 1)
            teacher = None if t is None else t[rows].copy()
            if reduction == "mean_of_valid" and y[i] == -100:
                loss[i] = 0
                continue
            loss[i] = elements * function(s[rows].copy(), teacher, y[rows].copy(), temperature, alpha)[0]
        with np.errstate(invalid="ignore"):
            beyond = whole - loss.sum()
            rounding = np.abs(beyond) <= B * np.finfo(loss.dtype).eps * np.abs(loss).sum()
        # inf - inf: of a row that is infinite, which the whole is too.
        if rounding or (np.isnan(beyond) and not np.isnan(whole)):
            return loss, gradient
        return loss + beyond / B, gradient

    return _named(loss_and_gradient, function)


def _named(wrapper: Any, function: Any) -> Any:
    wrapper.__qualname__ = getattr(function, "__qualname__", type(function).__name__)
    wrapper.__module__ = getattr(function, "__module__", None) or type(function).__module__
    return wrapper


def _reduced(wrapper: Callable[..., Any], function: Any, reduction: str) -> LossAndGradient:
    choice(reduction, "reduction", _REDUCTIONS)
    named: LossAndGradient = _named(wrapper, function)
    return named if reduction == "none" else scalar_loss(named, reduction=reduction)


def torch_loss(function: Callable[..., Any], *, reduction: str = "none") -> LossAndGradient:
    """A loss of PyTorch tensors, its gradient by autograd.

    ``function(student, teacher, labels, temperature, alpha)`` returns a tensor: [B] for ``reduction="none"``, else one
    number, see :func:`scalar_loss`. A module whose temperature is fixed when it is made is a function that makes one:
    ``lambda s, t, y, T, a: KDLoss(T, a)(s, t, y)``.
    """

    def loss_and_gradient(s: Any, t: Any, y: Any, temperature: float, alpha: float) -> tuple[Any, Any]:
        torch = _needed("torch")
        student = torch.from_numpy(s).requires_grad_()
        loss = function(student, torch.from_numpy(t), torch.from_numpy(y), temperature, alpha)
        if not isinstance(loss, torch.Tensor):
            raise TypeError(f"torch_loss wants a function that returns its loss, a tensor, got {type(loss).__name__}")
        (gradient,) = torch.autograd.grad(loss.sum(), student, allow_unused=True)
        gradient = torch.zeros_like(student) if gradient is None else gradient
        return loss.detach().numpy(), gradient.numpy()

    return _reduced(loss_and_gradient, function, reduction)


def jax_loss(function: Callable[..., Any], *, reduction: str = "none") -> LossAndGradient:
    """A loss of JAX arrays, its gradient by ``jax.grad``; as :func:`torch_loss`.

    float64 needs ``jax.config.update("jax_enable_x64", True)``, or the feature float64 is not to be claimed.
    """

    def loss_and_gradient(s: Any, t: Any, y: Any, temperature: float, alpha: float) -> tuple[Any, Any]:
        jax = _needed("jax")
        teacher, labels = jax.numpy.asarray(t), jax.numpy.asarray(y)

        def total(student: Any) -> tuple[Any, Any]:
            loss = function(student, teacher, labels, temperature, alpha)
            return loss.sum(), loss

        gradient, loss = jax.grad(total, has_aux=True)(jax.numpy.asarray(s))
        return np.asarray(loss), np.asarray(gradient)

    return _reduced(loss_and_gradient, function, reduction)


def keras_loss(make: Callable[[float], Any], *, reduction: str = "mean") -> LossAndGradient:
    """A distillation loss of Keras, such as ``keras.distillation.LogitsDistillation``, on the backend jax or torch.

    ``make(temperature)`` returns an object with ``compute_loss(teacher_outputs, student_outputs)``, or a function of
    those two, **teacher first**, as Keras has it. There is no cross-entropy: do not claim it.
    """

    def loss_of(s: Any, t: Any, _: Any, temperature: float, alpha: float) -> Any:
        loss = make(temperature)
        compute: Any = getattr(loss, "compute_loss", loss)
        return compute(t, s)

    def loss_and_gradient(s: Any, t: Any, y: Any, temperature: float, alpha: float) -> tuple[Any, Any]:
        backend = _needed("keras").backend.backend()
        by_backend = {"torch": torch_loss, "jax": jax_loss}
        if backend not in by_backend:
            raise MissingDependencyError(f"keras_loss needs Keras's backend jax or torch, got {backend}")
        return by_backend[backend](loss_of)(s, t, y, temperature, alpha)

    return _reduced(loss_and_gradient, make, reduction)


def conventions(
    function: LossAndGradient, *, alpha: str = "cross_entropy", scale_t2: bool = True, teacher_first: bool = False
) -> LossAndGradient:
    """An implementation of other conventions.

    Parameters
    ----------
    function : callable
        (student, teacher, labels, temperature, alpha) -> (loss, gradient), by its own conventions.
    alpha : str
        What its alpha weighs: "cross_entropy", or "distillation".
    scale_t2 : bool
        False: its divergence is not multiplied by T².
    teacher_first : bool
        Its first argument is the teacher, the gradient still the student's.

    alpha CE + (1 - alpha) T² D is c (b CE + (1 - b) D) with c = alpha + (1 - alpha) T² and b = alpha / c.
    """
    choice(alpha, "alpha", ("cross_entropy", "distillation"))
    flag(scale_t2, "scale_t2")
    flag(teacher_first, "teacher_first")
    meaning = alpha

    def loss_and_gradient(s: Any, t: Any, y: Any, temperature: float, alpha: float) -> tuple[Any, Any]:
        factor = 1.0
        if not scale_t2:
            factor = alpha + (1 - alpha) * temperature**2
            alpha = alpha / factor
        weight = alpha if meaning == "cross_entropy" else 1 - alpha
        first, second = (t, s) if teacher_first else (s, t)
        loss, gradient = function(first, second, y, temperature, weight)
        dtype = s.dtype.type
        return np.asarray(loss) * dtype(factor), np.asarray(gradient) * dtype(factor)

    return _named(loss_and_gradient, function)


def kdcore_loss(divergence: Any = "forward_kl", *, to_device: Any = None, to_host: Any = None) -> LossAndGradient:
    """kdcore's own :func:`kdcore.kd_loss_and_gradient`, on the CPU, or on a device between the two copies given."""
    import kdcore

    def loss_and_gradient(s: Any, t: Any, y: Any, temperature: float, alpha: float) -> tuple[Any, Any]:
        arrays = (s, t, y) if to_device is None else tuple(map(to_device, (s, t, y)))
        student, teacher, labels = arrays
        result = kdcore.kd_loss_and_gradient(
            student, teacher, labels, temperature, alpha, divergence=divergence, reduction="none", validate=False
        )
        host = np.asarray if to_host is None else to_host
        return host(result.loss), host(result.gradient)

    loss_and_gradient.__qualname__ = "kd_loss_and_gradient"
    loss_and_gradient.__module__ = "kdcore"
    return loss_and_gradient


#: Adapters of one argument, by the names that ``kdcore falsify --adapter`` takes.
ADAPTERS: dict[str, Callable[[Any], LossAndGradient]] = {
    "scalar": scalar_loss,
    "torch": torch_loss,
    "torch-mean": lambda function: torch_loss(function, reduction="mean"),
    "jax": jax_loss,
    "jax-mean": lambda function: jax_loss(function, reduction="mean"),
    "keras": keras_loss,
}
