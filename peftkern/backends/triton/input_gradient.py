"""dX = Σ dY W + Σ D(g A) over the members of a group, in one launch and one accumulator.

The sum runs over the outputs of one member after the other, then over the columns of g. W is decoded inside the
product, or dense. Without BASE only the adapters' part is written, for vendor's products to be added to.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.adapters import Slots
from peftkern.backends.triton.configurations import Tile, inner_parts
from peftkern.backends.triton.decode import load_tables, load_tile
from peftkern.backends.triton.dropout import NO_MASK, keep_factor
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.paths import FEW_TOKENS
from peftkern.backends.triton.product import swizzle
from peftkern.backends.triton.reduce import parts_of, sum_parts
from peftkern.backends.triton.weights import NO_WEIGHT, WeightArguments


@triton.jit
def add_adapter(
    total,
    g,
    g_stride,
    rows,
    column,
    lora_A,
    A_stride,
    rank,
    mask,
    columns,
    column_mask,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` + D(g A), at most 64 columns of g at a time."""
    CHUNK: tl.constexpr = min(RANK, 64)
    addition = total
    if DROPOUT:
        addition = tl.zeros(total.shape, tl.float32)
    for first in tl.static_range(0, RANK, CHUNK):
        numbers = first + tl.arange(0, CHUNK)
        g_pointers = g + rows[:, None] * g_stride + (column + numbers)[None, :]
        left = tl.load(g_pointers, mask=(numbers < rank)[None, :], other=0.0)
        right = tl.load(
            lora_A + numbers.to(tl.int64)[:, None] * A_stride + columns[None, :],
            mask=(numbers < rank)[:, None] & column_mask,
            other=0.0,
        )
        addition = tl.dot(left.to(DTYPE), right.to(DTYPE), addition, input_precision=PRECISION)
    if DROPOUT:
        addition = total + addition * keep_factor(mask, rows, columns)
    return addition


@triton.jit
def input_gradient_kernel(
    grad,
    weight,
    g,
    lora_A,
    masks,
    grad_x,
    tokens,
    in_features,
    out_features,
    grad_strides,
    row_strides,
    g_stride,
    A_strides,
    ranks,
    columns,
    output_parts,
    MEMBERS: tl.constexpr,
    ADAPTERS: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    BASE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
    MASK_IN: tl.constexpr,
    MASK_OUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    DTYPE: tl.constexpr = grad[0].dtype.element_ty
    token_tile, in_tile = swizzle(
        tl.program_id(0), tl.cdiv(tokens, BLOCK_TOKENS), tl.cdiv(in_features, BLOCK_IN), GROUP
    )
    part = tl.program_id(1)
    token_rows = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = tl.minimum(token_rows, tokens - 1).to(tl.int64)
    inputs = in_tile * BLOCK_IN + tl.arange(0, BLOCK_IN)
    total = tl.zeros((BLOCK_TOKENS, BLOCK_IN), tl.float32)
    if BASE:
        tables = load_tables(weight, FORMAT, NESTED_BLOCK_SIZE)
        for member in tl.static_range(MEMBERS):
            chosen = (
                weight[0][member],
                weight[1][member],
                weight[2][member],
                weight[3][member],
                weight[4],
                weight[5],
            )
            out_count = out_features[member]
            part_outputs = tl.cdiv(tl.cdiv(out_count, BLOCK_OUT), output_parts) * BLOCK_OUT
            end = tl.minimum(out_count, (part + 1) * part_outputs)
            numbers = tl.arange(0, BLOCK_OUT)
            grad_pointers = grad[member] + rows[:, None] * grad_strides[member] + numbers[None, :]
            for first in range(part * part_outputs, end, BLOCK_OUT):
                # Outputs beyond the end repeat the last row of W, and their dY counts as 0.
                if MASK_OUT:
                    left = tl.load(grad_pointers + first, mask=(first + numbers < out_count)[None, :], other=0.0)
                else:
                    left = tl.load(grad_pointers + first)
                outputs = tl.minimum(first + numbers, out_count - 1).to(tl.int64)
                right = load_tile(
                    chosen,
                    tables,
                    row_strides[member],
                    outputs,
                    in_tile * BLOCK_IN,
                    in_features,
                    DTYPE,
                    BLOCK_IN,
                    MASK_IN,
                    FORMAT,
                    BLOCK_SIZE,
                    NESTED_BLOCK_SIZE,
                    WHOLE_BLOCKS,
                )
                if right.dtype == tl.float32:
                    # Always true, unknown to the compiler: Triton 3.6 fails on sm_90 and 100 where a float32 operand of
                    # a product ends in the reshape of decoded pairs.
                    right = tl.where((outputs >= 0)[:, None], right, 0.0)
                total = tl.dot(left, right, total, input_precision=PRECISION)
    exists = (inputs < in_features)[None, :]
    if part == 0:
        for slot in tl.static_range(MEMBERS * ADAPTERS):
            total = add_adapter(
                total,
                g,
                g_stride,
                rows,
                columns[slot],
                lora_A[slot],
                A_strides[slot],
                ranks[slot],
                masks[slot],
                inputs,
                exists,
                DTYPE,
                RANK,
                DROPOUT,
                PRECISION,
            )
    target = grad_x + (part.to(tl.int64) * tokens + rows)[:, None] * in_features + inputs[None, :]
    tl.store(target, total.to(grad_x.dtype.element_ty), mask=(token_rows < tokens)[:, None] & exists)


def input_gradient(
    grads: Sequence[Tensor],
    weight: WeightArguments | None,
    g: Tensor,
    slots: Slots,
    grad_x: Tensor,
    tile: Tile,
    precision: str,
) -> None:
    """Write dX.

    Args:
        grads: dY of every member, [tokens, out], columns next to each other.
        weight: of the members; ``None`` leaves the base products out.
        g: [tokens, Σr] float32.
        slots: equally many per member, none included.
        grad_x: contiguous [tokens, in], in the dtype of dY.
        tile: tokens, inputs and inner outputs of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, in_features = grad_x.shape
    out_features = tuple(grad.shape[1] for grad in grads)
    pointers = (grads[0],) * 6 if weight is None else weight.pointers
    tiles = cdiv(tokens, tile.tokens) * cdiv(in_features, tile.columns)
    parts = 1
    if tokens <= FEW_TOKENS and weight is not None:
        parts = inner_parts(tiles, cdiv(min(out_features), tile.inner), tile.num_warps)
    result = parts_of(grad_x, parts)
    launch(
        input_gradient_kernel,
        (tiles, parts),
        tuple(grads),
        pointers,
        g,
        slots.lora_A or (g,),
        slots.masks or (NO_MASK,),
        result,
        tokens,
        in_features,
        out_features,
        tuple(grad.stride(0) for grad in grads),
        (0,) * len(grads) if weight is None else weight.row_strides,
        g.stride(0),
        slots.a_strides or (0,),
        slots.ranks or (0,),
        slots.columns or (0,),
        parts,
        traffic=lambda: Traffic(
            (*((*grads, *weight.tensors) if weight else ()), *slots.part_of(g), *slots.lora_A),
            (result,),
            flops=2 * tokens * in_features * (sum(out_features) * (weight is not None) + sum(slots.ranks)),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        MEMBERS=len(grads),
        ADAPTERS=len(slots) // len(grads),
        RANK=slots.padded_rank if len(slots) else 0,
        DROPOUT=slots.dropout,
        BASE=weight is not None,
        **(NO_WEIGHT if weight is None else weight.kind).constants(),
        MASK_IN=in_features % tile.columns != 0,
        MASK_OUT=any(count % tile.inner != 0 for count in out_features),
        BLOCK_TOKENS=tile.tokens,
        BLOCK_IN=tile.columns,
        BLOCK_OUT=tile.inner,
        GROUP=8,
        PRECISION=precision,
    )
    if parts > 1:
        sum_parts([result], [grad_x])
