"""What a check would do, said without a GPU: every stage, and every launch of everything that is timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from peftkern.backends.triton.devices import H100, rates_of
from peftkern.gpu_check import build, numerics, peers, plan
from peftkern.gpu_check.items import Item
from peftkern.gpu_check.run import SECONDS


def lines(items: Sequence[Item], names: Sequence[str]) -> Iterator[str]:
    """One line per stage and item; times are estimates for an H100."""
    yield f"stage 1: build for the GPU at hand: {' '.join(build.command(build.FOLDER))}"
    yield f"stage 2: every test of {numerics.TESTS}, against float64"
    yield "stage 3: compile what is timed, several processes side by side"
    yield f"stage 4: time, beside {', '.join(names)}, what fits into {SECONDS} s, in this order:"
    rates = rates_of(H100)
    total = 0.0
    for item in items:
        launches = item.launches()
        seconds = plan.expected_seconds(item, launches, rates, names)
        total += seconds
        yield f"  {seconds:4.1f} s  {item.title}: {', '.join(one.kernel for one in launches) or 'native'}"
    yield f"{len(items)} items, about {total:.0f} s of timing on an H100"
    yield from (f"not compared with {name}: {why}" for name, why in peers.missing().items())
