"""Device functions that read a tile of a weight, dense or quantized, as float32 values.

    value = codebook[code] * scale          NF4, FP4, 8-bit blockwise
    value = code * scale * (1 / 127)        int8 by rows
    scale = dynamic[code] * absmax + offset with double quantization

Products and sums are rounded one by one (kernels are compiled without contraction), so that the values are those of
:mod:`peftkern.ops.dequantize` bit for bit.

The codebook is looked up with ``tl.gather`` out of a 16-entry tensor: among the exact ways the one with the fewest
instructions on every architecture (``peftkern bench aot-instructions``).
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from peftkern.backends.triton import weights
from peftkern.ops import dequantize

DENSE: tl.constexpr = tl.constexpr(weights.DENSE)
FOUR_BIT: tl.constexpr = tl.constexpr(weights.FOUR_BIT)
INT8_BLOCKWISE: tl.constexpr = tl.constexpr(weights.INT8_BLOCKWISE)
INT8: tl.constexpr = tl.constexpr(weights.INT8)
ONE_OVER_127: tl.constexpr = tl.constexpr(dequantize.ONE_OVER_127)


@triton.jit
def select(entries: Any, index: Any, COUNT: tl.constexpr, STEP: tl.constexpr = 1, FIRST: tl.constexpr = 0) -> Any:
    """``entries[FIRST + STEP * index]`` of a tuple of pointers or numbers, ``index`` being known at run time only."""
    chosen = entries[FIRST]
    for candidate in tl.static_range(1, COUNT):
        if index >= candidate:
            chosen = entries[FIRST + STEP * candidate]
    return chosen


@triton.jit
def select_weight(weight: Any, index: Any, COUNT: tl.constexpr) -> Any:
    """The pointers of one member: codes, scales, absmax, offset, codebook, codebook of the scales."""
    return (
        select(weight[0], index, COUNT),
        select(weight[1], index, COUNT),
        select(weight[2], index, COUNT),
        select(weight[3], index, COUNT),
        weight[4],
        weight[5],
    )


@triton.jit
def load_masked(pointers: Any, mask: Any, other: Any) -> Any:
    """A load whose mask may be ``None``."""
    if mask is None:
        return tl.load(pointers)
    return tl.load(pointers, mask=mask, other=other)


@triton.jit
def load_scales(weight: Any, blocks: Any, mask: Any, NESTED_BLOCK_SIZE: tl.constexpr) -> Any:
    """float32 scales of ``blocks``, a tensor of block numbers."""
    if NESTED_BLOCK_SIZE == 0:
        return load_masked(weight[1] + blocks, mask, 0.0)
    codes = load_masked(weight[1] + blocks, mask, 0).to(tl.int32)
    absmax = load_masked(weight[2] + blocks // NESTED_BLOCK_SIZE, mask, 0.0)
    return tl.load(weight[5] + codes) * absmax + tl.load(weight[3])


@triton.jit
def look_up(table: Any, codes: Any) -> Any:
    """``table[codes]`` for a two-dimensional tensor of codes."""
    count: tl.constexpr = codes.shape[0] * codes.shape[1]
    return tl.reshape(tl.gather(table, tl.reshape(codes, (count,)), 0), codes.shape)


@triton.jit
def load_table(weight: Any, FORMAT: tl.constexpr) -> Any:
    """The codebook as a tensor that stays with the program: 16 or 256 float32 values."""
    if FORMAT == FOUR_BIT:
        return tl.load(weight[4] + tl.arange(0, 16))
    if FORMAT == INT8_BLOCKWISE:
        return tl.load(weight[4] + tl.arange(0, 256))
    return 0.0


@triton.jit
def load_tile(
    weight: Any,
    table: Any,
    row_stride: Any,
    rows: Any,
    row_mask: Any,
    first_column: Any,
    column_count: Any,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
) -> Any:
    """[rows, COLUMNS] values from ``first_column`` on; 0 outside of the weight.

    ``rows`` are 64-bit row numbers, ``row_mask`` tells which exist (``None``: all). ``first_column`` is a multiple of
    COLUMNS. ``column_count`` columns exist; without MASK_COLUMNS that is a multiple of COLUMNS.
    """
    columns = tl.arange(0, COLUMNS)
    mask = None
    if row_mask is not None:
        mask = row_mask[:, None]
    if MASK_COLUMNS:
        column_mask = (first_column + columns < column_count)[None, :]
        mask = column_mask if mask is None else mask & column_mask
    if FORMAT == DENSE:
        pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
        return load_masked(pointers + first_column, mask, 0.0)
    if not WHOLE_BLOCKS:
        return _ragged_tile(
            weight, table, rows, mask, first_column + columns, column_count, FORMAT, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
    if FORMAT == FOUR_BIT:
        values = _four_bit_values(weight, table, row_stride, rows, row_mask, first_column, column_count, COLUMNS, MASK_COLUMNS)
    else:
        pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
        codes = load_masked(pointers + first_column, mask, 0)
        if FORMAT == INT8:
            scale = load_masked(weight[1] + rows, row_mask, 0.0)
            return codes.to(tl.float32) * scale[:, None] * ONE_OVER_127
        values = look_up(table, codes.to(tl.int32))
    return _scaled(weight, values, rows, row_mask, first_column, column_count, COLUMNS, MASK_COLUMNS, BLOCK_SIZE, NESTED_BLOCK_SIZE)


@triton.jit
def _four_bit_values(
    weight: Any,
    table: Any,
    row_stride: Any,
    rows: Any,
    row_mask: Any,
    first_column: Any,
    column_count: Any,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
) -> Any:
    """Values before the scale; each byte is read once and holds two neighbours, the even one in its high half."""
    bytes_ = tl.arange(0, COLUMNS // 2)
    mask = None
    if row_mask is not None:
        mask = row_mask[:, None]
    if MASK_COLUMNS:
        byte_mask = (first_column // 2 + bytes_ < column_count // 2)[None, :]
        mask = byte_mask if mask is None else mask & byte_mask
    # Blocks are whole and at least 32 long: a row is a multiple of 16 bytes, which lets a thread load 16 at once.
    pointers = weight[0] + rows[:, None] * tl.multiple_of(row_stride, 16) + bytes_[None, :]
    packed = load_masked(pointers + tl.multiple_of(first_column // 2, 16), mask, 0).to(tl.int32)
    return tl.reshape(tl.join(look_up(table, packed >> 4), look_up(table, packed & 15)), (packed.shape[0], COLUMNS))


@triton.jit
def _scaled(
    weight: Any,
    values: Any,
    rows: Any,
    row_mask: Any,
    first_column: Any,
    column_count: Any,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
) -> Any:
    """``values`` times the scales of their blocks, every row being a whole number of blocks."""
    first = rows * (column_count // BLOCK_SIZE)
    if BLOCK_SIZE >= COLUMNS:
        scale = load_scales(weight, first + first_column // BLOCK_SIZE, row_mask, NESTED_BLOCK_SIZE)
        return values * scale[:, None]
    groups: tl.constexpr = COLUMNS // BLOCK_SIZE
    numbers = tl.arange(0, groups)
    mask = None
    if row_mask is not None:
        mask = row_mask[:, None]
    if MASK_COLUMNS:
        group_mask = (first_column // BLOCK_SIZE + numbers < column_count // BLOCK_SIZE)[None, :]
        mask = group_mask if mask is None else mask & group_mask
    blocks = first[:, None] + (first_column // BLOCK_SIZE + numbers)[None, :]
    scale = load_scales(weight, blocks, mask, NESTED_BLOCK_SIZE)
    grouped = tl.reshape(values, (values.shape[0], groups, BLOCK_SIZE)) * scale[:, :, None]
    return tl.reshape(grouped, (values.shape[0], COLUMNS))


@triton.jit
def _ragged_tile(
    weight: Any,
    table: Any,
    rows: Any,
    mask: Any,
    columns: Any,
    column_count: Any,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
) -> Any:
    """Blocks that run over the ends of rows: every element finds its own byte and block. Right, not fast."""
    index = rows[:, None] * column_count + columns[None, :]
    if FORMAT == FOUR_BIT:
        packed = load_masked(weight[0] + index // 2, mask, 0).to(tl.int32)
        codes = tl.where(index % 2 == 0, packed >> 4, packed & 15)
    else:
        codes = load_masked(weight[0] + index, mask, 0).to(tl.int32)
    return look_up(table, codes) * load_scales(weight, index // BLOCK_SIZE, mask, NESTED_BLOCK_SIZE)
