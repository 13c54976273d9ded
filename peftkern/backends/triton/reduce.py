"""Sums of partial results, always in the same order: results are equal from run to run, without atomics."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import owner, select

_BLOCK = 1024


@triton.jit
def sum_parts_kernel(parts, totals, sizes, part_count, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    entry, tile = owner(tl.program_id(0), sizes, COUNT, BLOCK)
    size = select(sizes, entry, COUNT)
    sum_block(select(parts, entry, COUNT), select(totals, entry, COUNT), size, part_count, tile, BLOCK)


@triton.jit
def sum_block(part, total, size, part_count, tile, BLOCK: tl.constexpr):
    """``total[i] = Σ part[j * size + i]`` for the elements of one tile; sums in float32."""
    elements = tile.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < size
    result = tl.zeros((BLOCK,), tl.float32)
    for number in range(part_count):
        result += tl.load(part + number.to(tl.int64) * size + elements, mask=mask, other=0.0)
    tl.store(total + elements, result.to(total.dtype.element_ty), mask=mask)


def sum_parts(parts: Sequence[Tensor], totals: Sequence[Tensor]) -> None:
    """``totals[i] = parts[i].sum(0)``, all in one launch.

    Args:
        parts: [count, *shape] float32, contiguous, each with the same count.
        totals: contiguous, [*shape]; of one dtype.
    """
    sizes = tuple(total.numel() for total in totals)
    launch(
        sum_parts_kernel,
        (sum(triton.cdiv(size, _BLOCK) for size in sizes),),
        tuple(parts),
        tuple(totals),
        sizes,
        parts[0].shape[0],
        traffic=Traffic(parts, totals, flops=sum(part.numel() for part in parts)),
        num_warps=4,
        num_stages=1,
        COUNT=len(sizes),
        BLOCK=_BLOCK,
    )
