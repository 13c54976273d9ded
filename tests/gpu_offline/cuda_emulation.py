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
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

PROJECT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "cuda_emulator"
KERNELS = sorted((PROJECT / "csrc" / "cuda").glob("*.cu"))
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

_SCHEDULER_MODES = {PLAIN: (), ADDRESSES: ("-DEMULATOR_ADDRESS_SANITIZER",), THREADS: ("-DEMULATOR_THREAD_SANITIZER",)}

ORDERS = ("forward", "reverse", "greedy", "greedy_reverse", "random")
"""As in cuda_emulator/emulator.h."""

_FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-strict-aliasing",  # a CUDA compiler does not use it
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    f"-I{EMULATOR / 'include'}",
    f"-I{EMULATOR}",
    f"-I{PROJECT / 'csrc'}",
    f"-I{PROJECT / 'csrc' / 'include'}",
)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cuda_emulator_")


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"


def _compile(source: Path, mode: str, flags: tuple[str, ...]) -> Path:
    target = Path(_folder().name) / f"{source.stem}.{mode}.o"
    own = _SCHEDULER_MODES[mode] if source == SCHEDULER else MODES[mode]
    _run(["g++", *_FLAGS, *flags, *own, "-x", "c++", "-c", str(source), "-o", str(target)])
    return target


def _build(name: str, mode: str, sources: list[Path], flags: tuple[str, ...] = (), link: tuple[str, ...] = ()) -> Path:
    target = Path(_folder().name) / f"{name}.{mode}"
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(lambda source: _compile(source, mode, flags), [*sources, SCHEDULER]))
    _run(["g++", "-pthread", *MODES[mode], *link, *map(str, objects), "-o", str(target)])
    return target


@cache
def program(name: str, mode: str, with_kernels: bool = False) -> Path:
    """An executable of ``cuda_emulator/NAME.cpp``, with the emulator and perhaps the kernels of the project."""
    return _build(name, mode, [EMULATOR / f"{name}.cpp", *(KERNELS if with_kernels else [])])


def run(executable: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program; what a sanitizer finds is its exit code and its standard error."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    return subprocess.run(
        [str(executable), *map(str, arguments)], env=os.environ | options, capture_output=True, text=True, timeout=120
    )


@cache
def module() -> ModuleType:
    """The native module ``_cuda``, its bindings included, with every kernel emulated."""
    import pybind11

    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    flags = (*includes, '-DPEFTKERN_CUDA_ARCHITECTURES="80"', "-fvisibility=hidden")
    path = _build("_cuda", PLAIN, [PROJECT / "csrc" / "bindings_cuda.cpp", *KERNELS], flags, ("-shared",))
    loader = ExtensionFileLoader("_cuda", str(path))
    spec = importlib.util.spec_from_file_location("_cuda", str(path), loader=loader)
    assert spec is not None
    loaded = importlib.util.module_from_spec(spec)
    loader.exec_module(loaded)
    return loaded


def set_options(order: str = "forward", seed: int = 1, workers: int = 1, first_block: int = 0) -> None:
    """How :func:`module` runs what is launched from now on."""
    library = ctypes.CDLL(str(Path(_folder().name) / f"_cuda.{PLAIN}"))
    arguments = (ctypes.c_int(ORDERS.index(order)), ctypes.c_uint64(seed), ctypes.c_int(workers))
    library.emulator_set_options(*arguments, ctypes.c_int64(first_block))
