"""Compiled kernels on disk follow the sources that they were compiled from."""

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
    line = "return d / HEADROOM / temperature - math.log(z)"
    assert text.count(line) == 1
    formulas.write_text(text.replace(line, f"{line} + 1.0"), encoding="utf-8")
    assert value() == 1.0
