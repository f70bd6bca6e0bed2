"""The scripts of examples/ run as they stand."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(*command):
    """A command to its end, within three minutes: all of its processes compile, if no test before has."""
    # Open MPI does not run as root, nor more processes than there are cores, unless told to. Others do not read this.
    lenient = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "OMPI_MCA_rmaps_base_oversubscribe": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    return subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=180,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **lenient},
        check=False,
    )


def mpiexec():
    """The command that starts MPI processes with the library that mpi4py finds; skips, with the reason, without one."""
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is not installed (pip install kdcore[mpi])")
    beside = Path(sys.executable).with_name("mpiexec")  # that of the extra, also where it is not on the PATH
    command = beside if beside.exists() else shutil.which("mpiexec")
    if command is None:
        pytest.skip("there is no mpiexec (pip install kdcore[mpi])")
    probe = run(command, "-n", 2, sys.executable, "-c", "from mpi4py import MPI; print(MPI.COMM_WORLD.size)")
    if probe.returncode != 0 or probe.stdout.split() != ["2", "2"]:
        pytest.skip(f"{command} and mpi4py do not work together: {(probe.stderr or probe.stdout).strip()[-300:]}")
    return command


def test_tensor_parallel():
    finished = run(mpiexec(), "-n", 2, sys.executable, EXAMPLES / "tensor_parallel.py")
    assert finished.returncode == 0, finished.stderr
    found = re.fullmatch(r"2 processes: loss ([\d.]+), that of the whole vocabulary ([\d.]+)\n", finished.stdout)
    assert found, finished.stdout
    assert found[1] == found[2] and float(found[1]) > 0


@pytest.mark.parametrize("option", [[], ["--dask"]], ids=["processes", "dask"])
def test_teacher_store(tmp_path, option):
    if option and importlib.util.find_spec("distributed") is None:
        pytest.skip("distributed is not installed (pip install kdcore[dask])")
    for attempt in range(2):  # the second finds all shards finished
        finished = run(sys.executable, EXAMPLES / "teacher_store.py", tmp_path / "store", *option)
        assert finished.returncode == 0, finished.stderr
        found = re.fullmatch(r"4 shards, 768 rows, mean tail mass at T = 2: (0\.\d+)\n", finished.stdout)
        assert found and 0.5 < float(found[1]) < 1, finished.stdout
        if attempt == 0:
            unfinished = tmp_path / "store" / "teacher-00001.h5"
            unfinished.unlink()  # as if its writer had not come to it


def test_every_example_is_run():
    in_the_simulator = {"cuda_kernel.py"}  # by tests/test_cuda_kernels.py
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "teacher_store.py",
        "tensor_parallel.py",
    } | in_the_simulator
