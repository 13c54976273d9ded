"""Call a function in a fresh process under given environment variables, and read what it returns or yields.

The allocator's settings are read once, when a process starts, and a process's peak memory never falls again; so
cases that differ in the first, or measure the second, need a process of their own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from peftkern.bench.errors import BenchError

_ALLOCATOR_PREFIXES = ("MALLOC_", "GLIBC_TUNABLES")
_NO_PROGRESS_BARS = {"TQDM_DISABLE": "1"}  # they would push an error out of the last output, which is what is shown
_ERROR_CHARACTERS = 3000

# The new process must run this very package, also where it was found through the working folder, and not another
# version that is installed as well.
_PACKAGE_ROOT = str(Path(__file__).resolve().parents[2])
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from peftkern.bench.fresh_process import main; main()"


def stream(function: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[Any]:
    """Values that ``function`` yields (or the one that it returns) in a fresh process, as they come.

    Args:
        function: ``"module:function"``, importable in the new process.
        arguments: keyword arguments, anything that JSON can hold; so must be the values that come back.
        environment: variables on top of this process's own, from which the allocator's are taken out first.

    Raises:
        BenchError: the function raised, or the process died.
    """
    command = [sys.executable, "-c", _PROGRAM, _PACKAGE_ROOT, function, json.dumps(arguments)]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as error_output,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=error_output, text=True, env=child_environment(environment)
        ) as process,
    ):
        finished = False
        try:
            assert process.stdout is not None
            for line in process.stdout:
                message = json.loads(line)
                if "error" in message:
                    raise BenchError(message["error"])
                yield message["value"]
            finished = True
        finally:
            if not finished:
                process.kill()
        if process.wait() != 0:
            raise BenchError(_describe_death(function, process.returncode, error_output))


def call(function: str, arguments: Mapping[str, Any], environment: Mapping[str, str]) -> Any:
    """The value that ``function`` returns in a fresh process; arguments and errors as in :func:`stream`."""
    (value,) = stream(function, arguments, environment)
    return value


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment without the allocator's variables and progress bars, and with ``extra`` on top."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(_ALLOCATOR_PREFIXES)}
    return {**inherited, **_NO_PROGRESS_BARS, **extra}


def resolve(function: str) -> Callable[..., Any]:
    """The function that ``"module:function"`` names."""
    module, _, attribute = function.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    return found


def _describe_death(function: str, code: int, error_output: IO[str]) -> str:
    error_output.seek(0)
    tail = error_output.read()[-_ERROR_CHARACTERS:].strip()
    ending = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"the process that ran {function} {ending}. Its last output:\n{tail}"


def main() -> None:
    """Run in the new process: call the function, write one JSON line per value to what was standard output."""
    _, _, function, arguments = sys.argv
    results = _claim_standard_output()
    try:
        returned = resolve(function)(**json.loads(arguments))
        for value in returned if inspect.isgenerator(returned) else [returned]:
            _write(results, {"value": value})
    except BenchError as error:
        _write(results, {"error": str(error)})


def _claim_standard_output() -> IO[str]:
    """A file on the pipe to the parent; whatever libraries print goes to standard error from here on."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return results


def _write(results: IO[str], message: Mapping[str, Any]) -> None:
    results.write(json.dumps(message) + "\n")
    results.flush()
