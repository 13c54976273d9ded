"""What choosing costs in loss: SmolLM2-135M learns to write docstrings, dense, float32, a part of it at a time.

Held-out loss, in nats per token of the answers, after training on Python's standard library (the task of ``peftkern
demo``, with more of it held out): warm-up and linear decay, batch 4, the loss without logits on both sides. Modules of
the library are either learned from or held out.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

import peftkern
from peftkern.bench import smollm2
from peftkern.bench.case import Measurement, seconds_of
from peftkern.bench.published_selector import published_select
from peftkern.bench.result import Quantity
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.docstrings import HELD_OUT_FILE, TRAIN_FILE, docstring_data
from peftkern.finetune.encoding import Example, PadRight, load_splits
from peftkern.finetune.evaluation import held_out_loss
from peftkern.finetune.modeling import padding_token
from peftkern.optim import AdamW
from peftkern.select import GreenTrainer, RandomSelection, Selection
from peftkern.select.method import Method
from peftkern.select.policy import Policy

TRAIN, HELD_OUT = 320, 128
BATCH = 4
WARMUP = 0.1


@dataclass(frozen=True)
class Task:
    """Examples, and how they become batches."""

    folder: str
    train: list[Example]
    held_out: list[Example]
    collate: PadRight

    def batches(self, steps: int, seed: int) -> Iterator[dict[str, Any]]:
        """``steps`` batches in an order of this seed, over the examples again and again."""
        generator = random.Random(seed)
        order: list[Example] = []
        for _ in range(steps):
            if len(order) < BATCH:
                order = generator.sample(self.train, len(self.train))
            yield self.collate([order.pop() for _ in range(BATCH)])


@dataclass(frozen=True)
class Run:
    """A training run: held-out loss at its end, and the seconds of each step."""

    loss: float
    seconds: list[float]


def load_task(folder: str) -> Task:
    """The docstrings, encoded for the model in ``folder``."""
    from transformers import AutoTokenizer

    data = docstring_data(TRAIN, HELD_OUT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, held_out = (str(data / name) for name in (TRAIN_FILE, HELD_OUT_FILE))
    config = FinetuneConfig(model=folder, data=train, eval_data=held_out, output="-")  # writes nothing
    splits = load_splits(config, tokenizer, config.max_length)
    return Task(folder, splits.train, splits.held_out, PadRight(padding_token(tokenizer)))


def train(task: Task, policy: Policy | None, steps: int, learning_rate: float, seed: int) -> Run:
    """Fine-tune the model from the start; ``None``: all of it."""
    model = smollm2.load_dense(task.folder)
    peftkern.patch(model, logits=False)
    method = policy or Method()
    method.prepare(model)
    optimizer = AdamW(method.parameters(), lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _factor(step, steps))
    method.start(optimizer, steps)
    seconds = []
    for batch in task.batches(steps, seed):
        seconds.append(seconds_of(lambda: method.step(model, batch)))  # noqa: B023  called at once
        schedule.step()
    method.finish()
    return Run(held_out_loss(model, task.held_out, task.collate, BATCH).loss, seconds)


def _factor(step: int, steps: int) -> float:
    warm = max(1, round(WARMUP * steps))
    return min((step + 1) / warm, (steps - step) / (steps - warm + 1))


STEPS, INTERVAL = 40, 20
SEEDS, RIVAL_STEPS, RIVAL_INTERVAL = 5, 24, 12
FULL_RATE = 5e-5
RATES = {"update": 2e-4, "gradient_norm": 5e-4, "fisher": 5e-4}
"""By importance. Fewer weights bear, and need, longer steps; of 1e-4 to 2e-3 these lost least."""
RHO = 0.5
LOSS_ALLOWED = 1.01


def loss_cases() -> Iterator[Measurement]:
    """Measurements of ``select-loss``, by every importance."""
    with smollm2.checkpoint() as checkpoint:
        task = load_task(checkpoint.folder)
        note = f", {checkpoint.note}" if checkpoint.note else ""
        full = train(task, None, STEPS, FULL_RATE, seed=0)
        for importance, rate in RATES.items():
            green = train(task, GreenTrainer(RHO, INTERVAL, importance=importance), STEPS, rate, seed=0)
            text = f"held-out loss after {STEPS} steps, rho {RHO} of FLOPs, {importance} | full fine-tuning{note}"
            yield Measurement(text, "loss", Quantity.LOSS, [green.loss], [full.loss])
            yield Measurement(f"{text}, allowed", "ratio", Quantity.COUNT, [green.loss / full.loss], [LOSS_ALLOWED])


class PublishedGreenTrainer(GreenTrainer):
    """The same costs and importances; the authors' way to choose."""

    def select(self) -> Selection:
        graph = self.costs[self.budget]
        names = published_select(graph, self.importances, graph.backward_budget(self.rho))
        return self.selected(names, importances=self.importances, costs=self.costs)


@dataclass(frozen=True)
class Rival:
    """A policy to train with, by seed, and its learning rate."""

    make: Callable[[int], Policy]
    learning_rate: float


OURS = Rival(lambda seed: GreenTrainer(RHO, RIVAL_INTERVAL, importance="fisher", seed=seed), RATES["fisher"])
RIVALS: Mapping[str, Rival] = {
    "random selection": Rival(lambda seed: RandomSelection(RHO, RIVAL_INTERVAL, seed=seed), RATES["fisher"]),
    "the published importance and dynamic programme": Rival(
        lambda seed: PublishedGreenTrainer(RHO, RIVAL_INTERVAL, seed=seed), RATES["update"]
    ),
}


def rival_cases() -> Iterator[Measurement]:
    """Measurements of ``select-vs-random``: each seed gets as many seconds of training with every policy."""
    with smollm2.checkpoint() as checkpoint:
        task = load_task(checkpoint.folder)
        note = f", {checkpoint.note}" if checkpoint.note else ""
        seeds = range(SEEDS)
        ours = [train(task, OURS.make(seed), RIVAL_STEPS, OURS.learning_rate, seed) for seed in seeds]
        for name, rival in RIVALS.items():
            steps = steps_in(task, rival, ours[0])
            runs = [train(task, rival.make(seed), steps, rival.learning_rate, seed) for seed in seeds]
            lengths = f"{RIVAL_STEPS} steps | {steps}, which take as long"
            text = f"held-out loss, {SEEDS} seeds, exact choice by fisher | {name}, {lengths}"
            yield Measurement(f"{text}{note}", "loss", Quantity.COUNT, [r.loss for r in ours], [r.loss for r in runs])


def steps_in(task: Task, rival: Rival, other: Run, trial: int = 8) -> int:
    """How many steps of ``rival`` take the seconds of ``other``, by the median seconds of a step."""
    seconds = train(task, rival.make(0), trial, rival.learning_rate, seed=0).seconds
    return max(1, round(len(other.seconds) * statistics.median(other.seconds) / statistics.median(seconds)))
