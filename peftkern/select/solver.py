"""Which tensors to train: the most importance whose backward pass stays within a budget.

    maximise   Σ importance of t          over sets S of tensors
    subject to graph.backward(S) <= budget

A set of tensors pays for the segments that it needs, each once: a knapsack under precedence. Where the segments form a
chain, as in the paper, fixing the deepest one that is paid leaves a plain knapsack. In general the search decides
segments one by one, paid or not, until a plain knapsack is left.

1. A price λ for each unit of cost bounds the problem from above: what is worth more than its price is taken, and a
   tensor hands what it has left over to the segments that it needs (the dual of a maximum flow; exact on trees).
2. Segments whose decision the bound proves are decided without a search (`_Priced.losses`), the others by branching on
   the problem with the highest bound.
3. A plain knapsack is solved around its break item, with lists of states of which none is both cheaper and better than
   another (Nemhauser and Ullmann 1969; Pisinger 1997 for the core).

Costs are integers in all of this: multiples of a power of two that is small enough for every sum to be exact.

Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3.3, whose dynamic programme is not exact.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import count

import numpy as np
from numpy.typing import NDArray

from peftkern.select.cost_graph import CostGraph
from peftkern.select.method import logger

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_COST_BITS = 61  # all costs together fit an int64, rounded up as well
_ROUNDING = 1e-12  # of the importance: sums that are closer than this count as equal
_MOST_STATES = 20_000  # of a knapsack at a time
_QUICK_STATES, _QUICK_CORE = 500, 50  # of a knapsack that is only to find a good selection
_MOST_WORK = 6_000_000  # states and segments looked at: about half a second
_MOST_PRICES = 30


class BudgetError(ValueError):
    """The budget is too small.

    Attributes:
        smallest: the smallest budget that is enough, for the backward pass, in the graph's unit.
        rho: the same as a share of the full step, forward pass included.
    """

    def __init__(self, message: str, smallest: float, rho: float) -> None:
        super().__init__(message)
        self.smallest = smallest
        self.rho = rho


@dataclass(frozen=True)
class Solution:
    """The tensors to train.

    Attributes:
        names: in the order of the graph.
        importance: their sum, without those that are infinite.
        cost: ``graph.backward(names)``, at most the budget.
        bound: what no selection exceeds; equal to ``importance`` where the search came to its end.
    """

    names: tuple[str, ...]
    importance: float
    cost: float
    bound: float

    @property
    def proven(self) -> bool:
        """Whether no selection within the budget is more important (but for rounding, 1e-12 of the importance)."""
        return self.bound <= self.importance


def solve(graph: CostGraph, importance: Mapping[str, float], budget: float) -> Solution:
    """The most important tensors whose backward pass costs at most ``budget``.

    Tensors with importance 0 or less are not trained; with ``inf``, they are trained whatever they cost.

    Args:
        importance: of every tensor of ``graph``.
        budget: of the backward pass, in the graph's unit; `CostGraph.backward_budget` makes it from the paper's rho.

    Raises:
        BudgetError: the budget is too small for the tensors with infinite importance, or for any tensor at all.
        ValueError: an importance is missing, is NaN, or is of a tensor that the graph does not have; or the budget is
            NaN.
    """
    _check(graph, importance, budget)
    required = [tensor.name for tensor in graph.tensors if importance[tensor.name] == math.inf]
    candidates = [t.name for t in graph.tensors if 0 < importance[t.name] < math.inf]
    if graph.backward(required) > budget:
        raise _too_small(graph, budget, required, candidates)
    scores = {name: float(importance[name]) for name in candidates}
    chosen, bound = _search(graph, required, scores, budget, up=False)
    if graph.backward([*required, *chosen]) > budget:
        # Costs were rounded down, by less than 1e-15 of their sum, and that made the difference. Rounded up they fit.
        chosen, _ = _search(graph, required, scores, budget, up=True)
    if candidates and not chosen and not required:
        chosen = [_cheapest(graph, candidates)]
        if graph.backward(chosen) > budget:
            raise _too_small(graph, budget, required, candidates)
    names = _in_order(graph, [*required, *chosen])
    total = math.fsum(scores[name] for name in chosen)
    solution = Solution(names, total, graph.backward(names), total if bound <= total * (1 + _ROUNDING) else bound)
    if not solution.proven:
        logger.info("solve: stopped at importance %g; no selection exceeds %g", solution.importance, solution.bound)
    return solution


# ---- arguments and errors


def _check(graph: CostGraph, importance: Mapping[str, float], budget: float) -> None:
    if math.isnan(budget):
        raise ValueError("solve: budget must be a number, got NaN")
    missing = [name for name in graph.by_name if name not in importance]
    unknown = [name for name in importance if name not in graph.by_name]
    if missing or unknown:
        what, names = ("lacks", missing) if missing else ("has, and the graph has not,", unknown)
        raise ValueError(f"solve: importance must name the tensors of the graph; it {what} {_some(names)}")
    undefined = [name for name, value in importance.items() if math.isnan(value)]
    if undefined:
        raise ValueError(f"solve: importance must be numbers, got NaN for {_some(undefined)}")


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _too_small(graph: CostGraph, budget: float, required: Sequence[str], candidates: Sequence[str]) -> BudgetError:
    if required:
        what, names = f"what has to be trained ({_some(required)})", list(required)
    elif candidates:
        names = [_cheapest(graph, candidates)]
        what = f"the cheapest tensor that is worth it ({names[0]})"
    else:
        what, names = "no tensor at all", []
    smallest = graph.backward(names)
    rho, given = ((graph.forward + cost) / graph.full if graph.full else 1.0 for cost in (smallest, budget))
    return BudgetError(
        f"solve: a budget of {budget:g} {graph.unit} for the backward pass (rho = {given:.4g}) is too small; "
        f"{what} needs {smallest:.17g} (rho = {rho:.4g})",
        smallest,
        rho,
    )


def _cheapest(graph: CostGraph, names: Iterable[str]) -> str:
    """The tensor that is trained at the lowest cost."""
    depths: list[float] = []
    for segment in graph.segments:
        depths.append(segment.cost + max((depths[need] for need in segment.needs), default=0.0))

    def at_least(name: str) -> float:
        tensor = graph.by_name[name]
        return tensor.cost + max((depths[index] for index in tensor.segments), default=0.0)

    best, cost = "", math.inf
    for name in sorted(names, key=at_least):
        if at_least(name) > cost:
            break
        if graph.backward([name]) < cost:
            best, cost = name, graph.backward([name])
    return best


def _in_order(graph: CostGraph, names: Iterable[str]) -> tuple[str, ...]:
    wanted = set(names)
    return tuple(name for name in graph.by_name if name in wanted)


# ---- the problem in integers


@dataclass(frozen=True)
class _Problem:
    """What is still open: tensors, and the segments that have not been decided.

    Attributes:
        capacity: cost that is left.
        ids: of the tensors, [tensors], by falling importance per cost.
        values: their importance, above 0.
        costs: of their gradients.
        places: the segment that each needs; -1 where all are paid.
        segment_costs: [segments].
        needs: of each segment, smaller than its own index.
        price: at which the search for the lowest bound begins.
    """

    capacity: int
    ids: Integers
    values: Floats
    costs: Integers
    places: Integers
    segment_costs: Integers
    needs: list[tuple[int, ...]]
    price: float = 0.0

    @cached_property
    def paid_items(self) -> tuple[Floats, Floats, Integers]:
        """Of tensors whose segments are paid: -importance per cost, and importance and cost of the first ones."""
        paid = self.places < 0
        values, costs = self.values[paid], self.costs[paid]
        sums = np.append(0.0, np.cumsum(values)), np.append(0, np.cumsum(costs))
        return -_densities(values, costs), *sums

    @cached_property
    def open_items(self) -> tuple[Integers, Floats, Integers]:
        """Place, importance and cost of the other tensors."""
        not_paid = self.places >= 0
        return self.places[not_paid], self.values[not_paid], self.costs[not_paid]

    @cached_property
    def priced(self) -> tuple[_Priced, _Priced | None, _Priced | None]:
        """At the price with the lowest bound that was found, and at the two prices around it; see `_best_price`."""
        return _best_price(self)

    def decide(self, paid: Flags, left_out: Flags, price: float = 0.0) -> _Problem:
        """The same with these segments paid, with those that they need, or left out, with those that need them."""
        pays, out = paid.tolist(), left_out.tolist()
        for index in range(len(pays) - 1, -1, -1):
            if pays[index]:
                for need in self.needs[index]:
                    pays[need] = True
        depths: list[int] = []
        for index, (needs, cost) in enumerate(zip(self.needs, self.segment_costs.tolist(), strict=True)):
            depth, free, blocked = 0, cost == 0, out[index]
            for need in needs:
                depth = max(depth, depths[need])
                free = free and pays[need]
                blocked = blocked or out[need]
            depths.append(depth + cost)
            pays[index] = pays[index] or free
            out[index] = not pays[index] and (blocked or depth + cost > self.capacity)
        affordable = np.array([*depths, 0], dtype=np.int64)[self.places] + self.costs <= self.capacity
        useful = np.zeros(len(pays) + 1, dtype=bool)
        useful[self.places[affordable]] = True
        uses = useful.tolist()
        for index in range(len(pays) - 1, -1, -1):
            if uses[index] and not out[index]:
                for need in self.needs[index]:
                    uses[need] = True
        unused = [o or not use for o, use in zip(out, uses[:-1], strict=True)]
        return self._without(pays, unused, affordable, price)._folded()

    def _without(self, paid: Sequence[bool], left_out: Sequence[bool], kept: Flags, price: float) -> _Problem:
        numbers = count()
        moved = [-1 if p else -2 if out else next(numbers) for p, out in zip(paid, left_out, strict=True)]
        stays = [index for index, number in enumerate(moved) if number >= 0]
        needs = [tuple(moved[need] for need in self.needs[index] if not paid[need]) for index in stays]
        capacity = self.capacity - int(self.segment_costs[np.array(paid, dtype=bool)].sum())
        places = np.array([*moved, -1], dtype=np.int64)[self.places]
        kept = kept & (places > -2) & (self.costs <= capacity)
        items = self.ids[kept], self.values[kept], self.costs[kept], places[kept]
        return _Problem(capacity, *items, self.segment_costs[stays], needs, price)

    def _folded(self) -> _Problem:
        """The same, where a segment that one tensor alone needs is part of the tensor's cost."""
        users = np.bincount(self.places[self.places >= 0], minlength=len(self.needs))
        ways = np.array([len(needs) for needs in self.needs], dtype=np.int64)
        users += np.bincount([need for needs in self.needs for need in needs], minlength=len(self.needs))
        folded = np.append((users == 1) & (ways <= 1) & (self.segment_costs > 0), False)
        moved = np.flatnonzero(folded[self.places])
        folded[:] = False
        folded[self.places[moved]] = True
        if not len(moved):
            return self
        costs, places = self.costs.copy(), self.places.copy()
        costs[moved] += self.segment_costs[places[moved]]
        above = np.array([needs[-1] if needs else -1 for needs in self.needs], dtype=np.int64)
        places[moved] = above[places[moved]]
        order = np.argsort(-_densities(self.values, costs), kind="stable")
        items = self.ids[order], self.values[order], costs[order], places[order]
        rest = _Problem(self.capacity, *items, self.segment_costs, self.needs)
        every = np.ones(len(order), dtype=bool)
        return rest._without([False] * len(self.needs), folded[:-1].tolist(), every, self.price)._folded()


def _search(
    graph: CostGraph, required: Sequence[str], scores: Mapping[str, float], budget: float, up: bool
) -> tuple[list[str], float]:
    """Names beside the required ones, and a bound of what their importance can be."""
    names = list(scores)
    too_much = 2 * budget or 1.0
    scale, capacity = _scale(graph, budget, too_much)
    rounded = np.ceil if up else np.floor

    def integers(costs: list[float]) -> Integers:
        return np.asarray(rounded(np.ldexp(np.minimum(costs, too_much), scale)), dtype=np.int64)

    tensors = [graph.by_name[name] for name in names]
    values = np.array([scores[name] for name in names], dtype=np.float64)
    costs = integers([tensor.cost for tensor in tensors])
    order = np.argsort(-_densities(values, costs), kind="stable")
    segment_costs, paid = integers([segment.cost for segment in graph.segments]), list(graph.needed(required))
    capacity -= int(integers([graph.by_name[name].cost for name in required]).sum()) + int(segment_costs[paid].sum())
    segment_costs[paid] = -1
    open_ = _Precedence.of([s.needs for s in graph.segments], segment_costs.tolist(), [t.segments for t in tensors])
    items = order, values[order], costs[order], np.array(open_.places, dtype=np.int64)[order]
    undecided = np.zeros(len(open_.needs), dtype=bool)
    problem = _Problem(capacity, *items, np.array(open_.costs, dtype=np.int64), open_.needs)
    search = _Search(problem.decide(undecided, undecided))
    search.run()
    return [names[index] for index in search.chosen], search.bound


def _densities(values: Floats, costs: Integers) -> Floats:
    with np.errstate(divide="ignore"):
        return np.divide(values, costs)


def _scale(graph: CostGraph, budget: float, too_much: float) -> tuple[int, int]:
    """The exponent that makes costs integers, and the largest integer that still counts as within the budget.

    Costs above ``too_much``, which is above the budget, count as that much.

    What is added up exactly and then rounded to a float, as `CostGraph.backward` does, is at most ``budget`` as long as
    it is below the middle between it and the next float, or there, where that rounds down.
    """
    costs = [*(segment.cost for segment in graph.segments), *(tensor.cost for tensor in graph.tensors)]
    total = math.fsum(min(cost, too_much) for cost in costs)
    scale = _COST_BITS - math.frexp(total)[1]
    if budget >= total:
        return scale, 2 << _COST_BITS
    half = (math.nextafter(budget, math.inf) - budget) / 2
    limit = (Fraction(budget) + Fraction(half)) * Fraction(2) ** scale
    ties_fit = math.fsum([budget, half]) <= budget
    return scale, math.floor(limit) if ties_fit else math.ceil(limit) - 1


@dataclass(frozen=True)
class _Precedence:
    """Segments, and which of them tensors need: at most one each, -1 for none.

    Beside the graph's there is one of cost 0 for every set of segments that is needed together.
    """

    costs: list[int]
    needs: list[tuple[int, ...]]
    places: list[int]

    @classmethod
    def of(
        cls, segments: Sequence[tuple[int, ...]], segment_costs: Sequence[int], tensors: Sequence[tuple[int, ...]]
    ) -> _Precedence:
        """From the needs of the segments and of the tensors; a segment of cost -1 is paid."""
        costs: list[int] = []
        needs: list[tuple[int, ...]] = []
        moved: list[int] = []
        numbers: dict[tuple[int, ...], int] = {}

        def joint(indices: tuple[int, ...]) -> int:
            own = tuple(sorted({moved[index] for index in indices} - {-1}))
            if len(own) < 2:
                return own[0] if own else -1
            if own not in numbers:
                numbers[own] = len(costs)
                costs.append(0)
                needs.append(own)
            return numbers[own]

        for indices, cost in zip(segments, segment_costs, strict=True):
            need = -1 if cost < 0 else joint(indices)
            moved.append(-1 if cost < 0 else len(costs))
            if cost >= 0:
                costs.append(cost)
                needs.append(() if need < 0 else (need,))
        places = [joint(indices) for indices in tensors]
        return cls(costs, needs, places)._merged()

    def _merged(self) -> _Precedence:
        """The same, where a segment that one other alone needs is part of that one."""
        count = len(self.costs)
        costs, needs = list(self.costs), [set[int]() for _ in range(count)]
        users = [set[int]() for _ in range(count)]
        used = set(self.places)
        stays = []
        for index in range(count - 1, -1, -1):
            if index in used or len(users[index]) > 1:
                stays.append(index)
                user = index
            elif users[index]:
                (user,) = users[index]
                costs[user] += self.costs[index]
                needs[user].discard(index)
            else:
                continue
            for need in self.needs[index]:
                users[need].add(user)
                needs[user].add(need)
        stays.reverse()
        moved = {index: number for number, index in enumerate(stays)} | {-1: -1}
        own = [tuple(sorted(moved[need] for need in needs[index])) for index in stays]
        places = [moved[place] for place in self.places]
        return _Precedence([costs[index] for index in stays], [_direct(n, own) for n in own], places)


def _direct(needs: tuple[int, ...], all_needs: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Without those that the last one needs anyway, as far as a chain from it shows."""
    if len(needs) < 2:
        return needs
    here, chain = needs[-1], set[int]()
    while here > needs[0] and len(all_needs[here]) == 1:
        (here,) = all_needs[here]
        chain.add(here)
    return tuple(need for need in needs if need not in chain)


# ---- bounds


class _Priced:
    """A problem in which each unit of cost has a price.

    Attributes:
        bound: what no selection exceeds: ``price * capacity`` and all that is worth more than its price.
        left: of each segment, what it and those that need it are worth beyond their price; below 0 where it is not
            worth it. Each hands what it has left over to those that it needs, and to the last of them what is then
            still left: the bound is the same whatever the split, and any split makes a valid one.
    """

    def __init__(self, problem: _Problem, price: float) -> None:
        self.problem, self.price = problem, price
        densities, values, costs = problem.paid_items
        taken = int(np.searchsorted(densities, -price))
        self._paid_cost = int(costs[taken])
        places, open_values, open_costs = problem.open_items
        gains = np.maximum(open_values - price * open_costs, 0.0)
        sums = np.bincount(places, gains, len(problem.needs))
        self.left: list[float] = (sums - price * problem.segment_costs).tolist()
        self.passed: dict[int, float] = {}
        paid = float(values[taken]) - price * self._paid_cost
        self.bound = price * problem.capacity + paid + self._hand_over()

    def _hand_over(self) -> float:
        left, all_needs, total = self.left, self.problem.needs, 0.0
        for index in range(len(left) - 1, -1, -1):
            rest = left[index]
            if rest <= 0:
                continue
            needs = all_needs[index]
            if not needs:
                total += rest
            elif len(needs) == 1:
                left[needs[0]] += rest
            else:
                self.passed[index] = self._split(needs, rest)
        return total

    def _split(self, needs: tuple[int, ...], rest: float) -> float:
        """Give every way from a need to where it meets the way from the last one what it lacks."""
        last = needs[-1]
        for need in needs[:-1]:
            here, there = need, last
            while here != there:
                if here < there:
                    there = self._last_need(there)
                    continue
                given = min(rest, max(0.0, -self.left[here]))
                self.left[here] += given
                rest -= given
                here = self._last_need(here)
        self.left[last] += rest
        return rest

    def _last_need(self, index: int) -> int:
        needs = self.problem.needs[index]
        return needs[-1] if needs else -1

    @cached_property
    def closure(self) -> Flags:
        """Segments that are paid at this price."""
        paid: list[bool] = []
        for left, needs in zip(self.left, self.problem.needs, strict=True):
            pays = left >= 0
            for need in needs:
                pays = pays and paid[need]
            paid.append(pays)
        return np.array(paid, dtype=bool)

    @cached_property
    def cost(self) -> int:
        """Of what is paid at this price."""
        paid = self.closure
        places, values, costs = self.problem.open_items
        taken = (values > self.price * costs) & paid[places]
        return self._paid_cost + int(costs[taken].sum()) + int(self.problem.segment_costs[paid].sum())

    def losses(self) -> tuple[Floats, Floats]:
        """By how much the bound falls, at least, where a segment has to be paid, and where it must not be."""
        paying: list[float] = []
        leaving: list[float] = []
        for index, (left, needs) in enumerate(zip(self.left, self.problem.needs, strict=True)):
            above, gain = 0.0, max(0.0, left)
            for need in needs:
                above = max(above, paying[need])
            if needs:
                gain = min(gain, leaving[needs[-1]], self.passed.get(index, math.inf))
            paying.append(above + max(0.0, -left))
            leaving.append(gain)
        return np.array(paying), np.array(leaving)


def _best_price(problem: _Problem) -> tuple[_Priced, _Priced | None, _Priced | None]:
    """The price with the lowest bound that was found; the highest tried at which too much is bought; and the lowest at
    which what is bought fits."""
    low = high = None
    priced = best = _Priced(problem, problem.price)
    for step in range(_MOST_PRICES):
        best = min(best, priced, key=lambda tried: tried.bound)
        if priced.cost > problem.capacity:
            low = priced
        else:
            high = priced
        if high is None:
            price = max(
                (1 + 0.02 * 4**step) * priced.price, 1e-3 * float(problem.values.sum()) / max(problem.capacity, 1)
            )
        elif low is None:
            price = priced.price / (1 + 0.02 * 4**step) if priced.price > 1e-9 * best.price else 0.0
            if priced.price == 0:
                break
        else:
            price = _crossing(low, high)
            height = high.bound - (high.price - price) * (problem.capacity - high.cost)
            if not low.price < price < high.price or height >= best.bound * (1 - 1e-9):
                break
            if step % 3 == 2:
                price = math.sqrt(max(low.price, high.price / 16) * high.price)
        priced = _Priced(problem, price)
    return best, low, high


def _crossing(low: _Priced, high: _Priced) -> float:
    """Where the two lines meet that touch the bound, as a function of the price, at these prices."""
    capacity = low.problem.capacity
    slopes = float(capacity - low.cost), float(capacity - high.cost)
    rise = high.bound - low.bound + slopes[0] * low.price - slopes[1] * high.price
    return rise / (slopes[0] - slopes[1])


# ---- search


class _Search:
    """Branch and bound over segments.

    Attributes:
        chosen: ids of the best selection so far.
        bound: what no selection exceeds.
    """

    def __init__(self, problem: _Problem) -> None:
        self.chosen: list[int] = []
        self.value = 0.0
        self.bound = 0.0
        self.work = 0
        self._root = problem
        self._tried: set[int] = set()
        self._numbers = count()
        self._open: list[tuple[float, int, _Problem]] = []

    def run(self) -> None:
        """Look until nothing that is left can be better, or for as long as is allowed."""
        self._push(self._all_or_less(self._root), math.inf)
        while self._open and self._beats(self._highest) and self.work < _MOST_WORK:
            bound, _, problem = heapq.heappop(self._open)
            (self._look_at if problem.needs else self._finish)(problem, -bound)
        self.bound = max(self.bound, self.value, self._highest if self._beats(self._highest) else 0.0)

    @property
    def _highest(self) -> float:
        """What nothing that is still to be looked at exceeds."""
        return -self._open[0][0] if self._open else 0.0

    def _all_or_less(self, problem: _Problem) -> _Problem:
        everything = float(problem.values.sum())
        if int(problem.costs.sum()) + int(problem.segment_costs.sum()) > problem.capacity:
            return problem
        self._offer(problem.ids, everything)
        return problem.decide(np.zeros(len(problem.needs), dtype=bool), np.ones(len(problem.needs), dtype=bool))

    def _offer(self, ids: Integers, value: float) -> None:
        if value > self.value:
            self.chosen, self.value = ids.tolist(), value

    def _push(self, problem: _Problem, bound: float) -> None:
        if problem.capacity >= 0 and len(problem.ids) and self._beats(bound):
            heapq.heappush(self._open, (-bound, next(self._numbers), problem))

    @property
    def _to_beat(self) -> float:
        return self.value * (1 + _ROUNDING)

    def _beats(self, bound: float) -> bool:
        return bound > self._to_beat

    def _look_at(self, problem: _Problem, known: float) -> None:
        best, low, high = problem.priced
        self.work += 10 * (len(problem.needs) + len(problem.ids))
        bound = min(best.bound, known)
        if bound < min(known, self._highest):  # others first
            self._push(problem, bound)
            return
        for priced in (high, low):
            if priced is not None:
                self._try(problem, priced.closure)
        paying, leaving = best.losses()
        paid = best.bound - leaving <= self._to_beat
        left_out = best.bound - paying <= self._to_beat
        if (paid & left_out).any():
            return
        if (paid | left_out).any():
            self._push(problem.decide(paid, left_out, best.price), bound)
            return
        between = np.zeros_like(paid) if low is None or high is None else low.closure & ~high.closure
        branch = self._branch(np.flatnonzero(between), np.minimum(paying, leaving))
        self._push(problem.decide(branch, paid, best.price), bound)
        self._push(problem.decide(paid, branch, best.price), bound)

    def _branch(self, between: Integers, losses: Floats) -> Flags:
        """The segment to decide: the middle one of those that are paid at one price and not at the other."""
        index = between[len(between) // 2] if len(between) else losses.argmax()
        flags = np.zeros(len(losses), dtype=bool)
        flags[index] = True
        return flags

    def _try(self, problem: _Problem, paid: Flags) -> None:
        """Look for a good selection with exactly these segments."""
        capacity = problem.capacity - int(problem.segment_costs[paid].sum())
        if capacity >= 0 and capacity not in self._tried:
            self._tried.add(capacity)
            self._run(_Knapsack(problem.decide(paid, ~paid), self.value), quick=True)

    def _finish(self, problem: _Problem, known: float) -> None:
        knapsack = _Knapsack(problem, self.value)
        if knapsack.bound < min(known, self._highest):  # others first
            self._push(problem, knapsack.bound)
            return
        self._run(knapsack, quick=False)
        if self._beats(knapsack.bound):
            self.bound = max(self.bound, knapsack.bound)

    def _run(self, knapsack: _Knapsack, quick: bool) -> None:
        knapsack.run(quick, _MOST_WORK - self.work)
        self.work += knapsack.work
        if knapsack.chosen is not None:
            self._offer(knapsack.chosen, knapsack.value)


# ---- the plain knapsack


class _Knapsack:
    """The tensors of a problem without open segments.

    It starts from the break solution, which takes tensors by importance per cost until one does not fit, and goes on
    from there in both directions: a further tensor is added or not, a taken one is removed or not. States may be over
    the capacity as long as removals can bring them back.

    Attributes:
        chosen: ids of the best selection, where one beats ``value`` as it was given; else ``None``.
        value: importance of it.
        bound: what no selection exceeds.
        work: states that were looked at.
    """

    def __init__(self, problem: _Problem, value: float) -> None:
        self.chosen: Integers | None = None
        self.value = value
        self.work = len(problem.ids)
        self._ids, self._values, self._costs = problem.ids, problem.values, problem.costs
        self._capacity = problem.capacity
        filled = np.cumsum(self._costs)
        self._break = int(np.searchsorted(filled, problem.capacity, side="right"))
        self._cost = int(filled[self._break - 1]) if self._break else 0
        self._start = float(self._values[: self._break].sum())
        self.bound = self._start + self._after_break()

    @property
    def _to_beat(self) -> float:
        return self.value * (1 + _ROUNDING)

    def _after_break(self) -> float:
        if self._break == len(self._ids):
            return 0.0
        return (self._capacity - self._cost) * self._density(self._break)

    def _density(self, index: int) -> float:
        return float(self._values[index]) / float(self._costs[index]) if self._costs[index] else math.inf

    def run(self, quick: bool, most_work: int) -> None:
        """Find the best selection, or quickly a good one. Where that is too much work, `bound` tells what is left."""
        if self.bound <= self._to_beat:
            return
        self._greedy()
        if self._break < len(self._ids) and self.bound > self._to_beat:
            self._search(quick, most_work)
        elif self._break == len(self._ids):
            self.bound = self.value

    def _greedy(self) -> None:
        taken = list(range(self._break))
        left, first = self._capacity - self._cost, self._break
        while True:
            fits = np.flatnonzero(self._costs[first:] <= left)
            if not len(fits):
                break
            first += int(fits[0])
            taken.append(first)
            left -= int(self._costs[first])
            first += 1
        self._offer(np.array(taken, dtype=np.int64))

    def _offer(self, taken: Integers) -> None:
        value = float(self._values[taken].sum())
        if value > self.value:
            self.chosen, self.value = self._ids[taken], value

    def _core(self) -> tuple[Floats, list[int], list[int]]:
        """By how much the bound falls where a tensor is added or removed; what may be added, and what removed."""
        price = self._density(self._break)
        loss = np.abs(self._values - price * self._costs)
        may = np.flatnonzero(self.bound - loss > self._to_beat)
        adds = may[may >= self._break]
        return loss, adds.tolist(), may[may < self._break][::-1].tolist()

    def _round_capacity(self, core: list[int]) -> bool:
        """Leave out what multiples of a common unit of all costs in the core cannot use; whether there was any."""
        left = self._capacity - self._cost
        unused = left % int(np.gcd.reduce(self._costs[core])) if core else 0
        self._capacity -= unused
        self.bound = self._start + self._after_break()
        return unused > 0

    def _search(self, quick: bool, most_work: int) -> None:
        loss, adds, removes = self._core()
        while self._round_capacity([*adds, *removes]):
            loss, adds, removes = self._core()
        most_states = _QUICK_STATES if quick else _MOST_STATES
        if quick:
            adds, removes = adds[:_QUICK_CORE], removes[:_QUICK_CORE]
        states = _States(self._cost, self._start)
        best, dropped = None, 0.0
        while (adds or removes) and len(states.costs):
            removing = bool(removes) and (not adds or loss[removes[0]] < loss[adds[0]])
            index = removes.pop(0) if removing else adds.pop(0)
            sign = -1 if removing else 1
            states.extend(index, sign * int(self._costs[index]), sign * float(self._values[index]))
            self.work += 600 + len(states.costs)
            fitting = int(np.searchsorted(states.costs, self._capacity, side="right")) - 1
            if fitting >= 0 and states.values[fitting] > self.value:
                self.value = float(states.values[fitting])
                best = states.flipped(fitting)
            up = self._density(adds[0]) if adds else 0.0
            down = self._density(removes[0]) if removes else math.inf
            most = most_states if self.work < most_work else 0
            dropped = max(dropped, states.prune(self._capacity, up, down, self._to_beat, most))
        if best is not None:
            taken = np.arange(len(self._ids)) < self._break
            taken[best] ^= True
            self.chosen = self._ids[taken]
        self.bound = max(self.value, dropped)


class _States:
    """Partial selections of a knapsack by rising cost, of which none is both cheaper and better than another."""

    def __init__(self, cost: int, value: float) -> None:
        self.costs = np.array([cost], dtype=np.int64)
        self.values = np.array([value], dtype=np.float64)
        self._history: list[tuple[int, int, Integers]] = []

    def extend(self, index: int, cost: int, value: float) -> None:
        """Take or remove the tensor ``index`` in each, or do not."""
        before = len(self.costs)
        costs = np.concatenate([self.costs, self.costs + cost])
        values = np.concatenate([self.values, self.values + value])
        order = np.argsort(costs, kind="stable")
        costs, values = costs[order], values[order]
        kept = np.append(True, values[1:] > np.maximum.accumulate(values)[:-1])
        order, self.costs, self.values = order[kept], costs[kept], values[kept]
        self._history.append((index, before, order))

    def prune(self, capacity: int, up: float, down: float, value: float, most: int) -> float:
        """Drop what cannot come to more than ``value``, and the worst of more than ``most``; returns their bound.

        Args:
            up: importance per cost of what can still be added.
            down: of what can still be removed.
        """
        left = capacity - self.costs
        with np.errstate(invalid="ignore"):
            bounds = self.values + left * np.where(left >= 0, up, down)
        kept = np.flatnonzero(bounds > value)
        dropped = 0.0
        if len(kept) > most:
            order = np.argsort(-bounds[kept], kind="stable")
            dropped = float(bounds[kept][order[most]])
            kept = np.sort(kept[order[:most]])
        self.costs, self.values = self.costs[kept], self.values[kept]
        index, before, order = self._history[-1]
        self._history[-1] = index, before, order[kept]
        return dropped

    def flipped(self, position: int) -> list[int]:
        """The tensors that were taken or removed in the state at ``position``."""
        found = []
        for index, before, order in reversed(self._history):
            position = int(order[position])
            if position >= before:
                found.append(index)
                position -= before
        return found
