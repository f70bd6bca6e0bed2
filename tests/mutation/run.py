"""The mutation score: which share of small changes to kdcore its tests notice.

    python tests/mutation/run.py                        # a sample: ten minutes, and the tests of each part once
    python tests/mutation/run.py --budget 0             # every mutant, which takes days
    python tests/mutation/run.py --only engines --budget 3600 --output score.json

Mutants are drawn from all modules of a part, by a seed. Each is written into a copy of the checkout, whose tests then
run until the first fails: the mutant is **killed** if one does, or if they take several times as long as without it.
Those that survive are listed: each is either equivalent, which is to be said in EQUIVALENT below with the reason, or a
test is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
#: What is copied for the tests to run in.
COPIED = ("kdcore", "tests", "benchmarks", "examples", "docs", "README.md", "setup.cfg", "tox.ini", "pyproject.toml")


class Part(NamedTuple):
    """Modules, the tests that are to notice their mutants, the share that they should, and whether in the simulator."""

    modules: tuple[str, ...]
    tests: tuple[str, ...]
    aim: float
    simulated: bool = False


PARTS = {
    "formulas": Part(
        ("formulas.py",),
        (
            "test_primitives.py", "test_falsifiers_kernel.py", "test_divergences.py", "test_mlp_teacher.py",
            "test_ops.py",
        ),
        0.95,
    ),
    "engines": Part(
        ("cpu/rows.py", "cpu/kernels.py", "cpu/launch.py", "cpu/sparse.py", "cpu/states.py", "cpu/variants.py"),
        (
            "test_row_kernels.py", "test_falsifiers_kernel.py", "test_ops.py", "test_sparse_teachers.py",
            "test_states.py", "test_variants.py", "test_ops_bitwise.py", "test_threads.py",
        ),
        0.95,
    ),
    "cuda": Part(
        (
            "cuda/rows.py", "cuda/distillation.py", "cuda/sweeps.py", "cuda/groups.py", "cuda/kernels.py",
            "cuda/states.py", "cuda/sparse.py",
        ),
        ("test_cuda_kernels.py", "test_cuda_engine.py", "test_cuda_ops.py", "test_cuda_sparse.py"),
        0.95,
        simulated=True,
    ),
    "ops": Part(
        ("ops.py", "arguments.py", "checks.py", "states.py", "variants.py", "sparse.py"),
        ("test_ops_errors.py", "test_ops.py", "test_states.py", "test_variants.py", "test_sparse_teachers.py"),
        0.85,
    ),
    "students": Part(
        ("students/linear.py", "students/logit.py", "students/forward.py", "students/parameters.py"),
        ("test_students.py",),
        0.85,
    ),
    "teachers": Part(
        ("teachers/hdf5.py", "teachers/mlp.py", "teachers/truncating.py", "hdf5.py"),
        ("test_hdf5.py", "test_hdf5_teacher.py", "test_mlp_teacher.py", "test_store_teacher.py"),
        0.85,
    ),
    "pipeline": Part(
        ("pipeline.py", "steps.py", "batches.py", "config.py", "runfile.py"),
        ("test_steps.py", "test_batches.py", "test_config.py", "test_pipeline.py"),
        0.85,
    ),
}  # fmt: skip

#: Survivors that no test can kill: module, the line's text, the change; and why.
EQUIVALENT: dict[tuple[str, str, str], str] = {}

#: So many times as long as the tests take without a mutant, and seconds more, may they take with one.
_PATIENCE, _MORE = 3.0, 60.0


class Copy:
    """A copy of the checkout, in which one module at a time is another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignored = shutil.ignore_patterns("__pycache__", "results", "_build")
                shutil.copytree(source, folder / name, ignore=ignored, symlinks=True)
            elif source.exists():
                shutil.copy(source, folder / name)

    def run(self, part: Part, timeout: float | None) -> bool:
        """Whether the tests pass; those that take too long do not."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        environment.pop("NUMBA_ENABLE_CUDASIM", None)
        if part.simulated:
            environment["NUMBA_ENABLE_CUDASIM"] = "1"
        tests = [f"tests/{name}" for name in part.tests]
        marker = "gpu" if part.simulated else "not gpu"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marker, *tests]
        try:
            done = subprocess.run(
                command, cwd=self.folder, env=environment, timeout=timeout, check=False, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
        if done.returncode not in (0, 1, 2):
            raise RuntimeError(f"pytest exited with {done.returncode}: {' '.join(command)}")
        return done.returncode == 0


def drawn(part: Part, rng: random.Random) -> list[tuple[str, Mutant]]:
    """All mutants of a part, in an order that the seed decides."""
    found = [
        (module, mutant)
        for module in part.modules
        for mutant in mutants_of((ROOT / "kdcore" / module).read_text(encoding="utf-8"))
    ]
    rng.shuffle(found)
    return found


def text_of(module: str, line: int) -> str:
    return (ROOT / "kdcore" / module).read_text(encoding="utf-8").splitlines()[line - 1].strip()


def score(name: str, part: Part, copy: Copy, budget: float, seed: int) -> dict:
    """What became of the mutants of a part, of as many as the budget in seconds allows; 0: of all.

    What the tests take without a mutant, to begin with, is not in the budget: else it would be all of a small one.
    """
    began = time.monotonic()
    if not copy.run(part, None):
        raise RuntimeError(f"the tests of {name} fail without a mutant")
    alone = time.monotonic() - began
    began = time.monotonic()
    mutants, tried, survivors = drawn(part, random.Random(seed)), 0, []
    for module, mutant in mutants:
        if budget and time.monotonic() - began > budget:
            break
        key = (module, text_of(module, mutant.line), mutant.change)
        if key in EQUIVALENT:
            continue
        path = copy.folder / "kdcore" / module
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.source, encoding="utf-8")
        try:
            survived = copy.run(part, _PATIENCE * alone + _MORE)
        finally:
            path.write_text(original, encoding="utf-8")
        tried += 1
        if survived:
            survivors.append({"module": module, "line": mutant.line, "text": key[1], "change": mutant.change})
        print(f"{name}: {'SURVIVED' if survived else 'killed'} {module}:{mutant.line} {mutant.change}", flush=True)
    killed = tried - len(survivors)
    return {
        "part": name, "mutants": len(mutants), "tried": tried, "killed": killed,
        "score": killed / tried if tried else None, "aim": part.aim, "survivors": survivors,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="a part alone; may be repeated")
    parser.add_argument("--budget", type=float, default=600, help="seconds of mutants, for all parts; 0: no limit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="also as JSON")
    options = parser.parse_args(arguments)
    parts = options.only or list(PARTS)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for name in parts:
            results.append(score(name, PARTS[name], copy, options.budget / len(parts), options.seed))
    print("\n| part | mutants | tried | killed | score | aim |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for result in results:
        share = "" if result["score"] is None else f"{result['score']:.0%}"
        counts = f"{result['mutants']} | {result['tried']} | {result['killed']}"
        print(f"| {result['part']} | {counts} | {share} | {result['aim']:.0%} |")
    for result in results:
        for survivor in result["survivors"]:
            print(f"survived: {survivor['module']}:{survivor['line']} {survivor['change']}: {survivor['text']}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
