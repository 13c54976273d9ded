"""``peftkern finetune --select``: runs, what they write, resuming, and what is refused."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import Command, save_model
from matplotlib.image import imread

from peftkern.finetune.callbacks import Watch
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.errors import InputError
from peftkern.finetune.selections import SELECTIONS, SelectEntry, build

STEPS = ("--max-steps", 6, "--learning-rate", 1e-2, "--batch-size", 8, "--select-interval", 2)
REFUSED = {"head": "untie them", "biases": "no parameter that requires a gradient"}
"""What the tiny model, whose head is tied and which has no biases, is refused for."""

FULL = ("--method", "full", "--quantization", "none")


def read(output: Path, name: str) -> Any:
    return json.loads((output / name).read_text())


def make(**settings: Any) -> FinetuneConfig:
    return FinetuneConfig(**{"model": "m", "data": "d", **settings})


@pytest.mark.parametrize("method", [FULL, ("--method", "lora")], ids=["full", "lora"])
def test_green_writes_what_it_selected_and_saved(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, method: tuple[str, ...]
) -> None:
    output = tmp_path / "out"
    options = (*method, "--select", "green", "--rho", 0.6)
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS, *options)
    assert result.exit_code == 0, result.output
    selection, summary = read(output, "selection.json"), read(output, "summary.json")
    assert [entry["step"] for entry in selection["selections"]] == [0, 2, 4]
    assert all(entry["shares"]["flops"] <= 0.6 for entry in selection["selections"])
    spent = sum(2 * entry["shares"]["flops"] for entry in selection["selections"])
    assert selection["savings"]["flops"]["share"] == pytest.approx(1 - spent / 6)
    assert summary["selection"]["savings"] == selection["savings"]
    assert summary["selection"]["trained"] == len(selection["selections"][-1]["names"])
    assert summary["held_out_loss"]["after"]["loss"] < summary["held_out_loss"]["before"]["loss"]
    assert imread(output / "selection.png").std() > 0.05
    for line in ("green: the most important", "tensors selected", "selection       GreenTrainer", "saved           "):
        assert line in result.output
    assert "selection.png, selection.json, summary.json" in result.output


def test_seconds_and_energy(command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    options = (*FULL, "--select", "green", "--rho", 0.9, "--select-budget", "seconds", "--select-watts", 40)
    result = command("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS, *options)
    assert result.exit_code == 0, result.output
    saved = read(output, "selection.json")["savings"]
    assert saved["watt_hours"] == pytest.approx(saved["seconds"]["saved"] * 40 / 3600)
    assert "× 40 W (as stated) / 3600" in result.output


def test_an_interrupted_run_resumes_to_the_same_selections(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("finetune", model_folder, "--data", pairs_file, *STEPS, *FULL, "--select", "green", "--rho", 0.6)
    assert command(*arguments, "--output", tmp_path / "whole").exit_code == 0
    log = Watch.on_log

    def interrupt_at_step_2(self: Watch, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        log(self, args, state, *rest, **more)
        if state.global_step == 2:  # one more is made: the checkpoint is in the middle of an interval
            os.kill(os.getpid(), signal.SIGINT)

    output = tmp_path / "parts"
    monkeypatch.setattr(Watch, "on_log", interrupt_at_step_2)
    assert command(*arguments, "--output", output).exit_code == 130
    monkeypatch.undo()
    assert sorted(path.name for path in output.iterdir()) == ["checkpoints"]
    resumed = command(*arguments, "--output", output, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert read(output, "selection.json") == read(tmp_path / "whole", "selection.json")
    assert read(output, "summary.json")["training_loss"] == read(tmp_path / "whole", "summary.json")["training_loss"]


def test_a_finished_run_that_is_resumed_keeps_what_it_selected(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    arguments = ("finetune", model_folder, "--data", pairs_file, "--output", output, *STEPS, *FULL, "--select", "lisa")
    assert command(*arguments).exit_code == 0
    selection, summary = read(output, "selection.json"), read(output, "summary.json")
    again = command(*arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert read(output, "summary.json")["steps"] == 0
    assert read(output, "summary.json")["selection"] == summary["selection"] is not None
    assert read(output, "selection.json") == selection


def test_without_select_nothing_of_it_is_written(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert command("finetune", model_folder, "--data", pairs_file, "--output", output, "--max-steps", 1).exit_code == 0
    assert not list(output.glob("selection*"))
    assert read(output, "summary.json")["selection"] is None


# ---- the table, and what is refused


@pytest.mark.parametrize("entry", SELECTIONS.values(), ids=lambda entry: entry.name)
def test_every_row_trains(command: Command, pairs_file: Path, tmp_path: Path, entry: SelectEntry) -> None:
    model, output = save_model(tmp_path / "model", layers=4), tmp_path / "out"
    options = (*FULL, "--select", entry.name, "--max-steps", 4, "--learning-rate", 1e-2)
    result = command("finetune", model, "--data", pairs_file, "--output", output, *options)
    if entry.name in REFUSED:
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: --select {entry.name}: ") and REFUSED[entry.name] in result.stderr
        return
    assert result.exit_code == 0, result.output
    summary = read(output, "summary.json")
    assert summary["held_out_loss"]["after"]["loss"] < summary["held_out_loss"]["before"]["loss"]
    assert 0 < summary["selection"]["trained"] < summary["selection"]["candidates"]
    assert 0 < summary["selection"]["savings"]["flops"]["share"] < 1


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_row_is_in_the_documentation(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "select.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {SELECTIONS[name].summary}" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "gren"}, "--select must be one of green"),
        ({"select": "green", "rho": 0.0}, "--rho must be above 0 and at most 1, got 0.0"),
        ({"select": "green", "rho": 1.5}, "--rho must be above 0 and at most 1"),
        ({"select": "green", "select_interval": 0}, "--select-interval must be at least 1"),
        ({"select": "green", "select_budget": "joules"}, "--select-budget must be one of flops, seconds, got"),
        ({"select": "green", "select_watts": -1.0}, "--select-watts must be above 0"),
        ({"rho": 0.5}, "--rho needs --select; add --select green"),
        ({"select_budget": "flops"}, "--select-budget needs --select"),
        ({"select": "green", "method": "spiel"}, "--method lora or full trains; --method spiel chooses itself"),
    ],
)
def test_wrong_settings_name_the_option(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make(**settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"select": "lisa", "rho": 0.5}, "--rho: --select lisa does not take it; those that do: green, random"),
        ({"select": "norms", "select_interval": 5}, "--select-interval: --select norms does not take it"),
        ({"select": "random", "select_budget": "seconds"}, "those that do: green"),
    ],
)
def test_a_setting_that_the_policy_does_not_take_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(make(**settings))


def test_settings_reach_the_policy() -> None:
    config = make(select="green", rho=0.7, select_interval=30, select_budget="seconds", seed=5)
    policy: Any = build(config)
    assert (policy.rho, policy.interval, policy.budget, policy.seed) == (0.7, 30, "seconds", 5)
    assert build(make(select="green")).interval == 100


def test_a_budget_that_is_too_small_names_one_that_is_not(
    command: Command, model_folder: Path, pairs_file: Path, tmp_path: Path
) -> None:
    options = (*FULL, "--select", "green", "--rho", 0.05)
    result = command("finetune", model_folder, "--data", pairs_file, "--output", tmp_path / "out", *STEPS, *options)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: --rho: ")
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
