"""h = s · D(x) Aᵀ: what the adapters make of x, for up to three adapters that share x, which is read once.

h is [tokens, Σr] float32, the adapters side by side. A program takes a few tokens and all of x's columns.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.adapters import Slots
from peftkern.backends.triton.configurations import Tile
from peftkern.backends.triton.decode import load_masked
from peftkern.backends.triton.dropout import keep_factor
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch


@triton.jit
def project_kernel(
    x,
    lora_A,
    masks,
    h,
    tokens,
    in_features,
    x_stride,
    h_stride,
    A_strides,
    ranks,
    columns,
    scaling,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    MASK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_rows = tl.program_id(0) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = tl.minimum(token_rows, tokens - 1).to(tl.int64)
    inner = tl.arange(0, BLOCK_IN)
    x_pointers = x + rows[:, None] * x_stride + inner[None, :]
    sum_0 = tl.zeros((BLOCK_TOKENS, RANK), tl.float32)
    sum_1 = tl.zeros((BLOCK_TOKENS, RANK), tl.float32)
    sum_2 = tl.zeros((BLOCK_TOKENS, RANK), tl.float32)
    for first in range(0, in_features, BLOCK_IN):
        mask = None
        if MASK_IN:
            mask = (first + inner < in_features)[None, :]
        tile = load_masked(x_pointers + first, mask, 0.0)
        sum_0 = add_projection(
            sum_0,
            tile,
            lora_A[0],
            A_strides[0],
            ranks[0],
            masks[0],
            rows,
            first + inner,
            mask,
            RANK,
            DROPOUT,
            PRECISION,
        )
        if SLOTS > 1:
            sum_1 = add_projection(
                sum_1,
                tile,
                lora_A[1],
                A_strides[1],
                ranks[1],
                masks[1],
                rows,
                first + inner,
                mask,
                RANK,
                DROPOUT,
                PRECISION,
            )
        if SLOTS > 2:
            sum_2 = add_projection(
                sum_2,
                tile,
                lora_A[2],
                A_strides[2],
                ranks[2],
                masks[2],
                rows,
                first + inner,
                mask,
                RANK,
                DROPOUT,
                PRECISION,
            )
    h_rows = h + rows[:, None] * h_stride
    exists = (token_rows < tokens)[:, None]
    number = tl.arange(0, RANK)[None, :]
    tl.store(h_rows + columns[0] + number, sum_0 * scaling[0], mask=exists & (number < ranks[0]))
    if SLOTS > 1:
        tl.store(h_rows + columns[1] + number, sum_1 * scaling[1], mask=exists & (number < ranks[1]))
    if SLOTS > 2:
        tl.store(h_rows + columns[2] + number, sum_2 * scaling[2], mask=exists & (number < ranks[2]))


@triton.jit
def add_projection(
    total,
    tile,
    lora_A,
    A_stride,
    rank,
    mask,
    rows,
    columns,
    column_mask,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` + D(tile) Aᵀ, for a tile of x. What stands in columns from ``rank`` on is not to be used."""
    numbers = tl.minimum(tl.arange(0, RANK), rank - 1)
    factor = load_masked(lora_A + numbers.to(tl.int64)[:, None] * A_stride + columns[None, :], column_mask, 0.0)
    if DROPOUT:
        tile = (tile.to(tl.float32) * keep_factor(mask, rows, columns)).to(tile.dtype)
    return tl.dot(tile, tl.trans(factor.to(tile.dtype)), total, input_precision=PRECISION)


def project(x: Tensor, slots: Slots, h: Tensor, tile: Tile, precision: str) -> None:
    """Write ``slots``' columns of h.

    Args:
        x: [tokens, in], its columns next to each other.
        slots: up to three adapters.
        h: [tokens, Σr] float32.
        tile: tokens and inner columns of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, in_features = x.shape
    launch(
        project_kernel,
        (cdiv(tokens, tile.tokens),),
        x,
        slots.lora_A,
        slots.masks,
        h,
        tokens,
        in_features,
        x.stride(0),
        h.stride(0),
        slots.a_strides,
        slots.ranks,
        slots.columns,
        slots.scaling,
        traffic=lambda: Traffic(
            (x, *slots.lora_A), slots.part_of(h), flops=2 * tokens * in_features * sum(slots.ranks)
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        SLOTS=len(slots),
        RANK=slots.padded_rank,
        DROPOUT=slots.dropout,
        MASK_IN=in_features % tile.inner != 0,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_IN=tile.inner,
        PRECISION=precision,
    )
