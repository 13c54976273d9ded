"""The selections of a run in a checkpoint: numbers, words and tensors, as ``torch.load(weights_only=True)`` takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.selection import Selection


def history_as_data(history: Sequence[Selection]) -> dict[str, Any]:
    """All of ``history``. Names and cost graphs, which selections share, are in it once."""
    names = list(dict.fromkeys(name for s in history for name in (*s.candidates, *s.importances)))
    index = {name: i for i, name in enumerate(names)}
    graphs = list({id(graph): graph for s in history for graph in s.costs.values()}.values())
    place = {id(graph): i for i, graph in enumerate(graphs)}

    def indices(some: Sequence[str]) -> Tensor:
        return torch.tensor([index[name] for name in some], dtype=torch.int64)

    selections = [
        {
            "policy": s.policy,
            "step": s.step,
            "names": indices(s.names),
            "candidates": indices(s.candidates),
            "important": indices(list(s.importances)),
            "importances": torch.tensor(list(s.importances.values()), dtype=torch.float64),
            "costs": {unit: place[id(graph)] for unit, graph in s.costs.items()},
        }
        for s in history
    ]
    return {"names": names, "graphs": [asdict(graph) for graph in graphs], "selections": selections}


def history_from_data(data: Mapping[str, Any]) -> list[Selection]:
    """What `history_as_data` was given."""
    graphs = [_graph(entry) for entry in data["graphs"]]

    def names(indices: Tensor) -> tuple[str, ...]:
        return tuple(data["names"][i] for i in indices.tolist())

    return [
        Selection(
            entry["policy"],
            names(entry["names"]),
            names(entry["candidates"]),
            entry["step"],
            dict(zip(names(entry["important"]), entry["importances"].tolist(), strict=True)),
            {unit: graphs[i] for unit, i in entry["costs"].items()},
        )
        for entry in data["selections"]
    ]


def _graph(data: Mapping[str, Any]) -> CostGraph:
    segments = tuple(Segment(**segment) for segment in data["segments"])
    tensors = tuple(TensorCost(**tensor) for tensor in data["tensors"])
    return CostGraph(data["unit"], data["forward"], segments, tensors)
