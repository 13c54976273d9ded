"""Gradients of the adapters as two skinny kernels: ``pull`` reads dY once, ``push`` reads x once.

    pull:  g = s · dY B     dB = dYᵀ h      one adapter of every member
    push:  dA = gᵀ D(x)                       x may be activation(gate) ⊙ up, made again on the way

A program of ``pull`` takes some tokens and some outputs, and so sees a part of either sum: g's runs over outputs, dB's
over tokens. A program of ``push`` takes a strip of x's columns over all tokens, or over a part of them. Parts are added
up by :mod:`.reduce`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.adapters import Slots
from peftkern.backends.triton.configurations import Tile, token_parts
from peftkern.backends.triton.dropout import keep_factor
from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import select
from peftkern.backends.triton.reduce import parts_of, sum_parts
from peftkern.backends.triton.silu_mul import gated

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
    PARTS: tl.constexpr,
    NEED_G: tl.constexpr,
    NEED_B: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    token_tile = tl.program_id(0)
    member = tl.program_id(1) // PARTS
    part = tl.program_id(1) % PARTS
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
    step = tl.cdiv(tl.cdiv(out_count, BLOCK_OUT), PARTS) * BLOCK_OUT
    for first in range(part * step, tl.minimum((part + 1) * step, out_count), BLOCK_OUT):
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
            sum_B = tl.dot(tl.trans(tile), h_tile, input_precision=PRECISION)
            target = part_B + outputs[:, None] * rank + numbers[None, :]
            tl.store(target, sum_B.to(part_B.dtype.element_ty), mask=inside[:, None] & has_rank)
    if NEED_G:
        target = g + part.to(tl.int64) * g_part_stride + rows[:, None] * g_stride + (column + numbers)[None, :]
        tl.store(target, g_sum * select(scaling, member, MEMBERS), mask=exists & has_rank)


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
        g: contiguous [parts, tokens, Σr] float32, or ``None``: not wanted.
        grad_B: contiguous [token tiles, out, r] per member, or ``None``: not wanted.
        tile: tokens and inner outputs of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens = grads[0].shape[0]
    out_features = tuple(grad.shape[1] for grad in grads)
    parts = 1 if g is None else g.shape[0]

    def traffic() -> Traffic:
        read = (*grads, *(slots.lora_B if g is not None else ()), *(slots.part_of(h) if grad_B is not None else ()))
        written = (*(slots.part_of(g) if g is not None else ()), *(grad_B or ()))
        wanted = (g is not None) + (grad_B is not None)
        flops = 2 * wanted * tokens * sum(n * r for n, r in zip(out_features, slots.ranks, strict=True))
        return Traffic(read, written, flops=flops)

    launch(
        pull_kernel,
        (cdiv(tokens, tile.tokens), len(grads) * parts),
        tuple(grads),
        slots.lora_B,
        h,
        h if g is None else g,
        tuple(grad_B or (h,)),
        tokens,
        out_features,
        tuple(grad.stride(0) for grad in grads),
        slots.b_strides,
        h.stride(0),
        0 if g is None else g.stride(1),
        0 if g is None else g.stride(0),
        slots.ranks,
        slots.columns,
        slots.scaling,
        traffic=traffic,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        MEMBERS=len(grads),
        RANK=slots.padded_rank,
        PARTS=parts,
        NEED_G=g is not None,
        NEED_B=grad_B is not None,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_OUT=tile.inner,
        PRECISION=precision,
    )


# ---- push: dA


@triton.jit
def push_kernel(
    x,
    up,
    g,
    masks,
    grad_A,
    tokens,
    in_features,
    x_stride,
    up_stride,
    g_stride,
    ranks,
    columns,
    token_part,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    inputs = tl.program_id(0) * BLOCK_IN + tl.arange(0, BLOCK_IN)
    part = tl.program_id(1)
    inside = (inputs < in_features)[None, :]
    numbers = tl.arange(0, RANK)
    sum_0 = tl.zeros((RANK, BLOCK_IN), tl.float32)
    sum_1 = tl.zeros((RANK, BLOCK_IN), tl.float32)
    sum_2 = tl.zeros((RANK, BLOCK_IN), tl.float32)
    for first in range(part * token_part, tl.minimum((part + 1) * token_part, tokens), BLOCK_TOKENS):
        token_rows = first + tl.arange(0, BLOCK_TOKENS)
        rows = token_rows.to(tl.int64)
        exists = (token_rows < tokens)[:, None]
        tile = tl.load(x + rows[:, None] * x_stride + inputs[None, :], mask=exists & inside, other=0.0)
        if GATED:
            other = tl.load(up + rows[:, None] * up_stride + inputs[None, :], mask=exists & inside, other=0.0)
            tile = gated(tile, other, ACTIVATION).to(tile.dtype)
        left = g + rows[:, None] * g_stride + numbers[None, :]
        sum_0 = add_outer(
            sum_0, left + columns[0], ranks[0], masks[0], tile, exists, rows, inputs, RANK, DROPOUT, PRECISION
        )
        if SLOTS > 1:
            sum_1 = add_outer(
                sum_1, left + columns[1], ranks[1], masks[1], tile, exists, rows, inputs, RANK, DROPOUT, PRECISION
            )
        if SLOTS > 2:
            sum_2 = add_outer(
                sum_2, left + columns[2], ranks[2], masks[2], tile, exists, rows, inputs, RANK, DROPOUT, PRECISION
            )
    store_strip(grad_A[0], sum_0, part, ranks[0], in_features, numbers, inputs)
    if SLOTS > 1:
        store_strip(grad_A[1], sum_1, part, ranks[1], in_features, numbers, inputs)
    if SLOTS > 2:
        store_strip(grad_A[2], sum_2, part, ranks[2], in_features, numbers, inputs)


@triton.jit
def add_outer(
    total,
    g_pointers,
    rank,
    mask,
    tile,
    exists,
    rows,
    columns,
    RANK: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``total`` + gᵀ D(tile)."""
    left = tl.load(g_pointers, mask=exists & (tl.arange(0, RANK) < rank)[None, :], other=0.0)
    if DROPOUT:
        tile = (tile.to(tl.float32) * keep_factor(mask, rows, columns)).to(tile.dtype)
    return tl.dot(tl.trans(left.to(tile.dtype)), tile, total, input_precision=PRECISION)


@triton.jit
def store_strip(grad_A, total, part, rank, in_features, numbers, columns):
    target = grad_A + (part.to(tl.int64) * rank + numbers)[:, None] * in_features + columns[None, :]
    mask = (numbers < rank)[:, None] & (columns < in_features)[None, :]
    tl.store(target, total.to(grad_A.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Gate:
    """What makes ``activation(x) * up`` of x; up is [tokens, in], its columns next to each other."""

    up: Tensor
    activation: str


def push(
    x: Tensor,
    gate: Gate | None,
    g: Tensor,
    slots: Slots,
    grad_A: Sequence[Tensor],
    tile: Tile,
    precision: str,
) -> None:
    """Write dA.

    Args:
        x: [tokens, in], its columns next to each other; with ``gate`` the half that goes through the activation.
        gate: how a gated x is made of it, or ``None``.
        g: [tokens, Σr] float32.
        slots: one per member.
        grad_A: contiguous [r, in] per slot, of one dtype.
        tile: tokens of a step and columns of a program.
        precision: of float32 products, ``"ieee"`` or ``"tf32"``.
    """
    tokens, in_features = x.shape
    up = None if gate is None else gate.up
    strips = cdiv(in_features, tile.columns)
    parts = token_parts(tokens, strips)
    token_part = cdiv(cdiv(tokens, parts), tile.tokens) * tile.tokens
    parts = cdiv(tokens, token_part)
    results = [parts_of(gradient, parts) for gradient in grad_A]
    launch(
        push_kernel,
        (strips, parts),
        x,
        x if up is None else up,
        g,
        slots.masks,
        tuple(results),
        tokens,
        in_features,
        x.stride(0),
        x.stride(0) if up is None else up.stride(0),
        g.stride(0),
        slots.ranks,
        slots.columns,
        token_part,
        traffic=lambda: Traffic((x, up, *slots.part_of(g)), results, flops=2 * tokens * in_features * sum(slots.ranks)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        GATED=gate is not None,
        ACTIVATION="silu" if gate is None else gate.activation,
        SLOTS=len(slots),
        RANK=slots.padded_rank,
        DROPOUT=slots.dropout,
        BLOCK_TOKENS=tile.tokens,
        BLOCK_IN=tile.columns,
        PRECISION=precision,
    )
    if parts > 1:
        sum_parts(results, grad_A)
