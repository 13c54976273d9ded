"""The last layer of a SwiGLU block together with the gate in front of it: its input is not kept, but made again.

    x  = silu(g) ⊙ u                 y = lora_linear(x, W, A, B, ...)
    dx as in lora_linear             dg, du as in silu_mul

g and u are kept, as the gate alone would keep them, and h; x, which `lora_linear` alone would keep as well, is computed
again in the backward pass, bit for bit, where a gradient of A asks for it. Shapes: g and u [..., in].

Source of the recomputation: Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016 (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops import dropout
from peftkern.ops.lora_linear import (
    Adapters,
    Weight,
    as_matrix,
    bias_gradient,
    check_adapters,
    check_call,
    check_versions,
    in_autocast_dtype,
    is_plain_eager,
    lora_linear,
    lora_linear_backward_reference,
    weight_tensors,
    weight_versions,
)
from peftkern.ops.silu_mul import check_gate, silu_mul, silu_mul_backward_reference, silu_mul_reference

Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]
"""Of g, u, every A and every B; ``None`` where none was asked for."""


def gated_lora_linear(
    gate: Tensor,
    up: Tensor,
    weight: Weight,
    lora_A: Tensor | Sequence[Tensor] | None = None,
    lora_B: Tensor | Sequence[Tensor] | None = None,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """``lora_linear(silu_mul(gate, up), weight, ...)``, the same numbers with less kept for the backward pass.

    Differentiable, once, in ``gate``, ``up``, ``lora_A``, ``lora_B`` and ``bias``. Under ``torch.compile``, and under
    an autocast that changes the dtype in between, it is the two operations.

    Args:
        gate, up: [..., in], as for `silu_mul`.
        weight, lora_A, lora_B, scaling, bias, dropout_p, backend: as for `lora_linear`.

    Returns:
        [..., out] in the dtype of gate, or in autocast's dtype under autocast.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `silu_mul` and `lora_linear` do.
    """
    check_gate(gate, up)
    adapters = check_adapters(lora_A, lora_B, scaling, dropout_p)
    check_call(gate, weight, adapters, bias)
    lists = (adapters.lora_A, adapters.lora_B, adapters.scaling, adapters.dropout_p)
    tensors = (gate, up, *weight_tensors(weight), *lists[0], *lists[1])
    if not is_plain_eager(tensors, bias) or in_autocast_dtype(gate) is not gate:
        x = silu_mul(gate, up, backend=backend)
        return lora_linear(x, weight, *lists[:3], bias, lists[3], backend=backend)
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    return _apply(gate, up, weight, bias, *lists[2:], seed, backend, *lists[0], *lists[1])


# ---- reference


@registry.register("gated_lora_linear_backward", "reference")
def gated_lora_linear_backward_reference(
    grad: Tensor,
    gate: Tensor,
    up: Tensor,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_gate: bool,
    need_up: bool,
    need_lora: Sequence[bool],
) -> Gradients:
    """Backward in plain PyTorch. grad is [tokens, out], gate and up [tokens, in]; the rest as for `lora_linear`."""
    need_x = need_gate or need_up
    x = silu_mul_reference(gate, up) if any(need_lora[: len(adapters)]) else None
    grad_x, grad_A, grad_B = lora_linear_backward_reference(grad, x, weight, adapters, h, need_x, need_lora)
    if grad_x is None:
        return None, None, grad_A, grad_B
    return *silu_mul_backward_reference(grad_x, gate, up, need_gate, need_up), grad_A, grad_B


# ---- eager calls


class _GatedLoraLinear(torch.autograd.Function):
    """``lora`` is every A, then every B."""

    @staticmethod
    def forward(
        ctx: Any,
        gate: Tensor,
        up: Tensor,
        weight: Weight,
        bias: Tensor | None,
        scaling: list[float],
        dropout_p: list[float],
        seed: Tensor | None,
        backend: str | None,
        *lora: Tensor,
    ) -> Tensor:
        count = len(scaling)
        adapters = Adapters(lora[:count], lora[count:], scaling, dropout_p, seed)
        x = registry.run("silu_mul", gate, up, backend=backend)
        y, h = registry.run("lora_linear", as_matrix(x), weight, adapters, bias, backend=backend)
        # not among the saved tensors, whose hooks would copy or offload a weight that stays where it is anyway
        ctx.call = (weight, weight_versions(weight), scaling, dropout_p, backend)
        ctx.save_for_backward(gate, up, seed, h, *lora)
        # not a view in autograd's eyes: the output of an operator may be modified in place
        return cast(Tensor, torch.ops.aten._unsafe_view(y, [*gate.shape[:-1], y.shape[-1]]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, versions, scaling, dropout_p, backend = ctx.call
        check_versions(weight, versions)
        gate, up, seed, h, *lora = ctx.saved_tensors
        adapters = Adapters(lora[: len(scaling)], lora[len(scaling) :], scaling, dropout_p, seed)
        need_gate, need_up, need_bias = (ctx.needs_input_grad[index] for index in (0, 1, 3))
        grad = as_matrix(grad.resolve_neg())
        call = (grad, as_matrix(gate), as_matrix(up), weight, adapters, h, need_gate, need_up)
        gradients: Gradients = registry.run(
            "gated_lora_linear_backward", *call, ctx.needs_input_grad[8:], backend=backend
        )
        grad_gate, grad_up, grad_A, grad_B = gradients
        grad_gate, grad_up = (None if part is None else part.view(gate.shape) for part in (grad_gate, grad_up))
        grad_bias = bias_gradient(grad) if need_bias else None
        return grad_gate, grad_up, None, grad_bias, None, None, None, None, *grad_A, *grad_B


_apply = cast(Callable[..., Tensor], _GatedLoraLinear.apply)
