"""The exact selector, against all subsets of small graphs and sums by hand."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from itertools import chain, combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftkern.select import solver
from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.solver import BudgetError, solve


def chain_of(error_costs: Iterable[float], gradient_costs: Iterable[float], forward: float = 0.0) -> CostGraph:
    """Index 0 nearest to the loss; a tensor needs the error through its own operator as well."""
    segments = tuple(Segment(cost, (i - 1,) if i else ()) for i, cost in enumerate(error_costs))
    return CostGraph(
        "flops", forward, segments, tuple(TensorCost(f"t{i}", c, (i,)) for i, c in enumerate(gradient_costs))
    )


def importances(graph: CostGraph, values: Iterable[float]) -> dict[str, float]:
    return dict(zip(graph.by_name, values, strict=True))


def best_by_all_subsets(graph: CostGraph, importance: Mapping[str, float], budget: float) -> float | None:
    """The highest finite importance of a subset within the budget that has all required tensors."""
    names = list(graph.by_name)
    required = {name for name in names if importance[name] == math.inf}
    worth = [name for name in names if importance[name] > 0]
    subsets = chain.from_iterable(combinations(worth, size) for size in range(len(worth) + 1))
    values = [
        math.fsum(importance[name] for name in subset if name not in required)
        for subset in subsets
        if required <= set(subset) and graph.backward(subset) <= budget
    ]
    return max(values, default=None)


# ---- exactness

COSTS = st.one_of(
    st.integers(0, 6).map(float),
    st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.1]),
    st.floats(0, 1e3, allow_subnormal=False),
)
VALUES = st.one_of(
    st.integers(-3, 9).map(float), st.floats(-10, 100), st.sampled_from([0.0, math.inf, -math.inf, 1e-9, 1e9])
)


@st.composite
def graphs(draw: st.DrawFn) -> CostGraph:
    """Chains, branches and anything else whose needs point towards the loss."""
    segments: list[Segment] = []
    for index in range(draw(st.integers(0, 9))):
        before = st.sets(st.integers(0, index - 1), max_size=3) if index else st.just(set[int]())
        needs = {index - 1} if index and draw(st.booleans()) else draw(before)
        segments.append(Segment(draw(COSTS), tuple(sorted(needs))))
    places = st.sets(st.integers(0, len(segments) - 1), max_size=3) if segments else st.just(set[int]())
    tensors = [TensorCost(f"t{i}", draw(COSTS), tuple(sorted(draw(places)))) for i in range(draw(st.integers(0, 9)))]
    return CostGraph("seconds", draw(COSTS), tuple(segments), tuple(tensors))


@settings(max_examples=400, deadline=None)
@given(graphs(), st.data())
def test_it_finds_what_all_subsets_show(graph: CostGraph, data: st.DataObject) -> None:
    importance = {name: data.draw(VALUES) for name in graph.by_name}
    share = data.draw(st.one_of(st.just(1.0), st.floats(0, 1), st.sampled_from([0.25, 0.5, 0.75])))
    budget = data.draw(st.sampled_from([graph.backward_budget(share), share * graph.backward(graph.by_name)]))
    best = best_by_all_subsets(graph, importance, budget)
    try:
        solution = solve(graph, importance, budget)
    except BudgetError as error:
        # no tensor at all fits, or not all that are required; what the error names is enough, and nothing below
        assert best is None or best == 0
        assert error.smallest > budget
        assert solve(graph, importance, error.smallest).cost == error.smallest
        with pytest.raises(BudgetError):
            solve(graph, importance, math.nextafter(error.smallest, -math.inf))
        return
    assert best is not None
    assert solution.importance == pytest.approx(best, rel=1e-11)
    assert solution.cost == graph.backward(solution.names) <= budget
    assert solution.proven
    assert {name for name in importance if importance[name] == math.inf} <= set(solution.names)
    assert all(importance[name] > 0 for name in solution.names)


def test_the_worked_case_of_the_paper() -> None:
    graph = chain_of([0, 2, 1, 4, 0], [5, 1, 7, 3, 1])
    solution = solve(graph, importances(graph, [1, 3, 10, 5, 3]), 14.0)
    assert solution.names == ("t1", "t2")
    assert (solution.cost, solution.importance, solution.bound) == (11.0, 13.0, 13.0)


def test_rho_1_trains_everything_that_is_worth_it() -> None:
    rng = np.random.default_rng(0)
    graph = chain_of(rng.random(40), rng.random(40), forward=rng.random())
    values = importances(graph, [*([0.1] * 38), -1.0, 0.0])
    assert solve(graph, dict.fromkeys(values, 0.1), graph.backward_budget(1.0)).names == tuple(values)
    assert solve(graph, values, graph.backward_budget(1.0)).names == tuple(values)[:38]


def test_branches_side_by_side_are_not_charged_for_each_other() -> None:
    # loss <- 0 <- {1 queries, 2 keys} <- 3, which needs both; a serial chain would charge keys for the queries
    segments = (Segment(10), Segment(4, (0,)), Segment(4, (0,)), Segment(5, (1, 2)))
    graph = CostGraph("flops", 0.0, segments, tuple(TensorCost(n, 1, (i,)) for i, n in enumerate("oqkx")))
    values = {"o": 1.0, "q": 2.0, "k": 3.0, "x": 9.0}
    assert solve(graph, values, 16.0).names == ("o", "k")
    assert solve(graph, values, 24.0).names == ("x",)
    assert solve(graph, values, 23.0).names == ("o", "q", "k")


def test_experts_of_the_deepest_block_are_paid_one_by_one() -> None:
    experts = range(1, 129)
    segments = (Segment(100), *(Segment(10 + i % 3, (0,)) for i in experts), Segment(1, tuple(experts)))
    tensors = [*(TensorCost(f"e{i}", 1.0, (i,)) for i in experts), TensorCost("below", 1.0, (129,))]
    graph = CostGraph("flops", 0.0, segments, tuple(tensors))
    # every expert is worth 1: the cheapest ones are trained, 42 at 11 and then those at 12
    solution = solve(graph, {**dict.fromkeys(graph.by_name, 1.0), "below": 3.0}, 100.0 + 42 * 11 + 10 * 12 + 5)
    assert solution.importance == 52
    assert solution.cost == 100 + 42 * 11 + 10 * 12
    assert solution.proven


def test_two_ways_to_the_loss_that_share_a_tensor() -> None:
    # an encoder (0 to 2) beside a decoder (3 to 5), and embeddings that need both
    ways = [Segment(1, (i - 1,) if i % 3 else ()) for i in range(6)]
    tensors = [*(TensorCost(f"t{i}", 1, (i,)) for i in range(6)), TensorCost("embeddings", 1, (2, 5))]
    graph = CostGraph("flops", 0.0, tuple(ways), tuple(tensors))
    values = {**dict.fromkeys(graph.by_name, 1.0), "embeddings": 5.0}
    assert solve(graph, values, 8.0).names == ("t0", "embeddings")
    assert solve(graph, values, 6.0).importance == 3


@pytest.mark.parametrize("correlated", [True, False], ids=["correlated", "uncorrelated"])
@pytest.mark.parametrize("share", [0.1, 0.4, 0.7])
def test_large_chains_are_as_good_as_one_knapsack_for_every_depth(share: float, correlated: bool) -> None:
    # the method of the paper's chain with integers: the sweep over a table answers every deepest tensor
    rng = np.random.default_rng(3)
    errors, gradients = rng.integers(0, 20, 120), rng.integers(1, 30, 120)
    values = rng.lognormal(size=120) * (gradients if correlated else 1)
    graph = chain_of(errors.astype(float), gradients.astype(float))
    budget = math.floor(share * graph.backward(graph.by_name))
    table, best, path = np.zeros(budget + 1), 0.0, 0
    for error, gradient, value in zip(errors, gradients, values, strict=True):
        path += error
        if path + gradient <= budget:
            best = max(best, table[budget - path - gradient] + value)
        table[gradient:] = np.maximum(table[gradient:], table[: len(table) - gradient] + value)
    solution = solve(graph, importances(graph, values.tolist()), float(budget))
    assert solution.importance == pytest.approx(best, rel=1e-12)
    assert solution.proven


# ---- sums that do not fit a float


def test_a_budget_that_equals_a_rounded_sum_is_met() -> None:
    # 0.1 + 0.2 + 0.3 is a little above 0.6 as floats are, and rounds to 0.6
    graph = chain_of([0.0, 0.0, 0.0], [0.1, 0.2, 0.3])
    assert solve(graph, importances(graph, [1, 1, 1]), 0.6).names == ("t0", "t1", "t2")


def test_a_sum_that_rounds_to_more_than_the_budget_is_not_chosen() -> None:
    # 0.1 + 0.2 rounds to 0.30000000000000004
    graph = chain_of([0.0, 0.0, 0.0], [0.1, 0.2, 0.3])
    assert solve(graph, importances(graph, [2, 2, 3]), 0.3).names == ("t2",)


def test_what_is_lost_between_large_and_tiny_costs_does_not_break_the_budget() -> None:
    # beside 1e30, costs around 1 are below what integers of 64 bits resolve
    tensors = TensorCost("large", 1e30), TensorCost("small", 1.0), TensorCost("tiny", 0.5)
    graph = CostGraph("seconds", 0.0, (), tensors)
    values = {"large": 1.0, "small": 2.0, "tiny": 3.0}
    assert solve(graph, values, 0.75).names == ("tiny",)
    assert solve(graph, values, math.nextafter(1e30, 0)).names == ("small", "tiny")
    with pytest.raises(BudgetError, match=r"needs 0\.5 "):
        solve(graph, values, 0.0)


# ---- importance that is not a positive number


def test_what_must_be_trained_is_trained_whatever_it_costs() -> None:
    graph = chain_of([1, 1, 1], [1, 1, 1], forward=4.0)
    values = importances(graph, [5, 5, math.inf])
    assert solve(graph, values, 5.0).names == ("t0", "t2")
    with pytest.raises(BudgetError, match=r"what has to be trained \(t2\) needs 4 \(rho = 0.8\)") as error:
        solve(graph, values, 3.0)
    assert (error.value.smallest, error.value.rho) == (4.0, 0.8)


def test_required_tensors_share_what_they_pay_for() -> None:
    graph = chain_of([1, 10, 1], [1, 1, 1])
    solution = solve(graph, importances(graph, [1, 2, math.inf]), 14.0)
    assert solution.names == ("t1", "t2")
    assert (solution.importance, solution.cost) == (2.0, 14.0)


def test_without_importance_nothing_is_trained() -> None:
    graph = chain_of([1, 1], [1, 1])
    for value in (0.0, -1.0, -math.inf):
        solution = solve(graph, dict.fromkeys(graph.by_name, value), 4.0)
        assert (solution.names, solution.importance, solution.cost, solution.proven) == ((), 0.0, 0.0, True)


def test_without_candidates_nothing_is_trained() -> None:
    assert solve(CostGraph("flops", 1.0, (), ()), {}, 3.0).names == ()


def test_a_budget_for_nothing_names_the_smallest_one() -> None:
    graph = chain_of([0, 2, 1, 4, 0], [5, 1, 7, 3, 1], forward=12.0)
    values = importances(graph, [1, 3, 10, 5, 3])
    with pytest.raises(BudgetError, match=r"the cheapest tensor that is worth it \(t1\) needs 3 ") as error:
        solve(graph, values, graph.backward_budget(0.4))
    assert (error.value.smallest, error.value.rho) == (3.0, 15 / 36)
    assert solve(graph, values, error.value.smallest).names == ("t1",)
    with pytest.raises(BudgetError, match="no tensor at all needs 0"):
        solve(graph, dict.fromkeys(values, -1.0), graph.backward_budget(0.1))


@pytest.mark.parametrize(
    ("importance", "budget", "message"),
    [
        ({"t0": 1.0}, 1.0, "lacks t1"),
        ({"t0": 1.0, "t1": 1.0, "t2": 1.0}, 1.0, "the graph has not, t2"),
        ({"t0": 1.0, "t1": math.nan}, 1.0, "NaN for t1"),
        ({"t0": 1.0, "t1": 1.0}, math.nan, "budget must be a number"),
    ],
)
def test_wrong_arguments_are_refused(importance: dict[str, float], budget: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve(chain_of([1, 1], [1, 1]), importance, budget)


def test_an_importance_that_is_out_of_reach_does_not_drown_the_others() -> None:
    graph = chain_of([1, 1, 1, 1], [1, 1, 1, 100])
    assert solve(graph, importances(graph, [1e-9, 3e-9, 2e-9, 1e9]), 4.0).names == ("t0", "t1")


# ---- the limit of work


def test_a_search_that_is_cut_short_says_so(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(2)
    graph = chain_of(rng.random(300), rng.random(300))
    values = importances(graph, rng.lognormal(size=300).tolist())
    budget = 0.4 * graph.backward(graph.by_name)
    whole = solve(graph, values, budget)
    monkeypatch.setattr(solver, "_MOST_WORK", 0)
    with caplog.at_level(logging.INFO, "peftkern"):
        cut = solve(graph, values, budget)
    assert not cut.proven
    assert cut.cost <= budget
    assert cut.importance <= whole.importance <= cut.bound
    assert "no selection exceeds" in caplog.text


def test_too_many_states_are_cut_and_the_bound_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    costs = 1 + rng.random(60)
    graph = CostGraph("seconds", 0.0, (), tuple(TensorCost(f"t{i}", float(c)) for i, c in enumerate(costs)))
    values = importances(graph, (costs * (1 + 1e-3 * rng.random(60))).tolist())
    whole = solve(graph, values, 40.0)
    monkeypatch.setattr(solver, "_MOST_STATES", 2)
    cut = solve(graph, values, 40.0)
    assert cut.importance <= whole.importance <= cut.bound
    assert not cut.proven


def test_the_same_problem_has_the_same_solution() -> None:
    # equal importances and costs: ties are broken the same way every time
    graph = chain_of([1.0] * 30, [1.0] * 30)
    values = dict.fromkeys(graph.by_name, 1.0)
    assert solve(graph, values, 20.0) == solve(graph, dict(reversed(values.items())), 20.0)
