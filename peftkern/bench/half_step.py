"""A step of half fine-tuning of SmolLM2-135M, beside full fine-tuning of it as PyTorch does it.

float32, dense, batch 4 x 256; a step is forward, loss, backward and AdamW. The embedding, which is the head as well, is
a fifth of this model, and half fine-tuning is published with it trained; both cases are measured.
"""

from __future__ import annotations

from collections.abc import Iterator

from peftkern.bench import peers, smollm2
from peftkern.bench.case import Case, Effort, Measurement
from peftkern.bench.result import Quantity
from peftkern.bench.step import EFFORT, TOLERANCE

EMBEDDINGS = {"freeze": "embedding frozen", "train": "embedding trained"}


def setup_step(
    checkpoint: smollm2.Checkpoint,
    embeddings: str,
    batch: int = smollm2.BATCH,
    length: int = smollm2.LENGTH,
    effort: Effort = EFFORT,
) -> tuple[Case, smollm2.Loop, smollm2.Loop]:
    """The case, and the loops of ours and of the peer in it. Every gradient of ours is checked against the peer's."""
    full, half = smollm2.dense_loop(checkpoint.folder), smollm2.half_loop(checkpoint.folder, embeddings)
    (ids,) = smollm2.make_batches(checkpoint.folder, 1, batch, length)

    def check() -> None:
        full_loss, full_gradients = full.loss_and_gradients(ids)
        half_loss, half_gradients = half.loss_and_gradients(ids)
        pairs = {f"gradient of {name}": (half_gradients[name], full_gradients[name]) for name in half_gradients}
        peers.check_agreement({"loss": (half_loss, full_loss), **pairs}, TOLERANCE)

    text = f"half | full fine-tuning, {EMBEDDINGS[embeddings]}, batch {batch} x {length}"
    text = f"{text}, {checkpoint.note}" if checkpoint.note else text
    return Case(text, lambda: half.step(ids), lambda: full.step(ids), check, unit="s", effort=effort), half, full


def cases() -> Iterator[Case | Measurement]:
    """Time, and bytes of gradients and optimizer state, of ``hft-step``."""
    with smollm2.checkpoint() as checkpoint:
        for embeddings, text in EMBEDDINGS.items():
            case, half, full = setup_step(checkpoint, embeddings)
            yield case
            ours, peer = half.training_bytes(), full.training_bytes()
            for what in ours:
                yield Measurement(f"{what}, {text}", "MB", Quantity.MEMORY, [ours[what] / 1e6], [peer[what] / 1e6])
