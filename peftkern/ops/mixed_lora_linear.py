"""A frozen linear layer over a batch whose rows have adapters of their own, in one product with the weight.

    y[i] = x[i] Wᵀ + sₐ Dₐ(x[i]) Aₐᵀ Bₐᵀ + b            a = adapter of row i; no adapter, no second term

Shapes: x [rows, ..., in], W [out, in], Aₐ [rₐ, in], Bₐ [out, rₐ], y [rows, ..., out]. Each adapter's factors get their
gradients from its own rows alone. Rows are sorted by adapter once, and each adapter multiplies its part; ranks may
differ. What is kept for the backward pass is the sorted rows of x, where an A is trained, and each h = Dₐ(x) Aₐᵀ.

Source: the forward form is that of S-LoRA, Sheng et al. 2023 (arXiv:2311.03285), section 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from peftkern.ops.lora_linear import Weight, check_adapters, check_call, in_autocast_dtype, lora_linear

NO_ADAPTER = -1


def mixed_lora_linear(
    x: Tensor,
    weight: Weight,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    adapters: Sequence[int],
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """Every row of the batch through the layer with its own adapter. Differentiable, once, as `lora_linear` is.

    Args:
        x, weight, bias, backend: as for `lora_linear`; x has at least two dimensions.
        lora_A, lora_B, scaling, dropout_p: one per adapter, as for `lora_linear`. Dropout is one mask over each
            adapter's rows.
        adapters: for each entry of x's first dimension the index of its adapter, or -1 for none.

    Returns:
        [rows, ..., out] in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: ``adapters`` does not have one entry per row, or one is no index of an adapter; and as
            `lora_linear` does.
        TypeError, BackendError: as `lora_linear` does.
    """
    checked = check_adapters(list(lora_A), list(lora_B), scaling, dropout_p)
    check_call(x, weight, checked, bias)
    _check_indices(x, adapters, len(checked))
    x = in_autocast_dtype(x)
    y = lora_linear(x, weight, bias=bias, backend=backend)
    rows = [[row for row, index in enumerate(adapters) if index == adapter] for adapter in range(len(checked))]
    order = torch.tensor([row for own in rows for row in own], dtype=torch.int64).to(x.device)
    if not len(order):
        return y
    added = [
        scaling * functional.linear(functional.linear(_dropped(part, p), lora_A.to(x.dtype)), lora_B.to(x.dtype))
        for part, lora_A, lora_B, scaling, p in zip(
            x.index_select(0, order).split_with_sizes([len(own) for own in rows]),
            checked.lora_A,
            checked.lora_B,
            checked.scaling,
            checked.dropout_p,
            strict=True,
        )
    ]
    return y.index_add_(0, order, torch.cat(added).to(y.dtype))


def _dropped(part: Tensor, p: float) -> Tensor:
    return functional.dropout(part, p) if p else part


def _check_indices(x: Tensor, adapters: Sequence[int], count: int) -> None:
    if x.dim() < 2:
        raise ValueError(f"mixed_lora_linear: x must be [rows, ..., in], got {list(x.shape)}")
    if len(adapters) != x.shape[0]:
        raise ValueError(
            f"mixed_lora_linear: adapters must have one entry for each of the {x.shape[0]} rows of x, got "
            f"{len(adapters)}"
        )
    for index in adapters:
        if not NO_ADAPTER <= index < count:
            raise ValueError(
                f"mixed_lora_linear: adapters must be indices from 0 to below {count}, or -1 for none; got {index}"
            )
