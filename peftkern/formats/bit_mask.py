"""Which entries of a dense matrix count: one bit for each, eight columns to a byte.

Bit ``j % 8`` (the lowest first) of byte ``[i, j // 8]`` is 1 where entry (i, j) is kept. Every row begins with a byte
of its own; the bits behind its last column are 0. A mask of a [4096, 4096] matrix takes 2 MiB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

Pattern = tuple[int, int]
"""(n, m): at most n of every m consecutive columns are kept."""


@dataclass(frozen=True)
class BitMask:
    """A mask of a matrix [out, in]. Make one with :meth:`from_mask`, or with one of the functions of this file.

    Attributes:
        bits: [out, ⌈in / 8⌉] uint8.
        shape: [out, in].
        pattern: what is known of the places of the kept entries; ``None``: nothing.
    """

    bits: Tensor
    shape: torch.Size
    pattern: Pattern | None = None

    @classmethod
    def from_mask(cls, mask: Tensor, pattern: Pattern | None = None) -> BitMask:
        """The mask that keeps the entries where ``mask``, [out, in] bool, is true.

        Raises:
            ValueError: ``mask`` is no bool matrix, or does not follow ``pattern``.
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise ValueError(f"from_mask: mask must be [out, in] bool, got {list(mask.shape)} {mask.dtype}")
        if pattern is not None:
            _check_follows(mask, pattern)
        out_features, in_features = mask.shape
        bits = torch.zeros(out_features, -(-in_features // 8), dtype=torch.uint8, device=mask.device)
        for place in range(8):
            columns = mask[:, place::8].to(torch.uint8)
            bits[:, : columns.shape[1]] |= columns << place
        return cls(bits, mask.shape, pattern)

    def mask(self) -> Tensor:
        """[out, in] bool, true where an entry is kept."""
        places = torch.arange(8, dtype=torch.uint8, device=self.device)
        unpacked = (self.bits.unsqueeze(-1) >> places) & 1
        return unpacked.flatten(1)[:, : self.shape[1]].bool()

    def kept(self) -> int:
        """How many entries are kept."""
        return int(self.mask().sum())

    @property
    def density(self) -> float:
        """The share of the matrix's entries that are kept."""
        return self.kept() / max(self.shape.numel(), 1)

    @property
    def device(self) -> torch.device:
        """Where the bits are."""
        return self.bits.device

    def to(self, device: torch.device | str) -> BitMask:
        """The same mask on another device."""
        return BitMask(self.bits.to(device), self.shape, self.pattern)

    def validate(self) -> None:
        """Raise `ValueError` where shape, dtype or pattern do not fit each other; reads no values."""
        if len(self.shape) != 2:
            raise ValueError(f"BitMask: shape must be [out, in], got {list(self.shape)}")
        out_features, in_features = self.shape
        expected = (out_features, -(-in_features // 8))
        if tuple(self.bits.shape) != expected or self.bits.dtype != torch.uint8:
            raise ValueError(
                f"BitMask: bits must be {list(expected)} uint8 for a [{out_features}, {in_features}] matrix, "
                f"got {list(self.bits.shape)} {self.bits.dtype}"
            )
        if self.pattern is not None:
            check_pattern(self.pattern, in_features)


def check_pattern(pattern: Pattern, in_features: int) -> None:
    """Raise `ValueError` unless ``pattern`` is (n, m), n at most m, and rows of ``in_features`` are whole groups."""
    n, m = pattern
    if not 0 < n <= m:
        raise ValueError(f"BitMask: pattern must be (n, m) with 1 <= n <= m, got {pattern}")
    if in_features % m != 0:
        raise ValueError(f"BitMask: pattern {n}:{m} needs in to be a multiple of {m}, got {in_features}")


def _check_follows(mask: Tensor, pattern: Pattern) -> None:
    check_pattern(pattern, mask.shape[1])
    n, m = pattern
    most = int(mask.view(-1, m).sum(1).max()) if mask.numel() else 0
    if most > n:
        raise ValueError(f"from_mask: mask keeps {most} of {m} consecutive columns, more than pattern {n}:{m} allows")


# ---- which entries are kept


def kept_count(elements: int, density: float) -> int:
    """⌊density · elements⌋, with the density taken as the decimal that it is written as: 0.29 of 100 are 29.

    Raises:
        ValueError: ``density`` is not within 0 and 1.
    """
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"density must be between 0 and 1, got {density}")
    return math.floor(Fraction(repr(float(density))) * elements)


def complement(share: float) -> float:
    """1 - ``share`` in decimals, as both are written: 0.9 leaves 0.1, where floating point leaves a little less.

    Raises:
        ValueError: ``share`` is not within 0 and 1.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share must be between 0 and 1, got {share}")
    return float(1 - Fraction(repr(float(share))))


def largest_mask(scores: Tensor, count: int) -> BitMask:
    """Keeps exactly the ``count`` entries of the largest score; of equal ones the first in row-major order.

    Args:
        scores: [out, in], any dtype that can be ordered.
        count: from 0 to out * in.

    Raises:
        ValueError: ``scores`` is no matrix or holds NaN, or ``count`` is out of range.
    """
    _check_scores(scores)
    if not 0 <= count <= scores.numel():
        raise ValueError(f"largest_mask: count must be between 0 and {scores.numel()}, got {count}")
    mask = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    if count > 0:
        flat = scores.reshape(-1)
        bound = flat.kthvalue(flat.numel() - count + 1).values
        torch.gt(flat, bound, out=mask)
        equal = (flat == bound).nonzero().reshape(-1)
        mask[equal[: count - int(mask.sum())]] = True
    return BitMask.from_mask(mask.view(scores.shape))


def group_mask(scores: Tensor, pattern: Pattern) -> BitMask:
    """Keeps the n entries of the largest score among every m consecutive columns; of equal ones the first.

    Args:
        scores: [out, in], any dtype that can be ordered; in is a multiple of m.
        pattern: (n, m).

    Raises:
        ValueError: ``scores`` is no matrix or holds NaN, or ``pattern`` does not fit it.
    """
    _check_scores(scores)
    check_pattern(pattern, scores.shape[1])
    n, m = pattern
    groups = scores.reshape(-1, m)
    order = groups.argsort(dim=1, descending=True, stable=True)
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=scores.device).scatter_(1, order[:, :n], True)
    return BitMask.from_mask(mask.view(scores.shape), pattern)


def random_mask(shape: tuple[int, int] | torch.Size, density: float, seed: int) -> BitMask:
    """Keeps exactly ⌊density · out · in⌋ entries, every set of that size equally likely.

    The seed decides, on every machine alike: the mask is drawn on the CPU.

    Raises:
        ValueError: ``density`` is not within 0 and 1.
    """
    return largest_mask(_random_scores(shape, seed), kept_count(shape[0] * shape[1], density))


def random_group_mask(shape: tuple[int, int] | torch.Size, pattern: Pattern, seed: int) -> BitMask:
    """Keeps n random entries of every m consecutive columns. The seed decides, on every machine alike.

    Raises:
        ValueError: ``pattern`` does not fit the shape.
    """
    return group_mask(_random_scores(shape, seed), pattern)


def _random_scores(shape: tuple[int, int] | torch.Size, seed: int) -> Tensor:
    # 31 random bits: of two entries with equal scores the first wins, which is rare enough not to matter
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randint(2**31 - 1, tuple(shape), dtype=torch.int32, device="cpu", generator=generator)


def _check_scores(scores: Tensor) -> None:
    if scores.dim() != 2:
        raise ValueError(f"scores must be [out, in], got {list(scores.shape)}")
    if scores.is_floating_point() and bool(scores.isnan().any()):
        raise ValueError("scores hold NaN, which has no place in an order")
