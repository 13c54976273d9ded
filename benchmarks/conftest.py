"""The fixture that lets pytest-benchmark time our side while the peer runs between its rounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from peftkern.bench import Case, Measurement
from peftkern.bench.case import seconds_of
from peftkern.bench.result import Quantity, summarise

ROUNDS = 15

Compare = Callable[..., None]
Record = Callable[[Callable[[], list[Measurement]]], None]


@pytest.fixture
def compare(benchmark: BenchmarkFixture) -> Compare:
    """Check a case, then time peer, ours, peer, ours, ...; the peer's median and the ratio go into ``extra_info``."""

    def run(case: Case, rounds: int = ROUNDS) -> None:
        case.check()
        peer_seconds: list[float] = []
        benchmark.pedantic(
            case.ours, setup=lambda: peer_seconds.append(seconds_of(case.peer)), rounds=rounds, warmup_rounds=1
        )
        our_seconds = list(benchmark.stats.stats.data)
        measured = peer_seconds[-len(our_seconds) :]  # without the warm-up
        result = summarise(benchmark.name, case.case, "s", Quantity.TIME, our_seconds, measured)
        benchmark.extra_info.update(
            peer_median_seconds=statistics.median(measured), ratio=result.ratio, min=result.min, max=result.max
        )

    return run


@pytest.fixture
def record(benchmark: BenchmarkFixture) -> Record:
    """Run what measures something other than time once, and put its rows into ``extra_info``."""

    def run(measure: Callable[[], list[Measurement]]) -> None:
        for item in benchmark.pedantic(measure, rounds=1):
            result = summarise(benchmark.name, item.case, item.unit, item.quantity, item.ours, item.peer)
            benchmark.extra_info[item.case] = {"ours": result.ours, "peer": result.peer, "ratio": result.ratio}

    return run
