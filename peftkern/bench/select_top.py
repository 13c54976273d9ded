"""The largest 0.5% of 100M values in 200 tensors, against ``torch.topk`` of their concatenation."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from peftkern.bench import peers
from peftkern.bench.case import Case, Effort
from peftkern.ops.select_top import select_top

TENSORS, ELEMENTS = 200, 500_000
SHARE = 0.005


def setup_select(tensors: int = TENSORS, elements: int = ELEMENTS, share: float = SHARE) -> Case:
    """By magnitude; the check compares the values that both sides choose."""
    generator = torch.Generator().manual_seed(0)
    values = [(1 + i / tensors) * torch.randn(elements, generator=generator) for i in range(tensors)]
    k = int(share * tensors * elements)

    def ours() -> list[Tensor]:
        return select_top(values, k)

    def peer() -> Tensor:
        return torch.topk(torch.cat(values).abs_(), k, sorted=False).indices

    def check() -> None:
        chosen = torch.cat([tensor[indices] for tensor, indices in zip(values, ours(), strict=True)])
        expected = torch.cat(values)[peer()]
        peers.check_equal_bytes("magnitudes", chosen.abs().sort().values, expected.abs().sort().values)

    return Case(f"{k:,} of {tensors} x {elements:,} values", ours, peer, check, effort=Effort(seconds=10.0))


def cases() -> Iterator[Case]:
    """Cases of ``select-top``."""
    yield setup_select()
