"""The build where a compiler is missing or fails: it goes on, loudly, unless the native modules are required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

PRETENCE = """
cmake_minimum_required(VERSION 3.20)
project(pretence LANGUAGES NONE)
if(CMAKE_CUDA_COMPILER MATCHES "broken")
  message(FATAL_ERROR "the CUDA compiler is broken")
endif()
set(folder "${CMAKE_LIBRARY_OUTPUT_DIRECTORY}")
string(REPLACE ";" "_" architectures "${CMAKE_CUDA_ARCHITECTURES}")
add_custom_target(_cpu COMMAND ${CMAKE_COMMAND} -E touch "${folder}/_cpu.cuda_${PEFTKERN_CUDA}.so")
add_custom_target(_cuda COMMAND ${CMAKE_COMMAND} -E touch "${folder}/_cuda.for_${architectures}.so")
"""
"""Takes the place of CMakeLists.txt, and makes empty modules whose names tell how they were asked for."""


def build(folder: Path, pretend: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    if pretend:
        (folder / "CMakeLists.txt").write_text(PRETENCE)
    (folder / "peftkern").mkdir()
    shutil.copy(ROOT / "peftkern" / "_version.py", folder / "peftkern")
    (folder / "peftkern" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    unset = {"PEFTKERN_SANITIZE": "OFF", "PEFTKERN_CUDA_ARCHITECTURES": "", "PEFTKERN_REQUIRE_NATIVE": "0"}
    environment = {**os.environ, **unset, **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def modules(folder: Path) -> set[str]:
    return {file.name for file in (folder / "lib").rglob("*.so")}


@pytest.fixture
def path_without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("bin")
    for program in ("cmake", "make", "ninja", "sh", "env"):
        if (found := shutil.which(program)) is not None:
            (folder / program).symlink_to(found)
    return str(folder)


# ---- CPU


def test_without_a_compiler_the_install_goes_on_and_says_so(tmp_path: Path) -> None:
    result = build(tmp_path, CXX="/bin/false")
    assert result.returncode == 0, result.stderr
    assert "native CPU kernels could not be built" in result.stderr
    assert "reference backend" in result.stderr and "peftkern doctor" in result.stderr
    assert not list(tmp_path.rglob("_cpu*.so"))


def test_a_required_native_module_fails_the_install(tmp_path: Path) -> None:
    assert build(tmp_path, CXX="/bin/false", PEFTKERN_REQUIRE_NATIVE="1").returncode != 0


# ---- CUDA


def test_without_nvcc_the_cpu_module_is_built_and_the_other_left_out(tmp_path: Path, path_without_nvcc: str) -> None:
    absent = {"PATH": path_without_nvcc, "CUDACXX": "", "CUDA_HOME": str(tmp_path)}
    result = build(tmp_path, pretend=True, PEFTKERN_REQUIRE_NATIVE="1", **absent)
    assert result.returncode == 0, result.stderr
    assert "no nvcc, so no CUDA kernels" in result.stderr
    assert modules(tmp_path) == {"_cpu.cuda_OFF.so"}


def test_an_nvcc_that_fails_leaves_the_cpu_module_as_it_is(tmp_path: Path) -> None:
    result = build(tmp_path, pretend=True, CUDACXX="/broken/nvcc")
    assert result.returncode == 0, result.stderr
    assert "CUDA kernels could not be built" in result.stderr
    assert "native CPU kernels" not in result.stderr
    assert modules(tmp_path) == {"_cpu.cuda_OFF.so"}


def test_an_nvcc_that_fails_fails_an_install_that_requires_native_modules(tmp_path: Path) -> None:
    assert build(tmp_path, pretend=True, CUDACXX="/broken/nvcc", PEFTKERN_REQUIRE_NATIVE="1").returncode != 0


@pytest.mark.parametrize("architectures", ["", "90", "80-real;90"])
def test_both_modules_are_built_for_the_architectures_that_are_asked_for(tmp_path: Path, architectures: str) -> None:
    result = build(tmp_path, pretend=True, CUDACXX="/some/nvcc", PEFTKERN_CUDA_ARCHITECTURES=architectures)
    assert result.returncode == 0, result.stderr
    assert modules(tmp_path) == {"_cpu.cuda_OFF.so", f"_cuda.for_{architectures.replace(';', '_')}.so"}


def test_sanitizers_are_for_the_cpu_module(tmp_path: Path) -> None:
    result = build(tmp_path, pretend=True, CUDACXX="/some/nvcc", PEFTKERN_SANITIZE="ON")
    assert result.returncode == 0, result.stderr
    assert modules(tmp_path) == {"_cpu.cuda_OFF.so"}
