"""A step of AdamW on 8M entries, against PyTorch's fused one, and with 8-bit moments against bitsandbytes.

The clocks measure one step each on tensors of its own; gradients stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from peftkern.bench import peers
from peftkern.bench.case import Case, Effort
from peftkern.optim import AdamW, AdamW8bit

ELEMENTS = 8 << 20
CHECKED_STEPS = 3
NUMBERS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}

CODES_TOLERANCE = 1e-1
"""Relative difference of what parameters have moved, where both sides round their moments to 8 bits."""


def _parameters(elements: int) -> tuple[nn.Parameter, nn.Parameter]:
    """One for each side, with the same values and gradients."""
    generator = torch.Generator().manual_seed(0)
    values, gradient = 0.02 * torch.randn(elements, generator=generator), torch.randn(elements, generator=generator)
    ours, peer = nn.Parameter(values), nn.Parameter(values.clone())
    ours.grad, peer.grad = 1e-2 * gradient, 1e-2 * gradient
    return ours, peer


def _setup(text: str, ours: torch.optim.Optimizer, peer: torch.optim.Optimizer, tolerance: float) -> Case:
    parameters: list[Tensor] = [optimizer.param_groups[0]["params"][0] for optimizer in (ours, peer)]

    def check() -> None:
        start = [parameter.detach().clone() for parameter in parameters]
        for _ in range(CHECKED_STEPS):
            ours.step()
            peer.step()
        moved, expected = (parameter.detach() - old for parameter, old in zip(parameters, start, strict=True))
        peers.check_agreement({f"what {CHECKED_STEPS} steps have moved": (moved, expected)}, tolerance)

    return Case(text, ours.step, peer.step, check, effort=Effort(seconds=4.0))


def setup_adamw(elements: int = ELEMENTS) -> Case:
    """float32 parameters and moments; the peer is ``torch.optim.AdamW(fused=True)``."""
    ours, peer = _parameters(elements)
    optimizers = AdamW([ours], **NUMBERS), torch.optim.AdamW([peer], **NUMBERS, fused=True)
    return _setup(f"AdamW, {elements:,} entries", *optimizers, peers.FLOAT32_TOLERANCE)


def setup_adamw_8bit(elements: int = ELEMENTS) -> Case:
    """float32 parameters, 8-bit moments; the peer is bitsandbytes."""
    import bitsandbytes as bnb

    ours, peer = _parameters(elements)
    optimizers = AdamW8bit([ours], **NUMBERS), bnb.optim.AdamW8bit([peer], **NUMBERS)
    return _setup(f"8-bit AdamW, {elements:,} entries", *optimizers, CODES_TOLERANCE)


def cases() -> Iterator[Case]:
    """Cases of ``adamw``."""
    yield setup_adamw()
    yield setup_adamw_8bit()
