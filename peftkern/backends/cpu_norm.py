"""Normalisation on the CPU: prepares addresses and strides for ``csrc/cpu/isa/norm.inl.h``."""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.ops.norm import NormForm


@registry.register("norm", "cpu", supports=cpu.supports_values)
def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Forward; see :func:`peftkern.ops.norm.norm_reference` for shapes."""
    rows, features = x.shape
    x, residual = cpu._rows(x), None if residual is None else cpu._rows(residual)
    scale, shift = _floats(weight), _floats(bias)
    y = cpu._new(x, rows, features)
    total = None if residual is None else cpu._new(x, rows, features)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if form.centered else None
    if rows > 0:
        cpu.native.norm(
            cpu.chosen_isa(),
            _rows_tuple(x),
            _rows_tuple(residual),
            cpu._address(scale),
            cpu._address(shift),
            y.data_ptr(),
            cpu._address(total),
            cpu._address(mean),
            rstd.data_ptr(),
            cpu.values_tuple(x)[1],
            rows,
            features,
            form.eps,
            form.weight_offset,
            form.round_before_weight,
            torch.get_num_threads(),
        )
    return y, total, mean, rstd


@registry.register("norm_backward", "cpu", supports=cpu.supports_values)
def norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor,
    form: NormForm,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Backward; see :func:`peftkern.ops.norm.norm_backward_reference`."""
    rows, features = total.shape
    grad, total = cpu._rows(grad), cpu._rows(total)
    grad_total = None if grad_total is None else cpu._rows(grad_total)
    scale = _floats(weight)
    grad_x = cpu._new(total, rows, features) if need_x else None
    grad_weight, grad_bias = (
        total.new_zeros(features, dtype=torch.float32) if need else None for need in (need_weight, need_bias)
    )
    if rows > 0:
        cpu.native.norm_backward(
            cpu.chosen_isa(),
            _rows_tuple(grad),
            _rows_tuple(grad_total),
            _rows_tuple(total),
            cpu._address(scale),
            cpu._address(mean),
            rstd.data_ptr(),
            cpu._address(grad_x),
            cpu._address(grad_weight),
            cpu._address(grad_bias),
            cpu.values_tuple(total)[1],
            rows,
            features,
            form.weight_offset,
            torch.get_num_threads(),
        )
    return grad_x, grad_weight, grad_bias


def _floats(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else cpu._float32(vector)


def _rows_tuple(matrix: Tensor | None) -> tuple[int, int]:
    return (0, 0) if matrix is None else (matrix.data_ptr(), cpu._row_stride(matrix))
