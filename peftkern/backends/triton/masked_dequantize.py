"""A weight under a bit mask on a GPU: one launch decodes it and puts zeros where the mask has none.

    out[i, j] = value(W)[i, j] if the mask keeps (i, j) else 0

``W`` is dense or quantized; the values are those of :mod:`peftkern.ops.dequantize`, bit for bit. A dense ``W`` may also
be ``out``: a matrix is masked where it lies, which is what the gradient of a masked weight needs.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.decode import load_masked, load_tables, load_tile
from peftkern.backends.triton.integers import cdiv, next_power_of_two
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.weights import weight_arguments
from peftkern.formats.bit_mask import BitMask
from peftkern.ops.lora_linear import Weight

_ELEMENTS = 4096
_COLUMNS = 1024
_LEAST_COLUMNS = 32
_NUM_WARPS = 4
"""Of a program: a thread reads 16 bytes of 4-bit codes, and at most one byte of bits for 8 of its values."""


@triton.jit
def masked_dequantize_kernel(
    weight,
    bits,
    out,
    row_stride,
    out_row_stride,
    row_count,
    column_count,
    mask_bytes,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASK_COLUMNS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NESTED_BLOCK_SIZE: tl.constexpr,
    WHOLE_BLOCKS: tl.constexpr,
):
    """A program writes one tile [ROWS, COLUMNS]. ``mask_bytes``: of one row of ``bits``."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < row_count
    rows = tl.minimum(rows, row_count - 1)
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    columns = tl.arange(0, COLUMNS)

    pointers = (weight[0][0], weight[1][0], weight[2][0], weight[3][0], weight[4], weight[5])
    values = load_tile(
        pointers,
        load_tables(pointers, FORMAT, NESTED_BLOCK_SIZE),
        row_stride,
        rows,
        first_column,
        column_count,
        out.dtype.element_ty,
        COLUMNS,
        MASK_COLUMNS,
        FORMAT,
        BLOCK_SIZE,
        NESTED_BLOCK_SIZE,
        WHOLE_BLOCKS,
    )
    kept = _load_bits(bits, rows, first_column, mask_bytes, COLUMNS, MASK_COLUMNS)
    store_mask = present[:, None]
    if MASK_COLUMNS:
        store_mask = store_mask & (first_column + columns < column_count)[None, :]
    results = tl.where(kept, values, tl.zeros_like(values))
    tl.store(out + rows[:, None] * out_row_stride + first_column + columns[None, :], results, mask=store_mask)


@triton.jit
def _load_bits(bits, rows, first_column, mask_bytes, COLUMNS: tl.constexpr, MASK_COLUMNS: tl.constexpr):
    """[rows, COLUMNS] whether an entry is kept: eight neighbours to a byte, the first in its lowest bit."""
    numbers = first_column // 8 + tl.arange(0, COLUMNS // 8)
    mask = None
    if MASK_COLUMNS:
        mask = (numbers < mask_bytes)[None, :]
    loaded = load_masked(bits + rows[:, None] * mask_bytes + numbers[None, :], mask, 0).to(tl.int32)
    places = tl.arange(0, 8)
    return tl.reshape((loaded[:, :, None] >> places[None, None, :]) & 1, (rows.shape[0], COLUMNS)) != 0


def masked_dequantize(weight: Weight, mask: BitMask, out: Tensor) -> None:
    """Write the values that ``mask`` keeps, and zeros, to ``out``.

    Args:
        weight: [out, in] float32, bfloat16 or float16, or quantized; may be ``out``.
        mask: of that shape, on the same device.
        out: [out, in] float32, bfloat16 or float16 with columns next to each other; overwritten.
    """
    row_count, column_count = out.shape
    if out.numel() == 0:
        return
    arguments = weight_arguments([weight])
    bits = mask.bits.contiguous()
    columns = min(max(next_power_of_two(column_count), _LEAST_COLUMNS), _COLUMNS)
    rows = _ELEMENTS // columns
    launch(
        masked_dequantize_kernel,
        (cdiv(row_count, rows), cdiv(column_count, columns)),
        arguments.pointers,
        bits,
        out,
        arguments.row_strides[0],
        out.stride(0),
        row_count,
        column_count,
        bits.shape[1],
        traffic=lambda: Traffic([*arguments.tensors, bits], [out], flops=out.numel()),
        num_warps=_NUM_WARPS,
        num_stages=1,
        ROWS=rows,
        COLUMNS=columns,
        MASK_COLUMNS=column_count % columns != 0,
        **arguments.kind.constants(),
    )
