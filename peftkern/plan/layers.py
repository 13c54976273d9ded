"""What the layers of a deep model take under a plan (:mod:`peftkern.patch.layer_plan`), and the plan for a budget.

One short model per word is followed, all of whose layers have it. Of its two layers at each end, and of one for all in
between, this gives: what the layer keeps, and how far its two passes rise above what is kept. A deep model of mixed
layers follows. With Sᵢ for all that is there and kept when layer i of L has run forward,

    forward pass of layer i     Sᵢ₋₁ + Fᵢ
    the loss, and what is around it   S_L + E
    backward pass of layer i    Sᵢ + Bᵢ + gradients of the L - 1 - i layers above it

so a word adds to S above its layer, and needs room Bᵢ in it. The plan of least extra time is found exactly: from the
lowest layer up, of all plans so far only those stay to which no other one is equal or better in both S and time.

Source: Checkmate, Jain et al. 2020 (arXiv:1910.02653), section 3, of which this is the case of a chain.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from peftkern.plan.memory import PARTS, Parts, Segment
from peftkern.plan.options import LAYER_WORDS
from peftkern.plan.work import Work

DEPTH = 5
"""Layers of the short models: two at each end, and one between."""


def plus(first: Parts, second: Parts, factor: float = 1.0) -> dict[str, float]:
    """``first + factor * second``, part by part."""
    return {part: first[part] + factor * second[part] for part in PARTS}


@dataclass(frozen=True)
class WordCosts:
    """Of a word, by the position of a layer in a model of `DEPTH`; each in bytes of each part.

    Attributes:
        begin: what is there when the lowest layer begins.
        keeps: what a layer keeps.
        forward: F of the formula.
        backward: B, with the gradients of the layers above.
        ends: E, by the names of these segments.
        work: of a step.
    """

    begin: Parts
    keeps: tuple[Parts, ...]
    forward: tuple[Parts, ...]
    backward: tuple[Parts, ...]
    ends: Mapping[str, Parts]
    work: Work


def word_costs(segments: Mapping[str, Segment], work: Work) -> WordCosts:
    """What is measured of a model of `DEPTH` layers that all have the same word."""
    names = ["layer 0", "layer 1", "layers between", "layer 1 from the top", "layer 0 from the top"]
    begin, *later = [segments[f"forward {name}"].start for name in names] + [segments["behind the layers"].start]
    # what the model itself holds until it returns (the lowest layer's input, which "layer" keeps) is not kept
    freed = plus(later[-1], segments["loss"].start, -1)
    starts = [begin, *(plus(start, freed, -1) for start in later)]
    keeps = tuple(plus(after, before, -1) for before, after in pairwise(starts))
    forward = _over([segments[f"forward {name}"] for name in names], starts[:-1])
    backward = _over([segments[f"backward {name}"] for name in names], starts[1:])
    of_layers = {f"{way} {name}" for name in names for way in ("forward", "backward")}
    others = [name for name in segments if name not in of_layers and name not in ("start", "forward", "after backward")]
    ends = _over([segments[name] for name in others], [starts[-1]] * len(others))
    return WordCosts(begin, keeps, forward, backward, dict(zip(others, ends, strict=True)), work)


def _over(segments: Sequence[Segment], there: Sequence[Parts]) -> tuple[Parts, ...]:
    return tuple(plus(segment.peak, before, -1) for segment, before in zip(segments, there, strict=True))


@dataclass(frozen=True)
class Layers:
    """The layers of a model under any plan.

    Attributes:
        count: how many layers.
        costs: of each word that the layers can have, by the word; "store" is one of them.
        layer: bytes of what is there of a layer at any time.
        gradients: bytes of the gradients of a layer.
        shallow: work of a step of a model with one layer less than `DEPTH`, all of them "store".
    """

    count: int
    costs: Mapping[str, WordCosts]
    layer: Parts
    gradients: Parts
    shallow: Work

    def segments(self, plan: Sequence[str]) -> dict[str, Parts]:
        """The peaks of all stretches of a step that can be the highest."""
        there = self._begin(plan[0])
        found: dict[str, Parts] = {}
        for index, word in enumerate(plan):
            costs, position = self.costs[word], self._position(index)
            found[f"forward layer {index}"] = plus(there, costs.forward[position])
            there = plus(there, costs.keeps[position])
            above = plus(costs.backward[position], self.gradients, self._more_above(index))
            found[f"backward layer {index}"] = plus(there, above)
        return found | {name: plus(there, end) for name, end in self.costs["store"].ends.items()}

    def work(self, plan: Sequence[str]) -> Work:
        """Of a step."""
        store = self.costs["store"].work
        total = store.extrapolated(self.shallow, self.count - DEPTH)
        for word, group in groupby(sorted(plan)):
            total = total.plus(self.costs[word].work, store, len(list(group)) / DEPTH)
        return total

    def seconds(self, word: str) -> float:
        """What a layer of this word takes longer than one that stores."""
        return (self.costs[word].work.seconds - self.costs["store"].work.seconds) / DEPTH

    def cheapest(self, room: float) -> tuple[str, ...] | None:
        """The plan of least time whose peak is at most ``room`` bytes; ``None``: there is none."""
        seconds = {word: self.seconds(word) for word in self.costs}
        numbers = {word: _Numbers.of(costs) for word, costs in self.costs.items()}
        gradients = sum(self.gradients.values())
        states = [_State(sum(self._begin("store").values()), 0.0, ())]
        for index in range(self.count):
            position, above = self._position(index), gradients * self._more_above(index)
            grown = []
            for state in states:
                for word, of_word in numbers.items():
                    there = state.there + of_word.keeps[position]
                    highest = max(state.there + of_word.forward[position], there + of_word.backward[position] + above)
                    if highest <= room:
                        grown.append(_State(there, state.seconds + seconds[word], (*state.words, word)))
            states = _best(grown)
        end = max(sum(parts.values()) for parts in self.costs["store"].ends.values())
        fitting = [state for state in states if state.there + end <= room]
        if not fitting:
            return None
        words = min(fitting, key=lambda state: state.seconds).words
        by_word = LAYER_WORDS.index
        tidy = (tuple(sorted(words, key=by_word)), (words[0], *sorted(words[1:], key=by_word)))
        return next((plan for plan in tidy if self.peak(plan) <= room), words)

    def smallest(self) -> tuple[str, ...]:
        """The plan of least time within the smallest room, to a thousandth, that any plan fits into."""
        found = min(((word,) * self.count for word in self.costs), key=self.peak)
        low, high = 0.0, self.peak(found)
        while high - low > 1e-3 * high:
            middle = (low + high) / 2
            plan = self.cheapest(middle)
            if plan is None:
                low = middle
            else:
                found, high = plan, self.peak(plan)
        return found

    def peak(self, plan: Sequence[str]) -> float:
        """Bytes."""
        return max(sum(parts.values()) for parts in self.segments(plan).values())

    def _begin(self, lowest: str) -> Parts:
        """The word of the lowest layer decides only as what its input counts."""
        return plus(self.costs[lowest].begin, self.layer, self.count - DEPTH)

    def _position(self, index: int) -> int:
        from_top = self.count - 1 - index
        return index if index < 2 else DEPTH - 1 - from_top if from_top < 2 else 2

    def _more_above(self, index: int) -> int:
        """How many layers more are above this one than above that in its position in a short model."""
        return self.count - index - (DEPTH - self._position(index))


@dataclass(frozen=True)
class _Numbers:
    """The sums of parts that a search compares."""

    keeps: Sequence[float]
    forward: Sequence[float]
    backward: Sequence[float]

    @staticmethod
    def of(costs: WordCosts) -> _Numbers:
        return _Numbers(*([sum(p.values()) for p in of] for of in (costs.keeps, costs.forward, costs.backward)))


@dataclass(frozen=True)
class _State:
    """A plan for the lowest layers: what is there when they have run, and the time that they take more."""

    there: float
    seconds: float
    words: tuple[str, ...]


def _best(states: Iterable[_State]) -> list[_State]:
    """Those to which no other is equal or better in both respects."""
    kept: list[_State] = []
    for state in sorted(states, key=lambda state: (state.there, state.seconds)):
        if not kept or state.seconds < kept[-1].seconds:
            kept.append(state)
    return kept
