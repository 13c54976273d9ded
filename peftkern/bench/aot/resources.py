"""The table of what every kernel uses, row by row, and the rules that a new compilation is held to.

The table is kept under version control. It depends on the version of Triton, whose compiler made the code: under
another one the rules that need no table hold all the same.
"""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from peftkern.backends.triton.specializations import (
    ENTRIES,
    ENTRY_VARIANTS,
    EVERY_TILE,
    TENSORS,
    VARIANTS,
    Specialization,
    decoded_weights,
    specializations,
)
from peftkern.bench.aot import sass
from peftkern.bench.aot.compile import ARCHITECTURES, SHARED_MEMORY_LIMITS, TENSOR_MEMORY_LIMIT, Compiled, compile_for
from peftkern.bench.errors import BenchError

Key = tuple[int, str]
"""Architecture and name of a specialization."""

GROWTH = 1.10
"""Registers and instructions may become this many times as many before somebody has to look."""

_MAY_GROW = ("registers", "instructions", "main_loop")
_NARROW = (8, 16)
_WIDE = 128


@dataclass(frozen=True)
class Row:
    """What one kernel uses on one architecture.

    Attributes:
        registers: of a thread.
        spills: loads and stores of registers that did not fit.
        local_memory: bytes of a thread.
        shared_memory: bytes of a block.
        tensor_memory: columns of a block.
        tensor_core: number of tensor-core instructions by kind.
        loads: number of loads from global memory by width in bits.
        instructions: of the whole kernel.
        main_loop: instructions of its main loop; 0 without tensor-core instructions.
        per_weight: instructions of all threads in the main loop for each weight that it decodes; ``None`` without any.
        source: digest of what it was compiled from.
    """

    registers: int
    spills: int
    local_memory: int
    shared_memory: int
    tensor_memory: int
    tensor_core: Mapping[str, int]
    loads: Mapping[int, int]
    instructions: int
    main_loop: int
    per_weight: float | None
    source: str


@dataclass(frozen=True)
class Table:
    """Rows, and the version of Triton that they were made with."""

    triton: str
    rows: Mapping[Key, Row]


def row_of(specialization: Specialization, compiled: Compiled) -> Row:
    """The row of one compiled kernel."""
    program = compiled.program
    return Row(
        program.registers,
        sass.spill_count(program.instructions),
        program.stack + program.local,
        compiled.shared_memory,
        compiled.tensor_memory,
        dict(sorted(sass.tensor_core_counts(program.instructions).items())),
        dict(sorted(sass.global_load_widths(program.instructions).items())),
        len(program.instructions),
        len(program.main_loop),
        per_weight(specialization, compiled),
        specialization.digest,
    )


def per_weight(specialization: Specialization, compiled: Compiled) -> float | None:
    """Instructions of all threads of a block in one turn of the main loop, for each weight that the turn decodes."""
    weights = decoded_weights(specialization)
    if weights == 0 or not compiled.program.main_loop:
        return None
    return round(len(compiled.program.main_loop) * compiled.threads / weights, 2)


# ---- compiling all of them


def work_for(architecture: int) -> list[tuple[Specialization, int]]:
    """What is to be compiled for one architecture.

    Every kernel and tile for each; what else kernels are compiled for, for one architecture with each kind of
    tensor-core instruction and each limit of shared memory.
    """
    cases = EVERY_TILE + VARIANTS if architecture in _WITH_VARIANTS else EVERY_TILE
    tensors = TENSORS + ENTRIES + ENTRY_VARIANTS if architecture in _WITH_VARIANTS else TENSORS[:1] + ENTRIES
    return [(one, architecture) for one in specializations(architecture, cases, tensors)]


_WITH_VARIANTS = (86, 90, 100)


@dataclass(frozen=True)
class Report:
    """Rows of what compiles, and the compiler's messages about what does not."""

    rows: Mapping[Key, Row]
    errors: Sequence[str]


def compile_everything(
    on_row: Callable[[Key, Row], None] = lambda _key, _row: None, known: Table | None = None
) -> Report:
    """Compile all shipped kernels for all architectures in two processes.

    Triton keeps what it has compiled in its cache folder, for this and later runs.

    Args:
        on_row: called with each row as it comes.
        known: rows that need no compilation where their source and Triton are still the same, which give the same
            code. One in ten of these is compiled nevertheless.
    """
    work = [pair for architecture in ARCHITECTURES for pair in work_for(architecture)]
    rows = {} if known is None else unchanged(work, known)
    work = [(one, architecture) for one, architecture in work if (architecture, one.name) not in rows]
    errors: list[str] = []
    with ProcessPoolExecutor(_WORKERS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for key, found in pool.map(_compile_row, work):
            if isinstance(found, str):
                errors.append(found)
                continue
            rows[key] = found
            on_row(key, found)
    return Report(rows, errors)


_SAMPLED = 10
"""One in this many unchanged rows is compiled."""


def unchanged(work: Sequence[tuple[Specialization, int]], known: Table) -> dict[Key, Row]:
    """The rows of ``known`` that are taken without a compilation."""
    if known.triton != triton_version():
        return {}
    found = {}
    for one, architecture in work:
        row = known.rows.get((architecture, one.name))
        if row is not None and row.source == one.digest and not _is_sampled(one, architecture):
            found[architecture, one.name] = row
    return found


def _is_sampled(one: Specialization, architecture: int) -> bool:
    return (int(one.digest, 16) + architecture) % _SAMPLED == 0


def triton_version() -> str:
    """Of the compiler that is installed."""
    import triton

    return str(triton.__version__)


_WORKERS = 2
"""Each takes about 600 MB."""


def _compile_row(work: tuple[Specialization, int]) -> tuple[Key, Row | str]:
    specialization, architecture = work
    key = (architecture, specialization.name)
    try:
        return key, row_of(specialization, compile_for(specialization, architecture))
    except BenchError as error:
        return key, str(error)


# ---- the rules


def broken_rules(key: Key, row: Row) -> list[str]:
    """What no kernel may do, whatever the table says."""
    limit = 1024 * SHARED_MEMORY_LIMITS[key[0]]
    found = []
    if row.spills or row.local_memory:
        found.append(f"{row.spills} loads and stores of spilled registers, {row.local_memory} bytes of local memory")
    if row.shared_memory > limit:
        found.append(f"{row.shared_memory} bytes of shared memory, of {limit} that there are")
    if row.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"{row.tensor_memory} columns of tensor memory, of {TENSOR_MEMORY_LIMIT} that there are")
    return [f"{_label(key)}: {problem}" for problem in found]


def regressions(key: Key, row: Row, expected: Row) -> list[str]:
    """What has become worse than the table says."""
    found = [
        f"{field} {getattr(row, field)}, was {getattr(expected, field)}"
        for field in _MAY_GROW
        if getattr(row, field) > GROWTH * getattr(expected, field)
    ]
    for kind, count in expected.tensor_core.items():
        if row.tensor_core.get(kind, 0) < count:
            found.append(f"{row.tensor_core.get(kind, 0)} {kind} instructions, was {count}")
    for width in _NARROW:
        if row.loads.get(width, 0) and not expected.loads.get(width, 0):
            found.append(f"{row.loads[width]} loads of {width} bits, was none")
    if row.loads.get(_WIDE, 0) < expected.loads.get(_WIDE, 0):
        found.append(f"{row.loads.get(_WIDE, 0)} loads of {_WIDE} bits, was {expected.loads[_WIDE]}")
    return [f"{_label(key)}: {problem}" for problem in found]


def problems(found: Mapping[Key, Row], expected: Mapping[Key, Row]) -> list[str]:
    """Everything that is wrong with ``found``: rules broken, regressions, rows that only one of the two has."""
    listed = [problem for key, row in found.items() for problem in broken_rules(key, row)]
    for key in found:
        if key in expected:
            listed += regressions(key, found[key], expected[key])
        else:
            listed.append(f"{_label(key)}: has no row in the table")
    return listed + [f"{_label(key)}: nothing is compiled for this row" for key in expected if key not in found]


def _label(key: Key) -> str:
    return f"sm_{key[0]} {key[1]}"


# ---- the file


def read_table(path: Path) -> Table:
    """Read what :func:`write_table` has written.

    Raises:
        BenchError: there is no such file.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}; --update writes it") from error
    rows = {
        (int(architecture), name): _row_from(values)
        for architecture, named in content["rows"].items()
        for name, values in named.items()
    }
    return Table(content["triton"], rows)


def _row_from(values: dict[str, object]) -> Row:
    loads = values.pop("loads")
    assert isinstance(loads, dict)
    return Row(**values, loads={int(width): count for width, count in loads.items()})  # type: ignore[arg-type]


def write_table(path: Path, table: Table) -> None:
    """Write one line per row, sorted, so that a change shows what it changed."""
    blocks = [_block(architecture, table) for architecture in sorted({key[0] for key in table.rows})]
    body = ",\n".join(blocks)
    path.write_text(f'{{\n"triton": {json.dumps(table.triton)},\n"rows": {{\n{body}\n}}\n}}\n', encoding="utf-8")


def _block(architecture: int, table: Table) -> str:
    names = sorted(name for found, name in table.rows if found == architecture)
    lines = [f"{json.dumps(name)}: {json.dumps(asdict(table.rows[architecture, name]))}" for name in names]
    return f'"{architecture}": {{\n' + ",\n".join(lines) + "\n}"
