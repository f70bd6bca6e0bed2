"""What a kernel reports about a row that it cannot use; ``arguments`` turns it into an error.

A status is two integers: a code, and the class (or label) that it is about. The codes are shared by both engines.
"""

__all__ = [
    "LABEL",
    "NAN",
    "NO_SUPPORT",
    "OK",
    "POSITIVE_INF",
    "STUDENT",
    "TEACHER",
    "TOO_WIDE",
    "UNDEFINED_GRADIENT",
    "WEIGHT",
]

OK = 0

# Codes of a row of logits: one of the arguments plus one of the conditions.
STUDENT = 10
TEACHER = 20
NAN = 1
POSITIVE_INF = 2
NO_SUPPORT = 3  # all -inf

# Codes of their own.
LABEL = 31
WEIGHT = 41
UNDEFINED_GRADIENT = 51
TOO_WIDE = 61  # a divergence that float32 cannot hold, for the engine alone: it works the row again in float64
