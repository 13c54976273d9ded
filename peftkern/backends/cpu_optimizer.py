"""AdamW on the CPU: prepares addresses and tables for ``csrc/cpu/isa/adamw.inl.h``."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.formats import BitMask
from peftkern.formats.quantized_tensor import block_count
from peftkern.ops.adamw import MOMENT_BLOCK_SIZE, Coefficients, Scale, moment_magnitudes, moment_values

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
    _update(parameter, gradient, _float_moments(exp_avg, exp_avg_sq), coefficients, age, scale)


@registry.register("adamw_probe", "cpu", supports=cpu.supports_values)
def adamw_probe(
    parameter: Tensor,
    gradient: Tensor,
    exp_avg: Tensor | None,
    exp_avg_sq: Tensor | None,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
) -> None:
    """See :func:`peftkern.ops.adamw.adamw_probe_`. What is not contiguous is copied, and copied back."""
    _update(parameter, gradient, _float_moments(exp_avg, exp_avg_sq), coefficients, age, scale, probe=True)


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
    _update(parameter, gradient, _code_moments(state1, state2, absmax1, absmax2), coefficients, age, scale)


@registry.register("adamw_8bit_probe", "cpu", supports=cpu.supports_values)
def adamw_8bit_probe(
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
    """See :func:`peftkern.ops.adamw.adamw_8bit_probe_`. What is not contiguous is copied, and copied back."""
    _update(parameter, gradient, _code_moments(state1, state2, absmax1, absmax2), coefficients, age, scale, probe=True)


Moments = tuple[tuple[Any, ...], tuple[Any, ...]]
"""Both moments for the native call."""


def _float_moments(exp_avg: Tensor | None, exp_avg_sq: Tensor | None) -> Moments:
    addresses = (0 if moment is None else moment.data_ptr() for moment in (exp_avg, exp_avg_sq))
    mean, square = ((address, 0, 0, 0, 0, 0, 0, False) for address in addresses)
    return mean, square


def _code_moments(state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor) -> Moments:
    mean = (state1.data_ptr(), absmax1.data_ptr(), *_code_tables(True), True)
    return mean, (state2.data_ptr(), absmax2.data_ptr(), *_code_tables(False), False)


def _update(
    parameter: Tensor,
    gradient: Tensor,
    moments: Moments,
    coefficients: Coefficients,
    age: Tensor | None,
    scale: Scale,
    probe: bool = False,
) -> None:
    if parameter.numel() == 0:
        return
    values, incoming = (tensor.resolve_neg().contiguous() for tensor in (parameter, gradient))
    factors, alive = _scale_tuple(parameter, scale)
    cpu.native.adamw(
        cpu.chosen_isa(),
        cpu.values_tuple(values),
        cpu.values_tuple(incoming),
        values.numel(),
        *moments,
        _numbers(coefficients),
        _ages_tuple(coefficients, age),
        factors,
        probe,
        torch.get_num_threads(),
    )
    del alive
    _copy_back(parameter, values)
    if probe:
        _copy_back(gradient, incoming)


def _copy_back(tensor: Tensor, values: Tensor) -> None:
    if values.data_ptr() != tensor.data_ptr():
        tensor.copy_(values)


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


def _supports_codes(codes: Tensor, *_rest: Any) -> str | None:
    if cpu.native is None:
        return cpu.unavailable_reason()
    return None if codes.device.type == "cpu" else f"tensors are on {codes.device}"


@registry.register("encode_moment", "cpu", supports=cpu.supports_values)
def encode_moment(moment: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """See :func:`peftkern.ops.adamw.encode_moment`."""
    values = moment.resolve_neg().contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    absmax = torch.empty(block_count(values.numel(), MOMENT_BLOCK_SIZE), dtype=torch.float32)
    _convert(cpu.native.encode_moment, codes, absmax, signed, values)
    return codes, absmax


@registry.register("decode_moment", "cpu", supports=_supports_codes)
def decode_moment(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """See :func:`peftkern.ops.adamw.decode_moment`."""
    values = torch.empty(codes.shape, dtype=torch.float32)
    _convert(cpu.native.decode_moment, codes.contiguous(), absmax.contiguous(), signed, values)
    return values


def _convert(run: Any, codes: Tensor, absmax: Tensor, signed: bool, values: Tensor) -> None:
    if values.numel() > 0:
        moment = (codes.data_ptr(), absmax.data_ptr(), *_code_tables(signed), signed)
        run(cpu.chosen_isa(), moment, values.data_ptr(), values.numel(), torch.get_num_threads())


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
