"""The values that codes stand for: the one place where they are written down.

Every value is a float32; the decimal digits below round to exactly the float32 that is meant.
"""

from __future__ import annotations

import struct
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

NF4: tuple[float, ...] = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
"""NormalFloat4, quantiles of a normal distribution. Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), app. E."""

# Code 8 is +0, not -0: so say the CUDA kernels of bitsandbytes and the table that it writes into checkpoints.
FP4: tuple[float, ...] = (
    0.0,
    0.0052083334885537624,
    0.6666666865348816,
    1.0,
    0.3333333432674408,
    0.5,
    0.1666666716337204,
    0.25,
    0.0,
    -0.0052083334885537624,
    -0.6666666865348816,
    -1.0,
    -0.3333333432674408,
    -0.5,
    -0.1666666716337204,
    -0.25,
)
"""bitsandbytes' 4-bit float: sign, 2 bits of exponent, 1 bit of mantissa, divided by its greatest value, 12."""

_DYNAMIC_DECADES = 7


def _float32(value: float) -> float:
    """Rounded to the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _dynamic_edge(index: int, parts: int) -> float:
    """Where part ``index`` of ``parts`` equal ones of (0.1, 1) begins; counted from the nearer end, rounded once."""
    start = _float32(0.1)
    step = _float32(_float32(1.0 - start) / parts)
    return _float32(start + index * step if 2 * index < parts else 1.0 - (parts - index) * step)


def _dynamic_magnitudes(signed: bool) -> list[float]:
    """The 127 (without a sign: 254) values between 0 and 1.

    Decade d holds the middles of 2**d (without a sign: twice as many) equal parts of (0.1, 1) * 10**(d - 6).

    Spelled out, because the last bits of ``torch.linspace`` depend on the processor. These are the bits that it has,
    and bitsandbytes with it, where there are fused multiply-adds.
    """
    magnitudes: list[float] = []
    for decade in range(_DYNAMIC_DECADES):
        scale = _float32(10.0 ** (decade - _DYNAMIC_DECADES + 1))
        parts = 2 ** (decade if signed else decade + 1)
        edges = [_dynamic_edge(index, parts) for index in range(parts + 1)]
        middles = [_float32(low + high) / 2 for low, high in pairwise(edges)]
        magnitudes += [_float32(scale * middle) for middle in middles]
    return magnitudes


def _dynamic_8bit() -> tuple[float, ...]:
    magnitudes = _dynamic_magnitudes(signed=True)
    return tuple(sorted([-value for value in magnitudes] + [0.0] + magnitudes + [1.0]))


DYNAMIC_8BIT: tuple[float, ...] = _dynamic_8bit()
"""256 ascending values, denser near 0; -1 is not among them.

Source: 8-Bit Approximations for Parallelism in Deep Learning, Dettmers 2015 (arXiv:1511.04561).
"""

DYNAMIC_8BIT_UNSIGNED: tuple[float, ...] = (0.0, *_dynamic_magnitudes(signed=False), 1.0)
"""256 ascending values from 0 to 1, for what cannot be negative, such as a mean of squares. Same source."""

_CODEBOOKS = {
    "nf4": NF4,
    "fp4": FP4,
    "int8_blockwise": DYNAMIC_8BIT,
    "uint8_blockwise": DYNAMIC_8BIT_UNSIGNED,
}


@cache
def _codebook_on(format: str, device: torch.device) -> Tensor:
    return torch.tensor(_CODEBOOKS[format], dtype=torch.float32, device=device)


def codebook(format: str, device: torch.device | str = "cpu") -> Tensor:
    """The values of a format's codes, in the order of the codes.

    Args:
        format: ``"nf4"``, ``"fp4"``, ``"int8_blockwise"`` or ``"uint8_blockwise"``, its twin for values that are not
            negative. ``"int8"`` has none: its code is the value.
        device: where the table is wanted.

    Returns:
        [16] or [256] float32. One tensor per format and device is shared by all callers: do not write to it.

    Raises:
        ValueError: the format has no codebook.
    """
    if format not in _CODEBOOKS:
        raise ValueError(f"codebook: format must be one of {sorted(_CODEBOOKS)}, got {format!r}")
    return _codebook_on(format, torch.device(device))
