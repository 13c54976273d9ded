"""The build where there is no compiler: it succeeds, loudly, unless the native module is required."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    for name in ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "peftkern").mkdir()
    shutil.copy(ROOT / "peftkern" / "_version.py", folder / "peftkern")
    (folder / "peftkern" / "__init__.py").touch()
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", "lib", "--build-temp", "temp"]
    environment = {**os.environ, "CXX": "/bin/false", "PEFTKERN_REQUIRE_NATIVE": "0", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_without_a_compiler_the_install_goes_on_and_says_so(tmp_path: Path) -> None:
    result = build(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "native CPU kernels could not be built" in result.stderr
    assert "reference backend" in result.stderr and "peftkern doctor" in result.stderr
    assert not list(tmp_path.rglob("_cpu*.so"))


def test_a_required_native_module_fails_the_install(tmp_path: Path) -> None:
    assert build(tmp_path, PEFTKERN_REQUIRE_NATIVE="1").returncode != 0
