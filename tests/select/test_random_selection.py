"""Random selection: never over the budget, different every time, the same for a seed."""

from __future__ import annotations

import pytest
import torch
from select_models import batches, changed, llama, values

from peftkern.optim import AdamW
from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.random_selection import RandomSelection, draw
from peftkern.select.solver import BudgetError

CHAIN = CostGraph(
    "flops",
    12.0,
    tuple(Segment(cost, (i - 1,) if i else ()) for i, cost in enumerate([0, 2, 1, 4, 0])),
    tuple(TensorCost(f"t{i}", cost, (i,)) for i, cost in enumerate([5, 1, 7, 3, 1])),
)


@pytest.mark.parametrize("budget", [1.0, 3.0, 9.5, 14.0, 24.0])
def test_it_stays_within_the_budget_and_uses_it(budget: float) -> None:
    seen = set()
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        if budget < 3:
            with pytest.raises(BudgetError, match="t1 needs 3"):
                draw(CHAIN, budget, generator)
            continue
        names = draw(CHAIN, budget, generator)
        assert CHAIN.backward(names) <= budget
        # nothing that was left out fits any more
        assert all(CHAIN.backward([*names, other]) > budget for other in set(CHAIN.by_name) - set(names))
        seen.add(names)
    assert len(seen) == {1.0: 0, 3.0: 1, 24.0: 1}.get(budget, len(seen))
    assert budget not in (9.5, 14.0) or len(seen) > 1


def test_it_trains_what_it_drew_and_counts_what_that_costs() -> None:
    model = llama(num_hidden_layers=3)
    policy = RandomSelection(rho=0.6, interval=2, seed=3)
    policy.prepare(model)
    policy.start(AdamW(policy.parameters(), lr=0.01, weight_decay=0.1))
    for batch in batches(6):
        before = values(model)
        policy.step(model, batch)
        assert policy.selection is not None
        assert changed(model, before) == set(policy.selection.names)
        assert policy.selection.share("flops") <= 0.6
    assert len({selection.names for selection in policy.history}) == 3


def test_the_seed_decides() -> None:
    def names(seed: int) -> list[tuple[str, ...]]:
        policy = RandomSelection(0.5, seed=seed, graph=CHAIN)
        policy.candidates = tuple(CHAIN.by_name)
        found = []
        for _ in range(4):
            policy.history.append(policy.select())
            found.append(policy.history[-1].names)
        return found

    assert names(0) == names(0) != names(1)


@pytest.mark.parametrize("rho", [0.0, 1.5, -1.0])
def test_a_wrong_rho_is_refused(rho: float) -> None:
    with pytest.raises(ValueError, match="rho must be above 0"):
        RandomSelection(rho)
