"""Builds the native module with CMake.

Where that is impossible the package still installs, with the reference backend, and says so.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Runs CMake for the one extension. ``PEFTKERN_REQUIRE_NATIVE=1`` turns a failed build into a failed install."""

    def run(self) -> None:
        # Not through build_ext.run, which would look for a compiler of setuptools' own.
        for extension in self.extensions:
            try:
                self._build(extension)
            except (OSError, subprocess.CalledProcessError) as error:
                if os.environ.get("PEFTKERN_REQUIRE_NATIVE") == "1":
                    raise
                self._explain(error)

    def _build(self, extension: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(extension.name)).resolve().parent
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        target.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            str(ROOT),
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DPEFTKERN_SANITIZE={os.environ.get('PEFTKERN_SANITIZE', 'OFF')}",
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", ".", "--parallel", str(os.cpu_count() or 1)], cwd=build, check=True)

    def _explain(self, error: Exception) -> None:
        message = (
            f"peftkern: the native CPU kernels could not be built ({error}).\n"
            "The install goes on with the reference backend, which is correct and many times slower.\n"
            "Install a C++17 compiler and reinstall; `peftkern doctor` says what is in use."
        )
        print("*" * 80, message, "*" * 80, sep="\n", file=sys.stderr)


setup(ext_modules=[Extension("peftkern._cpu", sources=[], optional=True)], cmdclass={"build_ext": CMakeBuild})
