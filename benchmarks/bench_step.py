"""A training step of SmolLM2-135M, and its losses: ``pytest benchmarks/bench_step.py``."""

from __future__ import annotations

from collections.abc import Callable

from peftkern.bench import loss, smollm2, step


def test_step(compare: Callable[..., None]) -> None:
    with smollm2.checkpoint() as checkpoint:
        compare(step.setup_step(checkpoint), rounds=step.EFFORT.minimum_pairs)


def test_loss_parity(record: Callable[..., None]) -> None:
    with smollm2.checkpoint() as checkpoint:
        record(lambda: loss.compare_losses(checkpoint))
