"""The KD loss for PyTorch: :class:`KDLoss` in place of a module of ``torch.nn``, :func:`kd_loss` of a function.

On CPU and CUDA tensors, without a copy of the logits. The one module of kdcore that imports PyTorch, which comes with
``pip install kdcore[torch]``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kdcore import ops
from kdcore.arguments import Reduction, Tail, as_settings, as_tail
from kdcore.errors import DTypeError, MissingDependencyError
from kdcore.sparse import SPARSE, SampledRows, TopKRows

try:
    import torch
except ImportError as error:
    raise MissingDependencyError("kdcore.torch needs PyTorch: pip install kdcore[torch]") from error

__all__ = ["KDLoss", "kd_loss"]


def _array(tensor: Any, name: str) -> Any:
    """The memory of a tensor, as :mod:`kdcore.ops` takes it; what is no tensor as it is."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    tensor = tensor.detach()
    if tensor.is_cuda:
        return tensor
    if tensor.device.type != "cpu":
        raise DTypeError(f"{name} must be on the CPU or on a CUDA device, got a tensor on {tensor.device}")
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    try:
        import ml_dtypes
    except ImportError as error:
        raise MissingDependencyError("bfloat16 tensors need the package ml_dtypes: pip install ml_dtypes") from error
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)


def _teacher(teacher_logits: Any) -> Any:
    """The memory of a teacher's logits, or of the tensors that are its rows."""
    if isinstance(teacher_logits, SPARSE):
        return teacher_logits.map(lambda array: _array(array, "teacher_logits"))
    return _array(teacher_logits, "teacher_logits")


def _tensor(values: Any, student_logits: torch.Tensor) -> torch.Tensor:
    """Losses as a tensor beside the student: float64 of a float64 student, else float32."""
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    tensor = torch.as_tensor(np.asarray(values) if np.isscalar(values) else values).to(student_logits.device, dtype)
    return tensor.clone() if tensor._is_view() else tensor  # a loss that is a view could not be added to in place


#: Fewer elements are multiplied by PyTorch whatever the factor: a device does it in the time of a launch.
_LARGE = 1 << 20


class _KDLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_logits: torch.Tensor, teacher_logits: Any, labels: Any, options: dict[str, Any]
    ) -> torch.Tensor:
        # Of float16 the gradient stays in float32 until it is scaled: unscaled it would underflow, which is what a
        # scaled loss is for.
        dtype = torch.float32 if student_logits.dtype == torch.float16 else student_logits.dtype
        gradient = torch.empty(student_logits.shape, dtype=dtype, device=student_logits.device)
        result = ops.kd_loss_and_gradient(
            _array(student_logits, "student_logits"),
            _teacher(teacher_logits),
            _array(labels, "labels"),
            **options,
            out=_array(gradient, "out"),
        )
        ctx.save_for_backward(gradient)
        ctx.address = gradient.data_ptr() if _is_saved_as_it_is() else None
        ctx.dtype = student_logits.dtype
        return _tensor(result.loss, student_logits)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        if torch.is_grad_enabled():
            # once_differentiable would let a graph be made in which this loss's part is a constant.
            raise RuntimeError(
                "kdcore's KD loss can be differentiated once: backward with create_graph=True is refused"
            )
        (gradient,) = ctx.saved_tensors
        return _scaled(gradient, grad_output, ctx.dtype, ctx.address == gradient.data_ptr()), None, None, None


def _scaled(gradient: torch.Tensor, factors: torch.Tensor, dtype: torch.dtype, is_own: bool) -> torch.Tensor:
    """gradient [..., V] times factors [...], or one factor, in a dtype; ``is_own``: it is the one that forward made.

    On the CPU a factor of 1 is seen. A device is not asked; there a large gradient that nobody will ask for again is
    multiplied where it is, by blocks of which those with a factor of 1 return at once. The bits are always those of
    PyTorch's product.
    """
    of_rows = factors[..., None] if factors.ndim else factors
    if _is_batched(factors):
        return (gradient * of_rows).to(dtype)
    if dtype != gradient.dtype:
        return torch.mul(gradient, of_rows, out=torch.empty_like(gradient, dtype=dtype))
    if not gradient.is_cuda and factors.ndim == 0 and factors.item() == 1:
        return gradient if is_own and not _graph_is_kept() else gradient.clone()
    if not (gradient.is_cuda and is_own and gradient.numel() >= _LARGE) or _graph_is_kept():
        return gradient * of_rows
    if not factors.ndim and dtype == torch.bfloat16:
        factors = factors.to(dtype).float()  # which PyTorch rounds so, of a tensor without dimensions
    rows = gradient.view(-1, gradient.shape[-1])
    ops.multiply_rows(rows, (factors.reshape(-1) if factors.ndim else factors).expand(rows.shape[0]))
    return gradient


def _is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor stands for a batch of them, which knows neither values nor places; or if it is not known."""
    functorch = torch._C._functorch
    if not (hasattr(functorch, "is_batchedtensor") and hasattr(functorch, "is_legacy_batchedtensor")):
        return True
    return bool(functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor))


def _is_saved_as_it_is() -> bool:
    """Whether what is saved for backward is not handed to hooks, which may share it with others; False if not known."""
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is None


def _graph_is_kept() -> bool:
    """Whether the graph that is being worked may be worked again: with ``retain_graph=True``, or if it is not known."""
    known = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if known is None else bool(known())


@torch.compiler.disable
def kd_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | TopKRows | SampledRows | None,
    labels: torch.Tensor | None,
    temperature: float,
    alpha: float,
    *,
    divergence: Any = "forward_kl",
    teacher_temperature: float | None = None,
    scale_t2: bool = True,
    ignore_index: int = -100,
    weights: torch.Tensor | None = None,
    reduction: Reduction = "mean",
    denominator: float | None = None,
    tail: Tail = "bucket",
    validate: bool | None = None,
) -> torch.Tensor:
    """The loss of :func:`kdcore.kd_loss_and_gradient`, of tensors, differentiable once by the student's logits.

    **alpha is the weight of the hard cross-entropy**; some libraries mean the opposite. The arguments and errors are
    those of :func:`kdcore.kd_loss_and_gradient`. Tensors are all on the CPU, or all on one CUDA device, where they are
    worked on its current stream. :class:`kdcore.TopKRows` and :class:`kdcore.SampledRows` may be of tensors, where the
    student is. The teacher is a constant, whether or not its logits require a gradient. Loss and gradient are computed
    together, in the forward pass, if a gradient can be asked for. The backward pass multiplies it by what comes from
    above. On a device a large gradient is multiplied where it is, and not touched where that is 1, unless it may be
    asked for again (``retain_graph=True``), hooks save it, or it is of float16 logits: that one is float32 until then.

    Returns
    -------
    Tensor
        float64 for a float64 student, else float32; a scalar, or [...] with ``reduction="none"``.

    Examples
    --------
    >>> import torch
    >>> from kdcore.torch import kd_loss
    >>> student = torch.zeros(2, 4, requires_grad=True)
    >>> loss = kd_loss(student, None, torch.tensor([1, 3]), temperature=1.0, alpha=1.0)
    >>> loss.backward()
    >>> loss.detach(), student.grad[0]
    (tensor(1.3863), tensor([ 0.1250, -0.3750,  0.1250,  0.1250]))
    """
    if not isinstance(student_logits, torch.Tensor):
        raise DTypeError(f"student_logits must be a tensor, got {type(student_logits).__name__}")
    options = {
        "temperature": temperature,
        "alpha": alpha,
        "divergence": divergence,
        "teacher_temperature": teacher_temperature,
        "scale_t2": scale_t2,
        "ignore_index": ignore_index,
        "weights": _array(weights, "weights"),
        "reduction": reduction,
        "denominator": denominator,
        "tail": tail,
        "validate": validate,
        "stream": torch.cuda.current_stream(student_logits.device) if student_logits.is_cuda else None,
    }
    if torch.is_grad_enabled() and student_logits.requires_grad:
        loss: torch.Tensor = _KDLoss.apply(student_logits, teacher_logits, labels, options)
        return loss
    student = _array(student_logits, "student_logits")
    teacher, classes = _teacher(teacher_logits), _array(labels, "labels")
    return _tensor(ops.kd_loss(student, teacher, classes, **options), student_logits)


class KDLoss(torch.nn.Module):
    """alpha · CE(softmax(s), y) + (1 - alpha) · T² · D(softmax(t/T), softmax(s/T)) as a module.

    Parameters
    ----------
    temperature : float
        T, positive and finite. CE is always taken at T = 1.
    alpha : float
        **Weight of the hard cross-entropy**, in [0, 1].
    divergence, teacher_temperature, scale_t2, ignore_index, reduction, tail, validate
        As for :func:`kdcore.kd_loss_and_gradient`.

    Raises
    ------
    DomainError, DTypeError
        When it is made, for parameters that no call could use; for arrays, see :func:`kd_loss`.

    References
    ----------
    Hinton, Vinyals & Dean 2015, "Distilling the Knowledge in a Neural Network", arXiv:1503.02531.

    Examples
    --------
    >>> import torch
    >>> from kdcore.torch import KDLoss
    >>> head, features = torch.nn.Linear(8, 5), torch.randn(3, 8)
    >>> criterion = KDLoss(temperature=2.0, alpha=0.3)
    >>> loss = criterion(head(features), torch.randn(3, 5), torch.tensor([0, 4, -100]))  # the last row is masked
    >>> loss.backward()
    >>> head.weight.grad.shape
    torch.Size([5, 8])
    """

    def __init__(
        self,
        temperature: float,
        alpha: float,
        *,
        divergence: Any = "forward_kl",
        teacher_temperature: float | None = None,
        scale_t2: bool = True,
        ignore_index: int = -100,
        reduction: Reduction = "mean",
        tail: Tail = "bucket",
        validate: bool | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "temperature": temperature,
            "alpha": alpha,
            "divergence": divergence,
            "teacher_temperature": teacher_temperature,
            "scale_t2": scale_t2,
            "ignore_index": ignore_index,
            "reduction": reduction,
            "validate": validate,
        }
        as_settings(**self.options, denominator=None)
        self.options["tail"] = as_tail(tail, None)

    def forward(
        self,
        student_logits: torch.Tensor,
        teacher_logits: torch.Tensor | TopKRows | SampledRows | None,
        labels: torch.Tensor | None = None,
        *,
        weights: torch.Tensor | None = None,
        denominator: float | None = None,
    ) -> torch.Tensor:
        """The loss of logits [..., V] and labels [...], see :func:`kd_loss`."""
        return kd_loss(student_logits, teacher_logits, labels, weights=weights, denominator=denominator, **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items() if value is not None)
