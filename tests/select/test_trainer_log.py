"""Numbers of a callback reach the Trainer's logs, and everyone who reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from select_models import batches, llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from peftkern.select.trainer_log import TrainerLog


class Counting(TrainerCallback):  # type: ignore[misc]
    """Logs how many logs there were."""

    def __init__(self) -> None:
        self.count = 0
        self.log = TrainerLog(self.read)

    def read(self) -> dict[str, float]:
        self.count += 1
        return {"mine/count": float(self.count)}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.log.enter()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.log.leave()


def make_trainer(folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), use_cpu=True, **{**settings, **options})
    rows = [{name: value[0] for name, value in batch.items()} for batch in batches(4)]
    return Trainer(llama(), arguments, train_dataset=rows, callbacks=callbacks)


def test_they_are_in_the_history_and_in_the_checkpoint(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [Counting()], save_steps=3)
    trainer.train()
    losses = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["mine/count"] for entry in losses] == [1.0, 2.0, 3.0]
    assert all("mine/count" not in entry for entry in trainer.state.log_history if "loss" not in entry)
    saved = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert saved["log_history"][2]["mine/count"] == 3.0


def test_they_reach_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    make_trainer(tmp_path, [Counting()], report_to="tensorboard").train()
    events = accumulators.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/mine/count")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_callbacks_before_and_behind_see_them(tmp_path: Path) -> None:
    class Seeing(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.seen: list[bool] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                self.seen.append("mine/count" in logs)

    before, behind = Seeing(), Seeing()
    make_trainer(tmp_path, [before, Counting(), behind]).train()
    assert before.seen == behind.seen == [True] * 3


def test_the_callbacks_of_the_trainer_are_as_before_afterwards(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, [Counting()])
    before = list(trainer.callback_handler.callbacks)
    trainer.train()
    assert trainer.callback_handler.callbacks == before


def test_a_run_after_one_that_failed_logs_once(tmp_path: Path) -> None:
    class Failing(TrainerCallback):  # type: ignore[misc]
        fails = True

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if self.fails:
                raise KeyboardInterrupt

    counting, failing = Counting(), Failing()
    trainer = make_trainer(tmp_path, [counting, failing])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    failing.fails = False
    trainer.train()
    assert counting.count == 3
    assert counting.log not in trainer.callback_handler.callbacks


def test_without_a_trainer_it_is_refused() -> None:
    with pytest.raises(RuntimeError, match="must be called from an event"):
        TrainerLog(dict).enter()
