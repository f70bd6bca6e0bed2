"""The mutation score: which share of small changes to kdcore its tests notice.

    python tests/mutation/run.py                        # a sample: ten minutes, and the tests of each part once
    python tests/mutation/run.py --budget 0             # every mutant, which takes days
    python tests/mutation/run.py --only engines --budget 3600 --output score.json

Each mutant is written into a copy of the checkout, whose tests then run until the first fails: the mutant is **killed**
if one does, or if they take several times as long as without it. Those that survive are listed: each is either
equivalent, which is to be said in equivalent.py with the reason, or a test is missing. The exit status is 1 if a part's
sample is so far below its aim that chance does not explain it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from equivalent import EQUIVALENT
from mutants import Mutant, mutants_of

ROOT = Path(__file__).resolve().parents[2]
#: What is copied for the tests to run in.
COPIED = ("kdcore", "tests", "benchmarks", "examples", "docs", "README.md", "setup.cfg", "tox.ini", "pyproject.toml")


class Part(NamedTuple):
    """Modules with the tests that are to notice their mutants, likely ones first; the share that they should notice."""

    tests: dict[str, tuple[str, ...]]
    aim: float
    simulated: bool = False


_ROW_TESTS = ("test_row_kernels.py", "test_falsifiers_kernel.py", "test_ops.py")
_CUDA_TESTS = ("test_cuda_kernels.py", "test_cuda_engine.py", "test_cuda_ops.py")

PARTS = {
    "formulas": Part(
        {
            "formulas.py": (
                "test_formulas.py", "test_falsifiers_kernel.py", "test_divergences.py", "test_mlp_teacher.py",
            )
        },
        0.95,
    ),
    "engines": Part(
        {
            "cpu/rows.py": _ROW_TESTS,
            "cpu/kernels.py": (*_ROW_TESTS, "test_ops_bitwise.py"),
            "cpu/launch.py": (*_ROW_TESTS, "test_ops_bitwise.py", "test_threads.py"),
            "cpu/sparse.py": ("test_sparse_teachers.py",),
            "cpu/states.py": ("test_states.py",),
            "cpu/variants.py": ("test_variants.py",),
        },
        0.95,
    ),
    "cuda": Part(
        {
            "cuda/rows.py": _CUDA_TESTS,
            "cuda/distillation.py": _CUDA_TESTS,
            "cuda/sweeps.py": _CUDA_TESTS,
            "cuda/groups.py": _CUDA_TESTS,
            "cuda/kernels.py": (*_CUDA_TESTS, "test_cuda_sparse.py"),
            "cuda/states.py": ("test_cuda_engine.py", "test_cuda_kernels.py"),
            "cuda/sparse.py": ("test_cuda_sparse.py",),
            "cuda/variants.py": ("test_cuda_variants.py",),
        },
        0.95,
        simulated=True,
    ),
    "ops": Part(
        {
            "ops.py": ("test_architecture.py", "test_ops_errors.py", "test_ops.py"),
            "arguments.py": ("test_ops_errors.py", "test_ops.py", "test_sparse_teachers.py", "test_ops_bitwise.py"),
            "checks.py": ("test_checks.py", "test_ops_errors.py"),
            "states.py": ("test_architecture.py", "test_states.py"),
            "variants.py": ("test_architecture.py", "test_variants.py"),
            "sparse.py": ("test_sparse_teachers.py",),
        },
        0.85,
    ),
    "students": Part(
        {
            "students/linear.py": ("test_students.py",),
            "students/logit.py": ("test_students.py",),
            "students/forward.py": ("test_students.py",),
            "students/parameters.py": ("test_students.py",),
        },
        0.85,
    ),
    "teachers": Part(
        {
            "teachers/hdf5.py": ("test_hdf5_teacher.py", "test_store_teacher.py"),
            "teachers/mlp.py": ("test_mlp_teacher.py",),
            "teachers/truncating.py": ("test_pipeline.py", "test_falsifiers_pipeline.py"),
            "hdf5.py": ("test_hdf5.py", "test_hdf5_teacher.py", "test_store_teacher.py", "test_store.py"),
        },
        0.85,
    ),
    "pipeline": Part(
        {
            "pipeline.py": ("test_pipeline.py", "test_falsifiers_pipeline.py"),
            "steps.py": ("test_steps.py", "test_pipeline.py"),
            "batches.py": ("test_batches.py", "test_pipeline.py"),
            "config.py": ("test_config.py", "test_pipeline.py"),
            "runfile.py": ("test_pipeline.py", "test_falsifiers_pipeline.py"),
        },
        0.85,
    ),
}  # fmt: skip

#: So many times as long as the tests take without a mutant, and seconds more, may they take with one.
_PATIENCE, _MORE = 3.0, 60.0
#: What a process of tests returns that a mutant has made to end: a signal, which a wild read or write may bring.
_CRASHES = (-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGFPE, -signal.SIGILL)
#: A sample's score is below its aim if it would be so low with a smaller chance than this.
_CHANCE = 0.01


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

    def run(self, tests: tuple[str, ...], simulated: bool, timeout: float | None) -> bool | None:
        """Whether tests pass; None if they take longer than this many seconds."""
        environment = {**os.environ, "PYTHONPATH": str(self.folder), "PYTHONDONTWRITEBYTECODE": "1"}
        # Kernels are compiled anew for each mutant of what they are made of: none of them is to stay on the disk.
        environment["NUMBA_CACHE_DIR"] = str(self.folder / "cache")
        environment.pop("NUMBA_ENABLE_CUDASIM", None)
        if simulated:
            environment["NUMBA_ENABLE_CUDASIM"] = "1"
        marker = "gpu" if simulated else "not gpu"
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-m", marker]
        command += [f"tests/{name}" for name in tests]
        with subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as tested:  # fmt: skip
            try:
                tested.wait(timeout)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):  # with the processes that tests have started
                    os.killpg(tested.pid, signal.SIGKILL)
        if tested.returncode not in (0, 1, 2, *_CRASHES):
            raise RuntimeError(f"pytest exited with {tested.returncode}: {' '.join(command)}")
        return tested.returncode == 0

    def survives(self, part: Part, module: str, mutant: Mutant, timeout: float) -> bool | None:
        path = self.folder / "kdcore" / module
        original = path.read_text(encoding="utf-8")
        path.write_text(mutant.source, encoding="utf-8")
        try:
            return self.run(part.tests[module], part.simulated, timeout)
        finally:
            path.write_text(original, encoding="utf-8")
            if module.startswith("cpu/") or module == "formulas.py":
                shutil.rmtree(self.folder / "cache", ignore_errors=True)


def sources(name: str) -> dict[str, str]:
    """The text of each module of a part."""
    return {module: (ROOT / "kdcore" / module).read_text(encoding="utf-8") for module in PARTS[name].tests}


def drawn(names: list[str], seed: int | None) -> list[tuple[str, str, Mutant]]:
    """All mutants of parts that are not known to be equivalent: of each part in turn, in an order of the seed's.

    Without a seed the texts are: the same checkout draws the same sample, a changed one another.
    """
    of_parts = []
    for name in names:
        texts = sources(name)
        found = [
            (name, module, mutant)
            for module, text in texts.items()
            for mutant in mutants_of(text)
            if (module, mutant.before, mutant.after) not in EQUIVALENT
        ]
        random.Random("".join(texts.values()) if seed is None else seed).shuffle(found)
        of_parts.append(found)
    return [entry for turn in itertools.zip_longest(*of_parts) for entry in turn if entry is not None]


def seconds_alone(name: str, copy: Copy) -> float:
    """How long the tests of a part take without a mutant."""
    part = PARTS[name]
    began = time.monotonic()
    if not copy.run(tuple(dict.fromkeys(itertools.chain(*part.tests.values()))), part.simulated, None):
        raise RuntimeError(f"the tests of {name} fail without a mutant")
    return time.monotonic() - began


def verdicts_on(
    mutants: list[tuple[str, str, Mutant]], copies: list[Copy], alone: dict[str, float], budget: float
) -> list[bool | None]:
    """Which of the mutants survive; None: the budget, in seconds, was over before it was decided."""
    deadline = time.monotonic() + budget if budget else math.inf
    free: queue.SimpleQueue[Copy] = queue.SimpleQueue()
    for copy in copies:
        free.put(copy)

    def survives(entry: tuple[str, str, Mutant]) -> bool | None:
        name, module, mutant = entry
        patience = _PATIENCE * alone[name] * len(copies) + _MORE
        copy = free.get()
        try:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            survived = copy.survives(PARTS[name], module, mutant, min(patience, left))
            if survived is None and left > patience:
                survived = False  # it takes too long: whoever runs the tests notices
        finally:
            free.put(copy)
        verdict = {True: "SURVIVED", False: "killed", None: "undecided"}[survived]
        print(f"{name}: {verdict} {module}:{mutant.line} {mutant.before}  ->  {mutant.after}", flush=True)
        return survived

    with ThreadPoolExecutor(len(copies)) as threads:
        return list(threads.map(survives, mutants))


def scores(names: list[str], mutants: list[tuple[str, str, Mutant]], verdicts: list[bool | None]) -> list[dict]:
    """What became of the mutants of each part."""
    results = []
    for name in names:
        of_part = [(entry, survived) for entry, survived in zip(mutants, verdicts, strict=True) if entry[0] == name]
        killed = sum(survived is False for _, survived in of_part)
        survivors = [
            {"module": module, "line": mutant.line, "before": mutant.before, "after": mutant.after}
            for (_, module, mutant), survived in of_part
            if survived
        ]
        tried = killed + len(survivors)
        results.append(
            {
                "part": name, "mutants": len(of_part), "tried": tried, "killed": killed,
                "score": killed / tried if tried else None, "aim": PARTS[name].aim, "survivors": survivors,
            }
        )  # fmt: skip
    return results


def chance(killed: int, tried: int, aim: float) -> float:
    """That no more than so many of the mutants tried are killed, if the tests kill a share ``aim`` of all."""
    return sum(math.comb(tried, k) * aim**k * (1 - aim) ** (tried - k) for k in range(killed + 1))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="a part alone; may be repeated")
    parser.add_argument("--budget", type=float, default=600, help="seconds of mutants, for all parts; 0: no limit")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--seed", type=int, help="of the order; by default the sources decide it")
    parser.add_argument(
        "--alone", type=float,
        help="seconds that a part's tests may take without a mutant: they have passed, and are not run first",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, help="also as JSON")
    options = parser.parse_args(arguments)
    names = options.only or list(PARTS)
    mutants = drawn(names, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        copies = [Copy(Path(folder) / str(job)) for job in range(options.jobs)]
        alone = {name: options.alone or seconds_alone(name, copies[0]) for name in names}
        results = scores(names, mutants, verdicts_on(mutants, copies, alone, options.budget))
    print("\n| part | mutants | tried | killed | score | aim |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for result in results:
        share = "" if result["score"] is None else f"{result['score']:.0%}"
        counts = f"{result['mutants']} | {result['tried']} | {result['killed']}"
        print(f"| {result['part']} | {counts} | {share} | {result['aim']:.0%} |")
    for result in results:
        for survivor in result["survivors"]:
            print("survived: {module}:{line} {before}  ->  {after}".format(**survivor))
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    missed = [r["part"] for r in results if chance(r["killed"], r["tried"], r["aim"]) < _CHANCE]
    if missed:
        print(f"below the aim, by more than chance: {', '.join(missed)}")
    return bool(missed)


if __name__ == "__main__":
    sys.exit(main())
