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
def look_up(table, codes):
    """``table[codes]`` for a two-dimensional tensor of codes."""
    COUNT: tl.constexpr = codes.shape[0] * codes.shape[1]
    return tl.reshape(tl.gather(table, tl.reshape(codes, (COUNT,)), 0), codes.shape)


@triton.jit
def load_table(weight, FORMAT: tl.constexpr):
    """The codebook as a tensor that stays with the program: 16 or 256 values, or 0 where there is none."""
    table = 0.0
    if FORMAT == FOUR_BIT:
        table = tl.load(weight[4] + tl.arange(0, 16))
    elif FORMAT == INT8_BLOCKWISE:
        table = tl.load(weight[4] + tl.arange(0, 256))
    return table


@triton.jit
def load_tables(weight, FORMAT: tl.constexpr, NESTED_BLOCK_SIZE: tl.constexpr):
    """The codebooks of codes and of scales."""
    scale_table = 0.0
    if NESTED_BLOCK_SIZE > 0:
        scale_table = tl.load(weight[5] + tl.arange(0, 256))
    return load_table(weight, FORMAT), scale_table


@triton.jit
def load_scales(weight, blocks, mask, NESTED_BLOCK_SIZE: tl.constexpr, table=None):
    """float32 scales of ``blocks``, a tensor of block numbers.

    Their codebook is read where it lies, or in a product's loop out of ``table``: Triton arranges the operands of a
    product for numbers of 8 bits if it can follow them back to a load of such, and a look-up hides the load.
    """
    scales = load_masked(weight[1] + blocks, mask, 0)
    if NESTED_BLOCK_SIZE > 0:
        absmax = load_masked(weight[2] + blocks // NESTED_BLOCK_SIZE, mask, 0.0)
        codes = scales.to(tl.int32)
        values = tl.load(weight[5] + codes) if table is None else look_up(table, codes)
        scales = values * absmax + tl.load(weight[3])
    return scales


@triton.jit
def load_tile(
    weight,
    tables,
    row_stride,
    rows,
    first_column,
    column_count,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """[rows, COLUMNS] values from ``first_column`` on, rounded once to DTYPE; 0 beyond ``column_count``.

    ``rows`` are 64-bit numbers of rows that exist: callers clamp them, and never use what a repeated row gives.
    ``first_column`` is a multiple of COLUMNS. Without MASK_COLUMNS, so is ``column_count``.
    """
    columns = tl.arange(0, COLUMNS)
    mask = None
    if MASK_COLUMNS:
        mask = (first_column + columns < column_count)[None, :]
    if FORMAT == DENSE:
        pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
        values = load_masked(pointers + first_column, mask, 0.0).to(DTYPE)
    elif FORMAT == INT8:
        pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
        codes = load_masked(pointers + first_column, mask, 0)
        values = (codes.to(tl.float32) * tl.load(weight[1] + rows)[:, None] * ONE_OVER_127).to(DTYPE)
    elif not WHOLE_BLOCKS:
        columns += first_column
        values = _ragged_tile(weight, tables, rows, mask, columns, column_count, FORMAT, BLOCK_SIZE, NESTED_BLOCK_SIZE)
        values = values.to(DTYPE)
    else:
        GROUPS: tl.constexpr = max(COLUMNS // BLOCK_SIZE, 1)
        scale = _tile_scales(
            weight, tables, rows, first_column, column_count, GROUPS, MASK_COLUMNS, BLOCK_SIZE, NESTED_BLOCK_SIZE
        )
        if FORMAT == FOUR_BIT:
            packed = _load_pairs(weight, row_stride, rows, first_column, column_count, COLUMNS, MASK_COLUMNS)
            # Scaled and rounded before they are joined: half as many instructions on sm_80 as the other way round.
            even = _scaled(look_up(tables[0], packed >> 4), scale, GROUPS).to(DTYPE)
            odd = _scaled(look_up(tables[0], packed & 15), scale, GROUPS).to(DTYPE)
            values = tl.reshape(tl.join(even, odd), (packed.shape[0], COLUMNS))
        else:
            pointers = weight[0] + rows[:, None] * row_stride + columns[None, :]
            codes = load_masked(pointers + first_column, mask, 0).to(tl.int32)
            values = _scaled(look_up(tables[0], codes), scale, GROUPS).to(DTYPE)
    return values


@triton.jit
def _load_pairs(
    weight, row_stride, rows, first_column, column_count, COLUMNS: tl.constexpr, MASK_COLUMNS: tl.constexpr
):
    """Bytes of two 4-bit codes. A byte is read once and holds two neighbours, the even one in its high half."""
    numbers = tl.arange(0, COLUMNS // 2)
    mask = None
    if MASK_COLUMNS:
        mask = (first_column // 2 + numbers < column_count // 2)[None, :]
    # Blocks are whole and at least 32 long: a row is a multiple of 16 bytes, which lets a thread load 16 at once.
    pointers = weight[0] + rows[:, None] * tl.multiple_of(row_stride, 16) + numbers[None, :]
    return load_masked(pointers + tl.multiple_of(first_column // 2, 16), mask, 0).to(tl.int32)


@triton.jit
def _tile_scales(
    weight,
    tables,
    rows,
    first_column,
    column_count,
    GROUPS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
):
    """[rows, GROUPS] scales of a tile whose rows are whole blocks, or lie within one (GROUPS = 1)."""
    first_block = rows * (column_count // BLOCK_SIZE)
    numbers = first_column // BLOCK_SIZE + tl.arange(0, GROUPS)
    mask = None
    if MASK_COLUMNS:
        mask = (numbers < column_count // BLOCK_SIZE)[None, :]
    return load_scales(weight, first_block[:, None] + numbers[None, :], mask, NESTED_BLOCK_SIZE, tables[1])


@triton.jit
def _scaled(values, scale, GROUPS: tl.constexpr):
    """``values`` times the scale of their group of neighbours."""
    if GROUPS == 1:
        scaled = values * scale
    else:
        WIDTH: tl.constexpr = values.shape[1] // GROUPS
        grouped = tl.reshape(values, (values.shape[0], GROUPS, WIDTH)) * scale[:, :, None]
        scaled = tl.reshape(grouped, values.shape)
    return scaled


@triton.jit
def _ragged_tile(
    weight,
    tables,
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
    return look_up(tables[0], codes) * load_scales(weight, index // BLOCK_SIZE, mask, NESTED_BLOCK_SIZE, tables[1])
