"""Compile specializations for an architecture without a GPU, and read from the machine code what they use."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from peftkern.backends.triton.specializations import Specialization
from peftkern.bench.aot import sass
from peftkern.bench.errors import BenchError

SHARED_MEMORY_LIMITS = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that one block may have, in KiB, by architecture (CUDA programming guide, compute capabilities)."""

ARCHITECTURES = tuple(SHARED_MEMORY_LIMITS)

TENSOR_MEMORY_LIMIT = 512
"""Columns of tensor memory of one multiprocessor of sm_100."""


@dataclass(frozen=True)
class Compiled:
    """A kernel's machine code, and what a block of it takes.

    Attributes:
        program: its instructions.
        shared_memory: bytes.
        tensor_memory: columns.
        threads: of a block.
    """

    program: sass.Program
    shared_memory: int
    tensor_memory: int
    threads: int


def compile_for(specialization: Specialization, architecture: int) -> Compiled:
    """Compile for ``architecture``, 80 for sm_80, and take the code apart.

    Raises:
        BenchError: it does not compile; the message has the compiler's.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", architecture, 32)
    try:
        kernel: Any = triton.compile(specialization.source(), target=target, options=specialization.options)
    except Exception as error:  # whatever the compiler raises: the reader needs to know for what
        raise BenchError(f"{specialization.name} does not compile for sm_{architecture}: {error}") from error
    metadata = kernel.metadata
    program = sass.parse(_disassemble(kernel.asm["cubin"]))
    return Compiled(program, metadata.shared, metadata.tmem_size, 32 * metadata.num_warps)


def _disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_disassembler()), "-sass", "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchError(f"{_disassembler()} failed: {done.stderr.strip()}")
    return done.stdout


@cache
def _disassembler() -> Path:
    """Triton's own copy, whose version fits its compiler's."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
