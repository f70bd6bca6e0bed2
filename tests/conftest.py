"""A kernel cache of this source's own; Hypothesis profiles, of which KDCORE_HYPOTHESIS_PROFILE chooses one."""

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

from hypothesis import settings

# Numba's disk cache knows a kernel by its own file, and would go on using code compiled from old formulas or row
# functions. So the cache has the hash of all kernel sources in its name; it must be set before Numba is imported.
_PACKAGE = Path(importlib.util.find_spec("kdcore").origin).parent
_SOURCES = sorted([*_PACKAGE.glob("*.py"), *_PACKAGE.glob("cpu/*.py")])
_DIGEST = hashlib.blake2b(b"".join(path.read_bytes() for path in _SOURCES), digest_size=8).hexdigest()
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path(tempfile.gettempdir(), f"kdcore-kernels-{_DIGEST}")))

# A first call compiles for seconds, so no example has a deadline. "ci" draws the same examples on every run: a failure
# there is a change of the code, and searching for new ones is the nightly's task.
settings.register_profile("ci", derandomize=True, database=None, deadline=None, max_examples=50)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("KDCORE_HYPOTHESIS_PROFILE", "ci"))
