"""Random tensors within a budget: what any importance has to be better than."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from peftkern.select.cost_graph import CostGraph
from peftkern.select.policy import Policy
from peftkern.select.record import record
from peftkern.select.selection import Selection
from peftkern.select.solver import BudgetError


def draw(graph: CostGraph, budget: float, generator: torch.Generator) -> tuple[str, ...]:
    """Tensors in random order, each of them where the backward pass still stays within ``budget``.

    Raises:
        BudgetError: no tensor is affordable.
    """
    names = list(graph.by_name)
    chosen: list[str] = []
    paid: set[int] = set()
    costs: list[float] = []
    for position in torch.randperm(len(names), generator=generator).tolist():
        name = names[position]
        new = graph.needed([name]) - paid
        further = [graph.by_name[name].cost, *(graph.segments[index].cost for index in new)]
        if math.fsum([*costs, *further]) <= budget:
            chosen.append(name)
            costs += further
            paid |= new
    if not chosen:
        name, rho = graph.smallest()
        smallest = graph.backward([name])
        raise BudgetError(f"draw: a budget of {budget:g} is too small; {name} needs {smallest:.17g}", smallest, rho)
    return tuple(sorted(chosen, key=names.index))


class RandomSelection(Policy):
    """Train random tensors, others in every interval, whose step costs at most ``rho`` of the full one.

    Args:
        rho: budget as a share of the FLOPs, or of what ``graph`` counts, of the step that trains all candidates, its
            forward pass included.
        interval: updates, or epochs, between two draws.
        interval_unit: ``"steps"`` or ``"epochs"``.
        seed: the same seed draws the same tensors, whenever training was interrupted.
        graph: costs; ``None``: they are recorded from the first batch, in FLOPs.

    Raises:
        ValueError: an argument is none of these.
        BudgetError: in the first step: ``rho`` is too small for any tensor.
    """

    def __init__(
        self,
        rho: float = 0.5,
        interval: int = 100,
        interval_unit: str = "steps",
        seed: int = 0,
        graph: CostGraph | None = None,
    ) -> None:
        super().__init__(interval, interval_unit)
        if not 0 < rho <= 1:
            raise ValueError(f"RandomSelection: rho must be above 0 and at most 1, got {rho}")
        self.rho, self.seed, self.graph = rho, seed, graph

    def observe(self, batch: Mapping[str, Any]) -> None:
        if self.graph is None:
            self.graph = self.known_costs().get("flops") or record(self.prepared(), batch, candidates=self.candidates)

    def select(self) -> Selection:
        if self.graph is None:
            raise RuntimeError("RandomSelection: call observe(batch) before select(), or give a graph")
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + len(self.history))
        names = draw(self.graph, self.graph.backward_budget(self.rho), generator)
        return self.selected(names, costs={self.graph.unit: self.graph})
