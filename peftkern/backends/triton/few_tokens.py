"""y = x Wᵀ + s D(x) Aᵀ Bᵀ + b for at most 64 tokens: everything in one launch, and one more where the sum is cut.

Reading W bounds the time, so programs are many and narrow, and x's columns are cut into parts if there are not enough
of them. h is computed anew in every program, beside the product: being linear, each part adds its own h Bᵀ. Parts are
summed by a second launch, always in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.adapters import Slots
from peftkern.backends.triton.configurations import Tile, inner_parts
from peftkern.backends.triton.decode import load_masked, load_tables, load_tile
from peftkern.backends.triton.dropout import NO_MASK
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import owner, select, select_weight
from peftkern.backends.triton.project import add_projection
from peftkern.backends.triton.reduce import parts_of, sum_parts
from peftkern.backends.triton.weights import WeightArguments


@triton.jit
def select_mask(masks, index, COUNT: tl.constexpr):
    seed_low = masks[0][0]
    stream = masks[0][1]
    threshold = masks[0][2]
    keep_scale = masks[0][3]
    for candidate in tl.static_range(1, COUNT):
        if index >= candidate:
            seed_low = masks[candidate][0]
            stream = masks[candidate][1]
            threshold = masks[candidate][2]
            keep_scale = masks[candidate][3]
    return seed_low, stream, threshold, keep_scale


@triton.jit
def few_tokens_kernel(
    x,
    weight,
    lora_A,
    lora_B,
    masks,
    bias,
    y,
    h,
    tokens,
    in_features,
    out_features,
    part_columns,
    x_stride,
    row_strides,
    h_width,
    A_strides,
    B_strides,
    ranks,
    columns,
    scaling,
    MEMBERS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    MASK_IN: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    member, out_tile = owner(tl.program_id(0), out_features, MEMBERS, BLOCK_OUT)
    part = tl.program_id(1)
    out_count = select(out_features, member, MEMBERS)
    token_rows = tl.arange(0, BLOCK_TOKENS)
    out_rows = out_tile * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    rows = tl.minimum(token_rows, tokens - 1).to(tl.int64)
    outputs = tl.minimum(out_rows, out_count - 1).to(tl.int64)
    chosen = select_weight(weight, member, MEMBERS)
    row_stride = select(row_strides, member, MEMBERS)
    tables = load_tables(chosen, FORMAT, NESTED_BLOCK_SIZE)
    inner = tl.arange(0, BLOCK_IN)
    x_pointers = x + rows[:, None] * x_stride + inner[None, :]
    total = tl.zeros((BLOCK_TOKENS, BLOCK_OUT), tl.float32)
    inner_sum = tl.zeros((BLOCK_TOKENS, RANK), tl.float32)
    if ADAPTERS > 0:
        lora_A_chosen = select(lora_A, member, MEMBERS)
        A_stride = select(A_strides, member, MEMBERS)
        rank = select(ranks, member, MEMBERS)
        mask_chosen = select_mask(masks, member, MEMBERS)
    end = tl.minimum(in_features, (part + 1) * part_columns)
    for first in range(part * part_columns, end, BLOCK_IN):
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
        if ADAPTERS > 0:
            inner_sum = add_projection(
                inner_sum,
                left,
                lora_A_chosen,
                A_stride,
                rank,
                mask_chosen,
                rows,
                first + inner,
                mask,
                RANK,
                DROPOUT,
                PRECISION,
            )
    part_rows = part.to(tl.int64) * tokens + rows
    exists = (token_rows < tokens)[:, None]
    if ADAPTERS > 0:
        numbers = tl.arange(0, RANK)
        inner_sum *= select(scaling, member, MEMBERS)
        h_mask = exists & (numbers < rank)[None, :] & (out_tile == 0)
        h_columns = select(columns, member, MEMBERS) + numbers
        tl.store(h + part_rows[:, None] * h_width + h_columns[None, :], inner_sum, mask=h_mask)
        factor = tl.load(
            select(lora_B, member, MEMBERS) + outputs[:, None] * select(B_strides, member, MEMBERS) + numbers[None, :],
            mask=(numbers < rank)[None, :],
            other=0.0,
        )
        # columns from `rank` on hold the last row of A once more: the zeros of `factor` take them out
        total = tl.dot(inner_sum.to(DTYPE), tl.trans(factor.to(DTYPE)), total, input_precision=PRECISION)
    if HAS_BIAS:
        value = tl.load(select(bias, member, MEMBERS) + outputs).to(tl.float32)
        total += tl.where(part == 0, value, 0.0)[None, :]
    destination = select(y, member, MEMBERS)
    target = destination + part_rows[:, None] * out_count + out_rows[None, :]
    tl.store(target, total.to(destination.dtype.element_ty), mask=exists & (out_rows < out_count)[None, :])


def few_tokens(
    x: Tensor,
    weight: WeightArguments,
    slots: Slots,
    bias: Sequence[Tensor] | None,
    y: Sequence[Tensor],
    h: Tensor,
    tile: Tile,
    precision: str,
) -> None:
    """Write the y of every member, and h.

    Args:
        x: [tokens, in], its columns next to each other; at most 64 tokens.
        weight: of the members.
        slots: one per member, or none.
        bias: [out] of every member, or ``None``.
        y: contiguous [tokens, out] of every member, in the dtype of x.
        h: contiguous [tokens, Σr] float32.
        tile: tokens, outputs and inner columns of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, in_features = x.shape
    out_features = tuple(part.shape[1] for part in y)
    out_tiles = sum(cdiv(count, tile.columns) for count in out_features)
    parts = inner_parts(out_tiles, cdiv(in_features, tile.inner), tile.num_warps)
    part_columns = cdiv(cdiv(in_features, tile.inner), parts) * tile.inner
    parts = cdiv(in_features, part_columns)
    y_parts = [parts_of(result, parts) for result in y]
    h_parts = parts_of(h, parts)
    launch(
        few_tokens_kernel,
        (out_tiles, parts),
        x,
        weight.pointers,
        slots.lora_A or (x,),
        slots.lora_B or (x,),
        slots.masks or (NO_MASK,),
        tuple(bias or (x,)),
        tuple(y_parts),
        h_parts,
        tokens,
        in_features,
        out_features,
        part_columns,
        x.stride(0),
        weight.row_strides,
        h.shape[1],
        slots.a_strides or (0,),
        slots.b_strides or (0,),
        slots.ranks or (0,),
        slots.columns or (0,),
        slots.scaling or (0.0,),
        traffic=lambda: Traffic(
            (x, *weight.tensors, *slots.lora_A, *slots.lora_B, *(bias or ())),
            (*y_parts, h_parts),
            flops=2 * tokens * sum(out_features) * in_features,
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        MEMBERS=len(y),
        ADAPTERS=1 if len(slots) else 0,
        RANK=slots.padded_rank if len(slots) else 16,
        DROPOUT=slots.dropout,
        HAS_BIAS=bias is not None,
        **weight.kind.constants(),
        MASK_IN=in_features % tile.inner != 0,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_OUT=tile.columns,
        BLOCK_IN=tile.inner,
        PRECISION=precision,
    )
    if parts > 1:
        sum_parts([*y_parts, *([h_parts] if len(slots) else [])], [*y, *([h] if len(slots) else [])])
