"""Benchmarks by name: every one times a peer and this package side by side, in the same run, on the same data.

``registry`` names the benchmarks, ``runner`` runs them, and the files called after a benchmark hold its cases. The
command ``peftkern bench`` and the pytest-benchmark suites in ``benchmarks/`` both use the cases from here.
"""

from __future__ import annotations

from peftkern.bench.case import Case, Effort, Measurement, measure
from peftkern.bench.errors import BenchError, DisagreementError
from peftkern.bench.registry import BENCHMARKS, Benchmark, Setting, find
from peftkern.bench.result import Quantity, Result

__all__ = [
    "BENCHMARKS",
    "BenchError",
    "Benchmark",
    "Case",
    "DisagreementError",
    "Effort",
    "Measurement",
    "Quantity",
    "Result",
    "Setting",
    "find",
    "measure",
]
