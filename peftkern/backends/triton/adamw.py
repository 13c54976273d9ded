"""AdamW on a GPU: one launch reads a parameter, its gradient and its state, and writes back what is trained.

Formulas, shapes and the order of rounding are in :mod:`peftkern.ops.adamw`; results are its reference's bit for bit.
Quotients and roots are rounded to nearest, and no product is contracted with a sum. An update on trial (PROBE) is the
same, but for what it writes: the parameter, and what that was where the gradient is.

The nearest code of an 8-bit moment is found in two look-ups: the upper 16 bits of a magnitude name a cell in which at
most one bound between codes lies, a table tells how many lie below the cell, and that one bound is compared with.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.backends.triton.quantize import magnitude_bits
from peftkern.formats import BitMask
from peftkern.ops.adamw import MOMENT_BLOCK_SIZE, Coefficients, Scale, moment_magnitudes, moment_values

_ELEMENTS = 1024
_NUM_WARPS = {32: 8, 8: 4}
"""Of a program, by the bits of a moment: a thread has 16 bytes of a float32 moment, a warp one block of 8-bit ones."""

_NUMBER, _ROWS, _BITS = 0, 1, 2
NUMBER: tl.constexpr = tl.constexpr(_NUMBER)
ROWS: tl.constexpr = tl.constexpr(_ROWS)
"""Values of the kernels' ``SCALE``; the third one is for bit masks."""

_LEAST_CELL = (127 - 22) << 7
_LAST_CELL = 127 << 7
"""The upper 16 bits of 2⁻²², below which there is one cell, and those of 1, the greatest magnitude."""
LEAST_CELL: tl.constexpr = tl.constexpr(_LEAST_CELL)
LAST_CELL: tl.constexpr = tl.constexpr(_LAST_CELL)
_WIDE_COLUMNS = 1 << 30
"""Of a row that is counted in 64 bits."""
_FLOPS = 15
"""Of one entry."""


# ---- what both kernels do


@triton.jit
def load_factor(
    number,
    scale,
    first_element,
    present,
    columns,
    row_bytes,
    SCALE: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
):
    """What the update of each element of a program is multiplied by, float32."""
    if SCALE == NUMBER:
        return tl.full(present.shape, number, tl.float32)
    else:  # noqa: RET505 - Triton compiles what follows a return
        # counted from the beginning of a row, elements are divided in 32 bits, without a call and its registers
        counted = first_element % columns + tl.arange(0, present.shape[0])
        if not WIDE_ROWS:
            counted = counted.to(tl.int32)
        row = first_element // columns + counted // columns
        if SCALE == ROWS:
            return tl.load(scale + row, mask=present, other=0.0)
        else:  # noqa: RET505
            column = counted % columns
            bits = tl.load(scale + row * row_bytes + column // 8, mask=present, other=0).to(tl.int32)
            return ((bits >> (column % 8).to(tl.int32)) & 1).to(tl.float32)


@triton.jit
def count_up(age, corrections, elements, trained, last_age, numbers, HAS_AGE: tl.constexpr, PROBE: tl.constexpr):
    """Both corrections of the elements, by their ages where they have such; these are counted up."""
    if HAS_AGE:
        counted = tl.load(age + elements, mask=trained, other=0) + 1
        if not PROBE:
            tl.store(age + elements, counted, mask=trained)
        row = corrections + tl.minimum(counted, last_age) * 2
        mean_correction = tl.load(row, mask=trained, other=1.0)
        root_correction = tl.load(row + 1, mask=trained, other=1.0)
    else:
        mean_correction, root_correction = numbers[6], numbers[7]
    return mean_correction, root_correction


@triton.jit
def new_moments(gradient, mean, square, numbers):
    return mean + (gradient - mean) * numbers[1], square * numbers[2] + gradient * gradient * numbers[3]


@triton.jit
def updated(parameter, mean, square, mean_correction, root_correction, factor, numbers):
    root = tl.sqrt_rn(square) * root_correction + numbers[4]
    step = tl.div_rn(mean * (mean_correction * numbers[0]), root) + parameter * numbers[5]
    return parameter - step * factor


# ---- float32 moments


@triton.jit
def adamw_kernel(
    parameter,
    gradient,
    mean,
    square,
    age,
    corrections,
    scale,
    numbers,
    last_age,
    element_count,
    columns,
    row_bytes,
    HAS_AGE: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PROBE: tl.constexpr,
    HAS_MOMENTS: tl.constexpr,
):
    first_element = tl.program_id(0).to(tl.int64) * ELEMENTS
    elements = first_element + tl.arange(0, ELEMENTS)
    present = elements < element_count
    factor = load_factor(numbers[8], scale, first_element, present, columns, row_bytes, SCALE, WIDE_ROWS)
    # what is frozen is not read either: where whole sectors are, they do not pass
    trained = present & (factor != 0)

    before = tl.load(parameter + elements, mask=present if PROBE else trained, other=0.0)
    incoming = tl.load(gradient + elements, mask=trained, other=0.0).to(tl.float32)
    if HAS_MOMENTS:
        old_mean = tl.load(mean + elements, mask=trained, other=0.0)
        old_square = tl.load(square + elements, mask=trained, other=0.0)
    else:
        old_mean = tl.zeros(present.shape, tl.float32)
        old_square = tl.zeros(present.shape, tl.float32)
    corrected = count_up(age, corrections, elements, trained, last_age, numbers, HAS_AGE, PROBE)
    new_mean, new_square = new_moments(incoming, old_mean, old_square, numbers)
    after = updated(before.to(tl.float32), new_mean, new_square, corrected[0], corrected[1], factor, numbers)

    tl.store(parameter + elements, after.to(parameter.dtype.element_ty), mask=trained)
    if PROBE:
        tl.store(gradient + elements, before, mask=present)
    else:
        tl.store(mean + elements, new_mean, mask=trained)
        tl.store(square + elements, new_square, mask=trained)


# ---- 8-bit moments


@triton.jit
def load_moment(codes, absmax, values, first_element, present, element_count, BLOCK_SIZE: tl.constexpr):
    """The elements' moment, float32; 0 where none is present."""
    ELEMENTS: tl.constexpr = present.shape[0]
    BLOCKS: tl.constexpr = ELEMENTS // BLOCK_SIZE
    loaded = tl.load(codes + first_element + tl.arange(0, ELEMENTS), mask=present, other=0).to(tl.int32)
    blocks = first_element // BLOCK_SIZE + tl.arange(0, BLOCKS)
    scales = tl.load(absmax + blocks, mask=blocks * BLOCK_SIZE < element_count, other=0.0)
    magnitudes = tl.reshape(tl.load(values + loaded, mask=present, other=0.0), (BLOCKS, BLOCK_SIZE))
    return tl.reshape(magnitudes * scales[:, None], (ELEMENTS,))


@triton.jit
def nearest_codes(scaled, cells, bounds, SIGNED: tl.constexpr):
    """Codes of values from -1 to 1, int32: the count of bounds below a magnitude, with the sign. NaN has the last."""
    bits = scaled.to(tl.int32, bitcast=True)
    magnitude = magnitude_bits(scaled)
    cell = tl.minimum(tl.maximum(magnitude >> 16, LEAST_CELL - 1), LAST_CELL)
    code = tl.load(cells + cell - (LEAST_CELL - 1)).to(tl.int32)
    code += (magnitude.to(tl.float32, bitcast=True) > tl.load(bounds + code)).to(tl.int32)
    if SIGNED:
        code = tl.where(bits < 0, 127 - tl.minimum(code, 127), 127 + code)
    return code


@triton.jit
def store_moment(
    codes,
    absmax,
    cells,
    bounds,
    moment,
    first_element,
    present,
    trained_blocks,
    BLOCK_SIZE: tl.constexpr,
    SIGNED: tl.constexpr,
):
    """Quantize the blocks with trained elements anew."""
    ELEMENTS: tl.constexpr = present.shape[0]
    BLOCKS: tl.constexpr = ELEMENTS // BLOCK_SIZE
    by_block = tl.reshape(moment, (BLOCKS, BLOCK_SIZE))
    greatest = tl.max(magnitude_bits(by_block), axis=1).to(tl.float32, bitcast=True)
    tl.store(absmax + first_element // BLOCK_SIZE + tl.arange(0, BLOCKS), greatest, mask=trained_blocks)
    divisor = tl.where(greatest == 0, 1.0, greatest)
    scaled = tl.reshape(tl.div_rn(by_block, divisor[:, None]), (ELEMENTS,))
    found = nearest_codes(scaled, cells, bounds, SIGNED).to(tl.uint8)
    written = tl.reshape(present, (BLOCKS, BLOCK_SIZE)) & trained_blocks[:, None]
    tl.store(codes + first_element + tl.arange(0, ELEMENTS), found, mask=tl.reshape(written, (ELEMENTS,)))


@triton.jit
def adamw_8bit_kernel(
    parameter,
    gradient,
    states,
    absmaxes,
    values,
    cells,
    bounds,
    age,
    corrections,
    scale,
    numbers,
    last_age,
    element_count,
    columns,
    row_bytes,
    HAS_AGE: tl.constexpr,
    SCALE: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    ELEMENTS: tl.constexpr,
    PROBE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    """The entries of tuples are those of the first and of the second moment. A program has whole blocks."""
    first_element = tl.program_id(0).to(tl.int64) * ELEMENTS
    elements = first_element + tl.arange(0, ELEMENTS)
    present = elements < element_count
    factor = load_factor(numbers[8], scale, first_element, present, columns, row_bytes, SCALE, WIDE_ROWS)
    trained = present & (factor != 0)
    by_block = tl.reshape(trained.to(tl.int32), (ELEMENTS // BLOCK_SIZE, BLOCK_SIZE))
    trained_blocks = tl.max(by_block, axis=1) != 0

    before = tl.load(parameter + elements, mask=present if PROBE else trained, other=0.0)
    incoming = tl.load(gradient + elements, mask=trained, other=0.0).to(tl.float32)
    old_mean = load_moment(states[0], absmaxes[0], values[0], first_element, present, element_count, BLOCK_SIZE)
    old_square = load_moment(states[1], absmaxes[1], values[1], first_element, present, element_count, BLOCK_SIZE)
    corrected = count_up(age, corrections, elements, trained, last_age, numbers, HAS_AGE, PROBE)
    new_mean, new_square = new_moments(incoming, old_mean, old_square, numbers)
    after = updated(before.to(tl.float32), new_mean, new_square, corrected[0], corrected[1], factor, numbers)
    tl.store(parameter + elements, after.to(parameter.dtype.element_ty), mask=trained)

    if PROBE:
        tl.store(gradient + elements, before, mask=present)
    else:
        # frozen elements of a trained block are rounded anew with its scale
        new_mean = tl.where(trained, new_mean, old_mean)
        new_square = tl.where(trained, new_square, old_square)
        store_moment(
            states[0],
            absmaxes[0],
            cells[0],
            bounds[0],
            new_mean,
            first_element,
            present,
            trained_blocks,
            BLOCK_SIZE,
            True,
        )
        store_moment(
            states[1],
            absmaxes[1],
            cells[1],
            bounds[1],
            new_square,
            first_element,
            present,
            trained_blocks,
            BLOCK_SIZE,
            False,
        )


# ---- launches


def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
    probe: bool = False,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_reference`, or with ``probe`` `adamw_probe_reference`.

    What is written and not contiguous is copied, and copied back.
    """
    if parameter.numel() == 0:
        return
    values, incoming = parameter.contiguous(), gradient.contiguous()
    common = _Common.of(values, coefficients, age, scale, probe)
    moments = (exp_avg, exp_avg_sq)
    launch(
        adamw_kernel,
        (cdiv(values.numel(), _ELEMENTS),),
        values,
        incoming,
        *(values if moment is None else moment for moment in moments),
        *common.arguments,
        traffic=lambda: common.traffic(values, incoming, moments),
        num_warps=_NUM_WARPS[32],
        num_stages=1,
        HAS_MOMENTS=exp_avg is not None,
        **common.constants,
    )
    _copy_back(parameter, values)
    if probe:
        _copy_back(gradient, incoming)


def adamw_8bit(
    parameter: Tensor,
    gradient: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
    probe: bool = False,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_8bit_reference` and `adamw_8bit_probe_reference`; as :func:`adamw`."""
    if parameter.numel() == 0:
        return
    values, incoming = parameter.contiguous(), gradient.contiguous()
    common = _Common.of(values, coefficients, age, scale, probe)
    mean, square = (_moment_tables(signed, values.device) for signed in (True, False))
    launch(
        adamw_8bit_kernel,
        (cdiv(values.numel(), _ELEMENTS),),
        values,
        incoming,
        (state1, state2),
        (absmax1, absmax2),
        *zip(mean, square, strict=True),
        *common.arguments,
        traffic=lambda: common.traffic(values, incoming, (state1, state2, absmax1, absmax2)),
        num_warps=_NUM_WARPS[8],
        num_stages=1,
        BLOCK_SIZE=MOMENT_BLOCK_SIZE,
        **common.constants,
    )
    _copy_back(parameter, values)
    if probe:
        _copy_back(gradient, incoming)


def _copy_back(tensor: Tensor, values: Tensor) -> None:
    if values is not tensor:
        tensor.copy_(values)


class _Common(NamedTuple):
    """What both kernels take beside the parameter, its gradient and its moments."""

    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    age: Tensor | None
    scale: Tensor | None
    elements: int

    @classmethod
    def of(cls, parameter: Tensor, c: Coefficients, age: Tensor | None, scale: Scale, probe: bool) -> _Common:
        kind, number, scales = _scale_arguments(scale)
        rows = max(parameter.shape[0], 1) if parameter.dim() > 0 else 1
        columns = parameter.numel() // rows
        row_bytes = scales.shape[1] if kind == _BITS and scales is not None else 0
        numbers = (c.lr, c.mean_weight, c.square_decay, c.square_weight, c.eps, c.decay)
        corrections = parameter if c.corrections is None else c.corrections
        arguments = (
            parameter if age is None else age,
            corrections,
            parameter if scales is None else scales,
            (*numbers, c.mean_correction, c.root_correction, number),
            corrections.shape[0] - 1 if age is not None else 0,
            parameter.numel(),
            columns,
            row_bytes,
        )
        wide = columns >= _WIDE_COLUMNS
        constants = {"HAS_AGE": age is not None, "SCALE": kind, "WIDE_ROWS": wide, "ELEMENTS": _ELEMENTS}
        constants["PROBE"] = probe
        return cls(arguments, constants, age, scales, parameter.numel())

    def traffic(self, parameter: Tensor, gradient: Tensor, moments: tuple[Tensor | None, ...]) -> Traffic:
        reads = (parameter, gradient, *moments, self.age, self.scale)
        writes = (parameter, gradient) if self.constants["PROBE"] else (parameter, *moments, self.age)
        return Traffic(reads, writes, flops=_FLOPS * self.elements)


def _scale_arguments(scale: Scale) -> tuple[int, float, Tensor | None]:
    """The kernels' ``SCALE``, the number, and the tensor."""
    if isinstance(scale, BitMask):
        return _BITS, 1.0, scale.bits.contiguous()
    if isinstance(scale, Tensor):
        return _ROWS, 1.0, scale
    return _NUMBER, 1.0 if scale is None else float(scale), None


@lru_cache(maxsize=8)
def _moment_tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The values of codes, [256] float32; the bounds below each cell, uint8; the bounds and infinity, float32."""
    cpu = torch.device("cpu")
    values = moment_values(signed, device)
    bounds = moment_magnitudes(signed, cpu)[1]
    below = torch.bucketize(cell_edges()[:-1], bounds).to(torch.uint8)
    padded = torch.cat([bounds, torch.tensor([float("inf")])])
    return values, below.to(device), padded.to(device)


def cell_edges() -> Tensor:
    """Where cells of magnitudes begin, and where the last one ends: ascending, float32, on the CPU."""
    cells = torch.arange(_LEAST_CELL - 1, _LAST_CELL + 2, dtype=torch.int32)
    edges = (cells << 16).view(torch.float32)
    edges[0] = 0.0
    return edges
