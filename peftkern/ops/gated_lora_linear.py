"""The last layer of a gated block together with the gate in front of it: its input is not kept, but made again.

    x  = a(g) ⊙ u                    y = lora_linear(x, W, A, B, ...) + Σₖ sₖ x Sₖᵀ
    dx as in lora_linear and sparse_delta_linear             dg, du as in silu_mul

g and u are kept, as the gate alone would keep them, and h; x, which the product alone would keep as well, is computed
again in the backward pass, bit for bit, where a gradient of A or of the entries of S asks for it. What no gradient
needs is not kept: u where only u has one, and both where only B or b have one. Shapes: g and u [..., in].

Source of the recomputation: Training Deep Nets with Sublinear Memory Cost, Chen et al. 2016 (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import SparseIndices
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
    inner_products,
    is_plain_eager,
    lora_linear_backward_reference,
    weight_tensors,
    weight_versions,
)
from peftkern.ops.silu_mul import (
    NOTHING_FREE,
    check_activation,
    check_gate,
    silu_mul,
    silu_mul_backward_reference,
    silu_mul_reference,
)
from peftkern.ops.sparse_delta_linear import (
    Deltas,
    backward_deltas,
    check_index_versions,
    checked_deltas,
    index_versions,
    sparse_delta_linear,
)

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
    values: Sequence[Tensor] = (),
    indices: Sequence[SparseIndices] = (),
    delta_scaling: Sequence[float] = (),
    activation: str = "silu",
    backend: str | None = None,
) -> Tensor:
    """``lora_linear(silu_mul(gate, up), weight, ...)``, the same numbers with less kept for the backward pass.

    With ``values`` it stands for ``sparse_delta_linear`` in the same way. Differentiable, once, in ``gate``, ``up``,
    ``lora_A``, ``lora_B``, ``values`` and ``bias``. Under ``torch.compile``, and under an autocast that changes the
    dtype in between, it is the two operations.

    Args:
        gate, up: [..., in], as for `silu_mul`.
        weight, lora_A, lora_B, scaling, bias, dropout_p, backend: as for `lora_linear`.
        values, indices, delta_scaling: of sparse deltas, as for `sparse_delta_linear`, one each per delta.
        activation: as for `silu_mul`.

    Returns:
        [..., out] in the dtype of gate, or in autocast's dtype under autocast.

    Raises:
        ValueError, TypeError, RuntimeError, BackendError: as `silu_mul` and `sparse_delta_linear` do.
    """
    check_gate(gate, up)
    check_activation("gated_lora_linear", activation)
    adapters = check_adapters(lora_A, lora_B, scaling, dropout_p)
    check_call(gate, weight, adapters, bias)
    deltas = checked_deltas("gated_lora_linear", values, indices, delta_scaling, weight.shape, gate.device)
    lora = (*adapters.lora_A, *adapters.lora_B)
    tensors = (gate, up, *weight_tensors(weight), *deltas.tensors(), *lora)
    if not is_plain_eager(tensors, bias) or in_autocast_dtype(gate) is not gate:
        x = silu_mul(gate, up, activation=activation, backend=backend)
        lists = (adapters.lora_A, adapters.lora_B, adapters.scaling, bias, adapters.dropout_p)
        return sparse_delta_linear(x, weight, deltas.values, deltas.indices, deltas.scaling, *lists, backend=backend)
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    call = (weight, deltas.indices, deltas.scaling, adapters.scaling, adapters.dropout_p, seed, activation, backend)
    return _apply(gate, up, bias, call, *deltas.values, *lora)


# ---- reference


@registry.register("gated_lora_linear_backward", "reference")
def gated_lora_linear_backward_reference(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_gate: bool,
    need_up: bool,
    need_lora: Sequence[bool],
    activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> Gradients:
    """Backward in plain PyTorch. grad is [tokens, out], gate and up [tokens, in]; the rest as for `lora_linear`.

    up may be ``None`` where neither gate nor an A need a gradient; ``free`` is as for `silu_mul_backward_reference`.
    """
    need_x = need_gate or need_up
    x = _made_again(gate, up, activation) if any(need_lora[: len(adapters)]) else None
    grad_x, grad_A, grad_B = lora_linear_backward_reference(grad, x, weight, adapters, h, need_x, need_lora)
    if grad_x is None:
        return None, None, grad_A, grad_B
    return *silu_mul_backward_reference(grad_x, gate, up, need_gate, need_up, activation, free), grad_A, grad_B


def _made_again(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    assert up is not None
    return silu_mul_reference(gate, up, activation)


# ---- eager calls


class _GatedLoraLinear(torch.autograd.Function):
    """``tensors`` are the values of all deltas, then every A, then every B."""

    @staticmethod
    def forward(
        ctx: Any, gate: Tensor, up: Tensor, bias: Tensor | None, call: tuple[Any, ...], *tensors: Tensor
    ) -> Tensor:
        weight, indices, delta_scaling, scaling, dropout_p, seed, activation, backend = call
        values, adapters = _split(tensors, len(indices), scaling, dropout_p, seed)
        x = as_matrix(registry.run("silu_mul", gate, up, activation, backend=backend))
        y, h = registry.run("lora_linear", x, weight, adapters, bias, backend=backend)
        for delta in Deltas(values, indices, delta_scaling):
            registry.run("sparse_delta", y, x, *delta, backend=backend)
        # not among the saved tensors, whose hooks would copy or offload what stays where it is anyway
        ctx.call = (weight, indices, delta_scaling, scaling, dropout_p, activation, backend)
        ctx.versions = (weight_versions(weight), index_versions(indices))
        need_gate, need_up, _bias, _call, *need_tensors = ctx.needs_input_grad
        need_lora = need_tensors[len(indices) :]
        need_x = any(need_tensors[: len(indices)]) or any(need_lora[: len(adapters)])
        ctx.save_for_backward(
            gate if need_gate or need_up or need_x else None,
            up if need_gate or need_x else None,
            seed,
            h if any(need_lora[len(adapters) :]) else None,
            *tensors,
        )
        # not a view in autograd's eyes: the output of an operator may be modified in place
        return cast(Tensor, torch.ops.aten._unsafe_view(y, [*gate.shape[:-1], y.shape[-1]]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, indices, delta_scaling, scaling, dropout_p, activation, backend = ctx.call
        check_versions(weight, ctx.versions[0])
        check_index_versions(indices, ctx.versions[1])
        gate, up, seed, h, *tensors = ctx.saved_tensors
        values, adapters = _split(tensors, len(indices), scaling, dropout_p, seed)
        need_gate, need_up, need_bias, _, *need_tensors = ctx.needs_input_grad
        need_values, need_lora = need_tensors[: len(values)], need_tensors[len(values) :]
        shape, grad = grad.shape[:-1], as_matrix(grad.resolve_neg())
        h = inner_products(h, grad, adapters)
        if gate is None:  # no gradient needs x
            _, grad_A, grad_B = registry.run(
                "lora_linear_backward", grad, None, weight, adapters, h, False, need_lora, backend=backend
            )
            grad_bias = bias_gradient(grad) if need_bias else None
            return None, None, grad_bias, None, *[None] * len(values), *grad_A, *grad_B
        up = None if up is None else as_matrix(up)
        call = (grad, as_matrix(gate), up, weight, adapters, h, need_gate, need_up, need_lora, activation)
        deltas = Deltas(values, indices, delta_scaling)
        gradients = gated_backward(*call, deltas, need_values, backend)
        grad_gate, grad_up, grad_A, grad_B, grad_values = gradients
        grad_gate, grad_up = (
            None if part is None else part.view(*shape, part.shape[-1]) for part in (grad_gate, grad_up)
        )
        grad_bias = bias_gradient(grad) if need_bias else None
        return grad_gate, grad_up, grad_bias, None, *grad_values, *grad_A, *grad_B


def _split(
    tensors: Sequence[Tensor], deltas: int, scaling: list[float], dropout_p: list[float], seed: Tensor | None
) -> tuple[list[Tensor], Adapters]:
    lora = tensors[deltas:]
    adapters = Adapters(lora[: len(scaling)], lora[len(scaling) :], scaling, dropout_p, seed)
    return list(tensors[:deltas]), adapters


def gated_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    h: Tensor,
    need_gate: bool,
    need_up: bool,
    need_lora: Sequence[bool],
    activation: str,
    deltas: Deltas,
    need_values: Sequence[bool],
    backend: str | None,
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Gradients of gate, up, every A, every B and the values; all matrices [tokens, features].

    With deltas it is the backward of the parts, one after the other.
    """
    need_x = need_gate or need_up
    if not deltas.values:
        call = (grad, gate, up, weight, adapters, h, need_gate, need_up, need_lora, activation, free)
        return *registry.run("gated_lora_linear_backward", *call, backend=backend), []
    x = None
    if any(need_values) or any(need_lora[: len(adapters)]):
        x = registry.run("silu_mul", gate, up, activation, backend=backend)
    grad_x, grad_A, grad_B = registry.run(
        "lora_linear_backward", grad, x, weight, adapters, h, need_x, need_lora, backend=backend
    )
    grad_values = backward_deltas(grad, x, grad_x, deltas, need_values, backend)
    del x
    if grad_x is None:
        return None, None, grad_A, grad_B, grad_values
    grads = registry.run("silu_mul_backward", grad_x, gate, up, need_gate, need_up, activation, free, backend=backend)
    return *grads, grad_A, grad_B, grad_values


_apply = cast(Callable[..., Tensor], _GatedLoraLinear.apply)
