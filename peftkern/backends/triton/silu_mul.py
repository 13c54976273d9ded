"""The gate of a SwiGLU or GeGLU block; formulas and shapes are in :mod:`peftkern.ops.silu_mul`.

Arithmetic is in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftkern.backends.triton.integers import cdiv
from peftkern.backends.triton.launch import Traffic, launch

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr):
    """activation(gate) * up in float32."""
    value = gate.to(tl.float32)
    return value * below(value, ACTIVATION) * up.to(tl.float32)


@triton.jit
def below(x, ACTIVATION: tl.constexpr):
    """What the activation multiplies x with."""
    if ACTIVATION == "gelu":
        tail = normal_tail(x)
        result = tl.where(x < 0.0, tail, 1.0 - tail)
    elif ACTIVATION == "gelu_tanh":
        result = tl.sigmoid(tanh_argument(x))
    else:
        result = tl.sigmoid(x)
    return result


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """The slope of the activation at x."""
    share = below(x, ACTIVATION)
    if ACTIVATION == "gelu":
        result = share + x * tl.exp(-0.5 * x * x) * 0.3989422804
    elif ACTIVATION == "gelu_tanh":
        near = within_twenty(x)
        rise = 1.5957691216 * (1.0 + 3.0 * 0.044715 * near * near)
        result = share * (1.0 + near * tl.sigmoid(-tanh_argument(x)) * rise)
    else:
        # σ(-x), because 1 - σ(x) cancels for a large x
        result = share * (1.0 + x * tl.sigmoid(-x))
    return result


@triton.jit
def within_twenty(x):
    """x where the sigmoid of gelu_tanh has a slope; its cube is finite. NaN stays."""
    return tl.where(x > 20.0, 20.0, tl.where(x < -20.0, -20.0, x))


@triton.jit
def tanh_argument(x):
    near = within_twenty(x)
    return 1.5957691216 * near * (1.0 + 0.044715 * near * near)


@triton.jit
def normal_tail(x):
    """The normal distribution's share below -|x|; csrc/cpu/isa/silu_mul.inl.h says what is fitted."""
    z = tl.abs(x) * 0.7071067812
    s = 1.0 / (1.0 + 0.4 * z)
    p = 0.041253187 * s - 0.14031994
    p = ((p * s + 0.08398872) * s + 0.08796274) * s + 0.079757564
    p = (((p * s + 0.19339277) * s + 0.2018877) * s + 0.2264431) * s + 0.22563423
    return 0.5 * tl.exp(-z * z) * s * p


@triton.jit
def silu_mul_kernel(gate, up, y, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < count
    half = tl.load(gate + elements, mask=mask, other=0.0)
    value = gated(half, tl.load(up + elements, mask=mask, other=0.0), ACTIVATION)
    tl.store(y + elements, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    count,
    ACTIVATION: tl.constexpr,
    NEED_GATE: tl.constexpr,
    NEED_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < count
    incoming = tl.load(grad + elements, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(gate + elements, mask=mask, other=0.0).to(tl.float32)
    if NEED_GATE:
        other = tl.load(up + elements, mask=mask, other=0.0).to(tl.float32)
        down = incoming * other * slope(value, ACTIVATION)
        tl.store(grad_gate + elements, down.to(grad_gate.dtype.element_ty), mask=mask)
    if NEED_UP:
        down = incoming * value * below(value, ACTIVATION)
        tl.store(grad_up + elements, down.to(grad_up.dtype.element_ty), mask=mask)


def silu_mul(gate: Tensor, up: Tensor, activation: str, out: Tensor | None = None) -> Tensor:
    """Forward; see :func:`peftkern.ops.silu_mul.silu_mul_reference`. Tensors that are not contiguous are copied."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate) if out is None else out
    if y.numel() > 0:
        launch(
            silu_mul_kernel,
            (cdiv(y.numel(), _BLOCK),),
            gate,
            up,
            y,
            y.numel(),
            traffic=lambda: Traffic((gate, up), (y,), flops=5 * y.numel()),
            num_warps=_NUM_WARPS,
            num_stages=1,
            ACTIVATION=activation,
            BLOCK=_BLOCK,
        )
    return y


def silu_mul_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    need_gate: bool,
    need_up: bool,
    activation: str,
    free: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Backward; see :func:`peftkern.ops.silu_mul.silu_mul_backward_reference`."""
    grad, gate = grad.contiguous(), gate.contiguous()
    up = None if up is None else up.contiguous()
    grad_gate = _gradient_memory(gate, need_gate, free[0])
    grad_up = _gradient_memory(gate if up is None else up, need_up, free[1] and up is not None)
    if gate.numel() > 0:
        launch(
            silu_mul_backward_kernel,
            (cdiv(gate.numel(), _BLOCK),),
            grad,
            gate,
            gate if up is None else up,
            gate if grad_gate is None else grad_gate,
            gate if grad_up is None else grad_up,
            gate.numel(),
            traffic=lambda: Traffic(
                (grad, gate, up if need_gate else None), (grad_gate, grad_up), flops=9 * gate.numel()
            ),
            num_warps=_NUM_WARPS,
            num_stages=1,
            ACTIVATION=activation,
            NEED_GATE=need_gate,
            NEED_UP=need_up,
            BLOCK=_BLOCK,
        )
    return grad_gate, grad_up


def _gradient_memory(operand: Tensor, need: bool, free: bool) -> Tensor | None:
    if not need:
        return None
    return operand if free else torch.empty_like(operand)
