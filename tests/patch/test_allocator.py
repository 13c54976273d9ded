"""Freed memory goes back to the system once it was asked to; in a process of its own, for it cannot be undone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from peftkern import allocator

PROGRAM = """
import runpy, sys
module = runpy.run_path(sys.argv[1])
assert module["return_freed_memory"](1 << 20)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
before = resident()
kept, freed = [], []
for _ in range(40):
    freed.append(bytearray(2 << 20)); kept.append(bytearray(100))
full = resident()
del freed
print(full - before, resident() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_freed_memory_is_returned() -> None:
    command = [sys.executable, "-c", PROGRAM, str(Path(allocator.__file__))]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    full, left = map(float, output.split())
    assert full >= 80 and left <= 10


def test_nothing_is_done_where_there_is_no_such_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "other")
    assert not allocator.return_freed_memory()


def test_bad_threshold() -> None:
    with pytest.raises(ValueError, match="threshold_bytes must be positive, got 0"):
        allocator.return_freed_memory(0)
