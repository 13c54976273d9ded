"""y = x Wᵀ + h Bᵀ + b for the members of a group, in one launch and one accumulator.

The adapter is a few more columns of the same product: after the loop over x's columns comes one over h's. W is decoded
inside the product, or dense. Without BASE only the adapter's part is written, for a vendor's product to be added to.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.adapters import Slots
from peftkern.backends.triton.configurations import Tile
from peftkern.backends.triton.decode import load_masked, load_tables, load_tile
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import owner, select, select_weight
from peftkern.backends.triton.weights import NO_WEIGHT, WeightArguments


@triton.jit
def swizzle(program, token_tiles, column_tiles, GROUP: tl.constexpr):
    """Tile coordinates such that GROUP rows of tiles run side by side and find each other's operands in the cache."""
    first = program // (GROUP * column_tiles) * GROUP
    height = tl.minimum(token_tiles - first, GROUP)
    within = program % (GROUP * column_tiles)
    return first + within % height, within // height


@triton.jit
def add_low_rank(
    total,
    h,
    h_stride,
    rows,
    column,
    lora_B,
    B_stride,
    outputs,
    rank,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` + h Bᵀ, at most 64 columns of h at a time."""
    CHUNK: tl.constexpr = min(RANK, 64)
    for first in tl.static_range(0, RANK, CHUNK):
        numbers = first + tl.arange(0, CHUNK)
        mask = (numbers < rank)[None, :]
        left = tl.load(h + rows[:, None] * h_stride + (column + numbers)[None, :], mask=mask, other=0.0)
        right = tl.load(lora_B + outputs[:, None] * B_stride + numbers[None, :], mask=mask, other=0.0)
        total = tl.dot(left.to(DTYPE), tl.trans(right.to(DTYPE)), total, input_precision=PRECISION)
    return total


@triton.jit
def product_kernel(
    x,
    weight,
    h,
    lora_B,
    bias,
    y,
    tokens,
    in_features,
    out_features,
    x_stride,
    row_strides,
    h_stride,
    B_strides,
    ranks,
    columns,
    MEMBERS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BASE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    MASK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    out_tiles = tl.cdiv(out_features[0], BLOCK_OUT)
    for entry in tl.static_range(1, MEMBERS):
        out_tiles += tl.cdiv(out_features[entry], BLOCK_OUT)
    token_tile, out_tile = swizzle(tl.program_id(0), tl.cdiv(tokens, BLOCK_TOKENS), out_tiles, GROUP)
    member, out_tile = owner(out_tile, out_features, MEMBERS, BLOCK_OUT)
    out_count = select(out_features, member, MEMBERS)

    token_rows = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    out_rows = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    # Rows beyond the end repeat the last one instead of being masked; what they give is not stored.
    rows = tl.minimum(token_rows, tokens - 1).to(tl.int64)
    outputs = tl.minimum(out_rows, out_count - 1).to(tl.int64)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    if BASE:
        chosen = select_weight(weight, member, MEMBERS)
        row_stride = select(row_strides, member, MEMBERS)
        tables = load_tables(chosen, FORMAT, NESTED_BLOCK_SIZE)
        inner = tl.arange(0, BLOCK_IN)
        x_pointers = x + rows[:, None] * x_stride + inner[None, :]
        for first in range(0, in_features, BLOCK_IN):
            mask = None
            if MASK_IN:
                mask = (first + inner < in_features)[None, :]
            left = load_masked(x_pointers + first, mask, 0.0)
            right = load_tile(
                chosen,
                tables,
                row_stride,
                outputs,
                first,
                in_features,
                DTYPE,
                BLOCK_IN,
                MASK_IN,
                FORMAT,
                BLOCK_SIZE,
                NESTED_BLOCK_SIZE,
                WHOLE_BLOCKS,
            )
            total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    for adapter in tl.static_range(ADAPTERS):
        total = add_low_rank(
            total,
            h,
            h_stride,
            rows,
            select(columns, member, MEMBERS, ADAPTERS, adapter),
            select(lora_B, member, MEMBERS, ADAPTERS, adapter),
            select(B_strides, member, MEMBERS, ADAPTERS, adapter),
            outputs,
            select(ranks, member, MEMBERS, ADAPTERS, adapter),
            DTYPE,
            RANK,
            PRECISION,
        )
    if HAS_BIAS:
        total += tl.load(select(bias, member, MEMBERS) + outputs)[None, :].to(tl.float32)
    target = select(y, member, MEMBERS) + rows[:, None] * out_count + out_rows[None, :]
    tl.store(target, total.to(DTYPE), mask=(token_rows < tokens)[:, None] & (out_rows < out_count)[None, :])


def product(
    x: Tensor,
    weight: WeightArguments | None,
    h: Tensor,
    slots: Slots,
    bias: Sequence[Tensor] | None,
    y: Sequence[Tensor],
    tile: Tile,
    precision: str,
) -> None:
    """Write the y of every member.

    Args:
        x: [tokens, in], its columns next to each other.
        weight: of the members; ``None`` leaves the base product out.
        h: [tokens, Σr] float32.
        slots: equally many per member, none included.
        bias: [out] of every member, or ``None``.
        y: contiguous [tokens, out] of every member, in the dtype of x.
        tile: tokens, outputs and inner columns of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, in_features = x.shape
    out_features = tuple(part.shape[1] for part in y)
    # Without a base product or adapters some pointers are never read; a kernel takes no empty tuples.
    pointers = ((x,),) * 4 + (x, x) if weight is None else weight.pointers
    inner = (in_features if weight is not None else 0) + (sum(slots.ranks) // len(y) if len(slots) else 0)
    out_tiles = sum(cdiv(count, tile.columns) for count in out_features)
    launch(
        product_kernel,
        (cdiv(tokens, tile.tokens) * out_tiles,),
        x,
        pointers,
        h,
        slots.lora_B or (x,),
        tuple(bias or (x,)),
        tuple(y),
        tokens,
        in_features,
        out_features,
        x.stride(0),
        (0,) if weight is None else weight.row_strides,
        h.stride(0),
        slots.b_strides or (0,),
        slots.ranks or (0,),
        slots.columns or (0,),
        traffic=lambda: Traffic(
            (*((x, *weight.tensors) if weight else ()), *slots.part_of(h), *slots.lora_B, *(bias or ())),
            y,
            flops=2 * tokens * sum(out_features) * inner,
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        MEMBERS=len(y),
        ADAPTERS=len(slots) // len(y),
        RANK=slots.padded_rank if len(slots) else 0,
        HAS_BIAS=bias is not None,
        BASE=weight is not None,
        **(NO_WEIGHT if weight is None else weight.kind).constants(),
        MASK_IN=in_features % tile.inner != 0,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_OUT=tile.columns,
        BLOCK_IN=tile.inner,
        GROUP=8,
        PRECISION=precision,
    )
