"""Run benchmarks, each setting of each in a fresh process, and hand over the rows as they come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from peftkern.bench import fresh_process
from peftkern.bench.case import Measurement, measure
from peftkern.bench.registry import Benchmark, Setting
from peftkern.bench.result import Quantity, Result, summarise


def run(benchmark: Benchmark) -> Iterator[Result]:
    """Rows of one benchmark, setting by setting.

    Raises:
        BenchError: a package of the peer's is missing, both sides disagree, or the process died.
    """
    for setting in benchmark.settings:
        yield from _run_setting(benchmark, setting)


def _run_setting(benchmark: Benchmark, setting: Setting) -> Iterator[Result]:
    suffix = f" ({setting.label})" if setting.label else ""
    arguments = {"cases": benchmark.cases}
    for value in fresh_process.stream("peftkern.bench.runner:measure_cases", arguments, setting.environment):
        yield summarise(
            benchmark.name,
            value["case"] + suffix,
            value["unit"],
            Quantity(value["quantity"]),
            value["ours"],
            value["peer"],
        )


def measure_cases(cases: str) -> Iterator[dict[str, Any]]:
    """Measure what the function ``"module:function"`` yields, in this process; fields of :class:`Measurement`."""
    for item in fresh_process.resolve(cases)():
        measurement = item if isinstance(item, Measurement) else measure(item)
        yield asdict(measurement)
