"""``gpu-numerics``: what becomes of the errors that the executors report. The executors have tests of their own."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from peftkern.bench.errors import BenchError, DisagreementError
from peftkern.bench.registry import BENCHMARKS
from peftkern.bench.result import Quantity
from peftkern.gpu_check import executed, processes, run
from peftkern.gpu_check.errors import CheckError


def reports(monkeypatch: pytest.MonkeyPatch, errors: dict[str, list[float]], code: int = 0) -> list[list[str]]:
    """Both executors end with ``code`` and report ``errors``; the commands that are run."""
    commands: list[list[str]] = []

    def finished(command: Sequence[str], *_rest: Any) -> processes.Finished:
        commands.append(list(command))
        if errors:
            Path(command[-1]).write_text(json.dumps({"executor": "an abacus", "errors": errors}))
        return processes.Finished(code, "what it wrote last")

    monkeypatch.setattr(processes, "run", finished)
    monkeypatch.setattr(executed, "_executor", lambda: ["python", "-m", "ttsem.sanitize"])
    return commands


def test_the_worst_error_of_each_dtype_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = reports(monkeypatch, {"float32": [1e-7, 3e-6], "bfloat16": [0.0, 2e-3, 1e-3]})
    rows = list(executed.cases())
    assert [(row.ours, row.peer) for row in rows] == [([3e-6], [5e-6]), ([2e-3], [8e-3])] * 2
    assert {row.quantity for row in rows} == {Quantity.DIFFERENCE}
    assert rows[1].case == "Triton kernels by an abacus, bfloat16, limit 8e-03"
    assert rows[2].case.startswith("CUDA kernels by an abacus, float32")
    for command in commands:
        assert (run.checkout() / next(part for part in command if part.endswith("_errors.py"))).exists()


@pytest.mark.parametrize("error", [6e-6, math.inf, math.nan])
def test_an_error_beyond_the_limit_is_no_result(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    reports(monkeypatch, {"float32": [1e-7, error, 1e-7]})
    with pytest.raises(DisagreementError, match="float32"):
        list(executed.cases())


@pytest.mark.parametrize(("errors", "code"), [({}, 0), ({"float32": [1e-7]}, 1)], ids=["nothing", "failed"])
def test_an_executor_that_fails_says_what_it_wrote(
    errors: dict[str, list[float]], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports(monkeypatch, errors, code)
    with pytest.raises(BenchError, match="Triton kernels could not be executed: what it wrote last"):
        list(executed.cases())


def test_it_needs_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path:
        raise CheckError("run this from a checkout")

    monkeypatch.setattr(run, "checkout", absent)
    with pytest.raises(BenchError, match="run this from a checkout"):
        list(executed.cases())


def test_without_an_executor_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executed.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(executed.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(BenchError, match=r"pip install .* ttsem"):
        list(executed.cases())


def test_it_is_a_benchmark() -> None:
    assert BENCHMARKS["gpu-numerics"].cases == f"{executed.__name__}:{executed.cases.__name__}"
