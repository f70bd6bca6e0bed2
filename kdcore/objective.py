"""The scalars of a KD objective, as ops hands them to an engine."""

from typing import NamedTuple

__all__ = ["DIVERGENCES", "Objective", "needs_float64"]

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


#: Temperatures (and their ratios) outside make float32 rates, gradients or ratios overflow.
_FLOAT32_TEMPERATURES = (1e-30, 1e30)


def needs_float64(dtype_name: str, *temperatures: float, divergence: str = "forward_kl") -> bool:
    """Whether rows of a dtype are worked in float64 rather than float32.

    float64 rows are; so are divergences that go by their two formulas (log q - log p is as large as the logits are
    apart, and q (log q - log p) must not lose what a float32 gradient can show), and temperatures far from 1.
    """
    low, high = _FLOAT32_TEMPERATURES
    narrow = all(low < temperature / other < high for temperature in temperatures for other in (1.0, *temperatures))
    return dtype_name == "float64" or divergence != "forward_kl" or not narrow
