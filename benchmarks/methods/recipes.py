"""Runs that take more than one model or data set: ``recipes.py NAME DATA OUTPUT STEPS``, called by run.py.

Each writes a ``summary.json`` with the keys of ``peftkern finetune``'s that the table shows.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from run import BATCH_SIZE, MAX_LENGTH
from transformers import AutoModelForCausalLM

from peftkern import sparse
from peftkern.bench import smollm2
from peftkern.finetune import memory
from peftkern.finetune.config import FinetuneConfig
from peftkern.finetune.evaluation import held_out_loss
from peftkern.finetune.gguf import smollm2_file, smollm2_folder
from peftkern.finetune.run import Session, start
from peftkern.optim import AdamW
from peftkern.select import FreezeAsGuard
from peftkern.select.method import Method

Batch = Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What a recipe did: updates or calibration batches, and how many numbers it chose among or changed."""

    steps: int
    seconds: float
    numbers: int
    model: Any


def open_session(data: Path, output: Path, steps: int) -> Session:
    """The dense model, the data, and the held-out loss before."""
    config = FinetuneConfig(
        model=str(smollm2_file()),
        data=str(data / "train.jsonl"),
        eval_data=str(data / "held_out.jsonl"),
        output=str(output),
        overwrite=True,
        method="full",
        quantization="none",
        max_steps=steps,
        batch_size=BATCH_SIZE,
        max_length=MAX_LENGTH,
    )
    return start(config, Console())


def batches(session: Session, count: int) -> Iterator[Batch]:
    """``count`` batches of the training examples, in the order of the file."""
    examples = session.splits.train
    starts = cycle(range(0, len(examples) - BATCH_SIZE + 1, BATCH_SIZE))
    return (session.collate(examples[first : first + BATCH_SIZE]) for first in islice(starts, count))


def plain_text(count: int) -> list[Batch]:
    """Batches of the standard library's source as running text."""
    ids = smollm2.make_batches(str(smollm2_folder()), count, BATCH_SIZE, MAX_LENGTH)
    return [{"input_ids": batch, "labels": batch} for batch in ids]


def train(method: Method, model: Any, optimizer: torch.optim.Optimizer, data: Iterable[Batch], steps: int) -> float:
    """The plain loop of a method; seconds that it took."""
    method.start(optimizer, steps)
    began = time.perf_counter()
    for batch in data:
        method.step(model, batch)
    return time.perf_counter() - began


def skill_grafting(session: Session, steps: int) -> Outcome:
    """Which changes of the model that the row "full" has trained carry what it has learned."""
    folder = session.output.path.parent / "full" / "model"
    tuned = AutoModelForCausalLM.from_pretrained(folder).train()
    method = sparse.SkillGrafting(session.adapted.model, density=1e-3, candidates=1e-2)
    method.prepare(tuned)
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    seconds = train(method, tuned, optimizer, batches(session, steps), steps)
    method.finish()
    assert method.result is not None
    return Outcome(steps, seconds, len(method.result), tuned)


def freeze_as_guard(session: Session, steps: int) -> Outcome:
    """Docstrings are what fine-tuning is to fail at, the source of the standard library what it is to work on."""
    model = session.adapted.model.train()
    method = FreezeAsGuard(illegal=list(batches(session, 8)), innocent=plain_text(8))
    method.prepare(model)
    optimizer = AdamW(method.parameters(), lr=5e-5, weight_decay=0.0)
    seconds = train(method, model, optimizer, batches(session, steps), steps)
    method.finish()
    return Outcome(steps, seconds, sum(p.numel() for p in model.parameters() if p.requires_grad), model)


def d_pruner(session: Session, steps: int) -> Outcome:
    """A tenth of the linear weights is dropped; nothing is trained."""
    model, general = session.adapted.model, plain_text(steps // 2)
    began = time.perf_counter()
    pruner = sparse.DPruner(model, sparsity=0.1)
    pruner.collect_general(general)
    pruner.collect(list(batches(session, steps - steps // 2)))
    pruner.apply()
    seconds = time.perf_counter() - began
    return Outcome(steps, seconds, 0, model)


RECIPES: Mapping[str, Callable[[Session, int], Outcome]] = {
    "skill-grafting": skill_grafting,
    "freeze-as-guard": freeze_as_guard,
    "d-pruner": d_pruner,
}


def main(name: str, data: Path, output: Path, steps: int) -> None:
    """Run a recipe and write its summary."""
    session = open_session(data, output, steps)
    memory.reset_peak()
    outcome = RECIPES[name](session, steps)
    peak = memory.peak_resident_mb()
    after = held_out_loss(outcome.model, session.splits.held_out, session.collate, BATCH_SIZE, lambda *_: None)
    assert session.before is not None
    summary = {
        "held_out_loss": {"before": {"loss": session.before.loss}, "after": {"loss": after.loss}},
        "trained": outcome.numbers,
        "steps": outcome.steps,
        "seconds": {"training": outcome.seconds},
        "peak_memory_mb": {"resident": peak},
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
