"""What the assembler made of a kernel: basic blocks, and the loops that they make, as ``nvdisasm`` shows them."""

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

__all__ = ["Function", "functions_of", "innermost_loops", "width_of", "works_in_float64"]


class Function(NamedTuple):
    """The opcodes of each basic block, in the order of the listing, and what follows each block."""

    blocks: dict[str, list[str]]
    successors: dict[str, set[str]]


def _nvdisasm():
    """The disassembler: of the package nvidia-cuda-nvdisasm, else on PATH."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations if spec else ():
        if (program := Path(folder, "cu13", "bin", "nvdisasm")).is_file():
            return program
    if program := shutil.which("nvdisasm"):
        return program
    raise FileNotFoundError("nvdisasm is needed: pip install nvidia-cuda-nvdisasm")


_FUNCTION = re.compile(r'subgraph "cluster_(.+)" {')
_BLOCK = re.compile(r'"(.+)"')
_LABEL = re.compile(r'\[label="\{(.*)\}"\]')
_EDGE = re.compile(r'"([^"]+)"\S* -> "([^"]+)"\S* \[.*\];')
#: Without instructions under ``@!PT``, which is never true: the assembler puts them where it needs time.
_OPCODE = re.compile(r"(?:(?<=\\l)|(?<=>))(?:\\ )+(?:@(?!!U?PT\\)!?U?P\w+(?:\\ )+)?([A-Z][A-Z0-9_.]*)")


def functions_of(cubin):
    """The functions of a cubin by name: the kernel, and what the compiler calls, such as a division."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [_nvdisasm(), "--output-control-flow-graph-with-basic-blocks", file]
        graph = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = {}
    for line in graph.splitlines():
        if found := _FUNCTION.fullmatch(line):
            function = functions[found[1]] = Function({}, {})
        elif found := _BLOCK.fullmatch(line):
            name = found[1]
            function.successors[name] = set()
        elif found := _LABEL.fullmatch(line):
            function.blocks[name] = _OPCODE.findall(found[1])
        elif found := _EDGE.fullmatch(line):
            function.successors[found[1]].add(found[2])
    return functions


def _after(start, successors, nodes, seen):
    """The nodes to which a path leads from ``start``, in the order in which they are done with; they become seen."""
    done, path = [], [(start, iter(successors[start] & nodes))]
    seen.add(start)
    while path:
        node, rest = path[-1]
        following = next((n for n in rest if n not in seen), None)
        if following is None:
            done.append(node)
            path.pop()
        else:
            seen.add(following)
            path.append((following, iter(successors[following] & nodes)))
    return done


def _cycles(nodes, successors):
    """The largest sets of nodes that all lead to each other (Kosaraju)."""
    predecessors = {node: set() for node in nodes}
    for node in nodes:
        for following in successors[node] & nodes:
            predecessors[following].add(node)
    seen, order = set(), []
    for node in nodes:
        if node not in seen:
            order += _after(node, successors, nodes, seen)
    seen = set()
    for node in reversed(order):
        if node not in seen:
            cycle = set(_after(node, predecessors, nodes, seen))
            if len(cycle) > 1 or node in successors[node]:
                yield cycle


def _innermost(nodes, successors):
    for cycle in _cycles(nodes, successors):
        entries = {following for node in successors.keys() - cycle for following in successors[node] & cycle}
        yield from list(_innermost(cycle - entries, successors)) or [cycle]


def innermost_loops(function):
    """How often each opcode is in a loop that has no loop in it; of all those, in the order of the listing.

    A block that leaves a loop's straight line and comes back, such as a branch that is seldom taken, is in the loop.
    """
    order = {name: place for place, name in enumerate(function.blocks)}
    # A function's own name stands for its entry, which nothing leads to.
    loops = sorted(_innermost(set(function.blocks), function.successors), key=lambda loop: min(map(order.get, loop)))
    return [Counter(opcode for name in loop for opcode in function.blocks[name]) for loop in loops]


def width_of(opcode, *names):
    """The bits of an access to memory by one of these instructions, 32 for fewer; 0 if it is none of them."""
    name, *parts = opcode.split(".")
    if name not in names:
        return 0
    return next((int(part) for part in parts if part in ("64", "128", "256")), 32)


def works_in_float64(opcode):
    """Whether an instruction computes with float64, or converts one."""
    name, *parts = opcode.split(".")
    if name in ("F2F", "F2I", "I2F"):
        return "F64" in parts
    return name in ("DADD", "DFMA", "DMUL", "DSETP", "DMNMX") or (name == "MUFU" and parts[0].endswith("64H"))
