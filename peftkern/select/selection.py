"""What a policy has chosen to train, and what it expects that to cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from peftkern.patch.table import format_table
from peftkern.select.cost_graph import CostGraph


@dataclass(frozen=True)
class Selection:
    """Tensors that are trained until the next selection. ``str()`` says in one paragraph what that means.

    Attributes:
        policy: name of the policy that chose.
        names: of the trained parameters, in the model's order.
        candidates: names of all parameters that could have been chosen.
        step: number of updates that had been made when it was chosen.
        importances: of the candidates, as far as the policy looked at them.
        costs: of the step in each unit that was asked for.
    """

    policy: str
    names: tuple[str, ...]
    candidates: tuple[str, ...]
    step: int = 0
    importances: Mapping[str, float] = field(default_factory=dict)
    costs: Mapping[str, CostGraph] = field(default_factory=dict)

    @cached_property
    def step_costs(self) -> dict[str, float]:
        """Predicted cost of a step in each unit."""
        return {unit: graph.step(self.names) for unit, graph in self.costs.items()}

    def share(self, unit: str) -> float:
        """Predicted cost of a step as a share of the step that trains all candidates.

        Raises:
            KeyError: costs in this unit are not known.
        """
        return self.step_costs[unit] / self.costs[unit].full

    @property
    def importance_share(self) -> float | None:
        """Share of all positive importance that is trained; ``None`` where nothing has a positive one."""
        total = _positive(self.importances.values())
        return _positive(self.importances.get(name, 0.0) for name in self.names) / total if total > 0 else None

    def __str__(self) -> str:
        share = self.importance_share
        facts = [f"{self.share(unit):.1%} of the {unit} of a full step" for unit in self.costs]
        facts += [] if share is None else [f"{share:.1%} of the importance"]
        head = f"{self.policy}, update {self.step}: trains {len(self.names)} of {len(self.candidates)} tensors"
        return "; ".join([head, *facts])

    def table(self) -> str:
        """One line for each trained tensor: its importance and its own cost in each unit."""
        headers = ["trained", "importance", *self.costs]
        lines = [
            [name, _number(self.importances.get(name)), *(f"{g.by_name[name].cost:.3g}" for g in self.costs.values())]
            for name in self.names
        ]
        return format_table(headers, lines)


def _positive(values: Iterable[float]) -> float:
    return sum(value for value in values if value > 0)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
