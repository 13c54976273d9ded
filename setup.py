"""Builds the native modules with CMake: one for CPUs, and one for NVIDIA GPUs where there is a CUDA compiler.

Where that is impossible the package still installs, with the backends that are left, and says so.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CPU, CUDA = "peftkern._cpu", "peftkern._cuda"

CONSEQUENCES = {
    CPU: "the native CPU kernels could not be built ({error}).\n"
    "The install goes on with the reference backend, which is correct and many times slower.\n"
    "Install a C++17 compiler and reinstall; `peftkern doctor` says what is in use.",
    CUDA: "the CUDA kernels could not be built ({error}).\n"
    "The install goes on; on a GPU the Triton kernels run instead. If the CUDA compiler does not know some GPU, name\n"
    "yours, as in PEFTKERN_CUDA_ARCHITECTURES=90, and reinstall; `peftkern doctor` says what is in use.",
}


def cuda_compiler() -> str | None:
    """nvcc: the one named by ``CUDACXX``, on the path, in ``CUDA_HOME`` or in its usual folder."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


class CMakeBuild(build_ext):
    """Runs CMake for each extension. ``PEFTKERN_REQUIRE_NATIVE=1`` turns a failed build into a failed install.

    ``PEFTKERN_CUDA_ARCHITECTURES`` narrows what the CUDA kernels are built for: "90", or a list such as "80-real;90".
    """

    def run(self) -> None:
        # Not through build_ext.run, which would look for a compiler of setuptools' own.
        for extension in self.extensions:
            try:
                self._build(extension)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("PEFTKERN_REQUIRE_NATIVE") == "1":
                    raise
                message = CONSEQUENCES[extension.name].format(error=error)
                print("*" * 80, f"peftkern: {message}", "*" * 80, sep="\n", file=sys.stderr)

    def _build(self, extension: Extension) -> None:
        sanitize = os.environ.get("PEFTKERN_SANITIZE", "OFF")
        options = ["-DPEFTKERN_CUDA=OFF"]
        if extension.name == CUDA:
            if sanitize != "OFF":
                return
            compiler = cuda_compiler()
            if compiler is None:
                print("peftkern: no nvcc, so no CUDA kernels; on a GPU the Triton kernels run instead", file=sys.stderr)
                return
            options = [f"-DCMAKE_CUDA_COMPILER={compiler}"]
            if architectures := os.environ.get("PEFTKERN_CUDA_ARCHITECTURES"):
                options.append(f"-DCMAKE_CUDA_ARCHITECTURES={architectures}")
        self._run_cmake(extension, [*options, f"-DPEFTKERN_SANITIZE={sanitize}"])

    def _run_cmake(self, extension: Extension, options: list[str]) -> None:
        import pybind11

        module = extension.name.rpartition(".")[2]
        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve() / f"cmake{module}"
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(ROOT),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            *options,
        ]
        subprocess.run(configure, cwd=build, check=True)
        jobs = str(os.cpu_count() or 1)
        subprocess.run(["cmake", "--build", ".", "--target", module, "--parallel", jobs], cwd=build, check=True)


setup(
    ext_modules=[Extension(CPU, sources=[], optional=True), Extension(CUDA, sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
