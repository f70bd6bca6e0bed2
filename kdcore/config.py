"""The configuration of a distillation run."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from kdcore.arguments import Tail, as_tail
from kdcore.checks import choice, file_path, flag, integer, number_in, positive_number
from kdcore.divergences import NAMES
from kdcore.errors import ConfigError, DomainError, DTypeError
from kdcore.objective import TAILS

__all__ = ["DistillConfig", "read_toml"]

#: What the objective calls a divergence with its default parameter.
_DIVERGENCE_WORDS = {
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "jsd": "JSD(½)(teacher, student)",
    "skew_forward_kl": "KL(teacher ‖ 0.1 teacher + 0.9 student)",
    "skew_reverse_kl": "KL(student ‖ 0.1 student + 0.9 teacher)",
    "tvd": "TVD(teacher, student)",
    "alpha": "α-divergence(½)(teacher, student)",
}


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What :class:`kdcore.Pipeline` needs to know. Every field is used; a bad one is an error that names it.

    Attributes
    ----------
    output_dir : str
        Where checkpoints, the log and the student go.
    temperature : float
        T.
    alpha : float
        The weight of the hard cross-entropy, in [0, 1]; the teacher's weight is 1 - alpha.
    divergence : str
        The name of one of :mod:`kdcore.divergences`, which then has its default parameter.
    tail : {"bucket", "renormalize", "zero", "uniform"}
        What becomes of the classes that a teacher of :class:`kdcore.TopKRows` leaves out, see
        :func:`kdcore.kd_loss_and_gradient`. Every other teacher leaves it at "bucket".
    batch_size : int
        Rows a step.
    epochs : int
        Passes over the batch source.
    max_steps : int, optional
        Ends the run after so many steps in all, whatever ``epochs`` says.
    per_position : bool
        Whether every position is a prediction, or each row's last.
    ignore_index : int
        The label of rows or positions that do not count.
    validate_every : int, optional
        Steps between validations on the held-out rows; by default each epoch's end.
    checkpoint_every : int, optional
        Steps between checkpoints; by default there is only the last.
    keep_checkpoints : int
        How many of the newest checkpoints stay.
    vocabulary : {"error", "truncate"}
        What to do with a teacher that has more classes than the student: refuse, or cut its logits before the
        softmax and report the mass that this discards.
    allow_degenerate : bool
        Whether a run may start with a student that already agrees with its teacher.
    log_every : int
        Steps between lines of the log.
    """

    output_dir: str
    temperature: float = 4.0
    alpha: float = 0.3
    divergence: str = "forward_kl"
    tail: Tail = "bucket"
    batch_size: int = 32
    epochs: int = 1
    max_steps: int | None = None
    per_position: bool = False
    ignore_index: int = -100
    validate_every: int | None = None
    checkpoint_every: int | None = None
    keep_checkpoints: int = 2
    vocabulary: str = "error"
    allow_degenerate: bool = False
    log_every: int = 50

    def __post_init__(self) -> None:
        try:
            file_path(self.output_dir, "output_dir")
            if not str(self.output_dir):
                raise DomainError(f"output_dir must be a path, got {self.output_dir!r}")
            # Numbers are kept as Python's own: a checkpoint stores them as JSON, which knows no NumPy scalars.
            plain: dict[str, float | int] = {
                "temperature": positive_number(self.temperature, "temperature"),
                "alpha": number_in(self.alpha, "alpha", 0, 1),
                "ignore_index": integer(self.ignore_index, "ignore_index"),
            }
            for name in ("batch_size", "epochs", "keep_checkpoints", "log_every"):
                plain[name] = integer(getattr(self, name), name, least=1)
            for name in ("max_steps", "validate_every", "checkpoint_every"):
                if getattr(self, name) is not None:
                    plain[name] = integer(getattr(self, name), name, least=1)
            for name in ("per_position", "allow_degenerate"):
                plain[name] = flag(getattr(self, name), name)
            for name, value in plain.items():
                object.__setattr__(self, name, value)
            choice(self.divergence, "divergence", NAMES)
            choice(self.vocabulary, "vocabulary", ("error", "truncate"))
            if as_tail(self.tail, None) != TAILS[0] and self.alpha == 1:
                raise DomainError(f"tail={self.tail!r} has no effect at alpha=1, where no teacher is read")
        except (DomainError, DTypeError) as error:
            raise ConfigError(str(error)) from None

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> DistillConfig:
        """A configuration from names and values; an unknown or missing name is a :class:`ConfigError`."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(
                f"unknown field {', '.join(map(repr, unknown))}; the fields are {', '.join(sorted(known))}"
            )
        if "output_dir" not in values:
            raise ConfigError("output_dir is missing")
        return cls(**values)

    @classmethod
    def from_toml(cls, path: str | PathLike[str]) -> DistillConfig:
        """The table ``[distill]`` of a TOML file, whose paths are relative to the file."""
        table = read_toml(path).get("distill")
        if not isinstance(table, dict):
            raise ConfigError(f"{path}: the table [distill] is missing")
        if isinstance(table.get("output_dir"), str):
            table["output_dir"] = str(Path(path).parent / table["output_dir"])
        try:
            return cls.from_mapping(table)
        except ConfigError as error:
            raise ConfigError(f"{path}: [distill] {error}") from None

    def objective(self) -> str:
        """The objective in words and figures.

        >>> DistillConfig(output_dir="run", alpha=0.3, temperature=4).objective()
        '0.30 · CE + 0.70 · T² · KL(teacher ‖ student), T = 4'
        """
        divergence = _DIVERGENCE_WORDS[self.divergence]
        hard, soft = _figure(self.alpha), _figure(1 - self.alpha)
        tail = "" if self.tail == TAILS[0] else f", tail = {self.tail}"
        return f"{hard} · CE + {soft} · T² · {divergence}, T = {self.temperature:g}{tail}"


def _figure(weight: float) -> str:
    """Two decimals where they say it all; a weight of 0.001 must not read 0.00."""
    return f"{weight:.2f}" if abs(weight - round(weight, 2)) < 1e-9 else f"{weight:.6g}"


def read_toml(path: str | PathLike[str]) -> dict[str, Any]:
    """A TOML file as a dict."""
    with open(path, "rb") as file:
        try:
            return tomllib.load(file)
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: not TOML: {error}") from None
