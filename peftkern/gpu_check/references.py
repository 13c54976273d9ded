"""float64 results that the kernels' are compared with, computed where the operands are, by PyTorch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from peftkern.formats import QuantizedTensor
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.lora_linear import Weight
from peftkern.tune.operands import Operands

LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Greatest relative error of results with activations of a dtype."""


def dense(weight: Weight) -> Tensor:
    """A weight in float64."""
    exact = dequantize_reference(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight
    return exact.double()


def forward_error(operands: Operands, outputs: Sequence[Tensor]) -> float:
    """Worst relative error of the members' y."""
    x = operands.x.double()
    errors = []
    for member, output in zip(operands.members, outputs, strict=True):
        lora_A, lora_B = member.adapters.lora_A[0].double(), member.adapters.lora_B[0].double()
        low_rank = member.adapters.scaling[0] * (x @ lora_A.t()) @ lora_B.t()
        errors.append(relative_error(output, x @ dense(member.weight).t() + low_rank))
    return max(errors)


def backward_error(
    operands: Operands, grad_x: Tensor, grad_A: Sequence[Sequence[Tensor]], grad_B: Sequence[Sequence[Tensor]]
) -> float:
    """Worst relative error of dX and of the members' dA and dB; h must be the forward pass's."""
    x = operands.x.double()
    total = torch.zeros_like(x)
    errors = []
    for number, member in enumerate(operands.members):
        grad = operands.grads[number].double()
        lora_A, lora_B = member.adapters.lora_A[0].double(), member.adapters.lora_B[0].double()
        inner = member.adapters.scaling[0] * grad @ lora_B
        total += grad @ dense(member.weight) + inner @ lora_A
        h = member.adapters.scaling[0] * x @ lora_A.t()
        errors.append(relative_error(grad_A[number][0], inner.t() @ x))
        errors.append(relative_error(grad_B[number][0], grad.t() @ h))
    return max(*errors, relative_error(grad_x, total))


def relative_error(found: Tensor, exact: Tensor) -> float:
    """``‖found - exact‖ / ‖exact‖``; infinite if a value is not finite."""
    error = float((found.double() - exact).norm() / exact.norm())
    return error if math.isfinite(error) else math.inf


def differing_share(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The share of bytes that differ."""
    pairs = [(_bytes(one), _bytes(other)) for one, other in zip(found, exact, strict=True)]
    if any(one.shape != other.shape for one, other in pairs):
        return math.inf
    different = sum(int((one != other).sum()) for one, other in pairs)
    return different / max(1, sum(one.numel() for one, _ in pairs))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
