"""The demonstration, with a tiny model in the place of the real one."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Command

from peftkern.bench import memory, step
from peftkern.bench.case import Case, Effort, Measurement
from peftkern.bench.errors import DisagreementError
from peftkern.bench.result import Quantity
from peftkern.demo import compare, demonstration
from peftkern.finetune import docstrings
from peftkern.finetune.errors import InputError

FUNCTION = '''
def f{n}(x):
    """Return the number that is {n} more than x."""
    return x + {n}
'''


@pytest.fixture
def tiny_demo(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A standard library of twelve small modules, and the tiny model."""
    library = tmp_path / "library"
    library.mkdir()
    for module in range(12):
        numbers = range(4 * module, 4 * module + 4)
        (library / f"module{module}.py").write_text("".join(FUNCTION.format(n=n) for n in numbers))
    monkeypatch.setattr(docstrings, "standard_library", lambda: library)
    monkeypatch.setattr(demonstration, "smollm2_file", lambda: model_folder)
    monkeypatch.setattr(demonstration, "smollm2_folder", lambda: model_folder)


def test_the_demo_learns_samples_and_records(command: Command, tiny_demo: None, tmp_path: Path) -> None:
    output = tmp_path / "out"
    result = command("demo", "--output", output, "--steps", 4, "--no-compare")
    assert result.exit_code == 0, result.output
    summary = json.loads((output / "summary.json").read_text())
    assert summary["held_out_loss"]["after"]["loss"] < summary["held_out_loss"]["before"]["loss"]
    assert summary["quantization"] == "nf4, blocks of 64, scales quantized as well"
    assert summary["settings"]["rank"] == 16
    record = json.loads((output / "demo.json").read_text())
    assert record["comparison"] is None
    assert len(record["samples"]) == 3
    for sample in record["samples"]:
        assert "def f" in sample["prompt"]
        assert sample["reference"].startswith("Return the number that is")
        assert isinstance(sample["before"], str)
    for text in ("held-out sample 3", "before", "after", "the real one"):
        assert text in result.output
    again = command("demo", "--output", output, "--steps", 1, "--no-compare")
    assert again.exit_code == 0, again.output


def test_before_is_without_the_adapter(
    command: Command, tiny_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(model: Any, _tokenizer: Any, _prompt: list[int]) -> str:
        switches = (getattr(module, "disable_adapters", False) for module in model.modules())
        return "off" if any(switch is True for switch in switches) else "on"

    monkeypatch.setattr(demonstration, "_answer", answer)
    result = command("demo", "--output", tmp_path / "out", "--steps", 1, "--no-compare")
    assert result.exit_code == 0, result.output
    samples = json.loads((tmp_path / "out" / "demo.json").read_text())["samples"]
    assert [(sample["before"], sample["after"]) for sample in samples] == [("off", "on")] * 3


def test_somebody_elses_folder_is_not_taken(command: Command, tiny_demo: None, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    result = command("demo", "--output", tmp_path, "--no-compare")
    assert result.exit_code == 2
    assert "is not empty" in result.stderr


def test_data_are_made_once_and_split_by_module(tiny_demo: None, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = docstrings.docstring_data(8, 4)

    def refuse(_folder: Path) -> list[docstrings.Pair]:
        raise AssertionError("collected again")

    monkeypatch.setattr(docstrings, "collect_pairs", refuse)
    assert docstrings.docstring_data(8, 4) == folder
    train, held_out = (
        [json.loads(line) for line in (folder / name).read_text().splitlines()]
        for name in ("train.jsonl", "held_out.jsonl")
    )
    assert train
    assert held_out
    assert not {row["module"] for row in train} & {row["module"] for row in held_out}
    assert [message["role"] for message in train[0]["messages"]] == ["system", "user", "assistant"]


def test_a_machine_without_python_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(docstrings, "standard_library", lambda: tmp_path / "nothing")
    with pytest.raises(InputError, match="there are no functions with docstrings in"):
        docstrings.docstring_data(8, 4)


# ---- the comparison


def fake_step(check: Callable[[], None]) -> Callable[..., Case]:
    def setup_step(_checkpoint: Any, effort: Effort) -> Case:
        return Case("a step", lambda: None, lambda: sum(range(20_000)), check, unit="s", effort=effort)

    return setup_step


def fake_memory(*_arguments: Any, **_options: Any) -> list[Measurement]:
    return [
        Measurement(f"{case}, batch 4", "MB", Quantity.MEMORY, [600.0], [1000.0])
        for case in (memory.PEAK, memory.AFTER_LOADING)
    ]


def refuse() -> None:
    raise DisagreementError("the losses differ")


def test_the_comparison_is_shown(
    command: Command, tiny_demo: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compare, "setup_step", fake_step(lambda: None))
    monkeypatch.setattr(memory, "measure_memory", fake_memory)
    monkeypatch.setattr(compare, "PEER_PACKAGE", "json")
    result = command("demo", "--output", tmp_path / "out", "--steps", 1)
    assert result.exit_code == 0, result.output
    assert "this run against PEFT + bitsandbytes" in result.output
    record = json.loads((tmp_path / "out" / "demo.json").read_text())["comparison"]
    time_row, memory_row = record["rows"]
    assert time_row["ratio"] > 1
    assert (memory_row["ours"], memory_row["peer"], memory_row["ratio"]) == (600.0, 1000.0, 0.6)
    assert record["problems"] == []


def test_a_comparison_that_fails_does_not_fail_the_demo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "setup_step", fake_step(refuse))
    monkeypatch.setattr(memory, "measure_memory", fake_memory)
    monkeypatch.setattr(compare, "PEER_PACKAGE", "json")
    comparison = compare.compare_with_peer(tmp_path, 2, lambda _text: None)
    assert comparison.problems == ["training step: the losses differ"]
    assert [row.name for row in comparison.rows] == ["peak memory"]


def test_a_slow_machine_leaves_memory_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare, "setup_step", fake_step(lambda: None))
    monkeypatch.setattr(compare, "PEER_PACKAGE", "json")
    comparison = compare.compare_with_peer(tmp_path, 1, lambda _text: None, memory_until=0.0)
    assert [row.name for row in comparison.rows] == ["training step"]
    assert comparison.problems == ["peak memory: left out to save time; peftkern bench memory-smollm2 measures it"]


def test_without_the_peer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    comparison = compare.compare_with_peer(tmp_path, 2, lambda _text: None)
    assert comparison.rows == []
    assert comparison.problems == ["bitsandbytes is not installed, so there is nothing to compare with"]


def test_the_comparison_times_our_own_benchmarks() -> None:
    assert compare.setup_step is step.setup_step
