"""Benchmarks of the CPU engine: every result is verified against a textbook first, then timed beside the memory limit.

Read :mod:`~kdcore.bench.cases` for what is timed, :mod:`~kdcore.bench.measure` for how. The package is a user of
kdcore; what it judges by (:mod:`~kdcore.bench.textbook`, :mod:`~kdcore.bench.limit`) shares no code with the kernels.
"""

__all__ = ["PARTS"]

#: What ``kdcore bench --only`` may name.
PARTS = ("kd", "precision", "divergences", "softmax", "latency", "row", "scaling", "start", "memory")
