"""The loss of SmolLM2-135M over 20 seeded training steps, ours and PEFT + bitsandbytes', on the same weights."""

from __future__ import annotations

from collections.abc import Iterator

from peftkern.bench import peers, smollm2
from peftkern.bench.case import Measurement
from peftkern.bench.result import Quantity

STEPS = 20


def train_both(checkpoint: smollm2.Checkpoint, steps: int, batch: int, length: int) -> tuple[list[float], list[float]]:
    """Losses of ours and of the peer's, step by step, on the same batches from equal adapters."""
    peer = smollm2.Loop(smollm2.load_peer(checkpoint.folder))
    ours = smollm2.Loop(smollm2.load_ours(checkpoint.folder))
    peers.copy_adapter(peer.model, ours.model)
    our_losses: list[float] = []
    peer_losses: list[float] = []
    with peers.matmul_precision("highest"):
        for ids in smollm2.make_batches(checkpoint.folder, steps, batch, length):
            peer_losses.append(peer.step(ids))
            our_losses.append(ours.step(ids))
    return our_losses, peer_losses


def compare_losses(
    checkpoint: smollm2.Checkpoint,
    steps: int = STEPS,
    batch: int = smollm2.BATCH,
    length: int = smollm2.LENGTH,
) -> list[Measurement]:
    """The losses themselves (the row shows the last), and their relative difference (the row shows the largest)."""
    ours, peer = train_both(checkpoint, steps, batch, length)
    differences = [abs(one - other) / abs(other) for one, other in zip(ours, peer, strict=True)]
    note = f", {checkpoint.note}" if checkpoint.note else ""
    return [
        Measurement(f"loss at step {steps}{note}", "loss", Quantity.LOSS, ours, peer),
        Measurement(
            f"largest relative difference of the loss over {steps} steps{note}",
            "relative",
            Quantity.DIFFERENCE,
            differences,
            [0.0] * steps,
        ),
    ]


def cases() -> Iterator[Measurement]:
    """Measurements of ``loss-parity``."""
    with smollm2.checkpoint() as checkpoint:
        yield from compare_losses(checkpoint)
