"""Scripts that need a process of their own: one that forks, or that imports kdcore anew."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap


def in_a_process(source, directory, **environment):
    """The output of a script that must end within three minutes."""
    script = directory / "script.py"
    script.write_text(textwrap.dedent(source))
    finished = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=180,
        cwd=directory,
        env={**os.environ, **environment},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout
