"""How long the exact selector takes for 10,000 tensors, on one core, and how far the published one stays below it.

Costs are those of chains and of transformers, as counted (many are equal) and with noise of 2%, as measured seconds
have it. Importances are lognormal; correlated ones are multiplied by the cost. Every case solves 5 budgets.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from peftkern.bench.case import Measurement
from peftkern.bench.published_selector import published_select
from peftkern.bench.result import Quantity
from peftkern.select.cost_graph import CostGraph, Segment, TensorCost
from peftkern.select.solver import solve

GOAL = 0.5
"""Seconds."""
SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Budgets as shares of the full backward pass."""
INSTANCES = 40
"""Of 12 layers, that the published selector is compared in."""


class Builder:
    """Segments and tensors in the order of a backward pass.

    Args:
        noise: standard deviation of the logarithm of what every cost is multiplied by.
    """

    def __init__(self, noise: float, rng: np.random.Generator) -> None:
        self._noise, self._rng = noise, rng
        self.segments: list[Segment] = []
        self.tensors: list[TensorCost] = []

    def _cost(self, cost: float) -> float:
        return float(cost * self._rng.lognormal(0.0, self._noise))

    def error(self, cost: float, *needs: int) -> int:
        """The index of a new segment."""
        self.segments.append(Segment(self._cost(cost), needs))
        return len(self.segments) - 1

    def tensor(self, name: str, cost: float, *needs: int) -> None:
        self.tensors.append(TensorCost(name, self._cost(cost), needs))

    def graph(self) -> CostGraph:
        forward = sum(tensor.cost for tensor in self.tensors)
        return CostGraph("flops", forward, tuple(self.segments), tuple(self.tensors))


def chain(tensors: int, rng: np.random.Generator) -> CostGraph:
    """A chain of lognormal costs."""
    made = Builder(1.0, rng)
    for index in range(tensors):
        need = made.error(1.0, *([index - 1] if index else []))
        made.tensor(f"t{index}", 1.0, need)
    return made.graph()


def transformer(layers: int, noise: float, rng: np.random.Generator, hidden: int = 576, inner: int = 1536) -> CostGraph:
    """9 tensors for each layer; queries, keys and values side by side, gate and up as well."""
    made, shared = Builder(noise, rng), hidden // 3
    above = made.error(float(hidden * 49152))
    for layer in range(layers - 1, -1, -1):
        made.tensor(f"{layer}.down", hidden * inner, above)
        product = made.error(hidden * inner, above)
        gate = made.error(inner, product)
        made.tensor(f"{layer}.up", hidden * inner, product)
        made.tensor(f"{layer}.gate", hidden * inner, gate)
        both = made.error(hidden * inner, product), made.error(hidden * inner, gate)
        made.tensor(f"{layer}.norm2", hidden, *both)
        above = made.error(hidden, *both)
        made.tensor(f"{layer}.o", hidden * hidden, above)
        attention = made.error(4096.0 * hidden, made.error(hidden * hidden, above))
        widths = {"q": hidden, "k": shared, "v": shared}
        for name, width in widths.items():
            made.tensor(f"{layer}.{name}", hidden * width, attention)
        inputs = [made.error(hidden * width, attention) for width in widths.values()]
        made.tensor(f"{layer}.norm1", hidden, *inputs)
        above = made.error(hidden, *inputs)
    return made.graph()


def _importance(graph: CostGraph, correlated: bool, rng: np.random.Generator) -> dict[str, float]:
    values = rng.lognormal(size=len(graph.tensors))
    return {t.name: float(v * t.cost if correlated else v) for t, v in zip(graph.tensors, values, strict=True)}


def cases() -> Iterator[Measurement]:
    """Seconds, and how many of the solutions are proven; then importances of the published selector."""
    graphs: dict[str, Callable[[np.random.Generator], CostGraph]] = {
        "chain": lambda rng: chain(10_000, rng),
        "transformer, counted costs": lambda rng: transformer(1111, 0.0, rng),
        "transformer, noise of 2%": lambda rng: transformer(1111, 0.02, rng),
    }
    for name, make in graphs.items():
        for correlated in (False, True):
            rng = np.random.default_rng(5)
            yield from _solved(make(rng), f"{name}, {'' if correlated else 'un'}correlated", correlated, rng)
    yield _published(np.random.default_rng(0))


def _solved(graph: CostGraph, name: str, correlated: bool, rng: np.random.Generator) -> Iterator[Measurement]:
    importance = _importance(graph, correlated, rng)
    whole = graph.backward(graph.by_name)
    seconds, proven = [], 0
    for share in SHARES:
        begin = time.process_time()
        solution = solve(graph, importance, share * whole)
        seconds.append(time.process_time() - begin)
        proven += solution.proven
    goal = [GOAL] * len(SHARES)
    yield Measurement(f"{len(graph.tensors)} tensors, {name} | {GOAL} s", "s", Quantity.COUNT, seconds, goal)
    yield Measurement(f"{name}: proven", "", Quantity.SHARE, [proven], [len(SHARES)])


def _published(rng: np.random.Generator) -> Measurement:
    """Of selections that stay within the budget by the published selector's own count, which rounds costs down."""
    graph = transformer(12, 0.0, rng, hidden=768, inner=3072)
    published, ours = [], []
    for _ in range(INSTANCES):
        importance = _importance(graph, True, rng)
        names = published_select(graph, importance, 0.2 * graph.backward(graph.by_name))
        # ours gets what the published selection really costs, which is more than it was to
        published.append(sum(importance[name] for name in names))
        ours.append(solve(graph, importance, graph.backward(names)).importance)
    case = f"published selector | exact at the same cost, 12 layers, {INSTANCES} instances"
    return Measurement(case, "importance", Quantity.SHARE, published, ours)
