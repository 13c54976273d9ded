"""Sums of partial results, always in the same order: results are equal from run to run, without atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import owner, select

_BLOCK = 1024


@triton.jit
def sum_parts_kernel(parts, totals, sizes, part_counts, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    entry, tile = owner(tl.program_id(0), sizes, COUNT, BLOCK)
    size = select(sizes, entry, COUNT)
    part = select(parts, entry, COUNT)
    elements = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < size
    result = tl.zeros((BLOCK,), tl.float32)
    for number in range(select(part_counts, entry, COUNT)):
        result += tl.load(part + tl.cast(number, tl.int64) * size + elements, mask=mask, other=0.0)
    # one by one, not selected: totals may differ in dtype
    for candidate in tl.static_range(COUNT):
        if entry == candidate:
            total = totals[candidate]
            tl.store(total + elements, result.to(total.dtype.element_ty), mask=mask)


def sum_parts(parts: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    """``totals[i] = parts[i].sum(0)``, all in one launch.

    Args:
        parts: [count, *shape] float32, contiguous; counts may differ.
        totals: contiguous, [*shape]; dtypes may differ.
    """
    sizes = tuple(total.numel() for total in totals)
    launch(
        sum_parts_kernel,
        (sum(cdiv(size, _BLOCK) for size in sizes),),
        tuple(parts),
        tuple(totals),
        sizes,
        tuple(part.shape[0] for part in parts),
        traffic=lambda: Traffic(parts, totals, flops=sum(part.numel() for part in parts)),
        num_warps=4,
        num_stages=1,
        COUNT=len(sizes),
        BLOCK=_BLOCK,
    )


def parts_of(result: Tensor, parts: int) -> Tensor:
    """Where ``result`` is written: itself, or uninitialised float32 [parts, *shape] that is summed afterwards."""
    if parts == 1:
        return result
    return torch.empty((parts, *result.shape), dtype=torch.float32, device=result.device)
