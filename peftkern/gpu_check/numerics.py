"""All tests of ``tests/gpu`` on the GPU, shared by several processes."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from peftkern.gpu_check.processes import Finished, run_shares

TESTS = Path("tests") / "gpu"
_ARGUMENTS = ("-m", "pytest", str(TESTS), "-q", "-rfE", "-p", "no:cacheprovider", "--part")
_COUNT = re.compile(r"(\d+) (passed|failed|error|errors|skipped|xfailed|xpassed)\b")
_NOTHING_TO_DO = 5
"""Exit code of pytest where a share holds no test."""


@dataclass(frozen=True)
class Numerics:
    """How many tests ended how, the ones that failed, and the processes that did not end well."""

    seconds: float
    counts: dict[str, int]
    failures: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Whether tests ran, and none failed."""
        return not self.failures and self.counts.get("passed", 0) > 0


def run(root: Path, processes: int, timeout: float, log: Path) -> Numerics:
    """Run the tests of the checkout ``root``; ``log`` is written with all that processes with failures printed."""
    start = time.monotonic()
    finished = run_shares(_ARGUMENTS, processes, root, timeout)
    log.write_text("\n".join(one.output for one in finished if one.code != 0), encoding="utf-8")
    return summarise(finished, time.monotonic() - start)


def summarise(finished: list[Finished], seconds: float) -> Numerics:
    """Add up what the processes of pytest printed."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    for number, process in enumerate(finished, 1):
        lines = process.output.strip().splitlines()
        for count, outcome in _COUNT.findall(lines[-1] if lines else ""):
            counts["error" if outcome == "errors" else outcome] += int(count)
        named = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        failures += named
        if process.code is None:
            failures.append(f"share {number} of {len(finished)} was not done when time was up")
        elif process.code not in (0, _NOTHING_TO_DO) and not named:
            failures.append(
                f"share {number} of {len(finished)} ended with code {process.code}: {' | '.join(lines[-3:])}"
            )
    return Numerics(seconds, dict(counts), tuple(failures))
