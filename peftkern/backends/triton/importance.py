"""Sums over batches on a GPU; terms and shapes are in :mod:`peftkern.ops.importance`.

Sums over entries are in float64: a tile is summed column by column, then across, and rows longer than
``_PART_COLUMNS`` in parts whose sums a second launch adds up. The order depends on shapes alone; there are no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.integers import cdiv, next_power_of_two
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.ops.importance import KINDS

_ELEMENTS = 1024
_PART_COLUMNS = 16 * _ELEMENTS
_NUM_WARPS = 4

_SUM, _SQUARE, _PRODUCT, _DIFFERENCE = range(len(KINDS) + 1)
_NUMBERS = {"sum": _SUM, "square": _SQUARE, "product": _PRODUCT, "difference": _DIFFERENCE}
SQUARE: tl.constexpr = tl.constexpr(_SQUARE)
PRODUCT: tl.constexpr = tl.constexpr(_PRODUCT)
DIFFERENCE: tl.constexpr = tl.constexpr(_DIFFERENCE)
"""Values of the kernels' ``KIND``; the fourth one is for sums. A difference is a product with ``other - saved``."""


@triton.jit
def load_terms(gradient, other, saved, offsets, mask, KIND: tl.constexpr):
    """Entries as they are, or products rounded to float32; 0 outside of ``mask``."""
    value = tl.load(gradient + offsets, mask=mask, other=0.0)
    if KIND == SQUARE:
        value = value.to(tl.float32) * value.to(tl.float32)
    elif KIND == PRODUCT:
        value = value.to(tl.float32) * tl.load(other + offsets, mask=mask, other=0.0).to(tl.float32)
    elif KIND == DIFFERENCE:
        now = tl.load(other + offsets, mask=mask, other=0.0).to(tl.float32)
        before = tl.load(saved + offsets, mask=mask, other=0.0).to(tl.float32)
        value = value.to(tl.float32) * (now - before)
    return value


@triton.jit
def accumulate_importance_kernel(total, gradient, other, element_count, KIND: tl.constexpr, ELEMENTS: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * ELEMENTS + tl.arange(0, ELEMENTS)
    present = elements < element_count
    before = tl.load(total + elements, mask=present, other=0.0)
    terms = load_terms(gradient, other, other, elements, present, KIND).to(tl.float32)
    tl.store(total + elements, before + terms, mask=present)


@triton.jit
def sum_terms_kernel(
    gradient,
    other,
    saved,
    sums,
    row_count,
    column_count,
    part_count,
    KIND: tl.constexpr,
    ADD: tl.constexpr,
    PART_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sums over one part of the columns of ROWS rows, to ``sums`` [rows, parts], or with ADD onto it."""
    part = tl.program_id(0) % part_count
    rows = (tl.program_id(0) // part_count).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    present = rows < row_count
    begin = part.to(tl.int64) * PART_COLUMNS
    end = tl.minimum(begin + PART_COLUMNS, column_count)
    total = tl.zeros((ROWS, COLUMNS), tl.float64)
    for first in range(begin, end, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        mask = present[:, None] & (columns < end)[None, :]
        offsets = rows[:, None] * column_count + columns[None, :]
        total += load_terms(gradient, other, saved, offsets, mask, KIND).to(tl.float64)
    result = tl.sum(total, axis=1)
    pointers = sums + rows * part_count + part
    if ADD:
        result += tl.load(pointers, mask=present, other=0.0).to(tl.float64)
    tl.store(pointers, result.to(sums.dtype.element_ty), mask=present)


def accumulate_importance(total: Tensor, gradient: Tensor, kind: str, other: Tensor | None) -> None:
    """See :func:`peftkern.ops.importance.accumulate_importance_reference`. Operands not contiguous are copied first."""
    if gradient.numel() == 0:
        return
    gradient, other = gradient.contiguous(), None if other is None else other.contiguous()
    if total.shape != gradient.shape:
        _sum_rows(gradient, other, kind, total, add=True)
        return
    launch(
        accumulate_importance_kernel,
        (cdiv(total.numel(), _ELEMENTS),),
        total,
        gradient,
        gradient if other is None else other,
        total.numel(),
        traffic=lambda: Traffic((total, gradient, other), (total,), flops=(1 if kind == "sum" else 2) * total.numel()),
        num_warps=_NUM_WARPS,
        num_stages=1,
        KIND=_NUMBERS[kind],
        ELEMENTS=_ELEMENTS,
    )


def importance_dot(gradient: Tensor, delta: Tensor) -> Tensor:
    """See :func:`peftkern.ops.importance.importance_dot_reference`. Operands not contiguous are copied first."""
    return _sum_all("product", gradient, delta, None)


def probe_dot(gradient: Tensor, weight: Tensor, saved: Tensor) -> Tensor:
    """See :func:`peftkern.ops.importance.probe_dot_reference`. Operands not contiguous are copied first."""
    return _sum_all("difference", gradient, weight, saved)


def _sum_all(kind: str, gradient: Tensor, other: Tensor, saved: Tensor | None) -> Tensor:
    result = torch.zeros(1, dtype=torch.float32, device=gradient.device)
    if gradient.numel() > 0:
        rows = [None if tensor is None else tensor.reshape(1, -1).contiguous() for tensor in (gradient, other, saved)]
        assert rows[0] is not None
        _sum_rows(rows[0], rows[1], kind, result, add=False, saved=rows[2])
    return result[0]


def _sum_rows(
    gradient: Tensor, other: Tensor | None, kind: str, sums: Tensor, add: bool, saved: Tensor | None = None
) -> None:
    """``sums``, [rows] float32, of all but the first dimension; with ``add`` onto what it holds."""
    rows, columns = gradient.shape[0], gradient.numel() // gradient.shape[0]
    parts = cdiv(columns, _PART_COLUMNS)
    operands = (gradient, other, saved)
    if parts == 1:
        _sum_parts(operands, kind, sums, 1, _PART_COLUMNS, add)
        return
    partial = torch.empty(rows, parts, dtype=torch.float64, device=sums.device)
    _sum_parts(operands, kind, partial, parts, _PART_COLUMNS, False)
    _sum_parts((partial, None, None), "sum", sums, 1, next_power_of_two(parts), add)


def _sum_parts(
    operands: tuple[Tensor, Tensor | None, Tensor | None],
    kind: str,
    sums: Tensor,
    parts: int,
    part_columns: int,
    add: bool,
) -> None:
    gradient = operands[0]
    rows, columns = gradient.shape[0], gradient.numel() // gradient.shape[0]
    tile_columns = min(next_power_of_two(columns), _ELEMENTS)
    tile_rows = _ELEMENTS // tile_columns
    launch(
        sum_terms_kernel,
        (cdiv(rows, tile_rows) * parts,),
        *(gradient if operand is None else operand for operand in operands),
        sums,
        rows,
        columns,
        parts,
        traffic=lambda: Traffic((*operands, sums if add else None), (sums,), flops=2 * gradient.numel()),
        num_warps=_NUM_WARPS,
        num_stages=1,
        KIND=_NUMBERS[kind],
        ADD=add,
        PART_COLUMNS=part_columns,
        ROWS=tile_rows,
        COLUMNS=tile_columns,
    )
