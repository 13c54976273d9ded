"""Device functions that pick one member of a group: pointers and sizes come in tuples, its number from the program."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select(entries, index, COUNT: tl.constexpr, STEP: tl.constexpr = 1, FIRST: tl.constexpr = 0):
    """``entries[FIRST + STEP * index]`` of a tuple of pointers or numbers; ``index`` < COUNT comes at run time."""
    chosen = entries[FIRST]
    for candidate in tl.static_range(1, COUNT):
        if index >= candidate:
            chosen = entries[FIRST + STEP * candidate]
    return chosen


@triton.jit
def owner(tile, sizes, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The entry of ``sizes`` that tile number ``tile`` belongs to, and the tile's number there.

    Entry i fills ceil(sizes[i] / BLOCK) tiles, one entry after the other.
    """
    index = tile * 0
    begin = tile * 0
    end = tl.cdiv(sizes[0], BLOCK)
    for entry in tl.static_range(1, COUNT):
        beyond = tile >= end
        index = tl.where(beyond, entry, index)
        begin = tl.where(beyond, end, begin)
        end = end + tl.cdiv(sizes[entry], BLOCK)
    return index, tile - begin


@triton.jit
def select_weight(weight, index, COUNT: tl.constexpr):
    """The pointers of one member's weight: codes, scales, absmax, offset, codebook, codebook of the scales."""
    return (
        select(weight[0], index, COUNT),
        select(weight[1], index, COUNT),
        select(weight[2], index, COUNT),
        select(weight[3], index, COUNT),
        weight[4],
        weight[5],
    )
