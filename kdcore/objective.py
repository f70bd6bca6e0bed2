"""The scalars of a KD objective, as ops hands them to an engine."""

from typing import NamedTuple

__all__ = ["DIVERGENCES", "Objective"]

#: The divergences D that the engines have, by name.
DIVERGENCES = ("forward_kl", "reverse_kl")


class Objective(NamedTuple):
    """alpha CE(softmax(s), y) + (1 - alpha) kd_scale D(softmax(t / teacher_temperature), softmax(s / temperature))."""

    divergence: str
    temperature: float
    teacher_temperature: float
    alpha: float
    kd_scale: float
    ignore_index: int
