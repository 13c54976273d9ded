"""Device functions that read a tile of a weight, dense or quantized, as numbers.

    value = codebook[code] * scale          NF4, FP4, 8-bit blockwise
    value = code * scale * (1 / 127)        int8 by rows
    scale = dynamic[code] * absmax + offset with double quantization

Products and sums are rounded one by one (kernels are compiled without contraction), so that the float32 values are
those of :mod:`peftkern.ops.dequantize` bit for bit.

The codebook is looked up with ``tl.gather`` out of a tensor that the program keeps: among the exact ways the one with
the fewest instructions on every architecture (``peftkern bench aot-instructions``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from peftkern.backends.triton import weights
from peftkern.ops.dequantize import ONE_OVER_127 as _ONE_OVER_127

DENSE: tl.constexpr = tl.constexpr(weights.DENSE)
FOUR_BIT: tl.constexpr = tl.constexpr(weights.FOUR_BIT)
INT8_BLOCKWISE: tl.constexpr = tl.constexpr(weights.INT8_BLOCKWISE)
INT8: tl.constexpr = tl.constexpr(weights.INT8)
ONE_OVER_127: tl.constexpr = tl.constexpr(_ONE_OVER_127)


@triton.jit
def load_masked(pointers, mask, other):
    """A load whose mask may be ``None``."""
    if mask is None:
        return tl.load(pointers)
    else:  # noqa: RET505 - Triton compiles what follows a return
        return tl.load(pointers, mask=mask, other=other)


@triton.jit
def load_scales(weight, blocks, mask, NESTED_BLOCK_SIZE: tl.constexpr):
    """float32 scales of ``blocks``, a tensor of block numbers."""
    scales = load_masked(weight[1] + blocks, mask, 0)
    if NESTED_BLOCK_SIZE > 0:
        absmax = load_masked(weight[2] + blocks // NESTED_BLOCK_SIZE, mask, 0.0)
        scales = tl.load(weight[5] + scales.to(tl.int32)) * absmax + tl.load(weight[3])
    return scales


@triton.jit
def look_up(table, codes):
    """``table[codes]`` for a two-dimensional tensor of codes."""
    COUNT: tl.constexpr = codes.shape[0] * codes.shape[1]
    return tl.reshape(tl.gather(table, tl.reshape(codes, (COUNT,)), 0), codes.shape)


@triton.jit
def load_table(weight, FORMAT: tl.constexpr):
    """The codebook as a tensor that stays with the program: 16 or 256 float32 values."""
    table = 0.0
    if FORMAT == FOUR_BIT:
        table = tl.load(weight[4] + tl.arange(0, 16))
    elif FORMAT == INT8_BLOCKWISE:
        table = tl.load(weight[4] + tl.arange(0, 256))
    return table


@triton.jit
def load_tile(
    weight,
    table,
    row_stride,
    rows,
    first_column,
    column_count,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """[rows, COLUMNS] values from ``first_column`` on; 0 beyond ``column_count``.

    ``rows`` are 64-bit numbers of rows that exist: callers clamp them, and never use what a repeated row gives.
    ``first_column`` is a multiple of COLUMNS. Without MASK_COLUMNS, so is ``column_count``.
    """
    columns = tl.arange(0, COLUMNS)
    mask = None
    if MASK_COLUMNS:
        mask = (first_column + columns < column_count)[None, :]
    if FORMAT == DENSE:
        pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
        values = load_masked(pointers + first_column, mask, 0.0)
    elif FORMAT == INT8:
        pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
        codes = load_masked(pointers + first_column, mask, 0)
        values = codes.to(tl.float32) * tl.load(weight[1] + rows)[:, None] * ONE_OVER_127
    elif WHOLE_BLOCKS:
        values = _block_values(
            weight, table, row_stride, rows, mask, first_column, column_count, COLUMNS, MASK_COLUMNS, FORMAT
        )
        values = _scaled(
            weight, values, rows, first_column, column_count, COLUMNS, MASK_COLUMNS, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
    else:
        columns += first_column
        values = _ragged_tile(weight, table, rows, mask, columns, column_count, FORMAT, BLOCK_SIZE, NESTED_BLOCK_SIZE)
    return values


@triton.jit
def _block_values(
    weight,
    table,
    row_stride,
    rows,
    mask,
    first_column,
    column_count,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """What the codes stand for, before the scale."""
    if FORMAT == FOUR_BIT:
        values = _pairs(weight, table, row_stride, rows, first_column, column_count, COLUMNS, MASK_COLUMNS)
    else:
        pointers = weight[0] + rows[:, None] * row_stride + tl.arange(0, COLUMNS)[None, :]
        values = look_up(table, load_masked(pointers + first_column, mask, 0).to(tl.int32))
    return values


@triton.jit
def _pairs(
    weight,
    table,
    row_stride,
    rows,
    first_column,
    column_count,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
):
    """4-bit values before the scale. A byte is read once and holds two neighbours, the even one in its high half."""
    numbers = tl.arange(0, COLUMNS // 2)
    mask = None
    if MASK_COLUMNS:
        mask = (first_column // 2 + numbers < column_count // 2)[None, :]
    # Blocks are whole and at least 32 long: a row is a multiple of 16 bytes, which lets a thread load 16 at once.
    pointers = weight[0] + rows[:, None] * tl.multiple_of(row_stride, 16) + numbers[None, :]
    packed = load_masked(pointers + tl.multiple_of(first_column // 2, 16), mask, 0).to(tl.int32)
    return tl.reshape(tl.join(look_up(table, packed >> 4), look_up(table, packed & 15)), (packed.shape[0], COLUMNS))


@triton.jit
def _scaled(
    weight,
    values,
    rows,
    first_column,
    column_count,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    """``values`` times the scales of their blocks, every row being a whole number of blocks."""
    first_block = rows * (column_count // BLOCK_SIZE)
    if BLOCK_SIZE >= COLUMNS:
        scale = load_scales(weight, first_block + first_column // BLOCK_SIZE, None, NESTED_BLOCK_SIZE)
        scaled = values * scale[:, None]
    else:
        GROUPS: tl.constexpr = COLUMNS // BLOCK_SIZE
        numbers = first_column // BLOCK_SIZE + tl.arange(0, GROUPS)
        mask = None
        if MASK_COLUMNS:
            mask = (numbers < column_count // BLOCK_SIZE)[None, :]
        scale = load_scales(weight, first_block[:, None] + numbers[None, :], mask, NESTED_BLOCK_SIZE)
        grouped = tl.reshape(values, (values.shape[0], GROUPS, BLOCK_SIZE)) * scale[:, :, None]
        scaled = tl.reshape(grouped, (values.shape[0], COLUMNS))
    return scaled


@triton.jit
def _ragged_tile(
    weight,
    table,
    rows,
    mask,
    columns,
    column_count,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    """Blocks that run over the ends of rows: every element finds its own byte and block. Right, not fast."""
    index = rows[:, None] * column_count + columns[None, :]
    if FORMAT == FOUR_BIT:
        packed = load_masked(weight[0] + index // 2, mask, 0).to(tl.int32)
        codes = tl.where(index % 2 == 0, packed >> 4, packed & 15)
    else:
        codes = load_masked(weight[0] + index, mask, 0).to(tl.int32)
    return look_up(table, codes) * load_scales(weight, index // BLOCK_SIZE, mask, NESTED_BLOCK_SIZE)
