"""Tensors for one product of a group, and the calls that compute it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from peftkern.backends import registry
from peftkern.formats import QuantizedTensor
from peftkern.ops.lora_linear import Adapters, Weight
from peftkern.ops.lora_linear_group import Member
from peftkern.ops.quantize import quantize
from peftkern.tune.shapes import Group


@dataclass(frozen=True)
class Subject:
    """What is measured: the group, its weights' format (``None``: dense), the dtype of activations, the rank."""

    group: Group
    format: str | None
    dtype: torch.dtype
    rank: int = 16


@dataclass(frozen=True)
class Operands:
    """Everything that one call reads: x [tokens, in], the members, dY of each [tokens, out], h [tokens, Σr] float32.

    ``backend`` runs the calls.
    """

    x: Tensor
    members: Sequence[Member]
    grads: Sequence[Tensor]
    h: Tensor
    backend: str = "triton"

    @property
    def bytes_touched(self) -> int:
        """Of the weights, x and dY."""
        weights = [tensor for member in self.members for tensor in _tensors(member.weight)]
        return sum(tensor.nbytes for tensor in (*weights, self.x, *self.grads))

    def forward(self) -> Any:
        """y of every member, and h."""
        return registry.run("lora_linear_group", self.x, self.members, backend=self.backend)

    def input_gradient(self) -> Any:
        """dX."""
        return self.backward(adapters=False)

    def backward(self, adapters: bool = True) -> Any:
        """dX, and with ``adapters`` dA and dB of every member."""
        need_lora = [[adapters, adapters]] * len(self.members)
        arguments = (self.grads, self.x, self.members, self.h, True, need_lora)
        return registry.run("lora_linear_group_backward", *arguments, backend=self.backend)

    def copies(self, count: int) -> list[Operands]:
        """``count`` sets of the same numbers in memory of their own; this one is the first."""
        return [self, *(self._copy() for _ in range(count - 1))]

    def _copy(self) -> Operands:
        members = [replace(member, weight=_clone(member.weight)) for member in self.members]
        grads = [grad.clone() for grad in self.grads]
        return replace(self, x=self.x.clone(), members=members, grads=grads)


def make(subject: Subject, tokens: int, device: str) -> Operands:
    """Random operands with the magnitudes of a layer in training; they follow ``torch.manual_seed``."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, dtype=torch.float32, device=device) * scale).to(subject.dtype)

    group = subject.group
    members = [_member(subject, output, normal) for output in group.outputs]
    grads = [normal(tokens, output) for output in group.outputs]
    h = torch.ones(tokens, subject.rank * len(members), dtype=torch.float32, device=device)
    return Operands(normal(tokens, group.in_features), members, grads, h)


def _member(subject: Subject, output: int, normal: Callable[..., Tensor]) -> Member:
    in_features = subject.group.in_features
    dense = normal(output, in_features, scale=in_features**-0.5)
    weight: Weight = dense if subject.format is None else quantize(dense, subject.format)
    lora_A = normal(subject.rank, in_features, scale=in_features**-0.5)
    lora_B = normal(output, subject.rank, scale=0.1)
    return Member(weight, Adapters([lora_A], [lora_B], [2.0], [0.0], None), None)


def _tensors(weight: Weight) -> list[Tensor]:
    return [weight] if isinstance(weight, Tensor) else [weight.packed, weight.scales]


def _clone(weight: Weight) -> Weight:
    if isinstance(weight, QuantizedTensor):
        return replace(weight, packed=weight.packed.clone(), scales=weight.scales.clone())
    return weight.clone()
