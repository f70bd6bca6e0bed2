"""What proves an implementation of knowledge distillation, this one or another.

:func:`falsify` tries to refute a loss and its gradient, from whatever library, and shows the smallest counterexample:

>>> import numpy as np
>>> from kdcore.testing import falsify
>>> def no_loss_at_all(student, teacher, labels, temperature, alpha):
...     return np.zeros(len(student)), np.zeros(student.shape)
>>> report = falsify(no_loss_at_all, max_examples=0)
>>> report.passed, "F-KD-LOSS-64" in [result.id for result in report.failed]
(False, True)

:mod:`~kdcore.testing.adapters` bring losses of torch, JAX and Keras, scalar ones and other conventions into its form;
:mod:`~kdcore.testing.strategies` are Hypothesis strategies for tests of one's own, and
:mod:`~kdcore.testing.plugin` makes a test of each falsifier under pytest.
:mod:`~kdcore.testing.bounds` has the numeric contract as code.

Names load on first use; Hypothesis is imported when something is drawn.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the same names as below, for type checkers
    from kdcore.students.logit import LogitStudent as LogitStudent
    from kdcore.teachers.fixture import FixtureTeacher as FixtureTeacher
    from kdcore.testing.cases import FIXTURES as FIXTURES, Case as Case, case as case
    from kdcore.testing.registry import (
        FEATURES as FEATURES,
        OPTIONAL as OPTIONAL,
        Falsifier as Falsifier,
        Finding as Finding,
        falsifier as falsifier,
        selected as selected,
    )
    from kdcore.testing.report import FalsificationReport as FalsificationReport, Result as Result
    from kdcore.testing.runner import falsify as falsify, try_one as try_one

_HOME = {
    "kdcore.students.logit": ("LogitStudent",),
    "kdcore.teachers.fixture": ("FixtureTeacher",),
    "kdcore.testing.cases": ("FIXTURES", "Case", "case"),
    "kdcore.testing.registry": ("FEATURES", "OPTIONAL", "Falsifier", "Finding", "falsifier", "selected"),
    "kdcore.testing.report": ("FalsificationReport", "Result"),
    "kdcore.testing.runner": ("falsify", "try_one"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}
#: Modules that are attributes without an import of their own.
_SUBMODULES = ("adapters", "bounds", "strategies", "textbook")

__all__ = list(_MODULE_OF)
__all__ += list(_SUBMODULES)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"kdcore.testing.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kdcore.testing' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
