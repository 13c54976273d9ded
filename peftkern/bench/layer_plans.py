"""Plans by layer (`peftkern.patch(recompute=[...])`) on SmolLM2-135M's shape: peak memory and step time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import peftkern
from peftkern.bench import fresh_process
from peftkern.bench.case import Case, Effort, Measurement
from peftkern.bench.errors import DisagreementError
from peftkern.bench.memory import FREED_MEMORY_RETURNED
from peftkern.bench.plan_accuracy import SMOLLM2, Training, build_real
from peftkern.bench.result import Quantity

BATCH, LENGTH = 4, 256
EFFORT = Effort(minimum_pairs=3, maximum_pairs=5, seconds=30.0)


def plans(layers: int) -> Mapping[str, Sequence[str]]:
    """By what the row is called."""
    third = layers // 3
    return {
        "half of the layers mlp": ["mlp"] * (layers // 2) + ["store"] * (layers - layers // 2),
        "a third each layer, mlp, store": ["layer"] * third + ["mlp"] * third + ["store"] * (layers - 2 * third),
        "mlp": ["mlp"] * layers,
        "layer": ["layer"] * layers,
    }


def cases(shape: Mapping[str, Any] = SMOLLM2, batch: int = BATCH, length: int = LENGTH) -> Iterator[Case | Measurement]:
    """Cases of ``layer-plans``: the plan is ours, "store" in all layers is the peer."""
    yield from _memory(shape, batch, length)
    yield from _time(shape, batch, length)


def _call(batch: int, length: int, plan: Sequence[str] | None) -> dict[str, Any]:
    return {"batch": batch, "length": length, "logits": False, "recompute": plan}


def _memory(shape: Mapping[str, Any], batch: int, length: int) -> Iterator[Measurement]:
    def grown(plan: Sequence[str] | None) -> list[float]:
        arguments = {"shape": dict(shape), "calls": [_call(batch, length, plan)]}
        measured: list[float] = fresh_process.call(
            "peftkern.bench.plan_accuracy:train_and_watch", arguments, FREED_MEMORY_RETURNED
        )
        return measured

    stored = grown(None)
    for name, plan in plans(shape["num_hidden_layers"]).items():
        title = f"{name}, batch {batch} x {length}, peak of a step beside what was resident before"
        yield Measurement(title, "MB", Quantity.MEMORY, grown(plan), stored)


def _time(shape: Mapping[str, Any], batch: int, length: int) -> Iterator[Case]:
    from transformers import LlamaConfig

    config = LlamaConfig(**shape)
    ours, peer = (build_real(config, _call(batch, length, None)) for _ in range(2))
    training = [Training(model, config, {"batch": batch, "length": length}) for model in (ours, peer)]
    for name, plan in plans(shape["num_hidden_layers"]).items():
        peftkern.patch(ours, logits=False, recompute=plan)
        yield Case(
            f"{name}, batch {batch} x {length}, a step",
            training[0].step,
            training[1].step,
            lambda: _check(training[0], training[1]),
            unit="s",
            effort=EFFORT,
        )


def _check(ours: Training, peer: Training) -> None:
    losses = [float(side.model(input_ids=side.ids, labels=side.ids).loss.detach()) for side in (ours, peer)]
    if abs(losses[0] - losses[1]) > 1e-4 * abs(losses[1]):
        raise DisagreementError(f"the losses are {losses[0]} and {losses[1]}")
