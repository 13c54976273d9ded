"""A frozen linear layer, dense or quantized, whose LoRA adapter turns its rows and whose magnitude sets their length.

    y = c ⊙ (x Wᵀ + s x Aᵀ Bᵀ) + b                   c = m / ‖W + s B A‖
    y = c ⊙ (D(x) Wᵀ + s D(x) Aᵀ Bᵀ) + (x - D(x)) Wᵀ + b        with dropout D in front of the adapter

    ‖W + s B A‖² = ‖W‖² + 2 s Σₖ (W Aᵀ)ₖ Bₖ + s² Σₖ (B A Aᵀ)ₖ Bₖ           of every row, k over the r columns

Shapes: x [..., in], W [out, in], A [r, in], B [out, r], m and c [out], y [..., out]. The norms get no gradient. They
take one product of r rows with W, whose own part is the same in every step (`row_squares`): neither B A nor a dense W
ever exists. What is kept for the backward pass beside that of :mod:`peftkern.ops.lora_linear` is the product under c,
where m is trained.

Source: DoRA, Liu et al. 2024 (arXiv:2402.09353), equation 5 and section 4.3. Dropout in front of W as well is PEFT's.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from peftkern.ops.dequantize import row_blocks
from peftkern.ops.lora_linear import FLOAT_DTYPES, Weight, check_adapters, check_call, compute_dtype, lora_linear

_DECODED_AT_ONCE = 1 << 20
"""Entries of W that exist as numbers at a time where its rows are measured."""


def dora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    squares: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The layer under DoRA. Differentiable, once, in ``x``, ``lora_A``, ``lora_B``, ``magnitude`` and ``bias``.

    Args:
        x, weight, lora_A, lora_B, scaling, bias, dropout_p, backend: as for `lora_linear`, with one adapter. With
            dropout there are two products with the weight, without one.
        magnitude: m, [out], floating point.
        squares: what `row_squares` gives for this weight, where the caller has kept it.

    Returns:
        [..., out] in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: ``magnitude`` or ``squares`` is not [out]; and as `lora_linear` does.
        TypeError: they are not floating-point tensors; and as `lora_linear` does.
        BackendError: a forced backend cannot run the call.
    """
    check_call(x, weight, check_adapters(lora_A, lora_B, scaling, dropout_p), bias)
    squares = row_squares(weight) if squares is None else squares
    for name, value in (("magnitude", magnitude), ("squares", squares)):
        _check_column(name, value, weight)
    dtype = compute_dtype(x)
    scale = magnitude.to(dtype) / _row_norms(weight, lora_A, lora_B, scaling, squares.to(dtype), backend)
    if not dropout_p:
        return _scaled(lora_linear(x, weight, lora_A, lora_B, scaling, backend=backend), scale, bias)
    dropped = functional.dropout(x, dropout_p)
    turned = lora_linear(dropped, weight, lora_A, lora_B, scaling, backend=backend)
    return _scaled(turned, scale, lora_linear(x - dropped, weight, bias=bias, backend=backend))


def row_squares(weight: Weight) -> Tensor:
    """The squared length of every row of ``weight``, [out], float64."""
    blocks = row_blocks(weight, max(1, _DECODED_AT_ONCE // max(weight.shape[1], 1)), torch.float32)
    squares = [block.double().square().sum(1) for block in blocks]
    return torch.cat(squares) if squares else torch.zeros(0, dtype=torch.float64, device=weight.device)


def _row_norms(
    weight: Weight, lora_A: Tensor, lora_B: Tensor, scaling: float, squares: Tensor, backend: str | None
) -> Tensor:
    """‖W + s B A‖ of every row, [out], in the dtype of ``squares``; without a gradient."""
    with torch.no_grad(), torch.autocast(squares.device.type, enabled=False):
        rows = lora_A.detach().to(weight.dtype if isinstance(weight, Tensor) else squares.dtype)
        across = lora_linear(rows, weight, backend=backend).t().to(squares.dtype)
        A, B = lora_A.detach().to(squares.dtype), lora_B.detach().to(squares.dtype)
        added = (B * (2 * scaling * across + scaling * scaling * (B @ (A @ A.t())))).sum(1)
        return (squares + added).clamp_(min=0.0).sqrt_()


def _scaled(product: Tensor, scale: Tensor, rest: Tensor | None) -> Tensor:
    """``product * scale + rest``, rounded once."""
    scaled = product * scale if rest is None else torch.addcmul(rest, product, scale)
    return scaled.to(product.dtype)


def _check_column(name: str, value: Tensor, weight: Weight) -> None:
    if not isinstance(value, Tensor) or value.dtype not in FLOAT_DTYPES:
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"dora_linear: {name} must be a floating-point tensor, got {got}")
    if value.shape != weight.shape[:1]:
        raise ValueError(f"dora_linear: {name} must be [out] = [{weight.shape[0]}], got {list(value.shape)}")
    if value.device != weight.device:
        raise ValueError(f"dora_linear: {name} is on {value.device} and weight on {weight.device}; move one of them")
