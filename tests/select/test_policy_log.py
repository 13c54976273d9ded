"""A policy in the Trainer's logs, in TensorBoard, and seen from a loop of one's own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from round_robin import RoundRobin
from select_models import batches, llama
from transformers import Trainer, TrainingArguments

from peftkern.optim import AdamW
from peftkern.select.cost_graph import CostGraph, TensorCost
from peftkern.select.record import record
from peftkern.select.selection import Selection

WORDS = ("layers.0", "layers.1")
FULL, HALF = 10.0 + 20.0, 10.0 + 9.0  # forward, and 1 for each of 20 tensors or of the 9 of a layer


class Priced(RoundRobin):
    """A selection costs 1 for each tensor and 10 for the forward pass, in both units."""

    def select(self) -> Selection:
        tensors = tuple(TensorCost(name, 1.0) for name in self.candidates)
        costs = {unit: CostGraph(unit, 10.0, (), tensors) for unit in ("flops", "seconds")}
        chosen = super().select()
        return replace(chosen, costs=costs, importances=dict.fromkeys(self.candidates, 2.0))


def train(folder: Path, policy: RoundRobin, resume: str | None = None, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 6, "logging_steps": 1, "save_strategy": "no", "report_to": "none"}
    arguments = TrainingArguments(str(folder), use_cpu=True, disable_tqdm=True, seed=5, **{**settings, **options})
    rows = [{name: tensor[0] for name, tensor in batch.items()} for batch in batches(8)]
    trainer = Trainer(
        llama(), arguments, train_dataset=rows, callbacks=[policy], optimizer_cls_and_kwargs=(AdamW, {"lr": 0.01})
    )  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def losses_of(trainer: Trainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_the_trainer_logs_selections_and_savings(tmp_path: Path) -> None:
    logs = losses_of(train(tmp_path, Priced(WORDS, 4)))
    assert [entry["step"] for entry in logs] == [1, 2, 3, 4, 5, 6]
    assert {entry["select/trained_tensors"] for entry in logs} == {9.0}
    assert [entry["select/saved_flops"] for entry in logs] == [n * (FULL - HALF) for n in range(1, 7)]
    assert logs[5]["select/saved_seconds"] == 6 * (FULL - HALF)
    assert logs[5]["select/flops_share"] == logs[5]["select/seconds_share"] == HALF / FULL
    assert logs[5]["select/importance_share"] == 9 / 20


def test_gradient_accumulation_counts(tmp_path: Path) -> None:
    logs = losses_of(train(tmp_path, Priced(WORDS, 4), max_steps=2, gradient_accumulation_steps=2))
    assert logs[-1]["select/saved_flops"] == 2 * 2 * (FULL - HALF)


def test_every_selection_is_logged_however_rare_logs_are(tmp_path: Path) -> None:
    logs = losses_of(train(tmp_path, Priced(WORDS, 2), logging_steps=100))
    assert [entry["step"] for entry in logs] == [1, 3, 5]
    assert losses_of(train(tmp_path, Priced(WORDS, 2), logging_strategy="no")) == []


def test_tensorboard_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    train(tmp_path, Priced(WORDS, 2), report_to="tensorboard")
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    scalars = {tag.removeprefix("train/"): events.Scalars(tag) for tag in events.Tags()["scalars"] if "select/" in tag}
    names = {"trained_tensors", "flops_share", "seconds_share", "importance_share", "saved_flops", "saved_seconds"}
    assert scalars.keys() == {f"select/{name}" for name in names}
    assert [(e.step, e.value) for e in scalars["select/saved_flops"]] == [(n, n * (FULL - HALF)) for n in range(1, 7)]


def test_a_resumed_run_knows_what_was_before(tmp_path: Path) -> None:
    first, second = Priced(WORDS, 2), Priced(WORDS, 2)
    whole = losses_of(train(tmp_path, first, save_strategy="steps", save_steps=3))
    parts = losses_of(train(tmp_path, second, resume=str(tmp_path / "checkpoint-3")))
    picked = [{k: v for k, v in entry.items() if k.startswith("select/")} for entry in whole]
    assert picked == [{k: v for k, v in entry.items() if k.startswith("select/")} for entry in parts]
    assert second.view().as_data() == first.view().as_data()


@pytest.mark.parametrize("resumed", [False, True])
def test_savings_of_a_policy_that_looks_at_no_costs(resumed: bool) -> None:
    policy, model = RoundRobin(WORDS, 2), llama()
    policy.record_costs = True
    policy.prepare(model)
    expected = record(model, batches(1)[0])
    optimizer = AdamW(policy.parameters(), lr=0.01)
    policy.start(optimizer)
    for batch in batches(2):
        policy.step(model, batch)
    if resumed:
        optimizer = AdamW(policy.parameters(), lr=0.01)
        optimizer.load_state_dict(policy.started().state_dict())
        policy.start(optimizer)
    policy.step(model, batches(1, tokens=3)[0])  # costs are those of the first batch all the same
    costs = [expected.step(selection.names) for selection in policy.history]
    saved = 3 * expected.full - 2 * costs[0] - costs[1]
    assert policy.logs()["select/saved_flops"] == pytest.approx(saved)
    assert saved > 0


def test_in_a_loop_of_one_s_own(tmp_path: Path) -> None:
    policy = Priced(WORDS, 2)
    model = llama()
    policy.prepare(model)
    policy.start(AdamW(policy.parameters(), lr=0.01))
    assert policy.logs() == {}
    with pytest.raises(ValueError, match="history is empty"):
        policy.view()
    for batch in batches(3):
        policy.step(model, batch)
    policy.finish()
    assert policy.logs()["select/saved_seconds"] == 3 * (FULL - HALF)
    assert policy.savings(watts=7200.0).watt_hours == 2 * 3 * (FULL - HALF)
    view = policy.view(watts=7200.0, grams_per_kwh=500.0)
    shares = {tensor.name: round(tensor.share, 3) for tensor in view.tensors}
    assert shares["model.layers.0.mlp.up_proj.weight"] == 0.667
    assert shares["model.layers.1.mlp.up_proj.weight"] == 0.333
    view.save(tmp_path / "selection.png")
    assert imread(tmp_path / "selection.png").std() > 0.05
    view.save(tmp_path / "selection.json")
    assert json.loads((tmp_path / "selection.json").read_text())["savings"]["grams"] == 66 * 500 / 1000
