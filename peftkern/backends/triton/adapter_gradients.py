"""Gradients of the adapters as two skinny kernels: ``pull`` reads dY once, ``push`` reads x once.

    pull:  g = s · dY B     dB = dYᵀ h      one adapter of every member
    push:  dA = gᵀ D(x)

A program of ``pull`` takes some tokens and some outputs. It sees a part of the sum of each: g, over outputs, is left
in parts that its readers add up; dB, over tokens, is left in parts that further programs of ``push`` add up. A program
of ``push`` takes a strip of x's columns over all tokens, or over a part of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.adapters import Slots
from peftkern.backends.triton.configurations import GRADIENT_PARTS, Tile, token_parts
from peftkern.backends.triton.dropout import keep_factor
from peftkern.backends.triton.input_gradient import load_sum
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import owner, select
from peftkern.backends.triton.reduce import sum_block, sum_parts

_REDUCE_BLOCK = 1024


# ---- pull: g and dB


@triton.jit
def pull_kernel(
    grad,
    lora_B,
    h,
    g,
    grad_B,
    tokens,
    out_features,
    chunk_tiles,
    chunks,
    grad_strides,
    B_strides,
    h_stride,
    g_stride,
    g_part_stride,
    ranks,
    columns,
    scaling,
    MEMBERS: tl.constexpr,
    RANK: tl.constexpr,
    NEED_G: tl.constexpr,
    NEED_B: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_tile = tl.program_id(0)
    member, chunk = owner(tl.program_id(1), chunks, MEMBERS, 1)
    grad_pointer = select(grad, member, MEMBERS)
    DTYPE: tl.constexpr = grad_pointer.dtype.element_ty
    grad_stride = select(grad_strides, member, MEMBERS)
    B_pointer = select(lora_B, member, MEMBERS)
    B_stride = select(B_strides, member, MEMBERS)
    out_count = select(out_features, member, MEMBERS)
    rank = select(ranks, member, MEMBERS)
    column = select(columns, member, MEMBERS)

    token_rows = token_tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    rows = token_rows.to(tl.int64)
    exists = (token_rows < tokens)[:, None]
    numbers = tl.arange(0, RANK)
    has_rank = (numbers < rank)[None, :]
    g_sum = tl.zeros((BLOCK_TOKENS, RANK), tl.float32)
    if NEED_B:
        h_pointers = h + rows[:, None] * h_stride + (column + numbers)[None, :]
        h_tile = tl.load(h_pointers, mask=exists & has_rank, other=0.0).to(DTYPE)
        part_B = select(grad_B, member, MEMBERS) + token_tile.to(tl.int64) * out_count * rank
    step = select(chunk_tiles, member, MEMBERS) * BLOCK_OUT
    for first in range(chunk * step, tl.minimum((chunk + 1) * step, out_count), BLOCK_OUT):
        out_numbers = first + tl.arange(0, BLOCK_OUT)
        outputs = out_numbers.to(tl.int64)
        inside = out_numbers < out_count
        tile = tl.load(
            grad_pointer + rows[:, None] * grad_stride + outputs[None, :], mask=exists & inside[None, :], other=0.0
        )
        if NEED_G:
            factor = tl.load(
                B_pointer + outputs[:, None] * B_stride + numbers[None, :], mask=inside[:, None] & has_rank, other=0.0
            )
            g_sum = tl.dot(tile, factor.to(DTYPE), g_sum, input_precision=PRECISION)
        if NEED_B:
            part = tl.dot(tl.trans(tile), h_tile, input_precision=PRECISION)
            target = part_B + outputs[:, None] * rank + numbers[None, :]
            tl.store(target, part.to(part_B.dtype.element_ty), mask=inside[:, None] & has_rank)
    if NEED_G:
        target = g + chunk.to(tl.int64) * g_part_stride + rows[:, None] * g_stride + (column + numbers)[None, :]
        tl.store(target, g_sum * select(scaling, member, MEMBERS), mask=exists & has_rank)


def output_chunks(out_features: int, tile: Tile) -> tuple[int, int]:
    """Tiles of outputs in each part of g, and the number of parts."""
    tiles = triton.cdiv(out_features, tile.inner)
    per_part = triton.cdiv(tiles, GRADIENT_PARTS)
    return per_part, triton.cdiv(tiles, per_part)


def pull(
    grads: Sequence[Tensor],
    h: Tensor,
    slots: Slots,
    g: Tensor | None,
    grad_B: Sequence[Tensor] | None,
    tile: Tile,
    precision: str,
) -> None:
    """Write parts of g and of dB.

    Args:
        grads: dY of every member, [tokens, out], columns next to each other.
        h: [tokens, Σr] float32.
        slots: one per member.
        g: [parts, tokens, Σr] float32, or ``None``: not wanted. Member i fills as many parts as `output_chunks` says.
        grad_B: contiguous [token tiles, out, r] per member, or ``None``: not wanted.
        tile: tokens and inner outputs of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens = grads[0].shape[0]
    out_features = tuple(grad.shape[1] for grad in grads)
    chunk_tiles, chunks = zip(*(output_chunks(count, tile) for count in out_features), strict=True)
    wanted = (g is not None) + (grad_B is not None)
    read = (*grads, *(slots.lora_B if g is not None else ()), *(slots.part_of(h) if grad_B is not None else ()))
    written = (*(slots.part_of(g) if g is not None else ()), *(grad_B or ()))
    launch(
        pull_kernel,
        (triton.cdiv(tokens, tile.tokens), sum(chunks)),
        tuple(grads),
        slots.lora_B,
        h,
        h if g is None else g,
        tuple(grad_B or (h,)),
        tokens,
        out_features,
        chunk_tiles,
        chunks,
        tuple(grad.stride(0) for grad in grads),
        slots.B_strides,
        h.stride(0),
        0 if g is None else g.stride(1),
        0 if g is None else g.stride(0),
        slots.ranks,
        slots.columns,
        slots.scaling,
        traffic=Traffic(
            read,
            written,
            flops=2 * wanted * tokens * sum(n * r for n, r in zip(out_features, slots.ranks, strict=True)),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        MEMBERS=len(grads),
        RANK=slots.padded_rank,
        NEED_G=g is not None,
        NEED_B=grad_B is not None,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_OUT=tile.inner,
        PRECISION=precision,
    )


# ---- push: dA, and the sum of dB's parts


@triton.jit
def push_kernel(
    x,
    g,
    masks,
    grad_A,
    parts_B,
    grad_B,
    tokens,
    in_features,
    x_stride,
    g_stride,
    g_parts,
    g_part_stride,
    ranks,
    columns,
    token_part,
    sizes_B,
    part_count_B,
    strips,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    SUM_B: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    REDUCE_BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    program = tl.program_id(0)
    if program < strips:
        columns_x = tl.program_id(0) % tl.cdiv(in_features, BLOCK_IN) * BLOCK_IN + tl.arange(0, BLOCK_IN)
        part = program // tl.cdiv(in_features, BLOCK_IN)
        inside = (columns_x < in_features)[None, :]
        numbers = tl.arange(0, RANK)
        sum_0 = tl.zeros((RANK, BLOCK_IN), tl.float32)
        sum_1 = tl.zeros((RANK, BLOCK_IN), tl.float32)
        sum_2 = tl.zeros((RANK, BLOCK_IN), tl.float32)
        for first in range(part * token_part, tl.minimum((part + 1) * token_part, tokens), BLOCK_TOKENS):
            token_rows = first + tl.arange(0, BLOCK_TOKENS)
            rows = token_rows.to(tl.int64)
            exists = (token_rows < tokens)[:, None]
            tile = tl.load(x + rows[:, None] * x_stride + columns_x[None, :], mask=exists & inside, other=0.0)
            g_rows = g + rows[:, None] * g_stride
            sum_0 = add_outer(
                sum_0,
                g_rows + (columns[0] + numbers)[None, :],
                exists & (numbers < ranks[0])[None, :],
                g_parts[0],
                g_part_stride,
                tile,
                masks[0],
                rows,
                columns_x,
                DROPOUT,
                PRECISION,
            )
            if SLOTS > 1:
                sum_1 = add_outer(
                    sum_1,
                    g_rows + (columns[1] + numbers)[None, :],
                    exists & (numbers < ranks[1])[None, :],
                    g_parts[1],
                    g_part_stride,
                    tile,
                    masks[1],
                    rows,
                    columns_x,
                    DROPOUT,
                    PRECISION,
                )
            if SLOTS > 2:
                sum_2 = add_outer(
                    sum_2,
                    g_rows + (columns[2] + numbers)[None, :],
                    exists & (numbers < ranks[2])[None, :],
                    g_parts[2],
                    g_part_stride,
                    tile,
                    masks[2],
                    rows,
                    columns_x,
                    DROPOUT,
                    PRECISION,
                )
        store_strip(grad_A[0], sum_0, part, ranks[0], in_features, numbers, columns_x)
        if SLOTS > 1:
            store_strip(grad_A[1], sum_1, part, ranks[1], in_features, numbers, columns_x)
        if SLOTS > 2:
            store_strip(grad_A[2], sum_2, part, ranks[2], in_features, numbers, columns_x)
    elif SUM_B:
        entry, tile_B = owner(program - strips, sizes_B, SLOTS, REDUCE_BLOCK)
        sum_block(
            select(parts_B, entry, SLOTS),
            select(grad_B, entry, SLOTS),
            select(sizes_B, entry, SLOTS),
            part_count_B,
            tile_B,
            REDUCE_BLOCK,
        )


@triton.jit
def add_outer(
    total,
    g_pointers,
    g_mask,
    g_parts,
    g_part_stride,
    tile,
    mask,
    rows,
    columns,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` + gᵀ D(tile)."""
    left = load_sum(g_pointers, g_parts, g_part_stride, g_mask)
    if DROPOUT:
        tile = (tile.to(tl.float32) * keep_factor(mask, rows, columns)).to(tile.dtype)
    return tl.dot(tl.trans(left.to(tile.dtype)), tile, total, input_precision=PRECISION)


@triton.jit
def store_strip(grad_A, total, part, rank, in_features, numbers, columns):
    target = grad_A + (part.to(tl.int64) * rank + numbers)[:, None] * in_features + columns[None, :]
    mask = (numbers < rank)[:, None] & (columns < in_features)[None, :]
    tl.store(target, total.to(grad_A.dtype.element_ty), mask=mask)


def push(
    x: Tensor,
    g: Tensor,
    g_parts: Sequence[int],
    slots: Slots,
    grad_A: Sequence[Tensor],
    parts_B: Sequence[Tensor] | None,
    grad_B: Sequence[Tensor] | None,
    tile: Tile,
    architecture: int,
    precision: str,
) -> None:
    """Write dA, and dB from its parts.

    Args:
        x: [tokens, in], its columns next to each other.
        g: contiguous [parts, tokens, Σr] float32; slot i counts its first ``g_parts[i]`` parts.
        slots: one per member.
        grad_A: contiguous [r, in] per slot, of one dtype.
        parts_B: contiguous [parts, out, r] float32 per slot, or ``None``: nothing to add up.
        grad_B: contiguous [out, r] per slot, of one dtype.
        tile: tokens of a step and columns of a program.
        architecture: compute capability.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, in_features = x.shape
    strips = triton.cdiv(in_features, tile.columns)
    parts = token_parts(tokens, strips, architecture)
    token_part = triton.cdiv(triton.cdiv(tokens, parts), tile.tokens) * tile.tokens
    parts = triton.cdiv(tokens, token_part)
    results = [_parts_of(gradient, parts) for gradient in grad_A]
    sizes_B = tuple(gradient.numel() for gradient in grad_B or ())
    sum_programs = sum(triton.cdiv(size, _REDUCE_BLOCK) for size in sizes_B) if parts_B else 0
    launch(
        push_kernel,
        (strips * parts + sum_programs,),
        x,
        g,
        slots.masks,
        tuple(results),
        tuple(parts_B or (g,)),
        tuple(grad_B or (g,)),
        tokens,
        in_features,
        x.stride(0),
        g.stride(1),
        tuple(g_parts),
        g.stride(0),
        slots.ranks,
        slots.columns,
        token_part,
        sizes_B or (0,),
        parts_B[0].shape[0] if parts_B else 0,
        strips * parts,
        traffic=Traffic(
            (x, *slots.part_of(g), *(parts_B or ())),
            (*results, *((grad_B or ()) if parts_B else ())),
            flops=2 * tokens * in_features * sum(slots.ranks),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        SLOTS=len(slots),
        RANK=slots.padded_rank,
        DROPOUT=slots.dropout,
        SUM_B=parts_B is not None,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_IN=tile.columns,
        REDUCE_BLOCK=_REDUCE_BLOCK,
        PRECISION=precision,
    )
    if parts > 1:
        sum_parts(results, grad_A)


def _parts_of(gradient: Tensor, parts: int) -> Tensor:
    if parts == 1:
        return gradient
    return torch.empty((parts, *gradient.shape), dtype=torch.float32, device=gradient.device)
