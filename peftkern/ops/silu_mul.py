"""The gate of a SwiGLU or GeGLU block: two halves that a feed-forward layer multiplies.

    y  = a(g) ⊙ u                dg = dy ⊙ u ⊙ a'(g)          du = dy ⊙ a(g)

    silu        a(g) = g σ(g)        a'(g) = σ(g) (1 + g (1 - σ(g)))        σ(g) = 1 / (1 + exp(-g))
    gelu        a(g) = g Φ(g)        a'(g) = Φ(g) + g exp(-g² / 2) / √(2π)  Φ: the normal distribution's
    gelu_tanh   gelu with σ(√(8 / π) (g + 0.044715 g³)) in place of Φ(g)

All tensors have the shape of g. What is kept for the backward pass is g and u (g alone where g asks for no gradient):
a(g), which a product of two operators keeps as well, is computed again. Arithmetic is in float32 (float64 for float64
inputs) and rounded once.

Source: GLU Variants Improve Transformer, Shazeer 2020 (arXiv:2002.05202), eq. 5 and 6 (GEGLU, and SwiGLU with β = 1);
Gaussian Error Linear Units, Hendrycks and Gimpel 2016 (arXiv:1606.08415), section 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.ops.lora_linear import FLOAT_DTYPES, compute_dtype, is_plain_eager

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
"""What the gate may go through."""

NOTHING_FREE = (False, False)


def silu_mul(gate: Tensor, up: Tensor, *, activation: str = "silu", backend: str | None = None) -> Tensor:
    """``y = activation(gate) * up``, element by element.

    Differentiable, once, in ``gate`` and ``up``; only what asks for a gradient gets one. Infinities and NaN give what
    ``torch.nn.functional.silu(gate) * up`` gives.

    Args:
        gate: float64, float32, bfloat16 or float16; any shape and strides.
        up: of the shape, dtype and device of ``gate``.
        activation: one of `ACTIVATIONS`; ``"gelu_tanh"`` is what PyTorch calls ``gelu(approximate="tanh")``.
        backend: name of the backend that must run it; ``None`` lets the table decide.

    Returns:
        A contiguous tensor of the shape and dtype of ``gate``; autocast changes nothing.

    Raises:
        ValueError: shapes or devices differ, a tensor is sparse, or ``activation`` is unknown.
        TypeError: an argument is no tensor or has another dtype.
        BackendError: a forced backend cannot run the call.
    """
    check_gate(gate, up)
    check_activation("silu_mul", activation)
    if is_plain_eager((gate, up)):
        return _apply(gate, up, activation, backend)
    y: Tensor = torch.ops.peftkern.silu_mul(gate, up, activation, backend)
    return y


def check_activation(operation: str, activation: Any) -> None:
    """Raise where ``activation`` is none of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{operation}: activation must be one of {', '.join(ACTIVATIONS)}; got {activation!r}")


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
def silu_mul_reference(gate: Tensor, up: Tensor, activation: str = "silu", out: Tensor | None = None) -> Tensor:
    """Forward in plain PyTorch, in float32 (float64 for a float64 gate).

    ``out``: contiguous memory for the result, which may be that of gate or up; ``None``: new memory.
    """
    dtype = compute_dtype(gate)
    value, _slope = _activated(gate.to(dtype), activation)
    y = (value * up.to(dtype)).to(gate.dtype).contiguous()
    return y if out is None else out.copy_(y)


@registry.register("silu_mul_backward", "reference")
def silu_mul_backward_reference(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    need_gate: bool,
    need_up: bool,
    activation: str = "silu",
    free: tuple[bool, bool] = NOTHING_FREE,
) -> tuple[Tensor | None, Tensor | None]:
    """Backward in plain PyTorch: the gradients of gate and up, or ``None`` for one that is not needed.

    up may be ``None`` where gate needs no gradient. ``free`` says whether the gradients of gate and of up may be
    written over gate and up; a backend that does so takes them as contiguous.
    """
    dtype = compute_dtype(gate)
    grad_ = grad.to(dtype)
    value, slope = _activated(gate.to(dtype), activation)
    grad_gate = grad_up = None
    if need_gate:
        assert up is not None
        grad_gate = (grad_ * up.to(dtype) * slope).to(gate.dtype).contiguous()
    if need_up:
        grad_up = (grad_ * value).to(gate.dtype).contiguous()
    return grad_gate, grad_up


def _activated(gate: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The activation of gate, and its slope."""
    if activation == "gelu":
        below = 0.5 * torch.special.erfc(gate * -math.sqrt(0.5))
        return gate * below, below + gate * torch.exp(-0.5 * gate * gate) / math.sqrt(2 * math.pi)
    if activation == "silu":
        # σ(-g), because 1 - σ(g) cancels for a large g
        sigmoid = gate.sigmoid()
        return gate * sigmoid, sigmoid * (1.0 + gate * (-gate).sigmoid())
    factor, cubic = math.sqrt(8 / math.pi), 0.044715
    near = gate.clamp(-_FAR, _FAR)
    inner = factor * near * (1.0 + cubic * near * near)
    sigmoid, rise = inner.sigmoid(), factor * (1.0 + 3.0 * cubic * near * near)
    return gate * sigmoid, sigmoid * (1.0 + near * (-inner).sigmoid() * rise)


_FAR = 20.0
"""From here on the sigmoid of gelu_tanh is 0 or 1, without a slope, also in float64; the cube stays finite."""


# ---- eager calls


class _SiluMul(torch.autograd.Function):
    """The operator's twin for plain eager calls."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
        ctx.options = (activation, backend)
        ctx.save_for_backward(gate, up if ctx.needs_input_grad[0] else None)
        y: Tensor = registry.run("silu_mul", gate, up, activation, backend=backend)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (activation, backend), (need_gate, need_up, *_) = ctx.options, ctx.needs_input_grad
        grad = grad.resolve_neg()  # the operator would be handed it so
        call = (grad, *ctx.saved_tensors, need_gate, need_up, activation)
        return *registry.run("silu_mul_backward", *call, backend=backend), None, None


_apply = cast(Callable[..., Tensor], _SiluMul.apply)


# ---- operators


@torch.library.custom_op(
    "peftkern::silu_mul", mutates_args=(), schema="(Tensor gate, Tensor up, str activation, str? backend) -> Tensor"
)
def _forward_operator(gate: Tensor, up: Tensor, activation: str, backend: str | None) -> Tensor:
    y: Tensor = registry.run("silu_mul", gate, up, activation, backend=backend)
    return y


@_forward_operator.register_fake
def _forward_fake(gate: Tensor, _up: Tensor, _activation: str, _backend: str | None) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op(
    "peftkern::silu_mul_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor gate, Tensor? up, bool need_gate, bool need_up, str activation, str? backend) "
    "-> Tensor[]",
)
def _backward_operator(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool, activation: str, backend: str | None
) -> list[Tensor]:
    grads = registry.run("silu_mul_backward", grad, gate, up, need_gate, need_up, activation, backend=backend)
    return [gradient for gradient in grads if gradient is not None]


@_backward_operator.register_fake
def _backward_fake(
    _grad: Tensor, gate: Tensor, _up: Tensor | None, need_gate: bool, need_up: bool, *_options: Any
) -> list[Tensor]:
    return [gate.new_empty(gate.shape) for need in (need_gate, need_up) if need]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, *ctx.options = inputs
    ctx.save_for_backward(gate, up if gate.requires_grad else None)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_gate, need_up, *_ = ctx.needs_input_grad
    gradients = torch.ops.peftkern.silu_mul_backward(grad, *ctx.saved_tensors, need_gate, need_up, *ctx.options)
    remaining = iter(gradients)
    return next(remaining) if need_gate else None, next(remaining) if need_up else None, None, None


_forward_operator.register_autograd(_backward, setup_context=_setup_context)
