"""Executes every Triton kernel: the tests of ``tests/gpu``, on a GPU or, without one, on the CPU.

Without a GPU ttsem runs all of them, and Triton's interpreter a sample as a second opinion; where ttsem cannot be
imported the interpreter runs all of them. Each executor needs processes of its own. Something runs, or this fails.

    python tests/gpu_offline/execute.py [--jobs N] [arguments of pytest]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

TESTS = Path(__file__).parents[1] / "gpu"
KERNELS = Path(__file__).parents[2] / "peftkern" / "backends" / "triton"
SAMPLE = 7
"""The interpreter runs one test in this many of each file; prime, so that it meets every value of a parameter."""

NOT_CHECKED = "too large to be checked for races"
"""What ttsem writes about launches whose race check it left out."""


@dataclass(frozen=True)
class Run:
    """One process of pytest: the module that starts it, its options and what it adds to the environment."""

    title: str
    module: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, arguments: list[str]) -> list[str]:
        return [sys.executable, "-m", *self.module, *self.options, *arguments]


@dataclass(frozen=True)
class Outcome:
    run: Run
    output: str
    code: int
    seconds: float

    def complaint(self) -> str | None:
        if self.code != 0:
            return f"exit code {self.code}"
        return "a launch was not checked for races" if NOT_CHECKED in self.output else None

    def kernels(self) -> set[str]:
        """Names of the kernels that it executed."""
        return {
            name
            for names in re.findall(r"^kernels executed: (.*)$", self.output, re.MULTILINE)
            for name in names.split()
        }


def all_kernels() -> set[str]:
    """Names of the kernels of the Triton backend."""
    return {
        name
        for path in KERNELS.glob("*.py")
        for name in re.findall(r"^@triton\.jit\ndef (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }


def imports(statement: str) -> bool:
    """Whether another process of this Python can do ``statement``."""
    return subprocess.run([sys.executable, "-c", statement], capture_output=True).returncode == 0


def parts(run: Run, count: int) -> list[Run]:
    """The same run, its tests shared by ``count`` processes."""
    shares = [f"{number}/{count}" for number in range(1, count + 1)]
    return [
        Run(f"{run.title}, part {share}", run.module, (*run.options, f"--part={share}"), run.environment)
        for share in shares
    ]


TTSEM = Run("ttsem", ("ttsem.sanitize", "pytest"), environment={"TRITON_DEFAULT_FP_FUSION": "1"})
INTERPRETER = Run("interpreter", ("pytest",), environment={"TRITON_INTERPRET": "1"})
SECOND_OPINION = Run("interpreter, a sample", ("pytest",), (f"--sample={SAMPLE}",), INTERPRETER.environment)


def plan(jobs: int) -> list[Run]:
    """What to run here.

    Raises:
        SystemExit: nothing can execute a kernel here.
    """
    if imports("import torch; assert torch.cuda.is_available()"):
        return [Run("GPU", ("pytest",))]
    if imports("import ttsem.sanitize"):
        return [*parts(TTSEM, jobs), SECOND_OPINION]
    if imports("import triton.runtime.interpreter"):
        print("ttsem cannot be imported: the interpreter executes all kernels, without checks of bounds and races")
        return parts(INTERPRETER, jobs)
    raise SystemExit("no GPU, and neither ttsem nor triton can be imported: nothing here can execute a Triton kernel")


def execute(run: Run, arguments: list[str]) -> Outcome:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # One thread a process: the processes share the processors, and PyTorch's part of the work is small.
    environment |= {"OMP_NUM_THREADS": "1"} | run.environment
    began = time.monotonic()
    result = subprocess.run(
        run.command(["-rs", "-p", "no:cacheprovider", *arguments]),
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return Outcome(run, result.stdout, result.returncode, time.monotonic() - began)


def missing_kernels(outcomes: list[Outcome]) -> str | None:
    """What to complain about if these runs, all tests together, left a kernel out."""
    missing = all_kernels() - set().union(*(outcome.kernels() for outcome in outcomes))
    return f"no test executes {', '.join(sorted(missing))}" if missing else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))), help="processes at a time")
    options, arguments = parser.parse_known_args()
    chosen = list(arguments)
    if not any(Path(argument.split("::")[0]).exists() for argument in arguments):
        arguments.append(str(TESTS))
    outcomes = []
    with ThreadPoolExecutor(options.jobs) as pool:
        for outcome in pool.map(lambda run: execute(run, arguments), plan(options.jobs)):
            print(f"== {outcome.run.title}: {outcome.seconds:.0f} s\n{outcome.output}", flush=True)
            outcomes.append(outcome)
    complaints = [f"{o.run.title}: {complaint}" for o in outcomes if (complaint := o.complaint()) is not None]
    if not chosen and (missing := missing_kernels(outcomes)) is not None:
        complaints.append(missing)
    for complaint in complaints:
        print(f"FAILED {complaint}")
    return 1 if complaints else 0


if __name__ == "__main__":
    sys.exit(main())
