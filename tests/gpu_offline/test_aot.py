"""Every shipped kernel is compiled for every architecture, and what it uses is held against the checked-in table."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import aot_defects
import pytest
import torch
import triton
from execute import all_kernels

from peftkern.backends.triton import configurations, paths
from peftkern.backends.triton.specializations import TENSORS, Case, specializations
from peftkern.bench import BenchError
from peftkern.bench.aot import __main__ as aot_command
from peftkern.bench.aot import cases, resources
from peftkern.bench.aot.compile import ARCHITECTURES, compile_for
from peftkern.bench.aot.resources import (
    Report,
    Row,
    Table,
    broken_rules,
    compile_everything,
    problems,
    read_table,
    regressions,
    row_of,
    unchanged,
    work_for,
    write_table,
)

TABLE = Path(__file__).with_name("resources.json")


# ---- the shipped kernels


@pytest.fixture(scope="module")
def shipped() -> Report:
    return compile_everything(known=read_table(TABLE))


def test_every_kernel_compiles_for_every_architecture(shipped: Report) -> None:
    assert list(shipped.errors) == []
    assert {key[0] for key in shipped.rows} == set(ARCHITECTURES)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills_or_takes_more_memory_than_there_is(shipped: Report, architecture: int) -> None:
    rows = {key: row for key, row in shipped.rows.items() if key[0] == architecture}
    assert rows
    assert [problem for key, row in rows.items() for problem in broken_rules(key, row)] == []


def test_kernels_use_what_the_table_says(shipped: Report) -> None:
    table = read_table(TABLE)
    if table.triton != triton.__version__:
        pytest.skip(f"the table is of Triton {table.triton}, this is {triton.__version__}")
    assert problems(shipped.rows, table.rows) == []


def test_only_what_needs_an_architecture_of_its_own_is_repeated_for_it() -> None:
    everywhere = {one.name for one, _ in work_for(89)}
    assert {name for name in everywhere if ": product" in name}
    assert everywhere < {one.name for one, _ in work_for(90)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_tile_is_compiled(architecture: int) -> None:
    compiled = [(one.num_warps, one.num_stages, set(one.named_constants.values())) for one, _ in work_for(architecture)]
    dtypes, tight = (torch.bfloat16, torch.float32), (False, True)
    for kernel, dtype, pressed in itertools.product(configurations._TILES, dtypes, tight):
        tile = configurations.tile_for(kernel, architecture, dtype, 1 << 16, pressed)
        sizes = {tile.tokens, tile.columns, tile.inner} - {0}
        assert any(
            sizes <= constants and (warps, stages) == (tile.num_warps, tile.num_stages)
            for warps, stages, constants in compiled
        ), f"{kernel} {dtype}: {tile}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled(architecture: int) -> None:
    unquantizing = {f"quantize_{kind}_kernel" for kind in ("8bit", "rows")} | {"dequantize_rows_kernel"}
    compiled = {one.kernel for one, _ in work_for(architecture)}
    assert all_kernels() - compiled <= (set() if architecture in (86, 90, 100) else unquantizing)


@pytest.mark.parametrize("architecture", [86, 90])
def test_names_are_unique_and_no_code_is_compiled_twice(architecture: int) -> None:
    found = [one for one, _ in work_for(architecture)]
    assert len({one.name for one in found}) == len({one.key for one in found}) == len(found)


def test_sizes_beyond_2_to_the_31_are_compiled_as_64_bit_numbers() -> None:
    (large,) = (
        one for one in specializations(90, [], TENSORS) if one.name == "nf4 beyond 2^31 elements: quantize_4bit"
    )
    assert large.signature["element_count"] == "i64"


# ---- what decides what is compiled


def test_what_triton_would_compile_is_known_from_a_launch_without_memory() -> None:
    found = aot_defects.multiply()
    assert found.signature["weights"] == ("*bf16",)
    assert found.signature["strides"] == ("i32", "i32")
    assert found.named_constants == {"ROWS": 64, "COLUMNS": 64, "INNER": 64, "USE_DOT": True}
    assert found.attributes[1, 0] == found.attributes[4, 1] == [["tt.divisibility", 16]]
    assert found.options == {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}


def test_a_number_that_16_does_not_divide_is_compiled_apart() -> None:
    odd = aot_defects.multiply(row_stride=4097)
    assert odd.attributes[4, 0] == []
    assert odd.key != aot_defects.multiply().key == aot_defects.multiply().key


def test_a_name_says_nothing_about_the_code() -> None:
    found = aot_defects.multiply()
    assert replace(found, name="another").key == found.key


@pytest.mark.parametrize("seed", [1, 16, 0x1_0000_0010, 2**63 - 16])
def test_a_dropout_seed_decides_nothing(seed: int) -> None:
    """Seeds change with every step: each new kernel would halt training for as long as it takes to compile."""
    case = Case("dropout", paths.Path.FUSED, members=3, dropout=0.1, tokens=128)
    other = replace(case, seed=seed)
    assert [one.key for one in specializations(90, [other], [])] == [one.key for one in specializations(90, [case], [])]


# ---- what the report must find


def defect_row(architecture: int = 80, **sizes: Any) -> Row:
    specialization = aot_defects.multiply(**sizes)
    return row_of(specialization, compile_for(specialization, architecture))


@pytest.fixture(scope="module")
def sound() -> Row:
    return defect_row()


KEY = (80, "multiply")


def test_a_sound_kernel_breaks_no_rule(sound: Row) -> None:
    assert broken_rules(KEY, sound) == regressions(KEY, sound, sound) == []
    assert sound.tensor_core == {"mma": 32}
    assert sound.loads == {128: 16}
    assert 0 < sound.main_loop < sound.instructions


def test_a_spill_is_found() -> None:
    row = defect_row(rows=256, columns=256)
    assert row.spills > 100
    assert row.local_memory > 100
    assert re.search(r"sm_80 multiply: \d+ loads and stores of spilled registers", broken_rules(KEY, row)[0])


def test_too_much_shared_memory_is_found() -> None:
    sizes = {"rows": 128, "columns": 128, "inner": 128, "num_stages": 3, "num_warps": 8}
    small, large = defect_row(86, **sizes), defect_row(90, **sizes)
    assert "bytes of shared memory, of 101376" in broken_rules((86, "multiply"), small)[0]
    assert broken_rules((90, "multiply"), large) == []


def test_too_much_tensor_memory_is_found(sound: Row) -> None:
    assert broken_rules(KEY, replace(sound, tensor_memory=512)) == []
    assert "1024 columns of tensor memory" in broken_rules(KEY, replace(sound, tensor_memory=1024))[0]


def test_narrow_loads_are_found(sound: Row) -> None:
    row = defect_row(row_stride=4097)
    assert any("loads of 16 bits, was none" in problem for problem in regressions(KEY, row, sound))
    assert any("0 loads of 128 bits, was 16" in problem for problem in regressions(KEY, row, sound))


def test_a_lost_tensor_core_instruction_is_found(sound: Row) -> None:
    row = defect_row(use_dot=False)
    assert row.main_loop == 0
    assert any("0 mma instructions, was 32" in problem for problem in regressions(KEY, row, sound))


def test_another_kind_of_tensor_core_instruction_is_a_lost_one(sound: Row) -> None:
    row = defect_row(90)
    assert row.tensor_core == {"wgmma": 4}
    assert any("0 mma instructions" in problem for problem in regressions(KEY, row, sound))


@pytest.mark.parametrize("field", ["registers", "instructions", "main_loop"])
def test_growth_beyond_a_tenth_is_found(sound: Row, field: str) -> None:
    before = replace(sound, **{field: 100})
    assert regressions(KEY, replace(sound, **{field: 110}), before) == []
    assert f"{field} 111, was 100" in regressions(KEY, replace(sound, **{field: 111}), before)[0]
    assert regressions(KEY, replace(sound, **{field: 50}), before) == []


def test_an_error_in_a_kernel_names_kernel_and_architecture() -> None:
    with pytest.raises(BenchError, match="undefined does not compile for sm_80"):
        compile_for(aot_defects.undefined(), 80)


# ---- the table


def test_a_table_is_read_as_it_was_written(sound: Row, tmp_path: Path) -> None:
    rows = {(90, "b"): sound, (80, 'a "quoted" name'): replace(sound, per_weight=10.5), (80, "a"): sound}
    write_table(tmp_path / "table.json", Table("3.9.0", rows))
    assert read_table(tmp_path / "table.json") == Table("3.9.0", rows)
    lines = (tmp_path / "table.json").read_text().splitlines()
    assert sum('"registers"' in line for line in lines) == len(rows)  # one line each, so that changes can be read


def test_a_missing_table_says_how_to_write_it(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="--update writes it"):
        read_table(tmp_path / "table.json")


def test_rows_that_one_side_lacks_are_found(sound: Row) -> None:
    assert problems({KEY: sound}, {KEY: sound}) == []
    assert problems({KEY: sound}, {}) == ["sm_80 multiply: has no row in the table"]
    assert problems({}, {KEY: sound}) == ["sm_80 multiply: nothing is compiled for this row"]


def test_rows_are_taken_where_source_and_compiler_are_as_they_were(sound: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    one = aot_defects.multiply()
    table = Table(triton.__version__, {(80, one.name): sound})
    monkeypatch.setattr(resources, "_SAMPLED", 1 << 70)
    assert sound.source == one.digest
    assert unchanged([(one, 80)], table) == table.rows
    assert unchanged([(one, 86)], table) == {}
    assert unchanged([(replace(aot_defects.multiply(rows=32), name=one.name), 80)], table) == {}
    assert unchanged([(replace(one, num_stages=5), 80)], table) == {}
    assert unchanged([(one, 80)], replace(table, triton="3.0.0")) == {}
    monkeypatch.setattr(resources, "_SAMPLED", 1)
    assert unchanged([(one, 80)], table) == {}


def test_another_line_in_a_kernel_is_another_source(monkeypatch: pytest.MonkeyPatch) -> None:
    before = aot_defects.multiply().digest
    kernel = aot_defects.multiply_kernel
    monkeypatch.setattr(kernel, "hash", None)
    monkeypatch.setattr(kernel, "_src", kernel.src + "    tl.debug_barrier()\n")
    assert aot_defects.multiply().digest != before


def test_a_tenth_of_what_is_known_is_compiled_all_the_same() -> None:
    work = [pair for architecture in ARCHITECTURES for pair in work_for(architecture)]
    table = read_table(TABLE)
    taken = unchanged(work, table)
    compiled = [one for one, architecture in work if (architecture, one.name) not in taken]
    kernels = {one.kernel for one in compiled}
    assert len(work) / 20 < len(compiled) < len(work) / 5
    assert len(kernels) > len(all_kernels()) / 2


# ---- the command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Runs the command on a table of its own, and on a given report instead of a new compilation."""

    def run(report: Report, *options: str) -> int:
        monkeypatch.setattr(aot_command, "compile_everything", lambda _on_row, _known: report)
        monkeypatch.setattr(sys, "argv", ["aot", "--table", str(tmp_path / "table.json"), *options])
        return aot_command.main()

    return run


def test_the_command_writes_the_table_and_compares_with_it(command: Callable[..., int], sound: Row) -> None:
    assert command(Report({KEY: sound}, []), "--update") == 0
    assert command(Report({KEY: sound}, [])) == 0


def test_the_command_shows_what_is_worse(
    command: Callable[..., int], sound: Row, capsys: pytest.CaptureFixture[str]
) -> None:
    command(Report({KEY: sound}, []), "--update")
    assert command(Report({KEY: replace(sound, registers=2 * sound.registers)}, ["it does not compile"])) == 1
    output = capsys.readouterr().out
    assert "sm_80 multiply: registers 192, was 96" in output
    assert "it does not compile" in output


def test_the_command_does_not_hide_a_spill_in_a_new_table(command: Callable[..., int], sound: Row) -> None:
    assert command(Report({KEY: replace(sound, spills=3)}, []), "--update") == 1


def test_another_version_of_triton_is_held_to_the_hard_rules_alone(
    command: Callable[..., int], sound: Row, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table(tmp_path / "table.json", Table("3.0.0", {KEY: replace(sound, registers=1)}))
    assert command(Report({KEY: sound}, [])) == 0
    assert "the table is of Triton 3.0.0" in capsys.readouterr().out
    assert command(Report({KEY: replace(sound, spills=3)}, [])) == 1


# ---- the benchmarks


def test_the_counted_product_is_the_tile_that_the_figure_is_about() -> None:
    product = cases.nf4_product(90)
    constants = product.named_constants
    assert (constants["BLOCK_TOKENS"], constants["BLOCK_OUT"], constants["BLOCK_IN"]) == (128, 128, 64)
    assert product.num_warps == 8
    assert product.signature["x"] == "*bf16"


@pytest.mark.parametrize(("architecture", "limit"), [(80, 10.6), (90, 9.3)])
def test_a_decoded_weight_takes_few_instructions(architecture: int, limit: float) -> None:
    measured = {one.unit: one for one in cases.instructions() if one.case.startswith(f"sm_{architecture},")}
    assert 4 < measured["instructions/weight"].ours[0] <= limit
    assert measured["share of bytes"].ours == [1.0]


def test_products_use_the_fastest_tensor_core_instruction() -> None:
    assert [one.ours for one in cases.tensor_core()] == [[1.0]] * len(ARCHITECTURES)
