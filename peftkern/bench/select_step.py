"""A step of SmolLM2-135M in which GreenTrainer chooses what is trained, beside the step that trains everything.

Dense models are float32, as PyTorch runs them, on both sides; the LoRA rows are NF4, patched, on both sides. Batch 4 x
256; a step is forward, loss, backward and AdamW. Rows in "share" have beside them the share that was to be reached.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from peftkern.bench import memory, peers, smollm2
from peftkern.bench.case import Case, Effort, Measurement, measure, seconds_of
from peftkern.bench.result import Quantity
from peftkern.bench.step import TOLERANCE
from peftkern.select import GreenTrainer, Selection
from peftkern.select.flops import FlopCounter

EFFORT = Effort(minimum_pairs=5, maximum_pairs=9, seconds=25.0)
INTERVAL = 100  # updates
SECONDS_ALLOWED = {0.6: 0.65, 0.75: 0.80}
FLOPS_ALLOWED = {0.4: 0.55, 0.5: 0.62, 0.7: 0.78}
"""Budgets in seconds and in FLOPs, and the share of the full step's seconds that each may take."""
LORA_RHO, LORA_ALLOWED = 0.7, 0.75
STEPS_ALLOWED, SOLVER_SECONDS_ALLOWED = 2.0, 0.5


@dataclass(frozen=True)
class Pair:
    """A loop whose policy has chosen, the full one on the same weights, and the seconds that choosing took."""

    green: smollm2.PolicyLoop
    full: smollm2.Loop
    choosing: float
    ids: Tensor
    note: str

    def case(self, text: str, effort: Effort = EFFORT) -> Case:
        """Their steps; every gradient of the policy's is checked against the full one's."""
        return Case(
            self.text(text),
            lambda: self.green.step(self.ids),
            lambda: self.full.step(self.ids),
            self.check,
            unit="s",
            effort=effort,
        )

    def text(self, text: str) -> str:
        """What a row says."""
        return f"{text}, {self.note}" if self.note else text

    def check(self) -> None:
        """Raise `DisagreementError` unless both compute the same loss and gradients."""
        loss, gradients = self.green.loss_and_gradients(self.ids)
        full_loss, full = self.full.loss_and_gradients(self.ids)
        pairs = {f"gradient of {name}": (gradients[name], full[name]) for name in gradients}
        peers.check_agreement({"loss": (loss, full_loss), **pairs}, TOLERANCE)

    def shares(self, seconds: Measurement) -> list[float]:
        """Seconds of the policy's step over the full one's, pair by pair, with what choosing takes of an interval."""
        pairs = zip(seconds.ours, seconds.peer, strict=True)
        return [(ours + self.choosing / INTERVAL) / full for ours, full in pairs]


def prepare(
    checkpoint: smollm2.Checkpoint,
    full: Callable[[str], smollm2.Loop],
    load: Callable[[str], object],
    policy: GreenTrainer,
    batch: int = smollm2.BATCH,
    length: int = smollm2.LENGTH,
) -> Pair:
    """Load both and let the policy choose."""
    other = full(checkpoint.folder)
    green = smollm2.PolicyLoop(load(checkpoint.folder), policy)
    (ids,) = smollm2.make_batches(checkpoint.folder, 1, batch, length)
    first = seconds_of(lambda: green.step(ids))
    second = seconds_of(lambda: green.step(ids))
    other.model.load_state_dict(green.model.state_dict())
    return Pair(green, other, max(0.0, first - second), ids, checkpoint.note)


def _dense(checkpoint: smollm2.Checkpoint, policy: GreenTrainer) -> Pair:
    return prepare(checkpoint, smollm2.dense_loop, smollm2.load_dense, policy)


def _share_row(text: str, shares: Sequence[float], allowed: float) -> Measurement:
    return Measurement(text, "share", Quantity.COUNT, shares, [allowed] * len(shares))


def _timed(pair: Pair, text: str, allowed: float) -> Iterator[Measurement]:
    """The step, and its share of the full one: alone, and with all that the first choice takes in one interval."""
    seconds = measure(pair.case(f"{text}: step | full step"))
    yield seconds
    alone = [ours / full for ours, full in zip(seconds.ours, seconds.peer, strict=True)]
    yield _share_row(pair.text(f"{text}: seconds of the full step"), alone, allowed)
    choosing = f"{text}: the same, first choice and finding the costs included"
    yield _share_row(pair.text(choosing), pair.shares(seconds), allowed)


def seconds_cases() -> Iterator[Measurement]:
    """Measurements of ``select-seconds``."""
    with smollm2.checkpoint() as checkpoint:
        for rho, allowed in SECONDS_ALLOWED.items():
            pair = _dense(checkpoint, GreenTrainer(rho, INTERVAL, budget="seconds"))
            yield from _timed(pair, f"rho {rho} of seconds", allowed)


def flops_cases() -> Iterator[Measurement]:
    """Measurements of ``select-flops``."""
    with smollm2.checkpoint() as checkpoint:
        for rho, allowed in FLOPS_ALLOWED.items():
            pair = _dense(checkpoint, GreenTrainer(rho, INTERVAL))
            yield from _timed(pair, f"rho {rho} of FLOPs", allowed)
            counted = counted_flops(pair.green, pair.ids) / counted_flops(pair.full, pair.ids)
            yield _share_row(pair.text(f"rho {rho} of FLOPs: FLOPs of the full step, counted"), [counted], rho)


def counted_flops(loop: smollm2.Loop, ids: Tensor) -> float:
    """FLOPs of a step's forward and backward pass, counted operator by operator while they run."""
    with FlopCounter() as counter:
        loop.loss_and_gradients(ids)
    return float(counter.total)


def lora_cases() -> Iterator[Measurement]:
    """Measurements of ``select-lora``."""
    with smollm2.checkpoint() as checkpoint:
        policy = GreenTrainer(LORA_RHO, INTERVAL, budget="seconds")
        pair = prepare(checkpoint, smollm2.LOOPS["ours"], smollm2.load_ours, policy)
        yield from _timed(pair, f"LoRA on NF4, rho {LORA_RHO} of seconds", LORA_ALLOWED)


def memory_cases() -> Iterator[Measurement]:
    """Measurements of ``select-memory``."""
    with smollm2.checkpoint() as checkpoint:
        for setting in memory.SETTINGS:
            yield from memory.measure_memory(checkpoint, setting, ours="green", peer="dense")


def overhead_cases() -> Iterator[Measurement]:
    """Measurements of ``select-overhead``."""
    with smollm2.checkpoint() as checkpoint:
        for budget, rho in (("flops", 0.5), ("seconds", 0.6)):
            yield from _overhead(_dense(checkpoint, GreenTrainer(rho, INTERVAL, budget=budget)), f"budget in {budget}")


def _overhead(pair: Pair, text: str, repeats: int = 3) -> Iterator[Measurement]:
    """What the first choice takes, which finds the costs, and what each later one takes, in full steps."""
    choices = [choose(pair) for _ in range(repeats)]
    steps = [seconds_of(lambda: pair.full.step(pair.ids)) for _ in range(repeats)]
    full = statistics.median(steps)
    for case, seconds, limit in (
        ("choosing, each time", [sum(parts) for parts in choices], STEPS_ALLOWED),
        ("choosing and finding the costs, once", [pair.choosing], STEPS_ALLOWED),
    ):
        yield _share_row(pair.text(f"{text}: {case}, in full steps"), [one / full for one in seconds], limit)
    solver = [solving for _, solving, _ in choices]
    limits = [SOLVER_SECONDS_ALLOWED] * repeats
    yield Measurement(pair.text(f"{text}: solver"), "s", Quantity.COUNT, solver, limits)


def choose(pair: Pair) -> tuple[float, float, float]:
    """Seconds of the probe, of the solver, and of letting the choice take effect."""
    policy, batch = pair.green.policy, {"input_ids": pair.ids, "labels": pair.ids}
    probing = seconds_of(lambda: policy.observe(batch))
    chosen: list[Selection] = []
    solving = seconds_of(lambda: chosen.append(policy.select()))
    return probing, solving, seconds_of(lambda: policy.apply(chosen[0]))
