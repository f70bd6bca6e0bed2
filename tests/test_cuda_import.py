"""What of kdcore.cuda must work everywhere: importing it, and asking what it could do."""

import inspect
import os
import subprocess
import sys

import numpy as np
import pytest

import kdcore.cpu
import kdcore.cpu.memory
import kdcore.cuda
import kdcore.cuda.memory
from kdcore.cuda.presence import available, owns, require
from kdcore.errors import DeviceUnavailableError


def run(program, **environment):
    command = [sys.executable, "-W", "error", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_asking_imports_no_cuda():
    program = """
import sys, numpy, kdcore.cuda.memory, kdcore.cuda.presence
owns = kdcore.cuda.presence.owns
assert not owns(numpy.zeros(3)) and not owns([1, 2]) and not owns(None)
print([name for name in sys.modules if name.startswith(("numba", "cupy", "ml_dtypes"))])
"""
    assert run(program) == "[]"


def test_launchers_import_without_a_gpu():
    for simulator in ("0", "1"):
        assert (
            run("import kdcore.cuda.launch, kdcore.cuda.kernels; print('ok')", NUMBA_ENABLE_CUDASIM=simulator) == "ok"
        )


class Exported:
    """As another library's device array, and a PyTorch tensor that requires a gradient."""

    def __init__(self, requires_grad=False):
        if requires_grad:
            self.is_cuda = True

    @property
    def __cuda_array_interface__(self):
        if hasattr(self, "is_cuda"):
            raise RuntimeError("Can't get __cuda_array_interface__ on Variable that requires grad.")
        return {"shape": (3,), "typestr": "<f4", "data": (0, True), "version": 3}


def test_owns():
    assert owns(Exported())
    assert owns(Exported(requires_grad=True))
    for host in (np.zeros(3), 1.0, None, "array", [1], object()):
        assert not owns(host)
    assert not kdcore.cuda.memory.is_writable(Exported())


def test_available_and_require_agree():
    reason = available()
    if reason is None:
        require()
    else:
        assert len(reason.split()) > 3
        with pytest.raises(DeviceUnavailableError) as caught:
            require()
        assert str(caught.value) == reason


@pytest.mark.parametrize("name", kdcore.cpu.__all__)
def test_engines_have_the_same_functions(name):
    cpu, cuda = (list(inspect.signature(getattr(m, name)).parameters.values()) for m in (kdcore.cpu, kdcore.cuda))
    assert [p.name for p in cpu[:-1]] == [p.name for p in cuda[:-1]]
    assert [p.kind for p in cpu] == [p.kind for p in cuda]
    assert (cpu[-1].name, cuda[-1].name) == ("threads", "stream")
    assert name in kdcore.cuda.__all__


@pytest.mark.parametrize("name", kdcore.cpu.memory.__all__)
def test_memories_have_the_same_functions(name):
    cpu, cuda = (list(inspect.signature(getattr(m.memory, name)).parameters) for m in (kdcore.cpu, kdcore.cuda))
    assert [p.replace("threads", "stream") for p in cpu] == cuda


def test_devices_are_named_where_there_are_any():
    shown = subprocess.run([sys.executable, "-m", "kdcore", "info"], capture_output=True, text=True, check=True).stdout
    simulated = subprocess.run(
        [sys.executable, "-m", "kdcore", "info"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
    ).stdout
    assert ("  device 0: " in shown) == ("CUDA engine: runs" in shown)
    assert ("  device 0: simulator (compute capability " in simulated) == ("CUDA engine: runs" in simulated)
