"""GreenTrainer's selection as its authors publish it, to compare with `peftkern.select.solve`.

The tensors form one chain, index 0 next to the loss. ``L[k, t]`` is the best importance of the first ``k`` tensors
within time ``t``, where tensor ``k - 1`` is either skipped, or selected on top of the last one that was selected before
it, its anchor ``a``, at a cost of ``dw[k-1] + dy[a] + ... + dy[k-1]``. Costs are divided into 1000 levels and rounded
down.

Three things keep it from the optimum, and are kept here:

* levels that are rounded down hide cost, so that the selection can exceed the budget;
* where the error can be handed down the whole chain, the tensor next to the input is never looked at;
* a state in which selecting is not better than skipping is not an anchor, although it is cheaper to go on from.

Source: Huang et al. 2024 (arXiv:2309.13192), section 3.3, and its public implementation, as they describe it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftkern.select.cost_graph import CostGraph, TensorCost

LEVELS = 1000


@dataclass(frozen=True)
class Chain:
    """A cost graph as one chain: parallel branches one behind the other.

    Attributes:
        names: of the tensors, next to the loss first.
        error: cost of handing the error on to each tensor from the one before.
        gradient: cost of each tensor's gradient.
    """

    names: tuple[str, ...]
    error: NDArray[np.float64]
    gradient: NDArray[np.float64]

    @classmethod
    def of(cls, graph: CostGraph) -> Chain:
        """The tensors from the loss on; each pays for the segments that none before it has needed.

        A tied embedding comes last, where the error has to come through all layers, not with the head that it also is.
        """

        def path(tensor: TensorCost) -> float:
            return sum(graph.segments[index].cost for index in graph.needed([tensor.name]))

        tensors = sorted(graph.tensors, key=path)
        paid: set[int] = set()
        error = []
        for tensor in tensors:
            new = graph.needed([tensor.name]) - paid
            error.append(sum(graph.segments[index].cost for index in new))
            paid |= new
        gradient = np.array([tensor.cost for tensor in tensors])
        return cls(tuple(tensor.name for tensor in tensors), np.array(error), gradient)


def published_select(
    graph: CostGraph, importance: Mapping[str, float], budget: float, levels: int = LEVELS
) -> tuple[str, ...]:
    """Names of the tensors that the published method trains, whose backward pass should cost ``budget`` at most.

    Args:
        levels: that all costs together are divided into; where they are integers, their sum keeps them as they are.
    """
    chain = Chain.of(graph)
    total = float(chain.error.sum() + chain.gradient.sum())
    scale = levels / total if total else 0.0
    error, gradient = (np.floor(costs * scale).astype(np.int64) for costs in (chain.error, chain.gradient))
    table = _Table(error, gradient, [importance[name] for name in chain.names], int(budget * scale))
    return tuple(chain.names[index] for index in table.selected())


class _Table:
    """``best[k, t]``, and the anchor of tensor ``k - 1`` where it was selected there; -1 where it was skipped."""

    def __init__(self, error: NDArray[np.int64], gradient: NDArray[np.int64], values: list[float], budget: int) -> None:
        self.path = np.append(0, np.cumsum(error))
        self.gradient, self.budget = gradient, budget
        self.reach = self._reach()
        self.best = np.zeros((self.reach + 1, max(budget, 0) + 1))
        self.anchors = np.full(self.best.shape, -1, dtype=np.int64)
        for k in range(1, self.reach + 1):
            self._fill(k, values[k - 1])

    def _reach(self) -> int:
        """How many tensors are looked at: those whose error is affordable, and in any case not the last one."""
        affordable = int(np.searchsorted(self.path[1:], self.budget, side="right"))
        return max(0, min(affordable, len(self.gradient) - 1))

    def _cost(self, k: int, anchor: int) -> int:
        return int(self.gradient[k - 1] + self.path[k] - self.path[anchor])

    def _fill(self, k: int, value: float) -> None:
        best, anchors = self.best, self.anchors
        best[k] = best[k - 1]
        for anchor in range(k):
            cost = self._cost(k, anchor)
            if cost > self.budget:
                continue
            before = best[anchor, : self.budget + 1 - cost]
            usable = anchors[anchor, : self.budget + 1 - cost] >= 0 if anchor else np.ones(len(before), dtype=bool)
            better = usable & (before + value > best[k, cost:])
            best[k, cost:][better] = before[better] + value
            anchors[k, cost:][better] = anchor

    def selected(self) -> list[int]:
        """Indices of the best selection, next to the loss first."""
        found, k, time = [], self.reach, max(self.budget, 0)
        while k:
            anchor = int(self.anchors[k, time])
            if anchor < 0:
                k -= 1
                continue
            found.append(k - 1)
            k, time = anchor, time - self._cost(k, anchor)
        return found[::-1]
