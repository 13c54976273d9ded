"""Processes with a time limit, alone or several side by side. Whatever they start is ended with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO


@dataclass(frozen=True)
class Finished:
    """A process that has ended; ``code`` is ``None`` if it was ended because time was up."""

    code: int | None
    output: str

    def tail(self, lines: int = 15) -> str:
        """The last lines that it wrote."""
        return "\n".join(self.output.strip().splitlines()[-lines:])


def run(command: Sequence[str], folder: Path, timeout: float, environment: Mapping[str, str] | None = None) -> Finished:
    """Run one command in ``folder``, with ``environment`` on top of this process's own."""
    return _Running(command, folder, {**os.environ, **(environment or {})}).finish(time.monotonic() + timeout)


def run_shares(arguments: Sequence[str], count: int, folder: Path, timeout: float) -> list[Finished]:
    """Run ``python ARGUMENTS I/N`` for every share I of ``count``, side by side, in ``folder``.

    Each has one thread: together they have as many as there are processors for.
    """
    end = time.monotonic() + timeout
    command = [sys.executable, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [_Running([*command, f"{number}/{count}"], folder, environment) for number in range(1, count + 1)]
    return [one.finish(end) for one in running]


class _Running:
    """Writes to a file: a pipe that nobody reads yet would fill and hold the process up."""

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
        self._output: IO[str] = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115  closed by `finish`
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to be ended as a whole
        )

    def finish(self, end: float) -> Finished:
        code: int | None
        try:
            code = self._process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        with self._output as output:
            output.seek(0)
            return Finished(code, output.read())
