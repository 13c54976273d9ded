"""What a backward pass costs, as far as it depends on which tensors are trained.

    backward(S) = Σ over t in S of t.cost  +  Σ over segments that a tensor of S needs, directly or not, of segment.cost
    step(S)     = forward + backward(S)

A *segment* is a group of operators that hand the error on and run for the same tensors: all of them or none. It needs
the segments nearer to the loss that its error comes from. Projections of queries, keys and values are three segments
side by side; residual connections, tied embeddings (a tensor with two segments), an encoder beside a decoder, and what
gradient checkpointing computes again (a segment that everything in its region needs) are all of this form.

Source: GreenTrainer, Huang et al. 2024 (arXiv:2309.13192), section 3: there the segments form one chain.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

UNITS = ("flops", "seconds")


@dataclass(frozen=True)
class Segment:
    """Operators that hand the error on, for the same tensors.

    Attributes:
        cost: of computing the error through them.
        needs: indices of the segments that their error comes from, each smaller than the segment's own.
        name: for people, as ``model.layers.3.mlp.down_proj``.
    """

    cost: float
    needs: tuple[int, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class TensorCost:
    """A tensor that can be trained.

    Attributes:
        name: of the parameter in the model.
        cost: of its gradient once the error is there, and in seconds of its update as well.
        segments: indices of the segments that the error comes from; empty where it is there in any case.
    """

    name: str
    cost: float
    segments: tuple[int, ...] = ()


@dataclass(frozen=True)
class CostGraph:
    """Costs of one training step.

    Attributes:
        unit: ``"flops"``, where a multiply-add counts 2, or ``"seconds"``.
        forward: cost of the forward pass, and of what every backward pass has to do whatever is trained.
        segments: nearest to the loss first.
        tensors: in the order in which their gradients are computed.

    Raises:
        ValueError: the unit is unknown, a cost is negative or not finite, an index is out of order, or two tensors have
            one name.
    """

    unit: str
    forward: float
    segments: tuple[Segment, ...]
    tensors: tuple[TensorCost, ...]

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"CostGraph: unit must be one of {list(UNITS)}, got {self.unit!r}")
        costs = [self.forward, *(s.cost for s in self.segments), *(t.cost for t in self.tensors)]
        wrong = [cost for cost in costs if not 0 <= cost < float("inf")]
        if wrong:
            raise ValueError(f"CostGraph: costs must be finite and at least 0, got {wrong[0]}")
        for index, segment in enumerate(self.segments):
            _check_indices(f"segment {index}", segment.needs, index)
        for tensor in self.tensors:
            _check_indices(tensor.name, tensor.segments, len(self.segments))
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ValueError("CostGraph: two tensors have one name")

    @cached_property
    def by_name(self) -> dict[str, TensorCost]:
        """Tensors by their name."""
        return {tensor.name: tensor for tensor in self.tensors}

    def needed(self, names: Iterable[str]) -> set[int]:
        """Indices of the segments that training the tensors of these names needs.

        Raises:
            KeyError: there is no tensor of a name.
        """
        found: set[int] = set()
        waiting = [index for name in names for index in self.by_name[name].segments]
        while waiting:
            index = waiting.pop()
            if index not in found:
                found.add(index)
                waiting += self.segments[index].needs
        return found

    def backward(self, names: Iterable[str]) -> float:
        """Cost of the backward pass that trains the tensors of these names: the exact sum, rounded once."""
        chosen = list(dict.fromkeys(names))
        segments = (self.segments[index].cost for index in self.needed(chosen))
        return math.fsum([*(self.by_name[name].cost for name in chosen), *segments])

    def step(self, names: Iterable[str]) -> float:
        """Cost of the step that trains the tensors of these names."""
        return self.forward + self.backward(names)

    @cached_property
    def full(self) -> float:
        """Cost of the step that trains all tensors."""
        return self.step(self.by_name)

    def backward_budget(self, rho: float) -> float:
        """What is left for the backward pass where a step may cost ``rho`` of the full one; negative where nothing is.

        Source: GreenTrainer, section 3.3: its budget includes the forward pass as well.
        """
        # not rho * full - forward, which rounding can make too small for everything where rho is 1
        return self.backward(self.by_name) - (1 - rho) * self.full

    def smallest(self) -> tuple[str, float]:
        """The tensor that is trained at the lowest cost, and what the step then costs as a share of the full one.

        Raises:
            ValueError: there are no tensors.
        """
        if not self.tensors:
            raise ValueError("CostGraph: there are no tensors to choose from")
        cheapest = min(self.by_name, key=lambda name: self.step([name]))
        return cheapest, self.step([cheapest]) / self.full if self.full else 1.0


def _check_indices(what: str, indices: tuple[int, ...], bound: int) -> None:
    for index in indices:
        if not 0 <= index < bound:
            raise ValueError(f"CostGraph: {what} must name segments from 0 to below {bound}, got {index}")
