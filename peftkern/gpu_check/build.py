"""Builds the native modules of the checkout in place, for this GPU alone."""

from __future__ import annotations

import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from peftkern.gpu_check.processes import Finished, run

MODULES = ("_cpu", "_cuda")
FOLDER = Path("build") / "gpu-check"
"""For what lies between sources and modules."""


@dataclass(frozen=True)
class Build:
    """What came of it: seconds, why it failed if it did, and which modules can be found now."""

    seconds: float
    failure: str | None
    modules: tuple[str, ...]


def command(folder: Path) -> list[str]:
    """The command that builds; ``folder`` is for what lies between."""
    return [sys.executable, "setup.py", "build_ext", "--inplace", "--build-temp", str(folder)]


def build(root: Path, folder: Path, capability: tuple[int, int], timeout: float) -> Build:
    """Build in ``root``; modules that cannot be built are reported, and what needs them fails later by itself."""
    major, minor = capability
    start = time.monotonic()
    done = run(command(folder), root, timeout, {"PEFTKERN_CUDA_ARCHITECTURES": f"{major}{minor}-real"})
    importlib.invalidate_caches()
    found = tuple(name for name in MODULES if importlib.util.find_spec(f"peftkern.{name}") is not None)
    return Build(time.monotonic() - start, _failure(done, timeout, found), found)


def _failure(done: Finished, timeout: float, found: tuple[str, ...]) -> str | None:
    if done.code is None:
        return f"not done after {timeout:.0f} s"
    absent = [name for name in MODULES if name not in found]
    if done.code == 0 and not absent:
        return None
    return f"without {', '.join(absent) or 'an end'}: {done.tail()}"
