"""Hypothesis profiles, of which KDCORE_HYPOTHESIS_PROFILE chooses one; a plain checkout finds its own kdcore."""

import importlib.util
import os
import sys
from pathlib import Path

from hypothesis import settings

if importlib.util.find_spec("kdcore") is None:  # not installed: the tests of a checkout, on a machine with the rest
    sys.path.insert(0, str(Path(__file__).parents[1]))

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" and importlib.util.find_spec("greenlet") is not None:
    import simulator  # noqa: F401  teaches Numba's simulator warps and concurrent blocks

# A first call compiles for seconds, so no example has a deadline. "ci" draws the same examples on every run: a failure
# there is a change of the code, and searching for new ones is the nightly's task.
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=50)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("KDCORE_HYPOTHESIS_PROFILE", "ci"))


def pytest_ignore_collect(collection_path, config):
    """With ``-m gpu``, files without such tests are not even imported: what they need may not be installed."""
    if config.getoption("markexpr") == "gpu" and collection_path.match("test_*.py"):
        return "pytest.mark.gpu" not in collection_path.read_text(encoding="utf-8") or None
    return None
