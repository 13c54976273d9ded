"""Benchmarks with nothing behind them, in a module that a fresh process can import by name."""

from __future__ import annotations

import os
from collections.abc import Iterator

from peftkern.bench import BenchError, Case, DisagreementError, Effort, Measurement, Quantity

QUICK = Effort(minimum_pairs=2, maximum_pairs=2, seconds=0.0)


def agree() -> None:
    """Both sides compute the same thing."""


def disagree() -> None:
    raise DisagreementError("dX: relative difference 0.5, allowed 1e-5")


def timed_and_measured() -> Iterator[Case | Measurement]:
    yield Case("nothing at all", ours=int, peer=int, check=agree, unit="us", effort=QUICK)
    yield Measurement("made up", "MB", Quantity.MEMORY, [80.0, 90.0, 70.0], [100.0, 100.0, 100.0])


def wrong() -> Iterator[Case]:
    yield Case("wrong", ours=int, peer=int, check=disagree, effort=QUICK)


def variable(name: str) -> str | None:
    return os.environ.get(name)


def chatty() -> int:
    print("a library says hello on standard output")
    os.write(1, b"and once more, past Python\n")
    return 7


def dies() -> None:
    print("last words")
    os._exit(3)


def crashes() -> None:
    os.abort()


def refuses() -> Iterator[int]:
    yield 1
    raise BenchError("no such model")
