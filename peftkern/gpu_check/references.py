"""float64 results that the kernels' are compared with, computed where the operands are, by PyTorch alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from peftkern.formats import QuantizedTensor
from peftkern.ops.dequantize import dequantize_reference
from peftkern.ops.lora_linear import Weight
from peftkern.ops.lora_linear_group import Gradients
from peftkern.tune.operands import Operands

LIMITS = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 8e-3}
"""Greatest relative error of results with activations of a dtype."""


def dense(weight: Weight) -> Tensor:
    """A weight in float64."""
    exact = dequantize_reference(weight, torch.float32) if isinstance(weight, QuantizedTensor) else weight
    return exact.double()


def in_float64(operands: Operands) -> Operands:
    """The same operands in float64, weights dense, for the reference to compute with."""
    members = []
    for member in operands.members:
        factors = [[factor.double() for factor in side] for side in (member.adapters.lora_A, member.adapters.lora_B)]
        adapters = replace(member.adapters, lora_A=factors[0], lora_B=factors[1])
        members.append(replace(member, weight=dense(member.weight), adapters=adapters))
    x, h = operands.x.double(), operands.h.double()
    return Operands(x, members, [grad.double() for grad in operands.grads], h, "reference")


def forward_error(operands: Operands, outputs: Sequence[Tensor]) -> float:
    """Worst relative error of the members' y."""
    exact, _ = in_float64(operands).forward()
    return max(relative_error(*pair) for pair in zip(outputs, exact, strict=True))


def backward_error(operands: Operands, found: Gradients) -> float:
    """Worst relative error of dX and of the members' dA and dB."""
    exact_operands = in_float64(operands)
    exact = replace(exact_operands, h=exact_operands.forward()[1]).backward()
    return max(relative_error(*pair) for pair in zip(_flat(found), _flat(exact), strict=True))


def _flat(gradients: Gradients) -> list[Tensor]:
    grad_x, *factors = gradients
    every = [grad_x, *(gradient for members in factors for row in members for gradient in row)]
    return [gradient for gradient in every if gradient is not None]


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
