"""Counted benchmarks: spills, instructions per decoded weight, tensor-core instructions. No GPU takes part.

There is no peer to count. Beside each figure of ours stands the one that it has to reach.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from peftkern.backends.triton.paths import Path
from peftkern.backends.triton.specializations import Case, Specialization, specializations
from peftkern.bench.aot import sass
from peftkern.bench.aot.compile import Compiled, compile_for
from peftkern.bench.aot.resources import compile_everything, per_weight
from peftkern.bench.case import Measurement
from peftkern.bench.errors import BenchError
from peftkern.bench.result import Quantity

TILE = {"BLOCK_TOKENS": 128, "BLOCK_OUT": 128, "BLOCK_IN": 64}
WARPS = 8

INSTRUCTION_LIMITS = {80: 10.6, 90: 9.3}
"""Instructions per weight of the best exact way to decode that is known for this tile, by architecture."""

TENSOR_CORE_KINDS = {80: "mma", 86: "mma", 89: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
"""The tensor-core instruction of each architecture with the highest rate."""

_BYTES_PER_LOAD = 16
_LOADED_BYTES = TILE["BLOCK_TOKENS"] * TILE["BLOCK_IN"] * 2 + TILE["BLOCK_OUT"] * TILE["BLOCK_IN"] // 2
"""bfloat16 x and 4-bit codes of one turn of the loop."""


def nf4_product(architecture: int) -> Specialization:
    """The forward product of an NF4 weight in bfloat16, decoded inside, in tiles of 128 x 128 x 64 by 8 warps."""
    (found,) = (
        one for one in specializations(architecture, [Case("nf4", Path.FUSED)], []) if one.kernel == "product_kernel"
    )
    names = list(found.signature)
    constants = dict(found.constants)
    for name, value in TILE.items():
        constants[(names.index(name),)] = value
    return replace(found, constants=constants, num_warps=WARPS)


def spills() -> Iterator[Measurement]:
    """Measurements of ``aot-spills``.

    Raises:
        BenchError: a kernel does not compile.
    """
    report = compile_everything()
    if report.errors:
        raise BenchError("; ".join(report.errors))
    rows = list(report.rows.values())
    nothing = [0.0] * len(rows)
    subject = f"worst of {len(rows)} kernels"
    spilled = [float(row.spills) for row in rows]
    yield Measurement(f"spilled registers, {subject}", "instructions", Quantity.DIFFERENCE, spilled, nothing)
    local = [float(row.local_memory) for row in rows]
    yield Measurement(f"local memory, {subject}", "bytes/thread", Quantity.DIFFERENCE, local, nothing)


def instructions() -> Iterator[Measurement]:
    """Measurements of ``aot-instructions``."""
    for architecture, limit in INSTRUCTION_LIMITS.items():
        specialization = nf4_product(architecture)
        compiled = compile_for(specialization, architecture)
        counted = per_weight(specialization, compiled)
        assert counted is not None
        subject = f"sm_{architecture}, 128 x 128 x 64, {WARPS} warps"
        yield Measurement(subject, "instructions/weight", Quantity.COUNT, [counted], [limit])
        wide = _wide_bytes(compiled) / _LOADED_BYTES
        yield Measurement(f"{subject}, loads of 128 bits", "share of bytes", Quantity.SHARE, [wide], [1.0])


def _wide_bytes(compiled: Compiled) -> int:
    """Bytes that one turn of the main loop loads 16 at a time."""
    loads = sass.global_load_widths(compiled.program.main_loop)
    return loads.get(8 * _BYTES_PER_LOAD, 0) * _BYTES_PER_LOAD * compiled.threads


def tensor_core() -> Iterator[Measurement]:
    """Measurements of ``aot-tensorcore``."""
    for architecture, kind in TENSOR_CORE_KINDS.items():
        counts = sass.tensor_core_counts(compile_for(nf4_product(architecture), architecture).program.main_loop)
        present = float(counts.get(kind, 0) > 0)
        yield Measurement(f"sm_{architecture}, {kind}", "present", Quantity.SHARE, [present], [1.0])
