"""The loss tail of SmolLM2-135M's shape (head and cross-entropy, forward and backward) with 75% of tokens ignored."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.bench import peers
from peftkern.bench.case import Case
from peftkern.ops import linear_cross_entropy

TOKENS, HIDDEN, VOCABULARY = 1024, 576, 49152
IGNORED = 0.75


def setup_tail(tokens: int = TOKENS, hidden: int = HIDDEN, vocabulary: int = VOCABULARY, trained: bool = True) -> Case:
    """Ours has labels for a quarter of the tokens, the other side for all; a check compares ours with PyTorch's."""
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, generator=generator) * hidden**-0.5).requires_grad_(trained)
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    few = labels.clone()
    few[torch.randperm(tokens, generator=generator)[: int(IGNORED * tokens)]] = -100
    asked = (states, weight) if trained else (states,)

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, asked))

    def check() -> None:
        expected = gradients(torch.nn.functional.cross_entropy(states @ weight.t(), few))
        ours = gradients(linear_cross_entropy(states, weight, few))
        names = ("loss", "states", "weight")
        peers.check_agreement(dict(zip(names, zip(ours, expected, strict=True), strict=False)), 5e-6)

    head = "trained" if trained else "frozen"
    return Case(
        f"{tokens} tokens, {hidden} x {vocabulary:,}, {head} head: 75% ignored, beside none",
        lambda: gradients(linear_cross_entropy(states, weight, few)),
        lambda: gradients(linear_cross_entropy(states, weight, labels)),
        check,
    )


def cases() -> Iterator[Case]:
    """Cases of ``loss-ignored``."""
    yield setup_tail()
    yield setup_tail(trained=False)
