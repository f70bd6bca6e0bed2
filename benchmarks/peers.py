"""The live table of peers: what the KD losses of other libraries compute, and which falsifier refutes what.

    tox -e peers
    python benchmarks/peers.py [--output benchmarks/results/peers] [--only torch ...]

The first installs the libraries and runs the second, which takes those that are there, and lists the others with the
reason, so that the table is whole on any machine. It writes ``peers.md``, ``peers.json`` and ``ordinary.json``, the
inputs of the numeric comparison.

A convention (no T², another reduction, the teacher's entropy left in) is mapped before anything is judged, and named in
the table; it is never called a bug. A peer is held to what it offers: without a cross-entropy alpha is 0, without
float64 everything is in float32, with that type's bounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib import import_module, util
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import kdcore
from kdcore.bench.peers import version_of
from kdcore.testing import FEATURES, FIXTURES, Falsifier, adapters, selected, try_one
from kdcore.testing.calls import BrokenCallError, Calls, adapted
from kdcore.testing.textbook import log_softmax

ALL = tuple(FEATURES)
SOFT = tuple(name for name in ALL if name != "cross_entropy")
SINGLE = tuple(name for name in ALL if name != "float64")
#: Where the teacher's entropy is taken off afterwards, what cancels with it is not the peer's.
SOFT_NARROW = tuple(name for name in SOFT if name != "large_vocabulary")
SOFT_SINGLE = tuple(name for name in SOFT if name != "float64")


@dataclass(frozen=True)
class Peer:
    """A loss of another library: ``make()`` imports it and returns it in the form of :func:`kdcore.testing.falsify`.

    ``computes`` says what the call returns by its own conventions, ``mapped`` what was done to that.
    """

    package: str
    call: str
    computes: str
    mapped: str
    divergence: Any
    features: tuple[str, ...]
    make: Callable[[], Any]
    #: Whether a call takes so long that of a falsifier's hand-picked cases a sample must do.
    slow: bool = False


PEERS: list[Peer] = []


def peer(
    package: str,
    call: str,
    *,
    computes: str,
    mapped: str = "",
    divergence: Any = "forward_kl",
    features: tuple[str, ...] = ALL,
    one_number: bool = False,
    slow: bool = False,
):
    """Register a peer. One whose loss is one number for a batch is asked for each row: not for a thousand of them."""
    claimed = tuple(name for name in features if not (one_number and name == "large_batch"))

    def register(make):
        PEERS.append(Peer(package, call, computes, mapped, divergence, claimed, make, slow))
        return make

    return register


KD = "alpha CE + (1 - alpha) T² KL(p‖q)"
#: What a batch's one number is.
MEAN = "mean over rows of"


@peer("kdcore", "kd_loss_and_gradient", computes=KD, features=ALL)
def _kdcore():
    return adapters.kdcore_loss()


# --- torch ----------------------------------------------------------------------------------------------------------


def _torch():
    import torch

    torch.set_num_threads(1)
    return torch, torch.nn.functional


@peer(
    "torch", "cross_entropy and kl_div(log_softmax, softmax)", computes=KD, mapped="the sum as users write it, by row"
)
def _torch_kl_div():
    _, f = _torch()

    def loss(s, t, y, T, alpha):
        soft = f.kl_div(f.log_softmax(s / T, dim=-1), f.softmax(t / T, dim=-1), reduction="none").sum(dim=-1)
        return alpha * f.cross_entropy(s, y, reduction="none") + (1 - alpha) * T**2 * soft

    return adapters.torch_loss(loss)


@peer("torch", "cross_entropy and kl_div(log_target=True)", computes=KD, mapped="the sum as users write it, by row")
def _torch_log_target():
    _, f = _torch()

    def loss(s, t, y, T, alpha):
        log_q, log_p = f.log_softmax(s / T, dim=-1), f.log_softmax(t / T, dim=-1)
        soft = f.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=-1)
        return alpha * f.cross_entropy(s, y, reduction="none") + (1 - alpha) * T**2 * soft

    return adapters.torch_loss(loss)


@peer(
    "torch",
    'kl_div(reduction="mean")',
    computes=f"{MEAN} KL(p‖q) / V",
    mapped="times B V; T² by the caller",
    one_number=True,
    features=SOFT,
)
def _torch_mean():
    _, f = _torch()

    def loss(s, t, y, T, alpha):
        return T**2 * f.kl_div(f.log_softmax(s / T, dim=-1), f.softmax(t / T, dim=-1), reduction="mean")

    return adapters.torch_loss(loss, reduction="mean_of_elements")


@peer(
    "torch",
    "cross_entropy(s / T, softmax(t / T))",
    computes="-sum of p log q, which is KL(p‖q) and the teacher's entropy",
    mapped="the teacher's entropy is taken off; T² by the caller",
    features=SOFT_NARROW,
)
def _torch_soft_targets():
    _, f = _torch()

    def loss(s, t, y, T, alpha):
        return T**2 * f.cross_entropy(s / T, f.softmax(t / T, dim=-1), reduction="none")

    return without_entropy(adapters.torch_loss(loss), lambda T: T**2)


def without_entropy(function: Any, factor: Callable[[float], float]) -> Any:
    """-sum p log q as KL(p‖q): less the teacher's entropy, times what the loss is scaled by."""

    def loss_and_gradient(s, t, y, T, alpha):
        loss, gradient = function(s, t, y, T, alpha)
        log_p = log_softmax(t, T)
        entropy = -(np.exp(log_p) * np.where(np.isneginf(log_p), 0, log_p)).sum(axis=-1)
        return (loss - factor(T) * entropy).astype(s.dtype), gradient

    return loss_and_gradient


# --- Liger-Kernel ---------------------------------------------------------------------------------------------------


def rows_apart(function: Any) -> Any:
    """Row by row where logits are infinite: a fused linear layer would multiply their -inf by the other rows' 0."""

    def loss_and_gradient(s, t, y, T, alpha):
        if np.isfinite(s).all() and np.isfinite(t).all():
            return function(s, t, y, T, alpha)
        found = [function(s[i : i + 1], t[i : i + 1], y[i : i + 1], T, alpha) for i in range(len(s))]
        return np.concatenate([x[0] for x in found]), np.concatenate([x[1] for x in found])

    return loss_and_gradient


def _liger_chunked(beta: float) -> Any:
    torch, _ = _torch()
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    def scalar(s, t, y, T, alpha):
        """Logits as the weights of a linear layer, of inputs that choose the rows."""
        eye = torch.eye(len(s))
        weight = torch.from_numpy(s.T.copy()).requires_grad_()
        loss = LigerFusedLinearJSDLoss(alpha, 1 - alpha, beta, temperature=T, compiled=False)
        value = loss(eye.clone().requires_grad_(), weight, eye, torch.from_numpy(t.T.copy()), torch.from_numpy(y))
        value.backward()
        return value.detach().numpy(), weight.grad.numpy().T.copy()

    function = rows_apart(adapters.scalar_loss(scalar, reduction="mean_of_valid"))
    return adapters.conventions(function, scale_t2=False)


for _beta, _name, _computes in ((0.0, "forward_kl", "KL(p‖q)"), (1.0, "reverse_kl", "KL(q‖p)"), (0.5, "jsd", "JSD")):
    peer(
        "liger-kernel",
        f"chunked_loss.LigerFusedLinearJSDLoss(beta={_beta:g})",
        slow=True,
        computes=f"{MEAN} weight_hard_loss CE + weight_soft_loss {_computes}",
        mapped="weights that make up for no T²; times B; logits as the weights of its linear layer; a sample of the "
        "cases",
        one_number=True,
        divergence=_name,
        features=SINGLE,
    )(lambda beta=_beta: _liger_chunked(beta))


# --- TRL ------------------------------------------------------------------------------------------------------------


def _trl_gkd(beta: float) -> Any:
    _torch()
    from trl.experimental.gkd import GKDTrainer

    def loss(s, t, y, T, alpha):
        return GKDTrainer.generalized_jsd_loss(s, t, beta=beta, temperature=T, reduction="none").sum(dim=-1)

    return adapters.conventions(adapters.torch_loss(loss), scale_t2=False)


def _trl_chunked(beta: float) -> Any:
    torch, _ = _torch()
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    def function(s, t, y, T, alpha):
        eye = torch.eye(len(s))
        weight = torch.from_numpy(s.T.copy()).requires_grad_()
        loss, _ = ChunkedDivergenceFunction.apply(
            eye.clone().requires_grad_(), weight, None, eye, torch.from_numpy(t.T.copy()), None, beta, T
        )
        loss.sum().backward()
        return loss.detach().numpy(), weight.grad.numpy().T.copy()

    return adapters.conventions(rows_apart(function), scale_t2=False)


for _beta, _name, _computes in ((0.0, "forward_kl", "KL(p‖q)"), (1.0, "reverse_kl", "KL(q‖p)"), (0.5, "jsd", "JSD")):
    peer(
        "trl",
        f"GKDTrainer.generalized_jsd_loss(beta={_beta:g})",
        computes=_computes,
        mapped='times T²; reduction="none", summed over the classes',
        divergence=_name,
        features=SOFT,
    )(lambda beta=_beta: _trl_gkd(beta))
for _beta, _name, _computes in ((0.0, "forward_kl", "KL(p‖q)"), (1.0, "reverse_kl", "KL(q‖p)"), (0.5, "jsd", "JSD")):
    peer(
        "trl",
        f"kernels ChunkedDivergenceFunction(beta={_beta:g})",
        computes=_computes,
        mapped="times T²; logits as the weights of its linear layer",
        divergence=_name,
        features=SOFT_SINGLE,
    )(lambda beta=_beta: _trl_chunked(beta))


# --- the others -----------------------------------------------------------------------------------------------------


@peer(
    "torchdistill",
    "KDLoss(temperature, alpha)",
    computes=f"{MEAN} {KD}; at alpha = 0 {MEAN} KL(p‖q), without the T² of its formula",
    mapped="times B",
    one_number=True,
)
def _torchdistill():
    _torch()
    from torchdistill.losses.mid_level import KDLoss

    def loss(s, t, y, T, alpha):
        module = KDLoss("m", "output", "m", "output", T, alpha)
        return module({"m": {"output": s}}, {"m": {"output": t}}, y)

    return adapters.torch_loss(loss, reduction="mean")


@peer(
    "torchdistill",
    "KDLoss(temperature, alpha > 0)",
    computes=f"{MEAN} {KD}",
    mapped="alpha = 0 as 1e-30, where it has its T²; times B",
    one_number=True,
)
def _torchdistill_above_zero():
    _torch()
    from torchdistill.losses.mid_level import KDLoss

    def loss(s, t, y, T, alpha):
        module = KDLoss("m", "output", "m", "output", T, alpha or 1e-30)
        return module({"m": {"output": s}}, {"m": {"output": t}}, y)

    return adapters.torch_loss(loss, reduction="mean")


@peer(
    "nvidia-modelopt",
    "LogitsDistillationLoss(T)",
    computes=f"{MEAN} T² KL(p‖q) / V",
    mapped="times B V",
    one_number=True,
    features=SOFT,
)
def _modelopt():
    _torch()
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    return adapters.torch_loss(lambda s, t, y, T, alpha: LogitsDistillationLoss(T)(s, t), reduction="mean_of_elements")


@peer(
    "nvidia-modelopt",
    'LogitsDistillationLoss(T, reduction="none")',
    computes="T² KL(p‖q)",
    mapped="nothing",
    features=SOFT,
)
def _modelopt_rows():
    _torch()
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    return adapters.torch_loss(lambda s, t, y, T, alpha: LogitsDistillationLoss(T, "none")(s, t))


def _jax():
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


@peer(
    "keras",
    "distillation.LogitsDistillation(T)",
    slow=True,
    computes=f"{MEAN} sum of c(t/T) log(c(t/T) / c(s/T)), c(x) = min(max(x, 1e-7), 1): no softmax, no T²; its "
    "documentation calls the default KL divergence",
    mapped="times B; judged as T² KL(p‖q); a sample of the cases",
    one_number=True,
    features=SOFT_SINGLE,
)
def _keras_default():
    _torch()
    import keras

    return adapters.keras_loss(lambda T: keras.distillation.LogitsDistillation(temperature=T))


@peer(
    "keras",
    "distillation.LogitsDistillation(T, loss=KLDivergence())",
    slow=True,
    computes=f"{MEAN} T² sum of c(p) log(c(p) / c(q)), c(x) = min(max(x, 1e-7), 1)",
    mapped="times B; a sample of the cases",
    one_number=True,
    features=SOFT_SINGLE,
)
def _keras_instance():
    _torch()
    import keras

    return adapters.keras_loss(
        lambda T: keras.distillation.LogitsDistillation(temperature=T, loss=keras.losses.KLDivergence())
    )


@peer(
    "optax",
    "kl_divergence and softmax_cross_entropy_with_integer_labels",
    slow=True,
    computes=KD,
    mapped="the sum as users write it, by row; a sample of the cases",
)
def _optax():
    jax = _jax()
    import optax

    def loss(s, t, y, T, alpha):
        soft = optax.losses.kl_divergence(jax.nn.log_softmax(s / T), jax.nn.softmax(t / T))
        hard = optax.losses.softmax_cross_entropy_with_integer_labels(s, y)
        return alpha * hard + (1 - alpha) * T**2 * soft

    return adapters.jax_loss(jax.jit(loss))


@peer(
    "optax",
    "losses.kl_divergence_with_log_targets",
    slow=True,
    computes="KL(p‖q)",
    mapped="T² by the caller; a sample of the cases",
    features=SOFT,
)
def _optax_log_targets():
    jax = _jax()
    import optax

    def loss(s, t, y, T, alpha):
        return T**2 * optax.losses.kl_divergence_with_log_targets(jax.nn.log_softmax(s / T), jax.nn.log_softmax(t / T))

    return adapters.jax_loss(jax.jit(loss))


def _torchtune(name: str) -> Any:
    """Its one file of KD losses, since the package itself asks for torchao."""
    _torch()
    folder = Path(util.find_spec("torchtune").origin).parent
    spec = util.spec_from_file_location("torchtune_kd_losses", folder / "modules" / "loss" / "kd_losses.py")
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)()


WITHOUT_T = tuple(name for name in SOFT_SINGLE if name != "temperature")


@peer(
    "torchtune",
    "ForwardKLLoss",
    computes=f"{MEAN} -sum of p log q over the classes that the student allows",
    mapped="the teacher's entropy is taken off; T = 1; times B",
    one_number=True,
    features=tuple(name for name in WITHOUT_T if name != "large_vocabulary"),
)
def _torchtune_forward():
    loss = _torchtune("ForwardKLLoss")
    whole = adapters.torch_loss(lambda s, t, y, T, alpha: loss(s, t, y), reduction="mean")
    return without_entropy(whole, lambda T: 1.0)


@peer(
    "torchtune",
    "ReverseKLLoss",
    computes=f"{MEAN} KL(q‖p) over the classes that both allow",
    mapped="T = 1; times B",
    one_number=True,
    divergence="reverse_kl",
    features=WITHOUT_T,
)
def _torchtune_reverse():
    loss = _torchtune("ReverseKLLoss")
    return adapters.torch_loss(lambda s, t, y, T, alpha: loss(s, t, y), reduction="mean")


@peer(
    "textbrewer",
    "losses.kd_ce_loss(T)",
    computes=f"{MEAN} -sum of p log q",
    mapped="the teacher's entropy is taken off; times B T²",
    one_number=True,
    features=SOFT_NARROW,
)
def _textbrewer():
    _torch()
    # The package's front imports TensorBoard; its losses need torch alone.
    folder = Path(util.find_spec("textbrewer").origin).parent
    spec = util.spec_from_file_location(
        "textbrewer_front", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["textbrewer_front"] = util.module_from_spec(spec)
    losses = import_module("textbrewer_front.losses")

    whole = adapters.torch_loss(lambda s, t, y, T, alpha: losses.kd_ce_loss(s, t, temperature=T), reduction="mean")
    return adapters.conventions(without_entropy(whole, lambda T: 1.0), scale_t2=False)


#: Known and not tried, with the reason.
LEFT_OUT = {
    "liger-kernel, Triton kernels (LigerKLDIVLoss, LigerJSD, LigerTVDLoss)": "need a CUDA device; in Triton's "
    "interpreter KL and TVD do not run, and JSD takes seconds a call",
    "cut-cross-entropy": "cross-entropy alone, no distillation",
    "DistillKit, mdistiller, distillm": "no package on PyPI",
    "Megatron-LM, NeMo-RL, verl": "their losses need the whole stack on GPUs",
    "KD_Lib": "pins torch 1.8",
    "neural-compressor": "its current version has no distillation left",
}


# --- judging --------------------------------------------------------------------------------------------------------


def implementation(package: str, call: str) -> Any:
    """A row's ``loss_and_gradient``, by its first two columns: to run a counterexample, or for :func:`falsify`."""
    return next(entry for entry in PEERS if (entry.package, entry.call) == (package, call)).make()


def compared(entry: Peer, function: Any) -> dict[str, Any]:
    """Worst errors over ordinary finite cases, in units of what is allowed, and where: the numeric comparison."""
    calls, number = Calls(function, entry.divergence), 0
    worst: dict[str, Any] = {"loss": 0.0, "gradient": 0.0}
    single = "float64" not in entry.features
    for index, found in enumerate(FIXTURES["ordinary, float32" if single else "ordinary"]()):
        case = adapted(found, entry.features)
        if case is None:
            continue
        judged = case.judged(entry.divergence)
        try:
            answer = calls(case)
        except BrokenCallError:
            return {"loss": None, "gradient": None, "cases": number}
        number += 1
        off = {
            "loss": np.abs(answer.loss - judged.exact.loss),
            "gradient": np.sqrt(np.square(answer.gradient - judged.exact.gradient).sum(axis=-1)),
        }
        for name, error in off.items():
            allowed = getattr(judged, name)
            units = np.where(np.isnan(error), np.inf, error / allowed).astype(np.float64)
            row = int(units.argmax())
            if units[row] > worst[name]:
                worst[name] = float(units[row])
                place = {"case": index, "row": row, "error": float(error[row]), "allowed": float(allowed[row])}
                worst[f"{name}_at"] = place | {"exact": getattr(judged.exact, name)[row].astype(np.float64).tolist()}
    return {**worst, "cases": number}


def ordinary() -> dict[str, Any]:
    """The inputs of :func:`compared`, as anyone can read them: those in float32 are the same, rounded, and more."""
    cases = FIXTURES["ordinary, float32"]()
    exact = FIXTURES["ordinary"]()
    return {
        "float64": len(exact),
        "cases": [
            {
                "student": found.student.tolist(),
                "teacher": found.teacher.tolist(),
                "labels": found.labels.tolist(),
                "temperature": found.temperature,
                "alpha": found.alpha,
            }
            for found in (*exact, *cases[len(exact) :])
        ],
    }


class Sampled(Falsifier):
    """A falsifier with some eight of its hand-picked cases, the first and evenly spread others."""

    def cases(self):
        found = list(super().cases())
        yield from found[:: max(1, len(found) // 8)]


def sampled(entry: Falsifier) -> Sampled:
    return Sampled(**vars(entry))


def judged(entry: Peer, max_examples: int) -> dict[str, Any]:
    """A row of the table."""
    row: dict[str, Any] = {
        "package": entry.package,
        "version": kdcore.__version__ if entry.package == "kdcore" else version_of_distribution(entry.package),
        "call": entry.call,
        "computes": entry.computes,
        "mapped": entry.mapped,
        "divergence": entry.divergence,
        "not_claimed": sorted(set(ALL) - set(entry.features)),
    }
    start = time.perf_counter()
    try:
        function = entry.make()
    except Exception as error:
        reason = "not installed" if row["version"] is None else f"{type(error).__name__}: {str(error)[:200]}"
        return row | {"absent": reason}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        comparison = compared(entry, function)
        options = {"divergence": entry.divergence, "features": entry.features, "max_examples": max_examples}
        tried = [sampled(found) if entry.slow else found for found in selected(entry.divergence, entry.features)[0]]
        results = [try_one(found, function, **options) for found in tried]
    failed = [result.as_dict() for result in results if not result.passed]
    print(f"{entry.package} {entry.call}: refuted by {len(failed)} of {len(results)}", file=sys.stderr, flush=True)
    return row | {
        "comparison": _json(comparison),
        "falsifiers": len(results),
        "falsifiers_of_inf": sum(result.id.startswith(_OF_INF) for result in results),
        "cases": sum(result.cases for result in results),
        "failed": failed,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _json(value: Any) -> Any:
    """With numbers that JSON does not have as text."""
    if isinstance(value, dict):
        return {name: _json(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_json(inner) for inner in value]
    return value if value is None or np.isfinite(value) else str(value)


_MODULES = {"liger-kernel": "liger_kernel", "nvidia-modelopt": "modelopt"}


def version_of_distribution(package: str) -> str | None:
    """As :func:`kdcore.bench.peers.version_of`, of a package whose module has another name."""
    if util.find_spec(_MODULES.get(package, package)) is None:
        return None
    if package in _MODULES:
        from importlib.metadata import version

        return version(package)
    return version_of(package)


# --- writing --------------------------------------------------------------------------------------------------------


#: Counterexamples of one peer that the page shows.
_SHOWN = 6
#: Of falsifiers that are about logits of -inf.
_OF_INF = "F-KD-SUPPORT-"

_ABOUT = """
s and t are the student's and the teacher's logits, p = softmax(t/T), q = softmax(s/T), h = softmax(s), CE = -log h of
the label. Every row is held to alpha CE + (1 - alpha) T² D, with the D of its column *D*, and to its gradient by s.
*computes* is what the call returns by its own conventions, *mapped* what was done to that before anything was judged: a
convention is no bug. What a peer does not offer is not held against it (*not claimed*): without cross_entropy alpha is
0, without temperature T is 1, without float64 all logits are float32. For JSD, beta is 1/2.

*Refuted* names the falsifiers of `kdcore.testing` that found a counterexample, of those that apply; those of -inf
(`F-KD-SUPPORT-...`) are apart, because a loss that is never given -inf is no worse for them. They overlap: NaN for a
class that both rule out is seen by several, and a wrong factor by all that measure in units of the right loss, in the
last digits even by those of shifts.
"""

_ERRORS = """
## The errors

*loss error* and *gradient error* are the largest over the ordinary cases, which are in `ordinary.json` beside this
page: logits of at most 11, all finite, T from 0.05 to 100. Of its cases the first 66 (`float64`) are for float64; all
of them, with logits rounded to float32, for a peer without float64. The unit is what `kdcore.testing` allows, so that
up to 1 is right, and float64 and float32 compare. The exact values are in longdouble. A row of V classes whose exact
loss is L is allowed, with |vector| the 2-norm:

    an error of the loss of             R |L| + G A + (w - 1) G (A + |L|) + 4 u
    an error of the gradient, in norm   w G (alpha (|h| + 1) + (1 - alpha) T S)

    A                                   alpha + (1 - alpha) T²
    w                                   1 + u/G ((4 + n/4) m max(1, 1/T) + 2 ln V + 4 sqrt n + n)
    m                                   max of |s|, and where alpha < 1 the max of |t| added
    n                                   how many classes have s within ln(V/u) max(T, 1) of its maximum (without the 1
                                        at alpha = 0) or, where alpha < 1, t within ln(V/u) T of its own
    S                                   |p| + |q| for KL(p‖q), |p| + |q| + |g| + |q| |sum of g| for the others;
                                        g = q log(q/p) for KL(q‖p), q log(q/m) / 2 for JSD with m = (p + q) / 2
    float64                             G = 1e-13, R = 1e-12, u = 2^-53
    float32                             G = 5e-7, R = 1e-6, u = 2^-24

peers.json has, for each row, where the error was largest: the case (from 0) and the row in it, the error, what was
allowed, and the exact loss or gradient. Errors below 1 are of the last digits: they differ by up to a half from one
processor, or one layout of the same rows in memory, to another.

## The counterexamples

Each is two lines: the arguments, and a call of `loss_and_gradient`, which is the row's loss as mapped:

    import sys; sys.path.insert(0, "benchmarks")
    from peers import implementation
    loss_and_gradient = implementation("torchdistill", "KDLoss(temperature, alpha)")  # the library, the loss
"""


def _times(value: Any) -> str:
    if value is None:
        return "raises"
    if isinstance(value, str):
        return "NaN or ∞"
    return f"{value:.2g}" if value < 100 else f"{value:.1e}"


#: How the page writes a divergence.
_D = {"forward_kl": "KL(p‖q)", "reverse_kl": "KL(q‖p)", "jsd": "JSD"}


def _refuted(row: dict[str, Any], of_inf: bool) -> str:
    """By how many of the falsifiers that are about -inf, or of the others, and which."""
    found = [result["id"] for result in row["failed"] if result["id"].startswith(_OF_INF) == of_inf]
    names = ", ".join(name.removeprefix(_OF_INF if of_inf else "F-") for name in found)
    tried = row["falsifiers_of_inf"] if of_inf else row["falsifiers"] - row["falsifiers_of_inf"]
    if not tried:
        return "not claimed"
    return f"{len(found)} of {tried}: {names}" if found else f"none of {tried}"


def markdown(data: dict[str, Any]) -> str:
    """The table, then what each refuted peer does, in a sentence and with the smallest case."""
    environment = data["environment"]
    lines = [
        "# Peers: what their KD losses compute, and what refutes them",
        "",
        f"Made by `{data['command']}` on {data['date']}, kdcore {environment['kdcore']}, "
        f"Python {environment['python']}, NumPy {environment['numpy']}, on a CPU.",
        _ABOUT,
        "| library | loss | computes | mapped | D | not claimed | loss error | gradient error | refuted | by -inf |",
        "| --- | --- | --- | --- | --- | --- | ---: | ---: | --- | --- |",
    ]
    for row in data["peers"]:
        if "absent" in row:
            continue
        lines.append(
            f"| {row['package']} {row['version']} | `{row['call']}` | {row['computes']} | {row['mapped']} | "
            f"{_D[row['divergence']]} | {', '.join(row['not_claimed'])} | {_times(row['comparison']['loss'])} | "
            f"{_times(row['comparison']['gradient'])} | {_refuted(row, of_inf=False)} | {_refuted(row, of_inf=True)} |"
        )
    lines += [_ERRORS]
    for row in data["peers"]:
        if row.get("failed"):
            lines += [f"### {row['package']} {row['version']}: `{row['call']}`", ""]
            for result in row["failed"][:_SHOWN]:
                first, second = result["snippet"].splitlines()
                note = result["counterexample"].splitlines()[0]
                if max(len(first), len(second)) > 400:
                    first, second = "(in peers.json)", ""
                lines.append(f"- **{result['id']}** {result['statement']} {note}")
                lines += [f"  `{first}`"] + ([f"  `{second}`"] if second else [])
            if len(row["failed"]) > _SHOWN:
                lines.append(f"- and {len(row['failed']) - _SHOWN} more, in peers.json")
            lines.append("")
    absent = {f"{row['package']}, {row['call']}": row["absent"] for row in data["peers"] if "absent" in row}
    lines += ["## Not tried", ""]
    lines += [f"- {name}: {reason}." for name, reason in (absent | data["left_out"]).items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", default=Path(__file__).parent / "results" / "peers", type=Path, metavar="FOLDER")
    parser.add_argument("--only", nargs="*", default=[], metavar="PACKAGE", help="these packages alone")
    parser.add_argument("--max-examples", type=int, default=0, help="drawn beyond the hand-picked (%(default)s)")
    options = parser.parse_args()
    chosen = [entry for entry in PEERS if not options.only or entry.package in options.only]
    rows = [judged(entry, options.max_examples) for entry in chosen]
    data = {
        "command": " ".join(["python benchmarks/peers.py", *(["--only", *options.only] if options.only else [])]),
        "date": date.today().isoformat(),
        "environment": {
            "kdcore": kdcore.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": version_of("torch"),
            "jax": version_of("jax"),
        },
        "peers": rows,
        "left_out": LEFT_OUT,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "peers.json").write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (options.output / "peers.md").write_text(markdown(data), encoding="utf-8")
    (options.output / "ordinary.json").write_text(json.dumps(ordinary()) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
