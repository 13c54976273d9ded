"""The registry and the command line."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from peftkern.bench import BENCHMARKS, BenchError, Benchmark, DisagreementError, Quantity, Result, find, registry
from peftkern.cli.bench import bench

NAMES = [
    "linear-nf4-highest",
    "linear-nf4-high",
    "linear-nf4-bf16",
    "step-smollm2",
    "memory-smollm2",
    "step-llama1b",
    "memory-llama1b",
    "step-8b",
    "traffic-saved-layer",
    "sparse-step",
    "sparse-state",
    "hft-step",
    "quantize",
    "adamw",
    "select-top",
    "select-prediction",
    "loss-ignored",
    "attention-smollm2",
    "loss-parity",
]

app = typer.Typer()
app.command()(bench)
runner = CliRunner()


def use(monkeypatch: pytest.MonkeyPatch, *benchmarks: Benchmark) -> None:
    monkeypatch.setattr(registry, "BENCHMARKS", {benchmark.name: benchmark for benchmark in benchmarks})


GOOD = Benchmark("good", "works", "fake_cases:timed_and_measured", packages=())
ROW = Result("good", "made up", 8.0, 10.0, "MB", 0.8, 0.7, 0.9, Quantity.MEMORY)
BAD = Benchmark("bad", "disagrees", "fake_cases:wrong", packages=())


def test_registry_holds_the_documented_names() -> None:
    assert set(NAMES) <= set(BENCHMARKS)


@pytest.mark.parametrize("entry", BENCHMARKS.values(), ids=lambda entry: entry.name)
def test_every_entry_names_a_function(entry: Benchmark) -> None:
    module, _, function = entry.cases.partition(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_find_keeps_the_order_and_drops_repeats() -> None:
    assert [benchmark.name for benchmark in find(["quantize", "loss-parity", "quantize"])] == [
        "quantize",
        "loss-parity",
    ]
    assert find([]) == list(BENCHMARKS.values())
    assert find(["step-smollm2-highest", "step-smollm2"]) == [BENCHMARKS["step-smollm2"]]


def test_find_lists_the_known_names_and_guesses() -> None:
    with pytest.raises(BenchError) as error:
        find(["quantise", "nothing"])
    assert all(name in str(error.value) for name in [*NAMES, "'quantise'", "'nothing'", "did you mean 'quantize'?"])


def test_list_prints_every_name_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["--list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.output for name in NAMES)
    assert list(tmp_path.iterdir()) == []


def test_unknown_name_is_an_error_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["quantise", "--json", "rows.json"])
    assert result.exit_code == 2
    assert "unknown benchmark" in result.output
    assert "linear-nf4-bf16" in result.output
    assert list(tmp_path.iterdir()) == []


def test_missing_peer_is_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Benchmark("good", "", "fake_cases:timed_and_measured", packages=("surely_not_installed",)))
    result = runner.invoke(app, ["good", "--output", str(tmp_path)], env={"COLUMNS": "300"})
    assert result.exit_code == 2
    assert "surely_not_installed" in result.output
    assert "pip install 'peftkern[bench]'" in result.output
    assert list(tmp_path.iterdir()) == []


def test_unwritable_file_is_an_error_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, Benchmark("never", "", "fake_cases:dies", packages=()))
    (tmp_path / "file").write_text("")
    result = runner.invoke(app, ["never", "--output", str(tmp_path), "--json", str(tmp_path / "file" / "rows.json")])
    assert result.exit_code == 2
    assert "cannot write" in result.output


@pytest.mark.usefixtures("importable_fakes")
def test_failing_benchmark_is_reported_and_the_others_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, BAD, GOOD)
    rows = tmp_path / "rows.json"
    result = runner.invoke(app, ["--output", str(tmp_path), "--json", str(rows)], env={"COLUMNS": "200"})
    assert result.exit_code == 1
    assert "bad: dX: relative difference" in result.output
    assert {row["name"] for row in json.loads(rows.read_text())} == {"good"}


def test_run_prints_and_writes_all_three_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, GOOD)
    monkeypatch.setattr("peftkern.bench.runner.run", lambda entry: iter([ROW]))
    rows = tmp_path / "rows.json"
    result = runner.invoke(app, ["good", "--output", str(tmp_path), "--json", str(rows)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "made up" in result.output
    assert [row["case"] for row in json.loads(rows.read_text())] == ["made up"]
    assert {path.name for path in tmp_path.iterdir()} == {"rows.json", "bench.md", "bench.png"}


def test_nothing_is_written_when_everything_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def disagreeing(_: Benchmark) -> None:
        raise DisagreementError("dX: too far apart")

    use(monkeypatch, BAD)
    monkeypatch.setattr("peftkern.bench.runner.run", disagreeing)
    result = runner.invoke(app, ["bad", "--output", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_interruption_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: Benchmark) -> None:
        raise KeyboardInterrupt

    use(monkeypatch, GOOD)
    monkeypatch.setattr("peftkern.bench.runner.run", interrupted)
    result = runner.invoke(app, ["good", "--output", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    assert result.exit_code == 130
    assert "nothing was written" in result.output
    assert list(tmp_path.iterdir()) == []
