"""What backends allocate, without what they compute: they run in place of the operations in a step that is planned.

An operation that is not here runs its reference, of which what it returns counts. Here is what a reference does not
show: operations that look at numbers, that take it long to say a shape, or whose backends take scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import chunked_loss
from peftkern.ops.attention import Gradients, empty_output
from peftkern.ops.lora_linear import Adapters, Weight, compute_dtype
from peftkern.ops.norm import NormForm
from peftkern.ops.silu_mul import NOTHING_FREE

LoraGradients = tuple["Tensor | None", "list[Tensor | None]", "list[Tensor | None]"]


def _lora_linear(x: Tensor, weight: Weight, adapters: Adapters, _bias: Tensor | None) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), _inner(x, adapters)


def _inner(x: Tensor, adapters: Adapters) -> Tensor:
    """[tokens, Σr]."""
    return x.new_empty(x.shape[0], sum(factor.shape[0] for factor in adapters.lora_A), dtype=compute_dtype(x))


def _lora_linear_backward(
    grad: Tensor,
    _x: Tensor | None,
    weight: Weight,
    adapters: Adapters,
    _h: Tensor,
    need_x: bool,
    need_lora: Sequence[bool],
) -> LoraGradients:
    count = len(adapters)
    inner = _inner(grad, adapters) if need_x or any(need_lora[:count]) else None
    grad_x = grad.new_empty(grad.shape[0], weight.shape[1]) if need_x else None
    factors = [*adapters.lora_A, *adapters.lora_B]
    made = [torch.empty_like(factor) if need else None for factor, need in zip(factors, need_lora, strict=True)]
    del inner
    return grad_x, made[:count], made[count:]


def _silu_mul(gate: Tensor, _up: Tensor, _activation: str = "silu", out: Tensor | None = None) -> Tensor:
    return torch.empty_like(gate) if out is None else out


def _silu_mul_backward(
    _grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    need_gate: bool,
    need_up: bool,
    _activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None]:
    return _over(gate, need_gate, free[0]), _over(gate if up is None else up, need_up, free[1] and up is not None)


def _over(tensor: Tensor, needed: bool, free: bool) -> Tensor | None:
    """Memory for a gradient: that of ``tensor`` where it is free."""
    if not needed:
        return None
    return tensor if free and tensor.is_contiguous() else torch.empty_like(tensor)


def _gated_lora_linear_backward(
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
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]:
    # the product of the forward pass is made again over its gradient
    grad_x, grad_A, grad_B = _lora_linear_backward(grad, gate, weight, adapters, h, need_gate or need_up, need_lora)
    if grad_x is None:
        return None, None, grad_A, grad_B
    return *_silu_mul_backward(grad_x, gate, up, need_gate, need_up, activation, free), grad_A, grad_B


def _norm(
    x: Tensor, residual: Tensor | None, _weight: Tensor | None, _bias: Tensor | None, form: NormForm
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    rows, dtype = x.shape[0], compute_dtype(x)
    total = None if residual is None else x.new_empty(x.shape)
    mean = x.new_empty(rows, dtype=dtype) if form.centered else None
    return x.new_empty(x.shape), total, mean, x.new_empty(rows, dtype=dtype)


def _norm_backward(
    _grad: Tensor, _grad_total: Tensor | None, total: Tensor, *arguments: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_x, need_weight, need_bias = arguments[-3:]
    grad_weight, grad_bias = (
        total.new_empty(total.shape[-1], dtype=compute_dtype(total)) if need else None
        for need in (need_weight, need_bias)
    )
    return total.new_empty(total.shape) if need_x else None, grad_weight, grad_bias


def _rotary(states: Sequence[Tensor], *_arguments: Any) -> list[Tensor]:
    return [torch.empty_like(x) for x in states]


def _attention(query: Tensor, *_arguments: Any) -> tuple[Tensor, Tensor]:
    return empty_output(query), query.new_empty(query.shape[:3], dtype=compute_dtype(query))


def _attention_backward(_grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *arguments: Any) -> Gradients:
    needed = zip((query, key, value), arguments[-3:], strict=True)
    grad_query, grad_key, grad_value = (empty_output(x) if need else None for x, need in needed)
    return grad_query, grad_key, grad_value


def _sparse_delta(*_arguments: Any) -> None:
    """Adds to what is there."""


def _sparse_delta_backward(
    _grad: Tensor,
    _x: Tensor | None,
    _grad_x: Tensor | None,
    values: Tensor,
    _indices: Any,
    _scaling: float,
    need_values: bool,
) -> Tensor | None:
    return torch.empty_like(values) if need_values else None


STAND_INS: Mapping[str, Callable[..., Any]] = {
    "lora_linear": _lora_linear,
    "lora_linear_backward": _lora_linear_backward,
    "silu_mul": _silu_mul,
    "silu_mul_backward": _silu_mul_backward,
    "gated_lora_linear_backward": _gated_lora_linear_backward,
    "norm": _norm,
    "norm_backward": _norm_backward,
    "rotary": _rotary,
    "attention": _attention,
    "attention_backward": _attention_backward,
    "sparse_delta": _sparse_delta,
    "sparse_delta_backward": _sparse_delta_backward,
    # PyTorch's operators one after the other, which show their scratch memory themselves
    "linear_cross_entropy": chunked_loss.linear_cross_entropy,
}


def run_operator(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None) -> Any:
    """What an operator of PyTorch gives for tensors without numbers."""
    if operator is torch.ops.aten._grouped_mm.default:  # its own shape function knows bfloat16 alone
        return _grouped_product(*args, **(kwargs or {}))
    return operator(*args, **(kwargs or {}))


def _grouped_product(
    first: Tensor, second: Tensor, offsets: Tensor | None = None, *_others: Any, **_named: Any
) -> Tensor:
    """[tokens, in] by [experts, in, out]; or [in, tokens] by [tokens, out], for each expert."""
    if second.dim() == 3:
        return first.new_empty(*first.shape[:-1], second.shape[-1])
    assert offsets is not None
    return first.new_empty(len(offsets), first.shape[0], second.shape[1])
