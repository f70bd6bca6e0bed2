"""Loops are found in machine code, and what is in them."""

import pytest
from building import label_of
from cuda.core import Linker, LinkerOptions, ObjectCode
from sass import functions_of, innermost_loops, width_of, works_in_float64

#: An outer loop with a logarithm, an inner one with a branch that is left and joined again: its exponential belongs
#: to it wherever the assembler puts it.
NESTED = """
.version 8.0
.target sm_75
.address_size 64
.visible .entry nested(.param .u64 in, .param .u32 rows, .param .u32 columns)
{
    .reg .u64 %at;
    .reg .u32 %i, %k, %rows, %columns;
    .reg .f32 %a, %b, %c, %d, %sum;
    .reg .pred %p;
    ld.param.u64 %at, [in];
    ld.param.u32 %rows, [rows];
    ld.param.u32 %columns, [columns];
    mov.u32 %i, 0;
outer:
    mov.f32 %sum, 0f00000000;
    mov.u32 %k, 0;
inner:
    ld.global.v4.f32 {%a, %b, %c, %d}, [%at];
    add.u64 %at, %at, 16;
    setp.gt.f32 %p, %a, %sum;
    @!%p bra joined;
    ex2.approx.ftz.f32 %sum, %b;
    st.global.f32 [%at + 1024], %sum;
    bar.sync 0;
joined:
    add.f32 %sum, %sum, %c;
    add.u32 %k, %k, 1;
    setp.lt.u32 %p, %k, %columns;
    @%p bra inner;
    lg2.approx.ftz.f32 %sum, %sum;
    st.global.f32 [%at], %sum;
    add.u32 %i, %i, 1;
    setp.lt.u32 %p, %i, %rows;
    @%p bra outer;
    ret;
}
"""


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)], ids=label_of)
def test_innermost_loops(capability):
    linker = Linker(ObjectCode.from_ptx(NESTED.encode()), options=LinkerOptions(arch=label_of(capability)))
    functions = functions_of(bytes(linker.link("cubin").code))
    (function,) = functions.values()
    opcodes = [opcode for block in function.blocks.values() for opcode in block]
    assert opcodes.count("MUFU.LG2") == 1
    loops = [loop for loop in innermost_loops(function) if any(width_of(opcode, "LDG") for opcode in loop)]
    assert loops
    for loop in loops:
        assert loop["MUFU.LG2"] == 0
        loads = sum(count for opcode, count in loop.items() if width_of(opcode, "LDG") == 128)
        assert loop["MUFU.EX2"] == loads > 0
        assert sum(count for opcode, count in loop.items() if width_of(opcode, "STG")) == loads


def test_opcodes():
    assert [width_of(opcode, "LDG") for opcode in ("LDG.E.NA.128", "LDG.E.64", "LDG.E.U16", "LDG.E", "LDS.128")] == [
        128, 64, 32, 32, 0,
    ]  # fmt: skip
    wide = {"DADD", "DFMA", "DMUL", "DSETP.GT.AND", "F2F.F64.F32", "F2F.F32.F64", "I2F.F64.S64", "MUFU.RCP64H"}
    narrow = {"FADD", "F2F.F16.F32", "MUFU.RCP", "MUFU.EX2", "ISETP.GE.S64.AND", "IADD.64", "LDG.E.64", "I2F.S64"}
    assert set(filter(works_in_float64, wide | narrow)) == wide
