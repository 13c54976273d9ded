"""A policy for tests: groups of names, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peftkern.select.policy import Policy
from peftkern.select.selection import Selection


class RoundRobin(Policy):
    """Trains the candidates whose name holds one of ``words``, another word each time.

    Attributes:
        observed: the batches that it was shown.
        inside: called while it observes.
    """

    def __init__(self, words: Sequence[str], interval: int | None = 2, unit: str = "steps", **options: Any) -> None:
        super().__init__(interval, unit, **options)
        self.words = words
        self.observed: list[Mapping[str, Any]] = []
        self.inside: Any = None
        self._turn = 0

    def observe(self, batch: Mapping[str, Any]) -> None:
        self.observed.append({name: v.clone() if isinstance(v, Tensor) else v for name, v in batch.items()})
        if self.inside is not None:
            self.inside(batch)

    def select(self) -> Selection:
        word = self.words[self._turn % len(self.words)]
        self._turn += 1
        return self.selected(name for name in self.candidates if word in name)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "turn": self._turn}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._turn = state["turn"]
        super().load_state(state)
