"""Dequantization on a GPU: one launch decodes up to three weights of one kind.

The numbers are those of :mod:`peftkern.ops.dequantize`, bit for bit. Blocks are decoded as they lie in memory, one
after the other, whatever the shape of the tensor; int8 is decoded by rows, which have one scale each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.decode import FOUR_BIT, ONE_OVER_127, load_masked, load_scales, load_table
from peftkern.backends.triton.integers import cdiv, next_power_of_two
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.members import owner, select, select_weight
from peftkern.backends.triton.weights import INT8, WeightArguments, weight_arguments
from peftkern.formats import QuantizedTensor

ELEMENTS = 4096
ROW_ELEMENTS = 2048
NUM_WARPS = 4
"""Of a program, for formats with blocks and for int8: a thread reads 16 bytes of codes, and the longest block fits."""


@triton.jit
def dequantize_blocks_kernel(
    weight,
    outs,
    element_counts,
    byte_counts,
    MEMBERS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    """A program decodes ELEMENTS neighbours of one member, a whole number of blocks.

    ``byte_counts`` are those of the codes. They could be worked out of ``element_counts``, but Triton looks at each
    argument whether 16 divides it, and only then reads 16 bytes at once under a mask.
    """
    ELEMENTS_PER_BYTE: tl.constexpr = 2 if FORMAT == FOUR_BIT else 1
    BYTES: tl.constexpr = ELEMENTS // ELEMENTS_PER_BYTE
    BLOCKS: tl.constexpr = ELEMENTS // BLOCK_SIZE
    member, program = owner(tl.program_id(0), element_counts, MEMBERS, ELEMENTS)
    member_weight = select_weight(weight, member, MEMBERS)
    first_element = program.to(tl.int64) * ELEMENTS
    first_byte = first_element // ELEMENTS_PER_BYTE
    elements = tl.arange(0, ELEMENTS)
    code_bytes = tl.arange(0, BYTES)
    blocks = tl.arange(0, BLOCKS)

    element_mask = None
    byte_mask = None
    block_mask = None
    if MASKED:
        remaining = select(element_counts, member, MEMBERS) - first_element
        element_mask = elements < remaining
        byte_mask = code_bytes < select(byte_counts, member, MEMBERS) - first_byte
        block_mask = blocks * BLOCK_SIZE < remaining

    table = load_table(member_weight, FORMAT)
    codes = load_masked(member_weight[0] + first_byte + code_bytes, byte_mask, 0).to(tl.int32)
    if FORMAT == FOUR_BIT:
        values = tl.join(tl.gather(table, codes >> 4, 0), tl.gather(table, codes & 15, 0))
    else:
        values = tl.gather(table, codes, 0)
    scales = load_scales(member_weight, first_element // BLOCK_SIZE + blocks, block_mask, NESTED_BLOCK_SIZE)
    scaled = tl.reshape(values, (BLOCKS, BLOCK_SIZE)) * scales[:, None]

    out = select(outs, member, MEMBERS)
    result = tl.reshape(scaled, (ELEMENTS,)).to(out.dtype.element_ty)
    tl.store(out + first_element + elements, result, mask=element_mask)


@triton.jit
def dequantize_rows_kernel(
    weight,
    outs,
    row_counts,
    column_count,
    MEMBERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A program decodes the int8 codes of one tile [ROWS, COLUMNS] of one member."""
    member, program = owner(tl.program_id(0), row_counts, MEMBERS, ROWS)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    offsets = rows[:, None] * column_count + columns[None, :]

    row_mask = None
    mask = None
    if MASKED:
        row_mask = rows < select(row_counts, member, MEMBERS)
        mask = row_mask[:, None] & (columns < column_count)[None, :]

    codes = load_masked(select(weight[0], member, MEMBERS) + offsets, mask, 0)
    scales = load_masked(select(weight[1], member, MEMBERS) + rows, row_mask, 0.0)
    out = select(outs, member, MEMBERS)
    values = codes.to(tl.float32) * scales[:, None] * ONE_OVER_127
    tl.store(out + offsets, values.to(out.dtype.element_ty), mask=mask)


def dequantize(q: QuantizedTensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`peftkern.ops.dequantize.dequantize`; results are float32, bfloat16 or float16."""
    out = q.packed.new_empty(q.shape, dtype=q.dtype if dtype is None else dtype)
    _decode([q if q.shape else replace(q, shape=torch.Size((1,)))], [out])
    return out


def dequantize_group(weights: Sequence[QuantizedTensor], outs: Sequence[Tensor]) -> None:
    """Decode weights, all in one launch.

    Args:
        weights: up to three, [out_i, in], of one :class:`~peftkern.backends.triton.weights.WeightKind`.
        outs: [out_i, in] float32, bfloat16 or float16, contiguous; overwritten.
    """
    _decode(weights, outs)


def _decode(weights: Sequence[QuantizedTensor], outs: Sequence[Tensor]) -> None:
    if all(out.numel() == 0 for out in outs):
        return
    arguments = weight_arguments(weights)
    if arguments.kind.format == INT8:
        _decode_rows(arguments, outs)
    else:
        _decode_blocks(arguments, outs)


def _decode_blocks(arguments: WeightArguments, outs: Sequence[Tensor]) -> None:
    element_counts = tuple(out.numel() for out in outs)
    launch(
        dequantize_blocks_kernel,
        (sum(cdiv(count, ELEMENTS) for count in element_counts),),
        arguments.pointers,
        tuple(outs),
        element_counts,
        tuple(packed.numel() for packed in arguments.pointers[0]),
        traffic=lambda: Traffic(arguments.tensors, outs, flops=sum(element_counts)),
        num_warps=NUM_WARPS,
        num_stages=1,
        MEMBERS=len(outs),
        ELEMENTS=ELEMENTS,
        MASKED=any(count % ELEMENTS for count in element_counts),
        FORMAT=arguments.kind.format,
        BLOCK_SIZE=arguments.kind.block_size,
        NESTED_BLOCK_SIZE=arguments.kind.nested_block_size,
    )


def _decode_rows(arguments: WeightArguments, outs: Sequence[Tensor]) -> None:
    row_counts = tuple(out.shape[0] for out in outs)
    column_count = outs[0].shape[1]
    columns = min(next_power_of_two(column_count), ROW_ELEMENTS)
    rows = ROW_ELEMENTS // columns
    launch(
        dequantize_rows_kernel,
        (sum(cdiv(count, rows) for count in row_counts), cdiv(column_count, columns)),
        arguments.pointers,
        tuple(outs),
        row_counts,
        column_count,
        traffic=lambda: Traffic(arguments.tensors, outs, flops=2 * sum(row_counts) * column_count),
        num_warps=NUM_WARPS,
        num_stages=1,
        MEMBERS=len(outs),
        ROWS=rows,
        COLUMNS=columns,
        MASKED=any(count % rows for count in row_counts) or column_count % columns != 0,
    )
