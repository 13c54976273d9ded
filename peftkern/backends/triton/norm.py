"""Normalisation of rows; formulas and shapes are in :mod:`peftkern.ops.norm`. Arithmetic is in float32.

One program holds one row. The gradients of weight and bias are sums over groups of rows, added up in their order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch
from peftkern.ops.norm import NormForm

MOST_FEATURES = 16384
"""That a program holds."""

_WARP_FEATURES = 512  # of a row, for each warp of its program
_GROUP_ROWS = 64
_BLOCK = 64
_ROWS = 16


@triton.jit
def norm_kernel(
    x,
    residual,
    weight,
    bias,
    y,
    total,
    mean,
    rstd,
    features,
    x_stride,
    residual_stride,
    one_over_features,
    eps,
    weight_offset,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CENTERED: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    mask = feature < features
    values = tl.load(x + row * x_stride + feature, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + row * residual_stride + feature, mask=mask, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)
        tl.store(total + row * features + feature, rounded, mask=mask)
        values = rounded.to(tl.float32)
    if CENTERED:
        center = tl.sum(values, axis=0) * one_over_features
        tl.store(mean + row, center)
        values = tl.where(mask, values - center, 0.0)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(values * values, axis=0) * one_over_features + eps))
    tl.store(rstd + row, scale)
    out = values * scale
    if ROUND_FIRST:
        out = out.to(y.dtype.element_ty).to(tl.float32)
    if HAS_WEIGHT:
        out *= tl.load(weight + feature, mask=mask, other=0.0).to(tl.float32) + weight_offset
    if HAS_BIAS:
        out += tl.load(bias + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * features + feature, out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def norm_backward_kernel(
    grad,
    grad_total,
    total,
    weight,
    mean,
    rstd,
    grad_x,
    features,
    grad_stride,
    grad_total_stride,
    total_stride,
    one_over_features,
    weight_offset,
    HAS_GRAD_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    CENTERED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    feature = tl.arange(0, BLOCK)
    mask = feature < features
    scale = tl.load(rstd + row)
    normal = tl.load(total + row * total_stride + feature, mask=mask, other=0.0).to(tl.float32)
    if CENTERED:
        normal -= tl.load(mean + row)
    normal *= scale
    arriving = tl.load(grad + row * grad_stride + feature, mask=mask, other=0.0).to(tl.float32)
    if HAS_WEIGHT:
        arriving *= tl.load(weight + feature, mask=mask, other=0.0).to(tl.float32) + weight_offset
    along = tl.sum(arriving * normal, axis=0) * one_over_features
    out = arriving - normal * along
    if CENTERED:
        out -= tl.sum(arriving, axis=0) * one_over_features
    out *= scale
    if HAS_GRAD_TOTAL:
        out += tl.load(grad_total + row * grad_total_stride + feature, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x + row * features + feature, out.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def norm_weight_gradient_kernel(
    grad,
    total,
    mean,
    rstd,
    weight_sums,
    bias_sums,
    rows,
    features,
    grad_stride,
    total_stride,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    CENTERED: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = feature < features
    for_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    for_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, GROUP_ROWS, ROWS):
        row = group * GROUP_ROWS + begin + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        arriving = tl.load(grad + row[:, None] * grad_stride + feature[None, :], mask=mask, other=0.0).to(tl.float32)
        if NEED_WEIGHT:
            normal = tl.load(total + row[:, None] * total_stride + feature[None, :], mask=mask, other=0.0)
            normal = normal.to(tl.float32)
            if CENTERED:
                normal -= tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
            normal *= tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
            for_weight += tl.sum(arriving * normal, axis=0)
        if NEED_BIAS:
            for_bias += tl.sum(arriving, axis=0)
    if NEED_WEIGHT:
        tl.store(weight_sums + group * features + feature, for_weight, mask=inside)
    if NEED_BIAS:
        tl.store(bias_sums + group * features + feature, for_bias, mask=inside)


def _adjacent(matrix: Tensor) -> Tensor:
    """The matrix with its columns next to each other; rows may have any stride."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _block(features: int) -> tuple[int, int]:
    """Numbers that a program holds, and its warps."""
    block = max(16, 1 << (features - 1).bit_length())
    return block, min(16, max(1, block // _WARP_FEATURES))


def norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """Forward; see :func:`peftkern.ops.norm.norm_reference`."""
    rows, features = x.shape
    x, residual = _adjacent(x), None if residual is None else _adjacent(residual)
    weight, bias = (None if vector is None else vector.contiguous() for vector in (weight, bias))
    y = x.new_empty(rows, features)
    total = None if residual is None else torch.empty_like(y)
    rstd = x.new_empty(rows, dtype=torch.float32)
    mean = torch.empty_like(rstd) if form.centered else None
    if rows > 0:
        block, warps = _block(features)
        launch(
            norm_kernel,
            (rows,),
            x,
            x if residual is None else residual,
            x if weight is None else weight,
            x if bias is None else bias,
            y,
            y if total is None else total,
            rstd if mean is None else mean,
            rstd,
            features,
            x.stride(0),
            x.stride(0) if residual is None else residual.stride(0),
            1.0 / features,
            form.eps,
            form.weight_offset,
            traffic=lambda: Traffic((x, residual, weight, bias), (y, total, mean, rstd), flops=6 * y.numel()),
            num_warps=warps,
            num_stages=1,
            HAS_RESIDUAL=residual is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            CENTERED=form.centered,
            ROUND_FIRST=form.round_before_weight,
            BLOCK=block,
        )
    return y, total, mean, rstd


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
    grad, total = _adjacent(grad), _adjacent(total)
    grad_total = None if grad_total is None else _adjacent(grad_total)
    weight = None if weight is None else weight.contiguous()
    grad_x = total.new_empty(rows, features) if need_x else None
    if grad_x is not None and rows > 0:
        block, warps = _block(features)
        launch(
            norm_backward_kernel,
            (rows,),
            grad,
            grad if grad_total is None else grad_total,
            total,
            grad if weight is None else weight,
            rstd if mean is None else mean,
            rstd,
            grad_x,
            features,
            grad.stride(0),
            grad.stride(0) if grad_total is None else grad_total.stride(0),
            total.stride(0),
            1.0 / features,
            form.weight_offset,
            traffic=lambda: Traffic((grad, grad_total, total, weight, mean, rstd), (grad_x,), flops=10 * total.numel()),
            num_warps=warps,
            num_stages=1,
            HAS_GRAD_TOTAL=grad_total is not None,
            HAS_WEIGHT=weight is not None,
            CENTERED=mean is not None,
            BLOCK=block,
        )
    return grad_x, *_vector_gradients(grad, total, mean, rstd, need_weight, need_bias)


def _vector_gradients(
    grad: Tensor, total: Tensor, mean: Tensor | None, rstd: Tensor, need_weight: bool, need_bias: bool
) -> tuple[Tensor | None, Tensor | None]:
    if not (need_weight or need_bias):
        return None, None
    rows, features = total.shape
    groups = cdiv(rows, _GROUP_ROWS)
    weight_sums, bias_sums = (
        total.new_empty(groups, features, dtype=torch.float32) if need else None for need in (need_weight, need_bias)
    )
    if rows > 0:
        launch(
            norm_weight_gradient_kernel,
            (groups, cdiv(features, _BLOCK)),
            grad,
            total,
            rstd if mean is None else mean,
            rstd,
            rstd if weight_sums is None else weight_sums,
            rstd if bias_sums is None else bias_sums,
            rows,
            features,
            grad.stride(0),
            total.stride(0),
            traffic=lambda: Traffic(
                (grad, *((total, mean, rstd) if need_weight else ())), (weight_sums, bias_sums), flops=4 * total.numel()
            ),
            num_warps=4,
            num_stages=1,
            NEED_WEIGHT=need_weight,
            NEED_BIAS=need_bias,
            CENTERED=mean is not None,
            GROUP_ROWS=_GROUP_ROWS,
            ROWS=_ROWS,
            BLOCK=_BLOCK,
        )
    grad_weight, grad_bias = (None if sums is None else sums.sum(0) for sums in (weight_sums, bias_sums))
    return grad_weight, grad_bias
