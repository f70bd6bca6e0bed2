"""What the main kernels take of a processor: registers, stack and spilled bytes, as the assembler counts them.

``resources.json`` has the registers that were counted when it was recorded, by kernel and architecture, with the
compiler that ``tox -e compile`` installs; a kernel that takes more fails, as does one with a stack or a spill.
``python tests/compile/test_resources.py`` prints the table, ``--record`` writes it.
"""

import json
import re
import sys
import types
from pathlib import Path

import pytest
from cuda.core import Linker, LinkerOptions, ObjectCode
from numba import cuda
from numba.core import types as nb
from numba.cuda import dispatcher
from test_compile import STORED, kd_signature, matrix

from kdcore.cuda import kernels
from kdcore.divergences import NAMES, as_divergence

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]
RECORDED = Path(__file__).with_name("resources.json")


def _kernels():
    for stored in ("float32", "float16", "bfloat16"):
        for name in ("softmax_kernel", "log_softmax_kernel"):
            signature = matrix(STORED[stored]), nb.float64, nb.float32, matrix(STORED[stored]), matrix(nb.int64)
            yield f"{name.removesuffix('_kernel')} {stored}", getattr(kernels, name), signature
        signature = kd_signature(STORED[stored], STORED[stored], STORED[stored], nb.float32)
        yield f"forward_kl {stored}", kernels.kd_kernel(as_divergence("forward_kl")), signature
    for name in NAMES[1:]:
        yield f"{name} float32", kernels.kd_kernel(as_divergence(name)), kd_signature(*[nb.float32] * 3, nb.float64)


KERNELS = {name: (kernel, signature) for name, kernel, signature in _kernels()}


def resources(name, capability):
    """Registers, bytes of stack, and bytes spilled, of a kernel assembled for a compute capability."""
    kernel, signature = KERNELS[name]
    text, _ = cuda.compile_ptx(kernel.py_func, signature, cc=capability)
    options = LinkerOptions(arch="sm_{}{}".format(*capability), ptxas_options=["-v"])
    linker = Linker(ObjectCode.from_ptx(text.encode()), options=options)
    linker.link("cubin")
    log = linker.get_info_log()
    stack, *spilled = re.search(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    ).groups()
    return int(re.search(r"Used (\d+) registers", log).group(1)), int(stack), sum(map(int, spilled))


def label(capability):
    return "sm_{}{}".format(*capability)


@pytest.fixture
def device(monkeypatch):
    """Device functions ask for one."""

    def set_device(capability):
        monkeypatch.setattr(
            dispatcher, "get_current_device", lambda: types.SimpleNamespace(compute_capability=capability)
        )

    return set_device


def test_what_is_recorded_is_what_is_compiled():
    assert json.loads(RECORDED.read_text()).keys() == KERNELS.keys()


@pytest.mark.parametrize("capability", CAPABILITIES, ids=label)
@pytest.mark.parametrize("name", KERNELS)
def test_resources(device, name, capability):
    device(capability)
    registers, stack, spilled = resources(name, capability)
    assert stack == 0 and spilled == 0
    assert 0 < registers <= json.loads(RECORDED.read_text())[name][label(capability)]


def main(arguments):
    counted = {}
    print("| kernel |", " | ".join(map(label, CAPABILITIES)), "|", flush=True)
    print("| --- |", " | ".join(["---:"] * len(CAPABILITIES)), "|")
    for name in KERNELS:
        counted[name] = {}
        for capability in CAPABILITIES:
            dispatcher.get_current_device = lambda c=capability: types.SimpleNamespace(compute_capability=c)
            registers, stack, spilled = resources(name, capability)
            counted[name][label(capability)] = registers
            if stack or spilled:
                sys.exit(f"{name} on {label(capability)}: {stack} bytes of stack, {spilled} spilled")
        print(f"| {name} |", " | ".join(map(str, counted[name].values())), "|", flush=True)
    if "--record" in arguments:
        RECORDED.write_text(json.dumps(counted, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
