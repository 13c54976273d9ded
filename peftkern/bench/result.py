"""What a benchmark reports: the quantity that was measured, and the row that goes into the tables and files."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum


class Quantity(StrEnum):
    """What a benchmark measures. It decides how a row is summarised and which way its ratio goes."""

    TIME = "time"  # ratio = peer / ours: more is better
    RATE = "rate"  # ratio = ours / peer: more is better
    MEMORY = "memory"  # ratio = ours / peer: less is better
    LOSS = "loss"  # ratio = ours / peer: 1 is right
    DIFFERENCE = "difference"  # ratio = ours, the difference itself: 0 is right
    COUNT = "count"  # ratio = ours / peer, or / what was to be reached: less is better
    SHARE = "share"  # ratio = ours / peer, or / what was to be reached: 1 is right


def _peer_over_ours(ours: float, peer: float) -> float:
    return peer / ours


def _ours_over_peer(ours: float, peer: float) -> float:
    return ours / peer


def _ours_alone(ours: float, _peer: float) -> float:
    return ours


def _last(values: Sequence[float]) -> float:
    return values[-1]


@dataclass(frozen=True)
class _Rule:
    ratio: Callable[[float, float], float]
    summary: Callable[[Sequence[float]], float]


_RULES = {
    Quantity.TIME: _Rule(_peer_over_ours, statistics.median),
    Quantity.RATE: _Rule(_ours_over_peer, statistics.median),
    Quantity.MEMORY: _Rule(_ours_over_peer, statistics.median),
    Quantity.LOSS: _Rule(_ours_over_peer, _last),
    Quantity.DIFFERENCE: _Rule(_ours_alone, max),
    Quantity.COUNT: _Rule(_ours_over_peer, statistics.median),
    Quantity.SHARE: _Rule(_ours_over_peer, statistics.mean),
}


@dataclass(frozen=True)
class Result:
    """One row of a benchmark.

    ``ours`` and ``peer`` are medians over the interleaved pairs (the last value for a loss, the largest for a
    difference, the mean for a share) in ``unit``. ``ratio`` is taken between these two; ``min`` and ``max`` are the
    smallest and largest ratio of a single pair, that is of a peer's sample and the sample of ours that was taken right
    beside it. The ratio always lies between them.
    """

    name: str
    case: str
    ours: float
    peer: float
    unit: str
    ratio: float
    min: float
    max: float
    quantity: Quantity


def summarise(
    name: str, case: str, unit: str, quantity: Quantity, ours: Sequence[float], peer: Sequence[float]
) -> Result:
    """The row for samples that were taken in pairs.

    Args:
        ours, peer: equally long; ``ours[i]`` was taken beside ``peer[i]``. Unit: ``unit``.

    Raises:
        ValueError: the two lengths differ, or there are no samples.
    """
    if not ours or len(ours) != len(peer):
        raise ValueError(
            f"summarise: ours and peer must be equally long and not empty, got {len(ours)} and {len(peer)}"
        )
    rule = _RULES[quantity]
    ratios = [rule.ratio(one, other) for one, other in zip(ours, peer, strict=True)]
    middle_ours, middle_peer = rule.summary(ours), rule.summary(peer)
    ratio = rule.ratio(middle_ours, middle_peer)
    return Result(name, case, middle_ours, middle_peer, unit, ratio, min(ratios), max(ratios), quantity)
