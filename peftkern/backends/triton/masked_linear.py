"""`masked_linear` on a GPU: the masked weight is made once in the scratch buffer, and multiplied as a dense one.

Formulas and shapes are in :mod:`peftkern.ops.masked_linear`. Forward and backward each make it anew, in one launch, and
leave nothing of the weight's size behind; the product takes the paths of a dense weight (:mod:`.crossover`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.backends.triton.lora_linear import group_backward, group_forward
from peftkern.backends.triton.masked_dequantize import masked_dequantize
from peftkern.backends.triton.scratch import scratch
from peftkern.formats import BitMask
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.lora_linear_group import Member


def masked_linear(
    x: Tensor, weight: Weight, mask: BitMask, adapters: Adapters, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Forward; see :func:`peftkern.ops.masked_linear.masked_linear_reference` for shapes."""
    (y,), h = group_forward(x, [Member(_masked_weight(weight, mask, x), adapters, bias)])
    return y, h


def masked_linear_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    mask: BitMask,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_weight: bool,
    need_lora: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Backward; see :func:`peftkern.ops.masked_linear.masked_linear_backward_reference` for shapes."""
    # where dX is not asked for nothing reads the weight, and its shape is enough
    dense = _masked_weight(weight, mask, grad) if need_x else _scratch_matrix(grad, mask.shape)
    member = Member(dense, adapters, None)
    grad_x, (grad_A,), (grad_B,) = group_backward([grad], x, [member], h, need_x, [need_lora])
    if not need_weight:
        return grad_x, None, grad_A, grad_B
    assert x is not None and isinstance(weight, Tensor)
    return grad_x, _weight_gradient(grad, x, weight, mask), grad_A, grad_B


def _scratch_matrix(like: Tensor, shape: torch.Size) -> Tensor:
    return scratch(like, shape.numel()).view(shape)


def _masked_weight(weight: Weight, mask: BitMask, like: Tensor) -> Tensor:
    """[out, in] in the dtype of ``like``, in the scratch buffer."""
    out = _scratch_matrix(like, mask.shape)
    masked_dequantize(weight.detach() if isinstance(weight, Tensor) else weight, mask, out)
    return out


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, mask: BitMask) -> Tensor:
    """``dyᵀ x`` where the mask keeps it: the vendor's product, masked where it lies if it has the weight's dtype."""
    product = torch.mm(grad.t(), x)
    gradient = product if product.dtype == weight.dtype else torch.empty_like(product, dtype=weight.dtype)
    masked_dequantize(product, mask, gradient)
    return gradient
