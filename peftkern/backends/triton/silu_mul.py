"""The gate of a SwiGLU block; formulas and shapes are in :mod:`peftkern.ops.silu_mul`. Arithmetic is in float32."""

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
def gated(gate, up):
    """silu(gate) * up in float32."""
    value = gate.to(tl.float32)
    return value * tl.sigmoid(value) * up.to(tl.float32)


@triton.jit
def silu_mul_kernel(gate, up, y, count, BLOCK: tl.constexpr):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < count
    value = gated(tl.load(gate + elements, mask=mask, other=0.0), tl.load(up + elements, mask=mask, other=0.0))
    tl.store(y + elements, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def silu_mul_backward_kernel(
    grad, gate, up, grad_gate, grad_up, count, NEED_GATE: tl.constexpr, NEED_UP: tl.constexpr, BLOCK: tl.constexpr
):
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = elements < count
    incoming = tl.load(grad + elements, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(gate + elements, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(value)
    if NEED_GATE:
        other = tl.load(up + elements, mask=mask, other=0.0).to(tl.float32)
        # σ(-g), because 1 - σ(g) cancels for a large g
        slope = sigmoid * (1.0 + value * tl.sigmoid(-value))
        tl.store(grad_gate + elements, (incoming * other * slope).to(grad_gate.dtype.element_ty), mask=mask)
    if NEED_UP:
        tl.store(grad_up + elements, (incoming * value * sigmoid).to(grad_up.dtype.element_ty), mask=mask)


def silu_mul(gate: Tensor, up: Tensor, out: Tensor | None = None) -> Tensor:
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
            BLOCK=_BLOCK,
        )
    return y


def silu_mul_backward(
    grad: Tensor, gate: Tensor, up: Tensor | None, need_gate: bool, need_up: bool, free: tuple[bool, bool]
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
            NEED_GATE=need_gate,
            NEED_UP=need_up,
            BLOCK=_BLOCK,
        )
    return grad_gate, grad_up


def _gradient_memory(operand: Tensor, need: bool, free: bool) -> Tensor | None:
    if not need:
        return None
    return operand if free else torch.empty_like(operand)
