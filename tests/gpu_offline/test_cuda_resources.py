"""What nvcc makes of the CUDA kernels: no spills, bounded registers, wide memory accesses, exact arithmetic."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import triton

from peftkern.bench.aot import sass

CSRC = Path(__file__).parents[2] / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHITECTURES = (80, 90, 120)
"""One of each generation; the build compiles for all."""

NVCC = shutil.which("nvcc")
DISASSEMBLER = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

pytestmark = pytest.mark.skipif(NVCC is None, reason="no nvcc, so that nothing is compiled for a GPU")

REGISTERS = {
    r"quantize_blocks<": 40,
    r"quantize_rows<": 40,
    r"dequantize_rows<": 64,
    r"low_rank_product<": 64,
    r"rows_product<.*, 1>": 80,
    r"rows_product<.*, 4>": 128,
    r"rows_product<.*, 16>": 168,
}
"""The most registers of each kernel: they decide how many blocks a multiprocessor holds."""


def _run(*command: object) -> str:
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def _compile(folder: Path, file: Path, architecture: int, kind: str) -> Path:
    target = folder / f"{file.stem}.{architecture}.{kind}"
    _run(
        NVCC,
        "-std=c++17",
        f"-I{CSRC}",
        f"-I{CSRC / 'include'}",
        f"-arch=sm_{architecture}",
        f"-{kind}",
        file,
        "-o",
        target,
    )
    return target


@dataclass(frozen=True)
class Program:
    """A kernel's registers, its bytes of stack and local memory, and its instructions in the order of addresses."""

    registers: int
    stack: int
    local: int
    instructions: Sequence[sass.Instruction]


def _programs(cubin: Path) -> Iterator[tuple[str, Program]]:
    """Readable name and code of each kernel."""
    usage, code = _run(DISASSEMBLER, "-res-usage", cubin), _run(DISASSEMBLER, "-sass", cubin)
    for name, *numbers in re.findall(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage):
        (body,) = re.findall(rf"Function : {re.escape(name)}\n.*?(?=\n\s*Function : |\Z)", code, re.DOTALL)
        instructions = [
            sass.Instruction(int(address, 16), predicate or None, opcode, "")
            for address, predicate, opcode in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@(\S+)\s+)?([A-Z][\w.]*)", body)
        ]
        assert len(instructions) > 50, name
        yield _run("c++filt", name).strip(), Program(*map(int, numbers), instructions)


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Program]:
    """Every kernel on every architecture, by name."""
    folder = tmp_path_factory.mktemp("cubins")
    with ThreadPoolExecutor(2) as pool:
        work = [(folder, file, architecture, "cubin") for architecture in ARCHITECTURES for file in KERNELS]
        cubins = list(pool.map(lambda one: _compile(*one), work))
    return {f"{cubin.stem} {name}": program for cubin in cubins for name, program in _programs(cubin)}


def test_nothing_is_spilled_and_no_local_memory_is_used(programs: Mapping[str, Program]) -> None:
    assert len(programs) >= 25 * len(ARCHITECTURES)
    for name, program in programs.items():
        assert (program.stack, program.local, sass.spill_count(program.instructions)) == (0, 0, 0), name


def test_registers_stay_within_bounds(programs: Mapping[str, Program]) -> None:
    for name, program in programs.items():
        (bound,) = (most for pattern, most in REGISTERS.items() if re.search(rf"\b{pattern}", name))
        assert program.registers <= bound, name


def test_global_memory_is_read_16_bytes_at_a_time(programs: Mapping[str, Program]) -> None:
    for name, program in programs.items():
        assert sass.global_load_widths(program.instructions)[128] > 0, name


@pytest.mark.parametrize(("bits", "octets"), [(4, 4), (8, 2)])
@pytest.mark.parametrize(("dtype", "stores"), [(0, 2), (1, 1), (2, 1)])
def test_whole_octets_are_written_16_bytes_at_a_time(
    programs: Mapping[str, Program], bits: int, octets: int, dtype: int, stores: int
) -> None:
    kernel = f"dequantize_rows<{bits}, (peftkern::DType){dtype}>"
    found = [program for name, program in programs.items() if kernel in name]
    assert len(found) == len(ARCHITECTURES)
    for program in found:
        wide = [one for one in program.instructions if one.opcode == "STG.E.128"]
        assert len(wide) == octets * stores


@cache
def _float_operations(file: Path, folder: Path) -> frozenset[str]:
    """The PTX instructions that round a float32, compiled as nvcc does by itself, which contracts what it can."""
    ptx = _compile(folder, file, ARCHITECTURES[0], "ptx").read_text()
    return frozenset(re.findall(r"\b(?:add|sub|mul|div|fma|rcp|sqrt|ex2|lg2)\.[.\w]*f32\w*", ptx))


def test_quantize_and_dequantize_round_every_operation_to_nearest(tmp_path: Path) -> None:
    exact = {
        "quantize": {"add.rn.f32", "mul.rn.f32", "div.rn.f32", "rcp.rn.f32"},
        "dequantize": {"add.rn.f32", "mul.rn.f32"},
    }
    for stem, operations in exact.items():
        assert _float_operations(CSRC / "cuda" / f"{stem}.cu", tmp_path) == operations


def test_a_contraction_would_be_found(tmp_path: Path) -> None:
    source = (CSRC / "cuda" / "device.h").read_text()
    careless = re.sub(r"__fadd_rn\(__fmul_rn\((code, .*\))\), (__ldg\(scales.offset\))\)", r"code * \1 + \2", source)
    careless = careless.replace("code * code, ", "code * ")
    assert careless != source
    changed = tmp_path / "dequantize.cu"
    text = (CSRC / "cuda" / "dequantize.cu").read_text()
    changed.write_text(text.replace('#include "cuda/device.h"', f'#include "{tmp_path / "device.h"}"'))
    (tmp_path / "device.h").write_text(careless)
    assert any(operation.startswith("fma") for operation in _float_operations(changed, tmp_path))


CONVERSIONS = {
    "floats_to_halves<DType::bfloat16>(a, b)": "bits(__floats2bfloat162_rn(a, b))",
    "floats_to_halves<DType::float16>(a, b)": "bits(__floats2half2_rn(a, b))",
    "bits(half_to_float<DType::float16>(word, 0))": "bits(__half2float(__ushort_as_half(word & 0xFFFF)))",
    "bits(half_to_float<DType::float16>(word, 1))": "bits(__half2float(__ushort_as_half(word >> 16)))",
}
"""Our functions, whose PTX no emulator runs, and CUDA's own."""

SOURCE = """
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include "cuda/device.h"
using namespace peftkern;
using namespace peftkern::cuda;
template <class T> __device__ uint32_t bits(T value) { return *reinterpret_cast<uint32_t*>(&value); }
__global__ void convert(float a, float b, uint32_t word, uint32_t* out) { *out = EXPRESSION; }
__global__ void store(uint4 words, uint4* out) { STORE; }
"""


def _machine_code(folder: Path, expression: str, store: str) -> list[str]:
    file = folder / "conversion.cu"
    file.write_text(SOURCE.replace("EXPRESSION", expression).replace("STORE", store))
    text = _run(DISASSEMBLER, "-sass", _compile(folder, file, ARCHITECTURES[0], "cubin"))
    return re.findall(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", text)


@pytest.mark.parametrize("expression", CONVERSIONS)
def test_inline_ptx_becomes_what_cudas_own_functions_become(tmp_path: Path, expression: str) -> None:
    ours = _machine_code(tmp_path, expression, "store_16_bytes(out, words)")
    assert ours == _machine_code(tmp_path, CONVERSIONS[expression], "*out = words")
    assert ours != _machine_code(tmp_path, expression.replace("a, b", "b, a").replace("word", "~word"), "*out = words")
