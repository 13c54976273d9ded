"""A short comparison with PEFT + bitsandbytes, of the cases that ``peftkern bench`` runs at length."""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from peftkern.bench import memory
from peftkern.bench.case import Effort, Measurement, measure
from peftkern.bench.errors import BenchError
from peftkern.bench.result import Result, summarise
from peftkern.bench.smollm2 import Checkpoint
from peftkern.bench.step import setup_step

PEER_PACKAGE = "bitsandbytes"
MEMORY_SETTING = "freed memory returned"
"""How memory is measured: with what is freed returned to the system; otherwise the allocator's mood counts."""


@dataclass(frozen=True)
class Comparison:
    """Rows that could be measured, and why others could not."""

    rows: list[Result]
    problems: list[str]


def compare_with_peer(
    model_folder: Path, timed_steps: int, say: Callable[[str], None], memory_until: float = math.inf
) -> Comparison:
    """Time training steps of both sides in turn on the same weights and batch, and measure each side's peak memory.

    NF4 with double quantization, LoRA r=16 on all linear layers, float32: see :mod:`peftkern.bench.step`. Memory is
    measured in a fresh process for each side, over one step.

    Args:
        model_folder: a model folder with dense weights.
        timed_steps: steps per side, after one that warms it up. The figures are medians.
        say: is told what goes on.
        memory_until: memory is left out if ``time.perf_counter()`` is beyond this by then.
    """
    if importlib.util.find_spec(PEER_PACKAGE) is None:
        return Comparison([], [f"{PEER_PACKAGE} is not installed, so there is nothing to compare with"])
    checkpoint = Checkpoint(str(model_folder))
    rows: list[Result] = []
    problems: list[str] = []

    def attempt(what: str, measurements: Callable[[], list[Measurement]]) -> None:
        say(f"comparison: {what}")
        try:
            rows.extend(summarise(what, m.case, m.unit, m.quantity, m.ours, m.peer) for m in measurements())
        except BenchError as error:
            problems.append(f"{what}: {error}")

    attempt("training step", lambda: _step(checkpoint, timed_steps))
    if time.perf_counter() < memory_until:
        attempt("peak memory", lambda: _peak_memory(checkpoint))
    else:
        problems.append("peak memory: left out to save time; peftkern bench memory-smollm2 measures it")
    return Comparison(rows, problems)


def _step(checkpoint: Checkpoint, timed_steps: int) -> list[Measurement]:
    effort = Effort(minimum_pairs=timed_steps, maximum_pairs=timed_steps)
    return [measure(setup_step(checkpoint, effort=effort))]


def _peak_memory(checkpoint: Checkpoint) -> list[Measurement]:
    figures = memory.measure_memory(checkpoint, MEMORY_SETTING, pairs=1, steps=1)
    return [figure for figure in figures if figure.case.startswith(memory.PEAK)]
