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


#: Temperatures outside make rates or gradients overflow in float32, larger ratios the terms of forward KL.
_FLOAT32_TEMPERATURES = (1e-20, 1e20)
_FLOAT32_RATIO = 4096.0


def needs_float64(
    dtype_name: str, temperature: float, teacher_temperature: float = 1.0, divergence: str = "forward_kl"
) -> bool:
    """Whether rows of a dtype are worked in float64 rather than float32.

    float64 rows are; so are divergences that go by their two formulas (log q - log p is as large as the logits are
    apart, and q (log q - log p) must not lose what a float32 gradient can show), and temperatures far from 1.
    """
    low, high = _FLOAT32_TEMPERATURES
    return (
        dtype_name == "float64"
        or divergence != "forward_kl"
        or not (low < temperature < high and low < teacher_temperature < high)
        or teacher_temperature > _FLOAT32_RATIO * temperature
    )
