"""LISA: train embeddings, head and a few random blocks, others in every interval.

Source: LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model Fine-Tuning, Pan et al. 2024
(arXiv:2403.17919), algorithm 1: all blocks are drawn with the same probability.
"""

from __future__ import annotations

import torch
from torch import nn

from peftkern.select.policy import Policy
from peftkern.select.presets import block_indices
from peftkern.select.selection import Selection


class LISA(Policy):
    """Train ``blocks`` random blocks and everything outside of blocks: embeddings, the last norm, the head.

    Args:
        blocks: how many are drawn each time (γ in the paper).
        interval: updates, or epochs, between two draws (K in the paper).
        interval_unit: ``"steps"`` or ``"epochs"``.
        seed: the same seed draws the same blocks, whenever training was interrupted.

    Raises:
        ValueError: an argument is none of these. In `prepare`: fewer blocks than ``blocks`` have a parameter that
            requires a gradient.
    """

    def __init__(self, blocks: int = 2, interval: int = 20, interval_unit: str = "steps", seed: int = 0) -> None:
        super().__init__(interval, interval_unit)
        if blocks < 1:
            raise ValueError(f"LISA: blocks must be at least 1, got {blocks}")
        self.blocks, self.seed = blocks, seed
        self._indices: dict[str, int | None] = {}

    def prepare(self, model: nn.Module) -> None:
        super().prepare(model)
        indices = block_indices(model, self.candidates)
        count = len(set(indices.values()) - {None})
        if count < self.blocks:
            self.model = self._execution = None
            raise ValueError(f"LISA: blocks must be at most {count}, which have parameters to train; got {self.blocks}")
        self._indices = indices

    def select(self) -> Selection:
        there = sorted({index for index in self._indices.values() if index is not None})
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.history))
        drawn = torch.randperm(len(there), generator=generator)[: self.blocks].tolist()
        chosen = {None, *(there[position] for position in drawn)}
        return self.selected(name for name, index in self._indices.items() if index in chosen)
