"""How well the cost of a backward pass is predicted, for random selections of SmolLM2-135M, dense float32, 4 x 256.

FLOPs: those of a whole step, against those that are counted while it runs. Seconds: those of the backward pass, the
update and the clearing of gradients, against the clock. What is predicted is a step; the forward pass with the least
trained, timed beside the selections, is taken off both. Every selection trains a random share of what lies above a
random layer, as uniform ones would all reach down to the first layer.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.bench import smollm2
from peftkern.bench.case import Measurement
from peftkern.bench.result import Quantity
from peftkern.select.cost_graph import CostGraph
from peftkern.select.flops import FlopCounter
from peftkern.select.record import record
from peftkern.select.timing import measure
from peftkern.select.trace import asking

SELECTIONS = 20
ROUNDS = 3
COUNTED = 3
"""Selections whose FLOPs are counted."""
GOAL = 10.0
"""Percent."""


def random_selections(graph: CostGraph, count: int, seed: int = 0) -> list[list[str]]:
    """``count`` selections: a random share of the tensors whose gradients come first."""
    choose = random.Random(seed)
    order = [tensor.name for tensor in graph.tensors]
    selections = []
    for _ in range(count):
        reachable = order[: choose.randint(1, len(order))]
        selections.append(sorted(choose.sample(reachable, choose.randint(1, len(reachable))), key=order.index))
    return selections


class _Steps:
    """Steps of one model that train what they are told, timed."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
        self.model = model
        self.optimizer = optimizer
        self.ids = ids

    def flops(self, names: Sequence[str]) -> float:
        with asking(self.model, names), FlopCounter() as counter:
            self.model(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.zero_grad()
        return float(counter.total)

    def seconds(self, names: Sequence[str]) -> tuple[float, float]:
        """Of the forward pass, and of all of the step."""
        with asking(self.model, names):
            begin = time.perf_counter()
            loss = self.model(input_ids=self.ids, labels=self.ids).loss
            forward = time.perf_counter() - begin
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return forward, time.perf_counter() - begin


def cases() -> Iterator[Measurement]:
    """FLOPs, then seconds."""
    with smollm2.checkpoint() as checkpoint:
        model = smollm2.load_dense(checkpoint.folder)
        (ids,) = smollm2.make_batches(checkpoint.folder, 1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=smollm2.LEARNING_RATE, fused=True)
        steps = _Steps(model, optimizer, ids)
        graph = record(model, {"input_ids": ids, "labels": ids})
        selections = random_selections(graph, SELECTIONS)
        note = f", {checkpoint.note}" if checkpoint.note else ""
        yield _flops_case(steps, graph, selections, note)
        yield from _seconds_cases(steps, graph, selections, note)


def _flops_case(steps: _Steps, graph: CostGraph, selections: Sequence[Sequence[str]], note: str) -> Measurement:
    some = selections[:COUNTED]
    predicted, counted = [graph.step(names) / 1e12 for names in some], [steps.flops(names) / 1e12 for names in some]
    text = f"FLOPs of a step, predicted | counted, {COUNTED} selections{note}"
    return Measurement(text, "TFLOP", Quantity.SHARE, predicted, counted)


def _seconds_cases(
    steps: _Steps, graph: CostGraph, selections: Sequence[Sequence[str]], note: str
) -> Iterator[Measurement]:
    steps.seconds(list(graph.by_name))  # makes the optimizer's state
    batch = {"input_ids": steps.ids, "labels": steps.ids}
    seconds = measure(steps.model, batch, graph, steps.optimizer)
    least = [seconds.smallest()[0]]
    samples: list[list[float]] = [[] for _ in selections]
    forwards = []
    for _ in range(ROUNDS):
        forwards.append(steps.seconds(least)[0])
        for names, sample in zip(selections, samples, strict=True):
            sample.append(steps.seconds(names)[1])
    forward = statistics.median(forwards)
    measured = [statistics.median(sample) - forward for sample in samples]
    predicted = [seconds.step(names) - forward for names in selections]
    errors = [100 * abs(ours - clock) / clock for ours, clock in zip(predicted, measured, strict=True)]
    text = f"{len(selections)} random selections{note}"
    yield Measurement(f"backward and update, predicted | measured, {text}", "s", Quantity.SHARE, predicted, measured)
    yield Measurement(f"error, median | goal, {text}", "%", Quantity.COUNT, errors, [GOAL] * len(errors))
