"""Builds the sources in ``csrc/cuda`` for the host, to be run by the emulator in ``cuda_emulator``."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from peftkern.backends import cuda

PROJECT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNELS = tuple(sorted((PROJECT / "csrc" / "cuda").glob("*.cu")))
BINDINGS = PROJECT / "csrc" / "bindings_cuda.cpp"
SCHEDULER = EMULATOR / "emulator.cpp"

MISSING = (
    None
    if shutil.which("g++") and platform.machine() == "x86_64"
    else "the emulator of CUDA kernels needs g++ on an x86-64 processor"
)

PLAIN, ADDRESSES, THREADS = "plain", "addresses", "threads"
MODES = {
    PLAIN: (),
    ADDRESSES: ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    THREADS: ("-g", "-fsanitize=thread"),
}
"""How a program is built: as it is, with AddressSanitizer and UBSan, or with ThreadSanitizer."""

ORDERS = ("forward", "reverse", "greedy", "greedy_reverse", "random")
"""As in cuda_emulator/emulator.h."""

_SCHEDULER_MODES = {PLAIN: (), ADDRESSES: ("-DEMULATOR_ADDRESS_SANITIZER",), THREADS: ("-DEMULATOR_THREAD_SANITIZER",)}

_FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # a CUDA compiler does not make use of it
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    f"-I{EMULATOR / 'include'}",
    f"-I{EMULATOR}",
    f"-I{PROJECT / 'csrc'}",
    f"-I{PROJECT / 'csrc' / 'include'}",
)

_SANITIZER_OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:atexit_sleep_ms=0"}


# ---- building


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cuda_emulator_")


def _run_compiler(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def _flags(source: Path, mode: str) -> tuple[str, ...]:
    if source == SCHEDULER:  # its bookkeeping is none of the kernels'
        return _SCHEDULER_MODES[mode]
    if source != BINDINGS:
        return MODES[mode]
    import pybind11

    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    return (*MODES[mode], *includes, "-fvisibility=hidden", '-DPEFTKERN_CUDA_ARCHITECTURES="80"')


@cache
def _compile(source: Path, mode: str) -> Path:
    target = Path(_folder().name) / f"{source.parent.name}.{source.stem}.{mode}.o"
    _run_compiler(["g++", *_FLAGS, *_flags(source, mode), "-x", "c++", "-c", str(source), "-o", str(target)])
    return target


def _build(name: str, mode: str, sources: tuple[Path, ...], *options: str) -> Path:
    target = Path(_folder().name) / f"{name}.{mode}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, mode), (*sources, SCHEDULER)))
    _run_compiler(["g++", "-pthread", *MODES[mode], *options, *map(str, objects), "-o", str(target)])
    return target


# ---- programs


@cache
def planted_bugs(mode: str) -> Path:
    """The program of ``cuda_emulator/planted_bugs.cpp``."""
    return _build("planted_bugs", mode, (EMULATOR / "planted_bugs.cpp",))


@cache
def every_kernel(mode: str, changed: Path | None = None) -> Path:
    """The program of ``cuda_emulator/every_kernel.cpp``; ``changed`` takes the place of the kernels of its name."""
    kernels = tuple(changed if changed is not None and changed.name == file.name else file for file in KERNELS)
    return _build("every_kernel", mode, (EMULATOR / "every_kernel.cpp", *kernels))


def run(
    program: Path, *arguments: object, order: str = "forward", seed: int = 1, workers: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs a program; what a sanitizer finds is in its exit code and its standard error."""
    command = [str(program), *map(str, (*arguments, ORDERS.index(order), seed, workers))]
    return subprocess.run(command, env=os.environ | _SANITIZER_OPTIONS, capture_output=True, text=True)


# ---- the module


@cache
def module_file() -> Path:
    """The native module ``_cuda``, its bindings included, with every kernel emulated."""
    return _build("_cuda", PLAIN, (BINDINGS, *KERNELS), "-shared")


def load(file: Path) -> ModuleType:
    """A module of :func:`module_file` in this process."""
    loader = ExtensionFileLoader("_cuda", str(file))
    spec = importlib.util.spec_from_file_location("_cuda", str(file), loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def use(file: Path, set_attribute: Callable[[Any, str, Any], None] = setattr) -> ModuleType:
    """Let the CUDA backend run the module ``file`` on CPU tensors, which it takes for a GPU's."""
    module = load(file)
    set_attribute(cuda, "_load", lambda: (module, None))
    set_attribute(cuda, "_place", lambda _tensor: (0, 0))
    set_attribute(cuda, "_objection", lambda _tensor: None)
    return module


def set_options(file: Path, order: str = "forward", seed: int = 1, workers: int = 1, first_block: int = 0) -> None:
    """How the module ``file`` runs what is launched from now on: ``cuda_emulator/emulator.h``."""
    options = (ctypes.c_int(ORDERS.index(order)), ctypes.c_uint64(seed), ctypes.c_int(workers))
    ctypes.CDLL(str(file)).emulator_set_options(*options, ctypes.c_int64(first_block))
