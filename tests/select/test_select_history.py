"""Selections in a checkpoint."""

from __future__ import annotations

import io

import torch

from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.history import history_as_data, history_from_data
from peftkern.select.selection import Selection

SEGMENTS, TENSORS = (Segment(5.0, name="s"), Segment(1.0, (0,))), (TensorCost("a", 4.0), TensorCost("b", 6.0, (0, 1)))
FLOPS, SECONDS = (CostGraph(unit, 10.0, SEGMENTS, TENSORS) for unit in ("flops", "seconds"))
HISTORY = [
    Selection("Mine", ("b",), ("a", "b"), 0, {"a": 1.0 / 3, "b": float("inf")}, {"flops": FLOPS}),
    Selection("Mine", ("a", "b"), ("a", "b"), 7, {"b": -2.0}, {"flops": FLOPS, "seconds": SECONDS}),
    Selection("Mine", ("a",), ("a", "b"), 9),
]


def test_it_comes_back_from_a_checkpoint_as_it_was() -> None:
    file = io.BytesIO()
    torch.save(history_as_data(HISTORY), file)
    file.seek(0)
    assert history_from_data(torch.load(file, weights_only=True)) == HISTORY


def test_a_cost_graph_that_selections_share_is_saved_once_and_shared_again() -> None:
    data = history_as_data(HISTORY)
    assert len(data["graphs"]) == 2
    first, second, _ = history_from_data(data)
    assert first.costs["flops"] is second.costs["flops"]


def test_an_empty_history() -> None:
    assert history_from_data(history_as_data([])) == []
