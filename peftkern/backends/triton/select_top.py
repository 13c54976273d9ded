"""Counting and collecting scores on a GPU; keys, digits and what is taken are in :mod:`peftkern.ops.select_top`.

A histogram is counted by integer atomics, whose order changes nothing. Scores crowd in a few buckets: each program
counts into buckets of its own, so that a bucket is not fought for, and those are summed afterwards. What is excluded
is counted out again by a launch over the excluded indices alone.

Collecting takes two launches: one counts what each tile has, and once it is known how many come before a tile, the
other writes the indices to their places. Excluded indices are looked for, by halves, where a score would be taken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch, unremarkable
from peftkern.ops.select_top import BUCKETS, SCORES, Scored

_BLOCK = 2048
_NUM_WARPS = 4
_PROGRAMS = 1024
"""That count at most: eight for each multiprocessor of a large GPU; their buckets take 8 MiB and stay in its cache."""

MAGNITUDE, VALUE, DIFFERENCE, PRODUCT, OUTER = (tl.constexpr(number) for number in range(len(SCORES)))
_NUMBERS = {name: number for number, name in enumerate(SCORES)}
"""Values of the kernels' ``SCORE``, in the order of the operation's table."""


# ---- keys


@triton.jit
def load_keys(a, other, elements, present, columns, SCORE: tl.constexpr):
    """uint32 keys of the scores that are present; they order as the scores do, and NaN is above all."""
    if SCORE == OUTER:
        first = tl.load(a + elements // columns, mask=present, other=0.0).to(tl.float32)
        score = first * tl.load(other + elements % columns, mask=present, other=0.0).to(tl.float32)
    else:
        score = tl.load(a + elements, mask=present, other=0.0).to(tl.float32)
        if SCORE == DIFFERENCE:
            score = score - tl.load(other + elements, mask=present, other=0.0).to(tl.float32)
        elif SCORE == PRODUCT:
            score = score * tl.load(other + elements, mask=present, other=0.0).to(tl.float32)
        if SCORE != VALUE:
            score = tl.abs(score)
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)  # -0 counts as 0
    keys = tl.where(bits >> 31 == 0, bits | 0x80000000, ~bits)
    return tl.where(score == score, keys, 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def is_listed(listed, count, steps, elements, asked):
    """Whether elements are in an ascending list; only where it is asked. ``steps``: bits of ``count``."""
    low = tl.zeros(elements.shape, tl.int64)
    high = low + count
    for _ in range(steps):
        looking = asked & (low < high)
        middle = (low + high) // 2
        below = tl.load(listed + middle, mask=looking, other=0) < elements
        low = tl.where(looking & below, middle + 1, low)
        high = tl.where(looking & ~below, middle, high)
    return asked & (low < count) & (tl.load(listed + low, mask=asked & (low < count), other=0) == elements)


# ---- kernels


@triton.jit
def score_histogram_kernel(
    a,
    other,
    listed,
    counts,
    element_count,
    columns,
    prefix,
    SCORE: tl.constexpr,
    LISTED: tl.constexpr,
    SHIFT: tl.constexpr,
    BITS: tl.constexpr,
    BUCKETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts each element, or, with LISTED, takes away each that is listed; ``element_count`` is their number."""
    program = tl.program_id(0).to(tl.int64)
    own = counts + program * BUCKETS
    wanted = (prefix >> 2).to(tl.uint32)
    for first in range(program * BLOCK, element_count, tl.num_programs(0).to(tl.int64) * BLOCK):
        elements = first + tl.arange(0, BLOCK)
        counted = elements < element_count
        if LISTED:
            elements = tl.load(listed + elements, mask=counted, other=0)
        keys = load_keys(a, other, elements, counted, columns, SCORE)
        if SHIFT + BITS < 32:
            counted = counted & (keys >> (SHIFT + BITS) == wanted)
        digits = ((keys >> SHIFT) & ((1 << BITS) - 1)).to(tl.int32)
        tl.atomic_add(own + digits, tl.full((BLOCK,), -1 if LISTED else 1, tl.int32), mask=counted, sem="relaxed")


@triton.jit
def load_candidates(
    a,
    other,
    exclude,
    element_count,
    columns,
    key,
    exclude_count,
    steps,
    SCORE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The elements of this program, and whether their keys are above ``key`` or equal it, excluded ones not."""
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    present = elements < element_count
    keys = load_keys(a, other, elements, present, columns, SCORE)
    bound = (key >> 2).to(tl.uint32)
    candidates = present & (keys >= bound)
    if HAS_EXCLUDE:
        candidates = candidates & ~is_listed(exclude, exclude_count, steps, elements, candidates)
    return elements, candidates & (keys > bound), candidates & (keys == bound)


@triton.jit
def score_count_kernel(
    a,
    other,
    exclude,
    counts,
    element_count,
    columns,
    key,
    exclude_count,
    steps,
    SCORE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``counts``: [2, programs], how many keys of each program's are above ``key``, and how many equal it."""
    found = load_candidates(
        a, other, exclude, element_count, columns, key, exclude_count, steps, SCORE, HAS_EXCLUDE, BLOCK
    )
    own = counts + tl.program_id(0)
    tl.store(own, tl.sum(found[1].to(tl.int32)))
    tl.store(own + tl.num_programs(0), tl.sum(found[2].to(tl.int32)))


@triton.jit
def score_collect_kernel(
    a,
    other,
    exclude,
    before,
    indices,
    element_count,
    columns,
    key,
    ties,
    exclude_count,
    steps,
    SCORE: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``before``: [2, programs], the sums of ``counts`` over earlier programs."""
    elements, above, equal = load_candidates(
        a, other, exclude, element_count, columns, key, exclude_count, steps, SCORE, HAS_EXCLUDE, BLOCK
    )
    most = (ties >> 2) & ((1 << 60) - 1)
    above_before = tl.load(before + tl.program_id(0))
    equal_before = tl.load(before + tl.num_programs(0) + tl.program_id(0))
    taken = above | (equal & (equal_before + tl.cumsum(equal.to(tl.int32)) <= most))
    first_place = above_before + tl.minimum(equal_before, most)
    places = first_place + tl.cumsum(taken.to(tl.int32)) - 1
    tl.store(indices + places, elements, mask=taken)


# ---- launches


def score_histogram(entry: Scored, shift: int, bits: int, prefix: int) -> Tensor:
    """See :func:`peftkern.ops.select_top.score_histogram_reference`."""
    excluded = 0 if entry.exclude is None else entry.exclude.numel()
    programs = max(1, min(cdiv(entry.elements, _BLOCK), _PROGRAMS))
    counts = torch.zeros(programs, BUCKETS, dtype=torch.int32, device=entry.a.device)
    _count(entry, entry.elements, None, counts, shift, bits, prefix)
    _count(entry, excluded, entry.exclude, counts, shift, bits, prefix)
    total = counts.sum(dim=0)
    if excluded > 0 and prefix == 0:
        total[0] += excluded  # their key is 0
    return total


def _count(
    entry: Scored, count: int, listed: Tensor | None, counts: Tensor, shift: int, bits: int, prefix: int
) -> None:
    if count == 0:
        return
    launch(
        score_histogram_kernel,
        (min(cdiv(count, _BLOCK), counts.shape[0]),),
        *_operands(entry),
        entry.a if listed is None else listed,
        counts,
        count,
        _columns(entry),
        unremarkable(prefix),
        traffic=lambda: Traffic((entry.a, entry.other) if listed is None else (listed,), (counts,)),
        num_warps=_NUM_WARPS,
        num_stages=1,
        SCORE=_NUMBERS[entry.score],
        LISTED=listed is not None,
        SHIFT=shift,
        BITS=bits,
        BUCKETS=BUCKETS,
        BLOCK=_BLOCK,
    )


def score_collect(entry: Scored, key: int, ties: int, count: int) -> Tensor:
    """See :func:`peftkern.ops.select_top.score_collect_reference`."""
    device = entry.a.device
    indices = torch.empty(count, dtype=torch.int64, device=device)
    tiles = cdiv(entry.elements, _BLOCK)
    if tiles == 0:
        return indices
    excluded = 0 if entry.exclude is None else entry.exclude.numel()
    exclude = entry.a if excluded == 0 else entry.exclude
    sizes = (entry.elements, _columns(entry), unremarkable(key))
    looked_for = (excluded, excluded.bit_length())
    constants = {"SCORE": _NUMBERS[entry.score], "HAS_EXCLUDE": excluded > 0, "BLOCK": _BLOCK}
    counts = torch.empty(2, tiles, dtype=torch.int32, device=device)
    reads = (entry.a, entry.other, entry.exclude)
    launch(
        score_count_kernel,
        (tiles,),
        *_operands(entry),
        exclude,
        counts,
        *sizes,
        *looked_for,
        traffic=lambda: Traffic(reads, (counts,)),
        num_warps=_NUM_WARPS,
        num_stages=1,
        **constants,
    )
    before = counts.cumsum(dim=1, dtype=torch.int64) - counts
    launch(
        score_collect_kernel,
        (tiles,),
        *_operands(entry),
        exclude,
        before,
        indices,
        *sizes,
        unremarkable(ties),
        *looked_for,
        traffic=lambda: Traffic((*reads, before), (indices,)),
        num_warps=_NUM_WARPS,
        num_stages=1,
        **constants,
    )
    return indices


def _operands(entry: Scored) -> tuple[Tensor, Tensor]:
    return entry.a, entry.a if entry.other is None else entry.other


def _columns(entry: Scored) -> int:
    """Of the matrix of an outer product; 0 for other scores."""
    return entry.other.numel() if entry.score == "outer" and entry.other is not None else 0
