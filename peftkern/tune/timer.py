"""How long a call keeps the GPU busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

Call = Callable[[], object]


class Timer(Protocol):
    """Times calls that do the same on different memory."""

    def seconds(self, calls: Sequence[Call]) -> float:
        """The median time of one of ``calls``. They are called in turn."""
        ...

    def copies(self, bytes_touched: int) -> int:
        """How many sets of buffers of this size, used in turn, push each other out of the cache."""
        ...


class CudaTimer:
    """Times with events on the current stream, after a warm-up; the median of several rounds.

    Every round starts behind a wait that keeps the GPU busy until the host has queued all of the round, so that the
    host's speed does not show. Calls must not synchronise.
    """

    def __init__(self, rounds: int = 9, least_calls: int = 10) -> None:
        self._rounds = rounds
        self._least_calls = least_calls

    def seconds(self, calls: Sequence[Call]) -> float:
        """See :class:`Timer`. The first call of each compiles what it needs."""
        turns = -(-self._least_calls // len(calls))
        queueing = self._warm_up(calls)
        cycles = int(queueing * turns * _GREATEST_CLOCK)
        events = [self._round(calls, turns, cycles) for _ in range(self._rounds)]
        torch.cuda.synchronize()
        milliseconds: list[float] = [begin.elapsed_time(end) for begin, end in events]
        return statistics.median(milliseconds) / 1e3 / (turns * len(calls))

    def copies(self, bytes_touched: int) -> int:
        """See :class:`Timer`: at least two, and no more than 64."""
        cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(2, min(64, -(-3 * cache // bytes_touched)))

    def _warm_up(self, calls: Sequence[Call]) -> float:
        """Run every call twice; the seconds that the host takes to queue all of them once."""
        for call in calls:
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        elapsed = time.perf_counter() - start
        torch.cuda.synchronize()
        return elapsed

    def _round(self, calls: Sequence[Call], turns: int, cycles: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(cycles)  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(turns):
            for call in calls:
                call()
        end.record()
        return begin, end


_GREATEST_CLOCK = 3e9
"""Cycles per second that no GPU exceeds."""
