"""A case (ours and the peer's, on the same data) and the interleaved timer that turns it into samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from peftkern.bench.result import Quantity

_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6}


@dataclass(frozen=True)
class Effort:
    """How many pairs of samples a case gets: until ``seconds`` have passed, within the two bounds on pairs."""

    minimum_pairs: int = 7
    maximum_pairs: int = 101
    seconds: float = 6.0

    def __post_init__(self) -> None:
        if not 1 <= self.minimum_pairs <= self.maximum_pairs:
            raise ValueError(
                f"Effort: need 1 <= minimum_pairs <= maximum_pairs, got {self.minimum_pairs} and {self.maximum_pairs}"
            )


@dataclass(frozen=True)
class Case:
    """One comparison by time. ``check`` raises :class:`DisagreementError` unless both sides compute the same thing."""

    case: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    check: Callable[[], None]
    unit: str = "ms"
    effort: Effort = Effort()


@dataclass(frozen=True)
class Measurement:
    """Samples in pairs. Benchmarks of something other than time build it themselves."""

    case: str
    unit: str
    quantity: Quantity
    ours: Sequence[float]
    peer: Sequence[float]


def seconds_of(function: Callable[[], object]) -> float:
    """Wall-clock seconds of one call. What the call returns is released outside of the timed span."""
    start = time.perf_counter()
    result = function()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def measure(case: Case) -> Measurement:
    """Check the case, warm both sides up, then time them in turn: peer, ours, peer, ours, ...

    A drift of the machine (a neighbour, the clock, a hot core) then meets both sides alike. The cyclic garbage
    collector is off meanwhile, so that neither side pays for the other's garbage.

    Raises:
        DisagreementError: the two sides do not compute the same thing.
        ValueError: the case's unit is not one of time.
    """
    if case.unit not in _PER_SECOND:
        raise ValueError(f"measure: unit must be one of {sorted(_PER_SECOND)}, got {case.unit!r}")
    case.check()
    case.peer()
    case.ours()
    ours, peer = _interleave(case.ours, case.peer, case.effort)
    scale = _PER_SECOND[case.unit]
    return Measurement(
        case.case, case.unit, Quantity.TIME, [scale * value for value in ours], [scale * value for value in peer]
    )


def _interleave(
    ours: Callable[[], object], peer: Callable[[], object], effort: Effort
) -> tuple[list[float], list[float]]:
    our_seconds: list[float] = []
    peer_seconds: list[float] = []
    collected_before = gc.isenabled()
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    try:
        while not _enough(len(our_seconds), time.perf_counter() - start, effort):
            peer_seconds.append(seconds_of(peer))
            our_seconds.append(seconds_of(ours))
    finally:
        if collected_before:
            gc.enable()
    return our_seconds, peer_seconds


def _enough(pairs: int, elapsed: float, effort: Effort) -> bool:
    if pairs >= effort.maximum_pairs:
        return True
    return pairs >= effort.minimum_pairs and elapsed >= effort.seconds
