"""What the main kernels take of a processor, as the assembler counts it, and what their main loops are made of.

``resources.json`` has what was counted when it was recorded, by kernel and architecture, with the compiler that
``tox -e compile`` installs; a kernel that takes more fails. ``python tests/compile/test_resources.py`` prints a table,
``--record`` writes the file.

A **main loop** is an innermost one that reads rows by 16 bytes, from global memory or, in the group kernel, from shared
memory. It is of one of these kinds:

- copy: of one row from global to shared memory, asynchronously
- maxima: of what is kept there, without an exponential
- gather: sums of the row; in the row kernels also maxima, so that exponentials rescale what was added up before
- weigh: of a divergence by its two formulas, the sums of its terms and slopes
- spend: the gradient or the output is written
- spend in place: the gradient takes the place of logits in shared memory, which is for rows that are not aligned

A loop that also reads or writes narrowly is one **with rest**: at a row's end, classes are taken one by one. Loops that
do nothing but that, for rows that are not aligned and for the careful way of the row kernel of KD, are no main ones.

Where two loops of a kind are expected, they are of the quick and of the careful way, or, of copies, of both rows.
Figures are those of the loop with the fewest instructions.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from building import (
    RESIDENT,
    build,
    group_signature,
    kd_signature,
    label_of,
    left_signature,
    most_registers,
    row_signature,
)
from sass import functions_of, innermost_loops, width_of, works_in_float64

from kdcore.cuda import groups, kernels
from kdcore.cuda.distillation import parts_of
from kdcore.divergences import NAMES, as_divergence

CAPABILITIES = [(8, 0), (9, 0), (10, 0), (12, 0)]
#: Has neither the instruction that makes two bfloat16 nor asynchronous copies.
OLDEST = (7, 5)
RECORDED = Path(__file__).with_name("resources.json")


class Loop(NamedTuple):
    """What main loops of a kind have for an octet: exponentials a class, and those by which sums are rescaled."""

    exponentials: int
    rescalings: int = 0
    #: How many there are, not counting those that are others unrolled.
    loops: int = 1


class Case(NamedTuple):
    """A kernel for each capability, the types of its arguments, and its main loops by their kind."""

    kernels: dict[tuple[int, int], Any]
    signature: tuple[Any, ...]
    #: Bytes of an element, and the rows that a loop reads.
    itemsize: int
    rows: int
    loops: dict[str, Loop]
    wide: bool = False


def capabilities_of(stored):
    """Those that the row kernels are for, of rows stored so."""
    return CAPABILITIES if stored == "bfloat16" else [OLDEST, *CAPABILITIES]


def _cases():
    """(name, case) of the table."""
    for stored in ("float32", "float16", "bfloat16"):
        devices = capabilities_of(stored)
        itemsize = 4 if stored == "float32" else 2
        for name in ("softmax", "log_softmax"):
            spend = Loop(1, loops=2) if name == "softmax" else Loop(0)
            loops = {"gather": Loop(1, 1, loops=2), "spend": spend}
            kernel = dict.fromkeys(devices, kernels.row_kernel(name, False))
            yield f"{name} {stored}", Case(kernel, row_signature(stored, stored), itemsize, 1, loops)
        signature = kd_signature(stored, stored, stored)
        for name, alpha, temperature, rows, exponentials in (
            ("soft", 0.0, 2.0, 2, 2),
            ("hard", 1.0, 2.0, 1, 1),
            ("both, T = 2", 0.3, 2.0, 2, 2),
            ("both, T = 3", 0.3, 3.0, 2, 3),
        ):
            parts = parts_of(alpha, temperature)
            loops = {"gather": Loop(exponentials, exponentials), "spend": Loop(exponentials)}
            kernel = dict.fromkeys(devices, kernels.kd_kernel(parts, None, None, False))
            yield f"forward_kl {stored}, {name}", Case(kernel, signature, itemsize, rows, loops)
            kernel = {
                capability: groups.group_kernel(parts, groups.MOST_THREADS, RESIDENT[capability])
                for capability in CAPABILITIES
            }
            loops = {
                "copy": Loop(0, loops=rows),
                "maxima": Loop(0),
                "gather": Loop(exponentials, loops=2),
                "spend": Loop(exponentials),
                "spend with rest": Loop(exponentials, loops=2),
                "spend in place": Loop(exponentials, loops=2),
            }
            case = Case(kernel, group_signature(stored, stored, stored), itemsize, rows, loops)
            yield f"forward_kl {stored}, {name}, group", case
    for name in NAMES[1:]:
        divergence = as_divergence(name)
        for stored in ("float32", "bfloat16") if name == "jsd" else ("float32",):
            kernel = kernels.kd_kernel(parts_of(0.3, 2.0), divergence.term, divergence.slope, False)
            kernel = dict.fromkeys(capabilities_of(stored), kernel)
            weigh, spend = EXPONENTIALS.get(name, (2, 2))
            loops = {"gather": Loop(2, 2), "weigh": Loop(weigh), "spend": Loop(spend)}
            signature = kd_signature(stored, stored, stored, two_formulas=True)
            itemsize = 4 if stored == "float32" else 2
            yield f"{name} {stored}", Case(kernel, signature, itemsize, 2, loops)
    divergence = as_divergence("jsd")
    kernel = kernels.left_kernel(parts_of(0.3, 2.0), divergence.term, divergence.slope)
    # In float64 an exponential is no instruction, so that a loop that weighs cannot be told from one that gathers.
    loops = {"gather": Loop(0, loops=2), "spend": Loop(0)}
    signature = left_signature("float32", "float32", "float32")
    yield "jsd float32, left", Case(dict.fromkeys(CAPABILITIES, kernel), signature, 4, 2, loops, wide=True)


#: Of a class that is weighed, and of one whose gradient is written; two each but for these.
EXPONENTIALS = {"reverse_kl": (2, 1), "alpha": (4, 3)}

CASES = dict(_cases())


class Found(NamedTuple):
    """A main loop in the machine code: its kind, the octets of an iteration, and its opcodes."""

    kind: str
    octets: float
    opcodes: dict[str, int]

    def count(self, is_counted):
        return sum(count for opcode, count in self.opcodes.items() if is_counted(opcode))


def _is_wide_read(opcode):
    # Of a row: what blocks publish to each other is read for the whole device to agree on, or "strongly".
    return width_of(opcode, "LDG", "LDGSTS", "LDS") == 128 and ".STRONG" not in opcode


def _is_narrow(opcode):
    return 0 < width_of(opcode, "LD", "LDG", "LDGSTS", "LDS", "ST", "STG", "STS") < 128


def _kind_of(loop):
    def has(*names):
        return any(width_of(opcode, *names) for opcode in loop)

    if has("LDGSTS"):
        return "copy"
    if has("ST", "STG"):
        return "spend"
    if has("STS"):
        return "spend in place"
    has_maxima = any(opcode.startswith(("FMNMX", "HMNMX2", "VHMNMX")) for opcode in loop)
    return "maxima" if has_maxima and not loop["MUFU.EX2"] else "gather"


def main_loops(loops, case):
    """Those of loops that are main ones."""
    for loop in loops:
        wide = sum(count for opcode, count in loop.items() if _is_wide_read(opcode))
        if wide:
            kind = _kind_of(loop)
            octets = wide / (case.itemsize / 2) / (1 if kind == "copy" else case.rows)
            if kind == "gather" and "weigh" in case.loops and loop["MUFU.EX2"] % (8 * octets) == 0:  # none rescales
                kind = "weigh"
            yield Found(kind + (" with rest" if any(map(_is_narrow, loop)) else ""), octets, loop)


def measured(name, capability):
    """(figures, faults) of a kernel assembled for a capability: what is recorded, and what is wrong, in words."""
    case = CASES[name]
    kernel = case.kernels[capability]
    built = build(kernel, case.signature, capability)
    figures, faults = {"registers": built.registers}, []
    if built.registers > most_registers(kernel):
        faults.append(f"{built.registers} registers, of {most_registers(kernel)} that a thread may have")
    if built.stack or built.spilled:
        faults.append(f"{built.stack} bytes of stack, {built.spilled} bytes spilled")
    functions = functions_of(built.code)
    opcodes = {opcode for function in functions.values() for block in function.blocks.values() for opcode in block}
    if local := sorted(opcode for opcode in opcodes if width_of(opcode, "LDL", "STL")):
        faults.append(f"local memory: {', '.join(local)}")
    loops = [loop for function in functions.values() for loop in innermost_loops(function)]
    found = list(main_loops(loops, case))
    # One that is unrolled for more than two octets has another beside it, for those that are left.
    kinds = dict.fromkeys(loop.kind for loop in found)
    counts = {kind: sum(loop.kind == kind and loop.octets <= 2 for loop in found) for kind in kinds}
    expected_counts = {kind: loop.loops for kind, loop in case.loops.items()}
    if counts != expected_counts:
        faults.append(f"main loops {counts}, not {expected_counts}")
    for loop in found:
        exponentials = loop.count("MUFU.EX2".__eq__)
        if loop.kind in case.loops:
            expected = loop.octets * (8 * case.loops[loop.kind].exponentials + case.loops[loop.kind].rescalings)
            if exponentials != expected:
                faults.append(
                    f"{exponentials} exponentials in {loop.kind} for {loop.octets:g} octets, not {expected:g}"
                )
        instructions = round(loop.count(bool) / loop.octets, 1)
        if instructions < figures.get(loop.kind, (float("inf"),))[0]:
            figures[loop.kind] = instructions, exponentials / loop.octets
    if not case.wide:
        for loop in loops:
            # Elements are of 2 or 4 bytes, alone or by 16. What is read by 8 are float64 that blocks share.
            of_rows = any(width_of(opcode, "LD", "LDG", "LDS", "ST", "STG") in (32, 128) for opcode in loop)
            if of_rows and (wide := sorted(filter(works_in_float64, loop))):
                faults.append(f"float64 in a loop: {', '.join(wide)}")
    return figures, faults


def exceeded(figures, recorded):
    """In words, what is more than was recorded; of a kind of loop that should not be there, nothing was."""
    return [
        f"{value} {'' if name == 'registers' else 'instructions an octet in '}{name}, recorded were {recorded[name]}"
        for name, value in figures.items()
        if value > recorded.get(name, float("inf"))
    ]


def to_record(figures):
    return {name: value if name == "registers" else value[0] for name, value in figures.items()}


def test_what_is_recorded_is_what_is_compiled():
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))
    assert recorded.keys() == CASES.keys()
    for name, case in CASES.items():
        assert recorded[name].keys() == set(map(label_of, case.kernels))
        assert all(figures.keys() == {"registers", *case.loops} for figures in recorded[name].values())


@pytest.mark.parametrize("name", CASES)
def test_resources(name):
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    faults = []
    for capability in CASES[name].kernels:
        label = label_of(capability)
        figures, of_kernel = measured(name, capability)
        of_kernel += exceeded(to_record(figures), recorded[label])
        faults += (f"{label}: {fault}" for fault in of_kernel)
    assert not faults, "\n".join(["", *faults])


def _row(name, figures_by_label, labels):
    """A line of the table."""
    loops = CASES[name].loops
    of_loops = next(iter(figures_by_label.values()))
    exponentials = " + ".join(f"{of_loops[kind][1] / 8:g}" if kind in of_loops else "?" for kind in loops)
    cells = []
    for label in labels:
        figures = figures_by_label.get(label)
        instructions = [f"{figures[kind][0] / 8:.1f}" if kind in figures else "?" for kind in loops] if figures else []
        cells.append(f"{figures['registers']}: {' + '.join(instructions)}" if figures else "")
    return f"| {name} | {' + '.join(loops)} | {exponentials} | {' | '.join(cells)} |"


def main(arguments):
    """The table: registers, then instructions a class in each of the main loops."""
    labels = [label_of(capability) for capability in (OLDEST, *CAPABILITIES)]
    print("| kernel | main loops | EX2 a class |", " | ".join(labels), "|")
    print("| --- | --- | --- |", " | ".join(["---"] * len(labels)), "|", flush=True)
    recorded, faults = {}, []
    for name, case in CASES.items():
        figures_by_label = {}
        for capability in case.kernels:
            label = label_of(capability)
            figures_by_label[label], of_kernel = measured(name, capability)
            faults += (f"{name}, {label}: {fault}" for fault in of_kernel)
        recorded[name] = {label: to_record(figures) for label, figures in figures_by_label.items()}
        print(_row(name, figures_by_label, labels), flush=True)
    if "--record" in arguments:
        RECORDED.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    main(sys.argv[1:])
