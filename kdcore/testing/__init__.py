"""What proves an implementation of knowledge distillation, this one or another.

:mod:`kdcore.testing.bounds` has the numeric contract as code. Importing it needs NumPy alone.
"""

from kdcore.testing import bounds

__all__ = ["bounds"]
