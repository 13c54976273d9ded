"""The gate of a SwiGLU block: two halves that a feed-forward layer multiplies.

    y     = g σ(g) ⊙ u                          σ(g) = 1 / (1 + exp(-g))
    dg    = dy ⊙ u ⊙ σ(g) (1 + g (1 - σ(g)))     du = dy ⊙ g σ(g)

All tensors have the shape of g. What is kept for the backward pass is g and u (g alone where g asks for no gradient):
silu(g), which a product of two operators keeps as well, is computed again. Arithmetic is in float32 (float64 for
float64 inputs) and rounded once.

Source: GLU Variants Improve Transformer, Shazeer 2020 (arXiv:2002.05202), eq. 6 (SwiGLU with β = 1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.lora_linear import FLOAT_DTYPES, compute_dtype, is_plain_eager


def silu_mul(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """``y = silu(gate) * up``, element by element.

    Differentiable, once, in ``gate`` and ``up``; only what asks for a gradient gets one. Infinities and NaN give what
    ``torch.nn.functional.silu(gate) * up`` gives.

    Args:
        gate: float64, float32, bfloat16 or float16; any shape and strides.
        up: of the shape, dtype and device of ``gate``.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        A contiguous tensor of the shape and dtype of ``gate``; autocast changes nothing.

    Raises:
        ValueError: shapes or devices differ, or a tensor is sparse.
        TypeError: an argument is no tensor or has another dtype.
        BackendError: a forced backend cannot run the call.
    """
    check_gate(gate, up)
    if is_plain_eager((gate, up)):
        return _apply(gate, up, backend)
    y: Tensor = torch.ops.peftkern.silu_mul(gate, up, backend)
    return y


def check_gate(gate: Any, up: Any) -> None:
    """Raise as `silu_mul` does where the arguments do not fit each other."""
    for name, value in (("gate", gate), ("up", up)):
        if not isinstance(value, Tensor):
            raise TypeError(f"silu_mul: {name} must be a tensor, got {type(value).__name__}")
        if value.dtype not in FLOAT_DTYPES:
            raise TypeError(f"silu_mul: {name} must be float64, float32, bfloat16 or float16, got {value.dtype}")
        if value.layout != torch.strided:
            raise ValueError(f"silu_mul: {name} must be dense, got {value.layout}; use {name}.to_dense()")
    if up.dtype != gate.dtype:
        raise TypeError(f"silu_mul: up must have the dtype of gate, {gate.dtype}; got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"silu_mul: up must have the shape of gate, {list(gate.shape)}; got {list(up.shape)}")
    if up.device != gate.device:
        raise ValueError(f"silu_mul: up is on {up.device} and gate on {gate.device}; move one of them")


# ---- reference


@registry.register("silu_mul", "reference")
def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """Forward in plain PyTorch, in float32 (float64 for a float64 gate)."""
    dtype = compute_dtype(gate)
    return (torch.nn.functional.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype).contiguous()


@registry.register("silu_mul_backward", "reference")
def silu_mul_backward_reference(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Backward in plain PyTorch: the gradients of gate and up, or ``None`` for one that is not needed.

    up may be ``None`` where gate needs no gradient.
    """
    dtype = compute_dtype(gate)
    grad_, gate_ = grad.to(dtype), gate.to(dtype)
    sigmoid = gate_.sigmoid()
    grad_gate = grad_up = None
    if need_gate:
        assert up is not None
        # σ(-g), because 1 - σ(g) cancels for a large g
        slope = sigmoid * (1.0 + gate_ * (-gate_).sigmoid())
        grad_gate = (grad_ * up.to(dtype) * slope).to(gate.dtype).contiguous()
    if need_up:
        grad_up = (grad_ * gate_ * sigmoid).to(gate.dtype).contiguous()
    return grad_gate, grad_up


# ---- eager calls


class _SiluMul(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
        ctx.backend = backend
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        y: Tensor = registry.run("silu_mul", gate, up, backend=backend)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_gate, need_up, _ = ctx.needs_input_grad
        grad = grad.resolve_neg()  # the operator would be handed it so
        grads = registry.run("silu_mul_backward", grad, *ctx.saved_tensors, need_gate, need_up, backend=ctx.backend)
        return *grads, None


_apply = cast(Callable[..., Tensor], _SiluMul.apply)


# ---- operators


@torch.library.custom_op(
    "peftkern::silu_mul", mutates_args=(), schema="(Tensor gate, Tensor up, str? backend) -> Tensor"
)
def _forward_operator(gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
    y: Tensor = registry.run("silu_mul", gate, up, backend=backend)
    return y


@_forward_operator.register_fake
def _forward_fake(gate: Tensor, _up: Tensor, _backend: str | None) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op(
    "peftkern::silu_mul_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor? up, bool need_gate, bool need_up, str? backend) -> Tensor[]",
)
def _backward_operator(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool, backend: str | None
) -> list[Tensor]:
    grads = registry.run("silu_mul_backward", grad, gate, up, need_gate, need_up, backend=backend)
    return [gradient for gradient in grads if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(
    _grad: Tensor, gate: Tensor, _up: Tensor | None, need_gate: bool, need_up: bool, _backend: str | None
) -> list[Tensor]:
    return [gate.new_empty(gate.shape) for need in (need_gate, need_up) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.backend = inputs
    ctx.save_for_backward(gate, up if gate.requires_grad else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_gate, need_up, _ = ctx.needs_input_grad
    gradients = torch.ops.peftkern.silu_mul_backward(grad, *ctx.saved_tensors, need_gate, need_up, ctx.backend)
    remaining = iter(gradients)
    return next(remaining) if need_gate else None, next(remaining) if need_up else None, None


_forward_operator.register_autograd(_backward, setup_context=_setup_context)
