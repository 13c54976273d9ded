"""The loss on held-out examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from peftkern.finetune.encoding import IGNORED, Example, PadRight
from peftkern.finetune.errors import RunError


@dataclass(frozen=True)
class HeldOutLoss:
    """Mean cross-entropy in nats per token, over all ``tokens`` that the loss counts."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """``exp(loss)``, infinite where that is too large for a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def held_out_loss(
    model: Any,
    examples: Sequence[Example],
    collate: PadRight,
    batch_size: int,
    logits: bool = True,
    on_batch: Callable[[int], None] = lambda examples: None,
) -> HeldOutLoss:
    """The loss of ``model`` on ``examples``, each token weighing the same. The model's mode is as before afterwards.

    Args:
        logits: without them the loss takes less memory, where the model is one that can do without.
        on_batch: called after each batch with its number of examples.

    Raises:
        RunError: the loss is not finite.
    """
    by_length = sorted(examples, key=lambda example: len(example["input_ids"]))
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    try:
        for start in range(0, len(by_length), batch_size):
            members = by_length[start : start + batch_size]
            batch = {name: tensor.to(model.device) for name, tensor in collate(members).items()}
            count = int((batch["labels"][:, 1:] != IGNORED).sum())
            with torch.no_grad():
                total += _loss(model, batch, logits) * count
            tokens += count
            on_batch(len(members))
    finally:
        model.train(was_training)
    if not math.isfinite(total):
        raise RunError(
            f"the loss on held-out data is {total}; the model's weights or its dtype do not carry the numbers"
        )
    return HeldOutLoss(total / tokens, tokens)


def _loss(model: Any, batch: Mapping[str, Any], logits: bool) -> float:
    """The mean."""
    if not logits:
        from peftkern.integrations.preference import token_logprobs

        with suppress(ValueError):  # the report of `patch` says that this model needs its logits
            logprobs = token_logprobs(model, batch)
            return -float(logprobs.sum()) / int((batch["labels"][:, 1:] != IGNORED).sum())
    return float(model(**batch).loss)
