"""Quantization on a GPU: one launch reads a tensor and writes its codes and scales.

Codes and scales are those of :mod:`peftkern.ops.quantize`, bit for bit: quotients are rounded to nearest, and no
product is contracted with a sum.

Double quantization cannot end in the same launch: the scales are centred on their mean, which nobody knows before the
last block has been read. That mean is PyTorch's, taken between two launches, and not a sum of our own: its last bit
decides codes, and all backends, as well as bitsandbytes, share PyTorch's order of summation. The second launch reads
nothing but the scales, 4 bytes per block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.decode import load_masked
from peftkern.backends.triton.integers import cdiv, next_power_of_two
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.formats import QuantizedTensor
from peftkern.formats.quantized_tensor import FOUR_BIT_FORMATS, block_count
from peftkern.ops.quantize import (
    DYNAMIC_GRID_STEPS,
    SMALLEST_DIVISOR,
    assemble,
    dynamic_grid,
    four_bit_bounds,
    quantize_scales,
)

ELEMENTS = 4096
ROW_ELEMENTS = 2048
NUM_WARPS = 4
"""Of a program, for formats with blocks and for int8: a thread writes 16 bytes of codes, and the longest block fits."""

_SMALLEST_DIVISOR: tl.constexpr = tl.constexpr(SMALLEST_DIVISOR)
_LAST_STEP: tl.constexpr = tl.constexpr(DYNAMIC_GRID_STEPS - 1)
_INFINITY: tl.constexpr = tl.constexpr(float("inf"))
# Added to a float32 of up to 22 bits, it leaves no room for a fraction: the sum is rounded to an integer, half to even,
# and the low bits of its pattern are that integer.
_TO_INTEGER: tl.constexpr = tl.constexpr(1.5 * 2**23)


@triton.jit
def magnitude_bits(values):
    """The bit patterns of magnitudes: they compare like the numbers, and a NaN is the greatest."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def load_blocks(pointer, remaining, ELEMENTS: tl.constexpr, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """ELEMENTS values as float32 [blocks, BLOCK_SIZE], 0 where none remain, and the absmax of each block."""
    elements = tl.arange(0, ELEMENTS)
    values = load_masked(pointer + elements, elements < remaining if MASKED else None, 0.0).to(tl.float32)
    blocks = tl.reshape(values, (ELEMENTS // BLOCK_SIZE, BLOCK_SIZE))
    return blocks, tl.max(magnitude_bits(blocks), axis=1).to(tl.float32, bitcast=True)


@triton.jit
def quantize_4bit_kernel(
    values,
    packed,
    scales,
    bounds,
    codes_of_intervals,
    element_count,
    byte_count,
    ELEMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    SHORT_BLOCK: tl.constexpr,
):
    """A program quantizes ELEMENTS neighbours, a whole number of blocks.

    SHORT_BLOCK: the last block of all is not full, and is divided where others are multiplied by the reciprocal.
    """
    first_element = tl.program_id(0).to(tl.int64) * ELEMENTS
    remaining = element_count - first_element
    blocks, absmax = load_blocks(values + first_element, remaining, ELEMENTS, BLOCK_SIZE, MASKED)

    least = tl.full(absmax.shape, _SMALLEST_DIVISOR, tl.float32)  # a constant this small is float64 to Triton 3.6
    divisor = tl.maximum(absmax, least, propagate_nan=tl.PropagateNan.ALL)
    scaled = blocks * tl.div_rn(1.0, divisor)[:, None]
    block_ends = (tl.arange(0, ELEMENTS // BLOCK_SIZE) + 1) * BLOCK_SIZE
    if SHORT_BLOCK:  # noqa: SIM102 - Triton leaves out what a constant rules out
        if remaining < ELEMENTS:
            is_short = block_ends > remaining
            scaled = tl.where(is_short[:, None], tl.div_rn(blocks, divisor[:, None]), scaled)
            absmax = tl.where(is_short, divisor, absmax)
    store_scales(scales, first_element, absmax, remaining, BLOCK_SIZE, MASKED)

    codes = find_codes(tl.reshape(scaled, (ELEMENTS,)), bounds, codes_of_intervals)
    high, low = tl.split(tl.reshape(codes, (ELEMENTS // 2, 2)))
    first_byte = first_element // 2
    code_bytes = tl.arange(0, ELEMENTS // 2)
    mask = code_bytes < byte_count - first_byte if MASKED else None
    tl.store(packed + first_byte + code_bytes, (high << 4 | low).to(tl.uint8), mask=mask)


@triton.jit
def store_scales(scales, first_element, absmax, remaining, BLOCK_SIZE: tl.constexpr, MASKED: tl.constexpr):
    """One scale for each block that begins before the end."""
    blocks = tl.arange(0, absmax.shape[0])
    mask = blocks * BLOCK_SIZE < remaining if MASKED else None
    tl.store(scales + first_element // BLOCK_SIZE + blocks, absmax, mask=mask)


@triton.jit
def find_codes(scaled, bounds, codes_of_intervals):
    """4-bit codes of [n] values, by halves: a value on a bound belongs to the interval below it."""
    numbers = tl.arange(0, 16)
    bounds_table = tl.load(bounds + numbers, mask=numbers < 15, other=0.0)
    codes_table = tl.load(codes_of_intervals + numbers).to(tl.int32)
    interval = tl.zeros(scaled.shape, tl.int32)
    for halving in tl.static_range(4):
        step = 8 >> halving
        interval += tl.where(scaled > tl.gather(bounds_table, interval + (step - 1), 0), step, 0)
    return tl.gather(codes_table, interval, 0)


@triton.jit
def quantize_8bit_kernel(
    values,
    packed,
    scales,
    grid,
    element_count,
    ELEMENTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A program quantizes ELEMENTS neighbours, a whole number of blocks, to codes of the dynamic codebook."""
    first_element = tl.program_id(0).to(tl.int64) * ELEMENTS
    remaining = element_count - first_element
    blocks, absmax = load_blocks(values + first_element, remaining, ELEMENTS, BLOCK_SIZE, MASKED)
    store_scales(scales, first_element, absmax, remaining, BLOCK_SIZE, MASKED)

    scaled = tl.reshape(blocks * tl.div_rn(1.0, absmax)[:, None], (ELEMENTS,))
    # 0 * (1 / 0) and 0 * (1 / denormal) are NaN, of which clamp makes anything; they stand for code 0, the lowest.
    scaled = tl.where(scaled == scaled, tl.clamp(scaled, -1.0, 1.0), -1.0)
    points = ((scaled + 1.0) * 0.5 * _LAST_STEP + 0.5).to(tl.int32)
    elements = tl.arange(0, ELEMENTS)
    mask = elements < remaining if MASKED else None
    tl.store(packed + first_element + elements, tl.load(grid + points), mask=mask)


@triton.jit
def quantize_rows_kernel(
    values,
    packed,
    scales,
    row_count,
    column_count,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A program quantizes ROWS rows to int8, COLUMNS columns at a time, in two turns: absmax, then codes."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, COLUMNS)
    offsets = rows[:, None] * column_count + columns[None, :]
    row_mask = rows < row_count

    greatest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for begin in range(0, column_count, COLUMNS):
        mask = row_mask[:, None] & (columns < column_count - begin)[None, :]
        tile = tl.load(values + begin + offsets, mask=mask, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, magnitude_bits(tile))
    absmax = tl.max(greatest, axis=1).to(tl.float32, bitcast=True)
    tl.store(scales + rows, absmax, mask=row_mask)

    factor = tl.div_rn(1.0, absmax) * 127.0
    # Rows so small that 127 / absmax overflows become all zero.
    factor = tl.where(factor == _INFINITY, 0.0, factor)
    for begin in range(0, column_count, COLUMNS):
        mask = row_mask[:, None] & (columns < column_count - begin)[None, :]
        tile = tl.load(values + begin + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = (tile * factor[:, None] + _TO_INTEGER).to(tl.int32, bitcast=True)
        tl.store(packed + begin + offsets, rounded.to(tl.int8), mask=mask)


def quantize(w: Tensor, format: str = "nf4", block_size: int = 64, double_quant: bool = False) -> QuantizedTensor:
    """See :func:`peftkern.ops.quantize.quantize`. A tensor that is not contiguous is copied first."""
    values = w.detach().contiguous()
    if format == "int8":
        packed, scales = _quantize_rows(values)
        block_size = w.shape[1]
    elif format in FOUR_BIT_FORMATS:
        packed, scales = _quantize_4bit(values, format, block_size)
    else:
        packed, scales = _quantize_8bit(values, block_size)
    nested = None
    if double_quant:
        scales, nested = quantize_scales(scales, _quantize_8bit)
    return assemble(w, format, block_size, packed, scales, nested)


def _new(values: Tensor, codes: int, code_dtype: torch.dtype, scales: int) -> tuple[Tensor, Tensor]:
    return values.new_empty(codes, dtype=code_dtype), values.new_empty(scales, dtype=torch.float32)


def _quantize_4bit(values: Tensor, format: str, block_size: int) -> tuple[Tensor, Tensor]:
    count = values.numel()
    packed, scales = _new(values, block_count(count, 2), torch.uint8, block_count(count, block_size))
    if count == 0:
        return packed, scales
    launch(
        quantize_4bit_kernel,
        (cdiv(count, ELEMENTS),),
        values,
        packed,
        scales,
        *four_bit_bounds(format, values.device),
        count,
        packed.numel(),
        traffic=lambda: Traffic([values], [packed, scales]),
        num_warps=NUM_WARPS,
        num_stages=1,
        ELEMENTS=ELEMENTS,
        BLOCK_SIZE=block_size,
        MASKED=count % ELEMENTS != 0,
        SHORT_BLOCK=count % block_size != 0,
    )
    return packed, scales


def _quantize_8bit(values: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = values.numel()
    packed, scales = _new(values, count, torch.uint8, block_count(count, block_size))
    if count == 0:
        return packed, scales
    launch(
        quantize_8bit_kernel,
        (cdiv(count, ELEMENTS),),
        values,
        packed,
        scales,
        dynamic_grid(values.device),
        count,
        traffic=lambda: Traffic([values], [packed, scales]),
        num_warps=NUM_WARPS,
        num_stages=1,
        ELEMENTS=ELEMENTS,
        BLOCK_SIZE=block_size,
        MASKED=count % ELEMENTS != 0,
    )
    return packed, scales


def _quantize_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = values.shape
    packed, scales = _new(values, rows * columns, torch.int8, rows)
    if rows == 0:
        return packed, scales
    tile_columns = min(next_power_of_two(columns), ROW_ELEMENTS)
    tile_rows = ROW_ELEMENTS // tile_columns
    launch(
        quantize_rows_kernel,
        (cdiv(rows, tile_rows),),
        values,
        packed,
        scales,
        rows,
        columns,
        traffic=lambda: Traffic([values], [packed, scales]),
        num_warps=NUM_WARPS,
        num_stages=1,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
    )
    return packed, scales
