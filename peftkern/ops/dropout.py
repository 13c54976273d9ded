"""Dropout with a counter-based generator: the mask is a function of (seed, adapter, row, column).

Nothing is stored for the backward pass, which asks the same function again. One adapter of one call has one
independent mask, as `nn.Dropout` in front of each PEFT adapter has.

    key(row)          = mix(row ^ seed_low) + mix(seed_high + adapter * GOLDEN)
    keep(row, column) = mix(key(row) + column * GOLDEN) >= round(p * 2^32)

All arithmetic is on unsigned 32-bit numbers that wrap. `mix` is a bijective 32-bit finaliser of two multiplications
and three xor-shifts (constants from C. Wellons' search for low-bias hashes, "lowbias32").
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK_32 = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def draw_seed() -> Tensor:
    """A fresh seed: int64 scalar on the CPU, from PyTorch's default generator.

    Taking it from the default generator makes runs follow `torch.manual_seed`, and makes gradient checkpointing, which
    restores that generator before it recomputes, see the same mask again.
    """
    return torch.randint(torch.iinfo(torch.int64).max, (), dtype=torch.int64, device="cpu")


def _mix(value: Tensor) -> Tensor:
    value = value ^ (value >> 16)
    value = (value * 0x7FEB352D) & _MASK_32
    value = value ^ (value >> 15)
    value = (value * 0x846CA68B) & _MASK_32
    return value ^ (value >> 16)


def threshold(p: float) -> int:
    """Elements whose 32-bit hash is below this number are dropped."""
    return round(p * 2**32)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by: 1 / (1 - p), and 0 when everything is dropped."""
    return 0.0 if p >= 1.0 else 1.0 / (1.0 - p)


def keep_mask(seed: Tensor, adapter: int, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """Boolean [rows, columns], true where the element is kept.

    Args:
        seed: int64 scalar.
        adapter: position of the adapter among those of the call.
        rows: number of tokens.
        columns: number of input features.
        p: probability to drop an element, 0 <= p <= 1.
        device: where the mask is made.
    """
    seed_ = seed.to(device)
    low, high = seed_ & _MASK_32, (seed_ >> 32) & _MASK_32
    row = torch.arange(rows, device=device, dtype=torch.int64)
    column = torch.arange(columns, device=device, dtype=torch.int64)
    stream = _mix((high + adapter * _GOLDEN) & _MASK_32)
    key = (_mix(row ^ low) + stream) & _MASK_32
    value = _mix((key[:, None] + column[None, :] * _GOLDEN) & _MASK_32)
    return value >= threshold(p)
