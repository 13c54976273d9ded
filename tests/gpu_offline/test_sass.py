"""The reader of machine code, on a text small enough to count by hand."""

from __future__ import annotations

import pytest

from peftkern.bench.aot import sass

# A loop around a loop. The inner one multiplies twice, and waits for a barrier behind the kernel's end, as code for
# sm_90 and sm_100 does. After it a division calls a routine. What follows the last jump is padding.
TEXT = """
Resource usage:
 Common:
  GLOBAL:0
 Function product_kernel:
  REG:144 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0

	code for sm_90a
	.target	sm_90a

		Function : product_kernel
	.headerflags	@"EF_CUDA_ACCELERATORS EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000ff00000000800 */
        /*0010*/                   LDG.E.U16.CONSTANT R2, desc[UR4][R4.64] ;  /* 0x0000000000000000 */
        /*0020*/                   HMMA.16816.F32.BF16 R12, R8, R2, R12 ;     /* 0x0000000000000000 */
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6] ; /* 0x0000000000000000 */
        /*0040*/              @!P0 BRA 0x0110 ;                               /* 0x0000000000000000 */
        /*0050*/                   LDGSTS.E.BYPASS.LTC128B.128 [R3], desc[UR4][R6.64] ; /* 0x00 */
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0000 */
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x0000 */
        /*0080*/              @P1  BRA 0x0030 ;                               /* 0x0000000000000000 */
        /*0090*/                   STL [R1], R9 ;                             /* 0x0000000000000000 */
        /*00a0*/             @!UP0 BRA.U 0x0010 ;                             /* 0x0000000000000000 */
        /*00b0*/                   CALL.REL.NOINC 0x0140 ;                    /* 0x0000000000000000 */
        /*00c0*/                   LDL R9, [R1] ;                             /* 0x0000000000000000 */
        /*00d0*/              @P2  EXIT ;                                     /* 0x0000000000000000 */
        /*00e0*/                   LDG.E R2, desc[UR4][R4.64] ;               /* 0x0000000000000000 */
        /*00f0*/                   STG.E.128 desc[UR4][R4.64], R24 ;          /* 0x0000000000000000 */
        /*0100*/                   EXIT ;                                     /* 0x0000000000000000 */
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR6] ; /* 0x0000000000000000 */
        /*0120*/              @!P0 BRA 0x0110 ;                               /* 0x0000000000000000 */
        /*0130*/                   BRA 0x0050 ;                               /* 0x0000000000000000 */
        /*0140*/                   MUFU.RCP R2, R2 ;                          /* 0x0000000000000000 */
        /*0150*/                   RET.REL.NODEC R20 0x0000 ;                 /* 0x0000000000000000 */
        /*0160*/                   BRA 0x160;                                 /* 0x0000000000000000 */
        /*0170*/                   NOP;                                       /* 0x0000000000000000 */
"""


def test_instructions_are_taken_apart() -> None:
    program = sass.parse(TEXT)
    jump = program.instructions[4]
    assert (jump.address, jump.predicate, jump.opcode, jump.operands) == (0x40, "!P0", "BRA", "0x0110")
    assert program.instructions[10].stem == "BRA"


def test_padding_is_not_counted_and_a_called_routine_is() -> None:
    program = sass.parse(TEXT)
    assert [one.address for one in program.instructions] == list(range(0, 0x160, 0x10))


def test_resources() -> None:
    program = sass.parse(TEXT)
    assert (program.registers, program.stack, program.local) == (144, 16, 8)


def test_main_loop_is_the_innermost_one_and_its_wait_behind_the_end_belongs_to_it() -> None:
    program = sass.parse(TEXT)
    assert [one.address for one in program.main_loop] == [*range(0x30, 0x90, 0x10), 0x110, 0x120, 0x130]


def test_main_loop_is_the_one_with_the_most_products() -> None:
    # the inner loop's jump back now leads nowhere near: what is left is the outer loop
    outer = sass.parse(TEXT.replace("@P1  BRA 0x0030", "@P1  BRA 0x00c0"))
    assert outer.main_loop[0].address == 0x10
    assert sass.tensor_core_counts(outer.main_loop) == {"mma": 1, "wgmma": 2}


def test_without_products_there_is_no_main_loop() -> None:
    program = sass.parse(TEXT.replace("HGMMA", "FFMA").replace("HMMA", "FFMA"))
    assert program.main_loop == []
    assert sass.tensor_core_counts(program.instructions) == {}


def test_loads_by_width() -> None:
    program = sass.parse(TEXT)
    assert sass.global_load_widths(program.instructions) == {16: 1, 128: 1, 32: 1}
    assert sass.global_load_widths(program.main_loop) == {128: 1}


def test_spills() -> None:
    assert sass.spill_count(sass.parse(TEXT).instructions) == 2


@pytest.mark.parametrize(
    ("opcode", "kind"),
    [
        ("HMMA.16816.F32.BF16", "mma"),
        ("IMMA.16832.S8.S8", "mma"),
        ("HGMMA.64x128x16.F32", "wgmma"),
        ("UTCHMMA", "tcgen05"),
        ("UTCBAR", None),
        ("HFMA2.MMA", None),  # an ordinary instruction that runs on the pipe of the tensor cores
        ("FFMA", None),
    ],
)
def test_kinds_of_tensor_core_instructions(opcode: str, kind: str | None) -> None:
    assert sass.tensor_core_kind(sass.Instruction(0, None, opcode, "")) == kind


@pytest.mark.parametrize("text", ["", TEXT.replace("Function : ", "Routine : "), TEXT + TEXT])
def test_text_of_another_kind_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="one function"):
        sass.parse(text)


def test_jump_to_a_place_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="a jump at 0x130 whose target is not known: BRX R2"):
        sass.parse(TEXT.replace("BRA 0x0050", "BRX R2 -0x10"))
