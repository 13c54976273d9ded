"""How many entries every layer gets of a number that a user names."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def total_entries(caller: str, entries: int, density: float, count: int | None) -> int:
    """How many of ``entries`` are trained: ``count``, or where that is ``None`` a share of ``density``, at least one.

    Raises:
        ValueError: ``density`` is not above 0 and up to 1, or ``count`` is not from 1 to ``entries``.
    """
    if count is None:
        check_density(caller, density)
        return max(1, round(density * entries))
    if not 1 <= count <= entries:
        raise ValueError(f"{caller}: count must be from 1 to {entries}, the entries of all its layers; got {count}")
    return count


def check_density(caller: str, density: float) -> None:
    """Raise `ValueError` where ``density`` is not above 0 and up to 1."""
    if not 0 < density <= 1:
        raise ValueError(f"{caller}: density must be above 0 and up to 1, got {density}")


def entries_per_layer(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` entries over layers in proportion to their sizes, exactly ``total`` of them.

    Every layer gets its share rounded down; what is left goes one by one to the largest remainders, earlier layers
    first where they are equal.

    Args:
        sizes: number of entries of each weight.
        total: from 0 to the sum of ``sizes``.
    """
    all_ = max(sum(sizes.values()), 1)
    shares = {name: total * size // all_ for name, size in sizes.items()}
    remainders = {name: total * size % all_ for name, size in sizes.items()}
    left = total - sum(shares.values())
    for name in sorted(sizes, key=lambda name: -remainders[name])[:left]:
        shares[name] += 1
    return shares


def random_entries(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, ascending int64; every set of them is as likely as any other."""
    if 2 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    drawn = torch.empty(0, dtype=torch.int64)
    while len(drawn) < count:
        more = torch.randint(size, (count - len(drawn),), generator=generator)
        drawn = torch.unique(torch.cat([drawn, more]))
    return drawn
