"""Whole numbers of tiles. Triton's own functions of these names cost the host several times as much."""

from __future__ import annotations


def cdiv(value: int, divisor: int) -> int:
    """``value / divisor``, rounded up."""
    return -(-value // divisor)


def next_power_of_two(number: int) -> int:
    """The least power of two that is no less than ``number``; 1 for 0."""
    return 1 << max(number - 1, 0).bit_length()
