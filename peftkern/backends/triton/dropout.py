"""The dropout mask inside kernels: the bits of :mod:`peftkern.ops.dropout`, which documents the generator."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.launch import unremarkable
from peftkern.ops.dropout import keep_scale, threshold

_GOLDEN_NUMBER = 0x9E3779B9
_GOLDEN: tl.constexpr = tl.constexpr(_GOLDEN_NUMBER)


class Mask(NamedTuple):
    """One adapter's mask as kernel arguments; 32-bit patterns as `unremarkable` numbers."""

    seed_low: int
    stream: int
    threshold: int
    keep_scale: float


_NOTHING = unremarkable(0)
NO_MASK = Mask(_NOTHING, _NOTHING, _NOTHING, 1.0)


def mask_arguments(seed: Tensor | None, adapter: int, p: float) -> Mask:
    """The mask of adapter ``adapter`` of a call. ``seed`` lives on the CPU: reading it waits for nothing."""
    if p == 0.0 or seed is None:
        return NO_MASK
    number = 0 if seed.is_meta else int(seed)
    stream = _mix_number(((number >> 32) + adapter * _GOLDEN_NUMBER) & 0xFFFFFFFF)
    # p = 1 has threshold 2^32, which is no 32-bit number; its scale of 0 drops what the greatest one lets through.
    bound = min(threshold(p), 0xFFFFFFFF)
    return Mask(unremarkable(number & 0xFFFFFFFF), unremarkable(stream), unremarkable(bound), keep_scale(p))


def _mix_number(value: int) -> int:
    value ^= value >> 16
    value = (value * 0x7FEB352D) & 0xFFFFFFFF
    value ^= value >> 15
    value = (value * 0x846CA68B) & 0xFFFFFFFF
    return value ^ (value >> 16)


@triton.jit
def _mix(value):
    value = value ^ (value >> 16)
    value = value * 0x7FEB352D
    value = value ^ (value >> 15)
    value = value * 0x846CA68B
    return value ^ (value >> 16)


@triton.jit
def keep_factor(mask, rows, columns):
    """[rows, columns] float32: ``keep_scale`` where the element is kept, 0 where it is dropped."""
    seed_low = (mask[0] >> 2).to(tl.uint32)
    stream = (mask[1] >> 2).to(tl.uint32)
    threshold = (mask[2] >> 2).to(tl.uint32)
    key = _mix(rows.to(tl.uint32) ^ seed_low) + stream
    value = _mix(key[:, None] + columns.to(tl.uint32)[None, :] * _GOLDEN)
    return tl.where(value >= threshold, mask[3], 0.0)
