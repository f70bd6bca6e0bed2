"""Compiled kernels on disk: they follow their sources, and compute the same bits."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import kdcore

CALL = "import numpy, kdcore; print(kdcore.__file__, kdcore.log_softmax(numpy.zeros(1))[0])"


def test_an_edited_formula_is_compiled_anew(tmp_path):
    shutil.copytree(Path(kdcore.__file__).parent, tmp_path / "kdcore", ignore=shutil.ignore_patterns("__pycache__"))

    def value():
        run = subprocess.run([sys.executable, "-c", CALL], cwd=tmp_path, capture_output=True, text=True, check=True)
        path, number = run.stdout.split()
        assert Path(path).parent == tmp_path / "kdcore"
        return float(number)

    assert value() == 0.0
    formulas = tmp_path / "kdcore" / "formulas.py"
    text = formulas.read_text(encoding="utf-8")
    line = "return d * inverse_temperature - log_z"
    assert text.count(line) == 1
    formulas.write_text(text.replace(line, f"{line} + 1.0"), encoding="utf-8")
    assert value() == 1.0


BITS = """
import hashlib, numpy, kdcore
digest = hashlib.blake2b()
s, t = numpy.random.default_rng(0).standard_normal((2, 16, 1100))
for a, b in ((s, t), (s[:, ::2], t[:, ::2])):
    for value in kdcore.kd_loss_and_gradient(a, b, numpy.zeros(16, int), 2.0, 0.3):
        digest.update(value.tobytes())
digest.update(kdcore.softmax(s).tobytes())
print(digest.hexdigest())
"""


def test_a_kernel_from_disk_gives_the_bits_of_one_just_compiled(tmp_path):
    def digest():
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", BITS]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    compiled = digest()
    assert len(compiled.strip()) == 128
    assert any(tmp_path.rglob("*.nbc"))
    assert digest() == compiled
