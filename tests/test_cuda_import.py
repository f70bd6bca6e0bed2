"""What of kdcore.cuda must work everywhere: importing it, and asking what it could do."""

import importlib.util
import inspect
import os
import subprocess
import sys

import numpy as np
import pytest
from processes import in_a_process

import kdcore.cpu
import kdcore.cpu.memory
import kdcore.cuda
import kdcore.cuda.memory
from kdcore.cuda.presence import available, owns, require
from kdcore.errors import DeviceUnavailableError

#: What numba-cuda says when it is imported beside NumPy 2.5; setup.cfg has it too.
NUMBAS_OWN = "ignore:The 'generic' unit for NumPy timedelta:DeprecationWarning:numba.cuda.np.npdatetime_helpers"


def run(program, **environment):
    command = [sys.executable, "-W", "error", "-W", NUMBAS_OWN, "-c", program]
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
            run("import kdcore.cuda.launch, kdcore.cuda.variants; print('ok')", NUMBA_ENABLE_CUDASIM=simulator) == "ok"
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


def test_a_plan_is_explained_where_there_is_a_device():
    program = """
from kdcore.cuda import plans, presence
from kdcore.errors import DeviceUnavailableError

reason = presence.available()
try:
    print(plans.explain(32_768))
except DeviceUnavailableError as error:
    assert reason and reason in str(error), error
    print("no device")
"""
    assert run(program) == "no device" if available() else "kernel" in run(program)


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


def with_numba_cuda(function):
    """Needs no device, but the package, which the environments of these tests have."""
    installed = importlib.util.find_spec("numba_cuda") is not None
    return pytest.mark.gpu(pytest.mark.skipif(not installed, reason="numba-cuda is not installed")(function))


def unsimulated(script, directory):
    """Run a script without the simulator, also in a checkout that is not installed."""
    in_a_process(script, directory, NUMBA_ENABLE_CUDASIM="0", PYTHONPATH=os.pathsep.join(sys.path))


@with_numba_cuda
def test_cuda_compiles_where_numpy_has_no_row_stack(tmp_path):
    # What a first compilation imports, without the compiler, which may not be installed.
    script = """
    import numpy as np
    from numba import cuda
    from numba.cuda.descriptor import cuda_target

    from kdcore.cuda.presence import available

    vars(np).pop("row_stack", None)  # as NumPy 2.5 did
    available()
    assert not hasattr(np, "row_stack")
    cuda_target.typing_context.refresh()
    cuda_target.target_context.refresh()
    assert not hasattr(np, "row_stack")
    """
    unsimulated(script, tmp_path)


@with_numba_cuda
def test_row_stack_stays_where_numpy_has_it(tmp_path):
    script = """
    import numpy as np

    from kdcore.cuda.presence import available

    row_stack = vars(np).setdefault("row_stack", np.vstack)
    available()
    assert np.row_stack is row_stack
    """
    unsimulated(script, tmp_path)


@with_numba_cuda
def test_a_numpy_that_numba_cuda_does_not_know_is_a_reason(tmp_path):
    script = """
    import numpy as np
    from numba import cuda

    from kdcore.cuda.presence import available

    vars(np).pop("row_stack", None)
    del np.vstack  # as some later NumPy may
    reason = available()
    assert not hasattr(np, "row_stack")
    assert reason is not None and "'vstack'" in reason, reason
    """
    unsimulated(script, tmp_path)
