"""AdamW on the CPU: prepares addresses and tables for ``csrc/cpu/isa/adamw.inl.h``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.formats import BitMask
from peftkern.ops.adamw import Coefficients, Scale, moment_magnitudes, moment_values

_CELL_SHIFT = 16
"""As in csrc/cpu/kernels.h: a cell is the magnitudes that have their bits above these in common."""


@registry.register("adamw", "cpu", supports=cpu.supports_values)
def adamw(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_`. What is not contiguous is copied, and the parameter back."""
    mean, square = ((moment.data_ptr(), 0, 0, 0, 0, 0, 0, False) for moment in (exp_avg, exp_avg_sq))
    _update(parameter, gradient, mean, square, coefficients, age, scale)


@registry.register("adamw_8bit", "cpu", supports=cpu.supports_values)
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
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_8bit_`. What is not contiguous is copied, and the parameter back."""
    mean = (state1.data_ptr(), absmax1.data_ptr(), *_code_tables(True), True)
    square = (state2.data_ptr(), absmax2.data_ptr(), *_code_tables(False), False)
    _update(parameter, gradient, mean, square, coefficients, age, scale)


def _update(
    parameter: Tensor,
    gradient: Tensor,
    mean: tuple[Any, ...],
    square: tuple[Any, ...],
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    if parameter.numel() == 0:
        return
    values = parameter.resolve_neg().contiguous()
    gradient = gradient.resolve_neg().contiguous()
    factors, alive = _scale_tuple(parameter, scale)
    cpu.native.adamw(
        cpu.chosen_isa(),
        cpu.values_tuple(values),
        cpu.values_tuple(gradient),
        values.numel(),
        mean,
        square,
        _numbers(coefficients),
        _ages_tuple(coefficients, age),
        factors,
        torch.get_num_threads(),
    )
    del alive
    if values.data_ptr() != parameter.data_ptr():
        parameter.copy_(values)


def _numbers(c: Coefficients) -> tuple[float, ...]:
    moments = (c.mean_weight, c.square_decay, c.square_weight)
    return (c.lr, *moments, c.eps, c.decay, c.mean_correction, c.root_correction)


def _ages_tuple(c: Coefficients, age: Tensor | None) -> tuple[int, int, int]:
    if age is None:
        return 0, 0, 0
    assert c.corrections is not None
    return age.data_ptr(), c.corrections.data_ptr(), c.corrections.shape[0] - 1


def _scale_tuple(parameter: Tensor, scale: Scale) -> tuple[tuple[float, int, int, int], Tensor | None]:
    """The scale for the native call, and the tensor that has to live as long as it."""
    if scale is None:
        return (1.0, 0, 0, 0), None
    if isinstance(scale, BitMask):
        bits = scale.bits.contiguous()
        return (1.0, 0, bits.data_ptr(), scale.shape[1]), bits
    if isinstance(scale, Tensor):
        return (1.0, scale.data_ptr(), 0, parameter.shape[1:].numel()), scale
    return (float(scale), 0, 0, 0), None


# ---- codes of 8-bit moments


@lru_cache(maxsize=2)
def _tables(has_sign: bool) -> tuple[Tensor, Tensor, Tensor, int]:
    """Values of the codes; the bounds and infinity; the number of bounds below each cell; the number of cell 0.

    Cell 0 also holds all magnitudes below its own, and the last one, of 1, all above.
    """
    device = torch.device("cpu")
    bounds = moment_magnitudes(has_sign, device)[1]
    cell_of = bounds.view(torch.int32) >> _CELL_SHIFT
    first, last = int(cell_of[1]) - 1, int(torch.ones(1).view(torch.int32)) >> _CELL_SHIFT
    lowest = (torch.arange(first, last + 1, dtype=torch.int32) << _CELL_SHIFT).view(torch.float32)
    lowest[0] = 0.0
    below = torch.bucketize(lowest, bounds)
    assert int(below.diff().max()) <= 1 and int(below[-1]) == bounds.numel()
    ended = torch.cat((bounds, torch.tensor([torch.inf])))
    return moment_values(has_sign, device), ended, below.to(torch.uint8), first


def _code_tables(has_sign: bool) -> tuple[int, int, int, int, int]:
    values, bounds, cells, first = _tables(has_sign)
    return values.data_ptr(), bounds.data_ptr(), cells.data_ptr(), first, cells.numel() - 1
