"""Training steps of SmolLM2-135M on examples of different lengths: packed in one row, beside padded to the longest.

The examples are those of ``peftkern demo``, in a random order; both sides train the same patched model on the same
batches in turn.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from peftkern.bench import peers, smollm2
from peftkern.bench.case import Case, Effort
from peftkern.bench.select_loss import load_task
from peftkern.finetune.encoding import Example, PadRight
from peftkern.integrations.packing import PackingCollator, attend_by_example, check_packing

BATCH = 8
EFFORT = Effort(minimum_pairs=7, maximum_pairs=40, seconds=90.0)
TOLERANCE = 1e-4
"""For the loss and every gradient: float32 rounding, summed up over the layers."""


def setup_packing(
    checkpoint: smollm2.Checkpoint, examples: Sequence[Example], pad: PadRight, effort: Effort = EFFORT
) -> Case:
    """Every sample is a step on the next `BATCH` examples."""
    model = smollm2.load_ours(checkpoint.folder, logits=False)
    attend_by_example(model)
    check_packing(model)
    peers.fill_lora_b(model, torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(peers.trainable(model).values(), lr=smollm2.LEARNING_RATE)
    order = random.Random(0).sample(list(examples), len(examples))
    batches = [order[begin : begin + BATCH] for begin in range(0, len(order), BATCH)]
    pack = PackingCollator()

    def steps(collate: Callable[[Sequence[Example]], dict[str, Any]]) -> Callable[[], float]:
        upcoming = itertools.cycle(batches)

        def step() -> float:
            loss = model(**collate(next(upcoming))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return float(loss.detach())

        return step

    def check() -> None:
        parameters = peers.trainable(model)
        results = []
        for collate in (pack, pad):
            loss = model(**collate(batches[0])).loss
            results.append([loss.detach(), *torch.autograd.grad(loss, list(parameters.values()))])
        names = ["loss", *(f"gradient of {name}" for name in parameters)]
        peers.check_agreement(dict(zip(names, zip(*results, strict=True), strict=True)), TOLERANCE)

    tokens = sum(len(example["input_ids"]) for example in order)
    padded = sum(len(batch) * max(len(example["input_ids"]) for example in batch) for batch in batches)
    text = f"steps of {BATCH} examples, {tokens / len(order):.0f} tokens each | padded, {padded / tokens:.2f} of them"
    text = f"{text}, {checkpoint.note}" if checkpoint.note else text
    return Case(text, steps(pack), steps(pad), check, unit="s", effort=effort)


def cases() -> Iterator[Case]:
    """Cases of ``packing-smollm2``."""
    with smollm2.checkpoint() as checkpoint:
        task = load_task(checkpoint.folder)
        yield setup_packing(checkpoint, task.train, task.collate)
