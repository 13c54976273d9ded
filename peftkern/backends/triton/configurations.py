"""Tile sizes, warps and stages of every kernel: one table, no autotuning, so that all of it compiles without a GPU.

A row is picked by kernel, by the family of the architecture (how much shared memory a program may take, which matrix
instructions there are) and by whether activations have 16 or 32 bits. ``peftkern bench aot-spills`` compiles every row
for every architecture.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from peftkern.backends.triton.integers import cdiv, next_power_of_two
from peftkern.backends.triton.paths import FEW_TOKENS

ARCHITECTURES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities that kernels are compiled for."""


@dataclass(frozen=True)
class Tile:
    """What one program computes.

    Attributes:
        tokens: rows of x or y.
        columns: of the result; unused (0) by kernels whose result is as wide as the rank.
        inner: extent of one step of the sum.
        num_warps: of a program.
        num_stages: steps whose loads are in flight.
    """

    tokens: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


FEWEST_TOKENS = 16
"""Tokens that fill the smallest tile of the tensor cores: up to here decoding alone takes time."""

# What decides the rows: sm_80, 90 and 100 give a program 163 KiB of shared memory or more, sm_86, 89 and 120 only 99.
_LARGE, _SMALL = "163 KiB and more", "99 KiB"
_FAMILY = {80: _LARGE, 86: _SMALL, 89: _SMALL, 90: _LARGE, 100: _LARGE, 120: _SMALL}

_TILES: dict[str, dict[tuple[str, int], Tile]] = {
    # W decoded in the product: 128 tokens share the decoding of a value
    "fused": {
        (_LARGE, 16): Tile(128, 64, 64, 4, 3),
        (_SMALL, 16): Tile(128, 128, 64, 8, 2),
        (_LARGE, 32): Tile(64, 64, 16, 8, 2),
        (_SMALL, 32): Tile(64, 64, 16, 8, 2),
    },
    # W dense: registers hold nothing but the result, so the tile can be larger
    "dense": {
        (_LARGE, 16): Tile(128, 256, 64, 8, 3),
        (_SMALL, 16): Tile(128, 128, 32, 8, 4),
        (_LARGE, 32): Tile(64, 64, 16, 8, 3),
        (_SMALL, 32): Tile(64, 64, 16, 8, 3),
    },
    # the adapter's part alone: bound by writing the result
    "low rank": {
        (_LARGE, 16): Tile(64, 128, 32, 8, 2),
        (_SMALL, 16): Tile(64, 128, 32, 8, 2),
        (_LARGE, 32): Tile(64, 64, 16, 8, 2),
        (_SMALL, 32): Tile(64, 64, 16, 8, 2),
    },
    # one tile of tokens; columns few, so that many programs share the reading of W
    "few": {
        (_LARGE, 16): Tile(FEW_TOKENS, 128, 64, 4, 4),
        (_SMALL, 16): Tile(FEW_TOKENS, 32, 128, 4, 2),
        (_LARGE, 32): Tile(FEW_TOKENS, 32, 32, 8, 2),
        (_SMALL, 32): Tile(FEW_TOKENS, 32, 32, 8, 2),
    },
    # the same for at most 16 tokens: small programs, of which many share a multiprocessor
    "fewest": {
        (_LARGE, 16): Tile(FEWEST_TOKENS, 32, 64, 2, 5),
        (_SMALL, 16): Tile(FEWEST_TOKENS, 32, 128, 4, 2),
        (_LARGE, 32): Tile(FEWEST_TOKENS, 32, 32, 8, 2),
        (_SMALL, 32): Tile(FEWEST_TOKENS, 32, 32, 8, 2),
    },
    # x Aᵀ: bound by reading x, so few tokens a program, many programs
    "project": {
        (_LARGE, 16): Tile(16, 0, 128, 4, 4),
        (_SMALL, 16): Tile(16, 0, 128, 4, 4),
        (_LARGE, 32): Tile(16, 0, 64, 4, 3),
        (_SMALL, 32): Tile(16, 0, 64, 4, 3),
    },
    # the same for three adapters, whose sums take three times the registers
    "project of three": {
        (_LARGE, 16): Tile(16, 0, 64, 4, 4),
        (_SMALL, 16): Tile(16, 0, 64, 4, 2),
        (_LARGE, 32): Tile(16, 0, 32, 4, 3),
        (_SMALL, 32): Tile(16, 0, 32, 4, 3),
    },
    # dY B and dYᵀ h: the more tokens a program takes, the fewer parts of dB are written
    "pull": {
        (_LARGE, 16): Tile(128, 0, 64, 4, 3),
        (_SMALL, 16): Tile(128, 0, 64, 8, 2),
        (_LARGE, 32): Tile(64, 0, 32, 4, 2),
        (_SMALL, 32): Tile(64, 0, 32, 4, 2),
    },
    # gᵀ x: a program takes a strip of x's columns over all tokens
    "push": {
        (_LARGE, 16): Tile(64, 64, 0, 4, 4),
        (_SMALL, 16): Tile(64, 64, 0, 4, 3),
        (_LARGE, 32): Tile(32, 64, 0, 4, 3),
        (_SMALL, 32): Tile(32, 64, 0, 4, 2),
    },
    # 16 columns fill a sector of y; the more tokens, the fewer programs read the entries of S
    "sparse": {
        (_LARGE, 16): Tile(128, 16, 32, 4, 2),
        (_SMALL, 16): Tile(128, 16, 32, 4, 2),
        (_LARGE, 32): Tile(64, 16, 32, 4, 2),
        (_SMALL, 32): Tile(64, 16, 32, 4, 2),
    },
}

_TIGHT_TILES: dict[str, dict[int, Tile]] = {
    "fused": {16: Tile(64, 64, 64, 8, 2), 32: Tile(64, 64, 16, 8, 2)},
    "dense": {16: Tile(128, 128, 32, 8, 2), 32: Tile(64, 32, 16, 8, 2)},
    "low rank": {16: Tile(64, 64, 32, 8, 2), 32: Tile(64, 64, 16, 8, 2)},
    "few": {16: Tile(FEW_TOKENS, 32, 64, 4, 2), 32: Tile(FEW_TOKENS, 32, 16, 8, 2)},
    "fewest": {16: Tile(FEWEST_TOKENS, 32, 64, 4, 2), 32: Tile(FEWEST_TOKENS, 32, 16, 8, 2)},
    "project": {16: Tile(16, 0, 64, 4, 2), 32: Tile(16, 0, 32, 4, 3)},
    "project of three": {16: Tile(16, 0, 64, 4, 2), 32: Tile(16, 0, 32, 4, 3)},
    "pull": {16: Tile(64, 0, 32, 8, 2), 32: Tile(64, 0, 32, 8, 2)},
    "push": {16: Tile(64, 64, 0, 8, 2), 32: Tile(32, 64, 0, 8, 2)},
    "sparse": {16: Tile(64, 16, 32, 4, 2), 32: Tile(32, 16, 32, 4, 2)},
}
"""For calls that need more registers beside the product: masks of odd sizes, dropout, several adapters, large ranks,
activations gathered one by one."""


@lru_cache(maxsize=4096)
def tile_for(kernel: str, architecture: int, dtype: torch.dtype, tokens: int, tight: bool = False) -> Tile:
    """The row for a call.

    Args:
        kernel: ``"fused"``, ``"dense"``, ``"low rank"``, ``"few"``, ``"fewest"``, ``"project"``,
            ``"project of three"``, ``"pull"``, ``"push"`` or ``"sparse"``.
        architecture: compute capability, for example 90; one that is not in the table takes the next lower one's row.
        dtype: of the activations.
        tokens: of the call. A tile holds no more than the next power of two.
        tight: whether the call needs registers beside those of the product.

    Raises:
        ValueError: the architecture is older than sm_80.
    """
    family, bits = _FAMILY[_known(architecture)], 8 * dtype.itemsize
    tile = _TIGHT_TILES[kernel][bits] if tight else _TILES[kernel][family, bits]
    return replace(tile, tokens=min(tile.tokens, max(16, next_power_of_two(tokens))))


def _known(architecture: int) -> int:
    known = [entry for entry in ARCHITECTURES if entry <= architecture]
    if not known:
        raise ValueError(f"tile_for: architecture must be at least {ARCHITECTURES[0]}, got {architecture}")
    return known[-1]


def token_parts(tokens: int, tiles: int) -> int:
    """Into how many parts the tokens are cut so that ``tiles`` programs per part fill a large GPU once."""
    wanted = -(-_PROGRAMS // max(tiles, 1))
    return max(1, min(wanted, tokens // 256))


_PROGRAMS = 48
"""Programs below which a sum over all tokens is cut into parts; above, its reading of x is bound by memory."""


def gradient_parts(out_features: int) -> int:
    """Into how many parts a sum over the outputs of the widest member is cut."""
    return 4 if out_features > 256 else 1


def inner_parts(tiles: int, steps: int, num_warps: int) -> int:
    """Into how many parts a sum of ``steps`` steps is cut so that few tokens' ``tiles`` fill a large GPU twice.

    Programs of one or two warps have to be more, for a multiprocessor to hide what each of them waits for.
    """
    programs = max(256, 1024 // num_warps)
    return max(1, min(cdiv(programs, max(tiles, 1)), steps // 4, 16))


def few_tokens_kernel(tokens: int) -> str:
    """The row of :func:`tile_for` for a product of few tokens."""
    return "fewest" if tokens <= FEWEST_TOKENS else "few"
