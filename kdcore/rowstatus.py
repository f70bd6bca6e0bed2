"""What a kernel reports about a row that it cannot use; ``arguments`` turns it into an error.

A status is two integers: a code, and the class (or label) that it is about. The codes are shared by both engines.
"""

__all__ = [
    "CLASS",
    "COUNT",
    "DUPLICATE",
    "LABEL",
    "LARGEST_LOG_PROB",
    "LOG_PROB",
    "MASS",
    "MOST_MASS",
    "NAN",
    "NO_SPREAD",
    "NO_SUPPORT",
    "OK",
    "POSITIVE_INF",
    "ROOM",
    "SHARE",
    "SHARES",
    "SHARE_TOLERANCE",
    "STUDENT",
    "TAIL",
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
NO_SPREAD = 4  # finite logits that are all the same, where they are divided by their deviation

# Codes of their own.
LABEL = 31
WEIGHT = 41
UNDEFINED_GRADIENT = 51
TOO_WIDE = 61  # a divergence that float32 cannot hold, for the engine alone: it works the row again in float64

# Codes of a row of a teacher without every class; the detail of those marked * is the entry in the row.
COUNT = 71  # n_valid is not from 1 to k
CLASS = 72  # * an index is not a class
DUPLICATE = 73  # * an index that an entry before it has
LOG_PROB = 74  # * NaN or +inf
TAIL = 75  # tail_logmass is NaN or +inf
MASS = 76  # the probabilities add up to 0, or to more than MOST_MASS
ROOM = 77  # a tail, although every class is stored

# Codes of a row of a mixture of teachers, from the engine that gets their shares unchecked.
SHARE = 81  # a share is not a finite number of at least 0; the detail is the teacher
SHARES = 82  # they do not add up to 1

#: A log-probability beyond is not added up, since its exponential is of no use.
LARGEST_LOG_PROB = 64.0
#: What probabilities that are rounded to 8 bits and stored may add up to; logits or another temperature give more.
MOST_MASS = 1.02
#: How far from 1 a row's shares of teachers may add up.
SHARE_TOLERANCE = 1e-6
