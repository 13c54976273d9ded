"""A linear layer whose weight counts only where a mask keeps it, with any number of LoRA adapters beside it.

    y  = x Vᵀ + Σᵢ hᵢ Bᵢᵀ + b            V = W where M keeps an entry, else 0
    dx = dy V + Σᵢ Dᵢ(gᵢ Aᵢ)              dW = dyᵀ x where M keeps an entry, else 0
    dAᵢ, dBᵢ, hᵢ, gᵢ, Dᵢ, db as in `lora_linear`

Shapes: x [..., in], W and M [out, in], Aᵢ [r, in], Bᵢ [out, r], y [..., out]. What W holds where M does not keep it
never matters, also where that is infinite or not a number. What is kept for the backward pass is x, h and the seed of
`lora_linear`; W and M are held, and nothing else of their size. No kernel keeps V: on a GPU it passes through a
buffer that all layers share, and the kernels of the CPU never form it.

Source: SPDF, Thangarasa et al. 2023 (arXiv:2303.10464): a static mask while training; DSEE, Chen et al. 2021
(arXiv:2111.00160): W ⊙ S₁ under an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import BitMask
from peftkern.ops import dropout
from peftkern.ops.lora_linear import (
    ADAPTER_SCHEMA,
    WEIGHT_ARGUMENTS,
    WEIGHT_SCHEMA,
    Adapters,
    Weight,
    as_matrix,
    bias_gradient,
    check_adapters,
    check_backward,
    check_call,
    check_versions,
    compute_dtype,
    dense_weight,
    flatten_weight,
    in_autocast_dtype,
    inner_products,
    is_plain_eager,
    lora_linear_backward_reference,
    lora_linear_reference,
    unflatten_weight,
    weight_tensors,
    weight_versions,
)

Gradients = tuple[Tensor | None, Tensor | None, list[Tensor | None], list[Tensor | None]]
"""Of x, W, every A and every B; ``None`` where none was asked for."""


def masked_linear(
    x: Tensor,
    weight: Weight,
    mask: BitMask,
    lora_A: Tensor | Sequence[Tensor] | None = None,
    lora_B: Tensor | Sequence[Tensor] | None = None,
    scaling: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    *,
    backend: str | None = None,
) -> Tensor:
    """``y = x (W ⊙ M)ᵀ + Σ scalingᵢ · dropout(x) Aᵢᵀ Bᵢᵀ + bias``.

    Differentiable, once, in ``x``, a dense ``weight``, ``lora_A``, ``lora_B`` and ``bias``; only what asks for a
    gradient gets one. The gradient of the weight is zero where the mask does not keep it.

    Args:
        x: [..., in], float64, float32, bfloat16 or float16; any strides, any number of tokens, 0 included.
        weight: [out, in], a floating-point tensor, trained or frozen, or a ``QuantizedTensor``.
        mask: of the shape of the weight, on the device of x.
        lora_A, lora_B, scaling, bias, dropout_p, backend: as for `lora_linear`.

    Returns:
        [..., out] in the dtype of x, or in autocast's dtype under autocast.

    Raises:
        ValueError: ``mask`` is inconsistent, on another device or of another shape than ``weight``; and where
            `lora_linear` raises it.
        TypeError: ``mask`` is no ``BitMask``; and where `lora_linear` raises it.
        RuntimeError, BackendError: as `lora_linear` raises them.

    Backends run ``masked_linear(x [tokens, in], weight, mask, adapters, bias) -> (y, h)`` and
    ``masked_linear_backward(grad [tokens, out], x [tokens, in] or None, weight, mask, adapters, h, need_x, need_weight,
    need_lora) -> (grad_x, grad_weight, [grad_A], [grad_B])``.
    """
    adapters = check_adapters(lora_A, lora_B, scaling, dropout_p)
    _check(x, weight, mask, adapters, bias)
    x = in_autocast_dtype(x)
    seed = dropout.draw_seed() if any(adapters.dropout_p) else None
    lists = (adapters.lora_A, adapters.lora_B, adapters.scaling, adapters.dropout_p)
    if is_plain_eager((x, *weight_tensors(weight), mask.bits, *lists[0], *lists[1]), bias):
        return _apply(x, weight, mask, bias, *lists[2:], seed, backend, *lists[0], *lists[1])
    y: Tensor
    y, _ = torch.ops.peftkern.masked_linear(
        x, *flatten_weight(weight), mask.bits, mask.pattern, *lists, seed, bias, backend
    )
    return y


def _check(x: Tensor, weight: Weight, mask: BitMask, adapters: Adapters, bias: Tensor | None) -> None:
    check_call(x, _without_gradient(weight), adapters, bias)
    if not isinstance(mask, BitMask):
        raise TypeError(
            f"masked_linear: mask must be a BitMask, got {type(mask).__name__}; use BitMask.from_mask(mask)"
        )
    mask.validate()
    if tuple(mask.shape) != tuple(weight.shape):
        raise ValueError(f"masked_linear: mask must be [out, in] = {list(weight.shape)}, got {list(mask.shape)}")
    if mask.device != x.device:
        raise ValueError(f"masked_linear: mask is on {mask.device} and x on {x.device}; move one of them")


def _without_gradient(weight: Weight) -> Weight:
    """For the checks of `lora_linear`, whose weight is frozen."""
    return weight.detach() if isinstance(weight, Tensor) else weight


# ---- reference


def masked_weight(weight: Weight, mask: BitMask, dtype: torch.dtype) -> Tensor:
    """W where the mask keeps it and zero elsewhere, [out, in] in ``dtype``."""
    return dense_weight(weight, dtype).masked_fill(~mask.mask(), 0.0)


@registry.register("masked_linear", "reference")
def masked_linear_reference(
    x: Tensor, weight: Weight, mask: BitMask, adapters: Adapters, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Forward in plain PyTorch, in float32 (float64 for a float64 x). x is [tokens, in]; returns y and h."""
    return lora_linear_reference(x, masked_weight(weight, mask, compute_dtype(x)), adapters, bias)


@registry.register("masked_linear_backward", "reference")
def masked_linear_backward_reference(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    mask: BitMask,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_weight: bool,
    need_lora: Sequence[bool],
) -> Gradients:
    """Backward in plain PyTorch.

    grad is [tokens, out]; x may be ``None`` where neither W nor an A needs a gradient; ``need_lora`` holds the flags of
    every A, then those of every B. The gradient of W comes in its dtype.
    """
    dtype = compute_dtype(grad)
    masked = masked_weight(weight, mask, dtype)
    grad_x, grad_A, grad_B = lora_linear_backward_reference(grad, x, masked, adapters, h, need_x, need_lora)
    grad_weight = None
    if need_weight:
        assert x is not None
        grad_weight = (grad.to(dtype).t() @ x.to(dtype)).masked_fill_(~mask.mask(), 0.0).to(weight.dtype)
    return grad_x, grad_weight, grad_A, grad_B


# ---- eager calls


def _run_forward(
    x: Tensor, weight: Weight, mask: BitMask, adapters: Adapters, bias: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    y, h = registry.run("masked_linear", as_matrix(x), weight, mask, adapters, bias, backend=backend)
    # not a view in autograd's eyes: the output of an operator may be modified in place, one of several views may not
    return torch.ops.aten._unsafe_view(y, [*x.shape[:-1], y.shape[-1]]), h


def _run_backward(
    grad: Tensor,
    x: Tensor | None,
    weight: Weight,
    mask: BitMask,
    adapters: Adapters,
    h: Tensor,
    need_x: bool,
    need_weight: bool,
    need_lora: Sequence[bool],
    backend: str | None,
) -> Gradients:
    x_ = None if x is None else as_matrix(x)
    needs = (need_x, need_weight, need_lora)
    gradients: Gradients = registry.run(
        "masked_linear_backward", as_matrix(grad), x_, weight, mask, adapters, h, *needs, backend=backend
    )
    grad_x, *rest = gradients
    if grad_x is not None:
        grad_x = grad_x.view(*grad.shape[:-1], grad_x.shape[-1])
    return grad_x, *rest  # type: ignore[return-value]


class _MaskedLinear(torch.autograd.Function):
    """The operator's twin for plain eager calls. ``lora`` is every A, then every B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Weight,
        mask: BitMask,
        bias: Tensor | None,
        scaling: list[float],
        dropout_p: list[float],
        seed: Tensor | None,
        backend: str | None,
        *lora: Tensor,
    ) -> Tensor:
        count = len(scaling)
        adapters = Adapters(lora[:count], lora[count:], scaling, dropout_p, seed)
        y, h = _run_forward(x, weight, mask, adapters, bias, backend)
        # not among the saved tensors, whose hooks would copy or offload a weight that stays where it is anyway
        ctx.call = (weight, weight_versions(weight), mask, scaling, dropout_p, backend)
        need_x = ctx.needs_input_grad[1] or any(ctx.needs_input_grad[8 : 8 + count])
        need_h = any(ctx.needs_input_grad[8 + count :])
        ctx.save_for_backward(x if need_x else None, seed, h if need_h else None, *lora)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, versions, mask, scaling, dropout_p, backend = ctx.call
        check_versions(weight, versions)
        x, seed, h, *lora = ctx.saved_tensors
        adapters = Adapters(lora[: len(scaling)], lora[len(scaling) :], scaling, dropout_p, seed)
        needs = ctx.needs_input_grad
        grad = grad.resolve_neg()  # the operator would be handed it so
        h = inner_products(h, grad, adapters)
        grad_x, grad_weight, grad_A, grad_B = _run_backward(
            grad, x, weight, mask, adapters, h, needs[0], needs[1], needs[8:], backend
        )
        grad_bias = bias_gradient(grad) if needs[3] else None
        return grad_x, grad_weight, None, grad_bias, None, None, None, None, *grad_A, *grad_B


_apply = cast(Callable[..., Tensor], _MaskedLinear.apply)


# ---- operators

_MASK_SCHEMA = "Tensor bits, int[]? pattern"
_ADAPTERS_AT = WEIGHT_ARGUMENTS + 2


def _unflatten(dtype: torch.dtype, arguments: Sequence[Any]) -> tuple[Weight, BitMask]:
    weight = unflatten_weight(dtype, arguments[:WEIGHT_ARGUMENTS])
    bits, pattern = arguments[WEIGHT_ARGUMENTS:_ADAPTERS_AT]
    return weight, BitMask(bits, torch.Size(weight.shape), None if pattern is None else tuple(pattern))


@torch.library.custom_op(
    "peftkern::masked_linear",
    mutates_args=(),
    schema=f"(Tensor x, {WEIGHT_SCHEMA}, {_MASK_SCHEMA}, {ADAPTER_SCHEMA}, Tensor? bias, str? backend) "
    "-> (Tensor, Tensor)",
)
def _forward_operator(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    weight, mask = _unflatten(x.dtype, arguments)
    *adapter_arguments, bias, backend = arguments[_ADAPTERS_AT:]
    adapters = Adapters(*adapter_arguments)
    _check(x, weight, mask, adapters, bias)
    return _run_forward(x, weight, mask, adapters, bias, backend)


@_forward_operator.register_fake
def _forward_fake(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    out_features, lora_A = arguments[WEIGHT_ARGUMENTS - 2], arguments[_ADAPTERS_AT]
    ranks = sum(a.shape[0] for a in lora_A)
    tokens = x.shape[:-1].numel()
    return x.new_empty(*x.shape[:-1], out_features), x.new_empty(tokens, ranks, dtype=compute_dtype(x))


@torch.library.custom_op(
    "peftkern::masked_linear_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? x, {WEIGHT_SCHEMA}, {_MASK_SCHEMA}, {ADAPTER_SCHEMA}, Tensor h, bool need_x, "
    "bool need_weight, bool[] need_lora, str? backend) -> Tensor[]",
)
def _backward_operator(grad: Tensor, x: Tensor | None, *arguments: Any) -> list[Tensor]:
    weight, mask = _unflatten(grad.dtype, arguments)
    *adapter_arguments, h, need_x, need_weight, need_lora, backend = arguments[_ADAPTERS_AT:]
    adapters = Adapters(*adapter_arguments)
    check_backward(grad, x, _without_gradient(weight), adapters, h)
    _check(grad.new_empty(0, weight.shape[1]), weight, mask, adapters, None)
    grad_x, grad_weight, grad_A, grad_B = _run_backward(
        grad, x, weight, mask, adapters, h, need_x, need_weight, need_lora, backend
    )
    return [gradient for gradient in (grad_x, grad_weight, *grad_A, *grad_B) if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(grad: Tensor, x: Tensor | None, *arguments: Any) -> list[Tensor]:
    packed, in_features = arguments[0], arguments[WEIGHT_ARGUMENTS - 1]
    lora_A, lora_B, *_, need_x, need_weight, need_lora, _backend = arguments[_ADAPTERS_AT:]
    wanted = [grad.new_empty(*grad.shape[:-1], in_features)] if need_x else []
    wanted += [packed.new_empty(packed.shape)] if need_weight else []
    return wanted + [p.new_empty(p.shape) for p, need in zip([*lora_A, *lora_B], need_lora, strict=True) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, mask = inputs[0], inputs[1 : 1 + WEIGHT_ARGUMENTS], inputs[1 + WEIGHT_ARGUMENTS : 1 + _ADAPTERS_AT]
    lora_A, lora_B, scaling, dropout_p, seed, _bias, backend = inputs[1 + _ADAPTERS_AT :]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])  # h is there for the backward pass, which has no second derivative
    ctx.count = len(lora_A)
    ctx.options = (weight[4:], mask[1], scaling, dropout_p, backend)
    need_x = weight[0].requires_grad or any(a.requires_grad for a in lora_A)
    h = output[1] if any(b.requires_grad for b in lora_B) else None
    ctx.save_for_backward(x if need_x else None, *weight[:4], mask[0], *lora_A, *lora_B, seed, h)


def _backward(ctx: Any, grad: Tensor | None, _grad_h: Tensor | None) -> tuple[Any, ...]:
    no_rest: list[None] = [None] * (WEIGHT_ARGUMENTS - 1 + 2)
    at = 1 + _ADAPTERS_AT
    need_x, need_weight, need_A, need_B, need_bias = (ctx.needs_input_grad[i] for i in (0, 1, at, at + 1, at + 5))
    nothing: list[Tensor | None] = [None] * ctx.count
    # torch.library takes an empty list of numbers for a list of no tensors, and wants one back
    numbers: list[None] | None = None if ctx.count else []
    if grad is None:
        return None, None, *no_rest, nothing, nothing, numbers, numbers, None, None, None
    x, *tensors, seed, h = ctx.saved_tensors
    weight_parts, bits = tensors[:4], tensors[4]
    lora_A, lora_B = tensors[5 : 5 + ctx.count], tensors[5 + ctx.count :]
    weight_options, pattern, scaling, dropout_p, backend = ctx.options
    need_lora = [*need_A, *need_B]
    operands = (*weight_parts, *weight_options, bits, pattern, lora_A, lora_B, scaling, dropout_p, seed)
    h = inner_products(h, grad, Adapters(lora_A, lora_B, scaling, dropout_p, seed))
    gradients: list[Tensor] = []
    if need_x or need_weight or any(need_lora):
        needs = (need_x, need_weight, need_lora)
        gradients = torch.ops.peftkern.masked_linear_backward(grad, x, *operands, h, *needs, backend)
    remaining = iter(gradients)
    grad_x = next(remaining) if need_x else None
    grad_weight = next(remaining) if need_weight else None
    grad_lora = [next(remaining) if need else None for need in need_lora]
    grad_bias = bias_gradient(grad) if need_bias else None
    grad_A, grad_B = grad_lora[: ctx.count], grad_lora[ctx.count :]
    return grad_x, grad_weight, *no_rest, grad_A, grad_B, numbers, numbers, None, grad_bias, None


_forward_operator.register_autograd(_backward, setup_context=_setup_context)
