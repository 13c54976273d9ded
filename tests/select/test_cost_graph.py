"""Costs of selections, against sums by hand."""

from __future__ import annotations

import math

import pytest

from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.selection import Selection

# The chain of the paper, index 0 nearest to the loss: a tensor needs the error through its own operator as well.
CHAIN = CostGraph(
    "flops",
    12.0,
    tuple(Segment(cost, (i - 1,) if i else ()) for i, cost in enumerate([0, 2, 1, 4, 0])),
    tuple(TensorCost(f"t{i}", cost, (i,)) for i, cost in enumerate([5, 1, 7, 3, 1])),
)


def test_a_chain_costs_what_the_paper_says() -> None:
    assert CHAIN.backward(["t1", "t2"]) == 1 + 7 + 0 + 2 + 1
    assert CHAIN.backward(["t4"]) == 1 + 7
    assert CHAIN.full == 12 + 17 + 7


def test_branches_are_paid_only_where_they_are_needed() -> None:
    # loss <- 0 <- {1 queries, 2 keys} <- 3, which needs both
    segments = (Segment(10), Segment(1, (0,)), Segment(2, (0,)), Segment(5, (1, 2)))
    graph = CostGraph("seconds", 0.0, segments, tuple(TensorCost(n, 1, (i,)) for i, n in enumerate("oqkx")))
    assert graph.backward("q") == 1 + 10 + 1
    assert graph.backward("qk") == 2 + 10 + 1 + 2
    assert graph.backward("x") == 1 + 10 + 1 + 2 + 5


def test_a_tensor_with_two_segments_needs_both() -> None:
    tied = CostGraph("flops", 0.0, (Segment(1), Segment(7, (0,))), (TensorCost("tied", 3, (0, 1)),))
    assert tied.backward(["tied"]) == 11


def test_a_name_twice_is_paid_once() -> None:
    assert CHAIN.backward(["t0", "t0"]) == 5


def test_the_budget_includes_the_forward_pass() -> None:
    assert CHAIN.backward_budget(1.0) == 24
    assert CHAIN.backward_budget(0.5) == 18 - 12
    assert CHAIN.backward_budget(0.1) < 0


def test_the_smallest_selection_is_named() -> None:
    name, share = CHAIN.smallest()
    assert (name, share) == ("t1", (12 + 1 + 2) / 36)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": "joules"}, "unit must be one of"),
        ({"forward": -1.0}, "at least 0, got -1"),
        ({"forward": math.nan}, "finite"),
        ({"segments": (Segment(1, (0,)),)}, "segment 0 must name segments from 0 to below 0, got 0"),
        ({"tensors": (TensorCost("a", 1, (9,)),)}, "a must name segments from 0 to below 5, got 9"),
        ({"tensors": (TensorCost("a", 1), TensorCost("a", 1))}, "one name"),
    ],
)
def test_a_wrong_graph_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"unit": "flops", "forward": 0.0, "segments": CHAIN.segments, "tensors": CHAIN.tensors}
    with pytest.raises(ValueError, match=message):
        CostGraph(**{**arguments, **change})  # type: ignore[arg-type]


def test_a_selection_says_what_it_costs_and_is_worth() -> None:
    importances = {"t0": 3.0, "t1": 1.0, "t2": -5.0}
    selection = Selection("Mine", ("t1",), tuple(CHAIN.by_name), 7, importances, {"flops": CHAIN})
    assert selection.share("flops") == 15 / 36
    assert selection.importance_share == 0.25
    text = "Mine, update 7: trains 1 of 5 tensors; 41.7% of the flops of a full step; 25.0% of the importance"
    assert str(selection) == text
    assert selection.table().splitlines()[-1].split() == ["t1", "1", "1"]


def test_a_selection_without_importance_says_nothing_of_it() -> None:
    selection = Selection("Mine", ("t1",), ("t1",))
    assert selection.importance_share is None
    assert str(selection) == "Mine, update 0: trains 1 of 1 tensors"
