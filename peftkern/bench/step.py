"""A training step of SmolLM2-135M: NF4 double-quantized, LoRA r=16 on all linears, batch 4 x 256, float32 or bfloat16.

A step is forward, loss, backward and AdamW on the adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from peftkern.bench import peers, smollm2
from peftkern.bench.case import Case, Effort

EFFORT = Effort(minimum_pairs=5, maximum_pairs=15, seconds=60.0)

TOLERANCE = 1e-4
"""For the loss and every gradient: float32 rounding, summed up over the layers."""

LOG_SOFTMAX_TOLERANCE = 1e-3
"""Where ours does without logits: the peer's float32 log-softmax over 49152 scores is off by 2e-6 for every token, to
the same side. Against a loss in float64 its gradients are off by up to 4e-4, and ours by 1e-5."""

BFLOAT16_TOLERANCE = 0.25
"""The same for bfloat16: every layer rounds what passes through it to 8 bits, forward and backward."""


WITHOUT_LOGITS = "ours with logits=False"


def setup_step(
    checkpoint: smollm2.Checkpoint,
    batch: int = smollm2.BATCH,
    length: int = smollm2.LENGTH,
    effort: Effort = EFFORT,
    ours: str = "ours",
    peer: str = "peer",
    tolerance: float = TOLERANCE,
    what: str = "",
) -> Case:
    """One step of two of `smollm2.LOOPS` on the same batch, with models from the same checkpoint and equal adapters.

    ``what`` says in the name of the case how ours differs from the ordinary.
    """
    theirs, mine = smollm2.LOOPS[peer](checkpoint.folder), smollm2.LOOPS[ours](checkpoint.folder)
    (ids,) = smollm2.make_batches(checkpoint.folder, 1, batch, length)
    peers.fill_lora_b(theirs.model, torch.Generator().manual_seed(1))
    peers.copy_adapter(theirs.model, mine.model)

    def check() -> None:
        our_loss, our_gradients = mine.loss_and_gradients(ids)
        peer_loss, peer_gradients = theirs.loss_and_gradients(ids)
        pairs = {f"gradient of {name}": (our_gradients[name], peer_gradients[name]) for name in peer_gradients}
        peers.check_agreement({"loss": (our_loss, peer_loss), **pairs}, tolerance)

    text = ", ".join(filter(None, [f"forward + backward + AdamW, batch {batch} x {length}", what, checkpoint.note]))
    return Case(text, lambda: mine.step(ids), lambda: theirs.step(ids), check, unit="s", effort=effort)


def cases() -> Iterator[Case]:
    """Cases of ``step-smollm2``."""
    with smollm2.checkpoint() as checkpoint:
        yield setup_step(checkpoint)
        yield setup_step(checkpoint, ours="ours without logits", tolerance=LOG_SOFTMAX_TOLERANCE, what=WITHOUT_LOGITS)


def bf16_cases() -> Iterator[Case]:
    """Cases of ``step-smollm2-bf16``."""
    with smollm2.checkpoint() as checkpoint:
        in_bf16: dict[str, Any] = {"peer": "peer bf16", "tolerance": BFLOAT16_TOLERANCE}
        yield setup_step(checkpoint, ours="ours bf16", **in_bf16)
        yield setup_step(checkpoint, ours="ours bf16 without logits", what=WITHOUT_LOGITS, **in_bf16)
