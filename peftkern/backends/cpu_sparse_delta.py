"""Sparse deltas on the CPU: prepares addresses, sizes and strides for ``csrc/cpu/isa/sparse_delta.inl.h``.

Forward goes through S in row order, backward in column order, where one pass over dY serves both gradients. Beside x, y
and their gradients there are some blocks of tokens of x or dY, turned, and in the backward pass two numbers for each
entry, all in scratch memory that is kept from call to call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from peftkern.backends import cpu, registry
from peftkern.formats import SparseIndices

_NOT_THERE = (0, 0, 0)


def _objection(*tensors: Tensor | None) -> str | None:
    if not cpu.available():
        return cpu.unavailable_reason()
    for tensor in tensors:
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            return f"tensors are on {tensor.device}"
        if tensor.dtype not in cpu._DTYPE_CODE:
            return f"{tensor.dtype} activations"
    return None


def _supports_forward(y: Tensor, x: Tensor, *_rest: object) -> str | None:
    return _objection(y, x)


def _supports_backward(grad: Tensor, x: Tensor | None, grad_x: Tensor | None, *_rest: object) -> str | None:
    return _objection(grad, x, grad_x)


def _token_rows(matrix: Tensor | None) -> tuple[int, int, int]:
    if matrix is None:
        return _NOT_THERE
    return matrix.data_ptr(), cpu._DTYPE_CODE[matrix.dtype], cpu._row_stride(matrix)


@registry.register("sparse_delta", "cpu", supports=_supports_forward)
def sparse_delta(y: Tensor, x: Tensor, values: Tensor, indices: SparseIndices, scaling: float) -> None:
    """``y += scaling * x Sᵀ``; see :func:`peftkern.ops.sparse_delta_linear.sparse_delta_reference`."""
    if x.shape[0] == 0 or len(indices) == 0:
        return
    x, values = cpu._rows(x), cpu._float32(values)
    row_offsets, columns, column_offsets, _, _ = _contiguous(indices)
    order = (x.shape[1], y.shape[1], column_offsets.data_ptr(), row_offsets.data_ptr(), columns.data_ptr(), 0)
    cpu.native.sparse_product(
        cpu.chosen_isa(),
        x.shape[0],
        _token_rows(x),
        _token_rows(y),
        _NOT_THERE,
        order,
        values.data_ptr(),
        0,
        scaling,
        torch.get_num_threads(),
    )


@registry.register("sparse_delta_backward", "cpu", supports=_supports_backward)
def sparse_delta_backward(
    grad: Tensor,
    x: Tensor | None,
    grad_x: Tensor | None,
    values: Tensor,
    indices: SparseIndices,
    scaling: float,
    need_values: bool,
) -> Tensor | None:
    """``grad_x += scaling * grad S`` where grad_x is given, and the gradient of the values where it is needed.

    See :func:`peftkern.ops.sparse_delta_linear.sparse_delta_backward_reference`.
    """
    gradients = torch.empty(len(indices), dtype=torch.float32, device=values.device) if need_values else None
    if grad.shape[0] == 0 or len(indices) == 0:
        return None if gradients is None else gradients.zero_().to(values.dtype)
    if gradients is None and grad_x is None:
        return None
    grad, pair = cpu._rows(grad), None if x is None or not need_values else cpu._rows(x)
    row_offsets, _, column_offsets, rows, order = _contiguous(indices)
    float_values = cpu._float32(values)
    out_features, in_features = indices.shape
    addresses = (row_offsets.data_ptr(), column_offsets.data_ptr(), rows.data_ptr(), order.data_ptr())
    cpu.native.sparse_product(
        cpu.chosen_isa(),
        grad.shape[0],
        _token_rows(grad),
        _token_rows(grad_x),
        _token_rows(pair),
        (out_features, in_features, *addresses),
        float_values.data_ptr(),
        0 if gradients is None else gradients.data_ptr(),
        scaling,
        torch.get_num_threads(),
    )
    return None if gradients is None else gradients.to(values.dtype)


def _contiguous(indices: SparseIndices) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in indices.tensors())
